"""Every tensor-parallel rank encodes all media, or its share and an all-gather joins them; prints
Markdown.

    python -m benchmarks.towers [--tp 2 4] [--rounds 3] [--small]
                                [--output docs/benchmarks/towers.md]

gloo ranks of one thread each, random weights, towers with the shapes in `towers` below, fp32. Both
ways run in turn on the same batch, after one round that is not counted; a round takes as long as
its slowest rank; the table shows medians over the rounds. --small uses sizes that finish in
seconds, to check that everything runs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoderConfig,
    Qwen3OmniMoeVisionEncoderConfig,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeVisionEncoder,
)

from benchmarks.report import commit, machine, table
from megatron_gkd.data import Batch, Packing, Sample, View, collate
from megatron_gkd.data.sample import MediumPositions
from megatron_gkd.media.medium import Medium
from megatron_gkd.media.towers import Towers

HIDDEN, PATCH = 512, 3 * 2 * 16 * 16
CASES: dict[str, list] = {  # audio: frames of 10 ms; visual: patches in time, height and width
    "1 image of 256 tokens": [(1, 32, 32)],
    "2 images of 256 tokens": [(1, 32, 32)] * 2,
    "8 images of 16 to 256 tokens": [(1, size, 8) for size in (8, 16, 24, 32, 48, 64, 96, 128)],
    "1 video of 8 frames, 64 tokens each": [(8, 16, 16)],
    "1 audio of 5 s": [500],
    "1 audio of 60 s": [6000],
    "8 audios of 2 to 9 s": [100 * seconds for seconds in range(2, 10)],
    "4 audios of 5 s and 4 images of 64 tokens": [500] * 4 + [(1, 16, 16)] * 4,
}
SMALL: dict[str, list] = {"2 audios and 1 image": [150, 90, (1, 4, 4)], "1 audio": [40]}


def towers(place: Any, shares: bool, small: bool) -> Towers:
    """Towers with random weights, the same on every rank. place: the rank's group, whose ranks read
    the same rows, and its device.
    """
    torch.manual_seed(0)
    width, depth = (32, 2) if small else (384, 6)
    audio = Qwen3OmniMoeAudioEncoderConfig(
        d_model=width,
        encoder_layers=depth,
        encoder_attention_heads=width // 16,
        encoder_ffn_dim=4 * width,
        output_dim=HIDDEN,
        downsample_hidden_size=width // 4,
        n_window=50,
        n_window_infer=800,
    )
    vision = Qwen3OmniMoeVisionEncoderConfig(
        depth=depth,
        hidden_size=width,
        intermediate_size=4 * width,
        num_heads=width // 16,
        out_hidden_size=HIDDEN,
        deepstack_visual_indexes=list(range(min(3, depth))),
    )
    encoders = (
        Qwen3OmniMoeAudioEncoder._from_config(audio),
        Qwen3OmniMoeVisionEncoder._from_config(vision),
    )
    return Towers(place, *encoders, shares=shares)


def batch_of(sizes: list) -> Batch:
    """A batch of one row that shows media of these sizes, all of them noise."""
    media, places, length = [], [], 0
    for size in sorted(sizes, key=lambda size: isinstance(size, tuple)):
        if isinstance(size, tuple):
            patches = torch.randn(size[0] * size[1] * size[2], PATCH)
            media.append(Medium("image", patches, size, len(patches) // 4))
        else:
            media.append(
                Medium(
                    "audio", torch.randn(128, size), None, size // 100 * 13 + -(-(size % 100) // 8)
                )
            )
        places.append(
            MediumPositions(len(media) - 1, list(range(length, length + media[-1].num_tokens)))
        )
        length += media[-1].num_tokens
    view = View([0] * (length + 1), [-100] * length + [0], length, None, tuple(places))
    return collate([Sample(view, view, "", 0, 0, tuple(media))], Packing(0))


def seconds_of(encoder: Towers, batch: Batch) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    with torch.no_grad():
        encoder.encode(batch.media)
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def run_rank(rank: int, tp_size: int, store: str, rounds: int, small: bool, results: Any) -> None:
    """One gloo rank. results: {(TP size, case): {way: seconds}}, which rank 0 fills."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, tp_size), rank=rank, world_size=tp_size
    )
    groups, device = SimpleNamespace(tp_cp=dist.group.WORLD), torch.device("cpu")
    place = SimpleNamespace(groups=groups, device=device)
    ways = {name: towers(place, name == "share", small) for name in ("all", "share")}
    for case, sizes in (SMALL if small else CASES).items():
        batch = batch_of(sizes)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, encoder in ways.items():
                seconds = seconds_of(encoder, batch)
                if number:
                    taken[name].append(seconds)
        if rank == 0:
            results[tp_size, case] = {
                name: statistics.median(of_way) for name, of_way in taken.items()
            }
    dist.destroy_process_group()


def main(arguments: argparse.Namespace) -> None:
    """Measure, print and write the table."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        for tp_size in arguments.tp:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(
                    run_rank,
                    (
                        tp_size,
                        str(Path(folder) / "store"),
                        arguments.rounds,
                        arguments.small,
                        results,
                    ),
                    nprocs=tp_size,
                )
        rows = [
            [
                f"{tp_size}",
                case,
                f"{ways['all']:.3f}",
                f"{ways['share']:.3f}",
                f"{ways['all'] / ways['share']:.2f}",
            ]
            for (tp_size, case), ways in results.items()
        ]
    command = " ".join(["python -m benchmarks.towers", *sys.argv[1:]])
    text = (
        f"# Who encodes which media at TP > 1, measured\n\nCommit {commit()}; {machine('cpu')}; "
        f"torch {torch.__version__}; `{command}`. How: the head of `benchmarks/towers.py`.\n\n"
    ) + table(
        ["TP", "media of a batch", "all on each rank, s", "a share each, s", "times faster"], rows
    )
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", help="a file for the Markdown, besides standard output")
    main(parser.parse_args())
