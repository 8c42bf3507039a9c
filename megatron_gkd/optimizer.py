"""AdamW on the LoRA parameters through megatron-core, the learning rate as a function of the step,
and the guard against bad steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_gkd.parallel import Parallel

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(
    step: int, total_steps: int, *, peak: float, warmup_ratio: float, kind: str
) -> float:
    """The learning rate of update `step` (the first is 1): linear from 0 to `peak` over the
    warm-up, then `cosine` or `linear` to 0, or `constant`.
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    if step <= warmup:
        return peak * step / warmup
    if kind == "constant":
        return peak
    progress = (step - warmup - 1) / max(total_steps - warmup, 1)
    return peak * (0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress)


def _step_count(value: int, parameter: Tensor) -> Tensor:
    """As fused AdamW keeps it: on the parameter's device, where no update waits for it."""
    return torch.tensor(float(value), device=parameter.device)


@dataclass
class Update:
    """What one call of `Optimizer.step` did. `grad_norm`: global L2 norm over the LoRA gradients
    before clipping.
    """

    applied: bool
    grad_norm: float
    overflowed: bool = (
        False  # a float16 overflow that a smaller loss scale can cure: skipped, but not a bad step
    )
    empty: bool = False  # no token of the step carries a loss: skipped, but not a bad step


class Optimizer:
    """AdamW on the trainable parameters of `model`, a DistributedDataParallel: torch's, fused, in
    megatron-core's FP32Optimizer, one for the dense parameters and one for the experts'. (Its
    get_megatron_optimizer would make the same, and gather objects of all ranks for it.)

    Weights and moments are fp32 whatever the base's dtype; a float16 base brings dynamic loss
    scaling. One scale serves dense and expert parameters (megatron-core keeps two, which may
    drift apart).
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        parallel: Parallel,
        *,
        dtype: torch.dtype,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        max_grad_norm: float,
    ):
        self.model = model
        self.max_grad_norm = max_grad_norm
        self._num_updates = 0  # Adam counts by parameter, and a stage may have none
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adam: dict[str, Any] = dict(
            lr=0.0, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay
        )
        self._parts = []
        # clipping is done in step(), between the check for NaN and the update
        config = OptimizerConfig(params_dtype=torch.float32, clip_grad=0.0)
        for is_dense, group in ((True, parallel.groups.mp), (False, parallel.groups.tp_ep_pp)):
            parameters = [p for p in trained if getattr(p, "allreduce", True) == is_dense]
            # empty where LoRA is on experts alone, or on attention alone
            inner = torch.optim.AdamW([{"params": parameters}], **adam, fused=True)
            part: Any = FP32Optimizer(inner, config, None)
            part.grad_stats_parallel_group = group
            part.tp_group, part.expert_tp_group = parallel.groups.tp, parallel.groups.expt_tp
            self._parts.append(part)
        self.scaler = None
        if dtype == torch.float16:
            self.scaler = DynamicGradScaler(
                initial_scale=2.0**16,
                min_scale=1.0,
                growth_factor=2.0,
                backoff_factor=0.5,
                growth_interval=1000,
                hysteresis=1,
            )
            model.module.config.grad_scale_func = lambda loss: loss * self.scaler.scale

    def zero_grad(self) -> None:
        """Gradients and their buffers to zero: before the first micro-batch of a step."""
        self.model.zero_grad_buffer()
        for part in self._parts:
            part.zero_grad()

    def step(self, learning_rate: float, loss: float) -> Update:
        """Clip and update from the reduced gradients; no rank updates when any rank sees NaN or Inf
        in `loss` or a gradient.

        The host waits for the device once, for the norm, once more with float16, for the loss
        scale, and where a step is bad, for this rank's own norm. Collectives: sums of the norm over
        the ranks that hold different parameters; a maximum of two numbers over the world.
        """
        for part in self._parts:
            part.prepare_grads()
        scale = float(self.scaler.scale) if self.scaler else 1.0
        norm = self._grad_norm()
        is_bad = torch.full_like(norm, not math.isfinite(loss)).logical_or(~norm.isfinite())
        # of the norm too: other groups may sum in another order, and replicas that are clipped
        # otherwise in the last bit are no copies any more
        most = torch.stack((norm, is_bad.to(norm.dtype)))
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        grad_norm, bad = most.tolist()
        grad_norm, finite = (float(norm) if bad else grad_norm) / scale, not bad
        if self.scaler:
            self.scaler.update(not finite)
        if not finite:
            return Update(False, grad_norm, overflowed=scale > 1.0 and math.isfinite(loss))
        factor = min(1.0, self.max_grad_norm / (grad_norm + 1e-6)) / scale
        if factor != 1.0:
            self.model.scale_gradients(factor)  # a product for each buffer, on the device
        for part in self._parts:
            (group,) = part.param_groups
            group["lr"] = learning_rate
            part.step_with_ready_grads()
            # fused kernels do not count their changes of a tensor: by them the experts see that
            # W_up is a new one (lora/grouped.py)
            increment_version(group["params"])
        self._num_updates += 1
        return Update(True, grad_norm)

    def _grad_norm(self) -> Tensor:
        """The L2 norm of the gradients over all ranks, fp32 [], on their device; a parameter that
        several tensor-parallel ranks hold counts once. megatron-core's own, without Apex and
        Transformer Engine, fetches the norm of every parameter.
        """
        squares = []
        for part in self._parts:
            find = getattr(part, "get_grads_for_grad_norm", None)  # its name before 0.19:
            gradients = (find or part.get_main_grads_for_grad_norm)()
            if gradients:
                norms = torch.stack(torch._foreach_norm(gradients))
            else:  # this rank holds copies alone
                norms = torch.zeros(1, device=next(self.model.parameters()).device)
            square = torch.linalg.vector_norm(norms).square()
            torch.distributed.all_reduce(square, group=part.get_grad_stats_parallel_group())
            squares.append(square)
        return torch.stack(squares).sum().sqrt()

    def _parameters(self) -> Iterator[tuple[torch.optim.Optimizer, Tensor]]:
        for part in self._parts:
            for group in part.param_groups:
                yield from ((part.optimizer, parameter) for parameter in group["params"])

    def moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's state of each parameter: `exp_avg` and `exp_avg_sq`, of the parameter's shape;
        zero where there is none yet.
        """
        found = {}
        for adam, parameter in self._parameters():
            state = found[parameter] = adam.state[parameter]
            if not state:
                state["step"] = _step_count(0, parameter)
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(parameter))
        return found

    @property
    def num_updates(self) -> int:
        """How often AdamW has updated: skipped steps do not count (the number enters the bias
        correction).
        """
        return self._num_updates

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates = value
        for adam, parameter in self._parameters():
            adam.state[parameter]["step"] = _step_count(value, parameter)

    def scaler_state(self) -> dict:
        """Loss scale and its counters as plain numbers, empty without loss scaling."""
        if self.scaler is None:
            return {}
        return {name: float(value) for name, value in self.scaler.state_dict().items()}

    def load_scaler_state(self, state: dict) -> None:
        """Go on from `scaler_state`'s answer; nothing to do without loss scaling."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(
                {
                    "scale": torch.tensor([state["scale"]], device=self.scaler.scale.device),
                    "growth_tracker": int(state["growth_tracker"]),
                    "hysteresis_tracker": int(state["hysteresis_tracker"]),
                }
            )
