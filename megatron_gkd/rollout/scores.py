"""What the sampler draws from: each column's score, and what is known of a row's logits."""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 128  # columns whose largest score is kept


class Scores(NamedTuple):
    """Of B rows and C columns of this rank."""

    scores: Tensor
    """fp32 [B, C]: after repetition penalty and temperature; -inf for padding"""
    log_sum: Tensor
    """fp32 [B]: log-sum-exp of the logits as they came; NaN where one is not finite"""
    maxima: Tensor | None
    """fp32 [B, C / GROUP]: the largest score of each group of columns, where that was cheap"""

    def top_k(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest scores of each row in falling order and their columns, [B, k] each; which
        ones of equal scores is not said.

        With `maxima`: the k largest scores lie in the k groups with the largest maxima.
        """
        scores, maxima = self.scores, self.maxima
        if maxima is None or scores.shape[1] % GROUP or maxima.shape[1] <= k:
            return torch.topk(scores, k, dim=1)
        groups = maxima.topk(k, dim=1).indices
        of_groups = scores.unflatten(1, (-1, GROUP)).gather(
            1, groups[..., None].expand(-1, -1, GROUP)
        )
        best = of_groups.flatten(1).topk(k, dim=1)
        place = best.indices
        return best.values, groups.gather(1, place // GROUP) * GROUP + place % GROUP
