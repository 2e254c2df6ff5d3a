"""Calibration: cost models of kernels with a few parameters, and records of what measurements say about these.

A kernel model is a formula of a device's data sheet, of shapes, and of at most six parameters that mean something (shares of a peak,
seconds of a launch). A record holds the values that ``solvers.calibration.fit`` found for one device, with what is needed to judge them:
the data, intervals, errors on rows that were fitted and on rows that were held out, and warnings. A record says how wrong a prediction may
be: quantiles of measured / predicted over the held-out rows.

``datasheet`` is the profile without a record: every rate reached, no overhead, a lower bound. ``calibrated`` is one with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_name, check_number, shown, whole
from .device import Device, devices
from .roofline import Array

Shapes = Mapping[str, NDArray[Any]]
"""Columns [N] of N rows: sizes as numbers, names as texts."""

MOST_PARAMETERS = 6
"""Parameters of a kernel model: more cannot be told apart by the data that a person has."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of measured / predicted, which records keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a kernel model: between ``low`` and ``high`` [unit], sought from ``start``.

    It is fitted on a logarithmic scale, or on a linear one if ``low`` is 0. ``meaning``: in one sentence.
    """

    name: str
    unit: str
    low: float
    high: float
    start: float
    meaning: str

    def __post_init__(self) -> None:
        check_name("parameter", self.name)
        what = f"parameter {self.name!r}"
        for name in ("low", "start"):
            check_number(what, name, getattr(self, name), self.unit, zero=True, infinite=False)
        check_number(what, "high", self.high, self.unit, infinite=False)
        if not self.low <= self.start <= self.high or self.low == self.high:
            raise ValueError(f"{what}: low, start and high must rise, not {self.low!r}, {self.start!r} and {self.high!r}")
        check_name(f"{what}: meaning", self.meaning)


class KernelModel(Protocol):
    """Seconds of a kind of kernel, as an array function of a device, of shapes and of a few parameters."""

    @property
    def name(self) -> str:
        """The kind of kernel, as "gemm"."""
        ...

    @property
    def variant(self) -> str:
        """What else is fitted apart (precision, back-end); "" for nothing."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of ``Shapes`` that it reads."""
        ...

    @property
    def texts(self) -> tuple[str, ...]:
        """Those of ``columns`` that are names and not numbers."""
        ...

    @property
    def group(self) -> tuple[str, ...]:
        """Columns whose distinct values are the shapes of cross validation."""
        ...

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """At most ``MOST_PARAMETERS``."""
        ...

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N] with these ``values`` of the parameters; never below ``bound``."""
        ...

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes and of the FLOPs, each at the rate of the data sheet."""
        ...

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] that the data sheet rules out to beat: the larger of ``work``."""
        ...


class Estimate(NamedTuple):
    """A fitted value, and the interval within which it lies with 90 % confidence."""

    value: float
    low: float
    high: float


class Error(NamedTuple):
    """How far predictions were from measurements: ``rows``, and of predicted / measured - 1 in per cent the mean and the median of its
    size, the size that 90 % of the rows are below, and the mean with its sign. ``below_bound``: rows that beat the data sheet."""

    rows: int
    mape_pct: float
    median_pct: float
    p90_pct: float
    bias_pct: float
    below_bound: int = 0


def error_of(predicted: ArrayLike, measured: ArrayLike, bound: ArrayLike | None = None) -> Error:
    """The error of ``predicted`` [N] s against ``measured`` [N] s; ValueError for no rows."""
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if guess.shape != truth.shape or guess.ndim != 1 or not len(guess):
        raise ValueError(f"an error needs a prediction for each of one or more measurements, not {guess.shape} for {truth.shape}")
    relative = guess / truth - 1
    size = np.abs(relative)
    return Error(
        rows=len(size),
        mape_pct=float(100 * size.mean()),
        median_pct=float(100 * np.median(size)),
        p90_pct=float(100 * np.percentile(size, 90)),
        bias_pct=float(100 * relative.mean()),
        below_bound=0 if bound is None else int((truth < np.asarray(bound, dtype=np.float64)).sum()),
    )


class Interval(NamedTuple):
    """Seconds [N] of a prediction, and the ends between which nine of ten measurements are expected."""

    seconds: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What measurements of one device say about the parameters of one kernel model.

    ``device`` it was fitted on; ``kernel`` and ``variant`` of the model. ``estimates`` by parameter. ``fitted``: error on the rows that
    were fitted; ``unseen``: on rows of shapes held out, by cross validation (None: too few shapes). ``ratios``: ``QUANTILES`` of measured /
    predicted over the held-out rows, 1 where there are none. ``flagged``: rows left out because they beat the data sheet. ``warnings``:
    what does not follow from the data. ``source`` of the data, ``date`` of the fit, ``version`` of memsplit.
    """

    device: str
    family: str
    kernel: str
    variant: str = ""
    estimates: Mapping[str, Estimate]
    fitted: Error
    unseen: Error | None = None
    folds: int = 0
    ratios: tuple[float, ...] = (1.0,) * len(QUANTILES)
    flagged: int = 0
    warnings: tuple[str, ...] = ()
    source: str = ""
    date: str = ""
    version: str = ""

    def __post_init__(self) -> None:
        for name in ("device", "family", "kernel"):
            check_name(f"calibration: {name}", getattr(self, name))
        what = f"calibration of {self.kernel} on {self.device}"
        estimates = {name: Estimate(*map(float, values)) for name, values in self.estimates.items()}
        for name, estimate in estimates.items():
            for end in estimate:
                check_number(what, name, end, "see the kernel model", zero=True, infinite=False)
        object.__setattr__(self, "estimates", estimates)
        object.__setattr__(self, "folds", whole(what, "folds", self.folds, "folds", least=0))
        object.__setattr__(self, "flagged", whole(what, "flagged", self.flagged, "rows", least=0))
        ratios = tuple(map(float, self.ratios))
        if len(ratios) != len(QUANTILES) or any(not 0 < ratio < math.inf for ratio in ratios) or list(ratios) != sorted(ratios):
            raise ValueError(f"{what}: ratios must be {len(QUANTILES)} rising numbers above 0, not {shown(ratios)}; fit again")
        object.__setattr__(self, "ratios", ratios)
        object.__setattr__(self, "warnings", tuple(self.warnings))

    @property
    def values(self) -> dict[str, float]:
        """Values of the parameters by name."""
        return {name: estimate.value for name, estimate in self.estimates.items()}

    def values_on(self, model: KernelModel, device: Device) -> dict[str, float]:
        """Values of the parameters on ``device``, which may be another one of the family.

        What is about architecture carries over. What is about the power that a card may draw (``of_power`` of a model, as ``throttle`` of
        a GEMM) does not on a device with more watts for each FLOP/s than the measured one (beyond ``SAME_POWER``), or where a data sheet
        does not say: its neutral value, the low end of its range, stands in, and predictions of long products are then optimistic. On a
        device with fewer watts for each FLOP/s the measured value is kept: how much more that one slows down, nothing here says.
        """
        values = self.values
        if device.name != self.device:
            given, measured = _watts_per_flop(device), _watts_per_flop(devices().get(self.device))
            if given is None or measured is None or given > SAME_POWER * measured:
                neutral = {one.name: one.low for one in model.parameters if one.name in getattr(model, "of_power", ())}
                values |= neutral
        return values

    def predict(self, model: KernelModel, device: Device, shapes: Shapes) -> Interval:
        """Seconds with an interval in which nine of ten measurements are expected; ValueError if the record is of another model.

        On another device than the measured one with ``values_on`` that.

        On the device that was fitted the interval is that of the held-out rows. On another one of the family it is ``TRANSFER`` times as
        wide, on a logarithmic scale. From the data sheet's bound to infinity where nothing is known: a record without held-out rows, and
        another device for a model whose records do not carry over (``transfers``). No end is below the bound.
        """
        self.check(model)
        seconds, bound = model.seconds(device, shapes, self.values_on(model, device)), model.bound(device, shapes)
        own = device.name == self.device and not getattr(model, "any_device", False)
        if self.unseen is None or not (own or getattr(model, "transfers", True)):
            return Interval(seconds=seconds, low=bound, high=np.full_like(seconds, np.inf))
        wide = 1.0 if own else TRANSFER
        low, high = self.ratios[0] ** wide, self.ratios[-1] ** wide
        return Interval(seconds=seconds, low=np.maximum(seconds * min(low, 1.0), bound), high=np.maximum(seconds * max(high, 1.0), bound))

    def check(self, model: KernelModel) -> None:
        """ValueError if this is no record of that model."""
        if self.kernel not in (model.name, getattr(model, "fitted_as", model.name)) or model.variant != self.variant:
            asked = f"{model.name} {model.variant}".strip()
            raise ValueError(f"this is a record of {self.kernel} {self.variant}".rstrip() + f", not of {asked}; name another record")
        names = {parameter.name for parameter in model.parameters}
        if names != set(self.estimates):
            odd = sorted(names ^ set(self.estimates))[0]
            raise ValueError(f"the record of {self.kernel} on {self.device} and the model differ in the parameter {odd!r}; fit it again")


SAME_POWER = 1.1
"""Ratio of watts for each FLOP/s up to which a device slows down in long products as another one of its family: an assumption."""


def _watts_per_flop(device: Device | None) -> float | None:
    """Power for each FLOP/s of 16-bit products; None where the data sheet does not say."""
    if device is None or device.power is None or "bf16" not in device.peaks:
        return None
    return device.power / device.peaks["bf16"]


TRANSFER = 2.0
"""How much wider an interval is on a device of the family that was not measured: an assumption. ``memsplit study fidelity --data`` says how
many rows were inside: with it more than nine of ten for kernels of H100 and H200, fewer for products of Ampere with GDDR memory."""


def columns_of(model: KernelModel) -> tuple[str, ...]:
    """The columns that ``model`` reads, and after them those that may be left out (``optional``)."""
    return (*model.columns, *getattr(model, "optional", ()))


def check_shapes(model: KernelModel, shapes: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
    """``shapes`` as columns of one length that ``model`` can read, others left out.

    ValueError names a column that is missing, no number, below 0, or below 1 where the model counts with at least one (``counts``), and
    heads that no LLM has. A model may check more, or replace what it reads (``checked``).
    """
    found: dict[str, NDArray[Any]] = {}
    for name in columns_of(model):
        if name not in shapes:
            if name not in model.columns:
                continue
            raise ValueError(f"{model.name}: the column {name!r} is missing; it needs {', '.join(model.columns)}")
        column = np.atleast_1d(np.asarray(shapes[name]))
        if name not in model.texts:
            least = 1 if name in getattr(model, "counts", ()) else 0
            if column.dtype.kind not in "iufb":
                raise ValueError(f"{model.name}: column {name!r} must have numbers, not {shown(column[0]) if len(column) else 'none'}")
            column = column.astype(np.float64)
            sound = np.isfinite(column) & (column >= least)
            if not sound.all():
                raise ValueError(f"{model.name}: column {name!r} must have numbers of at least {least}, not {shown(column[~sound][0])}")
        found[name] = column
    rows = max((len(column) for column in found.values()), default=0)
    wrong_length = [name for name, column in found.items() if len(column) not in (1, rows)]
    if wrong_length:
        raise ValueError(f"{model.name}: column {wrong_length[0]!r} must have 1 or {rows} rows, not {len(found[wrong_length[0]])}")
    found = {name: np.broadcast_to(column, rows) for name, column in found.items()}
    if {"heads", "kv_heads"} <= set(found):
        _check_heads(model, found["heads"], found["kv_heads"])
    checked = getattr(model, "checked", None)
    return found if checked is None else dict(checked(found))


def _check_heads(model: KernelModel, heads: NDArray[Any], kv_heads: NDArray[Any]) -> None:
    """ValueError unless each key-value head serves one and the same whole number of query heads."""
    sound = (heads >= 1) & (kv_heads >= 1) & (np.fmod(heads, np.maximum(kv_heads, 1.0)) == 0)
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise ValueError(
            f"{model.name}: heads must be a multiple of kv_heads, both at least 1, not {heads[row]:g} and {kv_heads[row]:g}; correct them"
        )


def groups_of(shapes: Shapes, names: Sequence[str]) -> NDArray[np.int64]:
    """The number [N] of each row's shape, counted from 0 in the order in which shapes appear."""
    keys: dict[tuple[Any, ...], int] = {}
    rows = zip(*(shapes[name].tolist() for name in names), strict=True)
    return np.array([keys.setdefault(row, len(keys)) for row in rows], dtype=np.int64)
