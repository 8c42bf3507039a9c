"""A step's rows cut into micro-batches: every row once, as many micro-batches on each rank, none
above the budget, all of about equal cost.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.config import parse_config
from megatron_gkd.data.micro_batches import Budget, attention_tokens, cut, cut_of_rank
from megatron_gkd.run import step_budget

RANKS = (1, 2, 3, 8)


def long_tailed(number: int, seed: int, longest: int = 4096) -> list[int]:
    """Most rows are short, a few as long as may be."""
    generator = random.Random(seed)
    return [min(longest, int(generator.lognormvariate(5.5, 1.0)) + 1) for _ in range(number)]


CASES = {
    "long tail": long_tailed(300, 0),
    "one length": [512] * 64,
    "one row": [9],
    "shorter than a rank's rows": [700, 3, 5],
    "some above the budget": [9000, 20, 30, 5000, 4097, 4096, 1],
    "nothing": [],
}


def micro_batches_of(ranks: list[list[list[int]]]) -> list[list[int]]:
    return [rows for of_rank in ranks for rows in of_rank]


def tokens_of(rows: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[row] for row in rows)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("at_least", [1, 4])
@pytest.mark.parametrize("attention", [math.inf, 3000.0])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_what_every_cut_holds(lengths, attention, at_least, num_ranks):
    """Every row once and in rising order, equal numbers of micro-batches, none above the budget
    unless it is one row; a rank that no row is left for has empty lists.
    """
    budget = Budget(4096, attention, at_least)
    ranks = cut(lengths, budget, num_ranks)
    assert ranks == [cut_of_rank(lengths, budget, num_ranks, rank) for rank in range(num_ranks)]
    assert len(ranks) == num_ranks and len({len(of_rank) for of_rank in ranks}) == 1
    assert len(ranks[0]) >= at_least
    micro_batches = micro_batches_of(ranks)
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths)))
    for rows in micro_batches:
        assert rows == sorted(rows)
        assert tokens_of(rows, lengths) <= 4096 or len(rows) == 1
    assert sum(not rows for rows in micro_batches) >= len(micro_batches) - len(lengths)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("attention", [math.inf, 3000.0])
def test_costs_are_balanced(attention, seed, num_ranks):
    """Many rows a micro-batch: all cost nearly the same, also where attention weighs; so do those
    that run at the same time and the sums of the ranks.
    """
    lengths = long_tailed(400, seed)
    budget = Budget(8192, attention)
    ranks = cut(lengths, budget, num_ranks)
    costs = [
        [sum(budget.cost(lengths[row]) for row in rows) for rows in of_rank] for of_rank in ranks
    ]
    flat = [cost for of_rank in costs for cost in of_rank]
    assert len(flat) > 10 and max(flat) <= 1.35 * sum(flat) / len(flat)
    assert all(max(at_once) <= 1.1 * min(at_once) for at_once in zip(*costs))
    assert max(map(sum, costs)) <= 1.05 * min(map(sum, costs))


def greedy(lengths: list[int], budget: Budget, num_bins: int) -> list[list[int]] | None:
    """The bins where one row after the other is put into the cheapest with room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    costs, tokens = [0.0] * num_bins, [0] * num_bins
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        room = [i for i in range(num_bins) if tokens[i] + lengths[row] <= budget.max_tokens]
        if not room:
            return None
        best = min(room, key=lambda i: (costs[i], i))
        bins[best].append(row)
        costs[best] += budget.cost(lengths[row])
        tokens[best] += lengths[row]
    return sorted(sorted(rows) for rows in bins)


def test_a_large_step_is_cut_as_row_by_row_and_many_rows_at_a_time(monkeypatch):
    """The micro-batches of a loop over the rows, also where long rows cost so much that a full one
    of short rows is cheaper; of 1,024 ranks with 32 rows each in a few dozen rounds over whole
    arrays.
    """
    budget = Budget(8192, 40_000.0)
    for seed, of_cut, num_ranks in (
        *((0, budget, 64), (1, Budget(4096, 13_824.0), 8), (2, Budget(4096, 1500.0), 1)),
        *((3, Budget(4096, 300.0), 8), (4, Budget(5000), 3), (5, Budget(4096, 1500.0, 8), 8)),
    ):
        lengths = long_tailed(num_ranks * 32, seed)
        found = micro_batches_of(cut(lengths, of_cut, num_ranks))
        assert sorted(found) == greedy(lengths, of_cut, len(found))
        assert len(found) == max(of_cut.at_least, 1) * num_ranks or not greedy(
            lengths, of_cut, len(found) - num_ranks
        )
    rounds, argsort = [0], np.argsort

    def counted(*args, **options):
        rounds[0] += 1
        return argsort(*args, **options)

    monkeypatch.setattr(np, "argsort", counted)
    cut_of_rank(long_tailed(1024 * 32, 1), budget, 1024, 5)
    assert 0 < rounds[0] < 40


def test_few_micro_batches_are_made():
    """As many as the tokens need, or one for each rank more."""
    for seed in range(4):
        lengths = long_tailed(400, seed)
        for num_ranks in RANKS:
            least = math.ceil(sum(lengths) / (8192 * num_ranks))
            assert len(cut(lengths, Budget(8192), num_ranks)[0]) <= least + 1


def test_exact_cuts():
    assert cut([5, 3, 4, 2], Budget(7)) == [[[0, 3], [1, 2]]]
    assert cut([5, 3, 4, 2], Budget(6)) == [[[0], [1, 3], [2]]]
    assert cut([5, 3, 4, 2], Budget(100)) == [[[0, 1, 2, 3]]]
    # 6 6 2 2 are four of two ranks: the costliest two run at once, then the other two
    assert cut([2, 6, 2, 6], Budget(6), 2) == [[[1], [2]], [[3], [0]]]
    # equal rows: the lower index comes first
    assert cut([1, 1, 1, 1], Budget(2), 2) == [[[0, 2]], [[1, 3]]]


def test_a_row_above_the_budget_is_alone():
    lengths = [100, 3, 101, 2, 5, 100]
    for num_ranks in RANKS:
        micro_batches = micro_batches_of(cut(lengths, Budget(10), num_ranks))
        assert all([row] in micro_batches for row in (0, 2, 5))
        assert sorted(row for rows in micro_batches for row in rows) == list(range(6))


def test_ranks_without_rows_have_empty_micro_batches():
    assert cut([], Budget(10), 3) == [[[]]] * 3
    assert cut([], Budget(10, at_least=2), 2) == [[[], []]] * 2
    ranks = cut([4, 9], Budget(10), 4)
    assert ranks == [[[1]], [[0]], [[]], [[]]]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_at_least(num_ranks):
    """Exactly as many where fewer would do, whichever number that is: ranks agree on it
    (rollout/rollout.py). Where more are needed it changes nothing.
    """
    generator = random.Random(0)
    for _ in range(200):
        lengths = [
            generator.choice([3, 10, 40, 90]) + row for row in range(generator.randint(1, 20))
        ]
        attention = generator.choice([math.inf, 10.0])
        needed = cut(lengths, Budget(64, attention), num_ranks)
        for at_least in range(1, len(needed[0]) + 5):
            ranks = cut(lengths, Budget(64, attention, at_least), num_ranks)
            assert len(ranks[0]) == max(at_least, len(needed[0]))
            assert at_least > len(needed[0]) or ranks == needed


def test_the_same_again():
    lengths = long_tailed(200, 5)
    budget = Budget(4096, 3000.0)
    assert cut(lengths, budget, 3) == cut(tuple(lengths), budget, 3) == cut(lengths, budget, 3)


def test_cost_grows_with_the_square_of_long_rows():
    budget = Budget(1, attention_tokens=1000)
    assert [budget.cost(length) for length in (0, 10, 1000, 3000)] == [0, 10.1, 2000, 12000]
    assert Budget(1).cost(3000) == 3000


def test_attention_that_costs_as_much_as_the_products():
    """By hand, a token in a layer of Qwen3-Omni-30B-A3B: q and o 2 x 2048 x 4096, k and v
    2 x 2048 x 512, 8 experts of 3 x 2048 x 768; scores and values of n/2 keys: n/2 x 2 x 4096.
    """
    products = 2 * 2048 * 4096 + 2 * 2048 * 512 + 8 * 3 * 2048 * 768
    assert attention_tokens(REAL_SHAPE.model_args()) == products / 4096 == 13824
    small = replace(
        REAL_SHAPE.model_args(),
        num_layers=3,
        hidden_size=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=3,
        num_experts_per_tok=2,
        moe_intermediate_size=7,
    )
    assert attention_tokens(small) == (10 * (12 + 6 + 6 + 12) + 2 * 3 * 10 * 7) / 12


@pytest.mark.parametrize(
    "flags, max_tokens, at_least",
    [
        ([], 4 * 300, 1),
        (["--per_device_train_batch_size", "3"], 900, 1),
        (["--max_tokens_per_micro_batch", "500"], 500, 1),
        (["--gradient_accumulation_steps", "6"], 1200, 1),
        (["--gradient_accumulation_steps", "6", "--pipeline_model_parallel_size", "2"], 1200, 6),
    ],
)
def test_budget_of_a_run(flags, max_tokens, at_least):
    """Pipeline stages are kept busy by several micro-batches; else only memory asks for them."""
    required = ["--model", "m", "--dataset", "d", "--max_length", "300"]
    expected = Budget(max_tokens, 13824, at_least)
    assert step_budget(parse_config(required + flags), REAL_SHAPE.model_args()) == expected
