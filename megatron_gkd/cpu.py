"""Run megatron-core on a machine without CUDA: `enable()`, called once by the entry point, never on
import.

megatron-core asks `torch.cuda` for devices, streams and generators even where no GPU is involved.
`enable()` answers those calls with their CPU meaning and rewrites `device="cuda"` in tensor
factories. Everything above this layer is the real megatron-core. The patches hold for the whole
process, which is why the call is explicit; a process that has a GPU in use is refused.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randn", "tensor", "zeros", "zeros_like"),
)
_enabled = False


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
    """The tensor factory with `device="cuda"` read as CPU. A mode that sees every operation costs
    15 % of a forward.
    """

    @functools.wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is not None:
            kwargs["device"] = _CPU if str(device).startswith("cuda") else device
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
    tensor_class: Any = torch.Tensor
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.synchronize = lambda device=None: None
    # Stands for the GPU's: what moves that one must not move the CPU's own, here as there.
    generator = torch.Generator()
    cuda.get_rng_state = lambda device=None: generator.get_state()
    cuda.set_rng_state = lambda state, device=None: generator.set_state(state)
    cuda.manual_seed = generator.manual_seed
    tensor_class.cuda = lambda self, *args, **kwargs: self
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

    tensor_class.type = type_as_on_cuda

    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import token_dispatcher

    mcore_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        generator.get_state()
    )
    mcore_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        generator.set_state(new_state)
    )
    _without_fused_kernels()
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_and_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            # the original converts only what it copied from a GPU
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move_and_convert


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
