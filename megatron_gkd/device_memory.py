"""What this process uses of its device's memory, in bytes: a GPU's as torch's allocator counts it,
on a CPU the resident size.
"""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS, _MACHINE = Path("/proc/self"), Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # the limit of a container


class DeviceMemory:
    """Of one device of this process. None of the methods waits for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._most_before = 0

    def used(self) -> int:
        """Now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _resident("VmRSS")

    def begin(self) -> None:
        """`peak` counts from here."""
        self._most_before = self.most()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # a system or a container without it
                (_PROCESS / "clear_refs").write_text("5")

    def peak(self) -> int:
        """The most since `begin`, or since the process began (on a CPU other than Linux's
        always).
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident("VmHWM")

    def most(self) -> int:
        """The most since the process began."""
        return max(self._most_before, self.peak())

    def limit(self) -> int:
        """What `used` can grow to. Of a GPU: what is free on it, and what torch's allocator holds;
        of a machine's or container's available memory the share of one of its ranks. Raises OSError
        where a CPU's system does not tell.
        """
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return free + torch.cuda.memory_reserved(self.device)
        available = _kib(_MACHINE, "MemAvailable")
        most = _GROUP / "memory.max"
        if most.exists() and (text := most.read_text().strip()) != "max":
            taken = int((_GROUP / "memory.current").read_text())
            for line in (_GROUP / "memory.stat").read_text().splitlines():
                if line.startswith("inactive_file "):  # cached files, which give way
                    taken -= int(line.split()[1])
            available = min(available, int(text) - taken)
        return self.used() + max(available, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _kib(path: Path, field: str) -> int:
    """A line `FIELD: NUMBER kB` of a file of /proc, in bytes."""
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _resident(field: str) -> int:
    if _PROCESS.exists():
        return _kib(_PROCESS / "status", field)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def device_name(device: torch.device) -> str:
    """What the device is called: `NVIDIA H100 80GB HBM3`; of a CPU the model's name where Linux
    tells it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
