"""The prompts through the training forward, in chunks of rows, and their keys and values into the
cache.

Rows lie one behind the other, as in training, and a hook before each layer's core attention sees
the rotated keys. Legend: P prompts, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.batch import BatchView, Packing, pack_views
from megatron_gkd.data.sample import View
from megatron_gkd.forward import last_hidden_states
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.media.features import MediaFeatures
from megatron_gkd.parallel import Parallel
from megatron_gkd.rollout.cache import KeyValueCache


@dataclass(frozen=True)
class PromptMedia:
    """The media of P prompts as the decoder takes them. M media tokens in all prompts."""

    position_ids: Sequence[Tensor]
    """float32 [3, length] of each prompt; those of its response count on from the last"""
    prompts: Tensor
    """int64 [M]: the prompt of each media token"""
    offsets: Tensor
    """int64 [M]: its index in that prompt"""
    tokens: Tensor
    """int64 [M]: its index among the features' tokens"""
    features: MediaFeatures | None
    """None on later pipeline stages"""

    def of(self, indices: Sequence[int]) -> "PromptMedia | None":
        """Of some of the prompts, or of all in another order: prompt indices[i] becomes prompt i.
        None where they show none.
        """
        number = torch.full((len(self.position_ids),), -1, device=self.prompts.device)
        number[list(indices)] = torch.arange(len(indices), device=self.prompts.device)
        is_kept = number[self.prompts] >= 0
        if not is_kept.any():
            return None
        return PromptMedia(
            [self.position_ids[index] for index in indices],
            number[self.prompts][is_kept],
            self.offsets[is_kept],
            self.tokens[is_kept],
            self.features,
        )


def chunks_of(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Lengths in falling order -> slices of them with at most `max_tokens` tokens; a longer prompt
    is a chunk of its own.
    """
    chunks, start = [], 0
    while start < len(lengths):
        end, total = start + 1, lengths[start]
        while end < len(lengths) and total + lengths[end] <= max_tokens:
            total += lengths[end]
            end += 1
        chunks.append(slice(start, end))
        start = end
    return chunks


def prefill(
    model: Any,
    parallel: Parallel,
    prompts: Sequence[Sequence[int]],
    media: PromptMedia | None,
    cache: KeyValueCache,
    chunks: Sequence[slice],
    *,
    num_calls: int,
    pad_token_id: int,
) -> Tensor | None:
    """The prompts, in the cache's order -> on the last stage their last positions' hidden states
    [P, H], None on others.

    num_calls: of the forward, at least one a chunk, the same on ranks that share experts: what is
    left over runs a padding row. Collectives: those of the forward.
    """
    packing = Packing(pad_token_id, parallel.sequence_multiple)
    views = [_view(prompts, media, chunk, packing) for chunk in chunks]
    padding = _view([[pad_token_id]], None, slice(0, 1), packing)
    padding_calls = num_calls - len(views)
    device_views = [view.to(parallel.device) for view in views + [padding] * padding_calls]
    features = [None if media is None else media.features] * len(views) + [None] * padding_calls
    places = [_Places.of(view, chunk) for view, chunk in zip(device_views, chunks)]
    with _kept_keys(model, cache, [*places, *[None] * padding_calls]):
        hidden = last_hidden_states(model, device_views, parallel, features)
    return torch.cat(hidden[: len(views)]) if parallel.is_last_stage and views else None


def _view(
    prompts: Sequence[Sequence[int]], media: PromptMedia | None, chunk: slice, packing: Packing
) -> BatchView:
    numbers = range(len(prompts))[chunk]
    views = [
        View(
            list(prompts[number]),
            [IGNORED_LABEL] * len(prompts[number]),
            len(prompts[number]),
            None if media is None else media.position_ids[number].cpu(),
        )
        for number in numbers
    ]
    view = pack_views(views, packing)
    if media is None:
        return view
    is_here = (media.prompts >= chunk.start) & (media.prompts < chunk.stop)
    starts = torch.tensor(view.starts, device=is_here.device)
    rows = starts[media.prompts[is_here] - chunk.start]
    return replace(
        view, media_rows=rows + media.offsets[is_here], media_tokens=media.tokens[is_here]
    )


class _Places(NamedTuple):
    """Of each token of a chunk: its position in the packed sequence, its prompt in the cache and
    its index in that prompt.
    """

    positions: Tensor
    prompts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, view: BatchView, chunk: slice) -> "_Places":
        device = view.input_ids.device
        lengths = torch.tensor(view.lengths)
        offsets = torch.cat([torch.arange(length) for length in view.lengths])
        starts = torch.tensor(view.starts[:-1]).repeat_interleave(lengths)
        prompts = torch.arange(chunk.start, chunk.stop).repeat_interleave(lengths)
        return cls((starts + offsets).to(device), prompts.to(device), offsets.to(device))


@contextmanager
def _kept_keys(
    model: Any, cache: KeyValueCache, places: Sequence[_Places | None]
) -> Iterator[None]:
    """Store what every layer's core attention is called with; call number i holds the tokens of
    places[i].
    """
    handles = []
    for index, layer in enumerate(model.decoder.layers):
        calls = iter(places)

        def keep(
            module: Any,
            arguments: tuple[Any, ...],
            index: int = index,
            calls: Iterator[_Places | None] = calls,
        ) -> None:
            of_call = next(calls)
            if of_call is not None:
                for side, x in enumerate(arguments[1:3]):  # [T, 1, G, D] each
                    rows = cache.prompt[index, side]  # [P, G, width, D]
                    rows[of_call.prompts, :, of_call.offsets] = x[of_call.positions, 0]

        attention = layer.self_attention.core_attention
        handles.append(attention.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
