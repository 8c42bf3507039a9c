"""Hugging Face tensors <-> megatron-core tensors: one map, read in both directions.

Each entry says how one tensor of megatron-core is made of rows of Hugging Face tensors: copied,
interleaved by key/value group (q, k, v), one above the other (gate, up), padded (vocabulary),
stacked over layers and experts. Read by the training loader (loading.py), by the converter
(megatron_writer.py, megatron_folder.py) and by the verifier. `key` is the name in a distributed
checkpoint of a GPTModel built with Transformer Engine, whose fused norm gives the input norm its
name; such checkpoints stack layers, then experts, in front of the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import qkv_segments
from megatron_gkd.model.tensor_slice import SlicePair, TensorSlice, cut_rows

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Entry:
    """One tensor of megatron-core: a matrix [rows, columns], or a vector [rows] where `columns` is
    None, for each layer or expert.
    """

    key: str
    """in a distributed checkpoint"""
    parameter: str
    """in our decoder: of the model, or of a layer where the tensor belongs to one"""
    parts: tuple[TensorSlice, ...]
    """rows of Hugging Face tensors, one part below the other; {layer}, {expert} stay open"""
    columns: int | None
    cut: int | None = None
    """the axis that tensor parallelism cuts, ROWS or COLUMNS; None where it is replicated. In a
    layer ROWS means the fused qkv, whose rows model/qkv_layout.py gives to the ranks
    """
    stacked: tuple[int, ...] = ()
    """(layers,) or (layers, experts)"""

    @property
    def num_rows(self) -> int:
        """Without padding."""
        return sum(part.num_rows for part in self.parts)

    @property
    def is_padded(self) -> bool:
        return not self.stacked and self.cut == ROWS  # embedding and head: rows of the vocabulary

    def padded_rows(self, model_args: ModelArgs, tp_size: int) -> int:
        """Rows in a checkpoint, or over all of `tp_size` ranks."""
        return model_args.padded_vocab_size(tp_size) if self.is_padded else self.num_rows

    def matrix_size(self) -> tuple[int, ...]:
        return (self.num_rows,) if self.columns is None else (self.num_rows, self.columns)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """(layer, expert), (layer,) or (): where in the stack each matrix stands."""
        return product(*map(range, self.stacked))

    def slices(self, index: tuple[int, ...]) -> list[TensorSlice]:
        """The Hugging Face rows, in order, that matrix `index` of the stack is made of."""
        names = dict(zip(("layer", "expert"), index))
        return [TensorSlice(part.name.format(**names), part.index) for part in self.parts]

    def pairs(self, index: tuple[int, ...]) -> Iterator[SlicePair]:
        """`slices`, each with the rows that it fills in a checkpoint."""
        for hf, rows in cut_rows(self.slices(index), slice(0, self.num_rows)):
            yield SlicePair(hf, TensorSlice(self.key, (*index, rows)))


@lru_cache
def weight_map(model_args: ModelArgs) -> tuple[Entry, ...]:
    """The decoder's tensors. A tied head has the embedding's key, so a checkpoint holds it once."""
    hidden, inter = model_args.hidden_size, model_args.moe_intermediate_size
    head, vocab = model_args.head_dim, model_args.vocab_size
    queries = model_args.num_attention_heads * head
    layers, experts = (model_args.num_layers,), (model_args.num_layers, model_args.num_experts)
    root = model_args.prefix
    layer = f"{root}model.layers.{{layer}}."
    attention, expert = f"{layer}self_attn.", f"{layer}mlp.experts.{{expert}}."

    def whole(name: str, num_rows: int) -> TensorSlice:
        return TensorSlice(f"{name}.weight", (slice(0, num_rows),))

    def in_layers(
        key: str,
        *parts: TensorSlice,
        columns: int | None = None,
        cut: int | None = None,
        stacked: tuple[int, ...] = layers,
        parameter: str = "",
    ) -> Entry:
        return Entry(f"decoder.layers.{key}", parameter or key, parts, columns, cut, stacked)

    qkv = [
        TensorSlice(f"{attention}{segment.name}.weight", segment.index)
        for segment in qkv_segments(model_args, 0, 1)
    ]
    embedding, head_key = "embedding.word_embeddings.weight", "output_layer.weight"
    embed_tokens = whole(f"{root}model.embed_tokens", vocab)
    lm_head = whole(f"{root}lm_head", vocab)
    if model_args.tie_word_embeddings:
        head_key, lm_head = embedding, embed_tokens
    return (
        Entry(embedding, embedding, (embed_tokens,), hidden, ROWS),
        in_layers(
            "self_attention.linear_qkv.layer_norm_weight",
            whole(f"{layer}input_layernorm", hidden),
            parameter="input_layernorm.weight",
        ),
        in_layers("self_attention.linear_qkv.weight", *qkv, columns=hidden, cut=ROWS),
        in_layers("self_attention.q_layernorm.weight", whole(f"{attention}q_norm", head)),
        in_layers("self_attention.k_layernorm.weight", whole(f"{attention}k_norm", head)),
        in_layers(
            "self_attention.linear_proj.weight",
            whole(f"{attention}o_proj", hidden),
            columns=queries,
            cut=COLUMNS,
        ),
        in_layers("pre_mlp_layernorm.weight", whole(f"{layer}post_attention_layernorm", hidden)),
        in_layers(
            "mlp.router.weight", whole(f"{layer}mlp.gate", model_args.num_experts), columns=hidden
        ),
        in_layers(
            "mlp.experts.experts.linear_fc1.weight",
            whole(f"{expert}gate_proj", inter),
            whole(f"{expert}up_proj", inter),
            columns=hidden,
            stacked=experts,
            parameter="mlp.experts.gate_up.weight",
        ),
        in_layers(
            "mlp.experts.experts.linear_fc2.weight",
            whole(f"{expert}down_proj", hidden),
            columns=inter,
            stacked=experts,
            parameter="mlp.experts.down.weight",
        ),
        Entry(
            "decoder.final_layernorm.weight",
            "decoder.final_layernorm.weight",
            (whole(f"{root}model.norm", hidden),),
            None,
        ),
        Entry(head_key, "output_layer.weight", (lm_head,), hidden, ROWS),
    )


@lru_cache
def stored_entries(model_args: ModelArgs) -> dict[str, Entry]:
    """Key -> entry of every tensor of the decoder that a checkpoint holds."""
    # Of a tied pair the embedding's entry, where the head's would stand.
    last_wins = {entry.key: entry for entry in reversed(weight_map(model_args))}
    return dict(reversed(last_wins.items()))


@lru_cache
def checkpoint_slices(model_args: ModelArgs) -> dict[str, tuple[SlicePair, ...]]:
    """Every Hugging Face tensor of the decoder -> where its rows stand in a checkpoint, in the
    order of its rows.
    """
    found: dict[str, list[SlicePair]] = {}
    for entry in stored_entries(model_args).values():
        for index in entry.indices():
            for pair in entry.pairs(index):
                found.setdefault(pair.hf.name, []).append(pair)
    return {
        name: tuple(sorted(pairs, key=lambda pair: pair.hf.rows.start))
        for name, pairs in found.items()
    }


def decoder_tensors(model_args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of every decoder tensor in a Hugging Face folder of this model."""
    entries = stored_entries(model_args)
    sizes: dict[str, tuple[int, ...]] = {}
    for name, pairs in checkpoint_slices(model_args).items():
        num_rows, columns = pairs[-1].hf.rows.stop, entries[pairs[-1].mcore.name].columns
        sizes[name] = (num_rows,) if columns is None else (num_rows, columns)
    return sizes


def checkpoint_tensors(model_args: ModelArgs, tp_size: int) -> dict[str, tuple[int, ...]]:
    """Key and global shape of every tensor in a checkpoint, with the vocabulary padded for
    `tp_size` ranks.
    """
    return {
        key: (*entry.stacked, entry.padded_rows(model_args, tp_size), *entry.matrix_size()[1:])
        for key, entry in stored_entries(model_args).items()
    }
