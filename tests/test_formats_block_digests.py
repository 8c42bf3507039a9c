"""A Megatron checkpoint's numbers are compared with the converter's digests while a run reads them:
any rows and columns, any flipped bit.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from megatron_gkd.formats import block_digests
from megatron_gkd.formats.block_digests import DIGESTS, BlockDigests, write_digests
from megatron_gkd.formats.loading import open_folder
from megatron_gkd.formats.megatron_folder import FROZEN
from megatron_gkd.formats.stored_tensor import memory, read_block
from megatron_gkd.formats.torch_dist import METADATA, TorchDist
from megatron_gkd.model.args import read_model_args
from tests.conversions import WHOLE, to_megatron
from tests.test_checkpoint import flags_of_run, write_data
from tests.train_runs import run_training

BEFORE = 40  # bytes of the chunk in front of its numbers


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "checkpoint"
    to_megatron(tiny_folder(**WHOLE), output, tp=2)
    return output


@pytest.mark.parametrize("shape", [(1,), (7,), (12, 5), (13, 3), (128, 2), (4, 300), (6, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_any_rows_and_columns(tmp_path, monkeypatch, shape, dtype):
    """What is read is what is there; a bit flipped in it is found, in whatever byte."""
    monkeypatch.setattr(block_digests, "_LEAST_ROWS", 4)
    monkeypatch.setattr(block_digests, "_BLOCK_BYTES", 100)
    draw, path = random.Random(str(shape)), tmp_path / "chunks"
    values = torch.randint(0, 255, shape, dtype=torch.uint8).to(dtype)
    (tmp_path / "description").write_bytes(b"which chunk is where")
    write_digests(tmp_path, "description", {path.name: {7: block_digests.block_digests(values)}})
    content = b"\1" * BEFORE + bytes(memory(values)) + b"\2" * 9
    path.write_bytes(content)
    digests, matrix = BlockDigests(tmp_path, "description"), values.reshape(shape[0], -1)
    size = tuple(matrix.shape)
    for _ in range(8):
        rows, columns = (range(*sorted(draw.sample(range(length + 1), 2))) for length in size)
        asked = (path, 7, BEFORE, dtype, size, rows, columns)
        path.write_bytes(content)
        found = digests.read_block(*asked)
        assert torch.equal(found, read_block(path, BEFORE, dtype, size[1], rows, columns))
        row, column = draw.choice(rows), draw.choice(columns)
        place = BEFORE + (row * size[1] + column) * dtype.itemsize + draw.randrange(dtype.itemsize)
        flip(path, place, draw.randrange(8))
        with pytest.raises(ValueError, match=f"{path}: bytes .* damaged, or changed since"):
            digests.read_block(*asked)


def flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    opened = open_folder(folder, read_model_args(folder))
    return {
        name: tensor[tuple(slice(None) for _ in tensor.get_shape()[:1]) or (slice(None),)]
        for name, tensor in opened.tensors.items()
    }


def test_a_flipped_bit_anywhere(checkpoint, tmp_path):
    """Of a file of numbers, of what describes them, of the digests: refused, or in a byte that
    means nothing (a date in an archive's header), with all numbers as they were.
    """
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    release, draw, refused = copy / "release", random.Random(3), 0
    whole = all_tensors(copy)
    chunks = [chunk for chunks in TorchDist(release)._chunks.values() for chunk in chunks]
    places = [(chunk.file, draw.randrange(chunk.length) + chunk.start) for chunk in chunks]
    places = draw.sample(places, 20)
    for name, number in ((METADATA, 6), (DIGESTS, 4)):
        places += [(name, draw.randrange((release / name).stat().st_size)) for _ in range(number)]
    for name, place in places:
        bit = draw.randrange(8)
        flip(release / name, place, bit)
        try:
            found = all_tensors(copy)
            assert found.keys() == whole.keys(), (name, place, bit)
            assert all(torch.equal(found[key], whole[key]) for key in whole), (name, place, bit)
        except (ValueError, FileNotFoundError) as error:
            assert str(release) in str(error) and "\n" not in str(error)
            refused += 1
        flip(release / name, place, bit)
    assert refused > len(places) / 2
    with pytest.raises(ValueError, match=f"{METADATA}: its content has digest"):
        flip(release / METADATA, 100, 3)
        all_tensors(copy)


def test_a_run_does_not_start(tiny_folder, checkpoint, tmp_path):
    """With one bit of a decoder's weight flipped; where it is in what this run does not read, it
    does.
    """
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    data = write_data(tiny_folder, tmp_path) | dict(model=copy)
    stored = TorchDist(copy / "release")._chunks
    (talker,) = stored[next(key for key in stored if key.startswith(f"{FROZEN}talker."))][:1]
    flip(copy / "release" / talker.file, talker.start + talker.length // 2, 1)
    flags = dict(max_steps=1, lmbda=0, output_dir=tmp_path / "out")
    run_training(1, flags_of_run(data, tmp_path / "out", **flags))
    (router,) = stored["decoder.layers.mlp.router.weight"][:1]
    path = copy / "release" / router.file
    flip(path, router.start + router.length // 2, 1)
    with pytest.raises(RuntimeError, match=f"{path}: bytes .* convert it again"):
        run_training(1, flags_of_run(data, tmp_path / "out", **flags))
