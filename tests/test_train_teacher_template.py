"""Training with --teacher_template: the teacher reads the response that the student has just
written; a step is that of rows which hold the same tokens.
"""

import pytest
from transformers import AutoTokenizer

from tests.ranks import run_ranks
from tests.test_data_teacher_template import FEEDBACK, assistant, feedback, row
from tests.train_runs import SMALL, arguments, layout_flags, read_lines, run_training, write_rows

SIZES = SMALL | dict(vocab_size=1024)
COMPARED = ("loss", "jsd", "kl_forward", "kl_reverse", "entropy_teacher", "grad_norm")
PROMPTS = ["what is it?", "name a bird", "say it again", "which of them is the last one?"]


@pytest.fixture(scope="module")
def data(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("template")
    (root / "feedback.jinja").write_text(FEEDBACK)
    rows = [
        row(dict(role="user", content=prompt), assistant("a cat"), notes=["look"] * i, value=i)
        for i, prompt in enumerate(PROMPTS)
    ]
    dataset = write_rows(root / "rows.jsonl", rows)
    for one in rows:
        del one["messages"][-1]
    prompts = write_rows(root / "prompts.jsonl", rows)
    return dict(
        model=tiny_folder(**SIZES),
        dataset=dataset,
        prompts=prompts,
        template=root / "feedback.jinja",
    )


def flags_of_run(data, output, **flags):
    settings = dict(
        model=data["model"],
        dataset=data["dataset"],
        output_dir=output,
        teacher_template=data["template"],
        max_length=200,
        per_device_train_batch_size=4,
        lmbda=1,
        rollout_temperature=0,
        repetition_penalty=1,
        max_completion_length=6,
        max_steps=1,
    )
    return arguments(**(settings | flags))


def _written(rank, world_size, argv):
    """Of each row that this rank's replica wrote: its index, the student's and the teacher's ids,
    where the response starts in each.
    """
    from megatron_gkd import parallel, train
    from megatron_gkd.rollout.rollout import Rollout

    train.destroy = parallel.parallel_state.destroy_model_parallel
    respond, found = Rollout.respond, []

    def recorded(*arguments):
        batches = respond(*arguments)
        for sample in (s for batch in batches for s in batch.samples if s is not None):
            views = sample.student, sample.teacher
            found.append((sample.row, *((v.input_ids, v.response_start) for v in views)))
        return batches

    Rollout.respond = recorded
    train.main(argv)
    return sorted(found)


def reference(tokenizer, index, response):
    """The teacher's prompt for row `index`."""
    text = tokenizer.decode(
        [token for token in response if token != tokenizer.eos_token_id], skip_special_tokens=True
    )
    turn = feedback(PROMPTS[index], text, ["look"] * index, index)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(
    "world_size, tp, pp, cp",
    [
        pytest.param(4, 2, 1, 2, id="TP2 CP2"),
        pytest.param(1, 1, 1, 1, id="one rank", marks=pytest.mark.extended),
        pytest.param(4, 2, 2, 1, id="TP2 PP2", marks=pytest.mark.extended),
        pytest.param(4, 2, 1, 1, id="TP2 DP2", marks=pytest.mark.extended),
    ],
)
def test_a_step_is_that_of_rows_with_the_same_tokens(data, tmp_path, world_size, tp, pp, cp):
    layout = layout_flags(tp, pp, 1, cp)
    dp = world_size // tp // pp // cp
    own = dict(per_device_train_batch_size=4 // dp, num_generations=2, **layout)
    by_rank = run_ranks(_written, world_size, flags_of_run(data, tmp_path / "written", **own))
    replicas = {str(rows): rows for rows in by_rank}
    assert len(replicas) == dp, "the ranks of a replica must read the same"
    written = [found for rows in replicas.values() for found in rows]
    assert sorted(found[0] for found in written) == [0, 0, 1, 1, 2, 2, 3, 3]
    tokenizer, rows = AutoTokenizer.from_pretrained(data["model"]), []
    for index, (student, start), (teacher, teacher_start) in written:
        response = student[start:]
        assert teacher[:teacher_start] == reference(tokenizer, index, response)
        assert teacher[teacher_start:] == response
        rows.append(
            dict(
                input_ids=student,
                labels=[-100] * start + response,
                teacher_input_ids=teacher[:teacher_start],
            )
        )
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    plain = dict(dataset=dataset, teacher_template=None, lmbda=0, per_device_train_batch_size=8)
    run_training(1, flags_of_run(data, tmp_path / "plain", **plain))
    (line,), (expected,) = (
        read_lines(tmp_path / name / "metrics.jsonl") for name in ("written", "plain")
    )
    assert line["num_tokens"] == expected["num_tokens"] and line["failed_teacher_views"] == 0
    assert line["jsd"] > 1e-5
    for key in COMPARED:
        assert line[key] == pytest.approx(expected[key], rel=1e-4), key


def test_views_that_cannot_be_made_are_counted(data, tmp_path):
    """The step goes on, with the student's view for both: here the two are equal."""
    template = tmp_path / "long.jinja"
    template.write_text("{% if response != 'a cat' %}{{ (response ~ ' and ') * 200 }}{% endif %}")
    flags = dict(teacher_template=template, per_device_train_batch_size=2, max_steps=2)
    same = tmp_path / "same.jinja"
    same.write_text("{{ prompt }}")
    # no step has another response; no response makes another view
    for given in (dict(lmbda=0), dict(teacher_template=same)):
        with pytest.raises(RuntimeError, match="nothing to learn"):
            run_training(1, flags_of_run(data, tmp_path / "off", **(flags | given)))
    said = run_training(2, flags_of_run(data, tmp_path / "on", **flags))
    assert "4 rows, 0 of them with a teacher view, made anew of what the student writes" in said
    assert "Step 1: the teacher reads 2 of 2 rows of rank 0 as the student does, " in said
    assert f"{data['dataset']}:" in said and "tokens of --max_length 200" in said
    for line in read_lines(tmp_path / "on" / "metrics.jsonl"):
        assert line["failed_teacher_views"] == 4 and line["jsd"] == 0


def test_other_steps_and_evaluation_take_the_rows_own_response(data, tmp_path):
    """As rows with the text in teacher_prompt; what the teacher writes it writes from that view."""
    rows = [
        dict(
            messages=[dict(role="user", content=prompt), assistant("a cat")],
            teacher_prompt=feedback(prompt, "a cat", ["look"] * i, i),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    column = dict(dataset=dataset, val_dataset=dataset, teacher_template=None)
    own = dict(val_dataset=data["dataset"])
    for name, flags in {"own": dict(lmbda=0), "teacher": dict(lmbda=0, seq_kd=True)}.items():
        run_training(
            1,
            flags_of_run(data, tmp_path / f"{name} template", **own, **flags),
            flags_of_run(data, tmp_path / f"{name} column", **column, **flags),
        )
        for file in ("metrics.jsonl", "eval.jsonl"):
            one, other = (
                read_lines(tmp_path / f"{name} {kind}" / file) for kind in ("template", "column")
            )
            assert len(one) == len(other)
            for line, expected in zip(one, other):
                for key in ("loss", "jsd", "entropy_teacher", "num_tokens"):
                    assert line[key] == pytest.approx(expected[key], rel=1e-6), (name, key)


def test_prompts_alone(data, tmp_path):
    """What the student writes to them is the response, in evaluation too."""
    kinds = {"alone": data["prompts"], "with": data["dataset"]}
    run_training(
        1,
        *(
            flags_of_run(data, tmp_path / kind, dataset=path, val_dataset=data["prompts"])
            for kind, path in kinds.items()
        ),
    )
    for file in ("metrics.jsonl", "eval.jsonl"):
        alone, other = (read_lines(tmp_path / kind / file) for kind in kinds)
        for line, expected in zip(alone, other, strict=True):
            assert line["jsd"] == pytest.approx(expected["jsd"], rel=1e-6) and line["jsd"] > 1e-5
    # before the first step the evaluation is on what that step is trained on, all greedy
    first = read_lines(tmp_path / "alone" / "eval.jsonl")[0]
    (step,) = read_lines(tmp_path / "alone" / "metrics.jsonl")
    assert first["jsd"] == pytest.approx(step["jsd"], rel=1e-5)
