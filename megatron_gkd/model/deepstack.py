"""The first decoder layers also read what the vision tower saw on its way: features added to their output (DeepStack).

The features travel as the `context` that megatron-core's TransformerBlock hands from layer to layer, an explicit input
of every recomputed layer. D layers with features, M media tokens in this rank's shard of the sequence, H hidden size.
"""

from typing import Optional

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepstackLayer(TransformerLayer):
    """A TransformerLayer whose output gains `context[its number]` at some tokens. Without `context` it is the same."""

    def forward(self, *args, context: Optional[Tensor] = None, context_mask: Optional[Tensor] = None, **kwargs):
        """Hidden states [S/TP, B, H] as megatron-core passes them; context [D, M, H], context_mask int64 [2, M], each
        token's position in the shard and row -> (hidden states, what the next layer gets as `context`). No collectives
        of its own.
        """
        output, _ = super().forward(*args, **kwargs)
        if context is None:
            return output, None
        output = output.index_put(tuple(context_mask), context[self.layer_number - 1], accumulate=True)
        return output, context if self.layer_number < len(context) else None


def check_deepstack(num_features: int, num_layers: int, pp_size: int) -> None:
    """Raise ValueError unless the first of `pp_size` equal pipeline stages holds every layer that reads features.

    num_features: how many layers the vision tower feeds; num_layers: of the decoder.
    """
    needed, held = min(num_features, num_layers), num_layers // pp_size
    if needed > held:
        most = max(size for size in range(1, pp_size) if num_layers % size == 0 and num_layers // size >= needed)
        raise ValueError(
            f"the vision tower feeds the first {needed} decoder layers, and the first of {pp_size} pipeline stages "
            f"holds {held}: images and videos need --pipeline_model_parallel_size {most} or less with this model"
        )
