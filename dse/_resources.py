"""What this process may use: memory of the machine, of its container and of its own limit, and cores."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def usable_cpus() -> Collection[int]:
    """Numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def usable_cores() -> int:
    """How many these are."""
    return len(usable_cpus())


def free_memory() -> int | None:
    """Bytes, the least of what Linux, the control groups and ``ulimit -v`` leave; None where none of them says anything."""
    groups = (group.limit - group.used + group.cached for group in _groups() if group.used is not None)
    known = [*_machine("MemAvailable"), *groups, *_limit()]
    return max(min(known), 0) if known else None


def total_memory() -> int:
    """Bytes: the machine's, or the least limit of the control groups that this process is in, a container's among them, if that is less.

    A limit of the shell (``ulimit -v``) is none of the machine; ``free_memory`` heeds it. ValueError where nothing is known.
    """
    known = [*_machine("MemTotal"), *(group.limit for group in _groups())]
    if not known:
        raise ValueError("the size of the memory is not known: /proc/meminfo does not say; profile a machine with Linux")
    return min(known)


def text_of(path: str | Path) -> str:
    """What a file holds; nothing if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _machine(name: str) -> Iterator[int]:
    if found := re.search(rf"^{name}:\s*(\d+) kB$", text_of(PROC / "meminfo"), re.MULTILINE):
        yield int(found[1]) * 1024


class _Group(NamedTuple):
    """Bytes of a control group: its limit, what is used of it, and what of that are files, which can be given back."""

    limit: int
    used: int | None
    cached: int


def _groups() -> Iterator[_Group]:
    """This process's control group and those around it, as far as they have a limit; of both versions of control groups."""
    for line in text_of(PROC / "self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        first = bool(controllers)
        limit, usage, cached = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if first
            else ("memory.max", "memory.current", "inactive_file")
        )
        top = CGROUPS / controllers
        here = top / name.lstrip("/")
        for group in (here, *here.parents):
            most, used = text_of(group / limit).strip(), text_of(group / usage).strip()
            if group.is_relative_to(top) and most.isdigit():
                files = re.search(rf"^{cached} (\d+)$", text_of(group / "memory.stat"), re.MULTILINE)
                yield _Group(int(most), int(used) if used.isdigit() else None, int(files[1]) if files else 0)


def _limit() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY and (held := text_of(PROC / "self/statm").split()):
        yield most - int(held[0]) * resource.getpagesize()
