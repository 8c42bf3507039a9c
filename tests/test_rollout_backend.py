"""Rollout with the training model: micro-batches in, micro-batches with new responses out; and the
folder's stop ids.
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
from megatron_gkd.data.batch import collate, with_responses
from megatron_gkd.data.chat import load_chat_tokenizer, read_stop_token_ids
from megatron_gkd.data.sample import Sample, View
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.lora import apply_lora, as_student, as_teacher
from megatron_gkd.lora.slots import STUDENT, lora_modules
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.rollout.generate import generate
from megatron_gkd.rollout.rollout import Rollout
from tests.ranks import run_ranks
from tests.rollouts import make_engine, make_sampling, megatron_rollout, no_media
from tests.tiny_tokenizer import CHATML, write_bpe_folder, write_sentencepiece_folder

STUDENT_PROMPTS = [[11, 12, 13], [21], [31, 32, 33, 34, 35], [41, 42], [51, 52, 53, 54]]
MAX_COMPLETION_LENGTH = 5
SAMPLING = make_sampling(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(num_hidden_layers=2, hidden_size=64, head_dim=16, moe_intermediate_size=32)
    return build_folder(str(tmp_path_factory.mktemp("model") / "whole"), TinyModelConfig(**sizes))


def make_batches(rows, pad_to_multiple_of):
    """Micro-batches of two rows; the last one is filled up. The teacher's prompts are the
    student's, reversed, after two more tokens.
    """
    samples = []
    for row in rows:
        prompt, response = STUDENT_PROMPTS[row], [90 + row, 91]
        views = [
            View(ids + response, [-100] * len(ids) + response, len(ids))
            for ids in (prompt, teacher_prompt(row))
        ]
        samples.append(Sample(*views, has_teacher_view=True, source="toy", row=row, cut_tokens=3))
    samples += [None] * (-len(samples) % 2)
    return [
        collate(samples[first : first + 2], 0, pad_to_multiple_of)
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
        seed=4,
    )
    results = []
    for author, prompt_of, toggle in (
        ("student", STUDENT_PROMPTS.__getitem__, as_student),
        ("teacher", teacher_prompt, as_teacher),
    ):
        texts, log_probabilities = {}, []
        for step in steps:
            batches = make_batches(rows, tp)
            for old, new in zip(batches, rollout.respond(batches, step, author)):
                check_batch(old, new, tp)
                for index, row in enumerate(new.rows):
                    texts[step, row] = split_row(new, index)
                if step == 0:
                    log_probabilities.append(new.log_probabilities)
        assert all(module.active == STUDENT for module in lora_modules(model))
        texts = {key: text for key, text in texts.items() if key[1] >= 0}
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
            expected = [value for response in direct for value in response.log_probabilities]
            torch.testing.assert_close(torch.cat(log_probabilities), torch.tensor(expected))
        else:
            assert log_probabilities == [None] * len(batches)
        results.append((texts, {row: text.token_ids for row, text in zip(rows, direct)}))
    return results


def check_batch(old, new, multiple):
    assert new.on_policy and not old.on_policy
    assert (new.rows, new.sources) == (old.rows, old.sources)
    assert (
        new.student.input_ids.shape[1] % multiple == new.teacher.input_ids.shape[1] % multiple == 0
    )
    assert torch.equal(new.student.targets, new.teacher.targets)
    for index, row in enumerate(new.rows):
        if row < 0:
            assert (new.student.labels[index] == -100).all()


def split_row(batch, index):
    prompts, responses = [], []
    for view in (batch.student, batch.teacher):
        ids = view.input_ids[index, : view.lengths[index]].tolist()
        start = int(view.prompt_lengths[index])
        prompts.append(ids[:start])
        responses.append(ids[start:])
        assert view.labels[index, start : view.lengths[index]].tolist() == responses[-1]
    assert responses[0] == responses[1]
    return (*prompts, responses[0])


@pytest.fixture(scope="module")
def reference(folder):
    return run_ranks(respond, 1, folder, 1, 1, 1, [0, 1])[0]


def test_both_views_keep_their_prompts_and_share_the_new_response(reference):
    for texts, direct in reference:
        for (step, row), (student, teacher, response) in texts.items():
            assert student == STUDENT_PROMPTS[row] and teacher == teacher_prompt(row)
            assert 1 <= len(response) <= MAX_COMPLETION_LENGTH
            if step == 0:
                assert response == direct[row]


def test_writer_and_step_change_the_text(reference):
    (student, _), (teacher, _) = reference
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


def respond_to_one_row(rank, world_size, folder, num_times):
    """The responses to a global batch that is the same row again and again, in micro-batches of
    two, by place.
    """
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
    batches = make_batches([3] * len(places), 1)
    batches = rollout.respond(batches, 0, "student")
    assert all(batch.rows == [3, 3] for batch in batches)
    return dict(
        zip(places, (split_row(batch, index)[2] for batch in batches for index in range(2)))
    )


def test_a_row_that_comes_twice_is_answered_twice(folder):
    (alone,) = run_ranks(respond_to_one_row, 1, folder, 4)
    assert len({str(response) for response in alone.values()}) == 4
    first, second = run_ranks(respond_to_one_row, 2, folder, 4)
    assert first | second == alone


def respond_with_samples(rank, world_size, folder, tp, pp, ep):
    """Three responses to each of this rank's rows, at the places in the global batch that their
    numbers are: {(row, sample): response}.
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
    settings = dict(sampling=SAMPLING, max_new_tokens=20, stop_token_ids=range(0, 500, 9))
    rollout = megatron_rollout(model, model_args, parallel, seed=4, **settings)
    rollout = replace(rollout, num_samples=3)
    rows = range(len(STUDENT_PROMPTS))
    rows = [row for row in rows if row // 2 % parallel.dp_size == parallel.dp_rank]
    batches = make_batches(rows, tp)
    written = rollout.respond(batches, 0, "student")
    direct = generate(
        make_engine(model, model_args, parallel, **settings),
        [STUDENT_PROMPTS[row] for row in rows],
        seed=4 << 32,
        row_ids=rows,
        num_samples=3,
    )
    texts, of_text = {}, iter(direct)
    expected = {(row, sample): next(of_text) for row in rows for sample in range(3)}
    assert len(written) == 3 * len(batches)
    for number, new in enumerate(written):
        old, sample = batches[number // 3], number % 3
        check_batch(old, new, tp)
        found = new.log_probabilities.split(
            [len(expected[row, sample].token_ids) for row in new.rows if row >= 0]
        )
        assert sum(map(len, found)) == len(new.student.targets)
        for index, row in enumerate(new.rows):
            if row >= 0:
                student, teacher, texts[row, sample] = split_row(new, index)
                assert student == STUDENT_PROMPTS[row] and teacher == teacher_prompt(row)
                assert texts[row, sample] == expected[row, sample].token_ids
                own = torch.tensor(expected[row, sample].log_probabilities)
                torch.testing.assert_close(found[index], own)
    return texts


def test_samples_of_a_micro_batch_follow_each_other(folder):
    """The same ones at every layout, of different lengths."""
    (alone,) = run_ranks(respond_with_samples, 1, folder, 1, 1, 1)
    assert sorted(alone) == [(row, sample) for row in range(5) for sample in range(3)]
    assert len({str(text) for text in alone.values()}) == 15
    assert len({len(text) for text in alone.values()}) > 5
    for layout in [(2, 1, 1, 2), (4, 2, 2, 1)]:
        texts = {}
        for found in run_ranks(respond_with_samples, layout[0], folder, *layout[1:]):
            for key, text in found.items():
                assert texts.setdefault(key, text) == text
        assert texts == alone


def test_a_response_that_ends_by_itself_is_not_truncated():
    rollout = Rollout(
        backend=None,
        model=None,
        parallel=None,
        references=no_media,
        max_new_tokens=3,
        stop_token_ids=[5, 6],
        pad_token_id=0,
    )
    batches = make_batches([0, 1, 2], 1)
    responses = [
        [[9, 8, 7], [9, 8, 6]],
        [[9, 5], []],
    ]  # cut, ended with its last token, ended before; a padding row
    batches = [with_responses(batch, texts, 0, 1) for batch, texts in zip(batches, responses)]
    assert rollout.num_truncated(batches) == 1
    assert replace(rollout, stop_token_ids=[]).num_truncated(batches) == 2
    of_the_data_set = [replace(batch, on_policy=False) for batch in batches]
    assert rollout.num_truncated(of_the_data_set) == 0


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
    ids, _ = chat.encode(
        [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "is blue"}]
    )
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
        ([], "must hold an object"),
        ({"eos_token_id": True}, "eos_token_id is True"),
    ):
        write_json(tmp_path, "generation_config.json", content)
        with pytest.raises(ValueError, match=f"generation_config.json: {reason}"):
            read_stop_token_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json: not JSON"):
        read_stop_token_ids(tmp_path)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": "<|im_end|>"})
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is '<|im_end|>'"):
        read_stop_token_ids(tmp_path)
