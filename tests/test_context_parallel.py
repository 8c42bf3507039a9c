"""What a long row costs a context-parallel rank, counted: bytes kept for backward, collectives of a
layer. That its numbers are right: tests/test_step_parity.py, tests/test_step_media.py.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.reference_step import write_adapter
from tests.train_runs import SMALL, arguments, build_parts, layout_flags

PROMPT, RESPONSE = 1_000, 24


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """By number of layers: the flags of a run."""
    root, found = tmp_path_factory.mktemp("context"), {}
    for layers in (2, 3):
        model = tiny_folder(**SMALL | dict(num_hidden_layers=layers))
        adapter = write_adapter(root / f"{layers}", model, rank=3, alpha=5)
        found[layers] = dict(model=model, adapter=adapter, dataset="none", output_dir=root)
    return found


class Collectives(TorchDispatchMode):
    """Name -> calls."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def one_row(parts):
    from megatron_gkd.data import Sample, View, collate
    from megatron_gkd.run import packing

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(500, (PROMPT + RESPONSE,), generator=generator).tolist()
    views = [
        View(text + ids[PROMPT:], [-100] * len(text) + ids[PROMPT:], len(text))
        for text in (ids[:PROMPT], ids[50:PROMPT])
    ]
    return collate([Sample(*views, "", 0, 0)], packing(0, parts.parallel))


def student_pass(rank, world_size, argv):
    """(bytes that the student's forward keeps for backward, weights not counted; collectives of the
    forward and backward).
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward

    parts = build_parts(argv)
    parallel, batch = parts.parallel, one_row(parts)
    teacher = teacher_forward(parts.model, [batch], parallel)
    weights = {weight.untyped_storage().data_ptr() for weight in parts.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_mask = tensor.is_floating_point() and bool(tensor.isinf().any())
        if storage.data_ptr() not in weights and not is_mask:
            kept[storage.data_ptr()] = storage
        return tensor

    parts.optimizer.zero_grad()
    with (
        Collectives() as collectives,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept),
    ):
        student_forward_backward(parts.ddp, [batch], teacher, parts.loss, parallel)
    return sum(storage.nbytes() for storage in kept.values()), collectives.calls


def run(flags, world_size, **layout):
    return run_ranks(student_pass, world_size, arguments(**flags, **layout_flags(**layout)))


def test_a_rank_keeps_its_part_of_a_row(folders):
    """The keys and values of attention are whole on every rank, and on CPU the outputs of chunks
    are kept one by one: the rest is divided by C. Masks of chunks, on CPU alone, do not count.
    """
    alone, *_ = (kept for kept, _ in run(folders[2], 1))
    for size in (2, 4):
        of_ranks = [kept for kept, _ in run(folders[2], size, cp=size)]
        assert max(of_ranks) < 1.1 * min(of_ranks)
        assert max(of_ranks) < alone * (1 / size + 0.16), (size, alone, of_ranks)


def test_collectives_of_a_layer(folders):
    """Keys and values are gathered once in forward, their gradients reduce-scattered in backward;
    with recomputation gathered once more.
    """
    for more, gathers in (({}, 1), ({"recompute": "full"}, 2)):
        found = []
        for layers in (2, 3):
            flags = folders[layers] | more
            found.append([calls for _, calls in run(flags, 2, cp=2)])
        for fewer, many in zip(*found):
            assert many - fewer == Counter(_allgather_base_=gathers, _reduce_scatter_base_=1)
