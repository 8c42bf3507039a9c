"""A process of its own, for what a process does only once: switch on Triton's interpreter (before
triton is imported), start CUDA.
"""

import multiprocessing
import os
import pickle
import traceback

import pytest


def _main(connection, function, arguments):
    try:
        result = function(*arguments)
    except Exception:
        result = traceback.format_exc()
    connection.send(pickle.dumps(result))
    connection.close()


def in_a_process(function, *arguments, interpret_triton=False):
    """What `function(*arguments)` returns (no string) in a new process; the test fails with the
    traceback of an exception there.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        if interpret_triton:
            os.environ["TRITON_INTERPRET"] = "1"
        process = context.Process(target=_main, args=(sender, function, arguments))
        process.start()
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    sender.close()
    result = pickle.loads(receiver.recv())
    process.join()
    if isinstance(result, str):
        pytest.fail(result)
    return result
