"""Measurements of one's own: a CSV with a row for each measured kernel, read, checked, and fitted into calibration records.

Columns: those of the kernel model (``m, n, k`` of a GEMM), the time as one of ``measured_s``, ``measured_ms``, ``measured_us``, and, if the
file has several kinds, ``kernel`` and ``variant``. A column ``llm`` may name a config.json. Other columns are kept out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import __version__
from ..models.calibration import QUANTILES, Calibration, KernelModel, check_shapes, columns_of, error_of, groups_of
from ..models.calibration_records import record_for, records_text
from ..models.checks import shown
from ..models.device import Device, devices
from ..models.kernel_models import KERNELS, kernel_model
from ..models.roofline import Array
from ..solvers.calibration import FEWEST_ROWS, fit
from .table import check_writable, read_table, replacing

TIMES = {"measured_s": 1.0, "measured_ms": 1e-3, "measured_us": 1e-6}
"""Columns of the measured time, and their seconds."""

ANOTHER_UNIT = (1e-6, 1e-3, 1e3, 1e6)
"""Ratios of measured and predicted time that look like a time in another unit, within a factor of 2."""


MOST_ROWS = 5000
"""Rows that a fit of one's own file takes: more make it slow, and six parameters hardly more certain."""

SCATTER = 0.2
"""Spread of repeated measurements of one shape from which a record warns: more than models are off."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurements:
    """Measured times of one kernel model: columns ``shapes`` [N], ``seconds`` [N], and the ``line`` [N] of each in its file.

    ``repeated``: rows that repeated the shape of another one; their median stands for them. ``scatter`` [R]: time of each row of such a
    shape over that median.
    """

    model: KernelModel
    shapes: dict[str, NDArray[Any]]
    seconds: Array
    line: NDArray[np.int64]
    repeated: int = 0
    scatter: Array = field(default_factory=lambda: np.empty(0))

    def __len__(self) -> int:
        return len(self.seconds)


def read_measurements(
    path: str | Path, *, kernel: str | None = None, variant: str = "", measured_on: str | None = None, device: Device | None = None
) -> tuple[Measurements, ...]:
    """The measurements in a CSV, by kernel and variant in order of appearance; no ``variant`` is the kernel's default one.

    Cells are parted by commas, semicolons or tabs. ``kernel`` and ``variant``: of all rows, where the file has no such columns.
    ``measured_on``: only rows with that in a column ``measured_on``. ``device``: what the rows are said to be of; a column ``device`` that
    no kernel reads must not name another one. ValueError in one sentence: file, line, rule, value, way
    out, for missing columns, two columns of time, texts in place of numbers, and times that are none.
    """
    path = Path(path)
    frame = _table(path)
    if frame.empty:
        raise ValueError(f"{path} has no rows; measure at least three shapes")
    if measured_on is not None:
        frame = frame[frame["measured_on"] == measured_on]
    times = [name for name in TIMES if name in frame]
    if len(times) != 1:
        found = " and ".join(times) if times else f"none of them but {', '.join(map(repr, frame.columns))}{_instead(frame, kernel)}"
        raise ValueError(f"{path} must have one column of times, {' or '.join(TIMES)}, and has {found}; name the unit in it")
    for name, given in (("kernel", kernel), ("variant", variant)):
        if given and name in frame:
            raise ValueError(f"{path} has a column {name!r}, so {name} {shown(given)} for all rows has no effect; leave out one of them")
    if "kernel" not in frame:
        if kernel is None:
            raise ValueError(f"{path} has no column 'kernel', so say which it is: one of {', '.join(KERNELS)}")
        frame = frame.assign(kernel=kernel)
    if "variant" not in frame:
        frame = frame.assign(variant=variant)
    blank = frame.index[frame["kernel"].isna()]
    if len(blank):
        raise ValueError(f"{path}, line {blank[0] + 2}: the kernel is missing; name one of {', '.join(KERNELS)}, or leave the row out")
    texts = {name: frame[name].astype(object).fillna("").astype(str).str.strip() for name in ("kernel", "variant")}
    models = {pair: kernel_model(*pair) for pair in dict.fromkeys(zip(texts["kernel"], texts["variant"], strict=True))}
    # A kernel without a variant is of the default one, whether its name stands in other rows or not.
    kinds = {(model.name, model.variant): model for model in models.values()}
    places = {kind: place for place, kind in enumerate(kinds)}
    named = (models[pair] for pair in zip(texts["kernel"], texts["variant"], strict=True))
    kind_of_row = np.array([places[model.name, model.variant] for model in named])
    return tuple(_of_kind(path, frame[kind_of_row == place], model, times[0], device) for place, model in enumerate(kinds.values()))


def _table(path: Path) -> pd.DataFrame:
    """The rows of a file, names of columns without blanks around them; cells parted by what its first line has most."""
    if path.suffix == ".parquet":
        return read_table(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        separator = max((",", ";", "\t"), key=header.count)
        if separator == ",":
            frame = read_table(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row of more cells than the first would be cut
                warnings.simplefilter("ignore", DeprecationWarning)  # as in read_table, which takes commas only
                frame = pd.read_csv(
                    path, sep=separator, float_precision="round_trip", index_col=False, keep_default_na=False, na_values=[""]
                )
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}; save it as CSV in UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; name a CSV with a row for each measured kernel") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split()).partition("; name a table")[0].removeprefix(f"cannot read {path}: ")
        raise ValueError(f"cannot read {path}: {reason}; save it as a CSV with a header, a row a kernel and no comments") from None
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise ValueError(f"{path} has the column {twice!r} twice but for blanks; rename one of them")
    return frame


def _instead(frame: pd.DataFrame, kernel: str | None) -> str:
    """What columns are likely meant to be called, for a message; nothing if that is not clear."""
    wanted = [*TIMES, *(columns_of(kernel_model(kernel)) if kernel is not None and kernel in KERNELS else ())]
    meant = {name: name.casefold() for name in frame.columns}
    for name, plain in meant.items():
        lead, _, unit = plain.rpartition("_")
        if f"measured_{unit}" in TIMES and lead in ("time", "latency", "duration", "t", "elapsed", "measured", "mean", "avg", "median"):
            meant[name] = f"measured_{unit}"
    renamed = [f"{name} to {plain}" for name, plain in meant.items() if name != plain and plain in wanted]
    return f" (rename {', '.join(renamed)})" if renamed else ""


def _of_kind(path: Path, frame: pd.DataFrame, model: KernelModel, time: str, device: Device | None) -> Measurements:
    """Rows of one kernel model."""
    missing = [name for name in model.columns if name not in frame]
    if missing:
        there = ", ".join(map(repr, frame.columns))
        raise ValueError(
            f"{path} lacks the column {missing[0]!r} of {model.name}; it needs {', '.join(model.columns)} and a time, and has "
            f"{there}{_instead(frame, model.name)}"
        )
    line = frame.index.to_numpy(dtype=np.int64) + 2  # below the header, counted from 1
    if device is not None and "device" in frame and "device" not in columns_of(model):
        _check_device(path, frame["device"], line, device)
    seconds = _numbers(path, frame[time], line, zero=False) * TIMES[time]
    known = [name for name in columns_of(model) if name in model.columns or (name in frame and frame[name].notna().any())]
    shapes: dict[str, NDArray[Any]] = {
        name: frame[name].astype(str).to_numpy() if name in model.texts else _numbers(path, frame[name], line, zero=True) for name in known
    }
    same = groups_of(shapes, known)
    first = np.unique(same, return_index=True)[1]
    if len(first) < len(seconds):
        median = pd.Series(seconds).groupby(same).median().to_numpy(dtype=np.float64)
        again = np.bincount(same)[same] > 1
        return Measurements(
            model=model,
            shapes={name: column[first] for name, column in shapes.items()},
            seconds=np.asarray(median, dtype=np.float64),
            line=line[first],
            repeated=len(seconds) - len(first),
            scatter=np.asarray((seconds / median[same])[again], dtype=np.float64),
        )
    return Measurements(model=model, shapes=shapes, seconds=seconds, line=line)


def _check_device(path: Path, column: pd.Series[Any], line: NDArray[np.int64], device: Device) -> None:
    """ValueError for rows that another device is said to have run; texts as "cuda:0" say nothing."""
    names = column.astype(object).fillna("").astype(str).str.strip()
    mine = {name.casefold() for name in (device.name, *device.aliases, "")}
    known = {alias.casefold(): one.name for one in devices().values() for alias in (one.name, *one.aliases)}
    named = any(name and name.casefold() in mine for name in set(names))  # then any other text is another device, known or not
    for row, name in enumerate(names):
        if name.casefold() not in mine and (named or name.casefold() in known):
            raise ValueError(
                f"{path}, line {line[row]}: the device is {shown(name)}, and the records are to be of {device.name}; keep rows of one "
                "device in a file, and name that one"
            )


def _numbers(path: Path, column: pd.Series[Any], line: NDArray[np.int64], *, zero: bool) -> Array:
    numbers: Array = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    sound = np.isfinite(numbers) & ((numbers >= 0) if zero else (numbers > 0))
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        rule = "at least 0" if zero else "above 0"
        value = column.iloc[row]
        given = "an empty cell" if pd.isna(value) else shown(value)
        raise ValueError(f"{path}, line {line[row]}: {column.name} must be a number {rule}, not {given}; correct it")
    return numbers


def calibrate(
    measurements: tuple[Measurements, ...],
    device: Device,
    *,
    seed: int = 0,
    source: str = "",
    date: str = "",
    progress: Callable[[str], object] | None = None,
    most_rows: int | None = MOST_ROWS,
) -> tuple[Calibration, ...]:
    """A record of ``device`` for each kind of kernel measured. ``progress`` is told each kind as it begins.

    Of more than ``most_rows`` rows (None: no limit) that many are fitted, of as many shapes as can be, drawn by ``seed``. Repeated rows
    are fitted by their medians; by how much rows scatter around these widens the record's ``ratios``: quantiles of both are multiplied,
    which is never narrower than if both were independent. ValueError for fewer rows than a fit needs, for more rows that beat the
    data sheet than do not, and for rows whose time looks like another unit than that of the others.
    """
    records = []
    for each in measurements:
        name = f"{each.model.name} {each.model.variant}".rstrip()
        if progress is not None:
            progress(f"{name}: {len(each)} rows")
        _check_bound(each, device)
        chosen = _sample(each, most_rows, seed)
        shapes = {column: values[chosen] for column, values in each.shapes.items()}
        record = fit(each.model, device, shapes, each.seconds[chosen], seed=seed, source=source, date=date, version=__version__)
        _check_units(each, device, record, source)
        notes, ratios = record.warnings, record.ratios
        if len(chosen) < len(each):
            notes += (f"{len(chosen)} of {len(each)} rows were fitted, drawn with seed {seed}",)
        if each.repeated:
            notes += (f"{each.repeated} rows repeated a shape: their median was taken",)
            scatter = np.quantile(each.scatter, QUANTILES)
            if record.unseen is not None:
                ratios = tuple((np.array(ratios) * scatter).tolist())
            spread = float(scatter[-1] / scatter[0] - 1)
            if spread > SCATTER:
                notes += (f"repeated rows of one shape differ by {100 * spread:.0f} % (5th to 95th percentile): measure anew",)
        records.append(replace(record, warnings=notes, ratios=ratios))
    return tuple(records)


def _sample(each: Measurements, most: int | None, seed: int) -> NDArray[np.int64]:
    """Places of all rows, or of ``most`` of them: first one of every shape in a random order, then a second one, and so on."""
    number = len(each)
    if most is None or number <= most:
        return np.arange(number)
    random = np.random.default_rng(seed)
    groups = groups_of(each.shapes, each.model.group)
    order = random.permutation(number)
    turn = pd.Series(groups[order]).groupby(groups[order]).cumcount().to_numpy()
    shape_order = random.permutation(int(groups.max()) + 1)[groups[order]]
    return np.sort(order[np.lexsort((shape_order, turn))][:most])


def _check_bound(each: Measurements, device: Device) -> None:
    """ValueError where more rows beat the data sheet than do not: these are no measurements of that kernel on that device."""
    beaten = int((each.seconds < each.model.bound(device, check_shapes(each.model, each.shapes))).sum())
    if 2 * beaten > len(each) and len(each) - beaten >= FEWEST_ROWS:
        name = f"{each.model.name} {each.model.variant}".rstrip()
        raise ValueError(
            f"{beaten} of {len(each)} rows of {name} beat the data sheet of {device.name}, which no device does; correct the kernel, its "
            "variant, the unit of the times, or the device"
        )


def _check_units(each: Measurements, device: Device, record: Calibration, source: str) -> None:
    """ValueError for rows that would agree with the others, or all rows with what is known of such devices, in another unit."""
    file = f"{source}: " if source else ""
    shipped = record_for(each.model, device)
    likely = each.model.bound(device, each.shapes) if shipped is None else _predicted(each, device, shipped)
    usual = float(np.median(each.seconds / likely))
    if shipped is not None and _another_unit(np.array([usual]))[0]:
        raise ValueError(
            f"{file}{each.model.name} on {device.name}: the times are {usual:.3g} times those that {shipped.device} makes likely, as if "
            "all were in another unit; name the column by the unit that they have"
        )
    ratio = each.seconds / each.model.seconds(device, each.shapes, record.values)
    odd, others = _another_unit(ratio), np.abs(np.log(ratio)) < np.log(10)
    if odd.any() and others.any():
        # What is off by a factor between two units counts, too: the fit is drawn to such rows.
        odd = (ratio > np.sqrt(1e3)) | (ratio < np.sqrt(1e-3)) | odd
        row = int(np.flatnonzero(odd)[0])
        raise ValueError(
            f"{file}line {each.line[row]}: {each.seconds[row]:.3g} s is {ratio[row]:.3g} times what the other rows make likely, as if it "
            f"were in another unit; give all {int(odd.sum())} such rows in the same unit, or leave them out"
        )


def _predicted(each: Measurements, device: Device, record: Calibration) -> Array:
    """Seconds [N] by a record, which may be of another device."""
    return record.predict(each.model, device, each.shapes).seconds


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
            row["shipped_mape_pct"] = error_of(_predicted(each, device, shipped), each.seconds).mape_pct
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
