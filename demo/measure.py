"""What both reports measure, with `transformers` and `peft` alone: response logits, divergence,
greedy answers.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_gkd.verify.reference import load_peft

MAX_NEW_TOKENS = 16


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps of metrics lines, and the values of column `name` at them."""
    return [line["step"] for line in lines], [line[name] for line in lines]


def prompt_text(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """All turns but the last in the folder's chat template, up to where the assistant answers."""
    return tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)


def response_ids(answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an answer and of the end-of-turn token that closes it."""
    return tokenizer(answer + tokenizer.eos_token)["input_ids"]


def response_logits(
    model: Any,
    prompts: list[list[int]],
    responses: list[list[int]],
    **media: Tensor,
) -> Tensor:
    """The float32 logits [N, V] that predict each response token, row after row.

    All rows run in one right-padded batch. `media` holds what the model takes beside the ids, such
    as input_features.
    """
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = 1
        predicts[row, len(prompt) - 1 : end - 1] = True
    return model(input_ids=ids, attention_mask=mask, **media).logits[predicts].float()


def mean_jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> float:
    """Jensen-Shannon divergence of [N, V] logits at beta 0.5, mean over N, in nats."""
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits / temperature, dim=-1)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    divergences = 0.5 * (
        student.exp() * (student - mixture) + teacher.exp() * (teacher - mixture)
    ).sum(dim=-1)
    return divergences.mean().item()


def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    **media: Tensor,
) -> list[str]:
    """Greedy continuations of left-padded prompts, as text without special tokens; `media` as in
    `response_logits`.
    """
    length = max(map(len, prompts))
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    )
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    output = model.generate(input_ids=ids, attention_mask=mask, **settings, **media)
    return tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


def share_exact(greedy: list[str], answers: list[str]) -> float:
    """Share of the greedy answers that equal the right ones, character by character."""
    return sum(said == right for said, right in zip(greedy, answers, strict=True)) / len(answers)


def load_adapter(base: torch.nn.Module, adapter: Path) -> PeftModel:
    """`base` with the adapter of a checkpoint folder.

    Raises UserWarning where peft finds no tensor for a LoRA module, and exits where a loaded W_up
    (`lora_B`) is zero: either would make the base model's numbers look like the student's.
    """
    with warnings.catch_warnings():
        # transformers, about a name that peft reads
        warnings.filterwarnings("ignore", category=FutureWarning)
        # peft, about its own rank of fused experts
        warnings.filterwarnings("ignore", message=".*did not match any targeted module")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = load_peft(base, adapter)
    zeros = [
        name for name, weight in model.named_parameters() if ".lora_B." in name and not weight.any()
    ]
    if zeros:
        raise SystemExit(
            f"demo: error: {len(zeros)} LoRA weights of {adapter} are zero once loaded, "
            f"first {zeros[0]}"
        )
    return model
