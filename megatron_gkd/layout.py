"""The parallel layout: its sizes as settings, whether ranks and model divide into it, and one line
about it. Imports nothing slow: the planner answers before torch would be loaded.
"""

from dataclasses import dataclass

from megatron_gkd.flags import require_at_least, setting
from megatron_gkd.model.args import ModelArgs


@dataclass
class ParallelConfig:
    _argument_group_name = "parallel layout"

    tensor_model_parallel_size: int = setting(
        1, "Ranks that share each layer's weights, its sequence and the vocabulary."
    )
    pipeline_model_parallel_size: int = setting(1, "Stages that the layers are cut into.")
    expert_model_parallel_size: int = setting(
        1, "Ranks that share the experts of a layer; inside one pipeline stage."
    )
    context_parallel_size: int = setting(
        1,
        "Ranks that share the tokens of each row, for rows that are too long for one "
        "tensor-parallel group.",
    )

    def __post_init__(self):
        require_at_least(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "context_parallel_size",
        )


def check_layout(
    world_size: int,
    parallel: ParallelConfig,
    *,
    num_attention_heads: int,
    num_key_value_heads: int,
    num_experts: int,
    num_layers: int,
) -> int:
    """The data-parallel size of this layout; ValueError with both numbers and the way out where
    there is none.

    Experts are not cut further (expert tensor parallel size 1), so an expert group lies inside one
    pipeline stage.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, cp = parallel.expert_model_parallel_size, parallel.context_parallel_size
    if world_size % (tp * pp * cp):
        of_rows = f" x --context_parallel_size {cp}" if cp > 1 else ""
        raise ValueError(
            f"{world_size} ranks cannot be cut into model copies of --tensor_model_parallel_size "
            f"{tp} x --pipeline_model_parallel_size {pp}{of_rows} = {tp * pp * cp} ranks; start a "
            "multiple of that, or lower a size"
        )
    ranks_of_stage = f"ranks of a pipeline stage ({world_size} ranks / PP {pp})"
    for flag, size, number, of_what in (
        ("expert_model_parallel_size", ep, world_size // pp, ranks_of_stage),
        ("expert_model_parallel_size", ep, num_experts, "experts of the model"),
        ("tensor_model_parallel_size", tp, num_attention_heads, "attention heads of the model"),
        ("pipeline_model_parallel_size", pp, num_layers, "layers of the model"),
    ):
        if number % size:
            raise ValueError(
                f"--{flag} {size} does not divide the {number} {of_what}; "
                f"choose a divisor of {number}"
            )
    if num_key_value_heads % tp and tp % num_key_value_heads:
        raise ValueError(
            f"--tensor_model_parallel_size {tp} and the model's {num_key_value_heads} key-value "
            "heads: one must divide the other"
        )
    return world_size // (tp * pp * cp)


def describe_layout(
    world_size: int,
    model_args: ModelArgs,
    parallel: ParallelConfig,
    *,
    samples_of_a_rank: int,
    num_generations: int,
    max_tokens: int,
) -> str:
    """One line on how `world_size` ranks share a model of these sizes, and the samples of a step;
    ValueError where they cannot.
    """
    data_parallel_size = check_layout(
        world_size,
        parallel,
        num_attention_heads=model_args.num_attention_heads,
        num_key_value_heads=model_args.num_key_value_heads,
        num_experts=model_args.num_experts,
        num_layers=model_args.num_layers,
    )
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, cp = parallel.expert_model_parallel_size, parallel.context_parallel_size
    of_rows = f"CP {cp} x " if cp > 1 else ""
    each = f", each with {num_generations} responses where the run writes them,"
    return (
        f"Layout: {world_size} ranks = TP {tp} x PP {pp} x {of_rows}DP {data_parallel_size}; "
        f"EP {ep}: {model_args.num_experts // ep} of {model_args.num_experts} experts a rank; "
        f"{model_args.num_layers // pp} of {model_args.num_layers} layers a stage; "
        f"a step takes {samples_of_a_rank * data_parallel_size} samples ({samples_of_a_rank} x "
        f"{data_parallel_size} data-parallel ranks){each if num_generations > 1 else ''} in "
        f"micro-batches of at most {max_tokens} tokens"
    )
