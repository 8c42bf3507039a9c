"""Adapters: merged into a folder, exported, continued at a higher rank, brought to a lower one."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.lower_rank import LowerRankConfig, lower
from checkpoint_tools.manifest import NAME
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from megatron_gkd.model.config import read_model_shape
from tests.adapters import ALL, load_peft, load_thinker, make_batches, random_adapter, write_adapter
from tests.train_runs import arguments, make_rows, read_lines, run_training, write_rows

SMALL = dict(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    vocab_size=503,
)
ROOT = "base_model.model.thinker.model.layers."


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder(**SMALL, max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two adapters on all linears and on attention alone: (folder, scale, tensors) of each."""
    shape, root, made = read_model_shape(model), tmp_path_factory.mktemp("adapters"), []
    for number, (rank, alpha, targets) in enumerate(((4, 6.0, ALL), (3, 9.0, ["q_proj", "o_proj"]))):
        tensors = random_adapter(shape, rank, targets, seed=number)
        folder = write_adapter(root / str(number), tensors, rank=rank, alpha=alpha, targets=targets)
        made.append((folder, alpha / rank, tensors))
    return made


def read_folder(folder):
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def hashes(folder):
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def update(tensors, scale, name):
    """(alpha / r) W_up W_down of a weight in fp64; None where the adapter has none."""
    linear = ROOT + name.removeprefix("thinker.model.layers.").removesuffix(".weight")
    if f"{linear}.lora_A.weight" not in tensors:
        return None
    return scale * tensors[f"{linear}.lora_B.weight"].double() @ tensors[f"{linear}.lora_A.weight"].double()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_is_one_rounding_of_the_sum(tiny_folder, adapters, tmp_path, dtype):
    """Two adapters with factors: every targeted weight is the exact sum to half a unit in the last place, the rest is
    untouched, file by file; the base folder keeps its bytes."""
    base = tiny_folder(**SMALL, torch_dtype=dtype, max_shard_size="100KB")
    before, weights = hashes(base), [0.75, -2.0]
    config = MergeLoraConfig(base, str(tmp_path / "out"), [folder for folder, *_ in adapters], weights, num_workers=2)
    merge_lora(config, unit_bytes=50_000)
    assert hashes(base) == before
    old, new = read_folder(base), read_folder(tmp_path / "out")
    assert list(old) == list(new)
    changed = 0
    for name, weight in old.items():
        terms = [(u, f) for (_, scale, t), f in zip(adapters, weights) if (u := update(t, scale, name)) is not None]
        if not terms:
            assert torch.equal(weight, new[name]), name
            continue
        changed += 1
        exact = weight.double() + sum(factor * values for values, factor in terms)
        half_unit = torch.finfo(weight.dtype).eps / 2 * (exact.abs() * 1.01)
        fp32_error = 1e-6 * exact.abs().max()  # of the sum, before it is rounded
        assert ((new[name].double() - exact).abs() <= half_unit + fp32_error).all(), name
    assert changed == 2 * (4 + 4 * 3)  # q, k, v, o and three linears of four experts, in two layers
    index = "model.safetensors.index.json"
    assert (Path(base) / index).read_bytes() == (tmp_path / "out" / index).read_bytes()


def test_the_merged_folder_computes_what_peft_does(model, adapters, tmp_path):
    folder, _, _ = adapters[0]
    merge_lora(MergeLoraConfig(model, str(tmp_path / "out"), [folder], num_workers=1))
    batch = make_batches(503)[0]
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.real.long(), position_ids=batch.position_ids)
    with torch.no_grad():
        base = load_thinker(model)(**inputs).logits[batch.real]
        merged = load_thinker(tmp_path / "out")(**inputs).logits[batch.real]
        expected = load_peft(load_thinker(model), folder)[0](**inputs).logits[batch.real]
    assert (merged - expected).abs().max() < 1e-4 < 0.1 < (merged - base).abs().max()


def test_every_way_to_merge_gives_the_same_bytes(model, adapters, tmp_path):
    """The folder with the adapter; its Megatron checkpoint with the adapter."""
    folder = adapters[0][0]
    merge_lora(MergeLoraConfig(model, str(tmp_path / "a"), [folder], num_workers=2), unit_bytes=40_000)
    hf_to_megatron(HfToMegatronConfig(model, str(tmp_path / "checkpoint"), num_workers=1))
    megatron_to_hf(
        MegatronToHfConfig(str(tmp_path / "checkpoint"), str(tmp_path / "b"), adapter=[folder], num_workers=1)
    )
    ours, theirs = (hashes(tmp_path / name) for name in "ab")
    del ours[NAME], theirs[NAME]  # says who made it
    assert ours == theirs


def test_merges_that_are_refused(model, adapters, tmp_path):
    folders = [folder for folder, *_ in adapters]

    def refuse(message, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge_lora(
                MergeLoraConfig(**(dict(hf_model=model, output=str(tmp_path / "out"), num_workers=1) | settings))
            )
        assert not (tmp_path / "out").exists()

    refuse("no --adapter is named")
    refuse("3 weights for 2 adapters", adapter=folders, weight=[1.0, 2.0, 3.0])
    refuse("expected a PEFT adapter folder", adapter=[str(tmp_path)])
    refuse("no config.json there", hf_model=str(tmp_path), adapter=folders)


# --- a training run's checkpoint, and stage two -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_one(model, tmp_path_factory):
    """A run of two steps at rank 4, and the flags that it shares with the next stage."""
    root = tmp_path_factory.mktemp("stage")
    shared = dict(model=model, dataset=write_rows(root / "rows.jsonl", make_rows(8)), per_device_train_batch_size=4)
    first = dict(lora_rank=4, lora_alpha=8, max_steps=2, learning_rate=1e-2, output_dir=root / "one")
    run_training(1, arguments(**shared, **first))
    return root / "one" / "checkpoint-2", shared


def test_a_checkpoint_of_training_is_exported(model, stage_one, tmp_path):
    """Its adapter alone, as it was; or merged into its base model, as merge_lora does."""
    checkpoint, _ = stage_one
    megatron_to_hf(MegatronToHfConfig(str(checkpoint), str(tmp_path / "adapter"), export="adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        NAME,
    }
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (checkpoint / name).read_bytes()
    megatron_to_hf(MegatronToHfConfig(str(checkpoint), str(tmp_path / "a"), num_workers=1))
    merge_lora(MergeLoraConfig(model, str(tmp_path / "b"), [str(tmp_path / "adapter")], num_workers=1))
    ours, theirs = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in read_folder(model).items())

    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(ValueError, match="its base model '/nowhere' is not a folder here; name it with --hf_model"):
        megatron_to_hf(MegatronToHfConfig(str(copy), str(tmp_path / "c")))


@pytest.mark.parametrize("how", ["adapter", "resume_from_checkpoint"])
@pytest.mark.parametrize("alpha", [None, 12])
def test_a_higher_rank_begins_with_the_same_function(stage_one, tmp_path, how, alpha):
    """Rank 4 continued at 16: the first loss is the rank-4 adapter's, the new columns of W_up are trained."""
    checkpoint, shared = stage_one
    common = shared | dict(max_steps=1, learning_rate=1e-3)
    run_training(1, arguments(**common, adapter=checkpoint, output_dir=tmp_path / "same"))
    said = run_training(
        1, arguments(**common, **{how: checkpoint}, lora_rank=16, lora_alpha=alpha, output_dir=tmp_path / "more")
    )
    assert "continued at rank 16" in said
    if how == "resume_from_checkpoint":
        assert "LoRA rank 4 -> 16, alpha 8 -> " in said and "the optimizer starts anew" in said
    same, more = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("same", "more"))
    assert more["step"] == 1 and more["loss"] > 1e-3
    for metric in ("loss", "jsd", "kl_forward", "entropy_student"):
        assert more[metric] == pytest.approx(same[metric], rel=1e-5)
    config = json.loads((tmp_path / "more" / "checkpoint-1" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, alpha or 32)
    up = load_file(tmp_path / "more" / "checkpoint-1" / "adapter_model.safetensors")[
        f"{ROOT}0.self_attn.q_proj.lora_B.weight"
    ]
    assert up[:, 4:].abs().max() > 0  # one step has moved them away from zero


# --- a lower rank -----------------------------------------------------------------------------------------------------


def products(folder):
    """linear -> (alpha / r) W_up W_down, fp64."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    names = [name for name in tensors if ".lora_A." in name]
    return {n: scale * tensors[n.replace("_A.", "_B.")].double() @ tensors[n].double() for n in names}


def test_a_lower_rank_is_the_best_of_its_rank_and_says_its_error(model, adapters, tmp_path):
    folder = adapters[0][0]
    said = lower(LowerRankConfig(model, folder, str(tmp_path / "low"), 2))
    before, after = products(folder), products(tmp_path / "low")
    assert before.keys() == after.keys()
    lost = total = 0.0
    for name, product in before.items():
        values = torch.linalg.svdvals(product)
        error = (after[name] - product).norm().item()
        assert error == pytest.approx(values[2:].norm().item(), rel=1e-4), name
        lost, total = lost + error**2, total + values.square().sum().item()
    stated = float(next(line for line in said.splitlines() if line.startswith("  all")).split()[1])
    assert stated == pytest.approx((lost / total) ** 0.5, rel=1e-2) and 0.1 < stated < 1
    assert json.loads((tmp_path / "low" / "adapter_config.json").read_text())["r"] == 2


def test_rank_that_was_not_used_costs_nothing(model, tmp_path):
    """Columns of W_up that are zero, as after padding rank 2 to 6."""
    shape = read_model_shape(model)
    small, padded = random_adapter(shape, 2, ALL), random_adapter(shape, 6, ALL)
    for name, tensor in small.items():
        if ".lora_B." in name:
            padded[name][:, 2:] = 0
            padded[name][:, :2] = tensor
    folder = write_adapter(tmp_path / "six", padded, rank=6, alpha=6, targets=ALL)
    said = lower(LowerRankConfig(model, folder, str(tmp_path / "two"), 2))
    assert float(next(line for line in said.splitlines() if line.startswith("  all")).split()[1]) < 1e-6
    before, after = products(folder), products(tmp_path / "two")
    assert all((after[name] - product).norm() < 1e-6 * product.norm() for name, product in before.items())
    with pytest.raises(ValueError, match="--lora_rank 6: the adapter has rank 6; choose 1 to 5"):
        lower(LowerRankConfig(model, folder, str(tmp_path / "other"), 6))
