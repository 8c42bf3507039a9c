"""Every setting of a run, once: a few small dataclasses, one owner per field.

flags.py turns them into flags, and each class checks its own values when it is built; some
have files of their own. Refused is what cannot work; the guide's ranges are recommendations.
Imports nothing slow, so that a misspelt flag is answered at once.
"""

import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from megatron_gkd.data_settings import DataConfig
from megatron_gkd.distillation import DistillConfig
from megatron_gkd.fault_settings import FaultConfig
from megatron_gkd.flags import (
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Parser,
    exit_with,
    refuse_unknown,
    require,
    require_at_least,
    require_in,
    require_not_empty,
    setting,
)
from megatron_gkd.layout import ParallelConfig, describe_layout
from megatron_gkd.lora_settings import LoraConfig
from megatron_gkd.lora_targets import parse_layers, resolve_targets
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.recipe import recipe_names, with_recipe
from megatron_gkd.responses import RolloutConfig
from megatron_gkd.swift_flags import SWIFT_FLAGS, answer
from megatron_gkd.trackers import TrackerName

Recompute = Literal["none", "full", "auto"]


@dataclass
class ModelConfig:
    _argument_group_name = "model"

    model: str = field(
        metadata={
            "help": "Hugging Face folder (read directly) or Megatron checkpoint of the model."
        }
    )
    teacher_model: str | None = setting(
        None, "Only the same folder as --model: the teacher is the student with LoRA off."
    )
    load_from_peers: bool = setting(
        False,
        "Of the ranks that hold the same weights each reads a part and gets the rest from the "
        "others, over the network: the file system is read once (docs/startup.md).",
    )
    train_type: str = setting(
        "lora", "Only lora: the frozen base is the teacher.", aliases=["--tuner_type"]
    )
    torch_dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "Type of the base model; LoRA weights are float32."
    )
    attn_impl: Literal[
        "auto", "flash_attention_2", "flash_attn", "flash", "sdpa", "eager", "te"
    ] = setting(
        "flash",
        "Attention; what is not installed falls back to torch's scaled-dot-product attention, and "
        "the run says so.",
    )
    experts_impl: Literal["auto", "grouped_mm", "te"] = setting(
        "auto",
        "Products of the experts: torch's grouped_mm. te, Transformer Engine's, is refused: it "
        "cannot carry LoRA inside the product.",
    )
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: cuda where there is one.")
    recompute: Recompute = setting(
        "none",
        "full: run each layer again in backward, for less memory; auto: only as many layers as "
        "the memory that is left asks for, measured in the first step.",
    )

    def __post_init__(self):
        teacher = self.teacher_model
        same = teacher is None or os.path.realpath(teacher) == os.path.realpath(self.model)
        allowed = f"the same folder as --model {self.model}"
        way_out = (
            "drop the flag: the teacher is this model with its LoRA modules off, no second one is "
            "loaded"
        )
        require(same, "teacher_model", teacher, allowed, way_out)
        by_need = self.recompute == "auto" and self.attn_impl == "eager"
        way_out = "eager keeps squares of row lengths, which --recompute auto cannot predict: full"
        require(
            not by_need, "recompute", self.recompute, "none or full with --attn_impl eager", way_out
        )
        way_out = "only LoRA weights are trained, the base they sit on is the teacher"
        require(self.train_type == "lora", "train_type", self.train_type, "lora", way_out)


@dataclass
class TrainConfig:
    _argument_group_name = "training"

    per_device_train_batch_size: int = setting(
        4, "Samples of a step, times --gradient_accumulation_steps, for each data-parallel rank."
    )
    per_device_eval_batch_size: int = setting(
        4, "Rows of --max_length whose tokens a micro-batch of an evaluation may hold."
    )
    gradient_accumulation_steps: int = setting(
        1,
        "See --per_device_train_batch_size; with pipeline stages also the least number of "
        "micro-batches.",
    )
    max_tokens_per_micro_batch: int | None = setting(
        None,
        "A step's rows are cut into micro-batches of at most so many tokens, of about equal cost; "
        "a longer row is one by itself. Whole rows count, however many ranks share them. Default: "
        "--per_device_train_batch_size (evaluation: --per_device_eval_batch_size) x --max_length.",
    )
    learning_rate: float = setting(1e-5, "Peak learning rate, reached at the end of the warm-up.")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "From the peak to 0 over the run (constant: stays)."
    )
    warmup_ratio: float = setting(
        0.05, "Share of the steps in which the learning rate rises from 0."
    )
    weight_decay: float = setting(
        0.0, "AdamW's decay of the LoRA weights, as in Hugging Face's Trainer."
    )
    adam_beta1: float = setting(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = setting(0.999, "Decay of AdamW's second moment.")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = setting(1.0, "The gradient's global norm is clipped to this.")
    num_train_epochs: float = setting(1.0, "Passes over the data; fractions are allowed.")
    max_steps: int = setting(-1, "Steps, instead of --num_train_epochs; -1 is unset.")
    seed: int = setting(
        42, "Of data order, dropout, new LoRA weights, sampling and on-policy draws."
    )
    deterministic: bool = setting(
        False,
        "Kernels that give the same bits every time, slower; an operation that has none ends the "
        "run. A CPU's do without it; a GPU's mostly do not.",
    )
    max_bad_steps: int = setting(
        10, "Stop after this many steps in a row with NaN or Inf; each of them is skipped."
    )

    def __post_init__(self):
        require_at_least(
            self,
            1,
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_bad_steps",
        )
        if self.max_tokens_per_micro_batch is not None:
            require_at_least(self, 1, "max_tokens_per_micro_batch")
        require_in(self, NOT_NEGATIVE, "learning_rate", way_out="1e-5 is usual")
        require_in(self, SHARE, "warmup_ratio")
        require_in(self, NOT_NEGATIVE, "weight_decay")
        require_in(self, BELOW_1, "adam_beta1", "adam_beta2")
        require_in(self, POSITIVE, "adam_epsilon")
        require_in(self, POSITIVE, "max_grad_norm", way_out="a large number switches clipping off")
        require_in(self, POSITIVE, "num_train_epochs")
        given = self.max_steps == -1 or self.max_steps >= 1
        way_out = "-1 leaves the length to --num_train_epochs"
        require(given, "max_steps", self.max_steps, "-1, or 1 or more", way_out)
        require(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")

    def global_batch_size(self, dp_size: int) -> int:
        """Samples of a step over `dp_size` data-parallel ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * dp_size

    def micro_batch_tokens(self, max_length: int, *, evaluates: bool = False) -> int:
        """Tokens that a micro-batch of a step, or of an evaluation, may hold."""
        rows = self.per_device_eval_batch_size if evaluates else self.per_device_train_batch_size
        return self.max_tokens_per_micro_batch or rows * max_length


@dataclass
class RunConfig:
    _argument_group_name = "run folder"

    recipe: str | None = setting(
        None,
        f"Defaults that a paper used: {', '.join(recipe_names())}; --config and flags win, and a "
        "number that may be left out is taken back with none: --teacher_ema none "
        "(docs/recipes.md).",
    )
    output_dir: str = setting("output", "Metrics, checkpoints and run.json go here.")
    eval_steps: int = setting(50, "Evaluate after every so many steps.")
    save_steps: int = setting(
        50, "Write a checkpoint after every so many steps; the last step always writes one."
    )
    save_total_limit: int = setting(
        2,
        "Checkpoints that are kept, the newest; one more until a good step has followed the "
        "newest.",
    )
    logging_steps: int = setting(5, "Write a line of metrics after every so many steps.")
    save_only_model: bool = setting(
        False, "Checkpoints hold the adapter only, and a run cannot be resumed from them."
    )
    resume_from_checkpoint: str | None = setting(
        None, "A checkpoint folder, or latest: the newest one in --output_dir."
    )
    report_to: list[TrackerName] = setting(
        ["tensorboard"],
        "Where the metrics go besides OUTPUT's own files: tensorboard (files in OUTPUT), wandb, "
        "swanlab (optional packages; they send to their servers unless WANDB_MODE or SWANLAB_MODE "
        "is offline), none.",
    )
    log_rollouts: int | None = setting(
        None,
        "Responses that OUTPUT/rollouts.jsonl keeps of each logged step that writes them, and rows "
        "of the evaluation data that student and teacher answer, greedily, at each evaluation; 0: "
        "none. Default: 4 where the run writes responses, else 0.",
    )

    def __post_init__(self):
        require_at_least(self, 1, "eval_steps", "save_steps", "save_total_limit", "logging_steps")
        require_not_empty(self, "output_dir", "resume_from_checkpoint")
        alone = "none" not in self.report_to or len(self.report_to) == 1
        require(alone, "report_to", " ".join(self.report_to), "none alone, or trackers")
        if self.log_rollouts is not None:
            require_at_least(self, 0, "log_rollouts")


@dataclass
class Config:
    """All settings of a run."""

    model: ModelConfig
    parallel: ParallelConfig
    lora: LoraConfig
    data: DataConfig
    distill: DistillConfig
    rollout: RolloutConfig
    train: TrainConfig
    run: RunConfig
    faults: FaultConfig

    def __post_init__(self):
        self.check_parallel(self.parallel)
        skipped, length = self.distill.skip_first_tokens, self.rollout.max_completion_length
        writes = self.distill.writes_responses
        allowed = f"below --max_completion_length {length}"
        way_out = "no token of a written response would carry a loss"
        require(not writes or skipped < length, "skip_first_tokens", skipped, allowed, way_out)

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Raise ValueError where the other settings refuse this layout."""
        size = parallel.context_parallel_size
        fits = size == 1 or self.model.attn_impl != "te"
        require(fits, "context_parallel_size", size, "1 with --attn_impl te", "use sdpa")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """JSON-able: group name -> setting -> value."""
        return asdict(self)

    def describe(self) -> str:
        """The resolved settings for the log, one line per group."""
        lines = [
            f"  {group}: " + " ".join(f"{k}={v}" for k, v in values.items())
            for group, values in self.to_dict().items()
        ]
        return "\n".join(["Settings:"] + lines)


def default_settings() -> dict[str, Any]:
    """Of every flag that has one."""
    groups: list[Any] = [group.type for group in fields(Config)]
    found = {}
    for one in (each for group in groups for each in fields(group)):
        if one.default is not MISSING:
            found[one.name] = one.default
        elif one.default_factory is not MISSING:
            found[one.name] = one.default_factory()
    return found


def command_line(
    argv: Sequence[str], *, prog: str, usage: str, others: Sequence[type] = ()
) -> tuple[Parser, list[str]]:
    """The parser of a run's settings, after those of the dataclasses `others`, and the words that
    it is to parse: of --recipe, of the YAML file that --config names, and `argv`; the last of a
    name holds.

    Raises ValueError for unknown flags (with the nearest valid names) and those of ms-swift that
    have another name here, all at once, a line each; of one line for an unknown key of the file.
    Rank 0 prints a line for each of ms-swift's flags without effect, and where settings came from
    if there is a recipe.
    """
    groups: list[Any] = [group.type for group in fields(Config)]
    parser = Parser([*others, *groups], prog=prog, usage=usage)
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings as `flag: value` lines; flags on the command line win.",
    )
    own = {each.name for other in others for each in fields(other)}
    foreign = {name: SWIFT_FLAGS[name] for name in SWIFT_FLAGS if name not in own}
    answered = answer(with_recipe(argv, parser, foreign), foreign)
    refuse_unknown(answered.words, parser, answered.refused)
    if answered.notes and os.environ.get("RANK", "0") == "0":
        print("\n".join(answered.notes), flush=True)
    return parser, answered.words


def parse_config(argv: Sequence[str]) -> Config:
    """Settings of a run from `argv` (without the program's name), the YAML file that --config
    names and --recipe; the flags win, then the file. Raises ValueError as `command_line`, and of
    one line for a missing flag or a bad value.
    """
    parser, words = command_line(
        argv,
        prog="torchrun -m megatron_gkd.train",
        usage="%(prog)s --model DIR --dataset FILE [FILE ...] [flags]",
    )
    settings, _ = parser.parse(words)
    return Config(*settings)


def parse_config_or_exit(argv: list[str]) -> Config:
    """`parse_config` for a command line: see `exit_with`."""
    try:
        return parse_config(argv)
    except ValueError as error:
        exit_with(error)


def layout_line(config: Config, world_size: int, model_args: ModelArgs) -> str:
    """`describe_layout` of a run with these settings on `world_size` ranks."""
    return describe_layout(
        world_size,
        model_args,
        config.parallel,
        samples_of_a_rank=config.train.global_batch_size(1),
        num_generations=config.rollout.num_generations,
        max_tokens=config.train.micro_batch_tokens(config.data.max_length),
    )


def flag_targets(lora: LoraConfig, model_args: ModelArgs) -> list[str]:
    """The linears that --lora_target_modules and --lora_layers name, or all. Raises ValueError for
    what is wrong with these flags and --lora_towers.
    """
    if lora.lora_towers and not model_args.family.towers:
        raise ValueError(
            f"--lora_towers: {model_args.family.title} reads text alone and has no towers; "
            "leave it out"
        )
    layers = parse_layers(lora.lora_layers, model_args.num_layers) if lora.lora_layers else None
    return resolve_targets(lora.lora_target_modules or ["ALL"], model_args, layers)
