"""CUDA graphs of what is done for every token: one launch from the host in place of hundreds."""

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """One graph a key, kept until `clear`. What is captured may read and write only memory
    that stays where it is, and waits for nothing on the host.

    The first call of a key runs as it is (kernels are compiled, workspaces allocated), the second
    is captured. Off CUDA, and where `enabled` is false, every call runs as it is.
    """

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: Hashable, call: Callable[[], None]) -> None:
        if not self.enabled:
            call()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            call()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads may call CUDA meanwhile; only what this one calls must be capturable
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                call()
            self._graphs[key] = graph
        graph.replay()

    def clear(self) -> None:
        """Drop all graphs: the memory that they name has moved."""
        self._graphs.clear()
        if self.enabled:  # a pool goes with the last graph that uses it
            self._pool = torch.cuda.graph_pool_handle()
