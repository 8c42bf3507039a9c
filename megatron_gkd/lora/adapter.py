"""The adapter's tensors <-> this rank's LoRA parameters, as one table.

`adapter_tensors` lists the tensors of the whole adapter under PEFT's per-expert names with their
shapes; `adapter_pieces` pairs slices of local parameters with slices of those tensors. The same
table starts an adapter, loads it (peft_folder.py), saves it, and carries the optimizer's moments,
which have the parameters' shapes, into and out of a checkpoint at any parallel layout
(checkpoint.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from megatron_gkd.lora.slots import STUDENT, LoraSlot, slot_of
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import block
from megatron_gkd.parallel import Parallel

# The linears that can carry LoRA, as Hugging Face and PEFT name them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + EXPERTS
HEAD = "lm_head"

# With "thinker." PEFT loads the adapter on the whole model and on a thinker alone; without it the
# whole model would ignore it.
THINKER = "base_model.model.thinker."
ROOT = f"{THINKER}model.layers."


class Applied(NamedTuple):
    """What an adapter on the decoder is: rank, scale alpha / rank, targeted linears."""

    rank: int
    scale: float
    targets: list[str]


def resolve_targets(names: list[str]) -> list[str]:
    """Flag values -> linear names in their fixed order. `ALL` and `all-linear` are every linear of
    the decoder's layers; lm_head is not one of them and has to be named.

    Raises ValueError naming a linear that the model does not have.
    """
    if any(name.lower() in ("all", "all-linear", "all_linear") for name in names):
        return list(LINEARS)
    unknown = [name for name in names if name not in (*LINEARS, HEAD)]
    if unknown or not names:
        raise ValueError(
            f"--lora_target_modules {','.join(names) or '(nothing)'}: choose ALL, or some of "
            f"{', '.join((*LINEARS, HEAD))}"
        )
    return [name for name in (*LINEARS, HEAD) if name in names]


@dataclass(frozen=True)
class AdapterPiece:
    """`parameter`[where] is `tensor name`[index]. `owned`: this rank writes the piece (others hold
    copies of it).
    """

    parameter: Tensor
    where: tuple
    name: str
    index: tuple[slice, slice]
    owned: bool

    @property
    def target(self) -> Tensor:
        return self.parameter.data[self.where]


def adapter_tensors(
    model_args: ModelArgs, rank: int, targets: list[str]
) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of the adapter: lora_A [r, d_in] and lora_B [d_out, r] of
    every targeted linear.
    """
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
        linears = {
            f"{layer}.self_attn.{name}": sizes
            for name, sizes in attention.items()
            if name in targets
        }
        for expert in range(model_args.num_experts):
            linears |= {
                f"{layer}.mlp.experts.{expert}.{name}": sizes
                for name, sizes in experts.items()
                if name in targets
            }
        for linear, (d_in, d_out) in linears.items():
            tensors[f"{ROOT}{linear}.lora_A.weight"] = (rank, d_in)
            tensors[f"{ROOT}{linear}.lora_B.weight"] = (d_out, rank)
    if HEAD in targets:
        tensors[f"{THINKER}{HEAD}.lora_A.weight"] = (rank, hidden)
        tensors[f"{THINKER}{HEAD}.lora_B.weight"] = (model_args.vocab_size, rank)
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


def tower_tensors(model: Any, slot: str = STUDENT) -> dict[str, tuple[int, int]]:
    """As `adapter_tensors`, of the towers' LoRA in `slot`."""
    tensors = {}
    for linear, matrices in tower_loras(model, slot).items():
        (down,), (up,) = matrices.down.values(), matrices.up.values()
        tensors[f"{THINKER}{linear}.lora_A.weight"] = (down.shape[0], down.shape[1])
        tensors[f"{THINKER}{linear}.lora_B.weight"] = (up.shape[0], up.shape[1])
    return tensors


def adapter_pieces(
    model: Any, model_args: ModelArgs, parallel: Parallel, slot: str = STUDENT
) -> Iterator[AdapterPiece]:
    """Every LoRA parameter of `slot` on this stage, as slices paired with slices of the adapter's
    tensors.
    """
    whole = slice(None)
    writes_sharded = parallel.dp_rank == 0
    writes_replicated = writes_sharded and parallel.tp_rank == 0
    writes_experts = parallel.groups.expt_dp.rank() == 0

    for linear, matrices in tower_loras(model, slot).items():
        (down,), (up,) = matrices.down.values(), matrices.up.values()
        yield AdapterPiece(
            down, (whole,), f"{THINKER}{linear}.lora_A.weight", (whole, whole), writes_replicated
        )
        yield AdapterPiece(
            up, (whole,), f"{THINKER}{linear}.lora_B.weight", (whole, whole), writes_replicated
        )
    for layer in model.decoder.layers:
        base = f"{ROOT}{layer.layer_number - 1}"
        qkv, proj = layer.self_attention.linear_qkv, layer.self_attention.linear_proj
        if (matrices := slot_of(qkv, slot)) is not None:
            for name, down in matrices.down.items():
                yield AdapterPiece(
                    down,
                    (whole,),
                    f"{base}.self_attn.{name}.lora_A.weight",
                    (whole, whole),
                    writes_replicated,
                )
            for segment, first in qkv.target_segments(matrices):
                where, index = (
                    (slice(first, first + segment.num_rows),),
                    (slice(segment.start, segment.stop), whole),
                )
                yield AdapterPiece(
                    matrices.up[segment.name],
                    where,
                    f"{base}.self_attn.{segment.name}.lora_B.weight",
                    index,
                    writes_sharded,
                )
        if (matrices := slot_of(proj, slot)) is not None:
            columns = block(
                model_args.num_attention_heads * model_args.head_dim,
                parallel.tp_rank,
                parallel.tp_size,
            )
            yield AdapterPiece(
                matrices.down["o_proj"],
                (whole,),
                f"{base}.self_attn.o_proj.lora_A.weight",
                (whole, columns),
                writes_sharded,
            )
            yield AdapterPiece(
                matrices.up["o_proj"],
                (whole,),
                f"{base}.self_attn.o_proj.lora_B.weight",
                (whole, whole),
                writes_replicated,
            )
        for grouped in (layer.mlp.experts.gate_up, layer.mlp.experts.down):
            if (matrices := slot_of(grouped, slot)) is not None:
                for name in matrices.down:
                    for position, expert in enumerate(layer.mlp.local_expert_indices):
                        linear = f"{base}.mlp.experts.{expert}.{name}"
                        yield AdapterPiece(
                            matrices.down[name],
                            (position,),
                            f"{linear}.lora_A.weight",
                            (whole, whole),
                            writes_experts,
                        )
                        yield AdapterPiece(
                            matrices.up[name],
                            (position,),
                            f"{linear}.lora_B.weight",
                            (whole, whole),
                            writes_experts,
                        )
    if (matrices := slot_of(getattr(model, "head_lora", None), slot)) is not None:
        down, up = matrices.down[HEAD], matrices.up[HEAD]
        yield AdapterPiece(
            down, (whole,), f"{THINKER}{HEAD}.lora_A.weight", (whole, whole), writes_replicated
        )
        first = parallel.tp_rank * len(up)
        num_rows = min(max(model_args.vocab_size - first, 0), len(up))  # the rest is padding
        if num_rows:
            where, index = (slice(0, num_rows),), (slice(first, first + num_rows), whole)
            yield AdapterPiece(up, where, f"{THINKER}{HEAD}.lora_B.weight", index, writes_sharded)


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
