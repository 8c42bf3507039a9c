"""A teacher that follows the student: its LoRA is the exponential moving average of the student's,
or a copy from time to time.

After an update of the student each matrix of the slot `teacher` becomes

    teacher + E (student - teacher)

W_down and W_up each for itself, in fp32, as the published implementations of SDFT and SDPO average
every parameter. That is not the average of the products W_up W_down: with a, b the distances of the
two factors from the teacher's, the product that results lacks E (1 - E) b a of the average of the
products. The distances are small where the teacher follows closely, and only factors stay an
adapter of this rank. The two start from one adapter, so their columns mean the same.
"""

from typing import Any

import torch

from megatron_gkd.lora.adapter import applied, tower_loras
from megatron_gkd.lora.apply import add_slot
from megatron_gkd.lora.slots import STUDENT, TEACHER, lora_modules, slot_of
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel


def add_average(
    model: Any, model_args: ModelArgs, parallel: Parallel, *, from_base: bool = False
) -> None:
    """Give the teacher a slot of the student's rank, scale and linears, with the student's values;
    from_base: its W_up zero, so that the teacher starts as the base alone. No collectives.
    """
    rank, scale, targets = applied(model)
    add_slot(
        model,
        model_args,
        parallel,
        TEACHER,
        rank=rank,
        alpha=scale * rank,
        targets=targets,
        towers=list(tower_loras(model)),
    )
    follow(model, 1.0)
    for module in lora_modules(model) if from_base else ():
        slot = slot_of(module, TEACHER)
        assert slot is not None
        for up in slot.up.values():
            up.detach().zero_()


@torch.no_grad()
def follow(model: Any, rate: float) -> None:
    """Move the teacher's LoRA on this stage by `rate` of the way to the student's; 1 is an exact
    copy. Elementwise, so it is the same at every layout. No collectives, no wait for the device.
    """
    teachers: list[torch.Tensor] = []
    students: list[torch.Tensor] = []
    for module in lora_modules(model):
        teacher, student = slot_of(module, TEACHER), slot_of(module, STUDENT)
        assert teacher is not None and student is not None, "both slots are on the same linears"
        teachers += list(teacher.parameters())
        students += list(student.parameters())
    if students:  # a pipeline stage may have no LoRA
        # in place, and counted as a change: by it the experts see new matrices (lora/grouped.py)
        torch._foreach_lerp_(teachers, students, rate)
