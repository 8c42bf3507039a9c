"""The adapters on a linear, by name, and the toggle between them.

Every LoRA module holds one slot per adapter: the `student`'s, which is trained, and where the
teacher is more than the base alone the `teacher`'s, which takes no gradients. A pass activates one
name in all modules; a module without a slot of that name computes its frozen base alone. So the
teacher without an adapter of its own needs nothing in memory, and the two may differ in linears,
rank and alpha. The slot of a teacher that follows the student is moved by average.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_gkd.lora.dropout import Drop

STUDENT, TEACHER = "student", "teacher"


class LoraSlot(nn.Module):
    """One adapter's matrices on one linear, fp32, by projection name (q_proj, ...); `scale` is
    alpha / rank.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = dropout
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()


class LoraModule(nn.Module, ABC):
    """What the kinds of LoRA modules share: the frozen base, the slots, the name of the active one
    (None: the base alone).
    """

    def __init__(self, base: Any, *, salt: int = 0):
        """salt: added to the seeds of its masks, other ones on ranks whose inputs differ."""
        super().__init__()
        self.base = base
        self.salt = salt
        self.slots = nn.ModuleDict()
        self.active: str | None = STUDENT

    @property
    def slot(self) -> LoraSlot | None:
        """The active slot, if this module has it."""
        return None if self.active is None else slot_of(self, self.active)

    def add_slot(
        self, name: str, targets: Sequence[str], *, rank: int, alpha: float, dropout: float
    ) -> None:
        """Add the slot `name` with zero matrices for the projections `targets`. Only the student's
        takes gradients.
        """
        slot = LoraSlot(rank=rank, alpha=alpha, dropout=dropout)
        self.fill(slot, targets)
        self.slots[name] = slot.requires_grad_(name == STUDENT)

    @abstractmethod
    def fill(self, slot: LoraSlot, targets: Sequence[str]) -> None:
        """Give `slot` this rank's zero matrices of the projections `targets`, with the marks that
        tell megatron-core how to reduce their gradients.
        """

    def drop_of(self, slot: LoraSlot) -> Drop | None:
        """The slot's dropout for one call; None where nothing is dropped.

        Its seed comes from torch's default generator of the CPU, which `parallel.seed_step` seeds
        alike on the tensor- and context-parallel ranks of a replica, and which recomputation puts
        back: the layer that runs again drops the same entries.
        """
        if not slot.dropout or not self.training:
            return None
        # tolist: a number of the host, no wait for a device
        drawn: Any = torch.randint(2**32, 2**62, (), device="cpu").tolist()
        return Drop(slot.dropout, drawn + self.salt)


def zeros(*shape: int, **marks: bool) -> nn.Parameter:
    """A zero fp32 parameter on the current device; `marks` are set as its attributes, for
    megatron-core.
    """
    parameter = nn.Parameter(
        torch.zeros(*shape, dtype=torch.float32, device=torch.cuda.current_device())
    )
    for mark, value in marks.items():
        setattr(parameter, mark, value)
    return parameter


def slot_of(module: nn.Module | None, name: str) -> LoraSlot | None:
    """The slot `name` of `module`; None without it, and for a module that carries no LoRA."""
    if not isinstance(module, LoraModule) or name not in module.slots:
        return None
    return cast(LoraSlot, module.slots[name])


def lora_modules(model: nn.Module) -> list[LoraModule]:
    """Every LoRA module of the model (this rank's stage)."""
    return [module for module in model.modules() if isinstance(module, LoraModule)]


@contextmanager
def activate(model: nn.Module, name: str | None) -> Iterator[None]:
    """Make `name` the active slot of every LoRA module of the model for a while (None: the base
    alone); what was active before comes back whatever happens.
    """
    modules = lora_modules(model)
    before = [module.active for module in modules]
    try:
        for module in modules:
            module.active = name
        yield
    finally:
        _set_active(modules, before)


def as_student(model: nn.Module) -> AbstractContextManager[None]:
    """The model is the student for a while: the base with the LoRA that is trained."""
    return activate(model, STUDENT)


def as_teacher(model: nn.Module) -> AbstractContextManager[None]:
    """The model is the teacher for a while: the base alone, or with the LoRA of its own."""
    return activate(model, TEACHER)


def _set_active(modules: list[LoraModule], names: list[str | None]) -> None:
    for module, name in zip(modules, names):
        module.active = name


def keep_active_for_backward(block: nn.Module) -> None:
    """Let a backward pass through `block` (megatron-core's TransformerBlock) see the slots that
    were active in its forward pass.

    Recomputation runs the layers again in backward, which may come after the forward's context
    manager has ended or inside another one. Hooks on the block's output and input activate the
    forward's slots before the layers' backward and put the others back after it.
    """

    def remember(block: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        hidden = kwargs["hidden_states"] if block.pre_process else block.input_tensor
        if not (output.requires_grad and hidden.requires_grad):
            return
        modules = lora_modules(block)
        of_forward = [module.active for module in modules]
        of_backward: list[str | None] = []

        def begin(gradient: Tensor) -> None:
            of_backward[:] = [module.active for module in modules]
            _set_active(modules, of_forward)

        output.register_hook(begin)
        hidden.register_hook(lambda gradient: _set_active(modules, of_backward))

    block.register_forward_hook(remember, with_kwargs=True)
