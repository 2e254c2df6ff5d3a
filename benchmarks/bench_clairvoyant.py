"""The clairvoyant optimum of GPT3-175B on H2M2 over 128 iterations: seconds of one core, and how much is proven.

The trace is drawn as H2M2 describes its own (arXiv 2504.14893): 32 requests of U(256, 2048) tokens that grow by one an iteration; that
each ends, and is replaced by another, with a chance of 5 % an iteration is an assumption. Pages of 2 MiB, links of 960 GB/s.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from memsplit.models import KernelMappingProblem, Workload
from memsplit.models.clairvoyant import ClairvoyantProblem
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM
from memsplit.solvers import TableMapping
from memsplit.solvers.clairvoyant import ClairvoyantBound, DynamicProgramClairvoyant, ExactClairvoyant, regret

ITERATIONS = 128
BATCH = 32
ENDS = 0.05


def main() -> list[dict[str, Any]]:
    """The rows of this benchmark."""
    problems = trace(0)
    problem = ClairvoyantProblem.build(problems)
    myopic = problem.path([TableMapping().solve(one).unwrap() for one in problems])
    name = f"clairvoyant, GPT3-175B on H2M2, {ITERATIONS} iterations"
    rows = []
    for what, solver, target in (
        ("grid of 17 counts, no bound", DynamicProgramClairvoyant(bound=False), 5.0),
        ("grid of 25 counts, no bound", DynamicProgramClairvoyant(counts=25, bound=False), 10.0),
        ("exact over 912,673 plans", ExactClairvoyant(), 20.0),
    ):
        started = time.process_time()
        result = solver.solve(problem)
        rows.append(_row(f"{name}: {what}", time.process_time() - started, "s", target))
    started = time.process_time()
    bound = ClairvoyantBound().value(problem)
    rows.append(_row(f"{name}: bound over 912,673 plans", time.process_time() - started, "s", 10.0))
    optimum = result.objective or float("nan")
    rows.append(_row(f"{name}: bound below the optimum", (optimum - bound) / optimum, "1", 0.05))
    free = ClairvoyantBound(migration=False).value(problem)
    rows.append(_row(f"{name}: bound with free moves below the optimum", (optimum - free) / optimum, "1", None))
    found = regret(problem.evaluate(myopic).latency, result)
    rows.append(_row(f"{name}: regret of the best plan of each iteration", found.upper or float("nan"), "1", None))
    return rows


def trace(seed: int) -> list[KernelMappingProblem]:
    """The mapping problem of every iteration."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(256, 2048, BATCH, endpoint=True)
    problems = []
    for _ in range(ITERATIONS):
        problems.append(KernelMappingProblem.build(H2M2_SYSTEM, Workload(llm=GPT3_175B, batch=BATCH, context=round(float(tokens.mean())))))
        ended = rng.random(BATCH) < ENDS
        tokens = np.where(ended, rng.integers(256, 2048, BATCH, endpoint=True), tokens + 1)
    return problems


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": None if target is None else value <= target}
