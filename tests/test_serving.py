"""What a run leaves is served: vLLM answers from the merged folder as this project's own decoder
does, and its loader binds every matrix of the adapter.

vLLM lives in an environment of its own, which launch/setup_vllm_env.sh makes (minutes, once).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from megatron_gkd.checkpoint import save_checkpoint
from megatron_gkd.model.args import read_model_args
from tests.adapters import ALL, MicroBatch, random_adapter, write_adapter
from tests.lora_runs import FOLDERS, VOCAB_SIZE, build, in_reducer, initialize, run_schedule
from tests.ranks import run_ranks

REPOSITORY = Path(__file__).parents[1]
RANK, ALPHA = 3, 5
PROMPTS = [list(range(40, 64)), [7, 300, 12], [399] * 9]
NEW_TOKENS = 8
# The text model's experts are bound as they are; Qwen3-Omni's only with this flag, since vLLM takes
# its adapters to have fused experts.
LORA_FLAGS = {"text": {}, "4 KV heads": {"enable_mixed_moe_lora_format": True}}
USES_RSLORA = {"text": True, "4 KV heads": False}

pytestmark = [pytest.mark.extended, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def vllm_python():
    """The interpreter that has vLLM, made where it is not there yet."""
    folder = Path(os.environ.get("VLLM_ENV", REPOSITORY / ".vllm"))
    made = subprocess.run(
        ["bash", REPOSITORY / "launch/setup_vllm_env.sh"],
        env=os.environ | {"VLLM_ENV": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no vLLM here: launch/setup_vllm_env.sh: {made.stdout.splitlines()[-1:]}")
    return folder / "bin/python"


@pytest.mark.parametrize("broken", ["interrupted", "without its interpreter"])
def test_a_broken_environment_is_made_whole(broken, tmp_path):
    """As far as that goes without an index, whose absence is said by pip."""
    made = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"]
    subprocess.run(made, check=True)
    if broken != "interrupted":
        python = tmp_path / "env/bin/python"
        python.unlink()
        python.symlink_to(tmp_path / "gone")
    done = subprocess.run(
        ["bash", REPOSITORY / "launch/setup_vllm_env.sh"],
        env=os.environ | {"VLLM_ENV": str(tmp_path / "env"), "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode and not list((tmp_path / "env").glob("*.done"))
    assert "No matching distribution found for" in done.stderr, done.stderr
    pip = [tmp_path / "env/bin/python", "-m", "pip", "--version"]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)


def save(rank, world_size, folder, adapter, output, use_rslora):
    """The folder of a checkpoint, as a run writes it, with the adapter on TP 2."""
    place = initialize(2, 1, 1)
    model_args, model = build(place, folder, adapter)
    saved = save_checkpoint(
        output,
        1,
        model=model,
        model_args=model_args,
        parallel=place,
        alpha=ALPHA,
        use_rslora=use_rslora,
        dropout=0.0,
        base_model=folder,
        optimizer=None,
        state={},
    )
    return str(saved)


@pytest.fixture(scope="module", params=list(LORA_FLAGS))
def trained(request, tiny_folder, tmp_path_factory):
    """(name, base folder, a checkpoint's adapter folder, its tensors, merged folder)."""
    root = tmp_path_factory.mktemp("trained")
    # the whole model: vLLM knows no folder of a thinker alone
    base = tiny_folder(**FOLDERS[request.param] | {"head_dim": 32})  # the least of its CPU kernels
    tensors = random_adapter(read_model_args(base), RANK, ALL)
    settings = dict(rank=RANK, alpha=ALPHA, targets=ALL, use_rslora=USES_RSLORA[request.param])
    given = write_adapter(root / "given", tensors, **settings)
    adapter, _ = run_ranks(save, 2, base, given, str(root), settings["use_rslora"])
    merged = str(root / "merged")
    merge_lora(MergeLoraConfig(hf_model=base, adapter=[adapter], output=merged))
    return request.param, base, adapter, tensors, merged


def run_job(python, tmp_path, output, **job):
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("vllm_job.py")
    # nothing of this project's environment
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    command = [python, script, tmp_path / "job.json", tmp_path / output]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return tmp_path / output


def log_probabilities(rank, world_size, folder, adapter, rows):
    """[tokens, V] of each row: of the base with the adapter, on TP 2."""
    place = initialize(2, 1, 1)
    _, model = build(place, folder, adapter)
    model.eval()
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    batch = MicroBatch(ids, torch.tensor([len(row) for row in rows]))
    (logits,) = run_schedule(place, in_reducer(model), [batch], backward=False)
    return [
        logits[row, : len(ids), :VOCAB_SIZE].double().log_softmax(-1)
        for row, ids in enumerate(rows)
    ]


def test_the_merged_folder_answers_as_the_student(trained, vllm_python, tmp_path):
    """Greedy tokens and their log-probabilities, of vLLM from the merged weights and of the decoder
    here with the LoRA beside the base.
    """
    _, base, adapter, _, merged = trained
    output = run_job(
        vllm_python,
        tmp_path,
        "answers.json",
        model=merged,
        prompts=PROMPTS,
        max_tokens=NEW_TOKENS,
    )
    answers = json.loads(output.read_text())
    rows = [prompt + answer["token_ids"] for prompt, answer in zip(PROMPTS, answers)]
    ours, _ = run_ranks(log_probabilities, 2, base, adapter, rows)
    for prompt, answer, found in zip(PROMPTS, answers, ours):
        assert len(answer["token_ids"]) == NEW_TOKENS
        best = found[len(prompt) - 1 : -1].max(-1)
        assert best.indices.tolist() == answer["token_ids"]
        theirs = torch.tensor(answer["log_probabilities"], dtype=torch.float64)
        torch.testing.assert_close(theirs, best.values, atol=1e-4, rtol=0)


def test_vllm_binds_every_matrix_of_the_adapter(trained, vllm_python, tmp_path):
    name, base, adapter, tensors, _ = trained
    output = run_job(
        vllm_python,
        tmp_path,
        "bound.safetensors",
        model=base,
        adapter=adapter,
        lora_flags=LORA_FLAGS[name],
    )
    scale = ALPHA / (RANK**0.5 if USES_RSLORA[name] else RANK)
    bound, used = load_file(output), set()
    for key, found in bound.items():
        layer, attribute, index = key.rsplit(".", 2)
        expected = expected_at(layer, attribute, int(index), tensors, scale, used)
        if expected is None:
            assert not found.any(), f"{key} holds something, and the adapter has nothing for it"
            continue
        padded = torch.zeros_like(found)
        padded[tuple(slice(size) for size in expected.shape)] = expected
        torch.testing.assert_close(found, padded, msg=lambda text: f"{key}: {text}")
    assert used == set(tensors), "vLLM has no place for these"


PARTS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "o_proj": ["o_proj"],
    "w13": ["gate_proj", "up_proj"],
    "w2": ["down_proj"],
}


def expected_at(layer, attribute, index, tensors, scale, used):
    """What belongs into a matrix of vLLM's, or None: [1, r, in] of lora_a, [1, out, r] of lora_b;
    of the experts [E, ...]. Adds the names of the adapter's tensors to `used`.
    """
    stem, _, last = layer.partition(".layers.")[2].rpartition(".")
    part = attribute.split("_")[0] if last == "experts" else last
    if not stem or part not in PARTS:
        return None
    is_b, linear = "_b_" in attribute, PARTS[part][index]
    letter = "B" if is_b else "A"
    names = [
        name
        for name in tensors
        if f".layers.{stem}." in name and name.endswith(f".{linear}.lora_{letter}.weight")
    ]
    if last == "experts":
        names.sort(key=lambda name: int(name.split(".experts.")[1].split(".")[0]))
    used.update(names)
    found = torch.stack([tensors[name] for name in names])
    return found * scale if is_b else found
