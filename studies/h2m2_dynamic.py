"""How fast is H2M2 while requests come and go: against LPDDR only, against FlexGen, and of what was possible (arXiv 2504.14893)?

The paper's trace: batch 32, 128 iterations of GPT3-175B, contexts from 256 to 2048, random early termination and replacement. How long
requests live is not published: an assumption, varied here. Every policy sees the same batches; prefill is left out, as in the paper.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, Migration, Replay, beside, finished_rows, plot_lines, replay, show, study_arguments, write_csv
from memsplit.models import FIRST_PRINCIPLES, H2M2_CALIBRATED, Profile, System, Trace, h2m2_trace
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM, LPDDR_ONLY_SYSTEM
from memsplit.models.units import ns
from memsplit.solvers import FlexGenStatic, Greedy, GreedyEviction, Hysteresis, Myopic, Policy, SingleTier, Static

BATCH = 32

PUBLISHED = {("h2m2", "speedup"): 1.48, ("flexgen", "speedup"): 1.25, ("h2m2", "share_of_oracle"): 0.96}
"""Dynamic lengths, GPT3-175B; over LPDDR only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A policy on a machine. ``walks``: with the page walks of H2M2's memory abstraction, 300 ns each, four at once (a reading)."""

    policy: Policy
    system: System = H2M2_SYSTEM
    migration: Migration = "serial"
    walks: bool = False


SETTINGS: dict[str, Setting] = {
    "lpddr_only": Setting(policy=SingleTier(), system=LPDDR_ONLY_SYSTEM),
    "flexgen": Setting(policy=FlexGenStatic()),
    "static": Setting(policy=Static()),
    "h2m2": Setting(policy=Greedy(), walks=True),
    "h2m2_eviction": Setting(policy=GreedyEviction(), walks=True),
    "greedy": Setting(policy=Greedy()),
    "myopic": Setting(policy=Myopic()),
    "hysteresis": Setting(policy=Hysteresis()),
    "oracle": Setting(policy=Myopic(), migration="free"),
}
"""What is compared. ``h2m2`` is ``greedy`` with page walks; ``h2m2_eviction`` runs that algorithm once and then only evicts, another
reading of the paper; ``oracle`` is the optimum of each iteration with migration that takes no time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each policy, trace and profile."""
    arguments = study_arguments(__doc__ or "", argv, default_out="h2m2_dynamic.csv")
    (picture,) = beside(arguments.out, ".png")
    number = 2 if arguments.quick else 8
    cases = [(FIRST_PRINCIPLES, 128.0), (H2M2_CALIBRATED, 128.0)]
    cases += [] if arguments.quick else [(FIRST_PRINCIPLES, 32.0), (FIRST_PRINCIPLES, 512.0)]
    seeds = range(arguments.seed, arguments.seed + number)
    finished, interrupted = finished_rows(replayed(profile, mean_output, seed) for profile, mean_output in cases for seed in seeds)
    frame = pd.DataFrame([row for rows, _ in finished for row in rows])
    write_csv(
        arguments.out,
        frame,
        provenance={"systems": (H2M2_SYSTEM, LPDDR_ONLY_SYSTEM), "llm": GPT3_175B, "profiles": (FIRST_PRINCIPLES, H2M2_CALIBRATED)},
    )
    plot_lines(
        finished[0][1], picture, x="iteration", y="iteration_s", by="policy", title="GPT3-175B on H2M2's machine, requests come and go"
    )
    print(f"Written: {arguments.out}, {picture}")
    if interrupted:
        return INTERRUPTED
    summary = summarise(frame)
    show(summary, title=f"Speed-up over LPDDR only, mean and range over {number} seeds")
    print()
    print(meaning(frame, summary))
    return 0


def replayed(profile: Profile, mean_output: float, seed: int) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The rows of one trace under every policy, and the iterations of some for the picture."""
    trace = h2m2_trace(seed, batch=BATCH, mean_output=mean_output)
    runs = {name: served(setting, trace, profile) for name, setting in SETTINGS.items()}
    baseline, oracle = (runs[name].summary["throughput_tok_per_s"] for name in ("lpddr_only", "oracle"))
    rows = []
    for name, run in runs.items():
        found = run.summary
        rate = found["throughput_tok_per_s"]
        known: dict[str, Any] = {
            "policy": name,
            "trace": "h2m2",
            "mean_output": mean_output,
            "system": found["system"],
            "llm": found["llm"],
        }
        rows.append(
            known
            | {"profile": profile.name, "fitted_on": profile.fitted_on, "seed": seed}
            | {"speedup": rate / baseline, "share_of_oracle": rate / oracle}
            | {column: found[column] for column in ("throughput_tok_per_s", "tpot_p50_s", "tpot_p95_s", "tpot_p99_s")}
            | {column: found[column] for column in ("iterations", "tokens", "requests", "duration_s")}
            | {column: found[column] for column in ("migrations", "migration_GB", "migration_s", "paging_s", "decide_mean_runtime_s")}
            | {"version": __version__}
        )
    shown = [runs[name].rows.assign(policy=name) for name in ("lpddr_only", "flexgen", "h2m2", "oracle")]
    return rows, pd.concat(shown)


def served(setting: Setting, trace: Trace, profile: Profile) -> Replay:
    """A policy's replay; ValueError if it did not come to its end."""
    walking = replace(profile, page_walk=300 * ns, page_walks=4) if setting.walks else profile
    run = replay(
        setting.policy,
        trace,
        setting.system,
        GPT3_175B,
        batch_limit=BATCH,
        profile=walking,
        prefill=False,
        migration=setting.migration,
    ).unless_interrupted()
    if run.stopped:
        raise ValueError(run.stopped)
    return run


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each profile, life of requests and policy."""
    lines = []
    for (profile, mean_output, policy), part in frame.groupby(["profile", "mean_output", "policy"], sort=False):
        line: dict[str, Any] = {"profile": profile, "mean_output": mean_output, "policy": policy}
        for column in ("speedup", "share_of_oracle"):
            line[column] = part[column].mean()
            line[f"{column}_range"] = f"{part[column].min():.3f} to {part[column].max():.3f}"
            line[f"{column}_published"] = PUBLISHED.get((str(policy), column))
        lines.append(
            line | {"migration_GB": part["migration_GB"].mean(), "migration_share": part["migration_s"].sum() / part["duration_s"].sum()}
        )
    return pd.DataFrame(lines)


def meaning(frame: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What the table says, in a few lines."""
    lines = []
    for (profile, mean_output), part in summary.groupby(["profile", "mean_output"], sort=False):
        found = []
        for (policy, column), value in PUBLISHED.items():
            ours = float(part[part["policy"] == policy][column].iloc[0])
            found.append(f"{policy} {column.replace('_', ' ')} {ours:.3f} (published {value:g}, {ours / value - 1:+.1%})")
        lines.append(f"{profile!s}, {mean_output!s} tokens a request on average: {'; '.join(found)}.")
    first = summary[(summary["profile"] == FIRST_PRINCIPLES.name) & (summary["mean_output"] == 128)].set_index("policy")
    share = first["migration_share"].to_dict()
    moving = [f"{name} {share[name]:.2%}" for name in ("greedy", "myopic", "hysteresis")]
    lines.append(f"Share of the time that goes into migration: {', '.join(moving)}.")
    best = first.drop(index="oracle").sort_values("speedup").reset_index().iloc[-1]
    lines.append(f"Nearest to the oracle of those that pay for migration: {best['policy']}, {best['share_of_oracle']:.2%} of it.")
    same = frame[frame["profile"] == FIRST_PRINCIPLES.name]
    rates = same.pivot_table(index=["mean_output", "seed"], columns="policy", values="throughput_tok_per_s")
    for name in ("static", "hysteresis"):
        wins = int((rates[name] > rates["greedy"]).sum())
        lines.append(f"{name} beats greedy, both without page walks, on {wins} of {len(rates)} traces.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
