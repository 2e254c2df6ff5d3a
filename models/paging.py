"""Pages: counts, fragmentation, page walks and migration. Pages are numbers here, never objects (GPT3-175B has 120,000 of 2 MiB)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hardware import System
from .roofline import Array, transfer_time

Pages = NDArray[np.int64]

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


def migration_time(system: System, moved: dict[tuple[str, str], float]) -> float:
    """Seconds to move ``moved[source, target]`` bytes between tiers, one move after the other.

    Each takes the nearest path of links and runs at the slowest of the two tiers and the links. ValueError if two tiers are not
    connected.
    """
    seconds = 0.0
    for (source, target), nbytes in moved.items():
        found = system.path(source, (target,))
        if found is None:
            raise ValueError(f"system {system.name!r}: no link leads from {source!r} to {target!r}; add one to migrate between them")
        links = found[1]
        ends = (system.tier(source), system.tier(target))
        bandwidth = min(*(tier.bandwidth for tier in ends), *(link.bandwidth * link.efficiency for link in links))
        latency = sum(tier.latency for tier in ends) + sum(link.latency for link in links)
        seconds += float(transfer_time(nbytes, bandwidth, latency))
    return seconds
