"""A medium as a row gives it -> a `Reference`: a path, bytes, base64, samples or pixels.

Nothing is fetched: addresses are refused. Nothing is printed whole either: a value may have
megabytes.
"""

import base64
import io
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

import numpy as np

from megatron_gkd.errors import RowError, short_repr, type_name
from megatron_gkd.media.medium import Reference

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_DATA_URI = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
# The smallest PNG has 92 characters of base64. A path as long as this has a dot, which base64 has
# not, or exists.
_MIN_BASE64 = 92
_MAX_NAME = 255  # bytes of a file's name on all usual file systems

_IMAGE_SIZE = (
    "the size of images is set for all of them in the folder of --model, preprocessor_config.json "
    "(`min_pixels`, `max_pixels`); leave it out, or resize the file"
)
_FRAME_SIZE = (
    "the size of a video's frames is the model's own, 128 to 768 tokens a frame; leave it out, or "
    "resize the file"
)
_FRAME_RATE = (
    "the frames of videos are set for all of them in the folder of --model, "
    "video_preprocessor_config.json or else preprocessor_config.json (`fps`, `min_frames`, "
    "`max_frames`); leave it out"
)
_PART_OF_A_FILE = "media are read whole: cut the file (ffmpeg -ss START -to END -i FILE NEW_FILE)"
_SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
_FRAMES = ("fps", "nframes", "num_frames", "min_frames", "max_frames", "sample_fps")
_PARTS = tuple(f"{name}{end}" for name in ("", "video_", "audio_") for end in ("start", "end"))


def refuse_settings(names: Iterable[str], kind: str, where: str) -> None:
    """Raise RowError if one of `names`, which stand beside a medium in a row, is a setting of other
    tools (Qwen's utilities) that would change what the model perceives, and say where it is set.
    """
    for name in names:
        reason = None
        if name in _SIZES:
            reason = _FRAME_SIZE if kind == "video" else _IMAGE_SIZE
        elif name in _FRAMES:
            reason = _FRAME_RATE
        elif name in _PARTS:
            reason = _PART_OF_A_FILE
        if reason:
            raise RowError(f"{where} has `{name}`: {reason}")


def read_reference(value: Any, kind: str, folder: str, where: str) -> Reference:
    """A value of a row -> a Reference.

    value: a path (relative to `folder`, that of the data file), a `file://` or base64 data URI,
    base64 of at least _MIN_BASE64 characters that names no file, bytes; an object with one of
    these as `bytes` or `data` (where base64 may be short), as `path` or as `url`; or what
    `datasets` decodes: an object with array and sampling_rate, or an image's pixels as a nested
    list. Arrays become bytes, losslessly. Raises RowError naming `where`.
    """
    if isinstance(value, dict):
        refuse_settings((name for name, held in value.items() if held is not None), kind, where)
        if value.get("array") is not None:
            return Reference(kind, None, _wav_bytes(value, where))
        data = value.get("bytes") or value.get("data")
        if data:
            return Reference(kind, None, _bytes(data, where))
        value = value.get("path") or value.get("url")
        if value is None:
            raise RowError(f"{where} is an object without bytes, data, path, url or array")
    if isinstance(value, (bytes, bytearray)) and value:
        return Reference(kind, None, bytes(value))
    if isinstance(value, str) and value.strip():
        return _of_text(value, kind, folder, where)
    if isinstance(value, list) and value and kind == "image":
        return Reference(kind, None, _png_bytes(value, where))
    if isinstance(value, list) and value and kind == "video":
        raise RowError(
            f"{where} is a list, perhaps of frames: a video is one file (ffmpeg -framerate 1 -i "
            "FRAME_%d.png VIDEO.mp4)"
        )
    raise RowError(f"{where} must be a path, bytes, base64 or an array, got {short_repr(value)}")


def _of_text(value: str, kind: str, folder: str, where: str) -> Reference:
    if value[:5].lower() == "data:":
        return Reference(kind, None, _of_data_uri(value, where))
    scheme = _SCHEME.match(value)
    if scheme and scheme[1].lower() != "file":
        raise RowError(
            f"{where} is {short_repr(value)}: media are files here, nothing is fetched; "
            "download it first"
        )
    if scheme:
        value = value[len("file://") :].removeprefix("localhost")
        decoded = unquote(value)
        if decoded != value and not os.path.exists(os.path.join(folder, value)):
            value = decoded
    path = os.path.normpath(os.path.join(folder, value))
    if len(value) >= _MIN_BASE64 and _BASE64.fullmatch(value) and not os.path.exists(path):
        return Reference(kind, None, _of_base64(value, where))
    if "\0" in value or any(len(os.fsencode(name)) > _MAX_NAME for name in value.split("/")):
        raise RowError(
            f"{where} is neither a path (names have at most {_MAX_NAME} bytes) nor base64: "
            f"{len(value)} characters, {short_repr(value)}"
        )
    return Reference(kind, path, None)


def _bytes(value: Any, where: str) -> bytes:
    """Of an entry that holds a medium's content: bytes, base64, a data URI, or whole numbers from 0
    to 255, as some writers of JSON have bytes.
    """
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            return _of_data_uri(value, where)
        if _SCHEME.match(value):
            raise RowError(
                f"{where} is {short_repr(value)}: nothing is fetched; download it, and give its "
                "path"
            )
        return _of_base64(value, where)
    try:
        if isinstance(value, list):
            return bytes(value)
    except (TypeError, ValueError):
        pass
    raise RowError(f"{where} must hold bytes or base64, got {type_name(value)} {short_repr(value)}")


def _of_data_uri(value: str, where: str) -> bytes:
    head = _DATA_URI.match(value)
    if head is None or not head[1].lower().replace(" ", "").endswith("base64"):
        raise RowError(
            f"{where} is {short_repr(value)}: of data URIs those in base64 are read "
            "(data:image/png;base64,...)"
        )
    return _of_base64(value[head.end() :], where)


def _of_base64(text: str, where: str) -> bytes:
    """Also the alphabet of URLs, without padding, and in lines."""
    plain = "".join(unquote(text).split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise RowError(
            f"{where} is not base64 ({str(error)[:60]}): {len(text)} characters, {short_repr(text)}"
        ) from None
    if not data:
        raise RowError(f"{where} holds no byte")
    return data


def _wav_bytes(value: dict, where: str) -> bytes:
    import soundfile

    rate = value.get("sampling_rate")
    try:
        samples = np.asarray(value["array"], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RowError(f"{where}.array is not an array of numbers: {str(error)[:100]}") from None
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # torch's decoders give [channels, samples]
    if not isinstance(rate, int) or rate < 1 or samples.ndim not in (1, 2):
        raise RowError(
            f"{where} must have an array of samples and a sampling_rate in Hz, "
            f"got a rate of {short_repr(rate)}"
        )
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _png_bytes(value: list, where: str) -> bytes:
    from PIL import Image

    try:
        pixels = np.asarray(value)
        if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError("pixels are whole numbers from 0 to 255")
        image = Image.fromarray(pixels.astype(np.uint8))
    except (TypeError, ValueError) as error:
        raise RowError(
            f"{where} is not the pixels [height][width][3] of an image: {str(error)[:100]}"
        ) from None
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
