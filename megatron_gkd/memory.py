"""The memory that a rank of a run needs, from the model's sizes, the layout and the flags: compared
with the GPU's before weights are read, and printed by `--check_layout`. Imports nothing slow.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import targets_in
from megatron_gkd.model.args import ModelArgs

GIB = 2**30
LOSS_BYTES = 2**30  # of the loss's buffers on a GPU: CHUNK_BYTES of loss/linear.py
LEAST_TOKENS = 512  # of a micro-batch that is proposed


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What of a run's settings takes memory."""

    number_bytes: int
    """Of a number of the base model and of activations"""
    lora_rank: int
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
    num_laid_out: int = 1
    """Adapters that write: the student's, and the teacher's with --seq_kd"""
    tower_bytes: int = 0

    @property
    def rows(self) -> int:
        """That a rollout of a data-parallel rank writes."""
        return self.batch_size * self.accumulation * self.num_generations


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


def attention_rows(args: ModelArgs, tp: int) -> tuple[int, int]:
    """(query, key or value) rows of a rank, which has at least one whole key/value head."""
    groups = max(args.num_key_value_heads / tp, 1)
    return args.num_attention_heads // tp * args.head_dim, round(groups) * args.head_dim


def base_parameters(args: ModelArgs, layout: ParallelConfig) -> int:
    """Of a rank of the first or last stage, the fuller one."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    hidden = args.hidden_size
    queries, keys = attention_rows(args, tp)
    attention = hidden * (2 * queries + 2 * keys) + 2 * hidden + 2 * args.head_dim
    experts = args.num_experts // layout.expert_model_parallel_size
    layer = attention + args.num_experts * hidden
    layer += experts * 3 * hidden * args.moe_intermediate_size
    vocabulary = args.padded_vocab_size(tp) // tp * hidden
    return args.num_layers // pp * layer + vocabulary * (2 if pp == 1 else 1)


def of_fullest_stage(
    args: ModelArgs, layout: ParallelConfig, load: Workload, of_layer: Callable[[list[str]], int]
) -> int:
    """The sum of `of_layer(names of its linears with LoRA)` over a stage's layers, the most of any
    stage.
    """
    sizes = [of_layer(targets_in(load.targets, layer)) for layer in range(args.num_layers)]
    length = args.num_layers // layout.pipeline_model_parallel_size
    return max(sum(sizes[first : first + length]) for first in range(0, len(sizes), length))


def lora_parameters(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """Of the rank with most; the lm_head's counted there too."""
    tp = layout.tensor_model_parallel_size
    hidden, inter = args.hidden_size, args.moe_intermediate_size
    queries, keys = attention_rows(args, tp)
    experts = args.num_experts // layout.expert_model_parallel_size
    sizes = dict.fromkeys(("k_proj", "v_proj"), hidden + keys)
    sizes |= dict.fromkeys(("q_proj", "o_proj"), hidden + queries)
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), experts * (hidden + inter))
    of_layer = lambda names: load.lora_rank * sum(sizes[name] for name in names)
    head = load.lora_rank * (hidden + args.padded_vocab_size(tp) // tp)
    layers = of_fullest_stage(args, layout, load, of_layer)
    return layers + (head if "lm_head" in load.targets else 0)


def expert_column_parameters(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """Of the experts' LoRA as training multiplies with it: W_up in columns behind the base's
    weight, W_down beside it, ranks padded to multiples of 8.
    """
    return expert_parameters(args, layout, load, lambda rank: -(-rank // 8) * 8)


def laid_out_parameters(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """Of the experts' LoRA as decoding reads it: its ranks padded to powers of two, 16 or more."""
    padded = lambda rank: max(16, 1 << (rank - 1).bit_length()) if rank else 0
    return expert_parameters(args, layout, load, padded)


def expert_parameters(
    args: ModelArgs, layout: ParallelConfig, load: Workload, padded: Callable[[int], int]
) -> int:
    """Of the experts' LoRA on the rank with most, W_up and W_down of `padded(rank)` columns; gate
    and up have theirs together.
    """
    hidden, inter = args.hidden_size, args.moe_intermediate_size

    def of_layer(names: list[str]) -> int:
        rank_of = lambda *of: padded(load.lora_rank * sum(name in names for name in of))
        of_gate_up = rank_of("gate_proj", "up_proj") * (hidden + 2 * inter)
        return of_gate_up + rank_of("down_proj") * (inter + hidden)

    experts = args.num_experts // layout.expert_model_parallel_size
    return experts * of_fullest_stage(args, layout, load, of_layer)


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
