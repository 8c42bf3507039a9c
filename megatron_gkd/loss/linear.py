"""The divergence from hidden states: the frozen lm_head is applied chunk by chunk, and no [N, V]
tensor ever exists.

N response rows, H hidden size, V this rank's columns, C rows of a chunk. Three GEMMs a chunk (both
sides' logits, the gradient of the hidden states), nothing recomputed. A chunk loop under plain
autograd would keep every chunk's logits: hence one Function.

The two collectives of a chunk are not overlapped with the next chunk's GEMMs: a second pair of
logits would double the memory, and on CPU ranks they take 0.4 % of the time at TP 4, 1.1 % at TP 8
(docs/benchmarks/loss.md; a GPU is unmeasured).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.passes import (
    LossCall,
    compare_sides,
    group_size,
    keeps_a,
    vocabulary_slice,
    write_gradient,
)
from megatron_gkd.loss.rows import (
    LinearJsdOutput,
    RowWeights,
    check_labels,
    empty_results,
    row_results,
    row_weights,
    zero_masked_rows,
)

# By device: bytes of a chunk's buffers [C, V] (`_buffer_bytes`) unless chunk_rows is given. The
# three GEMMs of a chunk read the whole head, so a GPU takes larger chunks: from about 300 rows on
# its GEMMs take longer than reading does. 2^30: 640 rows of 152k columns and a bfloat16 head; the
# backward of a layer of 8192 tokens needs three times as much (docs/memory.md).
CHUNK_BYTES = {"cpu": 300 * 2**20, "cuda": 2**30}  # cpu: 256 rows of 152k columns
ROW_MULTIPLE = {"cpu": 1, "cuda": 128}  # rows of a GEMM's tile, which a chunk should fill
# Vocabulary rows of a 16-bit head widened to float32 at a time. CPU: stays in cache (8192: half as
# slow again).
WEIGHT_BLOCK_ROWS = {"cpu": 1024, "cuda": 16384}


def _by_device(device: torch.device, table: dict[str, int]) -> int:
    return table.get(device.type, table["cuda"])


def _float32_blocks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks (columns of the logits, float32 [columns, H]) of the weight [V, H]; a float32 weight
    is one, no copy.
    """
    step = (
        max(1, len(weight))
        if weight.dtype == torch.float32
        else _by_device(weight.device, WEIGHT_BLOCK_ROWS)
    )
    for start in range(0, len(weight), step):
        columns = slice(start, min(start + step, len(weight)))
        yield columns, weight[columns].float()


def _rounds_gradient(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the logits' gradient has a buffer of its own, in bfloat16: that feeds the tensor
    cores. Elsewhere it takes the place of the teacher's logits (float16 would lose small entries).
    """
    return weight.dtype == torch.bfloat16 and _uses_tensor_cores(hidden, weight)


def _buffer_bytes(has_own_gradient: bool) -> int:
    """Of a row and column of a chunk: both sides' float32 logits, and a bfloat16 gradient."""
    return 8 + 2 * has_own_gradient


def _chunk_rows(
    num_rows: int, num_local_columns: int, device: torch.device, *, has_own_gradient: bool = False
) -> int:
    """Rows of a chunk: all chunks nearly equal, their number the least whose buffers fit
    CHUNK_BYTES (one row, or a tile of them, where none fits).
    """
    multiple = _by_device(device, ROW_MULTIPLE)
    of_tile = _buffer_bytes(has_own_gradient) * num_local_columns * multiple
    most = max(1, _by_device(device, CHUNK_BYTES) // of_tile) * multiple
    rows = math.ceil(num_rows / math.ceil(num_rows / most))
    return min(math.ceil(rows / multiple) * multiple, num_rows)


def _uses_tensor_cores(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GEMM of 16-bit inputs with float32 sums and a float32 result is at hand: torch has
    it on CUDA only.
    """
    return (
        weight.is_cuda
        and hidden.dtype == weight.dtype
        and weight.dtype in (torch.bfloat16, torch.float16)
    )


def _chunk_logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [C, V] float32 = hidden [C, H] times the weight [V, H] transposed, products and sums in
    float32.
    """
    if _uses_tensor_cores(hidden, weight):
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        return
    hidden = hidden.float()
    for columns, block in _float32_blocks(weight):
        torch.mm(hidden, block.t(), out=out[:, columns])


def _chunk_hidden_gradient(
    logits_gradient: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
) -> None:
    """out [C, H] float32 = logits_gradient [C, V] times the weight [V, H], products and sums in
    float32.
    """
    if _uses_tensor_cores(logits_gradient, weight):
        torch.mm(logits_gradient, weight, out_dtype=torch.float32, out=out)
        return
    out.zero_()
    for columns, block in _float32_blocks(weight):
        out.addmm_(logits_gradient[:, columns], block)


def _distil_chunk(
    student: torch.Tensor,
    teacher: torch.Tensor,
    gradient: torch.Tensor,
    labels: torch.Tensor | None,
    weights: RowWeights,
    call: LossCall,
) -> torch.Tensor:
    """Results [K, C] of one chunk from both sides' float32 logits [C, V].

    With call.gradient, `gradient` [C, V] is filled with the loss's gradient w.r.t. the student's
    logits; it may be `teacher`, which does not keep its logits.
    """
    a_out = teacher if keeps_a(student, call) else None
    found = compare_sides(student, teacher, labels, call, a_out)
    if call.gradient:
        write_gradient(
            gradient,
            student,
            teacher,
            found.scalars,
            found.sums.gradient_sum,
            labels,
            weights,
            call,
        )
    return row_results(found.student, found.teacher, found.sums, labels, weights)


class _LinearDivergence(torch.autograd.Function):
    """Both sides' hidden states [N, H] and the head [V, H] -> (loss [N], metrics [K, N]).

    loss and dloss/dlogits as in divergence.py; dloss/dhidden = dloss/dlogits W, summed over the
    ranks. Forward: per chunk one all-gather of the rows' statistics and one all-reduce of the sums,
    and already the gradient for an upstream of 1 (rows are independent). Backward: the upstream
    gradient times that, and one all-reduce of [N, H] unless the caller reduces it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor | None,
        weights: RowWeights,
        call: LossCall,
        chunk_rows: int,
        reduce_hidden_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, hidden_size = student_hidden.shape
        head = weight[: call.columns.num_columns]
        buffers = torch.empty(2, chunk_rows, len(head), dtype=torch.float32, device=weight.device)
        hidden_gradient = torch.empty(
            num_rows if call.gradient else 0, hidden_size, dtype=torch.float32, device=weight.device
        )
        gradients = (
            torch.empty_like(buffers[0], dtype=torch.bfloat16)
            if _rounds_gradient(student_hidden, weight) and call.gradient
            else buffers[1]
        )
        chunks = []
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, num_rows))
            student, teacher = buffers[:, : chunk.stop - chunk.start]
            _chunk_logits(student_hidden[chunk], head, student)
            _chunk_logits(teacher_hidden[chunk], head, teacher)
            chunk_weights = RowWeights(*(row_weight[chunk] for row_weight in weights))
            chunk_labels = None if labels is None else labels[chunk]
            gradient = gradients[: len(student)]
            chunks.append(
                _distil_chunk(student, teacher, gradient, chunk_labels, chunk_weights, call)
            )
            if call.gradient:
                _chunk_hidden_gradient(gradient, head, hidden_gradient[chunk])
        if call.gradient:
            zero_masked_rows(hidden_gradient, labels)
        ctx.save_for_backward(hidden_gradient)
        ctx.group, ctx.dtype = call.group if reduce_hidden_grad else None, student_hidden.dtype
        results = torch.cat(chunks, 1)
        loss, metrics = results[0], results[1:].clone()
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        (hidden_gradient,) = ctx.saved_tensors
        gradient = upstream.float().unsqueeze(1) * hidden_gradient
        if group_size(ctx.group) > 1:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient.to(ctx.dtype), *[None] * 7


def linear_divergence(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    divergence: Divergence,
    *,
    labels: torch.Tensor | None = None,
    sft_alpha: float = 0.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    reduce_hidden_grad: bool = True,
) -> LinearJsdOutput:
    """Per-token loss and metrics from hidden states and the frozen lm_head; float32 [N] each, the
    same on all ranks of `group`.

    Args:
        student_hidden: [N, H], the same on all ranks of `group` (gather sequence shards before);
            gets the gradient.
        teacher_hidden: [N, H], no gradient. Both sides' logits must be finite, except in rows that
            a label masks.
        weight: [V/TP, H], this rank's rows of the lm_head, frozen. Logits, their gradient and all
            GEMMs' sums are float32 whatever the dtype of weight and hidden states; only on CUDA a
            bfloat16 head rounds the logits' gradient to bfloat16 for the last GEMM.
        divergence: which one, the student's weight in its mixture, temperature, clip, top K.
        labels: int64 [N] global ids, -100 masks the row; needed by the SFT term and the label
            metrics.
        sft_alpha: in [0, 1]; loss = (1 - sft_alpha) divergence + sft_alpha cross_entropy, the
            latter of logits that are not divided by the temperature.
        group, vocab_size: as in `logits_divergence`.
        chunk_rows: rows whose logits exist at a time; None makes equal chunks whose buffers fit
            CHUNK_BYTES. Beside these there are [N, H] in float32, and as much again in backward.
        reduce_hidden_grad: sum the gradient of student_hidden over the group in backward. False
            where the caller gathered student_hidden with a function whose backward reduce-scatters
            (sequence parallelism).
    Without gradient mode, or if student_hidden needs no gradient, the gradient is not computed.
    Raises ValueError for shapes, labels or sizes that do not fit each other.
    Collectives: forward one all-gather [12, C] and one all-reduce [4, C] of float64 a chunk, with a
    top K two all-gathers, [12 + K, C] and [12, C]; backward one all-reduce [N, H] of float32 with
    reduce_hidden_grad, otherwise none. None at all if N = 0.
    """
    if student_hidden.dim() != 2 or student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            "student_hidden and teacher_hidden must both be [N, H] of one shape, "
            f"got {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != student_hidden.shape[1]:
        raise ValueError(
            f"weight must be [V/TP, {student_hidden.shape[1]}] like the hidden states, "
            f"got {tuple(weight.shape)}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires a gradient, which the loss from hidden states does not give: freeze "
            "it, or use logits_jsd or logits_divergence"
        )
    num_rows = len(student_hidden)
    columns = vocabulary_slice(len(weight), vocab_size, group)
    check_labels(labels, num_rows, vocab_size or len(weight) * group_size(group), sft_alpha)
    if num_rows == 0:  # the same on all ranks of the group: no rank calls a collective
        loss = student_hidden.float().sum(-1)
        return LinearJsdOutput(loss, *empty_results(labels, loss))
    call = LossCall(
        divergence,
        columns,
        sft_alpha,
        group,
        metrics=True,
        gradient=torch.is_grad_enabled() and student_hidden.requires_grad,
    )
    if chunk_rows is None:
        own = call.gradient and _rounds_gradient(student_hidden, weight)
        chunk_rows = _chunk_rows(num_rows, len(weight), weight.device, has_own_gradient=own)
    loss, metrics = _LinearDivergence.apply(
        student_hidden,
        teacher_hidden.detach(),
        weight.detach(),
        labels,
        row_weights(labels, num_rows, sft_alpha, student_hidden.device),
        call,
        min(chunk_rows, num_rows),
        reduce_hidden_grad,
    )
    return LinearJsdOutput(loss, *metrics)


def linear_jsd(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    sft_alpha: float = 0.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "jsd",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    clip: float | None = None,
    top_k: int | None = None,
    chunk_rows: int | None = None,
    reduce_hidden_grad: bool = True,
) -> LinearJsdOutput:
    """`linear_divergence`, its divergence given by the settings: beta, temperature, divergence,
    clip and top_k as in `vocab_parallel_jsd`.
    """
    return linear_divergence(
        student_hidden,
        teacher_hidden,
        weight,
        Divergence(divergence, beta, temperature, clip, top_k),
        labels=labels,
        sft_alpha=sft_alpha,
        group=group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
        reduce_hidden_grad=reduce_hidden_grad,
    )
