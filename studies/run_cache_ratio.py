"""Is the ratio of keys and values to activations that the toolkit chooses the fastest one when it is run, and is its time as predicted?

For each LLM, batch and context: the parts of a layer are measured, the toolkit predicts the decode step at every share of activations and
chooses one (HybridServe, arXiv 2501.01792), and all of them are run, in random order and several times. Regret is the measured time of the
choice over that of the fastest share; it counts where the difference exceeds the spread of the runs. On a CPU the link is emulated.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from memsplit.dse import beside, study_arguments
from memsplit.dse.runtime import CachePlan, LayerTimes
from memsplit.models.cache_ratio import BLOCK, CacheRatioPlan, CacheRatioProblem
from memsplit.solvers.cache_ratio import LpRatio
from memsplit.studies._run_plans import GENERATED, Case, Settings, measured, run_options, table_of
from memsplit.studies._run_verdicts import judged, report

SHOWN = [
    "act_share",
    "act_device_tokens",
    "predicted_s",
    "measured_s",
    "spread_s",
    "error_pct",
    "chosen",
    "best",
    "tokens_equal",
    "peak_device_GB",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each case and share of activations. 1 if no case could be run, or not all."""
    arguments = study_arguments(__doc__ or "", argv, default_out="run_cache_ratio.csv", extra=_options)
    (picture,) = beside(arguments.out, ".png")
    settings = Settings.of(arguments)
    for llm in settings.llms:
        _refuse_one_layer(llm.name, llm.num_hidden_layers)

    def rows_of(case: Case) -> list[dict[str, Any]]:
        return ratio_rows(case, weights=arguments.weights, device_share=arguments.device_share)

    frame, code = table_of(arguments, settings, rows_of)
    if not code:
        report(
            frame,
            arguments.out,
            picture,
            columns=SHOWN,
            text="{:.1%} activations".format,
            without="keeping keys and values only",
            x="share_kept_as_activations",
        )
    return code


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


_share.__name__ = "share"


def _options(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--weights", choices=("gpu", "host"), default="host", help="where the weights are; host: streamed (default: %(default)s)"
    )
    parser.add_argument(
        "--device-share",
        type=_share,
        default=0.0,
        help="room for state on the device, as a share of all keys and values (default: %(default)s)",
    )


def _refuse_one_layer(name: str, layers: int) -> None:
    if layers < 2:
        raise ValueError(
            f"{name}: a cache ratio needs at least 2 layers, not {layers}, as the state of one arrives while another is computed; "
            "run more layers"
        )


def measured_problem(
    times: LayerTimes, *, batch: int, tokens: int, weights: Any, token_bytes: tuple[int, int], device_share: float = 0.0
) -> CacheRatioProblem:
    """The problem that measured layers make, token by token, as a request's last block is filled only in part.

    ``token_bytes``: of a token in all layers as keys and values, and as activations. The last layer is a class of its own, as the token is
    chosen after it. ``device_share``: room on the device, as a share of all keys and values.
    """
    kv, act = token_bytes
    return CacheRatioProblem(
        layers=times.ratio_layers(batch, weights, block=1),
        request_blocks=(tokens,) * batch,
        kv_block=kv,
        act_block=act,
        gpu_capacity=math.floor(device_share * batch * tokens * kv),
        host_capacity=batch * tokens * max(kv, act),
    )


def shares_of(problem: CacheRatioProblem, points: int) -> list[CacheRatioPlan]:
    """For each of ``points`` shares of activations the fastest placement, activations on the device where times are equal."""
    plans = []
    for share in np.unique(np.append(np.linspace(0.0, 1.0, points), 0.0)):
        act = round(float(share) * problem.blocks)
        near = np.arange(min(act, problem.gpu_room // problem.act_block), -1, -1)
        kv_gpu = problem.kv_gpu_for(near, act - near)
        best = int(problem.seconds(near, problem.blocks - act - kv_gpu, act - near).argmin())
        held = int(near[best]), int(kv_gpu[best])
        plans.append(CacheRatioPlan(kv_gpu=held[1], act_gpu=held[0], kv_host=problem.blocks - act - held[1], act_host=act - held[0]))
    return plans


def executed(plan: CachePlan, *, batch: int, context: int, tokens: int) -> CacheRatioPlan:
    """What the runtime holds of a plan in the middle of a run, in tokens: whole blocks, of which new tokens fill the last."""
    forms = np.concatenate(plan.forms(batch, context + GENERATED - 1), axis=1)[:tokens]
    kv_gpu, act_gpu, kv_host, act_host = np.bincount(forms.ravel(), minlength=4).tolist()
    return CacheRatioPlan(kv_gpu=kv_gpu, act_gpu=act_gpu, kv_host=kv_host, act_host=act_host)


def ratio_rows(case: Case, *, weights: Any, device_share: float) -> list[dict[str, Any]]:
    """The rows of a case: the shares of the sweep and the chosen one; no activations, the baseline, come first."""
    times = case.layer_times(weights)
    size = case.size * case.llm.num_hidden_layers
    problem = measured_problem(
        times,
        batch=case.batch,
        tokens=case.tokens,
        weights=weights,
        token_bytes=(size * case.llm.state_elements, size * case.llm.hidden_size),
        device_share=device_share,
    )
    swept = shares_of(problem, case.settings.points)
    choice = LpRatio().solve(problem).unwrap()
    given = [*swept, choice]
    plans = [CachePlan(blocks=plan, block=BLOCK, weights=weights) for plan in given]
    held = [executed(plan, batch=case.batch, context=case.context, tokens=case.tokens) for plan in plans]
    # The choice may be of the sweep, or the same in whole blocks: it is then run once.
    index = held.index(held[-1])
    if index < len(swept):
        plans, held = plans[:-1], held[:-1]
    predicted = [float(problem.seconds(plan.act_gpu, plan.kv_host, plan.act_host)) for plan in held]
    sheets = _by_sheet(case, held, weights)
    found = measured(case, plans)
    shared = case.columns(times) | {"drift_pct": 100 * case.drift(times, weights)}
    rows = [
        shared
        | {"template": "fluid", "weights": weights, "device_share": device_share, "act_share": plan.act_share}
        | {f"{form}_{place}_tokens": getattr(plan, f"{form}_{at}") for form in ("kv", "act") for place, at in PLACES}
        | {"swept": place < len(swept), "chosen": place == index, "predicted_s": seconds, "sheet_s": sheet}
        | run
        for place, (plan, seconds, sheet, run) in enumerate(zip(held, predicted, sheets, found, strict=True))
    ]
    return judged(sorted(rows, key=lambda row: row["act_share"]))


PLACES = (("device", "gpu"), ("host", "host"))


def _by_sheet(case: Case, plans: Sequence[CacheRatioPlan], weights: Any) -> list[float | None]:
    """Seconds that the data sheet alone predicts; None without one, or if it has no link."""
    if case.settings.sheet is None:
        return [None] * len(plans)
    try:
        problem = CacheRatioProblem.build(case.settings.sheet, case.workload(), block=1, weights=weights)
    except ValueError as error:
        print(f"the data sheet predicts nothing: {error}", file=sys.stderr)
        return [None] * len(plans)
    return [problem.evaluate(plan).latency for plan in plans]


if __name__ == "__main__":
    sys.exit(main())
