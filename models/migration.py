"""What moves when a plan follows another: slices that have one place, or whose copies stay in both memories while there is room.

Weights are only read, so a copy of them that is left behind stays true; keys and values are written in every iteration, so theirs does not.
H2M2 (arXiv 2504.14893) allows a page to be present on both sides of its page table and frees pages when they are needed. Here these are
counts: of a kind of sublayer with N slices a layer, the first memory holds the slices 0 .. F-1 and the second the last S, F + S >= N.
A plan with n slices on the first uses n <= F and N - n <= S of them; what both hold are duplicates, which cost room and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .hardware import System
from .kernel_mapping import KernelMappingPlan, TransitionCost, moves
from .kernel_mapping_tables import KernelMappingTables
from .paging import Directions, Pages, migration_time

Duplicates = Literal["none", "kept", "loaded"]
"""Whether copies of weights are dropped at once, kept while there is room, or moreover loaded into the second memory at the start."""

Counts = NDArray[np.int64]


def counts_of(plan: KernelMappingPlan, tables: KernelMappingTables) -> Counts | None:
    """Slices [K, T] of a plan that splits all layers of a kind alike and is one of these tables; None for others."""
    alike = len(plan.splits) == len(tables.kinds) and all(
        len(splits) == 1
        and splits[0].layers == kind.layers
        and len(splits[0].counts) == len(tables.tier_names)
        and sum(splits[0].counts) == kind.slices
        for kind, splits in zip(tables.kinds, plan.splits, strict=True)
    )
    return np.array([splits[0].counts for splits in plan.splits], dtype=np.int64) if alike else None


def transition_between(
    before: Counts, after: Counts, tables: KernelMappingTables, row: int, *, system: System, directions: Directions = "one"
) -> TransitionCost:
    """Bytes that change tier from ``before`` to ``after`` [K, T] slices in design ``row``, as ``KernelMappingProblem.transition``."""
    names, moved = tables.tier_names, dict[tuple[str, str], float]()
    kinds, tiers, pages = np.arange(len(before))[:, None], np.arange(len(names)), tables.pages[row]
    change = (pages[kinds, tiers, after] - pages[kinds, tiers, before]) * tables.page[row]
    for kind, layer, slices in zip(tables.kinds, change.tolist(), (after - before).tolist(), strict=True):
        for source, target, nbytes in moves(layer, slices):
            way = (names[source], names[target])
            moved[way] = moved.get(way, 0.0) + nbytes * kind.layers
    return TransitionCost(moved=moved, latency=migration_time(system, moved, directions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """How many ``first`` and last (``second``) slices a layer of each kind of sublayer lie in each of two memories.

    ``read_only``: kinds of weights. Other kinds have no duplicates. The free-space rule: what a plan uses is never dropped, and a duplicate
    is dropped only where what is used needs its room, from the last kind to the first, of each as few of the slices furthest from those in
    use as are needed. Dropping takes no time.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    read_only: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.first) == len(self.second) == len(self.read_only):
            sizes = f"{len(self.first)}, {len(self.second)} and {len(self.read_only)}"
            raise ValueError(f"a residency needs one number a kind on each memory, and whether it is read only, not {sizes} of them")
        if min((*self.first, *self.second), default=0) < 0:
            raise ValueError(f"a residency needs slices of at least 0, not {self.first} and {self.second}")

    @classmethod
    def start(
        cls, used: Counts, tables: KernelMappingTables, row: int, *, read_only: tuple[bool, ...], duplicates: Duplicates = "kept"
    ) -> Residency:
        """Everything where a plan with ``used`` [K, 2] slices wants it; "loaded": moreover the weights in the second memory, as far as
        there is room."""
        if len(tables.tier_names) != 2:
            raise ValueError(f"duplicates are kept in two memories, and there are {len(tables.tier_names)}; use duplicates='none'")
        held = used.copy()
        if duplicates == "loaded":
            held[:, 1] = np.where(read_only, [kind.slices for kind in tables.kinds], held[:, 1])
        return cls._of(_freed(held, used, tables, row), read_only)

    @property
    def counts(self) -> Counts:
        """Slices [K, 2] on each memory."""
        return np.array([self.first, self.second], dtype=np.int64).T

    def moved_to(
        self,
        used: Counts,
        tables: KernelMappingTables,
        row: int,
        *,
        system: System,
        directions: Directions = "one",
        stayed: float = 1.0,
    ) -> tuple[Residency, TransitionCost]:
        """Where all is once a plan with ``used`` [K, 2] slices is in force in design ``row``, and what that moves.

        Only what a memory lacks is copied there: bytes(used) - bytes(resident), in whole pages. ``stayed``: share of the tokens of this
        iteration that ran before; the keys and values of others are written where the plan wants them, and are not moved.
        """
        weights, present = np.array(self.read_only), self.counts
        held = np.where(weights[:, None], np.maximum(present, used), used)
        lacking = _bytes(tables, row, np.maximum(present, used)) - _bytes(tables, row, present)
        growth = np.where(weights[:, None], lacking, lacking * stayed).sum(axis=0).tolist()
        first, second = tables.tier_names
        ways = (((second, first), growth[0]), ((first, second), growth[1]))
        moved = {way: nbytes for way, nbytes in ways if nbytes}
        cost = TransitionCost(moved=moved, latency=migration_time(system, moved, directions) if moved else 0.0)
        return self._of(_freed(held, used, tables, row), self.read_only), cost

    def duplicates(self, used: Counts, tables: KernelMappingTables, row: int) -> tuple[int, int]:
        """Bytes on each memory that a plan with ``used`` [K, 2] slices does not use."""
        first, second = (_bytes(tables, row, self.counts) - _bytes(tables, row, used)).sum(axis=0).tolist()
        return first, second

    def check(self, used: Counts, tables: KernelMappingTables, row: int) -> None:
        """AssertionError, which is a defect of memsplit, where a slice is lost, a page is used that is not there, or a memory overflows."""
        present, slices = self.counts, np.array([kind.slices for kind in tables.kinds])
        held = _bytes(tables, row, np.minimum(present, slices[:, None])).sum(axis=0)
        wrong = [
            what
            for what, holds in (
                ("a slice is in neither memory", bool((present.sum(axis=1) >= slices).all())),
                ("a memory holds more slices than there are", bool((present <= slices[:, None]).all())),
                ("a plan uses slices that are not there", bool((used <= present).all())),
                ("keys and values have a second copy", bool((present.sum(axis=1) == slices)[~np.array(self.read_only)].all())),
                ("a memory holds more than its capacity", bool((held <= tables.capacity[row] * tables.page[row]).all())),
            )
            if not holds
        ]
        if wrong:
            raise AssertionError(f"residency: {wrong[0]}; this is a defect of memsplit, please report it")

    @classmethod
    def _of(cls, counts: Counts, read_only: tuple[bool, ...]) -> Residency:
        first, second = counts.T.tolist()
        return cls(first=tuple(first), second=tuple(second), read_only=read_only)


def _bytes(tables: KernelMappingTables, row: int, counts: Counts) -> Pages:
    """Bytes [K, 2] of ``counts`` [K, 2] slices in all layers, in whole pages."""
    layers = np.array([[kind.layers] for kind in tables.kinds])
    pages: Pages = tables.pages[row][np.arange(len(counts))[:, None], np.arange(2), counts]
    nbytes: Pages = pages * layers * tables.page[row]
    return nbytes


def _freed(held: Counts, used: Counts, tables: KernelMappingTables, row: int) -> Counts:
    """``held`` [K, 2] slices without the duplicates for which there is no room beside what is used."""
    nbytes = _bytes(tables, row, held)
    over = (nbytes.sum(axis=0) - tables.capacity[row] * tables.page[row]).tolist()
    kept = held.copy()
    for t, excess in enumerate(over):
        for k in range(len(held) - 1, -1, -1):
            least, most = int(used[k, t]), int(held[k, t])
            if excess <= 0 or least == most:
                continue
            sizes = tables.pages[row, k, t, least : most + 1] * (tables.kinds[k].layers * int(tables.page[row, t]))
            # The most slices that leave the room that is wanted; fewer than those in use are never left.
            kept[k, t] = least + max(int(np.searchsorted(sizes, sizes[-1] - excess, side="right")) - 1, 0)
            excess -= int(sizes[-1] - sizes[kept[k, t] - least])
    return kept
