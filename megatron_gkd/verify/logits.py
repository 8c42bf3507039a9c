"""The same rows through transformers' model and ours: hidden states before and after every layer,
and logits.

Ours are the towers and the Megatron decoder as training builds them; the rotary positions are
transformers' (those of training are tested in tests/test_media_positions.py). B rows, S positions,
H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.data.batch import BatchView, Packing, pack_views
from megatron_gkd.data.sample import MediumPositions, View
from megatron_gkd.forward import view_logits
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel
from megatron_gkd.verify.reference import decoder
from megatron_gkd.verify.rows import Rows

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""For `register_forward_pre_hook(with_kwargs=True)`"""
EMBEDDING = 0
# relative error of a token that fp32's rounding explains; a layer adds about a tenth of it
NOISE = 1e-5


@dataclass
class Trace:
    """Hidden states and logits, fp32, on the CPU."""

    layers: dict[int, Tensor]
    """Number from 1 -> [B, S, H] after that layer and the vision tower's addition to it;
    EMBEDDING -> the input of the first layer
    """
    logits: Tensor
    """[B, S, V]"""


def transformers_trace(model: Any, rows: Rows) -> tuple[Trace, Tensor]:
    """(hidden states and logits, position ids [3, B, S]). model: transformers' model, or peft's
    around it.
    """
    text_model: Any = decoder(model.get_base_model() if hasattr(model, "get_base_model") else model)
    layers: dict[int, Tensor] = {}
    entered: dict[str, Any] = {}
    with ExitStack() as hooks, torch.no_grad():

        def keep_input(number: int) -> Hook:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                layers[number] = (args[0] if args else kwargs["hidden_states"]).float().clone()

            return keep

        def keep_arguments(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            entered.update(kwargs)

        modules = (text_model, *text_model.layers, text_model.norm)
        before = (keep_arguments, *map(keep_input, range(len(text_model.layers) + 1)))
        for module, hook in zip(modules, before):
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        logits = model(**rows.inputs).logits
    ids, positions = rows.inputs["input_ids"], entered["position_ids"]
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    return Trace(layers, logits.float()), positions[-3:].contiguous()


def megatron_trace(
    model: Any, model_args: ModelArgs, parallel: Parallel, rows: Rows, positions: Tensor
) -> Trace:
    """`model` has its towers (`model.towers`, None on later stages), and rows are not cut over
    context-parallel ranks. Complete on every rank.

    Collectives: those of the towers and the forward pass, for each layer an all-gather of its
    sequence shards, and an exchange of the stages' hidden states.
    """
    layers: dict[int, Tensor] = {}
    view = _view(rows, positions, parallel)

    def padded(x: Tensor) -> Tensor:
        """What the packed rows gave, [T, ...] -> [B, S, ...], as transformers has it."""
        whole = x.new_zeros(*rows.real.shape, *x.shape[1:])
        for row, (start, length) in enumerate(zip(view.starts, view.lengths)):
            whole[row, :length] = x[start : start + length]
        return whole

    with ExitStack() as hooks, torch.no_grad():
        for layer in model.decoder.layers:

            def keep(layer: Any, args: tuple[Any, ...], output: Any) -> None:
                layers[layer.layer_number] = parallel.gather_sequence(output[0]).to(
                    "cpu", copy=True
                )

            hooks.callback(layer.register_forward_hook(keep).remove)
        if parallel.is_first_stage:

            def keep_input(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                layers[EMBEDDING] = parallel.gather_sequence(hidden).to("cpu", copy=True)

            first = model.decoder.layers[0]
            hooks.callback(first.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
        features = None
        if rows.media is not None and model.towers is not None:
            features = model.towers.encode(rows.media)
        logits = padded(view_logits(model, model_args, parallel, view, features))
    writes = parallel.is_first_replica and parallel.tp_rank == 0
    of_stages: list[Any] = [None] * parallel.world_size
    torch.distributed.all_gather_object(of_stages, layers if writes else {})
    found = {number: hidden for of_stage in of_stages for number, hidden in of_stage.items()}
    whole = {
        number: padded(found[number][:, 0]).float()
        for number in range(EMBEDDING, model_args.num_layers + 1)
    }
    return Trace(whole, logits)


def _view(rows: Rows, positions: Tensor, parallel: Parallel) -> BatchView:
    """The rows as a batch's view, their media numbered through."""
    views: list[View] = []
    first_token: list[dict[int, int]] = []
    num_media_tokens = 0
    for row, length in enumerate(rows.real.sum(1).tolist()):
        ids = rows.inputs["input_ids"][row, :length].tolist()
        media = rows.is_media[row, :length].nonzero().flatten().tolist()
        first_token.append({0: num_media_tokens})
        num_media_tokens += len(media)
        shown = (MediumPositions(0, media),) if media else ()
        position_ids = positions[:, row, :length].float()
        views.append(View(ids, [IGNORED_LABEL] * length, length, position_ids, shown))
    packing = Packing(0, parallel.sequence_multiple, parallel.row_multiple)
    return pack_views(views, packing, first_token).to(parallel.device)


def compare(
    name: str, ours: Trace, theirs: Trace, real: Tensor, tolerance: float
) -> tuple[str, bool]:
    """A line of the table and whether the logits agree; if they do not, the line names the first
    layer that deviates.
    """
    difference = (ours.logits - theirs.logits)[real].abs().max().item()
    largest = theirs.logits[real].abs().max().item()
    passed = difference <= tolerance  # a NaN does not
    verdict = "ok" if passed else "DIFFERS"
    line = f"  {name:22} {difference:.1e}  (largest logit {largest:.1f})  {verdict}"
    if not passed:
        line += f"; {first_parting(layer_errors(ours, theirs, real))}"
    return line, passed


def layer_errors(ours: Trace, theirs: Trace, real: Tensor) -> dict[int, float]:
    """Layer -> maximum over the tokens of RMS(difference) / RMS(expected); inf if one is NaN."""
    errors = {}
    for number in sorted(theirs.layers):
        expected, found = theirs.layers[number][real], ours.layers[number][real]
        rms = expected.square().mean(-1).sqrt().clamp_min(1e-30)
        error = (found - expected).square().mean(-1).sqrt() / rms
        errors[number] = error.nan_to_num(nan=math.inf).max().item()
    return errors


def first_parting(errors: dict[int, float]) -> str:
    """Names the first layer whose error is above the noise and ten times that of the layer before;
    if there is none, the largest increase.
    """
    names = {number: f"layer {number - 1}" for number in errors} | {
        EMBEDDING: "the embedding or a tower"
    }
    before = dict(zip(errors, [0.0, *errors.values()]))
    for number, error in errors.items():
        if error > NOISE and error > 10 * before[number]:
            return (
                f"first at {names[number]}: a token is off by {error:.1e} of its RMS, "
                f"before it {before[number]:.1e}"
            )
    jump = max(errors, key=lambda number: errors[number] / max(before[number], NOISE / 100))
    largest = (
        f"the largest jump is at {names[jump]}, from {before[jump]:.1e} to {errors[jump]:.1e} "
        "of a token's RMS"
    )
    if max(errors.values()) <= NOISE:
        return f"all layers agree: the final norm or the lm_head ({largest})"
    return f"no layer stands out: {largest}"
