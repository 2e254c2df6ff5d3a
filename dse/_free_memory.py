"""How much memory this process may still take: of the machine, of its container, and of its own limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def free_memory() -> int | None:
    """Bytes, the least of what Linux, the control groups and ``ulimit -v`` leave; None where none of them says anything."""
    known = [*_machine(), *_groups(), *_limit()]
    return max(min(known), 0) if known else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _machine() -> Iterator[int]:
    if found := re.search(r"^MemAvailable:\s*(\d+) kB$", _text(PROC / "meminfo"), re.MULTILINE):
        yield int(found[1]) * 1024


def _groups() -> Iterator[int]:
    """What this process's control group and those around it have left; files that are only cached can be given back."""
    for line in _text(PROC / "self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = CGROUPS / controllers
        limit, usage, cached = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        here = top / name.lstrip("/")
        for group in (here, *here.parents):
            if not group.is_relative_to(top):
                break
            most, used = _text(group / limit).strip(), _text(group / usage).strip()
            if most.isdigit() and used.isdigit():
                files = re.search(rf"^{cached} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                yield int(most) - int(used) + (int(files[1]) if files else 0)


def _limit() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY and (held := _text(PROC / "self/statm").split()):
        yield most - int(held[0]) * resource.getpagesize()
