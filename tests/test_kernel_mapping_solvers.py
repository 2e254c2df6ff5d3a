"""The exact solvers of the kernel mapping against plain enumeration, and what each of them keeps to."""

from dataclasses import replace

import numpy as np
import pytest
from conformance import ExactCase, TimeLimitedExactCase, covered_solvers, public_solvers, setting_names
from problems import (
    FROM_SYSTEMS,
    KNOWN_OPTIMA,
    ROUNDING,
    all_plans,
    enumerate_optimum,
    heterogeneous,
    linear,
    random_optimum,
    random_problem,
    table_problem,
    two_sided,
)

from memsplit.models import KernelMappingProblem, KernelMappingTables, Profile, Workload
from memsplit.models.presets import GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM
from memsplit.models.units import GB, MiB
from memsplit.solvers import ConvexMapping, CpSatMapping, GreedyMapping, MilpMapping, PatternMapping, Status, TableMapping

GAP = 1e-6
EXACT = {
    "table": TableMapping(),
    "convex": ConvexMapping(relative_gap=GAP),
    "pattern": PatternMapping(relative_gap=GAP),
    "milp": MilpMapping(relative_gap=GAP),
    "cpsat": CpSatMapping(relative_gap=GAP),
}
SEEDS = 240
BLOCK = 20
each_solver = pytest.mark.parametrize("name", EXACT)


def takes(name: str, problem: KernelMappingProblem) -> bool:
    """Whether a solver is made for such a problem: the table and the convex one for two tiers, the table for grouped ones."""
    return name not in ("table", "convex") or (len(problem.tier_names) == 2 and (name == "convex" or problem.grouped))


def pairs(problems: dict[str, KernelMappingProblem]) -> list[tuple[str, str]]:
    """Each solver with the names of the problems that it takes."""
    return [(name, what) for name in EXACT for what, problem in problems.items() if takes(name, problem)]


def check(name: str, problem: KernelMappingProblem, optimum: float | None, what: object) -> None:
    """The optimum within the gap asked for, a bound that is below it, and INFEASIBLE exactly where nothing fits."""
    result = EXACT[name].solve(problem)
    if optimum is None:
        assert result.status is Status.INFEASIBLE, what
        assert result.plan is None, what
        return
    assert result.status is Status.OPTIMAL, (what, result)
    assert result.bound <= optimum * (1 + ROUNDING), what
    assert optimum * (1 - ROUNDING) <= result.objective <= optimum * (1 + ROUNDING) / (1 - GAP), what


@pytest.mark.parametrize(("name", "what"), pairs({what: problem for what, (problem, _) in KNOWN_OPTIMA.items()}))
def test_finds_the_optimum_derived_by_hand(name, what):
    check(name, *KNOWN_OPTIMA[what], what)


@pytest.mark.parametrize("what", KNOWN_OPTIMA)
def test_enumeration_finds_the_optimum_derived_by_hand(what):
    """Whole numbers of seconds: exact."""
    problem, optimum = KNOWN_OPTIMA[what]
    assert enumerate_optimum(problem) == optimum


@pytest.mark.parametrize(("name", "what"), pairs(FROM_SYSTEMS))
def test_agrees_with_enumeration_on_tiny_systems(name, what):
    check(name, FROM_SYSTEMS[what], enumerate_optimum(FROM_SYSTEMS[what]), what)


@each_solver
@pytest.mark.parametrize("block", range(SEEDS // BLOCK))
def test_agrees_with_enumeration_on_random_tables(name, block):
    """Linear, arbitrary and tied costs, grouped and per layer, one to three tiers, capacities that bind or are one page too small."""
    for seed in range(BLOCK * block, BLOCK * (block + 1)):
        problem = random_problem(seed)
        if takes(name, problem):
            check(name, problem, random_optimum(seed), seed)


def test_the_random_tables_hold_what_they_are_for():
    """Infeasible ones, and per layer ones on which the greedy algorithm is off: else agreement with enumeration would show little."""
    feasible = {seed: optimum for seed in range(SEEDS) if (optimum := random_optimum(seed)) is not None}
    assert SEEDS - len(feasible) >= 10
    greedy = {seed: GreedyMapping().solve(random_problem(seed)).objective for seed in feasible if not random_problem(seed).grouped}
    off = [seed for seed, objective in greedy.items() if objective is not None and objective > 1.01 * feasible[seed]]
    assert len(off) >= 20
    assert {len(random_problem(seed).tier_names) for seed in off} == {2, 3}
    for seed in range(10):
        assert len({str(plan) for plan in all_plans(random_problem(seed))}) == sum(1 for _ in all_plans(random_problem(seed)))


@pytest.mark.parametrize("seed", range(3))
def test_agree_with_one_another_where_enumeration_would_take_too_long(seed):
    """Two tiers, 2 x 8 layers cut into 12, per layer, with a barrier of 0, 1 and 2 s; each pair of solvers within both gaps."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(0.5, 2, (2, 1)) * np.array([1, 3]) * rng.uniform(0.7, 1.4, (2, 2))
    pages = rng.integers(3, 12, 2)
    total = int(8 * 12 * pages.sum())
    problem = KernelMappingProblem.from_slices(seconds, pages, [total // 3, total], slices=12, layers=8, t_sync=float(seed))
    results = {name: solver.solve(problem) for name, solver in EXACT.items() if takes(name, problem)}
    assert {result.status for result in results.values()} == {Status.OPTIMAL}, results
    best = min(result.objective for result in results.values())
    assert max(result.objective for result in results.values()) <= best / (1 - GAP) * (1 + ROUNDING)
    assert max(result.bound for result in results.values()) <= best * (1 + ROUNDING)


@pytest.mark.parametrize("page", [1, 2 * MiB])
def test_agree_on_a_published_machine(page):
    """GPT3-175B on H2M2's machine, in bytes and in pages: 97^3 mappings."""
    problem = KernelMappingProblem.build(H2M2_SYSTEM.with_page(page), Workload(llm=GPT3_175B, batch=32, context=1024))
    optimum = TableMapping().solve(problem).objective
    for name, solver in EXACT.items():
        result = solver.solve(problem)
        assert result.status is Status.OPTIMAL, name
        assert optimum * (1 - ROUNDING) <= result.objective <= optimum * (1 + ROUNDING) / (1 - GAP), name


@each_solver
def test_says_what_does_not_fit_and_what_would_help(name):
    """Which memory, how many GB, and a way out, in one sentence."""
    system = H2M2_SYSTEM.with_page(1).with_tier("HBM", capacity=60 * GB).with_tier("LPDDR", capacity=150 * GB)
    result = EXACT[name].solve(KernelMappingProblem.build(system, Workload(llm=GPT3_175B, batch=32, context=1024)))
    assert result.status is Status.INFEASIBLE
    # 96 layers x (12 x 12288^2 B of weights + 2 x 12288 x 32 x 1024 B of keys and values) = 251.256 GB, 41.2556 GB more than 210 GB.
    for part in ("251.256 GB", "HBM 60 GB", "LPDDR 150 GB", "enlarge LPDDR by at least 41.2556 GB", "a context of at most about"):
        assert part in result.message
    assert "\n" not in result.message


def test_the_context_that_is_offered_instead_fits_and_the_next_slices_do_not():
    """210 GB less 173.946 GB of weights hold keys and values of 477 tokens at 75,497,472 B each."""
    system = H2M2_SYSTEM.with_page(1).with_tier("HBM", capacity=60 * GB).with_tier("LPDDR", capacity=150 * GB)

    def solved(context: int) -> Status:
        return TableMapping().solve(KernelMappingProblem.build(system, Workload(llm=GPT3_175B, batch=32, context=context))).status

    message = TableMapping().solve(KernelMappingProblem.build(system, Workload(llm=GPT3_175B, batch=32, context=1024))).message
    assert "a context of at most about 477 " in message
    assert solved(450) is Status.OPTIMAL  # a little less: slices of a head are not divisible
    assert solved(478) is Status.INFEASIBLE


def test_room_that_no_slice_fits_into_is_called_so():
    problem, _ = KNOWN_OPTIMA["room enough, but not slice by slice"]
    assert "would fit" in TableMapping().solve(problem).message
    assert "finer slices" in TableMapping().solve(problem).message


@pytest.mark.parametrize("solver", [TableMapping(), ConvexMapping()])
def test_two_memory_solvers_refuse_three(solver):
    with pytest.raises(ValueError, match="two") as refusal:
        solver.solve(linear([[1, 2, 3]], [1], [9, 9, 9], 3))
    assert "\n" not in str(refusal.value)
    assert "3" in str(refusal.value)


def test_the_table_refuses_problems_per_layer_and_too_many_kinds():
    with pytest.raises(ValueError, match=r"grouped problems.*; use ConvexMapping or PatternMapping"):
        TableMapping().solve(linear([[1, 2]], [1], [9, 9], 3, grouped=False))
    with pytest.raises(ValueError, match=r"combinations.*; use ConvexMapping"):
        TableMapping().solve(linear([[1, 2]] * 5, [1] * 5, [999, 999], 96))


def random_designs(number: int, seed: int) -> list:
    rng = np.random.default_rng(seed)
    return [
        H2M2_SYSTEM.with_tier("HBM", capacity=float(rng.integers(0, 200)) * GB, bandwidth=rng.uniform(1e12, 8e12))
        .with_tier("LPDDR", capacity=float(rng.integers(20, 500)) * GB, bandwidth=rng.uniform(1e11, 1e12))
        .with_unit("HBM chip", matrix_peak=rng.uniform(5e13, 5e14))
        for _ in range(number)
    ]


@pytest.mark.parametrize("page", [1, 2 * MiB])
def test_a_batch_of_designs_equals_its_singles_bit_for_bit(page):
    """Feasible and infeasible designs of different capacities, bandwidths and peaks."""
    designs = [design.with_page(page) for design in random_designs(40, seed=page % 7)]
    workload = Workload(llm=GPT3_175B, batch=32, context=1024)
    profile = Profile(name="test", t_sync=1e-5)
    seconds, counts = TableMapping().solve_batch(KernelMappingTables.build(designs, workload, profile=profile))
    assert 0 < np.isfinite(seconds).sum() < len(designs)
    for design, time, slices in zip(designs, seconds, counts, strict=True):
        problem = KernelMappingProblem.build(design, workload, profile=profile)
        single, single_slices = TableMapping().solve_batch(problem.tables)
        assert single[0] == time
        result = TableMapping().solve(problem)
        if result.plan is None:
            assert time == np.inf
        else:
            assert (single_slices[0] == slices).all()
            assert [list(splits[0].counts) for splits in result.plan.splits] == slices.tolist()


def test_a_bound_is_below_the_optimum_even_where_the_solver_is_stopped_early():
    """The Lagrangian bound of any worth is valid: stopped at once, the bound still lies below what a full solve finds."""
    problem = KernelMappingProblem.build(H2M2_CXL_SYSTEM, Workload(llm=GPT3_175B, batch=32, context=2048), grouped=False)
    full = PatternMapping().solve(problem)
    assert full.status is Status.OPTIMAL
    for solver in (PatternMapping(time_limit=1e-3), MilpMapping(time_limit=1e-3), CpSatMapping(time_limit=1e-3)):
        early = solver.solve(problem)
        assert early.bound is None or early.bound <= full.objective * (1 + ROUNDING)


def test_the_worth_of_capacity_is_what_a_little_more_of_it_saves():
    """Linear costs of many layers are all but divisible: one hundredth more room saves its worth, within the gap of both solves."""
    rng = np.random.default_rng(3)
    seconds = rng.uniform(1, 2, (60, 2)) * np.array([1, 4])
    pages = rng.integers(50, 90, 60)
    total = int(40 * pages.sum())

    def solved(room: int, solver):
        return solver.solve(KernelMappingProblem.from_slices(seconds, pages, [room, total], slices=40, page=1000))

    room = total // 2
    for solver in (ConvexMapping(), PatternMapping(relative_gap=1e-5)):
        before, after = solved(room, solver), solved(room + room // 100, solver)
        saved = before.objective - after.objective
        expected = before.capacity_worth[0] * 1000 * (room // 100)
        # The worth falls as room is added, by a few per cent here over a step of one per cent.
        assert 0.9 * expected <= saved <= expected + 2e-5 * before.objective
        assert before.capacity_worth[1] == 0


class TestTable(ExactCase):
    solver = TableMapping()
    problem = FROM_SYSTEMS["both sides computing"]
    impossible = FROM_SYSTEMS["nothing fits"]


class TestConvex(TimeLimitedExactCase):
    solver = ConvexMapping()
    problem = FROM_SYSTEMS["per layer, barriers"]
    impossible = FROM_SYSTEMS["nothing fits"]
    hard = heterogeneous(2)


class TestPattern(TimeLimitedExactCase):
    solver = PatternMapping()
    problem = FROM_SYSTEMS["a tier that streams, per layer"]
    impossible = FROM_SYSTEMS["nothing fits"]
    hard = heterogeneous(3)


class TestMilp(TestPattern):
    solver = MilpMapping()
    bad_settings = (*TimeLimitedExactCase.bad_settings, {"threads": 0})


class TestCpSat(TestPattern):
    solver = CpSatMapping()
    bad_settings = (*TimeLimitedExactCase.bad_settings, {"threads": 0})


def test_every_exact_solver_has_its_case():
    public = public_solvers("kernel_mapping")
    assert public <= covered_solvers(ExactCase)
    limited = {solver for solver in public if "time_limit" in setting_names(solver())}
    assert covered_solvers(TimeLimitedExactCase) & public == limited


def test_another_seed_and_more_threads_give_the_same_optimum():
    problem, optimum = KNOWN_OPTIMA["three tiers, two full"]
    for solver in (
        replace(EXACT["milp"], seed=7, threads=2),
        replace(EXACT["cpsat"], seed=7, threads=1),
        replace(EXACT["pattern"], seed=7),
    ):
        assert solver.solve(problem).objective == optimum


def test_a_page_of_many_bytes_counts_as_one_unit_of_capacity():
    """The same coefficients in pages of 1 B and of 2 MiB: the same plan, and bytes held 2 MiB times as many."""
    small, large = (linear([[1, 2], [2, 1]], [1, 2], [5, 9], 4, page=page) for page in (1, 2 * MiB))
    plans = [TableMapping().solve(problem).unwrap() for problem in (small, large)]
    assert plans[0] == plans[1]
    held = [problem.evaluate(plan).tier_bytes for problem, plan in zip((small, large), plans, strict=True)]
    assert [2 * MiB * nbytes for nbytes in held[0]] == list(held[1])


def test_a_fast_shared_lane_changes_nothing_and_a_slow_one_does():
    """A lane that is never the slowest is no constraint; one on which both sides add up to 9 s is the sublayer's time."""
    sides, held = [[[0, 2, 4], [0, 3, 6]]], [[[0, 1, 2], [0, 1, 2]]]
    fast = table_problem(sides, held, [2, 2], layers=[1], shared=[[[[0, 0.1, 0.2], [0, 0.1, 0.2]]]])
    slow = table_problem(sides, held, [2, 2], layers=[1], shared=[[[[0, 4.5, 9], [0, 4.5, 9]]]])
    assert [TableMapping().solve(problem).objective for problem in (fast, slow)] == [3.0, 9.0]


def test_designs_of_one_structure_only_share_tables():
    with pytest.raises(ValueError, match="differ in tiers, units or links"):
        KernelMappingTables.build([H2M2_SYSTEM, two_sided()], Workload(llm=GPT3_175B, batch=1, context=1), profile=Profile(name="test"))
    swapped = replace(H2M2_SYSTEM, links=H2M2_SYSTEM.links[::-1])
    with pytest.raises(ValueError, match="differ in tiers, units or links"):
        KernelMappingTables.build([H2M2_SYSTEM, swapped], Workload(llm=GPT3_175B, batch=1, context=1), profile=Profile(name="test"))
