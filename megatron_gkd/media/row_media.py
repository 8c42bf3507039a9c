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
_MAX_RATE = 2**31 - 1  # what a header holds

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
_PARTS = ("start", "end", "start_time", "end_time", "offset")
_OF_KIND = re.compile("(image|audio|video)_")  # `video_start`, `video_max_pixels`


def refuse_settings(names: Iterable[str], kind: str, where: str) -> None:
    """Raise RowError if one of `names`, which stand beside a medium in a row, is a setting of other
    tools (Qwen's utilities) that would change what the model perceives, and say where it is set.
    """
    for name in names:
        plain, reason = _OF_KIND.sub("", name, count=1), None
        if plain in _SIZES:
            reason = _FRAME_SIZE if kind == "video" else _IMAGE_SIZE
        elif plain in _FRAMES:
            reason = _FRAME_RATE
        elif plain in _PARTS:
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
    uri = value.lstrip()
    if uri[:5].lower() == "data:":
        return Reference(kind, None, _of_data_uri(uri, where))
    is_file = uri[:6].lower() == "file:/"
    if not is_file and _SCHEME.match(uri):
        raise RowError(
            f"{where} is {short_repr(value)}: media are files here, nothing is fetched; "
            "download it first"
        )
    if is_file:
        value = uri[len("file:") :].removeprefix("//").removeprefix("localhost")
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
        if value.lstrip()[:5].lower() == "data:":
            return _of_data_uri(value.lstrip(), where)
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

    rate: Any = value.get("sampling_rate")
    try:
        given = np.asarray(value["array"])
        samples = given.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise RowError(f"{where}.array is not an array of numbers: {str(error)[:100]}") from None
    if given.dtype.kind in "iu" and np.abs(samples).max(initial=0) > 1:
        raise RowError(
            f"{where}.array holds whole numbers to {np.abs(samples).max():.0f}: samples lie "
            "between -1 and 1; divide them (16-bit ones by 32768)"
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T  # torch's decoders give [channels, samples]
    is_whole = type(rate) in (int, float) and rate == rate // 1
    if not is_whole or not 0 < rate <= _MAX_RATE or samples.ndim not in (1, 2):
        raise RowError(
            f"{where} must have an array of samples, or of samples of each channel, and a "
            f"sampling_rate in Hz, got the shape {list(samples.shape)} and {short_repr(rate)}"
        )
    file = io.BytesIO()
    try:
        soundfile.write(file, samples, int(rate), format="WAV", subtype="FLOAT")
    except soundfile.LibsndfileError:
        raise RowError(
            f"{where}.array has the shape {list(samples.shape)}: [samples, channels] of sound "
            "have up to 1024 channels"
        ) from None
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
            f"{where} is a list and not the pixels [height][width][3] of an image: "
            f"{str(error)[:100]}"
        ) from None
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
