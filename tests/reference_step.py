"""One training step in one process: `transformers`' model, LoRA as W + scale B A, the dense loss
of the guide, autograd, AdamW.

Nothing of the package's mathematics is used: rows go through the model one by one without padding,
everything is float64. Legend: S tokens of a row, N response tokens, V vocabulary.
"""

import json
import math
import os
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeForCausalLM, Qwen3OmniMoeThinkerForConditionalGeneration

from megatron_gkd.verify.reference import decoder

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_proj", "up_proj", "down_proj")


class ReferenceModel:
    """The frozen model of `folder` (a thinker, or a text model), and logits of one row with or
    without LoRA.
    """

    def __init__(self, folder: str):
        model_type = json.loads(Path(folder, "config.json").read_text())["model_type"]
        is_text = model_type == "qwen3_moe"
        kind = Qwen3MoeForCausalLM if is_text else Qwen3OmniMoeThinkerForConditionalGeneration
        root = "base_model.model." if is_text else "base_model.model.thinker."
        self.head_name, self.layers_name = f"{root}lm_head.", f"{root}model.layers."
        self.model = kind.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        ).eval()  # grouped_mm has no float64
        self.model.requires_grad_(False)
        self.config = self.model.config.get_text_config()
        inner = next(
            name for name, module in self.model.named_modules() if module is decoder(self.model)
        )
        self.layers = (
            f"{inner}.layers."  # with or without language_model, by the version of transformers
        )
        self.weights = {
            f"{self.layers}{name}": weight
            for name, weight in decoder(self.model).layers.named_parameters()
        }

    def linear_sizes(self, targets) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of every targeted linear, by `LAYER.self_attn.q_proj` or
        `LAYER.mlp.experts.E.gate_proj`.
        """
        config = self.config
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        sizes = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
        }
        sizes |= {
            "gate_proj": (hidden, inter),
            "up_proj": (hidden, inter),
            "down_proj": (inter, hidden),
        }
        found = {}
        for layer in range(config.num_hidden_layers):
            found |= {
                f"{layer}.self_attn.{name}": sizes[name] for name in ATTENTION if name in targets
            }
            for expert in range(config.num_experts):
                found |= {
                    f"{layer}.mlp.experts.{expert}.{name}": sizes[name]
                    for name in EXPERTS
                    if name in targets
                }
        return found

    def logits(
        self,
        input_ids: list[int],
        changed: dict[str, Tensor] | None = None,
        media: dict | None = None,
    ) -> Tensor:
        """[S, V] float64 of one row; `changed` are the weights of an adapter (`with_lora`), None is
        the base. `media`: the thinker's arguments for them.
        """
        ids = torch.tensor([input_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False} | (
            media or {}
        )
        return torch.func.functional_call(self.model, changed or {}, kwargs=inputs).logits[0]

    def with_lora(self, adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """W + scale B A of the decoder's linears; `adapter` holds lora_A [r, d_in] and lora_B
        [d_out, r] under PEFT's names.
        """

        def delta(linear: str) -> Tensor | float:
            name = f"{self.layers_name}{linear}.lora_B.weight"
            return (
                scale * adapter[name] @ adapter[name.replace("lora_B", "lora_A")]
                if name in adapter
                else 0.0
            )

        changed, experts = {}, range(self.config.num_experts)
        for layer in range(self.config.num_hidden_layers):
            prefix = f"{self.layers}{layer}."
            for name in ATTENTION:
                weight = f"{prefix}self_attn.{name}.weight"
                changed[weight] = self.weights[weight] + delta(f"{layer}.self_attn.{name}")
            gate_up, down = (
                self.weights[f"{prefix}mlp.experts.{name}"]
                for name in ("gate_up_proj", "down_proj")
            )
            half = gate_up.shape[1] // 2
            changed[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack(
                [
                    torch.cat(
                        [
                            gate_up[e, :half] + delta(f"{layer}.mlp.experts.{e}.gate_proj"),
                            gate_up[e, half:] + delta(f"{layer}.mlp.experts.{e}.up_proj"),
                        ]
                    )
                    for e in experts
                ]
            )
            changed[f"{prefix}mlp.experts.down_proj"] = torch.stack(
                [down[e] + delta(f"{layer}.mlp.experts.{e}.down_proj") for e in experts]
            )
        head = self.head_name
        if f"{head}lora_A.weight" in adapter:
            update = scale * adapter[f"{head}lora_B.weight"] @ adapter[f"{head}lora_A.weight"]
            changed["lm_head.weight"] = self.model.lm_head.weight + update
        return changed


@lru_cache(maxsize=4)
def load_model(folder: str) -> ReferenceModel:
    """The model of `folder`, read once: nothing changes its weights."""
    return ReferenceModel(folder)


def views(row: dict) -> tuple[list[int], list[int], list[int], list[int]]:
    """Student's ids and labels, teacher's ids and labels of a tokenised row."""
    ids, labels = row["input_ids"], row["labels"]
    if row.get("teacher_input_ids") is None:
        return ids, labels, ids, labels
    start = next(i for i, label in enumerate(labels) if label != -100)
    prompt = row["teacher_input_ids"]
    return ids, labels, prompt + ids[start:], [-100] * len(prompt) + labels[start:]


def response_logits(logits: Tensor, labels: list[int]) -> tuple[Tensor, Tensor]:
    """The rows of [S, V] that predict a trained token, [N, V], and those tokens [N]."""
    shifted = torch.tensor(labels[1:])
    keep = shifted != -100
    return logits[:-1][keep], shifted[keep]


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    kind: str,
    beta: float,
    clip: float = math.inf,
    top_k: int | None = None,
) -> Tensor:
    """Per token [N] in nats; GUIDE.md section 4, `beta` is the weight of the student. An entry of
    the sum counts as `clip` at most. top_k: of the teacher's best entries and the rest.
    """
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if top_k is not None:
        best = log_p.topk(top_k).indices
        is_best = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, best, True)
        log_q, log_p = (
            torch.cat(
                [
                    side.gather(1, best),
                    side.masked_fill(is_best, -math.inf).logsumexp(1, keepdim=True),
                ],
                1,
            )
            for side in (log_q, log_p)
        )
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return (p * (log_p - log_q)).clamp(max=clip).sum(-1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).clamp(max=clip).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).clamp(max=clip).sum(-1)


def counted_tokens(labels: list[int], skip: int) -> tuple[list[bool], list[float]]:
    """Of each trained token of a row whether it carries a loss, being none of the first `skip` of
    its run; and of those that do, which part of their run has been when they come.
    """
    counts, places, at = [], [], 1
    while at < len(labels):
        end = at
        while end < len(labels) and labels[end] != -100:
            end += 1
        length = end - at
        counts += [number >= skip for number in range(length)]
        places += [(number + 1) / (length - skip) for number in range(length - skip)]
        at = end + 1
    return counts, places


def step_loss(
    model: ReferenceModel,
    adapter: dict[str, Tensor],
    scale: float,
    rows: list[dict],
    *,
    teacher: str | None = None,
    temperature: float = 2.0,
    kind: str = "jsd",
    beta: float = 0.5,
    sft_alpha: float = 0.0,
    clip: float = math.inf,
    top_k: int | None = None,
    skip: int = 0,
    weight: str = "none",
    importance_clip: float | None = None,
) -> dict[str, Tensor]:
    """`loss` (differentiable), `jsd`, `sft_loss`: means over all response tokens of the rows;
    `num_tokens`; and the other means of metrics.jsonl. teacher: folder of an adapter that the
    teacher has; otherwise it is the base. `drawn` of a row: log-probabilities of its tokens when
    they were written.
    """
    sums = dict.fromkeys(
        (
            "jsd",
            "sft_loss",
            "kl_forward",
            "kl_reverse",
            "entropy_student",
            "entropy_teacher",
            "top1_agreement",
            "token_accuracy",
        ),
        0.0,
    )
    num_tokens, changed = 0, model.with_lora(adapter, scale)
    loss, weights, ratios = 0.0, 0.0, []
    with torch.no_grad():
        of_teacher = model.with_lora(*read_adapter(teacher)) if teacher else None
    for row in rows:
        student_ids, student_labels, teacher_ids, teacher_labels = views(row)
        with torch.no_grad():
            teacher, _ = response_logits(
                model.logits(teacher_ids, of_teacher, row.get("teacher_media")), teacher_labels
            )
        student, targets = response_logits(
            model.logits(student_ids, changed, row.get("media")), student_labels
        )
        counts, places = counted_tokens(student_labels, skip)
        student, teacher, targets = student[counts], teacher[counts], targets[counts]
        log_q, log_p = (
            (student / temperature).log_softmax(-1),
            (teacher / temperature).log_softmax(-1),
        )
        values = {
            "jsd": divergence(
                *(student, teacher),
                **dict(temperature=temperature, kind=kind, beta=beta, clip=clip, top_k=top_k),
            ),
            "sft_loss": -student.log_softmax(-1).gather(1, targets[:, None])[:, 0],
            "kl_forward": divergence(
                student, teacher, temperature=temperature, kind="forward_kl", beta=beta, top_k=top_k
            ),
            "kl_reverse": divergence(
                student, teacher, temperature=temperature, kind="reverse_kl", beta=beta, top_k=top_k
            ),
            "entropy_student": -(log_q.exp() * log_q).sum(-1),
            "entropy_teacher": -(log_p.exp() * log_p).sum(-1),
            "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
            "token_accuracy": (student.argmax(-1) == targets).double(),
        }
        for name, value in values.items():
            sums[name] = sums[name] + value.sum()
        num_tokens += len(targets)
        place = torch.tensor(places, dtype=torch.float64)
        weight_of = {
            "none": torch.ones_like(place),
            "entropy": values["entropy_student"].detach(),
            "position": 0.25 + 0.75 / (1 + (-(place - 0.3) / 0.1).exp()),
        }[weight]
        factor = weight_of
        if importance_clip is not None:
            drawn = torch.tensor(row["drawn"], dtype=torch.float64)[counts]
            ratios.append((-values["sft_loss"].detach() - drawn).exp())
            factor = factor * ratios[-1].clamp(max=importance_clip)
        per_token = (1 - sft_alpha) * values["jsd"] + sft_alpha * values["sft_loss"]
        loss, weights = loss + (factor * per_token).sum(), weights + weight_of.sum()
    means = {name: value / num_tokens for name, value in sums.items()}
    means["loss"] = loss / weights
    if ratios:
        every = torch.cat(ratios)
        means["importance_ratio"] = every.mean()
        means["importance_clipped"] = (every > importance_clip).double().mean()
    return means | {"num_tokens": torch.tensor(num_tokens)}


def reference_gradients(
    folder: str, adapter_folder: str, rows: list[dict], **settings
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(what one step's line of metrics.jsonl must say, `grad_norm` included, for the global batch
    `rows` and that adapter; the gradient of each of its tensors, zero where no token reaches it).
    """
    model = load_model(folder)
    adapter, scale = read_adapter(adapter_folder)
    means = step_loss(model, adapter, scale, rows, **settings)
    found = torch.autograd.grad(
        means["loss"], list(adapter.values()), allow_unused=True, materialize_grads=True
    )
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in found))
    numbers = {name: float(value.detach()) for name, value in means.items()}
    return numbers | {"grad_norm": norm}, dict(zip(adapter, found))


def reference_step(
    folder: str, adapter_folder: str, rows: list[dict], **settings
) -> dict[str, float]:
    """`reference_gradients` without the tensors."""
    return reference_gradients(folder, adapter_folder, rows, **settings)[0]


def reference_training(
    folder: str,
    adapter_folder: str,
    batches: list[list[dict]],
    rates: list[float],
    *,
    max_grad_norm: float,
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
    **settings,
) -> tuple[dict[str, Tensor], list[float]]:
    """The adapter after one torch.optim.AdamW update per global batch, with these learning rates;
    and the gradient norms before clipping.
    """
    model = load_model(folder)
    adapter, scale = read_adapter(adapter_folder)
    optimizer = torch.optim.AdamW(adapter.values(), lr=0.0, weight_decay=weight_decay, eps=epsilon)
    norms = []
    for rows, rate in zip(batches, rates, strict=True):
        optimizer.zero_grad()
        step_loss(model, adapter, scale, rows, **settings)["loss"].backward()
        for parameter in adapter.values():  # an expert that no token reaches has a zero gradient
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        norms.append(float(torch.nn.utils.clip_grad_norm_(adapter.values(), max_grad_norm)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: tensor.detach() for name, tensor in adapter.items()}, norms


def write_adapter(
    folder: Path,
    model_folder: str,
    *,
    rank: int,
    alpha: float,
    targets=ATTENTION + EXPERTS,
    seed: int = 0,
    std: float = 0.1,
) -> str:
    """A PEFT adapter with random lora_A and lora_B (per-expert names), as `peft` itself would lay
    it out.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors, model = {}, load_model(model_folder)
    for linear, (d_in, d_out) in model.linear_sizes(targets).items():
        tensors[f"{model.layers_name}{linear}.lora_A.weight"] = (
            torch.randn(rank, d_in, generator=generator) * std
        )
        tensors[f"{model.layers_name}{linear}.lora_B.weight"] = (
            torch.randn(d_out, rank, generator=generator) * std
        )
    if "lm_head" in targets:
        vocab_size, hidden_size = model.model.lm_head.weight.shape
        tensors[f"{model.head_name}lora_A.weight"] = (
            torch.randn(rank, hidden_size, generator=generator) * std
        )
        tensors[f"{model.head_name}lora_B.weight"] = (
            torch.randn(vocab_size, rank, generator=generator) * std
        )
    os.makedirs(folder)
    save_file(tensors, Path(folder, "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    config |= {"target_modules": list(targets), "base_model_name_or_path": model_folder}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], float]:
    """Float64 tensors that require a gradient, and the scale alpha / r."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    return {
        name: tensor.double().requires_grad_() for name, tensor in sorted(tensors.items())
    }, config["lora_alpha"] / config["r"]
