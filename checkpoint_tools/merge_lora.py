"""`python -m checkpoint_tools.merge_lora --hf_model DIR --adapter DIR --output DIR`: the adapter
added to the weights.

W + (alpha / r) W_up W_down, in fp32 and rounded once, tensor by tensor on the CPU. The base folder
is only read. Several adapters, each with a factor: `--adapter A B --weight 0.7 0.3`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint_tools.command import check_num_workers, num_workers_setting, run_command
from megatron_gkd.formats.safetensors_writer import HfFolderPlan, write_hf_folder
from megatron_gkd.formats.shards import UNIT_BYTES
from megatron_gkd.formats.sources import plan_from
from megatron_gkd.lora.adapter import HEAD, THINKER, adapter_tensors
from megatron_gkd.lora.adapter_sum import open_adapters


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


def add_adapters(plan: HfFolderPlan, adapters: list[str], weights: list[float]) -> HfFolderPlan:
    """The plan with the adapters added to what it reads. Raises as `open_adapters`, and ValueError
    naming a linear whose weight the folder does not have.
    """
    opened = open_adapters(adapters, weights, plan.model_args)
    for adapter in opened.adapters:
        names = [
            name
            for name in adapter_tensors(plan.model_args, 1, adapter.targets)
            if ".lora_B." in name and name in adapter
        ]
        linears = [
            name.removeprefix(THINKER).removesuffix(".lora_B.weight") for name in names
        ] + adapter.towers
        lost = [
            linear
            for linear in linears
            if f"{plan.model_args.prefix}{linear}.weight" not in plan.tensors
        ]
        if lost:
            raise ValueError(
                f"{adapter.folder}: has LoRA on {lost[0]}, and {plan.source} no such weight to add it to"
                + (" (it is tied to the embedding)" if lost == [HEAD] else "")
            )
    folders = [adapter.folder for adapter in opened.adapters]
    return replace(
        plan, change=opened.change, change_identity=opened.identity(), change_folders=folders
    )


def convert(config: MergeLoraConfig, unit_bytes: int = UNIT_BYTES) -> str:
    """The whole merge. Returns a line for the user. Raises FileNotFoundError or ValueError naming
    what does not fit.
    """
    plan = add_adapters(
        plan_from(Path(config.hf_model), None, "merge_lora"), config.adapter, config.weight
    )
    return write_hf_folder(plan, Path(config.output), config.num_workers, unit_bytes)


if __name__ == "__main__":
    run_command(MergeLoraConfig, convert, __doc__)
