"""Many machines at once: one structure, and arrays of the numbers in which D of them differ.

A column of a table of designs is named after what it replaces, with its unit: ``HBM_capacity_GB``, ``HBM_bandwidth_TBps``,
``LPDDR_cost_USD_per_GB``, ``HBM chip_matrix_peak_TFLOPps``, ``LPDDR_to_HBM_bandwidth_GBps``: the tier, unit or link (source_to_target),
its field in ``hardware``, and a unit of ``units.UNITS`` in which "/s" is written "ps" and any other "/" "_per_".

A column replaces that one number and nothing else. So ``HBM_capacity_GB`` leaves the tier's bandwidth, energy and static power as they
are, while ``System.with_resized_tier`` scales the static power: give ``HBM_static_power_W`` beside it where it grows with the capacity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .checks import shown
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

LEAST, MOST = 1e-300, 1e300
"""What a number must be within in SI units: then its reciprocal and products with a few others are finite and not 0."""


class Place(NamedTuple):
    """One number of a System: ``part`` "tiers", "units" or "links", the part's ``name`` (a link's is source_to_target), its ``field``."""

    part: str
    name: str
    field: str


def place_of(part: str, item: Any, field: str) -> Place:
    """Where ``field`` of a tier, unit or link is."""
    return Place(part, _name(item), field)


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
            values = column_numbers(name, given)
            if place in found:
                raise ValueError(f"column {name!r} says again what another column says; leave one of them out")
            zero = place.field in _MAY_BE_ZERO
            if not _all_good(values, place.field, factor, zero):
                row = next(row for row, value in enumerate(values[:, None]) if not _all_good(value, place.field, factor, zero))
                rule = "at least 0" if zero else {"efficiency": "above 0 and at most 1"}.get(place.field, "above 0")
                rule = f"{rule}, whole" if place.field in _WHOLE else rule
                value = values[row].item()
                if np.isfinite(value) and value > 0 and not LEAST <= value * factor <= MOST:
                    rule = f"{rule}, from {LEAST:g} to {MOST:g} in SI units"
                raise ValueError(f"column {name!r} must hold finite numbers, {rule}, not {value!r} as in row {row}; correct or drop it")
            found[place], number = values * factor, max(number, len(values))
            _check_ends(base, place, found[place], name)
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
        """Which links data take must not depend on the design; it can only where several ways of as few links lead to a unit."""
        varied = any(place.part == "links" and place.field in ("bandwidth", "efficiency") for place in self.columns)
        if not varied or not self.designs or len(self.base.tiers) < 3:
            return
        speeds = self.values("links", "bandwidth") * self.values("links", "efficiency")
        for tier in self.base.tier_names:
            ways = _ways(self.base, tier)
            if len(ways) < 2:
                continue
            taken = ways.index(self.base.consumer(tier)[1])
            slowest = np.stack([speeds[:, [self.base.links.index(link) for link in way]].min(axis=1) for way in ways])
            other = slowest.argmax(axis=0) != taken  # the first of equals, as in ``System.path``
            if other.any():
                row = int(other.argmax())
                raise ValueError(f"in row {row} data take faster links than in system {self.base.name!r}; sweep those designs on their own")


def column_numbers(name: str, given: Any, rule: str = "numbers") -> Array:
    """A column of a table as float64 [D]; ValueError names the first row that is no number (``rule``: what the column must hold).

    Texts, truth values and missing ones are none, even where NumPy would convert them.
    """
    array = _as_array(name, given, rule)
    if array.dtype.kind not in "iuf" and array.size:
        # The values as they were given say more than what NumPy made of them.
        for row, value in enumerate(given if isinstance(given, (list, tuple)) else np.atleast_1d(array).tolist()):
            if not _is_number(value):
                raise ValueError(f"column {name!r} must hold {rule}, not {_said(value)} as in row {row}; correct or drop it")
    elif isinstance(given, (list, tuple)):
        for row, value in enumerate(given):  # [True, 2] would become whole numbers
            if isinstance(value, (bool, np.bool_)):
                raise ValueError(f"column {name!r} must hold {rule}, not {_said(value)} as in row {row}; correct or drop it")
    try:
        return np.atleast_1d(array.astype(np.float64, copy=False))
    except OverflowError:
        row = next(row for row, value in enumerate(np.atleast_1d(array).tolist()) if abs(value) >= 2**1024)
        raise ValueError(f"column {name!r} must hold {rule}, below 1.8e308, not as in row {row}; correct or drop it") from None


def _as_array(name: str, given: Any, rule: str) -> Any:
    """``given`` as an array of at most one dimension, without masked values."""
    if np.ma.is_masked(given):
        row = int(np.flatnonzero(np.ma.getmaskarray(given))[0])
        raise ValueError(f"column {name!r} must hold {rule}, and row {row} has none: it is missing; correct or drop it")
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, OverflowError):  # rows of several lengths
        raise ValueError(f"column {name!r} must hold {rule}, one a row, not {shown(given)}; correct or drop it") from None
    if array.ndim > 1:
        raise ValueError(f"column {name!r} must hold {rule}, one a row, not an array of shape {array.shape}; correct or drop it")
    return array


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _said(value: Any) -> str:
    missing = value is None or type(value).__name__ in ("NAType", "NaTType")
    return "a missing value" if missing else shown(value.item() if isinstance(value, np.generic) else value)


def _check_ends(base: System, place: Place, values: Array, name: str) -> None:
    """Have the part itself check the least and the largest of a column's numbers [SI], as its rules are ranges."""
    item = next(item for item in getattr(base, place.part) if _name(item) == place.name)
    for row in dict.fromkeys((int(values.argmin()), int(values.argmax()))) if len(values) else ():
        try:
            replace(item, **{place.field: values[row].item()})
        except ValueError as error:
            raise ValueError(f"column {name!r}, row {row}: {error}") from None


def _ways(system: System, source: str) -> list[tuple[Link, ...]]:
    """All ways of fewest links from tier ``source`` to one with a unit, in the order in which ``System.path`` finds them."""
    served = {unit.tier for unit in system.units}
    ends: list[tuple[str, tuple[Link, ...]]] = [(source, ())]
    seen = {source}
    while ends and not any(tier in served for tier, _ in ends):
        steps = [(link.target, (*links, link)) for tier, links in ends for link in system.links if link.source == tier]
        ends = [step for step in steps if step[0] not in seen]
        seen |= {tier for tier, _ in ends}
    return [links for tier, links in ends if tier in served]


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
    least, most = values.min(initial=np.inf).item(), values.max(initial=0.0).item()
    rates = (least >= 0 if zero else least * factor >= LEAST) and most * factor <= MOST
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
