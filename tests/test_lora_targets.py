"""Which linears get LoRA, how many parameters that is, and what the run says about them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.adapters import resolve
from megatron_gkd.config import flag_targets, parse_config
from megatron_gkd.lora.adapter import applied
from megatron_gkd.lora.apply import banner, count_parameters
from megatron_gkd.lora_targets import describe_targets, parse_layers, resolve_targets
from megatron_gkd.model.args import read_model_args
from tests.adapters import ALL, ATTENTION, random_adapter, write_adapter
from tests.lora_runs import FOLDERS


def test_parameter_count_of_the_real_model():
    """Qwen3-Omni-30B-A3B's thinker, and LoRA's r (d_in + d_out) a linear."""
    model_args = REAL_SHAPE.model_args()
    attention = (2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)
    experts = 128 * 3 * (2048 + 768)
    norms, router = 2 * 2048 + 2 * 128, 128 * 2048
    layer = 2048 * (4096 + 512 + 512) + 4096 * 2048 + router + norms + 128 * 3 * 2048 * 768
    base = 48 * layer + 2 * 152064 * 2048 + 2048
    assert base == 30_532_646_912
    assert count_parameters(model_args, 8, ALL) == (
        48 * 8 * (attention + experts),
        base + 48 * 8 * (attention + experts),
    )
    assert count_parameters(model_args, 16, ATTENTION) == (
        48 * 16 * attention,
        base + 48 * 16 * attention,
    )
    assert count_parameters(model_args, 1, ["k_proj", "down_proj"])[0] == 48 * (2560 + 128 * 2816)


def test_banner():
    assert banner(150_994_944, 30_573_527_040) == (
        "Using shared base model architecture:\n"
        "  - Student model: base_model + LoRA (trainable)\n"
        "  - Teacher model: base_model with LoRA disabled (frozen)\n"
        "trainable params: 150,994,944 (0.49% of 30,573,527,040)"
    )


def test_a_model_without_lora_is_refused():
    with pytest.raises(
        ValueError,
        match="requires the model to have LoRA adapters.*--lora_target_modules.*--adapter DIR",
    ):
        applied(torch.nn.Linear(2, 2))


@pytest.fixture
def model_args(tiny_folder):
    return read_model_args(tiny_folder(**FOLDERS["4 KV heads"]))


def test_lm_head_is_for_untied_models(model_args):
    config = parse_config(
        ["--model", "m", "--dataset", "d", "--lora_target_modules", "q_proj,lm_head"]
    )
    place = SimpleNamespace(device=torch.device("cpu"), pp_size=1)
    assert resolve(config, model_args, place)[0].lora.lora_target_modules == ["q_proj", "lm_head"]
    with pytest.raises(
        ValueError,
        match="q_proj,lm_head: the lm_head of this model is its embedding .* leave lm_head out",
    ):
        resolve(config, replace(model_args, tie_word_embeddings=True), place)


def test_names_of_linears(model_args):
    names = lambda *words: resolve_targets(words, model_args)
    assert names("ALL") == names("all-linear") == ALL
    assert names("up_proj", "q_proj", "up_proj") == ["q_proj", "up_proj"]
    assert names("lm_head", "q_proj") == ["q_proj", "lm_head"] and "lm_head" not in names("ALL")
    assert names("lm_head") == ["lm_head"]
    assert names("layers.1.self_attn.v_proj", "0.up_proj") == ["1.v_proj", "0.up_proj"]
    assert names("self_attn.k_proj", "0.k_proj") == ["k_proj"]
    with pytest.raises(
        ValueError,
        match="--lora_target_modules q_proj,qkv_proj: qkv_proj is no linear .* some of q_proj",
    ):
        names("q_proj", "qkv_proj")
    with pytest.raises(ValueError, match=r"\(nothing\)"):
        names()


EXPRESSIONS = {  # of a model with two layers and eight experts -> its targets
    r".*\.layers\.0\.self_attn\.[qv]_proj": ["0.q_proj", "0.v_proj"],
    r"^(thinker\.model(?=\.).*\.(q_proj|gate_proj))$": ["q_proj", "gate_proj"],
    r"model\.layers\.1\.mlp\.experts\.\d+\.down_proj|lm_head": [
        "1.down_proj",
        "lm_head",
    ],
    r"model\.language_model\.layers\.\d\.self_attn\.o_proj": ["o_proj"],
}
REFUSED = {
    r".*\.(gate|q_proj)": "matches model.layers.0.mlp.gate, the router",
    r".*experts\.[3-7]\.up_proj": "matches up_proj of expert 3 in layer 0 and not of expert 0",
    r"q_proj.*": "matches no linear of the decoder; .* such as "
    r"thinker.model.layers.0.self_attn.q_proj or thinker.model.layers.0.mlp.experts.0.up_proj",
    r".*(q_proj|proj1)": "matches thinker.audio_tower.proj1, which cannot carry LoRA",
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_regular_expression_matches_whole_paths(model_args, expression):
    """As in PEFT; resolved targets are understood again, as a run.json or a checkpoint has them."""
    found = resolve_targets([expression], model_args)
    assert found == EXPRESSIONS[expression] == resolve_targets(found, model_args)


@pytest.mark.parametrize("expression", REFUSED)
def test_what_an_expression_must_not_match(model_args, expression):
    with pytest.raises(ValueError, match=f"^--lora_target_modules .*{REFUSED[expression]}"):
        resolve_targets([expression], model_args)


def test_flags_of_expressions_and_layers(model_args):
    flags = ["--model", "m", "--dataset", "d"]
    lora = lambda *more: parse_config([*flags, *more]).lora
    targets = lambda *more: flag_targets(lora(*more), model_args)
    assert targets("--lora_layers", "last", "1", "--target_modules", "q_proj,lm_head") == [
        "1.q_proj",
        "lm_head",
    ]
    assert targets("--layers_to_transform", "0-1") == ALL
    assert targets("--lora_layers", "0") == [f"0.{name}" for name in ALL]
    # commas and spaces of an expression are its own
    assert targets("--lora_target_modules", r".*layers\.\d{1,2}\.self_attn\.(q|k)_proj") == ALL[:2]
    for words, message in (
        (["--lora_layers", "0-2"], "--lora_layers 0-2: layer 2, and the model has 2 .0 to 1."),
        (["--lora_layers", "last 3"], "last 3: must be 1 or more of the model's 2 layers"),
        (["--lora_layers", "3-1"], "'3-1' is no layer; give numbers and ranges"),
        (["--lora_layers", ""], "--lora_layers '': names no layer; leave it out for all"),
        (
            ["--lora_layers", "0", "--target_modules", ".*q_proj"],
            "layers 0: must be left out",
        ),
        (["--target_modules", "(.*q_proj"], "or a regular expression .missing \\)"),
    ):
        with pytest.raises(ValueError, match=message):
            targets(*words)
    assert parse_layers(["0-11,", "24"]) == [*range(12), 24]


@pytest.mark.parametrize("given, of_run", [(True, False), (False, True), (True, True)])
@pytest.mark.usefixtures("world_of_one")
def test_the_scale_survives_rslora_and_a_higher_rank(model_args, tmp_path, given, of_run):
    """Of an adapter that goes on: with rsLoRA alpha / sqrt(r), which it keeps, else alpha / r."""
    tensors = random_adapter(model_args, 5, ["v_proj"])
    path = write_adapter(tmp_path, tensors, rank=5, alpha=7, targets=["v_proj"], use_rslora=given)
    place = SimpleNamespace(device=torch.device("cpu"), pp_size=1, rank=0, world_size=1)
    scale = 7 / (5**0.5 if given else 5)
    for rank in (5, 20):
        flags = ["--model", "m", "--dataset", "d", "--adapter", path, "--lora_rank", str(rank)]
        config = parse_config([*flags, *(["--use_rslora"] if of_run else [])])
        lora = resolve(config, model_args, place)[0].lora
        assert lora.use_rslora and lora.lora_target_modules == ["v_proj"]
        assert lora.alpha / rank**0.5 == pytest.approx(scale)
        assert lora.plain_alpha / rank == pytest.approx(scale)
        assert rank != 5 or not given or lora.alpha == 7, "exactly, for a resumed run"


@pytest.mark.usefixtures("world_of_one")
def test_flags_that_leave_no_linear(model_args, tmp_path):
    tensors = {k: v for k, v in random_adapter(model_args, 2, ["v_proj"]).items() if "s.0." in k}
    path = write_adapter(tmp_path, tensors, rank=2, alpha=4, targets=["v_proj"])
    place = SimpleNamespace(device=torch.device("cpu"), pp_size=1, rank=0, world_size=1)
    config = parse_config(
        ["--model", "m", "--dataset", "d", "--adapter", path, "--lora_layers", "1"]
    )
    with pytest.raises(ValueError, match="--lora_layers 1 leaves the decoder no linear with LoRA"):
        resolve(config, model_args, place)


@pytest.mark.parametrize(
    "flag", ["adapter", "teacher_adapter", "resume_from_checkpoint", "teacher_template"]
)
def test_an_empty_text_is_no_path(flag):
    """A variable of the shell that is not set would start from nothing, silently."""
    with pytest.raises(ValueError, match=f"--{flag} '': must be a path, or left out"):
        parse_config(["--model", "m", "--dataset", "d", f"--{flag}", ""])


def test_targets_in_words():
    assert describe_targets(["q_proj", "0.v_proj", "1.v_proj", "4.v_proj", "lm_head"]) == (
        "q_proj, v_proj (layers 0-1, 4), lm_head"
    )
