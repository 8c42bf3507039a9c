"""The prompts through the training forward, in chunks of rows, and their keys and values into the
cache.

Rows are padded on the right, as in training: a causal mask hides the padding, and a hook before
each layer's core attention sees the rotated keys. Legend: P prompts, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.data.batch import BatchView, pad_views
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

    def ordered(self, order: Sequence[int]) -> "PromptMedia":
        """Of the prompts in another order: prompt order[i] becomes prompt i."""
        number = torch.empty(len(order), dtype=torch.int64, device=self.prompts.device)
        number[list(order)] = torch.arange(len(order), device=self.prompts.device)
        position_ids = [self.position_ids[index] for index in order]
        return replace(self, position_ids=position_ids, prompts=number[self.prompts])


def chunks_of(lengths: Sequence[int], max_tokens: int, multiple: int) -> list[slice]:
    """Lengths in falling order -> slices of them with at most `max_tokens` tokens when padded to
    the longest, a multiple of `multiple`; a longer prompt is a chunk of its own.
    """
    chunks, start = [], 0
    while start < len(lengths):
        width = -(-lengths[start] // multiple) * multiple
        size = max(1, max_tokens // width)
        chunks.append(slice(start, min(start + size, len(lengths))))
        start += size
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
    multiple = parallel.sequence_multiple
    views = [_view(prompts, media, chunk, pad_token_id, multiple) for chunk in chunks]
    padding = _view([[pad_token_id]], None, slice(0, 1), pad_token_id, multiple)
    padding_calls = num_calls - len(views)
    device_views = [view.to(parallel.device) for view in views + [padding] * padding_calls]
    features = [None if media is None else media.features] * len(views) + [None] * padding_calls
    stored: list[slice | None] = [*chunks, *[None] * padding_calls]
    with _kept_keys(model, cache, stored):
        hidden = last_hidden_states(model, device_views, parallel, features)
    return torch.cat(hidden[: len(views)]) if parallel.is_last_stage and views else None


def _view(
    prompts: Sequence[Sequence[int]],
    media: PromptMedia | None,
    chunk: slice,
    pad_token_id: int,
    multiple: int,
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
    view = pad_views(views, pad_token_id, multiple, [{}] * len(views))
    if media is None:
        return view
    is_here = (media.prompts >= chunk.start) & (media.prompts < chunk.stop)
    rows = (media.prompts[is_here] - chunk.start) * view.input_ids.shape[1]
    return replace(
        view, media_rows=rows + media.offsets[is_here], media_tokens=media.tokens[is_here]
    )


@contextmanager
def _kept_keys(model: Any, cache: KeyValueCache, chunks: Sequence[slice | None]) -> Iterator[None]:
    """Store what every layer's core attention is called with; call number i holds chunk i."""
    handles = []
    for index, layer in enumerate(model.decoder.layers):
        calls = iter(chunks)

        def keep(
            module: Any,
            arguments: tuple[Any, ...],
            index: int = index,
            calls: Iterator[slice | None] = calls,
        ) -> None:
            chunk = next(calls)
            if chunk is not None:
                for side, x in enumerate(arguments[1:3]):  # [S, B, G, D] each
                    cache.prompt[index, side, chunk, :, : len(x)] = x.permute(1, 2, 0, 3)

        attention = layer.self_attention.core_attention
        handles.append(attention.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
