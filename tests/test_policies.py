"""Policies: each decides what its solver would for the iteration on its own, and moves when it says it does."""

import math
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import all_plans
from strategies import dense_llms, llms, profiles, systems
from test_serving import linked

from memsplit.dse.replay import against_optimum, replay
from memsplit.models import LENGTHS, KernelMappingPlan, KernelMappingProblem, Workload
from memsplit.models.baselines import hierarchical
from memsplit.models.presets import (
    DEEPSEEK_V3,
    GPT3_175B,
    H2M2_CXL_SYSTEM,
    H2M2_SYSTEM,
    LLAMA2_70B,
    LLAMA3_1_70B,
    LPDDR_ONLY_SYSTEM,
)
from memsplit.models.serving import PolicyState, Service, ServingState, StepWindow, _plan_exists
from memsplit.models.trace import fixed_trace, h2m2_trace, poisson_trace
from memsplit.models.units import TB
from memsplit.solvers import ClairvoyantBound, GreedyMapping, PatternMapping, TableMapping, UniformMapping
from memsplit.solvers.policies import FlexGenStatic, Greedy, HardwareCache, Hysteresis, LookAhead, Myopic, SingleTier, Static
from memsplit.solvers.shortlist import Shortlist

POLICIES = (
    Static(),
    FlexGenStatic(),
    SingleTier(),
    HardwareCache(),
    Greedy(),
    Myopic(),
    Hysteresis(),
    LookAhead(iterations=8),
    Shortlist(),
)
TRACE = h2m2_trace(5, batch=32, iterations=24)
NOBODY = ServingState.start(fixed_trace(1, prompt_tokens=1, output_tokens=1))


def state_of(service: Service, steps: list[tuple[int, int]], row: int = 0, previous: KernelMappingPlan | None = None) -> PolicyState:
    """The state before one of some iterations; the last one has the most tokens."""
    window = StepWindow.of(service, *zip(*steps, strict=True))
    return PolicyState(serving=NOBODY, previous=previous, window=window, row=row, longest=window.problem(len(steps) - 1))


def run(policy, trace=TRACE, system=H2M2_SYSTEM, llm=GPT3_175B, **settings):
    return replay(policy, trace, system, llm, batch_limit=32, prefill=False, **settings)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_policy_is_a_frozen_value_that_pickles(policy):
    assert type(policy).__dataclass_params__.frozen
    assert not hasattr(policy, "__dict__")
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(replace(policy)) == hash(policy)


@given(st.data())
@settings(max_examples=50)
def test_greedy_and_myopic_decide_in_a_window_as_their_solvers_do_alone(data):
    """Iterations of several batches together; where the greedy algorithm finds no plan, so does the policy."""
    llm = data.draw(llms())
    service = Service(system=data.draw(systems(Workload(llm=llm, batch=4, context=9))), llm=llm, profile=data.draw(profiles))
    steps = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 36)), min_size=1, max_size=4))
    for row, step in enumerate(steps):
        problem = service.problem(*step)
        for policy, solver in (
            (Greedy(), GreedyMapping()),
            (Myopic(), TableMapping()),
            (Greedy(order=("fc",)), GreedyMapping(order=("fc",))),
        ):
            expected = solver.solve(problem)
            state = state_of(service, steps, row)
            if expected.plan is None:
                with pytest.raises(ValueError, match=type(solver).__name__):
                    policy.decide(state)
            else:
                assert policy.decide(state) == expected.plan


@pytest.mark.parametrize("llm", [GPT3_175B, LLAMA2_70B, DEEPSEEK_V3])
def test_so_they_do_for_published_llms(llm):
    system = H2M2_SYSTEM.with_tier("LPDDR", capacity=1 * TB)
    service = Service(system=system, llm=llm)
    steps = [(32, 20_000), (31, 50_000), (8, 3_000)]
    for row, step in enumerate(steps):
        assert Greedy().decide(state_of(service, steps, row)) == GreedyMapping().solve(service.problem(*step)).plan
        assert Myopic(compiled=False).decide(state_of(service, steps, row)) == TableMapping().solve(service.problem(*step)).plan


@pytest.mark.parametrize(("policy", "solver"), [(Static(), TableMapping()), (FlexGenStatic(), UniformMapping())])
def test_static_policies_plan_once_for_a_full_batch_of_the_longest(policy, solver):
    result = run(policy)
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    longest = service.problem(32, 32 * int(TRACE.state_tokens.max()))
    assert set(result.rows["plan"]) == {str(solver.solve(longest).plan)}
    assert result.summary["migrations"] == 0
    assert result.summary["migration_GB"] == 0
    assert result.rows["migration_s"].sum() == 0


def test_a_single_tier_is_the_first_or_the_one_that_is_named():
    state = state_of(Service(system=H2M2_SYSTEM, llm=LLAMA2_70B), [(4, 4000)])
    assert [splits[0].counts[1] for splits in SingleTier().decide(state).splits] == [0, 0, 0]
    assert [splits[0].counts[0] for splits in SingleTier(tier="LPDDR").decide(state).splits] == [0, 0, 0]
    with pytest.raises(ValueError, match="CXL"):
        SingleTier(tier="CXL").decide(state)


def test_no_policys_plan_is_faster_than_the_myopic_one():
    """All requests are there from the start, so that every policy sees the same batches; equal sums in the same order are equal bits."""
    optimum = run(Myopic(), migration="free").rows
    for policy in (
        Static(),
        FlexGenStatic(),
        SingleTier(tier="LPDDR"),
        Greedy(),
        Hysteresis(),
        Hysteresis(horizon=0),
        LookAhead(iterations=4),
    ):
        rows = run(policy).rows
        assert (rows["tokens"] == optimum["tokens"]).all()
        assert (rows["decode_s"] >= optimum["decode_s"]).all()
        assert rows["clock_s"].iloc[-1] >= optimum["clock_s"].iloc[-1]


def test_hysteresis_between_never_and_always():
    """With no horizon it moves only where the plan in force overflows; with an endless one every step is as fast as the myopic one."""
    trace = h2m2_trace(1, iterations=96)
    never, some, always = (run(Hysteresis(horizon=horizon), trace) for horizon in (0, 32, math.inf))
    myopic = run(Myopic(), trace)
    assert (always.rows["decode_s"] == myopic.rows["decode_s"]).all()
    assert always.summary["migration_GB"] <= myopic.summary["migration_GB"]
    assert 0 < never.summary["migrations"] <= some.summary["migrations"] <= always.summary["migrations"]
    assert never.summary["migration_GB"] < myopic.summary["migration_GB"]


@dataclass(frozen=True)
class Costly:
    """The decision of ``Hysteresis``, checked against its rule worked out from the single problems."""

    policy: Hysteresis

    def decide(self, state):
        plan = self.policy.decide(state)
        optimum = TableMapping().solve(state.problem).plan
        if state.previous is None or not state.problem.evaluate(state.previous).fits:
            assert plan == optimum
        else:
            gain = state.problem.evaluate(state.previous).latency - state.problem.evaluate(optimum).latency
            pays = self.policy.horizon * gain > state.problem.transition(state.previous, optimum).latency
            assert plan == (optimum if pays else state.previous)
        return plan


@pytest.mark.parametrize("horizon", [4, 64])
def test_hysteresis_keeps_to_its_rule(horizon):
    result = run(Costly(Hysteresis(horizon=horizon)), h2m2_trace(1, iterations=48))
    assert result.stopped == ""


@pytest.mark.parametrize("horizon", [-1, math.nan, "soon"])
def test_a_horizon_that_is_none_is_refused(horizon):
    with pytest.raises(ValueError, match="horizon"):
        Hysteresis(horizon=horizon)


def test_one_and_three_memories_are_planned_too():
    one = state_of(Service(system=LPDDR_ONLY_SYSTEM, llm=LLAMA2_70B), [(4, 4000)])
    for policy in (Greedy(), Myopic(), SingleTier(), Hysteresis(), FlexGenStatic(), LookAhead(), Shortlist()):
        assert [splits[0].counts for splits in policy.decide(one).splits] == [(8,), (8,), (64,)]
    service = Service(system=H2M2_CXL_SYSTEM, llm=LLAMA2_70B)
    three = state_of(service, [(64, 200_000)])
    assert Greedy().decide(three) == GreedyMapping().solve(three.problem).plan
    assert three.latency(Myopic().decide(three)) == PatternMapping().solve(three.problem).objective
    assert three.fits(Static(solver=PatternMapping()).decide(three))
    for policy in (LookAhead(), Shortlist()):
        assert policy.decide(three) == Myopic().decide(three)


@given(st.data())
@settings(max_examples=20)
def test_decisions_do_not_depend_on_the_window(data):
    """What is priced together changes nothing: the same plans with windows of 1 and of 7 iterations."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=4, context=12), ample=data.draw(st.booleans()))))
    service = Service(system=system, llm=llm)
    assume(_plan_exists(service.tables([1], [12])))
    trace = h2m2_trace(data.draw(st.integers(0, 50)), batch=3, iterations=9, shortest=2, longest=12, mean_output=3.0)
    policy = data.draw(st.sampled_from([Greedy(), Myopic(), Hysteresis(horizon=3), LookAhead(iterations=3), Shortlist(points=5)]))
    profile = data.draw(profiles)
    rows = []
    for window in (1, 7):
        result = replay(policy, trace, system, llm, batch_limit=3, profile=profile, window=window)
        rows.append(result.rows.drop(columns="decide_runtime_s"))
    np.testing.assert_array_equal(*(frame.to_numpy() for frame in rows))


def served_by(data) -> tuple[Service, int]:
    """A random machine with links that holds some tokens, and how many."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=4, context=12), ample=data.draw(st.booleans()))))
    service = Service(system=system, llm=llm, profile=data.draw(profiles))
    assume(_plan_exists(service.tables([1], [4])))
    return service, min(service.most_tokens(), 48)


@given(st.data())
@settings(max_examples=15)
def test_look_ahead_of_one_iteration_without_migration_is_myopic(data):
    service, most = served_by(data)
    steps = [(data.draw(st.integers(1, 4)), data.draw(st.integers(1, most))), (4, most)]
    previous = TableMapping().solve(service.problem(4, most)).unwrap()
    state = state_of(service, steps, previous=data.draw(st.sampled_from([None, previous])))
    assert LookAhead(iterations=1, migration=False).decide(state) == Myopic().decide(state)


def look_ahead_seconds(state: PolicyState, coming: list[KernelMappingProblem], plan: KernelMappingPlan) -> float:
    """Seconds of moving to a plan and keeping it; inf if it does not fit in the end."""
    costs = [problem.evaluate(plan) for problem in coming]
    return sum(cost.latency for cost in costs) + state.transition(plan).latency if all(cost.fits for cost in costs) else math.inf


@given(st.data())
@settings(max_examples=15)
def test_look_ahead_finds_the_best_of_all_plans(data):
    """Against enumeration; ``linked`` systems have no latency in their links, and ties may go to any of the best."""
    service, most = served_by(data)
    batch, ahead = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    tokens = data.draw(st.integers(1, most))
    before = TableMapping().solve(service.problem(4, most)).unwrap()
    state = state_of(service, [(batch, tokens), (4, most)], previous=before)
    found = LookAhead(iterations=ahead).decide(state)
    coming = [service.problem(batch, min(tokens + i * batch, most)) for i in range(ahead)]
    number = math.prod(len(state.problem.splits(k)) for k in range(len(state.kinds)))
    assume(number <= 1000)
    least = min(look_ahead_seconds(state, coming, plan) for plan in all_plans(state.problem))
    latencies = 4 * sum(tier.latency for tier in service.system.tiers) + 2 * sum(link.latency for link in service.system.links)
    assert look_ahead_seconds(state, coming, found) <= least * (1 + 1e-9) + latencies


@given(st.data())
@settings(max_examples=15)
def test_an_endless_shortlist_is_myopic_where_its_grid_has_the_iteration(data):
    """On the grid (the last number of tokens, a full batch) its plan takes the seconds of the optimum, but for rounding of sums."""
    service, most = served_by(data)
    batch = data.draw(st.integers(1, 4))
    state = state_of(service, [(batch, most)], previous=None)
    for horizon in (math.inf, 2.0):
        plan = Shortlist(horizon=horizon, points=4).decide(state)
        assert state.fits(plan)
        assert state.latency(plan) == pytest.approx(state.latency(Myopic().decide(state)), rel=1e-12)


@given(st.data())
@settings(max_examples=15)
def test_shortlist_keeps_to_its_rule(data):
    """Of its list, the plan that ``latency`` and ``transition`` say is best, from any plan that was in force."""
    service, most = served_by(data)
    steps = [(data.draw(st.integers(1, 4)), data.draw(st.integers(1, most))), (4, most)]
    policy = Shortlist(horizon=data.draw(st.sampled_from([0.5, 8.0, math.inf])), points=6)
    alone = state_of(service, steps)
    listed = policy.listed(alone).plans
    outsider = alone.window.plan([[0, kind.slices] for kind in alone.kinds])
    state = replace(alone, previous=data.draw(st.sampled_from([*listed, outsider])))

    def seconds(plan: KernelMappingPlan) -> float:
        return state.latency(plan) + state.transition(plan).latency / policy.horizon if state.fits(plan) else math.inf

    assert seconds(policy.decide(state)) == pytest.approx(min(map(seconds, listed)), rel=1e-12)
    assert policy.decide(state) == policy.decide(replace(state, previous=replace(state.previous)))  # equal, and not the same object


def test_both_beat_greedy_on_the_published_setting_and_move_less():
    trace = h2m2_trace(0)
    greedy = run(Greedy(), trace)
    for policy in (LookAhead(iterations=8), Shortlist()):
        found = run(policy, trace)
        assert found.summary["throughput_tok_per_s"] > greedy.summary["throughput_tok_per_s"]
        assert found.summary["migration_GB"] < greedy.summary["migration_GB"]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: LookAhead(iterations=0), "iterations"),
        (lambda: LookAhead(iterations=1.5), "iterations"),
        (lambda: Shortlist(horizon=0), "horizon"),
        (lambda: Shortlist(horizon=math.nan), "horizon"),
        (lambda: Shortlist(points=1), "points"),
    ],
)
def test_settings_that_are_none_are_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_a_shortlist_is_made_anew_for_another_machine():
    """One value may serve several replays, one after the other, and says the same as a new one."""
    policy = Shortlist()
    half = H2M2_SYSTEM.with_tier("HBM", capacity=48e9)
    first, other, again = (run(policy, system=system).rows["plan"].tolist() for system in (H2M2_SYSTEM, half, H2M2_SYSTEM))
    assert first == again != other
    assert other == run(Shortlist(), system=half).rows["plan"].tolist()


def test_a_hardware_cache_takes_its_own_time():
    """Arrivals, prefills: each step is that of ``hierarchical``, nothing moves; regret is against the optimum of its own schedule."""
    trace = poisson_trace(replace(LENGTHS["long-document"], longest_output=8), 10, rate=0.5, seed=1)
    found = replay(HardwareCache(), trace, H2M2_SYSTEM, LLAMA3_1_70B, batch_limit=6)
    assert found.stopped == ""
    service = Service(system=H2M2_SYSTEM, llm=LLAMA3_1_70B)
    for row, prompts in zip(found.rows.to_dict("records"), found.prompts, strict=True):
        step = service.workload(row["batch"], row["tokens"])
        assert row["decode_s"] == hierarchical(H2M2_SYSTEM, step, service.profile).latency
        passes = [replace(step, phase="prefill", batch=1, context=prompt, state_tokens=None) for prompt in prompts]
        assert row["prefill_s"] == sum(hierarchical(H2M2_SYSTEM, one, service.profile).latency for one in passes)
        assert row["HBM_GB"] == row["migration_s"] == row["paging_s"] == 0
    trace = fixed_trace(12, prompt_tokens=1024, output_tokens=12, interval=0.5)
    found, greedy = (replay(policy, trace, H2M2_SYSTEM, GPT3_175B, batch_limit=12, prefill=False) for policy in (HardwareCache(), Greedy()))
    against = against_optimum({"cache": found, "greedy": greedy})
    assert (found.mapped, greedy.mapped) == (False, True)
    assert found.rows["batch"].tolist() != greedy.rows["batch"].tolist()
    own = against["cache"]
    assert own.problem is not against["greedy"].problem
    assert own.regret.lower == found.busy / own.optimum.objective - 1
    assert own.regret.upper == found.busy / own.optimum.bound - 1
    three = replay(HardwareCache(), trace, H2M2_CXL_SYSTEM, LLAMA3_1_70B, batch_limit=6)
    assert "a cache in front of a memory is two memories, not 3" in three.stopped


def test_a_cache_that_holds_everything_is_all_on_the_first_memory_with_all_units():
    """Ample HBM: it hits always, so no step is slower than with everything on HBM and its units alone."""
    ample = H2M2_SYSTEM.with_tier("HBM", capacity=1 * TB)
    trace = fixed_trace(4, prompt_tokens=64, output_tokens=4)
    cache, single = (run(policy, trace, ample, LLAMA2_70B) for policy in (HardwareCache(), SingleTier()))
    assert (cache.rows["decode_s"] <= single.rows["decode_s"]).all()


@given(st.data())
@settings(max_examples=15)
def test_with_prefill_myopic_is_the_optimum_of_each_iteration(data):
    """Migration for free: its seconds are the bound of free moves of its own schedule, which prices decode and prefill together."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=4, context=12), ample=data.draw(st.booleans()))))
    assume(_plan_exists(Service(system=system, llm=llm).tables([1], [12])))
    trace = h2m2_trace(data.draw(st.integers(0, 50)), batch=3, iterations=9, shortest=2, longest=12, mean_output=3.0)
    profile = data.draw(profiles)
    found = replay(Myopic(), trace, system, llm, batch_limit=3, profile=profile, migration="free")
    bound = ClairvoyantBound(migration=False).value(found.clairvoyant())
    assert found.busy == pytest.approx(bound, rel=1e-9)  # sums in another order, and the bound is rounded down by 1e-12
    assert any(found.prompts)


def test_a_state_prices_prefills_by_plan_and_by_table():
    service = Service(system=H2M2_SYSTEM, llm=LLAMA2_70B)
    state = replace(state_of(service, [(4, 4000)]), prompts=(100, 700))
    plan = Myopic().decide(state)
    kinds = state.kinds
    counts = [splits[0].counts[0] for splits in plan.splits]
    by_table = sum(kind.layers * state.prefill_seconds()[k, n] for k, (kind, n) in enumerate(zip(kinds, counts, strict=True)))
    by_plan = sum(service.prefill(prompt).evaluate(plan).latency for prompt in (100, 700))
    assert state.prefill(plan) == by_plan == pytest.approx(by_table, rel=1e-12)
    assert replace(state, prompts=()).prefill_seconds() is None
    assert replace(state, prompts=()).prefill(plan) == 0
    assert service.prefill(100) is service.prefill(100)


PREFILLS = {
    "long documents, Llama 3.1": (
        poisson_trace(replace(LENGTHS["long-document"], longest_output=24), 8, rate=0.3, seed=0),
        H2M2_SYSTEM.with_tier("HBM", capacity=48e9),
        LLAMA3_1_70B,
    ),
    "H2M2's, GPT3": (h2m2_trace(0, iterations=24), H2M2_SYSTEM, GPT3_175B),
}


@pytest.mark.parametrize("name", PREFILLS)
def test_policies_that_look_at_prefill_regret_little(name):
    """All moves are paid for; the optimum is exact. Greedy looks at the decode step alone."""
    trace, system, llm = PREFILLS[name]
    policies = {"greedy": Greedy(), "myopic": Myopic(), "hysteresis": Hysteresis(), "shortlist": Shortlist(), "look_ahead": LookAhead()}
    runs = {policy: replay(value, trace, system, llm, batch_limit=32) for policy, value in policies.items()}
    upper = {policy: found.regret.upper for policy, found in against_optimum(runs).items()}
    assert upper["greedy"] > 0.01
    for policy in ("myopic", "hysteresis", "shortlist", "look_ahead"):
        assert -1e-9 <= upper[policy] < 0.002


def test_without_prefill_no_policy_asks_for_one(monkeypatch):
    """So that its decisions are those of the decode step alone, to the last bit."""
    trace = h2m2_trace(3, iterations=8)
    plans = {policy: run(policy, trace).plans for policy in (Myopic(), Hysteresis(), LookAhead(), Shortlist())}

    def refused(*_):
        raise AssertionError("a prefill was priced")

    monkeypatch.setattr(Service, "prefill", refused)
    for policy, before in plans.items():
        again = run(policy, trace)
        assert (again.stopped, again.plans) == ("", before)
    assert "a prefill was priced" in replay(Shortlist(), trace, H2M2_SYSTEM, GPT3_175B, batch_limit=32).stopped


@given(st.data())
@settings(max_examples=20)
def test_shortlist_keeps_to_its_rule_where_a_prefill_comes_on_top(data):
    """Against the rule worked out plan by plan from ``latency``, ``prefill`` and ``transition``."""
    service, most = served_by(data)
    steps = [(data.draw(st.integers(1, 4)), data.draw(st.integers(1, most))), (4, most)]
    prompts = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    horizon = data.draw(st.sampled_from([0.5, 1.0, 8.0, math.inf]))
    policy = Shortlist(horizon=horizon, points=6)
    alone = replace(state_of(service, steps), prompts=prompts)
    listed = [plan for plan in policy.listed(alone).plans if alone.fits(plan)]
    assert listed
    state = replace(alone, previous=data.draw(st.sampled_from(listed)))

    def score(plan):
        return state.latency(plan) + state.transition(plan).latency / horizon

    def total(plan, later):
        now = state.latency(plan) + state.prefill(plan)
        if horizon == math.inf:
            return now
        way = min(horizon, 1) * now + state.transition(plan).latency
        rest = max(horizon - 1, 0)
        back = state.window.transition(plan, later, state.row).latency
        return way + min(rest * state.latency(plan), back + rest * state.latency(later)) if rest else way

    least = min(map(score, listed))
    best = [plan for plan in listed if score(plan) <= least * (1 + 1e-12)]
    found = policy.decide(state)
    # Ties for the plan to go back to may be broken either way.
    assert any(total(found, later) <= min(total(plan, later) for plan in listed) * (1 + 1e-9) for later in best)


@dataclass(frozen=True)
class Timed(HardwareCache):
    """Takes ``seconds`` an iteration, or raises."""

    seconds: float | None = None

    def decode_time(self, state):
        if self.seconds is None:
            raise RuntimeError("no clock")
        return self.seconds


@pytest.mark.parametrize(
    ("seconds", "named"), [(None, "RuntimeError: no clock"), (-1.0, "at least 0"), (math.nan, "finite"), (math.inf, "finite")]
)
def test_own_times_that_are_none_end_the_replay(seconds, named):
    found = run(Timed(seconds=seconds), fixed_trace(2, prompt_tokens=8, output_tokens=3), llm=LLAMA2_70B)
    assert found.stopped.startswith("policy Timed, iteration 0: ")
    assert named in found.stopped
    assert len(found.rows) == 0
    assert run(Timed(seconds=0.5), fixed_trace(2, prompt_tokens=8, output_tokens=3), llm=LLAMA2_70B).busy == 1.5
