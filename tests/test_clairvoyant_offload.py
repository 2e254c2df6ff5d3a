"""The clairvoyant optimum of forms: enumeration, two formulations that agree, bounds that hold for long traces, and what fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pytest
from conformance import ExactCase
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDING
from test_offload_serving import RTX, opt, services

from memsplit.models import System
from memsplit.models.clairvoyant import ClairvoyantProblem
from memsplit.models.clairvoyant_offload import FormsPlan, FormsSchedule
from memsplit.models.offload_serving import OffloadService
from memsplit.models.trace import Trace
from memsplit.models.units import GB
from memsplit.solvers import Status
from memsplit.solvers.clairvoyant import MilpClairvoyant
from memsplit.solvers.clairvoyant_offload import LpForms, MilpForms, StepBoundForms, step_bound

SOLVED = 1e-7
"""Tolerance of HiGHS and CBC relative to the seconds of a step."""


@st.composite
def schedules(draw: st.DrawFn, *, both: bool | None = None, tight: bool = False) -> FormsSchedule:
    """One to three requests of a few tokens, some of which overlap; ``tight``: the host may not hold all as the larger form."""
    rows = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3))
    rows = sorted((min(first, i), prompt, output) for i, (first, prompt, output) in enumerate(rows))
    trace = Trace.from_arrays("small", [0.0] * len(rows), [row[1] for row in rows], [row[2] for row in rows])
    service: OffloadService = draw(services(trace, 3, most_room=6.0))
    if tight:
        token = service.llm.num_hidden_layers * max(service.token_bytes)
        held = service.workload(1).weight_bytes if service.weights == "host" else 0.0
        service = replace(service, system=service.system.with_tier("far", capacity=held + draw(st.integers(0, 12)) * token))
    ends, first = 0, 0
    kept = []
    for first, prompt, output in rows:
        kept.append((min(first, ends), prompt, output))  # no iteration is empty
        ends = max(ends, kept[-1][0] + output)
    rule = draw(st.booleans()) if both is None else both
    return FormsSchedule.of(service, kept, both=rule, iterations=ends)


def least_by_enumeration(problem: FormsSchedule) -> float | None:
    """Every number of ACT tokens of every cell; with both forms, every number of recomputed tokens of every iteration."""
    prompts = problem.prompts
    found = None
    most = np.where(problem.prompt & problem.both, 0, problem.size)
    for act in product(*(range(size + 1) for size in most.tolist())):
        held = problem.alive(act)
        again = np.zeros_like(held)
        if problem.both:
            for i in range(len(held)):
                tries = problem.steps.only(slice(i, i + 1)).seconds(held[i] + np.arange(prompts[i] + 1)[:, None])[:, 0]
                again[i] = int(tries.argmin())
        cost = problem.evaluate(FormsPlan(act=tuple(act), recomputed=tuple(again.tolist()) if problem.both else ()))
        if cost.fits and (found is None or cost.latency < found):
            found = cost.latency
    return found


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_the_linear_program_finds_the_optimum_of_whole_tokens(problem):
    """Chords make it whole: its plan is that of enumeration, and its bound proves it, up to the tolerance of HiGHS."""
    result = LpForms().solve(problem)
    least = least_by_enumeration(problem)
    assert least is not None
    assert result.objective == pytest.approx(least, rel=SOLVED)
    assert result.bound <= least * (1 + ROUNDING)
    assert result.bound >= least * (1 - 1e-6)
    assert result.status is Status.OPTIMAL


@given(schedules(both=False, tight=True))
@settings(max_examples=40, deadline=None)
def test_the_optimum_fits_where_the_host_is_small(problem):
    least = least_by_enumeration(problem)
    result = LpForms().solve(problem)
    if least is None:
        assert result.status is Status.INFEASIBLE
        assert "fit" in result.message
        return
    assert problem.evaluate(result.unwrap()).fits
    assert result.objective == pytest.approx(least, rel=SOLVED)
    assert result.bound <= least * (1 + ROUNDING)


@given(schedules())
@settings(max_examples=12, deadline=None)
def test_pulp_agrees(problem):
    assert MilpForms().solve(problem).objective == pytest.approx(LpForms().solve(problem).objective, rel=2e-6)  # both gaps


@given(schedules(both=False))
@settings(max_examples=40, deadline=None)
def test_bounds_are_ordered(problem):
    """Each iteration alone <= prompts in both forms <= one form a token <= any one plan."""
    one, either = LpForms().solve(problem), LpForms().solve(replace(problem, both=True))
    assert step_bound(replace(problem, both=True)) <= either.bound * (1 + 1e-9)
    assert either.bound <= one.objective * (1 + 1e-9)
    assert StepBoundForms().solve(problem).bound <= one.bound * (1 + 1e-9)
    for act in (np.zeros_like(problem.size), problem.size, problem.size // 2):
        assert one.bound <= problem.evaluate(FormsPlan(act=tuple(act.tolist()))).latency * (1 + 1e-9)


def drawn(number: int, *, system: System = RTX, both: bool = False, seed: int = 0) -> FormsSchedule:
    """Requests of hundreds of tokens, of which 8 run at a time."""
    generator = np.random.default_rng(seed)
    free, requests = np.zeros(8, dtype=int), []
    for _ in range(number):
        place = int(free.argmin())
        output = int(generator.integers(4, 24))
        requests.append((int(free[place]), int(generator.integers(100, 900)), output))
        free[place] += output
    return FormsSchedule.of(opt(system, 8, 1024), requests, both=both, iterations=int(free.max()))


@pytest.mark.parametrize("both", [False, True])
def test_long_schedules_are_proven_too(both):
    problem = drawn(40, both=both)
    result = LpForms().solve(problem)
    assert result.gap < 1e-6
    assert result.objective > step_bound(problem) * (1 - ROUNDING)


def test_schedules_of_too_many_cells_keep_a_bound():
    problem = drawn(10)
    few = LpForms(most_cells=20).solve(problem)
    assert few.plan is None
    assert few.status is Status.UNKNOWN
    assert "most_cells" in few.message
    assert 0 < few.bound <= LpForms().solve(problem).bound * (1 + 1e-9)
    alone = StepBoundForms().solve(problem)
    assert alone.bound == few.bound
    assert alone.plan is None


def test_without_time_there_is_still_a_bound():
    result = LpForms(time_limit=1e-9).solve(drawn(40))
    assert result.bound == pytest.approx(step_bound(drawn(40)), rel=1e-9)


CROWDED = FormsSchedule.of(
    opt(RTX.with_tier("GDDR6X", capacity=5.9 * GB).with_tier("host", capacity=60 * GB), 8, 1024),
    [(0, 900, 8)] * 8,
    iterations=8,
)
"""7,200 tokens of which even as ACT 5 GB are needed, where the weights leave some hundred MB."""


class FormsCase(ExactCase):
    problem: ClassVar[Any] = drawn(4)
    impossible: ClassVar[Any] = CROWDED
    bad_settings = tuple({"relative_gap": gap} for gap in (-1e-6, 1, float("nan"))) + tuple({"time_limit": t} for t in (0, -1.0))


class TestLpForms(FormsCase):
    solver = LpForms()


class TestMilpForms(FormsCase):
    solver = MilpForms(relative_gap=1e-6)


def test_the_bound_of_single_steps_says_that_nothing_fits():
    assert StepBoundForms().solve(CROWDED).status is Status.INFEASIBLE


@pytest.mark.parametrize("most_cells", [-1, "x", None, 1.5])
def test_most_cells_is_a_count(most_cells):
    with pytest.raises(ValueError, match="most_cells must be a whole number of cells"):
        LpForms(most_cells=most_cells)


@pytest.mark.parametrize("iterations", [0, -1, 1.5])
def test_a_schedule_has_iterations(iterations):
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        FormsSchedule.of(opt(), [(0, 1, 1)], iterations=iterations)


def test_negative_seeds_are_refused():
    two = ClairvoyantProblem.from_tables(np.ones((2, 2)), np.zeros((2, 2)))
    for solver, problem in ((MilpForms(seed=-1), drawn(2)), (MilpClairvoyant(seed=-1), two)):
        with pytest.raises(ValueError, match="seed must be at least 0, not -1"):
            solver.solve(problem)
