"""Joules and dollars: by hand, by law, for a batch as for each, and never without saying what was left out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse import MappingScore, Objective, OffloadScore, explore, rerun, write_csv
from memsplit.dse.mapping_score import priced_columns, single
from memsplit.dse.offload_score import step_work
from memsplit.models import ComputeUnit, KernelMappingPlan, KernelMappingProblem, Link, MemoryTier, System, Workload
from memsplit.models.kernel_mapping import step_flops
from memsplit.models.presets import H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B, OPT_6_7B, RTX4090_SYSTEM, SYSTEMS, T4_SYSTEM
from memsplit.models.price import (
    ASSUMED_OPERATION,
    Operation,
    StepEnergy,
    access_energy,
    assumptions,
    energy_per_token,
    mean_power,
    static_power,
    step_energy,
    system_area,
    system_cost,
    usd_per_Mtok,
)
from memsplit.models.systems import Systems
from memsplit.models.units import GB
from memsplit.models.workload import kernels
from memsplit.solvers import TableMapping

SUMS = 1e-12  # relative: sums of a few dozen terms in another order, each off by 1.1e-16 at most

SYSTEM = System(
    name="priced",
    tiers=(
        MemoryTier(name="near", capacity=10.0, bandwidth=1.0, energy=2.0, cost=3.0, static_power=1.0),
        MemoryTier(name="far", capacity=100.0, bandwidth=1.0, energy=5.0, cost=0.5, static_power=0.5),
    ),
    units=(
        ComputeUnit(name="big", tier="near", matrix_peak=3.0, vector_peak=1.0, energy=4.0, static_power=2.0, area=7.0, cost=50.0),
        ComputeUnit(name="little", tier="near", matrix_peak=1.0, vector_peak=1.0, energy=8.0, static_power=0.0, area=2.0, silicon_cost=6.0),
    ),
    links=(
        Link(source="far", target="near", bandwidth=1.0, energy=0.25, cost=4.0),
        Link(source="near", target="far", bandwidth=1.0, energy=0.25, cost=1.0),
    ),
)
WORK = {"traffic": [10.0, 20.0], "flops": [40.0, 0.0], "link_bytes": [20.0, 0.0], "latency": 6.0}

amounts = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


def terms(energy):
    return [energy.memory, energy.compute, energy.links, energy.static]


# A step


def test_the_energy_of_a_step_by_hand():
    """2 x 10 + 5 x 20; 30 FLOP of 4 J and 10 of 8 J, as the units' matrix peaks are 3 to 1; 20 B over a link; 3.5 W for 6 s."""
    energy = step_energy(SYSTEM, **WORK)
    assert terms(energy) == [120.0, 200.0, 5.0, 21.0]
    assert (energy.moving, energy.total, energy.without) == (325.0, 346.0, ())
    assert mean_power(energy.total, 6.0) == 346.0 / 6.0


def test_unknown_constants_are_named_and_left_out():
    dark = SYSTEM.with_tier("far", energy=None).with_unit("little", energy=None).with_unit("big", static_power=None)
    energy = step_energy(dark, **WORK)
    assert terms(energy) == [20.0, 0.0, 5.0, 9.0]
    assert energy.without == ("far energy", "big, little energy", "big static power")
    assert step_energy(dark, **{**WORK, "traffic": [10.0, 0.0], "flops": [0.0, 0.0]}).without == ("big static power",)


def test_unknown_work_is_named():
    energy = step_energy(SYSTEM, traffic=WORK["traffic"], latency=6.0)
    assert terms(energy) == [120.0, 0.0, 0.0, 21.0]
    assert energy.without == ("compute", "links")
    assert step_energy(replace(SYSTEM, links=()), traffic=WORK["traffic"], latency=6.0).without == ("compute",)


def test_a_system_without_any_energy_does_not_take_none_silently():
    bare = replace(
        SYSTEM,
        tiers=tuple(replace(tier, energy=None, static_power=None, cost=None) for tier in SYSTEM.tiers),
        units=tuple(ComputeUnit(name=unit.name, tier=unit.tier, matrix_peak=1.0, vector_peak=1.0) for unit in SYSTEM.units),
        links=tuple(Link(source=link.source, target=link.target, bandwidth=1.0) for link in SYSTEM.links),
    )
    energy, cost, area = step_energy(bare, **WORK), system_cost(bare), system_area(bare)
    assert (energy.total, cost.total, area.units) == (0.0, 0.0, 0.0)
    assert len(energy.without) == 2 + 1 + 1 + 4
    assert cost.without == ("near cost", "far cost", "big cost", "little cost", "far_to_near cost", "near_to_far cost")
    assert area.without == ("big area", "little area")


def test_amounts_for_other_parts_are_refused():
    with pytest.raises(ValueError, match="do not fit 2 parts: near energy, far energy"):
        step_energy(SYSTEM, **{**WORK, "traffic": [1.0, 2.0, 3.0]})


def test_a_unit_without_limits_does_all_the_work():
    boundless = SYSTEM.with_unit("big", matrix_peak=np.inf, energy=2.0**-12)
    assert step_energy(boundless, **WORK).compute == 40 * 2.0**-12


@given(st.lists(st.tuples(amounts, amounts, amounts, amounts), min_size=1, max_size=5), st.sampled_from([2.0, 2.0**-30]))
def test_scaling_all_constants_scales_every_term(rows, scale):
    """By a power of two, which rounds nothing."""
    traffic, other = np.array(rows)[:, :2], np.array(rows)[:, 2:]
    work = {"traffic": traffic, "flops": other, "link_bytes": other, "latency": traffic[:, 0]}
    scaled = replace(
        SYSTEM,
        tiers=tuple(replace(tier, energy=tier.energy * scale, static_power=tier.static_power * scale) for tier in SYSTEM.tiers),
        units=tuple(replace(unit, energy=unit.energy * scale, static_power=unit.static_power * scale) for unit in SYSTEM.units),
        links=tuple(replace(link, energy=link.energy * scale) for link in SYSTEM.links),
    )
    other[:, 1] = 0.0  # there is no unit on the far tier
    for new, old in zip(terms(step_energy(scaled, **work)), terms(step_energy(SYSTEM, **work)), strict=True):
        assert np.array_equal(new, scale * old)


COLUMNS = {
    "near_energy_J_per_B": amounts,
    "far_capacity_B": amounts,
    "far_cost_USD_per_B": amounts,
    "far_static_power_W": amounts,
    "big_energy_J_per_FLOP": amounts,
    "big_matrix_peak_FLOPps": st.floats(0.1, 10.0),
    "little_area_m2": amounts,
    "little_silicon_cost_USD_per_m2": amounts,
    "far_to_near_energy_J_per_B": amounts,
    "near_to_far_cost_USD": amounts,
}


@given(st.data(), st.integers(1, 9))
@settings(max_examples=40)
def test_a_batch_is_its_singles_bit_for_bit(data, designs):
    def column(values):
        return np.array(data.draw(st.lists(values, min_size=designs, max_size=designs)))

    systems = Systems.from_columns(SYSTEM, {name: column(values) for name, values in COLUMNS.items()})
    traffic, links = np.stack([column(amounts) for _ in "ab"], axis=-1), np.stack([column(amounts) for _ in "ab"], axis=-1)
    flops, latency = np.stack([column(amounts), np.zeros(designs)], axis=-1), column(amounts)
    energy, cost = step_energy(systems, traffic=traffic, flops=flops, link_bytes=links, latency=latency), system_cost(systems)
    area = system_area(systems)
    for i in range(designs):
        one = step_energy(systems[i], traffic=traffic[i], flops=flops[i], link_bytes=links[i], latency=latency[i])
        assert terms(one) == [np.broadcast_to(term, designs)[i] for term in terms(energy)]
        assert np.broadcast_to(cost.total, designs)[i] == system_cost(systems[i]).total
        assert np.broadcast_to(area.units, designs)[i] == system_area(systems[i]).units


# A machine


def test_the_cost_and_area_of_a_machine_by_hand():
    """10 x 3 + 100 x 0.5; a device of 50 and 2 m2 at 6; links of 4 and 1."""
    cost, area = system_cost(SYSTEM), system_area(SYSTEM)
    assert (cost.memory, cost.units, cost.links, cost.total, cost.without) == (80.0, 62.0, 5.0, 147.0, ())
    assert (area.units, area.without) == (9.0, ())
    assert system_cost(SYSTEM.with_unit("little", cost=20.0)).units == 70.0  # the price of a device, where there is one
    assert system_cost(SYSTEM.with_unit("little", area=None)).without == ("little cost",)
    assert static_power(SYSTEM)[0] == 3.5


@pytest.mark.parametrize("name", SYSTEMS)
def test_machines_of_memsplit_have_a_full_price(name):
    """All but the area of CPUs and the access energy of a disk, which no plan is priced with."""
    system = SYSTEMS[name]
    assert system_cost(system).without == ()
    assert static_power(system)[1] == ()
    assert system_area(system).without == tuple(f"{unit.name} area" for unit in system.units if unit.name == "CPU")
    assert system_cost(system).memory == pytest.approx(system.memory_cost, rel=SUMS)
    assert [tier.name for tier in system.tiers if tier.energy is None] == (["disk"] if name == "t4_disk" else [])


# A token


OPERATION = Operation(utilisation=0.5, years=2.0, usd_per_kWh=0.36, pue=1.25)
operations = st.builds(
    Operation,
    utilisation=st.floats(0.01, 1.0),
    years=st.floats(0.1, 10.0),
    usd_per_kWh=st.floats(0.0, 1.0),
    pue=st.floats(1.0, 2.0),
)
energies = st.builds(
    lambda memory, compute, static: StepEnergy(
        memory=np.float64(memory), compute=np.float64(compute), links=np.float64(0), static=np.float64(static)
    ),
    *[amounts] * 3,
)


def test_a_million_tokens_by_hand():
    """J a token: (30 + 10 / 0.5) / 4. Money: 631,152 USD over 2 years of 31,557,600 s, half of them at 8 tok/s, are 0.0025 USD a token;
    12.5 J x 1.25 x 0.36 USD / 3.6 MJ."""
    energy = StepEnergy(memory=np.float64(20), compute=np.float64(10), links=np.float64(0), static=np.float64(10))
    joules = energy_per_token(energy, 4, OPERATION.utilisation)
    assert joules == 12.5
    usd = usd_per_Mtok(cost=631_152.0, energy_per_token=joules, tokens_per_second=8.0, operation=OPERATION)
    assert usd == pytest.approx(2500 + 12.5 * 1.25 * 0.1, rel=SUMS)


@given(energies, operations, amounts, st.floats(0.1, 1e4), st.floats(1.0, 3.0))
def test_dearer_power_worse_buildings_and_dearer_machines_never_make_tokens_cheaper(energy, operation, cost, speed, more):
    joules = energy_per_token(energy, 4, operation.utilisation)

    def usd(cost=cost, **changes):
        return usd_per_Mtok(cost=cost, energy_per_token=joules, tokens_per_second=speed, operation=replace(operation, **changes))

    assert usd(usd_per_kWh=operation.usd_per_kWh * more) >= usd()
    assert usd(pue=operation.pue * more) >= usd()
    assert usd(cost=cost * more) >= usd()
    assert usd(years=operation.years * more) <= usd()


@given(energies, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_idle_time_costs_static_power_and_nothing_else(energy, one, other):
    low, high = sorted((one, other))
    assert energy_per_token(energy, 8, high) <= energy_per_token(energy, 8, low)
    still = replace(energy, static=np.float64(0))
    assert energy_per_token(still, 8, high) == energy_per_token(still, 8, low)
    assert energy_per_token(energy, 8) == energy.total / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utilisation": 0}, "utilisation must be a number above 0"),
        ({"utilisation": 1.5}, "utilisation must be at most 1, not 1.5"),
        ({"years": -1}, "years must be a number above 0"),
        ({"usd_per_kWh": -0.1}, "usd_per_kWh must be a number at least 0"),
        ({"pue": 0.9}, "pue must be at least 1, not 0.9"),
        ({"pue": float("nan")}, "pue must be a number above 0"),
    ],
)
def test_impossible_operations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(OPERATION, **changes)


def test_what_is_assumed_of_the_operation_is_listed():
    texts = ("utilisation 0.5", "use 5 years", "electricity 0.1 USD/kWh", "PUE 1.56")
    assert assumptions(SYSTEM, ASSUMED_OPERATION)[-4:] == texts
    sourced = replace(ASSUMED_OPERATION, usd_per_kWh_source="our contract of 2025", pue_source="measured in 2024")
    assert assumptions(SYSTEM, sourced)[-2:] == texts[:2]


# Kernel mapping


@pytest.mark.parametrize("granularity", ["kv_head", "query_head"])
def test_the_flops_of_a_plan_are_those_of_the_workload(granularity):
    """By query head the K and V projections of split groups are done twice, so there may be more, and are not fewer."""
    workload = Workload(llm=LLAMA2_70B, batch=8, context=512)
    problem = KernelMappingProblem.build(H2M2_SYSTEM, workload, granularity=granularity)
    cost = problem.evaluate(TableMapping().solve(problem).unwrap())
    flops = sum(count * sum(kernel.flops for kernel in listed) for count, listed in kernels(workload))
    assert sum(cost.flops) >= flops * (1 - SUMS)
    if granularity == "kv_head":
        assert sum(cost.flops) == pytest.approx(flops, rel=SUMS)
    assert cost.link_bytes == (0.0, 0.0)
    table = step_flops(workload, granularity, 2)
    assert (table[:, :, 0] == 0).all()


def test_data_that_stream_cross_links_and_are_worked_on_at_their_end():
    """All on the expander behind the LPDDR: every byte crosses the link, and the LPDDR chip does all FLOPs."""
    workload = Workload(llm=LLAMA2_70B, batch=8, context=512)
    problem = KernelMappingProblem.build(H2M2_CXL_SYSTEM, workload)
    plan = KernelMappingPlan.same_in_all_layers(problem, [(0, 0, kind.slices) for kind in problem.kinds])
    cost = problem.evaluate(plan)
    ways = [(link.source, link.target) for link in H2M2_CXL_SYSTEM.links]
    assert dict(zip(ways, cost.link_bytes, strict=True))["CXL", "LPDDR"] == cost.traffic[2] == sum(cost.link_bytes)
    assert cost.flops[0] == cost.flops[2] == 0.0
    energy = step_energy(H2M2_CXL_SYSTEM, traffic=cost.traffic, flops=cost.flops, link_bytes=cost.link_bytes, latency=cost.latency)
    assert energy.links == pytest.approx(cost.traffic[2] * 48e-12, rel=SUMS)
    assert energy.without == ()


# Scores


def test_the_columns_of_a_mapping_are_those_of_its_plan():
    workload = Workload(llm=LLAMA2_70B, batch=8, context=512)
    score = MappingScore(workload=workload, operation=OPERATION)
    row = score(H2M2_SYSTEM)
    problem = KernelMappingProblem.build(H2M2_SYSTEM, workload)
    cost = problem.evaluate(TableMapping().solve(problem).unwrap())
    energy = step_energy(H2M2_SYSTEM, traffic=cost.traffic, flops=cost.flops, link_bytes=cost.link_bytes, latency=cost.latency)
    assert row["energy_J"] == energy.total > cost.energy
    assert row["power_W"] == energy.total / cost.latency
    assert row["throughput_tok_per_s"] == 8 / cost.latency
    assert row["energy_J_per_tok"] == energy_per_token(energy, 8, 0.5) > energy.total / 8
    assert row["system_usd"] == system_cost(H2M2_SYSTEM).total > row["memory_usd"] == H2M2_SYSTEM.memory_cost
    assert row["area_mm2"] == pytest.approx(800, rel=SUMS)
    assert (row["energy_without"], row["usd_without"], row["area_without"]) == ("", "", "")
    held = {name: (room - used) / GB for name, room, used in zip(cost.tier_names, cost.capacity, cost.tier_bytes, strict=True)}
    assert (row["HBM_headroom_GB"], row["LPDDR_headroom_GB"]) == (held["HBM"], held["LPDDR"])
    assert 0 <= row["HBM_headroom_GB"] < 96
    expected = usd_per_Mtok(
        cost=row["system_usd"], energy_per_token=row["energy_J_per_tok"], tokens_per_second=8 / cost.latency, operation=OPERATION
    )
    assert row["usd_per_Mtok"] == expected
    assert score.batch([H2M2_SYSTEM]) == [row]


def test_the_columns_of_many_designs_are_those_of_each():
    """Bit for bit, with a table of designs priced at once; a step of no time has no power, and its tokens cost electricity."""
    systems = Systems.from_columns(
        H2M2_SYSTEM, {"HBM_capacity_GB": [8, 96, 77.7], "HBM chip_area_mm2": [1, 2, 3.3], "LPDDR_energy_pJ_per_bit": [1, 4.5, 7]}
    )
    traffic, latency = np.array([[1e9, 2e9], [3.3e9, 0], [7e8, 1e10]]), np.array([0.1, 0.033, 0.0])
    work = {"flops": traffic * 7, "link_bytes": traffic / 3}
    energy = step_energy(systems, traffic=traffic, latency=latency, **work)
    columns = priced_columns(systems, energy, latency=latency, tokens=np.array([8, 9, 10]), operation=OPERATION)
    for i in range(3):
        one = step_energy(systems[i], traffic=traffic[i], latency=latency[i], **{name: value[i] for name, value in work.items()})
        alone = priced_columns(systems[i], one, latency=latency[i], tokens=8 + i, operation=OPERATION)
        assert alone.keys() == columns.keys()
        for name, value in alone.items():
            assert value == columns[name] if isinstance(value, str) else value == np.broadcast_to(columns[name], 3)[i], name
    assert columns["power_W"][2] == np.inf
    assert single(alone)["power_W"] is None
    assert columns["usd_per_Mtok"][2] == usd_per_Mtok(
        cost=0.0, energy_per_token=columns["energy_J_per_tok"][2], tokens_per_second=1.0, operation=OPERATION
    )


def test_columns_whose_main_number_is_unknown_are_left_out_and_other_gaps_are_named():
    score = MappingScore(workload=Workload(llm=LLAMA2_70B, batch=8, context=512))
    row = score(H2M2_SYSTEM.with_tier("LPDDR", energy=None))
    assert not {"energy_J", "energy_J_per_tok", "power_W", "usd_per_Mtok"} & set(row)
    assert "system_usd" in row
    row = score(H2M2_SYSTEM.with_tier("LPDDR", cost=None))
    assert not {"memory_usd", "system_usd", "usd_per_Mtok"} & set(row)
    row = score(H2M2_SYSTEM.with_unit("HBM chip", energy=None, area=None))
    assert (row["energy_without"], row["usd_without"], row["area_without"]) == ("HBM chip energy", "HBM chip cost", "HBM chip area")
    assert row["area_mm2"] == pytest.approx(400, rel=SUMS)


def test_more_of_a_price_never_makes_a_design_cheaper():
    score = MappingScore(workload=Workload(llm=LLAMA2_70B, batch=8, context=512), operation=OPERATION)
    row = score(H2M2_SYSTEM)
    for dearer in (
        H2M2_SYSTEM.with_tier("HBM", cost=30 / GB),
        H2M2_SYSTEM.with_tier("HBM", energy=1e-10),
        H2M2_SYSTEM.with_unit("HBM chip", static_power=100.0),
        H2M2_SYSTEM.with_unit("LPDDR chip", cost=500.0),
    ):
        assert score(dearer)["usd_per_Mtok"] > row["usd_per_Mtok"]
        assert score(dearer)["latency_s"] == row["latency_s"]


@pytest.mark.parametrize("system", [RTX4090_SYSTEM, T4_SYSTEM], ids=lambda system: system.name)
def test_the_columns_of_an_offloading_design(system):
    """The GPU does all FLOPs, those of recomputation among them; the disk holds nothing, so its unknown energy is not missed."""
    workload = Workload(llm=OPT_6_7B, batch=8, context=256, weight_bits=16, kv_bits=16, activation_bits=16)
    row = OffloadScore(operation=OPERATION)((system, workload))
    assert row["energy_without"] == row["usd_without"] == ""
    assert row["area_without"] == "CPU area"
    assert row["usd_per_Mtok"] > 0
    gpu = system.units[0]
    flops = sum(count * sum(kernel.flops for kernel in listed) for count, listed in kernels(workload))
    assert row["energy_J_per_tok"] * workload.batch > flops * gpu.energy
    assert 0 <= row["host_headroom_GB"] <= system.tiers[1].capacity / GB


def test_the_work_of_an_offloading_step_by_hand():
    """Keys and values of a token in a layer are recomputed with 4 h n_kv d FLOP; what the host sends crosses the link to the GPU."""
    workload = Workload(llm=OPT_6_7B, batch=8, context=256, weight_bits=16, kv_bits=16, activation_bits=16)
    none, half = (step_work(T4_SYSTEM, workload, 1e9, share) for share in (0.0, 0.5))
    llm = OPT_6_7B
    assert none["flops"][0] == sum(count * sum(kernel.flops for kernel in listed) for count, listed in kernels(workload))
    recomputed = 4 * llm.hidden_size * llm.num_kv_heads * llm.head_dim * llm.num_hidden_layers * 8 * 128
    assert half["flops"][0] - none["flops"][0] == pytest.approx(recomputed, rel=1e-9)  # a small difference of large sums
    assert half["flops"][1:] == [0.0, 0.0]
    ways = [(link.source, link.target) for link in T4_SYSTEM.links]
    assert dict(zip(ways, half["link_bytes"], strict=True)) == {way: 1e9 * (way == ("host", "GDDR6")) for way in ways}


@pytest.mark.parametrize("which", ["mapping", "offload"])
def test_a_row_of_an_operation_is_priced_again_from_its_files(tmp_path, which):
    workload = Workload(llm=OPT_6_7B, batch=8, context=256, weight_bits=16, kv_bits=16, activation_bits=16)
    mapping = which == "mapping"
    score = MappingScore(workload=workload, operation=OPERATION) if mapping else OffloadScore(operation=OPERATION)

    def design(trial):
        size = trial.suggest_int("fast_GB", 16, 48) * GB
        return H2M2_SYSTEM.with_tier("HBM", capacity=size) if mapping else (RTX4090_SYSTEM.with_tier("GDDR6X", capacity=size), workload)

    objectives = [Objective("latency_s"), Objective("usd_per_Mtok")]
    found = explore(design, score, objectives, trials=4, seed=0, settings=score.settings(), progress=False)
    again = rerun(write_csv(tmp_path / "front.csv", found), 0).set_index("column")
    for column in ("latency_s", "usd_per_Mtok", "energy_J_per_tok", "system_usd", "power_W", "area_mm2"):
        assert again.loc[column, "written"] == again.loc[column, "again"], column


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_second": -1.0}, r"tokens_per_second must be at least 0 \[1/s\], not -1.0"),
        ({"cost": np.array([3.0, np.nan, -2.0])}, r"cost must be at least 0 \[USD\], not -2.0"),
        ({"energy_per_token": -1e-3}, r"energy_per_token must be at least 0 \[J\], not -0.001"),
    ],
)
def test_money_is_of_numbers_that_can_be(changes, message):
    """A price below 0 would come out as a bargain; unknown numbers stay unknown."""
    given = {"cost": 1e4, "energy_per_token": 0.1, "tokens_per_second": 10.0, "operation": OPERATION}
    with pytest.raises(ValueError, match=message):
        usd_per_Mtok(**(given | changes))
    assert np.isnan(usd_per_Mtok(**(given | {"cost": np.nan})))


def test_energy_is_of_every_tier():
    with pytest.raises(ValueError, match="system 'H2M2' has 2 tiers, not 1; give bytes of each of them"):
        access_energy(H2M2_SYSTEM, [1.0])
