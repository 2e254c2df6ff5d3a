"""Policies of offloading: each against its own rule, by hand or by enumeration."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDING
from test_offload_serving import RTX, begun, opt, served

from memsplit.dse.replay_offload import replay_offload
from memsplit.models import Workload
from memsplit.models.cache_ratio import CacheRatioProblem
from memsplit.models.offload_profiles import HYBRIDSERVE_PAPER
from memsplit.models.offload_serving import OffloadState
from memsplit.models.presets import GEMMA_7B, LLAMA3_1_8B, OPT_30B
from memsplit.models.recompute_split import RecomputeSplitProblem, best_splits
from memsplit.models.serving import ServingLimits
from memsplit.models.trace import fixed_trace, h2m2_trace
from memsplit.solvers.cache_ratio import HybridServeRatio, LpRatio
from memsplit.solvers.offload_policies import ActOnly, AdaptiveRatio, AdmissionRatio, FixedRatio, KvOnly, RequestForms, StepSplit

RUNTIME = "decide_runtime_s"
POLICIES = [KvOnly(), ActOnly(), FixedRatio(), AdmissionRatio(), StepSplit(), RequestForms(), AdaptiveRatio()]
TRACE = h2m2_trace(1, batch=8, iterations=24, longest=900)


def states(policy, service, trace, batch, *, every: int = 3):
    """Some states that a policy meets, each with its decision."""
    limits = ServingLimits(batch=batch, tokens=policy.most_tokens(service))
    state = OffloadState.start(service, trace)
    while not state.serving.done:
        state = state.admitted(state.serving.woken().admitted(limits))
        decision = policy.decide(state)
        if state.joined or state.serving.iteration % every == 0:
            yield state, decision
        state = state.written(decision).stepped(decision, 1.0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_policy_is_a_frozen_value_that_pickles(policy):
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(replace(policy)) == hash(policy)
    assert not hasattr(policy, "__dict__")


@pytest.mark.parametrize(
    ("policy", "wrong", "message"),
    [
        (FixedRatio, {"act_share": -0.1}, "act_share must be"),
        (FixedRatio, {"act_share": 1.1}, "act_share must be at most 1"),
        (FixedRatio, {"act_share": float("nan")}, "act_share must be"),
        (AdaptiveRatio, {"iterations": 0}, "iterations must be"),
        (AdaptiveRatio, {"act_room": -1}, "act_room must be"),
        (AdaptiveRatio, {"act_room": 1.5}, "act_room must be at most 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(policy, wrong, message):
    with pytest.raises(ValueError, match=message):
        policy(**wrong)


@pytest.mark.parametrize(("share", "single"), [(0, KvOnly()), (1, ActOnly())])
def test_the_ends_of_a_fixed_ratio_are_the_single_forms_bit_for_bit(share, single):
    runs = [replay_offload(policy, TRACE, RTX, OPT_30B, batch_limit=8, prefill=True) for policy in (FixedRatio(act_share=share), single)]
    assert len(runs[0].rows) == 24
    assert runs[0].rows.drop(columns=RUNTIME).equals(runs[1].rows.drop(columns=RUNTIME))
    assert runs[0].requests.equals(runs[1].requests)


@pytest.mark.parametrize("llm", [OPT_30B, LLAMA3_1_8B], ids=lambda llm: llm.name)
def test_a_fixed_ratio_rounds_to_the_smaller_form(llm):
    """The number of ACT tokens of n is ceil(0.3 n) where ACT is smaller, else floor(0.3 n), at any time."""
    service = opt(batch=8, longest=900, llm=llm)
    rounded = np.ceil if llm is OPT_30B else np.floor
    for state, decision in states(FixedRatio(act_share=0.3), service, TRACE, 8):
        written = state.written(decision)
        assert written.act.tolist() == rounded(0.3 * state.serving.context).tolist()


@pytest.mark.parametrize("solver", [HybridServeRatio(), LpRatio()], ids=lambda solver: type(solver).__name__)
def test_those_that_join_follow_the_ratio_of_the_batch(solver):
    """Prompts at the solver's share, rounded up; later tokens keep each request within one token of the share of its prompt."""
    service, policy = opt(batch=8, longest=900), AdmissionRatio(solver=solver)
    joined = 0
    for state, decision in states(policy, service, TRACE, 8):
        written = state.written(decision)
        if state.joined:
            joined += 1
            problem = CacheRatioProblem.build(
                RTX, service.workload(state.batch), profile=HYBRIDSERVE_PAPER, contexts=state.serving.context.tolist()
            )
            share = solver.solve(problem).unwrap().act_share
            assert decision.prompt_act.tolist() == np.ceil(share * state.prompts).tolist()
        prompts = state.serving.trace.prompt_tokens[state.serving.running]
        wanted = written.prompt_act / prompts * state.serving.context
        assert np.all(np.abs(written.act - wanted) <= 1)
    assert joined > 2


@given(served(6))
@settings(max_examples=25, deadline=None)
def test_request_forms_choose_the_best_subset_of_those_that_join(given_service):
    service, trace, batch = given_service
    for state, decision in states(RequestForms(), service, trace, batch):
        chosen = decision.prompt_act > 0
        assert decision.prompt_act.tolist() == (chosen * state.prompts).tolist()
        held = int(state.act.sum())
        subsets = [
            sum(p for p, take in zip(state.prompts.tolist(), some, strict=True) if take) for some in product([0, 1], repeat=state.joined)
        ]
        least = state.step.seconds(held + np.array(subsets)[:, None])[:, 0].min()
        assert state.step.seconds(held + int(decision.prompt_act.sum()))[0] <= least * (1 + ROUNDING)
        old = state.batch - state.joined
        assert decision.new_act[:old].tolist() == (state.act[:old] > 0).tolist()
        assert decision.new_act[old:].tolist() == chosen.tolist()
        assert not np.any((state.act > 0) & (state.kv > 0))


@given(served(6))
@settings(max_examples=25, deadline=None)
def test_the_step_split_is_the_best_of_enumeration(given_service):
    service, trace, batch = given_service
    for state, decision in states(StepSplit(), service, trace, batch, every=1):
        written = state.written(decision)
        most = int(written.both.sum())
        prompts = trace.prompt_tokens[state.serving.running].sum()
        assert most == (prompts if service.token_bytes.act_pays else 0)
        every = state.step.seconds(np.arange(most + 1)[:, None])[:, 0]
        assert state.step.seconds(decision.recomputed)[0] <= every.min() * (1 + ROUNDING)


def test_the_step_split_of_one_request_is_that_of_the_recompute_problem():
    """Without a GPU cache and with stores hidden, in the fluid template, at most the prompt: the same l in each step."""
    prompt, output = 4000, 40
    links = tuple(replace(link, bandwidth=link.bandwidth * (1e3 if link.source == "GDDR6X" else 1)) for link in RTX.links)
    fast = tuple(replace(tier, bandwidth=1e15) if tier.name == "host" else tier for tier in RTX.tiers)
    system = replace(RTX, links=links, tiers=fast)
    huge = system.with_tier("GDDR6X", capacity=1e12)
    overhead = opt(huge, 1, prompt + output, llm=GEMMA_7B, weights="gpu").overhead
    system = system.with_tier("GDDR6X", capacity=(overhead + HYBRIDSERVE_PAPER.reserved + 1e-3) / HYBRIDSERVE_PAPER.usable)
    workload = Workload(llm=GEMMA_7B, batch=1, context=prompt, weight_bits=16, kv_bits=16, activation_bits=16)
    problem = RecomputeSplitProblem.build(system, workload, profile=HYBRIDSERVE_PAPER, template="fluid", weights="gpu")
    trace, rates = fixed_trace(1, prompt_tokens=prompt, output_tokens=output), HYBRIDSERVE_PAPER
    run = replay_offload(StepSplit(), trace, system, GEMMA_7B, batch_limit=1, profile=rates, weights="gpu")
    splits, seconds = best_splits(problem, prompt + np.arange(output), np.full(output, prompt))
    assert 0 < splits.min() <= splits.max() < prompt
    # A thousandth of a byte of cache, and products in another order.
    np.testing.assert_allclose(run.rows["decode_s"], seconds, rtol=1e-10)


@given(served(6), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_adaptive_ratio_aims_as_it_says(given_service, iterations):
    """The prompts' ACT is a minimum of the stated sum, by enumeration of every number and every path of new tokens."""
    service, trace, batch = given_service
    if not service.token_bytes.act_pays:
        return
    for state, decision in states(AdaptiveRatio(iterations=iterations), service, trace, batch):
        held, later = int(state.act.sum()), state.batch * np.arange(iterations)
        count, total = np.full(iterations, state.batch), int(state.prompts.sum())
        steps = [service.steps(count[:1], [state.tokens + more]) for more in later]

        def summed(act, steps=steps, later=later):
            return sum(float(step.seconds(np.arange(act, act + more + 1)[:, None]).min()) for step, more in zip(steps, later, strict=True))

        every = [summed(held + extra) for extra in range(total + 1)]
        chosen = int(decision.prompt_act.sum())
        assert every[chosen] <= min(every) * (1 + 1e-12)  # a sum of as many terms as iterations


def test_the_adaptive_ratio_breaks_ties_for_a_full_batch():
    """One request of 500 tokens, where the weights take longest whatever it holds: the share that is best for 48, by enumeration."""
    state = begun(opt(batch=48, longest=640), [500])
    every = state.step.seconds(np.arange(501)[:, None])[:, 0]
    assert every.min() == every.max()
    full = state.service.steps([48], [48 * 500]).seconds(48 * np.arange(501)[:, None])[:, 0]
    chosen = int(AdaptiveRatio().decide(state).prompt_act[0])
    assert full[chosen] == full.min()
    assert full.min() < full[250]  # the middle one of all would not do


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_without_new_prompts_only_new_tokens_are_decided(policy):
    seen = 0
    for state, decision in states(policy, opt(batch=8, longest=900), TRACE, 8, every=1):
        assert len(decision.prompt_act) == state.joined
        assert len(decision.new_act) == state.batch
        seen += not state.joined
    assert seen > 5


@pytest.mark.parametrize("policy", [KvOnly(), StepSplit(), AdaptiveRatio(), RequestForms(), AdmissionRatio(solver=LpRatio())])
def test_with_few_key_and_value_heads_kv_is_kept(policy):
    """Llama-3.1-8B: ACT is twice as large as KV, so nothing is recomputed by any policy that looks."""
    run = replay_offload(policy, TRACE, RTX, LLAMA3_1_8B, batch_limit=8)
    assert run.rows["recomputed_tokens"].sum() == 0
    assert run.rows["both_tokens"].sum() == 0


def test_the_step_split_makes_room_for_both_forms():
    """A host with room for three of eight prompts in both forms: KVPR serves fewer at a time than KV alone."""
    service = opt(batch=8, longest=900)
    kv, act = service.token_bytes
    small = RTX.with_tier("host", capacity=service.workload(1).weight_bytes + 48 * 3 * 910 * (kv + act))
    trace = fixed_trace(8, prompt_tokens=890, output_tokens=10)
    batches = {
        type(policy).__name__: int(replay_offload(policy, trace, small, OPT_30B, batch_limit=8).rows["batch"].max())
        for policy in (StepSplit(), KvOnly())
    }
    assert batches == {"StepSplit": 3, "KvOnly": 8}


def test_the_adaptive_ratio_makes_room_for_what_serves_most():
    """OPT-30B on a host for half of the KV: no fixed share of room generates more with requests of the longest length, and KV less."""
    service = opt(batch=48, longest=1024)
    kv = service.token_bytes.kv
    none = RTX.with_tier("GDDR6X", capacity=(service.overhead + HYBRIDSERVE_PAPER.reserved + 1e-3) / HYBRIDSERVE_PAPER.usable)
    tight = none.with_tier("host", capacity=service.workload(1).weight_bytes + 48 * 24.5 * 1024 * kv)
    service = opt(tight, 48, 1024)
    rates = {}
    for act_room in (None, *np.linspace(0, 1, 33).tolist()):
        most, as_kv = AdaptiveRatio(act_room=act_room).limits(service)
        batch = min(most // 1024, 48)
        rates[act_room] = batch / float(service.steps([batch], [batch * 1024]).best(max(batch * 1024 - as_kv, 0))[1][0])
    assert rates[None] == max(rates.values())
    assert rates[None] > 1.05 * rates[0.0]


def test_all_policies_decide_for_a_batch_of_one():
    for policy in POLICIES:
        decision = policy.decide(begun(opt(batch=1, longest=10), [5]))
        assert len(decision.new_act) == 1
