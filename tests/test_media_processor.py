"""Media in the data: what the folder's processor makes of them, both views, and the cache.

The reference is transformers' own processor for the tokens and features, and its get_rope_index for
the positions.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import soxr
import torch
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    Qwen3OmniMoeThinkerConfig,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoePreTrainedModelForConditionalGeneration as RopeIndex,
)
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.data import Packing, collate, load_datasets
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.media.cache import cache_path
from megatron_gkd.media.medium import Reference
from megatron_gkd.media.processor import MediaProcessor

VOCAB = 1024
VIEWS = ("student", "teacher")
ANSWER = {"role": "assistant", "content": "a cat"}
HEARS_AND_SEES = [
    {"type": "text", "text": "listen"},
    {"type": "audio"},
    {"type": "text", "text": "and look"},
    {"type": "image"},
    {"type": "image"},
]


def build_model(root: Path) -> str:
    return build_folder(str(root / "model"), TinyModelConfig(num_hidden_layers=1, hidden_size=64))


def write_media(folder: Path) -> Path:
    """A stereo sound at 22,050 Hz, one at 16 kHz, a wide and a tall picture."""
    rng = np.random.default_rng(0)
    soundfile.write(folder / "stereo.wav", rng.normal(0, 0.1, (30_000, 2)), 22_050)
    soundfile.write(folder / "mono.flac", rng.normal(0, 0.1, 17_171), 16_000)
    for name, size in (("wide.png", (130, 61)), ("tall.png", (40, 90))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / name
        )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("files"))


def row(**more):
    user = {"role": "user", "content": HEARS_AND_SEES}
    return {
        "messages": [user, ANSWER],
        "audios": ["stereo.wav"],
        "images": ["wide.png", "tall.png"],
    } | more


def load(model, folder, *rows, **changes):
    values = {
        "dataset": [str(folder / "rows.jsonl")],
        "max_length": 400,
        "prepared_rows": "none",
    } | changes
    if rows:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_datasets(DataConfig(**values), model, VOCAB, 0)[0]


def processor_of(model, monkeypatch):
    """transformers' processor; without torchvision it cannot be built but by leaving out the check
    of its parts.
    """
    monkeypatch.setattr(
        Qwen3OmniMoeProcessor, "check_argument_for_proper_class", lambda self, name, part: None
    )
    processor = Qwen3OmniMoeProcessor(
        image_processor=AutoImageProcessor.from_pretrained(model),
        feature_extractor=AutoFeatureExtractor.from_pretrained(model),
        tokenizer=AutoTokenizer.from_pretrained(model),
    )
    processor.video_processor = (
        processor.image_processor
    )  # 5.20 asks for its merge_size, videos or not
    return processor


def rope_index(model, ids, image_grids, audio_lengths):
    config = Qwen3OmniMoeThinkerConfig.from_dict(
        json.load(open(os.path.join(model, "config.json")))["thinker_config"]
    )
    this = SimpleNamespace(
        config=config, spatial_merge_size=config.vision_config.spatial_merge_size
    )
    this.get_llm_pos_ids_for_vision = RopeIndex.get_llm_pos_ids_for_vision.__get__(this)
    ids = torch.tensor(ids)[None]
    grids = torch.tensor(image_grids) if image_grids else None
    return RopeIndex.get_rope_index(
        this, ids, grids, None, torch.ones_like(ids), False, torch.tensor(audio_lengths)
    )[0][:, 0]


def test_a_row_is_what_transformers_processor_makes_of_it(model, media, monkeypatch):
    sample = load(model, media, row())[0]
    sound, rate = soundfile.read(media / "stereo.wav", dtype="float32")
    sound = soxr.resample(sound.mean(axis=1), rate, 16_000, quality="HQ")
    assert len(sound) == pytest.approx(30_000 * 16_000 / 22_050, abs=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(row()["messages"], tokenize=False).removesuffix("\n")
    images = [Image.open(media / name) for name in ("wide.png", "tall.png")]
    expected = processor_of(model, monkeypatch)(
        text=text, images=images, audio=[sound], return_tensors="pt"
    )

    ids = sample.student.input_ids
    assert ids == expected["input_ids"][0].tolist()
    audio, *pictures = sample.media
    torch.testing.assert_close(audio.features, expected["input_features"][0], rtol=0, atol=1e-6)
    assert torch.equal(
        torch.cat([picture.features for picture in pictures]), expected["pixel_values"]
    )
    assert [list(picture.grid_thw) for picture in pictures] == expected["image_grid_thw"].tolist()
    config = json.load(open(os.path.join(model, "config.json")))["thinker_config"]
    for medium, place in zip(sample.media, sample.student.media):
        token = config["audio_token_id" if medium.kind == "audio" else "image_token_id"]
        assert len(place.positions) == medium.num_tokens and {
            ids[position] for position in place.positions
        } == {token}
    grids = [picture.grid_thw for picture in pictures]
    assert torch.equal(
        sample.student.position_ids, rope_index(model, ids, grids, [audio.features.shape[1]])
    )
    assert sample.student.targets() == tokenizer("a cat<|im_end|>")["input_ids"]


def test_every_way_to_write_a_row_gives_the_same_sample(model, media):
    files = {"audio": ["stereo.wav"], "image": ["wide.png", "tall.png"]}
    remaining = {kind: iter(names) for kind, names in files.items()}
    inline = [
        part if "text" in part else part | {part["type"]: next(remaining[part["type"]])}
        for part in HEARS_AND_SEES
    ]
    native = (
        "listen<|audio_start|><|audio_pad|><|audio_end|>and look"
        + "<|vision_start|><|image_pad|><|vision_end|>" * 2
    )
    in_bytes = {
        "audios": [
            dict(
                zip(
                    ("array", "sampling_rate"),
                    (soundfile.read(media / "stereo.wav")[0].tolist(), 22_050),
                )
            )
        ],
        "images": [np.asarray(Image.open(media / name)).tolist() for name in files["image"]],
    }

    def turns(content):
        return [{"role": "user", "content": content}, ANSWER]

    data = load(
        model,
        media,
        row(),
        {"messages": turns(inline)},
        row(messages=turns("listen<audio>and look<image><image>")),
        row(messages=turns(native)),
        row(**in_bytes),
    )
    first = data[0]
    ids, placeholders = first.student.input_ids, []
    for place in first.student.media:
        placeholders += place.positions[1:]
    bare = [token for position, token in enumerate(ids) if position not in placeholders]
    labels = [-100] * len(ids[: first.student.response_start]) + ids[first.student.response_start :]
    bare_labels = [label for position, label in enumerate(labels) if position not in placeholders]
    columns = {"audios": files["audio"], "images": files["image"]}
    tokenised = [{"input_ids": ids, "labels": labels}, {"input_ids": bare, "labels": bare_labels}]
    data = [
        *(data[i] for i in range(5)),
        *(s for s in samples(load(model, media, *(r | columns for r in tokenised)))),
    ]
    for number, sample in enumerate(data):
        assert sample.student.input_ids == ids and sample.student.labels == labels, number
        assert sample.student.media == first.student.media, number
        assert torch.equal(sample.student.position_ids, first.student.position_ids)
        for medium, expected in zip(sample.media, first.media):
            torch.testing.assert_close(
                medium.features, expected.features, rtol=0, atol=1e-4 if number == 4 else 0
            )


def samples(data):
    return [data[index] for index in range(len(data))]


def test_what_datasets_stores(model, media, tmp_path):
    table = datasets.Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": "listen<audio>and look<image><image>"}, ANSWER]
            ]
            * 2,
            "audios": [[str(media / "stereo.wav")]] * 2,
            "images": [[str(media / "wide.png"), str(media / "tall.png")]] * 2,
        }
    )
    table = table.cast_column("audios", datasets.List(datasets.Audio())).cast_column(
        "images", datasets.List(datasets.Image())
    )
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "rows.parquet"))  # the files' bytes are in it
    expected = load(model, media, row())[0]
    for name in ("saved", "rows.parquet"):
        sample = load(model, media, dataset=[str(tmp_path / name)])[1]
        assert sample.student.input_ids == expected.student.input_ids
        assert all(
            torch.equal(a.features, b.features) for a, b in zip(sample.media, expected.media)
        )


def test_media_in_bytes_stay_on_disk(model, media, tmp_path):
    """Rows, split ones too, are mapped from a file, their bytes of media with them: no copy in
    memory.
    """
    sound = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(tmp_path / "sound.wav", sound, 16_000)
    asked = {"role": "user", "content": "listen<audio>"}
    rows = [
        {"messages": [asked, ANSWER], "audios": [{"bytes": (tmp_path / "sound.wav").read_bytes()}]}
        for _ in range(50)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    before = pyarrow.total_allocated_bytes()
    data = load(model, media, dataset=[str(tmp_path / "rows.parquet")], split_dataset_ratio=0.2)
    assert data.report.num_media == {"audio": 40} and data.report.media == {"audio > audio": 40}
    assert pyarrow.total_allocated_bytes() - before < 50_000 < 50 * 2 * len(sound) / 30
    heard = np.abs(data[0].media[0].features.numpy()).max()
    assert heard > 0


def test_the_teachers_view(model, media):
    heard = {"role": "user", "content": [{"type": "text", "text": "who?"}, {"type": "audio"}]}
    told = [{"role": "user", "content": "who? it says a cat"}, {"role": "assistant", "content": ""}]
    base = {"messages": [heard, ANSWER], "audios": ["stereo.wav"]}
    data = load(
        model,
        media,
        base,
        base | {"teacher_messages": told, "teacher_audios": []},
        base | {"teacher_audios": ["mono.flac"]},
        base | {"teacher_audios": ["stereo.wav"]},
        base | {"teacher_prompt": "<audio> who, now?"},
    )
    same, reads, clean, repeated, asks = samples(data)
    assert same.teacher is same.student and same.media_pair == "audio > audio"
    assert repeated.teacher is repeated.student and not repeated.has_teacher_view
    assert (
        reads.media_pair == "audio > text"
        and reads.teacher.position_ids is None
        and not reads.teacher.media
    )
    assert clean.has_teacher_view and clean.teacher.input_ids != clean.student.input_ids
    assert [place.medium for place in clean.student.media + clean.teacher.media] == [0, 1]
    assert [place.medium for place in asks.student.media + asks.teacher.media] == [0, 0] and len(
        asks.media
    ) == 1
    for sample in (reads, clean, asks):
        assert sample.teacher.targets() == sample.student.targets()
    assert data.report.media == {
        "audio > audio": 4,
        "audio > text": 1,
    } and data.report.num_media == {"audio": 6}
    tokens = [sum(medium.num_tokens for medium in sample.media) for sample in samples(data)]
    assert data.lengths.media.tolist() == tokens

    packing = Packing(0, 4)
    batch = collate(samples(data), packing)
    assert batch.media.audio_tokens.tolist() == [
        medium.num_tokens for sample in samples(data) for medium in sample.media
    ]
    total = int(batch.media.audio_tokens.sum())
    assert batch.media.audio.shape[1] == int(batch.media.audio_lengths.sum())
    audio_token = json.load(open(os.path.join(model, "config.json")))["thinker_config"][
        "audio_token_id"
    ]
    for view in (batch.student, batch.teacher):
        assert (view.input_ids[0, view.media_rows] == audio_token).all()
        assert (
            int((view.input_ids == audio_token).sum())
            == len(view.media_rows)
            == len(view.media_tokens)
        )
    assert sorted(
        set(batch.student.media_tokens.tolist()) | set(batch.teacher.media_tokens.tolist())
    ) == list(range(total))
    starts = torch.tensor(batch.teacher.starts)
    row_of = torch.searchsorted(starts, batch.teacher.media_rows, right=True) - 1
    assert sorted(set(row_of.tolist())) == [0, 2, 3, 4]

    responses = [[5], [6, 7], [8] * 9, [9], [3, 4]]
    answered = [
        sample.with_response(response) for sample, response in zip(samples(data), responses)
    ]
    written = collate(answered, packing)
    assert torch.equal(written.media.audio, batch.media.audio)
    assert written.student.lengths != batch.student.lengths
    assert (written.student.input_ids[0, written.student.media_rows] == audio_token).all()
    assert torch.equal(written.student.media_tokens, batch.student.media_tokens)


def test_media_references_are_those_of_the_row(model, media):
    """From paths in parts, and from bytes and paths as `datasets` stores them."""

    def row_of(*names):
        kinds = {".wav": "audio", ".flac": "audio", ".png": "image"}
        parts = [{"type": kinds[name[name.index(".") :]]} for name in names]
        parts = [part | {part["type"]: name} for part, name in zip(parts, names)]
        return [{"role": "user", "content": parts or "hello"}, ANSWER]

    tall = Reference("image", None, (media / "tall.png").read_bytes())
    stored = {
        "messages": [[{"role": "user", "content": "<image>and<image>"}, ANSWER]],
        "images": [[{"bytes": tall.data, "path": None}, {"bytes": None, "path": "wide.png"}]],
    }
    pyarrow.parquet.write_table(pyarrow.table(stored), media / "pictures.parquet")
    given = {"messages": row_of("wide.png", "stereo.wav")}
    data = load(
        model,
        media,
        given,
        given | {"teacher_messages": row_of("mono.flac", "wide.png")},
        {"messages": row_of()},
        dataset=[str(media / "rows.jsonl"), str(media / "pictures.parquet")],
    )
    sound = Reference("audio", str(media / "stereo.wav"), None)
    clean = Reference("audio", str(media / "mono.flac"), None)
    wide = Reference("image", str(media / "wide.png"), None)
    found = [[data.media_references(index, view) for view in VIEWS] for index in range(len(data))]
    assert not any(seen.use_audio_in_video for of_row in found for seen in of_row)
    assert [tuple(seen.media for seen in of_row) for of_row in found] == [
        ([sound, wide], [sound, wide]),
        ([sound, wide], [clean, wide]),
        ([], []),
        ([tall, wide], [tall, wide]),
    ]


def test_positions_go_on_after_a_picture(model, media):
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    sample = load(model, media, {"messages": [seen, ANSWER], "images": ["wide.png"]})[0]
    batch = collate([sample], Packing(0))
    start, last = sample.student.response_start, batch.student.position_ids[0, 0]
    assert last[start] == last[start - 1] + 1 < start  # a picture takes fewer positions than tokens
    written = collate([sample.with_response([5, 6, 7])], Packing(0))
    ids = written.student.input_ids[0].tolist()
    assert torch.equal(
        written.student.position_ids[:, 0], rope_index(model, ids, [sample.media[0].grid_thw], [0])
    )


def test_the_cache_is_read_and_a_broken_file_in_it_is_replaced(model, media, tmp_path, monkeypatch):
    expected = load(model, media, row())[0]
    for _ in range(2):
        sample = load(model, media, row(), media_cache=str(tmp_path / "cache"))[0]
        assert all(
            torch.equal(a.features, b.features) for a, b in zip(sample.media, expected.media)
        )
        assert [a.grid_thw for a in sample.media] == [a.grid_thw for a in expected.media]
    files = sorted((tmp_path / "cache").rglob("*"))
    assert (
        len([file for file in files if file.suffix == ".safetensors"])
        == 3
        == len([f for f in files if f.is_file()])
    )
    reference = Reference("audio", str(media / "stereo.wav"), None)
    cached = MediaProcessor(model, str(tmp_path / "cache"))
    with monkeypatch.context() as patch:  # what is cached is not decoded again
        patch.setattr(soundfile, "read", None)
        assert torch.equal(cached.load(reference).features, expected.media[0].features)
    path = cache_path(cached.cache, reference, cached._processor_digest)
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(cached.load(reference).features, expected.media[0].features)
    assert path.stat().st_size > 100


def test_audio_tokens_are_those_of_the_tower(model):
    from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import (
        _get_feat_extract_output_lengths,
    )

    processor = MediaProcessor(model)
    lengths = torch.arange(1, 1700)
    assert [processor.audio_tokens(int(n)) for n in lengths] == _get_feat_extract_output_lengths(
        lengths
    ).tolist()
