"""trainer_state.json of a checkpoint: what it must have, read and checked."""

import json
from pathlib import Path
from typing import Any

from megatron_gkd.checkpoint_files import STATE

_STATE_KEYS = ("step", "num_updates", "loss_scale", "lora")  # besides what the caller adds


def read_state(folder: Path, *more_keys: str) -> dict[str, Any]:
    """trainer_state.json, which must have `more_keys` too. Raises FileNotFoundError for a
    checkpoint that holds only the adapter, ValueError naming the file where it is damaged.
    """
    if not (folder / STATE).is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {folder}: holds only the adapter (--save_only_model); "
            f"start from it with --adapter {folder}"
        )
    try:
        state = json.loads((folder / STATE).read_text())
        missing = {*_STATE_KEYS, *more_keys} - state.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder / STATE}: damaged ({error}); resume from another checkpoint"
        ) from error
    if missing:
        raise ValueError(
            f"{folder / STATE}: lacks {', '.join(sorted(missing))}; resume from another "
            f"checkpoint, or start from its weights with --adapter {folder}"
        )
    return state
