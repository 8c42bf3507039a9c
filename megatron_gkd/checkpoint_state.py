"""trainer_state.json of a checkpoint: what it must have, read and checked."""

import json
import re
from pathlib import Path
from typing import Any

from megatron_gkd.checkpoint_files import OPTIMIZER, STATE
from megatron_gkd.json_fields import OBJECT, TEXT, TRUTH, Form, check_fields, is_number, whole

_STATE_KEYS = ("step", "num_updates", "loss_scale", "lora")  # besides what the caller adds
_MOST_STEPS = 10**9 - 1
_WAY_OUT = "; resume from another checkpoint"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


_COUNT = whole(0, _MOST_STEPS)
_ABOVE_0 = Form("a number above 0", lambda value: is_number(value) and value > 0)

_SCALE = Form(
    "empty or an object with scale, a number above 0, growth_tracker and hysteresis_tracker",
    lambda value: (
        value == {}
        or isinstance(value, dict)
        and _ABOVE_0.holds(value.get("scale"))
        and all(is_number(value.get(f"{name}_tracker")) for name in ("growth", "hysteresis"))
    ),
)
_ROWS = Form(
    "null or an object with rows, a count, and digests, a list of texts",
    lambda value: (
        value is None
        or isinstance(value, dict)
        and _COUNT.holds(value.get("rows"))
        and (value.get("digests") == [] or _are_names(value.get("digests")))
    ),
)
_FORMS = {
    "step": _COUNT,
    "num_updates": _COUNT,
    "loss_scale": _SCALE,
    "lora": OBJECT,
    "settings": OBJECT,
    "data": OBJECT,
    "identity": OBJECT,
    "teacher": TRUTH,
    "on_policy_steps": _COUNT,
    "skipped_steps": _COUNT,
    "bad_in_a_row": _COUNT,
    "has_learned": TRUTH,
    "zero_gradient_steps": _COUNT,
    "zero_gradients_in_a_row": _COUNT,
}
_LORA_FORMS = {
    "rank": whole(1, 2**31 - 1),
    "alpha": _ABOVE_0,
    "targets": Form("a list of names", _are_names),
    "use_rslora": TRUTH,
    "dropout": Form("a number from 0 to below 1", lambda v: is_number(v) and 0 <= v < 1),
    "towers": TRUTH,
}
_DATA_FORMS = {"dataset": _ROWS, "val_dataset": _ROWS}
_IDENTITY_FORMS = {
    "weights": TEXT,
    "software": OBJECT,
}
_LORA_KEYS = ("rank", "alpha", "targets", "towers")


def read_state(folder: Path, *more_keys: str) -> dict[str, Any]:
    """trainer_state.json, which must have `more_keys` too. Raises FileNotFoundError for a
    checkpoint that holds only the adapter, or lacks the file; ValueError naming the file and the
    field where it is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"--resume_from_checkpoint {folder}: {_why_no_state(folder)}")
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); resume from another checkpoint") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: damaged (not a JSON object); resume from another checkpoint")
    missing = {*_STATE_KEYS, *more_keys} - state.keys()
    if missing:
        raise ValueError(
            f"{path}: lacks {', '.join(sorted(missing))}; resume from another "
            f"checkpoint, or start from its weights with --adapter {folder}"
        )
    check_fields(path, state, _FORMS, _WAY_OUT)
    for field, forms, keys in (
        ("lora", _LORA_FORMS, _LORA_KEYS),
        ("data", _DATA_FORMS, ()),
        ("identity", _IDENTITY_FORMS, tuple(_IDENTITY_FORMS)),
    ):
        if field not in state:  # of an earlier version
            continue
        if lacking := [key for key in keys if key not in state[field]]:
            raise ValueError(
                f"{path}: {field} lacks {', '.join(lacking)}; resume from another checkpoint"
            )
        inner = {f"{field}.{name}": form for name, form in forms.items()}
        values = {f"{field}.{name}": value for name, value in state[field].items()}
        check_fields(path, values, inner, _WAY_OUT)
    return state


def check_step(folder: Path, step: int) -> None:
    """Raise ValueError where `folder` is checkpoint-N and its state is of another step."""
    match = _FOLDER.fullmatch(folder.name)
    if match and int(match[1]) != step:
        raise ValueError(
            f"{folder / STATE}: step is {step:,}, and the folder's name says {int(match[1]):,}: "
            "of another checkpoint; resume from another one"
        )


def _why_no_state(folder: Path) -> str:
    if (folder / OPTIMIZER).is_file():
        return (
            f"{STATE} is missing beside {OPTIMIZER}, the checkpoint is not complete; resume from "
            f"another one, or start from its weights with --adapter {folder}"
        )
    return f"holds only the adapter (--save_only_model); start from it with --adapter {folder}"
