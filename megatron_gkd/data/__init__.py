"""Rows of a data set -> `Sample` (student's and teacher's view) -> packed `Batch`, in an order
that depends on seed and step alone.
"""

from megatron_gkd.data.batch import Batch, BatchView, Packing, collate
from megatron_gkd.data.dataset import SampleDataset, load_datasets
from megatron_gkd.data.loader import eval_loader, num_steps_of_epochs, step_loader
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import Sample, View
from megatron_gkd.errors import BadRow, DataError

__all__ = [
    "BadRow",
    "Batch",
    "BatchView",
    "DataError",
    "DataReport",
    "Packing",
    "Sample",
    "SampleDataset",
    "View",
    "collate",
    "eval_loader",
    "load_datasets",
    "num_steps_of_epochs",
    "step_loader",
]
