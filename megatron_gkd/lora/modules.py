"""LoRA beside megatron-core's frozen linears, the lm_head and the towers': y = W x + (alpha / r)
W_up W_down x of the active slot (slots.py).

Separate W_down and W_up for q, k, v and for gate, up (what PEFT means), although megatron-core
fuses those matrices. The fused base runs untouched; the update is one product with the W_downs side
by side, which also draws the dropout of the shared input (low_product.py), and one with the W_ups
laid out block by block, so a fused linear costs two small products whatever the number of its
projections.

Products run in the activations' dtype (as under autocast), the parameters stay fp32. Legend: S
sequence, B rows of the batch, r rank, P projections of a fused linear, R = P r. The linears of
experts are in grouped.py.

Under sequence parallelism the replicated matrices see a shard of the sequence, so their gradients
are partial sums: they are marked `sequence_parallel` and megatron-core's finalize_model_grads adds
them over the tensor-parallel group.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_gkd.lora.low_product import low_product
from megatron_gkd.lora.slots import LoraModule, LoraSlot, zeros
from megatron_gkd.lora.up_product import add_up_product, block_layout, lay_out
from megatron_gkd.model.tensor_slice import TensorSlice


class LoraColumnParallel(LoraModule):
    """LoRA on the fused qkv. W_down [r, H] replicated, W_up the rows of this rank's `segments`.

    Where several ranks read one key/value head (`num_shared_rows` > 0), each has a part of the
    gradient of that head's rows. W_up of k and v is then whole on every rank, replicated like
    W_down: megatron-core's sum over the ranks, one a step, completes its gradient, the norm counts
    it once, and the copies stay equal.
    """

    def __init__(
        self,
        base: Any,
        segments: list[TensorSlice],
        *,
        num_shared_rows: int,
        tp_group: ProcessGroup,
        salt: int = 0,
    ):
        super().__init__(base, salt=salt)
        self.segments = segments
        self.num_shared_rows = num_shared_rows
        self.tp_group = tp_group
        self.sequence_parallel: bool = base.sequence_parallel

    def fill(self, slot: LoraSlot, targets: Sequence[str]) -> None:
        for name in targets:
            slot.down[name] = zeros(
                slot.rank, self.base.input_size, sequence_parallel=self.sequence_parallel
            )
            if self.is_shared(name):
                slot.up[name] = zeros(
                    self.num_shared_rows, slot.rank, sequence_parallel=self.sequence_parallel
                )
            else:
                own = [segment.num_rows for segment in self.segments if segment.name == name]
                slot.up[name] = zeros(sum(own), slot.rank, tensor_model_parallel=True)

    def is_shared(self, name: str) -> bool:
        """Whether every rank holds all rows of that projection's W_up."""
        return self.num_shared_rows > 0 and name != "q_proj"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [S/TP, B, H] (or [S, B, H] without sequence parallelism) -> ([S, B, rows], bias). One
        all-gather of [S/TP, B, R].
        """
        output, bias = self.base(x)
        slot = self.slot
        if slot is None:
            return output, bias
        down, up = self.fused(slot)
        low = low_product(x, down, self.drop_of(slot))
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        return add_up_product(output, low, up, slot.scale), bias

    def target_segments(self, slot: LoraSlot) -> Iterator[tuple[TensorSlice, int]]:
        """The segments with LoRA in `slot`, each with its first row in that projection's W_up."""
        taken = dict.fromkeys(slot.down, 0)
        for segment in self.segments:
            if segment.name in taken:
                is_shared = self.is_shared(segment.name)
                yield segment, segment.rows.start if is_shared else taken[segment.name]
                taken[segment.name] += segment.num_rows

    def fused(self, slot: LoraSlot) -> tuple[Tensor, Tensor]:
        """W_down [P r, H], and W_up [rows, P r]: each projection's rows in its own block of
        columns, zero elsewhere; rows in the base's order.
        """
        segments, own = [], self.target_segments(slot)
        for segment in self.segments:
            first = next(own)[1] if segment.name in slot.down else 0
            segments.append((segment.name, first, segment.num_rows))
        sizes = tuple((name, len(up)) for name, up in slot.up.items())
        down = torch.cat(list(slot.down.values()))
        layout = block_layout(tuple(segments), sizes, slot.rank, down.device)
        return down, lay_out(slot.up.values(), layout, len(sizes) * slot.rank)


class LoraRowParallel(LoraModule):
    """LoRA on o_proj. W_down [r, in/TP] sharded, W_up [H, r] replicated."""

    def __init__(self, base: Any, *, tp_group: ProcessGroup, salt: int = 0):
        super().__init__(base, salt=salt)
        self.tp_group = tp_group
        self.sequence_parallel: bool = base.sequence_parallel

    def fill(self, slot: LoraSlot, targets: Sequence[str]) -> None:
        (name,) = targets
        slot.down[name] = zeros(
            slot.rank, self.base.input_size_per_partition, tensor_model_parallel=True
        )
        slot.up[name] = zeros(
            self.base.output_size, slot.rank, sequence_parallel=self.sequence_parallel
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [S, B, in/TP] -> ([S/TP, B, H] or [S, B, H], bias). One reduce-scatter (or all-reduce)
        of [S, B, r].
        """
        output, bias = self.base(x)
        slot = self.slot
        if slot is None:
            return output, bias
        down, up = self.fused(slot)
        low = low_product(x, down, self.drop_of(slot))
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return add_up_product(output, low, up, slot.scale), bias

    def fused(self, slot: LoraSlot) -> tuple[Tensor, Tensor]:
        """W_down [r, in/TP] and W_up [H, r]."""
        (down,), (up,) = slot.down.values(), slot.up.values()
        return down, up


class LoraLinear(LoraModule):
    """LoRA on a linear of a tower, whole on every rank. W_down [r, in], W_up [out, r].

    Under sequence parallelism a rank's features serve its shard of the sequence alone: gradients
    are partial sums here too.
    """

    def __init__(self, base: nn.Linear, *, sequence_parallel: bool):
        super().__init__(base)
        self.sequence_parallel = sequence_parallel

    def fill(self, slot: LoraSlot, targets: Sequence[str]) -> None:
        (name,) = targets
        mark = self.sequence_parallel
        slot.down[name] = zeros(slot.rank, self.base.in_features, sequence_parallel=mark)
        slot.up[name] = zeros(self.base.out_features, slot.rank, sequence_parallel=mark)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]. No collectives."""
        output = self.base(x)
        slot = self.slot
        if slot is None:
            return output
        (down,), (up,) = slot.down.values(), slot.up.values()
        low = low_product(x, down, self.drop_of(slot))
        return add_up_product(output, low, up, slot.scale)


class LoraHead(LoraModule):
    """LoRA on the lm_head, beside `output_layer` on the last stage. W_down [r, H] replicated, W_up
    this rank's rows [V/TP, r].

    Every rank sees all hidden states but only its part of the vocabulary: the gradient of W_down is
    a partial sum, marked like one.
    """

    def __init__(self, num_rows: int, hidden_size: int, *, sequence_parallel: bool, salt: int = 0):
        super().__init__(None, salt=salt)
        self.num_rows = num_rows
        self.hidden_size = hidden_size
        self.sequence_parallel = sequence_parallel

    def fill(self, slot: LoraSlot, targets: Sequence[str]) -> None:
        (name,) = targets
        slot.down[name] = zeros(
            slot.rank, self.hidden_size, sequence_parallel=self.sequence_parallel
        )
        slot.up[name] = zeros(self.num_rows, slot.rank, tensor_model_parallel=True)

    def forward(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """This rank's logits, fp32 [..., V/TP], of hidden [..., H], the same on all TP ranks -> the
        logits with the active slot's LoRA, in their memory. No collectives.
        """
        slot = self.slot
        if slot is None:
            return logits
        (down,), (up,) = slot.down.values(), slot.up.values()
        low = low_product(hidden.float(), down, self.drop_of(slot))
        return add_up_product(logits, low, up, slot.scale)


def has_head_lora(model: Any) -> bool:
    """Whether the lm_head of this stage carries LoRA, the student's or the teacher's."""
    return getattr(model, "head_lora", None) is not None


def lm_head(model: Any, hidden: Tensor) -> Tensor:
    """This rank's logits, fp32 [..., V/TP], of hidden [..., H] on the last stage, with the active
    slot's LoRA.
    """
    logits = hidden.float() @ model.output_layer.weight.float().T
    return model.head_lora(logits, hidden) if has_head_lora(model) else logits
