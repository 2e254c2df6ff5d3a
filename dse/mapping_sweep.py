"""The exact kernel mapping of designs in a table: two memories, one split for all layers of a kind, solved as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.hardware import System
from ..models.kernel_mapping import computed_flops, step_flops, streamed_bytes
from ..models.kernel_mapping_tables import Granularity, KernelMappingTables
from ..models.price import step_energy, system_cost
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.systems import Systems, column_place
from ..models.units import GB
from ..models.workload import Workload
from ..solvers.kernel_mapping import TableMapping

WORKLOAD_COLUMNS = {"batch": 1, "context": 0}
"""Columns beside those of a System, whole numbers, and the least that each may be."""

CHUNK = 512
"""Designs whose tables are held at once: some 5 kB each for 96 slices, which together stay in the cache of a core."""

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingSweep:
    """An array score: columns of designs in, columns of their exact kernel mapping out (``TableMapping``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch`` and ``context`` (``workload``'s, if there is no column). Designs of
    each distinct workload are priced together.

    Columns out: latency_s of a step; throughput_tok_per_s; n_SUBLAYER: slices on the first tier; energy_J of the step under that plan,
    left out where a memory has no energy, with ``energy_without``: the terms whose constants are unknown; memory_usd, left out where a
    memory has no cost; TIER_headroom_GB: whole pages left; ``feasible`` and ``reason``. Numbers are NaN where nothing fits. A row equals
    ``TableMapping().solve`` of its design to the last bit.
    """

    system: System
    workload: Workload
    profile: Profile = FIRST_PRINCIPLES
    granularity: Granularity = "kv_head"

    def __post_init__(self) -> None:
        if len(self.system.tiers) != 2:
            raise ValueError(
                f"MappingSweep takes two memories, and system {self.system.name!r} has {len(self.system.tiers)}: "
                f"{list(self.system.tier_names)}; solve such designs one by one with PatternMapping"
            )

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {name: getattr(self, name) for name in ("system", "workload", "profile", "granularity")}

    def __call__(self, columns: Mapping[str, Any]) -> Columns:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        designs = _designs(columns)
        whole = {name: _whole(name, columns[name]) for name in WORKLOAD_COLUMNS if name in columns}
        numbers = {name: column for name, column in columns.items() if name not in WORKLOAD_COLUMNS}
        if not designs:  # names and units are checked, and there is nothing to price
            for name in numbers:
                column_place(self.system, name)
            return {name: column[:0] for name, column in self({}).items()}
        systems = Systems.from_columns(self.system, numbers)
        if len(systems) != designs:
            systems = Systems(base=self.system, columns={}, designs=designs)
        solver = TableMapping().for_batch(designs)
        found: Columns = {}
        for workload, rows in self._workloads(whole, designs):
            for first in range(0, len(rows), CHUNK):
                some = rows[first : first + CHUNK]
                for name, column in self._priced(systems.some(some), workload, solver).items():
                    found.setdefault(name, np.empty(designs, dtype=column.dtype))[some] = column
        return found

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine and the workload of a row; columns that are no design columns are passed over."""
        numbers = {name: [value] for name, value in row.items() if self._is_number(name)}
        system = Systems.from_columns(self.system, numbers)[0] if numbers else self.system
        whole: dict[str, Any] = {name: int(_whole(name, [row[name]])[0]) for name in WORKLOAD_COLUMNS if name in row}
        return system, replace(self.workload, **whole)

    def _workloads(self, whole: Columns, designs: int) -> Iterator[tuple[Workload, NDArray[np.int64]]]:
        """Each distinct workload and the rows that have it."""
        if not whole:
            yield self.workload, np.arange(designs)
            return
        values = np.stack(list(whole.values()), axis=1)
        if self.workload.phase == "prefill" and "context" in whole and whole["context"].min() < 1:
            row = int(np.argmin(whole["context"]))
            raise ValueError(f"context is 0 in row {row}, and a prefill needs a token; give at least 1, or decode")
        distinct, which = np.unique(values, axis=0, return_inverse=True)
        order = np.argsort(which.ravel(), kind="stable")
        ends = np.searchsorted(which.ravel()[order], np.arange(len(distinct) + 1))
        for i, pair in enumerate(distinct):
            changes: dict[str, Any] = dict(zip(whole, map(int, pair), strict=True))
            yield replace(self.workload, **changes), order[ends[i] : ends[i + 1]]

    def _priced(self, systems: Systems, workload: Workload, solver: TableMapping) -> Columns:
        """Result columns of one workload."""
        tables = KernelMappingTables.build(systems, workload, profile=self.profile, granularity=self.granularity)
        latency, counts = solver.solve_batch(tables)
        fits = np.isfinite(latency)
        rows, kinds, tiers = np.arange(len(fits)), range(len(tables.kinds)), range(len(tables.tier_names))
        work = step_flops(workload, self.granularity, len(tiers))
        held = np.zeros((len(fits), len(tiers)), dtype=np.int64)
        traffic, flops = np.zeros(held.shape), np.zeros(held.shape)
        for k in kinds:  # in the order of kinds, as ``KernelMappingProblem.evaluate`` adds
            layers = tables.kinds[k].layers
            for t in tiers:
                n = np.maximum(counts[:, k, t], 0)
                held[:, t] += layers * tables.pages[rows, k, t, n]
                traffic[:, t] += layers * tables.traffic[rows, k, t, n]
                flops[:, t] += layers * work[k, t, n]
        with np.errstate(divide="ignore"):  # a machine without limits takes no time
            found: Columns = {"latency_s": latency, "throughput_tok_per_s": workload.tokens / latency}
        for k, kind in enumerate(tables.kinds):
            found[f"n_{kind.name}"] = counts[:, k, 0].astype(np.float64)
        without = ""
        if not np.isnan(systems.values("tiers", "energy")).any():
            energy = step_energy(
                systems,
                traffic=traffic,
                latency=latency,
                flops=computed_flops(self.system, flops),
                link_bytes=streamed_bytes(self.system, traffic),
            )
            found["energy_J"] = energy.total
            without = "; ".join(energy.without)
        if not np.isnan(systems.values("tiers", "cost")).any():
            found["memory_usd"] = np.broadcast_to(system_cost(systems).memory, fits.shape)
        room, used = ((pages * tables.page).astype(np.float64) for pages in (tables.capacity, held))
        for t, name in enumerate(tables.tier_names):
            found[f"{name}_headroom_GB"] = (room[:, t] - used[:, t]) / GB
        if not fits.all():
            found = {name: np.where(fits, column, np.nan) for name, column in found.items()}
        if "energy_J" in found:
            found["energy_without"] = np.full(len(fits), without, dtype=object)
        return {**found, "feasible": fits, "reason": _reasons(tables, workload, fits)}

    def _is_number(self, name: str) -> bool:
        """Whether a column is a number of ``system``."""
        try:
            column_place(self.system, name)
        except ValueError:
            return False
        return True


def _reasons(tables: KernelMappingTables, workload: Workload, fits: NDArray[np.bool_]) -> NDArray[Any]:
    """Why nothing fits [D], "" where something does, by the rule of ``KernelMappingProblem.explain_infeasible``."""
    reason = np.full(len(fits), "", dtype=object)
    short = np.flatnonzero(~fits)
    if not len(short):
        return reason
    page, both = tables.page[short], " and ".join(tables.tier_names)
    room = (tables.capacity[short] * page).astype(np.float64).sum(axis=1)
    need = np.zeros(len(short))
    for k, kind in enumerate(tables.kinds):
        need += kind.layers * (tables.pages[short, k, :, kind.slices] * page).min(axis=1)
    reason[short] = f"weights, keys and values exceed {both}"
    reason[short[room < workload.weight_bytes]] = f"the weights alone exceed {both}"
    reason[short[need <= room]] = f"would fit into {both}, but not slice by slice in whole pages"
    return reason


def _designs(columns: Mapping[str, Any]) -> int:
    """How many designs a table has; without a column it is one."""
    lengths = {name: len(column) for name, column in columns.items()}
    for name, length in lengths.items():
        first = next(iter(lengths))
        if length != lengths[first]:
            raise ValueError(f"column {name!r} has {length} rows and column {first!r} {lengths[first]}; give every design every column")
    return max(lengths.values(), default=1)


def _whole(name: str, column: Any) -> NDArray[np.int64]:
    """A column of ``WORKLOAD_COLUMNS``, all of them whole."""
    least = WORKLOAD_COLUMNS[name]
    try:
        values = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"column {name!r} must hold whole numbers of at least {least}, without a unit; correct it") from None
    good = (values >= least) & (values <= 2**31) & (values == np.floor(values))
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(
            f"column {name!r} must hold whole numbers from {least} to 2**31, not {values[row].item()!r} as in row {row}; correct it"
        )
    return values.astype(np.int64)
