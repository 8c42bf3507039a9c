"""What a rollout holds of a stage beside weights and LoRA: keys and values, and at different times
the prompts' forward, sampling, longer room for keys and values.

Legend: P prompts, B places of rows that are written, W positions of the longest prompt, C positions
that responses have room for.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.passes import forward
from megatron_gkd.plan.shapes import Device, attention_rows
from megatron_gkd.plan.tower_memory import (
    deepstack_bytes,
    feature_bytes,
    media_tokens,
    tower_bytes,
)
from megatron_gkd.plan.training_memory import kinds, layers_of_stage
from megatron_gkd.plan.workload import Workload

CAPACITY = 512  # response positions that the cache starts with (rollout/cache.py)
SORT_BYTES = 32  # a score: sorted, with its column; probabilities as fp64 and integers
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # places, then multiples of 64 (engine.py)

LEAST_ROOM = 128  # rows of the sampler's state (engine.py)


def places(layout: ParallelConfig, load: Workload) -> int:
    """B: the bucket of a rank's rows."""
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    multiple = tp if tp % ep else 1  # experts are spread over replicas
    rows = load.written_rows(layout)
    sizes = [size for size in BUCKETS if size >= rows and size % multiple == 0]
    step = math.lcm(64, multiple)
    return sizes[0] if sizes else -(-rows // step) * step


def sampler_bytes(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """Of which tokens each row has seen, kept from rollout to rollout."""
    tp = layout.tensor_model_parallel_size
    rows = max(places(layout, load), LEAST_ROOM)
    return rows * (args.padded_vocab_size(tp) // tp + 16)


def draw_bytes(args: ModelArgs, layout: ParallelConfig, load: Workload) -> int:
    """Of one draw: logits and scores in fp32; where all scores are sorted, these and their
    probabilities besides.
    """
    tp = layout.tensor_model_parallel_size
    of_a_number = 8 + SORT_BYTES * load.sorts_scores
    return places(layout, load) * args.padded_vocab_size(tp) // tp * of_a_number


def rollout_parts(
    args: ModelArgs, layout: ParallelConfig, load: Workload, stage: int, *, device: Device = "cuda"
) -> dict[str, int]:
    """At a stage's highest moment, by kind; empty where no step writes."""
    if not load.completion_tokens:
        return {}
    moments = rollout_moments(args, layout, load, stage, device=device)
    return max(moments, key=lambda parts: sum(parts.values()))


def rollout_moments(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int,
    *,
    device: Device = "cuda",
    routed_rows: int | None = None,
) -> Iterator[dict[str, int]]:
    """The prompts' forward, the first tokens drawn, longer room for keys and values; on a CPU also
    their copies; on the first stage towers with LoRA before that. routed_rows: in the prompts'
    forward, where they are known.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    _, keys = attention_rows(args, tp)
    position = args.num_layers // pp * 2 * keys * load.number_bytes
    num_prompts, rows = load.prompts_of_rank(layout), places(layout, load)
    prompts = position * num_prompts * load.prompt_tokens
    responses = position * rows * min(load.completion_tokens, CAPACITY)

    total = num_prompts * load.prompt_tokens
    tokens = min(max(load.prefill_tokens, load.prompt_tokens), total)
    # every context-parallel rank reads its own prompts, whole
    alone = replace(layout, context_parallel_size=1)
    layers = kinds(layers_of_stage(args, layout, load, stage, device=device))
    shapes = replace(layers[0].shapes, layout=alone, tokens=tokens, routed_rows=routed_rows)
    of_layers = max(forward(replace(layer, shapes=shapes)) for layer in layers)
    last = num_prompts * args.hidden_size * load.number_bytes
    features = of_media = deepstack = 0
    if stage == 0:
        # of each micro-batch, from the step's start on where towers are frozen; and joined
        num_media = media_tokens(load, load.batch_size * load.accumulation * load.row_tokens)
        of_media = feature_bytes(load, num_media)
        if load.lora_towers:
            yield {
                "features of media": of_media,
                "towers' activations": tower_bytes(load, device).forward,
            }
            yield {"features of media": 2 * of_media}
        else:
            features = of_media
        deepstack = deepstack_bytes(load, min(media_tokens(load, tokens), shapes.shard))
    held = {"keys and values": prompts + responses}
    joined_too = {"features of media": features + of_media}
    yield held | joined_too | {"prompts": of_layers + last + deepstack}
    logits = rows * args.padded_vocab_size(tp) // tp * 4
    # the tokens of prompts, then of their rows, beside the sampler's own
    seen = (num_prompts + rows) * (args.padded_vocab_size(tp) // tp + 16)
    yield held | joined_too | {"sampling": draw_bytes(args, layout, load) + seen}
    held["features of media"] = features
    if load.completion_tokens > CAPACITY:  # it doubles until it is enough
        capacity = CAPACITY
        while 2 * capacity < load.completion_tokens:
            capacity *= 2
        both = position * rows * (capacity + load.completion_tokens)
        of_prompts = 2 * position * rows * load.prompt_tokens if device == "cpu" else prompts
        yield held | {"keys and values": of_prompts + both}
    if device == "cpu":  # each row's prompt is copied before its response
        joined = position * rows * load.prompt_tokens + responses
        yield held | {"keys and values": joined, "sampling": 5 * logits}
        yield held | {"keys and values": prompts + responses + 2 * joined}
