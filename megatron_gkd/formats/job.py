"""A conversion that may be killed at any moment: shards, a journal of the finished ones, one rename
at the end.

Beside OUTPUT stands .OUTPUT.partial/ with `content/` (what OUTPUT will be), `journal.jsonl` (a line
for each finished shard, written after its bytes are on the disk) and a lock. The same command
continues after the last line. When all is on the disk, `done` takes the journal's place, and OUTPUT
appears by a rename, complete.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_gkd.formats.workers import Work, run_workers

JOURNAL, DONE = "journal.jsonl", "done"
_WAIT_FOR_LOCK = 30.0  # seconds: workers of a killed command notice within one
_SPARE_BYTES = 64 << 20  # of the disk
_OTHERS = "{}: left by another conversion, or the source has changed since; remove it"


@dataclass(frozen=True)
class Job:
    """What is converted into which folder. `identity` (JSON) is all that the result depends on."""

    output: Path
    identity: dict
    shard_bytes: list[int]  # written by each shard
    other_bytes: int  # written beside the shards
    sources: list[Path] = field(default_factory=list)  # folders that are read

    @property
    def partial(self) -> Path:
        return content_of(self.output).parent

    @property
    def content(self) -> Path:
        return content_of(self.output)


def content_of(output: Path) -> Path:
    """Where the content of `output` grows until it is complete."""
    return output.with_name(f".{output.name}.partial") / "content"


def file_states(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of change of files: a conversion is not continued when they differ."""
    return {
        name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in names
    }


def run_job(
    job: Job,
    prepare: Callable[[], None],
    work: Work,
    finish: Callable[[list], None],
    num_workers: int,
) -> bool:
    """Do what is left of the job. `prepare` and `finish(results)` run in this process and may run
    again after a kill.

    Returns False when another run had finished all but the tidying up. Raises ValueError when the
    output folder is not empty or lies in a source, another command or another conversion holds the
    partial folder, or the disk is too small; then nothing was written.
    """
    if not job.partial.exists():
        _check_room(job)
    with _locked(job.partial):
        if _is_published(job):
            _tidy_up(job)
            return False
        _check_room(job)
        if not _is_done(job):
            _convert(job, prepare, work, finish, num_workers)
        _publish(job)
        _tidy_up(job)
    return True


def _check_room(job: Job) -> None:
    check_output(job.output, job.sources)
    check_disk(job.output, sum(job.shard_bytes) + job.other_bytes, done=_bytes_on_disk(job.content))


def _is_published(job: Job) -> bool:
    """Whether this very conversion is in OUTPUT. What is left of one whose OUTPUT has gone since is
    swept away.
    """
    if job.content.exists():
        return False
    done = job.output.is_dir() and any(job.output.iterdir()) and _is_done(job)
    if not done:
        _remove_all(job.partial, besides="lock")
    return done


def _is_done(job: Job) -> bool:
    """Whether `content` is, or was when it became OUTPUT, this conversion, complete and on the
    disk.
    """
    try:
        return json.loads((job.partial / DONE).read_text()) == _plain(job.identity)
    except FileNotFoundError:
        return False


def _convert(
    job: Job,
    prepare: Callable[[], None],
    work: Work,
    finish: Callable[[list], None],
    num_workers: int,
) -> None:
    if (job.partial / DONE).exists():
        raise ValueError(_OTHERS.format(job.partial))
    if job.content.exists() and not (job.partial / JOURNAL).exists():
        shutil.rmtree(job.content)  # nothing is known to be finished
    job.content.mkdir(exist_ok=True)
    journal = Journal(job.partial / JOURNAL, job.identity, len(job.shard_bytes))
    prepare()
    _sync_folders(job.partial)  # the names of the files that the shards are written into
    _run_shards(job, journal, work, num_workers)
    finish(journal.results)
    _sync_tree(job.content)
    marker = job.partial / f"{DONE}.new"
    marker.write_text(json.dumps(job.identity))
    sync(marker)
    marker.rename(job.partial / DONE)
    sync(job.partial)


def _publish(job: Job) -> None:
    """The journal goes first: without content it must not tell another run that shards are done."""
    (job.partial / JOURNAL).unlink(missing_ok=True)
    sync(job.partial)
    if job.output.exists():
        job.output.rmdir()
    job.content.rename(job.output)
    sync(job.output.parent)


def _tidy_up(job: Job) -> None:
    """The marker goes last: until then a killed command, or one that has waited, knows that its
    work is in OUTPUT.
    """
    _remove_all(job.partial, besides=DONE)
    (job.partial / DONE).unlink(missing_ok=True)
    with suppress(OSError):  # another command may have come in when the lock was gone
        job.partial.rmdir()


def _remove_all(folder: Path, besides: str) -> None:
    for path in folder.iterdir():
        if path.name != besides:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _plain(identity: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(identity))


def _run_shards(job: Job, journal: "Journal", work: Work, num_workers: int) -> None:
    todo = [shard for shard, result in enumerate(journal.results) if result is None]
    total, left = sum(job.shard_bytes), sum(job.shard_bytes[shard] for shard in todo)
    with tqdm(
        total=total, initial=total - left, unit="B", unit_scale=True, desc=job.output.name
    ) as bar:
        for shard, result in run_workers(work, todo, min(num_workers, len(todo)), bar.update):
            journal.add(shard, result)


class Journal:
    """The results of finished shards, on disk as soon as they are known."""

    def __init__(self, path: Path, identity: dict, num_shards: int):
        """Raises ValueError when the file belongs to another conversion."""
        self.path = path
        self.results: list[Any] = [None] * num_shards
        # A line without its end was being written.
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        if lines and json.loads(lines[0]) != _plain(identity):
            raise ValueError(_OTHERS.format(path.parent))
        for line in lines[1:]:
            shard, result = json.loads(line)
            self.results[shard] = result
        whole = "".join(line + "\n" for line in lines) or json.dumps(identity) + "\n"
        replacement = path.with_suffix(".new")
        replacement.write_text(whole)
        sync(replacement)
        replacement.rename(path)
        sync(path.parent)

    def add(self, shard: int, result: Any) -> None:
        """Only after the shard's bytes are on the disk."""
        self.results[shard] = result
        with open(self.path, "a") as file:
            file.write(json.dumps([shard, result]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_output(output: Path, sources: Iterable[Path] = ()) -> None:
    """Raise ValueError unless the folder is absent or empty, and outside the folders `sources`."""
    for source in sources:
        if output.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"--output {output} lies in {source}, which is only read: choose another place"
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"--output {output} exists and is not an empty folder: remove it or choose another"
        )


def check_disk(output: Path, num_bytes: int, done: int = 0) -> None:
    """Raise ValueError unless the disk of `output` holds what is still to be written of
    `num_bytes`.
    """
    folder = next(path for path in output.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(folder).free, max(num_bytes - done, 0) + _SPARE_BYTES
    if free < needed:
        raise ValueError(
            f"--output {output}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free "
            "there; make room or choose another disk"
        )


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """An exclusive lock among commands: each may make the folder `partial`, the last one removes
    it. The workers inherit the lock, so a killed command's orphans hold it until they are gone.
    """
    end = time.monotonic() + _WAIT_FOR_LOCK
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            file = open(partial / "lock", "w")
        except FileNotFoundError:  # another command has just finished
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, partial / "lock"):
                break
        except BlockingIOError:
            if time.monotonic() > end:
                file.close()
                raise ValueError(
                    f"{partial}: another command is writing this conversion; wait for it"
                ) from None
            time.sleep(0.1)
        file.close()
    with file:
        try:
            yield
        finally:
            # A refusal leaves nothing behind.
            if _is_at(file, partial / "lock") and len(list(partial.iterdir())) == 1:
                (partial / "lock").unlink()
                with suppress(OSError):
                    partial.rmdir()


def _is_at(file: IO, path: Path) -> bool:
    """Whether the open file is still the one of this name: the command that finishes
    removes it.
    """
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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


def _sync_folders(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync(path)
