"""Profiles of the array estimates from calibration records: shares of a data sheet that were measured, in place of assumed ones."""

from __future__ import annotations

from collections.abc import Iterable

from .calibration import Calibration, check_shapes
from .calibration_records import checked_records, record_for
from .device import Device, device_named
from .estimate import StepProfile
from .kernel_models import kernel_model
from .offload_profiles import OffloadProfile

PRODUCT = (8192, 8192, 8192)
"""Rows, columns and depth of the product whose rate stands for recomputation, which multiplies thousands of tokens at a time."""

LINK_DEVICE = "Quadro RTX 6000"
"""The device whose copies to and from its host were published with sizes, on PCIe 3.0 x16."""


def step_profile(device: Device | str, *, engine: str = "vLLM", records: Iterable[Calibration] | None = None) -> StepProfile:
    """What weights, state and products reach on ``device`` under a serving engine, for ``StepModel``: shares of the record of whole steps.

    Gaps between kernels, the host and all-reduces are left out (``DecodeStepTime`` has them), so that a step stays below the measured one.
    ``records``: to choose from (None: those that memsplit ships), one's own first: ``(*read_records(path), *shipped_records())``.
    ValueError if neither the device nor its family has a record.
    """
    record = _record(device, "decode_step", engine, records)
    values = record.values
    return StepProfile(
        name=f"calibrated on {record.device}, {engine}",
        memory=values["memory"],
        matrix=values["matrix"],
        overlap=2.0,  # as the model of the record has it
        lm_head=True,
        fitted_on=record.source,
    )


def offload_profile(
    device: Device | str, *, link_device: Device | str = LINK_DEVICE, records: Iterable[Calibration] | None = None
) -> OffloadProfile:
    """What a GPU reaches of its peak in large products and of its bandwidth in attention, and pinned copies of the link, for offloading.

    ``link_device``: whose share of its link stands in for that of ``device``; another generation of PCIe than the measured one is an
    assumption. ``records``: to choose from (None: those that memsplit ships), one's own first, as in ``step_profile``; of gemm bf16,
    decode_attention vllm, and host_link both ways. ValueError if one of the records is missing.
    """
    records = None if records is None else checked_records(records)
    found = device_named(device) if isinstance(device, str) else device
    product, attention = _record(found, "gemm", "bf16", records), _record(found, "decode_attention", "vllm", records)
    down, up = (_record(link_device, "host_link", way, records) for way in ("h2d_pinned", "d2h_pinned"))
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
    return float(least[0] / record.predict(model, device, shapes).seconds[0])


def _record(device: Device | str, kernel: str, variant: str, records: Iterable[Calibration] | None) -> Calibration:
    found = device_named(device) if isinstance(device, str) else device
    record = record_for(kernel_model(kernel, variant), found, records)
    if record is None:
        raise ValueError(
            f"there is no record of {kernel} {variant} for {found.name} or its family {found.family}; calibrate one, or add "
            "shipped_records() to the records"
        )
    return record
