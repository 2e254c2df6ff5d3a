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
        if np.any(np.diff(self.pages, axis=-1) < 0) or np.any(self.pages < 0):
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

    def two_way(self) -> tuple[Array, Pages]:
        """All splits over two tiers: seconds [D, K, N+1] and pages [D, K, N+1, 2] with n slices on the first tier; seconds are inf
        beyond a kind's slices."""
        if len(self.tier_names) != 2:
            raise ValueError(f"this takes two memories, and there are {len(self.tier_names)}: {list(self.tier_names)}; use PatternMapping")
        kind = np.arange(len(self.kinds))[:, None]
        slices = np.array([kind.slices for kind in self.kinds])[:, None]
        first = np.broadcast_to(np.arange(self.seconds.shape[-1]), (len(self.kinds), self.seconds.shape[-1]))
        counts = np.stack([first, np.maximum(slices - first, 0)], axis=-1)
        return self.split_seconds(kind, counts), self.split_pages(kind, counts)

    @classmethod
    def build(
        cls, systems: Systems | Sequence[System], workload: Workload, *, profile: Profile, granularity: Granularity = "kv_head"
    ) -> KernelMappingTables:
        """Tables of one workload on D systems that differ in numbers only (same tiers, units and links)."""
        systems = as_systems(systems)
        if granularity not in ("kv_head", "query_head"):
            raise ValueError(f"granularity must be 'kv_head' or 'query_head', not {granularity!r}")
        tier_names, lanes = systems.base.tier_names, _lanes(systems)
        alone = [[lane for lane in lanes if lane.tiers == (t,)] for t in range(len(tier_names))]
        common = [lane for lane in lanes if len(lane.tiers) > 1]
        page = systems.values("tiers", "page").astype(np.int64)
        capacity = capacity_pages(systems.values("tiers", "capacity"), page)
        sublayers = _sublayers(workload, granularity)
        shape = (len(systems), len(sublayers), len(tier_names), max(kind.slices for kind, _ in sublayers) + 1)
        seconds = np.full(shape, np.inf)
        shared = np.zeros((*shape[:2], len(common), *shape[2:]))
        pages = np.zeros(shape, dtype=np.int64)
        traffic = np.zeros(shape)
        for k, (kind, parts) in enumerate(sublayers):
            for t, name in enumerate(tier_names):
                outer = t in (0, len(tier_names) - 1)
                side = _Side(
                    kernels=parts, slices=kind.slices, llm=workload.llm, profile=profile, granularity=granularity, tier=name, outer=outer
                )
                n = np.s_[:, k, t, : kind.slices + 1]
                pages[n] = side.pages(page[:, [t]])
                pages[:, k, t, kind.slices + 1 :] = pages[:, k, t, [kind.slices]]
                traffic[n] = side.weights + side.state
                walks = page_walk_time(pages[n], profile.page_walk, profile.page_walks)
                seconds[n] = reduce(np.maximum, [lane.seconds(side) for lane in alone[t]]) + walks + side.all_reduce
                for s, lane in enumerate(common):
                    if t in lane.tiers:
                        shared[:, k, s, t, : kind.slices + 1] = lane.seconds(side)
        return cls(
            kinds=tuple(kind for kind, _ in sublayers),
            tier_names=tier_names,
            seconds=seconds,
            shared=shared,
            pages=pages,
            traffic=traffic,
            t_sync=profile.t_sync,
            capacity=np.ascontiguousarray(np.broadcast_to(capacity, (len(systems), len(tier_names)))),
            page=np.ascontiguousarray(np.broadcast_to(page, (len(systems), len(tier_names)))),
        )


def _sublayers(workload: Workload, granularity: Granularity) -> list[tuple[Kind, tuple[Kernel, ...]]]:
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
class _Side:
    """The work of one sublayer on one tier for every number of slices n = 0..N; arrays of shape [N+1], or [D, N+1]."""

    kernels: tuple[Kernel, ...]
    slices: int
    llm: LLMConfig
    profile: Profile
    granularity: Granularity
    tier: str
    outer: bool

    @property
    def share(self) -> Array:
        """n / N: of columns and query heads."""
        return np.arange(self.slices + 1) / self.slices

    @property
    def groups(self) -> Array:
        """Share of the KV heads that n slices need.

        By KV head: n / N. By query head a group that is split is needed on both sides: the first and the last tier hold
        ceil(n / g) groups of g = H / KV query heads; a tier between them, whose heads may start in mid-group, is charged the most
        that can be, 1 + ceil((n - 1) / g).
        """
        if self.granularity == "kv_head":
            return self.share
        n = np.arange(self.slices + 1)
        heads, group = self.llm.num_kv_heads, self.llm.num_attention_heads // self.llm.num_kv_heads
        touched = -(-n // group) if self.outer else np.where(n > 0, 1 + -(-(n - 1) // group), 0)
        return np.minimum(touched, heads) / heads

    def _of(self, kernel: Kernel) -> Array:
        return self.groups if kernel.split == "kv_head" else self.share

    @property
    def weights(self) -> Array:
        """Bytes of weights read."""
        return _added([kernel.weight_bytes * kernel.touched * self._of(kernel) for kernel in self.kernels])

    @property
    def state(self) -> Array:
        """Bytes of keys and values read: at least once each group that is here, rho times (at most once a query head) in proportion."""
        rereads = min(self.profile.rho, self.llm.num_attention_heads / self.llm.num_kv_heads)
        return _added([kernel.state_bytes * np.maximum(rereads * self.share, self._of(kernel)) for kernel in self.kernels])

    @property
    def all_reduce(self) -> Array:
        """Seconds of the two all-reduces of a layer, charged to the sublayer that holds the products they follow."""
        return np.where(self.share > 0, 2 * self.profile.all_reduce if self.kernels[0].sublayer == "fc" else 0.0, 0.0)

    def pages(self, page: Pages) -> Pages:
        """Pages held; rounded up once a tensor. ``page`` [D, 1]."""
        return _added([kernel.tensors * page_count(kernel.held_bytes / kernel.tensors * self._of(kernel), page) for kernel in self.kernels])

    def memory_time(self, bandwidth: Array) -> Array:
        return memory_time(self.weights, bandwidth) + memory_time(self.state, bandwidth, self.profile.eta_on(self.tier))

    def compute_time(self, matrix: Array, vector: Array, tile: Array) -> Array:
        """``matrix``, ``vector``, ``tile``: [D, 1, U], a column for each unit of a tier; the units share every slice."""
        times = []
        for kernel in self.kernels:
            if not kernel.flops:
                continue
            share = self.share if kernel.state_bytes else self._of(kernel)
            peak = vector if kernel.engine == "vector" else matrix_peak(matrix, kernel.rows, tile)
            times.append(compute_time(kernel.flops * share, peak.sum(axis=-1)))
        return _added(times) if times else np.zeros((len(matrix), self.slices + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lane:
    """Something that only one byte or FLOP at a time can use, the tiers whose slices use it, and for how long each side does."""

    tiers: tuple[int, ...]
    seconds: Callable[[_Side], Array]


def _lanes(systems: Systems) -> list[_Lane]:
    """The memories, units and links of machines of one structure."""
    first = systems.base
    names = first.tier_names
    bandwidth = systems.values("tiers", "bandwidth")
    lanes = [_Lane(tiers=(t,), seconds=partial(_Side.memory_time, bandwidth=bandwidth[:, [t]])) for t in range(len(names))]
    consumers = [first.consumer(name) for name in names]
    matrix, vector, tile = (systems.values("units", field)[:, None, :] for field in ("matrix_peak", "vector_peak", "tile"))
    tile = np.where(np.isnan(tile), 1.0, tile)
    speed = systems.values("links", "bandwidth") * systems.values("links", "efficiency")
    for consumer in dict.fromkeys(end for end, _ in consumers):
        on = np.s_[:, :, [u for u, unit in enumerate(first.units) if unit.tier == consumer]]
        served = tuple(t for t, (end, _) in enumerate(consumers) if end == consumer)
        lanes.append(_Lane(tiers=served, seconds=partial(_Side.compute_time, matrix=matrix[on], vector=vector[on], tile=tile[on])))
    for used in dict.fromkeys(link for _, links in consumers for link in links):
        crossing = tuple(t for t, (_, links) in enumerate(consumers) if used in links)
        lanes.append(_Lane(tiers=crossing, seconds=partial(_Side.memory_time, bandwidth=speed[:, [first.links.index(used)]])))
    return lanes


def _added(terms: Sequence[Any]) -> Any:
    """Sum in the order given: a batch then equals its singles bit for bit."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
