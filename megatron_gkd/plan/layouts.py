"""Every layout of a run on so many GPUs: possible with its memory and time, or refused with the
reason that the run itself would give. Imports nothing slow.

A flag that is given stays as it is. The others of the layout take all divisors of the number of
GPUs (context parallelism while a row's chunks have LEAST_CHUNK tokens), --recompute is none, or
auto where none does not fit, --max_tokens_per_micro_batch holds a power of two of a rank's rows:
from a quarter of a row for each of the ranks that share it up to the first that does not fit.
All layouts take the same samples in a step, so they differ in time alone. auto counts as if every
layer ran again: the least memory, and the most time. Picked is the fastest that leaves SPARE of the
GPU's memory, if any does; choices that are slower by less than CLOSE count as equally fast, of
these the one that needs least memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from megatron_gkd.config import Config, Recompute
from megatron_gkd.flags import require
from megatron_gkd.layout import ParallelConfig, check_layout
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.memory import GIB, Estimate, estimate, kept_layers_that_fit
from megatron_gkd.plan.rates import Rates
from megatron_gkd.plan.settings import PlanSettings, media_words, workload_of
from megatron_gkd.plan.step_time import OF_LAYOUT, Phase, StepTime, step_time
from megatron_gkd.plan.workload import Workload


class Sizes(NamedTuple):
    """Of a layout."""

    tp: int
    ep: int
    pp: int
    cp: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Sizes":
        return cls(
            parallel.tensor_model_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(self.tp, self.pp, self.ep, self.cp)


LEAST_CHUNK = 128  # tokens
SPARE = 0.05  # of a GPU's memory: what the estimate may be wrong by
CLOSE = 0.01  # of a step's time: less than the model can tell
SIZE_FLAGS = (  # in the order of Sizes
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


@dataclass(frozen=True)
class Job:
    """What is planned."""

    config: Config
    given: frozenset[str]
    """Settings of the run that stay as they are"""
    args: ModelArgs
    gpus: int
    samples: int
    """Of a step"""
    rates: Rates
    available: int
    """Bytes of a GPU"""
    load: Workload
    """Of a step; its batch, micro-batch and recomputation are those of a `Choice`"""
    media: Sequence[str] = ()
    """What the planner's flags say of the rows' media, as words of a command line"""

    @property
    def longest_row(self) -> int:
        """Tokens that a row of a step takes of a micro-batch's: of the longest one by --max_length,
        or an average prompt with room for the longest response.
        """
        load = self.load
        longest = max(load.row_tokens, load.teacher_row_tokens)
        if load.on_policy_share:
            longest += max(load.completion_tokens - load.response_tokens, 0)
        return max(self.config.data.max_length, longest)


@dataclass(frozen=True)
class Choice:
    """A layout with what else was chosen, and what it needs."""

    sizes: Sizes
    dp: int
    recompute: Recompute
    micro_batch_tokens: int
    batch_size: int
    accumulation: int
    memory: Estimate
    time: StepTime | None
    """None where the memory does not suffice"""

    @property
    def seconds(self) -> float:
        return self.time.seconds if self.time else float("inf")


class Refusal(NamedTuple):
    """A layout that is impossible."""

    sizes: Sizes
    reason: str
    nearest: Choice | None = None
    """The choice that needs least, where no choice fits"""


@dataclass(frozen=True)
class Plan:
    """Of a job: what is possible, the fastest first; layouts none of whose choices is; the choices
    that do not fit beside others of their layout that do.
    """

    job: Job
    choices: list[Choice]
    refusals: list[Refusal]
    too_large: list[Choice]

    @cached_property
    def pick(self) -> Choice:
        """Raises ValueError where nothing is possible."""
        if not self.choices:
            raise ValueError("no layout is possible")
        most = (1 - SPARE) * self.job.available
        fitting = [choice for choice in self.choices if choice.memory.total <= most]
        fitting = fitting or self.choices
        close = (1 + CLOSE) * fitting[0].seconds
        as_fast = [choice for choice in fitting if choice.seconds <= close]
        return min(as_fast, key=lambda choice: choice.memory.total)

    @cached_property
    def layouts(self) -> list[Choice]:
        """The fastest choice of each layout, the fastest first."""
        return first_of(self.choices, lambda choice: choice.sizes)

    @cached_property
    def nearest(self) -> dict[Sizes, Choice]:
        """Of each layout none of whose choices fits, the one that needs least."""
        return {one.sizes: one.nearest for one in self.refusals if one.nearest}


def first_of(choices: Iterable[Choice], key: Callable[[Choice], Any]) -> list[Choice]:
    """The first of each key."""
    found: dict[Any, Choice] = {}
    for choice in choices:
        found.setdefault(key(choice), choice)
    return list(found.values())


def make_job(
    own: PlanSettings, config: Config, given: frozenset[str], args: ModelArgs, rates: Rates
) -> Job:
    """Raises ValueError where the GPUs are no whole nodes, and where no estimate knows the memory
    of what the settings ask for.
    """
    attention = config.model.attn_impl
    way_out = "it keeps squares of row lengths, which no estimate counts; plan with flash"
    require(attention != "eager", "attn_impl", attention, "another one for a plan", way_out)
    if own.gpus_per_node:
        rates = replace(rates, gpus_per_node=own.gpus_per_node)
    nodes, rest = divmod(own.gpus, rates.gpus_per_node)
    if nodes and rest:
        raise ValueError(
            f"--gpus {own.gpus} are no whole nodes of {rates.gpus_per_node} GPUs; take a multiple "
            "of that, or another --gpus_per_node"
        )
    known = Sizes.of(config.parallel)
    copy = known.tp * known.pp * known.cp  # 1 where they are not given
    load = workload_of(own, config, args)
    memory = own.gpu_memory
    return Job(
        config=config,
        given=given,
        args=args,
        gpus=own.gpus,
        samples=own.global_batch_size or config.train.global_batch_size(max(own.gpus // copy, 1)),
        rates=rates,
        available=round(memory * GIB) if memory else rates.gpu_memory_bytes,
        load=load,
        media=media_words(own),
    )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def grid(job: Job) -> Iterator[Sizes]:
    """All combinations of sizes, whether possible or not."""
    known = Sizes.of(job.config.parallel)
    free = divisors(job.gpus)
    options = [[size] if flag in job.given else free for flag, size in zip(SIZE_FLAGS, known)]
    for tp in options[0]:
        for ep in options[1]:
            for pp in options[2]:
                for cp in options[3]:
                    yield Sizes(tp, ep, pp, cp)


def data_parallel_size(job: Job, sizes: Sizes) -> int:
    """Raises ValueError where a run would refuse the layout, a step's samples do not divide, or
    rows are not cut so small without being told to.
    """
    args, parallel = job.args, sizes.parallel()
    job.config.check_parallel(parallel)
    dp = check_layout(
        job.gpus,
        parallel,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        num_experts=args.num_experts,
        num_layers=args.num_layers,
    )
    if job.samples % dp:
        raise ValueError(
            f"the {job.samples} samples of a step (--global_batch_size) cannot be shared by {dp} "
            "data-parallel ranks"
        )
    length = job.config.data.max_length
    if length // (2 * sizes.cp) < LEAST_CHUNK and sizes.cp > 1 and SIZE_FLAGS[3] not in job.given:
        raise ValueError(
            f"--context_parallel_size {sizes.cp} would cut rows of {length} tokens into chunks of "
            f"less than {LEAST_CHUNK}; not planned unless the flag is given"
        )
    return dp


def cut(samples: int, tokens: int, row: int) -> tuple[int, int]:
    """(batch, accumulation) of a rank: the most rows of `row` tokens that a micro-batch of `tokens`
    holds, which divides its samples.
    """
    most = max(tokens // row, 1)
    batch = next(size for size in range(min(most, samples), 0, -1) if samples % size == 0)
    return batch, samples // batch


def budgets(job: Job, sizes: Sizes, samples: int) -> tuple[list[int], list[int]]:
    """--max_tokens_per_micro_batch of a rank with so many samples: those to try, ascending, and
    those to try where the first of them does not fit, descending.
    """
    given = job.config.train.max_tokens_per_micro_batch
    if given and "max_tokens_per_micro_batch" in job.given:
        return [given], []
    rows = [1]
    while rows[-1] < samples * job.config.rollout.num_generations:
        rows.append(2 * rows[-1])
    first = min(max((sizes.tp * sizes.cp // 4).bit_length() - 1, 0), len(rows) - 1)
    tokens = [number * job.longest_row for number in rows]
    return tokens[first:], tokens[:first][::-1]


def make_plan(job: Job) -> Plan:
    """Of all layouts."""
    choices: list[Choice] = []
    refusals: list[Refusal] = []
    too_large: list[Choice] = []
    for sizes in grid(job):
        try:
            dp = data_parallel_size(job, sizes)
        except ValueError as error:
            refusals.append(Refusal(sizes, str(error)))
            continue
        found = list(choices_of(job, sizes, dp))
        fitting = [choice for choice in found if choice.time]
        choices += fitting
        if fitting:
            too_large += [choice for choice in found if not choice.time]
            continue
        least = min(found, key=lambda choice: choice.memory.total)
        refusals.append(Refusal(sizes, memory_reason(job, least), least))
    return Plan(
        job,
        sorted(choices, key=lambda choice: (choice.seconds, choice.memory.total)),
        refusals,
        too_large,
    )


def choices_of(job: Job, sizes: Sizes, dp: int) -> Iterator[Choice]:
    """Of a layout that divides: until a micro-batch does not fit, or where the first does not fit,
    until one does. A larger one needs more memory.
    """
    ascending, descending = budgets(job, sizes, job.samples // dp)
    any_fits = False
    known: dict[str, Phase] = {}
    for tokens in ascending:
        *others, last = at_budget(job, sizes, dp, tokens, known)
        yield from [*others, last]
        if not last.time:
            break
        any_fits = True
    for tokens in [] if any_fits else descending:
        *others, last = at_budget(job, sizes, dp, tokens, known)
        yield from [*others, last]
        if last.time:
            break


def at_budget(
    job: Job, sizes: Sizes, dp: int, tokens: int, known: dict[str, Phase]
) -> Iterator[Choice]:
    """With the recomputations that come into question, up to the first that fits. known: see
    `choice_of`.
    """
    recomputes: list[Recompute] = ["none", "auto"]
    if "recompute" in job.given:
        recomputes = [job.config.model.recompute]
    for recompute in recomputes:
        choice = choice_of(job, sizes, dp, recompute, tokens, known)
        yield choice
        if choice.time:
            return


def choice_of(
    job: Job,
    sizes: Sizes,
    dp: int,
    recompute: Recompute,
    tokens: int,
    known: dict[str, Phase],
) -> Choice:
    """With what it needs. known: the phases that are the same for all choices of a layout; the
    first one that fits fills it.
    """
    batch, accumulation = cut(job.samples // dp, tokens, job.longest_row)
    load = load_of(job, recompute, tokens, batch, accumulation)
    layout, time = sizes.parallel(), None
    memory = estimate(job.args, layout, load, world_size=job.gpus)
    if memory.total <= job.available:
        time = step_time(job.args, layout, load, job.gpus, job.rates, known=known)
        known |= {name: time.phases[name] for name in OF_LAYOUT}
    return Choice(sizes, dp, recompute, tokens, batch, accumulation, memory, time)


def load_of(
    job: Job, recompute: Recompute, tokens: int, batch_size: int, accumulation: int
) -> Workload:
    return replace(
        job.load,
        recompute=recompute != "none",
        micro_batch_tokens=max(tokens, job.longest_row),  # a row is never cut
        batch_size=batch_size,
        accumulation=accumulation,
    )


def kept_layers(job: Job, choice: Choice) -> int | None:
    """Of a stage, those whose activations --recompute auto can keep."""
    load = load_of(job, "auto", choice.micro_batch_tokens, choice.batch_size, choice.accumulation)
    layout = choice.sizes.parallel()
    return kept_layers_that_fit(job.args, layout, load, job.available, world_size=job.gpus)


def memory_reason(job: Job, least: Choice) -> str:
    return (
        f"needs {least.memory.total / GIB:.1f} GiB or more, the GPU has {job.available / GIB:.1f}"
    )


def config_of(job: Job, choice: Choice) -> Config:
    """The settings of a run with that choice."""
    train = replace(
        job.config.train,
        per_device_train_batch_size=choice.batch_size,
        gradient_accumulation_steps=choice.accumulation,
        max_tokens_per_micro_batch=choice.micro_batch_tokens,
    )
    model = replace(job.config.model, recompute=choice.recompute)
    return replace(job.config, model=model, train=train, parallel=choice.sizes.parallel())
