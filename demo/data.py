"""Rows for demo/run.sh: the teacher reads a system prompt, the student does not, and the answers
obey it.

`python -m demo.data --output DIR` writes DIR/train.jsonl and DIR/heldout.jsonl. Held-out prompts
are ones that the small model has never seen while it learned the toy language, and that the
distillation does not train on.
"""

import argparse
import json
import random
from pathlib import Path

from demo.tiny import toy_language

RULE = "chinese_reverse"  # "Answer in Chinese, in reverse order.": words and order both change


def row(prompt: str) -> dict[str, list[dict[str, str]]]:
    """One data row: `messages` is the student's view, `teacher_messages` the same conversation with
    the system prompt in front.
    """
    taught = toy_language.conversation(prompt, RULE)
    return {"messages": taught[1:], "teacher_messages": taught}


def write_rows(path: Path, num_rows: int, held_out: bool, generator: random.Random) -> None:
    """Write `num_rows` rows of fresh prompts to `path`, one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            prompt = toy_language.sample_prompt(generator, held_out)
            file.write(json.dumps(row(prompt), ensure_ascii=False) + "\n")


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=2400)
    parser.add_argument("--num_heldout", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    generator = random.Random(arguments.seed)
    write_rows(arguments.output / "train.jsonl", arguments.num_train, False, generator)
    write_rows(arguments.output / "heldout.jsonl", arguments.num_heldout, True, generator)


if __name__ == "__main__":
    main()
