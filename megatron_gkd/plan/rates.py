"""What a machine does in a second, measured: products, attention, kernels, launches, collectives.

A file of rates is JSON that `benchmarks/rates.py` writes; that of an H100 SXM ships with the
package, its entries published or measured, each with its source.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Of one machine; sizes in bytes, rates in a second."""

    name: str
    device: str
    """cuda or cpu"""
    gpu_memory_bytes: int
    gpus_per_node: int


def read_rates(name_or_path: str) -> Rates:
    """`h100`, or a file that benchmarks/rates.py wrote. Raises ValueError naming the file and the
    entry that is missing or no number.
    """
    raise NotImplementedError(name_or_path)
