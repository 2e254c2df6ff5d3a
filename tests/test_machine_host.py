"""What a profile takes a machine to be, and how large its buffers are on it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from test_machine_kernels import HOST

from memsplit.dse import _resources
from memsplit.dse.machine import _host, _kernels, profile_suites
from memsplit.dse.machine._kernels import COLD, HostKernels
from memsplit.models.units import GB, MiB


@pytest.mark.parametrize(
    ("listed", "group", "file"),
    [
        ("0::/box/inner", "box/inner", "memory.max"),
        ("0::/box/inner", "box", "memory.max"),
        ("0::/elsewhere", ".", "memory.max"),  # the container's own group lies at the top
        ("5:cpu:/x\n4:memory:/box\n0::/", "memory/box", "memory.limit_in_bytes"),
    ],
)
def test_a_container_limits_the_memory(listed: str, group: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its own group or one around it, of either version; "max" is no limit, and one above the machine's memory does not count."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:    4096 kB\nMemAvailable:   1024 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"{listed}\n")
    limit = tmp_path / "groups" / group / file
    limit.parent.mkdir(parents=True)
    monkeypatch.setattr(_resources, "PROC", tmp_path / "proc")
    monkeypatch.setattr(_resources, "CGROUPS", tmp_path / "groups")
    for text, memory in (("1048576\n", 2**20), ("max\n", 2**22), (f"{2**63 - 4096}\n", 2**22)):
        limit.write_text(text)
        assert _resources.total_memory() == memory
    assert _host.host_machine().memory == 2**22


def test_a_machine_that_does_not_tell_its_memory_is_not_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_resources, "PROC", tmp_path)
    with pytest.raises(ValueError, match="size of the memory is not known"):
        _resources.total_memory()


@pytest.mark.parametrize(("free", "size"), [(8 * 64 * MiB, 64 * MiB), (10**12, 256 * MiB), (0, MiB), (None, MiB)])
def test_buffers_take_an_eighth_of_what_this_process_may_still_have(free: int | None, size: int, monkeypatch: pytest.MonkeyPatch):
    """At most the largest size, and at least the smallest."""
    monkeypatch.setattr(_kernels, "free_memory", lambda: free)
    assert HostKernels(threads=1, quick=True, machine=HOST).size == size


def processor(folder: Path, chiplets: int, cores: int, level3: str) -> None:
    """/sys/devices/system/cpu of ``chiplets`` with ``cores`` each, which share a cache of the third level."""
    for cpu in range(chiplets * cores):
        first = cpu // cores * cores
        for index, (level, size, shared) in enumerate([("1", "32K", cpu), ("1", "32K", cpu), ("2", "1024K", cpu), ("3", level3, first)]):
            cache = folder / f"cpu{cpu}/cache/index{index}"
            cache.mkdir(parents=True)
            listed = f"{first}-{first + cores - 1}" if shared == first and level == "3" else f"{shared}"
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", listed)):
                (cache / name).write_text(f"{text}\n")


def test_the_last_caches_of_all_chiplets_count_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twelve chiplets of 32 MiB are 384 MiB, of which a process that may use two of them has 64."""
    processor(tmp_path, 12, 4, "32768K")
    monkeypatch.setattr(_host, "CPUS", tmp_path)
    assert _host._last_caches(range(48)) == 384 * MiB
    assert _host._last_caches([0, 3, 4]) == 64 * MiB
    assert _host._last_caches([48]) is None


def test_a_size_that_no_cache_holds_is_read_and_only_it_counts_as_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_kernels, "free_memory", lambda: 64 * GB)
    suite = HostKernels(threads=2, quick=True, machine=dataclasses.replace(HOST, cache=384.0 * MiB))
    moving = [one for one in suite.cells() if one.kind in ("read", "copy")]
    assert {one.shape["bytes"] for one in moving if one.cold} == {COLD * 384 * MiB}
    assert max(one.shape["bytes"] for one in moving if not one.cold) < COLD * 384 * MiB
    assert suite.size == COLD * 384 * MiB
    small = HostKernels(threads=2, quick=True, machine=HOST)
    assert {one.shape["bytes"] for one in small.cells() if one.kind == "read"} == set(_kernels.QUICK_SIZES)
    unknown = HostKernels(threads=2, quick=True, machine=dataclasses.replace(HOST, cache=None))
    assert not any(one.cold for one in unknown.cells())


def test_a_size_that_does_not_fit_is_left_out_and_the_bandwidth_is_doubted(monkeypatch: pytest.MonkeyPatch):
    """An eighth of 64 MiB is free for a buffer, and caches of 8 MiB call for 32."""
    monkeypatch.setattr(_kernels, "free_memory", lambda: 64 * MiB)
    monkeypatch.setattr(_kernels, "QUICK_SIZES", (4 * MiB, MiB))
    suite = HostKernels(threads=1, quick=True, machine=dataclasses.replace(HOST, cache=8.0 * MiB))
    reads = [one for one in suite.cells() if one.kind == "read"]
    monkeypatch.setattr(HostKernels, "cells", lambda self: reads)
    found = profile_suites([suite], seconds=60.0)
    assert {rate.cell.shape["bytes"] for rate in found.rates} == {4 * MiB, MiB}
    assert found.missing == ("cpu read, 1 of 3 shapes: 32 MiB do not fit into the 8 MiB of free memory that the profile takes",)
    assert any("the cache may hold" in sentence for sentence in found.remarks())


def test_each_thread_writes_its_part_of_the_buffers_first(monkeypatch: pytest.MonkeyPatch):
    """Pages lie beside the core that writes them first: written by one, those of a machine of two sockets would all be on one."""
    suite, parts = HostKernels(threads=3, quick=True, machine=HOST), []

    class Pool:
        def map(self, work: Callable[[np.ndarray], None], given: Sequence[np.ndarray]) -> list[None]:
            parts.extend(len(one) for one in given)
            return [work(one) for one in given]

    monkeypatch.setitem(suite.__dict__, "size", 8 * MiB)
    monkeypatch.setitem(suite.__dict__, "pool", Pool())
    source = suite.source
    assert parts == [3, 3, 2]
    assert source.nbytes == 8 * MiB
    np.testing.assert_array_equal(source[: MiB // 4], source[-MiB // 4 :])
    assert 0 < np.abs(source).max() <= 0.02
