"""The toy language in synthetic human voices instead of tones, where espeak-ng is installed."""

import io
import shutil
import subprocess

import numpy as np
import soundfile

from demo.tiny.tones import SAMPLE_RATE, SPEED, Utterance, join
from demo.tiny.toy_language import WORDS

SPEAKERS = (
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
PITCH_SPREAD = 0.08  # a speaker's pitch and speed, relative, by playing a little faster or slower
AUDIBLE = 0.02  # of the peak: what is softer before and after a word is cut off


def _record(word: str, speaker: str) -> np.ndarray:
    """`word` from espeak-ng, at its own rate times SAMPLE_RATE's share of it, peak 1, silence cut
    off.
    """
    command = ["espeak-ng", "-v", speaker, "-s", str(WORDS_PER_MINUTE), "--stdout", word]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(spoken))
    samples = resample(samples / np.abs(samples).max(), round(len(samples) * SAMPLE_RATE / rate))
    audible = np.flatnonzero(np.abs(samples) > AUDIBLE)
    return samples[audible[0] : audible[-1] + 1]


def resample(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """The same sound in `num_samples` samples: its spectrum cut off, or continued with zeros."""
    spectrum = np.fft.rfft(samples)[: num_samples // 2 + 1]
    return np.fft.irfft(spectrum, num_samples) * (num_samples / len(samples))


class Voices:
    """Says words as `tones.speak` does, each utterance with one of a few espeak-ng voices."""

    def __init__(self):
        """Record every word in every voice (a few seconds). Raises ValueError where there is no
        espeak-ng.
        """
        if shutil.which("espeak-ng") is None:
            raise ValueError(
                "voices need the program espeak-ng (Debian, Ubuntu: apt install espeak-ng); "
                "tones do not"
            )
        self.words = {
            speaker: {word: _record(word, speaker) for word in WORDS} for speaker in SPEAKERS
        }

    def __call__(self, words: list[str], generator: np.random.Generator) -> Utterance:
        """Say `words` of the toy language."""
        recorded = self.words[SPEAKERS[generator.integers(len(SPEAKERS))]]
        stretch = 1.0 + generator.uniform(-PITCH_SPREAD, PITCH_SPREAD)
        said = [resample(recorded[word], round(len(recorded[word]) * stretch)) for word in words]
        return join(said, generator.uniform(*SPEED), generator)
