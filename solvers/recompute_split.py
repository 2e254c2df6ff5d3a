"""Solvers of the recompute split.

Sets        c: classes of equal layers (N_c of them), j: lines whose maximum is a layer's time at a share of tokens (``lines``)
Variables   l_c: tokens of a request that are recomputed, integer; T_c: seconds of all layers of class c
Objective   min  sum_c T_c
Constraints N_c (constant_cj + slope_cj l_c / s') <= T_c      every c, j
            0 <= l_c <= most                                  every c
            sum_c N_c l_c <= room for activations             the host's memory, in tokens of one layer

What the GPU holds does not depend on the plan, so it is checked before. ``ClosedFormSplit`` solves all of it; ``MilpSplit`` and
``CpSatSplit`` hand the same lines to PuLP and OR-Tools; ``EnumerationSplit`` uses the templates and no lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.checks import check_number
from ..models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, best_splits
from ..models.roofline import Array
from ._program import Program, ProgramAnswer, relaxation
from .result import SolverResult, check_settings, finish, unproven

MOST_COMBINATIONS = 4_000_000
"""Plans that are listed at most."""

LEAST_TIME = 0.01
"""Seconds that a solver gets if writing its program took all the time there was."""


@dataclass(frozen=True, slots=True)
class ClosedFormSplit:
    """The optimum: in each class the whole number below or above the best real split, which is a crossing of two lines.

    Where the host has no room for so many activations, one class takes what the others leave, and the others are enumerated.
    """

    def solve(self, problem: RecomputeSplitProblem, /) -> SolverResult[RecomputeSplitPlan]:
        """The optimal plan; its bound is its latency. ValueError if too many classes of layers compete for the host's memory."""
        started = time.perf_counter()
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        best = [int(split) for split in best_splits(problem)[0]]
        layers = [layer.layers for layer in problem.layers]
        if sum(depth * split for depth, split in zip(layers, best, strict=True)) > problem.token_room:
            best = _within_room(problem, layers, best)
        return finish(self, problem, RecomputeSplitPlan(splits=tuple(best)), started=started, optimal=True)


@dataclass(frozen=True, slots=True)
class EnumerationSplit:
    """The optimum by trying every split: of each class by itself, and every combination where the host's memory couples them."""

    def solve(self, problem: RecomputeSplitProblem, /) -> SolverResult[RecomputeSplitPlan]:
        """The optimal plan, the smallest splits of several; ValueError if there are too many combinations."""
        started = time.perf_counter()
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        layers = [layer.layers for layer in problem.layers]
        _check_number("EnumerationSplit", problem.most + 1)
        splits = np.arange(problem.most + 1)
        tables = [depth * problem.layer_time(index, splits) for index, depth in enumerate(layers)]
        best = [int(table.argmin()) for table in tables]
        if sum(depth * split for depth, split in zip(layers, best, strict=True)) > problem.token_room:
            _check_number("EnumerationSplit", (problem.most + 1) ** len(layers))
            counts = np.indices((problem.most + 1,) * len(layers)).reshape(len(layers), -1)
            seconds = sum(table[count] for table, count in zip(tables, counts, strict=True))
            fits = np.asarray(layers) @ counts <= problem.token_room
            best = counts[:, int(np.where(fits, seconds, np.inf).argmin())].tolist()
        return finish(self, problem, RecomputeSplitPlan(splits=tuple(best)), started=started, optimal=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpSplit:
    """The formulation as an integer program in PuLP, solved by the CBC that PuLP brings.

    If ``time_limit`` [s] comes first, the better of what CBC found and the closed form's plan counts.
    """

    relative_gap: float = 1e-6
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: RecomputeSplitProblem, /) -> SolverResult[RecomputeSplitPlan]:
        """The plan within ``relative_gap`` of the optimum, or the best one in time, and CBC's proven bound."""
        from ._pulp import solve_program

        def answer(program: Program, _: float, limit: float | None) -> ProgramAnswer:
            return solve_program(program, relative_gap=self.relative_gap, time_limit=limit, seed=self.seed)

        check_settings(self.relative_gap, self.time_limit, seed=self.seed)
        return _by_program(self, problem, answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSatSplit:
    """The formulation as a constraint problem in OR-Tools' CP-SAT; times are rounded to steps that keep the bound valid.

    If ``time_limit`` [s] comes first, the better of what CP-SAT found and the closed form's plan counts.
    """

    relative_gap: float = 1e-6
    time_limit: float | None = 60.0
    threads: int = 1
    seed: int = 0

    def solve(self, problem: RecomputeSplitProblem, /) -> SolverResult[RecomputeSplitPlan]:
        """The plan within ``relative_gap`` of the optimum, or the best one in time, and CP-SAT's proven bound."""
        from ._cpsat import solve_program

        def answer(program: Program, scale: float, limit: float | None) -> ProgramAnswer:
            return solve_program(
                program, relative_gap=self.relative_gap, scale=scale, time_limit=limit, threads=self.threads, seed=self.seed
            )

        check_settings(self.relative_gap, self.time_limit, self.threads, seed=self.seed)
        return _by_program(self, problem, answer)


@dataclass(frozen=True, slots=True)
class FixedShareSplit:
    """A fixed ``share`` of each request's tokens is recomputed, rounded down and at most what the problem allows.

    0: nothing, all keys and values are sent (FlexGen with ideal overlap); 1: as much as may be.
    """

    share: float

    def solve(self, problem: RecomputeSplitProblem, /) -> SolverResult[RecomputeSplitPlan]:
        """The plan of that share, if it fits; no bound."""
        started = time.perf_counter()
        check_number("FixedShareSplit", "share", self.share, "share of the tokens", zero=True)
        if self.share > 1:
            raise ValueError(f"FixedShareSplit: share must be from 0 to 1, not {self.share!r}")
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        split = min(math.floor(self.share * problem.context), problem.most)
        return finish(self, problem, RecomputeSplitPlan(splits=(split,) * len(problem.layers)), started=started)


def _check_number(solver: str, combinations: int) -> None:
    if combinations > MOST_COMBINATIONS:
        raise ValueError(
            f"{solver} looks at no more than {MOST_COMBINATIONS} plans, and there are {combinations}; use MilpSplit or CpSatSplit"
        )


def _within_room(problem: RecomputeSplitProblem, layers: list[int], best: list[int]) -> list[int]:
    """The best splits that fit. Each is at most the ``best`` without limit; the longest class takes what the others leave, as its time
    falls up to its best."""
    last = int(np.argmax(best))
    others = [index for index in range(len(best)) if index != last]
    sizes = tuple(best[index] + 1 for index in others)
    _check_number("ClosedFormSplit", math.prod(sizes))
    counts = np.indices(sizes).reshape(len(others), math.prod(sizes))
    room = problem.token_room - np.asarray([layers[index] for index in others], dtype=np.int64) @ counts
    taken = np.minimum(room // layers[last], best[last])
    seconds = layers[last] * problem.layer_time(last, np.maximum(taken, 0))
    for row, index in enumerate(others):
        seconds = seconds + layers[index] * problem.layer_time(index, counts[row])
    chosen = int(np.where(taken >= 0, seconds, np.inf).argmin())
    splits = list(best)
    splits[last] = int(taken[chosen])
    for row, index in enumerate(others):
        splits[index] = int(counts[row, chosen])
    return splits


def _by_program(
    solver: MilpSplit | CpSatSplit, problem: RecomputeSplitProblem, answer: Callable[[Program, float, float | None], ProgramAnswer]
) -> SolverResult[RecomputeSplitPlan]:
    """The better of the program's plan and one to begin with; the bound is the program's, or its relaxation's."""
    started = time.perf_counter()
    if not problem.possible:
        return finish(solver, problem, None, started=started, infeasible=True)
    classes = len(problem.layers)
    unit = problem.evaluate(RecomputeSplitPlan(splits=(0,) * classes)).latency
    if not unit > 0:
        # Nothing takes time: there is nothing to choose, and no unit to count times in.
        return finish(solver, problem, RecomputeSplitPlan(splits=(0,) * classes), started=started, optimal=True)
    program = split_program(problem, unit)
    relaxed = relaxation(program)
    left = None if solver.time_limit is None else max(solver.time_limit - (time.perf_counter() - started), LEAST_TIME)
    found = answer(program, relaxed.bound if relaxed.bound is not None and relaxed.bound > 0 else 1.0, left)
    plans = [_first_plan(problem)]
    if found.values is not None:
        plan = RecomputeSplitPlan(splits=tuple(min(int(value), problem.most) for value in found.values[:classes]))
        if problem.evaluate(plan).fits:
            plans.insert(0, plan)  # of equal plans, the program's own
    best = min(plans, key=lambda plan: problem.evaluate(plan).latency)
    bounds = [one.bound * unit for one in (relaxed, found) if one.bound is not None]
    return finish(
        solver,
        problem,
        best,
        started=started,
        bound=max(bounds, default=None),
        relative_gap=solver.relative_gap,
        message=unproven(problem.evaluate(best).latency, max(bounds, default=None), solver.relative_gap, solver.time_limit),
    )


def _first_plan(problem: RecomputeSplitProblem) -> RecomputeSplitPlan:
    """The closed form's plan, or no recomputation where too many classes of layers compete for the host's memory."""
    try:
        return ClosedFormSplit().solve(problem).unwrap()
    except ValueError:
        return RecomputeSplitPlan(splits=(0,) * len(problem.layers))


def split_program(problem: RecomputeSplitProblem, unit: float) -> Program:
    """Splits first, then the classes' times in units of ``unit`` [s]."""
    classes = len(problem.layers)
    rows: list[Array] = []
    room: list[float] = []
    for index, layer in enumerate(problem.layers):
        for constant, slope in zip(*problem.lines(index), strict=True):
            row = np.zeros(2 * classes)
            row[index], row[classes + index] = layer.layers * slope / max(problem.context, 1) / unit, -1.0
            rows.append(row)
            room.append(-layer.layers * float(constant) / unit)
    rows.append(np.array([float(layer.layers) for layer in problem.layers] + [0.0] * classes))
    room.append(float(problem.token_room))
    whole: NDArray[np.bool_] = np.arange(2 * classes) < classes
    return Program(
        cost=np.where(whole, 0.0, 1.0),
        upper=np.where(whole, float(problem.most), np.inf),
        whole=whole,
        rows=np.array(rows),
        room=np.array(room),
    )
