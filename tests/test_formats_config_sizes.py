"""What config.json states against what the weights' headers have: every size, of the decoder in
both formats of folders and of the towers; fields of another type or range; links that lead nowhere.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_gkd.data.chat import read_stop_token_ids
from megatron_gkd.families import families
from megatron_gkd.formats.loading import check_headers
from megatron_gkd.formats.sources import open_source
from megatron_gkd.lora.peft_config import CONFIG, TENSORS
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.media.positions import MediaTokenIds
from megatron_gkd.model.args import read_model_args
from tests.adapters import ALL, random_adapter, write_adapter
from tests.conversions import to_megatron
from tests.sizes import SMALLEST
from tests.test_train import error_of_run
from tests.train_runs import arguments, make_rows, write_rows

EXPERTS = "mlp.experts.experts.linear_fc1.weight"
LAYER = "thinker.model.layers.0."
EMBEDDING = "thinker.model.embed_tokens.weight"
TOWERS = families()["qwen3_omni"].towers
# setting -> (value, tensor in a Hugging Face folder, its shape, tensor in a Megatron checkpoint)
DECODER = {
    "hidden_size": (2**31, EMBEDDING, [503, 32], "linear_qkv.layer_norm_weight"),
    "vocab_size": (2**31, EMBEDDING, [503, 32], "word_embeddings.weight"),
    "head_dim": (16, f"{LAYER}self_attn.q_norm.weight", [8], "q_layernorm.weight"),
    "num_attention_heads": (8, f"{LAYER}self_attn.q_proj.weight", [32, 32], "linear_proj.weight"),
    "num_key_value_heads": (1, f"{LAYER}self_attn.k_proj.weight", [16, 32], "linear_qkv.weight"),
    "num_experts": (10**6, f"{LAYER}mlp.gate.weight", [4, 32], "mlp.router.weight"),
    "moe_intermediate_size": (2**31, f"{LAYER}mlp.experts.0.gate_proj.weight", [16, 32], EXPERTS),
    "num_hidden_layers": (
        1000,
        "thinker.model.layers.1.input_layernorm.weight",
        [32],
        "linear_qkv.layer_norm_weight",
    ),
}
SIZES_OF_TOWERS = [
    (tower, setting)
    for tower in TOWERS
    for setting in dict.fromkeys([*(place.setting for place in tower.in_weights), *tower.counts])
]


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return Path(tiny_folder(**SMALLEST))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sizes") / "checkpoint"
    to_megatron(folder, output)
    check_headers(output, read_model_args(output))
    return output


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    tensors = random_adapter(read_model_args(folder), 2, ALL)
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    return Path(write_adapter(path, tensors, rank=2, alpha=4, targets=ALL))


def copy_of(folder: Path, copy: Path) -> Path:
    """The folder's files by links, as in the hub's cache, but for a config.json of its own."""

    def link(source: str, target: str) -> None:
        Path(target).symlink_to(source)

    shutil.copytree(folder, copy, copy_function=link)
    (copy / "config.json").unlink()
    shutil.copy(folder / "config.json", copy / "config.json")
    return copy


def change(folder: Path, section: str, **settings) -> None:
    """Settings of a section of the thinker's."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    thinker = config.get("thinker_config", config)
    (thinker[section] if section else thinker).update(settings)
    path.write_text(json.dumps(config))


def refusal(function, *args) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        function(*args)
    said = str(error.value)
    assert "\n" not in said and len(said) < 900
    return said


def opened(folder: Path) -> None:
    """As the training command opens a folder."""
    check_headers(folder, read_model_args(folder))


@pytest.mark.parametrize("setting", DECODER)
def test_sizes_of_the_decoder(folder, checkpoint, tmp_path, setting):
    """The setting and its value, and the tensor that has another shape; nothing is listed or built
    by the number that the file claims.
    """
    value, tensor, shape, key = DECODER[setting]
    copy = copy_of(folder, tmp_path / "model")
    opened(copy)
    change(copy, "text_config", **{setting: value})
    for said in (refusal(opened, copy), refusal(open_source, copy, None, "test")):
        assert said.startswith(f"{copy / 'config.json'}: text_config.{setting} is ")
        assert f"{setting} is {value}" in said.replace(",", "")
        assert f"tensor {tensor}" in said and f"{shape}" in said
        assert f"{copy / 'model.safetensors'}" in said
    copy = copy_of(checkpoint, tmp_path / "checkpoint")
    opened(copy)
    change(copy, "text_config", **{setting: value})
    said = refusal(opened, copy)
    assert said.startswith(f"{copy / 'config.json'}: text_config.{setting} is {value}")
    assert f"{key}, and its shape in {copy / 'release' / '.metadata'} is [" in said


def test_a_size_whose_tensor_is_missing(folder, tmp_path):
    """The tensor is named; no tensor is listed by the number that nothing shows to be right."""
    copy = copy_of(folder, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    tensors = load_file(folder / "model.safetensors")
    gate = f"{LAYER}mlp.gate.weight"
    del tensors[gate]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    change(copy, "text_config", num_experts=10**5)
    assert f"the folder misses tensor {gate} (sizes" in refusal(opened, copy)


@pytest.mark.parametrize("tower, setting", SIZES_OF_TOWERS, ids=lambda of: getattr(of, "name", of))
def test_sizes_of_towers(folder, checkpoint, tmp_path, tower, setting):
    for number, source in enumerate((folder, checkpoint)):
        copy = copy_of(source, tmp_path / str(number))
        stated = tower.sizes(json.loads((copy / "config.json").read_text())["thinker_config"])[
            setting
        ]
        value = stated[:-1] if isinstance(stated, list) else 2 * stated
        name = tower.aliases.get(setting, setting)
        change(copy, tower.config, **{setting: stated, name: stated})
        opened(copy)
        change(copy, tower.config, **{setting: stated, name: value})  # the alias wins
        said = refusal(opened, copy)
        stated = f"{value}, of length {len(value)}" if isinstance(value, list) else f"{value}"
        said = said.replace(f"{value:,}", f"{value}") if isinstance(value, int) else said
        assert said.startswith(f"{copy / 'config.json'}: {tower.config}.{name} is {stated}, ")
        assert f"tensor thinker.{tower.name}." in said and "shape" in said


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
def test_sizes_of_towers_under_other_names_or_none(folder, tmp_path, tower):
    """As transformers reads them: the alias alone is enough, and null is left out."""
    path = tmp_path / "config.json"
    config = json.loads((folder / "config.json").read_text())
    section = config["thinker_config"][tower.config]
    stated = tower.sizes(config["thinker_config"])
    for name, alias in tower.aliases.items():
        section.pop(name, None)
        section[alias] = stated[name]
    found = tower.sizes(config["thinker_config"])
    assert [found[name] for name in tower.defaults] == [stated[name] for name in tower.defaults]
    section |= dict.fromkeys(tower.aliases.values(), None)
    section[tower.num_layers] = 0  # none: a run on text alone has no use for them
    path.write_text(json.dumps(config))
    read_model_args(tmp_path)
    del section[tower.num_layers]
    found = tower.sizes(config["thinker_config"])
    assert all(found[name] == tower.defaults[name] for name in tower.aliases)


def test_heads_that_are_derived(folder, tmp_path):
    """Without head_dim, the number of heads says how wide one is."""
    copy = copy_of(folder, tmp_path / "model")
    change(copy, "text_config", head_dim=None)
    opened(copy)
    change(copy, "text_config", num_attention_heads=8, num_key_value_heads=2)
    said = refusal(opened, copy)
    assert "text_config.num_attention_heads is 8, which asks for 4 numbers" in said


def test_sizes_under_another_spelling(tiny_folder, tmp_path):
    copy = copy_of(Path(tiny_folder(family="qwen3_moe", **SMALLEST)), tmp_path / "model")
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config.pop("num_experts", None)
    path.write_text(json.dumps(config | {"num_local_experts": 10**6}))
    assert "config.json: num_local_experts is 1000000, which asks" in refusal(opened, copy)


def test_modules_of_the_other_models(folder, tmp_path):
    """transformers would build them one by one."""
    copy = copy_of(folder, tmp_path / "model")
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["talker_config"]["text_config"]["num_hidden_layers"] = 10**9
    path.write_text(json.dumps(config))
    said = refusal(open_source, copy, None, "test")
    assert "talker_config.text_config.num_hidden_layers is 1000000000, and must be" in said


NO_SIZE = (None, "32", -1, math.nan, math.inf, 0, 1.5, True, {"a": 1}, [32], 10**400)
NO_NUMBER = (None, "1e-6", -1, math.nan, math.inf, 0, True, {}, [1.0], 10**400)
NO_TRUTH = ("true", 1, math.nan, {}, [True])
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
SIZES += ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "vocab_size")
FIELDS = {("text_config", name): NO_SIZE for name in SIZES}
FIELDS |= {("text_config", name): NO_NUMBER for name in ("rms_norm_eps", "rope_theta")}
FIELDS |= {
    ("text_config", name): (*NO_TRUTH, None) for name in ("norm_topk_prob", "attention_bias")
}
FIELDS |= {
    ("text_config", "use_sliding_window"): NO_TRUTH,
    ("", "tie_word_embeddings"): (*NO_TRUTH, None),
    ("text_config", "head_dim"): (*NO_SIZE[1:], 7),
    ("text_config", "attention_dropout"): (*NO_NUMBER[:5], *NO_NUMBER[6:]),
    ("text_config", "hidden_act"): (None, 1, ["silu"], {}),
    ("text_config", "mlp_only_layers"): (0, "[]", {}, math.nan),
    ("text_config", "decoder_sparse_step"): (None, "1", -1, math.nan, True, {}, []),
    ("text_config", "sliding_window"): ("1", -1, math.nan, True, {}, []),
    ("text_config", "rope_scaling"): ("default", [1], 3, {"rope_theta": math.nan}),
}
FIELDS |= {
    (tower.config, name): (*NO_SIZE[1:],) if isinstance(default, int) else (1, "[0]", [-1])
    for tower in TOWERS
    for name, default in (tower.defaults | {of: 1 for of in tower.aliases.values()}).items()
}
FIELDS |= {
    (tower.config, name): [value for value in NO_SIZE[1:] if value != 0]
    for tower in TOWERS
    for name in (tower.num_layers, tower.aliases[tower.num_layers])
}


@pytest.mark.parametrize("section, field", FIELDS)
def test_fields_of_another_type_or_range(folder, tmp_path, section, field):
    for value in FIELDS[section, field]:
        shutil.copy(folder / "config.json", tmp_path / "config.json")
        if field == "rope_theta":
            change(tmp_path, section, rope_scaling=None, rope_parameters=None)
        for tower in TOWERS:
            if tower.config == section and field in tower.aliases:
                change(tmp_path, section, **{tower.aliases[field]: None})  # it would win
        change(tmp_path, section, **{field: value})
        said = refusal(read_model_args, tmp_path)
        named = f"{section}.{field}" if section else field
        assert said.startswith(f"{tmp_path / 'config.json'}: {named}"), value
        assert len(said) < 400


@pytest.mark.parametrize(
    "section", [[2, 2], [1, True, 1], ["2", 1, 1], [-1, 2, 2], [1, 1, 2**40], None, {}]
)
def test_sections_of_the_rotary_embedding(folder, tmp_path, section):
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    change(tmp_path, "text_config", rope_scaling={"mrope_section": section})
    assert "config.json: text_config.rope_scaling" in refusal(read_model_args, tmp_path)


@pytest.mark.parametrize("value", [-1, "7", 1.5, True, [1], 10**400])
@pytest.mark.parametrize("field", ["audio_token_id", "vision_end_token_id"])
def test_tokens_of_media(folder, tmp_path, field, value):
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    change(tmp_path, "", **{field: value})
    assert f"config.json: {field} is " in refusal(MediaTokenIds.read, tmp_path)


@pytest.mark.parametrize("value", [None, [], {}, 7, True, ["qwen3_omni_moe"]])
def test_a_type_of_model_that_is_no_text(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": value}))
    assert "config.json: model_type is " in refusal(read_model_args, tmp_path)


def test_a_config_that_is_not_utf_8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    assert str(tmp_path / "config.json") in refusal(read_model_args, tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "null", "[" * 100_000, '{"eos_token_id": {}}'])
def test_a_generation_config_that_is_none(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    assert str(tmp_path / "generation_config.json") in refusal(read_stop_token_ids, tmp_path)


def test_sections_that_are_none_end_no_response(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"thinker_config": 3, "text_config": [1]}))
    assert read_stop_token_ids(tmp_path) == []


# --- links ----------------------------------------------------------------------------------------

SAYS = {"gone": "removed, which is not there", "circle": "that leads in a circle"}


def break_link(path: Path, how: str) -> None:
    """Put a link that leads nowhere in the place of `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    target = path.with_name("other" if how == "circle" else "removed")
    path.symlink_to(target)
    if how == "circle":
        target.symlink_to(path)


FILES = ["", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
FILES += ["chat_template.jinja", "generation_config.json", "preprocessor_config.json"]


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("name", FILES)
def test_links_of_a_model_folder(folder, tmp_path, name, how):
    copy = copy_of(folder, tmp_path / "model")
    break_link(copy / name, how)
    said = refusal(opened, copy)
    assert f"{copy / name} is a link to " in said and SAYS[how] in said


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("name", ["release", "release/.metadata", "release/__0_0.distcp"])
def test_links_of_a_checkpoint(checkpoint, tmp_path, name, how):
    copy = copy_of(checkpoint, tmp_path / "model")
    break_link(copy / name, how)
    said = refusal(opened, copy)
    assert f"{copy / name} is a link to " in said and SAYS[how] in said


@pytest.mark.parametrize("how", SAYS)
def test_a_shard_that_is_a_link(tiny_folder, tmp_path, how):
    shards = Path(tiny_folder(**SMALLEST, max_shard_size="50KB"))
    copy = copy_of(shards, tmp_path / "model")
    last = sorted(copy.glob("*.safetensors"))[-1]
    break_link(last, how)
    assert f"{last} is a link to " in refusal(opened, copy)


@pytest.mark.parametrize("how", SAYS)
@pytest.mark.parametrize("name", ["", CONFIG, TENSORS])
def test_links_of_an_adapter(folder, adapter, tmp_path, name, how):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    break_link(copy / name, how)
    said = refusal(PeftAdapter, copy, read_model_args(folder))
    assert f"{copy / name} is a link to " in said and SAYS[how] in said


def test_a_link_that_nothing_reads_is_left_alone(folder, tmp_path):
    copy = copy_of(folder, tmp_path / "model")
    (copy / "pytorch_model.bin").symlink_to(tmp_path / "removed")
    (copy / "README.md").symlink_to(tmp_path / "removed")
    (copy / "notes.txt").symlink_to(tmp_path / "removed")
    opened(copy)


# --- the training command -------------------------------------------------------------------------


def test_a_run_says_it_before_its_data_are_read(folder, tmp_path):
    """On every rank, with exit status 2: the rows could not be read either."""
    copy = copy_of(folder, tmp_path / "model")
    change(copy, "text_config", num_experts=10**6)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("no row\n")
    error = error_of_run(2, arguments(model=copy, dataset=rows, output_dir=tmp_path, max_steps=1))
    assert "text_config.num_experts is 1000000, which asks for 1,000,000 rows in tensor" in error
    assert "rows cannot be used" not in error


@pytest.mark.parametrize("flag, how", [("adapter", "gone"), ("teacher_adapter", "circle")])
def test_a_run_names_the_flag_of_an_adapter(folder, adapter, tmp_path, flag, how):
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    break_link(copy / TENSORS, how)
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    flags = {"model": folder, "dataset": rows, "output_dir": tmp_path / "out", flag: copy}
    error = error_of_run(1, arguments(max_steps=1, **flags))
    assert f"--{flag} {copy / TENSORS} is a link to " in error and SAYS[how] in error
