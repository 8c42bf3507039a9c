"""Launch scripts that the planner writes: they start the run that was planned, whatever its flags
contain, check it first, and one really trains.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gkd.config import parse_config
from megatron_gkd.plan.layouts import config_of, make_plan
from megatron_gkd.plan.script import script_of, write_new
from tests.plans import job_of
from tests.train_runs import SMALL, make_rows, write_rows

REPOSITORY = Path(__file__).parents[1]
AWKWARD = [  # words that a shell would take apart
    *("--system", 'it\'s "$HOME" `ls` \\ {x} @MODEL@ !'),
    *("--columns", '{"a b": "c"}'),
    *("--output_dir", "out of $HERE"),
    *("--recipe", "opsd"),
    *("--lora_target_modules", "q_proj", "k_proj"),
    *("--chat_template_kwargs", '{"enable_thinking": false}'),
    *("--save_only_model", "--teacher_system=-1 is 'not' a flag"),
    *("--lora_layers", "last 4", "--split_dataset_ratio", "0.01", "--max_steps", "7"),
]


LAYOUT = "--tensor_model_parallel_size 2 --expert_model_parallel_size 8".split()
LAYOUT += "--pipeline_model_parallel_size 1 --context_parallel_size 1".split()  # one is enough


def written(folder, *flags) -> tuple[Path, object]:
    """(the script of the pick, the settings that it was picked with)."""
    job = job_of(*flags)
    plan, path = make_plan(job), folder / "the plan's.sh"
    text = script_of(job, plan.pick, str(path))
    write_new(str(path), text, overwrite=False, executable=True)
    return path, config_of(job, plan.pick)


def run(script, *flags, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("MODEL", "DATASET", "MASTER_ADDR")}
    return subprocess.run(
        [str(script), *flags], env=kept | environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def python(tmp_path):
    """An interpreter that prints the words of its calls, a line of JSON each."""
    path = tmp_path / "python"
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("gpus", [8, 16])
def test_a_script_starts_the_run_that_was_planned(gpus, python, tmp_path):
    data = ["--dataset", "rows of 'mine'.jsonl", "more#20"]
    flags = ["--gpus", str(gpus), "--gpus_per_node", "8", *LAYOUT, *AWKWARD, *data]
    flags += ["--media", "audio", "image", "--media_tokens", "12", "--row_tokens", "40"]
    script, config = written(tmp_path, *flags)
    nodes = {"MASTER_ADDR": "node0", "NODE_RANK": "1"} if gpus > 8 else {}
    environment = nodes | {"MODEL": config.model.model}  # the plan is of a config.json alone
    done = run(script, "--seed", "9", PYTHON=python, **environment)
    assert done.returncode == 0, done.stderr
    start = json.loads(done.stdout)
    of_plan = ["--check_plan", " ".join(["--gpus", str(gpus), *flags[-7:]])]
    assert start[:4] == ["-m", "megatron_gkd.launch", *of_plan]
    module = start.index("megatron_gkd.train")
    config.train.seed = 9  # flags behind the script win
    config.run.recipe = None  # its settings stand there, each by itself
    assert parse_config(start[module + 1 :]) == config
    torchrun = " ".join(start[:module])
    assert "--nproc_per_node 8" in torchrun
    where = "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 29500"
    assert (where if gpus > 8 else "--standalone") in torchrun


def test_a_script_starts_anywhere(python, tiny_folder, tmp_path, monkeypatch):
    """Files that are here are named whole; on fewer GPUs than a machine has, with all of them."""
    model = Path(tiny_folder(**SMALL))
    (tmp_path / "my rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    flags = ["--gpus", "2", "--model", os.path.relpath(model), *LAYOUT[:2]]
    script, _ = written(tmp_path, *flags, "--dataset", "my rows.jsonl#20", "other/NAME#5")
    monkeypatch.chdir("/")
    start = json.loads(run(script, PYTHON=python).stdout)
    config = parse_config(start[start.index("megatron_gkd.train") + 1 :])
    assert config.data.dataset == [f"{tmp_path}/my rows.jsonl#20", "other/NAME#5"]
    assert config.model.model == str(model)
    assert "--standalone --nproc_per_node 2 " in " ".join(start)


def test_a_script_needs_a_data_set_and_the_other_nodes_only_to_start(python, tmp_path):
    flags = ["--gpus", "16", "--gpus_per_node", "8", *LAYOUT]
    script, _ = written(tmp_path, *flags)
    check = run(script, "--check", PYTHON=python)
    assert check.returncode == 0 and len(check.stdout.splitlines()) == 1
    missing = run(script, PYTHON=python)
    assert missing.returncode != 0 and "DATASET: a .jsonl" in missing.stderr
    missing = run(script, PYTHON=python, DATASET="d")
    assert missing.returncode != 0 and "MODEL: the folder with the weights" in missing.stderr
    missing = run(script, PYTHON=python, DATASET="d", MODEL="m")
    assert missing.returncode != 0 and "MASTER_ADDR: the address" in missing.stderr
    words = json.loads(
        run(script, "--check", PYTHON=python, DATASET="d d", MODEL="m", OUTPUT="o o").stdout
    )
    config = parse_config(words[5:])
    assert (config.data.dataset, config.model.model) == (["d d"], "m")
    assert config.run.output_dir == "o o"


def test_the_pick_of_eight_gpus_fits_and_its_script_checks(tmp_path):
    """Really: with this interpreter, where there is no GPU, and against a card that is named."""
    flags = ["--gpus", "8", "--gpu_memory", "80"]
    script, config = written(tmp_path, *flags)
    done = run(script, "--check", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "Layout: 8 ranks = TP" in done.stdout
    assert "no GPU here to compare with" in done.stdout or "fits" in done.stdout
    fits = run(script, "--check", "--gpu_memory", "80", PYTHON=sys.executable)
    assert fits.returncode == 0 and "; fits --gpu_memory, 80.0 GiB" in fits.stdout
    refused = run(script, "--check", "--gpu_memory", "4", PYTHON=sys.executable)
    assert refused.returncode == 2 and "4.0 GiB" in refused.stderr and "base" in refused.stderr


def test_a_file_is_replaced_only_on_demand(tmp_path):
    path = tmp_path / "plan.sh"
    write_new(str(path), "first", overwrite=False, executable=True)
    with pytest.raises(ValueError, match="is there already; name another file, or add --overwrite"):
        write_new(str(path), "second", overwrite=False)
    assert path.read_text() == "first" and os.access(path, os.X_OK)
    write_new(str(path), "second", overwrite=True)
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["plan.sh"]
    with pytest.raises(ValueError, match="absent is no folder; make it first"):
        write_new(str(tmp_path / "absent" / "plan.sh"), "text", overwrite=False)


@pytest.mark.extended
def test_a_script_trains(tiny_folder, tmp_path):
    """A step on two gloo ranks, with the layout of the plan."""
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8))
    flags = ["--model", tiny_folder(**SMALL), "--gpus", "2", "--dataset", rows]
    flags += ["--device", "cpu", "--torch_dtype", "float32", "--max_steps", "1"]
    flags += ["--max_length", "64", "--max_completion_length", "4", "--logging_steps", "1"]
    flags += ["--output_dir", str(tmp_path / "out"), "--expert_model_parallel_size", "2"]
    script, config = written(tmp_path, *flags)
    done = run(script, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    layout = json.loads((tmp_path / "out" / "run.json").read_text())["layout"]
    parallel = config.parallel
    assert (layout["world_size"], layout["ep"]) == (2, 2)
    assert layout["tp"] == parallel.tensor_model_parallel_size
