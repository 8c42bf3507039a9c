"""Where the tensors and files of a folder to be written come from: a Hugging Face folder, or a
Megatron checkpoint.
"""

from pathlib import Path

from megatron_gkd.formats.extra_files import list_travellers
from megatron_gkd.formats.frozen_weights import check_frozen_weights
from megatron_gkd.formats.job import file_states
from megatron_gkd.formats.manifest import NAME, read_manifest
from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.safetensors_folder import INDEX, SafetensorsFolder, check_tensors
from megatron_gkd.formats.safetensors_writer import HfFolderPlan
from megatron_gkd.formats.torch_dist import METADATA, TRACKER, find_checkpoint
from megatron_gkd.formats.torch_dist_writer import HEADERS, RELEASE
from megatron_gkd.model.args import ModelArgs, read_model_args


def is_converted(checkpoint: Path) -> bool:
    """Whether `hf_to_megatron` wrote it: what is not the decoder stands around it."""
    return checkpoint.name == RELEASE and (checkpoint.parent / HEADERS).is_dir()


def plan_from(model: Path, hf_model: Path | None, made_by: str) -> HfFolderPlan:
    """`model` is a Hugging Face folder or a Megatron checkpoint; `hf_model` has what the checkpoint
    does not hold.

    Raises FileNotFoundError or ValueError when they do not make up a complete folder.
    """
    checkpoint = find_checkpoint(model)
    if checkpoint is None:
        return _plan_from_hf(model, made_by)
    if is_converted(checkpoint):
        return _plan_from_converted(checkpoint, made_by)
    if hf_model is None:
        raise ValueError(
            f"{checkpoint}: holds the decoder alone; name the Hugging Face folder that it came from with --hf_model"
        )
    return _plan_from_both(checkpoint, hf_model, made_by)


def _plan_from_hf(hf_model: Path, made_by: str) -> HfFolderPlan:
    model_args, folder = _open_hf(hf_model)
    manifest = read_manifest(hf_model)
    if manifest:
        manifest.check(hf_model, folder.tensors)
    return HfFolderPlan(
        made_by=made_by,
        source=hf_model,
        model_args=model_args,
        headers=folder.headers,
        index=_read(hf_model / INDEX),
        tensors=folder.tensors,
        travellers_folder=hf_model,
        travellers=list_travellers(hf_model, besides=folder.headers),
        expected=manifest,
        states=file_states(hf_model, folder.headers),
    )


def _plan_from_converted(checkpoint: Path, made_by: str) -> HfFolderPlan:
    """A checkpoint of `hf_to_megatron`: the folder as it was."""
    root = checkpoint.parent
    model_args = read_model_args(root)
    tensors, manifest = MegatronFolder(checkpoint, model_args).tensors, read_manifest(root)
    if manifest is None:
        raise FileNotFoundError(
            f"{root / NAME} is missing: without it nothing says whether the checkpoint is complete"
        )
    manifest.check(root, tensors)
    trained = [
        path.name for path in root.glob("iter_*")
    ]  # checkpoints of training in the same place
    headers = {
        path.name[: -len(".header")]: path.read_bytes()
        for path in sorted((root / HEADERS).glob("*.header"))
    }
    plan = HfFolderPlan(
        made_by=made_by,
        source=root,
        model_args=model_args,
        headers=headers,
        index=_read(root / HEADERS / INDEX),
        tensors=tensors,
        travellers_folder=root,
        travellers=list_travellers(root, besides=(RELEASE, HEADERS, TRACKER, *trained)),
        expected=manifest,
        states=file_states(checkpoint, [METADATA]),
    )
    plan.check()
    return plan


def _plan_from_both(checkpoint: Path, hf_model: Path, made_by: str) -> HfFolderPlan:
    """A checkpoint of another writer: the decoder from it, all else and the names of the files from
    `hf_model`.
    """
    model_args, folder = _open_hf(hf_model)
    plan = HfFolderPlan(
        made_by=made_by,
        source=checkpoint,
        model_args=model_args,
        headers=folder.headers,
        index=_read(hf_model / INDEX),
        tensors=folder.tensors | MegatronFolder(checkpoint, model_args).tensors,
        travellers_folder=hf_model,
        travellers=list_travellers(hf_model, besides=folder.headers),
        expected=None,
        states=file_states(checkpoint, [METADATA]) | file_states(hf_model, folder.headers),
    )
    plan.check()
    return plan


def _open_hf(hf_model: Path) -> tuple[ModelArgs, SafetensorsFolder]:
    model_args = read_model_args(hf_model)
    folder = SafetensorsFolder(hf_model)
    check_tensors(folder, model_args)
    check_frozen_weights(folder, model_args)
    return model_args, folder


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
