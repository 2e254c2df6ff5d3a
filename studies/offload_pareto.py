"""Which GPU, host memory and link are worth their money and energy when an LLM's weights and state are kept on the host?

Optuna varies the memory and bandwidth of the GPU, its FLOP/s, the host's memory, the link and the batch; each design is priced by its
exact ratio of keys and values to activations, and HybridServe's rule stands beside it. Area, price and static power of a GPU grow with
its FLOP/s, static power of a memory with its capacity; bandwidth and link have no price in a data sheet.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from memsplit.dse import INTERRUPTED, Objective, OffloadScore, beside, explore, plot_front, positive, show, study_arguments, write_csv
from memsplit.models import CacheRatioProblem, OffloadMachine, System, Workload
from memsplit.models.offload_profiles import DATASHEET, HYBRIDSERVE_PAPER
from memsplit.models.presets import llm_named, system_named
from memsplit.models.units import GB, TB, TFLOPS

FITTED = "rtx4090_pcie4"
"""The machine that has a fitted profile; others are priced by their data sheet alone."""

OBJECTIVES = [Objective("throughput_tok_per_s", "maximize"), Objective("memory_usd"), Objective("energy_J_per_tok")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; the front goes to ``--out``, all designs and a picture beside it."""
    arguments = study_arguments(__doc__ or "", argv, default_out="offload_pareto.csv", extra=_extra)
    everything, picture = beside(arguments.out, "_all", ".png")
    system, llm = system_named(arguments.system), llm_named(arguments.llm)
    workload = Workload(llm=llm, batch=arguments.batch, context=arguments.context, weight_bits=16, kv_bits=16, activation_bits=16)
    check_variable(system)
    unpriced = [tier.name for tier in system.tiers[:2] if tier.cost is None or tier.energy is None]
    if unpriced:
        raise ValueError(f"system {system.name!r}: tier {unpriced[0]!r} needs cost and energy to be searched; add both to the data sheet")
    score = OffloadScore(profile=HYBRIDSERVE_PAPER if arguments.system == FITTED else DATASHEET)
    trials = 40 if arguments.quick else arguments.trials
    print(f"{trials} designs around {system}, {llm.name} at context {workload.context}, 16 bit; profile {score.profile.name}")
    designs = explore(
        lambda trial: varied(system, workload, trial),
        score,
        OBJECTIVES,
        trials=trials,
        seed=arguments.seed,
        settings=score.settings(),
        dominated=True,
    )
    finished, lost = designs.attrs["finished"], designs.attrs["infeasible"]
    if designs.empty:
        largest, served = varied(system, workload, Roomiest())
        problem = CacheRatioProblem.build(largest, served, profile=score.profile)
        raise ValueError(
            f"none of {finished} designs holds {llm.name} at context {workload.context}; of the largest memories and the smallest batch, "
            f"{served.batch}: {problem.explain_infeasible()}"
        )
    front = designs[designs["on_front"]].drop_duplicates([name for name in designs.columns[1 : list(designs.columns).index("latency_s")]])
    write_csv(arguments.out, front)
    write_csv(everything, designs)
    plot_front(designs, OBJECTIVES, picture, title=f"{llm.name} offloaded, context {workload.context}")
    hidden = ("trial", "within_limits", "on_front", "seed", "version", "assumed", "solver", "profile", "status")
    shown = [name for name in front.columns if name not in hidden and not name.endswith("_blocks")]
    show(front[shown], title=f"Pareto front: {len(front)} of {finished} designs; {lost} cannot hold the LLM", rows=15)
    losses = designs["heuristic_loss"].astype(float).dropna()
    if len(losses):
        worst = losses.max()
        print(f"\nHybridServe's rule (a reconstruction) takes {losses.mean():.1%} longer than the optimum, {worst:.1%} at worst.")
    resident = int((designs["weights_on"] == "gpu").sum())
    print(f"All weights stay on the GPU in {resident} of {len(designs)} designs, and are streamed in the others, whichever is faster.")
    without = front["energy_without"].iloc[0]
    print(f"energy_J_per_tok: idle time included{f'; without {without} (unknown)' if without else ''}.")
    print(f"Assumed, not sourced: {front['assumed'].iloc[0]}.")
    print(f"Written: {arguments.out} (front), {everything} (all), {picture}; rerun a row: memsplit rerun {arguments.out} --row 0")
    return INTERRUPTED if designs.attrs["interrupted"] else 0


class Roomiest:
    """A trial in which every memory is as large, and every batch as small, as the search may make them."""

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        """The largest memory, the smallest batch."""
        return low if name == "batch" else high

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        """The fastest."""
        return high


def check_variable(system: System) -> None:
    """ValueError if the machine cannot offload, or has a number without limit, around which nothing can be searched."""
    OffloadMachine.build(system)
    gpu, host = system.tiers[:2]
    unit = next(unit for unit in system.units if unit.tier == gpu.name)
    down = next(link for link in system.links if (link.source, link.target) == (host.name, gpu.name))
    numbers = {
        f"capacity of {gpu.name!r}": gpu.capacity,
        f"bandwidth of {gpu.name!r}": gpu.bandwidth,
        f"matrix_peak of {unit.name!r}": unit.matrix_peak,
        f"capacity of {host.name!r}": host.capacity,
        f"bandwidth of the link {host.name!r} -> {gpu.name!r}": down.bandwidth,
    }
    endless = [name for name, value in numbers.items() if not math.isfinite(value)]
    if endless:
        raise ValueError(f"system {system.name!r}: the {endless[0]} is infinite, and designs are searched around it; give a finite number")


def varied(system: System, workload: Workload, trial: Any) -> tuple[System, Workload]:
    """A GPU, host and link between half and four times those of ``system``, and a batch up to four times that of ``workload``."""
    gpu, host = system.tiers[:2]
    unit = next(unit for unit in system.units if unit.tier == gpu.name)
    peak = trial.suggest_float("gpu_TFLOPps", *_range(unit.matrix_peak / TFLOPS), log=True) * TFLOPS
    system = system.with_scaled_unit(unit.name, peak / unit.matrix_peak)
    system = system.with_resized_tier(gpu.name, trial.suggest_int("gpu_GB", *_steps(gpu.capacity / GB, 4), step=4) * GB)
    system = system.with_tier(gpu.name, bandwidth=trial.suggest_float("gpu_TBps", *_range(gpu.bandwidth / TB), log=True) * TB)
    system = system.with_resized_tier(host.name, trial.suggest_int("host_GB", *_steps(host.capacity / GB, 32), step=32) * GB)
    down = next(link for link in system.links if (link.source, link.target) == (host.name, gpu.name))
    speed = trial.suggest_float("link_GBps", *_range(down.bandwidth / GB), log=True) * GB
    ends = {(host.name, gpu.name), (gpu.name, host.name)}
    links = tuple(replace(link, bandwidth=speed) if (link.source, link.target) in ends else link for link in system.links)
    batch = trial.suggest_int("batch", *_steps(workload.batch, max(1, workload.batch // 4)), step=max(1, workload.batch // 4))
    return replace(system, links=links), replace(workload, batch=batch)


def _range(value: float) -> tuple[float, float]:
    return value / 2, value * 4


def _steps(value: float, step: int) -> tuple[int, int]:
    """From about half to about four times ``value`` in whole steps."""
    return step * max(1, round(value / 2 / step)), step * max(1, round(value * 4 / step))


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default=FITTED, help="data sheet (.toml) or a machine's name (default: %(default)s)")
    parser.add_argument("--llm", default="opt-30b", help="Hugging Face config.json or an LLM's name (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="requests around which is searched (default: %(default)s)")
    parser.add_argument("--context", type=positive, default=1024, help="tokens a request (default: %(default)s)")
    parser.add_argument("--trials", type=positive, default=300, help="designs to price (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
