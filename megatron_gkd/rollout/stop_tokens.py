"""Which ids end a response, as the model's folder says."""

import json
from pathlib import Path

from megatron_gkd.data.chat import ChatTokenizer, load_tokenizer


def read_stop_token_ids(folder: str | Path) -> list[int]:
    """FOLDER's end-of-text ids, sorted: from generation_config.json, else config.json, else the tokenizer's eos token and
    the special token that closes an assistant turn in its chat template.

    An empty list where none of them names one (a folder of weights without a tokenizer that loads): responses then have
    their full length. Raises ValueError naming the file whose eos_token_id is not an id or a list of ids.
    """
    folder = Path(folder)
    for name, places in (
        ("generation_config.json", [()]),
        ("config.json", [(), ("thinker_config",), ("thinker_config", "text_config"), ("text_config",)]),
    ):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: must hold an object, is a {type(content).__name__}")
        for place in places:
            section = content
            for key in place:
                section = section.get(key) or {}
            if section.get("eos_token_id") is not None:
                return _as_ids(section["eos_token_id"], path)
    try:
        tokenizer = load_tokenizer(str(folder))
    except Exception:  # of any type; rows of ids do without it, and text has been refused
        return []
    if tokenizer is None:
        return []
    found = [tokenizer.eos_token_id, ChatTokenizer(tokenizer, str(folder)).closing_id() if tokenizer.chat_template else None]
    return sorted({token for token in found if token is not None})


def _as_ids(value, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}; expected a token id or a list of them")
    return sorted(set(ids))
