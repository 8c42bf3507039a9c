"""--recompute auto: the numbers of a run do not depend on how many layers are run again, and the
memory that a pass takes stays below the limit, at every layout.
"""

import random

import pytest
import torch

from megatron_gkd.data.micro_batches import Budget, cut, most_tokens
from megatron_gkd.recompute import Measured
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks
from tests.test_forward import gradients, make_samples, micro_batches, pack, pass_through
from tests.train_runs import (
    SMALL,
    arguments,
    build_parts,
    layout_flags,
    make_rows,
    read_lines,
    run_training,
    stable,
    write_rows,
)

LAYERS = 4


@pytest.fixture(scope="module")
def flags(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("recompute")
    return dict(
        model=tiny_folder(**SMALL | dict(num_hidden_layers=LAYERS)),
        dataset=write_rows(root / "rows.jsonl", make_rows(8)),
        output_dir=root / "out",
        lora_dropout=0.2,
    )


def _every_number(rank, world_size, argv):
    """Sums and gradients with so many layers run again, from all of the stage to none."""
    parts = build_parts(argv)
    batches = micro_batches(parts, parts.parallel, (3, 5))
    found = []
    for number in range(len(parts.model.decoder.layers), -1, -1):
        parts.model.decoder.config.recompute_num_layers = number
        means, grads, _ = pass_through(parts, parts.parallel, batches)
        found.append((means, [gradient.clone() for gradient in grads]))
    (means, grads), *others = found
    assert any(gradient.any() for gradient in grads)
    return [
        means == of_other and all(torch.equal(x, y) for x, y in zip(grads, of_grads, strict=True))
        for of_other, of_grads in others
    ]


LAYOUTS = [
    pytest.param(2, 2, 1, 2, 1, id="TP2 EP2"),
    pytest.param(1, 1, 1, 1, 1, id="1 rank", marks=pytest.mark.extended),
    pytest.param(4, 2, 2, 2, 1, id="TP2 PP2 EP2", marks=pytest.mark.extended),
    pytest.param(4, 1, 1, 4, 2, id="CP2 EP4", marks=pytest.mark.extended),
]


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_no_bit_depends_on_the_number(flags, world_size, tp, pp, ep, cp):
    argv = arguments(**flags, **layout_flags(tp, pp, ep, cp), recompute="auto")
    for same in run_ranks(_every_number, world_size, argv):
        assert same == [True] * (LAYERS // pp)


def _passes(rank, world_size, argv, num_micro_batches):
    """Student passes of 1, 2 and 8 rows. After the first of 8 rows the limit leaves room for half
    of the layers and one half more. (layers kept, bytes taken, bytes predicted) of each pass.
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward
    from megatron_gkd.parallel import seed_step
    from megatron_gkd.recompute import RESERVE, Recomputation

    parts = build_parts(argv)
    parallel, memory, samples = parts.parallel, LiveBytes(), make_samples(8)
    steps = [[pack(samples[-size:], parallel)] * num_micro_batches for size in (1, 2, 8, 8, 8)]
    most_tokens = steps[-1][0].student.size
    plan = Recomputation(parts.model.decoder, parallel, memory, most_tokens)
    memory.ignore([*parts.model.parameters(), *parts.model.buffers(), *gradients(parts)])
    memory.ignore(p.main_grad for p in parts.model.parameters() if p.requires_grad)
    in_flight = min(num_micro_batches, parallel.pp_size - parallel.pp_rank)
    memory.most_allowed = 0
    found = []
    for step, batches in enumerate(steps):
        seed_step(0, step, parallel)
        parts.optimizer.zero_grad()
        with memory:
            teacher = teacher_forward(parts.model, batches, parallel)
            before = memory.used()
            with plan.student_pass(batches):
                student_forward_backward(parts.ddp, batches, teacher, parts.loss, parallel)
        predicted = plan.measured.predict(most_tokens, in_flight, plan.kept)
        found.append((plan.kept, memory.peak() - before, predicted, memory.peak()))
        assert plan.config.recompute_num_layers == LAYERS // parallel.pp_size - plan.kept
        if step == 2:
            need = most_tokens, parallel.pp_size - parallel.pp_rank
            twice = LAYERS // parallel.pp_size + 1
            room = (plan.measured.predict(*need, 0) + plan.measured.predict(*need, twice)) // 2
            memory.most_allowed = round((memory.used() + room) / (1 - RESERVE))
    return found, memory.most_allowed


@pytest.mark.parametrize("world_size, tp, pp, ep, cp", LAYOUTS)
def test_as_many_layers_are_kept_as_fit(flags, world_size, tp, pp, ep, cp):
    """Bytes are those of all tensors that are alive. More layers than at first, once a pass that
    keeps some has been measured.
    """
    argv = arguments(**flags, **layout_flags(tp, pp, ep, cp), recompute="auto")
    for found, limit in run_ranks(_passes, world_size, argv, 3 if pp > 1 else 1):
        kept, taken, predicted, peak = zip(*found)
        half = LAYERS // pp // 2
        assert kept[:4] == (0, 0, 0, half) and kept[4] >= half, found
        assert max(peak[3:]) <= limit, found
        of_predicted = [t / p for t, p in zip(taken[2:], predicted[2:])]
        assert min(of_predicted) >= 0.85 and max(of_predicted) <= 1, found


def test_a_run_by_need_writes_what_one_without_does(flags):
    """So does one that is resumed, which measures again in its first step. Without dropout, whose
    product is another.
    """
    lines, outputs = {}, {name: flags["output_dir"] / name for name in ("none", "auto", "resumed")}
    more = dict(lora_dropout=0, max_steps=3, learning_rate=0.02, save_steps=1, save_total_limit=9)
    for name, output in outputs.items():
        given = (
            flags | more | dict(output_dir=output, recompute="none" if name == "none" else "auto")
        )
        if name == "resumed":
            given["resume_from_checkpoint"] = outputs["auto"] / "checkpoint-1"
        said = run_training(1, arguments(**given))
        lines[name] = stable(read_lines(output / "metrics.jsonl"))
    assert f"0 of {LAYERS} layers of a stage are run again" in said
    assert lines["auto"] == lines["none"] and len(lines["auto"]) == 3
    assert lines["resumed"] == lines["none"][1:]


def test_a_longer_micro_batch_than_any_before_is_counted_for():
    """Sizes are scaled by tokens, upwards only, and to the micro-batches of a pipeline."""
    measured = Measured(tokens=100, in_flight=1, layer_bytes=10, pass_bytes=40)
    assert measured.predict(100, 1, 3) == 70 and measured.predict(50, 1, 3) == 70
    assert measured.predict(250, 1, 3) == 175 and measured.predict(100, 2, 3) == 140


def test_the_largest_micro_batch_is_bounded():
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
        budget, multiple = Budget(draw.randint(20, 120)), draw.choice([1, 4])
        padded = [-(-length // multiple) * multiple for length in lengths]
        bound = most_tokens(max(lengths), len(lengths), budget, multiple)
        found = [sum(padded[row] for row in rows) for rows in cut(lengths, budget)[0]]
        assert max(found) <= bound <= max(max(padded), budget.max_tokens + 3 * len(lengths))
