"""`verify`: equal models pass at any layout, every mutation of a checkpoint or an adapter is caught and named."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from checkpoint_tools.merge_lora import MergeLoraConfig
from checkpoint_tools.merge_lora import convert as merge_lora
from checkpoint_tools.verify import VerifyConfig, verify, verify_tensors
from megatron_gkd.model.byte_range import memory
from megatron_gkd.model.config import read_model_shape
from megatron_gkd.model.torch_dist import TorchDist
from megatron_gkd.parallel import parallel_state
from tests.adapters import ALL, random_adapter, write_adapter
from tests.ranks import run_ranks

SMALL = dict(
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    vocab_size=503,
)
MOE, ATTENTION = "decoder.layers.mlp.experts.experts.", "decoder.layers.self_attention."


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return Path(tiny_folder(**SMALL))


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("verify") / "checkpoint"
    hf_to_megatron(HfToMegatronConfig(str(folder), str(output), num_workers=1))
    return output


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    tensors = random_adapter(read_model_shape(folder), 4, ALL)
    return write_adapter(tmp_path_factory.mktemp("verify") / "adapter", tensors, rank=4, alpha=6, targets=ALL)


def run_verify(rank, world_size, configs):
    """-> (passed, what was printed) of each, on one set of ranks."""
    results = []
    for config in configs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            passed = verify(config)
        parallel_state.destroy_model_parallel()
        results.append((passed, printed.getvalue()))
    return results


@pytest.mark.parametrize("world_size, tp, pp, ep", [(1, 1, 1, 1), (4, 2, 2, 2)], ids=["one rank", "TP2 PP2 EP2"])
def test_equal_models_pass(folder, checkpoint, adapter, world_size, tp, pp, ep):
    config = VerifyConfig(
        str(folder),
        checkpoint=str(checkpoint),
        adapter=adapter,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        device="cpu",
    )
    results = run_ranks(run_verify, world_size, [config])
    assert all(passed for [(passed, _)] in results)
    lines = results[0][0][1].splitlines()
    assert [line.split("  ")[1] for line in lines if line.endswith("ok") and line.startswith("  ")] == [
        "base, text",
        "base, audio",
        "base, image",
        "base + adapter, text",
        "adapter off, text",
    ]
    assert "tensors, bit by bit: ok" in lines[0] and "adapter, its records: ok" in lines[1]
    moved = float(lines[-1].split()[-1])
    assert moved > 0.1


# --- mutations -------------------------------------------------------------------------------------------------------


def rewrite(checkpoint, key, index, change):
    """Change one matrix (or vector) of a checkpoint where it lies in its files."""
    stored = TorchDist(checkpoint / "release")
    values = change(stored.read(key, index, slice(None)).clone())
    for chunk in stored._chunks_at(key, index):
        first, num_rows = chunk.offsets[len(index)], chunk.sizes[len(index)]
        with open(stored.folder / chunk.file, "r+b") as file:
            os.pwrite(file.fileno(), memory(values[first : first + num_rows].contiguous()), stored._payload(key, chunk))


def swap_experts(checkpoint):
    for name in ("linear_fc1.weight", "linear_fc2.weight"):
        stored = TorchDist(checkpoint / "release")
        first, second = (stored.read(MOE + name, (1, expert), slice(None)) for expert in (0, 3))
        rewrite(checkpoint, MOE + name, (1, 0), lambda _, other=second: other)
        rewrite(checkpoint, MOE + name, (1, 3), lambda _, other=first: other)


def swap_query_and_key(checkpoint):
    """The group's first query head and its key: rows 0:8 and 16:24."""
    rewrite(checkpoint, f"{ATTENTION}linear_qkv.weight", (2,), lambda w: torch.cat([w[16:24], w[8:16], w[:8], w[24:]]))


def swap_gate_and_up(checkpoint):
    rewrite(checkpoint, f"{MOE}linear_fc1.weight", (0, 2), lambda w: torch.cat([w[16:], w[:16]]))


def shift_norm(checkpoint):
    rewrite(checkpoint, "decoder.layers.pre_mlp_layernorm.weight", (1,), lambda w: w + 1e-3)


def flip_one_bit(checkpoint):
    def flip(weight):
        weight.view(torch.int32)[5, 7] ^= 1
        return weight

    rewrite(checkpoint, f"{ATTENTION}linear_proj.weight", (0,), flip)


def shift_padded_rows(checkpoint):
    rewrite(checkpoint, "output_layer.weight", (), lambda w: w.roll(1, dims=0))


def fill_padding(checkpoint):
    rewrite(checkpoint, "embedding.word_embeddings.weight", (), lambda w: torch.cat([w[:503], w[503:] + 1]))


MUTATIONS = {
    swap_experts: (
        ["layers.1.mlp.experts.0.gate_proj.weight: differs", "layers.1.mlp.experts.3.down_proj"],
        "first at layer 1:",
    ),
    swap_query_and_key: (
        ["layers.2.self_attn.q_proj.weight: differs from row 0", "2.self_attn.k_proj"],
        "first at layer 2:",
    ),
    swap_gate_and_up: (["layers.0.mlp.experts.2.gate_proj", "layers.0.mlp.experts.2.up_proj"], "first at layer 0:"),
    shift_norm: (
        ["layers.1.post_attention_layernorm.weight: differs from row 0 on, there by up to 1.0e-03"],
        "first at layer 1:",
    ),
    flip_one_bit: (["layers.0.self_attn.o_proj.weight: differs from row 5"], None),
    shift_padded_rows: (["lm_head.weight: differs from row 0"], "all layers agree: the final norm or the lm_head"),
    fill_padding: (["embedding.word_embeddings.weight: the rows from 503 on, which pad the vocabulary"], None),
}


@pytest.fixture(scope="module")
def mutated(folder, checkpoint, tmp_path_factory):
    """mutation -> (passed, printed), all of them verified by one process."""
    root, configs = tmp_path_factory.mktemp("mutated"), []
    for mutate in MUTATIONS:
        copy = shutil.copytree(checkpoint, root / mutate.__name__)
        mutate(copy)
        configs.append(VerifyConfig(str(folder), checkpoint=str(copy), device="cpu"))
    return dict(zip(MUTATIONS, run_ranks(run_verify, 1, configs)[0]))


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mutations_are_caught(mutated, mutate):
    """By the tensor that differs, and where it changes what is computed, by the first layer that parts."""
    passed, printed = mutated[mutate]
    names, layer = MUTATIONS[mutate]
    assert not passed
    assert all(name in printed for name in names), printed
    if layer:
        text_line = next(line for line in printed.splitlines() if line.startswith("  base, text"))
        assert "DIFFERS" in text_line and layer in text_line


def test_a_dropped_layer_is_caught(folder, tmp_path, capsys):
    """A checkpoint of the same model with one layer less."""
    short = Path(shutil.copytree(folder, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 3
    (short / "config.json").write_text(json.dumps(config))
    tensors = load_file(short / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("thinker.model.layers.3.")}
    save_file(kept, short / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatronConfig(str(short), str(tmp_path / "checkpoint"), num_workers=1))
    config = VerifyConfig(str(folder), checkpoint=str(tmp_path / "checkpoint"), device="cpu")
    assert not verify_tensors(config)
    assert "has shape [3, 32], config.json asks for [4, 32]" in capsys.readouterr().out
    [[(passed, printed)]] = run_ranks(run_verify, 1, [config])
    assert not passed and "the logits cannot be compared" in printed
    config.quick = True
    assert not verify_tensors(config)
    assert "layers.3." in capsys.readouterr().out


def test_a_wrong_alpha_is_caught(folder, adapter, tmp_path, capsys):
    """By the merged folder, by the manifest of an exported adapter, by what the training run wrote down."""
    merge_lora(MergeLoraConfig(str(folder), str(tmp_path / "merged"), [adapter], num_workers=1))
    wrong = Path(shutil.copytree(adapter, tmp_path / "wrong"))
    change_alpha(wrong, 7)
    for name, passes in ((adapter, True), (str(wrong), False)):
        assert verify_tensors(VerifyConfig(str(folder), adapter=name, merged=str(tmp_path / "merged"))) is passes
    assert "self_attn.q_proj.weight: differs" in capsys.readouterr().out

    run = Path(shutil.copytree(adapter, tmp_path / "checkpoint-1"))
    (run / "trainer_state.json").write_text(json.dumps({"lora": {"rank": 4, "alpha": 6.0}}))
    megatron_to_hf(MegatronToHfConfig(str(run), str(tmp_path / "exported"), export="adapter"))
    for path, message in (
        (run, "lora_alpha is 7, the run trained with 6.0"),
        (tmp_path / "exported", "not the file that"),
    ):
        assert verify_tensors(VerifyConfig(str(folder), adapter=str(path)))
        change_alpha(path, 7)
        assert not verify_tensors(VerifyConfig(str(folder), adapter=str(path)))
        assert message in capsys.readouterr().out
    with pytest.raises(ValueError, match="--merged is compared with --hf_model and --adapter"):
        verify(VerifyConfig(str(folder), merged=str(tmp_path / "merged")))


def change_alpha(folder, alpha):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))


def test_quick_compares_manifests(folder, checkpoint, tmp_path, capsys):
    """Passes without reading a tensor; a changed manifest or file is named."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = VerifyConfig(str(folder), checkpoint=str(copy), quick=True)
    assert verify_tensors(config)
    manifest = json.loads((copy / "conversion_manifest.json").read_text())
    manifest["tensors"]["thinker.model.norm.weight"]["shape"] = [31]
    manifest["files"]["config.json"]["sha256"] = "0"
    (copy / "conversion_manifest.json").write_text(json.dumps(manifest))
    assert not verify_tensors(config)
    printed = capsys.readouterr().out
    assert "thinker.model.norm.weight: differs in shape" in printed and "config.json: not the file" in printed
    (copy / "conversion_manifest.json").unlink()
    assert not verify_tensors(config)
    assert "--quick compares manifests, leave it out" in capsys.readouterr().out
