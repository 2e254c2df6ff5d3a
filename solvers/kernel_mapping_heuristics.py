"""Heuristics of the kernel mapping: what H2M2 (arXiv 2504.14893) does and what it compares with. None has a bound.

Readings of the paper that were chosen because they fit its numbers are called readings below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem
from ..models.roofline import Array
from ._columns import close, column_generation
from ._patterns import PatternAnswer, pattern_form, plan_of
from .result import SolverResult, check_settings, finish

NEAR_ENOUGH = 1e-6
"""Relative gap of the integer programs inside heuristics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyMapping:
    """H2M2's Algorithm 1: for one sublayer after the other, the fastest split of all its layers that still fits.

    ``order``: sublayers by name; kinds of other names follow, those first that gain most a page on the first tier. The algorithm
    never takes back a choice, so it may find no plan where one exists.
    """

    order: tuple[str, ...] = ("attention", "qkv", "fc")

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The greedy plan, one split for all layers of a kind."""
        started = time.perf_counter()
        room = problem.capacity.copy()
        counts: dict[int, list[int]] = {}
        for k in sorted(range(len(problem.kinds)), key=lambda k: self._turn(problem, k)):
            splits = problem.splits(k)
            held = problem.kinds[k].layers * problem.pages(k, splits)
            seconds = np.where(np.all(held <= room, axis=1), problem.seconds(k, splits), np.inf)
            fastest = int(seconds.argmin())
            if not np.isfinite(seconds[fastest]):
                message = f"no split of {problem.kinds[k].name} fits into what the sublayers before it left; an exact solver may find one"
                return finish(self, problem, None, started=started, message=message)
            counts[k] = splits[fastest].tolist()
            room = room - held[fastest]
        plan = KernelMappingPlan.same_in_all_layers(problem, [counts[k] for k in range(len(problem.kinds))])
        return finish(self, problem, plan, started=started)

    def _turn(self, problem: KernelMappingProblem, kind: int) -> tuple[int, float]:
        name = problem.kinds[kind].name
        place = next((i for i, sublayer in enumerate(self.order) if is_sublayer(name, sublayer)), len(self.order))
        whole = problem.kinds[kind].slices
        saved = problem.tables.seconds[0, kind, -1, whole] - problem.tables.seconds[0, kind, 0, whole]
        return place, -float(saved) / max(1, int(problem.tables.pages[0, kind, 0, whole]))


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveMapping:
    """Each (layer, sublayer) wholly on one tier, chosen as well as that allows, whether or not the problem is grouped (a reading).

    ``time_limit`` [s]: after it, the best plan found counts.
    """

    time_limit: float | None = 60.0

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The best plan without a split sublayer."""
        masks = [(problem.splits(k) > 0).sum(axis=1) == 1 for k in range(len(problem.kinds))]
        return _best_of(self, replace(problem, grouped=False), masks)


@dataclass(frozen=True, slots=True)
class MajorMapping:
    """Q-, F- and A-major: sublayer ``first`` takes as much of the first tier as fits, the others are split as well as the rest allows
    (a reading). ``time_limit`` [s]: after it, the best plan found counts."""

    first: str
    time_limit: float | None = 60.0

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The best plan with ``first`` at the front; ValueError if the problem has no such sublayer."""
        names = [kind.name for kind in problem.kinds]
        if not any(is_sublayer(name, self.first) for name in names):
            raise ValueError(f"MajorMapping: no sublayer is called {self.first!r}; they are {names}")
        room = int(problem.capacity[0])
        masks = []
        for k, kind in enumerate(problem.kinds):
            splits = problem.splits(k)
            mask = np.ones(len(splits), dtype=np.bool_)
            if is_sublayer(kind.name, self.first):
                held = kind.layers * problem.pages(k, splits)[:, 0]
                most = int(splits[held <= room, 0].max(initial=0))
                mask = splits[:, 0] == most
                room -= int(held[mask].min(initial=0))
            masks.append(mask)
        return _best_of(self, replace(problem, grouped=True), masks)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenMapping:
    """FlexGen's linear program (arXiv 2303.06865): the fraction of each data type (weights, keys and values) on each tier.

    The fractions are optimal; slices are then rounded down on all tiers but the roomiest, which takes the rest.
    """

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The plan of two fractions a tier."""
        types = [int(is_sublayer(kind.name, "attention")) for kind in problem.kinds]
        return _fractions(self, problem, types)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformMapping:
    """One fraction a tier for all data, by the same linear program: the reading of "FlexGen" that fits H2M2's numbers."""

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The plan of one fraction a tier."""
        return _fractions(self, problem, [0] * len(problem.kinds))


@dataclass(frozen=True, slots=True)
class SingleTierMapping:
    """Everything on one tier: the first, unless it is named."""

    tier: str | None = None

    def solve(self, problem: KernelMappingProblem, /) -> SolverResult[KernelMappingPlan]:
        """The plan on that tier, if it fits; ValueError if there is no such tier."""
        started = time.perf_counter()
        if self.tier is not None and self.tier not in problem.tier_names:
            raise ValueError(f"SingleTierMapping: there is no tier {self.tier!r}; tiers are {list(problem.tier_names)}")
        there = 0 if self.tier is None else problem.tier_names.index(self.tier)
        counts = [[kind.slices if t == there else 0 for t in range(len(problem.tier_names))] for kind in problem.kinds]
        return finish(self, problem, KernelMappingPlan.same_in_all_layers(problem, counts), started=started)


def _best_of(
    solver: NaiveMapping | MajorMapping, problem: KernelMappingProblem, masks: Sequence[NDArray[np.bool_]]
) -> SolverResult[KernelMappingPlan]:
    """The best plan that uses only the masked splits, or the best found in the solver's time limit."""
    from ._integer import solve_patterns

    started = time.perf_counter()
    check_settings(NEAR_ENOUGH, solver.time_limit)
    form = pattern_form(problem, masks)
    possible = all(mask.any() for mask in masks)
    dual = column_generation(form) if possible else None
    answer = PatternAnswer(chosen=None, bound=None)
    if dual is not None and not dual.infeasible:
        deadline = math.inf if solver.time_limit is None else started + solver.time_limit
        answer = close(form, dual, solve_patterns, relative_gap=NEAR_ENOUGH, deadline=deadline, threads=1, seed=0)
    plan = None if answer.chosen is None else plan_of(problem, answer.chosen, masks)
    message = "" if plan else "no plan of the form that this heuristic allows fits; an exact solver may find one"
    return finish(solver, problem, plan, started=started, message=message)


def is_sublayer(name: str, sublayer: str) -> bool:
    """Whether a kind is of a sublayer: "fc" and "fc_2" are of "fc"."""
    return name == sublayer or name.startswith(f"{sublayer}_")


def _fractions(solver: object, problem: KernelMappingProblem, types: list[int]) -> SolverResult[KernelMappingPlan]:
    """The linear program over fractions f[type, tier] and times T[k]: min sum T, T_k >= f side_k, sum pages f <= capacity.

    Pages rounded up once a side can exceed a fraction's; then one slice of each kind at a time goes to the roomiest tier.
    """
    from scipy.optimize import linprog

    started = time.perf_counter()
    kinds, tiers, number = len(problem.kinds), len(problem.tier_names), max(types) + 1
    full = np.array([kind.slices for kind in problem.kinds])
    layers = np.array([kind.layers for kind in problem.kinds])
    each = np.arange(kinds)
    side = layers[:, None] * problem.tables.seconds[0, each, :, full]
    lanes = layers[:, None, None] * problem.tables.shared[0, each, :, :, full]
    held = layers[:, None] * problem.tables.pages[0, each, :, full]
    price, room = float(side.min(axis=1).sum()) or 1.0, np.maximum(problem.capacity, 1)

    def row(kind: int, terms: Array) -> Array:
        """sum_t terms_t f[type of kind, t] - T_kind, as coefficients."""
        line = np.zeros(number * tiers + kinds)
        line[types[kind] * tiers : (types[kind] + 1) * tiers] = terms / price
        line[number * tiers + kind] = -1.0
        return line

    rows = [row(k, np.where(np.arange(tiers) == t, side[k], 0.0)) for k in range(kinds) for t in range(tiers)]
    rows += [row(k, lane) for k in range(kinds) for lane in lanes[k]]
    for t in range(tiers):
        line = np.zeros(number * tiers + kinds)
        for k in range(kinds):
            line[types[k] * tiers + t] += held[k, t] / room[t]
        rows.append(line)
    limits = np.concatenate([np.zeros(len(rows) - tiers), problem.capacity / room])
    whole = np.zeros((number, number * tiers + kinds))
    for data in range(number):
        whole[data, data * tiers : (data + 1) * tiers] = 1.0
    target = np.concatenate([np.zeros(number * tiers), np.ones(kinds)])
    solved = linprog(target, A_ub=np.array(rows), b_ub=limits, A_eq=whole, b_eq=np.ones(number), method="highs")
    if solved.x is None:
        return finish(solver, problem, None, started=started, message=f"no fractions fit; {problem.explain_infeasible()}")
    fractions = solved.x[: number * tiers].reshape(number, tiers)
    counts = np.floor(fractions[types] * full[:, None] + 1e-9).astype(np.int64)
    roomiest = int(np.argmax(problem.capacity * problem.page))
    counts[:, roomiest] += full - counts.sum(axis=1)
    for t in range(tiers):
        while t != roomiest and counts[:, t].any() and layers @ problem.tables.pages[0, each, t, counts[:, t]] > problem.capacity[t]:
            less = np.minimum(counts[:, t], 1)
            counts[:, t] -= less
            counts[:, roomiest] += less
    return finish(solver, problem, KernelMappingPlan.same_in_all_layers(problem, counts.tolist()), started=started)
