"""Where the numbers of a run go besides its own files (--report_to): TensorBoard, Weights & Biases,
SwanLab. The last two are optional packages, and send to their servers unless WANDB_MODE or
SWANLAB_MODE says offline.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb", "swanlab", "none"]
PROJECT = "megatron_gkd"  # unless WANDB_PROJECT or SWANLAB_PROJ_NAME names another
EXTRAS = ("wandb", "swanlab")  # names of packages, and of the extras that install them


class Tracker(Protocol):
    """Takes numbers as they come. Raises nothing for a network that fails meanwhile."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers of a step by their names: `train/loss`, `eval/jsd`."""
        ...

    def close(self) -> None:
        """The run is over, however it ended."""
        ...


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raise ValueError for a tracker whose package is missing: before minutes go into weights."""
    for name in EXTRAS:
        if name in names and find_spec(name) is None:
            raise ValueError(
                f"--report_to {name}: the package {name} is not installed; `pip install "
                f"'megatron_gkd[{name}]'`, or leave it out"
            )


def open_trackers(
    names: Sequence[TrackerName], output_dir: str, start_step: int, settings: dict[str, Any]
) -> list[Tracker]:
    """The trackers of a run that goes on from `start_step`; settings: its configuration, for those
    that show it. Raises ValueError where one cannot start.
    """
    found: list[Tracker] = []
    try:
        for name in names:
            if name == "tensorboard":
                found.append(TensorBoard(output_dir, start_step))
            elif name == "wandb":
                found.append(WeightsAndBiases(output_dir, start_step, settings))
            elif name == "swanlab":
                found.append(SwanLab(output_dir, start_step, settings))
    except Exception as error:  # other people's code: any kind
        for tracker in found:
            tracker.close()
        offline = f"; {name.upper()}_MODE=offline keeps it in {output_dir}" * (name in EXTRAS)
        raise ValueError(f"--report_to {name}: {type(error).__name__}: {error}{offline}") from error
    return found


class TensorBoard:
    """Event files in OUTPUT/tensorboard. Those of steps that a resumed run takes again are marked
    as void.
    """

    def __init__(self, output_dir: str, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            os.path.join(output_dir, "tensorboard"),
            purge_step=start_step + 1 if start_step else 0,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb in OUTPUT/wandb. What was sent cannot be taken back, so a resumed run is
    another one of the same group, with `step` as the axis of both.
    """

    def __init__(self, output_dir: str, start_step: int, settings: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            dir=output_dir,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _run_name(output_dir, start_step)),
            group=os.environ.get("WANDB_RUN_GROUP", _run_name(output_dir, 0)),
            config=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values | {"step": step})

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """An experiment of swanlab in OUTPUT/swanlog; a resumed run is another of the same group."""

    def __init__(self, output_dir: str, start_step: int, settings: dict[str, Any]):
        import swanlab

        self._run = swanlab.init(
            log_dir=os.path.join(output_dir, "swanlog"),
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=os.environ.get("SWANLAB_EXP_NAME", _run_name(output_dir, start_step)),
            group=_run_name(output_dir, 0),
            config=settings,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_name(output_dir: str, start_step: int) -> str:
    """`NAME`, or `NAME from step 50`."""
    name = Path(output_dir).resolve().name
    return f"{name} from step {start_step}" if start_step else name
