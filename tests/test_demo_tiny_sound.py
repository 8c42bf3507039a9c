"""How the small model's language sounds (tones, voices), and the lessons that teach its audio tower
to tell it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, Qwen3OmniMoeThinkerForConditionalGeneration

from demo.tiny import sounds, tower_training
from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from demo.tiny.sounds import ALPHABET, SAMPLE_RATE, Utterance, make_speaker, resample, speak_tones
from demo.tiny.toy_language import WORDS

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="voices are made by espeak-ng"
)


def loudest_pitch(samples):
    """Hz of the strongest frequency."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 16))
    return spectrum.argmax() * SAMPLE_RATE / (1 << 16)


def part(utterance, start, end):
    return utterance.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]


def test_no_two_words_sound_alike():
    assert list(ALPHABET) == WORDS and len(set(ALPHABET.values())) == len(WORDS)


def test_every_word_is_its_two_tones_whoever_says_it():
    generator = np.random.default_rng(0)
    for word in WORDS:
        utterance = speak_tones([word], generator)
        (start, end), middle = utterance.spans[0], sum(utterance.spans[0]) / 2
        # The tones' lengths differ, so that the border is near the middle: leave a third of each
        # tone out.
        heard = [
            loudest_pitch(part(utterance, start, start + (middle - start) * 0.66)),
            loudest_pitch(part(utterance, end - (end - middle) * 0.66, end)),
        ]
        assert heard == pytest.approx(ALPHABET[word], rel=sounds.TONE_PITCH_SPREAD + 0.02), word


def test_speech_is_seeded_varied_and_lies_where_it_says():
    words = ["cat", "sun", "cat"]
    first, again, other = (speak_tones(words, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first.samples, again.samples) and first.spans == again.spans
    assert len(first.samples) != len(other.samples)
    assert first.samples.dtype == np.float32 and np.abs(first.samples).max() <= 1.0
    borders = [
        0.0,
        *[second for span in first.spans for second in span],
        len(first.samples) / SAMPLE_RATE,
    ]
    assert len(first.spans) == 3 and borders == sorted(borders)
    loudness = [float(np.std(part(first, start, end))) for start, end in zip(borders, borders[1:])]
    assert min(loudness[1::2]) > 2 * max(
        loudness[::2]
    )  # words are louder than the noise around them
    lengths = [len(speak_tones(words, np.random.default_rng(seed)).samples) for seed in range(40)]
    assert max(lengths) > 1.2 * min(lengths)


def test_token_labels():
    """Outputs are 80 ms apart, and start anew each second: the 13th is at 0.96 s, the 14th at 1.00
    s.
    """
    utterance = Utterance(np.zeros(0), [(0.05, 0.17), (0.90, 1.01), (1.10, 1.20)])
    labels = tower_training.token_labels(utterance, ["red", "cat", "sun"], 16)
    silence, red, cat, sun = (
        tower_training.SILENCE,
        WORDS.index("red"),
        WORDS.index("cat"),
        WORDS.index("sun"),
    )
    assert labels.tolist() == [silence, red, red] + [silence] * 9 + [cat, cat, silence, sun]


def test_an_unknown_sound_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sound 'bells': choose one of tones, voices"):
        build_folder(str(tmp_path / "model"), TinyModelConfig(tower_sound="bells"))
    assert not (tmp_path / "model").exists()


def test_voices_need_espeak(monkeypatch):
    monkeypatch.setattr(sounds.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="voices need the program espeak-ng"):
        make_speaker("voices")


def test_resampling_keeps_the_pitch():
    tone = np.sin(2 * np.pi * 1000 * np.arange(22050) / 22050)
    assert loudest_pitch(resample(tone, 16000)) == pytest.approx(1000, rel=1e-3)
    slower = resample(resample(tone, 16000), 20000)
    assert len(slower) == 20000 and loudest_pitch(slower) == pytest.approx(800, rel=1e-3)
    assert np.abs(slower).max() == pytest.approx(1.0, abs=0.05)


@needs_espeak
def test_voices_speak():
    speak = make_speaker("voices")
    utterances = [speak(["cat", "mountain"], np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(utterances[0].samples, utterances[1].samples)
    assert len(utterances[0].samples) != len(utterances[2].samples)
    for utterance in utterances:
        (start, end), (later_start, later_end) = utterance.spans
        assert 0.1 < end - start < later_end - later_start < 0.7  # "mountain" is the longer word
        assert np.std(part(utterance, start, end)) > 2 * np.std(part(utterance, end, later_start))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Two models of the same seed whose towers had the same few lessons, and one without."""
    folder = tmp_path_factory.mktemp("sound")
    steps = {"first": 3, "again": 3, "untaught": 0}
    return [
        build_folder(
            str(folder / name), TinyModelConfig(num_hidden_layers=1, tower_steps=steps[name])
        )
        for name in steps
    ]


def test_lessons_change_the_audio_tower_alone_and_the_same_way_each_time(taught):
    first, again, untaught = (load_file(Path(folder, "model.safetensors")) for folder in taught)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], untaught[name])}
    expected = {name for name in first if name.startswith("thinker.audio_tower.")}
    # A bias of the keys shifts every score of a query alike: its gradient is zero but for rounding.
    assert {name for name in expected if "k_proj.bias" not in name} <= changed <= expected
    assert json.loads(Path(taught[0], "lessons.json").read_text()) == {
        **{"train_steps": 0, "tower_steps": 3, "tower_sound": "tones", "seed": 0}
    }
    assert not Path(taught[2], "lessons.json").exists()


def test_the_tower_learns_to_tell_words(taught):
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(taught[2])
    extractor = AutoFeatureExtractor.from_pretrained(taught[2])
    share = tower_training.train_audio_tower(thinker, extractor, speak_tones, num_steps=60, seed=0)
    assert (
        share > 0.45
    )  # of outputs on prompts it never heard; always answering "silence" gives 0.36
