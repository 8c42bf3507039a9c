"""The seam between the training loop and whatever writes the responses of an on-policy step."""

from dataclasses import dataclass
from typing import Callable, Optional, Protocol, Sequence

from megatron_gkd.data.batch import Batch, with_responses
from megatron_gkd.lora.modules import lora_enabled
from megatron_gkd.model.config import ModelShape
from megatron_gkd.parallel import Parallel
from megatron_gkd.rollout.generate import generate


class RolloutBackend(Protocol):
    """Writes new responses to the prompts of one step's micro-batches."""

    def respond(self, model, batches: Sequence[Batch], step: int) -> list[Batch]:
        """The same batches with responses that `model` wrote, a function of the prompts, the weights, the seed and
        `step` alone."""
        ...


@dataclass(frozen=True)
class MegatronRollout:
    """The training model writes by itself: nothing is copied, merged or sent.

    The micro-batches of a step are written together, because a decoding step costs about the same for four rows as for
    forty.
    """

    shape: ModelShape
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
    """Sequence-level distillation: the teacher (LoRA off, its own prompt) writes instead of the student (LoRA on)."""
    progress: Optional[Callable[[int, int], None]] = None
    """Called with (tokens written, max_completion_length)."""

    def respond(self, model, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Collectives: those of `generate`; every rank calls with its data-parallel rank's batches. Filler rows get an
        empty response."""
        prompts, row_ids = [], []
        for batch in batches:
            view = batch.teacher if self.teacher_writes else batch.student
            rows = zip(view.input_ids.tolist(), view.prompt_lengths.tolist(), batch.rows)
            written = [(ids[:length], row) for ids, length, row in rows if row >= 0]
            prompts += [prompt for prompt, _ in written]
            row_ids += [row for _, row in written]
        with lora_enabled(model, not self.teacher_writes):
            responses = generate(
                model,
                self.shape,
                self.parallel,
                prompts,
                row_ids=row_ids,
                max_new_tokens=self.max_completion_length,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                seed=(self.seed << 32) + step,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
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
