"""The end of demo/run_speech.sh: how well held-out sound is heard, before and after.

`python -m demo.speech_report --model DIR --heldout FILE --gkd RUN --sft RUN --picture FILE`
measures the base model and the last adapter of both runs with `transformers` and `peft`, prints a
table, draws the picture, and exits 1 when the distilled student does not hear, or when Megatron's
own evaluations differ from what is measured here.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    FeatureExtractionMixin,
    PreTrainedTokenizerBase,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    _get_feat_extract_output_lengths,
)

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

RUNS = {"gkd": "GKD, transcript teacher", "sft": "SFT on the answers"}
SECONDS_PER_FRAME = 0.01
COLORS = {"gkd": "tab:blue", "sft": "tab:orange"}


@dataclass
class HeldOut:
    """Held-out rows: both views' prompts as token ids, the response they share, its text, and the
    sound that the student hears, log-mel [num_mel_bins, frames].
    """

    student_prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    responses: list[list[int]]
    answers: list[str]
    sounds: list[Tensor]


@dataclass
class Score:
    """Means over all response tokens (`jsd` in nats at the runs' temperature and at 1,
    `token_accuracy`) and over rows (`exact_match` of the greedy answers).
    """

    jsd: float
    jsd_at_1: float
    token_accuracy: float
    exact_match: float
    greedy: list[str]


def log_mel(path: Path, extractor: FeatureExtractionMixin) -> Tensor:
    """The audio tower's input for a sound file, log-mel [num_mel_bins, frames]. Raises ValueError
    for a sampling rate that is not the model's.
    """
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != extractor.sampling_rate:
        raise ValueError(
            f"{path} has {rate} samples a second, the model hears {extractor.sampling_rate}"
        )
    inputs = extractor(samples, sampling_rate=rate, padding=True, return_tensors="pt")
    return inputs["input_features"][0][:, : len(samples) // extractor.hop_length]


def read_held_out(
    path: Path, tokenizer: PreTrainedTokenizerBase, extractor: FeatureExtractionMixin
) -> HeldOut:
    """Render the rows of `path` with the folder's chat template, with one placeholder token for
    each of the tower's outputs.
    """
    rows = read_lines(path)
    sounds = [
        log_mel(path.parent / row["messages"][-2]["content"][0]["audio"], extractor) for row in rows
    ]
    num_tokens = [
        int(_get_feat_extract_output_lengths(torch.tensor(sound.shape[1]))) for sound in sounds
    ]

    def prompt_ids(messages: list[dict[str, Any]], num_audio_tokens: int) -> list[int]:
        placeholder = tokenizer.audio_token
        text = prompt_text(messages, tokenizer).replace(placeholder, placeholder * num_audio_tokens)
        return tokenizer(text)["input_ids"]

    answers = [row["messages"][-1]["content"] for row in rows]
    return HeldOut(
        student_prompts=[
            prompt_ids(row["messages"], count) for row, count in zip(rows, num_tokens)
        ],
        teacher_prompts=[prompt_ids(row["teacher_messages"], 0) for row in rows],
        responses=[response_ids(answer, tokenizer) for answer in answers],
        answers=answers,
        sounds=sounds,
    )


def score(
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    teacher_logits: Tensor,
    temperature: float,
) -> Score:
    """Compare `student`, who hears, with the reading teacher's logits [N, V] and with the right
    answers.

    Row by row: in a batch transformers pads a sound shorter than a second, and the padding changes
    the output of the convolutions.
    """
    logits_of_rows, greedy = [], []
    for prompt, response, sound in zip(
        held_out.student_prompts, held_out.responses, held_out.sounds
    ):
        mask = torch.ones(1, sound.shape[1], dtype=torch.long)
        media = {"input_features": sound[None], "feature_attention_mask": mask}
        logits_of_rows.append(response_logits(student, [prompt], [response], **media))
        greedy += greedy_answers(student, tokenizer, [prompt], **media)
    logits = torch.cat(logits_of_rows)
    labels = torch.tensor([token for response in held_out.responses for token in response])
    return Score(
        jsd=mean_jsd(logits, teacher_logits, temperature),
        jsd_at_1=mean_jsd(logits, teacher_logits, 1.0),
        token_accuracy=(logits.argmax(-1) == labels).float().mean().item(),
        exact_match=share_exact(greedy, held_out.answers),
        greedy=greedy,
    )


def last_adapter(run: Path) -> Path:
    """The checkpoint folder of the highest step."""
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def draw(held_out: HeldOut, scores: dict[str, Score], runs: dict[str, Path], picture: Path) -> None:
    """The first held-out sound with its answers, and both runs' curves."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    heard, *axes = figure.subplot_mosaic([["sound", "sound"], ["jsd", "token_accuracy"]]).values()
    num_mel_bins, num_frames = held_out.sounds[0].shape
    extent = (0, num_frames * SECONDS_PER_FRAME, 0, num_mel_bins)
    heard.imshow(held_out.sounds[0], origin="lower", aspect="auto", cmap="magma", extent=extent)
    answers = [f"{name}: “{score.greedy[0]}”" for name, score in scores.items()]
    heard.set_title(f"said: “{held_out.answers[0]}”\n" + "    ".join(answers), fontsize=10)
    heard.set(xlabel="seconds", ylabel="mel band")
    titles = {"jsd": "JSD to the reading teacher (nats)", "token_accuracy": "token accuracy"}
    for axis, (name, title) in zip(axes, titles.items()):
        for run, folder in runs.items():
            metrics = read_lines(folder / "metrics.jsonl")
            evaluations = read_lines(folder / "eval.jsonl")
            steps, values = curve([line for line in metrics if not line["on_policy"]], name)
            axis.scatter(steps, values, s=6, alpha=0.3, color=COLORS[run])
            steps, values = curve(evaluations, name)
            axis.plot(steps, values, marker="o", markersize=4, color=COLORS[run], label=RUNS[run])
        axis.set(
            title=title, xlabel="step (lines: held-out sounds, dots: batches of training rows)"
        )
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(picture, dpi=90)


def print_table(scores: dict[str, Score], held_out: HeldOut, temperature: float) -> None:
    """The table, and three sounds with their answers."""
    num_tokens = sum(map(len, held_out.responses))
    print(f"\n{len(held_out.answers)} held-out sounds, {num_tokens} response tokens:\n")
    print(f"{'':28}" + "".join(f"{name:>12}" for name in scores))
    for name, key, form in (
        ("exact match", "exact_match", ".1%"),
        ("token accuracy", "token_accuracy", ".1%"),
        (f"JSD at temperature {temperature:g}", "jsd", ".4f"),
        ("JSD at temperature 1", "jsd_at_1", ".4f"),
    ):
        print(
            f"{name:28}" + "".join(f"{getattr(score, key):>12{form}}" for score in scores.values())
        )
    for row, answer in enumerate(held_out.answers[:3]):
        print(f"\n  said:  {answer}")
        for name, score in scores.items():
            print(f"    {name + ':':8}{score.greedy[row]}")


def check_evaluation(
    name: str, here: Score, line: dict[str, Any], num_tokens: int, tolerance: float
) -> None:
    """Print Megatron's own measures, a line of eval.jsonl, beside those made here. Exits where they
    differ: the divergence by more than `tolerance`, or the accuracy by more than one token (a tie).
    """
    print(
        f"{name}: JSD transformers + peft {here.jsd:.6f}, Megatron {line['jsd']:.6f}; "
        f"token accuracy {here.token_accuracy:.4f}, {line['token_accuracy']:.4f}"
    )
    apart = abs(here.jsd - line["jsd"])
    if apart > tolerance:
        sys.exit(
            f"demo_speech_report: {name}: the JSDs differ by {apart:.2e}, "
            f"more than --tolerance {tolerance:.0e}"
        )
    if abs(here.token_accuracy - line["token_accuracy"]) * num_tokens > 1.5:
        sys.exit(
            f"demo_speech_report: {name}: the token accuracies differ by more than one token "
            f"of {num_tokens}"
        )


def main() -> None:
    """Parse the command line, measure, print, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the base model's folder")
    add("--heldout", type=Path, required=True, help="rows of demo.speech_data")
    add("--gkd", type=Path, required=True, help="output folder of the distillation")
    add("--sft", type=Path, required=True, help="output folder of the plain fine-tuning")
    add("--picture", type=Path, required=True, help="png to write")
    add("--temperature", type=float, default=2.0, help="the runs' distillation temperature")
    add("--tolerance", type=float, default=1e-4, help="allowed |JSD here - JSD in eval.jsonl|")
    add("--min_exact", type=float, default=0.8, help="least share of sounds heard exactly")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out = read_held_out(
        arguments.heldout, tokenizer, AutoFeatureExtractor.from_pretrained(arguments.model)
    )
    runs = {"gkd": arguments.gkd, "sft": arguments.sft}

    with torch.no_grad():
        base = load_model(arguments.model)
        teacher_logits = response_logits(base, held_out.teacher_prompts, held_out.responses)
        scores = {"before": score(base, tokenizer, held_out, teacher_logits, arguments.temperature)}
        for name, run in runs.items():
            student = load_adapter(load_model(arguments.model), last_adapter(run)).eval()
            scores[name] = score(
                student, tokenizer, held_out, teacher_logits, arguments.temperature
            )
    print_table(scores, held_out, arguments.temperature)
    draw(held_out, scores, runs, arguments.picture)
    print(f"\npicture: {arguments.picture}")

    num_tokens = len(teacher_logits)
    for name, run in runs.items():
        evaluations = read_lines(run / "eval.jsonl")
        check_evaluation(
            f"before {name}", scores["before"], evaluations[0], num_tokens, arguments.tolerance
        )
        check_evaluation(
            f"after {name}", scores[name], evaluations[-1], num_tokens, arguments.tolerance
        )
    heard, least = scores["gkd"].exact_match, arguments.min_exact
    if heard < least:
        sys.exit(
            f"demo_speech_report: only {heard:.0%} of the sounds are heard exactly, "
            f"at least {least:.0%} expected"
        )


if __name__ == "__main__":
    main()
