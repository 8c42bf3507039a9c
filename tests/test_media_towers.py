"""Media through towers, merge and deepstack: logits and LoRA gradients equal transformers with peft
at every layout.

One run of ranks a layout builds the model once and answers everything that is asked of it below;
the references run in this process, row by row.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from demo.tiny.config import TinyModelConfig
from demo.tiny.folder import build_folder
from megatron_gkd.data import Packing, collate
from megatron_gkd.forward import (
    LossSettings,
    student_forward_backward,
    teacher_forward,
    view_logits,
)
from megatron_gkd.lora.adapter import adapter_slices
from megatron_gkd.lora.slots import activate
from megatron_gkd.loss import Divergence
from megatron_gkd.media.chunks import Chunk, balance
from megatron_gkd.media.positions import MediaTokenIds
from megatron_gkd.media.towers import StepMedia, build_towers
from megatron_gkd.model.args import read_model_args
from tests.adapters import (
    ALL,
    load_peft,
    load_thinker,
    peft_gradients,
    random_adapter,
    write_adapter,
)
from tests.lora_runs import build, in_reducer, initialize
from tests.packed import rows_of
from tests.random_media import make_batch, make_rows
from tests.ranks import run_ranks
from tests.reference_step import divergence

RANK, ALPHA, BETA, TEMPERATURE, VOCAB_SIZE = 4, 8, 0.5, 2.0, 503
SETTINGS = LossSettings(Divergence("jsd", BETA, TEMPERATURE), 0.0, VOCAB_SIZE)
# world size, TP, PP, EP, recompute
LAYOUTS = [
    pytest.param((1, 1, 1, 1, True), id="single-recompute"),
    pytest.param((2, 2, 1, 1, False), id="TP2"),
    pytest.param((4, 4, 1, 2, False), id="TP4-EP2"),
    pytest.param((2, 1, 2, 1, True), id="PP2-recompute"),
    pytest.param((4, 2, 2, 2, True), id="TP2-PP2-EP2-recompute", marks=pytest.mark.smoke),
    pytest.param((3, 1, 1, 1, False), id="DP3-text-on-one-rank"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(
        num_hidden_layers=4,
        hidden_size=64,
        head_dim=16,
        moe_intermediate_size=32,
        vocab_size=VOCAB_SIZE,
    )
    return build_folder(str(tmp_path_factory.mktemp("model") / "thinker"), TinyModelConfig(**sizes))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    tensors = random_adapter(read_model_args(folder), RANK, ALL)
    return write_adapter(
        tmp_path_factory.mktemp("adapter"), tensors, rank=RANK, alpha=ALPHA, targets=ALL
    )


def run_layout(rank, world_size, folder, adapter, tp, pp, ep, recompute):
    """This rank's micro-batches: logits of both sides, mean loss, gradients."""
    place = initialize(tp, pp, ep)
    rows = make_rows(MediaTokenIds.read(folder))[place.dp_rank :: place.dp_size]
    batches = [make_batch(of_batch, tp) for of_batch in rows]
    model_args, model = build(place, folder, adapter, recompute=recompute)
    towers = build_towers(folder, model_args, place, torch.float32, audio=True, visual=True)
    assert (towers is None) == (place.pp_rank > 0)
    read = {"calls": [], "patches": 0}
    if towers is not None:
        towers.audio_tower.register_forward_pre_hook(lambda *_: read["calls"].append("audio"))
        towers.visual.register_forward_pre_hook(lambda *_: read["calls"].append("visual"))
        towers.visual.register_forward_pre_hook(
            lambda _, args: read.update(patches=read["patches"] + len(args[0]))
        )
    media = StepMedia(towers, [batch.media for batch in batches])
    calls_at_once = list(read["calls"])
    logits = []
    for index, batch in enumerate(batches):
        for side in ("student", "teacher"):
            with activate(model, side):
                view = getattr(batch, side)
                packed = view_logits(model, model_args, place, view, media[index])
                logits.append(rows_of(packed, view))
    model.train()
    ddp = in_reducer(model)
    teacher = teacher_forward(model, batches, place, media)
    ddp.zero_grad_buffer()
    sums = student_forward_backward(ddp, batches, teacher, SETTINGS, place, media)
    return SimpleNamespace(
        batches=list(range(3))[place.dp_rank :: place.dp_size],
        logits=logits,
        means=sums.means(place),
        encoded_once=read["calls"] == calls_at_once,
        calls=calls_at_once,
        on_first_stage=place.is_first_stage,
        tp_size=tp,
        num_read=read["patches"],
        num_patches=sum(len(batch.media.pixels) for batch in batches if batch.media),
        has_features=[media[index] is not None for index in range(len(batches))],
        gradients=[
            (piece.stored.name, piece.stored.index, piece.parameter.main_grad[piece.where].clone())
            for piece in adapter_slices(model, model_args, place)
        ],
    )


@pytest.fixture(scope="module")
def reference(folder, adapter):
    """Logits of every row's sides, by micro-batch, and loss and gradients of all."""
    model, missing = load_peft(load_thinker(folder), adapter, is_trainable=True)
    assert not missing
    rows, losses = make_rows(MediaTokenIds.read(folder)), []
    logits = [{"student": [], "teacher": []} for _ in rows]
    for number, of_batch in enumerate(rows):
        for row in of_batch:
            student = model(**row.inputs("student")).logits[0]
            with torch.no_grad(), model.disable_adapter():
                teacher = model(**row.inputs("teacher")).logits[0]
            logits[number]["student"].append(student.detach())
            logits[number]["teacher"].append(teacher)
            responses = (side[-len(row.response) - 1 : -1].double() for side in (student, teacher))
            losses.append(divergence(*responses, temperature=TEMPERATURE, kind="jsd", beta=BETA))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = peft_gradients(model, read_model_args(folder), RANK)
    return SimpleNamespace(logits=logits, loss=loss.item(), gradients=gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_equal_transformers(folder, adapter, reference, layout):
    results = run_ranks(run_layout, layout[0], folder, adapter, *layout[1:])
    for result in results:
        ours = iter(result.logits)
        for number in result.batches:
            for side in ("student", "teacher"):
                for row, (mine, expected) in enumerate(
                    zip(next(ours), reference.logits[number][side], strict=True)
                ):
                    difference = (mine - expected).abs().max().item()
                    assert difference < 1e-4, (
                        f"batch {number}, row {row}, {side}: logits differ by {difference}"
                    )
        assert result.means["loss"] == pytest.approx(reference.loss, rel=1e-5)
    check_gradients(results, reference.gradients)
    check_work(results)


def check_work(results):
    """No pass asks a tower again, text asks none, and tensor-parallel ranks read every patch once
    between them.
    """
    for result in results:
        assert result.encoded_once
        assert bool(result.calls) == (result.on_first_stage and result.batches != [2])
        assert result.has_features == [
            result.on_first_stage and number < 2 for number in result.batches
        ]
    first_stage = [result for result in results if result.on_first_stage]
    shown = sum(result.num_patches for result in first_stage) / results[0].tp_size
    assert sum(result.num_read for result in first_stage) == shown


def check_gradients(results, expected):
    """Of every rank, copies of replicated weights too, within 1e-4 of the largest of their kind;
    every element seen.
    """
    largest = {}
    for name, value in expected.items():
        kind = tuple(name.split(".")[-3:])
        largest[kind] = max(largest.get(kind, 0.0), value.abs().max().item())
    assert min(largest.values()) > 1e-5
    seen = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in expected.items()}
    for rank, result in enumerate(results):
        for name, index, value in result.gradients:
            limit = 1e-4 * largest[tuple(name.split(".")[-3:])]
            difference = (value - expected[name][index]).abs().max().item()
            assert difference < limit, (
                f"rank {rank}: gradient of {name} differs by {difference}, allowed {limit}"
            )
            seen[name][index] = True
    assert all(flags.all() for flags in seen.values())


ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
PLACE = SimpleNamespace(
    rank=0,
    is_first_stage=True,
    groups=SimpleNamespace(tp_cp=ALONE),
    pp_size=1,
    device=torch.device("cpu"),
)


def towers_of(folder, dtype=torch.float32, place=PLACE, **kinds):
    return build_towers(
        folder, read_model_args(folder), place, dtype, **{"audio": True, "visual": True} | kinds
    )


@pytest.mark.usefixtures("world_of_one")
def test_frozen_and_bit_for_bit_in_bfloat16(folder):
    """Tables of positions stay in fp32, as in transformers."""
    towers = towers_of(folder, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in towers.parameters())
    assert not any(module.training for module in towers.modules())
    model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16
    ).eval()
    row = make_rows(MediaTokenIds.read(folder))[1][2]
    inputs = row.inputs("student")
    with torch.no_grad():
        audio = model.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"]
        ).last_hidden_state
        image = model.get_image_features(
            inputs["pixel_values"].bfloat16(), inputs["image_grid_thw"]
        )
    features = towers.encode(make_batch([row], 1).media)
    assert features.embeddings.dtype == torch.bfloat16
    assert torch.equal(features.embeddings[: len(audio)], audio)
    num_image_tokens = len(image.pooler_output[0])
    assert torch.equal(features.embeddings[len(audio) :][:num_image_tokens], image.pooler_output[0])
    for layer, deepstack in enumerate(image.deepstack_features):
        assert torch.equal(features.deepstack[layer, :num_image_tokens], deepstack[0])


def features_of_rows(batches, media):
    """(row, side) -> each time that the row comes, what its media tokens get: embeddings, and
    those of the deepstack layers; without what is empty.
    """
    found = {}
    for index, batch in enumerate(batches):
        for side in ("student", "teacher"):
            view, features = getattr(batch, side), media[index]
            for row, start, end in zip(batch.rows, view.starts, view.starts[1:]):
                of_row = (view.media_rows >= start) & (view.media_rows < end)
                tokens = view.media_tokens[of_row]
                if features is None:
                    assert not len(tokens)
                    continue
                parts = [features.embeddings[tokens]]
                visual = tokens[tokens >= features.num_audio_tokens] - features.num_audio_tokens
                if features.deepstack is not None:
                    parts.append(features.deepstack[:, visual])
                assert features.deepstack is not None or not len(visual)
                found.setdefault((row, side), []).append([part for part in parts if part.numel()])
    return found


@pytest.mark.usefixtures("world_of_one")
def test_rows_in_other_micro_batches_have_the_same_features(folder):
    """In another order, some several times with other responses, beside other rows and apart: what
    was encoded once, bit for bit.
    """
    towers = towers_of(folder)
    batches, first = [], 0
    for of_batch in make_rows(MediaTokenIds.read(folder)):
        batches.append(make_batch(of_batch, 1, first))
        first += len(of_batch)
    media = StepMedia(towers, [batch.media for batch in batches])
    calls = []
    for tower in (towers.audio_tower, towers.visual):
        tower.register_forward_pre_hook(lambda *_: calls.append(tower))
    rows = {sample.row: sample for batch in batches for sample in batch.samples}
    assert sorted(rows) == list(range(11))
    numbers = [[10, 7, 0], [4], [9, 8], [5, 2, 7, 3], [1, 6, 7, 0]]
    samples = [
        [rows[row].with_response([index, row]) for row in of_batch] or [None]
        for index, of_batch in enumerate(numbers)
    ]
    regrouped = [collate(of_batch, Packing(0)) for of_batch in [*samples, [None]]]
    other = media.regrouped([batch.media for batch in regrouped])
    assert [index for index in range(6) if other[index] is None] == [2, 5]  # text, padding
    expected, found = features_of_rows(batches, media), features_of_rows(regrouped, other)
    assert not calls
    compared = 0
    for key, times in found.items():
        for parts in times:
            for part, wanted in zip(parts, expected.get(key, [[]])[0], strict=True):
                assert torch.equal(part, wanted)
                compared += 1
    assert len(found[7, "student"]) == 3 and len(found[0, "student"]) == 2 and compared > 20
    for index, batch in enumerate(regrouped):  # and what encoding them again would give
        again = towers.encode(batch.media)
        assert (again is None) == (other[index] is None)
        if again is not None:
            torch.testing.assert_close(other[index].embeddings, again.embeddings)
            if again.deepstack is not None:
                torch.testing.assert_close(other[index].deepstack, again.deepstack)


def test_shares_are_balanced():
    work = [7, 1, 1, 1, 5, 3]
    chunks = [Chunk(True, index, index + 1, index, 1) for index in range(len(work))]
    shares = balance(chunks, work, 3)
    assert sorted(chunk.start for share in shares for chunk in share) == list(range(len(work)))
    assert [sum(work[chunk.start] for chunk in share) for share in shares] == [7, 6, 5]


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    "kinds, message", [(dict(audio=False), "audio tower"), (dict(visual=False), "vision tower")]
)
def test_media_without_their_tower_are_refused(folder, kinds, message):
    batch = make_batch([make_rows(MediaTokenIds.read(folder))[1][2]], 1)
    with pytest.raises(ValueError, match=f"built without the {message}"):
        towers_of(folder, **kinds).encode(batch.media)


@pytest.mark.usefixtures("world_of_one")
def test_deepstack_must_fit_on_the_first_stage(folder):
    """Two decoder layers read the vision tower's features, a stage of four holds one; audio needs
    none.
    """
    stage = SimpleNamespace(**vars(PLACE) | {"pp_size": 4, "is_first_stage": False})
    with pytest.raises(
        ValueError,
        match="first 2 decoder layers.*4 pipeline stages holds 1.*parallel_size 2 or less",
    ):
        towers_of(folder, place=stage)
    assert towers_of(folder, place=stage, visual=False) is None


@pytest.mark.usefixtures("world_of_one")
def test_wrong_number_of_placeholders_is_refused(folder):
    batch = make_batch([make_rows(MediaTokenIds.read(folder))[0][0]], 1)
    batch.media.audio_tokens += 1
    with pytest.raises(
        ValueError, match="audio 0 of the batch: 50 frames make 7 tokens, its row has 8"
    ):
        towers_of(folder).encode(batch.media)


@pytest.fixture
def broken(folder, tmp_path):
    """`broken(change)` -> a copy of the folder with its tensors changed."""

    def make(change):
        copy = Path(shutil.copytree(folder, tmp_path / "model"))
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


NAME = "thinker.audio_tower.layers.0.fc2.weight"


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(NAME), f"misses tensor {NAME}"),
        (
            lambda tensors: tensors.update({"thinker.visual.x": torch.zeros(1)}),
            "unexpected tensor thinker.visual.x",
        ),
        (
            lambda tensors: tensors.update({NAME: torch.zeros(3, 5)}),
            rf"{NAME} has shape \[3, 5\], .* \[64, 128\]",
        ),
    ],
)
def test_wrong_tensors_are_named(broken, change, message):
    with pytest.raises(ValueError, match=message):
        towers_of(broken(change))


def test_width_of_another_decoder_is_refused(broken):
    copy = broken(lambda tensors: None)
    config = json.loads((copy / "config.json").read_text())
    config["thinker_config"]["audio_config"]["output_dim"] = 32
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="audio_config.output_dim is 32, the decoder's hidden_size 64"
    ):
        towers_of(copy)
