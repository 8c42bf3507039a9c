"""What a layer of experts costs, counted on CPU ranks with LoRA on both linears and dropout: bytes
saved for backward, launches, collectives with their bytes, waits of the host.

For CASE revision 70103c6, with megatron-core's dispatcher and LoRA beside the base, took 80
operations forward and 70 backward, saved 128,560 bytes, and waited twice for the order at EP 1.
"""

from collections import Counter

import pytest
import torch

from megatron_gkd import parallel
from tests.counting import Counting, kernels_counted
from tests.expert_layers import Case, lora_parameters, make_layer, tokens
from tests.ranks import run_ranks

CASE = Case(
    num_tokens=64,
    hidden=64,
    intermediate=32,
    rank=4,
    dropout=0.1,
    dtype=torch.bfloat16,
    spare_columns=(8, 8),
)


class CountingLayer(Counting):
    """`sent`: bytes that this one of two ranks sends to the other, by collective."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.sent = rank, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name, (output, x) = function.overloadpacket.__name__, args[:2]
            if name == "alltoall_base_":
                splits = args[4] or [len(x) // 2] * 2
                self.sent[name] += x.nbytes // len(x) * splits[1 - self.rank]
            else:
                self.sent[name] += min(x.nbytes, output.nbytes)
        return super().__torch_dispatch__(function, types, args, kwargs)


def count(rank, world_size, tp, ep):
    """(forward, backward, bytes saved, rows sent to each rank, or gathered here)"""
    place = parallel.initialize(
        torch.device("cpu"), tensor_model_parallel_size=tp, expert_model_parallel_size=ep
    )
    layer = make_layer(place, CASE)
    x = tokens(CASE, rank)[0].to(CASE.dtype)[:, None].requires_grad_()
    parameters = list(lora_parameters(layer).values())
    torch.autograd.grad(layer(x)[0].sum(), parameters)  # LoRA is laid out
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.append(tensor)
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    counters = [CountingLayer(rank), CountingLayer(rank)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with counters[0], kernels_counted(counters[0]):
            output, _ = layer(x)
    gradient = torch.ones_like(output)
    with counters[1], kernels_counted(counters[1]):
        torch.autograd.grad(output, (x, *parameters), gradient)
    found = [
        (c.num_launches, dict(c.operations), dict(c.collectives), dict(c.sent), dict(c.waits))
        for c in counters
    ]
    dispatcher = layer.token_dispatcher
    sent = getattr(dispatcher, "num_sent", None)
    if sent is None and ep > 1:
        sent = len(dispatcher.order.pairs)
    return *found, sum(saved.values()), sent


ROUTER = 12  # bytes a pair: megatron-core's choice (int64), and its softmax


def saved_bytes(num_tokens, num_rows, num_pairs=None):
    """Of the experts: tokens, gate_up's output, the low numbers of both linears, of a pair its
    probability, id and row, of a row its pair, of an expert two numbers.
    """
    num_pairs = num_pairs or CASE.top_k * num_tokens
    of_row = 2 * (2 * CASE.intermediate + 8 + 8) + 4
    return num_tokens * CASE.hidden * 2 + num_rows * of_row + num_pairs * (4 + 4 + 4)


def test_one_rank():
    """Forward: megatron-core's router takes 10 operations, then 8 kernels of ours (the order's are
    two on CUDA), two grouped products, two copies of low numbers. The host waits for nothing.
    """
    ((forward, backward, saved, _),) = run_ranks(count, 1, 1, 1)
    num_pairs = CASE.num_tokens * CASE.top_k
    expected = saved_bytes(CASE.num_tokens, num_pairs) + 8 * CASE.num_experts
    assert saved == expected + ROUTER * num_pairs == 32_320
    assert saved < 128_560 / 3.9
    for (_, operations, collectives, _, waits), grouped in ((forward, 2), (backward, 4)):
        assert not collectives and not waits
        assert operations["_grouped_mm"] == grouped
    assert forward[0] <= 22, forward
    assert backward[0] <= 39, backward


@pytest.mark.parametrize("tp", [2, 1])
def test_two_ranks(tp):
    """Gathered over a tensor-parallel group: (N - 1) T H numbers each way. Exchanged over replicas:
    those rows that go to another rank, once each way; the host waits for their counts, once. A
    probability is 4 bytes a pair, an id too, a count 4 an expert.
    """
    results = run_ranks(count, 2, tp, 2)
    row, pairs = CASE.hidden * 2, CASE.num_tokens * CASE.top_k
    for rank, (forward, backward, saved, num_sent) in enumerate(results):
        if tp == 2:
            assert sum(own for *_, own in results) == 2 * pairs and 0 < num_sent < 1.5 * pairs
            # the experts' own rows, and of all pairs and of the tokens before gathering a little
            expected = saved_bytes(2 * CASE.num_tokens, num_sent, 2 * pairs)
            of_indices = 4 * (2 * pairs - num_sent) - 4 * pairs + 4 * CASE.num_experts
            of_router = ROUTER * pairs + CASE.num_tokens * row
            assert saved == expected + of_indices + of_router
            tokens_sent = CASE.num_tokens * row
            assert forward[2] == {"_allgather_base_": 3, "_reduce_scatter_base_": 1}
            assert backward[2] == {"_allgather_base_": 1, "_reduce_scatter_base_": 2}
            assert forward[3]["_allgather_base_"] == tokens_sent + 8 * pairs
            assert forward[3]["_reduce_scatter_base_"] == tokens_sent
            assert backward[3]["_allgather_base_"] == tokens_sent
            assert backward[3]["_reduce_scatter_base_"] == tokens_sent + 4 * pairs
        else:
            away, back = num_sent[1 - rank], results[1 - rank][3][rank]
            assert sum(num_sent) == pairs and 0 < away < pairs
            assert forward[2] == {"alltoall_base_": 4} and backward[2] == {"alltoall_base_": 3}
            counts = 4 * CASE.num_experts // 2
            assert forward[3]["alltoall_base_"] == away * (row + 4) + back * row + counts
            assert backward[3]["alltoall_base_"] == away * row + back * (row + 4)
        assert not forward[4] and not backward[4]  # what is copied to the host is waited for once
        assert forward[0] <= 22 + 14 and backward[0] <= 39 + 7, (forward, backward)
