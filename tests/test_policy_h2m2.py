"""H2M2's footprint tracker: it moves only when it must, in the order of the paper, and fits wherever Algorithm 1 does."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from strategies import dense_llms, systems
from test_policies import NOBODY, served_by, state_of
from test_serving import linked

from memsplit.dse.replay import replay
from memsplit.models import Split, Workload
from memsplit.models.presets import CHINCHILLA_70B, GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B, LPDDR_ONLY_SYSTEM
from memsplit.models.serving import Service, _plan_exists
from memsplit.models.trace import fixed_trace, h2m2_trace
from memsplit.solvers import Greedy, GreedyEviction

LEAVING = ("fc", "qkv", "attention")
"""The order of the paper."""


def places(service: Service) -> list[int]:
    """The kinds in the order in which their slices leave."""
    return sorted(range(len(service.kinds)), key=lambda k: LEAVING.index(service.kinds[k].name.split("_")[0]))


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_it_moves_only_where_the_plan_in_force_no_longer_fits(data):
    """Requests come and go on a random machine; the first plan is Greedy's."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=4, context=12), ample=data.draw(st.booleans()))))
    service = Service(system=system, llm=llm)
    assume(_plan_exists(service.tables([1], [12])))
    trace = h2m2_trace(data.draw(st.integers(0, 50)), batch=3, iterations=12, shortest=2, longest=12, mean_output=3.0)
    run = replay(GreedyEviction(), trace, system, llm, batch_limit=3, prefill=False)
    steps = list(zip(run.rows["batch"], run.rows["tokens"], strict=True))
    for number, (before, after) in enumerate(zip(run.plans, run.plans[1:], strict=False), start=1):
        kept = service.problem(*map(int, steps[number])).evaluate(before)
        assert (before == after) == kept.fits
    if run.plans:
        assert run.plans[0] == Greedy().decide(state_of(service, [tuple(map(int, steps[0]))]))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_as_few_slices_as_must_leave_in_order(data):
    """From any plan in force: what leaves last could not stay, and nothing later in the order has lost a slice before all before it are
    gone. Where that fits nowhere, it is Algorithm 1."""
    service, most = served_by(data)
    alone = state_of(service, [(data.draw(st.integers(1, 4)), data.draw(st.integers(1, most))), (4, most)])
    kept = [data.draw(st.integers(0, kind.slices)) for kind in alone.kinds]
    previous = alone.window.plan([[n, kind.slices - n] for n, kind in zip(kept, alone.kinds, strict=True)])
    state = replace(alone, previous=previous)
    tables = alone.window.tables

    def room_left(first: list[int]) -> int:
        return int(tables.capacity[0, 0]) - sum(kind.layers * int(tables.pages[0, k, 0, first[k]]) for k, kind in enumerate(alone.kinds))

    expected = list(kept)
    for k in places(service):
        while expected[k] and room_left(expected) < 0:
            expected[k] -= 1
    plan = alone.window.plan([[n, kind.slices - n] for n, kind in zip(expected, alone.kinds, strict=True)])
    if state.fits(plan):
        assert GreedyEviction().decide(state) == plan
    else:
        try:
            greedy = Greedy().decide(state)
        except ValueError:
            with pytest.raises(ValueError, match="GreedyMapping"):
                GreedyEviction().decide(state)
        else:
            assert GreedyEviction().decide(state) == greedy


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_it_fits_wherever_greedy_does(data):
    service, most = served_by(data)
    alone = state_of(service, [(data.draw(st.integers(1, 4)), data.draw(st.integers(1, most))), (4, most)])
    kept = [data.draw(st.integers(0, kind.slices)) for kind in alone.kinds]
    previous = alone.window.plan([[n, kind.slices - n] for n, kind in zip(kept, alone.kinds, strict=True)])
    for returns in (False, True):
        try:
            Greedy().decide(alone)
        except ValueError:
            reject()  # the claim is about states for which Greedy finds a plan; too few of them fail the test
        assert alone.fits(GreedyEviction(returns=returns).decide(replace(alone, previous=previous)))


@pytest.mark.parametrize(
    ("llm", "batch", "prompt", "output"), [(GPT3_175B, 32, 256, 400), (GPT3_175B, 16, 1024, 300), (CHINCHILLA_70B, 64, 1600, 200)]
)
def test_growing_contexts_move_no_more_than_under_greedy(llm, batch, prompt, output):
    """On published LLMs, and something moves in each. Not proven in general, but none of 400 random machines moved more."""
    trace = fixed_trace(batch, prompt_tokens=prompt, output_tokens=output)
    greedy, tracked = (
        replay(policy, trace, H2M2_SYSTEM, llm, batch_limit=batch, prefill=False).summary for policy in (Greedy(), GreedyEviction())
    )
    assert 0 < tracked["migration_GB"] <= greedy["migration_GB"]
    assert tracked["migrations"] <= greedy["migrations"]


def test_slices_return_only_where_they_are_asked_to():
    """Requests have left: much room is free on the first memory."""
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    full = Greedy().decide(state_of(service, [(32, 64_000)]))
    state = replace(state_of(service, [(8, 8_000)]), previous=full)
    assert GreedyEviction().decide(state) is full
    back = GreedyEviction(returns=True).decide(state)
    before, after, wanted = (state.window.counts(plan)[:, 0] for plan in (full, back, Greedy().decide(state)))
    assert state.fits(back)
    assert (after >= before).all()
    assert (after > before).any()
    assert (after <= np.maximum(before, wanted)).all()


def test_a_plan_that_splits_layers_differently_is_replaced_by_algorithm_1():
    service = Service(system=H2M2_SYSTEM, llm=LLAMA2_70B)
    state = state_of(service, [(4, 4000)])
    greedy = Greedy().decide(state)
    qkv = (Split(layers=40, counts=(8, 0)), Split(layers=40, counts=(0, 8)))
    assert GreedyEviction().decide(replace(state, previous=replace(greedy, splits=(qkv, *greedy.splits[1:])))) == greedy


@pytest.mark.parametrize("system", [LPDDR_ONLY_SYSTEM, H2M2_CXL_SYSTEM])
def test_it_is_for_two_memories(system):
    with pytest.raises(ValueError, match="GreedyEviction: slices leave the first of two memories"):
        GreedyEviction().decide(state_of(Service(system=system, llm=LLAMA2_70B), [(4, 4000)]))


@pytest.mark.parametrize("settings_", [{"order": "fc"}, {"order": (1,)}, {"returns": "often"}])
def test_settings_that_are_none_are_refused(settings_):
    with pytest.raises(ValueError, match="GreedyEviction"):
        GreedyEviction(**settings_)


def test_the_state_before_anything_ran_is_greedys():
    service = Service(system=H2M2_SYSTEM, llm=GPT3_175B)
    state = state_of(service, [(32, 40_000)])
    assert state.serving is NOBODY
    assert GreedyEviction().decide(state) == Greedy().decide(state)
