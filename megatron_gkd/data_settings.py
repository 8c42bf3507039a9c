"""The settings of the data. Imports nothing slow."""

from dataclasses import dataclass, field

from megatron_gkd.flags import BELOW_1, require, require_at_least, require_in, setting


@dataclass
class DataConfig:
    _argument_group_name = "data"

    dataset: list[str] = field(
        metadata={
            "help": "Files (.jsonl, .parquet) or `datasets` names; NAME#N takes N samples, seeded."
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
        "and counted. A response that "
        "is written in the run has up to --max_completion_length tokens after the prompt, "
        "whatever this says.",
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
    media_cache: str | None = setting(
        None,
        "Keep the features of audio, images and videos in this folder; ranks and runs may share "
        "it.",
    )

    def __post_init__(self):
        way_out = "0.01 sets one row in a hundred aside"
        require_in(self, BELOW_1, "split_dataset_ratio", way_out=way_out)
        require_at_least(self, 2, "max_length")
        require_at_least(self, 0, "dataloader_num_workers")
        require_at_least(self, 1, "dataset_num_proc")
        for name in self.dataset + self.val_dataset:
            require(bool(name.strip()), "dataset", repr(name), "a file or a name")
