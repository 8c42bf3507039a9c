"""What a rank does, as a list of countable items: products, attention, bytes moved by other
kernels, launches, waits of the host, collectives. Sizes come from the code that stands; a machine's
rates (rates.py) make seconds of them.

`times` of an item may be a fraction: micro-batches of a mean step, layers of a mean stage.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Item:
    """part: what its seconds are called. Nothing changes an item once it is made; as frozen classes
    items would take twice as long to make, and plans make millions.
    """

    part: str
    times: float = 1.0


@dataclass(kw_only=True)
class Product(Item):
    """[rows, inner] x [inner, columns]. groups: of experts that have `rows` together, each with a
    matrix of its own; `outer`: they have `inner` together, and a result each.
    """

    rows: float
    columns: float
    inner: float
    groups: int = 0
    outer: bool = False
    adds: bool = False
    """Whether the result is added to one that is read"""
    number_bytes: int

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.columns * self.inner * self.times

    @property
    def num_bytes(self) -> float:
        """Read and written."""
        groups = max(self.groups, 1)
        left, right = self.rows * self.inner, self.inner * self.columns
        result = self.rows * self.columns * (1 + self.adds)
        if self.outer:
            result *= groups
        else:
            right *= groups
        return (left + right + result) * self.number_bytes * self.times


@dataclass(kw_only=True)
class Attention(Item):
    """pairs: (query, key) that see each other, over all rows; row: positions of a row."""

    part: str = "attention"
    pairs: float
    row: float
    heads: float
    """Query heads times head size"""
    backward: bool = False

    @property
    def flops(self) -> float:
        """Two products of a pair forward, five backward, which computes the scores again."""
        return (10 if self.backward else 4) * self.pairs * self.heads * self.times


@dataclass(kw_only=True)
class Moved(Item):
    """Bytes that a kernel reads and writes, if it is one."""

    part: str = "elementwise kernels"
    kernel: str
    num_bytes: float


@dataclass(kw_only=True)
class Launches(Item):
    """Kernels, as docs/training_step.md counts them. kind: forward, backward, eager (a token of a
    rollout), graph (the same, replayed: then it is the device that takes this time).
    """

    part: str = "launches"
    kind: str

    @property
    def of_device(self) -> bool:
        return self.kind == "graph"


@dataclass(kw_only=True)
class Waits(Item):
    """Of the host for the device."""

    part: str = "waits"
    of_device: bool = False


@dataclass(kw_only=True)
class Collective(Item):
    """kind: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, send; group: a name of
    placement.py. num_bytes: of the whole tensor (gathered, or before it is scattered); of an
    all_to_all what a rank gives.
    """

    kind: str
    group: str
    num_bytes: float


# Kernels that a CPU has alone: of memory that the system hands out, and of LoRA's matrices that are
# copied beside each other for each pair of a token and an expert (rollout/torch_kernels.py).
FRESH, PAIR_MATRICES = "fresh", "pair_matrices"
Work = list[Item]


def repeated(work: Iterable[Item], times: float) -> Work:
    """The same work so many times."""
    return list(work) if times == 1 else [_repeated(item, times) for item in work]


def _repeated(item: Item, times: float) -> Item:
    """What dataclasses.replace would give, in a fraction of its time."""
    again = object.__new__(type(item))
    again.__dict__.update(item.__dict__, times=item.times * times)
    return again
