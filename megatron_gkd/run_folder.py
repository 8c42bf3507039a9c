"""What a run leaves to be read: metrics.jsonl, eval.jsonl, rollouts.jsonl, run.json, and the
progress on the screen; trackers get the same numbers.

Each logged step is one JSON object, flushed as it is written. A resumed run first drops the lines
after its checkpoint, so that the files read as if the run had never stopped; a run that starts at
step 0 moves an earlier one's files aside. Only the rank that is `enabled` writes anything.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_gkd.errors import naming
from megatron_gkd.line_file import LineFile
from megatron_gkd.trackers import Tracker

FILES = ("metrics", "eval", "rollouts")  # NAME.jsonl, a line at a time
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)


class MetricsWriter:
    """Writes the metrics of one run into `output_dir` and shows the progress from `start_step` to
    `total_steps`.

    `start_step` is the number of steps already done: 0 starts the files anew (see `_set_aside`),
    otherwise later lines are dropped. On a terminal there is a bar; in a log file one line for each
    logged step.
    """

    def __init__(
        self,
        output_dir: str,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        trackers: Sequence[Tracker] = (),
    ):
        self.total_steps, self.start_step, self.enabled = total_steps, start_step, enabled
        self._start_time = time.monotonic()
        self._files, self._trackers, self._bar = {}, trackers, None
        self.last_evaluation: int | None = None
        """The step of the last line of eval.jsonl at the start, where there is one"""
        if not enabled:
            return
        os.makedirs(output_dir, exist_ok=True)
        paths = {name: Path(output_dir, f"{name}.jsonl") for name in FILES}
        if start_step == 0:
            _set_aside([path for path in paths.values() if path.exists()])
        for name, path in paths.items():
            last = _keep_lines_until(path, start_step)
            if name == "eval":
                self.last_evaluation = last
            self._files[name] = LineFile(path)
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
            )

    def log_train(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl. `values["step"]` counts from 1; NaN and Inf are written as
        null.
        """
        if not self.enabled:
            return
        self._write("metrics", "train", values)
        progress = progress_text(values)
        if self._bar is not None:
            self._bar.set_postfix_str(progress, refresh=False)
            self._bar.update(values["step"] - self._bar.n)
        else:
            print(
                f"step {values['step']}/{self.total_steps}  {progress}  "
                f"{self._time_left(values['step'])} left",
                flush=True,
            )

    def log_eval(self, values: dict[str, Any]) -> None:
        """One line of eval.jsonl, for the model after `values["step"]` steps."""
        if not self.enabled:
            return
        self._write("eval", "eval", values)
        line = f"eval after step {values['step']}  " + "  ".join(
            f"{name} {value:.4g}"
            for name, value in values.items()
            if name != "step" and _is_number(value)
        )
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def log_rollouts(self, lines: Sequence[dict[str, Any]]) -> None:
        """Lines of rollouts.jsonl, which are all of one step (rollout_log.py)."""
        if self.enabled and lines:
            self._append("rollouts", lines)

    def close(self) -> None:
        """Close the files; the writer is not used afterwards."""
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, name: str, group: str, values: dict[str, Any]) -> None:
        finite = _finite(values)
        self._append(name, [finite])
        numbers = {
            f"{group}/{key}": value
            for key, value in _flat(finite)
            if key != "step" and _is_number(value)
        }
        for tracker in self._trackers:
            tracker.log(numbers, values["step"])

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        texts = [json.dumps(_finite(one), allow_nan=False, ensure_ascii=False) for one in lines]
        self._files[name].append("".join(text + "\n" for text in texts))

    def _time_left(self, step: int) -> str:
        seconds_per_step = (time.monotonic() - self._start_time) / max(step - self.start_step, 1)
        return tqdm.format_interval(seconds_per_step * max(self.total_steps - step, 0))


def _finite(value: Any) -> Any:
    """NaN and Inf, at any depth, as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`by_source/NAME/jsd` and its value, and so on."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def progress_text(values: dict[str, Any]) -> str:
    """The metrics of a step that stand beside the progress; what was not measured is left out."""
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:.0f} tokens/s",
        "peak_memory_gib": "{:.2f} GiB",
    }
    return "  ".join(text.format(values[name]) for name, text in formats.items() if name in values)


def _set_aside(paths: list[Path]) -> None:
    """Move what an earlier run wrote to NAME.N.jsonl, N the first free number, and say so."""
    if not any(path.stat().st_size for path in paths):
        return
    number = 1
    while any(path.with_suffix(f".{number}.jsonl").exists() for path in paths):
        number += 1
    moved = [path.rename(path.with_suffix(f".{number}.jsonl")) for path in paths]
    print(
        f"An earlier run wrote here; its lines are now in {', '.join(map(str, moved))}",
        flush=True,
    )


def _keep_lines_until(path: Path, step: int) -> int | None:
    """Rewrite a file of metrics with the lines up to `step`; a last line torn by a kill goes.
    Returns the step of the last one.
    """
    if not path.exists():
        return None
    # a text may hold what splitlines() takes for the end of a line
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    lines = lines if lines != [""] else []
    kept, last = [], None
    for number, line in enumerate(lines, start=1):
        try:
            if (found := json.loads(line)["step"]) <= step:
                kept.append(line + "\n")
                last = found
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: not a line of metrics ({error!r}); repair or remove it"
                ) from None
    write_atomically(path, "".join(kept))
    return last


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file at `path` by `text`; a reader, or a kill, meanwhile finds the old or the new
    one, whole.
    """
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with naming(path), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_run_json(
    output_dir: str,
    config: dict[str, Any],
    versions: dict[str, str],
    parameters: dict[str, int],
    layout: dict[str, int],
    hardware: dict[str, str],
) -> None:
    """Write OUTPUT/run.json: the job that torchrun was started as, settings (`Config.to_dict()`),
    `package_versions()`, parameter counts, parallel sizes, the name of the device, and when: now,
    with the offset of the time zone.
    """
    os.makedirs(output_dir, exist_ok=True)
    contents = {
        "job": os.environ.get("TORCHELASTIC_RUN_ID"),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": config,
        "versions": versions,
        "parameters": parameters,
        "layout": layout,
        "hardware": hardware,
    }
    write_atomically(
        Path(output_dir, "run.json"), json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    )


def was_begun_by_this_job(output_dir: str) -> bool:
    """Whether the run in OUTPUT is this one, which torchrun has started again: after a failure, or
    with another number of machines. The launcher gives every job an id of its own, as --rdzv_id is
    meant to be; without one a restart counts.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        begun_by = json.loads(Path(output_dir, "run.json").read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError, AttributeError):
        return False
    return job is not None and begun_by == job and (job != "none" or restarts > 0)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on; "not installed" where
    one is missing.
    """
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
