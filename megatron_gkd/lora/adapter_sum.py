"""PEFT adapters in the tools: their weighted sum added to the base's tensors; an adapter folder
written with its manifest.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_gkd.formats.job import check_disk, check_output, file_states, sync
from megatron_gkd.formats.manifest import Manifest, describe_file
from megatron_gkd.formats.sources import FolderSource
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.peft_config import CONFIG, TENSORS
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora_targets import HEAD
from megatron_gkd.model.args import ModelArgs


@dataclass(frozen=True)
class AdapterSum:
    """Adapters of one base, each with a factor."""

    adapters: list[PeftAdapter]
    weights: list[float]
    model_args: ModelArgs

    def identity(self) -> list:
        """All that the sum depends on, for the journal of a conversion."""
        states = [file_states(adapter.folder, [CONFIG, TENSORS]) for adapter in self.adapters]
        return [
            [str(a.folder), state, weight]
            for a, state, weight in zip(self.adapters, states, self.weights)
        ]

    def change(self, name: str, rows: slice, base: Tensor) -> Tensor:
        """`rows` of the base's tensor `name` plus their updates: computed in fp32, rounded once to
        the base's dtype.

        Raises ValueError naming a tensor whose sum is NaN, Inf, or too large for that dtype.
        """
        linear = name.removeprefix(self.model_args.prefix).removesuffix(".weight")
        root = self.model_args.family.adapter_root
        down, up = (f"{root}{linear}.lora_{side}.weight" for side in "AB")
        terms = [
            (adapter, weight)
            for adapter, weight in zip(self.adapters, self.weights)
            if down in adapter
        ]
        if not terms:
            return base
        for adapter, _ in terms:
            adapter.check_base(linear, rows, base)
        total = base.float().flatten(1)  # a convolution's kernel belongs to its inputs
        for adapter, weight in terms:
            (matrix_a, scale), (matrix_b, _) = adapter.tensor(down), adapter.tensor(up)
            total.addmm_(matrix_b[rows].flatten(1), matrix_a.flatten(1), alpha=weight * scale)
        rounded = total.to(base.dtype).view(base.shape)
        if not rounded.isfinite().all():
            raise ValueError(
                f"tensor {name}: the base plus the adapters is not finite in {base.dtype}"
            )
        return rounded


def open_adapters(folders: list[str], weights: list[float], model_args: ModelArgs) -> AdapterSum:
    """Raises FileNotFoundError or ValueError naming the adapter that does not fit the model, or
    both counts.
    """
    if weights and len(weights) != len(folders):
        raise ValueError(
            f"{len(weights)} weights for {len(folders)} adapters: "
            "give one for each, or none for 1 each"
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"--weight {' '.join(map(str, weights))}: must be finite numbers")
    if not folders:
        raise ValueError("no --adapter is named")
    adapters = [PeftAdapter(folder, model_args) for folder in folders]
    for adapter in adapters:
        refuse_outside(adapter)
    return AdapterSum(adapters, weights or [1.0] * len(folders), model_args)


def add_adapters(source: FolderSource, adapters: list[str], weights: list[float]) -> FolderSource:
    """The source with the adapters added to what is read of it. Raises as `open_adapters`, and
    ValueError naming a linear whose weight the folder does not have.
    """
    opened = open_adapters(adapters, weights, source.model_args)
    root = source.model_args.family.adapter_root
    for adapter in opened.adapters:
        names = [
            name
            for name in adapter_tensors(source.model_args, 1, adapter.targets)
            if ".lora_B." in name and name in adapter
        ]
        linears = [name.removeprefix(root).removesuffix(".lora_B.weight") for name in names]
        linears += adapter.towers + adapter.merge_only
        lost = [
            linear
            for linear in linears
            if f"{source.model_args.prefix}{linear}.weight" not in source.tensors
        ]
        if lost:
            raise ValueError(
                f"{adapter.folder}: has LoRA on {lost[0]}, "
                f"and {source.path} no such weight to add it to"
                + (" (it is tied to the embedding)" if lost == [HEAD] else "")
            )
        for linear in adapter.towers + adapter.merge_only:
            _check_size(adapter, linear, source)
    folders = [adapter.folder for adapter in opened.adapters]
    return replace(
        source, change=opened.change, change_identity=opened.identity(), change_folders=folders
    )


def _check_size(adapter: PeftAdapter, linear: str, source: FolderSource) -> None:
    """Raise ValueError where LoRA on `linear`, whose size adapter_config.json does not tell, does
    not fit its weight, or would change another one.
    """
    root = source.model_args.family.adapter_root
    (down, _), (up, _) = (adapter.tensor(f"{root}{linear}.lora_{side}.weight") for side in "AB")
    size = source.tensors[f"{source.model_args.prefix}{linear}.weight"].get_shape()
    if [len(up), *down.shape[1:]] != size:
        raise ValueError(
            f"{adapter.path}: LoRA on {linear} is of a weight {[len(up), *down.shape[1:]]}, and "
            f"{source.path} has {size}"
        )
    if linear.endswith(".embed_tokens") and source.model_args.tie_word_embeddings:
        raise ValueError(
            f"{adapter.path}: has LoRA on embed_tokens, which is the {HEAD} of this model too "
            "(tie_word_embeddings): added to it, it would change both"
        )


def refuse_outside(adapter: PeftAdapter) -> None:
    """Raise ValueError for LoRA that the tools would drop: on the family's other models."""
    if adapter.outside:
        family = adapter.model_args.family
        raise ValueError(
            f"{adapter.path}: tensor {adapter.outside[0]} and {len(adapter.outside) - 1} more "
            f"are not LoRA on {family.trained_part} but on {family.other_models_title}, which the "
            "tools leave as they are: merge it with peft, or save the adapter without them"
        )


def write_adapter(
    output: Path, made_by: str, fill: Callable[[Path], None], sources: list[Path]
) -> None:
    """Make the adapter folder `output`: `fill(folder)` writes its files, a manifest is added, the
    rest is one rename.

    Raises ValueError when the folder is not empty, or lies in one of the folders `sources`.
    """
    output = output.absolute()
    check_output(output, sources)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        fill(partial)
        manifest = Manifest(
            made_by, files={name: describe_file(partial / name) for name in (CONFIG, TENSORS)}
        )
        manifest.write(partial)
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def base_folder(adapter: Path, hf_model: Path | None) -> Path:
    """The model that a training run's adapter belongs to: `hf_model`, or the one that its config
    names. Raises ValueError where there is no such folder.
    """
    named = json.loads((adapter / CONFIG).read_text()).get("base_model_name_or_path")
    base = hf_model or Path(named or "")
    if not (base / "config.json").is_file():
        raise ValueError(
            f"{adapter}: its base model {str(base)!r} is not a folder here; name it with --hf_model"
        )
    return base


def copy_adapter(source: Path, output: Path) -> str:
    """The adapter of a training run's checkpoint, alone. Returns a line for the user."""
    check_disk(output, sum((source / name).stat().st_size for name in (CONFIG, TENSORS)))

    def fill(folder: Path) -> None:
        for name in (CONFIG, TENSORS):
            shutil.copy(source / name, folder)

    write_adapter(output, "megatron_to_hf", fill, [source])
    return f"the adapter of {source} in {output}"
