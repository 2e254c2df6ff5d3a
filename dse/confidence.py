"""Whether two designs differ by more than the cost model's error, as calibration records know it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..models.calibration import Calibration, KernelModel
from ..models.checks import shown
from ..models.roofline import Array
from ..solvers.calibration import CONFIDENCE
from .pareto import Objective, minimised

Errors = Mapping[str, Calibration]
"""The record behind a column, by the column's name."""


def check_errors(errors: Errors, columns: Sequence[str]) -> None:
    """ValueError unless each record is one, of one of the ``columns``."""
    if not isinstance(errors, Mapping):
        raise ValueError(f"errors must be a dict of records by the names of columns, as in {{'latency_s': record}}, not {shown(errors)}")
    for name, record in errors.items():
        if name not in columns:
            raise ValueError(f"errors: there is no column {name!r}; columns are {', '.join(columns)}")
        if not isinstance(record, Calibration):
            raise ValueError(f"errors: {name!r} needs a Calibration, as record_for gives it, not {shown(record)}")


def resolution(record: Calibration) -> float:
    """The factor by which two predictions must differ to be told apart: above 1.

        exp(sqrt(2) (ln q95 - ln q05) / 2)          q: quantiles of measured / predicted on shapes held out

    The errors of both are taken as independent and of a record's usual size, at 90 %. That is cautious: designs that resemble each other
    are wrong in the same direction. A record without held-out rows tells nothing apart (infinity).
    """
    if record.unseen is None:
        return math.inf
    return math.exp(math.sqrt(2) * (math.log(record.ratios[-1]) - math.log(record.ratios[0])) / 2)


def error_bars(frame: pd.DataFrame, errors: Errors) -> pd.DataFrame:
    """``frame`` with two more columns for each of ``errors``, between which nine of ten measurements are expected: ``latency_low_s`` and
    ``latency_high_s`` for ``latency_s``. ValueError for a column that is not there, or for one of the new ones that is."""
    check_errors(errors, list(map(str, frame.columns)))
    check_free(frame.columns, ends_of(errors))
    added = {}
    for name, record in errors.items():
        known = record.unseen is not None
        for end, ratio in (("low", record.ratios[0]), ("high", record.ratios[-1])):
            added[_with(name, end)] = frame[name] * ratio if known else pd.Series(math.nan, index=frame.index)
    return frame.assign(**added)


def ends_of(errors: Errors) -> tuple[str, ...]:
    """The names of the columns that ``error_bars`` adds."""
    return tuple(_with(name, end) for name in errors for end in ("low", "high"))


def check_free(columns: Iterable[str], added: Iterable[str]) -> None:
    """ValueError if a column that is to be ``added`` is among the ``columns`` already."""
    taken = set(columns)
    twice = next((name for name in added if name in taken), None)
    if twice is not None:
        raise ValueError(f"errors: a column {twice!r} is to be added, and there is one of that name already; rename yours")


def _with(name: str, end: str) -> str:
    """("latency_s", "low") -> "latency_low_s": a column's unit stays its last word."""
    words, _, unit = name.rpartition("_")
    return f"{words}_{end}_{unit}" if words else f"{name}_{end}"


def told_apart(frame: pd.DataFrame, objectives: Sequence[Objective], errors: Errors) -> pd.Series[bool]:
    """For each row, whether no other one could stand in for it.

    Another row could, if it is better in some objective, in none that is exact worse, and within the model's error (``resolution``) in
    all that have a record in ``errors``. So a row that is dominated beyond the error is told apart, and so is a front's row that is best by
    more than it; of rows that only the error separates, the best one is. Rows without a value in an objective are False.
    """
    values = minimised(frame, objectives)
    check_errors(errors, [objective.name for objective in objectives])
    factors = [resolution(errors[one.name]) if one.name in errors else None for one in objectives]
    known = np.asarray(~np.isnan(values).any(axis=1))
    apart = known.copy()
    for row in np.flatnonzero(known):
        alike, better = known.copy(), np.zeros(len(values), dtype=np.bool_)
        for column, factor in enumerate(factors):
            mine, others = values[row, column], values[:, column]
            better |= others < mine
            if factor is None:
                alike &= others <= mine
            elif math.isfinite(factor):  # sizes, as maximised columns have changed their sign; no factor makes something of 0
                size, sizes = abs(mine), np.abs(others)
                alike &= (np.maximum(size, sizes) <= np.minimum(size, sizes) * factor) & (np.sign(others) == np.sign(mine))
        apart[row] = not (alike & better).any()
    return pd.Series(apart, index=frame.index, name="told_apart")


def draws(record: Calibration, model: KernelModel, number: int, *, seed: int = 0) -> dict[str, Array]:
    """``number`` values of each parameter from its interval, and as ``"error"`` so many factors of measured / predicted.

    Parameters are log-normal (normal if their interval begins at 0) with 90 % between the ends of the interval, and kept in the model's
    range; each is drawn alone, so that combinations are wider than the data allow. Factors are log-normal on either side of the record's
    median, through its quantiles of 5 and 95 %; 1 without held-out rows.
    """
    record.check(model)
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for parameter in model.parameters:
        value, low, high = record.estimates[parameter.name]
        normal = random.standard_normal(number)
        if low > 0:
            drawn = value * np.exp(normal * (math.log(high) - math.log(low)) / (2 * CONFIDENCE))
        else:
            drawn = value + normal * (high - low) / (2 * CONFIDENCE)
        found[parameter.name] = np.clip(drawn, parameter.low, parameter.high)
    low, middle, high = (math.log(record.ratios[place]) for place in (0, len(record.ratios) // 2, -1))
    normal = random.standard_normal(number)
    found["error"] = np.exp(middle + normal * np.where(normal < 0, middle - low, high - middle) / CONFIDENCE)
    return found


def ranking(measured: ArrayLike, predicted: ArrayLike) -> tuple[float, float]:
    """Kendall's tau of the order of ``predicted`` [N] rates against that of ``measured`` [N] ones, and the share of the best measured rate
    that is lost by taking what is predicted to be best. More is better in both; ValueError for fewer than two."""
    from scipy.stats import kendalltau

    truth, guess = np.asarray(measured, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.shape != guess.shape or truth.ndim != 1 or len(truth) < 2:
        raise ValueError(f"a ranking needs two or more measured rates and as many predicted ones, not {truth.shape} and {guess.shape}")
    return float(kendalltau(truth, guess).statistic), float(1 - truth[int(guess.argmax())] / truth.max())
