"""The tools' command lines as a shell sees them: exit status 0 and a line, or 2 and one line that
says what is wrong.
"""

import contextlib
import multiprocessing
import runpy
import sys
import warnings

import pytest

from megatron_gkd.model.args import read_model_args
from tests.adapters import random_adapter, write_adapter
from tests.sizes import SMALLEST

SMALL = SMALLEST | dict(num_hidden_layers=1)


def run_tool(folder, tool, *flags):
    """`python -m checkpoint_tools.TOOL FLAGS` in a process of its own. -> exit status, stdout,
    stderr.
    """

    def run():
        with (
            open(folder / "stdout", "w") as out,
            open(folder / "stderr", "w") as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # runpy: the module is imported already
            sys.argv = [tool, *map(str, flags)]
            runpy.run_module(f"checkpoint_tools.{tool}", run_name="__main__", alter_sys=True)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A folder in which every tool has run, in turn: name -> what the command gave."""
    root = tmp_path_factory.mktemp("tools")
    model = tiny_folder(**SMALL)
    tensors = random_adapter(read_model_args(model), 2, ["q_proj"])
    adapter = write_adapter(root / "adapter", tensors, rank=2, alpha=4, targets=["q_proj"])
    sizes, untrained = (
        [f"--{name}={value}" for name, value in SMALL.items()],
        ["--train_steps=0", "--tower_steps=0"],
    )
    there = ["--hf_model", model, "--output", root / "checkpoint"]
    merged = [
        "--hf_model",
        model,
        "--adapter",
        adapter,
        "--weight",
        "0.5",
        "--output",
        root / "merged",
    ]
    lower = [
        "--hf_model",
        model,
        "--adapter",
        adapter,
        "--lora_rank",
        "1",
        "--output",
        root / "lower",
    ]
    return root, {
        "make_tiny_model": run_tool(
            root, "make_tiny_model", "--output", root / "tiny", *untrained, *sizes
        ),
        "hf_to_megatron": run_tool(root, "hf_to_megatron", *there),
        "megatron_to_hf": run_tool(
            root, "megatron_to_hf", "--checkpoint", root / "checkpoint", "--output", root / "back"
        ),
        "merge_lora": run_tool(root, "merge_lora", *merged),
        "lower_rank": run_tool(root, "lower_rank", *lower),
        "verify": run_tool(
            root, "verify", "--hf_model", model, "--checkpoint", root / "checkpoint", "--quick"
        ),
    }


@pytest.mark.parametrize(
    "tool, says",
    [
        ("make_tiny_model", "tiny"),
        ("hf_to_megatron", "training reads it as --model"),
        ("megatron_to_hf", "tensors in"),
        ("merge_lora", "tensors in"),
        ("lower_rank", "rank 2 -> 1, alpha 4 -> 2"),
        ("verify", "manifests: ok"),
    ],
)
def test_a_tool_does_its_work(made, tool, says):
    status, out, err = made[1][tool]
    assert status == 0, err
    assert says in out


@pytest.mark.parametrize(
    "tool, flags, says",
    [
        ("make_tiny_model", ["--output", "ROOT/back"], "exists and is not an empty folder"),
        ("hf_to_megatron", ["--hf_model", "ROOT", "--output", "ROOT/new"], "no config.json there"),
        ("hf_to_megatron", ["--hf_model", "ROOT"], "required: --output"),
        (
            "hf_to_megatron",
            ["--hf_model", "A", "--output", "B", "--num_workers", "0"],
            "--num_workers 0: must be 1",
        ),
        (
            "hf_to_megatron",
            ["--hf_model", "A", "--output", "B", "--num_workers", "two"],
            "invalid int value: 'two'",
        ),
        (
            "megatron_to_hf",
            ["--checkpoint", "ROOT", "--output", "ROOT/new"],
            "neither latest_checkpointed_iteration",
        ),
        (
            "megatron_to_hf",
            ["--checkpoint", "A", "--output", "B", "--export", "all"],
            "argument --export: invalid choice: 'all' (choose from ",
        ),
        (
            "merge_lora",
            ["--hf_model", "ROOT/back", "--output", "ROOT/new"],
            "no --adapter is named",
        ),
        (
            "merge_lora",
            ["--hf_model", "A", "--output", "B", "--wieght", "1"],
            "--wieght is not a setting; the nearest is --weight",
        ),
        ("merge_lora", ["--hf_modl", "A"], "--hf_modl is not a setting; the nearest is --hf_model"),
        ("make_tiny_model", ["--ouput", "A"], "--ouput is not a setting; the nearest is --output"),
        (
            "lower_rank",
            [
                "--hf_model",
                "ROOT/back",
                "--adapter",
                "ROOT/adapter",
                "--lora_rank",
                "2",
                "--output",
                "ROOT/new",
            ],
            "--lora_rank 2: the adapter has rank 2; choose 1 to 1",
        ),
        ("verify", ["--hf_model", "ROOT/back", "--quick"], "--quick: there is nothing to compare"),
        ("verify", ["--checkpoint", "ROOT/checkpoint"], "required: --hf_model"),
    ],
)
def test_a_refusal_is_one_line(made, tool, flags, says):
    root = made[0]
    status, out, err = run_tool(root, tool, *(flag.replace("ROOT", str(root)) for flag in flags))
    assert status == 2 and not out
    assert says in err and err.count("\n") == 1, err
    assert not (root / "new").exists()
