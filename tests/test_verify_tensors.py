"""`verify` of tensors and manifests: --quick, --tensor_tolerance, and flags that are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.verify import VerifyConfig, verify
from megatron_gkd.model.args import read_model_args
from tests.adapters import ALL, random_adapter, write_adapter
from tests.test_verify import SMALL, rewrite, verify_tensors


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return Path(tiny_folder(**SMALL))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("verify") / "checkpoint"
    hf_to_megatron(HfToMegatronConfig(str(folder), str(output), num_workers=1))
    return output


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    tensors = random_adapter(read_model_args(folder), 4, ALL)
    return write_adapter(
        tmp_path_factory.mktemp("verify") / "adapter", tensors, rank=4, alpha=6, targets=ALL
    )


def test_quick_compares_manifests(folder, checkpoint, tmp_path, capsys):
    """Passes without reading a tensor; a changed manifest or file is named."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = VerifyConfig(str(folder), checkpoint=str(copy), quick=True)
    assert verify_tensors(config)
    manifest = json.loads((copy / "conversion_manifest.json").read_text())
    manifest["tensors"]["thinker.model.norm.weight"]["shape"] = [31]
    manifest["files"]["config.json"]["sha256"] = "0"
    (copy / "conversion_manifest.json").write_text(json.dumps(manifest))
    assert not verify_tensors(config)
    printed = capsys.readouterr().out
    assert (
        "thinker.model.norm.weight: differs in shape" in printed
        and "config.json: not the file" in printed
    )
    (copy / "conversion_manifest.json").unlink()
    assert not verify_tensors(config)
    assert "--quick compares manifests, leave it out" in capsys.readouterr().out


def test_quick_looks_at_the_checkpoints_files(folder, checkpoint, tmp_path, capsys):
    """They must be there, the tensors' in their sizes."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = VerifyConfig(str(folder), checkpoint=str(copy), quick=True)
    (copy / "tokenizer.json").unlink()
    assert not verify_tensors(config)
    assert "copy/tokenizer.json: missing" in capsys.readouterr().out
    chunks = copy / "release" / "__0_0.distcp"
    chunks.write_bytes(chunks.read_bytes()[:-1000])
    assert not verify_tensors(config)
    assert "__0_0.distcp: truncated" in capsys.readouterr().out
    chunks.unlink()
    assert not verify_tensors(config)
    assert "__0_0.distcp is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(merged="DIR"), "--merged is compared with --hf_model and --adapter"),
        (dict(quick=True), "--quick: there is nothing to compare"),
        (
            dict(quick=True, adapter="DIR", merged="DIR"),
            "--merged needs the tensors, and --quick reads none",
        ),
        (
            dict(quick=True, checkpoint="DIR", tensor_tolerance=1e-3),
            "--tensor_tolerance needs the tensors",
        ),
        (dict(tensor_tolerance=-1.0), "--tensor_tolerance -1.0: must be 0 or more"),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        VerifyConfig("DIR", **flags)


def test_quick_with_nothing_but_an_adapter_without_records(folder, adapter):
    with pytest.raises(
        ValueError, match="--quick: there is nothing to compare, the adapter has no records"
    ):
        verify(VerifyConfig(str(folder), adapter=adapter, quick=True))


def test_values_to_a_tolerance(folder, tmp_path, capsys):
    """A bf16 copy of an fp32 model passes to a tolerance, with the largest difference of every
    kind; bit by bit not.
    """
    copy = Path(shutil.copytree(folder, tmp_path / "bf16"))
    tensors = load_file(copy / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, copy / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatronConfig(str(copy), str(tmp_path / "checkpoint"), num_workers=1))
    largest = max(
        (rounded[name].float() - tensor).abs().max().item() for name, tensor in tensors.items()
    )
    config = VerifyConfig(
        str(folder), checkpoint=str(tmp_path / "checkpoint"), tensor_tolerance=largest
    )
    assert verify_tensors(config)
    printed = capsys.readouterr().out
    assert f"tensors, to {largest:g}: ok" in printed
    head = (
        (rounded["thinker.lm_head.weight"].float() - tensors["thinker.lm_head.weight"])
        .abs()
        .max()
        .item()
    )
    assert any(
        line.split() == ["lm_head", "1", *f"tensors, largest difference {head:.1e}".split()]
        for line in printed.splitlines()
    )
    config.tensor_tolerance = 0.9 * largest
    assert not verify_tensors(config)
    assert f"on, by up to {largest:.1e}" in capsys.readouterr().out
    config.tensor_tolerance = 0.0
    assert not verify_tensors(config)
    assert ": BF16 [24], expected F32 [24]" in capsys.readouterr().out


def test_a_nan_passes_no_tolerance(folder, checkpoint, tmp_path, capsys):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    rewrite(
        copy,
        "decoder.final_layernorm.weight",
        (),
        lambda w: w.index_fill(0, torch.tensor([5]), float("nan")),
    )
    assert not verify_tensors(VerifyConfig(str(folder), checkpoint=str(copy), tensor_tolerance=1e9))
    assert (
        "thinker.model.norm.weight: differs from row 5 on, by up to inf" in capsys.readouterr().out
    )
