"""Optuna's own cost of a trial, by sampler in memory and by storage: what a search takes when pricing takes nothing."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from memsplit.dse import Objective, explore
from memsplit.dse.samplers import SAMPLERS, RandomSearch, Sampler

OBJECTIVES = [Objective("latency_s"), Objective("memory_usd"), Objective("energy_J")]
TRIALS = {"random": 500, "qmc": 500, "nsga2": 500, "nsga3": 500, "tpe": 100}  # "gp" takes seconds each, and PyTorch


def design(trial: Any) -> list[float]:
    """Five numbers, as in ``hardware_pareto``."""
    return [trial.suggest_float(f"x{i}", 0.1, 1) for i in range(5)]


def score(point: list[float]) -> dict[str, float]:
    """Three objectives in conflict, in no time."""
    return {
        "latency_s": 1 / point[0] + 1 / point[1],
        "memory_usd": point[0] + point[2],
        "energy_J": point[1] / point[2] + point[3] + point[4],
    }


def cost(sampler: Sampler, trials: int, *, storage: str | Path | None = None, synchronous: bool = True) -> float:
    """ms of processor time a trial."""
    name = None if storage is None else f"{sampler.name} {synchronous}"
    began = time.process_time()
    explore(design, score, OBJECTIVES, trials=trials, sampler=sampler, storage=storage, name=name, synchronous=synchronous, progress=False)
    return (time.process_time() - began) / trials * 1e3


def main() -> list[dict[str, Any]]:
    """Rows without targets: these are Optuna's costs, not ours."""
    found = {f"Optuna, {name}, {trials} trials in memory": cost(SAMPLERS[name], trials) for name, trials in TRIALS.items()}
    with tempfile.TemporaryDirectory() as folder:
        for kind, storage in (("journal file", Path(folder) / "trials.log"), ("SQLite", f"sqlite:///{folder}/trials.db")):
            for synchronous, trials in ((True, 200), (False, 60)):
                mode = "synchronous" if synchronous else "asynchronous"
                found[f"Optuna, random, {trials} trials, {kind}, {mode}"] = cost(
                    RandomSearch(), trials, storage=storage, synchronous=synchronous
                )
    return [{"name": name, "value": value, "unit": "ms/trial", "target": None, "holds": None} for name, value in found.items()]
