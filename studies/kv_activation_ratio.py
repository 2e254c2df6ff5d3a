"""What share of a batch's state should be activations, how near do HybridServe's rules come, and do mini-batches matter (arXiv 2501.01792)?

One decode step of a batch of equal prompts: throughput against the share of activations, every method against the exact optimum, whole
generations by rule, and mini-batches of requests of unequal lengths. On the RTX 4090 at the rates fitted for HybridServe, elsewhere at
those of the data sheet.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, compare, finished_rows, positive, show, study_arguments, write_csv
from memsplit.models import System, Workload
from memsplit.models.cache_ratio import CacheRatioPlan, CacheRatioProblem, act_first_is_optimal
from memsplit.models.mini_batches import MiniBatchProblem
from memsplit.models.offload_generation import generation_time
from memsplit.models.offload_profiles import DATASHEET, FLEXGEN_ON_HYBRIDSERVE, HYBRIDSERVE_PAPER, OffloadProfile
from memsplit.models.presets import LLMS, SYSTEMS, llm_named, system_named
from memsplit.models.units import GB
from memsplit.solvers import Solver
from memsplit.solvers.cache_ratio import (
    ActFirstRatio,
    CpSatRatio,
    EnumerationRatio,
    HybridServeRatio,
    LpRatio,
    MilpRatio,
    SingleFormRatio,
)
from memsplit.solvers.mini_batches import CpSatBatches, FirstComeBatches, GreedyRatioBatches, MilpBatches

MEASURED = "rtx4090_pcie4"
"""The machine that has fitted profiles."""

GENERATED = 128
MINI_BATCH = 8
"""Requests in a mini-batch at most; its buffer holds 1.25 times as many blocks as this number of mean requests."""

TIE = 1 + 1e-12
"""Times whose ratio is below this are equal but for rounding; of equal placements the one with the least ACT on the GPU is shown."""

SPREAD = 0.7
"""Standard deviation of the logarithm of unequal lengths: a request in six is twice as long as the median or longer."""


def more_arguments(parser: argparse.ArgumentParser) -> None:
    """--system --llm --batch --prompt."""
    parser.add_argument("--system", default=MEASURED, help=f"data sheet (.toml) or one of {', '.join(SYSTEMS)} (default: %(default)s)")
    parser.add_argument("--llm", default="opt-30b", help=f"Hugging Face config.json or one of {', '.join(LLMS)} (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=128, help="requests (default: %(default)s)")
    parser.add_argument("--prompt", type=positive, default=1024, help="tokens a request (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each share, method, rule, and way to form mini-batches."""
    arguments = study_arguments(__doc__ or "", argv, default_out="kv_activation_ratio.csv", extra=more_arguments)
    system, llm = system_named(arguments.system), llm_named(arguments.llm)
    profile = HYBRIDSERVE_PAPER if arguments.system == MEASURED else DATASHEET
    workload = Workload(llm=llm, batch=arguments.batch, context=arguments.prompt, weight_bits=16, kv_bits=16, activation_bits=16)
    problem = CacheRatioProblem.build(system, workload, profile=profile)
    resident = CacheRatioProblem.build(system, workload, profile=profile, weights="gpu")
    if not problem.possible:
        raise ValueError(f"{llm.name}, batch {workload.batch}: {problem.explain_infeasible()}")
    ratios = problem.ratios
    found, interrupted = finished_rows(parts_of(arguments, system, workload, profile, problem))
    parts = dict(found)
    frame = pd.concat([part.assign(part=name) for name, part in parts.items()], ignore_index=True)
    frame = frame[["part", *(column for column in frame if column != "part")]].assign(
        system=system.name, llm=llm.name, batch=workload.batch, prompt_tokens=workload.context
    )
    frame = frame.assign(r=ratios.r, rho=ratios.rho, w=ratios.w, c=ratios.c, act_first_is_optimal=act_first_is_optimal(problem))
    frame["profile"] = frame["profile"].fillna(profile.name) if "profile" in frame else profile.name
    frame = frame.assign(template="fluid", seed=arguments.seed, version=__version__)
    write_csv(arguments.out, frame, provenance={"system": system, "workload": workload, "profile": profile})
    if interrupted:
        print(f"Written: {arguments.out}")
        return INTERRUPTED
    shares, methods, rules, packed = parts.values()
    show(shares, title=f"{llm.name} on {system.name}, batch {workload.batch}, {workload.context} tokens: one decode step ({profile.name})")
    show(methods.drop(columns=["message"]), title="The best ratio by method")
    show(rules.drop(columns=["fitted_on"]), title=f"A prompt of {workload.context} and {GENERATED} new tokens")
    if len(packed):
        show(packed.drop(columns=["message"]), title="Mini-batches of unequal requests")
    for line in meaning(problem, shares, methods, packed):
        print(line)
    print(about_weights(problem, resident))
    print(f"Written: {arguments.out}")
    return 0


def parts_of(
    arguments: argparse.Namespace, system: System, workload: Workload, profile: OffloadProfile, problem: CacheRatioProblem
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The study's four tables by name; Ctrl-C, which ``compare`` answers with the rows it has, ends it after them."""

    def whole(name: str, table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
        yield name, table
        if table.attrs.get("interrupted"):
            raise KeyboardInterrupt

    yield "share", shares_of(problem, points=6 if arguments.quick else 21)
    yield from whole("method", methods_of(problem, enumerate_all=not arguments.quick))
    yield "generation", rules_of(system, workload, profile, measured=arguments.system == MEASURED)
    requests = min(workload.batch, 16 if arguments.quick else 128)
    yield from whole("mini_batches", mini_batches(system, workload, profile, seed=arguments.seed, requests=requests))


def about_weights(problem: CacheRatioProblem, resident: CacheRatioProblem) -> str:
    """What streaming all weights, as HybridServe does, leaves unused; or that it is not needed."""
    plan = LpRatio().solve(problem).unwrap()
    cost = problem.evaluate(plan)
    kept = LpRatio().solve(resident)
    if kept.objective is not None and kept.objective < cost.latency:
        return (
            f"The weights would fit on the GPU beside enough state: kept there, a step takes {kept.objective:.4g} s instead of "
            f"{cost.latency:.4g} s. All tables here stream them (CacheRatioProblem.build(..., weights='gpu') does not)."
        )
    empty = (cost.capacity[0] - cost.tier_bytes[0]) / GB
    return f"All weights cross the link in every step; {empty:.3g} of {cost.capacity[0] / GB:.3g} GB of the GPU stay empty."


def shares_of(problem: CacheRatioProblem, *, points: int) -> pd.DataFrame:
    """The fastest step for each share of ACT blocks, over all ways to place them; none where no plan fits."""
    rows = []
    for share in np.linspace(0.0, 1.0, points):
        act = round(float(share) * problem.blocks)
        near = np.arange(act + 1)
        kv_gpu = problem.kv_gpu_for(near, act - near)
        kv_host = problem.blocks - act - kv_gpu
        fits = problem.fitting(kv_gpu, near, kv_host, act - near)
        seconds = np.where(fits, problem.seconds(near, kv_host, act - near), np.inf)
        best = int((seconds <= seconds.min() * TIE).argmax())
        row: dict[str, Any] = {"act_share": act / max(problem.blocks, 1), "latency_s": None, "throughput_tok_per_s": None}
        if fits[best]:
            row |= {"latency_s": float(seconds[best]), "throughput_tok_per_s": len(problem.request_blocks) / float(seconds[best])}
            row |= {"act_gpu_blocks": int(near[best]), "kv_gpu_blocks": int(kv_gpu[best])}
        rows.append(row)
    return pd.DataFrame(rows)


def methods_of(problem: CacheRatioProblem, *, enumerate_all: bool) -> pd.DataFrame:
    """Every solver against CP-SAT: latency, proven gap, loss, and its plan."""
    solvers: dict[str, Any] = {
        "cpsat": CpSatRatio(relative_gap=1e-6),
        "milp": MilpRatio(),
        "lp_rounded": LpRatio(),
        "hybridserve": HybridServeRatio(),
        "hybridserve_true_count": HybridServeRatio(true_count=True),
        "act_first": ActFirstRatio(),
        "kv_only": SingleFormRatio(form="kv"),
        "act_only": SingleFormRatio(form="act"),
    }
    if enumerate_all:
        solvers["enumeration"] = EnumerationRatio()
    table = compare({"ratio": problem}, solvers, reference="cpsat", progress=False)
    table = table.rename(columns={"solver": "method"})
    requests = len(problem.request_blocks)
    return table.drop(columns=["problem"]).assign(throughput_tok_per_s=requests / table["latency_s"])


def rules_of(system: System, workload: Workload, profile: OffloadProfile, *, measured: bool) -> pd.DataFrame:
    """Whole generations by rule, and all KV at the link that was fitted for FlexGen."""
    forms: list[tuple[Any, OffloadProfile]] = [(form, profile) for form in ("best", "act_first", "kv", "act")]
    if measured:
        forms.append(("kv", FLEXGEN_ON_HYBRIDSERVE))
    rows = []
    for form, rates in forms:
        cost = generation_time(system, workload, prompt=workload.context, generated=GENERATED, profile=rates, form=form)
        rows.append(
            {"rule": form, "profile": rates.name, "fitted_on": rates.fitted_on, "prefill_s": cost.prefill, "decode_s": cost.decode}
            | {"throughput_tok_per_s": cost.throughput, "host_GB": cost.host_bytes / GB, "fits": cost.fits}
        )
    return pd.DataFrame(rows)


def mini_batches(system: System, workload: Workload, profile: OffloadProfile, *, seed: int, requests: int) -> pd.DataFrame:
    """Ways to form mini-batches of requests whose lengths are log-normal (in random order, and the longest first) or uniform; each follows
    the best ratio, but with "one_form_each"."""
    random = np.random.default_rng(seed)
    most = 4 * workload.context
    lengths = np.clip(np.rint(workload.context * random.lognormal(0.0, SPREAD, requests)), 1, most).astype(int)
    orders = {
        "lognormal": lengths,
        "longest_first": np.sort(lengths)[::-1],
        "uniform": random.integers(1, 2 * workload.context + 1, requests),
    }
    problems = {}
    for name, contexts in orders.items():
        ratio = CacheRatioProblem.build(system, replace(workload, batch=requests), profile=profile, contexts=contexts.tolist())
        plan = LpRatio().solve(ratio).plan
        if plan is not None:
            blocks = max(int(1.25 * MINI_BATCH * ratio.blocks / requests), max(ratio.request_blocks))
            problems[name] = MiniBatchProblem.from_cache_plan(ratio, plan, most_requests=MINI_BATCH, most_blocks=blocks)
            if name == "lognormal":
                problems["one_form_each"] = whole_requests(ratio, plan.act_gpu + plan.act_host, blocks)
    solvers: dict[str, Solver] = {
        "cpsat": CpSatBatches(relative_gap=1e-3, time_limit=30.0),
        "milp": MilpBatches(relative_gap=1e-3, time_limit=30.0),
        "greedy_ratio": GreedyRatioBatches(),
        "first_come": FirstComeBatches(),
    }
    if not problems:  # no plan holds requests of such lengths
        return pd.DataFrame()
    table = compare(problems, solvers, reference="cpsat", progress=False)
    return table.rename(columns={"solver": "method", "problem": "lengths"}).assign(requests=requests)


def whole_requests(problem: CacheRatioProblem, act_blocks: int, blocks: int) -> MiniBatchProblem:
    """Each request in one form and on the host: those that come first as keys and values, the last ones as activations."""
    as_kv, as_act = (
        MiniBatchProblem.from_cache_plan(problem, plan, most_requests=MINI_BATCH, most_blocks=blocks)
        for plan in (CacheRatioPlan(kv_host=problem.blocks), CacheRatioPlan(act_host=problem.blocks))
    )
    later = np.cumsum(problem.request_blocks[::-1])[::-1] <= act_blocks
    return replace(
        as_kv,
        load=tuple(np.where(later, as_act.load, as_kv.load).tolist()),
        generate=tuple(np.where(later, as_act.generate, as_kv.generate).tolist()),
    )


def meaning(problem: CacheRatioProblem, shares: pd.DataFrame, methods: pd.DataFrame, packed: pd.DataFrame) -> list[str]:
    """What the tables say, in words."""
    latency, loss = (dict(zip(methods["method"], methods[column].tolist(), strict=True)) for column in ("latency_s", "loss"))
    ratios = problem.ratios
    grid = shares["latency_s"].astype(float).fillna(np.inf)
    equal = shares.loc[grid <= grid.min() * TIE, "act_share"]
    best = f"{equal.min():.0%}" if len(equal) == 1 else f"any from {equal.min():.0%} to {equal.max():.0%}, all equally fast"
    pays = "smaller" if ratios.act_pays else "not smaller"

    def times(method: str) -> str:
        found = latency[method]
        return "do not fit" if math.isnan(found) else f"take {found / latency['cpsat']:.2f} x the optimum"

    def losing(share: float) -> str:
        return "finds no plan" if math.isnan(share) else f"loses {share:.1%}"

    lines = [
        f"\nActivations are {pays} than keys and values (r = {ratios.r:.3g}); the best share of the grid is {best}.",
        f"All keys and values {times('kv_only')}, all activations {times('act_only')}.",
        f"Activations first on the GPU: {'optimal' if act_first_is_optimal(problem) else 'not proven optimal'} by the rule, "
        f"which {losing(loss['act_first'])} here.",
        f"HybridServe's rule, as reconstructed, {losing(loss['hybridserve'])}; "
        f"with the true number of blocks it {losing(loss['hybridserve_true_count'])}.",
    ]
    if len(packed):
        lines.append(f"Mini-batches are formed of {packed['requests'].iloc[0]} requests of unequal lengths.")
        mixed = packed["lengths"] != "one_form_each"
        for text, part in (("each request follows the best ratio", packed[mixed]), ("each request has one form", packed[~mixed])):
            first, greedy = (part.loc[part["method"] == name, "loss"].max() for name in ("first_come", "greedy_ratio"))
            proven = part.loc[part["method"] == "cpsat", "gap"].max()
            lines.append(
                f"Mini-batches where {text}: first come loses {first:.1%} at most, greedy by ratio {greedy:.1%}, "
                f"against a plan within {proven:.2%} of its bound."
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
