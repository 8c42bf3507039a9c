"""Adapters for tests, and what `peft` on `transformers` makes of them: logits, and gradients under
the adapter's per-expert names.

E experts, I their intermediate size, r rank, B rows, S positions, V vocabulary.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import (
    Qwen3MoeForCausalLM,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from megatron_gkd.verify import reference as thinker

ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ALL = ATTENTION + EXPERTS
HEAD = "lm_head"
THINKER = "base_model.model.thinker."
ROOT = f"{THINKER}model.layers."
ROOTS = {"qwen3_omni_moe": THINKER, "qwen3_omni_moe_thinker": THINKER}
ROOTS |= {"qwen3_moe": "base_model.model."}  # by model_type
TOWERS = r".*(audio_tower|visual|talker|code2wav).*"


@dataclass
class MicroBatch:
    """Rows for transformers, padded on the right: what follows a row's end counts in no result. The
    decoder reads them packed.
    """

    input_ids: torch.Tensor  # [B, S]
    lengths: torch.Tensor  # [B]

    @property
    def real(self) -> torch.Tensor:
        """[B, S] bool: not padding."""
        return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]

    @property
    def position_ids(self) -> torch.Tensor:
        return torch.arange(self.input_ids.shape[1]).expand(3, *self.input_ids.shape)

    def cotangent(self, vocab_size: int) -> torch.Tensor:
        """[B, S, V]: the gradient of the loss at the logits, zero on padding."""
        generator = torch.Generator().manual_seed(5)
        return (
            torch.randn(*self.input_ids.shape, vocab_size, generator=generator)
            * self.real[..., None]
        )


def make_batches(vocab_size: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    lengths = ((24, 9, 17), (16, 5), (8, 1, 3), (16, 7))
    return [
        MicroBatch(
            torch.randint(0, vocab_size, (len(of_rows), max(of_rows)), generator=generator),
            torch.tensor(of_rows),
        )
        for of_rows in lengths
    ]


def linear_sizes(model_args, targets: list[str]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every targeted linear, written down again so that the package's own table is
    not its own witness.
    """
    heads, keys = (
        model_args.num_attention_heads * model_args.head_dim,
        model_args.num_key_value_heads * model_args.head_dim,
    )
    of_target = {
        "q_proj": (model_args.hidden_size, heads),
        "k_proj": (model_args.hidden_size, keys),
        "v_proj": (model_args.hidden_size, keys),
        "o_proj": (heads, model_args.hidden_size),
        "gate_proj": (model_args.hidden_size, model_args.moe_intermediate_size),
        "up_proj": (model_args.hidden_size, model_args.moe_intermediate_size),
        "down_proj": (model_args.moe_intermediate_size, model_args.hidden_size),
    }
    linears = {HEAD: (model_args.hidden_size, model_args.vocab_size)} if HEAD in targets else {}
    for layer in range(model_args.num_layers):
        here = [t.removeprefix(f"{layer}.") for t in targets]
        for target in here:
            if target in ATTENTION:
                linears[f"{layer}.self_attn.{target}"] = of_target[target]
            elif target in EXPERTS:
                linears |= {
                    f"{layer}.mlp.experts.{expert}.{target}": of_target[target]
                    for expert in range(model_args.num_experts)
                }
    return linears


def random_adapter(
    model_args, rank: int, targets: list[str], seed: int = 3
) -> dict[str, torch.Tensor]:
    """Every lora_A [r, d_in] and lora_B [d_out, r], none of them zero."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    root = ROOTS[model_args.model_type]
    for linear, (d_in, d_out) in linear_sizes(model_args, targets).items():
        linear = f"{root}{linear}" if linear == HEAD else f"{root}model.layers.{linear}"
        tensors[f"{linear}.lora_A.weight"] = (
            torch.randn(rank, d_in, generator=generator) / d_in**0.5
        )
        tensors[f"{linear}.lora_B.weight"] = (
            torch.randn(d_out, rank, generator=generator) * 0.3 / rank**0.5
        )
    return tensors


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    **settings,
) -> str:
    """A PEFT folder whose adapter_config.json is PEFT's own."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        exclude_modules=TOWERS,
        task_type="CAUSAL_LM",
        **settings,
    )
    config.save_pretrained(folder)
    bare = {
        name.replace(".thinker.", "."): value.clone()
        for name, value in tensors.items()
        if f".{HEAD}." in name
    }
    save_file(tensors | bare, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def with_zero_experts(
    tensors: dict[str, torch.Tensor], model_args, rank: int, targets: list[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """peft loads an expert's gate, up and down together or not at all: zeros for the rest."""
    if not any(target.endswith(tuple(EXPERTS)) for target in targets):
        return tensors, targets
    every = random_adapter(model_args, rank, EXPERTS)
    missing = [target for target in EXPERTS if target not in targets]
    zeros = {name: torch.zeros_like(value) for name, value in every.items() if name not in tensors}
    return tensors | zeros, targets + missing


def load_thinker(folder: str):
    """The thinker as a model of its own, from a thinker's folder or a whole model's."""
    return Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def load_text_model(folder: str):
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_whole(folder: str):
    return Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def load_peft(model, adapter: str, **options):
    """`model` with the adapter; PEFT's warning about keys of its own rank_pattern is expected,
    missing adapter keys are not.

    By PEFT alone, except on a thinker of transformers until 5.20, where PEFT does not find the
    names of the whole model.
    """
    is_thinker = isinstance(model, Qwen3OmniMoeThinkerForConditionalGeneration)
    old_thinker = is_thinker and thinker.decoder(model) is model.model
    load = thinker.load_peft if old_thinker else PeftModel.from_pretrained
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(model, adapter, **options).eval()
    missing = [
        str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)
    ]
    return loaded, missing


def peft_gradients(model, model_args, rank: int) -> dict[str, torch.Tensor]:
    """Gradients of the adapter `default` of a PeftModel under per-expert names. `rank` is the
    adapter's own: PEFT stacks gate and up to rank 2 r.

    Stacked lora_A [E 2r, in] holds for each expert the rows of gate, then of up; lora_B [2I, 2r E]
    interleaves the experts in its columns.
    """
    gradients, root = {}, ROOTS[model_args.model_type]
    layers = f"{root}model.layers."
    for name, parameter in model.named_parameters():
        if "lora_" not in name or ".default" not in name:
            continue
        if f"{HEAD}." in name:
            gradients[f"{root}{HEAD}.lora_{'A' if '.lora_A.' in name else 'B'}.weight"] = (
                parameter.grad
            )
            continue
        layer, _, linear = name.split("layers.")[1].partition(".")
        side = "A" if ".lora_A." in name else "B"
        if linear.startswith("self_attn"):
            gradients[f"{layers}{layer}.{linear.replace('.default', '')}"] = parameter.grad
            continue
        stacked = rank * (2 if "base_layer" in linear else 1)
        if side == "A":
            experts = parameter.grad.reshape(model_args.num_experts, stacked, -1)
        else:
            experts = parameter.grad.reshape(-1, stacked, model_args.num_experts).permute(2, 0, 1)
        for expert, values in enumerate(experts):
            base = f"{layers}{layer}.mlp.experts.{expert}"
            if "base_layer" not in linear:
                gradients[f"{base}.down_proj.lora_{side}.weight"] = values
            elif side == "A":
                (
                    gradients[f"{base}.gate_proj.lora_A.weight"],
                    gradients[f"{base}.up_proj.lora_A.weight"],
                ) = values.split(rank)
            else:
                gate, up = values.chunk(2)
                gradients[f"{base}.gate_proj.lora_B.weight"] = gate[:, :rank]
                gradients[f"{base}.up_proj.lora_B.weight"] = up[:, rank:]
    return gradients
