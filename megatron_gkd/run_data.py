"""The data of a run: read once it is clear that the layout fits the model, checked, a row of them
shown.
"""

import os
import platform
from dataclasses import replace
from functools import partial

from megatron_gkd.config import Config, flag_targets, layout_line
from megatron_gkd.data import SampleDataset, load_datasets, num_steps_of_epochs
from megatron_gkd.data.show_row import show_row
from megatron_gkd.formats.loading import check_headers
from megatron_gkd.identity import check_same_content
from megatron_gkd.model.args import ModelArgs, read_model_args
from megatron_gkd.output_dir import check_output_dir
from megatron_gkd.output_lock import OutputLock
from megatron_gkd.parallel import Parallel, agreed, first_error, log_rank_0, world_max
from megatron_gkd.trackers import check_installed
from megatron_gkd.zero_signal import check_responses


def read_data(
    config: Config, parallel: Parallel, lock: OutputLock | None
) -> tuple[ModelArgs, SampleDataset, SampleDataset | None]:
    """(sizes of the model, training data, evaluation data or None), once it is clear that the
    layout fits the model and that all ranks can write into --output_dir, whose lock rank 0 takes;
    without a `lock` nothing is written there, and weights are not looked at. Raises ValueError,
    OSError or DataError. Collectives: those of `agreed`, `first_error`, `check_output_dir` and
    `load_data`.
    """
    many, refusal = parallel.world_size > 1, ""
    where = f"rank {parallel.rank} (on {platform.node()}): " if many else ""
    with agreed(parallel.device, where):
        try:
            model_args = read_model_args(config.model.model)
            if lock is not None:
                check_headers(config.model.model, model_args)
        except ValueError as error:
            refusal = f"{where}{error}"
    if refusal := first_error(refusal, parallel.device):
        raise ValueError(refusal)  # on every rank: it is none of what a second try may find mended
    flag_targets(config.lora, model_args)  # raises before the data are read
    log_rank_0(parallel, layout_line(config, parallel.world_size, model_args))
    if lock is not None:
        check_output_dir(config.run.output_dir, parallel, lock, config.faults.take_over_output_dir)
        check_installed(config.run.report_to)
    train_data, eval_data = load_data(config, model_args, parallel)
    return model_args, train_data, eval_data


def load_data(
    config: Config, model_args: ModelArgs, parallel: Parallel
) -> tuple[SampleDataset, SampleDataset | None]:
    """(train, evaluation or None). Raises DataError for bad rows, ValueError where the ranks have
    not all the same content. Collectives: two maxima of a number over the world, and those of
    `check_same_content`.
    """
    train_data, eval_data = load_datasets(
        config.data,
        config.model.model,
        model_args.vocab_size,
        config.train.seed,
        parallel.rank,
        partial(world_max, device=parallel.device),
        writes_responses=config.distill.writes_responses,
        log=partial(log_rank_0, parallel),
    )
    check_same_content(config, train_data, eval_data, parallel.device)
    log_rank_0(parallel, f"Data: {train_data.report.summary()}")
    if eval_data:
        log_rank_0(parallel, f"Evaluation data: {eval_data.report.summary()}")
    return train_data, eval_data


def check_data(config: Config, parallel: Parallel) -> None:
    """--check_data: read the data, every medium too, and print the report. Raises DataError for bad
    rows.
    """
    _, train_data, eval_data = read_data(config, parallel, lock=None)
    bad = sum(data.report.num_skipped for data in (train_data, eval_data) if data is not None)
    check_responses(with_max_steps(config, len(train_data), parallel), train_data)
    kept = "all others are good" if bad else "every row is good"
    log_rank_0(parallel, f"--check_data: {kept}; no training was asked for")


def print_row(config: Config) -> None:
    """--show_row: print the row. One process does it; of several, rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    assert config.data.show_row is not None
    vocab_size = read_model_args(config.model.model).vocab_size
    wanted, seed = config.data.show_row, config.train.seed
    print(show_row(wanted, config.data, config.model.model, vocab_size, seed), flush=True)


def with_max_steps(config: Config, num_rows: int, parallel: Parallel) -> Config:
    """The settings with --max_steps filled in, from --num_train_epochs where it is unset."""
    train = config.train
    if train.max_steps >= 0:
        return config
    num_steps = num_steps_of_epochs(
        num_rows, train.global_batch_size(parallel.dp_size), train.num_train_epochs
    )
    return replace(config, train=replace(train, max_steps=num_steps))
