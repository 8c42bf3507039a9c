"""What a training step holds of a stage beside weights and LoRA: activations and what works on
them, at each of the moments at which it may be the most.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import HEAD, linears_of_layers
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.passes import Layer, backward, forward, kept_of_stage, loss, residual
from megatron_gkd.plan.shapes import Device, Shapes
from megatron_gkd.plan.tower_memory import MediaBytes, media_bytes
from megatron_gkd.plan.workload import Workload


def training_parts(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int,
    *,
    device: Device = "cuda",
    kept_layers: int | None = None,
) -> dict[str, int]:
    """At the highest moment of a stage, by kind. kept_layers: see `moments`."""
    found = moments(args, layout, load, stage, device=device, kept_layers=kept_layers)
    return max(found.values(), key=lambda parts: sum(parts.values()))


def moments(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int,
    *,
    device: Device = "cuda",
    kept_layers: int | None = None,
    routed_rows: Sequence[int] = (),
) -> dict[str, dict[str, int]]:
    """Bytes by kind at each moment: the teacher's forward, on the last stage the loss, the
    backward; on the first one those of the towers. kept_layers: how many of a stage's layers keep
    their activations (the last ones); None: all of them, or with load.recompute none. routed_rows:
    see `layers_of_stage`.
    """
    pp, last = layout.pipeline_model_parallel_size, layout.pipeline_model_parallel_size - 1
    layers = layers_of_stage(args, layout, load, stage, device=device, routed_rows=routed_rows)
    shapes = layers[0].shapes
    if kept_layers is None:
        kept_layers = 0 if load.recompute else len(layers)
    recomputed = max(len(layers) - kept_layers, 0)
    media = media_bytes(load, shapes.shard, device) if stage == 0 else MediaBytes()
    towers = media.towers
    always = {"features of media": media.of_step}
    if stage == last:
        rows = load.rows * load.response_tokens // layout.context_parallel_size
        always["teacher's hidden states"] = rows * args.hidden_size * load.number_bytes
    of_teacher = max(forward(teacher_layer(layer, load)) for layer in kinds(layers))
    found = {
        "towers' forward": {"towers' activations": towers.forward},
        "teacher's forward": {
            "features of media": media.of_pass + media.deepstack,
            "a forward": of_teacher,
        },
    }

    in_flight = min(pp - stage, num_micro_batches(load))
    kept = kept_of_stage(layers, recomputed)
    # what a layer that runs again gets is an input of its checkpoint
    of_media = {
        "towers' activations": towers.kept,
        "features of media": media.deepstack if recomputed else 0,
    }
    others = {kind: (in_flight - 1) * size for kind, size in added(kept, of_media).items()}
    if pp > 1:  # what a stage has sent waits for its backward
        others["outputs of the stage"] = in_flight * residual(shapes)
    if stage == last:
        of_logits = HEAD in load.targets
        of_loss = loss(shapes, response_rows(load), of_logits=of_logits)
        found["loss"] = added(others, of_media, kept, {"the loss": of_loss})
    found["backward"] = added(others, of_media, backward(layers, recomputed))
    if recomputed or towers.kept:
        found["backward"]["gradient of deepstack"] = media.deepstack
    if towers.kept:
        of_forward, of_backward = towers.forward_with_lora, towers.kept + towers.backward
        found["towers' forward with LoRA"] = added(others, {"towers' activations": of_forward})
        found["towers' backward"] = added(others, {"towers' activations": of_backward})
    return {name: added(always, parts) for name, parts in found.items()}


def added(*parts: dict[str, int]) -> dict[str, int]:
    """The sums by kind."""
    kinds = dict.fromkeys(kind for of in parts for kind in of)
    return {kind: sum(of.get(kind, 0) for of in parts) for kind in kinds}


def layers_of_stage(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int,
    *,
    device: Device = "cuda",
    routed_rows: Sequence[int] = (),
) -> list[Layer]:
    """Equal ones are one object, whose bytes are counted once. routed_rows: of each layer, the
    (token, expert) pairs of this rank's experts, where they are known.
    """
    shapes = Shapes(
        args,
        layout,
        tokens=load.micro_batch_tokens,
        number_bytes=load.number_bytes,
        device=device,
    )
    length = args.num_layers // layout.pipeline_model_parallel_size
    known: dict[tuple, Layer] = {}

    def layer(names: tuple[str, ...], rows: int | None) -> Layer:
        if (names, rows) not in known:
            of_layer = replace(shapes, routed_rows=rows)
            drops = load.lora_dropout > 0
            known[names, rows] = Layer(of_layer, names, load.lora_rank, drops=drops)
        return known[names, rows]

    linears = linears_of_layers(tuple(load.targets), args.num_layers)
    rows: Sequence[int | None] = routed_rows or [None] * length
    return list(map(layer, linears[stage * length : (stage + 1) * length], rows))


def kinds(layers: Sequence[Layer]) -> list[Layer]:
    """One of those with equal LoRA each."""
    return list({tuple(layer.names): layer for layer in layers}.values())


def teacher_layer(layer: Layer, load: Workload) -> Layer:
    """As the teacher's forward runs it, with as many tokens as its view has."""
    shapes = layer.shapes
    tokens = ceil(shapes.tokens * load.teacher_row_tokens / load.row_tokens)
    names = layer.names if load.has_teacher_adapter else ()
    return replace(layer, shapes=replace(shapes, tokens=tokens), names=names)


def num_micro_batches(load: Workload) -> int:
    """Of a step of a data-parallel rank."""
    return max(ceil(load.rows * load.row_tokens / load.micro_batch_tokens), 1)


def response_rows(load: Workload) -> int:
    """N of the largest micro-batch."""
    rows = ceil(load.micro_batch_tokens / load.row_tokens)
    return min(rows * load.response_tokens, load.micro_batch_tokens)
