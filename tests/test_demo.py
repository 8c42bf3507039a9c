"""The demo: its parts that its own run does not judge (rows, the report's divergence, adapters that
load badly), and the whole of it in a few steps.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3OmniMoeThinkerForConditionalGeneration

from demo import data as demo_data
from demo import measure
from demo import report as demo_report
from demo.tiny import toy_language
from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_folder(
        str(tmp_path_factory.mktemp("demo") / "model"), TinyModelConfig(num_hidden_layers=1)
    )


def load_base(folder):
    return Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder)


def test_only_the_teacher_reads_the_system_prompt():
    row = demo_data.row("red cat moon")
    assert row["messages"] == [
        {"role": "user", "content": "red cat moon"},
        {"role": "assistant", "content": "月 猫 红"},
    ]
    assert row["teacher_messages"][0] == {
        "role": "system",
        "content": "Answer in Chinese, in reverse order.",
    }
    assert row["teacher_messages"][1:] == row["messages"]


def test_files_are_seeded_and_disjoint(tmp_path, monkeypatch):
    for name in ("a", "b"):
        arguments = [
            "demo_data",
            "--output",
            str(tmp_path / name),
            "--num_train",
            "40",
            "--num_heldout",
            "10",
        ]
        monkeypatch.setattr("sys.argv", arguments)
        demo_data.main()
    for name, num_rows, held_out in (("train.jsonl", 40, False), ("heldout.jsonl", 10, True)):
        text = (tmp_path / "a" / name).read_text(encoding="utf-8")
        assert text == (tmp_path / "b" / name).read_text(encoding="utf-8")
        prompts = [json.loads(line)["messages"][0]["content"] for line in text.splitlines()]
        assert len(prompts) == num_rows and {
            toy_language.is_held_out(prompt) for prompt in prompts
        } == {held_out}


def test_mean_jsd():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert measure.mean_jsd(logits, logits, 1.0) == pytest.approx(0.0, abs=1e-7)
    apart = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    assert measure.mean_jsd(*apart, 1.0) == pytest.approx(math.log(2))
    other = logits.flip(0)
    student, teacher = torch.softmax(logits.double() / 2, -1), torch.softmax(other.double() / 2, -1)
    mixture = (student + teacher) / 2
    expected = (
        0.5
        * (student * (student / mixture).log() + teacher * (teacher / mixture).log()).sum(-1).mean()
    )
    assert measure.mean_jsd(logits, other, 2.0) == pytest.approx(expected.item(), rel=1e-5)


def test_score_reads_both_views(folder, tmp_path):
    """Against the teacher's own logits the teacher's view scores perfectly; the student's view does
    not.
    """
    path = tmp_path / "heldout.jsonl"
    rows = [demo_data.row(prompt) for prompt in ("red cat moon", "sun fish tree wind snow")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer, base = AutoTokenizer.from_pretrained(folder), load_base(folder).eval()
    held_out = demo_report.read_held_out(path, tokenizer)
    assert [len(response) for response in held_out.responses] == [4, 6]
    with torch.no_grad():
        teacher_logits = measure.response_logits(base, held_out.teacher_prompts, held_out.responses)
        alone = base(
            input_ids=torch.tensor([held_out.teacher_prompts[1] + held_out.responses[1]])
        ).logits[0, -7:-1]
        torch.testing.assert_close(teacher_logits[4:], alone, atol=1e-4, rtol=0)
        student = demo_report.score(base, tokenizer, held_out, teacher_logits, 1.0)
        held_out.student_prompts = held_out.teacher_prompts
        teacher = demo_report.score(base, tokenizer, held_out, teacher_logits, 1.0)
    assert student.jsd > 1e-3 and student.obeyed == 0.0 and len(student.greedy) == 2
    assert teacher.jsd < 1e-6 and teacher.top1 == 1.0


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], exclude_modules=".*audio_tower.*", init_lora_weights=False
    )
    get_peft_model(load_base(folder), config).save_pretrained(path)
    return path


def test_a_good_adapter_moves_the_logits(folder, adapter):
    ids = torch.arange(20)[None]
    model = measure.load_adapter(load_base(folder), adapter)
    assert (
        model(input_ids=ids).logits - load_base(folder)(input_ids=ids).logits
    ).abs().max() > 1e-2


@pytest.mark.parametrize("damage", ["missing", "zero"])
def test_a_bad_adapter_is_an_error(folder, adapter, damage):
    path = adapter / "adapter_model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if ".lora_B." in name)
    if damage == "missing":
        save_file({key: weight for key, weight in whole.items() if key != name}, path)
    else:
        save_file({**whole, name: torch.zeros_like(whole[name])}, path)
    try:
        with pytest.raises(
            (UserWarning, SystemExit), match="missing adapter keys|are zero once loaded"
        ):
            measure.load_adapter(load_base(folder), adapter)
    finally:
        save_file(whole, path)


@pytest.mark.skipif(
    Path(sys.prefix).resolve() != (REPOSITORY / ".venv").resolve(),
    reason="the demo makes and takes .venv",
)
def test_the_whole_demo_in_a_few_steps(tmp_path):
    """Data, training on two ranks, the table of transformers and peft, the comparison of logits.
    The model has learned nothing, so that no answer obeys.
    """
    build_folder(str(tmp_path / "model"))
    environment = os.environ | {"DEMO": str(tmp_path), "MIN_OBEYED": "0"}
    command = ["bash", str(REPOSITORY / "demo" / "run.sh"), "--max_steps", "6"]
    with open(tmp_path / "log", "w") as log:
        status = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=550
        ).returncode
    said = (tmp_path / "log").read_text()
    assert status == 0, said
    before, after = (
        json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[at])["jsd"]
        for at in (0, -1)
    )
    assert after < before
    assert f"{'JSD to the teacher':24}{before:>12.4f}{after:>12.4f}" in said
    table, _, logits = said.partition(
        "Largest difference of a logit, Megatron (TP 2 PP 1 DP 1 EP 2)"
    )
    assert "JSD after: transformers + peft" in table and (tmp_path / "run" / "curves.png").is_file()
    assert "base + adapter, text" in logits and "MISMATCH" not in logits.upper()
    assert (
        said.splitlines()[-1].startswith("done in ")
        and f"adapter: {tmp_path / 'run' / 'checkpoint-6'}" in said
    )
