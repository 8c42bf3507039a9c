"""The planner's bytes of a save at sizes that no test can write. At small ones they are those of
real saves: tests/test_checkpoint_files.py.
"""

import re
from pathlib import Path

import pytest

from benchmarks.real_decoder import REAL_SHAPE
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora_targets import HEAD, LINEARS
from megatron_gkd.plan.saving import saved_bytes

PAGE = Path(__file__).parents[1] / "docs/benchmarks/save.md"


def layout(tp=1, pp=1, ep=1, cp=1):
    return ParallelConfig(tp, pp, ep, cp)


@pytest.mark.parametrize("world_size", [1, 8, 64, 256, 1024])
def test_the_table_of_the_docs(world_size):
    """Qwen3-Omni-30B-A3B, rank 8 on all linears: a rank's share shrinks with the world, the sum of
    all does not grow.
    """
    args, sizes = REAL_SHAPE.model_args(), layout(ep=min(world_size, 8))
    settings = dict(world_size=world_size, lora_rank=8, targets=LINEARS)
    found = saved_bytes(args, sizes, **settings)
    share = saved_bytes(args, sizes, **settings).shares[-1]
    assert share * world_size == 3 * 4 * 421_920_768
    row = next(
        line
        for line in PAGE.read_text().splitlines()
        if re.match(rf"\| {world_size:,}( \(EP 1\))? \|", line)
    )
    stated = [
        float(number) * (1e9 if unit == "GB" else 1e6)
        for number, unit in re.findall(r"([\d.]+) (GB|MB)", row)[1:]
    ]
    assert stated == pytest.approx([share, found.rank, found.node], rel=0.02)


@pytest.mark.parametrize(
    "sizes", [layout(tp=8, ep=8), layout(pp=4, ep=16), layout(tp=4, pp=2, ep=8, cp=2)]
)
def test_every_layout_writes_as_much(sizes):
    """Where experts and heads are does not matter; with the lm_head its last stage has more."""
    args = REAL_SHAPE.model_args()
    for targets, most in ((LINEARS, 1.0), ([*LINEARS, HEAD], 1.2)):
        settings = dict(world_size=1024, lora_rank=8, targets=targets, teacher_follows=True)
        shares = saved_bytes(args, sizes, **settings).shares
        alone = saved_bytes(args, layout(), **settings | dict(world_size=1)).shares
        assert sum(shares) == pytest.approx(sum(alone))
        assert max(shares) <= most * sum(shares) / len(shares) * (1 + 1e-9)


def test_what_is_left_out():
    """--save_only_model writes a third; LoRA on some layers leaves the other stages nothing."""
    args, settings = REAL_SHAPE.model_args(), dict(world_size=64, lora_rank=8)
    whole, alone = (
        sum(saved_bytes(args, layout(), **settings, targets=LINEARS, has_optimizer=has).shares)
        for has in (True, False)
    )
    assert whole == 3 * alone
    shares = saved_bytes(args, layout(pp=2), **settings, targets=["0.q_proj", "23.q_proj"]).shares
    assert shares[:32] == [3 * 4 * 2 * 8 * (2048 + 4096) / 32] * 32 and not any(shares[32:])
