"""Rows for demo/run_speech.sh: the student hears a few words of the toy language, the teacher reads
them.

`python -m demo.speech_data --output DIR` writes DIR/train.jsonl and DIR/heldout.jsonl, and the
sounds to DIR/audio (paths in the rows are relative to the file). Held-out prompts are ones that the
small model has never read, its audio tower has never heard, and the distillation does not train on.
`--sound voices` uses espeak-ng instead of tones.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from demo.tiny import toy_language
from demo.tiny.sounds import SAMPLE_RATE, SOUNDS, Speaker, make_speaker


def row(prompt: str, audio: str, source: str) -> dict[str, Any]:
    """One data row: `messages` is the student's view, the sound; `teacher_messages` is the
    teacher's, the transcript without the sound.
    """
    taught = toy_language.conversation(prompt)
    heard = [{"role": "user", "content": [{"type": "audio", "audio": audio}]}, *taught[1:]]
    return {"messages": heard, "teacher_messages": taught, "teacher_audios": [], "source": source}


def write_rows(
    path: Path,
    num_rows: int,
    held_out: bool,
    speak: Speaker,
    source: str,
    prompts: random.Random,
    seed: int,
) -> None:
    """Write `num_rows` rows of fresh prompts to `path`, one JSON object per line, and their wav
    files to the folder `audio` beside it.
    """
    sounds = np.random.default_rng([seed, held_out])
    (path.parent / "audio").mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            prompt = toy_language.sample_prompt(prompts, held_out, toy_language.MAX_SPOKEN_WORDS)
            audio = f"audio/{path.stem}_{number:04}.wav"
            samples = speak(prompt.split(), sounds).samples
            soundfile.write(path.parent / audio, samples, SAMPLE_RATE, subtype="PCM_16")
            file.write(json.dumps(row(prompt, audio, source), ensure_ascii=False) + "\n")


def main() -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sound", choices=list(SOUNDS), default="tones")
    parser.add_argument("--num_train", type=int, default=2400)
    parser.add_argument("--num_heldout", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    speak, prompts = make_speaker(arguments.sound), random.Random(arguments.seed)
    for name, num_rows, held_out in (
        ("train", arguments.num_train, False),
        ("heldout", arguments.num_heldout, True),
    ):
        path = arguments.output / f"{name}.jsonl"
        write_rows(path, num_rows, held_out, speak, arguments.sound, prompts, arguments.seed)


if __name__ == "__main__":
    main()
