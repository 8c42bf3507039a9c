"""Text from the training model itself: one prefill, then one token a step with megatron-core's
key/value cache.

Prompts of different lengths are padded on the left, so that every row's next token has the same
column. The prefill is sharded over the sequence as training is: otherwise each tensor-parallel rank
would send all tokens to the experts. Legend: P prompts of this data-parallel rank, B rows (P, or
one padding row), W columns of the padded prompts, T = max_new_tokens, H hidden size.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_gkd.lora.modules import lm_head
from megatron_gkd.media.features import MediaFeatures, media_arguments
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, world_max
from megatron_gkd.rollout.mode import generation_mode, without_sequence_parallel
from megatron_gkd.rollout.sampling import Sampler, Sampling

OTHER_RANKS_ROW = "a row of another rank"  # in an error that names no row of this rank


@dataclass(frozen=True)
class PromptMedia:
    """The media of P prompts as the decoder takes them. M media tokens in all prompts."""

    position_ids: Sequence[Tensor]
    """float32 [3, length] of each prompt; those of its response count on from the last"""
    prompts: Tensor
    """int64 [M]: the prompt of each media token"""
    offsets: Tensor
    """int64 [M]: its index in that prompt"""
    tokens: Tensor
    """int64 [M]: its index among the features' tokens"""
    features: MediaFeatures | None
    """None on later pipeline stages"""


def generate(
    model: Any,
    model_args: ModelArgs,
    parallel: Parallel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    pad_token_id: int,
    seed: int,
    row_ids: Sequence[int],
    sample_ids: Sequence[int] | None = None,
    media: PromptMedia | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """A response to each prompt of this data-parallel rank: at most `max_new_tokens` ids, the stop
    id included.

    Every rank calls it with its data-parallel rank's prompts (possibly none) and gets their
    responses: the ranks of a replica get the same. row_ids: a number for each prompt, which errors
    name; sample_ids: a number that is unique in the global batch (default: row_ids). Together with
    `seed` it determines the noise, so neither layout nor batch changes a text. media: None where
    all prompts are text. progress(tokens so far, max_new_tokens) is called after each token.

    Holds a fp32 copy of this rank's lm_head rows and the keys and values of B x (W + T) positions
    meanwhile. Collectives for a token: those of the forward, of `Sampler.draw` on the last stage
    (before the first, a broadcast of the last position over TP), a broadcast of B ids over PP, and,
    where replicas share experts, a world-wide maximum of one number: their ranks need each other in
    every forward and stop together.

    Raises ValueError for an empty prompt or an id outside of the vocabulary; FloatingPointError, on
    all ranks that generate together, for logits that are not finite, naming the row.
    """
    _check(prompts, row_ids, max_new_tokens, model_args.vocab_size)
    sample_ids = row_ids if sample_ids is None else sample_ids
    num_prompts = len(prompts)
    # Otherwise each tensor-parallel group holds all experts.
    replicas_share_experts = parallel.tp_size % parallel.ep_size != 0
    if not (world_max(num_prompts, parallel.device) if replicas_share_experts else num_prompts):
        return []
    if not prompts:
        # Other ranks' tokens need this rank's experts: it takes part with a padding row.
        prompts, row_ids, sample_ids, media = [[pad_token_id]], [0], [0], None

    padded = _pad_left(prompts, media, max_new_tokens, pad_token_id, parallel)
    stage = _Stage(model, parallel, padded)
    draw = _Draw(model, model_args, parallel, sampling, seed, sample_ids, padded.prompt_ids)
    responses = _Responses(num_prompts, stop_token_ids)
    with generation_mode(model), ExitStack() as decoding:
        input_ids = padded.input_ids
        for step in range(max_new_tokens):
            if step == 1:
                decoding.enter_context(without_sequence_parallel(model))
            hidden = stage.forward(input_ids) if step else stage.prefill(input_ids, media)
            tokens = draw(hidden, step)
            not_finite = responses.append(tokens.tolist())
            state = responses.state
            if replicas_share_experts:
                state = _State(world_max(state, parallel.device))
            if state is _State.NOT_FINITE:
                raise _not_finite_error(step, not_finite, row_ids, num_prompts)
            if progress is not None:
                progress(step + 1, max_new_tokens)
            if state is _State.DONE:
                break
            input_ids = tokens.clamp(min=0)[:, None]
    return responses.token_ids


def _check(
    prompts: Sequence[Sequence[int]], row_ids: Sequence[int], max_new_tokens: int, vocab_size: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(
            f"rollout: max_new_tokens is {max_new_tokens}, it must be at least 1 "
            "(--max_completion_length)"
        )
    if len(row_ids) != len(prompts):
        raise ValueError(f"rollout: {len(row_ids)} row ids for {len(prompts)} prompts")
    for index, (row_id, prompt) in enumerate(zip(row_ids, prompts)):
        if len(prompt) == 0:
            raise ValueError(
                f"rollout: the prompt of row {row_id} (prompt {index} of {len(prompts)}) has no "
                "tokens"
            )
        unknown = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"rollout: the prompt of row {row_id} holds id {unknown[0]}, the vocabulary has "
                f"{vocab_size} ids"
            )


@dataclass(frozen=True)
class _PaddedPrompts:
    input_ids: Tensor
    """int64 [B, W]; W is a multiple of the layout's `sequence_multiple`"""
    num_padding: Tensor
    """int64 [B]"""
    is_padding: Tensor
    """bool [B, W + T]"""
    position_ids: Tensor
    """float32 [3, B, W + T]: 0 for padding"""
    has_padding: bool

    @property
    def prompt_ids(self) -> Tensor:
        """int64 [B, W], -1 for padding."""
        return self.input_ids.masked_fill(self.is_padding[:, : self.input_ids.shape[1]], -1)


def _pad_left(
    prompts: Sequence[Sequence[int]],
    media: PromptMedia | None,
    max_new_tokens: int,
    pad_token_id: int,
    parallel: Parallel,
) -> _PaddedPrompts:
    longest = max(map(len, prompts))
    width = longest + -longest % parallel.sequence_multiple
    rows = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    input_ids = torch.tensor(rows, dtype=torch.int64, device=parallel.device)
    num_padding = torch.tensor([width - len(prompt) for prompt in prompts], device=parallel.device)
    columns = torch.arange(width + max_new_tokens, device=parallel.device)
    position_ids = (columns - num_padding[:, None]).clamp(min=0).float().repeat(3, 1, 1)
    if media is not None:
        for row, (prompt, of_prompt) in enumerate(zip(prompts, media.position_ids)):
            position_ids[:, row, width - len(prompt) : width] = of_prompt
            position_ids[:, row, width:] = of_prompt[:, -1:] + 1 + columns[:max_new_tokens]
    is_padding = columns < num_padding[:, None]
    return _PaddedPrompts(
        input_ids, num_padding, is_padding, position_ids, bool(is_padding.any().item())
    )


class _Stage:
    """This rank's pipeline stage of the decoder and its cache of keys and values."""

    def __init__(self, model: Any, parallel: Parallel, padded: _PaddedPrompts):
        num_rows, num_positions = padded.is_padding.shape
        self.model, self.parallel, self.padded = model, parallel, padded
        self.context = StaticInferenceContext(num_rows, num_positions)

    def prefill(self, input_ids: Tensor, media: PromptMedia | None) -> Tensor:
        """The padded prompts, input_ids [B, W] -> on the last stage the output at their last
        position, [1, B, H]; on others what they have sent. Collectives: those of `forward`, and on
        the last stage a broadcast of that position over the tensor-parallel ranks.
        """
        hidden = self.forward(input_ids, **self._media_inputs(media))
        return self.parallel.last_position(hidden) if self.parallel.is_last_stage else hidden

    def forward(self, input_ids: Tensor, **media_inputs: Any) -> Tensor:
        """The S newest positions, input_ids [B, S] -> this stage's output [S, B, H] (while sequence
        parallelism is on, this rank's shard of it); keys and values are appended to the cache.

        Collectives besides the model's: a receive from the stage before, a send to the stage after.
        """
        num_new = input_ids.shape[1]
        end = self.context.sequence_len_offset + num_new
        mask = None
        if self.padded.has_padding:
            mask = _attention_mask(self.padded.is_padding[:, :end], num_new)
        if not self.parallel.is_first_stage:
            self._receive(input_ids)
        hidden = self.model(
            input_ids,
            self.padded.position_ids[:, :, :end],
            mask,
            inference_context=self.context,
            runtime_gather_output=True,
            **media_inputs,
        )
        if not self.parallel.is_last_stage:
            dist.send(hidden.contiguous(), self._peer(1), group=self.parallel.groups.pp)
        self.context.increment_sequence_len_offset(num_new)
        self.context.enable_decode_mode()
        return hidden

    def _receive(self, input_ids: Tensor) -> None:
        """The output of the stage before: [S, B, H], or this rank's shard of it."""
        config, ids = self.model.config, input_ids.T
        shape = (self.parallel.shard_sequence(ids) if config.sequence_parallel else ids).shape
        received = torch.empty(
            *shape, config.hidden_size, dtype=config.params_dtype, device=self.parallel.device
        )
        dist.recv(received, self._peer(-1), group=self.parallel.groups.pp)
        self.model.set_input_tensor(received)

    def _peer(self, distance: int) -> int:
        """Global rank of this rank's peer so many stages on."""
        return dist.get_global_rank(self.parallel.groups.pp, self.parallel.pp_rank + distance)

    def _media_inputs(self, media: PromptMedia | None) -> dict[str, Any]:
        """The decoder's further arguments for the prefill of prompts with media, on the first
        stage.
        """
        if media is None or not self.parallel.is_first_stage:
            return {}
        assert media.features is not None, "media without features"
        width = self.padded.input_ids.shape[1]
        columns = self.padded.num_padding[media.prompts] + media.offsets
        return media_arguments(
            self.model,
            self.parallel,
            self.padded.input_ids,
            self.padded.position_ids[:, :, :width],
            media.prompts * width + columns,
            media.tokens,
            media.features,
        )


def _attention_mask(is_padding: Tensor, num_queries: int) -> Tensor:
    """is_padding [B, K] -> [B, 1, S, K] bool for the last S positions, True = hidden.

    A padding position sees itself alone: a row of the softmax without any key would be NaN.
    """
    num_keys = is_padding.shape[1]
    position = torch.arange(num_keys, device=is_padding.device)
    query = position[num_keys - num_queries :, None]
    return ((position > query) | is_padding[:, None, None, :]) & (position != query)


class _Draw:
    """The next token of every row, drawn on the last stage and sent to the others."""

    def __init__(
        self,
        model: Any,
        model_args: ModelArgs,
        parallel: Parallel,
        sampling: Sampling,
        seed: int,
        sample_ids: Sequence[int],
        prompt_ids: Tensor,
    ):
        """prompt_ids int64 [B, W], -1 for padding: what the repetition penalty counts as seen."""
        self.model, self.parallel, self.num_rows = model, parallel, len(sample_ids)
        if parallel.is_last_stage:
            self.head = model.output_layer.weight.detach().float()  # [V/TP, H]
            self.sampler = Sampler(
                sampling,
                seed=seed,
                row_ids=torch.tensor(sample_ids, dtype=torch.int64, device=parallel.device),
                first_column=parallel.tp_rank * self.head.shape[0],
                num_columns=self.head.shape[0],
                vocab_size=model_args.vocab_size,
                group=parallel.groups.tp,
            )
            self.sampler.observe(prompt_ids)

    def __call__(self, hidden: Tensor, step: int) -> Tensor:
        """hidden [1, B, H] of the newest position, read on the last stage -> int64 [B] on every
        rank of the replica; -1 where the logits are not finite. Collectives: those of
        `Sampler.draw` on the last stage, then a broadcast over PP.
        """
        parallel = self.parallel
        if parallel.is_last_stage:
            logits = lm_head(self.model, hidden[-1].contiguous(), self.head)
            tokens = self.sampler.draw(logits, step)
            self.sampler.observe(tokens[:, None])
        else:
            tokens = torch.empty(self.num_rows, dtype=torch.int64, device=parallel.device)
        if parallel.pp_size > 1:
            dist.broadcast(tokens, parallel.last_stage_rank, group=parallel.groups.pp)
        return tokens


class _State(IntEnum):
    """How far the responses are; of several ranks the largest counts."""

    DONE = 0
    UNFINISHED = 1
    NOT_FINITE = 2


class _Responses:
    """The token ids so far of each prompt."""

    def __init__(self, num_prompts: int, stop_token_ids: Collection[int]):
        self.token_ids: list[list[int]] = [[] for _ in range(num_prompts)]
        self.stop_token_ids = stop_token_ids
        self.unfinished = list(range(num_prompts))
        self.state = _State.UNFINISHED

    def append(self, tokens: Sequence[int]) -> list[int]:
        """The next token of each row, [B]; finished rows and the padding row ignore theirs. Returns
        the unfinished rows whose logits were not finite.
        """
        for row in self.unfinished:
            self.token_ids[row].append(tokens[row])
        not_finite = [row for row in self.unfinished if tokens[row] < 0]
        self.unfinished = [row for row in self.unfinished if tokens[row] not in self.stop_token_ids]
        if not_finite:
            self.state = _State.NOT_FINITE
        else:
            self.state = _State.UNFINISHED if self.unfinished else _State.DONE
        return not_finite


def _not_finite_error(
    step: int, rows: Sequence[int], row_ids: Sequence[int], num_prompts: int
) -> FloatingPointError:
    named = ", ".join(f"row {row_ids[row]} (prompt {row} of {num_prompts})" for row in rows)
    return FloatingPointError(
        f"rollout: the logits of token {step + 1} are not finite for "
        f"{named or OTHER_RANKS_ROW}: weights or activations have overflowed; lower "
        "--learning_rate, or take bfloat16 instead of float16"
    )
