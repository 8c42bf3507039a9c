"""Text of rows with audio, images and video: the student's, with LoRA, equal to what transformers
generates with peft, the teacher's to what it generates without, token by token.
"""

import functools
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.media.positions import MediaTokenIds
from megatron_gkd.media.towers import StepMedia, build_towers
from megatron_gkd.model.args import read_model_args
from megatron_gkd.rollout.row_batch import RowBatch
from tests.adapters import load_peft, load_thinker, random_adapter, write_adapter
from tests.lora_runs import build, initialize
from tests.packed import rows_of
from tests.random_media import make_batch, make_rows
from tests.ranks import run_ranks
from tests.rollouts import megatron_rollout
from tests.tower_adapters import make_model, write_tower_adapter

VOCAB_SIZE, MAX_NEW_TOKENS = 503, 5
SIDES = ("student", "teacher")
# LoRA on every linear of the decoder, or on its attention and both towers; the layout
CASES = [
    pytest.param("decoder", (1, 1, 1, 1), id="single"),
    pytest.param("decoder", (4, 2, 2, 2), id="TP2-PP2-EP2", marks=pytest.mark.smoke),
    pytest.param("decoder", (3, 1, 1, 1), id="DP3-text-on-one-rank"),
    pytest.param("towers", (1, 1, 1, 1), id="towers", marks=pytest.mark.extended),
    pytest.param("towers", (4, 2, 2, 2), id="towers-TP2-PP2-EP2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(
        num_hidden_layers=4,
        hidden_size=64,
        head_dim=16,
        moe_intermediate_size=32,
        vocab_size=VOCAB_SIZE,
    )
    return build_folder(str(tmp_path_factory.mktemp("model") / "thinker"), TinyModelConfig(**sizes))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    tensors = random_adapter(read_model_args(folder), 2, LINEARS)
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in ("decoder", "towers")}
    return {
        "decoder": write_adapter(paths["decoder"], tensors, rank=2, alpha=3, targets=LINEARS),
        "towers": write_tower_adapter(folder, paths["towers"]),
    }


def write(rank, world_size, folder, kind, adapter, tp, pp, ep):
    """{side: {row: two texts}} of this rank's micro-batches, and the student's log-probabilities
    {row: [2 x text]}.
    """
    place = initialize(tp, pp, ep)
    rows, batches, first = make_rows(MediaTokenIds.read(folder)), [], 0
    for of_batch in rows:
        batches.append(make_batch([*of_batch], tp, first))
        first += len(of_batch)
    batches = batches[place.dp_rank :: place.dp_size]
    if kind == "towers":
        model_args, model = make_model(place, folder, adapter=adapter)
        towers = model.towers
    else:
        model_args, model = build(place, folder, adapter)
        towers = build_towers(folder, model_args, place, torch.float32, audio=True, visual=True)
    settings = dict(max_new_tokens=MAX_NEW_TOKENS, max_tokens=200)
    rollout = megatron_rollout(model, model_args, place, **settings)
    rollout = replace(rollout, num_samples=2)
    texts, log_probabilities = {side: defaultdict(list) for side in SIDES}, defaultdict(list)
    prefill, write_token, features = RowBatch._prefill, RowBatch.write_token, []

    def read(batch, prompts, media):
        if media is not None and media.features is not None:
            features.append(weakref.ref(media.features.embeddings))
        return prefill(batch, prompts, media)

    def write_one(batch, num_written):
        assert all(of_rollout() is None for of_rollout in features)  # they have served
        write_token(batch, num_written)

    patch = pytest.MonkeyPatch()
    patch.setattr(RowBatch, "_prefill", read)
    patch.setattr(RowBatch, "write_token", write_one)
    for side in SIDES:
        media = StepMedia(towers, [batch.media for batch in batches])
        for new in rollout.respond(batches, 0, side, media):
            if new.rows == [-1]:  # another rank has a micro-batch more
                continue
            view = getattr(new, side)
            of_rows = zip(new.rows, rows_of(view.input_ids[0], view), view.prompt_lengths)
            for row, ids, start in of_rows:
                texts[side][row].append(ids[start:].tolist())
            if side == "student":
                for row, values in zip(new.rows, new.log_probabilities.split(MAX_NEW_TOKENS)):
                    log_probabilities[row] += values.tolist()
    patch.undo()
    assert len(features) == 2 or not place.is_first_stage or place.dp_size > 1
    return {side: dict(of_side) for side, of_side in texts.items()}, dict(log_probabilities)


def expected_texts(folder, adapter):
    """As `write` returns it."""
    texts, log_probabilities = {}, {}
    rows = [row for of_batch in make_rows(MediaTokenIds.read(folder)) for row in of_batch]
    settings = dict(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=[], pad_token_id=0)
    settings |= dict(return_dict_in_generate=True, output_logits=True)
    models = dict(student=load_peft(load_thinker(folder), adapter)[0], teacher=load_thinker(folder))
    for side, model in models.items():
        texts[side] = {}
        for number, row in enumerate(rows):
            inputs = row.inputs(side, with_response=False)
            found = model.generate(**inputs, **settings)
            text = found.sequences[0, inputs["input_ids"].shape[1] :]
            texts[side][number] = [text.tolist()] * 2
            if side == "student":
                values = torch.cat(found.logits).log_softmax(dim=1).gather(1, text[:, None])
                log_probabilities[number] = values[:, 0].tolist() * 2
    return texts, log_probabilities


@pytest.fixture(scope="module")
def expected(folder, adapters):
    return functools.cache(lambda kind: expected_texts(folder, adapters[kind]))


@pytest.mark.parametrize("kind, layout", CASES)
def test_greedy_text_equals_transformers(folder, adapters, expected, kind, layout):
    """Two samples of each row; and its log-probabilities."""
    of_transformers, expected_values = expected(kind)
    assert of_transformers["student"] != of_transformers["teacher"]
    texts, values = {side: {} for side in SIDES}, {}
    for of_rank, values_of_rank in run_ranks(
        write, layout[0], folder, kind, adapters[kind], *layout[1:]
    ):
        for side in SIDES:
            texts[side] |= of_rank[side]
        values |= values_of_rank
    assert texts == of_transformers
    assert sorted(values) == sorted(expected_values)
    for row, of_row in values.items():
        assert of_row == pytest.approx(expected_values[row], rel=0, abs=1e-5)
