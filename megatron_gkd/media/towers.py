"""The audio tower and the vision tower in front of the decoder: a batch's media -> features, which
features.py puts into the decoder's input.

The modules are transformers' own, on the first pipeline stage only. Their attention crosses neither
windows of an audio nor frames of a video, so media are cut into chunks that are encoded
independently: the ranks that read the same rows (tensor- and context-parallel) encode a share of
the chunks each and an all-gather joins them. M media tokens, H hidden size, D deepstack layers.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from megatron_gkd.families.family import Tower
from megatron_gkd.formats.loading import open_folder
from megatron_gkd.formats.peers import Folder, read_or_end_all, read_with_peers
from megatron_gkd.lora.modules import LoraLinear
from megatron_gkd.media.chunks import (
    DOWNSAMPLING,
    TOKENS_PER_BLOCK,
    Chunk,
    audio_chunks,
    balance,
    by_block_length,
    encoding_order,
    visual_chunks,
)
from megatron_gkd.media.features import MediaFeatures, join_features, split_features
from megatron_gkd.media.medium import Media
from megatron_gkd.model.args import ModelArgs, read_config
from megatron_gkd.model.decoder import check_deepstack
from megatron_gkd.model.tensor_slice import ParameterSlice, TensorSlice
from megatron_gkd.parallel import Parallel, agreed


class Towers(nn.Module):
    """The towers that a run needs, frozen, in evaluation mode; a tower is None if the run has no
    media for it.
    """

    def __init__(
        self,
        parallel: Parallel,
        audio_tower: Any | None,
        visual: Any | None,
        *,
        shares: bool = True,
    ):
        """audio_tower, visual: transformers' modules. shares: each of the ranks that read the same
        rows encodes its share of the media, not all of them (docs/benchmarks/towers.md).
        """
        super().__init__()
        self.parallel = parallel
        self.audio_tower = audio_tower
        self.visual = visual
        self.group = parallel.groups.tp_cp
        self.shares = shares and self.group.size() > 1
        self.dtype = next(self.parameters()).dtype
        self.requires_grad_(False)
        self.eval()

    @property
    def has_lora(self) -> bool:
        """Whether they have LoRA, the student's or the teacher's: features depend on the pass."""
        return any(isinstance(module, LoraLinear) for module in self.modules())

    @property
    def trains(self) -> bool:
        """Whether they have the student's LoRA."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "Towers":
        """Sets the mode of LoRA modules only: the towers stay in evaluation mode."""
        for module in self.modules():
            module.training = mode and isinstance(module, LoraLinear)
        return self

    def encode(self, media: Media | None) -> MediaFeatures | None:
        """The features of a batch's media, each encoded once; None without media.

        All tensor- and context-parallel ranks call it with the same media. With the student's LoRA
        on a tower every rank encodes everything, so that each has the whole gradient. Raises
        ValueError for a medium whose tower was not built. Collectives: if the work is shared, one
        all-gather over these ranks; none for a single chunk.
        """
        if media is None:
            return None
        media = media.to(self.parallel.device)
        chunks = self._chunks(media)
        shared = self.shares and not self.trains and len(chunks) > 1
        shares = balance(chunks, self._work(chunks), self.group.size() if shared else 1)
        encoded = self._encode(media, shares[self.group.rank() if shared else 0])
        return _in_token_order(shares, self._gather(encoded, shares) if shared else [encoded])

    def _chunks(self, media: Media) -> list[Chunk]:
        if len(media.audio_lengths) and self.audio_tower is None:
            raise ValueError("a batch has audio, and the run was built without the audio tower")
        if len(media.grid_thw) and self.visual is None:
            raise ValueError(
                "a batch has images or videos, and the run was built without the vision tower"
            )
        chunks: list[Chunk] = []
        if self.audio_tower is not None:
            chunks += audio_chunks(
                media, self.audio_tower.config.n_window, self.audio_tower.config.n_window_infer
            )
        if self.visual is not None:
            chunks += visual_chunks(media, self.visual.spatial_merge_size)
        return chunks

    def _work(self, chunks: Sequence[Chunk]) -> list[int]:
        """An estimate of each chunk's time: its positions in the tower x the tower's parameters."""
        audio, visual = (
            sum(parameter.numel() for parameter in tower.parameters()) if tower is not None else 0
            for tower in (self.audio_tower, self.visual)
        )
        return [
            chunk.num_tokens * audio if chunk.is_audio else (chunk.stop - chunk.start) * visual
            for chunk in chunks
        ]

    def _encode(self, media: Media, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """The features of some chunks, in `encoding_order`: those of audios [M_audio, H], and those
        of images and videos with deepstack's [1 + D, M_visual, H].
        """
        audio = [chunk for chunk in chunks if chunk.is_audio]
        visual = [chunk for chunk in chunks if not chunk.is_audio]
        features = [self._encode_audio(media, group) for group in by_block_length(audio)]
        embeddings = torch.cat(features) if features else self._empty((0,))
        if not visual:
            return embeddings, self._empty((1 + self.num_deepstack, 0))
        assert self.visual is not None
        patches = torch.cat([media.pixels[chunk.start : chunk.stop] for chunk in visual])
        grids = torch.tensor([(1, *chunk.height_width) for chunk in visual], device=patches.device)
        output = self.visual(patches, grid_thw=grids)
        return embeddings, torch.stack([output.pooler_output, *output.deepstack_features])

    def _encode_audio(self, media: Media, chunks: list[Chunk]) -> Tensor:
        """Chunks of one block length -> [tokens of all, H]. The tower pads blocks to the longest in
        the call, so a silent block is added if no chunk has one of that length.
        """
        assert self.audio_tower is not None
        frames = [media.audio[:, chunk.start : chunk.stop] for chunk in chunks]
        block_length = chunks[0].block_length
        if max(part.shape[1] for part in frames) < block_length:
            frames.append(frames[0].new_zeros(frames[0].shape[0], block_length))
        lengths = torch.tensor([part.shape[1] for part in frames], device=media.audio.device)
        features = self.audio_tower(
            torch.cat(frames, dim=1), feature_lens=lengths
        ).last_hidden_state
        return features[: sum(chunk.num_tokens for chunk in chunks)]

    def _gather(
        self, encoded: tuple[Tensor, Tensor], shares: list[list[Chunk]]
    ) -> list[tuple[Tensor, Tensor]]:
        """What `_encode` returned on each rank of the group. One all-gather, padded to the largest
        share.
        """
        sizes = [
            [
                sum(chunk.num_tokens for chunk in share if chunk.is_audio is is_audio)
                for is_audio in (True, False)
            ]
            for share in shares
        ]
        width, planes = self.hidden_size, 1 + self.num_deepstack
        flat = torch.cat([features.reshape(-1) for features in encoded])
        longest = max(width * (audio + planes * visual) for audio, visual in sizes)
        padded = torch.nn.functional.pad(flat, (0, longest - len(flat)))
        gathered = [torch.empty_like(padded) for _ in shares]
        torch.distributed.all_gather(gathered, padded, group=self.group)
        return [
            (
                part[: audio * width].view(audio, width),
                part[audio * width : (audio + planes * visual) * width].view(planes, visual, width),
            )
            for part, (audio, visual) in zip(gathered, sizes)
        ]

    @property
    def hidden_size(self) -> int:
        """The length of a feature vector: the decoder's hidden size."""
        if self.audio_tower is not None:
            return self.audio_tower.config.output_dim
        assert self.visual is not None
        return self.visual.config.out_hidden_size

    @property
    def num_deepstack(self) -> int:
        """Decoder layers that get features of the vision tower besides those in their input."""
        return 0 if self.visual is None else len(self.visual.deepstack_visual_indexes)

    def _empty(self, size: tuple[int, ...]) -> Tensor:
        return torch.empty(*size, self.hidden_size, dtype=self.dtype, device=self.parallel.device)


def _in_token_order(
    shares: list[list[Chunk]], encoded: list[tuple[Tensor, Tensor]]
) -> MediaFeatures:
    """The features of all shares, in the order of the batch's media tokens."""
    tokens = []
    for is_audio in (True, False):
        found = [
            torch.arange(chunk.first_token, chunk.first_token + chunk.num_tokens)
            for share in shares
            for chunk in encoding_order(share)
            if chunk.is_audio is is_audio
        ]
        tokens.append(torch.cat(found) if found else torch.empty(0, dtype=torch.int64))
    device = encoded[0][0].device
    audio = torch.cat([part for part, _ in encoded])[tokens[0].argsort().to(device)]
    visual = torch.cat([part for _, part in encoded], dim=1)[:, tokens[1].argsort().to(device)]
    if not len(tokens[1]):
        return MediaFeatures(audio, None)
    return MediaFeatures(torch.cat((audio, visual[0])), visual[1:])


class StepMedia:
    """The features of a step's micro-batches, for all passes of the step. Frozen towers encode each
    medium once, when this is built.

    Towers with LoRA encode at every access instead: the features depend on the caller's LoRA
    toggle, training mode and gradients.
    """

    def __init__(self, towers: Towers | None, media: Sequence[Media | None]):
        """media: of each micro-batch. towers: None on later stages and in a run without media.
        Collectives: those of `Towers.encode`.
        """
        self.towers, self.media = towers, media
        self.features: list[MediaFeatures | None] | None = None
        if towers is None or not towers.has_lora:
            with torch.no_grad():
                self.features = [
                    None if towers is None else towers.encode(batch_media) for batch_media in media
                ]

    def regrouped(self, media: Sequence[Media | None]) -> "StepMedia":
        """Of other micro-batches of the same rows. What is encoded is shared; towers with LoRA
        encode at every access, as before.
        """
        other = copy(self)
        other.media = media
        if self.features is not None:
            of_medium: dict[int, MediaFeatures] = {}
            for found, of_batch in zip(self.features, self.media):
                if found is not None and of_batch is not None:
                    of_medium |= zip(map(id, of_batch.items), split_features(found, of_batch.items))
            other.features = [
                None
                if of_batch is None or self.towers is None
                else join_features([of_medium[id(item)] for item in of_batch.items])[0]
                for of_batch in media
            ]
        return other

    def __getitem__(self, index: int) -> MediaFeatures | None:
        """Of micro-batch `index`; None if it has no media, and on later stages."""
        if self.features is not None:
            return self.features[index]
        assert self.towers is not None
        return self.towers.encode(self.media[index])


def build_towers(
    folder: str | Path,
    model_args: ModelArgs,
    parallel: Parallel,
    dtype: torch.dtype,
    *,
    audio: bool,
    visual: bool,
    attn_impl: str = "auto",
    shares: bool = True,
    from_peers: bool = False,
) -> Towers | None:
    """The folder's towers that `audio` and `visual` ask for; None on later pipeline stages and if
    there is none. Collectives: those of `agreed` and `read_or_end_all`; with `from_peers`, where
    each rank of the first stage reads a part of them, those of `read_with_peers`.

    Raises ValueError, the same on every rank: a tensor is missing, unexpected or misshapen (naming
    it), the towers' width is not the decoder's, or the first stage holds too few layers for
    deepstack. OSError where another rank could not build them.
    """
    wanted = {"audio_tower": audio, "visual": visual}
    towers = [tower for tower in model_args.family.towers if wanted[tower.name]]
    if not towers:
        return None
    found = read_config(folder)
    loaded = found.load()
    configs = {tower.name: getattr(loaded, tower.config) for tower in towers}
    for tower in towers:
        size = getattr(configs[tower.name], tower.output_size)
        if size != model_args.hidden_size:
            raise ValueError(
                f"{found.path}: {tower.config}.{tower.output_size} is {size}, "
                f"the decoder's hidden_size {model_args.hidden_size}"
            )
    if audio and math.ceil(2 * configs["audio_tower"].n_window / DOWNSAMPLING) != TOKENS_PER_BLOCK:
        raise ValueError(
            f"{found.path}: audio_config.n_window {configs['audio_tower'].n_window} is not "
            f"supported: {TOKENS_PER_BLOCK} tokens stand for a chunk of 2 n_window frames, "
            f"{DOWNSAMPLING} frames a token"
        )
    if visual:
        num_features = len(configs["visual"].deepstack_visual_indexes)
        check_deepstack(num_features, model_args.num_layers, parallel.pp_size)
    modules: dict[str, Any] = {}

    def opened() -> Folder:
        tensors = open_folder(folder, model_args)
        for name, module in modules.items():
            _check(module, tensors, f"{found.prefix}{name}.")
        return tensors

    where = f"rank {parallel.rank} (on {platform.node()}) cannot build the towers of {folder}: "
    with agreed(parallel.device, where):
        if parallel.is_first_stage:
            modules |= _without_weights(towers, configs, dtype, attn_impl, parallel.device)
    if not modules:
        read_or_end_all([], opened, parallel)
        return None
    built = Towers(parallel, modules.get("audio_tower"), modules.get("visual"), shares=shares)
    parts = [
        ParameterSlice(TensorSlice(f"{found.prefix}{name}.{key}", rows), parameter, rows)
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        for rows in [(slice(0, len(parameter)),)]
    ]
    if from_peers:
        read_with_peers([(parts, parallel.groups.tp_dp_cp)], opened, parallel)
    else:
        read_or_end_all(parts, opened, parallel)
    return built


def _without_weights(
    towers: Sequence[Tower],
    configs: Mapping[str, Any],
    dtype: torch.dtype,
    attn_impl: str,
    device: torch.device,
) -> dict[str, Any]:
    """The modules, by name: every weight is read from the folder later. configs: by name."""
    options = {"dtype": dtype, "attn_implementation": "eager" if attn_impl == "eager" else "sdpa"}
    modules: dict[str, Any] = {}
    with no_init_weights():
        for tower in towers:
            tower_class: Any = tower.load_class()
            module = tower_class._from_config(configs[tower.name], **options)
            modules[tower.name] = module.to(device)
    return modules


def _check(tower: nn.Module, tensors: Folder, prefix: str) -> None:
    """Raise ValueError unless the folder has the tower's parameters under `prefix`, of their
    shapes, and nothing else there. Its buffers are computed, not read.
    """
    parameters = {prefix + name: parameter for name, parameter in tower.named_parameters()}
    computed = {prefix + name for name, _ in tower.named_buffers()}
    found = [name for name in tensors.tensors if name.startswith(prefix)]
    missing = [name for name in parameters if name not in tensors.tensors]
    extra = [name for name in found if name not in parameters and name not in computed]
    for what, names in (("misses", missing), ("has unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{tensors.folder}: the folder {what} tensor {names[0]}{more} "
                "(sizes are those of its config.json)"
            )
    for name, parameter in parameters.items():
        stored = tensors.slice(name)
        if tuple(stored.get_shape()) != tuple(parameter.shape):
            raise ValueError(
                f"{tensors.folder}: tensor {name} has shape {stored.get_shape()}, config.json asks "
                f"for {list(parameter.shape)}"
            )
