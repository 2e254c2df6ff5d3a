"""Which numbers of H2M2's machine matter: capacity, bandwidth or compute, of which side (arXiv 2504.14893)?

One number of the machine is varied at a time, for three LLMs and eight contexts. Speed-ups are over the published LPDDR-only machine,
which stays as it is, so that a speed-up changes as the latency does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import MappingScore, show, study_arguments, write_csv
from memsplit.dse.speedup import H2M2_SWEEPS
from memsplit.models import FIRST_PRINCIPLES, H2M2_CALIBRATED, LLAMA2_RHO3, KernelMappingProblem, Profile, System, Workload
from memsplit.models.presets import H2M2_SYSTEM, LPDDR_ONLY_SYSTEM
from memsplit.models.units import GB, TB
from memsplit.solvers import SingleTierMapping

STRONG = 0.05
"""Speed-up gained by doubling a number from which on it is called strong: a choice, between what the table shows."""

HBM, LPDDR = H2M2_SYSTEM.tier("HBM"), H2M2_SYSTEM.tier("LPDDR")


def with_chip(tier: str, scale: float) -> System:
    """The machine with both peaks of the chip on a tier scaled."""
    system = H2M2_SYSTEM
    for unit in system.units:
        if unit.tier == tier:
            system = system.with_unit(unit.name, matrix_peak=unit.matrix_peak * scale, vector_peak=unit.vector_peak * scale)
    return system


VARIANTS: dict[str, dict[float, System]] = {
    "HBM_capacity_GB": {size: H2M2_SYSTEM.with_tier("HBM", capacity=size * GB) for size in (48, 96, 192)},
    "HBM_bandwidth_TBps": {rate: H2M2_SYSTEM.with_tier("HBM", bandwidth=rate * TB) for rate in (2.25, 3, 4)},
    "LPDDR_bandwidth_GBps": {rate: H2M2_SYSTEM.with_tier("LPDDR", bandwidth=rate * GB) for rate in (272, 544, 1088)},
    "HBM_chip_x": {scale: with_chip("HBM", scale) for scale in (0.5, 1, 2)},
    "LPDDR_chip_x": {scale: with_chip("LPDDR", scale) for scale in (0.5, 1, 2)},
}
"""What is varied, its values, and the machines; the middle one is the published machine."""

PAPER_SAYS = {
    "HBM_capacity_GB": "strong",
    "HBM_bandwidth_TBps": "weak",
    "LPDDR_bandwidth_GBps": "matters",
    "HBM_chip_x": "",
    "LPDDR_chip_x": "matters",
}
"""What arXiv 2504.14893 says of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each LLM, context, profile and machine."""
    arguments = study_arguments(__doc__ or "", argv, default_out="h2m2_sensitivity.csv")
    sweeps = {"gpt3-175b": H2M2_SWEEPS["gpt3-175b"][3::4]} if arguments.quick else H2M2_SWEEPS
    rows = [
        row
        for llm, workloads in sweeps.items()
        for profile in (FIRST_PRINCIPLES, *([LLAMA2_RHO3] if llm == "llama2-70b" else []), H2M2_CALIBRATED)
        for workload in workloads
        for row in priced(workload, profile)
    ]
    frame = pd.DataFrame(rows).assign(seed=arguments.seed)
    systems = {f"{name} {value:g}": system for name, values in VARIANTS.items() for value, system in values.items()}
    write_csv(arguments.out, frame, provenance={"workloads": sweeps, "systems": systems})
    for (llm, profile), part in frame.groupby(["llm", "profile"], sort=False):
        show(summary(part), title=f"{llm}, {profile}, mean over {part['context'].nunique()} contexts")
    print(
        f"\nper_doubling: gain in speed-up for twice as much, from the first to the last value; from {STRONG:.0%} on it is called strong."
    )
    print(f"Written: {arguments.out}")
    return 0


def priced(workload: Workload, profile: Profile) -> list[dict[str, Any]]:
    """The exact and the greedy mapping of a workload on every machine."""
    named = [(name, value, system) for name, values in VARIANTS.items() for value, system in values.items()]
    scores = MappingScore(workload=workload, profile=profile).batch([system for _, _, system in named])
    baseline = SingleTierMapping().solve(KernelMappingProblem.build(LPDDR_ONLY_SYSTEM, workload, profile=profile)).objective
    known = {"llm": workload.llm.name, "batch": workload.batch, "context": workload.context, "fitted_on": profile.fitted_on}
    kept = ["latency_s", "greedy_latency_s", "greedy_loss", "status", "gap", "profile", "version"]
    rows = []
    for (name, value, _), score in zip(named, scores, strict=True):
        found = score or {"status": "infeasible", "profile": profile.name, "version": __version__}
        row: dict[str, Any] = known | {"varied": name, "value": value} | {column: found.get(column) for column in kept}
        for column in ("latency_s", "greedy_latency_s"):
            row[column.replace("latency_s", "speedup")] = baseline / row[column] if baseline and row[column] else None
        rows.append(row)
    return rows


def summary(part: pd.DataFrame) -> pd.DataFrame:
    """Mean speed-ups of one LLM and profile, what doubling each number brings, and whether that is much."""
    means = part.groupby(["varied", "value"], sort=False)[["speedup", "greedy_speedup", "greedy_loss"]].mean().reset_index()
    lines = []
    for name, table in means.groupby("varied", sort=False):
        doublings = math.log2(table["value"].iloc[-1] / table["value"].iloc[0])
        gain = {column: (table[column].iloc[-1] / table[column].iloc[0]) ** (1 / doublings) - 1 for column in ("speedup", "greedy_speedup")}
        lines.append(
            {"varied": name, "values": " ".join(f"{value:g}" for value in table["value"])}
            | {"speedup": " ".join(f"{speedup:.3f}" for speedup in table["speedup"]), "per_doubling": f"{gain['speedup']:.1%}"}
            | {"greedy_speedup": " ".join(f"{speedup:.3f}" for speedup in table["greedy_speedup"])}
            | {"greedy_per_doubling": f"{gain['greedy_speedup']:.1%}", "greedy_loss_at_worst": f"{table['greedy_loss'].max():.1%}"}
            | {"here": "strong" if gain["speedup"] >= STRONG else "weak", "paper": PAPER_SAYS[str(name)]}
        )
    return pd.DataFrame(lines)


if __name__ == "__main__":
    sys.exit(main())
