"""Groups, their ranks and their machines, against those that megatron-core builds."""

import pytest

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.plan.placement import placement
from tests.ranks import run_ranks
from tests.train_runs import layout_flags


def real_groups(rank, world_size, sizes):
    """kind -> the ranks of this rank's group."""
    import torch
    from torch import distributed as dist

    from megatron_gkd.parallel import initialize

    groups = initialize(torch.device("cpu"), **sizes).groups
    kinds = ("tp", "cp", "dp", "dp_cp", "ep", "expt_dp", "pp")
    return {kind: dist.get_process_group_ranks(getattr(groups, kind)) for kind in kinds}


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(layout_flags(tp=2, pp=2, ep=2), id="TP2-PP2-EP2"),
        pytest.param(layout_flags(tp=2, cp=2, ep=4), id="TP2-CP2-EP4", marks=pytest.mark.extended),
        pytest.param(layout_flags(ep=8), id="EP8", marks=pytest.mark.extended),
    ],
)
def test_groups_are_those_of_megatron_core(sizes):
    of_ranks = run_ranks(real_groups, 8, sizes)
    for gpus_per_node in (2, 3, 4, 8):
        found = placement(ParallelConfig(**sizes), 8, gpus_per_node)
        for kind in of_ranks[0]:
            ranks = [groups[kind] for groups in of_ranks]
            spread = []
            for group in ranks:
                nodes = [rank // gpus_per_node for rank in group]
                spread.append((len(set(nodes)), -max(map(nodes.count, nodes))))
            nodes, fullest = max(spread)
            one = found[kind]
            assert (one.size, one.nodes, one.ranks_per_node) == (len(ranks[0]), nodes, -fullest), (
                kind,
                gpus_per_node,
            )


def test_a_cluster():
    layout = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=16)
    found = placement(layout, 1024, 8)
    assert (found["ep"].nodes, found["ep"].ranks_per_node) == (2, 8)
    assert (found["tp"].nodes, found["expt_dp"].size, found["expt_dp"].nodes) == (1, 64, 64)
    # every second rank of all machines
    assert (found["dp"].size, found["dp"].nodes, found["dp"].ranks_per_node) == (512, 128, 4)
    long_rows = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=8)
    over = placement(long_rows, 1024, 8)["cp"]  # every second of 16 ranks
    assert (over.size, over.nodes, over.ranks_per_node) == (8, 2, 4)
    with pytest.raises(ValueError, match="12 ranks do not divide into TP 8"):
        placement(ParallelConfig(tensor_model_parallel_size=8), 12, 8)
