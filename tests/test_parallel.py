"""Process groups, refused layouts, the device, random state that is a function of the step, and the
shards of a sequence.
"""

import os

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_gkd import parallel
from tests.processes import in_a_process
from tests.ranks import run_ranks


def place_at_layout(rank, world_size, tp, pp, ep, cp=1):
    place = parallel.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        context_parallel_size=cp,
    )
    members = {
        name: torch.distributed.get_process_group_ranks(getattr(place.groups, name))
        for name in ("tp", "pp", "cp", "dp", "dp_cp", "tp_cp", "ep", "expt_dp")
    }
    sizes = (place.tp_size, place.pp_size, place.dp_size, place.ep_size)
    ranks = (place.tp_rank, place.pp_rank, place.dp_rank, place.ep_rank)
    if cp > 1:
        rows = (place.row_multiple, place.sequence_multiple, place.is_first_replica)
        return members, sizes, ranks, (place.cp_size, place.cp_rank), rows
    assert (place.cp_size, place.cp_rank, place.row_multiple) == (1, 0, 1)
    assert place.is_first_replica == (place.dp_rank == 0) and place.sequence_multiple == tp
    stage = (place.is_first_stage, place.is_last_stage, place.last_stage_rank)
    return members, sizes, ranks, stage, (place.rank, place.world_size)


def test_groups_and_ranks():
    """TP2 PP2 DP2 EP4: experts are spread over the TP and DP ranks of a stage, tensor ranks are
    neighbours.
    """
    results = run_ranks(place_at_layout, 8, 2, 2, 4)
    for rank, (members, sizes, ranks, (first, last, last_rank), own) in enumerate(results):
        assert sizes == (2, 2, 2, 4) and own == (rank, 8)
        stage = rank // 4
        assert ranks == (rank % 2, stage, rank // 2 % 2, rank % 4)
        assert members["tp"] == [rank - rank % 2, rank - rank % 2 + 1]
        assert members["ep"] == list(range(4 * stage, 4 * stage + 4)) and members["expt_dp"] == [
            rank
        ]
        assert members["pp"] == [rank % 4, rank % 4 + 4] and members["dp"] == [
            4 * stage + rank % 2,
            4 * stage + rank % 2 + 2,
        ]
        assert (first, last, last_rank) == (stage == 0, stage == 1, rank % 4 + 4)


def test_ranks_that_share_rows():
    """TP2 CP2 DP2 EP4: they are further data-parallel ranks for the weights; experts are spread
    over the tensor-, context- and data-parallel ranks.
    """
    for rank, (members, sizes, ranks, context, rows) in enumerate(
        run_ranks(place_at_layout, 8, 2, 1, 4, 2)
    ):
        tp, cp, dp = rank % 2, rank // 2 % 2, rank // 4
        assert sizes == (2, 1, 2, 4) and ranks == (tp, 0, dp, rank % 4) and context == (2, cp)
        assert members["tp"] == [rank - tp, rank - tp + 1]
        assert members["cp"] == [4 * dp + tp, 4 * dp + 2 + tp]
        assert members["dp"] == [2 * cp + tp, 4 + 2 * cp + tp]
        assert members["dp_cp"] == [tp, 2 + tp, 4 + tp, 6 + tp]
        assert members["tp_cp"] == list(range(4 * dp, 4 * dp + 4)) == members["ep"]
        assert members["expt_dp"] == [rank % 4, rank % 4 + 4]
        assert rows == (4, 8, cp == dp == 0)


def leave_and_return(rank, world_size):
    for _ in range(2):
        parallel.initialize(torch.device("cpu"))
        parallel.destroy()
        assert not torch.distributed.is_initialized()
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=rank, world_size=world_size
        )


def test_destroy_leaves_nothing_behind():
    run_ranks(leave_and_return, 1)


def join_without_torchrun(rank, world_size):
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    place = parallel.initialize(torch.device("cpu"))
    return place.rank, place.world_size, place.tp_size


def test_a_process_of_its_own_is_a_world_of_one():
    assert run_ranks(join_without_torchrun, 1) == [(0, 1, 1)]


def seconds_of_groups(rank, world_size):
    """Seconds that each group of a run waits, by what it is called; the run itself is left out."""
    from torch.distributed.distributed_c10d import _world

    from megatron_gkd import train

    torch.distributed.destroy_process_group()  # whose own timeout is the harness's
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    found = {}

    def look(*args):
        for group in _world.pg_map:
            seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            found[group.group_desc] = seconds
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", look)
        patch.setattr(train, "destroy", lambda: None)  # the harness still needs the world
        flags = ["--model", "m", "--dataset", "d", "--device", "cpu"]
        train.main([*flags, "--collective_timeout", "77"])
    return found


def test_every_group_of_a_run_waits_collective_timeout():
    """Not the world's alone: megatron-core gives the groups of the layout 30 minutes of its own. A
    little longer, so that liveness.py says first who has not come.
    """
    (seconds,) = run_ranks(seconds_of_groups, 1)
    layout = {"TENSOR_MODEL_PARALLEL_GROUP", "PIPELINE_MODEL_PARALLEL_GROUP"}
    assert layout | {"default_pg"} <= seconds.keys()
    assert set(seconds.values()) == {85.85}, seconds  # 77, a twentieth of it, and 5


def refusals(rank, world_size, layouts):
    messages = []
    for tp, pp, ep, cp in layouts:
        with pytest.raises(ValueError) as error:
            parallel.initialize(
                torch.device("cpu"),
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                expert_model_parallel_size=ep,
                context_parallel_size=cp,
            )
        messages.append(str(error.value))
    return messages


def graph_registration(asked):
    os.environ.pop("NCCL_GRAPH_REGISTER", None)
    os.environ.update(asked)
    parallel.join(torch.device("cpu"))
    return [os.environ["NCCL_GRAPH_REGISTER"]]


@pytest.mark.parametrize("asked, expected", [({}, "0"), ({"NCCL_GRAPH_REGISTER": "1"}, "1")])
def test_nccl_leaves_the_buffers_of_graphs_alone(asked, expected):
    """Before it starts, in any process that joins a group; megatron-core refuses other settings
    beside expandable segments, too.
    """
    assert in_a_process(graph_registration, asked) == [expected]


def test_impossible_worlds_name_both_numbers():
    layouts = [(3, 1, 1, 1), (4, 2, 1, 1), (2, 1, 1, 4), (1, 2, 4, 1)]
    messages = run_ranks(refusals, 4, layouts)[0]
    for message, (tp, pp, _, cp) in zip(messages, layouts[:3]):
        assert (
            f"world size 4 is not divisible by tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp} x context_parallel_size {cp}"
        ) in message
    assert (
        "the 2 ranks of a pipeline stage are not divisible by expert_model_parallel_size 4"
        in messages[3]
    )


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.resolve_device("auto") == parallel.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU here"):
        parallel.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (
        parallel.resolve_device("auto")
        == parallel.resolve_device("cuda")
        == torch.device("cuda", 3)
    )
    assert parallel.resolve_device("cpu") == torch.device("cpu")


def draws(rank, world_size, tp, ep, seeds_and_steps, cp=1):
    """The rank's part, and the numbers drawn after seeding each (seed, step): before, within and
    after one of the contexts in which megatron-core runs a stage's layers.
    """
    place = parallel.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        context_parallel_size=cp,
    )
    results = []
    for seed, step in seeds_and_steps:
        parallel.seed_step(seed, step, place)
        numbers = torch.rand(3).tolist()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            numbers += torch.rand(3).tolist()
        results.append(numbers + torch.rand(3).tolist())
    return place.part, results


def test_random_state_is_a_function_of_the_step():
    """TP2 DP2 EP4: TP ranks share the generator, DP ranks do not; a step gives the same numbers
    again.
    """
    results = run_ranks(draws, 4, 2, 4, [(42, 0), (42, 1), (42, 0), (43, 0)])
    for rank, (part, (first, second, again, other_seed)) in enumerate(results):
        assert part == rank % 2
        assert first == again and first != second and first != other_seed
        assert len(set(first)) == len(first)
        neighbour, replica = results[rank ^ 1][1][0], results[rank ^ 2][1][0]
        assert first == neighbour and not set(first) & set(replica)


def test_random_state_of_ranks_that_share_rows():
    """TP2 CP2 EP2: all share the generator, and each has its own part of the rows."""
    results = run_ranks(draws, 4, 2, 2, [(42, 0)], 2)
    assert len({str(numbers) for _, numbers in results}) == 1
    assert sorted(part for part, _ in results) == [0, 1, 2, 3]


def shard_and_gather(rank, world_size, tp, whole, cotangents):
    """The shard of `whole`, what `gather_sequence` makes of it under both of its settings, and the
    gradients of the shard and of `whole` for this rank's cotangent [S, B, H].
    """
    place = parallel.initialize(torch.device("cpu"), tensor_model_parallel_size=tp)
    results = []
    for is_part_of_a_sum in (True, False):
        x = whole.clone().requires_grad_()
        shard = place.shard_sequence(x)
        shard.retain_grad()
        joined = place.gather_sequence(shard, tensor_parallel_output_grad=is_part_of_a_sum)
        joined.backward(cotangents[place.tp_rank])
        results.append((shard.detach(), joined.detach(), shard.grad, x.grad))
    positions = place.shard_sequence(torch.arange(len(whole)))
    return place.tp_rank, place.sequence_multiple, positions, results


@pytest.mark.parametrize("world_size, tp", [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_shards_of_a_sequence_join_to_it_in_value_and_gradient(world_size, tp):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(8, 3, 5, generator=generator)
    cotangents = torch.randn(tp, 8, 3, 5, generator=generator)  # another one on each rank
    results = run_ranks(shard_and_gather, world_size, tp, whole, cotangents)
    sharded = torch.cat([positions for _, _, positions, _ in results[:tp]])
    assert torch.equal(sharded.sort().values, torch.arange(8))  # each position on one rank
    own_gradients = torch.cat(
        [cotangents[rank][positions] for rank, _, positions, _ in results[:tp]]
    )[sharded.argsort()]  # at each position that of the rank which holds it
    for _, multiple, positions, (summed, same) in results:
        assert multiple == tp and len(positions) == 8 // tp
        for (shard, joined, shard_grad, grad), expected in (
            (summed, cotangents.sum(0)),
            (same, own_gradients),
        ):
            assert torch.equal(shard, whole[positions]) and torch.equal(joined, whole)
            torch.testing.assert_close(shard_grad, expected[positions])
            torch.testing.assert_close(grad, expected)


def round_trip_of_shards(rank, world_size, shards, cotangents):
    place = parallel.initialize(torch.device("cpu"), tensor_model_parallel_size=world_size)
    x = shards[rank].clone().requires_grad_()
    y = place.shard_sequence(place.gather_sequence(x, tensor_parallel_output_grad=False))
    y.backward(cotangents[rank])
    return y.detach(), x.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_joined_sequence_is_cut_into_the_same_shards(world_size):
    shards, cotangents = torch.randn(2, world_size, 3, 2, 5)
    results = run_ranks(round_trip_of_shards, world_size, shards, cotangents)
    for rank, (value, gradient) in enumerate(results):
        assert torch.equal(value, shards[rank]) and torch.equal(gradient, cotangents[rank])


def float32_settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        matmul.allow_tf32,
        cudnn.allow_tf32,
        *(settings.fp32_precision for settings in (matmul, cudnn.conv, cudnn.rnn)),
    )


def initialize_where_tf32_is_asked_for(rank, world_size):
    def ask_for_all():
        torch.backends.fp32_precision = "tf32"

    def ask_by_new_names():
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        for settings in (matmul, cudnn.conv, cudnn.rnn):
            settings.fp32_precision = "tf32"

    def ask_by_old_names():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True

    found = []
    for ask in (ask_for_all, ask_by_new_names, ask_by_old_names):
        ask()
        parallel.initialize(torch.device("cpu"))
        found.append(float32_settings())
        parallel.parallel_state.destroy_model_parallel()
    ask_by_old_names()
    before = float32_settings()
    parallel.initialize(torch.device("cpu"), dtype=torch.bfloat16)
    return found, before, float32_settings()


def test_float32_is_not_rounded_to_tf32():
    """cuDNN's convolutions are by default."""
    ((found, before, after),) = run_ranks(initialize_where_tf32_is_asked_for, 1)
    assert found == [("highest", False, False, "ieee", "ieee", "ieee")] * 3
    assert before == after == ("high", True, True, "tf32", "tf32", "tf32")
