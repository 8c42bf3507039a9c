"""A video file, read with PyAV: when its frames are shown, some of them as pixels, its sound.

Files are open binary files, never names: FFmpeg opens nothing itself, neither URLs nor the files
that a playlist names. All functions raise ValueError for a file that is damaged, cut short or
lacks what is asked for. H, W: pixels of a frame in height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

_HEADERS_WITH_LENGTH = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_MOST_FRAMES = 10_000_000  # 46 hours of 60 a second
_CUT_SECONDS = 0.5  # containers disagree with their streams by less


@dataclass(frozen=True)
class Scan:
    """What a video's packets tell without decoding more than its first frame."""

    times: list[int]
    """Of all frames, in the order in which they are shown; units of the stream's time base"""
    fps: float
    """Mean over the whole video"""
    height: int
    """Of the upright frame"""
    width: int


def scan(file: BinaryIO, check_size: Callable[[int, int], None]) -> Scan:
    """Reads all packets: headers may lack the number of frames. check_size: called with the height
    and width that the header gives, before a frame is decoded, and with those of the first one; it
    raises for frames that are too large.
    """
    with _open(file) as container:
        stream = _best(container, "video", "frames")
        check_size(stream.codec_context.height, stream.codec_context.width)
        times: list[int] = []
        ends: list[int] = []
        first, seconds = None, 0.0
        for packet in _packets(container):
            time = _time(packet)
            if time is not None:
                end = time + (packet.duration or 0)
                seconds = max(seconds, float(end * packet.time_base))
                if packet.stream is stream and not packet.is_discard:
                    if len(times) == _MOST_FRAMES:
                        raise ValueError(f"it has more than {_MOST_FRAMES} frames: cut it")
                    times.append(time)
                    ends.append(end)
            if packet.stream is stream and first is None:
                first = next(iter(packet.decode()), None)
        if first is None or not times:
            raise ValueError("no frame of it can be decoded")
        check_size(first.height, first.width)
        times.sort()
        base = stream.time_base
        # torchcodec's expression: a rounding error more would change the number of sampled frames
        length = max(ends) * base.numerator / base.denominator
        length -= times[0] * base.numerator / base.denominator
        if length <= 0:
            raise ValueError("its frames have no duration")
        fps = len(times) / length
        if container.duration is not None:
            _check_whole(container, container.duration / 1e6, seconds, slack=2 / fps)
        height, width = first.height, first.width
        if _quarter_turns(first) % 2:
            height, width = width, height
        return Scan(times, fps, height, width)


def read_frames(file: BinaryIO, times: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames of these times, ascending: uint8 RGB [H, W, 3], upright."""
    with _open(file) as container:
        stream = _best(container, "video", "frames")
        stream.thread_type = "AUTO"
        converter, found = None, 0
        for packet in _packets(container, stream):
            for frame in packet.decode():
                if _time(frame) != times[found]:
                    continue
                if frame.is_corrupt:
                    raise ValueError(f"the frame at {_seconds(stream, times[found])} s is damaged")
                converter = converter or _Converter(stream)
                pixels = np.rot90(converter.rgb(frame), _quarter_turns(frame))
                while found < len(times) and times[found] == _time(frame):
                    found += 1
                    yield pixels
                if found == len(times):
                    return
        raise ValueError(f"the frame at {_seconds(stream, times[found])} s cannot be decoded")


def sound_blocks(file: BinaryIO) -> Iterator[tuple[np.ndarray, int]]:
    """(float32 [samples, channels], their rate in Hz) of the sound, one block after the other,
    without regard to when it begins in the video.
    """
    import av

    with _open(file) as container:
        stream = _best(container, "audio", "sound")
        resampler = av.AudioResampler(format="fltp")  # the format alone: rate and channels stay
        frames = (frame for packet in _packets(container, stream) for frame in packet.decode())
        length, rate = 0, None
        for frame in chain(frames, [None]):
            if frame is None and rate is None:
                break
            for part in resampler.resample(frame):
                rate = part.sample_rate  # of HE-AAC twice what the header says
                length += part.samples
                yield part.to_ndarray().T, rate
        if rate is None:
            raise ValueError("its sound is empty")
        if stream.duration is not None:
            _check_whole(container, float(stream.duration * stream.time_base), length / rate)


@contextmanager
def _open(file: BinaryIO) -> Iterator[Any]:
    """PyAV's container; its errors become ValueErrors."""
    import av

    try:
        options = {"protocol_whitelist": "none"}
        # titles may be in any encoding
        with av.open(file, options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(error.strerror) from error
    except IndexError as error:  # PyAV's, for a stream that its header does not name
        raise ValueError("it has other streams than its header says") from error


def _best(container: Any, kind: str, title: str) -> Any:
    """The stream of this kind that FFmpeg prefers."""
    stream = container.streams.best(kind)
    if stream is None:
        raise ValueError(f"it has no {title}")
    return stream


def _packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of these or all streams, at the end an empty one of each that flushes its
    decoder.
    """
    for packet in container.demux(*streams):
        if packet.is_corrupt:
            raise ValueError(f"it is damaged or cut short: a part of its {packet.stream.type}")
        yield packet


def _time(part: Any) -> int | None:
    """Of a packet or frame; AVI has only the times of decoding."""
    return part.dts if part.pts is None else part.pts


def _seconds(stream: Any, time: int) -> str:
    return f"{float(time * stream.time_base):.2f}"


def _check_whole(container: Any, stated: float, seconds: float, slack: float = 0.0) -> None:
    """stated: the length in seconds that the header gives; seconds: where the last packet ends."""
    if container.format.name not in _HEADERS_WITH_LENGTH:
        return
    if stated - seconds > max(_CUT_SECONDS, slack):
        raise ValueError(
            f"it ends at {seconds:.2f} s where its header says {stated:.2f} s: is it cut short?"
        )


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, that make a frame upright (telephones store how they were held)."""
    return round(frame.rotation / 90)


class _Converter:
    """Frames in the stream's format -> RGB, by the filter that torchcodec uses. `reformat` places
    the colours of frames of 10 bits differently.
    """

    def __init__(self, stream: Any):
        import av

        self.graph = av.filter.Graph()
        self.source = self.graph.add_buffer(template=stream)
        rgb, sink = self.graph.add("format", "pix_fmts=rgb24"), self.graph.add("buffersink")
        self.source.link_to(rgb)
        rgb.link_to(sink)
        self.graph.configure()
        self.size = stream.codec_context.height, stream.codec_context.width

    def rgb(self, frame: Any) -> np.ndarray:
        """uint8 [H, W, 3]."""
        if (frame.height, frame.width) != self.size:
            raise ValueError(
                f"its frames change from {self.size[1]} x {self.size[0]} to "
                f"{frame.width} x {frame.height} pixels"
            )
        self.source.push(frame)
        return self.graph.pull().to_ndarray()
