"""Which rows of a Hugging Face projection live where in megatron-core's fused qkv linear.

megatron-core stores q, k and v as one matrix, interleaved by key/value group (the group's queries,
its key, its value), and cuts it into equal blocks of rows, one for each tensor-parallel rank. With
more ranks than groups a block may begin inside a group. Whatever maps weights or adapters between
the two worlds takes the order of the rows from here.
"""

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import TensorSlice, block, cut_rows


def qkv_segments(model_args: ModelArgs, tp_rank: int, tp_size: int) -> list[TensorSlice]:
    """Rank `tp_rank`'s rows of the fused matrix, from its first to its last: rows of q_proj,
    k_proj, v_proj.
    """
    groups, head_dim = model_args.num_key_value_heads, model_args.head_dim
    queries = model_args.num_attention_heads // groups * head_dim
    widths = {"q_proj": queries, "k_proj": head_dim, "v_proj": head_dim}
    fused = [
        TensorSlice(name, (slice(group * width, (group + 1) * width),))
        for group in range(groups)
        for name, width in widths.items()
    ]
    num_rows = (model_args.num_attention_heads + 2 * groups) * head_dim
    return [segment for segment, _ in cut_rows(fused, block(num_rows, tp_rank, tp_size))]
