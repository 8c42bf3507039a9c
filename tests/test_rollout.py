"""Text written by the training model: equal to transformers token by token, the same at every
parallel layout.

One run of ranks a layout writes the same prompts greedily, with repetition rewarded, and sampled; a
single process of transformers and a single rank of ours are the references.
"""

import json
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd import parallel as parallel_module
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora import apply_lora, as_student, as_teacher
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.load import load_adapter
from megatron_gkd.lora.peft_config import peft_config
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import STUDENT, TEACHER, lora_modules
from megatron_gkd.lora_targets import HEAD, LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.rollout.backend import MegatronBackend, Prompts
from megatron_gkd.rollout.decode import Decoder
from megatron_gkd.rollout.generate import OTHER_RANKS_ROW, generate
from tests.ranks import run_ranks
from tests.rollouts import GREEDY, greedy_texts, make_engine, make_sampling, no_media

VOCAB_SIZE = 1000  # not a multiple of 128: every layout has padded columns
LENGTHS = (9, 1, 17, 4, 12)
MAX_NEW_TOKENS = 6
PREFILL_TOKENS = 40
NUM_CHUNKS = 2  # forwards for the prompts of one rank: those of 17, 12 and 9 tokens, the others
SETTINGS = {
    "greedy": GREEDY,
    # below 1 rewards: what was written comes again
    "repetition": make_sampling(temperature=0.0, repetition_penalty=0.6),
    "top-k, top-p": make_sampling(temperature=0.9, top_p=0.9, top_k=50, repetition_penalty=1.1),
    "top-p": make_sampling(temperature=1.3, top_p=0.8),
}
# (world size, TP, PP, EP); data-parallel size is what remains
LAYOUTS = [
    pytest.param((4, 4, 1, 2), id="TP4-EP2"),
    pytest.param((2, 1, 1, 2), id="EP2-DP2"),
    pytest.param((2, 1, 2, 1), id="PP2", marks=pytest.mark.extended),
    pytest.param((2, 2, 1, 2), id="TP2-EP2", marks=pytest.mark.extended),
    pytest.param((3, 1, 1, 1), id="DP3"),
    pytest.param((4, 2, 2, 2), id="TP2-PP2-EP2", marks=pytest.mark.smoke),
    pytest.param((8, 2, 2, 4), id="TP2-PP2-EP4-DP2", marks=pytest.mark.extended),
    pytest.param((8, 8, 1, 8), id="TP8-EP8-four-kv-heads"),
    pytest.param((8, 1, 1, 8), id="EP8-DP8-ranks-without-prompts"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(
        num_hidden_layers=2,
        hidden_size=64,
        head_dim=16,
        moe_intermediate_size=32,
        vocab_size=VOCAB_SIZE,
    )
    return build_folder(
        str(tmp_path_factory.mktemp("model") / "thinker"),
        TinyModelConfig(thinker_only=True, **sizes),
    )


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS
    ]


def load(folder, world_size, tp, pp, ep, **options):
    """(model, shape, parallel) on this rank."""
    parallel = parallel_module.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    model_args = read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32, **options)
    load_weights(model, model_args, parallel, folder)
    return model, model_args, parallel


def write(model, model_args, parallel, prompts, *, seed=3, **settings):
    """The texts of this rank's share of `prompts` (every dp_size-th), by row number."""
    rows = range(len(prompts))[parallel.dp_rank :: parallel.dp_size]
    defaults = dict(max_new_tokens=MAX_NEW_TOKENS, prefill_tokens=PREFILL_TOKENS)
    defaults |= dict(sampling=make_sampling())
    engine = make_engine(model, model_args, parallel, **{**defaults, **settings})
    responses = generate(engine, [prompts[row] for row in rows], seed=seed, row_ids=list(rows))
    return {row: response.token_ids for row, response in zip(rows, responses)}


def write_all(rank, world_size, folder, layout, prompts):
    parts = load(folder, *layout)
    return {name: write(*parts, prompts, sampling=setting) for name, setting in SETTINGS.items()}


@pytest.fixture(scope="module")
def single_rank(folder, prompts):
    return run_ranks(write_all, 1, folder, (1, 1, 1, 1), prompts)[0]


@pytest.fixture(scope="module")
def thinker(folder):
    return Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("name", ["greedy", "repetition"])
def test_greedy_text_equals_transformers(thinker, prompts, single_rank, name):
    expected = greedy_texts(
        thinker, prompts, MAX_NEW_TOKENS, repetition_penalty=SETTINGS[name].repetition_penalty
    )
    assert single_rank[name] == expected


def test_settings_write_different_texts(single_rank):
    """Otherwise the layout test below would compare less than it says."""
    texts = [str(text) for text in single_rank.values()]
    assert len(set(texts)) == len(SETTINGS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_text_at_every_layout(folder, prompts, single_rank, layout):
    world_size, tp, pp, ep = layout
    results = run_ranks(write_all, world_size, folder, layout, prompts)
    for name, expected in single_rank.items():
        found = {}
        for result in results:
            for row, text in result[name].items():
                assert found.setdefault(row, text) == text  # ranks of one replica agree
        assert found == expected, name


def write_with_adapter(rank, world_size, folder, layout, prompts, adapter_folder, dropout):
    model, model_args, parallel = load(folder, *layout)
    adapter = PeftAdapter(adapter_folder, model_args)
    options = dict(
        rank=adapter.rank, alpha=adapter.alpha, dropout=dropout, targets=adapter.targets, seed=0
    )
    apply_lora(model, model_args, parallel, **options)
    load_adapter(model, model_args, parallel, adapter)
    texts = []
    for toggle in (as_student, as_teacher):
        with toggle(model):
            texts.append(write(model, model_args, parallel, prompts, sampling=GREEDY))
    return texts


@pytest.fixture(scope="module")
def adapter_folder(folder, tmp_path_factory):
    """A PEFT adapter with LoRA everywhere, on the lm_head too, far enough from zero to change the
    text.
    """
    model_args = read_model_args(folder)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: 0.2 * torch.randn(size, generator=generator)
        for name, size in adapter_tensors(model_args, 3, [*LINEARS, HEAD]).items()
    }
    path = tmp_path_factory.mktemp("adapter")
    save_file(
        {name.replace(".thinker.", "."): value for name, value in tensors.items()},
        path / "adapter_model.safetensors",
    )
    config = peft_config(
        model_args.family,
        rank=3,
        alpha=5.0,
        dropout=0.0,
        targets=[*LINEARS, HEAD],
        base_model=folder,
    )
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def peft_text(folder, prompts, adapter_folder):
    student = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    return greedy_texts(
        PeftModel.from_pretrained(student, adapter_folder).eval(), prompts, MAX_NEW_TOKENS
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((1, 1, 1, 1), id="single"),
        pytest.param((2, 2, 1, 2), id="TP2-EP2", marks=pytest.mark.extended),
        pytest.param((4, 4, 1, 2), id="TP4-EP2"),
        pytest.param((4, 1, 2, 2), id="PP2-EP2-DP2", marks=pytest.mark.smoke),
        pytest.param((8, 8, 1, 8), id="TP8-EP8"),
    ],
)
def test_lora_on_and_off_equal_peft(
    folder, prompts, adapter_folder, peft_text, single_rank, layout
):
    """LoRA dropout is 0.5 here: generation must not apply it."""
    student, teacher = run_by_row(
        write_with_adapter, layout, folder, layout, prompts, adapter_folder, 0.5
    )
    assert student == peft_text
    assert teacher == single_rank["greedy"] != peft_text


def run_by_row(fn, layout, *args):
    """Run on ranks that each return a list of {row: text}; join the ranks."""
    results = run_ranks(fn, layout[0], *args)
    return [
        {row: text for result in results for row, text in result[index].items()}
        for index in range(len(results[0]))
    ]


def first_tokens(rank, world_size, folder, layout, prompt, num_samples, sampling):
    parts = load(folder, *layout)
    engine = make_engine(*parts, max_new_tokens=1, sampling=sampling)
    return generate(engine, [prompt], seed=3, row_ids=[0], num_samples=num_samples)


def test_first_tokens_follow_the_softmax_of_transformers(folder, prompts, thinker):
    sampling, num_rows = make_sampling(temperature=1.5, top_k=20, top_p=0.9), 2_000
    scores = thinker(input_ids=torch.tensor([prompts[3]])).logits[0, -1] / 1.5
    top = scores.topk(20)
    probabilities = top.values.softmax(dim=0)
    kept = probabilities.cumsum(dim=0) - probabilities < 0.9
    expected = dict(
        zip(top.indices[kept].tolist(), (probabilities[kept] / probabilities[kept].sum()).tolist())
    )
    assert 3 < len(expected) < 20

    layout = (2, 2, 1, 2)
    samples, again = run_ranks(first_tokens, 2, folder, layout, prompts[3], num_rows, sampling)
    assert samples == again
    counts = torch.bincount(
        torch.tensor([sample.token_ids[0] for sample in samples]), minlength=VOCAB_SIZE
    )
    assert counts.sum() == num_rows
    assert set(counts.nonzero().flatten().tolist()) <= set(expected)
    distance = (
        sum(abs(counts[token].item() / num_rows - share) for token, share in expected.items()) / 2
    )
    noise = (
        sum((share * (1 - share) / num_rows) ** 0.5 for share in expected.values()) / 2
    )  # bounds the mean of the distance
    assert distance < 1.5 * noise


def flags(model):
    names = (
        "training",
        "sequence_parallel",
        "scatter_to_sequence_parallel",
        "reduce_scatter_embeddings",
    )
    owners = [model.config, *model.modules()]
    return [
        (type(owner).__name__, name, getattr(owner, name))
        for owner in owners
        for name in names
        if hasattr(owner, name)
    ]


def num_hooks(model):
    """Of each layer's core attention."""
    attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]
    return [len(attention._forward_pre_hooks) for attention in attentions]


def write_and_interrupt(rank, world_size, folder, layout, prompts):
    """An interrupt in the second chunk of prompts, then one in the second token: the text that the
    same engine writes after each.
    """
    model, model_args, parallel = load(folder, *layout)
    options = dict(rank=2, alpha=2.0, dropout=0.5, targets=["q_proj"], seed=0)
    apply_lora(model, model_args, parallel, **options)
    for module in lora_modules(model):
        for up in module.slots[STUDENT].up.values():
            torch.nn.init.constant_(up, 0.1)
    model.train()
    before, layers, texts = flags(model), len(model.decoder.layers), []
    settings = dict(max_new_tokens=MAX_NEW_TOKENS, prefill_tokens=PREFILL_TOKENS)
    engine = make_engine(model, model_args, parallel, **settings)
    numbers = range(len(prompts))
    asked = Prompts("teacher", 1, prompts, numbers, numbers, no_media, lambda: None)
    calls, forward = [], Decoder.forward

    def interrupt(num_hooks_now):
        assert num_hooks(model) == [num_hooks_now] * layers
        assert not any(value for _, name, value in flags(model) if name == "training")
        assert not torch.is_grad_enabled()
        assert all(module.active == TEACHER for module in lora_modules(model))
        raise KeyboardInterrupt

    def in_prefill(mlp, inputs):
        calls.append(mlp)
        if len(calls) == 2:
            interrupt(1)

    def in_decoding(decoder, weights, rows, cache, num_written, key_mask):
        if num_written == 1:
            interrupt(0)
        return forward(decoder, weights, rows, cache, num_written, key_mask)

    def write_for_teacher():
        responses = MegatronBackend(engine, seed=0).write(asked, 0)
        return dict(zip(numbers, [response.token_ids for response in responses]))

    for phase in ("prefill", "decoding"):
        if phase == "prefill":
            hook = model.decoder.layers[-1].mlp.register_forward_pre_hook(in_prefill)
        else:
            Decoder.forward = in_decoding
        with pytest.raises(KeyboardInterrupt):
            write_for_teacher()
        hook.remove()
        Decoder.forward = forward
        assert flags(model) == before and torch.is_grad_enabled()
        assert num_hooks(model) == [0] * layers
        assert all(module.active == STUDENT for module in lora_modules(model))
        texts.append(write_for_teacher())
    return texts


@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (2, 2, 1, 1)], ids=["single", "TP2"])
def test_an_interrupt_leaves_the_model_as_it_was(folder, prompts, single_rank, layout):
    """The teacher writes, LoRA and its dropout are the student's."""
    for texts in run_ranks(write_and_interrupt, layout[0], folder, layout, prompts):
        assert texts == [single_rank["greedy"]] * 2


def calls_of_modules(rank, world_size, folder, layout, prompts):
    """How often each module was called, with other core attention than elsewhere; the text."""
    model, model_args, parallel = load(folder, *layout, attn_impl="eager")
    calls = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: calls.update([name]))
    return calls, write(model, model_args, parallel, prompts, sampling=GREEDY)


def test_modules_read_the_prompts_and_decoding_runs_none_of_them(folder, prompts, single_rank):
    """Whatever class the model's core attention is; the rotary embedding has no weights."""
    ((calls, texts),) = run_ranks(calls_of_modules, 1, folder, (1, 1, 1, 1), prompts)
    assert texts == single_rank["greedy"]
    assert calls.pop("rotary_pos_emb") == NUM_CHUNKS + MAX_NEW_TOKENS - 1
    assert calls["decoder.layers.1.self_attention.core_attention"] == NUM_CHUNKS
    assert calls["decoder.layers.1.mlp.experts"] == NUM_CHUNKS
    assert set(calls.values()) == {NUM_CHUNKS}


def write_nothing(rank, world_size, folder, layout):
    return write(*load(folder, *layout), [])


@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (2, 1, 1, 2)], ids=["single", "EP2-DP2"])
def test_no_prompts_at_all(folder, layout):
    assert run_ranks(write_nothing, layout[0], folder, layout) == [{}] * layout[0]


def write_with_broken_weights(rank, world_size, folder, layout, prompts, token):
    model, model_args, parallel = load(folder, *layout)
    if parallel.is_first_stage:  # the embedding has overflowed: rows that hold the token are hit
        model.embedding.word_embeddings.weight.data[token] = float("inf")
    try:
        return str(write(model, model_args, parallel, prompts, sampling=GREEDY))
    except FloatingPointError as error:
        return str(error)


@pytest.mark.parametrize("number", [1, 3], ids=["in the prompt", "in the text"])
def test_logits_that_are_not_finite_stop_all_ranks_with_the_row(
    folder, prompts, single_rank, number
):
    """number: of the first token, from 1, that cannot be drawn."""
    token = prompts[3][-1] if number == 1 else single_rank["greedy"][3][1]
    rows = [row for row, text in single_rank["greedy"].items() if token in prompts[row] + text]
    assert rows == [3]
    layout = (4, 1, 2, 2)
    messages = run_ranks(write_with_broken_weights, 4, folder, layout, prompts, token)
    own = f"the logits of token {number} are not finite for row 3 (prompt 1 of 2): "
    others = f"the logits of a token are not finite for {OTHER_RANKS_ROW}: "
    assert [own in message for message in messages].count(True) == 2
    assert [others in message for message in messages].count(True) == 2


def error_of(rank, world_size, folder, prompts, settings):
    model = load(folder, 1, 1, 1, 1)
    try:
        if "sampling" in settings:
            settings = settings | {"sampling": make_sampling(**settings["sampling"])}
        return write(*model, prompts, **settings)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1], []], {}, "the prompt of row 1 (prompt 1 of 2) has no tokens"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0, it must be at least 1"),
        ([[1, VOCAB_SIZE]], {}, f"holds id {VOCAB_SIZE}, the vocabulary has {VOCAB_SIZE}"),
        ([[-1]], {}, f"holds id -1, the vocabulary has {VOCAB_SIZE}"),
        ([[1]], dict(sampling=dict(top_p=2.0)), "top_p is 2.0"),
    ],
)
def test_wrong_arguments_are_named(folder, prompts, settings, message):
    assert message in run_ranks(error_of, 1, folder, prompts, settings)[0]


def shapes_of_prompts(rank, world_size, folder, layout, prompts):
    """Of each call: positions that this rank has of the packed sequence between the linears (times
    1), and the rows that its experts of the first layer get; how many experts a token has.
    """
    model, model_args, parallel = load(folder, *layout)
    shards, of_experts = [], []
    mlp = model.decoder.layers[0].mlp
    mlp.register_forward_pre_hook(lambda mlp, inputs: shards.append(tuple(inputs[0].shape[:2])))
    mlp.experts.register_forward_pre_hook(lambda experts, inputs: of_experts.append(len(inputs[0])))
    write(model, model_args, parallel, prompts)
    return shards, of_experts, model_args.num_experts_per_tok


def test_prompts_are_cut_over_the_tensor_parallel_ranks(folder, prompts):
    """Each rank has a quarter of the positions, and the experts see each of them once, not once a
    rank.
    """
    results = run_ranks(shapes_of_prompts, 4, folder, (4, 4, 1, 4), prompts)
    for shards, _, _ in results:
        # 17, 12 and 9 tokens, 4 and 1, to the next multiple of 4
        assert shards == [(40 // 4, 1), (8 // 4, 1)]
    totals = [sum(of_call) for of_call in zip(*(of_experts for _, of_experts, _ in results))]
    per_token = results[0][2]
    assert totals == [40 * per_token, 8 * per_token]
