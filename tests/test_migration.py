"""Migration that keeps duplicates: against a simulation of single slices, with invariants in every iteration, and cheaper than without."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import dense_llms, profiles, systems
from test_serving import linked, per_layer

from memsplit.dse.replay import against_optimum, replay
from memsplit.models import ComputeUnit, KernelMappingPlan, KernelMappingProblem, Link, MemoryTier, System, Workload
from memsplit.models.migration import Residency, counts_of
from memsplit.models.paging import migration_time
from memsplit.models.presets import GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B
from memsplit.models.serving import PolicyState, Service, ServingState, StepWindow, _plan_exists
from memsplit.models.trace import fixed_trace, h2m2_trace
from memsplit.models.units import GB
from memsplit.solvers.policies import Greedy, Hysteresis, LookAhead, Myopic, Static
from memsplit.solvers.shortlist import Shortlist

ROUNDING = 1e-12
"""Relative difference of sums of some hundred terms in another order."""

TWO = System(
    name="two",
    tiers=(MemoryTier(name="fast", capacity=0.0, bandwidth=8.0), MemoryTier(name="slow", capacity=0.0, bandwidth=4.0)),
    units=(ComputeUnit(name="unit", tier="fast", matrix_peak=1.0, vector_peak=1.0),),
    links=(Link(source="fast", target="slow", bandwidth=1.0, latency=0.5), Link(source="slow", target="fast", bandwidth=2.0)),
)


@st.composite
def walks(draw: st.DrawFn) -> tuple[KernelMappingProblem, tuple[bool, ...], list[np.ndarray]]:
    """Slices of some pages on two memories, which kinds are weights, and some plans that fit, one after the other."""
    kinds = draw(st.integers(1, 3))
    slices, layers, pages = (
        draw(st.lists(st.integers(low, high), min_size=kinds, max_size=kinds)) for low, high in ((1, 5), (1, 2), (0, 3))
    )
    total = sum(n * deep * held for n, deep, held in zip(slices, layers, pages, strict=True))
    capacity = [draw(st.integers(0, total + 2)) for _ in range(2)]
    problem = KernelMappingProblem.from_slices(
        np.ones((kinds, 2)), pages, capacity, slices=slices, layers=layers, page=draw(st.integers(1, 2))
    )
    fitting = [
        used
        for used in np.stack(np.meshgrid(*(range(n + 1) for n in slices), indexing="ij"), axis=-1).reshape(-1, kinds)
        if all(np.array(layers) * pages @ side <= room for side, room in zip((used, slices - used), capacity, strict=True))
    ]
    assume(fitting)
    chosen = draw(st.lists(st.sampled_from(range(len(fitting))), min_size=1, max_size=6))
    plans = [np.stack([fitting[number], np.array(slices) - fitting[number]], axis=1) for number in chosen]
    return problem, tuple(draw(st.booleans()) for _ in range(kinds)), plans


class Slices:
    """The same rules slice by slice: which ones of a layer of each kind lie on each memory."""

    def __init__(self, problem: KernelMappingProblem, read_only: tuple[bool, ...]) -> None:
        tables = problem.tables
        self.kinds, self.read_only = tables.kinds, read_only
        self.size = [
            [kind.layers * int(tables.pages[0, k, t, 1] * tables.page[0, t]) for t in (0, 1)] for k, kind in enumerate(tables.kinds)
        ]
        self.room = (tables.capacity[0] * tables.page[0]).tolist()
        self.on: list[list[set[int]]] = []

    def wanted(self, used: np.ndarray) -> list[list[set[int]]]:
        return [[set(range(n)), set(range(n, kind.slices))] for kind, n in zip(self.kinds, used[:, 0].tolist(), strict=True)]

    def go(self, used: np.ndarray, *, loaded: bool = False) -> list[int]:
        """Bytes copied to each memory."""
        wanted, copied = self.wanted(used), [0, 0]
        before = self.on or wanted
        self.on = []
        for k, (there, old) in enumerate(zip(wanted, before, strict=True)):
            for t in (0, 1):
                copied[t] += self.size[k][t] * len(there[t] - old[t])
            self.on.append([new | was if self.read_only[k] else set(new) for new, was in zip(there, old, strict=True)])
            if loaded and self.read_only[k]:
                self.on[k][1] = set(range(self.kinds[k].slices))
        for t in (0, 1):
            for k in reversed(range(len(self.kinds))):
                spare = sorted(self.on[k][t] - wanted[k][t], reverse=t == 0)  # the furthest from those in use first
                while spare and sum(size[t] * len(on[t]) for size, on in zip(self.size, self.on, strict=True)) > self.room[t]:
                    self.on[k][t].remove(spare.pop(0))
        return copied


@given(walks(), st.sampled_from(["kept", "loaded"]))
def test_counts_are_those_of_single_slices(walk, duplicates):
    """Which slices are where and how many bytes are copied, after every plan."""
    problem, read_only, plans = walk
    simulated = Slices(problem, read_only)
    simulated.go(plans[0], loaded=duplicates == "loaded")
    found = Residency.start(plans[0], problem.tables, 0, read_only=read_only, duplicates=duplicates)
    free = [0, 0]
    for number, used in enumerate(plans):
        if number:
            copied = simulated.go(used)
            found, cost = found.moved_to(used, problem.tables, 0, system=system_of(problem))
            assert [cost.moved.get(way, 0) for way in (("tier1", "tier0"), ("tier0", "tier1"))] == copied
        for k, (first, second) in enumerate(simulated.on):
            slices = problem.kinds[k].slices
            if simulated.size[k] == [0, 0]:
                continue  # slices without bytes are never in the way
            assert first == set(range(found.first[k]))
            assert second == set(range(slices - found.second[k], slices))
        found.check(used, problem.tables, 0)
        free = [
            sum(size[t] * (len(on[t]) - n) for size, on, n in zip(simulated.size, simulated.on, used[:, t], strict=True)) for t in (0, 1)
        ]
        assert list(found.duplicates(used, problem.tables, 0)) == free


def system_of(problem: KernelMappingProblem) -> System:
    names = dict(zip(("fast", "slow"), problem.tier_names, strict=True))
    return replace(
        TWO,
        tiers=tuple(replace(tier, name=names[tier.name]) for tier in TWO.tiers),
        units=tuple(replace(unit, tier=names[unit.tier]) for unit in TWO.units),
        links=tuple(replace(link, source=names[link.source], target=names[link.target]) for link in TWO.links),
    )


@given(walks())
def test_no_duplicates_are_the_plain_transition_and_more_room_copies_no_more(walk):
    """Kinds of state only: what moves is ``transition``; with ample room a plan that was in force before copies no weights again."""
    problem, read_only, plans = walk
    none = Residency.start(plans[0], problem.tables, 0, read_only=(False,) * len(read_only))
    priced = replace(problem, system=system_of(problem))
    as_plan = [KernelMappingPlan.same_in_all_layers(problem, used.tolist()) for used in plans]
    for before, after, used in zip(as_plan, as_plan[1:], plans[1:], strict=False):
        none, cost = none.moved_to(used, problem.tables, 0, system=priced.system)
        plain = priced.transition(before, after)
        assert cost.moved == {way: nbytes for way, nbytes in plain.moved.items() if nbytes}
        assert cost.latency == pytest.approx(plain.latency, rel=ROUNDING)
    ample = replace(problem.tables, capacity=np.full_like(problem.tables.capacity, 10**9))
    kept = Residency.start(plans[0], ample, 0, read_only=read_only)
    for used in plans[1:]:
        kept, _ = kept.moved_to(used, ample, 0, system=priced.system)
    for used in plans:
        _, again = kept.moved_to(used, ample, 0, system=priced.system, stayed=0.0)
        assert again.moved == {}
        assert again.latency == 0


def test_by_hand():
    """Weights and state of four slices of 10 B in 60 B and 120 B: weights that went down stay above until their room is needed."""
    problem = KernelMappingProblem.from_slices([[1.0, 1.0], [1.0, 1.0]], [10, 10], [60, 120], slices=4, layers=[1, 1])
    system = system_of(problem)
    used = [np.array(rows) for rows in ([[2, 2], [2, 2]], [[1, 3], [2, 2]], [[2, 2], [2, 2]], [[2, 2], [4, 0]], [[2, 2], [2, 2]])]
    here = Residency.start(used[0], problem.tables, 0, read_only=(True, False))
    assert (here.first, here.second, here.duplicates(used[0], problem.tables, 0)) == ((2, 2), (2, 2), (0, 0))
    here, cost = here.moved_to(used[1], problem.tables, 0, system=system)
    assert cost.moved == {("tier0", "tier1"): 10}
    assert cost.latency == 10 / 1.0 + 0.5  # the slower of the link and the memories
    assert (here.first, here.second, here.duplicates(used[1], problem.tables, 0)) == ((2, 2), (3, 2), (10, 0))
    here, cost = here.moved_to(used[2], problem.tables, 0, system=system)
    assert (cost.moved, cost.latency) == ({}, 0.0)
    assert (here.first, here.second) == ((2, 2), (3, 2))
    here, cost = here.moved_to(used[3], problem.tables, 0, system=system, stayed=0.5)
    assert cost.moved == {("tier1", "tier0"): 10}  # half of two slices of keys and values
    here, cost = here.moved_to(used[4], problem.tables, 0, system=system)
    assert cost.moved == {("tier0", "tier1"): 20}  # keys and values come back: their old place is stale
    full = Residency.start(used[0], problem.tables, 0, read_only=(True, True), duplicates="loaded")
    assert (full.first, full.second) == ((2, 2), (4, 4))
    tight = replace(problem.tables, capacity=np.array([[60, 55]]))
    assert Residency.start(used[0], tight, 0, read_only=(True, True), duplicates="loaded").second == (
        3,
        2,
    )  # the last kind's are dropped first


@pytest.mark.parametrize("moved", [{}, {("slow", "fast"): 20.0}, {("slow", "fast"): 20.0, ("fast", "slow"): 5.0}])
def test_both_directions_take_the_longer_and_one_takes_the_sum(moved):
    ways = {("slow", "fast"): lambda nbytes: nbytes / 2, ("fast", "slow"): lambda nbytes: nbytes / 1 + 0.5}
    each = [ways[way](nbytes) for way, nbytes in moved.items()]
    assert migration_time(TWO, moved) == sum(each)
    assert migration_time(TWO, moved, "both") == max(each, default=0)


@dataclass(frozen=True)
class Watched:
    """A policy whose residencies are checked in every iteration, and whose duplicates are those of weights."""

    policy: Any
    duplicates: str

    def decide(self, state):
        plan = self.policy.decide(state)
        used = state.window.counts(plan)
        settled, cost = state.settled(plan, self.duplicates)
        settled.check(used, state.window.tables, state.row)
        if state.previous is not None:
            assert state.residency is not None
            plain = state.window.transition(state.previous, plan, state.row, state.directions)
            assert sum(cost.moved.values()) <= sum(plain.moved.values())
            assert cost.latency <= plain.latency * (1 + ROUNDING)
            assert state.transition(plan) == cost
        return plan


@given(st.data())
@settings(max_examples=20)
def test_nothing_is_lost_in_any_iteration_of_a_replay(data):
    """Random machines, requests that come and go, every policy that moves; the rows say what the invariants say."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=4, context=12), ample=data.draw(st.booleans()))))
    assume(_plan_exists(Service(system=system, llm=llm).tables([1], [12])))
    trace = h2m2_trace(data.draw(st.integers(0, 50)), batch=3, iterations=9, shortest=2, longest=12, mean_output=3.0)
    policy = data.draw(st.sampled_from([Greedy(), Myopic(), Hysteresis(horizon=3), LookAhead(iterations=3), Shortlist(points=5)]))
    how = {"duplicates": data.draw(st.sampled_from(["kept", "loaded"])), "directions": data.draw(st.sampled_from(["one", "both"]))}
    run = replay(
        Watched(policy, how["duplicates"]),
        trace,
        system,
        llm,
        batch_limit=3,
        profile=data.draw(profiles),
        prefill=data.draw(st.booleans()),
        **how,
    )
    assert run.stopped == ""
    assert run.rows["batch"].sum() == trace.output_tokens.sum()
    held = sum(run.rows[f"{tier.name}_GB"] for tier in system.tiers) + run.rows["duplicates_GB"]
    assert (run.rows["duplicates_GB"] >= 0).all()
    assert (held * GB <= sum(tier.capacity for tier in system.tiers) * (1 + 1e-12)).all()  # the sum of the quotients rounds


def test_the_default_is_one_place_a_page_and_one_direction():
    trace = h2m2_trace(0, iterations=64)
    plain, duplex = (
        replay(Myopic(), trace, H2M2_SYSTEM, GPT3_175B, batch_limit=32, prefill=False, directions=way) for way in ("one", "both")
    )
    assert (plain.rows["duplicates_GB"] == 0).all()
    assert (plain.rows["migration_GB"] == duplex.rows["migration_GB"]).all()
    assert (duplex.rows["migration_s"] <= plain.rows["migration_s"]).all()
    assert duplex.rows["migration_s"].sum() < plain.rows["migration_s"].sum()
    assert (plain.directions, plain.duplicates) == ("one", "none")


MODES = (("one", "kept"), ("one", "loaded"), ("both", "none"), ("both", "loaded"))


@pytest.mark.parametrize(("directions", "duplicates"), MODES)
def test_regret_with_duplicates_or_both_directions_has_ends_that_hold(directions, duplicates):
    """The bound is below every replay of the mode, and the best path known takes no longer than the optimum of plain migration."""
    trace = h2m2_trace(2, iterations=24)
    policies = {"static": Static(), "greedy": Greedy(), "myopic": Myopic(), "shortlist": Shortlist()}

    def served(**how):
        runs = {
            name: replay(policy, trace, H2M2_SYSTEM, GPT3_175B, batch_limit=32, prefill=False, **how) for name, policy in policies.items()
        }
        return runs, against_optimum(runs)

    _, plain = served()
    runs, against = served(directions=directions, duplicates=duplicates)
    for name, run in runs.items():
        found = against[name]
        assert found.optimum.bound <= run.busy
        assert found.optimum.bound <= found.optimum.objective <= plain[name].optimum.objective
        assert 0 <= found.regret.lower <= found.regret.upper
        assert found.regret.informative
        assert found.problem.evaluate(found.problem.path(run.plans)).latency >= run.busy * (1 - ROUNDING)


@given(st.data())
@settings(max_examples=20)
def test_shortlist_and_hysteresis_price_moves_as_the_replay_does(data):
    """Of its list, the plan that ``latency`` and ``transition`` say is best, wherever copies are."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=4, context=12), ample=True)))
    service = Service(system=system, llm=llm)
    assume(_plan_exists(service.tables([1], [4])))
    most = min(service.most_tokens(), 48)
    window = StepWindow.of(service, [2, 4], [data.draw(st.integers(1, most)), most])
    state = PolicyState(
        serving=ServingState.start(fixed_trace(1, prompt_tokens=1, output_tokens=1)),
        previous=None,
        window=window,
        row=0,
        longest=window.problem(1),
        directions=data.draw(st.sampled_from(["one", "both"])),
    )
    policy = Shortlist(horizon=data.draw(st.sampled_from([0.5, 8.0, math.inf])), points=6)
    listed = [plan for plan in policy.listed(state).plans if state.fits(plan)]
    assume(listed)
    first, second = (data.draw(st.sampled_from(listed)) for _ in range(2))
    residency = state.settled(first, data.draw(st.sampled_from(["kept", "loaded"])))[0]
    state = replace(state, previous=first, residency=residency, stayed=data.draw(st.sampled_from([0.25, 1.0])))
    residency = state.settled(second)[0]
    state = replace(state, previous=second, residency=residency)

    def seconds(plan):
        return state.latency(plan) + state.transition(plan).latency / policy.horizon

    assert seconds(policy.decide(state)) == pytest.approx(min(map(seconds, listed)), rel=1e-12)


@dataclass(frozen=True)
class ByLayer:
    """Plans whose layers differ."""

    def decide(self, state):
        one, two = (state.window.plan([(n, kind.slices - n) for kind in state.kinds]) for n in (0, 1))
        return per_layer(state.problem, one, two)


def test_what_cannot_keep_duplicates_is_said():
    trace = fixed_trace(2, prompt_tokens=16, output_tokens=4)
    for system, match in ((H2M2_CXL_SYSTEM, "duplicates are kept in two memories, not 3"),):
        with pytest.raises(ValueError, match=match):
            replay(Greedy(), trace, system, LLAMA2_70B, batch_limit=2, duplicates="kept")
    for wrong in ({"directions": "up"}, {"duplicates": True}, {"migration": "later"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replay(Greedy(), trace, H2M2_SYSTEM, LLAMA2_70B, batch_limit=2, **wrong)
    stopped = replay(ByLayer(), trace, H2M2_SYSTEM, LLAMA2_70B, batch_limit=2, duplicates="kept").stopped
    assert "split all layers of a kind alike" in stopped
    with pytest.raises(ValueError, match="one number a kind"):
        Residency(first=(1,), second=(1, 2), read_only=(True,))
    with pytest.raises(ValueError, match="at least 0"):
        Residency(first=(-1,), second=(1,), read_only=(True,))


def test_a_defect_is_found():
    problem = KernelMappingProblem.from_slices([[1.0, 1.0]], [10], [20, 20], slices=4)
    used = np.array([[2, 2]])
    good = Residency.start(used, problem.tables, 0, read_only=(True,))
    good.check(used, problem.tables, 0)
    for wrong, what in (
        ({"first": (1,)}, "neither"),
        ({"first": (5,)}, "more slices than there are"),
        ({"first": (1,), "second": (3,)}, "not there"),
        ({"first": (3,), "read_only": (False,)}, "second copy"),
        ({"first": (3,)}, "capacity"),
    ):
        with pytest.raises(AssertionError, match=what):
            replace(good, **wrong).check(used, problem.tables, 0)


def test_the_start_needs_two_memories():
    service = Service(system=H2M2_CXL_SYSTEM, llm=LLAMA2_70B)
    window = StepWindow.of(service, [1], [1])
    plan = window.plan([[kind.slices, 0, 0] for kind in window.tables.kinds])
    used = counts_of(plan, window.tables)
    with pytest.raises(ValueError, match="two memories"):
        Residency.start(used, window.tables, 0, read_only=service.read_only)
