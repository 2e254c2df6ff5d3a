"""How good are FlexGen's published policies and its search on a T4, against a proven optimum (arXiv 2303.06865)?

OPT-30B and OPT-175B, 512 tokens of prompt and 32 generated, at 16 bits and at FlexGen's four (4.5 with the scales of groups); the disk at
the rate of FlexGen's cost model and at one that its measurements need. A policy is the percentages of weights on GPU and host, of keys and
values on GPU and host, and of activations on GPU and host; the rest is on the disk. Published policies are priced with 1.2 of 16 and 200 x
2**30 bytes, as FlexGen does; the search and the optimum have 0.8 of 15 and 204. Bounds are over the GPU batches 1, 2, 3, 4, 8, ..., 512.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import INTERRUPTED, finished_rows, show, study_arguments, write_csv
from memsplit.models import LLMConfig, OffloadMachine, OffloadRatios, Workload, offload_layers, offload_ratios
from memsplit.models.placement import GROUP_BITS, PlacementPlan, PlacementProblem
from memsplit.models.placement_t4 import FLEXGEN_T4, FLEXGEN_T4_FAST_DISK, PlacementProfile
from memsplit.models.presets import LLMS, OPT_30B, OPT_175B, T4_SYSTEM
from memsplit.models.units import GB, GiB
from memsplit.solvers.placement import CharnesCooperPlacement, FixedPlacement, FlexGenPlacement, PulpPlacement
from memsplit.solvers.result import Solver

PUBLISHED = (
    (OPT_30B, 512, "20/80/0/100/0/100", 48, 3, 7.32),
    (OPT_30B, 256, "10/90/0/100/0/100", 160, 2, 16.01),
    (OPT_175B, 512, "0/50/0/0/0/100", 32, 8, 0.69),
)
"""LLM, prompt, policy, GPU batch, GPU batches and measured token/s of arXiv 2303.06865; 32 tokens are generated."""

GENERATED = 32
EXAMPLE = (16.0 * GiB, 200.0 * GiB, 1500.0 * GiB)
EXAMPLE_SHARE = 1.2
"""Machine and share of memory with which FlexGen prices a given policy."""

PROFILES = (FLEXGEN_T4, FLEXGEN_T4_FAST_DISK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each published policy, and for each LLM, precision, disk and solver."""
    arguments = study_arguments(__doc__ or "", argv, default_out="flexgen_policies.csv")
    llms = (OPT_30B,) if arguments.quick else (OPT_30B, OPT_175B)
    precisions = (16.0,) if arguments.quick else (16.0, GROUP_BITS)
    rows, interrupted = finished_rows(rows_of(llms, precisions))
    frame = pd.DataFrame(rows).assign(template="flexgen_sync", seed=arguments.seed, version=__version__)
    write_csv(arguments.out, frame, provenance={"profiles": PROFILES})
    if interrupted:
        print(f"Written: {arguments.out}")
        return INTERRUPTED
    columns = ["llm", "prompt_tokens", "bits", "profile", "plan_from", "usable_share", "published_tok_per_s", "throughput_tok_per_s"]
    columns += ["gap_to_bound", "policy", "gpu_batch", "gpu_batches", "longest_in_decode", "runtime_s"]
    show(frame[columns], title="Generated tokens a second on a T4")
    for line in meaning(frame):
        print(line)
    print(f"Written: {arguments.out}")
    return 0


def rows_of(llms: Sequence[LLMConfig], precisions: Sequence[float]) -> Iterator[dict[str, Any]]:
    """The published policies, then what each solver finds for each LLM, precision and disk."""
    for profile in PROFILES:
        yield from published_policies(profile)
    for llm in llms:
        for bits in precisions:
            for profile in PROFILES:
                problem = PlacementProblem.build(llm, prompt=512, generated=GENERATED, profile=profile, weight_bits=bits, kv_bits=bits)
                bound = CharnesCooperPlacement().solve(problem).bound
                solvers: tuple[Solver, ...] = (FlexGenPlacement(), CharnesCooperPlacement(relative_gap=0.01), CharnesCooperPlacement())
                for name, solver in zip(("flexgen search", "optimum within 1 %", "optimum"), solvers, strict=True):
                    yield row_of(name, problem, solver, bits, bound)
                yield row_of("optimum, PuLP", problem, PulpPlacement(), bits, bound)


def published_policies(profile: PlacementProfile) -> list[dict[str, Any]]:
    """The published policies, priced; their gap is None, as their GPU batches are not among those of the bound."""
    rows = []
    for llm, prompt, policy, gpu_batch, gpu_batches, measured in PUBLISHED:
        plan = PlacementPlan.from_percent([float(part) for part in policy.split("/")], gpu_batch, gpu_batches)
        loose = replace(profile, usable=EXAMPLE_SHARE)
        problem = replace(PlacementProblem.build(llm, prompt=prompt, generated=GENERATED, profile=loose), capacity=EXAMPLE)
        rows.append(row_of("published", problem, FixedPlacement(plan), 16.0, None) | {"published_tok_per_s": measured})
    return rows


def row_of(name: str, problem: PlacementProblem, solver: Solver, bits: float, bound: float | None) -> dict[str, Any]:
    """What a solver finds, and its distance from a bound of the problem."""
    result = solver.solve(problem)
    row: dict[str, Any] = {
        "llm": problem.name,
        "prompt_tokens": problem.prompt,
        "generated_tokens": problem.generated,
        "bits": bits,
        "profile": problem.profile.name,
        "usable_share": problem.profile.usable,
        "disk_read_GBps": problem.profile.disk_read / GB,
        "plan_from": name,
        "status": str(result.status),
        "published_tok_per_s": None,
        "throughput_tok_per_s": 1 / result.objective if result.objective else None,
        "bound_throughput_tok_per_s": 1 / result.bound if result.bound else None,
        "gap_to_bound": 1 - bound / result.objective if result.objective and bound else None,
    }
    if result.plan is not None:
        plan, cost = result.plan, problem.evaluate(result.plan)
        row |= {"policy": plan.percent, "gpu_batch": plan.gpu_batch, "gpu_batches": plan.gpu_batches}
        for data, shares in (("weights", plan.weights), ("cache", plan.cache), ("hidden", plan.hidden)):
            row |= {f"{data}_{tier}_share": share for tier, share in zip(("gpu", "host", "disk"), shares, strict=True)}
        row |= {f"{tier}_GB": held / GB for tier, held in zip(("gpu", "host", "disk"), cost.tier_bytes, strict=True)}
        row |= dict(zip(("longest_in_prefill", "longest_in_decode"), problem.limits(plan), strict=True))
        row |= asdict(ratios_of(problem, plan, bits))
    return row | {"runtime_s": result.runtime}


def ratios_of(problem: PlacementProblem, plan: PlacementPlan, bits: float) -> OffloadRatios:
    """r, rho, w and c of a block's mean decode step at the profile's rates and the data sheet's GPU memory."""
    context = problem.prompt + problem.generated // 2
    workload = Workload(llm=LLMS[problem.name], batch=plan.block, context=context, weight_bits=bits, kv_bits=bits, activation_bits=16)
    profile = problem.profile
    machine = replace(OffloadMachine.build(T4_SYSTEM), peak=profile.gemm_decode, to_device=profile.to_device)
    return offload_ratios(offload_layers(workload)[0], machine, plan.block * context)


def meaning(frame: pd.DataFrame) -> list[str]:
    """What the table says, in plain lines."""
    lines = [""]
    for row in frame[frame["plan_from"] == "published"].to_dict("records"):
        error = row["throughput_tok_per_s"] / row["published_tok_per_s"] - 1
        what = f"{row['llm']} {row['prompt_tokens']}+{row['generated_tokens']}, {row['profile']}"
        ours, published = row["throughput_tok_per_s"], row["published_tok_per_s"]
        lines.append(f"{what}: {ours:.2f} token/s by the cost model, {published:.2f} published ({error:+.0%}).")
    if len(lines) > 1:
        lines.append(
            f"Published policies may use {EXAMPLE_SHARE:g} of the memory, so they can be faster than an optimum within usable_share."
        )
    searched, exact = frame[frame["plan_from"] == "flexgen search"], frame[frame["plan_from"] == "optimum"]
    lines.append(f"FlexGen's search is at most {searched['gap_to_bound'].max():.2%} from a bound of its own formulation.")
    lines.append(
        f"The optimum with its proof takes {exact['runtime_s'].max():.2g} s, the search up to {searched['runtime_s'].max():.2g} s."
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
