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
