"""`python -m megatron_gkd.doctor`: what is installed, what each optional package would speed up,
what will be used.

Reads only: nothing is installed, no process group is made, and optional packages are looked at
without importing them (but Transformer Engine, which megatron-core imports).
"""

import importlib.util
import os
import warnings
from importlib import metadata
from pathlib import Path

import torch

from megatron_gkd.run_folder import package_versions
from megatron_gkd.startup import import_problem

# Optional package -> what it is for. None of them is required.
OPTIONAL = {
    "transformer_engine": "attention on GPU (--attn_impl auto, te)",
    "apex": "megatron-core imports it where Transformer Engine is missing; nothing here needs it",
    "flash_attn": (
        "one of the kernels Transformer Engine's attention chooses from; torch has flash kernels "
        "of its own"
    ),
    "triton": (
        "the kernels of the loss on GPU (comes with CUDA builds of torch); torch operations serve "
        "without it"
    ),
    "torchvision": (
        "transformers resizes images with it instead of PIL where it is installed; videos do "
        "without it"
    ),
}


def find_package(name: str) -> tuple[bool, str]:
    """(is it usable, its version or what is wrong with it), without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False, "not installed"
    try:
        version = metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        version = "installed, without a version"
    if name == "apex":
        folders = [Path(folder) for folder in spec.submodule_search_locations or []]
        if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
            way_out = "pip uninstall apex; NVIDIA's is built from https://github.com/NVIDIA/apex"
            return False, f"{version}: PyPI's apex, another project and of no use here ({way_out})"
    return True, version


def device_lines() -> list[str]:
    """One line for the CPU and one for each GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [f"cpu: {os.cpu_count()} cores, {memory / 2**30:.1f} GiB of memory"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        lines.append(f"cuda:{index}: {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {capability}")
    if torch.version.cuda is None:
        lines.append("this torch is a CPU build")
    elif not torch.cuda.is_available():
        lines.append(f"this torch is built for CUDA {torch.version.cuda}, and sees no GPU")
    return lines


def choice_lines() -> list[str]:
    """The device, attention, experts and loss that a run with default flags takes here, or why it
    would be refused.
    """
    if problem := import_problem():  # megatron-core, which the imports below bring, fails with it
        return [f"error: {problem}"]
    # megatron-core warns about each optional package that this report lists
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron_gkd.loss.passes import select_kernels
        from megatron_gkd.model.decoder import core_attention
        from megatron_gkd.model.experts import select_kernels as expert_kernels
        from megatron_gkd.model.grouped import FAST_GROUPED_MM
        from megatron_gkd.parallel import resolve_device

    device = resolve_device("auto")
    lines = [
        f"device: {device.type}, collectives over {'NCCL' if device.type == 'cuda' else 'gloo'}"
    ]
    attention, experts = core_attention("flash", device), expert_kernels(device)
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_GROUPED_MM
    return [
        *lines,
        f"attention: {attention.__name__}",
        f"experts: {experts.__name__}",
        *(
            [
                "  their products run expert by expert: torch's grouped_mm has no single kernel "
                "for this GPU"
            ]
            if slow
            else []
        ),
        f"loss: {select_kernels(device).__name__}",
    ]


def main() -> None:
    """Print the report."""
    optional = []
    for name, purpose in OPTIONAL.items():
        usable, version = find_package(name)
        optional += [f"[{'x' if usable else ' '}] {name} {version}", f"    {purpose}"]
    report = {
        "Versions": [f"{package} {version}" for package, version in package_versions().items()],
        "Devices": device_lines(),
        "Optional packages": optional,
        "What will be used (--device auto, --attn_impl flash, --experts_impl auto)": choice_lines(),
    }
    for title, lines in report.items():
        print(title, *lines, sep="\n  ")


if __name__ == "__main__":
    main()
