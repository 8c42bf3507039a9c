"""Run megatron-core on a machine without CUDA: `enable()`, called once by the entry point, never on
import.

megatron-core asks `torch.cuda` for devices, streams and generators even where no GPU is involved.
`enable()` answers those calls with their CPU meaning and rewrites `device="cuda"` in tensor
factories. Everything above this layer is the real megatron-core.

The answers are for megatron-core and this package alone, told by the module that asks: other code
of the process, torch's own included, sees its GPUs as before, and megatron-core never touches
them. megatron-core stays on the CPU until the process ends, which is why the call is explicit; a
process that has a GPU in use is refused.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randn", "tensor", "zeros", "zeros_like"),
)
_ASKING = ("megatron.", "megatron_gkd.")
_enabled = False


def is_enabled() -> bool:
    """Whether megatron-core runs on the CPU in this process."""
    return _enabled


def _asked_by_megatron() -> bool:
    """Whether the function that calls this one was called by megatron-core or this package."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith(_ASKING)


def _for_megatron(meaning: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, and for megatron-core `meaning`."""

    @functools.wraps(original)
    def answer(*args: Any, **kwargs: Any) -> Any:
        return (meaning if _asked_by_megatron() else original)(*args, **kwargs)

    return answer


def _class_for_megatron(stand_in: type, original: Any) -> type:
    """The class `original`, of which megatron-core gets a `stand_in` where it makes an object."""

    class Chosen(type(original)):  # type: ignore[misc]
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return (stand_in if _asked_by_megatron() else original)(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    return Chosen(original.__name__, (original,), {})


class _NoStream:
    """Stands for torch.cuda.Stream and Event: work on a CPU is already ordered."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exception: Any) -> Literal[False]:
        return False

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> "_NoStream":
        return self

    def synchronize(self, *args: Any) -> None:
        pass

    record = wait = wait_event = wait_stream = synchronize


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The tensor factory with megatron-core's `device="cuda"` read as CPU. A mode that sees every
    operation costs 15 % of a forward.
    """

    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None:
            on_cpu = str(device).startswith("cuda") and _asked_by_megatron()
            kwargs["device"] = _CPU if on_cpu else device
        return factory(*args, **kwargs)

    return make


def enable() -> None:
    """Make megatron-core run on CPU in this process. Idempotent. Raises RuntimeError when CUDA is
    already in use.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise RuntimeError(
            "this process already uses a GPU, and --device cpu was asked for: start it with "
            "CUDA_VISIBLE_DEVICES= (nothing)"
        )
    _enabled = True

    cuda: Any = torch.cuda
    # Stands for the GPU's: what moves that one must not move the CPU's own, here as there.
    generator = torch.Generator()
    meanings: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _NoStream(),
        "default_stream": lambda device=None: _NoStream(),
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "manual_seed": generator.manual_seed,
    }
    for name, meaning in meanings.items():
        setattr(cuda, name, _for_megatron(meaning, getattr(cuda, name)))
    for name in ("Stream", "Event"):
        setattr(cuda, name, _class_for_megatron(_NoStream, getattr(cuda, name)))
    tensor_class: Any = torch.Tensor
    tensor_class.cuda = _for_megatron(lambda self, *args, **kwargs: self, torch.Tensor.cuda)
    # Lets torch note its own factories first: `with torch.device("meta")` must go on to know them.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))
    type_of = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizer compares `tensor.type()` with names such as "torch.cuda.FloatTensor"."""
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    tensor_class.type = _for_megatron(type_as_on_cuda, type_of)

    from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        generator.get_state()
    )
    mcore_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        generator.set_state(new_state)
    )
    _without_fused_kernels()
    _without_compilation()


def _without_fused_kernels() -> None:
    """megatron-core takes these from Transformer Engine or Apex wherever they are installed:
    kernels for GPUs only.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    optimizer.Adam = torch.optim.AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = True
    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _without_compilation() -> None:
    """megatron-core has torch compile this method of its router. A compilation looks at the GPUs of
    the machine, which starts CUDA, and of this method (it does nothing here) it costs seconds.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    method = TopKRouter._apply_expert_bias
    TopKRouter._apply_expert_bias = getattr(method, "_torchdynamo_orig_callable", method)
