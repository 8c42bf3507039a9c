"""The decoder's layers one by one: the experts' grouped product, attention, rotary angles, and
which implementation is taken.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextRotaryEmbedding,
)

from megatron_gkd.model.attention import EagerAttention, SdpaAttention
from megatron_gkd.model.decoder import core_attention
from megatron_gkd.model.experts import (
    GroupedLinear,
    TransformerEngineGroupedLinear,
    grouped_linear,
    grouped_product,
)
from megatron_gkd.model.layers import InterleavedRotaryEmbedding


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


def attention_inputs(num_queries=5, num_keys=5):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(length, 2, heads, 8, generator=generator)
        for length, heads in ((num_queries, 4), (num_keys, 2), (num_keys, 2))
    ]


@pytest.mark.parametrize("kind", [SdpaAttention, EagerAttention])
@pytest.mark.parametrize("size", [1, 5])
def test_attention_is_causal(kind, size):
    """Two query heads read each key/value head, position by position in float64."""
    query, key, value = attention_inputs(size, size)
    found = kind(SimpleNamespace(kv_channels=8), 1, None)(query, key, value, None)
    for position in range(size):
        for head in range(4):
            q, k, v = query[position, :, head], key[: position + 1, :, head // 2], value
            scores = torch.einsum("bd,sbd->bs", q.double(), k.double()) * 8**-0.5
            of_head = v[: position + 1, :, head // 2].double()
            expected = torch.einsum("bs,sbd->bd", scores.softmax(dim=1), of_head)
            actual = found[position, :, 8 * head : 8 * head + 8].double()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_attention_refuses_what_it_cannot_do():
    attention = SdpaAttention(SimpleNamespace(kv_channels=8), 1, None)
    with pytest.raises(ValueError, match="is causal, 3 queries over 5 keys, and takes no mask"):
        attention(*attention_inputs(num_queries=3), None)
    with pytest.raises(ValueError, match="takes no mask"):
        attention(*attention_inputs(), torch.zeros(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed sequences need Transformer Engine"):
        attention(*attention_inputs(), None, packed_seq_params=object())


def test_impl_names():
    """`auto` and the flash names fall back to torch's own kernels where Transformer Engine cannot
    run; `te` must not.
    """
    for name in ("auto", "grouped_mm"):
        assert grouped_linear(name, torch.device("cpu")) is GroupedLinear
    with pytest.raises(ValueError, match="--experts_impl te needs Transformer Engine"):
        grouped_linear("te", torch.device("cpu"))
    for name in ("auto", "flash", "flash_attention_2", "sdpa"):
        assert core_attention(name, torch.device("cpu")) is SdpaAttention
    assert core_attention("eager", torch.device("cpu")) is EagerAttention
    with pytest.raises(ValueError, match="--attn_impl te needs Transformer Engine"):
        core_attention("te", torch.device("cpu"))
    with pytest.raises(ValueError, match="'xformers' is not one of"):
        core_attention("xformers", torch.device("cpu"))


@pytest.mark.parametrize("sections", [[3, 3, 2], [24, 20, 20], [2, 2, 2], None], ids=str)
def test_rotary_angles_equal_transformers(sections):
    """Sections that sum to the number of channels, to more and to less, and none."""
    rope = {"rope_type": "default", "rope_theta": 1e4} | (
        {} if sections is None else {"mrope_section": sections}
    )
    config = Qwen3OmniMoeTextConfig(
        hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=rope
    )
    positions = torch.randint(0, 99, (3, 2, 7), generator=torch.Generator().manual_seed(0)).float()
    cos, sin = Qwen3OmniMoeThinkerTextRotaryEmbedding(config)(torch.zeros(1), positions)
    angles = InterleavedRotaryEmbedding(16, 1e4)(positions, sections or [24, 20, 20])[
        :, :, 0
    ].transpose(0, 1)
    torch.testing.assert_close(angles.cos(), cos)
    torch.testing.assert_close(angles.sin(), sin)


@pytest.mark.parametrize("name", ["auto", "te"])
def test_transformer_engine_is_taken_where_it_can_run(monkeypatch, name):
    """The choice alone; what it computes is for tests/test_gpu.py."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    gpu = torch.device("cuda")
    for module in ("decoder", "experts"):
        monkeypatch.setattr(
            f"megatron_gkd.model.{module}.transformer_engine_usable",
            lambda device: device.type == "cuda",
        )
    assert (
        core_attention(name, gpu)
        is core_attention("flash_attention_2", gpu)
        is TEDotProductAttention
    )
    assert grouped_linear(name, gpu) is TransformerEngineGroupedLinear
    assert (core_attention("sdpa", gpu), core_attention("eager", gpu)) == (
        SdpaAttention,
        EagerAttention,
    )
    assert grouped_linear("grouped_mm", gpu) is GroupedLinear
    assert core_attention("auto", torch.device("cpu")) is SdpaAttention
