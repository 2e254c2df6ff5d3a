"""Price whole tables of designs, in chunks: in this process, in several, or on a Dask cluster, with a file for each finished chunk.

Chunks are independent, and their results are put together in the order of the designs, so that the table is the same, to the last bit,
however many workers priced it and however often it was stopped and resumed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from .. import __version__
from ..models.checks import shown, whole
from ._arguments import check_function, check_path, check_settings, constraints_of, objectives_of
from ._chunks import ArrayScore, Columns, Designs, Grid, Job, Priced, Sobol, Table, front, minimised
from ._engines import Dask, Pool, Task, parallel, serial
from ._identity import digest
from ._workers import check_sendable
from .pareto import Objective
from .table import Shared, check_writable, replacing, table_writer, to_json

if TYPE_CHECKING:
    import pyarrow
    from distributed import Client

    from .explore import Constraint

__all__ = ["ArrayScore", "Designs", "Grid", "Sobol", "sweep"]

Rows = NDArray[np.int64]

_HEADER = "sweep.json"
_OLD = 3600.0  # s after which a half-written file is nobody's: a chunk's is written in less


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
    by Ctrl-C, a crash or a full disk, with any number of workers; another sweep is refused, and a score of which the source, a default
    argument or a constant, function or class that it reaches by name has changed is another. The files stay until you remove them.

    A score may have ``check(columns)``, which raises ValueError for designs that it would refuse: it is called before the first chunk,
    with all rows of a table, every value of a ``Grid``, or the first thousand rows of another set. A "row N" in what a score raises is
    counted in the columns that it was given, and named as the row of the designs that it is.

    ``attrs``: "finished" designs, of them "infeasible", and of the feasible ones "violating" constraints; "settings", for ``write_csv``:
    the score, the names of the designs' columns, the set of designs unless it was a table, the objectives, and ``settings``, what else
    the rows depend on. ``progress``: a bar on stderr; None: if stderr is a terminal.
    """
    chunk, workers = whole("sweep", "chunk", chunk, "designs"), whole("sweep", "workers", workers, "processes")
    job = _job(score, keep, constraints, out)
    _check(job, workers, client, checkpoint, out, settings)
    rows = _designs(designs)
    job.check(rows)
    recorded = _recorded(rows, job) | dict(settings or {})
    if out is not None:
        check_writable(out)
    parts = _identities(rows, job, chunk, settings) if checkpoint is not None else {}
    task = Task(job=job, designs=rows, chunk=chunk, folder=_opened(checkpoint, parts), key=digest(parts))
    total = _Total(job=job, out=out is not None)
    try:
        with ExitStack() as stack:
            write = stack.enter_context(table_writer(out, recorded)) if out is not None else None
            bar = stack.enter_context(tqdm(total=len(rows), unit="design", disable=None if progress is None else not progress))
            if client is not None:
                chunks = parallel(task, Dask(task, client))
            elif workers > 1 and task.number > 1:
                chunks = parallel(task, Pool(task, min(workers, task.number)))
            else:
                chunks = serial(task)
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
        _tidy(task.folder)
    frame = total.frame()
    frame.attrs |= {"finished": len(rows), "infeasible": total.infeasible, "violating": total.violating, "settings": Shared(recorded)}
    return frame


def _job(score: Any, keep: object, constraints: object, out: object) -> Job:
    check_function("score", score, "a dict of arrays")
    kept, limits = None if keep is None else objectives_of("keep", keep), constraints_of(constraints)
    if limits and kept is None:
        raise ValueError("constraints choose among the rows that are kept; name objectives to keep rows by, as in keep=[Objective(...)]")
    return Job(score=score, keep=kept, constraints=limits, whole=kept is None or out is not None)


def _check(job: Job, workers: int, client: object, checkpoint: object, out: object, settings: object) -> None:
    if client is not None and workers > 1:
        raise ValueError(f"a client has its own workers, so workers must stay 1, not {workers}; leave out one of them")
    if client is not None and not (hasattr(client, "submit") and hasattr(client, "nthreads")):
        raise ValueError(f"client must be a distributed.Client of Dask, not {shown(client)}")
    check_path("checkpoint", checkpoint)
    check_path("out", out)
    check_settings(settings)
    if workers > 1:
        check_sendable("score", job.score, job.score if hasattr(job.score, "__qualname__") else type(job.score))


def _designs(designs: Any) -> Designs:
    if hasattr(designs, "to_pandas"):  # Arrow
        designs = designs.to_pandas()
    if isinstance(designs, pd.DataFrame):
        return Table.of(designs)
    if isinstance(designs, type) or not callable(getattr(designs, "columns", None)) or not hasattr(designs, "__len__"):
        what = f"the class {designs.__name__}" if isinstance(designs, type) else f"a {type(designs).__name__}"
        raise ValueError(f"designs must be a DataFrame, an Arrow table, a Grid or a Sobol, not {what}")
    if not len(designs):
        raise ValueError("designs are empty; give at least one row")
    return designs


def _recorded(designs: Designs, job: Job) -> dict[str, Any]:
    """What the rows depend on, as far as it can be written beside a table: the score, and by name one that is not of memsplit.

    ``columns``: the names of the designs' columns, so that a table that has lost one is known.
    """
    found: dict[str, Any] = {"score": job.score, "objectives": job.keep, "constraints": job.constraints or None}
    found["columns"] = list(designs.axes if isinstance(designs, Grid | Sobol) else designs.columns(0, 1))
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
    return {name: digest(value) for name, value in parts.items()}


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


def _tidy(folder: Path) -> None:
    """Remove what workers that were killed were writing; another sweep may be writing there, too."""
    for left in folder.glob(".*.part"):
        number = left.name.split(".")[-2]
        try:
            if time.time() - left.stat().st_mtime < _OLD and number.isdecimal():
                os.kill(int(number), 0)
                continue
        except (ProcessLookupError, FileNotFoundError, OverflowError):
            pass  # nobody writes it
        except PermissionError:  # a process of another user
            continue
        left.unlink(missing_ok=True)


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
