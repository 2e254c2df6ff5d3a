"""FlexGen (arXiv 2303.06865): its cost model on a T4, the throughput it publishes, and what its search finds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from memsplit.models.placement import PlacementPlan, PlacementProblem
from memsplit.models.placement_t4 import FLEXGEN_T4, FLEXGEN_T4_FAST_DISK, FLEXGEN_T4_SYSTEM
from memsplit.models.presets import OPT_30B, OPT_175B, SYSTEMS
from memsplit.models.units import GiB
from memsplit.solvers import Status
from memsplit.solvers.placement import CharnesCooperPlacement, FixedPlacement, FlexGenPlacement

EXAMPLE = (16.0 * GiB, 200.0 * GiB, 1500.0 * GiB)
"""The machine of FlexGen's example call."""


def seconds(llm, prompt, generated, percent, gpu_batch, gpu_batches, disk_read):
    """T of FlexGen's cost model for 16 bits, term by term as published and without the library's coefficients."""
    h, inner, layers, unit = llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers, 2**30
    wg, wc, cg, cc, hg, _hc = (value / 100 for value in percent)
    wd, cd, away = 1 - wg - wc, 1 - cg - cc, 1 - hg
    block, s, n = gpu_batch * gpu_batches, prompt, generated
    w = 8 * h**2 + 4 * h * inner
    a, b = max(0, math.log2(64 / gpu_batch)), max(0, math.log2(4096 / h))
    cpu = 12.3e9 * max(0.1, 1 + 0.0168 * a * b - 0.0328 * a - 0.0621 * b)
    read = (w * (1 - wg) + 2 * s * h * block * away) / (12.89 * unit) + w * wd / (disk_read * unit)
    write = 4 * (s + 1) * h * block * (1 - cg) / (0.97 * unit) + 2 * s * h * block * away / (4.82 * unit)
    write += 4 * (s + 1) * h * block * cd / (0.746 * unit)
    compute = block * (8 * s * h**2 + 4 * s * h * inner) / 21.24e12 + 4 * block * s**2 * h / 9.97e12
    ctog = (w * (1 - wg) + 2 * h * block * away) / (12.89 * unit)
    gtoc = 2 * h * block * away / (4.82 * unit)
    dtoc = (4 * cd * (s + n / 2) * h * block + w * wd / 0.95) / (disk_read * unit)
    ctod = 4 * cd * h * block / (2.015 * unit)
    attention = 4 * block * (s + n / 2) * h * (cg / 0.079e12 + (1 - cg) / cpu)
    decode = ctog + max(gtoc, dtoc, ctod, block * (8 * h**2 + 4 * h * inner) / 4.3e12 + attention)
    return layers * max(read, write, compute) + layers * (n - 1) * decode


def peaks(llm, prompt, generated, percent, gpu_batch, gpu_batches):
    """Peak bytes of GPU, host and disk in FlexGen's cost model for 16 bits, term by term as published."""
    h, inner, heads, layers = llm.hidden_size, llm.intermediate_size, llm.num_attention_heads, llm.num_hidden_layers
    wg, wc, cg, cc, hg, hc = (value / 100 for value in percent)
    wd, cd, away = 1 - wg - wc, 1 - cg - cc, 1 - hg
    g, block, s, end, w = gpu_batch, gpu_batch * gpu_batches, prompt, prompt + generated, 8 * h**2 + 4 * h * inner
    cache = 4 * end * h * block * layers
    attention = 2 * s * h + 2 * heads * s**2 + 2 * s * h
    working = g * (8 * s * h + attention + 4 * s * h + 2 * s * inner + 2 * s * h)
    gpu_prefill = w * layers * wg + 2 * s * h * block * hg + cache * cg + 2 * w * (1 - wg) + 2 * s * h * g * away + working
    attention = (2 * h + 2 * end * h + 2 * heads * end + 2 * end * h + 2 * h) * cg
    working = g * (8 * h + attention + 4 * h + 2 * inner + 2 * h)
    gpu_decode = w * layers * wg + 2 * h * block * hg + cache * cg + 2 * w * (1 - wg) + 2 * h * g * away + 4 * g * end * h * cg + working
    host_prefill = w * layers * wc + 2 * s * h * block * hc + 4 * s * h * block * layers * cc + w * (1 - wg) + 2 * s * h * g * away
    host_decode = w * layers * wc + 2 * h * block * hc + cache * cc + w * wd + 8 * end * h * g * cd + 2 * heads * end * g + 2 * h * g
    return gpu_prefill, gpu_decode, host_prefill, host_decode, w * layers * wd + cache * cd


PUBLISHED_POLICIES = [
    (OPT_30B, 512, (20, 80, 0, 100, 0, 100), 48, 3, FLEXGEN_T4, 7.14),
    (OPT_30B, 256, (10, 90, 0, 100, 0, 100), 160, 2, FLEXGEN_T4, 12.97),
    (OPT_175B, 512, (0, 50, 0, 0, 0, 100), 32, 8, FLEXGEN_T4, 0.15),
    (OPT_175B, 512, (0, 50, 0, 0, 0, 100), 32, 8, FLEXGEN_T4_FAST_DISK, 0.66),
]


@pytest.mark.parametrize(("llm", "prompt", "percent", "gpu_batch", "gpu_batches", "profile", "expected"), PUBLISHED_POLICIES)
def test_cost_model_of_published_policies(llm, prompt, percent, gpu_batch, gpu_batches, profile, expected):
    """Token/s that FlexGen's cost model gives for its policies, to the digits stated; and the same from the equations term by term."""
    problem = PlacementProblem.build(llm, prompt=prompt, generated=32, profile=profile)
    plan = PlacementPlan.from_percent(percent, gpu_batch, gpu_batches)
    found = problem.throughput(plan)
    assert found == pytest.approx(expected, abs=0.005)
    total = seconds(llm, prompt, 32, percent, gpu_batch, gpu_batches, profile.disk_read / GiB)
    # Some dozen roundings, in another order.
    assert found == pytest.approx(plan.block * 32 / total, rel=1e-12)


@pytest.mark.parametrize("percent", [(30, 20, 50, 20, 70, 30), (0, 100, 100, 0, 100, 0), (100, 0, 0, 0, 0, 100), (0, 0, 0, 90, 50, 50)])
@pytest.mark.parametrize(("prompt", "generated", "gpu_batch", "gpu_batches"), [(512, 32, 48, 3), (7, 1, 2, 1), (64, 300, 1, 40)])
def test_time_of_any_policy(percent, prompt, generated, gpu_batch, gpu_batches):
    """The equations term by term, also where cache is on the GPU or on disk, and where other lanes are the longest."""
    problem = PlacementProblem.build(OPT_30B, prompt=prompt, generated=generated)
    plan = PlacementPlan.from_percent(percent, gpu_batch, gpu_batches)
    total = seconds(OPT_30B, prompt, generated, percent, gpu_batch, gpu_batches, 0.473)
    assert problem.throughput(plan) == pytest.approx(plan.block * generated / total, rel=1e-12)


@pytest.mark.parametrize("percent", [(20, 80, 0, 100, 0, 100), (0, 50, 0, 0, 0, 100), (30, 20, 50, 20, 70, 30), (0, 0, 90, 0, 100, 0)])
@pytest.mark.parametrize(("prompt", "gpu_batch", "gpu_batches"), [(512, 48, 3), (7, 2, 1)])
def test_peaks_of_memory(percent, prompt, gpu_batch, gpu_batches):
    """The bytes of each tier are the larger of FlexGen's two peaks, for prefill and for decode."""
    problem = PlacementProblem.build(OPT_30B, prompt=prompt, generated=32)
    plan = PlacementPlan.from_percent(percent, gpu_batch, gpu_batches)
    expected = peaks(OPT_30B, prompt, 32, percent, gpu_batch, gpu_batches)
    found = problem.coefficients(gpu_batch).peaks(plan.weights, plan.cache, plan.hidden, gpu_batch, plan.block)
    # Some dozen roundings, in another order.
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    gpu, host, disk = max(expected[:2]), max(expected[2:4]), expected[4]
    assert problem.evaluate(plan).tier_bytes == pytest.approx((gpu, host, disk), rel=1e-12)


@pytest.mark.parametrize(
    ("llm", "prompt", "policy", "profile", "published", "tolerance"),
    [
        pytest.param(OPT_30B, 512, PUBLISHED_POLICIES[0], FLEXGEN_T4, 7.32, 0.03, id="OPT-30B 512"),
        pytest.param(OPT_175B, 512, PUBLISHED_POLICIES[3], FLEXGEN_T4_FAST_DISK, 0.69, 0.05, id="OPT-175B, disk at 2.5 GiB/s"),
        pytest.param(
            *(OPT_30B, 256, PUBLISHED_POLICIES[1], FLEXGEN_T4, 16.01, 0.05),
            id="OPT-30B 256",
            marks=pytest.mark.xfail(strict=True, reason="FlexGen's own cost model gives 12.97 token/s for this policy"),
        ),
        pytest.param(
            *(OPT_175B, 512, PUBLISHED_POLICIES[2], FLEXGEN_T4, 0.69, 0.05),
            id="OPT-175B, disk at 0.473 GiB/s",
            marks=pytest.mark.xfail(strict=True, reason="half of OPT-175B's weights alone take longer at the disk rate of its cost model"),
        ),
    ],
)
def test_published_throughput(llm, prompt, policy, profile, published, tolerance):
    """Token/s measured by FlexGen, table 2, within what its cost model misses them by."""
    problem = PlacementProblem.build(llm, prompt=prompt, generated=32, profile=profile)
    assert problem.throughput(PlacementPlan.from_percent(*policy[2:5])) == pytest.approx(published, rel=tolerance)


def test_flexgens_search_on_opt_30b_is_optimal():
    """7.12 token/s by FlexGen's search; the proven optimum of its formulation is the same, where 7.15 was the bound before branching."""
    problem = PlacementProblem.build(OPT_30B, prompt=512, generated=32)
    searched, exact = FlexGenPlacement().solve(problem), CharnesCooperPlacement().solve(problem)
    assert 1 / searched.objective == pytest.approx(7.12, abs=0.005)
    assert exact.status is Status.OPTIMAL
    assert 1 / exact.bound == pytest.approx(7.12, abs=0.005)
    assert exact.objective <= searched.objective * (1 + CharnesCooperPlacement().relative_gap)


def test_sixteen_and_two_hundred_gigabytes_change_little():
    """FlexGen's example call has 16 and 200 x 2**30 bytes for the default of 15 and 204: within one percent of 7.12 token/s."""
    problem = replace(PlacementProblem.build(OPT_30B, prompt=512, generated=32), capacity=EXAMPLE)
    assert 1 / CharnesCooperPlacement().solve(problem).objective == pytest.approx(7.12, rel=0.01)


def test_published_policies_need_more_than_the_share_that_the_search_may_use():
    """FlexGen gives its search 0.8 of the memory and its published policies 1.2: they fit the second, not the first."""
    for llm, prompt, percent, gpu_batch, gpu_batches, profile, _ in PUBLISHED_POLICIES:
        fixed = FixedPlacement(PlacementPlan.from_percent(percent, gpu_batch, gpu_batches))
        strict = replace(PlacementProblem.build(llm, prompt=prompt, generated=32, profile=profile), capacity=EXAMPLE)
        refused = fixed.solve(strict)
        assert refused.status is Status.UNKNOWN
        assert "GDDR6" in refused.message
        assert fixed.solve(replace(strict, profile=replace(profile, usable=1.2))).status is Status.FEASIBLE


def test_the_machine_has_the_tiers_of_the_data_sheet():
    """Only capacities differ, by less than 10 %: 2**30 bytes for a gigabyte, 15 for 16 and 204 for 200."""
    for ours, sheet in zip(FLEXGEN_T4_SYSTEM.tiers, SYSTEMS["t4_disk"].tiers, strict=True):
        assert ours.name == sheet.name
        assert ours.capacity == pytest.approx(sheet.capacity, rel=0.1)
