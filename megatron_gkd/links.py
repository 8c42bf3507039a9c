"""Links of the file system that lead nowhere, called that."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path


def check_link(path: str | Path, flag: str = "") -> None:
    """Raise FileNotFoundError, naming the link and where it leads, where `path` or a folder above
    it is a link that leads nowhere. Whatever else is wrong with `path` passes. flag: the beginning
    of the message.
    """
    path = Path(path)
    for part in (path, *path.parents):
        if not part.is_symlink():
            continue
        if where := _where_it_ends(part):
            raise FileNotFoundError(f"{flag}{part} is a link {where}")


def check_links(folder: str | Path, suffixes: Iterable[str], flag: str = "") -> None:
    """`check_link` for a folder and for its files whose names end in one of `suffixes`."""
    check_link(folder, flag)
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        links = sorted(entry.path for entry in entries if entry.is_symlink())
    for path in links:
        if path.endswith(tuple(suffixes)):
            check_link(path, flag)


def _where_it_ends(link: Path) -> str:
    """Of a link that leads nowhere, for the end of a message; of another nothing."""
    try:
        link.stat()
    except FileNotFoundError:
        return f"to {os.path.realpath(link)}, which is not there"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"to {os.readlink(link)}, that leads in a circle"
        return f"to {os.readlink(link)}, that cannot be followed: {error.strerror}"
    return ""
