"""The decoder's layers one by one: the experts' grouped product, attention over packed rows, rotary
angles, and which implementation is taken.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextRotaryEmbedding,
)

from megatron_gkd.model import attention
from megatron_gkd.model.attention import EagerAttention, SdpaAttention
from megatron_gkd.model.decoder import core_attention
from megatron_gkd.model.experts import check_experts_impl
from megatron_gkd.model.grouped import grouped_outer, grouped_product
from megatron_gkd.model.layers import InterleavedRotaryEmbedding
from megatron_gkd.model.packed_rows import PackedRows


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("num_inputs, num_outputs", [(64, 32), (50, 20), (51, 3)])
@pytest.mark.parametrize("ends", [(0, 2, 2, 7), (0, 0, 0, 0)], ids=["7 rows", "no row"])
def test_grouped_product(dtype, tolerance, num_inputs, num_outputs, ends):
    """Value and both gradients against one product per expert, for sizes that grouped_mm does not
    take as they are.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ends[-1], num_inputs, generator=generator).to(dtype).requires_grad_()
    weight = (
        (torch.randn(4, num_outputs, num_inputs, generator=generator) / num_inputs**0.5)
        .to(dtype)
        .requires_grad_()
    )
    cotangent = torch.randn(ends[-1], num_outputs, generator=generator).to(dtype)
    starts = (0,) + ends[:-1]
    expected = torch.cat(
        [x[first:last] @ weight[expert].T for expert, (first, last) in enumerate(zip(starts, ends))]
    )
    actual = grouped_product(x, weight, torch.tensor(ends, dtype=torch.int32))
    assert actual.shape == (ends[-1], num_outputs)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for value, wanted in zip(
        torch.autograd.grad(actual, (x, weight), cotangent),
        torch.autograd.grad(expected, (x, weight), cotangent),
    ):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)
    outer = torch.stack(
        [cotangent[first:last].T @ x[first:last] for first, last in zip(starts, ends)]
    )
    found = grouped_outer(cotangent, x.detach(), torch.tensor(ends, dtype=torch.int32))
    has_rows = torch.tensor(ends) > torch.tensor(starts)
    torch.testing.assert_close(
        found[has_rows], outer[has_rows].detach(), rtol=tolerance, atol=tolerance
    )


HEADS, GROUPS, WIDTH = 4, 2, 8  # two query heads read each key/value head


def starts_of(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def attention_inputs(size, dtype=torch.float32):
    """Query, key and value of `size` positions, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, 1, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    *inputs, cotangent = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        for shape in (*shapes, (size, 1, HEADS * WIDTH))
    )
    return [x.requires_grad_() for x in inputs], cotangent


def row_by_row(inputs, starts):
    """Of each row, a query head and a position the softmax over the keys up to it, in float64."""
    query, key, value = (x[:, 0].double() for x in inputs)
    found = torch.zeros_like(query)
    for start, end in pairwise(starts):
        for position in range(start, end):
            for head in range(HEADS):
                keys, values = (x[start : position + 1, head // 2] for x in (key, value))
                scores = torch.einsum("d,sd->s", query[position, head], keys) * WIDTH**-0.5
                found[position, head] = torch.einsum("s,sd->d", scores.softmax(dim=0), values)
    return found.flatten(1)[:, None]


def attend(kind, inputs, rows):
    config = SimpleNamespace(kv_channels=WIDTH)
    return kind(config, 1, None)(*inputs, None, packed_seq_params=rows)


LENGTHS = {
    "one to nine": list(range(1, 10)),
    "one row": [5],
    "one token": [1],
    "mixed": [9, 1, 1, 4],
    "three of one length": [6, 6, 6],
}


@pytest.mark.parametrize("kind", [SdpaAttention, EagerAttention])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_is_causal_within_each_row(kind, lengths):
    """Values and the gradients of queries, keys and values."""
    starts = starts_of(lengths)
    inputs, cotangent = attention_inputs(starts[-1])
    expected = row_by_row(inputs, starts)
    actual = attend(kind, inputs, PackedRows(starts=starts))
    assert actual.shape == (starts[-1], 1, HEADS * WIDTH)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for value, wanted in zip(
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent.double()),
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SdpaAttention, EagerAttention])
@pytest.mark.parametrize("lengths", [[4, 7, 5, 1, 6], [6, 6, 6, 6]], ids=["ragged", "one length"])
def test_no_row_sees_another(kind, lengths):
    """With another row in the place of the third, values and gradients of all others are the same
    bits; so are those of a row alone.
    """
    starts = starts_of(lengths)
    inputs, cotangent = attention_inputs(starts[-1])
    third = slice(starts[2], starts[3])
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[third] *= 1000
        x.requires_grad_()

    def run(inputs, cotangent, starts):
        output = attend(kind, inputs, PackedRows(starts=starts))
        return output.detach(), *torch.autograd.grad(output, inputs, cotangent)

    found, other = run(inputs, cotangent, starts), run(changed, cotangent, starts)
    is_other = torch.ones(starts[-1], dtype=torch.bool)
    is_other[third] = False
    for one, two in zip(found, other):
        assert torch.equal(one[is_other], two[is_other])
    assert (found[0][third] - other[0][third]).abs().max() > 1
    for start, end in pairwise(starts):
        alone = [x.detach()[start:end].clone().requires_grad_() for x in inputs]
        for one, two in zip(run(alone, cotangent[start:end], [0, end - start]), found):
            assert torch.equal(one, two[start:end])


@pytest.mark.parametrize("kind", [SdpaAttention, EagerAttention])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_the_parts_of_rows_attend_to_what_the_whole_rows_do(kind, num_parts):
    """What `attend` gets at context-parallel rank `part`: its queries, and all keys and values."""
    inputs, cotangent, starts, expected, gradients = whole_rows(num_parts)
    query, key, value = (x[:, 0] for x in inputs)
    summed = [torch.zeros_like(x) for x in inputs]
    for part in range(num_parts):
        rows = PackedRows(starts=starts, num_parts=num_parts, part=part)
        own = rows.own_positions
        module = kind(SimpleNamespace(kv_channels=WIDTH), 1, None)
        output = module.attend(query[own], key, value, rows).flatten(1)[:, None]
        torch.testing.assert_close(output.double(), expected[own], rtol=1e-5, atol=1e-6)
        of_part = torch.autograd.grad(output, inputs, cotangent[own], retain_graph=True)
        summed = [total + gradient for total, gradient in zip(summed, of_part)]
    for value, wanted in zip(summed, gradients):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def whole_rows(num_parts):
    """(inputs, cotangent, starts, values and gradients of `row_by_row`) of four rows that
    `num_parts` divides.
    """
    starts = starts_of([2 * num_parts * number for number in (1, 3, 1, 2)])
    inputs, cotangent = attention_inputs(starts[-1])
    expected = row_by_row(inputs, starts)
    gradients = torch.autograd.grad(expected, inputs, cotangent.double(), retain_graph=True)
    return inputs, cotangent, starts, expected.detach(), gradients


def plain_varlen(
    query, key, value, query_ends, key_ends, max_query, max_key, *, scale, window_size, **grouped
):
    """torch.nn.attention.varlen.varlen_attn as it is documented, sequence by sequence: query
    [T, h, d], key and value [K, g, d]; cumulative lengths of both; window (-1, 0) is causal, with
    the last query at the last key.
    """
    assert window_size == (-1, 0) and set(grouped) <= {"enable_gqa"}
    for ends, x in ((query_ends, query), (key_ends, key)):
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(x)
    assert (query_ends.diff().max(), key_ends.diff().max()) == (max_query, max_key)
    assert len(query_ends) == len(key_ends) and len(value) == len(key)
    outputs, group = [], query.shape[1] // key.shape[1]
    for (first, end), (first_key, end_key) in zip(
        pairwise(query_ends.tolist()), pairwise(key_ends.tolist())
    ):
        of_query = query[first:end]
        keys, values = (x[first_key:end_key].repeat_interleave(group, dim=1) for x in (key, value))
        number = torch.arange(end - first)[:, None] + (end_key - first_key) - (end - first)
        hidden = torch.arange(end_key - first_key) > number
        scores = torch.einsum("qhd,khd->hqk", of_query, keys) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_all_rows_at_once(monkeypatch, num_parts):
    """The path of CUDA, with the kernel's documented meaning in its place, at every part."""
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    inputs, cotangent, starts, expected, gradients = whole_rows(num_parts)
    query, key, value = (x[:, 0] for x in inputs)
    module = SdpaAttention(SimpleNamespace(kv_channels=WIDTH), 1, None)
    summed = [torch.zeros_like(x) for x in inputs]
    for part in range(num_parts):
        rows = PackedRows(starts=starts, num_parts=num_parts, part=part)
        own = rows.own_positions
        assert len(rows.varlen_calls) == min(num_parts, 2)
        output = module.attend_at_once(query[own], key, value, rows).flatten(1)[:, None]
        torch.testing.assert_close(output.double(), expected[own], rtol=1e-5, atol=1e-6)
        of_part = torch.autograd.grad(output, inputs, cotangent[own], retain_graph=True)
        summed = [total + gradient for total, gradient in zip(summed, of_part)]
    for value, wanted in zip(summed, gradients):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lengths, calls", [([5, 5, 5], [(3, 5)]), ([2, 3], [(1, 2), (1, 3)]), ([5], [(1, 5)])], ids=str
)
def test_rows_of_one_length_are_one_call(monkeypatch, lengths, calls):
    """Rows and queries of each call of torch's attention."""
    found, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **more):
        found.append((query.shape[0], query.shape[2]))
        return sdpa(query, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    starts = starts_of(lengths)
    attend(SdpaAttention, attention_inputs(starts[-1])[0], PackedRows(starts=starts))
    assert found == calls


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_kernel_takes_what_it_is_given(num_parts):
    """torch's own function with tensors that have no data, since there is no kernel for CPUs: it
    knows the arguments, takes fewer key/value heads than queries, and has gradients of all three.
    """
    starts = starts_of([2 * num_parts * number for number in (1, 3, 2)])
    rows = PackedRows(starts=starts, num_parts=num_parts, device=torch.device("meta"))
    shapes = [(starts[-1] // num_parts, HEADS)] + [(starts[-1], GROUPS)] * 2
    inputs = [
        torch.empty(*shape, WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]
    module = SdpaAttention(SimpleNamespace(kv_channels=WIDTH), 1, None)
    output = module.attend_at_once(*inputs, rows)
    assert output.shape == inputs[0].shape and output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_a_kernel_call_reads_a_key_once(num_parts):
    """So the sum of its gradient has one order. Rows of any length where they are not cut."""
    multiple = 1 if num_parts == 1 else 2 * num_parts
    starts = starts_of([multiple * number for number in (3, 1, 2)])
    for part in range(num_parts):
        rows = PackedRows(starts=starts, num_parts=num_parts, part=part)
        for call in rows.varlen_calls:
            if num_parts == 1:
                assert call.query_index is None and call.key_index is None
                assert call.query_ends.tolist() == call.key_ends.tolist() == starts
                assert call.longest_query == call.longest_key == 3
            else:
                assert len(set(call.key_index.tolist())) == len(call.key_index)


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_of_rows(num_parts):
    """They have each position once, the same number of them and of (query, key) pairs, a part of
    every row; their order and index lead back to the whole sequence.
    """
    multiple = 1 if num_parts == 1 else 2 * num_parts
    starts = starts_of([multiple * number for number in (2, 1, 5, 3)])
    parts = [PackedRows(starts=starts, num_parts=num_parts, part=part) for part in range(num_parts)]
    positions = [rows.own_positions for rows in parts]
    whole = torch.cat(positions)
    assert torch.equal(whole.sort().values, torch.arange(starts[-1]))
    assert {len(own) for own in positions} == {starts[-1] // num_parts}
    pairs = []
    for rows, own in zip(parts, positions):
        assert torch.equal(whole[rows.order], torch.arange(starts[-1]))
        assert torch.equal(own, rows.positions(rows.part)) and own.dtype == torch.int64
        index = rows.own_index
        assert torch.equal(index[own], torch.arange(len(own)))
        assert (index >= 0).sum() == len(own) and index.min() >= -1
        first, of_spans = 0, []
        for span in rows.spans:
            assert span.queries.start == first
            first = span.queries.stop
            queries = own[span.queries]
            row = max(start for start in starts if start <= queries[0])
            assert span.keys == slice(row, int(queries[-1]) + 1)
            assert torch.equal(queries, torch.arange(queries[0], queries[-1] + 1))
            assert (span.num_queries, span.num_keys) == (len(queries), queries[-1] + 1 - row)
            of_spans.append(row)
            pairs.append((rows.part, int((queries - row + 1).sum())))
        assert first == len(own) and set(of_spans) == set(starts[:-1])
    of_part = [sum(count for part, count in pairs if part == own) for own in range(num_parts)]
    if num_parts > 1:
        assert len(set(of_part)) == 1
    assert sum(of_part) == sum(n * (n + 1) // 2 for n in torch.tensor(starts).diff().tolist())


def test_rows_that_cannot_be_cut_are_refused():
    rows = PackedRows(starts=[0, 4, 10], num_parts=2)
    with pytest.raises(AssertionError, match="padded to a multiple of 2 C"):
        rows.positions(0)


def test_attention_refuses_what_it_cannot_do():
    (query, key, value), _ = attention_inputs(5)
    rows = PackedRows(starts=[0, 5])
    module = SdpaAttention(SimpleNamespace(kv_channels=WIDTH), 1, None)
    with pytest.raises(ValueError, match="takes no mask"):
        mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
        module(query, key, value, mask, packed_seq_params=rows)
    with pytest.raises(ValueError, match="pass PackedRows as packed_seq_params, not NoneType"):
        module(query, key, value, None)
    with pytest.raises(ValueError, match="packed_seq_params, not PackedSeqParams"):
        module(query, key, value, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))


def test_impl_names():
    """`auto` and the flash names fall back to torch's own kernels where Transformer Engine cannot
    run; `te` must not.
    """
    for name in ("auto", "grouped_mm"):
        check_experts_impl(name)
    with pytest.raises(ValueError, match="--experts_impl te: .*use --experts_impl auto or grouped"):
        check_experts_impl("te")
    for name in ("auto", "flash", "flash_attention_2", "sdpa"):
        assert core_attention(name, torch.device("cpu")) is SdpaAttention
    assert core_attention("eager", torch.device("cpu")) is EagerAttention
    with pytest.raises(ValueError, match="--attn_impl te needs Transformer Engine"):
        core_attention("te", torch.device("cpu"))
    with pytest.raises(ValueError, match="'xformers' is not one of"):
        core_attention("xformers", torch.device("cpu"))


@pytest.mark.parametrize("sections", [[3, 3, 2], [24, 20, 20], [2, 2, 2], None], ids=str)
def test_rotations_equal_transformers(sections):
    """Sections that sum to the number of channels, to more and to less, and none."""
    rope = {"rope_type": "default", "rope_theta": 1e4} | (
        {} if sections is None else {"mrope_section": sections}
    )
    config = Qwen3OmniMoeTextConfig(
        hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=rope
    )
    positions = torch.randint(0, 99, (3, 2, 7), generator=torch.Generator().manual_seed(0)).float()
    cos, sin = Qwen3OmniMoeThinkerTextRotaryEmbedding(config)(torch.zeros(1), positions)
    rotation = InterleavedRotaryEmbedding(16, 1e4)(positions, sections or [24, 20, 20])
    assert rotation.shape == (7, 2, 2, 8) and rotation.dtype == torch.float32
    for found, wanted in zip(rotation.transpose(0, 1).unbind(2), (cos, sin)):
        torch.testing.assert_close(torch.cat((found, found), dim=-1), wanted)


@pytest.mark.parametrize("name", ["auto", "te"])
def test_transformer_engine_is_taken_where_it_can_run(monkeypatch, name):
    """The choice alone; what it computes is for tests/test_gpu.py."""
    from megatron_gkd.model.te_attention import PackedTEAttention

    gpu = torch.device("cuda")
    monkeypatch.setattr(
        "megatron_gkd.model.decoder.transformer_engine_usable", lambda device: device.type == "cuda"
    )
    assert (
        core_attention(name, gpu) is core_attention("flash_attention_2", gpu) is PackedTEAttention
    )
    assert (core_attention("sdpa", gpu), core_attention("eager", gpu)) == (
        SdpaAttention,
        EagerAttention,
    )
    assert core_attention("auto", torch.device("cpu")) is SdpaAttention
    # rows that are cut over ranks are not for it
    assert core_attention("flash", gpu, 2) is core_attention("auto", gpu, 2) is SdpaAttention
    with pytest.raises(ValueError, match="--attn_impl te does not know --context_parallel_size 2"):
        core_attention("te", gpu, 2)
