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
import importlib.util
import sys
from pathlib import Path

import torch

from benchmarks.loss_bounds import CHUNKS_NOTE, bounds
from benchmarks.loss_parallel import parallel_table
from benchmarks.loss_tables import (
    OTHER,
    REAL,
    linear_results,
    linear_table,
    logits_results,
    logits_table,
)
from benchmarks.meter import copy_bandwidth
from benchmarks.report import REPOSITORY, commit, machine

DOCS = {
    "cpu": REPOSITORY / "docs/benchmarks/loss.md",
    "cuda": REPOSITORY / "docs/benchmarks/loss_gpu.md",
}


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
        text += "\n## Bounds\n\n" + bounds(logits, linear, copied)
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
