"""A medium as a row gives it: every spelling of the same file is the same reference, and what is
refused says so in a line that holds no medium.
"""

import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_gkd.data.rows import check_row
from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import Reference

ANSWER = {"role": "assistant", "content": "ok"}
TEXT = {"type": "text", "text": "what?"}


def png(size=(9, 7)):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()


def in_column(value, folder="/data", kind="image", **columns):
    columns = columns or {f"{kind}s": [value]}
    row = {"messages": [{"role": "user", "content": f"<{kind}>what?"}, ANSWER]} | columns
    (reference,) = check_row(row, 10, str(folder)).media[kind]
    return reference


def in_part(*parts, kind="image", folder="/data", **columns):
    row = {"messages": [{"role": "user", "content": [*parts, TEXT]}, ANSWER]} | columns
    checked = check_row(row, 10, str(folder))
    assert checked.messages[0]["content"] == [{"type": kind}, TEXT]
    (reference,) = checked.media[kind]
    return reference


BYTES = [
    BASE64,
    base64.encodebytes(PNG).decode(),  # in lines
    base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    f"data:image/png;base64,{BASE64}",
    f" \ndata:image/png;base64,{BASE64}",
    f"DATA:;charset=utf-8;Base64,{BASE64.replace('+', '%2B').replace('=', '%3D')}",
    PNG,
    bytearray(PNG),
    {"bytes": PNG, "path": "elsewhere.png"},
    {"bytes": BASE64, "path": None},
    {"bytes": list(PNG)},
    {"data": f"data:image/png;base64,{BASE64}", "format": "png"},
    {"url": f"data:image/png;base64,{BASE64}"},
]


@pytest.mark.parametrize("value", BYTES)
def test_bytes_in_a_row(value):
    expected = Reference("image", None, PNG)
    assert in_column(value) == expected
    assert in_part({"type": "image", "image": value}) == expected


def test_bytes_may_be_short_where_nothing_else_can_stand():
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    assert in_part(sound, kind="audio") == Reference("audio", None, b"RIFF")
    assert in_part({"type": "image", "base64": "iVBORw"}) == Reference("image", None, b"\x89PNG")


def test_a_file_that_exists_wins_over_base64(tmp_path):
    name = "ab" * 60
    assert in_column(name, tmp_path) == Reference("image", None, base64.b64decode(name))
    (tmp_path / name).write_bytes(b"")
    assert in_column(name, tmp_path) == Reference("image", str(tmp_path / name), None)


def test_paths(tmp_path):
    (tmp_path / "a%20b.png").write_bytes(b"")
    paths = {
        "a.png": "/data/a.png",
        "../a.png": "/a.png",
        "/x/a": "/x/a",
        "file:///x/a.png": "/x/a.png",
        "FILE://localhost/x/a.png": "/x/a.png",
        "file:/x/a.png": "/x/a.png",  # as Java writes them
        "file:///x/a%20b.png": "/x/a b.png",
        f"file://{tmp_path}/a%20b.png": f"{tmp_path}/a%20b.png",
        "c:\\a.png": "/data/c:\\a.png",
    }
    for value, path in paths.items():
        for given in (value, {"path": value}, {"url": value}, {"bytes": None, "path": value}):
            assert in_column(given) == Reference("image", path, None)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "text": None, "max_pixels": None},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "a.png", "cache_control": {"type": "ephemeral"}},
        {"type": "image", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png", "detail": "auto"},
        {"type": None, "image_url": {"url": "a.png"}},
        {"image": "file:///data/a.png"},
        {"type": "image", "image": "a.png", "text": "", "path": "", "data": []},
        {"type": "image", "image": "a.png", "index": 7},  # a number of its own: it has its medium
    ],
)
def test_parts_in_other_spellings(part):
    assert in_part(part) == Reference("image", "/data/a.png", None)
    for kind in ("audio", "video"):
        renamed = {
            key.replace("image", kind): value.replace("image", kind)
            if key == "type" and value
            else value
            for key, value in part.items()
        }
        assert in_part(renamed, kind=kind) == Reference(kind, "/data/a.png", None)


def test_parts_whose_medium_stands_in_a_column():
    columns = dict(images=["a.png"])
    assert in_part({"type": "image_url"}, **columns) == Reference("image", "/data/a.png", None)
    spoken = [{"type": "input_text", "text": "hi"}, {"type": "output_text", "text": "!"}]
    row = {"messages": [{"role": "user", "content": spoken}, ANSWER]}
    assert check_row(row, 10).messages[0]["content"] == "hi!"


def test_singular_columns_are_read_like_their_plurals():
    expected = in_column("a.png")
    for value in ("a.png", ["a.png"], {"bytes": None, "path": "a.png"}):
        assert in_column(None, image=value) == expected
        assert in_column(None, image=value, images=[]) == expected
        assert in_column(None, image=[], images=value) == expected
        assert in_column(None, images=value, image="") == expected
        row = {"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "image": "b.png"}
        assert check_row(row | {"teacher_image": value}, 10, "/data").teacher_media["image"] == [
            expected
        ]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).tolist()
    assert in_column(None, image=pixels) == in_column(None, images=[pixels])
    row = {"messages": [{"role": "user", "content": "hi"}, ANSWER], "image": "", "audio": None}
    assert not check_row(row, 10).has_media


def test_an_index_is_that_of_the_next_medium():
    """As llava-instruct-mix-vsft has them, and TRL reads them."""
    images = [{"type": "image", "index": number, "text": None} for number in (0, 1)]
    columns = dict(images=["a.png", "b.png"])

    def read(*parts):
        row = {"messages": [{"role": "user", "content": [*parts]}, ANSWER]} | columns
        return [reference.path for reference in check_row(row, 10, "/data").media["image"]]

    assert read(*images, TEXT | {"index": None}) == ["/data/a.png", "/data/b.png"]
    with pytest.raises(RowError, match=r"content\[0\] has index 1 and is image 0 of the view"):
        read(*images[::-1])


def test_tags_in_text_parts_are_placeholders_too():
    tagged = {"type": "text", "text": "<image>what?"}
    row = {"messages": [{"role": "user", "content": [tagged]}, ANSWER], "images": ["a.png"]}
    checked = check_row(row, 10, "/data")
    assert checked.messages[0]["content"] == [{"type": "image"}, TEXT]
    del row["images"]
    checked = check_row(row, 10, "/data")
    assert checked.messages[0]["content"] == "<image>what?" and checked.tags_as_text == 1


def samples_of(reference):
    samples, rate = soundfile.read(io.BytesIO(reference.data))
    return samples.tolist(), rate


def test_samples_of_sound():
    wave = [0.5, -0.25, 0.0]
    for given in (
        {"array": wave, "sampling_rate": 8000, "path": "a.wav"},
        {"array": wave, "sampling_rate": 8000.0},  # of a column that lacks it in other rows
    ):
        assert samples_of(in_column(given, kind="audio")) == (wave, 8000)
    both = in_column({"array": [wave, wave[::-1]], "sampling_rate": 8000}, kind="audio")
    assert samples_of(both) == ([list(pair) for pair in zip(wave, wave[::-1])], 8000)
    silent = in_column({"array": [0, 0, 1], "sampling_rate": 8000}, kind="audio")
    assert samples_of(silent) == ([0.0, 0.0, 1.0], 8000)


LONG = "A" * 400_001
REFUSED = [
    *(
        (url, "nothing is fetched; download it first")
        for url in ("s3://b/x.png", "oss://b/x", "HTTP://a/x", "gs://x", "hf://x", "ftp://" + LONG)
    ),
    ({"data": "https://a/x.png"}, "nothing is fetched; download it, and give its path"),
    (LONG, "images[0] is not base64 ("),
    (LONG[:-2] + "*", "is neither a path (names have at most 255 bytes) nor base64: 400000 char"),
    ("a\0b.png", "is neither a path"),
    (f"data:image/png;base64,{LONG}", "images[0] is not base64 ("),
    ("data:image/png;base64,", "images[0] holds no byte"),
    ("data:image/png," + LONG, "of data URIs those in base64 are read"),
    ("data:" + LONG, "of data URIs those in base64 are read"),
    ({"bytes": "no base64!" + LONG}, "images[0] is not base64 ("),
    ({"bytes": [1, 2, 300] * 100_000}, "images[0] must hold bytes or base64, got a list ["),
    ({"bytes": None, "path": None}, "is an object without bytes, data, path, url or array"),
    ({LONG: 1}, "is an object without bytes, data, path, url or array"),
    ({"path": LONG[1:] + ".png"}, "is neither a path"),
    ({"path": "a.png", "max_pixels": 9}, "images[0] has `max_pixels`: the size of images is set"),
    (b"", "images[0] must be a path, bytes, base64 or an array, got b''"),
    ([[["x" * 100_000]]], "images[0] is a list and not the pixels [height][width][3] of an image"),
    ({"array": ["x" * 100_000]}, "images[0].array is not an array of numbers"),
    (["a.png", "b.png"], "images[0] is a list and not the pixels [height][width][3] of an image"),
    ({"array": [0.5], "sampling_rate": 2**31}, "got the shape [1] and 2147483648"),
    ({"array": [0.5], "sampling_rate": 44100.5}, "got the shape [1] and 44100.5"),
    ({"array": [[[0.5]]], "sampling_rate": 8000}, "got the shape [1, 1, 1] and 8000"),
    ({"array": np.zeros((1026, 1025)).tolist(), "sampling_rate": 8}, "have up to 1024 channels"),
    (
        {"array": [-32768, 5], "sampling_rate": 8},
        "images[0].array holds whole numbers to 32768: sa",
    ),
    ({"path": "a.wav", "offset": 1.5}, "images[0] has `offset`: media are read whole"),
]


@pytest.mark.parametrize("value, reason", REFUSED)
def test_values_that_are_refused_in_a_short_line(value, reason):
    with pytest.raises(RowError) as error:
        in_column(value)
    assert reason in str(error.value)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, reason",
    [
        ({"type": "image", "max_pixels": 50176}, "`max_pixels`: the size of images is set for all"),
        ({"type": "image_url", "resized_height": 28}, "preprocessor_config.json (`min_pixels`, `m"),
        ({"type": "video", "total_pixels": 1}, "128 to 768 tokens a frame"),
        ({"type": "video", "video_max_pixels": 1}, "`video_max_pixels`: the size of a video's fra"),
        ({"type": "video", "fps": 2.0}, "video_preprocessor_config.json or else preprocessor_con"),
        ({"type": "video", "nframes": 8}, "(`fps`, `min_frames`, `max_frames`)"),
        ({"type": "video", "video_start": 1.5}, "cut the file (ffmpeg -ss START -to END -i FILE"),
        ({"type": "audio", "audio_end": 3}, "messages[0].content[0] has `audio_end`: media are r"),
        ({"type": "input_image", "file_id": "file-1"}, "holds more than `image`: file_id, type"),
        ({"type": "image", "image": "a", LONG: 1}, "holds more than `image`: AAAA"),
        ({"type": "text", "text": "a", LONG: 1}, "is text and holds AAAA"),
        ({"type": "refusal"}, "text, audio, image, video are the types (and their OpenAI nam"),
        ({"type": ["image"]}, "is of type ['image']"),
        ({"type": "tool_use", "name": "f", "input": {}}, "a call is an entry of its turn's tool_"),
        (
            {"type": "video", "video": ["1.png", "2.png"]},
            "is a list, perhaps of frames: a video is",
        ),
    ],
)
def test_parts_that_are_refused(part, reason):
    if len(part) == 2 and "type" in part and part["type"] in ("image", "video", "audio"):
        part = {part["type"]: "a.bin"} | part
    with pytest.raises(RowError) as error:
        in_part(part)
    assert reason in str(error.value) and len(str(error.value)) < 300
