"""--show_row: what a person reads is what the sample holds."""

import json
import re
import shutil

import numpy as np
import pytest
import soundfile

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.config import parse_config
from megatron_gkd.data import DataError, load_datasets
from megatron_gkd.data.chat import load_chat_tokenizer
from megatron_gkd.data.show_row import WIDTH, show_row
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.train import run_from_config

VOCAB = 1024
SYSTEM = {"role": "system", "content": "You are kind."}
ANSWER = {"role": "assistant", "content": "好 😀, a cat that sleeps.\nThat is all of it."}
ROWS = [
    {"query": "first", "response": "one"},
    {
        "messages": [
            SYSTEM,
            {"role": "user", "content": "<audio>What is it?"},
            ANSWER,
            {"role": "user", "content": "word " * 60},
            {"role": "assistant", "content": "Yes."},
        ],
        "audios": ["a.wav"],
    },
    {"query": "third", "response": "three", "teacher_prompt": "third, which is 3"},
    {"query": "broken", "response": ["x"]},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "teacher_input_ids": [9]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    return build_folder(str(folder), TinyModelConfig(num_hidden_layers=1, hidden_size=64))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    soundfile.write(folder / "a.wav", np.zeros(16_000), 16_000)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder / "rows.jsonl")


def shown(wanted, model, rows, **settings):
    data = DataConfig(dataset=[rows], max_length=400, **settings)
    return show_row(wanted, data, model, VOCAB, 0)


def test_the_marked_tokens_are_those_that_the_sample_trains(model, rows):
    text = shown("1", model, rows)
    data = DataConfig(dataset=[rows], max_length=400, skip_bad_rows=True)
    view = load_datasets(data, model, VOCAB, 0)[0][1].student
    trained = [label for label in view.labels if label != IGNORED_LABEL]
    decoded = load_chat_tokenizer(model).tokenizer.decode(trained)
    marked = "".join(line[2:] for line in text.splitlines() if line.startswith("> "))
    plain = marked.replace("<|im_end|>", "\0").replace("|", "").replace("\0", "<|im_end|>")
    assert plain.replace("⏎", "\n") == decoded
    first = text.splitlines()[0]
    assert f"{len(view.input_ids)} tokens, {view.response_start} of them before" in first
    assert f"{len(trained)} are trained" in first and f"{rows}:2, the student's view" in first


def test_a_row_is_readable(model, rows):
    text = shown("1", model, rows)
    num_audio = len(re.findall(r"<\|audio_pad\|> x 13\b", text))
    assert num_audio == 1, text  # a second of sound
    assert "<|audio_start|>|<|audio_pad|> x 13|<|audio_end|>" in text
    assert all(len(line) <= WIDTH for line in text.splitlines()[1:])
    assert "😀" in text and "好" in text  # characters of several tokens
    assert text.endswith("The teacher's view is the same.")
    assert "<|im_start|>|" in text and "⏎" in text


def test_the_teachers_view(model, rows):
    student, teacher = shown(f"{rows}:3", model, rows).split("\n\n")
    assert "the student's view" in student and "the teacher's view" in teacher
    assert "|3|" not in student and "|3|" in teacher.replace(" 3", "3")
    marked = [
        [line for line in view.splitlines() if line.startswith("> ")] for view in (student, teacher)
    ]
    assert marked[0] == marked[1] and len(marked[0]) == 1


def test_tokenised_rows_without_a_tokenizer(tmp_path, model, rows):
    shutil.copy(f"{model}/config.json", tmp_path)
    text = shown("4", str(tmp_path), rows)
    assert [line for line in text.splitlines() if line.startswith((" ", ">"))] == [
        "  5|6",
        "> 7|8",
        "  9",
        "> 7|8",
    ]


@pytest.mark.parametrize(
    "wanted, message",
    [
        ("5", "--show_row 5: there are 5 rows, 0 to 4"),
        ("-1", "--show_row -1: there are 5 rows, 0 to 4"),
        ("rows.jsonl:9", "--show_row rows.jsonl:9: there are 5 rows, the last of them is /"),
        ("3", "rows.jsonl:4: response must be a string, got a list"),
    ],
)
def test_rows_that_are_not_there_or_bad(model, rows, wanted, message):
    with pytest.raises(DataError) as error:
        shown(wanted, model, rows)
    assert message in str(error.value)


def test_the_command_needs_no_process_group(model, rows, tmp_path, monkeypatch, capsys):
    """With the flags of a run on eight GPUs; nothing is written."""
    monkeypatch.chdir(tmp_path)
    flags = f"--model {model} --dataset {rows} --show_row 0 --tensor_model_parallel_size 8"
    config = parse_config(f"{flags} --expert_model_parallel_size 8".split())
    run_from_config(config)
    assert "are trained, in the lines marked >" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    run_from_config(config)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_prompt_alone(model, tmp_path):
    row = {"query": "first", "teacher_prompt": "first of all"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    lines = shown("0", model, str(tmp_path / "rows.jsonl")).splitlines()
    titles = [line for line in lines if "tokens" in line]
    assert all("a prompt alone, whose response a run writes; 0 are trained" in x for x in titles)
    assert len(titles) == 2 and not any(line.startswith("> ") for line in lines)
    assert lines[-1].endswith("<|im_start|>|assistant|\u23ce")
