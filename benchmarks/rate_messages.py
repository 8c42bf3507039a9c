"""What benchmarks/rates.py times between ranks: collectives and messages, by kind and size."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

MESSAGES = (2**12, 2**16, 2**19, 2**22, 2**24)  # bytes of a collective
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


def quartile(samples: Sequence[float]) -> float:
    """The lower one."""
    return statistics.quantiles(samples, n=4, method="inclusive")[0]


def message_seconds(
    device: torch.device, run: Callable[[], Any], number: int
) -> tuple[float, float]:
    """Of a collective between products, as layers have it: each rank comes to it from work of its
    own, and must be woken where it waits. By the clock on the wall, of so many runs on every rank
    the lower quartile, and the mean without the slowest twentieth: a step has hundreds of them, so
    that the rare long waits for a rank that the system has put to sleep are part of each step.
    """
    x = torch.ones(256, 256, device=device)
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(number + 2):
        for calls in found:
            before = time.perf_counter()
            x @ x
            if calls:
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found[calls].append(time.perf_counter() - before)
    usual = lambda samples: statistics.mean(sorted(samples)[: len(samples) * 19 // 20])
    least, mean = (of(found[True][2:]) - of(found[False][2:]) for of in (quartile, usual))
    return max(least, 1e-7), max(mean, 1e-7)


def collective_entries(device: torch.device, ranks: int) -> dict[str, float]:
    """Seconds of a step and b/s of each kind between the ranks of this machine, as layers call
    them: with megatron-core's Python and a gradient to come.
    """
    rank, world, found = dist.get_rank(), dist.group.WORLD, {}
    steps = {"all_to_all": ranks - 1, "send": 1, "all_reduce": 2 * math.ceil(math.log2(ranks))}
    for kind in KINDS:
        taken = []
        for size in MESSAGES:
            x = torch.zeros(size // 4 // ranks * ranks, device=device, requires_grad=True) * 1.0
            part = x[: len(x) // ranks].contiguous()
            runs: dict[str, Callable[[], Any]] = {
                "all_gather": partial(gather_from_sequence_parallel_region, part, group=world),
                "reduce_scatter": partial(
                    reduce_scatter_to_sequence_parallel_region, x, group=world
                ),
                "all_reduce": partial(dist.all_reduce, x.detach()),
                "all_to_all": partial(all_to_all, world, x),
                "send": partial(_to_and_fro, x.detach(), rank, ranks),
            }
            dist.barrier()
            number = 100 if size == MESSAGES[0] else 30
            there_and_back = 1 + (kind == "send")
            least, mean = message_seconds(device, runs[kind], number)
            taken.append((least / there_and_back, mean / there_and_back))
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(kind, (ranks - 1) / ranks)
        step = taken[0][1]
        # of the bytes between two large messages, where the steps no longer matter
        rate = share * (MESSAGES[-1] - MESSAGES[-3]) / max(taken[-1][0] - taken[-3][0], 1e-9)
        found[f"node.{kind}.step"] = step / steps.get(kind, math.ceil(math.log2(ranks)))
        found[f"node.{kind}"] = rate
    found["node.any"] = min(found[f"node.{kind}"] for kind in KINDS)
    found["node.any.step"] = max(found[f"node.{kind}.step"] for kind in KINDS)
    return found


def _to_and_fro(x: torch.Tensor, rank: int, ranks: int) -> None:
    peer = rank ^ 1
    if peer < ranks:
        for sends in (rank < peer, rank > peer):
            (dist.send if sends else dist.recv)(x, peer)
