"""Memories, compute units and links: the machine on which an LLM is served, as a small graph with checked names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checks import check_name, check_number, shown, whole
from .datasheet import read_sheet
from .units import GB

LARGE = 1e9
"""Bytes, bytes/s and FLOP/s from which on a machine is taken for a real one, whose energy, cost and area must then be possible; numbers
of small machines, as in examples worked by hand, are free."""

MOST_COST, COST_WAY = 1.0, "write USD/GB as cost=15 / GB"
"""USD/B, that is 1e9 USD/GB: an assumption, far beyond any memory that is sold."""

MOST_ACCESS, ACCESS_WAY = 1e-6, "write pJ/bit as energy=3.9 * 8 * pJ"
"""J/B, that is 125,000 pJ/bit: an assumption, far beyond disks and networks."""

MOST_OPERATION, OPERATION_WAY = 1e-3, "write pJ/FLOP as energy=0.5 * pJ"
"""J/FLOP, that of 1 kW for 1 MFLOP/s: an assumption, far beyond processors in use."""

MOST_AREA, AREA_WAY = 100.0, "write mm2 as area=400 * mm2"
"""m2 of silicon in one unit, that of 1,400 wafers of 300 mm: an assumption, far beyond any machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTier:
    """One memory: what it holds, how fast it is read, what an access and a byte of it cost.

    All numbers are in base units, never in those of a data sheet: ``capacity=96 * GB``, ``bandwidth=3 * TB``, ``energy=3.9 * 8 * pJ``,
    ``cost=15 / GB`` for 15 USD/GB, with the constants of ``models.units``.

    ``capacity`` [B], ``bandwidth`` [B/s], ``latency`` [s] of a first access, ``page`` [B] (1: no paging),
    ``energy`` [J/B] of an access, ``cost`` [USD/B] and ``static_power`` [W] of the whole tier while it is on, whatever it does; None
    where unknown. ``energy_source``, ``cost_source`` and ``static_power_source`` say where the number comes from, with a year; one
    that begins with "assumption" is called so in every output that uses it. So it is with the sources of units and links.
    """

    name: str
    capacity: float
    bandwidth: float
    latency: float = 0.0
    page: int = 1
    energy: float | None = None
    cost: float | None = None
    static_power: float | None = None
    energy_source: str = ""
    cost_source: str = ""
    static_power_source: str = ""

    def __post_init__(self) -> None:
        check_name("memory tier", self.name)
        what = f"tier {self.name!r}"
        check_number(what, "capacity", self.capacity, "B", zero=True, infinite=False)
        check_number(what, "bandwidth", self.bandwidth, "B/s")
        check_number(what, "latency", self.latency, "s", zero=True, infinite=False)
        _check_optional(what, self, energy="J/B", cost="USD/B", static_power="W")
        _check_possible(what, "cost", self.cost, MOST_COST, "USD/B", COST_WAY, large=self.capacity)
        _check_possible(what, "energy", self.energy, MOST_ACCESS, "J/B", ACCESS_WAY, large=self.bandwidth)
        object.__setattr__(self, "page", whole(what, "page", self.page, "bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeUnit:
    """A processor that works on the data of the tier it sits on.

    ``matrix_peak`` [FLOP/s] for products of matrices, ``vector_peak`` [FLOP/s] for decode attention. ``tile`` is the number of
    cycles, in rows of input, for which a weight-stationary array is busy with each tile of weights whatever the batch: it
    gives the tile-load floor of ``roofline``. None (a GPU, a CPU): no such floor.

    ``energy`` [J/FLOP], ``static_power`` [W] while it is on, whatever it does, and ``area`` [m2] of its silicon; None where unknown.
    Its price is ``cost`` [USD a device] or, where that is None, ``area`` x ``silicon_cost`` [USD/m2]. Memory is priced on its tier.
    All numbers are in base units: ``matrix_peak=312 * TFLOPS``, ``energy=0.5 * pJ``, ``area=400 * mm2``, ``silicon_cost=0.13 / mm2``.
    """

    name: str
    tier: str
    matrix_peak: float
    vector_peak: float
    tile: int | None = None
    energy: float | None = None
    static_power: float | None = None
    area: float | None = None
    cost: float | None = None
    silicon_cost: float | None = None
    energy_source: str = ""
    static_power_source: str = ""
    area_source: str = ""
    cost_source: str = ""
    silicon_cost_source: str = ""

    def __post_init__(self) -> None:
        check_name("compute unit", self.name)
        what = f"unit {self.name!r}"
        check_number(what, "matrix_peak", self.matrix_peak, "FLOP/s")
        check_number(what, "vector_peak", self.vector_peak, "FLOP/s")
        if self.tile is not None:
            object.__setattr__(self, "tile", whole(what, "tile", self.tile, "rows"))
        _check_optional(what, self, energy="J/FLOP", static_power="W", area="m2", cost="USD", silicon_cost="USD/m2")
        _check_possible(what, "energy", self.energy, MOST_OPERATION, "J/FLOP", OPERATION_WAY, large=self.matrix_peak)
        _check_possible(what, "area", self.area, MOST_AREA, "m2", AREA_WAY, large=self.matrix_peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of a connection between two tiers: ``bandwidth`` [B/s], ``latency`` [s], reached share ``efficiency``;
    ``energy`` [J/B] of a transfer and ``cost`` [USD], None where unknown. Base units: ``bandwidth=64 * GB``, ``energy=6 * 8 * pJ``."""

    source: str
    target: str
    bandwidth: float
    latency: float = 0.0
    efficiency: float = 1.0
    energy: float | None = None
    cost: float | None = None
    energy_source: str = ""
    cost_source: str = ""

    def __post_init__(self) -> None:
        what = f"link {self.source!r} -> {self.target!r}"
        check_number(what, "bandwidth", self.bandwidth, "B/s")
        check_number(what, "latency", self.latency, "s", zero=True, infinite=False)
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"{what}: efficiency must be above 0 and at most 1, not {self.efficiency!r}")
        _check_optional(what, self, energy="J/B", cost="USD")
        _check_possible(what, "energy", self.energy, MOST_ACCESS, "J/B", ACCESS_WAY, large=self.bandwidth)
        if self.source == self.target:
            raise ValueError(f"{what}: a link joins two different tiers; remove it or name another target")


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Tiers (fastest first, by convention), the units that sit on them, and the links between them; names are checked."""

    name: str
    tiers: tuple[MemoryTier, ...]
    units: tuple[ComputeUnit, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        check_name("system", self.name)
        for field in ("tiers", "units", "links"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        tiers = self.tier_names
        if not tiers:
            raise ValueError(f"system {self.name!r} has no memory tier; add at least one")
        if not self.units:
            raise ValueError(f"system {self.name!r} has no compute unit; add at least one, on one of the tiers {list(tiers)}")
        for kind, names in (("tier", tiers), ("unit", tuple(unit.name for unit in self.units))):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"system {self.name!r}: {kind} {twice[0]!r} is there twice; give each {kind} its own name")
        for unit in self.units:
            if unit.tier not in tiers:
                raise ValueError(f"system {self.name!r}: unit {unit.name!r} sits on tier {unit.tier!r}; tiers are {list(tiers)}")
        for link in self.links:
            for end in (link.source, link.target):
                if end not in tiers:
                    raise ValueError(
                        f"system {self.name!r}: link {link.source!r} -> {link.target!r} ends at tier {end!r}; tiers are {list(tiers)}"
                    )
        ways = [(link.source, link.target) for link in self.links]
        for way in ways:
            if ways.count(way) > 1:
                raise ValueError(f"system {self.name!r}: link {way[0]!r} -> {way[1]!r} is there twice; add the bandwidths up")

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Names of the tiers, in order."""
        return tuple(tier.name for tier in self.tiers)

    @property
    def memory_cost(self) -> float:
        """USD of all memory: sum over tiers of capacity [B] x cost [USD/B]; ValueError where a tier has no cost."""
        for tier in self.tiers:
            if tier.cost is None:
                raise ValueError(f"system {self.name!r}: tier {tier.name!r} has no cost; add it to the data sheet with its source")
        return sum(tier.capacity * (tier.cost or 0.0) for tier in self.tiers)

    def tier(self, name: str) -> MemoryTier:
        """The tier of that name; ValueError names the tiers there are."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise ValueError(f"system {self.name!r} has no tier {name!r}; tiers are {list(self.tier_names)}")

    def with_tier(self, name: str, **changes: Any) -> System:
        """This system with some fields of one tier changed, in base units (B, B/s, J/B, USD/B):
        ``system.with_tier("HBM", capacity=48 * GB, cost=15 / GB)``, with the constants of ``models.units``."""
        changed = replace(self.tier(name), **changes)
        return replace(self, tiers=tuple(changed if tier.name == name else tier for tier in self.tiers))

    def with_unit(self, name: str, **changes: Any) -> System:
        """This system with some fields of one compute unit changed, in base units (FLOP/s, J/FLOP, W, m2, USD):
        ``system.with_unit("GPU", matrix_peak=624 * TFLOPS, area=800 * mm2)``."""
        if name not in [unit.name for unit in self.units]:
            raise ValueError(f"system {self.name!r} has no unit {name!r}; units are {[unit.name for unit in self.units]}")
        return replace(self, units=tuple(replace(unit, **changes) if unit.name == name else unit for unit in self.units))

    def with_scaled_unit(self, name: str, factor: float) -> System:
        """This system with ``factor`` times the peaks of one unit, and of its area, cost and static power, as far as they are known."""
        unit = next((one for one in self.units if one.name == name), None)
        scaled = ("matrix_peak", "vector_peak", "area", "cost", "static_power")
        known = {field: value for field in scaled if (value := getattr(unit, field, None)) is not None}
        return self.with_unit(name, **{field: value * factor for field, value in known.items()})

    def with_resized_tier(self, name: str, capacity: float) -> System:
        """This system with another capacity [B] of one tier, and its static power in proportion."""
        tier = self.tier(name)
        power = tier.static_power
        if power is not None and tier.capacity:
            power *= capacity / tier.capacity
        return self.with_tier(name, capacity=capacity, static_power=power)

    def with_page(self, page: int) -> System:
        """This system with pages of ``page`` bytes on every tier; 1 turns paging off."""
        return replace(self, tiers=tuple(replace(tier, page=page) for tier in self.tiers))

    def path(self, source: str, targets: tuple[str, ...]) -> tuple[str, tuple[Link, ...]] | None:
        """The nearest of ``targets`` and the links that data of tier ``source`` cross on their way there; None if there is no way.

        Fewest links first; among those, the fastest bottleneck (bandwidth x efficiency).
        """
        ends: list[tuple[str, tuple[Link, ...]]] = [(source, ())]
        seen = {source}
        while ends:
            arrived = [end for end in ends if end[0] in targets]
            if arrived:
                return max(arrived, key=lambda end: min((link.bandwidth * link.efficiency for link in end[1]), default=math.inf))
            steps = [(link.target, (*links, link)) for tier, links in ends for link in self.links if link.source == tier]
            ends = [step for step in steps if step[0] not in seen]
            seen |= {tier for tier, _ in ends}
        return None

    def consumer(self, source: str) -> tuple[str, tuple[Link, ...]]:
        """The tier whose units work on the data of tier ``source`` (itself, if a unit sits there), and the links in between.

        ValueError if no unit can be reached.
        """
        served = tuple(dict.fromkeys(unit.tier for unit in self.units))
        found = self.path(source, served)
        if found is None:
            raise ValueError(
                f"system {self.name!r}: tier {source!r} has no compute unit and no link that leads to one; "
                f"add a unit on it or a link from {source!r} to one of {list(served)}"
            )
        return found

    @classmethod
    def from_toml(cls, path: str | Path) -> System:
        """Read a data sheet (see ``datasheet``); ValueError names the entry, the rule, the value and the way out."""
        sheet = read_sheet(Path(path))
        try:
            return cls(
                name=sheet["name"],
                tiers=tuple(MemoryTier(**tier) for tier in sheet["tier"]),
                units=tuple(ComputeUnit(**unit) for unit in sheet["unit"]),
                links=tuple(Link(**link) for link in sheet["link"]),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __str__(self) -> str:
        return f"{self.name} (" + ", ".join(f"{t.name} {t.capacity / GB:g} GB {t.bandwidth / GB:g} GB/s" for t in self.tiers) + ")"


def _check_optional(what: str, item: object, **units: str) -> None:
    """The fields named in ``units`` are None, or finite numbers of at least 0 in that unit."""
    for field, unit in units.items():
        if getattr(item, field) is not None:
            check_number(what, field, getattr(item, field), unit, zero=True, infinite=False)


def _check_possible(what: str, field: str, value: float | None, most: float, unit: str, way_out: str, *, large: float) -> None:
    """ValueError for a number above ``most``, which can only be one of another unit, if the machine's own is ``LARGE``."""
    if value is not None and value > most and large >= LARGE:
        raise ValueError(f"{what}: {field} must be at most {most:g} [{unit}], which no machine reaches, not {shown(value)}; {way_out}")
