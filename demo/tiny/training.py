"""A minute of plain training that teaches the small model the toy language, on chats in its own
template.
"""

import math
import random
import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from demo.tiny import toy_language
from megatron_gkd.verify.reference import decoder

BATCH_SIZE = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 40
NUM_HELD_OUT = 100  # prompts per rule in the final check


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the response, its `<|im_end|>` included, of a chat that ends
    with the answer.
    """
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    response = messages[-1]["content"] + tokenizer.eos_token
    return tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]


def _batch(
    rows: list[tuple[list[int], list[int]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, S] and next-token labels [B, S], -100 where the next token is not part
    of the response.
    """
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(response)
    return ids, labels


def _response_logits(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of the trained positions only. No mask is needed: causal attention never sees
    right padding.
    """
    return model.lm_head(model.model(input_ids=ids).last_hidden_state[labels != -100])


def held_out_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> dict[str, float]:
    """For each rule the share of NUM_HELD_OUT held-out prompts that greedy decoding would answer
    exactly right.
    """
    generator = random.Random(seed)
    shares = {}
    for rule, meaning in toy_language.RULES.items():
        prompts = [
            toy_language.sample_prompt(generator, held_out=True) for _ in range(NUM_HELD_OUT)
        ]
        chats = [
            toy_language.conversation(prompt, rule, generator.choice(meaning.system_prompts))
            for prompt in prompts
        ]
        ids, labels = _batch([_encode(tokenizer, chat) for chat in chats], tokenizer.pad_token_id)
        with torch.no_grad():
            right = torch.ones_like(labels, dtype=torch.bool)
            right[labels != -100] = (
                _response_logits(model, ids, labels).argmax(-1) == labels[labels != -100]
            )
        shares[rule] = right.all(dim=1).float().mean().item()
    return shares


def learning_rate_share(step: int, num_steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate at `step`: warm-up, then cosine decay to a twentieth."""
    return min(1.0, (step + 1) / warmup_steps) * (
        0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )


def train_toy_language(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_steps: int,
    seed: int,
) -> dict[str, float]:
    """Train decoder and head in place for `num_steps` steps of 32 fresh chats, and return
    `held_out_accuracy`.

    AdamW, warm-up and cosine decay; the towers do not change. Deterministic for a `seed` on one
    machine. Runs on one thread: the fastest for tensors this small, and the other cores stay free
    for other processes.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # A loop over 8 small experts beats a grouped product here.
    model.set_experts_implementation("eager")
    generator = random.Random(seed)
    parameters = [*decoder(model).parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(
        list(dict.fromkeys(parameters)), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    progress = tqdm(
        range(num_steps),
        desc="teaching the toy language",
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    for step in progress:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_share(
            step, num_steps, WARMUP_STEPS
        )
        rows = []
        for _ in range(BATCH_SIZE):
            rule = generator.choice(list(toy_language.RULES))
            system_prompt = generator.choice(toy_language.RULES[rule].system_prompts)
            prompt = toy_language.sample_prompt(generator, held_out=False)
            rows.append(_encode(tokenizer, toy_language.conversation(prompt, rule, system_prompt)))
        ids, labels = _batch(rows, tokenizer.pad_token_id)
        loss = torch.nn.functional.cross_entropy(
            _response_logits(model, ids, labels), labels[labels != -100]
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        progress.set_postfix(
            loss=f"{loss.item():.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False
        )
    accuracy = held_out_accuracy(model, tokenizer, seed)
    torch.set_num_threads(num_threads)
    return accuracy
