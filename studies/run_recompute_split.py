"""Is the recompute split that the toolkit chooses the fastest one when it is run, and does a step take as long as predicted?

For each LLM, batch and context: the parts of a layer are measured, the toolkit predicts the decode step at every split and chooses one
(KVPR, arXiv 2411.17089), and all of them are run, in random order and several times. Regret is the measured time of the choice over that of
the fastest split; it counts where the difference exceeds the spread of the runs. On a CPU the link to the host is emulated.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memsplit.dse import beside, positive, study_arguments
from memsplit.dse.runtime import LayerTimes, SplitKV, TransferKV
from memsplit.models.offload import OffloadLayer, OffloadMachine
from memsplit.models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, SplitTemplate
from memsplit.solvers.recompute_split import ClosedFormSplit
from memsplit.studies._run_plans import Case, Settings, measured, run_options, table_of
from memsplit.studies._run_verdicts import judged, report

SHOWN = ["split", "predicted_s", "measured_s", "spread_s", "error_pct", "chosen", "best", "tokens_equal", "peak_device_GB"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each case and split. 1 if no case could be run, or not all."""
    arguments = study_arguments(__doc__ or "", argv, default_out="run_recompute_split.csv", extra=_options)
    (picture,) = beside(arguments.out, ".png")
    settings = Settings.of(arguments)

    def rows_of(case: Case) -> list[dict[str, Any]]:
        return split_rows(case, template=arguments.template, chunks=arguments.chunks, weights=arguments.weights)

    frame, code = table_of(arguments, settings, rows_of)
    if not code:
        report(
            frame,
            arguments.out,
            picture,
            columns=SHOWN,
            text="{} tokens".format,
            without="the transfer of all keys and values",
            x="recomputed_tokens",
        )
    return code


def _options(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--template", choices=("staged", "chunked", "fluid"), default="staged", help="how a layer is scheduled (default: %(default)s)"
    )
    parser.add_argument("--chunks", type=positive, default=4, help="of chunked and fluid (default: %(default)s)")
    parser.add_argument(
        "--weights", choices=("gpu", "host"), default="gpu", help="where the weights are; host: streamed (default: %(default)s)"
    )


def measured_problem(
    times: LayerTimes, *, batch: int, tokens: int, most: int, template: SplitTemplate, chunks: int, weights: Any
) -> RecomputeSplitProblem:
    """The problem that measured layers make: seconds in place of bytes and FLOPs, at 1 B/s and 1 FLOP/s.

    The last layer is a class of its own, as the token is chosen after it. A single layer has nothing to hide its computation behind, a
    constant that is left out, and loads while the token is chosen; without a barrier its weights are sent from the begin of the
    computation on, which is the template "chunked" of what is left of them. Memories are without limit, as the runtime refuses what does
    not fit.
    """
    each, alone, sent = batch * times.context, times.layers == 1, times.weights
    if alone and template == "fluid":
        times = replace(times, first=0.0)
        template, sent = "chunked", max(times.weights - times.compute, 0.0)
    one = OffloadLayer(
        layers=1,
        batch=batch,
        weight_bytes=0.0,
        read_bytes=sent,
        sent_bytes=sent,
        projection_bytes=min(times.first, sent),
        linear_flops=times.outside if alone else times.compute + times.outside,
        kv_bytes=times.kv / each,
        act_bytes=times.act / each,
        recompute_flops=times.recompute / each,
        attention_flops=0.0,
    )
    others = () if alone else (replace(one, layers=times.layers - 1, linear_flops=times.compute),)
    machine = OffloadMachine(
        gpu="device",
        host="host",
        peak=1.0,
        gpu_bandwidth=math.inf,
        host_bandwidth=math.inf,
        to_device=1.0,
        to_host=1.0,
        cpu_peak=None,
        gpu_capacity=math.inf,
        host_capacity=math.inf,
    )
    return RecomputeSplitProblem(
        layers=(*others, one), machine=machine, context=tokens, most=most, template=template, chunks=chunks, weights=weights
    )


def chosen_split(problem: RecomputeSplitProblem) -> int:
    """The best split that is one for all layers, as the runtime executes it: a step's time is convex, so between those of the classes."""
    found = ClosedFormSplit().solve(problem).unwrap().splits
    splits = np.arange(min(found), max(found) + 1)
    times = [layer.layers * problem.layer_time(index, splits) for index, layer in enumerate(problem.layers)]
    return int(splits[np.sum(times, axis=0).argmin()])


def split_rows(case: Case, *, template: SplitTemplate, chunks: int, weights: Any) -> list[dict[str, Any]]:
    """The rows of a case: the splits of the sweep and the chosen one; no split, the baseline, comes first."""
    times = case.layer_times(weights)
    problem = measured_problem(
        times, batch=case.batch, tokens=case.tokens, most=case.context, template=template, chunks=chunks, weights=weights
    )
    choice = chosen_split(problem)
    swept = np.unique(np.rint(np.linspace(0, case.context, case.settings.points)).astype(int)).tolist()
    splits = sorted({*swept, choice, 0})
    plans = [
        SplitKV(split=split, template=template, chunks=chunks, weights=weights) if split else TransferKV(weights=weights)
        for split in splits
    ]
    # Predictions are made before anything of a plan is run.
    predicted = [(times.step(plan, case.tokens), times.replay(plan, case.tokens)) for plan in plans]
    found = measured(case, plans)
    shared = case.columns(times) | {"drift_pct": 100 * case.drift(times, weights)}
    rows = [
        shared
        | {"template": template, "chunks": chunks if template != "staged" else 1, "weights": weights}
        | {"split": split, "split_share": split / case.context, "swept": split in swept, "chosen": split == choice}
        | {"predicted_s": seconds, "replayed_s": replayed, "sheet_s": sheet}
        | run
        for split, (seconds, replayed), sheet, run in zip(
            splits, predicted, _by_sheet(case, splits, template, chunks, weights), found, strict=True
        )
    ]
    return judged(rows)


def _by_sheet(case: Case, splits: Sequence[int], template: SplitTemplate, chunks: int, weights: Any) -> list[float | None]:
    """Seconds that the data sheet alone predicts; None without one, or if it has no link."""
    if case.settings.sheet is None:
        return [None] * len(splits)
    try:
        problem = RecomputeSplitProblem.build(case.settings.sheet, case.workload(), template=template, chunks=chunks, weights=weights)
    except ValueError as error:
        print(f"the data sheet predicts nothing: {error}", file=sys.stderr)
        return [None] * len(splits)
    return [problem.evaluate(RecomputeSplitPlan(splits=(split,) * len(problem.layers))).latency for split in splits]


if __name__ == "__main__":
    sys.exit(main())
