"""What this machine does in a second, as the planner reads it (megatron_gkd/plan/rates.py).

    python -m benchmarks.rates --output rates.json [--ranks 2] [--device auto] [--seconds 60]
    torchrun --nproc_per_node 8 -m benchmarks.rates --output rates.json

Products, attention, the package's kernels, launches of a layer, AdamW, and with several ranks
collectives by size. Ranks share a machine's memory and its cores, so all of them do the same thing
at the same time: on CPU --ranks starts so many, each with one thread; on GPUs torchrun does. On CPU
the processor's time of this process counts, but for collectives, and of many runs the lower
quartile: so what other programs take does not. Of collectives the mean wait counts too.

What is measured is small things, never a training step at the sizes that are predicted with them.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel

from benchmarks.rate_kernels import all_timed
from benchmarks.rate_messages import collective_entries, quartile
from benchmarks.real_decoder import Shape, random_batch, random_decoder
from benchmarks.report import commit, machine
from benchmarks.rollout_real import SAMPLED, RolloutBench
from benchmarks.training_step import Training
from megatron_gkd.forward import student_forward_backward, teacher_forward
from megatron_gkd.lora import as_student
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, destroy, largest, resolve_device
from megatron_gkd.plan import layer_work, rollout_work, step_work
from megatron_gkd.plan.rates import rates_of
from megatron_gkd.rollout.row_batch import RowBatch

# Layers whose work is nothing: what their pass takes is its launches.
TINY = Shape(
    num_layers=6,
    num_experts=4,
    num_experts_per_tok=2,
    hidden_size=32,
    moe_intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=256,
)
CACHE_BYTES = 32 * 2**20  # of the last level, which ranks share
MOST_RUNS = 100  # of one thing
LIBC = ctypes.CDLL(None)


class Clock:
    """Seconds of a run, the device waited for; on CPU the processor's of this process."""

    def __init__(self, device: torch.device, share: float, ranks: int):
        self.device, self.share, self.ranks = device, share, ranks
        self.scratch = torch.zeros(CACHE_BYTES // 4)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def __call__(self, run: Callable[[], Any], number: int | None = None) -> float:
        """The lower quartile of `number` runs, else of five or as many as the share of the time
        allows; on a GPU what is short counts as runs in a row. On CPU other numbers go through the
        caches before each of the latter, as in a step, and all ranks begin it together: as in a
        step they want the same of the memory at the same time.
        """
        for _ in range(2):
            run()
        if number is not None:
            return quartile([self._seconds(run) for _ in range(number)])
        first = max(self._seconds(run), 1e-7)
        if self.device.type == "cuda":
            repeats = max(1, min(1000, round(2e-3 / first)))
            number = max(5, round(self.share / first / repeats))
            return quartile([self._seconds(run, repeats) for _ in range(number)])
        number = max(5, min(MOST_RUNS, round(self.share / first)))
        if self.ranks > 1:
            (number,) = largest([number], self.device)
        found = []
        for _ in range(number):
            self.scratch.add_(1)
            if self.ranks > 1:
                dist.barrier()
            found.append(self._seconds(run))
        return quartile(found)

    def _seconds(self, run: Callable[[], Any], repeats: int = 1) -> float:
        before = self._now()
        for _ in range(repeats):
            run()
        return (self._now() - before) / repeats


def compute_entries(clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    """name -> rate, or points [size, rate]. FLOP/s, b/s."""
    points: dict[str, list] = defaultdict(list)
    for timed in all_timed(clock.device, dtype):
        with torch.set_grad_enabled(timed.entry.endswith("backward")):
            seconds = clock(timed.run)
        rate = timed.amount / seconds
        points[timed.entry].append([timed.size, rate])
    found: dict[str, Any] = {
        name: sorted(of) if of[0][0] is not None else of[0][1] for name, of in points.items()
    }
    if clock.device.type == "cpu":
        found["bytes.fresh"] = fresh_memory(clock)
    found["grouped.group"] = 0.0  # part of the rates by rows of an expert
    return found


def fresh_memory(clock: Clock) -> float:
    """b/s of memory that the system hands out page by page as it is first written, beside the
    writing.
    """
    size = 2**26
    used = torch.empty(size, dtype=torch.uint8)

    def fresh() -> None:
        torch.empty(size, dtype=torch.uint8).fill_(1)
        LIBC.malloc_trim(0)

    return size / max(clock(fresh) - clock(lambda: used.fill_(1)), 1e-9)


def launch_entries(
    clock: Clock, parallel: Parallel, model_args: ModelArgs, model: GPTModel
) -> dict[str, float]:
    """Seconds of a launch as a layer of almost no work makes it, megatron-core's and autograd's
    Python included.
    """
    training = Training(parallel, model_args, model)
    batch = random_batch(TINY.vocab_size, parallel, num_rows=2, length=8, response=2, seed=0)
    # so many times on every rank: a pass ends with the gradients' sum
    forward = clock(lambda: teacher_forward(model, [batch], parallel), number=40)
    teacher = teacher_forward(model, [batch], parallel)
    run = lambda: student_forward_backward(
        training.reduced, [batch], teacher, training.loss, parallel
    )
    both = clock(run, number=40)
    layers = TINY.num_layers
    per_launch = forward / (layers * layer_work.BASE_LAUNCHES + step_work.PASS_LAUNCHES)
    of_student = layers * (layer_work.BASE_LAUNCHES + layer_work.LORA_LAUNCHES)
    of_backward = layers * layer_work.BACKWARD_LAUNCHES + step_work.LOSS_LAUNCHES
    rest = both - (of_student + step_work.PASS_LAUNCHES) * per_launch
    return {
        "launch.forward": per_launch,
        "launch.backward": max(rest, 0.0) / of_backward,
        **token_entries(clock, parallel, model_args, model),
    }


@torch.no_grad()
def token_entries(
    clock: Clock, parallel: Parallel, model_args: ModelArgs, model: GPTModel
) -> dict[str, float]:
    """The same for a token of a rollout: launched one by one, and as a graph where there is one."""
    bench = RolloutBench(parallel, model_args, model, TINY, lambda **_: None)
    launches = rollout_work.TOKEN_LAYER_LAUNCHES * TINY.num_layers + rollout_work.TOKEN_LAUNCHES
    found = {}
    for name, graphs in (("eager", False), ("graph", True)):
        with as_student(model):
            engine = bench.engine(SAMPLED, 400, graphs=graphs)
            batch = RowBatch(engine, bench.prompts(2, 8), None, 1, 2, 0, [0, 1])
            batch.reserve(300)
            numbers = iter(range(300))
            write = lambda batch=batch, numbers=numbers: batch.write_token(next(numbers))
            seconds = clock(write, number=20)
        found[f"launch.{name}"] = seconds / launches
    return found


def measure(device: torch.device, ranks: int, seconds: float) -> dict[str, Any]:
    """All entries, of this rank; every rank calls it at the same time."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    clock = Clock(device, share=seconds / 80, ranks=ranks)
    # first of all: the threads of a run's groups wake up beside whatever its ranks do
    tiny = random_decoder(TINY, device=device.type, dtype=dtype, lora_dropout=0.0)
    found = compute_entries(clock, dtype)
    if ranks > 1:
        dist.barrier()
    found |= launch_entries(clock, *tiny)
    if ranks > 1:
        found |= collective_entries(device, ranks)
    destroy()
    return found


UNITS = {
    "dense": "[side, FLOP/s]",
    "grouped": "[side, FLOP/s]",
    "outer": "[side, FLOP/s]",
    "attention": "[positions of a row, FLOP/s]",
    "bytes": "B/s",
    "launch": "s",
}


def _unit(name: str) -> str:
    if name.endswith(".step") or name in ("wait", "grouped.group"):
        return "s"
    return UNITS.get(name.split(".")[0], "B/s")


def as_file(found: dict[str, Any], device: torch.device, ranks: int) -> dict[str, Any]:
    """JSON-able: what read_rates reads. What cannot be measured here says so as its source."""
    name = f"{machine(device.type)}, {ranks} rank{'s' if ranks > 1 else ''} at once"
    measured = f"measured, torch {torch.__version__}, commit {commit()}"
    entries = {
        key: {"value": value, "unit": _unit(key), "source": measured}
        for key, value in found.items()
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    known = {
        "gpu_memory_bytes": (memory, "B", "the device says so"),
        "gpus_per_node": (ranks, "ranks", "as many as measured at once"),
        "nics_per_gpu": (1, "NICs", "not known here; change it where it is another number"),
        "wait": (0.0 if device.type == "cpu" else 2e-5, "s", "assumed"),
    }
    for key, (value, unit, source) in known.items():
        entries[key] = {"value": value, "unit": unit, "source": source}
    return {"name": name, "device": device.type, "machine": machine(device.type)} | {
        "ranks_at_once": ranks,
        "torch": torch.__version__,
        "commit": commit(),
        "entries": entries,
    }


def _rank(rank: int, ranks: int, folder: str, seconds: float) -> None:
    """A process of its own, on CPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found = measure(torch.device("cpu"), ranks, seconds)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def wait_for(processes: Sequence[Any], most_seconds: float = 900.0) -> None:
    """Start them and wait for all. Raises RuntimeError where one fails or none ends any more; none
    outlives the call.
    """
    for process in processes:
        process.start()
    started = time.monotonic()
    try:
        while any(process.is_alive() for process in processes):
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed:
                raise RuntimeError(f"a rank failed with exit code {failed[0]}")
            if time.monotonic() - started > most_seconds:
                raise RuntimeError(f"the ranks did not end within {most_seconds:g} s")
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank failed: exit codes {[p.exitcode for p in processes]}")


def measure_on_cpu(ranks: int, seconds: float) -> dict[str, Any]:
    """A file's content: what so many ranks of one thread each do at once. Raises RuntimeError where
    one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, seconds), daemon=True)
            for rank in range(ranks)
        ]
        wait_for(processes)
        found = json.loads(Path(folder, "found.json").read_text())
    return as_file(found, torch.device("cpu"), ranks)


def main(argv: Sequence[str]) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--ranks", type=int, default=1, help="on CPU")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it, about")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device)
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device.type == "cpu" and ranks == 1:
        file = measure_on_cpu(arguments.ranks, arguments.seconds)
    else:
        if ranks > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        file = as_file(measure(device, ranks, arguments.seconds), device, ranks)
    if rank == 0:
        rates_of(file, arguments.output)  # what is written can be read
        Path(arguments.output).write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
