"""How often does the chosen GPU, offloading policy or split stay best when the cost model's parameters are drawn from their intervals?

Three decisions are taken with the calibrated values, and then priced under parameters drawn from the intervals of their records, with and
without the model's error on shapes that it did not see. A choice stays best if no other one is faster under the same draw; its regret is
what it loses to the fastest one there.

    gpu      which of the GPUs whose serving was measured gives the most tokens a joule of its rated power (decode, vLLM)
    policy   which of some policies of FlexGen's form generates fastest (record of published offloaded runs)
    split    how many tokens a GPU recomputes behind a host link (KVPR); shares of its rates from records of products, attention and copies
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, draws, finished_rows, show, study_arguments, write_csv
from memsplit.models import (
    Calibration,
    KernelModel,
    KernelTime,
    RecomputeSplitProblem,
    Workload,
    check_shapes,
    device_named,
    offload_profile,
)
from memsplit.models.calibrated_profiles import LINK_DEVICE, PRODUCT
from memsplit.models.presets import A100_SYSTEM, LLMS, OPT_6_7B, OPT_13B
from memsplit.solvers import ClosedFormSplit

GPUS = ("A100-SXM-40GB", "H100-SXM")
"""Those whose serving of 16-bit weights with vLLM was measured, by one collector. What two collectors measure differs by more than what one
of them repeats, and that is not drawn here."""

PACKED = 4.5 / 16
"""Share of the bytes that FlexGen's four-bit form leaves: groups of 64 with their scale and offset."""

USABLE = 0.9
"""Share of a GPU's memory for weights, and for two layers' weights, keys and values on their way: an assumption."""

TIE = 0.01
"""A regret below it is no difference that a user would notice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: a row for each decision, with and without the error of the model's form."""
    arguments = study_arguments(__doc__ or "", argv, default_out="robust_choice.csv")
    number = 50 if arguments.quick else 1000
    parts = itertools.chain(
        gpu_choices(number, arguments.seed),
        policy_choices(number, arguments.seed),
        split_choices(number // 5, arguments.seed),
    )
    finished, interrupted = finished_rows(parts)
    frame = pd.DataFrame(finished).assign(seed=arguments.seed, version=__version__)
    write_csv(arguments.out, frame, provenance={"link_device": LINK_DEVICE})
    print(f"Written: {arguments.out}")
    if interrupted:
        return INTERRUPTED
    show(frame.drop(columns=["version", "seed", "profile"]), title="Choices under drawn parameters", rows=60)
    print()
    print(meaning(frame))
    return 0


def row_of(decision: str, case: str, names: Sequence[str], seconds: Any, drawn: Any, *, error: bool, profile: str) -> dict[str, Any]:
    """What becomes of the choice by ``seconds`` [K] of K alternatives under ``drawn`` [D, K] seconds."""
    chosen = int(np.argmin(seconds))
    regret = drawn[:, chosen] / drawn.min(axis=1) - 1
    runner_up = float(np.partition(seconds, 1)[1] / seconds[chosen] - 1) if len(names) > 1 else None
    return {
        "decision": decision,
        "case": case,
        "alternatives": len(names),
        "model_error": error,
        "draws": len(drawn),
        "chosen": names[chosen],
        "next_behind": runner_up,
        "stays_best": float((regret == 0).mean()),
        "within_1_pct": float((regret <= TIE).mean()),
        "regret_mean": float(regret.mean()),
        "regret_p95": float(np.percentile(regret, 95)),
        "profile": profile,
    }


def gpu_choices(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Which GPU, for some LLMs, batches and contexts; seconds are those of a token and watt."""
    for llm, batch, context in itertools.product(("llama3.1-8b", "llama2-13b"), (1, 16, 64), (1024, 4096)):
        seconds, drawn = [], {error: list[Any]() for error in (False, True)}
        for place, name in enumerate(GPUS):
            time = KernelTime.calibrated("decode_step", name, variant="vLLM")
            shapes = check_shapes(time.model, {"llm": llm, "batch": batch, "context": context, "devices": 1, "dtype": "bf16"})
            device = device_named(name)
            power = device.power or 0.0
            seconds.append(float(time.predict(**shapes).seconds[0]) * power / batch)
            values = draws(_record(time), time.model, number, seed=seed + place)
            plain = _priced(time.model, device, shapes, values)
            drawn[False].append(plain * power / batch)
            drawn[True].append(plain * values["error"] * power / batch)
        for error, columns in drawn.items():
            case = f"{llm}, batch {batch}, context {context}"
            yield row_of("gpu", case, GPUS, np.array(seconds), np.column_stack(columns), error=error, profile="calibrated")


def policy_choices(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Which policy of FlexGen's form, for OPT on a T4 and on a V100, prompts of 512 and 32 new tokens; seconds are those of a token."""
    time = KernelTime.calibrated("offload", "T4")
    values = draws(_record(time), time.model, number, seed=seed)
    for gpu, llm in itertools.product(("T4", "V100-PCIe-32GB"), ("opt-6.7b", "opt-30b")):
        names, columns, tokens = policies(gpu, llm)
        shapes = check_shapes(time.model, columns)
        seconds = time.predict(**shapes).seconds / tokens
        plain = np.stack([_seconds(time.model, time.device, shapes, values, draw) for draw in range(number)]) / tokens
        errors = np.column_stack([draws(_record(time), time.model, number, seed=seed + 1 + k)["error"] for k in range(len(names))])
        for error, drawn in ((False, plain), (True, plain * errors)):
            yield row_of("policy", f"{llm} on {gpu}", names, seconds, drawn, error=error, profile=time.profile)


def policies(gpu: str, llm: str) -> tuple[list[str], dict[str, Any], Any]:
    """Names, columns and generated tokens of the policies: weights on the GPU as far as they fit, attention there or not, 16 or 4 bits."""
    device, rows = device_named(gpu), []
    workload = Workload(llm=LLMS[llm], batch=1, context=544, weight_bits=16, kv_bits=16, activation_bits=16)
    for share, attends, packed, batch in itertools.product((0, 20, 50), (0, 1), (0, 1), (16, 64)):
        layers = workload.weight_bytes / LLMS[llm].num_hidden_layers
        weights = workload.weight_bytes * share / 100 * (PACKED if packed else 1.0) + 2 * layers
        if weights + batch * workload.state_bytes / LLMS[llm].num_hidden_layers * 2 > USABLE * device.capacity:
            continue
        name = f"{share} % weights on GPU, {'host' if attends else 'GPU'} attends, {4 if packed else 16} bits, batch {batch} x 4"
        rows.append((name, share, attends, packed, batch))
    names = [row[0] for row in rows]
    weights_there, on_host, four_bits, requests = (np.array([row[place] for row in rows]) for place in range(1, 5))
    number = len(names)
    columns: dict[str, Any] = {"device": np.full(number, gpu), "model": np.full(number, llm), "phase": np.full(number, "total")}
    columns |= {"prompt": 512, "gen": 32, "gpu_batch": requests, "num_batches": 4, "n_gpu": 1, "link_peak_GBps": 15.75, "disk_GBps": 2.65}
    columns |= {"pinned": 1, "prefetch": 1, "fused": 0, "w_gpu": weights_there, "w_cpu": 100 - weights_there, "w_disk": 0}
    columns |= {"kv_gpu": 0, "kv_cpu": 100, "kv_disk": 0, "act_gpu": 100, "cpu_attn": on_host, "int4_w": four_bits, "int4_kv": four_bits}
    return names, columns, requests * 4 * 32.0


def split_choices(number: int, seed: int) -> Iterator[dict[str, Any]]:
    """How many tokens to recompute with weights on the GPU, as KVPR's latency mode; alternatives are the best splits of all draws."""
    profile = offload_profile("A100-SXM-80GB")
    shares = {
        "compute": KernelTime.calibrated("gemm", "A100-SXM-80GB"),
        "memory": KernelTime.calibrated("decode_attention", "A100-SXM-80GB"),
        "to_device": KernelTime.calibrated("host_link", LINK_DEVICE),
    }
    found = {field: draws(_record(time), time.model, number, seed=seed + place) for place, (field, time) in enumerate(shares.items())}
    rates = {field: found[field][name] for field, name in (("memory", "memory"), ("to_device", "share"))}
    product = check_shapes(shares["compute"].model, dict(zip(("m", "n", "k"), PRODUCT, strict=True)))
    _, least = shares["compute"].model.work(shares["compute"].device, product)
    rates["compute"] = least[0] / _priced(shares["compute"].model, shares["compute"].device, product, found["compute"])
    for llm, batch, context in itertools.product((OPT_6_7B, OPT_13B), (8, 64), (512, 2048)):
        workload = Workload(llm=llm, batch=batch, context=context, weight_bits=16, kv_bits=16, activation_bits=16)

        def problem(drawn: Mapping[str, Any], workload: Workload = workload) -> RecomputeSplitProblem:
            return RecomputeSplitProblem.build(A100_SYSTEM, workload, profile=replace(profile, **drawn))

        chosen = ClosedFormSplit().solve(problem({}))
        if chosen.plan is None:
            continue
        for error in (False, True):
            problems = [
                problem({field: min(float(rates[field][d] / (found[field]["error"][d] if error else 1.0)), 1.0) for field in shares})
                for d in range(number)
            ]
            plans = list(dict.fromkeys([chosen.plan, *(ClosedFormSplit().solve(one).unwrap() for one in problems)]))
            drawn = np.array([[one.evaluate(plan).latency for plan in plans] for one in problems])
            seconds = np.array([problem({}).evaluate(plan).latency for plan in plans])
            names = [f"{plan.splits[0]} tokens" for plan in plans]
            case = f"{llm.name}, batch {batch}, context {context}"
            yield row_of("split", case, names, seconds, drawn, error=error, profile=profile.name)


def _record(time: KernelTime) -> Calibration:
    """The record behind a calibrated time."""
    if time.record is None:
        raise ValueError(f"{time.model.name} on {time.device.name} has no record; calibrate one")
    return time.record


def _seconds(model: KernelModel, device: Any, shapes: Any, values: Any, draw: int) -> Any:
    """Seconds [N] of all rows under one draw."""
    return model.seconds(device, shapes, {parameter.name: float(values[parameter.name][draw]) for parameter in model.parameters})


def _priced(model: KernelModel, device: Any, shapes: Any, values: Any) -> Any:
    """Seconds [D] of one row under each draw."""
    return np.array([float(_seconds(model, device, shapes, values, draw)[0]) for draw in range(len(values["error"]))])


def meaning(frame: pd.DataFrame) -> str:
    """What the rows say, in a few lines."""
    lines = []
    texts = {"gpu": "The chosen GPU", "policy": "The chosen offloading policy", "split": "The chosen recompute split"}
    for (decision, error), rows in frame.groupby(["decision", "model_error"], sort=False):
        cause = "parameters and the model's error are" if error else "only parameters are"
        best, near = rows["stays_best"].mean(), rows["within_1_pct"].mean()
        lines.append(f"{texts[str(decision)]} stays best in {best:.0%} of the draws (within 1 % in {near:.0%}) when {cause} drawn;")
        lines.append(
            f"    mean regret {rows['regret_mean'].mean():.2%}; in the worst of {len(rows)} cases 5 % lose {rows['regret_p95'].max():.1%}."
        )
    lines.append("Splits next to each other take nearly the same time, so that 'within 1 %' says more of them than 'stays best'.")
    lines.append("Errors are drawn for each alternative alone, which is the worst case: alternatives that resemble each other share them.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
