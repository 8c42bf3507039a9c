"""The end of demo/run.sh: held-out prompts before and after the distillation.

`python -m demo.report --model DIR --heldout FILE --run DIR --adapter DIR` puts the adapter on the
base model with `peft`, prints a table, draws RUN/curves.png from metrics.jsonl and eval.jsonl, and
exits 1 when the student has not learned, or when Megatron's own evaluation differs from the one
made here with `transformers`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from demo.measure import (
    curve,
    greedy_answers,
    load_adapter,
    mean_jsd,
    prompt_text,
    read_lines,
    response_ids,
    response_logits,
    share_exact,
)
from megatron_gkd.verify.reference import load_model


@dataclass
class HeldOut:
    """Held-out conversations: token ids of both prompts and of the response they share; texts."""

    student_prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    responses: list[list[int]]
    questions: list[str]
    answers: list[str]


@dataclass
class Score:
    """Means over all response tokens (`jsd` in nats, `top1`) and over prompts (`obeyed`), and the
    greedy answers.
    """

    jsd: float
    top1: float
    obeyed: float
    greedy: list[str]


def read_held_out(path: Path, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Render the rows of `path` with the folder's chat template."""
    rows = read_lines(path)
    views = {
        view: [tokenizer(prompt_text(row[view], tokenizer))["input_ids"] for row in rows]
        for view in ("messages", "teacher_messages")
    }
    answers = [row["messages"][-1]["content"] for row in rows]
    return HeldOut(
        student_prompts=views["messages"],
        teacher_prompts=views["teacher_messages"],
        responses=[response_ids(answer, tokenizer) for answer in answers],
        questions=[row["messages"][-2]["content"] for row in rows],
        answers=answers,
    )


def score(
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    teacher_logits: Tensor,
    temperature: float,
) -> Score:
    """Compare `student`, which sees no system prompt, with the teacher's logits [N, V] and with the
    right answers.
    """
    logits = response_logits(student, held_out.student_prompts, held_out.responses)
    greedy = greedy_answers(student, tokenizer, held_out.student_prompts)
    return Score(
        jsd=mean_jsd(logits, teacher_logits, temperature),
        top1=(logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean().item(),
        obeyed=share_exact(greedy, held_out.answers),
        greedy=greedy,
    )


def draw_curves(run: Path, picture: Path) -> None:
    """Divergence and agreement over the steps: training batches (dots), held-out rows (line)."""
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(
        axes, ("jsd", "top1_agreement"), ("JSD to the teacher (nats)", "top-1 agreement")
    ):
        for on_policy, label, color in (
            (False, "step on data rows", "tab:blue"),
            (True, "step on own text", "tab:orange"),
        ):
            lines = [line for line in metrics if bool(line["on_policy"]) is on_policy]
            if lines:
                steps, values = curve(lines, name)
                axis.scatter(steps, values, s=14, alpha=0.7, color=color, label=label)
        steps, values = curve(evaluations, name)
        axis.plot(steps, values, color="black", marker="o", markersize=4, label="held-out rows")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=120)


def print_table(before: Score, after: Score, held_out: HeldOut) -> None:
    """The table, and three conversations."""
    print(f"\n{len(held_out.answers)} held-out prompts, the student sees no system prompt:\n")
    print(f"{'':24}{'before':>12}{'after':>12}")
    lines: list[tuple[str, str, str]] = [
        ("JSD to the teacher", f"{before.jsd:.4f}", f"{after.jsd:.4f}"),
        ("top-1 agreement", f"{before.top1:.1%}", f"{after.top1:.1%}"),
        ("obeys the prompt", f"{before.obeyed:.1%}", f"{after.obeyed:.1%}"),
    ]
    for name, first, second in lines:
        print(f"{name:24}{first:>12}{second:>12}")
    print()
    for question, first, second in list(zip(held_out.questions, before.greedy, after.greedy))[:3]:
        print(f"  user: {question}\n    before: {first}\n    after:  {second}")


def check_evaluation(name: str, here: Score, line: dict[str, Any], tolerance: float) -> None:
    """Print Megatron's own JSD, from a line of eval.jsonl, beside the one measured here. Exits
    where they differ by more than `tolerance`.
    """
    print(
        f"JSD {name}: transformers + peft {here.jsd:.6f}, Megatron {line['jsd']:.6f} "
        f"(step {line['step']})"
    )
    difference = abs(here.jsd - line["jsd"])
    if difference > tolerance:
        sys.exit(
            f"demo_report: they differ by {difference:.2e}, more than --tolerance {tolerance:.0e}"
        )


def main() -> None:
    """Parse the command line, measure, print, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the base model's folder")
    add("--heldout", type=Path, required=True, help="jsonl rows with teacher_messages")
    add("--run", type=Path, required=True, help="the training's output folder")
    add("--adapter", type=Path, required=True, help="one of its checkpoint-STEP folders")
    add("--temperature", type=float, default=1.0, help="the run's distillation temperature")
    add("--tolerance", type=float, default=1e-4, help="allowed |JSD here - JSD in eval.jsonl|")
    add("--min_obeyed", type=float, default=0.8, help="least share of answers that obey the prompt")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = read_held_out(arguments.heldout, tokenizer)
    base = load_model(arguments.model)
    with torch.no_grad():
        teacher_logits = response_logits(base, held_out.teacher_prompts, held_out.responses)
        before = score(base, tokenizer, held_out, teacher_logits, arguments.temperature)
        student = load_adapter(base, arguments.adapter).eval()
        after = score(student, tokenizer, held_out, teacher_logits, arguments.temperature)
    print_table(before, after, held_out)

    picture = arguments.run / "curves.png"
    draw_curves(arguments.run, picture)
    print(f"\ncurves:  {picture}\nadapter: {arguments.adapter}")

    evaluations = read_lines(arguments.run / "eval.jsonl")
    check_evaluation("before", before, evaluations[0], arguments.tolerance)
    check_evaluation("after", after, evaluations[-1], arguments.tolerance)
    least = arguments.min_obeyed
    if after.obeyed < least:
        sys.exit(
            f"demo_report: only {after.obeyed:.0%} of the answers obey the prompt, "
            f"at least {least:.0%} expected"
        )


if __name__ == "__main__":
    main()
