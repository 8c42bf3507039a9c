"""Teacher forward, student forward and backward: the only callers of megatron-core's pipeline schedules.

The teacher's hidden states of the response rows (not its logits) wait between the two passes, on the last pipeline stage. Both views are
compacted to their response rows before the lm_head, which `linear_jsd` applies. Shapes: B rows, S positions, H hidden size, N response rows.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_gkd.data.batch import Batch, BatchView
from megatron_gkd.lora import lora_enabled
from megatron_gkd.loss import LinearJsdOutput, linear_jsd
from megatron_gkd.parallel import Parallel

# Per-token results that are summed over the response tokens, in this order.
SUMMED = ("loss", "jsd", "sft_loss", "kl_forward", "kl_reverse", "entropy_student", "entropy_teacher", "top1_agreement", "token_correct")


@dataclass(frozen=True)
class LossSettings:
    """The arguments of `linear_jsd` that hold for the whole run. `beta` is the student's weight in the mixture."""

    divergence: str
    beta: float
    temperature: float
    sft_alpha: float
    vocab_size: int


@dataclass
class TokenSums:
    """Sums over response tokens of one pass: `values` [len(SUMMED)] float64, and their number."""

    values: Tensor
    num_tokens: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "TokenSums":
        return cls(torch.zeros(len(SUMMED), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.float64, device=device))

    def add(self, output: LinearJsdOutput) -> None:
        self.values += torch.stack([getattr(output, name).detach().double().sum() for name in SUMMED])
        self.num_tokens += len(output.loss)

    def means(self, parallel: Parallel) -> dict[str, float]:
        """Means over the global batch, and `num_tokens`. Collectives: a sum over data-parallel ranks, a broadcast from the last stage."""
        packed = torch.cat([self.values, self.num_tokens[None]])
        torch.distributed.all_reduce(packed, group=parallel.groups.dp)
        if parallel.pp_size > 1:
            torch.distributed.broadcast(packed, parallel.last_stage_rank, group=parallel.groups.pp)
        *sums, num_tokens = packed.tolist()
        means = {name: value / max(num_tokens, 1) for name, value in zip(SUMMED, sums)}
        means["token_accuracy"] = means.pop("token_correct")
        return means | {"num_tokens": int(num_tokens)}


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def response_hidden(hidden: Tensor, view: BatchView, parallel: Parallel) -> Tensor:
    """[S/TP, B, H] of the final norm -> [N, H], the rows that predict a response token, on every tensor-parallel rank.

    Collectives: an all-gather over the sequence shards; in backward the reduce-scatter that sums what each rank's part of the vocabulary
    contributes.
    """
    if parallel.tp_size > 1:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=parallel.groups.tp)
    size = view.input_ids.shape[1]
    return hidden[view.response_rows % size, view.response_rows // size]


def _run_schedule(model, views: Sequence[BatchView], loss: Callable[[int, Tensor], tuple], *, forward_only: bool, collect: bool = False) -> list:
    """One pass of the pipeline over the micro-batches. `loss(index, hidden)` sees the last stage's output of each."""

    def step(indices, model):
        index = next(indices)
        hidden = model(views[index].input_ids, views[index].position_ids, attention_mask=None)
        return hidden, lambda output, non_loss_data=False: loss(index, output)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(len(views))),
        model=[model],
        num_microbatches=len(views),
        seq_length=views[0].input_ids.shape[1],  # each micro-batch has its own; megatron-core sends the shapes along
        micro_batch_size=views[0].input_ids.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


@torch.no_grad()
def teacher_forward(model, batches: Sequence[Batch], parallel: Parallel) -> list[Tensor]:
    """LoRA off. The teacher's hidden states [N, H] of each micro-batch on the last stage, an empty list on the others."""
    views = [batch.teacher for batch in batches]
    with lora_enabled(model, False), eval_mode(model):
        return _run_schedule(
            model, views, lambda index, hidden: response_hidden(hidden, views[index], parallel).clone(), forward_only=True, collect=True
        )


def _loss_function(model, batches, teacher_hidden, settings: LossSettings, parallel: Parallel, sums: TokenSums) -> Callable[[int, Tensor], tuple]:
    """What the schedule calls on the last stage: (sum of the loss, response tokens, nothing to report) of a micro-batch; adds to `sums`."""
    head = model.module.output_layer.weight if parallel.is_last_stage else None

    def loss(index: int, hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
        batch = batches[index]
        output = linear_jsd(
            response_hidden(hidden, batch.student, parallel),
            teacher_hidden[index],
            head,
            labels=batch.student.targets,
            sft_alpha=0.0 if batch.on_policy else settings.sft_alpha,
            beta=settings.beta,
            temperature=settings.temperature,
            divergence=settings.divergence,
            group=parallel.groups.tp if parallel.tp_size > 1 else None,
            vocab_size=settings.vocab_size,
            reduce_hidden_grad=False,  # response_hidden's backward does it
        )
        num_tokens = len(output.loss)
        if num_tokens:
            sums.add(output)
        return output.loss.sum(), torch.tensor(num_tokens, dtype=torch.int, device=hidden.device), {}

    return loss


def student_forward_backward(model, batches: Sequence[Batch], teacher_hidden: list[Tensor], settings: LossSettings, parallel: Parallel) -> TokenSums:
    """LoRA on. Adds the gradient of (sum of the loss over all response tokens of the global batch) / (their number) to the LoRA parameters.

    `model` is wrapped in megatron-core's DistributedDataParallel, its gradient buffers zero. Returns this rank's sums (zero on other
    stages than the last). Collectives: the pipeline's, and those of finalize_model_grads over data- and tensor-parallel groups.
    """
    sums = TokenSums.zero(parallel.device)
    loss = _loss_function(model, batches, teacher_hidden, settings, parallel, sums)
    model.module.config.finalize_model_grads_func = finalize_model_grads
    with lora_enabled(model, True):
        _run_schedule(model, [batch.student for batch in batches], loss, forward_only=False)
    return sums


@torch.no_grad()
def student_forward(model, batches: Sequence[Batch], teacher_hidden: list[Tensor], settings: LossSettings, parallel: Parallel, sums: TokenSums) -> None:
    """LoRA on, dropout off, no gradient: evaluation. Adds to `sums`."""
    loss = _loss_function(model, batches, teacher_hidden, settings, parallel, sums)
    with lora_enabled(model, True), eval_mode(model):
        _run_schedule(model, [batch.student for batch in batches], loss, forward_only=True)


@torch.no_grad()
def forward_logits(model, shape, parallel: Parallel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """fp32 logits [B, S, V], whole and on the CPU of every rank: for verification and tests, not for training.

    input_ids [B, S] int64, position_ids [3, B, S] (text's by default), the same on all ranks. Collectives: the pipeline's, an all-gather of the vocabulary slices, a broadcast from the last stage.
    """
    num_rows, length = input_ids.shape
    padded = torch.nn.functional.pad(input_ids, (0, -length % parallel.tp_size))
    positions = torch.arange(padded.shape[1], device=padded.device).expand(3, num_rows, -1)
    if position_ids is not None:
        positions = torch.nn.functional.pad(position_ids, (0, -length % parallel.tp_size))
    rows = torch.arange(num_rows, device=padded.device)
    view = BatchView(padded, torch.zeros_like(padded), rows, rows, positions)

    def slice_of_logits(index: int, hidden: Tensor) -> Tensor:
        if parallel.tp_size > 1:
            hidden = gather_from_sequence_parallel_region(hidden, group=parallel.groups.tp)
        return hidden[:length].transpose(0, 1).float() @ model.output_layer.weight.float().T

    slices = _run_schedule(model, [view], slice_of_logits, forward_only=True, collect=True)
    logits = torch.empty(num_rows, length, shape.padded_vocab_size(parallel.tp_size), device=padded.device)
    if parallel.is_last_stage:
        parts = [torch.empty_like(slices[0]) for _ in range(parallel.tp_size)]
        torch.distributed.all_gather(parts, slices[0].contiguous(), group=parallel.groups.tp)
        logits = torch.cat(parts, dim=-1)
    if parallel.pp_size > 1:
        torch.distributed.broadcast(logits, parallel.last_stage_rank, group=parallel.groups.pp)
    return logits[..., : shape.vocab_size].cpu()
