"""What a run measures. Sums and means are compared with references in test_step_parity.py and
test_train.py.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_gkd import device_memory, parallel
from megatron_gkd.data import Packing, Sample, View, collate
from megatron_gkd.device_memory import DeviceMemory
from megatron_gkd.metrics import (
    GAP,
    NUM_TOKENS,
    NUM_WRITTEN,
    SUMMED,
    Groups,
    StepCounts,
    TokenSums,
)
from tests.ranks import run_ranks


def peak_before_and_after(rank, world_size, num_bytes):
    memory = DeviceMemory(torch.device("cpu"))
    before = memory.most()
    block = torch.ones(before + num_bytes, dtype=torch.int8)
    after, used, size = memory.most(), memory.used(), len(block)
    del block
    memory.begin()
    return before, after, size, used, memory.peak(), memory.most(), memory.limit()


def test_peak_memory_is_in_bytes_and_sees_an_allocation():
    """The block was the peak until `begin`, and stays the most that there was."""
    ((before, after, size, used, peak, most, limit),) = run_ranks(
        peak_before_and_after, 1, 64 * 2**20
    )
    slack = 2**25  # Linux counts pages in batches, one for each core
    assert max(before, size) < used <= after + slack < 2**40
    assert peak < size and most + slack >= after and peak <= limit + slack < 2**50


def test_files_that_a_container_has_read_are_no_limit(monkeypatch, tmp_path):
    """Linux counts them as memory of the container, and lets them go where a process needs it."""
    memory = DeviceMemory(torch.device("cpu"))
    for name, text in {
        "memory.max": "3000000\n",
        "memory.current": "2500000\n",
        "memory.stat": "anon 1000000\nfile 1500000\ninactive_file 1400000\nactive_file 100000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device_memory, "_GROUP", tmp_path)
    monkeypatch.setattr(device_memory, "_resident", lambda field: 500_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.limit() == 500_000 + (3_000_000 - 2_500_000 + 1_400_000) // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.limit() > 3_000_000


def sample(prompt, response, teacher_prompt=None, *, source="a", cut=0):
    """Of so many tokens each, the response trained."""
    views = [
        View([1] * (size + response), [-100] * size + [2] * response, size)
        for size in (prompt, prompt if teacher_prompt is None else teacher_prompt)
    ]
    teacher = views[0] if teacher_prompt is None else views[1]
    return Sample(views[0], teacher, source, 3, cut)


def counts_of_ranks(rank, world_size, cp):
    place = parallel.initialize(torch.device("cpu"), context_parallel_size=cp)
    packing = Packing(0, place.sequence_multiple, place.row_multiple)
    batches = [collate([sample(3, 2, 5, cut=4), sample(1, 2)], packing)]
    if place.dp_rank == 0:
        batches.append(collate([sample(2, 4, cut=1), None], packing))
    else:
        batches.append(collate([None], packing))
    return StepCounts.of(batches, place.dp_rank + 1, rank == 1, 1000 + rank, place)


@pytest.mark.parametrize("cp", [1, 2])
def test_counts_of_a_step(cp):
    """Tokens of both views of the rows that are no padding, of all data-parallel ranks and once of
    those that share rows; positions are the padding's, too.
    """
    both = (5 + 3) + (7 + 3)  # the first micro-batch, student and teacher
    if cp == 1:
        tokens, places, cut, truncated = 2 * both + 2 * 6, 2 * both + 2 * 7 + 2, 9, 3
    else:  # rows to a multiple of 4: 8 + 4 and 8 + 4, then 8 + 4 twice
        tokens, places, cut, truncated = both + 2 * 6, 12 + 12 + 2 * 12, 5, 1
    for counts in run_ranks(counts_of_ranks, 2, cp):
        assert (counts.num_tokens, counts.num_places) == (tokens, places)
        assert counts.padding == pytest.approx(1 - tokens / places)
        assert counts.num_micro_batches == 2 and counts.stop
        assert (counts.cut_tokens, counts.truncated_responses) == (cut, truncated)


def test_sums_of_shares_are_those_of_the_whole():
    """Of sources too, and of the difference from what the rollout drew."""
    groups = Groups(sources=("a", "b"))
    rows = [sample(2, 4, source="b"), sample(3, 1, source="a"), sample(1, 3, source="b")]
    drawn = iter(torch.linspace(-3, -1, 8).tolist())
    rows = [
        row.with_response([2] * number, [next(drawn) for _ in range(number)])
        for row, number in zip(rows, (4, 1, 3))
    ]
    batch = collate(rows, Packing(0))
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(8, generator=generator) for name in SUMMED}

    def sums_of(*shares):
        sums = TokenSums.zero(torch.device("cpu"), groups)
        for share in shares:
            of_share = {name: value[share] for name, value in values.items()}
            sums.add(SimpleNamespace(**of_share), batch, share)
        return sums.values

    whole = sums_of(slice(None))
    torch.testing.assert_close(sums_of(slice(0, 3), slice(3, 8)), whole)
    torch.testing.assert_close(sums_of(*(slice(token, token + 1) for token in range(8))), whole)
    of_b = [0, 1, 2, 3, 5, 6, 7]
    gap = (torch.linspace(-3, -1, 8) + values["sft_loss"]).abs().double()
    for row, tokens in zip(whole, (list(range(8)), [4], of_b)):
        for index, name in enumerate(SUMMED):
            assert row[index].item() == pytest.approx(values[name][tokens].double().sum().item())
        assert row[GAP].item() == pytest.approx(gap[tokens].sum().item())
        assert row[NUM_WRITTEN] == row[NUM_TOKENS] == len(tokens)
