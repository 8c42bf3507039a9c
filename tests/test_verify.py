"""`verify`: equal models pass at any layout, every mutation of a checkpoint or an adapter is caught
and named.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
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
from checkpoint_tools.verify import VerifyConfig, folders_of, verify
from megatron_gkd.families import family_of
from megatron_gkd.formats.block_digests import DIGESTS
from megatron_gkd.formats.stored_tensor import memory
from megatron_gkd.formats.torch_dist import TorchDist
from megatron_gkd.lora.peft_writer import save_tensors
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.tensor_slice import TensorSlice
from megatron_gkd.parallel import parallel_state
from megatron_gkd.verify.tensors import report_tensors
from tests.adapters import ALL, random_adapter, write_adapter
from tests.ranks import run_ranks
from tests.sizes import SMALLEST

SMALL = SMALLEST | dict(num_hidden_layers=4)
MOE, ATTENTION = "decoder.layers.mlp.experts.experts.", "decoder.layers.self_attention."


def verify_tensors(config):
    return report_tensors(folders_of(config), config.tensor_tolerance, config.quick)


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
    tensors = random_adapter(read_model_args(folder), 4, ALL)
    return write_adapter(
        tmp_path_factory.mktemp("verify") / "adapter", tensors, rank=4, alpha=6, targets=ALL
    )


@pytest.fixture(scope="module")
def merged(folder, adapter, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("verify") / "merged")
    merge_lora(MergeLoraConfig(str(folder), output, [adapter], num_workers=1))
    return output


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


@pytest.mark.parametrize(
    "world_size, tp, pp, ep", [(1, 1, 1, 1), (4, 2, 2, 2)], ids=["one rank", "TP2 PP2 EP2"]
)
def test_equal_models_pass(folder, checkpoint, adapter, merged, world_size, tp, pp, ep):
    config = VerifyConfig(
        str(folder),
        checkpoint=str(checkpoint),
        adapter=adapter,
        merged=merged,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        device="cpu",
    )
    results = run_ranks(run_verify, world_size, [config])
    assert all(passed for [(passed, _)] in results)
    lines = results[0][0][1].splitlines()
    assert [
        line.split("  ")[1] for line in lines if line.endswith("ok") and line.startswith("  ")
    ] == [
        f"{model}, {row}"
        for model in ("base", "adapter off", "base + adapter", "merged")
        for row in ("text", "audio", "image")
    ]
    assert "tensors, bit by bit: ok" in lines[0]
    kinds = {line.split()[0]: line for line in lines if "tensors, largest difference" in line}
    assert {
        "self_attn.q_proj",
        "mlp.experts.up_proj",
        "mlp.gate",
        "embed_tokens",
        "norm",
        "lm_head",
    } < kinds.keys()
    assert {"talker", "code2wav", "visual", "audio_tower"} < kinds.keys()
    assert kinds["mlp.experts.up_proj"].endswith("16 tensors, largest difference 0.0e+00")
    assert any("adapter, its records: no records to compare with" in line for line in lines)
    adapter_moves, merge_moves = (float(line.split()[-1]) for line in lines[-2:])
    assert adapter_moves > 0.1 and merge_moves < 1e-4


# --- mutations ------------------------------------------------------------------------------------


def rewrite(checkpoint, key, index, change):
    """Change one matrix (or vector) of a checkpoint where it lies in its files, as a converter that
    was wrong: without digests that tell.
    """
    (checkpoint / "release" / DIGESTS).unlink(missing_ok=True)
    stored = TorchDist(checkpoint / "release")
    values = change(stored.read(TensorSlice(key, (*index, slice(None)))).clone())
    for chunk in stored._chunks_at(key, index):
        first, num_rows = chunk.offsets[len(index)], chunk.sizes[len(index)]
        with open(stored.folder / chunk.file, "r+b") as file:
            os.pwrite(
                file.fileno(),
                memory(values[first : first + num_rows].contiguous()),
                stored._payload(key, chunk),
            )


def swap_experts(checkpoint):
    for name in ("linear_fc1.weight", "linear_fc2.weight"):
        stored = TorchDist(checkpoint / "release")
        first, second = (
            stored.read(TensorSlice(MOE + name, (1, expert, slice(None)))) for expert in (0, 3)
        )
        rewrite(checkpoint, MOE + name, (1, 0), lambda _, other=second: other)
        rewrite(checkpoint, MOE + name, (1, 3), lambda _, other=first: other)


def swap_query_and_key(checkpoint):
    """The group's first query head and its key: rows 0:8 and 16:24."""
    rewrite(
        checkpoint,
        f"{ATTENTION}linear_qkv.weight",
        (2,),
        lambda w: torch.cat([w[16:24], w[8:16], w[:8], w[24:]]),
    )


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


def shift_tower(checkpoint):
    rewrite(checkpoint, "huggingface.thinker.visual.merger.ln_q.weight", (), lambda w: w + 1e-3)


def fill_padding(checkpoint):
    rewrite(
        checkpoint,
        "embedding.word_embeddings.weight",
        (),
        lambda w: torch.cat([w[:503], w[503:] + 1]),
    )


MUTATIONS = {
    swap_experts: (
        ["layers.1.mlp.experts.0.gate_proj.weight: differs", "layers.1.mlp.experts.3.down_proj"],
        "first at layer 1:",
    ),
    swap_query_and_key: (
        ["layers.2.self_attn.q_proj.weight: differs from row 0", "2.self_attn.k_proj"],
        "first at layer 2:",
    ),
    swap_gate_and_up: (
        ["layers.0.mlp.experts.2.gate_proj", "layers.0.mlp.experts.2.up_proj"],
        "first at layer 0:",
    ),
    shift_norm: (
        ["layers.1.post_attention_layernorm.weight: differs from row 0 on, by up to 1.0e-03"],
        "first at layer 1:",
    ),
    flip_one_bit: (["layers.0.self_attn.o_proj.weight: differs from row 5"], None),
    shift_padded_rows: (
        ["lm_head.weight: differs from row 0"],
        "all layers agree: the final norm or the lm_head",
    ),
    shift_tower: (
        ["thinker.visual.merger.ln_q.weight: differs from row 0"],
        "first at the embedding or a tower:",
    ),
    fill_padding: (
        ["embedding.word_embeddings.weight: the rows from 503 on, which pad the vocabulary"],
        None,
    ),
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
    """By the tensor that differs, and where it changes what is computed, by the first layer that
    parts.
    """
    passed, printed = mutated[mutate]
    names, layer = MUTATIONS[mutate]
    assert not passed
    assert all(name in printed for name in names), printed
    if layer:
        row = "image" if mutate is shift_tower else "text"
        line = next(line for line in printed.splitlines() if line.startswith(f"  base, {row}"))
        assert "DIFFERS" in line and layer in line


def test_a_dropped_layer_is_caught(folder, tmp_path, capsys):
    """A checkpoint of the same model with one layer less."""
    short = Path(shutil.copytree(folder, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 3
    (short / "config.json").write_text(json.dumps(config))
    tensors = load_file(short / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("thinker.model.layers.3.")
    }
    save_file(kept, short / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatronConfig(str(short), str(tmp_path / "checkpoint"), num_workers=1))
    config = VerifyConfig(str(folder), checkpoint=str(tmp_path / "checkpoint"), device="cpu")
    assert not verify_tensors(config)
    assert "num_hidden_layers is 4, which asks for 4 rows in tensor" in capsys.readouterr().out
    [[(passed, printed)]] = run_ranks(run_verify, 1, [config])
    assert not passed and "the logits cannot be compared" in printed
    config.quick = True
    assert not verify_tensors(config)
    assert "layers.3." in capsys.readouterr().out


def test_a_wrong_alpha_is_caught(folder, adapter, merged, tmp_path, capsys):
    """By the merged folder; by what was written down when the weights were: beside a training run's
    checkpoint, in the file of the weights (all that --save_only_model leaves), in the manifest of
    an exported adapter.
    """
    wrong = Path(shutil.copytree(adapter, tmp_path / "wrong"))
    change_config(wrong, lora_alpha=7)
    for name, passes in ((adapter, True), (str(wrong), False)):
        assert verify_tensors(VerifyConfig(str(folder), adapter=name, merged=merged)) is passes
    printed = capsys.readouterr().out
    assert "self_attn.q_proj.weight: differs" in printed and "no records to compare with" in printed

    run = Path(shutil.copytree(adapter, tmp_path / "checkpoint-1"))
    (run / "trainer_state.json").write_text(
        json.dumps({"lora": {"rank": 4, "alpha": 6.0, "targets": ALL}})
    )
    only_model = Path(shutil.copytree(adapter, tmp_path / "checkpoint-2"))
    tensors = {
        name: t.clone() for name, t in load_file(only_model / "adapter_model.safetensors").items()
    }
    family = family_of("qwen3_omni_moe")
    save_tensors(tensors, only_model, family, rank=4, alpha=6.0, targets=ALL)
    megatron_to_hf(MegatronToHfConfig(adapter, str(tmp_path / "exported"), export="adapter"))
    for path, message in (
        (run, "lora_alpha is 7, trained with 6.0 (trainer_state.json)"),
        (only_model, "lora_alpha is 7, trained with 6.0 (adapter_model.safetensors)"),
        (tmp_path / "exported", "not the file that"),
    ):
        assert verify_tensors(VerifyConfig(str(folder), adapter=str(path)))
        change_config(path, lora_alpha=7)
        assert not verify_tensors(VerifyConfig(str(folder), adapter=str(path), quick=True))
        assert message in capsys.readouterr().out
    change_config(only_model, lora_alpha=6, r=8, target_modules=["q_proj"])
    assert not verify_tensors(VerifyConfig(str(folder), adapter=str(only_model)))
    printed = capsys.readouterr().out
    assert (
        "r is 8, trained with 4" in printed
        and "targets is ['q_proj'], trained with ['q_proj', 'k_proj'" in printed
    )


def change_config(folder, **settings):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))


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
    assert (
        "thinker.model.norm.weight: differs in shape" in printed
        and "config.json: not the file" in printed
    )
    (copy / "conversion_manifest.json").unlink()
    assert not verify_tensors(config)
    assert "--quick compares manifests, leave it out" in capsys.readouterr().out


def test_quick_looks_at_the_checkpoints_files(folder, checkpoint, tmp_path, capsys):
    """They must be there, the tensors' in their sizes."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = VerifyConfig(str(folder), checkpoint=str(copy), quick=True)
    (copy / "tokenizer.json").unlink()
    assert not verify_tensors(config)
    assert "copy/tokenizer.json: missing" in capsys.readouterr().out
    chunks = copy / "release" / "__0_0.distcp"
    chunks.write_bytes(chunks.read_bytes()[:-1000])
    assert not verify_tensors(config)
    assert "__0_0.distcp: truncated" in capsys.readouterr().out
    chunks.unlink()
    assert not verify_tensors(config)
    assert "__0_0.distcp is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(merged="DIR"), "--merged is compared with --hf_model and --adapter"),
        (dict(quick=True), "--quick: there is nothing to compare"),
        (
            dict(quick=True, adapter="DIR", merged="DIR"),
            "--merged needs the tensors, and --quick reads none",
        ),
        (
            dict(quick=True, checkpoint="DIR", tensor_tolerance=1e-3),
            "--tensor_tolerance needs the tensors",
        ),
        (dict(tensor_tolerance=-1.0), "--tensor_tolerance -1.0: must be 0 or more"),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        VerifyConfig("DIR", **flags)


def test_quick_with_nothing_but_an_adapter_without_records(folder, adapter):
    with pytest.raises(
        ValueError, match="--quick: there is nothing to compare, the adapter has no records"
    ):
        verify(VerifyConfig(str(folder), adapter=adapter, quick=True))


def test_values_to_a_tolerance(folder, tmp_path, capsys):
    """A bf16 copy of an fp32 model passes to a tolerance, with the largest difference of every
    kind; bit by bit not.
    """
    copy = Path(shutil.copytree(folder, tmp_path / "bf16"))
    tensors = load_file(copy / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, copy / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(HfToMegatronConfig(str(copy), str(tmp_path / "checkpoint"), num_workers=1))
    largest = max(
        (rounded[name].float() - tensor).abs().max().item() for name, tensor in tensors.items()
    )
    config = VerifyConfig(
        str(folder), checkpoint=str(tmp_path / "checkpoint"), tensor_tolerance=largest
    )
    assert verify_tensors(config)
    printed = capsys.readouterr().out
    assert f"tensors, to {largest:g}: ok" in printed
    head = (
        (rounded["thinker.lm_head.weight"].float() - tensors["thinker.lm_head.weight"])
        .abs()
        .max()
        .item()
    )
    assert any(
        line.split() == ["lm_head", "1", *f"tensors, largest difference {head:.1e}".split()]
        for line in printed.splitlines()
    )
    config.tensor_tolerance = 0.9 * largest
    assert not verify_tensors(config)
    assert f"on, by up to {largest:.1e}" in capsys.readouterr().out
    config.tensor_tolerance = 0.0
    assert not verify_tensors(config)
    assert ": BF16 [24], expected F32 [24]" in capsys.readouterr().out


def test_a_nan_passes_no_tolerance(folder, checkpoint, tmp_path, capsys):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    rewrite(
        copy,
        "decoder.final_layernorm.weight",
        (),
        lambda w: w.index_fill(0, torch.tensor([5]), float("nan")),
    )
    assert not verify_tensors(VerifyConfig(str(folder), checkpoint=str(copy), tensor_tolerance=1e9))
    assert (
        "thinker.model.norm.weight: differs from row 5 on, by up to inf" in capsys.readouterr().out
    )


def test_the_command_line(folder, checkpoint, tmp_path):
    """Without torchrun, as the documents print it: exit status 0, and 1 on a mutation."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    swap_gate_and_up(copy)
    command = [sys.executable, "-m", "checkpoint_tools.verify", "--hf_model", str(folder)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    runs = {
        flags: subprocess.Popen(
            [*command, *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags in (("--checkpoint", str(checkpoint)), ("--checkpoint", str(copy)))
    }
    (equal, _), (mutated, _) = (run.communicate() for run in runs.values())
    assert [run.returncode for run in runs.values()] == [0, 1]
    assert "base, image " in equal and "DIFFER" not in equal
    assert "first at layer 0:" in mutated
