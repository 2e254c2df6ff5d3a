"""The clairvoyant optimum: solvers against enumeration of all paths, bounds below it, moves as ``transition`` prices them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from conformance import ExactCase
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import all_plans, enumerate_optimum, linear, random_problem, table_problem

from memsplit.models import ComputeUnit, KernelMappingPlan, KernelMappingProblem, Link, MemoryTier, Split, System, Workload
from memsplit.models.clairvoyant import ClairvoyantProblem, TableSteps
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM
from memsplit.solvers import SolverResult, Status, TableMapping
from memsplit.solvers._program import relaxation
from memsplit.solvers.clairvoyant import (
    MOST_ARCS,
    ClairvoyantBound,
    DynamicProgramClairvoyant,
    ExactClairvoyant,
    MilpClairvoyant,
    flow_program,
    regret,
)

SUMS = 1e-12
"""Relative difference of sums of a few dozen terms that are added in another order, and of a bound rounded down by as much."""


def links(*, up: float = 0.5, down: float = 0.7, latency: float = 0.0) -> System:
    """The memories of ``table_problem`` with ``up`` and ``down`` B/s between them."""
    names = ("tier0", "tier1")
    tiers = tuple(MemoryTier(name=name, capacity=1e3, bandwidth=math.inf, latency=latency) for name in names)
    ways = (Link(source="tier1", target="tier0", bandwidth=up), Link(source="tier0", target="tier1", bandwidth=down, latency=latency))
    unit = ComputeUnit(name="unit", tier="tier0", matrix_peak=1.0, vector_peak=1.0)
    return System(name="links", tiers=tiers, units=(unit,), links=ways)


def best_of_all_paths(problem: ClairvoyantProblem) -> float:
    """Seconds of the best of all paths, priced one by one; inf if none fits."""
    return min(problem.evaluate(path).latency for path in product(range(problem.plans), repeat=problem.iterations))


def random_tables(seed: int) -> ClairvoyantProblem:
    """Up to four iterations and plans; some plans do not fit, some moves are forbidden, some numbers are equal."""
    rng = np.random.default_rng(seed)
    iterations, plans = (int(n) for n in rng.integers(1, 5, 2))
    ties = seed % 3 == 0

    gone = (0.0, 0.15, 0.4)[seed // 3 % 3]

    def seconds(*shape: int) -> np.ndarray:
        drawn = rng.integers(0, 3, shape).astype(float) if ties else rng.uniform(0, 2, shape)
        return np.where(rng.random(shape) < gone, np.inf, drawn)

    moves = seconds(iterations, plans, plans) if seed % 5 == 0 else seconds(plans, plans)
    if seed % 7:
        moves[..., np.arange(plans), np.arange(plans)] = 0.0
    return ClairvoyantProblem.from_tables(seconds(iterations, plans), moves, initial=int(rng.integers(plans)) if seed % 2 else None)


def random_splits(seed: int, *, iterations: int = 3, kinds: int = 2, slices: int = 3) -> ClairvoyantProblem:
    """Few slices over two memories whose pages and times change from one iteration to the next.

    The pages are those of arbitrary sides, so that a slice may free more or fewer than it takes; the seed picks latencies and rooms.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.integers(1, slices + 1, kinds).tolist()
    layers = rng.integers(1, 3, kinds).tolist()
    problems = []
    for _ in range(iterations):
        times = [[[0.0, *rng.uniform(0.2, 4, n)] for _ in range(2)] for n in numbers]
        pages = [[[0, *np.cumsum(rng.integers(0, 4, n))] for _ in range(2)] for n in numbers]
        most = [sum(depth * side[t][-1] for depth, side in zip(layers, pages, strict=True)) for t in range(2)]
        room = [int(most[0] * rng.uniform(0.3, 1)), int(most[1] * rng.uniform(0.6, 1.1))]
        problems.append(table_problem(times, pages, room, layers=layers, page=1 + seed % 2))
    ways = links(up=float(rng.choice([1.0, 5.0, 40.0])), down=float(rng.choice([1.0, 7.0])), latency=(0.0, 0.3)[seed % 3 == 1])
    plan = KernelMappingPlan(splits=tuple((Split(layers=depth, counts=(0, n)),) for depth, n in zip(layers, numbers, strict=True)))
    return ClairvoyantProblem.build(problems, system=ways, initial=plan if seed % 4 == 3 else None)


def as_tables(problem: ClairvoyantProblem) -> ClairvoyantProblem:
    """The same plans, as tables that know nothing of splits."""
    steps = problem.steps
    stages = np.stack([steps.stage(i) for i in range(steps.iterations)])
    moves = np.stack([steps.migration(i) for i in range(steps.iterations)])
    return ClairvoyantProblem.from_tables(stages, moves, initial=problem.initial)


def agrees(result: SolverResult, optimum: float, problem: ClairvoyantProblem) -> None:
    """The result is the optimum [s], or there is none (inf)."""
    if math.isinf(optimum):
        assert (result.status, result.plan) == (Status.INFEASIBLE, None)
        return
    assert result.objective == pytest.approx(optimum, rel=SUMS, abs=SUMS)
    assert problem.evaluate(result.unwrap()).latency == result.objective
    assert result.status is Status.OPTIMAL


class TestTables:
    @settings(max_examples=60)
    @given(seed=st.integers(0, 10**6))
    def test_the_dynamic_program_is_the_best_of_all_paths(self, seed):
        problem = random_tables(seed)
        agrees(DynamicProgramClairvoyant().solve(problem), best_of_all_paths(problem), problem)

    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6))
    def test_the_integer_program_and_its_relaxation_are_too(self, seed):
        """The matrix is totally unimodular: the relaxation loses nothing. 1e-6 is the gap the solver may leave."""
        problem = random_tables(seed)
        optimum = best_of_all_paths(problem)
        result = MilpClairvoyant().solve(problem)
        assert (result.status is Status.INFEASIBLE) == math.isinf(optimum)
        if math.isfinite(optimum):
            assert result.objective == pytest.approx(optimum, rel=1e-6, abs=1e-9)
            assert result.bound <= optimum * (1 + SUMS)
            flow = flow_program(problem)
            assert relaxation(flow.program).bound * flow.unit == pytest.approx(optimum, rel=1e-9, abs=1e-9)

    def test_free_moves_take_the_best_plan_of_every_iteration(self):
        stages = np.random.default_rng(1).uniform(1, 2, (30, 8))
        result = DynamicProgramClairvoyant().solve(ClairvoyantProblem.from_tables(stages, np.zeros((8, 8))))
        assert result.plan == tuple(stages.argmin(axis=1).tolist())
        assert result.objective == pytest.approx(stages.min(axis=1).sum(), rel=SUMS)

    def test_forbidden_moves_keep_the_best_plan_of_all(self):
        stages = np.random.default_rng(2).uniform(1, 2, (30, 8))
        moves = np.where(np.eye(8) > 0, 0.0, np.inf)
        result = DynamicProgramClairvoyant().solve(ClairvoyantProblem.from_tables(stages, moves))
        assert result.plan == (int(stages.sum(axis=0).argmin()),) * 30
        assert result.objective == pytest.approx(stages.sum(axis=0).min(), rel=SUMS)

    def test_of_equal_paths_one_that_stays_is_taken(self):
        """Moves are free and plan 1 is faster at the end: (0, 0, 1) and (1, 1, 1) take 3 s."""
        problem = ClairvoyantProblem.from_tables([[1, 1], [1, 1], [2, 1]], np.zeros((2, 2)))
        assert DynamicProgramClairvoyant().solve(problem).plan == (1, 1, 1)

    @pytest.mark.parametrize("initial", [None, 1])
    def test_one_iteration_and_one_plan(self, initial):
        """Going from plan 1 to plan 0 takes 3 s, more than plan 1 is slower."""
        result = DynamicProgramClairvoyant().solve(ClairvoyantProblem.from_tables([[1, 2]], [[0, 9], [3, 0]], initial=initial))
        assert (result.plan, result.objective) == (((0,), 1.0) if initial is None else ((1,), 2.0))
        result = DynamicProgramClairvoyant().solve(ClairvoyantProblem.from_tables([[1], [2]], [[0.0]]))
        assert (result.plan, result.objective) == ((0, 0), 3.0)

    def test_moves_may_be_a_function_of_the_iteration(self):
        """The move is free before iteration 2 only."""
        moves = [np.array([[0.0, 9.0], [9.0, 0.0]])] * 2 + [np.zeros((2, 2))]
        problem = ClairvoyantProblem.from_tables([[1, 2], [1, 2], [9, 1]], lambda i: moves[i])
        for solver in (DynamicProgramClairvoyant(), MilpClairvoyant()):
            assert solver.solve(problem).plan == (0, 0, 1)

    def test_long_traces_are_traced_back_through_every_block(self):
        """1,003 iterations, which no block length divides; plan i mod 5 is the only one that fits."""
        stages = np.where(np.arange(1003)[:, None] % 5 == np.arange(5), 1.0, np.inf)
        result = DynamicProgramClairvoyant().solve(ClairvoyantProblem.from_tables(stages, np.ones((5, 5))))
        assert result.plan == tuple((np.arange(1003) % 5).tolist())
        assert result.objective == 1003 + 1002

    def test_it_says_which_iteration_nothing_fits(self):
        stages = np.ones((5, 2))
        stages[3] = np.inf
        for solver in (DynamicProgramClairvoyant(), MilpClairvoyant(), ExactClairvoyant()):
            result = solver.solve(ClairvoyantProblem.from_tables(stages, np.zeros((2, 2))))
            assert result.status is Status.INFEASIBLE
            assert "no plan fits in iteration 3" in result.message
        assert ClairvoyantBound().value(ClairvoyantProblem.from_tables(stages, np.zeros((2, 2)))) == math.inf

    def test_it_says_that_forbidden_moves_cut_every_path(self):
        problem = ClairvoyantProblem.from_tables([[1, np.inf], [np.inf, 1]], np.where(np.eye(2) > 0, 0.0, np.inf))
        assert "forbidden moves" in DynamicProgramClairvoyant().solve(problem).message
        cost = problem.evaluate((0, 1))
        assert (cost.fits, cost.misfits) == (False, ())
        assert "forbidden" in cost.explain_overflow()
        assert "iteration 1" in problem.evaluate((0, 0)).explain_overflow()

    @settings(max_examples=20)
    @given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
    def test_the_optimum_is_linear_in_time(self, seed, factor):
        problem = random_tables(seed)
        steps = problem.steps
        scaled = replace(problem, steps=TableSteps(stages=steps.stages * factor, moves=steps.moves * factor))
        one, other = (DynamicProgramClairvoyant().solve(each) for each in (problem, scaled))
        assert one.status is other.status
        if one.objective is not None:
            assert other.objective == pytest.approx(one.objective * factor, rel=SUMS, abs=SUMS)


class TestSplits:
    @settings(max_examples=12)
    @given(seed=st.integers(0, 10**6))
    def test_stages_and_moves_are_those_of_the_mapping_problem(self, seed):
        """Every plan of an iteration, and every move, against ``evaluate`` and ``transition``."""
        rng = np.random.default_rng(seed)
        times = [[[0.0, *rng.uniform(0.2, 4, 3)] for _ in range(2)] for _ in range(2)]
        pages = [[[0, *np.cumsum(rng.integers(0, 4, 3))] for _ in range(2)] for _ in range(2)]
        ways = links(up=3.0, down=2.0, latency=float(rng.choice([0.0, 0.5])))
        one = replace(table_problem(times, pages, [8, 9], layers=[1, 2], page=2, t_sync=0.1), system=ways)
        problem = ClairvoyantProblem.build([one, one])
        plans = list(all_plans(one))
        assert problem.plans == len(plans) == 16
        moves = problem.migration(1)
        for plan in plans:
            p = problem.number(plan)
            assert problem.plan(p) == plan
            cost = one.evaluate(plan)
            assert problem.stage(0)[p] == (cost.latency if cost.fits else math.inf)
            for other in plans:
                q = problem.number(other)
                expected = one.transition(plan, other).latency
                assert moves[p, q] == problem.steps.arrival(1, q)[p] == expected
                assert problem.evaluate((p, q)).migration == expected
                assert replace(problem, initial=p).start()[q] == expected

    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6))
    def test_all_solvers_find_the_best_of_all_paths(self, seed):
        """The minimum taken kind by kind is that over all pairs of plans; the plans that bounds rule out are on no better path."""
        problem = random_splits(seed)
        optimum = best_of_all_paths(problem)
        tables = as_tables(problem)
        agrees(DynamicProgramClairvoyant().solve(tables), optimum, tables)
        for solver in (DynamicProgramClairvoyant(counts=None), ExactClairvoyant(counts=2)):
            agrees(solver.solve(problem), optimum, problem)
        if seed % 5 == 0:
            result = MilpClairvoyant().solve(problem)
            assert (result.objective or math.inf) == pytest.approx(optimum, rel=1e-6)

    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6), counts=st.integers(2, 4))
    def test_kind_by_kind_is_plan_by_plan_on_any_grid(self, seed, counts):
        """Three kinds and six iterations, too many paths to list: against the dynamic program over pairs of plans."""
        problem = random_splits(seed, iterations=6, kinds=3)
        grid = problem.steps.on([np.unique(np.linspace(0, own[-1], counts).round().astype(int)) for own in problem.steps.counts])
        coarse = ClairvoyantProblem(steps=grid)
        one, other = DynamicProgramClairvoyant(counts=None).solve(coarse), DynamicProgramClairvoyant().solve(as_tables(coarse))
        assert one.status is other.status
        if one.objective is not None:
            assert one.objective == pytest.approx(other.objective, rel=SUMS)

    @settings(max_examples=30)
    @given(seed=st.integers(0, 10**6))
    def test_bounds_are_below_the_optimum_over_all_plans(self, seed):
        """And free moves are the weaker bound, but for rounding."""
        problem = random_splits(seed, iterations=4)
        optimum = DynamicProgramClairvoyant().solve(as_tables(problem)).objective
        free, charged = ClairvoyantBound(migration=False).value(problem), ClairvoyantBound().value(problem)
        assert free <= charged * (1 + 1e-11)
        assert charged <= (math.inf if optimum is None else optimum)
        result = DynamicProgramClairvoyant(counts=2).solve(problem)
        assert (result.plan is None) == (optimum is None)
        if optimum is not None:
            assert result.bound <= optimum <= result.objective * (1 + SUMS)

    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6))
    def test_without_latency_the_bound_is_the_optimum(self, seed):
        """All that it leaves out is the latency of moves (seeds 1 mod 3 have some); 1e-11 is what it is rounded down by, and sums."""
        problem = random_splits(3 * seed, iterations=5)
        optimum = DynamicProgramClairvoyant().solve(as_tables(problem)).objective
        assert ClairvoyantBound().value(problem) == pytest.approx(math.inf if optimum is None else optimum, rel=1e-11)

    def test_the_bound_leaves_out_latencies_and_free_moves_leave_out_more(self):
        rng = np.random.default_rng(0)
        problems = [linear(rng.uniform(1, 3, (3, 2)), [2, 3, 1], [14, 30], 4) for _ in range(8)]
        problem = ClairvoyantProblem.build(problems, system=links(up=7.0, down=5.0, latency=0.1))
        optimum = ExactClairvoyant(counts=2).solve(problem).objective
        free, charged = ClairvoyantBound(migration=False).value(problem), ClairvoyantBound().value(problem)
        assert free < charged * 0.99
        assert charged < optimum * (1 - 1e-6)

    @settings(max_examples=25)
    @given(seed=st.integers(0, 10**6))
    def test_the_free_bound_adds_the_optima_of_the_iterations(self, seed):
        """Two memories, grouped: seeds 1 mod 4 (see ``random_problem``) but for multiples of 25."""
        one = random_problem(4 * seed + 1 + 4 * ((4 * seed + 1) % 25 == 0))
        problem = ClairvoyantProblem.build([one] * 3, system=links())
        optimum = enumerate_optimum(one)
        expected = math.inf if optimum is None else 3 * optimum
        assert ClairvoyantBound(migration=False).value(problem) == pytest.approx(expected, rel=1e-11)
        agrees(ExactClairvoyant().solve(problem), expected, problem)

    def test_a_faster_link_never_hurts_and_a_slow_one_keeps_one_plan(self):
        rng = np.random.default_rng(5)
        problems = [linear(rng.uniform(1, 3, (2, 2)), [2, 3], [9, 30], 4) for _ in range(6)]
        taken = []
        for speed in (1e-6, 1.0, 10.0, 1e12):
            problem = ClairvoyantProblem.build(problems, system=links(up=speed, down=speed))
            taken.append(DynamicProgramClairvoyant(counts=None).solve(problem).objective)
        assert taken == sorted(taken, reverse=True)
        stages = np.stack([problem.stage(i) for i in range(6)])
        assert taken[0] == pytest.approx(stages.sum(axis=0).min(), rel=SUMS)
        assert taken[-1] == pytest.approx(stages.min(axis=1).sum(), rel=1e-9)  # 1e-11 s a byte

    def test_the_grid_is_no_worse_than_the_paths_it_includes(self):
        """Seed 50: the plans of the optimum are off a grid of two counts a kind and of the iterations' own optima, by more than 1 %."""
        problem = random_splits(50, iterations=5, kinds=2, slices=5)
        optimum = ExactClairvoyant(counts=2).solve(problem)
        assert DynamicProgramClairvoyant(counts=2).solve(problem).objective > optimum.objective * 1.01
        with_path = DynamicProgramClairvoyant(counts=2, include=(optimum.plan,)).solve(problem)
        assert with_path.objective == pytest.approx(optimum.objective, rel=SUMS)

    def test_where_too_many_plans_are_left_the_grid_path_comes_with_its_bound(self):
        problem = random_splits(50, iterations=5, kinds=2, slices=5)
        optimum = ExactClairvoyant(counts=2).solve(problem)
        result = ExactClairvoyant(counts=2, most=1).solve(problem)
        assert result.objective == DynamicProgramClairvoyant(counts=2).solve(problem).objective
        assert result.bound <= optimum.objective < result.objective
        assert result.status is Status.FEASIBLE
        assert ExactClairvoyant(counts=2, relative_gap=0.9).solve(problem).objective == result.objective

    def test_it_says_which_iteration_has_no_room(self):
        full, empty = linear([[1, 2]], [1], [9, 9], 3), linear([[1, 2]], [1], [1, 1], 3)
        problem = ClairvoyantProblem.build([full, empty, full, empty], system=links())
        for solver in (DynamicProgramClairvoyant(), DynamicProgramClairvoyant(counts=None), ExactClairvoyant()):
            assert "no plan fits in iterations 1, 3;" in solver.solve(problem).message
        assert ClairvoyantBound().value(problem) == math.inf

    @settings(max_examples=15)
    @given(seed=st.integers(0, 10**6))
    def test_what_runs_beside_an_iteration_adds_its_seconds(self, seed):
        """Prefills have barriers, other times and pages of their own, which do not count: the cache is that of the decode step."""
        rng = np.random.default_rng(seed)
        first, second, prefill = (
            linear(rng.uniform(1, 3, (2, 2)), pages, [9, 30], [3, 4], t_sync=0.5) for pages in ([2, 3], [2, 3], [100, 100])
        )
        problem = ClairvoyantProblem.build([first, second], beside=[(), (prefill, prefill)], system=links(up=9.0, down=9.0))
        alone = ClairvoyantProblem.build([first, second], system=links(up=9.0, down=9.0))
        for plan in all_plans(first):
            p, cost = problem.number(plan), second.evaluate(plan)
            expected = cost.latency + 2 * prefill.evaluate(plan).latency if cost.fits else math.inf
            assert problem.stage(1)[p] == pytest.approx(expected, rel=SUMS)
            assert problem.stage(0)[p] == pytest.approx(alone.stage(0)[p], rel=SUMS)
        assert np.array_equal(problem.migration(1), alone.migration(1))
        agrees(ExactClairvoyant(counts=2).solve(problem), best_of_all_paths(problem), problem)

    def test_each_direction_pays_its_own_latency(self):
        """Each iteration takes 2 s with both slices on its side, 10 s with one, 20 s with none. Going up is free; going down takes 30 s."""
        low, high = (table_problem([[[0, a, 2 * a], [0, b, 2 * b]]], [[[0, 1, 2]] * 2], [9, 9], layers=[1]) for a, b in ((10, 1), (1, 10)))
        up, down = links(up=math.inf, down=math.inf).links
        system = replace(links(), links=(up, replace(down, latency=30.0)))
        for solver in (DynamicProgramClairvoyant(counts=None), ExactClairvoyant(counts=2)):
            assert solver.solve(ClairvoyantProblem.build([low, high], system=system)).objective == 4.0
            assert solver.solve(ClairvoyantProblem.build([high, low], system=system)).objective == 20.0

    def test_tables_of_many_iterations_are_their_problems(self):
        problems = [linear([[1, 2 + i], [2, 3]], [2, 3], [9, 30], 3) for i in range(3)]
        one = ClairvoyantProblem.build(problems, system=links())
        again = ClairvoyantProblem.build(one.steps.tables, system=links())
        assert all(np.array_equal(one.stage(i), again.stage(i)) for i in range(3))

    def test_gpt3_on_h2m2_is_solved_over_all_plans(self):
        """Two contexts; 97^3 plans in pages of 2 MiB; the myopic path is one of them."""
        problems = [KernelMappingProblem.build(H2M2_SYSTEM, Workload(llm=GPT3_175B, batch=32, context=s)) for s in (900, 1100, 1000)]
        problem = ClairvoyantProblem.build(problems)
        myopic = [TableMapping().solve(one).unwrap() for one in problems]
        moved = sum(one.transition(a, b).latency for a, b, one in zip(myopic, myopic[1:], problems[1:], strict=False))
        cost = problem.evaluate(problem.path(myopic))
        assert cost.stage == pytest.approx(sum(one.evaluate(plan).latency for one, plan in zip(problems, myopic, strict=True)), rel=SUMS)
        assert cost.migration == pytest.approx(moved, rel=SUMS)
        grid, exact = DynamicProgramClairvoyant(counts=9).solve(problem), ExactClairvoyant(counts=9).solve(problem)
        assert exact.status is Status.OPTIMAL
        assert grid.bound <= exact.objective <= grid.objective <= cost.latency
        found = regret(cost.latency, exact)
        assert found.informative
        assert found.lower == pytest.approx(found.upper, abs=SUMS)


class TestRegret:
    def test_it_lies_between_the_best_known_and_the_bound(self):
        """110 s against a path of 100 s and a bound of 94 s, which is within 5 % of neither, but of another policy's 96 s."""
        result = SolverResult(solver="x", status=Status.FEASIBLE, plan=(0,), objective=100.0, bound=94.0)
        assert regret(110.0, result) == (pytest.approx(0.1), pytest.approx(110 / 94 - 1), False)
        assert regret(110.0, result, best=96.0).informative
        assert regret(150.0, replace(result, bound=100.0)).informative
        assert regret(99.0, result).lower < 0

    def test_what_is_unknown_is_none_and_bad_seconds_are_refused(self):
        result = SolverResult(solver="x", status=Status.FEASIBLE, plan=(0,), objective=100.0)
        assert regret(110.0, result) == (pytest.approx(0.1), None, False)
        nothing = SolverResult(solver="x", status=Status.INFEASIBLE)
        assert regret(110.0, nothing) == (None, None, False)
        for latency in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="latency must be seconds"):
                regret(latency, nothing)


class TestRefusals:
    @pytest.mark.parametrize(
        ("stages", "moves", "message"),
        [
            ([1.0, 2.0], [[0.0]], r"\[iterations, plans\]"),
            (np.zeros((0, 2)), [[0.0]], "at least one of each"),
            ([[1.0, -1.0]], np.zeros((2, 2)), "stages must be seconds of at least 0"),
            ([[1.0, np.nan]], np.zeros((2, 2)), "stages must be seconds of at least 0"),
            ([[1.0, 1.0]], np.zeros((3, 3)), r"moves must have the shape \[2, 2\]"),
            ([[1.0, 1.0]], -np.ones((2, 2)), "moves must be seconds of at least 0"),
        ],
    )
    def test_tables_that_are_none(self, stages, moves, message):
        with pytest.raises(ValueError, match=message):
            ClairvoyantProblem.from_tables(stages, moves)

    def test_a_function_that_returns_no_table(self):
        problem = ClairvoyantProblem.from_tables([[1, 1], [1, 1]], lambda i: np.zeros((3, 3)))
        with pytest.raises(ValueError, match="moves before iteration 1 must have the shape"):
            DynamicProgramClairvoyant().solve(problem)

    def test_paths_and_plans_that_are_none(self):
        problem = ClairvoyantProblem.from_tables([[1, 1], [1, 1]], np.zeros((2, 2)))
        with pytest.raises(ValueError, match="the path has 1 plans, and the trace 2 iterations"):
            problem.evaluate((0,))
        with pytest.raises(ValueError, match="plan must be below 2"):
            problem.evaluate((0, 2))
        with pytest.raises(ValueError, match="whole number"):
            problem.evaluate((0, 0.5))
        with pytest.raises(ValueError, match="initial must be below 2"):
            replace(problem, initial=2)
        with pytest.raises(ValueError, match="have numbers only"):
            problem.plan(0)
        with pytest.raises(ValueError, match="3 iterations"):
            DynamicProgramClairvoyant(include=((0,),)).solve(random_splits(20))

    def test_mapping_problems_that_make_no_trace(self):
        one = linear([[1, 2]], [1], [9, 9], 3)
        with pytest.raises(ValueError, match="at least one iteration"):
            ClairvoyantProblem.build([])
        with pytest.raises(ValueError, match="pass system="):
            ClairvoyantProblem.build([one])
        with pytest.raises(ValueError, match="no link leads from 'tier1' to 'tier0'"):
            ClairvoyantProblem.build([one], system=replace(links(), links=()))
        with pytest.raises(ValueError, match="iteration 1 has other kinds"):
            ClairvoyantProblem.build([one, linear([[1, 2]], [1], [9, 9], 4)], system=links())
        with pytest.raises(ValueError, match="iteration 1: the problem splits each layer"):
            ClairvoyantProblem.build([one, replace(one, grouped=False)], system=links())
        with pytest.raises(ValueError, match="takes two memories"):
            ClairvoyantProblem.build([linear([[1, 2, 3]], [1], [9, 9, 9], 3)], system=links())
        with pytest.raises(ValueError, match="iteration 1 has the barrier time 1 s"):
            ClairvoyantProblem.build([one, linear([[1, 2]], [1], [9, 9], 3, t_sync=1.0)], system=links())

        with pytest.raises(ValueError, match="beside has 1 iterations, and the trace 2"):
            ClairvoyantProblem.build([one, one], beside=[()], system=links())
        with pytest.raises(ValueError, match="what runs beside iteration 0 has other kinds"):
            ClairvoyantProblem.build([one], beside=[(linear([[1, 2]], [1], [9, 9], 4),)], system=links())
        with pytest.raises(ValueError, match="links of a system: pass system="):
            ClairvoyantProblem.build(one.tables)

    def test_plans_of_another_problem(self):
        problem = ClairvoyantProblem.build([linear([[1, 2]], [1], [9, 9], 3, layers=2)], system=links())
        for splits, message in [
            (((Split(layers=1, counts=(1, 2)), Split(layers=1, counts=(2, 1))),), "all 2 layers of kind0 alike"),
            (((Split(layers=2, counts=(1, 1)),),), "must add up to 3"),
            (((Split(layers=1, counts=(1, 2)),),), "all 2 layers"),
            ((), "0 kinds of sublayer"),
        ]:
            with pytest.raises(ValueError, match=message):
                problem.number(KernelMappingPlan(splits=splits))

    def test_more_moves_than_the_integer_program_takes_and_counts_that_a_grid_lacks(self):
        problem = ClairvoyantProblem.from_tables(np.ones((3, 400)), np.zeros((400, 400)))
        with pytest.raises(ValueError, match=f"at most {MOST_ARCS} moves"):
            MilpClairvoyant().solve(problem)
        with pytest.raises(ValueError, match="start from all plans"):
            random_splits(20).steps.on([[0], [9]])


SMALL = ClairvoyantProblem.from_tables([[1, 2], [5, 2], [1, 2]], [[0, 1], [1, 0]])
IMPOSSIBLE = ClairvoyantProblem.from_tables([[1, 2], [np.inf, np.inf]], [[0, 1], [1, 0]])


class TestDynamicProgram(ExactCase):
    solver = DynamicProgramClairvoyant(include=((0, 1, 1),))
    problem, impossible = SMALL, IMPOSSIBLE

    def test_bad_settings_are_refused_in_one_sentence(self):
        with pytest.raises(ValueError, match="counts must be a whole number"):
            DynamicProgramClairvoyant(counts=1)


class TestExact(ExactCase):
    solver = ExactClairvoyant(counts=2)
    problem = random_splits(20)
    impossible = ClairvoyantProblem.build([linear([[1, 2]], [1], [1, 1], 3)], system=links())

    @pytest.mark.parametrize("bad", [{"counts": 1}, {"most": 0}, {"relative_gap": 1}])
    def test_bad_settings_are_refused_in_one_sentence(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ExactClairvoyant(**bad)


class TestMilp(ExactCase):
    solver = MilpClairvoyant()
    problem, impossible = SMALL, IMPOSSIBLE
    bad_settings = ({"relative_gap": 1}, {"time_limit": 0}, {"seed": 0.5})
