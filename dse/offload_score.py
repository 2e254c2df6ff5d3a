"""The score of a GPU with a host in a search: exact cache ratio, exact recompute split, and the loss of HybridServe's rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import __version__
from ..models.cache_ratio import CacheRatioPlan, CacheRatioProblem
from ..models.hardware import System
from ..models.offload import WeightsOn, offload_layers
from ..models.offload_profiles import DATASHEET, OffloadProfile
from ..models.price import ASSUMED_OPERATION, Operation, access_energy, assumptions
from ..models.price import step_energy as priced_step
from ..models.recompute_split import RecomputeSplitProblem
from ..models.workload import Workload
from ..solvers.cache_ratio import HybridServeRatio, LpRatio
from ..solvers.recompute_split import ClosedFormSplit
from ..solvers.result import Solver, SolverResult
from .mapping_score import as_operation, check_fields, headroom_columns, priced_columns, single

WEIGHTS_ON: tuple[WeightsOn, ...] = ("gpu", "host")
"""Where the weights may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadScore:
    """A ``score`` for ``explore``: the columns of a design, which is a pair of a System and a Workload; None if nothing fits.

    throughput_tok_per_s of decoding and latency_s of a step under the best cache ratio, with all weights on the GPU or all streamed,
    whichever is faster (``weights_on``); energy_J_per_tok, memory_usd and the other columns of ``priced_columns``; TIER_headroom_GB of the
    GPU (of what the profile lets it use) and the host; heuristic_loss = HybridServe's rule / optimum - 1; act_share of blocks kept as
    activations, split_tokens and split_latency_s of KVPR's staged split for the same step; r, rho, w, c (none where keys and values take
    no time to send); solver, status, gap, profile, version, ``assumed`` numbers.
    """

    profile: OffloadProfile = DATASHEET
    solver: Solver = field(default_factory=LpRatio)
    operation: Operation = ASSUMED_OPERATION

    def __post_init__(self) -> None:
        check_fields(self, profile=OffloadProfile)
        object.__setattr__(self, "operation", as_operation(self.operation))

    def settings(self) -> dict[str, Any]:
        """The fields by name: what ``write_csv`` keeps so that ``rerun`` can price a row again."""
        return {"profile": self.profile, "solver": self.solver, "operation": asdict(self.operation)}

    def __call__(self, design: Sequence[Any]) -> dict[str, Any] | None:
        """The columns of one design."""
        system, workload = design
        solved = self._solved(system, workload)
        if solved is None:
            return None
        place, problem, result = solved
        plan = result.unwrap()
        cost = problem.evaluate(plan)
        rule = HybridServeRatio().solve(problem).objective
        split = ClosedFormSplit().solve(RecomputeSplitProblem.build(system, workload, profile=self.profile, weights=place))
        try:
            ratios: dict[str, float | None] = asdict(problem.ratios)
        except ValueError:
            ratios = dict.fromkeys(("r", "rho", "w", "c"))
        blocks = plan.kv_gpu + plan.act_gpu + plan.kv_host + plan.act_host
        acts = plan.act_gpu + plan.act_host
        energy = None
        if all(tier.energy is not None for tier in system.tiers[:2]):
            work = step_work(system, workload, cost.to_device_bytes, acts / blocks if blocks else 0.0)
            energy = priced_step(system, latency=cost.latency, **work)
        priced = single(priced_columns(system, energy, latency=cost.latency, tokens=workload.batch, operation=self.operation))
        priced.pop("energy_J", None)  # of a whole step, as energy_J_per_tok is of a token
        return {
            "throughput_tok_per_s": workload.batch / cost.latency,
            "latency_s": cost.latency,
            **priced,
            **headroom_columns(cost.tier_names, cost.capacity, cost.tier_bytes),
            "heuristic_latency_s": rule,
            "heuristic_loss": None if rule is None else rule / cost.latency - 1,
            "weights_on": place,
            "act_share": acts / blocks if blocks else 0.0,
            "kv_gpu_blocks": plan.kv_gpu,
            "act_gpu_blocks": plan.act_gpu,
            "kv_host_blocks": plan.kv_host,
            "act_host_blocks": plan.act_host,
            "split_tokens": None if split.plan is None else split.plan.splits[0],
            "split_latency_s": split.objective,
            **ratios,
            "solver": result.solver,
            "status": result.status.value,
            "gap": result.gap,
            "profile": self.profile.name,
            "version": __version__,
            "assumed": "; ".join(assumptions(system, self.operation)),
        }

    def problems(self, design: Sequence[Any]) -> tuple[CacheRatioProblem, RecomputeSplitProblem]:
        """The problems behind the columns of a design; those of streamed weights, if nothing fits."""
        system, workload = design
        solved = self._solved(system, workload)
        place = "host" if solved is None else solved[0]
        ratio = CacheRatioProblem.build(system, workload, profile=self.profile, weights=place) if solved is None else solved[1]
        return ratio, RecomputeSplitProblem.build(system, workload, profile=self.profile, weights=place)

    def _solved(self, system: System, workload: Workload) -> tuple[WeightsOn, CacheRatioProblem, SolverResult[CacheRatioPlan]] | None:
        """Where the weights are best, that problem and its result; None if nothing fits."""
        best: tuple[WeightsOn, CacheRatioProblem, SolverResult[CacheRatioPlan]] | None = None
        least = math.inf
        for place in WEIGHTS_ON:
            problem = CacheRatioProblem.build(system, workload, profile=self.profile, weights=place)
            result = self.solver.solve(problem)
            if result.objective is not None and result.objective < least:
                best, least = (place, problem, result), result.objective
        return best


def step_energy(system: System, workload: Workload, to_device: float, act_share: float) -> float:
    """J of the memory accesses of one decode step: see ``step_work``."""
    return access_energy(system, step_work(system, workload, to_device, act_share)["traffic"])


def step_work(system: System, workload: Workload, to_device: float, act_share: float) -> dict[str, list[float]]:
    """Bytes accessed and FLOPs by tier, and bytes over each link, of one decode step; ``to_device`` [B] come from the host.

    Host: reads what is sent. GPU: writes what arrives, reads the weights of the step and all keys and values, and for the share kept as
    activations reads them and writes the keys and values recomputed; it does all FLOPs, those of recomputation too. The keys and values of
    the new token, which go back to the host, are left out: one of ``context`` tokens.
    """
    llm, tokens = workload.llm, workload.batch * workload.context
    acts = act_share * tokens * llm.num_hidden_layers * llm.hidden_size * workload.activation_bits / 8
    flops = weights = 0.0
    for layer in offload_layers(workload):
        weights += layer.layers * layer.read_bytes
        flops += layer.layers * (layer.linear_flops + tokens * (layer.attention_flops + act_share * layer.recompute_flops))
    gpu = to_device + weights + workload.state_bytes * (1 + act_share) + acts
    down = (system.tier_names[1], system.tier_names[0])
    others = [0.0] * (len(system.tiers) - 2)
    return {
        "traffic": [gpu, to_device, *others],
        "flops": [flops, 0.0, *others],
        "link_bytes": [to_device if (link.source, link.target) == down else 0.0 for link in system.links],
    }
