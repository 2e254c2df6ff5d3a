"""Kernel models of a processor: dense products and one decode step of attention, through a library that uses all its cores.

    seconds = launch + ((bytes / (memory BW))^2 + (FLOPs / (matrix peak s))^2)^(1/2)        s = m / (m + rows), 1 for one row

BW and peak: those of the device's sheet, of which ``memory`` and ``matrix`` are shares; ``rows``: rows of activations at which half of the
matrix rate is reached, as operands are packed once for all rows; a single row has a routine of its own, which does not pack. The norm of
power 2 lies between full overlap and none: an assumption. Numbers have 32 bits, and weights, keys and values come from memory, as those of
many layers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .calibration import Parameter, Shapes
from .checks import shown
from .device import Device
from .roofline import Array

BYTES = 4.0
"""Of a number."""

LAUNCH = Parameter(name="launch", unit="s", low=1e-7, high=1e-2, start=1e-5, meaning="any call")
MEMORY = Parameter(name="memory", unit="", low=0.02, high=1.0, start=0.8, meaning="share of the memory's bandwidth that is reached")
MATRIX = Parameter(name="matrix", unit="", low=0.02, high=1.0, start=0.8, meaning="share of the matrix peak that many rows reach")
ROWS = Parameter(name="rows", unit="", low=0.01, high=1000.0, start=4.0, meaning="rows at which half of that is reached")


def _check_variant(name: str, variant: str) -> None:
    if variant != "fp32":
        raise ValueError(f"{name}: variant must be 'fp32', not {shown(variant)}; leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGemmTime:
    """Seconds of a product [m, k] x [k, n] on a processor, by the formula of the module."""

    variant: str = "fp32"

    name: ClassVar[str] = "host_gemm"
    columns: ClassVar[tuple[str, ...]] = ("m", "n", "k")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("n", "k")
    parameters: ClassVar[tuple[Parameter, ...]] = (LAUNCH, MEMORY, MATRIX, ROWS)

    def __post_init__(self) -> None:
        _check_variant(self.name, self.variant)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        memory, matrix = self.work(device, shapes)
        m = np.maximum(np.asarray(shapes["m"], dtype=np.float64), 1.0)
        packed = np.where(m > 1, 1 + values["rows"] / m, 1.0)
        found = values["launch"] + np.hypot(memory / values["memory"], matrix / values["matrix"] * packed)
        return np.maximum(found, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of 4 (n k + m k + m n) bytes and of 2 m n k FLOPs at the rates of the sheet."""
        m, n, k = (np.asarray(shapes[name], dtype=np.float64) for name in self.columns)
        return BYTES * (n * k + m * k + m * n) / device.bandwidth, 2 * m * n * k / device.peak("fp32")

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N]: the larger of ``work``."""
        return np.maximum(*self.work(device, shapes))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAttentionTime:
    """Seconds of the attention of one decode step on a processor: launch + head batch kv_heads + bytes / (memory BW) + FLOPs / (vector P).

    P: ``vector_peak`` of the device's sheet, else its peak of 32 bits. ``head``: seconds for each request and KV head.
    """

    variant: str = "fp32"

    name: ClassVar[str] = "host_attention"
    columns: ClassVar[tuple[str, ...]] = ("batch", "seq", "heads", "kv_heads", "head_dim")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        LAUNCH,
        Parameter(name="head", unit="s", low=1e-8, high=1e-3, start=1e-6, meaning="each request and KV head"),
        MEMORY,
        Parameter(name="vector", unit="", low=0.02, high=1.0, start=0.8, meaning="share of the vector peak that is reached"),
    )

    def __post_init__(self) -> None:
        _check_variant(self.name, self.variant)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        memory, vector = self.work(device, shapes)
        tasks = np.asarray(shapes["batch"], dtype=np.float64) * np.asarray(shapes["kv_heads"], dtype=np.float64)
        found = values["launch"] + values["head"] * tasks + memory / values["memory"] + vector / values["vector"]
        return np.maximum(found, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of keys, values, queries and outputs, and of 4 batch seq heads head_dim FLOPs, at the rates of the sheet."""
        batch, seq, heads, kv_heads, head_dim = (np.asarray(shapes[name], dtype=np.float64) for name in self.columns)
        nbytes = 2 * BYTES * batch * head_dim * (seq * kv_heads + heads)
        return nbytes / device.bandwidth, 4 * batch * seq * heads * head_dim / (device.vector_peak or device.peak("fp32"))

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N]: the larger of ``work``."""
        return np.maximum(*self.work(device, shapes))
