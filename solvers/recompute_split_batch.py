"""The optimal recompute split of many designs at once: ``ClosedFormSplit`` as arrays, equal to it bit for bit.

Each class of layers has its best whole number of tokens by ``best_splits``. Where the host has no room for so many activations, a single
class takes what there is room for: its time falls up to its best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..models.offload_batch import RecomputeSplitBatch
from ..models.recompute_split import best_splits
from ..models.roofline import Array
from .recompute_split import ClosedFormSplit

AT_ONCE = 1024
"""Designs in one array: the candidates of a split with streamed weights, 47 of 10 lines, then stay in a cache of 1 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitSolutions:
    """Optimal plans of D designs: ``splits`` [C, D] tokens of each class of layers, ``latency`` [D] s (inf where nothing fits, and the
    splits are 0), and ``fits_gpu``, ``fits_host``: whether each memory holds a plan without recomputation."""

    splits: NDArray[np.int64]
    latency: Array
    fits_gpu: NDArray[np.bool_]
    fits_host: NDArray[np.bool_]

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Designs that have a plan."""
        return self.fits_gpu & self.fits_host


def solve_splits(batch: RecomputeSplitBatch) -> SplitSolutions:
    """The optimum of each design; its bound is its latency.

    Designs in which several classes of layers compete for the host's memory are solved one after the other. ValueError as from
    ``ClosedFormSplit``.
    """
    pieces = [_solved(batch.some(slice(start, start + AT_ONCE))) for start in range(0, len(batch), AT_ONCE)] or [_solved(batch)]
    return SplitSolutions(
        splits=np.concatenate([piece.splits for piece in pieces], axis=1),
        latency=np.concatenate([piece.latency for piece in pieces]),
        fits_gpu=np.concatenate([piece.fits_gpu for piece in pieces]),
        fits_host=np.concatenate([piece.fits_host for piece in pieces]),
    )


def _solved(batch: RecomputeSplitBatch) -> SplitSolutions:
    number, depths = len(batch), [layer.layers for layer in batch.layers]
    context, most = (np.broadcast_to(np.asarray(each, dtype=np.float64), number) for each in (batch.context, batch.most))
    room = np.broadcast_to(batch.token_room, number)
    fits_gpu, fits_host = np.broadcast_to(batch.gpu_fits, number), room >= 0
    splits = np.array(np.broadcast_to(best_splits(cast(Any, batch), context, most)[0], (len(depths), number)))
    wanted = sum(depth * split for depth, split in zip(depths, splits, strict=True))
    short = fits_gpu & fits_host & (wanted > room)
    if len(depths) == 1:
        splits[0] = np.where(short, room // depths[0], splits[0])
    else:
        for row in np.flatnonzero(short).tolist():
            splits[:, row] = ClosedFormSplit().solve(batch[row]).unwrap().splits
    splits[:, ~(fits_gpu & fits_host)] = 0
    latency = np.where(fits_gpu & fits_host, batch.latency(splits), np.inf)
    return SplitSolutions(splits=splits, latency=latency, fits_gpu=fits_gpu, fits_host=fits_host)
