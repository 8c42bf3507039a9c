"""What a token of a rollout costs at the sizes of Qwen3-Omni-30B-A3B's thinker: random weights,
LoRA on every linear, sampling with penalty, top-k and top-p.

    python -m benchmarks.rollout_real [--rows 8,16,32,64] [--keys 768] [--tokens 64] [--lora 1]
                                      [--whole 32] [--equal 8] [--profile FILE] [--records FILE]

Milliseconds a token are means over the last `--tokens` tokens before a row has `--keys` keys, as
one CUDA graph and launch by launch; on CPU only the latter. `--whole ROWS`: a rollout of 512 tokens
from prompts of 256, prefill included. `--equal ROWS`: greedy texts of 128 tokens with the graph and
without it. `--profile FILE`: the profiler's table of one token of the first number of rows. Sizes
that take seconds:

    python -m benchmarks.rollout_real --device cpu --layers 2 --experts 8 --hidden 64 --inter 32 \
        --heads 4 --head_dim 16 --vocab 1000 --rows 2,4 --keys 32 --tokens 8 --whole 2 --equal 2
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from benchmarks.real_decoder import Shape, add_sizes, random_decoder, shape_of
from benchmarks.report import commit, machine, table
from benchmarks.training_step import peak_gib, reset_peak
from megatron_gkd.lora import as_student, as_teacher
from megatron_gkd.model.args import ModelArgs
from megatron_gkd.parallel import Parallel, destroy
from megatron_gkd.rollout.engine import Engine, GenerationSettings
from megatron_gkd.rollout.generate import generate
from megatron_gkd.rollout.row_batch import RowBatch
from megatron_gkd.rollout.sampling import Sampling

SAMPLED = Sampling(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


COLUMNS = ("what", "rows", "keys", "ms_a_token", "tokens_a_second", "prefill_s", "peak_gib")


class RolloutBench:
    """One decoder, and engines around it. Every measurement is given to `record`."""

    def __init__(
        self,
        parallel: Parallel,
        model_args: ModelArgs,
        model: GPTModel,
        shape: Shape,
        record: Callable[..., None],
    ):
        self.parallel, self.model_args, self.model = parallel, model_args, model
        self.shape, self.record = shape, record
        self.records: list[dict[str, Any]] = []

    def engine(self, sampling: Sampling, max_new_tokens: int, *, graphs: bool) -> Engine:
        settings = GenerationSettings(
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop_token_ids=(),
            pad_token_id=0,
            prefill_tokens=8192,
            cuda_graphs=graphs,
        )
        return Engine(self.model, self.model_args, self.parallel, settings)

    def prompts(self, num_rows: int, length: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(num_rows)
        lengths = [max(1, length - length // 16 * (row % 4)) for row in range(num_rows)]
        return [
            torch.randint(self.shape.vocab_size, (size,), generator=generator).tolist()
            for size in lengths
        ]

    def wait(self) -> float:
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def note(self, **record: Any) -> None:
        self.records.append(record)
        self.record(**record)

    def table_of(self, batch_sizes: Sequence[int], keys: int, num_tokens: int) -> str:
        """Markdown: the student's milliseconds a token at these batch sizes."""
        with as_student(self.model):
            engine = self.engine(SAMPLED, num_tokens + 8, graphs=True)
            for num_rows in batch_sizes:
                self.token(engine, num_rows, keys, num_tokens, "token")
        return self.table()

    def table(self) -> str:
        """Markdown: all measurements of a token so far."""
        tokens = [record for record in self.records if record["what"].startswith("token")]
        return table(COLUMNS, [[str(record[name]) for name in COLUMNS] for record in tokens])

    @torch.no_grad()
    def token(
        self, engine: Engine, num_rows: int, keys: int, num_tokens: int, what: str
    ) -> RowBatch:
        """Milliseconds a token, the last `num_tokens` before `keys`."""
        warm = 4  # the first token compiles, the second captures
        prompts = self.prompts(num_rows, keys - num_tokens - warm)
        reset_peak(self.parallel.device)
        started = self.wait()
        batch = RowBatch(engine, prompts, None, 1, num_rows, 0, list(range(num_rows)))
        prefilled = self.wait()
        batch.reserve(num_tokens + warm)
        for number in range(warm):
            batch.write_token(number)
        warmed = self.wait()
        for number in range(warm, warm + num_tokens):
            batch.write_token(number)
        seconds = (self.wait() - warmed) / num_tokens
        allocated, reserved = peak_gib(self.parallel.device)
        self.note(
            what=what,
            rows=num_rows,
            places=batch.size,
            keys=keys,
            ms_a_token=round(seconds * 1e3, 3),
            tokens_a_second=round(num_rows / seconds),
            prefill_s=round(prefilled - started, 3),
            warm_s=round(warmed - prefilled, 3),
            peak_gib=round(allocated, 2),
            reserved_gib=None if reserved is None else round(reserved, 2),
        )
        return batch

    @torch.no_grad()
    def profile(self, batch: RowBatch, num_written: int, path: str) -> None:
        """Of one token: kernels, their time, the table."""
        cuda = self.parallel.device.type == "cuda"
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as profiler:
            batch.write_token(num_written)
            self.wait()
        events: Any = profiler.key_averages()
        if cuda:
            kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
            self.note(
                what="profiled token",
                rows=batch.size,
                kernels=sum(kernel.count for kernel in kernels),
                device_ms=round(sum(k.self_device_time_total for k in kernels) / 1e3, 3),
            )
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        Path(path).write_text(events.table(sort_by=order, row_limit=45, max_name_column_width=72))

    def whole(self, num_rows: int, keys: int) -> None:
        """A rollout of 512 tokens with prompts of 256: the first of a run, and the second."""
        engine = self.engine(SAMPLED, min(512, 2 * keys), graphs=True)
        prompts = self.prompts(num_rows, min(256, keys))
        for which in ("first", "second"):
            reset_peak(self.parallel.device)
            started = self.wait()
            responses = generate(engine, prompts, seed=1, row_ids=range(num_rows))
            seconds = self.wait() - started
            self.note(
                what=f"whole rollout, the {which}",
                rows=num_rows,
                new_tokens=len(responses[0].token_ids),
                seconds=round(seconds, 2),
                peak_gib=round(peak_gib(self.parallel.device)[0], 2),
                different=len({token for r in responses for token in r.token_ids}),
            )

    @torch.no_grad()
    def equal(self, num_rows: int) -> None:
        """Greedy texts of 128 tokens with the graph and without it, from the same prompts' keys:
        two forwards of a prompt may differ in their last bits on a GPU.
        """
        prompts, batches = self.prompts(num_rows, 64), []
        for graphs in (True, False):
            engine = self.engine(GREEDY, 128, graphs=graphs)
            batches.append(RowBatch(engine, prompts, None, 1, num_rows, 0, list(range(num_rows))))
        graphed, eager = batches
        eager.cache.prompt.copy_(graphed.cache.prompt)
        eager.rows.tokens.copy_(graphed.rows.tokens)
        same, different = num_rows, 0
        for number in range(127):
            for batch in batches:
                batch.reserve(128)
                batch.write_token(number)
            tokens = [batch.rows.tokens[:num_rows].tolist() for batch in batches]
            same += sum(a == b for a, b in zip(*tokens))
            different = max(different, len(set(tokens[0])))
        self.note(
            what="graph against eager, greedy",
            equal_tokens=same,
            of=num_rows * 128,
            different_in_a_step=different,
        )
        if same < num_rows * 128:
            sys.exit("the graph and the eager launches wrote different texts")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_sizes(add)
    add("--rows", default="32,8,16,64", help="batch sizes")
    add("--keys", type=int, default=768)
    add("--tokens", type=int, default=64)
    add("--lora", type=int, default=1, choices=(0, 1), help="0: the teacher, without LoRA")
    add("--eager", default="", help="batch sizes to write without a graph, too")
    add("--whole", type=int, default=0, metavar="ROWS")
    add("--equal", type=int, default=0, metavar="ROWS")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--profile", metavar="FILE")
    add("--records", metavar="FILE")
    arguments = parser.parse_args(argv)
    shape = shape_of(arguments)
    started = time.perf_counter()
    parallel, model_args, model = random_decoder(shape, device=arguments.device)
    where = {"device": machine(parallel.device.type), "torch": torch.__version__}
    where["commit"] = commit()

    def record(**values: Any) -> None:
        print(json.dumps(values), flush=True)
        if arguments.records:
            with open(arguments.records, "a") as file:
                file.write(json.dumps({**values, **where, "shape": asdict(shape)}) + "\n")

    bench = RolloutBench(parallel, model_args, model, shape, record)
    bench.note(what="built", seconds=round(bench.wait() - started, 1))
    with (as_student if arguments.lora else as_teacher)(bench.model):
        graphed = bench.engine(SAMPLED, arguments.tokens + 8, graphs=True)
        for number, num_rows in enumerate(map(int, arguments.rows.split(","))):
            batch = bench.token(graphed, num_rows, arguments.keys, arguments.tokens, "token")
            if arguments.profile and number == 0:
                bench.profile(batch, arguments.tokens + 4, arguments.profile)
            del batch
        eager = [int(rows) for rows in arguments.eager.split(",") if rows]
        if eager:
            launched = bench.engine(SAMPLED, 24, graphs=False)
            for num_rows in eager:
                bench.token(launched, num_rows, arguments.keys, 16, "token, without a graph")
            del launched
        if arguments.equal:
            bench.equal(arguments.equal)
        if arguments.whole:
            bench.whole(arguments.whole, arguments.keys)
    print(bench.table())
    destroy()


if __name__ == "__main__":
    main(sys.argv[1:])
