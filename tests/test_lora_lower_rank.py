"""Adapters brought to a lower rank: the best of that rank, with its error."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from checkpoint_tools.lower_rank import LowerRankConfig, lower
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import decoder
from tests.adapters import (
    ALL,
    ROOT,
    TOWERS,
    load_peft,
    load_thinker,
    make_batches,
    random_adapter,
    write_adapter,
)
from tests.sizes import SMALLEST
from tests.test_lora_merge import write_adapters


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder(**SMALLEST, max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    return write_adapters(model, tmp_path_factory.mktemp("adapters"))


def products(folder):
    """linear -> (alpha / r) W_up W_down, fp64."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    names = [name for name in tensors if ".lora_A." in name]
    return {
        n: scale * tensors[n.replace("_A.", "_B.")].double() @ tensors[n].double() for n in names
    }


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


# adapters whose linears have several ranks, as peft itself writes them: (LoraConfig, the rank to
# come to)
UNEVEN = {
    "a rank of its own": (
        dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}),
        4,
    ),
    "experts fused to twice the rank": (dict(r=4, target_modules=ALL), 6),
    "one layer": (dict(r=4, target_modules=["k_proj"], layers_to_transform=[1]), 2),
}


def updates(folder, model_args):
    """linear -> the update that an adapter of any form makes, fp64; none without LoRA."""
    adapter, found = PeftAdapter(folder, model_args), {}
    for name in adapter_tensors(model_args, 1, adapter.targets):
        if ".lora_A." in name and name in adapter:
            (down, scale), (up, _) = (
                adapter.tensor(name),
                adapter.tensor(name.replace("_A.", "_B.")),
            )
            found[name] = scale * up.double() @ down.double()
    return found


@pytest.mark.parametrize("form", UNEVEN)
def test_linears_of_several_ranks_come_down_to_one(model, tmp_path, form):
    """Each linear's update is the best of its rank, those of lower rank keep theirs; peft computes
    what we write.
    """
    settings, rank = UNEVEN[form]
    model_args, generator = read_model_args(model), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    peft_model = get_peft_model(load_thinker(model), LoraConfig(exclude_modules=TOWERS, **settings))
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(generator=generator, std=0.1)
    peft_model.save_pretrained(tmp_path / "uneven")
    lower(LowerRankConfig(model, str(tmp_path / "uneven"), str(tmp_path / "low"), rank))

    before, after = updates(tmp_path / "uneven", model_args), updates(tmp_path / "low", model_args)
    truncated = 0
    for name, update in before.items():
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert (after[name] - best).norm() < 1e-5 * best.norm(), name
        truncated += bool(values[rank:].norm() > 1e-3 * values.norm())
    assert truncated and all(not after[name].any() for name in after.keys() - before.keys())

    batch = make_batches(503)[0]
    inputs = dict(
        input_ids=batch.input_ids, attention_mask=batch.real.long(), position_ids=batch.position_ids
    )
    loaded, missing = load_peft(load_thinker(model), str(tmp_path / "low"))
    thinker = load_thinker(model)
    with torch.no_grad():
        base = thinker(**inputs).logits[batch.real]
        add_updates(thinker, after)
        expected, found = thinker(**inputs).logits[batch.real], loaded(**inputs).logits[batch.real]
    assert not missing
    assert (found - expected).abs().max() < 1e-4 < 0.03 < (expected - base).abs().max()


def add_updates(thinker, changes):
    """Add them to the weights of transformers' model, where an expert is a slice of the layer's
    fused parameters.
    """
    for name, update in changes.items():
        layer, *path = name.removeprefix(ROOT).removesuffix(".lora_A.weight").split(".")
        module = decoder(thinker).layers[int(layer)]
        if path[0] == "self_attn":
            module.self_attn.get_submodule(path[1]).weight += update.float()
            continue
        experts, expert, linear = module.mlp.experts, int(path[2]), path[3]
        if linear == "down_proj":
            experts.down_proj[expert] += update.float()
        else:
            gate, up = experts.gate_up_proj[expert].chunk(2)
            (gate if linear == "gate_proj" else up).add_(update.float())


def test_rank_that_was_not_used_costs_nothing(model, tmp_path):
    """Columns of W_up that are zero, as after padding rank 2 to 6."""
    model_args = read_model_args(model)
    small, padded = random_adapter(model_args, 2, ALL), random_adapter(model_args, 6, ALL)
    for name, tensor in small.items():
        if ".lora_B." in name:
            padded[name][:, 2:] = 0
            padded[name][:, :2] = tensor
    folder = write_adapter(tmp_path / "six", padded, rank=6, alpha=6, targets=ALL)
    said = lower(LowerRankConfig(model, folder, str(tmp_path / "two"), 2))
    assert (
        float(next(line for line in said.splitlines() if line.startswith("  all")).split()[1])
        < 1e-6
    )
    before, after = products(folder), products(tmp_path / "two")
    assert all(
        (after[name] - product).norm() < 1e-6 * product.norm() for name, product in before.items()
    )
    with pytest.raises(ValueError, match="--lora_rank 6: the adapter has rank 6; choose 1 to 5"):
        lower(LowerRankConfig(model, folder, str(tmp_path / "other"), 6))
