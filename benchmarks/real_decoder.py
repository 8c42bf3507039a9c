"""A decoder at the sizes of Qwen3-Omni-30B-A3B's thinker with random weights that are made on the
device, and random micro-batches for it: what the benchmarks of real sizes measure. No model folder.

Random weights spread the tokens over the experts nearly evenly, which a trained router does not.
"""

import argparse
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_gkd.data import Batch, Packing, Sample, View, collate
from megatron_gkd.lora.apply import apply_lora, expert_columns
from megatron_gkd.lora.slots import STUDENT
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.parallel import Parallel, initialize, resolve_device

WEIGHT_STD = 0.02  # of base weights and of W_up
SEED = 1  # of weights, LoRA's start, dropout and ids
LORA_RANK = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder under the names of `ModelArgs`; the defaults are Qwen3-Omni-30B-A3B's."""

    num_layers: int = 48
    num_experts: int = 128
    num_experts_per_tok: int = 8
    hidden_size: int = 2048
    moe_intermediate_size: int = 768
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 152064

    def model_args(self) -> ModelArgs:
        """With the thinker's other settings."""
        return ModelArgs(
            model_type="qwen3_omni_moe",
            **asdict(self),
            norm_topk_prob=True,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(24, 20, 20),
            tie_word_embeddings=False,
        )


REAL_SHAPE = Shape()
# Of the command line, in the order of Shape's fields.
SIZE_FLAGS = "layers experts experts_per_token hidden inter heads key_value_heads head_dim vocab"


def add_sizes(add: Callable[..., Any], defaults: Shape = REAL_SHAPE) -> None:
    """The flags of a Shape, to the parser whose `add_argument` this is."""
    for field, flag in zip(fields(Shape), SIZE_FLAGS.split()):
        add(f"--{flag}", dest=field.name, type=int, default=getattr(defaults, field.name))


def shape_of(arguments: argparse.Namespace) -> Shape:
    """Their values."""
    return Shape(**{name: getattr(arguments, name) for name in asdict(REAL_SHAPE)})


def random_decoder(
    shape: Shape = REAL_SHAPE,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    lora_rank: int = LORA_RANK,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.05,
    targets: Sequence[str] = LINEARS,
    recompute: bool = False,
    tensor_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    seed: int = SEED,
) -> tuple[Parallel, ModelArgs, GPTModel]:
    """This process's place in the layout, the sizes, and its part of a decoder with LoRA on
    `targets`: base weights normal with standard deviation 0.02, norm weights 1, W_down as training
    starts it, W_up normal with 0.02, so that student and teacher differ.

    device: auto, cpu or cuda; dtype: of the base and of activations (LoRA is fp32). Weights depend
    on the seed, the device's kind and the layout. Initialises the process groups: a second decoder
    of the same process needs `megatron_gkd.parallel.destroy` before. Collectives: those of
    `parallel.initialize`. Raises ValueError for sizes that the layout does not divide.
    """
    parallel = initialize(
        resolve_device(device),
        tensor_model_parallel_size=tensor_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        context_parallel_size=context_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        seed=seed,
    )
    model_args, targets = shape.model_args(), list(targets)
    columns = expert_columns([(lora_rank, targets)], model_args.num_layers)
    model = build_decoder(model_args, parallel, dtype, recompute=recompute, spare_columns=columns)
    apply_lora(
        model,
        model_args,
        parallel,
        rank=lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout,
        targets=targets,
        seed=seed,
    )
    draw_weights(model, parallel, seed)
    return parallel, model_args, model


@torch.no_grad()
def draw_weights(model: GPTModel, parallel: Parallel, seed: int) -> None:
    """Set every parameter but LoRA's W_down, each from (seed, its name, the slice of it that this
    rank holds), so that ranks with the same slice agree. No collectives.
    """
    generator = torch.Generator(parallel.device)
    for name, parameter in model.named_parameters():
        if f".slots.{STUDENT}.down." in name:
            continue
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            which = f"{seed} {name} {_slice_number(name, parameter, parallel)}"
            generator.manual_seed(zlib.crc32(which.encode()))
            parameter.normal_(std=WEIGHT_STD, generator=generator)


def _slice_number(name: str, parameter: Tensor, parallel: Parallel) -> int:
    """Which slice of a matrix this rank holds; 0 where all ranks hold the same."""
    if not getattr(parameter, "allreduce", True):  # experts
        return parallel.ep_rank
    marked = getattr(parameter, "tensor_model_parallel", False)
    sharded = marked if ".slots." in name else ".router." not in name
    return parallel.tp_rank if sharded else 0


def random_batch(
    vocab_size: int, parallel: Parallel, *, num_rows: int, length: int, response: int, seed: int
) -> Batch:
    """A micro-batch of random ids on the device: rows of `length` tokens in both views, which have
    other prompts and the same responses. The same on the ranks that share the data.
    """
    generator = torch.Generator().manual_seed(seed * 1_000 + parallel.dp_rank)

    def ids(size: int) -> list[list[int]]:
        return torch.randint(vocab_size, (num_rows, size), generator=generator).tolist()

    answers, start, samples = ids(response), length - response, []
    for row, (*prompts, answer) in enumerate(zip(ids(start), ids(start), answers)):
        labels = [IGNORED_LABEL] * start + answer
        student, teacher = (View(prompt + answer, labels, start) for prompt in prompts)
        samples.append(Sample(student, teacher, "", row, 0))
    packing = Packing(0, parallel.sequence_multiple, parallel.row_multiple)
    return collate(samples, packing).to(parallel.device)
