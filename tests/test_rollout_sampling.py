"""The filters against transformers' own, the noise against its distribution, the draw and its
log-probabilities against the softmax; on vocabulary shards.
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

from megatron_gkd.rollout import sampling, torch_kernels
from megatron_gkd.rollout.noise import gumbel, keys_of_step
from megatron_gkd.rollout.sampling import Sampler
from megatron_gkd.rollout.scores import GROUP, Scores
from tests.ranks import run_ranks
from tests.rollout_layer import key_of
from tests.rollouts import make_sampling

VOCAB_SIZE, PADDED_SIZE = 503, 512
NUM_DRAWS = 4_000
RAISE = 1e-4
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


def make_sampler(sampling, rank=0, world_size=1, *, num_rows=5, row_ids=None, seed=0, seen=None):
    """For `num_rows` rows that have read the tokens `seen`, lists of any length; by default token 0
    each.
    """
    row_ids = range(num_rows) if row_ids is None else row_ids
    num_columns = PADDED_SIZE // world_size
    sampler = Sampler(
        sampling,
        num_rows=len(row_ids),
        first_column=rank * num_columns,
        num_columns=num_columns,
        vocab_size=VOCAB_SIZE,
        group=torch.distributed.group.WORLD if world_size > 1 else None,
        device=torch.device("cpu"),
        kernels=torch_kernels,
    )
    prompts = [[0]] * len(row_ids) if seen is None else seen
    sampler.begin(seed, row_ids, prompts, range(len(row_ids)))
    return sampler


def shard(logits, rank, world_size):
    """This rank's columns, for `draw` to overwrite; the padded ones hold a value that would win
    every draw.
    """
    padded = torch.cat(
        (logits, torch.full((logits.shape[0], PADDED_SIZE - VOCAB_SIZE), 99.0)), dim=1
    )
    return padded.chunk(world_size, dim=1)[rank].clone()


def number(step):
    return torch.tensor([step])


def transformers_scores(case, logits, seen):
    """[B, V]: -inf where a filter leaves a token out; seen: a list of tokens for each row."""
    processors = [
        RepetitionPenaltyLogitsProcessor(case.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(case.get("temperature", 1.0)),
        *([TopKLogitsWarper(case["top_k"])] if "top_k" in case else []),
        *([TopPLogitsWarper(case["top_p"])] if "top_p" in case else []),
    ]
    rows = []
    for scores, tokens in zip(logits.split(1), seen):
        for processor in processors:
            scores = processor(torch.tensor([tokens]), scores)
        rows.append(scores)
    return torch.cat(rows)


def draw_each_column(rank, world_size, cases, logits, seen):
    """For each case, (tokens, log-probabilities) of V draws for each row, with the noise of
    `raised_columns`. cases: with transformers' scores.
    """
    found = []
    for case, expected in cases:
        rows = [tokens for tokens in seen for _ in range(VOCAB_SIZE)]
        sampler = make_sampler(
            make_sampling(**case), rank, world_size, num_rows=len(rows), seen=rows
        )
        table = raised_columns(expected)
        from_table = lambda keys, columns, table=table: table.gather(1, columns)
        drawn = shard(logits.repeat_interleave(VOCAB_SIZE, dim=0), rank, world_size)
        with pytest.MonkeyPatch.context() as patch:
            for module in (sampling, torch_kernels):  # among candidates, among all columns
                patch.setattr(module, "gumbel", from_table)
            found.append(sampler.draw(drawn, number(0)))
    return found


@pytest.fixture(scope="module")
def filter_cases():
    """Logits, the tokens that each row has seen, the cases and what transformers makes of them."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, VOCAB_SIZE)
    seen = torch.randint(VOCAB_SIZE, (3, 40)).tolist()
    seen[1] = seen[1][:10]
    return logits, seen, [(case, transformers_scores(case, logits, seen)) for case in CASES]


def raised_columns(expected):
    """Noise fp64 [B * V, padded] that takes transformers' scores away and raises column c in draw c
    of each row: by a ten-thousandth, or where the filters leave it out by 1000.
    """
    is_kept = expected.isfinite()[:, None]
    noise = torch.where(is_kept, -expected.double()[:, None], 0.0).repeat(1, VOCAB_SIZE, 1)
    raised = torch.eye(VOCAB_SIZE, dtype=torch.bool)
    noise += torch.where(is_kept, RAISE, 1000.0) * raised
    padding = torch.full((*noise.shape[:2], PADDED_SIZE - VOCAB_SIZE), 1000.0, dtype=noise.dtype)
    return torch.cat((noise, padding), dim=2).flatten(0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_filtered_scores_equal_transformers(filter_cases, world_size):
    """Seen through the draw: noise that takes transformers' scores away leaves the raised column
    the largest only if all others are within a ten-thousandth.
    """
    logits, seen, cases = filter_cases
    results = run_ranks(draw_each_column, world_size, cases, logits, seen)
    log_probabilities = logits.double().log_softmax(dim=1).repeat_interleave(VOCAB_SIZE, dim=0)
    for (case, expected), *of_ranks in zip(cases, *results):
        is_kept, columns = expected.isfinite(), torch.arange(VOCAB_SIZE)
        for tokens, found in of_ranks:
            drawn = tokens.view(3, VOCAB_SIZE)
            assert torch.equal(drawn[is_kept], columns.expand(3, -1)[is_kept]), case
            assert is_kept.gather(1, drawn).all(), case
            own = log_probabilities.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(found.double(), own, rtol=0, atol=1e-5)


def scores_of_case(case, logits, seen):
    mask = torch.zeros(len(logits), PADDED_SIZE + 16, dtype=torch.bool)
    for row, tokens in zip(mask, seen):
        row[tokens] = True
    return torch_kernels.scores_of(
        shard(logits, 0, 1),
        mask,
        VOCAB_SIZE,
        penalty=case.get("repetition_penalty", 1.0),
        temperature=case.get("temperature", 1.0),
    )


def test_scores_equal_transformers_before_the_filters(filter_cases):
    logits, seen, cases = filter_cases
    for case, _ in cases:
        unfiltered = {key: value for key, value in case.items() if key not in ("top_k", "top_p")}
        found, log_sum, _ = scores_of_case(case, logits, seen)
        expected = transformers_scores(unfiltered, logits, seen)
        torch.testing.assert_close(found[:, :VOCAB_SIZE], expected, rtol=1e-6, atol=0)
        assert found[:, VOCAB_SIZE:].eq(float("-inf")).all()
        torch.testing.assert_close(log_sum, logits.logsumexp(dim=1), rtol=1e-6, atol=0)


def draw_one_row_again_and_again(rank, world_size, logits):
    sampler = make_sampler(
        make_sampling(temperature=0, repetition_penalty=2.0), rank, world_size, num_rows=1
    )
    return [
        sampler.draw(shard(logits, rank, world_size), number(step))[0].item() for step in range(6)
    ]


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_drawn_token_counts_as_seen(world_size):
    """8 is halved, then 6, then 5, on three shards; once only."""
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [400, 7, 200]] = torch.tensor([8.0, 6.0, 5.0])
    for tokens in run_ranks(draw_one_row_again_and_again, world_size, logits):
        assert tokens == [400, 7, 200, 400, 400, 400]


@pytest.mark.parametrize("num_columns, k", [(2048, 5), (2048, 1), (384, 3), (500, 7), (512, 4)])
def test_the_largest_scores_lie_in_the_groups_with_the_largest(num_columns, k):
    """Also where groups are too few, and columns do not fill them."""
    scores = torch.randn(6, num_columns, generator=torch.Generator().manual_seed(2))
    scores[0, 10:30] += 9  # all in one group
    scores[1] = scores[1].round()  # equal ones at the cut-off
    groups = torch.nn.functional.pad(scores, (0, -num_columns % GROUP), value=-float("inf"))
    maxima = groups.unflatten(1, (-1, GROUP)).amax(dim=2)
    values, columns = Scores(scores, torch.zeros(6), maxima).top_k(k)
    assert torch.equal(values, scores.topk(k, dim=1).values)
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


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
    num_rows = num_draws // 4
    sampler = make_sampler(sampling, rank, world_size, num_rows=num_rows, seed=seed)
    local = shard(logits, rank, world_size).expand(num_rows, -1)
    return torch.cat([sampler.draw(local.clone(), number(step))[0] for step in range(4)])


@pytest.mark.parametrize(
    "case", [dict(), dict(temperature=1.5, top_k=30, top_p=0.9), dict(top_p=0.5)], ids=str
)
def test_draws_follow_the_softmax_at_any_sharding(case):
    torch.manual_seed(1)
    logits, sampling = 2 * torch.randn(1, VOCAB_SIZE), make_sampling(**case)
    draws = draw_many(0, 1, logits, sampling, NUM_DRAWS, 7)
    counts = torch.bincount(draws, minlength=VOCAB_SIZE)
    probabilities = transformers_scores(case, logits, [[0]]).softmax(dim=1)[0]
    assert chi_square_excess(counts, probabilities) < 4
    for sharded in run_ranks(draw_many, 4, logits, sampling, NUM_DRAWS, 7):
        assert torch.equal(sharded, draws)
    assert not torch.equal(draw_many(0, 1, logits, sampling, NUM_DRAWS, 8), draws)


def noise_of(sampler, columns, step):
    return gumbel(keys_of_step(sampler.row_keys[: len(columns)], number(step)), columns)


def all_columns(num_rows, first=0, end=PADDED_SIZE):
    return torch.arange(first, end).expand(num_rows, -1)


def test_noise_is_gumbel_and_independent_of_its_neighbours():
    sampler = make_sampler(make_sampling(), num_rows=200)
    noise = torch.stack(
        [noise_of(sampler, all_columns(200), step) for step in range(20)]
    )  # [steps, rows, columns]
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


@pytest.mark.parametrize(
    "hashed, noise", [(0, -math.log(53 * math.log(2))), (-1, 53 * math.log(2))]
)
def test_the_smallest_and_the_largest_noise_are_finite(hashed, noise):
    found = gumbel(torch.tensor([key_of(7, hashed)]), torch.tensor([[7]]))
    assert found.item() == pytest.approx(noise, abs=1e-12)


def test_noise_depends_on_seed_row_step_and_column_alone():
    """Not on the row's place, the columns of the rank, or what else is drawn."""
    whole = make_sampler(make_sampling(), row_ids=[3, 8], seed=5)
    noise = noise_of(whole, all_columns(2), 4)
    part = make_sampler(make_sampling(), rank=1, world_size=2, row_ids=[8], seed=5)
    assert torch.equal(noise[1:, 100:200], noise_of(part, all_columns(1, 100, 200), 4))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, noise_of(whole, all_columns(2), 5))
    other = make_sampler(make_sampling(), row_ids=[3, 8], seed=6)
    assert not torch.equal(noise, noise_of(other, all_columns(2), 4))
    whole.begin(6, [3, 8], [[2], [1]], [1, 0])
    assert torch.equal(noise_of(whole, all_columns(2), 4), noise_of(other, all_columns(2), 4))


def test_rows_that_are_taken_keep_their_noise_and_what_they_have_seen():
    sampling, rows = make_sampling(repetition_penalty=1.7, top_p=0.9), [4, 1, 1]
    logits = 3 * torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    seen = [logits[row].topk(20).indices.tolist() for row in range(5)]
    whole, part = (make_sampler(sampling, seen=seen) for _ in range(2))
    for sampler in (whole, part):
        sampler.draw(shard(logits, 0, 1), number(0))
    part.take(torch.tensor(rows))
    for step in (1, 2):
        tokens, log_probabilities = whole.draw(shard(logits, 0, 1), number(step))
        found = part.draw(shard(logits[rows], 0, 1), number(step))
        assert torch.equal(found[0], tokens[rows])
        assert torch.equal(found[1], log_probabilities[rows])


def draw_special_rows(rank, world_size, logits):
    settings = (
        make_sampling(temperature=0),
        make_sampling(top_k=2, top_p=0.99),
        make_sampling(top_p=0.9),
    )
    return [
        make_sampler(sampling, rank, world_size).draw(shard(logits, rank, world_size), number(0))
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
    for results in run_ranks(draw_special_rows, world_size, logits):
        greedy, nucleus_of_two, nucleus = (tokens for tokens, _ in results)
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
