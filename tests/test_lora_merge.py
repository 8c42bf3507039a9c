"""Adapters: merged into a folder, exported, continued at a higher rank, brought to a lower one."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.lower_rank import LowerRankConfig, lower
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from megatron_gkd.formats.manifest import MANIFEST
from megatron_gkd.forward import eval_mode, forward_logits
from megatron_gkd.lora.adapter import adapter_tensors
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from megatron_gkd.verify.reference import decoder
from megatron_gkd.verify.tensors import check_adapter
from tests.adapters import (
    ALL,
    TOWERS,
    load_peft,
    load_thinker,
    make_batches,
    random_adapter,
    write_adapter,
)
from tests.ranks import run_ranks
from tests.sizes import SMALLEST
from tests.train_runs import (
    arguments,
    build_parts,
    make_rows,
    read_lines,
    run_training,
    stable,
    write_rows,
)

SMALL = SMALLEST
ROOT = "base_model.model.thinker.model.layers."


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder(**SMALL, max_shard_size="100KB")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two adapters, on all linears, and on some of attention and the lm_head: (folder, scale,
    tensors) of each.
    """
    model_args, root, made = read_model_args(model), tmp_path_factory.mktemp("adapters"), []
    for number, (rank, alpha, targets) in enumerate(
        ((4, 6.0, ALL), (3, 9.0, ["q_proj", "o_proj", "lm_head"]))
    ):
        tensors = random_adapter(model_args, rank, targets, seed=number)
        folder = write_adapter(root / str(number), tensors, rank=rank, alpha=alpha, targets=targets)
        made.append((folder, alpha / rank, tensors))
    return made


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_a_sum_that_is_no_number_is_refused(tiny_folder, adapters, tmp_path, value):
    """By the name of the tensor: a NaN of the adapter, or a sum too large for the base's fp16."""
    base = tiny_folder(**SMALL, torch_dtype="float16", max_shard_size="100KB")
    broken = Path(shutil.copytree(adapters[1][0], tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[f"{ROOT}1.self_attn.o_proj.lora_B.weight"][3] = value
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    message = (
        "tensor thinker.model.layers.1.self_attn.o_proj.weight: "
        "the base plus the adapters is not finite"
    )
    with pytest.raises(ValueError, match=message):
        merge_lora(MergeLoraConfig(base, str(tmp_path / "out"), [str(broken)], num_workers=2))
    assert not (tmp_path / "out").exists()


# --- a training run's checkpoint, and stage two ---------------------------------------------------


@pytest.fixture(scope="module")
def stage_one(model, tmp_path_factory):
    """A run of two steps at rank 4, and the flags that it shares with the next stage."""
    root = tmp_path_factory.mktemp("stage")
    shared = dict(
        model=model,
        dataset=write_rows(root / "rows.jsonl", make_rows(8)),
        per_device_train_batch_size=4,
    )
    first = dict(
        lora_rank=4, lora_alpha=8, max_steps=2, learning_rate=1e-2, output_dir=root / "one"
    )
    run_training(1, arguments(**shared, **first))
    return root / "one" / "checkpoint-2", shared


def test_a_checkpoint_of_training_is_exported(model, stage_one, tmp_path):
    """Its adapter alone, as it was; or merged into its base model, as merge_lora does."""
    checkpoint, _ = stage_one
    megatron_to_hf(MegatronToHfConfig(str(checkpoint), str(tmp_path / "adapter"), export="adapter"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        MANIFEST,
    }
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (checkpoint / name).read_bytes()
    megatron_to_hf(MegatronToHfConfig(str(checkpoint), str(tmp_path / "a"), num_workers=1))
    merge_lora(
        MergeLoraConfig(model, str(tmp_path / "b"), [str(tmp_path / "adapter")], num_workers=1)
    )
    ours, theirs = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in read_folder(model).items())

    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/nowhere"})
    )
    with pytest.raises(
        ValueError, match="its base model '/nowhere' is not a folder here; name it with --hf_model"
    ):
        megatron_to_hf(MegatronToHfConfig(str(copy), str(tmp_path / "c")))


@pytest.mark.parametrize("how", ["adapter", "resume_from_checkpoint"])
@pytest.mark.parametrize("alpha", [None, 12])
def test_a_higher_rank_begins_with_the_same_function(stage_one, tmp_path, how, alpha):
    """Rank 4 continued at 16: the first loss is the rank-4 adapter's, the new columns of W_up are
    trained.
    """
    checkpoint, shared = stage_one
    common = shared | dict(max_steps=1, learning_rate=1e-3)
    run_training(1, arguments(**common, adapter=checkpoint, output_dir=tmp_path / "same"))
    said = run_training(
        1,
        arguments(
            **common,
            **{how: checkpoint},
            lora_rank=16,
            lora_alpha=alpha,
            output_dir=tmp_path / "more",
        ),
    )
    assert "continued at rank 16" in said and f"alpha 8 -> {alpha or 32}" in said
    assert "The function is unchanged; the optimizer starts anew at step 0" in said
    if how == "resume_from_checkpoint":
        assert f"New stage from {checkpoint}: LoRA rank 4 -> 16" in said
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


def logits_of_parts(rank, world_size, argument_lists):
    """Of the model that each command line builds, LoRA on."""
    ids, found = make_batches(503)[0].input_ids, []
    for number, argv in enumerate(argument_lists):
        parts = build_parts(argv, again=number > 0)
        with eval_mode(parts.model):
            found.append(forward_logits(parts.model, parts.model_args, parts.parallel, ids))
    return found


def test_a_higher_rank_has_the_same_logits(stage_one, tmp_path):
    """Rank 4 as it is, at rank 16 with the alpha that goes with it, at rank 16 with another alpha;
    and the base model.
    """
    checkpoint, shared = stage_one
    runs = [{}, dict(lora_rank=16), dict(lora_rank=16, lora_alpha=12)]
    flags = [dict(adapter=checkpoint) | run for run in runs] + [dict(lora_rank=4)]
    flags += [dict(resume_from_checkpoint=checkpoint, lora_rank=16)]
    argument_lists = [arguments(**shared, **run, output_dir=tmp_path, max_steps=1) for run in flags]
    [(same, more, other_alpha, base, resumed)] = run_ranks(logits_of_parts, 1, argument_lists)
    batch = make_batches(503)[0]
    differences = [
        (logits - same)[batch.real].abs().max().item()
        for logits in (more, other_alpha, resumed, base)
    ]
    assert max(differences[:3]) < 1e-5 and differences[3] > 1e-2


def test_stage_two_from_a_checkpoint_of_the_adapter_alone(stage_one, tmp_path):
    """--save_only_model leaves no optimizer: at the same rank there is nothing to resume, at
    another a new stage begins. Its file says what it was trained with.
    """
    _, shared = stage_one
    common = shared | dict(max_steps=1, learning_rate=1e-2)
    first = dict(lora_rank=4, lora_alpha=8, save_only_model=True, output_dir=tmp_path / "one")
    run_training(1, arguments(**common, **first))
    checkpoint = tmp_path / "one" / "checkpoint-1"
    assert not (checkpoint / "trainer_state.json").exists()
    with pytest.raises(
        RuntimeError,
        match="holds only the adapter .--save_only_model.; start from it with --adapter",
    ):
        run_training(
            1, arguments(**common, resume_from_checkpoint=checkpoint, output_dir=tmp_path / "same")
        )
    second = dict(resume_from_checkpoint=checkpoint, lora_rank=16, output_dir=tmp_path / "two")
    said = run_training(1, arguments(**common, **second))
    assert f"New stage from {checkpoint}: LoRA rank 4 -> 16, alpha 8 -> 32" in said
    assert read_lines(tmp_path / "two" / "metrics.jsonl")[0]["step"] == 1

    assert check_adapter(checkpoint).problems == []
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))
    assert "lora_alpha is 16, trained with 8" in check_adapter(checkpoint).problems[0]


def test_training_reads_what_the_tools_write(model, stage_one, tmp_path):
    """One step each: an exported adapter and one of lower rank as --adapter, a folder that came
    back and a merged one as --model.
    """
    checkpoint, shared = stage_one
    megatron_to_hf(
        MegatronToHfConfig(str(checkpoint), str(tmp_path / "exported"), export="adapter")
    )
    lower(LowerRankConfig(model, str(checkpoint), str(tmp_path / "low"), 3))
    hf_to_megatron(HfToMegatronConfig(model, str(tmp_path / "megatron"), num_workers=2))
    megatron_to_hf(
        MegatronToHfConfig(str(tmp_path / "megatron"), str(tmp_path / "back"), num_workers=2)
    )
    merge_lora(MergeLoraConfig(model, str(tmp_path / "merged"), [str(checkpoint)], num_workers=2))
    runs = {
        "trained": dict(adapter=checkpoint),
        "exported": dict(adapter=tmp_path / "exported"),
        "low": dict(adapter=tmp_path / "low"),
        "back": dict(adapter=checkpoint, model=tmp_path / "back"),
        "merged": dict(model=tmp_path / "merged"),
    }
    common = shared | dict(max_steps=1, learning_rate=1e-3)
    run_training(
        1,
        *[
            arguments(**(common | run), output_dir=tmp_path / f"run-{name}")
            for name, run in runs.items()
        ],
    )
    first = {
        name: stable(read_lines(tmp_path / f"run-{name}" / "metrics.jsonl"))[0] for name in runs
    }
    assert first["exported"] == first["trained"] == first["back"]
    assert first["trained"]["loss"] > 1e-3
    assert first["low"]["loss"] == pytest.approx(first["trained"]["loss"], rel=0.2)
    config = json.loads((tmp_path / "run-low" / "checkpoint-1" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    # The merged model is its own teacher, so its loss is another; what its student says is what the
    # adapter's said.
    assert first["merged"]["entropy_student"] == pytest.approx(
        first["trained"]["entropy_student"], rel=1e-5
    )
    assert first["merged"]["loss"] > 0


# --- a lower rank ---------------------------------------------------------------------------------


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
