"""The decoder's own small layers: RMSNorm, and rotary angles in Qwen's interleaved layout."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight as Qwen3 computes it, statistics in fp32, for megatron-core's layer
    specs.

    The frozen weight is marked `sequence_parallel`, as megatron-core expects of replicas.
    """

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


class InterleavedRotaryEmbedding(nn.Module):
    """Replaces `GPTModel.rotary_pos_emb` of position_embedding_type "mrope", with the same call
    signature.

    Channel pair i rotates with the temporal position, except that i % 3 == 1 takes the height and i
    % 3 == 2 the width position up to three times their section (TMRoPE). megatron-core's own mrope
    splits the channels into blocks instead. Text has three equal position planes.
    """

    def __init__(self, head_dim: int, rope_theta: float):
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self.register_buffer("inv_freq", 1.0 / rope_theta**exponent, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group=None, **_) -> Tensor:
        """position_ids [3, B, S] (time, height, width) -> angles [S, B, 1, head_dim] in fp32."""
        angles = position_ids.float()[..., None] * self.inv_freq.to(position_ids.device)
        mixed = angles[0].clone()
        for axis in (1, 2):
            channels = slice(axis, 3 * mrope_section[axis], 3)
            mixed[..., channels] = angles[axis][..., channels]
        return torch.cat((mixed, mixed), dim=-1).transpose(0, 1).unsqueeze(2)
