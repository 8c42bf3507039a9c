"""The collectives of a training step, of one that learns from the data set's responses and of one
that writes its own: by group and bytes, the same at any number of data-parallel ranks.
docs/collectives.md states the numbers.
"""

from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train_runs import SMALL, arguments, initialize, layout_flags, make_rows, write_rows

KINDS = ("off-policy", "on-policy")
PAGE_VERSION = "0.16.1"  # of megatron-core, with which the page counted
# Groups over data-parallel ranks; `world` has them too.
OF_REPLICAS = ("dp", "dp_cp", "expt_dp", "world")


def collectives_of_steps(rank, world_size, argv):
    """Of the first and the second step of a run, from when the loop has its rows to when it has the
    next step's: (name, group, bytes given, bytes taken) -> calls.
    """

    from megatron_gkd import train
    from megatron_gkd.config import parse_config
    from megatron_gkd.liveness import Membership
    from megatron_gkd.stop_requests import StopRequests
    from tests.collectives import Collectives

    config = parse_config(argv)
    parallel = initialize(config)
    train_step, found = train.train_step, []

    def begin(run, batches):
        found.append(seen.counted())
        seen.calls.clear()
        return train_step(run, batches)

    train.train_step = begin
    with Collectives(parallel.groups) as seen:
        train.train(config, parallel, StopRequests(None), Membership())
    return dict(zip(KINDS, found[1:]))


def steps(folder, root, dp, **layout):
    """kind -> what each rank counted of a step with two rows a data-parallel rank. All rows are the
    same, so that experts get as many tokens on every rank, and responses are as long.
    """
    (row,) = make_rows(1)
    name = "-".join(map(str, (dp, *layout.items())))
    argv = arguments(
        model=folder,
        dataset=write_rows(root / f"rows-{name}.jsonl", [row] * 2 * dp),
        output_dir=root / name,
        max_steps=3,
        per_device_train_batch_size=2,
        lmbda="0:0,1:1",
        rollout_temperature=0,
        repetition_penalty=1,
        max_completion_length=4,
        lora_rank=4,
        save_only_model="true",
        **layout_flags(**layout),
    )
    world_size = dp * layout.get("tp", 1) * layout.get("pp", 1)
    ranks = run_ranks(collectives_of_steps, world_size, argv)
    return {kind: [of_rank[kind] for of_rank in ranks] for kind in KINDS}


LAYOUTS = {
    "TP 1, EP 1": {},
    "TP 2, EP 2": dict(tp=2, ep=2),
    "EP 2": dict(ep=2),
    "PP 2, EP 2": dict(pp=2, ep=2),
}


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("TP 1, EP 1", (1, 2, 4, 8)),
        pytest.param("TP 2, EP 2", (1, 2), marks=pytest.mark.smoke),
        pytest.param("TP 2, EP 2", (1, 2, 4), marks=pytest.mark.extended),
        pytest.param("EP 2", (2, 4, 8), marks=pytest.mark.extended),
        pytest.param("PP 2, EP 2", (2, 4), marks=pytest.mark.extended),
    ],
)
def test_a_step_asks_for_the_same_at_any_dp(tiny_folder, tmp_path, name, sizes):
    """Inside a replica each rank makes the same calls with the same bytes. Between replicas there
    are sums alone, of the same bytes for any number of them; over the world maxima of few numbers.
    """
    layout, folder = LAYOUTS[name], tiny_folder(**SMALL)
    found = {dp: steps(folder, tmp_path, dp, **layout) for dp in sizes}
    for kind in KINDS:
        inside = {dp: by_replica(of[kind], dp, layout, inside=True) for dp, of in found.items()}
        between = {dp: by_replica(of[kind], dp, layout, inside=False) for dp, of in found.items()}
        first = inside[min(sizes)]
        for dp in sizes:
            assert inside[dp] == first * (len(inside[dp]) // len(first)), (kind, dp)
            for calls in sum(between[dp], []):
                for (call, group, given, taken), number in calls.items():
                    assert call == "all_reduce" and given == taken
                    assert group != "world" or (given <= 16 and number <= 2), (kind, calls)
        # where each kind of parameters is on several replicas
        most = between[max(sizes)][0]
        for dp in sizes:
            if dp > layout.get("ep", 1) // layout.get("tp", 1):
                assert between[dp] == [most] * len(between[dp]), (kind, dp)
    if version("megatron-core") == PAGE_VERSION:
        lines = table(found[max(sizes)])
        assert lines == lines_of_the_page(name), "\n".join(lines)


def by_replica(
    ranks: list[Counter], dp: int, layout: dict[str, int], *, inside: bool
) -> list[list[dict]]:
    """The calls of each rank, in groups of ranks that are together in all groups but those of
    `OF_REPLICAS`: of each pipeline stage the ranks that share experts or tensors.
    """
    stages = layout.get("pp", 1)
    together = max(layout.get("tp", 1), layout.get("ep", 1))
    kept = [
        {call: number for call, number in calls.items() if (call[1] in OF_REPLICAS) != inside}
        for calls in ranks
    ]
    per_stage = len(kept) // stages
    groups = []
    for first in range(0, per_stage, together):
        groups.append(
            [
                calls
                for stage in range(stages)
                for calls in kept[stage * per_stage + first : stage * per_stage + first + together]
            ]
        )
    return groups


def table(found: dict[str, list[Counter]]) -> list[str]:
    """The lines of the page, of rank 0: of each call and group the number and the bytes, the larger
    of those that go in and come out.
    """
    sums: dict[tuple[str, str], list[int]] = {}
    for place, kind in enumerate(KINDS):
        for (call, group, given, taken), number in found[kind][0].items():
            row = sums.setdefault((call, group), [0] * 4)
            row[2 * place] += number
            row[2 * place + 1] += number * max(given, taken)
    return [
        f"| {call} | {group} | " + " | ".join(f"{number:,}" for number in row) + " |"
        for (call, group), row in sorted(sums.items(), key=lambda item: item[0][::-1])
    ]


def lines_of_the_page(name: str) -> list[str]:
    """Of the table under this title."""
    page = (Path(__file__).parents[1] / "docs/collectives.md").read_text(encoding="utf-8")
    part = page.split(f"### {name}\n")[1].split("\n#")[0]
    return [line for line in part.splitlines() if line.startswith("| ")][1:]
