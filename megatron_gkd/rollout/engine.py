"""What rollouts of a run share: the decoder, the lm_head, the state of the rows at fixed addresses
and the CUDA graphs that read it.
"""

import math
from collections.abc import Collection
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, largest, world_max
from megatron_gkd.rollout.cache import Rows
from megatron_gkd.rollout.decode import Decoder, replicas_share_experts
from megatron_gkd.rollout.graphs import Graphs
from megatron_gkd.rollout.head import Head
from megatron_gkd.rollout.sampling import Sampler, Sampling

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # batch sizes; then multiples of 64
LEAST_ROOM = 128  # rows that the state has room for: graphs go where it must move


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What holds for all rollouts of a run."""

    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: Collection[int]
    pad_token_id: int
    prefill_tokens: int
    """Prompt tokens that one forward takes; a longer prompt is taken alone"""
    cuda_graphs: bool


def bucket(num_rows: int, multiple: int = 1) -> int:
    """The smallest batch size for so many rows that is a multiple of `multiple`."""
    sizes = (size for size in BUCKETS if size >= num_rows and size % multiple == 0)
    step = math.lcm(64, multiple)
    return next(sizes, -(-num_rows // step) * step)


class Engine:
    """The model as a writer of text: its newest weights, the adapter that is active.

    Keeps, until it goes, each adapter's laid-out LoRA and the memory that graphs name.
    """

    def __init__(
        self, model: Any, model_args: ModelArgs, parallel: Parallel, settings: GenerationSettings
    ):
        self.model, self.parallel, self.settings = model, parallel, settings
        self.vocab_size = model_args.vocab_size
        self.decoder = Decoder(model, model_args, parallel)
        # Stages wait for each other, which a graph cannot.
        can = self.decoder.kernels.CAPTURABLE and parallel.pp_size == 1
        enabled = settings.cuda_graphs and can
        self.graphs = Graphs(parallel.device, enabled=enabled)
        self.head = Head(model) if parallel.is_last_stage else None
        stop_ids = sorted(settings.stop_token_ids)
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=parallel.device)
        self._rows: Rows | None = None
        self._sampler: Sampler | None = None
        self._greedy: Engine | None = None

    @property
    def greedy(self) -> "Engine":
        """The same writer, which takes the most probable token: decoder, lm_head and laid-out LoRA
        are shared, and keys and values are a rollout's own in any case.
        """
        if self._greedy is None:
            other = copy(self)
            sampling = replace(self.settings.sampling, temperature=0.0)
            other.settings = replace(self.settings, sampling=sampling)
            other.graphs = Graphs(self.parallel.device, enabled=self.graphs.enabled)
            other._rows = other._sampler = None
            self._greedy = other
        return self._greedy

    def largest_of_ranks(self, number: int) -> int:
        """The largest number of the ranks that need each other in every forward: replicas that
        share experts. Collectives: where there are such replicas, a maximum of one number over
        them.
        """
        parallel = self.parallel
        if not replicas_share_experts(parallel):
            return number
        # where experts are shared by whole replicas, these and their other stages; else any others
        is_whole = parallel.ep_size % (parallel.tp_size * parallel.cp_size) == 0
        group = parallel.groups.tp_ep_pp if is_whole else None
        return largest([number], parallel.device, group)[0]

    @property
    def writes_apart(self) -> bool:
        """Whether other ranks have other prompts: some may have written long before others."""
        return self.parallel.dp_size * self.parallel.cp_size > 1

    def any_writes(self, is_writing: bool) -> bool:
        """Whether this rank, or any other, is still writing. Collectives: a maximum of one number
        over the world.
        """
        return bool(world_max(int(is_writing), self.parallel.device))

    def batch_size(self, num_rows: int) -> int:
        """The bucket for so many rows."""
        return bucket(
            num_rows, self.parallel.tp_size if replicas_share_experts(self.parallel) else 1
        )

    def state(self, num_rows: int) -> tuple[Rows, Sampler | None]:
        """The state of so many rows or more, at the addresses of last time where it is large
        enough; the sampler on the last stage.
        """
        if self._rows is None or len(self._rows.tokens) < num_rows:
            room = 0 if self._rows is None else len(self._rows.tokens)
            num_rows = max(num_rows, 2 * room, LEAST_ROOM)
            self.graphs.clear()
            self._rows = Rows.on(self.parallel.device, num_rows)
            if self.head is not None:
                self._sampler = Sampler(
                    self.settings.sampling,
                    num_rows=num_rows,
                    first_column=self.parallel.tp_rank * self.head.num_columns,
                    num_columns=self.head.num_columns,
                    vocab_size=self.vocab_size,
                    group=self.parallel.groups.tp,
                    device=self.parallel.device,
                    kernels=self.decoder.kernels,
                )
        return self._rows, self._sampler

    def close(self) -> None:
        """Let go of the graphs: before the process groups, whose collectives they hold."""
        self.graphs.clear()
        if self._greedy is not None:
            self._greedy.close()
