"""What the student wrote: lines of rollouts.jsonl, ordered for reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron_gkd.report.charts import spread
from megatron_gkd.report.read import Line, RunRecord

MOST_ROWS = 12  # evaluation rows of a run that are shown
MOST_OF_TRAINING = 12  # responses of training steps, the newest
MOST_ANSWERS = 12  # of the student to a row that are shown, the first and the last among them


@dataclass(frozen=True)
class Answer:
    """A text, and what is to be said about it."""

    title: str
    text: str
    remark: str = ""


@dataclass(frozen=True)
class Question:
    """A prompt with the answers to it, in the order in which they are read."""

    where: str
    prompt: str
    teacher_prompt: str
    """"" where the teacher reads the same"""
    fixed: list[Answer]
    """The data's response and the teacher's"""
    answers: list[Answer]
    """The student's, evaluation by evaluation, without those that did not change; of more than
    MOST_ANSWERS some from the whole run
    """
    left_out: int
    """Answers of the student beyond MOST_ANSWERS"""


@dataclass(frozen=True)
class Samples:
    """Of one run."""

    run: str
    questions: list[Question]
    from_training: list[Question]
    left_out: int
    """Evaluation rows beyond MOST_ROWS"""


def samples_of(record: RunRecord) -> Samples:
    """The run's samples; both lists are empty where it kept none."""
    rows: dict[str, list[Line]] = {}
    for line in record.rollouts:
        if line.get("when") == "eval":
            rows.setdefault(_text(line, "row"), []).append(line)
    training = [line for line in record.rollouts if line.get("when") == "train"]
    return Samples(
        run=record.name,
        questions=[_question(lines) for lines in list(rows.values())[:MOST_ROWS]],
        from_training=[_of_training(line) for line in training[: -MOST_OF_TRAINING - 1 : -1]],
        left_out=max(0, len(rows) - MOST_ROWS),
    )


def _question(lines: Sequence[Line]) -> Question:
    """The answers to one row of the evaluation."""
    first = lines[0]
    fixed = []
    if text := _text(first, "data_response"):
        fixed.append(Answer("Data", text))
    by_teacher = [line for line in lines if line.get("author") == "teacher"]
    by_student = [line for line in lines if line.get("author") == "student"]
    latest: dict[int, str] = {}  # step -> the teacher's answer
    for line in by_teacher:
        latest[line["step"]] = _text(line, "response")
    if len(set(latest.values())) == 1:
        fixed.append(Answer("Teacher", _text(by_teacher[0], "response"), _remark(by_teacher[0])))
    elif by_teacher:
        fixed.append(
            Answer(
                f"Teacher, step {by_teacher[-1]['step']:,}",
                _text(by_teacher[-1], "response"),
                _remark(by_teacher[-1]),
            )
        )
    answers: list[Answer] = []
    start, previous = 0, None
    for line in by_student:
        text = _text(line, "response")
        if answers and text == previous:
            answers[-1] = Answer(
                f"Student, steps {start:,} to {line['step']:,}", text, answers[-1].remark
            )
            continue
        start, previous = line["step"], text
        same = "as the teacher" if latest.get(line["step"]) == text else ""
        remark = ", ".join(filter(None, (same, _remark(line))))
        answers.append(Answer(f"Student, step {line['step']:,}", text, remark))
    shown = spread(answers, MOST_ANSWERS)
    return Question(
        where=_where(first),
        prompt=_text(first, "prompt"),
        teacher_prompt=next(
            (_text(line, "prompt") for line in by_teacher if line.get("prompt") != first["prompt"]),
            "",
        )
        if "prompt" in first
        else "",
        fixed=fixed,
        answers=shown,
        left_out=len(answers) - len(shown),
    )


def _of_training(line: Line) -> Question:
    author = _text(line, "author").capitalize() or "Student"
    answer = Answer(author, _text(line, "response"), _remark(line))
    where = f"step {line['step']:,}, {_where(line)}"
    return Question(where, _text(line, "prompt"), "", [], [answer], 0)


def _where(line: Line) -> str:
    """`train.jsonl:17`: a location without its folders."""
    return PurePath(_text(line, "location")).name or f"row {line.get('row')}"


def _text(line: Line, key: str) -> str:
    value = line.get(key)
    return value if isinstance(value, str) else "" if value is None else str(value)


def _remark(line: Line) -> str:
    """`12 tokens, cut`."""
    tokens = line.get("num_tokens")
    words = [f"{tokens:,} tokens"] if isinstance(tokens, int) else []
    return ", ".join(words + (["cut at the limit"] if line.get("truncated") else []))
