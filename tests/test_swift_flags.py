"""ms-swift's flags: accepted where they ask for nothing else, else answered all at once."""

import re

import pytest

from megatron_gkd.config import Config, parse_config
from megatron_gkd.flags import Parser
from megatron_gkd.swift_flags import SWIFT_FLAGS

REQUIRED = "--model /m --dataset d.jsonl"
# The command of ms-swift's own example of GKD, with what people add to it.
COMMAND = """--rlhf_type gkd --model /m --teacher_model /m --tuner_type lora --dataset d.jsonl
--use_hf true --torch_dtype bfloat16 --attn_impl flash_attn --bf16 true --padding_free true
--packing --load_from_cache_file true --dataset_shuffle true --save_strategy steps
--eval_strategy steps
--use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.5 --sleep_level 1
--deepspeed zero3 --teacher_deepspeed zero3_offload --freeze_vit true --freeze_aligner true
--system kind --lora_rank 8 --warmup_ratio 0.05 --logging_steps 5 --template qwen3_omni"""


def refused(command):
    with pytest.raises(ValueError) as error:
        parse_config(command.split())
    return str(error.value)


def test_a_command_of_swift_is_accepted(capsys, monkeypatch):
    config = parse_config(COMMAND.split())
    assert (config.model.attn_impl, config.model.train_type) == ("flash_attn", "lora")
    assert config.data.system == "kind"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and all(" has no effect here: " in line for line in lines)
    monkeypatch.setenv("RANK", "3")
    parse_config(COMMAND.split())
    assert capsys.readouterr().out == ""


def test_a_command_of_megatron_swift_is_answered():
    """Its example of this distillation: what shards, fuses and loads asks for nothing here."""
    command = (
        "--rlhf_type gkd --model /m --teacher_model /m --tuner_type lora --dataset d.jsonl "
        "--sequence_parallel true --attention_backend flash --finetune --overlap_grad_reduce true "
        "--gradient_accumulation_fusion false --moe_router_dtype fp32 --dataloader_drop_last true "
        "--use_precision_aware_optimizer --mtp_num_layers 0 --eval_iters -1"
    )
    parse_config(command.split())
    others = "--micro_batch_size 2 --lr 5e-6 --no_load_optim --fp8_recipe delayed --max_turns 2"
    lines = refused(f"{command} {others}").splitlines()
    assert len(lines) == 6 and sum(" is ms-swift's; here: " in line for line in lines) == 4
    assert "--lr is not a setting; the nearest is --learning_rate" in lines[-1]


def test_what_has_another_name_is_answered_at_once(tmp_path):
    flags = (
        "--gradient_checkpointing true --max_new_tokens=512 --lerning_rate 1 --fp16 --rlhf_typ 3"
    )
    lines = refused(f"{REQUIRED} {flags} --packing true").splitlines()
    assert lines[0] == "5 flags cannot be used:" and len(lines) == 6
    assert lines[1] == (
        "  --gradient_checkpointing true is ms-swift's; here: --recompute full, or auto"
    )
    assert "--max_completion_length" in lines[2] and "--fp16 is ms-swift's" in lines[3]
    assert lines[4].startswith("  --lerning_rate is not a setting; the nearest is --learning_rate")
    assert lines[5] == "  --rlhf_typ is not a setting (--help lists all of them)"
    # the same from a file of settings
    path = tmp_path / "run.yaml"
    path.write_text("model: /m\ndataset: [d.jsonl]\ngradient_checkpointing: true\npacking: true\n")
    assert refused(f"--config {path}") == lines[1].strip()


def test_values_that_ask_for_something_else_are_refused(capsys):
    for flag in ("--rlhf_type dpo", "--dataset_shuffle false", "--freeze_vit false"):
        assert refused(f"{REQUIRED} {flag}").startswith(f"{flag} is ms-swift's; here: ")
    assert "must be lora" in refused(f"{REQUIRED} --tuner_type full")
    parse_config(f"{REQUIRED} --fp16 false --gradient_checkpointing False".split())
    assert capsys.readouterr().out.count("has no effect here") == 2


def test_a_flag_like_nothing_gets_no_suggestion():
    assert refused(f"{REQUIRED} --xyzzy 1") == (
        "--xyzzy is not a setting (--help lists all of them)"
    )


def test_the_answers_name_flags_that_exist():
    parser = Parser([group.type for group in Config.__dataclass_fields__.values()])
    known = set(parser._option_string_actions)
    for name, answer in SWIFT_FLAGS.items():
        assert f"--{name}" not in known, name  # a setting: it must not be in the table
        named = re.findall(r"--[a-z_0-9]+(?!\w)", answer.instead)
        assert all(flag in known or flag.endswith("_") for flag in named), (name, named)
