r"""Training steps of a whole decoder at the sizes of Qwen3-Omni-30B-A3B's thinker, with random
weights that are made on the device: no model folder.

    python -m benchmarks.real_shape [--layers 48] [--recompute] [--targets all|attention]
                                    [--batch 4] [--length 2048] [--response 512] [--steps 3]
                                    [--device auto] [--profile FILE] [--records FILE]

A step is that of `megatron_gkd.train` on one micro-batch of random ids, without a rollout. Both
views have `--length` tokens; they end with the same response and differ before it. The first step
also warms up: the table's last row has the medians of the others. A profiled step comes after them.
Random weights spread the tokens over the experts nearly evenly, which a trained router does not.

Memory is the most during a step, the model included: of CUDA's allocator, or the resident size on
CPU. Under torchrun --batch is the rows of each data-parallel rank, and seconds and memory are
those of rank 0. Sizes that take seconds, to check that everything runs:

    python -m benchmarks.real_shape --device cpu --layers 2 --experts 8 --hidden 64 --inter 32 \
        --heads 4 --vocab 1000 --batch 2 --length 32 --response 8
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from benchmarks.meter import resident_bytes
from benchmarks.report import commit, machine, table
from megatron_gkd.data import Batch, Packing, Sample, View, collate
from megatron_gkd.flags import exit_with
from megatron_gkd.forward import LossSettings, student_forward_backward, teacher_forward
from megatron_gkd.lora.adapter import ATTENTION, LINEARS, resolve_targets
from megatron_gkd.lora.apply import apply_lora, count_parameters
from megatron_gkd.lora.slots import STUDENT
from megatron_gkd.loss import Divergence
from megatron_gkd.loss.rows import IGNORED_LABEL
from megatron_gkd.metrics import Clock
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.model.decoder import build_decoder
from megatron_gkd.optimizer import Optimizer, in_gradient_reducer
from megatron_gkd.parallel import (
    Parallel,
    destroy,
    initialize,
    log_rank_0,
    resolve_device,
    seed_step,
)

GIB = 2**30
WEIGHT_STD = 0.02  # of base weights and of W_up
SEED = 1  # of weights, LoRA's start, dropout and ids
LEARNING_RATE = 1e-4
LORA_RANK = 8
TARGETS = {"all": LINEARS, "attention": ATTENTION}


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
LAYOUT = ("tensor_model", "expert_model", "context")
# Of the command line, in the order of Shape's fields.
SIZE_FLAGS = "layers experts experts_per_token hidden inter heads key_value_heads head_dim vocab"


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
        seed=seed,
    )
    model_args = shape.model_args()
    model = build_decoder(model_args, parallel, dtype, recompute=recompute)
    apply_lora(
        model,
        model_args,
        parallel,
        rank=lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout,
        targets=resolve_targets(list(targets)),
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


@dataclass(frozen=True)
class StepResult:
    """What one training step took and gave, on this rank; the table's columns."""

    teacher_seconds: float
    student_seconds: float  # forward and backward
    optimizer_seconds: float
    step_seconds: float
    student_tokens_per_second: float  # of its view, all ranks, prompts too, by step_seconds
    peak_allocated_gib: float
    peak_reserved_gib: float | None  # None on CPU
    jsd: float  # nats a response token
    grad_norm: float


class Training:
    """A decoder with the loss and the optimizer that `megatron_gkd.train` has by default."""

    def __init__(self, parallel: Parallel, model_args: ModelArgs, model: GPTModel) -> None:
        self.parallel, self.model = parallel, model
        self.reduced = in_gradient_reducer(model)
        adam = dict(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0)
        self.optimizer = Optimizer(self.reduced, dtype=model.config.params_dtype, **adam)
        divergence = Divergence("jsd", beta=0.5, temperature=2.0)
        self.loss = LossSettings(divergence, 0.0, model_args.vocab_size)
        self.clock = Clock(parallel.device)

    def step(
        self, batches: Sequence[Batch], step: int, learning_rate: float = LEARNING_RATE
    ) -> StepResult:
        """Step number `step` on these micro-batches; the device is waited for after each phase.
        Collectives: those of a training step. Raises FloatingPointError where it is not finite.
        """
        parallel, clock = self.parallel, self.clock
        seed_step(SEED, step, parallel)
        reset_peak(parallel.device)
        clock.restart()
        teacher_hidden = teacher_forward(self.model, batches, parallel)
        clock.lap("teacher_time")
        self.optimizer.zero_grad()
        sums = student_forward_backward(self.reduced, batches, teacher_hidden, self.loss, parallel)
        means = sums.means(parallel)
        clock.lap("student_time")
        update = self.optimizer.step(learning_rate, means["loss"])
        clock.lap("optimizer_time")
        if not update.applied:
            raise FloatingPointError(f"step {step}: the loss or a gradient is not finite")
        num_tokens = sum(sum(batch.student.lengths) for batch in batches) * parallel.dp_size
        allocated, reserved = peak_gib(parallel.device)
        return StepResult(
            teacher_seconds=clock.laps["teacher_time"],
            student_seconds=clock.laps["student_time"],
            optimizer_seconds=clock.laps["optimizer_time"],
            step_seconds=clock.step_time,
            student_tokens_per_second=num_tokens / clock.step_time,
            peak_allocated_gib=allocated,
            peak_reserved_gib=reserved,
            jsd=means["jsd"],
            grad_norm=update.grad_norm,
        )


def reset_peak(device: torch.device) -> None:
    """Wait for the device; `peak_gib` counts from here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: torch.device) -> tuple[float, float | None]:
    """Most GiB (allocated, reserved) since `reset_peak`; on CPU (resident, None)."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        return allocated / GIB, torch.cuda.max_memory_reserved(device) / GIB
    return resident_bytes("VmHWM") / GIB, None


def profile_step(training: Training, batch: Batch, step: int) -> tuple[dict[str, float], str]:
    """One more step under torch's profiler: (numbers for the records, tables of operations)."""
    cuda = training.parallel.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as profiler:
        result = training.step([batch], step)
    events: Any = profiler.key_averages()
    count = lambda *names: sum(e.count for e in events if any(name in e.key for name in names))
    found = {"step_seconds": result.step_seconds}  # under the profiler, which slows the host
    if cuda:
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        # an annotation is a span that contains kernels
        kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False)]
        found["device_busy_seconds"] = sum(k.self_device_time_total for k in kernels) / 1e6
        found["launches"] = count("LaunchKernel", "MemcpyAsync", "MemsetAsync")
        found["synchronizations"] = count("Synchronize")
    orders = ["self_cuda_time_total"] * cuda + ["self_cpu_time_total"]
    tables = [events.table(sort_by=o, row_limit=50, max_name_column_width=100) for o in orders]
    return found, "\n".join([as_text(found), *tables])


def as_text(values: dict[str, float]) -> str:
    """One line: "build seconds 12.5, ..."."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in values.items())


def result_table(results: Sequence[StepResult]) -> str:
    """Markdown, a row for each step and one for the medians of those after the first."""
    names = [field.name for field in fields(StepResult)]
    steps = {f"{step}": [result] for step, result in enumerate(results, start=1)}
    if len(results) > 2:
        steps[f"median of 2 to {len(results)}"] = list(results[1:])
    rows = []
    for step, of_row in steps.items():
        columns = [[getattr(result, name) for result in of_row] for name in names]
        rows.append([step, *("-" if None in c else f"{statistics.median(c):.6g}" for c in columns)])
    return table(["step", *(name.replace("_", " ") for name in names)], rows)


def measure(arguments: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> None:
    """Build the decoder, take the steps and print what they took; `write` gets the records."""
    started, targets = time.perf_counter(), TARGETS[arguments.targets]
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(REAL_SHAPE)})
    names = ("device", "recompute", *(f"{name}_parallel_size" for name in LAYOUT))
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    parallel, model_args, model = random_decoder(shape, targets=targets, **settings)
    training = Training(parallel, model_args, model)
    reset_peak(parallel.device)
    trainable, total = count_parameters(model_args, LORA_RANK, list(targets))
    seconds, (size, _) = time.perf_counter() - started, peak_gib(parallel.device)
    built = {"build_seconds": seconds, "model_gib": size}  # with LoRA and its gradients
    write({"what": "built", **built, "trainable_parameters": trainable, "parameters": total})
    where = f"{machine(parallel.device.type)}; torch {torch.__version__}; commit {commit()}"
    parameters = f"{trainable:,} of {total:,} parameters are LoRA's"
    log_rank_0(parallel, f"{where}\n{shape}\n{parameters}; {as_text(built)}\n")
    sizes = dict(num_rows=arguments.batch, length=arguments.length, response=arguments.response)
    results = []
    for step in range(1, arguments.steps + 1):
        batch = random_batch(shape.vocab_size, parallel, **sizes, seed=step)
        results.append(training.step([batch], step))
        write({"what": "step", "step": step, **asdict(results[-1])})
    log_rank_0(parallel, result_table(results))
    if arguments.profile:
        batch = random_batch(shape.vocab_size, parallel, **sizes, seed=0)
        found, text = profile_step(training, batch, 0)
        write({"what": "profiled step", **found})
        log_rank_0(parallel, f"Profiled step ({arguments.profile}): {as_text(found)}")
        if parallel.rank == 0:
            Path(arguments.profile).write_text(text)
    destroy()


def append_record(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Append `record`, the settings and where they ran to --records, if given; on rank 0."""
    if arguments.records and os.environ.get("RANK", "0") == "0":
        device_name = machine(resolve_device(arguments.device).type)
        where = {"device": device_name, "torch": torch.__version__, "commit": commit()}
        with open(arguments.records, "a") as file:
            file.write(json.dumps({**record, **where, "settings": vars(arguments)}) + "\n")


def main(argv: Sequence[str]) -> None:
    """Exit status 1: it does not fit in memory; 2: the flags do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for size, flag in zip(fields(Shape), SIZE_FLAGS.split()):
        add(f"--{flag}", dest=size.name, type=int, default=size.default)
    add("--targets", default="all", choices=TARGETS, help="the linears that carry LoRA")
    add("--recompute", action="store_true", help="run each layer again in backward")
    add("--batch", type=int, default=4, help="rows")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--response", type=int, default=512, help="those at a row's end that are trained")
    add("--steps", type=int, default=3)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name in LAYOUT:
        add(f"--{name}_parallel_size", type=int, default=1)
    add("--profile", metavar="FILE", help="for the tables of torch's profiler")
    add("--records", metavar="FILE", help="to which JSON objects are appended, one a line")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.response < arguments.length:
        parser.error(f"--response {arguments.response}: 1 to --length {arguments.length} - 1")
    if (most := arguments.num_experts) < arguments.num_experts_per_tok:
        parser.error(f"--experts_per_token {arguments.num_experts_per_tok}: 1 to --experts {most}")
    write = functools.partial(append_record, arguments)
    try:
        measure(arguments, write)
    except torch.OutOfMemoryError as error:
        failure = f"does not fit in memory: {error}"
        write({"what": "failure", "failure": failure})
        sys.exit(failure)
    except ValueError as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
