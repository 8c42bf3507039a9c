"""--teacher_template: what it renders and refuses, and that the views it makes, at preparation and
of a written response, are those of rows that hold the same text as `teacher_prompt`.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_gkd.data import DataError, load_datasets
from megatron_gkd.data.rows import check_row
from megatron_gkd.data.teacher_template import TeacherTemplate, TemplateRow
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.errors import RowError
from tests.test_media_processor import build_model, write_media

VOCAB = 1024
FEEDBACK = """\
{{ prompt }}
{# a comment #}
{% if response | length > 1 %}
A first attempt was "{{ response }}".
{% endif %}
{% for note in notes %}
- {{ note }}
{% endfor %}
Right is {{ answer.value }}.
"""
USER = {"role": "user", "content": "what is it?"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("files"))


def assistant(text):
    return {"role": "assistant", "content": text}


def row(*turns, notes=("look", "wait"), value=7, **more):
    turns = turns or (USER, assistant("a cat"))
    return {"messages": list(turns), "notes": list(notes), "answer": {"value": value}} | more


def feedback(prompt, response, notes=("look", "wait"), value=7):
    """FEEDBACK, by hand."""
    lines = [prompt]
    if len(response) > 1:
        lines.append(f'A first attempt was "{response}".')
    lines += [f"- {note}" for note in notes]
    return "\n".join([*lines, f"Right is {value}."])


def load(model, folder, template, rows, max_length=300, **changes):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if template is not None:
        (folder / "template.jinja").write_text(template)
        changes["teacher_template"] = str(folder / "template.jinja")
    data = DataConfig(dataset=[str(path)], max_length=max_length, **changes)
    return load_datasets(data, model, VOCAB, 0)[0]


def same_view(one, other):
    assert (one.input_ids, one.labels, one.response_start, one.media) == (
        other.input_ids,
        other.labels,
        other.response_start,
        other.media,
    )
    if other.position_ids is None:
        assert one.position_ids is None
    else:
        assert torch.equal(one.position_ids, other.position_ids)


def same_sample(one, other):
    same_view(one.student, other.student)
    same_view(one.teacher, other.teacher)
    assert one.has_teacher_view == other.has_teacher_view


def written(data, index, response):
    """The sample after a rollout that wrote the text."""
    ids = data._views.chat.tokenizer(response + "<|im_end|>")["input_ids"]
    return data.with_written_view(data[index].with_response(ids)), ids


PICTURE = {"type": "image"}
SEES = {"role": "user", "content": [PICTURE, {"type": "text", "text": "see?"}, {"type": "audio"}]}
EARLIER = ({"role": "user", "content": "hello"}, assistant("hi"))
MEDIA = dict(images=["wide.png"], audios=["mono.flac"])
OTHER_MEDIA = dict(teacher_images=["tall.png"], teacher_audios=["stereo.wav"])
CASES = {  # rows, and the text of the turn that is replaced
    "messages": (row(), "what is it?"),
    "system": (row({"role": "system", "content": "be brief"}, USER, assistant("a")), "what is it?"),
    "turns": (row(*EARLIER, USER, assistant("a dog")), "what is it?"),
    "alpaca": (
        dict(instruction="name", input="it", output="a cow", notes=[], answer={"value": 1}),
        "name\nit",
    ),
    "own system": (row(*EARLIER, USER, assistant("a"), teacher_system="be exact"), "what is it?"),
    "media": (row(SEES, assistant("a cat"), **MEDIA), "see?"),
    "other media": (row(SEES, assistant("a cat"), **MEDIA, **OTHER_MEDIA), "see?"),
}
WRITTEN = "no <think>\nidea</think>"


def test_views_are_those_of_the_same_text_as_a_column(model, media):
    """The row's own response at preparation; a written one afterwards, the end token left out."""
    rows = [row for row, _ in CASES.values()]
    data, expected = load(model, media, FEEDBACK, rows), {}
    assert "7 rows, 7 of them with a teacher view, made anew of what" in data.report.summary()
    for when in ("prepared", "written"):
        texts = []
        for name, (given, prompt) in CASES.items():
            response = given["messages"][-1]["content"] if "messages" in given else given["output"]
            response = response if when == "prepared" else WRITTEN
            text = feedback(prompt, response, given["notes"], given["answer"]["value"])
            texts.append("<image><audio>" * ("media" in name) + text)
        columns = [row | {"teacher_prompt": text} for row, text in zip(rows, texts)]
        expected[when] = load(model, media, None, columns)
    for index, name in enumerate(CASES):
        assert data[index].has_teacher_view, name
        same_sample(data[index], expected["prepared"][index])
        sample, ids = written(data, index, WRITTEN)
        same_sample(sample, expected["written"][index].with_response(ids))
        assert not sample.view_problem and sample.teacher.targets() == ids
        assert data[index].teacher.input_ids != sample.teacher.input_ids, name
    assert (data.lengths.prompts == expected["prepared"].lengths.prompts).all()


def test_where_there_is_no_view(model, media):
    """Nothing rendered: the teacher reads what the student reads. So it does where a view cannot be
    made of what was written, and the reason is said; the row's own response is checked before.
    """
    template = "{% if response != 'right' %}{{ hint }} {{ response }}{% endif %}"
    rows = [dict(messages=[USER, assistant(text)], hint="wrong:") for text in ("right", "no")]
    data = load(model, media, template, rows, max_length=40)
    assert not data[0].has_teacher_view and data[1].has_teacher_view
    assert data.report.num_teacher_views == 1
    for index in range(2):
        right, _ = written(data, index, "right")
        assert right.teacher is right.student and not right.view_problem
        wrong, _ = written(data, index, "left")
        assert wrong.has_teacher_view
        long, ids = written(data, index, "right or left " * 20)
        assert long.teacher is long.student and long.student.targets() == ids
        start = f"{media / 'rows.jsonl'}:{index + 1}: the teacher's prompt has "
        assert long.view_problem.startswith(start) and "of --max_length 40" in long.view_problem
        again = long.with_response(ids[:3])
        assert not data.with_written_view(again).view_problem

    fails = load(model, media, "{{ notes[response | length] }}", [row(notes=["a"] * 6)])
    sample, _ = written(fails, 0, "far more than six")
    assert sample.teacher is sample.student and "list object has no element 17" in (
        sample.view_problem
    )
    tags = load(model, media, "{{ response }}", [row(SEES, assistant("it"), **MEDIA)])
    sample, _ = written(tags, 0, "<image> <image>")
    assert "2 image placeholders for 1 image" in sample.view_problem
    sample, _ = written(tags, 0, "an <image>")
    assert sample.has_teacher_view and not sample.view_problem
    bare = "{% if response == 'see' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    sample, _ = written(load(model, media, bare, [row(USER, assistant("it"))]), 0, "see")
    assert "1 image placeholder for 0 images" in sample.view_problem
    hears = row(SEES, assistant("a cat"), **MEDIA)
    only_sees = hears | dict(teacher_audios=[])
    own = [hears, hears | OTHER_MEDIA, only_sees]
    template = "{% if response != 'right' %}look: {{ response }}{% endif %}"
    data = load(model, media, template, own)
    columns = load(model, media, None, [own[1], only_sees | dict(teacher_prompt="<image>look: x")])
    same, ids = written(data, 0, "right")
    same_view(same.teacher, same.student)
    other, _ = written(data, 1, "right")  # the row's own media all the same
    same_sample(other, columns[0].with_response(ids))
    assert other.media_pair == "audio+image > audio+image" and len(other.media) == 4
    sample, ids = written(data, 2, "x")
    same_sample(sample, columns[1].with_response(ids))
    assert sample.media_pair == "audio+image > image"
    plain = load(model, media, None, [row()])
    assert plain.with_written_view(plain[0]) is not None


@pytest.mark.parametrize(
    "template, given, problem",
    [
        ("{{ hint }}", {}, "'hint' is undefined; the row has prompt, response and not hint"),
        ("{{ 'a'.endswith(hint) }}", {}, "; the row has prompt, response and not hint"),
        ("{{ hint.x }}", {"hint": {"y": 1}}, "has no attribute 'x'; the row has hint, prompt"),
        ("{{ hint() }}", {"hint": "y"}, "'str' object is not callable"),
        ("{{ response.upper }}", {}, "cannot be printed (is a call without its brackets?)"),
        ("{{ ''.__class__.__mro__ }}", {}, "attribute '__class__' of 'str' object is unsafe"),
        ("x", {"teacher_prompt": "y"}, "makes the teacher's view: leave the column out"),
        ("x", {"teacher_messages": []}, "has teacher_messages, and --teacher_template"),
        ("{{ 'word ' * 400 }}", {}, "the teacher's prompt has"),
    ],
)
def test_a_row_that_does_not_fit_is_named(model, media, template, given, problem):
    rows = [{"messages": [USER, assistant("it")]} | given]
    with pytest.raises(DataError) as error:
        load(model, media, template, rows)
    assert f"{media / 'rows.jsonl'}:1: " in str(error.value) and problem in str(error.value)


def test_a_tokenised_row_has_no_turn(model, media):
    with pytest.raises(DataError, match="replaces the last user turn, and the row has none"):
        load(model, media, "x", [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{{ a }}\n{% if %}", "template.jinja, line 2: Expected an expression"),
        ("{{ xs | random }}", "No filter named 'random'"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_template(tmp_path, text, problem):
    path = tmp_path / "template.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as error:
        TeacherTemplate(str(path))
    assert str(error.value).startswith(f"--teacher_template {path}") and problem in str(error.value)


def test_the_example_of_the_docs(tmp_path):
    text = (Path(__file__).parent.parent / "docs/data.md").read_text()
    (template,) = re.findall(r"```jinja\n(.*?)```", text, re.DOTALL)
    (tmp_path / "template.jinja").write_text(template)
    template = TeacherTemplate(str(tmp_path / "template.jinja"))
    (raw,) = [
        row
        for row in map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL))
        if template.columns == sorted(row.keys() - {"messages"})
    ]
    checked, stored = template.with_view(check_row(raw, VOCAB), raw)
    start = "What is 17 x 23?\n\nA first attempt at this was:\n"
    assert checked.teacher_messages[0]["content"] == (
        f"{start}391\n\nIt is right. Answer again in the same way."
    )
    view = template.view(TemplateRow.from_json(stored), "It is 400.")
    assert view[0]["content"] == (
        f"{start}It is 400.\n\nIt is wrong, the answer is 391. Multiply by 20 and by 3. Answer "
        "again, without mentioning the attempt."
    )


def test_kept_rows_know_the_template(model, media, tmp_path):
    """Another text in the file, or another value that only later views read, and nothing is taken
    for what it was.
    """
    template = "{% if response == 'no' %}{{ hint }}{% endif %}"
    digests = []
    for text, hint in [
        (template, "x"),
        (template, "x"),
        (template + "{# #}", "x"),
        (template, "y"),
    ]:
        rows = [dict(messages=[USER, assistant("it")], hint=hint)]
        data = load(model, media, text, rows, prepared_rows=str(tmp_path))
        assert written(data, 0, "no")[0].has_teacher_view and not data[0].has_teacher_view
        digests.append(data.digests(len(data)))
    assert digests[0] == digests[1] == digests[2] != digests[3]
    assert len(list(tmp_path.iterdir())) == 3  # the second took what the first had kept


def test_columns_and_what_is_stored(tmp_path):
    """Only what the template names is kept; a column of another view may be one of them."""
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% set x = range(2) %}{% for n in notes %}{{ loop.index }}{{ n }}{% endfor %}"
        "{{ teacher_prompt }}{{ response }}"
    )
    template = TeacherTemplate(str(path))
    assert template.columns == ["notes", "teacher_prompt"]
    raw = row(teacher_prompt="psst", response="not this", other="x" * 999)
    own = template.without_view(raw)
    assert own.keys() == raw.keys() - {"teacher_prompt"}
    checked, stored = template.with_view(check_row(own, VOCAB), raw)
    assert checked.teacher_messages[0]["content"] == "1look2waitpsst" + "a cat"
    kept = TemplateRow.from_json(stored)
    assert kept.columns == {"notes": ["look", "wait"], "teacher_prompt": "psst"} and not kept.kinds
    assert template.view(kept, "b")[0]["content"] == "1look2waitpsstb"
    assert "x" * 999 not in stored
    with pytest.raises(RowError, match="`notes`, which is no JSON"):
        template.with_view(check_row(own, VOCAB), raw | {"notes": b"\x00"})
