"""Schedule templates: how the transfers, the recomputation and the decode step of one layer overlap. Pure functions of arrays.

All arguments are seconds of one layer and one GPU batch (``batches`` of them share one load of the weights), for the whole state, and
broadcast:

    kv   transfer of all keys and values        act       transfer of all activations       recompute  of all keys and values
    weights  transfer of the weights            compute   decode step on the GPU            share a    of tokens kept as activations
    first    transfer of the part of the weights that recomputation needs; None: recomputation waits for all weights

Three things hold in every template: the link carries one byte at a time, the GPU does one thing at a time, so that no template is shorter
than ``weights + batches (act a + kv (1 - a))`` or ``batches (compute + recompute a)``; and keys and values cannot be recomputed before
their activations have arrived. Sources: KVPR (arXiv 2411.17089, staged; its key and value projections come ``first``), HybridServe
(arXiv 2501.01792, fluid), FlexGen (arXiv 2303.06865, flexgen_sync); the chunked template lies between the first two and is derived here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .roofline import Array


def staged(
    share: ArrayLike,
    *,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    first: ArrayLike | None = None,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> Array:
    """KVPR: all activations arrive, then they are recomputed while the remaining keys and values cross the link.

    max(weights + batches (act a + max(recompute a, kv (1 - a))), batches (compute + recompute a))

    With ``first``, the other weights too cross the link while the first GPU batch is recomputed; its part of the first line becomes
    first + act a + max(recompute a, weights - first + kv (1 - a)).
    """
    return chunked(share, chunks=1, kv=kv, act=act, recompute=recompute, weights=weights, first=first, compute=compute, batches=batches)


def chunked(
    share: ArrayLike,
    *,
    chunks: ArrayLike,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    first: ArrayLike | None = None,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> Array:
    """Activations arrive in n equal chunks; each is recomputed while the next one, and then keys and values, cross the link.

    max(weights + batches max(act a + max(kv (1 - a), recompute a / n), act a / n + recompute a), batches (compute + recompute a))

    With ``first``, the other weights follow the activations of the first GPU batch, and its part of the first line becomes
    first + max(act a + max(weights - first + kv (1 - a), recompute a / n), act a / n + recompute a).
    """
    a, kv, act, recompute, n, weights, compute, batches = _arrays(share, kv, act, recompute, chunks, weights, compute, batches)
    early = weights if first is None else _arrays(first)[0]
    link, gpu = act * a + kv * (1 - a), np.maximum(act * a + recompute * a / n, act * a / n + recompute * a)
    transfers = np.maximum(weights + link, early + gpu) + (batches - 1) * np.maximum(link, gpu)
    return np.maximum(transfers, batches * (compute + recompute * a))


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
    a, kv, act, recompute, weights, compute, batches = _arrays(share, kv, act, recompute, weights, compute, batches)
    return np.maximum(weights + batches * (act * a + kv * (1 - a)), batches * (compute + recompute * a))


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
    first: ArrayLike | None = None,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
    most: ArrayLike = 1.0,
) -> Array:
    """The share in [0, ``most``] at which ``staged`` is shortest: 1 / (1 + recompute / kv) if activations pay; the smallest of several."""
    lines = chunked_lines(chunks=1, kv=kv, act=act, recompute=recompute, weights=weights, first=first, compute=compute, batches=batches)
    return lowest(*lines, most)


def best_chunked_share(
    *,
    chunks: ArrayLike,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    first: ArrayLike | None = None,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
    most: ArrayLike = 1.0,
) -> Array:
    """The share in [0, ``most``] at which ``chunked`` is shortest, the smallest of several.

    One of the breakpoints, as the time is convex and piecewise linear. With r = act / kv < 1 and rho = recompute / kv, and if neither
    weights nor compute bind, it is 1 / (1 + rho / n + max(rho - r, 0) (1 - 1 / n)): for rho above r, 1 / (1 - r + rho + r / n).
    """
    lines = chunked_lines(
        chunks=chunks, kv=kv, act=act, recompute=recompute, weights=weights, first=first, compute=compute, batches=batches
    )
    return lowest(*lines, most)


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
    """The share in [0, ``most``] at which ``fluid`` is shortest, the smallest of several: (w + 1 - c) / (1 - r + rho), clipped.

    r, rho, w and c are act, recompute, weights / batches and compute over kv.
    """
    return lowest(*fluid_lines(kv=kv, act=act, recompute=recompute, weights=weights, compute=compute, batches=batches), most)


def chunked_lines(
    *,
    chunks: ArrayLike,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    first: ArrayLike | None = None,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> tuple[Array, Array]:
    """``chunked`` as the maximum of L lines in the share: constants [L, ...] and slopes [L, ...], both in seconds."""
    kv, act, recompute, n, weights, compute, batches, zero = _arrays(kv, act, recompute, chunks, weights, compute, batches, 0.0)
    later: list[tuple[Array, Array]] = [(kv, act - kv), (zero, act + recompute / n), (zero, act / n + recompute)]
    if first is None:  # the first batch is like the later ones: a maximum of sums would only repeat lines
        lines = [(weights + batches * constant, batches * slope) for constant, slope in later]
    else:
        (early,) = _arrays(first)
        begun = [(weights + kv, act - kv), (early, act + recompute / n), (early, act / n + recompute)]
        lines = [(c + (batches - 1) * constant, s + (batches - 1) * slope) for c, s in begun for constant, slope in later]
    return _stacked([*lines, (batches * compute, batches * recompute)])


def fluid_lines(
    *,
    kv: ArrayLike,
    act: ArrayLike,
    recompute: ArrayLike,
    weights: ArrayLike = 0.0,
    compute: ArrayLike = 0.0,
    batches: ArrayLike = 1,
) -> tuple[Array, Array]:
    """``fluid`` as the maximum of two lines in the share: constants [2, ...] and slopes [2, ...], both in seconds."""
    kv, act, recompute, weights, compute, batches = _arrays(kv, act, recompute, weights, compute, batches)
    return _stacked([(weights + batches * kv, batches * (act - kv)), (batches * compute, batches * recompute)])


def lowest(constants: Array, slopes: Array, most: ArrayLike = 1.0) -> Array:
    """Where the maximum of lines ``constant + slope a`` [L, ...] is lowest on [0, most], the smallest such place: an end or a crossing.

    Heights that differ by less than 1e-12 of themselves, a few times the rounding of a line, count as equal.
    """
    aligned = (len(constants), *(1,) * (np.ndim(most) - constants.ndim + 1), *constants.shape[1:])
    constants, slopes = constants.reshape(aligned), slopes.reshape(aligned)
    end = np.asarray(most, dtype=np.float64) + np.zeros(constants.shape[1:])
    i, j = _pairs(len(constants))
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = (constants[i] - constants[j]) / (slopes[j] - slopes[i])
    places = np.zeros((2 + len(crossings), *end.shape))
    places[1] = end
    np.copyto(places[2:], np.minimum(np.maximum(crossings, 0.0), end), where=np.isfinite(crossings))
    heights = constants[0] + slopes[0] * places
    for line in range(1, len(constants)):  # one after the other: an array of all heights would be ten times as large
        np.maximum(heights, constants[line] + slopes[line] * places, out=heights)
    near = heights <= np.minimum.reduce(heights) * (1 + 1e-12)
    return np.minimum.reduce(places, axis=0, where=near, initial=np.inf)


def _arrays(*values: ArrayLike) -> tuple[Array, ...]:
    """Arrays of floats; [()] makes plain numbers of single ones, which compute five times faster than arrays without a dimension."""
    return tuple(np.asarray(value, dtype=np.float64)[()] for value in values)


def _stacked(lines: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Lines of scalars, the case of one design, are stacked without the machinery of broadcasting, which takes most of its time."""
    parts = [part for line in lines for part in line]
    if any(part.shape for part in parts):
        parts = list(np.broadcast_arrays(*parts))
    return np.array(parts[::2]), np.array(parts[1::2])


@cache
def _pairs(number: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(number, 1)
