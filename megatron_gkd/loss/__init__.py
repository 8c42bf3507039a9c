"""The distillation loss: per-token divergence of student and teacher, from hidden states or from
logits.

The settings come without torch, which is imported with the first function that is asked for: a
command line is checked before it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_gkd.loss.divergence import Divergence

if TYPE_CHECKING:
    from megatron_gkd.loss.linear import linear_divergence, linear_jsd
    from megatron_gkd.loss.logits import logits_divergence, logits_jsd, vocab_parallel_jsd
    from megatron_gkd.loss.rows import LinearJsdOutput

__all__ = [
    "Divergence",
    "LinearJsdOutput",
    "linear_divergence",
    "linear_jsd",
    "logits_divergence",
    "logits_jsd",
    "vocab_parallel_jsd",
]

FILES = {
    "LinearJsdOutput": "rows",
    "linear_divergence": "linear",
    "linear_jsd": "linear",
    "logits_divergence": "logits",
    "logits_jsd": "logits",
    "vocab_parallel_jsd": "logits",
}


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FILES[name]}"), name)
