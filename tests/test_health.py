"""Training that has stopped to learn: said once, counted, summed up."""

import json

from megatron_gkd.health import ZERO_GRADIENTS, summary
from megatron_gkd.optimizer import Update
from megatron_gkd.run import Progress
from tests.train_runs import SMALL, arguments, make_rows, read_lines, run_training, write_rows


def test_an_update_that_was_too_large(tiny_folder, tmp_path):
    """A learning rate of 1e6 ends in a gradient of exactly 0; a run that goes on in it counts on
    and does not warn again.
    """
    flags = dict(
        model=tiny_folder(**SMALL),
        dataset=write_rows(tmp_path / "rows.jsonl", make_rows(8)),
        learning_rate=1e6,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        max_grad_norm=1e9,
        save_steps=20,
        output_dir=tmp_path / "out",
    )
    said = run_training(1, arguments(**flags, max_steps=20))
    norms = [line["grad_norm"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")]
    assert norms[0] > 0 and norms.count(0) >= ZERO_GRADIENTS, norms
    counted = read_lines(tmp_path / "out" / "metrics.jsonl")[-1]["zero_gradient_steps"]
    assert counted == norms.count(0)
    assert said.count("the gradient was exactly 0 in the") == 1
    assert f"Of 20 steps {counted} had a gradient of exactly 0" in said
    state = json.loads((tmp_path / "out" / "checkpoint-20" / "trainer_state.json").read_text())
    assert state["zero_gradient_steps"] == counted and state["has_learned"] is True
    again = run_training(1, arguments(**flags, max_steps=22, resume_from_checkpoint="latest"))
    assert "the gradient was exactly 0" not in again
    assert f"Of 22 steps {counted + 2} had a gradient of exactly 0" in again


def test_a_run_without_a_signal_is_none_of_it():
    """Its gradient was 0 from the first step on; a good step ends a row of zeros."""
    progress = Progress()
    for grad_norm in (0.0, 0.0, 0.5, 0.0, 0.0, 0.1, 0.0):
        progress.count(Update(applied=True, grad_norm=grad_norm), on_policy=False)
    assert (progress.zero_gradient_steps, progress.zero_gradients_in_a_row) == (3, 1)


def test_summary():
    progress = Progress(step=9, skipped_steps=2)
    assert summary(Progress(step=9), 4) == ""
    assert summary(progress, 4).endswith(
        "9 steps 2 were skipped (NaN, Inf, a float16 overflow, or no token with a loss; 8 rows)"
    )
