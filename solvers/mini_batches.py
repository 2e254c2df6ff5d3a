"""Solvers of the mini-batches (``models.mini_batches``).

Sets        i: requests;   j: places for mini-batches, as many as a plan without two that fit together can have
Variables   x_ij: request i is in j, u_j: j is used, binary;   z_j: seconds of j, T: seconds of the layer
Objective   min  T
Constraints z_j >= alpha_load u_j + sum_i load_i x_ij,    z_j >= alpha_gen u_j + sum_i gen_i x_ij         every j
            T >= sum_j z_j,    T >= t_w + sum_j (alpha_load u_j + sum_i load_i x_ij)
            sum_j x_ij = 1                                                                                every i
            sum_i x_ij <= most_requests u_j,    sum_i blocks_i x_ij <= most_blocks u_j                    every j
            x_ij = 0 for j > i;    u_j >= u_(j+1)        (equal plans with other numbers of their mini-batches are left out)

Any plan can be numbered by the first request of each mini-batch, so that j <= i for all its requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ..models.mini_batches import MiniBatchPlan, MiniBatchProblem
from ..models.roofline import Array
from ._program import Program, ProgramAnswer
from .result import SolverResult, check_settings, finish, unproven

Indices = NDArray[np.int64]

MOST_PAIRS = 50_000
"""Pairs of a request and a mini-batch in a program, at most: CP-SAT and PuLP take some 200 MB for as many."""

SECONDS_A_PAIR = 2e-5
"""Seconds that a solver needs for each pair of a program before it begins to search, measured; with less left, none is written."""


@dataclass(frozen=True, slots=True)
class FirstComeBatches:
    """Requests in their order; a mini-batch is closed when the next request does not fit."""

    def solve(self, problem: MiniBatchProblem, /) -> SolverResult[MiniBatchPlan]:
        """The mini-batches in order of arrival."""
        started = time.perf_counter()
        batches: list[list[int]] = [[]]
        held = 0
        for i, blocks in enumerate(problem.blocks):
            if len(batches[-1]) == problem.most_requests or held + blocks > problem.most_blocks:
                batches.append([])
                held = 0
            batches[-1].append(i)
            held += blocks
        return finish(self, problem, _plan(batches), started=started)


@dataclass(frozen=True, slots=True)
class GreedyRatioBatches:
    """HybridServe's idea: each mini-batch is filled with the requests that keep its gen / load nearest to 1.

    A mini-batch starts with the open request whose gen and load differ most. Then, of those that fit, the one joins that leaves the least
    difference of the sums; a mini-batch is closed only when no open request fits (which can be too late). This reading of "a bin
    packing with a ratio near 1" is ours. If the fewest mini-batches matter more, the order of arrival can be better.
    """

    def solve(self, problem: MiniBatchProblem, /) -> SolverResult[MiniBatchPlan]:
        """The greedy mini-batches."""
        started = time.perf_counter()
        return finish(self, problem, _greedy(problem), started=started)


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpBatches:
    """The program of the module's docstring in PuLP, by CBC; skipped if a greedy plan is proven by ``MiniBatchProblem.least_latency``.

    If ``time_limit`` [s] comes first, the best of what CBC found and the greedy plans counts.
    """

    relative_gap: float = 1e-4
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: MiniBatchProblem, /) -> SolverResult[MiniBatchPlan]:
        """The plan within ``relative_gap`` of the optimum, or the best one in time."""
        from ._pulp import solve_program

        def run(program: Program, limit: float | None) -> ProgramAnswer:
            return solve_program(program, relative_gap=self.relative_gap, time_limit=limit, seed=self.seed)

        check_settings(self.relative_gap, self.time_limit, seed=self.seed)
        return _integer(self, problem, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSatBatches:
    """The same program in OR-Tools' CP-SAT, skipped likewise.

    If ``time_limit`` [s] comes first, the best of what CP-SAT found and the greedy plans counts.
    """

    relative_gap: float = 1e-4
    time_limit: float | None = 60.0
    threads: int = 1
    seed: int = 0

    def solve(self, problem: MiniBatchProblem, /) -> SolverResult[MiniBatchPlan]:
        """The plan within ``relative_gap`` of the optimum, or the best one in time."""
        from ._cpsat import solve_program

        def run(program: Program, limit: float | None) -> ProgramAnswer:
            return solve_program(program, relative_gap=self.relative_gap, scale=1.0, time_limit=limit, threads=self.threads, seed=self.seed)

        check_settings(self.relative_gap, self.time_limit, self.threads, seed=self.seed)
        return _integer(self, problem, run)


def most_places(problem: MiniBatchProblem) -> int:
    """Mini-batches of a plan in which no two fit together, at most; some optimal plan is one.

    Two that do not fit together take more than one whole limit, of requests or of blocks. So half as many mini-batches as there are,
    rounded down, are fewer than q = requests / most_requests + blocks / most_blocks, and there are fewer than 2 q + 1.
    """
    n, m, total, room = problem.requests, problem.most_requests, sum(problem.blocks), problem.most_blocks
    doubled = -(-2 * (n * room + total * m) // (m * room))  # 2 q, rounded up
    return max(1, min(n, doubled))


def _plan(batches: list[list[int]]) -> MiniBatchPlan:
    """Mini-batches in order of their first requests."""
    return MiniBatchPlan(batches=tuple(sorted(tuple(sorted(batch)) for batch in batches if batch)))


def _greedy(problem: MiniBatchProblem) -> MiniBatchPlan:
    surplus = np.array(problem.generate) - np.array(problem.load)
    blocks = np.array(problem.blocks, dtype=np.int64)
    remaining = np.ones(problem.requests, dtype=np.bool_)
    batches: list[list[int]] = []
    while remaining.any():
        first = int(np.where(remaining, np.abs(surplus), -1.0).argmax())
        batch, balance, held = [first], problem.alpha_generate - problem.alpha_load + surplus[first], int(blocks[first])
        remaining[first] = False
        while len(batch) < problem.most_requests:
            fits = remaining & (blocks <= problem.most_blocks - held)
            if not fits.any():
                break
            nearest = int(np.where(fits, np.abs(balance + surplus), np.inf).argmin())
            batch.append(nearest)
            balance, held = balance + surplus[nearest], held + int(blocks[nearest])
            remaining[nearest] = False
        batches.append(batch)
    return _plan(batches)


def _program(problem: MiniBatchProblem, unit: float) -> Program:
    """The program with seconds counted in ``unit``. Columns: x (all i of place 0, of place 1, ...), u, z, T."""
    from scipy.sparse import coo_array

    n, places = problem.requests, most_places(problem)
    load, gen = np.array(problem.load) / unit, np.array(problem.generate) / unit
    alpha_load, alpha_gen = problem.alpha_load / unit, problem.alpha_generate / unit
    x, u, z, last = 0, n * places, n * places + places, n * places + 2 * places
    size = last + 1
    parts: list[tuple[int, Indices, Array]] = []  # row, its columns and their numbers
    room: list[float] = []

    def row(limit: float, *filled: tuple[Indices | int, Array | float]) -> None:
        for where, numbers in filled:
            columns = np.atleast_1d(np.asarray(where, dtype=np.int64))
            parts.append((len(room), columns, np.broadcast_to(np.asarray(numbers, dtype=np.float64), columns.shape)))
        room.append(limit)

    for j in range(places):
        own = np.arange(x + j * n, x + (j + 1) * n)
        row(0.0, (own, load), (u + j, alpha_load), (z + j, -1.0))
        row(0.0, (own, gen), (u + j, alpha_gen), (z + j, -1.0))
        row(0.0, (own, 1.0), (u + j, -float(problem.most_requests)))
        row(0.0, (own, np.array(problem.blocks, dtype=np.float64)), (u + j, -float(problem.most_blocks)))
        if j:
            row(0.0, (u + j, 1.0), (u + j - 1, -1.0))
    row(0.0, (np.arange(z, last), 1.0), (last, -1.0))
    total = float(problem.weights + math.fsum(problem.load)) / unit
    row(-total, (np.arange(u, z), alpha_load), (last, -1.0))
    numbers = np.concatenate([part for _, _, part in parts])
    which = np.concatenate([np.full(len(columns), index) for index, columns, _ in parts])
    rows = coo_array((numbers, (which, np.concatenate([columns for _, columns, _ in parts]))), shape=(len(room), size)).tocsr()
    rows.eliminate_zeros()
    requests = np.tile(np.arange(n), places)
    equal = coo_array((np.ones(n * places), (requests, np.arange(n * places))), shape=(n, size)).tocsr()
    upper = np.full(size, math.inf)
    upper[:z] = 1.0
    for j in range(1, places):
        upper[x + j * n : x + j * n + min(j, n)] = 0.0
    whole = np.zeros(size, dtype=np.bool_)
    whole[:z] = True
    cost = np.zeros(size)
    cost[last] = 1.0
    return Program(cost=cost, upper=upper, whole=whole, rows=rows, room=np.array(room), equal=equal, total=np.ones(n))


def _integer(
    solver: MilpBatches | CpSatBatches, problem: MiniBatchProblem, run: Callable[[Program, float | None], ProgramAnswer]
) -> SolverResult[MiniBatchPlan]:
    """The best of the greedy plans and the program's; the bound is the program's or ``least_latency``, the higher one."""
    started = time.perf_counter()
    plans = [result.unwrap() for result in (FirstComeBatches().solve(problem), GreedyRatioBatches().solve(problem))]
    bound = problem.least_latency * (1 - 1e-12)  # of sums in another order
    latency = min(problem.evaluate(plan).latency for plan in plans)
    message = ""
    if latency - bound > solver.relative_gap * latency:
        size = problem.requests * most_places(problem)
        left = None if solver.time_limit is None else solver.time_limit - (time.perf_counter() - started)
        if size > MOST_PAIRS:
            message = f"a greedy plan: {size} pairs of requests and mini-batches are more than {MOST_PAIRS}, the most for a program"
        elif left is not None and left < size * SECONDS_A_PAIR:
            message = f"a greedy plan: {solver.time_limit:g} s are too few to write a program of {size} pairs of requests and mini-batches"
        else:
            answered, found = _by_program(problem, bound / problem.layers or 1.0, run, left)
            bound = max(bound, answered)
            plans += [] if found is None else [found]
    best = min(plans, key=lambda plan: problem.evaluate(plan).latency)
    if not message:
        message = unproven(problem.evaluate(best).latency, bound, solver.relative_gap, solver.time_limit)
    return finish(solver, problem, best, started=started, bound=bound, relative_gap=solver.relative_gap, message=message)


def _by_program(
    problem: MiniBatchProblem, unit: float, run: Callable[[Program, float | None], ProgramAnswer], limit: float | None
) -> tuple[float, MiniBatchPlan | None]:
    """The program's bound (0: none), and its own plan if it has one that fits."""
    started = time.perf_counter()
    program = _program(problem, unit)
    left = None if limit is None else max(limit - (time.perf_counter() - started), 0.01)
    answer = run(program, left)
    bound = 0.0 if answer.bound is None else answer.bound * unit * problem.layers
    if answer.values is None:
        return bound, None
    n = problem.requests
    chosen = answer.values[: n * most_places(problem)].reshape(-1, n)
    found = _plan([np.flatnonzero(place > 0.5).tolist() for place in chosen])
    complete = sorted(chain.from_iterable(found.batches)) == list(range(n))
    return bound, found if complete and problem.evaluate(found).fits else None
