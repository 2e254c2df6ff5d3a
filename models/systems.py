"""Many machines at once: one structure, and arrays of the numbers in which D of them differ.

A column of a table of designs is named after what it replaces, with its unit: ``HBM_capacity_GB``, ``HBM_bandwidth_TBps``,
``LPDDR_cost_USD_per_GB``, ``HBM chip_matrix_peak_TFLOPps``, ``LPDDR_to_HBM_bandwidth_GBps``: the tier, unit or link (source_to_target),
its field in ``hardware``, and a unit of ``units.UNITS`` in which "/s" is written "ps" and any other "/" "_per_".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .hardware import Link, System
from .roofline import Array
from .units import UNITS

DIMENSIONS: dict[str, dict[str, str]] = {
    "tiers": {
        "capacity": "capacity",
        "bandwidth": "bandwidth",
        "latency": "time",
        "page": "capacity",
        "energy": "energy",
        "cost": "price",
        "static_power": "power",
    },
    "units": {
        "matrix_peak": "compute rate",
        "vector_peak": "compute rate",
        "tile": "",
        "energy": "compute energy",
        "static_power": "power",
        "area": "area",
        "cost": "price of a part",
        "silicon_cost": "price of silicon",
    },
    "links": {"bandwidth": "bandwidth", "latency": "time", "efficiency": "", "energy": "energy", "cost": "price of a part"},
}
"""The numbers of a System's parts that designs may vary, with the key of ``UNITS`` that holds their units; "": a number without one."""

_MAY_BE_ZERO = ("capacity", "latency", "energy", "cost", "static_power", "area", "silicon_cost")
_WHOLE = ("page", "tile")


class Place(NamedTuple):
    """One number of a System: ``part`` "tiers", "units" or "links", the part's ``name`` (a link's is source_to_target), its ``field``."""

    part: str
    name: str
    field: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Systems:
    """D machines that are ``base`` but for the numbers in ``columns``: arrays [D] in SI units by place.

    They have one structure: the same tiers, units and links, and data that stream take the same links. ``systems[i]`` is a System, which
    checks its numbers; ``values`` gives them as an array without that.
    """

    base: System
    columns: Mapping[Place, Array]
    designs: int

    def __post_init__(self) -> None:
        places = _places(self.base)
        for place, column in self.columns.items():
            if place not in places:
                raise ValueError(f"system {self.base.name!r} has no number {'_'.join(place[1:])!r}; those it has are {_names(self.base)}")
            if np.shape(column) != (self.designs,):
                raise ValueError(
                    f"{'_'.join(place[1:])} must be one number for each of {self.designs} designs, not of shape {np.shape(column)}"
                )
        self._check_routes()

    @classmethod
    def of(cls, systems: Sequence[System]) -> Systems:
        """Machines that are there already; ValueError unless they differ in nothing but numbers."""
        base = systems[0]
        for system in systems[1:]:
            if _structure(system) != _structure(base):
                raise ValueError(
                    f"systems {base.name!r} and {system.name!r} differ in tiers, units or links; price those of each structure on their own"
                )
        columns = {}
        for place in _places(base):
            column = np.array([_number(system, place) for system in systems], dtype=np.float64)
            if not np.array_equal(column, np.full(len(systems), column[0]), equal_nan=True):
                columns[place] = column
        return cls(base=base, columns=columns, designs=len(systems))

    @classmethod
    def from_columns(cls, base: System, columns: Mapping[str, ArrayLike]) -> Systems:
        """``base`` with the numbers in ``columns``, whose names say what they replace and in which unit (module docstring).

        ValueError, with the way out, for a name that is no number of ``base``, for an unknown unit, and for a number that no machine can
        have, with its row.
        """
        found, number = {}, 1
        for name, given in columns.items():
            place, factor = column_place(base, name)
            values = np.atleast_1d(np.asarray(given, dtype=np.float64))
            if place in found:
                raise ValueError(f"column {name!r} says again what another column says; leave one of them out")
            zero = place.field in _MAY_BE_ZERO
            if not _all_good(values, place.field, factor, zero):
                good = np.array([_all_good(value, place.field, factor, zero) for value in values[:, None]])
                row = int(np.flatnonzero(~good)[0])
                rule = "at least 0" if zero else {"efficiency": "above 0 and at most 1"}.get(place.field, "above 0")
                rule = f"{rule}, whole" if place.field in _WHOLE else rule
                raise ValueError(
                    f"column {name!r} must hold finite numbers, {rule}, not {values[row]!r} as in row {row}; correct or drop it"
                )
            found[place], number = values * factor, max(number, len(values))
        return cls(
            base=base, columns={place: np.ascontiguousarray(np.broadcast_to(v, number)) for place, v in found.items()}, designs=number
        )

    def __len__(self) -> int:
        return self.designs

    def __getitem__(self, index: int) -> System:
        """Machine number ``index``."""
        changed: dict[str, Any] = {}
        for part in DIMENSIONS:
            changed[part] = tuple(
                replace(
                    item,
                    **{place.field: _or_none(column[index]) for place, column in self.columns.items() if place[:2] == (part, _name(item))},
                )
                for item in getattr(self.base, part)
            )
        return replace(self.base, **changed)

    def some(self, which: Any) -> Systems:
        """The machines at ``which``: a slice, a mask or indices."""
        columns = {place: column[which] for place, column in self.columns.items()}
        return Systems(base=self.base, columns=columns, designs=len(np.arange(self.designs)[which]))

    def values(self, part: str, field: str) -> Array:
        """A field of all tiers, units or links: [D, parts] in SI units, NaN where unknown; [1, parts] if no design varies it."""
        items = getattr(self.base, part)
        varied = [self.columns.get(Place(part, _name(item), field)) for item in items]
        fixed = [_or_nan(getattr(item, field)) for item in items]
        array = np.empty((self.designs if any(column is not None for column in varied) else 1, len(items)))
        for i, (column, value) in enumerate(zip(varied, fixed, strict=True)):
            array[:, i] = value if column is None else column
        return array

    def _check_routes(self) -> None:
        """Which links data take must not depend on the design: looked at once for each distinct set of link bandwidths."""
        speeds = [column for place, column in self.columns.items() if place.part == "links" and place.field in ("bandwidth", "efficiency")]
        if not speeds or not self.designs or len(self.base.tiers) < 3:
            return
        expected = _structure(self.base)
        for row in np.unique(np.stack(speeds), axis=1, return_index=True)[1].tolist():
            if _structure(self[row]) != expected:
                raise ValueError(f"in row {row} data take faster links than in system {self.base.name!r}; sweep those designs on their own")


def column_place(base: System, name: str) -> tuple[Place, float]:
    """The number of ``base`` that a column called ``name`` replaces, and the factor to SI units; ValueError says which names there are."""
    for place in _places(base):
        stem = f"{place.name}_{place.field}"
        if name == stem or name.startswith(f"{stem}_"):
            units = _column_units(DIMENSIONS[place.part][place.field])
            unit = name[len(stem) + 1 :]
            if unit not in units:
                has = f"has the unit {unit!r}" if unit else "has no unit"
                way = f"{stem}_UNIT with one of {', '.join(units)}" if "" not in units else stem
                raise ValueError(f"column {name!r} {has}; name it {way}")
            return place, units[unit]
    raise ValueError(
        f"column {name!r} is no number of system {base.name!r}; those that can vary are {', '.join(_names(base))}, each with its unit"
    )


@cache
def _column_units(dimension: str) -> dict[str, float]:
    """Factors to SI by the unit's name in a column."""
    if not dimension:
        return {"": 1.0}
    return {unit.replace("/s", "ps").replace("/", "_per_"): factor for unit, factor in UNITS[dimension].items()}


def _all_good(values: Array, field: str, factor: float, zero: bool) -> bool:
    """Whether a machine can have these numbers; one look at the least and the largest, which a NaN becomes, takes a fifth of a mask."""
    least, most = values.min(initial=np.inf), values.max(initial=0.0)
    rates = (least >= 0 if zero else least > 0) and most < np.inf
    return bool(
        rates
        and (field not in _WHOLE or np.array_equal(values * factor, np.floor(values * factor)))
        and (field != "efficiency" or most <= 1)
    )


def _name(item: Any) -> str:
    return f"{item.source}_to_{item.target}" if isinstance(item, Link) else str(item.name)


def _places(base: System) -> list[Place]:
    return [Place(part, _name(item), field) for part, fields in DIMENSIONS.items() for item in getattr(base, part) for field in fields]


def _names(base: System) -> list[str]:
    return [f"{place.name}_{place.field}" for place in _places(base)]


def _number(system: System, place: Place) -> float:
    item = next(item for item in getattr(system, place.part) if _name(item) == place.name)
    return _or_nan(getattr(item, place.field))


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _structure(system: System) -> tuple[object, ...]:
    """What machines must share to be priced as arrays: the names of their parts, and the links that data take."""
    routes = tuple((end, tuple(map(_name, links))) for end, links in map(system.consumer, system.tier_names))
    return (system.tier_names, tuple((unit.name, unit.tier) for unit in system.units), tuple(map(_name, system.links)), routes)


def as_systems(systems: Systems | Iterable[System]) -> Systems:
    """``systems`` as they are, or put into arrays."""
    return systems if isinstance(systems, Systems) else Systems.of(list(systems))
