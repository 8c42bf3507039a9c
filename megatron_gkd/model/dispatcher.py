"""How tokens come to the ranks that hold their experts, and the sums back: token dispatchers of
megatron-core's MoELayer.

N ranks share the experts of a layer, each of them has T tokens of H numbers of b bytes, K experts a
token. Which of them a layer has follows from the groups:

    LocalDispatcher    N = 1. Nothing moves.
    GatherDispatcher   the N ranks are of one tensor-parallel group, so all have equally many
                       tokens, and N <= K. Tokens are gathered, each rank computes its experts' rows
                       for all of them, the sums are reduce-scattered. A rank sends (N - 1) T H b
                       bytes each way. The host waits once a layer for the number of its rows,
                       while tokens are gathered: buffers for all N T K pairs would be N times too
                       large.
    ExchangeDispatcher otherwise. Every (token, expert) pair goes to its expert's rank and back, in
                       megatron-core's all-to-all: about (N - 1) / N K T H b bytes each way, K / N
                       times what gathering would move. The host waits once a layer for the counts,
                       while the device sorts the rows.

In backward each collective's counterpart moves the same bytes once more.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_gkd.model.expert_order import Order, order_of
from megatron_gkd.model.experts import select_kernels


class Chosen(torch.autograd.Function):
    """A router's dense answer -> each token's K experts in ascending order and their probabilities.
    Backward puts the gradient of a probability in its place of [T, A], zero elsewhere. Saves ids.
    No collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, routing_map: Tensor, num_chosen: int
    ) -> tuple[Tensor, Tensor]:
        """fp32 [T, A], bool [T, A] with K true in each row -> (fp32 [T, K], int32 [T, K])."""
        kernels = select_kernels(routing_map.device)
        ids, values = kernels.chosen(routing_map, probabilities, num_chosen)
        ctx.save_for_backward(ids)
        ctx.mark_non_differentiable(ids)
        ctx.num_experts = routing_map.shape[1]
        return values, ids

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        kernels = select_kernels(ids.device)
        return kernels.spread(gradient.contiguous(), ids, ctx.num_experts), None, None


class Sorted(torch.autograd.Function):
    """Tokens and probabilities -> the rows of `order` (which holds every pair), to be sent to their
    experts' ranks. Backward sums a token's rows. Saves the order's indices. No collectives.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probabilities: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        """x [T, H], fp32 [T, K] -> ([P, H], fp32 [P])."""
        ctx.save_for_backward(*order.tensors)
        rows = select_kernels(x.device).gather_rows(x, order, x.shape[1])
        return rows, probabilities.flatten().index_select(0, order.pairs)

    @staticmethod
    def backward(
        ctx: Any, of_rows: Tensor, of_probabilities: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        order = order_of(ctx.saved_tensors, is_partial=False)
        kernels = select_kernels(of_rows.device)
        of_x = kernels.sum_rows(of_rows.contiguous(), order, of_rows.shape[1])
        of_pairs = of_probabilities.index_select(0, order.rows.flatten())
        return of_x, of_pairs.view(order.rows.shape), None


class Summed(torch.autograd.Function):
    """The rows of `order` -> the sum of each token's, in fp32, rounded once. Backward copies a
    token's gradient to its rows. Saves the order's indices. No collectives.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        """[P, H] -> [T, H]."""
        ctx.save_for_backward(*order.tensors)
        return select_kernels(rows.device).sum_rows(rows, order, rows.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        order = order_of(ctx.saved_tensors, is_partial=False)
        kernels = select_kernels(gradient.device)
        return kernels.gather_rows(gradient.contiguous(), order, gradient.shape[1]), None


class NumbersOnHost:
    """Integers on their way to the host, which `wait` waits for: what the device gets to do in
    between hides it.
    """

    def __init__(self, numbers: Tensor):
        self._numbers = numbers.to("cpu", non_blocking=True)  # pinned memory
        self._copied = torch.cuda.Event() if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> Any:
        """As lists of int."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


class LocalDispatcher(MoETokenDispatcher):
    """For a rank that holds all experts. MoELayer calls the methods in the order in which they
    stand here.
    """

    def __init__(
        self,
        num_local_experts: int,
        first_expert: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.first_expert = first_expert
        self.num_chosen: int = config.moe_router_topk

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[S, 1, H], bool and fp32 [T, A] -> ([T, H], fp32 [T, K])."""
        self.shape = hidden_states.shape
        chosen, self.ids = Chosen.apply(probs, routing_map, self.num_chosen)
        return hidden_states.view(-1, self.shape[-1]), chosen

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts of this rank see of the ranks' tokens; here all there is."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Order, Tensor]:
        """The arguments of GroupedExperts."""
        order = select_kernels(self.ids.device).order_pairs(
            self.ids, self.first_expert, self.num_local_experts, is_partial=False
        )
        return hidden_states, order, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The sums over all ranks' experts, of this rank's tokens."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> [S, 1, H]."""
        return hidden_states.view(self.shape)


class GatherDispatcher(LocalDispatcher):
    """All N T tokens on each of the N ranks. Collectives: all-gathers of tokens, probabilities and
    ids, a reduce-scatter of the sums; in backward reduce-scatters of the first two, an all-gather.
    """

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H], [T, K] -> [N T, H], [N T, K]."""
        ids = self.ids.new_empty(self.ep_size * len(self.ids), self.num_chosen)
        dist.all_gather_into_tensor(ids, self.ids, group=self.ep_group)
        order = select_kernels(ids.device).order_pairs(
            ids, self.first_expert, self.num_local_experts, is_partial=True
        )
        num_rows = NumbersOnHost(order.offsets[-1:])
        probs = gather_from_sequence_parallel_region(probs, group=self.ep_group)
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.ep_group)
        (own,) = num_rows.wait()
        self.order = order._replace(pairs=order.pairs[:own])
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Order, Tensor]:
        return hidden_states, self.order, probs

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return reduce_scatter_to_sequence_parallel_region(hidden_states, group=self.ep_group)


class ExchangeDispatcher(LocalDispatcher):
    """Each pair to its expert's rank and back. Collectives: all-to-alls of counts, rows and their
    probabilities, and one of the results; in backward of all but the counts.

    The rows that a rank receives are its experts' tokens, each with one expert (K = 1): they stand
    in the order of the ranks that sent them, by expert within.
    """

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> ([T K, H], fp32 [T K]), sorted by expert."""
        x, chosen = super().dispatch_preprocess(hidden_states, routing_map, probs)
        num_ranks, num_local = self.ep_size, self.num_local_experts
        kernels = select_kernels(self.ids.device)
        order = kernels.order_pairs(self.ids, 0, num_ranks * num_local, is_partial=False)
        self.counts = torch.empty_like(order.counts)
        dist.all_to_all_single(self.counts, order.counts, group=self.ep_group)
        both = torch.stack((order.counts, self.counts)).view(2, num_ranks, num_local).sum(dim=2)
        numbers = NumbersOnHost(both)
        x, chosen = Sorted.apply(x, chosen, order)
        self.num_sent, self.num_received = numbers.wait()
        self.order = order
        return x, chosen

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """-> the rows that this rank's experts get [P, H], [P]."""
        splits = (self.num_received, self.num_sent)
        return (
            all_to_all(self.ep_group, hidden_states, *splits),
            all_to_all(self.ep_group, probs, *splits),
        )

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Order, Tensor]:
        num_local, ends = self.num_local_experts, self.counts.cumsum(0, dtype=torch.int32)
        numbers = torch.arange(len(hidden_states), dtype=torch.int32, device=ends.device)
        # which of the N E runs of rows, sorted by sender and expert, a row is in
        run = torch.searchsorted(ends, numbers, right=True, out_int32=True)
        ids = run.remainder_(num_local)[:, None]
        kernels = select_kernels(ids.device)
        order = kernels.order_pairs(ids, 0, num_local, is_partial=False)
        return hidden_states, order, probs[:, None]

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """-> [T K, H], as `dispatch_preprocess` left them."""
        return all_to_all(self.ep_group, hidden_states, self.num_sent, self.num_received)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return super().combine_postprocess(Summed.apply(hidden_states, self.order))


def select_dispatcher(
    config: TransformerConfig, groups: ProcessGroupCollection
) -> type[LocalDispatcher]:
    """Which of them a layer has; see above."""
    num_ranks = groups.ep.size()
    if num_ranks == 1:
        return LocalDispatcher
    is_inside = set(dist.get_process_group_ranks(groups.ep)) <= set(
        dist.get_process_group_ranks(groups.tp)
    )
    fits = is_inside and num_ranks <= config.moe_router_topk
    return GatherDispatcher if fits else ExchangeDispatcher


def use_dispatcher(layer: Any, groups: ProcessGroupCollection) -> None:
    """Give a MoELayer of megatron-core, which has made one of its own, the dispatcher above."""
    kind = select_dispatcher(layer.config, groups)
    first_expert = layer.local_expert_indices[0]
    layer.token_dispatcher = kind(layer.num_local_experts, first_expert, layer.config, groups)
