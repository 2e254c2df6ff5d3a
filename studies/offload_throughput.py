"""Which way to serve an offloaded LLM generates the most tokens a second: recomputing, quantising, the CPU, or just transferring?

All systems that HybridServe (arXiv 2501.01792) and KVPR (arXiv 2411.17089) compare with, and the best ratio of keys and values to
activations, for OPT-6.7B to 66B and prompts of 128 to 1920 tokens; prefill is included. Every row names its calibration record.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, finished_rows, positive, show, study_arguments, write_csv
from memsplit.models import System, Workload
from memsplit.models.offload import OffloadMachine, offload_layers, offload_ratios
from memsplit.models.offload_baselines import GenerationCost, OffloadBaseline, generation, offload_baselines
from memsplit.models.offload_generation import Form, generation_time
from memsplit.models.offload_profiles import DATASHEET, FLEXGEN_ON_HYBRIDSERVE, HYBRIDSERVE_PAPER, OffloadProfile
from memsplit.models.presets import llm_named, system_named
from memsplit.models.recompute_split import RecomputeSplitProblem, split_generation

PROMPTS = (128, 256, 512, 1024, 1920)
LLMS = ("opt-6.7b", "opt-13b", "opt-30b", "opt-66b")
FITTED = "rtx4090_pcie4"
"""The machine that has fitted profiles; on others every method runs at the rates of the data sheet."""

KVPR_BATCH = 16
"""Requests of a GPU batch of KVPR; those of a step share one load of the weights."""

OPTIMISED: dict[str, tuple[Form, str]] = {
    "act_first": ("act_first", "HybridServe's order: GPU memory full of activations, then the best split of the rest at every step"),
    "best_ratio": ("best", "best split of GPU and host memory at every step"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each LLM, prompt and method."""
    arguments = study_arguments(__doc__ or "", argv, default_out="offload_throughput.csv", extra=_extra)
    system = system_named(arguments.system)
    profile, flexgen = (HYBRIDSERVE_PAPER, FLEXGEN_ON_HYBRIDSERVE) if arguments.system == FITTED else (DATASHEET, DATASHEET)
    names = arguments.llm or list(LLMS[:2] if arguments.quick else LLMS)
    prompts = PROMPTS[::2] if arguments.quick else PROMPTS
    llms = [llm_named(name) for name in names]
    bits: dict[str, Any] = {"weight_bits": 16, "kv_bits": 16, "activation_bits": 16}
    # Of one LLM and prompt all methods or none: the last column compares them.
    parts, interrupted = finished_rows(
        priced(system, Workload(llm=llm, batch=arguments.batch, context=prompt, **bits), arguments.generated, profile, flexgen)
        for llm in llms
        for prompt in prompts
    )
    frame = pd.DataFrame([row for part in parts for row in part])
    best = frame[frame["method"] == "best_ratio"].set_index(["llm", "prompt_tokens"])["throughput_tok_per_s"]
    of_best = best.loc[list(zip(frame["llm"], frame["prompt_tokens"], strict=True))].to_numpy()
    frame["best_ratio_over_it"] = of_best / frame["throughput_tok_per_s"]
    frame = frame.assign(seed=arguments.seed, version=__version__)
    settings = {"system": system, "profiles": [profile, flexgen]}
    write_csv(arguments.out, frame, provenance=settings)
    if interrupted:
        print(f"Written: {arguments.out}")
        return INTERRUPTED
    for name, part in frame.groupby("llm", sort=False):
        table = part.pivot_table(index="method", columns="prompt_tokens", values="throughput_tok_per_s", sort=False)
        show(table.reset_index(), title=f"{name!s}, batch {arguments.batch}, {arguments.generated} generated: token/s by prompt length")
    means = frame.groupby(["method", "profile"], sort=False)["best_ratio_over_it"].mean().reset_index()
    show(means, title="Best ratio over each method, mean over LLMs and prompts")
    for one in dict.fromkeys((profile, flexgen)):
        print(f"profile {one.name}: " + (f"fitted on {one.fitted_on}." if one.fitted_on else "nothing fitted."))
    notes = frame.loc[frame["note"] != "", ["method", "note"]].drop_duplicates()
    for method, note in notes.itertuples(index=False):
        print(f"{method}: {note}.")
    if flexgen != profile:
        print(f"Only flexgen has {flexgen.name}'s link; at the link that all others have it is kv_only.")
    host = system.tiers[1]
    if any(unit.tier == host.name for unit in system.units):
        print(f"cpu_attention reads at all of the host's {host.bandwidth / 1e9:g} GB/s, as its data sheet states or assumes.")
    else:
        print(f"cpu_attention is not priced: {host.name} has no compute unit; add one to the data sheet.")
    print("All methods stream all weights in every step, even where the GPU could keep some.")
    print(f"Written: {arguments.out}")
    return 0


def priced(system: System, workload: Workload, generated: int, profile: OffloadProfile, flexgen: OffloadProfile) -> list[dict[str, Any]]:
    """A row for each method at one LLM and prompt, at the rates of ``profile``, FlexGen at its own."""
    rows = []
    for name, baseline in offload_baselines(profile, flexgen).items():
        cost = generation(system, workload, baseline, generated=generated)
        rows.append(_row(system, workload, generated, name, cost, baseline.profile, baseline.note))
    cost, note = (
        kvpr(system, workload, generated, profile),
        f"staged, GPU batches of at most {KVPR_BATCH} requests, best split of the prompt at every step",
    )
    rows.append(_row(system, workload, generated, "kvpr", cost, profile, note))
    for name, (form, note) in OPTIMISED.items():
        prompt = workload.context
        cost = generation_time(system, workload, prompt=prompt, generated=generated, profile=profile, form=form)
        rows.append(_row(system, workload, generated, name, cost, profile, note))
    return rows


def kvpr(system: System, workload: Workload, generated: int, profile: OffloadProfile) -> GenerationCost:
    """KVPR with streamed weights: all keys and values on the host, and activations of what is recomputed (all of the prompt, at most)."""
    batches = -(-workload.batch // KVPR_BATCH)
    size = -(-workload.batch // batches)  # equal GPU batches; the last one may have places left, which are paid for
    problem = RecomputeSplitProblem.build(system, replace(workload, batch=size), profile=profile, weights="host", batches=batches)
    decode = split_generation(problem, generated=generated).best if problem.gpu_fits else math.inf
    whole = generation(system, workload, OffloadBaseline(name="kvpr", rule="in_turn", profile=profile), generated=generated)
    acts = workload.llm.num_hidden_layers * workload.batch * workload.context * problem.layers[0].act_bytes
    total = whole.prefill + decode
    throughput = workload.batch * generated / total if total > 0 else math.inf
    return replace(whole, decode=decode, throughput=throughput, host_bytes=whole.host_bytes + acts)


def _row(
    system: System, workload: Workload, generated: int, method: str, cost: GenerationCost, profile: OffloadProfile, note: str
) -> dict[str, Any]:
    layer, machine = offload_layers(workload)[0], OffloadMachine.build(system, profile)
    # Where sending keys and values takes no time, there is nothing to measure the others by.
    timed = math.isfinite(machine.to_device)
    ratios = offload_ratios(layer, machine, workload.batch * workload.context) if timed else None
    return {
        "llm": workload.llm.name,
        "batch": workload.batch,
        "prompt_tokens": workload.context,
        "generated_tokens": generated,
        "method": method,
        "throughput_tok_per_s": cost.throughput if cost.fits else None,
        "prefill_s": cost.prefill,
        "decode_s": cost.decode if cost.fits else None,
        "host_GB": cost.host_bytes / 1e9,
        "fits": cost.fits,
        "r": layer.act_bytes / layer.kv_bytes,
        **{name: None if ratios is None else getattr(ratios, name) for name in ("rho", "w", "c")},
        "profile": profile.name,
        "fitted_on": profile.fitted_on,
        "note": note,
    }


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", default=FITTED, help="data sheet (.toml) or a machine's name (default: %(default)s)")
    parser.add_argument("--llm", action="append", help=f"config.json or an LLM's name, may be repeated (default: {', '.join(LLMS)})")
    parser.add_argument("--batch", type=positive, default=128, help="requests (default: %(default)s)")
    parser.add_argument("--generated", type=positive, default=128, help="new tokens of each request (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
