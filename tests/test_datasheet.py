"""Data sheets: those that memsplit ships, and what is said of bad ones: one sentence with file, entry and what is wrong."""

import dataclasses
import math
import re
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memsplit.models import System
from memsplit.models.presets import DATA, SYSTEMS
from memsplit.models.units import UNITS, quantity

GOOD = """
name = "mine"

[[tier]]
name = "HBM"
capacity = "80 GB"
bandwidth = "3.35 TB/s"
latency = "100 ns"
page = "2 MiB"
energy = "3.9 pJ/bit"
cost = "15 USD/GB"
static_power = "12 W"

[[tier]]
name = "CPU"
capacity = "0.5 TiB"
bandwidth = "300 GB/s"

[[unit]]
name = "GPU"
tier = "HBM"
matrix_peak = "990 TFLOP/s"
vector_peak = "67 TFLOP/s"
energy = "0.6 pJ/FLOP"
static_power = "80 W"
area = "814 mm2"
silicon_cost = "0.2 USD/mm2"
cost = "900 USD"

[[link]]
source = "CPU"
target = "HBM"
bandwidth = "64 GB/s"
efficiency = 0.8
energy = "6 pJ/bit"
cost = "30 USD"
"""


def read(folder: Path, text: str | bytes) -> System:
    path = folder / "sheet.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return System.from_toml(path)


def test_a_sheet_is_read_into_si_units(tmp_path):
    system = read(tmp_path, GOOD)
    hbm, cpu = system.tiers
    assert (hbm.capacity, hbm.bandwidth, hbm.page) == (80e9, 3.35e12, 2 * 2**20)
    assert (hbm.latency, hbm.energy, hbm.cost) == pytest.approx((100e-9, 8 * 3.9e-12, 15e-9), rel=1e-12)
    assert (cpu.capacity, cpu.page, cpu.energy, cpu.cost) == (2**39, 1, None, None)
    assert (system.units[0].matrix_peak, system.units[0].tile) == (990e12, None)
    assert (system.links[0].bandwidth, system.links[0].latency, system.links[0].efficiency) == (64e9, 0.0, 0.8)
    gpu, link = system.units[0], system.links[0]
    assert (hbm.static_power, gpu.energy, gpu.static_power) == pytest.approx((12, 0.6e-12, 80), rel=1e-12)
    assert (gpu.area, gpu.silicon_cost, gpu.cost) == pytest.approx((814e-6, 0.2e6, 900), rel=1e-12)
    assert (link.energy, link.cost, cpu.static_power) == (pytest.approx(48e-12, rel=1e-12), 30, None)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sheets_load_and_name_their_sources(path):
    """Every energy, price and area says where it comes from, with a year, or that it is assumed."""
    system = System.from_toml(path)
    assert SYSTEMS[path.stem] == system
    assert tomllib.loads(path.read_text(encoding="utf-8"))["source"]
    for part in (*system.tiers, *system.units, *system.links):
        for field in [field.name for field in dataclasses.fields(part) if field.name.endswith("_source")]:
            source = getattr(part, field)
            assert (getattr(part, field.removesuffix("_source")) is None) == (not source), f"{part}: {field}"
            assert not source or source.startswith("assumption") or re.search(r"\b20\d\d\b", source), f"{part}: {field}"
    for tier in system.tiers:
        assert system.consumer(tier.name)


HBM_BANDWIDTH, HBM_CAPACITY = 'bandwidth = "3.35 TB/s"', 'capacity = "80 GB"'
NESTED = "x = " + "[" * 5_000_000
BAD = {
    "unknown key": (HBM_CAPACITY, HBM_CAPACITY + '\ncolour = "red"', ["tier 'HBM'", "'colour'", "capacity"]),
    "unknown key of the sheet": ('name = "mine"', 'name = "mine"\ncolour = "red"', ["data sheet", "'colour'"]),
    "misspelt key": (HBM_CAPACITY, 'capcity = "80 GB"', ["tier 'HBM'", "capcity"]),
    "missing key": (HBM_CAPACITY, "", ["tier 'HBM'", "'capacity'"]),
    "missing unit": (HBM_CAPACITY, 'capacity = "80"', ["tier 'HBM'", "capacity", "'80'", "no unit"]),
    "bare number": (HBM_CAPACITY, "capacity = 80", ["tier 'HBM'", "capacity", "80 has no unit"]),
    "bare bandwidth": (HBM_BANDWIDTH, "bandwidth = 3.35e12", ["tier 'HBM'", "bandwidth", "no unit"]),
    "unit of another dimension": (HBM_BANDWIDTH, 'bandwidth = "3.35 TB"', ["tier 'HBM'", "bandwidth", "'TB'", "no unit of bandwidth"]),
    "unknown unit": (HBM_CAPACITY, 'capacity = "80 Gb"', ["tier 'HBM'", "capacity", "'Gb'"]),
    "negative bandwidth": (HBM_BANDWIDTH, 'bandwidth = "-3 TB/s"', ["tier 'HBM'", "bandwidth", "-3"]),
    "zero bandwidth": (HBM_BANDWIDTH, 'bandwidth = "0 TB/s"', ["tier 'HBM'", "bandwidth", "not 0.0"]),
    "negative capacity": (HBM_CAPACITY, 'capacity = "-80 GB"', ["tier 'HBM'", "capacity", "-80"]),
    "not a number": (HBM_CAPACITY, "capacity = nan", ["tier 'HBM'", "capacity", "nan"]),
    "a text that is no number": (HBM_CAPACITY, 'capacity = "nan GB"', ["tier 'HBM'", "capacity", "nan GB"]),
    "infinite capacity": (HBM_CAPACITY, 'capacity = "inf GB"', ["tier 'HBM'", "capacity", "finite", "inf"]),
    "too large a capacity": (HBM_CAPACITY, 'capacity = "1e400 GB"', ["tier 'HBM'", "capacity", "1e400 GB", "too large"]),
    "a page of half a byte": ('page = "2 MiB"', 'page = "0.5 B"', ["tier 'HBM'", "page", "0.5"]),
    "an infinite page": ('page = "2 MiB"', 'page = "inf B"', ["tier 'HBM'", "page", "inf"]),
    "unit on a tier that does not exist": ('tier = "HBM"', 'tier = "HBN"', ["unit 'GPU'", "'HBN'", "['HBM', 'CPU']"]),
    "link to a tier that does not exist": ('target = "HBM"', 'target = "HBN"', ["'CPU' -> 'HBN'", "['HBM', 'CPU']"]),
    "area without a unit": ('area = "814 mm2"', 'area = "814"', ["unit 'GPU'", "area", "no unit"]),
    "a price a byte where one a device is asked": ('cost = "900 USD"', 'cost = "900 USD/GB"', ["unit 'GPU'", "cost", "'USD/GB'"]),
    "an energy a byte of a unit": ('energy = "0.6 pJ/FLOP"', 'energy = "0.6 pJ/bit"', ["unit 'GPU'", "energy", "'pJ/bit'"]),
    "negative power": ('static_power = "12 W"', 'static_power = "-12 W"', ["tier 'HBM'", "static_power", "-12"]),
    "infinite cost": ('cost = "30 USD"', 'cost = "inf USD"', ["'CPU' -> 'HBM'", "cost", "inf"]),
    "link to itself": ('target = "HBM"', 'target = "CPU"', ["'CPU' -> 'CPU'", "different"]),
    "efficiency above 1": ("efficiency = 0.8", "efficiency = 1.8", ["'CPU' -> 'HBM'", "efficiency", "1.8"]),
    "efficiency with a unit": ("efficiency = 0.8", 'efficiency = "80 %"', ["CPU -> HBM", "efficiency", "80 %"]),
    "two tiers of one name": ('name = "CPU"', 'name = "HBM"', ["tier 'HBM'", "twice"]),
    "a tier without a name": ('name = "CPU"\n', "", ["tier number 2", "'name'"]),
    "an empty name": ('name = "CPU"', 'name = ""', ["memory tier", "name", "''"]),
    "a number for a name": ('name = "CPU"', "name = 3", ["tier", "name", "3"]),
    "a tier list that is a table": ("[[tier]]", "[tier]", ["sheet.toml"]),
    "a tile that is a text": ('vector_peak = "67 TFLOP/s"', 'vector_peak = "67 TFLOP/s"\ntile = "128"', ["unit 'GPU'", "tile", "128"]),
    "a tile of zero": ('vector_peak = "67 TFLOP/s"', 'vector_peak = "67 TFLOP/s"\ntile = 0', ["unit 'GPU'", "tile", "0"]),
}


def one_sentence(refusal: pytest.ExceptionInfo) -> str:
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize("what", BAD)
def test_a_bad_entry_is_named_with_file_object_and_value(tmp_path, what):
    old, new, parts = BAD[what]
    assert old in GOOD
    with pytest.raises(ValueError, match=r"sheet\.toml") as refusal:
        read(tmp_path, GOOD.replace(old, new, GOOD.count(old) if what.endswith("table") else 1))
    message = one_sentence(refusal)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('name = "mine"\ntier = {name = "HBM"}\nunit = []', ["tier", "list"]),
        ('name = "mine"\ntier = []\nunit = []', ["mine", "no memory tier"]),
        ('name = "mine"\ntier = [3]\nunit = []', ["tier", "3"]),
        ('name = "mine"\ntier = "HBM"\nunit = []', ["tier", "HBM"]),
        ("tier = []\nunit = []", ["'name'"]),
        ("", ["lacks the key"]),
        ("# nothing\n", ["lacks the key"]),
        ("this is no TOML", ["no TOML file", "line 1"]),
        ('name = "mine"\nname = "yours"', ["no TOML file"]),
        (b"\x00\xff\xfe\x80" * 50, ["no TOML file"]),
        (b"\x89PNG\r\n\x1a\n", ["no TOML file"]),
        (NESTED, ["no TOML file"]),
        ("x = " + "{a = " * 100_000, ["no TOML file"]),
        ('name = "mine"\ntier = [' + "'x'," * 500_000 + "]\nunit = []", ["tier"]),
        ('name = "mine"\ntier = "' + "x" * 5_000_000 + '"\nunit = []', ["tier"]),
        ("name = 1" + "0" * 4_000, ["sheet.toml"]),
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, list) else "",
)
def test_a_file_that_is_no_data_sheet_is_refused_in_one_sentence(tmp_path, text, parts):
    with pytest.raises(ValueError, match=r"sheet\.toml") as refusal:
        read(tmp_path, text)
    message = one_sentence(refusal)
    for part in parts:
        assert part in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "missing" / "sheet.toml"):
        with pytest.raises(ValueError, match="cannot read the data sheet") as refusal:
            System.from_toml(path)
        assert str(path) in one_sentence(refusal)


def value_or_refusal(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or the message of its ValueError; any other exception is a defect."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


# Quantities


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("96 GB", "capacity", 96e9),
        ("96GB", "capacity", 96e9),
        (" 1.5  TiB ", "capacity", 1.5 * 2**40),
        (".5 kB", "capacity", 500.0),
        ("3e3 MiB/s", "bandwidth", 3e3 * 2**20),
        ("inf GB/s", "bandwidth", math.inf),
        ("32 ns", "time", 32e-9),
        ("-1 us", "time", -1e-6),
        ("131.072 TFLOP/s", "compute rate", 131.072e12),
        ("3.9 pJ/bit", "energy", 31.2e-12),
        ("2 USD/GiB", "price", 2 / 2**30),
        ("0.7 pJ/FLOP", "compute energy", 0.7e-12),
        ("5 mW", "power", 5e-3),
        ("826 mm2", "area", 826e-6),
        ("0.132 USD/mm2", "price of silicon", 132e3),
        ("900 USD", "price of a part", 900.0),
    ],
)
def test_quantities_are_numbers_with_a_unit(text, dimension, value):
    assert quantity(text, dimension) == pytest.approx(value, rel=1e-15)  # one product, rounded


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers())), st.sampled_from(sorted(UNITS)))
@example("1 GB\n", "capacity")
@example("١ GB", "capacity")
@example("infinity GB", "capacity")
@example("1e5 ", "capacity")
def test_anything_is_a_quantity_or_refused_in_one_sentence(text, dimension):
    value, refusal = value_or_refusal(lambda: quantity(text, dimension))
    if refusal:
        assert "\n" not in refusal
        assert repr(text) in refusal
    else:
        assert isinstance(value, float)
        assert not math.isnan(value)


@given(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([(dimension, unit) for dimension, units in UNITS.items() for unit in units]),
    st.sampled_from(["", " ", "   "]),
)
def test_every_number_with_every_unit_is_read_back(number, choice, space):
    dimension, unit = choice
    assert quantity(f"{number!r}{space}{unit}", dimension) == number * UNITS[dimension][unit]


def test_a_long_text_is_refused_at_once():
    """A hundred thousand digits and two words: no backtracking over them."""
    started = time.perf_counter()
    with pytest.raises(ValueError, match="not a number with a unit"):
        quantity("1" * 100_000 + " a b", "capacity")
    assert time.perf_counter() - started < 2.0


values = st.recursive(
    st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.sampled_from(["80 GB", "3 TB/s", "1 TFLOP/s", "HBM"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
KEYS = "name capacity bandwidth page tier matrix_peak vector_peak tile source target efficiency"
tables = st.dictionaries(st.sampled_from(KEYS.split()), values, max_size=6)
sheets = st.dictionaries(st.sampled_from(["name", "tier", "unit", "link", "source"]), st.one_of(values, st.lists(tables, max_size=2)))


def toml_of(value: object) -> str:
    """A TOML value; inline tables and arrays."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            characters = (c for c in value if not 0xD800 <= ord(c) < 0xE000)
            return '"' + "".join(c if c.isalnum() or c in " /." else f"\\U{ord(c):08X}" for c in characters) + '"'
        case dict():
            return "{" + ", ".join(f"{toml_of(key)} = {toml_of(entry)}" for key, entry in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml_of, value)) + "]"
        case _:
            return repr(value)


@given(sheets)
@example({"name": "m", "tier": [{"name": "a\nb"}], "unit": []})
@example({"name": "m", "tier": [{"name": "HBM", "capacity": "8 GB", "bandwidth": "1 GB/s"}], "unit": [], "link": [3]})
def test_any_toml_is_a_system_or_refused_in_one_sentence(sheet_folder, sheet):
    text = "\n".join(f"{key} = {toml_of(value)}" for key, value in sheet.items())
    check_read(sheet_folder, text)


@given(st.integers(0, GOOD.count("\n") - 1), values)
def test_a_good_sheet_with_any_value_in_any_place_is_a_system_or_refused_in_one_sentence(sheet_folder, place, value):
    lines = GOOD.splitlines()
    key, equals, _ = lines[place].partition(" = ")
    if equals:
        lines[place] = f"{key} = {toml_of(value)}"
    check_read(sheet_folder, "\n".join(lines))


def check_read(folder: Path, text: str) -> None:
    system, refusal = value_or_refusal(lambda: read(folder, text))
    if refusal:
        assert "\n" not in refusal
        assert "sheet.toml" in refusal
    else:
        assert system.tiers
        assert system.units


@pytest.fixture(scope="module")
def sheet_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sheets")
