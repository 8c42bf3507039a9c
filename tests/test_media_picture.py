"""Pictures that are not plain RGB: what a person sees of them is what the model sees, or they are
refused. The references are computed with numpy from the pixels that were written.
"""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_gkd.data import DataError
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.picture import (
    COMPOSITED,
    SCALED,
    note,
    open_image,
    to_rgb,
    upright_size,
)
from megatron_gkd.media.processor import MediaProcessor
from tests.test_media_processor import ANSWER, build_model, load

RNG = np.random.default_rng(0)
COLOURS, GREY, ALPHA, DEEP = (
    RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8),
    RNG.integers(0, 256, (40, 60), dtype=np.uint8),
    RNG.integers(0, 256, (40, 60), dtype=np.uint8),
    RNG.integers(0, 65536, (40, 60), dtype=np.uint16),
)
GREYS = np.repeat(GREY[..., None], 3, axis=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(data):
    """(note, uint8 [H, W, 3])."""
    with open_image(io.BytesIO(data)) as image:
        said = note(image)
        rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return said, np.asarray(rgb)


def on_white(colours, alpha):
    weight = alpha[..., None].astype(np.float64) / 255
    return np.rint(colours * weight + 255 * (1 - weight))


PALETTE = Image.fromarray(COLOURS).quantize(16)
OF_PALETTE = np.asarray(PALETTE.convert("RGB"))
LEVELS = np.arange(16, dtype=np.uint8) * 17  # the opacity of each colour of the palette
CLEAR = COLOURS[3, 4].tolist()
ONE_BIT = np.where(GREY > 99, 255, 0).astype(np.uint8)


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("RGBA", stored(Image.fromarray(np.dstack([COLOURS, ALPHA]))), on_white(COLOURS, ALPHA)),
        (
            "RGBA of webp",
            stored(Image.fromarray(np.dstack([COLOURS, ALPHA])), "WEBP", lossless=True, exact=True),
            on_white(COLOURS, ALPHA),
        ),
        (
            "LA",
            stored(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
            on_white(GREYS, ALPHA),
        ),
        (
            "palette with opacities",
            stored(PALETTE, transparency=LEVELS.tobytes()),
            on_white(OF_PALETTE, LEVELS[np.asarray(PALETTE)]),
        ),
        (
            "gif",
            stored(PALETTE, "GIF", transparency=5),
            np.where(np.asarray(PALETTE)[..., None] == 5, 255, OF_PALETTE),
        ),
        (
            "one clear colour",
            stored(Image.fromarray(COLOURS), transparency=tuple(CLEAR)),
            np.where((COLOURS == CLEAR).all(-1, keepdims=True), 255, COLOURS),
        ),
        (
            "one clear grey",
            stored(Image.fromarray(GREY), transparency=int(GREY[0, 0])),
            np.where(GREYS == GREY[0, 0], 255, GREYS),
        ),
        (
            "one clear 16-bit grey",
            stored(Image.fromarray(DEEP), transparency=int(DEEP[0, 0])),
            np.where(DEEP == DEEP[0, 0], 255, np.rint(DEEP / 257.0))[..., None].repeat(3, -1),
        ),
    ],
)
def test_what_is_transparent_shows_white(name, data, expected):
    said, pixels = seen(data)
    assert said == COMPOSITED
    assert np.abs(pixels - expected).max() <= 1  # PIL divides by 255 in integers
    assert np.abs(pixels - expected).mean() < 0.1 and pixels.std() > 20


@pytest.mark.parametrize(
    "data",
    [
        stored(Image.fromarray(DEEP)),
        stored(Image.fromarray(DEEP), "TIFF"),
        stored(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        stored(Image.fromarray(DEEP.astype(np.int32)), "PPM"),
    ],
)
def test_16_bit_grey_keeps_its_range(data):
    said, pixels = seen(data)
    assert said == SCALED
    assert np.array_equal(pixels, np.rint(DEEP / 257.0)[..., None].repeat(3, -1))


CMYK = np.dstack([COLOURS, ALPHA])


@pytest.mark.parametrize(
    "data, expected, slack",
    [
        (stored(Image.fromarray(COLOURS)), COLOURS, 0),
        (stored(Image.fromarray(GREY)), GREYS, 0),
        (stored(PALETTE), OF_PALETTE, 0),
        (stored(Image.fromarray(ONE_BIT).convert("1")), ONE_BIT[..., None].repeat(3, -1), 0),
        (
            stored(Image.fromarray(CMYK, "CMYK"), "TIFF"),
            (255.0 - COLOURS) * (255.0 - ALPHA[..., None]) / 255,
            1,
        ),
    ],
)
def test_what_has_a_plain_meaning_is_converted(data, expected, slack):
    said, pixels = seen(data)
    assert not said and np.abs(pixels - expected).max() <= slack


def png_of_16_bits(transparent):
    """An RGB picture with one transparent colour, which PIL cannot write."""

    def chunk(name, data):
        whole = name + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 60, 40, 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in np.dstack([DEEP] * 3).astype(">u2"))
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">HHH", *transparent))]
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"<svg/>", "it is none of PNG, JPEG, .*: save it as PNG or JPEG"),
        (stored(Image.fromarray(COLOURS), "EPS"), "it is none of PNG, JPEG, .*: save it as PNG"),
        (stored(Image.fromarray(COLOURS), "TGA"), "it is none of PNG, JPEG, .*: save it as PNG"),
        (png_of_16_bits((40_000, 3, 500)), "its transparent colour has 16 bits a channel: save it"),
    ],
)
def test_pictures_that_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        seen(data)


def test_pictures_are_upright():
    """As transformers' load_image turns them; Qwen's utilities leave them lying."""
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    exif = Image.Exif()
    exif[0x0112] = 6  # held with its top to the right
    for kind in ("PNG", "TIFF"):  # of which PIL turns the size and the pixels by itself
        data = stored(image, kind, exif=exif)
        _, pixels = seen(data)
        assert np.array_equal(pixels, np.rot90(seen(stored(image))[1], -1))
        with open_image(io.BytesIO(data)) as header:
            assert upright_size(header) == pixels.shape[1::-1]


def test_the_model_sees_a_logo_and_not_a_black_square(model, tmp_path):
    """A black square on transparent ground, whose hidden colour is black too."""
    alpha = np.zeros((96, 96), np.uint8)
    alpha[20:71, 20:71] = 255
    logo = Image.fromarray(np.dstack([np.zeros((96, 96, 3), np.uint8), alpha]))
    Image.fromarray(255 - alpha).convert("RGB").save(tmp_path / "white.png")
    logo.save(tmp_path / "logo.png")
    logo.quantize().save(tmp_path / "palette.png")
    Image.fromarray((255 - alpha).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(alpha.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(alpha.astype(np.int32) * 1000).save(tmp_path / "large.tif")
    processor = MediaProcessor(model)
    names = ["white.png", "logo.png", "palette.png", "deep.png"]
    features = [
        processor.load(Reference("image", str(tmp_path / name), None)).features for name in names
    ]
    assert features[0].std() > 0.8
    for found in features[1:]:
        assert torch.equal(found, features[0])

    def sees(*images):
        return {
            "messages": [{"role": "user", "content": "<image>" * len(images)}, ANSWER],
            "images": list(images),
        }

    data = load(model, tmp_path, sees("logo.png"), sees(*names))
    assert data.report.notes == {f"image {COMPOSITED}": 3, f"image {SCALED}": 1}
    summary = data.report.summary()
    assert f"3 images {COMPOSITED}; 1 image {SCALED}; " in summary
    with pytest.raises(DataError) as error:
        load(model, tmp_path, sees("float.tif"), sees("large.tif"), check_data=True)
    first, second = str(error.value).splitlines()[1:]
    assert "float.tif: cannot be read (its pixels are floating-point numbers: save it" in first
    assert "large.tif: cannot be read (its grey values go from 0 to 255000, 16 bits have" in second
