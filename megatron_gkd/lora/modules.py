"""LoRA beside megatron-core's frozen linears, the lm_head and the towers': y = W x + (alpha / r)
W_up W_down x, with a toggle.

Separate W_down and W_up for q, k, v and for gate, up (what PEFT means), although megatron-core
fuses those matrices. The fused base runs untouched; the update is one product with the W_downs side
by side and one with the W_ups laid out block by block, so a fused linear costs two small products
whatever the number of its projections. Dropout is drawn once for the shared input of a fused
linear.

Products run in the activations' dtype (as under autocast), the parameters stay fp32. Legend: S
sequence, B rows of the batch, r rank, P projections of a fused linear, R = P r padded to a multiple
of 8 (grouped_mm wants 16-byte rows), E local experts, T dispatched tokens.

Under sequence parallelism the replicated matrices see a shard of the sequence, so their gradients
are partial sums: they are marked `sequence_parallel` and megatron-core's finalize_model_grads adds
them over the tensor-parallel group.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_gkd.model.experts import ExpertRows, GroupedLinear, grouped_product
from megatron_gkd.model.tensor_slice import TensorSlice


class LoraModule(nn.Module):
    """State that the three kinds share: the frozen base, the toggle, the matrices by projection
    name (q_proj, ...).
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = dropout
        self.enabled = True
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()

    def drop(self, x: Tensor, generator: str | None) -> Tensor:
        """Dropout with the named generator of megatron-core's tracker; None is the default one,
        equal on all TP ranks.
        """
        if not self.dropout or not self.training:
            return x
        if generator is None:
            return F.dropout(x, self.dropout)
        with get_cuda_rng_tracker().fork(generator):
            return F.dropout(x, self.dropout)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(
        torch.zeros(*shape, dtype=torch.float32, device=torch.cuda.current_device())
    )


def _padding(columns: int) -> int:
    return -columns % 8


class LoraColumnParallel(LoraModule):
    """LoRA on the fused qkv. W_down [r, H] replicated, W_up the rows of this rank's `segments`."""

    def __init__(
        self,
        base,
        segments: list[TensorSlice],
        targets: list[str],
        *,
        tp_group,
        rank: int,
        alpha: float,
        dropout: float,
    ):
        super().__init__(base, rank, alpha, dropout)
        self.segments = segments
        self.tp_group = tp_group
        self.sequence_parallel = base.sequence_parallel
        for name in targets:
            self.down[name] = _parameter(rank, base.input_size)
            self.down[name].sequence_parallel = self.sequence_parallel
            num_rows = sum(segment.num_rows for segment in segments if segment.name == name)
            if num_rows:  # with more TP ranks than key/value heads a rank may own no row of k or v
                self.up[name] = _parameter(num_rows, rank)
                self.up[name].tensor_model_parallel = True

    def forward(self, x: Tensor):
        """x [S/TP, B, H] (or [S, B, H] without sequence parallelism) -> ([S, B, rows], bias). One
        all-gather of [S/TP, B, R].
        """
        output, bias = self.base(x)
        if not self.enabled:
            return output, bias
        x = self.drop(x, "model-parallel-rng" if self.sequence_parallel else None)
        down = torch.cat(list(self.down.values())).to(x.dtype)
        low = F.linear(x, down)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        return torch.add(output, F.linear(low, self.fused_up().to(x.dtype)), alpha=self.scale), bias

    def target_segments(self) -> Iterator[tuple[TensorSlice, int]]:
        """The segments that have LoRA, each with its first row in that projection's W_up."""
        taken = dict.fromkeys(self.down, 0)
        for segment in self.segments:
            if segment.name in taken:
                yield segment, taken[segment.name]
                taken[segment.name] += segment.num_rows

    def fused_up(self) -> Tensor:
        """[rows, P r]: each projection's rows in its own block of columns, zero elsewhere; rows in
        the base's order.
        """
        names, first_rows = list(self.down), (first for _, first in self.target_segments())
        blocks = []
        for segment in self.segments:
            if segment.name in names:
                first = next(first_rows)
                rows = self.up[segment.name][first : first + segment.num_rows]
                position = names.index(segment.name)
                blocks.append(
                    F.pad(rows, (position * self.rank, (len(names) - 1 - position) * self.rank))
                )
            else:
                blocks.append(
                    torch.zeros(
                        segment.num_rows, len(names) * self.rank, device=self.base.weight.device
                    )
                )
        return torch.cat(blocks)


class LoraRowParallel(LoraModule):
    """LoRA on o_proj. W_down [r, in/TP] sharded, W_up [H, r] replicated."""

    def __init__(self, base, name: str, *, tp_group, rank: int, alpha: float, dropout: float):
        super().__init__(base, rank, alpha, dropout)
        self.tp_group = tp_group
        self.sequence_parallel = base.sequence_parallel
        self.down[name] = _parameter(rank, base.input_size_per_partition)
        self.down[name].tensor_model_parallel = True
        self.up[name] = _parameter(base.output_size, rank)
        self.up[name].sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor):
        """x [S, B, in/TP] -> ([S/TP, B, H] or [S, B, H], bias). One reduce-scatter (or all-reduce)
        of [S, B, r].
        """
        output, bias = self.base(x)
        if not self.enabled:
            return output, bias
        (down,), (up,) = self.down.values(), self.up.values()
        low = F.linear(self.drop(x, "model-parallel-rng"), down.to(x.dtype))
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(output, F.linear(low, up.to(x.dtype)), alpha=self.scale), bias


class LoraGrouped(LoraModule):
    """LoRA on an expert linear (gate and up fused, or down). W_down [E, r, in] and W_up [E, out/P,
    r], local to the expert's rank.
    """

    def __init__(
        self,
        base: GroupedLinear,
        names: list[str],
        targets: list[str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
    ):
        super().__init__(base, rank, alpha, dropout)
        self.names = names
        num_experts, out_features, in_features = base.weight.shape
        for name in targets:
            self.down[name] = _parameter(num_experts, rank, in_features)
            self.up[name] = _parameter(num_experts, out_features // len(names), rank)
            for parameter in (self.down[name], self.up[name]):
                parameter.allreduce = False  # reduced over the experts' own data-parallel group
                parameter.tensor_model_parallel = (
                    True  # each rank's experts are its own: all count in the gradient norm
                )

    def forward(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """x [T, in] sorted by expert -> [T, out]. No collectives."""
        output = self.base(x, rows)
        if not self.enabled:
            return output
        down = torch.cat(list(self.down.values()), dim=1)
        down = F.pad(down, (0, 0, 0, _padding(down.shape[1])))
        # On some GPUs grouped_mm gives experts without rows a gradient out of uninitialised memory:
        # it ends here.
        has_rows = (rows.offsets.diff(prepend=rows.offsets.new_zeros(1)) > 0)[:, None, None]
        down, up = (weight.where(has_rows, 0).to(x.dtype) for weight in (down, self.fused_up()))
        low = grouped_product(self.drop(x, "expert-parallel-rng"), down, rows.offsets)
        return torch.add(output, grouped_product(low, up, rows.offsets), alpha=self.scale)

    def fused_up(self) -> Tensor:
        """[E, out, R]: each projection's rows in its own block of columns."""
        targets, blocks = list(self.up), []
        padding = _padding(len(targets) * self.rank)
        for name in self.names:
            if name in targets:
                position = targets.index(name)
                blocks.append(
                    F.pad(
                        self.up[name],
                        (position * self.rank, (len(targets) - 1 - position) * self.rank + padding),
                    )
                )
            else:
                num_experts, out_features, _ = self.base.weight.shape
                shape = (
                    num_experts,
                    out_features // len(self.names),
                    len(targets) * self.rank + padding,
                )
                blocks.append(torch.zeros(shape, device=self.base.weight.device))
        return torch.cat(blocks, dim=1)


class LoraLinear(LoraModule):
    """LoRA on a linear of a tower, whole on every rank. W_down [r, in], W_up [out, r].

    Under sequence parallelism a rank's features serve its shard of the sequence alone: gradients
    are partial sums here too.
    """

    def __init__(
        self,
        base: nn.Linear,
        name: str,
        *,
        sequence_parallel: bool,
        rank: int,
        alpha: float,
        dropout: float,
    ):
        super().__init__(base, rank, alpha, dropout)
        self.down[name] = _parameter(rank, base.in_features)
        self.up[name] = _parameter(base.out_features, rank)
        for parameter in (self.down[name], self.up[name]):
            parameter.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]. No collectives."""
        output = self.base(x)
        if not self.enabled:
            return output
        (down,), (up,) = self.down.values(), self.up.values()
        low = F.linear(self.drop(x, None), down.to(x.dtype))
        return torch.add(output, F.linear(low, up.to(x.dtype)), alpha=self.scale)


class LoraHead(LoraModule):
    """LoRA on the lm_head, hung beside `output_layer` on the last stage. W_down [r, H] replicated,
    W_up this rank's rows [V/TP, r].

    Every rank sees all hidden states but its own part of the vocabulary: the gradient of W_down is
    a partial sum, marked like one.
    """

    def __init__(
        self, output_layer, *, sequence_parallel: bool, rank: int, alpha: float, dropout: float
    ):
        super().__init__(None, rank, alpha, dropout)
        num_columns, hidden_size = output_layer.weight.shape
        self.down["lm_head"] = _parameter(rank, hidden_size)
        self.down["lm_head"].sequence_parallel = sequence_parallel
        self.up["lm_head"] = _parameter(num_columns, rank)
        self.up["lm_head"].tensor_model_parallel = True

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H], the same on all TP ranks -> what it adds to this rank's logits, fp32
        [..., V/TP]. No collectives.
        """
        (down,), (up,) = self.down.values(), self.up.values()
        return F.linear(F.linear(self.drop(hidden.float(), None), down), up) * self.scale


def head_lora(model: nn.Module) -> LoraHead | None:
    """The LoRA on the lm_head of this stage, if it has one and it is on."""
    module = getattr(model, "head_lora", None)
    return module if module is not None and module.enabled else None


def lm_head(model: nn.Module, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """This rank's logits, fp32 [..., V/TP], of hidden [..., H] on the last stage. weight: the
    frozen one in fp32, if it is at hand.
    """
    logits = hidden.float() @ (model.output_layer.weight.float() if weight is None else weight).T
    lora = head_lora(model)
    return logits if lora is None else logits + lora(hidden)


def lora_modules(model: nn.Module) -> list[LoraModule]:
    """Every LoRA module of the model (this rank's stage)."""
    return [module for module in model.modules() if isinstance(module, LoraModule)]


@contextmanager
def lora_enabled(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Turn every LoRA module of the model on (student) or off (teacher) for a while; the flags come
    back whatever happens.
    """
    modules = lora_modules(model)
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = enabled
        yield
    finally:
        for module, flag in zip(modules, before):
            module.enabled = flag


def keep_flags_for_backward(block: nn.Module) -> None:
    """Let a backward pass through `block` (megatron-core's TransformerBlock) see the flags of its
    forward pass.

    Recomputation runs the layers again in backward, which may come after the forward's context
    manager has ended or inside another one. Hooks on the block's output and input set the flags
    before the layers' backward and put them back after it.
    """
    modules = lora_modules(block)

    def set_flags(flags: list[bool]) -> None:
        for module, flag in zip(modules, flags):
            module.enabled = flag

    def remember(block, args, kwargs, output: Tensor) -> None:
        hidden = kwargs["hidden_states"] if block.pre_process else block.input_tensor
        if not (output.requires_grad and hidden.requires_grad):
            return
        of_forward, of_backward = [module.enabled for module in modules], []

        def begin(gradient):
            of_backward[:] = [module.enabled for module in modules]
            set_flags(of_forward)

        output.register_hook(begin)
        hidden.register_hook(lambda gradient: set_flags(of_backward))

    block.register_forward_hook(remember, with_kwargs=True)
