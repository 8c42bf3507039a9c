"""Recipes: what they set, what wins over them, what the run says of it; and that they are
installed.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_gkd.config import parse_config
from megatron_gkd.recipe import RECIPES, recipe_names
from megatron_gkd.responses import RolloutConfig

REPOSITORY = Path(__file__).parents[1]
REQUIRED = ["--model", "/m", "--dataset", "d"]


def values_of(argv):
    groups = parse_config(REQUIRED + argv).to_dict().values()
    return {name: value for group in groups for name, value in group.items()}


def test_there_are_four():
    assert recipe_names() == ["gkd", "on_policy", "opsd", "sdft"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_sets_what_it_says_and_names_its_source(name, capsys):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    (source,) = set(re.findall(r"arXiv:\d{4}\.\d{5}", text))
    assert text.startswith("#") and source in (REPOSITORY / "docs/recipes.md").read_text()
    given, values, defaults = yaml.safe_load(text), values_of(["--recipe", name]), values_of([])
    for setting, value in given.items():
        kind = type(values[setting])
        assert values[setting] == kind(value), setting
    others = {key: value for key, value in values.items() if key not in given}
    assert others == {key: defaults[key] for key in others} | {"recipe": name}
    # the papers' rollouts and softmaxes are sharper than the guide's, their rates higher
    assert values["temperature"] < defaults["temperature"]
    assert values["repetition_penalty"] == 1 and values["learning_rate"] >= 1e-4
    said = capsys.readouterr().out
    assert f"Settings from --recipe {name}: " in said and "Not from" not in said


def test_a_file_wins_over_a_recipe_and_flags_over_both(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 3e-5\nlora_rank: 16\ndataset: [a, b]\ntop_p: 0.8\n")
    argv = ["--recipe=opsd", "--config", str(path), "--lora-rank", "4", "--model", "/m"]
    config = parse_config([*argv, "--no_rollout_cuda_graphs"])
    assert (config.lora.lora_rank, config.lora.lora_alpha) == (4, 128)
    assert (config.train.learning_rate, config.distill.temperature) == (3e-5, 1.1)
    assert config.data.dataset == ["a", "b"] and config.run.recipe == "opsd"
    of_recipe, of_file, of_flags, vain = capsys.readouterr().out.splitlines()
    assert of_recipe.startswith(
        "Settings from --recipe opsd: divergence=forward_kl divergence_clip"
    )
    assert "learning_rate" not in of_recipe and "top_k=20" in of_recipe
    assert of_file == "Settings from --config: learning_rate=3e-5 dataset=a,b top_p=0.8"
    flags = f"recipe=opsd config={path} lora_rank=4 model=/m rollout_cuda_graphs=false"
    assert of_flags == f"Settings from flags: {flags}"
    expected = "learning_rate=2e-4 lora_rank=64 top_p=0.95"
    assert vain == f"Not from --recipe opsd, given elsewhere: {expected}"
    monkeypatch.setenv("RANK", "1")
    parse_config(argv)
    assert capsys.readouterr().out == ""


def test_a_config_file_may_name_the_recipe(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: sdft\nskip_first_tokens: 1\n")
    values = values_of(["--config", str(path)])
    assert (values["skip_first_tokens"], values["learning_rate"]) == (1, 5e-4)
    assert values_of(["--config", str(path), "--recipe", "gkd"])["learning_rate"] == 3e-4


def test_no_recipe_changes_nothing_and_says_nothing(capsys):
    values_of(["--learning_rate", "1e-4"])
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--recipe gdk: must be one of gkd, on_policy, opsd, sdft"):
        values_of(["--recipe", "gdk"])


# Of each setting of a recipe that is an option: the value without it.
OFF = dict(
    teacher_ema="none",
    divergence_clip="none",
    importance_clip="none",
    lora_rank="none",
    lora_alpha="none",
    skip_first_tokens="0",
    warmup_ratio="0",
    top_k="0",
    top_p="1",
    repetition_penalty="1",
    num_generations="1",
)
# Of the others every value is one of the method: a flag gives another.
METHOD = {
    *("divergence", "beta", "beta_convention", "temperature", "rollout_temperature", "lmbda"),
    *("learning_rate", "lr_scheduler_type", "max_completion_length"),
}


@pytest.mark.parametrize("name", recipe_names())
def test_each_setting_of_a_recipe_can_be_taken_back(name, tmp_path, capsys):
    """By a flag and in a file; what is left is the run without the recipe, and the run says so."""
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(given) <= set(OFF) | METHOD
    defaults = values_of([])
    default_of_method = {key: str(defaults[key]) for key in given if key in METHOD}
    off = {key: OFF[key] for key in given if key in OFF} | default_of_method
    flags = [word for key, value in off.items() for word in (f"--{key}", value)]
    without, taken_back = values_of(flags), values_of(["--recipe", name, *flags])
    assert taken_back == without | {"recipe": name}
    of_flags, vain = capsys.readouterr().out.splitlines()
    assert of_flags.startswith("Settings from flags: ") and vain.startswith("Not from --recipe")
    for key, value in off.items():
        assert f" {key}={value}" in of_flags and f" {key}={given[key]}" in vain
    path = tmp_path / "run.yaml"
    nulls = {key: None if value == "none" else value for key, value in off.items()}
    for in_file in (off, nulls):
        path.write_text(yaml.safe_dump(in_file))
        assert values_of(["--config", str(path), "--recipe", name]) == taken_back


def test_none_switches_a_number_off_without_a_recipe_too(tmp_path):
    for key in [key for key, value in OFF.items() if value == "none"] + ["loss_top_k"]:
        assert values_of([f"--{key}", "none"]) == values_of([f"--{key}=None"]) == values_of([])
        with pytest.raises(ValueError, match=rf"--{key}\S*: invalid (int|float) value: 'nine'"):
            values_of([f"--{key}", "nine"])
    with pytest.raises(ValueError, match="--temperature: invalid float value: 'none'"):
        values_of(["--temperature", "none"])
    path = tmp_path / "run.yaml"
    path.write_text("recipe: sdft\n")
    assert values_of(["--config", str(path), "--recipe", "none"]) == values_of([]) | {
        "recipe": "none"
    }


def test_a_teacher_adapter_needs_a_recipe_without_its_average():
    argv = ["--recipe", "sdft", "--teacher_adapter", "/t"]
    with pytest.raises(ValueError, match="set --teacher_ema none"):
        values_of(argv)
    assert values_of([*argv, "--teacher_ema", "none"])["teacher_adapter"] == "/t"


def test_sampling_that_is_not_the_policys():
    assert RolloutConfig().changed_sampling() == [
        "--top_p 0.9",
        "--top_k 50",
        "--repetition_penalty 1.1",
    ]
    off = dict(top_p=1, top_k=0, repetition_penalty=1)
    assert RolloutConfig(**off).changed_sampling() == []
    assert RolloutConfig(rollout_temperature=0, **off).changed_sampling() == [
        "--rollout_temperature 0"
    ]


def test_recipes_are_part_of_what_is_installed(tmp_path):
    """What setuptools puts into a wheel."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=550)
    installed = {path.stem for path in (tmp_path / "megatron_gkd/recipes").glob("*.yaml")}
    assert installed == set(recipe_names())
