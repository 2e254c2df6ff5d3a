"""Pages: counts, fragmentation, page walks and migration. Pages are numbers here, never objects (GPT3-175B has 120,000 of 2 MiB)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hardware import System
from .roofline import Array, transfer_time

Pages = NDArray[np.int64]
Directions = Literal["one", "both"]
"""Whether data migrate in one direction at a time, or in both."""

MOST_BYTES = 2.0**62
"""Bytes beyond it, also infinitely many, are counted as so many: they fit an int64."""


def page_count(nbytes: ArrayLike, page: ArrayLike) -> Pages:
    """Pages of ``page`` bytes that hold a tensor of ``nbytes`` [B]: rounded up, once for each tensor on each side.

    Bytes are taken as whole (a hundredth of a byte is forgiven, so that 3 x 0.1 pages of 10 B are 3 B).
    """
    whole = np.minimum(np.ceil(np.asarray(nbytes, dtype=np.float64) - 0.01), MOST_BYTES).astype(np.int64)
    return -(-whole // np.asarray(page, dtype=np.int64))


def capacity_pages(capacity: ArrayLike, page: ArrayLike) -> Pages:
    """Whole pages in a tier of ``capacity`` [B]: rounded down."""
    return np.minimum(np.floor(np.asarray(capacity, dtype=np.float64)), MOST_BYTES).astype(np.int64) // np.asarray(page, dtype=np.int64)


def fragmentation(nbytes: ArrayLike, page: ArrayLike) -> Array:
    """Bytes of the last page that a tensor of ``nbytes`` leaves unused (internal fragmentation)."""
    return page_count(nbytes, page).astype(np.float64) * np.asarray(page, dtype=np.float64) - np.asarray(nbytes, dtype=np.float64)


def page_walk_time(pages: ArrayLike, walk: ArrayLike, walks: ArrayLike, tlb_entries: int = 0) -> Array:
    """Seconds of TLB misses in one step that touches ``pages`` pages once: misses x ``walk`` [s] / ``walks`` served at once.

    A step sweeps its pages in order, so a TLB with fewer entries than pages misses every one of them (least recently used),
    and a TLB that holds them all misses none. H2M2 (arXiv 2504.14893): 2048 entries, 300 ns a miss.
    """
    pages = np.asarray(pages, dtype=np.float64)
    return np.where(pages > tlb_entries, pages * np.asarray(walk, dtype=np.float64) / np.asarray(walks, dtype=np.float64), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way between two memories: ``bandwidth`` [B/s] of its slowest part, ``latency`` [s] of all its parts."""

    bandwidth: float
    latency: float

    @classmethod
    def between(cls, system: System, source: str, target: str) -> Way:
        """The nearest path of links, at the speed of the slowest of the two tiers and the links; ValueError if there is none."""
        found = system.path(source, (target,))
        if found is None:
            raise ValueError(f"system {system.name!r}: no link leads from {source!r} to {target!r}; add one to migrate between them")
        ends, links = (system.tier(source), system.tier(target)), found[1]
        bandwidth = min(*(tier.bandwidth for tier in ends), *(link.bandwidth * link.efficiency for link in links))
        return cls(bandwidth=bandwidth, latency=sum(tier.latency for tier in ends) + sum(link.latency for link in links))

    def seconds(self, nbytes: ArrayLike) -> Array:
        """Seconds to move ``nbytes``; none take none."""
        return transfer_time(nbytes, self.bandwidth, self.latency)


def migration_time(system: System, moved: dict[tuple[str, str], float], directions: Directions = "one") -> float:
    """Seconds to move ``moved[source, target]`` bytes between tiers, each along its ``Way``; ValueError if two tiers are not connected.

    ``directions`` "one": one move after the other. "both": what goes to earlier tiers and what goes to later ones pass each other, and the
    longer of the two counts (links are full duplex; that the memories read and write at once at full speed is an assumption).
    """
    order = system.tier_names
    up = down = 0.0
    for (source, target), nbytes in moved.items():
        seconds = float(Way.between(system, source, target).seconds(nbytes))
        if directions == "both" and order.index(target) > order.index(source):
            down += seconds
        else:
            up += seconds
    return max(up, down)


def slices_fit(pages: Sequence[Pages], room: Pages) -> bool:
    """Whether tensors can be cut so that all slices find room: ``pages[k]`` [T, N+1] of n slices of tensor k on each memory, ``room`` [T].

    Exact for one and two memories; for more, whether filling one after the other succeeds.
    """
    if len(room) != 2:
        left = [held.shape[1] - 1 for held in pages]
        for t, free in enumerate(room.tolist()):
            for k, held in enumerate(pages):
                most = min(int(np.searchsorted(held[t], free, side="right")) - 1, left[k])
                left[k] -= most
                free -= int(held[t, most])
        return not any(left)
    halves = []
    for part in (pages[: len(pages) // 2], pages[len(pages) // 2 :]):
        sums = np.zeros((2, 1), dtype=np.int64)
        for held in part:
            sums = (sums[:, :, None] + np.stack([held[0], held[1, ::-1]])[:, None, :]).reshape(2, -1)
        halves.append(sums)
    (first, second), (other_first, other_second) = halves
    order = np.argsort(other_first, kind="stable")
    least = np.minimum.accumulate(other_second[order])
    found = np.searchsorted(other_first[order], room[0] - first, side="right") - 1
    return bool(np.any((found >= 0) & (second + least[np.maximum(found, 0)] <= room[1])))
