"""Media that are refused, each with its line and file: what cannot be read, what does not fit its
placeholder or --max_length.
"""

import contextlib
import io
import os
from functools import partial

import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_gkd.data import DataError
from megatron_gkd.data.loader import PADDING, step_loader
from megatron_gkd.data.micro_batches import Budget
from megatron_gkd.data.order import batch_indices
from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from tests.test_media_processor import ANSWER, build_model, load, row, write_media


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("files"))


def wav(samples, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def bad_media(folder, media):
    """name -> (a row, its reason)."""
    whole = (media / "wide.png").read_bytes()
    files = {
        "empty.wav": b"",
        "text.wav": b"hello",
        "silent.wav": wav([]),
        "short.wav": wav([0.1] * 200),
    }
    files |= {"text.png": b"hello", "torn.png": whole[: len(whole) // 2], "nan.wav": b""}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan] * 1000), 16_000, subtype="FLOAT")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (2000, 4)).save(folder / "line.png")

    def hears(name, **more):
        return {
            "messages": [{"role": "user", "content": "<audio>?"}, ANSWER],
            "audios": [str(folder / name)],
        } | more

    def sees(name):
        return {
            "messages": [{"role": "user", "content": "<image>?"}, ANSWER],
            "images": [str(folder / name)],
        }

    def says(content, answer="a cat", **columns):
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"messages": turns} | columns

    told = [{"role": "user", "content": "a cat"}, ANSWER]
    wide = [str(media / "wide.png")]
    return [
        (
            says([{"type": "image"}, {"type": "text", "text": "?"}]),
            "the row has 1 image placeholder for 0 images; they are given in the parts, or in",
        ),
        (
            says("<|audio_start|><|audio_pad|><|audio_end|>?"),
            "the row has 1 audio placeholder for 0 audios",
        ),
        (
            says("?", teacher_messages=says([{"type": "video"}])["messages"]),
            "the teacher's view has 1 video placeholder for 0 videos; teacher_images",
        ),
        (
            says("see <|image_pad|>", images=wide),
            "is a placeholder of image without its start token",
        ),
        (says("?", "<|image_pad|>"), "the response holds token "),
        (
            {
                "messages": [
                    *says("?", "<|vision_start|><|image_pad|><|vision_end|>")["messages"],
                    *says("and?")["messages"],
                ],
                "images": wide,
            },
            "the response holds token ",
        ),
        (says("<image>?", "it is <|image_pad|>", images=wide), "the response holds token "),
        (hears("none.wav"), "none.wav: there is no such file"),
        (hears("empty.wav"), "empty.wav: the file is empty"),
        (hears("text.wav"), "text.wav: cannot be read"),
        (
            hears("silent.wav"),
            "silent.wav: too short, 0 samples at 16000 Hz where the first frame takes 201",
        ),
        (hears("short.wav"), "short.wav: too short, 200 samples"),
        (sees("none.png"), "none.png: there is no such file"),
        (sees("text.png"), "text.png: cannot be read"),
        (sees("pixel.png"), "pixel.png: 1 x 1 pixels, an image needs at least 2 x 2"),
        (sees("line.png"), "line.png: cannot be read (absolute aspect ratio"),
        (
            hears("short.wav", messages=[{"role": "user", "content": "?"}, ANSWER]),
            "the row has 0 audio placeholders for 1 audio; <audio> in a text is the place of one",
        ),
        (
            hears(
                media / "mono.flac",
                messages=[{"role": "user", "content": "<audio><audio>"}, ANSWER],
            ),
            "the row has 2 audio placeholders for 1 audio",
        ),
        (
            hears(media / "mono.flac", teacher_messages=told),
            "the teacher's view has 0 audio placeholders for 1 audio; "
            "teacher_images, teacher_audios",
        ),
    ]


def test_bad_media_are_listed_with_their_lines(model, media, tmp_path):
    cases = bad_media(tmp_path, media)
    with pytest.raises(DataError) as error:
        load(model, tmp_path, *(row for row, _ in cases))
    message = str(error.value)
    for line, (_, reason) in enumerate(cases, start=1):
        assert (
            f"rows.jsonl:{line}: " in message
            and reason in message.split(f"rows.jsonl:{line}: ")[1].splitlines()[0]
        ), reason
    assert len(load(model, media, row(), cases[0][0], skip_bad_rows=True)) == 1


def test_what_is_no_file_is_refused_at_once(model, tmp_path):
    """A pipe would be waited for; a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    processor = MediaProcessor(model)
    for kind in ("audio", "image", "video"):
        for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
            for read in (processor.measure, processor.load):
                with pytest.raises(RowError, match="a folder, pipe, socket or device, where a"):
                    read(Reference(kind, path, None))


def torn(folder, media):
    """Rows whose media have good headers and broken bodies, and one good row."""
    bad_media(folder, media)
    sees = {
        "messages": [{"role": "user", "content": "<image>?"}, ANSWER],
        "images": [str(folder / "torn.png")],
    }
    hears = {
        "messages": [{"role": "user", "content": "<audio>?"}, ANSWER],
        "audios": [str(folder / "nan.wav")],
    }
    good = {"messages": [{"role": "user", "content": "?"}, ANSWER]}
    return [good, sees, hears]


def test_a_torn_file_is_found_by_check_data(model, media, tmp_path):
    with pytest.raises(DataError, match="2 of 3 data rows") as error:
        load(model, tmp_path, *torn(tmp_path, media), check_data=True)
    assert "rows.jsonl:2: image" in str(error.value) and "torn.png: cannot be read" in str(
        error.value
    )
    assert "rows.jsonl:3: audio" in str(error.value) and "a sample is not a finite number" in str(
        error.value
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_torn_file_is_named_when_its_row_is_reached(model, media, tmp_path, num_workers, capfd):
    steps = dict(
        global_batch_size=3,
        budget=Budget(10_000),
        dp_rank=0,
        dp_size=1,
        start_step=0,
    )
    steps |= dict(num_steps=1, num_workers=num_workers)
    rows, order = (
        torn(tmp_path, media),
        partial(batch_indices, global_batch_size=3, num_rows=3, seed=0),
    )
    data = load(model, tmp_path, *rows)
    with contextlib.closing(
        step_loader(data, order, lambda _: data.lengths.views, **steps)
    ) as loader:
        with pytest.raises(DataError, match=r"rows.jsonl:[23]: ") as error:
            next(loader)
    assert "Traceback" not in str(error.value)
    data = load(model, tmp_path, *rows, skip_bad_rows=True)
    with contextlib.closing(
        step_loader(data, order, lambda _: data.lengths.views, **steps)
    ) as loader:
        (micro_batch,) = next(loader)
    assert micro_batch.count(PADDING) == 2 and len(micro_batch) == 3
    (sample,) = (sample for _, sample in micro_batch if sample is not None)
    assert sample.row == 0 and not sample.media
    assert capfd.readouterr().err.count("Left out (--skip_bad_rows): ") == 2


def test_media_tokens_count_towards_max_length(model, media):
    student = load(model, media, row())[0].student
    length = len(student.input_ids)
    assert (
        load(model, media, row(), max_length=length - 1)[0].cut_tokens == 1
    )  # the response is cut, never a medium
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: the prompt has \d+ tokens and leaves no room"
    ):
        load(model, media, row(), max_length=student.response_start)


def test_a_placeholder_as_long_as_another_medium(model, media):
    sample = load(model, media, row())[0]
    ids = list(sample.student.input_ids)
    del ids[sample.student.media[0].positions[0]]
    labels = [-100] * (sample.student.response_start - 1) + ids[sample.student.response_start - 1 :]
    with pytest.raises(
        DataError,
        match=r"placeholder 1 \(audio\) has 17 tokens and its medium makes 18: write one, or all",
    ):
        load(
            model,
            media,
            {
                "input_ids": ids,
                "labels": labels,
                "audios": ["stereo.wav"],
                "images": ["wide.png", "tall.png"],
            },
        )
