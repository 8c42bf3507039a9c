"""One audio, image or video: as a row refers to it, its size, and as a tower reads it."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.errors import RowError, shown

KINDS = ("audio", "image", "video")


class Reference(NamedTuple):
    """A medium that has not been read: the path of a file, or its bytes."""

    kind: str
    path: str | None
    data: bytes | None
    is_track: bool = False
    """The audio of a video: path or data are the video's."""

    @property
    def name(self) -> str:
        """For messages."""
        return (
            f"{self.kind} {self.path}"
            if self.path
            else f"{self.kind} ({len(self.data or b'')} bytes)"
        )


class PromptReferences(NamedTuple):
    """The media of a prompt as its row gave them."""

    media: list[Reference]
    """Audios, then images, then videos, each kind in the order of its placeholders"""
    use_audio_in_video: bool
    """Whether the videos' own sound is among the audios (`is_track`), interleaved in the prompt"""


def read_reference(value: Any, kind: str, folder: str, where: str) -> Reference:
    """A path (relative to `folder`, that of the data file), bytes, or what `datasets` stores: an
    object with bytes and path, with array and sampling_rate, or the nested list of an image's
    pixels. Arrays become bytes, losslessly.

    Raises RowError naming `where`.
    """
    if isinstance(value, dict):
        if value.get("array") is not None:
            return Reference(kind, None, _sound_bytes(value, where))
        data, path = value.get("bytes"), value.get("path") or value.get("url")
        value = data if data else path
    if isinstance(value, (bytes, bytearray)):
        return Reference(kind, None, bytes(value))
    if isinstance(value, str) and value.strip():
        if value.startswith(("http://", "https://", "data:")):
            raise RowError(
                f"{where} is {shown(value)}: media are files here, nothing is fetched; download it first"
            )
        return Reference(
            kind, os.path.normpath(os.path.join(folder, value.removeprefix("file://"))), None
        )
    if isinstance(value, list) and value and kind == "image":
        return Reference(kind, None, _picture_bytes(value, where))
    raise RowError(f"{where} must be a path, bytes or an array, got {shown(value)}")


def _sound_bytes(value: dict, where: str) -> bytes:
    import soundfile

    rate = value.get("sampling_rate")
    try:
        samples = np.asarray(value["array"], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RowError(f"{where}.array is not an array of numbers: {error}") from None
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # [channels, samples], as torch's decoders give it
    if not isinstance(rate, int) or rate < 1 or samples.ndim not in (1, 2):
        raise RowError(
            f"{where} must have an array of samples and a sampling_rate in Hz, got a rate of {shown(rate)}"
        )
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _picture_bytes(value: list, where: str) -> bytes:
    from PIL import Image

    try:
        pixels = np.asarray(value)
        if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError("pixels are whole numbers from 0 to 255")
        image = Image.fromarray(pixels.astype(np.uint8))
    except (TypeError, ValueError) as error:
        raise RowError(
            f"{where} is not the pixels [height][width][3] of an image: {error}"
        ) from None
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Size(NamedTuple):
    """Of a medium: its tokens; of a video also its grid and the seconds of a step in time."""

    num_tokens: int
    grid_thw: tuple[int, int, int] | None = None
    seconds_per_grid: float = 0.0


@dataclass(frozen=True)
class Medium:
    """One audio, image or video as a tower reads it."""

    kind: str
    """audio, image or video"""
    features: Tensor
    """float32: audio [num_mel_bins, frames], log-mel; image and video [patches, numbers of a patch]
    """
    grid_thw: tuple[int, int, int] | None
    """image and video: patches in time, height and width"""
    num_tokens: int
    """Its placeholders in the text: what the tower makes of it."""
    seconds_per_grid: float = 0.0
    """video: seconds from one patch to the next in time"""


@dataclass
class Media:
    """The media of a micro-batch, each once, whichever of its rows and views show it. Their tokens
    are counted through: those of the audios, then those of the images and videos.
    """

    audio: Tensor
    """float32 [num_mel_bins, F]: the frames of all audios side by side"""
    audio_lengths: Tensor
    """int64 [A]: frames of each"""
    audio_tokens: Tensor
    """int64 [A]: tokens of each"""
    audio_row_lengths: Tensor
    """int64 [A]: frames of the longest audio in each one's row, in the student's view where that
    shows it
    """
    pixels: Tensor
    """float32 [P, numbers of a patch]: the patches of all images and videos one below the other"""
    grid_thw: Tensor
    """int64 [V, 3]: patches of each in time, height and width"""
    visual_tokens: Tensor
    """int64 [V]: tokens of each"""

    @classmethod
    def of(
        cls, media: Sequence[Medium], audio_row_lengths: Sequence[int] | None = None
    ) -> Optional["Media"]:
        """None where there is none. Audios come first. audio_row_lengths: by default each audio is
        alone in its row.
        """
        audios = [medium for medium in media if medium.kind == "audio"]
        visuals = [medium for medium in media if medium.kind != "audio"]
        if not media:
            return None
        assert list(media) == audios + visuals, "audios come first"
        lengths = [medium.features.shape[1] for medium in audios]
        return cls(
            torch.cat([medium.features for medium in audios], dim=1)
            if audios
            else torch.empty(0, 0),
            torch.tensor(lengths, dtype=torch.int64),
            torch.tensor([medium.num_tokens for medium in audios], dtype=torch.int64),
            torch.tensor(
                lengths if audio_row_lengths is None else audio_row_lengths, dtype=torch.int64
            ),
            torch.cat([medium.features for medium in visuals]) if visuals else torch.empty(0, 0),
            torch.tensor([medium.grid_thw for medium in visuals], dtype=torch.int64).reshape(-1, 3),
            torch.tensor([medium.num_tokens for medium in visuals], dtype=torch.int64),
        )

    def to(self, device: str | torch.device) -> "Media":
        return Media(**{name: tensor.to(device) for name, tensor in vars(self).items()})
