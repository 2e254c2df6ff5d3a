"""Replay a trace under an online policy: one row for each iteration, and what the requests saw (the setting of H2M2, arXiv 2504.14893).

An iteration runs the prefill of the requests that joined, then one decode step. Before it, data move to where the policy's plan wants
them; that is so at iteration boundaries only, and nothing runs meanwhile (as we read H2M2). All data of the iteration move as its plan
differs from the one before, keys and values at their size in this iteration; the first plan is free. A page has one place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from .. import __version__
from ..models.checks import shown, whole
from ..models.hardware import System
from ..models.kernel_mapping import KernelMappingPlan, TransitionCost
from ..models.kernel_mapping_tables import Granularity
from ..models.llm import LLMConfig
from ..models.profiles import FIRST_PRINCIPLES, Profile
from ..models.roofline import Array
from ..models.serving import PolicyState, Service, ServingLimits, ServingState, StepWindow
from ..models.trace import Trace
from ..models.units import GB
from ..solvers.policies import Policy

Migration = Literal["serial", "overlapped", "free"]

MOST_AHEAD = 4096
"""Iterations whose tables are held together at most: some 60 MB for an LLM of 96 heads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A policy's run over a trace.

    ``rows``: one for each finished iteration: iteration, clock_s (at its end), batch, tokens (whose keys and values it reads), <tier>_GB,
    n_<kind> (slices on the first tier, mean over layers), plan, decode_s, prefill_s, migration_GB, migration_s (what it takes, hidden or
    not), paging_s (page walks, part of decode_s), iteration_s, decide_runtime_s.
    ``requests``: one for each request of the trace: arrived_at_s, prompt_tokens, output_tokens, first_token_s and finished_s on the
    trace's clock, ttft_s (from arrival to first token), tpot_s (mean from token to token after it). NaN where it did not come to that.
    ``summary``: see ``summarised``. ``stopped``: why it ended before every request had finished; empty if all did.
    """

    rows: pd.DataFrame
    requests: pd.DataFrame
    summary: dict[str, Any]
    stopped: str = ""


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
    ``migration``: "serial" waits for it, "overlapped" takes the longer of migration and iteration, "free" takes no time.
    ``iterations``: stop after so many. ``window``: iterations whose tables are built together at most; the rows are the same for any.
    ``name`` of the policy in the summary; None: its class.

    A request larger than the system is a ValueError before the start. A policy that raises, or whose plan does not fit, ends the replay, as
    does Ctrl-C: the rows so far are kept and ``stopped`` says why.
    """
    if migration not in ("serial", "overlapped", "free"):
        raise ValueError(f"migration must be 'serial', 'overlapped' or 'free', not {migration!r}")
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
    frame = pd.DataFrame(rows, columns=run.columns())
    requests = _requests(trace, run.first_token, run.finished)
    known = {"policy": run.name, "trace": trace.name, "system": system.name, "llm": llm.name, "profile": profile.name}
    summary = known | summarised(frame, requests) | {"stopped": stopped, "version": __version__}
    return Replay(rows=frame, requests=requests, summary=summary, stopped=stopped)


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


class _Stopped(Exception):
    """The policy cannot go on; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """A replay under way. ``first_token`` and ``finished`` [N] are filled with times as it goes."""

    policy: Policy
    name: str
    service: Service
    limits: ServingLimits
    prefill: bool
    migration: Migration
    window: int
    first_token: Array
    finished: Array
    _texts: dict[KernelMappingPlan, tuple[Any, ...]] = field(default_factory=dict)

    def columns(self) -> list[str]:
        kinds = [kind.name for kind in self.service.tables([1], [1]).kinds]
        held = [f"{name}_GB" for name in self.service.system.tier_names]
        costs = ["decode_s", "prefill_s", "migration_GB", "migration_s", "paging_s", "iteration_s", "decide_runtime_s"]
        return ["iteration", "clock_s", "batch", "tokens", *held, *(f"n_{kind}" for kind in kinds), "plan", *costs]

    def rows(self, trace: Trace) -> Iterator[tuple[Any, ...]]:
        """Serve the trace, one row an iteration."""
        state = ServingState.start(trace)
        batch = min(self.limits.batch, len(trace))
        longest = self.service.problem(batch, min(self.limits.tokens, batch * int(trace.state_tokens.max())))
        bare = self.service if not self.service.profile.page_walk else _without_walks(self.service)
        ahead, bare_ahead, row, size = None, None, 0, 1
        previous: KernelMappingPlan | None = None
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
            decision = PolicyState(serving=state, previous=previous, window=ahead, row=row, longest=longest)
            plan, transition, runtime = self._decided(decision)
            decode = ahead.latency(plan, row)
            paging = 0.0 if bare_ahead is ahead or bare_ahead is None else decode - bare_ahead.latency(plan, row)
            moved, migrating = sum(transition.moved.values()), 0.0 if self.migration == "free" else transition.latency
            new = state.trace.prompt_tokens[joined : state.waiting].tolist() if self.prefill else ()
            prefill = sum(self.service.prefill_time(prompt, plan) for prompt in new)
            seconds = prefill + decode
            seconds = max(seconds, migrating) if self.migration == "overlapped" else seconds + migrating
            number, at_work, due, size_now = state.iteration, state.running, state.remaining == 1, state.batch
            state = state.stepped(seconds)
            self.first_token[joined : state.waiting] = state.clock
            self.finished[at_work[due]] = state.clock
            held = (ahead.held(plan, row) * ahead.tables.page[row] / GB).tolist()
            costs = (decode, prefill, moved / GB, migrating, paging, seconds, runtime)
            yield (number, state.clock, size_now, tokens, *held, *self._shown(plan), *costs)
            previous = plan
            row += 1

    def _decided(self, state: PolicyState) -> tuple[KernelMappingPlan, TransitionCost, float]:
        """The policy's plan, which fits, what it takes to get there, and the seconds it took to decide."""
        where = f"policy {self.name}, iteration {state.serving.iteration}"
        started = time.perf_counter()
        try:
            plan = self.policy.decide(state)
            runtime = time.perf_counter() - started
            if not isinstance(plan, KernelMappingPlan):
                raise TypeError(f"decide must return a KernelMappingPlan, not {shown(plan)}")
            if not state.fits(plan):
                raise _Stopped(f"{where}: the plan does not fit: {state.explain_overflow(plan)}")
            return plan, state.transition(plan), runtime
        except _Stopped:
            raise
        except Exception as error:  # whatever a user's policy raises, the rows so far are worth keeping
            raise _Stopped(f"{where}: {type(error).__name__}: {error}") from error

    def _shown(self, plan: KernelMappingPlan) -> tuple[Any, ...]:
        """Slices of each kind on the first tier, and the plan as a text."""
        found = self._texts.get(plan)
        if found is None:
            found = self._texts[plan] = (*(plan.mean_count(k, 0) for k in range(len(plan.splits))), str(plan))
        return found


def _without_walks(service: Service) -> Service:
    return replace(service, profile=replace(service.profile, page_walk=0.0))


def _requests(trace: Trace, first_token: Array, finished: Array) -> pd.DataFrame:
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
