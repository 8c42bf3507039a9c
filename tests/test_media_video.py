"""Rows with videos, and their sound: what the student reads and one training step, compared with
transformers' processor and model.

Where torchvision is missing, transformers' processor has its image processor for the frames
(`FrameByFrame`), which the test has chosen. Where torchvision and torchcodec are installed, whole
files are compared as well.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor
from tests.reference_step import reference_step, write_adapter
from tests.test_media_processor import ANSWER, build_model, load, processor_of
from tests.train_runs import arguments, layout_flags, read_lines, run_training, write_rows
from tests.video_files import (
    HAS_TORCHCODEC,
    NO_TORCHCODEC,
    FrameByFrame,
    pictures,
    tone,
    write_video,
)

FPS, SECONDS, RATE = 3, 4, 22_050
FRAMES = pictures(FPS * SECONDS, 352, 384)  # whole tokens within the limits: nothing is resized
CHOSEN = [0, 3, 6, 9]  # one a second
SOUND = tone(SECONDS, RATE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Four seconds of a moving picture, three frames a second, with a tone in both channels."""
    folder = tmp_path_factory.mktemp("clip")
    return write_video(folder / "clip.mov", FRAMES, fps=FPS, sound=SOUND, rate=RATE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("media"))


def row(path, **more):
    user = {
        "role": "user",
        "content": [{"type": "video", "video": str(path)}, {"type": "text", "text": "what?"}],
    }
    return {"messages": [user, ANSWER]} | more


def transformers_inputs(processor, text: str, with_sound: bool) -> dict:
    """The clip as transformers' processor gives it to the model, one row."""
    processor.video_processor = FrameByFrame(processor.image_processor)
    given = dict(text=text, videos=[FRAMES[CHOSEN]], fps=1.0, return_tensors="pt")
    if with_sound:
        samples = (SOUND / 32768).astype(np.float32).mean(axis=1)
        given |= dict(audio=[soxr.resample(samples, RATE, 16_000, quality="HQ")])
        if hasattr(Qwen3OmniMoeProcessor, "replace_video_with_audio_token"):
            given |= dict(load_audio_from_video=True, audio_from_video_indices=[0])
        else:  # until 5.22
            given |= dict(use_audio_in_video=True)
    return dict(processor(**given))


@pytest.mark.parametrize("with_sound", [False, True])
def test_a_video_is_what_transformers_processor_makes_of_it(
    model, clip, monkeypatch, tmp_path, with_sound
):
    sample = load(model, tmp_path, row(clip, use_audio_in_video=with_sound), max_length=2000)[0]
    processor = processor_of(model, monkeypatch)
    text = processor.tokenizer.apply_chat_template(row(clip)["messages"], tokenize=False)
    expected = transformers_inputs(processor, text.removesuffix("\n"), with_sound)
    assert sample.student.input_ids == expected["input_ids"][0].tolist()
    (video,) = (medium for medium in sample.media if medium.kind == "video")
    torch.testing.assert_close(video.features, expected["pixel_values_videos"])
    assert list(video.grid_thw) == expected["video_grid_thw"][0].tolist()
    assert video.seconds_per_grid == float(expected["video_second_per_grid"][0])
    if with_sound:
        (audio,) = (medium for medium in sample.media if medium.kind == "audio")
        torch.testing.assert_close(audio.features, expected["input_features"][0])
        config = json.load(open(os.path.join(model, "config.json")))["thinker_config"]
        kinds = [
            sample.student.input_ids[position]
            for place in sample.student.media
            for position in place.positions
        ]
        assert {config["audio_token_id"], config["video_token_id"]} == set(kinds)


def test_the_sound_may_be_given(model, clip, tmp_path):
    soundfile.write(tmp_path / "track.wav", SOUND, RATE)
    own = load(model, tmp_path, row(clip, use_audio_in_video=True), max_length=2000)[0]
    given = row(clip, use_audio_in_video=True, audios=[str(tmp_path / "track.wav")])
    sample = load(model, tmp_path, given, max_length=2000)[0]
    assert sample.student.input_ids == own.student.input_ids
    assert torch.equal(sample.student.position_ids, own.student.position_ids)
    for given_medium, own_medium in zip(sample.media, own.media):
        assert torch.equal(given_medium.features, own_medium.features)


def test_media_references_of_a_video_name_its_track(model, clip, tmp_path):
    rows = load(model, tmp_path, row(clip, use_audio_in_video=True), max_length=2000)
    track = Reference("audio", str(clip), None, is_track=True)
    for view in ("student", "teacher"):
        found = rows.media_references(0, view)
        assert found == ([track, Reference("video", str(clip), None)], True)


def test_bytes_and_the_cache_give_the_same(model, clip, tmp_path):
    content = Path(clip).read_bytes()
    copy = tmp_path / "copy.mov"
    copy.write_bytes(content)
    for is_track in (False, True):
        kind = "audio" if is_track else "video"
        expected = MediaProcessor(model).load(Reference(kind, str(clip), None, is_track))
        of_bytes = MediaProcessor(model).load(Reference(kind, None, content, is_track))
        assert torch.equal(of_bytes.features, expected.features)
        cached = MediaProcessor(model, str(tmp_path / "cache"))
        reference = Reference(kind, str(copy), None, is_track)
        size = cached.measure(reference)
        assert torch.equal(cached.load(reference).features, expected.features)
        assert torch.equal(cached.load(reference).features, expected.features)
        assert cached.measure(reference) == size and size.num_tokens == expected.num_tokens
    status = copy.stat()
    copy.write_bytes(bytes(len(content)))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))  # for the cache the same file
    video = Reference("video", str(copy), None)
    assert cached.measure(video) == MediaProcessor(model).measure(
        Reference("video", str(clip), None)
    )


@pytest.mark.parametrize("with_sound", [False, True])
def test_step_parity(clip, monkeypatch, tiny_folder, tmp_path, with_sound):
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
    processor = processor_of(folder, monkeypatch)

    def prompt_of(turn: dict) -> str:
        return processor.tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )

    inputs = transformers_inputs(processor, prompt_of(raw["messages"][0]), with_sound)
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
    response = processor.tokenizer("a cat<|im_end|>")["input_ids"]
    reference = {
        "input_ids": prompt + response,
        "labels": [-100] * len(prompt) + response,
        "media": media,
        "teacher_input_ids": processor.tokenizer(prompt_of(told[0]))["input_ids"],
    }
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


COMPARED = {
    "h264.mp4": dict(codec="libx264", pix_fmt="yuv420p", bf="2", sound_codec="aac"),
    "h264_444.mp4": dict(codec="libx264", pix_fmt="yuv444p", sound_codec="aac"),
    "vp9.webm": dict(codec="libvpx-vp9", pix_fmt="yuv420p", sound_codec="libopus"),
    "mpeg4.avi": dict(codec="mpeg4", pix_fmt="yuv420p", sound_codec="pcm_s16le"),
    "ten_bits.mkv": dict(codec="ffv1", pix_fmt="yuv420p10le"),
    "gray.mkv": dict(codec="ffv1", pix_fmt="gray", sound_codec="mp2"),
    "png.mov": dict(),
}


@pytest.mark.skipif(not HAS_TORCHCODEC, reason=NO_TORCHCODEC)
@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("height, width, fps", [(64, 96, 5), (97, 131, 30), (480, 640, 12)])
def test_files_equal_to_torchvision_and_torchcodec(model, tmp_path, name, height, width, fps):
    from torchcodec.decoders import AudioDecoder
    from transformers import AutoProcessor

    if "420" in COMPARED[name].get("pix_fmt", "") and name != "ten_bits.mkv":
        height, width = height // 2 * 2, width // 2 * 2
    frames = pictures(5 * fps, height, width)
    sound = tone(5, 48_000)
    path = write_video(tmp_path / name, frames, fps=fps, sound=sound, rate=48_000, **COMPARED[name])
    processor, ours = AutoProcessor.from_pretrained(model), MediaProcessor(model)
    expected = processor(
        text=processor.video_token,
        videos=[str(path)],
        fps=1.0,
        do_sample_frames=True,
        return_tensors="pt",
    )
    video = ours.load(Reference("video", str(path), None))
    assert expected["video_grid_thw"].tolist() == [list(video.grid_thw)]
    assert torch.equal(video.features, expected["pixel_values_videos"])
    track = AudioDecoder(str(path)).get_all_samples()
    samples, rate = ours._decode_audio(Reference("audio", str(path), None, is_track=True))
    assert rate == track.sample_rate
    assert np.array_equal(samples, track.data.T.numpy().mean(axis=1))
