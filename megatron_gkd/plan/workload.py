"""What of a run's settings takes memory and time: all that the planner knows of a run beside the
model's sizes and the layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from megatron_gkd.config import Config, flag_targets
from megatron_gkd.distillation import DistillConfig, parse_schedule
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.towers import Tower
from megatron_gkd.responses import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What of a run's settings takes memory and time."""

    number_bytes: int
    """Of a number of the base model and of activations"""
    lora_rank: int
    lora_dropout: float = 0.05
    targets: Sequence[str]
    has_teacher_adapter: bool = False
    recompute: bool
    """Whether every layer may be run again"""
    micro_batch_tokens: int
    batch_size: int
    accumulation: int
    prompt_tokens: int
    """Of the longest prompt"""
    completion_tokens: int
    """0: no step writes its responses"""
    num_generations: int = 1
    prefill_tokens: int = 0
    sorts_scores: bool = False
    """Whether a token is drawn with --top_p among all columns, without --top_k"""
    num_laid_out: int = 1
    """Adapters that write: the student's, and the teacher's with --seq_kd or for rollouts.jsonl"""
    towers: Sequence[Tower] = ()
    """Those that the first stage holds"""
    lora_towers: bool = False
    """Whether they carry LoRA"""
    media_share: float = 0.0
    """Tokens of media in a micro-batch, at most, over its tokens; each medium once, whichever view
    shows it"""
    row_tokens: int
    """Of an average row, the student's view"""
    teacher_row_tokens: int
    """Of an average row, the teacher's view"""
    response_tokens: int
    """Trained tokens of an average row"""
    on_policy_share: float = 0.0
    """Of the steps that write responses: --lmbda, or 1 with --seq_kd, where the teacher writes"""

    @property
    def rows(self) -> int:
        """That a rollout of a data-parallel rank writes."""
        return self.batch_size * self.accumulation * self.num_generations

    def prompts_of_rank(self, layout: ParallelConfig) -> int:
        """Of a rollout, on the rank that has most: context-parallel ranks share a replica's."""
        return ceil(self.batch_size * self.accumulation / layout.context_parallel_size)

    def written_rows(self, layout: ParallelConfig) -> int:
        """Of a rollout, on the rank that has most."""
        return self.prompts_of_rank(layout) * self.num_generations


def workload(
    config: Config,
    model_args: ModelArgs,
    *,
    micro_batch_tokens: int | None = None,
    prompt_tokens: int | None = None,
    writes: bool | None = None,
    towers: Sequence[Tower] = (),
    media_share: float = 1.0,
    row_tokens: int | None = None,
    teacher_row_tokens: int | None = None,
    response_tokens: int | None = None,
) -> Workload:
    """What of these settings takes memory and time. micro_batch_tokens, prompt_tokens, writes: of
    the data, where they are known: the most of a micro-batch, and of a prompt; whether any response
    is written. towers, media_share: those that the media of the rows need, and how much of a
    micro-batch media can be. row_tokens, teacher_row_tokens, response_tokens: of an average row;
    without them a row is as long as --max_length allows in both views, its response as
    --max_completion_length; a prompt of --max_length where that leaves no room for one before a
    written response.
    """
    train, distill = config.train, config.distill
    if writes is None:
        writes = distill.writes_responses or bool(config.run.log_rollouts)
    has_teacher_adapter = bool(distill.teacher_adapter) or distill.teacher_follows
    teacher_writes = distill.seq_kd or config.run.log_rollouts != 0  # the latter in evaluations
    max_length, completion = config.data.max_length, config.rollout.max_completion_length
    is_long = distill.writes_responses and completion >= max_length
    row_tokens = row_tokens or max_length + completion * is_long
    budget = train.micro_batch_tokens(max_length)  # a longer row is one by itself
    longest = max(max_length, (completion + 1) * is_long)
    response = min(completion, row_tokens - 1)
    return Workload(
        number_bytes=4 if config.model.torch_dtype == "float32" else 2,
        lora_rank=config.lora.lora_rank or 8,
        lora_dropout=config.lora.lora_dropout,
        targets=flag_targets(config.lora, model_args),
        has_teacher_adapter=has_teacher_adapter,
        recompute=config.model.recompute != "none",
        micro_batch_tokens=micro_batch_tokens or max(budget, longest),
        batch_size=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        prompt_tokens=prompt_tokens or max_length,
        completion_tokens=completion if writes else 0,
        num_generations=config.rollout.num_generations,
        prefill_tokens=config.rollout.rollout_prefill_tokens,
        sorts_scores=_sorts_scores(config.rollout),
        num_laid_out=1 + (has_teacher_adapter and teacher_writes),
        towers=towers,
        lora_towers=config.lora.lora_towers,
        media_share=media_share if towers else 0.0,
        row_tokens=row_tokens,
        teacher_row_tokens=teacher_row_tokens or row_tokens,
        response_tokens=response_tokens or response,
        on_policy_share=on_policy_share(distill, train.max_steps),
    )


def _sorts_scores(rollout: RolloutConfig) -> bool:
    return rollout.rollout_temperature > 0 and rollout.top_p < 1 and not rollout.top_k


def on_policy_share(distill: DistillConfig, max_steps: int) -> float:
    """Of a run's steps, those that write their responses. A schedule counts with its mean over
    max_steps; where these are not known (-1), with the value that it ends with.
    """
    if distill.seq_kd:
        return 1.0
    schedule = parse_schedule(distill.lmbda)
    if max_steps < 1:
        return schedule[-1][1]
    return sum(distill.lmbda_at(step) for step in range(max_steps)) / max_steps
