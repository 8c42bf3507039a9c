"""The recorder of collectives sees each way in which the package and megatron-core make one."""

import pytest

from tests.ranks import run_ranks


def record(rank, world_size):
    import torch
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from torch import distributed as dist
    from torch.distributed import P2POp

    from megatron_gkd.parallel import initialize
    from tests.collectives import Collectives

    # dp_cp, dp and expt_dp have the same two ranks
    parallel = initialize(torch.device("cpu"), tensor_model_parallel_size=2)
    groups, peer = parallel.groups, rank ^ 1
    other = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found = {}

    def see(name, function):
        with Collectives(groups) as seen:
            function()
        found[name] = [tuple(call) for call in seen.calls]

    x = torch.ones(6)
    see("all_reduce", lambda: dist.all_reduce(x, group=groups.dp_cp))
    see("of equal ranks", lambda: dist.all_reduce(x, group=groups.expt_dp))
    see("unnamed", lambda: dist.all_reduce(x, group=other))
    see("async", lambda: dist.all_reduce(x, async_op=True).wait())

    def coalesced():
        with dist._coalescing_manager(groups.dp_cp, async_ops=True) as work:
            dist.all_reduce(x, group=groups.dp_cp)
            dist.all_reduce(x[:2], group=groups.dp_cp)
        work.wait()

    see("coalesced", coalesced)
    see("all_gather", lambda: dist.all_gather([x.clone() for _ in range(4)], x))
    see("objects", lambda: dist.all_gather_object([None] * 4, "a" * 100))
    see("broadcast", lambda: dist.broadcast_object_list([None], 0, group=None))
    see("barrier", dist.barrier)
    split = torch.empty(4 if rank % 2 else 2)
    ones = torch.ones(3)
    splits = ([2, 2], [1, 2]) if rank % 2 else ([1, 1], [1, 2])
    see("all_to_all", lambda: dist.all_to_all_single(split, ones, *splits, group=groups.tp))

    def exchange():
        y = torch.empty(6)
        ops = [P2POp(dist.isend, x, peer, groups.tp), P2POp(dist.irecv, y, peer, groups.tp)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    see("messages", exchange)

    leaf = torch.ones(2, 1, requires_grad=True)
    gathered = gather_from_sequence_parallel_region(leaf * 1, group=groups.tp)
    see("backward", gathered.sum().backward)
    return found


@pytest.mark.smoke
def test_every_kind_is_seen():
    for rank, found in enumerate(run_ranks(record, 4)):
        one = {name: calls[0] for name, calls in found.items()}
        assert one["all_reduce"] == ("all_reduce", "dp_cp", 2, 24, 24, 1, False)
        assert one["of equal ranks"][1] == "expt_dp"
        assert one["unnamed"][1].startswith(("ranks 0 1 (", "ranks 2 3 (")[rank // 2])
        assert one["async"] == ("all_reduce", "world", 4, 24, 24, 1, True)
        assert found["coalesced"] == [("all_reduce", "dp_cp", 2, 32, 32, 2, True)]
        assert one["all_gather"] == ("all_gather", "world", 4, 24, 96, 1, False)
        sizes, objects = found["objects"]
        assert sizes == ("all_gather", "world", 4, 8, 32, 1, False)
        assert objects[0] == "all_gather" and objects[3] > 100 and objects[4] == 4 * objects[3]
        assert [call[0] for call in found["broadcast"]] == ["broadcast"] * 2
        assert one["barrier"] == ("barrier", "world", 4, 0, 0, 0, False)
        taken = 16 if rank % 2 else 8
        assert one["all_to_all"] == ("all_to_all", "tp", 2, 12, taken, 1, False)
        assert sorted(call[:5] for call in found["messages"]) == [
            ("recv", "tp", 2, 0, 24),
            ("send", "tp", 2, 24, 0),
        ]
        assert one["backward"][:5] == ("reduce_scatter", "tp", 2, 16, 8)
