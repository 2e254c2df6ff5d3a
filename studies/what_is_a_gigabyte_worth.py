"""What is one more gigabyte, GB/s or TFLOP/s worth, where does it become worthless, and up to which price does it pay?

For the shipped machines of two memories or more: milliseconds a step that one more unit (GB, GB/s or TFLOP/s) of each resource saves, by
the dual price of the linear relaxation (``dual_ms_per_unit``, capacities) and by solving again with one more
(``relaxation_difference_ms_per_unit``, ``optimum_difference_ms_per_unit``; all). The optimum moves in whole slices, so that its difference
jumps between 0 and more than the dual. ``worthless_from_GB``: the least capacity from which on more of it saves nothing, to the MB.

In money: a GB that saves w of a step of T raises the throughput by w / (T - w), and is worth that share of what the machine earns in its
life, ``--usd-per-hour`` x hours of ``--years``; both are assumptions. ``break_even_USD_per_GB``: the price of the fast memory at which
8 GB of it in place of 8 GB of the slow one just pay.

Kernel mapping (H2M2, arXiv 2504.14893) where both memories have a chip, the cache ratio (HybridServe, arXiv 2501.01792) where a GPU has
a host.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memsplit import __version__
from memsplit.dse import (
    INTERRUPTED,
    Explanation,
    Worth,
    beside,
    break_even,
    explain,
    finished_rows,
    plot_lines,
    show,
    study_arguments,
    write_csv,
)
from memsplit.models import CacheRatioProblem, KernelMappingProblem, System, Workload
from memsplit.models.presets import H2M2_SYSTEM, LLMS, SYSTEMS
from memsplit.models.units import GB, MB, ms
from memsplit.solvers import LpRatio, Solver, TableMapping

SWAP = 8
"""GB of the fast memory in place of the slow one: a step that holds some slices of every LLM here, so that whole slices blur little."""

DEAREST = 1e6
"""USD/GB up to which the break-even price is looked for."""

HOURS = 8766.0
"""Hours in a year."""

STAIRCASE = "difference of the optimum over 1 GB"
"""Drawn as points: the optimum moves when the next slice fits, so that between two points it may be anything."""

METHODS = {"dual_ms_per_GB": "dual of the relaxation", "difference_ms_per_GB": STAIRCASE}
"""Columns of the picture, and what they are called in it."""

CURVE = (*range(8, 160, 4), 160, 192, 256)
"""GB of HBM of the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A machine by name and what it serves."""

    system: str
    llm: str
    batch: int
    context: int
    bits: int = 8

    @property
    def workload(self) -> Workload:
        """All tensors in ``bits``."""
        return Workload(
            llm=LLMS[self.llm],
            batch=self.batch,
            context=self.context,
            weight_bits=self.bits,
            kv_bits=self.bits,
            activation_bits=self.bits,
        )

    @property
    def mapped(self) -> bool:
        """Kernel mapping; else cache ratio."""
        return self.system.startswith("h2m2")

    def problem(self, system: System) -> KernelMappingProblem | CacheRatioProblem:
        """The problem of serving on ``system``."""
        return KernelMappingProblem.build(system, self.workload) if self.mapped else CacheRatioProblem.build(system, self.workload)

    def seconds(self, system: System) -> float | None:
        """The proven least time of a step on ``system``: of a cache ratio that of its relaxation; None if nothing fits."""
        solver: Solver = TableMapping() if self.mapped else LpRatio()
        return solver.solve(self.problem(system)).bound


DRAWN = Case(system="h2m2", llm="llama2-70b", batch=128, context=4096)
"""The case of the picture."""

QUICK = (
    DRAWN,
    Case(system="rtx4090_pcie4", llm="opt-30b", batch=128, context=1024, bits=16),
)
CASES = (
    *(Case(system="h2m2", llm="llama2-70b", batch=batch, context=context) for batch in (32, 128) for context in (1024, 4096, 16384)),
    *(Case(system="h2m2", llm="gpt3-175b", batch=32, context=context) for context in (1024, 2048, 4096)),
    *(Case(system="h2m2", llm="mixtral-8x7b", batch=128, context=context) for context in (1024, 4096, 16384)),
    *(Case(system="h2m2_cxl", llm=llm, batch=batch, context=4096) for llm, batch in (("llama2-70b", 128), ("gpt3-175b", 32))),
    *(
        Case(system=name, llm=llm, batch=batch, context=1024, bits=16)
        for name in ("a100_pcie4", "rtx4090_pcie4")
        for llm in ("opt-13b", "opt-30b")
        for batch in (32, 128, 256)
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: one row for each case and resource; a second table and a picture of one machine's HBM beside it."""
    arguments = study_arguments(__doc__ or "", argv, default_out="what_is_a_gigabyte_worth.csv", extra=money)
    cases, curve = (QUICK, CURVE[::4]) if arguments.quick else (CASES, CURVE)
    earned = arguments.usd_per_hour * HOURS * arguments.years
    curve_table, picture = beside(arguments.out, "_curve", ".png")
    priced_cases, interrupted = finished_rows(priced(case, earned) for case in cases)
    rows = [row for listed in priced_cases for row in listed]
    known = {"usd_per_hour": arguments.usd_per_hour, "years": arguments.years, "seed": arguments.seed, "version": __version__}
    frame = pd.DataFrame(rows).assign(**known)
    write_csv(arguments.out, frame, provenance={"systems": {case.system: SYSTEMS[case.system] for case in cases}, **known})
    if interrupted:
        return INTERRUPTED
    shape = pd.DataFrame([point(size) for size in curve]).assign(**known)
    write_csv(curve_table, shape, provenance={"system": H2M2_SYSTEM, **known})
    drawn = shape.melt("HBM_capacity_GB", list(METHODS), var_name="method", value_name="worth_ms_per_GB").replace({"method": METHODS})
    title = f"{DRAWN.llm} at {DRAWN.batch} x {DRAWN.context} tokens: worth of one more GB of HBM"
    plot_lines(drawn, picture, x="HBM_capacity_GB", y="worth_ms_per_GB", by="method", title=title, markers_only=[STAIRCASE])
    conclude(frame, arguments.usd_per_hour, arguments.years)
    print(f"Written: {arguments.out}, {curve_table}, {picture}")
    return 0


def money(parser: argparse.ArgumentParser) -> None:
    """Add --usd-per-hour and --years."""
    parser.add_argument(
        "--usd-per-hour",
        type=positive_number,
        default=2.0,
        help="USD that a machine earns in an hour, an assumption (default: %(default)s)",
    )
    parser.add_argument(
        "--years", type=positive_number, default=4.0, help="length of a machine's life, an assumption (default: %(default)s)"
    )


def positive_number(text: str) -> float:
    """A finite number above 0, for ``type=`` of an argument."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
    return value


def priced(case: Case, earned: float) -> list[dict[str, Any]]:
    """The rows of a case; ``earned`` [USD] in a machine's life."""
    system = SYSTEMS[case.system]
    found = explain(case.problem(system))
    known: dict[str, Any] = {"system": case.system, "problem": "kernel_mapping" if case.mapped else "cache_ratio", "llm": case.llm}
    known |= {"batch": case.batch, "context_tokens": case.context, "bits": case.bits}
    if found.result.objective is None:
        return [known | {"status": found.result.status.value, "resource": "", "reason": found.result.message}]
    known |= {"status": found.result.status.value, "reason": "", "latency_ms": found.result.objective / ms, "gap": found.result.gap}
    kinks = {name: worthless_from(case, name) for name in system.tier_names[:2]} if len(system.tiers) == 2 else {}
    price = break_even_price(case, earned) if case.mapped and len(system.tiers) == 2 else None
    rows = []
    for resource in dict.fromkeys(worth.resource for worth in found.worths):
        worths = [worth for worth in found.worths if worth.resource == resource]
        saved = worths[-1].worth_ms
        tier = resource.removesuffix(" capacity") if resource.endswith(" capacity") else ""
        rows.append(
            known
            | {"resource": resource, "now": worths[0].now, "unit": worths[0].unit, "dual_ms_per_unit": of(worths, "dual", "relaxation")}
            | {"relaxation_difference_ms_per_unit": of(worths, "difference", "relaxation")}
            | {"optimum_difference_ms_per_unit": of(worths, "difference", "optimum")}
            | {"step_saved_share": saved * ms / found.result.objective, "worth_USD": value_of(saved * ms, found, earned)}
            | {"price_USD_per_GB": price_of(system, tier), "worthless_from_GB": kinks.get(tier)}
            | {"break_even_USD_per_GB": price if tier == system.tier_names[0] else None}
        )
    return rows


def of(worths: Sequence[Worth], method: str, what: str) -> float | None:
    """The worth found by a method, None if there is none."""
    return next((worth.worth_ms for worth in worths if (worth.method, worth.of) == (method, what)), None)


def value_of(saved: float, found: Explanation, earned: float) -> float:
    """USD in a machine's life of ``saved`` seconds a step: ``earned`` w / (T - w)."""
    return earned * saved / ((found.result.objective or math.inf) - saved)


def price_of(system: System, tier: str) -> float | None:
    """USD/GB of a tier in the data sheet; None for no tier and where it is unknown."""
    cost = system.tier(tier).cost if tier else None
    return None if cost is None else cost * GB


def worthless_from(case: Case, tier: str) -> float | None:
    """GB of a tier from which on more of it saves nothing, to the MB; None if even a memory for everything does not fit the LLM.

    More capacity never makes a step longer, so two points of the grid are enough.
    """
    system = SYSTEMS[case.system]
    most = 2 * math.ceil((case.workload.weight_bytes + case.workload.state_bytes + 4 * GB) / MB)

    def seconds(size: float) -> float | None:
        return case.seconds(system.with_tier(tier, capacity=size * MB))

    best = seconds(most)
    if best is None:
        return None
    found = break_even(seconds, lambda _: best, 0, most, whole=True, points=2, equal=1e-9, names=("this", "any more"))
    return 0.0 if found.value is None else found.value * MB / GB


def break_even_price(case: Case, earned: float) -> float | None:
    """USD/GB of the fast memory up to which ``SWAP`` GB of it in place of the slow one pay; None if they never do.

    In a machine's life: what it earns less at T seconds a step, ``earned`` T / T_now, and what the two memories cost.
    """
    system = SYSTEMS[case.system]
    fast, slow = system.tiers
    swapped = system.with_tier(fast.name, capacity=fast.capacity + SWAP * GB).with_tier(slow.name, capacity=slow.capacity - SWAP * GB)
    now, then = case.seconds(system), case.seconds(swapped)
    if now is None or then is None or slow.cost is None:
        return None
    saved = SWAP * GB * slow.cost

    def with_swap(price: float) -> float:
        return earned * then / now + SWAP * price - saved

    def without(_: float) -> float:
        return earned

    found = break_even(with_swap, without, 0.0, DEAREST, points=2, names=("more fast memory", "as it is"))
    return found.value


def point(size: float) -> dict[str, Any]:
    """One machine of the picture: latency, and what one more GB of HBM would save."""
    found = explain(DRAWN.problem(H2M2_SYSTEM.with_tier("HBM", capacity=size * GB)))
    row: dict[str, Any] = {"llm": DRAWN.llm, "batch": DRAWN.batch, "context_tokens": DRAWN.context, "HBM_capacity_GB": size}
    row |= {"status": found.result.status.value, "latency_s": found.result.objective}
    return row | {"dual_ms_per_GB": found.worth("HBM capacity", "dual"), "difference_ms_per_GB": found.worth("HBM capacity")}


def conclude(frame: pd.DataFrame, usd_per_hour: float, years: float) -> None:
    """The tables and what they mean."""
    saving = frame[frame["step_saved_share"] > 0]
    capacities = frame[frame["worthless_from_GB"].notna() | (frame["dual_ms_per_unit"] > 0)]
    case = ["system", "llm", "batch", "context_tokens"]
    worths = ["relaxation_difference_ms_per_unit", "optimum_difference_ms_per_unit"]
    shown = [*case, "latency_ms", "resource", "now", "dual_ms_per_unit", *worths]
    show(capacities[[*shown, "worthless_from_GB", "worth_USD", "break_even_USD_per_GB"]], title="One more GB, ms a step", rows=60)
    show(saving[saving["unit"] != "GB"][[*case, "resource", "now", "unit", *worths, "worth_USD"]], title="One more GB/s or TFLOP/s")
    for row in frame[frame["resource"] == ""].itertuples():
        print(f"{row.system}, {row.llm}, batch {row.batch}, context {row.context_tokens}: {row.reason}")
    both = frame[frame["dual_ms_per_unit"] > 0]
    if len(both):
        apart = (both["relaxation_difference_ms_per_unit"] / both["dual_ms_per_unit"] - 1).abs().max()
        print(f"\nDual and difference of the same linear relaxation are at most {apart:.2%} apart where a GB is worth something.")
    steps = both.dropna(subset=["optimum_difference_ms_per_unit"])
    if len(steps):
        low, high = ((steps["optimum_difference_ms_per_unit"] / steps["dual_ms_per_unit"]).agg(name) for name in ("min", "max"))
        print(
            f"The optimum moves in whole slices: at the {len(steps)} capacities of this table where a GB is worth something, its "
            f"difference over 1 GB is {low:.2f} to {high:.2f} times the dual; at others it may be 0, until the next slice fits, or more."
        )
    worthless = frame[(frame["unit"] == "GB") & (frame["worthless_from_GB"] <= frame["now"])]
    known = frame["worthless_from_GB"].notna().sum()
    print(f"{len(worthless)} of {known} memories, of those whose kink was looked for, already hold all that pays: more is worth nothing.")
    fast = frame.dropna(subset=["break_even_USD_per_GB"])
    if len(fast):
        low, high = fast["break_even_USD_per_GB"].min(), fast["break_even_USD_per_GB"].max()
        print(
            f"At {usd_per_hour:g} USD/h earned for {years:g} years (assumed), {SWAP} GB of fast memory in place of slow pay up to "
            f"{low:.4g} to {high:.4g} USD/GB of it, depending on what is served; the data sheet says {fast['price_USD_per_GB'].iloc[0]:g}."
        )


if __name__ == "__main__":
    sys.exit(main())
