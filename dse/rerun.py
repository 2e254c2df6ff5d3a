"""Price a row of an exploration again, from the JSON beside its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from .mapping_score import MappingScore
from .offload_score import OffloadScore
from .table import read_designs

SCORES: tuple[type[MappingScore] | type[OffloadScore], ...] = (MappingScore, OffloadScore)
"""The scores whose rows can be priced again; which one it was, the names of its settings tell."""


def rerun(path: str | Path, row: int = 0) -> pd.DataFrame:
    """Price row ``row`` (from 0) of a table that ``write_csv`` wrote with designs again, from the JSON beside it.

    One line a column of the score: column, written, again. ValueError, in one sentence, if the files are damaged, have no such row,
    or hold settings of no score that memsplit has.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; name a CSV that write_csv wrote") from None
    if "design" not in table:
        raise ValueError(f"{path} has no column 'design', so its rows cannot be rerun; name a table of explored designs")
    if not 0 <= row < len(table):
        raise ValueError(f"{path} has {len(table)} rows, counted from 0, and no row {row}")
    stored = read_designs(path)
    key = str(table.loc[row, "design"])
    if key not in stored["designs"]:
        raise ValueError(f"{path}: design {key!r} of row {row} is not in the JSON beside it; the two files do not belong together")
    score = _score(path, stored["settings"])
    again = score(stored["designs"][key]) or {}
    columns = [name for name in again if name in table]
    return pd.DataFrame(
        {"column": columns, "written": [table.loc[row, name] for name in columns], "again": [again[name] for name in columns]}
    )


def _score(path: str | Path, settings: Mapping[str, Any]) -> Callable[[Any], dict[str, Any] | None]:
    for score in SCORES:
        if {field.name for field in fields(score)} == set(settings):
            return score(**settings)
    raise ValueError(f"the JSON beside {path} holds no settings of a score of memsplit, but {sorted(settings)}")
