"""The command line: ``memsplit plan``, ``explain``, ``rerun``, ``calibrate``, ``profile``, ``study``. Bad input ends in one sentence."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from .. import __version__
from ..models.baselines import hierarchical
from ..models.cache_ratio import CacheRatioProblem
from ..models.calibration import Calibration
from ..models.device import device_named
from ..models.kernel_mapping import KernelMappingPlan, KernelMappingProblem, PlanCost
from ..models.kernel_mapping_tables import Granularity
from ..models.kernel_models import KERNELS
from ..models.price import assumptions, step_energy
from ..models.profiles import FIRST_PRINCIPLES, H2M2_CALIBRATED, LLAMA2_RHO3
from ..models.recompute_split import RecomputeSplitProblem
from ..models.units import GB, ms
from ..solvers.kernel_mapping import ConvexMapping, CpSatMapping, MilpMapping, PatternMapping, TableMapping
from ..solvers.kernel_mapping_heuristics import (
    FlexGenMapping,
    GreedyMapping,
    MajorMapping,
    NaiveMapping,
    SingleTierMapping,
    UniformMapping,
)
from ..solvers.result import Solver, SolverResult, Status
from .explain import explain
from .machine import profile_arguments, profile_command
from .measured_sets import calibrated_sets, measured_sets
from .measurements import Measurements, calibrate, expected_errors, parameter_table, read_measurements, write_records
from .rerun import explain_row, rerun
from .study import LARGEST_SEED, served, serving_arguments, show
from .table import check_writable, write_csv

PROFILES = {profile.name: profile for profile in (FIRST_PRINCIPLES, LLAMA2_RHO3, H2M2_CALIBRATED)}
METHODS: dict[str, Solver] = {
    "table": TableMapping(),
    "convex": ConvexMapping(),
    "pattern": PatternMapping(),
    "milp": MilpMapping(relative_gap=1e-4),
    "cpsat": CpSatMapping(relative_gap=1e-4),
    "greedy": GreedyMapping(),
    "naive": NaiveMapping(),
    "qkv_major": MajorMapping("qkv"),
    "fc_major": MajorMapping("fc"),
    "attention_major": MajorMapping("attention"),
    "flexgen_lp": FlexGenMapping(),
    "uniform": UniformMapping(),
    "single_tier": SingleTierMapping(),
}
HEURISTICS = ("greedy", "attention_major", "qkv_major", "fc_major", "flexgen_lp", "uniform", "naive")
EXPLAINED = ("kernel_mapping", "cache_ratio", "recompute_split")
STUDIES = Path(__file__).parent.parent / "studies"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0: done, 1: nothing fits, or a row is not the same again, 2: bad input (one sentence on stderr), 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["study"]:
            return _study(arguments[1:])
        parsed = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
        return int(parsed.run(parsed))
    except ValueError as error:
        print(f"memsplit: {' '.join(str(error).split())}", file=sys.stderr)  # other libraries' messages have several lines
        return 2
    except KeyboardInterrupt:
        print("memsplit: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough: memsplit ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="memsplit", description="What each memory holds and where each kernel runs, with proven gaps.")
    parser.add_argument("--version", action="version", version=f"memsplit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="the exact kernel mapping of an LLM on a machine, and how far heuristics are from it")
    serving_arguments(plan, batch=32)
    plan.add_argument(
        "--profile", choices=PROFILES, default=FIRST_PRINCIPLES.name, help="constants of the cost model (default: %(default)s)"
    )
    plan.add_argument("--per-layer", action="store_true", help="each layer may be split in its own way (always with three tiers or more)")
    plan.add_argument("--query-heads", action="store_true", help="cut by query head: a split KV group is then held twice")
    plan.add_argument("--methods", default="", help=f"comma-separated, of {', '.join(METHODS)} (default: an exact one and the heuristics)")
    plan.add_argument("--out", type=Path, help="CSV to write the table to")
    plan.set_defaults(run=_plan)
    again = commands.add_parser("rerun", help="price a row of a table of explored designs again")
    again.add_argument("table", type=Path, help="a CSV with the JSON that was written beside it")
    again.add_argument("--row", type=int, default=0, help="row, counted from 0 (default: %(default)s)")
    again.set_defaults(run=_rerun)
    why = commands.add_parser("explain", help="what binds in a plan, what one more GB or GB/s is worth, or what would make it fit")
    _why_arguments(why)
    why.set_defaults(run=_why)
    measured = commands.add_parser("calibrate", help="calibration records of a device from measured times")
    measured.add_argument(
        "measurements",
        type=Path,
        help="a CSV with a row for each measured kernel, its time as measured_s, _ms or _us; or a folder of public measurements",
    )
    measured.add_argument("--device", help="name or alias of a device, or a data sheet (.toml); not for a folder, whose files say it")
    measured.add_argument("--kernel", choices=KERNELS, help="kind of all rows, where the CSV has no column kernel")
    measured.add_argument("--variant", default="", help="precision or back-end of all rows, where the CSV has no column variant")
    measured.add_argument("--seed", type=int, default=0, help="seed of starts and folds (default: %(default)s)")
    measured.add_argument("--date", default=str(date.today()), help="day of the measurements (default: today)")
    measured.add_argument(
        "--out", type=Path, help="TOML of the records (default: named as the CSV); of a folder: a folder, a TOML a device"
    )
    measured.set_defaults(run=_calibrate)
    profiled = commands.add_parser("profile", help="measure this machine: a data sheet and calibration records of it")
    profile_arguments(profiled)
    profiled.set_defaults(run=profile_command)
    commands.add_parser("study", help="run a design study; `memsplit study --list` names them")
    return parser


def _why_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "table", type=Path, nargs="?", help="a table with the JSON that was written beside it (default: --system and --llm)"
    )
    parser.add_argument("--row", type=int, default=0, help="row of the table, counted from 0 (default: %(default)s)")
    serving_arguments(parser, batch=32)
    parser.add_argument(
        "--problem", choices=EXPLAINED, default="kernel_mapping", help="what is planned, without a table (default: %(default)s)"
    )
    parser.add_argument(
        "--step", type=float, default=1.0, help="GB, GB/s or TFLOP/s over which differences are taken (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="CSV to write the explanation to")


def _check_table_or_machine(arguments: Sequence[str]) -> None:
    """ValueError for arguments of ``explain`` without effect: a row says its own machine, and without a table there is no row."""
    probe = argparse.ArgumentParser(add_help=False)
    _why_arguments(probe)
    names = list(vars(probe.parse_args([])))
    absent = object()
    probe.set_defaults(**dict.fromkeys(names, absent))
    given = {name for name, value in vars(probe.parse_args(arguments)).items() if value is not absent}
    table = "table" in given
    useless = [name for name in names if name in given - ({"table", "row", "step", "out"} if table else set(names) - {"row"})]
    if useless:
        option = f"--{useless[0].replace('_', '-')}"
        reason = "a row of a table says its own machine and workload" if table else "there is no table"
        raise ValueError(f"explain: {option} has no effect, as {reason}; leave out {'it or the table' if table else 'it, or name a table'}")


def _study(arguments: list[str]) -> int:
    names = {path.stem: path for path in sorted(STUDIES.glob("[!_]*.py"))}
    if not arguments or arguments[0] in ("--list", "--help", "-h"):
        width = max(map(len, names)) + 2
        for name, path in names.items():
            print(f"{name:{width}}{path.read_text(encoding='utf-8').strip().splitlines()[0].strip(chr(34))}")
        return 0
    name, *rest = arguments
    if name not in names:
        raise ValueError(f"there is no study {name!r}; studies are {', '.join(names)}")
    return int(importlib.import_module(f"..studies.{name}", __package__).main(rest))


def _calibrate(parsed: argparse.Namespace) -> int:
    if not 0 <= parsed.seed <= LARGEST_SEED:
        raise ValueError(f"calibrate: --seed must be at least 0 and at most {LARGEST_SEED}, not {parsed.seed}; choose another")
    try:
        date.fromisoformat(parsed.date)
    except ValueError:
        raise ValueError(f"calibrate: --date must be a day as in 2026-01-31, not {parsed.date!r}; correct it") from None
    if parsed.measurements.is_dir():
        return _calibrate_folder(parsed)
    if parsed.device is None:
        raise ValueError("calibrate needs --device, the name of a device or a data sheet (.toml)")
    out = parsed.measurements.with_suffix(".toml") if parsed.out is None else parsed.out
    if Path(parsed.device).is_file() and out.exists() and out.samefile(parsed.device):
        raise ValueError(f"the records would be written over the data sheet {parsed.device}; name another --out")
    if out.suffix in (".csv", ".json", ".parquet") or (out.exists() and parsed.measurements.exists() and out.samefile(parsed.measurements)):
        raise ValueError(f"records are TOML and are not written to {out}; name another --out, as in {out.with_suffix('.toml').name}")
    check_writable(out)
    device = device_named(parsed.device)
    found = read_measurements(parsed.measurements, kernel=parsed.kernel, variant=parsed.variant, device=device)
    records = calibrate(
        found,
        device,
        seed=parsed.seed,
        source=str(parsed.measurements.name),
        date=parsed.date,
        progress=lambda text: print(f"fitting {text}", file=sys.stderr),
    )
    show(parameter_table(found, records), title=f"Parameters of {device.name}, with intervals of 90 %")
    show(expected_errors(found, device, records), title="Errors: the mean size of predicted / measured - 1")
    for record in records:
        name = f"{record.kernel} {record.variant}".rstrip()
        if record.unseen is None:
            print(f"{name}: too few shapes to say what error to expect on others.")
        else:
            low, high = record.ratios[0], record.ratios[-1]
            print(f"{name}: expect nine of ten measurements of other shapes between {low:.2f} and {high:.2f} times the prediction.")
        for warning in record.warnings:
            print(f"{name}: {warning}.")
    write_records(out, found, records)
    print(f"Written: {out}")
    return 0


def _calibrate_folder(parsed: argparse.Namespace) -> int:
    """Records of all devices in a folder of public measurements: how those that memsplit ships are made."""
    useless = [name for name in ("device", "kernel", "variant") if getattr(parsed, name)]
    if useless:
        raise ValueError(f"calibrate: --{useless[0]} has no effect on a folder, whose files say it; leave it out")
    if parsed.out is None:
        raise ValueError("calibrate needs --out, a folder for the records of each device")
    sets, unknown = measured_sets(parsed.measurements)
    for sentence in unknown:
        print(f"left out: {sentence}", file=sys.stderr)
    if not sets:
        raise ValueError(f"nothing in {parsed.measurements} can be fitted; name a folder of public measurements, or a CSV and --device")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {parsed.out}: {error.strerror or error}; name another folder with --out") from None
    check_writable(parsed.out / "records.toml")
    made: dict[str, list[tuple[Measurements, Calibration]]] = {}
    told = calibrated_sets(sets, seed=parsed.seed, date=parsed.date, progress=lambda text: print(f"fitting {text}", file=sys.stderr))
    for each, record in told:
        made.setdefault(record.device, []).append((each.measurements, record))
        unseen = "-" if record.unseen is None else f"{record.unseen.mape_pct:.1f} %"
        print(
            f"{record.device}: {record.kernel} {record.variant}: {record.fitted.rows} rows, {record.fitted.mape_pct:.1f} %, unseen {unseen}"
        )
    for device, found in made.items():
        path = parsed.out / f"{re.sub(r'[^a-z0-9]+', '_', device.casefold()).strip('_')}.toml"
        write_records(path, tuple(one for one, _ in found), tuple(record for _, record in found))
        print(f"Written: {path}")
    return 0


def _rerun(parsed: argparse.Namespace) -> int:
    frame = rerun(parsed.table, parsed.row)
    show(frame, title=f"{parsed.table}, row {parsed.row}")
    other = [] if "same" not in frame else frame.loc[~frame["same"].astype(bool), "column"].tolist()
    if other:
        print(f"Not the same again: {', '.join(map(str, other))}; the table was changed, or written by another version of memsplit.")
    return 1 if other else 0


def _why(parsed: argparse.Namespace) -> int:
    _check_table_or_machine(parsed.arguments[1:])
    if parsed.out is not None:
        check_writable(parsed.out)
    if parsed.table is not None:
        found = explain_row(parsed.table, parsed.row, step=parsed.step)
    else:
        found = (explain(_asked(parsed), step=parsed.step),)
    for explanation in found:
        print(explanation, end="\n\n")
    if parsed.out is not None:
        # Each explanation is a block of rows; the subject says what the rows are of.
        write_csv(parsed.out, pd.concat([one.frame().assign(subject=one.subject, version=__version__) for one in found]))
        print(f"Written: {parsed.out}")
    return 0 if all(explanation.feasible for explanation in found) else 1


def _asked(parsed: argparse.Namespace) -> KernelMappingProblem | CacheRatioProblem | RecomputeSplitProblem:
    """The problem that the arguments name."""
    system, workload = served(parsed)
    if parsed.problem == "cache_ratio":
        return CacheRatioProblem.build(system, workload)
    if parsed.problem == "recompute_split":
        return RecomputeSplitProblem.build(system, workload, weights="host")
    return KernelMappingProblem.build(system, workload, grouped=len(system.tiers) <= 2)


def _plan(parsed: argparse.Namespace) -> int:
    if parsed.out is not None:
        check_writable(parsed.out)
    system, workload = served(parsed)
    llm = workload.llm
    profile = PROFILES[parsed.profile]
    grouped = len(system.tiers) <= 2 and not parsed.per_layer
    granularity: Granularity = "query_head" if parsed.query_heads else "kv_head"
    problem = KernelMappingProblem.build(system, workload, profile=profile, grouped=grouped, granularity=granularity)
    exact = "table" if grouped and len(system.tiers) == 2 else "convex" if len(system.tiers) == 2 else "pattern"
    methods = [name.strip() for name in parsed.methods.split(",") if name.strip()] or [exact, *HEURISTICS]
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}; methods are {', '.join(METHODS)}")
    print(system)
    print(
        f"{llm.name}: {llm.parameters / 1e9:.1f} G parameters, {llm.attention_kind}; weights {workload.weight_bytes / GB:.1f} GB, ", end=""
    )
    print(f"keys and values {workload.state_bytes / GB:.1f} GB at batch {workload.batch} and context {workload.context}")
    print(f"profile {profile.name}" + (f": fitted on {profile.fitted_on}" if profile.fitted_on else ": nothing fitted"))
    results = {name: METHODS[name].solve(problem) for name in methods}
    best = results[methods[0]]
    frame = pd.DataFrame([{"method": name, **_row(problem, result, best)} for name, result in results.items()])
    assumed = "; ".join(assumptions(system))
    frame = frame.assign(profile=profile.name, version=__version__, assumed=assumed)
    if parsed.out is not None:
        settings = {"system": system, "workload": workload, "profile": profile, "grouped": grouped, "granularity": granularity}
        write_csv(parsed.out, frame, provenance=settings)
    if all(result.plan is None for result in results.values()):
        print(f"No plan: {best.message}")
        return 1
    shown = ["method", "status", "latency_ms", "gap", "loss", *[f"{tier}_GB" for tier in problem.tier_names], "energy_J", "runtime_s"]
    show(frame[shown], title="One decode step" if grouped else "One decode step, per layer")
    for name, result in results.items():
        if result.plan is None:
            print(f"{name}: {result.message}")
    if best.plan is not None:
        _explain(problem, methods[0], best)
    if len(system.tiers) == 2 and all(any(unit.tier == tier.name for unit in system.units) for tier in system.tiers):
        cached = hierarchical(system, workload, profile)
        print(f"{system.tiers[0].name} as a hardware cache instead: {cached.latency / ms:.5g} ms, hit ratio {cached.hit_ratio:.2f}")
    if assumed:
        print(f"Assumed, not sourced: {assumed}")
    if parsed.out is not None:
        print(f"Written: {parsed.out}")
    return 0


def _row(problem: KernelMappingProblem, result: SolverResult[KernelMappingPlan], best: SolverResult[KernelMappingPlan]) -> dict[str, Any]:
    """The columns of one method; ``loss`` is its distance from the first method's plan."""
    row: dict[str, Any] = {"status": result.status.value, "gap": result.gap, "runtime_s": result.runtime, "message": result.message}
    if result.plan is None:
        return row
    cost = problem.evaluate(result.plan)
    return row | {
        "latency_ms": cost.latency / ms,
        "loss": None if best.objective is None else cost.latency / best.objective - 1,
        **{f"{tier}_GB": held / GB for tier, held in zip(cost.tier_names, cost.tier_bytes, strict=True)},
        "energy_J": _energy(problem, cost),
        "plan": str(result.plan),
    }


def _energy(problem: KernelMappingProblem, cost: PlanCost) -> float | None:
    """J of a step, all terms that are known; None without the energy of every memory."""
    if problem.system is None or cost.energy is None:
        return None
    energy = step_energy(problem.system, traffic=cost.traffic, latency=cost.latency, flops=cost.flops, link_bytes=cost.link_bytes)
    return float(energy.total)


def _explain(problem: KernelMappingProblem, name: str, result: SolverResult[KernelMappingPlan]) -> None:
    """The plan, where its time goes, and what capacity would be worth."""
    plan = result.unwrap()
    cost = problem.evaluate(plan)
    proof = (
        f"proven within {result.gap:.1e} of the optimum"
        if result.status is Status.OPTIMAL and result.gap is not None
        else f"gap {result.gap}"
    )
    print(f"\n{name}, {proof}; slices on {' | '.join(problem.tier_names)}:")
    for k, kind in enumerate(problem.kinds):
        splits = ", ".join(f"{split.layers} layers {' | '.join(map(str, split.counts))}" for split in plan.splits[k])
        print(f"  {kind.name:10} {splits}: {cost.kind_latency[k] / ms:.5g} ms")
    for t, worth in enumerate(result.capacity_worth or ()):
        if worth:
            print(f"  one more GB of {problem.tier_names[t]} saves {worth * GB / ms:.3g} ms (dual of the linear program)")


if __name__ == "__main__":
    sys.exit(main())
