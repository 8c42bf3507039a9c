"""`python -m checkpoint_tools.merge_lora --hf_model DIR --adapter DIR --output DIR`: the adapter
added to the weights.

W + (alpha / r) W_up W_down, in fp32 and rounded once, tensor by tensor on the CPU. The base folder
is only read. Several adapters, each with a factor: `--adapter A B --weight 0.7 0.3`.
"""

from pathlib import Path

from checkpoint_tools.command import parse_flags, run_command
from checkpoint_tools.settings import MergeLoraConfig
from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = parse_flags(MergeLoraConfig, __doc__)
    startup.quiet_imports()

from megatron_gkd.formats.safetensors_writer import write_hf_folder
from megatron_gkd.formats.sources import open_source
from megatron_gkd.formats.stored_tensor import SHARD_BYTES
from megatron_gkd.lora.adapter_sum import add_adapters


def convert(config: MergeLoraConfig, shard_bytes: int = SHARD_BYTES) -> str:
    """The whole merge. Returns a line for the user. Raises FileNotFoundError or ValueError naming
    what does not fit.
    """
    base = open_source(Path(config.hf_model), None, "merge_lora")
    source = add_adapters(base, config.adapter, config.weight)
    return write_hf_folder(source, Path(config.output), config.num_workers, shard_bytes)


if __name__ == "__main__":
    run_command(CONFIG, convert)
