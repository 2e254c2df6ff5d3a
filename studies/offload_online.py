"""How much longer do online policies of offloading take than if all lengths were known, and which form should each token's state have?

Every policy serves every trace from a GPU and its host, and is held against the clairvoyant optimum of the schedule that it saw, under its
own rule: one form a token, or prompts in both forms (KVPR, arXiv 2411.17089). Regret is of the seconds of decode steps. The A100 runs at
KVPR's nominal rates, the RTX 4090 at those fitted for HybridServe (arXiv 2501.01792); one RTX 4090 has a small host, so that a
policy that needs more memory a token serves fewer requests at a time: its regret is about the batches it saw, its tokens a second are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, beside, finished_rows, plot_lines, show, study_arguments, write_csv
from memsplit.dse.replay_offload import OffloadAgainst, OffloadReplay, against_offload_optimum, replay_offload
from memsplit.models import LENGTHS, LLMConfig, System, Trace, h2m2_trace, poisson_trace
from memsplit.models.offload_profiles import HYBRIDSERVE_PAPER, KVPR_NOMINAL, OffloadProfile
from memsplit.models.presets import A100_SYSTEM, GEMMA_7B, LLAMA3_1_8B, OPT_30B, RTX4090_SYSTEM
from memsplit.models.units import GB
from memsplit.solvers.cache_ratio import LpRatio
from memsplit.solvers.offload_policies import (
    ActOnly,
    AdaptiveRatio,
    AdmissionRatio,
    FixedRatio,
    KvOnly,
    OffloadPolicy,
    RequestForms,
    StepSplit,
)

POLICIES: dict[str, OffloadPolicy] = {
    "kv": KvOnly(),
    "act": ActOnly(),
    "half": FixedRatio(act_share=0.5),
    "hybridserve": AdmissionRatio(),
    "exact_at_admission": AdmissionRatio(solver=LpRatio()),
    "kvpr": StepSplit(),
    "request_forms": RequestForms(),
    "adaptive": AdaptiveRatio(),
    "adaptive_kv_room": AdaptiveRatio(act_room=0.0),
}
"""What is compared; ``hybridserve`` is a reconstruction. The last one admits only what fits as KV."""

MACHINES: tuple[tuple[System, OffloadProfile], ...] = (
    (A100_SYSTEM, KVPR_NOMINAL),
    (RTX4090_SYSTEM, HYBRIDSERVE_PAPER),
    (replace(RTX4090_SYSTEM.with_resized_tier("host", 112 * GB), name="RTX 4090, 112 GB host"), HYBRIDSERVE_PAPER),
)

SHORT_CHAT = replace(LENGTHS["chat"], longest_prompt=1700, longest_output=256)
"""Lengths of chats, cut to the 2,048 positions that OPT knows, and for time."""

DOCUMENTS = replace(LENGTHS["long-document"], longest_prompt=7900, longest_output=128)
"""Lengths of documents, cut to the positions that Gemma was made for, and for time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Traces of a shape, drawn from a seed, and how they are served. ``once``: one seed only, for time."""

    draw: Callable[[int], Trace]
    llm: LLMConfig
    batch: int
    once: bool = False
    prefill: bool = False


CASES: dict[str, Case] = {
    "h2m2": Case(draw=lambda seed: h2m2_trace(seed, longest=1900), llm=OPT_30B, batch=32),
    "chat": Case(draw=lambda seed: poisson_trace(SHORT_CHAT, 80, seed=seed), llm=OPT_30B, batch=48),
    "chat, arriving": Case(draw=lambda seed: poisson_trace(SHORT_CHAT, 64, rate=0.2, seed=seed), llm=OPT_30B, batch=48, once=True),
    "chat, arriving, with prefill": Case(
        draw=lambda seed: poisson_trace(SHORT_CHAT, 64, rate=0.2, seed=seed), llm=OPT_30B, batch=48, once=True, prefill=True
    ),
    "long-document": Case(draw=lambda seed: poisson_trace(DOCUMENTS, 40, seed=seed), llm=GEMMA_7B, batch=16),
    "long-document, few heads": Case(draw=lambda seed: poisson_trace(DOCUMENTS, 40, seed=seed), llm=LLAMA3_1_8B, batch=24, once=True),
}
"""The shapes. In the last one ACT is twice as large as KV, elsewhere half as large or less."""

QUICK: dict[str, Case] = {
    "h2m2, 24 iterations": replace(CASES["h2m2"], draw=lambda seed: h2m2_trace(seed, iterations=24, longest=1900)),
    "chat, arriving": replace(CASES["chat, arriving"], draw=lambda seed: poisson_trace(SHORT_CHAT, 16, rate=0.2, seed=seed)),
    "long-document, few heads": replace(
        CASES["long-document, few heads"], draw=lambda seed: poisson_trace(replace(DOCUMENTS, longest_output=32), 24, seed=seed)
    ),
}
"""Small ones of three kinds."""

PICTURED = ("hybridserve", "exact_at_admission", "kvpr", "request_forms", "adaptive")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each policy, trace, machine and seed."""
    arguments = study_arguments(__doc__ or "", argv, default_out="offload_online.csv")
    pictures = beside(arguments.out, "_share.png", "_behind.png")
    cases, machines = (QUICK, MACHINES[1:2]) if arguments.quick else (CASES, MACHINES)
    parts = list(wanted(cases, arguments.seed, seeds=1 if arguments.quick else 2, machines=machines))
    finished, interrupted = finished_rows(measured(name, cases[name], *machine, seed) for name, machine, seed in parts)
    frame = pd.DataFrame([row for rows, _ in finished for row in rows])
    llms = {case.llm.name: case.llm for case in cases.values()}
    systems, profiles = ({item.name: item for item in column} for column in zip(*machines, strict=True))
    write_csv(arguments.out, frame, provenance={"systems": systems, "llms": llms, "profiles": profiles})
    draw(
        next((course for (_, (system, _), _), (_, course) in zip(parts, finished, strict=False) if system is RTX4090_SYSTEM), None),
        pictures,
    )
    print("Written:", ", ".join(map(str, (arguments.out, *pictures))))
    if interrupted:
        return INTERRUPTED
    show(summarise(frame), title="Regret against the clairvoyant optimum under any rule, mean over seeds (upper end)", rows=100)
    print()
    print(meaning(frame))
    return 0


def wanted(
    cases: dict[str, Case], seed: int, *, seeds: int, machines: Sequence[tuple[System, OffloadProfile]]
) -> Iterator[tuple[str, tuple[System, OffloadProfile], int]]:
    """The parts of the study."""
    for name, case in cases.items():
        for machine in machines:
            for number in range(seed, seed + (1 if case.once else seeds)):
                yield name, machine, number


def measured(name: str, case: Case, system: System, profile: OffloadProfile, seed: int) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The rows of one trace on one machine under every policy, and how some replays and the optimum went on."""
    trace, runs, refused = case.draw(seed), dict[str, OffloadReplay](), dict[str, str]()
    for policy, settings in POLICIES.items():
        try:
            runs[policy] = replay_offload(
                settings, trace, system, case.llm, batch_limit=case.batch, profile=profile, prefill=case.prefill, name=policy
            ).unless_interrupted()
        except ValueError as error:  # what this policy needs a token does not fit
            refused[policy] = str(error)
    against = against_offload_optimum(runs)
    known: dict[str, Any] = {"trace": name, "system": system.name, "llm": case.llm.name, "profile": profile.name, "seed": seed}
    known |= {"batch_limit": case.batch, "prefill": case.prefill}
    rows = [
        {"policy": policy} | known | (row_of(runs[policy], against.get(policy)) if policy in runs else {"stopped": refused[policy]})
        for policy in POLICIES
    ]
    return [row | {"version": __version__} for row in rows], course(
        {name: (runs[name], against[name]) for name in PICTURED if name in against}
    )


def row_of(run: OffloadReplay, against: OffloadAgainst | None) -> dict[str, Any]:
    """What is written about a replay; without iterations there is no optimum. ``any_bound_s``: of any rule; ``decode_s``: all steps."""
    summary, rows = run.summary, run.rows
    columns = ("throughput_tok_per_s", "tpot_p50_s", "tpot_p95_s", "tpot_p99_s", "migration_GB", "host_written_GB", "decode_s", "prefill_s")
    row: dict[str, Any] = {"rule": "prompts in both forms" if run.both else "one form a token"}
    row |= {"iterations": summary["iterations"], "tokens": summary["tokens"]} | {name: summary[name] for name in columns}
    row |= {"batch_mean": rows["batch"].mean(), "recomputed_share": rows["recomputed_tokens"].sum() / max(rows["tokens"].sum(), 1)}
    row |= dict.fromkeys(("optimum_s", "bound_s", "regret_lower", "regret_upper", "any_bound_s", "any_regret_upper", "informative"))
    if against is not None:
        optimum, regret = against.optimum, against.regret
        row |= {"optimum_s": optimum.objective, "bound_s": optimum.bound}
        row |= {"regret_lower": regret.lower, "regret_upper": regret.upper, "informative": regret.informative}
        row |= {"any_bound_s": against.any_bound, "any_regret_upper": against.any_regret}
    return row | {"stopped": run.stopped, "decide_s": summary["decide_mean_runtime_s"]}


def course(chosen: dict[str, tuple[OffloadReplay, OffloadAgainst]]) -> pd.DataFrame:
    """Iteration by iteration: the share of tokens recomputed, and seconds behind the optimum of one form a token on the same schedule."""
    frames = list[pd.DataFrame]()
    plans = [one for _, one in chosen.values() if one.optimum.plan is not None and not one.problem.both]
    if not plans:
        return pd.DataFrame()
    problem, best = plans[-1].problem, plans[-1].optimum.unwrap()
    act, tokens = problem.alive(np.array(best.act)), problem.steps.tokens
    spent = np.cumsum(problem.steps.seconds(act))
    for policy, share, behind in [("optimum", act / tokens, 0.0 * spent)] + [
        (policy, run.rows["recomputed_tokens"] / run.rows["tokens"], run.rows["decode_s"].cumsum().to_numpy() - spent)
        for policy, (run, one) in chosen.items()
        if np.array_equal(one.problem.steps.tokens, tokens)
    ]:
        columns = {"policy": policy, "iteration": np.arange(len(tokens)), "act_share": np.asarray(share), "behind_optimum_s": behind}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def draw(frame: pd.DataFrame | None, pictures: Sequence[Path]) -> None:
    """One trace: the share of ACT over time, and each policy against the optimum."""
    if frame is None or frame.empty:
        return
    titles = ("Share of tokens recomputed from activations", "Time behind the clairvoyant optimum")
    for path, y, title in zip(pictures, ("act_share", "behind_optimum_s"), titles, strict=True):
        plot_lines(frame, path, x="iteration", y=y, by="policy", title=title)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Regret by trace, machine and policy."""
    table = frame.pivot_table(index=["trace", "system"], columns="policy", values="any_regret_upper", sort=False)
    return table.reset_index()


def meaning(frame: pd.DataFrame) -> str:
    """What the table says, in a few lines."""
    known = frame.dropna(subset=["any_regret_upper"])
    pays = known[known["llm"] != LLAMA3_1_8B.name]
    regret = pays.groupby("policy", sort=False)["any_regret_upper"].agg(["mean", "max"])
    lines = [
        "Where activations are smaller than keys and values, at most this much longer than any rule allows, mean and worst: "
        + ", ".join(f"{name} {row['mean']:.2%} and {row['max']:.1%}" for name, row in regret.iterrows())
        + "."
    ]
    single = pays[pays["policy"] != "kvpr"]
    table = single.pivot_table(index=["trace", "system", "seed"], columns="policy", values="any_regret_upper", sort=False)
    others = table.drop(columns=["adaptive", "adaptive_kv_room"]).min(axis=1)
    wins, ties = int((others - table["adaptive"] > 1e-9).sum()), int(((others - table["adaptive"]).abs() <= 1e-9).sum())
    lines.append(
        f"Of the policies with one form a token adaptive is nearest to the optimum on {wins} of {len(table)} replays, equal on {ties}."
    )
    one = single.dropna(subset=["optimum_s"])
    worth = (one["optimum_s"] / one["any_bound_s"] - 1).max()
    lines.append(
        f"Prompts in both forms are worth at most {worth:.2%} of the seconds to who knows all lengths, where the host has room for them."
    )
    speed = pays[pays["stopped"] == ""].pivot_table(
        index=["trace", "system", "seed"], columns="policy", values="throughput_tok_per_s", sort=False
    )
    ratio = (speed["kvpr"] / speed["adaptive"]).dropna()
    if len(ratio):
        worst: Any = ratio.idxmin()
        lines.append(
            f"kvpr's tokens a second are {ratio.max():.3f} of adaptive's at best and {ratio.min():.3f} at worst "
            f"({'; '.join(map(str, worst[:2]))}), where both forms leave room for fewer requests."
        )
    room = (speed["adaptive"] / speed["adaptive_kv_room"]).dropna()
    lines.append(
        f"Room for the better share of ACT in place of KV alone brings adaptive {room.max() - 1:.1%} more tokens a second at best."
    )
    few = known[known["llm"] == LLAMA3_1_8B.name].groupby("policy", sort=False)["any_regret_upper"].max()
    if len(few):
        kept = [str(name) for name, value in few.items() if value < 1e-9]
        lines.append(
            f"With few key and value heads the answer is to keep keys and values: {', '.join(kept)} are optimal, "
            f"act is up to {few['act']:.1%} behind."
        )
    informative = int(known["informative"].astype(bool).sum())
    lines.append(f"The bound is informative (within 5 % of the best known) in {informative} of {len(known)} rows.")
    stopped = frame[frame["stopped"] != ""]
    if len(stopped):
        lines.append(
            f"{len(stopped)} replays did not come to their end ({', '.join(sorted(set(stopped['policy'])))}): see the column stopped."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
