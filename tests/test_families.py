"""The families of models: found by their files, read without torch, with transformers' defaults."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3OmniMoeThinkerConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from megatron_gkd import families as package
from megatron_gkd.families import families, family_of, language_sections
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.lora.peft_names import peft_names
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.layers import InterleavedRotaryEmbedding
from tests.sizes import SMALLEST

REPOSITORY = Path(__file__).parents[1]
# config.json of the hub, as published; what is not named here does not shape the model.
HUB = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHAPES = {  # name -> (settings, parameters as published)
    "Qwen3-30B-A3B": (
        dict(
            num_hidden_layers=48,
            hidden_size=2048,
            num_attention_heads=32,
            moe_intermediate_size=768,
            intermediate_size=6144,
        ),
        30_532_122_624,
    ),
    "Qwen3-235B-A22B": (
        dict(
            num_hidden_layers=94,
            hidden_size=4096,
            num_attention_heads=64,
            moe_intermediate_size=1536,
            intermediate_size=12288,
        ),
        235_093_634_560,
    ),
}


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_each_file_is_a_family():
    files = {path.stem for path in (REPOSITORY / "megatron_gkd" / "families").glob("*.py")}
    assert set(families()) == files - {"__init__", "family"} == {"qwen3_moe", "qwen3_omni"}
    assert family_of("qwen3_omni_moe") is family_of("qwen3_omni_moe_thinker")
    assert family_of("qwen3_moe") is families()["qwen3_moe"]
    with pytest.raises(ValueError, match=r"'llama' is not .* \['qwen3_moe', 'qwen3_omni_moe'"):
        family_of("llama")


def test_only_its_file_names_a_family():
    """Neither the part of Qwen3-Omni that is trained nor transformers' classes are named where the
    code should serve every family.
    """
    words, found = re.compile(r"thinker|Qwen3\w*Moe\w+|modeling_qwen", re.IGNORECASE), []
    for package_name in ("megatron_gkd", "checkpoint_tools"):
        for path in sorted((REPOSITORY / package_name).rglob("*.py")):
            if path.parent.name != "families" and words.search(path.read_text()):
                found.append(str(path.relative_to(REPOSITORY)))
    assert found == []


def test_a_new_family_is_one_new_file(tmp_path, monkeypatch):
    (tmp_path / "qwen9_moe.py").write_text(
        "from dataclasses import replace\n"
        "from megatron_gkd.families.qwen3_moe import FAMILY as OTHER\n"
        "FAMILY = replace(OTHER, title='Qwen9', prefixes={'qwen9_moe': 'text.'}, section='nine',\n"
        "                 adapter_roots=('text.',))\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    for cached in (families, family_of):
        cached.cache_clear()
    try:
        folder = write_config(tmp_path / "model", {"model_type": "qwen9_moe", "nine": HUB})
        model_args = read_model_args(folder)
        names = decoder_tensors(replace(model_args, num_layers=1, num_experts=1))
        assert "text.model.layers.0.mlp.experts.0.up_proj.weight" in names
        assert model_args.family.adapter_layers == "base_model.model.text.model.layers."
        assert ("nine",) in language_sections()
    finally:
        for cached in (families, family_of):
            cached.cache_clear()
        sys.modules.pop("megatron_gkd.families.qwen9_moe", None)


@pytest.mark.parametrize("sizes", [{}, {"family": "qwen3_moe"}], ids=["omni", "text"])
def test_reading_sizes_imports_neither_torch_nor_transformers(tiny_folder, sizes):
    code = (
        "import sys; from megatron_gkd.model.args import read_model_args; "
        "print(read_model_args(sys.argv[1]).hidden_size); "
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, tiny_folder(**SMALLEST, **sizes)]
    assert subprocess.check_output(command, text=True, cwd=REPOSITORY) == "32\n[]\n"


@pytest.mark.parametrize(
    "model_type, config",
    [("qwen3_omni_moe", Qwen3OmniMoeThinkerConfig), ("qwen3_moe", Qwen3MoeConfig)],
)
def test_defaults_are_those_of_transformers(model_type, config):
    text = config().get_text_config()
    for name, default in family_of(model_type).text_defaults.items():
        if name == "rope_theta":
            assert text.rope_parameters["rope_theta"] == default
        elif name not in ("sliding_window", "use_sliding_window"):
            assert getattr(text, name, None) == default, name
    window = family_of(model_type).text_defaults
    assert (window["sliding_window"] if window["use_sliding_window"] else None) is None
    assert text.sliding_window is None


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes(tmp_path, name):
    settings, num_parameters = SHAPES[name]
    model_args = read_model_args(write_config(tmp_path / "model", HUB | settings))
    assert (model_args.prefix, model_args.family.towers) == ("", ())
    assert (model_args.num_layers, model_args.hidden_size, model_args.num_attention_heads) == (
        settings["num_hidden_layers"],
        settings["hidden_size"],
        settings["num_attention_heads"],
    )
    assert (model_args.num_key_value_heads, model_args.head_dim, model_args.num_experts) == (
        4,
        128,
        128,
    )
    assert (model_args.num_experts_per_tok, model_args.norm_topk_prob) == (8, True)
    assert (model_args.rope_theta, model_args.mrope_section) == (1e6, (64, 0, 0))
    assert not model_args.tie_word_embeddings
    sizes = decoder_tensors(model_args)
    assert sum(map(math.prod, sizes.values())) == num_parameters
    assert sizes["model.layers.2.mlp.experts.127.down_proj.weight"] == (
        settings["hidden_size"],
        settings["moe_intermediate_size"],
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(AutoConfig.from_pretrained(tmp_path / "model"))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_transformers_own_spelling_is_read_alike(tiny_folder, tmp_path):
    folder = tiny_folder(
        family="qwen3_moe",
        **SMALLEST,
        num_experts_per_tok=3,
        rope_theta=5e5,
        tie_word_embeddings=True,
        text_config={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
    )
    model_args = read_model_args(folder)
    assert (model_args.num_experts, model_args.num_experts_per_tok) == (4, 3)
    assert (model_args.rms_norm_eps, model_args.rope_theta) == (1e-5, 5e5)
    assert model_args.tie_word_embeddings and not model_args.norm_topk_prob
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_theta" not in saved
    assert read_model_args(tmp_path) == model_args


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mlp_only_layers=[1]), r"config.json: mlp_only_layers = \[1\] is not supported"),
        (dict(decoder_sparse_step=2), "config.json: decoder_sparse_step = 2 is not supported"),
        (dict(sliding_window=64, use_sliding_window=True), "sliding_window = 64 .* full attention"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type = 'yarn'"),
        (dict(rope_scaling={"rope_type": "mrope"}), "rope_type = 'mrope'"),
        (dict(rope_parameters={"full_attention": {}}), "one rotary embedding for all layers"),
        (dict(num_experts="128"), "num_experts is '128', and must be a whole number from 1"),
        (dict(norm_topk_prob=1), "norm_topk_prob is 1, and must be true or false"),
        (dict(hidden_size=None), "hidden_size is None, and must be a whole number from 1"),
        (dict(num_hidden_layers=True), "num_hidden_layers is True, and must be a whole number"),
        (dict(rope_theta=0), "rope_theta is 0, and must be a number above 0"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path, settings, message):
    config = HUB | SHAPES["Qwen3-30B-A3B"][0] | settings
    with pytest.raises(ValueError, match=message):
        read_model_args(write_config(tmp_path / "model", config))


def test_sections_cannot_matter_to_plain_rope(tmp_path):
    """Neither those of config.json nor positions that differ between the planes."""
    config = HUB | SHAPES["Qwen3-30B-A3B"][0] | {"head_dim": 16}
    config["rope_scaling"] = {"rope_type": "default", "mrope_section": [3, 3, 2]}
    model_args = read_model_args(write_config(tmp_path / "model", config))
    positions = torch.randint(0, 99, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    reference = Qwen3MoeRotaryEmbedding(
        Qwen3MoeConfig(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    )
    cos, sin = reference(torch.zeros(1), positions[0])
    embedding = InterleavedRotaryEmbedding(16, model_args.rope_theta)
    rotation = embedding(positions, list(model_args.mrope_section)).transpose(0, 1)
    for found, wanted in zip(rotation.unbind(2), (cos, sin)):
        torch.testing.assert_close(torch.cat((found, found), dim=-1), wanted)


@pytest.mark.parametrize(
    "family, root, others",
    [
        ("qwen3_omni", "base_model.model.thinker.", ["base_model.model."]),
        ("qwen3_moe", "base_model.model.", []),
    ],
)
def test_names_of_adapters(family, root, others):
    """Those that we write are read, those of another family are not."""
    found = families()[family]
    names = peft_names(found)
    assert found.adapter_root == root and found.adapter_layers == f"{root}model.layers."
    for start in (root, *others):
        match = names.linear.fullmatch(
            f"{start}model.layers.3.mlp.experts.5.up_proj.lora_A.default.weight"
        )
        linear = "3.mlp.experts.5.up_proj"
        assert match is not None and match.groups() == (linear, "A", "default")
        assert names.head.fullmatch(f"{start}lm_head.lora_B.weight")
        assert names.base_copy.fullmatch(f"{start}lm_head.base_layer.weight")
        assert names.fused.fullmatch(f"{start}model.layers.3.mlp.experts.lora_A.weight")
    inner = f"{root}model.language_model.layers.3.self_attn.q_proj.lora_A.weight"
    assert bool(names.linear.fullmatch(inner)) == (family == "qwen3_omni")
    tower = "base_model.model.audio_tower.layers.0.fc1.lora_A.weight"
    talker = "base_model.model.talker.model.layers.0.self_attn.q_proj.lora_A.weight"
    foreign = "base_model.model.thinker.model.layers.0.self_attn.q_proj.lora_A.weight"
    for pattern, name in ((names.tower, tower), (names.outside, talker), (names.linear, foreign)):
        assert bool(pattern.fullmatch(name)) == (family == "qwen3_omni")


def test_a_folder_without_a_model_names_the_families(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of Qwen3 MoE or Qwen3-Omni, or a checkp"):
        read_model_args(tmp_path)
    shutil.copy(REPOSITORY / "setup.py", tmp_path / "config.json")
    with pytest.raises(ValueError, match=str(tmp_path / "config.json")):
        read_model_args(tmp_path)


@pytest.mark.parametrize("value", ["false", 1, None, []])
def test_tied_embeddings_are_a_boolean(value, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(**SMALLEST), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("thinker_config", config)["tie_word_embeddings"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tie_word_embeddings is .*, and must be true or false"):
        read_model_args(folder)
