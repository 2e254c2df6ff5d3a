"""Numbers of a profile's data sheet: how they are written, and the one rate that stands for attention of all shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...models.units import GB, GFLOPS, TFLOPS, quantity
from ._host import plain
from ._kernels import Rate

DIGITS = 4
"""Of rates in a data sheet; rounded up, so that no measured row beats them."""

UNITS = {"capacity": "capacity", "bandwidth": "bandwidth", "latency": "time", "matrix_peak": "compute rate", "vector_peak": "compute rate"}
"""Dimensions of the quantities in a data sheet."""


class Attention(NamedTuple):
    """One ``rate`` [FLOP/s] for attention, 0 without any, and ``said``: a sentence about what it is."""

    rate: float
    said: str = ""


def attention_rate(rates: Iterable[Rate], bandwidth: float) -> Attention:
    """What stands for attention of all shapes in a data sheet whose memory has ``bandwidth`` [B/s].

    Attention reaches other FLOP/s with one query head to a KV head than with many, and a data sheet has one rate for all. Of each group of
    query heads, KV heads and dimension the fastest shape counts. A plan's seconds of it are max(bytes / bandwidth, FLOPs / rate); the rate
    is that whose worst factor between these and measured ones, up or down, is least (of equal ones, the least mean factor). So it is the
    best rate where memory limits the others, which the bandwidth says already, and else the geometric mean of the fastest and the slowest
    group. All grids measure the same groups, so that it does not depend on the grid.
    """
    groups: dict[str, Rate] = {}
    for one in rates:
        name = "/".join(f"{one.cell.shape[part]:.0f}" for part in ("heads", "kv_heads", "head_dim"))
        groups[name] = max(one, groups.get(name, one), key=lambda each: each.compute)
    if not groups:
        return Attention(0.0)
    reached = np.array([one.compute for one in groups.values()])
    share = np.array([min(one.bandwidth / bandwidth, 1.0) for one in groups.values()])
    best = float(reached.max())
    # The best group errs by best / rate, a slow one by rate / reached, 1 / share at most: the worst of both is least at one of these.
    found = np.array([best, *np.sqrt(best * reached), *best * share])[:, None]
    errors = np.abs(np.log(np.maximum(share, reached / found)))
    worst = errors.max(axis=1)
    place = min(range(len(found)), key=lambda row: (round(float(worst[row]), 9), float(errors[row].mean())))
    listed = ", ".join(f"{name}: {compute_text(one.compute)}" for name, one in groups.items())
    said = f"predicts attention within a factor of {math.exp(worst[place]):.2g} of the best of each query heads/KV heads/dimension"
    return Attention(float(found[place, 0]), f"{said} ({listed})")


def bandwidth_entry(found: float, name: str) -> dict[str, str]:
    """The bandwidth of a tier; ValueError without one."""
    if not found:
        raise ValueError(f"the bandwidth of {name!r} could not be measured, so there is no data sheet; give the profile more time")
    return {"bandwidth": upwards(found, GB, "GB/s")}


def peak_entries(matrix: float, vector: float) -> dict[str, str]:
    """Peaks of products and of attention, either for both where the other was not measured; ValueError without both."""
    if not matrix and not vector:
        raise ValueError("no product of matrices could be measured, so there is no data sheet; give the profile more time")
    return {"matrix_peak": compute_text(matrix or vector), "vector_peak": compute_text(vector or matrix)}


def compute_text(found: float) -> str:
    """FLOP/s as a text."""
    return upwards(found, TFLOPS, "TFLOP/s") if found >= TFLOPS else upwards(found, GFLOPS, "GFLOP/s")


def upwards(value: float, scale: float, unit: str) -> str:
    """``value`` in ``unit`` with ``DIGITS`` digits, not below it."""
    number = value / scale
    places = DIGITS - 1 - math.floor(math.log10(number))
    step = 10.0**-places
    text = f"{math.ceil(number / step) * step:.{max(places, 0)}f}"
    return f"{text if float(text) >= number else f'{(math.ceil(number / step) + 1) * step:.{max(places, 0)}f}'} {unit}"


def si(entry: Mapping[str, str]) -> dict[str, Any]:
    """An entry of the sheet with its quantities as numbers."""
    return {key: quantity(text, UNITS[key]) if key in UNITS else text for key, text in entry.items()}


def quoted(text: str) -> str:
    """A basic string of TOML: that of JSON, for texts that can be printed."""
    return json.dumps(plain(text), ensure_ascii=False)
