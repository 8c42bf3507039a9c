"""The media cache: what is damaged in it is computed anew, what cannot be used is gone without."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_gkd.media.cache import cache_path, read_cached, write_cached
from megatron_gkd.media.medium import Medium, Reference
from megatron_gkd.media.processor import MediaProcessor
from tests.test_media_processor import build_model, write_media


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = write_media(tmp_path_factory.mktemp("media"))
    return [
        Reference("audio", str(folder / "stereo.wav"), None),
        Reference("image", str(folder / "wide.png"), None),
    ]


def test_every_flipped_byte_is_found(tmp_path):
    """Of notes, shape and values; what is read is what was written, or nothing."""
    path, medium = tmp_path / "a", Medium("image", torch.rand(4, 3), (1, 2, 2), 1)
    write_cached(path, medium)
    whole = path.read_bytes()
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = read_cached(path, "image")
        assert found is None or (
            torch.equal(found.features, medium.features) and found.grid_thw == medium.grid_thw
        ), place


def rewrite(path: Path, change) -> None:
    with safe_open(path, framework="pt") as file:
        notes, features = file.metadata(), file.get_tensor("features").clone()
    save_file({"features": change(features)}, path, metadata=notes)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: rewrite(path, lambda x: x[:, :-1].contiguous()), id="narrower"),
        pytest.param(lambda path: rewrite(path, lambda x: x.reshape(-1)), id="flat"),
        pytest.param(lambda path: rewrite(path, lambda x: x.double()), id="float64"),
        pytest.param(lambda path: save_file({"other": torch.ones(1)}, path), id="other tensor"),
        pytest.param(lambda path: save_file({"features": torch.ones(1)}, path), id="no notes"),
        pytest.param(as_folder, id="folder"),
    ],
)
def test_an_entry_that_is_not_what_was_written_is_computed_anew(model, references, tmp_path, spoil):
    for reference in references:
        processor = MediaProcessor(model, str(tmp_path))
        expected = processor.load(reference)
        path = cache_path(processor.cache, reference, processor._processor_digest)
        spoil(path)
        found = processor.load(reference)
        assert torch.equal(found.features, expected.features)
        assert found.num_tokens == expected.num_tokens


def test_a_cache_that_cannot_be_written_is_said_once(model, references, tmp_path, capfd):
    """A file in its place: also root is refused there, which writes to read-only folders."""
    (tmp_path / "cache").write_text("no folder")
    processor = MediaProcessor(model, str(tmp_path / "cache"))
    plain = MediaProcessor(model)
    for reference in references:
        found = processor.load(reference)
        assert torch.equal(found.features, plain.load(reference).features)
    said = capfd.readouterr().err
    assert said.count("Note: --media_cache ") == 1 and "computed each time" in said


def test_a_cache_that_fills_up_is_said_once_and_still_read(model, references, tmp_path, capfd):
    """The limit of a file's size stands for a full disk: both end in an error of the write."""
    processor = MediaProcessor(model, str(tmp_path))
    kept = processor.load(references[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for _ in range(2):
            processor.load(references[0])
        assert torch.equal(processor.load(references[1]).features, kept.features)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err.count("cannot be written") == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
