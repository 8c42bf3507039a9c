"""Which rows of a Hugging Face projection live where in the fused qkv linear.

megatron-core stores q, k and v as one matrix, interleaved by key/value group (the group's queries,
its key, its value); checkpoints hold it so. Each tensor-parallel rank has a block of whole groups.
With more ranks than groups a group's queries are divided among several ranks, and each of them has
the group's key and value as well: megatron-core's blocks would begin inside a group, and the whole
projection would have to be gathered in every layer. Whatever maps weights or adapters between the
two worlds takes the order of the rows from here.
"""

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.tensor_slice import TensorSlice, block, cut_rows


def fused_rows(model_args: ModelArgs, tp_rank: int, tp_size: int) -> list[slice]:
    """The rows of the whole fused matrix that rank `tp_rank` holds, one slice below the other."""
    groups, head_dim = model_args.num_key_value_heads, model_args.head_dim
    queries = model_args.num_attention_heads // groups * head_dim
    if tp_size <= groups:
        return [block(groups * (queries + 2 * head_dim), tp_rank, tp_size)]
    group, part = divmod(tp_rank, tp_size // groups)
    first = group * (queries + 2 * head_dim)
    own = block(queries, part, tp_size // groups)
    key = first + queries
    return [slice(first + own.start, first + own.stop), slice(key, key + 2 * head_dim)]


def qkv_segments(model_args: ModelArgs, tp_rank: int, tp_size: int) -> list[TensorSlice]:
    """Rank `tp_rank`'s rows, from its first to its last: rows of q_proj, k_proj, v_proj."""
    groups, head_dim = model_args.num_key_value_heads, model_args.head_dim
    queries = model_args.num_attention_heads // groups * head_dim
    widths = {"q_proj": queries, "k_proj": head_dim, "v_proj": head_dim}
    fused = [
        TensorSlice(name, (slice(group * width, (group + 1) * width),))
        for group in range(groups)
        for name, width in widths.items()
    ]
    return [
        segment
        for rows in fused_rows(model_args, tp_rank, tp_size)
        for segment, _ in cut_rows(fused, rows)
    ]


def num_shared_rows(model_args: ModelArgs, tp_size: int) -> int:
    """The rows of k_proj, and of v_proj, where several ranks read a key/value head; otherwise 0."""
    groups = model_args.num_key_value_heads
    return groups * model_args.head_dim if tp_size > groups else 0
