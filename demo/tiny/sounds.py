"""How the toy language sounds: tones, or the voices of espeak-ng where it is installed.

With tones a word is two tones in succession, spoken faster or slower, higher or lower, under noise.
A `Speaker` returns the sound and where each word lies in it: the audio tower's lessons need both,
data rows only the sound.
"""

import io
import itertools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soundfile

from demo.tiny.toy_language import WORDS

SAMPLE_RATE = 16000
GAP_SECONDS = (0.06, 0.10)  # of silence before, between and after the words
SPEED = (0.9, 1.15)
LOUDNESS = (0.1, 0.6)  # peak of the loudest word
NOISE = (0.01, 0.1)  # standard deviation of the noise over the utterance's loudness

# --- tones ---
PITCHES = [330.0 * 1.45**step for step in range(6)]  # Hz, up to 2.1 kHz
ALPHABET: dict[str, tuple[float, float]] = dict(zip(WORDS, itertools.permutations(PITCHES, 2)))
TONE_PITCH_SPREAD = 0.06  # a speaker's pitch, relative; neighbouring tones are 45 % apart
TONE_SECONDS = (0.08, 0.11)
RAMP_SECONDS = 0.008  # a tone swells and fades: no clicks

# --- voices ---
VOICES = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-us+f2",
    "en-us+f3",
    "en-gb+f4",
    "en-us+m3",
    "en-gb+m5",
)
WORDS_PER_MINUTE = 240
VOICE_PITCH_SPREAD = 0.08  # a speaker's pitch and speed, relative: played a little faster or slower
AUDIBLE = 0.02  # of the peak: what is softer before and after a word is cut off


@dataclass(frozen=True)
class Utterance:
    """`samples` [T] in [-1, 1] at SAMPLE_RATE, and the (start, end) of every word in seconds."""

    samples: np.ndarray
    spans: list[tuple[float, float]]


Speaker = Callable[[list[str], np.random.Generator], Utterance]


def join(words: list[np.ndarray], speed: float, generator: np.random.Generator) -> Utterance:
    """Words with silence around each, at random loudness, under noise."""

    def silence() -> np.ndarray:
        return np.zeros(round(generator.uniform(*GAP_SECONDS) / speed * SAMPLE_RATE))

    parts: list[np.ndarray] = [silence()]
    spans: list[tuple[float, float]] = []
    for word in words:
        position = sum(map(len, parts))
        spans.append((position / SAMPLE_RATE, (position + len(word)) / SAMPLE_RATE))
        parts += [word * generator.uniform(0.5, 1.0), silence()]
    clean = np.concatenate(parts)
    noisy = clean + generator.uniform(*NOISE) * generator.standard_normal(len(clean))
    samples = np.clip(noisy * generator.uniform(*LOUDNESS), -1.0, 1.0)
    return Utterance(samples.astype(np.float32), spans)


def _tone(pitch: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """A tone of `pitch` Hz with two weaker overtones of random strength."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    strengths = (1.0, *generator.uniform(0.0, 0.3, 2))
    wave = sum(
        strength * np.sin(2 * np.pi * n * pitch * time)
        for n, strength in enumerate(strengths, start=1)
    )
    swell = np.minimum(1.0, np.minimum(time, time[::-1]) / RAMP_SECONDS)
    return wave * swell / sum(strengths)


def speak_tones(words: list[str], generator: np.random.Generator) -> Utterance:
    """Say `words` in tones: one pitch factor and one speed, every tone a little different."""
    speed = generator.uniform(*SPEED)
    pitch_factor = 1.0 + generator.uniform(-TONE_PITCH_SPREAD, TONE_PITCH_SPREAD)

    def say(word: str) -> np.ndarray:
        return np.concatenate(
            [
                _tone(pitch * pitch_factor, generator.uniform(*TONE_SECONDS) / speed, generator)
                for pitch in ALPHABET[word]
            ]
        )

    return join([say(word) for word in words], speed, generator)


def resample(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """The same sound in `num_samples` samples: its spectrum cut off, or continued with zeros."""
    spectrum = np.fft.rfft(samples)[: num_samples // 2 + 1]
    return np.fft.irfft(spectrum, num_samples) * (num_samples / len(samples))


def _record(word: str, voice: str) -> np.ndarray:
    """`word` spoken by espeak-ng, resampled to SAMPLE_RATE, with a peak of 1 and without the
    silence around it.
    """
    command = ["espeak-ng", "-v", voice, "-s", str(WORDS_PER_MINUTE), "--stdout", word]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(spoken))
    samples = resample(samples / np.abs(samples).max(), round(len(samples) * SAMPLE_RATE / rate))
    audible = np.flatnonzero(np.abs(samples) > AUDIBLE)
    return samples[audible[0] : audible[-1] + 1]


def record_voices() -> Speaker:
    """A speaker that says each utterance in one of the VOICES, chosen at random.

    Records every word in every voice first (a few seconds). Raises ValueError where espeak-ng is
    not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise ValueError(
            "voices need the program espeak-ng (Debian, Ubuntu: apt install espeak-ng); "
            "tones do not"
        )
    recordings = {voice: {word: _record(word, voice) for word in WORDS} for voice in VOICES}

    def speak(words: list[str], generator: np.random.Generator) -> Utterance:
        recorded = recordings[VOICES[generator.integers(len(VOICES))]]
        stretch = 1.0 + generator.uniform(-VOICE_PITCH_SPREAD, VOICE_PITCH_SPREAD)
        said = [resample(recorded[word], round(len(recorded[word]) * stretch)) for word in words]
        return join(said, generator.uniform(*SPEED), generator)

    return speak


SOUNDS: dict[str, Callable[[], Speaker]] = {"tones": lambda: speak_tones, "voices": record_voices}


def make_speaker(sound: str) -> Speaker:
    """The speaker of that name in SOUNDS. Raises ValueError for any other name, and for voices
    where espeak-ng is not installed.
    """
    if sound not in SOUNDS:
        raise ValueError(f"there is no sound {sound!r}: choose one of {', '.join(SOUNDS)}")
    return SOUNDS[sound]()
