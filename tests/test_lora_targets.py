"""Which linears get LoRA, how many parameters that is, and what the run says about them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.adapters import resolve
from megatron_gkd.config import parse_config
from megatron_gkd.lora.adapter import applied, resolve_targets
from megatron_gkd.lora.apply import banner, count_parameters
from megatron_gkd.model.args import read_model_args
from tests.adapters import ALL, ATTENTION
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


def test_lm_head_is_for_untied_models_and_not_alone(tiny_folder):
    config = parse_config(
        ["--model", "m", "--dataset", "d", "--lora_target_modules", "q_proj,lm_head"]
    )
    model_args = read_model_args(tiny_folder(**FOLDERS["4 KV heads"]))
    place = SimpleNamespace(device=torch.device("cpu"), pp_size=1)
    assert resolve(config, model_args, place)[0].lora.lora_target_modules == ["q_proj", "lm_head"]
    with pytest.raises(
        ValueError,
        match="q_proj,lm_head: the lm_head of this model is its embedding .* leave lm_head out",
    ):
        resolve(config, replace(model_args, tie_word_embeddings=True), place)
    alone = replace(config, lora=replace(config.lora, lora_target_modules=["lm_head"]))
    with pytest.raises(
        ValueError,
        match="lm_head alone leaves the stages before the last nothing to train: "
        ".*size 2 must be 1",
    ):
        resolve(alone, model_args, SimpleNamespace(device=torch.device("cpu"), pp_size=2))


def test_names_of_linears():
    assert resolve_targets(["ALL"]) == resolve_targets(["all-linear"]) == ALL
    assert resolve_targets(["up_proj", "q_proj", "up_proj"]) == ["q_proj", "up_proj"]
    assert resolve_targets(["lm_head", "q_proj"]) == [
        "q_proj",
        "lm_head",
    ] and "lm_head" not in resolve_targets(["ALL"])
    assert resolve_targets(["lm_head"]) == ["lm_head"]
    with pytest.raises(
        ValueError, match="--lora_target_modules q_proj,qkv_proj: choose ALL, or some of q_proj"
    ):
        resolve_targets(["q_proj", "qkv_proj"])
    with pytest.raises(ValueError, match=r"\(nothing\)"):
        resolve_targets([])
