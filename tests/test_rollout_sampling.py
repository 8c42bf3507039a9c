"""The filters against transformers' own, the noise against its distribution, the draw against the
softmax; on vocabulary shards.
"""

import math

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_gkd.rollout.sampling import Sampler
from tests.ranks import run_ranks
from tests.rollouts import make_sampling

VOCAB_SIZE, PADDED_SIZE = 503, 512
NUM_DRAWS = 4_000
CASES = [
    dict(),
    dict(temperature=0.6),
    dict(top_k=20),
    dict(top_p=0.7),
    dict(repetition_penalty=1.8),
    dict(temperature=1.7, top_k=50, top_p=0.9, repetition_penalty=1.1),
    dict(temperature=0.8, top_p=0.95, repetition_penalty=0.7),
    dict(top_k=300, top_p=0.99),
    dict(top_k=VOCAB_SIZE + 100),
    dict(top_k=1),
    dict(top_p=1e-6),
]


def make_sampler(sampling, rank=0, world_size=1, *, num_rows=5, row_ids=None, seed=0):
    num_columns = PADDED_SIZE // world_size
    return Sampler(
        sampling,
        seed=seed,
        row_ids=torch.arange(num_rows) if row_ids is None else row_ids,
        first_column=rank * num_columns,
        num_columns=num_columns,
        vocab_size=VOCAB_SIZE,
        group=torch.distributed.group.WORLD if world_size > 1 else None,
    )


def shard(logits, rank, world_size):
    """This rank's columns; the padded ones hold a value that would win every draw."""
    padded = torch.cat(
        (logits, torch.full((logits.shape[0], PADDED_SIZE - VOCAB_SIZE), 99.0)), dim=1
    )
    return padded.chunk(world_size, dim=1)[rank]


def filter_cases(rank, world_size, logits, seen):
    results = []
    for case in CASES:
        sampler = make_sampler(make_sampling(**case), rank, world_size)
        sampler.observe(seen)
        results.append(sampler.filtered(shard(logits, rank, world_size)))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_filtered_scores_equal_transformers(world_size):
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, VOCAB_SIZE)
    seen = torch.randint(VOCAB_SIZE, (5, 40))
    seen[1, 10:] = -1  # a shorter row
    results = run_ranks(filter_cases, world_size, logits, seen)
    for index, case in enumerate(CASES):
        processors = [
            RepetitionPenaltyLogitsProcessor(case.get("repetition_penalty", 1.0)),
            TemperatureLogitsWarper(case.get("temperature", 1.0)),
            *([TopKLogitsWarper(case["top_k"])] if "top_k" in case else []),
            *([TopPLogitsWarper(case["top_p"])] if "top_p" in case else []),
        ]
        scores = torch.cat([result[index] for result in results], dim=1)
        assert scores[:, VOCAB_SIZE:].eq(float("-inf")).all()
        for row in range(5):
            expected = logits[row : row + 1]
            for processor in processors:
                expected = processor(seen[row : row + 1, : 10 if row == 1 else 40], expected)
            found = scores[row : row + 1, :VOCAB_SIZE]
            assert torch.equal(found.isneginf(), expected.isneginf()), case
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def chi_square_excess(counts, probabilities):
    """Pearson's statistic minus its mean, in standard deviations; outcomes expected fewer than 5
    times are pooled.
    """
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    used = expected > 0
    assert not counts[~used].any()  # never drawn what has no probability
    degrees = int(used.sum()) - 1
    return float(
        (((counts - expected)[used] ** 2 / expected[used]).sum() - degrees) / math.sqrt(2 * degrees)
    )


def test_the_statistic_sees_a_slightly_wrong_softmax():
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, VOCAB_SIZE)
    counts = torch.bincount(
        draw_many(0, 1, logits, make_sampling(), NUM_DRAWS, 7), minlength=VOCAB_SIZE
    )
    assert chi_square_excess(counts, (logits / 1.2).softmax(dim=1)[0]) > 6


def draw_many(rank, world_size, logits, sampling, num_draws, seed):
    sampler = make_sampler(
        sampling, rank, world_size, row_ids=torch.arange(num_draws // 4), seed=seed
    )
    local = shard(logits, rank, world_size).expand(num_draws // 4, -1)
    return torch.cat([sampler.draw(local, step) for step in range(4)])


@pytest.mark.parametrize(
    "sampling",
    [
        make_sampling(),
        make_sampling(temperature=1.5, top_k=30, top_p=0.9),
        make_sampling(top_p=0.5),
    ],
    ids=str,
)
def test_draws_follow_the_softmax_at_any_sharding(sampling):
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, VOCAB_SIZE)
    draws = draw_many(0, 1, logits, sampling, NUM_DRAWS, 7)
    counts = torch.bincount(draws, minlength=VOCAB_SIZE)
    probabilities = (
        make_sampler(sampling, num_rows=1)
        .filtered(shard(logits, 0, 1))
        .softmax(dim=1)[0, :VOCAB_SIZE]
    )
    assert chi_square_excess(counts, probabilities) < 4
    for sharded in run_ranks(draw_many, 4, logits, sampling, NUM_DRAWS, 7):
        assert torch.equal(sharded, draws)
    assert not torch.equal(draw_many(0, 1, logits, sampling, NUM_DRAWS, 8), draws)


def test_noise_is_gumbel_and_independent_of_its_neighbours():
    sampler = make_sampler(make_sampling(), num_rows=200)
    noise = torch.stack([sampler.noise(step) for step in range(20)])  # [steps, rows, columns]
    sample = noise.flatten().sort().values
    size = sample.numel()
    distance = (torch.exp(-torch.exp(-sample)) - (torch.arange(size) + 0.5) / size).abs().max()
    assert distance < 2 / math.sqrt(size)  # Kolmogorov-Smirnov: P(larger) is below 0.001
    centred = noise - noise.mean()
    for axis in range(3):
        first, second = (
            centred.narrow(axis, 0, noise.shape[axis] - 1),
            centred.narrow(axis, 1, noise.shape[axis] - 1),
        )
        correlation = (first * second).mean() / centred.var()
        assert abs(correlation) < 4 / math.sqrt(size), axis


def test_noise_depends_on_seed_row_step_and_column_alone():
    whole = make_sampler(make_sampling(), row_ids=torch.tensor([3, 8]), seed=5)
    part = make_sampler(make_sampling(), rank=1, world_size=1, row_ids=torch.tensor([8]), seed=5)
    part.columns = whole.columns[100:200]
    assert torch.equal(whole.noise(4)[1:, 100:200], part.noise(4))
    assert not torch.equal(whole.noise(4), whole.noise(5))
    assert not torch.equal(
        whole.noise(4), make_sampler(make_sampling(), row_ids=torch.tensor([3, 8]), seed=6).noise(4)
    )


def draw_special_rows(rank, world_size, logits):
    settings = (
        make_sampling(temperature=0),
        make_sampling(top_k=2, top_p=0.99),
        make_sampling(top_p=0.9),
    )
    return [
        make_sampler(sampling, rank, world_size).draw(shard(logits, rank, world_size), 0)
        for sampling in settings
    ]


@pytest.mark.parametrize("world_size", [1, 4])
def test_ties_take_the_lowest_id_and_broken_rows_are_marked(world_size):
    logits = torch.zeros(5, VOCAB_SIZE)
    logits[0, [450, 120, 300]] = 5.0  # equal on three shards
    logits[1, 200] = float("nan")
    logits[2, 500] = float("inf")
    logits[3, 7] = float("-inf")
    logits[4, 502] = 50.0
    for greedy, nucleus_of_two, nucleus in run_ranks(draw_special_rows, world_size, logits):
        assert greedy.tolist() == [120, -1, -1, -1, 502]
        assert nucleus_of_two[0] in (120, 300, 450)
        for sampled in (nucleus_of_two, nucleus):
            assert sampled[1:].tolist() == [-1, -1, -1, 502]


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make_sampling(**{name: value})
