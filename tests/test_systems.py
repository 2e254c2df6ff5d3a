"""Many machines as arrays: what goes in comes out, names carry units, and what no machine can be is refused in one sentence."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.models import ComputeUnit, KernelMappingTables, Link, MemoryTier, System, Workload
from memsplit.models.presets import H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_7B, RTX4090_SYSTEM, T4_SYSTEM
from memsplit.models.profiles import FIRST_PRINCIPLES
from memsplit.models.systems import DIMENSIONS, Place, Systems, as_systems, column_place
from memsplit.models.units import GB, TB, UNITS, mm2, pJ

sizes = st.floats(1.0, 1e6)
maybe = st.one_of(st.none(), st.floats(0.0, 1e6))


@st.composite
def machines(draw):
    """Machines of one structure, two tiers, a unit on each and a link, with any numbers, unknown ones too."""
    return System(
        name="drawn",
        tiers=tuple(
            MemoryTier(
                name=name,
                capacity=draw(sizes),
                bandwidth=draw(sizes),
                latency=draw(st.floats(0, 1)),
                page=draw(st.integers(1, 4096)),
                energy=draw(maybe),
                cost=draw(maybe),
                static_power=draw(maybe),
            )
            for name in ("A", "B")
        ),
        units=tuple(
            ComputeUnit(
                name=f"on {name}",
                tier=name,
                matrix_peak=draw(sizes),
                vector_peak=draw(sizes),
                tile=draw(st.one_of(st.none(), st.integers(1, 256))),
                energy=draw(maybe),
                static_power=draw(maybe),
                area=draw(maybe),
                cost=draw(maybe),
                silicon_cost=draw(maybe),
            )
            for name in ("A", "B")
        ),
        links=(
            Link(
                source="A",
                target="B",
                bandwidth=draw(sizes),
                latency=draw(st.floats(0, 1)),
                efficiency=draw(st.floats(0.1, 1.0)),
                energy=draw(maybe),
                cost=draw(maybe),
            ),
        ),
    )


@given(st.lists(machines(), min_size=1, max_size=4))
@settings(max_examples=60)
def test_machines_come_out_as_they_went_in(listed):
    systems = Systems.of(listed)
    assert len(systems) == len(listed)
    assert [systems[i] for i in range(len(listed))] == listed
    assert as_systems(systems) is systems
    assert list(map(as_systems(listed).__getitem__, range(len(listed)))) == listed


@given(machines(), st.data())
@settings(max_examples=30)
def test_some_are_those_that_were_asked_for(machine, data):
    listed = [replace(machine, tiers=(replace(machine.tiers[0], cost=float(i)), machine.tiers[1])) for i in range(5)]
    systems = Systems.of(listed)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
    picked = data.draw(st.lists(st.integers(0, 4), max_size=6))
    for which, expected in ((slice(1, 4), listed[1:4]), (mask, [m for m, on in zip(listed, mask, strict=True) if on])):
        some = systems.some(which)
        assert [some[i] for i in range(len(some))] == expected
    some = systems.some(np.array(picked, dtype=np.int64))
    assert [some[i] for i in range(len(some))] == [listed[i] for i in picked]


def test_every_number_of_a_part_can_vary():
    """All fields but names, and the sources of numbers."""
    for part, cls in (("tiers", MemoryTier), ("units", ComputeUnit), ("links", Link)):
        names = {field.name for field in fields(cls)} - {"name", "tier", "source", "target"}
        assert set(DIMENSIONS[part]) == {name for name in names if not name.endswith("_source")}


@pytest.mark.parametrize(("part", "field"), [(part, field) for part, dimensions in DIMENSIONS.items() for field in dimensions])
def test_every_number_has_a_column_in_each_of_its_units(part, field):
    item = {"tiers": "LPDDR", "units": "LPDDR chip", "links": "LPDDR_to_HBM"}[part]
    dimension = DIMENSIONS[part][field]
    for unit, factor in UNITS[dimension].items() if dimension else [("", 1.0)]:
        name = f"{item}_{field}_{unit.replace('/s', 'ps').replace('/', '_per_')}".removesuffix("_")
        assert column_place(H2M2_SYSTEM, name) == (Place(part, item, field), factor)
        value = 0.5 if field == "efficiency" else 4.0  # a whole number of bytes in every unit
        if unit in ("J/B", "J/FLOP", "USD/B"):  # so many that no machine has them
            value = 2.0**-40
        systems = Systems.from_columns(H2M2_SYSTEM, {name: [value, value]})
        assert systems.values(part, field)[:, 1].tolist() == [value * factor] * 2
        assert getattr(getattr(systems[1], part)[1], field) == value * factor
        assert systems[0] == systems[1] != H2M2_SYSTEM


def test_columns_become_machines():
    systems = Systems.from_columns(
        H2M2_SYSTEM,
        {
            "HBM_capacity_GB": [48, 96],
            "LPDDR_bandwidth_GBps": 272,
            "HBM chip_energy_pJ_per_FLOP": [1, 2],
            "HBM chip_area_mm2": [100, 200],
            "HBM chip_silicon_cost_USD_per_mm2": [0.5, 1],
            "HBM_to_LPDDR_cost_USD": [0, 9],
        },
    )
    first, second = systems[0], systems[1]
    assert [first.tier("HBM").capacity, second.tier("HBM").capacity] == [48 * GB, 96 * GB]
    assert first.tier("LPDDR").bandwidth == second.tier("LPDDR").bandwidth == 272 * GB
    unit = second.units[0]
    assert (unit.energy, unit.area, unit.silicon_cost) == (2 * pJ, 200 * mm2, 1 / mm2)
    assert [link.cost for link in second.links] == [9.0, 0.0]
    assert first.units[1] == H2M2_SYSTEM.units[1]


def test_values_have_an_axis_of_designs_only_where_one_varies():
    systems = Systems.from_columns(H2M2_SYSTEM, {"HBM_bandwidth_TBps": [1, 2, 3]})
    assert systems.values("tiers", "bandwidth").tolist() == [[n * TB, 544 * GB] for n in (1, 2, 3)]
    assert systems.values("tiers", "capacity").shape == (1, 2)
    assert np.isnan(systems.values("units", "cost")).all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"HBM_capacity": [1.0]}, "column 'HBM_capacity' has no unit; name it HBM_capacity_UNIT with one of B, kB, MB, GB"),
        ({"HBM_capacity_TBps": [1.0]}, "column 'HBM_capacity_TBps' has the unit 'TBps'; name it HBM_capacity_UNIT"),
        ({"HBM chip_tile_rows": [1.0]}, "column 'HBM chip_tile_rows' has the unit 'rows'; name it HBM chip_tile"),
        ({"DDR_capacity_GB": [1.0]}, "column 'DDR_capacity_GB' is no number of system 'H2M2'; those that can vary are HBM_capacity"),
        ({"HBM_bandwidth_TBps": [1.0, np.nan]}, r"finite numbers, above 0, not .*nan.* as in row 1; correct or drop it"),
        ({"HBM_bandwidth_TBps": [0.0]}, "above 0, not .*0.0.* as in row 0"),
        ({"HBM_capacity_GB": [-1.0]}, "at least 0, not .*-1.0"),
        ({"HBM chip_static_power_W": [-1.0]}, "at least 0, not .*-1.0"),
        ({"HBM_capacity_GB": [80.0, 1e300]}, r"at least 0, from 1e-300 to 1e\+300 in SI units, not 1e\+300 as in row 1"),
        ({"HBM_bandwidth_TBps": [5e-324]}, r"above 0, from 1e-300 to 1e\+300 in SI units, not 5e-324 as in row 0"),
        ({"HBM chip_energy_pJ_per_FLOP": [np.inf]}, "finite numbers, at least 0, not inf as in row 0"),
        ({"HBM_page_B": [4096.0, 2.0**63]}, "column 'HBM_page_B', row 1: .*page must be a whole number"),
        ({"HBM_capacity_GB": np.array([-1.0])}, "at least 0, not -1.0 as in row 0"),
        ({"HBM_page_B": [4096.5]}, "above 0, whole, not .*4096.5"),
        ({"HBM chip_tile": [0.0]}, "above 0, whole, not .*0.0"),
        ({"HBM_to_LPDDR_efficiency": [1.5]}, "above 0 and at most 1, not .*1.5"),
        ({"HBM_capacity_GB": [1.0], "HBM_capacity_GiB": [1.0]}, "'HBM_capacity_GiB' says again what another column says"),
    ],
)
def test_bad_columns_are_named_with_the_rule_and_the_row(columns, message):
    with pytest.raises(ValueError, match=message) as refusal:
        Systems.from_columns(H2M2_SYSTEM, columns)
    assert "\n" not in str(refusal.value)


def test_machines_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="differ in tiers, units or links"):
        Systems.of([H2M2_SYSTEM, RTX4090_SYSTEM])
    with pytest.raises(ValueError, match="must be one number for each of 3 designs"):
        Systems(base=H2M2_SYSTEM, columns={Place("tiers", "HBM", "capacity"): np.ones(2)}, designs=3)
    with pytest.raises(ValueError, match="has no number 'DDR_capacity'"):
        Systems(base=H2M2_SYSTEM, columns={Place("tiers", "DDR", "capacity"): np.ones(2)}, designs=2)


def test_designs_in_which_data_take_other_links_are_refused():
    """From the expander to the LPDDR chip directly; a direct link to the HBM chip is as near, and taken once it is the faster one."""
    system = replace(H2M2_CXL_SYSTEM, links=(*H2M2_CXL_SYSTEM.links, Link(source="CXL", target="HBM", bandwidth=10 * GB)))
    assert len(Systems.from_columns(system, {"CXL_to_HBM_bandwidth_GBps": [5, 20, 62]})) == 3
    with pytest.raises(ValueError, match="in row 1 data take faster links than in system 'H2M2 with CXL'"):
        Systems.from_columns(system, {"CXL_to_HBM_bandwidth_GBps": [5, 100]})
    with pytest.raises(ValueError, match="in row 2 data take faster links"):
        Systems.from_columns(system, {"CXL_to_LPDDR_efficiency": [1.0, 0.5, 0.1]})
    with pytest.raises(ValueError, match="differ in tiers, units or links"):
        Systems.of([system, replace(system, links=(*system.links[:-1], replace(system.links[-1], bandwidth=100 * GB)))])


def test_tables_of_columns_are_those_of_the_machines():
    """Bit for bit: a table built from arrays, and one from the machines that these arrays mean."""
    systems = Systems.from_columns(
        H2M2_SYSTEM, {"HBM_bandwidth_TBps": [0.7, 3.1, 2.9], "HBM_capacity_GB": [10, 20, 30], "LPDDR chip_matrix_peak_TFLOPps": [1, 9, 77]}
    )
    workload = Workload(llm=LLAMA2_7B, batch=4, context=100)
    tables = KernelMappingTables.build(systems, workload, profile=FIRST_PRINCIPLES)
    again = KernelMappingTables.build([systems[i] for i in range(3)], workload, profile=FIRST_PRINCIPLES)
    for field in ("seconds", "pages", "traffic", "capacity", "page"):
        assert np.array_equal(*np.broadcast_arrays(getattr(tables, field), getattr(again, field)))


def test_routes_of_arrays_are_those_of_each_machine():
    """By each machine's own ``consumer``, over random speeds of two ways of the same length."""
    system = replace(H2M2_CXL_SYSTEM, links=(*H2M2_CXL_SYSTEM.links, Link(source="CXL", target="HBM", bandwidth=10 * GB)))
    rng = np.random.default_rng(1)
    names = ("CXL_to_HBM_bandwidth_GBps", "CXL_to_LPDDR_bandwidth_GBps", "CXL_to_LPDDR_efficiency")
    base, seen = tuple(system.consumer(tier) for tier in system.tier_names), set()
    for _ in range(40):
        columns = {name: rng.choice([0.25, 0.5, 1.0], 2) * (1 if name.endswith("efficiency") else 60) for name in names}
        machines = [
            replace(
                system,
                links=tuple(
                    replace(
                        link,
                        bandwidth=columns[f"{link.source}_to_{link.target}_bandwidth_GBps"][i] * GB,
                        efficiency=columns["CXL_to_LPDDR_efficiency"][i] if link.target == "LPDDR" else link.efficiency,
                    )
                    if link.source == "CXL"
                    else link
                    for link in system.links
                ),
            )
            for i in range(2)
        ]
        ends = [tuple(machine.consumer(tier)[0] for tier in machine.tier_names) for machine in machines]
        wrong = [i for i, found in enumerate(ends) if found != tuple(end for end, _ in base)]
        seen.add(len(wrong))
        if wrong:
            with pytest.raises(ValueError, match=f"in row {wrong[0]} data take faster links"):
                Systems.from_columns(system, columns)
        else:
            assert len(Systems.from_columns(system, columns)) == 2
    assert seen == {0, 1, 2}


def test_routes_are_looked_at_without_a_machine_for_each_design(monkeypatch):
    """Distinct link speeds are as many as designs, and a System takes a tenth of a millisecond."""
    monkeypatch.setattr(Systems, "__getitem__", None)
    speeds = np.linspace(10, 60, 7)
    assert len(Systems.from_columns(H2M2_CXL_SYSTEM, {"CXL_to_LPDDR_bandwidth_GBps": speeds})) == 7
    system = replace(H2M2_CXL_SYSTEM, links=(*H2M2_CXL_SYSTEM.links, Link(source="CXL", target="HBM", bandwidth=1 * GB)))
    assert len(Systems.from_columns(system, {"CXL_to_LPDDR_bandwidth_GBps": speeds})) == 7


def test_a_column_replaces_one_number_only():
    """Unlike a tier that is resized, whose static power grows with it."""
    refreshed = H2M2_SYSTEM.with_tier("LPDDR", static_power=25.0)
    larger = Systems.from_columns(refreshed, {"LPDDR_capacity_GB": [1024.0]})[0].tier("LPDDR")
    assert larger == replace(refreshed.tier("LPDDR"), capacity=1024 * GB)
    assert larger.static_power < refreshed.with_resized_tier("LPDDR", 1024 * GB).tier("LPDDR").static_power


def test_the_peaks_of_a_t4_are_of_one_precision():
    """FP16: 2560 cores of 1.59 GHz, 2 FLOP an instruction and twice the rate of FP32; the sheet has two digits."""
    assert T4_SYSTEM.units[0].vector_peak == pytest.approx(2560 * 1.59e9 * 2 * 2, rel=0.01)
