"""Media made to take memory or to hang: refused by their headers, or where decoding passes
--max_media_bytes, and never with more memory than that.
"""

import io
import os
import struct
import subprocess
import sys
import wave
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_gkd.data import DataError
from megatron_gkd.data.row_encoding import row_encoding
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.errors import RowError
from megatron_gkd.media import video_file
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from tests.test_media_processor import ANSWER, build_model, load
from tests.video_files import write_video

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


def flac(claimed: int, rate: int = 16_000, samples: int = 4096) -> bytes:
    """A file of `samples` samples whose header says `claimed`, at most 2^36 - 1."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples), rate, format="FLAC")
    data = bytearray(file.getvalue())
    # STREAMINFO: 20 bits of rate, 3 of channels, 5 of depth, 36 of the number of samples
    word = int.from_bytes(data[18:26], "big") >> 36 << 36 | claimed
    data[18:26] = word.to_bytes(8, "big")
    return bytes(data)


def png(width: int, height: int) -> bytes:
    """The header of a picture, without its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def wav(rate: int, channels: int = 1, frames: int = 4000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(bytes(2 * channels * frames))
    return file.getvalue()


def ogg(seconds: int) -> bytes:
    file = io.BytesIO()
    second = np.zeros(8000, np.float32)
    with soundfile.SoundFile(file, "w", 8000, 1, format="OGG") as out:
        for _ in range(seconds):  # all at once overflows the encoder's stack
            out.write(second)
    return file.getvalue()


def mka(folder, seconds: int) -> bytes:
    """Sound that libsndfile does not know and FFmpeg does."""
    import av

    path = folder / "long.m4a"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000 * seconds), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path.read_bytes()


TOO_LARGE = r"takes \d+ bytes or more once it is decoded, --max_media_bytes is 1048576: cut it"


@pytest.mark.parametrize(
    "kind, content, reason",
    [
        pytest.param("audio", lambda folder: flac(2**36 - 1), TOO_LARGE, id="flac's claim"),
        pytest.param("audio", lambda folder: flac(2**18 + 1), TOO_LARGE, id="a sample too many"),
        pytest.param("audio", lambda folder: ogg(60), TOO_LARGE, id="ogg, counted"),
        pytest.param("audio", lambda folder: mka(folder, 60), TOO_LARGE, id="m4a, counted"),
        pytest.param("audio", lambda folder: wav(16_000, 256), TOO_LARGE, id="channels"),
        pytest.param("audio", lambda folder: wav(1_000, 1, 20_000), TOO_LARGE, id="resampled"),
        pytest.param(
            "audio", lambda folder: wav(999), "a sampling rate of 999 Hz, from 1000 to", id="slow"
        ),
        pytest.param(
            "audio", lambda folder: wav(2**31 - 1), "a sampling rate of 2147483647 Hz", id="fast"
        ),
        pytest.param("image", lambda folder: png(1000, 1000), TOO_LARGE, id="png's claim"),
        pytest.param(
            "image", lambda folder: png(2**31 - 1, 2**31 - 1), "cannot be read", id="png of 2^62"
        ),
    ],
)
def test_what_is_too_large_is_refused(model, tmp_path, kind, content, reason):
    processor = MediaProcessor(model, max_bytes=MIB)
    reference = Reference(kind, None, content(tmp_path))
    for read in (processor.measure, processor.load):
        with pytest.raises(RowError, match=reason):
            read(reference)


def test_the_limit_is_reached_and_not_passed(model):
    """2^18 samples of 4 bytes are 1 MiB."""
    at_limit = Reference("audio", None, flac(2**18, samples=2**18))
    assert MediaProcessor(model, max_bytes=MIB).load(at_limit).features.shape[1] == 2**18 // 160
    with pytest.raises(RowError, match="takes 1048576 bytes .* is 1048575"):
        MediaProcessor(model, max_bytes=MIB - 1).load(at_limit)


def test_frames_of_a_video_have_the_limit_too(model, tmp_path, monkeypatch):
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    path = write_video(tmp_path / "v.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    reference = Reference("video", str(path), None)
    size = MediaProcessor(model, max_bytes=64 * 64 * 3).measure(reference)
    assert size == MediaProcessor(model).measure(reference)
    with monkeypatch.context() as patch:
        patch.setattr(video_file, "_MOST_FRAMES", 3)
        with pytest.raises(RowError, match="more than 3 frames"):
            MediaProcessor(model).measure(reference)
    monkeypatch.setattr(video_file, "_packets", None)  # nothing is read but the header
    with pytest.raises(RowError, match="takes 12288 bytes .* is 12287"):
        MediaProcessor(model, max_bytes=64 * 64 * 3 - 1).measure(reference)


_MEASURED = """
import resource, sys
from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
model, *files = sys.argv[1:]
processor = MediaProcessor(model, max_bytes=16 * 2**20)
def read(path):
    try:
        processor.load(Reference("image" if path.endswith("png") else "audio", path, None))
    except RowError as error:
        return str(error)
read(files[0])  # imports
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
errors = [read(path) for path in files[1:]]
is_large = ["--max_media_bytes" in (error or "") for error in errors]
assert is_large == [True, False, True, True, True], errors
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_hostile_files_take_little_memory(model, tmp_path):
    """The peak of a process over what a second of sound takes, at a limit of 16 MiB: headers claim
    275 GB and 432 MB, ogg and m4a hold 128 MB at the rate of the processor.
    """
    Image.new("RGB", (12_000, 12_000)).save(tmp_path / "large.png")
    files = {
        "good.flac": flac(16_000, samples=16_000),
        "claim.flac": flac(2**36 - 1),
        "below_claim.flac": flac(4 * MIB - 1),  # no more than the limit: what is there is read
        "long.ogg": ogg(2000),
        "long.m4a": mka(tmp_path, 2000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    names = [*files, "large.png"]
    found = subprocess.run(
        [sys.executable, "-c", _MEASURED, model, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 64 * MIB


def test_a_row_that_is_too_long_is_not_decoded(model, tmp_path, monkeypatch):
    """Also with --check_data true; and its tokens are not written out."""
    (tmp_path / "long.flac").write_bytes(flac(100 * 16_000))
    monkeypatch.setattr(MediaProcessor, "load", None)
    turns = [{"role": "user", "content": "<audio>?"}, ANSWER]
    with pytest.raises(DataError, match="long.flac: has 1300 tokens and leaves no room for a resp"):
        load(
            model,
            tmp_path,
            {"messages": turns, "audios": ["long.flac"]},
            check_data=True,
            max_length=1000,
        )


def test_a_pipe_as_system_is_not_opened(model, tmp_path):
    """It would wait for a writer for ever."""
    os.mkfifo(tmp_path / "system.txt")
    data = DataConfig(dataset=["rows.jsonl"], system=str(tmp_path / "system.txt"))
    with pytest.raises(DataError, match="--system .*system.txt: a folder, pipe, socket or device"):
        row_encoding(data, model, 1024)
