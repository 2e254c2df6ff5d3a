"""The kernel models by name, and the time of a kernel on a device: by its data sheet, or calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from .calibration import Calibration, Interval, KernelModel, check_shapes, columns_of
from .calibration_records import record_for
from .device import Device, device_named
from .kernel_attention import DecodeAttentionTime, PrefillAttentionTime
from .kernel_gemm import GemmTime, MoeGemmTime
from .kernel_host import HostAttentionTime, HostGemmTime
from .kernel_offload import HostStepTime, OffloadStepTime
from .kernel_steps import DecodeStepTime, PrefillStepTime, ServingTime
from .kernel_transfers import AllReduceTime, ElementwiseTime, HostLinkTime, StreamTime

KERNELS: Mapping[str, Callable[..., KernelModel]] = {
    kind.name: kind
    for kind in (
        GemmTime,
        MoeGemmTime,
        DecodeAttentionTime,
        PrefillAttentionTime,
        ElementwiseTime,
        StreamTime,
        HostLinkTime,
        AllReduceTime,
        DecodeStepTime,
        PrefillStepTime,
        ServingTime,
        OffloadStepTime,
        HostStepTime,
        HostGemmTime,
        HostAttentionTime,
    )
}
"""Kinds of kernel that can be calibrated; each takes ``variant=``."""


def kernel_model(name: str, variant: str = "") -> KernelModel:
    """The model of that name; without a ``variant``, the one that it has by default. ValueError names the ones there are."""
    if name not in KERNELS:
        raise ValueError(f"there is no kernel {name!r}; kernels are {', '.join(KERNELS)}")
    return KERNELS[name](variant=variant) if variant else KERNELS[name]()


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """Seconds of a kind of kernel on a device. ``record`` None: by the data sheet alone, a lower bound without an interval."""

    model: KernelModel
    device: Device
    record: Calibration | None

    @classmethod
    def calibrated(
        cls, kernel: str, device: Device | str, *, variant: str = "", records: Iterable[Calibration] | None = None
    ) -> KernelTime:
        """With the device's own record among ``records`` (None: those that memsplit ships), or that of its family.

        ValueError if there is neither: ``datasheet`` needs none.
        """
        model, found = kernel_model(kernel, variant), device_named(device) if isinstance(device, str) else device
        record = record_for(model, found, records)
        if record is None:
            raise ValueError(
                f"there is no record of {kernel} {model.variant}".rstrip()
                + f" for {found.name} or its family {found.family}; calibrate one, or take KernelTime.datasheet"
            )
        return cls(model=model, device=found, record=record)

    @classmethod
    def datasheet(cls, kernel: str, device: Device | str, *, variant: str = "") -> KernelTime:
        """Every rate of the data sheet reached."""
        found = device_named(device) if isinstance(device, str) else device
        return cls(model=kernel_model(kernel, variant), device=found, record=None)

    @property
    def profile(self) -> str:
        """ "datasheet"; "calibrated", by the device's own record; or "calibrated on" and the device whose record stands in."""
        if self.record is None:
            return "datasheet"
        return "calibrated" if self.record.device == self.device.name else f"calibrated on {self.record.device}"

    def predict(self, **shapes: ArrayLike | Any) -> Interval:
        """Seconds [N] of each row of the model's columns, and the ends of their intervals. ValueError names a column that is missing or not
        known. Whether weights and state fit into the device is not asked here."""
        unknown = sorted(set(shapes) - set(columns_of(self.model)))
        if unknown:
            raise ValueError(f"{self.model.name}: it has no column {unknown[0]!r}; columns are {', '.join(columns_of(self.model))}")
        columns = check_shapes(self.model, shapes)
        if self.record is None:
            bound = self.model.bound(self.device, columns)
            return Interval(seconds=bound, low=bound, high=bound)
        return self.record.predict(self.model, self.device, columns)
