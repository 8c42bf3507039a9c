"""A conversion that may be killed at any moment: units of work, a journal of the finished ones, one rename at the end.

Beside OUTPUT stands .OUTPUT.partial/ with `content/` (what OUTPUT will be), `journal.jsonl` (a line for each finished
unit, written after its bytes are on the disk) and a lock. The same command continues after the last line. OUTPUT itself
appears by a rename, complete.
"""

import fcntl
import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from tqdm import tqdm

from checkpoint_tools.workers import Work, run_workers

_WAIT_FOR_LOCK = 30.0  # seconds: workers of a killed command notice within one
_SPARE_BYTES = 64 << 20  # of the disk


@dataclass(frozen=True)
class Job:
    """What is converted into which folder. `identity` (JSON) is all that the result depends on."""

    output: Path
    identity: dict
    unit_bytes: list[int]  # written by each unit
    other_bytes: int  # written beside the units

    @property
    def partial(self) -> Path:
        return content_of(self.output).parent

    @property
    def content(self) -> Path:
        return content_of(self.output)


def content_of(output: Path) -> Path:
    """Where the content of `output` grows until it is complete."""
    return output.with_name(f".{output.name}.partial") / "content"


def file_states(folder: Path, names) -> dict[str, list[int]]:
    """Size and time of change of files: a conversion is not continued when they differ."""
    return {name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in names}


def run_job(
    job: Job, prepare: Callable[[], None], work: Work, finish: Callable[[list], None], num_workers: int
) -> bool:
    """Do what is left of the job. `prepare` and `finish(results)` run in this process and may run again after a kill.

    Returns False when an earlier run had finished all but the tidying up. Raises ValueError when the output folder is
    not empty, another command or another conversion holds the partial folder, or the disk is too small.
    """
    if job.output.exists() and job.partial.exists() and not job.content.exists():
        shutil.rmtree(job.partial)
        return False
    check_output(job.output)
    job.content.mkdir(parents=True, exist_ok=True)
    with _locked(job.partial / "lock"):
        journal = Journal(job.partial / "journal.jsonl", job.identity, len(job.unit_bytes))
        check_disk(job.output, sum(job.unit_bytes) + job.other_bytes, done=_bytes_on_disk(job.content))
        prepare()
        _run_units(job, journal, work, num_workers)
        finish(journal.results)
        _sync_tree(job.content)
        if job.output.exists():
            job.output.rmdir()
        job.content.rename(job.output)
        sync(job.output.parent)
    shutil.rmtree(job.partial)
    return True


def _run_units(job: Job, journal: "Journal", work: Work, num_workers: int) -> None:
    todo = [unit for unit, result in enumerate(journal.results) if result is None]
    total, left = sum(job.unit_bytes), sum(job.unit_bytes[unit] for unit in todo)
    with tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc=job.output.name) as bar:
        for unit, result in run_workers(work, todo, min(num_workers, len(todo)), bar.update):
            journal.add(unit, result)


class Journal:
    """The results of finished units, on disk as soon as they are known."""

    def __init__(self, path: Path, identity: dict, num_units: int):
        """Raises ValueError when the file belongs to another conversion."""
        self.path = path
        self.results: list[Any] = [None] * num_units
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # a line without its end was being written
        if lines and json.loads(lines[0]) != json.loads(json.dumps(identity)):
            raise ValueError(f"{path.parent}: left by another conversion, or the source has changed since; remove it")
        for line in lines[1:]:
            unit, result = json.loads(line)
            self.results[unit] = result
        whole = "".join(line + "\n" for line in lines) or json.dumps(identity) + "\n"
        replacement = path.with_suffix(".new")
        replacement.write_text(whole)
        sync(replacement)
        replacement.rename(path)

    def add(self, unit: int, result: Any) -> None:
        """Only after the unit's bytes are on the disk."""
        self.results[unit] = result
        with open(self.path, "a") as file:
            file.write(json.dumps([unit, result]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_output(output: Path) -> None:
    """Raise ValueError unless the folder is absent or empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder: remove it or choose another")


def check_disk(output: Path, num_bytes: int, done: int = 0) -> None:
    """Raise ValueError unless the disk of `output` holds what is still to be written of `num_bytes`."""
    folder = next(path for path in output.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(folder).free, max(num_bytes - done, 0) + _SPARE_BYTES
    if free < needed:
        raise ValueError(
            f"--output {output}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there; "
            "make room or choose another disk"
        )


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@contextmanager
def _locked(path: Path):
    """Exclusive among commands; the workers inherit it, so a killed command's orphans hold it until they are gone."""
    with open(path, "w") as file:
        end = time.monotonic() + _WAIT_FOR_LOCK
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"{path.parent}: another command is writing this conversion; wait for it"
                    ) from None
                time.sleep(0.1)
        yield


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
