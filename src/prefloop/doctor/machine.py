"""The machine: which device a run would use, its memory, its versions, and how fast it multiplies matrices."""

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from prefloop import __version__
from prefloop.models import choose_device, choose_sampling_dtype
from prefloop.records import Record
from prefloop.train.config import Compute
from prefloop.train.reference import choose_dtype

PRODUCT_SECONDS = 1.0
"""How long a product rate is measured."""

PRODUCT_SIZE = {"cpu": 1024, "mps": 2048, "cuda": 8192}
"""Rows of the square matrices: large enough for full speed, small enough that one product is no wait."""


class Memory(NamedTuple):
    """Bytes in all, and bytes that a new process may take; None where the system does not say."""

    total: int | None
    available: int | None


class Machine(Record):
    """What was found. Memory in bytes and of the device that was chosen: the GPU's own, or the system's.

    dtype: of the matrix products in scoring and training; sampling_dtype: of the sampling engine.
    gflops: measured float32 and bfloat16 matrix products, in 1e9 floating-point operations a second.
    """

    system: str
    cores: int
    threads: int
    device: str
    device_why: str
    device_name: str
    memory_total: int | None = None
    memory_available: int | None = None
    bfloat16_is_native: bool
    dtype: str
    sampling_dtype: str
    versions: dict[str, str]
    gflops: dict[str, float]


def look_at_machine(compute: Compute, say: Callable[[str], object]) -> Machine:
    """The machine as `compute` would use it. Raises InputError for a device that is not here."""
    device = choose_device(compute.device)
    memory = device_memory(device)
    gflops = {}
    for dtype in ("float32", "bfloat16"):
        say(f"measuring {dtype} matrix products on {device}")
        gflops[dtype] = product_rate(device, dtype, PRODUCT_SECONDS)
    native = choose_sampling_dtype(device)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=device,
        device_why="as asked for" if compute.device != "auto" else "the first of cuda, mps, cpu that is here",
        device_name=torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name(),
        memory_total=memory.total,
        memory_available=memory.available,
        bfloat16_is_native=native == "bfloat16",
        dtype=choose_dtype(compute, device),
        sampling_dtype=native if compute.sampling_dtype == "auto" else compute.sampling_dtype,
        versions=versions(),
        gflops=gflops,
    )


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; a package that is not installed is left out."""
    found = {"prefloop": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def device_memory(device: str) -> Memory:
    """Memory of a device: a CUDA device has its own, any other shares the system's."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    return system_memory()


def system_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """The system's memory, or the smaller share of it that a container (cgroup v2) leaves this process."""
    if not meminfo.is_file():
        names = getattr(os, "sysconf_names", {})
        known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return Memory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None, None)
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    limit = cgroup / "memory.max"
    if not limit.is_file() or limit.read_text(encoding="ascii").strip() == "max":
        return Memory(total, available)
    most, used = int(limit.read_text(encoding="ascii")), int((cgroup / "memory.current").read_text(encoding="ascii"))
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    # The page cache counts as used, but its inactive part is given back on demand.
    left = most - used + int(stat["inactive_file"])
    return Memory(min(total, most), max(0, min(available, left)))


def product_rate(device: str, dtype: str, seconds: float) -> float:
    """Measured rate of square matrix products, in GFLOP/s, over `seconds` (at least one product)."""
    size = PRODUCT_SIZE[torch.device(device).type]
    synchronize = torch.get_device_module(device).synchronize
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    torch.mm(a, b)  # the first product also sets the library up
    synchronize()
    products, elapsed, start = 0, 0.0, time.perf_counter()
    while not products or elapsed < seconds:
        torch.mm(a, b)
        synchronize()
        products, elapsed = products + 1, time.perf_counter() - start
    return 2 * size**3 * products / elapsed / 1e9
