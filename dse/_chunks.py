"""One chunk of a sweep: where its designs come from, its score, the rows of it that are kept, and the file that keeps them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import __version__
from .pareto import Objective, non_dominated
from .table import replacing

if TYPE_CHECKING:
    from .explore import Constraint

Columns = dict[str, NDArray[Any]]
ArrayScore = Callable[[Columns], Mapping[str, NDArray[Any]]]

_SOBOL_BITS = 30  # of a coordinate, SciPy's default
_LOOKED_AT = 1024  # rows of a set without end that a score may check before the first chunk
_SOBOL_BLOCK = 14  # points are made in aligned blocks of 2**14, which stay in the cache


class Designs(Protocol):
    """A set of designs that need not be held: what ``Grid`` and ``Sobol`` are. ``len(designs)``, and the columns of some rows."""

    def __len__(self) -> int: ...

    def columns(self, start: int, stop: int) -> Columns:
        """The columns of rows ``start`` to ``stop``, the last one excluded: arrays [stop - start]."""
        ...


@dataclass(frozen=True, slots=True)
class Grid:
    """All combinations of the values of some columns, row by row with the last column varying fastest: ``Grid({"batch": [1, 2]})``.

    Only the values are held. A column holds numbers or texts.
    """

    axes: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", {name: _axis(name, values) for name, values in _named("Grid", self.axes).items()})
        if math.prod(map(len, self.axes.values())) >= 2**63:
            raise ValueError("Grid has 2**63 combinations or more, too many to be counted; leave out columns or values")

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    def columns(self, start: int, stop: int) -> Columns:
        """The columns of rows ``start`` to ``stop``."""
        return self._some(np.arange(start, stop))

    def sample(self) -> tuple[NDArray[np.int64], Columns]:
        """Rows in which every value of every column occurs, the others at their first, and their columns."""
        rows, stride = [np.zeros(1, dtype=np.int64)], 1
        for values in reversed(list(self.axes.values())):
            rows.append(np.arange(1, len(values)) * stride)
            stride *= len(values)
        found = np.unique(np.concatenate(rows))
        return found, self._some(found)

    def _some(self, rows: NDArray[np.int64]) -> Columns:
        found: Columns = {}
        for name in reversed(list(self.axes)):
            rows, which = np.divmod(rows, len(self.axes[name]))
            found[name] = _array(self.axes[name])[which]
        return {name: found[name] for name in self.axes}


@dataclass(frozen=True, slots=True)
class Sobol:
    """``number`` scrambled Sobol points: of a column (low, high) numbers in [low, high), of a list of values each as often as the others.

    ``Sobol({"HBM_bandwidth_TBps": (1, 8), "batch": [1, 2, 4]}, number=1000, seed=0)``. The points are SciPy's
    ``scipy.stats.qmc.Sobol(columns, rng=seed)``, made from any row on without those before it. A list is kept as ``((value, ...),)``,
    since files do not tell lists from tuples. A ``number`` that is a power of 2 fills the space most evenly.
    """

    axes: Mapping[str, Sequence[Any]]
    number: int = field(kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        axes = _named("Sobol", self.axes)
        object.__setattr__(self, "axes", {name: _range_or_values(name, values) for name, values in axes.items()})
        if not isinstance(self.number, int) or not 1 <= self.number <= 2**_SOBOL_BITS:
            raise ValueError(f"Sobol: number must be a whole number of at least 1 and at most 2**{_SOBOL_BITS}, not {self.number!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"Sobol: seed must be a whole number of at least 0, not {self.seed!r}")

    def __len__(self) -> int:
        return self.number

    def columns(self, start: int, stop: int) -> Columns:
        """The columns of rows ``start`` to ``stop``."""
        points = _sobol(start, stop, len(self.axes), self.seed, self.number)
        found: Columns = {}
        for place, (name, values) in zip(points, self.axes.items(), strict=True):
            if len(values) == 1:
                found[name] = _array(values[0])[(place * len(values[0])).astype(np.intp)]
            else:
                found[name] = values[0] + place * (values[1] - values[0])
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Rows of a table that is held: ``arrays`` are its columns from row ``first`` on."""

    arrays: Columns
    first: int = 0

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Table:
        """A checked table: different names, at least one row, numbers or texts, nothing missing."""
        names = list(frame.columns)
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"designs: the name of a column must be a text, not {name!r}; rename it")
            if names.count(name) > 1:
                raise ValueError(f"designs have the column {name!r} twice; rename or drop one of them")
        if not names or frame.empty:
            raise ValueError(f"designs are a table of {len(frame)} rows and {len(names)} columns; give at least one of each")
        return cls(arrays={name: _column(name, frame[name]) for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def columns(self, start: int, stop: int) -> Columns:
        """Views of rows ``start`` to ``stop``."""
        return {name: array[start - self.first : stop - self.first] for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """What is left of rows ``start`` to ``stop`` when they are priced: ``columns`` of all of them, or of those on their front.

    ``front``: which rows are on the front of these designs, counted from ``start``, None if no front is asked for. ``infeasible`` and
    ``violating`` count rows; ``version`` is that of the memsplit that priced them.
    """

    start: int
    stop: int
    columns: Columns
    front: NDArray[np.int64] | None
    infeasible: int
    violating: int
    version: str = __version__

    @property
    def types(self) -> tuple[tuple[str, str], ...]:
        """Names and types of the columns, which all chunks must share."""
        return tuple((name, array.dtype.str if array.dtype.kind in "biuf" else "text") for name, array in self.columns.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is done to each chunk: priced by ``score``, and reduced to the front of ``keep`` unless ``whole``."""

    score: ArrayScore
    keep: tuple[Objective, ...] | None
    constraints: tuple[Constraint, ...]
    whole: bool

    def check(self, designs: Designs) -> None:
        """Have the score's own ``check(columns)``, if it has one, look at the designs before any is priced.

        At all of a table, at every value of a grid, at the first thousand of others; ValueError names rows of the whole set.
        """
        if not callable(look := getattr(self.score, "check", None)):
            return
        if isinstance(designs, Grid):
            rows, columns = designs.sample()
        else:
            rows = np.arange(len(designs) if isinstance(designs, Table) else min(len(designs), _LOOKED_AT))
            columns = designs.columns(0, len(rows))
        try:
            look(_read_only(columns))
        except Exception as error:
            raise ValueError(f"designs cannot be priced: {_numbered(_said(error), rows)}") from error

    def price(self, designs: Designs, start: int, stop: int) -> Priced:
        """Price rows ``start`` to ``stop``. Whatever goes wrong is a ValueError that names the rows."""
        what = f"rows {start} to {stop - 1} cannot be priced"
        try:
            given = _read_only(designs.columns(start, stop))
            # A copy of the dict: what a score puts into its own, or takes out, does not change the designs.
            scored = self.score(dict(given))
        except Exception as error:
            raise ValueError(f"{what}: {_numbered(_said(error), range(start, stop))}") from error
        try:
            columns = self._checked(given, scored, stop - start)
            good, infeasible, violating = self._counted(columns, start)
            on = None if self.keep is None else front(columns, self.keep, good)
            if on is not None and not self.whole:
                columns = {name: array[on] for name, array in columns.items()}
            columns = {name: _texts(name, array) for name, array in columns.items()}
        except Exception as error:
            raise ValueError(f"{what}: {_said(error)}") from error
        return Priced(start=start, stop=stop, columns=columns, front=on, infeasible=infeasible, violating=violating)

    @property
    def _limited(self) -> tuple[str, ...]:
        """The columns that choose rows, which must hold numbers."""
        return (*(item.name for item in self.keep or ()), *(item.name for item in self.constraints))

    def _checked(self, given: Columns, scored: object, number: int) -> Columns:
        if not isinstance(scored, Mapping):
            raise ValueError(f"score() must return a dict of arrays, not a {type(scored).__name__}")
        columns = dict(given)
        for name, values in scored.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"score() must name its columns with texts, not {name!r}")
            if name in given:
                raise ValueError(f"score() returned the column {name!r}, which the designs have as well; rename it in the score")
            array = np.asarray(values)
            if array.shape != (number,):
                raise ValueError(f"score() must return {number} values as {name!r}, one a design, not an array of shape {array.shape}")
            if array.dtype.kind not in "biufUOT":
                raise ValueError(f"score() must return numbers or texts as {name!r}, not {array.dtype}")
            columns[name] = array
        if "feasible" in columns and columns["feasible"].dtype != np.bool_:
            raise ValueError(f"the column 'feasible' must hold True or False, not {columns['feasible'].dtype}")
        for limited in self._limited:
            if limited not in columns:
                raise ValueError(f"there is no column {limited!r} to keep rows by; columns are {list(columns)}")
            if columns[limited].dtype.kind not in "biuf":
                raise ValueError(f"the column {limited!r} holds texts, and rows can be kept by numbers only")
        return columns

    def _counted(self, columns: Columns, start: int) -> tuple[NDArray[np.bool_], int, int]:
        """Which rows are feasible within the constraints, how many are infeasible, and how many of the others violate a constraint."""
        feasible = columns.get("feasible")
        limited = {name: columns[name] for name in self._limited}
        finite = np.ones(len(next(iter(columns.values()))), dtype=np.bool_)
        for name, array in limited.items():
            finite &= np.isfinite(array)
            # Infinite is the throughput of a machine without limits.
            if feasible is not None and (wrong := np.flatnonzero(feasible & np.isnan(array))).size:
                raise ValueError(f"row {start + wrong[0]} is feasible but has {array[wrong[0]]} as {name!r}; correct the score")
        good = finite if feasible is None else feasible.copy()
        infeasible = int(good.size - np.count_nonzero(good))
        for constraint in self.constraints:
            if constraint.at_most is not None:
                good &= columns[constraint.name] <= constraint.at_most
            if constraint.at_least is not None:
                good &= columns[constraint.name] >= constraint.at_least
        return good, infeasible, int(good.size - infeasible - np.count_nonzero(good))


def minimised(columns: Columns, keep: Sequence[Objective], rows: Any = slice(None)) -> NDArray[np.float64]:
    """The objectives of some rows as an array [rows, objectives] in which less is better."""
    signs = [1.0 if objective.direction == "minimize" else -1.0 for objective in keep]
    return np.stack([columns[item.name][rows] * sign for item, sign in zip(keep, signs, strict=True)], axis=1)


def front(columns: Columns, keep: Sequence[Objective], good: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows among the ``good`` ones that no other good row dominates.

    Most rows of a chunk are far from the front: comparing all of them with a few good rows first leaves little to sort, and drops
    only rows that are dominated.
    """
    rows = np.flatnonzero(good)
    values = minimised(columns, keep, rows)
    if len(rows) > 1000:
        with np.errstate(over="ignore", invalid="ignore"):  # whichever rows come out of this, comparing with them is exact
            scaled = [(column - column.min()) / max(np.ptp(column), np.finfo(np.float64).tiny) for column in values.T]
            total = sum(scaled[1:], scaled[0])
            references = {int(np.argmin(total)), *(int(np.argmin(total + 4 * column)) for column in scaled)}
        for reference in values[sorted(references)]:
            left = np.zeros(len(values), dtype=np.bool_)
            same = np.ones(len(values), dtype=np.bool_)
            for column, value in zip(values.T, reference, strict=True):
                left |= column < value
                same &= column == value
            left |= same
            rows, values = rows[left], values[left]
    return rows[non_dominated(values)].astype(np.int64)


def save(path: Path, key: str, priced: Priced) -> None:
    """Write a chunk to ``path``, whole or not at all: NumPy's ``.npz`` without pickles, texts and counts in a JSON inside."""
    arrays: dict[str, NDArray[Any]] = {} if priced.front is None else {"front": priced.front}
    texts: dict[str, list[str]] = {}
    for number, (name, array) in enumerate(priced.columns.items()):
        if array.dtype.kind not in "biuf":
            array, different = pd.factorize(array)
            texts[name] = list(different)
        arrays[f"column{number}"] = array
    head = {"key": key, "start": priced.start, "stop": priced.stop, "infeasible": priced.infeasible, "violating": priced.violating}
    head |= {"version": priced.version, "columns": list(priced.columns), "texts": texts}
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
    otherwise = "finished chunks are kept there; make room and call again, or choose another checkpoint"
    with replacing(path, otherwise=otherwise) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load(path: Path, key: str, start: int, stop: int, job: Job) -> Priced | None:
    """The chunk of rows ``start`` to ``stop`` at ``path``; None if there is none or it is damaged, ValueError if of another sweep."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            columns = {name: arrays[f"column{number}"] for number, name in enumerate(head["columns"])}
            on = arrays.get("front")
        for name, different in head["texts"].items():
            columns[name] = np.array([*different, None], dtype=object)[columns[name]]
        found = {name: head[name] for name in ("start", "stop", "infeasible", "violating", "version")}
        theirs = head["key"]
        shapes = {array.shape for array in columns.values()}
        fits = (found["start"], found["stop"], on is None) == (start, stop, job.keep is None)
        fits &= shapes == {(stop - start,) if on is None or job.whole else on.shape}
    except Exception:  # NumPy and zipfile raise about anything for a file of damaged bytes
        return None
    if theirs != key:
        raise ValueError(f"{path} belongs to another sweep; choose another checkpoint folder, or remove this one")
    return Priced(columns=columns, front=on, **found) if fits else None


def _read_only(columns: Columns) -> Columns:
    """Views that a score cannot write to: it would change the designs of others."""
    found = {name: np.asarray(array).view() for name, array in columns.items()}
    for array in found.values():
        array.flags.writeable = False
    return found


def _said(error: Exception) -> str:
    """What an error of a score says, on one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def _numbered(said: str, rows: Sequence[int] | NDArray[np.int64]) -> str:
    """A score counts the rows that it was given; a reader looks for them in the whole table, where they are ``rows``."""

    def place(match: re.Match[str]) -> str:
        return f"row {rows[int(match[1])]}" if len(match[1]) < 19 and int(match[1]) < len(rows) else match[0]

    return re.sub(r"\brow (\d+)\b", place, said)


def _named(what: str, axes: object) -> dict[str, Any]:
    if not isinstance(axes, Mapping) or not axes:
        raise ValueError(f"{what} needs a dict with the values of at least one column, not {axes!r}")
    for name in axes:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what}: the name of a column must be a text, not {name!r}")
    return dict(axes)


def _axis(name: str, values: Any) -> tuple[Any, ...]:
    """Values of one column as plain numbers or texts."""
    if isinstance(values, str) or not np.iterable(values):
        raise ValueError(f"column {name!r} needs a list of values, not {values!r}")
    items = tuple(value.item() if isinstance(value, np.generic) else value for value in values)
    if not items:
        raise ValueError(f"column {name!r} has no values; give at least one or leave it out")
    texts = [isinstance(item, str) for item in items]
    for number, item in enumerate(items):
        if not isinstance(item, str | bool | int | float) or item != item:
            raise ValueError(f"column {name!r} must hold numbers or texts, not {item!r} as value {number}; correct or drop it")
    if any(texts) and not all(texts):
        raise ValueError(f"column {name!r} holds numbers and texts; make it one of them")
    if not texts[0]:
        array = np.array(items)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"column {name!r} holds whole numbers of more than 64 bits; make them floats")
        whole = [item for item in items if isinstance(item, int)]
        rounded = [item for item in whole if float(item) != item or len(whole) == len(items)] if array.dtype.kind == "f" else []
        if rounded:
            raise ValueError(f"column {name!r} holds {max(rounded, key=abs)}, which other values make a rounded float; make all floats")
    return items


def _range_or_values(name: str, values: Any) -> tuple[Any, ...]:
    """(low, high), or ((value, ...),)."""
    if isinstance(values, tuple) and len(values) == 1 and isinstance(values[0], tuple):
        return (_axis(name, values[0]),)
    if not isinstance(values, tuple) or len(values) != 2:
        return (_axis(name, values),)
    low, high = _axis(name, values)
    if isinstance(low, str) or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"column {name!r} needs a range (low, high) of finite numbers with low below high, or a list, not {values!r}")
    if not math.isfinite(float(high) - float(low)):
        raise ValueError(f"column {name!r}: the range {values!r} is wider than the largest number, 1.8e308; make it narrower")
    return float(low), float(high)


def _array(values: Sequence[Any]) -> NDArray[Any]:
    return np.array(values, dtype=object) if isinstance(values[0], str) else np.array(values)


@lru_cache(maxsize=4)
def _sobol_steps(dimensions: int, seed: int, doublings: int) -> NDArray[np.int64]:
    """Points 0, 1, 2, 4, 8, ... as whole numbers [1 + doublings, dimensions] below 2**30; all but point 0 as differences (XOR) from it."""
    from scipy.stats import qmc

    engine = qmc.Sobol(dimensions, rng=seed, bits=_SOBOL_BITS)
    points = [engine.random(1)]
    for bit in range(doublings):
        if bit:
            engine.fast_forward(2 ** (bit - 1) - 1)
        points.append(engine.random(1))
    whole = (np.concatenate(points) * 2**_SOBOL_BITS).astype(np.int64)
    whole[1:] ^= whole[0]
    return whole


@lru_cache(maxsize=4)
def _sobol_block(dimensions: int, seed: int, doublings: int) -> NDArray[np.int64]:
    """The first points as whole numbers [dimensions, at most 2**14]."""
    steps = _sobol_steps(dimensions, seed, doublings)
    block = steps[0][:, None]
    for step in steps[1 : _SOBOL_BLOCK + 1]:
        block = np.concatenate([block, block ^ step[:, None]], axis=1)
    return block


def _sobol(start: int, stop: int, dimensions: int, seed: int, number: int) -> NDArray[np.float64]:
    """Points ``start`` to ``stop`` of ``number``: [dimensions, stop - start] in [0, 1).

    Point i is the XOR of one direction a bit of the Gray code of i (Antonov and Saleev 1979), and that code is linear in the bits of i:
    a point is point 0 and, for each bit of i, what that power of two differs from point 0.
    """
    doublings = max(number - 1, 1).bit_length()
    steps, block = _sobol_steps(dimensions, seed, doublings), _sobol_block(dimensions, seed, doublings)
    found = np.empty((dimensions, stop - start))
    size = block.shape[1]
    for number in range(start // size, -(-stop // size)):
        first, last = max(start, number * size), min(stop, (number + 1) * size)
        shift = np.zeros(dimensions, dtype=np.int64)
        for bit in range(doublings):
            if (number * size) >> bit & 1:
                shift ^= steps[1 + bit]
        some = block[:, first - number * size : last - number * size] ^ shift[:, None]
        np.multiply(some, 2.0**-_SOBOL_BITS, out=found[:, first - start : last - start])
    return found


def _column(name: str, series: pd.Series[Any]) -> NDArray[Any]:
    """A column of a table of designs as an array of numbers, or of texts as objects."""
    missing = np.flatnonzero(series.isna().to_numpy())
    if missing.size:
        raise ValueError(f"designs: column {name!r} has no value in row {missing[0]}; correct or drop that row")
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    if pd.api.types.is_bool_dtype(series.dtype) or pd.api.types.is_numeric_dtype(series.dtype):
        array = np.array(series.to_numpy(dtype=getattr(series.dtype, "numpy_dtype", None)))
        if array.dtype.kind in "biuf":
            return array
    elif pd.api.types.infer_dtype(series, skipna=False) == "string":
        return series.to_numpy(dtype=object)
    raise ValueError(f"designs: column {name!r} must hold numbers or texts, not {series.dtype}; convert it, as with astype(float)")


def _texts(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Numbers as they are, texts as objects."""
    if array.dtype.kind in "biuf":
        return array
    found = array.astype(object)
    if found.size and pd.api.types.infer_dtype(found, skipna=False) != "string":
        raise ValueError(f"score() must return numbers or texts as {name!r}, not objects; give an array of one of them")
    return found
