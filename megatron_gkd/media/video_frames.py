"""Frames of a video -> what the vision tower reads: which ones, their size, their patches.

The steps and numbers are those of transformers' Qwen2VLVideoProcessor, which is Qwen3-Omni's and
cannot be imported without torchvision. tests/test_media_video_frames.py compares with it, bit by
bit, where torchvision is installed. Legend: T frames, H, W pixels in height and width, P patches.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.media.video_file import Scan

# Pixels of a frame, which Qwen3-Omni's processor sets whatever the folder's files say.
MIN_PIXELS = 128 * 32 * 32
MAX_PIXELS = 768 * 32 * 32

# Settings of the video processor that have one value here. None: not set.
_FIXED: dict[str, tuple[Any, ...]] = {
    "video_processor_type": (None, "Qwen2VLVideoProcessor"),
    "do_resize": (None, True),
    "do_rescale": (None, True),
    "do_normalize": (None, True),
    "resample": (None, 3),  # bicubic
    "num_frames": (None,),
    "cap_pixels_per_frame": (None, False),
}


@dataclass(frozen=True)
class VideoSettings:
    """The folder's settings for videos, under transformers' names and with its defaults."""

    fps: float = 1.0
    """Frames to take of a second: 1 is the rate by which the model's positions count"""
    min_frames: int = 4
    max_frames: int = 768
    patch_size: int = 14
    """Pixels of a patch in height and width"""
    temporal_patch_size: int = 2
    """Frames of a patch"""
    merge_size: int = 2
    """Patches of a token in height and width"""
    rescale_factor: float = 1 / 255
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def read(cls, folder: str) -> "VideoSettings":
        """Raises OSError if the folder has no processor files, ValueError for a setting that is
        not supported.
        """
        from transformers.video_processing_utils import VideoProcessorMixin

        found, _ = VideoProcessorMixin.get_video_processor_dict(folder, local_files_only=True)
        for name, allowed in _FIXED.items():
            if found.get(name) not in allowed:
                raise ValueError(
                    f"videos are read with {name} {allowed[-1]}, the folder says {found[name]!r}"
                )
        names = [field.name for field in fields(cls)]
        return cls(**{name: found[name] for name in names if found.get(name) is not None})

    @property
    def seconds_per_grid(self) -> float:
        """Seconds from one patch to the next in time."""
        return self.temporal_patch_size / self.fps


def choose_frames(num_frames: int, fps: float, settings: VideoSettings) -> list[int]:
    """The frames that are taken of a video of `num_frames`, ascending. Raises ValueError if it has
    fewer than a patch.

    transformers' rounding asks for one frame more, beyond the end, of about 0.5 % of lengths (such
    as 59 frames of which 58 are wanted) and then fails; here those have the frames that exist.
    """
    step = settings.temporal_patch_size
    if num_frames < step:
        raise ValueError(f"{num_frames} frame(s), a video needs at least {step}")
    most = math.floor(min(settings.max_frames, num_frames) / step) * step
    wanted = min(max(num_frames / fps * settings.fps, settings.min_frames), most, num_frames)
    count = math.floor(wanted / step) * step
    return torch.arange(0, num_frames, num_frames / count).int().tolist()[:count]


class FramePlan(NamedTuple):
    """What is taken of a video."""

    times: list[int]
    """Of the frames that are taken, ascending, as in `Scan`"""
    size: tuple[int, int]
    """(height, width) in pixels to which they are resized"""
    grid_thw: tuple[int, int, int]
    """Patches in time, height and width"""
    num_tokens: int


def plan_frames(video: Scan, settings: VideoSettings) -> FramePlan:
    """Raises ValueError for a video that is too short, or too long in one direction."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    chosen = choose_frames(len(video.times), video.fps, settings)
    factor = settings.patch_size * settings.merge_size
    height, width = smart_resize(
        video.height, video.width, factor=factor, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
    )
    grid_thw = (
        math.ceil(len(chosen) / settings.temporal_patch_size),
        height // settings.patch_size,
        width // settings.patch_size,
    )
    num_tokens = math.prod(grid_thw) // settings.merge_size**2
    return FramePlan(
        [video.times[index] for index in chosen], (height, width), grid_thw, num_tokens
    )


def to_patches(frames: Iterable[np.ndarray], plan: FramePlan, settings: VideoSettings) -> Tensor:
    """The planned frames, uint8 [H, W, 3] each -> float32 [P, values of a patch], the patches of a
    token one after the other. Each frame is resized when it comes.
    """
    video = torch.stack([_resize(frame, plan.size) for frame in frames])  # [T, 3, H, W]
    if missing := -len(video) % settings.temporal_patch_size:
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
    # rescaling is folded into mean and deviation, as in transformers: the last bit is the same
    scale = 1.0 / settings.rescale_factor
    mean, std = (
        (torch.tensor(list(values)) * scale).view(3, 1, 1)
        for values in (settings.image_mean, settings.image_std)
    )
    normal = video.float().sub_(mean).div_(std)
    time, height, width = plan.grid_thw
    patch, merge = settings.patch_size, settings.merge_size
    tokens = (height // merge, merge, patch, width // merge, merge, patch)
    parts = normal.view(time, settings.temporal_patch_size, 3, *tokens)
    parts = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return parts.reshape(time * height * width, -1)


def _resize(frame: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 [3, *size]. What torchvision does to frames on CPU: bicubic, antialiased, in
    integers.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))
    if pixels.shape[1:] == size:
        return pixels
    return torch.nn.functional.interpolate(
        pixels[None], size=size, mode="bicubic", align_corners=False, antialias=True
    )[0]
