"""Shortlist prices its plans without tables of the iteration, as these tables would, and a replay says what a decision takes with them."""

import itertools
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import served_by, state_of

from memsplit.dse.replay import decide_runtimes, replay
from memsplit.models.presets import DEEPSEEK_V3, GPT3_175B, H2M2_SYSTEM, LLAMA3_1_70B
from memsplit.models.profiles import FIRST_PRINCIPLES, H2M2_CALIBRATED
from memsplit.models.serving import Service, TableTime
from memsplit.models.trace import fixed_trace
from memsplit.models.units import TB, ns
from memsplit.solvers import Greedy, GreedyEviction, HardwareCache, Myopic, Shortlist, SingleTier, Static, TableMapping

WALKS = replace(H2M2_CALIBRATED, page_walk=300 * ns, page_walks=4)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_plans_are_priced_as_tables_price_them(data):
    """Any machine with two memories, page walks, barriers and shared lanes: seconds but for the rounding of sums in another order, bytes
    and what fits exactly, also for a batch that was not prepared."""
    service, most = served_by(data)
    steps = [(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2 * most))), (4, most)]
    state = state_of(service, steps)
    window, (batch, tokens) = state.window, steps[0]
    listed = Shortlist(points=6).listed(state)
    seconds, state_bytes = listed.priced(batch, tokens)
    fits = [state.fits(plan) for plan in listed.plans]
    assert np.isfinite(seconds).tolist() == fits
    expected = [state.latency(plan) for plan in listed.plans]
    np.testing.assert_allclose(seconds[fits], np.array(expected)[fits], rtol=1e-12)
    held = np.array([window.held(plan, 0) * window.tables.page[0] for plan in listed.plans]).T
    assert (listed.weight_bytes.sum(axis=2) + state_bytes == held).all()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_moves_are_priced_as_transitions(data):
    """Both directions, there and back, from a listed plan and from any other; bytes are whole, so only the seconds are rounded."""
    service, most = served_by(data)
    tokens = data.draw(st.integers(1, most))
    directions = data.draw(st.sampled_from(["one", "both"]))
    alone = replace(state_of(service, [(data.draw(st.integers(1, 4)), tokens), (4, most)]), directions=directions)
    listed = Shortlist(points=6).listed(alone)
    kept = [data.draw(st.integers(0, kind.slices)) for kind in alone.kinds]
    outsider = alone.window.plan([[n, kind.slices - n] for n, kind in zip(kept, alone.kinds, strict=True)])
    previous = data.draw(st.sampled_from([*listed.plans, outsider]))
    state = replace(alone, previous=previous)
    _, state_bytes = listed.priced(1, tokens)
    there = listed.moving_to(state_bytes, state, previous, listed.number(previous))
    np.testing.assert_allclose(there, [state.transition(plan).latency for plan in listed.plans], rtol=1e-12)
    best = data.draw(st.integers(0, len(listed.plans) - 1))
    back = [state.window.transition(plan, listed.plans[best], 0).latency for plan in listed.plans]
    np.testing.assert_allclose(listed.moving_back(state_bytes, best), back, rtol=1e-12)


@pytest.mark.parametrize("profile", [FIRST_PRINCIPLES, WALKS], ids=["first principles", "calibrated, with page walks"])
@pytest.mark.parametrize("llm", [GPT3_175B, LLAMA3_1_70B, DEEPSEEK_V3])
@pytest.mark.parametrize("horizon", [8.0, math.inf])
def test_it_decides_as_with_tables(llm, profile, horizon):
    """Random states of published LLMs: the plan that the iteration's tables say is best, or one as good to 2e-12 (1e-12 for ties, and
    rounding)."""
    system = H2M2_SYSTEM if llm is not DEEPSEEK_V3 else H2M2_SYSTEM.with_tier("LPDDR", capacity=1 * TB)
    service, generator = Service(system=system, llm=llm, profile=profile), np.random.default_rng(7)
    most = min(service.most_tokens(), 32 * 2048)
    steps = [(int(generator.integers(1, 33)), int(generator.integers(32, most + 1))) for _ in range(60)] + [(32, most)]
    first, policy = state_of(service, steps), Shortlist(horizon=horizon, points=24)
    listed, tables = policy.listed(first), first.window.tables
    counts, kinds = listed.counts, np.arange(len(first.kinds))
    layers = np.array([kind.layers for kind in first.kinds])
    seconds = tables.split_seconds(kinds, counts) @ layers
    fits = (np.einsum("dpkt,k->dpt", tables.split_pages(kinds, counts), layers) <= tables.capacity[:, None]).all(axis=2)
    same = 0
    for row in range(len(steps) - 1):
        previous = listed.plans[int(generator.integers(len(listed.plans)))]
        state = replace(first, row=row, previous=previous)
        moving = np.array([state.transition(plan).latency for plan in listed.plans])
        score = np.where(fits[row], seconds[row] + moving / horizon, math.inf)
        found = listed.number(policy.decide(state))
        assert score[found] <= score.min() * (1 + 2e-12)
        same += found == score.argmin()
    assert same > 0


def test_it_asks_for_no_tables_once_its_list_is_made():
    """And nor do policies that map nothing anew; the others do."""
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    previous = TableMapping().solve(service.problem(32, 50_000)).unwrap()
    asked = {}
    for policy in (Shortlist(), Static(), SingleTier(), HardwareCache(), Greedy(), GreedyEviction(), Myopic()):
        state = replace(state_of(service, [(32, 50_000)]), previous=previous)
        before = state.window.spent.asked
        policy.decide(state)
        asked[type(policy).__name__] = state.window.spent.asked > before
    without = {"Shortlist", "Static", "SingleTier", "HardwareCache"}
    assert asked == {name: name not in without for name in asked}


def test_where_nothing_listed_fits_it_is_the_optimum():
    """More tokens than the list was made for: the tables are asked for then."""
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    policy = Shortlist()
    small = state_of(service, [(1, 1), (2, 64)])
    policy.decide(small)
    large = replace(state_of(service, [(32, 100_000)]), longest=small.longest)
    assert policy.decide(large) == Myopic().decide(large)


@dataclass(frozen=True)
class Looking:
    """Everything on the second memory; looks at the tables of the iterations ``at``."""

    at: tuple[int, ...]

    def decide(self, state):
        if state.serving.iteration in self.at:
            assert state.window.tables is state.window.tables
        return state.window.plan([[0, kind.slices] for kind in state.kinds])


@pytest.mark.parametrize(
    ("window", "at", "seconds"),
    [
        (1, (), [1, 1, 1, 1, 1, 1]),
        (1, (1, 2), [1, 3, 3, 1, 1, 1]),
        # Windows of 1, 2 and 3 iterations. Tables are built in the first decision that looks, or by the replay before: 1 s, shared by
        # those that looked.
        (64, (0, 1, 2, 4), [3, 2.5, 1.5, 1, 2, 1]),
    ],
)
def test_a_decision_is_charged_with_its_share_of_the_tables_that_it_looked_at(monkeypatch, window, at, seconds):
    """By a clock that is a second later whenever it is read: 1 s for a decision, 2 s more to read it around the tables."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    trace = fixed_trace(2, prompt_tokens=9, output_tokens=6)
    found = replay(Looking(at=at), trace, H2M2_SYSTEM, GPT3_175B, batch_limit=2, prefill=False, window=window)
    assert found.stopped == ""
    assert found.rows["decide_runtime_s"].tolist() == seconds
    assert found.summary["decide_mean_runtime_s"] == pytest.approx(sum(seconds) / 6)


def test_tables_are_shared_by_the_decisions_that_looked_at_them():
    one, other = TableTime(asked=3, seconds=6.0), TableTime(asked=1, seconds=6.0)
    assert decide_runtimes(np.array([1.0, 2.0, 3.0, 4.0]), [one, None, one, other]).tolist() == [4.0, 2.0, 6.0, 10.0]
    assert decide_runtimes(np.zeros(0), []).tolist() == []
