"""Online policies of the kernel mapping: what to do before each iteration, knowing what runs now and where the data are.

A policy is a frozen value with ``decide(state) -> plan``. It may work out several iterations of ``state.window`` at once, for speed,
if what it decides for one depends on that one alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.checks import check_number
from ..models.kernel_mapping import KernelMappingPlan
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.serving import PolicyState
from .kernel_mapping import PatternMapping, TableMapping
from .kernel_mapping_heuristics import GreedyMapping, UniformMapping, is_sublayer
from .result import Solver

NO_PLAN = -1


class Policy(Protocol):
    """A frozen dataclass of settings with one method."""

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The plan of this iteration; ValueError if there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """One plan for all iterations: that of ``solver`` for a full batch of the longest requests."""

    solver: Solver = field(default_factory=TableMapping)

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The plan in force, or in the first iteration the solver's."""
        plan: KernelMappingPlan = self.solver.solve(state.longest).unwrap() if state.previous is None else state.previous
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenStatic(Static):
    """FlexGen (arXiv 2303.06865) as H2M2 compares with it: one fraction of all data a tier, for the longest contexts, kept (a reading)."""

    solver: Solver = field(default_factory=UniformMapping)


@dataclass(frozen=True, slots=True)
class SingleTier:
    """Everything on one tier: the first, unless it is named."""

    tier: str | None = None

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """All slices there, whether or not they fit; ValueError if there is no such tier."""
        names = state.window.tables.tier_names
        if self.tier is not None and self.tier not in names:
            raise ValueError(f"SingleTier: there is no tier {self.tier!r}; tiers are {list(names)}")
        there = names[0] if self.tier is None else self.tier
        return state.window.plan([[kind.slices * (name == there) for name in names] for kind in state.kinds])


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """H2M2's Algorithm 1 (arXiv 2504.14893) before every iteration, from nothing each time: ``GreedyMapping`` and its ``order``."""

    order: tuple[str, ...] = ("attention", "qkv", "fc")

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The greedy plan; ValueError if it finds none."""
        tables = state.window.tables
        if len(tables.tier_names) != 2:
            return GreedyMapping(order=self.order).solve(state.problem).unwrap()
        counts = state.window.once(self, self._all)[state.row]
        if counts[0, 0] == NO_PLAN:
            return GreedyMapping(order=self.order).solve(state.problem).unwrap()
        return state.window.plan(counts.tolist())

    def _all(self, tables: KernelMappingTables) -> NDArray[np.int64]:
        """Slices [D, K, 2] of all iterations of a window over two tiers; ``NO_PLAN`` where the greedy algorithm finds none."""
        seconds, pages = tables.two_way()
        layers, slices = (np.array([getattr(kind, name) for kind in tables.kinds]) for name in ("layers", "slices"))
        steps, kinds = np.arange(len(seconds)), np.arange(len(slices))
        saved = tables.seconds[:, kinds, 1, slices] - tables.seconds[:, kinds, 0, slices]
        gain = -saved / np.maximum(tables.pages[:, kinds, 0, slices], 1)
        turn = [next((i for i, part in enumerate(self.order) if is_sublayer(kind.name, part)), len(self.order)) for kind in tables.kinds]
        room, counts = tables.capacity.copy(), np.full((*seconds.shape[:2], 2), NO_PLAN, dtype=np.int64)
        lost = np.zeros(len(seconds), dtype=np.bool_)
        for k in np.lexsort((gain, np.broadcast_to(turn, gain.shape)), axis=-1).T:
            held = layers[k, None, None] * pages[steps, k]
            time = np.where(np.all(held <= room[:, None], axis=2), seconds[steps, k], np.inf)
            fastest = time.argmin(axis=1)
            lost |= np.isinf(time[steps, fastest])
            counts[steps, k] = np.stack([fastest, slices[k] - fastest], axis=-1)
            room -= held[steps, fastest]
        counts[lost] = NO_PLAN
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Myopic:
    """The optimum of every iteration on its own, whatever it costs to get there.

    By ``TableMapping`` (``compiled`` as there) for two memories; for other numbers by ``PatternMapping``, within its gap.
    """

    compiled: bool | None = None

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The optimal plan; ValueError if nothing fits."""
        if len(state.window.tables.tier_names) != 2:
            return PatternMapping().solve(state.problem).unwrap()
        counts = state.window.once(self, lambda tables: TableMapping(compiled=self.compiled).solve_batch(tables)[1])[state.row]
        if counts[0, 0] == NO_PLAN:
            return TableMapping().solve(state.problem).unwrap()
        return state.window.plan(counts.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Hysteresis:
    """Keeps the plan in force until the optimum of the iteration, kept for ``horizon`` iterations like it, pays for its migration:

        horizon x (seconds of the plan in force - seconds of the optimum) > seconds of the migration

    or until the plan in force no longer fits. A horizon of infinity is ``Myopic`` but for ties, one of 0 moves only when it must.
    """

    horizon: float = 32.0
    compiled: bool | None = None

    def __post_init__(self) -> None:
        check_number("Hysteresis", "horizon", self.horizon, "iterations", zero=True)

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The plan in force, or the optimum."""
        optimum = Myopic(compiled=self.compiled).decide(state)
        kept = state.previous
        if kept is None or not state.fits(kept):
            return optimum
        gain = state.latency(kept) - state.latency(optimum)
        return optimum if gain > 0 and self.horizon * gain > state.transition(optimum).latency else kept
