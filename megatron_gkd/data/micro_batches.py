"""The rows of a step -> micro-batches of about equal cost, the same number on every data-parallel
rank. A pure function of the rows' lengths, so that every rank finds the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_gkd.model.args import ModelArgs


@dataclass(frozen=True)
class Budget:
    """How much a micro-batch may hold."""

    max_tokens: int
    """Of its rows' heavier views together; a larger row is a micro-batch of its own"""
    attention_tokens: float = math.inf
    """The length of a row at which attention over its keys costs as much as all products do"""
    at_least: int = 1
    """Micro-batches of a rank: pipeline stages want several"""

    def cost(self, num_tokens: Any) -> Any:
        """Of a row of so many tokens (or each of an array), in tokens of a short row."""
        return num_tokens * (1 + num_tokens / self.attention_tokens)


def attention_tokens(model_args: ModelArgs) -> float:
    """`Budget.attention_tokens` of a model. Multiplications of a token in a layer: of the products
    its parameters; of causal attention over a row of n tokens n/2 keys x 2 x heads x head size.
    """
    heads = model_args.num_attention_heads * model_args.head_dim
    groups = model_args.num_key_value_heads * model_args.head_dim
    expert = 3 * model_args.hidden_size * model_args.moe_intermediate_size
    products = model_args.hidden_size * (2 * heads + 2 * groups)
    return (products + model_args.num_experts_per_tok * expert) / heads


def most_tokens(longest: int, num_rows: int, budget: Budget, row_multiple: int = 1) -> int:
    """Positions that a micro-batch from `cut` can have: an upper bound. longest: tokens of the
    longest row; num_rows: of a step; row_multiple: of which a row's positions are one.
    """
    longest_padded = -(-longest // row_multiple) * row_multiple
    filled = budget.max_tokens + num_rows * (row_multiple - 1)
    return max(longest_padded, min(filled, num_rows * longest_padded))


def cut(
    lengths: Sequence[int] | np.ndarray, budget: Budget, num_ranks: int = 1
) -> list[list[list[int]]]:
    """lengths: tokens of each row, of its heavier view -> for each rank its micro-batches, each the
    indices of its rows in rising order; all ranks have the same number, some may be empty.

    Fewest micro-batches that hold the rows (found greedily: the costliest row first, into the
    cheapest micro-batch with room), at least `budget.at_least`. Micro-batches of one index run at
    the same time: they are neighbours in cost.
    """
    rank_of, index_of, number = _places(lengths, budget, num_ranks)
    ranks: list[list[list[int]]] = [[[] for _ in range(number)] for _ in range(num_ranks)]
    for row, (rank, index) in enumerate(zip(rank_of.tolist(), index_of.tolist())):
        ranks[rank][index].append(row)
    return ranks


def cut_of_rank(
    lengths: Sequence[int] | np.ndarray, budget: Budget, num_ranks: int, rank: int
) -> list[list[int]]:
    """`cut(...)[rank]`, without the lists of the others: of 32,768 rows of 1,024 ranks that takes
    milliseconds.
    """
    rank_of, index_of, number = _places(lengths, budget, num_ranks)
    rows = np.flatnonzero(rank_of == rank)
    return [rows[index_of[rows] == index].tolist() for index in range(number)]


def _places(
    lengths: Sequence[int] | np.ndarray, budget: Budget, num_ranks: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each row the rank and the index of its micro-batch there; a rank's micro-batches."""
    tokens = np.asarray(lengths, dtype=np.int64)
    costs = budget.cost(tokens)
    order = np.argsort(-costs, kind="stable")
    # a row above the budget fills one
    filled = float(np.minimum(tokens, budget.max_tokens).sum()) / budget.max_tokens
    number = max(math.ceil(filled / num_ranks), budget.at_least, 1)
    while True:
        bins = _fill(tokens[order], costs[order], budget.max_tokens, number * num_ranks)
        if bins is not None:
            break
        number += 1
    bin_of = np.empty_like(order)
    bin_of[order] = bins.of_row
    # the costliest first; of equal ones the one whose first row comes first
    first_row = np.full(number * num_ranks, -1)
    first_row[bins.of_row[::-1]] = order[::-1]
    place = np.empty(number * num_ranks, dtype=np.int64)
    place[np.lexsort((first_row, -bins.costs))] = np.arange(number * num_ranks)
    index, rank = np.divmod(place, num_ranks)
    # to and fro, so that no rank has the costliest of every index
    rank = np.where(index % 2 == 0, rank, num_ranks - 1 - rank)
    return rank[bin_of], index[bin_of], number


class _Bins(NamedTuple):
    of_row: np.ndarray
    """The bin of each row"""
    costs: np.ndarray
    """Of each bin's rows together"""


def _fill(
    tokens: np.ndarray, row_costs: np.ndarray, max_tokens: int, num_bins: int
) -> _Bins | None:
    """Rows, the costliest first -> each into the cheapest bin with room, the first of equal ones;
    None where one has none.

    Many rows at a time: those that find bins with room for the first of them, until there is a
    cheaper one than the next of these bins: one of them with its row, or one whose room is too
    small for the first row and large enough for this.
    """
    costs, filled = np.zeros(num_bins), np.zeros(num_bins, dtype=np.int64)
    of_row = np.empty(len(tokens), dtype=np.int64)
    start = 0
    while start < len(tokens):
        has_room = (filled + tokens[start] <= max_tokens) | (filled == 0)
        room, others = np.flatnonzero(has_room), np.flatnonzero(~has_room)
        if not len(room):
            return None
        chosen = room[np.argsort(costs[room], kind="stable")][: len(tokens) - start]
        rows = slice(start, start + len(chosen))
        before = costs[chosen]
        after = before + row_costs[rows]
        others = others[np.argsort(filled[others])]
        cheapest = np.minimum.accumulate(np.append(np.inf, costs[others]))
        num_others = np.searchsorted(filled[others], max_tokens - tokens[rows], side="right")
        is_dearer = before >= cheapest[num_others]
        is_dearer[1:] |= before[1:] >= np.minimum.accumulate(after)[:-1]
        size = int(is_dearer.argmax()) if is_dearer.any() else len(chosen)
        chosen = chosen[:size]
        of_row[start : start + size] = chosen
        costs[chosen] = after[:size]
        filled[chosen] += tokens[start : start + size]
        start += size
    return _Bins(of_row, costs)
