"""Weights read once over the ranks that hold them: the same parameters, each byte read by one rank
and sent in one broadcast of bounded size; what one rank cannot read ends all.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_gkd import parallel
from megatron_gkd.formats import loading, peers
from megatron_gkd.formats.loading import load_weights, parameter_slices
from megatron_gkd.formats.safetensors_folder import SINGLE
from megatron_gkd.formats.torch_dist import TorchDist
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.media import towers as towers_module
from megatron_gkd.media.towers import build_towers
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from tests.collectives import Collectives
from tests.conversions import WHOLE
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks
from tests.sizes import SMALLEST
from tests.train_runs import layout_flags

BUCKET = 3000  # bytes; a row of the smallest model's embeddings has 64


class RecordedReads:
    """A folder that writes down what is read of it."""

    def __init__(self, folder):
        self.folder, self.reads = folder, []

    def slice(self, name):
        source = self.folder.slice(name)

        class Recorded:
            def __getitem__(_, index):
                values = source[index]
                limits = [part.indices(n)[:2] for part, n in zip(index, source.get_shape())]
                self.reads.append((name, limits, values.nbytes))
                return values

        return Recorded()


def place_at(**sizes):
    """The layout, in a process that may have had another one."""
    if parallel.parallel_state.model_parallel_is_initialized():
        parallel.parallel_state.destroy_model_parallel()
    return parallel.initialize(torch.device("cpu"), **layout_flags(**sizes))


def decoder_without_weights(model_args, place, dtype=torch.bfloat16):
    model = build_decoder(model_args, place, dtype)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def load_both_ways(rank, world_size, folder, layouts):
    """For each layout what was read and sent with peers; asserts that the parameters are those that
    each rank reads by itself.
    """
    peers.BUCKET_BYTES = BUCKET
    model_args, open_folder, found = read_model_args(folder), loading.open_folder, []
    for sizes in layouts:
        place = place_at(**sizes)
        alone = decoder_without_weights(model_args, place)
        num_bytes = load_weights(alone, model_args, place, folder)
        together = decoder_without_weights(model_args, place)
        opened = []
        loading.open_folder = lambda *args: (
            opened.append(RecordedReads(open_folder(*args))) or opened[-1]
        )
        with Collectives(place.groups) as seen:
            read = load_weights(together, model_args, place, folder, from_peers=True)
        loading.open_folder = open_folder
        reads = [one for recorded in opened for one in recorded.reads]
        assert read == sum(size for *_, size in reads)
        pairs = list(zip(alone.named_parameters(), together.named_parameters()))
        assert pairs
        for (name, one), (_, other) in pairs:
            assert torch.equal(one, other), (sizes, name)  # NaN is not equal to itself
        parts = list(parameter_slices(alone, model_args, place))
        held = {"expt_dp": 0, "dp_cp": 0}
        for part in parts:
            is_expert = ".experts." in part.stored.name
            held["expt_dp" if is_expert else "dp_cp"] += part.view.numel() * 2
        shared = {
            role: held[role] if getattr(place.groups, role).size() > 1 else 0 for role in held
        }
        broadcasts = {role: [c.given for c in seen.of("broadcast", group=role)] for role in held}
        others = [c for c in seen.of() if c.name != "broadcast"]
        found.append((num_bytes, reads, shared, broadcasts, others))
    return found


CASES = {
    2: [dict(), dict(ep=2), dict(cp=2)],
    4: [dict(), dict(tp=2, ep=2), dict(pp=2), dict(cp=2, ep=4), dict(tp=2, ep=4), dict(tp=4)],
    8: [dict(), dict(tp=2, pp=2, ep=4), dict(tp=4, ep=4), dict(tp=2, cp=2, ep=2), dict(pp=2, cp=2)],
}


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.extended)])
def test_each_byte_is_read_by_one_and_sent_once(tiny_folder, world_size):
    """Of several layouts. What tensor-parallel ranks replicate (norms, router, k and v of a shared
    head) each of them reads.
    """
    folder, layouts = tiny_folder(**SMALLEST, torch_dtype="bfloat16"), CASES[world_size]
    sizes = decoder_tensors(read_model_args(folder))
    for layout, of_ranks in zip(
        layouts, zip(*run_ranks(load_both_ways, world_size, folder, layouts))
    ):
        tp = layout.get("tp", 1)
        heads = max(1, tp // SMALLEST["num_key_value_heads"])
        replicas = {"norm": tp, "k_proj": heads, "v_proj": heads, ".mlp.gate": tp}
        counts = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
        for num_bytes, reads, shared, broadcasts, others in of_ranks:
            for name, limits, _ in reads:
                counts[name][tuple(slice(*limit) for limit in limits)] += 1
            for role, sent in broadcasts.items():
                assert sum(sent) == shared[role]
                assert all(size <= BUCKET for size in sent)
            assert [(c.name, c.group, c.given) for c in others] == [("all_reduce", "world", 8)]
        for name, count in counts.items():
            expected = next((times for part, times in replicas.items() if part in name), 1)
            assert count.unique().tolist() == [expected], (layout, name)
        if not layout:  # all ranks hold the same: each reads about its share
            of_rank = [sum(size for *_, size in reads) for _, reads, *_ in of_ranks]
            assert max(of_rank) <= of_ranks[0][0] / world_size + 2 * BUCKET


def load_checkpoints(rank, world_size, checkpoints):
    peers.BUCKET_BYTES = BUCKET
    for checkpoint in checkpoints:
        model_args = read_model_args(checkpoint)
        place = place_at(tp=2, ep=2)
        alone, together = (decoder_without_weights(model_args, place) for _ in range(2))
        whole = load_weights(alone, model_args, place, checkpoint)
        part = load_weights(together, model_args, place, checkpoint, from_peers=True)
        assert 0 < part < whole
        for one, other in zip(alone.parameters(), together.parameters()):
            assert torch.equal(one, other)


def test_of_a_megatron_checkpoint(checkpoints):
    """Also with a tied head, which is read twice: it is no parameter of its own in the folder."""
    run_ranks(load_checkpoints, 4, [checkpoint for _, checkpoint in checkpoints.values()])


def build_towers_both_ways(rank, world_size, folder, sizes):
    peers.BUCKET_BYTES = 20_000
    place, model_args = place_at(**sizes), read_model_args(folder)
    built, seen = [], Collectives(place.groups)
    for from_peers in (False, True):
        with seen:
            towers = build_towers(
                folder,
                model_args,
                place,
                torch.bfloat16,
                audio=True,
                visual=True,
                from_peers=from_peers,
            )
        built.append(towers)
    assert (built[0] is None) == (place.pp_rank == 1) == (built[1] is None)
    if built[0] is not None:
        of_folder, of_peers = (towers.state_dict() for towers in built)
        assert of_folder.keys() == of_peers.keys()
        for name, values in of_folder.items():
            assert torch.equal(values, of_peers[name]), name
    sent = sum(call.given for call in seen.of("broadcast", group="tp_dp_cp"))
    return sent, 0 if built[0] is None else sum(x.numel() * 2 for x in built[0].parameters())


@pytest.mark.parametrize(
    "world_size, sizes", [(4, dict(tp=2)), pytest.param(8, dict(tp=2, pp=2), id="PP2 TP2 DP2")]
)
def test_towers_come_from_all_ranks_of_the_first_stage(tiny_folder, world_size, sizes):
    for sent, held in run_ranks(build_towers_both_ways, world_size, tiny_folder(**WHOLE), sizes):
        assert sent == held


# --- what one rank cannot read --------------------------------------------------------------------


def load_own_folder(rank, world_size, folders, sizes, towers, from_peers):
    """Each rank with its own folder, as where a machine has a damaged copy."""
    peers.BUCKET_BYTES, folder = BUCKET, folders[rank]
    place, model_args = place_at(**sizes), read_model_args(folders[0])
    try:
        if towers:
            wanted = dict(audio=True, visual=True, from_peers=from_peers)
            build_towers(folder, model_args, place, torch.bfloat16, **wanted)
        else:
            model = build_decoder(model_args, place, torch.bfloat16)
            load_weights(model, model_args, place, folder, from_peers=from_peers)
    except ValueError as error:
        return str(error)


def cut(path, size=None):
    path.write_bytes(path.read_bytes()[: -10 if size is None else size])


def of_checkpoint(folder):
    """Zeros over the middle of the first chunk of every file: its headers."""
    for path in folder.rglob("*.distcp"):
        path.write_bytes(b"\0" * path.stat().st_size)


def flip(folder):
    """One bit in the middle of every chunk: most of them of its numbers."""
    for chunks in TorchDist(folder / "release")._chunks.values():
        for chunk in chunks:
            with open(folder / "release" / chunk.file, "r+b") as file:
                place = chunk.start + chunk.length // 2
                byte = os.pread(file.fileno(), 1, place)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 4]), place)


@pytest.mark.parametrize(
    "kind, damage, message",
    [
        ("hf", lambda folder: (folder / SINGLE).unlink(), "neither model.safetensors.index.json"),
        ("hf", lambda folder: cut(folder / SINGLE), "not a complete safetensors file"),
        ("towers", lambda folder: cut(folder / SINGLE), "not a complete safetensors file"),
        ("megatron", of_checkpoint, "damaged at the chunk"),
        ("megatron", flip, "damaged, or changed since the conversion; convert it again"),
    ],
)
def test_every_rank_hears_what_one_cannot_read(
    tiny_folder, checkpoints, tmp_path, kind, damage, message
):
    """Ranks of the other stage and of other groups too; none waits for one that has left."""
    whole = tiny_folder(**SMALLEST, torch_dtype="bfloat16")
    if kind == "towers":
        whole = tiny_folder(**WHOLE | {"max_shard_size": "1GB"})
    elif kind == "megatron":
        _, whole = checkpoints["whole"]
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    damage(broken)
    bad = 1  # of the first stage
    folders = [broken if rank == bad else Path(whole) for rank in range(4)]
    for from_peers in (True, False):
        messages = run_ranks(
            load_own_folder, 4, folders, dict(pp=2), kind == "towers", from_peers, timeout=120
        )
        assert len(set(messages)) == 1
        assert message in messages[0] and str(broken) in messages[0]
        assert f"(rank {bad}, on " in messages[0] and "\n" not in messages[0]


def build_towers_where_one_fails(rank, world_size, folder):
    """Rank 1 has no room for the modules, then meets a mistake where it reads."""
    place, model_args, found = place_at(pp=2), read_model_args(folder), []
    failures = [
        (towers_module, "_without_weights", torch.OutOfMemoryError("no room")),
        (peers, "read", ZeroDivisionError("by zero")),
    ]
    for module, name, error in failures:

        def fail(*args, error=error):
            raise error

        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(module, name, fail)
            try:
                build_towers(folder, model_args, place, torch.bfloat16, audio=True, visual=True)
            except Exception as caught:
                found.append((type(caught).__name__, str(caught)))
    return found


def test_the_others_hear_of_a_mistake_that_one_raises_as_it_is(tiny_folder):
    folder = tiny_folder(**WHOLE)
    of_ranks = run_ranks(build_towers_where_one_fails, 4, folder, timeout=60)
    assert of_ranks[1] == [("OutOfMemoryError", "no room"), ("ZeroDivisionError", "by zero")]
    room, mistake = of_ranks[0]
    assert of_ranks[2] == of_ranks[3] == of_ranks[0]
    assert room[0] == "OSError" and mistake[0] == "ValueError"
    assert room[1].startswith("rank 1 (on ")
    assert room[1].endswith(f"cannot build the towers of {folder}: OutOfMemoryError: no room")
    assert mistake[1].startswith("ZeroDivisionError: by zero (rank 1, on ")


# --- memory ---------------------------------------------------------------------------------------


def load_measured(rank, world_size, folder, bucket):
    """Bytes that were alive at once beside the model, and those of the model."""
    peers.BUCKET_BYTES = bucket
    place, model_args = place_at(), read_model_args(folder)
    model = build_decoder(model_args, place, torch.bfloat16)
    with LiveBytes() as live:
        live.ignore(model.parameters())
        load_weights(model, model_args, place, folder, from_peers=True)
    return live.peak(), sum(parameter.numel() * 2 for parameter in model.parameters())


def test_no_second_copy_of_the_model(tiny_folder):
    """A rank needs a bucket to send or receive, and one where its slices lie apart."""
    folder, bucket = tiny_folder(**SMALLEST, torch_dtype="bfloat16"), 10_000
    for peak, held in run_ranks(load_measured, 2, folder, bucket):
        assert held > 10 * bucket
        assert peak <= 2 * bucket + 2000
