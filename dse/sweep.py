"""Price whole tables of designs, in chunks: in this process, in several, or on a Dask cluster, with a file for each finished chunk.

Chunks are independent, and their results are put together in the order of the designs, so that the table is the same, to the last bit,
however many workers priced it and however often it was stopped and resumed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from .. import __version__
from ._chunks import ArrayScore, Columns, Designs, Grid, Job, Priced, Sobol, Table, front, identity, load, minimised, save
from .pareto import Objective, check_objectives
from .table import Shared, check_writable, replacing, table_writer, to_json

if TYPE_CHECKING:
    import pyarrow
    from distributed import Client

    from .explore import Constraint

__all__ = ["ArrayScore", "Designs", "Grid", "Sobol", "sweep"]

Rows = NDArray[np.int64]

ATTEMPTS = 3
"""How often a chunk may lose the process that prices it."""

_HEADER = "sweep.json"


def sweep(
    designs: pd.DataFrame | pyarrow.Table | Designs,
    score: ArrayScore,
    *,
    chunk: int = 2**16,
    workers: int = 1,
    client: Client | None = None,
    checkpoint: str | Path | None = None,
    keep: Sequence[Objective] | None = None,
    constraints: Sequence[Constraint] = (),
    out: str | Path | None = None,
    progress: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Price ``designs`` with ``score``, ``chunk`` rows at a time, and return one table of their columns and the score's.

    ``designs``: a DataFrame or Arrow table (names differ, nothing is missing, columns hold numbers or texts), or a set that is never
    held whole: ``Grid``, ``Sobol`` or another with ``len()`` and ``columns(start, stop)``. ``score(columns)`` gets a dict of arrays and
    returns another, one value a design, of the same columns for every chunk; rows in which nothing fits have ``feasible`` False.

    ``keep=None`` returns all rows in the order of the designs, index 0, 1, ... With ``keep``, a list of objectives, only the rows that no
    other row dominates, exactly: of those that are feasible and within ``constraints``, best first in the first objective, ties in
    the order of the designs; the index says which row of the designs each is. Memory then holds some chunks and the front. ``out`` writes
    all rows, chunk by chunk, to a CSV or ``.parquet`` file; they are then not returned: the table has the rows of the front, or none.

    ``workers``: processes of this machine; they import ``score``, so it stands in a module, and a script that sweeps does so under
    ``if __name__ == "__main__":``. NumPy prices on one core, so one worker a core. A worker that is killed costs what it was pricing:
    its chunks are priced again, each on its own, and one that loses its worker three times ends the sweep. ``client``: a Dask
    ``distributed.Client``; its workers price the chunks and need memsplit and ``score`` in the same version.

    ``checkpoint``: a folder with a file for each finished chunk, written whole or not at all. The same call goes on where it was stopped,
    by Ctrl-C, a crash or a full disk, with any number of workers; another sweep is refused. The files stay until you remove them.

    ``attrs``: "finished" designs, of them "infeasible", and of the feasible ones "violating" constraints; "settings", for ``write_csv``:
    the score, the set of designs unless it was a table, the objectives, and ``settings``, what else the rows depend on. ``progress``: a
    bar on stderr; None: if stderr is a terminal.
    """
    job = Job(
        score=score, keep=None if keep is None else tuple(keep), constraints=tuple(constraints), whole=keep is None or out is not None
    )
    _check(job, chunk, workers, client)
    rows = _designs(designs)
    recorded = _recorded(rows, job) | dict(settings or {})
    if out is not None:
        check_writable(out)
    parts = _identities(rows, job, chunk, settings) if checkpoint is not None else {}
    task = _Task(job=job, designs=rows, chunk=chunk, folder=_opened(checkpoint, parts), key=_hash(parts))
    total = _Total(job=job, out=out is not None)
    try:
        with ExitStack() as stack:
            write = stack.enter_context(table_writer(out, recorded)) if out is not None else None
            bar = stack.enter_context(tqdm(total=len(rows), unit="design", disable=None if progress is None else not progress))
            if client is not None:
                chunks = _parallel(task, _Dask(task, client))
            elif workers > 1 and task.number > 1:
                chunks = _parallel(task, _Pool(task, min(workers, task.number)))
            else:
                chunks = _serial(task)
            for priced in stack.enter_context(closing(chunks)):
                total.add(priced)
                if write is not None:
                    write(pd.DataFrame(priced.columns))
                bar.update(priced.stop - priced.start)
    except KeyboardInterrupt:
        kept = f"{sum(map(task.stored, range(task.number)))} of {task.number} chunks are kept in {task.folder}"
        way = "nothing is kept, since it has no checkpoint" if task.folder is None else f"{kept}, and the same call goes on from there"
        print(f"sweep: interrupted; {way}", file=sys.stderr)
        raise
    if task.folder is not None:
        for left in task.folder.glob(".*.part"):  # of workers that were killed while they wrote
            left.unlink(missing_ok=True)
    frame = total.frame()
    frame.attrs |= {"finished": len(rows), "infeasible": total.infeasible, "violating": total.violating, "settings": Shared(recorded)}
    return frame


def _check(job: Job, chunk: int, workers: int, client: Client | None) -> None:
    if not callable(job.score):
        raise ValueError(f"score must be a function of a dict of arrays, not a {type(job.score).__name__}")
    for name, value in (("chunk", chunk), ("workers", workers)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if client is not None and workers > 1:
        raise ValueError(f"a client has its own workers, so workers must stay 1, not {workers}; leave out one of them")
    if job.keep is not None:
        check_objectives(job.keep)
    elif job.constraints:
        raise ValueError("constraints choose among the rows that are kept; name objectives to keep rows by, as in keep=[Objective(...)]")


def _designs(designs: Any) -> Designs:
    if hasattr(designs, "to_pandas"):  # Arrow
        designs = designs.to_pandas()
    if isinstance(designs, pd.DataFrame):
        return Table.of(designs)
    if not callable(getattr(designs, "columns", None)) or not hasattr(designs, "__len__"):
        raise ValueError(f"designs must be a DataFrame, an Arrow table, a Grid or a Sobol, not a {type(designs).__name__}")
    if not len(designs):
        raise ValueError("designs are empty; give at least one row")
    return designs


def _recorded(designs: Designs, job: Job) -> dict[str, Any]:
    """What the rows depend on, as far as it can be written beside a table: the score, and by name one that is not of memsplit."""
    found: dict[str, Any] = {"score": job.score, "objectives": job.keep, "constraints": job.constraints or None}
    if not isinstance(designs, Table):
        found["designs"] = designs
    for name, value in found.items():
        try:
            to_json(value)
        except ValueError:
            found[name] = getattr(value, "__qualname__", type(value).__qualname__)
    return {name: value for name, value in found.items() if value is not None}


def _identities(designs: Designs, job: Job, chunk: int, settings: Mapping[str, Any] | None) -> dict[str, str]:
    """A hash of everything that a chunk's file depends on."""
    parts = {
        "memsplit": __version__,
        "designs": designs,
        "score": job.score,
        "chunk": chunk,
        "keep": job.keep,
        "constraints": job.constraints,
        "rows kept": job.whole,
        "settings": settings,
    }
    return {name: _hash(identity(value)) for name, value in parts.items()}


def _hash(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _opened(checkpoint: str | Path | None, parts: dict[str, str]) -> Path | None:
    """The folder of this sweep's chunks, made if it is not there; ValueError if it is of another one."""
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    header = folder / _HEADER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(folder) if not name.endswith(".part")]
        if others and _HEADER not in others:
            raise ValueError(f"{folder} is no checkpoint of a sweep, but holds {sorted(others)[0]!r}; choose another folder")
        if not others:
            with replacing(header, otherwise="choose another checkpoint") as temporary:
                temporary.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        found = json.loads(header.read_text(encoding="utf-8"))
        different = [name for name in parts if found.get(name) != parts[name]]
    except OSError as error:
        raise ValueError(f"cannot use {folder} as checkpoint: {error.strerror or error}; choose another folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise ValueError(f"cannot use {folder} as checkpoint: its {_HEADER} is damaged; remove the folder or choose another") from None
    if different:
        raise ValueError(
            f"checkpoint {folder} belongs to another sweep: its {' and '.join(different)} differ; choose another folder, or remove this one"
        )
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """The chunks of a sweep by their number, and their files in ``folder``."""

    job: Job
    designs: Designs
    chunk: int
    folder: Path | None
    key: str

    @property
    def number(self) -> int:
        return -(-len(self.designs) // self.chunk)

    def bounds(self, number: int) -> tuple[int, int]:
        return number * self.chunk, min((number + 1) * self.chunk, len(self.designs))

    def part(self, number: int) -> Designs:
        """Designs that hold the rows of one chunk: all that its worker needs."""
        start, stop = self.bounds(number)
        return Table(arrays=self.designs.columns(start, stop), first=start) if isinstance(self.designs, Table) else self.designs

    def path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"rows{self.bounds(number)[0]:012d}.npz"

    def stored(self, number: int) -> bool:
        path = self.path(number)
        return path is not None and path.exists()

    def load(self, number: int) -> Priced | None:
        path = self.path(number)
        return None if path is None else load(path, self.key)

    def price(self, number: int) -> Priced:
        return _price(self.job, self.designs, *self.bounds(number), self.path(number), self.key)


def _price(job: Job, designs: Designs, start: int, stop: int, path: Path | None, key: str) -> Priced:
    """Price a chunk and write its file: what a worker does."""
    priced = job.price(designs, start, stop)
    if path is not None:
        save(path, key, priced)
    return priced


class _Total:
    """The rows of the chunks so far; of a front, those that may still be on it."""

    def __init__(self, *, job: Job, out: bool) -> None:
        self.job, self.out = job, out
        self.infeasible = self.violating = 0
        self.types: tuple[tuple[str, str], ...] = ()
        self.pieces: list[tuple[Columns, Rows]] = []
        self.pending, self.limit = 0, 0

    def add(self, priced: Priced) -> None:
        """The next chunk in the order of the designs."""
        if not self.types:
            self.types = priced.types
        if priced.types != self.types:
            new, old = dict(priced.types), dict(self.types)
            name = next((name for name in (*old, *new) if new.get(name) != old.get(name)), None)
            what = "their order" if name is None else f"{name!r} is {new.get(name, 'missing')}, not {old.get(name, 'missing')}"
            raise ValueError(f"rows {priced.start} to {priced.stop - 1} have other columns than those before: {what}; correct the score")
        self.infeasible += priced.infeasible
        self.violating += priced.violating
        rows = priced.start + (np.arange(priced.stop - priced.start) if priced.front is None else priced.front)
        if priced.front is None and not self.out:
            self.pieces.append((priced.columns, rows))
        elif priced.front is None:
            self.pieces = [({name: array[:0] for name, array in priced.columns.items()}, rows[:0])]
        else:
            self.pieces.append(({n: array[priced.front] for n, array in priced.columns.items()} if self.out else priced.columns, rows))
            self.pending += len(rows)
            if self.pending > self.limit:  # seldom enough that merging costs less than pricing
                self.pieces = [self._merged()]
                self.pending, self.limit = 0, 100_000 + 2 * len(self.pieces[0][1])

    def _merged(self) -> tuple[Columns, Rows]:
        columns = {name: np.concatenate([columns[name] for columns, _ in self.pieces]) for name, _ in self.types}
        rows = np.concatenate([rows for _, rows in self.pieces])
        if self.job.keep is None:
            return columns, rows
        on = front(columns, self.job.keep, np.ones(len(rows), dtype=np.bool_))
        return {name: array[on] for name, array in columns.items()}, rows[on]

    def frame(self) -> pd.DataFrame:
        """All rows in order, or the front, best first."""
        columns, rows = self._merged()
        if self.job.keep is None:
            return pd.DataFrame(columns)
        order = np.lexsort((rows, *minimised(columns, self.job.keep).T[::-1]))
        return pd.DataFrame({name: array[order] for name, array in columns.items()}, index=rows[order])


class _Pool:
    """Processes of this machine: one future a chunk, and a new pool when a worker dies."""

    lost: type[BaseException] = BrokenProcessPool
    attempts = ATTEMPTS
    way_out = "make chunk smaller if it needs more memory than there is"

    def __init__(self, task: _Task, workers: int) -> None:
        self.task, self.workers, self.ahead = task, workers, 2 * workers
        self.executor = self._started()

    def _started(self) -> ProcessPoolExecutor:
        # Forks of this process may hang, as it may have threads; those of a server that has only imported memsplit start at once.
        server = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            context.set_forkserver_preload([f"{__package__}._chunks"])
        return ProcessPoolExecutor(self.workers, mp_context=context, initializer=_stay_with_parent)

    def restart(self) -> None:
        """A new pool. A worker dies as well when it cannot import the score, or the script: ValueError if that was it."""
        score = self.task.job.score
        what = score if hasattr(score, "__qualname__") else type(score)
        for attempt in range(2):
            self.executor.shutdown(cancel_futures=True)
            self.executor = self._started()
            try:
                reason = self.executor.submit(_import_error, what.__module__, what.__qualname__).result()
                break
            except BrokenProcessPool:
                if attempt:
                    raise ValueError(
                        'no other process could be started; a script must sweep under if __name__ == "__main__":, or with workers=1'
                    ) from None
        if reason:
            raise ValueError(f"the score cannot be imported by other processes ({reason}); define it in a module, or take workers=1")

    def submit(self, number: int) -> Future[Priced]:
        task = self.task
        return self.executor.submit(_price, task.job, task.part(number), *task.bounds(number), task.path(number), task.key)

    def wait(self, futures: Collection[Future[Priced]]) -> Collection[Future[Priced]]:
        return wait_for(futures, return_when=FIRST_COMPLETED).done

    def received(self, number: int, priced: Priced) -> None:
        """The worker has written the file."""

    def close(self, futures: Collection[Future[Priced]]) -> None:
        """Chunks that are being priced are finished, and their files written."""
        self.executor.shutdown(cancel_futures=True)


class _Dask:
    """Workers of a Dask cluster: the scheduler gives a lost worker's chunks to others; this process writes the files."""

    attempts = 1  # the scheduler has made its own
    way_out = "make chunk smaller if it needs more memory than a worker has"

    def __init__(self, task: _Task, client: Client) -> None:
        from distributed import KilledWorker

        self.task, self.client = task, client
        self.lost: type[BaseException] = KilledWorker
        self.ahead = max(4, 2 * sum(client.nthreads().values()))  # type: ignore[no-untyped-call]

    def restart(self) -> None:
        """Nothing to do."""

    def submit(self, number: int) -> Any:
        task = self.task
        return self.client.submit(_price, task.job, task.part(number), *task.bounds(number), None, "", pure=False)

    def wait(self, futures: Collection[Any]) -> Collection[Any]:
        from distributed import wait

        return wait(list(futures), return_when="FIRST_COMPLETED").done  # type: ignore[no-untyped-call]

    def received(self, number: int, priced: Priced) -> None:
        """Write the file: workers of another machine may not see the folder."""
        if priced.version != __version__:
            raise ValueError(f"a Dask worker has memsplit {priced.version}, and this process {__version__}; install one version everywhere")
        if (path := self.task.path(number)) is not None:
            save(path, self.task.key, priced)

    def close(self, futures: Collection[Any]) -> None:
        self.client.cancel(list(futures))  # type: ignore[no-untyped-call]


def _import_error(module: str, name: str) -> str:
    """Why this process cannot import ``name`` from ``module``; "" if it can."""
    try:
        attrgetter(name)(importlib.import_module(module))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _stay_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, which lets chunks be finished, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Flights:
    """Chunks on their way through an engine. Few are asked for at once, so that few results wait for their turn."""

    def __init__(self, task: _Task, engine: _Pool | _Dask) -> None:
        self.task, self.engine = task, engine
        self.waiting = deque(number for number in range(task.number) if not task.stored(number))
        self.missing = frozenset(self.waiting)
        self.alone: deque[int] = deque()  # all that was asked for when a worker died: priced one by one, to tell which kills workers
        self.losses: Counter[int] = Counter()
        self.flying: dict[Any, int] = {}
        self.ready: dict[int, Priced] = {}

    def advance(self, turn: int) -> bool:
        """Ask for what may be asked for, and wait for something, unless chunk ``turn`` is there: whether it is still to come."""
        while (number := self._next(turn)) is not None:
            try:
                self.flying[self.engine.submit(number)] = number
            except self.engine.lost:  # a worker died with nothing to do; what was asked for before is found to be lost below
                (self.alone if number in self.losses else self.waiting).appendleft(number)
                if not self.flying:
                    self.engine.restart()
                break
        if turn not in self.missing or turn in self.ready:
            return False
        done = self.engine.wait(self.flying) if self.flying else ()
        if lost := [number for future in done if not self._landed(future, number := self.flying.pop(future))]:
            self._recover(lost)
        return turn not in self.ready

    def _next(self, turn: int) -> int | None:
        if self.alone:
            return None if self.flying else self.alone.popleft()
        suspect = any(number in self.losses for number in self.flying.values())
        if suspect or not self.waiting or len(self.flying) >= self.engine.ahead or self.waiting[0] >= turn + 4 * self.engine.ahead:
            return None
        return self.waiting.popleft()

    def _landed(self, future: Any, number: int) -> bool:
        try:
            priced = future.result()
        except self.engine.lost:
            return False
        self.engine.received(number, priced)
        self.ready[number] = priced
        self.losses.pop(number, None)
        return True

    def _recover(self, lost: list[int]) -> None:
        """A dead worker takes its pool with it: keep what is finished, and ask for the rest again."""
        lost += [number for future, number in self.flying.items() if not self._landed(future, number)]
        self.flying.clear()
        for number in sorted(lost):
            priced = self.task.load(number)
            if priced is not None:
                self.ready[number] = priced
                continue
            self.losses[number] += 1
            if self.losses[number] >= self.engine.attempts:
                start, stop = self.task.bounds(number)
                times = "" if self.engine.attempts == 1 else f" {self.losses[number]} times"
                raise ValueError(f"rows {start} to {stop - 1} lost the process that priced them{times}: {self.engine.way_out}")
            self.alone.append(number)
        self.engine.restart()


def _serial(task: _Task) -> Generator[Priced, None, None]:
    for number in range(task.number):
        yield task.load(number) or task.price(number)


def _parallel(task: _Task, engine: _Pool | _Dask) -> Generator[Priced, None, None]:
    """The chunks in order."""
    flights = _Flights(task, engine)
    try:
        for turn in range(task.number):
            while flights.advance(turn):
                pass
            priced = flights.ready.pop(turn) if turn in flights.ready else task.load(turn)
            yield priced or task.price(turn)  # a damaged file is priced again, here
    finally:
        engine.close(flights.flying)
