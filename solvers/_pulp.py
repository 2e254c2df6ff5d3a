"""A pattern form solved by CBC, the integer solver that PuLP brings along.

PuLP builds the model and writes it; CBC is run from here, because PuLP's own call says "Optimal" at a time limit, throws CBC's
proven bound away, and leaves CBC running when Python is killed. CBC works with doubles and tolerances, so its numbers are made
small and whole before (``capacity_rows``), its doubtful parts are switched off (``SOUND``), and its plan is believed only if it holds in
whole numbers after.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._patterns import CapacityRow, Chosen, PatternAnswer, PatternForm, capacity_rows, fastest_patterns, least_above_zero, least_time
from ._program import Program, ProgramAnswer, relaxation

LEAST_OBJECTIVE = 1e4
"""Times are scaled so that no plan takes less than this, if it takes any: CBC prints its bound with three decimals."""

BOUND_SLACK = 6e-4
"""Taken off CBC's bound, in scaled time: half of the last decimal (5e-4), and CBC's cutoff increment (1e-5) and tolerances (1e-7)."""

SEARCH_GAP = 0.9
"""The share of the relative gap that CBC's search may use; the rest is for ``BOUND_SLACK``, enough from a gap of 1e-6 on."""

LARGEST_WHOLE = 10**6
"""Rows with larger numbers are split in two (``_write_model``): with tolerances of 1e-7, CBC would not see their single units."""

SPARE = 0.1
"""Added to every room: no whole numbers more fit, but none that fill the room exactly are lost to a tolerance either."""

LEAST_SECONDS = 0.01
"""What CBC gets if writing its model took all the time there was."""

PATIENCE = 5.0
"""Seconds after the time limit at which CBC is killed; it does not look at the clock everywhere."""

SOUND = ("-presolve", "off", "-preprocess", "off", "-cuts", "off", "-strong", "0")
"""What leaves only bounds of linear relaxations to CBC 2.10.3. Its preprocessing (github.com/coin-or/Cbc, issue 293), cuts and strong
branching each cut the optimum off on a few of thousands of random forms, and its presolve on one of GPT3-175B; none was much faster."""

DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which execv keeps
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""What Linux runs first in CBC's process, so that CBC is killed when the Python that wants its answer is."""


def solve_patterns(
    form: PatternForm,
    *,
    start: Chosen | None,
    relative_gap: float,
    time_limit: float | None,
    threads: int,
    seed: int,
) -> PatternAnswer:
    """CBC's answer to a pattern form: a plan proven within ``relative_gap``, unless ``time_limit`` [s of wall time] came first.

    ``start[k]``, int64 [P_k], is a plan to begin with. On one thread the same arguments give the same plan where no time limit strikes;
    on several, CBC may find another plan of the same quality each time, and where it crashes, which it does now and then, it is run
    again on one.
    """
    rows = capacity_rows(form)
    if rows is None:
        return PatternAnswer(chosen=None, bound=None, infeasible=True)
    if not rows:
        return fastest_patterns(form)
    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit

    def run(rooms: Sequence[int]) -> PatternAnswer:
        return _run_cbc(form, rows, rooms, start=start, relative_gap=relative_gap, deadline=deadline, threads=threads, seed=seed)

    answer = run([row.room for row in rows])
    if answer.chosen is None:
        return answer
    over = [max(row.overflow(answer.chosen), 0) for row in rows]
    if not any(over):
        return answer
    tighter = run([max(row.room - units, 0) for row, units in zip(rows, over, strict=True)])
    fits = tighter.chosen is not None and all(row.overflow(tighter.chosen) <= 0 for row in rows)
    return PatternAnswer(chosen=tighter.chosen if fits else None, bound=answer.bound)


def _run_cbc(
    form: PatternForm,
    rows: Sequence[CapacityRow],
    rooms: Sequence[int],
    *,
    start: Chosen | None,
    relative_gap: float,
    deadline: float,
    threads: int,
    seed: int,
) -> PatternAnswer:
    """One run of CBC with these rooms. The plan keeps the number of groups exactly, but a capacity only within CBC's tolerance."""
    scale = LEAST_OBJECTIVE / least_above_zero(form)
    with tempfile.TemporaryDirectory(prefix="memsplit-cbc-") as name:
        folder = Path(name)
        _write_model(folder / "model.mps", form, rows, rooms, scale)
        command = [_cbc_path(), "model.mps"]
        if start is not None:
            taken = [(column, count) for column, count in enumerate(np.concatenate(start).tolist()) if count]
            lines = ["Stopped on time - objective value 0"] + [f"{column} x{column} {count} 0" for column, count in taken]
            (folder / "start.sol").write_text("\n".join(lines) + "\n")
            command += ["-mipstart", "start.sol"]
        command += [*SOUND, "-ratioGap", repr(SEARCH_GAP * relative_gap)]
        cbc_seed = 1 + seed % (2**31 - 2)  # to CBC, 0 and -1 mean a seed of its own
        command += ["-randomSeed", str(cbc_seed), "-randomCbcSeed", str(cbc_seed)]
        seconds = max(deadline - time.perf_counter(), 0.01)
        if seconds < math.inf:
            command += ["-seconds", repr(seconds), "-timeMode", "elapsed"]
        finish = ["-solve", "-solution", "answer.sol"]
        log = _log_of([*command, *(["-threads", str(threads)] if threads > 1 else []), *finish], folder, seconds + PATIENCE)
        if log is None and threads > 1:
            log = _log_of([*command, *finish], folder, seconds + PATIENCE)
        if log is None:
            return PatternAnswer(chosen=None, bound=None, infeasible=not _has_fractions(form, rows, rooms))
        answer = folder / "answer.sol"
        status, *values = answer.read_text().splitlines() if answer.exists() else [""]

    if status.startswith(("Infeasible", "Integer infeasible")):
        return PatternAnswer(chosen=None, bound=None, infeasible=True)
    flat = np.zeros(sum(len(times) for times in form.times), np.int64)
    for line in values:
        _, column, value, _ = line.replace("**", "").split()
        if column.startswith("x"):
            flat[int(column[1:])] = round(float(value))
    chosen = tuple(np.split(flat, np.cumsum([len(times) for times in form.times])[:-1]))
    keeps_groups = all((x >= 0).all() and x.sum() == groups for x, groups in zip(chosen, form.groups, strict=True))
    return PatternAnswer(
        chosen=chosen if keeps_groups else None, bound=max(least_time(form), _proven(log, SEARCH_GAP * relative_gap) / scale)
    )


def _write_model(path: Path, form: PatternForm, rows: Sequence[CapacityRow], rooms: Sequence[int], scale: float) -> None:
    """Write the formulation of ``_patterns``, with x named by its place among the columns of all kinds.

    A row with large numbers is written in two digits of base B, with c, integer, carried from the low one to the high one:

        sum low x - B c <= room mod B          sum high x + c <= room div B

    It has the same solutions and the same relaxation.
    """
    from pulp import LpAffineExpression, LpInteger, LpProblem

    problem = LpProblem("patterns")
    x: list[Any] = []
    for times, groups in zip(form.times, form.groups, strict=True):
        kind = [problem.add_variable(f"x{column}", 0, groups, LpInteger) for column in range(len(x), len(x) + len(times))]
        x += kind
        if kind:
            problem += LpAffineExpression([(variable, 1) for variable in kind]) == groups
    problem.setObjective(LpAffineExpression(list(zip(x, (np.concatenate(form.times) * scale).tolist(), strict=True))))
    for number, (row, room) in enumerate(zip(rows, rooms, strict=True)):
        pages = np.concatenate(row.pages)
        if row.largest <= LARGEST_WHOLE:
            problem += LpAffineExpression(list(zip(x, pages.tolist(), strict=True))) <= room + SPARE
            continue
        base = 1 << (row.largest.bit_length() + 1) // 2
        carry = problem.add_variable(f"carry{number}", 0, room // base, LpInteger)
        low, high = list(zip(x, (pages % base).tolist(), strict=True)), list(zip(x, (pages // base).tolist(), strict=True))
        problem += LpAffineExpression([*low, (carry, -base)]) <= room % base + SPARE
        problem += LpAffineExpression([*high, (carry, 1)]) <= room // base + SPARE
    problem.writeMPS(str(path))


def _cbc_path() -> str:
    """The CBC that PuLP brings along, or else the one on the PATH."""
    from pulp.apis.coin_api import pulp_cbc_path

    path = shutil.which(os.path.abspath(pulp_cbc_path)) or shutil.which("cbc")
    if path is None:
        raise RuntimeError(f"PuLP brings no CBC for this machine (looked for {pulp_cbc_path}); install CBC so that `cbc` is on the PATH")
    return path


def _has_fractions(form: PatternForm, rows: Sequence[CapacityRow], rooms: Sequence[int]) -> bool:
    """Whether the linear relaxation has a solution, by SciPy's HiGHS: what CBC crashes on if not, with preprocessing off."""
    from scipy.optimize import linprog

    kind = np.repeat(np.arange(len(form.times)), [len(times) for times in form.times])
    owner = (kind == np.arange(len(form.times))[:, None]).astype(np.float64)
    held = np.array([np.concatenate(row.pages) / max(1, row.largest) for row in rows])
    limit = np.array([(room + SPARE) / max(1, row.largest) for row, room in zip(rows, rooms, strict=True)])
    return int(linprog(np.zeros(len(kind)), A_ub=held, b_ub=limit, A_eq=owner, b_eq=np.array(form.groups), method="highs").status) != 2


def _log_of(command: list[str], folder: Path, timeout: float) -> str | None:
    """Run CBC in ``folder`` for at most ``timeout`` seconds and return what it printed, or None if it crashed.

    It ends when this process does.
    """
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as cbc:
        try:
            log, _ = cbc.communicate(timeout=None if timeout == math.inf else timeout)
        except subprocess.TimeoutExpired:
            cbc.kill()
            return ""
        except BaseException:
            cbc.kill()
            raise
    if cbc.returncode == -signal.SIGSEGV:
        return None
    if cbc.returncode:
        raise RuntimeError(f"CBC stopped with exit code {cbc.returncode}; its last words were {log.strip()[-200:]!r}")
    return log


def _proven(log: str, search_gap: float) -> float:
    """The lower bound, in scaled time, that CBC's log claims, moved outward; -inf if it claims none.

    A search that ended early prints its bound. One that was completed does not: it left out what was not better than its plan by
    the gap it was allowed.
    """
    printed = re.search(r"^Lower bound: +(\S+)$", log, re.MULTILINE)
    if printed:
        return float(printed[1]) - BOUND_SLACK
    completed = re.search(r"^Result - Optimal solution found\n+Objective value: +(\S+)$", log, re.MULTILINE)
    return float(completed[1]) * (1 - search_gap) - BOUND_SLACK if completed else -math.inf


def solve_program(program: Program, *, relative_gap: float, time_limit: float | None, seed: int = 0) -> ProgramAnswer:
    """CBC's answer to a program, proven within ``relative_gap`` unless ``time_limit`` [s of wall time] came first.

    The relaxation is asked of HiGHS first: CBC crashes on infeasible ones with the settings it is run with here.
    """
    from pulp import LpAffineExpression, LpContinuous, LpInteger, LpProblem

    deadline = math.inf if time_limit is None else time.perf_counter() + time_limit
    relaxed = relaxation(program, time_limit)
    if relaxed.infeasible:
        return ProgramAnswer(infeasible=True)
    if relaxed.values is None and time.perf_counter() > deadline:
        return ProgramAnswer(bound=relaxed.bound)
    problem = LpProblem("program")
    x = [
        problem.add_variable(f"x{j}", 0, None if math.isinf(limit) else limit, LpInteger if whole else LpContinuous)
        for j, (limit, whole) in enumerate(zip(program.upper.tolist(), program.whole.tolist(), strict=True))
    ]
    scale = LEAST_OBJECTIVE / relaxed.bound if relaxed.bound is not None and relaxed.bound > 0 else 1.0
    problem.setObjective(LpAffineExpression(list(zip(x, (program.cost * scale).tolist(), strict=True))))
    for columns, numbers, limit, equation in program.lines():
        expression = LpAffineExpression([(x[j], number) for j, number in zip(columns.tolist(), numbers.tolist(), strict=True)])
        problem += (expression == limit) if equation else (expression <= limit)
    with tempfile.TemporaryDirectory(prefix="memsplit-cbc-") as name:
        folder = Path(name)
        problem.writeMPS(str(folder / "model.mps"))
        cbc_seed = 1 + seed % (2**31 - 2)
        command = [_cbc_path(), "model.mps", *SOUND, "-ratioGap", repr(SEARCH_GAP * relative_gap)]
        command += ["-randomSeed", str(cbc_seed), "-randomCbcSeed", str(cbc_seed)]
        left = max(deadline - time.perf_counter(), LEAST_SECONDS)
        if time_limit is not None:
            command += ["-seconds", repr(left), "-timeMode", "elapsed"]
        log = _log_of([*command, "-solve", "-solution", "answer.sol"], folder, left + PATIENCE)
        answer = folder / "answer.sol"
        status, *lines = answer.read_text().splitlines() if log and answer.exists() else [""]
    if status.startswith(("Infeasible", "Integer infeasible")):
        return ProgramAnswer(infeasible=True)
    searched = -math.inf if log is None else _proven(log, SEARCH_GAP * relative_gap) / scale
    proven = max(-math.inf if relaxed.bound is None else relaxed.bound, searched)
    if not lines or "objective value" not in status or "no integer solution" in status.lower():
        return ProgramAnswer(bound=None if math.isinf(proven) else proven)
    values = np.zeros(program.size)
    for line in lines:
        _, column, value, _ = line.replace("**", "").split()
        if column.startswith("x"):
            values[int(column[1:])] = float(value)
    return ProgramAnswer(values=np.where(program.whole, np.round(values), values), bound=None if math.isinf(proven) else proven)
