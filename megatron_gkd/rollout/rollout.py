"""Batches in, the same batches with new responses out, whatever backend writes them; and
`make_rollout`, the one place that chooses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_gkd.data.batch import Batch, BatchView, Packing, collate
from megatron_gkd.data.chat import read_stop_token_ids
from megatron_gkd.data.dataset import SampleDataset
from megatron_gkd.data.micro_batches import Budget, cut
from megatron_gkd.data.sample import Sample
from megatron_gkd.media.features import MediaFeatures, join_features
from megatron_gkd.media.medium import PromptReferences
from megatron_gkd.media.towers import StepMedia
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, largest, log_rank_0, text_of_rank
from megatron_gkd.responses import RolloutConfig
from megatron_gkd.rollout.backend import Author, MegatronBackend, Prompts, RolloutBackend
from megatron_gkd.rollout.decode import slow_kernels_note
from megatron_gkd.rollout.engine import Engine, GenerationSettings
from megatron_gkd.rollout.generate import Response, telling
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
    budget: Budget
    """What a micro-batch may hold, responses included"""
    packing: Packing
    num_samples: int = 1
    """Responses to each prompt; each is a row of the step"""
    with_written_view: Callable[[Sample], Sample] | None = None
    """A row with the student's response -> the same with the teacher's view that this makes"""
    greedy: bool = False
    """Whether the most probable token is taken in place of a draw"""

    def for_evaluation(self, data: SampleDataset, budget: Budget) -> "Rollout":
        """The same backend for the prompts of other data: one response to each, greedy, in
        micro-batches within `budget`.
        """
        return replace(
            self,
            references=data.media_references,
            with_written_view=data.with_written_view,
            budget=budget,
            num_samples=1,
            greedy=True,
        )

    def respond_or_skip(
        self, batches: Sequence[Batch], step: int, author: Author, media: StepMedia | None = None
    ) -> list[Batch]:
        """As `respond`; no batch, on any rank, where the logits of any row were not finite."""
        try:
            return self.respond(batches, step, author, media)
        except FloatingPointError as error:
            log_rank_0(self.parallel, f"Step {step + 1} is skipped: {error}")
            return []

    def respond(
        self, batches: Sequence[Batch], step: int, author: Author, media: StepMedia | None = None
    ) -> list[Batch]:
        """This data-parallel rank's rows with responses that `author` wrote, num_samples to each
        prompt, cut into micro-batches anew: as many on every rank. Padding rows get none. media: of
        the batches that came, where they have any.

        Collectives: those of the backend, and a maximum of two numbers over the world; every rank
        calls it, with its data-parallel rank's batches. Raises FloatingPointError, on all ranks,
        where the backend does on any; one of these ranks broadcasts the text.
        """
        answered: list[tuple[int, Sample]] = []
        error = ""
        try:
            answered = self._write(batches, step, author, media)
        except FloatingPointError as caught:
            error = str(caught)
        lengths = [sample.num_tokens for _, sample in answered]
        (micro_batches,) = cut(lengths, self.budget)
        # replicas write apart, and must agree
        ranks, rank = self.parallel.world_size, self.parallel.rank
        own = [len(micro_batches), telling(error) * ranks + rank]
        most, worst = largest(own, self.parallel.device)
        if worst >= ranks:
            error = text_of_rank(error, worst % ranks, self.parallel.device)
            raise FloatingPointError(error)
        if most > len(micro_batches):
            (finer,) = cut(lengths, replace(self.budget, at_least=most))
            # a greedy cut into more may need one more still
            fits = len(finer) == most
            micro_batches = finer if fits else micro_batches + [[]] * (most - len(micro_batches))
        batches = []
        for rows in micro_batches:
            samples: list[Sample | None] = [answered[row][1] for row in rows]
            numbers = [answered[row][0] for row in rows] or [-1]
            batch = collate(samples or [None], self.packing, numbers)
            batches.append(batch.to(self.parallel.device))
        return batches

    def _write(
        self, batches: Sequence[Batch], step: int, author: Author, media: StepMedia | None
    ) -> list[tuple[int, Sample]]:
        """The rows with their responses, each with its number in the global batch."""
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
        rows = [sample for batch in batches for sample in batch.samples if sample is not None]
        of_rows = iter(responses)
        answered = [
            (number, self._answered(row, next(of_rows), author))
            for row, number in zip(rows, prompts.sample_ids)
            for _ in range(self.num_samples)
        ]
        problems = [sample.view_problem for _, sample in answered if sample.view_problem]
        if problems:
            when = f"Evaluation after step {step}" if self.greedy else f"Step {step + 1}"
            log_rank_0(
                self.parallel,
                f"{when}: the teacher reads {len(problems)} of {len(answered)} rows of "
                f"rank 0 as the student does, without a view of its own: {problems[0]}",
            )
        return answered

    def _answered(self, sample: Sample, response: Response, author: Author) -> Sample:
        if author == "teacher":
            return sample.with_response(list(response.token_ids))
        drawn = response.log_probabilities
        answered = sample.with_response(list(response.token_ids), drawn)
        return self.with_written_view(answered) if self.with_written_view else answered

    def prompts(
        self, batches: Sequence[Batch], author: Author, media: StepMedia | None = None
    ) -> Prompts:
        """What `author` reads before the responses of the batches' rows."""
        views = [batch.student if author == "student" else batch.teacher for batch in batches]
        # The indices of each micro-batch's rows, without padding rows.
        indices = [[index for index, row in enumerate(batch.rows) if row >= 0] for batch in batches]
        token_ids, row_ids, sample_ids = [], [], []
        for batch, of_batch in zip(batches, indices):
            for index in of_batch:
                sample = batch.samples[index]
                assert sample is not None
                view = sample.student if author == "student" else sample.teacher
                token_ids.append(view.input_ids[: view.response_start])
                row_ids.append(sample.row)
                sample_ids.append(batch.sample_ids[index])

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
            greedy=self.greedy,
        )

    def num_truncated(self, batches: Sequence[Batch]) -> int:
        """Of the responses that were written, those that are truncated."""
        return sum(
            self.is_truncated(sample)
            for batch in batches
            for sample in batch.samples
            if sample is not None and sample.is_written
        )

    def is_truncated(self, sample: Sample) -> bool:
        """Whether a written response has `max_new_tokens` tokens and no stop id at its end."""
        view = sample.student
        is_full = len(view.input_ids) - view.response_start >= self.max_new_tokens
        return is_full and view.input_ids[-1] not in self.stop_token_ids

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
        starts = torch.tensor(view.starts, device=view.input_ids.device)
        row_of = torch.searchsorted(starts, view.media_rows, right=True) - 1
        prompt_of_row = torch.full((len(view.lengths),), -1, device=starts.device)
        prompt_of_row[list(rows)] = len(position_ids) + torch.arange(
            len(rows), device=starts.device
        )
        prompts.append(prompt_of_row[row_of])
        offsets.append(view.media_rows - starts[row_of])
        for row in rows:
            start = view.starts[row]
            position_ids.append(view.position_ids[:, 0, start : start + view.prompt_lengths[row]])
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
    budget: Budget,
    packing: Packing,
    seed: int,
    chat_template: str | None = None,
) -> Rollout:
    """The rollout of a run. The backend is chosen here and nowhere else; today there is one.

    model: this rank's stage of the decoder, bare. data: the rows of the batches to come. budget,
    packing: of the micro-batches that it makes. chat_template: a file in the place of the folder's
    template. Raises ValueError for a damaged file of the model
    folder that names its stop tokens.
    """
    stop_token_ids = read_stop_token_ids(model_folder, chat_template)
    if not stop_token_ids:
        log_rank_0(
            parallel,
            f"Note: no file in {model_folder} that can be read names an end-of-text token; every "
            "response will have --max_completion_length tokens",
        )
    if settings.num_generations > 1 and settings.rollout_temperature == 0:
        log_rank_0(
            parallel,
            f"Note: the {settings.num_generations} responses to a prompt (--num_generations) are "
            "all the same with --rollout_temperature 0",
        )
    if note := slow_kernels_note(model_args, parallel):
        log_rank_0(parallel, note)
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
        with_written_view=data.with_written_view,
        max_new_tokens=settings.max_completion_length,
        stop_token_ids=stop_token_ids,
        budget=budget,
        packing=packing,
        num_samples=settings.num_generations,
    )
