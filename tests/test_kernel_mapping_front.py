"""The front over latency and energy: what enumeration finds and nothing else, for any table; of designs, the union of their fronts."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import all_plans, table_problem, two_sided
from strategies import mapping_problems

from memsplit.models import KernelMappingProblem, Workload
from memsplit.models.presets import CHINCHILLA_70B, GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B
from memsplit.models.price import step_energy
from memsplit.models.units import GB, TB
from memsplit.solvers import TableMapping
from memsplit.solvers import kernel_mapping_front as module
from memsplit.solvers.kernel_mapping_front import front_of_designs, latency_energy_front

joules = st.sampled_from([0.0, 0.5, 1.0, 3.0, 17.0])


@st.composite
def constants(draw, problem):
    """The problem with drawn energies and static powers of its system."""
    system = problem.system
    return replace(
        problem,
        system=replace(
            system,
            tiers=tuple(replace(tier, energy=draw(joules), static_power=draw(joules)) for tier in system.tiers),
            units=tuple(replace(unit, energy=draw(joules), static_power=draw(joules)) for unit in system.units),
            links=tuple(replace(link, energy=draw(joules)) for link in system.links),
        ),
    )


@st.composite
def any_tables(draw):
    """Tables without any order but that pages do not fall, many ties among them; bytes read that are no multiple of anything."""
    kinds, number = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    few = st.integers(0, 6).map(float)

    def sides(values):
        return [[[0, *draw(st.lists(values, min_size=number, max_size=number))] for _ in range(2)] for _ in range(kinds)]

    pages = [[sorted(side) for side in kind] for kind in sides(st.integers(0, 4))]
    problem = table_problem(
        sides(few),
        pages,
        draw(st.lists(st.integers(0, 14), min_size=2, max_size=2)),
        layers=draw(st.lists(st.integers(1, 2), min_size=kinds, max_size=kinds)),
        t_sync=draw(st.sampled_from([0.0, 1.0])),
    )
    tables = replace(problem.tables, traffic=np.array(sides(few))[None])
    return draw(constants(replace(problem, tables=tables, system=two_sided())))


def priced(problem, plan, static=True):
    """Seconds and joules of a plan, by ``evaluate`` and ``step_energy``."""
    cost = problem.evaluate(plan)
    energy = step_energy(problem.system, traffic=cost.traffic, latency=cost.latency, flops=cost.flops, link_bytes=cost.link_bytes)
    return cost.latency, float(energy.total if static else energy.moving)


def enumerated(problem, static=True):
    """The front of all plans that fit, one point after the other; each point once."""
    points = sorted({priced(problem, plan, static) for plan in all_plans(problem) if problem.evaluate(plan).fits})
    return [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]


def points(front):
    return [(one.latency, one.energy) for one in front]


@given(any_tables(), st.booleans(), st.sampled_from([(8, 256, 500_000), (2, 3, 1), (1, 1, 10)]))
@settings(max_examples=150)
def test_the_front_is_that_of_all_plans_for_any_table(problem, static, sizes):
    """Whatever is ruled out together, and however few plans are listed at once."""
    with patch.multiple(module, BLOCK=sizes[0], FIRST_COMBINATIONS=sizes[1], LISTED=sizes[2]):
        front = latency_energy_front(problem, static=static)
    assert points(front) == enumerated(problem, static)
    for one in front:
        assert problem.evaluate(one.plan).fits
        assert (one.latency, one.energy) == priced(problem, one.plan, static)


@given(mapping_problems().flatmap(constants), st.booleans())
@settings(max_examples=60)
def test_the_front_is_that_of_all_plans_for_drawn_machines(problem, static):
    """Weight-stationary arrays, tiers that stream over a link, experts; the joules of FLOPs and links among them."""
    assume(len(problem.kinds) <= 4)  # more take seconds to enumerate
    front = latency_energy_front(problem, static=static)
    assert points(front) == enumerated(problem, static)
    assert all("compute" not in one.without for one in front)


@given(mapping_problems(ample=True).flatmap(constants))
@settings(max_examples=30)
def test_its_ends_are_the_fastest_and_the_leanest_plan(problem):
    front = latency_energy_front(problem)
    assert front[0].latency == TableMapping().solve(problem).objective
    latency, energy = np.transpose(points(front))
    assert (np.diff(latency) > 0).all()
    assert (np.diff(energy) < 0).all()


@given(any_tables(), st.sampled_from([2.0, 2.0**20, 2.0**-20]))
@settings(max_examples=40)
def test_scaling_all_times_scales_the_front(problem, scale):
    """A power of two, which rounds nothing; with static power a watt is scaled down as much, so that joules stay as they are."""
    system = problem.system
    scaled = replace(
        problem,
        tables=replace(problem.tables, seconds=problem.tables.seconds * scale, t_sync=problem.tables.t_sync * scale),
        system=replace(
            system,
            tiers=tuple(replace(tier, static_power=tier.static_power / scale) for tier in system.tiers),
            units=tuple(replace(unit, static_power=unit.static_power / scale) for unit in system.units),
        ),
    )
    assert points(latency_energy_front(scaled)) == [(scale * one.latency, one.energy) for one in latency_energy_front(problem)]


@given(any_tables())
@settings(max_examples=40)
def test_static_power_takes_plans_off_the_front_and_brings_none(problem):
    """What is beaten in latency and moving energy is beaten with static power x latency as well."""
    moving = {one.latency for one in latency_energy_front(problem, static=False)}
    assert {one.latency for one in latency_energy_front(problem)} <= moving


@given(any_tables(), st.integers(0, 1), st.integers(1, 5))
@settings(max_examples=40)
def test_more_capacity_brings_no_plan_that_is_worse(problem, tier, more):
    """Each point of the old front is on the new one, or beaten there."""
    capacity = problem.tables.capacity.copy()
    capacity[0, tier] += more
    larger = latency_energy_front(replace(problem, tables=replace(problem.tables, capacity=capacity)))
    for old in latency_energy_front(problem):
        assert any(new.latency <= old.latency and new.energy <= old.energy for new in larger)


def test_few_plans_listed_at_once_give_the_same_front():
    """Ruling out in many small rounds."""
    system = H2M2_SYSTEM.with_tier("HBM", capacity=400 * GB).with_tier("LPDDR", capacity=1200 * GB)
    problem = KernelMappingProblem.build(system, Workload(llm=CHINCHILLA_70B, batch=32, context=1024))
    front = latency_energy_front(problem, static=False)
    assert len(front) > 10
    with patch.multiple(module, BLOCK=5, FIRST_COMBINATIONS=3, LISTED=1000):
        assert latency_energy_front(problem, static=False) == front


def test_equal_plans_are_one_point_the_first_of_them():
    """Two slices that are alike on both sides, of two kinds: three ways to have one of them on each side and one point."""
    alike = [[0.0, 1.0], [0.0, 1.0]]
    problem = table_problem([alike, alike], [[[0, 1], [0, 1]]] * 2, [2, 2], layers=[1, 1])
    problem = replace(problem, system=two_sided().with_tier("fast", energy=1.0).with_tier("slow", energy=1.0))
    (only,) = latency_energy_front(problem)
    assert [splits[0].counts for splits in only.plan.splits] == [(0, 1), (0, 1)]


def test_nothing_that_fits_is_an_empty_front():
    system = H2M2_SYSTEM.with_tier("LPDDR", capacity=1 * GB)
    assert latency_energy_front(KernelMappingProblem.build(system, Workload(llm=GPT3_175B, batch=32, context=1024))) == ()
    assert front_of_designs([]) == ()


def test_what_is_unknown_is_named():
    system = H2M2_SYSTEM.with_unit("HBM chip", energy=None).with_tier("LPDDR", static_power=None)
    problem = KernelMappingProblem.build(system, Workload(llm=LLAMA2_70B, batch=8, context=128))
    assert latency_energy_front(problem)[0].without == ("HBM chip energy", "LPDDR static power")
    assert latency_energy_front(problem, static=False)[0].without == ("HBM chip energy",)


def test_problems_that_it_does_not_take_are_refused():
    workload = Workload(llm=LLAMA2_70B, batch=8, context=128)
    problem = KernelMappingProblem.build(H2M2_SYSTEM, workload)
    with pytest.raises(ValueError, match="takes grouped problems"):
        latency_energy_front(replace(problem, grouped=False))
    with pytest.raises(ValueError, match="takes two memories, and there are 3"):
        latency_energy_front(KernelMappingProblem.build(H2M2_CXL_SYSTEM, workload))
    with pytest.raises(ValueError, match="build the problem from a System"):
        latency_energy_front(replace(problem, system=None))


def test_a_problem_of_too_many_combinations_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_COMBINATIONS", 80)
    with pytest.raises(ValueError, match="no more than 80 combinations, and these 3 kinds have 81; cut by KV head"):
        latency_energy_front(KernelMappingProblem.build(H2M2_SYSTEM, Workload(llm=LLAMA2_70B, batch=8, context=128)))


# Designs


def machines():
    """Eight machines: two sizes and speeds of HBM, two speeds of LPDDR."""
    return [
        H2M2_SYSTEM.with_tier("HBM", capacity=size * GB, bandwidth=fast * TB).with_tier("LPDDR", bandwidth=slow * GB)
        for size in (96, 192)
        for fast in (2, 3)
        for slow in (272, 544)
    ]


def test_the_front_of_designs_is_that_of_the_union_of_their_fronts():
    problems = [KernelMappingProblem.build(system, Workload(llm=LLAMA2_70B, batch=8, context=2048)) for system in machines()]
    front = front_of_designs(problems, static=False)
    union = [(one.latency, one.energy, i) for i, problem in enumerate(problems) for one in latency_energy_front(problem, static=False)]
    expected = [a for a in union if not any(b[0] <= a[0] and b[1] <= a[1] and b[:2] != a[:2] for b in union)]
    assert [(one.latency, one.energy, one.design) for one in front] == sorted(expected)


def test_the_front_of_fastest_plans_misses_points():
    """Each design's fastest plan is one point; slower plans that read less from the memory of more joules a byte are on the front, too."""
    problems = [KernelMappingProblem.build(system, Workload(llm=LLAMA2_70B, batch=8, context=2048)) for system in machines()]
    fastest = [priced(problem, TableMapping().solve(problem).unwrap(), static=False) for problem in problems]
    front = points(front_of_designs(problems, static=False))
    assert front[0] == min(fastest)
    assert len(set(front) - set(fastest)) > 10
    assert min(energy for _, energy in front) < min(energy for _, energy in fastest)
    assert any(slower[0] <= a[0] and slower[1] <= a[1] and slower != a for a in fastest for slower in set(front) - set(fastest))


def test_equal_points_of_different_designs_are_all_kept():
    problem = KernelMappingProblem.build(H2M2_SYSTEM, Workload(llm=LLAMA2_70B, batch=128, context=4096))
    front = front_of_designs([problem, problem])
    assert [one.design for one in front] == [0, 1] * (len(front) // 2)
    assert front[0].plan == front[1].plan
