"""Half a minute of hearing lessons, "which word is this?", for the audio tower under a head that is
discarded.

The real audio tower was pretrained too. The decoder takes no part: it does not learn what the
tower's outputs mean, so the model cannot hear yet, although its tower tells the words apart.
"""

import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import FeatureExtractionMixin
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    _get_feat_extract_output_lengths,
)

from demo.tiny import toy_language
from demo.tiny.sounds import SAMPLE_RATE, Speaker, Utterance
from demo.tiny.toy_language import MAX_SPOKEN_WORDS
from demo.tiny.training import learning_rate_share
from megatron_gkd.verify.reference import tower

BATCH_SIZE = 16  # utterances
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
NUM_HELD_OUT = 64  # utterances in the final check
SILENCE = len(toy_language.WORDS)  # the class beside the words
# The tower encodes each second by itself: 12 tokens of 80 ms and one of 40 ms.
TOKENS_PER_SECOND = 13
TOKEN_SECONDS = 0.08


def token_labels(utterance: Utterance, words: list[str], num_tokens: int) -> Tensor:
    """For each of the tower's outputs the index of the word that sounds at its centre, or SILENCE:
    [num_tokens].
    """
    token = torch.arange(num_tokens)
    seconds = token // TOKENS_PER_SECOND + token % TOKENS_PER_SECOND * TOKEN_SECONDS
    labels = torch.full((num_tokens,), SILENCE)
    for (start, end), word in zip(utterance.spans, words):
        labels[(start <= seconds) & (seconds < end)] = toy_language.WORDS.index(word)
    return labels


def _hear(
    model: Any,
    extractor: FeatureExtractionMixin,
    speak: Speaker,
    prompts: list[str],
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Say the prompts. Returns the tower's outputs [N, H], of all utterances in a row, and their
    labels [N].
    """
    words = [prompt.split() for prompt in prompts]
    utterances = [speak(said, generator) for said in words]
    inputs = extractor(
        [utterance.samples for utterance in utterances],
        sampling_rate=SAMPLE_RATE,
        padding=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = inputs["attention_mask"]
    outputs = model.get_audio_features(inputs["input_features"], mask).last_hidden_state
    num_tokens = _get_feat_extract_output_lengths(mask.sum(dim=1)).tolist()
    return outputs, torch.cat(list(map(token_labels, utterances, words, num_tokens)))


def train_audio_tower(
    model: Any,
    extractor: FeatureExtractionMixin,
    speak: Speaker,
    *,
    num_steps: int,
    seed: int,
) -> float:
    """Train the audio tower in place for `num_steps` steps of 16 fresh utterances; nothing else
    changes.

    Returns the share of the tower's outputs on held-out prompts, those at the borders of words
    included, whose word the head identifies. Deterministic for a `seed` on one machine; uses one
    thread, as `train_toy_language` does.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prompts, sounds = random.Random(seed), np.random.default_rng(seed)
    audio_tower = tower(model, "audio_tower")
    head = nn.utils.skip_init(nn.Linear, model.config.audio_config.output_dim, SILENCE + 1)
    nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    parameters = [*audio_tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    progress = tqdm(
        range(num_steps),
        desc="teaching the audio tower",
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    for step in progress:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * learning_rate_share(
            step, num_steps, WARMUP_STEPS
        )
        said = [
            toy_language.sample_prompt(prompts, False, MAX_SPOKEN_WORDS) for _ in range(BATCH_SIZE)
        ]
        outputs, labels = _hear(model, extractor, speak, said, sounds)
        loss = nn.functional.cross_entropy(head(outputs), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress.set_postfix(
            loss=f"{loss.item():.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False
        )
    said = [
        toy_language.sample_prompt(prompts, True, MAX_SPOKEN_WORDS) for _ in range(NUM_HELD_OUT)
    ]
    with torch.no_grad():
        outputs, labels = _hear(model, extractor, speak, said, sounds)
        share = (head(outputs).argmax(-1) == labels).float().mean().item()
    torch.set_num_threads(num_threads)
    return share
