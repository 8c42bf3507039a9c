"""The rows that are written together in one rollout: their prompts' keys in the cache, a token of
every row at a time, fewer rows when some have ended.

A batch has the size of a bucket: places that are left over write for nobody, first another sample's
text once more, later on with a row that has ended. Legend: P prompts, n samples of each, B places.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.rollout.cache import LOOK, KeyValueCache
from megatron_gkd.rollout.engine import Engine
from megatron_gkd.rollout.prefill import PromptMedia, chunks_of, prefill


class RowBatch:
    """`unfinished`: place in the batch -> number of its sample, of those that have not ended."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        media: PromptMedia | None,
        num_samples: int,
        num_rows: int,
        seed: int,
        sample_ids: Sequence[int],
    ):
        """num_rows: of the rank that has most, if ranks need each other. Collectives: those of the
        prefill and of the first draw.
        """
        self.engine = engine
        self.size = engine.batch_size(num_rows)
        self.rows, self.sampler = engine.state(self.size)
        self.adapter, self.weights = engine.decoder.weights()
        samples = list(range(len(prompts) * num_samples))
        self.unfinished = dict(enumerate(samples))
        samples += [0] * (self.size - len(samples))
        if not prompts:  # other ranks' tokens need this rank's experts: it writes, for nobody
            prompts, sample_ids, media = [[engine.settings.pad_token_id]], [0], None

        # The longest first: chunks of similar lengths.
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        ordered = [prompts[index] for index in order]
        media = None if media is None else media.of(order)
        hidden = self._prefill(ordered, media)
        number = {index: place for place, index in enumerate(order)}
        of_sample = [number[sample // num_samples] for sample in samples]
        self._describe(ordered, media, of_sample)
        logits = None
        if self.sampler is not None:
            assert hidden is not None and engine.head is not None
            ids = [
                sample_ids[sample // num_samples] * num_samples + sample % num_samples
                for sample in samples
            ]
            self.sampler.begin(seed, ids, ordered, of_sample)
            logits = engine.head.logits(hidden[torch.tensor(of_sample, device=hidden.device)])
        self._draw(logits)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], media: PromptMedia | None
    ) -> Tensor | None:
        engine = self.engine
        settings = engine.settings
        lengths, sizes = [len(prompt) for prompt in prompts], self.weights.sizes
        self.cache = KeyValueCache(
            engine.decoder.table,
            num_layers=len(self.weights.layers),
            num_prompts=len(prompts),
            num_rows=self.size,
            num_groups=sizes.groups,
            head_dim=sizes.head_dim,
            prompt_width=lengths[0],
            max_new_tokens=settings.max_new_tokens,
        )
        chunks = chunks_of(lengths, settings.prefill_tokens)
        return prefill(
            engine.model,
            engine.parallel,
            prompts,
            media,
            self.cache,
            chunks,
            num_calls=engine.largest_of_ranks(len(chunks)),
            pad_token_id=settings.pad_token_id,
        )

    def _describe(
        self, prompts: Sequence[Sequence[int]], media: PromptMedia | None, of_row: list[int]
    ) -> None:
        """Fill `rows` before the first token; of_row: the prompt of each place."""
        rows, device = self.rows.first(self.size), self.rows.tokens.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        first = lengths.float().repeat(3, 1)
        if media is not None:
            first = torch.stack([ids[:, -1] + 1 for ids in media.position_ids], dim=1).to(device)
        index = torch.tensor(of_row, device=device)
        rows.positions.copy_(first[:, index])
        rows.prompt_lengths.copy_(lengths[index])
        rows.prompts.copy_(index)
        rows.slots.copy_(torch.arange(self.size, device=device))
        rows.ended.zero_()
        rows.step.zero_()
        self._arrange(of_row, list(range(self.size)))

    def _arrange(self, prompts: Sequence[int], slots: Sequence[int]) -> None:
        """For kernels that read the cache in the order of the rows: the prompt and the slot of each
        place, in the cache as it was.
        """
        self.key_mask: Tensor | None = None
        if self.engine.decoder.kernels.CAPTURABLE:
            return
        rows, cache = self.rows.first(self.size), self.cache
        device = rows.prompts.device
        places = torch.arange(self.size, device=device)
        cache.join(torch.tensor(prompts, device=device), torch.tensor(slots, device=device))
        rows.prompts.copy_(places)
        rows.slots.copy_(places)
        keys = torch.arange(cache.prompt.shape[4] + cache.max_new_tokens, device=device)
        is_hidden = (keys >= rows.prompt_lengths[:, None]) & (keys < cache.prompt.shape[4])
        mask = torch.zeros_like(is_hidden, dtype=cache.prompt.dtype)
        mask = mask.masked_fill(is_hidden, -float("inf"))
        self.key_mask = mask.repeat_interleave(self.weights.sizes.groups, dim=0)[:, None]

    def reserve(self, num_tokens: int) -> None:
        """Room for so many response tokens of every place."""
        self.cache.reserve(num_tokens, self.rows.first(self.size).slots)

    def write_token(self, num_written: int) -> None:
        """Every row's newest token into the cache, and the next one drawn.

        num_written: the response tokens of a row that the cache holds. Collectives: those of
        `Decoder.forward`, of `Sampler.draw` on the last stage, and with several stages a broadcast
        of 2 B numbers.
        """
        engine, rows = self.engine, self.rows.first(self.size)

        def write() -> None:
            hidden = engine.decoder.forward(
                self.weights, rows, self.cache, num_written, self.key_mask
            )
            rows.step.add_(1)
            self._draw(None if engine.head is None else engine.head.logits(hidden))

        engine.graphs.run((self.adapter, self.size), write)

    def _draw(self, logits: Tensor | None) -> None:
        """logits: on the last stage."""
        rows, parallel = self.rows.first(self.size), self.engine.parallel
        if self.sampler is not None:
            assert logits is not None
            tokens, log_probabilities = self.sampler.draw(logits, rows.step)
        else:
            tokens = torch.empty_like(rows.tokens)
            log_probabilities = torch.empty_like(rows.log_probabilities[:, 0])
        if parallel.pp_size > 1:
            drawn = torch.stack((tokens.double(), log_probabilities.double()))
            dist.broadcast(drawn, parallel.last_stage_rank, group=parallel.groups.pp)
            tokens, log_probabilities = drawn[0].long(), drawn[1].float()
        rows.note(tokens, log_probabilities, self.engine.stop_ids)

    def newest(self, start: int, end: int) -> tuple[list[list[int]], list[list[float]], list[bool]]:
        """Tokens number start .. end - 1 of every place, their log-probabilities, and which places
        have ended. Waits for the device.
        """
        columns = [number % LOOK for number in range(start, end)]
        rows = self.rows.first(self.size)
        return (
            rows.written[:, columns].tolist(),
            rows.log_probabilities[:, columns].tolist(),
            rows.ended.tolist(),
        )

    def shrink(self, size: int) -> None:
        """Go on with `size` places, if they are fewer: rows that have ended are left out."""
        if size >= self.size:
            return
        kept = list(self.unfinished)
        # What is left over goes on with rows that have ended: each place has a slot of its own.
        ended = [place for place in range(self.size) if place not in self.unfinished]
        places = kept + ended[: size - len(kept)]
        index = torch.tensor(places, device=self.rows.tokens.device)
        self.rows.take(index)
        if self.sampler is not None:
            self.sampler.take(index)
        self.size = size
        self.unfinished = {place: self.unfinished[old] for place, old in enumerate(kept)}
        self._arrange(places, places)
