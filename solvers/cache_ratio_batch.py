"""The cache ratio of many designs at once, with a proven bound: what ``LpRatio`` does to one problem, as arrays.

Let m = act_gpu + act_host of n blocks, K and A the bytes of a KV and an ACT block, G and H the room of GPU and host. Everything that is
not on the GPU is on the host, so the host holds at least

    B(m) = max(K n - (K - A) m - G, 0) bytes,     and at most H

Loading and storing a block takes time in proportion to its bytes, so no plan with m ACT blocks is faster than

    T(m) = sum over classes of layers  N max(t_w + load B(m),  t_c + t_gen m,  store B(m))     load, store: s/B, the smaller of both forms

T is convex and piecewise linear: its lowest whole m is next to a crossing of two lines. That is the bound, at least that of the linear
relaxation, as m is whole. A plan of whole blocks may leave some bytes of the GPU empty, which is all that it loses: so the ACT counts on
the GPU looked at are those near both ends of the range in which it can be full, each with its best count on the host, again next to
a crossing. What one more ACT block on the GPU leaves empty repeats with the period K / gcd(K, A), so a whole period of counts is looked
at from each end, ``MOST_ENDS`` of them at most. Within that reach no plan was found to be better (tested against enumeration); with a
longer period the plan is certified within ``gap`` of the optimum, no more. Where load times are not in proportion to bytes the bound
holds, too, but may be low. Derived here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.offload_batch import CacheRatioBatch
from ..models.overlap import lowest
from ..models.roofline import Array

AT_ONCE = 1024
"""Designs in one array: 18 ACT counts on the GPU with 5 candidates on the host each are 0.7 MB."""

MOST_CLASSES = 3
"""Classes of layers at most: the sum of their maxima is the maximum of 4^C lines."""

ENDS, MOST_ENDS = 7, 64
"""ACT counts on the GPU looked at from each end of the range in which it can be full: the period in which the bytes left empty repeat,
within these limits. FP16 keys, values and activations have a period of 2; a period of 64 takes seven times as long."""

ROUNDING = 4e-12
"""By how much of itself the bound is lowered: more than the rounding of the sums behind it, and of the place where they are lowest."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RatioSolutions:
    """Plans of D designs: whole counts of blocks, ``latency`` [s] as ``CacheRatioProblem.evaluate`` says, and ``bound`` [s], proven.

    Where nothing fits, the counts are those that take least memory, latency and bound inf; ``fits_gpu``, ``fits_host``: whether each
    memory holds what must be beside the blocks; ``feasible``: whether the blocks fit as well.
    """

    kv_gpu: Counts
    act_gpu: Counts
    kv_host: Counts
    act_host: Counts
    latency: Array
    bound: Array
    fits_gpu: NDArray[np.bool_]
    fits_host: NDArray[np.bool_]
    feasible: NDArray[np.bool_]

    @property
    def gap(self) -> Array:
        """(latency - bound) / latency, at least 0; NaN where nothing fits."""
        with np.errstate(invalid="ignore", divide="ignore"):
            gap = np.where(self.latency > 0, np.maximum((self.latency - self.bound) / self.latency, 0.0), 0.0)
        return np.where(self.feasible, gap, np.nan)


def solve_ratios(batch: CacheRatioBatch) -> RatioSolutions:
    """The best plan found for each design, and the bound of the module's docstring; ValueError for more than three classes of layers."""
    if len(batch.layers) > MOST_CLASSES:
        raise ValueError(f"a batch of cache ratios takes {MOST_CLASSES} classes of layers, not {len(batch.layers)}; use LpRatio on each")
    reach = np.max(_reach(batch), initial=ENDS)
    at_once = max(int(AT_ONCE * ENDS // reach), 1)  # arrays of the same size
    pieces = [_solved(batch.some(slice(start, start + at_once))) for start in range(0, len(batch), at_once)] or [_solved(batch)]
    return RatioSolutions(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in RatioSolutions.__slots__})


def _reach(batch: CacheRatioBatch) -> Counts:
    """ACT counts looked at from each end, [D] or one for all."""
    kv = np.asarray(batch.kv_block, dtype=np.int64)
    return np.asarray(np.clip(kv // np.gcd(kv, batch.act_block), ENDS, MOST_ENDS))


def _solved(batch: CacheRatioBatch) -> RatioSolutions:
    number, feasible = len(batch), batch.possible
    fits_gpu, fits_host = (np.broadcast_to(np.asarray(room) >= 0, number) for room in (batch.gpu_room, batch.host_room))
    # Designs in which nothing fits are solved as if they had no block, and marked at the end.
    n = np.where(feasible, batch.blocks, 0)
    unit = np.gcd(np.asarray(batch.kv_block, dtype=np.int64), batch.act_block)
    room_gpu, room_host = (np.maximum(room, 0) // unit for room in (batch.gpu_room, batch.host_room))
    kv, act = batch.kv_block // unit, batch.act_block // unit
    acts, bound = _relaxed(batch, n, kv, act, room_gpu, room_host)
    near, far = _rounded(batch, n, kv, act, room_gpu, room_host, acts)
    kv_gpu = np.minimum((room_gpu - near * act) // kv, n - near - far)
    kv_host = n - near - far - kv_gpu
    latency = batch.seconds(near, kv_host, far)
    # Where nothing fits: all blocks in the smaller form, as many as fit on the GPU.
    least = np.minimum(batch.blocks, room_gpu // np.minimum(kv, act))
    rest = batch.blocks - least
    return RatioSolutions(
        kv_gpu=np.where(feasible, kv_gpu, np.where(kv <= act, least, 0)),
        act_gpu=np.where(feasible, near, np.where(kv <= act, 0, least)),
        kv_host=np.where(feasible, kv_host, np.where(kv <= act, rest, 0)),
        act_host=np.where(feasible, far, np.where(kv <= act, 0, rest)),
        latency=np.where(feasible, latency, np.inf),
        bound=np.where(feasible, bound, np.inf),
        fits_gpu=fits_gpu,
        fits_host=fits_host,
        feasible=feasible,
    )


def _relaxed(batch: CacheRatioBatch, n: Any, kv: Any, act: Any, room_gpu: Any, room_host: Any) -> tuple[Counts, Array]:
    """The whole m at which T(m) is lowest, and T there, rounded down; bytes in units in which both blocks are whole."""
    saved, over = kv - act, kv * n - room_gpu
    step = np.maximum(np.abs(saved), 1)
    first = np.where(saved > 0, np.clip(-((room_host - over) // step), 0, n), 0)
    last = np.where(saved < 0, np.clip((room_host - over) // step, 0, n), n)
    rates = []
    parts = []
    for layer in batch.layers:
        load = np.minimum(layer.load_kv.slope / kv, layer.load_act.slope / act)
        store = np.minimum(layer.store_kv / kv, layer.store_act / act)
        rates.append((load, store))
        held, slope = 1.0 * (over - saved * first), -1.0 * saved
        parts.append(
            [
                (layer.layers * (layer.weights + load * held), layer.layers * (load * slope)),
                (layer.layers * layer.weights, 0.0),
                (layer.layers * (layer.compute + layer.generate.slope * first), layer.layers * layer.generate.slope),
                (layer.layers * (store * held), layer.layers * (store * slope)),
            ]
        )
    centre = first + np.floor(lowest(*_sums(parts, np.shape(n)), last - first)).astype(np.int64)
    near = np.clip(centre + np.arange(-1, 3)[:, None], first, last)
    held = np.maximum(over - saved * near, 0)
    seconds = np.zeros(near.shape)
    for layer, (load, store) in zip(batch.layers, rates, strict=True):
        link, gpu = layer.weights + load * held, layer.compute + layer.generate.slope * near
        seconds = seconds + layer.layers * np.maximum(np.maximum(link, gpu), store * held)
    best = seconds.argmin(axis=0)[None]
    chosen, least = (np.take_along_axis(each, best, axis=0)[0] for each in (near, seconds))
    return chosen, np.maximum(least * (1 - ROUNDING), 0.0)


def _rounded(batch: CacheRatioBatch, n: Any, kv: Any, act: Any, room_gpu: Any, room_host: Any, acts: Counts) -> tuple[Counts, Counts]:
    """The best ACT counts on GPU and host near ``acts`` in all: at least one candidate fits, as the smaller form alone is one."""
    most = np.minimum(n, room_gpu // act)
    low = np.clip(-((kv * (n - acts) - room_gpu) // act), 0, most)
    high = np.minimum(acts, most)
    ends = _reach(batch)
    # A design's own reach, repeated at its end where another's is longer: a batch then equals its singles.
    reach = np.minimum(np.arange(-1, np.max(ends, initial=ENDS))[:, None], ends - 1)
    near = np.concatenate([low + reach, high - reach, np.zeros((1, *most.shape), dtype=np.int64), most[None]])
    near = np.clip(near, 0, most)
    # With h ACT blocks on the host, KV fills the rest of the GPU and ``rest - h`` KV blocks are left to the host.
    rest = np.maximum(n - near - (room_gpu - near * act) // kv, 0)
    saved, over = kv - act, kv * rest - room_host
    step = np.maximum(np.abs(saved), 1)
    first = np.where(saved > 0, np.maximum(-(-over // step), 0), 0)
    last = np.where(saved < 0, np.minimum(rest, -over // step), rest)
    fits = (first <= last) & ((saved != 0) | (over <= 0))
    first, last = np.where(fits, first, 0), np.where(fits, last, 0)
    parts = []
    for layer in batch.layers:
        kv_left = rest - first
        parts.append(
            [
                (
                    layer.layers * (layer.weights + layer.load_kv.slope * kv_left + layer.load_act.slope * first),
                    layer.layers * (layer.load_act.slope - layer.load_kv.slope),
                ),
                (layer.layers * (layer.compute + layer.generate.slope * (near + first)), layer.layers * layer.generate.slope),
                (
                    layer.layers * (layer.store_kv * kv_left + layer.store_act * first),
                    layer.layers * (layer.store_act - layer.store_kv),
                ),
            ]
        )
    below = first + np.floor(lowest(*_sums(parts, near.shape), last - first)).astype(np.int64)
    far = np.stack([below, np.minimum(below + 1, last)])
    seconds = np.where(fits, batch.seconds(near, rest - far, far), np.inf)
    shape = seconds.shape
    flat = (shape[0] * shape[1], shape[2])
    best = seconds.reshape(flat).argmin(axis=0)[None]
    pairs = (np.broadcast_to(near, shape), far)
    near, far = (np.take_along_axis(each.reshape(flat), best, axis=0)[0] for each in pairs)
    return near, far


def _sums(parts: list[list[tuple[Any, Any]]], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A sum over classes of maxima of lines as the maximum of all sums of one line of each class: constants and slopes, [L, ...]."""
    sums: list[Iterable[tuple[Any, Any]]] = list(product(*parts))
    constants, slopes = [], []
    for lines in sums:
        constant, slope = reduce(lambda one, other: (one[0] + other[0], one[1] + other[1]), lines)
        constants.append(np.broadcast_to(constant, shape))
        slopes.append(np.broadcast_to(slope, shape))
    return np.array(constants), np.array(slopes)
