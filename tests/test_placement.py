"""FlexGen's placement problem: prices and peaks, exact solvers against enumeration and each other, laws, degenerate cases, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from conformance import HeuristicCase, TimeLimitedExactCase
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDING, all_splits

from memsplit.models.placement import GROUP_BITS, PlacementPlan, PlacementProblem
from memsplit.models.placement_t4 import BANDWIDTHS, FLEXGEN_T4, PEAKS, PlacementProfile
from memsplit.models.presets import LLAMA3_1_8B, MIXTRAL_8X7B, OPT_30B, OPT_175B, SYSTEMS
from memsplit.models.units import GB
from memsplit.models.workload import Workload
from memsplit.solvers import Status
from memsplit.solvers.placement import CharnesCooperPlacement, FixedPlacement, FlexGenPlacement, PulpPlacement

PROGRAM = 1e-6
"""Relative difference of optima of one linear program by two solvers: rows and reduced costs hold within 1e-7."""


@st.composite
def placement_problems(draw, *, gpu_batch_sizes=(1, 2, 4), roomy=False):
    """Small problems, most of them with some plan, in which any lane may be the longest."""
    rate = {field: draw(st.floats(0.3, 30)) for field in (*BANDWIDTHS, *PEAKS)}
    profile = PlacementProfile(name="random", usable=draw(st.sampled_from((0.8, 1.0))), cpu_slowdown=FLEXGEN_T4.cpu_slowdown, **rate)
    layers = draw(st.integers(1, 3))
    weight_bytes, kv_bytes = draw(st.floats(1, 100)), draw(st.floats(0.1, 3))
    prompt, generated = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    one = layers * (weight_bytes + kv_bytes * (prompt + generated))
    least = 3.0 if roomy else 0.2
    act_bytes, inner_bytes, score_bytes = draw(st.floats(0.1, 3)), draw(st.floats(0, 1)), draw(st.floats(0, 0.1))
    buffers = prompt * (10 * act_bytes + inner_bytes + score_bytes * prompt) + 2 * weight_bytes
    return PlacementProblem(
        name="random",
        prompt=prompt,
        generated=generated,
        layers=layers,
        hidden_size=draw(st.sampled_from((1024, 8192))),
        weight_bytes=weight_bytes,
        linear_flops=draw(st.floats(0, 10)),
        kv_bytes=kv_bytes,
        act_bytes=act_bytes,
        attention_flops=draw(st.floats(0.1, 3)),
        score_bytes=score_bytes,
        inner_bytes=inner_bytes,
        tier_names=("GPU", "host", "disk"),
        capacity=(
            draw(st.floats(least, 3)) * one + draw(st.floats(0.5, 5)) * buffers,
            draw(st.floats(0.5, 5)) * one + 100,
            draw(st.floats(0, 9)) * one,
        ),
        profile=profile,
        gpu_batch_sizes=gpu_batch_sizes,
        hidden_on_disk=draw(st.booleans()),
    )


def simplex(parts):
    """All shares of three tiers in ``parts``-ths."""
    return np.array(list(all_splits(parts, 3))) / parts


def grid_optimum(problem, parts=4, most=8):
    """Seconds a token of the best plan of a grid that fits (inf: none does)."""
    weights, cache = simplex(parts), simplex(parts)
    hidden = np.array([shares for shares in simplex(2) if problem.hidden_on_disk or not shares[2]])
    w, c, h, k = (axis.ravel() for axis in np.meshgrid(*map(np.arange, (len(weights), len(cache), len(hidden), most)), indexing="ij"))
    best = math.inf
    for size in problem.gpu_batch_sizes:
        seconds, excess = problem.latencies(weights[w], cache[c], hidden[h], size, k + 1)
        best = min(best, float(seconds[excess <= 0].min(initial=math.inf)))
    return best


@settings(max_examples=30)
@given(problem=placement_problems())
def test_no_plan_of_a_grid_beats_the_proven_optimum(problem):
    """The optimum is over more plans than the grid has, and its bound is below all of them."""
    exact, best = CharnesCooperPlacement().solve(problem), grid_optimum(problem)
    if exact.status is Status.INFEASIBLE:
        assert best == math.inf
        return
    assert exact.status is Status.OPTIMAL
    assert exact.bound <= best * (1 + ROUNDING)
    assert exact.objective <= best * (1 + CharnesCooperPlacement().relative_gap)


def test_the_optimum_is_found_by_a_fine_grid():
    """The other direction: a grid around the solver's shares in all blocks comes as close to the bound as its steps allow."""
    problem = replace(PlacementProblem.build(OPT_30B, prompt=512, generated=32), gpu_batch_sizes=(16, 32))
    exact = CharnesCooperPlacement().solve(problem)
    on_gpu, on_disk, none = np.linspace(0, 0.4, 201)[:, None, None], np.linspace(0, 0.1, 101)[:, None], np.zeros((1, 1, 1))
    weights = np.stack(np.broadcast_arrays(on_gpu, 1 - on_gpu, none), axis=-1)
    cache = np.stack(np.broadcast_arrays(none, 1 - on_disk, on_disk), axis=-1)
    found = math.inf
    for size in problem.gpu_batch_sizes:
        seconds, excess = problem.latencies(weights, cache, (0.0, 1.0, 0.0), size, np.arange(1, 13))
        found = min(found, float(seconds[excess <= 0].min()))
    # A step of 0.001 of the cache is 2 % of what is on disk, and that is read for a third of a decode step.
    assert exact.objective * (1 - ROUNDING) <= found <= exact.objective * 1.005


@settings(max_examples=25)
@given(problem=placement_problems(), data=st.data())
def test_the_first_bound_holds_for_every_plan(problem, data):
    """Also without branching, and for any shares and any number of GPU batches of the sizes in the problem."""
    bound = CharnesCooperPlacement(relative_gap=0.99).solve(problem).bound
    unit = st.tuples(*[st.floats(0.01, 1)] * 3).map(lambda x: tuple(np.array(x) / sum(x)))
    hidden = data.draw(st.floats(0, 1))
    shares = {"weights": data.draw(unit), "cache": data.draw(unit), "hidden": (hidden, 1 - hidden, 0.0)}
    for gpu_batch, gpu_batches in product(problem.gpu_batch_sizes, (1, 2, 7, 40)):
        cost = problem.evaluate(PlacementPlan(**shares, gpu_batch=gpu_batch, gpu_batches=gpu_batches))
        if cost.fits:
            assert bound is not None
            assert bound <= cost.latency * (1 + ROUNDING)


@settings(max_examples=30)
@given(problem=placement_problems())
def test_flexgens_search_is_no_better_than_the_optimum(problem):
    """It tries fewer blocks, and says that nothing fits only where nothing does."""
    searched, exact = FlexGenPlacement().solve(problem), CharnesCooperPlacement().solve(problem)
    assert (searched.status is Status.INFEASIBLE) == (exact.status is Status.INFEASIBLE)
    if searched.plan is not None:
        assert searched.bound is None
        assert searched.objective >= exact.bound * (1 - ROUNDING)


@settings(max_examples=4, deadline=None)
@given(problem=placement_problems(gpu_batch_sizes=(1, 4), roomy=True))
def test_pulp_and_highs_agree(problem):
    """The same programs by two solvers: plans within the gap of both, bounds below the other's plan."""
    one, other = CharnesCooperPlacement().solve(problem), PulpPlacement().solve(problem)
    assert one.status == other.status
    if one.plan is not None:
        assert one.objective == pytest.approx(other.objective, rel=2 * CharnesCooperPlacement().relative_gap)
        assert other.bound <= one.objective * (1 + PROGRAM)
        assert one.bound <= other.objective * (1 + PROGRAM)


@settings(max_examples=30)
@given(problem=placement_problems(), tier=st.integers(0, 2), more=st.floats(1, 4), field=st.sampled_from((*BANDWIDTHS, *PEAKS)))
def test_more_memory_or_a_faster_machine_never_hurts(problem, tier, more, field):
    """Every old plan stays, and takes no longer."""
    before = CharnesCooperPlacement().solve(problem)
    if before.plan is None:
        return
    capacity = tuple(room * (more if t == tier else 1) for t, room in enumerate(problem.capacity))
    faster = replace(problem.profile, **{field: getattr(problem.profile, field) * more})
    for better in (replace(problem, capacity=capacity), replace(problem, profile=faster)):
        assert better.evaluate(before.plan).latency <= before.objective * (1 + ROUNDING)
        assert better.evaluate(before.plan).fits
        assert CharnesCooperPlacement().solve(better).bound <= before.objective * (1 + ROUNDING)


@settings(max_examples=20)
@given(problem=placement_problems(), gpu=st.floats(0, 1), gpu_batches=st.integers(1, 9))
def test_a_grid_is_priced_as_its_plans_are(problem, gpu, gpu_batches):
    """One formula: the array function and evaluate give the same bits."""
    shares = {name: (gpu, 1 - gpu, 0.0) for name in ("weights", "cache", "hidden")}
    seconds, excess = problem.latencies(*[np.array([value] * 2) for value in shares.values()], 2, [gpu_batches, gpu_batches + 1])
    for i in range(2):
        cost = problem.evaluate(PlacementPlan(**shares, gpu_batch=2, gpu_batches=gpu_batches + i))
        assert cost.latency == seconds[i]
        assert (excess[i] > 1e-3) == (not cost.fits)


@settings(max_examples=20)
@given(problem=placement_problems(), factor=st.sampled_from((0.5, 4.0)))
def test_time_is_linear_in_the_rates(problem, factor):
    """All rates times a power of two: all times divided by it, exactly, and so the optimum."""
    faster = {field: getattr(problem.profile, field) * factor for field in (*BANDWIDTHS, *PEAKS)}
    scaled = replace(problem, profile=replace(problem.profile, **faster))
    plan = PlacementPlan(weights=(0.25, 0.5, 0.25), cache=(0.5, 0.5, 0.0), hidden=(0.0, 1.0, 0.0), gpu_batch=2, gpu_batches=3)
    assert scaled.evaluate(plan).latency * factor == problem.evaluate(plan).latency
    one, other = CharnesCooperPlacement().solve(problem), CharnesCooperPlacement().solve(scaled)
    assert one.status == other.status
    if one.plan is not None:
        assert other.objective * factor == pytest.approx(one.objective, rel=2 * CharnesCooperPlacement().relative_gap)


def test_held_bytes_are_those_of_the_llm():
    """Weights and cache of all layers are somewhere; with all on disk, the disk has exactly these and activations of no block."""
    problem = PlacementProblem.build(LLAMA3_1_8B, prompt=100, generated=28)
    plan = PlacementPlan.from_percent((0, 0, 0, 0, 0, 100), 4, 5)
    workload = Workload(llm=LLAMA3_1_8B, batch=20, context=128, weight_bits=16, kv_bits=16)
    assert problem.evaluate(plan).tier_bytes[2] == pytest.approx(workload.weight_bytes + workload.state_bytes, rel=ROUNDING)


def test_experts_are_moved_all_and_used_few():
    """Mixtral's eight experts are in the bytes; the FLOPs are those of two."""
    problem = PlacementProblem.build(MIXTRAL_8X7B, prompt=64, generated=8)
    experts = 3 * MIXTRAL_8X7B.hidden_size * MIXTRAL_8X7B.moe_intermediate_size
    assert problem.weight_bytes == pytest.approx(2 * 8 * experts, rel=0.05)
    assert problem.linear_flops == pytest.approx(2 * 2 * experts, rel=0.15)


def test_four_bits_move_a_quarter_and_a_bit():
    """4.5 of 16 bits; compute as before."""
    full = PlacementProblem.build(OPT_30B, prompt=512, generated=32)
    packed = PlacementProblem.build(OPT_30B, prompt=512, generated=32, weight_bits=GROUP_BITS, kv_bits=GROUP_BITS)
    assert (packed.weight_bytes, packed.kv_bytes) == (full.weight_bytes * 4.5 / 16, full.kv_bytes * 4.5 / 16)
    assert (packed.linear_flops, packed.act_bytes) == (full.linear_flops, full.act_bytes)
    assert CharnesCooperPlacement().solve(packed).objective < CharnesCooperPlacement().solve(full).objective


def test_all_on_the_gpu_where_it_has_room():
    """With a slow link and a slow host, everything is on a GPU that holds it, and nothing is sent."""
    problem = PlacementProblem.build(OPT_30B, prompt=8, generated=8, gpu_batch_sizes=(1, 2))
    slow = {field: getattr(FLEXGEN_T4, field) / 1e3 for field in (*BANDWIDTHS, "cpu_attention")}
    problem = replace(problem, capacity=(100 * GB, 500 * GB, 0.0), profile=replace(FLEXGEN_T4, usable=1.0, **slow))
    plan = CharnesCooperPlacement().solve(problem).unwrap()
    assert (plan.weights[0], plan.cache[0], plan.hidden[0]) == pytest.approx((1, 1, 1), abs=1e-6)
    assert problem.evaluate(plan).to_device_bytes <= 1e-5 * problem.weight_bytes * problem.layers


def test_without_a_disk_nothing_is_there():
    """A disk of 0 bytes holds no share."""
    problem = PlacementProblem.build(OPT_30B, prompt=512, generated=32)
    bare = replace(problem, capacity=(*problem.capacity[:2], 0.0))
    plan = CharnesCooperPlacement().solve(bare).unwrap()
    assert (plan.weights[2], plan.cache[2], plan.hidden[2]) == pytest.approx((0, 0, 0), abs=1e-9)


def test_one_layer_one_token_and_infinite_rates():
    """No decode step is prefill alone; with rates that take no time, every plan that fits takes none and is optimal."""
    problem = replace(PlacementProblem.build(OPT_30B, prompt=16, generated=1), layers=1)
    plan = CharnesCooperPlacement().solve(problem).unwrap()
    shares = (plan.weights, plan.cache, plan.hidden)
    prefill = problem.coefficients(plan.gpu_batch).prefill(*shares, plan.block).max()
    assert problem.evaluate(plan).latency == pytest.approx(prefill / plan.block, rel=ROUNDING)
    timeless = replace(problem, profile=replace(FLEXGEN_T4, **dict.fromkeys((*BANDWIDTHS, *PEAKS), math.inf)))
    for solver in (CharnesCooperPlacement(), FlexGenPlacement(most_gpu_batches=3)):
        assert solver.solve(timeless).objective == 0
    assert CharnesCooperPlacement().solve(timeless).status is Status.OPTIMAL
    assert timeless.throughput(plan) == math.inf


def test_exactly_full_memory_has_a_plan():
    """Capacities that a plan fills to the last byte admit it, or one within the tolerance of linear programs."""
    problem = PlacementProblem.build(OPT_30B, prompt=512, generated=32)
    plan = PlacementPlan.from_percent((20, 80, 0, 100, 0, 100), 16, 4)
    full = replace(problem, capacity=problem.evaluate(plan).tier_bytes, profile=replace(FLEXGEN_T4, usable=1.0), gpu_batch_sizes=(16,))
    assert full.evaluate(plan).fits
    result = CharnesCooperPlacement().solve(full)
    assert result.bound <= full.evaluate(plan).latency * (1 + ROUNDING)
    assert full.evaluate(result.unwrap()).fits


@pytest.mark.parametrize(
    ("capacity", "words"),
    [((1.0, 1e12, 1e12), "buffers"), ((16 * GB, 1 * GB, 1 * GB), "too little"), ((4 * GB, 2 * GB, 1e12), "no division")],
)
def test_what_does_not_fit_is_explained(capacity, words):
    """No room for buffers, for the data, or for both together."""
    problem = replace(PlacementProblem.build(OPT_175B, prompt=512, generated=32), capacity=capacity)
    for solver in (CharnesCooperPlacement(), FlexGenPlacement()):
        result = solver.solve(problem)
        assert result.status is Status.INFEASIBLE
        assert words in result.message


def test_percent_notation_goes_there_and_back():
    """Six percents name GPU and host; what is left is on disk, without a rounding of the subtraction."""
    plan = PlacementPlan.from_percent((20, 80, 10, 30, 0, 100), 48, 3)
    assert plan.percent == "20/80/10/30/0/100"
    assert plan.weights[2] == plan.hidden[2] == 0
    assert (plan.cache[2], plan.block) == (0.6, 144)


PLAN = {"weights": (0.2, 0.8, 0), "cache": (0, 1, 0), "hidden": (0, 1, 0), "gpu_batch": 1, "gpu_batches": 1}


@pytest.mark.parametrize(
    "bad",
    [
        {"weights": (0.5, 0.6, 0)},
        {"cache": (-0.5, 1.5, 0)},
        {"hidden": (0, 1)},
        {"weights": (float("nan"), 1, 0)},
        {"gpu_batch": 0},
        {"gpu_batches": 1.5},
    ],
)
def test_bad_plans_are_refused(bad):
    """In one sentence with the field's name."""
    with pytest.raises(ValueError, match=next(iter(bad))) as refusal:
        PlacementPlan(**{**PLAN, **bad})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": 0},
        {"generated": 0},
        {"gpu_batch_sizes": ()},
        {"gpu_batch_sizes": (0,)},
        {"weight_bytes": -1.0},
        {"capacity": (1.0, 2.0)},
        {"capacity": (1.0, 2.0, float("nan"))},
    ],
)
def test_bad_problems_are_refused(bad):
    """In one sentence with the field's name."""
    problem = PlacementProblem.build(OPT_30B, prompt=8, generated=8)
    with pytest.raises(ValueError, match=next(iter(bad))) as refusal:
        replace(problem, **bad)
    assert "\n" not in str(refusal.value)


def test_bad_profiles_systems_and_places_are_refused():
    """A rate of 0, a machine of one tier, activations where they may not be, and five percents."""
    with pytest.raises(ValueError, match="to_device"):
        replace(FLEXGEN_T4, to_device=0.0)
    with pytest.raises(ValueError, match="cpu_slowdown"):
        replace(FLEXGEN_T4, cpu_slowdown=(1.0, 2.0))
    with pytest.raises(ValueError, match="in this order"):
        PlacementProblem.build(OPT_30B, prompt=8, generated=8, system=SYSTEMS["lpddr_only"])
    with pytest.raises(ValueError, match="hidden_on_disk"):
        PlacementProblem.build(OPT_30B, prompt=8, generated=8).evaluate(PlacementPlan(**{**PLAN, "hidden": (0, 0, 1)}))
    with pytest.raises(ValueError, match="percent"):
        PlacementPlan.from_percent((1, 2, 3, 4, 5), 1, 1)


SMALL = PlacementProblem.build(OPT_30B, prompt=64, generated=8, gpu_batch_sizes=(1, 8))
IMPOSSIBLE = replace(SMALL, capacity=(1 * GB, 1 * GB, 1 * GB))
HARD = replace(PlacementProblem.build(OPT_175B, prompt=512, generated=32), gpu_batch_sizes=tuple(range(1, 200)))


class TestCharnesCooperPlacement(TimeLimitedExactCase):
    solver, problem, impossible, hard = CharnesCooperPlacement(), SMALL, IMPOSSIBLE, HARD


class TestPulpPlacement(TimeLimitedExactCase):
    solver, problem, impossible, hard = PulpPlacement(), SMALL, IMPOSSIBLE, HARD


class TestFlexGenPlacement(HeuristicCase):
    solver, problem, impossible = FlexGenPlacement(most_gpu_batches=20), SMALL, IMPOSSIBLE
    optimum = CharnesCooperPlacement().solve(SMALL).bound
    bad_settings = ({"most_gpu_batches": 0},)


class TestFixedPlacement(HeuristicCase):
    solver, problem, impossible = FixedPlacement(PlacementPlan.from_percent((10, 90, 0, 100, 0, 100), 8, 2)), SMALL, IMPOSSIBLE
    optimum = TestFlexGenPlacement.optimum


@pytest.mark.parametrize(
    "solver", [CharnesCooperPlacement(), PulpPlacement(), FlexGenPlacement()], ids=lambda solver: type(solver).__name__
)
def test_on_two_memories_nothing_is_on_disk(solver):
    """A system of two tiers is one of three whose disk holds nothing."""
    problem = PlacementProblem.build(OPT_30B, prompt=512, generated=32, system=SYSTEMS["rtx4090_pcie4"])
    assert problem.capacity[2] == 0
    plan = solver.solve(problem).unwrap()
    # 1e-6: what a solver's tolerance leaves, of 60 GB less than a page of a disk.
    assert max(plan.weights[2], plan.cache[2], plan.hidden[2]) <= 1e-6
