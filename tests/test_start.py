"""What the ranks ask of each other until the first step: it does not grow with them."""

from contextlib import redirect_stdout
from io import StringIO

import pytest

from tests.ranks import run_ranks
from tests.train_runs import SMALL, arguments, initialize, layout_flags, make_rows, write_rows


def start(rank, world_size, argv):
    """(name, group, bytes given, bytes that the rank has afterwards) of each collective of
    `build_run`.
    """

    from megatron_gkd.build import build_run
    from megatron_gkd.config import parse_config
    from tests.collectives import Collectives

    config = parse_config(argv)
    parallel = initialize(config)
    with Collectives(parallel.groups) as seen, redirect_stdout(StringIO()) as said:
        run = build_run(config, parallel)
    run.close()
    weights = sum(x.nbytes for x in run.model.parameters() if not x.requires_grad)
    calls = [(call.name, call.group, call.given, call.taken) for call in seen.of()]
    return calls, weights, said.getvalue()


@pytest.mark.parametrize(
    "sizes", [dict(), pytest.param(dict(tp=2, pp=2, ep=2), marks=pytest.mark.extended)]
)
def test_a_start_does_not_grow_with_the_ranks(tiny_folder, tmp_path, sizes):
    """Of a number over the world five maxima and a broadcast, for the output folder, the data and
    the weights; and the weights themselves once.
    """
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(40))
    argv = arguments(
        model=tiny_folder(**SMALL),
        dataset=rows,
        split_dataset_ratio=0.2,
        lmbda=0.5,
        load_from_peers="true",
        output_dir=tmp_path / "out",
        **layout_flags(**sizes),
    )
    replica, seen = sizes.get("tp", 1) * sizes.get("pp", 1), []
    for dp in (1, 2, 4, *([] if sizes else [8])):
        of_ranks = run_ranks(start, dp * replica, argv)
        for calls, weights, _ in of_ranks:
            maxima = [call for call in calls if call[0] == "all_reduce"]
            assert maxima == [("all_reduce", "world", 8, 8)] * 5
            broadcasts = [call for call in calls if call[0] == "broadcast"]
            assert broadcasts.pop(0) == ("broadcast", "world", 8, 8)
            sent = sum(given for _, _, given, _ in broadcasts)
            assert len(broadcasts) == (2 if dp > 1 else 0)
            assert len(calls) == len(maxima) + 1 + len(broadcasts)
            assert (0.98 * weights < sent <= weights) if dp > 1 else not sent  # without padding
        assert "with the rest from its peers" in of_ranks[0][2]
        if dp > 1:
            ends = of_ranks[0], of_ranks[-1]  # the same places in the layout at every size
            seen.append([calls for calls, _, _ in ends])
    assert len(seen) > 1 and all(calls == seen[0] for calls in seen)
