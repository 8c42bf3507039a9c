"""The speech demo: its rows, what its report measures, its refusals, and the whole of it in a few
steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from demo import speech_data as demo_speech_data
from demo import speech_report as demo_speech_report
from demo.measure import read_lines, response_logits
from demo.tiny import toy_language
from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.data.rows import check_row
from megatron_gkd.media.processor import MediaProcessor

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_folder(
        str(tmp_path_factory.mktemp("speech") / "model"), TinyModelConfig(num_hidden_layers=1)
    )


def write_data(path, monkeypatch, *flags):
    arguments = [
        "demo_speech_data",
        "--output",
        str(path),
        "--num_train",
        "20",
        "--num_heldout",
        "4",
        *flags,
    ]
    monkeypatch.setattr("sys.argv", arguments)
    demo_speech_data.main()
    return path


@pytest.fixture
def held_out(folder, tmp_path, monkeypatch):
    path = write_data(tmp_path / "data", monkeypatch) / "heldout.jsonl"
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    return demo_speech_report.read_held_out(path, AutoTokenizer.from_pretrained(folder), extractor)


def test_the_student_hears_and_the_teacher_reads():
    row = demo_speech_data.row("red cat moon", "audio/a.wav", "tones")
    assert row["messages"] == [
        {"role": "user", "content": [{"type": "audio", "audio": "audio/a.wav"}]},
        {"role": "assistant", "content": "red cat moon"},
    ]
    assert row["teacher_messages"][0] == {"role": "user", "content": "red cat moon"}
    checked = check_row(row, vocab_size=1024, folder="/data")
    assert [audio.path for audio in checked.media["audio"]] == ["/data/audio/a.wav"]
    assert checked.teacher_media is not None and not any(checked.teacher_media.values())
    assert checked.source == "tones"


def test_files_are_seeded_and_disjoint(tmp_path, monkeypatch):
    folders = [write_data(tmp_path / name, monkeypatch) for name in ("a", "b")]
    for name, num_rows, held_out in (("train.jsonl", 20, False), ("heldout.jsonl", 4, True)):
        text = (folders[0] / name).read_text(encoding="utf-8")
        assert text == (folders[1] / name).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        prompts = [row["teacher_messages"][0]["content"] for row in rows]
        assert len(prompts) == num_rows and {
            toy_language.is_held_out(prompt) for prompt in prompts
        } == {held_out}
        assert {len(prompt.split()) for prompt in prompts} == {3, 4}
        for row, prompt in zip(rows, prompts):
            sound = row["messages"][0]["content"][0]["audio"]
            info = soundfile.info(folders[0] / sound)
            assert (info.samplerate, info.channels) == (16000, 1) and info.duration > 0.2 * len(
                prompt.split()
            )
            assert (folders[0] / sound).read_bytes() == (folders[1] / sound).read_bytes()
    other = write_data(tmp_path / "c", monkeypatch, "--seed", "1")
    assert (other / "train.jsonl").read_text() != (folders[0] / "train.jsonl").read_text()


def test_the_report_hears_what_the_training_hears(folder, held_out, tmp_path):
    """Both make features and count tokens by themselves."""
    processor, rows = MediaProcessor(folder), read_lines(tmp_path / "data" / "heldout.jsonl")
    audio_token = AutoTokenizer.from_pretrained(folder).audio_token_id
    lengths = set()
    for row, prompt, sound in zip(rows, held_out.student_prompts, held_out.sounds):
        medium = processor.load(
            check_row(row, vocab_size=1024, folder=str(tmp_path / "data")).media["audio"][0]
        )
        torch.testing.assert_close(sound, medium.features, rtol=0, atol=0)
        assert prompt.count(audio_token) == medium.num_tokens
        lengths.add(medium.num_tokens)
    assert len(lengths) > 1
    assert not any(audio_token in prompt for prompt in held_out.teacher_prompts)


def test_another_sampling_rate_is_refused(folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", torch.zeros(8000).numpy(), 8000)
    with pytest.raises(ValueError, match="a.wav has 8000 samples a second, the model hears 16000"):
        demo_speech_report.log_mel(tmp_path / "a.wav", AutoFeatureExtractor.from_pretrained(folder))


def test_the_score_depends_on_the_sound(folder, held_out):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        teacher_logits = response_logits(base, held_out.teacher_prompts, held_out.responses)
        hearing = demo_speech_report.score(base, tokenizer, held_out, teacher_logits, 2.0)
        held_out.sounds = [sound.flip(0) for sound in held_out.sounds]
        elsewhere = demo_speech_report.score(base, tokenizer, held_out, teacher_logits, 2.0)
    assert abs(hearing.jsd - elsewhere.jsd) > 1e-6
    assert 1e-3 < hearing.jsd < hearing.jsd_at_1  # softened distributions are closer


def test_measures_count_tokens_and_whole_answers(held_out, monkeypatch):
    """A student that says the first row's answer right and is wrong in the last token of the
    others.
    """

    def certain(tokens):
        return torch.nn.functional.one_hot(torch.tensor(tokens), 1024).float() * 50

    teacher = torch.cat([certain(response) for response in held_out.responses])
    right, *others = held_out.responses
    logits = iter([certain(right), *(certain([*response[:-1], 0]) for response in others)])
    greedy = iter([held_out.answers[0], *(answer + " cat" for answer in held_out.answers[1:])])
    monkeypatch.setattr(
        demo_speech_report, "response_logits", lambda *arguments, **media: next(logits)
    )
    monkeypatch.setattr(
        demo_speech_report, "greedy_answers", lambda *arguments, **media: [next(greedy)]
    )
    measured = demo_speech_report.score(None, None, held_out, teacher, 1.0)
    num_tokens, num_wrong = len(teacher), len(others)
    assert measured.exact_match == 0.25
    assert measured.token_accuracy == pytest.approx(1 - num_wrong / num_tokens)
    assert measured.jsd == pytest.approx(
        num_wrong / num_tokens * torch.tensor(2.0).log().item(), rel=1e-4
    )


def test_disagreement_with_megatron_is_an_error(capsys):
    here = demo_speech_report.Score(
        jsd=0.25, jsd_at_1=0.3, token_accuracy=0.5, exact_match=0.5, greedy=[]
    )
    demo_speech_report.check_evaluation(
        "after gkd", here, {"jsd": 0.25004, "token_accuracy": 0.51}, 100, 1e-4
    )
    assert (
        "after gkd: JSD transformers + peft 0.250000, Megatron 0.250040" in capsys.readouterr().out
    )
    for line in ({"jsd": 0.2502, "token_accuracy": 0.5}, {"jsd": 0.25, "token_accuracy": 0.52}):
        with pytest.raises(SystemExit, match="differ by"):
            demo_speech_report.check_evaluation("after gkd", here, line, 100, 1e-4)


def test_the_last_adapter_is_the_one_of_the_highest_step(tmp_path):
    for step in (25, 100, 75):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert demo_speech_report.last_adapter(tmp_path).name == "checkpoint-100"


def run_demo(tmp_path, model, *flags, **variables):
    command = ["bash", str(REPOSITORY / "demo" / "run_speech.sh"), *flags]
    environment = (
        os.environ
        | {"DEMO": str(tmp_path / "demo"), "MODEL": str(model), "MIN_EXACT": "0"}
        | variables
    )
    with open(tmp_path / "log", "w") as log:  # a file, not a pipe: an orphan would keep a pipe open
        status = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=550
        ).returncode
    return status, (tmp_path / "log").read_text()


needs_own_venv = pytest.mark.skipif(
    Path(sys.prefix).resolve() != (REPOSITORY / ".venv").resolve(),
    reason="the demo makes and takes .venv",
)


@needs_own_venv
def test_a_model_that_never_heard_this_is_refused(folder, tmp_path):
    status, said = run_demo(tmp_path, folder)
    assert status == 1 and f"the audio tower of {folder} never heard tones: remove it" in said
    assert not (tmp_path / "demo").exists()


@needs_own_venv
@pytest.mark.extended
def test_the_whole_demo_in_a_few_steps(tmp_path):
    """Sounds, both trainings on two ranks, the table and the comparison with Megatron's own
    evaluations.
    """
    model = build_folder(
        str(tmp_path / "model"), TinyModelConfig(num_hidden_layers=1, tower_steps=1)
    )
    status, said = run_demo(tmp_path, model, "--max_steps", "4", NUM_TRAIN="64", NUM_HELDOUT="8")
    assert status == 0, said
    before, after = (
        read_lines(tmp_path / "demo" / "gkd" / "eval.jsonl")[at]["jsd"] for at in (0, -1)
    )
    tuned = read_lines(tmp_path / "demo" / "sft" / "eval.jsonl")[-1]["jsd"]
    assert after < before
    assert f"{'JSD at temperature 2':28}{before:>12.4f}{after:>12.4f}{tuned:>12.4f}" in said
    assert (
        "after sft: JSD transformers + peft" in said
        and (tmp_path / "demo" / "speech.png").stat().st_size > 10_000
    )
    assert said.splitlines()[-1].startswith("done in ")
