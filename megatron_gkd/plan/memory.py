"""The memory that a rank of a run needs, from the model's sizes, the layout and the flags: by kind,
and what makes it fit. Compared with the GPU's before weights are read. Imports nothing slow.

Bytes of the rank that needs most. What stands all the time (parameters.py):

    base       its share of the weights, in the base's type
    LoRA       16 a parameter: itself, its gradient and AdamW's two moments, in fp32; of the
               experts' once more as their products read it, in the base's type
    laid out   LoRA as decoding reads it, in the base's type

To that the largest of what exists at other times: a training step at its highest moment
(training_memory.py; activations.py what layers keep, passes.py what works on it, tower_memory.py
the towers), a rollout (rollout_memory.py). And what torch's allocator does not count: the CUDA
context, the buffers of communicators. 1 GiB and 2 % are held back: workspaces of libraries, memory
in pieces.

docs/memory.md says what of this was measured.
"""

from dataclasses import dataclass, field, replace

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import linears_of_layers
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.parameters import (
    base_parameters,
    expert_column_parameters,
    laid_out_parameters,
    lora_parameters,
    place_bytes,
)
from megatron_gkd.plan.rollout_memory import draw_bytes, rollout_parts, sampler_bytes
from megatron_gkd.plan.shapes import Device
from megatron_gkd.plan.tower_memory import tower_lora_parameters
from megatron_gkd.plan.training_memory import training_parts
from megatron_gkd.plan.workload import Workload

GIB = 2**30
LEAST_TOKENS = 512  # of a micro-batch that is proposed
CONTEXT_BYTES = 6 * GIB // 10
"""Of a CUDA context with torch's kernels: 79.2 GiB of an H100 were 78.6 once CUDA was there"""
COMMUNICATOR_BYTES = GIB // 4
"""Of NCCL for each group of ranks that a rank talks in. Not measured here: 16 channels to two
neighbours with a buffer of 4 MiB (NCCL_BUFFSIZE's default) each way; it grows with channels, not
with ranks beyond two machines (NCCL's maintainers in NVIDIA/nccl issues 285, 864 and 986)"""


@dataclass(frozen=True)
class Estimate:
    """Bytes by kind. Those of `training` and of `rollout` do not exist at the same time."""

    always: dict[str, int]
    training: dict[str, int]
    rollout: dict[str, int]
    outside: dict[str, int] = field(default_factory=dict)
    """Of torch's allocator"""

    @property
    def allocated(self) -> int:
        """By torch's allocator at the highest point, as `torch.cuda.max_memory_allocated` says."""
        most = max(sum(self.training.values()), sum(self.rollout.values()))
        return sum(self.always.values()) + most

    @property
    def total(self) -> int:
        """Of the GPU's memory, reserve included."""
        return self.allocated + sum(self.outside.values()) + GIB + self.allocated // 50

    def describe(self) -> str:
        """`68.1 GiB a rank: base 56.9, ...`, without parts that are nothing."""

        def parts(found: dict[str, int]) -> str:
            return ", ".join(f"{k} {v / GIB:.1f}" for k, v in found.items() if v >= GIB / 20)

        kinds = {
            "": self.always,
            "in training ": self.training,
            "in rollouts ": self.rollout,
            "outside of torch ": self.outside,
        }
        phases = [f"{when}{parts(found)}" for when, found in kinds.items() if parts(found)]
        return f"{self.total / GIB:.1f} GiB a rank: {'; '.join(phases) or 'the reserve'}"


def estimate(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    *,
    world_size: int | None = None,
    device: Device = "cuda",
    kept_layers: int | None = None,
    whole_card: bool = True,
) -> Estimate:
    """Of the rank that needs most.

    world_size: without it as many ranks as the layout needs. device: a CPU's functions hold other
    things for a moment, and there is nothing outside of torch. kept_layers: of a stage's layers,
    how many keep their activations; None: all, or none with load.recompute. whole_card: whether
    the CUDA context counts; False where it has taken its part already (communicators take theirs
    when their groups first talk, which most of them do in the first step).
    """
    outside = {}
    if device == "cuda":
        groups = num_communicators(layout, world_size)
        outside = {"CUDA context": CONTEXT_BYTES * whole_card}
        outside["communicators"] = groups * COMMUNICATOR_BYTES
    graphs = {}
    if device == "cuda" and load.completion_tokens and layout.pipeline_model_parallel_size == 1:
        graphs = {"rollouts' graphs": draw_bytes(args, layout, load)}
    found = [
        Estimate(
            standing_parts(args, layout, load, stage) | graphs,
            training_parts(args, layout, load, stage, device=device, kept_layers=kept_layers),
            rollout_parts(args, layout, load, stage, device=device),
            outside,
        )
        for stage in stages_with_most(args, layout, load)
    ]
    return max(found, key=lambda of_stage: of_stage.allocated)


def stages_with_most(args: ModelArgs, layout: ParallelConfig, load: Workload) -> list[int]:
    """The last pipeline stage, and each other one that has no stage with the same LoRA before it:
    that one holds more micro-batches in flight, and the first the embedding and the towers.
    """
    pp = layout.pipeline_model_parallel_size
    linears = linears_of_layers(tuple(load.targets), args.num_layers)
    length = args.num_layers // pp
    first: dict[tuple, int] = {}
    for stage in range(pp - 1):
        first.setdefault(linears[stage * length : (stage + 1) * length], stage)
    return [*first.values(), pp - 1]


def standing_parts(
    args: ModelArgs, layout: ParallelConfig, load: Workload, stage: int
) -> dict[str, int]:
    """What a rank of a stage holds all the time, by kind."""
    lora, towers = lora_parameters(args, layout, load, stage), 0
    if stage == 0:
        lora += tower_lora_parameters(load)
        towers = sum(tower.numbers for tower in load.towers) * load.number_bytes
    always = {
        "base": base_parameters(args, layout, stage) * load.number_bytes,
        "LoRA, gradients, AdamW": lora * (16 + 4 * load.has_teacher_adapter),
        "places of LoRA's numbers": place_bytes(args, layout, load),
        "LoRA inside the experts' products": load.number_bytes
        * expert_column_parameters(args, layout, load, stage)
        * (1 + load.has_teacher_adapter),
        "towers": towers,
    }
    if load.completion_tokens:
        laid_out = laid_out_parameters(args, layout, load, stage) * load.number_bytes
        always["LoRA laid out"] = load.num_laid_out * laid_out
        always["sampler"] = sampler_bytes(args, layout, load)
    return always


def num_communicators(layout: ParallelConfig, world_size: int | None = None) -> int:
    """Groups of several ranks that a rank sends tensors in: tensor, pipeline, context, expert and
    data parallel, the last one for dense parameters and for experts', and the world.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    ep, cp = layout.expert_model_parallel_size, layout.context_parallel_size
    least = max(tp * cp, ep) * pp
    world = world_size or least
    replicas, of_experts = world // (tp * pp), world // (ep * pp)  # context parallel ranks count
    return sum(size > 1 for size in (tp, pp, cp, ep, replicas, of_experts, world))


def kept_layers_that_fit(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    available: int,
    *,
    world_size: int | None = None,
    whole_card: bool = True,
) -> int | None:
    """Layers of a stage that can keep their activations within `available` bytes, as --recompute
    auto chooses them; None where it does not fit even with none.
    """
    load = replace(load, recompute=True)
    low, high = -1, args.num_layers // layout.pipeline_model_parallel_size

    def fits(number: int) -> bool:
        found = estimate(
            args,
            layout,
            load,
            world_size=world_size,
            kept_layers=number,
            whole_card=whole_card,
        )
        return found.total <= available

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low < 0 else low


def check_memory(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    available: int,
    *,
    world_size: int | None = None,
) -> Estimate:
    """The estimate. Raises ValueError naming its parts and flags with which it fits where it is
    more than the `available` bytes, of which the CUDA context has taken its part.
    """
    found = estimate(args, layout, load, world_size=world_size, whole_card=False)
    if found.total <= available:
        return found
    flags = ways_out(args, layout, load, available, world_size=world_size)
    way_out = "use more ranks, or another layout, which python -m megatron_gkd.plan finds"
    way_out = f"{' '.join(flags)} needs less than that" if flags else way_out
    raise ValueError(
        f"the run needs about {found.describe()}; with a reserve that is more than the "
        f"{available / GIB:.1f} GiB that this GPU has left. {way_out} "
        "(docs/memory.md has the sizes)"
    )


def ways_out(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    available: int,
    *,
    world_size: int | None = None,
) -> list[str]:
    """Flags that make it fit, the least costly first, each as far as it helps; empty where they do
    not. available, world_size: as for `check_memory`.
    """
    flags: dict[str, object] = {}
    share = 0.9  # more ranks come first where weights and LoRA leave less than a tenth

    def found() -> Estimate:
        experts = layout.expert_model_parallel_size * layout.pipeline_model_parallel_size
        ranks = world_size and max(world_size, experts)
        return estimate(args, layout, load, world_size=ranks, whole_card=False)

    experts = layout.expert_model_parallel_size
    while sum(found().always.values()) > share * available:
        if args.num_experts % (2 * experts):
            return []
        experts *= 2
        layout = replace(layout, expert_model_parallel_size=experts)
        flags["expert_model_parallel_size"] = f"{experts} on {experts} or more ranks"
    if not load.recompute and found().total > available:
        load, flags["recompute"] = replace(load, recompute=True), "auto"
    while found().total > available and load.completion_tokens and load.accumulation > 1:
        if sum(found().rollout.values()) < sum(found().training.values()):
            break
        load = replace(load, accumulation=load.accumulation // 2)
        flags["gradient_accumulation_steps"] = load.accumulation
    least = max(LEAST_TOKENS, load.prompt_tokens)  # rows, which are never cut, are longer
    while found().total > available and load.micro_batch_tokens >= 2 * least:
        load = replace(load, micro_batch_tokens=load.micro_batch_tokens // 2)
        flags["max_tokens_per_micro_batch"] = load.micro_batch_tokens
    if found().total > available:
        return []
    return [f"--{name} {value}" for name, value in flags.items()]
