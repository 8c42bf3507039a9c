"""The memory that a rank of a run needs, from the model's sizes, the layout and the flags: compared
with the GPU's before weights are read. Imports nothing slow.

Bytes of the rank that needs most. L layers of a stage, T positions of the largest micro-batch, H
hidden size, K experts a token, I their width, b bytes of a number of the base model, TP, EP, CP the
parallel sizes; n = T / (TP CP) tokens of a rank outside of attention, F = PP micro-batches in
flight:

    base       L x (attention / TP + router + norms + experts / EP) + vocabulary / TP, b each
    LoRA       16 a parameter: itself, its gradient and AdamW's two moments, in float32; of the
               experts' once more as their products read it, in the base's type
    inputs     F L n H b: the inputs of layers that are run again
    kept       F L ((1 + N) n H + T / CP x (2 h + 2 g) d / TP + 2 n K I) b: without recomputation. h
               query and g key/value heads of size d; N = EP where the experts' ranks gather
               tokens, else 1. The least; the measured sizes of --recompute auto count
    working    12 n K H b: a layer in backward beside what it keeps, as an H100 showed, or
               LOSS_BYTES and the response rows' hidden states; whichever is more
    rollout    L x 2 g / TP x d x b a position of keys and values, a prompt's forward, 16 bytes a
               row and column of the head; not at the same time as the three above
    laid out   LoRA as decoding reads it, in the base's type
    reserve    1 GiB and 2 %: workspaces of libraries, memory in pieces

A few percent are uncertain: what is refused needs more than there is by this count.
"""

from dataclasses import dataclass, replace

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.parameters import (
    attention_rows,
    base_parameters,
    expert_column_parameters,
    laid_out_parameters,
    lora_parameters,
)
from megatron_gkd.plan.workload import Workload

GIB = 2**30
LOSS_BYTES = 2**30  # of the loss's buffers on a GPU: CHUNK_BYTES of loss/linear.py
LEAST_TOKENS = 512  # of a micro-batch that is proposed


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. Those of `training` and of `rollout` do not exist at the same time."""

    always: dict[str, int]
    training: dict[str, int]
    rollout: dict[str, int]

    @property
    def total(self) -> int:
        """At the highest point, reserve included."""
        most = max(sum(self.training.values()), sum(self.rollout.values()))
        used = sum(self.always.values()) + most
        return used + GIB + used // 50

    def describe(self) -> str:
        """`68.1 GiB a rank: base 56.9, ...`, without parts that are nothing."""

        def parts(found: dict[str, int]) -> str:
            return ", ".join(f"{k} {v / GIB:.1f}" for k, v in found.items() if v >= GIB / 20)

        phases = [f"in training {parts(self.training)}"]
        if self.rollout:
            phases.append(f"in rollouts {parts(self.rollout)}")
        return f"{self.total / GIB:.1f} GiB a rank: {parts(self.always)}; {'; '.join(phases)}"


def kept_bytes(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """What a layer keeps of a micro-batch for its backward, at least."""
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    experts = layout.expert_model_parallel_size
    gathered = experts if experts <= min(tp, args.num_experts_per_tok) else 1  # model/dispatcher.py
    of_rank = args.hidden_size * (1 + gathered)
    of_rank += 2 * args.num_experts_per_tok * args.moe_intermediate_size
    queries, keys = attention_rows(args, tp)
    numbers = of_rank / tp + 2 * queries + 2 * keys
    return round(load.micro_batch_tokens / cp * numbers) * load.number_bytes


def training_parts(args: ModelArgs, layout: ParallelConfig, load: Workload) -> dict[str, int]:
    """Activations and what works on them, by part."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    tokens = load.micro_batch_tokens // layout.context_parallel_size
    of_layer = tokens // tp * args.hidden_size * load.number_bytes
    if not load.recompute:
        of_layer = kept_bytes(args, layout, load)
    layers = args.num_layers // pp * pp  # pp micro-batches in flight
    backward = 12 * tokens // tp * args.num_experts_per_tok * args.hidden_size * load.number_bytes
    columns = args.padded_vocab_size(tp) // tp
    rows = LOSS_BYTES if "lm_head" not in load.targets else tokens * columns * 16
    loss = min(rows, tokens * columns * 16) + tokens * args.hidden_size * 12
    name = "inputs of layers" if load.recompute else "activations (at least)"
    return {name: layers * of_layer, "a layer's backward, or the loss": max(backward, loss)}


def rollout_parts(args: ModelArgs, layout: ParallelConfig, load: Workload) -> dict[str, int]:
    """Keys and values, and the prompts' forward, by part; empty where no step writes."""
    if not load.completion_tokens:
        return {}
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    _, keys = attention_rows(args, tp)
    position = args.num_layers // pp * 2 * keys * load.number_bytes
    prompts = load.batch_size * load.accumulation * load.prompt_tokens
    # the cache of responses doubles from 512 positions on: old and new for a moment
    grows = 1.5 if load.completion_tokens > 512 else 1
    positions = prompts + load.rows * load.completion_tokens * grows
    prefill = min(load.prefill_tokens, prompts)
    row = args.num_experts_per_tok * args.hidden_size * load.number_bytes
    forward = 5 * prefill // tp * row + 16 * load.rows * args.padded_vocab_size(tp) // tp
    return {"keys and values": round(position * positions), "prompts and sampling": forward}


def estimate(args: ModelArgs, layout: ParallelConfig, load: Workload) -> Estimate:
    """Of the rank that needs most."""
    lora = lora_parameters(args, layout, load)
    always = {
        "base": base_parameters(args, layout) * load.number_bytes,
        "LoRA, gradients, AdamW": lora * (16 + 4 * load.has_teacher_adapter),
        "LoRA inside the experts' products": load.number_bytes
        * expert_column_parameters(args, layout, load)
        * (1 + load.has_teacher_adapter),
        "towers": load.tower_bytes,
    }
    if load.completion_tokens:
        laid_out = laid_out_parameters(args, layout, load) * load.number_bytes
        always["LoRA laid out"] = load.num_laid_out * laid_out
    rollout = rollout_parts(args, layout, load)
    return Estimate(always, training_parts(args, layout, load), rollout)


def check_memory(
    args: ModelArgs, layout: ParallelConfig, load: Workload, available: int
) -> Estimate:
    """The estimate. Raises ValueError naming its parts and flags with which it fits where it is
    more than the `available` bytes.
    """
    found = estimate(args, layout, load)
    if found.total <= available:
        return found
    flags = ways_out(args, layout, load, available)
    way_out = f"{' '.join(flags)} needs less than that" if flags else "use more ranks"
    raise ValueError(
        f"the run needs about {found.describe()}; with a reserve that is more than the "
        f"{available / GIB:.1f} GiB that this GPU has left. {way_out} "
        "(docs/memory.md has the sizes)"
    )


def ways_out(args: ModelArgs, layout: ParallelConfig, load: Workload, available: int) -> list[str]:
    """Flags that make it fit, the least costly first, each as far as it helps; empty where they do
    not.
    """
    flags: dict[str, object] = {}
    share = 0.9  # more ranks come first where weights and LoRA leave less than a tenth

    def total() -> int:
        return estimate(args, layout, load).total

    experts = layout.expert_model_parallel_size
    while sum(estimate(args, layout, load).always.values()) > share * available:
        if args.num_experts % (2 * experts):
            return []
        experts *= 2
        layout = replace(layout, expert_model_parallel_size=experts)
        flags["expert_model_parallel_size"] = f"{experts} on {experts} or more ranks"
    if not load.recompute and total() > available:
        load, flags["recompute"] = replace(load, recompute=True), "auto"
    while total() > available and load.completion_tokens and load.accumulation > 1:
        found = estimate(args, layout, load)
        if sum(found.rollout.values()) < sum(found.training.values()):
            break
        load = replace(load, accumulation=load.accumulation // 2)
        flags["gradient_accumulation_steps"] = load.accumulation
    while total() > available and load.micro_batch_tokens >= 2 * LEAST_TOKENS:
        load = replace(load, micro_batch_tokens=load.micro_batch_tokens // 2)
        flags["max_tokens_per_micro_batch"] = load.micro_batch_tokens
    if total() > available:
        return []
    return [f"--{name} {value}" for name, value in flags.items()]
