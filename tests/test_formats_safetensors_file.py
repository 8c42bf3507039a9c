"""A safetensors file written to its bytes: its header is safetensors' own, neighbours are one
write, and what another writer has taken is seen.
"""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.formats import safetensors_file
from megatron_gkd.formats.safetensors_file import (
    Run,
    check_edges,
    first_bytes,
    make_header,
    total_bytes,
    write_header,
    write_runs,
)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (4, 4), (7,), (2, 2, 2), (1, 40)]
    return {
        f"layers.{number}.weight": torch.randn(size, generator=generator)
        for number, size in zip((10, 2, 1, 0, 33), sizes)
    }


def made_file(tensors, path):
    """An empty file for `tensors`: the first byte of each."""
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    header = make_header(sizes, {"format": "pt"})
    write_header(path, header, total_bytes(sizes))
    return {name: 8 + len(header) + start for name, start in first_bytes(sizes).items()}


def test_the_file_is_that_of_safetensors(tensors, tmp_path, monkeypatch):
    """Its header and its numbers are each on the disk when the call that writes them returns."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file, sync=os.fsync: synced.append(sync(file)))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    starts = made_file(tensors, tmp_path / "ours")
    assert not any(tensor.any() for tensor in load_file(tmp_path / "ours").values())
    assert len(synced) == 1
    runs = [Run(starts[name], tensor.flatten()) for name, tensor in tensors.items()]
    num_bytes, edges, _ = write_runs(tmp_path / "ours", runs)
    assert len(synced) == 2
    assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    check_edges(tmp_path / "ours", edges)


@pytest.mark.parametrize("block_bytes, num_writes", [(1 << 20, 2), (64, 5)])
def test_neighbours_are_one_write(tensors, tmp_path, monkeypatch, block_bytes, num_writes):
    """Two tensors and three with one between that another process writes; in blocks, which no
    tensor need fit into.
    """
    starts = made_file(tensors, tmp_path / "file")
    other, *ours = sorted(tensors)[2:] + sorted(tensors)[:2]
    writes = []

    def write_all(descriptor, data, offset, write=safetensors_file.write_all):
        writes.append(len(data))
        write(descriptor, data, offset)

    monkeypatch.setattr(safetensors_file, "write_all", write_all)
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", block_bytes)
    write_runs(tmp_path / "file", [Run(starts[name], tensors[name].flatten()) for name in ours])
    assert len(writes) == num_writes and max(writes) <= block_bytes
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensors[name]) for name in ours)
    assert not found[other].any()


@pytest.mark.parametrize("place, more", [(0, 0), (2, -1)])
def test_a_writer_that_took_a_whole_page(tensors, tmp_path, monkeypatch, place, more):
    """The neighbour in front writes a byte too many at its end, the one behind at its start."""
    monkeypatch.setattr(safetensors_file, "_EDGE_BYTES", 8)  # the tensor in the middle has 28
    starts, names = made_file(tensors, tmp_path / "file"), sorted(tensors)
    middle, other = names[1], names[place]
    _, edges, _ = write_runs(tmp_path / "file", [Run(starts[middle], tensors[middle].flatten())])
    check_edges(tmp_path / "file", edges)
    with open(tmp_path / "file", "r+b") as file:
        file.seek(starts[other] + more)
        file.write(b"\xff" * (tensors[other].nbytes + 1))
    with pytest.raises(OSError, match="bytes .* loses writes"):
        check_edges(tmp_path / "file", edges)


def test_what_is_missing_is_not_made(tensors, tmp_path, monkeypatch):
    """A rank that does not see the folder of the others must not make a file of its own."""
    monkeypatch.setattr(safetensors_file, "SECONDS_TO_APPEAR", 0)
    with pytest.raises(FileNotFoundError):
        write_runs(tmp_path / "file", [Run(0, torch.zeros(3))])
    assert not (tmp_path / "file").exists()
