"""How the responses of on-policy steps are written. Imports nothing slow."""

import math
from dataclasses import dataclass

from megatron_gkd.flags import (
    POSITIVE,
    Range,
    require,
    require_at_least,
    require_in,
    setting,
)


@dataclass
class RolloutConfig:
    _argument_group_name = "rollout"

    max_completion_length: int = setting(512, "Tokens that a generated response may have.")
    rollout_temperature: float = setting(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = setting(
        0.9, "Sample from the smallest set of tokens with this much probability; 1 is off."
    )
    top_k: int = setting(50, "Sample from this many most probable tokens; 0 is off.")
    repetition_penalty: float = setting(
        1.1,
        "Divides the positive logits of tokens already seen, multiplies the negative; 1 is off.",
    )
    num_generations: int = setting(
        1, "Responses to each prompt where the run writes them; each is a row of the step."
    )
    rollout_prefill_tokens: int = setting(
        8192, "Prompt tokens that one forward of a rollout reads."
    )
    rollout_cuda_graphs: bool = setting(
        True, "On CUDA: replay what a token of a rollout does as one graph."
    )

    def __post_init__(self):
        require_at_least(self, 1, "max_completion_length")
        require_at_least(self, 1, "num_generations")
        require_at_least(self, 1, "rollout_prefill_tokens")
        # logits over a smaller one are no fp32 numbers
        is_one = lambda value: value == 0 or 1e-6 <= value < math.inf
        require_in(self, Range("0 (greedy) or 1e-6 or more", is_one), "rollout_temperature")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]", "1 switches it off")
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more", "0 switches it off")
        require_in(self, POSITIVE, "repetition_penalty", way_out="1 switches it off")

    def changed_sampling(self) -> list[str]:
        """The flags, with their values, by which responses are drawn from another distribution than
        the policy's own.
        """
        off = {"rollout_temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
        values = {name: getattr(self, name) for name in off}
        return [f"--{name} {value:g}" for name, value in values.items() if value != off[name]]
