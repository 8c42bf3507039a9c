"""The weights of a Qwen3-Omni outside its decoder (towers, talker, code2wav), which are not trained
but copied: are they in the folder as config.json says?

Names and shapes come from transformers' own model, built on the `meta` device, where no weight is
allocated.
"""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from megatron_gkd.formats.safetensors_folder import SafetensorsFolder
from megatron_gkd.formats.stored_tensor import DECODER_DTYPE_NAMES
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.model.args import ModelArgs

_VOICE = ("talker.", "code2wav.")


def frozen_tensors(folder: Path, model_args: ModelArgs) -> tuple[dict[str, list[int]], set[str]]:
    """(name -> shape of every parameter outside the decoder, names of buffers that a folder may
    hold as well), as FOLDER/config.json says.

    Raises ValueError where transformers makes no model of config.json.
    """
    model_class = (
        Qwen3OmniMoeForConditionalGeneration
        if model_args.prefix
        else Qwen3OmniMoeThinkerForConditionalGeneration
    )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    getattr(
        config, "thinker_config", config
    ).text_config.num_hidden_layers = 1  # the decoder is not looked at
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever a setting that is missing or impossible leads to
        raise ValueError(
            f"{folder / 'config.json'}: transformers makes no model of it ({error})"
        ) from error
    parameters = revert_weight_conversion(model, dict(model.named_parameters()))
    buffers = revert_weight_conversion(model, dict(model.named_buffers()))
    decoder = tuple(f"{model_args.prefix}{part}" for part in ("model.", "lm_head."))
    sizes = {name: list(p.shape) for name, p in parameters.items() if not name.startswith(decoder)}
    return sizes, set(buffers)


def check_frozen_weights(folder: SafetensorsFolder, model_args: ModelArgs) -> None:
    """Raise ValueError naming a tensor outside the decoder that is missing, unknown, misshapen or
    of another type.

    Where config.json switches the voice off (`enable_audio_output`), its tensors may be there and
    are not looked at.
    """
    sizes, buffers = frozen_tensors(folder.folder, model_args)
    decoder = decoder_tensors(model_args).keys() | {f"{model_args.prefix}lm_head.weight"}
    found = {name: tensor for name, tensor in folder.tensors.items() if name not in decoder}
    if not any(name.startswith(_VOICE) for name in sizes) and model_args.prefix:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(_VOICE)}
    missing = [name for name in sizes if name not in found]
    extra = [name for name in found if name not in sizes and name not in buffers]
    for what, names in (("misses", missing), ("has unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{folder.folder}: the folder {what} tensor {names[0]}{more} (by its config.json)"
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
