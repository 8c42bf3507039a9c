"""What the tools' command lines share: flags from a dataclass, one-line errors, exit status 2."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from megatron_gkd.flags import Parser, refuse_unknown

Settings = TypeVar("Settings")


def num_workers_setting() -> Any:
    """Two at least: one reads while the other writes."""
    return field(
        default_factory=lambda: max(2, min(os.cpu_count() or 1, 8)),
        metadata={"help": "Processes. Default: CPUs, at least 2, at most 8."},
    )


def check_num_workers(num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"--num_workers {num_workers}: must be 1 or more")


def parse_flags(settings: type[Settings], description: str) -> Settings:
    """The command line. Raises ValueError naming the flag."""
    parser = Parser([settings], description=description.strip().splitlines()[0])
    refuse_unknown(sys.argv[1:], parser)
    (config,), _ = parser.parse(sys.argv[1:])
    return config


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """An expected error inside becomes one line on stderr, from rank 0 where there are several, and
    exit status 2.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{Path(sys.argv[0]).stem}: error: {' '.join(str(error).split())}", file=sys.stderr
            )
        raise SystemExit(2) from None


def run_command(settings: type[Settings], run: Callable[[Settings], str], description: str) -> None:
    """Parse the flags, run, print what `run` returns."""
    with refusals_in_one_line():
        print(run(parse_flags(settings, description)))
