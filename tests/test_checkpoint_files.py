"""A checkpoint written by all ranks at once: the same bytes at every layout, each written by one
rank; and what must not grow with the number of ranks does not.
"""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora.modules import has_head_lora
from megatron_gkd.lora_targets import HEAD, LINEARS
from megatron_gkd.model.args import read_model_args
from megatron_gkd.plan.saving import HEADER_BYTES, NUM_COLLECTIVES, saved_bytes
from tests.collectives import Collectives
from tests.ranks import run_ranks
from tests.sizes import SMALLEST
from tests.train_runs import arguments, build_parts, layout_flags

ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"
FILES = (ADAPTER, f"teacher/{ADAPTER}", OPTIMIZER)
RANK, TARGETS = 3, [*LINEARS, HEAD]
ONE = (1, 1, 1, 1, 1)  # ranks, TP, PP, EP, CP
LAYOUTS = {
    "one rank": ONE,
    "DP 1": (4, 2, 1, 2, 2),
    "DP 2": (4, 2, 1, 4, 1),
    "DP 4": (4, 1, 1, 2, 1),
    "DP 8": (8, 1, 1, 4, 1),
    "16 ranks": (16, 4, 2, 2, 1),
}
MORE = {
    "EP 4 in TP 4": (4, 4, 1, 4, 1),
    "PP 2, CP 2": (8, 2, 2, 2, 2),
    "DP 3": (6, 2, 1, 2, 1),
    "CP 4": (4, 1, 1, 1, 4),
}


class Counting:
    """A safetensors file that counts the numbers which are read."""

    def __init__(self, opened, read):
        self.opened, self.read = opened, read

    def __enter__(self):
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *error):
        return self.opened.__exit__(*error)

    def get_slice(self, name):
        self.slice = self.file.get_slice(name)
        return self

    def __getitem__(self, index):
        values = self.slice[index]
        self.read.append(values.numel())
        return values


def num_saved(parts):
    """Numbers of this rank that belong in a checkpoint: both adapters, two moments of one."""
    model, moments = parts.model, parts.optimizer.moments()
    total = sum(p.numel() for name, p in model.named_parameters() if ".slots." in name)
    total += 2 * sum(p.numel() for p in moments)
    if has_head_lora(model):
        num_rows = len(model.head_lora.slots["student"].up[HEAD])
        end = (parts.parallel.tp_rank + 1) * num_rows
        padding = min(max(end - parts.model_args.vocab_size, 0), num_rows)
        total -= (2 + 2) * RANK * padding
    return total


def save_at_layout(rank, world_size, argv, source, output):
    """Load the checkpoint `source` (without one: random numbers everywhere) and write it again.
    (numbers read, and those that this rank has; file -> ranges written; files opened; collectives;
    what was synced and renamed in which order)
    """
    from megatron_gkd import checkpoint
    from megatron_gkd.formats import safetensors_file

    parts = build_parts(argv, audio=True, visual=True)
    read, ranges, opened, lasting = [], defaultdict(list), [], []
    run = dict(model=parts.model, model_args=parts.model_args, parallel=parts.parallel)
    run |= dict(optimizer=parts.optimizer, teacher=True)
    if source:
        open_file = checkpoint._opened
        checkpoint._opened = lambda path: Counting(open_file(path), read)
        checkpoint.load_checkpoint(source, **run)
    else:
        moments = parts.optimizer.moments().values()
        adapters = [p for name, p in parts.model.named_parameters() if ".slots." in name]
        for values in [*adapters, *(moment for both in moments for moment in both.values())]:
            values.data.normal_()
        parts.optimizer.num_updates = 7

    def write_all(descriptor, data, offset, write=safetensors_file.write_all):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(output)
        ranges["/".join(name.parts[1:])].append((offset, offset + len(data)))
        write(descriptor, data, offset)

    def note(event, arguments):
        if event == "open" and str(arguments[0]).endswith((".safetensors", ".json")):
            opened.append(arguments[0])
        elif event == "os.rename":
            before, after = (os.path.relpath(path, output) for path in arguments[:2])
            lasting.append(f"{before} -> {after}")

    def fsync(descriptor, sync=os.fsync):
        sync(descriptor)
        lasting.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), output))

    safetensors_file.write_all, os.fsync = write_all, fsync
    sys.addaudithook(note)
    settings = dict(alpha=5, dropout=0.0, base_model="a model", state={})
    with Collectives(parts.parallel.groups) as seen:
        checkpoint.save_checkpoint(output, 3, **run, **settings)
    counted, num_opened = seen.counted(with_alone=True), len(opened)
    return (sum(read), num_saved(parts)), dict(ranges), num_opened, counted, lasting


@pytest.fixture(scope="module")
def model_folder(tiny_folder):
    return tiny_folder(**SMALLEST | dict(num_hidden_layers=4))


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    """layout -> (what its ranks did, the folder that they wrote). One rank makes random numbers,
    the other layouts load them. LoRA on all that can carry it, with a teacher that follows.
    """
    flags = dict(model=model_folder, dataset="none", output_dir="none", teacher_ema=0.3)
    flags |= dict(lora_rank=RANK, lora_target_modules=",".join(TARGETS), lora_towers=True)
    made = {}

    def save(layout):
        if layout not in made:
            source = None if layout == ONE else save(ONE)[1]
            output, (world_size, *sizes) = tmp_path_factory.mktemp("saved"), layout
            argv = arguments(**flags, **layout_flags(*sizes))
            ranks = run_ranks(save_at_layout, world_size, argv, source, str(output))
            made[layout] = ranks, output / "checkpoint-3"
        return made[layout]

    return save


every_layout = pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]
    + [pytest.param(of, id=name, marks=pytest.mark.extended) for name, of in MORE.items()],
)


def test_files_are_those_of_safetensors(saved, tmp_path):
    _, folder = saved(ONE)
    for name in FILES:
        tensors = load_file(folder / name)
        assert all(tensor.any() for tensor in tensors.values())
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        ours, theirs = (folder / name).read_bytes(), (tmp_path / "theirs").read_bytes()
        if name == OPTIMIZER:
            assert ours == theirs
        size = 4 * sum(tensor.numel() for tensor in tensors.values())
        assert ours[-size:] == theirs[-size:]


@every_layout
def test_the_same_bytes_and_each_written_once(saved, layout):
    """What was loaded is written again to the last bit, the towers, the lm_head with its padding,
    shared key/value heads and the teacher included. No byte has two writers, none has none.
    """
    (ranks, folder), (_, expected) = saved(layout), saved(ONE)
    names = [
        sorted(str(path.relative_to(of)) for path in of.rglob("*.*")) for of in (folder, expected)
    ]
    assert names[0] == names[1] and set(FILES) < set(names[0])
    for name in names[0]:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    for name in FILES:
        ranges = sorted(one for _, ranges, *_ in ranks for one in ranges.get(name, ()))
        starts, ends = zip(*ranges)
        assert starts == (0, *ends[:-1]) and ends[-1] == (folder / name).stat().st_size, name


def test_what_a_crash_of_the_machine_leaves(saved):
    """Every file and folder is on the disk when the checkpoint gets its name, and its name is when
    it is said to be the latest.
    """
    (of_0, of_1), folder = saved((2, 1, 1, 2, 1))
    partial, lasting = ".checkpoint-3.partial", of_0[-1]
    named = lasting.index(f"{partial} -> checkpoint-3")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert {f"{partial}/{name}" for name in names} <= set(lasting[:named])
    assert lasting[named - 1] == partial  # with the names of all files
    (latest,) = (
        place for place, what in enumerate(lasting) if what.endswith("-> latest_checkpoint")
    )
    assert "." in lasting[named:latest]
    for rank in (of_0, of_1):
        for name, ranges in rank[1].items():
            times = rank[-1].count(f"{partial}/{name}")  # rank 0 has made it
            assert ranges and times == (2 if rank is of_0 else 1)


@every_layout
def test_what_must_not_grow(saved, model_folder, layout):
    """The collectives: six of a few numbers, at one rank and at sixteen. Files that a rank opens.
    Numbers that it reads: those it holds. Bytes that it writes: of its pipeline stage an equal
    share, as the planner says.
    """
    ranks, folder = saved(layout)
    world_size, tp, pp, ep, cp = layout
    few = Counter({("all_reduce", "world", 8, 8): 4, ("broadcast", "world", 32, 32): 1})
    few[("all_reduce", "world", 96, 96)] = 1  # the digests of three files
    for number, ((read, held), _, num_opened, collectives, _) in enumerate(ranks):
        assert collectives == few and few.total() == NUM_COLLECTIVES
        assert read == (0 if layout == ONE else held)
        # written and looked at again; rank 0 makes them and reads their headers, writes and syncs
        # four of JSON and reads three of them
        assert num_opened <= (2 * len(FILES) if number else 4 * len(FILES) + 2 * 4 + 3)
    tensors = [load_file(folder / name) for name in FILES]
    towers = sum(
        t.numel() for name, t in tensors[0].items() if "_tower." in name or "visual." in name
    )
    settings = dict(world_size=world_size, lora_rank=RANK, targets=TARGETS, teacher_follows=True)
    settings |= dict(layout=ParallelConfig(**layout_flags(tp, pp, ep, cp)), tower_parameters=towers)
    args = read_model_args(model_folder)
    expected = saved_bytes(args, **settings).shares
    written = [
        sum(stop - start for of_file in ranges.values() for start, stop in of_file if start)
        for _, ranges, *_ in ranks
    ]
    assert sum(written) == 4 * sum(t.numel() for of_file in tensors for t in of_file.values())
    assert sum(written) == pytest.approx(sum(expected))
    some_rows = 3 * (2 + 2) * 4 * args.hidden_size  # of each of three kinds of copies one
    assert written == pytest.approx(expected, abs=some_rows)
    size = sum((folder / name).stat().st_size for name in FILES)
    num_tensors = sum(map(len, tensors))
    assert (size - sum(written)) / num_tensors == pytest.approx(HEADER_BYTES, rel=0.15)
    planned = saved_bytes(args, **settings, ranks_of_node=world_size)
    assert planned.node == planned.total
