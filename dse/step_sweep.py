"""The decode or prefill step of designs in a table: one memory that holds all, priced as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.estimate import STEP_DATASHEET, StepMachines, StepModel, StepProfile, holding_tier, tensor_parallel
from ..models.hardware import System
from ..models.systems import Systems, column_place
from ..models.units import GB
from ..models.workload import Workload

WORKLOAD_COLUMNS = {"batch": 1, "context": 0, "devices": 1}
"""Columns beside those of a System, whole numbers, and the least that each may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSweep:
    """An array score: columns of designs in, columns of their steps out (see ``models.estimate``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch``, ``context`` (``workload``'s, if there is no column), and
    ``devices``: so many equal machines that share every tensor evenly, communication left out. Weights, state and activations are on
    ``tier``, which may be left out where there is one only.

    Columns out: latency_s; throughput_tok_per_s (of decoded tokens, or of the prompt's); bound_s, the physical bound of the data sheet;
    kv_GB; energy_J_per_tok of memory accesses and memory_usd of all tiers (left out where a tier has no energy or cost); headroom_GB;
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
        designs = _designs(columns)
        whole = {name: _whole(name, columns[name]) for name in WORKLOAD_COLUMNS if name in columns}
        batch = whole.get("batch", np.array([float(self.workload.batch)]))
        context = whole.get("context", np.array([float(self.workload.context)]))
        if self.workload.phase == "prefill" and len(context) and context.min() < 1:
            raise ValueError(f"context is 0 in row {int(np.argmin(context))}, and a prefill needs a token; give at least 1, or decode")
        numbers = {name: column for name, column in columns.items() if name not in WORKLOAD_COLUMNS}
        if not designs:  # names and units are checked, and there is nothing to price
            for name in numbers:
                column_place(self.system, name)
            return {name: column[:0] for name, column in self({}).items()}
        systems = Systems.from_columns(self.system, numbers)
        machines = StepMachines.build(systems, tier=self.tier, devices=whole.get("devices", 1))
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
        if step.memory_cost is not None:
            found["memory_usd"] = known(step.memory_cost)
        found["headroom_GB"] = step.headroom / GB
        reason = np.full(len(lacking), "", dtype=object)
        if short:
            reason[lacking] = f"weights, state and activations exceed {machines.tier}"
            reason[np.broadcast_to(machines.capacity < self._model.held_weights, reason.shape)] = (
                f"the weights alone exceed {machines.tier}"
            )
        return {**found, "feasible": step.fits, "reason": reason}

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine (several ``devices`` as one) and the workload of a row; columns that are no design columns are passed over."""
        numbers = {name: [value] for name, value in row.items() if self._is_number(name)}
        system = Systems.from_columns(self.system, numbers)[0] if numbers else self.system
        whole = {name: int(_whole(name, [row[name]])[0]) for name in WORKLOAD_COLUMNS if name in row}
        served = self.workload
        served = replace(served, batch=whole.get("batch", served.batch), context=whole.get("context", served.context))
        return tensor_parallel(system, whole.get("devices", 1)), served

    def _is_number(self, name: str) -> bool:
        """Whether a column is a number of ``system``."""
        try:
            column_place(self.system, name)
        except ValueError:
            return False
        return True


def _designs(columns: Mapping[str, Any]) -> int:
    """How many designs a table has; without a column it is one."""
    lengths = {name: len(column) for name, column in columns.items()}
    for name, length in lengths.items():
        first = next(iter(lengths))
        if length != lengths[first]:
            raise ValueError(f"column {name!r} has {length} rows and column {first!r} {lengths[first]}; give every design every column")
    return max(lengths.values(), default=1)


def _whole(name: str, column: Any) -> NDArray[np.float64]:
    """A column of ``WORKLOAD_COLUMNS`` as floats, all of them whole."""
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
    return values
