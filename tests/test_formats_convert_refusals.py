"""Conversions that are refused, by name and with nothing written: folders, checkpoints and flags;
and metadata that would run code.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata

from megatron_gkd.formats import torch_dist
from megatron_gkd.formats.manifest import MANIFEST
from megatron_gkd.formats.torch_dist import TorchDist
from tests.conversions import WHOLE, to_hf, to_megatron


def refuse_folder(folder, tmp_path, message, **settings):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        to_megatron(folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder(**WHOLE), tmp_path / "model"))


def test_folders_that_are_refused(broken, tmp_path):
    """Each before a byte is written, each by name (tests/test_formats_loading.py has the tensors
    one by one).
    """
    shards = sorted(broken.glob("*.safetensors"))
    refuse_folder(
        broken, tmp_path, "tensor_model_parallel_size 3 does not divide the 8 attention heads", tp=3
    )
    refuse_folder(
        broken,
        tmp_path,
        "pipeline_model_parallel_size 3 does not divide the 4 layers",
        pipeline_model_parallel_size=3,
    )
    refuse_folder(
        broken,
        tmp_path,
        "expert_model_parallel_size 8 does not divide the 4 experts",
        expert_model_parallel_size=8,
    )
    (broken / "extra").mkdir()
    (broken / "extra" / "spk.pt").write_bytes(b"never opened")
    refuse_folder(broken, tmp_path, "extra/spk.pt is a pickle")
    (broken / "extra" / "spk.pt").unlink()
    (broken / "extra" / "spk.NPZ").write_bytes(b"may hold one")
    refuse_folder(broken, tmp_path, "extra/spk.NPZ is a pickle")
    (broken / "extra" / "spk.NPZ").unlink()
    with pytest.raises(ValueError, match="inside lies in .*model, which is only read"):
        to_megatron(broken, broken / "inside")
    assert not list(broken.glob("*inside*"))
    (broken / "release").write_bytes(b"")
    refuse_folder(broken, tmp_path, "release: a checkpoint needs this name")
    (broken / "release").unlink()
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-1])
    refuse_folder(broken, tmp_path, f"{shards[0].name}: not a complete safetensors file")
    shards[0].unlink()
    refuse_folder(broken, tmp_path, f"lists {shards[0].name}, which is not in the folder")
    shards[0].write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_omni"}))
    refuse_folder(broken, tmp_path, "model_type 'qwen2_5_omni' is not supported")
    (broken / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a file").write_text("")
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        to_megatron(broken, tmp_path / "out")
    (tmp_path / "out" / "a file").unlink()
    to_megatron(broken, tmp_path / "out")


def test_a_full_disk_is_noticed_before_the_first_byte(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 66_000_000)
    )
    refuse_folder(broken, tmp_path, r"0.1 GB are needed and 0.1 GB are free")
    assert not list(tmp_path.glob(".out*"))


def test_layers_of_two_types_are_refused(broken, tmp_path):
    from safetensors.torch import save_file

    name = "thinker.model.layers.1.mlp.gate.weight"
    shard = next(path for path in broken.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name].float()}, shard, metadata={"format": "pt"})
    refuse_folder(
        broken, tmp_path, f"{name} is F32 and thinker.model.layers.0.mlp.gate.weight is BF16"
    )


def test_a_changed_folder_or_checkpoint_is_noticed(checkpoints, tmp_path):
    """One bit of a folder that has a manifest, one bit of a checkpoint, a changed config: named,
    nothing is written.
    """
    _, checkpoint = checkpoints["whole"]
    to_hf(checkpoint, tmp_path / "back")
    shard = sorted((tmp_path / "back").glob("*.safetensors"))[3]
    flip_bit(shard, -1)
    last = list(load_file(shard))[-1]
    refuse_folder(
        tmp_path / "back",
        tmp_path,
        f"{shard.name}: tensor {last[:10]}.* has SHA-256 .* changed or damaged",
    )
    for partial in tmp_path.glob(".out.partial"):
        shutil.rmtree(partial)
    manifest = json.loads((tmp_path / "back" / MANIFEST).read_text())
    for changed, message in (
        (
            {name: t for name, t in manifest["tensors"].items() if name != last},
            f"{last} is unknown to {MANIFEST}",
        ),
        (
            manifest["tensors"] | {"talker.x": manifest["tensors"][last]},
            "talker.x is not in the folder",
        ),
        (
            manifest["tensors"] | {last: manifest["tensors"][last] | {"shape": [1]}},
            f"{last} is .*{MANIFEST} says .* \\[1\\]",
        ),
    ):
        (tmp_path / "back" / MANIFEST).write_text(json.dumps(manifest | {"tensors": changed}))
        refuse_folder(tmp_path / "back", tmp_path, message)
    for field, value in (
        *(("tensors", value) for value in (None, [], {last: None}, {last: {"dtype": "F32"}})),
        *(("files", value) for value in (3, {"config.json": []}, {"config.json": {"bytes": "3"}})),
        ("made_by", 3),
    ):
        (tmp_path / "back" / MANIFEST).write_text(json.dumps(manifest | {field: value}))
        refuse_folder(tmp_path / "back", tmp_path, f"{MANIFEST}: {field} is .*, and must be ")
    assert not list(tmp_path.glob(".out*"))  # noticed before anything was read

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    chunk = next(c for c in TorchDist(copy / "release")._chunks["decoder.layers.mlp.router.weight"])
    flip_bit(copy / "release" / chunk.file, chunk.start + chunk.length // 2)
    with pytest.raises(ValueError, match="tensor thinker.model.layers.*gate.weight has SHA-256"):
        to_hf(copy, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_without_one_of_its_files_is_refused(checkpoints, tmp_path):
    """By name and before a tensor is read: a file of the folder, the index, a header, the manifest
    itself.
    """
    _, checkpoint = checkpoints["whole"]
    copy, index = (
        Path(shutil.copytree(checkpoint, tmp_path / "copy")),
        "huggingface/model.safetensors.index.json",
    )
    header = next(
        str(path.relative_to(copy)) for path in sorted((copy / "huggingface").glob("*.header"))
    )
    for name in ("tokenizer.json", "chat_template.jinja", index, header, MANIFEST):
        whole = (copy / name).read_bytes()
        (copy / name).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=f"{copy / name} is missing"):
            to_hf(copy, tmp_path / "out")
        if name != MANIFEST:
            (copy / name).write_bytes(whole + b" ")
            with pytest.raises(
                ValueError, match=f"{copy / name}: not the file that {MANIFEST} lists"
            ):
                to_hf(copy, tmp_path / "out")
        (copy / name).write_bytes(whole)
    assert not list(tmp_path.glob(".out*"))
    to_hf(copy, tmp_path / "out")


def test_flags_without_effect_are_refused(checkpoints, tmp_path):
    folder, checkpoint = checkpoints["whole"]

    def refuse(message, path=checkpoint, **settings):
        with pytest.raises(ValueError, match=message):
            to_hf(path, tmp_path / "out", **settings)

    refuse("--weight 0.5: there is no --adapter to weigh", weight=[0.5])
    refuse("--hf_model .* holds the whole folder; leave the flag out", hf_model=str(folder))
    run = tmp_path / "checkpoint-1"
    run.mkdir()
    (run / "adapter_config.json").write_text("{}")
    for flag, value in (("hf_model", str(folder)), ("adapter", ["DIR"]), ("weight", [1.0])):
        refuse(
            f"--{flag} has no effect with --export adapter", run, export="adapter", **{flag: value}
        )


def test_checkpoints_that_are_refused(checkpoints, tmp_path):
    folder, checkpoint = checkpoints["whole"]
    copy = shutil.copytree(checkpoint, tmp_path / "copy")

    def refuse(message, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            to_hf(copy, tmp_path / "out", **settings)

    refuse("has no adapter_config.json", export="adapter")
    distcp = copy / "release" / "__1_0.distcp"
    whole = distcp.read_bytes()
    distcp.write_bytes(whole[:-1])
    refuse("__1_0.distcp: truncated")
    distcp.unlink()
    refuse("__1_0.distcp is missing: .metadata lists it")
    distcp.write_bytes(whole)
    (copy / "huggingface").rename(tmp_path / "aside")
    refuse("holds the decoder alone; name the Hugging Face folder")
    (tmp_path / "aside").rename(copy / "huggingface")
    for text in ("[]", "{", "null", "[" * 100_000):
        (copy / "release" / "metadata.json").write_text(text)
        refuse("metadata.json: not metadata of a checkpoint")
    (copy / "release" / "metadata.json").write_text('{"sharded_backend": ["torch_dist"]}')
    refuse(r"sharded_backend is \['torch_dist'\]; only torch_dist")
    (copy / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refuse("sharded_backend is 'zarr'; only torch_dist")
    shutil.rmtree(copy / "release")
    refuse("neither latest_checkpointed_iteration.txt nor a torch_dist checkpoint is there")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


class Fuse:
    """Reaches for code through what describes tensors."""

    def __reduce__(self):
        return (getattr, (torch.Size, "__init__"))


@pytest.mark.parametrize(
    "content, why",
    [
        (Bomb(), "names .*, which describes"),
        (Fuse(), "asks for __init__ of .*, which is no enumeration"),
    ],
)
def test_metadata_cannot_run_code(checkpoints, tmp_path, monkeypatch, content, why):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(checkpoints["tied"][1], tmp_path / "copy")
    (copy / "release" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=rf".metadata: not the metadata of a torch_dist checkpoint \(it {why}"
    ):
        to_hf(copy, tmp_path / "out")
    assert not (tmp_path / "bomb-went-off").exists()


def test_what_a_file_does_to_the_classes_it_names_ends_with_it(checkpoints, tmp_path):
    """A pickle can set attributes of whatever it names: those are stand-ins of its own."""
    copy = shutil.copytree(checkpoints["tied"][1], tmp_path / "copy")
    for module, name in sorted(torch_dist._RECORDS | torch_dist._IGNORED):
        # BUILD of a class: its __init__ = None
        spoilt = f"c{module}\n{name}\n(N}}X\x08\x00\x00\x00__init__Nstb."
        (copy / "release" / ".metadata").write_bytes(spoilt.encode())
        with pytest.raises(ValueError, match="not the metadata of a torch_dist checkpoint"):
            TorchDist(copy / "release")
    TorchDist(checkpoints["tied"][1] / "release")
    assert (
        callable(Metadata.__init__)
        and callable(torch_dist._Record.__init__)
        and callable(torch_dist._Ignored.__init__)
    )
