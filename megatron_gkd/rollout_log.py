"""What rollouts.jsonl holds: responses of logged steps that the run wrote, and at each evaluation
the answers of student and teacher to a few rows that stay the same.

They are for reading: texts, as the folder's tokenizer decodes them. Rank 0 writes, and it has the
rows of the first data-parallel rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_gkd.data import SampleDataset, eval_loader
from megatron_gkd.data.batch import Batch, collate
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.loader import PADDING, Numbered
from megatron_gkd.data.order import SAMPLED, permutation
from megatron_gkd.data.sample import Sample
from megatron_gkd.media.towers import StepMedia, Towers
from megatron_gkd.parallel import Parallel, log_rank_0
from megatron_gkd.rollout.backend import Author
from megatron_gkd.rollout.rollout import Rollout

NUMBER = 4  # of a run that writes responses, unless --log_rollouts says another
MOST_REPEATED = 8  # of one token in a row; of a medium's placeholders there are thousands
MOST_CHARACTERS = 8000  # of a prompt

Line = dict[str, Any]


@dataclass(frozen=True)
class RolloutLog:
    """The lines of rollouts.jsonl, step by step; lists that only rank 0 fills."""

    number: int
    """Responses of a step, and rows of an evaluation"""
    decode: Callable[[Sequence[int]], str] | None
    """Ids -> text; None where the model folder has no tokenizer: the lines then hold ids"""
    rollout: Rollout
    """Greedy, for the evaluation data: `Rollout.for_evaluation`"""
    train_data: SampleDataset
    eval_data: SampleDataset | None
    towers: Towers | None
    parallel: Parallel
    seed: int

    def of_step(self, batches: Sequence[Batch], step: int, author: Author | None) -> list[Line]:
        """Responses of a step that `author` wrote, without a collective; none where the step has
        the data's own. One to each prompt in the order of the data, then the prompts' second ones:
        micro-batches begin with the longest.
        """
        if author is None or self.parallel.rank != 0:
            return []
        rows = [
            (number, sample)
            for batch in batches
            for number, sample in zip(batch.sample_ids, batch.samples)
            if sample is not None
        ]
        # of one prompt's by their ids, so that their lengths do not choose
        rows.sort(key=lambda row: (row[0], row[1].student.input_ids))
        in_turn = [
            (turn, number, sample)
            for number, of_prompt in groupby(rows, key=lambda row: row[0])
            for turn, (_, sample) in enumerate(of_prompt)
        ]
        in_turn.sort(key=lambda row: row[:2])
        lines = []
        for *_, sample in in_turn[: self.number]:
            location = self.train_data.location(sample.row)
            lines.append(self._line(sample, step, "train", author, location))
        return lines

    def of_evaluation(self, step: int) -> list[Line]:
        """Answers of student and teacher to the rows of every evaluation, each from its own view,
        greedily; none without evaluation data, or where logits are not finite, which is said.

        Every rank calls it. Collectives: those of `Rollout.respond`, twice.
        """
        if self.eval_data is None:
            return []
        questions = self._questions()
        answered = {"student": self._answers(questions, step, "student")}
        answered["teacher"] = self._answers(questions, step, "teacher")
        if self.parallel.rank != 0:
            return []
        given = {sample.row: sample for batch in questions for sample in batch.samples if sample}
        lines = []
        for author, samples in answered.items():
            for sample in samples:
                location = self.eval_data.location(sample.row)
                line = self._line(sample, step, "eval", author, location)
                row = given[sample.row].student
                response = row.input_ids[row.response_start :]
                lines.append(line | {"data_response": self._text(response) if response else None})
        return lines

    def _questions(self) -> list[Batch]:
        """The rows on the first data-parallel rank, as micro-batches; a padding sample on the
        others, which the experts of some layouts need.
        """
        data, rollout = self.eval_data, self.rollout
        assert data is not None
        micro_batches: list[list[Numbered]] = [[PADDING]]
        if self.parallel.dp_rank == 0:
            rows = permutation(len(data), self.seed, SAMPLED)[: self.number]
            lengths = data.lengths.prompts + rollout.max_new_tokens
            chosen = sorted(rows.tolist())
            loader = eval_loader(data, chosen, lengths, budget=rollout.budget, dp_rank=0, dp_size=1)
            micro_batches = list(loader)
        return [
            collate(samples, rollout.packing, numbers).to(self.parallel.device)
            for numbers, samples in (zip(*numbered) for numbered in micro_batches)
        ]

    def _answers(self, questions: Sequence[Batch], step: int, author: Author) -> list[Sample]:
        media = StepMedia(self.towers, [batch.media for batch in questions])
        try:
            batches = self.rollout.respond(questions, step, author, media)
        except FloatingPointError as error:
            log_rank_0(self.parallel, f"No samples of the {author} after step {step}: {error}")
            return []
        found = [sample for batch in batches for sample in batch.samples if sample is not None]
        return sorted(found, key=lambda sample: sample.row)

    def _line(self, sample: Sample, step: int, when: str, author: str, location: str) -> Line:
        view = sample.teacher if author == "teacher" else sample.student
        response = view.input_ids[view.response_start :]
        drawn = sample.log_probabilities
        return {
            "step": step,
            "when": when,
            "author": author,
            "row": sample.row,
            "location": location,
            "source": sample.source,
            "prompt": self._text(view.input_ids[: view.response_start], MOST_CHARACTERS),
            "response": self._text(response),
            "num_tokens": len(response),
            "truncated": self.rollout.is_truncated(sample),
            "mean_log_probability": sum(drawn) / len(drawn) if drawn else None,
        }

    def _text(self, ids: Sequence[int], most: int | None = None) -> str:
        """To be read: without the token that ends a response, many repetitions of a token counted,
        the middle of what is longer than `most` characters left out; ids where there is no
        tokenizer.
        """
        if self.decode is None:
            text = " ".join(map(str, ids))
        else:
            text = readable(ids, self.decode, self.rollout.stop_token_ids)
        if most is None or len(text) <= most:
            return text
        half = most // 2
        return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"


def num_logged_rollouts(asked: int | None, writes: bool) -> int:
    """--log_rollouts, or its default for a run that writes responses or not."""
    return asked if asked is not None else NUMBER if writes else 0


def readable(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], stop_ids: Sequence[int]
) -> str:
    """Ids as text: a stop id at the end is left out, and of more than MOST_REPEATED times the same
    id in a row one is shown, with their number.
    """
    ids = ids[:-1] if ids and ids[-1] in stop_ids else ids
    parts: list[str] = []
    pending: list[int] = []
    for token, group in groupby(ids):
        count = len(list(group))
        if count <= MOST_REPEATED:
            pending += [token] * count
            continue
        parts += [decode(pending), f"{decode([token])}×{count:,}"]
        pending = []
    return "".join([*parts, decode(pending) if pending else ""])


def text_decoder(model_folder: str) -> Callable[[Sequence[int]], str] | None:
    """The folder's tokenizer, from ids to text with its special tokens; None where it has none that
    loads, which training on rows of ids does not need.
    """
    try:
        tokenizer: Any = load_tokenizer(model_folder)
    except Exception:  # the files are anyone's, and so are the errors
        return None
    if tokenizer is None:
        return None
    return lambda ids: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
