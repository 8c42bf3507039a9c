"""One step of the command line against one process of `transformers` (reference_step.py), at every
kind of parallel layout.

A case is a model, an adapter, rows and flags; each layout runs several cases on the same ranks. The
numbers of metrics.jsonl are compared.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM, Qwen3OmniMoeThinkerForConditionalGeneration

from megatron_gkd.verify.reference import decoder, load_peft
from tests.reference_step import (
    load_model,
    read_adapter,
    reference_step,
    reference_training,
    write_adapter,
)
from tests.step_cases import CASES, NUM_ROWS, OTHER, RANKS, TARGETS, answered, cut_adapter, rank_two
from tests.train_runs import (
    SMALL,
    arguments,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    write_rows,
)

COMPARED = (
    "loss",
    "jsd",
    "sft_loss",
    "grad_norm",
    "kl_forward",
    "kl_reverse",
    "entropy_student",
    "entropy_teacher",
)
COUNTED = ("num_tokens", "top1_agreement", "token_accuracy")


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory):
    """Model, adapter and row files of the cases by name, and a place for runs."""
    root = tmp_path_factory.mktemp("parity")
    models = {
        "small": tiny_folder(**SMALL),
        "other": tiny_folder(text_config=dict(norm_topk_prob=False), **OTHER),
        "text": tiny_folder(family="qwen3_moe", num_key_value_heads=2, **SMALL),
    }
    rows = {
        "teacher": make_rows(NUM_ROWS),
        "plain": make_rows(NUM_ROWS, with_teacher=False, seed=1),
    }
    rows["mixed"] = [
        answered(models["small"], row) if i % 4 == 1 else row
        for i, row in enumerate(rows["teacher"])
    ]
    adapters = {
        (model, name): write_adapter(
            root / f"{model}-{name}",
            folder,
            rank=RANKS[name][0],
            alpha=RANKS[name][1],
            targets=targets,
        )
        for model, folder in models.items()
        for name, targets in TARGETS.items()
    }
    whole, rank, alpha = adapters["small", "all"], *RANKS["all"]
    adapters["small", "one layer"] = cut_adapter(
        whole,
        root / "one layer",
        lambda name, tensor: tensor if ".layers.1." in name else None,
        layers_to_transform=[1],
    )
    pattern = r"layers\.1\.self_attn\.v_proj"
    settings = dict(rank_pattern={pattern: 2}, alpha_pattern={pattern: 2 * alpha / rank})
    adapters["small", "a lower rank"] = cut_adapter(
        whole, root / "a lower rank", rank_two, **settings
    )
    files = {name: write_rows(root / f"{name}.jsonl", content) for name, content in rows.items()}
    return dict(root=root, models=models, rows=rows, adapters=adapters, files=files, expected={})


def expected(folders, name: str) -> dict:
    """The reference of a case, computed once."""
    if name not in folders["expected"]:
        model, adapter, rows, settings, flags = CASES[name]
        values = reference_step(
            folders["models"][model],
            folders["adapters"][model, adapter],
            folders["rows"][rows],
            teacher=folders["adapters"].get((model, flags.get("teacher_adapter"))),
            **settings,
        )
        folders["expected"][name] = values
    return folders["expected"][name]


def case_arguments(
    folders, name: str, output: Path, *, dp: int = 1, accumulation: int = 1, **flags
) -> list[str]:
    """Flags of a case such that one step takes all NUM_ROWS rows; with accumulation > 1 several
    micro-batches on each rank.
    """
    model, adapter, rows, _, own = CASES[name]
    if "teacher_adapter" in own:
        own = own | dict(teacher_adapter=folders["adapters"][model, own["teacher_adapter"]])
    return arguments(
        model=folders["models"][model],
        adapter=folders["adapters"][model, adapter],
        dataset=folders["files"][rows],
        output_dir=output,
        max_steps=1,
        per_device_train_batch_size=NUM_ROWS // dp // accumulation,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=None if accumulation == 1 else 45,
        **own,
        **flags,
    )


def check(folders, name: str, output: Path, relative: float = 1e-4) -> None:
    (line,) = read_lines(output / "metrics.jsonl")
    reference = expected(folders, name)
    for key in COMPARED:
        assert line[key] == pytest.approx(reference[key], rel=relative), (name, key)
    for key in COUNTED:
        assert line[key] == pytest.approx(reference[key], rel=1e-9), (name, key)
    assert line["skipped_steps"] == 0 and line["on_policy"] is False


def run_cases(
    folders, tmp_path, names, world_size: int, tp: int, pp: int, ep: int, accumulation: int, cp=1
) -> None:
    dp = world_size // tp // pp // cp
    flags = layout_flags(tp, pp, ep, cp)
    runs = [
        case_arguments(folders, name, tmp_path / name, dp=dp, accumulation=accumulation, **flags)
        for name in names
    ]
    run_training(world_size, *runs)
    for name in names:
        check(folders, name, tmp_path / name)


@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
@pytest.mark.parametrize(
    "name, kind",
    [
        ("small", Qwen3OmniMoeThinkerForConditionalGeneration),
        ("text", Qwen3MoeForCausalLM),
    ],
)
def test_reference_adapter_is_peft(folders, name, kind):
    """W + scale B A is what `peft` computes from the same folder, per-expert names included."""
    folder, adapter = folders["models"][name], folders["adapters"][name, "all"]
    base = kind.from_pretrained(folder, dtype=torch.float32)
    model = load_peft(base, adapter).eval()
    assert all(
        value.any() for name, value in decoder(base).named_parameters() if ".lora_B." in name
    )
    reference = load_model(folder)
    tensors, scale = read_adapter(adapter)
    ids = folders["rows"]["teacher"][2]["input_ids"]
    with torch.no_grad():
        theirs, ours = (
            model(input_ids=torch.tensor([ids])).logits[0].double(),
            reference.logits(ids, reference.with_lora(tensors, scale)),
        )
        base_logits = reference.logits(ids)
    assert (theirs - ours).abs().max() < 1e-3 * (theirs - base_logits).abs().max()


def test_one_rank_all_cases(folders, tmp_path):
    run_cases(folders, tmp_path, list(CASES), 1, 1, 1, 1, accumulation=2)
    assert (
        0 < expected(folders, "guide")["top1_agreement"] < 1
        and 0 < expected(folders, "guide")["token_accuracy"] < 1
    )
    assert (
        expected(folders, "clip")["jsd"] < 0.9 * expected(folders, "plain")["jsd"]
    )  # entries were clipped


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, accumulation, names",
    [
        (
            2,
            2,
            1,
            1,
            1,
            [
                "guide",
                "paper",
                "forward",
                "only sft",
                "other",
                "lm_head",
                "lm_head alone",
                "one layer",
                "a lower rank",
                "a teacher with attention",
                "a teacher with lm_head",
            ],
        ),
        pytest.param(2, 1, 1, 2, 2, ["guide", "paper 1", "recompute"], marks=pytest.mark.extended),
        pytest.param(
            2,
            1,
            2,
            1,
            4,
            ["guide", "recompute", "reverse", "lm_head", "one layer", "a lower rank"],
            marks=pytest.mark.extended,
        ),
        (2, 1, 2, 1, 2, ["a teacher with attention", "a teacher with all", "text", "text lm_head"]),
        (2, 2, 1, 2, 1, ["a teacher with all", "a teacher with lm_head"]),
        pytest.param(2, 1, 1, 1, 2, ["guide", "paper", "paper 0"], marks=pytest.mark.extended),
        pytest.param(
            2,
            2,
            1,
            2,
            2,
            ["recompute", "paper 1", "eager", "plain", "other recompute", "text"],
            marks=pytest.mark.extended,
        ),
        (
            4,
            2,
            2,
            2,
            2,
            [
                "guide",
                "forward",
                "recompute",
                "lm_head",
                "a teacher with lm_head",
                "top k",
                "entropy",
            ],
        ),
        pytest.param(4, 4, 1, 4, 1, ["guide", "paper", "other"], marks=pytest.mark.extended),
        pytest.param(4, 2, 1, 4, 2, ["guide", "other recompute"], marks=pytest.mark.extended),
    ],
)
def test_layouts(folders, tmp_path, world_size, tp, pp, ep, accumulation, names):
    run_cases(folders, tmp_path, names, world_size, tp, pp, ep, accumulation)


@pytest.mark.parametrize(
    "world_size, cp, tp, pp, ep, accumulation, names",
    [
        pytest.param(
            2,
            2,
            1,
            1,
            1,
            1,
            ["guide", "lm_head", "eager", "a teacher with attention"],
            marks=pytest.mark.extended,
        ),
        (4, 4, 1, 1, 1, 1, ["guide", "recompute"]),
        (4, 2, 2, 1, 1, 2, ["guide", "recompute", "lm_head"]),
        (8, 2, 1, 2, 2, 2, ["guide", "other recompute", "position"]),
        pytest.param(
            *(4, 2, 2, 1, 1, 2),
            ["top k", "top k, lm_head", "entropy", "position"],
            marks=pytest.mark.extended,
        ),
    ],
)
def test_context_parallel_layouts(
    folders, tmp_path, world_size, cp, tp, pp, ep, accumulation, names
):
    run_cases(folders, tmp_path, names, world_size, tp, pp, ep, accumulation, cp)


@pytest.mark.parametrize(
    "tp, pp, ep, accumulation, names",
    [
        pytest.param(8, 1, 8, 2, ["guide", "other recompute", "top k"], marks=pytest.mark.smoke),
        pytest.param(
            *(8, 1, 8, 2), ["top k, lm_head", "entropy", "position"], marks=pytest.mark.extended
        ),
        pytest.param(8, 1, 8, 2, ["paper", "recompute", "other"], marks=pytest.mark.extended),
        pytest.param(2, 2, 4, 2, ["recompute", "other"], marks=pytest.mark.smoke),
        pytest.param(2, 2, 4, 2, ["guide", "forward"], marks=pytest.mark.extended),
        pytest.param(
            4, 1, 8, 2, ["guide", "paper 1", "other recompute"], marks=pytest.mark.extended
        ),
        pytest.param(1, 1, 8, 2, ["guide", "recompute"], marks=pytest.mark.extended),
        pytest.param(2, 4, 1, 4, ["other", "other recompute"], marks=pytest.mark.extended),
        pytest.param(8, 1, 1, 1, ["guide", "other"], marks=pytest.mark.extended),
    ],
)
def test_layouts_of_eight_ranks(folders, tmp_path, tp, pp, ep, accumulation, names):
    run_cases(folders, tmp_path, names, 8, tp, pp, ep, accumulation)


@pytest.mark.extended  # test_launch.py and the demo start through torchrun as well
def test_torchrun(folders, tmp_path):
    """The command as a user types it, with real process start-up."""
    flags = layout_flags(tp=2, ep=2)
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "megatron_gkd.train",
    ]
    argv = case_arguments(folders, "guide", tmp_path / "guide", accumulation=2, **flags)
    with (tmp_path / "log").open("w") as log:
        status = subprocess.run(
            command + argv, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    assert status == 0, (tmp_path / "log").read_text()
    check(folders, "guide", tmp_path / "guide")


def test_bfloat16_base(folders, tiny_folder, tmp_path):
    """bf16 rounds activations, not the loss: a few per cent. The reference has the same bf16
    weights in float64.
    """
    folder = tiny_folder(torch_dtype="bfloat16", **SMALL)
    adapter = folders["adapters"]["small", "all"]
    reference = reference_step(folder, adapter, folders["rows"]["mixed"])
    runs = [(tmp_path / str(tp), layout_flags(tp=tp, ep=tp)) for tp in (1, 2)]
    for output, flags in runs:
        run_training(
            flags["tensor_model_parallel_size"],
            arguments(
                model=folder,
                adapter=adapter,
                dataset=folders["files"]["mixed"],
                output_dir=output,
                max_steps=1,
                per_device_train_batch_size=NUM_ROWS,
                torch_dtype="bfloat16",
                **flags,
            ),
        )
        (line,) = read_lines(output / "metrics.jsonl")
        for key in ("loss", "jsd", "sft_loss", "grad_norm"):
            assert line[key] == pytest.approx(reference[key], rel=0.03), key
        assert line["num_tokens"] == reference["num_tokens"]


EPSILON = (
    1e-6  # with AdamW's usual 1e-8 an entry whose gradients almost cancel moves by their rounding
)


@lru_cache
def four_steps(
    model: str, adapter: str, rows: str, max_grad_norm: float
) -> tuple[dict, list[float], list[float]]:
    """The reference's adapter, gradient norms and learning rates of
    `test_adapter_after_four_steps`.
    """
    rates = [0.01, 0.01, 0.0075, 0.0025]  # one step of warm-up, then half a cosine over three
    batches = [[json.loads(line) for line in Path(rows).read_text().splitlines()]] * 4
    tensors, norms = reference_training(
        model,
        adapter,
        batches,
        rates,
        max_grad_norm=max_grad_norm,
        weight_decay=0.1,
        epsilon=EPSILON,
        sft_alpha=0.3,
    )
    return tensors, norms, rates


@pytest.mark.parametrize(
    "name, world_size, tp, pp, ep, cp, max_grad_norm",
    [
        ("small", 1, 1, 1, 1, 1, 1e9),
        pytest.param("small", 2, 2, 1, 2, 1, 0.3, marks=pytest.mark.extended),
        ("small", 4, 2, 2, 2, 1, 0.3),
        pytest.param("small", 4, 2, 1, 4, 1, 1e9, marks=pytest.mark.extended),
        ("small", 8, 8, 1, 8, 1, 0.3),
        ("text", 2, 2, 1, 2, 1, 1e9),
        ("small", 4, 1, 1, 1, 4, 1e9),
        ("text", 4, 2, 1, 4, 2, 0.3),
        pytest.param("small", 8, 1, 2, 2, 2, 1e9, marks=pytest.mark.extended),
    ],
)
def test_adapter_after_four_steps(
    folders, tmp_path, name, world_size, tp, pp, ep, cp, max_grad_norm
):
    """Clipping, AdamW and the learning rate: the saved adapter is torch's, from the reference's
    gradients. Every step takes all rows.
    """
    model, adapter, rows = (
        folders["models"][name],
        folders["adapters"][name, "all"],
        folders["files"]["mixed"],
    )
    argv = arguments(
        model=model,
        adapter=adapter,
        dataset=rows,
        output_dir=tmp_path,
        max_steps=4,
        per_device_train_batch_size=NUM_ROWS // (world_size // tp // pp // cp),
        learning_rate=0.01,
        warmup_ratio=0.25,
        max_grad_norm=max_grad_norm,
        weight_decay=0.1,
        adam_epsilon=EPSILON,
        sft_alpha=0.3,
        **layout_flags(tp, pp, ep, cp),
    )
    run_training(world_size, argv)
    tensors, norms, rates = four_steps(model, adapter, rows, max_grad_norm)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-12)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-3)
    assert all(
        (norm > max_grad_norm) == (max_grad_norm < 1) for norm in norms
    )  # clipped always, or never
    start, saved = (
        load_file(Path(folder, "adapter_model.safetensors"))
        for folder in (adapter, tmp_path / "checkpoint-4")
    )
    assert saved.keys() == tensors.keys()
    for key, tensor in tensors.items():
        moved = (tensor - start[key]).norm()
        assert (saved[key] - tensor).norm() < 2e-4 * max(moved, 0.01), key
