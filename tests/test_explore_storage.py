"""Searches on storages: stopped, killed and resumed, spread over processes, shared by several; and what is refused."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pandas as pd
import pytest
from machines import OBJECTIVES, LoggedScore, batch_score, begun, kill, run, score

from memsplit.dse import Objective
from memsplit.dse.samplers import NSGA2, NSGA3, QMC, TPE, RandomSearch


def check_same(frame: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(frame, other, check_exact=True)
    assert frame.attrs["designs"] == other.attrs["designs"]
    for name in ("finished", "infeasible", "sampler"):
        assert frame.attrs[name] == other.attrs[name]


class Acting:
    """A score told by its settings, of which it has none: what it does beside is no part of it."""

    def __init__(self, act):
        self.act = act

    def settings(self):
        return {}

    def __call__(self, machine):
        return self.act(machine)


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [*(("journal", sampler) for sampler in (NSGA2(), NSGA3(seed=5), TPE(), QMC(), RandomSearch())), ("sqlite", NSGA2())],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_stopped_search_goes_on_as_if_it_had_not_stopped(tmp_path: Path, kind: str, sampler):
    """Stopped within the first generation, within the second and at the end of the third; and it is the search without a storage."""
    storage = tmp_path / "trials.log" if kind == "journal" else f"sqlite:///{tmp_path}/trials.db"
    log = tmp_path / "log"
    for trials in (5, 17, 36, 40):
        frame = run(storage, trials, score=LoggedScore(log), sampler=sampler)
        check_same(frame, run(None, trials, sampler=sampler))
        assert begun(log) == trials, "what the storage knows is not priced again"
    assert frame["seed"].unique().tolist() == [5 if sampler == NSGA3(seed=5) else 0]


def test_a_sampler_of_optuna_with_a_seed_is_resumed_too(tmp_path: Path):
    first, second = (optuna.samplers.TPESampler(seed=3) for _ in range(2))
    run(tmp_path / "trials.log", 20, sampler=first)
    check_same(run(tmp_path / "trials.log", sampler=second), run(sampler=optuna.samplers.TPESampler(seed=3)))


def test_a_sampler_without_a_seed_is_refused_on_resumption_with_the_way_out(tmp_path: Path):
    run(tmp_path / "trials.log", 20, sampler=optuna.samplers.RandomSampler())
    with pytest.raises(ValueError, match=r"trial 0 of study 'memories' .* give the sampler a seed, or go on with synchronous=False"):
        run(tmp_path / "trials.log", sampler=optuna.samplers.RandomSampler())
    frame = run(tmp_path / "trials.log", sampler=optuna.samplers.RandomSampler(), synchronous=False)
    assert frame.attrs["finished"] == 40


def test_an_interruption_within_a_generation_loses_nothing_that_is_finished(tmp_path: Path):
    log = tmp_path / "log"
    whole = LoggedScore(log)

    def stop_at_the_thirtieth(machine):
        if begun(log) == 29:
            raise KeyboardInterrupt
        return whole(machine)

    assert run(tmp_path / "trials.log", score=Acting(stop_at_the_thirtieth)).attrs["interrupted"]
    check_same(run(tmp_path / "trials.log", score=Acting(whole)), run())
    assert begun(log) == 40


@pytest.mark.parametrize(("workers", "scores"), [(2, {}), (3, {"score": None, "batch_score": batch_score})], ids=["score", "batch_score"])
def test_any_number_of_workers_gives_the_same_frame(workers: int, scores: dict):
    check_same(run(workers=workers, **scores), run())


def test_a_killed_worker_costs_nothing_but_its_share(tmp_path: Path):
    """Its designs are priced anew by another worker; all others once."""
    log = tmp_path / "log"
    check_same(run(tmp_path / "trials.log", score=LoggedScore(log, fatal=20), workers=2), run())
    assert 40 < begun(log) <= 44, "with two workers, at most two shares of two designs are begun twice"
    stored = optuna.load_study(study_name="memories", storage=journal(tmp_path / "trials.log")).trials
    assert sorted(trial.user_attrs["memsplit:trial"] for trial in stored) == list(range(40))


def test_designs_that_kill_every_worker_are_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="worker processes died 3 times in a row"):
        run(score=kill, workers=2, trials=4)


def journal(path: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from machines import LoggedScore, run

if __name__ == "__main__":
    storage, out, log, settings = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    frame = run(storage, score=LoggedScore(log, settings.pop("seconds"), settings.pop("fatal", None)), **settings)
    frame.to_csv(out.with_suffix(".part"), index=False)
    out.with_suffix(".part").rename(out)
"""


def start(folder: Path, storage: object, out: str, **settings) -> subprocess.Popen:
    """The search in a process of its own, which writes its frame to ``out``."""
    script = folder / "search.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, script, str(storage), folder / out, folder / "log", json.dumps(settings)]
    return subprocess.Popen(command, start_new_session=True)


def wait_for(reached, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.01)


def test_a_killed_search_with_a_torn_journal_is_resumed(tmp_path: Path):
    """SIGKILL in the second generation, and half a line at the end of the file, as of a process killed while it wrote."""
    storage = tmp_path / "trials.log"
    process = start(tmp_path, storage, "frame.csv", seconds=0.02)
    try:
        wait_for(lambda: begun(tmp_path / "log") >= 15)
    finally:
        process.kill()
        process.wait()
    before = begun(tmp_path / "log")
    assert 15 <= before < 40
    with storage.open("a") as file:
        file.write('{"op_code":4,"worker_id":"torn')
    check_same(run(storage, score=LoggedScore(tmp_path / "log")), run())
    assert begun(tmp_path / "log") <= 41, "only the design that was being priced is begun twice"


def test_a_line_torn_while_others_have_the_journal_open_is_cut_before_the_next(tmp_path: Path):
    storage = tmp_path / "trials.log"
    torn = []

    def tear(machine):
        if len(torn) == 7:
            with storage.open("a") as file:
                file.write('{"op_code":4,"wor')
        torn.append(machine)
        return score(machine)

    check_same(run(storage, score=Acting(tear)), run())
    check_same(run(storage, score=Acting(score)), run())


def check_shared(folder: Path, storage: object, *, kill_one: bool, trials: int = 40) -> None:
    """Three processes on one search, of which one may be killed: each design once, and the same frame from all that live."""
    settings = {"synchronous": False, "trials": trials, "patience": 1.5, "seconds": 0.03}
    processes = [start(folder, storage, "0.csv", **settings, fatal=trials // 4 if kill_one else None)]
    try:
        wait_for(lambda: begun(folder / "log") > 0)
        processes += [start(folder, storage, f"{number}.csv", **settings) for number in (1, 2)]
        codes = [process.wait(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [-signal.SIGKILL if kill_one else 0, 0, 0]
    frames = [pd.read_csv(folder / f"{number}.csv") for number in range(int(kill_one), 3)]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0])
    again = run(storage, synchronous=False, trials=trials, score=LoggedScore(folder / "log"))
    assert again.attrs["finished"] == trials
    assert len(again) + again.attrs["infeasible"] == trials
    assert again["trial"].is_unique
    assert sorted(again["trial"]) == sorted(frames[0]["trial"])
    assert trials <= begun(folder / "log") <= trials + (3 if kill_one else 2), (
        "no design is priced in vain but those of races and of the dead"
    )
    for row in again.itertuples():
        assert again.attrs["designs"][row.trial] == (row.bandwidth_GBps * (1 if row.memory == "lpddr" else row.stacks), row.memory)
    first = again[again["trial"] < 12]
    assert not first["bandwidth_GBps"].duplicated().any(), "processes with one seed draw different designs in the first generation"


@pytest.mark.parametrize("kill_one", [False, True], ids=["all live", "one is killed"])
def test_processes_that_share_a_journal_finish_each_design_once(tmp_path: Path, kill_one: bool):
    check_shared(tmp_path, tmp_path / "trials.log", kill_one=kill_one)


def test_one_process_with_workers_shares_too(tmp_path: Path):
    frame = run(tmp_path / "trials.log", synchronous=False, workers=2, score=None, batch_score=batch_score)
    assert (frame.attrs["finished"], frame["trial"].is_unique) == (40, True)
    assert frame["seed"].isna().all(), "the seed alone does not make these rows"
    more = run(tmp_path / "trials.log", 50, synchronous=False, score=None, batch_score=batch_score)
    assert more.attrs["finished"] == 50
    assert set(frame["trial"]) <= set(more["trial"])


def test_an_asynchronous_search_in_memory_works_like_the_others():
    assert run(synchronous=False).attrs["finished"] == 40


def test_who_was_taken_for_dead_and_comes_back_counts_nothing_twice(tmp_path: Path):
    """The score of the first design takes so long that another search with no patience replaces it."""
    storage, priced = tmp_path / "trials.log", []

    def slow(machine):
        if not priced:
            priced.append("first")
            signs = journal(storage).get_study_user_attrs(0)
            assert any(name.startswith("memsplit:worker:") for name in signs)
            other = run(storage, 10, synchronous=False, patience=0.01, score=Acting(score))
            assert other.attrs["finished"] == 10
        return score(machine)

    frame = run(storage, 10, synchronous=False, patience=600, score=Acting(slow))
    assert frame.attrs["finished"] == 10
    assert 0 not in frame["trial"].tolist(), "trial 0 was given up by the other search"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """The URL of a PostgreSQL of Debian's package on the loopback, in a temporary folder."""
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed (the extra `postgres`)")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    if not programs:
        pytest.skip("PostgreSQL is not installed under /usr/lib/postgresql")
    user: list[str] = []
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres to become")
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    port = free_port()
    (password := folder / "password").write_text("secret")
    password.chmod(0o644)
    data, pg_ctl = folder / "data", programs[-1]
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": "/"}
    try:
        subprocess.run([*user, pg_ctl.with_name("initdb"), "-D", data, "-A", "scram-sha-256", "-U", "dse", f"--pwfile={password}"], **quiet)
        subprocess.run([*user, pg_ctl, "-D", data, "-w", "-o", settings, "-l", folder / "server.log", "start"], **quiet)
        try:
            yield f"postgresql://dse:secret@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*user, pg_ctl, "-D", data, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_postgresql_keeps_and_shares_a_search(tmp_path: Path, postgres: str):
    run(postgres, 17)
    check_same(run(postgres), run())
    with pytest.raises(ValueError, match=r"storage postgresql://127.0.0.1:.*password authentication failed") as refusal:
        run(postgres.replace("secret", "se%63ret-wrong"))
    assert "wrong" not in str(refusal.value)
    (tmp_path / "shared").mkdir()
    optuna.delete_study(study_name="memories", storage=postgres.replace("://", "+psycopg2://"))
    check_shared(tmp_path / "shared", postgres, kill_one=True, trials=24)


def test_a_grpc_proxy_keeps_a_search(tmp_path: Path):
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("grpcio is not installed (the extra `grpc`)")
    port = free_port()
    server = (
        "import sys, optuna; from optuna.storages import JournalStorage, journal, run_grpc_proxy_server;"
        "run_grpc_proxy_server(JournalStorage(journal.JournalFileBackend(sys.argv[1])), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", server, tmp_path / "trials.log", str(port)], stderr=subprocess.DEVNULL)
    try:
        run(f"grpc://127.0.0.1:{port}", 17)
        check_same(run(f"grpc://127.0.0.1:{port}"), run())
        assert run(f"grpc://127.0.0.1:{port}", name="others", synchronous=False).attrs["finished"] == 40
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"objectives": OBJECTIVES[:1]}, "was made with objectives"),
        ({"objectives": [OBJECTIVES[0], Objective("memory_usd", "maximize")]}, "'maximize'.*choose another name"),
        ({"objectives": OBJECTIVES[::-1]}, "was made with objectives"),
        ({"constraints": []}, "was made with constraints"),
        ({"settings": {"context": 8192}}, "other settings than these"),
        ({"seed": 1}, "was made with sampler .*'seed': 0.*, not .*'seed': 1"),
        ({"sampler": QMC()}, "'nsga2'.*, not .*'qmc'"),
        ({"population": 13}, "was made with population 12, not 13"),
        ({"design": lambda trial: (trial.suggest_float("speed", 1, 16), "hbm")}, "was made with another design than this"),
        ({"score": lambda machine: score(machine)}, "was made with another score than this"),
        ({"score": None, "batch_score": batch_score}, "was made with another score than this"),
    ],
)
def test_a_name_belongs_to_one_search(tmp_path: Path, changed: dict, sentence: str):
    run(tmp_path / "trials.log", 13, settings={"context": 4096})
    size = (tmp_path / "trials.log").stat().st_size
    with pytest.raises(ValueError, match=sentence) as refusal:
        run(tmp_path / "trials.log", 13, **({"settings": {"context": 4096}} | changed))
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "trials.log").stat().st_size <= size + 200, "only the attempt to make the study is written"
    run(tmp_path / "trials.log", 14, settings={"context": 4096})


def test_an_asynchronous_search_refuses_a_name_of_others_too(tmp_path: Path):
    run(tmp_path / "trials.log", 13, synchronous=False)
    with pytest.raises(ValueError, match="was made with another design than this"):
        run(tmp_path / "trials.log", 14, synchronous=False, design=lambda trial: (trial.suggest_float("speed", 1, 16), "hbm"))
    with pytest.raises(ValueError, match="was made with another score than this"):
        run(tmp_path / "trials.log", 14, synchronous=False, score=lambda machine: score(machine))
    with pytest.raises(ValueError, match="was made with mode 'asynchronous', not 'synchronous'"):
        run(tmp_path / "trials.log", 14)
    optuna.create_study(study_name="foreign", storage=journal(tmp_path / "trials.log"), directions=["minimize"] * 3)
    with pytest.raises(ValueError, match=r"study 'foreign' .* was not made by explore"):
        run(tmp_path / "trials.log", name="foreign")


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("postgresql://dse:secret@127.0.0.1:1/trials", "postgresql://127.0.0.1:1/trials cannot be reached"),
        ("postgresql://dse:se/cr@et@127.0.0.1:1/trials?sslpassword=secret", "written %2F, and @ %40"),
        ("mysql://dse:secret@127.0.0.1:1/trials", "mysql://127.0.0.1:1/trials cannot be reached"),
        ("sqlite:////nowhere/trials.db", "unable to open database file"),
        ("grpc://127.0.0.1", "grpc"),
        ("https://dse:secret@127.0.0.1/trials", "none of postgresql, mysql, sqlite, grpc"),
        ("/nowhere/trials.log", "there is no folder /nowhere"),
        (Path("/"), "it is a folder"),
        ("", "must be a path, a URL or a storage of Optuna's, not ''"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_in_one_sentence_without_its_password(storage, sentence: str):
    with pytest.raises(ValueError, match=sentence) as refusal:
        run(storage)
    text = str(refusal.value)
    assert not any(word in text for word in ("\n", "secret", "se/cr", "et@", "dse:"))
    assert refusal.value.__context__ is None or refusal.value.__suppress_context__, "a traceback shows no cause either"


def test_a_silent_proxy_is_given_up(monkeypatch: pytest.MonkeyPatch):
    if importlib.util.find_spec("grpc") is None:
        pytest.skip("grpcio is not installed (the extra `grpc`)")
    from memsplit.dse import _storage

    monkeypatch.setattr(_storage, "_CONNECT", 0.2)
    with pytest.raises(ValueError, match=r"storage grpc://127.0.0.1:1 cannot be reached"):
        run("grpc://127.0.0.1:1")


def test_a_full_disk_is_said_in_one_sentence_and_costs_only_what_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage, log = tmp_path / "trials.log", tmp_path / "log"
    append = optuna.storages.journal.JournalFileBackend.append_logs

    def full(self, logs):
        if begun(log) > 20:
            raise OSError(28, "No space left on device")
        append(self, logs)

    with monkeypatch.context() as patched:
        patched.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", full)
        with pytest.raises(ValueError, match=r"trials.log cannot be reached or used .No space left on device"):
            run(storage, score=LoggedScore(log))
    check_same(run(storage, score=LoggedScore(log)), run())
    assert begun(log) == 41


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"storage": "trials.log", "name": None}, "belong together"),
        ({"name": "memories"}, "belong together"),
        ({"workers": 0}, "workers must be a whole number of processes, at least 1 .*, not 0"),
        ({"workers": 1.5}, "workers must be a whole number of processes, at least 1 .*, not 1.5"),
        ({"patience": 0}, r"patience must be a number above 0 \[s\], not 0"),
        ({"patience": "x"}, r"patience must be a number above 0 \[s\], not 'x'"),
        ({"storage": "trials.log", "name": 3}, "a study needs a name, a text that is not empty, not 3"),
        ({"workers": 2, "score": lambda machine: None}, "score cannot be sent to worker processes .*; define it at the top of a module"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence) as refusal:
        run(**settings)
    assert "\n" not in str(refusal.value)


class Untold:
    """A design function that only its class tells from others."""

    def __init__(self, parameter):
        self.parameter = parameter

    def __call__(self, trial):
        return trial.suggest_float(self.parameter, 1, 16), "hbm"


def test_a_design_that_nothing_tells_from_others_is_told_by_its_parameters(tmp_path: Path):
    run(tmp_path / "trials.log", 13, design=Untold("bandwidth_GBps"))
    with pytest.raises(ValueError, match=r"trial 0 .* has the parameters \['bandwidth_GBps'\], not \['speed'\]"):
        run(tmp_path / "trials.log", 13, design=Untold("speed"))
    run(tmp_path / "shared.log", 13, synchronous=False, design=Untold("bandwidth_GBps"))
    with pytest.raises(ValueError, match="of which design\\(\\) makes nothing"):
        run(tmp_path / "shared.log", 14, synchronous=False, design=Untold("speed"))


def test_a_study_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path / "trials.log", 13)
    monkeypatch.setattr(sys.modules["memsplit.dse.explore"], "__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"was made with memsplit '.*', not '0.0.1'"):
        run(tmp_path / "trials.log", 14)


def test_a_synchronous_search_is_alone_at_its_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Refused while another lives, in this process or in another of this machine; not when that was killed."""
    storage, tried = tmp_path / "trials.log", []

    def again(machine):
        if not tried:
            tried.append("once")
            with pytest.raises(ValueError, match=f"is being searched by process {os.getpid()}; wait for it, or share it"):
                run(storage, score=Acting(score))
        return score(machine)

    check_same(run(storage, score=Acting(again)), run())
    assert tried
    process = start(tmp_path, tmp_path / "others.log", "frame.csv", seconds=0.2)
    try:
        wait_for(lambda: begun(tmp_path / "log") >= 2)
        with pytest.raises(ValueError, match=f"is being searched by process {process.pid};") as refusal:
            run(tmp_path / "others.log", score=LoggedScore(tmp_path / "log"))
        assert "\n" not in str(refusal.value)
    finally:
        process.kill()
        process.wait()
    check_same(run(tmp_path / "others.log", score=LoggedScore(tmp_path / "log")), run())
    assert capsys.readouterr().err == ""


def test_a_search_that_another_machine_has_not_left_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = []

    def from_elsewhere(machine):
        if not calls:
            calls.append("once")
            with monkeypatch.context() as patched:
                patched.setattr("socket.gethostname", lambda: "elsewhere")
                run(tmp_path / "trials.log", 13, score=Acting(score))
        return score(machine)

    run(tmp_path / "trials.log", 13, score=Acting(from_elsewhere))
    assert f"trials.log was not left by a process on {socket.gethostname()}; if it lives, stop one" in capsys.readouterr().err
