"""Signals that ask a run to stop: it finishes its step, saves and says how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_gkd.checkpoint import checkpoint_folder
from megatron_gkd.run import Run


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM in a list instead of dying: the loop looks at it after each step."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped_line(run: Run) -> str:
    """What a run that was asked to stop says at its end, when it has saved."""
    settings, step = run.config.run, run.progress.step
    way_on = "--resume_from_checkpoint latest"
    if settings.save_only_model:
        way_on = f"--adapter {checkpoint_folder(settings.output_dir, step)} (--save_only_model)"
    return f"SIGTERM: stopped after step {step} of {run.total_steps}; go on with {way_on}"
