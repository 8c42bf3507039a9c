"""Media rows from the command line: one step, evaluation, sampling and resuming, against one
process of transformers.
"""

import json
from pathlib import Path

import pytest

from tests import train_runs
from tests.media_rows import write_rows
from tests.reference_step import reference_step, write_adapter
from tests.train_runs import arguments, layout_flags, read_lines, run_training, stable

COMPARED = (
    "loss",
    "jsd",
    "sft_loss",
    "grad_norm",
    "kl_forward",
    "kl_reverse",
    "entropy_student",
    "entropy_teacher",
)
GROUPED = ("jsd", "sft_loss", "top1_agreement", "token_accuracy", "num_tokens")
NUM_ROWS = 8
# Two decoder layers read deepstack features: both are on the first of two stages.
SIZES = dict(
    num_hidden_layers=4, hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=1024
)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    model = tiny_folder(**SIZES)
    adapter = write_adapter(root / "adapter", model, rank=3, alpha=5.0)
    path, rows = write_rows(root, model)
    expected = reference_step(model, adapter, rows, sft_alpha=0.3)
    expected["by"] = {
        "by_source": by(model, adapter, rows, "source"),
        "by_media": by(model, adapter, rows, "media_pair"),
    }
    return dict(model=model, adapter=adapter, dataset=path, expected=expected)


def by(model, adapter, rows, column) -> dict[str, dict[str, float]]:
    """The reference's means over the rows of each name in a column."""
    found = {}
    for name in {row[column] for row in rows}:
        means = reference_step(model, adapter, [row for row in rows if row[column] == name])
        found[name] = {metric: means[metric] for metric in GROUPED}
    return found


def flags(run, output, *, dp=1, accumulation=1, **more):
    sizes = dict(
        per_device_train_batch_size=NUM_ROWS // dp // accumulation,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=None if accumulation == 1 else 400 // accumulation,
    )
    given = {name: run[name] for name in ("model", "adapter", "dataset")}
    defaults = dict(output_dir=output, sft_alpha=0.3, max_steps=1)
    return arguments(**given, **(defaults | sizes | more))


@pytest.mark.parametrize(
    "world_size, tp, pp, ep, cp, accumulation, more",
    [
        (1, 1, 1, 1, 1, 2, {}),
        pytest.param(2, 2, 1, 2, 1, 1, dict(recompute="full"), marks=pytest.mark.smoke),
        (2, 1, 1, 1, 1, 4, {}),  # micro-batches of one row: some ranks have no media
        (4, 2, 2, 2, 1, 4, dict(recompute="full")),
        (4, 4, 1, 4, 1, 1, {}),
        (2, 1, 1, 1, 2, 2, {}),
        (4, 2, 1, 4, 2, 1, dict(recompute="full")),
        (8, 2, 2, 2, 2, 2, {}),
    ],
)
def test_step_parity(run, tmp_path, world_size, tp, pp, ep, cp, accumulation, more):
    dp, layout = world_size // tp // pp // cp, layout_flags(tp, pp, ep, cp)
    run_training(
        world_size, flags(run, tmp_path, dp=dp, accumulation=accumulation, **layout, **more)
    )
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    for name in COMPARED:
        assert line[name] == pytest.approx(run["expected"][name], rel=1e-4), name
    assert line["num_tokens"] == run["expected"]["num_tokens"]
    expected = run["expected"]["by"]
    assert {"by_source", "by_media"} <= line.keys()
    for key in ("by_source", "by_media"):
        assert line[key].keys() == expected[key].keys()
        for name, means in expected[key].items():
            for metric, value in means.items():
                assert line[key][name][metric] == pytest.approx(value, rel=1e-4), (
                    key,
                    name,
                    metric,
                )


def test_evaluation_and_sampling_do_not_depend_on_the_layout(run, tmp_path):
    """Two on-policy steps whose students hear and see, and evaluation after each; the same text, so
    the same numbers. The samples before the first step are the same too.
    """
    lines, samples = {}, {}
    for world_size, tp, pp, ep, cp in ((1, 1, 1, 1, 1), (4, 2, 2, 2, 1), (2, 1, 1, 2, 2)):
        more = dict(
            lmbda=1, max_completion_length=6, max_steps=2, eval_steps=1, val_dataset=run["dataset"]
        )
        more |= dict(learning_rate=1e-3, per_device_eval_batch_size=3)
        dp, output = world_size // tp // pp // cp, tmp_path / f"{world_size}-{tp}-{pp}-{cp}"
        run_training(
            world_size,
            flags(run, output, dp=dp, accumulation=2, **layout_flags(tp, pp, ep, cp), **more),
        )
        evaluations = read_lines(output / "eval.jsonl")
        for name in (
            COMPARED[:3] + COMPARED[4:]
        ):  # before any training: what the reference says of all rows
            if name != "loss":
                assert evaluations[0][name] == pytest.approx(run["expected"][name], rel=1e-4), name
        assert evaluations[0]["by_source"].keys() == run["expected"]["by"]["by_source"].keys()
        lines[world_size, tp, pp, cp] = read_lines(output / "metrics.jsonl") + evaluations
        samples[world_size, tp, pp, cp] = [
            line for line in read_lines(output / "rollouts.jsonl") if line["step"] == 0
        ]
    kept = [
        [(line["author"], line["row"], line["prompt"], line["response"]) for line in of_layout]
        for of_layout in samples.values()
    ]
    assert len(kept[0]) == 8 and kept[0] == kept[1] == kept[2]
    assert any("|>×" in prompt for _, _, prompt, _ in kept[0])  # placeholders, counted
    first, *others = lines.values()
    assert (
        all(line["on_policy"] for line in first[:2])
        and first[0]["num_tokens"] != run["expected"]["num_tokens"]
    )
    for other in others:
        for mine, its in zip(first, other, strict=True):
            assert mine["num_tokens"] == its["num_tokens"]
            for name in ("jsd", "kl_forward", "entropy_student"):
                assert its[name] == pytest.approx(mine[name], rel=2e-3), name


@pytest.fixture(scope="module")
def alone(run):
    """The rows without their answers, in a file beside the media."""
    rows = [json.loads(line) for line in Path(run["dataset"]).read_text().splitlines()]
    path = Path(run["dataset"]).with_name("alone.jsonl")
    return train_runs.write_rows(path, [row | {"messages": row["messages"][:-1]} for row in rows])


PROMPTS = dict(lmbda=1, max_completion_length=5, sft_alpha=0, learning_rate=1e-3)


def test_prompts_alone_train_as_with_an_answer_that_nothing_reads(run, alone, tmp_path):
    run_training(
        1,
        flags(run, tmp_path / "answered", **PROMPTS),
        flags(run | {"dataset": alone}, tmp_path / "alone", **PROMPTS),
    )
    answered, its = (
        stable(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("answered", "alone")
    )
    assert answered == its and its[0]["num_tokens"] != run["expected"]["num_tokens"]


@pytest.mark.extended
def test_evaluation_of_prompts_alone_does_not_depend_on_the_layout(run, alone, tmp_path):
    """8 rows, 3 at a time on each rank."""
    evaluations = []
    for world_size, layout in ((1, {}), (4, layout_flags(2, 1, 4)), (4, layout_flags(2, 2, 2))):
        output, sizes = tmp_path / str(len(evaluations)), dict(per_device_train_batch_size=3)
        more = PROMPTS | layout | (sizes if layout else {})
        run_training(world_size, flags(run, output, val_dataset=alone, **more))
        evaluations += read_lines(output / "eval.jsonl")[:1]
    first, *others = evaluations
    assert first["by_media"].keys() == run["expected"]["by"]["by_media"].keys()
    for other in others:
        assert other["num_tokens"] == first["num_tokens"] != run["expected"]["num_tokens"]
        for name in ("jsd", "kl_forward", "entropy_student"):
            assert other[name] == pytest.approx(first[name], rel=1e-4), name


def test_resuming_gives_the_same_bits(run, tmp_path):
    more = dict(
        max_steps=4,
        save_steps=2,
        lmbda=0.5,
        max_completion_length=5,
        lora_dropout=0.1,
        learning_rate=1e-3,
    )
    more |= dict(media_cache=tmp_path / "cache", save_total_limit=3, **layout_flags(tp=2, ep=2))
    run_training(
        2,
        flags(run, tmp_path / "whole", accumulation=2, **more),
        flags(run, tmp_path / "parts", accumulation=2, **more),
        flags(
            run,
            tmp_path / "parts",
            accumulation=2,
            **more,
            resume_from_checkpoint=tmp_path / "parts" / "checkpoint-2",
        ),
    )
    whole, parts = (
        stable(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts")
    )
    assert (
        whole == parts
        and len(whole) == 4
        and {line["on_policy"] for line in whole} == {True, False}
    )


def test_layouts_that_cannot_hold_deepstack_are_refused(run, tmp_path):
    with pytest.raises(RuntimeError, match="SystemExit: 2"):
        run_training(4, flags(run, tmp_path, **layout_flags(pp=4)))
