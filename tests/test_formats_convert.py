"""Hugging Face <-> Megatron: byte-exact round trips at any layout; megatron-core and training read
the result.
"""

import filecmp
import pickle
import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_gkd import parallel
from megatron_gkd.formats.loading import load_weights
from megatron_gkd.formats.manifest import MANIFEST, read_manifest
from megatron_gkd.formats.megatron_folder import MegatronFolder
from megatron_gkd.formats.stored_tensor import SAFETENSORS_DTYPES, read_block
from megatron_gkd.formats.torch_dist import TorchDist, _elements
from megatron_gkd.formats.torch_dist_writer import write_chunk
from megatron_gkd.formats.weight_map import checkpoint_tensors
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.model.tensor_slice import TensorSlice
from megatron_gkd.model.transformer_config import DTYPES
from tests import mcore_model
from tests.conversions import SMALL, TIED, WHOLE, to_hf, to_megatron
from tests.ranks import run_ranks
from tests.train_runs import (
    arguments,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    stable,
    write_rows,
)


def assert_same_folder(folder, back):
    """The same files with the same bytes; only the manifest is added."""
    names, found = (
        {str(p.relative_to(f)) for p in Path(f).rglob("*") if p.is_file()} for f in (folder, back)
    )
    assert found - names == {MANIFEST} and not names - found
    assert [
        name
        for name in names
        if not filecmp.cmp(Path(folder) / name, Path(back) / name, shallow=False)
    ] == []


@pytest.mark.parametrize(
    "sizes, tp",
    [
        pytest.param(dict(WHOLE, max_shard_size="5GB"), 1, id="bf16, whole, one file"),
        pytest.param(
            dict(SMALL, max_shard_size="200KB", tie_word_embeddings=True),
            8,
            id="fp32, tied, many files, TP8",
        ),
        pytest.param(
            dict(TIED, torch_dtype="float16", tie_word_embeddings=False), 4, id="fp16, thinker, TP4"
        ),
    ],
)
def test_the_folder_comes_back_byte_for_byte(tiny_folder, tmp_path, sizes, tp):
    folder = Path(shutil.copytree(tiny_folder(**sizes), tmp_path / "model"))
    (folder / "LICENSE").write_bytes(b"\x00 any \xff bytes")
    to_megatron(folder, tmp_path / "checkpoint", tp)
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_folder(folder, tmp_path / "back")
    manifest = read_manifest(tmp_path / "back")
    stored = {
        name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()
    }
    assert {n: (t["shape"], t["bytes"]) for n, t in manifest.tensors.items()} == {
        n: (list(t.shape), t.nbytes) for n, t in stored.items()
    }
    assert manifest.tensors == read_manifest(tmp_path / "checkpoint").tensors
    to_megatron(
        tmp_path / "back", tmp_path / "again", tp
    )  # checked against the manifest it has now


def test_transformers_reads_what_comes_back(checkpoints, tmp_path):
    from transformers import Qwen3OmniMoeForConditionalGeneration as Model

    folder, checkpoint = checkpoints["whole"]
    to_hf(checkpoint, tmp_path / "back")
    ours, theirs = (Model.from_pretrained(f).state_dict() for f in (tmp_path / "back", folder))
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in theirs
    )


def test_the_checkpoint_has_transformer_engines_keys(checkpoints):
    """Whatever the table says, these are the names and sizes that Megatron-LM's Qwen3 has."""
    _, checkpoint = checkpoints["whole"]
    found = TorchDist(checkpoint / "release").sizes
    decoder = {key: size for key, size in found.items() if not key.startswith("huggingface.")}
    layer = "decoder.layers."
    assert decoder == {
        "embedding.word_embeddings.weight": (768, 32),
        f"{layer}self_attention.linear_qkv.layer_norm_weight": (4, 32),
        f"{layer}self_attention.linear_qkv.weight": (4, 128, 32),
        f"{layer}self_attention.q_layernorm.weight": (4, 8),
        f"{layer}self_attention.k_layernorm.weight": (4, 8),
        f"{layer}self_attention.linear_proj.weight": (4, 32, 64),
        f"{layer}pre_mlp_layernorm.weight": (4, 32),
        f"{layer}mlp.router.weight": (4, 4, 32),
        f"{layer}mlp.experts.experts.linear_fc1.weight": (4, 4, 32, 32),
        f"{layer}mlp.experts.experts.linear_fc2.weight": (4, 4, 32, 16),
        "decoder.final_layernorm.weight": (32,),
        "output_layer.weight": (768, 32),
    }
    carried = {key for key in found if key.startswith("huggingface.")}
    assert {key.split(".")[1] for key in carried} == {"thinker", "talker", "code2wav"}


# --- any layout writes, any layout reads ----------------------------------------------------------


def differing_parameters(mcore, ours):
    """Names of our parameters that megatron-core's own model, filled by megatron-core, has not bit
    for bit.
    """
    theirs, differing = dict(mcore.named_parameters()), []
    for name, parameter in ours.named_parameters():
        if ".experts." in name:
            base, linear = name.split("experts.")
            fc = {"gate_up.weight": "linear_fc1", "down.weight": "linear_fc2"}[linear]
            for slot, expert in enumerate(parameter):
                if not torch.equal(
                    expert, theirs.pop(f"{base}experts.local_experts.{slot}.{fc}.weight")
                ):
                    differing.append(name)
        elif (
            name != "output_layer.weight" or name in theirs
        ):  # a tied model of megatron-core has none on one stage
            if not torch.equal(parameter, theirs.pop(name)):
                differing.append(name)
    return differing + list(theirs)


def read_and_write(rank, world_size, folder, checkpoint, written, tp, pp, ep, dtype):
    """megatron-core and our loader read the checkpoint at a layout; megatron-core writes it."""
    place = parallel.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    model_args = read_model_args(folder)
    models = [build_decoder(model_args, place, DTYPES[dtype]) for _ in range(2)]
    mcore = mcore_model.build(model_args, place, DTYPES[dtype])
    for model in (*models, mcore):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    num_bytes = [
        load_weights(model, model_args, place, source)
        for model, source in zip(models, (folder, checkpoint))
    ]
    from_hf, from_checkpoint = (dict(model.named_parameters()) for model in models)
    differing = [
        name
        for name, parameter in from_hf.items()
        if not torch.equal(parameter, from_checkpoint[name])
    ]
    mcore_model.load(mcore, checkpoint / "release")
    mcore_model.save(mcore, written, rank)
    return differing, differing_parameters(mcore, models[0]), num_bytes[0] - num_bytes[1]


OTHER_LAYOUTS = [(1, 1, 4), (4, 1, 1), (1, 2, 2)]  # TP, PP, EP of four ranks


@pytest.mark.parametrize(
    "name, dtype, tp, pp, ep",
    [
        pytest.param("whole", "bfloat16", 2, 2, 2, id="whole, converted for TP2, at TP2 PP2 EP2"),
        pytest.param(
            "tied",
            "float32",
            1,
            1,
            4,
            id="tied, converted for TP1, at DP4 EP4",
            marks=pytest.mark.extended,
        ),
        pytest.param(
            "tied",
            "float32",
            2,
            2,
            1,
            id="tied, converted for TP1, at TP2 PP2",
            marks=pytest.mark.smoke,
        ),
    ],
)
def test_any_layout_writes_and_any_reads(checkpoints, tmp_path, name, dtype, tp, pp, ep):
    """Our loader fills the decoder from the checkpoint as from the folder, megatron-core fills its
    own model the same, what megatron-core then writes becomes the folder again, and at other
    layouts, where the vocabulary is padded to other sizes, both fill the decoder from it.
    """
    folder, checkpoint = checkpoints[name]
    written = tmp_path / "iter_0000007"
    results = run_ranks(read_and_write, 4, folder, checkpoint, written, tp, pp, ep, dtype)
    assert results == [([], [], 0)] * 4
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    to_hf(tmp_path, tmp_path / "back", hf_model=str(folder))
    assert_same_folder(folder, tmp_path / "back")
    results = run_ranks(read_at_other_layouts, 4, folder, written, OTHER_LAYOUTS, dtype)
    assert results == [dict.fromkeys(OTHER_LAYOUTS, ([], []))] * 4


def read_at_other_layouts(rank, world_size, folder, checkpoint, layouts, dtype):
    """Layout -> what our loader reads otherwise from the checkpoint than from the folder, what
    megatron-core reads otherwise than we do.
    """
    found = {}
    for tp, pp, ep in layouts:
        place = parallel.initialize(
            torch.device("cpu"),
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
        )
        model_args = read_model_args(folder)
        models = [build_decoder(model_args, place, DTYPES[dtype]) for _ in range(2)]
        for model, source in zip(models, (folder, checkpoint)):
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
            load_weights(model, model_args, place, source)
        first, second = (dict(model.named_parameters()) for model in models)
        differing = [name for name in first if not torch.equal(first[name], second[name])]
        mcore = mcore_model.build(model_args, place, DTYPES[dtype])
        for parameter in mcore.parameters():
            parameter.data.fill_(float("nan"))
        mcore_model.load(mcore, checkpoint)
        zero_padding(mcore, model_args, place)
        found[tp, pp, ep] = differing, differing_parameters(mcore, models[0])
        parallel.parallel_state.destroy_model_parallel()
    return found


def zero_padding(mcore, model_args, place):
    """megatron-core leaves rows of the vocabulary that only this layout has as they were."""
    for name, parameter in mcore.named_parameters():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            real = model_args.vocab_size - place.tp_rank * len(parameter)
            parameter.data[max(real, 0) :] = 0


# --- checkpoints of Megatron-LM's own training ----------------------------------------------------


def edit_metadata(release, change):
    """`change(sizes, storage)`: the tensors by key, and where their chunks lie by (key, offset,
    number).
    """
    with open(release / ".metadata", "rb") as file:
        described = pickle.load(file)
    change(described.state_dict_metadata, described.storage_data)
    (release / ".metadata").write_bytes(pickle.dumps(described))


def copy_key(key, other, sizes, storage):
    sizes[other] = sizes[key]
    for index in [index for index in storage if index.fqn == key]:
        storage[replace(index, fqn=other)] = storage[index]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "optimizer", ["optimizer.", "chained_0.optimizer.", "chained_1.optimizer."]
)
def test_the_optimizers_state_is_passed_over(checkpoints, tmp_path, prefix, optimizer):
    """Its tensors are called like the model's, and may stand before them; the model itself may have
    a prefix.
    """
    folder, checkpoint = checkpoints["tied"]
    release = shutil.copytree(checkpoint / "release", tmp_path / "iter_0000007")

    def as_of_training(sizes, storage):
        model = [key for key in sizes if not key.startswith("huggingface.")]
        for key in model:
            copy_key(key, f"{optimizer}state.exp_avg.{prefix}{key}", sizes, storage)
        for key in model:
            copy_key(key, f"second {key}", sizes, storage)
        for key in list(sizes):
            if key.startswith("second "):
                copy_key(key, prefix + key.removeprefix("second "), sizes, storage)
            if key.startswith(("second ", "huggingface.")) or prefix and key in model:
                del sizes[key]
        ordered = dict(sorted(sizes.items(), key=lambda item: not item[0].startswith(optimizer)))
        sizes.clear()
        sizes |= ordered

    edit_metadata(release, as_of_training)
    assert MegatronFolder(release, read_model_args(folder)).prefix == prefix
    to_hf(release, tmp_path / "back", hf_model=str(folder))
    assert_same_folder(folder, tmp_path / "back")


def test_a_trained_checkpoint_beside_the_converted_one(checkpoints, tmp_path):
    """Megatron-LM went on in the folder that hf_to_megatron made: its checkpoint is another
    writer's, and the first one is still a whole folder.
    """
    folder, checkpoint = checkpoints["tied"]
    root = Path(shutil.copytree(checkpoint, tmp_path / "run"))
    trained = shutil.copytree(root / "release", root / "iter_0000007")
    edit_metadata(
        trained,
        lambda sizes, storage: [
            sizes.pop(key) for key in list(sizes) if key.startswith("huggingface.")
        ],
    )
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(
        ValueError, match="iter_0000007: holds the decoder alone; name the Hugging Face folder"
    ):
        to_hf(root, tmp_path / "back")
    to_hf(root, tmp_path / "back", hf_model=str(folder))
    assert_same_folder(folder, tmp_path / "back")
    to_hf(root / "release", tmp_path / "first")
    assert_same_folder(folder, tmp_path / "first")


class ByName(pickle.Pickler):
    """Pickles the members of an enumeration as early Python 3.11 does."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_any_python(checkpoints, tmp_path):
    """Also of one that pickles enumerations by `getattr`, in what describes the tensors and in save
    plans beside them.
    """
    copy = shutil.copytree(checkpoints["tied"][1], tmp_path / "copy")
    path = copy / "release" / ".metadata"
    described = pickle.loads(path.read_bytes())
    described.planner_data = [WriteItemType.TENSOR]
    with open(path, "wb") as file:
        ByName(file).dump(described)
    assert b"getattr" in path.read_bytes() and b"WriteItemType" in path.read_bytes()
    found, expected = TorchDist(copy / "release"), TorchDist(checkpoints["tied"][1] / "release")
    assert (found.sizes, found.dtypes, found._chunks) == (
        expected.sizes,
        expected.dtypes,
        expected._chunks,
    )


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_type_can_be_carried(tmp_path, dtype):
    """What is written as a chunk is found again, whatever torch makes of its type."""
    values = torch.arange(12).reshape(3, 4).to(dtype)
    with open(tmp_path / "chunks", "w+b") as file:
        *_, start, length, _ = write_chunk(file, TensorSlice("key", (slice(0, 3),)), values)
        offset = _elements(file, (3, 4), dtype)
    block = read_block(tmp_path / "chunks", start + offset, dtype, 4, range(3), range(4))
    assert start + length == (tmp_path / "chunks").stat().st_size
    assert torch.equal(block.view(torch.uint8), values.view(torch.uint8))


def test_every_key_has_a_size(checkpoints):
    """Written sizes follow the table at any padding."""
    model_args = read_model_args(checkpoints["whole"][0])
    assert checkpoint_tensors(model_args, 8)["output_layer.weight"] == (1024, 32)


def test_training_reads_the_checkpoint(checkpoints, tmp_path):
    """`--model` takes the checkpoint where it takes the folder: the same metrics at TP2 EP2, bit
    for bit.
    """
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8))
    flags = layout_flags(tp=2, ep=2) | dict(
        dataset=rows, max_steps=2, per_device_train_batch_size=2
    )
    models = dict(zip(("folder", "checkpoint"), checkpoints["whole"]))
    run_training(
        2, *[arguments(model=m, output_dir=tmp_path / name, **flags) for name, m in models.items()]
    )
    metrics = [stable(read_lines(tmp_path / name / "metrics.jsonl")) for name in models]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2
