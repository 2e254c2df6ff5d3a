"""Sweeps on several workers: the same table, byte for byte, whatever is killed, stopped or full."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
from sweep_scores import CHUNK, GRID, Machine

from memsplit.dse import Objective, write_csv
from memsplit.dse.sweep import sweep

KEEP = [Objective("latency_s"), Objective("price_USD")]


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert {**one.attrs, "settings": None} == {**other.attrs, "settings": None}


@pytest.mark.parametrize("keep", [None, KEEP])
def test_one_two_and_four_workers_write_the_same_bytes(tmp_path: Path, keep):
    frame = pd.DataFrame(GRID.columns(0, len(GRID))) if keep is None else GRID
    for workers in (1, 2, 4):
        write_csv(tmp_path / f"{workers}.csv", sweep(frame, Machine(), chunk=CHUNK, workers=workers, keep=keep))
    for suffix in ("csv", "json"):
        assert len({(tmp_path / f"{workers}.{suffix}").read_bytes() for workers in (1, 2, 4)}) == 1


def test_a_killed_worker_loses_no_finished_chunk(tmp_path: Path):
    """Files of finished chunks stay the files they were, and no design is missing or counted twice."""
    folder = tmp_path / "checkpoint"
    harmed = sweep(GRID, Machine("kill", str(tmp_path)), chunk=CHUNK, workers=2, checkpoint=folder)
    same(harmed, sweep(GRID, Machine(), chunk=CHUNK))
    kept = json.loads((tmp_path / "harm0").read_text())
    assert kept, "some chunks were finished by then"
    assert kept == {name: (folder / name).stat().st_ino for name in kept}
    assert not list(folder.glob(".*")), "nothing is left of what was being written"


def test_a_killed_worker_is_survived_without_a_checkpoint(tmp_path: Path):
    killed = sweep(GRID, Machine("kill", str(tmp_path), times=2), chunk=CHUNK, workers=3, keep=KEEP)
    same(killed, sweep(GRID, Machine(), chunk=CHUNK, keep=KEEP))
    assert len(list(tmp_path.glob("harm*"))) == 2


needs_server = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no server starts processes here")


@needs_server
def test_a_killed_server_of_processes_is_survived(tmp_path: Path):
    killed = sweep(GRID, Machine("kill the server", str(tmp_path)), chunk=CHUNK, workers=3)
    same(killed, sweep(GRID, Machine(), chunk=CHUNK))
    assert (tmp_path / "harm0").exists()


@needs_server
def test_a_server_that_is_killed_while_it_starts_a_process_is_survived(monkeypatch: pytest.MonkeyPatch):
    """Its pipe ends before it has said which process it started."""
    read, ends = forkserver.read_signed, [1, 3]

    def read_signed(pipe):
        ends[:] = [left - 1 for left in ends]
        if 0 in ends:
            raise EOFError("unexpected EOF")
        return read(pipe)

    monkeypatch.setattr(forkserver, "read_signed", read_signed)
    same(sweep(GRID, Machine(), chunk=CHUNK, workers=3), sweep(GRID, Machine(), chunk=CHUNK))
    assert max(ends) <= 0


def test_a_chunk_that_kills_its_worker_three_times_ends_the_sweep_and_is_named(tmp_path: Path):
    """Its neighbours, which lost their worker with it, are priced and kept; when the harm is over the same call goes on."""
    folder, score = tmp_path / "checkpoint", Machine("kill", str(tmp_path), times=3)
    with pytest.raises(ValueError, match=r"^rows 250 to 299 lost the process that priced them 3 times: make chunk smaller") as refusal:
        sweep(GRID, score, chunk=CHUNK, workers=2, checkpoint=folder)
    assert "\n" not in str(refusal.value)
    assert len(list(tmp_path.glob("harm*"))) == 3
    kept = {path.name: path.stat().st_ino for path in folder.glob("rows*")}
    assert {f"rows{number * CHUNK:012d}.npz" for number in range(5)} <= kept.keys()
    same(sweep(GRID, score, chunk=CHUNK, workers=2, checkpoint=folder), sweep(GRID, Machine(), chunk=CHUNK))
    assert kept.items() <= {path.name: path.stat().st_ino for path in folder.glob("rows*")}.items()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_names_the_rows_and_keeps_finished_chunks(tmp_path: Path, workers):
    folder, score = tmp_path / "checkpoint", Machine("raise", str(tmp_path))
    with pytest.raises(ValueError, match=r"^rows 250 to 299 cannot be priced: RuntimeError: no such machine$"):
        sweep(GRID, score, chunk=CHUNK, workers=workers, checkpoint=folder)
    assert len(list(folder.glob("rows*"))) >= 5
    same(sweep(GRID, score, chunk=CHUNK, checkpoint=folder), sweep(GRID, Machine(), chunk=CHUNK))


SLOW = """
import os, time
from pathlib import Path
import numpy as np
def score(columns):
    Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(0.25)
    return {"square": columns["n"] ** 2, "text": np.where(columns["n"] % 2, "odd", "even")}
"""
RUN = """
import sys
import types
from memsplit.dse.sweep import Grid, sweep
from memsplit.dse import write_csv
from slow import score
if __name__ == "__main__":
    write_csv("t.csv", sweep(Grid({"n": range(160)}), score, chunk=10, workers=int(sys.argv[1]), checkpoint="c"))
"""


def script(folder: Path, workers: int) -> subprocess.Popen:
    """A sweep of sixteen chunks of a quarter of a second each, in a process of its own."""
    (folder / "slow.py").write_text(SLOW)
    (folder / "run.py").write_text(RUN)
    (folder / "pids").mkdir(exist_ok=True)
    environment = {**os.environ, "PIDS": str(folder / "pids")}
    return subprocess.Popen(
        [sys.executable, "run.py", str(workers)], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_until(true, what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether it runs: one that waits for its parent to take note of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see whether processes are alive")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_goes_on_where_it_was(tmp_path: Path, how):
    """Killed, its workers end with it; by Ctrl-C, which reaches all of them, it says how to go on. With other workers: the same table."""
    process = script(tmp_path, 2)
    wait_until(lambda: len(list(tmp_path.glob("c/rows*"))) >= 3 or process.poll() is not None, "chunks are finished")
    assert process.poll() is None, process.stderr.read()
    (os.kill if how == signal.SIGKILL else os.killpg)(process.pid, how)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert not (tmp_path / "t.csv").exists()
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(workers) == 2
    wait_until(lambda: not any(map(alive, workers)), "the workers end with it")
    kept = {path.name: path.stat().st_ino for path in tmp_path.glob("c/rows*")}
    assert 3 <= len(kept) < 16
    if how == signal.SIGINT:
        assert f"sweep: interrupted; {len(kept)} of 16 chunks are kept in c, and the same call goes on from there" in error
    resumed = script(tmp_path, 1)
    assert (resumed.communicate(timeout=60)[1], resumed.returncode) == ("", 0)
    assert kept.items() <= {path.name: path.stat().st_ino for path in tmp_path.glob("c/rows*")}.items()
    lines = [f"{n},{n * n},{'odd' if n % 2 else 'even'}" for n in range(160)]
    assert (tmp_path / "t.csv").read_text().splitlines() == ["n,square,text", *lines]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see when processes start")
def test_ctrl_c_while_workers_start_is_one_traceback_and_not_theirs(tmp_path: Path):
    """It reaches all processes of the group, when the server of processes, the second child, is importing memsplit."""
    process = script(tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) >= 2, "a process is started")
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert error.count("Traceback") == 1, error
    assert "sweep: interrupted; " in error


def test_a_finished_sweep_leaves_alone_what_others_are_writing(tmp_path: Path):
    """By the number of the process in the name: one that lives is at it, unless the file is hours old."""
    folder = tmp_path / "c"
    folder.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lives, old, dead = (folder / f".rows000000000{n}00.npz.{pid}.part" for n, pid in ((1, os.getppid()), (2, os.getppid()), (3, ended.pid)))
    for path in (lives, old, dead):
        path.touch()
    os.utime(old, (0, 0))
    sweep(GRID, Machine(), chunk=CHUNK, checkpoint=folder)
    assert list(folder.glob(".*.part")) == [lives]


FULL = """
import resource, signal, sys
from memsplit.dse.sweep import Grid, sweep
from memsplit.dse import Objective
from growing import score
if __name__ == "__main__":
    if sys.argv[2] == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        keep = [Objective("a"), Objective("b")]
        frame = sweep(Grid({"n": range(4000)}), score, chunk=1000, workers=int(sys.argv[1]), keep=keep, checkpoint="c")
    except ValueError as error:
        print(error)
    else:
        print(len(frame))
"""
GROWING = """
def score(columns):
    n = columns["n"]
    return {"a": n.astype(float), "b": -1.0 * n * (n >= 2000)}
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_sweep_in_one_sentence_and_keeps_what_is_there(tmp_path: Path, workers):
    """The front of the first two chunks is one row each; those of the others are too large for the limit on the size of files."""
    (tmp_path / "growing.py").write_text(GROWING)
    (tmp_path / "run.py").write_text(FULL)

    def run(disk: str) -> str:
        command = [sys.executable, "run.py", str(workers), disk]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout

    sentence = run("full")
    assert sentence.startswith("cannot write c/rows00000000")
    assert sentence.endswith("File too large; finished chunks are kept there; make room and call again, or choose another checkpoint\n")
    kept = {path.name: path.stat().st_ino for path in tmp_path.glob("c/rows*")}
    assert kept.keys() == {"rows000000000000.npz", "rows000000001000.npz"}
    assert run("empty") == "2001\n", "row 0 and the 2000 rows of which each is better than those before in b"
    assert kept.items() <= {path.name: path.stat().st_ino for path in tmp_path.glob("c/rows*")}.items()


def test_a_score_that_workers_cannot_import_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    """It stands in a module that exists in this process only."""

    def score(columns):
        return {}

    module = types.ModuleType("found_here_only")
    score.__module__, score.__qualname__, module.score = module.__name__, "score", score
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(
        ValueError, match=r"^the score cannot be imported by other processes \(ModuleNotFoundError: No module named"
    ) as refusal:
        sweep(GRID, score, chunk=CHUNK, workers=2)
    assert "\n" not in str(refusal.value)


def test_a_script_that_sweeps_when_it_is_imported_is_told_what_to_do(tmp_path: Path):
    """Each worker imports the script."""
    (tmp_path / "run.py").write_text(RUN.replace('if __name__ == "__main__":', "if True:"))
    (tmp_path / "slow.py").write_text(SLOW)
    run = subprocess.run(
        [sys.executable, "run.py", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=60, env={**os.environ, "PIDS": str(tmp_path)}
    )
    assert any(line.startswith("ValueError: no other process could be started") for line in run.stderr.splitlines())
    assert not list(tmp_path.glob("c/rows*"))


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="dask[distributed], of the extra dist, is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("keep", [None, KEEP])
def test_dask_gives_the_same_table(cluster, tmp_path: Path, keep):
    frame = pd.DataFrame(GRID.columns(0, len(GRID)))
    expected = sweep(frame, Machine(), chunk=CHUNK, keep=keep)
    same(sweep(frame, Machine(), chunk=CHUNK, keep=keep, client=cluster, checkpoint=tmp_path / "c"), expected)
    assert len(list(tmp_path.glob("c/rows*"))) == 10
    same(sweep(frame, Machine(), chunk=CHUNK, keep=keep, workers=2, checkpoint=tmp_path / "c"), expected)


def test_dask_survives_a_killed_worker(cluster, tmp_path: Path):
    same(sweep(GRID, Machine("kill", str(tmp_path)), chunk=CHUNK, client=cluster), sweep(GRID, Machine(), chunk=CHUNK))
    assert (tmp_path / "harm0").exists()


def test_dask_gives_up_on_a_chunk_that_kills_every_worker(cluster, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cluster.cluster.scheduler, "allowed_failures", 0)  # instead of 3, since restarts take long
    with pytest.raises(ValueError, match=r"^rows 250 to 299 lost the process that priced them: make chunk smaller"):
        sweep(GRID, Machine("kill", str(tmp_path), times=100), chunk=CHUNK, client=cluster)


def test_an_exception_on_dask_names_the_rows(cluster, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^rows 250 to 299 cannot be priced: RuntimeError: no such machine$"):
        sweep(GRID, Machine("raise", str(tmp_path)), chunk=CHUNK, client=cluster)
