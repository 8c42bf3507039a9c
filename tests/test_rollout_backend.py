"""Rollout with the training model: micro-batches in, their rows with new responses out, cut into
micro-batches anew; and the folder's stop ids.
"""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd import parallel as parallel_module
from megatron_gkd.data import Packing, Sample, View, collate
from megatron_gkd.data.chat import load_chat_tokenizer, read_stop_token_ids
from megatron_gkd.data.chat_template import Conversation
from megatron_gkd.data.micro_batches import Budget
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora import apply_lora, as_student, as_teacher
from megatron_gkd.lora.slots import STUDENT, lora_modules
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.rollout.generate import Response, generate
from megatron_gkd.rollout.rollout import Rollout
from tests.ranks import run_ranks
from tests.rollouts import make_engine, make_sampling, megatron_rollout, no_media
from tests.tiny_tokenizer import CHATML, write_bpe_folder, write_sentencepiece_folder

STUDENT_PROMPTS = [[11, 12, 13], [21], [31, 32, 33, 34, 35], [41, 42], [51, 52, 53, 54]]
MAX_COMPLETION_LENGTH = 5
MAX_TOKENS = 20  # of a micro-batch: one or two rows of up to 12 tokens in the teacher's view
SAMPLING = make_sampling(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(num_hidden_layers=2, hidden_size=64, head_dim=16, moe_intermediate_size=32)
    return build_folder(str(tmp_path_factory.mktemp("model") / "whole"), TinyModelConfig(**sizes))


def make_batches(rows, parallel, numbers=None):
    """Micro-batches of two rows; the last one is filled up. The teacher's prompts are the
    student's, reversed, after two more tokens. numbers: of the rows in the global batch, which are
    the rows themselves by default.
    """
    samples, numbers = [], list(rows if numbers is None else numbers)
    for row in rows:
        prompt, response = STUDENT_PROMPTS[row], [90 + row, 91]
        views = [
            View(ids + response, [-100] * len(ids) + response, len(ids))
            for ids in (prompt, teacher_prompt(row))
        ]
        samples.append(Sample(*views, source="toy", row=row, cut_tokens=3))
    samples += [None] * (-len(samples) % 2)
    packing = Packing(0, parallel.sequence_multiple, parallel.row_multiple)
    return [
        collate(samples[first : first + 2], packing, [*numbers, -1][first : first + 2])
        for first in range(0, len(samples), 2)
    ]


def teacher_prompt(row):
    return [7, 8] + STUDENT_PROMPTS[row][::-1]


def respond(rank, world_size, folder, tp, pp, ep, steps):
    """Student, then teacher as the writer: {(step, row): (student's prompt, teacher's prompt,
    response)}, and the text of `generate` for the writer's prompts at step 0.
    """
    parallel = parallel_module.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    model_args = read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32)
    load_weights(model, model_args, parallel, folder)
    apply_lora(
        model,
        model_args,
        parallel,
        rank=2,
        alpha=8.0,
        dropout=0.5,
        targets=["o_proj", "gate_proj"],
        seed=0,
    )
    for module in lora_modules(model):
        for up in module.slots[STUDENT].up.values():
            torch.nn.init.constant_(up, 0.1)
    rows = [
        row
        for row in range(len(STUDENT_PROMPTS))
        if row // 2 % parallel.dp_size == parallel.dp_rank
    ]
    rollout = megatron_rollout(
        model,
        model_args,
        parallel,
        sampling=SAMPLING,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        stop_token_ids=[5],
        max_tokens=MAX_TOKENS,
        seed=4,
    )
    results = []
    for author, prompt_of, toggle in (
        ("student", STUDENT_PROMPTS.__getitem__, as_student),
        ("teacher", teacher_prompt, as_teacher),
    ):
        texts, log_probabilities, counts = {}, {}, []
        for step in steps:
            written = rollout.respond(make_batches(rows, parallel), step, author)
            check_batches(written, rows, parallel)
            counts.append(len(written))
            for new in written:
                for index, row in of_data(new):
                    texts[step, row] = split_row(new, index)
                if step == 0:
                    log_probabilities |= values_of_rows(new)
        assert all(module.active == STUDENT for module in lora_modules(model))
        with toggle(model):
            direct = generate(
                make_engine(
                    model,
                    model_args,
                    parallel,
                    sampling=SAMPLING,
                    max_new_tokens=MAX_COMPLETION_LENGTH,
                    stop_token_ids=[5],
                ),
                [prompt_of(row) for row in rows],
                seed=4 << 32,
                row_ids=list(rows),
            )
        if author == "student":
            for row, response in zip(rows, direct):
                expected = torch.tensor(response.log_probabilities)
                torch.testing.assert_close(log_probabilities[row], expected)
        else:
            assert set(log_probabilities.values()) <= {None}
        direct_texts = {row: text.token_ids for row, text in zip(rows, direct)}
        results.append((texts, direct_texts, counts))
    return results


def of_data(batch):
    """(index, row) of the rows that are no padding."""
    return [(index, row) for index, row in enumerate(batch.rows) if row >= 0]


def values_of_rows(batch):
    """Row -> log-probabilities of its response, or None."""
    if batch.log_probabilities is None:
        return {row: None for _, row in of_data(batch)}
    parts = batch.log_probabilities.split(batch.student.num_targets)
    assert sum(map(len, parts)) == len(batch.log_probabilities) == len(batch.student.targets)
    return {row: parts[index] for index, row in of_data(batch)}


def check_batches(batches, rows, parallel, times=1):
    """Of each row so many responses; padding rows stand alone, where other ranks have a micro-batch
    more.
    """
    found = [row for batch in batches for _, row in of_data(batch)]
    assert sorted(found) == sorted([*rows] * times)
    for batch in batches:
        assert torch.equal(batch.student.targets, batch.teacher.targets)
        assert batch.student.size % parallel.sequence_multiple == 0
        assert batch.teacher.size % parallel.sequence_multiple == 0
        if -1 in batch.rows:
            assert batch.rows == batch.sample_ids == [-1] and not batch.is_written
            assert len(batch.student.targets) == 0
            continue
        assert batch.is_written and batch.teacher is not batch.student and batch.cut_tokens == 0
        assert batch.sources == ["toy"] * len(batch.rows) and batch.sample_ids == batch.rows
        tokens = sum(sample.num_tokens for sample in batch.samples)
        assert tokens <= MAX_TOKENS or len(batch.rows) == 1


def split_row(batch, index):
    """(student's prompt, teacher's, response) of a row, all of whose response is trained."""
    prompts, responses = [], []
    for view in (batch.student, batch.teacher):
        start, end = view.starts[index], view.starts[index] + view.lengths[index]
        first = start + view.prompt_lengths[index]
        prompts.append(view.input_ids[0, start:first].tolist())
        responses.append(view.input_ids[0, first:end].tolist())
        before = sum(view.num_targets[:index])
        trained = slice(before, before + view.num_targets[index])
        assert view.response_rows[trained].tolist() == list(range(first - 1, end - 1))
        assert view.targets[trained].tolist() == responses[-1]
    assert responses[0] == responses[1]
    return (*prompts, responses[0])


@pytest.fixture(scope="module")
def reference(folder):
    return run_ranks(respond, 1, folder, 1, 1, 1, [0, 1])[0]


def test_both_views_keep_their_prompts_and_share_the_new_response(reference):
    for texts, direct, _ in reference:
        for (step, row), (student, teacher, response) in texts.items():
            assert student == STUDENT_PROMPTS[row] and teacher == teacher_prompt(row)
            assert 1 <= len(response) <= MAX_COMPLETION_LENGTH
            if step == 0:
                assert response == direct[row]


def test_writer_and_step_change_the_text(reference):
    (student, *_), (teacher, *_) = reference
    written = {
        str([texts[step, row][2] for row in range(len(STUDENT_PROMPTS))])
        for texts in (student, teacher)
        for step in (0, 1)
    }
    assert len(written) == 4


@pytest.mark.parametrize("layout", [(2, 2, 1, 2), (4, 1, 2, 2)], ids=["TP2-EP2", "PP2-EP2-DP2"])
def test_same_responses_at_every_layout(folder, reference, layout):
    world_size, *sizes = layout
    results = run_ranks(respond, world_size, folder, *sizes, [0, 1])
    for writer in range(2):
        texts = {}
        for result in results:
            for key, text in result[writer][0].items():
                assert texts.setdefault(key, text) == text
        assert texts == reference[writer][0]
        # as many micro-batches on every rank, several of them
        (counts,) = {tuple(result[writer][2]) for result in results}
        assert min(counts) > 1


def respond_to_one_row(rank, world_size, folder, num_times):
    """The responses to a global batch that is the same row again and again, by its number there."""
    parallel = parallel_module.initialize(torch.device("cpu"))
    model_args = read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32)
    load_weights(model, model_args, parallel, folder)
    rollout = megatron_rollout(
        model,
        model_args,
        parallel,
        sampling=SAMPLING,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        seed=4,
    )
    places = [place for place in range(num_times) if place // 2 % world_size == rank]
    batches = make_batches([3] * len(places), parallel, places)
    batches = rollout.respond(batches, 0, "student")
    assert sorted(number for batch in batches for number in batch.sample_ids) == places
    return {
        number: split_row(batch, index)[2]
        for batch in batches
        for index, number in enumerate(batch.sample_ids)
    }


def test_a_row_that_comes_twice_is_answered_twice(folder):
    (alone,) = run_ranks(respond_to_one_row, 1, folder, 4)
    assert len({str(response) for response in alone.values()}) == 4
    first, second = run_ranks(respond_to_one_row, 2, folder, 4)
    assert first | second == alone


def respond_with_samples(rank, world_size, folder, tp, pp, ep):
    """Three responses to each of this rank's rows: {row: responses in the order of their text}."""
    parallel = parallel_module.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    model_args = read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32)
    load_weights(model, model_args, parallel, folder)
    settings = dict(sampling=SAMPLING, max_new_tokens=20, stop_token_ids=range(0, 500, 9))
    rollout = megatron_rollout(
        model, model_args, parallel, seed=4, max_tokens=MAX_TOKENS, **settings
    )
    rollout = replace(rollout, num_samples=3)
    rows = range(len(STUDENT_PROMPTS))
    rows = [row for row in rows if row // 2 % parallel.dp_size == parallel.dp_rank]
    written = rollout.respond(make_batches(rows, parallel), 0, "student")
    check_batches(written, rows, parallel, times=3)
    direct = generate(
        make_engine(model, model_args, parallel, **settings),
        [STUDENT_PROMPTS[row] for row in rows],
        seed=4 << 32,
        row_ids=rows,
        num_samples=3,
    )
    expected = {row: sorted(direct[3 * index : 3 * index + 3]) for index, row in enumerate(rows)}
    found = {row: [] for row in rows}
    for batch in written:
        if not of_data(batch):
            continue
        parts = batch.log_probabilities.split(batch.student.num_targets)
        for index, row in of_data(batch):
            student, teacher, text = split_row(batch, index)
            assert student == STUDENT_PROMPTS[row] and teacher == teacher_prompt(row)
            found[row].append((text, parts[index].tolist()))
    for row, responses in found.items():
        responses.sort()
        assert [text for text, _ in responses] == [text for text, _ in expected[row]]
        for (_, values), (_, wanted) in zip(responses, expected[row]):
            assert values == pytest.approx(wanted, rel=1e-6)
    return {row: [text for text, _ in responses] for row, responses in found.items()}


def test_several_responses_to_a_prompt(folder):
    """Each is a row of its own; the same ones at every layout, of different lengths."""
    (alone,) = run_ranks(respond_with_samples, 1, folder, 1, 1, 1)
    assert sorted(alone) == list(range(5)) and set(map(len, alone.values())) == {3}
    texts = [text for of_row in alone.values() for text in of_row]
    assert len(set(map(str, texts))) == 15 and len(set(map(len, texts))) > 5
    for layout in [(2, 1, 1, 2), (4, 2, 2, 1)]:
        found = {}
        for of_rank in run_ranks(respond_with_samples, layout[0], folder, *layout[1:]):
            for row, of_row in of_rank.items():
                assert found.setdefault(row, of_row) == of_row
        assert found == alone


class BrokenBackend:
    """Writes one token to each prompt; at some steps the logits of some ranks are not finite."""

    def __init__(self, rank, broken):
        self.rank, self.broken = rank, broken

    def update_weights(self, model, step):
        pass

    def write(self, prompts, step):
        if (step, self.rank) in self.broken:
            raise FloatingPointError(f"row {prompts.row_ids[0]} of rank {self.rank}")
        return [Response([9], None) for _ in prompts.token_ids]

    def close(self):
        pass


def respond_or_skip(rank, world_size):
    """Micro-batches of each step on this rank: both write, either cannot, both cannot, both write
    again.
    """
    parallel = parallel_module.initialize(torch.device("cpu"))
    rollout = Rollout(
        backend=BrokenBackend(rank, {(1, 0), (2, 1), (3, 0), (3, 1)}),
        model=None,
        parallel=parallel,
        references=no_media,
        max_new_tokens=3,
        stop_token_ids=[],
        budget=Budget(12),
        packing=Packing(0),
    )
    rows = [[0, 1, 2], [3]][rank]
    return [
        len(rollout.respond_or_skip(make_batches(rows, parallel), step, "student"))
        for step in range(5)
    ]


def test_replicas_that_write_apart_skip_a_step_together():
    """Whichever of them cannot write; the next step goes on, with as many micro-batches for one row
    as for three.
    """
    assert run_ranks(respond_or_skip, 2) == [[2, 0, 0, 0, 2]] * 2


def test_a_response_that_ends_by_itself_is_not_truncated():
    packing = Packing(0)
    rollout = Rollout(
        backend=None,
        model=None,
        parallel=None,
        references=no_media,
        max_new_tokens=3,
        stop_token_ids=[5, 6],
        budget=Budget(MAX_TOKENS),
        packing=packing,
    )
    view = View([1, 2, 3], [-100, 2, 3], 1)
    sample = Sample(view, view, "toy", 0, 0)
    # cut, ended with its last token, ended before
    cut, full, short = map(sample.with_response, ([9, 8, 7], [9, 8, 6], [9, 5]))
    batches = [collate(samples, packing) for samples in ([cut, full], [short, None])]
    assert rollout.num_truncated(batches) == 1
    assert replace(rollout, stop_token_ids=[]).num_truncated(batches) == 2
    of_the_data_set = [replace(sample, is_written=False) for sample in (cut, full, short)]
    assert rollout.num_truncated([collate(of_the_data_set, packing)]) == 0


def write_json(folder, name, content):
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("byte_fallback", [None, False, True])
def test_stop_ids_hold_what_closes_a_turn_in_the_data(tmp_path, byte_fallback):
    """In any folder that says nothing of its own: what the data train as the last token of a
    response ends one.
    """
    write = (
        write_bpe_folder
        if byte_fallback is None
        else partial(write_sentencepiece_folder, byte_fallback=byte_fallback)
    )
    folder = write(tmp_path)
    chat = load_chat_tokenizer(str(folder))
    turns = [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}]
    (encoded,) = chat.encode([Conversation(turns)])
    ids = encoded.ids
    found = read_stop_token_ids(folder)
    assert ids[-1] in found and set(found) - {ids[-1]} <= {chat.tokenizer.eos_token_id}


@pytest.mark.parametrize("token, closes", [("<|im_end|>", True), (".", False)])
def test_a_full_stop_ends_no_response(tmp_path, token, closes):
    """Where a template closes turns with it: it stands inside of responses too."""
    template = CHATML.replace("<|im_end|>", token)
    folder = write_bpe_folder(tmp_path, chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["."])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert read_stop_token_ids(folder) == (
        [tokenizer.convert_tokens_to_ids(token)] if closes else []
    )


def test_a_tokenizer_that_does_not_load_names_none(tmp_path):
    """Rows of ids train without it."""
    (tmp_path / "tokenizer.json").write_text("{")
    assert read_stop_token_ids(tmp_path) == []


def test_stop_ids_come_from_generation_config_then_config_then_tokenizer(folder, tmp_path):
    token_ids = json.loads((Path(folder) / "tokenizer.json").read_text())
    end = {token["content"]: token["id"] for token in token_ids["added_tokens"]}
    assert read_stop_token_ids(folder) == sorted([end["<|im_end|>"], end["<|endoftext|>"]])

    assert read_stop_token_ids(tmp_path) == []
    shutil.copy(Path(folder) / "tokenizer.json", tmp_path)
    assert read_stop_token_ids(tmp_path) == []  # the class for any model has no end of its own
    shutil.copy(Path(folder) / "chat_template.json", tmp_path)
    assert read_stop_token_ids(tmp_path) == [end["<|im_end|>"]]  # what closes a turn
    shutil.copy(Path(folder) / "tokenizer_config.json", tmp_path)
    assert read_stop_token_ids(tmp_path) == [end["<|im_end|>"]]
    write_json(tmp_path, "config.json", {"thinker_config": {"text_config": {"eos_token_id": 9}}})
    assert read_stop_token_ids(tmp_path) == [9]
    write_json(tmp_path, "generation_config.json", {"do_sample": True})
    assert read_stop_token_ids(tmp_path) == [9]
    write_json(tmp_path, "generation_config.json", {"eos_token_id": 12})
    assert read_stop_token_ids(tmp_path) == [12]
    write_json(tmp_path, "generation_config.json", {"eos_token_id": [12, 3]})
    assert read_stop_token_ids(tmp_path) == [3, 12]
    for content, reason in (
        ([], "not the settings of a model"),
        ({"eos_token_id": True}, "eos_token_id is True"),
    ):
        write_json(tmp_path, "generation_config.json", content)
        with pytest.raises(ValueError, match=f"generation_config.json: {reason}"):
            read_stop_token_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not the settings of a model"):
        read_stop_token_ids(tmp_path)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": "<|im_end|>"})
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is '<|im_end|>'"):
        read_stop_token_ids(tmp_path)


def write_a_bad_row(rank, world_size, folder, ep):
    """What two context-parallel ranks say of row 1, the second's, whose logits are not finite."""
    parallel = parallel_module.initialize(
        torch.device("cpu"), expert_model_parallel_size=ep, context_parallel_size=2
    )
    model_args = read_model_args(folder)
    model = build_decoder(model_args, parallel, torch.float32)
    load_weights(model, model_args, parallel, folder)
    model.embedding.word_embeddings.weight.data[STUDENT_PROMPTS[1][0]] = float("nan")
    settings = dict(sampling=SAMPLING, max_new_tokens=3, stop_token_ids=[], seed=4)
    rollout = megatron_rollout(model, model_args, parallel, **settings)
    with pytest.raises(FloatingPointError) as error:
        rollout.respond(make_batches([0, 1, 2], parallel), 0, "student")
    return str(error.value)


@pytest.mark.parametrize("ep", [1, 2])
def test_ranks_that_share_rows_name_the_bad_one(folder, ep):
    said = run_ranks(write_a_bad_row, 2, folder, ep)
    assert said[0] == said[1] and "not finite for row 1 " in said[0]
