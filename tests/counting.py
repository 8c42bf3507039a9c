"""Counts of what a program asks of the device: operations, kernels, collectives, waits."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# On CUDA each of these makes the host wait, or has a size that the host must ask for.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave.Tensor",
    "bincount",
    "equal",
    "is_nonzero",
    "index.Tensor.mask",
    "index_put_.mask",
}
# No launches: memory is reserved, a tensor or a number of the host is made, a range is marked.
HOST = {"empty", "empty.memory_format", "empty_like", "new_empty", "empty_strided", "detach_"}
HOST |= {"new_empty_strided", "lift_fresh", "resize_", "set_.source_Storage", "randint.low"}
HOST |= {"_record_function_enter_new", "_record_function_exit._RecordFunction"}


def _is_mask(x) -> bool:
    """Whether an index by it has a size that the host must ask for."""
    return torch.is_tensor(x) and x.dtype == torch.bool


class Counting(TorchDispatchMode):
    """`operations`: name -> calls, without views; `collectives`; `elements`: name -> numbers that
    the calls read and wrote.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.collectives, self.elements = Counter(), Counter(), Counter()
        self.is_within_kernel = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if self.is_within_kernel:
            return result
        if function.namespace == "c10d":
            self.collectives[name] += 1
        elif not function.is_view:
            if function._overloadname not in ("default", "out"):
                name = f"{name}.{function._overloadname}"
            if name.startswith("index") and any(map(_is_mask, tree_leaves(args[1:]))):
                name = f"{name}.mask"
            self.operations[name] += 1
            tensors = [x for x in (*args, result) if torch.is_tensor(x)]
            self.elements[name] += sum(x.numel() for x in tensors)
        return result

    @property
    def num_launches(self) -> int:
        """Operations that do something on the device."""
        return sum(n for name, n in self.operations.items() if name not in HOST)

    @property
    def waits(self) -> Counter:
        return Counter({name: n for name, n in self.operations.items() if name in WAITS})


class _Kernels:
    """A module of functions of which each is a kernel elsewhere; here its operations count as one,
    by its name.
    """

    def __init__(self, module, counting: Counting):
        self._module, self._counting = module, counting

    def __getattr__(self, name):
        value = getattr(self._module, name)
        if not callable(value) or isinstance(value, type):
            return value

        def counted(*args, **kwargs):
            counting = self._counting
            outermost = not counting.is_within_kernel
            counting.is_within_kernel = True
            try:
                return value(*args, **kwargs)
            finally:
                if outermost:
                    counting.is_within_kernel = False
                    counting.operations[f"{self._module.__name__.split('.')[-1]}.{name}"] += 1

        return counted


@contextlib.contextmanager
def kernels_counted(counting: Counting) -> Iterator[None]:
    """Meanwhile what the package's `select_kernels` functions choose counts as kernels, one for
    each call of one of their functions: as on CUDA, where that is a launch of Triton's. So does
    torch's RMSNorm, one kernel of torch's there; its backward counts as a CPU runs it.
    """
    found = [
        module
        for name, module in sys.modules.items()
        if name.startswith("megatron_gkd.") and hasattr(module, "select_kernels")
    ]
    originals = [module.select_kernels for module in found]
    for module, original in zip(found, originals):
        module.select_kernels = lambda *args, choose=original: _Kernels(choose(*args), counting)
    rms_norm = F.rms_norm
    F.rms_norm = _Kernels(F, counting).rms_norm
    try:
        yield
    finally:
        F.rms_norm = rms_norm
        for module, original in zip(found, originals):
            module.select_kernels = original
