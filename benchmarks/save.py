"""Seconds of a checkpoint, and what its busiest rank reads and writes, on 1, 2 and 4 gloo ranks:

    python -m benchmarks.save [--output_dir DIR] [--lora_rank 64] [--rounds 5]

A decoder of random weights with LoRA on all linears, as many data-parallel ranks as processes, the
experts whole on each (--experts_cut: an equal part on each). A save lasts from a barrier to the
return of the last rank, when all is on the disk. Bytes are those of read and write calls
(/proc/self/io), whether or not the disk had to move for them.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from megatron_gkd import startup

if __name__ == "__main__":  # before the imports below, which would warn of absent packages
    startup.prepare_imports()

import torch
import torch.multiprocessing

from benchmarks.real_decoder import Shape, add_sizes, random_decoder, shape_of
from benchmarks.report import table
from megatron_gkd.checkpoint import save_checkpoint
from megatron_gkd.gradients import in_gradient_reducer
from megatron_gkd.lora.apply import num_adapter_parameters
from megatron_gkd.lora_targets import LINEARS
from megatron_gkd.optimizer import Optimizer

SHAPE = Shape(6, 64, 8, 512, 256, 8, 4, 64, 4096)


def counted_bytes() -> tuple[int, int]:
    """That this process has asked to read and to write since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    numbers = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return numbers["rchar"], numbers["wchar"]


def saving_rank(rank: int, world_size: int, folder: str, arguments: argparse.Namespace) -> None:
    """One rank: builds, saves `rounds` + 1 times, leaves its numbers of each save in a file."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    parallel, model_args, model = random_decoder(
        shape_of(arguments),
        device="cpu",
        lora_rank=arguments.lora_rank,
        expert_model_parallel_size=world_size if arguments.experts_cut else 1,
    )
    optimizer = Optimizer(
        in_gradient_reducer(model),
        parallel,
        dtype=torch.bfloat16,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    for moments in optimizer.moments().values():
        for values in moments.values():
            values.normal_()
    samples = []
    for step in range(arguments.rounds + 1):
        torch.distributed.barrier()
        start, before = time.perf_counter(), counted_bytes()
        saved = save_checkpoint(
            Path(folder),
            step,
            model=model,
            model_args=model_args,
            parallel=parallel,
            alpha=16.0,
            dropout=0.0,
            base_model="random",
            optimizer=optimizer,
            state={},
        )
        torch.distributed.barrier()
        seconds, after = time.perf_counter() - start, counted_bytes()
        samples.append([seconds, *(b - a for a, b in zip(before, after))])
        size = sum(path.stat().st_size for path in saved.iterdir())
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(saved)
    parameters = num_adapter_parameters(model_args, arguments.lora_rank, list(LINEARS))
    answer = dict(samples=samples[1:], size=size, parameters=parameters)
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", help="on the disk to be measured; default: TMPDIR")
    parser.add_argument("--lora_rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--experts_cut", action="store_true")
    add_sizes(parser.add_argument, SHAPE)
    arguments = parser.parse_args()
    rows = []
    for world_size in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.output_dir) as folder:
            torch.multiprocessing.spawn(
                saving_rank, (world_size, folder, arguments), nprocs=world_size
            )
            answers = [
                json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)
            ]
        of_ranks = [[statistics.median(of) for of in zip(*a["samples"])] for a in answers]
        seconds, read, written = (max(column) for column in zip(*of_ranks))
        size = answers[0]["size"]
        rows.append(
            [
                f"{world_size}",
                f"{answers[0]['parameters'] / 1e6:.1f} M",
                f"{size / 1e6:.0f}",
                f"{seconds:.2f}",
                f"{size / seconds / 1e6:.0f}",
                f"{read / 1e6:.0f}",
                f"{written / 1e6:.0f}",
            ]
        )
    columns = "ranks,LoRA,MB of the checkpoint,s,MB/s,MB read by a rank,MB written by a rank"
    print(table(columns.split(","), rows))


if __name__ == "__main__":
    main()
