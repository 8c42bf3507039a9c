"""How much each response token counts: a table of functions of per-token statistics. The loss of a
step is sum w L / sum w over its response tokens, so a weight's scale means nothing; weights give no
gradient.

    none       1
    entropy    H(Q), the student's entropy: tokens where it is undecided count most. It is the first
               of the two signals of arXiv:2604.14084, which keeps tokens by it; here none is
               dropped.
    position   0.25 + 0.75 sigmoid((t / n - 0.3) / 0.1) of token t = 1 .. n of a response: the first
               third counts less, where a teacher that knows more judges tokens least reliably. The
               weight of arXiv:2605.21606 and its three numbers; there each response is averaged for
               itself first.

This file imports no torch: distillation.py reads it too.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

WeightName = Literal["none", "entropy", "position"]  # none, and the keys of WEIGHTS

POSITION_LOWEST, POSITION_MIDDLE, POSITION_WIDTH = 0.25, 0.3, 0.1


class TokenStatistics(NamedTuple):
    """What a weight may depend on, float32 [N] each, detached."""

    entropy_student: "Tensor"  # of the softened distribution, in nats
    entropy_teacher: "Tensor"
    place: "Tensor"  # in (0, 1]: which of its response's tokens, of those that carry a loss


def _entropy(token: TokenStatistics) -> "Tensor":
    return token.entropy_student


def _position(token: TokenStatistics) -> "Tensor":
    rise = ((token.place - POSITION_MIDDLE) / POSITION_WIDTH).sigmoid()
    return POSITION_LOWEST + (1 - POSITION_LOWEST) * rise


WEIGHTS: dict[str, Callable[[TokenStatistics], "Tensor"]] = {
    "entropy": _entropy,
    "position": _position,
}
