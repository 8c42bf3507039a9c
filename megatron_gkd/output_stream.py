"""What a program prints, to whoever listens: a reader that goes away (`| head`) does not end it."""

import io
import os
import sys


class _Descriptor(io.FileIO):
    """From the first write that nobody reads, all go nowhere: also those of child processes."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def outlive_readers() -> None:
    """For a program, at its start: from now on a broken pipe of stdout or stderr is no error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        raw = _Descriptor(stream.fileno(), "w", closefd=False)
        buffer = io.BufferedWriter(raw)  # type: ignore[type-var]
        wrapped = io.TextIOWrapper(
            buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True
        )
        setattr(sys, name, wrapped)
