"""What the pages of docs/benchmarks/ are written with: Markdown tables, the machine, the commit."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 2**20


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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    """Of the working tree, and whether that is what was committed; $COMMIT where that is set, for a
    copy without .git.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True
        ).stdout.strip()

    changed = (
        " with changes" if git("status", "--porcelain", "--", "megatron_gkd", "benchmarks") else ""
    )
    return (git("rev-parse", "--short", "HEAD") or "no commit") + changed
