"""What a machine is: names, cores, memory and caches, as Linux says them, and the software that measures."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.units import KiB, MiB
from . import _free_memory

CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Names and sizes: ``memory`` [B] that can be had of the host's, ``cache`` [B] its last caches together, ``gpu_...`` of the GPU."""

    cpu: str
    cores: int
    memory: float
    cache: float | None = None
    gpu: str = ""
    gpu_memory: float | None = None
    gpu_cache: float | None = None
    multiprocessors: int | None = None
    capability: tuple[int, int] = (0, 0)
    software: str = ""

    @property
    def title(self) -> str:
        """What tells this machine from another."""
        cpu = f"{self.cpu}, {self.cores} core{'s' * (self.cores != 1)}"
        return f"{self.gpu}{BESIDE}{cpu}" if self.gpu else cpu


BESIDE = " beside "
"""Between a GPU and a processor in a machine's title."""


def host_machine() -> Machine:
    """This machine without a GPU."""
    cores, memory = os.cpu_count() or 1, total_memory()
    return Machine(cpu=_cpu_name(), cores=cores, memory=memory, cache=_last_caches(usable_cpus()), software=software_versions())


def usable_cpus() -> Collection[int]:
    """Numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def usable_cores() -> int:
    """How many these are."""
    return len(usable_cpus())


def plain(text: str) -> str:
    """A name on one line, without characters that a file or a terminal would trip over."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _cpu_name() -> str:
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text_of("/proc/cpuinfo"), re.MULTILINE)
    return plain(found[1] if found else platform.processor() or platform.machine()) or "unknown processor"


def total_memory() -> float:
    """Bytes: the machine's, or the least limit of the control groups that this process is in, a container's among them, if that is less.

    A limit of the shell (``ulimit -v``) is none of the machine; ``free_memory`` heeds it. ValueError where nothing is known.
    """
    found = re.search(r"^MemTotal:\s*(\d+) kB$", text_of(_free_memory.PROC / "meminfo"), re.MULTILINE)
    known = [*([float(found[1]) * KiB] if found else []), *_limits()]
    if not known:
        raise ValueError("the size of the memory is not known: /proc/meminfo does not say; profile a machine with Linux")
    return min(known)


def _limits() -> Iterator[float]:
    """Of this process's control group and those around it, of both versions of control groups."""
    for line in text_of(_free_memory.PROC / "self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            top = _free_memory.CGROUPS / controllers
            here = top / name.lstrip("/")
            for group in (here, *here.parents):
                limit = text_of(group / ("memory.limit_in_bytes" if controllers else "memory.max")).strip()
                if group.is_relative_to(top) and limit.isdigit():
                    yield float(limit)


def _last_caches(cpus: Iterable[int]) -> float | None:
    """Bytes of the last caches of these cores, each that some of them share once: a chiplet has one of its own. None if not known."""
    found: dict[str, float] = {}
    for cpu in cpus:
        folders = [(text_of(folder / "level"), folder) for folder in CPUS.glob(f"cpu{cpu}/cache/index*")]
        _, last = max(folders, default=("", CPUS))
        if size := re.fullmatch(r"(\d+)([KM])\s*", text_of(last / "size")):
            found[text_of(last / "shared_cpu_list")] = float(size[1]) * (KiB if size[2] == "K" else MiB)
    return sum(found.values()) or None


def text_of(path: str | Path) -> str:
    """What a file holds; nothing if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def software_versions(*more: str) -> str:
    """The system and libraries that measure, in one line."""
    return "; ".join((f"{platform.system()} {platform.machine()}", f"Python {platform.python_version()}", f"NumPy {np.__version__}", *more))
