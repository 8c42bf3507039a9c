"""What `tests/same_bits.py` counts as a difference, and what not."""

import json

import torch

from tests.same_bits import differences, digest, report, run_answers, run_settings


def write_run(folder, *, losses=(0.5,), step_time=1.0, weight=b"w", **settings):
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    rows = [{"step": 1, "loss": loss, "step_time": step_time} for loss in losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text("")
    (folder / "latest_checkpoint").write_text(checkpoint.name)
    (folder / "run.json").write_text(json.dumps({"config": {"run": {"output_dir": str(folder)}}}))
    (checkpoint / "adapter_model.safetensors").write_bytes(weight)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"settings": settings}))
    return {"training": run_answers(folder), "settings: it": run_settings(folder)}


def test_times_folders_and_new_settings_do_not_count(tmp_path, capsys):
    before = write_run(tmp_path / "a", beta=0.5)
    after = write_run(tmp_path / "b", step_time=2.0, beta=0.5, new=1)
    assert report(before, after)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["training", "4", "values", "same"],
        ["settings:", "it", "1", "values", "same"],
    ]


def test_a_last_bit_a_weight_and_a_setting_count(tmp_path, capsys):
    before = write_run(tmp_path / "a", beta=0.5, gone=1)
    after = write_run(tmp_path / "b", losses=[0.5 + 2**-53], weight=b"v", beta=0.1)
    assert not report(before, after)
    text = capsys.readouterr().out
    assert text.count("DIFFERS") == 2 and "metrics.jsonl, line 1: loss: 0.5 before" in text
    assert "adapter_model.safetensors: " in text and "beta: 0.5 before, 0.1 after" in text
    assert "gone: 1 before, nothing after" in text


def test_a_line_and_a_file_too_many_count(tmp_path):
    before = write_run(tmp_path / "a")["training"]
    twice = write_run(tmp_path / "b", losses=[0.5, 0.5])["training"]
    assert [line.split(":")[0] for line in differences(before, twice, False)] == [
        "metrics.jsonl, line 2"
    ] * 2
    (tmp_path / "a" / "checkpoint-1" / "more").write_text("")
    assert len(differences(before, run_answers(tmp_path / "a"), False)) == 1


def test_a_digest_is_of_the_bits():
    one = torch.tensor([1.0])
    assert digest(one) == digest(one.clone()) != digest(torch.nextafter(one, one + 1))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(None) != digest()
