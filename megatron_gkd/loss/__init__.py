"""The distillation loss: per-token divergence of student and teacher, from hidden states or from
logits.
"""

from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.linear import linear_jsd
from megatron_gkd.loss.logits import logits_jsd, vocab_parallel_jsd
from megatron_gkd.loss.output import LinearJsdOutput

__all__ = ["Divergence", "LinearJsdOutput", "linear_jsd", "logits_jsd", "vocab_parallel_jsd"]
