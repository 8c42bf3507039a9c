"""What a training step holds of a stage beside weights and LoRA: activations and what works on
them, at each of the moments at which it may be the most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import HEAD, linears_of_layers
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.passes import Layer, backward, forward, kept_of_stage, loss, residual
from megatron_gkd.plan.shapes import Device, Shapes
from megatron_gkd.plan.workload import Workload


def training_parts(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    *,
    device: Device = "cuda",
    kept_layers: int | None = None,
) -> dict[str, int]:
    """At the highest moment of the stage that needs most, by kind. kept_layers: see `moments`."""
    stages = {0, layout.pipeline_model_parallel_size - 1}
    found = [
        moment
        for stage in stages
        for moment in moments(args, layout, load, stage, device=device, kept_layers=kept_layers)
    ]
    return max(found, key=lambda parts: sum(parts.values()))


def moments(
    args: ModelArgs,
    layout: ParallelConfig,
    load: Workload,
    stage: int,
    *,
    device: Device = "cuda",
    kept_layers: int | None = None,
    routed_rows: Sequence[int] = (),
) -> Iterator[dict[str, int]]:
    """The teacher's forward, on the last stage the loss, the backward: bytes by kind. kept_layers:
    how many of a stage's layers keep their activations (the last ones); None: all of them, or with
    load.recompute none. routed_rows: see `layers_of_stage`.
    """
    pp, last = layout.pipeline_model_parallel_size, layout.pipeline_model_parallel_size - 1
    layers = layers_of_stage(args, layout, load, stage, device=device, routed_rows=routed_rows)
    shapes = layers[0].shapes
    if kept_layers is None:
        kept_layers = 0 if load.recompute else len(layers)
    recomputed = max(len(layers) - kept_layers, 0)
    teacher_hidden = 0
    if stage == last:
        rows = load.rows * load.response_tokens // layout.context_parallel_size
        teacher_hidden = rows * args.hidden_size * load.number_bytes
    always = {"teacher's hidden states": teacher_hidden}
    yield always | {"a forward": forward(teacher_layer(layers, load))}

    in_flight = min(pp - stage, num_micro_batches(load))
    kept = kept_of_stage(layers, recomputed)
    others = {kind: (in_flight - 1) * size for kind, size in kept.items()}
    if pp > 1:  # what a stage has sent waits for its backward
        others["outputs of the stage"] = in_flight * residual(shapes)
    if stage == last:
        of_logits = HEAD in load.targets
        of_loss = loss(shapes, response_rows(load), of_logits=of_logits)
        yield always | added(others, kept) | {"the loss": of_loss}
    yield always | added(others, backward(layers, recomputed))


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


def teacher_layer(layers: list[Layer], load: Workload) -> Layer:
    """One that the teacher's forward runs, with as many tokens as its view has."""
    layer, shapes = layers[-1], layers[-1].shapes
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
