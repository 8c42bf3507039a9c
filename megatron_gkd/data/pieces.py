"""Texts -> token ids, cut at places that a token must not cross; many at once, and what they share
once.

A tokenizer looks for its added tokens (`<|im_start|>`) before anything else and tokenises what lies
between them apart. So a text is taken in pieces that begin with one, and the ids of the text are
those of its pieces. System prompts, earlier turns and whatever else stands in many texts is
tokenised once.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Cut(NamedTuple):
    """A text that ends at the last of some places in it, all of them counts of characters, in
    ascending order.
    """

    text: str
    places: list[int]


class CutIds(NamedTuple):
    """Its ids, and of each place the number of ids before it."""

    ids: list[int]
    positions: list[int]


class Pieces:
    """Cuts texts and tokenises them. The ids are those of the whole text wherever a token ends at
    each place. Where a token would cross one (a newline of the prompt and one of the response are
    one token), the text is tokenised in two parts: at generation time the prompt is tokenised
    alone, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._added = _added_tokens(tokenizer)

    def encode(self, cuts: Sequence[Cut]) -> list[CutIds]:
        """In one call of the tokenizer, where its added tokens stand apart."""
        if self._added is None:
            return [self._one_by_one(cut) for cut in cuts]
        wanted: dict[str, list[int]] = {"": []}
        parts = [self._parts(cut, wanted) for cut in cuts]
        pieces = list(wanted)[1:]
        for piece, encoding in zip(pieces, self._encode_all(pieces)):
            wanted[piece] = encoding
        return [self._joined(cut, of_cut, wanted) for cut, of_cut in zip(cuts, parts)]

    def _parts(
        self, cut: Cut, wanted: dict[str, list[int]]
    ) -> tuple[list[str], list[tuple[int, str]]]:
        """(the pieces of a text, for each place the number of pieces before it and the beginning of
        the piece that it cuts). All of them are put into `wanted`.
        """
        assert self._added is not None
        text = cut.text[: cut.places[-1]]
        starts = [0, *(found.start() for found in self._added.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in zip(starts, starts[1:])]
        beginnings, number = [], 0
        for place in cut.places:
            while starts[number + 1] < place:
                number += 1
            beginnings.append((number, text[starts[number] : place]))
        for piece in pieces:
            wanted.setdefault(piece, [])
        for _, beginning in beginnings:
            wanted.setdefault(beginning, [])
        return pieces, beginnings

    def _joined(
        self,
        cut: Cut,
        parts: tuple[list[str], list[tuple[int, str]]],
        ids_of: dict[str, list[int]],
    ) -> CutIds:
        pieces, beginnings = parts
        ids: list[int] = []
        starts = []
        for piece in pieces:
            starts.append(len(ids))
            ids += ids_of[piece]
        positions = []
        for number, beginning in beginnings:
            expected = ids_of[beginning]
            if ids_of[pieces[number]][: len(expected)] != expected:
                return self._one_by_one(cut)
            positions.append(starts[number] + len(expected))
        return CutIds(ids, positions)

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        # as the tokenizer's own call, without offsets
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _one_by_one(self, cut: Cut) -> CutIds:
        done: list[int] = []
        part: list[int] = []
        part_start, last_place, positions = 0, 0, []
        for place in cut.places:
            longer = self._ids(cut.text[part_start:place])
            if longer[: len(part)] == part:
                part = longer
            else:
                done += part
                part_start, part = last_place, self._ids(cut.text[last_place:place])
            positions.append(len(done) + len(part))
            last_place = place
        return CutIds(done + part, positions)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """Finds the added tokens as the tokenizer does; None where it looks for them in another way: in
    normalised text, with the space around them, as whole words, or not in Rust.
    """
    added = tokenizer.added_tokens_decoder.values()
    if not tokenizer.is_fast or not added or getattr(tokenizer, "split_special_tokens", False):
        return None
    if any(
        token.normalized or token.lstrip or token.rstrip or token.single_word for token in added
    ):
        return None
    longest_first = sorted((token.content for token in added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))
