r"""A training step over rows of ragged lengths: padded, padding-free, padding-free with a budget.

    python -m benchmarks.ragged [--lengths alpaca,speech] [--rows 32] [--budget 2048] [--rounds 3]
                                [--device auto] [--layers 2] [--hidden 128] ... [--output FILE]

The same rows each time, random ids, in a decoder with random weights (benchmarks/real_decoder.py),
without a rollout:

- padded: micro-batches of four rows in shuffled order, each padded to its longest row, as before.
  The places behind a row go through products, experts and attention like text.
- padding-free: the same micro-batches, rows one behind the other.
- with a budget: the rows cut into micro-batches of at most --budget tokens and about equal cost, as
  `--max_tokens_per_micro_batch` does it.

alpaca: answers log-normal with median 40 tokens, from 5 to 500, after prompts of about 40 tokens;
the teacher's prompt shows the answer too. speech: clips of 2 to 60 s, log-normal with median 8 s,
13 tokens a second, the answer a transcript of 3.5 tokens a second; the teacher reads a transcript
too. A first round warms up, then the three take turns; medians. Peak memory is what a step takes
above what stood before it. The losses must agree, or the exit status is 1.
"""

import argparse
import functools
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch

from benchmarks.meter import Meter
from benchmarks.real_decoder import SIZE_FLAGS, Shape, add_sizes, random_decoder, shape_of
from benchmarks.report import MIB, commit, machine, ratio, table
from benchmarks.training_step import StepResult, Training
from megatron_gkd.data import Batch, Packing, Sample, View, collate
from megatron_gkd.data.batch import BatchView, pack_views
from megatron_gkd.data.micro_batches import Budget, attention_tokens, cut
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.metrics import StepCounts
from megatron_gkd.parallel import destroy, resolve_device

SMALL = Shape(2, 32, 4, 128, 64, 8, 4, 32, 2048)
FLAGS = list(zip(fields(Shape), SIZE_FLAGS.split()))
ROWS_PADDED = 4  # of a padded micro-batch
AGREE = 1e-4  # relative difference of the ways' mean losses in float32


def alpaca(draw: random.Random) -> tuple[int, int, int]:
    """Tokens of (student's prompt, teacher's prompt, response)."""
    response = min(max(round(40 * draw.lognormvariate(0, 0.9)), 5), 500)
    prompt = round(40 * draw.lognormvariate(0, 0.4))
    return prompt, prompt + 15 + response, response


def speech(draw: random.Random) -> tuple[int, int, int]:
    """Tokens of (student's prompt, teacher's prompt, response)."""
    seconds = min(max(8 * draw.lognormvariate(0, 0.8), 2), 60)
    sound, words = round(13 * seconds), round(3.5 * seconds)
    return 25 + sound, 30 + sound + words, words


LENGTHS: dict[str, Callable[[random.Random], tuple[int, int, int]]] = {
    "alpaca": alpaca,
    "speech": speech,
}


def make_rows(kind: str, number: int, vocab_size: int) -> list[Sample]:
    """Seeded."""
    draw, samples = random.Random(0), []

    def ids(size: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(size)]

    for row in range(number):
        student, teacher, response = LENGTHS[kind](draw)
        answer = ids(max(response, 1))
        first, second = (
            View(prompt + answer, [IGNORED_LABEL] * len(prompt) + answer, len(prompt))
            for prompt in (ids(max(student, 1)), ids(max(teacher, 1)))
        )
        samples.append(Sample(first, second, "", row, 0))
    return samples


def padded(samples: list[Sample]) -> Batch:
    """Every row as long as the longest of its view."""

    def as_long(views: list[View]) -> BatchView:
        longest = max(len(view.input_ids) for view in views)
        return pack_views(views, Packing(0, row_multiple=longest))

    student, teacher = as_long([s.student for s in samples]), as_long([s.teacher for s in samples])
    return Batch(student, teacher, list(samples), list(range(len(samples))))


def ways_of(rows: list[Sample], budget: Budget) -> dict[str, list[Batch]]:
    """The micro-batches of a step, by way."""
    fours = [rows[first : first + ROWS_PADDED] for first in range(0, len(rows), ROWS_PADDED)]
    (bins,) = cut([row.num_tokens for row in rows], budget)
    return {
        "padded": [padded(four) for four in fours],
        "padding-free": [collate(four, Packing(0)) for four in fours],
        "with a budget": [collate([rows[row] for row in one], Packing(0)) for one in bins],
    }


def _step(training: Training, batches: list[Batch], found: list[StepResult]) -> None:
    """The update moves nothing, so that every step has the same loss."""
    found.append(training.step(batches, 0, learning_rate=0.0))


def measure(arguments: argparse.Namespace) -> tuple[str, bool]:
    """The table, and whether the losses agree."""
    shape = shape_of(arguments)
    dtype = getattr(torch, arguments.dtype)
    parallel, model_args, model = random_decoder(
        shape, device=arguments.device, dtype=dtype, lora_dropout=0.0, recompute=arguments.recompute
    )
    training = Training(parallel, model_args, model)
    meter = Meter(parallel.device.type)
    budget, lines, agree = Budget(arguments.budget, attention_tokens(model_args)), [], True
    for kind in arguments.lengths.split(","):
        rows = make_rows(kind, arguments.rows, shape.vocab_size)
        ways = {
            name: [batch.to(parallel.device) for batch in batches]
            for name, batches in ways_of(rows, budget).items()
        }
        counts = {name: StepCounts.of(of, 0, False, 0, parallel) for name, of in ways.items()}
        found: dict[str, list[StepResult]] = {name: [] for name in ways}
        peaks: dict[str, list[int]] = {name: [] for name in ways}
        for round_number in range(arguments.rounds + 1):
            for name, batches in ways.items():
                one = functools.partial(_step, training, batches, found[name])
                peaks[name].append(meter(one)[1])
            print(f"{kind}: round {round_number} of {arguments.rounds}", flush=True)
        seconds = {
            name: statistics.median(result.step_seconds for result in of[1:])
            for name, of in found.items()
        }
        losses = [of[-1].jsd for of in found.values()]
        if dtype == torch.float32 and max(losses) - min(losses) > AGREE * min(losses):
            print(f"the ways' losses differ: {losses}", file=sys.stderr)
            agree = False
        for name, of in found.items():
            lines.append(
                [
                    kind,
                    name,
                    str(len(ways[name])),
                    f"{100 * counts[name].padding:.0f} %",
                    f"{counts[name].num_tokens / seconds[name]:.0f}",
                    ratio(seconds["padded"], seconds[name], 2),
                    f"{statistics.median(peaks[name][1:]) / MIB:.0f}",
                    f"{of[-1].jsd:.6f}",
                ]
            )
    destroy()
    header = ["lengths", "way", "micro-batches", "padding", "tokens/s", "times padded", "peak MiB"]
    return table([*header, "JSD"], lines), agree


def main(argv: Sequence[str]) -> None:
    """Exit status 1 where the ways' losses differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_sizes(add, SMALL)
    add("--lengths", default="alpaca,speech", help="alpaca, speech, or both")
    add("--rows", type=int, default=32, help="of a step")
    add("--budget", type=int, default=2048, help="tokens of a micro-batch, of the heavier views")
    add("--rounds", type=int, default=3)
    add("--recompute", action="store_true")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--output", metavar="FILE", help="a page for the table")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device).type
    text, agree = measure(arguments)
    where = f"{machine(device)}; torch {torch.__version__}; {arguments.dtype}; commit {commit()}"
    sizes = ", ".join(f"{flag} {getattr(arguments, f.name)}" for f, flag in FLAGS)
    sizes += f"; rows {arguments.rows}, budget {arguments.budget}, rounds {arguments.rounds}"
    how = "`python -m benchmarks.ragged`, which says how"
    page = f"{where}; {how}.\n{sizes[0].upper()}{sizes[1:]}.\n\n{text}"
    print(f"\n{page}", end="", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(f"# A step over ragged rows\n\n{page}")
    if not agree:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
