"""The audio tower and the vision tower in front of the decoder: a batch's media -> features
(merge.py puts them in).

The modules are transformers' own, on the first pipeline stage only. Their attention crosses neither
a window of an audio nor a frame of a video, so media fall into pieces that are encoded apart from
each other: at TP > 1 each rank encodes its share of the pieces and an all-gather joins them. M
media tokens, H hidden size, D deepstack layers.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from megatron_gkd.formats.loading import open_folder
from megatron_gkd.lora.modules import LoraLinear
from megatron_gkd.media.chunks import (
    DOWNSAMPLING,
    TOKENS_PER_CHUNK,
    Piece,
    audio_pieces,
    by_width,
    deal,
    encoding_order,
    visual_pieces,
)
from megatron_gkd.media.features import MediaFeatures
from megatron_gkd.media.medium import Media
from megatron_gkd.model.args import ModelArgs, read_config
from megatron_gkd.model.decoder import check_deepstack
from megatron_gkd.parallel import Parallel


class Towers(nn.Module):
    """The towers that a run needs, frozen, in evaluation mode; one of them is None where no medium
    is for it.
    """

    def __init__(
        self,
        parallel: Parallel,
        audio_tower: Any | None,
        visual: Any | None,
        *,
        shares: bool = True,
    ):
        """audio_tower, visual: transformers' modules. shares: at TP > 1 each rank encodes its share
        of the media, not all of them (docs/benchmarks/towers.md).
        """
        super().__init__()
        self.parallel = parallel
        self.audio_tower = audio_tower
        self.visual = visual
        self.shares = shares and parallel.tp_size > 1
        self.dtype = next(self.parameters()).dtype
        self.requires_grad_(False)
        self.eval()

    @property
    def has_lora(self) -> bool:
        """Whether they carry LoRA, the student's or the teacher's: features depend on the pass."""
        return any(isinstance(module, LoraLinear) for module in self.modules())

    @property
    def trains(self) -> bool:
        """Whether the student's LoRA is on them."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "Towers":
        """The towers stay in evaluation mode; their LoRA alone has a training mode."""
        for module in self.modules():
            module.training = mode and isinstance(module, LoraLinear)
        return self

    def encode(self, media: Media | None) -> MediaFeatures | None:
        """The features of a batch's media, each encoded once; None without media.

        All tensor-parallel ranks call it with the same media. Collectives: with shares one
        all-gather over them, none for a batch of one piece. With the student's LoRA on the towers
        every rank encodes everything, for the gradient. Raises ValueError for a medium whose tower was not
        built.
        """
        if media is None:
            return None
        pieces = self._pieces(media)
        ranks = self.parallel.tp_size if self.shares and not self.trains and len(pieces) > 1 else 1
        shares = deal(pieces, self._work(pieces), ranks)
        mine = shares[self.parallel.tp_rank if ranks > 1 else 0]
        encoded = [self._encode(media, mine)]
        if ranks > 1:
            encoded = self._gather(encoded[0], shares)
        return _in_order(shares, encoded)

    def _pieces(self, media: Media) -> list[Piece]:
        if len(media.audio_lengths) and self.audio_tower is None:
            raise ValueError("a batch has audio, and the run was built without the audio tower")
        if len(media.grid_thw) and self.visual is None:
            raise ValueError(
                "a batch has images or videos, and the run was built without the vision tower"
            )
        pieces: list[Piece] = []
        if self.audio_tower is not None:
            pieces += audio_pieces(media, self.audio_tower.config)
        if self.visual is not None:
            pieces += visual_pieces(media, self.visual.spatial_merge_size)
        return pieces

    def _work(self, pieces: Sequence[Piece]) -> list[int]:
        """About how long each piece takes: positions in the tower x its parameters."""
        audio, visual = (
            sum(parameter.numel() for parameter in tower.parameters()) if tower is not None else 0
            for tower in (self.audio_tower, self.visual)
        )
        return [
            piece.num_tokens * audio if piece.is_audio else (piece.stop - piece.start) * visual
            for piece in pieces
        ]

    def _encode(self, media: Media, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """-> the pieces' features: audio [M_audio, H], and visual [1 + D, M_visual, H] with the
        deepstack features.
        """
        audio, visual = (
            [piece for piece in pieces if piece.is_audio is kind] for kind in (True, False)
        )
        features = [self._encode_audio(media, list(group)) for group in by_width(audio)]
        embeddings = torch.cat(features) if features else self._empty((0,))
        if not visual:
            return embeddings, self._empty((1 + self.num_deepstack, 0))
        patches = torch.cat([media.pixels[piece.start : piece.stop] for piece in visual])
        grids = torch.tensor([(1, *piece.height_width) for piece in visual], device=patches.device)
        output = self.visual(patches, grid_thw=grids)
        return embeddings, torch.stack([output.pooler_output, *output.deepstack_features])

    def _encode_audio(self, media: Media, pieces: list[Piece]) -> Tensor:
        """Pieces of one width -> [tokens of all, H]. A silent chunk of that width goes along where
        no piece has one.
        """
        frames = [media.audio[:, piece.start : piece.stop] for piece in pieces]
        width = pieces[0].width
        if max(part.shape[1] for part in frames) < width:
            frames.append(frames[0].new_zeros(frames[0].shape[0], width))
        lengths = torch.tensor([part.shape[1] for part in frames], device=media.audio.device)
        features = self.audio_tower(
            torch.cat(frames, dim=1), feature_lens=lengths
        ).last_hidden_state
        return features[: sum(piece.num_tokens for piece in pieces)]

    def _gather(
        self, mine: tuple[Tensor, Tensor], shares: list[list[Piece]]
    ) -> list[tuple[Tensor, Tensor]]:
        """What `_encode` made on each tensor-parallel rank. One all-gather of equal, padded
        lengths.
        """
        sizes = [
            [
                sum(piece.num_tokens for piece in share if piece.is_audio is kind)
                for kind in (True, False)
            ]
            for share in shares
        ]
        width, planes = self.hidden_size, 1 + self.num_deepstack
        flat = torch.cat([part.reshape(-1) for part in mine])
        longest = max(width * (audio + planes * visual) for audio, visual in sizes)
        padded = torch.nn.functional.pad(flat, (0, longest - len(flat)))
        parts = [torch.empty_like(padded) for _ in shares]
        torch.distributed.all_gather(parts, padded, group=self.parallel.groups.tp)
        return [
            (
                part[: audio * width].view(audio, width),
                part[audio * width : (audio + planes * visual) * width].view(planes, visual, width),
            )
            for part, (audio, visual) in zip(parts, sizes)
        ]

    @property
    def hidden_size(self) -> int:
        """Numbers of a feature: the decoder's hidden size."""
        return (
            self.visual.config.out_hidden_size
            if self.audio_tower is None
            else self.audio_tower.config.output_dim
        )

    @property
    def num_deepstack(self) -> int:
        """Decoder layers that read features of the vision tower besides the embeddings."""
        return 0 if self.visual is None else len(self.visual.deepstack_visual_indexes)

    def _empty(self, size: tuple[int, ...]) -> Tensor:
        return torch.empty(*size, self.hidden_size, dtype=self.dtype, device=self.parallel.device)


def _in_order(shares: list[list[Piece]], encoded: list[tuple[Tensor, Tensor]]) -> MediaFeatures:
    """The features of all shares, in the order of the tokens."""
    tokens = []
    for kind in (True, False):
        found = [
            torch.arange(piece.first_token, piece.first_token + piece.num_tokens)
            for share in shares
            for piece in encoding_order(share)
            if piece.is_audio is kind
        ]
        tokens.append(torch.cat(found) if found else torch.empty(0, dtype=torch.int64))
    device = encoded[0][0].device
    audio = torch.cat([part for part, _ in encoded])[tokens[0].argsort().to(device)]
    visual = torch.cat([part for _, part in encoded], dim=1)[:, tokens[1].argsort().to(device)]
    if not len(tokens[1]):
        return MediaFeatures(audio, None)
    return MediaFeatures(torch.cat((audio, visual[0])), visual[1:])


class StepMedia:
    """The features of a step's micro-batches, for all of its passes: frozen towers encode each
    medium once, here.

    Towers with LoRA encode whenever a pass asks, as the pass has set toggle, mode and gradients.
    """

    def __init__(self, towers: Towers | None, media: Sequence[Media | None]):
        """towers: None on stages without them and in a run without media. Collectives: those of
        `Towers.encode`.
        """
        self.towers, self.media = towers, media
        self.features: list[MediaFeatures | None] | None = None
        if towers is None or not towers.has_lora:
            with torch.no_grad():
                self.features = [
                    None if towers is None else towers.encode(of_batch) for of_batch in media
                ]

    def __getitem__(self, index: int) -> MediaFeatures | None:
        """Of micro-batch `index`; None where it has none, and on later stages."""
        return (
            self.towers.encode(self.media[index]) if self.features is None else self.features[index]
        )


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
) -> Towers | None:
    """The folder's towers, those asked for; None on later pipeline stages and where none is. No
    collectives.

    Raises ValueError, the same on every rank: a tensor is missing, unexpected or misshapen (by its
    name), the towers' width is not the decoder's, or the first stage holds too few layers for
    deepstack.
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
    if audio and math.ceil(2 * configs["audio_tower"].n_window / DOWNSAMPLING) != TOKENS_PER_CHUNK:
        raise ValueError(
            f"{found.path}: audio_config.n_window {configs['audio_tower'].n_window} is not "
            f"supported: {TOKENS_PER_CHUNK} tokens stand for a chunk of 2 n_window frames, "
            f"{DOWNSAMPLING} frames a token"
        )
    if visual:
        num_features = len(configs["visual"].deepstack_visual_indexes)
        check_deepstack(num_features, model_args.num_layers, parallel.pp_size)
    if not parallel.is_first_stage:
        return None
    options = {"dtype": dtype, "attn_implementation": "eager" if attn_impl == "eager" else "sdpa"}
    with no_init_weights():  # every weight is read from the folder
        modules = {
            tower.name: tower.load_class()._from_config(configs[tower.name], **options)
            for tower in towers
        }
    built = Towers(parallel, modules.get("audio_tower"), modules.get("visual"), shares=shares)
    tensors = open_folder(folder, model_args)
    for name, module in modules.items():
        _load(module, tensors, f"{found.prefix}{name}.")
    return built.to(parallel.device)


def _load(tower: nn.Module, tensors, prefix: str) -> None:
    """Fill a tower's parameters from the folder's tensors under `prefix`, cast to their dtype.
    Buffers are computed.
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
                f"{tensors.folder}: the folder {what} tensor {names[0]}{more} (sizes are those of its config.json)"
            )
    for name, parameter in parameters.items():
        stored = tensors.slice(name)
        if tuple(stored.get_shape()) != tuple(parameter.shape):
            raise ValueError(
                f"{tensors.folder}: tensor {name} has shape {stored.get_shape()}, config.json asks for "
                f"{list(parameter.shape)}"
            )
        parameter.data.copy_(stored[(slice(None),)])
