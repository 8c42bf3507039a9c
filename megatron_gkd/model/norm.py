"""RMSNorm as Qwen3 computes it (statistics in fp32), for megatron-core's layer specs with sequence parallelism."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight. The frozen weight is marked `sequence_parallel`, as megatron-core expects of replicas."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype. One kernel on a GPU."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
