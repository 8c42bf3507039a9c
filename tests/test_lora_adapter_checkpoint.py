"""Checkpoints as PEFT folders: the same bytes from every layout, peft computes our logits, a run
resumes from one, and fresh adapters start as peft's.
"""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from megatron_gkd.checkpoint import save_checkpoint
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.model.args import read_model_args
from tests.adapters import (
    ALL,
    EXPERTS,
    TOWERS,
    linear_sizes,
    load_peft,
    load_thinker,
    load_whole,
    make_batches,
    random_adapter,
    write_adapter,
)
from tests.lora_runs import (
    FOLDERS,
    VOCAB_SIZE,
    build,
    in_reducer,
    initialize,
    make_optimizer,
    run_schedule,
    share,
)
from tests.ranks import run_ranks
from tests.test_lora_adapter import CONFIG, TENSORS, difference, reference_logits
from tests.train_runs import arguments, make_rows, run_training, write_rows


def write_checkpoints(rank, world_size, tp, pp, ep, output, runs):
    """For each name -> (folder, adapter or None, LoRA, train): a checkpoint in `output`/name, and
    the logits of the model that wrote it.
    """
    place = initialize(tp, pp, ep)
    logits, batches = {}, share(make_batches(VOCAB_SIZE), place)
    for name, (folder, adapter, lora, train) in runs.items():
        model_args, model = build(place, folder, adapter, **lora)
        ddp = in_reducer(model)
        if train:
            optimizer = make_optimizer(ddp, place)
            for _ in range(2):
                optimizer.zero_grad()
                run_schedule(place, ddp, batches)
                optimizer.step(0.05, 0.0)
        save_checkpoint(
            f"{output}/{name}",
            1,
            model=model,
            model_args=model_args,
            parallel=place,
            alpha=5,
            use_rslora=name == "by-layer",
            dropout=0.0,
            base_model=folder,
            optimizer=None,
            state={},
        )
        logits[name] = run_schedule(place, ddp, batches, backward=False)
    return logits


@pytest.fixture(scope="module")
def to_write(tiny_folder, tmp_path_factory):
    """name -> (folder, adapter or None, LoRA, whether to train before writing); and the adapters'
    tensors.
    """
    whole, thinker = (
        tiny_folder(**FOLDERS[kind]) for kind in ("4 KV heads", "2 KV heads, odd sizes")
    )
    runs, tensors = {}, {}
    for name, folder, targets in (
        ("all", whole, ALL),
        ("gate-up", whole, ["gate_proj", "up_proj"]),
        ("q-v", thinker, ["q_proj", "v_proj"]),
        ("k-down", thinker, ["k_proj", "down_proj"]),
        ("o-head", whole, ["o_proj", "lm_head"]),
        ("layer-1", whole, [f"1.{target}" for target in ALL]),
        ("by-layer", thinker, ["0.q_proj", "1.q_proj", "1.o_proj", "0.gate_proj", "0.down_proj"]),
    ):
        tensors[name] = random_adapter(read_model_args(folder), 3, targets)
        adapter = write_adapter(
            tmp_path_factory.mktemp("adapter"),
            tensors[name],
            rank=3,
            alpha=5,
            targets=targets,
            use_rslora=name == "by-layer",
        )
        runs[name] = (folder, adapter, {}, False)
    runs["fresh"] = (whole, None, dict(rank=8, alpha=5, targets=ALL, seed=7), False)
    runs["another-seed"] = (whole, None, dict(rank=8, alpha=5, targets=ALL, seed=8), False)
    runs["trained"] = (whole, None, dict(rank=3, alpha=5, targets=ALL, seed=7), True)
    return runs, tensors


@pytest.fixture(scope="module")
def written(to_write, tmp_path_factory):
    """layout -> (name -> checkpoint folder, name -> logits)."""
    runs, _ = to_write
    made = {}
    for layout in ((1, 1, 1, 1), (4, 2, 2, 2), (8, 8, 1, 8), (4, 2, 1, 1)):
        output = tmp_path_factory.mktemp("written")
        results = run_ranks(write_checkpoints, *layout, str(output), runs)
        logits = {
            name: next(of_rank[name] for of_rank in results if of_rank[name]) for name in runs
        }
        made[layout] = {name: output / name / "checkpoint-1" for name in runs}, logits
    return made


def without_training(runs):
    return [name for name, run in runs.items() if not run[3]]


def test_the_file_is_the_same_at_every_layout(to_write, written):
    """Loaded adapters and fresh ones alike: every parallel layout writes the same bytes, and what
    was loaded comes out as it went in.
    """
    runs, tensors = to_write
    for name in without_training(runs):
        digests = {
            layout: [
                hashlib.sha256((folders[name] / file).read_bytes()).hexdigest()
                for file in (TENSORS, CONFIG)
            ]
            for layout, (folders, _) in written.items()
        }
        assert len(set(map(tuple, digests.values()))) == 1, f"{name}: {digests}"
    for name, expected in tensors.items():
        saved = load_file(written[1, 1, 1, 1][0][name] / TENSORS)
        assert all(torch.equal(saved.pop(key), value) for key, value in expected.items()), name
        for key in [key for key in saved if ".lm_head." in key]:  # under both names
            assert torch.equal(
                saved.pop(key),
                expected[key.replace("base_model.model.", "base_model.model.thinker.")],
            )
        assert not any(value.any() for value in saved.values()), (
            "what PEFT wants beside them is zero"
        )


def peft_loads(folder, adapter):
    """(label, loaded PeftModel, missing adapter keys) for each way to load an adapter of this
    folder.
    """
    yield "thinker", *load_peft(load_thinker(folder), adapter)
    if read_model_args(folder).prefix:
        yield "whole.thinker", *load_peft(load_whole(folder).thinker, adapter)
        yield "whole", *load_peft(load_whole(folder), adapter)


@pytest.mark.smoke
def test_peft_loads_what_is_saved(to_write, written):
    """On the thinker, on the whole model's thinker and on the whole model: our logits, and no LoRA
    of the decoder silently left at zero.
    """
    runs, _ = to_write
    for layout, (folders, logits) in written.items():
        names = list(runs) if layout == (1, 1, 1, 1) else ["trained"]
        for name in set(names) - {"fresh", "another-seed"}:
            folder = runs[name][0]
            base = reference_logits(load_thinker(folder))
            for label, model, missing in peft_loads(folder, str(folders[name])):
                expected = reference_logits(model)
                assert difference(logits[name], expected) < 1e-4, f"{name} on {label}"
                assert difference(base, expected) > 0.2
                assert not [key for key in missing if label != "whole"], (
                    f"{name} on {label}: {missing}"
                )
                zero = [
                    key
                    for key, value in model.named_parameters()
                    if ".lora_B." in key and "talker" not in key and not value.any()
                ]
                of_zeros = {
                    "gate-up": "experts.lora_B",
                    "k-down": "experts.base_layer.lora_B",
                    "layer-1": "layers.0.mlp.experts.",
                    "by-layer": "layers.1.mlp.experts.",
                }.get(name)
                assert all(of_zeros and of_zeros in key for key in zero), (
                    f"{name} on {label}: {zero[:3]}"
                )


def test_a_subset_of_the_experts_linears_comes_back_as_such(to_write, written):
    """The zeros that PEFT wants beside gate and up are not taken for LoRA: such a run can be
    resumed, with its own linears.
    """
    runs, _ = to_write
    for name, targets in (
        ("gate-up", ["gate_proj", "up_proj"]),
        ("k-down", ["k_proj", "down_proj"]),
    ):
        folder = written[1, 1, 1, 1][0][name]
        assert (
            json.loads((folder / CONFIG).read_text())["target_modules"]
            == [target for target in targets if target not in EXPERTS] + EXPERTS
        )
        assert PeftAdapter(folder, read_model_args(runs[name][0])).targets == targets


def test_layers_without_lora_stay_so_in_the_file(to_write, written):
    """layers_to_transform where all linears have the same layers, else the paths of attention; PEFT
    then has LoRA on these modules of attention and no others.
    """
    runs, _ = to_write
    folders = {name: written[1, 1, 1, 1][0][name] for name in ("layer-1", "by-layer")}
    configs = {name: json.loads((folder / CONFIG).read_text()) for name, folder in folders.items()}
    assert configs["layer-1"]["target_modules"] == ALL
    assert configs["layer-1"]["layers_to_transform"] == [1]
    assert "layers_to_transform" not in configs["by-layer"] and configs["by-layer"]["use_rslora"]
    of_attention = ["layers.1.self_attn.o_proj"]
    assert configs["by-layer"]["target_modules"] == ["q_proj", *of_attention, *EXPERTS]
    for name, folder in folders.items():
        base, adapter = runs[name][:2]
        args = read_model_args(base)
        opened, given = PeftAdapter(folder, args), PeftAdapter(adapter, args)
        assert (opened.targets, opened.use_rslora) == (given.targets, given.use_rslora)
        model = load_peft(load_thinker(base), str(folder))[0]
        wrapped = [n for n, m in model.named_modules() if hasattr(m, "lora_A") and "attn" in n]
        expected = {n for n in linear_sizes(args, given.targets) if "attn" in n}
        assert {n.split("layers.")[1] for n in wrapped} == expected


@pytest.mark.parametrize("world_size, pp", [(1, 1), pytest.param(2, 2, marks=pytest.mark.extended)])
def test_such_a_run_resumes_where_it_stood(tiny_folder, tmp_path, world_size, pp):
    """Also at a rank and alpha whose quotient does not give alpha back, and with rank, alpha and
    linears left to the checkpoint; also where a pipeline stage has no LoRA.
    """
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8, vocab_size=VOCAB_SIZE))
    flags = dict(
        model=tiny_folder(**FOLDERS["4 KV heads"]),
        dataset=rows,
        output_dir=tmp_path,
        max_steps=3,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        pipeline_model_parallel_size=pp,
    )
    lora = dict(lora_target_modules="gate_proj,up_proj", lora_rank=49, lora_alpha=16)
    lora |= dict(lora_layers="1", use_rslora=True)
    run_training(world_size, arguments(**flags, **lora))
    expected = read_metrics(tmp_path)[-1]
    for given in (lora, {}):
        run_training(
            world_size,
            arguments(**flags, **given, resume_from_checkpoint=tmp_path / "checkpoint-2"),
        )
        resumed = read_metrics(tmp_path)[-1]
        assert all(
            resumed[name] == expected[name]
            for name in ("step", "loss", "jsd", "grad_norm", "learning_rate")
        ), resumed


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_fresh_adapters_start_as_pefts(to_write, written):
    """lora_B zero; lora_A uniform within 1 / sqrt(d_in) as PEFT draws it, no two tensors alike, and
    from the seed.
    """
    runs, _ = to_write
    folders = written[1, 1, 1, 1][0]
    fresh, other = (load_file(folders[name] / TENSORS) for name in ("fresh", "another-seed"))
    torch.manual_seed(0)  # PEFT draws from the global generator
    model = get_peft_model(
        load_thinker(runs["fresh"][0]), LoraConfig(r=8, target_modules=ALL, exclude_modules=TOWERS)
    )
    for module, d_in in (
        ("self_attn.q_proj", 64),
        ("self_attn.o_proj", 128),
        ("experts.base_layer", 64),
        ("experts", 32),
    ):
        theirs = torch.cat(
            [
                value.flatten()
                for name, value in model.named_parameters()
                if f"{module}.lora_A" in name
            ]
        )
        leaf = {"experts.base_layer": "up_proj", "experts": "down_proj"}.get(module, module)
        ours = torch.cat(
            [value.flatten() for name, value in fresh.items() if f"{leaf}.lora_A" in name]
        )
        for values in (ours, theirs):
            assert 0.98 * d_in**-0.5 < values.abs().max() <= d_in**-0.5
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
        assert ours.mean().abs() < 0.05 * ours.std()
    assert not any(value.any() for name, value in fresh.items() if ".lora_B." in name)
    downs = [value for name, value in fresh.items() if ".lora_A." in name]
    assert len({tuple(value.flatten()[:8].tolist()) for value in downs}) == len(downs)
    assert not any(
        torch.equal(value, other[name]) for name, value in fresh.items() if ".lora_A." in name
    )
