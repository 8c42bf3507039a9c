"""Seconds and peak bytes of a run, and of several contenders that run in turn."""

import ctypes
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.contenders import Contender

OURS = ("vocab_parallel_jsd", "linear_jsd")
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


def copy_bandwidth() -> float:
    """Bytes per second, read and written, that Tensor.copy_ moves on this GPU."""
    source, target = (torch.empty(2**29, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    meter = Meter("cuda")
    return (
        2
        * source.nbytes
        / statistics.median(meter(lambda: target.copy_(source))[0] for _ in range(6))
    )


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
    meter = Meter(device)
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
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
