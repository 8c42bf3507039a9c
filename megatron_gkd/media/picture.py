"""An image file -> an upright RGB picture.

What a file holds beside red, green and blue is made visible as people see it: transparent parts
show white, as Qwen's own utilities have it, and 16-bit grey keeps its range. What would be clipped
is refused.
"""

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

COMPOSITED = "composited on white"
SCALED = "scaled from 16-bit grey"
_ORIENTATION = 0x0112  # EXIF's tag
_SIXTEEN_BITS = 65535
# PIL's others are drawn by other programs (EPS by Ghostscript, WMF by Windows) or seldom tried.
FORMATS = "PNG JPEG MPO WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split()


def open_image(file: io.BytesIO | str) -> "Image":
    """A file or its bytes, of which only the header is read yet. Raises ValueError for what is no
    picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        Image.init()
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:  # its message would quote the path, or an address in memory
        raise ValueError(f"it is none of {', '.join(FORMATS)}: save it as PNG or JPEG") from None


def upright_size(image: "Image") -> tuple[int, int]:
    """(width, height) of the upright image, from its header."""
    # orientations 5 to 8 are turned by 90 degrees; of a TIFF PIL's size is that of the turned one
    is_turned = _orientation(image) >= 5 and image.format != "TIFF"
    return image.size[::-1] if is_turned else image.size


def note(image: "Image") -> str:
    """What `to_rgb` does that its user may want to know, from the header: for `Size.note`."""
    if image.has_transparency_data:
        return COMPOSITED
    return SCALED if _is_deep_grey(image) else ""


def to_rgb(image: "Image") -> "Image":
    """The first frame of an open file, decoded, upright (as transformers' `load_image` turns it;
    Qwen's utilities do not), in RGB. Raises ValueError for pixels that have no place in 8 bits.
    """
    from PIL import Image, ImageOps

    if _orientation(image) > 1:
        image = ImageOps.exif_transpose(image)
    if _is_deep_grey(image):
        return _of_deep_grey(image)
    if image.mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers: save it with 8 or 16 bits a channel"
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        raise ValueError("its transparent colour has 16 bits a channel: save it with 8")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _orientation(image: "Image") -> int:
    """EXIF's orientation, 1 is upright. For a PNG only the header counts: for more, PIL would
    decode it.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _is_deep_grey(image: "Image") -> bool:
    """Whether PIL has it as one channel of 16 bits, or of 32 (PGM and TIFF files)."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _of_deep_grey(image: "Image") -> "Image":
    from PIL import Image

    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > _SIXTEEN_BITS:
        raise ValueError(
            f"its grey values go from {grey.min()} to {grey.max()}, 16 bits have 0 to "
            f"{_SIXTEEN_BITS}: save it with 8 or 16 bits"
        )
    eight = ((grey * 255 + _SIXTEEN_BITS // 2) // _SIXTEEN_BITS).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        eight[grey == transparent] = 255
    return Image.fromarray(eight).convert("RGB")
