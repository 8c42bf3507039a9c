"""Both directions of conversion, and loading for training, on a folder with the 30B model's real
shapes.

    python -m benchmarks.convert --folder DIR [--layers 8] [--num_workers 2] [--output FILE]

Makes a synthetic folder in DIR (8 layers: 12.5 GB; three times that must be free), then in one run:
`cp -r` of it, hf_to_megatron, megatron_to_hf, each on files that were dropped from the page cache:
the time as a ratio to cp, the peak memory of all processes (proportional set sizes, sampled), the
bytes read and written. Then both folders are loaded at TP 2, EP 2 on two CPU ranks. Deletes what it
made. Exits 1 where a limit does not hold.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
GB = 1e9
MOST_RATIO, MOST_MEMORY, MOST_LOAD_EXTRA = 2.5, 3 * GB, 1 * GB
MOST_READ_BESIDE = 0.3 * GB  # the folder once, and what Python reads of itself
TEXT = {
    "model_type": "qwen3_omni_moe_text",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 152064,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    "rope_theta": 1e6,
}
# The other parts, a layer or two of each.
AUDIO = {"encoder_layers": 2, "num_hidden_layers": 2}
VISION = {"depth": 2, "deepstack_visual_indexes": [0, 1]}
TALKER = {
    "text_config": {"num_hidden_layers": 1, "shared_expert_intermediate_size": 768},
    "spatial_merge_size": 2,
}
TALKER["code_predictor_config"] = {"num_hidden_layers": 1}
SHARD_BYTES = 4 << 30
BLOCK_BYTES = 32 << 20


def make_folder(folder: Path, num_layers: int) -> int:
    """Random bytes as bf16 in real sizes, all parts of the model. -> bytes written."""
    from megatron_gkd.formats.frozen_weights import frozen_tensors
    from megatron_gkd.formats.weight_map import decoder_tensors
    from megatron_gkd.model.args import read_model_args

    folder.mkdir(parents=True)
    text = TEXT | {"num_hidden_layers": num_layers}
    thinker = {"text_config": text, "audio_config": AUDIO, "vision_config": VISION}
    config = {"model_type": "qwen3_omni_moe", "thinker_config": thinker, "talker_config": TALKER}
    (folder / "config.json").write_text(
        json.dumps(config | {"code2wav_config": {"num_hidden_layers": 1}})
    )
    model_args = read_model_args(folder)
    sizes = decoder_tensors(model_args) | frozen_tensors(folder, model_args)[0]
    shards: list[dict[str, Sequence[int]]] = [{}]
    num_bytes = 0
    for name, size in sizes.items():
        if num_bytes + 2 * math.prod(size) > SHARD_BYTES:
            shards, num_bytes = [*shards, {}], 0
        shards[-1][name] = size
        num_bytes += 2 * math.prod(size)
    files = {
        f"model-{n:05d}-of-{len(shards):05d}.safetensors": tensors
        for n, tensors in enumerate(shards, start=1)
    }
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(_write_shard(folder / file, tensors) for file, tensors in files.items())


def _write_shard(path: Path, tensors: dict[str, Sequence[int]]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in tensors.items():
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = os.urandom(BLOCK_BYTES)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, BLOCK_BYTES):
            shift = start // BLOCK_BYTES * 4099 % BLOCK_BYTES  # no two blocks are the same
            file.write((block[shift:] + block[:shift])[: offset - start])
    return path.stat().st_size


@dataclass
class Measured:
    seconds: float
    peak_memory: float  # of all processes together
    read: int
    written: int


def measure(command: list[str]) -> Measured:
    """Run a command to its end, one thread a process. Raises CalledProcessError with what it
    printed.
    """
    before, started = own_io(), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = Peak(process.pid)
    printed, _ = process.communicate()
    seconds = time.perf_counter() - started
    peak.stop()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed.decode())
    after = own_io()  # a child's count as ours once it has ended
    return Measured(
        seconds, peak.highest, after["rchar"] - before["rchar"], after["wchar"] - before["wchar"]
    )


def own_io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(number) for name, number in (line.split(": ") for line in lines)}


class Peak(threading.Thread):
    """The highest sum of proportional set sizes of a process and its descendants, sampled ten times
    a second.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.highest, self.running = pid, 0.0, True
        self.start()

    def run(self) -> None:
        while self.running:
            self.highest = max(self.highest, sum(map(proportional_bytes, descendants(self.pid))))
            time.sleep(0.1)

    def stop(self) -> None:
        self.running = False
        self.join()


def descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        try:
            todo += map(
                int, Path(f"/proc/{found[-1]}/task/{found[-1]}/children").read_text().split()
            )
        except OSError:
            pass  # it has ended
    return found


def proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def load_at_tp2(model: str) -> None:
    """What a rank of training does first. Rank 0 prints for each: bytes read, its shard, the
    highest memory.
    """
    import torch

    from megatron_gkd import parallel
    from megatron_gkd.formats.loading import load_weights
    from megatron_gkd.model.args import read_model_args
    from megatron_gkd.model.decoder import build_decoder

    place = parallel.initialize(
        torch.device("cpu"), tensor_model_parallel_size=2, expert_model_parallel_size=2
    )
    model_args = read_model_args(model)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = status_bytes("VmRSS"), time.perf_counter()
    decoder = build_decoder(model_args, place, torch.bfloat16)
    read = load_weights(decoder, model_args, place, model)
    seconds = time.perf_counter() - started
    shard = sum(parameter.nbytes for parameter in decoder.parameters())
    total = status_bytes("VmHWM")
    row = dict(read=read, shard=shard, peak=total - before, total=total, seconds=seconds)
    rows = [None] * place.world_size
    torch.distributed.all_gather_object(rows, row)
    if place.rank == 0:
        print("ROWS " + json.dumps(rows))


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_load(model: Path) -> list[dict]:
    drop_from_cache(model)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "benchmarks.convert", "--load", str(model)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    printed = run.stdout
    return json.loads(next(line for line in printed.splitlines() if line.startswith("ROWS "))[5:])


def run(folder: Path, num_layers: int, num_workers: int) -> tuple[str, bool]:
    """-> the tables in Markdown, whether every limit holds."""
    model, copy, megatron, back = (folder / name for name in ("model", "copy", "megatron", "back"))
    size = make_folder(model, num_layers)
    measured = {"cp -r": measure_from(model, ["cp", "-r", model, copy])}
    started = time.perf_counter()
    os.sync()
    on_disk = measured["cp -r"].seconds + time.perf_counter() - started
    measured["cp -r, until it is on the disk"] = Measured(on_disk, 0, 0, 0)
    shutil.rmtree(copy)
    tool, workers = [sys.executable, "-W", "ignore", "-m"], ["--num_workers", num_workers]
    there = [
        *tool,
        "checkpoint_tools.hf_to_megatron",
        "--hf_model",
        model,
        "--output",
        megatron,
        *workers,
    ]
    measured["hf_to_megatron"] = measure_from(model, there)
    back_again = [
        *tool,
        "checkpoint_tools.megatron_to_hf",
        "--checkpoint",
        megatron,
        "--output",
        back,
        *workers,
    ]
    measured["megatron_to_hf"] = measure_from(megatron, back_again)
    same = (
        subprocess.run(["diff", "-rq", "-x", "conversion_manifest.json", model, back]).returncode
        == 0
    )
    shutil.rmtree(back)
    loads = {"Hugging Face folder": run_load(model), "Megatron checkpoint": run_load(megatron)}
    shutil.rmtree(folder)
    return report(size, num_layers, num_workers, measured, same, loads)


def measure_from(source: Path, command: list) -> Measured:
    drop_from_cache(source)
    return measure([str(word) for word in command])


def report(
    size: int, num_layers: int, num_workers: int, measured: dict, same: bool, loads: dict
) -> tuple[str, bool]:
    cp, holds = measured["cp -r"], same
    lines = [
        f"{size / GB:.1f} GB of real shapes ({num_layers} layers), {num_workers} processes; "
        f"{platform.platform()}, "
        f"{os.cpu_count()} CPUs; the folder came back {'byte for byte' if same else 'DIFFERENT'}.",
        "",
        "| | seconds | to `cp -r` | peak memory of all processes | read | written |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in measured.items():
        ratio, is_ours = m.seconds / cp.seconds, not name.startswith("cp")
        if is_ours:
            holds &= (
                ratio <= MOST_RATIO
                and m.peak_memory <= MOST_MEMORY
                and m.read <= size + MOST_READ_BESIDE
            )
        amounts = [f"{number / GB:.2f} GB = {number / size:.3f}" for number in (m.read, m.written)]
        rest = f"{m.peak_memory / GB:.2f} GB | {amounts[0]} | {amounts[1]}" if is_ours else "| |"
        lines.append(f"| {name} | {m.seconds:.1f} | {ratio:.2f} | {rest} |")
    lines += [
        "",
        "| loaded at TP 2, EP 2 from | seconds | read | peak memory "
        "| of which loading, above the shard |",
    ]
    lines += ["|---|---|---|---|---|"]
    for name, rows in loads.items():
        for rank, row in enumerate(rows):
            extra = row["peak"] - row["shard"]
            holds &= row["read"] <= row["shard"] and row["total"] <= row["shard"] + MOST_LOAD_EXTRA
            read = f"{row['read'] / GB:.2f} GB = {row['read'] / row['shard']:.3f} of the shard"
            beside = (row["total"] - row["shard"]) / GB
            memory = f"{row['total'] / GB:.2f} GB = shard + {beside:.2f} | {extra / GB:.2f} GB"
            lines.append(f"| {name}, rank {rank} | {row['seconds']:.1f} | {read} | {memory} |")
    return "\n".join(lines), holds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to make the folders; must not exist")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the tables there too")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load_at_tp2(arguments.load)
        return
    page, holds = run(arguments.folder.absolute(), arguments.layers, arguments.num_workers)
    print(page)
    if arguments.output:
        arguments.output.write_text(page + "\n")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
