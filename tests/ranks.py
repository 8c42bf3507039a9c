"""Run a function on real gloo ranks: `run_ranks(fn, world_size, *args)`.

Ranks are fresh processes forked from a server that has the heavy imports (torch, megatron-core,
transformers) loaded but has never run a tensor operation, so each call costs a fork and a
rendezvous, and no state leaks from one test to the next. Every rank uses one thread.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from multiprocessing.connection import wait

PRELOADED = [
    "tests.preload",
    "torch",
    "torch.distributed",
    "megatron.core",
    "megatron.core.models.gpt",
    "transformers",
    "peft",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def _rank_main(connection, fn, rank, world_size, folder, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    import torch

    torch.set_num_threads(1)
    try:
        store = torch.distributed.FileStore(os.path.join(folder, "store"), world_size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        message = ("result", pickle.dumps(fn(rank, world_size, *args)))
        torch.distributed.barrier()
    except BaseException:
        message = ("error", traceback.format_exc())
    connection.send((time.monotonic(), *message))
    connection.close()
    os._exit(0)  # gloo's threads need no farewell, and the parent has the result


def run_ranks(fn, world_size, *args, timeout=300):
    """Run `fn(rank, world_size, *args)` on `world_size` gloo ranks and return their results in rank
    order.

    `fn` and `args` must pickle, results too. Raises RuntimeError with the traceback of the first
    rank that failed, TimeoutError when a rank has not answered after `timeout` seconds; no rank
    outlives the call.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(sender, fn, rank, world_size, folder, args), daemon=True
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        results, waiting = (
            [None] * world_size,
            {receiver: rank for rank, (_, receiver) in enumerate(ranks)},
        )
        try:
            while waiting:
                ready = wait(list(waiting), timeout)
                if not ready:
                    raise TimeoutError(
                        f"ranks {sorted(waiting.values())} of {world_size} gave no answer "
                        f"in {timeout} s"
                    )
                said = []
                for receiver in ready:
                    rank = waiting.pop(receiver)
                    try:
                        said.append((*receiver.recv(), rank))
                    except EOFError:
                        said.append((0.0, "death", "", rank))  # before what others make of it
                for _, kind, payload, rank in sorted(said):
                    if kind == "death":
                        raise RuntimeError(f"rank {rank} of {world_size} died without a word")
                    if kind == "error":
                        raise RuntimeError(f"rank {rank} of {world_size} failed:\n{payload}")
                    results[rank] = pickle.loads(payload)
        finally:
            for process, receiver in ranks:
                receiver.close()
                if process.is_alive():
                    process.kill()
                process.join()
    return results
