"""Which of the stored rows go where: good ones and bad ones, those with a response, training and
evaluation.
"""

from functools import reduce
from operator import add

import numpy as np

from megatron_gkd.data.order import SPLIT, permutation
from megatron_gkd.data.report import view_lengths
from megatron_gkd.data.stored_rows import StoredRows
from megatron_gkd.errors import BadRow, DataError

NO_RESPONSE = (
    "no response, and no step of the run writes one: give it one, or set --lmbda above 0 (1 where "
    "all rows are prompts alone) or --seq_kd true"
)


def separate(parts: list[StoredRows]) -> tuple[StoredRows, list[BadRow]]:
    """Good rows in the order of files and lines, and the bad ones."""
    rows = reduce(add, parts)
    reasons = rows.columns("reason")["reason"].to_pylist()
    bad = [index for index, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return rows, []
    bad_rows = [BadRow(**row) for row in rows.select(bad).columns(*BadRow._fields).to_pylist()]
    return rows.select([index for index, reason in enumerate(reasons) if reason is None]), bad_rows


def with_response(rows: StoredRows) -> tuple[StoredRows, list[BadRow]]:
    """The rows with a response, and the others as bad rows."""
    has_response = view_lengths(rows).has_response
    without = rows.select(np.flatnonzero(~has_response))
    locations = without.columns("location")["location"].to_pylist()
    return rows.select(np.flatnonzero(has_response)), [
        BadRow(location, NO_RESPONSE) for location in locations
    ]


def split(rows: StoredRows, ratio: float, seed: int) -> tuple[StoredRows, StoredRows]:
    """(train, evaluation): evaluation is a seeded share of the rows; at least one row on each side,
    both in their old order.
    """
    num_eval = max(1, int(len(rows) * ratio))
    if num_eval >= len(rows):
        raise DataError(
            f"--split_dataset_ratio {ratio} of {len(rows)} rows leaves no row to train on"
        )
    chosen = permutation(len(rows), seed, SPLIT)
    train, evaluation = sorted(chosen[num_eval:].tolist()), sorted(chosen[:num_eval].tolist())
    return rows.select(train), rows.select(evaluation)
