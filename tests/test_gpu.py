"""On a GPU, through the command line: the same numbers as on CPU ranks, whichever kernels run.
Skipped where torch sees no GPU.

`bash launch/gpu_checks.sh` runs these, the demo and the benchmarks, and writes what it saw to
docs/.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
HAS_TE = importlib.util.find_spec("transformer_engine") is not None
IMPLS = [("eager", "grouped_mm"), ("sdpa", "grouped_mm")] + [("te", "grouped_mm")] * HAS_TE


def run_module(*arguments, num_ranks=1):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_ranks),
        "-m",
    ]
    command = [*launcher, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight experts a token, as the real model: sums of two, whose order does not matter, would
    hide what atomics do.
    """
    return build_folder(
        tmp_path_factory.mktemp("gpu") / "model",
        TinyModelConfig(num_experts=16, num_experts_per_tok=8),
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu_rows") / "rows.jsonl"
    row = {
        "input_ids": list(range(5, 25)),
        "labels": [-100] * 8 + list(range(13, 25)),
        "teacher_input_ids": list(range(40, 55)),
    }
    path.write_text(
        "".join(
            json.dumps(
                row | {"input_ids": row["input_ids"][: 20 - n], "labels": row["labels"][: 20 - n]}
            )
            + "\n"
            for n in range(4)
        )
    )
    return path


def first_step(folder, rows, output, *flags, num_ranks=1):
    """Metrics of step 2 (step 1 of a fresh adapter has W_up = 0 everywhere, so step 2 is the first
    that every gradient enters).
    """
    common = [
        "--model",
        folder,
        "--dataset",
        rows,
        "--output_dir",
        output,
        "--max_steps",
        2,
        "--lmbda",
        0,
        "--lora_dropout",
        0,
    ]
    common += ["--learning_rate", 1e-2, "--logging_steps", 1, "--tensorboard", "false"]
    run_module("megatron_gkd.train", *common, *flags, num_ranks=num_ranks)
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


def test_logits_equal_transformers(folder):
    output = run_module(
        "checkpoint_tools.verify", "--hf_model", folder, "--device", "cuda", "--tolerance", 1e-3
    )
    assert "ok" in output and "DIFFERS" not in output


@pytest.mark.parametrize("attn_impl, experts_impl", IMPLS)
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-3), ("bfloat16", 5e-2), ("float16", 2e-2)]
)
def test_step_equals_the_cpus(folder, rows, tmp_path, attn_impl, experts_impl, dtype, tolerance):
    if attn_impl == "te" and dtype == "float32":
        tolerance = (
            2e-2  # Transformer Engine may multiply float32 in TF32, whose mantissa is fp16's
        )
    expected = first_step(
        folder, rows, tmp_path / "cpu", "--device", "cpu", "--torch_dtype", "float32"
    )
    flags = [
        "--device",
        "cuda",
        "--torch_dtype",
        dtype,
        "--attn_impl",
        attn_impl,
        "--experts_impl",
        experts_impl,
    ]
    found = first_step(folder, rows, tmp_path / "cuda", *flags)
    assert found["num_tokens"] == expected["num_tokens"]
    for name in ("loss", "jsd", "sft_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one GPU: NCCL needs two")
@pytest.mark.parametrize(
    "layout", [(2, 1, 2), (1, 2, 1), (1, 1, 2)], ids=["TP2-EP2", "PP2", "DP2-EP2"]
)
def test_layouts_over_nccl(folder, rows, tmp_path, layout):
    """The step of two GPUs is that of one; the student writes on both."""
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
    )
    sizes = [word for name, size in zip(names, layout) for word in (f"--{name}", size)]
    batch = ["--gradient_accumulation_steps", 1, "--per_device_train_batch_size"]
    flags = ["--device", "cuda", "--torch_dtype", "float32", "--attn_impl", "sdpa"]
    alone = first_step(folder, rows, tmp_path / "one", *flags, *batch, 4)
    both = first_step(
        folder,
        rows,
        tmp_path / "two",
        *flags,
        *sizes,
        *batch,
        2 if layout == (1, 1, 2) else 4,
        num_ranks=2,
    )
    assert both["num_tokens"] == alone["num_tokens"]
    for name in ("loss", "jsd", "grad_norm"):
        assert both[name] == pytest.approx(alone[name], rel=1e-3), name
    writes = [
        "--model",
        folder,
        "--dataset",
        rows,
        "--output_dir",
        tmp_path / "writes",
        "--max_steps",
        1,
        "--lmbda",
        1,
    ]
    run_module(
        "megatron_gkd.train", *writes, *flags, *sizes, "--max_completion_length", 4, num_ranks=2
    )


def test_rollout_and_resume(folder, rows, tmp_path):
    """The student writes on the GPU, and a run resumed there gives the same metrics bit for bit."""
    common = [
        "megatron_gkd.train",
        "--model",
        folder,
        "--dataset",
        rows,
        "--device",
        "cuda",
        "--lmbda",
        1,
        "--max_completion_length",
        8,
    ]
    common += [
        "--logging_steps",
        1,
        "--save_steps",
        2,
        "--max_steps",
        4,
        "--learning_rate",
        1e-2,
        "--deterministic",
        "true",
    ]
    run_module(*common, "--output_dir", tmp_path / "whole")
    run_module(
        *common,
        "--output_dir",
        tmp_path / "parts",
        "--resume_from_checkpoint",
        tmp_path / "whole" / "checkpoint-2",
    )
    last = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("whole", "parts")
    ]
    for name in ("loss", "grad_norm", "num_tokens", "top1_agreement"):
        assert last[0][name] == last[1][name], name
