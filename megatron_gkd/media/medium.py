"""One audio, image or video: as a row refers to it, its size, and its features as a tower reads
them; and all media of a batch.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_gkd.errors import shortened

KINDS = ("audio", "image", "video")
MAX_PATH = 200  # characters of a path in messages


class Reference(NamedTuple):
    """A medium that has not been read: either the path of its file or its bytes."""

    kind: str
    path: str | None
    data: bytes | None
    is_track: bool = False
    """The audio of a video, whose path or data this is"""

    @property
    def name(self) -> str:
        """For messages: never a long path whole."""
        if not self.path:
            return f"{self.kind} ({len(self.data or b'')} bytes)"
        return f"{self.kind} {shortened(self.path, MAX_PATH)}"

    def file(self) -> io.BytesIO | str:
        """As decoders open it: the bytes, or the path."""
        if self.data is not None:
            return io.BytesIO(self.data)
        assert self.path is not None
        return self.path

    def opened(self) -> BinaryIO:
        """As an open file."""
        file = self.file()
        return open(file, "rb") if isinstance(file, str) else file


class PromptReferences(NamedTuple):
    """The media of a prompt as its row gave them."""

    media: list[Reference]
    """Audios, then images, then videos, each kind in the order of its placeholders"""
    use_audio_in_video: bool
    """Whether the videos' own sound is among the audios (`is_track`), interleaved in the prompt"""


class Size(NamedTuple):
    """How many tokens a medium has; of a video also its grid and the seconds between two patches in
    time.
    """

    num_tokens: int
    grid_thw: tuple[int, int, int] | None = None
    seconds_per_grid: float = 0.0
    note: str = ""
    """What was done to it that its user may want to know, for the data report: `composited on
    white`
    """


@dataclass(frozen=True)
class Medium:
    """One audio, image or video as a tower reads it."""

    kind: str
    """audio, image or video"""
    features: Tensor
    """float32; audio: log-mel [num_mel_bins, frames]; image and video: [patches, values per patch]
    """
    grid_thw: tuple[int, int, int] | None
    """image and video: number of patches in time, height and width"""
    num_tokens: int
    """Placeholder tokens in the text, one per feature vector that the tower computes"""
    seconds_per_grid: float = 0.0
    """video: seconds from one patch to the next in time"""


@dataclass
class Media:
    """The media of a micro-batch, each once, even if both views of its row show it. Their tokens
    are numbered consecutively, those of the audios before those of the images and videos.

    A audios of F frames in all, V images and videos of P patches in all.
    """

    audio: Tensor
    """float32 [num_mel_bins, F]: the frames of all audios, concatenated"""
    audio_lengths: Tensor
    """int64 [A]: frames of each"""
    audio_tokens: Tensor
    """int64 [A]: tokens of each"""
    audio_row_lengths: Tensor
    """int64 [A]: for each audio, frames of the longest one in the same view of its row: in the
    student's view if that shows it, else in the teacher's
    """
    pixels: Tensor
    """float32 [P, values per patch]: the patches of all images and videos, concatenated"""
    grid_thw: Tensor
    """int64 [V, 3]: patches of each in time, height and width"""
    visual_tokens: Tensor
    """int64 [V]: tokens of each"""
    items: list[Medium]
    """What it was made of, in the order of its tokens"""

    @classmethod
    def of(
        cls, media: Sequence[Medium], audio_row_lengths: Sequence[int] | None = None
    ) -> "Media | None":
        """The media of a batch, audios first; None if there are none. audio_row_lengths: None if
        each audio is the only one in its row.
        """
        if not media:
            return None
        audios = [medium for medium in media if medium.kind == "audio"]
        visuals = [medium for medium in media if medium.kind != "audio"]
        assert list(media) == audios + visuals, "audios come first"
        empty = torch.empty(0, 0)
        lengths = [medium.features.shape[1] for medium in audios]
        row_lengths = lengths if audio_row_lengths is None else audio_row_lengths
        grids = [medium.grid_thw for medium in visuals]
        return cls(
            audio=_joined([medium.features for medium in audios], dim=1) if audios else empty,
            audio_lengths=torch.tensor(lengths, dtype=torch.int64),
            audio_tokens=torch.tensor([medium.num_tokens for medium in audios], dtype=torch.int64),
            audio_row_lengths=torch.tensor(row_lengths, dtype=torch.int64),
            pixels=_joined([medium.features for medium in visuals], dim=0) if visuals else empty,
            grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
            visual_tokens=torch.tensor(
                [medium.num_tokens for medium in visuals], dtype=torch.int64
            ),
            items=list(media),
        )

    def to(self, device: str | torch.device) -> "Media":
        """The media with their tensors on `device`; `items` stay where they are."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return Media(**tensors, items=self.items)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """One part is not copied: an hour of sound has 180 MB."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
