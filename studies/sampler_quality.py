"""How much of the exact Pareto front does each of Optuna's samplers find, and after how many designs?

Capacity and bandwidth of both memories of H2M2's machine (arXiv 2504.14893) vary on a grid, of which every design is priced by its exact
kernel mapping. Objectives: latency of a step, price of the memory, and the bandwidth bought, which costs pins and power and has no price
in a data sheet. Each sampler then searches the same grid, its scores being looked up. ``hypervolume_ratio``: the volume that its designs
dominate over that of the exact front, below a reference point 1 % of the front's extent behind its worst value in each objective.
``front_found_share``: designs of the exact front among those it tried.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memsplit import __version__
from memsplit.dse import (
    SAMPLERS,
    Grid,
    MappingSweep,
    Objective,
    Sampler,
    beside,
    explore,
    hypervolume,
    non_dominated,
    plot_lines,
    positive,
    show,
    study_arguments,
    sweep,
    write_csv,
)
from memsplit.models import FIRST_PRINCIPLES, Workload
from memsplit.models.presets import H2M2_SYSTEM, LLAMA2_70B
from memsplit.models.units import GB, TB

OBJECTIVES = [Objective("latency_s"), Objective("memory_usd"), Objective("bought_TBps")]
WORKLOAD = Workload(llm=LLAMA2_70B, batch=128, context=4096)
MAPPED = MappingSweep(system=H2M2_SYSTEM, workload=WORKLOAD, profile=FIRST_PRINCIPLES)
RANGES = {
    "HBM_capacity_GB": (24.0, 192.0),
    "HBM_bandwidth_TBps": (0.75, 6.0),
    "LPDDR_capacity_GB": (128.0, 1024.0),
    "LPDDR_bandwidth_GBps": (136.0, 1088.0),
}
"""A quarter of H2M2's numbers, rounded, to twice them."""

CHECKPOINTS = (50, 100, 200, 500, 1000)
MOST = {"tpe": 500, "gp": 100}
"""Trials of the samplers that take 0.1 s and more for each."""


def price(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The objectives [D] of designs whose columns [D] are named as in ``models.systems``; NaN where the LLM does not fit."""
    mapped = MAPPED(columns)
    return {name: mapped[name] for name in ("latency_s", "memory_usd")} | {
        "bought_TBps": columns["HBM_bandwidth_TBps"] + columns["LPDDR_bandwidth_GBps"] * (GB / TB)
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """All designs of a grid with ``points`` values a parameter: their objectives [D, 3], and which of them are the exact front."""

    points: int
    scores: NDArray[np.float64]
    front: NDArray[np.bool_]
    reference: NDArray[np.float64]
    best: float

    @classmethod
    def of(cls, points: int, workers: int) -> Priced:
        """Price the grid on ``workers`` processes."""
        grid = Grid({name: np.linspace(*ends, points).tolist() for name, ends in RANGES.items()})
        number = len(grid)
        scores = sweep(grid, price, workers=workers)[[objective.name for objective in OBJECTIVES]].to_numpy()
        front = non_dominated(scores)
        if not front.any():
            raise ValueError(f"none of {number} designs holds {WORKLOAD.llm.name}")
        low, high = scores[front].min(axis=0), scores[front].max(axis=0)
        reference = high + 0.01 * np.where(high > low, high - low, high)
        return cls(points=points, scores=scores, front=front, reference=reference, best=hypervolume(scores[front], reference))

    def row(self, places: Sequence[int]) -> int:
        """The number of the design at these places of the axes."""
        return int(np.ravel_multi_index(tuple(places), (self.points,) * len(RANGES)))


@dataclass(slots=True)
class Lookup:
    """A score that knows all answers, and notes which design was asked when (s of processor time)."""

    grid: Priced
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __call__(self, row: int) -> dict[str, float] | None:
        """The objectives of a design; None if the LLM does not fit."""
        self.rows.append(row)
        self.seconds.append(time.process_time())
        values = self.grid.scores[row]
        if np.isnan(values[0]):
            return None
        return {objective.name: float(value) for objective, value in zip(OBJECTIVES, values, strict=True)}


def searched(grid: Priced, sampler: Sampler, seed: int, checkpoints: Sequence[int]) -> list[dict[str, Any]]:
    """One search, as a row at each checkpoint."""
    score = Lookup(grid)

    def design(trial: Any) -> int:
        return grid.row([trial.suggest_int(name, 0, grid.points - 1) for name in RANGES])

    began = time.process_time()
    explore(design, score, OBJECTIVES, trials=checkpoints[-1], sampler=sampler, seed=seed, progress=False)
    rows = []
    for trials in checkpoints:
        tried = np.unique(score.rows[:trials])
        found = grid.scores[tried]
        rows.append(
            {
                "sampler": sampler.name,
                "seed": seed,
                "trials": trials,
                "population": sampler.population,
                "hypervolume_ratio": hypervolume(found[~np.isnan(found[:, 0])], grid.reference) / grid.best,
                "front_found_share": float(grid.front[tried].sum() / grid.front.sum()),
                "infeasible": int(np.isnan(grid.scores[score.rows[:trials], 0]).sum()),
                "per_trial_runtime_s": (score.seconds[trials - 1] - began) / trials,
                "grid": len(grid.scores),
                "grid_feasible": int((~np.isnan(grid.scores[:, 0])).sum()),
                "grid_front": int(grid.front.sum()),
                "llm": WORKLOAD.llm.name,
                "batch": WORKLOAD.batch,
                "context": WORKLOAD.context,
                "profile": FIRST_PRINCIPLES.name,
                "version": __version__,
            }
        )
    return rows


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Over seeds: median, lowest and highest hypervolume ratio, and median seconds a trial."""
    groups = frame.groupby(["sampler", "trials"], sort=False)
    return groups.agg(
        seeds=("seed", "size"),
        hypervolume_ratio=("hypervolume_ratio", "median"),
        lowest=("hypervolume_ratio", "min"),
        highest=("hypervolume_ratio", "max"),
        front_found_share=("front_found_share", "median"),
        per_trial_runtime_s=("per_trial_runtime_s", "median"),
    ).reset_index()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; rows go to ``--out``, a picture beside it."""
    arguments = study_arguments(__doc__ or "", argv, default_out="sampler_quality.csv", extra=_extra)
    quick = arguments.quick
    names = arguments.samplers or (["random", "qmc", "nsga2", "nsga3"] if quick else ["random", "qmc", "nsga2", "nsga3", "tpe"])
    unknown = [name for name in names if name not in SAMPLERS]
    if unknown:
        raise ValueError(f"there is no sampler {unknown[0]!r}; samplers are {', '.join(SAMPLERS)}")
    (picture,) = beside(arguments.out, ".png")
    began = time.perf_counter()
    grid = Priced.of(7 if quick else arguments.points, arguments.workers)
    took = time.perf_counter() - began
    print(f"{len(grid.scores)} designs priced in {took:.1f} s; {grid.front.sum()} are the exact front", flush=True)
    rows = []
    for name in names:
        checkpoints = [trials for trials in CHECKPOINTS if trials <= (100 if quick else MOST.get(name, CHECKPOINTS[-1]))]
        for seed in range(arguments.seed, arguments.seed + (2 if quick else arguments.seeds)):
            rows += searched(grid, SAMPLERS[name], seed, checkpoints)
    frame = pd.DataFrame(rows)
    short = summary(frame)
    write_csv(arguments.out, frame)
    title = f"Front found, of {len(grid.scores):,} designs ({frame['seed'].nunique()} seeds)"
    band, band_label = ("lowest", "highest"), "lowest to highest of the seeds"
    plot_lines(short, picture, x="trials", y="hypervolume_ratio", by="sampler", title=title, band=band, band_label=band_label)
    show(short, title="Hypervolume over that of the exact front: median, lowest and highest of the seeds")
    last = short[short["trials"] == short.groupby("sampler")["trials"].transform("max")]
    top = last.sort_values("hypervolume_ratio", kind="stable").iloc[-1]
    blind = last[last["sampler"] == "random"]
    print(
        f"\nBest: {top['sampler']} reaches {top['hypervolume_ratio']:.1%} of the exact front's volume after {top['trials']} designs", end=""
    )
    others = len(blind) > 0 and top["sampler"] != "random"
    print(f"; random search {blind['hypervolume_ratio'].iloc[0]:.1%} after {blind['trials'].iloc[0]}." if others else ".")
    print(
        f"It takes {top['per_trial_runtime_s'] * 1e3:.1f} ms a design, and pricing the whole grid took "
        f"{took / len(grid.scores) * 1e3:.3f} ms a design."
    )
    print("So: guided search where a design costs seconds or the space has no grid; a sweep where arrays price all of it.")
    print(f"Written: {arguments.out}, {picture}")
    return 0


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--points", type=positive, default=18, help="values a parameter; 56 make 1e7 designs (default: %(default)s; --quick: 7)"
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes that price the grid (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=5, help="searches a sampler, from --seed on (default: %(default)s; --quick: 2)")
    parser.add_argument(
        "--samplers", nargs="+", metavar="NAME", help=f"of {', '.join(SAMPLERS)} (default: all but gp, and with --quick all but gp and tpe)"
    )


if __name__ == "__main__":
    sys.exit(main())
