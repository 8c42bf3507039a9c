"""`tests/same_bits.py` sees a difference and only a difference."""

import json

import torch

from tests.same_bits import differences, digest, report, run_answers


def write_run(folder, loss, step_time, weight, state):
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    row = {"step": 1, "loss": loss, "step_time": step_time, "tokens_per_second": 1 / step_time}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "eval.jsonl").write_text("")
    (checkpoint / "adapter_model.safetensors").write_bytes(weight)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return {"training": run_answers(folder)}


def test_times_and_new_settings_do_not_count(tmp_path, capsys):
    before = write_run(tmp_path / "a", 0.5, 1.0, b"w", {"settings": {"beta": 0.5}})
    after = write_run(tmp_path / "b", 0.5, 2.0, b"w", {"settings": {"beta": 0.5, "new": 1}})
    assert report(before, after)
    assert capsys.readouterr().out.split() == ["training", "4", "values", "same"]


def test_a_last_bit_a_weight_and_a_setting_count(tmp_path, capsys):
    before = write_run(tmp_path / "a", 0.5, 1.0, b"w", {"settings": {"beta": 0.5, "gone": 1}})
    after = write_run(tmp_path / "b", 0.5 + 2**-53, 1.0, b"v", {"settings": {"beta": 0.1}})
    assert not report(before, after)
    text = capsys.readouterr().out
    assert "DIFFERS" in text and "metrics.jsonl step 1 loss: 0.5 before" in text
    assert len(differences(before["training"], after["training"])) == 4
    assert "gone: 1 before, nothing after" in text


def test_a_digest_is_of_the_bits():
    one = torch.tensor([1.0])
    assert digest(one) == digest(one.clone()) != digest(torch.nextafter(one, one + 1))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(None) != digest()
