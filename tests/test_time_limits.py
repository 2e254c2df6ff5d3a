"""Exact solvers of cache ratio and mini-batches with no time: a plan comes back, and their programs alone find the optimum."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from test_cache_ratio import SUMS, all_plans, optimum
from test_cache_ratio import random_problem as random_ratio
from test_mini_batches import fitting_costs
from test_mini_batches import random_problem as random_batches

from memsplit.models.mini_batches import MiniBatchProblem
from memsplit.solvers import Status, _cpsat, _pulp
from memsplit.solvers._program import Program, ProgramAnswer, relaxation
from memsplit.solvers.cache_ratio import CpSatRatio, LpRatio, MilpRatio, _relaxations, _solved
from memsplit.solvers.mini_batches import (
    MOST_PAIRS,
    SECONDS_A_PAIR,
    CpSatBatches,
    FirstComeBatches,
    GreedyRatioBatches,
    MilpBatches,
    _by_program,
    _program,
    most_places,
)

GAP = 1e-5
RUNS = {
    "CBC": lambda program, limit: _pulp.solve_program(program, relative_gap=GAP, time_limit=limit),
    "CP-SAT": lambda program, limit: _cpsat.solve_program(program, relative_gap=GAP, scale=1.0, time_limit=limit, threads=1, seed=0),
}


def unequal(requests: int) -> MiniBatchProblem:
    """Log-normal lengths, eight requests a mini-batch at most: greedy plans are half a per cent from their bound."""
    rng = np.random.default_rng(0)
    blocks = np.clip(rng.lognormal(4, 0.7, requests).astype(int), 1, 400)
    act = rng.integers(0, blocks + 1)
    return MiniBatchProblem(
        load=tuple((2e-3 * blocks - 1e-3 * act).tolist()),
        generate=tuple((2.9e-3 * act).tolist()),
        blocks=tuple(blocks.tolist()),
        most_requests=8,
        most_blocks=int(max(blocks.max(), blocks.mean() * 10)),
        alpha_generate=0.01,
    )


# Programs alone


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("seed", range(14))
def test_the_programs_of_the_cases_alone_find_the_best_ratio(seed: int, run: str):
    """Without the rounded relaxation, which the solvers begin with: a wrong formulation would hide behind it."""
    problem = random_ratio(seed, blocks=2 + seed % 7, intercepts=seed % 2 == 1, classes=1 + seed % 3 // 2)
    best = optimum(problem)
    found = [_solved(problem, case, relaxed.bound, RUNS[run], None) for case, relaxed in _relaxations(problem)]
    latencies = [problem.evaluate(plan).latency for plan, _ in found if plan is not None and problem.evaluate(plan).fits]
    if math.isinf(best):
        assert latencies == []
        return
    assert min(latencies) == pytest.approx(best, rel=GAP + SUMS)
    assert min(bound for _, bound in found) <= best * (1 + SUMS)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("seed", range(14))
def test_the_program_alone_finds_the_best_mini_batches(seed: int, run: str):
    """Without the greedy plans; the program's rows are sparse."""
    problem = random_batches(seed, requests=1 + seed % 6)
    best = min(latency for latency, _ in fitting_costs(problem))
    bound, plan = _by_program(problem, problem.least_latency / problem.layers or 1.0, RUNS[run], None)
    assert problem.evaluate(plan).latency == pytest.approx(best, rel=GAP + SUMS)
    assert bound <= best * (1 + SUMS)


def test_sparse_and_dense_rows_are_the_same_program():
    program = _program(random_batches(3, requests=5), 1.0)
    dense = Program(
        cost=program.cost,
        upper=program.upper,
        whole=program.whole,
        rows=program.rows.toarray(),
        room=program.room,
        equal=program.equal.toarray(),
        total=program.total,
    )
    for one, other in zip(program.lines(), dense.lines(), strict=True):
        assert dict(zip(one[0].tolist(), one[1].tolist(), strict=True)) == dict(zip(other[0].tolist(), other[1].tolist(), strict=True))
        assert one[2:] == other[2:]
    assert relaxation(program).bound == pytest.approx(relaxation(dense).bound, rel=1e-9)  # one linear program, solved twice


# No time


@pytest.mark.parametrize("solver", [MilpRatio, CpSatRatio])
def test_a_ratio_without_time_is_the_rounded_relaxations(solver):
    told = 0
    for seed in range(30):
        problem = random_ratio(seed, blocks=9, intercepts=seed % 2 == 1)
        result = solver(time_limit=1e-9).solve(problem)
        if not problem.possible:
            assert result.status is Status.INFEASIBLE
            continue
        rounded = LpRatio().solve(problem)
        assert result.objective == rounded.objective
        assert result.bound <= optimum(problem) * (1 + SUMS)
        assert (result.status is Status.OPTIMAL) == (result.message == "")
        told += "not proven" in result.message
    assert told >= 5


def test_a_plan_is_never_worse_than_the_one_to_begin_with(monkeypatch):
    """A solver that answers with the worst plan there is, or with nothing."""
    problem = random_ratio(1, blocks=6)
    assert problem.possible
    worst = max((plan for plan in all_plans(problem) if problem.evaluate(plan).fits), key=lambda plan: problem.evaluate(plan).latency)
    counts = np.array([worst.kv_gpu, worst.act_gpu, worst.kv_host, worst.act_host, 1.0])
    for answer in (ProgramAnswer(values=counts), ProgramAnswer()):
        monkeypatch.setattr(_pulp, "solve_program", lambda *_, answer=answer, **__: answer)
        assert MilpRatio().solve(problem).objective <= LpRatio().solve(problem).objective


@pytest.mark.parametrize("solver", [MilpBatches, CpSatBatches])
def test_256_requests_without_time_are_packed_greedily(solver, monkeypatch):
    """No program is written that could not be read in the time, which would take a hundred times as long."""
    problem = unequal(256)
    monkeypatch.setattr("memsplit.solvers.mini_batches._program", None)
    result = solver(time_limit=0.01).solve(problem)
    assert result.status is Status.FEASIBLE
    greedy = min(one.solve(problem).objective for one in (FirstComeBatches(), GreedyRatioBatches()))
    assert result.objective == greedy
    assert 0 < result.bound <= result.objective
    assert "0.01 s are too few" in result.message
    assert 256 * most_places(problem) * SECONDS_A_PAIR > 0.01


@pytest.mark.parametrize("solver", [MilpBatches, CpSatBatches])
def test_1024_requests_need_little_memory(solver):
    """Half a million pairs are more than a program gets; a dense one of them would take 10 GB."""
    problem = unequal(1024)
    assert 1024 * most_places(problem) > MOST_PAIRS
    tracemalloc.start()
    result = solver().solve(problem)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6
    assert result.status is Status.FEASIBLE
    assert result.gap < 0.05
    assert f"more than {MOST_PAIRS}" in result.message
    assert problem.evaluate(result.plan).fits


def test_a_program_of_many_requests_is_mostly_nothing():
    """256 requests: 30,000 columns in 700 rows, of which less than one number in a hundred is stored."""
    program = _program(unequal(256), 1.0)
    stored, all_numbers = program.rows.nnz + program.equal.nnz, (len(program.room) + len(program.total)) * program.size
    assert all_numbers > 2e7
    assert stored < all_numbers / 100


def test_a_relaxation_without_time_says_nothing():
    """No bound and no claim that nothing fits."""
    program = _program(unequal(128), 1.0)
    assert relaxation(program, 1e-9) == ProgramAnswer()
    answer = _pulp.solve_program(program, relative_gap=GAP, time_limit=1e-9)
    assert (answer.values, answer.bound, answer.infeasible) == (None, None, False)
