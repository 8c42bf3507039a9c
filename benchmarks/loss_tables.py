"""The loss from logits and from hidden states against its contenders, in one process."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.meter import OURS, SHARE_OF_MEMORY, Result, available_bytes, measure
from benchmarks.report import MIB, dtype_name, number, ratio, table

REAL, OTHER = 151936, 32000  # columns: Qwen3-Omni's vocabulary, and a small one
PASSES = 7  # reads and writes of a logit: both sides in each of three passes, and the gradient


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


def by_name(results: Iterable[Result]) -> dict[str, Result]:
    return {result.name: result for result in results}


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
