"""Text from the training model itself: the prompts through the training forward, then one token of
every row at a time.

The host only counts: every 16 tokens it looks at what was written, and leaves out rows that have
ended where the batch can become smaller. Legend: P prompts of this data-parallel rank, n samples of
each, B rows, T = max_new_tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from megatron_gkd.rollout.cache import LOOK
from megatron_gkd.rollout.engine import Engine
from megatron_gkd.rollout.prefill import PromptMedia
from megatron_gkd.rollout.row_batch import RowBatch

MEET = 512  # tokens of a row between two meetings of ranks that write apart: a multiple of LOOK
OTHER_RANKS_ROW = "a row of another rank"  # in an error that names no row of this rank
_NOT_FINITE = 1 << 30  # more than any number of rows


def telling(error: str) -> int:
    """How much it says: 0 without an error; what names rows is above what names none, and what
    names more of them above others. Of several ranks the one with the largest number is heard.
    """
    return len(error) + bool(error) * (OTHER_RANKS_ROW not in error) * (1 << 30)


class Response(NamedTuple):
    token_ids: list[int]
    """At most T, the stop id included"""
    log_probabilities: list[float] | None
    """Of each, in nats, under the model's softmax, before temperature and filters; None where an
    engine does not tell
    """


@torch.no_grad()
def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    row_ids: Sequence[int],
    sample_ids: Sequence[int] | None = None,
    media: Callable[[], PromptMedia | None] = lambda: None,
    num_samples: int = 1,
) -> list[Response]:
    """n = num_samples responses to each prompt of this data-parallel rank, prompt by prompt.

    Every rank calls it with its data-parallel rank's prompts (possibly none) and gets their
    responses: the ranks of a replica get the same. row_ids: a number for each prompt, which
    errors name; sample_ids: a number of each prompt that is unique in the global batch
    (default: row_ids). Together with `seed` it determines the noise, so neither layout nor
    batch changes a text, as far as they leave the logits alone. media: None where all prompts are
    text; called once, so that nothing else holds it when the prompts have been read.

    Holds keys and values meanwhile: of P prompts as long as the longest, and of B responses as long
    as any so far (up to twice that, for a moment three times). Collectives: those
    of the forward for the prompts, of `RowBatch.write_token` for each token; where replicas
    share experts, maxima of one number over these: three before, and one every 16 tokens. With
    max_new_tokens above MEET and several replicas or context-parallel ranks, maxima of one number
    over the world: ranks that have written meet the others every MEET tokens until all have, since
    no collective would wait for as long as another's responses may take.

    Raises ValueError for an empty prompt or an id outside of the vocabulary;
    FloatingPointError, on all ranks that generate together, for logits that are not finite,
    naming the row.
    """
    settings = engine.settings
    check_prompts(prompts, row_ids, settings.max_new_tokens, engine.vocab_size)
    sample_ids = row_ids if sample_ids is None else sample_ids
    with _until_all_have_written(engine) as meets:
        of_prompts = media()  # on every rank: towers may hold collectives
        num_rows = engine.largest_of_ranks(len(prompts) * num_samples)
        if not num_rows:
            return []
        batch = RowBatch(engine, prompts, of_prompts, num_samples, num_rows, seed, sample_ids)
        del of_prompts  # the features have served
        responses = [Response([], []) for _ in range(len(prompts) * num_samples)]
        noted, num_written = 0, 1
        while True:
            not_finite = _collect(batch, settings.stop_token_ids, responses, noted, num_written)
            noted = num_written
            state = engine.largest_of_ranks(_NOT_FINITE if not_finite else len(batch.unfinished))
            if state == _NOT_FINITE:
                samples = {number: len(responses[number].token_ids) for number in not_finite}
                raise _not_finite_error(samples, row_ids, num_samples)
            if not state or num_written == settings.max_new_tokens:
                return responses
            if meets and num_written > 1 and (num_written - 1) % MEET == 0:
                engine.any_writes(True)
            batch.shrink(engine.batch_size(state))
            end = min(num_written + LOOK, settings.max_new_tokens)
            batch.reserve(end)
            while num_written < end:
                batch.write_token(num_written - 1)
                num_written += 1


@contextmanager
def _until_all_have_written(engine: Engine) -> Iterator[bool]:
    """Whether ranks meet, every MEET tokens of each: a rank that leaves goes on meeting the others
    until all have left.
    """
    meets = engine.writes_apart and engine.settings.max_new_tokens > MEET
    try:
        yield meets
    except FloatingPointError:
        _leave(engine, meets)
        raise
    _leave(engine, meets)


def _leave(engine: Engine, meets: bool) -> None:
    while meets and engine.any_writes(False):
        pass


def _collect(
    batch: RowBatch,
    stop_token_ids: Collection[int],
    responses: Sequence[Response],
    start: int,
    end: int,
) -> list[int]:
    """Add the tokens start .. end - 1 to the unfinished responses: the host waits for them.
    Returns the samples whose logits were not finite.
    """
    tokens, log_probabilities, ended = batch.newest(start, end)
    not_finite = []
    for place, number in list(batch.unfinished.items()):
        of_place, size = tokens[place], end - start
        if ended[place]:
            del batch.unfinished[place]
            stops = (token < 0 or token in stop_token_ids for token in of_place)
            size = list(stops).index(True) + 1
            if of_place[size - 1] < 0:
                not_finite.append(number)
        token_ids, of_tokens = responses[number]
        assert of_tokens is not None
        token_ids += of_place[:size]
        of_tokens += log_probabilities[place][:size]
    return not_finite


def check_prompts(
    prompts: Sequence[Sequence[int]], row_ids: Sequence[int], max_new_tokens: int, vocab_size: int
) -> None:
    """Raise ValueError for what no text can be written from."""
    if max_new_tokens < 1:
        raise ValueError(
            f"rollout: max_new_tokens is {max_new_tokens}, it must be at least 1 "
            "(--max_completion_length)"
        )
    if len(row_ids) != len(prompts):
        raise ValueError(f"rollout: {len(row_ids)} row ids for {len(prompts)} prompts")
    for index, (row_id, prompt) in enumerate(zip(row_ids, prompts)):
        if len(prompt) == 0:
            raise ValueError(
                f"rollout: the prompt of row {row_id} (prompt {index} of {len(prompts)}) has no "
                "tokens"
            )
        unknown = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"rollout: the prompt of row {row_id} holds id {unknown[0]}, the vocabulary has "
                f"{vocab_size} ids"
            )


def _not_finite_error(
    samples: dict[int, int], row_ids: Sequence[int], num_samples: int
) -> FloatingPointError:
    """samples: number of a sample -> of its token whose logits were not finite, from 1."""
    prompts = dict.fromkeys(number // num_samples for number in samples)
    named = ", ".join(
        f"row {row_ids[prompt]} (prompt {prompt} of {len(row_ids)})" for prompt in prompts
    )
    token = f"token {min(samples.values())}" if samples else "a token"
    return FloatingPointError(
        f"rollout: the logits of {token} are not finite for {named or OTHER_RANKS_ROW}: weights or "
        "activations have overflowed; lower --learning_rate, or take bfloat16 instead of float16"
    )
