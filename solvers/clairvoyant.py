"""The optimum over a whole trace, with migration: what an online policy is measured against; and bounds that hold for all plans.

Sets        i: iterations, p, q: plans
Variables   x_ipq in {0, 1}: from plan p in iteration i - 1 to plan q in iteration i; y_q in {0, 1}: iteration 0 uses plan q
Objective   min  sum_q stage_0(q) y_q + sum_ipq (migration_i(p, q) + stage_i(q)) x_ipq
Constraints sum_q y_q = 1,   y_p = sum_q x_1pq,   sum_p x_ipq = sum_r x_(i+1)qr                       every i, q
            (moves and plans that take inf seconds have no variable)

It is a shortest path: the matrix is totally unimodular, so the linear relaxation has the same optimum. The dynamic program keeps the
least seconds V_i(q) with which iteration i can end under plan q:

    V_i(q) = stage_i(q) + min_p [ V_(i-1)(p) + migration_i(p, q) ]

``DynamicProgramClairvoyant``: any number of iterations, over a grid of plans. ``ExactClairvoyant``: over all plans, hundreds of
iterations. ``MilpClairvoyant``: the program above by PuLP, for small traces. ``ClairvoyantBound``: a lower bound over all plans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.checks import shown, whole
from ..models.clairvoyant import ClairvoyantProblem, Counts, Path, SplitSteps, TableSteps
from ..models.roofline import Array
from ._program import Program
from .kernel_mapping import TableMapping
from .result import SolverResult, check_settings, finish

MOST_PAIRS = 2**22
"""Pairs of plans that the dynamic program looks at together: 32 MiB of temporaries."""

MOST_ARCS = 200_000
"""Moves that ``MilpClairvoyant`` takes at most."""

MOST_STATES = 2 * 10**9
"""Iterations x plans up to which bounds charge for moves: a minute of one core, 2,000 iterations of GPT3-175B."""

ROUNDING = 1e-12
"""Shares of a trace's seconds below it are of the order in which they were added up."""

INFORMATIVE = 0.05
"""A bound further than this from the best policy says little about it."""


class Regret(NamedTuple):
    """How much longer a policy took than the optimum: at least ``lower`` and at most ``upper`` of the optimum's seconds.

    ``lower`` is against the best path known: below 0 if the policy used plans that were not looked at. ``upper`` is against the proven
    bound. None where there is no path, or no bound above 0. ``informative``: the bound is within 5 % of the best known, be it a
    policy's or the path.
    """

    lower: float | None
    upper: float | None
    informative: bool


def regret(latency: float, result: SolverResult[Any], *, best: float | None = None) -> Regret:
    """The regret of a policy that took ``latency`` [s] for the trace. ``best`` [s]: the best policy's, if better."""
    for name, value in (("latency", latency), ("best", best)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"regret: {name} must be seconds of at least 0 and finite, not {shown(value)}")
    least = min(seconds for seconds in (latency, best, result.objective) if seconds is not None)
    return Regret(
        lower=_over(latency, result.objective) if result.objective else None,
        upper=_over(latency, result.bound) if result.bound else None,
        informative=result.bound is not None and result.bound >= (1 - INFORMATIVE) * least,
    )


def _over(latency: float, least: float) -> float:
    """The share by which ``latency`` is above ``least``; 0 within the rounding of sums of thousands of iterations."""
    share = latency / least - 1
    return 0.0 if abs(share) < ROUNDING else share


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicProgramClairvoyant:
    """The best path over a grid of plans, exactly, and a bound over all plans.

    The plans of a problem of tables are all looked at. Those of splits over two memories are too many (97^3): the grid has every
    combination of ``counts`` evenly spaced numbers of slices a kind, of the numbers that the optimum of some iteration has, and of
    those in the paths ``include``; so its best path is no worse than these paths and than the best plan of each iteration, moves
    included. ``counts`` None: all plans. ``bound`` False: no bound over all plans (``ClairvoyantBound``, with free moves for more than
    2e9 iterations x plans), which may take longer than the path.

    Bytes moved between splits are distances kind by kind, so that the minimum over P plans takes a few sweeps over them instead of P^2
    steps. Every sqrt(I)-th V is kept, and those between are computed twice. Of paths that take equally long, one that stays is taken.
    """

    counts: int | None = 17
    include: tuple[Path, ...] = ()
    bound: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", tuple(map(tuple, self.include)))
        if self.counts is not None:
            whole("DynamicProgramClairvoyant", "counts", self.counts, "slices a kind", least=2)

    def solve(self, problem: ClairvoyantProblem, /) -> SolverResult[Path]:
        """The best path, and its bound: the path itself where all plans were looked at."""
        started = time.perf_counter()
        if isinstance(problem.steps, TableSteps):
            path = _shortest_path(problem)
            return finish(self, problem, path, started=started, optimal=True, infeasible=path is None)
        axes = _axes(problem, problem.steps, self.counts, self.include)
        if axes is None:
            return finish(self, problem, None, started=started, infeasible=True)
        grid = problem.steps.on(axes)
        initial = None if problem.initial is None else _renumbered([problem.initial], problem.steps, grid)[0]
        found = _shortest_path(ClairvoyantProblem(steps=grid, initial=initial))
        path = None if found is None else tuple(_renumbered(found, grid, problem.steps))
        whole_space = grid.plans == problem.plans
        charged = problem.iterations * problem.plans <= MOST_STATES
        bound = ClairvoyantBound(migration=charged).value(problem) if self.bound and not whole_space else None
        return finish(self, problem, path, started=started, bound=bound, optimal=whole_space, infeasible=path is None)


def _axes(problem: ClairvoyantProblem, steps: SplitSteps, counts: int | None, include: Sequence[Path]) -> list[Counts] | None:
    """The numbers of slices of each kind that a grid looks at; None if some iteration has no plan that fits."""
    if counts is None:
        return list(steps.counts)
    seconds, optima = TableMapping().solve_batch(steps.tables)
    if not np.isfinite(seconds).all():
        return None
    axes = [np.linspace(0, kind.slices, min(counts, kind.slices + 1)).round().astype(np.int64) for kind in steps.kinds]
    for path in include:
        problem.evaluate(path)  # ValueError if it is no path of this problem
    numbers = sorted({number for path in include for number in path} | ({problem.initial} if problem.initial is not None else set()))
    places = np.unravel_index(np.array(numbers, dtype=np.int64), steps.shape)
    return [
        np.unique(np.concatenate([even, optima[:, k, 0], own[place]]))
        for k, (even, own, place) in enumerate(zip(axes, steps.counts, places, strict=True))
    ]


def _renumbered(numbers: Sequence[int], steps: SplitSteps, other: SplitSteps) -> list[int]:
    """The numbers that plans of ``steps`` have among those of ``other``."""
    places = np.unravel_index(np.array(numbers), steps.shape)
    moved = [np.searchsorted(there, own[place]) for own, there, place in zip(steps.counts, other.counts, places, strict=True)]
    return [int(number) for number in np.ravel_multi_index(moved, other.shape)]


def _shortest_path(problem: ClairvoyantProblem) -> Path | None:
    """The best path over all plans of a problem; None if there is none."""
    block = math.isqrt(problem.iterations - 1) + 1
    kept: list[Array] = []
    last: Array = np.zeros(0)
    for i, last in enumerate(_values(problem)):
        if i % block == 0:
            kept.append(last)
    plan = int(last.argmin())
    if not math.isfinite(last[plan]):
        return None
    path = [plan]
    for number in range(len(kept) - 1, -1, -1):
        first = number * block
        known = [kept.pop()]
        for i in range(first + 1, min(first + block, problem.iterations)):
            known.append(_next(problem, i, known[-1]))
        after = min(first + block, problem.iterations - 1)
        for i in range(after, first, -1):
            path.append(_previous(problem, i, known[i - 1 - first], path[-1]))
    return tuple(reversed(path))


def _values(problem: ClairvoyantProblem) -> Iterator[Array]:
    """V_i [P] of every iteration."""
    yield (values := _first(problem))
    for i in range(1, problem.iterations):
        yield (values := _next(problem, i, values))


def _first(problem: ClairvoyantProblem) -> Array:
    """V_0 [P], also F_0."""
    start = problem.start()
    return problem.stage(0) + (0.0 if start is None else start)


def _next(problem: ClairvoyantProblem, iteration: int, values: Array) -> Array:
    """V_i [P] from V_(i-1) [P]."""
    steps = problem.steps
    if isinstance(steps, TableSteps):
        return _least_by_table(steps.migration(iteration), values) + steps.stage(iteration)
    return _least_by_splits(steps, iteration, values) + steps.stage(iteration)


def _previous(problem: ClairvoyantProblem, iteration: int, values: Array, plan: int) -> int:
    """The plan before ``plan`` on a best path, ``plan`` itself if it is one; ``values`` [P] is V_(i-1)."""
    reached = values + problem.steps.arrival(iteration, plan)
    best = int(reached.argmin())
    return plan if reached[plan] <= reached[best] else best


def _least_by_table(table: Array, values: Array) -> Array:
    """min_p values[p] + table[p, q] for every q."""
    rows = max(1, MOST_PAIRS // len(values))
    least = np.full(len(values), np.inf)
    for first in range(0, len(values), rows):
        part = slice(first, first + rows)
        np.minimum(least, (values[part, None] + table[part]).min(axis=0), out=least)
    return least


def _least_by_splits(steps: SplitSteps, iteration: int, values: Array) -> Array:
    """min_p values[p] + migration(p, q) for every q, [P].

    A latency is paid once a direction, whatever the kinds, so each choice of the directions that may be used is looked at on its own;
    one that allows more than is used is not the cheapest.
    """
    up, down = steps.up.latency, steps.down.latency
    if not up and not down:
        return _without_latency(steps, iteration, values)
    choices = [(rise, fall) for rise in (False, True) for fall in (False, True)]
    each = [_without_latency(steps, iteration, values, rise=rise, fall=fall) + (up * rise + down * fall) for rise, fall in choices]
    return reduce(np.minimum, each)


def _without_latency(
    steps: SplitSteps, iteration: int, values: Array, *, rise: bool = True, fall: bool = True, backwards: bool = False
) -> Array:
    """min_p values[p] + (the seconds of migration(p, q) but for latencies) for every q, [P]; ``backwards``: migration(q, p).

    Bytes add up over the kinds, so the minimum is taken kind by kind, and a move of a kind takes the bytes by which its slices, one after
    the other, make the one memory grow or the other: a weighted distance. Bytes go to the first memory only if they may ``rise``, and to
    the second if they may ``fall``.
    """
    least = values.reshape(steps.shape)
    for k, (first, second) in enumerate(zip(steps.first, steps.second, strict=True)):
        up = _allowed(np.diff(first[iteration]), steps.up.bandwidth, rise)
        down = _allowed(-np.diff(second[iteration]), steps.down.bandwidth, fall)
        least = _least_by_steps(least, k, *((down, up) if backwards else (up, down)))
    return least.ravel()


def _allowed(nbytes: Counts, bandwidth: float, allowed: bool) -> Array:
    """Seconds to move bytes, without latency; inf for any if they must not."""
    return nbytes / bandwidth if allowed else np.where(nbytes > 0, np.inf, 0.0)


def _least_by_steps(values: Array, axis: int, up: Array, down: Array) -> Array:
    """min over one axis of values + the seconds of all steps between two places: a distance transform in two sweeps.

    ``up``, ``down`` [G - 1]: seconds from place g to g + 1, and back.
    """
    # Planes of the last axis would be scattered over the whole array: it is put first.
    planes = np.moveaxis(values, axis, 0)
    planes = np.ascontiguousarray(planes) if axis == values.ndim - 1 > 0 else planes.copy()
    step = np.empty_like(planes[0])
    for g in range(1, len(planes)):
        np.add(planes[g - 1], up[g - 1], out=step)
        np.minimum(planes[g], step, out=planes[g, ...])
    for g in range(len(planes) - 1, 0, -1):
        np.add(planes[g], down[g - 1], out=step)
        np.minimum(planes[g - 1], step, out=planes[g - 1, ...])
    return np.moveaxis(planes, 0, axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClairvoyantBound:
    """Seconds that no path over any plans goes below.

    ``migration`` False: moves are free, the sum of every iteration's optimum (``TableMapping``). True: for tables the optimum; for
    splits the least of all paths but for latencies of links and memories, which leaves a few sweeps over all plans an iteration
    (912,673 of GPT3-175B).
    """

    migration: bool = True

    def value(self, problem: ClairvoyantProblem) -> float:
        """The bound [s], rounded down; inf if no path exists."""
        steps = problem.steps
        if isinstance(steps, TableSteps):
            if self.migration:
                *_, last = _values(problem)
                return _down(float(last.min()))
            return _down(float(steps.stages.min(axis=1).sum()))
        if not self.migration:
            return _down(float(TableMapping().solve_batch(steps.tables)[0].sum()))
        values = _first(problem)
        for i in range(1, steps.iterations):
            values = _without_latency(steps, i, values) + steps.stage(i)
        return _down(float(values.min()))


def _down(seconds: float) -> float:
    """Moved outward by more than the rounding of the sums of the longest traces."""
    return seconds * (1 - 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactClairvoyant:
    """The optimum over all plans of splits over two memories, by a path on a grid and bounds from both ends of the trace.

    The grid (``counts``, ``include`` as in ``DynamicProgramClairvoyant``) gives a path of U seconds. F_i(p), as in ``ClairvoyantBound``,
    bounds what leads to plan p in iteration i, and B_i(p), the same backwards, what follows. A path of at most U uses only plans with
    F_i(p) + B_i(p) <= U: of GPT3-175B's 912,673 a handful, between which moves are priced exactly, pair by pair. Where more than
    ``most`` are left in an iteration, the grid's path is returned with the bound; so it is where it is within ``relative_gap`` of it.
    What is left grows with the length of the trace, and 16 P sqrt(I) B of memory are needed: for hundreds of iterations.
    """

    counts: int = 17
    include: tuple[Path, ...] = ()
    relative_gap: float = 0.0
    most: int = 2000

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", tuple(map(tuple, self.include)))
        whole("ExactClairvoyant", "counts", self.counts, "slices a kind", least=2)
        whole("ExactClairvoyant", "most", self.most, "plans")
        check_settings(self.relative_gap, None)

    def solve(self, problem: ClairvoyantProblem, /) -> SolverResult[Path]:
        """The best path; its bound is its own seconds unless too many plans were left."""
        started = time.perf_counter()
        grid = DynamicProgramClairvoyant(counts=self.counts, include=self.include, bound=False)
        known = grid.solve(problem)
        steps = problem.steps
        if known.plan is None or known.objective is None or isinstance(steps, TableSteps):
            return finish(self, problem, known.plan, started=started, optimal=True, infeasible=known.plan is None)
        kept, bound = self._plans_left(problem, steps, known.objective)
        path = None if kept is None else _path_among(problem, steps, kept)
        if path is None:
            return finish(self, problem, known.plan, started=started, bound=bound, relative_gap=self.relative_gap)
        return finish(self, problem, path, started=started, optimal=True)

    def _plans_left(self, problem: ClairvoyantProblem, steps: SplitSteps, upper: float) -> tuple[list[NDArray[np.int64]] | None, float]:
        """The plans of each iteration that a path of ``upper`` seconds can use (None: too many, or not asked for), and a bound."""
        block = math.isqrt(steps.iterations - 1) + 1
        values = _first(problem)
        starts = [values]
        for i in range(1, steps.iterations):
            values = _without_latency(steps, i, values) + steps.stage(i)
            if i % block == 0:
                starts.append(values)
        bound = _down(float(values.min()))
        if upper - bound <= self.relative_gap * upper:
            return None, bound
        limit = upper * (1 + 1e-9)  # so that no rounding drops a path that is as good
        kept: list[NDArray[np.int64]] = []
        rest = np.zeros(steps.plans)
        while starts:
            first = (len(starts) - 1) * block
            forward = [starts.pop()]
            for i in range(first + 1, min(first + block, steps.iterations)):
                forward.append(_without_latency(steps, i, forward[-1]) + steps.stage(i))
            while forward:
                i = first + len(forward) - 1
                left = np.flatnonzero(forward.pop() + rest <= limit)
                if len(left) > self.most:
                    return None, bound
                kept.append(left)
                if i:
                    rest = _without_latency(steps, i, rest + steps.stage(i), backwards=True)
        return kept[::-1], bound


def _path_among(problem: ClairvoyantProblem, steps: SplitSteps, kept: Sequence[NDArray[np.int64]]) -> Path:
    """The best path over the plans ``kept`` of each iteration."""
    values = _first(problem)[kept[0]]
    before: list[NDArray[np.intp]] = []
    for i in range(1, len(kept)):
        reached = values[:, None] + steps.pairs(i, kept[i - 1], kept[i])
        before.append(reached.argmin(axis=0))
        values = reached.min(axis=0) + steps.stage(i)[kept[i]]
    place = int(values.argmin())
    path = [int(kept[-1][place])]
    for i in range(len(kept) - 1, 0, -1):
        place = int(before[i - 1][place])
        path.append(int(kept[i - 1][place]))
    return tuple(reversed(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpClairvoyant:
    """The program of the module's docstring by PuLP, over all plans of a problem: for small traces, up to 200,000 moves."""

    relative_gap: float = 1e-6
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: ClairvoyantProblem, /) -> SolverResult[Path]:
        """A path and CBC's proven bound; ValueError if there are too many moves."""
        from ._pulp import solve_program

        started = time.perf_counter()
        check_settings(self.relative_gap, self.time_limit, seed=self.seed)
        if self.seed < 0:  # which CBC takes for no seed at all
            raise ValueError(f"MilpClairvoyant: seed must be at least 0, not {self.seed}; 0 is as good as any")
        flow = flow_program(problem)
        if flow is None:
            return finish(self, problem, None, started=started, infeasible=True)
        answer = solve_program(flow.program, relative_gap=self.relative_gap, time_limit=self.time_limit, seed=self.seed)
        path = None if answer.values is None else flow.path(answer.values)
        bound = None if answer.bound is None else answer.bound * flow.unit
        message = "" if path is not None or answer.infeasible else "no path in the time that CBC had; allow more time"
        gap, none = self.relative_gap, answer.infeasible
        return finish(self, problem, path, started=started, bound=bound, relative_gap=gap, infeasible=none, message=message)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flow:
    """A time-expanded flow in ``unit`` [s]: variable j leads from plan ``source[j]`` (-1: start) to ``target[j]`` in ``iteration[j]``."""

    program: Program
    unit: float
    iteration: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]

    def path(self, values: Array) -> Path | None:
        """The plans along the variables that are 1; None if they are no path."""
        path: list[int] = []
        for j in np.flatnonzero(values > 0.5).tolist():  # variables are in the order of the iterations
            if self.iteration[j] != len(path) or (path and self.source[j] != path[-1]):
                return None
            path.append(int(self.target[j]))
        return tuple(path) if path and len(path) == self.iteration[-1] + 1 else None


def flow_program(problem: ClairvoyantProblem) -> Flow | None:
    """The shortest path as a program (see the module's docstring); None if some iteration cannot be reached."""
    from scipy.sparse import csr_array

    most = problem.plans * (1 + (problem.iterations - 1) * problem.plans)
    if most > MOST_ARCS:
        raise ValueError(
            f"MilpClairvoyant takes at most {MOST_ARCS} moves, and {problem.iterations} iterations of {problem.plans} plans have {most}; "
            "use DynamicProgramClairvoyant"
        )
    cost, iterations, sources, targets = [], [], [], []
    start = problem.start()
    for i in range(problem.iterations):
        moves = problem.migration(i) if i else np.zeros((1, problem.plans)) if start is None else start[None]
        seconds = moves + problem.stage(i)
        before, after = np.nonzero(np.isfinite(seconds))
        if not len(after):
            return None
        cost.append(seconds[before, after])
        iterations.append(np.full(len(after), i))
        sources.append(before if i else np.full(len(after), -1))
        targets.append(after)
    iteration, source, target = (np.concatenate(parts).astype(np.int64) for parts in (iterations, sources, targets))
    # Row 0: one path begins. Row 1 + i P + p: what comes to plan p in iteration i goes on, in all iterations but the last.
    arcs = np.arange(len(target))
    begins, goes_on, comes = arcs[iteration == 0], arcs[iteration > 0], arcs[iteration < problem.iterations - 1]
    rows = [
        np.zeros(len(begins), dtype=np.int64),
        1 + (iteration[goes_on] - 1) * problem.plans + source[goes_on],
        1 + iteration[comes] * problem.plans + target[comes],
    ]
    signs = [np.ones(len(begins)), -np.ones(len(goes_on)), np.ones(len(comes))]
    shape = (1 + (problem.iterations - 1) * problem.plans, len(arcs))
    equal = csr_array((np.concatenate(signs), (np.concatenate(rows), np.concatenate([begins, goes_on, comes]))), shape=shape)
    total = np.eye(1, shape[0])[0]
    used = np.diff(equal.indptr) > 0  # not the rows of plans that are neither reached nor left
    seconds = np.concatenate(cost)
    unit = float(seconds.max()) or 1.0
    program = Program(
        cost=seconds / unit,
        upper=np.ones(len(arcs)),
        whole=np.ones(len(arcs), dtype=bool),
        rows=np.zeros((0, len(arcs))),
        room=np.zeros(0),
        equal=equal[used],
        total=total[used],
    )
    return Flow(program=program, unit=unit, iteration=iteration, source=source, target=target)
