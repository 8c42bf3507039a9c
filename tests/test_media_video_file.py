"""Frames and sound of video files as they were written, and files that are refused."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from megatron_gkd.media.video_file import read_frames, scan, sound_blocks
from tests.test_media_processor import build_model
from tests.video_files import pictures, tone, write_video

FRAMES = pictures(12, 48, 80)
LOSSLESS = {
    "png.mov": dict(),
    "ffv1.mkv": dict(codec="ffv1", pix_fmt="bgr0"),
    "x264.mp4": dict(codec="libx264rgb", crf="0", bf="2"),  # frames stored in another order
    "raw.avi": dict(codec="rawvideo", pix_fmt="bgr24"),
}


def read(path, numbers=None):
    """(the scan, the frames of these numbers or all)."""
    with open(path, "rb") as file:
        found = scan(file, lambda height, width: None)
    times = [found.times[number] for number in numbers] if numbers else found.times
    with open(path, "rb") as file:
        return found, np.stack(list(read_frames(file, times)))


@pytest.mark.parametrize("name", LOSSLESS)
def test_frames_are_those_that_were_written(tmp_path, name):
    path = write_video(tmp_path / name, FRAMES, **LOSSLESS[name])
    found, frames = read(path)
    assert (len(found.times), found.fps, found.height, found.width) == (12, 5.0, 48, 80)
    assert np.array_equal(frames, FRAMES)
    assert np.array_equal(read(path, [2, 3, 11])[1], FRAMES[[2, 3, 11]])


@pytest.mark.parametrize(
    "name, more",
    [
        ("h264.mp4", dict(codec="libx264", pix_fmt="yuv420p", bf="2")),
        ("vp9.webm", dict(codec="libvpx-vp9", pix_fmt="yuv420p")),
        ("mpeg4.avi", dict(codec="mpeg4", pix_fmt="yuv420p", b="4000000")),
        ("stream.ts", dict(codec="libx264", pix_fmt="yuv420p")),
        ("ten_bits.mkv", dict(codec="ffv1", pix_fmt="yuv444p10le")),
    ],
)
def test_codecs_with_losses(tmp_path, name, more):
    frames = pictures(30, 64, 96)
    frames[..., 2] = 128  # no edges of colour
    path = write_video(tmp_path / name, frames, fps=Fraction(30_000, 1001), **more)
    found, decoded = read(path)
    assert len(found.times) == 30 and found.fps == pytest.approx(30_000 / 1001, rel=0.01)
    error = np.abs(decoded.astype(int) - frames)
    assert error.mean() < 6


def test_frames_at_uneven_times(tmp_path):
    path = write_video(
        tmp_path / "v.mkv", FRAMES[:4], times=[0, 1, 10, 39], codec="ffv1", pix_fmt="bgr0"
    )
    found, frames = read(path)
    assert np.array_equal(frames, FRAMES[:4])
    assert found.fps == pytest.approx(4 / 8, rel=0.02)  # 39 / 5 s and the last frame's own


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_telephones_frames_are_upright(tmp_path, turns):
    """The header says by which matrix a frame is turned before it is shown."""
    path = write_video(tmp_path / "v.mov", FRAMES)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    assert struct.unpack(">9i", content[start : start + 36])[:2] == (1 << 16, 0)
    sine, cosine = round(np.sin(turns * np.pi / 2)) << 16, round(np.cos(turns * np.pi / 2)) << 16
    matrix = (cosine, -sine, 0, sine, cosine, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    found, frames = read(path)
    expected = np.rot90(FRAMES, turns, axes=(1, 2))
    assert (found.height, found.width) == expected.shape[1:3]
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 22_050), (2, 48_000)])
@pytest.mark.parametrize("name", ["png.mov", "ffv1.mkv", "raw.avi"])
def test_sound_is_what_was_written(tmp_path, name, channels, rate):
    written = tone(1.3, rate, channels)
    path = write_video(tmp_path / name, FRAMES, sound=written, rate=rate, **LOSSLESS[name])
    with open(path, "rb") as file:
        blocks, (found, *_) = zip(*sound_blocks(file))
    samples = np.concatenate(blocks)
    assert found == rate and samples.dtype == np.float32
    assert np.array_equal(samples, (written / 32768).astype(np.float32))


@pytest.mark.parametrize(
    "name, codec, rate",
    [("v.mp4", "aac", 44_100), ("v.webm", "libopus", 48_000), ("v.ts", "mp2", 32_000)],
)
def test_compressed_sound(tmp_path, name, codec, rate):
    video = dict(codec="libvpx-vp9" if name == "v.webm" else "libx264", pix_fmt="yuv420p")
    written = tone(2.0, rate)
    path = write_video(
        tmp_path / name, FRAMES, sound=written, rate=rate, sound_codec=codec, **video
    )
    with open(path, "rb") as file:
        blocks, (found, *_) = zip(*sound_blocks(file))
    samples = np.concatenate(blocks)
    assert found == rate and len(samples) == pytest.approx(2 * rate, rel=0.05)
    loud = np.abs(np.fft.rfft(samples[rate // 2 : rate // 2 + rate], axis=0)).argmax(axis=0)
    assert loud.tolist() == [440, 660]  # Hz


# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return MediaProcessor(build_model(tmp_path_factory.mktemp("media")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two seconds with sound. Of an MP4 file whose header comes first every part can be lost."""
    folder = tmp_path_factory.mktemp("whole")
    h264 = dict(codec="libx264", pix_fmt="yuv420p", sound_codec="aac", sound=tone(2.4, 44_100))
    write_video(folder / "late.mp4", FRAMES, **h264)
    write_video(folder / "early.mp4", FRAMES, container={"movflags": "faststart"}, **h264)
    write_video(folder / "v.mkv", FRAMES, codec="ffv1", pix_fmt="bgr0")
    write_video(folder / "silent.mov", FRAMES)
    write_video(folder / "sound.mov", None, sound=tone(1.0, 16_000), rate=16_000)
    write_video(folder / "still.mov", FRAMES[:1])
    return folder


def refused(processor, path, *, is_track=False) -> str:
    """The reason, the same from the preparation of the rows and from the workers."""
    reference = Reference("audio" if is_track else "video", str(path), None, is_track)
    with pytest.raises(RowError) as first:
        processor.measure(reference)
    with pytest.raises(RowError) as second:
        processor.load(reference)
    assert str(first.value) == str(second.value)
    assert str(path) in str(first.value) and "\n" not in str(first.value)
    return str(first.value)


@pytest.mark.parametrize(
    "name, keep, reason",
    [
        ("late.mp4", 0.0, "the file is empty"),
        ("late.mp4", 0.5, "cannot be read (Invalid data found when processing input)"),
        ("early.mp4", 0.6, "cannot be read (it is damaged or cut short: a part of its "),
        ("v.mkv", 0.5, "cannot be read (it ends at "),
        ("sound.mov", 1.0, "cannot be read (it has no frames)"),
        ("still.mov", 1.0, "cannot be read (1 frame(s), a video needs at least 2)"),
    ],
)
def test_a_video_is_refused(processor, whole, tmp_path, name, keep, reason):
    content = (whole / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * keep)])
    assert reason in refused(processor, path)


def test_what_is_no_video_is_refused(processor, whole, tmp_path):
    (tmp_path / "text.mp4").write_text("hello" * 100)
    soundfile.write(tmp_path / "sound.wav", np.zeros(1000), 16_000)
    assert "there is no such file" in refused(processor, tmp_path / "none.mp4")
    assert "cannot be read (Invalid data" in refused(processor, tmp_path / "text.mp4")
    assert "cannot be read (it has no frames)" in refused(processor, tmp_path / "sound.wav")
    silent = refused(processor, whole / "silent.mov", is_track=True)
    assert "audio" in silent and "cannot be read (it has no sound)" in silent


def test_a_damaged_frame_is_refused_when_it_is_decoded(processor, whole, tmp_path):
    content = bytearray((whole / "late.mp4").read_bytes())
    start = content.index(b"mdat") + 8
    content[start + 600 : start + 3000] = bytes(2400)
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(RowError, match=r"v.mp4: cannot be read \("):
        processor.load(Reference("video", str(tmp_path / "v.mp4"), None))


def test_a_playlist_opens_no_other_file(processor, whole, tmp_path):
    """FFmpeg would read the file that this one names."""
    path = tmp_path / "list.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {whole / 'late.mp4'}\n")
    assert "cannot be read (Operation not permitted)" in refused(processor, path)
    path.write_text("#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    assert "cannot be read (" in refused(processor, path)


def test_frames_that_are_missing_or_change_are_refused(tmp_path):
    path = write_video(tmp_path / "v.mov", FRAMES)
    with open(path, "rb") as file:
        with pytest.raises(ValueError, match=r"the frame at [\d.]+ s cannot be decoded"):
            list(read_frames(file, [0, 1_000_000]))
    jpeg = dict(codec="mjpeg", pix_fmt="yuvj420p")
    for name, frames in (("small", FRAMES), ("large", pictures(12, 64, 96))):
        write_video(tmp_path / f"{name}.mjpeg", frames, **jpeg)
    joined = (tmp_path / "small.mjpeg").read_bytes() + (tmp_path / "large.mjpeg").read_bytes()
    (tmp_path / "v.mjpeg").write_bytes(joined)
    with pytest.raises(ValueError, match=r"its frames change from 80 x 48 to 96 x 64 pixels"):
        read(tmp_path / "v.mjpeg")


def test_titles_in_another_encoding_do_no_harm(tmp_path):
    path = tmp_path / "v.mkv"
    write_video(path, FRAMES, codec="ffv1", pix_fmt="bgr0", title="A title")
    content = path.read_bytes()
    assert content.count(b"A title") == 1
    path.write_bytes(content.replace(b"A title", "Ein Äöü".encode("latin-1")))
    assert np.array_equal(read(path)[1], FRAMES)
