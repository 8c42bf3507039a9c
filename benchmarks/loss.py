"""Time, memory and collectives of the loss against its contenders; prints Markdown and writes
docs/benchmarks/loss.md.

    python -m benchmarks.loss [--device cpu|cuda] [--threads 2] [--rounds 3] [--small]
                              [--output FILE]

In each table the contenders run in turn on the same tensors, forward and backward. Up to 1024 rows
the table shows medians over the rounds, up to 512 rows after a run that is not counted; above 1024
rows one run, and two of `linear_jsd` and the GEMMs. Memory is the highest resident size (CUDA:
allocated bytes) during a run above the size just before it, so the gradient that a contender
returns counts and its inputs do not. Collectives are counted by wrapping torch.distributed. What
would not fit into memory, judged by fewer rows, is not run; the table says so. --device cuda writes
docs/benchmarks/loss_gpu.md. --small uses sizes that finish in a minute, to check that everything
runs, and writes nothing.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks import contenders
from benchmarks.contenders import Contender
from megatron_gkd.loss.linear import _chunk_rows
from megatron_gkd.loss.passes import gather_statistics, reduce_sums
from megatron_gkd.loss.rows import SideStatistics, Sums

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = {
    "cpu": REPOSITORY / "docs/benchmarks/loss.md",
    "cuda": REPOSITORY / "docs/benchmarks/loss_gpu.md",
}
MIB = 2**20
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
)
REAL, OTHER = 151936, 32000  # columns: Qwen3-Omni's vocabulary, and a small one
OURS = ("vocab_parallel_jsd", "linear_jsd")
PASSES = 7  # reads and writes of a logit: both sides in each of three passes, and the gradient
SHARE_OF_MEMORY = 0.85  # of what is available, that a run may be expected to take


@dataclass(frozen=True)
class Result:
    """A contender's run on one case (the columns that name it), or why there is none."""

    case: tuple
    name: str
    seconds: float = float("nan")
    peak: float = float("nan")  # bytes above those before the run
    above_outputs: float = float("nan")  # peak less what the run returns
    failure: str = ""


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


class Meter:
    """Measures one run: seconds and peak bytes above those before it."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, run: Contender) -> tuple[float, int]:
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


def available_bytes(device: str) -> int:
    """Memory that a run may still take, on the machine or on the GPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def attempt(meter: Meter, name: str, run: Contender) -> tuple[float, int] | str:
    """(seconds, bytes) of one run, or the reason why a contender has none. Our own functions must
    not fail.
    """
    try:
        return meter(run)
    except torch.OutOfMemoryError:
        return "does not fit in memory"
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:
        if name in OURS:
            raise
        reason = str(error).strip().splitlines()[0][:80] if str(error) else ""
        return f"failed: {type(error).__name__}: {reason}"


def measure(
    case: tuple,
    runs: dict[str, Contender],
    device: str,
    rounds: int,
    warm: int,
    outputs: int,
    expected: dict[str, float] | None = None,
) -> list[Result]:
    """[Result] of {name: run}, run in turn, the first `warm` rounds not counted. outputs: bytes
    that a run returns; expected: {name: bytes of a run}.
    """
    meter, samples, failures = Meter(device), {name: [] for name in runs}, {}
    for name, size in (expected or {}).items():
        if name in runs and size > SHARE_OF_MEMORY * available_bytes(device):
            failures[name] = f"does not fit in memory: about {size / 2**30:.0f} GiB"
    for number in range(rounds + warm):
        for name in runs:
            if name in failures:
                continue
            sample = attempt(meter, name, runs[name])
            if isinstance(sample, str):
                failures[name] = sample
            elif number >= warm:
                samples[name].append(sample)
    results = []
    for name, taken in samples.items():
        if name in failures:
            results.append(Result(case, name, failure=failures[name]))
        else:
            seconds, peak = (statistics.median(column) for column in zip(*taken))
            results.append(Result(case, name, seconds, peak, peak - outputs))
    return results


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def ratio(numerator: float, denominator: float, digits: int = 1) -> str:
    """Text of a quotient; - where one of the two is unknown or not positive (a peak may be too
    small to see).
    """
    return f"{numerator / denominator:.{digits}f}" if numerator > 0 and denominator > 0 else "-"


def number(value: float, digits: int) -> str:
    """Text of a number; - where it is not known."""
    return f"{value:.{digits}f}" if value == value else "-"


def logit_tensors(
    num_rows: int, num_columns: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Both sides' logits; of more than 256 rows the first 256, repeated."""
    generator, distinct = torch.Generator(device).manual_seed(seed), min(num_rows, 256)
    student = torch.randn(distinct, num_columns, generator=generator, device=device) * 2
    teacher = student + 0.5 * torch.randn(distinct, num_columns, generator=generator, device=device)
    copies = -(-num_rows // distinct)
    student, teacher = (side.to(dtype).repeat(copies, 1)[:num_rows] for side in (student, teacher))
    return student.requires_grad_(), teacher


def hidden_tensors(
    num_rows: int, hidden_size: int, num_columns: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' hidden states [N, H], and the lm_head [V, H]."""
    generator = torch.Generator(device).manual_seed(0)
    student = torch.randn(num_rows, hidden_size, generator=generator, device=device)
    teacher = student + 0.2 * torch.randn(num_rows, hidden_size, generator=generator, device=device)
    weight = (
        torch.randn(num_columns, hidden_size, generator=generator, device=device)
        * 2
        / hidden_size**0.5
    )
    return student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def by_name(results: Iterable[Result]) -> dict[str, Result]:
    return {result.name: result for result in results}


def copy_bandwidth() -> float:
    """Bytes per second, read and written, that Tensor.copy_ moves on this GPU."""
    source, target = (torch.empty(2**29, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    meter = Meter("cuda")
    return (
        2
        * source.nbytes
        / statistics.median(meter(lambda: target.copy_(source))[0] for _ in range(6))
    )


def logits_results(sizes: Iterable[tuple], device: str, rounds: int) -> list[Result]:
    """[Result] for (N, V, dtype, beta): ours against TRL, plain torch and the read-write limit."""
    results: list[Result] = []
    bytes_per_logit: dict[str, float] = {}
    for num_rows, num_columns, dtype, beta in sizes:
        case, logits = (num_rows, num_columns, dtype, beta), num_rows * num_columns
        inputs = 2 * logits * dtype.itemsize
        # what a contender takes above its inputs, as seen in the case before
        expected = {name: size * logits for name, size in bytes_per_logit.items()}
        if 1.1 * inputs > SHARE_OF_MEMORY * available_bytes(device):
            failure = f"does not fit in memory: {inputs / 2**30:.0f} GiB of logits"
            results += [
                Result(case, name, failure=failure) for name in (OURS[0], "TRL", "plain torch")
            ]
            continue
        settings = dict(beta=beta, temperature=2.0)
        student, teacher = logit_tensors(num_rows, num_columns, dtype, device)
        runs = {
            "vocab_parallel_jsd": contenders.run_ours(student, teacher, settings),
            "TRL": contenders.run_trl(student, teacher, settings),
            "plain torch": contenders.run_plain(student, teacher, settings),
            "one read, one write": contenders.run_read_write(student, teacher),
        }
        if num_rows > 1024:
            # each chunk's backward adds a gradient of all rows: 46 s for 8192 x 32000 on two cores
            del runs["plain torch"]
            results.append(
                Result(case, "plain torch", failure="not run: its time grows with the square of N")
            )
        if device == "cuda":
            runs["Liger"] = contenders.run_liger(student, teacher, settings)
        repeats = rounds if num_rows <= 1024 or device == "cuda" else 1
        found = measure(
            case,
            runs,
            device,
            repeats,
            num_rows <= 512 or device == "cuda",
            student.nbytes,
            expected,
        )
        for result in found:
            if result.peak > 0 and device == "cpu":
                bytes_per_logit[result.name] = result.peak / logits
        results += found
        del runs, student, teacher
    return results


def logits_table(results: Iterable[Result], copied: float | None) -> str:
    """copied: measured bytes per second of a copy; None except on CUDA."""
    rows: list[list[str]] = []
    cases: dict[tuple, list[Result]] = {}
    for result in results:
        cases.setdefault(result.case, []).append(result)
    for (num_rows, num_columns, dtype, beta), found in cases.items():
        trl = by_name(found)["TRL"]
        for result in found:
            row = [f"{num_rows} x {num_columns}", dtype_name(dtype), f"{beta}", result.name]
            if result.failure:
                row += [result.failure, "-", "-", "-"]
            else:
                row += [f"{result.seconds * 1e3:.1f}", ratio(trl.seconds, result.seconds)]
                row += [f"{result.peak / MIB:.0f}", ratio(trl.peak, result.peak)]
            if copied:
                passes = 3 if result.name == "one read, one write" else PASSES
                moved = passes * dtype.itemsize * num_rows * num_columns / result.seconds
                row += [number(moved / 1e9, 0), number(100 * moved / copied, 0)]
            rows.append(row)
    header = [
        "N x V",
        "dtype",
        "beta",
        "what",
        "ms",
        "x faster than TRL",
        "extra MiB",
        "TRL's / this memory",
    ]
    if copied:
        header += ["GB/s at 7 passes", "% of a copy's"]
    return table(header, rows)


def linear_results(sizes: Iterable[tuple], device: str, rounds: int) -> list[Result]:
    """[Result] for (N, H, V, dtype, with contenders): linear_jsd, its three GEMMs, and the lm_head
    followed by TRL.
    """
    results = []
    for num_rows, hidden_size, num_columns, dtype, with_contenders in sizes:
        settings = dict(beta=0.5, temperature=2.0)
        student, teacher, weight = hidden_tensors(num_rows, hidden_size, num_columns, dtype, device)
        runs = {
            "linear_jsd": contenders.run_linear(student, teacher, weight, settings),
            "three GEMMs": contenders.run_gemms(student, teacher, weight),
        }
        if with_contenders:
            runs["lm_head + TRL"] = contenders.run_linear_trl(student, teacher, weight, settings)
        if device == "cuda":
            runs["Liger, fused linear"] = contenders.run_linear_liger(
                student, teacher, weight, settings
            )
        case = (num_rows, hidden_size, num_columns, dtype)
        if device == "cpu" and dtype == torch.float16:
            del runs["three GEMMs"]
            results.append(
                Result(
                    case,
                    "three GEMMs",
                    failure="not run: torch's float16 GEMM takes minutes on a CPU",
                )
            )
        repeats = rounds if num_rows <= 1024 or device == "cuda" else 2
        results += measure(
            case, runs, device, repeats, num_rows <= 512 or device == "cuda", student.nbytes
        )
        del runs, student, teacher, weight
    return results


def linear_table(results: Sequence[Result]) -> str:
    """The table of `linear_results`."""
    rows, gemms = [], {result.case: result for result in results if result.name == "three GEMMs"}
    for result in results:
        num_rows, hidden_size, num_columns, dtype = result.case
        row = [f"{num_rows} x {hidden_size} x {num_columns}", dtype_name(dtype), result.name]
        if result.failure:
            row += [result.failure, "-", "-", "-"]
        else:
            row += [f"{result.seconds:.3f}", ratio(result.seconds, gemms[result.case].seconds, 2)]
            row += [f"{result.peak / MIB:.0f}", f"{result.above_outputs / MIB:.0f}"]
        rows.append(row)
    return table(
        ["N x H x V", "dtype", "what", "s", "x three GEMMs", "extra MiB", "less outputs"], rows
    )


def count_collectives(calls: Counter[str]) -> None:
    """Wrap torch.distributed's collectives so that `calls` counts them."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args: Any, _original: Callable = original, **kwargs: Any) -> Any:
            calls["collectives"] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counted)


def collective_seconds(num_rows: int, group: dist.ProcessGroup) -> float:
    """Median seconds of the two collectives of a chunk of `num_rows`, between ranks that arrive
    together.
    """
    side = SideStatistics(*torch.rand(len(SideStatistics._fields), num_rows, dtype=torch.float64))
    sums, samples = Sums(*torch.rand(len(Sums._fields), num_rows, dtype=torch.float64)), []
    for _ in range(20):
        dist.barrier(group)
        start = time.perf_counter()
        gather_statistics(side, side, 1.0, group)
        reduce_sums(sums, group)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def parallel_rank(
    rank: int,
    world_size: int,
    folder: str,
    num_rows: int,
    num_columns: int,
    hidden_size: int,
    rounds: int,
) -> None:
    """One gloo rank with one thread: its part of every contender, timed between barriers. Rank 0
    writes the numbers.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    group, local = dist.group.WORLD, num_columns // world_size
    settings = dict(beta=0.5, temperature=2.0)
    student, teacher = logit_tensors(num_rows, local, torch.float32, "cpu", seed=rank)
    student_hidden, teacher_hidden, weight = hidden_tensors(
        num_rows, hidden_size, local, torch.float32, "cpu"
    )
    runs = {
        "vocab_parallel_jsd": contenders.run_ours(student, teacher, settings, group),
        "plain torch": contenders.run_plain(student, teacher, settings, group),
        "linear_jsd": contenders.run_linear(
            student_hidden, teacher_hidden, weight, settings, group
        ),
        "three GEMMs": contenders.run_gemms(student_hidden, teacher_hidden, weight),
    }
    chunk_rows = _chunk_rows(num_rows, local, weight.device)
    together = collective_seconds(chunk_rows, group)
    calls: Counter[str] = Counter()
    results: dict[str, tuple[float, float, int]] = {}
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
        answer = dict(results=results, chunks=-(-num_rows // chunk_rows), together=together)
        Path(folder, "results.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def parallel_table(sizes: Iterable[tuple], rounds: int) -> str:
    """Rows for (TP, N, V, H) on gloo ranks of one thread each; the time of rank 0."""
    rows = []
    for world_size, *size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            # raises if a rank does, and ends the others
            torch.multiprocessing.spawn(
                parallel_rank, (world_size, folder, *size, rounds), nprocs=world_size
            )
            answer = json.loads(Path(folder, "results.json").read_text())
        num_rows, num_columns, hidden_size = size
        for name, (seconds, peak, collectives) in answer["results"].items():
            rows.append(
                [
                    f"{world_size}",
                    f"{num_rows} x {num_columns} (H {hidden_size})",
                    name,
                    f"{seconds * 1e3:.0f}",
                    f"{peak / MIB:.0f}",
                    f"{collectives}",
                    f"{answer['together'] * 1e3:.1f} of {seconds / answer['chunks'] * 1e3:.0f}"
                    if name == "linear_jsd"
                    else "",
                ]
            )
    header = [
        "TP",
        "N x V",
        "what",
        "ms",
        "extra MiB a rank",
        "collectives",
        "a chunk's collectives alone, ms",
    ]
    return table(header, rows)


CHUNKS_NOTE = """\
The bound compares with one product of all N rows for each GEMM. That holds [N, V] (1.2 GiB at
N 2048) and takes 8 % less time per row than products of 256 rows, which chunks of constant memory
give up. What `linear_jsd` adds to the GEMMs of its own chunks (in brackets) are the passes over the
logits, 11 to 18 %. So the bound of 1.2 holds up to N 512 and is borderline above: at N 1024 whole
runs of this page gave 1.22 and 1.28, the case alone 1.13 and 1.19, and chunks of 512 rows (600 MiB)
1.08 and 1.09. Chunks of 256 rows are kept: memory that does not grow with N is worth more here than
a tenth of the time.
"""


def bounds(device: str, logits: list[Result], linear: list[Result], copied: float | None) -> str:
    """What must hold, beside what was measured. Results that a bound needs may be missing."""
    found = {(result.case, result.name): result for result in logits + linear if not result.failure}
    rows: list[list[str]] = []

    def bound(text: str, value: float, held: bool, shown: str) -> None:
        rows.append(
            [text, shown if value == value else "not measured", "held" if held else "missed"]
        )

    def of(case: tuple, name: str) -> Result:
        return found.get((case, name), Result(case, name))

    if device == "cuda":
        case = (4096, 2048, REAL, torch.bfloat16)
        value = of(case, "linear_jsd").seconds / of(case, "three GEMMs").seconds
        bound(
            "linear_jsd, N 4096, bfloat16: at most 1.2 x the three GEMMs",
            value,
            value <= 1.2,
            f"{value:.2f} x",
        )
        case = (4096, REAL, torch.bfloat16, 0.5)
        value = PASSES * 2 * 4096 * REAL / of(case, "vocab_parallel_jsd").seconds / copied
        text = "vocab_parallel_jsd, N 4096, bfloat16: 80 % of a copy's bytes a second"
        bound(text, value, value >= 0.8, f"{value:.0%}")
        return table(["bound", "measured", ""], rows)
    extra = {}
    for num_rows in (256, 512, 1024, 2048):
        case = (num_rows, 2048, REAL, torch.float32)
        value = of(case, "linear_jsd").seconds / of(case, "three GEMMs").seconds
        chunked = num_rows / 256 * of((256, *case[1:]), "three GEMMs").seconds
        share = of(case, "linear_jsd").seconds / chunked
        shown = f"{value:.2f} x ({share:.2f} x those of chunks of 256 rows)"
        bound(
            f"linear_jsd, N {num_rows}: at most 1.2 x the three GEMMs", value, value <= 1.2, shown
        )
        extra[num_rows] = of(case, "linear_jsd").above_outputs / MIB
    value = max(extra.values()) / min(extra.values())
    shown = ", ".join(f"{size:.0f}" for size in extra.values()) + " MiB"
    bound(
        "linear_jsd: memory above inputs and outputs constant in N (within 5 %)",
        value,
        value <= 1.05,
        shown,
    )
    for num_rows in (256, 1024):
        case = (num_rows, REAL, torch.float32, 0.5)
        ours, trl = of(case, "vocab_parallel_jsd"), of(case, "TRL")
        value = trl.seconds / ours.seconds
        bound(
            f"vocab_parallel_jsd, N {num_rows}: 6 x faster than TRL",
            value,
            value >= 6,
            f"{value:.1f} x",
        )
        value = trl.peak / ours.peak
        bound(
            f"vocab_parallel_jsd, N {num_rows}: a sixth of TRL's memory",
            value,
            value >= 6,
            f"1 / {value:.1f}",
        )
    return table(["bound", "measured", ""], rows)


def machine(device: str) -> str:
    """The GPU, or the processor with its cores and instruction set."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [
        platform.processor()
    ]
    return f"{names[0]}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Of the working tree, and whether that is what was committed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True
        ).stdout.strip()

    changed = (
        " with changes" if git("status", "--porcelain", "--", "megatron_gkd", "benchmarks") else ""
    )
    return (git("rev-parse", "--short", "HEAD") or "no commit") + changed


def kernels_section() -> str:
    """What is known of the Triton kernels without a GPU: how many instructions the compiler
    generates for them.
    """
    if importlib.util.find_spec("triton") is None:
        return ""
    from benchmarks.kernel_instructions import REASONING, instructions_table

    return f"\n## The kernels, without a GPU\n\n{REASONING}\n\n{instructions_table()}"


def cases(device: str, small: bool) -> tuple[list[tuple], list[tuple], list[tuple]]:
    """Sizes of the three tables: (N, V, dtype, beta), (N, H, V, dtype, with contenders), (TP, N, V,
    H).
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if small:
        return [(16, OTHER, fp32, 0.5)], [(16, 64, OTHER, fp32, True)], [(2, 16, OTHER, 64)]
    if device == "cuda":
        logits = [
            (n, v, d, 0.5)
            for d in (fp32, bf16, fp16)
            for v in (OTHER, REAL)
            for n in (256, 1024, 4096, 8192)
        ]
        logits += [(4096, REAL, bf16, beta) for beta in (0.1, 0.3, 0.9)]
        linear = [
            (n, 2048, REAL, d, n < 4096) for d in (bf16, fp16) for n in (256, 1024, 4096, 8192)
        ]
        return logits, linear + [(1024, 2048, REAL, fp32, True)], []
    logits = [(256, REAL, d, 0.5) for d in (bf16, fp16, fp32)]
    logits += [(n, REAL, fp32, 0.5) for n in (1024, 2048, 8192)] + [(8192, REAL, bf16, 0.5)]
    logits += [(256, OTHER, fp32, beta) for beta in (0.1, 0.3, 0.5, 0.9)]
    logits += [(n, OTHER, fp32, 0.5) for n in (2048, 8192)]
    linear = [(n, 2048, REAL, fp32, n == 256) for n in (256, 512, 1024, 2048)] + [
        (8192, 2048, OTHER, fp32, False)
    ]
    linear += [(64, 2048, REAL, bf16, False), (64, 2048, OTHER, fp16, False)]
    return logits, linear, [(tp, 256, REAL, 2048) for tp in (1, 2, 4, 8)]


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write the page."""
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, arguments.rounds
    logit_sizes, linear_sizes, parallel_sizes = cases(device, arguments.small)
    copied = copy_bandwidth() if device == "cuda" else None
    logits, linear = (
        logits_results(logit_sizes, device, rounds),
        linear_results(linear_sizes, device, rounds),
    )
    command = "python -m benchmarks.loss " + " ".join(sys.argv[1:])
    text = (
        f"# The loss, measured\n\nCommit {commit()}; {machine(device)}; "
        f"{arguments.threads} threads; torch {torch.__version__}; `{command.strip()}`. "
        "How: the head of `benchmarks/loss.py`. Temperature 2.\n"
    )
    if copied:
        text += f"\nTensor.copy_ of 1 GiB moves {copied / 1e9:.0f} GB/s, read and written.\n"
    if not arguments.small:
        text += "\n## Bounds\n\n" + bounds(device, logits, linear, copied)
        text += "" if device == "cuda" else f"\n{CHUNKS_NOTE}"
    text += "\n## From logits, forward and backward\n\n" + logits_table(logits, copied)
    text += "\n## From hidden states, forward and backward\n\n" + linear_table(linear)
    if parallel_sizes:
        text += "\n## On gloo ranks of one thread each\n\n" + parallel_table(
            parallel_sizes, min(rounds, 2)
        )
    if device == "cpu":
        text += kernels_section()
    print(text)
    output = arguments.output or (None if arguments.small else DOCS[device])
    if output:
        Path(output).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--output", help="a file for the Markdown, instead of the page in docs/benchmarks"
    )
    main(parser.parse_args())
