"""Pages: counts and fragmentation, what plans hold of them, what TLB misses cost, and what moving between two plans takes."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import FROM_SYSTEMS, all_plans, linear, tiny_llm, two_sided, uniform_plan
from strategies import dense_llms, mapping_problems

from memsplit.models import KernelMappingPlan, KernelMappingProblem, Split, Workload
from memsplit.models.paging import capacity_pages, fragmentation, migration_time, page_count, page_walk_time
from memsplit.models.presets import GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM
from memsplit.models.units import GB, MiB, ns

BUILD = KernelMappingProblem.build
sizes = st.integers(0, 2**50)
page_sizes = st.integers(1, 2**31)


@given(sizes, page_sizes)
def test_pages_hold_the_tensor_and_one_page_less_does_not(nbytes, page):
    pages = int(page_count(nbytes, page))
    assert pages * page >= nbytes
    assert pages == 0 or (pages - 1) * page < nbytes


@given(sizes, page_sizes)
def test_fragmentation_is_at_least_zero_and_less_than_a_page(nbytes, page):
    """Whole bytes below 2^53: exact in doubles."""
    assert 0 <= fragmentation(nbytes, page) < page


@given(sizes, page_sizes)
def test_capacity_is_rounded_down_to_pages(nbytes, page):
    assert int(capacity_pages(nbytes, page)) == nbytes // page


def test_pages_are_counted_for_arrays_that_broadcast():
    assert page_count([[0, 1, 10, 11]], [[1], [10]]).tolist() == [[0, 1, 10, 11], [0, 1, 1, 2]]
    assert capacity_pages([9.99, 10.0], 10).tolist() == [0, 1]


def test_more_bytes_than_an_integer_holds_are_many_pages():
    """Unlimited memory is not less than none."""
    sizes = [1e9, 2.0**61, 1e19, 1e200, np.inf]
    for counted in (capacity_pages(sizes, 4096), page_count(sizes, 4096)):
        assert (np.diff(counted) >= 0).all()
        assert counted[0] == 1e9 // 4096 + (counted[0] * 4096 > 1e9)
        assert counted[-1] == 2**62 // 4096


def test_a_sum_of_fractions_is_not_rounded_up_to_a_byte_more():
    """3 x 0.1 x 10 B is 3.0000000000000004 B in doubles."""
    assert page_count(3 * 0.1 * 10, 1) == 3
    assert page_count(3.5, 1) == 4


def test_tlb_misses_by_hand():
    """H2M2: 120,000 pages of 2 MiB, 300 ns a miss, four walks at once: 9 ms. A TLB that holds all pages misses none."""
    assert page_walk_time(120_000, 300 * ns, 4, tlb_entries=2048) == pytest.approx(9e-3, rel=1e-12)
    assert page_walk_time(2048, 300 * ns, 4, tlb_entries=2048) == 0
    assert page_walk_time([0, 10], 300 * ns, 1).tolist() == pytest.approx([0, 3e-6])


def test_page_walks_slow_each_side_by_its_own_pages():
    """tiny_llm in pages of 64 B at 0.1 s a walk, four at once, all on the first side: 128 B of q, k and v are 1 + 1 + 1 pages of
    64, 32 and 32 B, so qkv takes 128 / 300 + 3 x 0.1 / 4 s."""
    problem = FROM_SYSTEMS["page walks"]
    assert problem.seconds(0, [2, 0]) == pytest.approx(128 / 300 + 3 * 0.1 / 4, rel=1e-12)


@given(dense_llms(), st.sampled_from([1, 7, 64]), st.data())
def test_pages_are_rounded_up_once_for_each_layer_tensor_and_side(llm, page, data):
    """Counted tensor by tensor in exact fractions; rounding up head by head would hold more."""
    workload = Workload(llm=llm, batch=2, context=3)
    problem = BUILD(two_sided((1e6, 1e6), page=page), workload)
    counts = [[n := data.draw(st.integers(0, kind.slices)), kind.slices - n] for kind in problem.kinds]
    d, queries, keys = llm.hidden_size, llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    ffn = [d * llm.intermediate_size] * (3 if llm.gated_ffn else 2)
    tensors = [[d * queries, d * keys, d * keys], [keys * 3 * 2] * 2, [queries * d, *ffn]]
    pages = [
        sum(math.ceil(Fraction(size * row[side], sum(row) * page)) for sizes, row in zip(tensors, counts, strict=True) for size in sizes)
        for side in (0, 1)
    ]
    cost = problem.evaluate(KernelMappingPlan.same_in_all_layers(problem, counts))
    assert cost.tier_bytes == tuple(float(llm.num_hidden_layers * number * page) for number in pages)


def test_pages_rounded_for_each_head_would_hold_more():
    """GPT3's keys of a head at batch 32 and context 1024 are 2 MiB exactly, at 1000 a little less: once a side is fewer pages."""
    problem = BUILD(H2M2_SYSTEM, Workload(llm=GPT3_175B, batch=32, context=1000))
    # 128 x 1000 x 32 B = 4,096,000 B a head and tensor: 1.953 pages; 48 heads are 93.75 pages, 94 and not 48 x 2 = 96.
    assert problem.pages(1, [48, 48]).tolist() == [2 * 94, 2 * 94]


@given(mapping_problems(tiers=3, ample=True), st.data())
def test_what_leaves_a_tier_is_what_it_lost_and_what_arrives_is_what_another_gained(problem, data):
    """Without pages and copies; in whole bytes, so exactly."""
    system = problem.system.with_page(1)
    system = replace(system, links=(*system.links, *(replace(link, source=link.target, target=link.source) for link in system.links)))
    problem = BUILD(system, replace(problem.workload, llm=data.draw(dense_llms())))
    fractions = st.lists(st.floats(0, 1), min_size=2, max_size=2)
    before, after = (uniform_plan(problem, data.draw(fractions)) for _ in range(2))
    transition = problem.transition(before, after)
    held = [problem.evaluate(plan).tier_bytes for plan in (before, after)]
    names = problem.tier_names
    arrived = [sum(nbytes for (_, target), nbytes in transition.moved.items() if target == name) for name in names]
    left = [sum(nbytes for (source, _), nbytes in transition.moved.items() if source == name) for name in names]
    assert [now - then for then, now in zip(*held, strict=True)] == [came - went for came, went in zip(arrived, left, strict=True)]
    assert (transition.latency == 0) == (not transition.moved)


def test_staying_moves_nothing():
    problem = FROM_SYSTEMS["both sides computing"]
    for plan in list(all_plans(problem))[::7]:
        transition = problem.transition(plan, plan)
        assert (transition.moved, transition.latency) == ({}, 0.0)


def test_a_migration_by_hand():
    """All to half and half: 656 B leave "fast" over a link of 50 B/s, the slowest of the three, with 0.5 s + 0.25 s + 1 s of latency."""
    system = two_sided((2000.0, 2000.0)).with_tier("fast", latency=0.5).with_tier("slow", latency=0.25)
    system = replace(system, links=tuple(replace(link, latency=1.0) for link in system.links))
    problem = BUILD(system, Workload(llm=tiny_llm(), batch=2, context=5))
    transition = problem.transition(uniform_plan(problem, [1.0]), uniform_plan(problem, [0.5]))
    assert transition.moved == {("fast", "slow"): 656.0}
    assert transition.latency == pytest.approx(656 / 50 + 1.75, rel=1e-12)


def test_layers_are_compared_one_by_one():
    """Two layers that swap their places move both, although no tier holds more or less than before."""
    problem = FROM_SYSTEMS["per layer, barriers"]
    rows = [((kind.slices, 0), (0, kind.slices)) for kind in problem.kinds]
    first = KernelMappingPlan(splits=tuple(tuple(Split(layers=1, counts=c) for c in row) for row in rows))
    second = KernelMappingPlan(splits=tuple(tuple(Split(layers=1, counts=c) for c in row[::-1]) for row in rows))
    assert problem.transition(first, second).moved == {("fast", "slow"): 656.0, ("slow", "fast"): 656.0}


def test_a_migration_from_hbm_to_an_expander_takes_two_hops():
    """GPT3-175B's keys and values, 77.3 GB, from HBM over LPDDR to CXL: the PCIe link of 63 GB/s is the slowest part of the way."""
    problem = BUILD(H2M2_CXL_SYSTEM.with_page(1).with_tier("HBM", capacity=300 * GB), Workload(llm=GPT3_175B, batch=32, context=1024))
    before = KernelMappingPlan.same_in_all_layers(problem, [[96, 0, 0], [96, 0, 0], [0, 96, 0]])
    after = KernelMappingPlan.same_in_all_layers(problem, [[96, 0, 0], [0, 0, 96], [0, 96, 0]])
    transition = problem.transition(before, after)
    assert transition.moved == {("HBM", "CXL"): 77_309_411_328.0}
    assert transition.latency == pytest.approx(77_309_411_328 / 63e9 + 32e-9 + 250e-9, rel=1e-12)


def test_migration_needs_links():
    problem = FROM_SYSTEMS["a tier that streams"]  # data of "far" reach "near", and none go back
    with pytest.raises(ValueError, match="no link leads from 'near' to 'far'; add one"):
        problem.transition(uniform_plan(problem, [1.0]), uniform_plan(problem, [0.0]))
    coefficients = linear([[1, 2]], [1], [9, 9], 3)
    plan = KernelMappingPlan.same_in_all_layers(coefficients, [[1, 2]])
    with pytest.raises(ValueError, match="build the problem from a System"):
        coefficients.transition(plan, plan)


def test_pages_move_whole():
    """2 MiB pages: what moves is a whole number of them."""
    problem = BUILD(H2M2_SYSTEM, Workload(llm=GPT3_175B, batch=32, context=1000))
    before = KernelMappingPlan.same_in_all_layers(problem, [[96, 0], [60, 36], [0, 96]])
    after = KernelMappingPlan.same_in_all_layers(problem, [[96, 0], [50, 46], [0, 96]])
    moved = problem.transition(before, after).moved[("HBM", "LPDDR")]
    assert moved % (2 * MiB) == 0
    # 60 heads hold 117.19 pages a tensor, 118; 50 hold 97.66, 98; LPDDR 36: 71 and 46: 90. So 19 of 20 fit the growth, of 2 tensors.
    assert moved == 96 * 2 * 19 * 2 * MiB


def test_moves_follow_one_another_and_an_empty_one_is_free():
    """600 B at 50 B/s and 100 B at 50 B/s; nothing moved takes no latency either."""
    system = two_sided()
    moved = {("fast", "slow"): 600.0, ("slow", "fast"): 100.0}
    assert migration_time(system, moved) == pytest.approx(14.0, rel=1e-12)
    assert migration_time(system.with_tier("fast", latency=1.0), {("fast", "slow"): 0.0}) == 0.0
