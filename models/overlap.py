"""Schedule templates: how the transfers, the recomputation and the decode step of one layer overlap. Pure functions of arrays that broadcast.

All arguments are seconds of one layer and one GPU batch (``batches`` of them share one load of the weights), for the whole state:

    kv   transfer of all keys and values        act       transfer of all activations       recompute  of all keys and values
    weights  transfer of the weights            compute   decode step on the GPU            share a    of tokens kept as activations

Three things hold in every template: the link carries one byte at a time, the GPU does one thing at a time, so that no template is shorter
than ``weights + batches * (act a + kv (1 - a))`` or ``batches * (compute + recompute a)``; and keys and values cannot be recomputed before
their activations have arrived. Sources: KVPR (arXiv 2411.17089, staged), HybridServe (arXiv 2501.01792, fluid), FlexGen (arXiv 2303.06865,
flexgen_sync); the chunked template lies between the first two and is derived here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .roofline import Array


def staged(
    share: ArrayLike,
    *,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> Array:
    """KVPR: all activations arrive, then they are recomputed while the remaining keys and values cross the link.

    max(weights + batches (act a + max(recompute a, kv (1 - a))), batches (compute + recompute a))
    """
    return chunked(share, chunks=1, kv=kv, act=act, recompute=recompute, weights=weights, compute=compute, batches=batches)


def chunked(
    share: ArrayLike,
    *,
    chunks: ArrayLike,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> Array:
    """Activations arrive in n equal chunks; each is recomputed while the next one, and then keys and values, cross the link.

    max(weights + batches max(act a + max(kv (1 - a), recompute a / n), act a / n + recompute a), batches (compute + recompute a))
    """
    a, kv, act, recompute, n = _arrays(share, kv, act, recompute, chunks)
    link_first = act * a + np.maximum(kv * (1 - a), recompute * a / n)
    gpu_last = act * a / n + recompute * a
    return _step(np.maximum(link_first, gpu_last), a, recompute, weights, compute, batches)


def fluid(
    share: ArrayLike,
    *,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> Array:
    """HybridServe: while one layer is computed, weights and state of the next one arrive; infinitely many chunks.

    max(weights + batches (act a + kv (1 - a)), batches (compute + recompute a))
    """
    a, kv, act, recompute, _ = _arrays(share, kv, act, recompute, 1)
    return _step(act * a + kv * (1 - a), a, recompute, weights, compute, batches)


def flexgen_sync(*, to_gpu: ArrayLike, from_gpu: ArrayLike, from_disk: ArrayLike, to_disk: ArrayLike, compute: ArrayLike) -> Array:
    """FlexGen's decode step: the load of the GPU is not hidden, the rest is, with a barrier for each layer and batch.

    to_gpu + max(from_gpu, from_disk, to_disk, compute)
    """
    rest = np.maximum.reduce(np.broadcast_arrays(*(np.asarray(one, dtype=np.float64) for one in (from_gpu, from_disk, to_disk, compute))))
    return np.asarray(to_gpu, dtype=np.float64) + rest


def best_staged_share(
    *,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
    most: ArrayLike = 1.0,
) -> Array:
    """The share in [0, ``most``] at which ``staged`` is shortest: 1 / (1 + recompute / kv) if activations pay; the smallest one of several."""
    return best_chunked_share(chunks=1, kv=kv, act=act, recompute=recompute, weights=weights, compute=compute, batches=batches, most=most)


def best_chunked_share(
    *,
    chunks: ArrayLike,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
    most: ArrayLike = 1.0,
) -> Array:
    """The share in [0, ``most``] at which ``chunked`` is shortest, the smallest one of several: one of the breakpoints, as it is convex and
    piecewise linear. With r = act / kv and rho = recompute / kv the usual one is 1 / (1 - r + rho + r / n), clipped."""
    kv, act, recompute, n, weights, compute, batches, most = _arrays(kv, act, recompute, chunks, weights, compute, batches, most)
    lines = [  # each line of the maximum as (constant, slope), a batch's part
        (weights / batches + kv, act - kv),
        (weights / batches, act + recompute / n),
        (weights / batches, act / n + recompute),
        (compute, recompute),
    ]
    return _lowest(lines, most)


def best_fluid_share(
    *,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
    most: ArrayLike = 1.0,
) -> Array:
    """The share in [0, ``most``] at which ``fluid`` is shortest, the smallest one of several: (w + 1 - c) / (1 - r + rho), clipped."""
    kv, act, recompute, weights, compute, batches, most = _arrays(kv, act, recompute, weights, compute, batches, most)
    return _lowest([(weights / batches + kv, act - kv), (compute, recompute)], most)


def _arrays(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.asarray(value, dtype=np.float64) for value in values)


def _step(transfers: Array, a: Array, recompute: Array, weights: ArrayLike, compute: ArrayLike, batches: ArrayLike) -> Array:
    weights, compute, batches = _arrays(weights, compute, batches)
    return np.maximum(weights + batches * transfers, batches * (compute + recompute * a))


def _lowest(lines: list[tuple[Array, Array]], most: Array) -> Array:
    """Where the maximum of lines ``constant + slope a`` is lowest on [0, most], the smallest such place: 0, most, or a crossing."""
    shape = np.broadcast_shapes(most.shape, *(part.shape for line in lines for part in line))
    places = [np.zeros(shape), np.broadcast_to(most, shape)]
    for i, (constant, slope) in enumerate(lines):
        for other, steeper in lines[i + 1 :]:
            with np.errstate(divide="ignore", invalid="ignore"):
                crossing = (constant - other) / (steeper - slope)
            places.append(np.clip(np.where(np.isfinite(crossing), crossing, 0.0), 0.0, most) + np.zeros(shape))
    candidates = np.sort(np.stack(places), axis=0)
    heights = np.maximum.reduce([constant + slope * candidates for constant, slope in lines])
    lowest = heights.min(axis=0)
    near = heights <= lowest * (1 + 1e-12)
    return np.take_along_axis(candidates, near.argmax(axis=0)[None], axis=0)[0]
