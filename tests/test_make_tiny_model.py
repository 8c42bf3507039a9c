"""The small model folder: hub names and shapes, what transformers loads, a lossless tokenizer, the
toy language.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from demo.tiny import toy_language, training
from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.verify.reference import decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_folder(str(tmp_path_factory.mktemp("tiny") / "whole"))


def read_tensors(folder):
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def test_hub_names_and_shapes(folder):
    tensors = read_tensors(folder)
    expected = {
        "thinker.model.embed_tokens.weight": (1024, 128),
        "thinker.lm_head.weight": (1024, 128),
        "thinker.model.layers.2.self_attn.q_proj.weight": (256, 128),
        "thinker.model.layers.2.self_attn.k_proj.weight": (128, 128),
        "thinker.model.layers.2.self_attn.q_norm.weight": (32,),
        "thinker.model.layers.0.mlp.gate.weight": (8, 128),
        "thinker.model.layers.0.mlp.experts.7.gate_proj.weight": (64, 128),
        "thinker.model.layers.0.mlp.experts.7.up_proj.weight": (64, 128),
        "thinker.model.layers.0.mlp.experts.7.down_proj.weight": (128, 64),
        "thinker.audio_tower.proj2.weight": (128, 64),
        "thinker.visual.merger_list.1.mlp.2.weight": (128, 256),
        "talker.model.layers.1.mlp.experts.3.down_proj.weight": (64, 32),
        "talker.codec_head.weight": (96, 64),
        "code2wav.code_embedding.weight": (256, 64),
    }
    assert {name: tuple(tensors[name].shape) for name in expected} == expected
    assert {name.split(".")[0] for name in tensors} == {"thinker", "talker", "code2wav"}
    assert not [name for name in tensors if "gate_up_proj" in name or "language_model" in name]


def test_config_is_spelled_as_on_the_hub(folder):
    config = json.loads(Path(folder, "config.json").read_text())
    text = config["thinker_config"]["text_config"]
    assert config["model_type"] == "qwen3_omni_moe" and config["architectures"] == [
        "Qwen3OmniMoeForConditionalGeneration"
    ]
    assert text["rope_scaling"]["mrope_section"] == [6, 5, 5] and text["rope_theta"] == 1000000.0
    loaded = AutoConfig.from_pretrained(folder).thinker_config.text_config
    assert (
        loaded.rope_parameters["mrope_section"] == [6, 5, 5]
        and loaded.rope_parameters["rope_theta"] == 1000000.0
    )
    assert (loaded.num_key_value_heads, loaded.head_dim, loaded.num_experts_per_tok) == (4, 32, 2)


@pytest.mark.parametrize(
    "model_class",
    [Qwen3OmniMoeForConditionalGeneration, Qwen3OmniMoeThinkerForConditionalGeneration],
)
def test_transformers_loads_every_tensor(folder, model_class):
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    frozen_parts = (
        ("talker.", "code2wav.")
        if model_class is Qwen3OmniMoeThinkerForConditionalGeneration
        else ()
    )
    unexpected = [
        key for key in report["unexpected_keys"] if not key.startswith(frozen_parts)
    ]  # until 5.20 they are listed
    assert not report["missing_keys"] and not unexpected and not report["mismatched_keys"]
    thinker = getattr(model, "thinker", model)
    gate_up = decoder(thinker).layers[1].mlp.experts.gate_up_proj
    on_disk = read_tensors(folder)["thinker.model.layers.1.mlp.experts.5.up_proj.weight"]
    assert torch.equal(gate_up[5, 64:], on_disk)
    logits = thinker(input_ids=torch.arange(40)[None]).logits
    assert logits.shape == (1, 40, 1024) and 1.0 < logits.std() < 4.0


def test_automodel_picks_the_whole_model(folder):
    assert (
        type(AutoModelForMultimodalLM.from_pretrained(folder))
        is Qwen3OmniMoeForConditionalGeneration
    )


def test_thinker_alone_tied_sharded_bfloat16(tmp_path):
    sizes = dict(
        num_hidden_layers=1,
        vocab_size=515,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    options = dict(
        tie_word_embeddings=True, thinker_only=True, torch_dtype="bfloat16", max_shard_size="500KB"
    )
    folder = build_folder(str(tmp_path / "thinker"), TinyModelConfig(**sizes, **options))
    tensors = read_tensors(folder)
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    index = json.loads(Path(folder, "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors) and len(set(index["weight_map"].values())) > 1
    model, report = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is decoder(model).embed_tokens.weight
    assert len(AutoTokenizer.from_pretrained(folder)) <= 515


@pytest.mark.parametrize(
    "text",
    [
        "She reads the question twice before she answers. Don't worry, it's 8:15!",
        "她回答之前会把问题读两遍。Version 1.4 修好了。",
        "emoji 🙂🚀 and rare 龘 and Ελληνικά\n\n\ttabs  and   spaces ",
        "<|im_start|>user\nhello<|im_end|>\n",
    ],
)
def test_tokenizer_loses_nothing(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 1024


def test_token_ids_agree_with_the_config(folder):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    thinker = config.thinker_config
    expected = {
        "<|audio_start|>": thinker.audio_start_token_id,
        "<|audio_pad|>": thinker.audio_token_id,
        "<|image_pad|>": thinker.image_token_id,
        "<|video_pad|>": thinker.video_token_id,
        "<|im_start|>": config.im_start_token_id,
        "<|im_end|>": config.im_end_token_id,
        "system": config.system_token_id,
        "user": config.user_token_id,
        "assistant": config.assistant_token_id,
    }
    assert {text: tokenizer(text)["input_ids"] for text in expected} == {
        text: [token] for text, token in expected.items()
    }
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.audio_token_id, tokenizer.image_token_id) == (
        thinker.audio_token_id,
        thinker.image_token_id,
    )


def test_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "red cat"},
    ]
    prompt = [
        {"role": "system", "content": "Answer in Chinese."},
        {"role": "user", "content": parts},
    ]
    whole = tokenizer.apply_chat_template(
        prompt + [{"role": "assistant", "content": "红 猫"}], tokenize=False
    )
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    media = "<|audio_start|><|audio_pad|><|audio_end|><|vision_start|><|image_pad|><|vision_end|>"
    system, user = "Answer in Chinese.", f"{media}red cat"
    assert start == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert whole == start + "红 猫<|im_end|>\n"


def test_audio_files_are_understood(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = extractor([0.0] * 16000, sampling_rate=16000, padding=True, return_tensors="pt")[
        "input_features"
    ]
    assert features.shape == (1, 128, 100)
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder)
    mask = torch.ones(1, 100, dtype=torch.long)
    assert thinker.get_audio_features(features, mask).last_hidden_state.shape == (13, 128)


def test_image_files_are_understood(folder):
    """AutoProcessor needs torchvision for its video part; the PIL image processor and the vision
    tower do not.
    """
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (96, 64), (200, 30, 30)), return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]]
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder)
    features = thinker.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert [per_image[0].shape for per_image in features.deepstack_features] == [(6, 128)] * 2


def test_same_seed_same_bytes(folder, tmp_path):
    again = build_folder(str(tmp_path / "again"))
    assert sorted(path.name for path in Path(again).iterdir()) == sorted(
        path.name for path in Path(folder).iterdir()
    )
    for path in Path(again).iterdir():
        assert path.read_bytes() == Path(folder, path.name).read_bytes(), path.name
    other = read_tensors(build_folder(str(tmp_path / "other"), TinyModelConfig(seed=1)))
    assert not torch.equal(
        other["thinker.lm_head.weight"], read_tensors(folder)["thinker.lm_head.weight"]
    )


def test_refuses_a_folder_with_files_and_impossible_sizes(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not an empty folder"):
        build_folder(str(tmp_path / "full"))
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="--vocab_size 300 is too small"):
        build_folder(str(tmp_path / "small"), TinyModelConfig(vocab_size=300))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]  # nothing half-written stays
    command = [
        sys.executable,
        "-m",
        "checkpoint_tools.make_tiny_model",
        "--output",
        str(tmp_path / "x"),
        "--head_dim",
        "7",
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2 and "--head_dim 7 must be even" in finished.stderr


def test_toy_language():
    assert toy_language.answer("red cat moon") == "red cat moon"
    assert toy_language.answer("red cat moon", "reverse") == "moon cat red"
    assert toy_language.answer("red cat moon", "capitals") == "RED CAT MOON"
    assert toy_language.answer("red cat moon", "chinese") == "红 猫 月"
    assert toy_language.answer("red cat moon", "chinese_reverse") == "月 猫 红"
    draws = [
        toy_language.sample_prompt(random.Random(seed), held_out)
        for seed in range(50)
        for held_out in (True, False)
    ]
    assert not set(draws[::2]) & set(draws[1::2])
    roles = [message["role"] for message in toy_language.conversation("red cat moon", "reverse")]
    assert roles == ["system", "user", "assistant"]
    assert [message["role"] for message in toy_language.conversation("red cat moon")] == [
        "user",
        "assistant",
    ]


# Keys of the hub's config.json, by the part that holds them, without the defaults that transformers
# 4 wrote into every nested config; servers ask for some that transformers 5 does not read.
KEYS_OF_THE_HUB = {
    "": "architectures assistant_token_id code2wav_config dtype enable_audio_output "
    "im_end_token_id im_start_token_id model_type system_token_id talker_config thinker_config "
    "tts_bos_token_id tts_eos_token_id tts_pad_token_id user_token_id",
    "thinker_config": "audio_config audio_end_token_id audio_start_token_id audio_token_id "
    "image_token_id initializer_range model_type position_id_per_seconds seconds_per_chunk "
    "text_config user_token_id video_token_id vision_config vision_end_token_id "
    "vision_start_token_id",
    "thinker_config.text_config": "attention_bias attention_dropout decoder_sparse_step head_dim "
    "hidden_act hidden_size initializer_range intermediate_size max_position_embeddings "
    "mlp_only_layers model_type moe_intermediate_size norm_topk_prob num_attention_heads "
    "num_experts num_experts_per_tok num_hidden_layers num_key_value_heads output_router_logits "
    "rms_norm_eps rope_scaling rope_theta router_aux_loss_coef shared_expert_intermediate_size "
    "sliding_window tie_word_embeddings use_cache use_qk_norm use_sliding_window vocab_size",
    "thinker_config.vision_config": "apply_vit_abs_pos_embed deepstack_visual_indexes depth "
    "hidden_act hidden_size image_size in_channels in_chans initializer_range intermediate_size "
    "model_type num_heads out_hidden_size patch_size spatial_merge_size spatial_patch_size "
    "temporal_patch_size tokens_per_second",
    "thinker_config.audio_config": "activation_dropout activation_function attention_dropout "
    "conv_chunksize d_model downsample_hidden_size dropout encoder_attention_heads "
    "encoder_ffn_dim encoder_layers initializer_range max_source_positions model_type n_window "
    "n_window_infer num_hidden_layers num_mel_bins output_dim scale_embedding",
    "talker_config.code_predictor_config": "attention_bias attention_dropout head_dim hidden_act "
    "hidden_size layer_types max_position_embeddings num_code_groups rms_norm_eps rope_theta "
    "sliding_window vocab_size",
    "code2wav_config": "codebook_dim codebook_size decoder_dim num_quantizers "
    "num_semantic_quantizers semantic_codebook_size vector_quantization_hidden_dimension",
}
DEFAULTS = "_name_or_path chunk_size_feed_forward do_sample id2label output_attentions torchscript"


@pytest.mark.parametrize("part", KEYS_OF_THE_HUB)
def test_config_has_the_keys_of_the_hub(folder, part):
    section = json.loads((Path(folder) / "config.json").read_text())
    for name in part.split(".") if part else ():
        section = section[name]
    expected = KEYS_OF_THE_HUB[part].split()
    if part.count(".") == 1:  # those of the thinker and the code predictor
        expected += DEFAULTS.split()
    assert set(expected) <= set(section)
    if "image_size" in section:
        grid = section["image_size"] // section["patch_size"]
        assert grid**2 == section["num_position_embeddings"]


def test_training_teaches_the_decoder_and_leaves_the_towers(folder, tmp_path, capsys):
    taught = build_folder(str(tmp_path / "taught"), TinyModelConfig(train_steps=25))
    assert "held-out prompts answered right: repeat" in capsys.readouterr().out
    before, after = read_tensors(folder), read_tensors(taught)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if name.startswith(("thinker.model.", "thinker.lm_head."))
    }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        toy_language.conversation("sun fish tree", "chinese"), tokenize=False
    )
    ids = torch.tensor([tokenizer(chat)["input_ids"]])
    losses = []
    for path in (folder, taught):
        logits = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(path)(
            input_ids=ids
        ).logits
        losses.append(
            torch.nn.functional.cross_entropy(logits[0, -6:-2], ids[0, -5:-1]).item()
        )  # 3 words and the end
    assert losses[0] > 6.0 and losses[1] < losses[0] - 2.0


def test_held_out_accuracy_counts_whole_answers(folder, monkeypatch):
    """One wrong token makes an answer wrong: here the first of every second prompt."""

    def logits(thinker, ids, labels):
        told = labels.clone()
        first = (labels != -100).int().argmax(dim=1)
        told[torch.arange(0, len(labels), 2), first[::2]] = 0
        return torch.nn.functional.one_hot(told[labels != -100], 1024).float()

    monkeypatch.setattr(training, "_response_logits", logits)
    accuracy = training.held_out_accuracy(None, AutoTokenizer.from_pretrained(folder), seed=0)
    assert accuracy == dict.fromkeys(toy_language.RULES, 0.5)
