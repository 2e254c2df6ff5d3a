"""The table search in a compiled loop (Numba): the exact optimum of one design after the other. Imported only where it is wanted.

It is the search of ``_table_search``, with its order of additions and its rule for ties, so that both give the same bits:

1. A Lagrangian bound L(w) with one worth w of a page of the tier that binds; every choice n of kind k has a reduced cost r_k(n) >= 0,
   and no plan takes less than L + sum of r_k(n_k) + w (pages left over). This holds for any table.
2. A plan that fits, from one row of the search. Choices with L + r_k(n) above its seconds are in no better plan and in no equal one.
3. For each choice of the other kinds, the widest kind is looked up: capacities leave a range, which moves one way as the slices of the
   kind before it grow, and its fastest place is known from where its seconds rise and fall, or else by a range minimum.

Sums of seconds are compared with a margin of 1e-12, far above their rounding, before they are added exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..models.kernel_mapping_tables import KernelMappingTables
from ..models.paging import Pages
from ..models.roofline import Array
from ._table_search import kinds_of

MARGIN = 1e-12
"""Relative error that is allowed for in bounds: sums of a few dozen terms, each off by 1.1e-16 at most."""

MOST_TANGENTS = 24
"""Tangents of the Lagrangian bound at most; any worth of a page gives a bound, and it seldom takes 10 to the best."""


def _relaxed(seconds: Array, pages: Pages, slices: NDArray[np.int64], capacity: int, found: NDArray[np.int64]) -> float:
    """The worth of a page with (nearly) the largest bound; ``found``: its choice that keeps the capacity. -1: nothing fits."""
    low_s, low_p, high_s, high_p = 0.0, 0, 0.0, 0
    for k in range(len(slices)):
        fast, lean = -1, -1
        for n in range(slices[k] + 1):
            if seconds[k, n] == np.inf:
                continue
            if fast < 0 or seconds[k, n] < seconds[k, fast]:
                fast = n
            if lean < 0 or pages[k, n] < pages[k, lean] or (pages[k, n] == pages[k, lean] and seconds[k, n] < seconds[k, lean]):
                lean = n
        if fast < 0:
            return -1.0
        found[k] = lean
        low_s, low_p = low_s + seconds[k, fast], low_p + pages[k, fast]
        high_s, high_p = high_s + seconds[k, lean], high_p + pages[k, lean]
    if high_p > capacity:
        return -1.0
    trial = np.zeros(len(slices), dtype=np.int64)
    worth = 0.0
    for _ in range(MOST_TANGENTS):
        if low_p <= high_p or high_s <= low_s:
            break
        worth = (high_s - low_s) / (low_p - high_p)
        at_s, at_p = 0.0, 0
        for k in range(len(slices)):
            best, place = np.inf, 0
            for n in range(slices[k] + 1):
                loss = seconds[k, n] + worth * pages[k, n]
                if loss < best:
                    best, place = loss, n
            trial[k] = place
            at_s, at_p = at_s + seconds[k, place], at_p + pages[k, place]
        if at_p in (low_p, high_p) or at_s + worth * (at_p - low_p) >= low_s * (1 - 1e-13):
            if high_p < at_p <= capacity:
                found[:] = trial
            break
        if at_p <= capacity:
            high_s, high_p = at_s, at_p
            found[:] = trial
        else:
            low_s, low_p = at_s, at_p
    return worth


relaxed = njit(cache=True)(_relaxed)


def _fastest(seconds: Array, kind: int, end: int, turn: int, ladder: NDArray[np.int64], least: int, most: int) -> int:
    """The place of the minimum of ``seconds[kind, least..most]``; ``turn``: where its inside is lowest; -1: by the ladder of minima."""
    if turn < 0:
        level = 0
        while 2 << level <= most - least + 1:
            level += 1
        left, right = ladder[level, least], ladder[level, most + 1 - (1 << level)]
        return int(right if seconds[kind, right] < seconds[kind, left] else left)
    first, last = max(least, 1), min(most, end - 1)
    place = -1
    if first <= last:
        place = min(max(turn, first), last)
    if least == 0 and (place < 0 or seconds[kind, 0] <= seconds[kind, place]):
        place = 0
    if most == end and (place < 0 or seconds[kind, end] < seconds[kind, place]):
        place = end
    return place


fastest = njit(cache=True, inline="always")(_fastest)


def _take(
    seconds: Array,
    order: NDArray[np.int64],
    now: NDArray[np.int64],
    last: int,
    least: int,
    falls: bool,
    total: float,
    equal: bool,
    chosen: NDArray[np.int64],
) -> None:
    """Make ``chosen`` the plan ``now`` of ``total`` seconds; where they take ``equal`` seconds, only if that is first in order.

    Kind ``last`` takes the fewest slices from ``least`` on that give the same seconds; ``falls``: its seconds inside the range fall up to
    the place it has.
    """
    found = most = now[last]
    n = most - 1
    while n >= least:
        if seconds[last, n] <= seconds[last, most] + MARGIN * total:
            now[last] = n
            again = 0.0
            for k in range(len(now)):
                again += seconds[k, now[k]]
            if again == total:
                found = n
        elif falls:
            n = min(n, 1)  # seconds only rise from here to the left, but for none on the first tier
        n -= 1
    now[last] = found
    if equal:
        for k in order:
            if now[k] != chosen[k]:
                if now[k] > chosen[k]:
                    return
                break
    chosen[:] = now


take = njit(cache=True)(_take)


def _row(
    seconds: Array,
    held: Pages,
    left: Pages,
    excess: Array,
    slices: NDArray[np.int64],
    order: NDArray[np.int64],
    window: NDArray[np.int64],
    ladder: NDArray[np.int64],
    turn: int,
    inner: int,
    last: int,
    binding: int,
    worth: float,
    bound: float,
    margin: float,
    room: Pages,
    now: NDArray[np.int64],
    best: float,
    chosen: NDArray[np.int64],
) -> float:
    """The better of ``best`` and of all plans in which all kinds but ``inner`` and ``last`` have ``now`` slices."""
    room_0, room_1 = room[0], room[1]
    before, spent = 0.0, 0.0
    for k in range(len(slices)):
        if k != inner and k != last:
            room_0, room_1 = room_0 - held[k, now[k]], room_1 - left[k, now[k]]
            before, spent = before + seconds[k, now[k]], spent + excess[k, now[k]]
    slack = best * (1 + MARGIN) - bound + margin - spent
    if slack < 0:
        return best
    end = slices[last]
    bottom, top = window[last, 0], window[last, 1]
    first, final = window[inner, 0], window[inner, 1]
    if worth > 0 and slack / worth < 1e17:
        unused = int(slack / worth) + 1
        if binding == 0:
            least = room_0 - held[last, top] - unused
            low, high = first, final + 1
            while low < high:
                middle = (low + high) // 2
                if held[inner, middle] < least:
                    low = middle + 1
                else:
                    high = middle
            first = low
        else:
            least = room_1 - left[last, bottom] - unused
            low, high = first, final + 1
            while low < high:
                middle = (low + high) // 2
                if left[inner, middle] >= least:
                    low = middle + 1
                else:
                    high = middle
            final = low - 1
    limit = best * (1 + MARGIN)
    most, least_n = top, top + 1
    for n in range(first, final + 1):
        rest_0, rest_1 = room_0 - held[inner, n], room_1 - left[inner, n]
        while most >= bottom and held[last, most] > rest_0:
            most -= 1
        if most < bottom:
            break
        while least_n > bottom and left[last, least_n - 1] <= rest_1:
            least_n -= 1
        if least_n > most or excess[inner, n] > slack:
            continue
        place = fastest(seconds, last, end, turn, ladder, least_n, most)
        if before + seconds[inner, n] + seconds[last, place] <= limit:
            now[inner], now[last] = n, place
            total = 0.0
            for k in range(len(now)):
                total += seconds[k, now[k]]
            if total <= best and total < np.inf:
                take(seconds, order, now, last, least_n, turn >= 0 and place < end, total, total == best, chosen)
                best, limit = total, total * (1 + MARGIN)
                slack = limit - bound + margin - spent
    return best


row = njit(cache=True)(_row)


def _turn(seconds: Array, end: int) -> int:
    """Where ``seconds[1..end-1]`` is lowest if it falls before and rises after that; else -1."""
    place = min(1, end)
    for n in range(1, end):
        if seconds[n] < seconds[place]:
            place = n
    for n in range(2, end):
        if (n <= place and seconds[n] > seconds[n - 1]) or (n > place and seconds[n] < seconds[n - 1]):
            return -1
    return place


turning = njit(cache=True)(_turn)


def _climb(seconds: Array, end: int, ladder: NDArray[np.int64]) -> None:
    """Fill ``ladder`` [L, N+1] with the places of the minima of 1, 2, 4, ... from each place on."""
    for n in range(end + 1):
        ladder[0, n] = n
    level = 1
    while 1 << level <= end + 1:
        for n in range(end + 2 - (1 << level)):
            a, b = ladder[level - 1, n], ladder[level - 1, n + (1 << (level - 1))]
            ladder[level, n] = b if seconds[b] < seconds[a] else a
        level += 1


climb = njit(cache=True)(_climb)


def _search(
    side: Array,
    shared: Array,
    pages: Pages,
    capacity: Pages,
    slices: NDArray[np.int64],
    layers: NDArray[np.int64],
    t_sync: float,
    order: NDArray[np.int64],
    optimum: Array,
    counts: NDArray[np.int64],
) -> None:
    """Fill ``optimum`` [D] and ``counts`` [D, K] (slices on the first tier) with the best plans of the tables.

    ``side`` [D, K', 2, N+1], ``shared`` [D, K', S, 2, N+1], ``pages`` [1 or D, K', 2, N+1]; ``slices``, ``layers``, ``order`` [K]: there
    may be K - K' kinds of no slice, that take no time.
    """
    kinds, given, width = len(slices), side.shape[1], side.shape[3]
    seconds, excess = np.zeros((kinds, width)), np.zeros((kinds, width))
    held, left = np.zeros((kinds, width), dtype=np.int64), np.zeros((kinds, width), dtype=np.int64)
    now, chosen, start = np.zeros(kinds, dtype=np.int64), np.zeros(kinds, dtype=np.int64), np.zeros(kinds, dtype=np.int64)
    window = np.zeros((kinds, 2), dtype=np.int64)
    levels = 1
    while 1 << levels <= width:
        levels += 1
    ladder = np.zeros((levels, width), dtype=np.int64)
    widest, second = order[kinds - 1], order[kinds - 2]
    for d in range(len(side)):
        if d == 0 or len(pages) > 1:
            for k in range(given):
                for n in range(slices[k] + 1):
                    held[k, n] = layers[k] * pages[d, k, 0, n]
                    left[k, n] = layers[k] * pages[d, k, 1, slices[k] - n]
        room = capacity[d]
        used_0, used_1 = 0, 0
        for k in range(given):
            end, place = slices[k], 0
            for n in range(end + 1):
                slowest = max(side[d, k, 0, n], side[d, k, 1, end - n])
                for lane in range(shared.shape[2]):
                    slowest = max(slowest, shared[d, k, lane, 0, n] + shared[d, k, lane, 1, end - n])
                if 0 < n < end:
                    slowest += t_sync
                seconds[k, n] = layers[k] * slowest
                if seconds[k, n] < seconds[k, place]:
                    place = n
            start[k] = place
            used_0, used_1 = used_0 + held[k, place], used_1 + left[k, place]
        best = np.inf
        optimum[d] = best
        chosen[:] = -1
        binding, worth = 0, 0.0
        if used_0 > room[0]:
            worth = relaxed(seconds, held, slices, room[0], start)
        elif used_1 > room[1]:
            binding = 1
            worth = relaxed(seconds, left, slices, room[1], start)
        if worth < 0:
            counts[d] = -1
            continue
        bound = 0.0
        for k in range(kinds):
            least = np.inf
            for n in range(slices[k] + 1):
                excess[k, n] = seconds[k, n] + worth * (held[k, n] if binding == 0 else left[k, n])
                least = min(least, excess[k, n])
            for n in range(slices[k] + 1):
                excess[k, n] = excess[k, n] - least if excess[k, n] < np.inf else np.inf
            bound += least
            window[k, 0], window[k, 1] = 0, slices[k]
        margin = MARGIN * (bound + worth * room[binding])
        bound -= worth * room[binding]
        now[:] = start
        inner, last = second, widest
        turn = turning(seconds[last], slices[last])
        if turn < 0:
            climb(seconds[last], slices[last], ladder)
        best = row(
            seconds,
            held,
            left,
            excess,
            slices,
            order,
            window,
            ladder,
            turn,
            inner,
            last,
            binding,
            worth,
            bound,
            margin,
            room,
            now,
            best,
            chosen,
        )
        if best < np.inf:
            slack = best * (1 + MARGIN) - bound + margin
            for k in range(kinds):
                while window[k, 0] < window[k, 1] and excess[k, window[k, 0]] > slack:
                    window[k, 0] += 1
                while window[k, 1] > window[k, 0] and excess[k, window[k, 1]] > slack:
                    window[k, 1] -= 1
            for k in range(kinds):
                if window[k, 1] - window[k, 0] > window[last, 1] - window[last, 0]:
                    last = k
            if last != widest:
                turn = turning(seconds[last], slices[last])
                if turn < 0:
                    climb(seconds[last], slices[last], ladder)
            inner = 0 if last != 0 else 1
            for k in range(kinds):
                if k != last and window[k, 1] - window[k, 0] > window[inner, 1] - window[inner, 0]:
                    inner = k
        for k in range(kinds):
            now[k] = window[k, 0]
        while True:
            before = best
            best = row(
                seconds,
                held,
                left,
                excess,
                slices,
                order,
                window,
                ladder,
                turn,
                inner,
                last,
                binding,
                worth,
                bound,
                margin,
                room,
                now,
                best,
                chosen,
            )
            if best < before:
                slack = best * (1 + MARGIN) - bound + margin
                for k in (inner, last):
                    while window[k, 0] < window[k, 1] and excess[k, window[k, 0]] > slack:
                        window[k, 0] += 1
                    while window[k, 1] > window[k, 0] and excess[k, window[k, 1]] > slack:
                        window[k, 1] -= 1
            k = kinds - 1
            while k >= 0:
                if k != inner and k != last:
                    if now[k] < window[k, 1]:
                        now[k] += 1
                        break
                    now[k] = window[k, 0]
                k -= 1
            if k < 0:
                break
        optimum[d] = best
        for k in range(kinds):
            counts[d, k] = chosen[k]


search = njit(cache=True)(_search)


def search_tables(tables: KernelMappingTables, last: int) -> tuple[Array, NDArray[np.int64]]:
    """Optima [D] and slices on the first tier [D, K] of all designs (inf and -1: nothing fits); the kind ``last`` is last in order."""
    slices, layers, order = kinds_of(tables, last)
    optimum, counts = np.empty(len(tables.capacity)), np.empty((len(tables.capacity), len(slices)), dtype=np.int64)
    pages = tables.pages[:1] if tables.same_pages else tables.pages
    side, shared, pages, capacity = (_plain(array) for array in (tables.seconds, tables.shared, pages, tables.capacity))
    search(side, shared, pages, capacity, slices, layers, float(tables.t_sync), order, optimum, counts)
    return optimum, counts[:, : len(tables.kinds)]


def _plain(array: Any) -> Any:
    """``array`` in one block of memory and read only: then one compiled form takes all tables."""
    plain = np.ascontiguousarray(array).view()
    plain.setflags(write=False)
    return plain
