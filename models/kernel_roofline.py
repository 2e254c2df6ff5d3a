"""The roofline with three parameters that every other kernel model is held against, and the data sheet's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .calibration import KernelModel, Parameter, Shapes
from .device import Device
from .roofline import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineTime:
    """Seconds of the kernels of another model, by the roofline of its bytes and FLOPs:

    launch + max(bytes / (memory x bandwidth), FLOPs / (matrix x peak))
    """

    of: KernelModel

    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="memory", unit="", low=0.02, high=1.0, start=0.7, meaning="share of the memory's bandwidth that is reached"),
        Parameter(name="matrix", unit="", low=0.02, high=1.0, start=0.7, meaning="share of the matrix peak that is reached"),
        Parameter(name="launch", unit="s", low=1e-8, high=1.0, start=5e-6, meaning="seconds that any kernel takes"),
    )

    @property
    def name(self) -> str:
        """The kind of kernel, with "roofline"."""
        return f"{self.of.name} roofline"

    @property
    def variant(self) -> str:
        """That of the other model."""
        return self.of.variant

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the other model."""
        return self.of.columns

    @property
    def texts(self) -> tuple[str, ...]:
        """Those of the other model."""
        return self.of.texts

    @property
    def group(self) -> tuple[str, ...]:
        """Those of the other model."""
        return self.of.group

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes and of the FLOPs at the rates of the data sheet."""
        return self.of.work(device, shapes)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] that the data sheet rules out to beat."""
        return self.of.bound(device, shapes)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """The formula above [N]."""
        memory, matrix = self.work(device, shapes)
        return values["launch"] + np.maximum(memory / values["memory"], matrix / values["matrix"])
