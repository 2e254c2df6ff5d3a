"""What does a better online policy cost: how long it takes to decide, and how much it moves, against its regret?

Policies with their settings varied serve traces that are all there from the start, one iteration decided at a time (``window=1``, nothing
is worked out for several iterations together). The regret is against the clairvoyant optimum, migration included. On H2M2's trace some also
move data in both directions at once, or keep duplicates of weights: the rows with a mode. Decision times are those of this machine, what
an online server would pay, with the tables of the iteration where the policy asks for them: decide_s (the mean but for the first decision)
and columns that end in runtime_s differ from run to run, all others do not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import (
    INTERRUPTED,
    Against,
    Objective,
    Replay,
    against_optimum,
    beside,
    finished_rows,
    minimised,
    non_dominated,
    plot_lines,
    replay,
    show,
    study_arguments,
    write_csv,
)
from memsplit.models import FIRST_PRINCIPLES, LLMConfig, System, Trace, h2m2_trace, poisson_trace, uniform_trace
from memsplit.models.migration import Duplicates
from memsplit.models.paging import Directions
from memsplit.models.presets import CHINCHILLA_70B, GPT3_175B, H2M2_SYSTEM, LLAMA3_1_70B
from memsplit.models.units import GB
from memsplit.solvers import FlexGenStatic, Greedy, GreedyEviction, Hysteresis, LookAhead, Myopic, Policy, Shortlist, Static

HORIZONS = (0.5, 2.0, 8.0, 32.0, 128.0, math.inf)
AHEAD = (1, 2, 4, 8, 16, 32)

HALF = replace(H2M2_SYSTEM.with_resized_tier("HBM", 48 * GB), name="H2M2, half the HBM")

MODES: dict[str, tuple[Directions, Duplicates]] = {
    "one direction, no duplicates": ("one", "none"),
    "both directions": ("both", "none"),
    "duplicates kept": ("one", "kept"),
    "duplicates loaded": ("one", "loaded"),
    "both directions, duplicates loaded": ("both", "loaded"),
}
"""How data migrate."""

MOVERS: dict[tuple[str, float | None], Policy] = {
    ("greedy", None): Greedy(),
    ("myopic", None): Myopic(),
    ("shortlist", Shortlist().horizon): Shortlist(),
}
"""The policies whose migration is varied, by name and setting."""


def policies(*, quick: bool) -> dict[tuple[str, float | None], Policy]:
    """What is compared, by name and setting."""
    horizons, ahead = (HORIZONS[1::2], AHEAD[1::2]) if quick else (HORIZONS, AHEAD)
    found: dict[tuple[str, float | None], Policy] = {
        ("flexgen", None): FlexGenStatic(),
        ("static", None): Static(),
        ("greedy", None): Greedy(),
        ("greedy_eviction", None): GreedyEviction(),
        ("myopic", None): Myopic(),
    }
    found |= {("hysteresis", horizon): Hysteresis(horizon=horizon) for horizon in horizons}
    found |= {("look_ahead", float(number)): LookAhead(iterations=number) for number in ahead}
    found |= {("shortlist", horizon): Shortlist(horizon=horizon) for horizon in horizons}
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace, drawn from a seed, on H2M2's machine."""

    draw: Callable[[int], Trace]
    llm: LLMConfig
    batch: int


CASES: dict[str, Case] = {
    "h2m2": Case(draw=h2m2_trace, llm=GPT3_175B, batch=32),
    "uniform": Case(
        draw=lambda seed: uniform_trace(40, prompt_tokens=(256, 1536), output_tokens=(16, 96), seed=seed), llm=GPT3_175B, batch=32
    ),
    "code": Case(draw=lambda seed: poisson_trace("code", 96, seed=seed), llm=CHINCHILLA_70B, batch=32),
    "long-document": Case(draw=lambda seed: poisson_trace("long-document", 24, seed=seed), llm=LLAMA3_1_70B, batch=24),
}
QUICK: dict[str, Case] = {"h2m2, 24 iterations": Case(draw=lambda seed: h2m2_trace(seed, iterations=24), llm=GPT3_175B, batch=32)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each policy, setting and trace."""
    arguments = study_arguments(__doc__ or "", argv, default_out="policy_frontier.csv")
    pictures = beside(arguments.out, "_moved.png", "_decided.png")
    cases = QUICK if arguments.quick else CASES
    compared = policies(quick=arguments.quick)
    systems = (H2M2_SYSTEM,) if arguments.quick else (H2M2_SYSTEM, HALF)
    finished, interrupted = finished_rows(parts(cases, compared, systems, arguments.seed))
    frame = pd.DataFrame([row for rows in finished for row in rows])
    llms = {case.llm.name: case.llm for case in cases.values()}
    write_csv(arguments.out, frame, provenance={"systems": (H2M2_SYSTEM, HALF), "llms": llms, "profile": FIRST_PRINCIPLES})
    compared_rows = frame[frame["mode"].isna()]
    summary = summarise(compared_rows)
    draw(summary, pictures)
    print("Written:", ", ".join(map(str, (arguments.out, *pictures))))
    if interrupted:
        return INTERRUPTED
    show(summary, title="Mean over traces", rows=60)
    print()
    print(meaning(summary))
    print(savings(frame))
    return 0


def parts(
    cases: dict[str, Case], compared: dict[tuple[str, float | None], Policy], systems: Sequence[System], seed: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each trace under all policies, and of the first trace in every way to migrate."""
    for name, case in cases.items():
        yield measured(name, case, compared, seed)
    name, case = next(iter(cases.items()))
    for system in systems:
        yield migrated(name, case, system, seed)


def measured(name: str, case: Case, compared: dict[tuple[str, float | None], Policy], seed: int) -> list[dict[str, Any]]:
    """The rows of one trace. The first decision, which may prepare what all others use, stands on its own."""
    trace = case.draw(seed)
    named = {f"{policy} {setting}": (policy, setting, settings) for (policy, setting), settings in compared.items()}
    runs = {
        text: replay(settings, trace, H2M2_SYSTEM, case.llm, batch_limit=case.batch, prefill=False, window=1).unless_interrupted()
        for text, (_, _, settings) in named.items()
    }
    against = against_optimum(runs)
    return [
        {"policy": policy, "setting": setting, "trace": name, "mode": None} | row_of(runs[text], against[text], seed)
        for text, (policy, setting, _) in named.items()
        if text in against and not runs[text].stopped
    ]


def migrated(name: str, case: Case, system: System, seed: int) -> list[dict[str, Any]]:
    """The rows of one trace on one machine in every way to migrate; the optimum of the schedule is found once for all of them."""
    trace = case.draw(seed)
    runs = {
        (policy, mode): replay(
            settings, trace, system, case.llm, batch_limit=case.batch, prefill=False, window=1, directions=directions, duplicates=duplicates
        ).unless_interrupted()
        for policy, settings in MOVERS.items()
        for mode, (directions, duplicates) in MODES.items()
    }
    against = against_optimum({f"{policy} {mode}": run for (policy, mode), run in runs.items()})
    return [
        {"policy": policy[0], "setting": policy[1], "trace": name, "mode": mode} | row_of(run, against[f"{policy} {mode}"], seed)
        for (policy, mode), run in runs.items()
        if f"{policy} {mode}" in against and not run.stopped
    ]


def row_of(run: Replay, against: Against, seed: int) -> dict[str, Any]:
    """What is written about a replay. The first decision, which may prepare what all others use, stands on its own."""
    summary, regret, decided = run.summary, against.regret, run.rows["decide_runtime_s"]
    return (
        {column: summary[column] for column in ("system", "llm", "profile")}
        | {"seed": seed, "directions": run.directions, "duplicates": run.duplicates, "iterations": len(run.rows)}
        | {column: summary[column] for column in ("throughput_tok_per_s", "tpot_p50_s", "tpot_p99_s", "migrations")}
        | {"migration_GB": summary["migration_GB"], "migration_s": summary["migration_s"]}
        | {"migration_share": summary["migration_s"] / run.busy, "duplicates_mean_GB": run.rows["duplicates_GB"].mean(), "busy_s": run.busy}
        | {"regret_lower": regret.lower, "regret_upper": regret.upper, "informative": regret.informative}
        | {"version": __version__, "first_runtime_s": decided.iloc[0], "decide_s": decided.iloc[1:].mean()}
        | {f"decide_p{p}_runtime_s": decided.iloc[1:].quantile(p / 100) for p in (50, 99)}
    )


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each policy and setting: means over the traces that it served to the end, and whether nothing moves less and regrets
    less (``on_front``)."""
    columns = ["regret_upper", "migration_GB", "migration_share", "decide_p50_runtime_s", "decide_p99_runtime_s", "first_runtime_s"]
    grouped = frame.groupby(["policy", "setting"], sort=False, dropna=False)
    table = grouped[columns].mean().assign(traces=grouped.size()).reset_index()
    objectives = [Objective("regret_upper"), Objective("migration_GB")]
    return table.assign(on_front=non_dominated(minimised(table, objectives)))


def draw(summary: pd.DataFrame, pictures: Sequence[Any]) -> None:
    """Regret against what is moved, and against the time to decide."""
    titles = ("Regret against what is moved", "Regret against the time of a decision")
    shown = summary.assign(regret_percent=100 * summary["regret_upper"])
    shown = shown[shown["regret_percent"] < 10]
    for path, x, title in zip(pictures, ("migration_GB", "decide_p50_runtime_s"), titles, strict=True):
        plot_lines(shown, path, x=x, y="regret_percent", by="policy", title=title, markers_only=tuple(shown["policy"].unique()))


def meaning(summary: pd.DataFrame) -> str:
    """What the table says, in a few lines."""
    lines = []
    greedy = summary[summary["policy"] == "greedy"].iloc[0]
    for policy, part in summary.groupby("policy", sort=False):
        best = part.sort_values("regret_upper").iloc[0]
        setting = "" if pd.isna(best["setting"]) else f" with {best['setting']:g} iterations"
        lines.append(
            f"{policy}{setting}: regret {best['regret_upper']:.3%}, moves {best['migration_GB']:.3g} GB, decides in "
            f"{best['decide_p50_runtime_s'] * 1e6:.3g} us (99 of 100 in {best['decide_p99_runtime_s'] * 1e6:.3g} us)."
        )
    best = summary[summary["policy"] == "shortlist"].sort_values("regret_upper").iloc[0]
    lines.append(
        f"shortlist prepares its list once in {best['first_runtime_s'] * 1e3:.3g} ms; it then decides "
        f"{greedy['decide_p50_runtime_s'] / best['decide_p50_runtime_s']:.2g} times as fast as greedy, with "
        f"{best['regret_upper'] / greedy['regret_upper']:.2%} of its regret."
    )
    front = summary[summary["on_front"]].sort_values("migration_GB")
    named = ", ".join(f"{row['policy']}" + ("" if pd.isna(row["setting"]) else f" {row['setting']:g}") for _, row in front.iterrows())
    lines.append(f"Nothing both moves less and regrets less than: {named}.")
    return "\n".join(lines)


def savings(frame: pd.DataFrame) -> str:
    """What moving in both directions and keeping duplicates save, in a few lines."""
    lines = []
    for (system, policy), part in frame[frame["mode"].notna()].groupby(["system", "policy"], sort=False):
        by_mode = part.set_index("mode")
        served = [by_mode.loc[mode] for mode in MODES if mode in by_mode.index]
        if len(served) < 2 or next(iter(MODES)) not in by_mode.index:
            continue  # replays that did not come to their end have no row
        plain, *others = served
        found = [
            f"{row.name} {row['migration_GB']:.3g} GB, {row['migration_s'] * 1e3:.3g} ms ({plain['busy_s'] / row['busy_s'] - 1:+.2%})"
            for row in others
        ]
        lines.append(
            f"{policy} on {system} moves {plain['migration_GB']:.3g} GB in {plain['migration_s'] * 1e3:.3g} ms "
            f"({plain['migration_share']:.2%} of its time); {'; '.join(found)} (in brackets: throughput)."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
