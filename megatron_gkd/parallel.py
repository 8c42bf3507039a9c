"""Process groups, seeds and the device: the only file that reads megatron-core's global parallel
state.

Everything below takes a `Parallel` (or one of its groups) as an argument. Expert tensor parallelism
is always 1: an expert lives whole on one rank, and the ranks of a tensor-parallel group count as
data-parallel ranks for the experts.

Between the linears of a layer a sequence is sharded over the tensor-parallel ranks (megatron-core's
sequence parallelism). Around the layers `Parallel.sequence_multiple`, `shard_sequence` and
`gather_sequence` know how; within them megatron-core's linears and ours (lora/modules.py) do. What
is sharded so is the part of the sequence that a context-parallel rank has
(model/packed_rows.py); only attention and the response rows (forward.py) know of the other parts.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup, Store

from megatron_gkd import cpu


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the layout. `groups` is megatron-core's collection (tp, pp, cp, dp,
    dp_cp, ep, expt_dp, ...).

    Context-parallel ranks read parts of the same rows; for weights and gradients they are further
    data-parallel ranks.
    """

    groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this rank's peer on the last pipeline stage."""
        return torch.distributed.get_global_rank(self.groups.pp, self.pp_size - 1)

    @property
    def is_first_replica(self) -> bool:
        """Of the ranks that hold the same weights outside of the experts, the one that writes."""
        return self.dp_rank == self.cp_rank == 0

    @property
    def part(self) -> int:
        """A number of its own for each rank of a pipeline stage that computes on the same rows: the
        context-parallel ranks have parts of them, and of those the tensor-parallel ranks.
        """
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def row_multiple(self) -> int:
        """Rows in a packed sequence have a multiple of this many positions, so that they can be cut
        over the context-parallel ranks.
        """
        return 1 if self.cp_size == 1 else 2 * self.cp_size

    @property
    def sequence_multiple(self) -> int:
        """Packed sequences have a multiple of this many positions, so that all shards are equal."""
        return self.tp_size * self.row_multiple

    def shard_sequence(self, x: Tensor) -> Tensor:
        """[S, ...], the same on the tensor-parallel ranks -> this rank's positions, [S/TP, ...]. S
        is a multiple of the ranks.

        Collectives: none forward; in backward an all-gather of the ranks' gradients.
        """
        if self.tp_size == 1:
            return x
        return tensor_parallel.scatter_to_sequence_parallel_region(x, group=self.groups.tp)

    def gather_sequence(self, x: Tensor, *, tensor_parallel_output_grad: bool = True) -> Tensor:
        """This rank's positions [S/TP, ...] -> all [S, ...] on every tensor-parallel rank: the
        inverse of `shard_sequence`.

        tensor_parallel_output_grad: the gradient of the result is this rank's part of a sum (over
        slices of the vocabulary), and backward is a reduce-scatter. Otherwise every rank has
        computed the same, whole gradient, and backward takes this rank's positions of it.
        Collectives: an all-gather forward; in backward the reduce-scatter or none.
        """
        if self.tp_size == 1:
            return x
        return tensor_parallel.gather_from_sequence_parallel_region(
            x, tensor_parallel_output_grad=tensor_parallel_output_grad, group=self.groups.tp
        )


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where torch sees a GPU. Raises ValueError for `cuda` where it sees none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of "
            "torch"
        )
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device == "cuda"
        else torch.device("cpu")
    )


def use_deterministic_kernels() -> None:
    """Ask torch, cuBLAS, NCCL and Transformer Engine for kernels that give the same bits every
    time, before any of them has started. An operation of which torch has none raises RuntimeError:
    where torch would only warn, the backward passes of its attention kernels keep their atomics.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    module: Any = torch.utils.deterministic  # its attribute is a property of the module's class
    module.fill_uninitialized_memory = False


def keep_graphs_unregistered() -> None:
    """Unless the environment says otherwise, NCCL leaves the buffers of collectives in CUDA graphs
    (rollouts have some) where they are: it would register each as part of one allocation, which
    torch's expandable segments are not, and the graph would hang or read elsewhere. NCCL reads it
    when it starts.
    """
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def use_whole_float32() -> None:
    """Products and convolutions of float32 in float32, until the process ends: not in TF32 (10 bits
    of mantissa), which is cuDNN's default and may be the environment's for products.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # torch's newer names for the same; unset they would follow torch.backends.fp32_precision
    backends: Any = torch.backends
    for settings in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        settings.fp32_precision = "ieee"


def join(
    device: torch.device, timeout: timedelta | None = None, store: Store | None = None
) -> None:
    """Join the process group of the world (torchrun's variables; without them a world of one),
    unless this process has. timeout: see `initialize`; store: where the ranks find each other, by
    default torchrun's. Collectives: a rendezvous.
    """
    if torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    keep_graphs_unregistered()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        store, rank, size = torch.distributed.HashStore(), 0, 1
    elif store is not None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        rank = size = -1  # the environment's
    torch.distributed.init_process_group(
        backend, timeout=timeout, store=store, rank=rank, world_size=size
    )


def initialize(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    seed: int = 42,
    timeout: timedelta | None = None,
) -> Parallel:
    """Join the process group (see `join`) and build the model-parallel groups. dtype: what the
    model computes in; of float32 all 24 bits (`use_whole_float32`), with others the process keeps
    its settings. timeout: how long a rank waits for the others in a collective of any group (the
    defaults are torch's for the world, 10 minutes with NCCL and 30 with gloo, and megatron-core's
    for the groups of the layout, 30).

    Collectives: a rendezvous and the creation of every group. Raises ValueError when the world does
    not divide into the layout.
    """
    if dtype == torch.float32:
        use_whole_float32()
    if device.type == "cpu":
        cpu.enable()
    elif cpu.is_enabled():
        raise RuntimeError("megatron-core runs on the CPU in this process, and cannot leave it")
    else:
        torch.cuda.set_device(device)
    join(device, timeout)
    # Its import warns of what is not installed, and takes a second.
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 defines it with Transformer Engine only, and always reads it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    world_size = torch.distributed.get_world_size()
    stage_size = world_size // pipeline_model_parallel_size
    replica = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size % replica:
        raise ValueError(
            f"world size {world_size} is not divisible by tensor_model_parallel_size "
            f"{tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{pipeline_model_parallel_size} x context_parallel_size {context_parallel_size}"
        )
    if stage_size % expert_model_parallel_size:
        raise ValueError(
            f"the {stage_size} ranks of a pipeline stage are not divisible by "
            f"expert_model_parallel_size {expert_model_parallel_size}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=30 if timeout is None else timeout / timedelta(minutes=1),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    logging.getLogger(tensor_parallel.random.__name__).addFilter(_is_no_news)
    return Parallel(
        groups=groups,
        device=device,
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        tp_rank=groups.tp.rank(),
        tp_size=groups.tp.size(),
        pp_rank=groups.pp.rank(),
        pp_size=groups.pp.size(),
        cp_rank=groups.cp.rank(),
        cp_size=groups.cp.size(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
    )


def _is_no_news(record: logging.LogRecord) -> bool:
    """megatron-core warns when the CPU's generator moves while a layer runs: dropout draws its
    seeds there (lora/slots.py).
    """
    return "CPU RNG state changed" not in record.getMessage()


def seed_step(seed: int, step: int, parallel: Parallel) -> None:
    """Seed torch's default generators from (seed, step, data-parallel rank, stage), so that a
    resumed run needs no random state from disk.

    They agree on the tensor- and context-parallel ranks of a replica: dropout of the same input
    drops the same entries there. Where these ranks have different inputs, their salts differ
    (lora/slots.py).
    """
    base = (
        seed * 1_000_003 + step * 8_191 + parallel.dp_rank * 131_071 + parallel.pp_rank * 524_287
    ) % (2**31 - 1)
    torch.manual_seed(base)
    if parallel.device.type == "cuda":
        torch.cuda.manual_seed(base)


def largest(
    numbers: Sequence[int], device: torch.device, group: ProcessGroup | None = None
) -> list[int]:
    """The largest of the ranks' numbers, place by place. Collectives: a maximum of as many numbers
    over the group, by default the world.
    """
    found = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return found.tolist()


def world_max(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers. Collectives: a maximum of one number over the world."""
    return largest([number], device)[0]


def text_of_rank(text: str, rank: int, device: torch.device) -> str:
    """That rank's text on every rank, at most 1,024 bytes of it. Collectives: a broadcast of these
    bytes over the world.
    """
    padded = text.encode()[:1024].ljust(1024, b"\0")
    said = torch.tensor(list(padded), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(said, rank)
    return bytes(said.tolist()).rstrip(b"\0").decode(errors="ignore")


def first_error(error: str, device: torch.device) -> str:
    """The text of the first rank whose `error` is not empty, the same on every rank, at most 1,024
    bytes of it; "" where there is none. Collectives: a maximum of one number over the world; where
    a rank has an error, a broadcast of these bytes.
    """
    size = torch.distributed.get_world_size()
    found = world_max(size - torch.distributed.get_rank() if error else 0, device)
    return text_of_rank(error, size - found, device) if found else ""


@contextmanager
def agreed(device: torch.device, before: str) -> Iterator[None]:
    """Around what each rank does alone, so that no other waits for one that has failed: an
    exception of one rank ends all, as an OSError that says `before` and what the first of them was.
    What is none of the file system's (memory, a mistake of this code) its own rank raises as it is.
    Collectives: those of `first_error`, at the end.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as caught:
        own = caught
    is_mistake = own is not None and not isinstance(own, OSError)
    what = " ".join(f"{type(own).__name__}: {own}".split()) if is_mistake else own
    said = first_error(f"{before}{what}" if own is not None else "", device)
    if own is not None and is_mistake:
        raise own
    if said:
        raise OSError(said) from own


def from_rank_0(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Rank 0's `numbers`, as many on every rank. Collectives: a broadcast over the world."""
    sent = torch.tensor(numbers, device=device)
    torch.distributed.broadcast(sent, 0)
    return sent.tolist()


def log_rank_0(parallel: Parallel, text: str) -> None:
    """Print a line on rank 0 alone."""
    if parallel.rank == 0:
        print(text, flush=True)


def destroy() -> None:
    """Leave all groups: the end of a run."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
