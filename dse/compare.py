"""Solvers against a reference, problem by problem: how far is each plan from the best one, and what is proven of it?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
from tqdm import tqdm

from ..models.calibration import Calibration
from ..models.checks import shown
from ..solvers.result import Solver, SolverResult
from .confidence import error_bars, resolution

_NUMBERS = ["latency_s", "bound_s", "gap", "loss", "gap_to_bound", "runtime_s"]
_COLUMNS = ["problem", "solver", "status", *_NUMBERS, "message"]


def compare(
    problems: Mapping[str, Any],
    solvers: Mapping[str, Solver],
    *,
    reference: str | None = None,
    error: Calibration | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Solve every problem with every solver: one row each, in the order of the two mappings.

    Columns: problem, solver, status, latency_s of the plan, bound_s proven by this solver, its own gap, and against the solver
    named ``reference``

        loss         = latency / latency of the reference's plan - 1
        gap_to_bound = (latency - bound proven by the reference) / latency

    then runtime_s and message. With ``error``, the calibration record behind the latencies: latency_low_s and latency_high_s
    (``error_bars``), and told_apart, whether a plan is slower than the problem's fastest by more than the model's error
    (``resolution``; the fastest itself is told_apart).

    What does not exist is NaN; a negative loss means that the reference, stopped by its limit,
    was beaten. A solver that refuses a problem (ValueError) gets the status "refused" and its words as the message. Ctrl-C
    returns the rows finished so far, says so on stderr and sets ``attrs["interrupted"]``. ``progress``: a bar on stderr;
    None: if stderr is a terminal.
    """
    if not problems:
        raise ValueError("there is no problem to compare on; give at least one, as in {'name': problem}")
    if error is not None and not isinstance(error, Calibration):
        raise ValueError(f"error must be a Calibration, as record_for gives it, or None, not {shown(error)}")
    if not solvers:
        raise ValueError("there is no solver to compare; give at least one, as in {'name': solver}")
    if reference is not None and reference not in solvers:
        raise ValueError(f"reference {reference!r} is none of the solvers; solvers are {list(solvers)}")
    rows: list[dict[str, Any]] = []
    interrupted = False
    pairs = [(problem, solver) for problem in problems for solver in solvers]
    try:
        for problem, solver in tqdm(pairs, unit="solve", disable=None if progress is None else not progress):
            rows.append({"problem": problem, "solver": solver} | _solve(solvers[solver], problems[problem]))
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True
        print(f"compare: interrupted after {len(rows)} of {len(pairs)} solves; their rows are kept", file=sys.stderr)
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    frame = frame.astype(dict.fromkeys(_NUMBERS, float))
    best = frame[frame["solver"] == reference].set_index("problem")
    latency, bound = (frame["problem"].map(best[column]) for column in ("latency_s", "bound_s"))
    frame["loss"] = frame["latency_s"] / latency - 1
    frame["gap_to_bound"] = (frame["latency_s"] - bound) / frame["latency_s"]
    if error is not None:
        fastest = frame.groupby("problem")["latency_s"].transform("min")
        ratio = frame["latency_s"] / fastest
        apart = (frame["latency_s"] == fastest) | (ratio > resolution(error))  # where the fastest takes 0 s, the ratio to it is none
        frame = error_bars(frame, {"latency_s": error}).assign(told_apart=apart)
    frame.attrs["interrupted"] = interrupted
    return frame


def _solve(solver: Solver, problem: object) -> dict[str, Any]:
    try:
        result: SolverResult[Any] = solver.solve(problem)
    except ValueError as error:
        return {"status": "refused", "message": str(error)}
    return {
        "status": result.status.value,
        "latency_s": result.objective,
        "bound_s": result.bound,
        "gap": result.gap,
        "runtime_s": result.runtime,
        "message": result.message,
    }
