"""The ways in which the toy language can sound, by name."""

from collections.abc import Callable

from demo.tiny import tones
from demo.tiny.tones import Speaker
from demo.tiny.voices import Voices

SOUNDS: dict[str, Callable[[], Speaker]] = {"tones": lambda: tones.speak, "voices": Voices}


def make_speaker(sound: str) -> Speaker:
    """What says words in one of the SOUNDS. Raises ValueError for another name, and for voices
    without espeak-ng.
    """
    if sound not in SOUNDS:
        raise ValueError(f"there is no sound {sound!r}: choose one of {', '.join(SOUNDS)}")
    return SOUNDS[sound]()
