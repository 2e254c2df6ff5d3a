"""Solvers of FlexGen's placement problem (arXiv 2303.06865): its own search, and a proven optimum by the Charnes-Cooper transformation.

For one GPU batch of g requests and k GPU batches, k from ``least`` to ``most``. Everything is divided by the number of requests, so that
the block size becomes a variable: v = least / k, W = v w (Charnes-Cooper), with w, c, h the shares of weights, cache and activations.

    min   (L P + L (n - 1) D) / (g least n)
    s.t.  P >= row W + g least (row c + row h + fixed v0)        v0 = 1, each lane of prefill;  D likewise, of decode
          sum W = v     sum c = 1     sum h = 1     h_disk = 0 unless allowed     least / most <= v <= 1
          row W + g least (row c + row h) + g (row y + row z + fixed v) <= room v        each peak of memory
          y >= (least / most) c,   y >= c + v - 1;    z likewise of h        y for v c and z for v h (McCormick): buffers of a GPU batch

With least = most it is FlexGen's program of nine shares. Else only y and z are relaxed, so its optimum is a lower bound for all k in
between; branching on k closes the gap. A bound is over the problem's ``gpu_batch_sizes`` and every number of GPU batches, not over GPU
batches that are not among them.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..models.checks import whole
from ..models.placement import TIER_OF_PEAK, PlacementCoefficients, PlacementPlan, PlacementProblem, Shares
from ..models.roofline import Array
from ._program import Program, ProgramAnswer, relaxation
from .result import SolverResult, check_settings, finish

MARGINS = (0.0, 1e-7, 1e-6)
"""Shares of the memory left free, tried in turn: a linear program holds its rows only within 1e-7, a plan has to fit."""

SMALLEST_ROOM = 1e-6
"""Share of the largest amount that could be on a tier below which its room is not the unit of its row: HiGHS refuses larger numbers."""

SMALLEST_SHARE = 1e-9
"""Shares below it are a solver's rounding and become 0."""

MOST_NODES = 20_000
"""Ranges of GPU batches that a search looks at before it gives its bound as it is; a few dozen close the gap on published LLMs."""

LEAST_TIME = 0.1
"""Seconds that CBC is given for a program even if the time limit is near: it solves one in a hundredth."""

ANY = math.inf

# Columns of a program: W, c, h, y, z (three each), v, P, D.
WEIGHTS, CACHE, HIDDEN, CACHE_BUFFER, HIDDEN_BUFFER = (slice(3 * i, 3 * i + 3) for i in range(5))
V, PREFILL, DECODE, SIZE = 15, 16, 17, 18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scaled:
    """A program, and the seconds a token of one unit of its objective."""

    program: Program
    unit: float


def _program(problem: PlacementProblem, k: PlacementCoefficients, gpu_batch: int, least: int, most: float, margin: float = 0.0) -> _Scaled:
    """The module's program for ``least`` to ``most`` GPU batches (``ANY``: no limit)."""
    block, (first, later) = gpu_batch * least, problem.steps
    rows: list[Array] = []
    room: list[float] = []
    equal, total = np.zeros((4, SIZE)), np.array([0.0, 1.0, 1.0, 0.0])
    phases = (
        (PREFILL, first, k.prefill_weights, block * k.prefill_cache, block * k.prefill_hidden, block * k.prefill_fixed),
        (DECODE, later, k.decode_weights, block * k.decode_cache, block * k.decode_hidden, block * k.decode_fixed),
    )
    # The unit of time is what all plans of a block of ``least`` take at least, or, where that is nothing, what the worst takes.
    lower = max(sum(steps * max(_floor(np.min, *terms)) for _, steps, *terms in phases), 0.0)
    upper = sum(steps * max(_floor(np.max, *terms)) for _, steps, *terms in phases)
    scale = (lower if lower > 1e-9 * upper else upper) or 1.0
    cost = np.zeros(SIZE)
    limit = np.ones(SIZE)
    for column, steps, weights, cache, hidden, fixed in phases:
        cost[column] = 1.0
        limit[column] = 2 * steps * max(_floor(np.max, weights, cache, hidden, fixed)) / scale + 1
        for lane in range(len(fixed)):
            row = np.zeros(SIZE)
            row[WEIGHTS], row[CACHE], row[HIDDEN], row[column] = weights[lane], cache[lane], hidden[lane], -scale / max(steps, 1)
            rows.append(row * max(steps, 1) / scale)
            room.append(-float(fixed[lane]) * max(steps, 1) / scale)
    if not later:
        cost[DECODE] = 0.0
        limit[DECODE] = math.inf
    usable = problem.room
    for peak, tier in enumerate(TIER_OF_PEAK):
        row = np.zeros(SIZE)
        row[WEIGHTS], row[CACHE], row[HIDDEN] = k.held_weights[peak], block * k.held_cache[peak], block * k.held_hidden[peak]
        row[CACHE_BUFFER], row[HIDDEN_BUFFER] = gpu_batch * k.cache_buffer[peak], gpu_batch * k.hidden_buffer[peak]
        row[V] = gpu_batch * k.fixed_buffer[peak] - usable[tier] * (1 - margin)
        # In units of the room, so that it is kept to 1e-7 of it; but of a tier that has next to none, no number becomes too large.
        rows.append(row / (max(usable[tier], SMALLEST_ROOM * float(np.abs(row).max())) or 1.0))
        room.append(0.0)
    narrow = least / most
    for share, buffer in ((CACHE, CACHE_BUFFER), (HIDDEN, HIDDEN_BUFFER)):
        for tier in range(3):
            for slope, of_v, rest in ((narrow, 0.0, 0.0), (1.0, 1.0, 1.0)):
                row = np.zeros(SIZE)
                row[share][tier], row[buffer][tier], row[V] = slope, -1.0, of_v
                rows.append(row)
                room.append(rest)
    row = np.zeros(SIZE)
    row[V] = -1.0
    rows.append(row)
    room.append(-narrow)
    equal[0, WEIGHTS], equal[0, V] = 1.0, -1.0
    equal[1, CACHE] = 1.0
    equal[2, HIDDEN] = 1.0
    if not problem.hidden_on_disk:
        equal[3, HIDDEN.stop - 1] = 1.0
    whole = np.zeros(SIZE, dtype=np.bool_)
    kept = equal if not problem.hidden_on_disk else equal[:3]
    program = Program(cost=cost, upper=limit, whole=whole, rows=np.array(rows), room=np.array(room), equal=kept, total=total[: len(kept)])
    return _Scaled(program=program, unit=float(scale) / (block * problem.generated))


def _floor(extreme: Callable[..., Array], weights: Array, cache: Array, hidden: Array, fixed: Array) -> list[float]:
    """For each lane, the extreme of its time over all shares."""
    return list(extreme(weights, axis=1) + extreme(cache, axis=1) + extreme(hidden, axis=1) + fixed)


Solve = Callable[[Program], ProgramAnswer]


@dataclass(slots=True)
class _Search:
    """What the searches share: linear programs, and the best plan so far."""

    problem: PlacementProblem
    solve: Solve
    deadline: float = math.inf
    plan: PlacementPlan | None = None
    latency: float = math.inf

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def bound(self, k: PlacementCoefficients, gpu_batch: int, least: int, most: float) -> tuple[float, Array | None]:
        """A lower bound of the latency with ``least`` to ``most`` GPU batches (inf: there are no plans), and the program's answer."""
        scaled = _program(self.problem, k, gpu_batch, least, most)
        answer = self.solve(scaled.program)
        if answer.infeasible:
            return math.inf, None
        return (0.0 if answer.bound is None else max(answer.bound, 0.0) * scaled.unit), answer.values

    def try_plan(self, k: PlacementCoefficients, gpu_batch: int, gpu_batches: int) -> tuple[float, float]:
        """Solve the shares of one block, keep the plan if it is the best; its latency (inf: none) and the bound of the block."""
        bound = 0.0
        for margin in MARGINS:
            scaled = _program(self.problem, k, gpu_batch, gpu_batches, gpu_batches, margin)
            answer = self.solve(scaled.program)
            if margin == 0.0:
                if answer.infeasible:
                    return math.inf, math.inf
                bound = 0.0 if answer.bound is None else max(answer.bound, 0.0) * scaled.unit
            if answer.values is None:
                continue
            plan = PlacementPlan(
                weights=_shares(answer.values[WEIGHTS]),
                cache=_shares(answer.values[CACHE]),
                hidden=_shares(answer.values[HIDDEN], disk=self.problem.hidden_on_disk),
                gpu_batch=gpu_batch,
                gpu_batches=gpu_batches,
            )
            cost = self.problem.evaluate(plan)
            if cost.fits:
                if cost.latency < self.latency:
                    self.plan, self.latency = plan, cost.latency
                return cost.latency, bound
        return math.inf, bound


def _shares(values: Array, disk: bool = True) -> Shares:
    """Shares from a solver's values, with a sum of 1."""
    kept = np.where(values > SMALLEST_SHARE, values, 0.0)
    if not disk:
        kept[2] = 0.0
    gpu, host, far = (kept / kept.sum()).tolist()
    return gpu, host, far


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenPlacement:
    """FlexGen's own search: for each GPU batch size, one linear program for each number of GPU batches, until throughput falls.

    It stops at the first GPU batch that does not fit, and at ``most_gpu_batches``. No bound: a later number may be better.
    """

    most_gpu_batches: int = 1000

    def solve(self, problem: PlacementProblem, /) -> SolverResult[PlacementPlan]:
        """The best plan that the search meets."""
        started = time.perf_counter()
        most_gpu_batches = whole("FlexGenPlacement", "most_gpu_batches", self.most_gpu_batches, "GPU batches to try")
        search = _Search(problem, relaxation)
        none = False
        for gpu_batch in problem.gpu_batch_sizes:
            k, previous = problem.coefficients(gpu_batch), math.inf
            for gpu_batches in range(1, most_gpu_batches + 1):
                latency, bound = search.try_plan(k, gpu_batch, gpu_batches)
                # The first of the smallest GPU batch needs the least memory of all plans.
                none = none or (gpu_batch == problem.gpu_batch_sizes[0] and gpu_batches == 1 and math.isinf(bound))
                if latency > previous or math.isinf(latency):
                    break
                previous = latency
            if math.isinf(previous):
                break
        message = "" if search.plan or none else "no block that was tried has shares that fit; an exact solver may find one"
        return finish(self, problem, search.plan, started=started, infeasible=none, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class CharnesCooperPlacement:
    """The module's program for each GPU batch size, branching on the number of GPU batches until proven within ``relative_gap``.

    One program for each GPU batch size gives the first bound and, rounded, a plan: ``relative_gap`` 0.01 rarely needs more.
    ``time_limit`` [s]: after it, the best plan and the bound reached count.
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0

    def solve(self, problem: PlacementProblem, /) -> SolverResult[PlacementPlan]:
        """The plan of the highest throughput, and a bound."""
        return _branch(self, problem, relaxation, self.relative_gap, self.time_limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class PulpPlacement:
    """``CharnesCooperPlacement`` with its linear programs written in PuLP and solved by CBC."""

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0

    def solve(self, problem: PlacementProblem, /) -> SolverResult[PlacementPlan]:
        """The plan of the highest throughput, and a bound."""
        from ._pulp import solve_program

        started = time.perf_counter()
        check_settings(self.relative_gap, self.time_limit)

        def answer(program: Program) -> ProgramAnswer:
            left = None if self.time_limit is None else max(started + self.time_limit - time.perf_counter(), LEAST_TIME)
            return solve_program(program, relative_gap=0.0, time_limit=left)

        return _branch(self, problem, answer, self.relative_gap, self.time_limit)


@dataclass(frozen=True, slots=True)
class FixedPlacement:
    """A given plan, as published or guessed, if it fits."""

    plan: PlacementPlan

    def solve(self, problem: PlacementProblem, /) -> SolverResult[PlacementPlan]:
        """The plan; UNKNOWN, with what is too full, if it does not fit."""
        return finish(self, problem, self.plan, started=time.perf_counter())


def _branch(
    solver: object, problem: PlacementProblem, solve: Solve, relative_gap: float, time_limit: float | None
) -> SolverResult[PlacementPlan]:
    """Best first over ranges (GPU batch size, least, most GPU batches); each is bounded by its program and split where that points."""
    started = time.perf_counter()
    check_settings(relative_gap, time_limit)
    search = _Search(problem, solve, math.inf if time_limit is None else started + time_limit)
    coefficients = {size: problem.coefficients(size) for size in problem.gpu_batch_sizes}
    heap: list[tuple[float, int, int, float, float]] = []
    closed = math.inf
    infeasible = False

    def push(gpu_batch: int, least: int, most: float, parent: float) -> bool:
        """Bound a range and keep it if it may hold a better plan; whether it holds any."""
        nonlocal closed
        bound, values = (parent, None) if search.late else search.bound(coefficients[gpu_batch], gpu_batch, least, most)
        if math.isinf(bound):
            return False
        bound = max(bound, parent)
        wanted = float(least) if values is None else least / max(float(values[V]), 1e-9)
        if bound < search.latency * (1 - relative_gap / 2):
            heapq.heappush(heap, (bound, gpu_batch, least, most, wanted))
        else:
            closed = min(closed, bound)
        return True

    for size in problem.gpu_batch_sizes:
        # Memory grows with the GPU batch: once one does not fit, no larger one does.
        if not push(size, 1, ANY, 0.0):
            infeasible = size == problem.gpu_batch_sizes[0]
            break
    nodes = 0
    while heap and heap[0][0] < search.latency * (1 - relative_gap / 2) and nodes < MOST_NODES and not search.late:
        nodes += 1
        bound, size, least, most, wanted = heapq.heappop(heap)
        middle = int(min(max(math.floor(wanted + 1e-6), least), most))
        _, own = search.try_plan(coefficients[size], size, middle)
        if not math.isinf(own):
            closed = min(closed, max(bound, own))
        if least < middle:
            push(size, least, middle - 1, bound)
        # What does not fit with some GPU batches does not fit with more.
        if middle < most and not math.isinf(own):
            push(size, middle + 1, most, bound)
    proven = min([closed, *(node[0] for node in heap)], default=math.inf)
    proven = min(proven, search.latency)
    infeasible = infeasible or (search.plan is None and math.isinf(proven))
    message = "" if search.plan or infeasible else "no plan was found in the time given; give more, or fewer GPU batch sizes"
    return finish(
        solver,
        problem,
        search.plan,
        started=started,
        bound=None if math.isinf(proven) else proven,
        relative_gap=relative_gap,
        infeasible=infeasible,
        message=message,
    )
