"""The rows of a step -> micro-batches of about equal cost, the same number on every data-parallel
rank. A pure function of the rows' lengths, so that every rank finds the same. Imports nothing slow.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

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

    def cost(self, num_tokens: int) -> float:
        """Of a row of so many tokens, in tokens of a short row."""
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


def cut(lengths: Sequence[int], budget: Budget, num_ranks: int = 1) -> list[list[list[int]]]:
    """lengths: tokens of each row, of its heavier view -> for each rank its micro-batches, each the
    indices of its rows in rising order; all ranks have the same number, some may be empty.

    Fewest micro-batches that hold the rows (found greedily: the costliest row first, into the
    cheapest micro-batch with room), at least `budget.at_least`. Micro-batches of one index run at
    the same time: they are neighbours in cost.
    """
    costs = [budget.cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda row: (-costs[row], row))
    # a row above the budget fills one
    filled = sum(min(length, budget.max_tokens) for length in lengths) / budget.max_tokens
    number = max(math.ceil(filled / num_ranks), budget.at_least, 1)
    while (bins := _fill(order, lengths, costs, budget.max_tokens, number * num_ranks)) is None:
        number += 1
    bins.sort(key=lambda rows: (-sum(costs[row] for row in rows), rows))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for index in range(number):
        group = bins[index * num_ranks : (index + 1) * num_ranks]
        # to and fro, so that no rank has the costliest of every group
        for rank, rows in zip(ranks, group if index % 2 == 0 else group[::-1]):
            rank.append(sorted(rows))
    return ranks


def _fill(
    order: Sequence[int],
    lengths: Sequence[int],
    costs: Sequence[float],
    max_tokens: int,
    num_bins: int,
) -> list[list[int]] | None:
    """The rows of each bin, or None where one has no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    cheapest = [(0.0, number) for number in range(num_bins)]  # a heap
    for row in order:
        full = []
        while cheapest:
            cost, number = heapq.heappop(cheapest)
            if not bins[number] or tokens[number] + lengths[row] <= max_tokens:
                break
            full.append((cost, number))
        else:
            return None
        bins[number].append(row)
        tokens[number] += lengths[row]
        for bin_of_cost in (*full, (cost + costs[row], number)):
            heapq.heappush(cheapest, bin_of_cost)
    return bins
