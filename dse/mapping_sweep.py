"""The exact kernel mapping of designs in a table: two memories, one split for all layers of a kind, solved as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..models.checks import shown
from ..models.design_table import DesignTable
from ..models.hardware import System
from ..models.kernel_mapping import KernelMappingProblem, computed_flops, step_flops, streamed_bytes
from ..models.kernel_mapping_tables import Granularity, KernelMappingTables
from ..models.price import ASSUMED_OPERATION, Operation, step_energy
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.roofline import Array
from ..models.systems import Systems
from ..models.units import GB
from ..models.workload import Workload
from ..solvers.kernel_mapping import TableMapping
from .mapping_score import as_operation, check_fields, priced_columns

CHUNK = 512
"""Designs whose tables are held at once: some 5 kB each for 96 slices, which together stay in the cache of a core."""

MOST_BYTES = 2**60
"""Weights and state from so many bytes on are not counted in pages; no machine holds them."""

BEYOND = "weights, keys and values are 2**60 bytes or more"

Columns = dict[str, NDArray[Any]]

_flops = lru_cache(maxsize=1024)(step_flops)  # 5 kB each: a sweep meets the same workloads again in every chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingSweep:
    """An array score: columns of designs in, columns of their exact kernel mapping out (``TableMapping``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch`` and ``context`` (``workload``'s, if there is no column). Designs of
    each distinct workload are priced together: each takes 2 to 3 ms, however few designs it has, so a table in which every row has a
    context of its own is 50 times slower than one of a few workloads. Take tens of batches and contexts rather than thousands.

    Columns out: latency_s of a step; throughput_tok_per_s; n_SUBLAYER: slices on the first tier; the columns of ``priced_columns`` under
    ``operation``, for that plan; TIER_headroom_GB: whole pages left; ``feasible`` and ``reason``. Numbers are NaN where nothing fits. A
    row equals ``TableMapping().solve`` of its design to the last bit.
    """

    system: System
    workload: Workload
    profile: Profile = FIRST_PRINCIPLES
    granularity: Granularity = "kv_head"
    operation: Operation = ASSUMED_OPERATION

    def __post_init__(self) -> None:
        check_fields(self, system=System, workload=Workload, profile=Profile)
        object.__setattr__(self, "operation", as_operation(self.operation))
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"MappingSweep: granularity must be one of {get_args(Granularity)}, not {shown(self.granularity)}; correct it")
        if len(self.system.tiers) != 2:
            raise ValueError(
                f"MappingSweep takes two memories, and system {self.system.name!r} has {len(self.system.tiers)}: "
                f"{list(self.system.tier_names)}; solve such designs one by one with PatternMapping"
            )

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {name: getattr(self, name) for name in ("system", "workload", "profile", "granularity", "operation")}

    def check(self, columns: Mapping[str, Any]) -> None:
        """ValueError for columns that cannot be priced, as a call raises it; nothing is priced."""
        DesignTable.from_columns(self.system, self.workload, columns)

    def __call__(self, columns: Mapping[str, Any]) -> Columns:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        table = DesignTable.from_columns(self.system, self.workload, columns)
        if not len(table):  # columns are checked, and there is nothing to price
            return {name: column[:0] for name, column in self({}).items()}
        solver = TableMapping().for_batch(len(table))
        found: Columns = {}
        for workload, rows in table.workloads():
            for first in range(0, len(rows), CHUNK):
                some = rows[first : first + CHUNK]
                for name, column in self._priced(table.systems.some(some), workload, solver).items():
                    found.setdefault(name, np.empty(len(table), dtype=column.dtype))[some] = column
        return found

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine and the workload of a row; columns that are no design columns are passed over."""
        return DesignTable.from_row(self.system, self.workload, row)[0]

    def problems(self, row: Mapping[str, Any]) -> tuple[KernelMappingProblem]:
        """The problem behind a row."""
        return (KernelMappingProblem.build(*self.design(row), profile=self.profile, granularity=self.granularity),)

    def _priced(self, systems: Systems, workload: Workload, solver: TableMapping) -> Columns:
        """Result columns of one workload."""
        if workload.weight_bytes + workload.state_bytes >= MOST_BYTES and (workload.batch, workload.context) != (1, 1):
            small = self._priced(systems, replace(workload, batch=1, context=1), solver)  # for its columns
            blank = {name: column if column.dtype == object else np.full(len(systems), np.nan) for name, column in small.items()}
            return blank | {"feasible": np.zeros(len(systems), dtype=bool), "reason": np.full(len(systems), BEYOND, dtype=object)}
        tables = KernelMappingTables.build(systems, workload, profile=self.profile, granularity=self.granularity)
        latency, counts = solver.solve_batch(tables)
        fits = np.isfinite(latency)
        rows, kinds, tiers = np.arange(len(fits)), range(len(tables.kinds)), range(len(tables.tier_names))
        work = _flops(workload, self.granularity, len(tiers))
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
        energy, done = None, {"flops": computed_flops(self.system, flops), "link_bytes": streamed_bytes(self.system, traffic)}
        if not np.isnan(systems.values("tiers", "energy")).any():
            with np.errstate(invalid="ignore"):  # no power for ever, where nothing fits
                energy = step_energy(systems, traffic=traffic, latency=latency, **done)
        priced = priced_columns(systems, energy, latency=latency, tokens=workload.tokens, operation=self.operation)
        texts = {name: np.full(len(fits), text, dtype=object) for name, text in priced.items() if isinstance(text, str)}
        if energy is not None and energy.without:
            texts["energy_without"] = _without(systems, traffic, done)
        found |= {name: np.array(np.broadcast_to(column, fits.shape)) for name, column in priced.items() if name not in texts}
        room, used = ((pages * tables.page).astype(np.float64) for pages in (tables.capacity, held))
        for t, name in enumerate(tables.tier_names):
            found[f"{name}_headroom_GB"] = (room[:, t] - used[:, t]) / GB
        if not fits.all():
            found = {name: np.where(fits, column, np.nan) for name, column in found.items()}
        return {**found, **texts, "feasible": fits, "reason": _reasons(tables, workload, fits)}


def _without(systems: Systems, traffic: Array, done: Mapping[str, Array]) -> NDArray[Any]:
    """The terms of energy that are left out [D]: those with an unknown constant that a design's own plan needs."""
    needed = np.concatenate([amounts > 0 for amounts in done.values()], axis=1)
    _, first, which = np.unique(needed, axis=0, return_index=True, return_inverse=True)
    texts = []
    for row in first:
        one = [row]
        energy = step_energy(systems.some(one), traffic=traffic[one], latency=0.0, **{name: amounts[one] for name, amounts in done.items()})
        texts.append("; ".join(energy.without))
    return np.array(texts, dtype=object)[which.ravel()]


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
        need += kind.layers * (tables.pages[short, k, :, kind.slices] * page.astype(np.float64)).min(axis=1)
    reason[short] = f"weights, keys and values exceed {both}"
    reason[short[room < workload.weight_bytes]] = f"the weights alone exceed {both}"
    reason[short[need <= room]] = f"would fit into {both}, but not slice by slice in whole pages"
    return reason
