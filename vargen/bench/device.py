"""The device that is measured: its name, its ceilings, its clock and its memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

import vargen

# a copy far larger than any cache, and a product large enough to be bound by arithmetic
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_MATRIX = {"cpu": 2048, "cuda": 8192}


def synchronize(device: torch.device) -> None:
    """Waits for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, its work on the device included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 5, scale: float = 1.0) -> dict[str, float]:
    """What the device reaches at its best: the fastest of some large copies, and of some large matrix products.

    Args:
        scale: of the sizes, for tests.

    Returns:
        ``bytes_per_second``, read and written together, and ``flops_per_second`` in ``dtype``.
    """
    source = torch.zeros(int(_COPY_BYTES[device.type] * scale), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = max(int(_MATRIX[device.type] * scale**0.5), 64)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy, product = lambda: target.copy_(source), lambda: a @ b
    times = {}
    for name, call in (("copy", copy), ("product", product)):
        seconds(call, device)
        times[name] = min(seconds(call, device) for _ in range(repeats))
    return {"bytes_per_second": 2 * source.numel() / times["copy"], "flops_per_second": 2 * side**3 / times["product"]}


class PeakMemory:
    """Most memory that was held inside the block, in ``bytes`` once it has ended.

    On a GPU what torch allocated there beyond what it held before, on a CPU the whole process' resident set.
    """

    bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            _forget_resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.bytes = _resident_peak()


def _forget_resident_peak() -> None:
    """Starts Linux' high-water mark anew; where that is not possible the mark stays that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    try:
        marks = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        marks = None
    if marks:
        return 1024 * int(marks[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """The device's name as a file's: ``nvidia-h200``, or ``cpu``."""
    return slugged(device_name(device)) if device.type == "cuda" else "cpu"


def slugged(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the record."""
    facts: dict[str, Any] = {"type": device.type, "name": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"sm_{properties.major}{properties.minor}", "memory_bytes": properties.total_memory}
    else:
        facts |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    versions = {
        "vargen": vargen.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": _version("triton"),
        "torchao": _version("torchao"),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    return {"device": facts, "versions": versions, "platform": f"{platform.system()} {platform.machine()}"}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
