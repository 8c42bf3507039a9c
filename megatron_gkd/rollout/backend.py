"""The seam between a training step and the engine that writes its responses: `RolloutBackend`,
prompts in, token ids out. In the training process `MegatronBackend`; an engine outside of it
implements the same three methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from megatron_gkd.forward import eval_mode
from megatron_gkd.lora import as_student, as_teacher
from megatron_gkd.media.medium import PromptReferences
from megatron_gkd.rollout.engine import Engine
from megatron_gkd.rollout.generate import Response, generate, telling
from megatron_gkd.rollout.prefill import PromptMedia

Author = Literal["student", "teacher"]
"""Who answers, from its own view of a row: the student in on-policy steps, the teacher in
sequence-level distillation.
"""


@dataclass(frozen=True)
class Prompts:
    """The prompts that a data-parallel rank wants answered in one step, of all its micro-batches,
    without padding rows. Prompt i is index i of each list, of `references` and of `media`.
    """

    author: Author
    num_samples: int
    """Responses to each prompt"""
    token_ids: Sequence[Sequence[int]]
    """As the decoder reads them: each medium is all of its placeholder tokens"""
    row_ids: Sequence[int]
    """Index in the data set; the same row may occur more than once"""
    sample_ids: Sequence[int]
    """Index in the global batch of the step: unique, and the same at every layout, for seeds"""
    references: Callable[[int], PromptReferences]
    """The media of prompt i as its row gave them, paths or bytes: for an engine that has towers of
    its own. Read from the data set when called.
    """
    media: Callable[[], PromptMedia | None]
    """The media of all prompts as features of this process's towers; None where all are text.
    Towers with LoRA encode when it is called, with LoRA on or off as it then is.
    """
    greedy: bool = False
    """Whether the most probable token is taken in place of a draw, all else as the run draws: for
    evaluation
    """


class RolloutBackend(Protocol):
    """An engine that writes responses.

    Every rank has one and calls it in the same order, so all three methods may hold collectives.
    """

    def update_weights(self, model: Any, step: int) -> None:
        """Called before each `write` for the student: take over the LoRA of `model`, this rank's
        pipeline stage of the decoder (`checkpoint.save_checkpoint` without an optimizer writes it
        as a PEFT adapter). The base model never changes.
        """
        ...

    def write(self, prompts: Prompts, step: int) -> list[Response]:
        """`num_samples` responses to each prompt, prompt by prompt: 1 to `max_new_tokens` ids,
        ending with the stop id where it ended by itself. A function of the prompts, the weights,
        the seed and `step` alone.

        The ranks of a replica (TP, PP) pass the same prompts and get the same responses; a rank may
        have no prompts. Raises FloatingPointError where logits are not finite: the step is skipped
        on all ranks.
        """
        ...

    def close(self) -> None:
        """The end of the run, however it ends: stop what was started."""
        ...


@dataclass
class _Written:
    """What a context-parallel rank wrote, or why it could not."""

    responses: list[Response] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class MegatronBackend:
    """The training model writes by itself: nothing is copied, merged or sent.

    The rows of a step are written together, whatever its micro-batches: a token costs about the
    same for four rows as for forty.
    """

    engine: Engine
    seed: int

    def update_weights(self, model: Any, step: int) -> None:
        """Nothing to do: `write` reads the model that is trained, whose weights are the newest."""

    def write(self, prompts: Prompts, step: int) -> list[Response]:
        """Collectives: those of `generate`, of the towers where they have LoRA, and with context
        parallelism, whose ranks share the prompts, an exchange of what they wrote.
        """
        toggle = as_student if prompts.author == "student" else as_teacher
        engine = self.engine.greedy if prompts.greedy else self.engine
        model, parallel = engine.model, engine.parallel
        own = range(parallel.cp_rank, len(prompts.token_ids), parallel.cp_size)
        # also the towers, which encode the prompts' media
        with toggle(model), eval_mode(model), torch.no_grad():

            def media() -> PromptMedia | None:
                of_all = prompts.media()
                return None if of_all is None else of_all.of(own)

            written = _Written()
            try:
                written.responses = generate(
                    engine,
                    [prompts.token_ids[index] for index in own],
                    seed=(self.seed << 32) + step,
                    row_ids=[prompts.row_ids[index] for index in own],
                    sample_ids=[prompts.sample_ids[index] for index in own],
                    media=media,
                    num_samples=prompts.num_samples,
                )
            except FloatingPointError as error:
                written.error = str(error)
        return self._joined(written, prompts)

    def _joined(self, own: _Written, prompts: Prompts) -> list[Response]:
        """The responses of all context-parallel ranks, prompt by prompt. Raises what any of them
        met.
        """
        parallel = self.engine.parallel
        parts: list[Any] = [own]
        if parallel.cp_size > 1:
            parts = [None] * parallel.cp_size
            torch.distributed.all_gather_object(parts, own, group=parallel.groups.cp)
        if errors := [part.error for part in parts if part.error]:
            raise FloatingPointError(max(errors, key=telling))
        count, joined = prompts.num_samples, []
        for prompt in range(len(prompts.token_ids)):
            index, part = divmod(prompt, parallel.cp_size)
            joined += parts[part].responses[index * count : (index + 1) * count]
        return joined

    def close(self) -> None:
        """Let go of the engine's graphs."""
        self.engine.close()
