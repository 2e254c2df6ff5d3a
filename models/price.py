"""Energy, money and area of a System, joules and USD a token, and which of the numbers behind them are assumptions.

    step      J     sum_t energy_t bytes_t + sum_t energy_t' FLOP_t + sum_l energy_l bytes_l + P latency     P = sum of static powers
    machine   USD   sum_t cost_t capacity_t + sum_u (cost_u, or area_u x silicon_cost_u) + sum_l cost_l
    token     J     (moving energy + P latency / utilisation) / tokens
              USD   machine / (years x utilisation x tokens/s) + J x pue x price of a J

t: tiers, u: units, l: links. All are functions of arrays that broadcast, with a leading axis of designs where there are several; terms
are added in a fixed order, so that a batch equals its singles bit for bit. A constant that the data sheet lacks is left out of a sum, and
the result names it in ``without``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_number
from .hardware import Link, System
from .roofline import Array
from .systems import Systems
from .units import GB, YEAR, kWh, mm2, pJ


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepEnergy:
    """J of a step by term: accesses to ``memory``, ``compute``, ``links``, and ``static`` power over the latency of the step.

    Arrays that broadcast over designs. ``without``: the constants that were needed and are unknown, left out of the terms.
    """

    memory: Array
    compute: Array
    links: Array
    static: Array
    without: tuple[str, ...] = ()

    @property
    def moving(self) -> Array:
        """J that the work of the step takes, whatever its latency."""
        return self.memory + self.compute + self.links

    @property
    def total(self) -> Array:
        """J of all terms."""
        return self.moving + self.static


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SystemCost:
    """USD of a machine by part, arrays that broadcast over designs; ``without``: what has no price, left out."""

    memory: Array
    units: Array
    links: Array
    without: tuple[str, ...] = ()

    @property
    def total(self) -> Array:
        """USD of all parts."""
        return self.memory + self.units + self.links


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SystemArea:
    """m2 of the units' silicon (memories are not counted); ``without``: units whose area is unknown, left out."""

    units: Array
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """How a machine is operated: what turns its price and its joules into USD a token.

    ``utilisation``: share of the time in which it serves, idle in the rest. ``years`` over which its price is spread. ``usd_per_kWh`` of
    electricity, ``pue``: power drawn by the building over power of the machine. Each with its source, which may be an "assumption".
    """

    utilisation: float
    years: float
    usd_per_kWh: float
    pue: float
    utilisation_source: str = ""
    years_source: str = ""
    usd_per_kWh_source: str = ""
    pue_source: str = ""

    def __post_init__(self) -> None:
        for field, rule in (("utilisation", "share"), ("years", "years"), ("pue", "W/W")):
            check_number("operation", field, getattr(self, field), rule, infinite=False)
        check_number("operation", "usd_per_kWh", self.usd_per_kWh, "USD/kWh", zero=True, infinite=False)
        if self.utilisation > 1:
            raise ValueError(f"operation: utilisation must be at most 1, not {self.utilisation!r}; it is a share of the time")
        if self.pue < 1:
            raise ValueError(f"operation: pue must be at least 1, not {self.pue!r}; a building draws no less than its machines")


ASSUMED_OPERATION = Operation(
    utilisation=0.5,
    years=5.0,
    usd_per_kWh=0.10,
    pue=1.56,
    utilisation_source="assumption: half of the time, a round number",
    years_source="assumption: annual reports of large cloud companies spread servers over 4 to 6 years (2020 to 2024)",
    usd_per_kWh_source="assumption: order of magnitude of industrial and commercial rates in the USA, 2024",
    pue_source="assumption: average of the Uptime Institute Global Data Center Survey 2024; large sites reach 1.1 to 1.2",
)
"""What is assumed of the operation of a machine where nothing else is said."""


def access_energy(system: System, traffic: Sequence[float]) -> float:
    """J to access ``traffic`` [B, one per tier]: sum of bytes x energy [J/B]. Static power, links and compute are left out.

    ValueError where a tier that is accessed has no energy, and for another number of tiers.
    """
    if len(traffic) != len(system.tiers):
        raise ValueError(f"system {system.name!r} has {len(system.tiers)} tiers, not {len(traffic)}; give bytes of each of them")
    joules = 0.0
    for tier, nbytes in zip(system.tiers, traffic, strict=True):
        if nbytes and tier.energy is None:
            raise ValueError(f"system {system.name!r}: tier {tier.name!r} has no energy; add it to the data sheet with its source")
        joules += nbytes * (tier.energy or 0.0)
    return joules


def step_energy(
    system: System | Systems,
    *,
    traffic: ArrayLike,
    latency: ArrayLike,
    flops: ArrayLike | None = None,
    link_bytes: ArrayLike | None = None,
) -> StepEnergy:
    """J of a step that accesses ``traffic`` [..., T] bytes, takes ``latency`` [...] seconds, does ``flops`` [..., T] on the units of each
    tier and sends ``link_bytes`` [..., L] over each link; None: unknown, and said so in ``without``.

    Units on one tier share its FLOPs in proportion to their matrix peak. With ``Systems`` the leading axis is that of the designs.
    """
    base = system.base if isinstance(system, Systems) else system
    memory, no_memory = _weighted(_values(system, "tiers", "energy"), traffic, [f"{tier.name} energy" for tier in base.tiers])
    compute: Array = np.zeros(())
    links: Array = np.zeros(())
    no_compute: tuple[str, ...] = ("compute",)
    no_links: tuple[str, ...] = ("links",) if base.links else ()
    if flops is not None:
        compute, no_compute = _weighted(flop_energy(system), flops, [_unit_names(base, tier.name) + " energy" for tier in base.tiers])
    if link_bytes is not None:
        links, no_links = _weighted(_values(system, "links", "energy"), link_bytes, [f"{_label(link)} energy" for link in base.links])
    watts, no_watts = static_power(system)
    seconds = np.asarray(latency, dtype=np.float64)
    return StepEnergy(
        memory=memory, compute=compute, links=links, static=watts * seconds, without=(*no_memory, *no_compute, *no_links, *no_watts)
    )


def static_power(system: System | Systems) -> tuple[Array, tuple[str, ...]]:
    """W that tiers and units take while they are on, whatever they do; and those whose static power is unknown, left out."""
    base = system.base if isinstance(system, Systems) else system
    tiers, no_tiers = _weighted(_values(system, "tiers", "static_power"), 1.0, [f"{tier.name} static power" for tier in base.tiers])
    units, no_units = _weighted(_values(system, "units", "static_power"), 1.0, [f"{unit.name} static power" for unit in base.units])
    return tiers + units, (*no_tiers, *no_units)


def system_cost(system: System | Systems) -> SystemCost:
    """USD of memories, units and links; a unit without ``cost`` is priced at its area x ``silicon_cost``."""
    base = system.base if isinstance(system, Systems) else system
    device = _values(system, "units", "cost")
    device = np.where(np.isnan(device), _values(system, "units", "area") * _values(system, "units", "silicon_cost"), device)
    memory, no_memory = _weighted(
        _values(system, "tiers", "cost"), _values(system, "tiers", "capacity"), [f"{tier.name} cost" for tier in base.tiers]
    )
    units, no_units = _weighted(device, 1.0, [f"{unit.name} cost" for unit in base.units])
    links, no_links = _weighted(_values(system, "links", "cost"), 1.0, [f"{_label(link)} cost" for link in base.links])
    return SystemCost(memory=memory, units=units, links=links, without=(*no_memory, *no_units, *no_links))


def system_area(system: System | Systems) -> SystemArea:
    """m2 of the units' silicon."""
    base = system.base if isinstance(system, Systems) else system
    area, without = _weighted(_values(system, "units", "area"), 1.0, [f"{unit.name} area" for unit in base.units])
    return SystemArea(units=area, without=without)


def mean_power(energy: ArrayLike, latency: ArrayLike) -> Array:
    """W over a step of ``energy`` [J] and ``latency`` [s]: what a limit on power is compared with."""
    return _at_least_0("energy", energy, "J") / _at_least_0("latency", latency, "s")


def energy_per_token(energy: StepEnergy, tokens: ArrayLike, utilisation: ArrayLike = 1.0) -> Array:
    """J a token of steps that give ``tokens`` each, the static power of the idle time included.

    (moving + static / utilisation) / tokens: a machine that is busy half of its time waits as long as it works.
    """
    share = _at_least_0("utilisation", utilisation, "share of the time")
    return (energy.moving + energy.static / share) / _at_least_0("tokens", tokens, "tokens of a step")


def usd_per_Mtok(*, cost: ArrayLike, energy_per_token: ArrayLike, tokens_per_second: ArrayLike, operation: Operation) -> Array:
    """USD a million tokens: the machine's price over all tokens of its years, and electricity.

    ``cost`` [USD], ``energy_per_token`` [J] at the machine, idle time included, ``tokens_per_second`` while it serves:

        1e6 (cost / (years utilisation tokens/s) + J pue USD/kWh / 3.6e6)
    """
    served = operation.years * YEAR * operation.utilisation * _at_least_0("tokens_per_second", tokens_per_second, "1/s")
    electricity = _at_least_0("energy_per_token", energy_per_token, "J") * operation.pue * operation.usd_per_kWh / kWh
    return 1e6 * (_at_least_0("cost", cost, "USD") / served + electricity)


def assumptions(system: System, operation: Operation | None = None) -> tuple[str, ...]:
    """The numbers of a system and its operation that no source backs, as "HBM cost 15 USD/GB", for the outputs that use them.

    Parts with the same number are named together: "HBM chip, LPDDR chip area 400 mm2".
    """
    found: dict[tuple[str, str], list[str]] = {}
    for part, items in (("tier", system.tiers), ("unit", system.units), ("link", system.links)):
        for item in items:
            for field, factor, unit in _SHOWN[part]:
                value = getattr(item, field)
                if value is not None and _assumed(getattr(item, f"{field}_source")):
                    name = _label(item) if isinstance(item, Link) else item.name
                    found.setdefault((part, f"{field.replace('_', ' ')} {value / factor:g} {unit}"), []).append(name)
    texts = [f"{', '.join(names)} {text}" for (_, text), names in found.items()]
    if operation is not None:
        for name, what, unit in (
            ("utilisation", "utilisation", ""),
            ("years", "use", " years"),
            ("usd_per_kWh", "electricity", " USD/kWh"),
            ("pue", "PUE", ""),
        ):
            if _assumed(getattr(operation, f"{name}_source")):
                texts.append(f"{what} {getattr(operation, name):g}{unit}")
    return tuple(texts)


_SHOWN = {
    "tier": (("cost", 1 / GB, "USD/GB"), ("energy", 8 * pJ, "pJ/bit"), ("static_power", 1.0, "W")),
    "unit": (
        ("energy", pJ, "pJ/FLOP"),
        ("static_power", 1.0, "W"),
        ("area", mm2, "mm2"),
        ("cost", 1.0, "USD"),
        ("silicon_cost", 1 / mm2, "USD/mm2"),
    ),
    "link": (("energy", 8 * pJ, "pJ/bit"), ("cost", 1.0, "USD")),
}
"""The fields with a source, and the unit in which they are named."""


def _at_least_0(name: str, given: ArrayLike, unit: str) -> Array:
    """Numbers that may be 0, infinite or unknown (NaN), but not below 0."""
    values = np.asarray(given, dtype=np.float64)
    least = values.min(initial=np.inf)  # NaN if there is one
    if not least >= 0 and (values < 0).any():
        raise ValueError(f"{name} must be at least 0 [{unit}], not {np.nanmin(values).item()!r}; correct it")
    return values


def _assumed(source: str) -> bool:
    return not source or source.lower().startswith("assum")


def _label(link: Link) -> str:
    return f"{link.source}_to_{link.target}"


def _unit_names(base: System, tier: str) -> str:
    return ", ".join(unit.name for unit in base.units if unit.tier == tier) or tier


def _values(system: System | Systems, part: str, field: str) -> Array:
    """A field of all tiers, units or links, NaN where unknown: [parts] of a System, [D or 1, parts] of ``Systems``."""
    if isinstance(system, Systems):
        return system.values(part, field)
    return np.array([np.nan if (value := getattr(item, field)) is None else value for item in getattr(system, part)], dtype=np.float64)


def flop_energy(system: System | Systems) -> Array:
    """J/FLOP of the units on each tier together, [..., T]; NaN without a unit, or where one's energy is unknown."""
    base = system.base if isinstance(system, Systems) else system
    energy, peak = _values(system, "units", "energy"), _values(system, "units", "matrix_peak")
    energy, peak = np.broadcast_arrays(energy, peak)
    rates = []
    for tier in base.tiers:
        here = [u for u, unit in enumerate(base.units) if unit.tier == tier.name]
        if len(here) == 1:
            rates.append(energy[..., here[0]])
            continue
        share = np.where(np.isinf(peak).any(axis=-1, keepdims=True), np.isinf(peak), peak)
        joules, peaks = np.zeros(peak.shape[:-1]), np.zeros(peak.shape[:-1])
        for u in here:
            joules, peaks = joules + energy[..., u] * share[..., u], peaks + share[..., u]
        rates.append(joules / peaks if here else np.full(peak.shape[:-1], np.nan))
    return np.stack(rates, axis=-1)


def _weighted(constants: Array, amounts: ArrayLike, names: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """Sum over the last axis of constant x amount in the order of ``names``, and the names of unknown constants with an amount.

    A constant that only some of the designs lack is left out of those, and named.
    """
    amount = np.asarray(amounts, dtype=np.float64)
    if amount.ndim and amount.shape[-1] != len(names):
        raise ValueError(f"amounts of shape {amount.shape} do not fit {len(names)} parts: {', '.join(names)}; give one for each")
    amount = np.broadcast_to(amount, np.broadcast_shapes(amount.shape, constants.shape[-1:]))
    total, without = np.zeros(np.broadcast_shapes(amount.shape[:-1], constants.shape[:-1])), []
    for i, name in enumerate(names):
        unknown = np.isnan(constants[..., i])
        if np.any(unknown & (amount[..., i] != 0)):
            without.append(name)
        total = total + np.where(unknown, 0.0, constants[..., i]) * amount[..., i]
    return total, tuple(without)
