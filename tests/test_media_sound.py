"""Sound that libsndfile cannot read goes through FFmpeg: formats of telephones and browsers, the
sound of a video file; where PyAV is missing the row says what to do.
"""

import sys

import numpy as np
import pytest
import soundfile

from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from tests.test_media_processor import build_model
from tests.video_files import pictures, tone, write_video

SECONDS, RATE = 1.2, 48_000
CODECS = {
    "a.m4a": "aac",
    "a.aac": "aac",
    "a.mp4": "aac",
    "a.webm": "libopus",
    "a.mka": "ac3",
    "a.mp3": "libmp3lame",  # this and the next are libsndfile's
    "a.opus": "libopus",
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return MediaProcessor(build_model(tmp_path_factory.mktemp("model")))


def audio(path):
    return Reference("audio", str(path), None)


def spoken(seconds=SECONDS):
    """A tone with a pause of 0.4 s after 0.4 s."""
    sound = tone(seconds, RATE)
    sound[round(0.4 * RATE) : round(0.8 * RATE)] = 0
    return sound


def write(path, seconds=SECONDS, codec="aac", **options):
    sound = spoken(seconds)
    return write_video(path, None, sound=sound, rate=RATE, sound_codec=codec, **options)


@pytest.mark.parametrize("name", CODECS)
def test_formats_sound_like_what_was_written(processor, tmp_path, name):
    path = write(tmp_path / name, codec=CODECS[name])
    soundfile.write(tmp_path / "whole.flac", spoken(), RATE)
    in_bytes = Reference("audio", None, path.read_bytes())
    medium, whole = processor.load(audio(path)), processor.load(audio(tmp_path / "whole.flac"))
    # encoders add some milliseconds at either end
    assert 0 <= medium.features.shape[1] - whole.features.shape[1] <= 5
    for frames in (slice(10, 35), slice(85, 110)):
        error = medium.features[:, frames] - whole.features[:, frames]
        assert error.abs().mean() < 0.15 and whole.features[:, frames].std() > 0.3
    pause = medium.features[:, 48:75].mean()
    assert pause < medium.features[:, 10:35].mean() - 0.2
    assert processor.measure(audio(path)).num_tokens == medium.num_tokens
    assert processor.measure(in_bytes).num_tokens == medium.num_tokens


def test_the_shortest_sound(processor, tmp_path):
    soundfile.write(tmp_path / "a.wav", spoken()[:201], 16_000)
    medium = processor.load(audio(tmp_path / "a.wav"))
    assert medium.features.shape[1] == 1 and medium.num_tokens == 1
    assert processor.measure(audio(tmp_path / "a.wav")).num_tokens == 1


def test_a_name_says_nothing(processor, tmp_path):
    """`.raw` neither, which is bare samples to soundfile."""
    soundfile.write(tmp_path / "a.wav", spoken(), RATE)
    write(tmp_path / "a.m4a")
    for kind in ("wav", "m4a"):
        given = tmp_path / f"a.{kind}"
        whole = processor.load(audio(given)).features
        for name in ("b.raw", "b.png", "b"):
            (tmp_path / name).write_bytes(given.read_bytes())
            assert processor.measure(audio(tmp_path / name)) == processor.measure(audio(given))
            error = processor.load(audio(tmp_path / name)).features - whole
            assert error.abs().max() < 1e-4, (kind, name)


def test_a_stream_whose_header_has_no_length(processor, tmp_path):
    """As `ffmpeg ... -f flac - > a.flac` writes them."""
    soundfile.write(tmp_path / "a.flac", spoken(), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # the number of samples: the last 36 bits before the MD5
    content[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(content)
    assert soundfile.info(tmp_path / "stream.flac").frames == 2**63 - 1
    whole = processor.load(audio(tmp_path / "a.flac"))
    stream = processor.load(audio(tmp_path / "stream.flac"))
    assert (stream.features - whole.features).abs().max() < 1e-4
    assert processor.measure(audio(tmp_path / "stream.flac")).num_tokens == whole.num_tokens


def test_the_sound_of_a_video_file_is_an_audio(processor, tmp_path):
    frames = pictures(12, 64, 64)
    video = dict(codec="libx264", pix_fmt="yuv420p", rate=RATE, sound_codec="aac")
    path = write_video(tmp_path / "v.mp4", frames, sound=tone(SECONDS, RATE), **video)
    found = processor.load(audio(path)).features
    track = processor.load(audio(path)._replace(is_track=True)).features
    assert np.array_equal(found, track)


def test_sound_that_neither_reads(processor, tmp_path):
    whole = write(tmp_path / "a.m4a", 5.0, container={"movflags": "faststart"}).read_bytes()
    files = {
        "cut.m4a": (whole[: len(whole) // 2], "damaged or cut short: a part of its audio"),
        "list.m3u8": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "Invalid data found"),
        "hello.wav": (b"hello", "not one of libsndfile's formats; FFmpeg: Invalid data found"),
    }
    silent = write_video(tmp_path / "v.mp4", pictures(4, 64, 64), codec="mpeg4", pix_fmt="yuv420p")
    files["silent.mp4"] = silent.read_bytes(), "FFmpeg: it has no sound"
    with pytest.raises(RowError, match="v.mp4: .* cannot be read .it has no sound.*`audios` gives"):
        processor.measure(audio(silent)._replace(is_track=True))
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RowError, match=f"{name}: cannot be read .*{reason}"):
            processor.measure(audio(tmp_path / name))


def test_without_pyav_the_way_out_is_named(processor, tmp_path, monkeypatch):
    path = write(tmp_path / "a.m4a")
    soundfile.write(tmp_path / "a.wav", tone(SECONDS, RATE), RATE)
    monkeypatch.setitem(sys.modules, "av", None)
    reason = rf"a.m4a: not one of .*pip install 'av>=17.1,<20', or .*: ffmpeg -i {path} NEW_FILE"
    with pytest.raises(RowError, match=reason):
        processor.measure(audio(path))
    with pytest.raises(RowError, match="a.m4a: cannot be read without PyAV .*: pip install"):
        processor.measure(Reference("video", str(path), None))
    assert processor.measure(audio(tmp_path / "a.wav")).num_tokens > 0
