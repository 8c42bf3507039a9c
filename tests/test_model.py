"""The decoder against transformers: logits, gradients of the input embeddings, at every layout,
precision, recompute.

B rows, S positions, V vocabulary, H hidden size. Ranks are gloo processes (tests/ranks.py); the
reference runs in this process.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_gkd import parallel
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.model.packed_rows import PackedRows
from megatron_gkd.model.transformer_config import DTYPES
from tests.packed import pack, padded
from tests.ranks import run_ranks

SIZES = dict(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    head_dim=16,
    num_experts=8,
    moe_intermediate_size=32,
)
FOLDERS = {
    "whole": dict(SIZES, num_hidden_layers=4, vocab_size=503, text_config={"rms_norm_eps": 1e-5}),
    "thinker, tied, 2 KV heads, probabilities as they are": dict(
        SIZES,
        num_key_value_heads=2,
        vocab_size=1000,
        thinker_only=True,
        tie_word_embeddings=True,
        rope_theta=1e4,
        max_shard_size="200KB",
        text_config={"norm_topk_prob": False},
    ),
    "one KV head, 3 experts a token, odd sizes": dict(
        SIZES,
        num_key_value_heads=1,
        head_dim=24,
        moe_intermediate_size=20,
        num_experts_per_tok=3,
        vocab_size=701,
        thinker_only=True,
    ),
    "text, plain rope": dict(
        SIZES,
        family="qwen3_moe",
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=600,
        rope_theta=1e4,
    ),
}


@dataclass
class MicroBatch:
    """Rows for transformers, padded on the right; the decoder reads them packed."""

    input_ids: torch.Tensor  # [B, S]
    position_ids: torch.Tensor  # [3, B, S]
    lengths: torch.Tensor  # [B]

    @property
    def real(self) -> torch.Tensor:
        """[B, S] bool: not padding."""
        return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]

    def cotangent(self, vocab_size: int) -> torch.Tensor:
        """[B, S, V]: the gradient of the loss at the logits, zero on padding."""
        generator = torch.Generator().manual_seed(5)
        return (
            torch.randn(*self.input_ids.shape, vocab_size, generator=generator)
            * self.real[..., None]
        )


def make_batches(vocab_size: int) -> list[MicroBatch]:
    """Micro-batches of several widths, ragged but for the second, whose rows are a batch of
    attention; the first has text positions, the others three different planes.
    """
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index, (width, lengths) in enumerate(
        ((24, (24, 9, 17)), (16, (16, 16)), (8, (8, 1, 3)), (32, (30, 7)))
    ):
        rows = len(lengths)
        text = torch.arange(width).expand(3, rows, width)
        planes = torch.cumsum(torch.randint(0, 3, (3, rows, width), generator=generator), dim=-1)
        ids = torch.randint(0, vocab_size, (rows, width), generator=generator)
        batches.append(MicroBatch(ids, text if index == 0 else planes, torch.tensor(lengths)))
    return batches


def reference(folder: str, batches: list[MicroBatch]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """transformers' logits [B, S, V] and gradients of the input embeddings [B, S, H] for each
    micro-batch, fp32.
    """
    config = json.loads(Path(folder, "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = getattr(model.eval(), "thinker", model)
    plain_rope = config["model_type"] == "qwen3_moe"  # turns with the first plane alone
    results = []
    for batch in batches:
        embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        logits = model(
            inputs_embeds=embeddings,
            attention_mask=batch.real.long(),
            position_ids=batch.position_ids[0] if plain_rope else batch.position_ids,
        ).logits
        (gradient,) = torch.autograd.grad(
            (logits * batch.cotangent(logits.shape[-1])).sum(), embeddings
        )
        results.append((logits.detach(), gradient))
    return results


def gather(tensor: torch.Tensor, group, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)


def run_decoder(
    place, folder, batches, dtype="float32", attn_impl="sdpa", recompute=False, backward=True
):
    """(logits, gradients of the input embeddings), lists over this rank's micro-batches, by
    megatron-core's schedule.

    Logits are there on the last pipeline stage, gradients on the first; whole tensors [B, S, ...],
    gathered over the TP group, zero behind the end of a row.
    """
    model_args = read_model_args(folder)
    model = build_decoder(
        model_args, place, DTYPES[dtype], attn_impl=attn_impl, recompute=recompute
    )
    load_weights(model, model_args, place, folder)
    views = [pack(batch.input_ids, batch.lengths, batch.position_ids, place) for batch in batches]
    logits, embeddings = [], []
    if place.is_first_stage:
        model.embedding.register_forward_hook(
            lambda module, inputs, output: embeddings.append(output)
        )

    def loss_of(hidden, batch, view):
        tp, vocab = place.groups.tp, model_args.vocab_size
        if place.tp_size > 1:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=tp
            )
        # [B, S, V_padded / TP]
        local = hidden[:, 0].float() @ model.output_layer.weight.float().T
        local = padded(local, view, batch.input_ids.shape[1])
        columns = slice(place.tp_rank * local.shape[-1], (place.tp_rank + 1) * local.shape[-1])
        cotangent = torch.nn.functional.pad(
            batch.cotangent(vocab), (0, model_args.padded_vocab_size(place.tp_size) - vocab)
        )
        logits.append(gather(local.detach(), tp, -1))
        return (local * cotangent[..., columns]).sum(), torch.ones((), dtype=torch.int), {}

    def step(iterator, model):
        batch, view = next(iterator)
        rows = PackedRows(starts=view.starts)
        hidden = model(view.input_ids, view.position_ids, None, packed_seq_params=rows)
        return hidden, lambda output: loss_of(output, batch, view)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=zip(batches, views),
        model=[model],
        num_microbatches=len(batches),
        seq_length=views[0].size,
        micro_batch_size=1,
        forward_only=not backward,
    )
    gradients = []
    if backward:
        for output, batch, view in zip(embeddings, batches, views):
            whole = gather(output.grad, place.groups.tp, 0)[:, 0]
            gradients.append(padded(whole, view, batch.input_ids.shape[1]))
    return logits, gradients


def share(batches, dp_rank, dp_size):
    """This DP rank's micro-batches: two of them at DP 1, one each at DP 2 and 4."""
    return batches[: max(2, dp_size)][dp_rank::dp_size]


def decoder_at_layout(rank, world_size, tp, pp, ep, runs):
    """For each (folder, batches, options) of `runs`: this rank's logits, gradients and its
    micro-batches' numbers.
    """
    place = parallel.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    results = []
    for folder, batches, options in runs:
        logits, gradients = run_decoder(
            place, folder, share(batches, place.dp_rank, place.dp_size), **options
        )
        results.append(
            (logits, gradients, share(range(len(batches)), place.dp_rank, place.dp_size))
        )
    return results


@pytest.fixture(scope="module")
def cases(tiny_folder):
    """name -> (folder, micro-batches, transformers' (logits, gradient) for each)."""
    made = {}
    for name, sizes in FOLDERS.items():
        folder = tiny_folder(**sizes)
        batches = make_batches(sizes["vocab_size"])
        made[name] = (folder, batches, reference(folder, batches))
    return made


def worst_difference(actual, expected, real):
    return ((actual - expected).abs() * real[..., None]).max().item()


def check(results, index, batches, references, tolerance=1e-4):
    """Compare run `index` of every rank with the reference on real positions; return the
    micro-batches seen.
    """
    seen_logits, seen_gradients = set(), set()
    for rank, result in enumerate(results):
        logits, gradients, numbers = result[index]
        for number, value in zip(numbers, logits):
            expected, real = references[number][0], batches[number].real
            assert value[..., expected.shape[-1] :].abs().max() == 0, (
                "padded vocabulary rows must be zero"
            )
            difference = worst_difference(value[..., : expected.shape[-1]], expected, real)
            assert difference < tolerance, (
                f"rank {rank}, micro-batch {number}: logits differ by {difference}"
            )
            seen_logits.add(number)
        for number, value in zip(numbers, gradients):
            expected = references[number][1]
            difference = (
                worst_difference(value, expected, batches[number].real)
                / expected.abs().max().item()
            )
            assert difference < tolerance, (
                f"rank {rank}, micro-batch {number}: gradients differ by {difference} of "
                "the largest"
            )
            seen_gradients.add(number)
    return seen_logits, seen_gradients


LAYOUTS = [  # world size, TP, PP, EP; DP is the rest
    pytest.param(1, 1, 1, 1, id="one rank"),
    pytest.param(2, 2, 1, 2, id="TP2 EP2"),
    pytest.param(2, 1, 2, 1, id="PP2"),
    pytest.param(4, 4, 1, 1, id="TP4"),
    pytest.param(4, 2, 1, 1, id="TP2 DP2"),
    pytest.param(4, 1, 1, 4, id="EP4 over DP4"),
    pytest.param(8, 8, 1, 8, id="TP8 EP8, the flagship", marks=pytest.mark.smoke),
    pytest.param(8, 4, 2, 4, id="TP4 PP2 EP4", marks=pytest.mark.extended),
    pytest.param(8, 2, 2, 4, id="TP2 PP2 DP2 EP4"),
]


@pytest.mark.parametrize("world_size, tp, pp, ep", LAYOUTS)
def test_logits_and_gradients_equal_transformers(cases, world_size, tp, pp, ep):
    """Every folder at every layout, plus full recompute of the first."""
    names = list(cases) + ["whole"]
    runs = [
        (cases[name][0], cases[name][1], {"recompute": number == len(cases)})
        for number, name in enumerate(names)
    ]
    results = run_ranks(decoder_at_layout, world_size, tp, pp, ep, runs)
    expected = (
        set(share(range(4), 0, 1))
        if world_size == tp * pp
        else set(range(max(2, world_size // (tp * pp))))
    )
    for index, name in enumerate(names):
        seen = check(results, index, *cases[name][1:])
        assert seen == (expected, expected)


def variants_on_one_rank(rank, world_size, folder, batches, variants):
    """Logits of the first micro-batch for each (dtype, attention implementation)."""
    place = parallel.initialize(torch.device("cpu"))
    return [
        run_decoder(place, folder, batches[:1], dtype=dtype, attn_impl=attn_impl)[0][0]
        for dtype, attn_impl in variants
    ]


@pytest.mark.parametrize("name", FOLDERS)
def test_precisions_and_attention_implementations(cases, name):
    """eager equals sdpa; bf16 and fp16 (odd expert sizes included) are as near to fp32 as their
    mantissas allow.

    The first quartile over positions: where rounding changes a choice of experts, the logits there
    and later differ by more (transformers' do too).
    """
    folder, batches, references = cases[name]
    limits = {
        ("float32", "sdpa"): 1e-5,
        ("float32", "eager"): 1e-5,
        ("bfloat16", "sdpa"): 0.03,
        ("bfloat16", "eager"): 0.03,
        ("float16", "sdpa"): 4e-3,
    }
    (logits,) = run_ranks(variants_on_one_rank, 1, folder, batches, list(limits))
    expected = references[0][0][batches[0].real]
    for (variant, limit), value in zip(limits.items(), logits):
        actual = value[..., : expected.shape[-1]][batches[0].real]
        error = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).quantile(0.25).item()
        assert error < limit, f"{variant}: relative error {error}"
        assert torch.isfinite(actual).all()


def test_ranks_whose_experts_get_no_token(tiny_folder):
    """One-token micro-batches on 4 ranks (the padding samples of an evaluation): two experts get
    all tokens, most ranks none.
    """
    folder = tiny_folder(**FOLDERS["whole"])
    position = torch.zeros(3, 1, 1, dtype=torch.int64)
    batches = [MicroBatch(torch.tensor([[7]]), position, torch.tensor([1]))] * 4
    results = run_ranks(decoder_at_layout, 4, 1, 1, 4, [(folder, batches, {})])
    assert check(results, 0, batches, reference(folder, batches)) == ({0, 1, 2, 3}, {0, 1, 2, 3})


def gradient_of_given_embeddings(rank, world_size, folder):
    """Gradients of a `decoder_input` that does not ask for one, without and with recompute; none
    under no_grad.
    """
    place = parallel.initialize(torch.device("cpu"))
    model_args = read_model_args(folder)
    ids, positions = torch.zeros(1, 16, dtype=torch.int64), torch.arange(8).repeat(3, 1, 2)
    rows = dict(packed_seq_params=PackedRows(starts=[0, 8, 16]))
    gradients = []
    for recompute in (False, True):
        model = build_decoder(model_args, place, torch.float32, recompute=recompute)
        load_weights(model, model_args, place, folder)
        embeddings = torch.randn(
            16, 1, model_args.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            assert (
                not model(ids, positions, None, decoder_input=embeddings, **rows).requires_grad
                and not embeddings.requires_grad
            )
        hidden = model(ids, positions, None, decoder_input=embeddings, **rows)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        gradients.append(embeddings.grad)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    return gradients


def test_recompute_reaches_embeddings_from_elsewhere(tiny_folder):
    """Media embeddings will come in as `decoder_input`: recomputation must not cut the backward
    pass there.
    """
    ((plain, recomputed),) = run_ranks(
        gradient_of_given_embeddings, 1, tiny_folder(**FOLDERS["whole"])
    )
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes, layout, message",
    [
        (
            {},
            dict(pp_size=3),
            "num_hidden_layers 4 is not divisible by pipeline_model_parallel_size 3",
        ),
        (
            {},
            dict(tp_size=16),
            "num_attention_heads 8 is not divisible by tensor_model_parallel_size 16",
        ),
        ({}, dict(ep_size=3), "num_experts 8 is not divisible by expert_model_parallel_size 3"),
        (
            dict(num_attention_heads=12, num_key_value_heads=6),
            dict(tp_size=4),
            "tensor_model_parallel_size 4 and num_key_value_heads 6: one must divide the other",
        ),
    ],
)
def test_impossible_layouts_name_both_numbers(tiny_folder, sizes, layout, message):
    model_args = read_model_args(tiny_folder(**{**FOLDERS["whole"], **sizes}))
    place = SimpleNamespace(**{"tp_size": 1, "pp_size": 1, "ep_size": 1, **layout})
    with pytest.raises(ValueError, match=message):
        build_decoder(model_args, place, torch.float32)
