"""Profiles of the array estimates from calibration records: shares of a data sheet that were measured, in place of assumed ones."""

from __future__ import annotations

from .calibration import Calibration
from .calibration_records import record_for
from .device import Device, device_named
from .estimate import StepProfile
from .kernel_models import kernel_model
from .offload_profiles import OffloadProfile

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
    """What a GPU reaches of its peak in products and of its bandwidth in attention, and pinned copies of the link, for offloading.

    ``link_device``: whose share of its link stands in for that of ``device``; another generation of PCIe than the measured one is an
    assumption. ValueError if one of the records is missing.
    """
    product, attention = _record(device, "gemm", "bf16"), _record(device, "decode_attention", "vllm")
    down, up = (_record(link_device, "host_link", way) for way in ("h2d_pinned", "d2h_pinned"))
    return OffloadProfile(
        name=f"calibrated on {product.device} and {down.device}",
        compute=product.values["matrix"],
        memory=attention.values["memory"],
        to_device=down.values["share"],
        to_host=up.values["share"],
        fitted_on="; ".join(dict.fromkeys(record.source for record in (product, attention, down))),
    )


def _record(device: Device | str, kernel: str, variant: str) -> Calibration:
    found = device_named(device) if isinstance(device, str) else device
    record = record_for(kernel_model(kernel, variant), found)
    if record is None:
        raise ValueError(f"there is no record of {kernel} {variant} for {found.name} or its family {found.family}; calibrate one")
    return record
