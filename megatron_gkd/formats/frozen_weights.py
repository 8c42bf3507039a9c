"""What is not trained beside the decoder (towers, and the other models of the folder): is it there
as config.json says?

Names and shapes come from transformers' own model, built on the `meta` device, where no weight is
allocated.
"""

import json
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from megatron_gkd.formats.safetensors_folder import SafetensorsFolder
from megatron_gkd.formats.stored_tensor import DECODER_DTYPE_NAMES
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.config_fields import check_modules


def frozen_tensors(folder: Path, model_args: ModelArgs) -> tuple[dict[str, list[int]], set[str]]:
    """(name -> shape of every parameter outside the decoder, names of buffers that a folder may
    hold as well), as FOLDER/config.json says.

    Raises ValueError where transformers makes no model of config.json, or would make one of more
    modules than any has.
    """
    family, prefix = model_args.family, model_args.prefix
    whole = family.whole_class if prefix else None
    model_class = (whole or family.model_class)()
    path = folder / "config.json"
    check_modules(path, json.loads(path.read_text()))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        section = getattr(config, family.section) if prefix else config
        text = getattr(section, family.text_section) if family.text_section else section
        text.num_hidden_layers = 1  # the decoder is not looked at
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever a setting that is missing or impossible leads to
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: transformers makes no model of it ({said})") from error
    parameters = revert_weight_conversion(model, dict(model.named_parameters()))
    buffers = revert_weight_conversion(model, dict(model.named_buffers()))
    decoder = (f"{prefix}model.", f"{prefix}lm_head.")
    sizes = {name: list(p.shape) for name, p in parameters.items() if not name.startswith(decoder)}
    return sizes, set(buffers)


def check_frozen_weights(folder: SafetensorsFolder, model_args: ModelArgs) -> None:
    """Raise ValueError naming a tensor outside the decoder that is missing, unknown, misshapen or
    of another type.

    Where config.json switches the other models off (Qwen3-Omni's `enable_audio_output`), their
    tensors may be there and are not looked at.
    """
    sizes, buffers = frozen_tensors(folder.folder, model_args)
    decoder = decoder_tensors(model_args).keys() | {f"{model_args.prefix}lm_head.weight"}
    found = {name: tensor for name, tensor in folder.tensors.items() if name not in decoder}
    others = model_args.family.other_models
    if not any(name.startswith(others) for name in sizes) and model_args.prefix:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(others)}
    missing = [name for name in sizes if name not in found]
    extra = [name for name in found if name not in sizes and name not in buffers]
    for what, names in (("misses", missing), ("has unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            hint = ""
            if names is missing and others and not any(n.startswith(others) for n in found):
                family = model_args.family
                hint = (
                    f"; it has nothing of {family.other_models_title}, and config.json asks for "
                    f'them: set "{family.other_models_switch}": false there if they are not '
                    "wanted, or copy their files from the original folder"
                )
            raise ValueError(
                f"{folder.folder}: the folder {what} tensor {names[0]}{more} (by its config.json)"
                f"{hint}"
            )
    for name, size in sizes.items():
        tensor = found[name]
        if tensor.get_shape() != size:
            raise ValueError(
                f"{tensor.path}: tensor {name} has shape {tensor.get_shape()}, "
                f"config.json asks for {size}"
            )
        if tensor.get_dtype() not in DECODER_DTYPE_NAMES:
            raise ValueError(
                f"{tensor.path}: tensor {name} is {tensor.get_dtype()}, "
                f"expected one of {DECODER_DTYPE_NAMES}"
            )
