"""What demo/run.sh shows at its end: held-out prompts before and after, with `transformers` and
`peft` alone.

`python -m demo.report --model DIR --heldout FILE --run DIR --adapter DIR` puts the adapter on the
base model, reads the run's metrics.jsonl and eval.jsonl, prints the table, draws RUN/curves.png,
and exits 1 when the student did not learn or when Megatron's own evaluation disagrees with the one
made here.
"""

import argparse
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_gkd.verify.reference import load_model, load_peft

matplotlib.use("Agg")
from matplotlib import pyplot

MAX_NEW_TOKENS = 16


@dataclass
class HeldOut:
    """Held-out conversations as token ids: both views' prompts, the response they share, and its
    text.
    """

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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_held_out(path: Path, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Render the rows of `path` with the folder's chat template."""

    def prompt_ids(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(text)["input_ids"]

    rows = read_lines(path)
    answers = [row["messages"][-1]["content"] for row in rows]
    return HeldOut(
        student_prompts=[prompt_ids(row["messages"]) for row in rows],
        teacher_prompts=[prompt_ids(row["teacher_messages"]) for row in rows],
        responses=[tokenizer(answer + tokenizer.eos_token)["input_ids"] for answer in answers],
        questions=[row["messages"][-2]["content"] for row in rows],
        answers=answers,
    )


def response_logits(
    model: torch.nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    **media: torch.Tensor,
) -> torch.Tensor:
    """Logits [N, V] that predict each response token, all rows in one right-padded batch,
    row-major.

    `media`: what the model takes beside the ids, such as input_features.
    """
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        predicts[row, len(prompt) - 1 : end - 1] = True
    return model(input_ids=ids, attention_mask=mask, **media).logits[predicts].float()


def mean_jsd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> float:
    """Jensen-Shannon divergence of [N, V] logits at beta 0.5, mean over N, in nats."""
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits / temperature, dim=-1)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    divergences = 0.5 * (
        student.exp() * (student - mixture) + teacher.exp() * (teacher - mixture)
    ).sum(dim=-1)
    return divergences.mean().item()


def greedy_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    **media: torch.Tensor,
) -> list[str]:
    """Greedy continuations of left-padded prompts, as text without special tokens; `media` as in
    `response_logits`.
    """
    length = max(map(len, prompts))
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    )
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    output = model.generate(input_ids=ids, attention_mask=mask, **settings, **media)
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def score(
    student: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    teacher_logits: torch.Tensor,
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
        obeyed=sum(said == right for said, right in zip(greedy, held_out.answers)) / len(greedy),
        greedy=greedy,
    )


def load_adapter(base: torch.nn.Module, adapter: Path) -> PeftModel:
    """Put the adapter on `base`; an adapter tensor that peft does not find, or leaves at zero, is
    an error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=FutureWarning
        )  # transformers', about a name that peft reads
        warnings.filterwarnings(
            "ignore", message=".*did not match any targeted module"
        )  # peft's own fused-expert rank
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = load_peft(base, adapter)
    zeros = [
        name for name, weight in model.named_parameters() if ".lora_B." in name and not weight.any()
    ]
    if zeros:
        raise SystemExit(
            f"demo_report: {len(zeros)} LoRA weights of {adapter} are zero once loaded, first {zeros[0]}"
        )
    return model


def draw_curves(run: Path, picture: Path) -> None:
    """Divergence and agreement over the steps, training batches and held-out rows."""
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name, title in zip(
        axes, ("jsd", "top1_agreement"), ("JSD to the teacher (nats)", "top-1 agreement")
    ):
        for on_policy, label, color in (
            (False, "step on data rows", "tab:blue"),
            (True, "step on own text", "tab:orange"),
        ):
            points = [
                (line["step"], line[name])
                for line in metrics
                if bool(line["on_policy"]) is on_policy
            ]
            if points:
                axis.scatter(*zip(*points), s=14, alpha=0.7, color=color, label=label)
        points = [(line["step"], line[name]) for line in evaluations]
        axis.plot(*zip(*points), color="black", marker="o", markersize=4, label="held-out rows")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


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


def main() -> None:
    """Parse the command line, measure, print, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the base model's folder")
    parser.add_argument(
        "--heldout", type=Path, required=True, help="jsonl rows with messages and teacher_messages"
    )
    parser.add_argument("--run", type=Path, required=True, help="the training's output folder")
    parser.add_argument(
        "--adapter", type=Path, required=True, help="one of its checkpoint-STEP folders"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="the run's distillation temperature"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="allowed |JSD here - JSD in eval.jsonl|"
    )
    parser.add_argument(
        "--min_obeyed", type=float, default=0.8, help="least share of answers that obey the prompt"
    )
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
    for name, here, line in (("before", before, evaluations[0]), ("after", after, evaluations[-1])):
        difference = abs(here.jsd - line["jsd"])
        print(
            f"JSD {name}: transformers + peft {here.jsd:.6f}, Megatron {line['jsd']:.6f} (step {line['step']})"
        )
        if difference > arguments.tolerance:
            sys.exit(
                f"demo_report: they differ by {difference:.2e}, more than --tolerance {arguments.tolerance:.0e}"
            )
    least = arguments.min_obeyed
    if after.obeyed < least:
        sys.exit(
            f"demo_report: only {after.obeyed:.0%} of the answers obey the prompt, at least {least:.0%} expected"
        )


if __name__ == "__main__":
    main()
