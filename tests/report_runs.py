"""Folders as runs leave them, without a run: files whose numbers are functions of the step."""

import json
import math
from pathlib import Path

HOSTILE = "</script><script>window.hacked = 1</script><img src=https://example.com/x onerror=a()>"


def metrics_line(step: int, steps: int, **others) -> dict:
    """A line of metrics.jsonl; every third step is on-policy."""
    left, on_policy = math.exp(-3 * step / steps), step % 3 == 0
    return {
        "step": step,
        "epoch": step / steps,
        "loss": 0.5 * left,
        "jsd": 0.4 * left,
        "kl_forward": 2 * left,
        "kl_reverse": 3 * left,
        "top1_agreement": 1 - 0.7 * left,
        "num_tokens": 400,
        "grad_norm": 0.1,
        "learning_rate": 1e-5,
        "on_policy": on_policy,
        "response_length": 100 + step % 7,
        "truncated_responses": int(on_policy),
        "skipped_steps": 0,
        "tokens_per_second": 5000.0,
        "peak_memory_gib": 36.5,
        "step_time": 11.0 if on_policy else 4.0,
        "data_time": 0.25,
        "rollout_time": 7.0 if on_policy else 0.0,
        "teacher_time": 1.0,
        "student_time": 2.5,
        "optimizer_time": 0.25,
    } | others


def eval_line(step: int, steps: int) -> dict:
    """A line of eval.jsonl."""
    left = math.exp(-3 * step / steps)
    means = dict(jsd=0.45 * left, top1_agreement=1 - 0.6 * left, token_accuracy=0.5, num_tokens=90)
    return {
        "step": step,
        "loss": 0.45 * left,
        "kl_forward": 2.1 * left,
        "kl_reverse": 3.1 * left,
        **means,
        "by_source": {"alpaca.jsonl": means, "a<b>&c": means},
    }


def rollout_line(step: int, when: str, author: str, response: str, row: int = 3) -> dict:
    """A line of rollouts.jsonl."""
    return {
        "step": step,
        "when": when,
        "author": author,
        "row": row,
        "location": f"/data/train.jsonl:{row + 1}",
        "prompt": f"<|im_start|>user\nName {row} rivers.<|im_end|>",
        "response": response,
        "num_tokens": 5,
        "truncated": False,
        "data_response": "Rhine, Nile.",
    }


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_run(folder: Path, steps: int = 60, bad_steps: tuple[int, ...] = (), **settings) -> Path:
    """A complete run of `steps` steps, all logged; `settings` are those of its `train` group."""
    folder.mkdir(parents=True)
    losses = {step: {"loss": None} for step in bad_steps}
    write_lines(
        folder / "metrics.jsonl",
        [metrics_line(step, steps, **losses.get(step, {})) for step in range(1, steps + 1)],
    )
    evaluated = range(0, steps + 1, max(1, steps // 4))
    write_lines(folder / "eval.jsonl", [eval_line(step, steps) for step in evaluated])
    lines = []
    for step in evaluated:
        lines += [rollout_line(step, "train", "student", f"at step {step}")] if step else []
        lines.append(rollout_line(step, "eval", "student", f"{HOSTILE} {step // 30}"))
        lines.append(rollout_line(step, "eval", "teacher", "莱茵河"))
    write_lines(folder / "rollouts.jsonl", lines)
    train = {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
    } | settings
    description = {
        "started": "2026-11-27T10:30:00+01:00",
        "config": {
            "model": {"model": "/models/Qwen3-Omni-30B-A3B-Instruct"},
            "lora": {"lora_rank": 16, "lora_alpha": 32.0},
            "data": {"dataset": ["/data/train.jsonl"]},
            "distill": {"divergence": "jsd", "beta": 0.5, "temperature": 2.0, "lmbda": "0.5"},
            "train": train,
            "run": {"output_dir": str(folder)},
        },
        "versions": {"torch": "2.13.0"},
        "parameters": {"trainable": 150_994_944},
        "layout": {"world_size": 8, "tp": 8, "pp": 1, "dp": 1, "ep": 8, "cp": 1},
        "hardware": {"device": "NVIDIA H100 80GB HBM3"},
    }
    (folder / "run.json").write_text(json.dumps(description), encoding="utf-8")
    return folder
