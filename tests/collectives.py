"""Collectives and messages between ranks, as one of them makes them:
`with Collectives(parallel.groups) as seen:`.

Seen is whatever torch.distributed is asked for through a process group, in the forward and in the
backward: also by megatron-core, of Python objects (as the tensors that travel), coalesced calls,
barriers, send and receive. Not seen: what goes through a store alone, as groups are made.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

# Roles that name a group first, where one group object has several.
FIRST_ROLES = ("tp", "cp", "pp", "ep", "dp", "dp_cp", "expt_dp")
NAMES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "barrier": "barrier",
    "broadcast_": "broadcast",
    "gather_": "gather",
    "monitored_barrier_": "barrier",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "reduce_": "reduce",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "scatter_": "scatter",
    "send": "send",
}


class Collective(NamedTuple):
    """A call of a rank. Bytes count its tensors alone, not what an algorithm sends for them."""

    name: str
    """A value of `NAMES`"""
    group: str
    """Its role (tp, dp_cp, ... of megatron-core's collection, or world), else its ranks and name"""
    num_ranks: int
    given: int
    """Bytes that this rank gives: of the input, in a reduction or broadcast of the tensor"""
    taken: int
    """Bytes that it has afterwards: of an all-gather those of all ranks"""
    num_tensors: int
    """Given ones; more than one where calls were coalesced"""
    is_async: bool
    """Whether the caller may go on before it is done; always so of send and recv"""

    @property
    def num_bytes(self) -> int:
        """The larger side: what a link must at least carry, in or out."""
        return max(self.given, self.taken)


class Collectives(TorchDispatchMode):
    """`calls`: every call in its order. Put marks of your own between them to see when a call was
    made: the list is a plain one.

    groups: `Parallel.groups`. Groups are told apart by their own name, not by their ranks: two of
    the same ranks (dp and expt_dp, say) keep their roles. A group object with several roles has the
    first of `FIRST_ROLES`.
    """

    def __init__(self, groups: Any = None):
        super().__init__()
        self.calls: list[Any] = []
        self.roles = {distributed.group.WORLD.group_name: "world"}
        found = {} if groups is None else _groups_of(groups)
        for role in (*FIRST_ROLES, *found):
            if role in found:
                self.roles.setdefault(found[role].group_name, role)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls.append(self._call(function, args, kwargs or {}))
        elif function.namespace == "_c10d_functional":
            raise AssertionError(f"{function} is no c10d call: teach {__name__} to see it")
        return function(*args, **(kwargs or {}))

    def _call(self, function, args, kwargs) -> Collective:
        arguments = function._schema.arguments
        names = [argument.name for argument in arguments]
        # arguments that have their default are left out
        defaults = {argument.name: argument.default_value for argument in arguments}
        values = defaults | dict(zip(names, args)) | kwargs
        group = distributed.ProcessGroup.unbox(values["process_group"])
        # outputs stand before inputs; where both are one, there is one
        sides = [list(_tensors(values[name])) for name in names[: names.index("process_group")]]
        name = NAMES[function.overloadpacket.__name__]
        taken, given = sides[0], sides[-1]
        if name == "barrier":
            taken, given = [], []
        elif name in ("send", "recv"):
            taken, given = ([], given) if name == "send" else (taken, [])
        return Collective(
            name,
            self._role(group),
            group.size(),
            sum(x.nbytes for x in given),
            sum(x.nbytes for x in taken),
            len(given) or len(taken),
            values.get("async_op", True),
        )

    def _role(self, group: distributed.ProcessGroup) -> str:
        role = self.roles.get(group.group_name)
        if role is None:
            ranks = " ".join(map(str, distributed.get_process_group_ranks(group)))
            role = self.roles[group.group_name] = f"ranks {ranks} ({group.group_name})"
        return role

    def of(self, *names: str, group: str | None = None) -> list[Collective]:
        """The calls with one of these names (without one: all), where given in this group."""
        return [
            call
            for call in self.calls
            if isinstance(call, Collective)
            and (not names or call.name in names)
            and group in (None, call.group)
        ]

    def counted(self, *, with_alone: bool = False) -> Counter:
        """(name, group, given, taken) -> calls. Those in a group of one rank alone cost nothing and
        are left out, unless `with_alone`.
        """
        return Counter(
            (call.name, call.group, call.given, call.taken)
            for call in self.of()
            if with_alone or call.num_ranks > 1
        )


def _groups_of(groups: Any) -> dict[str, distributed.ProcessGroup]:
    """Of the collection those fields that are set and one group (`hcp` is a list)."""
    of_fields = {field.name: getattr(groups, field.name, None) for field in fields(groups)}
    is_group = distributed.ProcessGroup
    return {role: group for role, group in of_fields.items() if isinstance(group, is_group)}


def _tensors(value: Any) -> Iterable[Tensor]:
    if torch.is_tensor(value):
        yield value
    else:
        for part in value or ():
            yield from _tensors(part)
