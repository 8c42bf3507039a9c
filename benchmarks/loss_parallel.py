"""The loss on tensor-parallel ranks: time, memory and collectives of each contender."""

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import contenders
from benchmarks.loss_tables import hidden_tensors, logit_tensors
from benchmarks.meter import Meter
from benchmarks.report import MIB, table
from megatron_gkd.loss.linear import _chunk_rows
from megatron_gkd.loss.passes import gather_statistics, reduce_sums
from megatron_gkd.loss.rows import SideStatistics, Sums

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
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
    assert group is not None
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
