"""A file that a run appends lines to for days, whatever becomes of its folder and its disk."""

import os
from pathlib import Path


class LineFile:
    """Lines at the end of `path`, each written as it comes. A file that was removed or replaced is
    begun again; lines for which the disk is full, or its server away, wait for the next ones. The
    first time of each is said; no error ends the run.
    """

    def __init__(self, path: Path):
        """Raises OSError where the file cannot be opened: the run has not begun."""
        self.path = path
        self.num_removals = 0
        self._waiting: list[bytes] = []
        self._has_said_why = False
        self._descriptor = self._open()

    def append(self, text: str) -> None:
        """Whole lines, as one write: a reader meanwhile finds all of them or none. What no encoding
        has, half of a surrogate pair, is spelt as JSON does.
        """
        self._waiting.append(text.encode("utf-8", "backslashreplace"))
        try:
            self._write_waiting()
        except OSError as error:
            if not self._has_said_why:
                self._has_said_why = True
                print(
                    f"Note: {self.path} cannot be written ({error}): the run goes on, its lines "
                    "wait until it can",
                    flush=True,
                )

    def close(self) -> None:
        """Says how many lines have found no place."""
        try:
            self._write_waiting()
        except OSError as error:
            lost = b"".join(self._waiting).count(b"\n")
            print(f"{self.path}: its last {lost} lines are not written: {error}", flush=True)
        os.close(self._descriptor)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        self._begin_again_if_removed()
        size = os.fstat(self._descriptor).st_size
        data = memoryview(b"".join(self._waiting))
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, size)  # no half of a line
            raise
        self._waiting.clear()

    def _begin_again_if_removed(self) -> None:
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return
        except FileNotFoundError:
            pass
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._open()
        os.close(self._descriptor)
        self._descriptor = descriptor
        self.num_removals += 1
        if self.num_removals == 1:
            print(
                f"Note: {self.path} was removed or replaced under the run: its lines so far are "
                "gone, it is begun again",
                flush=True,
            )
