"""Where the tensors and files of a folder to be written come from: a Hugging Face folder, or a
Megatron checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_gkd.formats.frozen_weights import check_frozen_weights
from megatron_gkd.formats.job import file_states
from megatron_gkd.formats.manifest import MANIFEST, Manifest, list_extra_files, read_manifest
from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.safetensors_folder import (
    INDEX,
    SafetensorsFolder,
    check_tensors,
    stored_tensors,
)
from megatron_gkd.formats.stored_tensor import LazyTensor, StoredTensor
from megatron_gkd.formats.torch_dist import METADATA, TRACKER, find_torch_dist
from megatron_gkd.formats.torch_dist_writer import HEADERS, RELEASE
from megatron_gkd.model.args import ModelArgs, read_model_args

# (name, rows, their values) -> what is written, of the same dtype
Change = Callable[[str, slice, Tensor], Tensor]


@dataclass(frozen=True)
class FolderSource:
    """All that a Hugging Face folder to be written is made of: from which folder or checkpoint, and
    where in it each tensor is.
    """

    made_by: str
    path: Path  # of the folder or checkpoint
    model_args: ModelArgs
    headers: dict[str, bytes]  # file -> its safetensors header
    index: bytes | None
    tensors: Mapping[str, LazyTensor]
    extra_files_folder: Path
    extra_files: list[str]
    expected: Manifest | None  # hashes that what is read must have
    states: dict  # sizes and times of the files read
    change: Change | None = None
    change_identity: list = field(default_factory=list)  # all that the change depends on
    change_folders: list[Path] = field(default_factory=list)  # that the change reads

    @property
    def folders_read(self) -> list[Path]:
        return [self.path, self.extra_files_folder, *self.change_folders]

    def files(self, folder: Path) -> dict[str, dict[str, StoredTensor]]:
        return {
            name: stored_tensors(folder / name, header) for name, header in self.headers.items()
        }

    def check(self) -> None:
        """Raise ValueError for a tensor that is missing, unknown, or of another dtype or shape."""
        wanted = {
            name: tensor
            for tensors in self.files(self.path).values()
            for name, tensor in tensors.items()
        }
        for name, tensor in wanted.items():
            if name not in self.tensors:
                raise ValueError(f"{self.path}: misses tensor {name}")
            found = self.tensors[name]
            if (found.get_dtype(), found.get_shape()) != (tensor.dtype_name, list(tensor.size)):
                raise ValueError(
                    f"{self.path}: tensor {name} is {found.get_dtype()} {found.get_shape()}, "
                    f"the Hugging Face folder has {tensor.dtype_name} {list(tensor.size)}"
                )
        extra = [name for name in self.tensors if name not in wanted]
        if extra:
            raise ValueError(
                f"{self.path}: tensor {extra[0]} and {len(extra) - 1} more have no place in the "
                "folder"
            )

    def identity(self, shard_bytes: int) -> dict:
        """All that the written folder depends on, for the journal of the conversion."""
        return {
            "tool": f"{self.made_by} 1",
            "source": str(self.path.absolute()),
            "files": self.states | file_states(self.extra_files_folder, self.extra_files),
            "change": self.change_identity,
            "unit_bytes": shard_bytes,
        }


def is_converted(checkpoint: Path) -> bool:
    """Whether `hf_to_megatron` wrote it: what is not the decoder stands around it."""
    return checkpoint.name == RELEASE and (checkpoint.parent / HEADERS).is_dir()


def open_source(model: Path, hf_model: Path | None, made_by: str) -> FolderSource:
    """`model` is a Hugging Face folder or a Megatron checkpoint; `hf_model` has what the checkpoint
    does not hold.

    Raises FileNotFoundError or ValueError when they do not make up a complete folder.
    """
    checkpoint = find_torch_dist(model)
    if checkpoint is None:
        return _source_from_hf(model, made_by)
    if is_converted(checkpoint):
        return _source_from_converted(checkpoint, made_by)
    if hf_model is None:
        raise ValueError(
            f"{checkpoint}: holds the decoder alone; name the Hugging Face folder that it came "
            "from with --hf_model"
        )
    return _source_from_both(checkpoint, hf_model, made_by)


def _source_from_hf(hf_model: Path, made_by: str) -> FolderSource:
    model_args, folder = open_hf_folder(hf_model)
    manifest = read_manifest(hf_model)
    if manifest:
        manifest.check(hf_model, folder.tensors)
    return FolderSource(
        made_by=made_by,
        path=hf_model,
        model_args=model_args,
        headers=folder.headers,
        index=_read(hf_model / INDEX),
        tensors=folder.tensors,
        extra_files_folder=hf_model,
        extra_files=list_extra_files(hf_model, besides=folder.headers),
        expected=manifest,
        states=file_states(hf_model, folder.headers),
    )


def _source_from_converted(checkpoint: Path, made_by: str) -> FolderSource:
    """A checkpoint of `hf_to_megatron`: the folder as it was."""
    root = checkpoint.parent
    model_args = read_model_args(root)
    tensors, manifest = MegatronFolder(checkpoint, model_args).tensors, read_manifest(root)
    if manifest is None:
        raise FileNotFoundError(
            f"{root / MANIFEST} is missing: without it nothing says whether the checkpoint is "
            "complete"
        )
    manifest.check(root, tensors)
    # Checkpoints of training in the same folder.
    trained = [path.name for path in root.glob("iter_*")]
    headers = {
        path.name[: -len(".header")]: path.read_bytes()
        for path in sorted((root / HEADERS).glob("*.header"))
    }
    source = FolderSource(
        made_by=made_by,
        path=root,
        model_args=model_args,
        headers=headers,
        index=_read(root / HEADERS / INDEX),
        tensors=tensors,
        extra_files_folder=root,
        extra_files=list_extra_files(root, besides=(RELEASE, HEADERS, TRACKER, *trained)),
        expected=manifest,
        states=file_states(checkpoint, [METADATA]),
    )
    source.check()
    return source


def _source_from_both(checkpoint: Path, hf_model: Path, made_by: str) -> FolderSource:
    """A checkpoint of another writer: the decoder from it, all else and the names of the files from
    `hf_model`.
    """
    model_args, folder = open_hf_folder(hf_model)
    source = FolderSource(
        made_by=made_by,
        path=checkpoint,
        model_args=model_args,
        headers=folder.headers,
        index=_read(hf_model / INDEX),
        tensors={**folder.tensors, **MegatronFolder(checkpoint, model_args).tensors},
        extra_files_folder=hf_model,
        extra_files=list_extra_files(hf_model, besides=folder.headers),
        expected=None,
        states=file_states(checkpoint, [METADATA]) | file_states(hf_model, folder.headers),
    )
    source.check()
    return source


def open_hf_folder(hf_model: Path) -> tuple[ModelArgs, SafetensorsFolder]:
    """Raises FileNotFoundError or ValueError naming the tensor or file that is not as its
    config.json says.
    """
    model_args = read_model_args(hf_model)
    folder = SafetensorsFolder(hf_model)
    check_tensors(folder, model_args)
    check_frozen_weights(folder, model_args)
    return model_args, folder


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
