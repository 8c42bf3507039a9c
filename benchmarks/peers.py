r"""A GKD step and a rollout of this package against transformers + peft + TRL, at the same sizes
and in the same run: random weights that are made on the device, no model folder.

    python -m benchmarks.peers [--layers 8] [--targets attention,all] [--rows 4,32] [--batch 4]
                               [--length 2048] [--response 512] [--steps 3] [--no-recompute]
                               [--device auto] [--output FILE] [--records FILE]

A step: teacher without LoRA, student with it, divergence, gradients, clipping, AdamW. Theirs is
`Qwen3MoeForCausalLM` with grouped experts, a peft adapter of rank 8 (on the fused experts, too,
with `all`), gradient checkpointing, and TRL's generalized_jsd_loss on the logits of the response.
LoRA without dropout, which peft does not have on fused experts. Medians of the steps after the
first. Milliseconds a token of a rollout: sampling with penalty, top-k and top-p; for `generate`
the difference between two lengths. Peak memory is that of the steps, the model included. Sizes
that take seconds:

    python -m benchmarks.peers --device cpu --dtype float32 --layers 2 --experts 8 --hidden 64 \
        --inter 32 --heads 4 --head_dim 16 --vocab 1000 --batch 2 --length 32 --response 8 \
        --rows 2 --prompt 8 --tokens 4
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch

from benchmarks.real_decoder import (
    LORA_RANK,
    SEED,
    WEIGHT_STD,
    Shape,
    add_sizes,
    random_batch,
    random_decoder,
    shape_of,
)
from benchmarks.report import commit, machine, number, ratio, table
from benchmarks.rollout_real import SAMPLED, RolloutBench
from benchmarks.training_step import LEARNING_RATE, Training, peak_gib, reset_peak
from megatron_gkd.lora import as_student
from megatron_gkd.lora_targets import ATTENTION, LINEARS
from megatron_gkd.parallel import destroy, resolve_device

TARGETS = {"attention": ATTENTION, "all": LINEARS}
OURS, THEIRS = "this package", "transformers + peft + TRL"
BETA, TEMPERATURE = 0.5, 2.0


@dataclass
class Measured:
    """Of one side: seconds of its steps and of their three parts, GiB, ms a token by rows."""

    step: float = math.nan
    teacher: float = math.nan
    student: float = math.nan
    optimizer: float = math.nan
    peak_gib: float = math.nan
    token_ms: dict[int, float] | None = None
    failure: str = ""


def medians(steps: list[tuple[float, float, float]], peak: float) -> Measured:
    """Of the steps after the first: seconds of (teacher, student, optimizer)."""
    later = steps[1:] or steps
    teacher, student, optimizer = (statistics.median(column) for column in zip(*later))
    return Measured(statistics.median(map(sum, later)), teacher, student, optimizer, peak)


def measure_ours(shape: Shape, targets: str, arguments: argparse.Namespace) -> Measured:
    """Steps and rollouts of the decoder that is trained here."""
    parallel, model_args, model = random_decoder(
        shape,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        lora_dropout=0.0,
        targets=TARGETS[targets],
        recompute=arguments.recompute,
    )
    training, steps, peak = Training(parallel, model_args, model), [], 0.0
    sizes = dict(num_rows=arguments.batch, length=arguments.length, response=arguments.response)
    for step in range(1, arguments.steps + 1):
        batch = random_batch(shape.vocab_size, parallel, **sizes, seed=step)
        found = training.step([batch], step)
        steps.append((found.teacher_seconds, found.student_seconds, found.optimizer_seconds))
        peak = max(peak, found.peak_allocated_gib)
    measured = medians(steps, peak)
    bench = RolloutBench(parallel, model_args, model, shape, lambda **record: None)
    keys, measured.token_ms = arguments.prompt + arguments.tokens + 4, {}
    with as_student(model):
        engine = bench.engine(SAMPLED, arguments.tokens + 8, graphs=True)
        for rows in arguments.rows:
            bench.token(engine, rows, keys, arguments.tokens, "token")
            measured.token_ms[rows] = bench.records[-1]["ms_a_token"]
    destroy()
    return measured


class Theirs:
    """transformers' model with a peft adapter, AdamW and TRL's loss."""

    def __init__(self, shape: Shape, targets: str, arguments: argparse.Namespace) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        self.device, self.shape, self.arguments = resolve_device(arguments.device), shape, arguments
        config = Qwen3MoeConfig(
            num_hidden_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.num_experts_per_tok,
            moe_intermediate_size=shape.moe_intermediate_size,
            intermediate_size=shape.moe_intermediate_size,
            vocab_size=shape.vocab_size,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            max_position_embeddings=32768,
        )
        dtype = getattr(torch, arguments.dtype)
        with self.device:
            model = Qwen3MoeForCausalLM._from_config(
                config, experts_implementation="grouped_mm", dtype=dtype
            )
        generator = torch.Generator(self.device).manual_seed(SEED)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=WEIGHT_STD, generator=generator)
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapter = LoraConfig(
            r=LORA_RANK,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=list(ATTENTION),
            target_parameters=experts if targets == "all" else None,
        )
        self.model: Any = get_peft_model(model, adapter)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE, weight_decay=0.0)

    def now(self) -> float:
        """Seconds, with the device waited for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def steps(self) -> Measured:
        """Seconds of the steps, and their peak."""
        from trl.experimental.gkd import GKDTrainer

        model, arguments = self.model, self.arguments
        if arguments.recompute:
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model.train()
        generator, taken = torch.Generator().manual_seed(SEED), []
        keep = arguments.response + 1
        reset_peak(self.device)
        for _ in range(arguments.steps):
            views = torch.randint(
                self.shape.vocab_size,
                (2, arguments.batch, arguments.length),
                generator=generator,
            ).to(self.device)
            views[1, :, -arguments.response :] = views[0, :, -arguments.response :]
            times = [self.now()]
            with torch.no_grad(), model.disable_adapter():
                teacher = model(input_ids=views[1], logits_to_keep=keep).logits[:, :-1]
            times.append(self.now())
            student = model(input_ids=views[0], logits_to_keep=keep).logits[:, :-1]
            loss = GKDTrainer.generalized_jsd_loss(
                student, teacher, beta=BETA, temperature=TEMPERATURE
            )
            loss.backward()
            times.append(self.now())
            torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            times.append(self.now())
            del student, teacher, loss
            first, second, third = (end - start for start, end in zip(times, times[1:]))
            taken.append((first, second, third))
        if arguments.recompute:
            model.gradient_checkpointing_disable()
        return medians(taken, peak_gib(self.device)[0])

    def token_ms(self, rows: int) -> float:
        """Milliseconds a token of `generate`."""
        generator = torch.Generator().manual_seed(rows)
        size = (rows, self.arguments.prompt)
        ids = torch.randint(self.shape.vocab_size, size, generator=generator).to(self.device)
        sampling = dict(
            do_sample=True,
            top_p=SAMPLED.top_p,
            top_k=SAMPLED.top_k,
            repetition_penalty=SAMPLED.repetition_penalty,
        )
        seconds = {}
        self.model.eval()
        for tokens in (2, 2, 2 + self.arguments.tokens):  # the first warms up
            start = self.now()
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
                **sampling,
            )
            seconds[tokens] = self.now() - start
        return 1e3 * (seconds[2 + self.arguments.tokens] - seconds[2]) / self.arguments.tokens


def measure_theirs(shape: Shape, targets: str, arguments: argparse.Namespace) -> Measured:
    """What they measured, as far as they came; `failure` says what ended it."""
    measured = Measured()
    try:
        theirs = Theirs(shape, targets, arguments)
        measured = theirs.steps()
        measured.token_ms = {}
        for rows in arguments.rows:
            measured.token_ms[rows] = theirs.token_ms(rows)
    except torch.OutOfMemoryError:
        measured.failure = "does not fit in memory"
    except ModuleNotFoundError as error:
        measured.failure = f"not installed: {error.name}"
    except Exception as error:  # another library's: a line of the page
        measured.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return measured


def rows_of(targets: str, ours: Measured, theirs: Measured, rows: Sequence[int]) -> list[list[str]]:
    """The table's lines for one choice of linears; ratio: theirs / ours."""
    found = []
    names = {"step": "step, s", "teacher": "teacher, s", "student": "student, s"}
    names |= {"optimizer": "optimizer, s", "peak_gib": "peak of a step, GiB"}
    for name, words in names.items():
        one, other = getattr(ours, name), getattr(theirs, name)
        found.append([targets, words, number(one, 3), number(other, 3), ratio(other, one, 2)])
    for of in rows:
        one, other = ((side.token_ms or {}).get(of, math.nan) for side in (ours, theirs))
        words = f"a token of {of} rows, ms"
        found.append([targets, words, number(one, 2), number(other, 2), ratio(other, one, 1)])
    return found


def measure(arguments: argparse.Namespace) -> str:
    """The page's table, and what failed."""
    shape, device = shape_of(arguments), resolve_device(arguments.device)
    lines, failures = [], []
    for targets in arguments.targets.split(","):
        sides = []
        for name, side in ((OURS, measure_ours), (THEIRS, measure_theirs)):
            try:
                sides.append(side(shape, targets, arguments))
            except torch.OutOfMemoryError:
                destroy()
                sides.append(Measured(failure="does not fit in memory"))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if sides[-1].failure:
                failures.append(f"{name}, {targets}: {sides[-1].failure}")
            if arguments.records:
                where = {"device": machine(device.type), "torch": torch.__version__}
                record = {"side": name, "targets": targets, **asdict(sides[-1]), **where}
                record |= {"commit": commit(), "settings": vars(arguments)}
                with open(arguments.records, "a") as file:
                    file.write(json.dumps(record) + "\n")
        lines += rows_of(targets, sides[0], sides[1], arguments.rows)
        print(*lines[-5 - len(arguments.rows) :], sep="\n", flush=True)
    page = table(["LoRA on", "what", OURS, THEIRS, "ratio"], lines)
    return page + "".join(f"\n- {failure}\n" for failure in failures)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_sizes(add, Shape(num_layers=8))
    add("--targets", default="attention,all", help="the linears that carry LoRA, in turn")
    add("--batch", type=int, default=4, help="rows of a step")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--response", type=int, default=512, help="those at a row's end that are trained")
    add("--steps", type=int, default=3)
    add("--recompute", action=argparse.BooleanOptionalAction, default=True)
    add("--rows", default="4,32", help="batch sizes of the rollouts")
    add("--prompt", type=int, default=256, help="tokens before a rollout")
    add("--tokens", type=int, default=24, help="new tokens of a row that are timed")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--output", metavar="FILE", help="a page for the table")
    add("--records", metavar="FILE", help="to which JSON objects are appended, one a line")
    arguments = parser.parse_args(argv)
    for targets in arguments.targets.split(","):
        if targets not in TARGETS:
            parser.error(f"--targets {targets}: {' or '.join(TARGETS)}")
    arguments.rows = [int(rows) for rows in arguments.rows.split(",")]
    warnings.simplefilter("ignore")
    import peft
    import transformers

    text = measure(arguments)
    versions = f"transformers {transformers.__version__}, peft {peft.__version__}"
    where = f"{machine(resolve_device(arguments.device).type)}; torch {torch.__version__}"
    command = " ".join(["python -m benchmarks.peers", *argv])
    page = f"`{command}`\n\n{where}, {versions}; commit {commit()}.\n\n{text}"
    print(f"\n{page}", end="", flush=True)
    if arguments.output:
        Path(arguments.output).write_text(f"# Against transformers + peft + TRL\n\n{page}")


if __name__ == "__main__":
    main(sys.argv[1:])
