"""Whole generations: what host and GPU hold, weights shared by GPU batches, groups of requests, and machines without limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from memsplit.models import System, Workload
from memsplit.models.cache_ratio import CacheRatioProblem
from memsplit.models.offload import OffloadMachine, gpu_overhead, offload_layers
from memsplit.models.offload_baselines import OffloadBaseline, generation, offload_baselines
from memsplit.models.offload_generation import generation_time
from memsplit.models.offload_profiles import DATASHEET, HYBRIDSERVE_PAPER
from memsplit.models.presets import LLAMA3_1_8B, MIXTRAL_8X7B, OPT_6_7B, OPT_30B, SYSTEMS
from memsplit.models.recompute_split import STEPS_AT_ONCE, RecomputeSplitPlan, RecomputeSplitProblem, split_generation
from memsplit.models.units import GB
from memsplit.studies.offload_throughput import kvpr

RTX = SYSTEMS["rtx4090_pcie4"]
ALL = offload_baselines(DATASHEET, DATASHEET)
FORMS = ("best", "act_first", "kv", "act")
SUMS = 1e-12
"""Relative difference of equal sums in another order."""


def served(llm=OPT_30B, batch: int = 128, context: int = 512) -> Workload:
    return Workload(llm=llm, batch=batch, context=context, weight_bits=16, kv_bits=16, activation_bits=16)


# What fits


@pytest.mark.parametrize("llm", [OPT_30B, LLAMA3_1_8B], ids=lambda llm: llm.name)
def test_the_best_split_fits_wherever_one_form_does(llm):
    """The host's memory binds before the link does; both cases occur, so that this says something."""
    fitting = []
    for host in np.geomspace(1, 600, 40):
        system = RTX.with_tier("host", capacity=float(host) * GB)
        cost = {form: generation_time(system, served(llm), prompt=1024, generated=16, form=form) for form in FORMS}
        assert cost["best"].fits or not (cost["act"].fits or cost["kv"].fits)
        if cost["best"].fits:
            assert cost["best"].host_bytes <= host * GB * (1 + SUMS)
            others = [one.decode for one in cost.values() if one.fits]
            assert cost["best"].decode <= min(others) * (1 + SUMS)
        fitting.append((cost["act"].fits, cost["kv"].fits))
    smaller = (True, False) if llm is OPT_30B else (False, True)
    assert {smaller, (True, True), (False, False)} <= set(fitting)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"deepspeed"}))
def test_no_baseline_runs_on_a_gpu_below_what_it_must_hold(name: str):
    """OPT-30B, by hand: two layers of 24 h^2 bytes, embeddings, and two buffers of 16 requests of 528 tokens, 3.67 GB."""
    h, workload = 7168, served()
    kv_bytes = 4 * h * (4.5 / 16 if name == "kv_int4" else 1)
    must = 2 * 24 * h * h + 2 * 50272 * h + 2 * 16 * 528 * kv_bytes
    assert must < 3.68e9
    for more, fits in ((-1.0, False), (1.0, True)):
        cost = generation(RTX.with_tier("GDDR6X", capacity=must + more), workload, ALL[name], generated=16)
        assert cost.fits == fits
        assert math.isfinite(cost.decode) == fits
        assert (cost.throughput > 0) == fits


def test_kvprs_gpu_holds_the_embeddings():
    """128,256 x 4096 elements of Llama-3.1-8B, 1.05 GB: with a byte less than all, nothing fits."""
    problem = RecomputeSplitProblem.build(SYSTEMS["a100_pcie4"], served(LLAMA3_1_8B, batch=1, context=16))
    assert problem.embeddings == 128256 * 4096 * 2
    for missing, fits in ((0, True), (1, False), (problem.embeddings, False)):
        assert replace(problem, machine=replace(problem.machine, gpu_capacity=problem.gpu_bytes - missing)).possible == fits


# Weights


def test_gpu_batches_send_the_experts_that_any_of_them_chose_once():
    """Mixtral, the same 16 requests as 1 x 16, 2 x 8 and 16 x 1: one transfer of the same experts, though each batch reads fewer."""
    shapes = ((16, 1), (8, 2), (1, 16))
    layers = [offload_layers(served(MIXTRAL_8X7B, batch=batch), batches)[0] for batch, batches in shapes]
    assert layers[0].sent_bytes == layers[1].sent_bytes == layers[2].sent_bytes == layers[0].read_bytes
    assert layers[2].read_bytes < layers[1].read_bytes < layers[0].read_bytes
    ratios = [CacheRatioProblem.build(RTX, served(MIXTRAL_8X7B, batch=batch), batches=batches) for batch, batches in shapes]
    assert ratios[0].layers[0].weights == ratios[1].layers[0].weights == ratios[2].layers[0].weights
    assert ratios[0].streamed == ratios[2].streamed
    splits = [
        RecomputeSplitProblem.build(RTX, served(MIXTRAL_8X7B, batch=batch), batches=batches, weights="host") for batch, batches in shapes
    ]
    moved = [problem.evaluate(RecomputeSplitPlan(splits=(0,))).to_device_bytes for problem in splits]
    assert moved == pytest.approx([moved[0]] * 3, rel=SUMS)


def test_token_ids_send_all_experts():
    """Every token of the prompts chooses experts again: one request's two experts of eight are not enough."""
    machine = OffloadMachine.build(RTX)
    (layer,) = offload_layers(served(MIXTRAL_8X7B, batch=1))
    assert layer.read_bytes < 0.4 * layer.weight_bytes
    found = ALL["token_ids"].layer_time(layer, machine, np.array([1.0]), 0.0)[0]
    assert found == layer.weight_bytes / machine.to_device


def test_groups_of_resident_state_are_made_for_the_longest_context_and_each_loads_the_weights():
    """Three requests of the longest state fit, a fourth does not: 8 requests are three groups from the first token on, also in prefill."""
    machine, rule = OffloadMachine.build(RTX), ALL["deepspeed"]
    (layer,) = offload_layers(served(batch=8, context=1))
    longest = 1000
    assert rule.groups(layer, longest, 3.9 * longest * layer.kv_bytes) == 3
    assert rule.groups(layer, longest, 8.0 * longest * layer.kv_bytes) == 1
    times = rule.layer_time(layer, machine, np.array([1.0, longest]), 3.9 * longest * layer.kv_bytes)
    assert times[0] == pytest.approx(3 * layer.weight_time(machine), rel=SUMS)
    # A GPU with room for 3.9 requests of 1000 tokens beside what it must hold; one token of prompt computes in no time to speak of.
    workload = served(batch=8, context=1)
    room = gpu_overhead(workload, longest + 1, buffered_requests=0) + OPT_30B.num_hidden_layers * 3.9 * longest * layer.kv_bytes
    cost = generation(RTX.with_tier("GDDR6X", capacity=room), workload, rule, generated=longest)
    assert cost.prefill == pytest.approx(3 * workload.weight_bytes / machine.to_device, rel=SUMS)


# Batches and hosts


def test_a_prime_batch_costs_kvpr_little():
    """127 requests are 8 GPU batches of 16 with one place empty: no less than 94 % of what 128 reach for each request."""
    prime, even = (kvpr(RTX, served(batch=batch), 16, HYBRIDSERVE_PAPER).throughput / batch for batch in (127, 128))
    assert prime >= 0.94 * even


def test_attention_on_a_host_without_a_cpu_is_not_priced():
    bare = replace(RTX, units=tuple(unit for unit in RTX.units if unit.tier != "host"))
    with_cpu, without = (generation(system, served(), ALL["cpu_attention"], generated=4) for system in (RTX, bare))
    assert with_cpu.fits
    assert not without.fits
    assert (without.decode, without.throughput) == (math.inf, 0.0)


# Machines without limits


def timeless() -> System:
    """Links, memories and units that take no time."""
    fast = replace(RTX, links=tuple(replace(link, bandwidth=math.inf) for link in RTX.links))
    for tier in RTX.tiers:
        fast = fast.with_tier(tier.name, bandwidth=math.inf)
    for unit in RTX.units:
        fast = fast.with_unit(unit.name, matrix_peak=math.inf, vector_peak=math.inf)
    return fast


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("roomy", [False, True])
def test_machines_that_take_no_time_take_none(roomy: bool):
    """No division by zero, no NaN: no seconds and no end of tokens a second, or, where the GPU is too small for a rule, none at all."""
    system = timeless().with_tier("GDDR6X", capacity=1e15) if roomy else timeless()
    costs = [generation(system, served(), rule, generated=4) for rule in ALL.values()]
    costs += [generation_time(system, served(), prompt=512, generated=4, form=form) for form in FORMS]
    costs.append(kvpr(system, served(), 4, DATASHEET))
    for cost in costs:
        assert (cost.prefill, cost.decode, cost.throughput) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("error")
def test_a_link_that_takes_no_time_never_makes_a_rule_slower(name: str):
    fast = replace(timeless(), units=RTX.units).with_tier("GDDR6X", bandwidth=RTX.tiers[0].bandwidth)
    before, after = (generation(system, served(OPT_6_7B), ALL[name], generated=4) for system in (RTX, fast))
    assert 0 <= after.decode <= before.decode * (1 + SUMS)
    assert after.prefill <= before.prefill * (1 + SUMS)


def test_a_split_on_an_endless_link_moves_its_bytes_and_gains_nothing():
    problem = RecomputeSplitProblem.build(timeless(), served(OPT_6_7B, batch=8, context=100), weights="host")
    cost = problem.evaluate(RecomputeSplitPlan(splits=(0,)))
    (layer,) = problem.layers
    # Weights, and keys and values of 8 x 100 tokens, in 32 layers; the same sums in another order.
    assert cost.to_device_bytes == pytest.approx(32 * (layer.weight_bytes + 800 * layer.kv_bytes), rel=SUMS)
    found = split_generation(problem, generated=3)
    assert (found.transfer, found.best, found.gain, found.cut) == (0.0, 0.0, 0.0, 0.0)


def test_long_generations_are_priced_in_parts_that_add_up():
    """More steps than are looked at in one array: the same sum as of two shorter generations."""
    problem = RecomputeSplitProblem.build(RTX, served(OPT_6_7B, batch=1, context=10), weights="host")
    more = STEPS_AT_ONCE + 100
    whole = split_generation(problem, generated=more, limit="total")
    first = split_generation(problem, generated=500, limit="total")
    rest = split_generation(replace(problem, context=510, most=510), generated=more - 500, limit="total")
    for name in ("transfer", "recompute", "best"):
        assert getattr(whole, name) == pytest.approx(getattr(first, name) + getattr(rest, name), rel=1e-9)  # 33,000 terms in other groups


def test_a_million_new_tokens_are_the_most():
    for call in (
        lambda n: generation(RTX, served(), ALL["kv_only"], generated=n),
        lambda n: generation_time(RTX, served(), prompt=1, generated=n),
        lambda n: split_generation(RecomputeSplitProblem.build(RTX, served()), generated=n),
    ):
        with pytest.raises(ValueError, match="at most 1000000 new tokens"):
            call(10**11)


def test_a_rule_of_another_name_is_refused():
    with pytest.raises(ValueError, match="rule must be one of in_turn, resident_state") as refusal:
        OffloadBaseline(name="a", rule="x")
    assert "\n" not in str(refusal.value)
