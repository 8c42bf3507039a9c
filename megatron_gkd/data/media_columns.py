"""The columns of media, and the media in turns -> the media of each view."""

import json
from typing import Any

from megatron_gkd.data.conversation import InlineMedia, Messages
from megatron_gkd.errors import RowError
from megatron_gkd.media.medium import KINDS, Reference
from megatron_gkd.media.row_media import read_reference

MEDIA_COLUMNS = tuple(f"{prefix}{kind}s" for prefix in ("", "teacher_") for kind in KINDS)

RowMedia = dict[str, list[Reference]]
"""Kind -> a view's media of that kind, in the order of their placeholders."""


def with_plurals(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `image` under the name `images`, and so on; an empty text or list beside the
    other is none. Raises RowError for a row that has both.
    """
    row = dict(row)
    for column in MEDIA_COLUMNS:
        singular = column.removesuffix("s")
        for name in (singular, column):
            if row.get(name) == "":
                del row[name]
        if singular in row:
            value = row.pop(singular)
            if value != [] and row.get(column):
                raise RowError(f"has `{singular}` and `{column}`: one of them must go")
            row[column] = [value] if _is_pixels(value) else value or row.get(column, value)
        if column in row:
            row[column] = _of_json_text(row[column])
    return row


def _of_json_text(value: Any) -> Any:
    """The list or object that a text holds in JSON, as cells of a table have it; else the value."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _is_pixels(value: Any) -> bool:
    """Whether this is an image, [height][width] or [height][width][3], and not a list of media."""
    first, depth = value, 0
    while isinstance(first, list) and first:
        first, depth = first[0], depth + 1
    return depth in (2, 3) and type(first) is int


def inline_media(row: dict[str, Any], prefix: str, inherited: RowMedia) -> InlineMedia:
    """Nothing collected yet. A tag such as `<image>` counts if the view has media of that kind,
    in its own column or inherited from the student's view.
    """
    return InlineMedia({kind for kind in KINDS if row.get(f"{prefix}{kind}s", inherited.get(kind))})


def media_of(row: dict[str, Any], prefix: str, inline: InlineMedia, folder: str) -> RowMedia:
    """The media of a view: of each kind those in its turns, else those in its column."""
    found: RowMedia = {}
    for kind in KINDS:
        column, values = f"{prefix}{kind}s", inline.values[kind]
        given, where = row.get(column, []), f"{prefix}messages"
        if not isinstance(given, list):
            given = [given]
        if any(value is not None for value in values):
            if given or any(value is None for value in values):
                raise RowError(
                    f"{where} hold {kind}s in some parts and not in others or in `{column}`: "
                    "use one of them"
                )
            given, where = values, f"{where}: {kind}"
        else:
            where = column
        found[kind] = [
            read_reference(value, kind, folder, f"{where}[{index}]")
            for index, value in enumerate(given)
        ]
    return found


def teacher_media_of(
    row: dict[str, Any],
    media: RowMedia,
    student: InlineMedia,
    teacher: InlineMedia,
    messages: Messages | None,
    folder: str,
) -> RowMedia | None:
    """The teacher's media if they differ from `media`, the student's; else None.

    Of each kind they are those of its column or of its turns, else the student's. None of a kind,
    if the student's turns (not its column) hold that kind and the teacher has turns (`messages`)
    without a placeholder of it.
    """
    own, merged = media_of(row, "teacher_", teacher, folder), {}
    for kind in KINDS:
        in_turns = any(value is not None for value in student.values[kind])
        left_out = messages is not None and in_turns and not _num_parts(messages, kind)
        merged[kind] = (
            own[kind] if f"teacher_{kind}s" in row or own[kind] or left_out else media[kind]
        )
    return None if merged == media else merged


def _num_parts(messages: Messages, kind: str) -> int:
    contents = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    return sum(part["type"] == kind for content in contents for part in content)
