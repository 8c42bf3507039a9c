"""More tensor-parallel ranks than key/value heads: ranks that read one head hold it, and the
gradients of its LoRA are summed over them. Gradients of every matrix, copies, and what a layer
keeps and exchanges, counted. Whole steps: tests/test_step_parity.py.
"""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.qkv_layout import qkv_segments
from tests.ranks import run_ranks
from tests.reference_step import write_adapter
from tests.test_context_parallel import Collectives, one_row
from tests.train_runs import SMALL, arguments, build_parts, layout_flags

LENGTH = 64  # a multiple of all ranks


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """By key/value heads: the flags of a run."""
    root, found = tmp_path_factory.mktemp("shared"), {}
    for groups in (1, 2, 4):
        model = tiny_folder(**SMALL, num_key_value_heads=groups)
        adapter = write_adapter(root / f"{groups}", model, rank=3, alpha=5)
        found[groups] = dict(model=model, adapter=adapter, dataset="none", output_dir=root)
    return found


def own_rows(segments):
    return [
        (segment.name, row)
        for segment in segments
        for row in range(segment.rows.start, segment.rows.stop)
    ]


@pytest.mark.parametrize(
    "heads, groups, tp_size", [(8, 4, 1), (8, 4, 8), (8, 2, 4), (8, 1, 2), (32, 4, 8)]
)
def test_qkv_segments_cover_each_projection(tiny_folder, heads, groups, tp_size):
    """Over all ranks every row of q appears once, of k and v once for each rank that reads it;
    ranks hold equally many rows, and of a key/value head all that their queries read.
    """
    model_args = replace(
        read_model_args(tiny_folder(**SMALL)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=8,
    )
    rows, per_rank = Counter(), set()
    for rank in range(tp_size):
        segments = qkv_segments(model_args, rank, tp_size)
        rows.update(own_rows(segments))
        per_rank.add(sum(segment.num_rows for segment in segments))
        read = {row // 8 * groups // heads for name, row in own_rows(segments) if name == "q_proj"}
        for name in ("k_proj", "v_proj"):
            assert {row // 8 for of, row in own_rows(segments) if of == name} == read
    assert per_rank == {(heads // tp_size + 2 * max(1, groups // tp_size)) * 8}
    for (name, _), count in rows.items():
        assert count == (1 if name == "q_proj" else max(1, tp_size // groups))
    assert Counter(name for name, _ in rows) == {
        "q_proj": heads * 8,
        "k_proj": groups * 8,
        "v_proj": groups * 8,
    }


def gradients_and_copies(rank, world_size, argv):
    """(of this rank's slices of the adapter, by name and index: the index and the gradient; the
    weights after an update; the norm of all gradients).
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from megatron_gkd.lora.adapter import adapter_slices

    parts = build_parts(argv)
    batch = one_row(parts)
    teacher = teacher_forward(parts.model, [batch], parts.parallel)
    parts.optimizer.zero_grad()
    student_forward_backward(parts.ddp, [batch], teacher, parts.loss, parts.parallel)
    slices = list(adapter_slices(parts.model, parts.model_args, parts.parallel))
    keys = [(part.stored.name, str(part.stored.index)) for part in slices]
    gradients = {
        key: (part.stored.index, part.parameter.main_grad[part.where].clone())
        for key, part in zip(keys, slices)
    }
    update = parts.optimizer.step(1e-3, 0.0)
    weights = {key: part.view.clone() for key, part in zip(keys, slices)}
    return gradients, weights, update.grad_norm


@pytest.mark.parametrize(
    "groups, tp",
    [
        pytest.param(1, 2, marks=pytest.mark.extended),
        pytest.param(4, 8, marks=pytest.mark.smoke),
        pytest.param(2, 8, marks=pytest.mark.extended),
        pytest.param(2, 4, marks=pytest.mark.extended),
        pytest.param(4, 4, marks=pytest.mark.extended),
    ],
)
def test_gradients_of_every_matrix(folders, groups, tp):
    """Are those of one rank; the norm counts each once; the copies get the same bits."""
    flags = folders[groups]
    ((parts, _, norm),) = run_ranks(gradients_and_copies, 1, arguments(**flags))
    shapes = adapter_tensors(read_model_args(flags["model"]), 3, list(LINEARS))
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for (name, _), (index, values) in parts.items():
        whole[name][index] = values
    ranks = run_ranks(gradients_and_copies, tp, arguments(**flags, **layout_flags(tp=tp, ep=tp)))
    found, copies = set(), {}
    for gradients, weights, of_layout in ranks:
        assert math.isclose(of_layout, norm, rel_tol=1e-4)
        for key, (index, values) in gradients.items():
            wanted = whole[key[0]]
            torch.testing.assert_close(
                values, wanted[index], rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
            )
            found.add(key[0])
        for key, values in weights.items():
            copies.setdefault(key, []).append(values)
    assert found == set(whole)
    for key, values in copies.items():
        assert all(torch.equal(value, values[0]) for value in values), key
    held = {key: len(values) for key, values in copies.items()}
    for name in ("k_proj", "v_proj"):
        counts = [number for key, number in held.items() if f".{name}.lora_B." in key[0]]
        assert set(counts) == ({tp} if tp > groups else {1})


def attention_pass(rank, world_size, argv):
    """(bytes that the forward of one layer's attention keeps beside weights, its input and the
    rotations; collectives of its forward, and of its backward).
    """
    from megatron_gkd.model.packed_rows import PackedRows

    parts = build_parts(argv)
    layer = parts.model.decoder.layers[0]
    size = LENGTH // world_size
    hidden = torch.randn(size, 1, parts.model_args.hidden_size, requires_grad=True)
    positions = torch.arange(LENGTH).float().expand(3, 1, -1)
    rotation = parts.model.rotary_pos_emb(positions, list(parts.model_args.mrope_section))
    known = [*parts.model.parameters(), hidden, rotation]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        Collectives() as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output, _ = layer.self_attention(
            hidden,
            attention_mask=None,
            rotary_pos_emb=rotation,
            packed_seq_params=PackedRows(starts=[0, LENGTH]),
        )
    with Collectives() as backward:
        output.sum().backward()
    num_bytes = sum(storage.nbytes() for storage in kept.values())
    return num_bytes, forward.calls, backward.calls


def test_what_attention_keeps_and_exchanges(folders):
    """At eight ranks with a query head each, without LoRA on it: the projection's head of queries
    and the key and value that it reads, the first two of them rotated, the context, a number a
    position of the softmax. Beside the linears' own gather and reduce-scatter nothing is exchanged.
    """
    flags = folders[4] | dict(adapter=None, lora_target_modules="down_proj")
    argv = arguments(**flags, **layout_flags(tp=8, ep=8))
    for num_bytes, forward, backward in run_ranks(attention_pass, 8, argv):
        heads = (1 + 1 + 1) + (1 + 1) + 1
        assert num_bytes == LENGTH * (heads * SMALL["head_dim"] + 1) * 4
        assert forward == Counter(_allgather_base_=1, _reduce_scatter_base_=1)
        assert backward == Counter(_allgather_base_=1, _reduce_scatter_base_=1)
