"""Where a search keeps its trials so that it can be stopped, resumed and shared: Optuna's storages, opened with care."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np

from .pareto import Objective
from .table import to_json

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

TRIAL, SCORE, WORKER, ABOUT = "memsplit:trial", "memsplit:score", "memsplit:worker", "memsplit"
"""Attributes that we keep: a trial's number in its search, its score, who prices it; and what the study is about."""

_HOLDER = "memsplit:holder"  # the process of a synchronous search: machine, process, when it started; empty when it has ended
_HASHED = ("settings", "score", "design")  # of these a study keeps a hash, which tells a reader nothing

_VENDORS = ("sqlalchemy", "sqlite3", "psycopg", "psycopg2", "pymysql", "MySQLdb", "grpc", "redis", "alembic")
_DAMAGE = (KeyError, IndexError, TypeError, AttributeError, AssertionError, UnicodeDecodeError, RuntimeError)
_CONNECT = 10  # s to reach a server
_GRACE = 10  # s after which the lock of a journal is that of a killed process: it is held for one write of some milliseconds


def open_storage(storage: str | Path | BaseStorage) -> tuple[BaseStorage, str]:
    """Optuna's storage, and where it is, which only ``public`` may show to a reader.

    A path: a journal file. ``grpc://host:port``: Optuna's proxy. Any other URL: a database. ValueError, in one sentence, if it cannot be
    reached or used.
    """
    from optuna.storages import BaseStorage

    if isinstance(storage, BaseStorage):
        return storage, type(storage).__name__
    if not isinstance(storage, str | Path) or not str(storage):
        raise ValueError(f"storage must be a path, a URL or a storage of Optuna's, not {storage!r}")
    where = str(storage)
    with reaching(where, opening=True):
        if isinstance(storage, Path) or "://" not in where:
            return _journal(Path(where)), where
        return (_proxy(where) if where.startswith("grpc://") else _database(where)), where


@contextmanager
def reaching(where: str, *, files: bool = True, opening: bool = False) -> Iterator[None]:
    """Errors of the storage at ``where`` become a ValueError of one sentence without its password.

    ``files=False`` leaves alone what the user's own code may raise as well: errors of files and of imports. While it is ``opening``,
    when no code of the user's runs, so does whatever Optuna raises when it reads a damaged journal.
    """
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except Exception as error:
        theirs = type(error).__module__.partition(".")[0] in _VENDORS
        others = (StorageInternalError, OSError, ImportError, json.JSONDecodeError) if files else (StorageInternalError,)
        damaged = isinstance(error, json.JSONDecodeError) or (opening and isinstance(error, _DAMAGE))
        if not theirs and not damaged and not isinstance(error, others):
            raise
        cause: Any = getattr(error, "orig", None) or error
        details = getattr(cause, "details", None)
        said = details() if callable(details) else getattr(cause, "strerror", None) or str(cause)
        reason = next((line.strip() for line in str(said).splitlines() if line.strip()), type(error).__name__)
        if damaged:
            reason = f"it is damaged: {type(error).__name__}: {reason}"
        for word in _secrets(where):
            reason = reason.replace(word, "***")
        raise ValueError(
            f"storage {public(where)} cannot be reached or used ({reason[:200]}); start or correct it, or name another"
        ) from None


def open_study(storage: BaseStorage, where: str, name: str, objectives: Sequence[Objective], about: Mapping[str, Any]) -> Study:
    """The study of this name, made if there is none; ValueError if there is one about something else.

    ``about``: plain data by the words that a message uses for it. An ``about["mode"]`` of "asynchronous" takes over a study of any mode
    and has nothing to do with seed, sampler and population.
    """
    import optuna

    ours = json.loads(json.dumps({"objectives": [[o.name, o.direction] for o in objectives], **about}))
    with reaching(where, opening=True):
        study = optuna.create_study(
            storage=storage, study_name=name, directions=[objective.direction for objective in objectives], load_if_exists=True
        )
        theirs: Any = study.user_attrs.get(ABOUT)
        if theirs is None and (
            study.trials or [direction.name.lower() for direction in study.directions] != [o[1] for o in ours["objectives"]]
        ):
            raise ValueError(f"study {name!r} in {public(where)} is there and was not made by explore(); choose another name")
        for key in [] if theirs is None else ours:
            if theirs.get(key) == ours[key] or (ours["mode"] == "asynchronous" and key in ("mode", "seed", "sampler", "population")):
                continue
            if key == "memsplit" and key not in theirs:
                raise ValueError(f"study {name!r} in {public(where)} was recorded, or made by an older memsplit; choose another name")
            what = f"{key} {_plain(theirs.get(key))}, not {_plain(ours[key])}"
            if key in _HASHED:
                what = "other settings than these" if key == "settings" else f"another {key} than this"
            raise ValueError(f"study {name!r} in {public(where)} was made with {what}; choose another name, or the same {key}")
        if theirs != ours:
            study.set_user_attr(ABOUT, ours)
    return study


def settings_key(settings: Mapping[str, Any]) -> str:
    """A hash of what the rows depend on beside their parameters; ValueError if it is no plain data or values of memsplit."""
    return hashlib.sha256(json.dumps(to_json(dict(settings)), sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def plain_score(score: Mapping[str, Any]) -> dict[str, Any]:
    """The score as it comes back from a storage; ValueError for what a storage cannot hold."""
    try:
        return json.loads(json.dumps(dict(score), default=_item))
    except TypeError as error:
        raise ValueError(f"a storage holds numbers, texts and lists only, so score() must not return others: {error}") from None


@dataclass(frozen=True, slots=True)
class Record:
    """The finished trials of a synchronous search in a storage, by their number in the search."""

    study: Study
    where: str
    known: Mapping[int, FrozenTrial]

    @classmethod
    def of(cls, study: Study, where: str) -> Record:
        """What the storage has: of trials with one number, which two searches at once can make, the first."""
        with reaching(where, opening=True):
            trials = study.get_trials(deepcopy=False)
        known: dict[int, FrozenTrial] = {}
        for trial in trials:
            if TRIAL in trial.user_attrs and SCORE in trial.user_attrs:  # one without a score is of a damaged journal
                known.setdefault(trial.user_attrs[TRIAL], trial)
        return cls(study, where, known)

    def score_of(self, trial: Trial) -> tuple[bool, dict[str, Any] | None]:
        """Whether the trial is known, and its score; ValueError if the known one has other parameters."""
        known = self.known.get(trial.number)
        if known is None:
            return False, None
        if known.params != trial.params:
            same = known.params.keys() == trial.params.keys()
            what = "other values of its parameters" if same else f"the parameters {list(known.params)}, not {list(trial.params)}"
            raise ValueError(
                f"trial {trial.number} of study {self.study.study_name!r} in {public(self.where)} has {what}; "
                "choose another name, give the sampler a seed, or go on with synchronous=False"
            )
        return True, known.user_attrs[SCORE]

    def add(self, trial: Trial, score: dict[str, Any] | None, values: Sequence[float] | None, constraints: Mapping[str, float]) -> None:
        """Keep a finished trial, in one write."""
        from optuna.trial import TrialState, create_trial

        kept = create_trial(
            state=TrialState.FAIL if score is None else TrialState.COMPLETE,
            values=None if score is None else values,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={TRIAL: trial.number, SCORE: score},
            system_attrs={f"constraints:{name}": value for name, value in constraints.items()},
        )
        with reaching(self.where):
            self.study.add_trial(kept)


_HELD: set[tuple[str, str]] = set()  # studies that synchronous searches of this process are at


class Alone:
    """A synchronous search as the only one of its study: ValueError if another process of this machine is at it.

    Of a process on another machine nobody can tell at once whether it lives, so that it is only warned of, on stderr.
    """

    def __init__(self, study: Study, where: str) -> None:
        self._study, self._where = study, where
        self._key = (where, study.study_name)

    def __enter__(self) -> Alone:
        ours, what = _process(os.getpid()), f"study {self._study.study_name!r} in {public(self._where)}"
        with reaching(self._where):
            theirs = self._study.user_attrs.get(_HOLDER)
            if theirs and theirs[0] != ours[0]:
                print(f"explore: {what} was not left by a process on {theirs[0]}; if it lives, stop one of the two", file=sys.stderr)
            elif theirs and (self._key in _HELD if theirs == ours else theirs[2] and theirs == _process(theirs[1])):
                raise ValueError(f"{what} is being searched by process {theirs[1]}; wait for it, or share it with synchronous=False")
            self._study.set_user_attr(_HOLDER, ours)
        _HELD.add(self._key)
        return self

    def __exit__(self, *_: object) -> None:
        _HELD.discard(self._key)
        with suppress(Exception):  # a storage that is gone has said so already
            self._study.set_user_attr(_HOLDER, [])


def _process(number: int) -> list[Any]:
    """[machine, number, a word of a living process that no other has]; the word is "" if it is dead, and unknown without /proc."""
    try:  # the clock ticks at which it started
        word = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        word = ""
    return [socket.gethostname(), number, word]


class Presence:
    """Signs of life of one process in a study, and which others gave none for ``patience`` seconds of this process's clock.

    Optuna's own heartbeat is for databases only and does not go with ask and tell. Clocks of different machines are not compared.
    """

    def __init__(self, study: Study, patience: float) -> None:
        self.name = uuid.uuid4().hex[:12]
        self._study, self._patience = study, patience
        self._seen: dict[str, tuple[Any, float]] = {}
        self._gone = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Presence:
        self._say(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.set()
        self._thread.join()
        try:
            self._say("left")
        except Exception:  # the storage is gone, which another error says
            return

    def dead(self, workers: Collection[str]) -> set[str]:
        """Those of ``workers`` that have left or are silent."""
        if not set(workers) - {self.name}:
            return set()
        signs, now = self._study.user_attrs, time.monotonic()
        dead: set[str] = set()
        for worker in set(workers) - {self.name}:
            sign = signs.get(f"{WORKER}:{worker}")
            last, since = self._seen.setdefault(worker, (sign, now))
            if last != sign:
                self._seen[worker] = (sign, now)
            elif sign == "left" or now - since > self._patience:
                dead.add(worker)
        return dead

    def _say(self, sign: int | str) -> None:
        self._study.set_user_attr(f"{WORKER}:{self.name}", sign)

    def _beat(self) -> None:
        count = 0
        while not self._gone.wait(min(10.0, self._patience / 6)):
            count += 1
            try:
                self._say(count)
            except Exception:  # a database may be back at the next beat; if not, the search itself says so
                continue


def _journal(path: Path) -> BaseStorage:
    """A journal file, whose torn last line, of a process killed while it wrote, is cut off before anything is read or appended."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class MendedFile(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            if _is_torn(file):
                self.mend()
            JournalFileBackend.append_logs(self, logs)

        def mend(self) -> None:
            lock.acquire()
            try:
                if _is_torn(file):
                    _cut(file)
            finally:
                lock.release()

    path = Path(os.path.abspath(path))  # the search may change its folder
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(None, "it is a folder" if path.is_dir() else f"there is no folder {path.parent}")
    _check_journal(path)
    file = str(path)
    # Of Optuna's two locks, this one sees when another process has taken over a lock that a killed one left.
    lock = JournalFileOpenLock(file, grace_period=_GRACE)
    backend = MendedFile(file, lock_obj=lock)
    backend.mend()
    try:
        return JournalStorage(backend)
    except ValueError as error:  # of a damaged line; one that is no JSON says so itself
        raise error if isinstance(error, json.JSONDecodeError) else OSError(None, f"it is damaged: {error}") from error


def _check_journal(path: Path) -> None:
    """So that no other file is cut or appended to."""
    if path.exists():
        with path.open("rb") as file:
            head = file.read(10)
        if head != b'{"op_code"'[: len(head)]:
            raise OSError(None, "it is no journal of Optuna")


def _is_torn(path: str) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _cut(path: str) -> None:
    """To the last end of a line. Under the lock nobody is in the middle of one."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def _proxy(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    if find_spec("grpc") is None:
        raise ImportError("grpc:// needs the package grpcio")
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or parts.path.strip("/"):
        raise OSError(None, "a proxy is named grpc://host:port")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls the proxy experimental
        proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=_CONNECT)
    return proxy


def _database(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage

    scheme = urlsplit(url).scheme.partition("+")[0]
    if scheme not in ("postgresql", "mysql", "mariadb", "sqlite"):
        raise OSError(None, "its scheme is none of postgresql, mysql, sqlite, grpc")
    if scheme != "sqlite" and re.search(r"[/@]", url.partition("://")[2].partition("?")[0].rpartition("@")[0]):
        raise OSError(None, "in the password of a URL, / is written %2F, and @ %40")
    for dialect, first, second in (("postgresql", "psycopg", "psycopg2"), ("mysql", "MySQLdb", "pymysql")):
        if urlsplit(url).scheme == dialect and find_spec(first) is None and find_spec(second) is not None:
            url = url.replace(dialect, f"{dialect}+{second}", 1)  # SQLAlchemy tries only the first driver, and which changed with 2.1
    timeout: dict[str, Any] = {} if scheme == "sqlite" else {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT}}
    try:
        return RDBStorage(url, engine_kwargs=timeout)
    except ImportError as error:
        raise ImportError(f"its driver is not installed: {error.__cause__ or error}") from None


def public(text: str) -> str:
    """A storage's name without user, password and query."""
    scheme, separator, rest = text.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if separator else text


def _secrets(text: str) -> list[str]:
    """What of a URL no message may show, the longest first."""
    if "://" not in text:
        return []
    rest = text.partition("://")[2]
    user, _, password = rest.rpartition("@")[0].partition(":")
    words = {user + ":" + password, password, unquote(password)}
    words |= {value for key, value in parse_qsl(rest.partition("?")[2]) if re.search("pass|key|token|secret", key)}
    return sorted((word for word in words if word.strip(":")), key=len, reverse=True)


def _plain(value: object) -> str:
    return json.dumps(value).replace('"', "'")


def _item(value: Any) -> Any:
    """NumPy's scalars as Python's."""
    item: Callable[[], Any] | None = getattr(value, "item", None)
    if item is None or np.ndim(value):
        raise TypeError(f"a {type(value).__name__}")
    return item()
