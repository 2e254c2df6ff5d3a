"""The array score of steps: columns in, columns out, each row as a single design, nothing that fits lost, bad input named."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse.mapping_score import priced_columns
from memsplit.dse.step_sweep import StepSweep
from memsplit.models import ComputeUnit, Link, MemoryTier, System, Workload
from memsplit.models.estimate import STEP_FUSED, StepMachines, StepModel, StepProfile, tensor_parallel
from memsplit.models.presets import H2M2_SYSTEM, LLAMA2_70B, MIXTRAL_8X7B
from memsplit.models.price import Operation, StepEnergy, static_power
from memsplit.models.units import GB, TB, TFLOPS, mm2

GPU = System(
    name="GPU",
    tiers=(MemoryTier(name="HBM", capacity=80 * GB, bandwidth=2 * TB, energy=31e-12, cost=15 / GB),),
    units=(ComputeUnit(name="SM", tier="HBM", matrix_peak=312 * TFLOPS, vector_peak=78 * TFLOPS),),
)
DECODE = Workload(llm=LLAMA2_70B, batch=16, context=2048)
PREFILL = Workload(llm=MIXTRAL_8X7B, batch=2, context=512, phase="prefill")
SOFT = StepProfile(name="soft", memory=0.9, overlap=4.3)
NUMBERS = (
    *("latency_s", "throughput_tok_per_s", "bound_s", "kv_GB", "energy_J", "energy_J_per_tok", "power_W"),
    *("memory_usd", "system_usd", "usd_per_Mtok", "headroom_GB"),
)
TEXTS = ("bound_by", "energy_without", "usd_without", "reason")


def table(designs: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Designs of which some do not hold the weights, some not the state."""
    rng = np.random.default_rng(seed)
    return {
        "HBM_capacity_GB": rng.uniform(20, 150, designs),
        "HBM_bandwidth_TBps": rng.uniform(1, 8, designs),
        "HBM_energy_pJ_per_bit": rng.uniform(2, 7, designs),
        "HBM_cost_USD_per_GB": rng.uniform(5, 20, designs),
        "SM_matrix_peak_TFLOPps": rng.uniform(50, 900, designs),
        "batch": rng.integers(1, 64, designs),
        "context": rng.integers(1, 8192, designs),
        "devices": rng.choice([1, 2, 4], designs),
    }


SCORES = {
    "decode": StepSweep(system=GPU, workload=DECODE),
    "soft prefill of experts": StepSweep(system=GPU, workload=PREFILL, profile=SOFT),
}
each_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


@each_score
def test_a_row_of_a_table_equals_its_design_priced_alone_bit_for_bit(score):
    """By its own columns, and by the System and Workload that ``design`` rebuilds from them, in another score without columns."""
    columns = table(2100)
    whole = score(columns)
    assert sorted(whole) == sorted([*NUMBERS, *TEXTS, "feasible"])
    assert 100 < whole["feasible"].sum() < 2000
    for i in (0, 1, 1023, 1024, 2047, 2098, 2099):
        row = {name: column[i] for name, column in columns.items()}
        alone = score({name: [value] for name, value in row.items()})
        system, workload = score.design(row | {name: column[i] for name, column in whole.items()})
        rebuilt = StepSweep(system=system, workload=workload, profile=score.profile)({})
        for name, column in whole.items():
            for other in (alone, rebuilt):
                np.testing.assert_array_equal(other[name], column[i : i + 1], err_msg=name)


def test_columns_are_those_of_the_estimate():
    """Seconds, tokens a second, GB, J a token and USD from the estimate's SI numbers; a design that fits has no reason."""
    found = StepSweep(system=GPU, workload=DECODE, profile=STEP_FUSED)({})
    model = StepModel.build(LLAMA2_70B, profile=STEP_FUSED)
    step = model.estimate(StepMachines.build([GPU]), 16, 2048)
    assert found["latency_s"] == step.latency
    assert found["throughput_tok_per_s"] == 16 / step.latency
    assert found["bound_s"] == step.bound
    assert found["kv_GB"] == DECODE.state_bytes / GB
    # bytes x J/B over tokens, rounded in another order
    assert found["energy_J_per_tok"] == pytest.approx((DECODE.weight_bytes + DECODE.state_bytes) * 31e-12 / 16, rel=1e-12)
    assert found["memory_usd"] == GPU.memory_cost
    assert found["headroom_GB"] == step.headroom / GB
    assert found["feasible"].tolist() == [True]
    assert found["reason"].tolist() == [""]


def test_designs_that_do_not_fit_are_kept_with_their_reason():
    """What is lacking is a number; what cannot be computed is none."""
    weights = DECODE.weight_bytes / GB
    found = StepSweep(system=GPU, workload=DECODE, profile=STEP_FUSED)({"HBM_capacity_GB": [weights / 2, weights + 1, 2 * weights, 0]})
    assert found["reason"].tolist() == [
        "the weights alone exceed HBM",
        "weights, state and activations exceed HBM",
        "",
        "the weights alone exceed HBM",
    ]
    assert found["feasible"].tolist() == [False, False, True, False]
    for name in NUMBERS:
        known = name in ("kv_GB", "headroom_GB")
        assert np.isfinite(found[name]).tolist() == [known, known, True, known], name
    assert found["headroom_GB"][1] == pytest.approx(1 - found["kv_GB"][1], rel=1e-9)  # a difference of sums of GB
    many = StepSweep(system=GPU.with_tier("HBM", capacity=weights * GB / 2), workload=DECODE)({"batch": [1, 2]})
    assert many["reason"].tolist() == ["the weights alone exceed HBM"] * 2


FULL = System(
    name="full",
    tiers=(replace(GPU.tiers[0], static_power=20.0), MemoryTier(name="host", capacity=100 * GB, bandwidth=TB, cost=4 / GB)),
    units=(replace(GPU.units[0], energy=1e-12, static_power=60.0, area=800 * mm2, silicon_cost=0.3 / mm2),),
    links=(Link(source="host", target="HBM", bandwidth=64 * GB, cost=100.0),),
)
"""A machine of which everything has a price, and all but the host an energy."""


@pytest.mark.parametrize("devices", [1, 3])
def test_money_and_power_are_those_of_the_formulas(devices):
    """``priced_columns`` of the machine that is all devices together; the same sums in another order."""
    operation = Operation(utilisation=0.3, years=4.0, usd_per_kWh=0.2, pue=1.2)
    score = StepSweep(system=FULL, workload=DECODE, tier="HBM", operation=operation)
    found = score({"devices": [devices, devices], "SM_area_mm2": [800.0, 400.0]})
    for i, area in enumerate((800 * mm2, 400 * mm2)):
        system = tensor_parallel(replace(FULL, units=(replace(FULL.units[0], area=area),)), devices)
        step = StepModel.build(LLAMA2_70B).estimate(StepMachines.build([system], tier="HBM"), 16, 2048)
        static = static_power(system)[0] * step.latency
        energy = StepEnergy(memory=step.energy - static, compute=np.zeros(1), links=np.zeros(1), static=static)
        expected = priced_columns(system, energy, latency=step.latency, tokens=16, operation=operation)
        for name in ("energy_J", "energy_J_per_tok", "power_W", "memory_usd", "system_usd", "usd_per_Mtok", "area_mm2"):
            assert found[name][i] == pytest.approx(expected[name].item(), rel=1e-12), name
    assert found["system_usd"][0] > found["system_usd"][1] > found["memory_usd"][0]
    busy = replace(score, operation=replace(operation, utilisation=1.0))({"devices": [devices]})
    assert busy["energy_J_per_tok"][0] == pytest.approx(busy["energy_J"][0] / 16, rel=1e-12)
    assert busy["usd_per_Mtok"][0] < found["usd_per_Mtok"][0]


def test_the_larger_of_the_two_bounds_is_named():
    """One request reads far more than it computes; with a hundredth of the FLOP/s it does not; what does not fit has no bound."""
    found = StepSweep(system=GPU, workload=DECODE, profile=STEP_FUSED)(
        {"SM_matrix_peak_TFLOPps": [312.0, 1.0, 1.0], "SM_vector_peak_TFLOPps": [78.0, 78.0, 78.0], "HBM_capacity_GB": [80.0, 80.0, 1.0]}
    )
    assert found["bound_by"].tolist() == ["memory", "compute", ""]
    assert found["bound_s"][0] == pytest.approx((DECODE.weight_bytes + DECODE.state_bytes) / (2 * TB), rel=1e-12)  # sums in another order
    assert found["bound_s"][1] > found["bound_s"][0]


def test_check_refuses_what_a_call_refuses():
    score = SCORES["decode"]
    assert score.check({"HBM_capacity_GB": [96.0], "devices": [3]}) is None
    for columns in ({"devices": [0]}, {"HBM_capacity_GB": [None]}, {"batch": [True]}):
        with pytest.raises(ValueError, match="column") as checked:
            score.check(columns)
        with pytest.raises(ValueError, match="column") as called:
            score(columns)
        assert str(checked.value) == str(called.value)


def test_a_field_of_another_class_is_named():
    with pytest.raises(ValueError, match="StepSweep: workload must be of the class Workload, not LLMConfig"):
        StepSweep(system=GPU, workload=LLAMA2_70B)
    with pytest.raises(ValueError, match="StepSweep: profile must be of the class StepProfile"):
        StepSweep(system=GPU, workload=DECODE, profile="plain")


def test_devices_share_a_step():
    """Four machines hold four times as much, cost four times as much, and read four times as fast."""
    found = StepSweep(system=GPU, workload=DECODE, profile=STEP_FUSED)({"devices": [1, 4]})
    assert found["latency_s"][1] == pytest.approx(found["latency_s"][0] / 4, rel=1e-12)  # reciprocals of products
    assert found["memory_usd"][1] == 4 * found["memory_usd"][0]
    assert found["energy_J_per_tok"][1] == found["energy_J_per_tok"][0]


def test_prices_of_all_tiers_and_numbers_of_the_named_one():
    score = StepSweep(system=H2M2_SYSTEM, workload=DECODE, tier="LPDDR")
    found = score({"LPDDR_capacity_GB": [300.0, 600.0]})
    assert (found["headroom_GB"][1] - found["headroom_GB"][0]) == pytest.approx(300)  # a difference of sums of GB
    assert found["memory_usd"].tolist() == [H2M2_SYSTEM.with_tier("LPDDR", capacity=c * GB).memory_cost for c in (300, 600)]
    assert "memory_usd" not in StepSweep(system=H2M2_SYSTEM.with_tier("HBM", cost=None), workload=DECODE, tier="LPDDR")({})
    assert "energy_J_per_tok" not in StepSweep(system=H2M2_SYSTEM.with_tier("LPDDR", energy=None), workload=DECODE, tier="LPDDR")({})


@each_score
def test_scores_are_values(score):
    """They travel to other processes, and ``settings`` makes an equal one."""
    assert pickle.loads(pickle.dumps(score)) == score == StepSweep(**score.settings())
    columns = table(7)
    for name, column in score(columns).items():
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(score))(columns)[name], column)


@each_score
def test_no_designs_give_empty_columns(score):
    empty = score({"HBM_capacity_GB": [], "batch": np.array([], dtype=int)})
    assert {name: column.dtype for name, column in empty.items()} == {name: column.dtype for name, column in score({}).items()}
    assert all(column.shape == (0,) for column in empty.values())
    with pytest.raises(ValueError, match="has the unit 'GHz'"):
        score({"HBM_capacity_GHz": []})


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    changed=st.sampled_from(["HBM_capacity_GB", "HBM_bandwidth_TBps", "SM_matrix_peak_TFLOPps", "devices"]),
    factor=st.sampled_from([1.5, 2, 7]),
)
def test_more_of_anything_is_never_slower_and_loses_no_design(seed, changed, factor):
    """Powers are right to a few last digits only."""
    columns = table(50, seed)
    more = columns | {changed: columns[changed] * (2 if changed == "devices" else factor)}
    for score in SCORES.values():
        before, after = score(columns), score(more)
        fits = before["feasible"]
        assert after["feasible"][fits].all()
        assert (after["latency_s"][fits] <= before["latency_s"][fits] * (1 + 1e-13)).all()
        assert (after["bound_s"][fits] <= before["bound_s"][fits]).all()
        assert (before["bound_s"][fits] <= before["latency_s"][fits]).all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"batch": [1, 2.5]}, "column 'batch' must hold whole numbers of at least 1 and below 2\\*\\*31, not 2.5 as in row 1"),
        ({"batch": [0]}, "not 0.0 as in row 0"),
        ({"context": [5, math.nan]}, "column 'context' must hold whole numbers of at least 0 .*, not nan as in row 1"),
        ({"context": ["4 k"]}, "column 'context' must hold whole numbers of at least 0, without a unit"),
        ({"devices": [1, -1]}, "column 'devices' must hold whole numbers of at least 1"),
        ({"batch": [1, 2], "context": [3]}, "column 'context' has 1 rows and column 'batch' 2"),
        ({"HBM_capacity_GB": [1.0, 2.0], "batch": [1]}, "column 'batch' has 1 rows and column 'HBM_capacity_GB' 2"),
        ({"HBM_capacity": [80.0]}, "column 'HBM_capacity' has no unit"),
        ({"batch_requests": [80.0]}, "column 'batch_requests' is no number of system 'GPU'"),
        ({"HBM_bandwidth_TBps": [1.0, math.nan]}, "column 'HBM_bandwidth_TBps' must hold finite numbers"),
    ],
)
def test_bad_columns_are_named(columns, message):
    with pytest.raises(ValueError, match=message):
        StepSweep(system=GPU, workload=DECODE)(columns)


def test_what_cannot_be_priced_is_refused():
    with pytest.raises(ValueError, match="context is 0 in row 1, and a prefill needs a token"):
        StepSweep(system=GPU, workload=PREFILL)({"context": [3, 0]})
    with pytest.raises(ValueError, match="has 2 tiers, and this estimate takes one that holds all"):
        StepSweep(system=H2M2_SYSTEM, workload=DECODE)
