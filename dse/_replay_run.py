"""A replay under way: iteration after iteration as a policy decides, and what is refused before the first one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..models.checks import shown
from ..models.kernel_mapping import KernelMappingPlan, TransitionCost
from ..models.migration import Duplicates, Residency
from ..models.paging import Directions
from ..models.roofline import Array
from ..models.serving import PolicyState, Service, ServingLimits, ServingState, StepWindow, TableTime
from ..models.trace import Trace
from ..models.units import GB
from ..solvers.policies import OwnTimes, Policy


def check_call(policy: object, trace: object, prefill: object, *, offload: bool) -> None:
    """ValueError unless these are a value with the methods of a policy (of offloading, or of the kernel mapping), a Trace, and a bool."""
    example = "KvOnly()" if offload else "Myopic()"
    if isinstance(policy, type):
        raise ValueError(f"the policy must be a value, as {example}, not the class {policy.__name__}; put brackets behind it")
    knows = {method: callable(getattr(policy, method, None)) for method in ("decide", "most_tokens")}
    if not knows["decide"]:
        raise ValueError(f"the policy must have the method decide, as {example} has, not be {shown(policy)}")
    if offload and not knows["most_tokens"]:
        raise ValueError(f"a policy of offloading needs the method most_tokens, and {shown(policy)} has none; give others to replay")
    if knows["most_tokens"] and not offload:
        raise ValueError(f"{shown(policy)} has the method most_tokens, as policies of offloading have; give it to replay_offload")
    if not isinstance(trace, Trace):
        raise ValueError(f"the trace must be a Trace, as Trace.from_csv or poisson_trace gives it, not {shown(trace)}")
    if not isinstance(prefill, bool | np.bool_):
        raise ValueError(f"prefill must be True or False, not {shown(prefill)}")


class Stopped(Exception):
    """The policy cannot go on; the text says why."""


def rows_until(coming: Iterator[tuple[Any, ...]], finished: Array, most: int | None) -> tuple[list[tuple[Any, ...]], str, bool]:
    """The rows of a replay, at most ``most``; why it ended before every request had ``finished`` [N] ("" if all did); and whether that was
    Ctrl-C."""
    rows: list[tuple[Any, ...]] = []
    try:
        for row in coming:
            rows.append(row)
            if most is not None and len(rows) == most:
                break
    except Stopped as error:
        return rows, str(error), False
    except KeyboardInterrupt:
        return rows, f"interrupted after {len(rows)} iterations", True
    unfinished = int(np.isnan(finished).sum())
    why = f"stopped after {len(rows)} iterations, as asked; {unfinished} requests had not finished"
    return rows, why if unfinished else "", False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A replay under way. ``first_token`` and ``finished`` [N] are filled with times as it goes; ``plans``, ``prompts`` and ``asked``
    (the tables that the policy looked at) grow with the iterations."""

    policy: Policy
    name: str
    service: Service
    limits: ServingLimits
    prefill: bool
    migration: str
    directions: Directions
    duplicates: Duplicates
    window: int
    first_token: Array
    finished: Array
    plans: list[KernelMappingPlan] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    asked: list[TableTime | None] = field(default_factory=list)
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
        """The policy's plan, which fits, what is where then, what it takes to get there, and the seconds it took to decide, without those
        of the window's tables."""
        where = f"policy {self.name}, iteration {state.serving.iteration}"
        spent = state.window.spent
        asked, before, started = spent.asked, spent.seconds, time.perf_counter()
        try:
            plan = self.policy.decide(state)
            runtime = time.perf_counter() - started - (spent.seconds - before)
            self.asked.append(spent if spent.asked > asked else None)
            if not isinstance(plan, KernelMappingPlan):
                raise TypeError(f"decide must return a KernelMappingPlan, not {shown(plan)}")
            if not state.fits(plan):
                raise Stopped(f"{where}: the plan does not fit: {state.explain_overflow(plan)}")
            if self.duplicates == "none":
                return plan, None, state.transition(plan), runtime
            return plan, *state.settled(plan, self.duplicates), runtime
        except Stopped:
            raise
        except Exception as error:  # whatever a user's policy raises, the rows so far are worth keeping
            raise Stopped(f"{where}: {type(error).__name__}: {error}") from error

    def _own_times(self, own: OwnTimes, state: PolicyState) -> tuple[float, float]:
        """Seconds of the decode step and of the prefills, as the policy says."""
        where = f"policy {self.name}, iteration {state.serving.iteration}"
        try:
            times = (float(own.decode_time(state)), float(sum(own.prefill_time(state, prompt) for prompt in state.prompts)))
        except Exception as error:
            raise Stopped(f"{where}: {type(error).__name__}: {error}") from error
        if not all(0 <= seconds < math.inf for seconds in times):
            raise Stopped(f"{where}: decode_time and prefill_time must be seconds of at least 0 and finite, not {shown(times)}")
        return times

    def _shown(self, plan: KernelMappingPlan) -> tuple[Any, ...]:
        """Slices of each kind on the first tier, and the plan as a text."""
        found = self._texts.get(plan)
        if found is None:
            found = self._texts[plan] = (*(plan.mean_count(k, 0) for k in range(len(plan.splits))), str(plan))
        return found


def _without_walks(service: Service) -> Service:
    return replace(service, profile=replace(service.profile, page_walk=0.0))
