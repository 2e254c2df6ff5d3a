"""What every solver returns: a plan, what ``evaluate`` says it costs, and what is proven about the optimum."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Generic, Protocol, TypeVar

from ..models.checks import shown

Plan = TypeVar("Plan")

LONGEST_TIME = 1e7
"""Seconds of the longest time limit, four months: operating systems wait no longer than some months in one go."""

MOST_THREADS = 10_000
"""More threads than any machine has, and the most that CP-SAT takes."""


class Status(StrEnum):
    """OPTIMAL: proven within the solver's ``relative_gap``. FEASIBLE: a plan, not proven. INFEASIBLE: proven that no plan
    exists. UNKNOWN: neither a plan nor a proof."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverResult(Generic[Plan]):
    """A solver's answer.

    ``objective`` [s] is what ``problem.evaluate(plan)`` says, never what a solver's library says. ``bound`` [s] is a proven
    lower bound of the optimum, or None. ``runtime`` [s]. ``message`` says why there is no plan, or no proof.
    ``capacity_worth`` [s/B, one per tier], from solvers that have duals: how fast the bound falls as a tier grows.
    """

    solver: str
    status: Status
    plan: Plan | None = None
    objective: float | None = None
    bound: float | None = None
    runtime: float = 0.0
    message: str = ""
    capacity_worth: tuple[float, ...] | None = None

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, at least 0; None without a plan or without a proven bound."""
        if self.objective is None or self.bound is None:
            return None
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective > 0 else 0.0

    def unwrap(self) -> Plan:
        """The plan; ValueError with the solver's message if there is none."""
        if self.plan is None:
            raise ValueError(f"{self.solver}: {self.status}; {self.message}")
        return self.plan


class Solver(Protocol):
    """A frozen dataclass of settings with one method."""

    def solve(self, problem: Any, /) -> SolverResult[Any]:
        """The answer to ``problem``."""
        ...


def finish(
    solver: object,
    problem: Any,
    plan: Any | None,
    *,
    started: float,
    bound: float | None = None,
    relative_gap: float = 0.0,
    optimal: bool = False,
    infeasible: bool = False,
    message: str = "",
    capacity_worth: tuple[float, ...] | None = None,
) -> SolverResult[Any]:
    """Close a solve that began at ``started`` (``time.perf_counter()``): re-price the plan, re-check it, derive the status.

    A plan that overflows a tier is dropped: no solver's word is taken for it. ``bound`` is moved outward by 1e-12 of itself, which is
    more than the rounding of the sums behind it. ``optimal``: no plan is better, by the algorithm; the plan's latency is the bound.
    """
    name = type(solver).__name__
    objective: float | None = None
    if plan is not None:
        cost = problem.evaluate(plan)
        if cost.fits:
            objective = cost.latency
        else:
            plan, message = None, f"the plan found does not fit and was dropped: {cost.explain_overflow()}"
    if optimal:
        bound = objective
    elif bound is not None:
        bound = max(0.0, bound - 1e-12 * abs(bound)) if math.isfinite(bound) else None
    if objective is not None and bound is not None and bound > objective * (1 + 1e-9):
        raise AssertionError(f"{name}: bound {bound!r} s above the plan's {objective!r} s; this is a defect of memsplit, please report it")
    if objective is None:
        status = Status.INFEASIBLE if infeasible else Status.UNKNOWN
    elif bound is not None and objective - bound <= max(relative_gap, 2e-12) * objective:
        status = Status.OPTIMAL
    else:
        status = Status.FEASIBLE
    if status is Status.INFEASIBLE:
        message, bound = message or problem.explain_infeasible(), None
    return SolverResult(
        solver=name,
        status=status,
        plan=plan,
        objective=objective,
        bound=bound,
        runtime=time.perf_counter() - started,
        message=message,
        capacity_worth=capacity_worth,
    )


def unproven(objective: float, bound: float | None, relative_gap: float, time_limit: float | None) -> str:
    """The message beside a plan that is not proven: the gap that is left, and what to change; "" if it is proven."""
    if bound is not None and objective - bound <= max(relative_gap, 2e-12) * objective:
        return ""
    gap = "nothing is proven of it" if bound is None or bound <= 0 else f"it is within {(objective - bound) / objective:.2g} of the optimum"
    limit = "" if time_limit is None else f" when {time_limit:g} s were over"
    return f"a plan, but not proven within {relative_gap:g}{limit}: {gap}; allow more time, or a larger relative_gap"


def check_settings(relative_gap: float, time_limit: float | None, threads: int = 1, *, seed: int = 0) -> None:
    """The settings that exact solvers share; ValueError in one sentence."""
    if not _number(relative_gap) or not 0 <= relative_gap < 1:
        raise ValueError(f"relative_gap must be a number, at least 0 and below 1, not {shown(relative_gap)}; 1e-6 is a good choice")
    if time_limit is not None and not (_number(time_limit) and 0 < time_limit <= LONGEST_TIME):
        raise ValueError(
            f"time_limit must be a number above 0 s and at most {LONGEST_TIME:g} s, not {shown(time_limit)}; None means no limit"
        )
    if not _integral(threads) or not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads must be a whole number, at least 1 and at most {MOST_THREADS}, not {shown(threads)}")
    if not _integral(seed):
        raise ValueError(f"seed must be a whole number, not {shown(seed)}; 0 is as good as any")


def _integral(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
