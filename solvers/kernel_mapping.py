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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem, Split
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.paging import Pages
from ..models.roofline import Array
from ._columns import Dual, IntegerSolver, close, column_generation, lagrangian
from ._patterns import pattern_form, plan_of
from ._two_way import TwoWay, solve_two_way
from .result import SolverResult, Status, check_settings, finish

MOST_COMBINATIONS = 4_000_000
"""Combinations of all kinds but one that ``TableMapping`` looks at at most."""

LIKELY = 16
"""Choices that ``TableMapping`` looks at first: the best of them is the plan that rules out most others."""

MOST_COLUMNS = 20_000
"""Columns from which on ``MilpMapping`` and ``CpSatMapping`` leave out those that a Lagrangian bound rules out."""


@dataclass(frozen=True, slots=True)
class TableMapping:
    """The optimum of a grouped problem over two memories, for any cost table, by a range minimum.

    For each choice of all kinds but the last, the two capacities leave a range of slices of the last kind, and its fastest split in
    that range is looked up. A choice that is slower than a known plan even if the last kind's slices were all as small as its smallest
    is not looked at.
    """

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

    def solve_batch(self, tables: KernelMappingTables) -> tuple[Array, NDArray[np.int64]]:
        """Optima of D designs at once: seconds [D] (inf: nothing fits) and slices [D, K, 2]. Equal to the singles bit for bit."""
        tiers = len(tables.tier_names)
        if tiers != 2:
            raise ValueError(f"TableMapping takes two memories, and there are {tiers}: {list(tables.tier_names)}; use PatternMapping")
        slices = np.array([kind.slices for kind in tables.kinds])
        last = int(slices.argmax())
        others = [k for k in range(len(slices)) if k != last]
        number = math.prod(int(slices[k]) + 1 for k in others)
        if number > MOST_COMBINATIONS:
            raise ValueError(
                f"TableMapping looks at no more than {MOST_COMBINATIONS} combinations, and these {len(slices)} kinds have {number}; "
                "use ConvexMapping"
            )
        layers = np.array([kind.layers for kind in tables.kinds])
        seconds, pages = tables.two_way()
        seconds = layers[:, None] * seconds
        pages = layers[:, None, None] * pages
        grid = np.indices([int(slices[k]) + 1 for k in others]).reshape(len(others), number)
        best = np.full(len(seconds), np.inf)
        counts = np.zeros((len(seconds), len(slices), 2), dtype=np.int64)
        step = max(1, MOST_COMBINATIONS // 8 // max(1, grid.shape[1]))
        for first in range(0, len(seconds), step):
            some = np.s_[first : first + step]
            best[some], chosen = _range_minimum(seconds[some], pages[some], tables.capacity[some], grid, others, last, int(slices[last]))
            counts[some, :, 0] = chosen
            counts[some, :, 1] = slices - chosen
        return best, counts


def _range_minimum(
    seconds: Array, pages: Pages, capacity: Pages, grid: NDArray[np.int64], others: list[int], last: int, slices: int
) -> tuple[Array, NDArray[np.int64]]:
    """Optima [D] and slices on the first tier [D, K] for ``seconds`` [D, K, N+1], ``pages`` [D, K, N+1, 2], ``capacity`` [D, 2]."""
    designs = np.arange(len(seconds))
    before, held = np.zeros((len(seconds), 1)), np.zeros((len(seconds), 1), dtype=np.int64)
    for row, k in enumerate(others):
        upto = grid[row, -1] + 1
        before = (before[:, :, None] + seconds[:, k, None, :upto]).reshape(len(seconds), -1)
        held = (held[:, :, None] + pages[:, k, None, :upto, 0]).reshape(len(seconds), -1)
    final, final_pages = seconds[:, last, : slices + 1], pages[:, last, : slices + 1]
    ladder = _ladder(final)

    def look(design: NDArray[np.int64], combination: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
        """Seconds (inf: none fits) and the last kind's slices for pairs of a design and a combination."""
        room = capacity[design]
        for row, k in enumerate(others):
            room = room - pages[design, k, grid[row, combination]]
        most = _count_at_most(final_pages[:, :, 0], design, room[:, 0]) - 1
        least = slices + 1 - _count_at_most(final_pages[:, ::-1, 1], design, room[:, 1])
        n = _fastest_in_range(ladder, final, design, np.maximum(least, 0), np.minimum(most, slices))
        return np.where(n >= 0, before[design, combination] + final[design, n], np.inf), n

    a_slice = (final_pages[:, 1:, 0] // np.arange(1, slices + 1)).min(axis=1)[:, None]
    room = capacity[:, :1] - held
    at_most = np.where(a_slice > 0, np.clip(room // np.maximum(a_slice, 1), 0, slices), slices)
    fastest = np.minimum.accumulate(final, axis=1)[designs[:, None], at_most]
    optimistic = np.where(room >= 0, before + fastest, np.inf)
    likely = np.argpartition(optimistic, min(LIKELY, optimistic.shape[1] - 1), axis=1)[:, :LIKELY]
    known = look(np.repeat(designs, likely.shape[1]), likely.ravel())[0].reshape(len(designs), -1).min(axis=1)
    design, combination = np.nonzero(optimistic <= known[:, None])
    found, n = look(design, combination)
    order = np.lexsort((combination, found, design))
    top = order[np.searchsorted(design[order], designs)]
    chosen = np.zeros((len(designs), len(others) + 1), dtype=np.int64)
    chosen[:, others] = grid[:, combination[top]].T
    chosen[:, last] = n[top]
    return found[top], chosen


def _count_at_most(ascending: Pages, design: NDArray[np.int64], limit: Pages) -> NDArray[np.int64]:
    """How many of ``ascending[design]`` are at most ``limit``: one bisection in all rows, each moved above the one before."""
    width = ascending.shape[1]
    apart = int(ascending.max()) + 2
    rows = ascending + apart * np.arange(len(ascending))[:, None]
    return np.searchsorted(rows.ravel(), np.clip(limit, -1, apart - 2) + apart * design, side="right") - width * design


def _ladder(values: Array) -> NDArray[np.int64]:
    """Positions [L, D, N+1] of the first minima of runs of 1, 2, 4, ... from each place on: a range minimum is the better of two."""
    row = np.arange(len(values))[:, None]
    steps = [np.broadcast_to(np.arange(values.shape[1]), values.shape)]
    while 2 ** len(steps) <= values.shape[1]:
        ahead = np.minimum(np.arange(values.shape[1]) + 2 ** (len(steps) - 1), values.shape[1] - 1)
        left, right = steps[-1], steps[-1][:, ahead]
        steps.append(np.where(values[row, right] < values[row, left], right, left))
    return np.stack(steps)


def _fastest_in_range(
    ladder: NDArray[np.int64], values: Array, design: NDArray[np.int64], least: NDArray[np.int64], most: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Position of the first minimum of ``values[design, least..most]``; -1 where the range is empty."""
    some = most >= least
    level = np.frexp(np.where(some, most - least + 1, 1))[1] - 1
    left = ladder[level, design, np.where(some, least, 0)]
    right = ladder[level, design, np.where(some, most + 1 - (1 << level), 0)]
    return np.where(some, np.where(values[design, right] < values[design, left], right, left), -1)


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
