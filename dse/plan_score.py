"""The score of a given mapping on a given system: what a plan that need not be the fastest one takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem
from ..models.kernel_mapping_tables import Granularity
from ..models.price import step_energy
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.workload import Workload
from .mapping_score import check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanScore:
    """The columns of a design that is a pair of a System and a KernelMappingPlan: latency_s, moving_energy_J (``price.StepEnergy``), plan;
    None if it does not fit."""

    workload: Workload
    profile: Profile = FIRST_PRINCIPLES
    granularity: Granularity = "kv_head"

    def __post_init__(self) -> None:
        check_fields(self, workload=Workload, profile=Profile)

    def __call__(self, design: Sequence[Any]) -> dict[str, Any] | None:
        """The columns of one design."""
        system, plan = design
        (problem,) = self.problems(design)
        cost = problem.evaluate(plan)
        if not cost.fits:
            return None
        energy = step_energy(system, traffic=cost.traffic, latency=cost.latency, flops=cost.flops, link_bytes=cost.link_bytes)
        return {"latency_s": cost.latency, "moving_energy_J": float(energy.moving), "plan": str(plan)}

    def problems(self, design: Sequence[Any]) -> tuple[KernelMappingProblem]:
        """The problem of a design."""
        return (KernelMappingProblem.build(design[0], self.workload, profile=self.profile, granularity=self.granularity),)

    def plan(self, design: Sequence[Any]) -> KernelMappingPlan:
        """The plan of a design."""
        plan: KernelMappingPlan = design[1]
        return plan
