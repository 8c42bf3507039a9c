"""What a program prints, to whoever listens: neither a reader that goes away (a pipe into head, a
terminal that is closed) nor a full disk under a log ends it.
"""

import errno
import io
import os
import sys


class _Descriptor(io.FileIO):
    """From the first write that nobody reads, all go nowhere: also those of child processes. What a
    full disk does not take is lost.
    """

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return len(data)  # there may be room for the next
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def outlive_readers() -> None:
    """For a program, at its start: from now on a broken pipe of stdout or stderr, a closed terminal
    or a full disk is no error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.flush()
        raw = _Descriptor(stream.fileno(), "w", closefd=False)
        buffer = io.BufferedWriter(raw)  # type: ignore[type-var]
        wrapped = io.TextIOWrapper(
            buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True
        )
        setattr(sys, name, wrapped)
