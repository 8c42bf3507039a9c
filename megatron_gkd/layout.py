"""The parallel layout: its sizes as settings, whether ranks and model divide into it, and one line
about it. Imports nothing slow: `--check_layout` answers before torch would be loaded.
"""

from dataclasses import dataclass

from megatron_gkd.flags import require, require_at_least, setting
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
    context_parallel_size: int = setting(1, "Only 1 is supported.")

    def __post_init__(self):
        require_at_least(
            self,
            1,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
        way_out = (
            "a long sequence is already sharded over --tensor_model_parallel_size ranks "
            "(sequence parallelism)"
        )
        require(
            self.context_parallel_size == 1,
            "context_parallel_size",
            self.context_parallel_size,
            "1",
            way_out,
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
    ep = parallel.expert_model_parallel_size
    if world_size % (tp * pp):
        raise ValueError(
            f"{world_size} ranks cannot be cut into model copies of --tensor_model_parallel_size "
            f"{tp} x --pipeline_model_parallel_size {pp} = {tp * pp} ranks; start a multiple of "
            "that, or lower a size"
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
    return world_size // (tp * pp)


def describe_layout(
    world_size: int,
    model_args: ModelArgs,
    parallel: ParallelConfig,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
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
    ep = parallel.expert_model_parallel_size
    return (
        f"Layout: {world_size} ranks = TP {tp} x PP {pp} x DP {data_parallel_size}; "
        f"EP {ep}: {model_args.num_experts // ep} of {model_args.num_experts} experts a rank; "
        f"{model_args.num_layers // pp} of {model_args.num_layers} layers a stage; "
        f"a step takes {micro_batch_size * num_micro_batches * data_parallel_size} samples "
        f"({micro_batch_size} x {num_micro_batches} micro-batches x {data_parallel_size} "
        "data-parallel ranks)"
    )
