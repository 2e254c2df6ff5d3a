"""The score of a system in a search: its exact kernel mapping, what it costs, and how far H2M2's greedy is from it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..models.hardware import System
from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem
from ..models.kernel_mapping_tables import Granularity, KernelMappingTables
from ..models.price import assumptions
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.workload import Workload
from ..solvers.kernel_mapping import TableMapping
from ..solvers.kernel_mapping_heuristics import GreedyMapping
from ..solvers.result import Solver, SolverResult, finish


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingScore:
    """A ``score`` for ``explore``: the columns of a system's exact kernel mapping; None if the LLM does not fit.

    latency_s of a step; memory_usd; energy_J of the memory accesses of that step under the latency-optimal plan (no plan of less energy is
    looked for); greedy_latency_s and greedy_gap = (greedy - optimum) / greedy (None where greedy finds no plan); n_SUBLAYER:
    slices on the first tier (mean over layers); solver, status, gap, profile, version; ``assumed``: prices and energies that no
    source backs. Memory without a price or an energy leaves that column out.
    """

    workload: Workload
    profile: Profile = FIRST_PRINCIPLES
    solver: Solver = field(default_factory=TableMapping)
    grouped: bool = True
    granularity: Granularity = "kv_head"

    def settings(self) -> dict[str, Any]:
        """The fields by name: what ``write_csv`` keeps so that ``rerun`` can price a row again."""
        return {name: getattr(self, name) for name in ("workload", "profile", "solver", "grouped", "granularity")}

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

    def _problem(self, system: System) -> KernelMappingProblem:
        return KernelMappingProblem.build(system, self.workload, profile=self.profile, grouped=self.grouped, granularity=self.granularity)

    def _columns(self, problem: KernelMappingProblem, result: SolverResult[KernelMappingPlan]) -> dict[str, Any] | None:
        if result.plan is None or problem.system is None:
            return None
        system, cost = problem.system, problem.evaluate(result.plan)
        greedy = GreedyMapping().solve(problem).objective
        known: dict[str, Any] = {"latency_s": cost.latency}
        if all(tier.cost is not None for tier in system.tiers):
            known["memory_usd"] = system.memory_cost
        if cost.energy is not None:
            known["energy_J"] = cost.energy
        return {
            **known,
            "greedy_latency_s": greedy,
            "greedy_gap": None if greedy is None else (greedy - cost.latency) / greedy,
            **{f"n_{kind.name}": result.plan.mean_count(k, 0) for k, kind in enumerate(problem.kinds)},
            "solver": result.solver,
            "status": result.status.value,
            "gap": result.gap,
            "profile": self.profile.name,
            "version": __version__,
            "assumed": "; ".join(assumptions(system)),
        }
