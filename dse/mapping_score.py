"""The score of a system in a search: its exact kernel mapping, what it costs, and how far H2M2's greedy is from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import __version__
from ..models.checks import shown
from ..models.hardware import System
from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem
from ..models.kernel_mapping_tables import Granularity, KernelMappingTables
from ..models.price import (
    ASSUMED_OPERATION,
    Operation,
    StepEnergy,
    assumptions,
    energy_per_token,
    mean_power,
    step_energy,
    system_area,
    system_cost,
    usd_per_Mtok,
)
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.systems import Systems
from ..models.units import GB, mm2
from ..models.workload import Workload
from ..solvers.kernel_mapping import TableMapping
from ..solvers.kernel_mapping_heuristics import GreedyMapping
from ..solvers.result import Solver, SolverResult, finish


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingScore:
    """A ``score`` for ``explore``: the columns of a system's exact kernel mapping; None if the LLM does not fit.

    latency_s of a step; throughput_tok_per_s; memory_usd and energy_J of that step under the latency-optimal plan (no plan of less energy
    is looked for: ``latency_energy_front`` does), with all terms whose constants are known; the other columns of ``priced_columns``;
    TIER_headroom_GB: capacity that is left; greedy_latency_s and greedy_loss = greedy / optimum - 1 (None where greedy finds no
    plan); n_SUBLAYER: slices on the first tier (mean over layers); solver, status, gap, profile, version; ``assumed``: numbers that no
    source backs. Memory without a price or an energy leaves the columns out that need it.
    """

    workload: Workload
    profile: Profile = FIRST_PRINCIPLES
    solver: Solver = field(default_factory=TableMapping)
    grouped: bool = True
    granularity: Granularity = "kv_head"
    operation: Operation = ASSUMED_OPERATION

    def __post_init__(self) -> None:
        check_fields(self, workload=Workload, profile=Profile)
        object.__setattr__(self, "operation", as_operation(self.operation))

    def settings(self) -> dict[str, Any]:
        """The fields by name: what ``write_csv`` keeps so that ``rerun`` can price a row again."""
        kept = {name: getattr(self, name) for name in ("workload", "profile", "solver", "grouped", "granularity")}
        return {**kept, "operation": asdict(self.operation)}

    def __call__(self, system: System) -> dict[str, Any] | None:
        """The columns of one system."""
        problem = self._problem(system)
        return self._columns(problem, self.solver.solve(problem))

    def batch(self, systems: Sequence[System]) -> list[dict[str, Any] | None]:
        """The columns of many systems; with ``TableMapping`` all are solved at once."""
        if not isinstance(self.solver, TableMapping) or not self.grouped:
            return [self(system) for system in systems]
        tables = KernelMappingTables.build(systems, self.workload, profile=self.profile, granularity=self.granularity)
        seconds, counts = self.solver.solve_batch(tables)
        rows: list[dict[str, Any] | None] = []
        for system, latency, split in zip(systems, seconds.tolist(), counts.tolist(), strict=True):
            problem = self._problem(system)
            plan = None if latency == math.inf else KernelMappingPlan.same_in_all_layers(problem, split)
            rows.append(self._columns(problem, finish(self.solver, problem, plan, started=time.perf_counter(), optimal=True)))
        return rows

    def problems(self, system: System) -> tuple[KernelMappingProblem]:
        """The problem behind the columns of a system."""
        return (self._problem(system),)

    def _problem(self, system: System) -> KernelMappingProblem:
        return KernelMappingProblem.build(system, self.workload, profile=self.profile, grouped=self.grouped, granularity=self.granularity)

    def _columns(self, problem: KernelMappingProblem, result: SolverResult[KernelMappingPlan]) -> dict[str, Any] | None:
        if result.plan is None or problem.system is None:
            return None
        system, cost = problem.system, problem.evaluate(result.plan)
        greedy = GreedyMapping().solve(problem).objective
        tokens = self.workload.tokens
        energy = None
        if cost.energy is not None:
            energy = step_energy(system, traffic=cost.traffic, latency=cost.latency, flops=cost.flops, link_bytes=cost.link_bytes)
        return {
            "latency_s": cost.latency,
            "throughput_tok_per_s": rate(tokens, cost.latency),
            **single(priced_columns(system, energy, latency=cost.latency, tokens=tokens, operation=self.operation)),
            **headroom_columns(cost.tier_names, cost.capacity, cost.tier_bytes),
            "greedy_latency_s": greedy,
            "greedy_loss": None if greedy is None else greedy / cost.latency - 1,
            **{f"n_{kind.name}": result.plan.mean_count(k, 0) for k, kind in enumerate(problem.kinds)},
            "solver": result.solver,
            "status": result.status.value,
            "gap": result.gap,
            "profile": self.profile.name,
            "version": __version__,
            "assumed": "; ".join(assumptions(system, self.operation)),
        }


def priced_columns(
    system: System | Systems, energy: StepEnergy | None, *, latency: ArrayLike, tokens: ArrayLike, operation: Operation
) -> dict[str, Any]:
    """The columns of money, power and area of designs whose steps take ``latency`` [s] and ``energy`` for ``tokens``: arrays, and texts
    that hold for all of them.

    energy_J: all known terms; energy_J_per_tok: at the operation's utilisation, idle time included; power_W: over a step; energy_without:
    terms whose constants are unknown and which are left out. memory_usd; system_usd of memories, units and links; usd_without: parts
    without a price, left out. area_mm2 of the units; area_without: units whose area is unknown. usd_per_Mtok: machine and electricity.
    A column whose main number is unknown is left out: those of energy without the energy of every memory (``energy`` None), those of
    money without the price of every memory, those of area without the area of any unit.
    """
    columns: dict[str, Any] = {}
    base = system.base if isinstance(system, Systems) else system
    seconds = np.asarray(latency, dtype=np.float64)
    per_token = None
    with np.errstate(divide="ignore", invalid="ignore"):  # a step of no tokens or no time
        if energy is not None:
            per_token = energy_per_token(energy, tokens, operation.utilisation)
            columns |= {
                "energy_J": energy.total,
                "energy_J_per_tok": per_token,
                "power_W": mean_power(energy.total, seconds),
                "energy_without": "; ".join(energy.without),
            }
        cost = system_cost(system)
        if not {f"{tier.name} cost" for tier in base.tiers} & set(cost.without):
            columns |= {"memory_usd": cost.memory, "system_usd": cost.total, "usd_without": "; ".join(cost.without)}
            if per_token is not None:
                speed = np.asarray(tokens, dtype=np.float64) / seconds
                columns["usd_per_Mtok"] = usd_per_Mtok(
                    cost=cost.total, energy_per_token=per_token, tokens_per_second=speed, operation=operation
                )
    area = system_area(system)
    if len(area.without) < len(base.units):
        columns |= {"area_mm2": area.units / mm2, "area_without": "; ".join(area.without)}
    return columns


def single(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of one design as plain numbers and texts; None for what is not finite."""
    return {name: value if isinstance(value, str) else _finite(value) for name, value in columns.items()}


def _finite(value: ArrayLike) -> float | None:
    number = float(np.asarray(value))
    return number if np.isfinite(number) else None


def headroom_columns(tier_names: Sequence[str], capacity: Sequence[float], held: Sequence[float]) -> dict[str, float]:
    """TIER_headroom_GB: what is left of each tier's capacity."""
    return {f"{name}_headroom_GB": (room - used) / GB for name, room, used in zip(tier_names, capacity, held, strict=True)}


def rate(tokens: float, latency: float) -> float | None:
    """tokens/s of a step; None if it takes no time."""
    return tokens / latency if latency else None


def as_operation(operation: Operation | Mapping[str, Any]) -> Operation:
    """An operation, or one from its fields by name, as files hold it; ValueError for anything else."""
    if isinstance(operation, Operation):
        return operation
    names = {each.name for each in fields(Operation)}
    needed = {each.name for each in fields(Operation) if each.default is MISSING}
    if not isinstance(operation, Mapping) or not needed <= set(operation) <= names:
        raise ValueError(f"operation must be an Operation, or its fields {sorted(needed)} by name, not {shown(operation)}")
    return Operation(**operation)


def check_fields(score: Any, **types: type) -> None:
    """ValueError unless each named field of a score is of its type: with another one it would fail long after."""
    for name, kind in types.items():
        value = getattr(score, name)
        if not isinstance(value, kind):
            raise ValueError(f"{type(score).__name__}: {name} must be of the class {kind.__name__}, not {shown(value)}; correct it")
