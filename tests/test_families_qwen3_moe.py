"""The text model Qwen3MoeForCausalLM from end to end: the small folder, rollout, conversion both
ways, merging, verify, PEFT in and out, runs of the command line, refusals.

Logits and gradients at every layout: test_model.py and test_lora.py; steps of training:
test_step_parity.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.lower_rank import LowerRankConfig, lower
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from checkpoint_tools.verify import VerifyConfig
from demo.tiny import toy_language
from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.model.args import read_model_args
from tests.adapters import (
    ALL,
    HEAD,
    load_peft,
    load_text_model,
    random_adapter,
    write_adapter,
)
from tests.ranks import run_ranks
from tests.rollouts import GREEDY, greedy_texts
from tests.test_rollout import MAX_NEW_TOKENS, load, write
from tests.test_train import error_of_run
from tests.test_verify import rewrite, run_verify
from tests.train_runs import SMALL, arguments, layout_flags, read_lines, run_training, stable

SIZES = dict(SMALL, family="qwen3_moe", num_key_value_heads=2, max_shard_size="100KB")


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return Path(tiny_folder(**SIZES))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> str:
    """With LoRA on the lm_head too."""
    tensors = random_adapter(read_model_args(folder), 3, [*ALL, HEAD])
    path = tmp_path_factory.mktemp("text") / "adapter"
    return write_adapter(path, tensors, rank=3, alpha=6, targets=[*ALL, HEAD])


def verify_at(tp: int, pp: int, ep: int, **settings) -> tuple[bool, str]:
    """(passed, what rank 0 printed)."""
    config = VerifyConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        device="cpu",
        **settings,
    )
    return run_ranks(run_verify, max(tp * pp, ep), [config])[0][0]


def names_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# --- the small folder -----------------------------------------------------------------------------


def test_folder_is_spelled_as_on_the_hub(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (config["model_type"], config["rope_scaling"]) == ("qwen3_moe", None)
    assert (config["rope_theta"], config["norm_topk_prob"]) == (1e6, True)
    assert not list(folder.glob("*processor*"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in index["weight_map"]
    assert {name.split(".")[0] for name in index["weight_map"]} == {"model", "lm_head"}
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is Qwen3MoeForCausalLM
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red cat"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\n"
    assert not hasattr(tokenizer, "image_token_id")


def test_folder_can_be_taught_and_has_no_lessons_for_towers(tmp_path, capsys):
    taught = Path(build_folder(str(tmp_path / "taught"), TinyModelConfig(train_steps=2, **SIZES)))
    assert "held-out prompts answered right" in capsys.readouterr().out
    assert json.loads((taught / "lessons.json").read_text()) == {"train_steps": 2, "seed": 0}
    for flag, value in (("thinker_only", True), ("tower_steps", 3)):
        with pytest.raises(ValueError, match=f"--{flag}: Qwen3 MoE is a text model"):
            build_folder(str(tmp_path / "no"), TinyModelConfig(**SIZES, **{flag: value}))
    with pytest.raises(ValueError, match="--family llama: choose one of qwen3_moe, qwen3_omni"):
        build_folder(str(tmp_path / "no"), TinyModelConfig(family="llama"))


# --- rollout --------------------------------------------------------------------------------------


def write_greedily(rank, world_size, folder, layout, prompts):
    return write(*load(folder, *layout), prompts, sampling=GREEDY)


@pytest.mark.parametrize("layout", [(2, 2, 1, 2), (2, 1, 2, 1)], ids=["TP2 EP2", "PP2"])
def test_greedy_text_equals_transformers(folder, layout):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(503, (n,), generator=generator).tolist() for n in (9, 1, 17, 4)]
    expected = greedy_texts(load_text_model(str(folder)), prompts, MAX_NEW_TOKENS)
    found = run_ranks(write_greedily, layout[0], str(folder), layout, prompts)
    assert all(texts == expected for texts in found)


# --- conversion, merging, verify ------------------------------------------------------------------


def test_conversion_both_ways_and_verify(folder, adapter, tmp_path):
    checkpoint, back, merged = (tmp_path / name for name in ("checkpoint", "back", "merged"))
    hf_to_megatron(
        HfToMegatronConfig(
            str(folder), str(checkpoint), tensor_model_parallel_size=2, num_workers=1
        )
    )
    megatron_to_hf(MegatronToHfConfig(str(checkpoint), str(back), num_workers=1))
    found = names_of(back)
    found.pop("conversion_manifest.json")
    assert found == names_of(folder)

    merge_lora(MergeLoraConfig(str(folder), str(merged), [adapter], num_workers=1))
    flags = dict(
        hf_model=str(folder), checkpoint=str(checkpoint), adapter=adapter, merged=str(merged)
    )
    for layout in ((2, 1, 2), (1, 2, 1)):
        passed, printed = verify_at(*layout, **flags)
        assert passed, printed
        compared = [line.split("  ")[1] for line in printed.splitlines() if line.endswith("  ok")]
        models = ("base", "adapter off", "base + adapter", "merged")
        assert compared == [f"{model}, text" for model in models]
        assert float(printed.splitlines()[-2].split()[-1]) > 0.1, "the adapter must move the logits"

    key = "decoder.layers.pre_mlp_layernorm.weight"
    rewrite(checkpoint, key, (1,), lambda weight: weight + 1e-2)
    passed, printed = verify_at(1, 1, 1, hf_model=str(folder), checkpoint=str(checkpoint))
    assert not passed
    assert "model.layers.1.post_attention_layernorm.weight: differs from row 0" in printed
    assert "base, text" in printed and "DIFFERS; first at layer 1" in printed


def test_what_the_folder_should_not_hold_is_named(folder, tmp_path):
    """A tower is a tensor of the family in Qwen3-Omni, and a stranger here."""
    from safetensors.torch import save_file

    from megatron_gkd.formats.safetensors_folder import SafetensorsFolder, check_tensors

    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    tensors = {}
    for path in broken.glob("*.safetensors*"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    tensors["visual.merger.ln_q.weight"] = torch.ones(3)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has unexpected tensor visual.merger.ln_q.weight"):
        check_tensors(SafetensorsFolder(broken), read_model_args(broken))


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj", HEAD]], ids=["all", "head"])
def test_what_peft_saves_is_loaded(folder, tmp_path, targets):
    """Experts fused, as transformers 5 has them in memory: the logits are peft's."""
    torch.manual_seed(0)
    model = get_peft_model(
        load_text_model(str(folder)), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".mlp.experts.base_layer.lora_A" in name for name in names) == (targets == ALL)
    passed, printed = verify_at(2, 1, 2, hf_model=str(folder), adapter=str(tmp_path))
    assert passed and "base + adapter, text" in printed, printed
    assert float(printed.splitlines()[-1].split()[-1]) > 0.1


# --- the command line -----------------------------------------------------------------------------


def write_chats(path: Path, number: int) -> str:
    words = toy_language.WORDS
    with path.open("w") as file:
        for index in range(number):
            prompt = " ".join(words[(index + i) % len(words)] for i in range(3))
            row = {
                "messages": toy_language.conversation(prompt),
                "teacher_prompt": f"{prompt}\n{toy_language.answer(prompt, 'reverse')}",
            }
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """A run folder: on-policy and off-policy steps with evaluation at TP 2 EP 2, stopped after two
    of four steps and resumed (`resumed`), and in one go (`whole`).
    """
    root = tmp_path_factory.mktemp("run")
    rows = write_chats(root / "rows.jsonl", 16)
    flags = dict(
        model=folder,
        dataset=rows,
        split_dataset_ratio=0.2,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        lora_rank=2,
        lora_dropout=0.1,
        learning_rate=1e-2,
        lmbda=0.5,
        sft_alpha=0.2,
        max_completion_length=6,
        seed=1,
        **layout_flags(tp=2, ep=2),
    )
    whole = arguments(**flags, output_dir=root / "whole", save_total_limit=9)
    resumed = arguments(
        **flags,
        output_dir=root / "resumed",
        resume_from_checkpoint=root / "whole" / "checkpoint-2",
    )
    run_training(2, whole, resumed)
    return root


def test_run_and_resume(run):
    whole, resumed = (read_lines(run / name / "metrics.jsonl") for name in ("whole", "resumed"))
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert {line["on_policy"] for line in whole} == {True, False}
    assert all(0 < line["grad_norm"] < 1e3 and line["skipped_steps"] == 0 for line in whole)
    assert stable(resumed) == stable(whole)[2:]
    evaluations = read_lines(run / "whole" / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = (run / kind / "checkpoint-4" / name for kind in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes()


def test_peft_loads_what_a_run_saves(folder, run):
    checkpoint = run / "whole" / "checkpoint-4"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert "exclude_modules" not in config and config["target_modules"] == ALL
    names = load_file(checkpoint / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.1.mlp.experts.7.up_proj.lora_B.weight" in names
    _, missing = load_peft(load_text_model(str(folder)), str(checkpoint))
    assert not missing
    passed, printed = verify_at(1, 2, 1, hf_model=str(folder), adapter=str(checkpoint))
    assert passed and "its records: ok" in printed, printed


def test_export_of_a_run(folder, run, tmp_path):
    """Merged by either tool: the same bytes; and at a lower rank: an adapter that peft loads."""
    checkpoint = run / "whole" / "checkpoint-4"
    one, other, low = (tmp_path / name for name in ("one", "other", "low"))
    megatron_to_hf(MegatronToHfConfig(str(checkpoint), str(one), num_workers=1))
    merge_lora(MergeLoraConfig(str(folder), str(other), [str(checkpoint)], num_workers=1))
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) > 1
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert (one / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    changed = load_text_model(str(one)).state_dict()
    base = load_text_model(str(folder)).state_dict()
    assert [name for name in base if torch.equal(base[name], changed[name])]
    assert not torch.equal(
        base["model.layers.0.self_attn.q_proj.weight"],
        changed["model.layers.0.self_attn.q_proj.weight"],
    )
    table = lower(LowerRankConfig(str(folder), str(checkpoint), str(low), lora_rank=1))
    assert "rank 2 -> 1" in table and "of model.layers." in table
    assert not load_peft(load_text_model(str(folder)), str(low))[1]


def test_rows_with_media_are_refused(folder, tmp_path):
    rows = [
        {"messages": toy_language.conversation("red cat sun")},
        {
            "messages": [
                {"role": "user", "content": "<image>what is it?"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": ["cat.png"],
        },
        {"messages": toy_language.conversation("sun red cat"), "teacher_audios": ["cat.wav"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(model=folder, dataset=path, output_dir=tmp_path / "out", max_steps=1)
    error = error_of_run(1, arguments(**flags))
    assert "2 of 3 data rows cannot be used" in error
    for line in (2, 3):
        assert f"rows.jsonl:{line}: the row has audio, images or videos" in error
    assert "Qwen3 MoE reads text alone: take them out of the row, or train a Qwen3-Omni" in error
    error = error_of_run(1, arguments(**flags, lora_towers=True))
    assert "--lora_towers: Qwen3 MoE reads text alone and has no towers; leave it out" in error
