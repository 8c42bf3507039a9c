"""`python -m megatron_gkd.plan`."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerConfig,
)

from megatron_gkd.plan.__main__ import main

REPOSITORY = Path(__file__).parents[1]


def test_check(tmp_path):
    text = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_hidden_layers": 2,
        "head_dim": 128,
    }
    Qwen3OmniMoeThinkerConfig(text_config=text).save_pretrained(tmp_path)

    def check(*flags):
        command = [
            sys.executable,
            "-m",
            "megatron_gkd.plan",
            "--check",
            "--gpus",
            "4",
            "--model",
            str(tmp_path),
            "--dataset",
            "d",
        ]
        return subprocess.run(command + list(flags), capture_output=True, text=True, cwd=REPOSITORY)

    good = check("--tensor_model_parallel_size", "2", "--expert_model_parallel_size", "4")
    assert good.returncode == 0, good.stderr
    assert (
        "4 ranks = TP 2 x PP 1 x DP 2; EP 4: 2 of 8 experts a rank; 2 of 2 layers a stage; a step "
        "takes 8 samples (4 x 2 data-parallel ranks) in micro-batches of at most 8192 tokens"
        in good.stdout
    )
    assert "Memory: at most about" in good.stdout and "GiB a rank: base" in good.stdout
    shared = check("--context_parallel_size", "2", "--max_tokens_per_micro_batch", "3000")
    assert shared.returncode == 0, shared.stderr
    assert "4 ranks = TP 1 x PP 1 x CP 2 x DP 2;" in shared.stdout
    assert "in micro-batches of at most 3000 tokens" in shared.stdout
    bad = check("--tensor_model_parallel_size", "3")
    assert (
        bad.returncode == 2
        and "4 ranks" in bad.stderr
        and "= 3 ranks" in bad.stderr
        and "Traceback" not in bad.stderr
    )


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "no config.json there"),
        ("{", "config.json: Expecting"),
        ('{"model_type": "llama"}', "model_type 'llama' is not supported"),
        (
            '{"model_type": "qwen3_omni_moe", "thinker_config": [1]}',
            "thinker_config.text_config is missing",
        ),
        (
            '{"model_type": "qwen3_omni_moe_thinker", "text_config": {"num_key_value_heads": 0}}',
            "num_key_value_heads = 0",
        ),
        (
            '{"model_type": "qwen3_omni_moe_thinker", "text_config": {"num_experts": "many"}}',
            "num_experts",
        ),
    ],
)
def test_check_of_a_folder_that_is_no_model(tmp_path, monkeypatch, capsys, content, part):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    monkeypatch.setattr(
        "sys.argv", ["plan", "--check", "--gpus", "1", "--model", str(tmp_path), "--dataset", "d"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said.startswith("megatron_gkd: error: ")
        and str(tmp_path) in said
        and part in said
    )
