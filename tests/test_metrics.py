"""What a run measures. Sums and means are compared with references in test_step_parity.py and
test_train.py.
"""

import torch

from megatron_gkd.metrics import peak_memory_bytes
from tests.ranks import run_ranks


def peak_before_and_after(rank, world_size, num_bytes):
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(before + num_bytes, dtype=torch.int8)
    return before, peak_memory_bytes(torch.device("cpu")), block.numel()


def test_peak_memory_is_in_bytes_and_sees_an_allocation():
    before, after, allocated = run_ranks(peak_before_and_after, 1, 64 * 2**20)[0]
    assert max(before, allocated) < after < 2**40
