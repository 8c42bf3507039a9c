"""Hugging Face tensors <-> megatron-core tensors: one table, read in both directions.

Each entry says how one tensor of megatron-core is made of rows of Hugging Face tensors: copied,
interleaved by key/value group (q, k, v), one above the other (gate, up), padded (vocabulary),
stacked over layers and experts. Read by the training loader (weights.py), by the converter and by
the verifier (checkpoint_tools). `key` is the name in a distributed checkpoint of a GPTModel built
with Transformer Engine, whose fused norm gives the input norm its name; such checkpoints stack
layers, then experts, in front of the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.qkv_layout import qkv_segments

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class Part:
    """Rows `start:stop` of Hugging Face tensor `name` are the rows from `offset` on; {layer},
    {expert} stay open.
    """

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Entry:
    """One tensor of megatron-core: [rows, columns], or [rows] where `columns` is None, once a layer
    or expert.
    """

    key: str  # in a distributed checkpoint
    parameter: str  # in our decoder: of the model, or of a layer where the tensor belongs to one
    parts: tuple[Part, ...]
    columns: int | None
    cut: int | None = (
        None  # the axis that tensor parallelism cuts, ROWS or COLUMNS; None is replicated
    )
    stacked: tuple[int, ...] = ()  # (layers,) or (layers, experts)

    @property
    def num_rows(self) -> int:
        """Without padding."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def is_padded(self) -> bool:
        return not self.stacked and self.cut == ROWS  # embedding and head: rows of the vocabulary

    def matrix_size(self) -> tuple[int, ...]:
        return (self.num_rows,) if self.columns is None else (self.num_rows, self.columns)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """(layer, expert), (layer,) or (): where in the stack each matrix stands."""
        return product(*map(range, self.stacked))

    def names(self, index: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(("layer", "expert"), index))


@dataclass(frozen=True)
class Place:
    """Rows `start:stop` of a Hugging Face tensor stand at row `offset` of matrix `index` of
    `entry`.
    """

    entry: Entry
    index: tuple[int, ...]
    start: int
    stop: int
    offset: int


def _whole(name: str, rows: int, offset: int = 0) -> Part:
    return Part(name, 0, rows, offset)


@lru_cache
def table(model_args: ModelArgs) -> tuple[Entry, ...]:
    """The decoder's tensors. A tied head shares the embedding's key, so a checkpoint holds it once.
    """
    hidden, head, inter, vocab = (
        model_args.hidden_size,
        model_args.head_dim,
        model_args.moe_intermediate_size,
        model_args.vocab_size,
    )
    layers, experts = (model_args.num_layers,), (model_args.num_layers, model_args.num_experts)
    queries = model_args.num_attention_heads * head
    layer = f"{model_args.prefix}model.layers.{{layer}}."
    expert = f"{layer}mlp.experts.{{expert}}."
    embedding = "embedding.word_embeddings.weight"
    embed_tokens = _whole(f"{model_args.prefix}model.embed_tokens.weight", vocab)
    tied = model_args.tie_word_embeddings
    lm_head = embed_tokens if tied else _whole(f"{model_args.prefix}lm_head.weight", vocab)
    segments = qkv_segments(model_args, 0, 1)
    qkv = tuple(
        Part(f"{layer}self_attn.{s.name}.weight", s.start, s.stop, s.offset) for s in segments
    )
    final_norm = _whole(f"{model_args.prefix}model.norm.weight", hidden)
    gate_up = (
        _whole(f"{expert}gate_proj.weight", inter),
        _whole(f"{expert}up_proj.weight", inter, offset=inter),
    )

    def norm(key: str, parameter: str, name: str, size: int) -> Entry:
        return Entry(
            f"decoder.layers.{key}", parameter, (_whole(layer + name, size),), None, stacked=layers
        )

    attention, moe = "self_attention.", "mlp.experts."
    return (
        Entry(embedding, embedding, (embed_tokens,), hidden, cut=ROWS),
        norm(
            f"{attention}linear_qkv.layer_norm_weight",
            "input_layernorm.weight",
            "input_layernorm.weight",
            hidden,
        ),
        Entry(
            f"decoder.layers.{attention}linear_qkv.weight",
            f"{attention}linear_qkv.weight",
            qkv,
            hidden,
            ROWS,
            layers,
        ),
        norm(
            f"{attention}q_layernorm.weight",
            f"{attention}q_layernorm.weight",
            "self_attn.q_norm.weight",
            head,
        ),
        norm(
            f"{attention}k_layernorm.weight",
            f"{attention}k_layernorm.weight",
            "self_attn.k_norm.weight",
            head,
        ),
        Entry(
            f"decoder.layers.{attention}linear_proj.weight",
            f"{attention}linear_proj.weight",
            (_whole(f"{layer}self_attn.o_proj.weight", hidden),),
            queries,
            COLUMNS,
            layers,
        ),
        norm(
            "pre_mlp_layernorm.weight",
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            hidden,
        ),
        Entry(
            "decoder.layers.mlp.router.weight",
            "mlp.router.weight",
            (_whole(f"{layer}mlp.gate.weight", model_args.num_experts),),
            hidden,
            stacked=layers,
        ),
        Entry(
            f"decoder.layers.{moe}experts.linear_fc1.weight",
            f"{moe}gate_up.weight",
            gate_up,
            hidden,
            stacked=experts,
        ),
        Entry(
            f"decoder.layers.{moe}experts.linear_fc2.weight",
            f"{moe}down.weight",
            (_whole(f"{expert}down_proj.weight", hidden),),
            inter,
            stacked=experts,
        ),
        Entry(
            "decoder.final_layernorm.weight", "decoder.final_layernorm.weight", (final_norm,), None
        ),
        Entry(
            embedding if tied else "output_layer.weight",
            "output_layer.weight",
            (lm_head,),
            hidden,
            cut=ROWS,
        ),
    )


def stored_entries(model_args: ModelArgs) -> list[Entry]:
    """The entries whose keys a checkpoint holds, each key once."""
    return list({entry.key: entry for entry in reversed(table(model_args))}.values())[::-1]


@lru_cache
def places(model_args: ModelArgs) -> dict[str, tuple[Place, ...]]:
    """Every Hugging Face tensor of the decoder -> where its rows stand in a checkpoint, in the
    order of its rows.
    """
    found: dict[str, list[Place]] = {}
    for entry in stored_entries(model_args):
        for index in entry.indices():
            for part in entry.parts:
                place = Place(entry, index, part.start, part.stop, part.offset)
                found.setdefault(part.name.format(**entry.names(index)), []).append(place)
    return {
        name: tuple(sorted(rows, key=lambda place: place.start)) for name, rows in found.items()
    }


def decoder_tensors(model_args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of every decoder tensor in a Hugging Face folder of this model."""
    sizes = {}
    for name, rows in places(model_args).items():
        columns = rows[0].entry.columns
        sizes[name] = (rows[-1].stop,) if columns is None else (rows[-1].stop, columns)
    return sizes


def checkpoint_tensors(model_args: ModelArgs, tp_size: int) -> dict[str, tuple[int, ...]]:
    """Key and global shape of every tensor in a checkpoint, with the vocabulary padded for
    `tp_size` ranks.
    """
    sizes = {}
    for entry in stored_entries(model_args):
        rows = model_args.padded_vocab_size(tp_size) if entry.is_padded else entry.num_rows
        sizes[entry.key] = (*entry.stacked, rows, *entry.matrix_size()[1:])
    return sizes
