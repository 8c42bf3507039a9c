"""What megatron-core asks of torch on every rank as the groups of a layout are made:
`python -m benchmarks.process_groups`.

A process stands for rank 0 of a large world, through torch's backend that sends nothing: the calls
are those of a real start, their seconds the Python of it. NCCL connects the ranks of a group at its
first collective, and only of those that this rank is in.
"""

import subprocess
import sys
import time
from typing import Any

LAYOUTS = [
    # ranks, TP, PP, CP, EP
    (8, 8, 1, 1, 8),
    (64, 8, 1, 1, 8),
    (256, 8, 1, 1, 8),
    (1024, 8, 1, 1, 8),
    (1024, 1, 1, 1, 8),
    (1024, 4, 4, 2, 8),
]


def measure(num_ranks: int, tp: int, pp: int, cp: int, ep: int) -> str:
    """A line of the table: the calls of new_group, those of groups with rank 0, and seconds."""
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed: Any = torch.distributed
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    new_group, of_rank_0 = distributed.new_group, []

    def counted(ranks: list[int], **settings: Any) -> Any:
        of_rank_0.append(0 in ranks)
        return new_group(ranks, **settings)

    distributed.new_group = counted
    started = time.perf_counter()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    seconds = time.perf_counter() - started
    calls = f"{len(of_rank_0):,} | {sum(of_rank_0)} | {seconds:.2f}"
    return f"| {num_ranks:,} | {tp} | {pp} | {cp} | {ep} | {calls} |"


def main() -> None:
    """The table, a process for each line: a process has one world."""
    print("| ranks | TP | PP | CP | EP | calls of `new_group` | of groups with rank 0 | s |")
    print("|---|---|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.process_groups"]
        subprocess.run([*command, *map(str, layout)], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(*map(int, sys.argv[1:])), flush=True)
    else:
        main()
