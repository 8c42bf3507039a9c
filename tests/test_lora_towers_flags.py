"""--lora_towers and the flags around it: LoRA lands on the towers only on purpose, text does not
reach it there, half of it is refused.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from tests.adapters import THINKER
from tests.ranks import run_ranks
from tests.tower_adapters import build_thinker, write_teacher_adapter, write_tower_adapter
from tests.train_runs import arguments, build_parts, run_training, write_rows
from tests.train_runs import make_rows as text_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_thinker(tmp_path_factory.mktemp("model") / "thinker")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """LoRA on attention of the decoder and on both towers, as a PEFT folder."""
    return write_tower_adapter(folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def teacher_adapter(folder, tmp_path_factory):
    return write_teacher_adapter(folder, tmp_path_factory.mktemp("teacher"))


def parts_of(rank, world_size, argv, kinds):
    try:
        parts = build_parts(argv, **kinds)
    except ValueError as error:
        return str(error)
    return [
        name
        for name, p in parts.model.named_parameters()
        if p.requires_grad and name.startswith("towers.")
    ]


@pytest.mark.parametrize(
    "flags, kinds, expected",
    [
        (["--lora_target_modules", "ALL"], dict(audio=True, visual=True), []),  # never by accident
        (["--lora_towers", "true"], {}, "--lora_towers: no row of the data has audio"),
        (["--adapter", "ADAPTER"], dict(audio=True), "has LoRA on 24 linears of the towers"),
        (["--adapter", "ADAPTER"], {}, []),  # text does not reach the towers
    ],
)
def test_only_on_purpose(folder, adapter, tmp_path, flags, kinds, expected):
    argv = [
        "--model",
        folder,
        "--dataset",
        "unused.jsonl",
        "--device",
        "cpu",
        "--torch_dtype",
        "float32",
    ]
    argv += [
        "--output_dir",
        str(tmp_path),
        *(adapter if word == "ADAPTER" else word for word in flags),
    ]
    (found,) = run_ranks(parts_of, 1, argv, kinds)
    assert found == expected if expected == [] else expected in found


def test_text_does_not_reach_the_towers_of_the_teacher(folder, teacher_adapter, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(4))
    said = run_training(
        1,
        arguments(
            model=folder,
            dataset=rows,
            output_dir=tmp_path,
            teacher_adapter=teacher_adapter,
            per_device_train_batch_size=4,
            max_steps=1,
        ),
    )
    assert f"Note: {teacher_adapter}: has LoRA on 12 linears of the towers" in said
    assert "which text does not reach: it is left out" in said
    num_parameters = json.loads((tmp_path / "run.json").read_text())["parameters"]
    assert num_parameters["teacher_adapter"] == 4 * 3 * ((64 + 64) + (128 + 64))


def test_half_an_adapter_is_refused(folder, adapter, tmp_path):
    tensors = load_file(Path(adapter, "adapter_model.safetensors"))
    del tensors[f"{THINKER}visual.blocks.0.attn.qkv.lora_A.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(Path(adapter, "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="misses tensor .*visual.blocks.0.attn.qkv.lora_A.weight"):
        PeftAdapter(tmp_path, read_model_args(folder))
