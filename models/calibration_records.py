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
from .checks import shown
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


def read_records(path: str | Path, *, models: Iterable[KernelModel] = ()) -> tuple[Calibration, ...]:
    """The records of a file; ValueError in one sentence: file, record, rule, way out.

    Each must be of a kernel of memsplit, or of one of your own ``models``: with its parameters, in their ranges and units, and no kernel
    and variant twice.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        found = _File.model_validate(data)
        records = tuple(_calibration(found, record) for record in found.record)
        _check_file(found, tuple(models))
        return records
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


def _check_file(found: _File, models: tuple[KernelModel, ...]) -> None:
    """ValueError for a record that does not fit its kernel model, and for two of one model."""
    known = set[tuple[str, str]]()
    for record in found.record:
        model = _model_of(record, models)
        what = f"the record of {record.kernel} {record.variant}".rstrip()
        if (record.kernel, record.variant) in known:
            raise ValueError(f"{what} is there twice; leave one of them out")
        known.add((record.kernel, record.variant))
        parameters = {one.name: one for one in model.parameters}
        odd = sorted(parameters.keys() ^ record.parameters.keys())
        if odd:
            rule = "lacks the parameter" if odd[0] in parameters else "has an unknown parameter"
            raise ValueError(f"{what} {rule} {odd[0]!r}; it needs {', '.join(parameters)}: calibrate again")
        for name, one in record.parameters.items():
            parameter = parameters[name]
            # A value on a bound of a logarithmic scale may be off in its last digits.
            low, high = parameter.low * (1 - 1e-9), parameter.high * (1 + 1e-9)
            if not low <= one.low <= one.value * (1 + 1e-9) or not one.value * (1 - 1e-9) <= one.high <= high:
                raise ValueError(
                    f"{what}: {name} must have low <= value <= high, from {parameter.low:g} to {parameter.high:g} {parameter.unit}".rstrip()
                    + f", not {one.low:g}, {one.value:g} and {one.high:g}; calibrate again"
                )
            if one.unit and one.unit != parameter.unit:
                raise ValueError(f"{what}: {name} must be in {parameter.unit or 'no unit'}, not in {shown(one.unit)}; calibrate again")


def _model_of(record: _Record, models: tuple[KernelModel, ...]) -> KernelModel:
    """The kernel model that a record is of; ValueError if there is none."""
    from .kernel_models import kernel_model  # that module needs this one

    for model in models:
        if (model.name, model.variant) == (record.kernel, record.variant):
            return model
    return kernel_model(record.kernel, record.variant)


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
    """The first record of ``device`` among ``records`` (None: those shipped), else of its family's the one with the most rows; or None.

    So ``(*mine, *shipped_records())`` takes one's own where there is one. A model may say that records of another one hold for it, too
    (``fitted_as``), or those of any device (``any_device``). ValueError for ``records`` that are none.
    """
    known = shipped_records() if records is None else checked_records(records)
    kernels = dict.fromkeys((model.name, getattr(model, "fitted_as", model.name)))
    alike = [one for kernel in kernels for one in known if (one.kernel, one.variant) == (kernel, model.variant)]
    own = next((one for one in alike if one.device == device.name), None)
    if own is not None:
        return own
    family = [one for one in alike if one.family == device.family or getattr(model, "any_device", False)]
    nearest = [one for one in family if one.kernel == family[0].kernel]
    return max(nearest, key=lambda one: one.fitted.rows, default=None)


def checked_records(records: Iterable[Calibration]) -> tuple[Calibration, ...]:
    """``records`` as a tuple; ValueError unless each is a Calibration."""
    given: Any = records  # a caller may well pass a path, or one record
    listed = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
    wrong = [one for one in listed if not isinstance(one, Calibration)]
    if wrong:
        raise ValueError(f"records must be a tuple of Calibrations, as read_records(path) gives them, not {shown(given)}; read them first")
    return listed
