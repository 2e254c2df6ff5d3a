"""The decode or prefill step of designs in a table: one memory that holds all, priced as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.design_table import DesignTable
from ..models.estimate import (
    STEP_DATASHEET,
    StepEstimate,
    StepMachines,
    StepModel,
    StepProfile,
    holding_tier,
    tensor_parallel,
    tensor_parallel_all,
)
from ..models.hardware import System
from ..models.price import ASSUMED_OPERATION, Operation, system_area, system_cost
from ..models.roofline import Array
from ..models.systems import Systems
from ..models.units import GB, YEAR, kWh, mm2
from ..models.workload import Workload
from .mapping_score import as_operation, check_fields

MORE_COLUMNS = {"devices": 1}
"""Columns beside those of every table of designs, whole numbers, and the least that each may be."""

BOUND_BY = np.array(["memory", "compute", ""], dtype=object)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSweep:
    """An array score: columns of designs in, columns of their steps out (see ``models.estimate``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch``, ``context`` (``workload``'s, if there is no column), and
    ``devices``: so many equal machines that share every tensor evenly, communication left out. Weights, state and activations are on
    ``tier``, which may be left out where there is one only.

    Columns out: latency_s; throughput_tok_per_s (of decoded tokens, or of the prompt's); bound_s, the physical bound of the data sheet, and
    bound_by, "memory" or "compute", whichever it is; kv_GB; headroom_GB; the columns of ``priced_columns`` under ``operation``, of
    accesses, FLOPs and static power, of all tiers, units and links; ``feasible`` and ``reason``. Where the tier is too small, only kv_GB
    and headroom_GB (below 0: so much is lacking) are numbers.
    """

    system: System
    workload: Workload
    tier: str | None = None
    profile: StepProfile = STEP_DATASHEET
    operation: Operation = ASSUMED_OPERATION
    _model: StepModel = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, system=System, workload=Workload, profile=StepProfile)
        object.__setattr__(self, "operation", as_operation(self.operation))
        holding_tier(self.system, self.tier)
        bits = {name: getattr(self.workload, name) for name in ("weight_bits", "kv_bits", "activation_bits")}
        object.__setattr__(self, "_model", StepModel.build(self.workload.llm, phase=self.workload.phase, profile=self.profile, **bits))

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {name: getattr(self, name) for name in ("system", "workload", "tier", "profile", "operation")}

    def check(self, columns: Mapping[str, Any]) -> None:
        """ValueError for columns that cannot be priced, as a call raises it; nothing is priced."""
        DesignTable.from_columns(self.system, self.workload, columns, more=MORE_COLUMNS)

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        table = DesignTable.from_columns(self.system, self.workload, columns, more=MORE_COLUMNS)
        if not len(table):  # columns are checked, and there is nothing to price
            return {name: column[:0] for name, column in self({}).items()}
        batch, context = (table.count(name, getattr(self.workload, name)).astype(np.float64) for name in ("batch", "context"))
        devices = table.count("devices", 1)
        machines = StepMachines.build(table.systems, tier=self.tier, devices=devices)
        step = self._model.estimate(machines, batch, context, compare=True)
        lacking = ~step.fits
        short = bool(lacking.any())

        def known(column: Array) -> Array:
            if len(column) < len(lacking):  # no design varies it
                return np.where(lacking, np.nan, column) if short else np.broadcast_to(column, lacking.shape)
            if short:
                np.copyto(column, np.nan, where=lacking)
            return column

        with np.errstate(divide="ignore", invalid="ignore"):  # a machine without limits takes no time
            throughput = step.tokens / step.latency
            priced = self._priced(step, machines, tensor_parallel_all(table.systems, devices))
        found = {
            "latency_s": known(step.latency),
            "throughput_tok_per_s": known(throughput),
            "bound_s": known(step.bound),
            "bound_by": BOUND_BY[np.where(lacking, 2, np.asarray(step.compute_bound, dtype=np.int8))],
            "kv_GB": step.state / GB,
        }
        for name, column in priced.items():
            found[name] = np.broadcast_to(np.array(column, dtype=object), lacking.shape) if isinstance(column, str) else known(column)
        found["headroom_GB"] = step.headroom / GB
        alone = machines.capacity < self._model.held_weights
        tier = machines.tier
        why = np.array(["", f"weights, state and activations exceed {tier}", f"the weights alone exceed {tier}"], dtype=object)
        reason = why[lacking.astype(np.int8) + alone] if short else np.broadcast_to(why[:1], lacking.shape)
        return {**found, "feasible": step.fits, "reason": reason}

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine (several ``devices`` as one) and the workload of a row; columns that are no design columns are passed over."""
        table = DesignTable.from_row(self.system, self.workload, row, more=MORE_COLUMNS)
        system, served = table[0]
        return tensor_parallel(system, int(table.count("devices", 1)[0])), served

    def _priced(self, step: StepEstimate, machines: StepMachines, systems: Systems) -> dict[str, Any]:
        """The columns of ``priced_columns``: the same formulas, with what no design varies as one factor, as each pass over a table
        takes some hundredths of its time."""
        columns: dict[str, Any] = {}
        operated, per_token = self.operation, None
        if step.energy is not None:
            if machines.static_power is not None:  # of the idle time
                per_token = step.latency * (machines.static_power * (1 / operated.utilisation - 1))
                per_token += step.energy
                per_token /= step.tokens
            else:
                per_token = step.energy / step.tokens
            columns |= {
                "energy_J": step.energy,
                "energy_J_per_tok": per_token,
                "power_W": step.energy / step.latency,
                "energy_without": "; ".join(machines.without),
            }
        if step.memory_cost is not None:
            cost = system_cost(systems)
            whole = step.memory_cost + (cost.units + cost.links)
            columns |= {"memory_usd": step.memory_cost, "system_usd": whole, "usd_without": "; ".join(cost.without)}
            if per_token is not None:
                usd = whole * (1e6 / (operated.years * YEAR * operated.utilisation))
                usd *= step.latency
                usd /= step.tokens
                usd += per_token * (1e6 * operated.pue * operated.usd_per_kWh / kWh)
                columns["usd_per_Mtok"] = usd
        area = system_area(systems)
        if len(area.without) < len(self.system.units):
            columns |= {"area_mm2": area.units / mm2, "area_without": "; ".join(area.without)}
        return columns
