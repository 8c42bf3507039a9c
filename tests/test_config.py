"""Settings: flags, files, checks, the lmbda schedule, the mixture, the parallel layout."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_gkd.config import parse_config, parse_config_or_exit
from megatron_gkd.distillation import DistillConfig
from megatron_gkd.last_words import SECONDS_FOR_RANK_0
from megatron_gkd.layout import ParallelConfig, check_layout

REPOSITORY = Path(__file__).parents[1]
REQUIRED = ["--model", "/m", "--dataset", "d.jsonl"]
GUIDE_COMMAND = """--model /models/omni --teacher_model /models/omni/ --train_type lora
--torch_dtype bfloat16
--dataset AI-ModelScope/alpaca-gpt4-data-zh#2000 --split_dataset_ratio 0.01
--max_length 2048 --max_completion_length 512 --dataloader_num_workers 4 --dataset_num_proc 4
--seq_kd false --lmbda 0.5
--num_train_epochs 1 --per_device_train_batch_size 4 --per_device_eval_batch_size 4
--learning_rate 1e-5
--gradient_accumulation_steps 1 --warmup_ratio 0.05
--deepspeed zero3 --attn_impl flash_attention_2
--output_dir output --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5
--save_only_model true"""
QWEN3_OMNI = {
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_layers": 48,
}


def refused(*flags):
    """The message with which `flags` are refused."""
    with pytest.raises(ValueError) as error:
        parse_config(REQUIRED + list(flags))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_guide_command_parses_with_its_values(capsys):
    config = parse_config(GUIDE_COMMAND.split())
    assert config.model.attn_impl == "flash_attention_2"
    assert config.data.dataset == ["AI-ModelScope/alpaca-gpt4-data-zh#2000"]
    assert (
        config.data.split_dataset_ratio,
        config.data.max_length,
        config.data.dataset_num_proc,
    ) == (0.01, 2048, 4)
    assert (config.distill.seq_kd, config.run.save_only_model) == (False, True)
    assert (config.train.learning_rate, config.train.num_train_epochs) == (1e-5, 1.0)
    answer = "--tensor_, --expert_ and --pipeline_model_parallel_size shard the model"
    assert capsys.readouterr().out == f"--deepspeed has no effect here: {answer}.\n"


def test_defaults_are_the_guides():
    config = parse_config(REQUIRED).to_dict()
    values = {name: value for group in config.values() for name, value in group.items()}
    guide = {
        "attn_impl": "flash",
        "lmbda": "0.5",
        "temperature": 2.0,
        "beta": 0.5,
        "seq_kd": False,
        "sft_alpha": 0.0,
        "lora_dropout": 0.05,
    }
    guide |= {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
    }
    guide |= {
        "learning_rate": 1e-5,
        "warmup_ratio": 0.05,
        "max_length": 2048,
        "max_completion_length": 512,
    }
    guide |= {"rollout_temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    assert {name: values[name] for name in guide} == guide
    # Unset: those of --adapter, or rank 8, alpha 16 and ALL (chosen in train.py).
    assert (values["lora_rank"], values["lora_alpha"], values["lora_target_modules"]) == (
        None,
        None,
        [],
    )
    assert json.loads(json.dumps(config)) == config


def test_each_setting_has_one_owner():
    groups = parse_config(REQUIRED).to_dict().values()
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names)) > 50


def test_recompute_by_need_is_refused_where_memory_is_not_of_tokens():
    message = refused("--recompute", "auto", "--attn_impl", "eager")
    assert "--recompute" in message and "squares of row lengths" in message
    assert parse_config(REQUIRED + ["--recompute", "auto"]).model.recompute == "auto"


@pytest.mark.parametrize("flag", ["--deepspeed", "--teacher_deepspeed"])
def test_deepspeed_flags_are_answered_in_one_line(flag, capsys, monkeypatch):
    parse_config(REQUIRED + [flag, "zero3"])
    output = capsys.readouterr().out
    assert output.startswith(flag + " has no effect") and output.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    parse_config(REQUIRED + [f"{flag}=zero3"])
    assert capsys.readouterr().out == ""


def test_booleans_lists_aliases_and_equals_signs():
    config = parse_config(
        [
            "--model=/m",
            "--dataset",
            "a.jsonl",
            "b#5",
            "--seq_kd",
            "--save_only_model=true",
            "--report_to",
            "tensorboard",
            "wandb",
        ]
        + [
            "--target_modules",
            "q_proj,k_proj",
            "v_proj",
            "--lora-rank",
            "4",
            "--skip_bad_rows",
            "true",
        ]
    )
    assert config.data.dataset == ["a.jsonl", "b#5"] and config.data.skip_bad_rows
    assert config.distill.seq_kd and config.run.save_only_model
    assert config.run.report_to == ["tensorboard", "wandb"]
    assert (
        config.lora.lora_target_modules == ["q_proj", "k_proj", "v_proj"]
        and config.lora.lora_rank == 4
    )
    assert parse_config(
        REQUIRED + ["--lora_target_modules", "all-linear"]
    ).lora.lora_target_modules == ["ALL"]


@pytest.mark.parametrize(
    "flag, nearest",
    [
        ("--learning_rat", "learning_rate"),
        ("--lora-rnk=4", "lora_rank"),
        ("--lora.rank", "lora_rank"),
        ("--lmbda:0.5", "lmbda"),
        ("---lmbda", "lmbda"),
        ("-lmbda", "lmbda"),
        ("--tensor_parallel_size", "tensor_model_parallel_size"),
    ]
    + [
        ("--lambda", "lmbda"),
        ("--learn", "learning_rate"),
        ("--target_module", "target_modules"),
        ("--confg", "config"),
    ],
)
def test_unknown_flag_names_the_nearest(flag, nearest):
    message = refused(flag, "1")
    assert message.startswith(flag.split("=")[0] + " is not") and f"--{nearest} " in message


@pytest.mark.parametrize(
    "flag, nearest", [("--modl", "model"), ("--datasets", "dataset"), ("--lmda", "lmbda")]
)
def test_a_misspelt_flag_comes_before_a_missing_one(flag, nearest):
    with pytest.raises(ValueError, match=f"^{flag} is not a setting; the nearest is --{nearest} "):
        parse_config([f"{flag}=x"])


def test_values_that_begin_with_a_dash():
    assert refused("--seed", "-1").startswith("--seed -1: must be in")  # a value, though a bad one
    assert parse_config(REQUIRED + ["--output_dir=-x"]).run.output_dir == "-x"
    assert parse_config(["--model", "/m", "--dataset", "-a=b c"]).data.dataset == ["-a=b c"]


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--lmbda", "1.5"], ["--lmbda 1.5", "[0, 1]"]),
        (["--lmbda", "100:0.3,0:0.5"], ["--lmbda 100:0.3,0:0.5", "ascend"]),
        (["--lmbda", "0:0.3,0:0.5"], ["ascend"]),
        (["--lmbda", "0:half"], ["0:half"]),
        (["--temperature", "0"], ["--temperature 0.0", "above 0"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--beta", "0"], ["--beta 0.0", "(0, 1)", "forward_kl"]),
        (["--beta", "1.1", "--beta_convention", "paper"], ["--beta 1.1", "[0, 1]"]),
        (["--divergence", "forward_kl", "--beta", "nan"], ["--beta nan", "[0, 1]"]),
        (["--divergence", "kl"], ["--divergence", "'kl'", "forward_kl"]),
        (["--sft_alpha", "-0.1"], ["--sft_alpha -0.1", "[0, 1]"]),
        (["--divergence_clip", "0"], ["--divergence_clip 0", "above 0"]),
        (["--lora_rank", "0"], ["--lora_rank 0", "1 or more"]),
        (["--lora_rank", "4.5"], ["--lora_rank", "4.5"]),
        (["--lora_alpha", "0"], ["--lora_alpha 0.0"]),
        (["--lora_dropout", "1"], ["--lora_dropout 1.0", "[0, 1)"]),
        (["--lora_target_modules", "ALL,q_proj"], ["--lora_target_modules ALL,q_proj"]),
        (["--split_dataset_ratio", "1"], ["--split_dataset_ratio 1.0", "[0, 1)"]),
        (["--max_length", "1"], ["--max_length 1", "2 or more"]),
        (["--dataloader_num_workers", "-1"], ["--dataloader_num_workers -1"]),
        (["--top_p", "0"], ["--top_p 0.0", "(0, 1]"]),
        (["--top_k", "-1"], ["--top_k -1"]),
        (["--repetition_penalty", "0"], ["--repetition_penalty 0.0"]),
        (["--rollout_temperature", "-1"], ["--rollout_temperature -1.0"]),
        (["--rollout_temperature", "1e-7"], ["--rollout_temperature 1e-07", "1e-6 or more"]),
        (["--max_completion_length", "0"], ["--max_completion_length 0"]),
        (["--learning_rate", "inf"], ["--learning_rate inf"]),
        (["--warmup_ratio", "5"], ["--warmup_ratio 5.0", "[0, 1]"]),
        (["--max_grad_norm", "0"], ["--max_grad_norm 0.0"]),
        (["--max_steps", "0"], ["--max_steps 0", "--num_train_epochs"]),
        (["--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps 0"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size 0"]),
        (["--save_steps", "0"], ["--save_steps 0"]),
        (["--max_bad_steps", "0"], ["--max_bad_steps 0"]),
        (["--train_type", "full"], ["--train_type full", "lora"]),
        (["--teacher_model", "/other"], ["--teacher_model /other", "--model /m", "drop"]),
        (["--context_parallel_size", "0"], ["--context_parallel_size 0", "1 or more"]),
        (["--max_tokens_per_micro_batch", "0"], ["--max_tokens_per_micro_batch 0", "1 or more"]),
        (["--tensor_model_parallel_size", "0"], ["--tensor_model_parallel_size 0"]),
        (["--seq_kd", "perhaps"], ["seq_kd", "perhaps"]),
        (["--seed", "1", "loose"], ["'loose'"]),
    ],
)
def test_values_out_of_range_are_refused_with_flag_and_value(flags, parts):
    message = refused(*flags)
    assert all(part in message for part in parts), message


def test_missing_flags_and_the_exit_status(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        parse_config_or_exit(["--dataset", "d"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--model" in said and said.startswith("megatron_gkd: error: ")
    waited = []
    monkeypatch.setattr("megatron_gkd.last_words.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        parse_config_or_exit(["--dataset", "d"])
    assert capsys.readouterr().err == said.replace("error:", "error (rank 3):", 1)
    assert waited == [SECONDS_FOR_RANK_0]


def test_yaml_file_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: /m\ndataset: [a.jsonl, b.jsonl]\nlearning_rate: 2e-5\nlmbda: 0:0.25,10:1\n"
        "seq_kd: true\nadapter: null\n"
        "target_modules: q_proj,v_proj\nsave_only_model: no\nval_dataset: []\n"
    )
    config = parse_config(["--learning_rate", "3e-5", "--config", str(path)])
    assert config.train.learning_rate == 3e-5
    assert config.data.dataset == ["a.jsonl", "b.jsonl"] and config.data.val_dataset == []
    assert config.distill.seq_kd and config.distill.lmbda == "0:0.25,10:1"
    assert config.lora.adapter is None and config.lora.lora_target_modules == ["q_proj", "v_proj"]
    assert not config.run.save_only_model
    assert parse_config(["--config", str(path)]).train.learning_rate == 2e-5


@pytest.mark.parametrize(
    "text, part",
    [
        ("lora_rnk: 4", "lora_rank"),
        ("lora_rank: 0", "--lora_rank 0"),
        ("- a", "list"),
        ("model: {a: b}", "model"),
        ("a: [", "read"),
    ]
    + [("config: other.yaml", "config is not a setting")],
)
def test_yaml_file_is_checked_like_flags(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="(?s)" + part) as error:
        parse_config(REQUIRED + ["--config", str(path)])
    if part != "--lora_rank 0":
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="nowhere.yaml"):
        parse_config(REQUIRED + ["--config", str(tmp_path / "nowhere.yaml")])


def test_lmbda_schedule():
    number, schedule = DistillConfig(lmbda="0.7"), DistillConfig(lmbda="0:0.3,500:0.5,1000:0.7")
    assert [number.lmbda_at(step) for step in (0, 10**6)] == [0.7, 0.7]
    assert [schedule.lmbda_at(step) for step in (0, 499, 500, 999, 1000, 10**6)] == [
        0.3,
        0.3,
        0.5,
        0.5,
        0.7,
        0.7,
    ]


@pytest.mark.parametrize(
    "lmbda, possible", [("0", False), ("0.1", True), ("0:0,5:0", False), ("0:0,500:0.5", True)]
)
def test_runs_that_may_be_on_policy(lmbda, possible):
    assert DistillConfig(lmbda=lmbda).may_be_on_policy == possible


def test_runs_that_may_learn_from_the_datas_responses():
    late = DistillConfig(lmbda="0:1,1000:0")
    assert [late.may_use_data_responses(steps) for steps in (1000, 1001)] == [False, True]
    assert DistillConfig(lmbda="0.9").may_use_data_responses(1)
    assert not DistillConfig(lmbda="1").may_use_data_responses(10**6)
    assert not DistillConfig(lmbda="0", seq_kd=True).may_use_data_responses(10**6)


def test_no_linears_are_not_all_linears():
    for value in ("", ",", " "):
        assert "--lora_target_modules" in refused("--lora_target_modules", value)


@pytest.mark.parametrize(
    "name, ours",
    [
        ("lr", "learning_rate"),
        ("tp", "tensor_model_parallel_size"),
    ],
)
def test_names_of_other_programs(name, ours):
    assert f"the nearest is --{ours} " in refused(f"--{name}", "1")


@pytest.mark.parametrize(
    "settings, divergence, student_weight, words",
    [
        (
            {"beta": 0.3},
            "jsd",
            0.3,
            "M = 0.30 student + 0.70 teacher, JSD = 0.30 KL(student || M) + 0.70 KL(teacher || M)",
        ),
        ({"beta": 0.3, "beta_convention": "paper"}, "jsd", 0.7, "M = 0.70 student + 0.30 teacher"),
        (
            {"beta": 0.0, "beta_convention": "paper"},
            "forward_kl",
            0.5,
            "forward KL = KL(teacher || student)",
        ),
        (
            {"beta": 1.0, "beta_convention": "paper"},
            "reverse_kl",
            0.5,
            "reverse KL = KL(student || teacher)",
        ),
        ({"divergence": "forward_kl"}, "forward_kl", 0.5, "--divergence forward_kl"),
        ({"divergence": "forward_kl", "beta": 0.0}, "forward_kl", 0.5, "--divergence forward_kl"),
        (
            {"divergence": "reverse_kl", "beta_convention": "paper", "beta": 0.0},
            "reverse_kl",
            0.5,
            "KL(student || teacher)",
        ),
    ],
)
def test_loss_divergence(settings, divergence, student_weight, words):
    distill = DistillConfig(**settings)
    assert distill.loss_divergence.kind == divergence
    assert distill.loss_divergence.beta == pytest.approx(student_weight, abs=1e-12)
    assert words in distill.loss_line()


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp, data_parallel_size",
    [
        (8, 8, 1, 8, 1, 1),
        (8, 4, 1, 8, 1, 2),
        (16, 8, 2, 8, 1, 1),
        (1, 1, 1, 1, 1, 1),
        (8, 1, 1, 8, 1, 8),
        (32, 4, 2, 16, 1, 4),
        (8, 2, 2, 1, 1, 2),
        (16, 8, 1, 8, 2, 1),
        (8, 2, 1, 8, 2, 2),
        (4, 1, 1, 4, 4, 1),
        (64, 4, 2, 32, 4, 2),
    ],
)
def test_layouts_of_the_real_model(world_size, tp, pp, ep, cp, data_parallel_size):
    """Experts may lie on ranks that share rows, too."""
    layout = ParallelConfig(tp, pp, ep, cp)
    assert check_layout(world_size, layout, **QWEN3_OMNI) == data_parallel_size


@pytest.mark.parametrize(
    "world_size, sizes, model, numbers",
    [
        (6, (4, 1, 1), {}, ["6 ranks", "4 x", "= 4 ranks"]),
        (8, (2, 1, 1, 3), {}, ["8 ranks", "--context_parallel_size 3 = 6 ranks"]),
        (8, (4, 1, 16), {}, ["expert_model_parallel_size 16", "8 ranks of a pipeline stage"]),
        (8, (2, 2, 8), {}, ["expert_model_parallel_size 8", "4 ranks of a pipeline stage"]),
        (8, (8, 1, 8), {"num_experts": 12}, ["expert_model_parallel_size 8", "12 experts"]),
        (3, (3, 1, 1), {}, ["tensor_model_parallel_size 3", "32 attention heads"]),
        (
            4,
            (4, 1, 1),
            {"num_key_value_heads": 6},
            ["tensor_model_parallel_size 4", "6 key-value heads"],
        ),
        (5, (1, 5, 1), {}, ["pipeline_model_parallel_size 5", "48 layers"]),
    ],
)
def test_impossible_layouts_name_both_numbers(world_size, sizes, model, numbers):
    with pytest.raises(ValueError) as error:
        check_layout(world_size, ParallelConfig(*sizes), **(QWEN3_OMNI | model))
    assert all(number in str(error.value) for number in numbers), error.value
