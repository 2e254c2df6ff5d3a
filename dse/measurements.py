"""Measurements of one's own: a CSV with a row for each measured kernel, read, checked, and fitted into calibration records.

Columns: those of the kernel model (``m, n, k`` of a GEMM), the time as one of ``measured_s``, ``measured_ms``, ``measured_us``, and, if the
file has several kinds, ``kernel`` and ``variant``. Other columns are kept out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import __version__
from ..models.calibration import Calibration, KernelModel, columns_of, error_of, groups_of
from ..models.calibration_records import record_for, records_text
from ..models.checks import shown
from ..models.device import Device
from ..models.kernel_models import KERNELS, kernel_model
from ..models.roofline import Array
from ..solvers.calibration import fit
from .table import check_writable, read_table, replacing

TIMES = {"measured_s": 1.0, "measured_ms": 1e-3, "measured_us": 1e-6}
"""Columns of the measured time, and their seconds."""

ANOTHER_UNIT = (1e-6, 1e-3, 1e3, 1e6)
"""Ratios of measured and predicted time that look like a time in another unit, within a factor of 2."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurements:
    """Measured times of one kernel model: columns ``shapes`` [N], ``seconds`` [N], and the ``line`` [N] of each in its file.

    ``repeated``: rows that repeated the shape of another one; their median stands for them.
    """

    model: KernelModel
    shapes: dict[str, NDArray[Any]]
    seconds: Array
    line: NDArray[np.int64]
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.seconds)


def read_measurements(
    path: str | Path, *, kernel: str | None = None, variant: str = "", measured_on: str | None = None
) -> tuple[Measurements, ...]:
    """The measurements in a CSV, by kernel and variant in order of appearance.

    ``kernel`` and ``variant``: of all rows, where the file has no such columns. ``measured_on``: only rows with that in a column
    ``measured_on``. ValueError in one sentence: file, line, rule, value, way
    out, for missing columns, two columns of time, texts in place of numbers, and times that are none.
    """
    path = Path(path)
    frame = read_table(path)
    if frame.empty:
        raise ValueError(f"{path} has no rows; measure at least three shapes")
    if measured_on is not None:
        frame = frame[frame["measured_on"] == measured_on]
    times = [name for name in TIMES if name in frame]
    if len(times) != 1:
        found = " and ".join(times) if times else "none of them"
        raise ValueError(f"{path} must have one column of times, {' or '.join(TIMES)}, and has {found}; name the unit in it")
    if "kernel" not in frame:
        if kernel is None:
            raise ValueError(f"{path} has no column 'kernel', so say which it is: one of {', '.join(KERNELS)}")
        frame = frame.assign(kernel=kernel)
    if "variant" not in frame:
        frame = frame.assign(variant=variant)
    frame["variant"] = frame["variant"].astype(object).fillna("").astype(str)
    return tuple(
        _of_kind(path, part, str(name), str(kind), times[0]) for (name, kind), part in frame.groupby(["kernel", "variant"], sort=False)
    )


def _of_kind(path: Path, frame: pd.DataFrame, kernel: str, variant: str, time: str) -> Measurements:
    """Rows of one kernel model."""
    model = kernel_model(kernel, variant)
    missing = [name for name in model.columns if name not in frame]
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]!r} of {kernel}; it needs {', '.join(model.columns)} and a time")
    line = frame.index.to_numpy(dtype=np.int64) + 2  # below the header, counted from 1
    seconds = _numbers(path, frame[time], line, zero=False) * TIMES[time]
    known = [name for name in columns_of(model) if name in model.columns or (name in frame and frame[name].notna().any())]
    shapes: dict[str, NDArray[Any]] = {
        name: frame[name].astype(str).to_numpy() if name in model.texts else _numbers(path, frame[name], line, zero=True) for name in known
    }
    same = groups_of(shapes, known)
    first = np.unique(same, return_index=True)[1]
    if len(first) < len(seconds):
        median = pd.Series(seconds).groupby(same).median().to_numpy(dtype=np.float64)
        shapes = {name: column[first] for name, column in shapes.items()}
        return Measurements(
            model=model, shapes=shapes, seconds=np.asarray(median, dtype=np.float64), line=line[first], repeated=len(seconds) - len(first)
        )
    return Measurements(model=model, shapes=shapes, seconds=seconds, line=line)


def _numbers(path: Path, column: pd.Series[Any], line: NDArray[np.int64], *, zero: bool) -> Array:
    numbers: Array = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    sound = np.isfinite(numbers) & ((numbers >= 0) if zero else (numbers > 0))
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        rule = "at least 0" if zero else "above 0"
        raise ValueError(f"{path}, line {line[row]}: {column.name} must be a number {rule}, not {shown(column.iloc[row])}; correct it")
    return numbers


def calibrate(
    measurements: tuple[Measurements, ...],
    device: Device,
    *,
    seed: int = 0,
    source: str = "",
    date: str = "",
    progress: Callable[[str], object] | None = None,
) -> tuple[Calibration, ...]:
    """A record of ``device`` for each kind of kernel measured. ``progress`` is told each kind as it begins.

    ValueError for fewer rows than a fit needs, and for rows whose time looks like another unit than that of the others.
    """
    records = []
    for each in measurements:
        name = f"{each.model.name} {each.model.variant}".rstrip()
        if progress is not None:
            progress(f"{name}: {len(each)} rows")
        record = fit(each.model, device, each.shapes, each.seconds, seed=seed, source=source, date=date, version=__version__)
        _check_units(each, device, record)
        warnings = record.warnings
        if each.repeated:
            warnings += (f"{each.repeated} rows repeated a shape: their median was taken",)
        records.append(replace(record, warnings=warnings))
    return tuple(records)


def _check_units(each: Measurements, device: Device, record: Calibration) -> None:
    """ValueError for rows that would agree with the others, or all rows with what is known of such devices, in another unit."""
    shipped = record_for(each.model, device)
    likely = each.model.bound(device, each.shapes) if shipped is None else each.model.seconds(device, each.shapes, shipped.values)
    usual = float(np.median(each.seconds / likely))
    if shipped is not None and _another_unit(np.array([usual]))[0]:
        raise ValueError(
            f"{each.model.name} on {device.name}: the times are {usual:.3g} times those that {shipped.device} makes likely, as if all were "
            "in another unit; name the column by the unit that they have"
        )
    ratio = each.seconds / each.model.seconds(device, each.shapes, record.values)
    odd, others = _another_unit(ratio), np.abs(np.log(ratio)) < np.log(10)
    if odd.any() and others.any():
        row = int(np.flatnonzero(odd)[0])
        raise ValueError(
            f"line {each.line[row]}: {each.seconds[row]:.3g} s is {ratio[row]:.3g} times what the other rows make likely, as if it were in "
            f"another unit; give all {int(odd.sum())} such rows in the same unit, or leave them out"
        )


def _another_unit(ratio: Array) -> NDArray[np.bool_]:
    """Whether each ratio is that of two units, within a factor of 2."""
    distance = np.abs(np.log(ratio[:, None] / np.array(ANOTHER_UNIT))).min(axis=1)
    return np.asarray(distance < np.log(2))


def expected_errors(measurements: tuple[Measurements, ...], device: Device, records: tuple[Calibration, ...]) -> pd.DataFrame:
    """What error to expect, a row for each record: of the data sheet alone, of the record that memsplit ships for the device's family
    (missing: there is none), of the new record on its own rows, and on shapes held out."""
    rows = []
    for each, record in zip(measurements, records, strict=True):
        bound = each.model.bound(device, each.shapes)
        shipped = record_for(each.model, device)
        row: dict[str, Any] = {"kernel": record.kernel, "variant": record.variant, "rows": record.fitted.rows, "flagged": record.flagged}
        row["datasheet_mape_pct"] = error_of(bound, each.seconds).mape_pct
        if shipped is not None:
            row["shipped_record"] = shipped.device
            row["shipped_mape_pct"] = error_of(each.model.seconds(device, each.shapes, shipped.values), each.seconds).mape_pct
        row |= {"fitted_mape_pct": record.fitted.mape_pct, "unseen_mape_pct": None, "unseen_median_pct": None}
        if record.unseen is not None:
            row |= {"unseen_mape_pct": record.unseen.mape_pct, "unseen_median_pct": record.unseen.median_pct}
        rows.append(row | {"below_factor": record.ratios[0], "above_factor": record.ratios[-1]})
    return pd.DataFrame(rows)


def parameter_table(measurements: tuple[Measurements, ...], records: tuple[Calibration, ...]) -> pd.DataFrame:
    """A row for each parameter: value, interval, unit and meaning."""
    return pd.DataFrame(
        [
            {"kernel": record.kernel, "variant": record.variant, "parameter": one.name}
            | record.estimates[one.name]._asdict()
            | {"unit": one.unit, "meaning": one.meaning}
            for each, record in zip(measurements, records, strict=True)
            for one in each.model.parameters
        ]
    )


def write_records(path: str | Path, measurements: tuple[Measurements, ...], records: tuple[Calibration, ...]) -> Path:
    """Write the records of one device as TOML, whole or not at all, and return the path."""
    units = {(each.model.name, each.model.variant): {one.name: one.unit for one in each.model.parameters} for each in measurements}
    path = check_writable(path)
    with replacing(path) as temporary:
        temporary.write_text(records_text(records, units), encoding="utf-8")
    return path
