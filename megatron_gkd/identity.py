"""What a run depends on, written down so that it can be compared where it meets again: when a
checkpoint is resumed.
"""

import math
from typing import Any

from megatron_gkd.config import Config
from megatron_gkd.data import SampleDataset
from megatron_gkd.parallel import Parallel

WILL_DIFFER = "the resumed run will differ from one that was never stopped"
# Settings that may change on resume without a note: the first group changes no number, or names
# rows, which are compared themselves; the second is covered by global_batch_size and total_steps;
# how a step's rows are cut into micro-batches changes rounding and dropout's draws, as another
# layout does.
FREE_SETTINGS = {
    "dataset",
    "val_dataset",
    "prepared_rows",
    "prepared_rows_gib",
    "dataloader_num_workers",
    "dataset_num_proc",
    "media_cache",
    "check_data",
    "download_datasets",
    "allow_zero_signal",
    "max_bad_steps",
}
FREE_SETTINGS |= {
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_micro_batch",
    "max_steps",
    "num_train_epochs",
}


def run_settings(config: Config, parallel: Parallel) -> dict[str, Any]:
    """What makes the numbers of a run, by name: a resumed one should have the same."""
    groups = config.to_dict()
    found = {
        name: value
        for group in ("data", "distill", "rollout", "train")
        for name, value in groups[group].items()
        if name not in FREE_SETTINGS
    }
    found |= {"torch_dtype": config.model.torch_dtype, "lora_dropout": config.lora.lora_dropout}
    return found | {
        "global_batch_size": config.train.global_batch_size(parallel.dp_size),
        "total_steps": config.train.max_steps,
    }


NUM_BLOCKS = 64  # of rows, with a digest each


def data_state(
    train_data: SampleDataset, eval_data: SampleDataset | None
) -> dict[str, dict[str, Any] | None]:
    """What a resumed run should have again: numbers of rows, and digests of NUM_BLOCKS parts of
    what was made of them, by flag.
    """
    return {
        flag: {"rows": len(data), "digests": data.digests(_rows_of_block(len(data)))}
        if data
        else None
        for flag, data in (("dataset", train_data), ("val_dataset", eval_data))
    }


def _rows_of_block(num_rows: int) -> int:
    return math.ceil(num_rows / NUM_BLOCKS)


def changed_rows(
    before: dict[str, Any], train_data: SampleDataset, eval_data: SampleDataset | None
) -> list[str]:
    """A line for each part of the data whose rows are others than in `before`, with the place of
    the first; of a checkpoint that does not tell none.
    """
    notes = []
    for flag, data in (("dataset", train_data), ("val_dataset", eval_data)):
        if flag not in before:
            continue
        then = before[flag] or {"rows": 0, "digests": []}
        num_rows = len(data) if data else 0
        block = max(1, _rows_of_block(then["rows"]))
        found = data.digests(block) if data else []
        if found == then["digests"]:
            continue
        change = f"had {then['rows']} rows and has {num_rows}"
        if num_rows == then["rows"]:
            change = f"has {num_rows} rows as before, but not the same"
        same = [old == new for old, new in zip(then["digests"], found)]
        first = block * (same.index(False) if False in same else len(same))
        if data and first < num_rows:
            last = min(first + block, num_rows) - 1
            change += f", the first other one is {data.location(first)}"
            change += f", or follows it up to {data.location(last)}" * (last > first)
        notes.append(f"Note: {flag} {change}: {WILL_DIFFER}")
    return notes
