"""The towers' features in the decoder's input: they replace the embeddings of the media tokens.

M media tokens of a batch, audios' first, then those of images and videos (V); D decoder layers that
read deepstack features, H hidden size, S positions that this rank's tensor-parallel group reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.media.medium import Medium
from megatron_gkd.parallel import Parallel


@dataclass(frozen=True)
class MediaFeatures:
    """The towers' output for a batch's media, in the order of `Media`'s tokens and in the decoder's
    dtype.
    """

    embeddings: Tensor
    """[M, H]"""
    deepstack: Tensor | None
    """[D, V, H], for the last V of the M tokens; None without images and videos"""

    @property
    def num_audio_tokens(self) -> int:
        return len(self.embeddings) - (0 if self.deepstack is None else self.deepstack.shape[1])


def join_features(parts: Sequence[MediaFeatures]) -> tuple[MediaFeatures, list[Tensor]]:
    """The features of several batches as those of one, and for each batch int64 [M]: number of a
    token in it -> number in the joined features.
    """
    audio = [part.embeddings[: part.num_audio_tokens] for part in parts]
    visual = [part.embeddings[part.num_audio_tokens :] for part in parts]
    deepstack = [part.deepstack for part in parts if part.deepstack is not None]
    whole = MediaFeatures(
        torch.cat(audio + visual), torch.cat(deepstack, dim=1) if deepstack else None
    )
    numbers = torch.arange(len(whole.embeddings), device=whole.embeddings.device).split(
        list(map(len, audio + visual))
    )
    return whole, [torch.cat(pair) for pair in zip(numbers[: len(parts)], numbers[len(parts) :])]


def split_features(features: MediaFeatures, media: Sequence[Medium]) -> list[MediaFeatures]:
    """The features of each medium. media: in the order of their tokens, audios first."""
    parts, first = [], 0
    for medium in media:
        end, deepstack = first + medium.num_tokens, None
        if medium.kind != "audio" and features.deepstack is not None:
            visual = slice(first - features.num_audio_tokens, end - features.num_audio_tokens)
            deepstack = features.deepstack[:, visual]
        parts.append(MediaFeatures(features.embeddings[first:end], deepstack))
        first = end
    return parts


def media_arguments(
    decoder: Any,
    parallel: Parallel,
    input_ids: Tensor,
    position_ids: Tensor,
    media_rows: Tensor,
    media_tokens: Tensor,
    features: MediaFeatures,
) -> dict[str, Any]:
    """Further arguments for the forward of `decoder` (GPTModel) on the first stage: its input with
    the features, and the deepstack features.

    input_ids [1, S], position_ids [3, 1, S]; media_rows int64 [M']: the position of each media
    token in them, media_tokens int64 [M']: its number among the features. Only tokens in this
    rank's shard of the sequence count. Collectives: those of the embedding.
    """
    embedded = decoder.embedding(input_ids=input_ids, position_ids=position_ids)  # [S/TP, 1, H]
    length = input_ids.shape[1]
    positions = parallel.shard_sequence(torch.arange(length, device=input_ids.device))  # [S/TP]
    local_index = torch.full((length,), -1, device=input_ids.device)  # -1: on another rank
    local_index[positions] = torch.arange(len(positions), device=input_ids.device)
    index = local_index[media_rows]  # [M']
    is_local = index >= 0
    index, tokens = index[is_local], media_tokens[is_local]
    arguments: dict[str, Any] = {
        "decoder_input": embedded.index_copy(0, index, features.embeddings[tokens][:, None])
    }
    if features.deepstack is not None and len(features.deepstack):
        visual = tokens - features.num_audio_tokens
        context = {
            "context": features.deepstack[:, visual[visual >= 0]],
            "context_mask": index[visual >= 0],
        }
        arguments["extra_block_kwargs"] = context
    return arguments
