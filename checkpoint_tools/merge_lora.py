"""`python -m checkpoint_tools.merge_lora --hf_model DIR --adapter DIR --output DIR`: the adapter
added to the weights.

W + (alpha / r) W_up W_down, in fp32 and rounded once, tensor by tensor on the CPU. The base folder
is only read. Several adapters, each with a factor: `--adapter A B --weight 0.7 0.3`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below
    startup.quiet_imports()

from checkpoint_tools.command import check_num_workers, num_workers_setting, run_command
from megatron_gkd.formats.safetensors_writer import write_hf_folder
from megatron_gkd.formats.sources import open_source
from megatron_gkd.formats.stored_tensor import SHARD_BYTES
from megatron_gkd.lora.adapter_sum import add_adapters


@dataclass
class MergeLoraConfig:
    hf_model: str = field(
        metadata={"help": "Hugging Face folder (or Megatron checkpoint) of the base model."}
    )
    output: str = field(metadata={"help": "Folder to write; must not exist or be empty."})
    adapter: list[str] = field(default_factory=list, metadata={"help": "PEFT adapter folders."})
    weight: list[float] = field(
        default_factory=list, metadata={"help": "A factor for each adapter. Default: 1."}
    )
    num_workers: int = num_workers_setting()

    def __post_init__(self):
        check_num_workers(self.num_workers)


def convert(config: MergeLoraConfig, shard_bytes: int = SHARD_BYTES) -> str:
    """The whole merge. Returns a line for the user. Raises FileNotFoundError or ValueError naming
    what does not fit.
    """
    base = open_source(Path(config.hf_model), None, "merge_lora")
    source = add_adapters(base, config.adapter, config.weight)
    return write_hf_folder(source, Path(config.output), config.num_workers, shard_bytes)


if __name__ == "__main__":
    run_command(MergeLoraConfig, convert, __doc__)
