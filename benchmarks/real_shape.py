r"""Training steps and rollouts of a whole decoder at the sizes of Qwen3-Omni-30B-A3B's thinker,
with random weights that are made on the device: no model folder.

    python -m benchmarks.real_shape [--layers 48] [--recompute] [--targets all|attention]
                                    [--batch 4] [--length 2048] [--response 512] [--steps 3]
                                    [--tp 1] [--ep 1] [--device auto] [--rollout ROWS]
                                    [--equal] [--deterministic] [--profile FILE]
                                    [--output FILE] [--records FILE]

A step is that of `megatron_gkd.train` on one micro-batch of random ids. Both views have `--length`
tokens; they end with the same response and differ before it. The first step also warms up: the
table's last row has the medians of the others. One more step is counted: kernel launches and
synchronisations by torch's profiler on CUDA, ATen calls and values that the host reads by a
dispatch mode on CPU. `--rollout ROWS`: the student then writes to so many rows, as
benchmarks/rollout_real.py measures it. `--equal`: the same backward pass twice; how many gradient
entries differ. What does not fit in memory is a line of the result.

Memory is the most during a step, the model included: of CUDA's allocator, or the resident size on
CPU. Under torchrun --batch is the rows of each data-parallel rank, and seconds and memory are
those of rank 0. Sizes that take seconds, to check that everything runs:

    python -m benchmarks.real_shape --device cpu --layers 2 --experts 8 --hidden 64 --inter 32 \
        --heads 4 --vocab 1000 --batch 2 --length 32 --response 8 --rollout 2 --tokens 8
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch

from benchmarks.real_decoder import (
    LORA_RANK,
    Shape,
    add_sizes,
    random_batch,
    random_decoder,
    shape_of,
)
from benchmarks.report import commit, machine, table
from benchmarks.rollout_real import RolloutBench
from benchmarks.step_costs import (
    FORMULA,
    count_on_cpu,
    count_on_cuda,
    different_gradients,
    memory_kinds,
    step_flops,
    utilisation,
)
from benchmarks.training_step import StepResult, Training, peak_gib, reset_peak
from megatron_gkd.flags import exit_with
from megatron_gkd.lora.apply import count_parameters
from megatron_gkd.lora_targets import ATTENTION, LINEARS
from megatron_gkd.parallel import destroy, resolve_device, use_deterministic_kernels

TARGETS = {"all": LINEARS, "attention": ATTENTION}
LAYOUT = {"tensor_model": "tp", "expert_model": "ep", "context": "cp"}


def as_text(values: dict[str, Any]) -> str:
    """One line: "build seconds 12.5, ..."; what is not known is left out."""
    known = {name: value for name, value in values.items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in known.items())


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


class Page:
    """What is measured, as Markdown and as records, one JSON object a line; on rank 0."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.text = arguments, ""
        self.is_rank_0 = os.environ.get("RANK", "0") == "0"
        device_name = machine(resolve_device(arguments.device).type)
        self.where = {"device": device_name, "torch": torch.__version__, "commit": commit()}

    def say(self, text: str) -> None:
        """A paragraph, printed at once."""
        if self.is_rank_0:
            print(text, end="\n\n", flush=True)
            self.text += f"{text}\n\n"
            if self.arguments.output:  # at once: what comes next may not fit
                page = f"# Whole steps at real sizes\n\n{self.text.rstrip()}\n"
                Path(self.arguments.output).write_text(page)

    def record(self, **values: Any) -> None:
        """Append to --records, if given, with the settings and where they ran."""
        if self.arguments.records and self.is_rank_0:
            with open(self.arguments.records, "a") as file:
                settings = {"settings": vars(self.arguments)}
                file.write(json.dumps({**values, **self.where, **settings}) + "\n")


def measure(arguments: argparse.Namespace, page: Page) -> int:
    """Build the decoder, take the steps and say what they took. Returns the exit status."""
    started, targets, shape = time.perf_counter(), TARGETS[arguments.targets], shape_of(arguments)
    if arguments.deterministic:
        use_deterministic_kernels()
    names = ("device", "recompute", *(f"{name}_parallel_size" for name in LAYOUT))
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    parallel, model_args, model = random_decoder(shape, targets=targets, **settings)
    training = Training(parallel, model_args, model)
    reset_peak(parallel.device)
    trainable, total = count_parameters(model_args, LORA_RANK, list(targets))
    seconds, (size, _) = time.perf_counter() - started, peak_gib(parallel.device)
    built = {"build_seconds": seconds, "model_gib": size}  # with LoRA and its gradients
    page.record(what="built", **built, trainable_parameters=trainable, parameters=total)
    page.say(f"{trainable:,} of {total:,} parameters are LoRA's; {as_text(built)}")
    sizes = dict(num_rows=arguments.batch, length=arguments.length, response=arguments.response)
    results = []
    for step in range(1, arguments.steps + 1):
        batch = random_batch(shape.vocab_size, parallel, **sizes, seed=step)
        results.append(training.step([batch], step))
        page.record(what="step", step=step, **asdict(results[-1]))
    page.say(result_table(results).rstrip())
    kinds = asdict(memory_kinds(training, results[-1].peak_allocated_gib, size))
    page.record(what="memory", **kinds)
    page.say(f"Memory: {as_text(kinds)}")
    say_flops(page, training, shape, results[1:] or results, step_flops(shape, [batch], targets))
    batch = random_batch(shape.vocab_size, parallel, **sizes, seed=0)
    if parallel.device.type == "cuda":
        found, tables = count_on_cuda(training, batch, 0, tables=bool(arguments.profile))
        if arguments.profile and parallel.rank == 0:
            Path(arguments.profile).write_text(f"{as_text(found)}\n{tables}")
    else:
        found = count_on_cpu(training, batch, 0)
    page.record(what="counts", **found)
    page.say(f"One step: {as_text(found)}")
    status = 0
    if arguments.equal:
        different, entries = different_gradients(training, batch, 0)
        page.record(what="equal backward passes", different=different, of=entries)
        page.say(f"Two equal backward passes: {different:,} of {entries:,} gradient entries differ")
        status = int(arguments.deterministic and different > 0)
    if arguments.rollout:
        model.zero_grad()
        bench = RolloutBench(parallel, model_args, model, shape, page.record)
        page.say(bench.table_of([arguments.rollout], arguments.keys, arguments.tokens).rstrip())
    destroy()
    return status


def say_flops(
    page: Page, training: Training, shape: Shape, results: Sequence[StepResult], flops: float
) -> None:
    """FLOP/s of the median step on a rank, and their share of the device's rate."""
    parallel = training.parallel
    seconds = statistics.median(result.step_seconds for result in results)
    ranks = parallel.world_size // parallel.dp_size  # that share a data-parallel rank's step
    rate = flops / ranks / seconds
    share = utilisation(rate, page.where["device"])
    found = {"model_tflop": flops / 1e12, "tflop_per_second_a_rank": rate / 1e12}
    page.record(what="model FLOPs", **found, utilisation=share)
    words = "" if share is None else f": {100 * share:.1f} % utilisation"
    page.say(f"{as_text(found)}{words}\n\n{FORMULA}")


def main(argv: Sequence[str]) -> None:
    """Exit status 1: passes with --deterministic differ, or one of several ranks has no memory
    left; 2: the flags do not fit together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_sizes(add)
    add("--targets", default="all", choices=TARGETS, help="the linears that carry LoRA")
    add("--recompute", action="store_true", help="run each layer again in backward")
    add("--batch", type=int, default=4, help="rows")
    add("--length", type=int, default=2048, help="tokens of a row")
    add("--response", type=int, default=512, help="those at a row's end that are trained")
    add("--steps", type=int, default=3)
    add("--rollout", type=int, default=0, metavar="ROWS", help="to which the student writes")
    add("--keys", type=int, default=768, help="of a row at the rollout's end")
    add("--tokens", type=int, default=64, help="of a row that are timed")
    add("--equal", action="store_true", help="compare two equal backward passes")
    add("--deterministic", action="store_true", help="with the kernels of --deterministic true")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name, short in LAYOUT.items():
        add(f"--{name}_parallel_size", f"--{short}", type=int, default=1)
    add("--profile", metavar="FILE", help="for the tables of torch's profiler, on CUDA")
    add("--output", metavar="FILE", help="a page for what is printed")
    add("--records", metavar="FILE", help="to which JSON objects are appended, one a line")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.response < arguments.length:
        parser.error(f"--response {arguments.response}: 1 to --length {arguments.length} - 1")
    if (most := arguments.num_experts) < arguments.num_experts_per_tok:
        parser.error(f"--experts_per_token {arguments.num_experts_per_tok}: 1 to --experts {most}")
    if arguments.rollout and arguments.keys <= arguments.tokens + 4:
        parser.error(f"--keys {arguments.keys}: more than --tokens {arguments.tokens} + 4")
    try:
        page = Page(arguments)
        command = " ".join(["python -m benchmarks.real_shape", *argv])
        page.say(f"`{command}`\n\n{', '.join(page.where.values())}")
        status = measure(arguments, page)
    except torch.OutOfMemoryError as error:
        failure = f"does not fit in memory: {str(error).splitlines()[0]}"
        page.record(what="failure", failure=failure)
        page.say(f"It {failure}")
        status = int(os.environ.get("WORLD_SIZE", "1") != "1")  # the other ranks wait for this one
    except ValueError as error:
        exit_with(error)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
