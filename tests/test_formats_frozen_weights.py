"""Towers, talker and vocoder of a folder: each tensor that config.json asks for is there, in its
shape, and no other.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.formats.frozen_weights import check_frozen_weights, frozen_tensors
from megatron_gkd.formats.safetensors_folder import SINGLE, SafetensorsFolder
from megatron_gkd.formats.sources import open_source
from megatron_gkd.formats.weight_map import decoder_tensors
from megatron_gkd.model.args import read_model_args
from tests.sizes import SMALLEST

SMALL = SMALLEST


@pytest.mark.parametrize(
    "kind", [{}, dict(thinker_only=True), dict(tie_word_embeddings=True)], ids=str
)
def test_all_that_transformers_saves_is_known(tiny_folder, kind):
    """With the decoder's table every tensor of a folder has a name and a shape."""
    folder = SafetensorsFolder(tiny_folder(**SMALL, **kind))
    model_args = read_model_args(folder.folder)
    sizes, _ = frozen_tensors(folder.folder, model_args)
    decoder = {name: list(size) for name, size in decoder_tensors(model_args).items()}
    assert sizes | decoder == {name: tensor.get_shape() for name, tensor in folder.tensors.items()}
    parts = {name.removeprefix("thinker.").split(".")[0] for name in sizes}
    assert parts == {"audio_tower", "visual"} | (
        set() if "thinker_only" in kind else {"talker", "code2wav"}
    )


@pytest.fixture
def broken(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder(**SMALL), tmp_path / "model"))


def check(folder):
    check_frozen_weights(SafetensorsFolder(folder), read_model_args(folder))


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def drop(prefix):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


HEAD = "talker.codec_head.weight"
PROJECTION = "thinker.visual.patch_embed.proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("talker."), r"misses tensor talker.* and \d+ more \(by its config.json"),
        (drop("code2wav."), "misses tensor code2wav"),
        (drop("thinker.audio_tower."), "misses tensor thinker.audio_tower"),
        (drop(PROJECTION), f"misses tensor {PROJECTION}"),
        (
            lambda tensors: tensors.update({HEAD: tensors[HEAD][:1].clone()}),
            rf"{HEAD} has shape \[1, ",
        ),
        (
            lambda tensors: tensors.update({PROJECTION: tensors[PROJECTION].int()}),
            f"{PROJECTION} is I32, expected one of",
        ),
        (
            lambda tensors: tensors.update({"talker.bogus.weight": torch.ones(3)}),
            "unexpected tensor talker.bogus.weight",
        ),
    ],
)
def test_what_is_wrong_is_named(broken, change, message):
    check(broken)
    rewrite(broken, change)
    with pytest.raises(ValueError, match=message) as error:
        open_source(broken, None, "test")  # as the tools open a folder
    assert str(broken) in str(error.value)


def test_a_thinker_whose_config_asks_for_a_talker(broken):
    """The way out is said, and is one."""
    rewrite(broken, drop(("talker.", "code2wav.")))
    way_out = 'asks for them: set "enable_audio_output": false'
    with pytest.raises(ValueError, match=f"nothing of talker or vocoder, .*{way_out}"):
        open_source(broken, None, "test")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"enable_audio_output": False}))
    open_source(broken, None, "test")


def test_a_config_of_another_part_than_the_tensors(broken):
    config = json.loads((broken / "config.json").read_text())
    tensors = load_file(broken / SINGLE)
    thinker = {n.removeprefix("thinker."): t for n, t in tensors.items() if n[:8] == "thinker."}
    save_file(thinker, broken / SINGLE, metadata={"format": "pt"})
    model_type = "qwen3_omni_moe_thinker"
    way_out = f'replace config.json by its "thinker_config" alone, with model_type {model_type}'
    with pytest.raises(ValueError, match=f"misses tensor thinker.model.*; .*: {way_out}"):
        open_source(broken, None, "test")
    alone = config["thinker_config"] | {"model_type": model_type}
    (broken / "config.json").write_text(json.dumps(alone))
    open_source(broken, None, "test")
    save_file(tensors, broken / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="replace config.json by that of the whole model"):
        open_source(broken, None, "test")


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "compressed-tensors", "bitsandbytes"])
@pytest.mark.parametrize("where", ["", "thinker_config.", "text_config."])
def test_quantised_folders_are_named_before_any_tensor(broken, method, where):
    config = json.loads((broken / "config.json").read_text())
    part = config if not where else config["thinker_config"]
    part = part["text_config"] if where == "text_config." else part
    part["quantization_config"] = {"quant_method": method}
    (broken / "config.json").write_text(json.dumps(config))
    drop("")(tensors := load_file(broken / SINGLE))
    save_file(tensors, broken / SINGLE)
    message = rf"config.json: {where}quantization_config says .* quantised \({method}\), .*: take"
    with pytest.raises(ValueError, match=message) as error:
        open_source(broken, None, "test")
    call = {
        "fp8": "(quantization_config=FineGrainedFP8Config(dequantize=True))",
        "compressed-tensors": "(quantization_config=CompressedTensorsConfig(run_compressed=False))",
        "bitsandbytes": "(FOLDER).dequantize()",
    }.get(method)
    way_out = f", or save it from transformers with from_pretrained{call}" if call else "its name)"
    assert str(error.value).endswith(way_out)


def test_a_voice_that_is_switched_off(broken):
    """Without `enable_audio_output` transformers builds no talker: its tensors may be there."""
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"enable_audio_output": False}))
    check(broken)
    rewrite(broken, drop(("talker.", "code2wav.")))
    check(broken)
    rewrite(broken, drop("thinker.visual.merger."))
    with pytest.raises(ValueError, match="misses tensor thinker.visual.merger"):
        check(broken)


def test_buffers_of_older_writers_are_no_strangers(broken):
    rewrite(
        broken,
        lambda tensors: tensors.update({"thinker.visual.rotary_pos_emb.inv_freq": torch.ones(4)}),
    )
    check(broken)


def test_a_config_that_transformers_makes_nothing_of(broken):
    config = json.loads((broken / "config.json").read_text())
    del config["talker_config"]["text_config"]["shared_expert_intermediate_size"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="config.json: transformers makes no model of it .*shared_expert"
    ):
        check(broken)
