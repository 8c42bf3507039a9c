"""Keys and values of what is being written, and the rows that write it: tensors on the device.

Legend: B rows, P prompts, L layers of this rank's stage, G key/value groups of this rank, D head
size, W positions of the longest prompt, C positions that responses have room for. Response tokens
of all rows are counted together: `step` is the number that the cache holds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOOK = 16  # tokens of a row between two looks of the host
CAPACITY = 512  # response positions that the cache starts with; it doubles when they are used up


class CacheTable(NamedTuple):
    """Where the cache lies, at an address that stays: kernels in a CUDA graph read it there."""

    numbers: Tensor
    """int64 [6]: elements from the anchor to `prompt` and to `response`, P and the response rows, W
    and C
    """
    anchor: Tensor
    """[1], of the cache's dtype"""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> "CacheTable":
        return cls(
            torch.zeros(6, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=dtype, device=device),
        )


class KeyValueCache:
    """Rotated keys and values. A row reads the prompt's that it continues, which samples of one
    prompt share, and its own response's.
    """

    prompt: Tensor
    """[L, 2, P, G, W, D], keys then values"""
    response: Tensor
    """[L, 2, B, G, C, D]"""
    joined: Tensor | None
    """[L, 2, B, G, W + C, D] after `join`: `prompt` and `response` are views of it"""

    def __init__(
        self,
        table: CacheTable,
        *,
        num_layers: int,
        num_prompts: int,
        num_rows: int,
        num_groups: int,
        head_dim: int,
        prompt_width: int,
        max_new_tokens: int,
    ):
        anchor = table.anchor
        self.table, self.max_new_tokens, self.joined = table, max_new_tokens, None
        sizes = (num_layers, 2, num_prompts, num_groups, prompt_width, head_dim)
        self.prompt = anchor.new_zeros(sizes)
        capacity = min(CAPACITY, max_new_tokens)
        self.response = anchor.new_empty(num_layers, 2, num_rows, num_groups, capacity, head_dim)
        self._publish()

    def reserve(self, num_tokens: int, slots: Tensor) -> None:
        """Room for so many response tokens a row; what is there is kept.

        slots: int32 [B'], the response rows that are still written, B' <= B. Where the room grows
        the others go, and `slots` becomes 0 .. B' - 1.
        """
        capacity = self.response.shape[4]
        while capacity < min(num_tokens, self.max_new_tokens):
            capacity = min(2 * capacity, self.max_new_tokens)
        grown = capacity - self.response.shape[4]
        if not grown:
            return
        if self.joined is not None:  # `join` has left the others out
            self._split(_longer(self.joined, grown))
            return
        of_layers = list(self.response)
        *_, num_groups, _, head_dim = self.response.shape
        longer = self.response.new_empty(
            len(of_layers), 2, len(slots), num_groups, capacity, head_dim
        )
        # a layer at a time: an index makes a copy
        for kept, layer in zip(longer, of_layers):
            kept[..., : capacity - grown, :].copy_(layer.index_select(1, slots))
        self.response = longer
        slots.copy_(torch.arange(len(slots)))
        self._publish()

    def join(self, prompts: Tensor, slots: Tensor) -> None:
        """For kernels that read a row's keys as one: row i becomes the one of prompt prompts[i] and
        response row slots[i], copied.
        """
        parts = self.prompt[:, :, prompts], self.response[:, :, slots]
        self._split(torch.cat(parts, dim=4))

    def _split(self, joined: Tensor) -> None:
        width = self.prompt.shape[4]
        self.joined = joined
        self.prompt, self.response = joined[..., :width, :], joined[..., width:, :]

    def _publish(self) -> None:
        anchor, size = self.table.anchor, self.prompt.element_size()
        self.table.numbers.copy_(
            torch.tensor(
                [
                    (self.prompt.data_ptr() - anchor.data_ptr()) // size,
                    (self.response.data_ptr() - anchor.data_ptr()) // size,
                    self.prompt.shape[2],
                    self.response.shape[2],
                    self.prompt.shape[4],
                    self.response.shape[4],
                ]
            )
        )


def _longer(keys: Tensor, num_positions: int) -> Tensor:
    *before, length, head_dim = keys.shape
    longer = keys.new_empty(*before, length + num_positions, head_dim)
    longer[..., :length, :].copy_(keys)
    return longer


@dataclass(frozen=True)
class Rows:
    """What the kernels know of B rows. The tensors keep their addresses over all rollouts; smaller
    batches are their first rows.
    """

    tokens: Tensor
    """int64 [B]: the newest token, not in the cache yet; negative where it could not be drawn"""
    positions: Tensor
    """float32 [3, B]: the rotary positions (time, height, width) of a row's first response token"""
    prompt_lengths: Tensor
    """int32 [B]"""
    prompts: Tensor
    """int32 [B]: index of the row's prompt in the cache"""
    slots: Tensor
    """int32 [B]: index of the row's response in the cache"""
    written: Tensor
    """int64 [B, LOOK]: the newest tokens, number t in column t % LOOK"""
    log_probabilities: Tensor
    """fp32 [B, LOOK], in nats, of the same"""
    ended: Tensor
    """bool [B]: a stop token was drawn, or none could be"""
    step: Tensor
    """int64 [1]: response tokens of every row in the cache, and the number of the newest token"""

    @classmethod
    def on(cls, device: torch.device, num_rows: int) -> "Rows":
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            zeros(num_rows, dtype=torch.int64),
            zeros(3, num_rows, dtype=torch.float32),
            zeros(num_rows, dtype=torch.int32),
            zeros(num_rows, dtype=torch.int32),
            zeros(num_rows, dtype=torch.int32),
            zeros(num_rows, LOOK, dtype=torch.int64),
            zeros(num_rows, LOOK, dtype=torch.float32),
            zeros(num_rows, dtype=torch.bool),
            zeros(1, dtype=torch.int64),
        )

    def first(self, num_rows: int) -> "Rows":
        """The first so many rows: views."""
        return Rows(
            self.tokens[:num_rows],
            self.positions[:, :num_rows],
            self.prompt_lengths[:num_rows],
            self.prompts[:num_rows],
            self.slots[:num_rows],
            self.written[:num_rows],
            self.log_probabilities[:num_rows],
            self.ended[:num_rows],
            self.step,
        )

    def take(self, rows: Tensor) -> None:
        """The rows with these indices become the first ones, with their prompts and slots."""
        size = len(rows)
        self.positions[:, :size] = self.positions[:, rows]
        for state in (
            self.tokens,
            self.prompt_lengths,
            self.prompts,
            self.slots,
            self.written,
            self.log_probabilities,
            self.ended,
        ):
            state[:size] = state[rows]

    def note(self, tokens: Tensor, log_probabilities: Tensor, stop_ids: Tensor) -> None:
        """[B] each: the tokens number `step`; stop_ids int64 [any]: those that end a row."""
        # no index_copy_: with deterministic kernels it sorts, and may ask the host, in a CUDA graph
        is_new = torch.arange(LOOK, device=tokens.device) == self.step % LOOK
        self.tokens.copy_(tokens)
        for new, kept in (
            (tokens, self.written),
            (log_probabilities, self.log_probabilities),
        ):
            torch.where(is_new, new[:, None], kept, out=kept)
        self.ended.logical_or_((tokens[:, None] == stop_ids).any(dim=1) | (tokens < 0))
