"""`python -m checkpoint_tools.megatron_to_hf --checkpoint DIR --output DIR`: Megatron checkpoint ->
Hugging Face.

DIR is what `hf_to_megatron` wrote (the folder comes back byte for byte), a checkpoint of
megatron-core's own writer (the parts that it does not hold come from --hf_model), or
checkpoint-STEP of a training run: its adapter merged into the base model, or alone with --export
adapter. --adapter adds adapters to any of them.
"""

from pathlib import Path

from checkpoint_tools.command import parse_flags, run_command
from checkpoint_tools.settings import MegatronToHfConfig
from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = parse_flags(MegatronToHfConfig, __doc__)
    startup.quiet_imports()

from megatron_gkd.formats.safetensors_writer import write_hf_folder
from megatron_gkd.formats.sources import is_converted, open_source
from megatron_gkd.formats.stored_tensor import SHARD_BYTES
from megatron_gkd.formats.torch_dist import TRACKER, find_torch_dist

ADAPTER_CONFIG = "adapter_config.json"  # peft_config.CONFIG, whose import takes seconds


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
    run_command(CONFIG, convert)
