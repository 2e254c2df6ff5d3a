"""A pattern form solved by CP-SAT, the constraint solver of OR-Tools.

CP-SAT computes in whole numbers. Pages are whole already; times are counted from the fastest pattern of each kind on and rounded down
to whole steps, so that its bound in steps is below every plan's time, and steps are as coarse as the gap asked for allows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from ..models.roofline import Array
from ._patterns import Chosen, PatternAnswer, PatternForm, capacity_rows, fastest_patterns, least_above_zero, least_time
from ._program import Program, ProgramAnswer

ROUNDING_GAP, SEARCH_GAP = 0.25, 0.5
"""The shares of the relative gap that rounding the times and the search may use."""

FINEST = 2.0**-52
"""The finest step, as a share of the longest plan: what a double resolves, and small enough for CP-SAT's whole numbers."""


LEAST_STEP, LARGEST_STEPS = 2.0**-44, 2**50
"""The finest step of a program's times, as a share of their scale, and the longest time in steps."""


def solve_patterns(
    form: PatternForm,
    *,
    start: Chosen | None,
    relative_gap: float,
    time_limit: float | None,
    threads: int,
    seed: int,
) -> PatternAnswer:
    """CP-SAT's answer to a pattern form: a plan proven within ``relative_gap``, unless ``time_limit`` [s of wall time] came first.

    ``start[k]``, int64 [P_k], is a plan to begin with. On one thread the same arguments give the same plan where no time limit strikes;
    on several, CP-SAT may find another plan of the same quality each time (interleaved, it would not, but be ten times slower).
    """
    rows = capacity_rows(form)
    if rows is None:
        return PatternAnswer(chosen=None, bound=None, infeasible=True)
    if not rows:
        return fastest_patterns(form)
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    cp_model = _import_cp_model()

    least = least_time(form)
    above = [times - times.min(initial=math.inf) for times in form.times]
    span = sum(groups * float(times.max(initial=0)) for times, groups in zip(above, form.groups, strict=True))
    allowed = relative_gap * least_above_zero(form)
    step = max(ROUNDING_GAP * allowed / sum(form.groups), FINEST * span) or 1.0
    steps = [np.floor(times / step).astype(np.int64) for times in above]

    model = cp_model.CpModel()
    x: list[list[Any]] = []
    for times, groups in zip(form.times, form.groups, strict=True):
        x.append([model.new_int_var(0, groups, "") for _ in times])
        if groups == 1:
            model.add_exactly_one(x[-1])
        else:
            model.add(cp_model.LinearExpr.sum(x[-1]) == groups)
    flat = [variable for kind in x for variable in kind]
    for row in rows:
        model.add(cp_model.LinearExpr.weighted_sum(flat, np.concatenate(row.pages)) <= row.room)
    model.minimize(cp_model.LinearExpr.weighted_sum(flat, np.concatenate(steps)))
    if start is not None:
        for variable, count in zip(flat, np.concatenate(start).tolist(), strict=True):
            model.add_hint(variable, count)

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = threads
    solver.parameters.cp_model_presolve = False  # it takes three quarters of the time here and finds nothing that speeds the search up
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.absolute_gap_limit = SEARCH_GAP * allowed / step
    solver.parameters.catch_sigint_signal = False
    if time_limit is not None:
        solver.parameters.max_time_in_seconds = max(deadline - time.perf_counter(), 0.01)
    status = _solve(solver, model)

    if status == cp_model.MODEL_INVALID:
        raise AssertionError(f"CP-SAT calls its model invalid: {model.validate()}; this is a defect of memsplit, please report it")
    if status == cp_model.INFEASIBLE:
        return PatternAnswer(chosen=None, bound=None, infeasible=True)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return PatternAnswer(chosen=None, bound=least)
    values = np.array([solver.value(variable) for variable in flat], np.int64)
    chosen = tuple(np.split(values, np.cumsum([len(times) for times in form.times])[:-1]))
    return PatternAnswer(chosen=chosen, bound=least + step * max(solver.best_objective_bound, 0.0))


def _sum(cp_model: Any, x: Sequence[Any], numbers: Array) -> Any:
    """The weighted sum of the variables whose numbers are not 0."""
    used = np.flatnonzero(numbers)
    return cp_model.LinearExpr.weighted_sum([x[j] for j in used.tolist()], numbers[used].astype(np.int64))


def _solve(solver: Any, model: Any) -> Any:
    """The status of a solve that Ctrl-C ends: it runs on a thread, so that this one can take the signal."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(solver.solve, model)
        try:
            return future.result()
        finally:
            while not future.done():
                solver.stop_search()
                wait([future], timeout=0.1)


def _import_cp_model() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ImportError(
            f"OR-Tools cannot be loaded ({error}); highspy 1.15 or newer in the same process is a known cause: install 'highspy<1.15'"
        ) from error
    return cp_model


def solve_program(
    program: Program,
    *,
    relative_gap: float,
    scale: float,
    time_limit: float | None,
    threads: int,
    seed: int,
) -> ProgramAnswer:
    """CP-SAT's answer to a program whose continuous variables are all times of about ``scale`` (the cost is of that order).

    Continuous variables are counted in steps so fine that rounding takes a quarter of ``relative_gap`` x ``scale`` at most. A row
    with one is rounded so that it can only become weaker (every variable is at least 0), so the bound holds; other rows must have
    whole numbers.
    """
    cp_model = _import_cp_model()
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    units = 1.0 + float(program.upper[program.whole & np.isfinite(program.upper)].sum())
    step = max(ROUNDING_GAP * relative_gap / units, LEAST_STEP) * scale
    model = cp_model.CpModel()
    upper = [
        LARGEST_STEPS if math.isinf(limit) else int(limit if whole else limit / step)
        for limit, whole in zip(program.upper, program.whole, strict=True)
    ]
    x = [model.new_int_var(0, limit, "") for limit in upper]
    for columns, row, limit, equation in program.lines():
        counted = program.whole[columns]
        numbers = row
        if not counted.all():
            if equation:
                raise AssertionError("an equation of times cannot be rounded; this is a defect of memsplit, please report it")
            numbers = np.where(counted, np.floor(row / step), row)
            if np.any(numbers[~counted] != np.round(numbers[~counted])):
                raise AssertionError("times need whole coefficients; this is a defect of memsplit, please report it")
            limit = math.ceil(limit / step)
        expression = cp_model.LinearExpr.weighted_sum([x[j] for j in columns.tolist()], numbers.astype(np.int64))
        model.add(expression == round(limit) if equation else expression <= math.floor(limit))
    # The cost in steps: whole variables cost their own seconds, rounded down.
    cost = np.where(program.whole, np.floor(program.cost / step), program.cost)
    model.minimize(_sum(cp_model, x, cost))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = threads
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.relative_gap_limit = SEARCH_GAP * relative_gap
    solver.parameters.catch_sigint_signal = False
    if time_limit is not None:
        solver.parameters.max_time_in_seconds = max(deadline - time.perf_counter(), 0.01)
    status = _solve(solver, model)
    if status == cp_model.MODEL_INVALID:
        raise AssertionError(f"CP-SAT calls its model invalid: {model.validate()}; this is a defect of memsplit, please report it")
    if status == cp_model.INFEASIBLE:
        return ProgramAnswer(infeasible=True)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return ProgramAnswer()
    values = np.array([solver.value(variable) for variable in x], dtype=np.float64)
    return ProgramAnswer(values=np.where(program.whole, values, values * step), bound=solver.best_objective_bound * step)
