"""Hugging Face <-> Megatron: byte-exact round trips at any layout; megatron-core and training read
the result.
"""

import filecmp
import json
import pickle
import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from checkpoint_tools.hf_to_megatron import HfToMegatronConfig
from checkpoint_tools.hf_to_megatron import convert as hf_to_megatron
from checkpoint_tools.megatron_to_hf import MegatronToHfConfig
from checkpoint_tools.megatron_to_hf import convert as megatron_to_hf
from megatron_gkd import parallel
from megatron_gkd.formats import torch_dist
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

SMALL = dict(
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    vocab_size=601,  # padded to 640 at TP 1, 768 at TP 2, 1024 at TP 4 and 8
)
WHOLE = dict(**SMALL, torch_dtype="bfloat16", max_shard_size="200KB")
TIED = dict(**SMALL, thinker_only=True, tie_word_embeddings=True)
SHARD_BYTES = 300_000


def to_megatron(folder, output, tp=1, **settings):
    config = HfToMegatronConfig(
        str(folder), str(output), tensor_model_parallel_size=tp, num_workers=2, **settings
    )
    return hf_to_megatron(config, SHARD_BYTES)


def to_hf(checkpoint, output, **settings):
    return megatron_to_hf(
        MegatronToHfConfig(str(checkpoint), str(output), num_workers=2, **settings), SHARD_BYTES
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


@pytest.fixture(scope="session")
def checkpoints(tiny_folder, tmp_path_factory):
    """The two standard folders as checkpoints: name -> (folder, checkpoint). Shared: copy before
    changing.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, sizes, tp in (("whole", WHOLE, 2), ("tied", TIED, 1)):
        folder = tiny_folder(**sizes)
        to_megatron(folder, root / name, tp)
        made[name] = (Path(folder), root / name)
    return made


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
        pytest.param("tied", "float32", 1, 1, 4, id="tied, converted for TP1, at DP4 EP4"),
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


# --- what is refused ------------------------------------------------------------------------------


def refuse_folder(folder, tmp_path, message, **settings):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        to_megatron(folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder(**WHOLE), tmp_path / "model"))


def test_folders_that_are_refused(broken, tmp_path):
    """Each before a byte is written, each by name (tests/test_formats_loading.py has the tensors
    one by one).
    """
    shards = sorted(broken.glob("*.safetensors"))
    refuse_folder(
        broken, tmp_path, "tensor_model_parallel_size 3 does not divide the 8 attention heads", tp=3
    )
    refuse_folder(
        broken,
        tmp_path,
        "pipeline_model_parallel_size 3 does not divide the 4 layers",
        pipeline_model_parallel_size=3,
    )
    refuse_folder(
        broken,
        tmp_path,
        "expert_model_parallel_size 8 does not divide the 4 experts",
        expert_model_parallel_size=8,
    )
    (broken / "extra").mkdir()
    (broken / "extra" / "spk.pt").write_bytes(b"never opened")
    refuse_folder(broken, tmp_path, "extra/spk.pt is a pickle")
    (broken / "extra" / "spk.pt").unlink()
    (broken / "extra" / "spk.NPZ").write_bytes(b"may hold one")
    refuse_folder(broken, tmp_path, "extra/spk.NPZ is a pickle")
    (broken / "extra" / "spk.NPZ").unlink()
    with pytest.raises(ValueError, match="inside lies in .*model, which is only read"):
        to_megatron(broken, broken / "inside")
    assert not list(broken.glob("*inside*"))
    (broken / "release").write_bytes(b"")
    refuse_folder(broken, tmp_path, "release: a checkpoint needs this name")
    (broken / "release").unlink()
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-1])
    refuse_folder(broken, tmp_path, f"{shards[0].name}: not a complete safetensors file")
    shards[0].unlink()
    refuse_folder(broken, tmp_path, f"lists {shards[0].name}, which is not in the folder")
    shards[0].write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_omni"}))
    refuse_folder(broken, tmp_path, "model_type 'qwen2_5_omni' is not supported")
    (broken / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a file").write_text("")
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        to_megatron(broken, tmp_path / "out")
    (tmp_path / "out" / "a file").unlink()
    to_megatron(broken, tmp_path / "out")


def test_a_full_disk_is_noticed_before_the_first_byte(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 66_000_000)
    )
    refuse_folder(broken, tmp_path, r"0.1 GB are needed and 0.1 GB are free")
    assert not list(tmp_path.glob(".out*"))


def test_layers_of_two_types_are_refused(broken, tmp_path):
    from safetensors.torch import save_file

    name = "thinker.model.layers.1.mlp.gate.weight"
    shard = next(path for path in broken.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name].float()}, shard, metadata={"format": "pt"})
    refuse_folder(
        broken, tmp_path, f"{name} is F32 and thinker.model.layers.0.mlp.gate.weight is BF16"
    )


def test_a_changed_folder_or_checkpoint_is_noticed(checkpoints, tmp_path):
    """One bit of a folder that has a manifest, one bit of a checkpoint, a changed config: named,
    nothing is written.
    """
    _, checkpoint = checkpoints["whole"]
    to_hf(checkpoint, tmp_path / "back")
    shard = sorted((tmp_path / "back").glob("*.safetensors"))[3]
    flip_bit(shard, -1)
    last = list(load_file(shard))[-1]
    refuse_folder(
        tmp_path / "back",
        tmp_path,
        f"{shard.name}: tensor {last[:10]}.* has SHA-256 .* changed or damaged",
    )
    for partial in tmp_path.glob(".out.partial"):
        shutil.rmtree(partial)
    manifest = json.loads((tmp_path / "back" / MANIFEST).read_text())
    for changed, message in (
        (
            {name: t for name, t in manifest["tensors"].items() if name != last},
            f"{last} is unknown to {MANIFEST}",
        ),
        (manifest["tensors"] | {"talker.x": {}}, "talker.x is not in the folder"),
        (
            manifest["tensors"] | {last: manifest["tensors"][last] | {"shape": [1]}},
            f"{last} is .*{MANIFEST} says .* \\[1\\]",
        ),
    ):
        (tmp_path / "back" / MANIFEST).write_text(json.dumps(manifest | {"tensors": changed}))
        refuse_folder(tmp_path / "back", tmp_path, message)
    assert not list(tmp_path.glob(".out*"))  # noticed before anything was read

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    chunk = next(c for c in TorchDist(copy / "release")._chunks["decoder.layers.mlp.router.weight"])
    flip_bit(copy / "release" / chunk.file, chunk.start + chunk.length // 2)
    with pytest.raises(ValueError, match="tensor thinker.model.layers.*gate.weight has SHA-256"):
        to_hf(copy, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_without_one_of_its_files_is_refused(checkpoints, tmp_path):
    """By name and before a tensor is read: a file of the folder, the index, a header, the manifest
    itself.
    """
    _, checkpoint = checkpoints["whole"]
    copy, index = (
        Path(shutil.copytree(checkpoint, tmp_path / "copy")),
        "huggingface/model.safetensors.index.json",
    )
    header = next(
        str(path.relative_to(copy)) for path in sorted((copy / "huggingface").glob("*.header"))
    )
    for name in ("tokenizer.json", "chat_template.jinja", index, header, MANIFEST):
        whole = (copy / name).read_bytes()
        (copy / name).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=f"{copy / name} is missing"):
            to_hf(copy, tmp_path / "out")
        if name != MANIFEST:
            (copy / name).write_bytes(whole + b" ")
            with pytest.raises(
                ValueError, match=f"{copy / name}: not the file that {MANIFEST} lists"
            ):
                to_hf(copy, tmp_path / "out")
        (copy / name).write_bytes(whole)
    assert not list(tmp_path.glob(".out*"))
    to_hf(copy, tmp_path / "out")


def test_flags_without_effect_are_refused(checkpoints, tmp_path):
    folder, checkpoint = checkpoints["whole"]

    def refuse(message, path=checkpoint, **settings):
        with pytest.raises(ValueError, match=message):
            to_hf(path, tmp_path / "out", **settings)

    refuse("--weight 0.5: there is no --adapter to weigh", weight=[0.5])
    refuse("--hf_model .* holds the whole folder; leave the flag out", hf_model=str(folder))
    run = tmp_path / "checkpoint-1"
    run.mkdir()
    (run / "adapter_config.json").write_text("{}")
    for flag, value in (("hf_model", str(folder)), ("adapter", ["DIR"]), ("weight", [1.0])):
        refuse(
            f"--{flag} has no effect with --export adapter", run, export="adapter", **{flag: value}
        )


def test_checkpoints_that_are_refused(checkpoints, tmp_path):
    folder, checkpoint = checkpoints["whole"]
    copy = shutil.copytree(checkpoint, tmp_path / "copy")

    def refuse(message, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            to_hf(copy, tmp_path / "out", **settings)

    refuse("has no adapter_config.json", export="adapter")
    distcp = copy / "release" / "__1_0.distcp"
    whole = distcp.read_bytes()
    distcp.write_bytes(whole[:-1])
    refuse("__1_0.distcp: truncated")
    distcp.unlink()
    refuse("__1_0.distcp is missing: .metadata lists it")
    distcp.write_bytes(whole)
    (copy / "huggingface").rename(tmp_path / "aside")
    refuse("holds the decoder alone; name the Hugging Face folder")
    (tmp_path / "aside").rename(copy / "huggingface")
    (copy / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refuse("sharded_backend is 'zarr'; only torch_dist")
    shutil.rmtree(copy / "release")
    refuse("neither latest_checkpointed_iteration.txt nor a torch_dist checkpoint is there")


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


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


class Fuse:
    """Reaches for code through what describes tensors."""

    def __reduce__(self):
        return (getattr, (torch.Size, "__init__"))


@pytest.mark.parametrize(
    "content, why",
    [
        (Bomb(), "names .*, which describes"),
        (Fuse(), "asks for __init__ of .*, which is no enumeration"),
    ],
)
def test_metadata_cannot_run_code(checkpoints, tmp_path, monkeypatch, content, why):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(checkpoints["tied"][1], tmp_path / "copy")
    (copy / "release" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=rf".metadata: not the metadata of a torch_dist checkpoint \(it {why}"
    ):
        to_hf(copy, tmp_path / "out")
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_type_can_be_carried(tmp_path, dtype):
    """What is written as a chunk is found again, whatever torch makes of its type."""
    values = torch.arange(12).reshape(3, 4).to(dtype)
    with open(tmp_path / "chunks", "w+b") as file:
        *_, start, length = write_chunk(file, TensorSlice("key", (slice(0, 3),)), values)
        offset = _elements(file, (3, 4), dtype)
    block = read_block(tmp_path / "chunks", start + offset, dtype, 4, range(3), range(4))
    assert start + length == (tmp_path / "chunks").stat().st_size
    assert torch.equal(block.view(torch.uint8), values.view(torch.uint8))


def test_every_key_has_a_size(checkpoints):
    """Written sizes follow the table at any padding."""
    model_args = read_model_args(checkpoints["whole"][0])
    assert checkpoint_tensors(model_args, 8)["output_layer.weight"] == (1024, 32)


# --- the training command reads it ----------------------------------------------------------------


def test_what_a_file_does_to_the_classes_it_names_ends_with_it(checkpoints, tmp_path):
    """A pickle can set attributes of whatever it names: those are stand-ins of its own."""
    copy = shutil.copytree(checkpoints["tied"][1], tmp_path / "copy")
    for module, name in sorted(torch_dist._RECORDS | torch_dist._IGNORED):
        # BUILD of a class: its __init__ = None
        spoilt = f"c{module}\n{name}\n(N}}X\x08\x00\x00\x00__init__Nstb."
        (copy / "release" / ".metadata").write_bytes(spoilt.encode())
        with pytest.raises(ValueError, match="not the metadata of a torch_dist checkpoint"):
            TorchDist(copy / "release")
    TorchDist(checkpoints["tied"][1] / "release")
    assert (
        callable(Metadata.__init__)
        and callable(torch_dist._Record.__init__)
        and callable(torch_dist._Ignored.__init__)
    )


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
