"""The media of a row -> what the towers read: a file or its bytes, decoded and passed through the
processor of the model folder.

Counting the tokens of a medium reads only the header of its file if that tells its size; `load`
decodes it, in the data workers, when its row is reached. Features may be kept on disk
(`--media_cache`).
"""

import hashlib
import os
import stat
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from megatron_gkd.data_settings import MAX_MEDIA_BYTES
from megatron_gkd.errors import DataError, RowError, first_line, shortened
from megatron_gkd.families import families
from megatron_gkd.media import picture
from megatron_gkd.media.cache import (
    UNUSABLE,
    cache_path,
    check_writable,
    read_cached,
    write_cached,
)
from megatron_gkd.media.medium import MAX_PATH, Medium, Reference, Size
from megatron_gkd.media.positions import MediaTokenIds
from megatron_gkd.media.sound_file import (
    check_bytes,
    read_sound,
    resampled_length,
    sound_length,
)
from megatron_gkd.media.video_file import Scan, read_frames, scan
from megatron_gkd.media.video_frames import VideoSettings, plan_frames, to_patches
from megatron_gkd.model.args import read_config

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

_LOCAL = {"local_files_only": True, "trust_remote_code": False}  # for transformers' Auto classes
_RGB = 3  # bytes of a pixel


class MediaProcessor:
    """Reads media with the processor files of a model folder; each is loaded when first needed."""

    def __init__(self, folder: str, cache: str | None = None, max_bytes: int = MAX_MEDIA_BYTES):
        """max_bytes: `--max_media_bytes`."""
        self.folder, self.cache, self.max_bytes = folder, cache, max_bytes
        self._cache_is_full = False
        if cache:
            self._keep(lambda: check_writable(cache))

    @cached_property
    def token_ids(self) -> MediaTokenIds:
        return MediaTokenIds.read(self.folder)

    @cached_property
    def placeholder_ids(self) -> frozenset[int]:
        """Token ids that stand for media; none of a model that reads text alone, and of a folder
        that is a tokenizer and no model.
        """
        is_model = os.path.isfile(os.path.join(self.folder, "config.json"))
        if not is_model or read_config(self.folder).family.media_settings is None:
            return frozenset()
        ids = self.token_ids
        return frozenset((ids.audio_token_id, ids.image_token_id, ids.video_token_id))

    def check_has_towers(self) -> None:
        """Raise RowError if the model reads text alone: called for rows with media."""
        family = read_config(self.folder).family
        if not family.towers:
            titles = " or ".join(other.title for other in families().values() if other.towers)
            raise RowError(
                f"the row has audio, images or videos, and {family.title} reads text alone: take "
                f"them out of the row, or train a {titles} (--model)"
            )

    def measure(self, reference: Reference) -> Size:
        """The size of a medium, from its header if that tells it. Raises RowError for a file that
        is missing or not of this kind, DataError if the folder or this machine cannot process it.
        """
        if reference.kind == "audio":
            return Size(
                self.audio_tokens(self._num_frames(self._audio_length(reference), reference))
            )
        if reference.kind == "image":
            width, height, note = self._image_size(reference)
            processor = self._image_processor
            num_patches = self._refusing(
                reference, lambda: int(processor.get_number_of_image_patches(height, width))
            )
            return Size(num_patches // processor.merge_size**2, note=note)
        found = self._read_cached(reference)[1]  # spares reading the whole file
        if found is not None:
            return Size(found.num_tokens, found.grid_thw, found.seconds_per_grid)
        settings = self._video_settings

        def read() -> Size:
            with reference.opened() as file:
                plan = plan_frames(self._scan(file, reference), settings)
            return Size(plan.num_tokens, plan.grid_thw, settings.seconds_per_grid)

        return self._refusing(reference, read)

    def load(self, reference: Reference) -> Medium:
        """Decode a medium and compute its features, or take them from the cache. Raises the errors
        of `measure`.
        """
        path, found = self._read_cached(reference)
        if found is not None:
            return found
        medium = {
            "audio": self._load_audio,
            "image": self._load_image,
            "video": self._load_video,
        }[reference.kind](reference)
        if path and not self._cache_is_full:
            self._keep(lambda: write_cached(path, medium))
        return medium

    def _keep(self, write: Callable[[], None]) -> None:
        """`write()`; a cache that cannot be written, said once, is read and not written again."""
        try:
            write()
        except UNUSABLE as error:
            self._cache_is_full = True
            reason = getattr(error, "strerror", None) or first_line(error)  # without a long path
            worker = get_worker_info()
            if int(os.environ.get("LOCAL_RANK", 0)) == 0 and (worker is None or worker.id == 0):
                print(
                    f"Note: --media_cache {shortened(str(self.cache), MAX_PATH)} cannot be written "
                    f"({reason}): features that it lacks are computed each time",
                    file=sys.stderr,
                    flush=True,
                )

    def _read_cached(self, reference: Reference) -> tuple[Path | None, Medium | None]:
        """(the medium's cache file, None without a cache; the medium in it, if any)."""
        cache = self.cache
        if not cache:
            return None, None
        path = self._refusing(
            reference, lambda: cache_path(cache, reference, self._processor_digest)
        )
        return path, read_cached(path, reference.kind)

    def audio_tokens(self, num_frames: int) -> int:
        """Tokens of an audio of `num_frames` log-mel frames: three convolutions of stride 2 over
        blocks of 2 n_window frames.
        """

        def convolved(length: int) -> int:
            for _ in range(3):
                length = (length + 1) // 2
            return length

        block = 2 * self._n_window
        return num_frames // block * convolved(block) + convolved(num_frames % block)

    # Audio
    # ----------------------------------------------------------------------------------------------

    def _audio_length(self, reference: Reference) -> int:
        """Number of samples at the processor's rate."""
        rate = self._feature_extractor.sampling_rate
        return self._refusing(reference, lambda: sound_length(reference, rate, self.max_bytes))

    def _num_frames(self, num_samples: int, reference: Reference) -> int:
        extractor = self._feature_extractor
        least = extractor.n_fft // 2 + 1  # the first frame is centred on the first sample
        if num_samples < least:
            raise RowError(
                f"{reference.name}: too short, {num_samples} samples at {extractor.sampling_rate} "
                f"Hz where the first frame takes {least}"
            )
        return num_samples // extractor.hop_length

    def _load_audio(self, reference: Reference) -> Medium:
        import soxr

        extractor = self._feature_extractor
        samples, rate = self._refusing(
            reference, lambda: read_sound(reference, extractor.sampling_rate, self.max_bytes)
        )
        wanted = resampled_length(len(samples), rate, extractor.sampling_rate)
        self._num_frames(wanted, reference)
        if rate != extractor.sampling_rate:
            samples = soxr.resample(samples, rate, extractor.sampling_rate, quality="HQ")
            # soxr rounds the length in another way
            samples = np.pad(samples, (0, max(wanted - len(samples), 0)))[:wanted]
        features = self._refusing(
            reference,
            lambda: extractor(
                samples,
                sampling_rate=extractor.sampling_rate,
                padding=True,
                truncation=False,
                return_attention_mask=True,
                return_tensors="pt",
            )["input_features"][0],
        )
        features = features[:, : wanted // extractor.hop_length].contiguous()
        return Medium("audio", features, None, self.audio_tokens(features.shape[1]))

    # Images
    # ----------------------------------------------------------------------------------------------

    def _image_size(self, reference: Reference) -> tuple[int, int, str]:
        """(width, height of the upright image, `Size.note`)."""

        def read() -> tuple[int, int, str]:
            with picture.open_image(reference.file()) as image:
                return *picture.upright_size(image), picture.note(image)

        width, height, note = self._refusing(reference, read)
        check_bytes(reference, width * height * _RGB, self.max_bytes)
        if min(width, height) < 2:
            raise RowError(
                f"{reference.name}: {width} x {height} pixels, an image needs at least 2 x 2"
            )
        return width, height, note

    def _load_image(self, reference: Reference) -> Medium:
        self._image_size(reference)

        def read() -> "PilImage":
            with picture.open_image(reference.file()) as image:
                return picture.to_rgb(image)

        image = self._refusing(reference, read)
        inputs = self._refusing(
            reference, lambda: self._image_processor(images=[image], return_tensors="pt")
        )
        return _image(
            inputs["pixel_values"], inputs["image_grid_thw"], self._image_processor.merge_size
        )

    # Videos
    # ----------------------------------------------------------------------------------------------

    def _load_video(self, reference: Reference) -> Medium:
        settings = self._video_settings

        def read() -> Medium:
            with reference.opened() as file:
                plan = plan_frames(self._scan(file, reference), settings)
                file.seek(0)
                patches = to_patches(read_frames(file, plan.times), plan, settings)
            return Medium(
                "video", patches, plan.grid_thw, plan.num_tokens, settings.seconds_per_grid
            )

        return self._refusing(reference, read)

    def _scan(self, file: BinaryIO, reference: Reference) -> Scan:
        """Of a video none of whose frames is too large."""

        def check(height: int, width: int) -> None:
            check_bytes(reference, width * height * _RGB, self.max_bytes)

        return scan(file, check)

    # The folder's files
    # ----------------------------------------------------------------------------------------------

    @cached_property
    def _feature_extractor(self):
        from transformers import AutoFeatureExtractor

        return self._part("audio", AutoFeatureExtractor.from_pretrained, **_LOCAL)

    @cached_property
    def _image_processor(self):
        from transformers import AutoImageProcessor

        return self._part("image", AutoImageProcessor.from_pretrained, **_LOCAL)

    @cached_property
    def _video_settings(self) -> VideoSettings:
        return self._part("video", VideoSettings.read)

    def _part(self, kind: str, load: Callable[..., Any], **options: bool) -> Any:
        """The part of the folder's processor for `kind`."""
        try:
            return load(self.folder, **options)
        except Exception as error:  # user files may raise errors of any type
            raise DataError(
                f"rows with {kind}s need the processor files of --model {self.folder} "
                f"(preprocessor_config.json): {first_line(error)}"
            ) from error

    @cached_property
    def _n_window(self) -> int:
        config = read_config(self.folder)
        (tower,) = (of for of in config.family.towers if of.name == "audio_tower")
        return tower.sizes(config.settings)["n_window"]

    def _refusing(self, reference: Reference, read: Callable[[], Any]) -> Any:
        """`read()`; any error that it raises about the medium becomes a RowError."""
        try:
            if reference.path is not None:
                status = os.stat(reference.path)
                if not stat.S_ISREG(status.st_mode):  # a pipe may never end, or begin
                    raise RowError(
                        f"{reference.name}: a folder, pipe, socket or device, where a file is read"
                    )
                if not status.st_size:
                    raise RowError(f"{reference.name}: the file is empty")
            return read()
        except (RowError, DataError):
            raise
        except FileNotFoundError:
            raise RowError(f"{reference.name}: there is no such file") from None
        except ImportError as error:
            raise RowError(
                f"{reference.name}: cannot be read without PyAV ({first_line(error)}): "
                "pip install 'av>=17.1,<20'"
            ) from None
        except Exception as error:  # decoders and processors raise errors of any type
            if reference.path and not os.path.exists(reference.path):
                raise RowError(f"{reference.name}: there is no such file") from None
            raise RowError(f"{reference.name}: cannot be read ({first_line(error)})") from error

    @cached_property
    def _processor_digest(self) -> str:
        digest = hashlib.sha256(str(self._n_window).encode())
        for path in sorted(Path(self.folder).glob("*processor_config.json")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _image(patches: Tensor, grid_thw: Tensor, merge_size: int) -> Medium:
    """patches [P, values per patch], grid_thw [1, 3]."""
    time, height, width = (int(number) for number in grid_thw[0])
    num_tokens = time * height * width // merge_size**2
    return Medium("image", patches.float(), (time, height, width), num_tokens)
