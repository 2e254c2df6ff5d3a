"""The decode or prefill step of designs in a table: one memory that holds all, priced as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.design_table import DesignTable
from ..models.estimate import STEP_DATASHEET, StepMachines, StepModel, StepProfile, holding_tier, tensor_parallel
from ..models.hardware import System
from ..models.units import GB
from ..models.workload import Workload

MORE_COLUMNS = {"devices": 1}
"""Columns beside those of every table of designs, whole numbers, and the least that each may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSweep:
    """An array score: columns of designs in, columns of their steps out (see ``models.estimate``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch``, ``context`` (``workload``'s, if there is no column), and
    ``devices``: so many equal machines that share every tensor evenly, communication left out. Weights, state and activations are on
    ``tier``, which may be left out where there is one only.

    Columns out: latency_s; throughput_tok_per_s (of decoded tokens, or of the prompt's); bound_s, the physical bound of the data sheet;
    kv_GB; energy_J_per_tok of accesses, FLOPs and static power, with ``energy_without``, the terms whose constants are unknown (left out
    where the memory has no energy); memory_usd of all tiers (left out where one has no cost); headroom_GB;
    ``feasible`` and ``reason``. Where the tier is too small, only kv_GB and headroom_GB (below 0: so much is lacking) are numbers.
    """

    system: System
    workload: Workload
    tier: str | None = None
    profile: StepProfile = STEP_DATASHEET
    _model: StepModel = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        holding_tier(self.system, self.tier)
        bits = {name: getattr(self.workload, name) for name in ("weight_bits", "kv_bits", "activation_bits")}
        object.__setattr__(self, "_model", StepModel.build(self.workload.llm, phase=self.workload.phase, profile=self.profile, **bits))

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {name: getattr(self, name) for name in ("system", "workload", "tier", "profile")}

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        table = DesignTable.from_columns(self.system, self.workload, columns, more=MORE_COLUMNS)
        if not len(table):  # columns are checked, and there is nothing to price
            return {name: column[:0] for name, column in self({}).items()}
        batch, context = (table.count(name, getattr(self.workload, name)).astype(np.float64) for name in ("batch", "context"))
        machines = StepMachines.build(table.systems, tier=self.tier, devices=table.count("devices", 1))
        step = self._model.estimate(machines, batch, context)
        lacking = ~step.fits
        short = bool(lacking.any())

        def known(column: NDArray[np.float64]) -> NDArray[np.float64]:
            if short:
                np.copyto(column, np.nan, where=lacking)
            return column

        with np.errstate(divide="ignore"):  # a machine without limits takes no time
            throughput = step.tokens / step.latency
        found = {
            "latency_s": known(step.latency),
            "throughput_tok_per_s": known(throughput),
            "bound_s": known(step.bound),
            "kv_GB": step.state / GB,
        }
        if step.energy is not None:
            found["energy_J_per_tok"] = known(step.energy / step.tokens)
            found["energy_without"] = np.broadcast_to(np.array("; ".join(machines.without), dtype=object), lacking.shape)
        if step.memory_cost is not None:
            found["memory_usd"] = known(step.memory_cost)
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
