r"""Attention over packed rows, forward and backward: the ways that model/attention.py chooses from.

    python -m benchmarks.attention [--device auto] [--dtype bfloat16] [--heads 32] [--groups 4]
        [--head_dim 128] [--rounds 10] [--calls 10] [--lengths 2048x4 --lengths 16384 ...]
        [--output FILE]

`--lengths` names a case: tokens of each row, 2048x4 for four rows of 2,048. The ways take turns,
the first two rounds warm up; medians of rounds, of which each is so many calls one after the other.
One batch: `scaled_dot_product_attention` of rows of one length. At once: `varlen_attn`, which only
CUDA in 16 bits has. Row by row: a call of the first a row. "New" is the first call, forward and
backward, at these lengths, with what is compiled for it; at the first case also what starts once.
The rate counts 4 h d operations of a (query, visible key) pair forward and 2.5 times as many
backward. Values and gradients of all ways must agree, or the exit status is 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.meter import Meter, measure
from benchmarks.report import commit, machine, number, table
from megatron_gkd.model.attention import SdpaAttention, has_varlen_kernel
from megatron_gkd.model.packed_rows import PackedRows
from megatron_gkd.parallel import resolve_device

CASES = ("2048x4", "8192", "1500,300,2500,900,2400,592", "128x64")
AGREE = 2e-2  # of the largest entry, in 16 bits


def read_lengths(text: str) -> list[int]:
    """ "700,30x2" -> [700, 30, 30]."""
    parts = (part.split("x") for part in text.split(","))
    return [int(length) for length, *times in parts for _ in range(int(*times) if times else 1)]


def ways(module: SdpaAttention, rows: PackedRows, query: Tensor) -> dict[str, Callable]:
    """Name -> the function of (query, key, value, rows)."""
    found: dict[str, Callable] = {"row by row": module.attend_by_row}
    if has_varlen_kernel(query):
        found["at once"] = module.attend_at_once
    if rows.common_length:
        found["one batch"] = module.attend
    return found


def backward(
    attend: Callable, inputs: Sequence[Tensor], cotangent: Tensor, rows: PackedRows
) -> tuple[Tensor, ...]:
    """Output and the three gradients."""
    output = attend(*inputs, rows)
    return (output, *torch.autograd.grad(output, inputs, cotangent))


def run_case(text: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row of the table for each way."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    lengths = read_lengths(text)
    starts = [0, *accumulate(lengths)]
    rows = PackedRows(starts=starts, device=device)
    config: Any = SimpleNamespace(kv_channels=options.head_dim)
    module = SdpaAttention(config, 1, AttnMaskType.causal)
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (starts[-1], heads, options.head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = [draw(n).requires_grad_() for n in (options.heads, options.groups, options.groups)]
    cotangent = draw(options.heads)
    chosen = ways(module, rows, inputs[0])
    new, results, meter = {}, {}, Meter(options.device)

    def first_call(name: str) -> None:
        results[name] = backward(chosen[name], inputs, cotangent, rows)

    for name in chosen:
        new[name] = meter(partial(first_call, name))[0]
        for mine, its in zip(results[name], results["row by row"]):
            error = (mine.float() - its.float()).abs().max() / its.float().abs().max()
            if not error <= AGREE:
                sys.exit(f"{text}: {name} is off by {error:.1e}")
    results.clear()

    def forward(attend: Callable) -> None:
        with torch.no_grad():
            for _ in range(options.calls):
                attend(*inputs, rows)

    def both(attend: Callable) -> None:
        for _ in range(options.calls):
            backward(attend, inputs, cotangent, rows)

    runs: dict[str, Contender] = {}
    for name, attend in chosen.items():
        runs[name] = partial(forward, attend)
        runs[f"{name}, both"] = partial(both, attend)
    timed = measure((text,), runs, options.device, options.rounds, 2, 0)
    for result in timed:
        if result.failure:
            sys.exit(f"{text}: {result.name}: {result.failure}")
    seconds = {result.name: result.seconds / options.calls for result in timed}
    flops = 2 * options.heads * options.head_dim * sum(n * (n + 1) for n in lengths)
    return [
        (
            text,
            name,
            number(1e3 * new[name], 1),
            number(1e3 * seconds[name], 2),
            number(1e3 * seconds[f"{name}, both"], 2),
            number(flops * 3.5 / seconds[f"{name}, both"] / 1e12, 1),
        )
        for name in chosen
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="auto")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--heads", type=int, default=32)
    add("--groups", type=int, default=4, help="key/value heads")
    add("--head_dim", type=int, default=128)
    add("--rounds", type=int, default=10)
    add("--calls", type=int, default=10, help="of a round")
    add("--lengths", action="append", help=f"again for each case; by default {' '.join(CASES)}")
    add("--output", type=Path, help="the page")
    options = parser.parse_args(argv)
    options.device = resolve_device(options.device).type
    header = ("rows", "way", "new, ms", "forward, ms", "both, ms", "TFLOP/s of both")
    title = f"{machine(options.device)}, torch {torch.__version__}, commit {commit()}"
    sizes = f"{options.heads} heads, {options.groups} of keys, {options.head_dim} wide"
    lines: list[tuple[str, ...]] = []
    for text in options.lengths or CASES:
        lines += run_case(text, options)
        said = table(header, lines)
        if options.output:  # after each case: what comes later may fail
            page = f"# Attention over packed rows\n\n{title}, {options.dtype}, {sizes}.\n\n{said}"
            options.output.write_text(page, encoding="utf-8")
    print(said)


if __name__ == "__main__":
    main()
