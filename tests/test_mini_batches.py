"""Mini-batches: the cost by hand, solvers against all partitions, requests that follow a cache plan, and what solvers promise."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
from conformance import HeuristicCase, SolverCase, TimeLimitedExactCase, covered_solvers
from hypothesis import given, settings
from hypothesis import strategies as st

import memsplit.solvers.mini_batches as solvers_module
from memsplit.models.cache_ratio import CacheRatioPlan, CacheRatioProblem, LinearTime, RatioLayer
from memsplit.models.mini_batches import MiniBatchPlan, MiniBatchProblem
from memsplit.solvers import Status
from memsplit.solvers.mini_batches import CpSatBatches, FirstComeBatches, GreedyRatioBatches, MilpBatches, most_places

SUMS = 1e-12
"""Relative difference of equal sums in another order."""


def random_problem(seed: int, requests: int) -> MiniBatchProblem:
    """Unequal requests, limits that bind in most cases."""
    rng = np.random.default_rng(seed)
    room = int(rng.integers(5, 20))
    return MiniBatchProblem(
        load=tuple(rng.uniform(0, 1, requests).tolist()),
        generate=tuple((rng.uniform(0, 1, requests) * rng.choice([0.3, 1, 2], requests)).tolist()),
        blocks=tuple(rng.integers(0, room + 1, requests).tolist()),
        most_requests=int(rng.integers(1, requests + 1)),
        most_blocks=room,
        alpha_load=float(rng.choice([0.0, 0.2])),
        alpha_generate=float(rng.uniform(0, 0.3)),
        weights=float(rng.uniform(0, 1)),
        layers=3,
    )


def partitions(n: int):
    """Every way to group n requests."""
    if n == 0:
        yield []
        return
    for rest in partitions(n - 1):
        for k in range(len(rest)):
            yield [*rest[:k], (*rest[k], n - 1), *rest[k + 1 :]]
        yield [*rest, (n - 1,)]


def fitting_costs(problem: MiniBatchProblem):
    """(latency, plan) of every plan that fits."""
    for groups in partitions(problem.requests):
        plan = MiniBatchPlan(batches=tuple(groups))
        cost = problem.evaluate(plan)
        if cost.fits:
            yield cost.latency, plan


PROBLEM = MiniBatchProblem(
    load=(4.0, 4.0, 1.0, 1.0),
    generate=(1.0, 1.0, 4.0, 4.0),
    blocks=(2, 2, 2, 2),
    most_requests=2,
    most_blocks=4,
    alpha_load=0.5,
    alpha_generate=0.5,
    weights=0.5,
    layers=2,
)
"""Pairs in order: max(8.5, 2.5) twice, 17 s. One of each kind: 5.5 twice, 11 s; the link needs 0.5 + 10 + 1 = 11.5 s, no plan less. Two
layers: 34 and 23 s."""


def test_costs_by_hand():
    in_order = PROBLEM.evaluate(MiniBatchPlan(batches=((0, 1), (2, 3))))
    mixed = PROBLEM.evaluate(MiniBatchPlan(batches=((0, 2), (1, 3))))
    assert (in_order.latency, in_order.ratios) == (34.0, (0.25, 4.0))
    assert (mixed.latency, mixed.link_time, mixed.gpu_time, mixed.ratios) == (23.0, 23.0, 22.0, (1.0, 1.0))


def test_limits_are_told_apart():
    cost = PROBLEM.evaluate(MiniBatchPlan(batches=((0, 1, 2), (3,))))
    assert not cost.fits
    assert cost.explain_overflow() == "mini-batch 0 has 3 requests of 2, mini-batch 0 holds 6 blocks of 4"


@pytest.mark.parametrize("seed", range(50))
def test_solvers_against_all_partitions(seed):
    problem = random_problem(seed, requests=1 + seed % 6)
    best = min(latency for latency, _ in fitting_costs(problem))
    assert problem.least_latency <= best * (1 + SUMS)
    for solver in (MilpBatches(), CpSatBatches()):
        result = solver.solve(problem)
        assert result.status is Status.OPTIMAL
        assert best * (1 - SUMS) <= result.objective <= best * (1 + solver.relative_gap)
        assert result.bound <= best * (1 + SUMS)
    for solver in (FirstComeBatches(), GreedyRatioBatches()):
        assert solver.solve(problem).objective >= best * (1 - SUMS)


@pytest.mark.parametrize("seed", range(50, 80))
def test_some_optimal_plan_has_no_more_mini_batches_than_places(seed):
    problem = random_problem(seed, requests=6)
    found = list(fitting_costs(problem))
    best = min(latency for latency, _ in found)
    near = [len(plan.batches) for latency, plan in found if latency <= best * (1 + SUMS)]
    assert min(near) <= most_places(problem)


@given(st.integers(0, 10**6), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_merging_two_mini_batches_is_never_slower(seed, requests):
    problem = random_problem(seed, requests)
    alone = [(i,) for i in range(requests)]
    merged = [(0, 1), *alone[2:]]
    before, after = (problem.evaluate(MiniBatchPlan(batches=tuple(groups))).latency for groups in (alone, merged))
    assert after <= before * (1 + SUMS)


@given(st.integers(0, 10**6), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_heuristics_always_fit_and_are_above_the_bound(seed, requests):
    problem = random_problem(seed, requests)
    for solver in (FirstComeBatches(), GreedyRatioBatches()):
        result = solver.solve(problem)
        assert result.status is Status.FEASIBLE
        assert result.objective >= problem.least_latency * (1 - SUMS)


def test_a_skewed_order_costs_first_come_much_and_greedy_little():
    """All requests that load first, then all that compute: in order every mini-batch is one-sided."""
    problem = MiniBatchProblem(
        load=(1.0,) * 8 + (0.1,) * 8, generate=(0.1,) * 8 + (1.0,) * 8, blocks=(1,) * 16, most_requests=4, most_blocks=4
    )
    first, greedy = FirstComeBatches().solve(problem), GreedyRatioBatches().solve(problem)
    assert first.objective == pytest.approx(16.0, rel=SUMS)
    assert greedy.objective == pytest.approx(8.8, rel=SUMS)
    assert CpSatBatches().solve(problem).status is Status.OPTIMAL


@pytest.mark.parametrize("solver", [CpSatBatches(time_limit=20.0), MilpBatches(time_limit=20.0)])
def test_sixteen_unequal_requests_are_proven(solver):
    rng = np.random.default_rng(7)
    blocks = np.clip(rng.lognormal(3.5, 0.7, 16).astype(int), 1, 200)
    act = rng.integers(0, blocks + 1)
    problem = MiniBatchProblem(
        load=tuple((2e-3 * blocks - 1e-3 * act).tolist()),
        generate=tuple((2.9e-3 * act).tolist()),
        blocks=tuple(blocks.tolist()),
        most_requests=5,
        most_blocks=int(max(blocks.max(), blocks.sum() * 0.4)),
        alpha_generate=0.01,
    )
    result = solver.solve(problem)
    assert result.status is Status.OPTIMAL
    assert result.gap <= solver.relative_gap


# Requests that follow a cache plan

LINE = LinearTime(slope=1.0)
RATIO = CacheRatioProblem(
    layers=(
        RatioLayer(
            layers=3,
            weights=2.0,
            compute=1.0,
            load_kv=LinearTime(intercept=0.5, slope=2.0),
            load_act=LINE,
            generate=LinearTime(intercept=0.25, slope=3.0),
        ),
    ),
    request_blocks=(3, 5, 2),
    kv_block=2,
    act_block=1,
    gpu_capacity=100,
    host_capacity=100,
)


def test_gpu_blocks_go_to_requests_that_come_first():
    """Four ACT blocks on the GPU: three of request 0, one of request 1; the host's three KV and three ACT alternate."""
    problem = MiniBatchProblem.from_cache_plan(RATIO, CacheRatioPlan(act_gpu=4, kv_host=3, act_host=3), most_requests=2)
    assert problem.load == (0.0, 2 * 2.0 + 2 * 1.0, 2.0 + 1.0)
    assert problem.generate == pytest.approx((3 * 3.0 + 0.3, 3 * 3.0 + 0.5, 1 * 3.0 + 0.2), rel=SUMS)
    assert problem.blocks == (3, 5, 2)
    assert problem.most_blocks == 8
    assert (problem.alpha_load, problem.alpha_generate, problem.weights, problem.layers) == (0.5, 0.25, 2.0, 3)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_shares_add_up_to_the_plan(blocks, random):
    total = sum(blocks)
    cuts = sorted(random.randint(0, total) for _ in range(3))
    plan = CacheRatioPlan(kv_gpu=cuts[0], act_gpu=cuts[1] - cuts[0], kv_host=cuts[2] - cuts[1], act_host=total - cuts[2])
    layer = replace(RATIO.layers[0], compute=0.0)
    problem = MiniBatchProblem.from_cache_plan(replace(RATIO, request_blocks=tuple(blocks), layers=(layer,)), plan, most_requests=3)
    assert sum(problem.load) == 2 * plan.kv_host + plan.act_host
    assert sum(problem.generate) == 3 * (plan.act_gpu + plan.act_host)
    assert sum(problem.blocks) == total - plan.kv_gpu
    assert all(mine <= all_of_it for mine, all_of_it in zip(problem.blocks, blocks, strict=True))


def test_one_mini_batch_of_all_is_the_step_of_the_cache_plan():
    """Then both say max(weights + loads, compute + recomputation)."""
    plan = CacheRatioPlan(kv_gpu=1, act_gpu=3, kv_host=4, act_host=2)
    problem = MiniBatchProblem.from_cache_plan(RATIO, plan, most_requests=3)
    assert problem.evaluate(MiniBatchPlan(batches=((0, 1, 2),))).latency == pytest.approx(RATIO.evaluate(plan).latency, rel=SUMS)


def test_a_plan_of_another_problem_is_refused():
    with pytest.raises(ValueError, match="another problem"):
        MiniBatchProblem.from_cache_plan(RATIO, CacheRatioPlan(kv_host=1), most_requests=2)


# What is refused


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"most_blocks": 1}, "request 0 has 2 blocks, and a mini-batch holds 1"),
        ({"most_requests": 0}, "most_requests"),
        ({"load": (1.0, 2.0)}, "of each of one or more requests"),
        ({"load": (), "generate": (), "blocks": (0,)}, "one or more requests"),
        ({"generate": (1.0, 1.0, math.nan, 1.0)}, "generate"),
        ({"alpha_load": -1.0}, "alpha_load"),
        ({"layers": 0}, "layers"),
    ],
)
def test_bad_problems_are_refused_in_one_sentence(bad, says):
    with pytest.raises(ValueError, match=says) as refusal:
        replace(PROBLEM, **bad)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("batches", [(), ((),), ((-1,),)])
def test_plans_without_requests_are_refused(batches):
    with pytest.raises(ValueError, match="mini-batch plan"):
        MiniBatchPlan(batches=batches)


@pytest.mark.parametrize("batches", [((0, 1),), ((0, 1, 2, 3), (3,)), ((0, 1, 2, 4),)])
def test_plans_that_are_no_partition_are_refused(batches):
    with pytest.raises(ValueError, match="exactly one mini-batch"):
        PROBLEM.evaluate(MiniBatchPlan(batches=batches))


def test_requests_without_state_take_the_weights():
    idle = MiniBatchProblem(load=(0.0,), generate=(0.0,), blocks=(0,), most_requests=1, most_blocks=1, weights=1.0)
    for solver in (FirstComeBatches(), GreedyRatioBatches(), MilpBatches(), CpSatBatches()):
        assert solver.solve(idle).objective == 1.0


# What every solver keeps to. Every problem has a plan, so the tests for none are switched off.


class BatchCase(SolverCase):
    problem = PROBLEM

    test_without_a_plan_there_are_no_numbers = None


class ExactBatchCase(BatchCase, TimeLimitedExactCase):
    hard = random_problem(5, requests=60)

    test_proves_that_there_is_no_plan = None


class HeuristicBatchCase(BatchCase, HeuristicCase):
    optimum = 23.0


class TestFirstCome(HeuristicBatchCase):
    solver = FirstComeBatches()


class TestGreedy(HeuristicBatchCase):
    solver = GreedyRatioBatches()


class TestMilp(ExactBatchCase):
    solver = MilpBatches()


class TestCpSat(ExactBatchCase):
    solver = CpSatBatches()


def test_every_solver_is_covered():
    own = {thing for _, thing in inspect.getmembers(solvers_module, inspect.isclass) if thing.__module__ == solvers_module.__name__}
    assert {thing for thing in own if hasattr(thing, "solve")} <= covered_solvers(SolverCase)
