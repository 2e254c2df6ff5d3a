"""The kernel mapping: how the heads and columns of each sublayer are split over two or more memories (H2M2, arXiv 2504.14893).

A sublayer takes as long as its slowest side, plus a barrier if it is split; a step is the sum over sublayers and layers:

    T = sum_k sum_(layers of k) [ max_t side_kt(n_kt) + t_sync if more than one n_kt > 0 ]     sum_t n_kt = N_k
    subject to   sum of the pages on t <= capacity of t                                        every tier t
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_number
from .hardware import ComputeUnit, MemoryTier, System
from .kernel_mapping_tables import Granularity, KernelMappingTables, Kind
from .paging import Pages, migration_time
from .price import access_energy
from .profiles import FIRST_PRINCIPLES, Profile
from .roofline import Array
from .units import GB
from .workload import Workload

MAX_SPLITS = 5_000_000
"""Ways to split one sublayer that ``splits`` lists at most (96 slices over five tiers are 3.9 million)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """``layers`` layers whose sublayer puts ``counts[t]`` slices on tier t."""

    layers: int
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(map(int, self.counts)))
        if self.layers < 1 or min(self.counts, default=-1) < 0:
            raise ValueError(f"a split needs at least one layer and counts of at least 0, not {self.layers} and {self.counts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMappingPlan:
    """The decision: for each kind of sublayer, which layers (in order: the first ``layers``, the next, ...) are split how."""

    splits: tuple[tuple[Split, ...], ...]

    @classmethod
    def same_in_all_layers(cls, problem: KernelMappingProblem, counts: Sequence[Sequence[int]]) -> KernelMappingPlan:
        """The plan with ``counts[k][t]`` slices in every layer of kind k."""
        kinds = problem.kinds
        return cls(splits=tuple((Split(layers=kind.layers, counts=tuple(row)),) for kind, row in zip(kinds, counts, strict=True)))

    def mean_count(self, kind: int, tier: int) -> float:
        """Slices of a kind on a tier, averaged over its layers (a whole number when all layers are split alike)."""
        splits = self.splits[kind]
        return sum(split.layers * split.counts[tier] for split in splits) / sum(split.layers for split in splits)

    def __str__(self) -> str:
        kinds = (", ".join(f"{split.layers} x {'|'.join(map(str, split.counts))}" for split in splits) for splits in self.splits)
        return "; ".join(kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """What a plan costs: ``latency`` [s] of a step, of which ``kind_latency`` [s] a kind of sublayer; and for each tier the bytes
    held (whole pages), capacity, overflow (0: it fits) and bytes read in a step. ``energy`` [J] of these reads; None if unknown.

    ``flops`` by the units of each tier and ``link_bytes`` over each link of the system (data of a tier without a unit); None for a
    problem made of coefficients. ``price.step_energy`` turns them into joules.
    """

    latency: float
    kind_latency: tuple[float, ...]
    tier_names: tuple[str, ...]
    tier_bytes: tuple[float, ...]
    capacity: tuple[float, ...]
    overflow: tuple[float, ...]
    traffic: tuple[float, ...]
    energy: float | None
    flops: tuple[float, ...] | None = None
    link_bytes: tuple[float, ...] | None = None

    @property
    def fits(self) -> bool:
        """No tier holds more than its capacity."""
        return not any(self.overflow)

    def explain_overflow(self) -> str:
        """Which tier holds how much too much; empty if the plan fits."""
        over = zip(self.tier_names, self.tier_bytes, self.capacity, self.overflow, strict=True)
        return ", ".join(f"{name} holds {held:.0f} B of {cap:.0f} B: {more:.0f} B too much" for name, held, cap, more in over if more)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionCost:
    """What going from one plan to another costs: bytes ``moved[source, target]`` and the seconds they take, one after the other."""

    moved: dict[tuple[str, str], float]
    latency: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelMappingProblem:
    """Which slices of which sublayer go to which tier. A batch of one design of ``KernelMappingTables``.

    ``grouped``: exact solvers use one split for all layers of a kind, as H2M2 does; else each layer may be split in its own way.
    ``system``, ``workload`` and ``profile`` are what it was built from; None for a problem made of coefficients.
    """

    tables: KernelMappingTables
    grouped: bool = True
    system: System | None = None
    workload: Workload | None = None
    profile: Profile | None = None
    granularity: Granularity = "kv_head"

    def __post_init__(self) -> None:
        if len(self.tables.capacity) != 1:
            raise ValueError(
                f"a problem is one design, not {len(self.tables.capacity)}; solve tables of many with TableMapping().solve_batch"
            )

    @classmethod
    def build(
        cls,
        system: System,
        workload: Workload,
        *,
        profile: Profile = FIRST_PRINCIPLES,
        grouped: bool = True,
        granularity: Granularity = "kv_head",
    ) -> KernelMappingProblem:
        """The problem of serving a workload on a system. ``granularity``: attention and QKV are cut by KV head, or by query head, which
        charges a second copy of the keys, values and K/V projections of a group that is split. Columns of fc are cut in as many
        slices as there are query heads."""
        tables = KernelMappingTables.build([system], workload, profile=profile, granularity=granularity)
        return cls(tables=tables, grouped=grouped, system=system, workload=workload, profile=profile, granularity=granularity)

    @classmethod
    def from_slices(
        cls,
        seconds: ArrayLike,
        pages: ArrayLike,
        capacity: ArrayLike,
        *,
        slices: int | Sequence[int],
        layers: int | Sequence[int] = 1,
        t_sync: float = 0.0,
        page: int = 1,
        grouped: bool = False,
        tier_names: Sequence[str] = (),
    ) -> KernelMappingProblem:
        """A problem of linear coefficients, for experiments: K kinds, T tiers.

        ``seconds`` [K, T] a slice, ``pages`` [K, T] or [K] a slice, ``capacity`` [T] pages, ``slices`` and ``layers`` a kind.
        """
        rate = np.asarray(seconds, dtype=np.float64)
        if rate.ndim != 2 or not rate.size or not np.all(np.isfinite(rate)) or np.any(rate < 0):
            raise ValueError(f"seconds must be finite, at least 0 and of shape [kinds, tiers], not of shape {rate.shape}")
        for name, value in (("pages", pages), ("capacity", capacity), ("slices", slices), ("layers", layers)):
            if not np.all(np.asarray(value) == np.asarray(value).astype(np.int64)):
                raise ValueError(f"from_slices: {name} must be whole numbers, not {value!r}")
        check_number("from_slices", "t_sync", t_sync, "s", zero=True, infinite=False)
        held = np.asarray(pages, dtype=np.int64)
        held = np.broadcast_to(held[:, None] if held.ndim == 1 else held, rate.shape)
        room = np.broadcast_to(np.asarray(capacity, dtype=np.int64), rate.shape[1:])
        if np.any(held < 0) or np.any(room < 0):
            raise ValueError("pages and capacity must be at least 0")
        sizes, depth = (np.broadcast_to(np.asarray(value, dtype=np.int64), rate.shape[:1]) for value in (slices, layers))
        kinds = tuple(Kind(name=f"kind{k}", layers=int(depth[k]), slices=int(sizes[k])) for k in range(len(rate)))
        n = np.arange(int(sizes.max()) + 1)
        side = np.where(n <= sizes[:, None, None], rate[:, :, None] * n, np.inf)
        held = held[:, :, None] * np.minimum(n, sizes[:, None, None])
        tables = KernelMappingTables(
            kinds=kinds,
            tier_names=tuple(tier_names) or tuple(f"tier{t}" for t in range(rate.shape[1])),
            seconds=side[None],
            shared=np.zeros((1, len(rate), 0, *side.shape[1:])),
            pages=held[None],
            traffic=held[None].astype(np.float64) * page,
            t_sync=t_sync,
            capacity=room[None].copy(),
            page=np.full((1, rate.shape[1]), page, dtype=np.int64),
        )
        return cls(tables=tables, grouped=grouped)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sublayer."""
        return self.tables.kinds

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Names of the tiers, in order."""
        return self.tables.tier_names

    @property
    def capacity(self) -> Pages:
        """Pages of each tier, [T]."""
        return self.tables.capacity[0]

    @property
    def page(self) -> Pages:
        """Bytes of a page of each tier, [T]."""
        return self.tables.page[0]

    def splits(self, kind: int) -> NDArray[np.int64]:
        """Every way to split a sublayer of a kind over the tiers, [P, T], in lexicographic order; ValueError if there are too many."""
        return _splits(self.kinds[kind].slices, len(self.tier_names))

    def seconds(self, kind: int, counts: ArrayLike) -> Array:
        """Seconds [...] of one sublayer of a kind split as ``counts`` [..., T]."""
        return self.tables.split_seconds(kind, counts)[0]

    def pages(self, kind: int, counts: ArrayLike) -> Pages:
        """Pages [..., T] of one sublayer of a kind split as ``counts`` [..., T]."""
        return self.tables.split_pages(kind, counts)[0]

    def evaluate(self, plan: KernelMappingPlan) -> PlanCost:
        """Seconds, bytes and joules of a plan; ValueError if it is no plan of this problem (a plan that does not fit is one)."""
        self._check(plan)
        kind = np.repeat(np.arange(len(self.kinds)), [len(splits) for splits in plan.splits])
        layers = np.array([split.layers for splits in plan.splits for split in splits])
        counts = np.array([split.counts for splits in plan.splits for split in splits])
        latencies = np.bincount(kind, weights=layers * self.tables.split_seconds(kind, counts)[0], minlength=len(self.kinds)).tolist()
        held = (layers[:, None] * self.tables.split_pages(kind, counts)[0]).sum(axis=0)
        read = self.tables.traffic[0, kind[:, None], np.arange(len(self.tier_names)), counts]
        traffic = (layers[:, None] * read).sum(axis=0)
        energies = [tier.energy for tier in self.system.tiers] if self.system else [None]
        flops, link_bytes = None, None
        if self.system is not None:
            link_bytes = streamed_bytes(self.system, traffic)
            if self.workload is not None:
                table = step_flops(self.workload, self.granularity, len(self.tier_names))
                flops = computed_flops(
                    self.system, (layers[:, None] * table[kind[:, None], np.arange(len(self.tier_names)), counts]).sum(0)
                )
        return PlanCost(
            latency=sum(latencies),
            kind_latency=tuple(latencies),
            tier_names=self.tier_names,
            tier_bytes=tuple((held * self.page).astype(float).tolist()),
            capacity=tuple((self.capacity * self.page).astype(float).tolist()),
            overflow=tuple((np.maximum(held - self.capacity, 0) * self.page).astype(float).tolist()),
            traffic=tuple(traffic.tolist()),
            energy=access_energy(self.system, traffic.tolist()) if self.system and None not in energies else None,
            flops=None if flops is None else tuple(flops.tolist()),
            link_bytes=None if link_bytes is None else tuple(link_bytes.tolist()),
        )

    def transition(self, previous: KernelMappingPlan, plan: KernelMappingPlan) -> TransitionCost:
        """Bytes that change tier between two plans of this problem, layer by layer, and the seconds to move them.

        A layer's slices keep their place where they can: what a tier grows by, in whole pages, is moved there from the tiers that give up
        slices (``moves``). A mapping that changed with the context is compared at this problem's context.
        """
        if self.system is None:
            raise ValueError("transition needs to know the links: build the problem from a System")
        moved: dict[tuple[str, str], float] = {}
        for k, (before, after) in enumerate(zip(self._by_layer(previous), self._by_layer(plan), strict=True)):
            both, layers = np.unique(np.concatenate([before, after], axis=1), axis=0, return_counts=True)
            for (old, new), alike in zip(both.reshape(len(both), 2, -1), layers.tolist(), strict=True):
                change = (self.pages(k, new) - self.pages(k, old)) * self.page
                for source, target, nbytes in moves(change.tolist(), (new - old).tolist()):
                    way = (self.tier_names[source], self.tier_names[target])
                    moved[way] = moved.get(way, 0.0) + nbytes * alike
        return TransitionCost(moved=moved, latency=migration_time(self.system, moved))

    def explain_infeasible(self) -> str:
        """Why nothing fits, in one sentence: which memory, how many GB, and what would help."""
        room = [float(pages) * page / GB for pages, page in zip(self.capacity, self.page, strict=True)]
        least = [min(self.tables.pages[0, k, t, kind.slices] * self.page[t] for t in range(len(room))) for k, kind in enumerate(self.kinds)]
        need = sum(kind.layers * float(size) for kind, size in zip(self.kinds, least, strict=True)) / GB
        tiers = " + ".join(f"{name} {size:.6g} GB" for name, size in zip(self.tier_names, room, strict=True))
        if need <= sum(room):
            by_head = self.workload is not None and self.granularity == "kv_head"
            cut = "by query head (granularity='query_head')" if by_head else "in finer slices"
            also = " or per layer (grouped=False)" if self.grouped else ""
            return f"{need:.6g} GB would fit into {tiers}, but not slice by slice in whole pages; cut {cut}{also}, or leave more room"
        roomiest = self.tier_names[int(np.argmax(room))]
        short = need - sum(room)
        return (
            f"{need:.6g} GB are needed and {tiers} hold {sum(room):.6g} GB; enlarge {roomiest} by at least {short:.6g} GB"
            + self._way_out(sum(room))
        )

    def _way_out(self, room: float) -> str:
        if self.workload is None:
            return " or make the problem smaller"
        workload = self.workload
        left = room * GB - workload.weight_bytes
        if left < 0:
            return f"; the weights alone ({workload.weight_bytes / GB:.6g} GB at {workload.weight_bits:g} bits) do not fit"
        context = int(left / (workload.state_bytes / workload.context)) if workload.state_bytes else 0
        return f", or serve a context of at most about {context} instead of {workload.context} tokens at batch {workload.batch}"

    def _by_layer(self, plan: KernelMappingPlan) -> list[NDArray[np.int64]]:
        self._check(plan)
        return [np.repeat([split.counts for split in splits], [split.layers for split in splits], axis=0) for splits in plan.splits]

    def _check(self, plan: KernelMappingPlan) -> None:
        if len(plan.splits) != len(self.kinds):
            raise ValueError(
                f"the plan has {len(plan.splits)} kinds of sublayer, the problem {len(self.kinds)}: it belongs to another problem"
            )
        for kind, splits in zip(self.kinds, plan.splits, strict=True):
            layers = sum(split.layers for split in splits)
            if layers != kind.layers:
                raise ValueError(f"the plan splits {layers} layers of {kind.name}; the problem has {kind.layers}")
            for split in splits:
                if len(split.counts) != len(self.tier_names) or sum(split.counts) != kind.slices:
                    raise ValueError(
                        f"the plan puts {split.counts} slices of {kind.name} on {self.tier_names}; they must add up to {kind.slices}"
                    )


def moves(change: Sequence[int], slices: Sequence[int]) -> list[tuple[int, int, int]]:
    """How a layer's bytes move: (source, target, bytes) for tiers whose bytes and slices change by ``change`` and ``slices``.

    What a tier grows by comes from the tiers that give up slices, in their order, from each as much as it shrinks by, and the rest from
    the last of them: a slice that leaves a page half full is moved, too.
    """
    loss = {t: max(-more, 0) for t, more in enumerate(change) if slices[t] < 0}
    found = []
    for target, wanted in enumerate(change):
        for source in loss if wanted > 0 else ():
            last = source == max(loss)
            step = wanted if last else min(wanted, loss[source])
            wanted, loss[source] = wanted - step, max(loss[source] - step, 0)
            if step:
                found.append((source, target, step))
    return found


@lru_cache(maxsize=64)
def step_flops(workload: Workload, granularity: Granularity, tiers: int) -> Array:
    """FLOPs [K, T, N+1] of one layer's sublayer for n slices on a tier, inf beyond a kind's slices; T = ``tiers``.

    They are the seconds of a machine of 1 FLOP/s that reads in no time. By query head the K/V projections of a split group are done twice.
    """
    names = [f"tier{t}" for t in range(tiers)]
    counter = System(
        name="counter of FLOPs",
        tiers=tuple(MemoryTier(name=name, capacity=0.0, bandwidth=math.inf) for name in names),
        units=tuple(ComputeUnit(name=name, tier=name, matrix_peak=1.0, vector_peak=1.0) for name in names),
    )
    return KernelMappingTables.build([counter], workload, profile=FIRST_PRINCIPLES, granularity=granularity).seconds[0]


def computed_flops(system: System, flops: Array) -> Array:
    """FLOPs [..., T] by the units of each tier, from those of the data on each tier: the nearest unit works on data without one."""
    return _gathered(flops, [(system.tier_names.index(system.consumer(name)[0]),) for name in system.tier_names], len(system.tiers))


def streamed_bytes(system: System, traffic: Array) -> Array:
    """Bytes [..., L] over each link when ``traffic`` [..., T] is read: data of a tier without a unit cross all links on their way."""
    ways = [tuple(map(system.links.index, system.consumer(name)[1])) for name in system.tier_names]
    return _gathered(traffic, ways, len(system.links))


def _gathered(amounts: Array, places: Sequence[Sequence[int]], number: int) -> Array:
    """[..., number]: amount t of the last axis added to each of ``places[t]``, in the order of t."""
    total = np.zeros((*amounts.shape[:-1], number))
    for t, ends in enumerate(places):
        for end in ends:
            total[..., end] += amounts[..., t]
    return total


@cache
def _splits(slices: int, tiers: int) -> NDArray[np.int64]:
    """All rows of ``tiers`` whole numbers >= 0 that add up to ``slices``."""
    number = math.comb(slices + tiers - 1, tiers - 1)
    if number > MAX_SPLITS:
        raise ValueError(
            f"{slices} slices over {tiers} tiers can be split in {number} ways, and at most {MAX_SPLITS} are listed; cut in fewer slices"
        )
    if tiers == 1:
        rows = np.array([[slices]], dtype=np.int64)
    else:
        rows = np.concatenate([np.insert(_splits(slices - first, tiers - 1), 0, first, axis=1) for first in range(slices + 1)])
    rows.setflags(write=False)
    return rows
