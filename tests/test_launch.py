"""The launch scripts, run for real on CPU ranks with a small model: one step each, and impossible
layouts refused. All scripts parse and call modules that exist.
"""

import json
import math
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = [
    *REPOSITORY.glob("launch/*.sh"),
    *REPOSITORY.glob("demo/*.sh"),
    REPOSITORY / "tests/run.sh",
    REPOSITORY / ".ci/run",
]
# Makes the scripts' settings small; the layout and everything else stay as each script has them.
SMALL = (
    "--max_steps 1 --max_length 48 --max_completion_length 4 --torch_dtype float32 "
    "--logging_steps 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
    "--gradient_accumulation_steps 1 --split_dataset_ratio 0 --dataloader_num_workers 0 "
    "--dataset_num_proc 1"
).split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_scripts_parse_and_call_what_exists(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    modules = re.findall(r"-m ((?:megatron_gkd|checkpoint_tools|demo|benchmarks)\.[\w.]+)", text)
    paths = [module.replace(".", "/") for module in modules]
    called = [f"{p}/__main__.py" if (REPOSITORY / p).is_dir() else f"{p}.py" for p in paths]
    called += re.findall(r"(?<![\w./])(?:launch|demo|tests)/[\w/]+\.(?:sh|py)", text)
    assert [path for path in called if not (REPOSITORY / path).is_file()] == []


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables that point the scripts at a small model and tokenised rows whose teacher sees
    another prompt.
    """
    folder = tmp_path_factory.mktemp("launch")
    model = build_folder(
        str(folder / "model"),
        TinyModelConfig(num_hidden_layers=2, hidden_size=64, head_dim=16, vocab_size=1024),
    )
    rng = random.Random(0)

    def tokens(count):
        return [rng.randrange(300, 900) for _ in range(count)]

    with open(folder / "rows.jsonl", "w") as file:
        for _ in range(16):
            prompt, response = tokens(rng.randrange(3, 9)), tokens(rng.randrange(3, 9))
            row = {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
            file.write(json.dumps(row | {"teacher_input_ids": tokens(12)}) + "\n")
    variables = {
        "MODEL": model,
        "DATASET": str(folder / "rows.jsonl"),
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
    }
    return os.environ | variables | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def launch(script, environment, *flags):
    command = ["bash", str(REPOSITORY / "launch" / script), *SMALL, *flags]
    log = Path(environment["OUTPUT"] + ".log")
    with open(log, "w") as file:  # a file, not a pipe: an orphan would keep a pipe open
        status = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=550
        ).returncode
    return status, log.read_text()


def check_one_step(output, layout):
    """The run folder holds one step with a finite loss, taken at this layout."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]
    assert math.isfinite(lines[0]["loss"]) and lines[0]["loss"] > 0 and lines[0]["grad_norm"] > 0
    assert (output / "checkpoint-1" / "adapter_model.safetensors").is_file()
    recorded = json.loads((output / "run.json").read_text())["layout"]
    assert {name: recorded[name] for name in layout} == layout


@pytest.mark.parametrize(
    "script, layout, line",
    [
        (
            "qwen3_omni_30b_8gpu.sh",
            {"world_size": 8, "tp": 8, "ep": 8, "dp": 1},
            "8 ranks = TP 8 x PP 1 x DP 1; EP 8: 1 of 8 experts a rank",
        ),
        pytest.param(
            "qwen3_omni_30b_1gpu.sh",
            {"world_size": 1, "tp": 1, "ep": 1, "dp": 1},
            "--recompute auto: all 2 layers of a stage in the first step",
            marks=pytest.mark.extended,
        ),
        pytest.param(
            "qwen3_omni_30b_8gpu_tp4.sh",
            {"world_size": 8, "tp": 4, "ep": 8, "dp": 2},
            "8 ranks = TP 4 x PP 1 x DP 2; EP 8: 1 of 8 experts a rank",
            marks=pytest.mark.extended,
        ),
        pytest.param(
            "qwen3_omni_30b_8gpu_long_audio.sh",
            {"world_size": 8, "tp": 4, "ep": 8, "cp": 2, "dp": 1},
            "8 ranks = TP 4 x PP 1 x CP 2 x DP 1; EP 8: 1 of 8 experts a rank",
            marks=pytest.mark.extended,
        ),
    ],
)
def test_one_node(script, layout, line, environment, tmp_path):
    status, log = launch(script, environment | {"OUTPUT": str(tmp_path / "out")})
    assert status == 0, log
    assert line in log
    check_one_step(tmp_path / "out", layout)


@pytest.mark.parametrize(
    "requeued", [False, pytest.param(True, marks=pytest.mark.extended)], ids=["once", "requeued"]
)
def test_slurm_and_two_nodes(environment, tmp_path, requeued):
    commands = {
        "scontrol": 'test "$*" = "show hostnames node[0-1]" && printf "127.0.0.1\\n127.0.0.2\\n"',
        "srun": 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" || exit 1\nwait %1',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "NPROC_PER_NODE": "1",
    }
    slurm |= {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "MASTER_PORT": str(free_port()),
        "EXPERT_PARALLEL": "2",
    }
    slurm |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "OUTPUT": str(tmp_path / "out")}
    status, log = launch("slurm.sh", environment | slurm, "--tensor_model_parallel_size", "1")
    assert status == 0, log
    assert "2 ranks = TP 1 x PP 1 x DP 2; EP 2: 4 of 8 experts a rank" in log
    layout = {"world_size": 2, "tp": 1, "ep": 2, "dp": 2}
    check_one_step(tmp_path / "out", layout)
    if requeued:  # Slurm starts the job's script again, as it was submitted
        again = environment | slurm | {"SLURM_RESTART_COUNT": "1"}
        status, log = launch("slurm.sh", again, "--tensor_model_parallel_size", "1")
        assert status == 0 and "Nothing is left to do" in log, log
        assert f"Resumed {tmp_path / 'out' / 'checkpoint-1'} at step 1 of 1" in log
    assert "#SBATCH --requeue" in (REPOSITORY / "launch" / "slurm.sh").read_text()


@pytest.mark.parametrize(
    "script, variables, flags, numbers",
    [
        ("qwen3_omni_30b_8gpu.sh", {"NPROC_PER_NODE": "6"}, [], ["6 ranks", "= 8 ranks"]),
        (
            "qwen3_omni_30b_8gpu_tp4.sh",
            {"NPROC_PER_NODE": "4"},
            [],
            ["expert_model_parallel_size 8", "4 ranks"],
        ),
        (
            "multi_node.sh",
            {"EXPERT_PARALLEL": "16"},
            [],
            ["expert_model_parallel_size 16", "8 experts"],
        ),
        ("qwen3_omni_30b_8gpu.sh", {}, ["--lora_rnk", "4"], ["--lora_rnk", "--lora_rank"]),
    ],
)
def test_impossible_runs_are_refused_before_they_start(
    script, variables, flags, numbers, environment, tmp_path
):
    nodes = {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OUTPUT": str(tmp_path / "out"),
    }
    status, log = launch(script, environment | nodes | variables, *flags)
    assert status == 2, log
    assert all(number in log for number in numbers), log
    assert "Traceback" not in log and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, line",
    [
        ("qwen3_omni_30b_1gpu.sh", "1 ranks = TP 1"),
        ("qwen3_omni_30b_8gpu.sh", "8 ranks = TP 8"),
        ("qwen3_omni_30b_8gpu_tp4.sh", "8 ranks = TP 4"),
        ("qwen3_omni_30b_8gpu_long_audio.sh", "8 ranks = TP 4 x PP 1 x CP 2"),
        ("multi_node.sh", "16 ranks = TP 8"),
        ("slurm.sh", "16 ranks = TP 8"),
    ],
)
def test_check_starts_nothing(script, line, environment, tmp_path):
    """And needs neither data nor another node; what does not fit ends it."""
    names = ("DATASET", "MASTER_ADDR", "NODE_RANK", "SLURM_JOB_NODELIST")
    variables = {name: value for name, value in environment.items() if name not in names}
    variables |= {"NNODES": "2", "EXPERT_PARALLEL": "8"}
    variables |= {"SLURM_SUBMIT_DIR": str(REPOSITORY), "OUTPUT": str(tmp_path / "out")}
    command = ["bash", str(REPOSITORY / "launch" / script), "--check"]

    def check(*flags):
        done = subprocess.run(
            [*command, *flags], env=variables, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    status, said, errors = check()
    assert status == 0, errors
    assert f"Layout: {line}" in said and "GiB a rank: " in said
    status, said, errors = check("--gpu_memory", "0.5")
    assert status == 2 and "0.5 GiB" in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "script", ["qwen3_omni_30b_8gpu.sh", "qwen3_omni_30b_8gpu_tp4.sh", "multi_node.sh"]
)
def test_torchrun_gives_a_stopped_run_time_to_save(script, environment, tmp_path):
    """Less than the two minutes of launch/slurm.sh, more than torchrun's 30 seconds."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$2 waits $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s"\n')
    stub.chmod(0o755)
    nodes = {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OUTPUT": str(tmp_path / "out"),
    }
    status, log = launch(script, environment | nodes | {"PYTHON": str(stub)})
    assert status == 0 and log.splitlines()[-1] == "megatron_gkd.launch waits 110 s"
    assert "--signal=TERM@120" in (REPOSITORY / "launch" / "slurm.sh").read_text()


def test_torchrun_reads_that_time(monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if not hasattr(config, "shutdown_timeout"):
        pytest.skip("torch 2.11 has 30 seconds, and no setting")
    assert config.shutdown_timeout == 110


@pytest.mark.parametrize(
    "script", ["qwen3_omni_30b_8gpu.sh", "qwen3_omni_30b_8gpu_tp4.sh", "multi_node.sh"]
)
def test_missing_variables_are_named(script, environment, tmp_path):
    variables = {
        name: value for name, value in environment.items() if name not in ("MODEL", "MASTER_ADDR")
    }
    status, log = launch(script, variables | {"OUTPUT": str(tmp_path / "out")})
    assert status == 1 and ("MODEL" in log or "MASTER_ADDR" in log), log


# --- setting up with extras that are compiled ---


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose .venv has a torch for CUDA 13: a stub that prints the arguments given to
    pip.
    """
    python = """case "$*" in
        *'"cuda" if'*) echo cuda ;;
        *requirements.py*) exit 1 ;;
        *split*) echo 13 ;;
        *purelib*) echo site ;;
        *"-m pip"*) echo "$* CPATH=${CPATH:-}" ;;
        *) echo 3.11.7 ;;
    esac"""
    stubs = {
        ".venv/bin/python": python,
        "bin/nvidia-smi": "echo a GPU",
        "cuda/bin/nvcc": "echo release $CUDA, V$CUDA.88",
    }
    for name, text in stubs.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup_env.sh", "launch/requirements.py", "setup.py"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def set_up(checkout, **environment):
    settings = os.environ | {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "CUDA_HOME": str(checkout / "cuda"),
        "ANY_VERSION": "",
    }
    settings = {name: value for name, value in settings.items() if name != "CPATH"} | environment
    command = ["bash", str(checkout / "launch/setup_env.sh")]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=550)
    return done.returncode, done.stdout, done.stderr


def test_transformer_engine_is_compiled_against_the_torch_that_is_there(checkout):
    status, out, err = set_up(checkout, EXTRAS="test,gpu", CUDA="13.0")
    assert status == 0, err
    (install,) = (line for line in out.splitlines() if "--no-build-isolation" in line)
    assert f"install --no-build-isolation -e {checkout}[test,gpu]" in install
    headers = ":".join(f"site/nvidia/{library}/include" for library in ("cu13", "nccl", "cudnn"))
    assert install.endswith(f"CPATH={headers}")


def test_a_toolkit_of_another_cuda_is_refused(checkout):
    status, out, err = set_up(checkout, EXTRAS="gpu", CUDA="12.8")
    assert (
        status == 1
        and f"compiled for CUDA 13, as torch in .venv is; {checkout}/cuda/bin/nvcc is of CUDA 12"
        in err
    )
    assert "-m pip" not in out


def test_extras_for_a_gpu_need_one(checkout):
    (checkout / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    status, out, err = set_up(checkout, EXTRAS="test,flash", CUDA="13.0")
    assert (status, out) == (
        1,
        "",
    ) and "EXTRAS=test,flash is for a GPU, and nvidia-smi sees none" in err


def test_a_borrowed_torch_is_not_linked(checkout):
    site_packages = checkout / ".venv/lib/python3.11/site-packages"
    site_packages.mkdir(parents=True)
    (site_packages / "lent_torch.pth").touch()
    status, out, err = set_up(checkout, EXTRAS="gpu", CUDA="13.0")
    assert (status, out) == (1, "") and "borrows its torch, and EXTRAS=gpu needs its own" in err
    assert set_up(checkout, EXTRAS="test")[0] == 0
