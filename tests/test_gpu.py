"""On a GPU: the same numbers as on the CPU, whichever kernels run, and the same bits twice.

All cases run one after another in one process on the GPU, the references in another one on the CPU;
`DEVICE=cpu` puts the CPU in the GPU's place, so that this file can be tried without one.
"""

import contextlib
import functools
import importlib.util
import io
import multiprocessing
import os
import pickle
import time
import traceback
from pathlib import Path

import pytest
import torch

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from tests import media_rows
from tests.gpu import DEVICE, needs_gpu
from tests.ports import free_port
from tests.processes import in_a_process
from tests.train_runs import arguments, layout_flags, read_lines, write_rows

pytestmark = [pytest.mark.extended, needs_gpu]
HAS_TE = DEVICE == "cuda" and importlib.util.find_spec("transformer_engine") is not None
IMPLS = [("eager", "grouped_mm"), ("sdpa", "grouped_mm")] + [("te", "grouped_mm")] * HAS_TE
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
LAYOUTS = {"TP2-EP2": (2, 1, 2), "PP2": (1, 2, 1), "DP2-EP2": (1, 1, 2)}
LENGTHS = {"short": 20, "long": 2048 if DEVICE == "cuda" else 96}  # of the rows, by data set
# 16 experts, eight of them a token: sums of two would hide what their order does
SIZES = dict(
    num_hidden_layers=2,
    num_experts=16,
    num_experts_per_tok=8,
    hidden_size=64,
    moe_intermediate_size=32,
)
STEP = dict(max_steps=2, learning_rate=1e-2)
"""The first step of a fresh adapter has W_up = 0 everywhere; every gradient enters the second."""


def make_rows(length: int, number: int = 4) -> list[dict]:
    draw = torch.Generator().manual_seed(length)
    rows = []
    for index in range(number):
        size = length - index
        ids = torch.randint(5, 1000, (size,), generator=draw).tolist()
        labels = [-100] * (size // 2) + ids[size // 2 :]
        teacher = torch.randint(5, 1000, (size // 2,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": labels, "teacher_input_ids": teacher})
    return rows


def last_line(folder: Path) -> dict:
    return read_lines(folder / "metrics.jsonl")[-1]


class Runs:
    """Trainings in this process."""

    def __init__(self, inputs: dict, device: str, output: str):
        from megatron_gkd import parallel, train

        self.inputs, self.device, self.output, self.train = inputs, device, Path(output), train
        # the process group is left once, at the end of the process
        train.destroy = parallel.parallel_state.destroy_model_parallel

    def run(self, name: str, *, dataset: str = "short", **flags) -> Path:
        folder = self.output / name
        given = dict(model=self.inputs["model"], dataset=self.inputs[dataset], device=self.device)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.train.main(arguments(output_dir=folder, **given, **flags))
        except BaseException:
            self.train.destroy()  # the next case comes in this process
            raise
        return folder

    def gradients(self, name: str, **flags) -> list[torch.Tensor]:
        """Of the second step, on long rows, with dropout."""
        found, backward = [], self.train.student_forward_backward

        def keep(ddp, *rest):
            sums = backward(ddp, *rest)
            found.append([p.main_grad.cpu() for p in ddp.parameters() if p.requires_grad])
            return sums

        self.train.student_forward_backward = keep
        try:
            self.run(
                name, dataset="long", lora_dropout=0.1, torch_dtype="bfloat16", **STEP, **flags
            )
        finally:
            self.train.student_forward_backward = backward
        return found[-1]


def verify(runs: Runs) -> str:
    from checkpoint_tools.settings import VerifyConfig
    from checkpoint_tools.verify import verify

    said = io.StringIO()
    config = VerifyConfig(hf_model=runs.inputs["model"], device=runs.device, tolerance=1e-3)
    try:
        with contextlib.redirect_stdout(said):
            verify(config)
    finally:
        runs.train.destroy()
    return said.getvalue()


def resumed(runs: Runs) -> tuple[dict, dict]:
    flags = dict(lmbda=1, max_completion_length=8, save_steps=2, max_steps=4, learning_rate=1e-2)
    whole = runs.run("whole", deterministic=True, **flags)
    flags["resume_from_checkpoint"] = whole / "checkpoint-2"
    return last_line(whole), last_line(runs.run("parts", deterministic=True, **flags))


def differences(runs: Runs, name: str, **flags) -> tuple[int, int, float]:
    """(entries that differ between two equal backward passes, entries, relative norm of the
    difference).
    """
    one, other = (
        torch.cat([g.flatten() for g in runs.gradients(f"{name}{i}", **flags)]) for i in "ab"
    )
    relative = (one - other).norm() / one.norm()
    return int((one != other).sum()), one.numel(), float(relative)


def run_cases(inputs: dict, device: str, output: str) -> dict:
    """Name -> what a case gave, or its traceback."""
    # before cuBLAS starts; without --deterministic it changes nothing but memory
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    runs = Runs(inputs, device, output)
    cases = {"verify": functools.partial(verify, runs)}

    def step(name, **flags):
        cases[name] = lambda: last_line(runs.run(name, **STEP, **flags))

    for dtype in TOLERANCES:
        for attention, experts in IMPLS:
            kinds = dict(attn_impl=attention, experts_impl=experts)
            step(f"{dtype} {attention}", torch_dtype=dtype, **kinds)
    step("media", dataset="media", lora_towers=True)
    cases["bits without the flag"] = lambda: differences(runs, "free")
    # from here on the process keeps deterministic kernels
    cases["bits"] = lambda: differences(runs, "fixed", deterministic=True)
    cases["resume"] = lambda: resumed(runs)
    return {name: attempt(name, case) for name, case in cases.items()}


def attempt(name, case):
    """What the case gives, or its traceback; says how it went."""
    start = time.monotonic()
    try:
        found = case()
    except (Exception, SystemExit):
        found = Failure(traceback.format_exc())
    said = found.splitlines()[-1] if isinstance(found, Failure) else "done"
    if isinstance(found, dict):
        said = f"loss {found['loss']}, grad_norm {found['grad_norm']}"
    print(f"{name}: {said} in {time.monotonic() - start:.1f} s", flush=True)
    return found


class Failure(str):
    """The traceback of a case."""


def references(inputs: dict, output: str) -> dict:
    torch.set_num_threads(min(8, os.cpu_count() or 1))
    runs = Runs(inputs, "cpu", output)
    return {
        "step": last_line(runs.run("step", **STEP)),
        "media": last_line(runs.run("media", dataset="media", lora_towers=True, **STEP)),
    }


def run_pair(rank: int, port: int, inputs: dict, device: str, output: str, connection) -> None:
    """One of two ranks: every layout in turn; rank 0 sends what they gave."""
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(address | place)
    runs, found = Runs(inputs, device, output), {}
    for name, layout in LAYOUTS.items():
        batch = 2 if name.startswith("DP2") else 4
        flags = layout_flags(*layout) | dict(per_device_train_batch_size=batch)
        found[name] = attempt(name, lambda: last_line(runs.run(name, **STEP, **flags)))
        writes = dict(max_steps=1, lmbda=1, max_completion_length=4)
        run = functools.partial(runs.run, f"{name}-writes", **writes, **flags)
        written = attempt(f"{name} writes", lambda: last_line(run()))
        found[f"{name} writes"] = written
    connection.send(pickle.dumps(found if rank == 0 else None))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    model = str(build_folder(str(root / "model"), TinyModelConfig(**SIZES)))
    media, _ = media_rows.write_rows(root, model)
    rows = {name: write_rows(root / f"{name}.jsonl", make_rows(n)) for name, n in LENGTHS.items()}
    return dict(model=model, media=media, **rows)


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    return in_a_process(references, inputs, str(tmp_path_factory.mktemp("reference")))


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    return in_a_process(run_cases, inputs, DEVICE, str(tmp_path_factory.mktemp("runs")))


def of(results: dict, name: str):
    if isinstance(results[name], Failure):
        pytest.fail(results[name])
    return results[name]


def check_step(found: dict, expected: dict, tolerance: float) -> None:
    assert found["num_tokens"] == expected["num_tokens"]
    for name in ("loss", "jsd", "sft_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name


def test_logits_equal_transformers(results):
    """Of text, sound and picture."""
    output = of(results, "verify")
    assert output.count("ok") >= 3 and "DIFFERS" not in output, output


@pytest.mark.parametrize("attention", [attention for attention, _ in IMPLS])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_step_equals_the_cpus(results, expected, attention, dtype):
    tolerance = TOLERANCES[dtype]
    if attention == "te" and dtype == "float32":
        tolerance = 2e-2  # it may multiply float32 in TF32, whose mantissa is fp16's
    check_step(of(results, f"{dtype} {attention}"), expected["step"], tolerance)


def test_step_with_media_equals_the_cpus(results, expected):
    """LoRA on the towers too."""
    check_step(of(results, "media"), expected["media"], 2e-3)


def test_equal_backward_passes_give_equal_bits(results):
    differing, entries, _ = of(results, "bits")
    assert entries > 10_000 and differing == 0


def test_backward_passes_are_close_without_the_flag(results):
    differing, entries, relative = of(results, "bits without the flag")
    print(f"without --deterministic {differing} of {entries} entries differ, by {relative:.1e}")
    assert relative < 1e-2 and (DEVICE == "cuda" or differing == 0)


def test_rollout_and_resume(results):
    """The student writes, and a resumed run gives the same metrics bit for bit."""
    whole, parts = of(results, "resume")
    assert whole["on_policy"] and whole["step"] == 4
    for name in ("loss", "grad_norm", "num_tokens", "top1_agreement"):
        assert whole[name] == parts[name], name


@pytest.fixture(scope="module")
def pair(inputs, tmp_path_factory):
    """What two ranks gave: over NCCL, or gloo with DEVICE=cpu."""
    port = free_port()
    context, output = multiprocessing.get_context("spawn"), str(tmp_path_factory.mktemp("pair"))
    receivers, processes = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (rank, port, inputs, DEVICE, output, sender)
        processes.append(context.Process(target=run_pair, args=arguments, daemon=True))
        processes[-1].start()
        sender.close()
        receivers.append(receiver)
    found = [pickle.loads(receiver.recv()) for receiver in receivers]
    for process in processes:
        process.join()
    return found[0]


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="torch sees one GPU: NCCL needs two"
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_two_ranks(pair, expected, layout):
    """The step of two ranks is that of one; the student writes on both."""
    check_step(of(pair, layout), expected["step"], 1e-3)
    assert of(pair, f"{layout} writes")["on_policy"]
