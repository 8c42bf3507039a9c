"""What a run depends on, written down and compared where it meets again: between the ranks at the
start, and when a checkpoint is resumed.
"""

import hashlib
import json
import math
import os
import platform
from typing import Any

import torch

from megatron_gkd.config import Config
from megatron_gkd.content_digest import code_digest, weights_digest
from megatron_gkd.data import SampleDataset
from megatron_gkd.errors import short_repr
from megatron_gkd.parallel import Parallel, first_error, from_rank_0, largest
from megatron_gkd.run_folder import package_versions

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
    "max_media_bytes",
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

# What each machine may have as it likes: places, whose content is compared, and its own work.
OF_A_MACHINE = {
    "model",
    "teacher_model",
    "adapter",
    "teacher_adapter",
    "dataset",
    "val_dataset",
    "chat_template",
    "teacher_template",
    "output_dir",
    "media_cache",
    "prepared_rows",
    "prepared_rows_gib",
    "dataloader_num_workers",
    "dataset_num_proc",
}


def check_same(own: dict[str, Any], device: torch.device, way_out: str) -> None:
    """Raise ValueError, on every rank, where the values of some rank are not rank 0's: it names the
    first such rank, its machine and what differs, with both values. own: JSON, by name.

    Collectives: a maximum of two numbers over the world; only where ranks differ, two broadcasts
    of rank 0's values and those of `first_error`.
    """
    text = json.dumps(own, sort_keys=True, default=str).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    high, low = largest([digest, -digest], device)
    if high == -low:
        return
    (size,) = from_rank_0([len(text)], device)
    first = json.loads(bytes(from_rank_0(list(text.ljust(size))[:size], device)))
    mine, error = json.loads(text), ""
    names = [name for name in {**first, **mine} if mine.get(name) != first.get(name)]
    if names:
        name, *others = names
        rank, more = torch.distributed.get_rank(), f" (and {len(others)} more)" if others else ""
        error = (
            f"rank {rank} (on {platform.node()}) has {name} {short_repr(mine.get(name))}, rank 0 "
            f"has {short_repr(first.get(name))}{more}: {way_out}"
        )
    raise ValueError(first_error(error, device))


def check_same_start(config: Config, device: torch.device) -> None:
    """Raise ValueError, on every rank, unless all were started with the same flags, versions and
    code. Called before the groups of the layout are made, about which they may disagree.
    Collectives: those of `check_same`.
    """
    flags = {
        f"--{name}": value
        for values in config.to_dict().values()
        for name, value in values.items()
        if name not in OF_A_MACHINE
    }
    if resumes := flags["--resume_from_checkpoint"]:  # a place: `latest`, or the name of its folder
        flags["--resume_from_checkpoint"] = os.path.basename(os.path.normpath(resumes))
    own = flags | _software()
    check_same(own, device, "start all machines with the same flags, packages and code")


def check_same_content(
    config: Config,
    train_data: SampleDataset,
    eval_data: SampleDataset | None,
    device: torch.device,
) -> None:
    """Raise ValueError, on every rank, unless all have the same rows, weights and adapters: each
    finds its own rows of a step by their numbers and lengths, so with others the steps would be
    wrong, or never end. Collectives: those of `check_same`.
    """
    own: dict[str, Any] = {
        "rows of --dataset": _rows_and_digest(train_data),
        "rows of --val_dataset": _rows_and_digest(eval_data),
        "weights of --model": weights_digest(config.model.model),
    }
    for flag, folder in (
        ("--adapter", config.lora.adapter),
        ("--teacher_adapter", config.distill.teacher_adapter),
        ("--resume_from_checkpoint", config.run.resume_from_checkpoint),
    ):
        if folder and folder != "latest":  # which rank 0 finds
            own[f"weights of {flag}"] = weights_digest(folder)
    files = f"--dataset {' '.join(config.data.dataset)}, --model {config.model.model}"
    way_out = f"it has {files}; all machines must have the same files of --dataset, --val_dataset "
    check_same(own, device, f"{way_out}and their media, and of --model and the adapters")


def _rows_and_digest(data: SampleDataset | None) -> str:
    if data is None:
        return "0 rows"
    (digest,) = data.digests(len(data))
    return f"{len(data)} rows {digest[:15]}"


def _software() -> dict[str, str]:
    versions = {f"version of {name}": found for name, found in package_versions().items()}
    return versions | {"code of megatron_gkd": code_digest()}


def identity_state(config: Config) -> dict[str, Any]:
    """What a resumed run should have again beside settings and rows."""
    return {"weights": weights_digest(config.model.model), "software": _software()}


def changed_identity(
    before: dict[str, Any], now: dict[str, Any], model: str
) -> tuple[list[str], list[str]]:
    """(what must not have changed without notice, what may have) between two `identity_state`, a
    line each. model: --model, for the lines.
    """
    changes = []
    if before["weights"] != now["weights"]:
        changes.append(
            f"the weights of --model {model} are not those of the checkpoint "
            f"(digest {before['weights']}, now {now['weights']})"
        )
    notes = [
        f"{name} was {before['software'].get(name)} and is {value}"
        for name, value in now["software"].items()
        if before["software"].get(name) != value
    ]
    return changes, notes


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
        notes.append(f"{flag} {change}")
    return notes
