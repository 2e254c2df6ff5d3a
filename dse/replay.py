"""Replay a trace under an online policy: one row for each iteration, and what the requests saw (the setting of H2M2, arXiv 2504.14893).

An iteration runs the prefill of the requests that joined, then one decode step. Before it, data move to where the policy's plan wants
them; that is so at iteration boundaries only, and nothing runs meanwhile (as we read H2M2). All data of the iteration move as its plan
differs from the one before, keys and values at their size in this iteration; the first plan is free. A page has one place, and the keys
and values of requests that join move with the others, which is a few per cent too much.

Where duplicates of weights are kept (``Residency``), a memory is sent only what it lacks, and requests that join write their keys and
values where the plan wants them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from .. import __version__
from ..models.checks import shown, whole
from ..models.clairvoyant import ClairvoyantProblem, Path, SplitSteps
from ..models.hardware import System
from ..models.kernel_mapping import KernelMappingPlan, TransitionCost
from ..models.kernel_mapping_tables import Granularity
from ..models.llm import LLMConfig
from ..models.migration import Duplicates, Residency
from ..models.paging import Directions
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.roofline import Array
from ..models.serving import PolicyState, Service, ServingLimits, ServingState, StepWindow
from ..models.trace import Trace
from ..models.units import GB
from ..solvers.clairvoyant import ClairvoyantBound, DynamicProgramClairvoyant, ExactClairvoyant, Regret, regret
from ..solvers.policies import OwnTimes, Policy
from ..solvers.result import Solver, SolverResult, Status

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
    not use, on all tiers beside what <tier>_GB says), decide_runtime_s.
    ``requests``: one for each request of the trace: arrived_at_s, prompt_tokens, output_tokens, first_token_s and finished_s on the
    trace's clock, ttft_s (from arrival to first token), tpot_s (mean from token to token after it). NaN where it did not come to that.
    ``summary``: see ``summarised``. ``stopped``: why it ended before every request had finished; empty if all did.
    ``plans``: the plan of each iteration. ``prompts``: of which lengths the prompts were that each iteration read in a prefill.
    ``mapped``: the iterations take what their plans say; False for a policy with ``OwnTimes``.
    """

    rows: pd.DataFrame
    requests: pd.DataFrame
    summary: dict[str, Any]
    stopped: str = ""
    service: Service | None = None
    migration: Migration = "serial"
    plans: tuple[KernelMappingPlan, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    directions: Directions = "one"
    duplicates: Duplicates = "none"
    mapped: bool = True

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
    does Ctrl-C: the rows so far are kept and ``stopped`` says why.
    """
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
    run = _Run(
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
    rows: list[tuple[Any, ...]] = []
    stopped = ""
    try:
        for row in run.rows(trace):
            rows.append(row)
            if most is not None and len(rows) == most:
                break
    except _Stopped as error:
        stopped = str(error)
    except KeyboardInterrupt:
        stopped = f"interrupted after {len(rows)} iterations"
    unfinished = int(np.isnan(run.finished).sum())
    if unfinished and not stopped:
        stopped = f"stopped after {len(rows)} iterations, as asked; {unfinished} requests had not finished"
    # Where the iteration after the last finished one was interrupted, its plan is known and its row is not.
    plans, prompts = tuple(run.plans[: len(rows)]), tuple(run.prompts[: len(rows)])
    frame = pd.DataFrame(rows, columns=run.columns())
    requests = requests_table(trace, run.first_token, run.finished)
    described = {"policy": run.name, "trace": trace.name, "system": system.name, "llm": llm.name, "profile": profile.name}
    summary = described | summarised(frame, requests) | {"stopped": stopped, "version": __version__}
    return Replay(
        rows=frame,
        requests=requests,
        summary=summary,
        stopped=stopped,
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


class Against(NamedTuple):
    """A replay beside the clairvoyant ``optimum`` of its own schedule, which is that of ``problem``."""

    problem: ClairvoyantProblem
    optimum: SolverResult[Path]
    regret: Regret


def against_optimum(runs: Mapping[str, Replay]) -> dict[str, Against]:
    """Each replay of one trace on one machine with at least one iteration, against the optimum of its own schedule.

    Those that saw the same schedule share its optimum, and the best of them says whether the bound is informative. Where there are at
    most 10,000 plans or 160 iterations the optimum is exact; else it is the best path on a grid that has the plans of that best replay, and
    a bound over all plans. ValueError for a machine without two memories, or a migration that was not waited for.

    Where moves went in both directions at once or duplicates were kept, the bound is that of free moves, and ``optimum`` is the best path
    known: the fastest of these replays, or the optimum without either, which takes no longer with them. A policy with ``OwnTimes`` is held
    against the optimum of mappings, and may be faster.
    """
    groups: dict[tuple[Hashable, bool, Directions, Duplicates], list[str]] = {}
    for name, run in runs.items():
        if run.migration != "serial":
            raise ValueError(f"{name}: the optimum waits for migration, and this replay was {run.migration!r}; replay with 'serial'")
        if len(run.rows):
            schedule = (run.rows["batch"].to_numpy().tobytes(), run.rows["tokens"].to_numpy().tobytes(), run.prompts)
            moved_freely = run.directions == "both" or run.duplicates != "none"
            groups.setdefault((schedule, moved_freely, run.directions, run.duplicates), []).append(name)
    found: dict[str, Against] = {}
    solved: dict[Hashable, tuple[ClairvoyantProblem, SolverResult[Path]]] = {}
    for (seen, moved_freely, *_), names in sorted(groups.items(), key=lambda group: group[0][1]):
        mapped = [name for name in names if runs[name].mapped]
        best = min(mapped or names, key=lambda name: runs[name].busy)
        if seen not in solved:
            solved[seen] = _solved(runs[best])
        problem, optimum = solved[seen]
        paths = {name: problem.path(runs[name].plans) for name in names}
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


class _Stopped(Exception):
    """The policy cannot go on; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """A replay under way. ``first_token`` and ``finished`` [N] are filled with times as it goes; ``plans`` and ``prompts`` grow with the
    iterations."""

    policy: Policy
    name: str
    service: Service
    limits: ServingLimits
    prefill: bool
    migration: Migration
    directions: Directions
    duplicates: Duplicates
    window: int
    first_token: Array
    finished: Array
    plans: list[KernelMappingPlan] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    _texts: dict[KernelMappingPlan, tuple[Any, ...]] = field(default_factory=dict)

    def columns(self) -> list[str]:
        kinds = [kind.name for kind in self.service.tables([1], [1]).kinds]
        held = [f"{name}_GB" for name in self.service.system.tier_names]
        costs = ["decode_s", "prefill_s", "migration_GB", "migration_s", "paging_s", "iteration_s", "duplicates_GB", "decide_runtime_s"]
        return ["iteration", "clock_s", "batch", "tokens", *held, *(f"n_{kind}" for kind in kinds), "plan", *costs]

    def rows(self, trace: Trace) -> Iterator[tuple[Any, ...]]:
        """Serve the trace, one row an iteration."""
        state = ServingState.start(trace)
        batch = min(self.limits.batch, len(trace))
        longest = self.service.problem(batch, min(self.limits.tokens, batch * int(trace.state_tokens.max())))
        bare = self.service if not self.service.profile.page_walk else _without_walks(self.service)
        ahead, bare_ahead, row, size = None, None, 0, 1
        own = self.policy if isinstance(self.policy, OwnTimes) else None
        previous: KernelMappingPlan | None = None
        residency: Residency | None = None
        while not state.done:
            joined = state.waiting
            state = state.woken().admitted(self.limits)
            tokens = state.tokens
            if ahead is None or row == len(ahead.batch) or (ahead.batch[row], ahead.tokens[row]) != (state.batch, tokens):
                # Windows grow while what they foresee comes true, and begin anew where somebody arrives.
                size = min(2 * size, self.window) if ahead is not None and row == len(ahead.batch) else min(max(row, 1), self.window)
                counts = state.ahead(self.limits, size)
                ahead, row = StepWindow.of(self.service, *counts), 0
                bare_ahead = ahead if bare is self.service else StepWindow.of(bare, *counts)
            new = tuple(state.trace.prompt_tokens[joined : state.waiting].tolist()) if state.waiting > joined else ()
            read = new if self.prefill else ()
            decision = PolicyState(
                serving=state,
                previous=previous,
                window=ahead,
                row=row,
                longest=longest,
                prompts=read,
                residency=residency,
                directions=self.directions,
                stayed=1 - sum(new) / tokens,
            )
            for prompt in read:  # made whatever is decided, as the tables of the window are
                self.service.prefill(prompt)
            plan, residency, transition, runtime = self._decided(decision)
            decode, prefill = (decision.latency(plan), decision.prefill(plan)) if own is None else self._own_times(own, decision)
            paging = 0.0 if bare_ahead is ahead or bare_ahead is None or own else decode - bare_ahead.latency(plan, row)
            moved, migrating = sum(transition.moved.values()), 0.0 if self.migration == "free" else transition.latency
            self.plans.append(plan)
            self.prompts.append(read)
            seconds = prefill + decode
            seconds = max(seconds, migrating) if self.migration == "overlapped" else seconds + migrating
            number, at_work, due, size_now = state.iteration, state.running, state.remaining == 1, state.batch
            state = state.stepped(seconds)
            self.first_token[joined : state.waiting] = state.clock
            self.finished[at_work[due]] = state.clock
            held = (ahead.held(plan, row) * ahead.tables.page[row] / GB).tolist()
            used = None if residency is None else ahead.counts(plan)
            copies = 0.0 if residency is None or used is None else sum(residency.duplicates(used, ahead.tables, row)) / GB
            costs = (decode, prefill, moved / GB, migrating, paging, seconds, copies, runtime)
            yield (number, state.clock, size_now, tokens, *held, *self._shown(plan), *costs)
            previous = plan
            row += 1

    def _decided(self, state: PolicyState) -> tuple[KernelMappingPlan, Residency | None, TransitionCost, float]:
        """The policy's plan, which fits, what is where then, what it takes to get there, and the seconds it took to decide."""
        where = f"policy {self.name}, iteration {state.serving.iteration}"
        started = time.perf_counter()
        try:
            plan = self.policy.decide(state)
            runtime = time.perf_counter() - started
            if not isinstance(plan, KernelMappingPlan):
                raise TypeError(f"decide must return a KernelMappingPlan, not {shown(plan)}")
            if not state.fits(plan):
                raise _Stopped(f"{where}: the plan does not fit: {state.explain_overflow(plan)}")
            if self.duplicates == "none":
                return plan, None, state.transition(plan), runtime
            return plan, *state.settled(plan, self.duplicates), runtime
        except _Stopped:
            raise
        except Exception as error:  # whatever a user's policy raises, the rows so far are worth keeping
            raise _Stopped(f"{where}: {type(error).__name__}: {error}") from error

    def _own_times(self, own: OwnTimes, state: PolicyState) -> tuple[float, float]:
        """Seconds of the decode step and of the prefills, as the policy says."""
        where = f"policy {self.name}, iteration {state.serving.iteration}"
        try:
            times = (float(own.decode_time(state)), float(sum(own.prefill_time(state, prompt) for prompt in state.prompts)))
        except Exception as error:
            raise _Stopped(f"{where}: {type(error).__name__}: {error}") from error
        if not all(0 <= seconds < math.inf for seconds in times):
            raise _Stopped(f"{where}: decode_time and prefill_time must be seconds of at least 0 and finite, not {shown(times)}")
        return times

    def _shown(self, plan: KernelMappingPlan) -> tuple[Any, ...]:
        """Slices of each kind on the first tier, and the plan as a text."""
        found = self._texts.get(plan)
        if found is None:
            found = self._texts[plan] = (*(plan.mean_count(k, 0) for k in range(len(plan.splits))), str(plan))
        return found


def _without_walks(service: Service) -> Service:
    return replace(service, profile=replace(service.profile, page_walk=0.0))


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
