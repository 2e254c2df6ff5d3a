"""A table of designs: pairs of a machine and a workload, as columns.

Columns are numbers of a System, named with their unit (``systems``), and whole numbers of a workload, ``batch`` and ``context``, each with
one value a design. What no column says is that of a base machine and a base workload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hardware import System
from .roofline import Array
from .systems import Systems, column_numbers, column_place
from .workload import Workload

WORKLOAD_COLUMNS: Mapping[str, int] = {"batch": 1, "context": 0}
"""Columns that say no number of a System, and the least that each may be."""

MOST = 2**31
"""Whole numbers are below it: their products are then exact, and no server comes near."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DesignTable:
    """D designs: ``systems``, and ``workload`` with the columns of whole numbers in ``counts`` [D], int64, in place of its own."""

    systems: Systems
    workload: Workload
    counts: Mapping[str, NDArray[np.int64]]

    @classmethod
    def from_columns(
        cls, system: System, workload: Workload, columns: Mapping[str, ArrayLike], *, more: Mapping[str, int] | None = None
    ) -> DesignTable:
        """The designs of a table; without a column it is one. ``more``: further columns of whole numbers, with the least each may be.

        ValueError names the column, the row, and the rule of a number that cannot be.
        """
        if workload.state_tokens is not None:
            raise ValueError("a table of designs takes a workload whose requests have equal contexts; leave out its state_tokens")
        least = {**WORKLOAD_COLUMNS, **(more or {})}
        numbers = {}
        for name, column in columns.items():
            if name not in least:
                column_place(system, name)  # is checked also where no row follows
            numbers[name] = column_numbers(name, column, _rule(least[name]) if name in least else "numbers")
        lengths = {name: len(column) for name, column in numbers.items()}
        designs = next(iter(lengths.values()), 1)
        for name, length in lengths.items():
            if length != designs:
                raise ValueError(
                    f"column {name!r} has {length} rows and column {next(iter(lengths))!r} {designs}; give every design every column"
                )
        counts = {name: _whole(name, numbers.pop(name), least[name]) for name in lengths if name in least}
        if workload.phase == "prefill" and designs and "context" in counts and counts["context"].min() < 1:
            row = int(counts["context"].argmin())
            raise ValueError(f"context is 0 in row {row}, and a prefill needs a token; give at least 1, or decode")
        systems = Systems.from_columns(system, numbers) if numbers and designs else Systems(base=system, columns={}, designs=designs)
        return cls(systems=systems, workload=workload, counts=counts)

    @classmethod
    def from_row(cls, system: System, workload: Workload, row: Mapping[str, Any], *, more: Mapping[str, int] | None = None) -> DesignTable:
        """The one design of a table's row, of which columns that say nothing of a design are passed over."""
        least = {**WORKLOAD_COLUMNS, **(more or {})}
        return cls.from_columns(
            system, workload, {n: [value] for n, value in row.items() if n in least or _is_number(system, n)}, more=more
        )

    def __len__(self) -> int:
        return len(self.systems)

    def __getitem__(self, index: int) -> tuple[System, Workload]:
        """Design number ``index``."""
        changes: dict[str, Any] = {name: int(column[index]) for name, column in self.counts.items() if name in WORKLOAD_COLUMNS}
        return self.systems[index], replace(self.workload, **changes)

    def count(self, name: str, otherwise: int) -> NDArray[np.int64]:
        """The column ``name`` [D]; [1] with ``otherwise`` if there is none."""
        return self.counts.get(name, np.array([otherwise]))

    def workloads(self) -> Iterator[tuple[Workload, NDArray[np.int64]]]:
        """Each distinct workload, and the rows that have it."""
        columns = {name: column for name, column in self.counts.items() if name in WORKLOAD_COLUMNS}
        if not columns:
            yield self.workload, np.arange(len(self))
            return
        distinct, which = np.unique(np.stack(list(columns.values()), axis=1), axis=0, return_inverse=True)
        order = np.argsort(which.ravel(), kind="stable")
        ends = np.searchsorted(which.ravel()[order], np.arange(len(distinct) + 1))
        for i, values in enumerate(distinct):
            changes: dict[str, Any] = dict(zip(columns, map(int, values), strict=True))
            yield replace(self.workload, **changes), order[ends[i] : ends[i + 1]]


def _is_number(system: System, name: str) -> bool:
    """Whether a column is a number of ``system``."""
    try:
        column_place(system, name)
    except ValueError:
        return False
    return True


def _rule(least: int) -> str:
    return f"whole numbers of at least {least}, without a unit"


def _whole(name: str, values: Array, least: int) -> NDArray[np.int64]:
    """A column of whole numbers."""
    good = (values >= least) & (values < MOST) & (values == np.floor(values))
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"column {name!r} must hold whole numbers of at least {least} and below 2**31, not {values[row].item()!r} as in row {row}; "
            "correct it"
        )
    return values.astype(np.int64)
