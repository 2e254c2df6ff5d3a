"""The recompute split: exact solvers against enumeration, what memories hold, laws, degenerate cases and bad input."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from conformance import ExactCase, HeuristicCase, SolverCase, TimeLimitedExactCase, covered_solvers, public_solvers
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDING

from memsplit.models import Workload
from memsplit.models.offload import OffloadLayer, OffloadMachine
from memsplit.models.offload_profiles import KVPR_NOMINAL
from memsplit.models.presets import LLAMA2_70B, LLMS, OPT_6_7B, OPT_30B, SYSTEMS
from memsplit.models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, best_splits, split_generation
from memsplit.solvers import Status, _cpsat, _pulp
from memsplit.solvers._program import ProgramAnswer
from memsplit.solvers.recompute_split import ClosedFormSplit, CpSatSplit, EnumerationSplit, FixedShareSplit, MilpSplit, split_program

A100 = SYSTEMS["a100_pcie4"]
TEMPLATES = ("staged", "chunked", "fluid")
EXACT = (ClosedFormSplit(), EnumerationSplit(), MilpSplit(), CpSatSplit())


def served(llm=OPT_6_7B, batch: int = 8, context: int = 200, bits: float = 16) -> Workload:
    return Workload(llm=llm, batch=batch, context=context, weight_bits=bits, kv_bits=bits, activation_bits=bits)


def machine(**changes) -> OffloadMachine:
    rates = {"peak": 1e6, "gpu_bandwidth": 1e5, "host_bandwidth": 1e4, "to_device": 1e3, "to_host": 1e3, "cpu_peak": None}
    return OffloadMachine(**{"gpu": "GPU", "host": "host", **rates, "gpu_capacity": 1e9, "host_capacity": 1e9, **changes})


def random_problem(seed: int, *, tight: bool = False) -> RecomputeSplitProblem:
    """One to three classes of layers with times of all orders; ``tight``: the host has room for some of the activations."""
    rng = np.random.default_rng(seed)
    batch, act = int(rng.integers(1, 4)), float(rng.integers(1, 9))
    layers = []
    for _ in range(rng.integers(1, 4)):
        read = float(rng.integers(0, 500))
        layers.append(
            OffloadLayer(
                layers=int(rng.integers(1, 5)),
                batch=batch,
                weight_bytes=read,
                read_bytes=read,
                sent_bytes=read * rng.uniform(1, 1.5),
                projection_bytes=read * rng.uniform(0, 1),
                linear_flops=float(rng.choice([0, 1e3, 1e5])),
                kv_bytes=float(rng.integers(1, 16)),
                act_bytes=act,
                recompute_flops=float(rng.choice([0, 10, 1e3, 1e4])) * rng.uniform(0.5, 2),
                attention_flops=float(rng.choice([0, 100])),
            )
        )
    context = int(rng.integers(0, 13))
    problem = RecomputeSplitProblem(
        layers=tuple(layers),
        machine=machine(),
        context=context,
        most=int(rng.integers(0, context + 1)) if rng.random() < 0.4 else context,
        template=TEMPLATES[rng.integers(3)],
        chunks=int(rng.integers(1, 4)),
        weights=("gpu", "host")[rng.integers(2)],
        batches=int(rng.integers(1, 4)),
    )
    if tight:
        wanted = problem.requests * act * problem.most * sum(layer.layers for layer in layers)
        problem = replace(problem, machine=machine(host_capacity=problem.host_bytes + float(np.floor(rng.uniform(-0.1, 0.8) * wanted))))
    return problem


def enumerated(problem: RecomputeSplitProblem) -> float:
    """Seconds of the best of all plans that fit, by ``evaluate`` alone; inf if none does."""
    plans = itertools.product(range(problem.most + 1), repeat=len(problem.layers))
    costs = (problem.evaluate(RecomputeSplitPlan(splits=splits)) for splits in plans)
    return min((cost.latency for cost in costs if cost.fits), default=math.inf)


def check_against_enumeration(problem: RecomputeSplitProblem, solvers) -> None:
    optimum = enumerated(problem)
    for solver in solvers:
        result = solver.solve(problem)
        if math.isinf(optimum):
            assert result.status is Status.INFEASIBLE
            continue
        assert result.status is Status.OPTIMAL
        # Within what the solver was asked for, and sums in another order.
        assert result.objective <= optimum * (1 + getattr(solver, "relative_gap", 0.0) + ROUNDING)
        assert result.bound <= optimum * (1 + ROUNDING)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_closed_form_and_enumeration_find_the_best_plan(seed: int, tight: bool):
    check_against_enumeration(random_problem(seed, tight=tight), (ClosedFormSplit(), EnumerationSplit()))


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_integer_programs_find_the_best_plan(seed: int, tight: bool):
    check_against_enumeration(random_problem(100 + seed, tight=tight), (MilpSplit(), CpSatSplit()))


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_programs_alone_find_the_best_plan(seed: int, tight: bool):
    """Without the closed form's plan, which the solvers begin with: a wrong formulation would hide behind it."""
    problem = random_problem(100 + seed, tight=tight)
    optimum, classes = enumerated(problem), len(problem.layers)
    unit = problem.evaluate(RecomputeSplitPlan(splits=(0,) * classes)).latency
    if not problem.possible or unit == 0:
        assert math.isinf(optimum) or optimum == 0
        return
    program = split_program(problem, unit)
    for answer in (
        _pulp.solve_program(program, relative_gap=1e-6, time_limit=None),
        _cpsat.solve_program(program, relative_gap=1e-6, scale=optimum / unit or 1.0, time_limit=None, threads=1, seed=0),
    ):
        plan = RecomputeSplitPlan(splits=tuple(int(value) for value in answer.values[:classes]))
        assert problem.evaluate(plan).fits
        assert optimum * (1 - ROUNDING) <= problem.evaluate(plan).latency <= optimum * (1 + 1e-6 + ROUNDING)


@pytest.mark.parametrize("limit", [1e-9, 1e-3])
@pytest.mark.parametrize("solver", [MilpSplit, CpSatSplit])
def test_no_time_at_all_still_gives_a_plan(solver, limit: float):
    """The closed form's; what is not proven is said."""
    for seed in range(5):
        problem = random_problem(seed)
        result = solver(time_limit=limit).solve(problem)
        assert result.objective == pytest.approx(enumerated(problem), rel=1e-6)  # the better of two plans within the gap asked for
        assert result.bound is None or result.bound <= result.objective
        assert (result.status is Status.OPTIMAL) == (result.message == "")
        if result.message:
            assert f"{limit:g} s" in result.message


def test_nothing_proven_is_said(monkeypatch):
    """A solver that finds nothing in its time leaves the plan to begin with, the relaxation's bound, and a message."""
    problem = next(problem for problem in map(random_problem, range(100)) if any(ClosedFormSplit().solve(problem).plan.splits))
    monkeypatch.setattr(_pulp, "solve_program", lambda *_, **__: ProgramAnswer())
    result = MilpSplit(time_limit=1.0, relative_gap=0.0).solve(problem)
    assert result.plan == ClosedFormSplit().solve(problem).plan
    assert result.bound <= result.objective
    assert result.status is Status.OPTIMAL or "not proven" in result.message


def test_the_random_problems_cover_what_they_should():
    """Full hosts that change the plan, hosts that hold nothing, several classes: without them the tests above say little."""
    tight = [random_problem(seed, tight=True) for seed in range(60)]
    free = [replace(problem, machine=machine()) for problem in tight]
    found = [ClosedFormSplit().solve(problem) for problem in tight]
    best = [ClosedFormSplit().solve(problem) for problem in free]
    changed = [a.plan != b.plan and len(p.layers) > 1 for a, b, p in zip(found, best, tight, strict=True) if a.plan]
    assert sum(changed) >= 5
    assert sum(result.status is Status.INFEASIBLE for result in found) >= 3


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("llm", [OPT_6_7B, LLAMA2_70B, LLMS["deepseek-v3"]], ids=lambda llm: llm.name)
def test_all_exact_solvers_agree_on_llms(llm, template: str):
    """MHA (recomputing pays), GQA (r = 4) and MLA with two classes of layers (r = 12): it never pays there."""
    roomy = A100.with_tier("host", capacity=4e12).with_tier("HBM", capacity=100e9)
    problem = RecomputeSplitProblem.build(roomy, served(llm), template=template, weights="host", batches=4)
    results = [solver.solve(problem) for solver in EXACT]
    best = min(result.objective for result in results)
    for result in results:
        assert result.status is Status.OPTIMAL
        assert result.objective == pytest.approx(best, rel=1e-6)  # the gap that the integer programs were asked for
    pays = all(ratios.act_pays for ratios in problem.ratios)
    assert pays == (llm is OPT_6_7B)
    assert any(results[0].plan.splits) == pays


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(1.0, 4.0))
def test_faster_links_gpus_and_more_memory_never_hurt(seed: int, factor: float):
    problem = random_problem(seed, tight=True)
    before = ClosedFormSplit().solve(problem)
    for field in ("to_device", "peak", "gpu_bandwidth", "host_capacity", "gpu_capacity"):
        better = replace(problem.machine, **{field: getattr(problem.machine, field) * factor})
        after = ClosedFormSplit().solve(replace(problem, machine=better))
        if before.plan is not None:
            assert after.objective <= before.objective * (1 + ROUNDING)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_no_plan_is_shorter_than_its_work(seed: int):
    """The busy time of link and GPU, weights included."""
    problem = random_problem(seed)
    for split in range(problem.most + 1):
        cost = problem.evaluate(RecomputeSplitPlan(splits=(split,) * len(problem.layers)))
        assert cost.latency >= max(cost.link_time, cost.gpu_time) * (1 - ROUNDING)
        assert cost.to_device_bytes == pytest.approx(cost.link_time * problem.machine.to_device, rel=ROUNDING)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_arrays_of_contexts_give_what_single_contexts_give(seed: int):
    problem = random_problem(seed)
    contexts = np.array([[0, 1, 7], [12, 50, 513]])
    splits, seconds = best_splits(problem, contexts)
    for place in np.ndindex(contexts.shape):
        context = int(contexts[place])
        one, single = best_splits(replace(problem, context=context, most=context))
        assert splits[(slice(None), *place)].tolist() == one.tolist()
        assert seconds[place] == single


def test_bytes_are_those_of_the_tensors():
    """OPT-6.7B, 2 x 3 requests of 10 tokens: 32 layers, h = 4096, 16 bits; KV 2 h a token, activation h, weights 12 h^2; 50,272 tokens."""
    h, layers, tokens = 4096, 32, 2 * 3 * 10
    embeddings = 50272 * h * 2
    plan = RecomputeSplitPlan(splits=(4,))
    resident = RecomputeSplitProblem.build(A100, served(batch=3, context=10), batches=2).evaluate(plan)
    assert resident.tier_names == ("HBM", "host")
    assert resident.tier_bytes[1] == layers * 2 * (tokens * 2 * h + 6 * 4 * h)
    assert resident.tier_bytes[0] == embeddings + layers * 12 * h * h * 2 + 2 * 3 * 10 * 2 * h * 2
    # The link carries 4 tokens as activations and 6 as keys and values; sums of floats in another order.
    assert resident.to_device_bytes == pytest.approx(layers * 2 * 6 * (4 * h + 6 * 2 * h), rel=ROUNDING)
    streamed = RecomputeSplitProblem.build(A100, served(batch=3, context=10), batches=2, weights="host").evaluate(plan)
    assert streamed.tier_bytes[0] == embeddings + 2 * 12 * h * h * 2 + 2 * 3 * 10 * 2 * h * 2
    assert streamed.tier_bytes[1] == resident.tier_bytes[1] + layers * 12 * h * h * 2
    assert streamed.to_device_bytes - resident.to_device_bytes == pytest.approx(layers * 12 * h * h * 2, rel=ROUNDING)


def test_a_host_that_is_exactly_full_is_not_too_small():
    """Room for the activations of 5 tokens in all 32 layers: 5 fit, 6 do not, and with one byte less 4."""
    problem = RecomputeSplitProblem.build(A100, served(batch=32, context=100))
    capacity = problem.host_bytes + 32 * 32 * 5 * problem.layers[0].act_bytes
    for missing, split in ((0, 5), (1, 4)):
        full = replace(problem, machine=replace(problem.machine, host_capacity=capacity - missing))
        for solver in EXACT:
            assert solver.solve(full).unwrap().splits == (split,)
    assert not full.evaluate(RecomputeSplitPlan(splits=(5,))).fits


def test_what_is_said_of_a_gpu_that_is_too_small_helps():
    """OPT-30B's 62 GB do not fit into 40 GB: with the bits that are proposed they do, and when they stream."""
    problem = RecomputeSplitProblem.build(A100, served(OPT_30B))
    result = ClosedFormSplit().solve(problem)
    assert result.status is Status.INFEASIBLE
    need, room = problem.gpu_bytes / 1e9, 40.0
    assert f"HBM needs {need:.6g} GB and holds 40 GB" in result.message
    more = float(result.message.split("enlarge HBM by ")[1].split(" GB")[0])
    assert need - room <= more <= need - room + 0.1  # rounded up to three digits
    bits = float(result.message.split(" bits a weight")[0].rsplit(" ", 1)[1])
    assert ClosedFormSplit().solve(RecomputeSplitProblem.build(A100, served(OPT_30B, bits=bits))).plan is not None
    assert "weights='host'" in result.message
    assert ClosedFormSplit().solve(RecomputeSplitProblem.build(A100, served(OPT_30B), weights="host")).plan is not None


def test_what_is_said_of_a_host_that_is_too_small_helps():
    """The batch that is proposed fits, and one request more does not."""
    result = ClosedFormSplit().solve(RecomputeSplitProblem.build(A100, served(batch=64, context=4000), batches=8))
    batch = int(result.message.split("GPU batches of ")[1].split(" ")[0])
    assert 1 <= batch < 64
    for requests, status in ((batch, Status.OPTIMAL), (batch + 1, Status.INFEASIBLE)):
        fewer = RecomputeSplitProblem.build(A100, served(batch=requests, context=4000), batches=8)
        assert ClosedFormSplit().solve(fewer).status is status
    assert RecomputeSplitProblem.build(A100, served()).explain_infeasible() == "a plan without recomputation fits"


@pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
def test_without_a_context_there_is_nothing_to_split(solver):
    problem = RecomputeSplitProblem.build(A100, served(context=0))
    assert solver.solve(problem).unwrap().splits == (0,)
    with pytest.raises(ValueError, match="at least one token"):
        _ = problem.ratios


@pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
def test_an_infinitely_fast_link_leaves_nothing_to_recompute(solver):
    """Recomputation then only adds to the GPU's work; a GPU without limits takes no time either, and every split ties."""
    problem = RecomputeSplitProblem.build(A100, served())
    fast = replace(problem, machine=replace(problem.machine, to_device=math.inf))
    assert solver.solve(fast).unwrap().splits == (0,)
    timeless = replace(fast, machine=replace(fast.machine, peak=math.inf, gpu_bandwidth=math.inf))
    result = solver.solve(timeless)
    assert (result.objective, result.plan) == (0.0, RecomputeSplitPlan(splits=(0,)))


@pytest.mark.parametrize("solver", EXACT, ids=lambda solver: type(solver).__name__)
def test_an_infinitely_fast_gpu_recomputes_all(solver):
    problem = RecomputeSplitProblem.build(A100, served(context=50))
    fast = replace(problem, machine=replace(problem.machine, peak=math.inf, gpu_bandwidth=math.inf))
    assert solver.solve(fast).unwrap().splits == (50,)


def test_hosts_of_any_size_are_taken():
    problem = RecomputeSplitProblem.build(A100, served())
    endless = replace(problem, machine=replace(problem.machine, host_capacity=math.inf))
    assert ClosedFormSplit().solve(endless).plan == ClosedFormSplit().solve(problem).plan
    small = replace(endless, machine=replace(endless.machine, gpu_capacity=1e9))
    assert "HBM" in ClosedFormSplit().solve(small).message


@pytest.mark.parametrize(("share", "most", "split"), [(0.0, 200, 0), (1.0, 200, 200), (1.0, 30, 30), (0.499, 200, 99), (0.2, 30, 30)])
def test_a_fixed_share_is_rounded_down_and_limited(share: float, most: int, split: int):
    problem = RecomputeSplitProblem.build(A100, served(context=200), most=most)
    assert FixedShareSplit(share).solve(problem).unwrap().splits == (split,)


def test_a_generation_is_the_sum_of_its_steps():
    """Each step at its own context, one token longer than the last; what is recomputed ends at the prompt or does not."""
    problem = RecomputeSplitProblem.build(A100, served(context=20), weights="host", batches=2, profile=KVPR_NOMINAL)
    for limit in ("prompt", "total"):
        steps = [
            RecomputeSplitProblem.build(
                A100, served(context=s), weights="host", batches=2, profile=KVPR_NOMINAL, most=20 if limit == "prompt" else s
            )
            for s in range(20, 27)
        ]
        found = split_generation(problem, generated=7, limit=limit)
        for share, seconds in ((0.0, found.transfer), (1.0, found.recompute)):
            assert seconds == pytest.approx(sum(FixedShareSplit(share).solve(step).objective for step in steps), rel=ROUNDING)
        assert found.best == pytest.approx(sum(EnumerationSplit().solve(step).objective for step in steps), rel=ROUNDING)
        assert found.best <= min(found.transfer, found.recompute)
        assert found.gain == found.transfer / found.best - 1
        assert found.cut == 1 - found.best / found.transfer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"most": 201}, "most must be at most the context, 200"),
        ({"most": -1}, "most must be a whole number"),
        ({"template": "eager"}, "'staged', 'chunked' or 'fluid'"),
        ({"weights": "disk"}, "'gpu' or on 'host'"),
        ({"chunks": 0}, "chunks"),
        ({"batches": 0}, "batches"),
    ],
)
def test_bad_problems_are_refused_in_one_sentence(settings, message: str):
    with pytest.raises(ValueError, match=message) as refusal:
        RecomputeSplitProblem.build(A100, served(), **settings)
    assert "\n" not in str(refusal.value)


def test_layers_that_do_not_belong_together_are_refused():
    problem = random_problem(0)
    (layer, *_) = problem.layers
    with pytest.raises(ValueError, match="same batch and act_bytes"):
        replace(problem, layers=(layer, replace(layer, batch=layer.batch + 1)))
    with pytest.raises(ValueError, match="at least one"):
        replace(problem, layers=())
    with pytest.raises(ValueError, match="projection_bytes are part of read_bytes"):
        replace(problem, layers=(replace(layer, projection_bytes=layer.read_bytes + 1),))


def test_plans_of_other_problems_are_refused():
    problem = RecomputeSplitProblem.build(A100, served(), most=100)
    with pytest.raises(ValueError, match="recomputes 101 tokens"):
        problem.evaluate(RecomputeSplitPlan(splits=(101,)))
    with pytest.raises(ValueError, match="another problem"):
        problem.evaluate(RecomputeSplitPlan(splits=(1, 1)))
    for split in (-1, 0.5):
        with pytest.raises(ValueError, match="whole number of tokens"):
            RecomputeSplitPlan(splits=(split,))


def test_bad_arguments_of_functions_are_refused():
    problem = RecomputeSplitProblem.build(A100, served())
    for contexts, most, message in (([1.5], None, "contexts"), ([-1], None, "contexts"), ([5], [6], "most"), ([5], [-1], "most")):
        with pytest.raises(ValueError, match=message):
            best_splits(problem, contexts, most)
    with pytest.raises(ValueError, match="generated"):
        split_generation(problem, generated=0)
    with pytest.raises(ValueError, match="limit must be"):
        split_generation(problem, generated=1, limit="half")


def test_too_many_combinations_are_refused_with_a_way_out():
    """Four classes that compete for the host's memory; without the limit each is solved by itself."""
    (layer,) = RecomputeSplitProblem.build(A100, served(context=1000)).layers
    layers = tuple(replace(layer, layers=depth) for depth in (1, 2, 3, 4))
    problem = RecomputeSplitProblem(
        layers=layers,
        machine=machine(to_device=1e9, peak=1e13, gpu_bandwidth=1e12, gpu_capacity=1e15, host_capacity=1e15),
        context=1000,
        most=1000,
    )
    assert ClosedFormSplit().solve(problem).plan == EnumerationSplit().solve(problem).plan
    full = replace(problem, machine=replace(problem.machine, host_capacity=problem.host_bytes + 1e6))
    for solver in (ClosedFormSplit(), EnumerationSplit()):
        with pytest.raises(ValueError, match="use MilpSplit or CpSatSplit"):
            solver.solve(full)
    assert MilpSplit().solve(full).status is Status.OPTIMAL


EASY = RecomputeSplitProblem.build(A100, served(batch=64, context=60), template="chunked")
IMPOSSIBLE = RecomputeSplitProblem.build(A100, served(OPT_30B))
SEVERAL = next(problem for problem in map(random_problem, range(100)) if len(problem.layers) == 3 and problem.most > 8)


class TestClosedFormSplit(ExactCase):
    solver, problem, impossible = ClosedFormSplit(), EASY, IMPOSSIBLE


class TestEnumerationSplit(ExactCase):
    solver, problem, impossible = EnumerationSplit(), EASY, IMPOSSIBLE


class TestMilpSplit(TimeLimitedExactCase):
    solver, problem, impossible, hard = MilpSplit(), EASY, IMPOSSIBLE, SEVERAL


class TestCpSatSplit(TimeLimitedExactCase):
    solver, problem, impossible, hard = CpSatSplit(), EASY, IMPOSSIBLE, SEVERAL
    bad_settings = (*TimeLimitedExactCase.bad_settings, {"threads": 0})


class TestFixedShareSplit(HeuristicCase):
    solver, problem, impossible = FixedShareSplit(0.5), EASY, IMPOSSIBLE
    optimum = enumerated(EASY)
    bad_settings = ({"share": -0.1}, {"share": 1.1}, {"share": math.nan})


def test_every_public_solver_is_held_to_the_conformance_cases():
    assert public_solvers("recompute_split") <= covered_solvers(SolverCase)
