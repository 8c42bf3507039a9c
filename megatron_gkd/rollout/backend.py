"""The seam between the training loop and whatever writes the responses of an on-policy step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_gkd.data.batch import Batch, BatchView, with_responses
from megatron_gkd.lora import as_student, as_teacher
from megatron_gkd.media.features import MediaFeatures, join_features
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, all_gather_objects, log_rank_0
from megatron_gkd.rollout.generate import PromptMedia, generate
from megatron_gkd.rollout.mode import generation_mode


class RolloutBackend(Protocol):
    """Writes new responses to the prompts of one step's micro-batches."""

    def respond(
        self, model, batches: Sequence[Batch], step: int, media: StepMedia | None = None
    ) -> list[Batch]:
        """The same batches with responses that `model` wrote, a function of the prompts, the
        weights, the seed and `step` alone. media: the features of the batches' media, where they
        have any.
        """
        ...

    def num_truncated(self, batches: Sequence[Batch]) -> int:
        """Of the responses that it wrote, those that were cut before they ended."""
        ...


def prompt_media(
    views: Sequence[BatchView],
    written: Sequence[Sequence[int]],
    features: Sequence[MediaFeatures | None],
) -> PromptMedia | None:
    """The media of the prompts that are written to, all micro-batches in a row; None where all of
    them are text.

    written: for each view its rows that are; features: of each view's batch, None for a batch
    without media and on later stages.
    """
    if not any(len(view.media_rows) for view in views):
        return None
    position_ids, prompts, places, tokens = [], [], [], []
    for view, rows in zip(views, written):
        size, lengths = view.input_ids.shape[1], view.prompt_lengths.tolist()
        number = torch.full((len(view.input_ids),), -1, device=view.input_ids.device)
        number[list(rows)] = len(position_ids) + torch.arange(len(rows), device=number.device)
        prompts.append(number[view.media_rows // size])
        places.append(view.media_rows % size)
        position_ids += [view.position_ids[:, row, : lengths[row]] for row in rows]
        tokens.append(view.media_tokens)
    encoded = [index for index, of_batch in enumerate(features) if of_batch is not None]
    whole = None
    if encoded:
        whole, numbers = join_features([features[index] for index in encoded])
        for index, of_batch in zip(encoded, numbers):
            tokens[index] = of_batch[tokens[index]]
    return PromptMedia(
        position_ids, torch.cat(prompts), torch.cat(places), torch.cat(tokens), whole
    )


@dataclass(frozen=True)
class MegatronRollout:
    """The training model writes by itself: nothing is copied, merged or sent.

    The micro-batches of a step are written together, because a decoding step costs about the same
    for four rows as for forty.
    """

    model_args: ModelArgs
    parallel: Parallel
    eos_token_ids: Sequence[int]
    """Ids that end a response (see `read_stop_token_ids`)."""
    pad_token_id: int
    pad_to_multiple_of: int
    """Length of the new batches, as for `data.collate`."""
    seed: int
    max_completion_length: int = 512
    """Most tokens of a response."""
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1
    teacher_writes: bool = False
    """Sequence-level distillation: the teacher writes, from its own prompt, instead of the student.
    """
    progress: Callable[[int, int], None] | None = None
    """Called with (tokens written, max_completion_length)."""

    def respond(
        self, model, batches: Sequence[Batch], step: int, media: StepMedia | None = None
    ) -> list[Batch]:
        """Collectives: those of `generate`; every rank calls with its data-parallel rank's batches.
        Filler rows get an empty response.
        """
        prompts, row_ids, places = [], [], []
        views = [batch.teacher if self.teacher_writes else batch.student for batch in batches]
        written = [[index for index, row in enumerate(batch.rows) if row >= 0] for batch in batches]
        for number, (batch, view, indices) in enumerate(zip(batches, views, written)):
            ids, lengths = view.input_ids.tolist(), view.prompt_lengths.tolist()
            prompts += [ids[index][: lengths[index]] for index in indices]
            row_ids += [batch.rows[index] for index in indices]
            # Places in the global batch (see data/loader.py): a row that is in it twice is answered
            # twice.
            first = (number * self.parallel.dp_size + self.parallel.dp_rank) * len(batch.rows)
            places += [first + index for index in indices]
        toggle = as_teacher if self.teacher_writes else as_student
        with toggle(model), generation_mode(model):
            features = [None if media is None else media[index] for index in range(len(batches))]
            responses = generate(
                model,
                self.model_args,
                self.parallel,
                prompts,
                row_ids=row_ids,
                noise_ids=places,
                max_new_tokens=self.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                seed=(self.seed << 32) + step,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                media=prompt_media(views, written, features),
                progress=self.progress,
            )
        remaining = iter(responses)
        return [
            with_responses(
                batch,
                [next(remaining) if row >= 0 else [] for row in batch.rows],
                self.pad_token_id,
                self.pad_to_multiple_of,
            )
            for batch in batches
        ]

    def num_truncated(self, batches: Sequence[Batch]) -> int:
        """Responses of max_completion_length tokens whose last id is no stop id."""
        count = 0
        for view in (batch.student for batch in batches):
            last = view.input_ids.gather(1, view.lengths[:, None] - 1)[:, 0]
            ended = torch.isin(
                last, torch.tensor(list(self.eos_token_ids), dtype=last.dtype, device=last.device)
            )
            count += int(
                (~ended & (view.lengths - view.prompt_lengths >= self.max_completion_length)).sum()
            )
        return count


def respond_or_skip(
    rollout: RolloutBackend,
    model: torch.nn.Module,
    batches: list[Batch],
    step: int,
    media: StepMedia,
    parallel: Parallel,
) -> list[Batch]:
    """The batches with new responses; on all ranks none where the logits of any row were not
    finite.

    Collectives: the rollout's, and an exchange of the errors: replicas write apart, and must agree
    to skip the step.
    """
    written, error = [], ""
    try:
        written = rollout.respond(model, batches, step, media)
    except FloatingPointError as caught:
        error = str(caught)
    errors = all_gather_objects(error)
    if any(errors):
        of_rows = [
            text for text in errors if text and "a row of another rank" not in text
        ] or errors
        # the longest names the most rows
        log_rank_0(parallel, f"Step {step + 1} is skipped: {max(of_rows, key=len)}")
        return []
    return written
