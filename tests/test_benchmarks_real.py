"""The benchmarks of real sizes, at sizes of seconds: whole steps with a rollout, and the peers."""

import contextlib
import io
import json

import pytest

from benchmarks.real_decoder import REAL_SHAPE
from benchmarks.step_costs import step_flops, utilisation
from megatron_gkd.lora_targets import ATTENTION, LINEARS
from tests.ranks import run_ranks

SIZES = (
    "--device cpu --layers 1 --experts 8 --hidden 64 --inter 32 --heads 4 --head_dim 16 "
    "--vocab 1000 --batch 2 --length 24 --response 8 --steps 2"
)


def run(rank, world_size, module, argv):
    """(exit status, what was printed) of a benchmark on ranks that the harness has."""
    import importlib

    from megatron.core import parallel_state

    program = importlib.import_module(f"benchmarks.{module}")
    program.destroy = parallel_state.destroy_model_parallel  # the process group is the harness's
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            program.main(argv)
        except SystemExit as end:
            status = end.code
    return status, said.getvalue()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_whole_steps_and_a_rollout(tmp_path):
    page, found = tmp_path / "page.md", tmp_path / "records.jsonl"
    argv = [*SIZES.split(), "--rollout", "2", "--keys", "20", "--tokens", "4", "--equal"]
    argv += ["--deterministic", "--output", str(page), "--records", str(found)]
    ((status, said),) = run_ranks(run, 1, "real_shape", argv)
    assert status == 0, said
    built, first, second, memory, flops, counts, equal, token = records(found)
    assert built["what"] == "built" and 0 < built["trainable_parameters"] < built["parameters"]
    assert second["student_tokens_per_second"] == pytest.approx(48 / second["step_seconds"])
    assert second["jsd"] > 0 and second["grad_norm"] > 0
    # moments are fp32, as LoRA and its gradients are; a number of steps may stand beside them
    assert memory["lora_gib"] == pytest.approx(4 * built["trainable_parameters"] / 2**30)
    assert memory["gradients_gib"] == pytest.approx(memory["lora_gib"])
    assert memory["optimizer_gib"] == pytest.approx(2 * memory["lora_gib"], rel=0.01)
    frozen = built["parameters"] - built["trainable_parameters"]
    # bf16, with columns that pad the vocabulary; LoRA's columns behind the experts' weights count,
    # which at these sizes are many
    assert 2 * frozen / 2**30 <= memory["weights_gib"] < 1.15 * 2 * frozen / 2**30
    assert counts["aten_calls"] > 500 and counts["host_reads"] > 0
    assert (equal["different"], equal["of"]) == (0, built["trainable_parameters"])
    assert token["rows"] == 2 and token["ms_a_token"] > 0
    assert flops["model_tflop"] > 0 and "lm_head three times" in page.read_text()
    assert page.read_text().rstrip() in f"# Whole steps at real sizes\n\n{said}"


def test_what_does_not_fit_is_a_result(tmp_path):
    """The last of it: what was measured before stays."""
    found = tmp_path / "records.jsonl"
    ((status, said),) = run_ranks(run_out_of_memory, 1, [*SIZES.split(), "--records", str(found)])
    assert status == 0 and said.rstrip().endswith("It does not fit in memory: Tried to allocate")
    assert [record["what"] for record in records(found)] == ["built", "step", "failure"]


def run_out_of_memory(rank, world_size, argv):
    import torch

    from benchmarks.training_step import Training

    take = Training.step

    def step(self, batches, number, *more, **options):
        if number == 2:
            raise torch.OutOfMemoryError("Tried to allocate\n2 GiB")
        return take(self, batches, number, *more, **options)

    Training.step = step
    return run(rank, world_size, "real_shape", argv)


@pytest.mark.extended
def test_peers(tmp_path):
    page, found = tmp_path / "page.md", tmp_path / "records.jsonl"
    argv = [*SIZES.split(), "--dtype", "float32", "--targets", "all", "--rows", "2"]
    argv += ["--prompt", "6", "--tokens", "3", "--output", str(page), "--records", str(found)]
    ((status, said),) = run_ranks(run, 1, "peers", argv)
    assert status == 0, said
    ours, theirs = records(found)
    assert ours["failure"] == theirs["failure"] == ""
    line = next(line for line in page.read_text().splitlines() if "| step, s |" in line)
    one, other, ratio = (float(cell) for cell in line.strip(" |").split(" | ")[2:])
    assert ratio == pytest.approx(theirs["step"] / ours["step"], abs=0.006)
    assert (one, other) == pytest.approx((ours["step"], theirs["step"]), abs=1e-3)
    assert ours["token_ms"]["2"] > 0 and theirs["teacher"] > 0


class _View:
    def __init__(self, lengths, num_targets):
        self.lengths, self.targets = lengths, range(num_targets)


class _Batch:
    def __init__(self, student, teacher, num_targets):
        self.student, self.teacher = _View(student, num_targets), _View(teacher, num_targets)


def test_model_flops():
    """Of the 30B, whose thinker has 3.0e9 active weights besides embedding and head."""
    batch = _Batch([2048] * 4, [2048] * 4, 4 * 512)
    # 16.8 + 2.1 M of attention, 8 x 4.7 M of experts and 0.3 M of the router a layer
    active = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 8 * 3 * 2048 * 768 + 2048 * 128)
    rank_8 = 8 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    head, attention = 6 * 2048 * 152064 * 2048, 48 * 4096 * 2 * 2048**2 * 4 * 4
    expected = 3 * 2 * active * 8192 + attention + 6 * 48 * rank_8 * 8192 + head
    assert step_flops(REAL_SHAPE, [batch], ATTENTION) == pytest.approx(expected)
    more = step_flops(REAL_SHAPE, [batch], LINEARS) - expected
    assert more == pytest.approx(6 * 48 * 8192 * 8 * 8 * 3 * (2048 + 768))
    shorter = _Batch([2048] * 4, [1024] * 4, 4 * 512)
    assert expected - step_flops(REAL_SHAPE, [shorter], ATTENTION) == pytest.approx(
        2 * active * 4096 + 48 * 4096 * 2 * (2048**2 - 1024**2) * 4
    )
    assert utilisation(98.9e12, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1)
    assert utilisation(1e12, "a new card") is None
