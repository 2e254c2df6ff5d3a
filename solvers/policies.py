"""Online policies of the kernel mapping: what to do before each iteration, knowing what runs now and where the data are.

A policy is a frozen value with ``decide(state) -> plan``. It may work out several iterations of ``state.window`` at once, for speed,
if what it decides for one depends on that one alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..models.baselines import hierarchical
from ..models.checks import check_number, whole
from ..models.kernel_mapping import KernelMappingPlan
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.paging import Way
from ..models.roofline import Array
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


@runtime_checkable
class OwnTimes(Protocol):
    """What a policy adds whose iterations do not take what its plans say: a machine that does more than to map."""

    def decode_time(self, state: PolicyState, /) -> float:
        """Seconds of this iteration's decode step."""
        ...

    def prefill_time(self, state: PolicyState, prompt: int, /) -> float:
        """Seconds of the pass of one prompt of so many tokens in this iteration."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """One plan for all iterations: that of ``solver`` for a full batch of the longest requests. None: of ``TableMapping`` for two memories,
    and of ``PatternMapping`` within its gap for other numbers."""

    solver: Solver | None = None

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The plan in force, or in the first iteration the solver's."""
        if state.previous is not None:
            return state.previous
        exact: Solver = TableMapping() if len(state.window.tables.tier_names) == 2 else PatternMapping()
        plan: KernelMappingPlan = (exact if self.solver is None else self.solver).solve(state.longest).unwrap()
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenStatic(Static):
    """FlexGen (arXiv 2303.06865) as H2M2 compares with it: one fraction of all data a tier, for the longest contexts, kept (a reading)."""

    solver: Solver | None = field(default_factory=UniformMapping)


@dataclass(frozen=True, slots=True)
class SingleTier:
    """Everything on one tier: the first, unless it is named."""

    tier: str | None = None

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """All slices there, whether or not they fit; ValueError if there is no such tier."""
        names = state.window.tier_names
        if self.tier is not None and self.tier not in names:
            raise ValueError(f"SingleTier: there is no tier {self.tier!r}; tiers are {list(names)}")
        there = names[0] if self.tier is None else self.tier
        return state.window.plan([[kind.slices * (name == there) for name in names] for kind in state.kinds])


@dataclass(frozen=True, slots=True)
class HardwareCache:
    """The first memory as a hardware cache of the second (``hierarchical``; H2M2 compares with it): it maps nothing and has ``OwnTimes``.

    All data have their place in the second memory, so it stops where they do not fit there.
    """

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """All slices on the second memory; ValueError unless there are two."""
        names = state.window.tier_names
        if len(names) != 2:
            raise ValueError(f"HardwareCache: a cache in front of a memory is two memories, not {len(names)}: {list(names)}")
        return state.window.plan([[0, kind.slices] for kind in state.kinds])

    def decode_time(self, state: PolicyState, /) -> float:
        """Seconds of the decode step behind the cache."""
        window, row = state.window, state.row
        service = window.service
        workload = service.workload(int(window.batch[row]), int(window.tokens[row]))
        return hierarchical(service.system, workload, service.profile).latency

    def prefill_time(self, state: PolicyState, prompt: int, /) -> float:
        """Seconds of a prompt's pass behind the cache."""
        service = state.window.service
        return hierarchical(service.system, service.prompt(prompt), service.profile).latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """H2M2's Algorithm 1 (arXiv 2504.14893) before every iteration, from nothing each time: ``GreedyMapping`` and its ``order``."""

    order: tuple[str, ...] = ("attention", "qkv", "fc")

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The greedy plan; ValueError if it finds none."""
        if len(state.window.tier_names) != 2:
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
    """The optimum of every iteration on its own, prefills included, whatever it costs to get there.

    By ``TableMapping`` (``compiled`` as there) for two memories: what an iteration runs under one plan adds up, kind by kind, to one table.
    For other numbers by ``PatternMapping`` within its gap, and for the decode step alone.
    """

    compiled: bool | None = None

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The optimal plan; ValueError if nothing fits."""
        if len(state.window.tier_names) != 2:
            return PatternMapping().solve(state.problem).unwrap()
        prefill = state.prefill_seconds()
        if prefill is None:
            counts = state.window.once(self, lambda tables: TableMapping(compiled=self.compiled).solve_batch(tables)[1])[state.row]
        else:
            tables, row = state.window.tables, slice(state.row, state.row + 1)
            seconds = tables.two_way(row)[0] + prefill
            counts = TableMapping(compiled=self.compiled).solve_batch(tables_of_seconds(tables, seconds, row))[1][0]
        if counts[0, 0] == NO_PLAN:
            return TableMapping().solve(state.problem).unwrap()
        return state.window.plan(counts.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Hysteresis:
    """Keeps the plan in force until the optimum of the iteration, kept for ``horizon`` iterations like it, pays for its migration:

        horizon x (seconds of the plan in force - seconds of the optimum) > seconds of the migration

    or until the plan in force no longer fits. A horizon of infinity is ``Myopic`` but for ties, one of 0 moves only when it must.
    A prefill is gone after this iteration: then the plan in force may also be left for this iteration alone, if that pays for the way there
    and back.
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
        once = state.prefill(kept) - state.prefill(optimum) if state.prompts else 0.0
        if gain + once <= 0 or self.horizon == 0 or optimum == kept:
            return kept
        if not state.prompts or self.horizon == math.inf:
            return optimum if self.horizon * (gain + once) > state.transition(optimum).latency else kept
        back = state.window.transition(optimum, kept, state.row, state.directions).latency
        worth = min(self.horizon, 1) * (gain + once) + max(max(self.horizon - 1, 0) * gain, -back)
        return optimum if worth > state.transition(optimum).latency else kept


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAhead:
    """The one plan that, moved to now and kept for ``iterations`` (k) iterations, takes the least time, over all plans of two memories:

        min over q  migration(plan in force, q) + sum_(i < k) stage(q; B requests, S + i B tokens)        q fits in all k

    B and S are the batch and the tokens of this iteration, whose stage includes its prefills. It assumes that nobody ends and nobody
    arrives meanwhile, and that tokens stop growing at the most that the trace can bring (that of ``state.longest``). It decides anew before
    each iteration. ``migration`` False: moves are taken for free, so that k = 1 is ``Myopic``.

    The sum is one table of seconds for each kind, so ``TableMapping`` finds the optimum; latencies of links and memories count only in
    the choice between moving and staying. For other numbers of memories: ``Hysteresis`` with k as its horizon.
    """

    iterations: int = 4
    migration: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "iterations", whole("LookAhead", "iterations", self.iterations, "iterations"))

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The plan in force, or a better one; ValueError if nothing fits."""
        window, row = state.window, state.row
        if len(window.tier_names) != 2:
            return Hysteresis(horizon=self.iterations if self.migration else math.inf).decide(state)
        batch, tokens = int(window.batch[row]), int(window.tokens[row])
        coming = np.minimum(tokens + batch * np.arange(self.iterations), max(tokens, most_tokens(state)))
        tables = window.service.tables(np.full(len(coming), batch), coming)
        stages, prefill = tables.two_way()[0].sum(axis=0), state.prefill_seconds()
        stages = stages if prefill is None else stages + prefill
        before = None if state.previous is None or not self.migration else on_first(state.previous)
        seconds = stages if before is None else stages + _moving(state, tables, present_slices(state, before))
        found = TableMapping().solve_batch(tables_of_seconds(tables, seconds[None], slice(-1, None)))[1][0]
        if found[0, 0] == NO_PLAN:
            return Myopic().decide(state)
        plan = window.plan(found.tolist())
        if before is None or state.previous is None:
            return plan
        kinds, last = np.arange(len(before)), tables.pages[-1]
        layers = np.array([kind.layers for kind in tables.kinds])
        after = np.array([kind.slices for kind in tables.kinds]) - before
        held = np.stack([layers @ last[kinds, 0, before], layers @ last[kinds, 1, after]])
        gain = float(layers @ (stages[kinds, before] - stages[kinds, found[:, 0]]))
        stays = bool((held <= tables.capacity[-1]).all()) and gain <= state.transition(plan).latency
        return state.previous if stays else plan


def most_tokens(state: PolicyState) -> int:
    """Tokens of the problem that stands for the longest iterations."""
    workload = state.longest.workload
    return 0 if workload is None or workload.state_tokens is None else workload.state_tokens


def on_first(plan: KernelMappingPlan) -> NDArray[np.int64]:
    """Slices [K] on the first tier of a plan that splits all layers of a kind alike."""
    return np.array([splits[0].counts[0] for splits in plan.splits], dtype=np.int64)


def present_slices(state: PolicyState, before: NDArray[np.int64]) -> NDArray[np.int64]:
    """Slices [2, K] on each of two memories, duplicates included, under a plan with ``before`` [K] slices on the first."""
    if state.residency is not None:
        return state.residency.counts.T
    return np.stack([before, np.array([kind.slices for kind in state.kinds]) - before])


def _shares(state: PolicyState) -> Array | None:
    """Shares [K] of the bytes of each kind that a migration has to move; None: all of them."""
    if state.residency is None or state.stayed == 1:
        return None
    return np.where(state.residency.read_only, 1.0, state.stayed)


def _moving(state: PolicyState, tables: KernelMappingTables, present: NDArray[np.int64]) -> Array:
    """Seconds [K, N+1] a layer to go from ``present`` [2, K] slices to each number on the first tier, in design 0, without latencies and
    one direction after the other."""
    (first, second), system, shares = tables.tier_names, state.window.service.system, _shares(state)
    rates = (Way.between(system, second, first).bandwidth, Way.between(system, first, second).bandwidth)
    pages, kinds, total = tables.two_way(slice(0, 1))[1][0], np.arange(len(tables.kinds)), np.zeros((1, 1))
    for tier, rate in enumerate(rates):
        held = tables.pages[0][kinds, tier, present[tier]]
        grown = np.maximum(pages[:, :, tier] - held[:, None], 0)
        total = total + grown * (tables.page[0, tier] / rate)
    return total if shares is None else total * shares[:, None]


def tables_of_seconds(tables: KernelMappingTables, seconds: Array, room: slice | NDArray[np.intp]) -> KernelMappingTables:
    """Tables of designs that take ``seconds`` [D, K, N+1] a layer with n slices on the first tier, in the room of the designs ``room``."""
    side = np.stack([seconds, np.where(np.isfinite(seconds), 0.0, np.inf)], axis=2)
    return replace(
        tables,
        seconds=side,
        shared=np.zeros((*side.shape[:2], 0, *side.shape[2:])),
        traffic=tables.traffic[room],
        t_sync=0.0,
        pages=tables.pages[room],
        capacity=tables.capacity[room],
        page=tables.page[room],
    )
