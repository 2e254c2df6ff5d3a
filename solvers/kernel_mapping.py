"""Exact solvers of the kernel mapping. Each returns a proven bound, or says why it cannot take the problem.

Sets        k: kinds of sublayer, i: groups (a layer, or all layers of a kind if the problem is grouped), t: tiers
Variables   n_it: slices of group i on tier t, integer, >= 0
Objective   min  sum_i seconds_i(n_i1, ..., n_iT)
Constraints sum_t n_it = N_i                       every i
            sum_i pages_it(n_it) <= capacity_t     every t

``TableMapping``: two memories, grouped. ``ConvexMapping``: two memories, many groups. ``PatternMapping``: any number of memories.
``MilpMapping`` and ``CpSatMapping``: the pattern form (``_patterns``) as it is, in PuLP and in OR-Tools.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem, Split
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.roofline import Array
from ._columns import Dual, IntegerSolver, close, column_generation, lagrangian
from ._patterns import pattern_form, plan_of
from ._table_search import uses_compiled
from ._two_way import TwoWay, solve_two_way
from .result import SolverResult, Status, check_settings, finish

MOST_COMBINATIONS = 4_000_000
"""Combinations of all kinds but one that ``TableMapping`` looks at at most."""

MOST_COLUMNS = 20_000
"""Columns from which on ``MilpMapping`` and ``CpSatMapping`` leave out those that a Lagrangian bound rules out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMapping:
    """The optimum of a grouped problem over two memories, for any cost table (``_table_search``).

    For a choice of all kinds but one, the two capacities leave a range of slices of that kind, and its fastest split in the range is
    looked up. A Lagrangian bound, and a bound on what the room left can save, rule out nearly all choices without a look.

    ``compiled``: by a loop that Numba compiles (True; ValueError where Numba is not installed), in NumPy (False), or (None) by the loop
    where Numba is installed and the batch is large enough to pay for loading it. All give the same bits. Of plans that take equally
    long, the first one in the order of kinds is taken: fewest slices on the first tier; the kind with the most slices comes last.
    """

    compiled: bool | None = None

    def __post_init__(self) -> None:
        if self.compiled not in (None, True, False):
            raise ValueError(f"compiled must be True, False or None (where it pays), not {self.compiled!r}")

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The optimal plan; its bound is its latency. ValueError for a problem that this solver does not take."""
        started = time.perf_counter()
        if not problem.grouped:
            raise ValueError(
                "TableMapping solves grouped problems, one split for all layers of a kind; use ConvexMapping or PatternMapping"
            )
        seconds, counts = self.solve_batch(problem.tables)
        if not math.isfinite(seconds[0]):
            return finish(self, problem, None, started=started, infeasible=True)
        plan = KernelMappingPlan.same_in_all_layers(problem, counts[0].tolist())
        return finish(self, problem, plan, started=started, optimal=True)

    def for_batch(self, designs: int) -> TableMapping:
        """This solver, with ``compiled`` decided for so many ``designs``, which may then be solved in smaller batches."""
        return replace(self, compiled=uses_compiled(self.compiled, designs))

    def solve_batch(self, tables: KernelMappingTables) -> tuple[Array, NDArray[np.int64]]:
        """Optima of D designs at once: seconds [D] (inf: nothing fits) and slices [D, K, 2] (-1: nothing fits). Equal to the singles
        bit for bit."""
        tiers = len(tables.tier_names)
        if tiers != 2:
            raise ValueError(f"TableMapping takes two memories, and there are {tiers}: {list(tables.tier_names)}; use PatternMapping")
        slices = [kind.slices for kind in tables.kinds]
        last = max(range(len(slices)), key=lambda k: (slices[k], k))
        number = math.prod(slices[k] + 1 for k in range(len(slices)) if k != last)
        if number > MOST_COMBINATIONS:
            raise ValueError(
                f"TableMapping looks at no more than {MOST_COMBINATIONS} combinations, and these {len(slices)} kinds have {number}; "
                "use ConvexMapping"
            )
        if uses_compiled(self.compiled, len(tables.capacity)):
            from ._table_compiled import search_tables
        else:
            from ._table_search import search_tables
        seconds, first = search_tables(tables, last)
        second = np.where(first >= 0, np.array(slices) - first, -1)
        return seconds, np.stack([first, second], axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvexMapping:
    """Two memories, per layer and heterogeneous: within ``relative_gap`` of a proven bound, in milliseconds where times are convex.

    The bound is Lagrangian (``_two_way``) and holds for any table. What the fast way leaves open (both capacities binding, costs far
    from convex, ties) goes to the closing step of ``_columns``, for up to ``time_limit`` [s].
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """A plan, its bound, and the worth of capacity; ValueError for more than two memories."""
        started = time.perf_counter()
        check_settings(self.relative_gap, self.time_limit)
        seconds, pages = problem.tables.two_way()
        depth = np.array([kind.layers if problem.grouped else 1 for kind in problem.kinds])
        number = np.array([1 if problem.grouped else kind.layers for kind in problem.kinds])
        kind = np.repeat(np.arange(len(depth)), number)
        items = TwoWay(
            seconds=(depth[:, None] * seconds[0])[kind], pages=(depth[:, None, None] * pages[0])[kind], capacity=problem.capacity
        )
        answer = solve_two_way(items, relative_gap=self.relative_gap)
        if answer.infeasible:
            return finish(self, problem, None, started=started, infeasible=True)
        start = None
        if answer.chosen is not None:
            result = finish(
                self,
                problem,
                _two_way_plan(problem, kind, answer.chosen),
                started=started,
                bound=answer.bound,
                relative_gap=self.relative_gap,
                capacity_worth=_per_byte(problem, answer.worth),
            )
            if result.status is Status.OPTIMAL:
                return result
            start = tuple(np.bincount(answer.chosen[kind == k], minlength=whole.slices + 1) for k, whole in enumerate(problem.kinds))
        form = pattern_form(problem)
        dual = column_generation(form) if start is None else lagrangian(form, answer.worth)
        return _closed(self, problem, dual, _either(), started=started, threads=1, start=start)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternMapping:
    """Any number of memories, per layer or grouped, with synchronisation: column generation over split patterns (``_columns``).

    The closing integer program over the few patterns that can still matter is solved by CBC and CP-SAT, within ``time_limit`` [s].
    ``capacity_worth`` of the result is the linear program's dual: what one more byte of each tier would save.
    """

    relative_gap: float = 1e-4
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """A plan, its proven bound, and the worth of capacity."""
        started = time.perf_counter()
        check_settings(self.relative_gap, self.time_limit)
        dual = column_generation(pattern_form(problem))
        return _closed(self, problem, dual, _either(), started=started, threads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpMapping:
    """The pattern form as an integer program in PuLP, solved by the CBC that PuLP brings: any number of memories, per layer or grouped.

    From 20,000 columns on, those that a Lagrangian bound proves to be in no better plan are left out (``_columns``).
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0
    threads: int = 1
    seed: int = 0

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """A plan and CBC's proven bound; within ``time_limit`` [s] the best plan found so far."""
        return _integer_program(self, problem, _cbc())


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSatMapping:
    """The pattern form as a constraint problem in OR-Tools' CP-SAT: any number of memories, per layer or grouped.

    Times are rounded down to whole steps that keep the bound valid and within ``relative_gap``; pages are exact. From 20,000 columns
    on, those that a Lagrangian bound proves to be in no better plan are left out (``_columns``).
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0
    threads: int = 1
    seed: int = 0

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """A plan and CP-SAT's proven bound; within ``time_limit`` [s] the best plan found so far."""
        return _integer_program(self, problem, _cpsat())


def _integer_program(
    solver: MilpMapping | CpSatMapping, problem: KernelMappingProblem, integer: IntegerSolver
) -> SolverResult[KernelMappingPlan]:
    started = time.perf_counter()
    check_settings(solver.relative_gap, solver.time_limit, solver.threads)
    form = pattern_form(problem)
    if sum(len(times) for times in form.times) > MOST_COLUMNS:
        return _closed(solver, problem, column_generation(form), integer, started=started, threads=solver.threads)
    answer = integer(
        form, start=None, relative_gap=solver.relative_gap, time_limit=solver.time_limit, threads=solver.threads, seed=solver.seed
    )
    plan = None if answer.chosen is None else plan_of(problem, answer.chosen)
    return finish(
        solver, problem, plan, started=started, bound=answer.bound, relative_gap=solver.relative_gap, infeasible=answer.infeasible
    )


def _closed(
    solver: ConvexMapping | PatternMapping | MilpMapping | CpSatMapping,
    problem: KernelMappingProblem,
    dual: Dual,
    integer: IntegerSolver,
    *,
    started: float,
    threads: int,
    start: tuple[NDArray[np.int64], ...] | None = None,
) -> SolverResult[KernelMappingPlan]:
    if dual.infeasible:
        return finish(solver, problem, None, started=started, infeasible=True)
    deadline = math.inf if solver.time_limit is None else started + solver.time_limit
    form = pattern_form(problem)
    answer = close(form, dual, integer, relative_gap=solver.relative_gap, deadline=deadline, threads=threads, seed=solver.seed, start=start)
    return finish(
        solver,
        problem,
        None if answer.chosen is None else plan_of(problem, answer.chosen),
        started=started,
        bound=answer.bound,
        relative_gap=solver.relative_gap,
        infeasible=answer.infeasible,
        capacity_worth=_per_byte(problem, dual.worth),
    )


def _two_way_plan(problem: KernelMappingProblem, kind: NDArray[np.int64], chosen: NDArray[np.int64]) -> KernelMappingPlan:
    """The plan with ``chosen`` [I] slices on the first tier for groups of ``kind`` [I]; equal groups of a kind are one split."""
    taken: list[dict[int, int]] = [{} for _ in problem.kinds]
    for k, n in sorted(zip(kind.tolist(), chosen.tolist(), strict=True)):
        taken[k][n] = taken[k].get(n, 0) + (problem.kinds[k].layers if problem.grouped else 1)
    rows = zip(problem.kinds, taken, strict=True)
    return KernelMappingPlan(
        splits=tuple(tuple(Split(layers=g, counts=(n, whole.slices - n)) for n, g in row.items()) for whole, row in rows)
    )


def _either() -> IntegerSolver:
    from ._integer import solve_patterns

    return solve_patterns


def _cbc() -> IntegerSolver:
    from ._pulp import solve_patterns

    return solve_patterns


def _cpsat() -> IntegerSolver:
    from ._cpsat import solve_patterns

    return solve_patterns


def _per_byte(problem: KernelMappingProblem, worth: Array) -> tuple[float, ...]:
    return tuple((worth / problem.page).tolist())
