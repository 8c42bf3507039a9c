"""LoRA's gradients, summed over the ranks that hold the same weights: in few large buckets, all but
the last of them while the backward goes on.

megatron-core keeps the gradients in one fp32 buffer for the dense parameters (summed over data- and
context-parallel ranks) and one for the experts' (over the ranks with the same experts), in the
backward's order. `GradientReducer` cuts each buffer into buckets and starts them strictly in one
order, that of the backward, so that all ranks call the same collectives in the same order whatever
gradients they have: megatron-core's own overlap starts a bucket when every parameter in it has its
gradient, asserts that each has one in every step, and thereby excludes towers in steps where a rank
has no media. Here a bucket that lacks a gradient waits for the end of the backward, and so do those
behind it; what has no gradient counts as zero.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

SMALLEST_BUCKET = 64 * 2**20
BYTES_OF_A_RANK = 512 * 2**10


def smallest_bucket(num_ranks: int) -> int:
    """Bytes of a bucket that is worth a collective of its own: 64 MiB, or 512 KiB for each rank.

    Of B bytes a ring of n ranks sends 2 (n - 1) messages of B / n: at 50 GB/s (a 400 Gb/s card for
    each GPU) 512 KiB take as long, 10 us, as the start of a message does, so that a bucket takes at
    most twice as long as its bytes. 64 MiB take 2.7 ms there and less over NVLink, of steps that
    take seconds: to hide less than that is not worth another collective, and so gradients below two
    buckets are reduced in one, after the backward. (Modelled, not measured.)
    """
    return max(SMALLEST_BUCKET, BYTES_OF_A_RANK * num_ranks)


@dataclass
class Bucket:
    """A part of a buffer that is reduced by one collective."""

    gradients: Tensor
    """fp32, flat, a view of the buffer"""
    group: ProcessGroup
    parameters: frozenset[nn.Parameter]
    place: int
    """In the backward's order: of its last parameter, counted from the model's end"""
    starts_early: bool
    """Whether it may start before the backward is over"""
    missing: set[nn.Parameter] = field(default_factory=set)
    """Those whose gradient of the last micro-batch has not come yet"""
    work: Any = None
    """Of the collective, once it has started"""

    def reset(self) -> None:
        """Before the next backward."""
        self.missing, self.work = set(self.parameters), None


class GradientReducer(DistributedDataParallel):
    """The model inside megatron-core's DistributedDataParallel, with reductions of its own.

    Collectives, between the last micro-batch's backward and `finish_grad_sync`: a sum for each of
    `buckets`, none where a group is one rank alone.
    """

    def __init__(self, model: Any, bucket_bytes: Callable[[int], int] = smallest_bucket):
        """bucket_bytes: ranks of a group -> bytes of its smallest bucket."""
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
        )
        super().__init__(config=model.config, ddp_config=config, module=model)
        assert model.config.calculate_per_token_loss, "sums are divided once, by tokens"
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        towers = getattr(model, "towers", None)
        late = set() if towers is None else set(towers.parameters())
        places = {parameter: place for place, parameter in enumerate(reversed(trained))}
        self.buckets = sorted(
            (
                bucket
                for buffer in (*self.buffers, *self.expert_parallel_buffers)
                for bucket in _cut(buffer, places, late, bucket_bytes)
            ),
            key=lambda bucket: (not bucket.starts_early, bucket.place),
        )
        for bucket in self.buckets:
            bucket.reset()
        self._num_started = 0
        self._is_last_micro_batch = True
        if any(bucket.starts_early for bucket in self.buckets):
            model.config.no_sync_func = self.no_sync
            bucket_of = {p: bucket for bucket in self.buckets for p in bucket.parameters}
            # behind megatron-core's hook on the same node, which adds the gradient to the buffer
            for parameter, node in zip(trained, self.grad_accs, strict=True):
                if parameter in bucket_of:
                    node.register_hook(self._on_gradient(parameter, bucket_of[parameter]))

    def _on_gradient(self, parameter: nn.Parameter, bucket: Bucket) -> Callable[..., None]:
        def hook(*unused: Any) -> None:
            if not self._is_last_micro_batch:
                return
            if bucket.work is not None:
                raise RuntimeError(
                    "a LoRA parameter got a second gradient in one backward, when the sum of the "
                    "first over the ranks had begun"
                )
            bucket.missing.discard(parameter)
            while self._num_started < len(self.buckets):
                following = self.buckets[self._num_started]
                if following.missing or not following.starts_early:
                    break
                self._start(following)

        return hook

    def _start(self, bucket: Bucket) -> None:
        bucket.work = torch.distributed.all_reduce(
            bucket.gradients, group=bucket.group, async_op=True
        )
        self._num_started += 1

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all micro-batches but the last: their gradients are only added up."""
        self._is_last_micro_batch = False
        try:
            yield
        finally:
            self._is_last_micro_batch = True

    def finish_grad_sync(self, *unused: Any, **options: Any) -> None:
        """After the backward: start the buckets that are left, and wait for all (on CUDA the
        stream does, not the host).
        """
        for bucket in self.buckets[self._num_started :]:
            self._start(bucket)
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.reset()
        self._num_started = 0


def _cut(
    buffer: Any,
    places: dict[nn.Parameter, int],
    late: set[nn.Parameter],
    bucket_bytes: Callable[[int], int],
) -> Iterator[Bucket]:
    """The buckets of one of megatron-core's buffers: about equal ones, each at least about
    `bucket_bytes` unless there is no more; parameters of the towers are in a bucket of their own,
    and so is what lies apart from the rest because of them (the lm_head's).
    """
    group, data = buffer.data_parallel_group, buffer.grad_data
    if group.size() == 1:
        return
    smallest = bucket_bytes(group.size()) / data.element_size()
    # first number and end of each parameter, one behind the other
    spans = sorted(
        (span[0], span[1], places[parameter], parameter)
        for parameter, span in buffer.param_index_map.items()
    )
    in_time = sum(stop - start for start, stop, _, parameter in spans if parameter not in late)
    for is_late, run in groupby(spans, key=lambda span: span[3] in late):
        stretch = list(run)
        first, size = stretch[0][0], stretch[-1][1] - stretch[0][0]
        number = 1 if is_late else max(1, int(size / smallest))
        for _, part in groupby(stretch, key=lambda span: (span[0] - first) * number // size):
            starts, ends, of_part, parameters = zip(*part)
            yield Bucket(
                gradients=data[starts[0] : ends[-1]],
                group=group,
                parameters=frozenset(parameters),
                place=max(of_part),
                starts_early=not is_late and in_time >= 2 * smallest,
            )


def in_gradient_reducer(
    model: nn.Module, bucket_bytes: Callable[[int], int] = smallest_bucket
) -> GradientReducer:
    """The model in its `GradientReducer`, in training mode."""
    ddp = GradientReducer(model, bucket_bytes)
    ddp.train()
    return ddp
