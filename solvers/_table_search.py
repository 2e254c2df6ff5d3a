"""The table search in NumPy: exact optima of many designs at once, for any table of seconds and any pages that grow with slices.

With n_k slices of kind k on the first tier, two capacities, and seconds s_k(n), a plan that takes fewer seconds than a known one (U)

1. keeps L + sum over some kinds of r_k(n_k) <= U: a Lagrangian bound L with one worth w of a page of the tier that binds, and
   reduced costs r_k(n) = s_k(n) + w pages_k(n) - the least of these;
2. keeps s_1(n_1) + ... + phi(room left by these kinds) <= U: phi(room) is the least of the last kind's seconds whose pages fit, read
   from a table of cells of room; a cell counts as its upper end, so that phi is never too large.

Both hold for any table. The few choices of all kinds but the last that keep both are priced in exact whole pages: the capacities
leave a range of slices of the last kind, and its fastest split in that range is a range minimum. Sums of seconds are compared with
bounds with a margin of 1e-12, far above their rounding, and are themselves added in the order of kinds.

Of plans that take equally long the first one counts: fewest slices on the first tier of the first kind in ``order``, then of the next.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.paging import Pages
from ..models.roofline import Array

Index = NDArray[np.int64]

MARGIN = 1e-12
"""Relative error that is allowed for in bounds: sums of a few dozen terms, each off by 1.1e-16 at most."""

CELLS = 1024
"""Cells of room of a design: some 10 a slice, so that one choice in 10 of those that might be better is looked at in vain."""

LIKELY = 8
"""Choices of a row that are priced first: the best of them is the plan that rules out most others."""

MOST_TANGENTS = 24
"""Tangents of the Lagrangian bound at most; any worth of a page gives a bound, and it seldom takes 10 to the best."""

NEAR = 1e-6
"""Share of the seconds by which the last tangent may miss the best bound: less than what whole slices leave open."""

DESIGNS = 64
ROWS = 512
PRICED = 1 << 18
"""Designs, rows and choices that are looked at together: temporaries that stay in the cache, and a bound on memory."""

WORTH_LOADING = 8192
"""Designs in a batch from which on Numba is loaded (half a second; some seconds where nothing is compiled and kept yet)."""


def uses_compiled(wanted: bool | None, designs: int) -> bool:
    """Whether a batch of ``designs`` goes to the compiled loop (``TableMapping.compiled``); ValueError where that cannot be."""
    if wanted is False:
        return False
    if f"{__package__}._table_compiled" in sys.modules:
        return True
    if wanted is None and designs < WORTH_LOADING:
        return False
    installed = find_spec("numba") is not None
    if wanted and not installed:
        raise ValueError("TableMapping(compiled=True) needs Numba, which is not installed: pip install 'memsplit[fast]', or leave it out")
    return installed


def kinds_of(tables: KernelMappingTables, last: int) -> tuple[Index, Index, Index]:
    """``slices``, ``layers`` and ``order`` [K] of the kinds, ``last`` looked up; beside a single kind stands one that has no slices."""
    alone = len(tables.kinds) == 1
    slices = [kind.slices for kind in tables.kinds] + [0] * alone
    layers = [kind.layers for kind in tables.kinds] + [1] * alone
    order = [k for k in range(len(slices)) if k != last] + [last]
    return np.array(slices, dtype=np.int64), np.array(layers, dtype=np.int64), np.array(order, dtype=np.int64)


def search_tables(tables: KernelMappingTables, last: int) -> tuple[Array, Index]:
    """``search`` of all designs of ``tables``; the kind ``last`` is looked up."""
    slices, layers, order = kinds_of(tables, last)
    given, designs = len(tables.kinds), len(tables.capacity)
    optimum, counts = np.full(designs, np.inf), np.full((designs, given), -1, dtype=np.int64)
    for first in range(0, designs, DESIGNS):
        some = slice(first, first + DESIGNS)
        seconds, pages = tables.two_way(some)
        seconds *= layers[:given, None]
        held = layers[:given, None, None] * (pages[:1] if tables.same_pages else pages)
        if given < len(slices):
            nothing = np.where(np.arange(seconds.shape[2]) > 0, np.inf, np.zeros((len(seconds), 1, 1)))
            seconds, held = np.concatenate([seconds, nothing], axis=1), np.concatenate([held, np.zeros_like(held)], axis=1)
        held = np.broadcast_to(held, (len(seconds), *held.shape[1:]))
        optimum[some], found = search(seconds, held, tables.capacity[some], slices, order)
        counts[some] = found[:, :given]
    return optimum, counts


def search(seconds: Array, pages: Pages, capacity: Pages, slices: Index, order: Index) -> tuple[Array, Index]:
    """Optima [D] and slices on the first tier [D, K] (inf and -1: nothing fits).

    ``seconds`` [D, K, N+1] of all layers of a kind, inf beyond its slices; ``pages`` [D, K, N+1, 2] on both tiers; ``capacity`` [D, 2].
    K is at least 2; the last kind of ``order`` is the one that is looked up.
    """
    optimum, counts = np.full(len(seconds), np.inf), np.full((len(seconds), len(slices)), -1, dtype=np.int64)
    choices = [int(slices[k]) + 1 for k in order[:-2]]
    prefix = np.indices(choices).reshape(len(choices), -1) if choices else np.zeros((0, 1), dtype=np.int64)
    step = max(1, min(DESIGNS, (1 << 17) // prefix.shape[1]))
    for first in range(0, len(seconds), step):
        some = np.s_[first : first + step]
        optimum[some], counts[some] = _Block(seconds[some], pages[some], capacity[some], slices, order, prefix).solve()
    return optimum, counts


@dataclass(frozen=True, slots=True)
class _Block:
    """Designs that are solved together; arrays as in ``search``, ``prefix`` [K-2, P]: slices of all kinds but two."""

    seconds: Array
    pages: Pages
    capacity: Pages
    slices: Index
    order: Index
    prefix: Index

    def solve(self) -> tuple[Array, Index]:
        designs, last, inner = np.arange(len(self.seconds)), int(self.order[-1]), int(self.order[-2])
        kinds = np.arange(len(self.slices))
        fastest = self.seconds.argmin(axis=2)
        used = self.pages[designs[:, None], kinds, fastest].sum(axis=1)
        binding = np.where(used[:, 0] > self.capacity[:, 0], 0, 1)
        held = np.where(binding[:, None, None] == 0, self.pages[..., 0], self.pages[..., 1]).astype(np.float64)
        room = self.capacity[designs, binding].astype(np.float64)
        free = np.all(used <= self.capacity, axis=1)
        worth, start = relaxed(self.seconds, held, room, fastest, ~free)
        excess = self.seconds + worth[:, None, None] * held
        least = excess.min(axis=2)
        least[least == np.inf] = 0.0  # a kind without any split: no plan, whatever the bound
        excess -= least[:, :, None]
        ends = np.array([held[:, k, : n + 1].max(axis=1) for k, n in enumerate(self.slices)])
        room = np.minimum(room, ends.sum(axis=0))
        paid = worth * room
        bound, margin = _added(least.T) - paid, MARGIN * (_added(least.T) + paid)

        # phi, and where the room that a choice leaves lies in it: cell 0 (no room), 1, ..., CELLS + 1
        low = held[:, last, : self.slices[last] + 1].min(axis=1)
        scale = CELLS / np.maximum(ends[last] - low, 1.0)
        slips = 3e-14 * ends.sum(axis=0) * scale  # more than the rounding of the sums of pages as floats
        cells = np.full((len(designs), CELLS + 2), np.inf)
        table, width = held[:, last, : self.slices[last] + 1], self.slices[last] + 1
        np.minimum.at(
            cells, (designs[:, None], ((table - low[:, None]) * scale[:, None]).astype(np.int64) + 1), self.seconds[:, last, :width]
        )
        np.minimum.accumulate(cells, axis=1, out=cells)
        width = self.slices[inner] + 1
        inner_room, inner_seconds = held[:, inner, :width] * scale[:, None], np.ascontiguousarray(self.seconds[:, inner, :width])
        held_before, before, spent = self._prefixes(held), self._prefixes(self.seconds), self._prefixes(excess)
        left = (room[:, None] - held_before - low[:, None]) * scale[:, None] + (slips[:, None] + 1)
        base = designs * (CELLS + 2)

        def optimistic(design: Index, row: Index) -> Array:
            """Seconds [R, N+1] that no plan with prefix ``row`` [R] of ``design`` [R] is below."""
            cell = left[design, row][:, None] - inner_room[design]
            np.clip(cell, 0, CELLS + 1, out=cell)
            at = cell.astype(np.int64)
            at += base[design][:, None]
            found = cells.ravel().take(at)
            found += inner_seconds[design]
            found += before[design, row][:, None]
            return found

        likely_row = np.zeros(len(designs), dtype=np.int64)
        for k in self.order[:-2]:
            likely_row = likely_row * (self.slices[k] + 1) + start[:, k]
        seen = optimistic(designs, likely_row)
        likely = np.argpartition(seen, min(LIKELY, seen.shape[1]) - 1, axis=1)[:, :LIKELY]
        ladder = _ladder(self.seconds[:, last, : self.slices[last] + 1])
        wide = likely.shape[1]
        known = self._priced(ladder, designs.repeat(wide), likely_row.repeat(wide), likely.ravel())[0].reshape(-1, wide).min(axis=1)
        limit = known * (1 + MARGIN)
        design, row = np.nonzero((bound - margin)[:, None] + spent <= limit[:, None])
        kept = []
        for first in range(0, len(design), ROWS):
            some = np.s_[first : first + ROWS]
            seen = optimistic(design[some], row[some])
            which, n = np.nonzero((seen <= limit[design[some], None]) & (seen < np.inf))
            kept.append((design[some][which], row[some][which], n))
        design, row, n = (np.concatenate(parts) for parts in zip(*kept, strict=True)) if kept else (np.zeros(0, dtype=np.int64),) * 3
        return self._first_best(ladder, design, row, n)

    def _first_best(self, ladder: Index, design: Index, row: Index, n: Index) -> tuple[Array, Index]:
        """The first of the fastest plans among choices that are in order; all choices that can be fastest must be there."""
        best, counts = np.full(len(self.seconds), np.inf), np.full((len(self.seconds), len(self.slices)), -1, dtype=np.int64)
        last = int(self.order[-1])
        pieces = [self._priced(ladder, design[i : i + PRICED], row[i : i + PRICED], n[i : i + PRICED]) for i in range(0, len(n), PRICED)]
        if not pieces:
            return best, counts
        total, place, least = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        np.minimum.at(best, design, total)
        first = np.flatnonzero((total == best[design]) & (total < np.inf))
        top = first[np.diff(design[first], prepend=-1) > 0]
        found = design[top]
        for position, k in enumerate(self.order[:-2]):
            counts[found, k] = self.prefix[position, row[top]]
        counts[found, self.order[-2]] = n[top]
        fewer = np.arange(self.slices[last] + 1)
        sums = np.zeros((len(found), len(fewer)))
        for k in range(len(self.slices)):
            sums += self.seconds[found, k][:, fewer] if k == last else self.seconds[found, k, counts[found, k]][:, None]
        equal = (sums == best[found, None]) & (fewer >= least[top, None]) & (fewer <= place[top, None])
        counts[found, last] = equal.argmax(axis=1)
        return best, counts

    def _prefixes(self, values: Array) -> Array:
        """Sums [D, P] of ``values`` [D, K, N+1] over the kinds of the prefix."""
        total = np.zeros((len(values), 1))
        for k in self.order[:-2]:
            total = (total[:, :, None] + values[:, k, None, : self.slices[k] + 1]).reshape(len(values), -1)
        return total

    def _priced(self, ladder: Index, design: Index, row: Index, n: Index) -> tuple[Array, Index, Index]:
        """Seconds (inf: none fits), slices of the last kind, and the fewest that fit, for each choice of the other kinds."""
        last, end = int(self.order[-1]), int(self.slices[self.order[-1]])
        now = {int(k): self.prefix[position, row] for position, k in enumerate(self.order[:-2])} | {int(self.order[-2]): n}
        room = self.capacity[design]
        for k, count in now.items():
            room = room - self.pages[design, k, count]
        pages = self.pages[:, last, : end + 1]
        most = np.minimum(_count_at_most(pages[:, :, 0], design, room[:, 0]) - 1, end)
        least = np.maximum(end + 1 - _count_at_most(pages[:, ::-1, 1], design, room[:, 1]), 0)
        place = _fastest_in_range(ladder, self.seconds[:, last], design, least, most)
        total = np.zeros(len(design))
        for k in range(len(self.slices)):
            total += self.seconds[design, k, np.maximum(place, 0) if k == last else now[k]]
        return np.where(place >= 0, total, np.inf), place, least


def relaxed(seconds: Array, pages: Array, capacity: Array, fastest: Index, binds: NDArray[np.bool_]) -> tuple[Array, Index]:
    """The worth [D] of a page with (nearly) the largest Lagrangian bound, 0 where nothing ``binds``, and its choice [D, K] that keeps the
    capacity.

        L(w) = sum_k min_n (seconds_k(n) + w pages_k(n)) - w capacity

    is concave and every w gives a tangent: the next w is where the tangents of one that holds too many pages and of one that holds
    too few cross. ``seconds`` and ``pages`` [D, K, N+1], ``capacity`` [D], ``fastest`` [D, K].
    """
    worth, start, kinds = np.zeros(len(seconds)), fastest.copy(), np.arange(seconds.shape[1])
    active = np.flatnonzero(binds)
    if not len(active):
        return worth, start
    times, held, room = (seconds, pages, capacity) if len(active) == len(seconds) else (seconds[active], pages[active], capacity[active])
    lean = np.where(held == np.where(times < np.inf, held, np.inf).min(axis=2, keepdims=True), times, np.inf).argmin(axis=2)
    start[active] = lean

    def sums(choice: Index) -> tuple[Array, Array]:
        at = (np.arange(len(choice))[:, None], kinds, choice)
        return times[at].sum(axis=1), held[at].sum(axis=1)

    (low_s, low_p), (high_s, high_p) = sums(fastest[active]), sums(lean)
    high_p[high_s == np.inf] = np.inf  # a kind without any split
    for _ in range(MOST_TANGENTS):
        on = (low_p > high_p) & (high_s > low_s) & (high_p <= room)
        if not on.all():
            active, times, held, room = active[on], times[on], held[on], room[on]
            low_s, low_p, high_s, high_p = low_s[on], low_p[on], high_s[on], high_p[on]
            if not len(active):
                break
        tangent = (high_s - low_s) / (low_p - high_p)
        worth[active] = tangent
        choice = (times + tangent[:, None, None] * held).argmin(axis=2)
        now_s, now_p = sums(choice)
        fits = now_p <= room
        closer = fits & (now_p > high_p)
        start[active[closer]] = choice[closer]
        done = (now_p == low_p) | (now_p == high_p) | (now_s + tangent * (now_p - low_p) >= low_s * (1 - NEAR))
        high_s, high_p = np.where(fits, now_s, high_s), np.where(fits, now_p, high_p)
        low_s, low_p = np.where(fits, low_s, now_s), np.where(done, -np.inf, np.where(fits, low_p, now_p))
    return worth, start


def _added(terms: Array) -> Array:
    """Sum over the first axis in its order: a batch then equals its singles bit for bit."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _count_at_most(ascending: Pages, design: Index, limit: Pages) -> Index:
    """How many of ``ascending[design]`` are at most ``limit``: one bisection in all rows, each moved above the one before."""
    width = ascending.shape[1]
    apart = int(ascending.max()) + 2
    rows = ascending + apart * np.arange(len(ascending))[:, None]
    return np.searchsorted(rows.ravel(), np.minimum(np.maximum(limit, -1), apart - 2) + apart * design, side="right") - width * design


def _ladder(values: Array) -> Index:
    """Positions [L, D, N+1] of the first minima of runs of 1, 2, 4, ... from each place on: a range minimum is the better of two."""
    width = values.shape[1]
    steps = [np.broadcast_to(np.arange(width), values.shape)]
    while 2 ** len(steps) <= width:
        left, ahead = steps[-1], 2 ** (len(steps) - 1)
        step, least = left.copy(), values
        better = least[:, ahead:] < least[:, :-ahead]
        np.copyto(step[:, :-ahead], left[:, ahead:], where=better)
        values = least.copy()
        np.copyto(values[:, :-ahead], least[:, ahead:], where=better)
        steps.append(step)
    return np.stack(steps)


def _fastest_in_range(ladder: Index, values: Array, design: Index, least: Index, most: Index) -> Index:
    """Position of the first minimum of ``values[design, least..most]``; -1 where the range is empty."""
    some = most >= least
    level = np.frexp(np.where(some, most - least + 1, 1))[1] - 1
    left = ladder[level, design, np.where(some, least, 0)]
    right = ladder[level, design, np.where(some, most + 1 - (1 << level), 0)]
    return np.where(some, np.where(values[design, right] < values[design, left], right, left), -1)
