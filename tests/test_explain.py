"""What binds and what more is worth: duals against differences, against hand-derived machines; levers against the problems they make."""

import math
import pickle
import sys
from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import mapping_problems

from memsplit.dse._problem_kinds import kind_of, resources
from memsplit.dse.explain import LEVER_GAP, LEVER_SECONDS, explain
from memsplit.models import (
    FLEXGEN_T4,
    CacheRatioProblem,
    ComputeUnit,
    KernelMappingProblem,
    Link,
    MemoryTier,
    PlacementProblem,
    RecomputeSplitProblem,
    System,
    Workload,
)
from memsplit.models.presets import A100_SYSTEM, GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B, OPT_30B
from memsplit.models.units import GB, TB, TFLOPS, ms
from memsplit.solvers import ClosedFormSplit, GreedyMapping, LpRatio, PatternMapping, SolverResult, Status, TableMapping

OPT = Workload(llm=OPT_30B, batch=512, context=1024, weight_bits=16, kv_bits=16, activation_bits=16)
LLAMA = Workload(llm=LLAMA2_70B, batch=128, context=4096)
GPT3 = Workload(llm=GPT3_175B, batch=64, context=2048)


def mapping(workload=GPT3, system=H2M2_SYSTEM, **settings):
    return KernelMappingProblem.build(system, workload, **settings)


def full_host():
    """A split for which the host has room for a few of the activations that it would like to keep: 5 GB beside weights, keys and values."""
    work = replace(OPT, batch=32, context=4096)
    roomy = RecomputeSplitProblem.build(A100_SYSTEM, work, weights="host")
    return RecomputeSplitProblem.build(A100_SYSTEM.with_tier("host", capacity=roomy.host_bytes + 5 * GB), work, weights="host")


PROBLEMS = {
    "mapping per layer": lambda: mapping(grouped=False),
    "mapping grouped": lambda: mapping(LLAMA),
    "mapping on three memories": lambda: mapping(LLAMA, H2M2_CXL_SYSTEM, grouped=False),
    "cache ratio": lambda: CacheRatioProblem.build(A100_SYSTEM, OPT),
    "recompute split": full_host,
}
each_problem = pytest.mark.parametrize("build", PROBLEMS.values(), ids=PROBLEMS)


def capacities(problem):
    return [resource for resource in resources(problem.system) if resource.field == "capacity"]


def with_more(problem, resource, amount):
    """The relaxation, with ``amount`` [SI] more of a resource."""
    kind = kind_of(problem)
    system = resource.changed(problem.system, resource.of(problem.system) + amount)
    return kind.relaxed(kind.rebuilt(problem, system, problem.workload))


@each_problem
def test_the_dual_is_the_difference_of_the_same_program_away_from_kinks(build):
    """Where the dual is the same at both ends, the convex optimum is a straight line between them. Steps are whole grains, to which a
    capacity is rounded down: pages, the blocks' common divisor, a token's activations."""
    problem, agreed = build(), 0
    for resource in capacities(problem):
        step = 256.0 * grain(problem, resource)
        here, there = with_more(problem, resource, 0.0), with_more(problem, resource, step)
        dual, other = here.worth[resource.index], there.worth[resource.index]
        if dual > 0 and abs(dual - other) <= 1e-9 * dual:
            # Two programs, each to 1e-9 of its optimum, of which the step saves this share.
            accuracy = 2e-9 * here.bound / (dual * step)
            assert accuracy < 1e-3, "else this shows nothing"
            assert (here.bound - there.bound) / step == pytest.approx(dual, rel=accuracy)
            agreed += 1
    assert agreed, "at least one memory is worth something here"


def grain(problem, resource):
    """Bytes to which a problem rounds the capacity of a memory down."""
    if isinstance(problem, CacheRatioProblem):
        return math.gcd(problem.kv_block, problem.act_block)
    if isinstance(problem, RecomputeSplitProblem):
        return problem.requests * problem.layers[0].act_bytes
    return problem.system.tiers[resource.index].page


@given(problem=mapping_problems(grouped=False), which=st.integers(0, 1), share=st.floats(0.01, 0.5))
@settings(max_examples=40, deadline=None)
def test_a_difference_lies_between_the_duals_at_its_ends(problem, which, share):
    """The relaxation's optimum is convex in capacity and never rises: w(C + d) d <= T(C) - T(C + d) <= w(C) d, kinks or not."""
    resource, kind = capacities(problem)[which], kind_of(problem)
    pages = int(problem.capacity[which])
    more = max(1, int(share * (pages + 10)))
    size = float(problem.page[which])
    if kind.solver(problem).solve(problem).plan is None:
        return
    low, high = (with_more(problem, resource, extra * size) for extra in (0, more))
    gained, rounding = low.bound - high.bound, 1e-8 * low.bound
    assert high.worth[which] * more * size - rounding <= gained <= low.worth[which] * more * size + rounding


@each_problem
def test_differences_are_those_of_the_changed_problem(build):
    """By solving it here once more; a relaxation's where the optimum is not proven, and never below 0."""
    problem = build()
    found = explain(problem)
    assert found.feasible
    for worth in found.worths:
        assert worth.worth_ms >= 0
        if worth.method == "difference" and worth.of == "optimum":
            resource = next(one for one in resources(problem.system) if one.name == worth.resource)
            more = resource.changed(problem.system, resource.of(problem.system) + resource.factor)
            again = kind_of(problem).rebuilt(problem, more, problem.workload)
            gain = found.result.objective - kind_of(problem).solver(again).solve(again).objective
            assert worth.worth_ms * ms == pytest.approx(gain, abs=1e-9 * found.result.objective)


def test_what_machines_of_one_bottleneck_gain_is_derived_by_hand():
    """One memory of B bytes/s that streams b bytes: one more GB/s saves b / B - b / (B + 1 GB/s); all else saves nothing."""
    machine = System(
        name="one",
        tiers=(MemoryTier(name="DRAM", capacity=200 * GB, bandwidth=1 * TB),),
        units=(ComputeUnit(name="chip", tier="DRAM", matrix_peak=1e6 * TFLOPS, vector_peak=1e6 * TFLOPS),),
    )
    found = explain(mapping(replace(LLAMA, batch=8), machine))
    nbytes = LLAMA.weight_bytes + replace(LLAMA, batch=8).state_bytes
    assert found.worth("DRAM bandwidth") * ms == pytest.approx(nbytes / TB - nbytes / (1.001 * TB), rel=1e-9)
    assert {bottleneck.resources for bottleneck in found.bottlenecks} == {("DRAM bandwidth",)}
    assert found.worth("DRAM capacity") == found.worth("chip matrix peak") == found.worth("DRAM capacity", "dual") == 0
    slow = machine.with_unit("chip", matrix_peak=1 * TFLOPS, vector_peak=1e6 * TFLOPS)
    by_part = {bottleneck.part: bottleneck.resources for bottleneck in explain(mapping(replace(LLAMA, batch=8), slow)).bottlenecks}
    assert by_part == {"qkv": ("chip matrix peak",), "attention": ("DRAM bandwidth",), "fc": ("chip matrix peak",)}


def test_a_tier_without_a_unit_waits_for_its_link_and_two_that_are_equal_bind_together():
    tiers = (MemoryTier(name="near", capacity=1, bandwidth=1 * TB), MemoryTier(name="far", capacity=300 * GB, bandwidth=100 * GB))
    unit = ComputeUnit(name="chip", tier="near", matrix_peak=1e6 * TFLOPS, vector_peak=1e6 * TFLOPS)
    for speed, expected in (
        (50, ("link far to near bandwidth",)),
        (200, ("far bandwidth",)),
        (100, ("far bandwidth", "link far to near bandwidth")),
    ):
        link = Link(source="far", target="near", bandwidth=speed * GB)
        found = explain(mapping(replace(LLAMA, batch=8), System(name="streams", tiers=tiers, units=(unit,), links=(link,))))
        assert {bottleneck.resources for bottleneck in found.bottlenecks} == {expected}
        # One more of two that bind together saves nothing alone.
        assert (found.worth(expected[0]) > 0) == (len(expected) == 1)


def test_the_rates_of_a_cache_ratio_are_worth_its_whole_time():
    """T(k rates) = T / k, so the rates' values times their marginal worths add up to T (Euler); to the per mille that steps are finite."""
    problem = CacheRatioProblem.build(A100_SYSTEM, OPT)
    found = explain(problem, step=1e-3)
    total = sum(worth.now * worth.worth_ms for worth in found.worths if worth.unit != "GB")
    assert total * ms == pytest.approx(found.result.bound, rel=1e-3)


@given(problem=mapping_problems())
@settings(max_examples=15, deadline=None)
def test_a_full_memory_takes_nothing_more_and_one_that_is_not_does(problem):
    found = explain(problem)
    assume(found.feasible)
    for memory in found.memories:
        assert memory.held <= memory.capacity
        assert memory.full == (memory.held + memory.smallest > memory.capacity and memory.smallest < float("inf"))
    assert sum(bottleneck.seconds for bottleneck in found.bottlenecks) == pytest.approx(found.cost.latency, rel=1e-12)


@each_problem
def test_parts_add_up_to_the_step(build):
    found = explain(build())
    assert sum(bottleneck.seconds for bottleneck in found.bottlenecks) == pytest.approx(found.cost.latency, rel=1e-12)
    assert all(bottleneck.resources for bottleneck in found.bottlenecks)


def test_a_plan_that_is_given_is_explained_and_worths_stay_those_of_the_optimum():
    problem = mapping(LLAMA)
    plan = GreedyMapping().solve(problem).unwrap()
    given_one, best = explain(problem, plan), explain(problem)
    assert given_one.plan == plan
    assert given_one.cost.latency == problem.evaluate(plan).latency > best.cost.latency
    assert given_one.worths == best.worths
    by_greedy = explain(problem, solver=GreedyMapping())
    assert by_greedy.plan == plan
    assert {worth.of for worth in by_greedy.worths} == {"relaxation"}, "a heuristic proves nothing"


INFEASIBLE = {
    "mapping": (mapping(replace(GPT3, batch=256)), TableMapping()),
    "weights alone": (mapping(replace(GPT3, batch=2), H2M2_SYSTEM.with_tier("LPDDR", capacity=10 * GB)), TableMapping()),
    "cache ratio": (CacheRatioProblem.build(A100_SYSTEM, replace(OPT, batch=1024)), LpRatio()),
    "split": (RecomputeSplitProblem.build(A100_SYSTEM, OPT, weights="host"), ClosedFormSplit()),
    "split on the GPU": (RecomputeSplitProblem.build(A100_SYSTEM, replace(OPT, batch=32)), ClosedFormSplit()),
}


@pytest.mark.parametrize(("problem", "solver"), INFEASIBLE.values(), ids=INFEASIBLE)
def test_each_lever_alone_makes_it_fit_and_a_little_less_does_not(problem, solver):
    """Rebuilt and solved here; of capacity a little less is one part in a thousand of all bytes, of the batch and the context it is one."""
    found, kind = explain(problem), kind_of(problem)
    assert solver.solve(problem).plan is None
    assert not found.feasible
    assert found.levers

    def latency(system=problem.system, workload=problem.workload):
        return solver.solve(kind.rebuilt(problem, system, workload)).objective

    need = problem.workload.weight_bytes + problem.workload.state_bytes
    for lever in found.levers:
        if lever.needed is None:
            continue
        if lever.unit == "GB":
            name = lever.name.removesuffix(" capacity")
            # The amount is printed in GB, which rounds its last bit.
            assert latency(problem.system.with_tier(name, capacity=lever.needed * GB + 1)) == pytest.approx(lever.latency, rel=1e-9)
            assert latency(problem.system.with_tier(name, capacity=lever.needed * GB - 1e-3 * need)) is None
        else:
            field = lever.name.replace(" ", "_")
            assert latency(workload=replace(problem.workload, **{field: lever.needed})) == lever.latency
            if field in ("batch", "context"):
                assert latency(workload=replace(problem.workload, **{field: lever.needed + 1})) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A pattern solver that notes with which settings it was asked."""

    relative_gap: float = 1e-4
    time_limit: float | None = None
    asked: list[tuple[float, float | None]] = field(default_factory=list)
    only_infeasible: bool = False

    def solve(self, problem, /):
        self.asked.append((self.relative_gap, self.time_limit))
        if self.only_infeasible and len(self.asked) > 1:
            return SolverResult(solver="Noted", status=Status.UNKNOWN, message="out of time")
        return PatternMapping(relative_gap=self.relative_gap, time_limit=self.time_limit).solve(problem)


def test_levers_of_three_memories_are_verified_by_quick_solves():
    """A second and a per cent for each; the plans that they find are no better than the bound and at most that much worse."""
    problem = mapping(replace(LLAMA, batch=640, context=16384), H2M2_CXL_SYSTEM, grouped=False)
    noted = Noted()
    found, kind = explain(problem, solver=noted), kind_of(problem)
    assert noted.asked[0] == (1e-4, None)
    assert all(gap == LEVER_GAP and limit <= LEVER_SECONDS for gap, limit in noted.asked[1:])
    assert {"HBM capacity", "batch", "kv bits"} <= {lever.name for lever in found.levers} | set(found.unverified)
    for lever in found.levers:
        if lever.name == "batch":
            bound = kind.relaxed(kind.rebuilt(problem, problem.system, replace(problem.workload, batch=int(lever.needed)))).bound
            assert bound * (1 - 1e-9) <= lever.latency <= bound * (1 + 2 * LEVER_GAP)


def test_levers_for_which_the_time_is_too_short_are_named(monkeypatch):
    problem = mapping(replace(LLAMA, batch=640, context=16384), H2M2_CXL_SYSTEM, grouped=False)
    found = explain(problem, solver=Noted(only_infeasible=True))
    assert found.levers == ()
    assert {"HBM capacity", "batch", "kv bits"} <= set(found.unverified)
    assert "No plan was found within 5 s, and none is ruled out, with another: HBM capacity," in str(found)
    assert "No single change" not in str(found)
    noted = Noted()
    monkeypatch.setattr(sys.modules[explain.__module__], "SECONDS", -1.0)  # memsplit.dse.explain is the function
    assert set(found.unverified) <= set(explain(problem, solver=noted).unverified)
    assert len(noted.asked) == 1, "no solve once the time is over"


def test_levers_that_cannot_help_are_not_listed():
    """174 GB of weights do not fit into 106 GB at any batch or context; a GPU that is too small is not helped by its host."""
    alone = {lever.name for lever in explain(INFEASIBLE["weights alone"][0]).levers}
    assert {"HBM capacity", "LPDDR capacity", "weight bits"} == alone & {"HBM capacity", "LPDDR capacity", "weight bits"}
    assert not alone & {"batch", "context", "kv bits", "activation bits"}
    split = {lever.name for lever in explain(INFEASIBLE["split on the GPU"][0]).levers}
    assert "HBM capacity" in split
    assert "host capacity" not in split
    assert any("weights='host'" in name for name in split)


def test_slices_that_are_too_coarse_are_a_lever_of_their_own():
    """LPDDR is 0.13 GB short, HBM has 1 GB: enough for a slice of some layers, but too little for one of all 80."""
    problem = mapping(LLAMA, H2M2_SYSTEM.with_tier("HBM", capacity=1 * GB).with_tier("LPDDR", capacity=154.22 * GB))
    found = explain(problem)
    assert not found.feasible
    assert any("grouped=False" in lever.name for lever in found.levers)


def test_an_explanation_is_a_frozen_value_with_a_table_and_a_text():
    found = explain(mapping(LLAMA))
    with pytest.raises(FrozenInstanceError):
        found.subject = "other"
    assert pickle.loads(pickle.dumps(found)) == found
    frame = found.frame()
    assert frame["about"].value_counts().to_dict() == {"worth": 14, "time": 3, "memory": 2}
    assert frame[frame["about"] == "time"]["time_ms"].sum() * ms == pytest.approx(found.cost.latency, rel=1e-12)
    text = str(found)
    for part in (
        "bound by LPDDR bandwidth",
        "full: a slice of fc takes",
        "GB of HBM capacity (96 now)",
        "saves nothing of: LPDDR capacity",
    ):
        assert part in text
    lacking = explain(INFEASIBLE["mapping"][0])
    assert "batch" in str(lacking)
    assert set(lacking.frame()["about"]) == {"lever"}


def test_an_infinite_bandwidth_binds_nowhere_and_is_worth_nothing():
    system = H2M2_SYSTEM.with_tier("HBM", bandwidth=float("inf"))
    found = explain(mapping(LLAMA, system))
    assert found.worth("HBM bandwidth") == 0
    assert all("HBM bandwidth" not in bottleneck.resources for bottleneck in found.bottlenecks)


def test_at_a_context_of_nothing_attention_takes_no_time():
    found = explain(mapping(replace(LLAMA, context=0)))
    assert {b.seconds: b.resources for b in found.bottlenecks if b.part == "attention"} == {0.0: ()}


def coefficients():
    return KernelMappingProblem.from_slices([[1.0, 2.0]], [1], [1, 1], slices=2)


@pytest.mark.parametrize(
    ("problem", "settings", "sentence"),
    [
        (coefficients(), {}, "built from a System and a Workload"),
        (mapping(), {"step": 0}, "step must be above 0"),
        (mapping(), {"plan": "x"}, "plan must be a KernelMappingPlan, not 'x'; leave it out"),
        (mapping(), {"plan": LpRatio()}, "plan must be a KernelMappingPlan, not LpRatio"),
        (mapping(), {"plan": TableMapping().solve(mapping())}, "not SolverResult.*; hand over its .plan"),
        (mapping(), {"solver": "x"}, r"solver must be one of memsplit.solvers, as in solver=TableMapping\(\), not 'x'"),
        (mapping(), {"solver": TableMapping}, "solver must be one of memsplit.solvers"),
        (mapping(), {"step": float("nan")}, "step must be above 0"),
        (PlacementProblem.build(OPT_30B, prompt=512, generated=32, profile=FLEXGEN_T4), {}, "not a PlacementProblem"),
        (
            CacheRatioProblem.build(A100_SYSTEM, replace(OPT, batch=2), contexts=[100, 900]),
            {},
            "cannot build this CacheRatioProblem again",
        ),
    ],
    ids=[
        "coefficients",
        "no step",
        "a text as plan",
        "a solver as plan",
        "a result as plan",
        "a text",
        "a class",
        "NaN",
        "placement",
        "contexts",
    ],
)
def test_bad_input_is_one_sentence(problem, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        explain(problem, **settings)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="there is no dual for 'HBM bandwidth'; there is one for HBM capacity, LPDDR capacity"):
        explain(mapping(LLAMA)).worth("HBM bandwidth", "dual")
