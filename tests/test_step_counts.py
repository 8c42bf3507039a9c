"""What a training step costs, counted on a CPU rank with LoRA and dropout on every linear and with
recomputation: launches of each layer and of the rest, and waits of the host. docs/training_step.md
states the numbers.
"""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.counting import Counting, kernels_counted
from tests.ranks import run_ranks
from tests.reference_step import write_adapter
from tests.test_forward import micro_batches
from tests.train_runs import SMALL, arguments, build_parts, make_rows, write_rows

LAYERS = (2, 3)  # what the third layer adds is the cost of a layer
MOST_OF_A_STEP = 10_000  # at 48 layers
PAGE_VERSIONS = ("0.16.1", "2.13.0")  # of megatron-core and torch, with which the page counted


def count(rank, world_size, argv):
    """(launches, waits) by phase of a step over one micro-batch; the step before makes what only
    the first one makes.
    """
    from megatron_gkd.forward import student_forward_backward, teacher_forward

    parts = build_parts(argv)
    parallel, batches = parts.parallel, micro_batches(parts, parts.parallel, (1,))
    found = {}

    def measure(phase, function, *args):
        counting = Counting()
        with counting, kernels_counted(counting):
            result = function(*args)
        found[phase] = counting.num_launches, counting.operations, counting.waits
        return result

    for _ in range(2):
        teacher = measure("teacher", teacher_forward, parts.model, batches, parallel)
        measure("zero_grad", parts.optimizer.zero_grad)
        sums = measure(
            "student",
            *(student_forward_backward, parts.ddp, batches, teacher, parts.loss, parallel),
        )
        means = measure("means", sums.means, parallel)
        measure("optimizer", parts.optimizer.step, 1e-3, means["loss"])
    return found


@pytest.fixture(scope="module")
def phases(tiny_folder, tmp_path_factory):
    """layers -> what `count` found."""
    root = tmp_path_factory.mktemp("counts")
    found = {}
    for layers in LAYERS:
        model = tiny_folder(**SMALL | dict(num_hidden_layers=layers))
        flags = dict(
            model=model,
            adapter=write_adapter(root / str(layers), model, rank=4, alpha=8),
            dataset=write_rows(root / "rows.jsonl", make_rows(4)),
            output_dir=root,
        )
        argv = arguments(**flags | dict(recompute="full", lora_dropout=0.05))
        (found[layers],) = run_ranks(count, 1, argv)
    return found


def test_launches_of_a_step(phases):
    fewer, more = (phases[layers] for layers in LAYERS)
    of_a_layer = {phase: more[phase][0] - fewer[phase][0] for phase in more}
    step = sum(more[phase][0] + (48 - LAYERS[1]) * number for phase, number in of_a_layer.items())
    assert of_a_layer["teacher"] > 10 and of_a_layer["student"] > 30  # the counter sees a layer
    assert step <= MOST_OF_A_STEP, (step, of_a_layer, more)
    if (version("megatron-core"), torch.__version__.split("+")[0]) == PAGE_VERSIONS:
        update = more["optimizer"][0]
        counted = (of_a_layer["teacher"], of_a_layer["student"], of_a_layer["optimizer"], update)
        assert (*counted, step) == numbers_of_the_page()


def numbers_of_the_page() -> tuple[int, ...]:
    """The launches in the last column of its first table."""
    lines = (
        (Path(__file__).parents[1] / "docs/training_step.md")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [line.split("|") for line in lines if line.startswith("| ")][1:6]
    return tuple(int(row[-2].replace(",", "")) for row in rows)


def test_the_update_is_a_few_launches_at_any_depth(phases):
    fewer, more = (phases[layers]["optimizer"] for layers in LAYERS)
    assert fewer[0] == more[0] <= 30, (fewer, more)
    assert more[1]["_fused_adamw_"] == 2  # attention's parameters, experts'


def test_the_host_waits_a_few_times_a_step(phases):
    """Not for each parameter, and in a layer for nothing; twice in the loss of a micro-batch, and
    once in megatron-core. Sums and norm are fetched by `tolist`, which no operation of torch shows.
    """
    fewer, more = ({phase: waits for phase, (*_, waits) in phases[n].items()} for n in LAYERS)
    assert fewer == more, (fewer, more)
    assert sum(sum(waits.values()) for waits in more.values()) <= 3, more
