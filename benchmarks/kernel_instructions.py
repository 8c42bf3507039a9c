"""Instructions per logit of the Triton kernels, from what the compiler generates for a GPU; none is
needed.

    python -m benchmarks.kernel_instructions [--capability 90]

Static counts: the instructions of a kernel's innermost loop over blocks (of the whole kernel where
there is none), divided by the logits that a thread handles in it. Nothing runs. Only triton is
needed: its wheel contains ptxas and cuobjdump.
"""

import argparse
import os
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_gkd.loss import triton_kernels as kernels
from megatron_gkd.loss.divergence import KINDS, Divergence

# Types of the arguments by name; arguments that are not listed are compile-time constants.
TYPES = {
    **dict.fromkeys(
        ("row_stride", "student_stride", "teacher_stride", "out_stride", "width", "num_columns"),
        "i32",
    ),
    **dict.fromkeys(("first_column", "num_rows"), "i32"),
    **dict.fromkeys(("scale", "beta", "clip"), "fp32"),
    **dict.fromkeys(
        ("scalars", "divergence_factor", "gradient_sum", "cross_entropy_factor"), "*fp32"
    ),
    **dict.fromkeys(("labels", "label_columns"), "*i64"),
}
NOT_ALIGNED = (
    "first_column",
    "num_rows",
    "scale",
    "beta",
    "clip",
)  # the others are multiples of 16


def compile_kernel(
    function: Any, dtype: str, constants: dict[str, Any], capability: int = 90
) -> Any:
    """The kernel compiled for logits in `dtype` (bf16, fp16, fp32), with the constants by name."""
    types = dict(TYPES, logits=f"*{dtype}", student=f"*{dtype}", teacher=f"*{dtype}")
    types["out"] = f"*{dtype}" if function is kernels._gradient_kernel else "*fp64"
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(names)
            if name not in constants and name not in NOT_ALIGNED
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)


def instructions(kernel: Any) -> list[tuple[int, str]]:
    """[(address, instruction)] of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [
            os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump"),
            "-sass",
            file.name,
        ]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]


def instructions_per_logit(kernel: Any) -> float:
    """Of the longest loop, or of the whole kernel if it has none of more than 100 instructions."""
    code, longest = instructions(kernel), (0, 0)
    for address, text in code:
        jump = re.search(r"BRA 0x([0-9a-f]+)", text)
        if jump and address - int(jump[1], 16) > longest[1] - longest[0]:
            longest = int(jump[1], 16), address
    loop = [text for address, text in code if longest[0] <= address <= longest[1]]
    return len(loop if len(loop) > 100 else code) * 32 * kernels.NUM_WARPS / kernels.BLOCK


def count_all(
    dtype: str,
    metrics: bool = False,
    beta: float = 0.5,
    capability: int = 90,
    top_k: int | None = None,
) -> dict[str, float]:
    """{divergence: instructions per logit} over all passes: statistics of both sides, compare,
    write_gradient.
    """
    block = {"BLOCK": kernels.BLOCK}
    flags = {"METRICS": metrics, "LABELS": metrics, "UNIT": False, "REST": top_k is not None}
    statistics = instructions_per_logit(
        compile_kernel(kernels._statistics_kernel, dtype, block | flags, capability)
    )
    totals = {}
    for kind in KINDS:
        divergence = Divergence(kind, beta, top_k=top_k)
        constants = block | kernels.rule_constants(divergence)
        totals[kind] = 2 * statistics + sum(
            instructions_per_logit(compile_kernel(function, dtype, constants | more, capability))
            for function, more in (
                (kernels._compare_kernel, kernels.sum_constants(divergence, metrics)),
                (kernels._gradient_kernel, {"CROSS_ENTROPY": metrics}),
            )
        )
    return totals


REASONING = """\
Static counts of the instructions that ptxas generates for a Hopper GPU
(`python -m benchmarks.kernel_instructions`), all passes together; nothing here is measured. At
14 bytes per logit a copy on an H100 (about 3 TB/s) corresponds to 0.21 T logits/s. Its 132 x 128
lanes at 1.75 GHz issue 29.6 T instructions/s: 138 per logit at that speed, and about 100 if seven
of ten slots are filled. The first kernels took 234 (jsd, bfloat16), which no schedule brings above
59 % of a copy's speed, and seven slots of ten to 41 %. What changed: log1p and expm1 as polynomials
without divisions, log1p at beta 0.5 without a branch, exponentials of base 2 that flush denormals,
and columns that do not exist are read as -inf instead of masked in every sum. With metrics the
kernels serve `linear_jsd`, where the GEMMs are the limit. The README has what an H100 showed."""


def instructions_table(capability: int = 90) -> str:
    """The Markdown table of `count_all`."""
    head = ["logits", "beta", "metrics and labels", *KINDS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for dtype, beta, metrics in [
        ("bf16", 0.5, False),
        ("bf16", 0.3, False),
        ("bf16", 0.5, True),
        ("fp32", 0.5, True),
    ]:
        counts = [f"{count:.0f}" for count in count_all(dtype, metrics, beta, capability).values()]
        lines.append(
            "| " + " | ".join([dtype, f"{beta}", "yes" if metrics else "no", *counts]) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, help="90 is Hopper, 80 Ampere")
    capability = parser.parse_args().capability
    print(f"Instructions per logit, triton {triton.__version__}, sm_{capability}, all passes:\n")
    print(instructions_table(capability))


if __name__ == "__main__":
    main()
