"""--recompute auto: the activations of as many layers are kept as memory is left for; the first
layers of a stage are run again in backward.

The first student pass runs every layer again. It shows what one layer keeps (the storages that
autograd saves in a layer's forward, whatever its implementation) and what the pass takes beside
that. From then on, before each student pass,

    kept = (limit - reserve - used now - pass) / (micro-batches in flight x bytes of a layer)

layers keep their activations, the same number on all ranks: a layer that is run again calls its
collectives again. Bytes are those of the run's largest micro-batch, so that a longer one than any
before still fits; both sizes are scaled by tokens, and upwards only. A pass with a quarter more
tokens than the one that was measured is measured too, and its sizes replace the others: scaling
goes too far, since not all of a pass grows with its tokens. So is the first one that keeps layers:
its highest point is another, without a layer that is being run again. Every pass is compared with
what was predicted; where it took more, the difference counts from then on. What is computed does
not depend on the number of layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.data.batch import Batch
from megatron_gkd.device_memory import DeviceMemory
from megatron_gkd.parallel import Parallel, log_rank_0, world_max

RESERVE = 0.04  # of the limit: for memory that is free but in pieces, and for libraries' workspaces
LARGER = 1.25  # so many times the tokens are worth another measurement


@dataclass
class Measured:
    """What a student pass took on this rank."""

    tokens: int
    """Positions of its largest micro-batch"""
    in_flight: int
    """Micro-batches whose activations existed at the same time"""
    layer_bytes: int
    """That the costliest layer keeps of that micro-batch"""
    pass_bytes: int
    """At its highest point, without what layers keep"""
    kept: int = 0
    """Layers that kept their activations"""

    def predict(self, tokens: int, in_flight: int, kept: int) -> int:
        """Bytes of a pass whose largest micro-batch has so many positions, where `kept` layers keep
        their activations.
        """
        once = self.pass_bytes * max(1.0, in_flight / self.in_flight)
        scale = max(1.0, tokens / self.tokens)
        return round(scale * (once + in_flight * kept * self.layer_bytes))


class Recomputation:
    """Of the layers of this rank's stage."""

    def __init__(
        self,
        decoder: Any,
        parallel: Parallel,
        memory: DeviceMemory,
        most_tokens: int,
    ):
        """decoder: megatron-core's TransformerBlock, built with recompute. most_tokens: positions
        that a micro-batch of the run can have.
        """
        self.layers: Sequence[nn.Module] = decoder.layers
        self.config = decoder.config
        self.parallel, self.memory = parallel, memory
        self.most_tokens = most_tokens
        self.kept = 0
        self.config.recompute_num_layers = len(self.layers)
        self.measured: Measured | None = None
        self._may_grow, self._is_chosen = True, False
        log_rank_0(
            parallel,
            f"--recompute auto: all {len(self.layers)} layers of a stage in the first step, which "
            f"measures; then as few as memory allows with micro-batches of {most_tokens} tokens",
        )

    @contextmanager
    def student_pass(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Around a step's student forward and backward on these micro-batches. Collectives, from
        the second pass on: a maximum of one number over the world.
        """
        if self.measured is not None:
            self._choose(self.measured)
        tokens = max(batch.student.size for batch in batches)
        in_flight = self._in_flight(len(batches))
        measures = self._is_worth_measuring(tokens)
        before = self.memory.used()
        self.memory.begin()
        with _saved_by_layers(self.layers, self.memory) if measures else nullcontext() as saved:
            yield
        taken = max(self.memory.peak() - before, 0)
        if saved is not None:
            layer_bytes = max(saved)
            pass_bytes = max(taken - in_flight * self.kept * layer_bytes, 0)
            self.measured = Measured(tokens, in_flight, layer_bytes, pass_bytes, self.kept)
            self._may_grow = True
        elif self.measured is not None:
            excess = taken - self.measured.predict(tokens, in_flight, self.kept)
            self.measured.pass_bytes += max(excess, 0)

    def _is_worth_measuring(self, tokens: int) -> bool:
        before = self.measured
        if before is None or tokens >= LARGER * before.tokens:
            return True
        return self.kept > 0 and before.kept == 0 and tokens >= before.tokens

    def _in_flight(self, num_micro_batches: int) -> int:
        """Micro-batches whose activations a stage holds at a time: those that it has sent on, and
        whose gradients have not come back.
        """
        return min(num_micro_batches, self.parallel.pp_size - self.parallel.pp_rank)

    def _choose(self, measured: Measured) -> None:
        used, limit = self.memory.used(), self.memory.limit()
        left = round(limit * (1 - RESERVE)) - used
        need = (self.most_tokens, self._in_flight(self.parallel.pp_size))
        one_layer = measured.predict(*need, 1) - measured.predict(*need, 0)
        fits = max(left - measured.predict(*need, 0), 0) // max(one_layer, 1)
        recomputed = len(self.layers) - min(fits, len(self.layers) if self._may_grow else self.kept)
        kept = len(self.layers) - world_max(recomputed, self.parallel.device)
        if kept != self.kept or not self._is_chosen:
            log_rank_0(
                self.parallel,
                f"--recompute auto: {len(self.layers) - kept} of {len(self.layers)} layers of a "
                f"stage are run again; {_gib(left)} are left beside {_gib(used)} in use, a pass "
                f"takes {_gib(measured.predict(*need, 0))} and a kept layer {_gib(one_layer)} more "
                f"with {self.most_tokens} tokens (of rank 0; the rank with the least decides)",
            )
        # a permission waits until every rank has one: they measure in steps of their own
        self._may_grow = self._may_grow and kept <= self.kept
        self.kept, self._is_chosen = kept, True
        self.config.recompute_num_layers = len(self.layers) - kept


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


@contextmanager
def _saved_by_layers(layers: Sequence[nn.Module], memory: DeviceMemory) -> Iterator[list[int]]:
    """A list that gets the bytes that each forward with a gradient has left behind: the storages
    that autograd saved, without parameters, or the growth of what is used, whichever is more.
    """
    of_parameters = {
        parameter.untyped_storage().data_ptr()
        for layer in layers
        for parameter in layer.parameters()
    }
    found: list[int] = []
    open_layer: list[Any] = []  # the hooks, what they saw, bytes in use before

    def begin(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in of_parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        open_layer[:] = [hooks, storages, memory.used()]
        hooks.__enter__()

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if not open_layer:
            return
        hooks, storages, before = open_layer
        hooks.__exit__(None, None, None)
        open_layer.clear()
        found.append(max(sum(storages.values()), memory.used() - before))

    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
