"""The coefficient tables of the kernel mapping: seconds, pages and bytes of every sublayer, tier and number of slices.

A decoder layer is a sequence of sublayers (qkv, attention, fc), each cut into slices (heads, columns) that run where their data
are, in parallel, with a barrier at the end (H2M2, arXiv 2504.14893). Sublayers of the same shape are one *kind*. With n of N
slices on a side, x(n) its bytes and f(n) its FLOPs:

    memory    x_weights / BW + x_state / (eta BW)     x_state = state max(rho n / N, share of KV groups touched)
    compute   sum over kernels of f / peak            (``roofline.matrix_peak``: the tile-load floor)
    side      max(memory, compute) + page walks

Data on a tier without a compute unit stream over links to the nearest one: their side is max(memory, links), and their FLOPs
add up with those of the unit's own tier, as do bytes on a link that several tiers share. Activations are left out of bytes and
capacities, as in H2M2: below 1 % of the bytes of its decode steps, but up to 2.1 % for Llama2 at short contexts (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hardware import System
from .llm import LLMConfig
from .paging import Pages, capacity_pages, page_count, page_walk_time
from .profiles import Profile
from .roofline import Array, compute_time, matrix_peak, memory_time
from .systems import Systems, as_systems
from .workload import Kernel, Workload, kernels

Granularity = Literal["kv_head", "query_head"]

BLOCK = 256
"""Designs whose tables are computed together: temporaries of some 200 kB, which stay in the cache of a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of sublayer: ``layers`` layers have one, cut into ``slices`` slices."""

    name: str
    layers: int
    slices: int

    def __post_init__(self) -> None:
        if self.layers < 1 or self.slices < 1:
            raise ValueError(f"kind {self.name!r} needs at least one layer and one slice, not {self.layers} and {self.slices}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelMappingTables:
    """Tables with a leading axis of D designs; K kinds, T tiers, S lanes that tiers share, N = most slices of a kind.

    All are of one layer. ``seconds`` [D, K, T, N+1]: side time of a tier that has n slices; inf beyond the kind's slices.
    ``shared`` [D, K, S, T, N+1]: what each tier adds to a lane that it shares with others (a unit, a link).
    ``pages`` [D, K, T, N+1], int64. ``traffic`` [D, K, T, N+1]: bytes read. ``t_sync`` [s]: barrier of a split sublayer.
    ``capacity`` [D, T] pages, ``page`` [D, T] bytes, int64.
    """

    kinds: tuple[Kind, ...]
    tier_names: tuple[str, ...]
    seconds: Array
    shared: Array
    pages: Pages
    traffic: Array
    t_sync: float
    capacity: Pages
    page: Pages

    def __post_init__(self) -> None:
        designs, kinds, tiers, counts = self.seconds.shape
        expected = {
            "seconds": (designs, len(self.kinds), len(self.tier_names), max(kind.slices for kind in self.kinds) + 1),
            "shared": (designs, kinds, self.shared.shape[2], tiers, counts),
            "pages": (designs, kinds, tiers, counts),
            "traffic": (designs, kinds, tiers, counts),
            "capacity": (designs, tiers),
            "page": (designs, tiers),
        }
        for field, shape in expected.items():
            array = getattr(self, field)
            if array.shape != shape:
                raise ValueError(f"kernel-mapping tables: {field} has the shape {array.shape}, not {shape}; build them with build()")
            array.setflags(write=False)
        held = self.pages[:1] if self.same_pages else self.pages
        if np.any(np.diff(held, axis=-1) < 0) or np.any(held < 0):
            raise ValueError("kernel-mapping tables: pages must be at least 0 and must not fall as slices are added")

    def split_seconds(self, kind: int | NDArray[np.int64], counts: ArrayLike) -> Array:
        """Seconds [D, ...] of a sublayer of ``kind`` [...] split as ``counts`` [..., T]."""
        n = np.asarray(counts, dtype=np.int64)
        tiers = range(len(self.tier_names))
        slowest = self.seconds[:, kind, 0, n[..., 0]]
        for t in tiers[1:]:
            slowest = np.maximum(slowest, self.seconds[:, kind, t, n[..., t]])
        for lane in range(self.shared.shape[2]):
            slowest = np.maximum(slowest, _added([self.shared[:, kind, lane, t, n[..., t]] for t in tiers]))
        return slowest + np.where((n > 0).sum(axis=-1) > 1, self.t_sync, 0.0)

    def split_pages(self, kind: int | NDArray[np.int64], counts: ArrayLike) -> Pages:
        """Pages [D, ..., T] of a sublayer of ``kind`` [...] split as ``counts`` [..., T]."""
        n = np.asarray(counts, dtype=np.int64)
        return np.stack([self.pages[:, kind, t, n[..., t]] for t in range(len(self.tier_names))], axis=-1)

    def two_way(self, designs: slice = slice(None)) -> tuple[Array, Pages]:
        """All splits over two tiers: seconds [D, K, N+1] and pages [D, K, N+1, 2] with n slices on the first tier; seconds are inf
        beyond a kind's slices. ``designs``: only these; pages that are the same in all designs stay a view that repeats one."""
        if len(self.tier_names) != 2:
            raise ValueError(f"this takes two memories, and there are {len(self.tier_names)}: {list(self.tier_names)}; use PatternMapping")
        side, shared, pages = self.seconds[designs], self.shared[designs], self.pages[designs]
        held = pages[: 1 if self.same_pages else None]
        seconds = np.full((*side.shape[:2], side.shape[3]), np.inf)
        counts = np.zeros((*held.shape[:2], held.shape[3], 2), dtype=np.int64)
        for k, kind in enumerate(self.kinds):
            first, second = np.s_[: kind.slices + 1], np.s_[kind.slices :: -1]
            slowest = seconds[:, k, first]
            np.maximum(side[:, k, 0, first], side[:, k, 1, second], out=slowest)
            for lane in range(shared.shape[2]):
                np.maximum(slowest, shared[:, k, lane, 0, first] + shared[:, k, lane, 1, second], out=slowest)
            if self.t_sync:
                slowest[:, 1:-1] += self.t_sync
            counts[:, k, :, 0] = held[:, k, 0]
            counts[:, k, first, 1] = held[:, k, 1, second]
            counts[:, k, kind.slices + 1 :, 1] = held[:, k, 1, :1]
        return seconds, np.broadcast_to(counts, (len(side), *counts.shape[1:]))

    @property
    def same_pages(self) -> bool:
        """Whether ``pages`` is one design's, repeated without being stored again."""
        return len(self.pages) > 1 and self.pages.strides[0] == 0

    @classmethod
    def build(
        cls, systems: Systems | Sequence[System], workload: Workload, *, profile: Profile, granularity: Granularity = "kv_head"
    ) -> KernelMappingTables:
        """Tables of one workload on D systems that differ in numbers only (same tiers, units and links)."""
        systems = as_systems(systems)
        if granularity not in ("kv_head", "query_head"):
            raise ValueError(f"granularity must be 'kv_head' or 'query_head', not {granularity!r}")
        tier_names, lanes = systems.base.tier_names, lanes_of(systems)
        alone = [[lane for lane in lanes if lane.tiers == (t,)] for t in range(len(tier_names))]
        common = [lane for lane in lanes if len(lane.tiers) > 1]
        page = systems.values("tiers", "page").astype(np.int64)
        capacity = capacity_pages(systems.values("tiers", "capacity"), page)
        sublayers = sublayers_of(workload, granularity)
        shape = (len(systems), len(sublayers), len(tier_names), max(kind.slices for kind, _ in sublayers) + 1)
        seconds = np.empty(shape)
        shared = np.zeros((*shape[:2], len(common), *shape[2:]))
        pages = np.zeros((len(page), *shape[1:]), dtype=np.int64)
        traffic = np.zeros((1, *shape[1:]))
        for k, (kind, parts) in enumerate(sublayers):
            for t, name in enumerate(tier_names):
                outer = t in (0, len(tier_names) - 1)
                side = Side.of(
                    parts, slices=kind.slices, llm=workload.llm, profile=profile, granularity=granularity, tier=name, outer=outer
                )
                n = np.s_[:, k, t, : kind.slices + 1]
                pages[n] = side.pages(page[:, [t]])
                pages[:, k, t, kind.slices + 1 :] = pages[:, k, t, [kind.slices]]
                traffic[n] = side.weights + side.state
                walks = page_walk_time(pages[n], profile.page_walk, profile.page_walks)
                for first in range(0, len(systems), BLOCK):
                    some = slice(first, first + BLOCK)
                    time = reduce(np.maximum, [lane.seconds(side, some) for lane in alone[t]])
                    for more in (walks[some] if len(walks) > 1 else walks, side.all_reduce):
                        time = time + more if more.any() else time
                    seconds[some, k, t, : kind.slices + 1] = time
                    for s, lane in enumerate(common):
                        if t in lane.tiers:
                            shared[some, k, s, t, : kind.slices + 1] = lane.seconds(side, some)
            seconds[:, k, :, kind.slices + 1 :] = np.inf
        return cls(
            kinds=tuple(kind for kind, _ in sublayers),
            tier_names=tier_names,
            seconds=seconds,
            shared=shared,
            pages=np.broadcast_to(pages, shape),
            traffic=np.broadcast_to(traffic, shape),
            t_sync=profile.t_sync,
            capacity=np.ascontiguousarray(np.broadcast_to(capacity, (len(systems), len(tier_names)))),
            page=np.ascontiguousarray(np.broadcast_to(page, (len(systems), len(tier_names)))),
        )


def sublayers_of(workload: Workload, granularity: Granularity) -> list[tuple[Kind, tuple[Kernel, ...]]]:
    """The kinds of sublayer of a workload with their kernels; equal ones of different layers are one kind."""
    heads = workload.llm.num_attention_heads
    by_head = workload.llm.num_kv_heads if granularity == "kv_head" else heads
    layers: dict[tuple[Kernel, ...], int] = {}
    for count, listed in kernels(workload):
        for sublayer in dict.fromkeys(kernel.sublayer for kernel in listed):
            parts = tuple(kernel for kernel in listed if kernel.sublayer == sublayer)
            layers[parts] = layers.get(parts, 0) + count
    found, names = [], []
    for parts, count in layers.items():
        sublayer = parts[0].sublayer
        names.append(sublayer)
        name = sublayer if names.count(sublayer) == 1 else f"{sublayer}_{names.count(sublayer)}"
        found.append((Kind(name=name, layers=count, slices=heads if sublayer == "fc" else by_head), parts))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The work of one sublayer on one tier for every number of slices n = 0..N; arrays of shape [N+1].

    ``weights`` and ``state``: bytes read; keys and values at least once each group that is here, rho times (at most once a query head) in
    proportion. ``flops``: what each kernel computes. ``shares``: share of each kernel's data that is held. ``all_reduce``: seconds of the
    two all-reduces of a layer, charged to the sublayer that holds the products they follow. ``eta``: share of the bandwidth for state.
    """

    kernels: tuple[Kernel, ...]
    shares: tuple[Array, ...]
    weights: Array
    state: Array
    flops: tuple[Array, ...]
    all_reduce: Array
    eta: float

    @classmethod
    def of(
        cls,
        kernels: tuple[Kernel, ...],
        *,
        slices: int,
        llm: LLMConfig,
        profile: Profile,
        granularity: Granularity,
        tier: str,
        outer: bool,
    ) -> Side:
        """The work of ``kernels``; ``outer``: whether the tier is the first or the last."""
        share = np.arange(slices + 1) / slices  # n / N: of columns and query heads
        groups = share if granularity == "kv_head" else _groups(slices, llm, outer)
        shares = tuple(groups if kernel.split == "kv_head" else share for kernel in kernels)
        rereads = min(profile.rho, llm.num_attention_heads / llm.num_kv_heads)
        each = tuple(zip(kernels, shares, strict=True))
        return cls(
            kernels=kernels,
            shares=shares,
            weights=_added([kernel.weight_bytes * kernel.touched * held for kernel, held in each]),
            state=_added([kernel.state_bytes * np.maximum(rereads * share, held) for kernel, held in each]),
            flops=tuple(kernel.flops * (share if kernel.state_bytes else held) for kernel, held in each),
            all_reduce=np.where(share > 0, 2 * profile.all_reduce if kernels[0].sublayer == "fc" else 0.0, 0.0),
            eta=profile.eta_on(tier),
        )

    def pages(self, page: Pages) -> Pages:
        """Pages held [D, N+1]; rounded up once a tensor. ``page`` [D, 1]."""
        each = zip(self.kernels, self.shares, strict=True)
        return _added([kernel.tensors * page_count(kernel.held_bytes / kernel.tensors * held, page) for kernel, held in each])

    def memory_time(self, some: slice, bandwidth: Array) -> Array:
        """Seconds to read weights and state on the designs ``some``; ``bandwidth`` [D, 1], or [1, 1] if no design varies it."""
        rate = _rows(bandwidth, some)
        read = [(nbytes, eta) for nbytes, eta in ((self.weights, 1.0), (self.state, self.eta)) if nbytes.any()]
        return _added([memory_time(nbytes, rate, eta) for nbytes, eta in read or [(self.weights, 1.0)]])

    def compute_time(self, some: slice, matrix: Array, vector: Array, tile: Array) -> Array:
        """``matrix``, ``vector``, ``tile``: [D, 1, U], a column for each unit of a tier; the units share every slice."""
        matrix, vector, tile = (_rows(values, some) for values in (matrix, vector, tile))
        times = []
        for kernel, flops in zip(self.kernels, self.flops, strict=True):
            if kernel.flops:
                peak = vector if kernel.engine == "vector" else matrix_peak(matrix, kernel.rows, tile)
                times.append(compute_time(flops, peak.sum(axis=-1)))
        return _added(times) if times else np.zeros((1, len(self.weights)))


def _groups(slices: int, llm: LLMConfig, outer: bool) -> Array:
    """Share of the KV heads that n query heads need [N+1].

    A group that is split is needed on both sides: the first and the last tier hold ceil(n / g) groups of g = H / KV query heads; a tier
    between them, whose heads may start in mid-group, is charged the most that can be, 1 + ceil((n - 1) / g).
    """
    n = np.arange(slices + 1)
    heads, group = llm.num_kv_heads, llm.num_attention_heads // llm.num_kv_heads
    touched = -(-n // group) if outer else np.where(n > 0, 1 + -(-(n - 1) // group), 0)
    return np.minimum(touched, heads) / heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Something that only one byte or FLOP at a time can use, the tiers whose slices use it, and for how long each side does."""

    tiers: tuple[int, ...]
    seconds: Callable[[Side, slice], Array]


def lanes_of(systems: Systems) -> list[Lane]:
    """The memories, units and links of machines of one structure."""
    first = systems.base
    names = first.tier_names
    bandwidth = systems.values("tiers", "bandwidth")
    lanes = [Lane(tiers=(t,), seconds=partial(Side.memory_time, bandwidth=bandwidth[:, [t]])) for t in range(len(names))]
    consumers = [first.consumer(name) for name in names]
    matrix, vector, tile = (systems.values("units", field)[:, None, :] for field in ("matrix_peak", "vector_peak", "tile"))
    tile = np.where(np.isnan(tile), 1.0, tile)
    speed = systems.values("links", "bandwidth") * systems.values("links", "efficiency")
    for consumer in dict.fromkeys(end for end, _ in consumers):
        on = np.s_[:, :, [u for u, unit in enumerate(first.units) if unit.tier == consumer]]
        served = tuple(t for t, (end, _) in enumerate(consumers) if end == consumer)
        lanes.append(Lane(tiers=served, seconds=partial(Side.compute_time, matrix=matrix[on], vector=vector[on], tile=tile[on])))
    for used in dict.fromkeys(link for _, links in consumers for link in links):
        crossing = tuple(t for t, (_, links) in enumerate(consumers) if used in links)
        lanes.append(Lane(tiers=crossing, seconds=partial(Side.memory_time, bandwidth=speed[:, [first.links.index(used)]])))
    return lanes


def _rows(values: Array, some: slice) -> Array:
    """The designs ``some`` of ``values`` [D, ...]; all of them if no design varies them [1, ...]."""
    return values[some] if len(values) > 1 else values


def _added(terms: Sequence[Any]) -> Any:
    """Sum in the order given: a batch then equals its singles bit for bit."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
