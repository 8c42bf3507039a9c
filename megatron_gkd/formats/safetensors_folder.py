"""The tensors of a Hugging Face folder: which are there, of what type and shape, and any rows and
columns of them.

Only safetensors are read, never a pickle. Missing, unexpected and misshapen tensors are errors that
name them.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_gkd.formats.config_sizes import (
    check_decoder_sizes,
    check_num_layers,
    check_tower_sizes,
    folder_places,
)
from megatron_gkd.formats.stored_tensor import DECODER_DTYPE_NAMES, StoredTensor
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.json_fields import Form, check_fields, read_object
from megatron_gkd.links import check_link
from megatron_gkd.model.args import ModelArgs

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FORMS = {
    "weight_map": Form(
        "an object of names of tensors and files",
        lambda value: isinstance(value, dict) and all(isinstance(of, str) for of in value.values()),
    )
}
_ROWS_AT_ONCE = 4096  # of two matrices that are compared


def read_header(path: Path) -> bytes:
    """The header of a safetensors file, byte for byte, without its length. Raises ValueError naming
    a damaged file.
    """
    try:
        # The library checks that the tensors fill the file without a hole.
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def stored_tensors(path: Path, header: bytes) -> dict[str, StoredTensor]:
    """The tensors that a file with this header holds, in the order of their bytes."""
    described = {
        name: entry for name, entry in json.loads(header).items() if name != "__metadata__"
    }
    tensors = {
        name: StoredTensor(
            path,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + len(header) + entry["data_offsets"][0],
        )
        for name, entry in described.items()
    }
    return dict(
        sorted(
            tensors.items(), key=lambda item: (item[1].start, described[item[0]]["data_offsets"][1])
        )
    )


class SafetensorsFolder:
    """The tensors of a model folder, one file or many: headers are read at once, tensors by the
    slices asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        listed = self._listed()
        self.headers = {
            name: read_header(self.folder / name)
            for name in sorted(set(listed.values()) or {SINGLE})
        }
        self.tensors: dict[str, StoredTensor] = {}
        self.file_of: dict[str, str] = {}
        for file, header in self.headers.items():
            found = stored_tensors(self.folder / file, header)
            twice = sorted(found.keys() & self.file_of.keys())
            if twice:
                raise ValueError(
                    f"{self.folder / file}: holds tensor {twice[0]}, "
                    f"and {self.file_of[twice[0]]} holds it too"
                )
            self.tensors |= found
            self.file_of |= dict.fromkeys(found, file)
        for tensor, name in listed.items():
            if self.file_of.get(tensor) != name:
                other = f" ({self.file_of[tensor]} does)" if tensor in self.file_of else ""
                raise ValueError(
                    f"{self.folder / INDEX}: lists tensor {tensor} in {name}, "
                    f"which does not hold it{other}"
                )
        for tensor, file in self.file_of.items():
            if listed and tensor not in listed:
                raise ValueError(
                    f"{self.folder / file}: has unexpected tensor {tensor}, "
                    f"which {INDEX} does not list"
                )

    def _listed(self) -> dict[str, str]:
        """Tensor -> file as the index says; empty for a single file without an index."""
        index, has_single = self.folder / INDEX, (self.folder / SINGLE).is_file()
        for name in (INDEX, SINGLE):
            check_link(self.folder / name)
        if not index.is_file():
            if has_single:
                return {}
            pickles = sorted(
                path.name for kind in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(kind)
            )
            hint = (
                f"; {pickles[0]} is a pickle and is not read: convert the folder to safetensors"
                if pickles
                else ""
            )
            raise FileNotFoundError(f"{self.folder}: neither {INDEX} nor {SINGLE} is there{hint}")
        found = read_object(index, "a safetensors index with a weight_map")
        check_fields(index, {"weight_map": None, **found}, _FORMS)
        listed = found["weight_map"]
        others = sorted(set(listed.values()) - {SINGLE})
        if has_single and others:
            raise ValueError(
                f"{self.folder}: {SINGLE} is there, and {INDEX} lists {others[0]}: "
                "which of them is the model?"
            )
        for name in sorted(set(listed.values())):
            check_link(self.folder / name)
        missing = sorted(
            name for name in set(listed.values()) if not (self.folder / name).is_file()
        )
        if missing:
            raise FileNotFoundError(
                f"{index}: lists {missing[0]}, which is not in the folder "
                f"({len(missing)} such files)"
            )
        return listed

    def slice(self, name: str) -> StoredTensor:
        """Tensor `name`, not read: `[index]` reads only those bytes."""
        return self.tensors[name]


def check_tensors(
    folder: SafetensorsFolder, model_args: ModelArgs, *, headers_only: bool = False
) -> None:
    """Raise ValueError unless every decoder tensor is as config.json says, and the others belong to
    a tower or another model of the family. Reads headers only, and unless `headers_only` both
    matrices of a tied head that is stored twice.
    """
    expected = decoder_tensors(_of_folder(folder, model_args))
    missing = [name for name in expected if name not in folder.file_of]
    family, prefix = model_args.family, model_args.prefix
    known = tuple(f"{prefix}{tower.name}." for tower in family.towers) + (
        family.other_models if prefix else ()
    )
    extra = [name for name in folder.file_of if name not in expected and not name.startswith(known)]
    if model_args.tie_word_embeddings:
        extra = [name for name in extra if name != f"{model_args.prefix}lm_head.weight"]
    for what, names in (("misses", missing), ("has unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            fused = any(".mlp.experts.gate_up_proj" in name for name in extra)
            hint = (
                "; the experts are fused: save the model with save_pretrained's defaults, "
                "which take them apart"
                if fused
                else ""
            )
            raise ValueError(
                f"{folder.folder}: the folder {what} tensor {names[0]}{more} "
                f"(sizes are those of its config.json){hint or _other_prefix(folder, model_args)}"
            )
    for name, size in expected.items():
        tensor, file = folder.slice(name), folder.folder / folder.file_of[name]
        if tuple(tensor.get_shape()) != size:
            raise ValueError(
                f"{file}: tensor {name} has shape {list(tensor.get_shape())}, "
                f"config.json asks for {list(size)}"
            )
        if tensor.get_dtype() not in DECODER_DTYPE_NAMES:
            raise ValueError(
                f"{file}: tensor {name} is {tensor.get_dtype()}, "
                f"expected one of {DECODER_DTYPE_NAMES} (nothing quantised)"
            )
    head = f"{model_args.prefix}lm_head.weight"
    if model_args.tie_word_embeddings and head in folder.file_of and not headers_only:
        _check_tied(folder, model_args)


def _of_folder(folder: SafetensorsFolder, model_args: ModelArgs) -> ModelArgs:
    """The sizes, compared with the headers; where tensors that would show them are missing, those
    of one layer with one expert, of which one is missing too. Raises ValueError where they differ.
    """
    shapes = {name: tensor.size for name, tensor in folder.tensors.items()}
    file_of = lambda name: folder.folder / folder.file_of[name]
    has_layers = check_num_layers(model_args, shapes, file_of)
    places = folder_places(model_args)
    complete = check_decoder_sizes(model_args, shapes, file_of, places) and has_layers
    check_tower_sizes(model_args, shapes, file_of)
    return model_args if complete else replace(model_args, num_layers=1, num_experts=1)


def _other_prefix(folder: SafetensorsFolder, model_args: ModelArgs) -> str:
    """The way out where config.json is the whole model's and the tensors those of a part alone, or
    the other way round.
    """
    family = model_args.family
    names = {prefix: f"{prefix}model.norm.weight" for prefix in family.prefixes.values()}
    held = [prefix for prefix, name in names.items() if name in folder.file_of]
    if not held or held[0] == model_args.prefix:
        return ""
    wanted = next(name for name, prefix in family.prefixes.items() if prefix == held[0])
    change = f'its "{family.section}" alone' if model_args.prefix else "that of the whole model"
    return (
        f"; the tensors are named as those of a {wanted} and config.json is of a "
        f"{model_args.model_type}: replace config.json by {change}, with model_type {wanted}"
    )


def _check_tied(folder: SafetensorsFolder, model_args: ModelArgs) -> None:
    """transformers ties a head to the embeddings only where the folder stores none of its own."""
    names = [f"{model_args.prefix}{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    embedding, head = map(folder.slice, names)
    same = tuple(head.get_shape()) == tuple(embedding.get_shape())
    for first in range(0, model_args.vocab_size if same else 0, _ROWS_AT_ONCE):
        rows = (slice(first, first + _ROWS_AT_ONCE),)
        same = same and torch.equal(head[rows], embedding[rows])
    if not same:
        raise ValueError(
            f"{folder.folder}: {names[1]} is not {names[0]}, and config.json says "
            "tie_word_embeddings: set that to false, or take the tensor out"
        )
