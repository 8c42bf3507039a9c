"""A teacher with a frozen adapter of its own (--teacher_adapter): values and gradients equal peft's
with two adapters on one model, the two leave each other alone, and a run says, resumes and refuses
what it should.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd.data import Packing, Sample, View, collate
from megatron_gkd.forward import student_forward_backward, teacher_forward
from megatron_gkd.lora.adapter import adapter_slices, applied
from megatron_gkd.lora.apply import count_parameters, num_teacher_parameters
from megatron_gkd.lora.load import load_teacher
from megatron_gkd.lora.peft_folder import PeftAdapter
from megatron_gkd.lora.slots import STUDENT, TEACHER, activate, lora_modules
from megatron_gkd.model.args import read_model_args
from tests.adapters import (
    ALL,
    ATTENTION,
    EXPERTS,
    HEAD,
    linear_sizes,
    load_peft,
    load_thinker,
    peft_gradients,
    random_adapter,
    write_adapter,
)
from tests.logits import forward_logits
from tests.lora_runs import build, in_reducer, initialize, make_optimizer
from tests.ranks import run_ranks
from tests.reference_step import divergence, response_logits, views
from tests.test_media_towers import SETTINGS, TEMPERATURE, VOCAB_SIZE
from tests.train_runs import (
    SMALL,
    arguments,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    stable,
    write_rows,
)

STUDENT_LORA = dict(rank=3, alpha=5, targets=["q_proj", "v_proj", *EXPERTS])
TEACHER_LORA = {  # each has another rank, alpha and other linears than the student
    "attention": dict(rank=2, alpha=7, targets=ATTENTION),
    "all": dict(rank=5, alpha=2, targets=ALL),
    "o and lm_head": dict(rank=4, alpha=3, targets=["o_proj", HEAD]),
}
assert VOCAB_SIZE == SMALL["vocab_size"]
ROWS = make_rows(8, seed=4)
PROBE = [3, 141, 59, 26, 53, 58, 97, 93]


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder(**SMALL)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Name -> PEFT folder: the student's, and each teacher's."""
    model_args = read_model_args(folder)
    settings = {"student": STUDENT_LORA} | TEACHER_LORA
    return {
        name: write_adapter(
            tmp_path_factory.mktemp("adapter"),
            random_adapter(model_args, lora["rank"], lora["targets"], seed=seed),
            **lora,
        )
        for seed, (name, lora) in enumerate(settings.items(), start=20)
    }


@pytest.fixture(scope="module")
def references(folder, adapters):
    """Teacher -> the mean JSD of ROWS, its gradients and both sides' logits of PROBE, by peft: two
    adapters on one model.
    """
    found, model_args = {}, read_model_args(folder)
    for name in TEACHER_LORA:
        model, missing = load_peft(load_thinker(folder), adapters["student"], is_trainable=True)
        assert not missing
        model.load_adapter(adapters[name], adapter_name="teacher")
        model.eval()
        logits = lambda ids: model(input_ids=torch.tensor([ids])).logits[0]
        model.set_adapter("teacher")
        of_rows = [views(row) for row in ROWS]
        with torch.no_grad():
            teachers = [
                response_logits(logits(ids), labels)[0].double() for _, _, ids, labels in of_rows
            ]
            probe = {TEACHER: logits(PROBE)}
        model.set_adapter("default")
        students = [
            response_logits(logits(ids), labels)[0].double() for ids, labels, _, _ in of_rows
        ]
        losses = [
            divergence(*pair, temperature=TEMPERATURE, kind="jsd", beta=0.5)
            for pair in zip(students, teachers)
        ]
        loss = torch.cat(losses).mean()
        loss.backward()
        with torch.no_grad():
            probe |= {STUDENT: logits(PROBE)}
            with model.disable_adapter():
                probe |= {None: logits(PROBE)}
        found[name] = SimpleNamespace(
            loss=loss.item(),
            gradients=peft_gradients(model, model_args, STUDENT_LORA["rank"]),
            probe=probe,
        )
        assert (probe[TEACHER] - probe[None]).abs().max() > 0.2, "the adapter must show"
        assert (probe[TEACHER] - probe[STUDENT]).abs().max() > 0.2
    return found


def micro_batches(place):
    """ROWS in two micro-batches over the data-parallel ranks."""
    samples = []
    for number, row in enumerate(ROWS):
        ids, labels, teacher_ids, teacher_labels = views(row)
        first = [next(i for i, label in enumerate(of) if label != -100) for of in (labels,)][0]
        prompt = len(row["teacher_input_ids"])
        samples.append(
            Sample(
                View(ids, labels, first),
                View(teacher_ids, teacher_labels, prompt),
                "",
                number,
                0,
            )
        )
    mine = samples[place.dp_rank :: place.dp_size]
    half = len(mine) // 2
    packing = Packing(0, place.sequence_multiple, place.row_multiple)
    return [collate(part, packing) for part in (mine[:half], mine[half:])]


def copies(model, slot):
    return [
        parameter.detach().clone()
        for module in lora_modules(model)
        if slot in module.slots
        for parameter in module.slots[slot].parameters()
    ]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def distil(rank, world_size, tp, pp, ep, recompute, folder, student, teachers):
    """For each teacher adapter: logits, one step's loss, gradients and norm, and what three steps
    of training leave of either adapter.
    """
    place = initialize(tp, pp, ep)
    probe, results = torch.tensor([PROBE]), []

    def probed(model, model_args):
        found = {}
        for slot in (STUDENT, TEACHER, None):
            with activate(model, slot):
                found[slot] = forward_logits(model, model_args, place, probe)[0]
        return found

    for teacher in teachers:
        model_args, model = build(place, folder, student, recompute=recompute)
        model.eval()
        without = probed(model, model_args)
        opened = PeftAdapter(teacher, model_args)
        load_teacher(model, model_args, place, opened)
        logits, counted = probed(model, model_args), num_teacher_parameters(model_args, model)
        ddp = in_reducer(model).train()
        optimizer, batches = make_optimizer(ddp, place), micro_batches(place)
        before = {slot: copies(model, slot) for slot in (STUDENT, TEACHER)}
        norms = []
        for step in range(3):
            optimizer.zero_grad()
            hidden = teacher_forward(model, batches, place)
            sums = student_forward_backward(ddp, batches, hidden, SETTINGS, place)
            if step == 0:
                means = sums.means(place)
                gradients = [
                    (part.stored.name, part.stored.index, part.parameter.main_grad[part.where])
                    for part in adapter_slices(model, model_args, place)
                ]
                gradients = [(name, index, value.clone()) for name, index, value in gradients]
            update = optimizer.step(0.01, means["loss"])
            norms.append(update.grad_norm)
            assert update.applied
        of_optimizer = set(map(id, optimizer.moments()))
        of_slot = {
            slot: {
                id(parameter)
                for module in lora_modules(model)
                if slot in module.slots
                for parameter in module.slots[slot].parameters()
            }
            for slot in (STUDENT, TEACHER)
        }
        model.eval()
        results.append(
            SimpleNamespace(
                logits=logits,
                loss=means["loss"],
                gradients=gradients,
                norm=norms[0],
                alone=torch.equal(without[TEACHER], without[None])
                and torch.equal(without[None], logits[None])
                and torch.equal(without[STUDENT], logits[STUDENT]),
                frozen=equal(before[TEACHER], copies(model, TEACHER)),
                same_teacher=torch.equal(probed(model, model_args)[TEACHER], logits[TEACHER]),
                trained=not any(map(torch.equal, before[STUDENT], copies(model, STUDENT))),
                only_student_is_optimized=of_optimizer == of_slot[STUDENT]
                and not any(
                    hasattr(parameter, "main_grad") or parameter.requires_grad
                    for parameter in model.parameters()
                    if id(parameter) in of_slot[TEACHER]
                ),
                counted=counted,
                applied=(applied(model).rank, applied(model, TEACHER).rank),
            )
        )
    return results


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, recompute",
    [
        pytest.param(1, 1, 1, 1, False, id="one rank"),
        pytest.param(2, 2, 1, 2, True, id="TP2 EP2, recompute", marks=pytest.mark.extended),
        pytest.param(2, 1, 2, 1, False, id="PP2"),
        pytest.param(4, 2, 2, 2, True, id="TP2 PP2 EP2, recompute", marks=pytest.mark.smoke),
        pytest.param(4, 4, 1, 2, False, id="TP4 EP2", marks=pytest.mark.extended),
    ],
)
def test_a_step_equals_peft_with_two_adapters(
    folder, adapters, references, world_size, tp, pp, ep, recompute
):
    names = list(TEACHER_LORA)
    by_rank = run_ranks(
        distil,
        world_size,
        tp,
        pp,
        ep,
        recompute,
        folder,
        adapters["student"],
        [adapters[name] for name in names],
    )
    model_args = read_model_args(folder)
    for number, name in enumerate(names):
        reference, lora = references[name], TEACHER_LORA[name]
        results = [of_rank[number] for of_rank in by_rank]
        expected = reference.gradients
        norm = torch.stack([value.norm() for value in expected.values()]).norm().item()
        largest = {}
        for tensor, value in expected.items():
            kind = tuple(tensor.split(".")[-3:])
            largest[kind] = max(largest.get(kind, 0.0), value.abs().max().item())
        assert min(largest.values()) > 1e-4, "the reference's own gradients must not vanish"
        sizes = linear_sizes(model_args, lora["targets"]).values()
        seen = set()
        for result in results:
            for slot, wanted in reference.probe.items():
                assert (result.logits[slot] - wanted).abs().max() < 1e-4, (name, slot)
            assert result.loss == pytest.approx(reference.loss, rel=1e-4)
            assert result.norm == pytest.approx(norm, rel=1e-4)
            for tensor, index, value in result.gradients:
                seen.add(tensor)
                limit = 1e-4 * largest[tuple(tensor.split(".")[-3:])]
                assert (value - expected[tensor][index]).abs().max() < limit, (name, tensor)
            assert result.alone, "the slot must change neither the student nor the base"
            assert result.frozen and result.same_teacher and result.trained
            assert result.only_student_is_optimized
            assert result.counted == sum(lora["rank"] * (d_in + d_out) for d_in, d_out in sizes)
            assert result.applied == (STUDENT_LORA["rank"], lora["rank"])
        assert seen == set(expected)


# --- the command line ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return dict(
        dataset=write_rows(root / "rows.jsonl", ROWS),
        plain=write_rows(root / "plain.jsonl", make_rows(8, with_teacher=False)),
    )


def flags_of_run(folder, data, output, **flags) -> list[str]:
    settings = dict(
        model=folder,
        dataset=data["dataset"],
        output_dir=output,
        per_device_train_batch_size=8,
        max_steps=4,
        learning_rate=0.01,
    )
    return arguments(**(settings | flags))


def saved(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "adapter_model.safetensors")


def test_a_run_says_and_saves_what_it_should(folder, adapters, data, tmp_path):
    """The banner and run.json name the teacher's adapter, checkpoints hold the student's alone, and
    the folder of the teacher is only read.
    """
    teacher, before = Path(adapters["attention"]), {}
    for path in teacher.iterdir():
        before[path.name] = path.read_bytes()
    flags = dict(teacher_adapter=teacher, lora_rank=3, lora_alpha=6, save_steps=2, max_steps=2)
    said = run_training(1, flags_of_run(folder, data, tmp_path, **flags))
    model_args = read_model_args(folder)
    lora = TEACHER_LORA["attention"]
    sizes = linear_sizes(model_args, lora["targets"]).values()
    number = sum(lora["rank"] * (d_in + d_out) for d_in, d_out in sizes)
    assert f"  - Teacher model: base_model + frozen adapter {teacher} ({number:,} param" in said
    assert "base_model + LoRA (trainable)" in said and "LoRA disabled" not in said
    trainable, total = count_parameters(model_args, 3, ALL)
    assert json.loads((tmp_path / "run.json").read_text())["parameters"] == {
        "trainable": trainable,
        "total": total + number,
        "teacher_adapter": number,
    }
    config = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 6
    assert {value.shape[0] for name, value in saved(tmp_path, 2).items() if ".lora_A." in name} == {
        3
    }
    assert before == {path.name: path.read_bytes() for path in teacher.iterdir()}
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[0]["jsd"] > 1e-3 and lines[1]["jsd"] < lines[0]["jsd"]


def test_the_same_view_teaches(folder, adapters, data, tmp_path):
    """Rows without a teacher view: the adapter is the signal, unless the student starts from it."""
    same_view = dict(dataset=data["plain"], max_steps=2)
    flags = same_view | dict(teacher_adapter=adapters["all"])
    run_training(2, flags_of_run(folder, data, tmp_path / "fresh", **flags, **layout_flags(tp=2)))
    first, second = read_lines(tmp_path / "fresh" / "metrics.jsonl")
    assert first["jsd"] > 1e-3 and first["grad_norm"] > 1e-3 and second["jsd"] < first["jsd"]
    run_training(
        1, flags_of_run(folder, data, tmp_path / "other", **flags, adapter=adapters["student"])
    )
    linked = tmp_path / "linked"
    linked.symlink_to(adapters["all"])
    copied = shutil.copytree(adapters["all"], tmp_path / "copied")
    for given in (linked, copied):
        with pytest.raises(RuntimeError, match="SystemExit: 2") as error:
            run_training(1, flags_of_run(folder, data, tmp_path / "same", **flags, adapter=given))
        assert (
            f"--teacher_adapter {adapters['all']} is the adapter that the student starts from"
            in (str(error.value))
        )
    checkpoint = tmp_path / "fresh" / "checkpoint-2"
    resumed = same_view | dict(teacher_adapter=checkpoint, resume_from_checkpoint=checkpoint)
    with pytest.raises(RuntimeError, match="the adapter that the student starts from"):
        run_training(1, flags_of_run(folder, data, tmp_path / "same", **resumed))
    equal_functions = flags | dict(adapter=adapters["all"], allow_zero_signal=True, max_steps=1)
    run_training(1, flags_of_run(folder, data, tmp_path / "zero", **equal_functions))
    (line,) = read_lines(tmp_path / "zero" / "metrics.jsonl")
    assert abs(line["jsd"]) < 1e-7


def test_a_resumed_run_is_bit_identical(folder, adapters, data, tmp_path):
    """At dropout, with on-policy steps and evaluation; another teacher is said, and changes the
    run.
    """
    flags = dict(
        teacher_adapter=adapters["o and lm_head"],
        lora_dropout=0.1,
        lmbda=0.5,
        max_completion_length=4,
        save_steps=2,
        val_dataset=data["plain"],
        eval_steps=2,
        **layout_flags(tp=2, ep=2),
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(2, flags_of_run(folder, data, whole, **flags))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")
    resume = flags | dict(resume_from_checkpoint=cut / "checkpoint-2")
    said = run_training(2, flags_of_run(folder, data, cut, **resume))
    assert "at step 2 of 4" in said and "Note: teacher_adapter" not in said
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert stable(read_lines(whole / name)) == stable(read_lines(cut / name))
    first, second = saved(whole, 4), saved(cut, 4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    other = tmp_path / "other"
    resume |= dict(teacher_adapter=adapters["all"])
    said = run_training(2, flags_of_run(folder, data, other, **resume))
    assert (
        f"Note: teacher_adapter was {adapters['o and lm_head']} and is {adapters['all']}: the "
        "resumed run will differ" in said
    )
    assert any(not torch.equal(first[name], value) for name, value in saved(other, 4).items())


def test_a_new_stage_at_another_rank(folder, adapters, data, tmp_path):
    """The student's rank changes, the teacher's adapter stays what it is."""
    flags = dict(teacher_adapter=adapters["all"], lora_rank=2, max_steps=1, save_steps=1)
    run_training(1, flags_of_run(folder, data, tmp_path / "one", **flags))
    checkpoint = tmp_path / "one" / "checkpoint-1"
    flags |= dict(lora_rank=6, resume_from_checkpoint=checkpoint)
    said = run_training(1, flags_of_run(folder, data, tmp_path / "two", **flags))
    assert "New stage from" in said and "LoRA rank 2 -> 6" in said
    assert {
        value.shape[0] for name, value in saved(tmp_path / "two", 1).items() if "_A." in name
    } == {6}


def test_the_teacher_writes(folder, adapters, data, tmp_path):
    """--seq_kd: greedy responses are those of peft's model with the teacher's adapter."""
    flags = dict(
        teacher_adapter=adapters["all"],
        seq_kd=True,
        rollout_temperature=0,
        repetition_penalty=1,
        max_completion_length=4,
        max_steps=1,
    )
    run_training(1, flags_of_run(folder, data, tmp_path / "one", **flags))
    run_training(2, flags_of_run(folder, data, tmp_path / "two", **flags, **layout_flags(2, 1, 2)))
    model, _ = load_peft(load_thinker(folder), adapters["all"])
    stops = json.loads(Path(folder, "generation_config.json").read_text())["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    num_tokens = 0
    for row in ROWS:
        text, response = list(row["teacher_input_ids"]), []
        while len(response) < 4 and not set(response) & set(stops):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text + response])).logits[0, -1]
            response.append(int(logits.argmax()))
        num_tokens += len(response)
    for output in ("one", "two"):
        (line,) = read_lines(tmp_path / output / "metrics.jsonl")
        assert line["num_tokens"] == num_tokens
    base = flags | dict(teacher_adapter=None)
    run_training(1, flags_of_run(folder, data, tmp_path / "base", **base))
    (of_base,) = read_lines(tmp_path / "base" / "metrics.jsonl")
    assert of_base["jsd"] != line["jsd"]


def test_a_folder_that_does_not_fit_is_refused_by_its_flag(
    folder, adapters, tiny_folder, data, tmp_path
):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    shutil.copytree(adapters["all"], broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    other_sizes = tiny_folder(**(SMALL | dict(hidden_size=48)))
    lora = TEACHER_LORA["attention"]
    tensors = random_adapter(read_model_args(other_sizes), lora["rank"], lora["targets"])
    misfit = write_adapter(tmp_path / "misfit", tensors, **lora)
    for given, problem in {
        empty: "no adapter_config.json; expected a PEFT adapter folder",
        tmp_path / "missing": "no adapter_config.json; expected a PEFT adapter folder",
        broken: "use_dora = True is not supported",
        misfit: "ask for",
    }.items():
        with pytest.raises(RuntimeError, match="SystemExit: 2") as error:
            run_training(
                1, flags_of_run(folder, data, tmp_path / "out", teacher_adapter=str(given))
            )
        message = str(error.value)
        assert f"--teacher_adapter {given}" in message and problem in message, message[-500:]
    tied = tiny_folder(**SMALL, tie_word_embeddings=True)
    with pytest.raises(RuntimeError, match="--teacher_adapter .*has LoRA on the lm_head, which is"):
        run_training(
            1, flags_of_run(tied, data, tmp_path / "out", teacher_adapter=adapters["o and lm_head"])
        )
