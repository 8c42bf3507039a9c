"""Which ranks form a group, and how many machines a group spans.

megatron-core numbers the ranks tp-cp-dp-pp for the dense weights and ep-dp-pp for the experts'
(expert tensor parallelism is 1), the first of them fastest. So consecutive ranks share a layer,
and a group's ranks lie one stride apart.
"""

from dataclasses import dataclass
from functools import cache

from megatron_gkd.layout import ParallelConfig


@dataclass(frozen=True)
class Group:
    """N ranks, `stride` apart in the world's order."""

    size: int
    stride: int
    ranks_per_node: int
    """The most of them on one machine"""
    nodes: int
    """Machines that they are spread over"""


ONE = Group(1, 1, 1, 1)


def placement(layout: ParallelConfig, world_size: int, gpus_per_node: int) -> dict[str, Group]:
    """The group of each kind (tp, cp, dp, dp_cp, ep, expt_dp, pp, world) that spans most machines,
    machines being filled one after the other with `gpus_per_node` ranks. Raises ValueError where
    the world does not divide into the layout.
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    pp, ep = layout.pipeline_model_parallel_size, layout.expert_model_parallel_size
    if world_size % (tp * cp * pp) or world_size // pp % ep:
        raise ValueError(
            f"{world_size} ranks do not divide into TP {tp} x CP {cp} x PP {pp} and, in a stage of "
            f"{world_size / pp:g} ranks, EP {ep}"
        )
    stage = world_size // pp
    dp = stage // (tp * cp)
    kinds = {
        "tp": (tp, 1),
        "cp": (cp, tp),
        "dp": (dp, tp * cp),
        "dp_cp": (dp * cp, tp),
        "ep": (ep, 1),
        "expt_dp": (stage // ep, ep),
        "pp": (pp, stage),
        "world": (world_size, 1),
    }
    return {
        name: _most_spread(size, stride, world_size, gpus_per_node)
        for name, (size, stride) in kinds.items()
    }


@cache  # layouts of one plan have most of their groups in common
def _most_spread(size: int, stride: int, world_size: int, gpus_per_node: int) -> Group:
    """Of the groups of `size` ranks, `stride` apart, that the world is cut into."""
    found = []
    block = size * stride
    # machines and blocks meet at the same place again after their common multiple of ranks
    for first_of_block in range(0, min(world_size, block * gpus_per_node), block):
        for first in {first_of_block, first_of_block + stride - 1}:
            nodes = [(first + index * stride) // gpus_per_node for index in range(size)]
            fullest = max(nodes.count(node) for node in {nodes[0], nodes[-1], nodes[size // 2]})
            found.append(Group(size, stride, fullest, len(set(nodes))))
    return max(found, key=lambda group: (group.nodes, -group.ranks_per_node))
