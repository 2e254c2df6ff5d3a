"""Memory that may still be taken: the least of what the machine, its container and a limit of the process leave."""

import subprocess
import sys
from pathlib import Path

import pytest

from memsplit.dse import _resources
from memsplit.dse._resources import free_memory


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """/proc and /sys/fs/cgroup as files of a test: 8 GB available, no groups."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(_resources, "PROC", proc)
    monkeypatch.setattr(_resources, "CGROUPS", groups)
    monkeypatch.setattr(_resources, "_limit", lambda: iter(()))
    return proc, groups


def test_the_machines_own_number(files):
    assert free_memory() == 8_000_000 * 1024


@pytest.mark.parametrize("around", [False, True])
def test_a_container_leaves_what_it_does_not_hold(files, around):
    """In the process's own group or in one around it; cached files can be given back, no limit is "max"."""
    proc, groups = files
    (proc / "self/cgroup").write_text("0::/box/inner\n")
    (groups / "box/inner").mkdir(parents=True)
    for group, limit in ((groups / "box/inner", "max" if around else "3000"), (groups / "box", "3000" if around else "max")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("2500\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 700\n")
    assert free_memory() == 3000 - 2500 + 700


def test_the_first_version_of_control_groups(files):
    proc, groups = files
    (proc / "self/cgroup").write_text("5:cpu:/x\n4:memory:/x\n0::/\n")
    group = groups / "memory/x"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("4000")
    (group / "memory.usage_in_bytes").write_text("5000")
    assert free_memory() == 0


def test_nothing_is_known_where_nothing_is_said(files):
    proc, _ = files
    (proc / "meminfo").write_text("nonsense")
    assert free_memory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_limit_of_the_process_counts():
    code = (
        "import resource\n"
        "from memsplit.dse._resources import free_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, resource.RLIM_INFINITY))\n"
        "assert free_memory() < 12 * 2**30, free_memory()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
