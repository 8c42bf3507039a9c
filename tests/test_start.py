"""What the ranks ask of each other until the first step: it does not grow with them."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train_runs import SMALL, arguments, initialize, layout_flags, make_rows, write_rows


def start(rank, world_size, argv):
    """(name, group, bytes given, bytes that the rank has afterwards) of each collective of
    `build_run`.
    """

    from megatron_gkd.build import build_run
    from megatron_gkd.config import parse_config
    from megatron_gkd.output_lock import OutputLock
    from tests.collectives import Collectives

    config = parse_config(argv)
    parallel = initialize(config)
    with Collectives(parallel.groups) as seen, redirect_stdout(StringIO()) as said:
        with OutputLock(config.run.output_dir, lambda: None, print) as lock:
            run = build_run(config, parallel, lock)
        run.close()
    weights = sum(x.nbytes for x in run.model.parameters() if not x.requires_grad)
    calls = [(call.name, call.group, call.given, call.taken) for call in seen.of()]
    return calls, weights, said.getvalue()


@pytest.mark.parametrize(
    "sizes", [dict(), pytest.param(dict(tp=2, pp=2, ep=2), marks=pytest.mark.extended)]
)
def test_a_start_does_not_grow_with_the_ranks(tiny_folder, tmp_path, sizes):
    """Over the world nine maxima of a number or two and a broadcast of one, for the output folder,
    the data and the weights; and the weights themselves once.
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
            sizes_of_maxima = sorted(call[2] for call in maxima)
            assert sizes_of_maxima == [8] * 8 + [16]
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


def read_on_machines(rank, world_size, flags, changes):
    """Each rank on a machine of its own, with some flags of its own: what is wrong."""
    from megatron_gkd.config import parse_config
    from megatron_gkd.data import shared_folder
    from megatron_gkd.run_data import read_data

    shared_folder._machine = lambda: f"machine {rank}"
    configs = [parse_config(arguments(**flags | of_ranks[rank])) for of_ranks in changes]
    parallel, found = initialize(configs[0]), []
    for config in configs:
        try:
            read_data(config, parallel, lock=None)
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found


def test_machines_with_other_rows(tiny_folder, tmp_path):
    """One row more, one that is as long but another, other rows for evaluation, a config.json with
    a size that is none: said by all, as a ValueError.
    """
    rows = make_rows(9)
    changed = [rows[0] | {"input_ids": rows[0]["input_ids"][::-1]}, *rows[1:8]]
    names = ("here", "more", "other")
    paths = {
        name: dict(dataset=write_rows(tmp_path / f"{name}.jsonl", of_name))
        for name, of_name in zip(names, (rows[:8], rows, changed))
    }
    flags = dict(model=tiny_folder(**SMALL), output_dir=tmp_path / "out", prepared_rows="none")
    here, more, other = (paths[name] for name in names)
    evaluates = here | dict(val_dataset=here["dataset"])
    cases = [(here, here, here), (here, here, more), (here, other, more), (evaluates, here, here)]
    config = json.loads((Path(flags["model"]) / "config.json").read_text())
    config["thinker_config"]["text_config"]["num_experts"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    cases.append((here, here | dict(model=tmp_path), here))
    of_0, *others = run_ranks(read_on_machines, 3, flags, cases)
    assert all(of_rank == of_0 for of_rank in others)
    assert of_0[0] is None
    for said, rank, text in zip(
        of_0[1:],
        (2, 1, 1, 1),
        (
            "rows of --dataset '9 rows {}', rank 0 has '8 rows {}': it has --dataset ",
            "rows of --dataset '8 rows {}', rank 0 has '8 rows {}': it has --dataset ",
            "rows of --val_dataset '0 rows', rank 0 has '8 rows {}': it has --dataset ",
            r"^rank 1 \(on \S+\): \S+/config.json: text_config.num_experts is 0, and must be ",
        ),
    ):
        assert said.startswith(f"rank {rank} (on ")
        assert re.search(text.replace("{}", "[0-9a-f]{15}"), said)
