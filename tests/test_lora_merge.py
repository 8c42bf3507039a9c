"""Adapters merged into a folder: one rounding of the sum, what peft computes, what is refused."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from megatron_gkd.formats.manifest import MANIFEST
from megatron_gkd.model.args import read_model_args
from tests.adapters import (
    ALL,
    ROOT,
    load_peft,
    load_thinker,
    make_batches,
    random_adapter,
    write_adapter,
)
from tests.sizes import SMALLEST

SMALL = SMALLEST


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder(**SMALL, max_shard_size="100KB")


def write_adapters(model: str, root: Path) -> list[tuple]:
    """Two adapters, on all linears, and on some of attention and the lm_head: (folder, scale,
    tensors) of each.
    """
    model_args, made = read_model_args(model), []
    for number, (rank, alpha, targets) in enumerate(
        ((4, 6.0, ALL), (3, 9.0, ["q_proj", "o_proj", "lm_head"]))
    ):
        tensors = random_adapter(model_args, rank, targets, seed=number)
        folder = write_adapter(root / str(number), tensors, rank=rank, alpha=alpha, targets=targets)
        made.append((folder, alpha / rank, tensors))
    return made


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    return write_adapters(model, tmp_path_factory.mktemp("adapters"))


def read_folder(folder):
    return {
        name: tensor
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def hashes(folder):
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def update(tensors, scale, name):
    """(alpha / r) W_up W_down of a weight in fp64; None where the adapter has none."""
    linear = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{linear}.lora_A.weight" not in tensors:
        return None
    return (
        scale
        * tensors[f"{linear}.lora_B.weight"].double()
        @ tensors[f"{linear}.lora_A.weight"].double()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_is_one_rounding_of_the_sum(tiny_folder, adapters, tmp_path, dtype):
    """Two adapters with factors: every targeted weight is the exact sum to half a unit in the last
    place, the rest is untouched, file by file; the base folder keeps its bytes.
    """
    base = tiny_folder(**SMALL, torch_dtype=dtype, max_shard_size="100KB")
    before, weights = hashes(base), [0.75, -2.0]
    config = MergeLoraConfig(
        base, str(tmp_path / "out"), [folder for folder, *_ in adapters], weights, num_workers=2
    )
    merge_lora(config, shard_bytes=50_000)
    assert hashes(base) == before
    old, new = read_folder(base), read_folder(tmp_path / "out")
    assert list(old) == list(new)
    changed = 0
    for name, weight in old.items():
        terms = [
            (u, f)
            for (_, scale, t), f in zip(adapters, weights)
            if (u := update(t, scale, name)) is not None
        ]
        if not terms:
            assert torch.equal(weight, new[name]), name
            continue
        changed += 1
        exact = weight.double() + sum(factor * values for values, factor in terms)
        half_unit = torch.finfo(weight.dtype).eps / 2 * (exact.abs() * 1.01)
        fp32_error = 1e-6 * exact.abs().max()  # of the sum, before it is rounded
        assert ((new[name].double() - exact).abs() <= half_unit + fp32_error).all(), name
    assert (
        changed == 2 * (4 + 4 * 3) + 1
    )  # q, k, v, o and three linears of four experts, in two layers; the lm_head
    index = "model.safetensors.index.json"
    assert (Path(base) / index).read_bytes() == (tmp_path / "out" / index).read_bytes()


def test_the_merged_folder_computes_what_peft_does(model, adapters, tmp_path):
    folder, _, _ = adapters[0]
    merge_lora(MergeLoraConfig(model, str(tmp_path / "out"), [folder], num_workers=1))
    batch = make_batches(503)[0]
    inputs = dict(
        input_ids=batch.input_ids, attention_mask=batch.real.long(), position_ids=batch.position_ids
    )
    with torch.no_grad():
        base = load_thinker(model)(**inputs).logits[batch.real]
        merged = load_thinker(tmp_path / "out")(**inputs).logits[batch.real]
        expected = load_peft(load_thinker(model), folder)[0](**inputs).logits[batch.real]
    assert (merged - expected).abs().max() < 1e-4 < 0.1 < (merged - base).abs().max()


def test_every_way_to_merge_gives_the_same_bytes(model, adapters, tmp_path):
    """The folder with the adapter; its Megatron checkpoint with the adapter."""
    folder = adapters[0][0]
    merge_lora(
        MergeLoraConfig(model, str(tmp_path / "a"), [folder], num_workers=2), shard_bytes=40_000
    )
    hf_to_megatron(HfToMegatronConfig(model, str(tmp_path / "checkpoint"), num_workers=1))
    megatron_to_hf(
        MegatronToHfConfig(
            str(tmp_path / "checkpoint"), str(tmp_path / "b"), adapter=[folder], num_workers=1
        )
    )
    ours, theirs = (hashes(tmp_path / name) for name in "ab")
    del ours[MANIFEST], theirs[MANIFEST]  # says who made it
    assert ours == theirs


def test_merges_that_are_refused(model, adapters, tmp_path):
    folders = [folder for folder, *_ in adapters]

    def refuse(message, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge_lora(
                MergeLoraConfig(
                    **(dict(hf_model=model, output=str(tmp_path / "out"), num_workers=1) | settings)
                )
            )
        assert not (tmp_path / "out").exists()

    refuse("no --adapter is named")
    refuse("lies in .*, which is only read", adapter=folders, output=f"{folders[0]}/out")
    refuse("3 weights for 2 adapters", adapter=folders, weight=[1.0, 2.0, 3.0])
    # some products of matrices take NaN for 1
    refuse("--weight 1.0 nan: must be finite", adapter=folders, weight=[1.0, float("nan")])
    refuse("expected a PEFT adapter folder", adapter=[str(tmp_path)])
    refuse("no config.json there", hf_model=str(tmp_path), adapter=folders)


def test_lora_on_a_tied_head_cannot_be_merged(tiny_folder, tmp_path):
    """There is no weight of its own to add it to."""
    base = tiny_folder(**SMALL, tie_word_embeddings=True)
    tensors = random_adapter(read_model_args(base), 2, ["q_proj"])
    head = {"A": torch.ones(2, SMALL["hidden_size"]), "B": torch.ones(SMALL["vocab_size"], 2)}
    tensors |= {
        f"base_model.model.thinker.lm_head.lora_{side}.weight": values
        for side, values in head.items()
    }
    folder = write_adapter(
        tmp_path / "adapter", tensors, rank=2, alpha=4, targets=["q_proj", "lm_head"]
    )
    with pytest.raises(
        ValueError, match="has LoRA on lm_head, and .* no such weight to add it to .it is tied"
    ):
        merge_lora(MergeLoraConfig(base, str(tmp_path / "out"), [folder], num_workers=1))


@pytest.mark.parametrize("value", [float("nan"), 6e4])
def test_a_sum_that_is_no_number_is_refused(tiny_folder, adapters, tmp_path, value):
    """By the name of the tensor: a NaN of the adapter, or a sum too large for the base's fp16."""
    base = tiny_folder(**SMALL, torch_dtype="float16", max_shard_size="100KB")
    broken = Path(shutil.copytree(adapters[1][0], tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[f"{ROOT}1.self_attn.o_proj.lora_B.weight"][3] = value
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    message = {
        True: "o_proj.lora_B.weight has numbers that are NaN or Inf",
        False: "tensor thinker.model.layers.1.self_attn.o_proj.weight: "
        "the base plus the adapters is not finite",
    }[value != value]
    with pytest.raises(ValueError, match=message):
        merge_lora(MergeLoraConfig(base, str(tmp_path / "out"), [str(broken)], num_workers=2))
    assert not (tmp_path / "out").exists()
