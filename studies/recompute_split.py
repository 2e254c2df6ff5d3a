"""How many tokens should a GPU recompute while the keys and values of the others arrive, and what does it gain?

Context x batch x GPU x link, with the optimal split of each of three schedules: "staged" (KVPR, arXiv 2411.17089), "chunked" (four
chunks) and "fluid" (HybridServe, arXiv 2501.01792). Gains are over sending all keys and values, and over recomputing all of them, in the
same schedule and at the rates of the data sheet.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, beside, finished_rows, plot_lines, positive, show, study_arguments, write_csv
from memsplit.models import System, Workload
from memsplit.models.offload_profiles import DATASHEET
from memsplit.models.presets import LLMS, SYSTEMS, llm_named, system_named
from memsplit.models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, SplitTemplate, best_splits
from memsplit.models.units import GB, ms

TEMPLATES: tuple[SplitTemplate, ...] = ("staged", "chunked", "fluid")
CHUNKS = 4
GPUS = (0.5, 1.0, 2.0)
"""The GPU's peaks, as multiples of its data sheet's."""
LINKS = (0.5, 1.0, 2.0, 4.0)
"""The link's bandwidth, as multiples of the data sheet's: a generation of PCIe doubles it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each context, batch, GPU, link and schedule."""
    arguments = study_arguments(__doc__ or "", argv, default_out="recompute_split.csv", extra=_options)
    (picture,) = beside(arguments.out, ".png")
    base, llm = system_named(arguments.system), llm_named(arguments.llm)
    gpus, links = ((1.0,), (1.0, 2.0)) if arguments.quick else (GPUS, LINKS)
    systems = {f"gpu {gpu:g} link {link:g}": (gpu, link, scaled(base, gpu, link)) for gpu in gpus for link in links}
    bits = dict.fromkeys(("weight_bits", "kv_bits", "activation_bits"), arguments.bits)
    workloads = [Workload(llm=llm, batch=batch, context=max(arguments.context), **bits) for batch in arguments.batch]
    contexts = np.array(sorted(arguments.context))
    rows, interrupted = finished_rows(
        row | {"gpu_peak_x": gpu, "link_x": link}
        for workload in workloads
        for gpu, link, system in systems.values()
        for template in TEMPLATES
        for row in priced(system, workload, contexts, template, arguments.weights, arguments.batches)
    )
    frame = pd.DataFrame(rows).assign(profile=DATASHEET.name, seed=arguments.seed, version=__version__)
    write_csv(
        arguments.out,
        frame,
        provenance={"workloads": workloads, "systems": {name: one for name, (*_, one) in systems.items()}},
    )
    if interrupted:
        print(f"Written: {arguments.out}")
        return INTERRUPTED
    shown = [
        "context",
        "batch",
        "template",
        "split",
        "split_share",
        "step_ms",
        "gain_over_transfer",
        "gain_over_recompute",
        "r",
        "rho",
        "c",
        "fits",
    ]
    show(frame[(frame["gpu_peak_x"] == 1) & (frame["link_x"] == 1)][shown], title=f"{llm.name} on {base.name}, as in the data sheet")
    middle = {"context": contexts[len(contexts) // 2], "batch": arguments.batch[len(arguments.batch) // 2], "gpu_peak_x": 1.0}
    by_link = frame[np.logical_and.reduce([frame[name] == value for name, value in middle.items()])]
    tables = [
        by_link.pivot_table(index="to_device_GBps", columns="template", values=column) for column in ("split_share", "gain_over_transfer")
    ]
    if all(len(table) for table in tables):
        table = tables[0].add_suffix("_share").join(tables[1].add_suffix("_gain")).reset_index()
        show(table, title=f"Share recomputed and gain by link, context {middle['context']}, batch {middle['batch']}")
    if not frame["fits"].any():
        print(f"Written: {arguments.out}")
        print(f"\nNo case fits; of the smallest, {smallest_case(base, workloads, contexts, arguments)}")
        return 1
    drawn = bool(np.isfinite(by_link["to_device_GBps"]).all())
    if drawn:
        plot_lines(
            by_link,
            picture,
            x="to_device_GBps",
            y="gain_over_transfer",
            by="template",
            title=f"{llm.name}, context {middle['context']}, batch {middle['batch']}: gain of the best split",
        )
    for line in meaning(frame):
        print(line)
    print(f"Written: {arguments.out}" + (f", {picture}" if drawn else "; no picture, as the link is infinitely fast"))
    return 0


def smallest_case(system: System, workloads: Sequence[Workload], contexts: np.ndarray[Any, Any], arguments: argparse.Namespace) -> str:
    """The smallest batch and context, and why it does not fit."""
    workload = replace(min(workloads, key=lambda workload: workload.batch), context=int(contexts.min()))
    problem = RecomputeSplitProblem.build(system, workload, weights=arguments.weights, batches=arguments.batches)
    return f"batch {workload.batch} and context {workload.context}: {problem.explain_infeasible()}"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default="a100_pcie4", help=f"data sheet (.toml) or one of {', '.join(SYSTEMS)} (default: %(default)s)")
    parser.add_argument("--llm", default="opt-6.7b", help=f"Hugging Face config.json or one of {', '.join(LLMS)} (default: %(default)s)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[8, 32, 64], help="requests of a GPU batch (default: %(default)s)")
    parser.add_argument(
        "--context", type=positive, nargs="+", default=[128, 512, 1024, 2048], help="tokens a request (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", choices=("gpu", "host"), default="gpu", help="where the weights are; host: streamed (default: %(default)s)"
    )
    parser.add_argument("--batches", type=positive, default=1, help="GPU batches that share a load of the weights (default: %(default)s)")
    parser.add_argument("--bits", type=float, default=16, help="bits of weights, keys, values and activations (default: %(default)s)")


def scaled(system: System, gpu: float, link: float) -> System:
    """The machine with the peaks of the first tier's units and the bandwidth of all links scaled."""
    for unit in system.units:
        if unit.tier == system.tiers[0].name:
            system = system.with_unit(unit.name, matrix_peak=unit.matrix_peak * gpu, vector_peak=unit.vector_peak * gpu)
    return replace(system, links=tuple(replace(one, bandwidth=one.bandwidth * link) for one in system.links))


def priced(
    system: System, workload: Workload, contexts: np.ndarray[Any, Any], template: SplitTemplate, weights: Any, batches: int
) -> list[dict[str, Any]]:
    """The best split at each context, and the same step without a split and with all tokens recomputed."""
    problem = RecomputeSplitProblem.build(
        system, workload, profile=DATASHEET, template=template, chunks=CHUNKS, weights=weights, batches=batches
    )
    splits, seconds = best_splits(problem, contexts)
    fixed = {
        name: np.sum([layer.layers * problem.layer_time(index, split, contexts) for index, layer in enumerate(problem.layers)], axis=0)
        for name, split in (("transfer", np.zeros_like(contexts)), ("recompute", contexts))
    }
    rows = []
    for place, context in enumerate(contexts.tolist()):
        one = replace(problem, context=context, most=context, workload=replace(workload, context=context))
        split, ratios = splits[:, place].tolist(), ratios_or_none(one)
        rows.append(
            {"llm": workload.llm.name, "system": system.name, "context": context, "batch": workload.batch, "batches": batches}
            | {"weights": weights, "template": template, "chunks": CHUNKS if template == "chunked" else None}
            | {"to_device_GBps": problem.machine.to_device / GB, "peak_TFLOPs": problem.machine.peak / 1e12}
            | {"split": "|".join(map(str, split)), "split_share": split[0] / context, "step_ms": seconds[place] / ms}
            | {"transfer_step_ms": fixed["transfer"][place] / ms, "recompute_step_ms": fixed["recompute"][place] / ms}
            | {"gain_over_transfer": _gain(fixed["transfer"][place], seconds[place])}
            | {"gain_over_recompute": _gain(fixed["recompute"][place], seconds[place])}
            | ratios
            | {"fits": one.evaluate(RecomputeSplitPlan(splits=tuple(split))).fits}
        )
    return rows


def ratios_or_none(problem: RecomputeSplitProblem) -> dict[str, float | None]:
    """r, rho, w and c of the first class of layers; r alone where sending keys and values takes no time."""
    if not math.isfinite(problem.machine.to_device):
        layer = problem.layers[0]
        return {"r": layer.act_bytes / layer.kv_bytes, "rho": None, "w": None, "c": None}
    return asdict(problem.ratios[0])


def _gain(before: float, after: float) -> float:
    """Throughput gained; none where nothing takes time."""
    return float(before / after) - 1 if after > 0 else 0.0


def meaning(frame: pd.DataFrame) -> list[str]:
    """What the table says, in a few sentences that are computed from it."""
    fitting = frame[frame["fits"]]
    mean = fitting.groupby("template")["gain_over_transfer"].mean()
    key = ["context", "batch", "gpu_peak_x", "link_x"]
    steps = fitting.pivot_table(index=key, columns="template", values="step_ms").dropna()
    lines = [
        f"\nMean throughput gained over sending all keys and values, over all {len(fitting) // len(TEMPLATES)} cases of the CSV that fit: "
        + ", ".join(f"{t} {mean.get(t, 0.0):.1%}" for t in TEMPLATES)
        + "."
    ]
    if not steps.empty and steps["fluid"].min() > 0:
        barrier, left = ((steps[name] / steps["fluid"] - 1).mean() for name in ("staged", "chunked"))
        lines.append(f"Waiting for all activations costs {barrier:.1%} of a fluid step on average; with {CHUNKS} chunks {left:.1%} remain.")
    worst = fitting.nsmallest(1, "gain_over_transfer").iloc[0]
    machine = f"GPU x {worst['gpu_peak_x']:g}, link x {worst['link_x']:g}"
    at = f"context {worst['context']}, batch {worst['batch']}, {machine}, {worst['template']}"
    lines.append(
        f"It gains least, {worst['gain_over_transfer']:.1%}, at {at}: r {worst['r']:.3g}"
        + (f", rho {worst['rho']:.3g}, c {worst['c']:.3g}." if pd.notna(worst["rho"]) else ".")
    )
    if (fitting["r"] >= 1).all():
        lines.append("Activations are no smaller than keys and values here (r >= 1): sending them never pays.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
