"""The array score of kernel mappings: columns in, columns out, each row as a single design, nothing that fits lost, bad input named."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tiny_llm, two_sided

from memsplit.dse import MappingScore, from_json, to_json
from memsplit.dse.mapping_sweep import MappingSweep
from memsplit.models import KernelMappingProblem, KernelMappingTables, Profile, Workload
from memsplit.models.presets import GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B
from memsplit.models.systems import Systems
from memsplit.solvers import TableMapping

GPT = MappingSweep(system=H2M2_SYSTEM, workload=Workload(llm=GPT3_175B, batch=32, context=1024))
LLAMA = MappingSweep(
    system=H2M2_SYSTEM.with_page(1),
    workload=Workload(llm=LLAMA2_70B, batch=64, context=2048),
    profile=Profile(name="test", rho=3.0, t_sync=1e-5, page_walk=3e-7),
    granularity="query_head",
)
each_score = pytest.mark.parametrize("score", [GPT, LLAMA], ids=["GPT3-175B", "Llama2-70B by query head"])
MONEY = ("memory_usd", "system_usd", "usd_per_Mtok", "area_mm2")
NUMBERS = (
    *("latency_s", "throughput_tok_per_s", "energy_J", "energy_J_per_tok", "power_W", *MONEY),
    *("HBM_headroom_GB", "LPDDR_headroom_GB"),
)
TEXTS = ("energy_without", "usd_without", "area_without")


def table(designs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Designs of twelve workloads, of which some do not hold the weights and some not the state."""
    rng = np.random.default_rng(seed)
    return {
        "HBM_capacity_GB": rng.uniform(10, 100, designs),
        "HBM_bandwidth_TBps": rng.uniform(1, 8, designs),
        "LPDDR_capacity_GB": rng.uniform(10, 400, designs),
        "LPDDR_energy_pJ_per_bit": rng.uniform(2, 7, designs),
        "HBM_cost_USD_per_GB": rng.uniform(5, 20, designs),
        "HBM chip_matrix_peak_TFLOPps": rng.uniform(50, 900, designs),
        "batch": rng.choice([1, 16, 64], designs),
        "context": rng.choice([0, 1, 1024, 4096], designs),
    }


@each_score
def test_a_row_equals_its_design_solved_alone_bit_for_bit(score):
    """``TableMapping().solve`` of the System and Workload that ``design`` rebuilds, and the columns that ``MappingScore`` has as well."""
    columns = table(1100)
    whole = score(columns)
    assert 100 < whole["feasible"].sum() < 1090
    for i in (0, 1, 2, 3, 511, 512, *range(1080, 1100)):
        row = {name: column[i] for name, column in columns.items()}
        system, workload = score.design(row | {name: column[i] for name, column in whole.items()})
        problem = KernelMappingProblem.build(system, workload, profile=score.profile, granularity=score.granularity)
        result = TableMapping().solve(problem)
        assert whole["feasible"][i] == (result.plan is not None)
        if result.plan is None:
            assert whole["reason"][i]
            assert all(math.isnan(whole[name][i]) for name in whole if name not in ("feasible", "reason", *TEXTS))
            continue
        assert whole["reason"][i] == ""
        assert whole["latency_s"][i] == result.objective
        for k, kind in enumerate(problem.kinds):
            assert whole[f"n_{kind.name}"][i] == result.plan.splits[k][0].counts[0]
        expected = MappingScore(workload=workload, profile=score.profile, granularity=score.granularity)(system)
        shared = [name for name in whole if name in expected]
        assert {*NUMBERS, *TEXTS, *(f"n_{kind.name}" for kind in problem.kinds)} == set(shared)
        assert {name: whole[name][i] for name in shared} == {name: expected[name] for name in shared}


@each_score
def test_a_row_does_not_depend_on_the_rows_beside_it(score):
    columns = table(200, seed=3)
    whole = score(columns)
    for some in (slice(0, 1), slice(17, 200, 7), slice(0, 0)):
        found = score({name: column[some] for name, column in columns.items()})
        assert list(found) == list(whole)
        for name, column in found.items():
            np.testing.assert_array_equal(column, whole[name][some], err_msg=name)


def test_without_columns_there_is_one_design():
    found = GPT({})
    result = TableMapping().solve(KernelMappingProblem.build(H2M2_SYSTEM, GPT.workload))
    assert found["latency_s"].tolist() == [result.objective]
    assert GPT.design({"latency_s": 3.0, "reason": ""}) == (H2M2_SYSTEM, GPT.workload)
    batches = GPT({"batch": [1, 32]})
    assert batches["latency_s"][1] == found["latency_s"][0] > batches["latency_s"][0]


def test_says_why_nothing_fits_in_few_words():
    """251.256 GB are needed, 173.946 GB of them weights (96 layers x 12 x 12288^2 B).

    The least slice, of qkv, is 96 x 3 x 12288 x 128 B = 0.453 GB.
    """
    columns = {"HBM_capacity_GB": [60.0, 100.0, 0.4, 300.0], "LPDDR_capacity_GB": [100.0, 100.0, 250.95, 0.0]}
    found = GPT(columns)
    assert found["feasible"].tolist() == [False, False, False, True]
    assert found["reason"].tolist() == [
        "the weights alone exceed HBM and LPDDR",
        "weights, keys and values exceed HBM and LPDDR",
        "would fit into HBM and LPDDR, but not slice by slice in whole pages",
        "",
    ]


def test_memory_without_an_energy_or_a_price_leaves_those_columns_out():
    bare = MappingSweep(system=two_sided(), workload=Workload(llm=tiny_llm(), batch=2, context=5))
    assert set(bare({"fast_bandwidth_GBps": [1.0, 2.0]})) == {
        *("latency_s", "throughput_tok_per_s", "n_qkv", "n_attention", "n_fc"),
        *("fast_headroom_GB", "slow_headroom_GB", "feasible", "reason"),
    }
    prices = {"fast_cost_USD_per_GB": [1.0, 3.0], "slow_cost_USD_per_GB": [2.0, 0.0]}
    priced = bare(prices)
    systems = [bare.design({name: column[i] for name, column in prices.items()})[0] for i in range(2)]
    assert priced["memory_usd"].tolist() == [system.memory_cost for system in systems]
    assert priced["memory_usd"].tolist() == pytest.approx([3.3e-6, 2.7e-6], rel=1e-14)  # 900 B and 1200 B; two roundings


def test_a_machine_without_limits_takes_no_time():
    system = two_sided(bandwidth=(math.inf, math.inf), peak=(math.inf, math.inf))
    found = MappingSweep(system=system, workload=Workload(llm=tiny_llm(), batch=2, context=5))({"fast_capacity_GB": [1.0, 2.0]})
    assert found["latency_s"].tolist() == [0.0, 0.0]
    assert found["throughput_tok_per_s"].tolist() == [math.inf, math.inf]
    assert found["feasible"].all()


GROWING = st.sampled_from(
    [
        *("HBM_capacity_GB", "LPDDR_capacity_GB", "HBM_bandwidth_TBps", "LPDDR_bandwidth_GBps"),
        *("HBM chip_matrix_peak_TFLOPps", "HBM chip_vector_peak_TFLOPps", "LPDDR chip_matrix_peak_TFLOPps"),
    ]
)


@settings(max_examples=40, deadline=None)
@given(name=GROWING, seed=st.integers(0, 1000), factors=st.lists(st.floats(1.0, 4.0), min_size=1, max_size=6))
def test_more_of_anything_is_never_slower(name, seed, factors):
    """More capacity keeps every plan; more bandwidth or compute makes none slower, to the last bit: rounding is monotone."""
    rng = np.random.default_rng(seed)
    base = {
        "HBM_capacity_GB": rng.uniform(20, 200),
        "LPDDR_capacity_GB": rng.uniform(50, 300),
        "HBM_bandwidth_TBps": rng.uniform(0.5, 8),
        "LPDDR_bandwidth_GBps": rng.uniform(100, 2000),
        "HBM chip_matrix_peak_TFLOPps": rng.uniform(20, 500),
        "HBM chip_vector_peak_TFLOPps": rng.uniform(1, 100),
        "LPDDR chip_matrix_peak_TFLOPps": rng.uniform(20, 500),
    }
    growth = np.cumprod([1.0, *factors])
    columns = {each: np.full(len(growth), value) for each, value in base.items()}
    columns[name] = columns[name] * growth
    found = GPT(columns)
    latency = np.where(found["feasible"], found["latency_s"], np.inf)
    assert (latency[1:] <= latency[:-1]).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), power=st.integers(-3, 3))
def test_scaling_all_rates_scales_the_answer(seed, power):
    """By a power of two, which rounds nothing: the same plans in seconds divided by it."""
    rng = np.random.default_rng(seed)
    factor = 2.0**power
    peaks = [f"{tier} chip_{engine}_peak_TFLOPps" for tier in ("HBM", "LPDDR") for engine in ("matrix", "vector")]
    rates = ("HBM_bandwidth_TBps", "LPDDR_bandwidth_TBps", *peaks)
    columns = {name: rng.uniform(1, 8, 4) * (30 if "peak" in name else 1) for name in rates} | {"HBM_capacity_GB": rng.uniform(20, 200, 4)}
    one, other = GPT(columns), GPT(columns | {name: columns[name] * factor for name in rates})
    np.testing.assert_array_equal(one["latency_s"], other["latency_s"] * factor)
    for name in ("n_qkv", "n_attention", "n_fc"):
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"HBM_capacity": [80]}, "'HBM_capacity' has no unit; name it HBM_capacity_UNIT"),
        ({"HBM_capacity_GB": [80, math.nan]}, r"'HBM_capacity_GB' must hold finite numbers.* row 1"),
        ({"DDR_capacity_GB": [80]}, "'DDR_capacity_GB' is no number of system"),
        ({"batch": [1, 2.5]}, r"'batch' must hold whole numbers of at least 1 and below 2\*\*31, not 2.5 as in row 1"),
        ({"batch": [0]}, "'batch' must hold whole numbers of at least 1"),
        ({"context": [-1]}, "'context' must hold whole numbers of at least 0"),
        ({"context": ["long"]}, "'context' must hold whole numbers of at least 0"),
        ({"batch": [1, 2], "context": [1]}, "'context' has 1 rows and column 'batch' 2"),
    ],
)
def test_names_what_is_wrong_with_a_column(columns, message):
    with pytest.raises(ValueError, match=message) as refusal:
        GPT(columns)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "h2m2"}, "MappingSweep: system must be of the class System, not 'h2m2'"),
        ({"workload": LLAMA2_70B}, "MappingSweep: workload must be of the class Workload, not LLMConfig"),
        ({"granularity": "head"}, "granularity must be one of .* not 'head'"),
        ({"operation": 3}, "operation must be an Operation, or its fields .* not 3"),
    ],
)
def test_names_a_field_that_is_something_else(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        replace(GPT, **changes)
    assert "\n" not in str(refusal.value)


def test_every_price_and_the_operation_change_a_result():
    """A number that is taken and changes nothing would be a silent mistake."""
    base = GPT({})
    for name, value, columns in (
        ("HBM chip_cost_USD", 9999.0, ("system_usd", "usd_per_Mtok")),
        ("HBM_cost_USD_per_GB", 99.0, ("memory_usd", "system_usd", "usd_per_Mtok")),
        ("LPDDR_static_power_W", 500.0, ("energy_J", "energy_J_per_tok", "power_W", "usd_per_Mtok")),
        ("HBM chip_area_mm2", 1.0, ("area_mm2",)),
    ):
        changed = GPT({name: [value]})
        assert all(changed[column] != base[column] for column in columns), name
    busy = replace(GPT, operation=replace(GPT.operation, utilisation=1.0))({})
    assert busy["energy_J_per_tok"] == busy["energy_J"] / 32 < base["energy_J_per_tok"]
    assert busy["usd_per_Mtok"] < base["usd_per_Mtok"]


def test_energy_that_is_left_out_is_that_of_the_design_and_not_of_those_beside_it():
    """An LPDDR chip without an energy matters to plans that use it only."""
    chips = tuple(replace(unit, energy=None) if unit.tier == "LPDDR" else unit for unit in H2M2_SYSTEM.units)
    score = MappingSweep(system=replace(H2M2_SYSTEM, units=chips), workload=Workload(llm=LLAMA2_70B, batch=1, context=100))
    columns = {"HBM_capacity_GB": [1e4, 40.0, 1e4], "LPDDR_bandwidth_GBps": [1e-6, 500.0, 1e-6]}
    found = score(columns)
    assert found["energy_without"][0] != found["energy_without"][1]
    for i in range(3):
        assert found["energy_without"][i] == score({name: column[i : i + 1] for name, column in columns.items()})["energy_without"][0]


def test_unlimited_memory_is_never_slower_and_endless_state_fits_nowhere():
    """More bytes than an int64 counts are not fewer than none."""
    found = GPT({"HBM_capacity_GB": [200.0, 1e4, 1e10, 1e200], "batch": [32, 32, 32, 32]})
    assert found["feasible"].all()
    assert (np.diff(found["latency_s"]) <= 0).all()
    assert (found["HBM_headroom_GB"][1:] > found["HBM_headroom_GB"][0]).all()
    endless = GPT({"HBM_capacity_GB": [1e10, 1e10], "HBM_page_B": [1, 1], "batch": [32, 2**31 - 1], "context": [10, 2**31 - 1]})
    assert endless["feasible"].tolist() == [True, False]
    assert endless["reason"][1] == "weights, keys and values are 2**60 bytes or more"
    assert math.isnan(endless["latency_s"][1])


def test_check_refuses_what_a_call_refuses():
    assert GPT.check({"HBM_capacity_GB": [96.0], "batch": [3]}) is None
    for columns in ({"HBM_capacity": [1.0]}, {"HBM_capacity_GB": ["48"]}, {"batch": [0]}, {"batch": [1, 2], "context": [1]}):
        with pytest.raises(ValueError, match="column") as checked:
            GPT.check(columns)
        with pytest.raises(ValueError, match="column") as called:
            GPT(columns)
        assert str(checked.value) == str(called.value)


def test_refuses_what_it_cannot_map():
    with pytest.raises(ValueError, match=r"takes two memories, and system .* has 3"):
        MappingSweep(system=H2M2_CXL_SYSTEM, workload=GPT.workload)
    prefill = replace(GPT, workload=replace(GPT.workload, phase="prefill"))
    with pytest.raises(ValueError, match="context is 0 in row 1, and a prefill needs a token"):
        prefill({"context": [4, 0]})
    with pytest.raises(ValueError, match="'DDR_capacity_GB' is no number"):
        GPT({"DDR_capacity_GB": []})


def test_is_a_value_that_files_and_other_processes_keep():
    assert pickle.loads(pickle.dumps(LLAMA)) == LLAMA
    assert set(LLAMA.settings()) == {"system", "workload", "profile", "granularity", "operation"}
    kept = from_json(json.loads(json.dumps(to_json(LLAMA.settings()))))
    assert MappingSweep(**kept) == LLAMA


def test_equals_the_tables_of_all_designs_at_once():
    """Chunks leave no seams."""
    columns = {name: column for name, column in table(1100, seed=8).items() if name not in ("batch", "context")}
    tables = KernelMappingTables.build(Systems.from_columns(H2M2_SYSTEM, columns), GPT.workload, profile=GPT.profile)
    seconds, counts = TableMapping().solve_batch(tables)
    found = GPT(columns)
    np.testing.assert_array_equal(np.where(np.isfinite(seconds), seconds, np.nan), found["latency_s"])
    np.testing.assert_array_equal(np.where(np.isfinite(seconds), counts[:, 2, 0], np.nan), found["n_fc"])
