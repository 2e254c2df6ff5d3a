"""Serving: no request or token is lost, and an iteration of unequal contexts costs what its problem says, priced alone or together."""

import itertools
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import linear_coefficients, llms, profiles, systems

from memsplit.dse import from_json, to_json
from memsplit.models import FIRST_PRINCIPLES, KernelMappingPlan, KernelMappingProblem, Link, Split, System, Workload, kernels
from memsplit.models.offload_serving import OffloadService, OffloadState
from memsplit.models.presets import (
    DEEPSEEK_V3,
    GPT3_175B,
    H2M2_CXL_SYSTEM,
    H2M2_SYSTEM,
    LLAMA2_70B,
    LPDDR_ONLY_SYSTEM,
    MIXTRAL_8X7B,
    OPT_6_7B,
    RTX4090_SYSTEM,
)
from memsplit.models.serving import PolicyState, Service, ServingLimits, ServingState, StepWindow, _plan_exists
from memsplit.models.trace import Trace, fixed_trace
from memsplit.models.units import GB

ARRAYS = ("seconds", "shared", "pages", "traffic", "capacity", "page")


@st.composite
def traces(draw: st.DrawFn, most: int = 8) -> Trace:
    """Some small requests; gaps of 0 are frequent, and some are longer than many iterations."""
    rows = draw(st.lists(st.tuples(st.sampled_from([0, 0, 0.3, 5]), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=most))
    gaps, prompts, outputs = zip(*rows, strict=True)
    return Trace.from_arrays("drawn", np.cumsum(gaps).tolist(), prompts, outputs)


@st.composite
def services(draw: st.DrawFn, tiers: int = 2, *, ample: bool = False, batch: int = 4, context: int = 9, **settings: Any) -> Service:
    """An LLM of some bytes on a machine of about as many, with any profile."""
    llm = draw(settings.pop("llm", llms()))
    system = draw(systems(Workload(llm=llm, batch=batch, context=context), tiers, ample=ample))
    return Service(system=system, llm=llm, profile=draw(profiles), **settings)


def linked(system: System) -> System:
    """The system with a link from each tier to each other one, so that data can move both ways."""
    ways = itertools.permutations(system.tier_names, 2)
    new = {way for way in ways if way not in {(link.source, link.target) for link in system.links}}
    return replace(system, links=(*system.links, *(Link(source=a, target=b, bandwidth=50.0) for a, b in sorted(new))))


def random_plan(problem: KernelMappingProblem, generator: np.random.Generator) -> KernelMappingPlan:
    counts = [problem.splits(k)[generator.integers(len(problem.splits(k)))].tolist() for k in range(len(problem.kinds))]
    return KernelMappingPlan.same_in_all_layers(problem, counts)


def test_state_tokens_are_batch_times_context_unless_said():
    alike = Workload(llm=GPT3_175B, batch=4, context=100)
    said = replace(alike, state_tokens=400)
    assert (alike.tokens_held, said.tokens_held) == (400, 400)
    assert kernels(alike) == kernels(said)
    assert alike.state_bytes == said.state_bytes


@given(llms(), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_attention_of_unequal_contexts_is_the_sum_of_its_requests(llm, contexts):
    """Bytes and FLOPs are whole numbers far below 2^53, so the sum is exact; the products know the batch only."""
    together = Workload(llm=llm, batch=len(contexts), context=max(contexts), state_tokens=sum(contexts))
    alone = [Workload(llm=llm, batch=1, context=context) for context in contexts]
    assert together.state_bytes == sum(workload.state_bytes for workload in alone)
    for field in ("flops", "state_bytes"):

        def attention(workload, field=field):
            return sum(n * sum(getattr(k, field) for k in found if k.sublayer == "attention") for n, found in kernels(workload))

        assert attention(together) == sum(map(attention, alone))
    products = [[k for k in found if k.sublayer != "attention"] for _, found in kernels(together)]
    assert products == [[k for k in found if k.sublayer != "attention"] for _, found in kernels(replace(together, state_tokens=None))]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"state_tokens": -1}, "state_tokens"),
        ({"state_tokens": 1.5}, "state_tokens"),
        ({"state_tokens": 5, "phase": "prefill"}, "one by one"),
        ({"state_tokens": 5, "context": 0}, "context of at least 1"),
    ],
)
def test_state_tokens_that_mean_nothing_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Workload(**({"llm": GPT3_175B, "batch": 2, "context": 3} | wrong))


def test_workloads_written_before_there_were_state_tokens_are_read():
    written = to_json(Workload(llm=LLAMA2_70B, batch=2, context=3))
    del written["state_tokens"]
    assert from_json(written) == Workload(llm=LLAMA2_70B, batch=2, context=3)
    assert from_json(to_json(Workload(llm=LLAMA2_70B, batch=2, context=3, state_tokens=7))).state_tokens == 7


@given(st.data(), st.integers(1, 3), st.sampled_from(["kv_head", "query_head"]))
def test_tables_of_many_steps_are_those_of_each_bit_for_bit(data, tiers, granularity):
    service = data.draw(services(tiers, granularity=granularity, kv_bits=data.draw(st.sampled_from([4, 8, 16]))))
    steps = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=4))
    tables = service.tables(*zip(*steps, strict=True))
    for row, step in enumerate(steps):
        single = service.problem(*step).tables
        assert single.kinds == tables.kinds
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(tables, name)[row], getattr(single, name)[0], strict=True)


@pytest.mark.parametrize("llm", [GPT3_175B, LLAMA2_70B, MIXTRAL_8X7B, DEEPSEEK_V3])
@pytest.mark.parametrize("system", [H2M2_SYSTEM, H2M2_CXL_SYSTEM])
def test_so_they_are_for_published_llms(llm, system):
    service = Service(system=system, llm=llm, profile=replace(FIRST_PRINCIPLES, page_walk=3e-7))
    steps = [(32, 35_449), (31, 35_001), (1, 1)]
    tables = service.tables(*zip(*steps, strict=True))
    for row, step in enumerate(steps):
        single = service.problem(*step).tables
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(tables, name)[row], getattr(single, name)[0], strict=True)


def test_tables_of_no_step_are_refused():
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    for batch, tokens in (([], []), ([1], [0]), ([0], [1]), ([1, 2], [1])):
        with pytest.raises(ValueError, match="at least 1"):
            service.tables(batch, tokens)


@given(st.data(), st.integers(1, 3), st.integers(0, 100))
def test_a_window_prices_as_evaluate_and_transition_do(data, tiers, seed):
    """Seconds, pages and migrated bytes of any plan, to the last bit; per-layer plans too."""
    service = data.draw(services(tiers, ample=True))
    service = replace(service, system=linked(service.system))
    window = StepWindow.of(service, [2, 3], [7, 20])
    generator = np.random.default_rng(seed)
    for row, step in enumerate([(2, 7), (3, 20)]):
        problem = service.problem(*step)
        plans = [random_plan(problem, generator) for _ in range(3)]
        plans.append(per_layer(problem, plans[0], plans[1]))
        for plan, other in itertools.product(plans, plans):
            cost = problem.evaluate(plan)
            assert window.latency(plan, row) == cost.latency
            assert tuple((window.held(plan, row) * problem.page).tolist()) == cost.tier_bytes
            assert window.transition(plan, other, row) == problem.transition(plan, other)


def per_layer(problem: KernelMappingProblem, first: KernelMappingPlan, second: KernelMappingPlan) -> KernelMappingPlan:
    """The first layer of each kind as in one plan, the others as in another."""
    splits = []
    for kind, (one,), (two,) in zip(problem.kinds, first.splits, second.splits, strict=True):
        rest = (Split(layers=kind.layers - 1, counts=two.counts),) if kind.layers > 1 else ()
        splits.append((Split(layers=1, counts=one.counts), *rest))
    return KernelMappingPlan(splits=tuple(splits))


def test_a_plan_of_another_problem_is_refused_by_a_window():
    window = StepWindow.of(Service(system=H2M2_SYSTEM, llm=GPT3_175B), [2], [7])
    other = KernelMappingPlan(splits=((Split(layers=96, counts=(96, 0)),),))
    with pytest.raises(ValueError, match="belongs to another problem"):
        window.latency(other, 0)


@given(linear_coefficients())
def test_whether_a_plan_exists_is_exact_for_two_memories(coefficients):
    problem = KernelMappingProblem.from_slices(**coefficients)
    some = itertools.product(*(problem.splits(k) for k in range(len(problem.kinds))))
    plans = (KernelMappingPlan.same_in_all_layers(problem, [split.tolist() for split in splits]) for splits in some)
    assert _plan_exists(problem.tables) == any(problem.evaluate(plan).fits for plan in plans)


@given(st.data(), st.integers(1, 3))
@settings(max_examples=50)
def test_the_most_tokens_fit_and_one_more_does_not(data, tiers):
    """For three memories, what fits is at most all there is room for."""
    service = data.draw(services(tiers))
    assume(_plan_exists(service.tables([1], [1])))
    most = service.most_tokens()
    assert _plan_exists(service.tables([1], [most]))
    if tiers < 3:
        assert not _plan_exists(service.tables([1], [most + 1]))
    assert (
        service.workload(1, most).weight_bytes + service.workload(1, most).state_bytes
        <= sum(t.capacity for t in service.system.tiers) + 0.1
    )


def test_what_does_not_fit_is_said_before():
    small = H2M2_SYSTEM.with_tier("LPDDR", capacity=10 * GB)
    with pytest.raises(ValueError, match="enlarge HBM by at least 68"):
        Service(system=small, llm=GPT3_175B).most_tokens()
    service = Service(system=H2M2_SYSTEM, llm=LLAMA2_70B)
    most = service.most_tokens()
    large = Trace.from_arrays("t", [0, 0], [9, most], [1, 2])
    with pytest.raises(ValueError, match=f"request 1 holds {most + 1} tokens") as refusal:
        service.check(large, most)
    assert "\n" not in str(refusal.value)
    service.check(Trace.from_arrays("t", [0, 0], [9, most], [1, 1]), most)
    with pytest.raises(ValueError, match="knows 2048 positions"):
        Service(system=H2M2_SYSTEM, llm=GPT3_175B).check(fixed_trace(1, prompt_tokens=2048, output_tokens=2), most)


@given(traces(), st.integers(1, 4), st.integers(0, 20), st.floats(0.01, 2))
def test_every_request_finishes_in_order_and_no_token_is_lost(trace, batch, extra, seconds):
    limits = ServingLimits(batch=batch, tokens=int(trace.state_tokens.max()) + extra)
    state, generated, admitted = ServingState.start(trace), 0, []
    for _ in range(1000):
        if state.done:
            break
        woken = state.woken()
        assert woken.clock >= state.clock
        state = woken.admitted(limits)
        assert state.admitted(limits) is state
        state.check(limits)
        assert state.batch >= 1
        assert np.all(trace.arrived_at[state.running] <= state.clock)
        if state.waiting < len(trace) and state.batch < batch and trace.arrived_at[state.waiting] <= state.clock:
            assert state.reserved + trace.state_tokens[state.waiting] > limits.tokens  # it waits for room only
        assert state.reserved == trace.state_tokens[state.running].sum()
        foreseen = state.ahead(limits, 3)
        assert (foreseen[0][0], foreseen[1][0]) == (state.batch, state.tokens)
        generated += state.batch
        admitted.append(state.running.tolist())
        state = state.stepped(seconds)
        state.check(limits)
    assert state.done
    assert (state.finished, state.batch) == (len(trace), 0)
    assert generated == trace.output_tokens.sum()
    for request, tokens in enumerate(trace.output_tokens):
        assert sum(request in running for running in admitted) == tokens


def test_a_replay_foresees_its_iterations_where_nobody_arrives():
    limits = ServingLimits(batch=2, tokens=100)
    state = ServingState.start(Trace.from_arrays("t", [0, 0, 0, 9], [3, 5, 1, 1], [2, 1, 3, 1])).admitted(limits)
    batch, tokens = state.ahead(limits, 9)
    assert batch.tolist() == [2, 2, 1, 1]
    assert tokens.tolist() == [3 + 5, 4 + 1, 2, 3]


def test_a_defect_of_the_state_is_found():
    state = ServingState.start(fixed_trace(3, prompt_tokens=2, output_tokens=2)).admitted(ServingLimits(batch=2, tokens=99))
    state.check()
    for wrong in (
        {"running": np.array([0, 0])},
        {"waiting": 3},
        {"finished": 1},
        {"context": np.array([2, 3])},
        {"remaining": np.array([0, 2])},
        {"running": np.array([0, 2])},
    ):
        with pytest.raises(AssertionError, match="defect"):
            replace(state, **wrong).check()
    for limits in (ServingLimits(batch=1, tokens=99), ServingLimits(batch=2, tokens=5)):
        with pytest.raises(AssertionError, match="defect"):
            state.check(limits)


@given(st.data(), st.integers(1, 4), st.floats(1, 2))
@settings(max_examples=50)
def test_more_memory_never_lowers_the_admitted_batch(data, batch, factor):
    """Every plan of the smaller machine is one of the larger."""
    service, trace, tier = data.draw(services()), data.draw(traces()), data.draw(st.integers(0, 1))
    assume(_plan_exists(service.tables([1], [1])))
    name, capacity = service.system.tiers[tier].name, service.system.tiers[tier].capacity
    larger = replace(service, system=service.system.with_tier(name, capacity=factor * capacity))
    batches = []
    for each in (service, larger):
        limits = ServingLimits(batch=batch, tokens=each.most_tokens())
        batches.append(ServingState.start(trace).woken().admitted(limits).batch)
    assert batches[0] <= batches[1]


def test_limits_and_services_are_values():
    for bad in ({"batch": 0}, {"batch": 1.5}, {"tokens": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ServingLimits(**({"batch": 1, "tokens": 1} | bad))
    service = Service(system=LPDDR_ONLY_SYSTEM, llm=GPT3_175B)
    service.tables([1], [1])
    again = pickle.loads(pickle.dumps(service))
    assert again == service
    assert hash(again) == hash(service)


def test_a_policys_state_says_costs_and_what_is_too_much():
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    window = StepWindow.of(service, [32], [32_000])
    on_hbm = window.plan([(96, 0)] * 3)
    on_lpddr = window.plan([(0, 96)] * 3)
    serving = ServingState.start(fixed_trace(1, prompt_tokens=1, output_tokens=1))
    state = PolicyState(serving=serving, previous=None, window=window, row=0, longest=window.problem(0))
    assert [field.name for field in fields(state)] == [
        "serving",
        "previous",
        "window",
        "row",
        "longest",
        "prompts",
        "residency",
        "directions",
        "stayed",
    ]
    assert state.latency(on_lpddr) == state.problem.evaluate(on_lpddr).latency
    assert state.fits(on_lpddr)
    assert not state.fits(on_hbm)
    assert state.explain_overflow(on_lpddr) == ""
    assert state.explain_overflow(on_hbm).startswith("HBM holds 249.")
    assert state.transition(on_hbm).latency == 0
    moved = replace(state, previous=on_lpddr).transition(on_hbm)
    assert moved == state.problem.transition(on_lpddr, on_hbm)
    assert list(moved.moved) == [("LPDDR", "HBM")]


def test_a_policy_cannot_change_what_it_is_served():
    """Requests, the forms of their tokens, and the tables that price its plan; arrays given to a state stay as they are."""
    trace = fixed_trace(2, prompt_tokens=10, output_tokens=3)
    own = np.array([0, 1])
    state = ServingState(trace=trace, running=own, context=np.array([10, 10]), remaining=np.array([3, 3]), waiting=2)
    window = StepWindow.of(Service(system=H2M2_SYSTEM, llm=LLAMA2_70B), [2], [20])
    joined = ServingState.start(trace).admitted(ServingLimits(batch=2, tokens=100))
    service = OffloadService(system=RTX4090_SYSTEM, llm=OPT_6_7B, batch=2, longest=20)
    offload = OffloadState.start(service, trace).admitted(joined)
    arrays = [getattr(held, name) for held in (state, state.stepped(1.0)) for name in ("running", "context", "remaining")]
    arrays += [getattr(offload, name) for name in ("kv", "act", "both", "prompt_act")]
    arrays += [getattr(window.tables, name) for name in ("seconds", "pages", "capacity")]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1
    own[0] = 1
