"""Offloading: the closed-form split, the cache ratio by its relaxation, the placement by Charnes-Cooper; PuLP and CP-SAT beside them.

Each value is the median of repetitions on the published settings; that of one split, of microseconds, the best of seven means of 500.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np

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


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": None if target is None else value <= target}
