"""Every non-dominated plan of a kernel mapping over latency and energy, exact for any cost table: two memories, grouped problems.

    min  ( sum_k seconds_k(n_k),  sum_k joules_k(n_k) )        over n_k = 0..N_k slices of kind k on the first memory
    subject to  sum_k pages_kt(n_k) <= capacity_t              t = 1, 2

Both sums separate by kind: static power x latency is part of joules_k. For each choice of all kinds but the last the two capacities leave
a range of the last kind's slices, over which the least seconds and the least joules are looked up. A choice whose two minima together are
no better than a known plan is left out, then parts of its range, and what remains is listed.

The fastest plan of a design is one point of its front. Hence the front of a set of designs is that of the union of their fronts, and the
front of their fastest plans misses points (``front_of_designs``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem, computed_flops, step_flops, streamed_bytes
from ..models.price import static_power, step_energy
from ..models.roofline import Array

MOST_COMBINATIONS = 4_000_000
"""Combinations of all kinds but the last that are looked at at most."""

FIRST_COMBINATIONS = 256
"""Combinations whose plans are listed before the others are ruled out by them."""

LISTED = 500_000
"""Plans that are listed at once at most."""

BLOCK = 8
"""Slices of the last kind that are ruled out together."""

ROUNDING = 1e-12
"""Relative difference that sums added in another order may have, and more: a plan is ruled out by one better by this much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPlan:
    """A plan of the front: ``latency`` [s], ``energy`` [J] of a step with all terms of ``price.step_energy`` that are known (the static
    one only if asked for).

    ``without``: the constants that are not. ``design``: the number of its problem in ``front_of_designs``.
    """

    plan: KernelMappingPlan
    latency: float
    energy: float
    without: tuple[str, ...] = ()
    design: int = 0


def latency_energy_front(problem: KernelMappingProblem, *, static: bool = True) -> tuple[FrontPlan, ...]:
    """All plans that no other plan within capacity beats in latency and energy, the fastest first; none if nothing fits.

    ``static``: count static power over the latency of the step. Without it (a machine that is on anyway) the front has the same plans
    and more: what is beaten in latency and moving energy is beaten with static power as well.

    Of plans with equal latency and energy the lexicographically first by slices on the first memory stands for all. ValueError for a
    problem that is not grouped, not of two memories, not of a System, or of too many combinations.
    """
    _check(problem)
    work = _Work(problem, static)
    chosen = _candidates(work)
    latency, energy, without = work.price(chosen)
    order = np.lexsort((*chosen.T[::-1], energy, latency))
    first = np.concatenate(([np.inf], np.minimum.accumulate(energy[order])[:-1]))
    front = order[energy[order] < first]
    slices = [kind.slices for kind in problem.kinds]
    return tuple(
        FrontPlan(
            plan=KernelMappingPlan.same_in_all_layers(problem, [(n, all_of - n) for n, all_of in zip(counts, slices, strict=True)]),
            latency=seconds,
            energy=joules,
            without=without,
        )
        for counts, seconds, joules in zip(chosen[front].tolist(), latency[front].tolist(), energy[front].tolist(), strict=True)
    )


def front_of_designs(problems: Iterable[KernelMappingProblem], *, static: bool = True) -> tuple[FrontPlan, ...]:
    """The front over latency and energy of all plans of all designs, the fastest first; ``design`` numbers them in the order given.

    Equal points of different designs are all kept, as ``dse.pareto`` keeps equal rows. Designs whose data sheets lack different constants
    are compared by different sums: see ``without``.
    """
    union = [
        FrontPlan(plan=one.plan, latency=one.latency, energy=one.energy, without=one.without, design=number)
        for number, problem in enumerate(problems)
        for one in latency_energy_front(problem, static=static)
    ]
    union.sort(key=lambda one: (one.latency, one.energy, one.design))
    front: list[FrontPlan] = []
    for one in union:
        if not front or one.energy < front[-1].energy or (one.latency, one.energy) == (front[-1].latency, front[-1].energy):
            front.append(one)
    return tuple(front)


class _Work:
    """A problem as arrays over the slices of each kind on the first memory: of all layers of a kind together, [K, N+1, ...]."""

    __slots__ = ("capacity", "flops", "joules", "pages", "problem", "seconds", "slices", "static", "system", "traffic")

    def __init__(self, problem: KernelMappingProblem, static: bool) -> None:
        tables, system = problem.tables, problem.system
        if system is None:
            raise ValueError("a front over energy needs to know the energies: build the problem from a System")
        self.problem, self.system, self.capacity, self.static = problem, system, problem.capacity, static
        self.slices = np.array([kind.slices for kind in problem.kinds])
        layers = np.array([kind.layers for kind in problem.kinds])
        seconds, pages = tables.two_way()
        self.seconds = layers[:, None] * seconds[0]
        self.pages = layers[:, None, None] * pages[0]
        n = np.arange(self.seconds.shape[1])
        kind = np.arange(len(layers))[:, None]
        counts = np.stack([np.broadcast_to(n, self.seconds.shape), np.maximum(self.slices[:, None] - n, 0)], axis=-1)
        self.traffic = layers[:, None, None] * tables.traffic[0, kind[:, :, None], np.arange(2), counts]
        self.flops: Array | None = None
        if problem.workload is not None:
            table = step_flops(problem.workload, problem.granularity, 2)
            inside = np.minimum(counts, self.slices[:, None, None])
            self.flops = layers[:, None, None] * table[kind[:, :, None], np.arange(2), inside]
        self.joules = self._joules(self.seconds, self.traffic, self.flops)[0]

    def _joules(self, latency: Array, traffic: Array, flops: Array | None) -> tuple[Array, tuple[str, ...]]:
        energy = step_energy(
            self.system,
            traffic=traffic,
            latency=np.where(np.isfinite(latency), latency, 0.0),
            flops=None if flops is None else computed_flops(self.system, flops),
            link_bytes=streamed_bytes(self.system, traffic),
        )
        without = energy.without if self.static else tuple(text for text in energy.without if text not in static_power(self.system)[1])
        return np.where(np.isfinite(latency), energy.total if self.static else energy.moving, np.inf), without

    def price(self, chosen: NDArray[np.int64]) -> tuple[Array, Array, tuple[str, ...]]:
        """Seconds and joules of plans [P, K], bit for bit what ``evaluate`` and ``step_energy`` say: sums in the order of the kinds."""
        latency = np.zeros(len(chosen))
        traffic, flops = np.zeros((len(chosen), 2)), None if self.flops is None else np.zeros((len(chosen), 2))
        for k, n in enumerate(chosen.T):
            latency = latency + self.seconds[k, n]
            traffic = traffic + self.traffic[k, n]
            if flops is not None and self.flops is not None:
                flops = flops + self.flops[k, n]
        return latency, *self._joules(latency, traffic, flops)


def _candidates(work: _Work) -> NDArray[np.int64]:
    """Plans [P, K] within capacity, among them every plan of the front."""
    last = len(work.slices) - 1
    shape = tuple(int(n) + 1 for n in work.slices[:-1])
    combinations = np.indices(shape, dtype=np.int64).reshape(last, math.prod(shape)).T
    seconds, joules, held = np.zeros(len(combinations)), np.zeros(len(combinations)), np.zeros((len(combinations), 2), dtype=np.int64)
    for k, n in enumerate(combinations.T):
        seconds, joules, held = seconds + work.seconds[k, n], joules + work.joules[k, n], held + work.pages[k, n]
    end = int(work.slices[last]) + 1
    room = work.capacity - held
    most = np.searchsorted(work.pages[last, :end, 0], room[:, 0], side="right") - 1
    least = end - np.searchsorted(work.pages[last, end - 1 :: -1, 1], room[:, 1], side="right")
    some = (least <= most) & np.isfinite(seconds)
    combinations, seconds, joules, least, most = combinations[some], seconds[some], joules[some], least[some], most[some]
    final = work.seconds[last, :end], work.joules[last, :end]
    quick, lean = map(_range_minimum, final)

    def corners(row: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64]) -> Array:
        """Least seconds and least joules [2, P] of combinations with a range of the last kind's slices."""
        return np.stack([seconds[row] + quick[first, end], joules[row] + lean[first, end]])

    found, known = np.zeros((0, last + 1), dtype=np.int64), np.zeros((2, 0))
    bound = corners(np.arange(len(seconds)), least, most)
    likely = _staircase(*bound)
    likely = likely[:: -(-len(likely) // FIRST_COMBINATIONS) or 1]
    left = np.flatnonzero(np.isfinite(bound[0]) & (np.bincount(likely, minlength=len(seconds)) == 0))
    left = left[np.argsort(bound[0, left] * bound[1, left], kind="stable")]  # good ones early rule out more of the others
    step = max(1, LISTED // len(final[0]))
    for rows in (likely, *np.split(left, range(step, len(left), step))):
        likely = rows[~_beaten(known, bound[:, rows])]
        of, first, upto = _parts(least[likely], most[likely], BLOCK)
        row = likely[of]
        some = ~_beaten(known, corners(row, first, upto))
        of, n, _ = _parts(first[some], upto[some], 1)
        row = row[some][of]
        points = np.stack([seconds[row] + final[0][n], joules[row] + final[1][n]])
        fresh = np.isfinite(points[0]) & ~_beaten(known, points)
        points = np.concatenate([known, points[:, fresh]], axis=1)
        kept = ~_beaten(points, points)
        found = np.concatenate([found, np.column_stack([combinations[row[fresh]], n[fresh]])])[kept]
        known = points[:, kept]
    return found


def _parts(least: NDArray[np.int64], most: NDArray[np.int64], width: int) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """Ranges ``least..most`` [P] cut into parts of ``width``: which range each part is of, its first number and its last."""
    number = (most - least) // width + 1
    of = np.repeat(np.arange(len(number)), number)
    first = least[of] + width * (np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number))
    return of, first, np.minimum(first + width - 1, most[of])


def _staircase(seconds: Array, joules: Array) -> NDArray[np.intp]:
    """The points that no other beats, the fastest first and each once."""
    order = np.lexsort((joules, seconds))
    lowest = np.concatenate(([np.inf], np.minimum.accumulate(joules[order])[:-1]))
    return order[joules[order] < lowest]


def _beaten(known: Array, points: Array) -> NDArray[np.bool_]:
    """Which of ``points`` [2, P], seconds and joules, one of ``known`` [2, any] beats by more than rounding in both numbers.

    A number that is 0 in both counts as beaten, unless both are.
    """
    seconds, joules = points
    step = _staircase(*known)
    reach = known[0, step] * (1 + ROUNDING)
    lowest = np.concatenate(([np.inf], known[1, step] * (1 + ROUNDING)))
    return (lowest[np.searchsorted(reach, seconds, side="right")] <= joules) & ((seconds > 0) | (joules > 0))


def _range_minimum(values: Array) -> Array:
    """Least of ``values[i..j]`` at [i, j]; inf where the range is empty."""
    least = np.full((len(values), len(values)), np.inf)
    for i in range(len(values)):
        least[i, i:] = np.minimum.accumulate(values[i:])
    return least


def _check(problem: KernelMappingProblem) -> None:
    if not problem.grouped:
        raise ValueError("latency_energy_front takes grouped problems, one split for all layers of a kind; build it with grouped=True")
    if len(problem.tier_names) != 2:
        raise ValueError(
            f"latency_energy_front takes two memories, and there are {len(problem.tier_names)}: {list(problem.tier_names)}; "
            "price each plan of PatternMapping on its own"
        )
    number = math.prod(kind.slices + 1 for kind in problem.kinds[:-1])
    if number > MOST_COMBINATIONS:
        raise ValueError(
            f"latency_energy_front looks at no more than {MOST_COMBINATIONS} combinations, and these {len(problem.kinds)} kinds have "
            f"{number}; cut by KV head (granularity='kv_head')"
        )
