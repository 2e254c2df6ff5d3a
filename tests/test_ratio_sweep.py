"""Cache ratios of many designs at once: the proven bound against enumeration, every row against its single problem, laws and bad input."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memsplit.solvers.cache_ratio_batch as solver_module
from memsplit.dse.ratio_sweep import RatioSweep
from memsplit.dse.split_sweep import SplitSweep
from memsplit.dse.sweep import sweep
from memsplit.models import Workload
from memsplit.models.cache_ratio import CacheRatioPlan, CacheRatioProblem, LinearTime, RatioLayer
from memsplit.models.offload import OffloadMachine
from memsplit.models.offload_batch import CacheRatioBatch, OffloadDesigns
from memsplit.models.offload_profiles import HYBRIDSERVE_PAPER
from memsplit.models.presets import DEEPSEEK_V3, GEMMA_7B, LLAMA3_1_8B, OPT_6_7B, OPT_30B, SYSTEMS
from memsplit.models.profiles import FIRST_PRINCIPLES
from memsplit.models.systems import Systems
from memsplit.models.units import GB
from memsplit.solvers.cache_ratio import EnumerationRatio, LpRatio
from memsplit.solvers.cache_ratio_batch import solve_ratios

RTX = SYSTEMS["rtx4090_pcie4"]
COUNTS = ("kv_gpu", "act_gpu", "kv_host", "act_host")
RATES = (
    "GDDR6X_bandwidth_TBps",
    "RTX 4090_matrix_peak_TFLOPps",
    "host_bandwidth_GBps",
    "host_to_GDDR6X_bandwidth_GBps",
    "GDDR6X_to_host_bandwidth_GBps",
)
CAPACITIES = ("GDDR6X_capacity_GB", "host_capacity_GB")
SUMS = 1e-12
"""Relative difference of equal sums in another order."""


def served(llm=OPT_30B, **changes) -> Workload:
    return Workload(llm=llm, **({"batch": 8, "context": 500, "weight_bits": 16, "kv_bits": 16, "activation_bits": 16} | changes))


def score(llm=OPT_30B, **changes) -> RatioSweep:
    return RatioSweep(system=RTX, workload=served(llm), **changes)


def table(designs: int, seed: int = 0, *, host: float = 0.0) -> dict[str, np.ndarray]:
    """Machines of all kinds around an RTX 4090, among them some with too small a GPU or host."""
    rng = np.random.default_rng(seed)
    low_high = {
        "GDDR6X_capacity_GB": (4, 80),
        "GDDR6X_bandwidth_TBps": (0.3, 4),
        "RTX 4090_matrix_peak_TFLOPps": (20, 2000),
        "host_capacity_GB": (40 + host, 900 + host),
        "host_bandwidth_GBps": (20, 300),
        "host_to_GDDR6X_bandwidth_GBps": (10, 400),
        "GDDR6X_to_host_bandwidth_GBps": (0.1, 100),
    }
    columns = {name: rng.uniform(low, high, designs) for name, (low, high) in low_high.items()}
    return columns | {"batch": rng.integers(1, 300, designs), "context": rng.integers(0, 3000, designs)}


def rows(columns):
    return [{name: column[row] for name, column in columns.items()} for row in range(len(next(iter(columns.values()))))]


def random_problem(rng: np.random.Generator, classes: int, *, proportional: bool = True) -> CacheRatioProblem:
    """Up to 40 blocks, either memory too small or large, r on both sides of 1, stores that sometimes bind."""
    blocks, kv, act = int(rng.integers(0, 40)), int(rng.integers(1, 9)), int(rng.integers(1, 9))
    layers = []
    for index in range(classes):
        load, store = rng.choice([0.0, 0.05, 0.2]) * rng.uniform(0.05, 0.25), rng.uniform(0, 0.03)
        other = np.ones(2) if proportional else rng.uniform(0.3, 2, 2)
        layers.append(
            RatioLayer(
                layers=index + 2,
                weights=rng.uniform(0, 1),
                compute=rng.uniform(0, 1),
                load_kv=LinearTime(slope=load * kv),
                load_act=LinearTime(slope=load * act * other[0]),
                generate=LinearTime(slope=rng.choice([0.0, 0.05, 0.2]) * rng.uniform(0.2, 1)),
                store_kv=store * kv,
                store_act=store * act * other[1],
            )
        )
    return CacheRatioProblem(
        layers=tuple(layers),
        request_blocks=(blocks,),
        kv_block=kv,
        act_block=act,
        gpu_capacity=int(rng.integers(0, 5 * blocks + 2)),
        host_capacity=int(rng.integers(0, 7 * blocks + 2)),
    )


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_bounds_are_below_the_optimum_and_plans_reach_it(classes: int, proportional: bool):
    """Against enumeration. Where times are in proportion to bytes, as on any machine, the plan is the optimum; else the bound holds."""
    rng = np.random.default_rng(classes)
    problems = [random_problem(rng, classes, proportional=proportional) for _ in range(250)]
    found = solve_ratios(CacheRatioBatch.of(problems))
    optima = [EnumerationRatio().solve(problem).objective for problem in problems]
    assert 20 < sum(optimum is None for optimum in optima) < 200
    for row, (problem, optimum) in enumerate(zip(problems, optima, strict=True)):
        assert found.feasible[row] == (optimum is not None)
        if optimum is None:
            assert np.isinf(found.latency[row])
            continue
        plan = CacheRatioPlan(**{name: int(getattr(found, name)[row]) for name in COUNTS})
        cost = problem.evaluate(plan)
        assert cost.fits
        assert cost.latency == found.latency[row]
        assert found.bound[row] <= optimum
        if proportional:
            assert found.latency[row] <= optimum * (1 + SUMS)


def test_a_whole_period_of_empty_bytes_is_looked_at():
    """Sizes of up to 63 units, whose periods are up to 63: with seven counts from each end six of these plans were up to 6 % slower."""
    rng = np.random.default_rng(64)
    problems = []
    for _ in range(250):
        blocks, kv, act = int(rng.integers(0, 120)), int(rng.integers(1, 64)), int(rng.integers(1, 64))
        load, store = rng.choice([0.05, 0.2]) * rng.uniform(0.05, 0.25), rng.uniform(0, 0.03)
        generate = rng.choice([0.0, 0.05, 0.2]) * rng.uniform(0.2, 1) * 8
        layer = RatioLayer(
            layers=2,
            weights=rng.uniform(0, 1),
            compute=rng.uniform(0, 1),
            load_kv=LinearTime(slope=load * kv),
            load_act=LinearTime(slope=load * act),
            generate=LinearTime(slope=generate),
            store_kv=store * kv,
            store_act=store * act,
        )
        gpu, host = int(rng.integers(0, 38 * blocks + 2)), int(rng.integers(0, 64 * blocks + 2))
        problems.append(
            CacheRatioProblem(layers=(layer,), request_blocks=(blocks,), kv_block=kv, act_block=act, gpu_capacity=gpu, host_capacity=host)
        )
    found = solve_ratios(CacheRatioBatch.of(problems))
    optima = [EnumerationRatio().solve(problem).objective for problem in problems]
    assert sum(optimum is not None for optimum in optima) > 150
    for row, optimum in enumerate(optima):
        if optimum is not None:
            assert found.bound[row] <= optimum
            assert found.latency[row] <= optimum * (1 + SUMS)
    for row in range(0, 250, 9):  # a longer reach of those beside it changes no plan
        alone = solve_ratios(CacheRatioBatch.of(problems[row : row + 1]))
        assert [getattr(alone, name)[0] for name in (*COUNTS, "latency")] == [getattr(found, name)[row] for name in (*COUNTS, "latency")]


CASES = {
    "opt-30b": (score(), 0.0),
    "paper's profile": (score(OPT_6_7B, profile=HYBRIDSERVE_PAPER, buffered_requests=4), 0.0),
    "nine GPU batches": (score(OPT_6_7B, batches=9), 0.0),
    "weights on the GPU": (score(OPT_6_7B, weights="gpu", block=7), 0.0),
    "blocks of 8 to 3": (score(GEMMA_7B), 0.0),
    "larger activations": (score(LLAMA3_1_8B), 0.0),
    "odd bits": (RatioSweep(system=RTX, workload=served(OPT_6_7B, kv_bits=4.3, activation_bits=3.7), block=1), 0.0),
    "two classes of layers, experts": (score(DEEPSEEK_V3), 1300.0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_that_of_its_single_problem(case: str):
    """Bit for bit: the plan's latency, ratios, headroom, price; as good as LpRatio, within its gap of a bound at least as high."""
    sweeper, host = CASES[case]
    columns = table(40, seed=sum(map(ord, case)), host=host)
    found = sweeper(columns)
    assert found["feasible"].sum() >= 5
    for row, design in enumerate(rows(columns)):
        system, workload = sweeper.design(design | {"latency_s": 1.0, "GDDR6X_headroom_GB": 2.0})
        named = {name: value for name, value in sweeper.settings().items() if name not in ("system", "workload")}
        problem = CacheRatioProblem.build(system, workload, **named)
        assert found["memory_usd"][row] == system.memory_cost
        if problem.blocks:
            ratios = problem.ratios
            assert [found[name][row] for name in ("r", "rho", "w", "c")] == [ratios.r, ratios.rho, ratios.w, ratios.c]
        assert found["feasible"][row] == problem.possible == (found["reason"][row] == "")
        if not problem.possible:
            assert min(found["GDDR6X_headroom_GB"][row], found["host_headroom_GB"][row]) < 0
            assert np.isnan(found["latency_s"][row])
            continue
        plan = CacheRatioPlan(**{name: int(found[f"{name}_blocks"][row]) for name in COUNTS})
        cost = problem.evaluate(plan)
        assert cost.fits
        assert cost.latency == found["latency_s"][row]
        assert plan.act_share == found["act_share"][row]
        assert found["throughput_tok_per_s"][row] == len(problem.request_blocks) / cost.latency
        left = [(room - held) / GB for room, held in zip(cost.capacity, cost.tier_bytes, strict=True)]
        assert [found["GDDR6X_headroom_GB"][row], found["host_headroom_GB"][row]] == left
        if row < 10:
            relaxed = LpRatio().solve(problem)
            assert found["latency_s"][row] <= relaxed.objective * (1 + LpRatio().relative_gap)
            assert found["bound_s"][row] >= relaxed.bound * (1 - 1e-11)  # both are lowered by some 1e-12, for rounding
        if problem.blocks > 5000:
            assert found["gap"][row] <= LpRatio().relative_gap


def test_a_batch_is_the_loop_of_its_singles(monkeypatch):
    """Bit for bit, whatever is solved at once."""
    columns = table(53, seed=3)
    whole = score()(columns)
    singles = [score()({name: np.array([value]) for name, value in design.items()}) for design in rows(columns)]
    monkeypatch.setattr(solver_module, "AT_ONCE", 7)
    cut = score()(columns)
    for name, column in whole.items():
        np.testing.assert_array_equal(column, np.concatenate([single[name] for single in singles]))
        np.testing.assert_array_equal(column, cut[name])


def test_machines_as_arrays_are_the_machines():
    """``OffloadMachine.build`` of Systems has, in each row, the numbers of the single machine."""
    columns = {name: column for name, column in table(20).items() if name not in ("batch", "context")}
    systems = Systems.from_columns(RTX, columns | {"host_to_GDDR6X_efficiency": np.linspace(0.1, 1, 20)})
    machine = OffloadMachine.build(systems, HYBRIDSERVE_PAPER)
    for row in range(20):
        single = OffloadMachine.build(systems[row], HYBRIDSERVE_PAPER)
        for name in OffloadMachine.__slots__:
            value = getattr(machine, name)
            assert getattr(single, name) == (value[row] if np.ndim(value) else value)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(RATES + CAPACITIES), factor=st.floats(1.0, 8.0))
def test_more_is_never_slower(seed: int, name: str, factor: float):
    """Every old plan stays and takes no longer, so the new bound, and the new plan within its gap, is at most the old latency."""
    columns = table(30, seed)
    old, new = score(GEMMA_7B)(columns), score(GEMMA_7B)(columns | {name: columns[name] * factor})
    kept = old["feasible"]
    assert new["feasible"][kept].all()
    assert (new["latency_s"][kept] * (1 - new["gap"][kept]) <= old["latency_s"][kept] * (1 + SUMS)).all()


def test_halved_rates_double_every_time():
    """By a power of two, so to the last bit; the plans stay."""
    columns = table(60, seed=9)
    old, new = score()(columns), score()(columns | {name: columns[name] / 2 for name in RATES})
    np.testing.assert_array_equal(new["latency_s"], 2 * old["latency_s"])
    np.testing.assert_array_equal(new["bound_s"], 2 * old["bound_s"])
    for name in (*(f"{count}_blocks" for count in COUNTS), "r", "rho", "w", "c", "gap"):
        np.testing.assert_array_equal(new[name], old[name])


def test_a_link_without_limits_and_no_state():
    """Nothing takes time on the link, then nothing is on it: the ratios are unknown, and the step is that of the GPU or of the weights."""
    fast = replace(
        RTX,
        tiers=tuple(replace(tier, bandwidth=np.inf) for tier in RTX.tiers),
        links=tuple(replace(link, bandwidth=np.inf) for link in RTX.links),
    )
    found = RatioSweep(system=fast, workload=served())({"context": [0, 100]})
    assert np.isnan(found["r"]).all()
    assert found["act_share"].tolist() == [0.0, 0.0]
    assert (found["gap"] < 1e-11).all()  # the bound is lowered by 4e-12 for rounding
    empty = score()({"context": [0]})
    problem = CacheRatioProblem.build(RTX, served(context=0))
    assert empty["latency_s"][0] == problem.evaluate(CacheRatioPlan()).latency
    assert empty["feasible"][0]


def test_reasons_name_the_memory():
    """One phrase for each: a GPU too small for what stays there, a host for the weights, both for the state."""
    columns = {"GDDR6X_capacity_GB": [0.0, 24.0, 24.0, 24.0], "host_capacity_GB": [900.0, 1.0, 61.0, 900.0], "batch": [8, 8, 300, 8]}
    found = score()(columns)
    assert found["feasible"].tolist() == [False, False, False, True]
    assert "GDDR6X" in found["reason"][0]
    assert "weights exceed host" in found["reason"][1]
    assert "state does not fit" in found["reason"][2]
    assert found["reason"][3] == ""


def test_a_row_with_endless_state_is_infeasible_and_the_others_are_priced():
    """More tokens or bytes than are counted exactly: no machine holds them, and the rest of the table is as without them."""
    columns = {"batch": [8, 2**30, 2**22, 2**31 - 1, 8], "context": [500, 2**30, 2**29, 2**31 - 1, 300], "host_capacity_GB": [900.0] * 5}
    for sweeper in (score(), score(batches=2), SplitSweep(system=RTX, workload=served(), weights="host")):
        found = sweeper(columns)
        assert found["feasible"].tolist() == [True, False, False, False, True]
        assert set(found["reason"][1:4]) == {"the state of all requests is beyond 2**60 bytes or 2**53 tokens"}
        assert np.isfinite(found["system_usd"]).all()
        fine = sweeper({name: [column[0], column[4]] for name, column in columns.items()})
        for name, column in found.items():
            np.testing.assert_array_equal(column[[0, 4]], fine[name], err_msg=name)
            if column.dtype == np.float64 and not name.endswith(("_usd", "_mm2")):
                assert np.isnan(column[1:4]).all(), name
        with pytest.raises(ValueError, match=r"beyond 2\*\*60 bytes .* lower batch or context"):
            replace(sweeper, workload=served(batch=2**30, context=2**30))


def test_unlimited_memory_is_never_slower():
    found = score()({"host_capacity_GB": [900.0, 1e10, 1e200], "GDDR6X_capacity_GB": [24.0, 24.0, 24.0]})
    assert found["feasible"].all()
    assert (np.diff(found["latency_s"]) <= 0).all()


def test_prices_of_units_are_counted():
    """A column that is taken changes a result."""
    found = score()({"RTX 4090_cost_USD": [1000.0, 3000.0]})
    assert found["system_usd"][1] == found["system_usd"][0] + 2000
    assert (found["memory_usd"] < found["system_usd"]).all()


@pytest.mark.parametrize("sweeper", [RatioSweep, SplitSweep])
def test_check_refuses_what_a_call_refuses(sweeper):
    one = sweeper(system=RTX, workload=served())
    assert one.check({"host_capacity_GB": [96.0], "batch": [2**31 - 1], "context": [2**31 - 1]}) is None
    for columns in ({"host_capacity": [1.0]}, {"host_capacity_GB": ["48"]}, {"batch": [0]}):
        with pytest.raises(ValueError, match="column") as checked:
            one.check(columns)
        with pytest.raises(ValueError, match="column") as called:
            one(columns)
        assert str(checked.value) == str(called.value)
    with pytest.raises(ValueError, match=f"{sweeper.__name__}: profile must be of the class OffloadProfile, not Profile"):
        sweeper(system=RTX, workload=served(), profile=FIRST_PRINCIPLES)


def test_no_designs_and_no_columns():
    """No row in, no row out, with the same columns; no column: the score's own system and workload."""
    one, none = score()({}), score()({"host_capacity_GB": np.array([]), "batch": np.array([])})
    assert list(one) == list(none)
    assert {len(column) for column in none.values()} == {0}
    assert [column.dtype for column in none.values()] == [column.dtype for column in one.values()]
    np.testing.assert_array_equal(one["latency_s"], score()({"batch": [8]})["latency_s"])


def test_sweep_prices_it_in_chunks():
    """Any chunks, the same table; the score is sent to workers and written beside tables."""
    frame = pd.DataFrame(table(50, seed=4))
    pd.testing.assert_frame_equal(sweep(frame, score(), progress=False), sweep(frame, score(), chunk=17, progress=False))
    assert pickle.loads(pickle.dumps(score())) == score()
    assert RatioSweep(**score().settings()) == score()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"host_capacity": [1.0]}, "has no unit"),
        ({"hosts_capacity_GB": [1.0]}, "is no number of system"),
        ({"host_capacity_GB": [1.0, -1.0]}, "row 1"),
        ({"host_capacity_GB": [np.nan]}, "finite numbers"),
        ({"hosts_capacity_GB": []}, "is no number of system"),
        ({"batch": [1.5]}, "whole numbers of at least 1"),
        ({"batch": [0]}, "row 0"),
        ({"context": [5, np.nan]}, "row 1"),
        ({"context": ["many"]}, "without a unit"),
        ({"context": [1e12]}, r"below 2\*\*31"),
        ({"batch": [1, 2], "context": [1]}, "give every design every column"),
    ],
)
def test_wrong_columns_are_named(columns, words: str):
    with pytest.raises(ValueError, match=words):
        score()(columns)


def test_wrong_settings_and_problems_are_named():
    """Before any design is priced; what the batch cannot do names the solver that can."""
    with pytest.raises(ValueError, match="weights are on"):
        score(weights="disk")
    with pytest.raises(ValueError, match="decode step"):
        RatioSweep(system=RTX, workload=served(phase="prefill"))
    with pytest.raises(ValueError, match="has no link"):
        RatioSweep(system=replace(RTX, links=()), workload=served())
    rng = np.random.default_rng(0)
    problem = random_problem(rng, 1)
    measured = replace(problem, layers=(replace(problem.layers[0], generate=LinearTime(intercept=0.1, slope=0.1)),))
    with pytest.raises(ValueError, match="use LpRatio"):
        CacheRatioBatch.of([measured])
    with pytest.raises(ValueError, match="use LpRatio"):
        solve_ratios(CacheRatioBatch.of([random_problem(rng, 4)]))
    with pytest.raises(ValueError, match="same number of classes"):
        CacheRatioBatch.of([problem, random_problem(rng, 2)])
    deeper = replace(problem, layers=(replace(problem.layers[0], layers=7),))
    with pytest.raises(ValueError, match="same number of layers"):
        CacheRatioBatch.of([problem, deeper])
    with pytest.raises(ValueError, match="2 machines"):
        OffloadDesigns(systems=Systems(base=RTX, columns={}, designs=2), workload=served(), batch=np.array([1]), context=np.array([1, 1]))
