"""The settings of the data. Imports nothing slow."""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from megatron_gkd.flags import (
    BELOW_1,
    NOT_NEGATIVE,
    require,
    require_at_least,
    require_in,
    require_not_empty,
    setting,
)

MAX_MEDIA_BYTES = 2**29  # 46 minutes of 48 kHz in one channel, 179 million pixels


@dataclass
class DataConfig:
    _argument_group_name = "data"

    dataset: list[str] = field(
        metadata={
            "help": "Files (.jsonl, .json, .csv, .tsv, each also as .gz; .parquet, .arrow), "
            "folders of files, or `datasets` names; NAME#N takes N samples, seeded."
        }
    )
    val_dataset: list[str] = setting([], "Evaluation data, in the same forms.")
    split_dataset_ratio: float = setting(
        0.0, "Share of --dataset that is set aside for evaluation."
    )
    download_datasets: bool = setting(
        False,
        "Let `datasets` fetch names of --dataset that are no file or folder here: the one use of "
        "the network.",
    )
    max_length: int = setting(
        2048,
        "Tokens of a data row, prompt and response together; a longer response is cut at its end "
        "and counted. A response that is written in the run has up to --max_completion_length "
        "tokens after the prompt, whatever this says.",
    )
    dataloader_num_workers: int = setting(0, "Worker processes that make batches.")
    dataset_num_proc: int = setting(1, "Processes, on each machine, that turn rows into tokens.")
    skip_bad_rows: bool = setting(
        False,
        "Count and skip rows that cannot be used; without it they stop the run before step 1.",
    )
    check_data: bool = setting(
        False, "Read and check the data, every medium too, print the report and stop."
    )
    show_row: str | None = setting(
        None,
        "Print a row as each view has it, token by token with what is trained marked, and stop. A "
        "number counts the rows of --dataset from 0, FILE:LINE is one of a file. One process is "
        "enough.",
    )
    columns: str | None = setting(
        None,
        'Other names for columns, as JSON: {"question": "query", "answer": "response"}.',
    )
    system: str | None = setting(
        None,
        "Text, or a .txt file, of the system turn of rows that have none; tokenised rows stay as "
        "they are.",
    )
    teacher_system: str | None = setting(
        None, "The same for the teacher's view; unset: --system. An empty text: none."
    )
    chat_template_kwargs: str | None = setting(
        None,
        'Variables of the chat template, as JSON: {"enable_thinking": false}. The column of this '
        "name wins, variable by variable.",
    )
    teacher_chat_template_kwargs: str | None = setting(
        None,
        "The teacher's variables of the chat template; what is not in them is as the student's.",
    )
    chat_template: str | None = setting(
        None, "A Jinja file that is the chat template, instead of the folder's own."
    )
    teacher_template: str | None = setting(
        None,
        "A Jinja file that makes the teacher's last user turn of the row's columns and of "
        "`response`: what the student has just written, in other steps the row's own.",
    )
    media_cache: str | None = setting(
        None,
        "Keep the features of audio, images and videos in this folder; ranks and runs may share "
        "it.",
    )
    max_media_bytes: int = setting(
        MAX_MEDIA_BYTES,
        "A medium that takes more bytes once it is decoded is refused: 4 a sample and channel of "
        "sound, 3 a pixel of a picture or of a video's frame.",
    )
    prepared_rows: str | None = setting(
        None,
        "Folder that keeps prepared rows for the next start that would make the same; runs and "
        "machines may share it. Default: megatron_gkd/prepared_rows in $XDG_CACHE_HOME or ~/.cache;"
        " none keeps none.",
    )
    prepared_rows_gib: float = setting(
        20.0, "Most that this folder keeps; what was unused for longest goes first."
    )

    def __post_init__(self):
        way_out = "0.01 sets one row in a hundred aside"
        require_in(self, BELOW_1, "split_dataset_ratio", way_out=way_out)
        require_at_least(self, 2, "max_length")
        require_not_empty(self, "teacher_template")
        require_at_least(self, 0, "dataloader_num_workers")
        require_at_least(self, 1, "dataset_num_proc", "max_media_bytes")
        require_in(
            self, NOT_NEGATIVE, "prepared_rows_gib", way_out="--prepared_rows none keeps none"
        )
        for name in self.dataset + self.val_dataset:
            require(bool(name.strip()), "dataset", repr(name), "a file or a name")
        if (path := self.chat_template) is not None:
            require(os.path.isfile(path), "chat_template", path, "a file with a template")
        for flag in ("columns", "chat_template_kwargs", "teacher_chat_template_kwargs"):
            if getattr(self, flag) is not None:
                json_object(getattr(self, flag), flag)
        for name, new in json_object(self.columns or "{}", "columns").items():
            require(isinstance(new, str), "columns", self.columns, f"a name for {name!r}")


def json_object(text: str, flag: str) -> dict[str, Any]:
    """The object that the JSON `text` of `flag` says. Raises ValueError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        value, reason = None, f"it is not JSON: {error}"
    else:
        reason = f"it is a {type(value).__name__}"
    way_out = f"{reason}; in a shell write it in single quotes, '{{\"name\": true}}'"
    require(isinstance(value, dict), flag, text, "a JSON object", way_out)
    return value
