"""Calibration records as TOML files, one for each device, that a person can read; and the record that is nearest to a device.

device = "A100-SXM-80GB"
family = "Ampere"

[[record]]
kernel = "gemm"
variant = "bf16"
source = "..."
date = "2026-11-21"
version = "0.1.0"
flagged = 0
folds = 5
fitted = { rows = 2992, mape_pct = 6.1, ... }
unseen = { rows = 2992, mape_pct = 6.2, ... }
ratios = [0.87, 0.95, 1.0, 1.05, 1.14]          # quantiles of measured / predicted on rows of shapes held out
warnings = []
[record.parameters]
matrix = { value = 0.8, low = 0.79, high = 0.81, unit = "share" }
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .calibration import QUANTILES, Calibration, Error, Estimate, KernelModel
from .device import Device

RECORDS = Path(__file__).parent / "data" / "calibrations"
"""The records that memsplit ships; the command ``memsplit calibrate`` made them."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Value(_Entry):
    value: float
    low: float
    high: float
    unit: str = ""


class _Error(_Entry):
    rows: int
    mape_pct: float
    median_pct: float
    p90_pct: float
    bias_pct: float
    below_bound: int = 0


class _Record(_Entry):
    kernel: str
    variant: str = ""
    source: str = ""
    date: str = ""
    version: str = ""
    flagged: int = 0
    folds: int = 0
    fitted: _Error
    unseen: _Error | None = None
    ratios: list[float] = [1.0] * len(QUANTILES)
    warnings: list[str] = []
    parameters: dict[str, _Value]


class _File(_Entry):
    device: str
    family: str
    record: list[_Record]


def read_records(path: str | Path) -> tuple[Calibration, ...]:
    """The records of a file; ValueError in one sentence: file, record, rule, way out."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        found = _File.model_validate(data)
        return tuple(_calibration(found, record) for record in found.record)
    except OSError as error:
        raise ValueError(f"cannot read the records in {path}: {error.strerror}; name a TOML file of calibration records") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}; correct it, or calibrate again") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML file: {error}; mend that place, or calibrate again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def records_text(records: Iterable[Calibration], units: dict[tuple[str, str], dict[str, str]] | None = None) -> str:
    """The TOML file of one device's records, every number to its last digit; ``units`` of parameters by kernel and variant.

    ValueError for records of several devices.
    """
    listed = sorted(records, key=lambda record: (record.kernel, record.variant))
    devices = {(record.device, record.family) for record in listed}
    if len(devices) != 1:
        raise ValueError(f"a file of records is for one device, not for {len(devices)}; write one for each")
    ((device, family),) = devices
    lines = [f"device = {json.dumps(device)}", f"family = {json.dumps(family)}"]
    for record in listed:
        names = (units or {}).get((record.kernel, record.variant), {})
        lines += ["", "[[record]]"]
        lines += [f"{key} = {json.dumps(getattr(record, key))}" for key in ("kernel", "variant", "source", "date", "version")]
        lines += [f"flagged = {record.flagged}", f"folds = {record.folds}", f"fitted = {_table(record.fitted)}"]
        lines += [] if record.unseen is None else [f"unseen = {_table(record.unseen)}"]
        lines += [f"ratios = [{', '.join(map(repr, record.ratios))}]", f"warnings = {json.dumps(list(record.warnings))}"]
        lines.append("[record.parameters]")
        for name, estimate in record.estimates.items():
            unit = f", unit = {json.dumps(names[name])}" if names.get(name) else ""
            lines.append(f"{name} = {{ value = {estimate.value!r}, low = {estimate.low!r}, high = {estimate.high!r}{unit} }}")
    return "\n".join(lines) + "\n"


def _table(error: Error) -> str:
    return "{ " + ", ".join(f"{name} = {value!r}" for name, value in error._asdict().items()) + " }"


def _calibration(found: _File, record: _Record) -> Calibration:
    known: dict[str, Any] = {name: getattr(record, name) for name in ("kernel", "variant", "source", "date", "version", "flagged", "folds")}
    return Calibration(
        device=found.device,
        family=found.family,
        estimates={name: Estimate(one.value, one.low, one.high) for name, one in record.parameters.items()},
        fitted=Error(**record.fitted.model_dump()),
        unseen=None if record.unseen is None else Error(**record.unseen.model_dump()),
        ratios=tuple(record.ratios),
        warnings=tuple(record.warnings),
        **known,
    )


@lru_cache(maxsize=1)
def shipped_records() -> tuple[Calibration, ...]:
    """All records that memsplit ships."""
    return tuple(record for path in sorted(RECORDS.glob("*.toml")) for record in read_records(path))


def record_for(model: KernelModel, device: Device, records: Iterable[Calibration] | None = None) -> Calibration | None:
    """The record of ``device`` among ``records`` (None: those shipped), or else of its family, of several that with the most rows; or None.

    A model may say that records of another one hold for it, too (``fitted_as``), or those of any device (``any_device``).
    """
    known = tuple(shipped_records() if records is None else records)
    for kernel in (model.name, getattr(model, "fitted_as", model.name)):
        alike = [one for one in known if (one.kernel, one.variant) == (kernel, model.variant)]
        own = [one for one in alike if one.device == device.name]
        family = [one for one in alike if one.family == device.family or getattr(model, "any_device", False)]
        if own or family:
            return max(own or family, key=lambda one: one.fitted.rows)
    return None
