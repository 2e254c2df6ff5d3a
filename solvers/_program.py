"""A mixed-integer linear program as arrays: what offloading solvers hand to HiGHS (relaxation), CBC (``_pulp``) and CP-SAT (``_cpsat``).

    min  cost x   subject to   rows x <= room,  equal x = total,   0 <= x <= upper,   x_j whole where ``whole[j]``

Whoever builds one scales times and sizes to about 1; continuous variables are times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.roofline import Array

NONE = np.zeros((0, 0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """See the module's docstring: ``cost``, ``upper`` [n] (inf: no limit), ``whole`` [n] bool, ``rows`` [m, n], ``room`` [m],
    ``equal`` [e, n], ``total`` [e]. ``rows`` and ``equal`` are arrays, or ``csr_array`` of SciPy where most of them is 0."""

    cost: Array
    upper: Array
    whole: NDArray[np.bool_]
    rows: Any
    room: Array
    equal: Any = field(default_factory=lambda: NONE)
    total: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def size(self) -> int:
        """Number of variables."""
        return len(self.cost)

    def lines(self) -> Iterator[tuple[NDArray[np.intp], Array, float, bool]]:
        """Columns that are not 0, their numbers, the limit, and whether it is an equation, of every row."""
        for rows, limits, equation in ((self.rows, self.room, False), (self.equal, self.total, True)):
            for index, limit in enumerate(limits.tolist()):
                if isinstance(rows, np.ndarray):
                    columns = np.flatnonzero(rows[index])
                    yield columns, rows[index][columns], limit, equation
                else:
                    part = slice(rows.indptr[index], rows.indptr[index + 1])
                    yield rows.indices[part], rows.data[part], limit, equation


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramAnswer:
    """``values`` [n] (None: none found; whole variables are whole), a proven lower ``bound`` of the cost (None: none), and whether it is
    proven ``infeasible``. Rows hold only within a solver's tolerance: whoever asked prices and checks the plan itself."""

    values: Array | None = None
    bound: float | None = None
    infeasible: bool = False


def relaxation(program: Program, time_limit: float | None = None) -> ProgramAnswer:
    """The linear relaxation by SciPy's HiGHS, empty if ``time_limit`` [s] came first. ``bound`` is the dual objective, made valid for the
    exact data by weak duality, so that no tolerance of the solver can push it above the optimum."""
    from scipy.optimize import linprog

    arguments: dict[str, Any] = {"A_ub": program.rows, "b_ub": program.room} if len(program.room) else {}
    if len(program.total):
        arguments |= {"A_eq": program.equal, "b_eq": program.total}
    bounds = [(0.0, None if math.isinf(upper) else float(upper)) for upper in program.upper]
    if time_limit is not None:
        arguments["options"] = {"time_limit": time_limit}
    answer = linprog(program.cost, bounds=bounds, method="highs", **arguments)
    if answer.status == 2:
        return ProgramAnswer(infeasible=True)
    if answer.status != 0:
        return ProgramAnswer()
    reduced, dual = np.array(program.cost, dtype=np.float64), 0.0
    if len(program.room):
        price = np.minimum(answer.ineqlin.marginals, 0.0)
        reduced, dual = reduced - price @ program.rows, dual + float(price @ program.room)
    if len(program.total):
        price = np.asarray(answer.eqlin.marginals, dtype=np.float64)
        reduced, dual = reduced - price @ program.equal, dual + float(price @ program.total)
    # A reduced cost that is slightly negative on an unbounded variable is rounding: it is charged at the variable's value.
    x = np.asarray(answer.x, dtype=np.float64)
    reach = np.where(np.isfinite(program.upper), program.upper, np.maximum(x, 0.0) * 2 + 1)
    dual += float(np.minimum(reduced, 0.0) @ reach)
    return ProgramAnswer(values=x, bound=dual)
