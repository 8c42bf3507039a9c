"""How the toy language sounds: each word is two tones one after the other, said fast or slowly,
high or low, in noise.

numpy only. `speak` gives the sound and where each word lies in it; the audio tower's training needs
both, data rows only the sound.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from demo.tiny.toy_language import WORDS

SAMPLE_RATE = 16000
PITCHES = [
    330.0 * 1.45**step for step in range(6)
]  # Hz, up to 2.1 kHz; 30 ordered pairs, 24 are words
PITCH_SPREAD = 0.06  # a speaker's pitch, relative; neighbouring tones are 45 % apart
TONE_SECONDS = (0.08, 0.11)
GAP_SECONDS = (0.06, 0.10)  # of silence before, between and after the words
SPEED = (0.9, 1.15)
LOUDNESS = (0.1, 0.6)  # peak of the loudest word
NOISE = (0.01, 0.1)  # standard deviation of the noise over the utterance's loudness
RAMP_SECONDS = 0.008  # a tone swells and fades: no clicks
ALPHABET: dict[str, tuple[float, float]] = dict(zip(WORDS, itertools.permutations(PITCHES, 2)))


@dataclass(frozen=True)
class Utterance:
    """`samples` [T] in [-1, 1] at SAMPLE_RATE, and the (start, end) of every word in seconds."""

    samples: np.ndarray
    spans: list[tuple[float, float]]


Speaker = Callable[[list[str], np.random.Generator], Utterance]


def _tone(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """A tone with two weaker overtones of random strength."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    strengths = (1.0, *generator.uniform(0.0, 0.3, 2))
    wave = sum(
        strength * np.sin(2 * np.pi * n * pitch * time)
        for n, strength in enumerate(strengths, start=1)
    )
    swell = np.minimum(1.0, np.minimum(time, time[::-1]) / RAMP_SECONDS)
    return wave * swell / sum(strengths)


def join(words: list[np.ndarray], speed: float, generator: np.random.Generator) -> Utterance:
    """Words with silence around each, at random loudness, under noise."""

    def silence() -> np.ndarray:
        return np.zeros(round(generator.uniform(*GAP_SECONDS) / speed * SAMPLE_RATE))

    pieces, spans, position = [silence()], [], 0
    for word in words:
        position = sum(map(len, pieces))
        spans.append((position / SAMPLE_RATE, (position + len(word)) / SAMPLE_RATE))
        pieces += [word * generator.uniform(0.5, 1.0), silence()]
    clean = np.concatenate(pieces)
    noisy = clean + generator.uniform(*NOISE) * generator.standard_normal(len(clean))
    samples = np.clip(noisy * generator.uniform(*LOUDNESS), -1.0, 1.0)
    return Utterance(samples.astype(np.float32), spans)


def speak(words: list[str], generator: np.random.Generator) -> Utterance:
    """Say `words` of the toy language: one speaker, one speed, every tone a little different."""
    speed = generator.uniform(*SPEED)
    speaker = 1.0 + generator.uniform(-PITCH_SPREAD, PITCH_SPREAD)

    def say(word: str) -> np.ndarray:
        tones = [
            _tone(p * speaker, generator.uniform(*TONE_SECONDS) / speed, generator)
            for p in ALPHABET[word]
        ]
        return np.concatenate(tones)

    return join([say(word) for word in words], speed, generator)
