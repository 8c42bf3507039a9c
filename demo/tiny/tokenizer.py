"""A byte-level BPE tokenizer in Qwen's file format, trained on the bilingual corpus.txt.

Normaliser (NFC), pre-tokenizer expression and special tokens, in the hub's order, are Qwen's; only
the merges are ours.
"""

import json
import os
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from demo.tiny import toy_language

CORPUS = Path(__file__).with_name("corpus.txt")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
NUM_BYTES = 256
NUM_MERGES = 640  # beyond this the corpus has few pairs left that occur twice
ROLES = ["system", "user", "assistant"]

PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (text, special), in the order of the hub's ids. Decoding with skip_special_tokens keeps those that
# are not special.
ADDED_TOKENS = [
    *[
        (f"<|{name}|>", True)
        for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")
    ],
    *[(f"<|{name}|>", True) for name in ("box_start", "box_end", "quad_start", "quad_end")],
    *[
        (f"<|{name}|>", True)
        for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ],
    *[("<tool_call>", False), ("</tool_call>", False)],
    *[
        (f"<|{name}|>", False)
        for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
    ],
    *[
        ("<tool_response>", False),
        ("</tool_response>", False),
        ("<think>", False),
        ("</think>", False),
    ],
    *[("<|audio_start|>", True), ("<|audio_end|>", True)],
    *[
        (f"<{name}>", True)
        for name in ("tts_pad", "tts_text_bos", "tts_text_eod", "tts_text_bos_single")
    ],
    ("<|audio_pad|>", True),
]
MEDIA_TOKENS = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def minimum_vocab_size() -> int:
    """The smallest vocabulary with every byte, the roles as single tokens, and the added tokens."""
    return NUM_BYTES + 64 + len(ADDED_TOKENS)


def _training_lines() -> list[str]:
    # The roles and the toy language are repeated so that each of their words becomes one token; the
    # roles are merged first.
    return (
        CORPUS.read_text(encoding="utf-8").splitlines()
        + ROLES * 1000
        + toy_language.lexicon_lines() * 20
    )


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with at most `vocab_size` ids, added tokens included, and at most
    NUM_MERGES merges.

    Deterministic. Raises ValueError when `vocab_size` is below `minimum_vocab_size()`.
    """
    if vocab_size < minimum_vocab_size():
        raise ValueError(
            f"--vocab_size {vocab_size} is too small for the tokenizer: at least "
            f"{minimum_vocab_size()} are needed"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size - len(ADDED_TOKENS), NUM_BYTES + NUM_MERGES),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_lines(), trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in ADDED_TOKENS]
    )
    return tokenizer


def _tokenizer_config(token_ids: dict[str, int], has_media: bool) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(token_ids[text]): {"content": text, **flags, "special": special}
        for text, special in ADDED_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [text for text, special in ADDED_TOKENS[1:] if special],
        **({**MEDIA_TOKENS, "extra_special_tokens": MEDIA_TOKENS} if has_media else {}),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: str, *, has_media: bool = True) -> dict[str, int]:
    """Write vocab.json, merges.txt, tokenizer*.json and the chat template to `folder`. Returns the
    id of each token's text.

    `has_media`: name the placeholders of media, and write the template for a processor too.
    """
    token_ids = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.model.save(folder)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    Path(folder, "chat_template.jinja").write_text(template, encoding="utf-8")
    if has_media:
        Path(folder, "chat_template.json").write_text(
            json.dumps({"chat_template": template}, indent=2), encoding="utf-8"
        )
    config = json.dumps(_tokenizer_config(token_ids, has_media), indent=2, ensure_ascii=False)
    Path(folder, "tokenizer_config.json").write_text(config, encoding="utf-8")
    return token_ids
