"""What a rollout holds of a stage beside weights and LoRA: keys and values, the prompts' forward,
sampling.
"""

from dataclasses import replace

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.passes import forward
from megatron_gkd.plan.shapes import Device, attention_rows
from megatron_gkd.plan.training_memory import layers_of_stage
from megatron_gkd.plan.workload import Workload

CAPACITY = 512  # response positions that the cache starts with (rollout/cache.py)


def rollout_parts(
    args: ModelArgs, layout: ParallelConfig, load: Workload, *, device: Device = "cuda"
) -> dict[str, int]:
    """At the highest moment, by kind; empty where no step writes."""
    if not load.completion_tokens:
        return {}
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    _, keys = attention_rows(args, tp)
    position = args.num_layers // pp * 2 * keys * load.number_bytes
    prompts = load.batch_size * load.accumulation * load.prompt_tokens
    # the cache of responses doubles from 512 positions on: old and new for a moment
    grows = 1.5 if load.completion_tokens > CAPACITY else 1
    positions = prompts + load.rows * load.completion_tokens * grows
    layer = layers_of_stage(args, layout, load, 0, device=device)[0]
    shapes = replace(layer.shapes, tokens=min(load.prefill_tokens, prompts))
    of_prompts = forward(replace(layer, shapes=shapes))
    sampling = 16 * load.rows * args.padded_vocab_size(tp) // tp
    return {
        "keys and values": round(position * positions),
        "prompts": of_prompts,
        "sampling": sampling,
    }
