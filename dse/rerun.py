"""Price or explain a row of a table again, from the JSON beside it and memsplit's own classes; no code of the table's author is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..models.design_table import WORKLOAD_COLUMNS
from ..models.systems import column_place
from .explain import Explanation, explain
from .mapping_score import MappingScore
from .offload_score import OffloadScore
from .plan_score import PlanScore
from .step_sweep import MORE_COLUMNS
from .table import read_designs, read_table

SCORES: tuple[type[MappingScore] | type[OffloadScore], ...] = (MappingScore, OffloadScore)
"""The scores of explorations whose rows can be priced again; which one it was, the names of its settings tell."""


def rerun(path: str | Path, row: int = 0) -> pd.DataFrame:
    """Price row ``row`` (from 0) of a table that ``write_csv`` or ``sweep`` wrote again, from the JSON beside it.

    One line a column of the score: column, written, again, and ``same``: whether the two are equal, to the last bit (a cell that is empty
    in the file is equal to no text and to no number). ValueError, in one sentence, if the files are damaged, have no such row, or hold
    settings of no score that memsplit has, and if a swept table lost a column of its designs.
    """
    table, score, design = _stored(path, row)
    try:
        if hasattr(score, "design"):
            found = score({name: np.array([value]) for name, value in design.items()})
            again = {name: column[0] for name, column in found.items()}
        else:
            again = score(design)
    except (TypeError, AttributeError) as error:  # values of another type than the code that wrote them
        raise ValueError(f"the design of row {row} in the JSON beside {path} is damaged: {error}; write the table again") from None
    if again is None:
        raise ValueError(f"{path}: the design of row {row} fits no more; the file was changed, or memsplit was")
    columns = [name for name in again if name in table]
    written = [table.loc[row, name] for name in columns]
    frame = pd.DataFrame({"column": columns, "written": written, "again": [again[name] for name in columns]})
    frame["same"] = [_same(one, again[name]) for one, name in zip(written, columns, strict=True)]
    return frame


def _same(written: Any, again: Any) -> bool:
    """Whether a cell of a file says what was priced again; a file has one way to write that there is nothing."""
    if _empty(written) or _empty(again):
        return _empty(written) and _empty(again)
    return bool(written == again)


def _empty(cell: Any) -> bool:
    return cell is None or cell == "" or bool(pd.isna(cell))


def explain_row(path: str | Path, row: int = 0, *, step: float = 1.0) -> tuple[Explanation, ...]:
    """``explain`` for row ``row`` (from 0) of such a table: one Explanation for each problem that its score solves.

    ValueError, in one sentence, as ``rerun``, and for a score that has no plan to explain.
    """
    _, score, design = _stored(path, row)
    if not hasattr(score, "problems"):
        raise ValueError(f"{type(score).__name__} has no plan to explain: it estimates, and solves no problem")
    solver = getattr(score, "solver", None)
    try:
        problems = score.problems(design)
        plan = score.plan(design) if hasattr(score, "plan") else None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the design of row {row} in the JSON beside {path} is damaged: {error}; write the table again") from None
    # A score's own solver is that of its first problem.
    return tuple(explain(problem, plan, solver=None if number else solver, step=step) for number, problem in enumerate(problems))


def _stored(path: str | Path, row: int) -> tuple[pd.DataFrame, Any, Any]:
    """The table, the score, and the design of a row: of a sweep the row's own design columns, else what the JSON holds."""
    table = read_table(path)
    if not 0 <= row < len(table):
        raise ValueError(f"{path} has {len(table)} rows, counted from 0, and no row {row}")
    if "design" not in table:
        score, columns = _sweep_score(path)
        lost = [name for name in columns if name not in table]
        if lost:
            raise ValueError(f"{path} has no column {lost[0]!r}, which its designs were swept with; name it as it was, or sweep again")
        return table, score, _design_columns(score, table, row)
    stored = read_designs(path)
    key = str(table.loc[row, "design"])
    if key not in stored["designs"]:
        raise ValueError(f"{path}: design {key!r} of row {row} is not in the JSON beside it; the two files do not belong together")
    score = stored["settings"].get("score") if isinstance(stored["settings"], Mapping) else None
    return table, score if isinstance(score, PlanScore) else _score(path, stored["settings"]), stored["designs"][key]


def _sweep_score(path: str | Path) -> tuple[Any, list[str]]:
    """The score of a sweep, and the names of its design columns; none if an earlier version wrote the file, which kept no names."""
    without = f"{path} has no column 'design', so its rows cannot be rerun; name a table of explored or swept designs"
    if not Path(path).with_suffix(".json").exists():
        raise ValueError(without)
    settings = read_designs(path)["settings"]
    if isinstance(command := settings.get("command"), str):
        raise ValueError(f"{path} holds measurements, which are not rerun row by row; measure again with: {' '.join(command.split())}")
    score, columns = settings.get("score"), settings.get("columns", [])
    if isinstance(score, str):
        raise ValueError(f"the score {score!r} of {path} is no class of memsplit, and only those are run again; use the code that swept it")
    if not (is_dataclass(score) and callable(score) and hasattr(score, "design")):
        raise ValueError(without)
    if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) for name in columns):
        raise ValueError(f"the names of design columns in the JSON beside {path} are damaged; write the table again")
    return score, list(columns)


def _design_columns(score: Any, table: pd.DataFrame, row: int) -> dict[str, Any]:
    """The cells of a swept row that say its design: numbers of the score's System, and of the workload."""
    found = {}
    for name in map(str, table.columns):
        if name not in (*WORKLOAD_COLUMNS, *MORE_COLUMNS):
            try:
                column_place(score.system, name)
            except ValueError:
                continue
        found[name] = table.loc[row, name]
    return found


def _score(path: str | Path, settings: Mapping[str, Any]) -> Any:
    """The score whose fields the settings are; those that a later version has added keep their defaults."""
    for score in SCORES:
        known = {field.name: field for field in fields(score)}
        needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
        if settings and needed <= settings.keys() <= known.keys():
            return score(**settings)
    raise ValueError(f"the JSON beside {path} holds no settings of a score of memsplit, but {sorted(settings)}")
