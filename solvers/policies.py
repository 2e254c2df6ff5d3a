"""Online policies of the kernel mapping: what to do before each iteration, knowing what runs now and where the data are.

A policy is a frozen value with ``decide(state) -> plan``. It may work out several iterations of ``state.window`` at once, for speed,
if what it decides for one depends on that one alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..models.baselines import hierarchical
from ..models.checks import check_number, whole
from ..models.kernel_mapping import KernelMappingPlan, Split
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.paging import Way
from ..models.roofline import Array
from ..models.serving import PolicyState, Service
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
        names = state.window.tables.tier_names
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
        names = state.window.tables.tier_names
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
    """The optimum of every iteration on its own, prefills included, whatever it costs to get there.

    By ``TableMapping`` (``compiled`` as there) for two memories: what an iteration runs under one plan adds up, kind by kind, to one table.
    For other numbers by ``PatternMapping`` within its gap, and for the decode step alone.
    """

    compiled: bool | None = None

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The optimal plan; ValueError if nothing fits."""
        if len(state.window.tables.tier_names) != 2:
            return PatternMapping().solve(state.problem).unwrap()
        prefill = state.prefill_seconds()
        if prefill is None:
            counts = state.window.once(self, lambda tables: TableMapping(compiled=self.compiled).solve_batch(tables)[1])[state.row]
        else:
            tables, row = state.window.tables, slice(state.row, state.row + 1)
            seconds = tables.two_way(row)[0] + prefill
            counts = TableMapping(compiled=self.compiled).solve_batch(_of_seconds(tables, seconds, row))[1][0]
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
        if len(window.tables.tier_names) != 2:
            return Hysteresis(horizon=self.iterations if self.migration else math.inf).decide(state)
        batch, tokens = int(window.batch[row]), int(window.tokens[row])
        coming = np.minimum(tokens + batch * np.arange(self.iterations), max(tokens, _most_tokens(state)))
        tables = window.service.tables(np.full(len(coming), batch), coming)
        stages, prefill = tables.two_way()[0].sum(axis=0), state.prefill_seconds()
        stages = stages if prefill is None else stages + prefill
        before = None if state.previous is None or not self.migration else _on_first(state.previous)
        seconds = stages if before is None else stages + _moving(state, tables, _present(state, before))
        found = TableMapping().solve_batch(_of_seconds(tables, seconds[None], slice(-1, None)))[1][0]
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


def _most_tokens(state: PolicyState) -> int:
    """Tokens of the problem that stands for the longest iterations."""
    workload = state.longest.workload
    return 0 if workload is None or workload.state_tokens is None else workload.state_tokens


def _on_first(plan: KernelMappingPlan) -> NDArray[np.int64]:
    """Slices [K] on the first tier of a plan that splits all layers of a kind alike."""
    return np.array([splits[0].counts[0] for splits in plan.splits], dtype=np.int64)


def _present(state: PolicyState, before: NDArray[np.int64]) -> NDArray[np.int64]:
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


def _of_seconds(tables: KernelMappingTables, seconds: Array, room: slice | NDArray[np.intp]) -> KernelMappingTables:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlist:
    """Of a short list of plans, the one with the least seconds of this iteration + seconds of going there / ``horizon``.

    The optimum changes at few numbers of tokens, so few plans are ever worth having. The list has the optima on a grid made once, before
    the first iteration: batches 1, 2, 4, ... up to the limit, and ``points`` numbers of tokens for each, evenly spaced up to the most that
    the trace can bring; the optimum there fits always. Unlike ``Hysteresis`` it may move a part of the way. All data are priced as in this
    iteration. A horizon of infinity takes the fastest plan of the list. Over two memories; for others it is ``Hysteresis``.

    A prefill is gone after this iteration, so a plan may be taken for it alone: it costs this iteration, the way there, and for the rest of
    the horizon either its own decode steps, or the way to the plan that is best without the prefill, and those. When the first prompt is
    seen, the list also gets the optima of a decode step with a prompt of 1, 4, 16, ... tokens, at every sixteenth point.

    The horizon was chosen on drawn traces (the study policy_frontier): batches change within some iterations, so short ones regret least;
    shorter ones than this are better on most traces and worse than ``Greedy`` on one.
    """

    horizon: float = 8.0
    points: int = 256
    _kept: dict[Hashable, _Listed] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("Shortlist", "horizon", self.horizon, "iterations")
        object.__setattr__(self, "points", whole("Shortlist", "points", self.points, "numbers of tokens", least=2))

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """A plan of the list, the one in force if none is better; the optimum of the iteration where none of the list fits."""
        window, row, previous = state.window, state.row, state.previous
        if len(window.tables.tier_names) != 2:
            return Hysteresis(horizon=self.horizon).decide(state)
        listed = self.listed(state)
        every_second, every_byte = window.once((self, listed.prefill), listed.priced)
        seconds, nbytes = every_second[row], every_byte[row]
        score, moving, number = seconds, None, None
        if previous is not None:
            number = listed.number(previous)
            if number is None or state.residency is not None:
                held = listed.bytes_of(_present(state, _on_first(previous)), window.tables, row)
            else:
                held = nbytes[:, number]
            moving = listed.moving(nbytes, held[:, None], state)
            score = seconds + moving / self.horizon
        best = int(score.argmin())
        if number is not None and score[number] <= score[best]:
            best = number
        prefill = state.prefill_seconds()
        if prefill is not None:
            best = self._with_prefill(listed.beside(prefill) + seconds, seconds, moving, listed.moving(nbytes[:, [best]], nbytes), best)
        return listed.plans[best] if seconds[best] < math.inf else Myopic().decide(state)

    def _with_prefill(self, now: Array, seconds: Array, moving: Array | None, back: Array, best: int) -> int:
        """The plan to take where a prefill comes on top: ``now`` [P] s is this iteration with it, ``seconds`` without it, ``moving`` the
        way to each plan, and ``back`` the way from there to ``best``, which is the one to take without the prefill."""
        if self.horizon < math.inf:
            now = min(self.horizon, 1.0) * now
            now = now if moving is None else now + moving
            if self.horizon > 1:
                rest = self.horizon - 1
                now = now + np.minimum(rest * seconds, back + rest * seconds[best])
        found = int(now.argmin())
        return best if now[best] <= now[found] else found

    def listed(self, state: PolicyState) -> _Listed:
        """The list for what is served: made at the first call, and again when the first prompt is seen; then looked up."""
        service, workload = state.window.service, state.longest.workload
        batch, most = 1 if workload is None else workload.batch, _most_tokens(state)
        key = (id(service), batch, most)
        found = self._kept.get(key)
        if found is None or (state.prompts and not found.prefill):
            sizes = sorted({*(2**i for i in range(batch.bit_length())), batch})
            tokens = np.unique(np.linspace(1, max(most, 1), self.points).round().astype(np.int64))
            tables = service.tables(np.repeat(sizes, len(tokens)), np.tile(tokens, len(sizes)))
            counts = TableMapping().solve_batch(tables)[1]
            if state.prompts:
                some = np.flatnonzero(np.arange(len(sizes) * len(tokens)) % len(tokens) % 16 == 0)
                decode = tables.two_way()[0][some]
                prompts = [service.prefill_seconds(4**i) for i in range(max(most, 1).bit_length() // 2 + 1)]
                both = _of_seconds(tables, np.concatenate([decode + prefill for prefill in prompts]), np.tile(some, len(prompts)))
                counts = np.concatenate([counts, TableMapping().solve_batch(both)[1]])
            counts = np.unique(counts[counts[:, 0, 0] != NO_PLAN], axis=0)
            self._kept.clear()
            found = self._kept[key] = _Listed.of(service, tables, counts, prefill=bool(state.prompts))
        return found


class _Listed(NamedTuple):
    """P plans over two memories, made ready to be priced with few calls of NumPy.

    ``by_identity`` and ``by_value``: the number of each plan. ``places`` [2, P, K]: where a plan's entries stand in one design of tables;
    ``firsts`` [P, K]: in [K, N+1] seconds by slices on the first memory. ``prefill``: whether the list has the optima of prefills.
    ``layers`` [K], ``sync`` [P] s of barriers, ``layer_bytes`` [2, 1, K] of a page a layer, ``room`` [2, 1] B, ``rates`` [2, 1] s/B and
    ``latencies`` [2, 1] s of the ways up and down. ``service`` is kept so that its id stays its own.
    """

    service: Service
    plans: tuple[KernelMappingPlan, ...]
    by_identity: dict[int, int]
    by_value: dict[KernelMappingPlan, int]
    places: NDArray[np.int64]
    firsts: NDArray[np.int64]
    prefill: bool
    layers: Array
    sync: Array
    layer_bytes: NDArray[np.int64]
    room: NDArray[np.int64]
    rates: Array
    latencies: Array

    @classmethod
    def of(cls, service: Service, tables: KernelMappingTables, counts: NDArray[np.int64], *, prefill: bool) -> _Listed:
        """The list of the plans with ``counts`` [P, K, 2] slices."""
        plans = tuple(
            KernelMappingPlan(
                splits=tuple((Split(layers=kind.layers, counts=tuple(split)),) for kind, split in zip(tables.kinds, rows, strict=True))
            )
            for rows in counts.tolist()
        )
        layers = np.array([kind.layers for kind in tables.kinds])
        _, kinds, tiers, ends = tables.seconds.shape
        first, second = tables.tier_names
        ways = (Way.between(service.system, second, first), Way.between(service.system, first, second))
        return cls(
            service=service,
            plans=plans,
            by_identity={id(plan): number for number, plan in enumerate(plans)},
            by_value={plan: number for number, plan in enumerate(plans)},
            places=np.stack([(np.arange(kinds) * tiers + t) * ends + counts[:, :, t] for t in range(2)]),
            firsts=np.arange(kinds) * ends + counts[:, :, 0],
            prefill=prefill,
            layers=layers.astype(np.float64),
            sync=tables.t_sync * ((counts.min(axis=2) > 0) @ layers),
            layer_bytes=layers * tables.page[0][:, None, None],
            room=(tables.capacity[0] * tables.page[0])[:, None],
            rates=np.array([[1 / way.bandwidth] for way in ways]),
            latencies=np.array([[way.latency] for way in ways]),
        )

    def number(self, plan: KernelMappingPlan) -> int | None:
        """The number of a plan; None if it is not listed."""
        found = self.by_identity.get(id(plan))
        return self.by_value.get(plan) if found is None else found

    def priced(self, tables: KernelMappingTables) -> tuple[Array, NDArray[np.int64]]:
        """Seconds [D, P] of all iterations of a window, inf where a plan does not fit; bytes [D, 2, P, K] on each memory."""
        steps = len(tables.capacity)
        side = tables.seconds.reshape(steps, -1).take(self.places, axis=1)
        slowest = np.maximum(side[:, 0], side[:, 1])
        for lane in range(tables.shared.shape[2]):
            np.maximum(slowest, tables.shared[:, :, lane].reshape(steps, -1).take(self.places, axis=1).sum(axis=1), out=slowest)
        seconds: Array = slowest @ self.layers
        if tables.t_sync:
            seconds += self.sync
        nbytes = tables.pages.reshape(steps, -1).take(self.places, axis=1) * self.layer_bytes
        over = np.add.reduce(nbytes, axis=3) > self.room
        seconds[over[:, 0] | over[:, 1]] = math.inf
        return seconds, nbytes

    def beside(self, seconds: Array) -> Array:
        """Seconds [P] of something that takes ``seconds`` [K, N+1] a layer."""
        total: Array = seconds.ravel().take(self.firsts) @ self.layers
        return total

    def moving(self, nbytes: NDArray[np.int64], held: NDArray[np.int64], state: PolicyState | None = None) -> Array:
        """Seconds [P] to go to plans that hold ``nbytes`` [2, P, K] from ``held`` [2, P, K], either of which may be one plan; before the
        iteration of ``state``, or some day."""
        lacking = np.maximum(nbytes - held, 0)
        shares = None if state is None else _shares(state)
        growth = np.add.reduce(lacking, axis=2) if shares is None else lacking @ shares
        seconds = growth * self.rates + self.latencies * (growth > 0)
        total: Array = seconds[0] + seconds[1] if state is None or state.directions == "one" else np.maximum(seconds[0], seconds[1])
        return total

    def bytes_of(self, counts: NDArray[np.int64], tables: KernelMappingTables, row: int) -> NDArray[np.int64]:
        """Bytes [2, K] of ``counts`` [2, K] slices on the two memories."""
        held: NDArray[np.int64] = tables.pages[row][np.arange(counts.shape[1]), [[0], [1]], counts] * self.layer_bytes[:, 0]
        return held
