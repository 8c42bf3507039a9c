"""Which rows of a Hugging Face projection live where in megatron-core's fused linears.

megatron-core stores q, k and v as one matrix, interleaved by key/value group (the group's queries,
its key, its value), and cuts it into equal row blocks, one a tensor-parallel rank. With more ranks
than groups a block may begin inside a group. Everything that maps weights or adapters between the
two worlds reads this table.
"""

from dataclasses import dataclass

from megatron_gkd.model.args import ModelArgs


@dataclass(frozen=True)
class Segment:
    """Rows `start:stop` of projection `name` (q_proj, k_proj, v_proj), at `offset` in this rank's
    fused rows.
    """

    name: str
    start: int
    stop: int
    offset: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def qkv_segments(model_args: ModelArgs, tp_rank: int, tp_size: int) -> list[Segment]:
    """This rank's rows of the fused qkv matrix, in order."""
    queries = model_args.num_attention_heads // model_args.num_key_value_heads * model_args.head_dim
    widths = (("q_proj", queries), ("k_proj", model_args.head_dim), ("v_proj", model_args.head_dim))
    rows_per_rank = (
        (model_args.num_attention_heads + 2 * model_args.num_key_value_heads)
        * model_args.head_dim
        // tp_size
    )
    low, high = tp_rank * rows_per_rank, (tp_rank + 1) * rows_per_rank
    segments, position = [], 0
    for group in range(model_args.num_key_value_heads):
        for name, width in widths:
            first, last = max(low, position), min(high, position + width)
            if first < last:
                start = group * width + first - position
                segments.append(Segment(name, start, start + last - first, first - low))
            position += width
    return segments


def block(size: int, rank: int, num_ranks: int) -> slice:
    """Rank's share of `size` rows or columns cut into equal blocks."""
    width = size // num_ranks
    return slice(rank * width, (rank + 1) * width)
