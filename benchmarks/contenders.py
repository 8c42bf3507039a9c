"""What benchmarks/loss.py compares the loss with: TRL, plain torch with a differentiable
all-reduce, Liger, and the limits.

Each contender is a function without arguments that runs forward and backward once. The functions
below make one from the tensors that all of them share; `settings` are beta (the student's weight)
and temperature. N rows, V columns, H hidden size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

from megatron_gkd.loss import linear_jsd, vocab_parallel_jsd

Contender = Callable[[], Any]
Settings = dict[str, Any]  # beta, temperature


def run_ours(
    student: Tensor, teacher: Tensor, settings: Settings, group: dist.ProcessGroup | None = None
) -> Contender:
    """`vocab_parallel_jsd` on logits [N, V/TP]; student requires a gradient."""

    def run():
        loss = vocab_parallel_jsd(student, teacher, group=group, **settings)
        return torch.autograd.grad(loss.sum(), student)

    return run


def run_trl(student: Tensor, teacher: Tensor, settings: Settings) -> Contender:
    """TRL's generalized_jsd_loss; its beta is the teacher's weight."""
    from trl.experimental.gkd import GKDTrainer

    arguments = dict(
        beta=1.0 - settings["beta"], temperature=settings["temperature"], reduction="sum"
    )

    def run():
        loss = GKDTrainer.generalized_jsd_loss(
            student.unsqueeze(0), teacher.unsqueeze(0), **arguments
        )
        return torch.autograd.grad(loss, student)

    return run


def _log_softmax(logits: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """Over the vocabulary of all ranks, in float32; the backward of its all-reduce is one too."""
    scaled = logits.float() / temperature
    top = scaled.detach().amax(-1, keepdim=True)
    if group is None:
        return F.log_softmax(scaled, -1)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    return scaled - top - all_reduce((scaled - top).exp().sum(-1, keepdim=True), group=group).log()


def _plain_jsd(
    student: Tensor,
    teacher: Tensor,
    beta: float,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    log_q, log_p = (
        _log_softmax(student, temperature, group),
        _log_softmax(teacher, temperature, group),
    )
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1.0 - beta))
    loss = (
        beta * log_q.exp() * (log_q - log_m) + (1.0 - beta) * log_p.exp() * (log_p - log_m)
    ).sum(-1)
    return loss if group is None else all_reduce(loss, group=group)


def run_plain(
    student: Tensor,
    teacher: Tensor,
    settings: Settings,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = 64,
) -> Contender:
    """Plain torch, chunk by chunk under activation checkpointing.

    The differentiable all-reduce sums the upstream gradients of all ranks, each of which holds the
    whole loss: hence the division by their number.
    """

    def run():
        losses = [
            checkpoint(
                _plain_jsd,
                student[start : start + chunk_rows],
                teacher[start : start + chunk_rows],
                settings["beta"],
                settings["temperature"],
                group,
                use_reentrant=False,
            )
            for start in range(0, len(student), chunk_rows)
        ]
        ranks = 1 if group is None else dist.get_world_size(group)
        return torch.autograd.grad(torch.cat(losses).sum() / ranks, student)

    return run


def run_read_write(student: Tensor, teacher: Tensor) -> Contender:
    """The limit for functions of logits: both sides read once, one tensor of that size written."""
    first, second = student.detach(), teacher.detach()
    return lambda: torch.add(first, second)


def run_liger(student: Tensor, teacher: Tensor, settings: Settings) -> Contender:
    """Liger-Kernel's JSD of log-probabilities (CUDA only), its mean over the rows; its beta is the
    teacher's weight.
    """

    def run():
        from liger_kernel.ops.jsd import LigerJSDFunction

        log_q = F.log_softmax(student.float() / settings["temperature"], -1)
        log_p = F.log_softmax(teacher.float() / settings["temperature"], -1)
        return torch.autograd.grad(
            LigerJSDFunction.apply(log_q, log_p, None, 1.0 - settings["beta"]), student
        )

    return run


def run_linear_liger(
    student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, settings: Settings
) -> Contender:
    """Liger-Kernel's JSD fused with the lm_head (CUDA only), its mean over the rows; beta as in
    `run_liger`.
    """

    def run():
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        loss = LigerFusedLinearJSDFunction.apply(
            student_hidden,
            weight,
            teacher_hidden,
            weight,
            None,
            1.0 - settings["beta"],
            -100,
            settings["temperature"],
        )
        return torch.autograd.grad(loss, student_hidden)

    return run


def run_linear(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    settings: Settings,
    group: dist.ProcessGroup | None = None,
) -> Contender:
    """`linear_jsd` on hidden states [N, H]; student_hidden requires a gradient."""

    def run():
        output = linear_jsd(student_hidden, teacher_hidden, weight, group=group, **settings)
        return torch.autograd.grad(output.loss.sum(), student_hidden)

    return run


def run_linear_trl(
    student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, settings: Settings
) -> Contender:
    """The lm_head under autograd, then TRL's function."""
    from trl.experimental.gkd import GKDTrainer

    arguments = dict(
        beta=1.0 - settings["beta"], temperature=settings["temperature"], reduction="sum"
    )

    def run():
        student = student_hidden @ weight.t()
        with torch.no_grad():
            teacher = teacher_hidden @ weight.t()
        loss = GKDTrainer.generalized_jsd_loss(
            student.unsqueeze(0), teacher.unsqueeze(0), **arguments
        )
        return torch.autograd.grad(loss, student_hidden)

    return run


def run_gemms(student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor) -> Contender:
    """The limit for functions of hidden states: both sides' logits and the product of the gradient
    with the lm_head, on all N rows at once.
    """
    student_hidden = student_hidden.detach()

    def run():
        logits = student_hidden @ weight.t()
        torch.mm(teacher_hidden, weight.t(), out=logits)
        return logits @ weight

    return run
