"""What ``explain`` asks of each problem kind: its parts, how to build it again on another machine or workload, and its linear program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..models.cache_ratio import CacheRatioPlan, CacheRatioProblem, RatioSettings
from ..models.checks import shown
from ..models.hardware import Link, System
from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem
from ..models.units import GB, TFLOPS
from ..models.workload import Workload
from ..solvers._columns import column_generation
from ..solvers._patterns import pattern_form
from ..solvers._program import Program
from ..solvers.cache_ratio import LpRatio, ratio_cases, ratio_program, ratio_unit
from ..solvers.kernel_mapping import ConvexMapping, PatternMapping, TableMapping
from ..solvers.recompute_split import ClosedFormSplit, split_program
from ..solvers.result import Solver, SolverResult

UNIT_OF = {"capacity": ("GB", GB), "bandwidth": ("GB/s", GB), "matrix_peak": ("TFLOP/s", TFLOPS), "vector_peak": ("TFLOP/s", TFLOPS)}
"""The numbers of a System of which one more is priced, with the unit that is meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One number of a System: ``part`` "tiers", "units" or "links", position ``index`` there, and its ``field``."""

    part: str
    index: int
    field: str
    name: str

    @property
    def unit(self) -> str:
        """Unit in which one more is meant."""
        return UNIT_OF[self.field][0]

    @property
    def factor(self) -> float:
        """That unit in SI."""
        return UNIT_OF[self.field][1]

    def of(self, system: System) -> float:
        """Its value [SI]."""
        return float(getattr(getattr(system, self.part)[self.index], self.field))

    def changed(self, system: System, value: float) -> System:
        """``system`` with ``value`` [SI] in its place."""
        items = list(getattr(system, self.part))
        items[self.index] = replace(items[self.index], **{self.field: value})
        changes: dict[str, Any] = {self.part: tuple(items)}
        return replace(system, **changes)


def resources(system: System) -> Iterator[Resource]:
    """Capacities, bandwidths and peaks of a system, in this order."""
    for part, named in (("tiers", ("capacity",)), ("tiers", ("bandwidth",)), ("links", ("bandwidth",)), ("units", tuple(UNIT_OF)[2:])):
        for index, item in enumerate(getattr(system, part)):
            for field in named:
                name = f"link {item.source} to {item.target}" if isinstance(item, Link) else item.name
                yield Resource(part=part, index=index, field=field, name=f"{name} {field.replace('_', ' ')}")


class Part(NamedTuple):
    """What is planned alike: ``layers`` layers of a ``name`` that take ``seconds`` each under a ``plan``."""

    name: str
    layers: int
    plan: str
    seconds: float


class Room(NamedTuple):
    """A memory under a plan: ``held`` of ``capacity`` [B], and the ``smallest`` thing [B] that a plan could put there in addition."""

    name: str
    held: float
    capacity: float
    smallest: float
    thing: str


class Relaxed(NamedTuple):
    """The linear relaxation: its optimum, ``bound`` [s], and what it gains from one more byte of each tier, ``worth`` [s/B]."""

    bound: float
    worth: tuple[float, ...]


class ProblemKind(Protocol):
    """See the functions of ``KernelMappingKind``."""

    def solver(self, problem: Any) -> Solver: ...

    def rebuilt(self, problem: Any, system: System, workload: Workload) -> Any: ...

    def possible(self, problem: Any) -> bool: ...

    def exactly(self, problem: Any) -> bool: ...

    def parts(self, problem: Any, plan: Any) -> list[Part]: ...

    def rooms(self, problem: Any, plan: Any) -> list[Room]: ...

    def relaxed(self, problem: Any) -> Relaxed: ...

    def looser(self, problem: Any) -> dict[str, Any]: ...


class KernelMappingKind:
    """Kernel mapping."""

    def solver(self, problem: KernelMappingProblem) -> Solver:
        """The exact solver to use where none is given."""
        if len(problem.tier_names) != 2:
            return PatternMapping()
        return TableMapping() if problem.grouped else ConvexMapping()

    def rebuilt(self, problem: KernelMappingProblem, system: System, workload: Workload) -> KernelMappingProblem:
        """The same problem of another system and workload."""
        if problem.profile is None:
            raise ValueError(_no_system(problem))
        return KernelMappingProblem.build(
            system, workload, profile=problem.profile, grouped=problem.grouped, granularity=problem.granularity
        )

    def possible(self, problem: KernelMappingProblem) -> bool:
        """Whether any plan fits; where that is a hard integer program, whether all bytes do, cut wherever need be."""
        if self.exactly(problem):
            return TableMapping().solve(problem).plan is not None
        held, page = problem.tables.pages[0], problem.page
        need = sum(kind.layers * float((held[k, :, kind.slices] * page).min()) for k, kind in enumerate(problem.kinds))
        return need <= float((problem.capacity * page).sum())

    def exactly(self, problem: KernelMappingProblem) -> bool:
        """Whether ``possible`` is exact, not only necessary."""
        return problem.grouped and len(problem.tier_names) == 2

    def parts(self, problem: KernelMappingProblem, plan: KernelMappingPlan) -> list[Part]:
        """The parts whose times add up to the plan's step."""
        tiers = "|".join(problem.tier_names)
        return [
            Part(kind.name, split.layers, f"{'|'.join(map(str, split.counts))} on {tiers}", float(problem.seconds(k, split.counts)))
            for k, kind in enumerate(problem.kinds)
            for split in plan.splits[k]
        ]

    def rooms(self, problem: KernelMappingProblem, plan: KernelMappingPlan) -> list[Room]:
        """What each memory holds; the smallest thing is one more slice of the kind that takes least."""
        cost, found = problem.evaluate(plan), []
        for t, name in enumerate(problem.tier_names):
            slices = []
            for k, kind in enumerate(problem.kinds):
                depth = kind.layers if problem.grouped else 1
                for split in plan.splits[k]:
                    if split.counts[t] < kind.slices:
                        more = list(split.counts)
                        more[t] += 1
                        growth = problem.tables.pages[0, k, t, more[t]] - problem.tables.pages[0, k, t, split.counts[t]]
                        if growth:  # a slice may find room in pages that are there already
                            slices.append((depth * float(growth) * float(problem.page[t]), f"a slice of {kind.name}"))
            smallest, thing = min(slices, default=(math.inf, "nothing is left to put there"))
            found.append(Room(name, cost.tier_bytes[t], cost.capacity[t], smallest, thing))
        return found

    def relaxed(self, problem: KernelMappingProblem) -> Relaxed:
        """The linear program over split patterns, by column generation."""
        dual = column_generation(pattern_form(problem))
        return Relaxed(dual.bound, tuple((dual.worth / problem.page).tolist()))

    def looser(self, problem: KernelMappingProblem) -> dict[str, Any]:
        """Variants of the problem that allow more plans, by what they are called."""
        found: dict[str, Any] = {}
        if problem.grouped:
            found["each layer split in its own way (grouped=False)"] = replace(problem, grouped=False)
        if problem.granularity == "kv_head" and problem.system and problem.workload and problem.profile:
            found["cut by query head (granularity='query_head')"] = KernelMappingProblem.build(
                problem.system, problem.workload, profile=problem.profile, grouped=problem.grouped, granularity="query_head"
            )
        return found


class CacheRatioKind:
    """Cache ratio."""

    def solver(self, problem: CacheRatioProblem) -> Solver:
        return LpRatio()

    def rebuilt(self, problem: CacheRatioProblem, system: System, workload: Workload) -> CacheRatioProblem:
        """All requests get the context of ``workload``: a problem of unequal contexts is not the same again."""
        if problem.profile is None or problem.settings is None:
            raise ValueError(_no_system(problem))
        return CacheRatioProblem.build(system, workload, profile=problem.profile, **_settings(problem.settings))

    def possible(self, problem: CacheRatioProblem) -> bool:
        return problem.possible

    def exactly(self, problem: CacheRatioProblem) -> bool:
        return True

    def parts(self, problem: CacheRatioProblem, plan: CacheRatioPlan) -> list[Part]:
        counts = f"{plan.kv_gpu}|{plan.act_gpu}|{plan.kv_host}|{plan.act_host} KV, ACT on GPU and on host"
        return [
            Part(_layer_name(i, problem), layer.layers, counts, max(map(float, layer.times(plan.act_gpu, plan.kv_host, plan.act_host))))
            for i, layer in enumerate(problem.layers)
        ]

    def rooms(self, problem: CacheRatioProblem, plan: CacheRatioPlan) -> list[Room]:
        cost = problem.evaluate(plan)
        small = float(min(problem.kv_block, problem.act_block))
        rows = zip(cost.tier_names, cost.tier_bytes, cost.capacity, strict=True)
        return [Room(name, held, capacity, small, "a block") for name, held, capacity in rows]

    def relaxed(self, problem: CacheRatioProblem) -> Relaxed:
        """The best case's linear program; its last two rows are the memories, in units of the blocks' common divisor."""
        unit, divisor = ratio_unit(problem), math.gcd(problem.kv_block, problem.act_block)
        solved = [_with_duals(ratio_program(problem, case, unit)) for case in ratio_cases(problem)]
        bound, duals = min((found for found in solved if found is not None), key=lambda found: found[0])
        usable = problem.profile.usable if problem.profile else 1.0
        worth = (duals[-2] * unit / divisor * usable, duals[-1] * unit / divisor)
        return Relaxed(bound * unit, (*worth, *_zeros(problem)))

    def looser(self, problem: CacheRatioProblem) -> dict[str, Any]:
        if problem.system is None or problem.workload is None or problem.profile is None or problem.settings is None:
            return {}
        if problem.settings.weights == "host":
            return {}
        settings = _settings(problem.settings) | {"weights": "host"}
        far = CacheRatioProblem.build(problem.system, problem.workload, profile=problem.profile, **settings)
        return {"weights on the host (weights='host')": far}


class RecomputeSplitKind:
    """Recompute split."""

    def solver(self, problem: RecomputeSplitProblem) -> Solver:
        return ClosedFormSplit()

    def rebuilt(self, problem: RecomputeSplitProblem, system: System, workload: Workload) -> RecomputeSplitProblem:
        if problem.profile is None:
            raise ValueError(_no_system(problem))
        return RecomputeSplitProblem.build(
            system,
            workload,
            profile=problem.profile,
            template=problem.template,
            chunks=problem.chunks,
            weights=problem.weights,
            batches=problem.batches,
            most=None if problem.most == problem.context else min(problem.most, workload.context),
        )

    def possible(self, problem: RecomputeSplitProblem) -> bool:
        """Recomputing nothing takes least memory."""
        return problem.gpu_fits and problem.token_room >= 0

    def exactly(self, problem: RecomputeSplitProblem) -> bool:
        return True

    def parts(self, problem: RecomputeSplitProblem, plan: RecomputeSplitPlan) -> list[Part]:
        return [
            Part(
                _layer_name(i, problem),
                layer.layers,
                f"{split} of {problem.context} tokens recomputed",
                float(problem.layer_time(i, split)),
            )
            for i, (layer, split) in enumerate(zip(problem.layers, plan.splits, strict=True))
        ]

    def rooms(self, problem: RecomputeSplitProblem, plan: RecomputeSplitPlan) -> list[Room]:
        """The GPU holds the same whatever the plan; the host X of one more token of a request in one class of layers."""
        cost = problem.evaluate(plan)
        one = problem.requests * problem.layers[0].act_bytes * min(layer.layers for layer in problem.layers)
        nothing, token = (math.inf, "no plan puts more there"), (one, "one more token of each request as activations")
        more = [nothing, token if any(split < problem.most for split in plan.splits) else nothing]
        rows = zip(cost.tier_names, cost.tier_bytes, cost.capacity, more, strict=True)
        return [Room(name, held, capacity, *thing) for name, held, capacity, thing in rows]

    def relaxed(self, problem: RecomputeSplitProblem) -> Relaxed:
        """The program's last row is the host's room, in tokens of one layer."""
        unit = problem.evaluate(RecomputeSplitPlan(splits=(0,) * len(problem.layers))).latency
        solved = _with_duals(split_program(problem, unit)) if unit > 0 else None
        if solved is None:
            return Relaxed(0.0, (0.0, 0.0, *_zeros(problem)))
        bound, duals = solved
        host = duals[-1] * unit / (problem.requests * problem.layers[0].act_bytes)
        return Relaxed(bound * unit, (0.0, host, *_zeros(problem)))

    def looser(self, problem: RecomputeSplitProblem) -> dict[str, Any]:
        return {} if problem.weights == "host" else {"weights streamed from the host (weights='host')": replace(problem, weights="host")}


KINDS: dict[type, ProblemKind] = {
    KernelMappingProblem: KernelMappingKind(),
    CacheRatioProblem: CacheRatioKind(),
    RecomputeSplitProblem: RecomputeSplitKind(),
}


PLANS: dict[type, type] = {
    KernelMappingProblem: KernelMappingPlan,
    CacheRatioProblem: CacheRatioPlan,
    RecomputeSplitProblem: RecomputeSplitPlan,
}


def check_plan(problem: Any, plan: Any) -> None:
    """ValueError, in one sentence, unless ``plan`` is None or a plan of the problem's kind."""
    if plan is None or isinstance(plan, PLANS[type(problem)]):
        return
    way_out = "hand over its .plan" if isinstance(plan, SolverResult) else "leave it out for the best one"
    raise ValueError(f"explain: plan must be a {PLANS[type(problem)].__name__}, not {shown(plan)}; {way_out}")


def kind_of(problem: Any) -> ProblemKind:
    """How to ask a problem, checked that it can be built again; ValueError, in one sentence, for one that cannot be explained."""
    kind = KINDS.get(type(problem))
    if kind is None:
        names = ", ".join(cls.__name__ for cls in KINDS)
        raise ValueError(f"explain takes a {names}, not a {type(problem).__name__}")
    if problem.system is None or problem.workload is None or problem.profile is None:
        raise ValueError(_no_system(problem))
    if not _same(problem, kind.rebuilt(problem, problem.system, problem.workload)):
        raise ValueError(
            f"explain cannot build this {type(problem).__name__} again from its system, workload and profile, as it was given contexts, "
            "measured times, buffers or coefficients of its own; explain one built without them"
        )
    return kind


def _same(problem: Any, other: Any) -> bool:
    """Whether two problems are equal, arrays included."""
    for field in dataclasses.fields(problem):
        one, two = getattr(problem, field.name), getattr(other, field.name)
        if isinstance(one, KernelMappingTables):
            if not _same(one, two):
                return False
        elif isinstance(one, np.ndarray):
            if not np.array_equal(one, two):
                return False
        elif one != two:
            return False
    return True


def _no_system(problem: Any) -> str:
    return f"explain needs a {type(problem).__name__} that was built from a System and a Workload; make it with build()"


def _settings(settings: RatioSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "contexts"}


def _layer_name(index: int, problem: Any) -> str:
    return "layer" if len(problem.layers) == 1 else f"layer class {index + 1}"


def _zeros(problem: Any) -> tuple[float, ...]:
    """No worth for the tiers behind GPU and host."""
    return (0.0,) * (len(problem.system.tiers) - 2 if problem.system else 0)


def _with_duals(program: Program) -> tuple[float, Any] | None:
    """Optimum of a program's relaxation and what one more of each row's room gains; None if it is infeasible."""
    from scipy.optimize import linprog

    bounds = [(0.0, None if math.isinf(upper) else float(upper)) for upper in program.upper]
    equal = {"A_eq": program.equal, "b_eq": program.total} if len(program.total) else {}
    answer = linprog(program.cost, A_ub=program.rows, b_ub=program.room, bounds=bounds, method="highs", **equal)
    return (float(answer.fun), np.maximum(-answer.ineqlin.marginals, 0.0)) if answer.status == 0 else None
