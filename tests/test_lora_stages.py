"""A training run's checkpoint: exported, continued at a higher rank, and read by training after the
tools have worked on it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.lower_rank import LowerRankConfig, lower
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from megatron_gkd.formats.manifest import MANIFEST
from megatron_gkd.forward import eval_mode
from megatron_gkd.verify.tensors import check_adapter
from tests.adapters import ROOT, make_batches
from tests.logits import forward_logits
from tests.ranks import run_ranks
from tests.sizes import SMALLEST
from tests.test_lora_merge import read_folder
from tests.train_runs import (
    arguments,
    build_parts,
    make_rows,
    read_lines,
    run_training,
    stable,
    write_rows,
)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return tiny_folder(**SMALLEST, max_shard_size="100KB")


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
