"""What is distilled: the divergence, the teacher, and which steps learn from responses that the run
writes. Imports nothing slow.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_gkd.flags import (
    POSITIVE,
    SHARE,
    require,
    require_at_least,
    require_in,
    require_not_empty,
    setting,
)
from megatron_gkd.loss.divergence import KINDS, Divergence, Name
from megatron_gkd.loss.token_weights import WeightName


@dataclass
class DistillConfig:
    _argument_group_name = "distillation"

    lmbda: str = setting(
        "0.5",
        "Probability of an on-policy step; or a schedule FROM_STEP:VALUE,... such as "
        "0:0.3,500:0.5,1000:0.7.",
    )
    temperature: float = setting(
        2.0,
        "Softens teacher and student in the loss (--rollout_temperature is the one for sampling).",
    )
    beta: float = setting(
        0.5,
        "Weight of the student in M = beta P_student + (1 - beta) P_teacher; see "
        "--beta_convention.",
    )
    beta_convention: Literal["guide", "paper"] = setting(
        "guide",
        "paper: beta is the teacher's weight, as in the GKD paper, TRL and ms-swift; 0 is forward "
        "KL, 1 reverse KL.",
    )
    divergence: Name = setting("jsd", "forward_kl: KL(P_t || P_s); reverse_kl: KL(P_s || P_t).")
    divergence_clip: float | None = setting(
        None,
        "Most that one vocabulary entry of one token adds to the divergence, in nats; beyond it "
        "gives no gradient. Default: no limit.",
    )
    loss_top_k: int | None = setting(
        None,
        "Compare both sides on the teacher's K most probable tokens and one outcome for all "
        "others. Default: on the whole vocabulary.",
    )
    skip_first_tokens: int = setting(
        0, "The first N trained tokens of each response (of each assistant turn) carry no loss."
    )
    token_weight: WeightName = setting(
        "none",
        "What a token counts in the loss's mean. entropy: the student's entropy; position: the "
        "first third of a response less.",
    )
    importance_clip: float | None = setting(
        None,
        "The loss of each token that the student wrote times its probability in the training pass "
        "over that of its writing, at most this. Default: not done.",
    )
    teacher_adapter: str | None = setting(
        None,
        "The teacher is the base with this PEFT adapter, frozen, instead of the base alone; any "
        "rank, any linears.",
    )
    teacher_ema: float | None = setting(
        None,
        "The teacher is an average of the student: after each update its LoRA becomes (1 - E) its "
        "own + E the student's. SDFT's code has 0.01, TRL's SDFT 0.05.",
    )
    teacher_sync_steps: int | None = setting(
        None,
        "The teacher is the student as it was: after every so many updates its LoRA becomes a "
        "copy of the student's.",
    )
    teacher_start: Literal["student", "base"] = setting(
        "student",
        "What a teacher of --teacher_ema or --teacher_sync_steps starts from: the student's LoRA "
        "(fresh, that is the base; else --adapter), or the base.",
    )
    seq_kd: bool = setting(False, "Sequence-level KD: the teacher writes the responses.")
    sft_alpha: float = setting(
        0.0, "Loss = (1 - a) divergence + a cross-entropy; on data-set batches only."
    )
    allow_zero_signal: bool = setting(
        False, "Run even where student and teacher are equal and nothing can be learned."
    )

    def __post_init__(self):
        self.lmbda = str(self.lmbda)
        parse_schedule(self.lmbda)
        require_in(self, POSITIVE, "temperature", way_out="1 to 4 is usual")
        require_in(self, SHARE, "sft_alpha")
        self._check_teacher()
        if self.divergence_clip is not None:
            require_in(self, POSITIVE, "divergence_clip", way_out="none is no limit")
        if self.loss_top_k is not None:
            require_at_least(self, 1, "loss_top_k")
        require_at_least(self, 0, "skip_first_tokens")
        if self.importance_clip is not None:
            require_in(
                self, POSITIVE, "importance_clip", way_out="2 is usual, none leaves importance out"
            )
        if not KINDS[self.divergence].uses_beta or self.beta_convention == "paper":
            require_in(self, SHARE, "beta")
        else:
            way_out = (
                "this JSD is 0 at both ends; see --divergence forward_kl and reverse_kl, "
                "--beta_convention paper"
            )
            allowed = "in (0, 1) in the guide's convention"
            require(0 < self.beta < 1, "beta", self.beta, allowed, way_out)

    def _check_teacher(self) -> None:
        """The flags of a teacher with LoRA, and what does not go with them."""
        require_not_empty(self, "teacher_adapter")
        ema, sync = self.teacher_ema, self.teacher_sync_steps
        if ema is not None:
            way_out = "0.05 is usual, none is a teacher that stays"
            require(0 < ema <= 1, "teacher_ema", ema, "in (0, 1]", way_out)
            allowed = "left out with --teacher_sync_steps"
            way_out = "the teacher averages or copies; --teacher_ema none leaves the latter"
            require(sync is None, "teacher_ema", ema, allowed, way_out)
        if sync is not None:
            require_at_least(self, 1, "teacher_sync_steps")
        if self.teacher_follows:
            allowed = "left out with --teacher_ema and --teacher_sync_steps"
            way_out = (
                "matrices of two adapters that have not grown from one have no average: start both "
                "with --adapter, or set --teacher_ema none for a teacher that stays"
            )
            given = self.teacher_adapter
            require(given is None, "teacher_adapter", given, allowed, way_out)
        else:
            allowed = "for --teacher_ema and --teacher_sync_steps"
            way_out = "without them the base alone is the teacher: leave it out"
            start = self.teacher_start
            require(start == "student", "teacher_start", start, allowed, way_out)

    @property
    def teacher_follows(self) -> bool:
        """Whether the teacher has LoRA of its own that follows the student's."""
        return self.teacher_ema is not None or self.teacher_sync_steps is not None

    def teacher_rate(self, num_updates: int) -> float:
        """E of teacher + E (student - teacher) after so many updates of the student; 1 is a copy, 0
        leaves the teacher alone.
        """
        if self.teacher_sync_steps is not None:
            return float(num_updates % self.teacher_sync_steps == 0)
        return self.teacher_ema or 0.0

    def teacher_line(self) -> str | None:
        """What the teacher's LoRA is, for the start of a run; None: the teacher is the base
        alone.
        """
        if self.teacher_adapter:
            return f"frozen adapter {self.teacher_adapter}"
        if self.teacher_ema is not None:
            return f"average of the student's LoRA (--teacher_ema {self.teacher_ema:g})"
        if self.teacher_sync_steps is not None:
            return f"copy of the student's LoRA (--teacher_sync_steps {self.teacher_sync_steps})"
        return None

    def lmbda_at(self, step: int) -> float:
        """Probability that the step with this number (the first is 0) is on-policy."""
        return [value for start, value in parse_schedule(self.lmbda) if start <= step][-1]

    @property
    def may_be_on_policy(self) -> bool:
        """Whether any step of the schedule can be on-policy."""
        return any(value > 0 for _, value in parse_schedule(self.lmbda))

    @property
    def writes_responses(self) -> bool:
        """Whether student or teacher may write responses to learn from."""
        return self.seq_kd or self.may_be_on_policy

    def may_use_data_responses(self, total_steps: int) -> bool:
        """Whether any of the steps can learn from the data set's own responses, which is where
        sft_alpha counts.
        """
        return not self.seq_kd and any(
            value < 1 for start, value in parse_schedule(self.lmbda) if start < total_steps
        )

    @property
    def loss_divergence(self) -> Divergence:
        """The divergence that is computed, with the student's weight in its mixture, whichever
        convention --beta was given in.
        """
        name, limits, beta = self.divergence, KINDS[self.divergence].limits, 0.5
        if limits and self.beta_convention == "guide":
            beta = self.beta
        elif limits and self.beta in (0, 1):
            name = limits[int(self.beta)]
        elif limits:
            beta = 1 - self.beta
        return Divergence(name, beta, self.temperature, self.divergence_clip, self.loss_top_k)

    def loss_line(self) -> str:
        """One line for the start of a run: what the loss is, in numbers."""
        divergence = self.loss_divergence
        formula = KINDS[divergence.kind].formula.format(
            student=divergence.beta, teacher=1 - divergence.beta
        )
        used = (
            f"--beta {self.beta:g}, {self.beta_convention} convention"
            if KINDS[self.divergence].uses_beta
            else f"--divergence {self.divergence}"
        )
        clip = (
            "" if self.divergence_clip is None else f", each entry at most {self.divergence_clip:g}"
        )
        sft = (
            f", plus {self.sft_alpha:g} cross-entropy on data-set batches" if self.sft_alpha else ""
        )
        options = [
            text
            for is_set, text in (
                (self.loss_top_k, f"on the teacher's {self.loss_top_k} best tokens and the rest"),
                (self.skip_first_tokens, f"without each response's first {self.skip_first_tokens}"),
                (self.token_weight != "none", f"tokens weighted by {self.token_weight}"),
                (
                    self.importance_clip,
                    f"of the student's own responses times importance, at most "
                    f"{self.importance_clip}",
                ),
            )
            if is_set
        ]
        more = "".join(f", {text}" for text in options)
        return f"{formula}, in nats at temperature {self.temperature:g}{clip}{sft}{more} ({used})"


def parse_schedule(text: str) -> list[tuple[int, float]]:
    """`0.5` or `0:0.3,500:0.5,1000:0.7` -> [(first step, probability), ...] from step 0 on. Raises
    ValueError for another text.
    """
    allowed = (
        "a number in [0, 1], or FROM_STEP:VALUE pairs that start at 0 and ascend, such as "
        "0:0.3,500:0.5,1000:0.7"
    )
    try:
        pairs = [pair.split(":") for pair in text.split(",")] if ":" in text else [["0", text]]
        schedule = [(int(start), float(value)) for start, value in pairs]
    except ValueError:
        require(False, "lmbda", text, allowed)
    starts = [start for start, _ in schedule]
    ascending = starts[0] == 0 and all(low < high for low, high in zip(starts, starts[1:]))
    require(ascending and all(0 <= value <= 1 for _, value in schedule), "lmbda", text, allowed)
    return schedule
