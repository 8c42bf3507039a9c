"""What a machine does in a second: products, attention, kernels, launches, collectives.

A file of rates is JSON, {"name", "device", "entries": {name: {"value", "unit", "source"}}, ...}.
`python -m benchmarks.rates` measures one on any machine; that of an H100 SXM ships with the package
(h100_sxm.json: published figures and measured ones, each with its source). Entries, b/s: bytes a
second:

    gpu_memory_bytes, gpus_per_node, nics_per_gpu
    dense.SIDE, grouped.SIDE   FLOP/s of products by their smallest side, which is SIDE: rows,
                               columns or inner (experts: rows or inner of one expert); points
                               [size, FLOP/s], between which logarithms are interpolated
    outer.SIDE                 the same of products over the rows of an expert (gradients of
                               matrices); without it grouped.SIDE
    grouped.group              seconds that each expert of a product takes besides
    attention.forward, .backward   FLOP/s by the positions of a row; half of the square is computed
    bytes.KERNEL               b/s read and written; of a kernel without an entry bytes.copy's
    bytes.fresh                b/s of memory that the system hands out anew, as a CPU's does in each
                               step; without it that costs nothing (CUDA's is kept by torch)
    bytes.pair_matrices        b/s of LoRA's matrices that a rollout's token copies for each pair of
                               row and expert, as on a CPU; without it that costs nothing
    launch.KIND                seconds of a kernel's launch: forward, backward, eager, graph
    wait                       seconds of a wait of the host besides the device's work
    node.KIND, network.KIND    b/s of a rank in a collective inside a machine, and of a NIC between
                               machines: all_gather, reduce_scatter, all_reduce, all_to_all, send,
                               broadcast, and "any" for those without an entry
    node.KIND.step, network.KIND.step   seconds of each step of it, whatever its size

A collective of N ranks on n machines, g of them on each, with S bytes (work.py), where B is the
node's rate and A that of a rank's NICs together. It takes its steps' seconds and the slower of the
two links':

    all_gather, reduce_scatter   (N - 1) / N S / B;  (n - 1) / n S / (g A);  ceil(log2 N) steps
    all_reduce                   twice that
    all_to_all                   (g - 1) / N S / B;  (N - g) / N S / A;      N - 1 steps
    broadcast, send              S / B, or S / A where it leaves the machine; 1 step

A ring over machines uses the NICs of all its ranks there (NCCL); an exchange of pairs only those of
the rank that sends. Imports nothing slow.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_gkd.plan.placement import Group
from megatron_gkd.plan.work import (
    FRESH,
    PAIR_MATRICES,
    Attention,
    Collective,
    Item,
    Launches,
    Moved,
    Product,
    Waits,
)

OF_CPU = (FRESH, PAIR_MATRICES)
SHIPPED = {"h100": "h100_sxm.json"}
LONGEST_NAME = 200
BY_SIZE = ("dense.", "grouped.", "outer.", "attention.")  # entries that may be points
Points = tuple[tuple[float, float], ...]
# Entries that a file must have.
NEEDED = (
    *("gpu_memory_bytes", "gpus_per_node", "nics_per_gpu"),
    *(f"{kind}.{side}" for kind in ("dense", "grouped") for side in ("rows", "columns", "inner")),
    *("grouped.group", "attention.forward", "attention.backward", "bytes.copy", "wait"),
    *(f"launch.{kind}" for kind in ("forward", "backward", "eager", "graph")),
)


@dataclass(frozen=True)
class Rates:
    """Of one machine; see the file's docstring. Change one with dataclasses.replace."""

    name: str
    device: str
    """cuda, where launches go ahead of the device's work, or cpu, where they are part of it"""
    gpu_memory_bytes: int
    gpus_per_node: int
    nics_per_gpu: float
    entries: dict[str, float | Points]

    def number(self, name: str) -> float:
        value = self.entries[name]
        assert isinstance(value, float), name
        return value

    def at(self, name: str, size: float) -> float:
        """Of an entry with points: at this size."""
        points = self.entries[name]
        return points if isinstance(points, float) else interpolate(points, size)

    def bytes_per_second(self, kernel: str) -> float:
        name = f"bytes.{kernel}"
        return self.number(name if name in self.entries else "bytes.copy")

    def seconds(self, item: Item, groups: dict[str, Group]) -> float:
        """Of all times of an item, alone."""
        if isinstance(item, Product):
            return self._product(item)
        if isinstance(item, Attention):
            kind = "backward" if item.backward else "forward"
            return item.flops / self.at(f"attention.{kind}", item.row) if item.flops else 0.0
        if isinstance(item, Moved):
            if item.kernel in OF_CPU and f"bytes.{item.kernel}" not in self.entries:
                return 0.0
            return item.times * item.num_bytes / self.bytes_per_second(item.kernel)
        if isinstance(item, Launches):
            return item.times * self.number(f"launch.{item.kind}")
        if isinstance(item, Waits):
            return item.times * self.number("wait")
        assert isinstance(item, Collective), item
        return item.times * self.collective(item.kind, item.num_bytes, groups[item.group])

    def _product(self, item: Product) -> float:
        """The slower of its multiplications and its bytes."""
        flops = item.flops
        if not flops:
            return 0.0
        groups = max(item.groups, 1)
        side, size = "rows", item.rows if item.outer else item.rows / groups
        if item.columns < size:
            side, size = "columns", item.columns
        inner = item.inner / groups if item.outer else item.inner
        if inner < size:
            side, size = "inner", inner
        kind = "grouped" if item.groups else "dense"
        if item.outer and f"outer.{side}" in self.entries:
            kind = "outer"
        of_bytes = item.num_bytes / self.bytes_per_second("product")
        found = max(flops / self.at(f"{kind}.{side}", size), of_bytes)
        if not item.groups:
            return found
        return found + item.times * item.groups * self.number("grouped.group")

    def collective(self, kind: str, num_bytes: float, group: Group) -> float:
        """Seconds of one collective; of a group of one none."""
        size, nodes, on_node = group.size, group.nodes, group.ranks_per_node
        if size == 1:
            return 0.0
        link = "network" if nodes > 1 else "node"
        inside = self._link("node", kind) if on_node > 1 else math.inf
        outside = self.nics_per_gpu * self._link("network", kind) if nodes > 1 else math.inf
        share, between = (size - 1) / size, (nodes - 1) / nodes
        steps = math.ceil(math.log2(size))
        if kind == "all_to_all":
            own, other = (on_node - 1) / size / inside, (size - on_node) / size / outside
            steps = size - 1
        elif kind in ("broadcast", "send"):
            own, other, steps = (1 / inside if nodes == 1 else 0.0), 1 / outside, 1
        else:
            own, other = share / inside, between / (on_node * outside)
            if kind == "all_reduce":
                own, other, steps = 2 * own, 2 * other, 2 * steps
        return steps * self._step(link, kind) + num_bytes * max(own, other)

    def _link(self, link: str, kind: str) -> float:
        return self._of_link(link, f"{link}.{kind}", f"{link}.any")

    def _step(self, link: str, kind: str) -> float:
        return self._of_link(link, f"{link}.{kind}.step", f"{link}.any.step")

    def _of_link(self, link: str, *names: str) -> float:
        """The first of the entries that is there. A file that was measured on one machine has none
        of a network.
        """
        for name in names:
            if name in self.entries:
                return self.number(name)
        where = "between machines" if link == "network" else "inside a machine"
        raise ValueError(
            f"the rates of {self.name} have no {names[-1]}, for collectives {where}: add it to the "
            "file, as h100_sxm.json has it, or plan for as many GPUs as it was measured on"
        )


def interpolate(points: Points, size: float) -> float:
    """Between the two points around `size`, of logarithms; beyond the ends the end's."""
    (low, value), *rest = points
    if size <= low:
        return value
    for high, other in rest:
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return value * (other / value) ** share
        low, value = high, other
    return value


def read_rates(name_or_path: str) -> Rates:
    """`h100`, or a file that benchmarks/rates.py wrote. Raises ValueError naming the file and the
    entry that is missing or no number.
    """
    shipped = SHIPPED.get(name_or_path.lower())
    path = Path(__file__).parent / shipped if shipped else Path(name_or_path)
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(SHIPPED)
        raise ValueError(
            f"--gpu {name_or_path}: no such file, and none of the rates that ship ({known}); "
            "python -m benchmarks.rates --output FILE measures those of a machine, --gpu_memory "
            "gives the rates that ship another memory"
        ) from None
    except OSError as error:
        raise ValueError(f"--gpu {name_or_path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--gpu {path}: no JSON: {error}") from None
    return rates_of(file, str(path))


def rates_of(file: Any, path: str) -> Rates:
    """Of a file's content. Raises as `read_rates`."""
    if not isinstance(file, dict) or not isinstance(file.get("entries"), dict):
        raise ValueError(f'{path}: no rates: "entries" is missing')
    entries: dict[str, float | Points] = {}
    for name, entry in file["entries"].items():
        value = entry.get("value") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not entry.get("source") or not entry.get("unit"):
            raise ValueError(f"{path}: {name} has no value, unit and source")
        entries[name] = _value(name, value, f"{path}: {name}")
    for name in NEEDED:
        if name not in entries:
            raise ValueError(f"{path}: {name} is missing")
    device = file.get("device")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"{path}: device is {device!r}, it must be cuda or cpu")
    title = file.get("name", path)
    if not isinstance(title, str) or not title.isprintable() or len(title) > LONGEST_NAME:
        # it stands in launch scripts
        raise ValueError(f"{path}: name must be one line of {LONGEST_NAME} characters or less")
    rates = Rates(title, device, 0, 0, 0.0, entries)
    rates = replace(
        rates,
        gpu_memory_bytes=int(rates.number("gpu_memory_bytes")),
        gpus_per_node=int(rates.number("gpus_per_node")),
        nics_per_gpu=rates.number("nics_per_gpu"),
    )
    if rates.gpus_per_node < 1:
        raise ValueError(f"{path}: gpus_per_node is {rates.number('gpus_per_node')}, below 1")
    return rates


def _number(value: Any, where: str, *, may_be_zero: bool) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"{where} is {value!r}, it must be a number, 0 or more")
    if not value and not may_be_zero:
        raise ValueError(f"{where} is 0, it must be above 0")
    return float(value)


def _value(name: str, value: Any, where: str) -> float | Points:
    """Of an entry: one number, or where it goes by a size also points."""
    is_time = name in ("wait", "grouped.group") or name.startswith("launch.")
    if not isinstance(value, list):
        return _number(value, where, may_be_zero=is_time or name.endswith(".step"))
    if is_time or not name.startswith(BY_SIZE):
        raise ValueError(f"{where} must be one number")
    if not value or not all(isinstance(point, list) and len(point) == 2 for point in value):
        raise ValueError(f"{where} must be points [size, rate]")
    positive = lambda number: _number(number, where, may_be_zero=False)
    points = tuple((positive(size), positive(rate)) for size, rate in value)
    if list(points) != sorted(points):
        raise ValueError(f"{where}: its points must ascend")
    return points
