"""How much longer do online policies take than the clairvoyant optimum, on which traces and machines?

Every policy serves every trace on H2M2's machine (arXiv 2504.14893) and on one with half its HBM, and is held against the optimum of the
schedule that it saw, migration included: the same for all policies where all requests are there from the start. Where requests arrive, a
slower policy sees other batches, and its regret is against the optimum of its own. The optimum is exact or has a proven bound. The
columns decide_s (the mean time of a decision on this machine, but for the first) and decide_mean_runtime_s (with it) differ from run to
run; all others do not. They count the tables that a policy asks for, which up to 64 iterations share here; what a policy takes that
decides one iteration at a time is in policy_frontier.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import (
    INTERRUPTED,
    Against,
    Replay,
    against_optimum,
    beside,
    finished_rows,
    replay,
    show,
    study_arguments,
    write_csv,
)
from memsplit.dse.plots import plot_replay
from memsplit.dse.replay import courses
from memsplit.models import (
    FIRST_PRINCIPLES,
    LENGTHS,
    LLMConfig,
    System,
    Trace,
    fixed_trace,
    h2m2_trace,
    poisson_trace,
    uniform_trace,
)
from memsplit.models.presets import CHINCHILLA_70B, GPT3_175B, H2M2_SYSTEM, LLAMA3_1_70B
from memsplit.models.units import GB
from memsplit.solvers import FlexGenStatic, Greedy, GreedyEviction, Hysteresis, LookAhead, Myopic, Policy, Shortlist, SingleTier, Static
from memsplit.solvers.policies import HardwareCache

SYSTEMS: tuple[System, ...] = (
    H2M2_SYSTEM,
    replace(H2M2_SYSTEM.with_resized_tier("HBM", 48 * GB), name="H2M2, half the HBM"),
)

POLICIES: dict[str, Policy] = {
    "lpddr": SingleTier(tier="LPDDR"),
    "hierarchical": HardwareCache(),
    "flexgen": FlexGenStatic(),
    "static": Static(),
    "greedy": Greedy(),
    "greedy_eviction": GreedyEviction(),
    "myopic": Myopic(),
    "hysteresis": Hysteresis(),
    "look_ahead": LookAhead(),
    "shortlist": Shortlist(),
}
"""What is compared. ``greedy`` is H2M2's algorithm, without the page walks of its memory abstraction, ``greedy_eviction`` runs it once and
then evicts. ``hierarchical`` maps nothing: the first memory is a hardware cache of the second, and its regret is against the optimum of
mappings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Traces of a shape, drawn from a seed, and how they are served. ``random``: seeds differ. ``arriving``: not all there at 0 s."""

    draw: Callable[[int], Trace]
    llm: LLMConfig
    batch: int
    random: bool = True
    arriving: bool = False
    prefill: bool = False


CASES: dict[str, Case] = {
    "fixed": Case(draw=lambda seed: fixed_trace(32, prompt_tokens=1024, output_tokens=128), llm=GPT3_175B, batch=32, random=False),
    "uniform": Case(
        draw=lambda seed: uniform_trace(48, prompt_tokens=(256, 1536), output_tokens=(16, 128), seed=seed), llm=GPT3_175B, batch=32
    ),
    "h2m2": Case(draw=h2m2_trace, llm=GPT3_175B, batch=32),
    "chat": Case(draw=lambda seed: poisson_trace("chat", 64, seed=seed), llm=CHINCHILLA_70B, batch=48),
    "code": Case(draw=lambda seed: poisson_trace("code", 128, seed=seed), llm=CHINCHILLA_70B, batch=32),
    "long-document": Case(draw=lambda seed: poisson_trace("long-document", 32, seed=seed), llm=LLAMA3_1_70B, batch=24),
    "reasoning, to 1024 tokens": Case(
        draw=lambda seed: poisson_trace(replace(LENGTHS["reasoning"], longest_output=1024), 192, seed=seed), llm=LLAMA3_1_70B, batch=192
    ),
    "chat, arriving": Case(
        draw=lambda seed: poisson_trace(replace(LENGTHS["chat"], longest_output=256), 256, rate=120.0, seed=seed),
        llm=LLAMA3_1_70B,
        batch=256,
        arriving=True,
    ),
    "code, arriving": Case(
        draw=lambda seed: poisson_trace(replace(LENGTHS["code"], longest_output=64), 400, rate=300.0, seed=seed),
        llm=LLAMA3_1_70B,
        batch=256,
        arriving=True,
    ),
    "long-document, arriving, with prefill": Case(
        draw=lambda seed: poisson_trace(replace(LENGTHS["long-document"], longest_output=256), 12, rate=0.1, seed=seed),
        llm=LLAMA3_1_70B,
        batch=16,
        arriving=True,
        prefill=True,
    ),
    "chat, arriving, with prefill": Case(
        draw=lambda seed: poisson_trace(replace(LENGTHS["chat"], longest_output=128), 128, rate=4.0, seed=seed),
        llm=LLAMA3_1_70B,
        batch=64,
        arriving=True,
        prefill=True,
    ),
    "h2m2, 96 iterations, with prefill": Case(draw=lambda seed: h2m2_trace(seed, iterations=96), llm=GPT3_175B, batch=32, prefill=True),
}
"""The shapes. Outputs that would run for thousands of iterations are cut where the name or the number here says so, for time."""

QUICK: dict[str, Case] = {
    "h2m2, 24 iterations": replace(CASES["h2m2"], draw=lambda seed: h2m2_trace(seed, iterations=24)),
    "long-document": replace(
        CASES["long-document"],
        draw=lambda seed: poisson_trace(replace(LENGTHS["long-document"], longest_output=48), 24, seed=seed),
    ),
    "code, arriving": replace(
        CASES["code, arriving"],
        draw=lambda seed: poisson_trace(replace(LENGTHS["code"], longest_output=16), 96, rate=300.0, seed=seed),
    ),
    "code, arriving, with prefill": replace(
        CASES["code, arriving"],
        draw=lambda seed: poisson_trace(replace(LENGTHS["code"], longest_output=16), 24, rate=3.0, seed=seed),
        prefill=True,
    ),
}
"""Small ones of four kinds."""

PICTURED = ("greedy", "myopic", "shortlist")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each policy, trace, machine and seed."""
    arguments = study_arguments(__doc__ or "", argv, default_out="online_regret.csv")
    (picture,) = beside(arguments.out, ".png")
    cases = QUICK if arguments.quick else CASES
    parts = list(wanted(cases, arguments.seed, seeds=1 if arguments.quick else 2, systems=SYSTEMS[:1] if arguments.quick else SYSTEMS))
    finished, interrupted = finished_rows(measured(name, cases[name], system, seed) for name, system, seed in parts)
    frame = pd.DataFrame([row for rows, _ in finished for row in rows])
    llms = {case.llm.name: case.llm for case in cases.values()}
    write_csv(arguments.out, frame, provenance={"systems": SYSTEMS, "llms": llms, "profile": FIRST_PRINCIPLES})
    # Interrupted, there may be fewer courses than parts; H2M2's trace is the first of them.
    draw(parts[0], cases, finished[0][1], picture)
    print("Written:", ", ".join(map(str, (arguments.out, picture))))
    if interrupted:
        return INTERRUPTED
    show(summarise(frame), title="Regret against the clairvoyant optimum, mean over machines and seeds (upper end)", rows=100)
    print()
    print(meaning(frame))
    return 0


def wanted(cases: dict[str, Case], seed: int, *, seeds: int, systems: Sequence[System]) -> Iterator[tuple[str, System, int]]:
    """The parts of the study; arrivals, whose optima are many, and what is not random have one seed. H2M2's trace comes first."""
    for name in sorted(cases, key=lambda name: not name.startswith("h2m2")):
        once = cases[name].arriving or not cases[name].random
        for system in systems:
            for number in range(seed, seed + (1 if once else seeds)):
                yield name, system, number


def measured(name: str, case: Case, system: System, seed: int) -> tuple[list[dict[str, Any]], dict[str, pd.DataFrame]]:
    """The rows of one trace on one machine under every policy, and how some replays and the optimum went on."""
    trace = case.draw(seed)
    runs = {
        policy: replay(settings, trace, system, case.llm, batch_limit=case.batch, prefill=case.prefill).unless_interrupted()
        for policy, settings in POLICIES.items()
    }
    against = against_optimum(runs)
    known: dict[str, Any] = {"trace": name, "system": system.name, "llm": case.llm.name}
    known |= {"profile": FIRST_PRINCIPLES.name, "seed": seed, "batch_limit": case.batch, "prefill": case.prefill}
    rows = [{"policy": policy} | known | row_of(run, against.get(policy)) for policy, run in runs.items()]
    return [row | {"version": __version__} for row in rows], courses({policy: runs[policy] for policy in PICTURED}, against)


def row_of(run: Replay, against: Against | None) -> dict[str, Any]:
    """What is written about a replay; without iterations there is no optimum. ``busy_s``: of all iterations, migration included."""
    summary = run.summary
    columns = ("throughput_tok_per_s", "tpot_p50_s", "tpot_p95_s", "tpot_p99_s")
    row: dict[str, Any] = {"iterations": summary["iterations"], "tokens": summary["tokens"]} | {name: summary[name] for name in columns}
    row |= {name: summary[name] for name in ("migrations", "migration_GB", "migration_s")} | {"busy_s": run.busy}
    row |= dict.fromkeys(("optimum_s", "bound_s", "regret_lower", "regret_upper", "competitive_ratio", "informative"))
    if against is not None:
        optimum, regret = against.optimum, against.regret
        row |= {"optimum_s": optimum.objective, "bound_s": optimum.bound}
        row |= {"regret_lower": regret.lower, "regret_upper": regret.upper, "informative": regret.informative}
        row["competitive_ratio"] = None if regret.upper is None else 1 + regret.upper  # proven: never above this
    decided = run.rows["decide_runtime_s"].iloc[1:]  # the first decision may prepare what all others use
    row |= {"stopped": run.stopped, "decide_s": decided.mean() if len(decided) else None}
    return row | {"decide_mean_runtime_s": summary["decide_mean_runtime_s"]}


def draw(part: tuple[str, System, int], cases: dict[str, Case], shown: dict[str, pd.DataFrame], picture: Any) -> None:
    """One replay: the memories filling, the plans, what moves, and each policy against the optimum."""
    if not shown:
        return
    name, system, seed = part
    title = f"{cases[name].llm.name} on {system.name}, trace {name}, seed {seed}"
    plot_replay(shown, picture, title=title, capacity={tier.name: tier.capacity / GB for tier in system.tiers})


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Regret by trace and policy."""
    table = frame.pivot_table(index="trace", columns="policy", values="regret_upper", sort=False)
    return table.reset_index()


def meaning(frame: pd.DataFrame) -> str:
    """What the table says, in a few lines."""
    lines = []
    key = ["trace", "system", "seed"]
    known = frame.dropna(subset=["regret_upper"])
    busy = known[known["stopped"] == ""].pivot_table(index=key, columns="policy", values="regret_upper")
    for name in ("shortlist", "look_ahead", "hysteresis", "myopic"):
        both = busy[[name, "greedy"]].dropna()
        gain = (1 + both["greedy"]) / (1 + both[name]) - 1
        wins, ties = int((gain > 1e-9).sum()), int((gain.abs() <= 1e-9).sum())
        lines.append(
            f"{name} is nearer to its optimum than greedy on {wins} of {len(both)} replays, equal on {ties}: "
            f"by {gain.mean():.2%} on average, {gain.min():.2%} at worst, {gain.max():.2%} at best."
        )
    worst = known[known["policy"] == "shortlist"].sort_values("regret_upper").iloc[-1]
    lines.append(f"The largest regret of shortlist: {worst['regret_upper']:.3%} ({worst['trace']}; {worst['system']}).")
    cache = known[known["policy"] == "hierarchical"]
    least, most = cache["regret_lower"].min(), cache["regret_upper"].max()
    lines.append(f"A hardware cache takes from {least:+.1%} to {most:+.1%} more time than the best mapping.")
    prefill = known[known["prefill"].astype(bool)]
    for name, part in (("without", known[~known["prefill"].astype(bool)]), ("with", prefill)):
        decided = part[part["policy"] == "shortlist"]["decide_s"].mean() * 1e6
        lines.append(
            f"{name.capitalize()} prefill shortlist decides in {decided:.3g} us on average, after a first decision that makes its list."
        )
    for name in ("greedy", "shortlist"):
        regrets = prefill[prefill["policy"] == name]["regret_upper"]
        how = "does not look at prefill" if name == "greedy" else "does"
        lines.append(f"With prefill in the iterations {name}, which {how}, regrets {regrets.min():.3%} to {regrets.max():.3%}.")
    informative = known["informative"].astype(bool)
    lines.append(f"The bound is informative (within 5 % of the best known) in {int(informative.sum())} of {len(known)} rows.")
    stopped = frame[frame["stopped"].fillna("") != ""]
    if len(stopped):
        names = ", ".join(sorted(set(stopped["policy"])))
        lines.append(f"{len(stopped)} replays did not come to their end ({names}): see the column stopped.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
