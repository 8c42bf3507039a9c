"""Numbers that a rank holds: weights, LoRA, LoRA as training and decoding read it."""

from collections.abc import Callable, Collection

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import EXPERTS, HEAD, linears_of_layers, names_of
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.shapes import attention_rows
from megatron_gkd.plan.workload import Workload


def base_parameters(args: ModelArgs, layout: ParallelConfig, stage: int = 0) -> int:
    """Of a rank of that stage."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    hidden = args.hidden_size
    queries, keys = attention_rows(args, tp)
    attention = hidden * (2 * queries + 2 * keys) + 2 * hidden + 2 * args.head_dim
    experts = args.num_experts // layout.expert_model_parallel_size
    layer = attention + args.num_experts * hidden
    layer += experts * 3 * hidden * args.moe_intermediate_size
    vocabulary = args.padded_vocab_size(tp) // tp * hidden
    return args.num_layers // pp * layer + vocabulary * ((stage == 0) + (stage == pp - 1))


def of_stage(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int | None,
    of_layer: Callable[[Collection[str]], int],
) -> int:
    """The sum of `of_layer(names of its linears with LoRA)` over a stage's layers; None: the most
    of any stage.
    """
    layers = linears_of_layers(tuple(load.targets), args.num_layers)
    of_kind = {names: of_layer(names) for names in set(layers)}
    sizes = [of_kind[names] for names in layers]
    length = args.num_layers // layout.pipeline_model_parallel_size
    stages = [sum(sizes[first : first + length]) for first in range(0, len(sizes), length)]
    return max(stages) if stage is None else stages[stage]


def lora_sizes(args: ModelArgs, tp: int = 1, ep: int = 1) -> dict[str, int]:
    """Of each linear of a layer the inputs and outputs that a rank's LoRA has, those of all its
    experts together: times the rank they are parameters.
    """
    hidden, inter = args.hidden_size, args.moe_intermediate_size
    queries, keys = attention_rows(args, tp)
    sizes = dict.fromkeys(("k_proj", "v_proj"), hidden + keys)
    sizes |= dict.fromkeys(("q_proj", "o_proj"), hidden + queries)
    return sizes | dict.fromkeys(EXPERTS, args.num_experts // ep * (hidden + inter))


def lora_parameters(
    args: ModelArgs, layout: ParallelConfig, load: Workload, stage: int | None = None
) -> int:
    """Of a rank of that stage, on the decoder; None: of the rank with most, the lm_head's counted
    there too.
    """
    tp, last = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size - 1
    sizes = lora_sizes(args, tp, layout.expert_model_parallel_size)
    of_layer = lambda names: load.lora_rank * sum(sizes[name] for name in names)
    head = load.lora_rank * (args.hidden_size + args.padded_vocab_size(tp) // tp)
    has_head = HEAD in load.targets and stage in (None, last)
    return of_stage(args, layout, load, stage, of_layer) + head * has_head


def expert_column_parameters(
    args: ModelArgs, layout: ParallelConfig, load: Workload, stage: int | None = None
) -> int:
    """Of the experts' LoRA as training multiplies with it: W_up in columns behind the base's
    weight, W_down beside it, ranks padded to multiples of 8. stage: as for `lora_parameters`.
    """
    return expert_parameters(args, layout, load, stage, lambda rank: -(-rank // 8) * 8)


def place_bytes(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """Of the indices with which the W_ups of q, k and v are laid out for the fused projection,
    int64, the same for all layers (lora/up_product.py).
    """
    queries, keys = attention_rows(args, layout.tensor_model_parallel_size)
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    names = [name for name in rows if name in names_of(load.targets)]
    laid_out = (queries + 2 * keys) * len(names)
    return 8 * load.lora_rank * (laid_out + sum(rows[name] for name in names))


def laid_out_parameters(
    args: ModelArgs, layout: ParallelConfig, load: Workload, stage: int | None = None
) -> int:
    """Of LoRA as decoding reads it (rollout/weights.py): of experts ranks are padded to powers of
    two, 16 or more; of attention W_down's to multiples of 32, W_up's of 8. stage: as for
    `lora_parameters`.
    """
    padded = lambda rank: max(16, 1 << (rank - 1).bit_length()) if rank else 0
    experts = expert_parameters(args, layout, load, stage, padded)
    queries, keys = attention_rows(args, layout.tensor_model_parallel_size)

    def of_layer(names: Collection[str]) -> int:
        total = 0
        for of, inputs, outputs in (
            (("q_proj", "k_proj", "v_proj"), args.hidden_size, queries + 2 * keys),
            (("o_proj",), queries, args.hidden_size),
        ):
            rank = load.lora_rank * sum(name in names for name in of)
            total += -(-rank // 32) * 32 * inputs + -(-rank // 8) * 8 * outputs
        return total

    return experts + of_stage(args, layout, load, stage, of_layer)


def expert_parameters(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int | None,
    padded: Callable[[int], int],
) -> int:
    """Of the experts' LoRA on a stage, W_up and W_down of `padded(rank)` columns; gate and up have
    theirs together. stage: as for `lora_parameters`.
    """
    hidden, inter = args.hidden_size, args.moe_intermediate_size

    def of_layer(names: Collection[str]) -> int:
        rank_of = lambda *of: padded(load.lora_rank * sum(name in names for name in of))
        of_gate_up = rank_of("gate_proj", "up_proj") * (hidden + 2 * inter)
        return of_gate_up + rank_of("down_proj") * (inter + hidden)

    experts = args.num_experts // layout.expert_model_parallel_size
    return experts * of_stage(args, layout, load, stage, of_layer)
