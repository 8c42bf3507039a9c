"""The loss of a micro-batch: the divergence of its response tokens, and what each of them counts.

Shapes: N response rows of the micro-batch, C context-parallel ranks, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.data.batch import Batch, BatchView
from megatron_gkd.lora import as_teacher
from megatron_gkd.lora.modules import has_head_lora, lm_head
from megatron_gkd.loss import Divergence, LinearJsdOutput, linear_divergence, logits_divergence
from megatron_gkd.loss.token_weights import WEIGHTS, TokenStatistics, WeightName
from megatron_gkd.metrics import Importance, TokenSums
from megatron_gkd.parallel import Parallel

MOST_LOG_RATIO = 20.0  # of an importance ratio, in nats: its mean is a number in any case


@dataclass(frozen=True)
class LossSettings:
    """The loss of the whole run: of each token (1 - sft_alpha) divergence + sft_alpha
    cross-entropy, times its importance; their mean, weighted by token_weight.
    """

    divergence: Divergence
    sft_alpha: float
    vocab_size: int  # without padding
    token_weight: WeightName = "none"
    importance_clip: float | None = None  # None: no importance


def response_share(view: BatchView, parallel: Parallel) -> slice:
    """The response rows of N whose loss this context-parallel rank computes."""
    number, part, parts = len(view.targets), parallel.cp_rank, parallel.cp_size
    return slice(number * part // parts, number * (part + 1) // parts)


def places(response_rows: Tensor) -> Tensor:
    """float32 [N], in (0, 1]: number of each response token, from 1, over the number of tokens of
    its response. A response is a run of neighbouring response rows [N].
    """
    if not len(response_rows):
        return response_rows.float()
    number = torch.arange(len(response_rows), device=response_rows.device)
    follows = torch.zeros_like(number, dtype=torch.bool)
    follows[1:] = response_rows[1:] == response_rows[:-1] + 1
    first = number.masked_fill(follows, 0).cummax(0).values
    is_last = torch.ones_like(follows)
    is_last[:-1] = ~follows[1:]
    ends = number.masked_fill(~is_last, len(number)).flip(0).cummin(0).values.flip(0)
    return (number - first + 1) / (ends - first + 1)


def importance(output: LinearJsdOutput, drawn: Tensor, clip: float) -> Importance:
    """Of written tokens. drawn: fp32 [N], their log-probabilities when they were drawn, of the same
    kind as the loss's: under the student's own softmax, before temperature and filters.
    """
    assert output.sft_loss is not None, "the batch has labels"
    ratio = (-output.sft_loss.detach() - drawn).clamp_max(MOST_LOG_RATIO).exp()
    return Importance(ratio, ratio.clamp_max(clip))


def micro_batch_loss(
    decoder: Any,
    batch: Batch,
    student: Tensor,
    teacher: Tensor,
    settings: LossSettings,
    parallel: Parallel,
    sums: TokenSums,
) -> tuple[Tensor, Tensor]:
    """(sum of the loss, number of response tokens) of this rank's share of a micro-batch; adds to
    `sums`, whose sum of the tokens' weights is what the loss is divided by in the end.

    student, teacher: hidden states [N/C, H] of the response rows. The lm_head is applied chunk by
    chunk in `linear_divergence`; where it carries LoRA both sides' logits [N/C, V/TP] are made, in
    fp32.
    """
    share = response_share(batch.student, parallel)
    labels = batch.student.targets[share]
    sft_alpha = 0.0 if batch.is_written else settings.sft_alpha
    group = parallel.groups.tp if parallel.tp_size > 1 else None
    if not has_head_lora(decoder):
        output = linear_divergence(
            student,
            teacher,
            decoder.output_layer.weight,
            settings.divergence,
            labels=labels,
            sft_alpha=sft_alpha,
            group=group,
            vocab_size=settings.vocab_size,
            reduce_hidden_grad=False,  # response_hidden's backward sums it over the ranks
        )
    else:
        with torch.no_grad(), as_teacher(decoder):
            teacher_logits = lm_head(decoder, teacher)
        output = logits_divergence(
            lm_head(decoder, student),
            teacher_logits,
            settings.divergence,
            labels=labels,
            sft_alpha=sft_alpha,
            group=group,
            vocab_size=settings.vocab_size,
        )
    weight = of_written = None
    if settings.importance_clip is not None and batch.log_probabilities is not None:
        of_written = importance(output, batch.log_probabilities[share], settings.importance_clip)
        output = output._replace(loss=output.loss * of_written.factor)
    if settings.token_weight != "none":
        statistics = TokenStatistics(
            output.entropy_student,
            output.entropy_teacher,
            places(batch.student.response_rows)[share],
        )
        weight = WEIGHTS[settings.token_weight](statistics)
        output = output._replace(loss=output.loss * weight)
    num_tokens = len(output.loss)
    if num_tokens:
        sums.add(output, batch, share, weight, of_written)
    return output.loss.sum(), torch.full((), num_tokens, dtype=torch.int, device=student.device)
