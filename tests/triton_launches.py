"""Triton launches without a GPU: recorded instead of run, and compiled for one that is not here."""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    function: JITFunction
    grid: tuple
    arguments: tuple
    options: dict


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """No kernel runs meanwhile; what its outputs hold is arbitrary."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self, *arguments, grid, warmup, **options):
        launches.append(Launch(self, grid, arguments, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, capability: int = 90):
    """The kernel compiled as the launch would be."""
    signature, constants, attributes = {}, {}, {}
    options, arguments = dict(launch.options), list(launch.arguments)
    for parameter in launch.function.params[len(arguments) :]:
        arguments.append(options.pop(parameter.name))
    for index, (parameter, value) in enumerate(zip(launch.function.params, arguments)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif torch.is_tensor(value):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        elif value == 1:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(kernel) -> int:
    """Of a thread, registers that lie in memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
        command = [os.path.join(tools, "cuobjdump"), "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r" STACK:(\d+)", found)[1])
