"""Offloading: the closed-form split, the cache ratio by its relaxation, the placement by Charnes-Cooper; PuLP and CP-SAT beside them.

Each value is the median of repetitions on the published settings; that of one split, of microseconds, the best of seven means of 500.
Designs per second are those of a table of 20,000 machines, batches and contexts, columns in and columns out, per second of CPU time of one
core, the best of seven.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

from memsplit.dse.ratio_sweep import RatioSweep
from memsplit.dse.split_sweep import SplitSweep
from memsplit.models import Workload
from memsplit.models.cache_ratio import CacheRatioProblem
from memsplit.models.offload_profiles import HYBRIDSERVE_PAPER, KVPR_NOMINAL
from memsplit.models.placement import PlacementProblem
from memsplit.models.presets import OPT_6_7B, OPT_30B, SYSTEMS
from memsplit.models.recompute_split import RecomputeSplitProblem, best_splits
from memsplit.solvers.cache_ratio import CpSatRatio, LpRatio, MilpRatio
from memsplit.solvers.placement import CharnesCooperPlacement, FlexGenPlacement
from memsplit.solvers.recompute_split import ClosedFormSplit, CpSatSplit, EnumerationSplit, MilpSplit

BITS = {"weight_bits": 16, "kv_bits": 16, "activation_bits": 16}


def main() -> list[dict[str, Any]]:
    """The rows of this benchmark."""
    split = RecomputeSplitProblem.build(SYSTEMS["a100_pcie4"], Workload(llm=OPT_6_7B, batch=64, context=1024, **BITS), profile=KVPR_NOMINAL)
    ratio = CacheRatioProblem.build(
        SYSTEMS["rtx4090_pcie4"], Workload(llm=OPT_30B, batch=128, context=1024, **BITS), profile=HYBRIDSERVE_PAPER
    )
    placement = PlacementProblem.build(OPT_30B, system=SYSTEMS["t4_disk"], prompt=512, generated=32)
    closed = ClosedFormSplit()
    contexts = np.arange(1, 4097)
    rows = [
        _row("recompute split, one problem", min(timeit.repeat(lambda: best_splits(split), number=500, repeat=7)) / 500 * 1e6, "us", 50.0),
        _row(
            "recompute split, each of 4096 contexts",
            _median(lambda: best_splits(split, contexts), 20) / 4096 * 1e6,
            "us",
            None,
        ),
    ]
    for solver, times in ((closed, 50), (EnumerationSplit(), 20), (MilpSplit(), 5), (CpSatSplit(), 5)):
        name = f"recompute split, priced and checked: {type(solver).__name__}"
        rows.append(_row(name, _median(lambda solver=solver: solver.solve(split), times) * 1e3, "ms", None))
    for solver, times, target in ((LpRatio(), 20, 10.0), (MilpRatio(), 5, None), (CpSatRatio(), 5, None)):
        name = f"cache ratio, OPT-30B, 128 x 1024: {type(solver).__name__}"
        rows.append(_row(name, _median(lambda solver=solver: solver.solve(ratio), times) * 1e3, "ms", target))
    served = Workload(llm=OPT_30B, batch=1, context=1, **BITS)
    for name, score, target in (
        ("recompute split, staged", SplitSweep(system=SYSTEMS["rtx4090_pcie4"], workload=served), 1e5),
        ("recompute split, staged, weights streamed", SplitSweep(system=SYSTEMS["rtx4090_pcie4"], workload=served, weights="host"), 1e5),
        ("cache ratio", RatioSweep(system=SYSTEMS["rtx4090_pcie4"], workload=served), 1e4),
    ):
        rows.append(_rate(f"{name}, OPT-30B, swept", score, _designs(20_000), target))
    for solver, times, target in ((CharnesCooperPlacement(), 5, 0.1), (FlexGenPlacement(), 1, None)):
        name = f"placement, OPT-30B 512+32 on a T4: {type(solver).__name__}"
        rows.append(_row(name, _median(lambda solver=solver: solver.solve(placement), times), "s", target))
    return rows


def _median(work: Callable[[], object], times: int) -> float:
    """Median seconds of ``times`` runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _designs(number: int) -> dict[str, Any]:
    """Machines around an RTX 4090 with what they serve, most of which fits."""
    rng = np.random.default_rng(0)
    ranges = {
        "GDDR6X_capacity_GB": (80, 200),
        "GDDR6X_bandwidth_TBps": (0.5, 4),
        "RTX 4090_matrix_peak_TFLOPps": (50, 1000),
        "host_capacity_GB": (200, 1500),
        "host_bandwidth_GBps": (50, 500),
        "host_to_GDDR6X_bandwidth_GBps": (10, 200),
    }
    columns = {name: rng.uniform(low, high, number) for name, (low, high) in ranges.items()}
    return columns | {"batch": rng.integers(1, 257, number), "context": rng.integers(1, 2049, number)}


def _rate(name: str, score: Callable[[dict[str, Any]], dict[str, Any]], columns: dict[str, Any], target: float) -> dict[str, Any]:
    """Designs per second of CPU time, the best of seven."""
    number, best = len(columns["batch"]), 0.0
    for _ in range(7):
        started = time.process_time()
        score(columns)
        best = max(best, number / (time.process_time() - started))
    return {"name": name, "value": best, "unit": "designs/s", "target": target, "holds": best >= target}


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": None if target is None else value <= target}
