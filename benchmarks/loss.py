"""Time, memory and collectives of the loss against its contenders; prints Markdown and writes docs/benchmarks/loss.md.

    python -m benchmarks.loss [--device cpu|cuda] [--threads 2] [--rounds 3] [--small] [--output FILE]

In each table the contenders run in turn on the same tensors, forward and backward, after one run that is not counted;
medians over the rounds. Memory is the highest resident size (CUDA: allocated bytes) during a run above the size just
before it, so the gradient that a contender returns counts, its inputs do not. Collectives are counted by wrapping
torch.distributed. --small takes sizes that finish in a minute, to see that everything runs.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import contenders

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 2**20
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")


def resident_bytes(field):
    """VmRSS (now) or VmHWM (highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


class Meter:
    """Measures one run: seconds and peak bytes above those before it."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def __call__(self, run):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident_bytes("VmRSS")
        start = time.perf_counter()
        result = run()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident_bytes("VmHWM")
        del result
        return seconds, peak - before


def measure(runs, device, rounds):
    """{name: (median seconds, median peak bytes)} of {name: run}, taken in turn."""
    meter, samples = Meter(device), {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            sample = meter(run)
            if number > 0:
                samples[name].append(sample)
    return {name: tuple(statistics.median(column) for column in zip(*taken)) for name, taken in samples.items()}


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def logit_tensors(num_rows, num_columns, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    student = torch.randn(num_rows, num_columns, generator=generator, device=device) * 2
    teacher = student + 0.5 * torch.randn(num_rows, num_columns, generator=generator, device=device)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def hidden_tensors(num_rows, hidden_size, num_columns, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    student = torch.randn(num_rows, hidden_size, generator=generator, device=device)
    teacher = student + 0.2 * torch.randn(num_rows, hidden_size, generator=generator, device=device)
    weight = torch.randn(num_columns, hidden_size, generator=generator, device=device) * 2 / hidden_size**0.5
    return student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def logits_table(sizes, device, rounds):
    """Rows for (N, V, dtype, beta): ours against TRL, plain torch and the read-write limit."""
    rows = []
    for num_rows, num_columns, dtype, beta in sizes:
        settings = dict(beta=beta, temperature=2.0)
        student, teacher = logit_tensors(num_rows, num_columns, dtype, device)
        runs = {
            "vocab_parallel_jsd": contenders.run_ours(student, teacher, settings),
            "TRL": contenders.run_trl(student, teacher, settings),
            "plain torch": contenders.run_plain(student, teacher, settings),
            "one read, one write": contenders.run_read_write(student, teacher),
        }
        if device == "cuda":
            runs["Liger"] = contenders.run_liger(student, teacher, settings)
        measured = measure(runs, device, rounds)
        trl_seconds, trl_bytes = measured["TRL"]
        for name, (seconds, peak) in measured.items():
            rows.append(
                [
                    f"{num_rows} x {num_columns}",
                    dtype_name(dtype),
                    f"{beta}",
                    name,
                    f"{seconds * 1e3:.1f}",
                    f"{trl_seconds / seconds:.1f}",
                    f"{peak / MIB:.0f}",
                    f"{trl_bytes / max(peak, 1):.1f}",
                ]
            )
        del runs, student, teacher
    header = ["N x V", "dtype", "beta", "what", "ms", "x faster than TRL", "extra MiB", "TRL's / this memory"]
    return table(header, rows)


def linear_table(sizes, device, rounds):
    """Rows for (N, H, V, dtype, with TRL): linear_jsd, its three GEMMs, and the lm_head followed by TRL."""
    rows = []
    for num_rows, hidden_size, num_columns, dtype, with_trl in sizes:
        settings = dict(beta=0.5, temperature=2.0)
        student, teacher, weight = hidden_tensors(num_rows, hidden_size, num_columns, dtype, device)
        runs = {
            "linear_jsd": contenders.run_linear(student, teacher, weight, settings),
            "three GEMMs": contenders.run_gemms(student, teacher, weight),
        }
        if with_trl:
            runs["lm_head + TRL"] = contenders.run_linear_trl(student, teacher, weight, settings)
        measured = measure(runs, device, rounds)
        for name, (seconds, peak) in measured.items():
            rows.append(
                [
                    f"{num_rows} x {hidden_size} x {num_columns}",
                    dtype_name(dtype),
                    name,
                    f"{seconds:.2f}",
                    f"{seconds / measured['three GEMMs'][0]:.2f}",
                    f"{peak / MIB:.0f}",
                ]
            )
        del runs, student, teacher, weight
    return table(["N x H x V", "dtype", "what", "s", "x three GEMMs", "extra MiB"], rows)


def count_collectives(calls):
    """Wrap torch.distributed's collectives so that `calls` counts them."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, _original=original, **kwargs):
            calls["collectives"] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counted)


def parallel_rank(rank, world_size, port, num_rows, num_columns, hidden_size, rounds, answers):
    """One gloo rank with one thread: its part of every contender, timed between barriers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    group, local = dist.group.WORLD, num_columns // world_size
    settings = dict(beta=0.5, temperature=2.0)
    student, teacher = logit_tensors(num_rows, local, torch.float32, "cpu", seed=rank)
    student_hidden, teacher_hidden, weight = hidden_tensors(num_rows, hidden_size, local, torch.float32, "cpu")
    runs = {
        "vocab_parallel_jsd": contenders.run_ours(student, teacher, settings, group),
        "plain torch": contenders.run_plain(student, teacher, settings, group),
        "linear_jsd": contenders.run_linear(student_hidden, teacher_hidden, weight, settings, group),
        "three GEMMs": contenders.run_gemms(student_hidden, teacher_hidden, weight),
    }
    calls, results = Counter(), {}
    count_collectives(calls)
    meter = Meter("cpu")
    for name, run in runs.items():
        samples = []
        for _ in range(rounds + 1):
            dist.monitored_barrier()
            calls.clear()
            samples.append(meter(run))
        seconds, peak = (statistics.median(column) for column in zip(*samples[1:]))
        results[name] = (seconds, peak, calls["collectives"])
    if rank == 0:
        answers.put(results)
    dist.destroy_process_group()


def parallel_table(sizes, rounds):
    """Rows for (TP, N, V, H) on gloo ranks of one thread each; the time of rank 0."""
    rows, context = [], torch.multiprocessing.get_context("spawn")
    for number, (world_size, num_rows, num_columns, hidden_size) in enumerate(sizes):
        answers = context.SimpleQueue()
        arguments = (world_size, 29600 + number, num_rows, num_columns, hidden_size, rounds, answers)
        ranks = torch.multiprocessing.spawn(parallel_rank, arguments, nprocs=world_size, join=False)
        results = answers.get()
        ranks.join()
        for name, (seconds, peak, collectives) in results.items():
            rows.append(
                [
                    f"{world_size}",
                    f"{num_rows} x {num_columns} (H {hidden_size})",
                    name,
                    f"{seconds * 1e3:.0f}",
                    f"{peak / MIB:.0f}",
                    f"{collectives}",
                ]
            )
    return table(["TP", "N x V", "what", "ms", "extra MiB a rank", "collectives"], rows)


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    return f"{names[0]}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit():
    output = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return output.stdout.strip() or "no commit"


def main(arguments):
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, arguments.rounds
    real, other = 151936, 32000
    if arguments.small:
        logit_sizes = [(16, other, torch.float32, 0.5)]
        linear_sizes = [(16, 64, other, torch.float32, True)]
        parallel_sizes = [(2, 16, other, 64)]
    else:
        logit_sizes = [(n, real, torch.float32, 0.5) for n in (256, 1024)]
        logit_sizes += [(256, real, torch.float32, 0.3), (256, real, torch.bfloat16, 0.5)]
        logit_sizes += [(1024, other, torch.float32, 0.5), (8192, other, torch.float32, 0.5)]
        linear_sizes = [(256, 2048, real, torch.float32, True)]
        linear_sizes += [(n, 2048, real, torch.float32, False) for n in (512, 1024, 2048)]
        linear_sizes += [(512, 2048, real, torch.bfloat16, False)]
        parallel_sizes = [(tp, 256, real, 256) for tp in (1, 2, 4, 8)]
        if device == "cuda":
            logit_sizes = [
                (n, v, d, 0.5) for n in (256, 4096) for v in (other, real) for d in (torch.float32, torch.bfloat16)
            ]
            linear_sizes = [(n, 2048, real, torch.bfloat16, n < 4096) for n in (256, 1024, 4096, 8192)]
    command = "python -m benchmarks.loss " + " ".join(sys.argv[1:])
    text = (
        f"# The loss, measured\n\nCommit {commit()}; {machine(device)}; {arguments.threads} threads; torch "
        f"{torch.__version__}; `{command.strip()}`. How: the head of `benchmarks/loss.py`. Temperature 2.\n\n"
        "## From logits, forward and backward\n\n"
        + logits_table(logit_sizes, device, rounds)
        + "\n## From hidden states, forward and backward\n\n"
        + linear_table(linear_sizes, device, rounds)
    )
    if device == "cpu":
        text += "\n## On gloo ranks of one thread each\n\n" + parallel_table(parallel_sizes, rounds)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", help="a file for the Markdown, besides standard output")
    main(parser.parse_args())
