"""--lora_towers: LoRA on the towers' attention and MLP equals peft's in value and gradient, is
saved, loaded, merged and resumed; it lands there only on purpose.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from checkpoint_tools.lower_rank import LowerRankConfig, lower
from checkpoint_tools.merge_lora import MergeLoraConfig, convert
from megatron_gkd.checkpoint import load_checkpoint, save_checkpoint
from megatron_gkd.forward import student_forward_backward, teacher_forward, view_logits
from megatron_gkd.lora import as_teacher
from megatron_gkd.lora.adapter import adapter_slices, tower_loras, tower_tensors
from megatron_gkd.lora.apply import count_parameters
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import activate
from megatron_gkd.media.positions import MediaTokenIds
from megatron_gkd.media.towers import StepMedia, build_towers
from megatron_gkd.model.args import read_model_args
from tests.adapters import THINKER, load_peft, load_thinker, load_whole
from tests.lora_runs import in_reducer, initialize, make_optimizer
from tests.packed import rows_of
from tests.random_media import make_rows
from tests.ranks import run_ranks
from tests.reference_step import divergence
from tests.test_media_towers import SETTINGS, TEMPERATURE
from tests.tower_adapters import (
    ALPHA,
    AUDIO,
    RANK,
    TARGETS,
    VISUAL,
    build_thinker,
    make_model,
    my_batches,
    write_teacher_adapter,
    write_tower_adapter,
)
from tests.train_runs import arguments, build_parts, run_training, write_rows
from tests.train_runs import make_rows as text_rows

DROPOUT = 0.25
LAYOUTS = [
    pytest.param((1, 1, 1, True), id="single-recompute"),
    pytest.param((2, 2, 1, False), id="TP2"),
    pytest.param((4, 2, 2, True), id="TP2-PP2-recompute", marks=pytest.mark.smoke),
    pytest.param((3, 1, 1, False), id="DP3-text-on-one-rank"),
    pytest.param((4, 2, 1, True, 2), id="TP2-CP2-recompute"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_thinker(tmp_path_factory.mktemp("model") / "thinker")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """LoRA on attention of the decoder and on both towers, as a PEFT folder."""
    return write_tower_adapter(folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def teacher_adapter(folder, tmp_path_factory):
    return write_teacher_adapter(folder, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def decoder_adapter(folder, tmp_path_factory):
    """LoRA on attention of the decoder alone."""
    return write_tower_adapter(folder, tmp_path_factory.mktemp("decoder"), towers=[])


def peft_name(name: str) -> str:
    """A parameter of PEFT's model under the adapter's names."""
    for prefix in ("audio_tower.", "visual."):
        if f".{prefix}" in name:
            return THINKER + prefix + name.split(f".{prefix}")[1].replace(".default", "")
    return f"{THINKER}model.layers.{name.split('layers.')[1].replace('.default', '')}"


def reference_of(folder: str, student: str, teacher: str | None = None) -> SimpleNamespace:
    """peft's logits of each row's student and teacher; mean JSD and its gradients. teacher: the
    adapter that the teacher has, beside the student's on the same model.
    """
    model, missing = load_peft(load_thinker(folder), student, is_trainable=True)
    assert not missing
    if teacher:
        model.load_adapter(teacher, adapter_name="teacher")
        model.eval()
    rows = [row for of_batch in make_rows(MediaTokenIds.read(folder)) for row in of_batch]
    with torch.no_grad():
        if teacher:
            model.set_adapter("teacher")
            teachers = [model(**row.inputs("teacher")).logits[0] for row in rows]
            model.set_adapter("default")
        else:
            with model.disable_adapter():
                teachers = [model(**row.inputs("teacher")).logits[0] for row in rows]
    logits, losses = [], []
    for row, of_teacher in zip(rows, teachers):
        of_student = model(**row.inputs("student")).logits[0]
        logits.append((of_student.detach(), of_teacher))
        responses = (
            side[-len(row.response) - 1 : -1].double() for side in (of_student, of_teacher)
        )
        losses.append(divergence(*responses, temperature=TEMPERATURE, kind="jsd", beta=0.5))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {
        peft_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name and ".default." in name
    }
    return SimpleNamespace(logits=logits, loss=loss.item(), gradients=gradients)


@pytest.fixture(scope="module")
def reference(folder, adapter):
    """Of the base as the teacher."""
    found = reference_of(folder, adapter)
    assert len(found.gradients) == 2 * (4 * len(TARGETS) + 2 * len(AUDIO) + 3 * len(VISUAL))
    return found


def logits_of(place, model_args, model, batches):
    """{row: (student's, teacher's)}."""
    media, found = StepMedia(model.towers, [batch.media for batch in batches]), {}
    for index, batch in enumerate(batches):
        sides = []
        for side in ("student", "teacher"):
            with activate(model, side):
                features = media[index] if model.towers is not None else None
                view = getattr(batch, side)
                sides.append(rows_of(view_logits(model, model_args, place, view, features), view))
        found |= {row: pair for row, pair in zip(batch.rows, zip(*sides))}
    return found


def run_layout(rank, world_size, folder, adapter, output, tp, pp, recompute, cp=1, **more):
    place = initialize(tp, pp, 1, cp)
    model_args, model = make_model(place, folder, adapter=adapter, recompute=recompute, **more)
    batches = my_batches(place, folder, tp)
    with torch.no_grad():
        logits = logits_of(place, model_args, model, batches)
    ddp = in_reducer(model)
    ddp.train()
    optimizer = make_optimizer(ddp, place)
    optimizer.zero_grad()
    media = StepMedia(model.towers, [batch.media for batch in batches])
    teacher = teacher_forward(model, batches, place, media)
    sums = student_forward_backward(ddp, batches, teacher, SETTINGS, place, media)
    means = sums.means(place)
    gradients = [
        (piece.stored.name, piece.stored.index, piece.parameter.main_grad[piece.where].clone())
        for piece in adapter_slices(model, model_args, place)
    ]
    norm = optimizer.step(0.01, means["loss"]).grad_norm
    saved = save_checkpoint(
        output,
        1,
        model=model,
        model_args=model_args,
        parallel=place,
        alpha=ALPHA,
        dropout=0.0,
        base_model=folder,
        optimizer=optimizer,
        state={},
    )
    with torch.no_grad():
        after = logits_of(place, model_args, model, batches)
    return SimpleNamespace(
        logits=logits, means=means, gradients=gradients, norm=norm, saved=saved, after=after
    )


@pytest.fixture(scope="module")
def runs(folder, adapter, tmp_path_factory):
    """layout -> what its ranks found, run once."""
    made = {}

    def run(layout):
        if layout not in made:
            output = str(tmp_path_factory.mktemp("run"))
            made[layout] = run_ranks(run_layout, layout[0], folder, adapter, output, *layout[1:])
        return made[layout]

    return run


def check(results, reference):
    norm = sum(float(value.square().sum()) for value in reference.gradients.values()) ** 0.5
    largest, seen = {}, set()
    for name, value in reference.gradients.items():
        kind = tuple(name.split(".")[-3:])
        largest[kind] = max(largest.get(kind, 0.0), value.abs().max().item())
    assert min(largest.values()) > 1e-5
    for result in results:
        for row, pair in result.logits.items():
            for mine, expected in zip(pair, reference.logits[row], strict=True):
                assert (mine - expected).abs().max() < 1e-4, row
        assert result.means["loss"] == pytest.approx(reference.loss, rel=1e-5)
        assert result.norm == pytest.approx(norm, rel=1e-4)
        for name, index, value in result.gradients:
            seen.add(name)
            difference = (value - reference.gradients[name][index]).abs().max().item()
            assert difference < 1e-4 * largest[tuple(name.split(".")[-3:])], (name, difference)
    assert seen == set(reference.gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_equal_peft(runs, reference, layout):
    check(runs(layout), reference)


def with_teacher(rank, world_size, folder, output, layouts):
    """One run for each (adapter, whether on the towers, teacher's adapter, TP, PP, recompute)."""
    results = []
    for adapter, towers, teacher, tp, pp, recompute in layouts:
        arguments = (folder, adapter, output, tp, pp, recompute)
        results.append(run_layout(rank, world_size, *arguments, teacher=teacher, towers=towers))
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize(
    "world_size, tp, pp",
    [(1, 1, 1), (2, 2, 1), pytest.param(2, 1, 2, marks=pytest.mark.extended)],
)
def test_a_teacher_with_towers_equals_peft(
    folder,
    adapter,
    decoder_adapter,
    teacher_adapter,
    teacher_references,
    tmp_path,
    world_size,
    tp,
    pp,
):
    """LoRA on the towers of the teacher alone (they encode once for each side), and of both; the
    checkpoint holds the student's.
    """
    cases = [
        (decoder_adapter, False, teacher_adapter, tp, pp, False),
        (adapter, True, teacher_adapter, tp, pp, True),
        (decoder_adapter, False, adapter, tp, pp, True),
    ]
    by_rank = run_ranks(with_teacher, world_size, folder, str(tmp_path), cases)
    for number, case in enumerate(cases):
        results = [of_rank[number] for of_rank in by_rank]
        check(results, teacher_references[case[0], case[2]])
        before, after = (
            {row: pair[1] for row, pair in logits.items()}
            for logits in (results[0].logits, results[0].after)
        )
        assert all(torch.equal(value, after[row]) for row, value in before.items())
    saved = load_file(Path(results[0].saved, "adapter_model.safetensors"))
    assert set(saved) == set(teacher_references[decoder_adapter, adapter].gradients)


@pytest.fixture(scope="module")
def teacher_references(folder, adapter, decoder_adapter, teacher_adapter, reference):
    """(student's adapter, teacher's) -> what peft makes of them."""
    pairs = [(decoder_adapter, teacher_adapter), (adapter, teacher_adapter)]
    found = {pair: reference_of(folder, *pair) for pair in [*pairs, (decoder_adapter, adapter)]}
    for other in found.values():
        changes = [(a[1] - b[1]).abs().max() for a, b in zip(other.logits, reference.logits)]
        assert min(changes) > 0.05, "the teacher's adapter must show"
    return found


def test_saved_adapter_is_pefts(folder, runs):
    """After a step at TP 2, PP 2: peft loads it on the whole model, with the same logits; all
    layouts save the same.
    """
    results = runs((4, 2, 2, True))
    model, missing = load_peft(load_whole(folder), results[0].saved)
    assert not missing
    rows = [row for of_batch in make_rows(MediaTokenIds.read(folder)) for row in of_batch]
    thinker = model.base_model.model.thinker
    for number in (0, 4, 7):
        with torch.no_grad():
            expected = thinker(**rows[number].inputs("student")).logits[0]
        assert (results[0].after[number][0] - expected).abs().max() < 1e-4
    folders = [run[0].saved for run in (results, runs((1, 1, 1, True)))]
    here, there = (load_file(Path(saved, "adapter_model.safetensors")) for saved in folders)
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.allclose(value, there[name], atol=2e-4), name


def resume(rank, world_size, folder, saved, tp):
    """Logits, and the moments of one tower's matrix, after a resume."""
    place = initialize(tp, 1, 1)
    model_args, model = make_model(place, folder)
    ddp = in_reducer(model)
    optimizer = make_optimizer(ddp, place)
    load_checkpoint(
        Path(saved), model=model, model_args=model_args, parallel=place, optimizer=optimizer
    )
    with torch.no_grad():
        logits = logits_of(place, model_args, model, my_batches(place, folder, tp))
    slot = tower_loras(model)["visual.blocks.1.attn.qkv"]
    return logits, optimizer.moments()[slot.up["qkv"]]["exp_avg"].clone()


def test_resume_at_another_layout(folder, runs):
    before = runs((4, 2, 2, True))[0]
    for logits, moment in run_ranks(resume, 2, folder, str(before.saved), 2):
        assert moment.any()
        for row, (student, _) in logits.items():
            assert (student - before.after[row][0]).abs().max() < 1e-4


def modes(rank, world_size, folder, adapter):
    """Off and a fresh start are the base bit for bit; dropout needs training mode; counts."""
    place = initialize(1, 1, 1)
    _, fresh = make_model(place, folder)
    model_args, model = make_model(place, folder, adapter=adapter, dropout=DROPOUT)
    batch = my_batches(place, folder, 1)[0]
    base = (
        build_towers(folder, model_args, place, torch.float32, audio=True, visual=True)
        .encode(batch.media)
        .embeddings
    )
    with torch.no_grad():
        with as_teacher(model):
            off = StepMedia(model.towers, [batch.media])[0].embeddings
        model.eval()
        still = [StepMedia(model.towers, [batch.media])[0].embeddings for _ in range(2)]
        model.train()
        dropped = [StepMedia(model.towers, [batch.media])[0].embeddings for _ in range(2)]
    of_towers = sum(a * b for a, b in tower_tensors(model, model_args).values())
    tower_sizes = sum(p.numel() for p in model.towers.parameters() if not p.requires_grad)
    alone, both = (
        count_parameters(model_args, RANK, TARGETS),
        count_parameters(model_args, RANK, TARGETS, model),
    )
    return (
        torch.equal(base, off) and torch.equal(base, fresh.towers.encode(batch.media).embeddings),
        torch.equal(*still) and not torch.equal(still[0], base),
        torch.equal(*dropped),
        both == (alone[0] + of_towers, alone[1] + of_towers + tower_sizes) and of_towers > 0,
        [
            name
            for name, module in model.towers.named_modules()
            if module.training and not hasattr(module, "base")
        ],
    )


def test_toggle_dropout_and_counts(folder, adapter):
    ((off_is_base, still, dropped_same, counts, training),) = run_ranks(modes, 1, folder, adapter)
    assert off_is_base and still and not dropped_same and counts and not training


def test_merge_and_lower_rank(folder, adapter, tmp_path):
    """W + scale B A in the towers' tensors too, and a lower rank keeps their LoRA."""
    convert(
        MergeLoraConfig(
            hf_model=folder, adapter=[adapter], output=str(tmp_path / "merged"), num_workers=1
        )
    )
    tensors, name = (
        load_file(Path(adapter, "adapter_model.safetensors")),
        "audio_tower.layers.1.self_attn.out_proj",
    )
    base, merged = (
        load_file(Path(where, "model.safetensors")) for where in (folder, tmp_path / "merged")
    )
    update = (
        tensors[f"{THINKER}{name}.lora_B.weight"]
        @ tensors[f"{THINKER}{name}.lora_A.weight"]
        * ALPHA
        / RANK
    )
    assert torch.allclose(
        merged[f"thinker.{name}.weight"], base[f"thinker.{name}.weight"] + update, atol=1e-5
    )
    assert torch.equal(merged[f"thinker.{name}.bias"], base[f"thinker.{name}.bias"])
    lower(
        LowerRankConfig(
            hf_model=folder, adapter=adapter, output=str(tmp_path / "lower"), lora_rank=1
        )
    )
    model_args = read_model_args(folder)
    lowered, whole = PeftAdapter(tmp_path / "lower", model_args), PeftAdapter(adapter, model_args)
    assert lowered.rank == 1 and lowered.towers == whole.towers
    assert len(whole.towers) == 2 * len(AUDIO) + 3 * len(VISUAL)
    _, missing = load_peft(load_thinker(folder), str(tmp_path / "lower"))
    assert not missing


def parts_of(rank, world_size, argv, kinds):
    try:
        parts = build_parts(argv, **kinds)
    except ValueError as error:
        return str(error)
    return [
        name
        for name, p in parts.model.named_parameters()
        if p.requires_grad and name.startswith("towers.")
    ]


@pytest.mark.parametrize(
    "flags, kinds, expected",
    [
        (["--lora_target_modules", "ALL"], dict(audio=True, visual=True), []),  # never by accident
        (["--lora_towers", "true"], {}, "--lora_towers: no row of the data has audio"),
        (["--adapter", "ADAPTER"], dict(audio=True), "has LoRA on 24 linears of the towers"),
        (["--adapter", "ADAPTER"], {}, []),  # text does not reach the towers
    ],
)
def test_only_on_purpose(folder, adapter, tmp_path, flags, kinds, expected):
    argv = [
        "--model",
        folder,
        "--dataset",
        "unused.jsonl",
        "--device",
        "cpu",
        "--torch_dtype",
        "float32",
    ]
    argv += [
        "--output_dir",
        str(tmp_path),
        *(adapter if word == "ADAPTER" else word for word in flags),
    ]
    (found,) = run_ranks(parts_of, 1, argv, kinds)
    assert found == expected if expected == [] else expected in found


def test_text_does_not_reach_the_towers_of_the_teacher(folder, teacher_adapter, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(4))
    said = run_training(
        1,
        arguments(
            model=folder,
            dataset=rows,
            output_dir=tmp_path,
            teacher_adapter=teacher_adapter,
            per_device_train_batch_size=4,
            max_steps=1,
        ),
    )
    assert f"Note: {teacher_adapter}: has LoRA on 12 linears of the towers" in said
    assert "which text does not reach: it is left out" in said
    num_parameters = json.loads((tmp_path / "run.json").read_text())["parameters"]
    assert num_parameters["teacher_adapter"] == 4 * 3 * ((64 + 64) + (128 + 64))


def test_half_an_adapter_is_refused(folder, adapter, tmp_path):
    tensors = load_file(Path(adapter, "adapter_model.safetensors"))
    del tensors[f"{THINKER}visual.blocks.0.attn.qkv.lora_A.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(Path(adapter, "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="misses tensor .*visual.blocks.0.attn.qkv.lora_A.weight"):
        PeftAdapter(tmp_path, read_model_args(folder))
