"""Adapters with LoRA on the towers too, and models that carry them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.lora import apply_lora
from megatron_gkd.lora.load import load_adapter, load_teacher
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.media.positions import MediaTokenIds
from megatron_gkd.media.towers import build_towers
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import tower
from tests.adapters import THINKER, load_thinker, random_adapter
from tests.lora_runs import build
from tests.random_media import make_batch, make_rows
from tests.train_runs import SMALL

RANK, ALPHA, TARGETS = 2, 4, ["q_proj", "o_proj"]
AUDIO = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "fc1",
    "fc2",
)
VISUAL = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
TOWERS = ("audio_tower", "visual")


def build_thinker(path: Path) -> str:
    """A small thinker with both towers."""
    return build_folder(str(path), TinyModelConfig(**SMALL | dict(num_hidden_layers=4)))


def tower_linears(model) -> dict[str, torch.nn.Linear]:
    """Those that carry LoRA, of a transformers' thinker, under the names of the hub."""
    audio, visual = tower(model, "audio_tower"), tower(model, "visual")
    linears = {
        f"audio_tower.layers.{i}.{name}": layer.get_submodule(name)
        for i, layer in enumerate(audio.layers)
        for name in AUDIO
    }
    return linears | {
        f"visual.blocks.{i}.{name}": block.get_submodule(name)
        for i, block in enumerate(visual.blocks)
        for name in VISUAL
    }


def write_tower_adapter(
    folder: str, path: Path, *, rank=RANK, alpha=ALPHA, targets=TARGETS, towers=TOWERS, seed=6
) -> str:
    """A PEFT folder with random LoRA on the decoder's `targets` and on every linear of `towers`."""
    tensors = random_adapter(read_model_args(folder), rank, targets)
    generator, names = torch.Generator().manual_seed(seed), []
    for name, linear in tower_linears(load_thinker(folder)).items():
        if name.split(".")[0] not in towers:
            continue
        names.append(name)
        down = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        tensors[f"{THINKER}{name}.lora_A.weight"] = down
        tensors[f"{THINKER}{name}.lora_B.weight"] = (
            torch.randn(linear.out_features, rank, generator=generator) * 0.3
        )
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    excluded = [name for name in (*TOWERS, "talker", "code2wav") if name not in towers]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets + names,
        "exclude_modules": f".*({'|'.join(excluded)}).*",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


def write_teacher_adapter(folder: str, path: Path) -> str:
    """Of another rank and alpha, on other linears of the decoder and on the vision tower alone."""
    return write_tower_adapter(
        folder, path, rank=3, alpha=5, targets=["v_proj", "o_proj"], towers=["visual"], seed=7
    )


def make_model(
    place, folder, *, adapter=None, teacher=None, towers=True, recompute=False, dropout=0.0
):
    """(sizes, decoder with towers and LoRA on both, or on the decoder alone). teacher: the adapter
    that the teacher has.
    """
    model_args, model = build(place, folder, recompute=recompute)
    model.towers = build_towers(folder, model_args, place, torch.float32, audio=True, visual=True)
    apply_lora(
        model,
        model_args,
        place,
        rank=RANK,
        alpha=ALPHA,
        dropout=dropout,
        targets=TARGETS,
        seed=0,
        towers=towers,
    )
    if adapter is not None:
        load_adapter(model, model_args, place, PeftAdapter(adapter, model_args))
    if teacher is not None:
        load_teacher(model, model_args, place, PeftAdapter(teacher, model_args))
    return model_args, model


def my_batches(place, folder, tp):
    rows, batches, first = make_rows(MediaTokenIds.read(folder)), [], 0
    for of_batch in rows:
        batches.append(make_batch(of_batch, tp, first, place.row_multiple))
        first += len(of_batch)
    return batches[place.dp_rank :: place.dp_size]
