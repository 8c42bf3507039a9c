"""`--check`: the layout that the flags name and the memory that a rank needs, against the GPU's."""

import subprocess
from dataclasses import replace
from typing import NamedTuple

from megatron_gkd.config import Config, layout_line
from megatron_gkd.layout import ParallelConfig
from megatron_gkd.model.args import ModelArgs, read_model_args
from megatron_gkd.plan.memory import CONTEXT_BYTES, GIB, check_memory, estimate
from megatron_gkd.plan.rates import read_rates
from megatron_gkd.plan.settings import PlanSettings, workload_of
from megatron_gkd.plan.workload import Workload

QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
MIB = 2**20


class Gpu(NamedTuple):
    """name: for messages."""

    name: str
    memory: int
    """Bytes"""


def gpu_of(own: PlanSettings, device: str) -> Gpu | None:
    """That of the flags, else the one here with the least memory; None: no limit is known. Raises
    ValueError for a --gpu that is none.
    """
    if own.gpu_memory:
        return Gpu(own.gpu or "--gpu_memory", round(own.gpu_memory * GIB))
    if own.gpu:
        rates = read_rates(own.gpu)
        return Gpu(rates.name, rates.gpu_memory_bytes)
    return None if device == "cpu" else gpu_here()


def gpu_here() -> Gpu | None:
    """The one with the least memory as nvidia-smi has them, None where it sees none."""
    try:
        said = subprocess.run(QUERY, capture_output=True, text=True, check=True, timeout=30).stdout
        found = [line.rsplit(",", 1) for line in said.splitlines() if line.strip()]
        gpus = [Gpu(name.strip(), int(memory) * MIB) for name, memory in found]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # not installed, no driver, a card that does not tell
    return min(gpus, key=lambda gpu: gpu.memory, default=None)


def longest_prompt(
    args: ModelArgs, layout: ParallelConfig, load: Workload, available: int, world_size: int
) -> int | None:
    """Tokens of the longest prompt whose rollout fits; None where none does. Only the data tell how
    long prompts are: what fits with shorter ones than --max_length allows is not refused.
    """

    def fits(tokens: int) -> bool:
        shorter = replace(load, prompt_tokens=tokens)
        found = estimate(args, layout, shorter, world_size=world_size, whole_card=False)
        return found.total <= available

    low, high = 0, load.prompt_tokens if load.completion_tokens else 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low or None


def check(own: PlanSettings, config: Config) -> list[str]:
    """The lines to print. Raises ValueError where the layout is impossible, or needs more memory
    than the GPU has whatever the prompts, naming the parts and the way out.
    """
    args = read_model_args(config.model.model)
    lines = [layout_line(config, own.gpus, args)]
    load = workload_of(own, config, args)
    is_cpu = config.model.device == "cpu"
    needed = estimate(
        args,
        config.parallel,
        load,
        world_size=own.gpus,
        device="cpu" if is_cpu else "cuda",
    )
    gpu = gpu_of(own, config.model.device)
    found = "--device cpu, not compared" if is_cpu else "no GPU here to compare with"
    if gpu:
        name = f"{gpu.name}, {gpu.memory / GIB:.1f} GiB"
        found = f"fits {name}"
        left = gpu.memory - CONTEXT_BYTES
        try:
            check_memory(args, config.parallel, load, left, world_size=own.gpus)
        except ValueError as error:
            longest = longest_prompt(args, config.parallel, load, left, own.gpus)
            if longest is None:
                raise ValueError(f"{name}: {error}") from None
            found += f" where no prompt has more than {longest:,} tokens: the run looks at its data"
    if not load.towers and args.family.towers:
        found += "; towers not counted (--media)"
    if config.model.attn_impl == "eager":
        found += "; not counted: the squares of row lengths that --attn_impl eager keeps"
    return [*lines, f"Memory: about {needed.describe()}; {found}"]
