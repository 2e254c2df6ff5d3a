"""Profiles of the array estimates from calibration records: shares of a data sheet that were measured, in place of assumed ones."""

from __future__ import annotations

from .calibration import Calibration, check_shapes
from .calibration_records import record_for
from .device import Device, device_named
from .estimate import StepProfile
from .kernel_models import kernel_model
from .offload_profiles import OffloadProfile

PRODUCT = (8192, 8192, 8192)
"""Rows, columns and depth of the product whose rate stands for recomputation, which multiplies thousands of tokens at a time."""

LINK_DEVICE = "Quadro RTX 6000"
"""The device whose copies to and from its host were published with sizes, on PCIe 3.0 x16."""


def step_profile(device: Device | str, *, engine: str = "vLLM") -> StepProfile:
    """What weights, state and products reach on ``device`` under a serving engine, for ``StepModel``: shares of the record of whole steps.

    Gaps between kernels, the host and all-reduces are left out (``DecodeStepTime`` has them), so that a step stays below the measured one.
    ValueError if neither the device nor its family has a record.
    """
    record = _record(device, "decode_step", engine)
    values = record.values
    return StepProfile(
        name=f"calibrated on {record.device}, {engine}",
        memory=values["memory"],
        matrix=values["matrix"],
        overlap=2.0,  # as the model of the record has it
        lm_head=True,
        fitted_on=record.source,
    )


def offload_profile(device: Device | str, *, link_device: Device | str = LINK_DEVICE) -> OffloadProfile:
    """What a GPU reaches of its peak in large products and of its bandwidth in attention, and pinned copies of the link, for offloading.

    ``link_device``: whose share of its link stands in for that of ``device``; another generation of PCIe than the measured one is an
    assumption. ValueError if one of the records is missing.
    """
    found = device_named(device) if isinstance(device, str) else device
    product, attention = _record(found, "gemm", "bf16"), _record(found, "decode_attention", "vllm")
    down, up = (_record(link_device, "host_link", way) for way in ("h2d_pinned", "d2h_pinned"))
    return OffloadProfile(
        name=f"calibrated on {product.device} and {down.device}",
        compute=_reached(found, product),
        memory=attention.values["memory"],
        to_device=down.values["share"],
        to_host=up.values["share"],
        fitted_on="; ".join(dict.fromkeys(record.source for record in (product, attention, down))),
    )


def _reached(device: Device, record: Calibration) -> float:
    """Share of the matrix peak of the product ``PRODUCT``, all in: the record's own parameter is that of a tile, before waves and power."""
    model = kernel_model("gemm", "bf16")
    shapes = check_shapes(model, dict(zip(("m", "n", "k"), PRODUCT, strict=True)))
    _, least = model.work(device, shapes)
    return float(least[0] / model.seconds(device, shapes, record.values)[0])


def _record(device: Device | str, kernel: str, variant: str) -> Calibration:
    found = device_named(device) if isinstance(device, str) else device
    record = record_for(kernel_model(kernel, variant), found)
    if record is None:
        raise ValueError(f"there is no record of {kernel} {variant} for {found.name} or its family {found.family}; calibrate one")
    return record
