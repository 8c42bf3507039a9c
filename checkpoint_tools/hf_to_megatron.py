"""`python -m checkpoint_tools.hf_to_megatron --hf_model DIR --output DIR`: Hugging Face folder ->
Megatron checkpoint.

megatron_gkd/formats/megatron_writer.py does the work; docs/formats.md describes both sides.
"""

import math
from pathlib import Path

from checkpoint_tools.command import parse_flags, run_command
from checkpoint_tools.settings import HfToMegatronConfig
from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = parse_flags(HfToMegatronConfig, __doc__)
    startup.quiet_imports()

from megatron_gkd.formats.megatron_writer import open_checkpoint_source, write_megatron_folder
from megatron_gkd.formats.stored_tensor import SHARD_BYTES
from megatron_gkd.layout import ParallelConfig, check_layout
from megatron_gkd.model.args import ModelArgs


def convert(config: HfToMegatronConfig, shard_bytes: int = SHARD_BYTES) -> str:
    """The whole conversion. Returns a line for the user. Raises FileNotFoundError or ValueError
    naming what cannot be converted.
    """
    source = open_checkpoint_source(Path(config.hf_model), config.tensor_model_parallel_size)
    check_layout_of(config, source.model_args)
    return write_megatron_folder(source, config.output, config.num_workers, shard_bytes)


def check_layout_of(config: HfToMegatronConfig, model_args: ModelArgs) -> None:
    """Raise ValueError with both numbers when the model does not divide into the layout of these
    flags.
    """
    parallel = ParallelConfig(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
    )
    smallest_stage = math.lcm(config.tensor_model_parallel_size, config.expert_model_parallel_size)
    check_layout(
        smallest_stage * config.pipeline_model_parallel_size,
        parallel,
        num_attention_heads=model_args.num_attention_heads,
        num_key_value_heads=model_args.num_key_value_heads,
        num_experts=model_args.num_experts,
        num_layers=model_args.num_layers,
    )


if __name__ == "__main__":
    run_command(CONFIG, convert)
