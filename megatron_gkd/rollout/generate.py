"""Text from the training model itself: one prefill, then one token a step with megatron-core's
key/value cache.

Ragged prompts are padded on the left, so that every row's next token stands in the same column. The
prefill is cut over the tensor-parallel ranks as in training (sequence parallelism): without it each
of them would send all tokens to the experts. Legend: B rows of this data-parallel rank, W columns
of the padded prompts, H hidden size.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

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

_DONE, _WRITING, _BROKEN = 0, 1, 2


@dataclass(frozen=True)
class PromptMedia:
    """What the prompts show besides text."""

    position_ids: Sequence[Tensor]
    """float32 [3, length] of each prompt; the response goes on from the last"""
    prompts: Tensor
    """int64 [M]: the prompt of each media token"""
    places: Tensor
    """int64 [M]: its place in the prompt"""
    tokens: Tensor
    """int64 [M]: its number among the features"""
    features: MediaFeatures | None
    """None on later pipeline stages"""


def generate(
    model,
    model_args: ModelArgs,
    parallel: Parallel,
    prompts: Sequence[Sequence[int]],
    *,
    row_ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    pad_token_id: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    noise_ids: Sequence[int] | None = None,
    media: PromptMedia | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """One response to each prompt of this data-parallel rank: at most `max_new_tokens` ids,
    end-of-text id included.

    Every rank calls it with its data-parallel rank's prompts (possibly none) and gets those
    responses; TP and PP ranks get the same. row_ids: one number a prompt, which errors name;
    noise_ids: one that is unique over the global batch (default: row_ids); with `seed` they fix the
    noise, so neither layout nor batch changes a text. temperature 0 is greedy. media: None where
    all prompts are text. progress(tokens written, max_new_tokens) is called after each token.

    Holds a fp32 copy of this rank's lm_head rows and the keys and values of B x (W +
    max_new_tokens) positions meanwhile. Collectives a token: those of the forward, of
    `Sampler.draw` on the last stage (before the first, a broadcast of [B, H] over TP), a broadcast
    of B ids over PP, and, where experts span data-parallel ranks, a world-wide maximum of one
    number: those ranks need each other in every forward and stop together.

    Raises ValueError for an empty prompt, an id out of the vocabulary or a setting out of range;
    FloatingPointError, on all ranks that were writing together, for logits that are not finite,
    naming the row.
    """
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty)
    noise_ids = row_ids if noise_ids is None else noise_ids
    _check(prompts, row_ids, max_new_tokens, model_args.vocab_size)
    assert media is None or media.features is not None or not parallel.is_first_stage, (
        "media without features"
    )
    replicas_share_experts = (
        parallel.tp_size % parallel.ep_size != 0
    )  # else each TP group holds all experts by itself
    num_prompts = len(prompts)
    most_prompts = (
        world_max(num_prompts, parallel.device) if replicas_share_experts else num_prompts
    )
    if most_prompts == 0:
        return []
    if (
        not prompts
    ):  # other ranks' tokens need this rank's experts: it goes along with a row of its own
        prompts, row_ids, noise_ids, media = [[pad_token_id]], [0], [0], None

    input_ids, num_padding = _pad_left(prompts, pad_token_id, parallel.tp_size, parallel.device)
    num_rows, width = input_ids.shape
    columns = torch.arange(width + max_new_tokens, device=parallel.device)
    is_padding = columns < num_padding[:, None]  # [B, W + max_new_tokens]
    any_padding = bool(is_padding.any())
    position_ids = _positions(columns, num_padding, width, media)
    context = StaticInferenceContext(num_rows, width + max_new_tokens)

    if parallel.is_last_stage:
        head = model.output_layer.weight.detach().float()
        sampler = Sampler(
            sampling,
            seed=seed,
            row_ids=torch.tensor(noise_ids, dtype=torch.int64, device=parallel.device),
            first_column=parallel.tp_rank * head.shape[0],
            num_columns=head.shape[0],
            vocab_size=model_args.vocab_size,
            group=parallel.groups.tp,
        )
        sampler.observe(input_ids.masked_fill(is_padding[:, :width], -1))

    responses: list[list[int]] = [[] for _ in range(num_rows)]
    writing = [row < num_prompts for row in range(num_rows)]
    end = width
    with generation_mode(model), ExitStack() as decoding:
        for step in range(max_new_tokens):
            if step == 1:
                decoding.enter_context(without_sequence_parallel(model))
            mask = _attention_mask(is_padding[:, :end], input_ids.shape[1]) if any_padding else None
            positions = position_ids[:, :, :end]
            shown = (
                _shown(model, parallel, input_ids, positions, num_padding, media)
                if step == 0
                else {}
            )
            hidden = _forward_stage(model, parallel, input_ids, positions, mask, context, shown)
            tokens = torch.empty(num_rows, dtype=torch.int64, device=parallel.device)
            if parallel.is_last_stage:
                newest = hidden[-1].contiguous()
                if (
                    step == 0 and parallel.tp_size > 1
                ):  # the last rank's shard holds the last position
                    last_rank = dist.get_global_rank(parallel.groups.tp, parallel.tp_size - 1)
                    dist.broadcast(newest, last_rank, group=parallel.groups.tp)
                tokens = sampler.draw(lm_head(model, newest, head), step)
                sampler.observe(tokens[:, None])
            if parallel.pp_size > 1:
                dist.broadcast(tokens, parallel.last_stage_rank, group=parallel.groups.pp)

            drawn = tokens.tolist()
            broken = [row for row in range(num_rows) if writing[row] and drawn[row] < 0]
            for row in range(num_rows):
                if writing[row]:
                    responses[row].append(drawn[row])
                    writing[row] = drawn[row] not in eos_token_ids
            state = _BROKEN if broken else _WRITING if any(writing) else _DONE
            if replicas_share_experts:
                state = world_max(state, parallel.device)
            if state == _BROKEN:
                rows = ", ".join(
                    f"row {row_ids[row]} (prompt {row} of {num_prompts})" for row in broken
                )
                raise FloatingPointError(
                    f"rollout: the logits of token {step + 1} are not finite for {rows or 'a row of another rank'}: "
                    "weights or activations have overflowed; lower --learning_rate, or take bfloat16 instead of float16"
                )
            if progress is not None:
                progress(step + 1, max_new_tokens)
            if state == _DONE:
                break
            input_ids = tokens.clamp(min=0)[:, None]
            end += 1
    return responses[:num_prompts]


def _check(
    prompts: Sequence[Sequence[int]], row_ids: Sequence[int], max_new_tokens: int, vocab_size: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(
            f"rollout: max_new_tokens is {max_new_tokens}, it must be at least 1 (--max_completion_length)"
        )
    if len(row_ids) != len(prompts):
        raise ValueError(f"rollout: {len(row_ids)} row ids for {len(prompts)} prompts")
    for index, (row_id, prompt) in enumerate(zip(row_ids, prompts)):
        if len(prompt) == 0:
            raise ValueError(
                f"rollout: the prompt of row {row_id} (prompt {index} of {len(prompts)}) has no tokens"
            )
        unknown = [token for token in (min(prompt), max(prompt)) if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"rollout: the prompt of row {row_id} holds id {unknown[0]}, the vocabulary has {vocab_size} ids"
            )


def _pad_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int, multiple_of: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-> ids [B, W] int64, W a multiple of `multiple_of`, and the number of padding columns [B]."""
    width = -(-max(len(prompt) for prompt in prompts) // multiple_of) * multiple_of
    num_padding = [width - len(prompt) for prompt in prompts]
    rows = [
        [pad_token_id] * padding + list(prompt) for padding, prompt in zip(num_padding, prompts)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(
        num_padding, device=device
    )


def _positions(
    columns: Tensor, num_padding: Tensor, width: int, media: PromptMedia | None
) -> Tensor:
    """float32 [3, B, W + max_new_tokens]: each row's positions after its padding, which has 0."""
    position_ids = (columns - num_padding[:, None]).clamp(min=0).float().repeat(3, 1, 1)
    if media is not None:
        for row, (padding, of_prompt) in enumerate(zip(num_padding.tolist(), media.position_ids)):
            position_ids[:, row, padding:width] = of_prompt
            position_ids[:, row, width:] = of_prompt[:, -1:] + 1 + columns[: len(columns) - width]
    return position_ids


def _shown(
    model, parallel, input_ids, position_ids, num_padding, media: PromptMedia | None
) -> dict:
    """More arguments of the first stage's prefill: the media in their places in the padded prompts."""
    if media is None or media.features is None:
        return {}
    rows = media.prompts * input_ids.shape[1] + num_padding[media.prompts] + media.places
    return media_arguments(
        model, parallel, input_ids, position_ids, rows, media.tokens, media.features
    )


def _attention_mask(is_padding: Tensor, num_queries: int) -> Tensor:
    """is_padding [B, K] -> [B, 1, S, K] bool for the last S positions, True = hidden.

    A padding position sees itself alone: a row of the softmax without any key would be NaN.
    """
    num_keys = is_padding.shape[1]
    position = torch.arange(num_keys, device=is_padding.device)
    query = position[num_keys - num_queries :, None]
    return ((position > query) | is_padding[:, None, None, :]) & (position != query)


def _forward_stage(
    model,
    parallel: Parallel,
    input_ids: Tensor,
    position_ids: Tensor,
    mask: Tensor | None,
    context,
    shown: dict,
) -> Tensor:
    """This stage's output [S, B, H] (this rank's [S/TP, B, H] under sequence parallelism) for the S
    newest positions; the cache and its offset advance.

    input_ids [B, S]; position_ids [3, B, K] and mask [B, 1, S, K] for the K positions so far;
    shown: the media among the newest. Collectives besides the model's: a receive from the stage
    before, a send to the stage after.
    """
    num_rows, num_positions = input_ids.shape
    pipeline = parallel.groups.pp
    if not parallel.is_first_stage:
        num_local = (
            num_positions // parallel.tp_size if model.config.sequence_parallel else num_positions
        )
        size = (num_local, num_rows, model.config.hidden_size)
        received = torch.empty(size, dtype=model.config.params_dtype, device=parallel.device)
        dist.recv(received, dist.get_global_rank(pipeline, parallel.pp_rank - 1), group=pipeline)
        model.set_input_tensor(received)
    hidden = model(
        input_ids,
        position_ids,
        mask,
        inference_context=context,
        runtime_gather_output=True,
        **shown,
    )
    if not parallel.is_last_stage:
        dist.send(
            hidden.contiguous(),
            dist.get_global_rank(pipeline, parallel.pp_rank + 1),
            group=pipeline,
        )
    context.increment_sequence_len_offset(num_positions)
    context.enable_decode_mode()
    return hidden
