"""What prices the chunks of a sweep: this process, others of this machine, or a Dask cluster; results come in the order of the designs."""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ._chunks import Designs, Job, Priced, Table, load, save
from ._workers import begin, out_of_reach

if TYPE_CHECKING:
    from distributed import Client

ATTEMPTS = 3
"""How often a chunk may lose the process that prices it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
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
        return None if path is None else load(path, self.key, *self.bounds(number), self.job)

    def price(self, number: int) -> Priced:
        return _price(self.job, self.designs, *self.bounds(number), self.path(number), self.key)


def _price(job: Job, designs: Designs, start: int, stop: int, path: Path | None, key: str) -> Priced:
    """Price a chunk and write its file: what a worker does."""
    priced = job.price(designs, start, stop)
    if path is not None:
        save(path, key, priced)
    return priced


STARTS = 4
"""How often processes are started anew before a sweep gives up."""


class Pool:
    """Processes of this machine: one future a chunk, and a new pool when a worker dies."""

    lost: type[BaseException] = BrokenProcessPool
    attempts = ATTEMPTS
    way_out = "make chunk smaller if it needs more memory than there is"

    def __init__(self, task: Task, workers: int) -> None:
        self.task, self.workers, self.ahead = task, workers, 2 * workers
        self.executor = self._started()

    def _started(self) -> ProcessPoolExecutor:
        # Forks of this process may hang, as it may have threads; those of a server that has only imported memsplit start at once.
        server = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            context.set_forkserver_preload([f"{__package__}._chunks"])
        return ProcessPoolExecutor(self.workers, mp_context=context, initializer=begin)

    def restart(self) -> None:
        """A new pool. A worker dies as well when it cannot import the score, or the script: ValueError if that was it."""
        score = self.task.job.score
        what = score if hasattr(score, "__qualname__") else type(score)
        for attempt in range(STARTS):
            time.sleep(0.3 * attempt)  # a server that is dying needs a moment
            self.executor.shutdown(cancel_futures=True)
            self.executor = self._started()
            try:
                reason = self._asked(_import_error, what.__module__, what.__qualname__).result()
                break
            except BrokenProcessPool:
                if attempt == STARTS - 1:
                    raise ValueError(
                        'no other process could be started; a script must sweep under if __name__ == "__main__":, or with workers=1'
                    ) from None
        if reason:
            raise ValueError(f"the score cannot be imported by other processes ({reason}); define it in a module, or take workers=1")

    def submit(self, number: int) -> Future[Priced]:
        task = self.task
        return self._asked(_price, task.job, task.part(number), *task.bounds(number), task.path(number), task.key)

    def _asked(self, function: Callable[..., Any], *given: Any) -> Future[Any]:
        """Start what may start a process; BrokenProcessPool, too, if it is the server of processes that was killed."""
        try:
            with out_of_reach():
                return self.executor.submit(function, *given)
        except (EOFError, ConnectionError) as error:
            raise BrokenProcessPool("the server that starts processes is gone") from error

    def wait(self, futures: Collection[Future[Priced]]) -> Collection[Future[Priced]]:
        return wait_for(futures, return_when=FIRST_COMPLETED).done

    def received(self, number: int, priced: Priced) -> None:
        """The worker has written the file."""

    def close(self, futures: Collection[Future[Priced]]) -> None:
        """Chunks that are being priced are finished, and their files written."""
        self.executor.shutdown(cancel_futures=True)


class Dask:
    """Workers of a Dask cluster: the scheduler gives a lost worker's chunks to others; this process writes the files."""

    attempts = 1  # the scheduler has made its own
    way_out = "make chunk smaller if it needs more memory than a worker has"

    def __init__(self, task: Task, client: Client) -> None:
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


class _Flights:
    """Chunks on their way through an engine. Few are asked for at once, so that few results wait for their turn."""

    def __init__(self, task: Task, engine: Pool | Dask) -> None:
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


def serial(task: Task) -> Generator[Priced, None, None]:
    for number in range(task.number):
        yield task.load(number) or task.price(number)


def parallel(task: Task, engine: Pool | Dask) -> Generator[Priced, None, None]:
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
