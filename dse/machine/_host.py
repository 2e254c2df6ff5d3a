"""What a machine is: names, cores, memory and caches, as Linux says them, and the software that measures."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...models.units import KiB, MiB
from .._resources import text_of, total_memory, usable_cpus

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
    cores, memory = os.cpu_count() or 1, float(total_memory())
    return Machine(cpu=_cpu_name(), cores=cores, memory=memory, cache=_last_caches(usable_cpus()), software=software_versions())


def plain(text: str) -> str:
    """A name on one line, without characters that a file or a terminal would trip over."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _cpu_name() -> str:
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text_of("/proc/cpuinfo"), re.MULTILINE)
    return plain(found[1] if found else platform.processor() or platform.machine()) or "unknown processor"


def _last_caches(cpus: Iterable[int]) -> float | None:
    """Bytes of the last caches of these cores, each that some of them share once: a chiplet has one of its own. None if not known."""
    found: dict[str, float] = {}
    for cpu in cpus:
        folders = [(text_of(folder / "level"), folder) for folder in CPUS.glob(f"cpu{cpu}/cache/index*")]
        _, last = max(folders, default=("", CPUS))
        if size := re.fullmatch(r"(\d+)([KM])\s*", text_of(last / "size")):
            found[text_of(last / "shared_cpu_list")] = float(size[1]) * (KiB if size[2] == "K" else MiB)
    return sum(found.values()) or None


def software_versions(*more: str) -> str:
    """The system and libraries that measure, in one line."""
    return "; ".join((f"{platform.system()} {platform.machine()}", f"Python {platform.python_version()}", f"NumPy {np.__version__}", *more))
