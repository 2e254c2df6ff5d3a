"""The clairvoyant optimum of offloading: in which form to write every token of a schedule (``models.offload_serving.FormsSchedule``).

Sets        k: cells of tokens written together that leave together;  i: iterations;  c: classes of N_c equal layers;  l: lines of T_ic
Variables   y_k: ACT tokens of a cell;  A_i: ACT tokens that iteration i reads;  r_i: tokens of prompts kept in both forms that are
            recomputed (only with ``both``);  T_ic: seconds of a layer
Objective   min  sum_ic N_c T_ic
Constraints A_i = A_(i-1) + sum of y_k that start in i - sum of y_k that end in i             every i
            T_ic >= constant_icl + slope_icl (A_i + r_i)                                      every i, c, l
            0 <= y_k <= size_k,   least_i <= A_i <= most_i,   0 <= r_i <= prompt tokens

Each y_k is in two of the equations, with opposite signs: they are those of a flow in a network. So with T_ic made linear between whole
numbers of tokens, which adds the chord across each corner and changes nothing at whole tokens, the linear program has a whole optimum:
its bound is the optimum of whole tokens, not only of fractions. Derived here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.checks import whole
from ..models.clairvoyant_offload import FormsPlan, FormsSchedule
from ..models.roofline import Array
from ..models.trace import Index
from ._program import Program, relaxation
from .result import SolverResult, check_settings, finish

MOST_CELLS = 200_000
"""Cells up to which the program is solved unless said: some seconds on one core of 2.5 GHz; 375,000 took 15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LpForms:
    """The exact optimum by the linear program of the module's docstring (HiGHS), rounded to whole tokens and priced.

    For schedules of more than ``most_cells`` cells it has no plan, and the bound of ``StepBoundForms``. ``time_limit`` [s].
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 120.0
    most_cells: int = MOST_CELLS

    def __post_init__(self) -> None:
        object.__setattr__(self, "most_cells", whole("LpForms", "most_cells", self.most_cells, "cells", least=0))

    def solve(self, problem: FormsSchedule, /) -> SolverResult[FormsPlan]:
        """The best plan, and a bound that is its own seconds but for rounding."""
        started = time.perf_counter()
        check_settings(self.relative_gap, self.time_limit)
        if np.any(np.greater(*problem.limits)):
            return finish(self, problem, None, started=started, infeasible=True)
        if len(problem.size) > self.most_cells:
            message = f"{len(problem.size)} cells are more than most_cells, {self.most_cells}; the bound forgets what was written before"
            return finish(self, problem, None, started=started, bound=step_bound(problem), message=message)
        found = forms_program(problem, chords=True)
        answer = relaxation(found.program, self.time_limit)
        plan = None if answer.values is None else found.plan(answer.values)
        bound = step_bound(problem)
        bound = bound if answer.bound is None else max(bound, answer.bound * found.unit)
        message = "" if plan is not None or answer.infeasible else "no plan in time; allow more"
        return finish(
            self,
            problem,
            plan,
            started=started,
            bound=bound,
            relative_gap=self.relative_gap,
            infeasible=answer.infeasible,
            message=message,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpForms:
    """The same program with whole y_k and r_i in PuLP, by CBC: a cross-check for small schedules."""

    relative_gap: float = 1e-6
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: FormsSchedule, /) -> SolverResult[FormsPlan]:
        """A plan and CBC's proven bound."""
        from ._pulp import solve_program

        started = time.perf_counter()
        check_settings(self.relative_gap, self.time_limit, seed=self.seed)
        if self.seed < 0:  # which CBC takes for no seed at all
            raise ValueError(f"MilpForms: seed must be at least 0, not {self.seed}; 0 is as good as any")
        if np.any(np.greater(*problem.limits)):
            return finish(self, problem, None, started=started, infeasible=True)
        found = forms_program(problem, chords=False, whole=True)
        answer = solve_program(found.program, relative_gap=self.relative_gap, time_limit=self.time_limit, seed=self.seed)
        plan = None if answer.values is None else found.plan(answer.values)
        bound = None if answer.bound is None else answer.bound * found.unit
        message = "" if plan is not None or answer.infeasible else "no plan in the time that CBC had; allow more"
        gap, none = self.relative_gap, answer.infeasible
        return finish(self, problem, plan, started=started, bound=bound, relative_gap=gap, infeasible=none, message=message)


@dataclass(frozen=True, slots=True)
class StepBoundForms:
    """A bound for schedules of any length and no plan: each iteration at its own best number of ACT tokens, whatever was written before."""

    def solve(self, problem: FormsSchedule, /) -> SolverResult[FormsPlan]:
        """The bound."""
        started = time.perf_counter()
        none = bool(np.any(np.greater(*problem.limits)))
        return finish(
            self,
            problem,
            None,
            started=started,
            bound=None if none else step_bound(problem),
            infeasible=none,
            message="" if none else "each iteration has its own best forms, which are no plan",
        )


def step_bound(problem: FormsSchedule) -> float:
    """Seconds of all iterations, each at its own best number of recomputed tokens. With ``both``, new tokens may be ACT as well, so
    that it bounds every rule."""
    least, most = problem.limits
    return float(problem.steps.best(least, most)[1].sum())


class FormsProgram(NamedTuple):
    """A schedule's program in ``unit`` [s] and ``scale`` [tokens]: first a variable for each of ``cells``, then A_i, r_i and T_ic."""

    program: Program
    problem: FormsSchedule
    cells: Index
    unit: float
    scale: float

    def plan(self, values: Array) -> FormsPlan:
        """The plan of a solution, rounded to whole tokens."""
        schedule, number = self.problem, len(self.cells)
        act = np.zeros(len(schedule.size), dtype=np.int64)
        act[self.cells] = np.clip(np.rint(values[:number] * self.scale), 0, schedule.size[self.cells]).astype(np.int64)
        if not schedule.both:
            return FormsPlan(act=tuple(act.tolist()))
        # What is recomputed beside the cells is free in each iteration, so the best of all is no worse than the program's.
        held = schedule.alive(act)
        again = schedule.steps.best(held, held + schedule.prompts)[0] - held
        return FormsPlan(act=tuple(act.tolist()), recomputed=tuple(again.tolist()))


def forms_program(problem: FormsSchedule, *, chords: bool, whole: bool = False) -> FormsProgram:
    """The program of the module's docstring. ``chords``: T_ic linear between whole tokens; ``whole``: tokens are whole numbers."""
    from scipy.sparse import coo_array

    steps, iterations, classes = problem.steps, len(problem.steps), len(problem.steps.layers)
    cells = np.flatnonzero(~problem.prompt) if problem.both else np.arange(len(problem.size))
    scale = 1.0 if whole else float(max(int(steps.tokens.max()), 1))
    unit = float(steps.seconds(0).max()) or 1.0
    number, again = len(cells), iterations if problem.both else 0
    held, free, seconds = number, number + iterations, number + iterations + again
    size = seconds + iterations * classes
    every = np.arange(iterations)
    flow = [
        (every, held + every, np.ones(iterations)),
        (every[1:], held + every[:-1], -np.ones(iterations - 1)),
        (problem.start[cells], np.arange(number), -np.ones(number)),
    ]
    gone = np.flatnonzero(problem.end[cells] < iterations)
    flow.append((problem.end[cells][gone], gone, np.ones(len(gone))))
    rows: list[tuple[NDArray[np.int64], NDArray[np.int64], Array]] = []
    room: list[Array] = []
    count = 0
    for c in range(classes):
        # constant + slope (A + r) - T <= 0
        for at, constant, slope in _lines(problem, c, chords=chords):
            row = count + np.arange(len(at))
            rows.append((row, held + at, slope * (scale / unit)))
            if again:
                rows.append((row, free + at, slope * (scale / unit)))
            rows.append((row, seconds + c * iterations + at, -np.ones(len(at))))
            room.append(-constant / unit)
            count += len(at)
    least, most = problem.limits
    below = np.flatnonzero(least > 0)
    if len(below):
        rows.append((count + np.arange(len(below)), held + below, -np.ones(len(below))))
        room.append(-least[below] / scale)
        count += len(below)
    upper = np.full(size, np.inf)
    upper[:number] = problem.size[cells] / scale
    upper[held : held + iterations] = most / scale
    if again:
        upper[free : free + iterations] = problem.prompts / scale
    cost = np.zeros(size)
    cost[seconds:] = np.repeat(np.array(steps.layers, dtype=np.float64), iterations)
    integer = np.zeros(size, dtype=np.bool_)
    if whole:
        integer[:number] = integer[free:seconds] = True

    def table(parts: list[tuple[NDArray[np.int64], NDArray[np.int64], Array]], height: int) -> object:
        row, column, value = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return coo_array((value, (row, column)), shape=(height, size)).tocsr()

    program = Program(
        cost=cost,
        upper=upper,
        whole=integer,
        rows=table(rows, count),
        room=np.concatenate(room),
        equal=table(flow, iterations),
        total=np.zeros(iterations),
    )
    return FormsProgram(program=program, problem=problem, cells=cells, unit=unit, scale=scale)


def _lines(problem: FormsSchedule, c: int, *, chords: bool) -> list[tuple[NDArray[np.int64], Array, Array]]:
    """Lines of class c: the iterations in which each counts, its constants [s] and its slopes [s/token] there."""
    steps = problem.steps
    constants, slopes, every = steps.constants[c], steps.slopes[c], np.arange(len(steps))
    found = [(every, constant, slope) for constant, slope in zip(constants, slopes, strict=True)]
    if not chords:
        return found
    for i in range(len(constants)):
        for j in range(i + 1, len(constants)):
            with np.errstate(divide="ignore", invalid="ignore"):
                crossing = (constants[i] - constants[j]) / (slopes[j] - slopes[i])
            below = np.floor(np.where(np.isfinite(crossing), crossing, -1.0))
            at = np.flatnonzero((below >= 0) & (below < steps.tokens) & (below != crossing))
            if not len(at):
                continue
            left, right = ((constants[:, at] + slopes[:, at] * (below[at] + side)).max(axis=0) for side in (0.0, 1.0))
            height = constants[i][at] + slopes[i][at] * crossing[at]
            top = (constants[:, at] + slopes[:, at] * crossing[at]).max(axis=0)
            seen = height >= top * (1 - 1e-12)  # a corner below another line changes nothing
            rise = right - left
            found.append((at[seen], (left - rise * below[at])[seen], rise[seen]))
    return found
