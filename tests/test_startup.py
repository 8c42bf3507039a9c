"""A Transformer Engine that is installed and does not import ends a run with its reason, and the
doctor tells it; what needs no model is answered before torch is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_gkd.startup import (
    import_problem,
    keep_compiled_kernels,
    transformer_engine_usable,
)
from tests.sizes import SMALLEST

REPOSITORY = Path(__file__).parents[1]
PROBLEM = (
    "Transformer Engine is installed and cannot be imported (libcublas.so.13: no such file): "
    "install the build for"
)


def test_compiled_kernels_stay_where_triton_puts_them(monkeypatch):
    """Torch's compiler moves them only where the variable is unset; a user's own is kept."""
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    expected = knobs.cache.dir
    keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == expected
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


@pytest.fixture
def broken(tmp_path):
    """A folder with such a package."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(
        "raise OSError('libcublas.so.13: no such file')"
    )
    return tmp_path


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="a sound one is installed"
)
def test_it_is_refused(broken, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert not transformer_engine_usable(gpu) and import_problem() == ""
    monkeypatch.syspath_prepend(broken)
    assert not transformer_engine_usable(cpu) and import_problem().startswith(PROBLEM)
    with pytest.raises(ValueError) as error:
        transformer_engine_usable(gpu)
    assert str(error.value).startswith(PROBLEM)


def run(module, broken, *flags):
    environment = os.environ | {"PYTHONPATH": f"{broken}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-m", module, *flags]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_run_ends_in_a_line(broken):
    """megatron-core imports it on CPU too, so this comes before anything is read."""
    done = run("megatron_gkd.train", broken, "--model", "m", "--dataset", "d", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith(f"megatron_gkd: error: {PROBLEM}")
        and "pip uninstall transformer-engine" in line
    )


def test_the_doctor_goes_on(broken):
    done = run("megatron_gkd.doctor", broken)
    assert done.returncode == 0, done.stderr
    assert f"  error: {PROBLEM}" in done.stdout and "Optional packages" in done.stdout


SLOW = {"datasets", "megatron", "numpy", "torch", "transformers"}


def imports(*command) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What `python -m COMMAND` did, and the packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "command, status, says",
    [
        (["megatron_gkd.train", "--help"], 0, "--tensor_model_parallel_size"),
        (["megatron_gkd.train", "--modl", "m"], 2, "--modl is not a setting; the nearest is"),
        (["megatron_gkd.train", "--model", "m"], 2, "required: --dataset"),
        (
            ["megatron_gkd.plan", "--check", "--gpus", "4"],
            0,
            "Layout: 4 ranks = TP 1 x PP 1 x DP 4",
        ),
        (["checkpoint_tools.hf_to_megatron", "--help"], 0, "--expert_model_parallel_size"),
        (["checkpoint_tools.megatron_to_hf", "--output", "d"], 2, "required: --checkpoint"),
        (["checkpoint_tools.merge_lora", "--outptu", "d"], 2, "the nearest is --output"),
        (["checkpoint_tools.lower_rank", "--help"], 0, "--lora_rank"),
        (["checkpoint_tools.verify", "--quick", "--hf_model", "m"], 2, "nothing to compare"),
        (["checkpoint_tools.make_tiny_model", "--help"], 0, "--tower_steps"),
        (
            ["checkpoint_tools.make_tiny_model", "--output", "d", "--family", "llama"],
            2,
            "--family llama: choose one of qwen3_moe, qwen3_omni",
        ),
    ],
    ids=lambda value: " ".join(value).partition(".")[2] if isinstance(value, list) else "",
)
def test_an_answer_before_the_slow_imports(tiny_folder, command, status, says):
    if "--gpus" in command:
        command = [*command, "--model", tiny_folder(**SMALLEST), "--dataset", "d"]
    done, packages = imports(*command)
    assert done.returncode == status and says in done.stdout + done.stderr
    assert command[0].split(".")[0] in packages and packages & SLOW == set()


@pytest.mark.parametrize(
    "tool, ends",
    [
        ("hf_to_megatron", "Hugging Face folder -> Megatron checkpoint."),
        ("megatron_to_hf", "Megatron checkpoint -> Hugging Face."),
        ("merge_lora", "the adapter added to the weights."),
        ("lower_rank", "a lower rank."),
        ("verify", "is it the same model?"),
        ("make_tiny_model", "a small model folder in the hub's format."),
    ],
)
def test_help_says_what_a_tool_does_in_a_whole_sentence(tool, ends):
    command = [sys.executable, "-m", f"checkpoint_tools.{tool}", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    _usage, description, *_ = done.stdout.split("\n\n")
    assert " ".join(description.split()).endswith(ends)


def test_the_slow_imports_are_seen():
    _, packages = imports("demo.speech_data", "--help")
    assert "numpy" in packages
