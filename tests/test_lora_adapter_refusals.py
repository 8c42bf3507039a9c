"""PEFT folders that are refused, each with its file and what is wrong there; what is left out; what
loads all the same.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.lora.adapter_sum import refuse_outside
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from tests.adapters import ROOT, THINKER, random_adapter, write_adapter
from tests.lora_runs import FOLDERS, build, initialize
from tests.ranks import run_ranks
from tests.test_lora_adapter import CONFIG, TENSORS


def refused_by_the_model(rank, world_size, folder, adapter):
    """What load_adapter says to an adapter that the model's LoRA cannot hold."""
    place, messages = initialize(1, 1, 1), []
    for lora in (dict(rank=2), dict(targets=["q_proj", "down_proj"])):
        with pytest.raises(ValueError) as refusal:
            build(place, folder, adapter, **lora)
        messages.append(str(refusal.value))
    return messages


def test_adapters_that_do_not_fit_the_models_lora(tiny_folder, tmp_path):
    folder = tiny_folder(**FOLDERS["4 KV heads"])
    targets = ["q_proj", "o_proj"]
    adapter = write_adapter(
        tmp_path,
        random_adapter(read_model_args(folder), 4, targets),
        rank=4,
        alpha=8,
        targets=targets,
    )
    ((rank, targets),) = run_ranks(refused_by_the_model, 1, folder, adapter)
    assert (
        rank
        == f"{adapter}: rank 4 does not fit into --lora_rank 2; raise --lora_rank, or leave it out"
    )
    assert (
        targets
        == f"{adapter}: has LoRA on o_proj, and --lora_target_modules and --lora_layers ask for "
        "q_proj, down_proj: add it, or leave them out"
    )


Q0, E3 = f"{ROOT}0.self_attn.q_proj", f"{ROOT}1.mlp.experts.3.gate_proj"
STACK = f"{ROOT}0.mlp.experts"


BAD_TENSORS = {  # edit of a good adapter's tensors -> what the error says after the file's name
    "lora_A of another width": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(3, 63)},
        rf"tensor {Q0}.lora_A.weight has shape \[3, 63\], .*config.json ask for \[3, 64\]",
    ),
    "lora_B of another height": (
        lambda t: t | {f"{E3}.lora_B.weight": torch.ones(31, 3)},
        rf"tensor {E3}.lora_B.weight has shape \[31, 3\], .*ask for \[32, 3\]",
    ),
    "two ranks in one linear": (
        lambda t: t | {f"{Q0}.lora_B.weight": torch.ones(128, 2)},
        rf"tensor {Q0}.lora_B.weight has shape \[128, 2\], .*ask for \[128, 3\]",
    ),
    "a vector": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(64)},
        rf"tensor {Q0}.lora_A.weight has shape \[64\]",
    ),
    "a missing matrix": (
        lambda t: {k: v for k, v in t.items() if k != f"{E3}.lora_A.weight"},
        rf"misses tensor {E3}.lora_A.weight",
    ),
    "a missing expert": (
        lambda t: {k: v for k, v in t.items() if not k.startswith(E3)},
        rf"misses tensor {E3}.lora_A.weight and 1 more",
    ),
    "an expert too many": (
        lambda t: (
            t
            | {
                f"{ROOT}0.mlp.experts.8.gate_proj.lora_{side}.weight": torch.ones(3, 3)
                for side in "AB"
            }
        ),
        r"tensor .*experts.8.gate_proj.* of layers or experts that the model does not have",
    ),
    "a layer too many": (
        lambda t: (
            t | {f"{ROOT}2.self_attn.q_proj.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}
        ),
        r"tensor .*layers.2.self_attn.q_proj.* that the model does not have",
    ),
    "an lm_head of another size": (
        lambda t: (
            t
            | {
                f"base_model.model.thinker.lm_head.lora_{side}.weight": torch.ones(3, 3)
                for side in "AB"
            }
        ),
        r"tensor base_model.model.thinker.lm_head.lora_A.weight has shape \[3, 3\], "
        r".* ask for \[3, 64\]",
    ),
    "half of an lm_head": (
        lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 64)},
        r"misses tensor base_model.model.thinker.lm_head.lora_B.weight",
    ),
    "DoRA": (
        lambda t: t | {f"{Q0}.lora_magnitude_vector.weight": torch.zeros(3)},
        rf"tensor {Q0}.lora_magnitude_vector.weight: DoRA's magnitude, .* merge it with peft",
    ),
    "the base's weights": (
        lambda t: t | {f"{Q0}.base_layer.weight": torch.zeros(3), "x": torch.zeros(3)},
        rf"tensor {Q0}.base_layer.weight and 1 more: no LoRA: the file holds weights of the base",
    ),
    "a module trained whole": (
        lambda t: t | {f"{THINKER}lm_head.modules_to_save.weight": torch.zeros(3)},
        "of a module that was trained whole .*: merge it with peft",
    ),
    "Megatron's names": (
        lambda t: t | {"decoder.layers.0.self_attention.linear_qkv.lora_A.weight": torch.zeros(3)},
        "named as in Megatron: export the adapter to Hugging Face's names",
    ),
    "a linear of another family": (
        lambda t: t | {f"{ROOT}0.mlp.shared_expert.up_proj.lora_A.weight": torch.zeros(3)},
        "LoRA on a linear that this model does not have",
    ),
    "two adapters": (
        lambda t: (
            t
            | {f"{Q0}.lora_{side}.other.weight": 1 + t[f"{Q0}.lora_{side}.weight"] for side in "AB"}
        ),
        r"holds several adapters \(None, other\)",
    ),
    "integers": (
        lambda t: t | {f"{Q0}.lora_A.weight": torch.ones(3, 64, dtype=torch.int8)},
        rf"tensor {Q0}.lora_A.weight is I8, which is no floating-point type",
    ),
    "what ZeRO-3 leaves": (
        lambda t: {name: torch.ones(0) for name in t},
        r"lora_A.weight is empty, \[0\]; DeepSpeed's ZeRO-3 leaves such files",
    ),
    "one matrix twice": (
        lambda t: t | {f"{Q0}.lora_A.weight".replace("thinker.", ""): torch.ones(3, 64)},
        r"lora_A.weight and .*lora_A.weight are one matrix, so which of them is meant",
    ),
    "one stack twice": (
        lambda t: {
            f"{prefix}{STACK}.lora_{side}.weight": torch.ones(8, 64)
            if side == "A"
            else torch.ones(64, 8)
            for prefix in ("", "module.")
            for side in "AB"
        },
        r"experts.lora_A.weight and .*experts.lora_A.weight are one matrix",
    ),
    "half of a stack": (
        lambda t: t | {f"{STACK}.lora_A.weight": torch.ones(24, 64)},
        rf"tensor {STACK}.lora_A.weight has no lora_B",
    ),
    "a stack of another model": (
        lambda t: (
            t
            | {
                f"{STACK}.lora_A.weight": torch.ones(24, 60),
                f"{STACK}.lora_B.weight": torch.ones(64, 24),
            }
        ),
        rf"{STACK}.lora_A.weight \[24, 60\] and .* fit neither gate_up_proj \(64 to 64\) "
        r"nor down_proj \(32 to 64\)",
    ),
    "a stack of another number of experts": (
        lambda t: {
            f"{ROOT}{n}.mlp.experts.lora_{s}.weight": torch.ones(21, 64)
            if s == "A"
            else torch.ones(64, 21)
            for n in (0, 1)
            for s in "AB"
        },
        r"lora_A.weight has shape \[21, 64\]",
    ),
    "only zeros": (
        lambda t: {name: torch.zeros_like(value) for name, value in t.items()},
        "every tensor is zero",
    ),
    "nothing": (lambda t: {}, "no LoRA on the thinker's decoder linears"),
}

BAD_SETTINGS = {
    "peft_type": ("LOHA", "peft_type 'LOHA', and only LORA .*merge the adapter with peft"),
    "use_dora": (True, "use_dora = True is not supported .*; merge the adapter with peft"),
    "lora_alpha": (None, "lora_alpha is None, and the scale alpha / r .* is unknown: write"),
    "r": (0, "r is 0, and the scale"),
    "alpha_pattern": ({"q_proj": None}, "alpha_pattern is {'q_proj': None}, and must be numbers"),
    "rank_pattern": ([3], r"rank_pattern is \[3\], and must be numbers above 0 by module"),
    "use_rslora": ("false", "use_rslora is 'false', and must be true or false"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora = {'nblocks': 2} is not supported"),
    "kasa_config": ({"beta": 1e-4}, "kasa_config = .* is not supported"),
    "layers_to_transform": ([1], r"LoRA on q_proj of layer 0, and .* layers_to_transform \[1\]"),
    "bias": ("lora_only", "bias = 'lora_only' is not supported"),
    "modules_to_save": (["lm_head"], r"modules_to_save = \['lm_head'\] is not supported"),
    "alora_invocation_tokens": ([5, 6], r"alora_invocation_tokens = \[5, 6\] is not supported"),
    "layer_replication": ([[0, 1], [0, 2]], "layer_replication"),
    "init_lora_weights": ("pissa", "init_lora_weights = 'pissa' belongs to a changed base model"),
}


@pytest.fixture
def good_adapter(tiny_folder, tmp_path):
    """(shape, adapter folder to spoil)."""
    model_args = read_model_args(tiny_folder(**FOLDERS["4 KV heads"]))
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    folder = write_adapter(
        tmp_path / "adapter",
        random_adapter(model_args, 3, targets),
        rank=3,
        alpha=5,
        targets=targets,
    )
    PeftAdapter(folder, model_args)
    return model_args, Path(folder)


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_named_with_their_file(good_adapter, name):
    model_args, folder = good_adapter
    spoil, message = BAD_TENSORS[name]
    save_file(
        {key: value.contiguous() for key, value in spoil(load_file(folder / TENSORS)).items()},
        folder / TENSORS,
    )
    with pytest.raises(ValueError, match=f"{folder / TENSORS}: .*{message}"):
        PeftAdapter(folder, model_args)


BAD_NUMBERS = [  # further values of these settings
    ("lora_alpha", float("nan"), "lora_alpha is nan, and the scale"),
    ("alpha_pattern", {"q_proj": 0}, "{'q_proj': 0}, and must be numbers above 0"),
    ("alpha_pattern", {"q_proj": float("inf")}, "{'q_proj': inf}, and must be numbers above 0"),
    ("layers_to_transform", "0", "layers_to_transform is '0', and must be a number or a list"),
]


@pytest.mark.parametrize(
    "setting, value, message",
    [(setting, *bad) for setting, bad in BAD_SETTINGS.items()] + BAD_NUMBERS,
)
def test_settings_that_plain_lora_cannot_represent(good_adapter, setting, value, message):
    model_args, folder = good_adapter
    (folder / CONFIG).write_text(
        json.dumps(json.loads((folder / CONFIG).read_text()) | {setting: value})
    )
    with pytest.raises(ValueError, match=f"{folder}/adapter_.*: .*{message}"):
        PeftAdapter(folder, model_args)


@pytest.mark.parametrize("start", ["eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone(good_adapter, start):
    model_args, folder = good_adapter
    config = json.loads((folder / CONFIG).read_text()) | {"init_lora_weights": start}
    (folder / CONFIG).write_text(json.dumps(config))
    assert PeftAdapter(folder, model_args).rank == 3


def test_files_that_are_missing_or_broken(good_adapter):
    model_args, folder = good_adapter
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{folder / TENSORS}: not a complete safetensors file"):
        PeftAdapter(folder, model_args)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError,
        match=f"{folder}: no {TENSORS}; .*adapter_model.bin is a pickle and is not read",
    ):
        PeftAdapter(folder, model_args)
    (folder / TENSORS).write_bytes(whole)
    for text, message in (("{", "not JSON"), ("[]", "not the settings of an adapter")):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=f"{folder / CONFIG}: {message}"):
            PeftAdapter(folder, model_args)
    (folder / CONFIG).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{folder}: no {CONFIG}; expected a PEFT adapter folder"
    ):
        PeftAdapter(folder, model_args)


def test_folders_that_are_near_an_adapters(good_adapter, tmp_path):
    model_args, folder = good_adapter
    run = tmp_path / "run"
    for step in (9, 10):
        shutil.copytree(folder, run / f"checkpoint-{step}")
    for given, way_out in (
        (run, f"; {run}/checkpoint-10 is one"),
        (folder / TENSORS, f"; this is a file: give {folder}"),
        ("someone/adapter", " on this machine (nothing is downloaded)"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            PeftAdapter(given, model_args)
        assert str(error.value) == f"{given}: no {CONFIG}; expected a PEFT adapter folder{way_out}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_where_they_are_read(good_adapter, value):
    model_args, folder = good_adapter
    tensors = load_file(folder / TENSORS)
    tensors[f"{E3}.lora_B.weight"][3, 1] = value
    save_file(tensors, folder / TENSORS)
    adapter = PeftAdapter(folder, model_args)
    with pytest.raises(ValueError, match=f"{TENSORS}: tensor {E3}.lora_B.weight has numbers that"):
        adapter.tensor(f"{E3}.lora_B.weight")


def test_untrained_lora_on_the_towers_and_the_talker_is_passed_over(good_adapter):
    """PEFT puts it there for bare names; its lora_B is zero, so nothing is lost."""
    model_args, folder = good_adapter
    idle = {}
    for linear in (
        "thinker.audio_tower.layers.0.self_attn.q_proj",
        "talker.model.layers.0.mlp.experts.base_layer",
    ):
        idle |= {
            f"base_model.model.{linear}.lora_A.weight": torch.ones(3, 3),
            f"base_model.model.{linear}.lora_B.weight": torch.zeros(3, 3),
        }
    save_file(load_file(folder / TENSORS) | idle, folder / TENSORS)
    assert PeftAdapter(folder, model_args).targets == [
        "q_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_adapters_of_half_precision_load(good_adapter):
    """PEFT may save bf16 or fp16: the values are taken as they are."""
    model_args, folder = good_adapter
    tensors = load_file(folder / TENSORS)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / TENSORS)
    name = f"{Q0}.lora_B.weight"
    values, scale = PeftAdapter(folder, model_args).tensor(name)
    assert (
        values.dtype == torch.float32
        and torch.equal(values, tensors[name].bfloat16().float())
        and scale == 5 / 3
    )


def test_lora_on_talker_and_vocoder_is_left_out_in_words(good_adapter):
    """PEFT puts it there for bare names, and a training of the whole model may have moved it."""
    model_args, folder = good_adapter
    names = [
        f"base_model.model.talker.model.layers.0.self_attn.q_proj.lora_{side}.weight"
        for side in "AB"
    ]
    save_file(
        load_file(folder / TENSORS) | {name: torch.ones(3, 3) for name in names}, folder / TENSORS
    )
    adapter = PeftAdapter(folder, model_args)
    assert sorted(adapter.outside) == names and adapter.targets == [
        "q_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    with pytest.raises(
        ValueError, match="talker.*lora_[AB].weight and 1 more are not LoRA on the thinker"
    ):
        refuse_outside(adapter)


def test_a_rank_that_the_tensors_do_not_have(good_adapter):
    model_args, folder = good_adapter
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": 64}))
    with pytest.raises(
        ValueError, match="q_proj.lora_A.weight has rank 3, and adapter_config.json says 64"
    ):
        PeftAdapter(folder, model_args)
    (folder / CONFIG).write_text(json.dumps(config | {"r": 64, "rank_pattern": {"q_proj": 3}}))
    PeftAdapter(folder, model_args)
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": {"(": 3}}))
    with pytest.raises(ValueError, match="rank_pattern '\\(' is no regular expression"):
        PeftAdapter(folder, model_args)
