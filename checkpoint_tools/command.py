"""What the tools' command lines share: flags from a dataclass, one-line errors, exit status 2."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from megatron_gkd.flags import Parser, refuse_unknown
from megatron_gkd.stop_requests import end_at_once_on_signals

Settings = TypeVar("Settings")


def parse_flags(settings: type[Settings], description: str) -> Settings:
    """The command line; a mistake ends the process with one line naming the flag and exit status 2,
    from now on a signal with one line. Called before the slow imports.
    """
    end_at_once_on_signals()
    with refusals_in_one_line():
        parser = Parser([settings], description=first_paragraph(description))
        refuse_unknown(sys.argv[1:], parser)
        (config,), _ = parser.parse(sys.argv[1:])
    return config


def first_paragraph(text: str) -> str:
    """What --help shows of a module's docstring, in one line that argparse wraps."""
    return " ".join(text.strip().split("\n\n")[0].split())


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


def run_command(config: Settings, run: Callable[[Settings], str]) -> None:
    """Run and print the line that `run` returns."""
    with refusals_in_one_line():
        print(run(config))
