"""How much longer do online policies take than the clairvoyant optimum, on which traces and machines?

Every policy serves every trace on H2M2's machine (arXiv 2504.14893) and on one with half its HBM, and is held against the optimum of the
schedule that it saw, migration included: the same for all policies where all requests are there from the start. Where requests arrive, a
slower policy sees other batches, and its regret is against the optimum of its own. The optimum is exact or has a proven bound.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import (
    INTERRUPTED,
    Against,
    Replay,
    against_optimum,
    beside,
    finished_rows,
    plot_lines,
    replay,
    show,
    study_arguments,
    write_csv,
)
from memsplit.models import (
    FIRST_PRINCIPLES,
    LENGTHS,
    LLMConfig,
    Service,
    System,
    Trace,
    fixed_trace,
    h2m2_trace,
    poisson_trace,
    uniform_trace,
)
from memsplit.models.baselines import hierarchical
from memsplit.models.presets import CHINCHILLA_70B, GPT3_175B, H2M2_SYSTEM, LLAMA3_1_70B
from memsplit.models.units import GB
from memsplit.solvers import FlexGenStatic, Greedy, Hysteresis, LookAhead, Myopic, Policy, Shortlist, SingleTier, Static

SYSTEMS: tuple[System, ...] = (
    H2M2_SYSTEM,
    replace(H2M2_SYSTEM.with_resized_tier("HBM", 48 * GB), name="H2M2, half the HBM"),
)

POLICIES: dict[str, Policy] = {
    "lpddr": SingleTier(tier="LPDDR"),
    "flexgen": FlexGenStatic(),
    "static": Static(),
    "greedy": Greedy(),
    "myopic": Myopic(),
    "hysteresis": Hysteresis(),
    "look_ahead": LookAhead(),
    "shortlist": Shortlist(),
}
"""What is compared. ``greedy`` is H2M2's algorithm, without the page walks of its memory abstraction."""

HARDWARE_CACHE = "hierarchical"
"""The first memory as a hardware cache of the second: it maps nothing, so it has seconds but no regret."""


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
}
"""Small ones of three kinds."""

PICTURED = ("greedy", "myopic", "shortlist")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each policy, trace, machine and seed."""
    arguments = study_arguments(__doc__ or "", argv, default_out="online_regret.csv")
    pictures = beside(arguments.out, "_memory.png", "_plan.png", "_behind.png")
    cases = QUICK if arguments.quick else CASES
    parts = list(wanted(cases, arguments.seed, seeds=1 if arguments.quick else 2, systems=SYSTEMS[:1] if arguments.quick else SYSTEMS))
    finished, interrupted = finished_rows(measured(name, cases[name], system, seed) for name, system, seed in parts)
    frame = pd.DataFrame([row for rows, _ in finished for row in rows])
    llms = {case.llm.name: case.llm for case in cases.values()}
    write_csv(arguments.out, frame, provenance={"systems": SYSTEMS, "llms": llms, "profile": FIRST_PRINCIPLES})
    shown = next((course for (name, *_), (_, course) in zip(parts, finished, strict=False) if name.startswith("h2m2")), finished[0][1])
    draw(shown, pictures)
    print("Written:", ", ".join(map(str, (arguments.out, *pictures))))
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


def measured(name: str, case: Case, system: System, seed: int) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The rows of one trace on one machine under every policy, and how some replays and the optimum went on."""
    trace = case.draw(seed)
    runs = {
        policy: replay(settings, trace, system, case.llm, batch_limit=case.batch, prefill=case.prefill)
        for policy, settings in POLICIES.items()
    }
    against = against_optimum(runs)
    known: dict[str, Any] = {"trace": name, "system": system.name, "llm": case.llm.name}
    known |= {"profile": FIRST_PRINCIPLES.name, "seed": seed, "batch_limit": case.batch, "prefill": case.prefill}
    rows = [{"policy": policy} | known | row_of(run, against.get(policy)) for policy, run in runs.items()]
    if name.startswith(("fixed", "uniform", "h2m2")):
        rows.append({"policy": HARDWARE_CACHE} | known | cached(runs["lpddr"], system))
    chosen = {policy: (runs[policy], against[policy]) for policy in PICTURED if policy in against}
    return [row | {"version": __version__} for row in rows], course(chosen)


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
    return row | {"stopped": run.stopped, "decide_mean_runtime_s": summary["decide_mean_runtime_s"]}


def cached(run: Replay, system: System) -> dict[str, Any]:
    """The same batches behind a hardware cache; requests that are all there from the start see the same batches under any policy."""
    service = Service(system=system, llm=service_llm(run))
    counts = zip(run.rows["batch"].tolist(), run.rows["tokens"].tolist(), strict=True)
    seconds = sum(hierarchical(system, service.workload(batch, tokens), FIRST_PRINCIPLES).latency for batch, tokens in counts)
    tokens = run.summary["tokens"]
    return {"iterations": len(run.rows), "tokens": tokens, "throughput_tok_per_s": tokens / seconds if seconds else None} | {
        "busy_s": seconds,
        "stopped": run.stopped,
    }


def service_llm(run: Replay) -> LLMConfig:
    """The LLM that a replay served."""
    if run.service is None:
        raise ValueError("the replay does not say what it served")
    return run.service.llm


def course(chosen: dict[str, tuple[Replay, Against]]) -> pd.DataFrame:
    """Iteration by iteration: GB in the first memory, slices of attention there, and seconds behind the optimum of the same schedule."""
    frames = []
    for policy, (run, against) in chosen.items():
        path = against.optimum.plan
        if path is None:
            continue
        stages, moves = against.problem.steps.along(path)
        spent = np.cumsum(stages + np.concatenate([[0.0], moves]))
        kinds = [column for column in run.rows if str(column).startswith("n_")]
        attention = kinds.index("n_attention")
        first = next(str(column) for column in run.rows if str(column).endswith("_GB"))
        behind = run.rows["iteration_s"].cumsum().to_numpy() - spent
        rows = run.rows.assign(policy=policy, first_memory_GB=run.rows[first], behind_optimum_s=behind)
        frames.append(rows[["iteration", "policy", "tokens", "first_memory_GB", "n_attention", "behind_optimum_s"]])
        if len(frames) == 1:
            plans = [against.problem.plan(number) for number in path]
            service = against.problem
            held = held_by(service, path)
            frames.insert(
                0,
                rows[["iteration", "tokens"]].assign(
                    policy="optimum",
                    first_memory_GB=held,
                    n_attention=[plan.mean_count(attention, 0) for plan in plans],
                    behind_optimum_s=0.0,
                ),
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def held_by(problem: Any, path: Sequence[int]) -> np.ndarray[Any, Any]:
    """GB in the first memory in each iteration of a path."""
    steps = problem.steps
    places = np.unravel_index(np.array(path), steps.shape)
    every = np.arange(len(path))
    return np.asarray(sum(column[every, place] for column, place in zip(steps.first, places, strict=True))) / GB


def draw(frame: pd.DataFrame, pictures: Sequence[Any]) -> None:
    """One replay: the first memory filling, the plan, and each policy against the optimum."""
    if frame.empty:
        return
    titles = ("What the first memory holds", "Slices of attention in the first memory", "Time behind the clairvoyant optimum")
    for path, y, title in zip(pictures, ("first_memory_GB", "n_attention", "behind_optimum_s"), titles, strict=True):
        plot_lines(frame, path, x="iteration", y=y, by="policy", title=title)


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
    prefill = known[known["prefill"].astype(bool)]
    if len(prefill):
        least = prefill["regret_lower"].min()
        lines.append(f"With prefill in the iterations no policy is below {least:.1%}: all decide on the decode step alone.")
    informative = known["informative"].astype(bool)
    lines.append(f"The bound is informative (within 5 % of the best known) in {int(informative.sum())} of {len(known)} rows.")
    stopped = frame[frame["stopped"].fillna("") != ""]
    if len(stopped):
        names = ", ".join(sorted(set(stopped["policy"])))
        lines.append(f"{len(stopped)} replays did not come to their end ({names}): see the column stopped.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
