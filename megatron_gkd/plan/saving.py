"""Bytes that the ranks write in a save (checkpoint_files.py): arithmetic from the sizes, the layout
and what LoRA is on.

Of a pipeline stage every rank writes an equal share of the stage's LoRA, whatever TP, EP, CP and DP
are; only the lm_head's W_up is uneven where padding of the vocabulary falls to some ranks. A number
is in the adapter, in the teacher's where that follows the student, and its two moments are in the
optimizer's file, 4 bytes each. Rank 0 writes the headers too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import EXPERTS, HEAD, names_of, targets_in
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.plan.parameters import lora_sizes

HEADER_BYTES = 160  # of a tensor in a file's header: a long name and its offsets
NUM_COLLECTIVES = 6  # of a save, each of a few numbers, whatever the world


@dataclass(frozen=True)
class SavedBytes:
    """Bytes written in one save."""

    total: float
    rank: float
    """By the rank that writes most"""
    node: float
    """By the machine that writes most"""
    shares: list[float]
    """Of tensors alone, by rank"""


def saved_bytes(
    args: ModelArgs,
    layout: ParallelConfig,
    *,
    world_size: int,
    lora_rank: int,
    targets: Sequence[str],
    has_optimizer: bool = True,
    teacher_follows: bool = False,
    tower_parameters: int = 0,
    ranks_of_node: int = 8,
) -> SavedBytes:
    """Of a save at this layout, exact but for the headers; of one rank to some rows of a matrix.

    has_optimizer: without --save_only_model; tower_parameters: of LoRA on the towers.
    """
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    stage_size, length = world_size // pp, args.num_layers // pp
    adapters, moments = 1 + teacher_follows, 2 * has_optimizer
    # the head's tensors are in an adapter under several names (lora/peft_writer.py)
    num_names = 1, len(args.family.adapter_roots)
    of_number, of_head = (4 * (adapters * names + moments) for names in num_names)
    sizes = lora_sizes(args)
    layers = [
        lora_rank * sum(sizes[name] for name in targets_in(targets, layer))
        for layer in range(args.num_layers)
    ]
    parameters = [
        sum(layers[first : first + length]) for first in range(0, args.num_layers, length)
    ]
    parameters[0] += tower_parameters
    shares = [of_number * number / stage_size for number in parameters for _ in range(stage_size)]
    if HEAD in targets:
        for rank in range(world_size - stage_size, world_size):
            shares[rank] += of_head * lora_rank * args.hidden_size / stage_size
            rows = _vocabulary_rows(args, tp, rank % tp)
            shares[rank] += of_head * lora_rank * rows / (stage_size // tp)
    tensors = num_tensors(args, targets)
    headers = HEADER_BYTES * tensors * (1 + teacher_follows + 2 * has_optimizer)
    of_ranks = [shares[0] + headers, *shares[1:]]
    of_nodes = [
        sum(of_ranks[first : first + ranks_of_node])
        for first in range(0, world_size, ranks_of_node)
    ]
    return SavedBytes(sum(of_ranks), max(of_ranks), max(of_nodes), shares)


def num_tensors(args: ModelArgs, targets: Sequence[str]) -> int:
    """Two for each linear with LoRA, once."""
    of_layers = 0
    for layer in range(args.num_layers):
        for name in targets_in(targets, layer):
            of_layers += 2 * (args.num_experts if name in EXPERTS else 1)
    return of_layers + 2 * (HEAD in names_of(targets))


def _vocabulary_rows(args: ModelArgs, tp: int, tp_rank: int) -> int:
    """Rows of the lm_head's W_up that a tensor-parallel rank has, without padding."""
    num_rows = args.padded_vocab_size(tp) // tp
    return min(max(args.vocab_size - tp_rank * num_rows, 0), num_rows)
