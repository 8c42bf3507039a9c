"""`--show_row`: both views of a row as tokens, with what is trained marked. Only that row is read:
no weights, no process group.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from megatron_gkd.data.row_encoding import (
    RowEncoding,
    encode_source_rows,
    encoded_columns,
    row_encoding,
)
from megatron_gkd.data.source import Source, open_source
from megatron_gkd.data.text_files import close_files
from megatron_gkd.data_settings import DataConfig
from megatron_gkd.errors import DataError
from megatron_gkd.loss.rows import IGNORED_LABEL

WIDTH = 100
_BETWEEN = "|"
_REPEATED = 4  # tokens of a medium, and whatever else comes so often in a row


def show_row(wanted: str, data: DataConfig, model_dir: str, vocab_size: int, seed: int) -> str:
    """The text of `--show_row WANTED`: a number counts the rows of `dataset` from 0, anything else
    is the place of a row as messages name it (FILE:LINE). Raises DataError for a place where no row
    is, and for a row that cannot be used.
    """
    encoding = row_encoding(data, model_dir, vocab_size)
    source, index = _find(wanted, data, seed)
    location = source.locations[index]
    (row,) = encode_source_rows(source, encoding, [index])
    close_files()
    if row["reason"] is not None:
        raise DataError(f"{location}: {row['reason']}")
    encoded = encoded_columns(row)
    start = encoded.response_start
    lines = _view(
        f"{location}, the student's view", encoded.input_ids, encoded.labels, start, encoding
    )
    if encoded.cut_tokens:
        lines.append(
            f"{encoded.cut_tokens} tokens that would be trained are cut off: --max_length "
            f"{data.max_length}"
        )
    if encoded.teacher_prompt is None:
        lines += ["", "The teacher's view is the same."]
    else:
        prompt = encoded.teacher_prompt
        lines += [
            "",
            *_view(
                f"{location}, the teacher's view",
                prompt + encoded.input_ids[start:],
                encoded.labels_of_teacher_prompt() + encoded.labels[start:],
                len(prompt),
                encoding,
            ),
        ]
    return "\n".join(lines)


def _find(wanted: str, data: DataConfig, seed: int) -> tuple[Source, int]:
    """The source and the row's index in it."""
    number = int(wanted) if wanted.lstrip("-").isdigit() else None
    before, last = 0, ""
    for entry in [*data.dataset, *([] if number is not None else data.val_dataset)]:
        source = open_source(entry, seed, data.download_datasets)
        locations = source.locations
        if number is None and wanted in locations:
            return source, locations.index(wanted)
        if number is not None and 0 <= number - before < len(locations):
            return source, number - before
        before, last = before + len(locations), locations[-1]
    raise DataError(
        f"--show_row {wanted}: there are {before} rows, "
        + (f"0 to {before - 1}" if number is not None else f"the last of them is {last}")
    )


class _Piece(NamedTuple):
    """Tokens that are shown as one: one, or those of a character, or a run of the same."""

    text: str
    is_trained: bool


def _view(
    title: str, ids: list[int], labels: list[int], start: int, encoding: RowEncoding
) -> list[str]:
    """The lines of one view."""
    num_trained = len(labels) - labels.count(IGNORED_LABEL)
    parts = f"{start} of them before the (last) response"
    if start == len(ids):
        parts = "a prompt alone, whose response a run writes"
    lines = [
        f"{title}: {len(ids)} tokens, {parts}; {num_trained} are trained, in the lines marked >"
    ]
    is_trained = [label != IGNORED_LABEL for label in labels]
    for trained, pieces in groupby(
        _pieces(ids, is_trained, encoding), lambda piece: piece.is_trained
    ):
        mark = "> " if trained else "  "
        lines += [mark + line for line in _wrapped([piece.text for piece in pieces])]
    return lines


def _pieces(ids: list[int], is_trained: list[bool], encoding: RowEncoding) -> Iterator[_Piece]:
    position = 0
    while position < len(ids):
        end = position + 1
        while (
            end < len(ids) and ids[end] == ids[position] and is_trained[end] == is_trained[position]
        ):
            end += 1
        if end - position >= _REPEATED:
            text = f"{_text(ids, position, position + 1, encoding)} x {end - position}"
        else:
            end = position + 1
            text = _text(ids, position, end, encoding)
            # the bytes of a character that are several tokens
            while text.endswith("\ufffd") and end < min(len(ids), position + 4):
                end += 1
                text = _text(ids, position, end, encoding)
        yield _Piece(text, is_trained[position])
        position = end


def _text(ids: list[int], begin: int, end: int, encoding: RowEncoding) -> str:
    """What these tokens add to the text; ids where there is no tokenizer."""
    if encoding.chat is None:
        return " ".join(str(token) for token in ids[begin:end])
    decode = encoding.chat.tokenizer.decode
    # a SentencePiece tokenizer drops the space of what it decodes first
    before = ids[max(0, begin - 1) : begin]
    options = dict(skip_special_tokens=False, clean_up_tokenization_spaces=False)
    context = decode(before, **options) if before else ""
    return decode(before + ids[begin:end], **options)[len(context) :]


def _wrapped(texts: list[str]) -> Iterator[str]:
    """Lines of tokens with `|` between them; a token with a newline ends its line."""
    line = ""
    for text in texts:
        shown = "".join(_visible(character) for character in text)
        if line and len(line) + len(_BETWEEN) + len(shown) > WIDTH - 2:
            yield line
            line = ""
        line = f"{line}{_BETWEEN}{shown}" if line else shown
        if "\n" in text:
            yield line
            line = ""
    if line:
        yield line


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    return character if character.isprintable() else repr(character)[1:-1]
