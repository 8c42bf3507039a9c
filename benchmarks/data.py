"""Rows a second that are turned into tokens on one core; prints Markdown.

    python -m benchmarks.data [--rows 1000] [--rounds 5] [--output docs/benchmarks/data.md]

From a jsonl file to the mapped rows that a run reads, by the function that a run calls, with
`--dataset_num_proc 1` on one core. Texts are words of the demo's corpus at random; tokenizer and
template are the small model's. What a start costs once, the tokenizer above all, is not counted: it
is the time of a file of few rows. The best of the rounds, of the processor's time: other programs
on the machine only lengthen it.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

from benchmarks.report import commit, machine, table
from demo.tiny.tokenizer import CORPUS, train_tokenizer, write_tokenizer
from megatron_gkd.data import load_datasets
from megatron_gkd.data_settings import DataConfig

VOCAB_SIZE = 1024
FEW = 100
WORDS = [word for word in CORPUS.read_text(encoding="utf-8").split() if word.isascii()]


def text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


def prompted(generator: random.Random, question: int, hint: int, answer: int) -> dict[str, Any]:
    """`teacher_prompt`: the question and a hint."""
    asked = text(generator, question)
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": text(generator, answer)},
    ]
    return {"messages": turns, "teacher_prompt": f"{asked} {text(generator, hint)}"}


def in_turns(generator: random.Random, num_turns: int, words: int) -> dict[str, Any]:
    """`teacher_messages`: the same turns behind a system turn."""
    turns = [
        {"role": role, "content": text(generator, words)}
        for _ in range(num_turns)
        for role in ("user", "assistant")
    ]
    hint = {"role": "system", "content": text(generator, words)}
    return {"messages": turns, "teacher_messages": [hint, *turns]}


def alone(generator: random.Random, question: int, answer: int) -> dict[str, Any]:
    row = prompted(generator, question, 1, answer)
    return {"messages": row["messages"]}


CASES = {
    "a teacher's prompt, short": lambda g: prompted(g, 12, 12, 24),
    "a teacher's prompt": lambda g: prompted(g, 30, 30, 45),
    "a teacher's prompt, long": lambda g: prompted(g, 100, 100, 200),
    "three turns, a teacher's system turn": lambda g: in_turns(g, 3, 20),
    "no teacher's view": lambda g: alone(g, 30, 45),
}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def prepare(path: Path, folder: str) -> tuple[float, int]:
    """(seconds of the processor, tokens of all views)."""
    start = time.process_time()
    data, _ = load_datasets(
        DataConfig(dataset=[str(path)], max_length=4096, prepared_rows="none"),
        folder,
        VOCAB_SIZE,
        0,
    )
    seconds = time.process_time() - start
    return seconds, int(data.lengths.views.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    rows = []
    with tempfile.TemporaryDirectory() as root:
        write_tokenizer(train_tokenizer(VOCAB_SIZE), root)
        for name, make in CASES.items():
            generator, files = random.Random(0), {}
            for number in (FEW, FEW + arguments.rows):
                files[number] = Path(root, f"{number}.jsonl")
                write_rows(files[number], (make(generator) for _ in range(number)))
            bytes_a_row = files[FEW].stat().st_size // FEW
            prepare(files[FEW], root)
            taken, tokens = [], 0
            for _ in range(arguments.rounds):
                few = prepare(files[FEW], root)[0]
                many, tokens = prepare(files[FEW + arguments.rows], root)
                taken.append((many - few) / arguments.rows)
            seconds = min(taken)
            rows.append(
                [
                    name,
                    str(bytes_a_row),
                    f"{tokens / (FEW + arguments.rows):.0f}",
                    f"{seconds * 1e3:.3f}",
                    f"{1 / seconds:.0f}",
                ]
            )
            print(f"{name}: {1 / seconds:.0f} rows/s", file=sys.stderr, flush=True)
    header = ["rows with", "bytes a row", "tokens of the longer view", "ms a row", "rows/s"]
    page = (
        "# Rows turned into tokens on one core\n\n"
        f"{machine('cpu')}, one core; commit {commit()}; `python -m benchmarks.data`, which says "
        f"how.\n\n{table(header, rows)}"
    )
    if arguments.output:
        arguments.output.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
