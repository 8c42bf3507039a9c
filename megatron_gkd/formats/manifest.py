"""conversion_manifest.json: size and SHA-256 of every tensor and of every other file of a converted
folder.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

NAME = "conversion_manifest.json"


@dataclass
class Manifest:
    """`tensors`: name -> dtype, shape, bytes, sha256, as in a Hugging Face folder; `files`: path ->
    bytes, sha256.
    """

    made_by: str
    tensors: dict[str, dict] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def check(self, folder: Path, tensors: dict) -> None:
        """Raise FileNotFoundError or ValueError naming a file or one of `tensors` (see
        folder.StoredTensor) that is missing from `folder`, unknown, or not as it was written. Reads
        the files, which are small, and no tensor.
        """
        for name, known in self.files.items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: {NAME} lists it")
            if describe_file(folder / name) != known:
                raise ValueError(
                    f"{folder / name}: not the file that {NAME} lists (changed or damaged since)"
                )
        for name in sorted(tensors.keys() ^ self.tensors.keys()):
            what = "is not in the folder" if name in self.tensors else f"is unknown to {NAME}"
            raise ValueError(
                f"{folder}: tensor {name} {what} (the folder was changed after it was written)"
            )
        for name, tensor in tensors.items():
            found, known = (tensor.get_dtype(), tensor.get_shape()), self.tensors[name]
            if found != (known["dtype"], known["shape"]):
                raise ValueError(
                    f"{folder}: tensor {name} is {found[0]} {found[1]}, {NAME} says {known['dtype']} {known['shape']}"
                )

    def check_tensor(self, name: str, sha256: str, where: Path) -> None:
        """Raise ValueError when the tensor's bytes are not those that were written."""
        known = self.tensors[name]
        if known["sha256"] != sha256:
            raise ValueError(
                f"{where}: tensor {name} has SHA-256 {sha256[:16]}..., {NAME} says {known['sha256'][:16]}...; "
                "the folder was changed or damaged after it was written"
            )


def read_manifest(folder: Path) -> Manifest | None:
    """None where the folder has none. Raises ValueError naming a file that is not one."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: not a manifest ({error}); remove it if it is not ours"
        ) from error


def describe_file(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
