"""Where the tests of a GPU run: on CUDA where torch sees a GPU, otherwise nowhere. `DEVICE=cpu`
puts the CPU in its place, so that they can be tried without one.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "")
needs_gpu = pytest.mark.skipif(
    not DEVICE, reason="torch sees no GPU (DEVICE=cpu: a CPU in its place)"
)
# Bytes of shared memory that a block may take, by compute capability: A100, A10, L40S, H100, B200,
# RTX 50 (CUDA C++ Programming Guide, technical specifications per compute capability)
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
