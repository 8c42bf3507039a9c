"""The same rows through transformers' thinker and the Megatron decoder: hidden states after every layer, logits.

The towers run in transformers; what they hand to the decoder (embeddings, 3-D positions, the vision tower's features
for the first layers) goes into both decoders. Legend: B rows, S positions, H hidden size.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint_tools.thinker import decoder
from checkpoint_tools.verify_rows import Rows
from megatron_gkd.forward import forward_logits


@dataclass
class DecoderInput:
    """What enters the decoder beside the ids. `features`: for `visual`'s positions, after the first layers."""

    position_ids: Tensor  # [3, B, S]
    media: Tensor  # bool [B, S]: the positions whose embeddings the towers made
    embeddings: Tensor  # [B, S, H]
    visual: Tensor | None  # bool [B, S]
    features: list[Tensor]


@dataclass
class Trace:
    """layers: number from 1 -> [B, S, H] after that layer; logits [B, S, V]. fp32, on the CPU."""

    layers: dict[int, Tensor]
    logits: Tensor


def transformers_trace(thinker, rows: Rows) -> tuple[Trace, DecoderInput]:
    """`thinker`: transformers' model, or peft's around it."""
    text_model = decoder(thinker.get_base_model() if hasattr(thinker, "get_base_model") else thinker)
    config, layers, entered = thinker.config, {}, {}
    with ExitStack() as hooks, torch.no_grad():
        record = text_model.register_forward_pre_hook(
            lambda module, args, kwargs: entered.update(kwargs), with_kwargs=True
        )
        hooks.callback(record.remove)
        for number, layer in enumerate(text_model.layers, start=1):
            keep = layer.register_forward_hook(
                lambda module, args, out, number=number: layers.update({number: out.clone()})
            )
            hooks.callback(keep.remove)
        logits = thinker(**rows.inputs).logits
    ids, positions = rows.inputs["input_ids"], entered["position_ids"]
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    media = (ids == config.audio_token_id) | (ids == config.image_token_id)
    given = DecoderInput(
        position_ids=positions[-3:].contiguous(),
        media=media,
        embeddings=entered["inputs_embeds"].float(),
        visual=entered.get("visual_pos_masks"),
        features=[features.float() for features in entered.get("deepstack_visual_embeds") or []],
    )
    return Trace({number: hidden.float() for number, hidden in layers.items()}, logits.float()), given


def megatron_trace(model, shape, parallel, rows: Rows, given: DecoderInput) -> Trace:
    """Complete on every rank. Collectives: those of the forward pass, an all-gather of the layers' hidden states."""
    layers: dict[int, Tensor] = {}
    with _entering(model, parallel, given), _leaving(model, parallel, given, layers):
        ids = rows.inputs["input_ids"].to(parallel.device)
        logits = forward_logits(model, shape, parallel, ids, given.position_ids.to(parallel.device))
    shards = {number: (parallel.tp_rank, hidden.cpu()) for number, hidden in layers.items()}
    gathered = [None] * parallel.world_size
    torch.distributed.all_gather_object(gathered, shards if parallel.dp_rank == 0 else {})
    whole = {}
    for number in range(1, shape.num_layers + 1):
        parts = dict(found[number] for found in gathered if number in found)
        hidden = torch.cat([parts[rank] for rank in sorted(parts)])
        whole[number] = hidden[: rows.real.shape[1]].transpose(0, 1).float()
    return Trace(whole, logits)


def _own_positions(tensor: Tensor, parallel) -> Tensor:
    """[B, S, ...] -> this rank's sequence shard [S/TP, B, ...]; positions that padding adds are zero."""
    whole = tensor.transpose(0, 1)
    padding = whole.new_zeros(-len(whole) % parallel.tp_size, *whole.shape[1:])
    return torch.cat([whole, padding]).chunk(parallel.tp_size)[parallel.tp_rank].to(parallel.device)


@contextmanager
def _entering(model, parallel, given: DecoderInput):
    """Put the towers' embeddings in the place of the media tokens'."""
    if not parallel.is_first_stage:
        yield
        return
    media, embeddings = _own_positions(given.media, parallel), _own_positions(given.embeddings, parallel)

    def replace(module, args, output):
        return torch.where(media[..., None], embeddings.to(output.dtype), output)

    hook = model.embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _leaving(model, parallel, given: DecoderInput, layers: dict[int, Tensor]):
    """Keep what every layer of this stage returns; add the vision tower's features after the first ones."""

    def keep(layer, args, output):
        hidden, *rest = output
        layers[layer.layer_number] = hidden.clone()
        if layer.layer_number <= len(given.features):
            added = torch.zeros_like(given.embeddings)
            added[given.visual] = given.features[layer.layer_number - 1]
            hidden = hidden + _own_positions(added, parallel).to(hidden.dtype)
        return (hidden, *rest)

    hooks = [layer.register_forward_hook(keep) for layer in model.decoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(name: str, ours: Trace, theirs: Trace, real: Tensor, tolerance: float) -> tuple[str, bool]:
    """A line of the table and whether the logits agree; where they do not, the first layer that parts by more."""
    difference = (ours.logits - theirs.logits)[real].abs().max().item()
    largest = theirs.logits[real].abs().max().item()
    passed = difference <= tolerance  # a NaN does not
    line = f"  {name:22} {difference:.1e}  (largest logit {largest:.1f})  {'ok' if passed else 'DIFFERS'}"
    if not passed:
        line += f"; {first_parting(ours, theirs, real, tolerance)}"
    return line, passed


def first_parting(ours: Trace, theirs: Trace, real: Tensor, tolerance: float) -> str:
    for number in sorted(theirs.layers):
        expected = theirs.layers[number][real]
        difference = ((ours.layers[number][real] - expected).abs().max() / expected.abs().max()).item()
        if not difference <= tolerance:
            return f"first at layer {number - 1}: {difference:.1e} of its largest value"
    return "all layers agree: the final norm or the lm_head"
