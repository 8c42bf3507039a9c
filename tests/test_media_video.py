"""Videos in the data, and their sound, compared with transformers' processor. Needs torchvision,
torchcodec and ffmpeg.
"""

import importlib.util
import json
import os
import shutil
import subprocess

import pytest
import torch

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from tests.reference_step import reference_step, write_adapter
from tests.test_media_processor import ANSWER, load
from tests.train_runs import arguments, layout_flags, read_lines, run_training, write_rows

MISSING = [name for name in ("torchvision", "torchcodec") if importlib.util.find_spec(name) is None]
MISSING += ["ffmpeg"] if shutil.which("ffmpeg") is None else []
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Six seconds of a moving picture, 96 x 64 at 5 frames a second, with a tone."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    source = [
        "-f",
        "lavfi",
        "-i",
        "testsrc=duration=6:size=96x64:rate=5",
        "-f",
        "lavfi",
        "-i",
        "sine=frequency=440:duration=6",
    ]
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", *source, "-c:a", "aac", "-shortest", path], check=True
    )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_folder(
        str(tmp_path_factory.mktemp("media") / "model"),
        TinyModelConfig(num_hidden_layers=1, hidden_size=64),
    )


@pytest.fixture(scope="module")
def processor(model):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)


def row(path, **more):
    user = {
        "role": "user",
        "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": "what?"}],
    }
    return {"messages": [user, ANSWER]} | more


@pytest.mark.parametrize("with_sound", [False, True])
def test_a_video_is_what_transformers_processor_makes_of_it(
    model, clip, processor, tmp_path, with_sound
):
    sample = load(model, tmp_path, row(clip, use_audio_in_video=with_sound), max_length=2000)[0]
    text = processor.tokenizer.apply_chat_template(
        row(clip)["messages"], tokenize=False
    ).removesuffix("\n")
    arguments = dict(
        text=text, videos=[str(clip)], fps=1.0, do_sample_frames=True, return_tensors="pt"
    )
    if with_sound:
        sound = MediaProcessor(model)._decode_audio(Reference("audio", str(clip), None, True))
        assert sound[1] > 8000 and len(sound[0]) == pytest.approx(6 * sound[1], rel=0.05)
        arguments |= dict(load_audio_from_video=True)
    expected = processor(**arguments)
    assert sample.student.input_ids == expected["input_ids"][0].tolist()
    (video,) = (medium for medium in sample.media if medium.kind == "video")
    torch.testing.assert_close(video.features, expected["pixel_values_videos"])
    assert list(video.grid_thw) == expected["video_grid_thw"][0].tolist()
    assert video.seconds_per_grid == float(expected["video_second_per_grid"][0])
    if with_sound:
        (audio,) = (medium for medium in sample.media if medium.kind == "audio")
        assert audio.features.shape == expected["input_features"][0].shape
        config = json.load(open(os.path.join(model, "config.json")))["thinker_config"]
        kinds = [
            sample.student.input_ids[position]
            for place in sample.student.media
            for position in place.positions
        ]
        assert {config["audio_token_id"], config["video_token_id"]} == set(kinds)


def test_the_sound_may_be_given(model, clip, tmp_path):
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", clip, tmp_path / "track.wav"], check=True)
    own = load(model, tmp_path, row(clip, use_audio_in_video=True), max_length=2000)[0]
    given = row(clip, use_audio_in_video=True, audios=[str(tmp_path / "track.wav")])
    sample = load(model, tmp_path, given, max_length=2000)[0]
    assert sample.student.input_ids == own.student.input_ids
    assert torch.equal(sample.student.position_ids, own.student.position_ids)


def test_media_references_of_a_video_name_its_track(model, clip, tmp_path):
    rows = load(model, tmp_path, row(clip, use_audio_in_video=True), max_length=2000)
    track = Reference("audio", str(clip), None, is_track=True)
    for view in ("student", "teacher"):
        found = rows.media_references(0, view)
        assert found == ([track, Reference("video", str(clip), None)], True)


@pytest.mark.parametrize("with_sound", [False, True])
def test_step_parity(clip, processor, tiny_folder, tmp_path, with_sound):
    """One step from the command line whose student sees the video (and hears it) and whose teacher
    is told.
    """
    sizes = dict(
        num_hidden_layers=4, hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=1024
    )
    folder = tiny_folder(**sizes)
    adapter = write_adapter(tmp_path / "adapter", folder, rank=3, alpha=5.0)
    told = [
        {"role": "user", "content": "a test picture. what?"},
        {"role": "assistant", "content": ""},
    ]
    raw = row(clip, use_audio_in_video=with_sound, teacher_messages=told)
    rows = write_rows(tmp_path / "rows.jsonl", [raw])
    text = processor.tokenizer.apply_chat_template(
        raw["messages"][:1], tokenize=False, add_generation_prompt=True
    )
    arguments_ = dict(
        text=text, videos=[str(clip)], fps=1.0, do_sample_frames=True, return_tensors="pt"
    )
    inputs = dict(
        processor(**arguments_, **({"load_audio_from_video": True} if with_sound else {}))
    )
    prompt, _ = inputs.pop("input_ids")[0].tolist(), inputs.pop("attention_mask")
    media = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
        if torch.is_tensor(value)
    }
    media |= {
        "video_second_per_grid": torch.as_tensor(inputs["video_second_per_grid"]),
        "use_audio_in_video": with_sound,
    }
    if with_sound:  # transformers resamples with another library: the sound is ours
        (sound,) = (
            m for m in load(folder, tmp_path, raw, max_length=2000)[0].media if m.kind == "audio"
        )
        media["input_features"] = sound.features[None].double()
    response = processor.tokenizer("a cat<|im_end|>")["input_ids"]
    reference = {
        "input_ids": prompt + response,
        "labels": [-100] * len(prompt) + response,
        "media": media,
    }
    reference["teacher_input_ids"] = processor.tokenizer(
        processor.tokenizer.apply_chat_template(
            told[:1], tokenize=False, add_generation_prompt=True
        )
    )["input_ids"]
    expected = reference_step(folder, adapter, [reference], sft_alpha=0.3)
    given = dict(
        model=folder, adapter=adapter, dataset=rows, max_length=2000, sft_alpha=0.3, max_steps=1
    )
    run_training(
        2,
        arguments(
            output_dir=tmp_path / "out",
            per_device_train_batch_size=1,
            **given,
            **layout_flags(tp=2, ep=2),
        ),
    )
    (line,) = read_lines(tmp_path / "out" / "metrics.jsonl")
    for name in ("loss", "jsd", "sft_loss", "grad_norm", "kl_forward", "entropy_teacher"):
        assert line[name] == pytest.approx(expected[name], rel=1e-4), name
