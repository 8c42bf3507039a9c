"""Cases of one training step: models, adapters, rows and flags by name, and the adapters and rows
that are made from others.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.reference_step import ATTENTION, EXPERTS, load_model

NUM_ROWS = 16
# Another decoder: tied head, no renormalisation of the routing weights, two key/value heads, a
# vocabulary that is no multiple of anything.
OTHER = dict(
    num_hidden_layers=4,
    num_experts=16,
    num_experts_per_tok=4,
    num_key_value_heads=2,
    vocab_size=769,
    thinker_only=True,
)
OTHER |= dict(
    hidden_size=64, head_dim=16, moe_intermediate_size=24, tie_word_embeddings=True, seed=3
)

# name: (model, adapter, rows, settings of the reference, flags of the run; teacher_adapter by name)
CASES = {
    "plain": ("small", "all", "teacher", {}, {}),
    "guide": (
        "small",
        "all",
        "mixed",
        dict(beta=0.3, temperature=3.5, sft_alpha=0.3),
        dict(beta=0.3, temperature=3.5, sft_alpha=0.3),
    ),
    "paper": (
        "small",
        "attention",
        "teacher",
        dict(beta=0.9, temperature=1.0),
        dict(beta=0.1, beta_convention="paper", temperature=1),
    ),
    "paper 0": (
        "small",
        "all",
        "teacher",
        dict(kind="forward_kl"),
        dict(beta=0, beta_convention="paper"),
    ),
    "paper 1": (
        "small",
        "experts",
        "teacher",
        dict(kind="reverse_kl"),
        dict(beta=1, beta_convention="paper", sft_alpha=0),
    ),
    "forward": (
        "small",
        "some",
        "mixed",
        dict(kind="forward_kl", temperature=0.7),
        dict(divergence="forward_kl", temperature=0.7),
    ),
    "reverse": (
        "small",
        "all",
        "teacher",
        dict(kind="reverse_kl", temperature=1.0, sft_alpha=0.5),
        dict(divergence="reverse_kl", temperature=1, sft_alpha=0.5),
    ),
    "clip": ("small", "all", "teacher", dict(clip=1e-3), dict(divergence_clip=1e-3)),
    "top k": (
        "small",
        "all",
        "mixed",
        dict(top_k=5, beta=0.3, sft_alpha=0.2),
        dict(loss_top_k=5, beta=0.3, sft_alpha=0.2),
    ),
    "top k, lm_head": (
        "small",
        "head",
        "teacher",
        dict(top_k=3, clip=1e-3, kind="reverse_kl", skip=1),
        dict(loss_top_k=3, divergence_clip=1e-3, divergence="reverse_kl", skip_first_tokens=1),
    ),
    "entropy": (
        "small",
        "all",
        "mixed",
        dict(weight="entropy", skip=2, sft_alpha=0.3),
        dict(token_weight="entropy", skip_first_tokens=2, sft_alpha=0.3),
    ),
    "position": (
        "small",
        "attention",
        "mixed",
        dict(weight="position", top_k=7),
        dict(token_weight="position", loss_top_k=7),
    ),
    "recompute": (
        "small",
        "all",
        "mixed",
        dict(sft_alpha=0.3),
        dict(recompute="full", sft_alpha=0.3),
    ),
    "eager": ("small", "all", "teacher", {}, dict(attn_impl="eager")),
    "lm_head": (
        "small",
        "head",
        "mixed",
        dict(sft_alpha=0.2, clip=1e-3),
        dict(sft_alpha=0.2, divergence_clip=1e-3),
    ),
    "a teacher with attention": (
        "small",
        "all",
        "plain",
        dict(sft_alpha=0.2),
        dict(sft_alpha=0.2, teacher_adapter="attention"),
    ),
    "a teacher with all": (
        "small",
        "attention",
        "teacher",
        dict(temperature=1.0),
        dict(temperature=1, teacher_adapter="all"),
    ),
    "a teacher with lm_head": (
        "small",
        "some",
        "mixed",
        dict(sft_alpha=0.3),
        dict(sft_alpha=0.3, teacher_adapter="head", recompute="full"),
    ),
    "one layer": ("small", "one layer", "mixed", dict(sft_alpha=0.3), dict(sft_alpha=0.3)),
    "a lower rank": ("small", "a lower rank", "teacher", {}, {}),
    "lm_head alone": ("small", "only head", "teacher", {}, {}),
    "only sft": ("small", "all", "plain", dict(sft_alpha=1.0), dict(sft_alpha=1)),
    "other": ("other", "all", "mixed", dict(sft_alpha=0.2), dict(sft_alpha=0.2)),
    "other recompute": (
        "other",
        "experts",
        "teacher",
        dict(temperature=1.0),
        dict(recompute="full", temperature=1),
    ),
    "text": (
        "text",
        "all",
        "mixed",
        dict(beta=0.3, temperature=3.5, sft_alpha=0.3),
        dict(beta=0.3, temperature=3.5, sft_alpha=0.3),
    ),
    "text lm_head": ("text", "head", "teacher", {}, dict(recompute="full")),
}
TARGETS = {
    "all": ATTENTION + EXPERTS,
    "attention": ATTENTION,
    "experts": EXPERTS,
    "some": ("k_proj", "o_proj", "down_proj"),
    "head": (*ATTENTION, "lm_head"),
    "only head": ("lm_head",),
}
RANKS = {
    "all": (3, 5.0),
    "attention": (4, 8.0),
    "experts": (5, 2.0),
    "some": (1, 1.0),
    "head": (3, 4.0),
    "only head": (2, 3.0),
}


def cut_adapter(adapter: str, folder: Path, cut, **settings) -> str:
    """The adapter with `cut(name, tensor)` in place of its tensors (None leaves one out) and more
    settings.
    """
    folder.mkdir()
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = {
        name: cut(name, tensor)
        for name, tensor in load_file(Path(adapter, "adapter_model.safetensors")).items()
    }
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def rank_two(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Two of the ranks of v_proj in layer 1."""
    if "layers.1.self_attn.v_proj" not in name:
        return tensor
    return tensor[:2] if ".lora_A." in name else tensor[:, :2]


def answered(folder: str, row: dict) -> dict:
    """The row without a teacher view and with five tokens of the base model's own choice as its
    response.
    """
    model, prompt = load_model(folder), row["input_ids"][: row["labels"].count(-100)]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model.logits(ids)[-1].argmax()))
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}
