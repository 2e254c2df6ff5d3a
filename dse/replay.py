"""Replay a trace under an online policy: one row for each iteration, and what the requests saw (the setting of H2M2, arXiv 2504.14893).

An iteration runs the prefill of the requests that joined, then one decode step. Before it, data move to where the policy's plan wants
them; that is so at iteration boundaries only, and nothing runs meanwhile (as we read H2M2). All data of the iteration move as its plan
differs from the one before, keys and values at their size in this iteration; the first plan is free. A page has one place, and the keys
and values of requests that join move with the others, although they are not there yet: too much by 0 to 9 % of the bytes on the traces of
the studies, and by more where many requests join at once.

Where duplicates of weights are kept (``Residency``), a memory is sent only what it lacks, and requests that join write their keys and
values where the plan wants them: part of what that saves is this difference.

With prefill a request takes its prefill and one decode step for each of its output tokens: the first token is that of the first decode
step, not of the prefill, as in ``generation_time``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd

from .. import __version__
from ..models.checks import shown, whole
from ..models.clairvoyant import ClairvoyantProblem, Path, SplitSteps
from ..models.hardware import System
from ..models.kernel_mapping import KernelMappingPlan
from ..models.kernel_mapping_tables import Granularity
from ..models.llm import LLMConfig
from ..models.migration import Duplicates
from ..models.paging import Directions
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.roofline import Array
from ..models.serving import Service, ServingLimits, TableTime
from ..models.trace import Trace
from ..models.units import GB
from ..solvers.clairvoyant import ClairvoyantBound, DynamicProgramClairvoyant, ExactClairvoyant, Regret, regret
from ..solvers.policies import OwnTimes, Policy
from ..solvers.result import Solver, SolverResult, Status
from ._replay_run import Run, check_call, rows_until

Migration = Literal["serial", "overlapped", "free"]

FEW_PLANS = 10_000
"""Plans up to which the optimum is sought over all of them at once: milliseconds an iteration."""

FEW_ITERATIONS = 160
"""Iterations up to which the optimum is exact for any number of plans: some seconds for GPT3-175B."""

MOST_AHEAD = 4096
"""Iterations whose tables are held together at most: some 60 MB for an LLM of 96 heads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A policy's run over a trace.

    ``rows``: one for each finished iteration: iteration, clock_s (at its end), batch, tokens (whose keys and values it reads), <tier>_GB,
    n_<kind> (slices on the first tier, mean over layers), plan, decode_s, prefill_s, migration_GB, migration_s (what it takes, hidden or
    not), paging_s (page walks, part of decode_s; 0 where a policy has ``OwnTimes``), iteration_s, duplicates_GB (copies that the plan does
    not use, on all tiers beside what <tier>_GB says), decide_runtime_s (see ``decide_runtimes``).
    ``requests``: one for each request of the trace: arrived_at_s, prompt_tokens, output_tokens, first_token_s and finished_s on the
    trace's clock, ttft_s (from arrival to first token), tpot_s (mean from token to token after it). NaN where it did not come to that.
    ``summary``: see ``summarised``. ``stopped``: why it ended before every request had finished; empty if all did. ``interrupted``: it was
    Ctrl-C.
    ``plans``: the plan of each iteration. ``prompts``: of which lengths the prompts were that each iteration read in a prefill.
    ``mapped``: the iterations take what their plans say; False for a policy with ``OwnTimes``.
    """

    rows: pd.DataFrame
    requests: pd.DataFrame
    summary: dict[str, Any]
    stopped: str = ""
    interrupted: bool = False
    service: Service | None = None
    migration: Migration = "serial"
    plans: tuple[KernelMappingPlan, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    directions: Directions = "one"
    duplicates: Duplicates = "none"
    mapped: bool = True

    def unless_interrupted(self) -> Self:
        """This replay; KeyboardInterrupt if Ctrl-C ended it, for loops over replays that should then end, too."""
        if self.interrupted:
            raise KeyboardInterrupt
        return self

    @property
    def busy(self) -> float:
        """Seconds of all iterations, migrations included; the clock also counts the time in which nothing runs."""
        return float(self.rows["iteration_s"].sum())

    def clairvoyant(self) -> ClairvoyantProblem:
        """What the optimum of this replay's own schedule is sought for: its batches, tokens and prefills, with migration waited for.

        ``problem.evaluate(problem.path(self.plans)).latency`` is ``busy`` where migration was "serial", in one direction and without
        duplicates, and no less than ``busy`` with both directions or with duplicates. A policy that is slower sees other batches where
        requests arrive later, so this optimum is for the batches that this policy saw. ValueError if there are no iterations, or not two
        memories.
        """
        if self.service is None or not len(self.rows):
            raise ValueError("a clairvoyant optimum needs a replay of at least one iteration; replay a trace")
        service = self.service
        prefills = {prompt: service.prefill(prompt) for prompt in sorted({prompt for prompts in self.prompts for prompt in prompts})}
        beside = [[prefills[prompt] for prompt in prompts] for prompts in self.prompts] if prefills else None
        tables = service.tables(self.rows["batch"].to_numpy(), self.rows["tokens"].to_numpy())
        return ClairvoyantProblem.build(tables, beside=beside, system=service.system)


def replay(
    policy: Policy,
    trace: Trace,
    system: System,
    llm: LLMConfig,
    *,
    batch_limit: int,
    profile: Profile = FIRST_PRINCIPLES,
    prefill: bool = True,
    migration: Migration = "serial",
    directions: Directions = "one",
    duplicates: Duplicates = "none",
    weight_bits: float = 8,
    kv_bits: float = 8,
    activation_bits: float = 8,
    granularity: Granularity = "kv_head",
    iterations: int | None = None,
    window: int = 64,
    name: str | None = None,
) -> Replay:
    """Serve ``trace`` with at most ``batch_limit`` requests at once, each iteration as ``policy`` decides.

    ``prefill`` False: prompts are there already, as H2M2 sets it; else each joins alone, under the plan of its iteration.
    ``migration``: "serial" waits for it, "overlapped" takes the longer of migration and iteration, "free" takes no time. ``directions``:
    "one" after the other, or "both" at once. ``duplicates`` of weights: "none", "kept" in the memory that they leave while there is room,
    or "loaded" into the second memory at the start and kept; for two memories and plans that split all layers of a kind alike.
    ``iterations``: stop after so many. ``window``: iterations whose tables are built together at most; the rows are the same for any.
    ``name`` of the policy in the summary; None: its class.

    A request larger than the system is a ValueError before the start. A policy that raises, or whose plan does not fit, ends the replay, as
    does Ctrl-C: the rows so far are kept and ``stopped`` says why. Ctrl-C is thus no exception here, and a loop over replays goes on to the
    next one unless it asks: ``replay(...).unless_interrupted()`` raises it again, and ``interrupted`` tells.
    """
    check_call(policy, trace, prefill, offload=False)
    for setting, value, known in (
        ("migration", migration, ("serial", "overlapped", "free")),
        ("directions", directions, ("one", "both")),
        ("duplicates", duplicates, ("none", "kept", "loaded")),
    ):
        if value not in known:
            raise ValueError(f"{setting} must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, not {shown(value)}")
    if duplicates != "none" and len(system.tiers) != 2:
        raise ValueError(f"system {system.name!r}: duplicates are kept in two memories, not {len(system.tiers)}; use duplicates='none'")
    window = min(whole("replay", "window", window, "iterations"), MOST_AHEAD)
    most = None if iterations is None else whole("replay", "iterations", iterations, "iterations")
    bits = {"weight_bits": weight_bits, "kv_bits": kv_bits, "activation_bits": activation_bits}
    service = Service(system=system, llm=llm, profile=profile, granularity=granularity, **bits)
    batch = whole("replay", "batch_limit", batch_limit, "requests")
    fits = service.most_tokens()
    service.check(trace, fits)
    run = Run(
        policy=policy,
        name=type(policy).__name__ if name is None else name,
        service=service,
        limits=ServingLimits(batch=batch, tokens=fits),
        prefill=prefill,
        migration=migration,
        directions=directions,
        duplicates=duplicates,
        window=window,
        first_token=np.full(len(trace), np.nan),
        finished=np.full(len(trace), np.nan),
    )
    rows, stopped, interrupted = rows_until(run.rows(trace), run.finished, most)
    # Where the iteration after the last finished one was interrupted, its plan is known and its row is not.
    plans, prompts = tuple(run.plans[: len(rows)]), tuple(run.prompts[: len(rows)])
    frame = pd.DataFrame(rows, columns=run.columns())
    frame["decide_runtime_s"] = decide_runtimes(frame["decide_runtime_s"].to_numpy(), run.asked[: len(rows)])
    requests = requests_table(trace, run.first_token, run.finished)
    described = {"policy": run.name, "trace": trace.name, "system": system.name, "llm": llm.name, "profile": profile.name}
    summary = described | summarised(frame, requests) | {"stopped": stopped, "version": __version__}
    return Replay(
        rows=frame,
        requests=requests,
        summary=summary,
        stopped=stopped,
        interrupted=interrupted,
        service=service,
        migration=migration,
        plans=plans,
        prompts=prompts,
        directions=directions,
        duplicates=duplicates,
        mapped=not isinstance(policy, OwnTimes),
    )


def summarised(rows: pd.DataFrame, requests: pd.DataFrame) -> dict[str, Any]:
    """What the rows and requests of a replay come to.

    throughput_tok_per_s: generated tokens over the time from the first arrival to the last iteration's end. tpot_*_s: percentiles over
    finished requests of at least two tokens. ttft_*_s: over requests that got their first token. migrations: iterations that moved data.
    None where there is nothing to say.
    """
    seconds = float(rows["clock_s"].iloc[-1]) - float(requests["arrived_at_s"].iloc[0]) if len(rows) else 0.0
    tokens = int(rows["batch"].sum())
    return {
        "iterations": len(rows),
        "requests": int(requests["finished_s"].notna().sum()),
        "tokens": tokens,
        "duration_s": seconds,
        "throughput_tok_per_s": tokens / seconds if seconds else None,
        **{f"tpot_p{p}_s": _percentile(requests["tpot_s"], p) for p in (50, 95, 99)},
        **{f"ttft_p{p}_s": _percentile(requests["ttft_s"], p) for p in (50, 99)},
        "migrations": int((rows["migration_GB"] > 0).sum()),
        **{column: float(rows[column].sum()) for column in ("migration_GB", "migration_s", "paging_s")},
        "decide_mean_runtime_s": float(rows["decide_runtime_s"].mean()) if len(rows) else None,
    }


def decide_runtimes(own: Array, asked: Sequence[TableTime | None]) -> Array:
    """Seconds [D] that it took to decide: a policy's ``own``, and its share of the tables that it ``asked`` for (None: it asked for none).

    The tables of a window take the seconds of building them, divided by the iterations of which the policy looked at them. What the
    replay itself needs to check and to price a plan is not counted, nor is a guess of the iterations to come. Where several iterations
    share a window, so do their tables and what a policy works out for all of them; a server that decides one iteration at a time pays what
    ``replay(..., window=1)`` says.
    """
    sharing = Counter(id(spent) for spent in asked)
    tables = [0.0 if spent is None else spent.seconds / sharing[id(spent)] for spent in asked]
    return np.asarray(own + np.array(tables), dtype=np.float64)


class Against(NamedTuple):
    """A replay beside the clairvoyant ``optimum`` of its own schedule, which is that of ``problem``."""

    problem: ClairvoyantProblem
    optimum: SolverResult[Path]
    regret: Regret


def against_optimum(runs: Mapping[str, Replay]) -> dict[str, Against]:
    """Each replay with at least one iteration, against the optimum of its own schedule on its own machine.

    Those of one service (LLM, machine, profile, bits) that saw the same schedule share its optimum, and the best of them says whether the
    bound is informative. Where there are at most 10,000 plans or 160 iterations the optimum is exact; else it is the best path on a grid
    that has the plans of that best replay, and a bound over all plans. ValueError, with the replay's name, for a machine without two
    memories, a plan that does not split all layers of a kind alike, or a migration that was not waited for.

    Where moves went in both directions at once or duplicates were kept, the bound is that of free moves, and ``optimum`` is the best path
    known: the fastest of these replays, or the optimum without either, which takes no longer with them. A policy with ``OwnTimes`` is held
    against the optimum of mappings, and may be faster.
    """
    groups: dict[tuple[Hashable, bool, Directions, Duplicates], list[str]] = {}
    for name, run in runs.items():
        if not isinstance(run, Replay):
            raise ValueError(f"{name}: the optimum is that of a Replay, as replay gives it, not of {shown(run)}")
        if run.migration != "serial":
            raise ValueError(f"{name}: the optimum waits for migration, and this replay was {run.migration!r}; replay with 'serial'")
        if len(run.rows):
            schedule = (run.service, run.rows["batch"].to_numpy().tobytes(), run.rows["tokens"].to_numpy().tobytes(), run.prompts)
            moved_freely = run.directions == "both" or run.duplicates != "none"
            groups.setdefault((schedule, moved_freely, run.directions, run.duplicates), []).append(name)
    found: dict[str, Against] = {}
    solved: dict[Hashable, tuple[ClairvoyantProblem, SolverResult[Path]]] = {}
    for (seen, moved_freely, *_), names in sorted(groups.items(), key=lambda group: group[0][1]):
        mapped = [name for name in names if runs[name].mapped]
        best = min(mapped or names, key=lambda name: runs[name].busy)
        if seen not in solved:
            with _naming(best):
                solved[seen] = _solved(runs[best])
        problem, optimum = solved[seen]
        paths = dict[str, Path]()
        for name in names:
            with _naming(name):
                paths[name] = problem.path(runs[name].plans)
        # Added up as the optimum is, and not as the replay's clock, so that equal plans have a regret of 0 in all digits.
        busy = {name: runs[name].busy for name in names}
        seconds = busy if moved_freely else busy | {name: problem.evaluate(paths[name]).latency for name in mapped}
        if moved_freely:
            own = (paths[best], seconds[best]) if mapped else (None, math.inf)
            optimum = _with_free_moves(problem, optimum, *own)
        least = min((seconds[name] for name in mapped), default=None)
        for name in names:
            found[name] = Against(problem=problem, optimum=optimum, regret=regret(seconds[name], optimum, best=least))
    return {name: found[name] for name in runs if name in found}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put a replay's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _solved(run: Replay) -> tuple[ClairvoyantProblem, SolverResult[Path]]:
    """The clairvoyant problem of a replay's schedule and its optimum, which has looked at the replay's own path."""
    problem = run.clairvoyant()
    solver: Solver
    if problem.plans <= FEW_PLANS:
        solver = DynamicProgramClairvoyant(counts=None)
    elif problem.iterations <= FEW_ITERATIONS:
        solver = ExactClairvoyant(include=(problem.path(run.plans),))
    else:
        solver = DynamicProgramClairvoyant(include=(problem.path(run.plans),))
    return problem, solver.solve(problem)


def _with_free_moves(problem: ClairvoyantProblem, optimum: SolverResult[Path], path: Path | None, seconds: float) -> SolverResult[Path]:
    """The best path known, of ``optimum`` and one that took so many ``seconds``, with the bound that holds however data move."""
    bound = ClairvoyantBound(migration=False).value(problem)
    objective, plan = optimum.objective, optimum.plan
    if objective is None or seconds < objective:
        objective, plan = seconds, path  # what the replay took, which the problem prices no lower
    optimal = objective - bound <= 2e-12 * objective
    return replace(
        optimum,
        solver="ClairvoyantBound",
        status=Status.OPTIMAL if optimal else Status.FEASIBLE,
        plan=plan,
        objective=objective,
        bound=bound,
    )


def courses(runs: Mapping[str, Replay], against: Mapping[str, Against]) -> dict[str, pd.DataFrame]:
    """The rows of replays for ``plot_replay``, with a column behind_optimum_s: seconds that each took more than the optimum up to there.

    First comes the "optimum" of the first replay, its moves one direction after the other and without duplicates. A replay that saw another
    schedule is held against its own optimum. Replays without an optimum whose plans are known are left out.
    """
    found: dict[str, pd.DataFrame] = {}
    for name, run in runs.items():
        path = against[name].optimum.plan if name in against else None
        if path is None:
            continue
        problem = against[name].problem
        stages, moves = problem.steps.along(path)
        spent = np.cumsum(stages + np.concatenate([[0.0], moves]))
        if not found:
            found["optimum"] = _optimum_rows(run, problem, path)
        found[name] = run.rows.assign(behind_optimum_s=run.rows["iteration_s"].cumsum().to_numpy() - spent)
    return found


def _optimum_rows(run: Replay, problem: ClairvoyantProblem, path: Path) -> pd.DataFrame:
    """Rows of the optimum's path: iteration, tokens, <tier>_GB, n_<kind>, migration_GB, behind_optimum_s."""
    steps = problem.steps
    if not isinstance(steps, SplitSteps):
        raise ValueError("the optimum of a replay is a path over splits; take that of against_optimum")
    places, every = np.unravel_index(np.array(path), steps.shape), np.arange(len(path))
    frame = run.rows[["iteration", "tokens"]].copy()
    for tier, columns in zip(steps.tables.tier_names, (steps.first, steps.second), strict=True):
        frame[f"{tier}_GB"] = sum(column[every, place] for column, place in zip(columns, places, strict=True)) / GB
    for kind, counts, place in zip(steps.kinds, steps.counts, places, strict=True):
        frame[f"n_{kind.name}"] = counts[place]
    up, down = steps.bytes_along(path)
    return frame.assign(migration_GB=np.concatenate([[0], up + down]) / GB, behind_optimum_s=0.0)


def requests_table(trace: Trace, first_token: Array, finished: Array) -> pd.DataFrame:
    """A row for each request: lengths, and when its first and its last token came [s] ([N] each; NaN: not yet)."""
    later = trace.output_tokens - 1
    return pd.DataFrame(
        {
            "arrived_at_s": trace.arrived_at,
            "prompt_tokens": trace.prompt_tokens,
            "output_tokens": trace.output_tokens,
            "first_token_s": first_token,
            "finished_s": finished,
            "ttft_s": first_token - trace.arrived_at,
            "tpot_s": np.where(later > 0, (finished - first_token) / np.maximum(later, 1), math.nan),
        }
    )


def _percentile(values: pd.Series[float], percent: int) -> float | None:
    known = values.to_numpy(dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(np.percentile(known, percent)) if len(known) else None
