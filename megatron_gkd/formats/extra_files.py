"""The files of a model folder that are not weights (configs, tokenizer, processor, licence, ...)
travel along.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_gkd.formats.manifest import NAME, Manifest, describe_file
from megatron_gkd.formats.safetensors_folder import INDEX

# Names of pickles, and of what may hold one.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_LEFT_BEHIND = (".git", ".cache")  # a clone's and a download's own records, as large as the model


def list_travellers(folder: Path, besides: Iterable[str]) -> list[str]:
    """Paths in `folder`, sorted: all but the index, the manifest and the names (weights, folders)
    in `besides`.

    Raises ValueError naming a pickle: such a file can run any code when it is opened, and none is
    needed.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if relative.parts[0] in {*_LEFT_BEHIND, *besides} or not path.is_file():
            continue
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which is neither read nor copied: move it out of the folder"
            )
        if relative.parts not in ((INDEX,), (NAME,)):
            found.append(str(relative))
    return found


def copy_travellers(
    source: Path, names: list[str], target: Path, manifest: Manifest, known: Manifest | None
) -> None:
    """Copy the files and write them into `manifest`. Raises ValueError when one is not what `known`
    says.
    """
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        manifest.files[name] = describe_file(target / name)
        expected = known.files.get(name) if known else None
        if expected and expected != manifest.files[name]:
            raise ValueError(
                f"{source / name}: not the file that {NAME} lists (changed or damaged since)"
            )


def total_bytes(folder: Path, names: list[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)
