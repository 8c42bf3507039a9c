"""What the loss functions return: one differentiable number per token, and metrics of the same
passes.
"""

from typing import NamedTuple

import torch


class LinearJsdOutput(NamedTuple):
    """Per token, float32 [N], the same on all ranks of the group; everything but `loss` is
    detached.

    A row whose label is -100 is masked: all its numbers are 0, its gradient too. KLs and entropies
    are of the distributions softened by the temperature, in nats; `sft_loss` and the label's
    log-probabilities are at temperature 1.
    """

    loss: torch.Tensor  # (1 - sft_alpha) jsd + sft_alpha sft_loss; gives gradients to the student
    jsd: torch.Tensor  # the chosen divergence
    kl_forward: torch.Tensor  # KL(teacher || student)
    kl_reverse: torch.Tensor  # KL(student || teacher)
    entropy_student: torch.Tensor
    entropy_teacher: torch.Tensor
    top1_agreement: (
        torch.Tensor
    )  # 1 where both sides' largest logits are in the same column (of equal ones the lowest)
    # None without labels:
    sft_loss: torch.Tensor | None = None  # cross-entropy of the student with the label
    token_correct: torch.Tensor | None = None  # 1 where the student's largest logit is the label's
    label_logprob_student: torch.Tensor | None = None
    label_logprob_teacher: torch.Tensor | None = None
