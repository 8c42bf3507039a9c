"""The planner's seconds against those of whole steps, on this machine's CPU.

    python -m benchmarks.plan [--output docs/benchmarks/plan.md] [--seconds 40] [--steps 12]

First the rates of the machine (benchmarks/rates.py), of one rank and of two at once; beside the
page they are kept as JSON. Then steps of two decoders at seven layouts, two ranks of one thread
each: of a small decoder, where launches count, and of a larger one. What is predicted is not
measured before: rates are those of single products, kernels, messages, and of layers without work.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
import torch.distributed as dist

from benchmarks.rates import measure_on_cpu, quartile, wait_for
from benchmarks.real_decoder import LORA_RANK, Shape, random_batch, random_decoder
from benchmarks.report import commit, machine, table
from benchmarks.rollout_real import SAMPLED, RolloutBench
from benchmarks.training_step import Training
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.lora import as_student
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.parallel import destroy
from megatron_gkd.plan.rates import Rates, rates_of
from megatron_gkd.plan.step_time import StepTime, step_time
from megatron_gkd.plan.workload import Workload
from megatron_gkd.rollout.generate import generate

LIMIT = 0.25  # by which a prediction may be off
SMALL = Shape(
    num_layers=4,
    num_experts=8,
    num_experts_per_tok=2,
    hidden_size=128,
    moe_intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1024,
)
LARGER = Shape(
    num_layers=4,
    num_experts=16,
    num_experts_per_tok=4,
    hidden_size=512,
    moe_intermediate_size=384,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=4096,
)
LAYOUTS = {
    "1 rank": {},
    "TP 2": {"tensor_model_parallel_size": 2},
    "EP 2, DP 2": {"expert_model_parallel_size": 2},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "DP 2": {},
    "CP 2": {"context_parallel_size": 2},
    "TP 2, EP 2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}


@dataclass(frozen=True)
class Case:
    """A step of all ranks: rows of a data-parallel rank, tokens of a row, of its response."""

    decoder: str
    layout: str
    rows: int
    length: int
    response: int
    recompute: bool = False
    writes: bool = False

    @property
    def shape(self) -> Shape:
        return {"small": SMALL, "larger": LARGER}[self.decoder]

    @property
    def ranks(self) -> int:
        return 1 if self.layout == "1 rank" else 2

    @property
    def micro_batches(self) -> int:
        return 2 if "PP" in self.layout else 1

    @property
    def load(self) -> Workload:
        return Workload(
            number_bytes=4,
            lora_rank=LORA_RANK,
            targets=LINEARS,
            recompute=self.recompute,
            micro_batch_tokens=self.rows * self.length // self.micro_batches,
            batch_size=self.rows,
            accumulation=1,
            prompt_tokens=self.length - self.response,
            completion_tokens=self.response if self.writes else 0,
            prefill_tokens=8192,
            row_tokens=self.length,
            teacher_row_tokens=self.length,
            response_tokens=self.response,
            on_policy_share=float(self.writes),
        )

    def predicted(self, rates: Rates) -> StepTime:
        layout = ParallelConfig(**LAYOUTS[self.layout])
        return step_time(self.shape.model_args(), layout, self.load, self.ranks, rates)


def all_cases() -> list[Case]:
    found = []
    for layout in LAYOUTS:
        rows = 2 if "DP" in layout else 4
        found.append(Case("small", layout, rows, 32, 8))
        found.append(Case("larger", layout, rows, 256, 64, recompute=layout == "TP 2"))
    found += [Case("larger", layout, 4, 64, 32, writes=True) for layout in ("1 rank", "TP 2")]
    return found


def measure(case: Case, steps: int) -> dict[str, float]:
    """phase -> seconds, the lower quartile of so many steps; the processor's of the whole step."""
    settings: dict[str, Any] = {"recompute": case.recompute, **LAYOUTS[case.layout]}
    parallel, model_args, model = random_decoder(
        case.shape, device="cpu", dtype=torch.float32, lora_dropout=0.0, **settings
    )
    training = Training(parallel, model_args, model)
    bench = RolloutBench(parallel, model_args, model, case.shape, lambda **_: None)
    generator = torch.Generator().manual_seed(0)
    size = (case.rows, case.length - case.response)
    prompts = torch.randint(case.shape.vocab_size, size, generator=generator).tolist()
    with as_student(model):
        engine = bench.engine(SAMPLED, case.response, graphs=False) if case.writes else None
    found: list[dict[str, float]] = []
    for step in range(steps + 2):
        data = dict(num_rows=case.rows // case.micro_batches, length=case.length)
        batches = [
            random_batch(
                case.shape.vocab_size,
                parallel,
                **data,
                response=case.response,
                seed=step * case.micro_batches + number,
            )
            for number in range(case.micro_batches)
        ]
        dist.barrier()
        started, on_processor = time.perf_counter(), time.process_time()
        if engine is not None:
            with as_student(model):
                generate(engine, prompts, seed=step, row_ids=range(case.rows))
        written = time.perf_counter() - started
        result = training.step(batches, step)
        found.append(
            {
                "rollout": written,
                "teacher": result.teacher_seconds,
                "student": result.student_seconds,
                "optimizer": result.optimizer_seconds,
                "step": time.perf_counter() - started,
                "processor": time.process_time() - on_processor,
            }
        )
    return {name: quartile([one[name] for one in found[2:]]) for name in found[0]}


def _rank(rank: int, ranks: int, folder: str, cases: list[Case], steps: int) -> None:
    """A process of its own: all cases, one after the other."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(cases):
        store = dist.FileStore(os.path.join(folder, f"store{number}"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        found.append(measure(case, steps))
        dist.barrier()
        # also the threads of the groups, which would wake up beside the next case a hundred times a
        # second each
        destroy()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def run(ranks: int, cases: list[Case], steps: int) -> list[list[dict[str, float]]]:
    """Of each rank, what `measure` found of each case. Raises RuntimeError where a rank fails."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, folder, cases, steps), daemon=True)
            for rank in range(ranks)
        ]
        wait_for(processes)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def row_of(case: Case, found: dict[str, float], predicted: StepTime) -> tuple[list[str], float]:
    """The table's row, and the ratio of both steps."""
    seconds = {name: phase.seconds for name, phase in predicted.phases.items()}
    of_phase = {
        "rollout": seconds["rollout prefill"] + seconds["rollout decode"],
        "teacher": seconds["teacher"],
        "student": seconds["student"] + seconds["gradient reduction"],
        "optimizer": seconds["optimizer"],
    }
    pair = lambda name: (
        f"{1e3 * of_phase[name]:.0f} / {1e3 * found[name]:.0f}" if of_phase[name] else "-"
    )
    ratio = predicted.seconds / found["step"]
    longest = max(predicted.phases.values(), key=lambda phase: phase.seconds)
    sizes = f"{case.rows} x {case.length}{', recompute' * case.recompute}"
    return [
        case.decoder,
        case.layout,
        sizes,
        *map(pair, of_phase),
        f"{1e3 * predicted.seconds:.0f} / {1e3 * found['step']:.0f}",
        f"{ratio:.2f}",
        f"{1e3 * found['processor']:.0f}",
        longest.bottleneck,
    ], ratio


COLUMNS = (
    *("decoder", "layout", "rows a replica x tokens", "rollout", "teacher"),
    *(
        "student and reduction",
        "optimizer",
        "step",
        "ratio",
        "processor",
        "most of its longest phase",
    ),
)


TEXT = """\
# The planner's seconds against measured ones, on a CPU

`{command}`

{machine}, torch {torch}, commit {commit}, float32, LoRA of rank {rank} on
all linears, no dropout, ranks of one thread each on this machine (load average at the end: {load}).

Milliseconds, **predicted / measured**. Predicted from rates that were measured before, of single
products, kernels and messages and of layers without work ({rates}), never from a step of these
decoders. Measured: the lower quartile of the steps, on rank 0. Processor: rank 0's own
milliseconds of a measured step, without waiting for the other rank or for other programs. A rollout
prefills its prompts and writes all tokens of its responses. {within} of {number} steps are within
{limit} %; the median ratio is {median}.

{table}
Decoders: {decoders}.
"""


def page(
    argv: Sequence[str], rows: list[list[str]], ratios: list[float], rate_files: list[str]
) -> str:
    shapes = {"small": SMALL, "larger": LARGER}
    of_shape = lambda shape: ", ".join(f"{name} {size}" for name, size in asdict(shape).items())
    return TEXT.format(
        command=" ".join(["python -m benchmarks.plan", *argv]),
        machine=machine("cpu"),
        torch=torch.__version__,
        commit=commit(),
        rank=LORA_RANK,
        load=", ".join(f"{number:.1f}" for number in os.getloadavg()),
        rates=", ".join(f"[{name}]({name})" for name in rate_files),
        within=sum(abs(ratio - 1) <= LIMIT for ratio in ratios),
        number=len(ratios),
        limit=f"{100 * LIMIT:.0f}",
        median=f"{statistics.median(ratios):.2f}",
        table=table(COLUMNS, rows),
        decoders="; ".join(f"{name}: {of_shape(shape)}" for name, shape in shapes.items()),
    )


def main(argv: Sequence[str]) -> None:
    """Exit status 1 where a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FILE.md")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the rates of each number")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args(argv)
    lines: dict[Case, tuple[list[str], float]] = {}
    names = []
    cases = all_cases()
    for ranks in (1, 2):
        file = measure_on_cpu(ranks, arguments.seconds)
        name = f"plan_rates_{ranks}.json"
        if arguments.output:
            path = Path(arguments.output).parent / name
            path.write_text(json.dumps(file, indent=1) + "\n")
        names.append(name)
        rates = rates_of(file, name)
        of_ranks = [case for case in cases if case.ranks == ranks]
        for case, found in zip(of_ranks, run(ranks, of_ranks, arguments.steps)[0]):
            lines[case] = row_of(case, found, case.predicted(rates))
            print(" | ".join(lines[case][0]), flush=True)
    rows, ratios = zip(*(lines[case] for case in cases))
    text = page(argv, list(rows), list(ratios), names)
    if arguments.output:
        Path(arguments.output).write_text(text)
    print(text)
    sys.exit(int(any(abs(ratio - 1) > LIMIT for ratio in ratios)))


if __name__ == "__main__":
    main(sys.argv[1:])
