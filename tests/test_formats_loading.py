"""Model folders: what the config must say, which tensors must be there, which slices of them each
rank reads.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from megatron_gkd import parallel
from megatron_gkd.formats.loading import load_weights, parameter_slices
from megatron_gkd.formats.safetensors_folder import INDEX, SINGLE, SafetensorsFolder, check_tensors
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.model.args import read_model_args
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.model.transformer_config import DTYPES
from tests.ranks import run_ranks
from tests.sizes import SMALLEST

SMALL = SMALLEST


class RecordedSlice:
    """A lazy tensor that writes down what is read of it."""

    def __init__(self, name, source, reads):
        self.name, self.source, self.reads = name, source, reads

    def __getitem__(self, index):
        values = self.source[index]
        ranges = [part.indices(size)[:2] for part, size in zip(index, self.source.get_shape())]
        self.reads.append((self.name, ranges, values.nbytes))
        return values

    def __getattr__(self, name):
        return getattr(self.source, name)


def read_at_layout(rank, world_size, folder, tp, pp, ep, dtype):
    """Load this rank's weights; return the slices read, the byte count reported, and checks of
    every parameter.
    """
    place = parallel.initialize(
        torch.device("cpu"),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    model_args = read_model_args(folder)
    model = build_decoder(model_args, place, DTYPES[dtype])
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    reads, lazy_slice = [], SafetensorsFolder.slice
    SafetensorsFolder.slice = lambda self, name: RecordedSlice(name, lazy_slice(self, name), reads)
    num_bytes = load_weights(model, model_args, place, folder)
    unset = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    files = {
        name: file
        for path in Path(folder).glob("*.safetensors")
        for file in [load_file(path)]
        for name in file
    }
    inexact = [
        part.stored.name
        for part in parameter_slices(model, model_args, place)
        if not torch.equal(
            part.view,
            files[part.stored.name][part.stored.name][part.stored.index].to(DTYPES[dtype]),
        )
    ]
    return reads, num_bytes, unset, inexact


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, stored, dtype",
    [
        pytest.param(8, 2, 2, 4, "bfloat16", "bfloat16", id="TP2 PP2 DP2 EP4, bf16"),
        pytest.param(
            4, 4, 1, 2, "float32", "bfloat16", id="TP4 with 2 KV heads, EP2, fp32 to bf16"
        ),
        pytest.param(2, 1, 1, 2, "bfloat16", "float32", id="DP2 EP2, bf16 to fp32"),
    ],
)
def test_each_rank_reads_only_what_it_owns(tiny_folder, world_size, tp, pp, ep, stored, dtype):
    """Every element of every decoder tensor is read as often as the layout replicates it, k and v
    by each rank that reads their head; none stays unset.
    """
    folder = tiny_folder(**SMALL, torch_dtype=stored, max_shard_size="50KB")
    assert len(list(Path(folder).glob("*.safetensors"))) > 3
    results = run_ranks(read_at_layout, world_size, folder, tp, pp, ep, dtype)
    dp = world_size // (tp * pp)
    replicas = {
        "layernorm": tp * dp,
        "_norm": tp * dp,
        "k_proj": max(1, tp // SMALL["num_key_value_heads"]) * dp,
        "v_proj": max(1, tp // SMALL["num_key_value_heads"]) * dp,
        ".mlp.gate": tp * dp,
        ".experts.": tp * dp // ep,
        "model.norm": tp * dp,
    }

    sizes = decoder_tensors(read_model_args(folder))
    counts = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    for reads, num_bytes, unset, inexact in results:
        assert not unset and not inexact
        assert num_bytes == sum(size for *_, size in reads)
        for name, ranges, _ in reads:
            counts[name][tuple(slice(*limits) for limits in ranges)] += 1
    for name, count in counts.items():
        expected = next((times for part, times in replicas.items() if part in name), dp)
        assert count.unique().tolist() == [expected], name


def test_tied_head_is_the_embedding(tiny_folder, tmp_path):
    """A tied folder has no lm_head; one that still carries the same matrix is accepted."""
    folder = shutil.copytree(
        tiny_folder(**SMALL, thinker_only=True, tie_word_embeddings=True), tmp_path / "model"
    )
    assert (
        read_model_args(folder).tie_word_embeddings
        and "lm_head.weight" not in SafetensorsFolder(folder).file_of
    )
    check(folder)
    copy = lambda tensors: tensors.update(
        {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    )
    rewrite(folder / SINGLE, copy)
    check(folder)
    rewrite(
        folder / SINGLE, lambda tensors: tensors["lm_head.weight"][-1].add_(1)
    )  # transformers would not tie this one
    with pytest.raises(
        ValueError,
        match="lm_head.weight is not model.embed_tokens.weight, .* tie_word_embeddings: "
        "set that to false",
    ):
        check(folder)


# --- folders that must be refused -----------------------------------------------------------------


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A private copy of a one-file folder of a thinker alone, to be damaged."""
    return Path(shutil.copytree(tiny_folder(**SMALL, thinker_only=True), tmp_path / "model"))


@pytest.fixture
def broken_shards(tiny_folder, tmp_path):
    """A private copy of a folder of a whole model in many files."""
    return Path(
        shutil.copytree(
            tiny_folder(**SMALL, torch_dtype="bfloat16", max_shard_size="50KB"), tmp_path / "model"
        )
    )


def check(folder):
    check_tensors(SafetensorsFolder(folder), read_model_args(folder))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(EXPERT), f"misses tensor {EXPERT}"),
        (lambda tensors: tensors.pop("lm_head.weight"), "misses tensor lm_head.weight"),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.gate.weight": torch.zeros(4, 32)}),
            "unexpected tensor model.layers.2.mlp.gate.weight",
        ),
        (
            lambda tensors: tensors.update({"talker.x": torch.zeros(1)}),
            "unexpected tensor talker.x",
        ),
        (
            lambda tensors: tensors.update({EXPERT: torch.zeros(16, 32)}),
            rf"{EXPERT} has shape \[16, 32\], config.json asks for \[32, 16\]",
        ),
        (
            lambda tensors: tensors.update({EXPERT: torch.zeros(32, 16, dtype=torch.int8)}),
            f"{EXPERT} is I8, expected one of",
        ),
    ],
)
def test_tensors_are_checked_by_name(broken, change, message):
    check(broken)
    rewrite(broken / SINGLE, change)
    with pytest.raises(ValueError, match=message) as error:
        check(broken)
    assert str(broken) in str(error.value)


def test_a_truncated_file_is_named(broken):
    path = broken / SINGLE
    for size in (path.stat().st_size - 1, 100, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{path}: not a complete safetensors file"):
            check(broken)


def test_shards_that_do_not_fit_the_index(broken_shards):
    """A missing shard, a tensor that a shard does not hold, one that the index does not know, a
    broken index.
    """
    folder = broken_shards
    check(folder)
    index = json.loads((folder / INDEX).read_text())
    name = f"thinker.{EXPERT}"
    shard = folder / index["weight_map"][name]

    rewrite(shard, lambda tensors: tensors.update({"thinker.model.extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="unexpected tensor thinker.model.extra.weight"):
        check(folder)
    rewrite(shard, lambda tensors: [tensors.pop("thinker.model.extra.weight"), tensors.pop(name)])
    with pytest.raises(
        ValueError, match=f"{INDEX}: lists tensor {name} in {shard.name}, which does not hold it"
    ):
        check(folder)
    index["weight_map"][name] = next(
        file for file in index["weight_map"].values() if file != shard.name
    )
    rewrite(
        shard, lambda tensors: tensors.update({name: torch.zeros(32, 16, dtype=torch.bfloat16)})
    )
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        ValueError,
        match=rf"lists tensor {name} in .*, which does not hold it \({shard.name} does\)",
    ):
        check(folder)
    other = next(
        path for path in sorted(folder.glob("*.safetensors"), reverse=True) if path != shard
    )
    rewrite(other, lambda tensors: tensors.update({name: torch.ones(32, 16, dtype=torch.bfloat16)}))
    with pytest.raises(ValueError, match=f"holds tensor {name}, and .*.safetensors holds it too"):
        check(folder)
    (folder / SINGLE).write_bytes(b"another model")
    with pytest.raises(
        ValueError, match=f"{SINGLE} is there, and {INDEX} lists model-00001.*: which of them"
    ):
        check(folder)
    (folder / SINGLE).unlink()
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{INDEX}: lists {shard.name}, which is not in the folder"
    ):
        check(folder)
    for text in ("{", "[]", "null", "[" * 100_000):
        (folder / INDEX).write_text(text)
        with pytest.raises(ValueError, match=f"{INDEX}: not a safetensors index"):
            check(folder)
    for value in (None, [shard.name], {name: 3}, {name: [shard.name]}, math.nan):
        (folder / INDEX).write_text(json.dumps({"weight_map": value}))
        with pytest.raises(ValueError, match=f"{INDEX}: weight_map is .*, and must be an object"):
            check(folder)


def test_a_single_file_may_have_an_index(broken):
    names = SafetensorsFolder(broken).tensors
    (broken / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    check(broken)


def test_a_type_that_torch_does_not_have_is_named(broken):
    path = broken / SINGLE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header["visual.merger.mlp.0.bias"]
    elements = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 8
    header["visual.merger.mlp.0.bias"] = entry | {"dtype": "C64", "shape": [elements]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(
        ValueError, match=f"{path}: tensor visual.merger.mlp.0.bias is C64, expected one of"
    ):
        SafetensorsFolder(broken).slice("visual.merger.mlp.0.bias").num_bytes


def test_pickles_are_not_read(broken):
    (broken / SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {INDEX} nor {SINGLE} is there$"):
        check(broken)
    (broken / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle and is not read"):
        check(broken)


def load_in_ranks(rank, world_size, folder):
    place = parallel.initialize(torch.device("cpu"), pipeline_model_parallel_size=2)
    model_args = read_model_args(folder)
    model = build_decoder(model_args, place, torch.float32)
    try:
        load_weights(model, model_args, place, folder)
    except ValueError as error:
        return str(error)


def test_every_rank_reports_a_bad_tensor(broken):
    """Also the ranks that would not read it: none waits in a collective for one that has left."""
    rewrite(broken / SINGLE, lambda tensors: tensors.update({EXPERT: torch.zeros(1, 1)}))
    messages = run_ranks(load_in_ranks, 2, broken)
    assert all(EXPERT in message for message in messages) and messages[0] == messages[1]


# --- config.json ----------------------------------------------------------------------------------


def change_config(folder, top=None, **text_config):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(top or {})
    config["text_config"].update(text_config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mlp_only_layers=[1]), r"text_config.mlp_only_layers = \[1\] is not supported"),
        (dict(decoder_sparse_step=2), "text_config.decoder_sparse_step = 2 is not supported"),
        (dict(num_experts=0), "text_config.num_experts"),
        (dict(num_experts_per_tok=5), "text_config.num_experts_per_tok = 5 .* num_experts 4"),
        (dict(num_experts_per_tok=1), "text_config.num_experts_per_tok = 1 .* norm_topk_prob"),
        (
            dict(sliding_window=128, use_sliding_window=True),
            "text_config.sliding_window = 128 is not supported",
        ),
        (dict(hidden_act="gelu"), "text_config.hidden_act = 'gelu' is not supported"),
        (dict(attention_bias=True), "text_config.attention_bias = True is not supported"),
        (dict(attention_dropout=0.1), "text_config.attention_dropout = 0.1 is not supported"),
        (
            dict(num_key_value_heads=3),
            "text_config.num_key_value_heads = 3 .* num_attention_heads 4",
        ),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 1, 1]}),
            "rope_scaling.rope_type = 'yarn'",
        ),
        (
            dict(rope_scaling={"rope_type": "default", "mrope_section": [2, 2]}),
            r"mrope_section is \[2, 2\], .* three sizes",
        ),
        (dict(head_dim=0), "text_config.head_dim is 0, .* an even number"),
        (dict(rope_theta=-1.0), "text_config.rope_theta is -1.0, .* above 0"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (dict(hidden_size="32"), "hidden_size"),
        (
            dict(top={"model_type": "qwen2_5_omni"}),
            "model_type 'qwen2_5_omni' is not supported; expected one of",
        ),
    ],
)
def test_settings_that_are_not_supported_are_named(broken, settings, message):
    change_config(broken, **settings)
    with pytest.raises(ValueError, match=message) as error:
        read_model_args(broken)
    assert str(broken / "config.json") in str(error.value)


def test_a_window_that_is_switched_off_is_no_window(broken):
    change_config(broken, sliding_window=128, use_sliding_window=False)
    assert read_model_args(broken).num_layers == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        "{}",
        '{"model_type": "qwen3_omni_moe"}',
        '{"model_type": "qwen3_omni_moe_thinker"}',
    ],
)
def test_a_broken_config_is_named(broken, text):
    (broken / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(broken / "config.json")):
        read_model_args(broken)


def test_a_folder_without_config(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"--model {folder}: no config.json there"):
            read_model_args(folder)
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "metadata.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=f"the inside of a Megatron checkpoint: give {tmp_path}$"
    ):
        read_model_args(tmp_path / "release")


def test_every_size_is_the_folders(tiny_folder):
    """No size comes from a default; the hub's spelling of config.json and transformers' own are
    read alike.
    """
    folder = Path(
        tiny_folder(
            **SMALL,
            num_experts_per_tok=3,
            rope_theta=5e5,
            text_config={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        )
    )
    model_args = read_model_args(folder)
    assert (
        model_args.prefix,
        model_args.num_layers,
        model_args.hidden_size,
        model_args.head_dim,
        model_args.vocab_size,
    ) == (
        "thinker.",
        2,
        32,
        8,
        503,
    )
    assert (model_args.num_attention_heads, model_args.num_key_value_heads) == (4, 2)
    assert (
        model_args.num_experts,
        model_args.num_experts_per_tok,
        model_args.moe_intermediate_size,
        model_args.norm_topk_prob,
    ) == (
        4,
        3,
        16,
        False,
    )
    assert (
        model_args.rms_norm_eps,
        model_args.rope_theta,
        model_args.mrope_section,
        model_args.tie_word_embeddings,
    ) == (
        1e-5,
        5e5,
        (2, 1, 1),
        False,
    )
    assert [model_args.padded_vocab_size(tp) for tp in (1, 2, 8)] == [512, 512, 1024]

    from transformers import AutoConfig

    AutoConfig.from_pretrained(folder).save_pretrained(folder.parent / "saved")
    assert read_model_args(folder.parent / "saved") == model_args


def test_fused_experts_are_named(tiny_folder, tmp_path):
    model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        tiny_folder(**SMALL, thinker_only=True)
    )
    model.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(
        ValueError,
        match="misses tensor .*; the experts are fused: save the model with "
        "save_pretrained's defaults",
    ):
        check_tensors(SafetensorsFolder(tmp_path), read_model_args(tmp_path))
