"""Rows that are tokenised already: ids and labels, checked."""

from typing import Any

from megatron_gkd.data.forms import json_value
from megatron_gkd.errors import RowError, short_repr, type_name
from megatron_gkd.loss.rows import IGNORED_LABEL

# Where other programs mark the response, beside ids alone.
_MASKS = ("completion_mask", "assistant_masks", "response_mask", "loss_mask")


def token_ids(value: Any, where: str, vocab_size: int, *, labels: bool = False) -> list[int]:
    """A non-empty list of ids in [0, vocab_size); with `labels`, -100 too."""
    value = json_value(value, where)
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of integers, got {type_name(value)}")
    if not value:
        raise RowError(f"{where} is empty")
    for index, token in enumerate(value):
        if type(token) is not int:
            raise RowError(
                f"{where}[{index}] must be an integer, got {type_name(token)} {short_repr(token)}"
            )
        if not 0 <= token < vocab_size and not (labels and token == IGNORED_LABEL):
            allowed = f"[0, {vocab_size})" + (f" or {IGNORED_LABEL}" if labels else "")
            raise RowError(
                f"{where}[{index}] is {short_repr(token)}, out of the vocabulary {allowed}"
            )
    return value


def tokenised(
    row: dict[str, Any], vocab_size: int, *, has_teacher: bool
) -> tuple[list[int], list[int] | None]:
    """`input_ids` and `labels` up to the last trained token: what follows carries no loss, and no
    trained token sees it. Without `labels`: the prompt, and None. has_teacher: whether the teacher
    has a view of its own. Raises RowError.
    """
    names = ("input_ids", "labels", "attention_mask")
    masks = [name for name in _MASKS if name in row]
    row = {name: json_value(row[name], name) for name in names if name in row}
    if "input_ids" not in row:
        raise RowError("`input_ids` is missing: labels stand beside input_ids")
    input_ids = token_ids(row["input_ids"], "input_ids", vocab_size)
    if "labels" not in row:
        if masks:
            raise RowError(
                f"`{masks[0]}` is not read: mark the response by `labels`, {IGNORED_LABEL} where "
                "the mask is 0"
            )
        end = _num_read(row, len(input_ids))
        if not end or any(row.get("attention_mask", [])[end:]):
            raise RowError(
                f"attention_mask[{end}] is 0 and a later one is not: a prompt must not be padded "
                "on the left"
            )
        return input_ids[:end], None
    labels = list(token_ids(row["labels"], "labels", vocab_size, labels=True))
    if len(input_ids) != len(labels):
        raise RowError(
            f"input_ids has {len(input_ids)} tokens and labels {len(labels)}: they must be equally "
            "long (labels are not shifted)"
        )
    if labels[0] != IGNORED_LABEL:
        if has_teacher:
            raise RowError(
                "labels[0] is trained: with a teacher view the student needs a prompt of at least "
                "one token"
            )
        labels[0] = IGNORED_LABEL  # no token stands before it that could predict it
    trained = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
    if not trained:
        raise RowError(f"empty response: no label after the first is other than {IGNORED_LABEL}")
    end = trained[-1] + 1
    inside = [index for index in trained if index + 1 < len(input_ids)]
    is_next = len(inside) > 1 and all(labels[index] == input_ids[index + 1] for index in inside)
    if is_next and any(labels[index] != input_ids[index] for index in trained):
        raise RowError(
            "each trained label is the next token of input_ids: these labels are shifted already; "
            "write each token's own id in its place, the shift is done here"
        )
    if (read := _num_read(row, len(input_ids))) < end:
        raise RowError(
            f"attention_mask[{read}] is 0 before the last trained token: rows must not be padded "
            "on the left"
        )
    return input_ids[:end], labels[:end]


def _num_read(row: dict[str, Any], num_tokens: int) -> int:
    """Tokens before the first one that `attention_mask` hides."""
    mask = row.get("attention_mask")
    if mask is None:
        return num_tokens
    if not isinstance(mask, list) or len(mask) != num_tokens:
        raise RowError("attention_mask must be a list as long as input_ids")
    return [*map(bool, mask), False].index(False)
