"""Video files written with PyAV, whose frames and sound are known: the codecs keep every bit unless
a test asks for others.
"""

import importlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from megatron_gkd.media.video_frames import MAX_PIXELS, MIN_PIXELS


def is_importable(*names: str) -> bool:
    """PyPI's torchvision is installed and fails beside a torch that it was not compiled for."""
    try:
        for name in names:
            importlib.import_module(name)
    except Exception:
        return False
    return True


HAS_TORCHVISION = is_importable("torchvision")
NO_TORCHVISION = "compares with torchvision, which cannot be imported here"
HAS_TORCHCODEC = HAS_TORCHVISION and is_importable("torchcodec.decoders")
NO_TORCHCODEC = "compares with torchvision and torchcodec, which cannot be imported here"


def pictures(num_frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: colours that run, and a chessboard that moves over them."""
    frame, y, x = np.mgrid[0:num_frames, 0:height, 0:width]
    planes = (
        (255 * x / max(width - 1, 1) + 31 * frame) % 256,
        (255 * y / max(height - 1, 1) + 17 * frame) % 256,
        20 + 200 * ((x // 8 + y // 8 + frame) % 2),
    )
    return np.stack(planes, axis=-1).astype(np.uint8)


def tone(seconds: float, rate: int, channels: int = 2) -> np.ndarray:
    """int16 [samples, channels], another pitch in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * (440 + 220 * channel) * time) for channel in range(channels)]
    return (8000 * np.stack(waves, axis=1)).astype(np.int16)


def write_video(
    path: Path,
    frames: np.ndarray | None,
    *,
    fps: Fraction | int = 5,
    codec: str = "png",
    pix_fmt: str = "rgb24",
    times: list[int] | None = None,
    sound: np.ndarray | None = None,
    rate: int = 44_100,
    sound_codec: str = "pcm_s16le",
    container: dict[str, str] | None = None,
    title: str = "",
    **options: str,
) -> Path:
    """frames [T, H, W, 3], sound [samples, channels]. times: of the frames, in 1 / fps seconds;
    None: one after the other. options: the codec's.
    """
    with av.open(path, "w", options=container or {}) as file:
        file.metadata["title"] = title
        if frames is not None:
            video = file.add_stream(codec, rate=fps, options=options)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pix_fmt
        if sound is not None:  # all streams are there before the first packet
            layout = {1: "mono", 2: "stereo"}[sound.shape[1]]
            track = file.add_stream(sound_codec, rate=rate, layout=layout)
        if frames is not None:
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = times[number] if times else number, 1 / Fraction(fps)
                file.mux(video.encode(frame))
            file.mux(video.encode(None))
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(sound.reshape(1, -1), format="s16", layout=layout)
            samples.sample_rate = rate
            file.mux(track.encode(samples))
            file.mux(track.encode(None))
    return path


class FrameByFrame:
    """Stands in for transformers' video processor where torchvision is missing: its image processor
    makes the patches of each frame, and two frames in turn are put together.
    """

    temporal_patch_size = 2

    def __init__(self, image_processor):
        self.images, self.merge_size = image_processor, image_processor.merge_size

    def __call__(self, videos, **settings):
        """videos: one, uint8 [T, H, W, 3], the frames that are taken."""
        (frames,) = videos
        limits = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
        made = [
            self.images(images=[Image.fromarray(frame)], size=limits, return_tensors="pt")
            for frame in frames
        ]
        # the image processor shows a picture twice: [P, 3, 2, pixels of a patch]
        first = [part["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0] for part in made]
        pairs = [torch.stack(pair, dim=2).flatten(1) for pair in zip(first[::2], first[1::2])]
        grid = [[len(pairs), *made[0]["image_grid_thw"][0].tolist()[1:]]]
        return {
            "pixel_values_videos": torch.cat(pairs),
            "video_grid_thw": torch.tensor(grid),
        }
