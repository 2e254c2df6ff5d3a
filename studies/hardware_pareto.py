"""Which memories are worth their latency, money and energy when an LLM is served by the exact kernel mapping?

Optuna varies capacity and bandwidth of both tiers of a data sheet and how its compute is divided between them; each design is priced by
its fastest mapping. Area, price and static power of a unit grow with its peaks, static power of a memory with its capacity; bandwidth has
no price in a data sheet. ``--objectives`` names two or more columns of the result, ``--at-most`` and ``--at-least`` limits. A second
table has the exact front over latency and energy of all mappings of all designs, for a machine that is on anyway (no static power): a
slower mapping of a design may take less energy than its fastest one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import (
    INTERRUPTED,
    Constraint,
    MappingScore,
    Objective,
    PlanScore,
    beside,
    explore,
    plot_front,
    positive,
    served,
    serving_arguments,
    show,
    study_arguments,
    write_csv,
)
from memsplit.models import FIRST_PRINCIPLES, System
from memsplit.models.units import GB, TB
from memsplit.solvers import front_of_designs

OBJECTIVES = ("latency_s", "memory_usd", "energy_J")
HELP = (
    f"columns of numbers, as {' '.join(OBJECTIVES)} (default), throughput_tok_per_s, energy_J_per_tok, power_W, system_usd, usd_per_Mtok, "
    "area_mm2, HBM_headroom_GB; throughput and headroom are maximised, all others minimised"
)
MORE_IS_BETTER = ("throughput_tok_per_s", "headroom_GB")
"""Endings of the columns that are maximised; all others are minimised."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; the front goes to ``--out``, all designs and a picture beside it."""
    arguments = study_arguments(__doc__ or "", argv, default_out="pareto.csv", extra=_extra)
    system, workload = served(arguments)
    llm = workload.llm
    if len(system.tiers) != 2:
        raise ValueError(f"system {system.name!r} has {len(system.tiers)} tiers; hardware_pareto varies a machine of two")
    unpriced = [tier.name for tier in system.tiers if tier.cost is None or tier.energy is None]
    if unpriced:
        raise ValueError(f"system {system.name!r}: tier {unpriced[0]!r} needs cost and energy to be searched; add both to the data sheet")
    objectives = [Objective(name, "maximize" if name.endswith(MORE_IS_BETTER) else "minimize") for name in arguments.objectives]
    constraints = [limit(text, "at_most") for text in arguments.at_most] + [limit(text, "at_least") for text in arguments.at_least]
    everything, inner, picture = beside(arguments.out, "_all", "_latency_energy", ".png")
    score = MappingScore(workload=workload, profile=FIRST_PRINCIPLES)
    trials = 40 if arguments.quick else arguments.trials
    print(f"{trials} designs around {system}, {llm.name} at batch {workload.batch} and context {workload.context}")
    designs = explore(
        lambda trial: varied(system, trial),
        None,
        objectives,
        trials=trials,
        constraints=constraints,
        seed=arguments.seed,
        batch_score=score.batch,
        settings=score.settings(),
        dominated=True,
    )
    finished, lost = designs.attrs["finished"], designs.attrs["infeasible"]
    if designs.empty:
        raise ValueError(
            f"none of {finished} designs holds {llm.name} at batch {workload.batch} and context {workload.context}; lower them"
        )
    limits = arguments.at_most + arguments.at_least
    inside = designs[designs["within_limits"]]
    write_csv(everything, designs)
    if inside.empty:
        nearest = ", ".join(f"{one.name} {nearest_value(designs, one):.6g}" for one in constraints)
        raise ValueError(
            f"none of {len(designs)} designs that hold the LLM is within the limits {', '.join(limits)}; relax them (each for itself, "
            f"designs reach {nearest}; all are in {everything})"
        )
    parameters = list(designs.columns[1 : list(designs.columns).index("latency_s")])
    front = inside[inside["on_front"]].drop_duplicates(parameters)
    write_csv(arguments.out, front)
    within = f" within {', '.join(limits)}" if limits else ""
    if len(objectives) > 1:
        plot_front(inside, objectives[:3], picture, title=f"{llm.name}, batch {workload.batch}, context {workload.context}{within}")
    hidden = ("trial", "within_limits", "on_front", "seed", "version", "assumed", "solver", "profile")
    columns = [name for name in front.columns if name not in hidden and not name.endswith("_without")]
    lost = f"{lost} cannot hold the LLM" + (f", {designs.attrs['violating']} are not{within}" if limits else "")
    show(
        front[columns],
        title=f"Pareto front of {', '.join(one.name for one in objectives)}: {len(front)} of {finished} designs; {lost}",
        rows=15,
    )
    if designs.attrs["interrupted"]:
        print(f"Written: {arguments.out} (front), {everything} (all)")
        return INTERRUPTED
    mappings = latency_energy(inside.drop_duplicates(parameters), score)
    write_csv(inner, mappings.assign(profile=score.profile.name, seed=arguments.seed, version=__version__))
    slower = int((~mappings["fastest"]).sum())
    print(
        f"\nFront over latency and energy of all mappings of the designs{within}: {len(mappings)} points of "
        f"{mappings['machine'].nunique()} designs; {slower} are mappings that are not the fastest of their design."
    )
    for columns_of, what in (("energy", "energy_J, energy_J_per_tok, power_W"), ("usd", "system_usd, usd_per_Mtok"), ("area", "area_mm2")):
        without = front[f"{columns_of}_without"].iloc[0] if f"{columns_of}_without" in front else ""
        if without:
            print(f"{what}: without {without}, which the data sheet does not say.")
    print(f"Assumed, not sourced: {front['assumed'].iloc[0]}.")
    written = f"{arguments.out} (front), {everything} (all), {inner} (mappings)" + (f", {picture}" if len(objectives) > 1 else "")
    print(f"Written: {written}; rerun a row: memsplit rerun {arguments.out} --row 0; explain it: memsplit explain {arguments.out} --row 0")
    return 0


def nearest_value(designs: pd.DataFrame, constraint: Constraint) -> float:
    """The value of a constraint's column that is nearest to its limit."""
    values = designs[constraint.name].astype(float)
    return float(values.min() if constraint.at_most is not None else values.max())


def limit(text: str, side: str) -> Constraint:
    """The constraint that "latency_s=0.05" says."""
    name, _, value = text.partition("=")
    try:
        return Constraint(name.strip(), **{side: float(value)})
    except ValueError as error:
        raise ValueError(f"--{side.replace('_', '-')} {text}: write a column and a number, as in latency_s=0.05 ({error})") from None


def latency_energy(designs: pd.DataFrame, score: MappingScore) -> pd.DataFrame:
    """The front over latency and moving energy of all mappings of ``designs``: design (a trial), latency, energy, the mapping, whether it
    is the fastest of its design. Rows can be rerun: a design of this table is a machine with its mapping."""
    trials, built = designs["trial"].tolist(), designs.attrs["designs"]
    problems = [problem for trial in trials for problem in score.problems(built[trial])]
    fastest = dict(zip(trials, designs["latency_s"].tolist(), strict=True))
    front = front_of_designs(problems, static=False)
    rows = [
        {
            "trial": number,
            "machine": trials[one.design],
            "latency_s": one.latency,
            "moving_energy_J": one.energy,
            "plan": str(one.plan),
            "fastest": one.latency <= fastest[trials[one.design]] * (1 + 1e-12),  # sums in another order
        }
        for number, one in enumerate(front)
    ]
    found = pd.DataFrame(rows)
    found.attrs["designs"] = {number: (built[trials[one.design]], one.plan) for number, one in enumerate(front)}
    found.attrs["settings"] = {"score": PlanScore(workload=score.workload, profile=score.profile, granularity=score.granularity)}
    return found


def varied(system: System, trial: Any) -> System:
    """A machine between a quarter and twice the memories of ``system``, with its compute divided anew between the two sides."""
    fast, slow = system.tiers
    one, two = fast.name.lower(), slow.name.lower()
    system = system.with_resized_tier(
        fast.name, trial.suggest_float(f"{one}_GB", fast.capacity / 4 / GB, fast.capacity * 2 / GB, step=fast.capacity / 16 / GB) * GB
    ).with_tier(
        fast.name,
        bandwidth=trial.suggest_float(f"{one}_TBps", fast.bandwidth / 4 / TB, fast.bandwidth * 2 / TB, step=fast.bandwidth / 8 / TB) * TB,
    )
    system = system.with_resized_tier(
        slow.name, trial.suggest_float(f"{two}_GB", slow.capacity / 4 / GB, slow.capacity * 2 / GB, step=slow.capacity / 16 / GB) * GB
    ).with_tier(
        slow.name,
        bandwidth=trial.suggest_float(f"{two}_GBps", slow.bandwidth / 4 / GB, slow.bandwidth * 2 / GB, step=slow.bandwidth / 8 / GB) * GB,
    )
    sides = [[unit for unit in system.units if unit.tier == tier.name] for tier in (fast, slow)]
    if all(sides):
        total = sum(unit.matrix_peak for unit in system.units)
        share = trial.suggest_float(f"{one}_compute_share", 0.25, 0.75, step=0.125)
        for units, part in zip(sides, (share, 1 - share), strict=True):
            here = sum(unit.matrix_peak for unit in units)
            for unit in units:
                system = system.with_scaled_unit(unit.name, part * total / here)
    return system


def _extra(parser: argparse.ArgumentParser) -> None:
    serving_arguments(parser, batch=128)
    parser.add_argument("--trials", type=positive, default=300, help="designs to price (default: %(default)s)")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), metavar="COLUMN", help=HELP)
    parser.add_argument(
        "--at-most", nargs="+", default=[], metavar="COLUMN=VALUE", help="as in latency_s=0.05 system_usd=20000 power_W=700"
    )
    parser.add_argument("--at-least", nargs="+", default=[], metavar="COLUMN=VALUE", help="as in throughput_tok_per_s=1000")


if __name__ == "__main__":
    sys.exit(main())
