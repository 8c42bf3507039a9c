"""What a process says as it ends. Under megatron_gkd.launch a rank hands its line over, and the
launcher prints one when all ranks have ended: that of the first that has failed.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

LAUNCHER = "MEGATRON_GKD_LAUNCHER"
"""The environment variable with the launcher's process number"""
SECONDS_FOR_RANK_0 = 5  # to come to its error and end, and for torchrun to end the others


def say(line: str, transient: bool = False) -> None:
    """To the launcher, where it lives; otherwise to stderr. transient: what was wrong may be right
    at the next start.
    """
    is_handed_over = _hand_over(line, transient)
    if not (is_handed_over and os.environ.get(LAUNCHER) == str(os.getppid())):
        rank = os.environ.get("RANK", "0")
        warn(f"error{'' if rank == '0' else f' (rank {rank})'}: {line}")


def say_in_turn(line: str, transient: bool = False) -> None:
    """As `say`. Most errors are those of every rank. Rank 0 speaks at once and ends; without a
    launcher the others wait a moment before they do, in which torchrun ends them. What only some
    ranks have seen (a file that a node lacks) is said by those.
    """
    if os.environ.get("RANK", "0") != "0" and LAUNCHER not in os.environ:
        time.sleep(SECONDS_FOR_RANK_0)
    say(line, transient)


def warn(line: str) -> None:
    """A line to stderr."""
    with suppress(OSError):  # nobody may listen any more
        print(f"megatron_gkd: {line}", file=sys.stderr, flush=True)


def _hand_over(line: str, transient: bool) -> bool:
    """Into the file where torchrun and the launcher look for it; whether there is one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    record = {
        "message": line,
        "transient": transient,
        "extraInfo": {"timestamp": str(int(time.time()))},
    }
    try:
        Path(path).write_text(json.dumps({"message": record}))
    except OSError:
        return False
    return True
