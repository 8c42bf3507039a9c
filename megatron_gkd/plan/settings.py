"""The planner's own settings, and what of a command line is the run's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_gkd.config import Config, command_line
from megatron_gkd.flags import require, require_at_least, require_not_empty, setting
from megatron_gkd.lora_targets import parse_layers, resolve_targets
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.towers import read_towers
from megatron_gkd.plan.workload import Workload, workload
from megatron_gkd.recipe import given_values
from megatron_gkd.startup import quiet_imports

MOST_GPUS = 2**16
NO_DATA = "(no data set)"  # stands for --dataset, which the planner does not read
# Flags without a meaning for the one layout of --check.
OF_PLANS = ("global_batch_size", "all", "json", "script", "overwrite")


@dataclass
class PlanSettings:
    _argument_group_name = "planner"

    gpus: int = field(metadata={"help": "Ranks of the run, one a GPU."})
    gpu: str | None = setting(
        None,
        "Of which machine the rates and the memory are: h100, or a file that benchmarks/rates.py "
        "wrote. Default: h100; of --check what nvidia-smi says of this machine, and where it says "
        "nothing there is no limit.",
    )
    gpus_per_node: int | None = setting(None, "Default: as --gpu has them.")
    gpu_memory: float | None = setting(None, "GiB of a GPU. Default: as --gpu has.")
    global_batch_size: int | None = setting(
        None,
        "Samples of a step over all ranks, the same in all layouts; batch and accumulation of a "
        "rank follow. Default: --per_device_train_batch_size x --gradient_accumulation_steps for "
        "each model copy of the sizes that are given, so 4 a GPU without any flag.",
    )
    row_tokens: int | None = setting(
        None,
        "Tokens of an average row, prompt and response. Default: --max_length; where responses are "
        "written that may be as long as that or longer, both together.",
    )
    teacher_row_tokens: int | None = setting(
        None, "The same of the teacher's view. Default: as the student's."
    )
    response_tokens: int | None = setting(
        None, "Trained tokens of an average row. Default: --max_completion_length."
    )
    media: list[Literal["audio", "image", "video"]] = setting(
        [],
        "Kinds that the rows have, whose towers a run holds on its first pipeline stage. Default: "
        "text alone.",
    )
    media_tokens: int | None = setting(
        None,
        "Tokens of the media of an average row: 13 a second of sound, one for each 32 x 32 pixels "
        "of an image and of every second frame. Default: all of a row, the most that it can be.",
    )
    check: bool = setting(
        False,
        "Plan nothing: print the layout that the flags name and its memory, and end with status 2 "
        "where it is impossible or does not fit. Flags that only a plan has are refused.",
    )
    all: bool = setting(
        False,
        "Print every possible layout with each recomputation and micro-batch, and every "
        "impossible one.",
    )
    json: str | None = setting(None, "Write all numbers to this file.")
    script: str | None = setting(None, "Write the pick to this file, as a launch script.")
    overwrite: bool = setting(False, "Replace the files of --script and --json.")

    def __post_init__(self):
        require_at_least(self, 1, "gpus")
        require(self.gpus <= MOST_GPUS, "gpus", self.gpus, f"{MOST_GPUS} or less")
        for flag in (
            "gpus_per_node",
            "global_batch_size",
            "row_tokens",
            "teacher_row_tokens",
            "media_tokens",
        ):
            if getattr(self, flag) is not None:
                require_at_least(self, 1, flag)
        require_not_empty(self, "gpu", "json", "script")
        alone, way_out = (
            self.json is None or self.json != self.script,
            "one would replace the other",
        )
        require(alone, "json", self.json, "another file than --script's", way_out)
        memory, responses = self.gpu_memory, self.response_tokens
        require(memory is None or 0 < memory < 2**20, "gpu_memory", memory, "GiB, above 0")
        if responses is not None:
            require_at_least(self, 1, "response_tokens")
        for flag in OF_PLANS if self.check else ():
            value = getattr(self, flag)
            allowed, way_out = "left out with --check", "it plans nothing, and would ignore it"
            require(value in (None, False), flag, value, allowed, way_out)


def workload_of(own: PlanSettings, config: Config, args: ModelArgs) -> Workload:
    """Of a run with these settings, as far as the flags tell: averages of the rows, the towers, the
    LoRA of --adapter. Raises as `read_towers` and `PeftAdapter`, or ValueError for rows that the
    settings do not allow.
    """
    row = own.row_tokens or config.data.max_length
    with_lora = config.lora.lora_towers
    towers = read_towers(
        config.model.model,
        audio="audio" in own.media or with_lora,
        visual=bool({"image", "video"} & {*own.media}) or with_lora,
    )
    heavier = max(row, own.teacher_row_tokens or row)
    media = min(own.media_tokens or heavier, heavier)
    load = workload(
        config,
        args,
        row_tokens=own.row_tokens,
        teacher_row_tokens=own.teacher_row_tokens,
        response_tokens=own.response_tokens,
        towers=towers,
        media_share=media / row,
    )
    check_rows(own, config, load)
    return with_adapter(load, config, args)


def check_rows(own: PlanSettings, config: Config, load: Workload) -> None:
    """Raise ValueError for averages that no rows of these settings have."""
    longest, why = config.data.max_length, f"--max_length {config.data.max_length}"
    if config.distill.writes_responses:
        longest += load.completion_tokens
        why += f" with a written response of {load.completion_tokens} tokens behind it"
    for flag in ("row_tokens", "teacher_row_tokens"):
        value = getattr(own, flag) or 0
        way_out = "the average of rows cannot be above the longest; raise --max_length"
        require(value <= longest, flag, value, f"{longest} or less, {why}", way_out)
    response, row = load.response_tokens, load.row_tokens
    allowed = f"below the {row} tokens of a row"
    require(response < row, "response_tokens", response, allowed, "name --row_tokens")


def with_adapter(load: Workload, config: Config, args: ModelArgs) -> Workload:
    """With the rank and the linears of --adapter, where the flags leave them to it."""
    lora = config.lora
    if not lora.adapter or (lora.lora_rank and lora.lora_target_modules):
        return load
    quiet_imports()
    from megatron_gkd.lora.peft_folder import PeftAdapter  # seconds: torch

    try:
        adapter = PeftAdapter(lora.adapter, args)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"--adapter {error}; its rank and linears are needed: name --lora_rank and "
            "--lora_target_modules to do without the folder"
        ) from error
    targets = load.targets
    if not lora.lora_target_modules:
        layers = parse_layers(lora.lora_layers, args.num_layers) if lora.lora_layers else None
        targets = resolve_targets(adapter.targets, args, layers)
    return replace(load, lora_rank=lora.lora_rank or adapter.rank, targets=targets)


def media_words(own: PlanSettings) -> list[str]:
    """The flags that say how much of the rows is media, as words of a command line."""
    words = ["--media", *own.media] if own.media else []
    if own.media_tokens:  # of a row of --row_tokens
        for name in ("media_tokens", "row_tokens", "teacher_row_tokens"):
            value = getattr(own, name)
            words += [f"--{name}", str(value)] if value else []
    return words


def parse_plan(argv: Sequence[str]) -> tuple[PlanSettings, Config, frozenset[str]]:
    """(the planner's settings, those of the run, the names of the run's that were given by flags,
    a file or a recipe). --dataset may be left out, --model may be a config.json. Raises ValueError
    as `parse_config`.
    """
    parser, words = command_line(
        argv,
        prog="python -m megatron_gkd.plan",
        usage="%(prog)s --model DIR --gpus N [--gpu h100] [flags of megatron_gkd.train]",
        others=[PlanSettings],
    )
    given = frozenset(given_values(words, parser))
    (own, *settings), _ = parser.parse(["--dataset", NO_DATA, *words])  # the last of a name holds
    config = Config(*settings)
    model = Path(config.model.model)
    if model.name == "config.json" and model.is_file():
        teacher = config.model.teacher_model
        teacher = str(model.parent) if teacher else None
        named = replace(config.model, model=str(model.parent), teacher_model=teacher)
        config = replace(config, model=named)
    return own, config, given
