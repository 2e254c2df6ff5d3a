"""H2M2's runtime as it is described (arXiv 2504.14893): one mapping, and a footprint tracker that evicts slices when data outgrow a memory.

``Greedy`` runs the paper's Algorithm 1 before every iteration from nothing. Here it runs once; then slices leave the first memory in a
fixed order, and only when they must. The order is the paper's; that Algorithm 1 does not run again is a reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.kernel_mapping import KernelMappingPlan
from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.migration import Counts
from ..models.paging import Pages
from ..models.serving import PolicyState
from .kernel_mapping_heuristics import is_sublayer
from .policies import Greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyEviction:
    """H2M2's Algorithm 1 for the first iteration, and then a footprint tracker that evicts: for two memories.

    As long as the plan in force fits, it stays. When keys and values outgrow the first memory, slices leave it, as few as are needed,
    sublayer by sublayer in the reverse of ``order``: fc, qkv, attention. Where that is not enough (the second memory overflows, or is
    outgrown itself, or the plan in force splits layers of a kind differently) Algorithm 1 runs anew.

    "And do not come back" is a reading, for contexts that grow: what the paper does when requests leave and room is free again is not
    said. ``returns``: slices come back as far as there is room in the first memory, in ``order``, up to what Algorithm 1 would put there
    in this iteration.
    """

    order: tuple[str, ...] = ("attention", "qkv", "fc")
    returns: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.order, str) or not all(isinstance(part, str) for part in self.order):
            raise ValueError(f"GreedyEviction: order must be names of sublayers, as ('attention', 'qkv', 'fc'), not {self.order!r}")
        if self.returns not in (True, False):
            raise ValueError(f"GreedyEviction: returns must be True or False, not {self.returns!r}")
        object.__setattr__(self, "order", tuple(self.order))

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """The plan in force, or what is left of it; ValueError unless there are two memories, or where Algorithm 1 finds no plan."""
        window, greedy = state.window, Greedy(order=self.order)
        if len(window.tier_names) != 2:
            names = list(window.tier_names)
            raise ValueError(f"GreedyEviction: slices leave the first of two memories, and there are {len(names)}: {names}; use Greedy")
        before = None if state.previous is None else window.counts(state.previous)
        if before is None:
            return greedy.decide(state)
        tables, row = window.tables, state.row
        first = self._evicted(before[:, 0], tables, row)
        if self.returns:
            wanted = window.counts(greedy.decide(state))
            first = first if wanted is None else self._returned(first, wanted[:, 0], tables, row)
        after = np.stack([first, before.sum(axis=1) - first], axis=1)
        if np.array_equal(after, before) and state.previous is not None and state.fits(state.previous):
            return state.previous
        plan = window.plan(after.tolist())
        return plan if state.fits(plan) else greedy.decide(state)

    def _turns(self, tables: KernelMappingTables) -> list[int]:
        """The kinds by their place in ``order``; others come last."""
        last = len(self.order)
        place = [next((i for i, part in enumerate(self.order) if is_sublayer(kind.name, part)), last) for kind in tables.kinds]
        return sorted(range(len(place)), key=place.__getitem__)

    def _evicted(self, first: Counts, tables: KernelMappingTables, row: int) -> Counts:
        """Slices [K] that stay on the first memory."""
        left = first.copy()
        over = int(_held(first, tables, row).sum() - tables.capacity[row, 0])
        for k in reversed(self._turns(tables)):
            if over <= 0:
                break
            pages = tables.kinds[k].layers * tables.pages[row, k, 0, : left[k] + 1]
            stays = max(int(np.searchsorted(pages, pages[-1] - over, side="right")) - 1, 0)
            over -= int(pages[-1] - pages[stays])
            left[k] = stays
        return left

    def _returned(self, first: Counts, wanted: Counts, tables: KernelMappingTables, row: int) -> Counts:
        """Slices [K] on the first memory once those that are ``wanted`` there have come back, as far as there is room."""
        held = first.copy()
        room = int(tables.capacity[row, 0] - _held(first, tables, row).sum())
        for k in self._turns(tables):
            if wanted[k] > held[k]:
                pages = tables.kinds[k].layers * tables.pages[row, k, 0, held[k] : wanted[k] + 1]
                more = int(np.searchsorted(pages, pages[0] + max(room, 0), side="right")) - 1
                room -= int(pages[more] - pages[0])
                held[k] += more
        return held


def _held(first: Counts, tables: KernelMappingTables, row: int) -> Pages:
    """Pages [K] of ``first`` [K] slices of all layers on the first memory."""
    layers = np.array([kind.layers for kind in tables.kinds])
    pages: Pages = layers * tables.pages[row, np.arange(len(first)), 0, first]
    return pages
