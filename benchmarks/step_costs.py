"""What a training step costs beside its seconds: model FLOPs, memory by kind, launches and
synchronisations.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.real_decoder import LORA_RANK, Shape
from benchmarks.training_step import GIB, Training
from megatron_gkd.data import Batch

# Dense bf16 FLOP/s of the tensor cores, by a part of the device's name; the first that fits.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
# ATen calls whose result the host must know: on CUDA each waits for the device.
HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
FORMULA = """\
Model FLOPs of a step, S and S' tokens of a row in the student's and the teacher's view, L layers,
N response rows, V columns, H hidden size, A = heads x head size, r LoRA's rank:
teacher (S' W + 2 L A S'^2 a row), student forward and backward to its inputs (2 S W + 6 L A S^2 a
row, attention being causal), LoRA's products forward, to their inputs and to their weights (3 x),
lm_head three times (6 N V H). W: 2 FLOPs a weight that a token meets, of its chosen experts only.
Frozen weights have no gradients, and what recomputation runs again is not counted. Utilisation:
these FLOPs / (seconds x ranks x the device's dense bf16 rate)."""


def step_flops(shape: Shape, batches: Sequence[Batch], targets: Collection[str]) -> float:
    """Model FLOPs of a step on one data-parallel rank, as FORMULA has them."""
    hidden, inner, experts = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    chosen, layers = shape.num_experts_per_tok, shape.num_layers
    linears = {  # (inputs, outputs, how many of them a token meets in a layer)
        "q_proj": (hidden, queries, 1),
        "k_proj": (hidden, keys, 1),
        "v_proj": (hidden, keys, 1),
        "o_proj": (queries, hidden, 1),
        "gate_proj": (hidden, inner, chosen),
        "up_proj": (hidden, inner, chosen),
        "down_proj": (inner, hidden, chosen),
    }
    weights = sum(inputs * outputs * number for inputs, outputs, number in linears.values())
    lora = sum(
        LORA_RANK * (inputs + outputs) * number
        for name, (inputs, outputs, number) in linears.items()
        if name in targets
    )
    a_token = 2 * layers * (weights + hidden * experts)
    attention = 2 * layers * queries
    total = 0.0
    for batch in batches:
        student, teacher = batch.student.lengths, batch.teacher.lengths
        total += a_token * (sum(teacher) + 2 * sum(student))
        total += 6 * layers * lora * sum(student)
        total += attention * (sum(s * s for s in teacher) + 3 * sum(s * s for s in student))
        total += 6 * len(batch.student.targets) * shape.vocab_size * hidden
    return total


def utilisation(flops_per_second: float, device_name: str) -> float | None:
    """Share of the device's peak rate; None for a device that PEAK_FLOPS does not know."""
    rates = (rate for part, rate in PEAK_FLOPS.items() if part in device_name)
    rate = next(rates, None)
    return None if rate is None else flops_per_second / rate


@dataclass(frozen=True)
class MemoryKinds:
    """GiB of this rank by what they are for. `other`: what stands besides (CUDA only); `step`: what
    a step takes above all that stands: activations, the loss, temporary tensors.
    """

    weights_gib: float
    lora_gib: float
    gradients_gib: float
    optimizer_gib: float
    other_gib: float | None
    step_gib: float


def memory_kinds(training: Training, peak_gib: float, built_gib: float) -> MemoryKinds:
    """After a step whose peak was `peak_gib`; on CPU above what was resident before the first."""
    seen: set[int] = set()

    def size(tensors: Iterable[Tensor | None]) -> float:
        """Of those that were not counted yet; several tensors may share memory."""
        found = 0
        for tensor in tensors:
            storage = None if tensor is None else tensor.untyped_storage()
            if storage is not None and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found += storage.nbytes()
        return found / GIB

    parameters = list(training.model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    moments = [state.values() for state in training.optimizer.moments().values()]
    weights = size(parameter for parameter in parameters if not parameter.requires_grad)
    lora = size(trainable)
    gradients = size(g for p in trainable for g in (getattr(p, "main_grad", None), p.grad))
    optimizer = size(tensor for state in moments for tensor in state)
    standing, other = built_gib, None
    if training.parallel.device.type == "cuda":
        standing = torch.cuda.memory_allocated(training.parallel.device) / GIB
        other = standing - weights - lora - gradients - optimizer
    return MemoryKinds(weights, lora, gradients, optimizer, other, peak_gib - standing)


class _Counting(TorchDispatchMode):
    """ATen calls by name, without views; collectives apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            self.collectives[name] += 1
        elif not function.is_view:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def count_on_cpu(training: Training, batch: Batch, step: int) -> dict[str, float]:
    """A step's ATen calls that are no views, which CUDA would launch one or more kernels for, and
    the values that the host reads, each of which would be a synchronisation.
    """
    with _Counting() as counting:
        training.step([batch], step)
    reads = sum(counting.calls[name] for name in HOST_READS)
    collectives = sum(counting.collectives.values())
    calls = sum(counting.calls.values()) - reads
    return {"aten_calls": calls, "host_reads": reads, "collectives": collectives}


def count_on_cuda(
    training: Training, batch: Batch, step: int, *, tables: bool
) -> tuple[dict[str, float], str]:
    """(launches, synchronisations, seconds that the device was busy; with `tables` also those of
    operations) of a step under torch's profiler, which slows the host. Synchronisations of the
    whole device are the clock's own between the phases and not counted.
    """
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] * tables + [kinds.CUDA]) as profiler:
        result = training.step([batch], step)
    events: Any = profiler.key_averages()
    count = lambda *names: sum(e.count for e in events if any(name in e.key for name in names))
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    # an annotation is a span that contains kernels
    kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False)]
    found = {
        "launches": count("LaunchKernel", "MemcpyAsync", "MemsetAsync"),
        "synchronizations": count("StreamSynchronize", "EventSynchronize"),
        "device_busy_seconds": sum(kernel.self_device_time_total for kernel in kernels) / 1e6,
        "profiled_step_seconds": result.step_seconds,
    }
    orders = ["self_cuda_time_total", "self_cpu_time_total"] if tables else []
    text = [events.table(sort_by=o, row_limit=50, max_name_column_width=100) for o in orders]
    return found, "\n".join(text)


def different_gradients(training: Training, batch: Batch, step: int) -> tuple[int, int]:
    """(entries of the gradients that differ, of how many) between two equal backward passes."""
    found = []
    for _ in range(2):
        training.step([batch], step, learning_rate=0.0)
        trainable = [p for p in training.model.parameters() if p.requires_grad]
        found.append([p.main_grad.clone() for p in trainable])
    different = sum(int((one != other).sum()) for one, other in zip(*found))
    return different, sum(one.numel() for one in found[0])
