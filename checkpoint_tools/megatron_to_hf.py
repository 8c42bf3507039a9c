"""`python -m checkpoint_tools.megatron_to_hf --checkpoint DIR --output DIR`: Megatron checkpoint ->
Hugging Face.

DIR is what `hf_to_megatron` wrote (the folder comes back byte for byte), a checkpoint of
megatron-core's own writer (the parts that it does not hold come from --hf_model), or
checkpoint-STEP of a training run: its adapter merged into the base model, or alone with --export
adapter. --adapter adds adapters to any of them.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below
    startup.quiet_imports()

from checkpoint_tools.command import check_num_workers, num_workers_setting, run_command
from megatron_gkd.flags import setting
from megatron_gkd.formats.safetensors_writer import write_hf_folder
from megatron_gkd.formats.sources import is_converted, open_source
from megatron_gkd.formats.stored_tensor import SHARD_BYTES
from megatron_gkd.formats.torch_dist import TRACKER, find_torch_dist

ADAPTER_CONFIG = "adapter_config.json"
EXPORTS = ("merged", "adapter")


@dataclass
class MegatronToHfConfig:
    checkpoint: str = field(
        metadata={"help": "Megatron checkpoint, or checkpoint-STEP of a training run."}
    )
    output: str = field(metadata={"help": "Folder to write; must not exist or be empty."})
    hf_model: str | None = setting(
        None, "Hugging Face folder: what the checkpoint itself does not hold."
    )
    adapter: list[str] = field(
        default_factory=list, metadata={"help": "PEFT adapters to add to the weights."}
    )
    weight: list[float] = field(
        default_factory=list,
        metadata={"help": "A factor for each adapter, a training run's own first. Default: 1."},
    )
    export: str = setting(
        "merged", "Of a training run: `merged` into the base model, or the `adapter` alone."
    )
    num_workers: int = num_workers_setting()

    def __post_init__(self):
        check_num_workers(self.num_workers)
        if self.export not in EXPORTS:
            raise ValueError(f"--export {self.export!r}: choose one of {', '.join(EXPORTS)}")


def convert(config: MegatronToHfConfig, shard_bytes: int = SHARD_BYTES) -> str:
    """The conversion. Returns a line for the user. Raises FileNotFoundError or ValueError naming
    what is wrong.
    """
    checkpoint = Path(config.checkpoint)
    hf_model = Path(config.hf_model) if config.hf_model else None
    if (checkpoint / ADAPTER_CONFIG).is_file():
        return _export_training(config, checkpoint, hf_model, shard_bytes)
    if config.export == "adapter":
        raise ValueError(
            f"--export adapter: {checkpoint} has no {ADAPTER_CONFIG}; "
            "give a training run's checkpoint"
        )
    if config.weight and not config.adapter:
        raise ValueError(
            f"--weight {' '.join(map(str, config.weight))}: there is no --adapter to weigh"
        )
    found = find_torch_dist(checkpoint)
    if found is None:
        raise FileNotFoundError(
            f"--checkpoint {checkpoint}: neither {TRACKER} nor a torch_dist checkpoint is there"
        )
    if hf_model and is_converted(found):
        raise ValueError(
            f"--hf_model {hf_model}: {checkpoint} holds the whole folder; leave the flag out"
        )
    return _write(config, checkpoint, hf_model, config.adapter, shard_bytes)


def _write(
    config: MegatronToHfConfig,
    model: Path,
    hf_model: Path | None,
    adapters: list[str],
    shard_bytes: int,
) -> str:
    source = open_source(model, hf_model, "megatron_to_hf")
    if adapters:
        # LoRA's side imports megatron-core, which takes seconds.
        from megatron_gkd.lora.adapter_sum import add_adapters

        source = add_adapters(source, adapters, config.weight)
    return write_hf_folder(source, Path(config.output), config.num_workers, shard_bytes)


def _export_training(
    config: MegatronToHfConfig, checkpoint: Path, hf_model: Path | None, shard_bytes: int
) -> str:
    from megatron_gkd.lora.adapter_sum import base_folder, copy_adapter

    if config.export == "adapter":
        for flag in ("hf_model", "adapter", "weight"):
            if getattr(config, flag):
                raise ValueError(f"--{flag} has no effect with --export adapter; leave it out")
        return copy_adapter(checkpoint, Path(config.output))
    base, adapters = base_folder(checkpoint, hf_model), [str(checkpoint), *config.adapter]
    return _write(config, base, hf_model, adapters, shard_bytes)


if __name__ == "__main__":
    run_command(MegatronToHfConfig, convert, __doc__)
