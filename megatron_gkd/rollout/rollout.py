"""Batches in, the same batches with new responses out, whatever backend writes them; and
`make_rollout`, the one place that chooses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_gkd.data.batch import Batch, BatchView, with_responses
from megatron_gkd.data.chat import read_stop_token_ids
from megatron_gkd.data.dataset import SampleDataset
from megatron_gkd.media.features import MediaFeatures, join_features
from megatron_gkd.media.medium import PromptReferences
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, all_gather_objects, log_rank_0
from megatron_gkd.responses import RolloutConfig
from megatron_gkd.rollout.backend import Author, MegatronBackend, Prompts, RolloutBackend
from megatron_gkd.rollout.engine import Engine, GenerationSettings
from megatron_gkd.rollout.generate import OTHER_RANKS_ROW, Response
from megatron_gkd.rollout.prefill import PromptMedia
from megatron_gkd.rollout.sampling import Sampling


@dataclass(frozen=True)
class Rollout:
    """New responses for the micro-batches of a step. Close it (contextlib.closing) in whatever way
    the run ends.
    """

    backend: RolloutBackend
    model: Any
    """This rank's stage of the decoder, bare: its LoRA is what the student writes with"""
    parallel: Parallel
    references: Callable[[int, Author], PromptReferences]
    """The media of a row's prompt, by its index in the data set"""
    max_new_tokens: int
    stop_token_ids: Sequence[int]
    pad_token_id: int
    num_samples: int = 1
    """Responses to each prompt; each is a row of the step"""

    def respond_or_skip(
        self, batches: Sequence[Batch], step: int, author: Author, media: StepMedia | None = None
    ) -> list[Batch]:
        """As `respond`; on all ranks no batch where the logits of any row were not finite.

        Collectives: those of `respond`, and an exchange of the errors: replicas write apart, and
        must agree to skip the step.
        """
        written: list[Batch] = []
        error = ""
        try:
            written = self.respond(batches, step, author, media)
        except FloatingPointError as caught:
            error = str(caught)
        errors = all_gather_objects(error)
        if not any(errors):
            return written
        of_rows = [text for text in errors if text and OTHER_RANKS_ROW not in text]
        # The longest names the most rows.
        line = f"Step {step + 1} is skipped: {max(of_rows or errors, key=len)}"
        log_rank_0(self.parallel, line)
        return []

    def respond(
        self, batches: Sequence[Batch], step: int, author: Author, media: StepMedia | None = None
    ) -> list[Batch]:
        """This data-parallel rank's micro-batches with responses that `author` wrote, each
        num_samples times, one after the other; padding rows get none. media: of these batches,
        where they have any.

        Collectives: those of the backend; every rank calls it, with its data-parallel rank's
        batches. Raises FloatingPointError as the backend does.
        """
        if author == "student":
            self.backend.update_weights(self.model, step)
        prompts = self.prompts(batches, author, media)
        responses = self.backend.write(prompts, step)
        expected = len(prompts.token_ids) * self.num_samples
        if len(responses) != expected:
            raise ValueError(
                f"the rollout engine gave {len(responses)} responses; {self.num_samples} to each "
                f"of {len(prompts.token_ids)} prompts were asked for"
            )
        written, first = [], 0
        for batch in batches:
            num_rows = sum(row >= 0 for row in batch.rows)
            end = first + num_rows * self.num_samples
            for sample in range(self.num_samples):
                of_batch = responses[first + sample : end : self.num_samples]
                written.append(self._answered(batch, of_batch, author))
            first = end
        return written

    def _answered(self, batch: Batch, responses: Sequence[Response], author: Author) -> Batch:
        """The batch with a response to each of its data rows."""
        of_row = iter(response.token_ids for response in responses)
        token_ids = [next(of_row) if row >= 0 else [] for row in batch.rows]
        answered = with_responses(
            batch, token_ids, self.pad_token_id, self.parallel.sequence_multiple
        )
        parts = [response.log_probabilities for response in responses]
        if author == "teacher" or None in parts:
            return answered
        log_probabilities = [value for part in parts if part is not None for value in part]
        return replace(
            answered,
            log_probabilities=torch.tensor(log_probabilities, device=self.parallel.device),
        )

    def prompts(
        self, batches: Sequence[Batch], author: Author, media: StepMedia | None = None
    ) -> Prompts:
        """What `author` reads before the responses of the batches' rows."""
        views = [batch.student if author == "student" else batch.teacher for batch in batches]
        # The indices of each micro-batch's rows, without padding rows.
        indices = [[index for index, row in enumerate(batch.rows) if row >= 0] for batch in batches]
        token_ids, row_ids, sample_ids = [], [], []
        for number, (batch, view, of_batch) in enumerate(zip(batches, views, indices)):
            ids, lengths = view.input_ids.tolist(), view.prompt_lengths.tolist()
            token_ids += [ids[index][: lengths[index]] for index in of_batch]
            row_ids += [batch.rows[index] for index in of_batch]
            # The order of the global batch: see data/loader.py.
            first = (number * self.parallel.dp_size + self.parallel.dp_rank) * len(batch.rows)
            sample_ids += [first + index for index in of_batch]

        def encode_media() -> PromptMedia | None:
            features = [None if media is None else media[index] for index in range(len(batches))]
            return prompt_media(views, indices, features)

        return Prompts(
            author=author,
            num_samples=self.num_samples,
            token_ids=token_ids,
            row_ids=row_ids,
            sample_ids=sample_ids,
            references=lambda prompt: self.references(row_ids[prompt], author),
            media=encode_media,
        )

    def num_truncated(self, batches: Sequence[Batch]) -> int:
        """Of the responses that were written, those of `max_new_tokens` tokens whose last id is no
        stop id.
        """
        count = 0
        for view in (batch.student for batch in batches if batch.on_policy):
            last = view.input_ids.gather(1, view.lengths[:, None] - 1)[:, 0]
            stop_ids = torch.tensor(list(self.stop_token_ids), dtype=last.dtype, device=last.device)
            is_full = view.lengths - view.prompt_lengths >= self.max_new_tokens
            count += int((is_full & ~torch.isin(last, stop_ids)).sum())
        return count

    def close(self) -> None:
        """Stop the backend."""
        self.backend.close()


def prompt_media(
    views: Sequence[BatchView],
    indices: Sequence[Sequence[int]],
    features: Sequence[MediaFeatures | None],
) -> PromptMedia | None:
    """The media of the prompts of several views, counted through; None where all of them are text.

    indices: of each view the rows whose prompts are meant; features: of each view's batch, None for
    a batch without media and on later stages.
    """
    if not any(len(view.media_rows) for view in views):
        return None
    position_ids: list[torch.Tensor] = []
    prompts, offsets, tokens = [], [], []
    for view, rows in zip(views, indices):
        size, lengths = view.input_ids.shape[1], view.prompt_lengths.tolist()
        prompt_of_row = torch.full((len(view.input_ids),), -1, device=view.input_ids.device)
        prompt_of_row[list(rows)] = len(position_ids) + torch.arange(
            len(rows), device=prompt_of_row.device
        )
        prompts.append(prompt_of_row[view.media_rows // size])
        offsets.append(view.media_rows % size)
        position_ids += [view.position_ids[:, row, : lengths[row]] for row in rows]
        tokens.append(view.media_tokens)
    encoded = {index: found for index, found in enumerate(features) if found is not None}
    joined = None
    if encoded:
        joined, numbers = join_features(list(encoded.values()))
        for index, of_batch in zip(encoded, numbers):
            tokens[index] = of_batch[tokens[index]]
    return PromptMedia(
        position_ids, torch.cat(prompts), torch.cat(offsets), torch.cat(tokens), joined
    )


def make_rollout(
    settings: RolloutConfig,
    *,
    model: Any,
    model_args: ModelArgs,
    parallel: Parallel,
    data: SampleDataset,
    model_folder: str,
    seed: int,
) -> Rollout:
    """The rollout of a run. The backend is chosen here and nowhere else; today there is one.

    model: this rank's stage of the decoder, bare. data: the rows of the batches to come. Raises
    ValueError for a damaged file of the model folder that names its stop tokens.
    """
    stop_token_ids = read_stop_token_ids(model_folder)
    if not stop_token_ids:
        log_rank_0(
            parallel,
            f"Note: no file in {model_folder} that can be read names an end-of-text token; every "
            "response will have --max_completion_length tokens",
        )
    generation = GenerationSettings(
        sampling=Sampling(
            temperature=settings.rollout_temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=settings.repetition_penalty,
        ),
        max_new_tokens=settings.max_completion_length,
        stop_token_ids=stop_token_ids,
        pad_token_id=data.pad_token_id,
        prefill_tokens=settings.rollout_prefill_tokens,
        cuda_graphs=settings.rollout_cuda_graphs,
    )
    backend = MegatronBackend(Engine(model, model_args, parallel, generation), seed)
    return Rollout(
        backend=backend,
        model=model,
        parallel=parallel,
        references=data.media_references,
        max_new_tokens=settings.max_completion_length,
        stop_token_ids=stop_token_ids,
        pad_token_id=data.pad_token_id,
        num_samples=settings.num_generations,
    )
