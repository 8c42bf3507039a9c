"""What the tools' command lines share: flags from a dataclass, errors in one line, exit status 2."""

import os
import sys
import warnings
from dataclasses import field
from typing import Any, Callable, TypeVar

from transformers import HfArgumentParser

# megatron-core says on import, which follows this one, which accelerators are absent: a converter needs none.
for message in (".*Apex (is|are) not installed", "full scope is deprecated", "`torch.distributed.*deprecated"):
    warnings.filterwarnings("ignore", message=message)

Settings = TypeVar("Settings")


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def default_num_workers() -> int:
    return min(os.cpu_count() or 1, 8)


def run_command(settings: type[Settings], run: Callable[[Settings], str], description: str) -> None:
    """Parse the flags, run, print what `run` returns. A refusal is one line on stderr."""
    parser = HfArgumentParser(settings, description=description.strip().splitlines()[0])
    (config,) = parser.parse_args_into_dataclasses()
    try:
        print(run(config))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
