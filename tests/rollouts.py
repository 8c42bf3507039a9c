"""Rollouts in tests: sampling settings, and a `Rollout` around the training model."""

import torch

from megatron_gkd.data import Packing
from megatron_gkd.data.micro_batches import Budget
from megatron_gkd.rollout.backend import MegatronBackend
from megatron_gkd.rollout.engine import Engine, GenerationSettings
from megatron_gkd.rollout.rollout import Rollout
from megatron_gkd.rollout.sampling import Sampling


def make_sampling(*, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0) -> Sampling:
    """The model's own distribution, but for what is given."""
    return Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty
    )


GREEDY = make_sampling(temperature=0.0)


def make_engine(model, model_args, parallel, *, sampling=GREEDY, **settings) -> Engine:
    """The pad token is 0, without stop ids a text has `max_new_tokens` tokens."""
    defaults = dict(stop_token_ids=(), pad_token_id=0, prefill_tokens=64, cuda_graphs=True)
    settings = GenerationSettings(sampling=sampling, **{**defaults, **settings})
    return Engine(model, model_args, parallel, settings)


def no_media(row: int, author: str):
    """The training model has its media as features of its own towers."""
    raise AssertionError(f"the references of row {row} were read for the {author}")


def megatron_rollout(
    model,
    model_args,
    parallel,
    *,
    sampling=GREEDY,
    max_new_tokens,
    stop_token_ids=(),
    max_tokens=10_000,
    seed=0,
) -> Rollout:
    """The training model writes; the pad token is 0. max_tokens: of the micro-batches that it
    makes.
    """
    engine = make_engine(
        model,
        model_args,
        parallel,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
    )
    backend = MegatronBackend(engine, seed)
    return Rollout(
        backend=backend,
        model=model,
        parallel=parallel,
        references=no_media,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
        budget=Budget(max_tokens),
        packing=Packing(0, parallel.sequence_multiple, parallel.row_multiple),
    )


def greedy_texts(
    model, prompts, max_new_tokens, *, stop_token_ids=(), **settings
) -> dict[int, list[int]]:
    """What transformers' `model` writes behind each prompt, by its number: one by one, since its
    repetition penalty would count padding as text.
    """
    texts = {}
    for row, prompt in enumerate(prompts):
        ids = model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_token_ids),
            pad_token_id=0,
            **settings,
        )
        texts[row] = ids[0, len(prompt) :].tolist()
    return texts
