"""Exact kernel mapping: times to a certified gap, with PuLP and CP-SAT on the same instances beside them.

Each value is the median over seeds (and repetitions, for milliseconds); heterogeneous instances are drawn as in the study
``heuristics_vs_optimal``: seconds a slice U(0.5, 2) x 1, 5, 12 for the tiers x U(0.7, 1.4), pages a slice U(50, 400).
Rates of many designs are those of the best of several runs, in seconds of one core (``time.process_time``).
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from memsplit.dse.mapping_sweep import MappingSweep
from memsplit.models import FIRST_PRINCIPLES, KernelMappingProblem, KernelMappingTables, Workload
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM
from memsplit.models.systems import Systems
from memsplit.solvers import ConvexMapping, CpSatMapping, MilpMapping, PatternMapping, Solver, TableMapping

SEEDS = (0, 1, 2)
LIMIT = 20.0
"""Seconds that the integer solvers get; a value of LIMIT means that the gap was not reached."""


def heterogeneous(kinds: int, tiers: int, seed: int, t_sync: float = 0.0) -> KernelMappingProblem:
    """A problem per layer of unlike sublayers of 96 slices; all tiers but the last bind."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform(0.5, 2, (kinds, 1)) * np.array([1.0, 5.0, 12.0])[:tiers] * rng.uniform(0.7, 1.4, (kinds, tiers)) * 1e-5
    pages = rng.integers(50, 400, kinds)
    total = int(pages.sum()) * 96
    shares = {2: (0.4, 1.0), 3: (0.2, 0.35, 1.0)}[tiers]
    return KernelMappingProblem.from_slices(seconds, pages, [int(total * share) for share in shares], slices=96, t_sync=t_sync)


def main() -> list[dict[str, Any]]:
    """The rows of this benchmark."""
    rows = [_table(), *_many()]
    rows += _certified(
        "96x5 heterogeneous, two memories, to 1e-5", [heterogeneous(480, 2, seed) for seed in SEEDS], 1e-5, 0.010, ConvexMapping, 20
    )
    for t_sync in (0.0, 2e-4):
        name = f"96x4 heterogeneous, three memories, t_sync {t_sync * 1e6:g} us, to 1e-4"
        rows += _certified(name, [heterogeneous(384, 3, seed, t_sync) for seed in SEEDS], 1e-4, 5.0, PatternMapping, 1)
    return rows


def _table() -> dict[str, Any]:
    problem = KernelMappingProblem.build(H2M2_SYSTEM.with_page(1), Workload(llm=GPT3_175B, batch=32, context=1024))
    solver = TableMapping()
    seconds = statistics.median(_clock(solver, problem)[0] for _ in range(200))
    return _row("N=96 table search, GPT3-175B on H2M2", seconds * 1e3, "ms", 1.0)


def _many() -> list[dict[str, Any]]:
    """Designs a core prices in a second: GPT3-175B on H2M2 with other capacities and bandwidths, in pages of 2 MiB and in bytes."""
    rng = np.random.default_rng(0)
    designs, chunk = 8192, 512
    columns = {
        "HBM_capacity_GB": rng.uniform(24, 192, designs),
        "HBM_bandwidth_TBps": rng.uniform(1, 8, designs),
        "LPDDR_capacity_GB": rng.uniform(150, 600, designs),
        "LPDDR_bandwidth_GBps": rng.uniform(100, 1000, designs),
    }
    workload = Workload(llm=GPT3_175B, batch=32, context=1024)
    rows = []
    for page, unit in ((2**21, "2 MiB pages"), (1, "bytes")):
        base = H2M2_SYSTEM.with_page(page)
        systems = Systems.from_columns(base, columns)

        def build(systems: Systems = systems) -> list[KernelMappingTables]:
            parts = [systems.some(slice(first, first + chunk)) for first in range(0, designs, chunk)]
            return [KernelMappingTables.build(part, workload, profile=FIRST_PRINCIPLES) for part in parts]

        tables = build()
        rows.append(_rate(f"N=96 tables of many designs, {unit}: build", build, designs, None))
        for compiled, target in ((True, 20_000.0), (False, 4_000.0)):
            if compiled and importlib.util.find_spec("numba") is None:
                continue
            solver, some = TableMapping(compiled=compiled), tables if compiled else tables[:4]
            name = f"N=96 table search of many designs, {unit}: {'compiled' if compiled else 'NumPy'}"
            rows.append(
                _rate(name, lambda solver=solver, some=some: [solver.solve_batch(part) for part in some], len(some) * chunk, target)
            )
        sweep = MappingSweep(system=base, workload=workload)
        rows.append(
            _rate(f"N=96 table search of many designs, {unit}: all of MappingSweep", lambda sweep=sweep: sweep(columns), designs, None)
        )
    return rows


def _rate(name: str, work: Callable[[], object], designs: int, target: float | None) -> dict[str, Any]:
    """Designs a second of one core, the best of five runs after one that warms up."""
    work()
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    rate = designs / best
    return {"name": name, "value": rate, "unit": "designs/s", "target": target, "holds": None if target is None else rate >= target}


def _certified(
    name: str,
    problems: list[KernelMappingProblem],
    gap: float,
    target: float,
    exact: type[ConvexMapping] | type[PatternMapping],
    times: int,
) -> list[dict[str, Any]]:
    rows = []
    solvers: list[tuple[Solver, int, float | None]] = [
        (exact(relative_gap=gap, time_limit=LIMIT), times, target),
        (MilpMapping(relative_gap=gap, time_limit=LIMIT), 1, None),
        (CpSatMapping(relative_gap=gap, time_limit=LIMIT), 1, None),
    ]
    for solver, repetitions, goal in solvers:
        runs = [_clock(solver, problem) for problem in problems for _ in range(repetitions)]
        label = f"{name}: {type(solver).__name__}"
        reached = all(found <= gap for _, found in runs)
        row = _row(label, statistics.median(seconds for seconds, _ in runs), "s", goal)
        rows.append(row if goal is None else row | {"holds": bool(row["holds"] and reached)})
        rows.append(_row(f"{label}, worst gap", max(found for _, found in runs), "1", gap if goal else None))
    return rows


def _clock(solver: Solver, problem: KernelMappingProblem) -> tuple[float, float]:
    """Seconds of one solve, and its proven gap (infinite without one)."""
    started = time.perf_counter()
    result = solver.solve(problem)
    return time.perf_counter() - started, float("inf") if result.gap is None else result.gap


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": None if target is None else value <= target}
