"""Record a front in an Optuna study, for Optuna's dashboard and plots; what a sweep priced never needs to pass through Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import __version__
from ..models.checks import shown
from ._storage import open_storage, open_study, plain_score, reaching
from .pareto import Objective, minimised

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage


def record(
    frame: pd.DataFrame, objectives: Sequence[Objective], parameters: Sequence[str], *, storage: str | Path | BaseStorage, name: str
) -> int:
    """Add the rows of ``frame`` as finished trials to the new study ``name`` in ``storage`` (as in ``explore``); how many there are.

    ``parameters``: the columns of the design, numbers or texts; all other columns become the trials' user attributes. A trial takes about
    0.5 ms, so this is for fronts, not for all rows of a sweep. ValueError for columns that are not there, for a row without a value in an
    objective or with anything but numbers, texts and truth values in a parameter, and for a name that is taken.
    """
    from optuna.trial import TrialState, create_trial

    values = minimised(frame, objectives)
    missing = [column for column in parameters if column not in frame.columns]
    if missing or not parameters:
        raise ValueError(f"parameters must be columns of the table, {list(frame.columns)}, not {missing or 'none'}")
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values).any(axis=1))[0])
        raise ValueError(f"row {row} has no value in an objective; record rows that are feasible")
    for column in parameters:
        _check_parameter(frame[column])
    for column in frame.columns.difference([*parameters, *(objective.name for objective in objectives)], sort=False):
        _check_attribute(frame[column])
    opened, where = open_storage(storage)
    study = open_study(opened, where, name, objectives, {"mode": "recorded", "memsplit": __version__})
    with reaching(where):
        if study.get_trials(deepcopy=False):
            raise ValueError(f"study {name!r} has trials already; choose another name")
    names = [objective.name for objective in objectives]
    distributions = {column: _distribution(frame[column]) for column in parameters}
    rest = [column for column in frame.columns if column not in (*parameters, *names)]
    trials = [
        create_trial(
            state=TrialState.COMPLETE,
            values=[row[column] for column in names],
            params={column: row[column] for column in parameters},
            distributions=distributions,
            user_attrs=plain_score({column: row[column] for column in rest}),
        )
        for row in ({str(column): _plain(value) for column, value in line.items()} for line in frame.to_dict("records"))
    ]
    with reaching(where):
        study.add_trials(trials)
    return len(trials)


def _check_parameter(column: pd.Series[Any]) -> None:
    """ValueError naming the row and the column of the first value that no study can hold."""
    for row, value in enumerate(map(_plain, column)):
        if not isinstance(value, (str, bool, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(
                f"row {row}: parameter {column.name!r} must be a finite number, a text or a truth value, not {shown(value)}; "
                "convert the column, or leave it out of parameters"
            )


def _check_attribute(column: pd.Series[Any]) -> None:
    """ValueError naming the row and the column of the first value that no JSON can hold."""
    for row, value in enumerate(map(_plain, column)):
        try:
            plain_score({str(column.name): value})
        except ValueError:
            raise ValueError(
                f"row {row}: column {str(column.name)!r} must hold numbers, texts and lists, not {shown(value)}; convert or drop it"
            ) from None


def _distribution(column: pd.Series[Any]) -> BaseDistribution:
    """The range of a parameter's values."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return CategoricalDistribution(tuple(dict.fromkeys(map(_plain, column))))
    low, high = _plain(column.min()), _plain(column.max())
    return IntDistribution(low, high) if pd.api.types.is_integer_dtype(column) else FloatDistribution(float(low), float(high))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
