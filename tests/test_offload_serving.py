"""Serving with offloaded state: steps by hand, best forms by enumeration, bytes of both tiers, and agreement with whole generations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDING
from strategies import llms, speeds
from test_serving import traces

from memsplit.models import ComputeUnit, Link, MemoryTier, System, Workload
from memsplit.models.clairvoyant_offload import FormsPlan, FormsSchedule
from memsplit.models.offload import OffloadMachine, gpu_overhead, offload_layers
from memsplit.models.offload_generation import generation_time
from memsplit.models.offload_profiles import DATASHEET, HYBRIDSERVE_PAPER
from memsplit.models.offload_serving import OffloadDecision, OffloadService, OffloadState
from memsplit.models.presets import LLAMA3_1_8B, LPDDR_ONLY_SYSTEM, OPT_30B, SYSTEMS
from memsplit.models.serving import ServingLimits
from memsplit.models.trace import Trace, fixed_trace
from memsplit.models.units import GB

RTX = SYSTEMS["rtx4090_pcie4"]


@st.composite
def services(draw: st.DrawFn, trace: Trace, batch: int, *, most_room: float = 40.0) -> OffloadService:
    """An LLM of some bytes, whose state of ``trace`` fits in any form; the GPU holds none to ``most_room`` tokens of it, the host all."""
    llm = draw(llms())
    batch, longest = min(batch, len(trace)), int(trace.state_tokens.max()) + 1
    workload = Workload(llm=llm, batch=batch, context=longest, weight_bits=16, kv_bits=16, activation_bits=16)
    layer, overhead = offload_layers(workload)[0], gpu_overhead(workload, longest)
    token = llm.num_hidden_layers * (layer.kv_bytes + layer.act_bytes)
    near = MemoryTier(name="near", capacity=overhead + draw(st.floats(0, most_room)) * token, bandwidth=draw(speeds) * 10)
    far = MemoryTier(name="far", capacity=workload.weight_bytes + (batch * longest + 1) * token, bandwidth=1e5)
    unit = ComputeUnit(name="unit", tier="near", matrix_peak=draw(speeds) * 100, vector_peak=1e3)
    links = tuple(Link(source=a, target=b, bandwidth=draw(speeds)) for a, b in (("far", "near"), ("near", "far")))
    system = System(name="small", tiers=(near, far), units=(unit,), links=links)
    weights = draw(st.sampled_from(["host", "host", "gpu"]))
    if weights == "gpu":
        more = gpu_overhead(workload, longest, weights="gpu") - overhead
        system = system.with_tier("near", capacity=near.capacity + more)
    return OffloadService(system=system, llm=llm, batch=batch, longest=longest, weights=weights)


@st.composite
def served(draw: st.DrawFn, most: int = 8) -> tuple[OffloadService, Trace, int]:
    """A service, a trace that it holds, and a batch limit."""
    trace, batch = draw(traces(most)), draw(st.integers(1, 4))
    return draw(services(trace, batch)), trace, batch


def opt(system: System = RTX, batch: int = 32, longest: int = 640, **given: Any) -> OffloadService:
    return OffloadService(**{"system": system, "llm": OPT_30B, "batch": batch, "longest": longest, "profile": HYBRIDSERVE_PAPER} | given)


def begun(service: OffloadService, prompts: list[int], output: int = 3) -> OffloadState:
    """A batch of requests that have just joined."""
    trace = Trace.from_arrays("begun", [0.0] * len(prompts), prompts, [output] * len(prompts))
    state = OffloadState.start(service, trace)
    return state.admitted(state.serving.admitted(ServingLimits(batch=len(prompts), tokens=10**9)))


# Steps


@given(served(), st.integers(0, 60), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_step_is_the_stated_maximum_by_hand(given_service, tokens, share):
    service, _, batch = given_service
    batch = min(batch, service.batch)
    machine = OffloadMachine.build(service.system, DATASHEET)
    act_tokens = math.floor(share * tokens)
    seconds = 0.0
    for layer in offload_layers(service.workload(batch)):
        sent = max(layer.kv_bytes * tokens - (layer.kv_bytes - layer.act_bytes) * act_tokens - service.cache, 0.0)
        link = (layer.sent_bytes if service.weights == "host" else 0.0) / machine.to_device + sent / machine.to_device
        gpu = float(layer.compute_time(machine, tokens)) + act_tokens * layer.recompute_flops / machine.peak
        seconds += layer.layers * max(link, gpu, batch / max(tokens, batch) * sent / machine.to_host)
    found = service.steps([batch], [tokens]).seconds(act_tokens)
    # Products in another order, each of a few roundings; what cancels against the cache is at most some hundred times the result.
    assert found[0] == pytest.approx(seconds, rel=1e-10, abs=1e-15)


@given(served(), st.integers(0, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_the_best_number_of_recomputed_tokens_is_that_of_enumeration(given_service, tokens, data):
    service, _, batch = given_service
    step = service.steps([min(batch, service.batch)], [tokens])
    least = data.draw(st.integers(0, tokens))
    most = data.draw(st.integers(least, tokens))
    best, seconds = step.best(least, most)
    every = step.seconds(np.arange(least, most + 1)[:, None])[:, 0]
    assert seconds[0] <= every.min() * (1 + ROUNDING)
    assert least <= best[0] <= most
    assert seconds[0] == every[best[0] - least]


@given(served(), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_where_act_is_no_smaller_recomputing_never_helps(given_service, tokens):
    service, _, batch = given_service
    kv, act = service.token_bytes
    assert service.token_bytes.act_pays == (act < kv)
    if act >= kv:
        assert service.steps([min(batch, service.batch)], [tokens]).best()[0][0] == 0


def test_several_steps_are_the_single_ones_bit_for_bit():
    service = opt()
    batch, tokens, act = [3, 32, 3, 1], [700, 9000, 701, 0], np.array([20, 8000, 701, 0])
    together = service.steps(batch, tokens).seconds(act)
    assert together.tolist() == [float(service.steps([b], [n]).seconds(a)[0]) for b, n, a in zip(batch, tokens, act, strict=True)]


def test_a_faster_link_is_no_slower_and_an_infinite_one_leaves_the_gpu():
    service, tokens = opt(), 20_000
    act = np.linspace(0, tokens, 7)[:, None]
    before = service.steps([32], [tokens]).seconds(act)
    for bandwidth in (60e9, math.inf):
        links = tuple(replace(link, bandwidth=bandwidth) for link in RTX.links)
        tiers = tuple(replace(tier, bandwidth=max(tier.bandwidth, bandwidth)) for tier in RTX.tiers)
        faster = opt(replace(RTX, links=links, tiers=tiers)).steps([32], [tokens]).seconds(act)
        assert np.all(faster <= before)
        before = faster
    layer, machine = offload_layers(service.workload(32))[0], opt(replace(RTX, links=links, tiers=tiers)).machine
    gpu = layer.layers * (layer.compute_time(machine, tokens) + layer.recompute_time(machine, act))
    np.testing.assert_allclose(before, gpu, rtol=ROUNDING)


def test_a_gpu_without_limit_leaves_nothing_to_send_but_weights():
    service = opt(RTX.with_tier("GDDR6X", capacity=1e18))
    step = service.steps([32], [20_000])
    layer = offload_layers(service.workload(32))[0]
    alone = max(layer.weight_time(service.machine), float(layer.compute_time(service.machine, 20_000)))
    assert step.seconds(0)[0] == pytest.approx(layer.layers * alone, rel=ROUNDING)


# Whole generations


@pytest.mark.parametrize("host", [882, 90])
@pytest.mark.parametrize("llm", [OPT_30B, LLAMA3_1_8B], ids=lambda llm: llm.name)
def test_a_static_batch_agrees_with_whole_generations(llm, host):
    """KV and ACT exactly. The best split is a whole number of tokens here and any fraction there: a step is longer by at most what one
    token changes along the steepest line of each class, and never shorter."""
    system, batch, prompt, generated = RTX.with_tier("host", capacity=host * GB), 32, 512, 64
    service = opt(system, batch, prompt + generated, llm=llm)
    steps = service.steps([batch] * generated, batch * (prompt + np.arange(generated)))
    workload = Workload(llm=llm, batch=batch, context=prompt, weight_bits=16, kv_bits=16, activation_bits=16)
    whole = {
        form: generation_time(system, workload, prompt=prompt, generated=generated, profile=HYBRIDSERVE_PAPER, form=form).decode
        for form in ("kv", "act", "best")
    }
    assert float(steps.seconds(0).sum()) == pytest.approx(whole["kv"], rel=ROUNDING)
    assert float(steps.seconds(steps.tokens).sum()) == pytest.approx(whole["act"], rel=ROUNDING)
    least, most = service.limits(steps.tokens)
    if np.all(least <= most):
        one = np.abs(steps.slopes).max(axis=1).T @ np.array(steps.layers)
        assert whole["best"] * (1 - ROUNDING) <= float(steps.best(least, most)[1].sum()) <= whole["best"] + float(one.sum())


@pytest.mark.parametrize("form", ["kv", "act"])
def test_prefill_of_a_static_batch_agrees_with_whole_generations(form):
    batch, prompt, generated = 128, 512, 64
    workload = Workload(llm=OPT_30B, batch=batch, context=prompt, weight_bits=16, kv_bits=16, activation_bits=16)
    whole = generation_time(RTX, workload, prompt=prompt, generated=generated, profile=HYBRIDSERVE_PAPER, form=form)
    service = opt(batch=batch, longest=prompt + generated)
    state = begun(service, [prompt] * batch)
    act = state.prompts if form == "act" else 0 * state.prompts
    written = state.written(OffloadDecision(prompt_act=act, new_act=np.zeros(batch, dtype=bool)))
    seconds, stored = service.prefill_time(written, int(act.sum()))
    assert seconds == pytest.approx(whole.prefill, rel=ROUNDING)
    assert 0 < stored < batch * prompt * OPT_30B.num_hidden_layers * 4 * 7168


# Memory


@given(served(), st.integers(0, 60), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_forms_that_fit_are_those_of_counting_bytes(given_service, tokens, share):
    """Of each number of ACT tokens: KV and ACT bytes are at most the room on GPU and host together."""
    service = given_service[0]
    kv, act = service.token_bytes
    tight = replace(service, system=service.system.with_tier("far", capacity=service.workload(1).weight_bytes + share * 40 * kv))
    least, most = tight.limits(tokens)
    room = tight.cache + tight.host_room
    fitting = [n for n in range(tokens + 1) if kv * (tokens - n) + act * n <= room + 1e-6]
    assert fitting == list(range(int(least), int(most) + 1))


def test_bytes_of_both_tiers_by_hand():
    """10 KV and 20 ACT tokens on the GPU as far as they fit; 30 tokens in both forms lie on the host twice."""
    service = opt(batch=1, longest=100)
    kv, act = service.token_bytes
    service = opt(RTX.with_tier("GDDR6X", capacity=(service.overhead + 1.5 * GB + 48 * 12 * kv) / 0.92), batch=1, longest=100)
    state = begun(service, [60])
    decision = OffloadDecision(prompt_act=np.array([20]), prompt_both=np.array([30]), new_act=np.zeros(1, dtype=bool), recomputed=7)
    cost = service.cost(state.written(decision), 7)
    assert cost.tier_bytes[0] == pytest.approx(service.overhead + 48 * 12 * kv, rel=ROUNDING)
    host = service.workload(1).weight_bytes + 48 * (30 * (kv + act) + 10 * kv + 20 * act - 12 * kv)
    assert cost.tier_bytes[1] == pytest.approx(host, rel=ROUNDING)
    used = kv * 33 + act * 27 - 12 * kv
    assert cost.to_device_bytes == pytest.approx(service.streamed(1) + 48 * used, rel=ROUNDING)
    assert cost.fits


def test_most_tokens_are_what_fits():
    service = opt(RTX.with_tier("host", capacity=70 * GB), 128, 1024)
    kv, act = service.token_bytes
    room = service.cache + service.host_room
    for nbytes in (kv, act):
        most = service.most_tokens(nbytes)
        assert most * nbytes <= room < (most + 1) * nbytes
    both = service.most_tokens(kv + act, both=True)
    assert both * (kv + act) <= service.host_room < (both + 1) * (kv + act)


# States and decisions


def test_tokens_are_conserved_and_keep_their_forms():
    state = begun(opt(), [5, 8], output=2)
    decision = OffloadDecision(prompt_act=np.array([2, 0]), prompt_both=np.array([1, 8]), new_act=np.array([True, False]), recomputed=9)
    written = state.written(decision)
    assert (written.kv.tolist(), written.act.tolist(), written.both.tolist()) == ([2, 0], [2, 0], [1, 8])
    after = written.stepped(decision, 1.5)
    assert (after.kv.tolist(), after.act.tolist(), after.both.tolist()) == ([2, 1], [3, 0], [1, 8])
    assert after.tokens == 15
    assert after.stepped(replace(decision, prompt_act=np.zeros(0, int), prompt_both=None), 1.0).batch == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_act": np.array([6, 0])}, "new prompt 0 has 5 tokens, and 6 are to be ACT"),
        ({"prompt_act": np.array([3, 0]), "prompt_both": np.array([3, 0])}, "3 are to be ACT and 3 both"),
        ({"prompt_act": np.array([1])}, "prompt_act must be a whole number of tokens of at least 0 for each of 2"),
        ({"prompt_act": np.array([-1, 0])}, "at least 0"),
        ({"prompt_act": np.array([0.5, 0])}, "whole number"),
        ({"new_act": np.zeros(3, dtype=bool)}, "new_act must say of each of 2 requests"),
        ({"new_act": ["no", "no"]}, "by True or False"),
        ({"new_act": np.array([0.5, np.nan])}, "by True or False"),
        ({"prompt_act": np.array([2**64 - 100, 0], dtype=np.uint64)}, "18446744073709551516 are to be of this form"),
        ({"prompt_act": np.array([2**62, 0]), "prompt_both": np.array([2**62, 0])}, "4611686018427387904 are to be of this form"),
        ({"prompt_both": np.array([2**64 - 1, 0], dtype=np.uint64)}, "prompt_both"),
        ({"recomputed": 1}, "1 tokens are to be recomputed, and 0 are kept in both forms"),
        ({"recomputed": -1}, "recomputed must be a whole number"),
    ],
)
def test_a_decision_that_breaks_a_rule_is_refused(wrong, message):
    good = {"prompt_act": np.array([0, 0]), "new_act": np.zeros(2, dtype=bool)}
    with pytest.raises(ValueError, match=message):
        begun(opt(), [5, 8]).written(OffloadDecision(**(good | wrong)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"system": LPDDR_ONLY_SYSTEM}, "has one tier; offloading needs"),
        ({"system": RTX.with_tier("GDDR6X", capacity=2 * GB)}, "GDDR6X needs .* GB beside state.*enlarge it by"),
        ({"system": RTX.with_tier("host", capacity=20 * GB)}, "do not fit into host of 20 GB; enlarge it by"),
        ({"batch": 0}, "batch must be"),
        ({"longest": 0}, "longest must be"),
        ({"weights": "disk"}, "weights are on the 'host'"),
        ({"buffered_requests": -1}, "buffered_requests"),
    ],
)
def test_a_service_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        opt(**given)


def test_steps_need_requests():
    for batch, tokens in (([0], [5]), ([1, 2], [5]), ([1], [-1])):
        with pytest.raises(ValueError, match="one length"):
            opt().steps(batch, tokens)


def test_requests_that_are_too_large_are_named():
    trace = fixed_trace(2, prompt_tokens=600, output_tokens=10)
    with pytest.raises(ValueError, match=r"request 0 holds 609 tokens at its end.*has room for 608"):
        opt().check(trace, 608)
    with pytest.raises(ValueError, match=r"knows 2050 positions"):
        opt().check(fixed_trace(1, prompt_tokens=2050, output_tokens=2), 10**6)
    opt(llm=LLAMA3_1_8B).check(fixed_trace(1, prompt_tokens=2050, output_tokens=2), 10**6)


# Schedules


def test_a_schedule_counts_what_each_iteration_reads():
    """Prompts of 5 and 8 join in iterations 0 and 2, with 4 and 2 outputs: 5, 6, 7 + 8, 8 + 9 tokens."""
    problem = FormsSchedule.of(opt(), [(0, 5, 4), (2, 8, 2)], iterations=4)
    assert problem.steps.tokens.tolist() == [5, 6, 15, 17]
    assert problem.steps.batch.tolist() == [1, 1, 2, 2]
    assert problem.alive(problem.size).tolist() == [5, 6, 15, 17]
    assert problem.prompts.tolist() == [5, 5, 13, 13]
    cut = FormsSchedule.of(opt(), [(0, 5, 4), (2, 8, 2)], iterations=3)
    assert cut.steps.tokens.tolist() == [5, 6, 15]


def test_a_schedule_prices_plans_and_refuses_those_of_others():
    problem = FormsSchedule.of(opt(), [(0, 5, 3)], iterations=3)
    none, everything = FormsPlan(act=(0,) * 3), FormsPlan(act=tuple(problem.size.tolist()))
    assert problem.evaluate(none).latency == float(problem.steps.seconds(0).sum())
    assert problem.evaluate(everything).latency == float(problem.steps.seconds(problem.steps.tokens).sum())
    for wrong in (FormsPlan(act=(0,)), FormsPlan(act=(0, 0, 9)), FormsPlan(act=(0,) * 3, recomputed=(0,))):
        with pytest.raises(ValueError, match="belongs to another one"):
            problem.evaluate(wrong)
    with pytest.raises(ValueError, match="does not allow"):
        problem.evaluate(replace(none, recomputed=(1, 0, 0)))
    assert replace(problem, both=True).evaluate(replace(none, recomputed=(5, 0, 0))).fits


def test_a_schedule_knows_what_does_not_fit():
    """64 KV tokens of OPT-30B do not fit in 42 tokens' room as KV; as ACT they do; and both forms of 60 do not."""
    service = opt(batch=1, longest=64)
    kv = service.token_bytes.kv
    tight = RTX.with_tier("GDDR6X", capacity=(service.overhead + 1.5 * GB) / 0.92 + 1e-3)
    tight = tight.with_tier("host", capacity=service.workload(1).weight_bytes + 48 * 42 * kv)
    problem = FormsSchedule.of(opt(tight, batch=1, longest=64), [(0, 60, 3)], iterations=3)
    assert not problem.evaluate(FormsPlan(act=(0, 0, 0))).fits
    assert "iterations [0, 1, 2]" in problem.evaluate(FormsPlan(act=(0, 0, 0))).explain_overflow()
    order = np.lexsort((problem.size,))
    assert problem.size[order[-1]] == 60
    assert problem.evaluate(FormsPlan(act=tuple(problem.size.tolist()))).fits
    both = replace(problem, both=True)
    assert not both.evaluate(FormsPlan(act=(0, 0, 0), recomputed=(60, 60, 60))).fits
