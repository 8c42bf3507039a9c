"""What must hold of the loss, beside what was measured."""

import torch

from benchmarks.loss_tables import PASSES, REAL
from benchmarks.meter import Result
from benchmarks.report import MIB, table

CHUNKS_NOTE = """\
The bound compares with one product of all N rows for each GEMM. That holds [N, V] (1.2 GiB at
N 2048) and takes 8 % less time per row than products of 256 rows, which chunks of constant memory
give up. What `linear_jsd` adds to the GEMMs of its own chunks (in brackets) are the passes over the
logits, 11 to 18 %. So the bound of 1.2 holds up to N 512 and is borderline above: at N 1024 whole
runs of this page gave 1.22 and 1.28, the case alone 1.13 and 1.19, and chunks of 512 rows (600 MiB)
1.08 and 1.09. Chunks of 256 rows are kept: memory that does not grow with N is worth more here than
a tenth of the time.
"""


class Measured:
    """Results by case and name; a case that was not measured has NaN."""

    def __init__(self, results: list[Result]) -> None:
        self.found = {(r.case, r.name): r for r in results if not r.failure}

    def __call__(self, case: tuple, name: str) -> Result:
        return self.found.get((case, name), Result(case, name))

    def over_gemms(self, case: tuple) -> float:
        """Seconds of `linear_jsd` over those of the three GEMMs."""
        return self(case, "linear_jsd").seconds / self(case, "three GEMMs").seconds


def bounds(logits: list[Result], linear: list[Result], copied: float | None) -> str:
    """The table of what must hold, beside what was measured. Results that a bound needs may be
    missing. copied: measured bytes per second of a copy; None except on CUDA.
    """
    measured = Measured(logits + linear)
    rows = gpu_bounds(measured, copied) if copied else cpu_bounds(measured)
    return table(["bound", "measured", ""], rows)


def bound(text: str, value: float, held: bool, measured: str) -> list[str]:
    """A row. A value that is not known is NaN: not measured, and so not held."""
    known = value == value
    return [text, measured if known else "not measured", "held" if held else "missed"]


def gpu_bounds(measured: Measured, copied: float) -> list[list[str]]:
    gemms = measured.over_gemms((4096, 2048, REAL, torch.bfloat16))
    seconds = measured((4096, REAL, torch.bfloat16, 0.5), "vocab_parallel_jsd").seconds
    share = PASSES * 2 * 4096 * REAL / seconds / copied
    return [
        bound(
            "linear_jsd, N 4096, bfloat16: at most 1.2 x the three GEMMs",
            gemms,
            gemms <= 1.2,
            f"{gemms:.2f} x",
        ),
        bound(
            "vocab_parallel_jsd, N 4096, bfloat16: 80 % of a copy's bytes a second",
            share,
            share >= 0.8,
            f"{share:.0%}",
        ),
    ]


def cpu_bounds(measured: Measured) -> list[list[str]]:
    rows, extra = [], []
    for num_rows in (256, 512, 1024, 2048):
        case = (num_rows, 2048, REAL, torch.float32)
        gemms, linear = measured.over_gemms(case), measured(case, "linear_jsd")
        chunked = num_rows / 256 * measured((256, *case[1:]), "three GEMMs").seconds
        text = f"{gemms:.2f} x ({linear.seconds / chunked:.2f} x those of chunks of 256 rows)"
        what = f"linear_jsd, N {num_rows}: at most 1.2 x the three GEMMs"
        rows.append(bound(what, gemms, gemms <= 1.2, text))
        extra.append(linear.above_outputs / MIB)
    growth = max(extra) / min(extra)
    what = "linear_jsd: memory above inputs and outputs constant in N (within 5 %)"
    text = ", ".join(f"{size:.0f}" for size in extra) + " MiB"
    rows.append(bound(what, growth, growth <= 1.05, text))
    for num_rows in (256, 1024):
        logits = (num_rows, REAL, torch.float32, 0.5)
        ours, trl = measured(logits, "vocab_parallel_jsd"), measured(logits, "TRL")
        faster, smaller = trl.seconds / ours.seconds, trl.peak / ours.peak
        name = f"vocab_parallel_jsd, N {num_rows}"
        rows.append(bound(f"{name}: 6 x faster than TRL", faster, faster >= 6, f"{faster:.1f} x"))
        what = f"{name}: a sixth of TRL's memory"
        rows.append(bound(what, smaller, smaller >= 6, f"1 / {smaller:.1f}"))
    return rows
