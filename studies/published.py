"""Which published numbers do our models reproduce, and which not?

One row for every number of ``data/published.csv`` and every profile: the published value, ours, computed in this run, and a verdict
that follows from the relative error alone. Papers: h2m2 arXiv 2504.14893, kvpr 2411.17089,
hybridserve 2501.01792, flexgen 2303.06865.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memsplit import __version__
from memsplit.dse import (
    H2M2_SWEEPS,
    INTERRUPTED,
    Migration,
    finished_rows,
    h2m2_methods,
    replay,
    show,
    speedups,
    study_arguments,
    write_csv,
)
from memsplit.models import FIRST_PRINCIPLES, H2M2_CALIBRATED, LLAMA2_RHO3, KernelMappingProblem, Profile, System, h2m2_trace
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM, LPDDR_ONLY_SYSTEM
from memsplit.models.units import MB, ns
from memsplit.solvers import FlexGenStatic, Greedy, Myopic, Policy, SingleTier
from memsplit.studies._published_measured import show_measured
from memsplit.studies._published_offload import flexgen, hybridserve, kvpr

TOLERANCE = 0.05
"""Relative error up to which a number counts as reproduced. A choice, not a statistic: ten times the rounding of a printed speed-up
(0.005 of 1 to 3), and room for what a paper leaves open (steps of a sweep, order of events)."""

PUBLISHED = Path(__file__).parent / "data" / "published.csv"
MOTIVATION_CONTEXT = 1024
"""Tokens: the context of the numbers in the motivation, a reading chosen because it fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One LLM of H2M2 under one profile; ``quick`` looks at fewer contexts where all are looked at."""

    llm: str
    profile: Profile
    quick: bool

    def _of(self, method: str, column: str = "latency_s") -> NDArray[np.float64]:
        return _rows(self.llm, self.profile, method)[column].to_numpy()

    def speedup(self, method: str) -> float:
        """Speed-up over the LPDDR-only machine, averaged over contexts."""
        return float(self._of(method, "speedup").mean())

    def motivation(self, method: str) -> float:
        """Speed-up over the LPDDR-only machine at the context of the motivation."""
        return float(self._of(method, "speedup")[self._of(method, "context") == MOTIVATION_CONTEXT][0])

    def share(self, method: str) -> float:
        """Throughput over that of the exact mapping, averaged over contexts."""
        return float((self._of("oracle") / self._of(method)).mean())

    def loss(self, method: str) -> float:
        """Throughput lost against the exact mapping, in per cent."""
        return 100 * (1 - self.share(method))

    def overhead(self, method: str) -> float:
        """Latency added to the greedy mapping without page walks, in per cent, averaged over contexts."""
        return float((self._of(method) / self._of("greedy") - 1).mean() * 100)

    def fragmentation(self, method: str) -> float:
        """MB of HBM that a method's plan leaves unused in last pages, at the worst context from the first to the last of the sweep."""
        first, last = H2M2_SWEEPS[self.llm][0], H2M2_SWEEPS[self.llm][-1]
        solver = h2m2_methods(self.profile)[method].solver
        if solver is None:
            raise ValueError(f"method {method!r} makes no plan, so that it has no pages")
        worst = 0.0
        for context in range(first.context, last.context + 1, 64 if self.quick else 1):
            problem = KernelMappingProblem.build(H2M2_SYSTEM, replace(first, context=context), profile=self.profile)
            cost = problem.evaluate(solver.solve(problem).unwrap())
            worst = max(worst, cost.tier_bytes[0] - cost.traffic[0])  # a step of a dense MHA LLM reads each byte it holds once
        return worst / MB


@cache
def _rows(llm: str, profile: Profile, method: str) -> pd.DataFrame:
    methods = h2m2_methods(profile)
    frame = speedups(H2M2_SWEEPS[llm], {name: methods[name] for name in ("lpddr_only", method)}, baseline="lpddr_only")
    return frame[frame["method"] == method]


Measure = Callable[[Run, str], float]


@dataclass(frozen=True, slots=True)
class Reading:
    """How we compute a quantity: a measure of a method (see ``h2m2_methods``), and what is to be known about it."""

    measure: Measure
    method: str
    how: str


H2M2: dict[str, tuple[Reading, ...]] = {
    "speedup over LPDDR-only": (Reading(Run.speedup, "h2m2", "greedy with page walks"),),
    "hierarchical speedup over LPDDR-only": (Reading(Run.speedup, "hierarchical", "cyclic sweep, random replacement: a reading"),),
    "H2M2 as a share of oracle": (
        Reading(Run.share, "h2m2", "greedy with page walks, oracle without; a lenient test: the losses are a sharper one"),
    ),
    "oracle speedup over LPDDR-only": (Reading(Run.speedup, "oracle", "exact mapping without page walks"),),
    "best head-aware mapping": (Reading(Run.motivation, "oracle", "exact mapping"),),
    "naive sublayer-granular mapping": (Reading(Run.motivation, "naive", "each layer's sublayer wholly on one side: a reading"),),
    "FlexGen LP mapping": (
        Reading(Run.motivation, "flexgen_uniform", "one HBM fraction for all data, made for the longest context: the reading that fits"),
        Reading(Run.motivation, "flexgen_lp", "a fraction for each data type, made for the longest context: FlexGen's own program"),
    ),
    "Q-major": (Reading(Run.motivation, "qkv_major", "qkv takes as much HBM as fits: a reading"),),
    "F-major": (Reading(Run.motivation, "fc_major", "fc takes as much HBM as fits: a reading"),),
    "A-major": (Reading(Run.motivation, "attention_major", "attention takes as much HBM as fits: a reading"),),
    "abstraction overhead": (
        Reading(Run.overhead, "h2m2", "300 ns for each touched page of 2 MiB, four at once; how far walks overlap with reads is unknown"),
    ),
    "greedy loss against optimal mapping": (
        Reading(Run.loss, "greedy", "greedy on our cost model; the paper's uses an approximate time of unknown form"),
    ),
    "8-HBM speedup over LPDDR-only": (Reading(Run.speedup, "hbm_8", "the time of an all-reduce is fitted on this very number"),),
    "worst internal fragmentation at B=32": (
        Reading(Run.fragmentation, "oracle", "a tensor a matrix and two for keys and values, in each layer; the paper's count is unknown"),
    ),
}
"""Each quantity of H2M2. Contexts are those of ``H2M2_SWEEPS`` unless the measure says otherwise."""

REMARKS = {
    "llama2-70b": "first_principles reads a group's keys and values once, and the published speed-ups of llama2-70b fit three reads",
    "chinchilla-70b": "why chinchilla-70b is faster here than published is unknown",
}
"""What we know about speed-ups that first principles miss, by LLM."""

NOT_MODELLED = {
    (None, "H2M2 memory energy per token against LPDDR-only"): "needs the energy constants of another paper (CXL-PNM)",
    (None, "8-HBM memory energy per token against LPDDR-only"): "needs the energy constants of another paper (CXL-PNM)",
    (None, "greedy mapping time on one core"): "C++ on an i7-6700; a time measured on another machine would not compare",
}
"""What no model of ours computes: (where, quantity), None for any."""


def h2m2(number: Mapping[Hashable, Any], quick: bool) -> Iterator[dict[str, Any]]:
    """``ours``, profile, fitted_on and why for one published number of H2M2, profile by profile."""
    for (where, quantity), why in NOT_MODELLED.items():
        if where in (None, number["where"]) and quantity in (None, number["quantity"]):
            yield {"why": why}
            return
    if number["where"] == "dynamic lengths":
        yield from dynamic(number, quick)
        return
    llm = number["row"]
    contexts: dict[Measure, str] = {
        Run.motivation: f"at context {MOTIVATION_CONTEXT}",
        Run.fragmentation: f"worst of {'some' if quick else 'all'} contexts",
    }
    sweep = f"mean over {len(H2M2_SWEEPS[llm])} contexts in equal steps (assumed)"
    for reading in H2M2[number["quantity"]]:
        for profile in (FIRST_PRINCIPLES, *([LLAMA2_RHO3] if llm == "llama2-70b" else []), H2M2_CALIBRATED):
            if reading.measure is Run.fragmentation and profile is not FIRST_PRINCIPLES:
                continue
            ours = reading.measure(Run(llm=llm, profile=profile, quick=quick), reading.method)
            used = h2m2_methods(profile)[reading.method].profile
            remarks = [reading.how, contexts.get(reading.measure, sweep)]
            if profile.fitted_on:
                remarks.append(f"{profile.name} is fitted on the published speed-ups themselves")
            elif reading.measure is Run.speedup and llm in REMARKS and verdict(number["value"], ours) == "not reproduced":
                remarks.append(REMARKS[llm])
            yield {"ours": ours, "profile": used.name, "fitted_on": used.fitted_on, "why": "; ".join(remarks)}


DYNAMIC = {
    "H2M2 speedup over LPDDR-only": ("h2m2", "lpddr_only"),
    "FlexGen speedup over LPDDR-only": ("flexgen", "lpddr_only"),
    "H2M2 as a share of oracle": ("h2m2", "oracle"),
}
"""Of which policies a published number is the ratio of throughputs."""


def dynamic(number: Mapping[Hashable, Any], quick: bool) -> Iterator[dict[str, Any]]:
    """The same for a number of H2M2's trace on which requests come and go: means over seeds."""
    seeds = 1 if quick else 8
    policy, over = DYNAMIC[number["quantity"]]
    for profile in (FIRST_PRINCIPLES, H2M2_CALIBRATED):
        rates = [throughput(policy, profile, seed) / throughput(over, profile, seed) for seed in range(seeds)]
        why = f"mean over {seeds} seeds; requests end at random after 128 tokens on average (assumed); H2M2 with page walks"
        yield {"ours": float(np.mean(rates)), "profile": profile.name, "fitted_on": profile.fitted_on, "why": why}


@cache
def throughput(policy: str, profile: Profile, seed: int) -> float:
    """token/s of GPT3-175B on the paper's trace under a policy; ``oracle``: the best plan of each iteration, free migration."""
    walking = replace(profile, page_walk=300 * ns, page_walks=4)
    settings: dict[str, tuple[Policy, System, Profile]] = {
        "h2m2": (Greedy(), H2M2_SYSTEM, walking),
        "flexgen": (FlexGenStatic(), H2M2_SYSTEM, profile),
        "lpddr_only": (SingleTier(), LPDDR_ONLY_SYSTEM, profile),
        "oracle": (Myopic(), H2M2_SYSTEM, profile),
    }
    chosen, system, rates = settings[policy]
    migration: Migration = "free" if policy == "oracle" else "serial"
    run = replay(chosen, h2m2_trace(seed), system, GPT3_175B, batch_limit=32, profile=rates, prefill=False, migration=migration)
    if run.unless_interrupted().stopped:
        raise ValueError(run.stopped)
    return float(run.summary["throughput_tok_per_s"])


PAPERS = {"h2m2": h2m2, "kvpr": kvpr, "hybridserve": hybridserve, "flexgen": flexgen}


def verdict(published: float, ours: float) -> str:
    """What the relative error says; NaN where there is nothing of ours."""
    if np.isnan(ours):
        return "not modelled"
    return "reproduced" if abs(ours / published - 1) <= TOLERANCE else "not reproduced"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: print and write one row for every published number and profile."""
    arguments = study_arguments(__doc__ or "", argv, default_out="published.csv")
    published = pd.read_csv(PUBLISHED)
    rows, interrupted = finished_rows(
        {**number, "published": number["value"], "ours": np.nan, "profile": "", "fitted_on": ""} | ours
        for number in published.to_dict("records")
        for ours in PAPERS[number["paper"]](number, arguments.quick)
    )
    frame = pd.DataFrame(rows)
    frame["relative_error"] = frame["ours"] / frame["published"] - 1
    frame["verdict"] = [verdict(*pair) for pair in zip(frame["published"], frame["ours"], strict=True)]
    columns = ["paper", "where", "row", "quantity", "unit", "published", "ours", "profile", "relative_error", "verdict", "why", "fitted_on"]
    frame = frame[columns].assign(seed=arguments.seed, version=__version__)
    write_csv(arguments.out, frame)
    if interrupted:
        print(f"Written: {arguments.out}")
        return INTERRUPTED
    seen = ["row", "quantity", "unit", "published", "ours", "profile", "relative_error", "verdict"]
    for (paper, where), part in frame.groupby(["paper", "where"], sort=False):
        show(part[seen], title=f"{paper}, {where}")
        for quantity, why in part.groupby("quantity", sort=False)["why"]:
            print(f"  {quantity}: " + "; ".join(dict.fromkeys("; ".join(why).split("; "))))
    show_measured(published)
    counts = pd.crosstab(frame["profile"], frame["verdict"]).reset_index()
    show(counts, title=f"Rows by verdict; reproduced: within {TOLERANCE:.0%} of the published number")
    print(f"Written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
