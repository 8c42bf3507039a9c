"""Rows with sounds and pictures, and the same rows as inputs of transformers' thinker: its
tokenizer, feature extractor and image processor do that side's work, each medium by itself.
"""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import (
    _get_feat_extract_output_lengths,
)

SOUNDS = {
    "short.wav": 0.35,
    "chunk.wav": 1.0,
    "long.wav": 2.17,
    "clean.wav": 0.8,
}  # seconds; a chunk of the tower is one
PICTURES = {
    "small.png": (70, 60),
    "wide.png": (200, 64),
    "thumb.png": (48, 48),
    "full.png": (128, 160),
}


def write_media(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, seconds in SOUNDS.items():
        soundfile.write(folder / name, rng.normal(0, 0.1, int(seconds * 16_000)), 16_000)
    for name, (width, height) in PICTURES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / name
        )


def _turn(*parts) -> dict:
    """Names of files become parts that hold them, the rest is text."""

    def part(word):
        kind = "audio" if word in SOUNDS else "image" if word in PICTURES else "text"
        return {"type": kind, kind: word}

    return {"role": "user", "content": [part(word) for word in parts]}


def make_rows() -> list[dict]:
    """Eight rows: hears and reads the transcript, thumbnail and full picture, noisy and clean,
    mixed, and plain text.
    """

    def row(user, answer, teacher=None, **more):
        response = {"role": "assistant", "content": answer}
        own = (
            {}
            if teacher is None
            else {"teacher_messages": [teacher, {"role": "assistant", "content": ""}]}
        )
        return {"messages": [user, response]} | own | more

    look = _turn("thumb.png", "what is it?")
    return [
        row(_turn("long.wav", "who?"), "a cat", _turn("it says a cat. who?"), source="speech"),
        row(look, "the red house", source="pictures") | {"teacher_images": ["full.png"]},
        row(_turn("short.wav"), "yes", _turn("clean.wav"), source="speech"),
        row(
            _turn("see", "wide.png", "small.png", "hear", "chunk.wav", "short.wav", "?"),
            "both",
            source="mixed",
        ),
        row(_turn("hello"), "good day", _turn("hello, be polite"), source="text"),
        row(
            _turn("chunk.wav", "small.png"),
            "noise and colours",
            _turn("small.png", "it is noise"),
            source="mixed",
        ),
        row(_turn("and now?"), "nothing", _turn("full.png", "and now?"), source="pictures"),
        row(_turn("clean.wav", "and", "long.wav"), "two", _turn("long.wav"), source="speech"),
    ]


class Reference:
    """Rows -> what tests/reference_step.py takes: ids, and the arguments of the thinker for each
    view.
    """

    def __init__(self, model: str, folder: Path):
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.extractor = AutoFeatureExtractor.from_pretrained(model)
        self.images = AutoImageProcessor.from_pretrained(model)

    def row(self, row: dict) -> dict:
        user, answer = row["messages"]
        prompt, media = self._prompt(user)
        response = self.tokenizer(answer["content"] + "<|im_end|>")["input_ids"]
        ids = {
            "input_ids": prompt + response,
            "labels": [-100] * len(prompt) + response,
            "media": media,
        }
        teacher = row.get("teacher_messages", [user])[0]
        if "teacher_images" in row:
            held = iter(row["teacher_images"])
            parts = [
                part | {"image": next(held)} if part["type"] == "image" else part
                for part in user["content"]
            ]
            teacher = {"role": "user", "content": parts}
        teacher_prompt, teacher_media = self._prompt(teacher)
        kinds = {"input_features": "audio", "pixel_values": "image"}
        seen = [
            "+".join(kinds[name] for name in kinds if name in inputs) or "text"
            for inputs in (media, teacher_media)
        ]
        ids |= {"source": row["source"], "media_pair": " > ".join(seen)}
        return ids | {"teacher_input_ids": teacher_prompt, "teacher_media": teacher_media}

    def _prompt(self, user: dict) -> tuple[list[int], dict]:
        sounds = [self._sound(part["audio"]) for part in user["content"] if part["type"] == "audio"]
        pictures = [
            self._picture(part["image"]) for part in user["content"] if part["type"] == "image"
        ]
        text = self.tokenizer.apply_chat_template(
            [user], tokenize=False, add_generation_prompt=True
        )
        for pad, counts in (
            (
                "<|audio_pad|>",
                [int(_get_feat_extract_output_lengths(torch.tensor(s.shape[1]))) for s in sounds],
            ),
            ("<|image_pad|>", [int(grid.prod()) // 4 for _, grid in pictures]),
        ):
            first, *rest = text.split(pad)
            assert len(rest) == len(counts)
            text = first + "".join(pad * count + after for count, after in zip(counts, rest))
        inputs = {}
        if sounds:
            lengths = torch.tensor([sound.shape[1] for sound in sounds])
            padded = [
                torch.nn.functional.pad(sound, (0, int(lengths.max()) - sound.shape[1]))
                for sound in sounds
            ]
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
            inputs |= {
                "input_features": torch.stack(padded).double(),
                "feature_attention_mask": mask.long(),
            }
        if pictures:
            pixels, grids = zip(*pictures)
            inputs |= {
                "pixel_values": torch.cat(pixels).double(),
                "image_grid_thw": torch.stack(grids),
            }
        return self.tokenizer(text)["input_ids"], inputs

    def _sound(self, name: str) -> torch.Tensor:
        samples, rate = soundfile.read(self.folder / name, dtype="float32")
        return self.extractor(
            samples, sampling_rate=rate, padding=True, truncation=False, return_tensors="pt"
        )["input_features"][0]

    def _picture(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.images(images=[Image.open(self.folder / name)], return_tensors="pt")
        return inputs["pixel_values"], inputs["image_grid_thw"][0]


def write_rows(folder: Path, model: str) -> tuple[str, list[dict]]:
    """The rows' file, beside the media, and the reference's rows."""
    write_media(folder)
    rows, reference = make_rows(), Reference(model, folder)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), [reference.row(row) for row in rows]
