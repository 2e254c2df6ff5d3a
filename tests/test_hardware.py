"""Memories, units, links and systems: names and numbers are checked at birth, variants leave the original alone, ways are the nearest."""

import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import two_sided

from memsplit.models import ComputeUnit, Link, MemoryTier, System
from memsplit.models.presets import H2M2_CXL_SYSTEM, H2M2_SYSTEM, HBM_8_SYSTEM, LPDDR_ONLY_SYSTEM
from memsplit.models.price import access_energy, assumptions
from memsplit.models.units import GB, MiB, mm2, pJ

TIER = {"name": "HBM", "capacity": 96 * GB, "bandwidth": 3e12}
UNIT = {"name": "chip", "tier": "HBM", "matrix_peak": 1e14, "vector_peak": 1e13}
LINK = {"source": "HBM", "target": "LPDDR", "bandwidth": 1e11}

BAD_FIELDS = [
    *[(MemoryTier, TIER, "capacity", value) for value in (-1, math.nan, math.inf, "96 GB", None, True)],
    *[(MemoryTier, TIER, "bandwidth", value) for value in (0, -1, math.nan, "3 TB/s")],
    *[(MemoryTier, TIER, "latency", value) for value in (-1e-9, math.nan, math.inf)],
    *[(MemoryTier, TIER, "energy", value) for value in (-1, math.nan, math.inf)],
    *[(MemoryTier, TIER, "cost", value) for value in (-1, math.nan, math.inf)],
    *[(MemoryTier, TIER, "static_power", value) for value in (-1, math.nan, math.inf, "10 W", True)],
    *[
        (ComputeUnit, UNIT, field, value)
        for field in ("energy", "static_power", "area", "cost", "silicon_cost")
        for value in (-1, math.nan)
    ],
    *[(Link, LINK, field, value) for field in ("energy", "cost") for value in (-1, math.inf)],
    *[(MemoryTier, TIER, "page", value) for value in (0, -4096, 1.5, math.nan, math.inf, "2 MiB", True)],
    *[(ComputeUnit, UNIT, "matrix_peak", value) for value in (0, -1, math.nan)],
    *[(ComputeUnit, UNIT, "vector_peak", value) for value in (0, -1, math.nan)],
    *[(ComputeUnit, UNIT, "tile", value) for value in (0, -1, 1.5, math.nan, math.inf)],
    *[(Link, LINK, "bandwidth", value) for value in (0, -1, math.nan)],
    *[(Link, LINK, "latency", value) for value in (-1, math.inf)],
    *[(Link, LINK, "efficiency", value) for value in (0, 1.1, -1, math.nan)],
]


@pytest.mark.parametrize(("cls", "fields", "field", "value"), BAD_FIELDS)
def test_impossible_numbers_are_refused_with_object_field_and_value(cls, fields, field, value):
    with pytest.raises(ValueError, match=f"{field} must be") as refusal:
        cls(**{**fields, field: value})
    message = str(refusal.value)
    assert repr(value) in message
    assert "\n" not in message
    assert all(name in message for name in ([fields["source"], fields["target"]] if cls is Link else [fields["name"]]))


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_things_need_names(name):
    for thing in (MemoryTier(**TIER), ComputeUnit(**UNIT), H2M2_SYSTEM):
        with pytest.raises(ValueError, match="needs a name"):
            replace(thing, name=name)


@pytest.mark.parametrize("number", [np.float64(5e9), np.int64(5_000_000_000), np.float32(5e9), 5_000_000_000])
def test_numbers_may_come_from_numpy(number):
    """As they do in a sweep."""
    system = H2M2_SYSTEM.with_tier("HBM", capacity=number, bandwidth=number)
    assert system.tier("HBM").capacity == system.tier("HBM").bandwidth == 5e9


def test_infinite_bandwidth_and_no_capacity_are_possible():
    assert MemoryTier(**{**TIER, "bandwidth": math.inf, "capacity": 0}).capacity == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiers": ()}, "has no memory tier"),
        ({"units": ()}, "has no compute unit"),
        ({"tiers": H2M2_SYSTEM.tiers * 2}, "tier 'HBM' is there twice"),
        ({"units": H2M2_SYSTEM.units * 2}, "unit 'HBM chip' is there twice"),
        ({"units": (ComputeUnit(**{**UNIT, "tier": "DDR"}),)}, r"unit 'chip' sits on tier 'DDR'; tiers are \['HBM', 'LPDDR'\]"),
        ({"links": (Link(**{**LINK, "target": "DDR"}),)}, r"link 'HBM' -> 'DDR' ends at tier 'DDR'; tiers are \['HBM', 'LPDDR'\]"),
        ({"links": (Link(**LINK), Link(**LINK))}, "link 'HBM' -> 'LPDDR' is there twice"),
    ],
)
def test_impossible_systems_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        replace(H2M2_SYSTEM, **changes)
    assert "'H2M2'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_link_joins_two_tiers():
    with pytest.raises(ValueError, match="a link joins two different tiers"):
        Link(**{**LINK, "target": "HBM"})


def test_systems_are_frozen_values():
    with pytest.raises(FrozenInstanceError):
        H2M2_SYSTEM.name = "mine"
    assert pickle.loads(pickle.dumps(H2M2_SYSTEM)) == H2M2_SYSTEM
    assert isinstance(replace(H2M2_SYSTEM, tiers=list(H2M2_SYSTEM.tiers)).tiers, tuple)
    assert hash(H2M2_SYSTEM) == hash(replace(H2M2_SYSTEM))


def test_variants_change_what_they_name_and_nothing_else():
    system = H2M2_SYSTEM.with_tier("HBM", capacity=48 * GB).with_unit("LPDDR chip", tile=None)
    assert system.tier("HBM") == replace(H2M2_SYSTEM.tier("HBM"), capacity=48 * GB)
    assert system.tier("LPDDR") == H2M2_SYSTEM.tier("LPDDR")
    assert [unit.tile for unit in system.units] == [128, None]
    assert H2M2_SYSTEM.tier("HBM").capacity == 96 * GB
    assert [tier.page for tier in H2M2_SYSTEM.with_page(4096).tiers] == [4096, 4096]


def test_variants_refuse_names_that_are_not_there():
    for use, names in ((H2M2_SYSTEM.with_tier, "LPDDR"), (H2M2_SYSTEM.tier, "LPDDR"), (H2M2_SYSTEM.with_unit, "LPDDR chip")):
        with pytest.raises(ValueError, match=f"'H2M2' has no .* 'DDR'.*{names}"):
            use("DDR")
    with pytest.raises(ValueError, match="capacity must be"):
        H2M2_SYSTEM.with_tier("HBM", capacity=-1)


# Ways


def test_data_are_worked_on_where_they_lie_or_at_the_nearest_unit():
    assert H2M2_CXL_SYSTEM.consumer("HBM") == ("HBM", ())
    end, links = H2M2_CXL_SYSTEM.consumer("CXL")
    assert (end, [(link.source, link.target) for link in links]) == ("LPDDR", [("CXL", "LPDDR")])


def test_a_way_takes_the_fewest_links_and_then_the_fastest_bottleneck():
    """start -> slow -> end, start -> fast -> end, start -> a -> b -> end: two links by the fast way; efficiency counts."""
    names = ("start", "slow", "fast", "a", "b", "end")
    tiers = tuple(MemoryTier(**{**TIER, "name": name}) for name in names)
    speeds = {("start", "slow"): 10, ("slow", "end"): 99, ("start", "fast"): 20, ("fast", "end"): 20}
    speeds |= {("start", "a"): 999, ("a", "b"): 999, ("b", "end"): 999}
    links = tuple(Link(source=source, target=target, bandwidth=speed) for (source, target), speed in speeds.items())
    system = System(name="graph", tiers=tiers, units=(ComputeUnit(**{**UNIT, "tier": "end"}),), links=links)
    end, way = system.path("start", ("end",))
    assert (end, [link.target for link in way]) == ("end", ["fast", "end"])
    inefficient = replace(
        system, links=tuple(replace(link, efficiency=0.1) if "fast" in (link.source, link.target) else link for link in links)
    )
    assert [link.target for link in inefficient.path("start", ("end",))[1]] == ["slow", "end"]
    assert system.path("end", ("start",)) is None
    assert system.path("start", ("start",)) == ("start", ())


def test_data_without_a_way_to_a_unit_are_refused():
    stranded = replace(H2M2_CXL_SYSTEM, links=tuple(link for link in H2M2_CXL_SYSTEM.links if link.source != "CXL"))
    with pytest.raises(ValueError, match="tier 'CXL' has no compute unit and no link that leads to one; add") as refusal:
        stranded.consumer("CXL")
    assert "\n" not in str(refusal.value)


# Money and energy


def test_memory_cost_is_gigabytes_times_price():
    """96 GB x 15 + 512 GB x 5 USD/GB: 4000 USD."""
    assert H2M2_SYSTEM.memory_cost == pytest.approx(4000, rel=1e-12)
    with pytest.raises(ValueError, match="tier 'fast' has no cost; add it"):
        _ = two_sided().memory_cost


def test_energy_is_bytes_times_joules_per_byte():
    """1 GB at 3.9 and 2 GB at 4.5 pJ/bit: 8e9 x (3.9 + 9) pJ."""
    assert access_energy(H2M2_SYSTEM, [1e9, 2e9]) == pytest.approx(8e9 * 12.9e-12, rel=1e-12)
    with pytest.raises(ValueError, match="tier 'fast' has no energy; add it"):
        access_energy(two_sided(), [1.0, 0.0])
    assert access_energy(two_sided(), [0.0, 0.0]) == 0.0


@given(st.lists(st.booleans(), min_size=4, max_size=4))
def test_what_no_source_backs_is_called_an_assumption(sourced):
    """A price or an energy without a source, or with one that begins with "assumption"; links and units here have no numbers."""
    sources = ["J. Doe, A Memory, 2024" if known else "assumption: a guess" for known in sourced]
    plain = replace(H2M2_SYSTEM, units=(ComputeUnit(**UNIT),), links=())
    system = plain.with_tier("HBM", cost_source=sources[0], energy_source=sources[1], static_power=None)
    system = system.with_tier("LPDDR", cost_source=sources[2], energy_source=sources[3] if sourced[3] else "", static_power=None)
    texts = ["HBM cost 15 USD/GB", "HBM energy 3.9 pJ/bit", "LPDDR cost 5 USD/GB", "LPDDR energy 4.5 pJ/bit"]
    assert assumptions(system) == tuple(text for text, known in zip(texts, sourced, strict=True) if not known)


def test_assumptions_about_units_and_links_are_named_with_their_units():
    unit = ComputeUnit(**UNIT, energy=0.5e-12, static_power=7, area=400e-6, silicon_cost=2e5)
    system = replace(
        H2M2_SYSTEM,
        tiers=tuple(replace(tier, cost=None, energy=None, static_power=3.0) for tier in H2M2_SYSTEM.tiers),
        units=(unit, replace(unit, name="other", cost=12, cost_source="a list, 2024", area_source="a white paper, 2024")),
        links=(Link(**LINK, energy=8e-12, cost=5),),
    )
    assert assumptions(system) == (
        "HBM, LPDDR static power 3 W",
        "chip, other energy 0.5 pJ/FLOP",
        "chip, other static power 7 W",
        "chip area 400 mm2",
        "chip, other silicon cost 0.2 USD/mm2",
        "HBM_to_LPDDR energy 1 pJ/bit",
        "HBM_to_LPDDR cost 5 USD",
    )


def test_published_machines_are_what_the_paper_says():
    """H2M2, arXiv 2504.14893: 96 GB at 3 TB/s and 512 GB at 544 GB/s, four cores of 128 x 128 at 1 GHz a chip, 960 GB/s between."""
    assert [(tier.capacity, tier.bandwidth, tier.page) for tier in H2M2_SYSTEM.tiers] == [
        (96 * GB, 3000 * GB, 2 * MiB),
        (512 * GB, 544 * GB, 2 * MiB),
    ]
    chips = [*H2M2_SYSTEM.units, *LPDDR_ONLY_SYSTEM.units, *HBM_8_SYSTEM.units]
    assert {(unit.matrix_peak, unit.vector_peak, unit.tile) for unit in chips} == {(4 * 128 * 128 * 2e9, 4 * 32 * 128 * 2e9, 128)}
    assert {link.bandwidth for link in H2M2_SYSTEM.links} == {960 * GB}
    assert HBM_8_SYSTEM.tiers[0].bandwidth == 8 * H2M2_SYSTEM.tiers[0].bandwidth
    assert len(LPDDR_ONLY_SYSTEM.units) == 2
    assert str(H2M2_SYSTEM) == "H2M2 (HBM 96 GB 3000 GB/s, LPDDR 512 GB 544 GB/s)"


UNIT_ERRORS = {
    "15 USD/GB as 15": (lambda: H2M2_SYSTEM.with_tier("HBM", cost=15), "tier 'HBM': cost must be at most 1 .USD/B.*cost=15 / GB"),
    "3.9 pJ/bit as 3.9": (lambda: H2M2_SYSTEM.with_tier("HBM", energy=3.9), "tier 'HBM': energy .*energy=3.9 . 8 . pJ"),
    "0.5 pJ/FLOP as 0.5": (lambda: H2M2_SYSTEM.with_unit("HBM chip", energy=0.5), "unit 'HBM chip': energy .*energy=0.5 . pJ"),
    "400 mm2 as 400": (lambda: H2M2_SYSTEM.with_unit("HBM chip", area=400), "unit 'HBM chip': area .*area=400 . mm2"),
    "6 pJ/bit as 6": (lambda: replace(H2M2_SYSTEM.links[0], energy=6), "link .*: energy .*energy=3.9 . 8 . pJ"),
}


@pytest.mark.parametrize(("build", "sentence"), UNIT_ERRORS.values(), ids=UNIT_ERRORS)
def test_a_number_of_another_unit_is_refused_with_what_to_write(build, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        build()
    assert "\n" not in str(refusal.value)


def test_what_a_refusal_says_to_write_is_taken_and_small_machines_are_free():
    """Numbers worked by hand, as of 10 B at 2 J/B, stay; so does all that real machines have."""
    tier = H2M2_SYSTEM.with_tier("HBM", cost=15 / GB, energy=3.9 * 8 * pJ).tier("HBM")
    assert (tier.cost * GB, tier.energy) == pytest.approx((15, 31.2e-12))
    assert H2M2_SYSTEM.with_unit("HBM chip", energy=0.5 * pJ, area=46_225 * mm2).units[0].area == pytest.approx(0.046225), "a wafer"
    assert MemoryTier(name="toy", capacity=10.0, bandwidth=1.0, energy=2.0, cost=3.0).cost == 3.0
