"""Arguments that ``explore`` and ``sweep`` share; each is refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..models.checks import shown
from .pareto import Objective, check_objectives


def objectives_of(what: str, given: object) -> tuple[Objective, ...]:
    """Objectives, at least one and each of another column."""
    found = _listed(what, given, Objective, 'as in [Objective("latency_s")]')
    check_objectives(found)
    return found


def constraints_of(given: object) -> tuple[Any, ...]:
    """Constraints, or none."""
    from .explore import Constraint

    return _listed("constraints", given, Constraint, 'as in [Constraint("power_W", at_most=500)]')


def check_function(what: str, given: object, takes: str) -> None:
    """Something that can be called."""
    if not callable(given):
        raise ValueError(f"{what} must be a function of {takes}, not {shown(given)}")


def check_settings(given: object) -> None:
    """None, or a dict whose keys are texts."""
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        raise ValueError(f'settings must be a dict with texts as keys, as in {{"context": 4096}}, not {shown(given)}')


def check_path(what: str, given: object) -> None:
    """None, or the name of a file or a folder."""
    if given is not None and (not isinstance(given, str | os.PathLike) or not str(given)):
        raise ValueError(f"{what} must be a path that is not empty, not {shown(given)}")


def _listed(what: str, given: object, kind: type, example: str) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{what} must be a list of {kind.__name__}, {example}, not {shown(given)}")
    for item in given:
        if not isinstance(item, kind):
            raise ValueError(f"{what} must hold {kind.__name__} only, {example}, not {shown(item)}")
    return tuple(given)
