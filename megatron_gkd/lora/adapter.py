"""The adapter's tensors <-> this rank's LoRA parameters, as one mapping.

`adapter_tensors` lists the tensors of the whole adapter under PEFT's per-expert names with their
shapes; `adapter_slices` pairs slices of local parameters with slices of those tensors. The same
mapping starts an adapter, loads it (load.py), saves it, and carries the optimizer's moments,
which have the parameters' shapes, into and out of a checkpoint at any parallel layout
(checkpoint.py).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from megatron_gkd.lora.slots import STUDENT, LoraSlot, slot_of
from megatron_gkd.lora_targets import HEAD, targets_in
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import Copies, Index, ParameterSlice, TensorSlice, block
from megatron_gkd.parallel import Parallel

_ALL = slice(None)


class Applied(NamedTuple):
    """What an adapter on the decoder is: rank, scale alpha / rank, targets (lora_targets.py)."""

    rank: int
    scale: float
    targets: list[str]


def adapter_tensors(
    model_args: ModelArgs, rank: int, targets: list[str]
) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of the adapter: lora_A [r, d_in] and lora_B [d_out, r] of
    every targeted linear.
    """
    root, layers = model_args.family.adapter_root, model_args.family.adapter_layers
    hidden, inter = model_args.hidden_size, model_args.moe_intermediate_size
    queries, keys = (
        model_args.num_attention_heads * model_args.head_dim,
        model_args.num_key_value_heads * model_args.head_dim,
    )
    attention = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    experts = {
        "gate_proj": (hidden, inter),
        "up_proj": (hidden, inter),
        "down_proj": (inter, hidden),
    }
    tensors = {}
    for layer in range(model_args.num_layers):
        names = targets_in(targets, layer)
        linears = {
            f"{layer}.self_attn.{name}": sizes for name, sizes in attention.items() if name in names
        }
        for expert in range(model_args.num_experts):
            linears |= {
                f"{layer}.mlp.experts.{expert}.{name}": sizes
                for name, sizes in experts.items()
                if name in names
            }
        for linear, (d_in, d_out) in linears.items():
            tensors[f"{layers}{linear}.lora_A.weight"] = (rank, d_in)
            tensors[f"{layers}{linear}.lora_B.weight"] = (d_out, rank)
    if HEAD in targets:
        tensors[f"{root}{HEAD}.lora_A.weight"] = (rank, hidden)
        tensors[f"{root}{HEAD}.lora_B.weight"] = (model_args.vocab_size, rank)
    return tensors


def tower_loras(model: Any, slot: str = STUDENT) -> dict[str, LoraSlot]:
    """LoRA on the towers in `slot`, by linear ("audio_tower.layers.0.fc1"); none on later pipeline
    stages.
    """
    towers = getattr(model, "towers", None)
    found = {}
    for name, module in towers.named_modules() if towers is not None else ():
        if (matrices := slot_of(module, slot)) is not None:
            found[name] = matrices
    return found


def tower_tensors(
    model: Any, model_args: ModelArgs, slot: str = STUDENT
) -> dict[str, tuple[int, int]]:
    """As `adapter_tensors`, of the towers' LoRA in `slot`."""
    root = model_args.family.adapter_root
    tensors: dict[str, tuple[int, int]] = {}
    for linear, matrices in tower_loras(model, slot).items():
        (down,), (up,) = matrices.down.values(), matrices.up.values()
        tensors[f"{root}{linear}.lora_A.weight"] = (down.shape[0], down.shape[1])
        tensors[f"{root}{linear}.lora_B.weight"] = (up.shape[0], up.shape[1])
    return tensors


def adapter_slices(
    model: Any, model_args: ModelArgs, parallel: Parallel, slot: str = STUDENT
) -> Iterator[ParameterSlice]:
    """Every LoRA parameter of `slot` on this stage, cut into slices, each with what it is in the
    adapter.
    """
    tp_rank, tp_size = parallel.tp_rank, parallel.tp_size
    root, layers = model_args.family.adapter_root, model_args.family.adapter_layers
    replica, num_replicas = parallel.groups.dp_cp.rank(), parallel.groups.dp_cp.size()
    sharded = Copies("tensor-parallel", replica, num_replicas)
    replicated = Copies("stage", replica * tp_size + tp_rank, num_replicas * tp_size)
    of_experts = parallel.groups.expt_dp
    experts = Copies("experts", of_experts.rank(), of_experts.size())

    for linear, on_tower in tower_loras(model, slot).items():
        (down,), (up,) = on_tower.down.values(), on_tower.up.values()
        yield _slice(f"{root}{linear}.lora_A", down, replicated)
        yield _slice(f"{root}{linear}.lora_B", up, replicated)
    for layer in model.decoder.layers:
        base = f"{layers}{layer.layer_number - 1}"
        attention = f"{base}.self_attn"
        qkv, proj = layer.self_attention.linear_qkv, layer.self_attention.linear_proj
        if (matrices := slot_of(qkv, slot)) is not None:
            for name, down in matrices.down.items():
                yield _slice(f"{attention}.{name}.lora_A", down, replicated)
            for name, up in matrices.up.items():
                if qkv.is_shared(name):
                    yield _slice(f"{attention}.{name}.lora_B", up, replicated)
            for segment, first in qkv.target_segments(matrices):
                if qkv.is_shared(segment.name):
                    continue
                yield _slice(
                    f"{attention}.{segment.name}.lora_B",
                    matrices.up[segment.name],
                    sharded,
                    index=(*segment.index, _ALL),
                    where=(slice(first, first + segment.num_rows),),
                )
        if (matrices := slot_of(proj, slot)) is not None:
            num_columns = model_args.num_attention_heads * model_args.head_dim
            yield _slice(
                f"{attention}.o_proj.lora_A",
                matrices.down["o_proj"],
                sharded,
                index=(_ALL, block(num_columns, tp_rank, tp_size)),
            )
            yield _slice(f"{attention}.o_proj.lora_B", matrices.up["o_proj"], replicated)
        for grouped in (layer.mlp.experts.gate_up, layer.mlp.experts.down):
            if (matrices := slot_of(grouped, slot)) is not None:
                for name in matrices.down:
                    down, up = matrices.down[name], matrices.up[name]
                    for position, expert in enumerate(layer.mlp.local_expert_indices):
                        linear = f"{base}.mlp.experts.{expert}.{name}"
                        yield _slice(f"{linear}.lora_A", down, experts, where=(position,))
                        yield _slice(f"{linear}.lora_B", up, experts, where=(position,))
    if (matrices := slot_of(getattr(model, "head_lora", None), slot)) is not None:
        down, up = matrices.down[HEAD], matrices.up[HEAD]
        yield _slice(f"{root}{HEAD}.lora_A", down, replicated)
        first = tp_rank * len(up)
        num_rows = min(max(model_args.vocab_size - first, 0), len(up))  # the rest is padding
        if num_rows:
            yield _slice(
                f"{root}{HEAD}.lora_B",
                up,
                sharded,
                index=(slice(first, first + num_rows), _ALL),
                where=(slice(0, num_rows),),
            )


def _slice(
    matrix: str,
    parameter: Tensor,
    copies: Copies,
    *,
    index: Index = (_ALL, _ALL),
    where: Index = (_ALL,),
) -> ParameterSlice:
    return ParameterSlice(TensorSlice(f"{matrix}.weight", index), parameter, where, copies)


def applied(model: Any, slot: str = STUDENT) -> Applied:
    """The adapter that `slot` holds, of all stages. Raises ValueError where there is none, with
    what to change.
    """
    found = getattr(model, "applied_lora", {})
    if slot not in found:
        raise ValueError(
            "self-distillation requires the model to have LoRA adapters: set --lora_rank and "
            "--lora_target_modules (ALL trains every linear of the decoder), or --adapter DIR"
        )
    return found[slot]
