"""Why a plan takes as long as it does: what binds, what one more GB, GB/s or TFLOP/s is worth, and what would make it fit.

Two ways to price one more unit of a resource. *dual*: the slope of the linear relaxation's optimum, from its dual prices; it is there for
memory capacities. *difference*: (T(x) - T(x + step)) / step, with T solved again on the changed machine. Both are for more, not for less.

They agree where T is a straight line over the step and the relaxation is tight. They differ

- at a kink (a memory that is about to hold all that pays, a lane about to be overtaken by another): a convex T falls most at the start,
  so the difference lies between the duals at x and at x + step; at the kink itself the dual is any value between the two sides';
- where plans are whole slices, blocks or tokens: the optimum moves in steps and waits for the next slice to fit, the relaxation does not.
  A worth of 0 over one step may then be more than 0 over a longer one (``step``).

A difference ``of`` the "optimum" is between optima that are proven to 1e-9; where the solver proves less, it is of the "relaxation".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from ..models.checks import shown
from ..models.units import GB, ms
from ..solvers.result import Solver, SolverResult, Status
from ._problem_kinds import ProblemKind, Resource, check_plan, kind_of, resources

PROVEN = 2e-9
"""Largest gap at which an optimum counts as exact, above what rounding and the enumerating solvers leave."""

SLOWER = 1e-3
"""Share by which a resource is slowed down to see whether a part waits for it: two whose times differ by less bind together, as those do
that an optimum balances up to whole slices and blocks."""

BITS = (16, 12, 8, 6, 4, 3, 2)
"""Bits an element that are tried where nothing fits."""

MARGINS = (0.005, 0.05, 0.2)
"""Shares of the bytes, the batch or the context that are added to what would do if slices could be cut anywhere, in problems where no exact
check of whole ones is quick; the first that a plan is found for counts."""

SECONDS = 5.0
"""Time limit of a solve that verifies a lever, and of all of them together where no exact check is quick; a lever for which no plan is
found by then is named as not verified."""

LEVER_SECONDS = 1.0
"""Time limit of one of these solves where no exact check is quick."""

LEVER_GAP = 1e-2
"""What is to be proven of the step that a lever then takes, where no exact check is quick: a plan is found long before its last per mille
is proven, and a plan is what shows that the lever helps."""

FINENESS = 1e-4
"""Steps of missing capacity, as a share of the bytes of weights, keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """A memory under the plan, in bytes. ``full``: there is no room for ``smallest``, the least that could be put there in addition."""

    tier: str
    held: float
    capacity: float
    smallest: float
    thing: str

    @property
    def full(self) -> bool:
        """Whether less is free than the smallest thing takes."""
        return self.capacity - self.held < self.smallest < math.inf

    def __str__(self) -> str:
        free = f"{self.tier} holds {self.held / GB:.6g} of {self.capacity / GB:.6g} GB"
        if self.held > self.capacity:
            return f"{free}: {(self.held - self.capacity) / GB:.3g} GB too much"
        if not math.isfinite(self.smallest):
            return f"{free}; {self.thing}"
        return f"{free}, {'full: ' if self.full else 'not full: '}{self.thing} takes {self.smallest / GB:.3g} GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What ``layers`` layers of a ``part`` wait for, ``seconds`` in all: several resources that bind together, or none (a barrier)."""

    part: str
    layers: int
    plan: str
    seconds: float
    resources: tuple[str, ...]

    def __str__(self) -> str:
        what = " and ".join(self.resources) or "nothing that a machine could have more of"
        return f"{self.part}, {self.layers} layers, {self.plan}: {self.seconds / ms:.5g} ms, bound by {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What one more ``unit`` of a ``resource``, of which there are ``now``, saves: ``worth_ms`` of a step.

    ``method`` "dual" or "difference" over ``step`` units (None for a dual), ``of`` the "optimum" or the linear "relaxation".
    """

    resource: str
    now: float
    unit: str
    worth_ms: float
    method: Literal["dual", "difference"]
    of: Literal["optimum", "relaxation"]
    step: float | None = None

    def __str__(self) -> str:
        over = "" if self.step is None else f" over {self.step:g} {self.unit}"
        return f"{self.worth_ms:.4g} ms ({self.method}{over} of the {self.of})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """A change that alone makes an infeasible problem feasible: from ``now`` to ``needed``; the plan then takes ``latency`` [s]."""

    name: str
    now: float | None
    needed: float | None
    unit: str
    latency: float

    def __str__(self) -> str:
        change = self.name if self.needed is None else f"{self.name} {self.needed:.7g} {self.unit} instead of {self.now:.7g}"
        return f"{change}: {self.latency / ms:.5g} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """See ``explain``. ``result`` is of the solver; ``plan`` and ``cost`` are what is explained, None if nothing fits.
    ``unverified``: levers for which no plan was found in time, and none was ruled out."""

    subject: str
    result: SolverResult[Any]
    plan: Any | None
    cost: Any | None
    memories: tuple[MemoryUse, ...] = ()
    bottlenecks: tuple[Bottleneck, ...] = ()
    worths: tuple[Worth, ...] = ()
    levers: tuple[Lever, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether there is a plan."""
        return self.plan is not None

    def worth(self, resource: str, method: Literal["dual", "difference"] = "difference") -> float:
        """``worth_ms`` of one more unit of a resource, by its name ("HBM capacity"), of the optimum if that is known; ValueError names
        those there are."""
        found = [worth.worth_ms for worth in self.worths if (worth.resource, worth.method) == (resource, method)]
        if not found:
            known = dict.fromkeys(worth.resource for worth in self.worths if worth.method == method)
            raise ValueError(f"there is no {method} for {resource!r}; there is one for {', '.join(known) or 'nothing'}")
        return found[-1]

    def frame(self) -> pd.DataFrame:
        """All of it as one table: a row for each memory, bottleneck, worth and lever (column ``about``)."""
        columns = [
            *("about", "what", "now", "needed", "unit", "full", "layers", "plan", "time_ms", "bound_by"),
            *("worth_ms", "method", "of", "step"),
        ]
        rows: list[dict[str, Any]] = [
            {"about": "memory", "what": m.tier, "now": m.held / GB, "needed": m.capacity / GB, "unit": "GB", "full": m.full}
            for m in self.memories
        ]
        rows += [
            {"about": "time", "what": b.part, "layers": b.layers, "plan": b.plan, "time_ms": b.seconds / ms}
            | {"bound_by": " and ".join(b.resources)}
            for b in self.bottlenecks
        ]
        rows += [
            {"about": "worth", "what": w.resource, "now": w.now, "unit": w.unit, "worth_ms": w.worth_ms}
            | {"method": w.method, "of": w.of, "step": w.step}
            for w in self.worths
        ]
        rows += [
            {"about": "lever", "what": v.name, "now": v.now, "needed": v.needed, "unit": v.unit, "time_ms": v.latency / ms}
            for v in self.levers
        ]
        return pd.DataFrame(rows, columns=columns).astype({"layers": "Int64", "full": "boolean"})

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        result = self.result
        if self.cost is None:
            verdict = "nothing fits" if result.status is Status.INFEASIBLE else "no plan was found, and none is ruled out"
            yield f"{self.subject}: {verdict}; {result.message}"
            if self.levers:
                yield "What alone would make it fit, and the step it then takes:"
                yield from (f"  {lever}" for lever in self.levers)
            elif result.status is Status.INFEASIBLE and not self.unverified:
                yield "No single change of a memory, the batch, the context or the bits makes it fit."
            if self.unverified:
                yield f"No plan was found within {SECONDS:g} s, and none is ruled out, with another: {', '.join(self.unverified)}."
            return
        gap = "no bound" if result.gap is None else f"gap {result.gap:.2g}"
        yield f"{self.subject}: {self.cost.latency / ms:.6g} ms a step"
        if result.objective is None:
            yield f"{result.solver}: {result.status}; {result.message}"
        else:
            bound = "" if result.bound is None else f", proven to be at least {result.bound / ms:.6g} ms"
            yield f"{result.solver}: {result.objective / ms:.6g} ms{bound} ({result.status}, {gap})"
        yield f"Plan: {self.plan}"
        energy = getattr(self.cost, "energy", None)  # costs of offloading have none
        if energy is not None:
            yield f"Energy of its memory accesses: {energy:.5g} J"
        yield "Memory:"
        yield from (f"  {memory}" for memory in self.memories)
        yield "Time:"
        yield from (f"  {bottleneck}" for bottleneck in self.bottlenecks)
        groups: dict[str, list[Worth]] = {}
        for worth in self.worths:
            groups.setdefault(worth.resource, []).append(worth)
        paying = {name: group for name, group in groups.items() if any(worth.worth_ms for worth in group)}
        if paying:
            yield "One more of these saves, a step:"
        for name, group in paying.items():
            yield f"  {group[0].unit} of {name} ({group[0].now:.6g} now): {', '.join(map(str, group))}"
        if len(paying) < len(groups):
            yield f"One more unit saves nothing of: {', '.join(name for name in groups if name not in paying)}"


def explain(problem: Any, plan: Any | None = None, *, solver: Solver | None = None, step: float = 1.0) -> Explanation:
    """What binds in ``plan``, and what more of each resource is worth; or, if nothing fits, what would make it fit.

    ``problem``: a KernelMappingProblem, CacheRatioProblem or RecomputeSplitProblem that was built from a System. ``plan``: None for the
    plan of ``solver``, which is the exact one of the problem kind unless given. Worths are those of the optimum, not of a given plan.
    ``step``: over how many GB, GB/s and TFLOP/s differences are taken. When duals and differences agree: module docstring.

    If no plan exists, every lever was tried by building and solving the changed problem with all else as it is: capacity of each tier (the
    least, to within 1e-4 of the bytes of weights, keys and values), the largest smaller batch and shorter context, the largest of
    ``BITS`` below the present ones for weights, for keys and values and for activations, and a looser form of the problem. Of a kernel
    kernel mapping per layer, or over more than two memories, the least is by bytes alone, plus a margin (``MARGINS``) for which a plan is
    found, and the step's time is that of a plan proven to within ``LEVER_GAP``. Those that do not help alone are left out; those that
    could not be verified within ``SECONDS`` are named (``unverified``).
    """
    if not (isinstance(step, (int, float)) and 0 < step < math.inf):
        raise ValueError(f"explain: step must be above 0 and finite, in GB, GB/s and TFLOP/s, not {step!r}; 1 is one more of each")
    kind = kind_of(problem)
    check_plan(problem, plan)
    solver = kind.solver(problem) if solver is None else solver
    if isinstance(solver, type) or not callable(getattr(solver, "solve", None)):
        example = type(kind.solver(problem)).__name__
        raise ValueError(f"explain: solver must be one of memsplit.solvers, as in solver={example}(), not {shown(solver)}")
    result = solver.solve(problem)
    plan = result.plan if plan is None else plan
    workload = problem.workload
    subject = f"{workload.llm.name} on {problem.system.name}, batch {workload.batch}, context {workload.context}"
    if plan is None:
        tried = tuple(_levers(kind, problem, solver)) if result.status is Status.INFEASIBLE else ()
        levers = tuple(one for one in tried if isinstance(one, Lever))
        unverified = tuple(one for one in tried if isinstance(one, str))
        return Explanation(subject=subject, result=result, plan=None, cost=None, levers=levers, unverified=unverified)
    rooms = kind.rooms(problem, plan)
    return Explanation(
        subject=subject,
        result=result,
        plan=plan,
        cost=problem.evaluate(plan),
        memories=tuple(MemoryUse(tier=r.name, held=r.held, capacity=r.capacity, smallest=r.smallest, thing=r.thing) for r in rooms),
        bottlenecks=tuple(_bottlenecks(kind, problem, plan)),
        worths=() if result.status is Status.INFEASIBLE else tuple(_worths(kind, problem, solver, result, step)),
    )


def _bottlenecks(kind: ProblemKind, problem: Any, plan: Any) -> Iterator[Bottleneck]:
    """A part waits for those resources that, made a little slower, make it take longer under the same plan."""
    parts = kind.parts(problem, plan)
    waits: list[list[str]] = [[] for _ in parts]
    for resource in resources(problem.system):
        if resource.field != "capacity":
            slower = resource.changed(problem.system, resource.of(problem.system) * (1 - SLOWER))
            for waiting, part, delayed in zip(waits, parts, kind.parts(kind.rebuilt(problem, slower, problem.workload), plan), strict=True):
                if delayed.seconds > part.seconds * (1 + 1e-12):
                    waiting.append(resource.name)
    for waiting, part in zip(waits, parts, strict=True):
        yield Bottleneck(part=part.name, layers=part.layers, plan=part.plan, seconds=part.layers * part.seconds, resources=tuple(waiting))


def _worths(kind: ProblemKind, problem: Any, solver: Solver, result: SolverResult[Any], step: float) -> Iterator[Worth]:
    """Capacities by duals and by differences, all other resources by differences."""
    relaxed = kind.relaxed(problem)
    rows: list[tuple[Resource, float]] = [(resource, resource.of(problem.system)) for resource in resources(problem.system)]
    for resource, now in rows:
        known: dict[str, Any] = {"resource": resource.name, "now": now / resource.factor, "unit": resource.unit}
        more = kind.rebuilt(problem, resource.changed(problem.system, now + step * resource.factor), problem.workload)
        again = solver.solve(more) if _exact(result) else None
        exact = again is not None and _exact(again)
        if resource.field == "capacity":
            dual = _rounded(relaxed.worth[resource.index] * resource.factor, relaxed.bound)
            yield Worth(**known, worth_ms=dual, method="dual", of="relaxation")
        if resource.field == "capacity" or not exact:
            loose = _rounded(relaxed.bound - kind.relaxed(more).bound, relaxed.bound) / step
            yield Worth(**known, worth_ms=loose, method="difference", of="relaxation", step=step)
        if again is not None and exact:
            gain = _rounded(_optimum(result) - _optimum(again), _optimum(result)) / step
            yield Worth(**known, worth_ms=gain, method="difference", of="optimum", step=step)


def _rounded(gain: float, latency: float) -> float:
    """ms; 0 for what is no more than the accuracy of a linear program."""
    return gain / ms if abs(gain) > 1e-9 * abs(latency) else 0.0


def _exact(result: SolverResult[Any]) -> bool:
    return result.gap is not None and result.gap <= PROVEN


def _optimum(result: SolverResult[Any]) -> float:
    return math.inf if result.objective is None else result.objective


def _levers(kind: ProblemKind, problem: Any, solver: Solver) -> Iterator[Lever | str]:
    """Each single change that makes the problem feasible, with the latency of the plan that then fits; the name of one for which the time
    was too short."""
    system, workload = problem.system, problem.workload
    quick, spent = kind.exactly(problem), 0.0
    margins = (0.0,) if quick else MARGINS

    def changed(to_system: Any = system, to_workload: Any = workload) -> Any:
        return kind.rebuilt(problem, to_system, to_workload)

    def lever(name: str, now: float | None, unit: str, tried: Iterable[tuple[float | None, Any]], by: Solver) -> Iterator[Lever | str]:
        """The first of the values tried whose problem is solved."""
        nonlocal spent
        open_still = False
        for needed, feasible in tried:
            left = SECONDS if quick else SECONDS - spent
            started = time.perf_counter()
            result = _limited(by, left, quick=quick).solve(feasible) if left > 0 else None
            spent += time.perf_counter() - started
            if result is not None and result.objective is not None:
                yield Lever(name=name, now=now, needed=needed, unit=unit, latency=result.objective)
                return
            open_still = open_still or result is None or result.status is not Status.INFEASIBLE
        if open_still:
            yield name

    need = workload.weight_bytes + workload.state_bytes
    for resource in resources(system):
        if resource.field == "capacity":
            capacity = resource.of(system)
            grain = max(need * FINENESS, float(system.tiers[resource.index].page), 1.0)

            def larger(steps: int, resource: Resource = resource, capacity: float = capacity, grain: float = grain) -> Any:
                return resource.changed(system, capacity + steps * grain)

            steps = _least(lambda n: kind.possible(changed(larger(n))), math.ceil(4 * need / grain))
            if steps is not None:
                machines = [larger(steps + math.ceil(margin * need / grain)) for margin in margins]
                yield from lever(resource.name, capacity / GB, "GB", ((resource.of(one) / GB, changed(one)) for one in machines), solver)
    for field, unit in (("batch", "requests"), ("context", "tokens")):
        now = getattr(workload, field)

        def smaller(less: int, field: str = field, now: int = now) -> Any:
            return replace(workload, **{field: now - less}, state_tokens=None)

        less = _least(lambda n: kind.possible(changed(to_workload=smaller(n))), now - 1)
        if less is not None:
            works = [smaller(min(less + math.ceil(margin * (now - less)), now - 1)) for margin in margins]
            yield from lever(field, now, unit, ((getattr(one, field), changed(to_workload=one)) for one in works), solver)
    for field in ("weight_bits", "kv_bits", "activation_bits"):
        now = getattr(workload, field)
        narrower = (changed(to_workload=replace(workload, **{field: bits})) for bits in BITS if bits < now)
        tried = ((getattr(one.workload, field), one) for one in filter(kind.possible, narrower))
        yield from lever(field.replace("_", " "), now, "an element", tried, solver)
    for name, looser in kind.looser(problem).items():
        yield from lever(name, None, "", [(None, looser)], kind.solver(looser))


def _limited(solver: Any, left: float, *, quick: bool) -> Solver:
    """The solver with at most ``left`` seconds, as far as it has a limit; unless ``quick``, with ``LEVER_SECONDS`` and ``LEVER_GAP``."""
    limits = {"time_limit": (left if quick else min(left, LEVER_SECONDS), min), "relative_gap": (0.0 if quick else LEVER_GAP, max)}
    changes = {}
    for field, (value, choose) in limits.items():
        if hasattr(solver, field):
            given = getattr(solver, field)
            changes[field] = value if given is None else choose(given, value)
    limited: Solver = replace(solver, **changes) if changes else solver
    return limited


def _least(fits: Callable[[int], bool], most: int) -> int | None:
    """The least n from 1 to ``most`` with ``fits(n)``, which never turns back to False; None if there is none."""
    if most < 1 or not fits(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
