"""Replay a trace under an online policy of offloading: one row for each iteration, what the requests saw, and the clairvoyant optimum.

As ``dse.replay``, but the plan is the form in which each token's state is kept (``models.offload_serving``). Nothing migrates: a token
keeps its form, so what a policy pays for is what it wrote before.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd

from .. import __version__
from ..models.checks import shown, whole
from ..models.clairvoyant_offload import FormsPlan, FormsSchedule
from ..models.hardware import System
from ..models.llm import LLMConfig
from ..models.offload import STAGED_REQUESTS, OffloadCost, WeightsOn
from ..models.offload_profiles import DATASHEET, OffloadProfile
from ..models.offload_serving import OffloadDecision, OffloadService, OffloadState
from ..models.roofline import Array
from ..models.serving import ServingLimits
from ..models.trace import Index, Trace
from ..models.units import GB
from ..solvers.clairvoyant import Regret, regret
from ..solvers.clairvoyant_offload import LpForms
from ..solvers.offload_policies import OffloadPolicy
from ..solvers.result import Solver, SolverResult
from ._replay_run import Stopped, check_call, rows_until
from .replay import requests_table, summarised


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffloadReplay:
    """A policy's run over a trace.

    ``rows``: one for each finished iteration: iteration, clock_s (at its end), batch, tokens (whose state it reads), act_tokens and
    both_tokens (held as ACT, and in both forms), recomputed_tokens (ACT, and those of both that are), <tier>_GB, link_s, gpu_s (busy in the
    decode step), decode_s, prefill_s, host_written_GB (new tokens' share of the state on the host, as T(A) has it; where the GPU is full
    from the start, all of a new token goes to the host, which is more), iteration_s, decide_runtime_s.
    ``requests``: as of ``Replay``. ``summary``: as ``summarised``, where nothing migrates, and host_written_GB, decode_s and prefill_s.
    ``stopped``: why it ended before every request had finished; empty if all did. ``interrupted``: it was Ctrl-C. ``joined`` [N]: the
    iteration in which each request began, -1 if it never did. ``both``: whether tokens were kept in both forms.
    """

    rows: pd.DataFrame
    requests: pd.DataFrame
    summary: dict[str, Any]
    service: OffloadService
    joined: Index
    stopped: str = ""
    interrupted: bool = False
    both: bool = False

    def unless_interrupted(self) -> Self:
        """This replay; KeyboardInterrupt if Ctrl-C ended it, for loops over replays that should then end, too."""
        if self.interrupted:
            raise KeyboardInterrupt
        return self

    def schedule(self, *, both: bool | None = None) -> FormsSchedule:
        """The batches and contexts that this replay saw, for which the optimum is sought. ``both``: whether the optimum may keep prompts in
        both forms; None: if this replay did. ValueError if there are no iterations."""
        if not len(self.rows):
            raise ValueError("a clairvoyant optimum needs a replay of at least one iteration; replay a trace")
        began = self.joined[self.joined >= 0]
        columns = (self.requests[name].to_numpy()[: len(began)] for name in ("prompt_tokens", "output_tokens"))
        requests = list(zip(began.tolist(), *(column.tolist() for column in columns), strict=True))
        return FormsSchedule.of(self.service, requests, both=self.both if both is None else both, iterations=len(self.rows))


def replay_offload(
    policy: OffloadPolicy,
    trace: Trace,
    system: System,
    llm: LLMConfig,
    *,
    batch_limit: int,
    profile: OffloadProfile = DATASHEET,
    prefill: bool = False,
    weights: WeightsOn = "host",
    weight_bits: float = 16,
    kv_bits: float = 16,
    activation_bits: float = 16,
    buffered_requests: int = STAGED_REQUESTS,
    iterations: int | None = None,
    name: str | None = None,
) -> OffloadReplay:
    """Serve ``trace`` with at most ``batch_limit`` requests at once, each token in the form that ``policy`` decides.

    The first tier of ``system`` is the GPU's memory, the second the host's. ``prefill``: requests that join read their prompts together
    before the decode step; else prompts are there already, which is what the optimum is about. ``weights``: streamed from the "host", or
    on the "gpu". ``iterations``: stop after so many. ``name`` of the policy in the summary; None: its class.

    A request larger than the system, or a system without a host, is a ValueError before the start. A policy that raises, breaks a rule or
    overflows a tier ends the replay, as does Ctrl-C: the rows so far are kept and ``stopped`` says why. A loop over replays ends there with
    ``replay_offload(...).unless_interrupted()``.
    """
    check_call(policy, trace, prefill, offload=True)
    most = None if iterations is None else whole("replay", "iterations", iterations, "iterations")
    batch = min(whole("replay", "batch_limit", batch_limit, "requests"), len(trace))
    service = OffloadService(
        system=system,
        llm=llm,
        batch=batch,
        longest=int(trace.state_tokens.max()) + 1,
        profile=profile,
        weights=weights,
        weight_bits=weight_bits,
        kv_bits=kv_bits,
        activation_bits=activation_bits,
        buffered_requests=buffered_requests,
    )
    fits = whole(type(policy).__name__, "most_tokens", policy.most_tokens(service), "tokens", least=0)
    service.check(trace, fits)
    run = _Run(
        policy=policy,
        name=type(policy).__name__ if name is None else name,
        service=service,
        limits=ServingLimits(batch=batch, tokens=fits),
        prefill=prefill,
        first_token=np.full(len(trace), np.nan),
        finished=np.full(len(trace), np.nan),
        joined=np.full(len(trace), -1, dtype=np.int64),
    )
    rows, stopped, interrupted = rows_until(run.rows(trace), run.finished, most)
    frame = pd.DataFrame(rows, columns=run.columns())
    requests = requests_table(trace, run.first_token, run.finished)
    known = {"policy": run.name, "trace": trace.name, "system": system.name, "llm": llm.name, "profile": profile.name}
    summary = known | summarised(frame.assign(migration_GB=0.0, migration_s=0.0, paging_s=0.0), requests)
    summary |= {column: float(frame[column].sum()) for column in ("host_written_GB", "decode_s", "prefill_s")}
    return OffloadReplay(
        rows=frame,
        requests=requests,
        summary=summary | {"stopped": stopped, "version": __version__},
        service=service,
        joined=np.where(run.joined < len(rows), run.joined, -1),
        stopped=stopped,
        interrupted=interrupted,
        both=bool((frame["both_tokens"] > 0).any()),
    )


class OffloadAgainst(NamedTuple):
    """A replay beside the clairvoyant optimum of its own schedule, in seconds of decode steps (``busy`` of the replay).

    ``problem`` has the rule that the policy kept to: one form a token, or both for prompts. ``regret`` is against its ``optimum``.
    ``any_bound`` [s] is proven for both rules, whatever the host would hold, and ``any_regret`` is against it, at most.
    """

    problem: FormsSchedule
    busy: float
    optimum: SolverResult[FormsPlan]
    regret: Regret
    any_bound: float | None
    any_regret: float | None


def against_offload_optimum(runs: Mapping[str, OffloadReplay], *, solver: Solver | None = None) -> dict[str, OffloadAgainst]:
    """Each replay of at least one iteration against the optimum of its own schedule by ``solver`` (``LpForms`` unless said); those of one
    service (LLM, machine, profile, bits) that saw the same requests join in the same iterations share it."""
    exact = LpForms() if solver is None else solver
    answers: dict[tuple[Hashable, int, bool], tuple[FormsSchedule, SolverResult[FormsPlan]]] = {}
    busy: dict[str, float] = {}
    keys: dict[str, tuple[Hashable, int, bool]] = {}
    for name, run in runs.items():
        if not isinstance(run, OffloadReplay):
            raise ValueError(f"{name}: the optimum is that of an OffloadReplay, as replay_offload gives it, not of {shown(run)}")
        if not len(run.rows):
            continue
        lengths = run.requests[["prompt_tokens", "output_tokens"]].to_numpy()[run.joined >= 0]
        seen: Hashable = (run.service, run.joined[run.joined >= 0].tobytes(), lengths.tobytes())
        own = (seen, len(run.rows), run.both)
        for key in {own, (*own[:2], True)}:
            if key not in answers:
                problem = run.schedule(both=key[2])
                answers[key] = (problem, exact.solve(problem))
        # Added up as the optimum is, so that equal plans have a regret of 0 in all digits.
        busy[name] = float(answers[own][0].steps.seconds(run.rows["recomputed_tokens"].to_numpy()).sum())
        keys[name] = own
    found: dict[str, OffloadAgainst] = {}
    for name, own in keys.items():
        problem, optimum = answers[own]
        best = min(busy[other] for other, key in keys.items() if key == own)
        bound = answers[(*own[:2], True)][1].bound
        found[name] = OffloadAgainst(
            problem=problem,
            busy=busy[name],
            optimum=optimum,
            regret=regret(busy[name], optimum, best=best),
            any_bound=bound,
            any_regret=busy[name] / bound - 1 if bound else None,
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """A replay under way. ``first_token``, ``finished`` and ``joined`` [N] are filled as it goes."""

    policy: OffloadPolicy
    name: str
    service: OffloadService
    limits: ServingLimits
    prefill: bool
    first_token: Array
    finished: Array
    joined: Index

    def columns(self) -> list[str]:
        machine = self.service.machine
        counts = ["iteration", "clock_s", "batch", "tokens", "act_tokens", "both_tokens", "recomputed_tokens"]
        costs = ["link_s", "gpu_s", "decode_s", "prefill_s", "host_written_GB", "iteration_s", "decide_runtime_s"]
        return [*counts, f"{machine.gpu}_GB", f"{machine.host}_GB", *costs]

    def rows(self, trace: Trace) -> Iterator[tuple[Any, ...]]:
        """Serve the trace, one row an iteration."""
        state, service = OffloadState.start(self.service, trace), self.service
        while not state.serving.done:
            state = state.admitted(state.serving.woken().admitted(self.limits))
            decision, written, cost, runtime = self._decided(state)
            used = int(written.act.sum()) + decision.recomputed
            prefill, stored = service.prefill_time(written, used) if self.prefill else (0.0, 0.0)
            outside = cost.to_device_bytes - service.streamed(state.batch)
            stored += outside * state.batch / max(state.tokens, state.batch)
            seconds = prefill + cost.latency
            number, at_work, due = state.serving.iteration, state.serving.running, state.serving.remaining == 1
            after = written.stepped(decision, seconds)
            self._check_room(service.cost(after, 0) if after.batch else cost, number)
            self.joined[at_work[state.batch - state.joined :]] = number
            clock = after.serving.clock
            self.first_token[at_work[state.batch - state.joined :]] = clock
            self.finished[at_work[due]] = clock
            counts = (state.batch, state.tokens, int(written.act.sum()), int(written.both.sum()), used)
            held = (nbytes / GB for nbytes in cost.tier_bytes)
            costs = (cost.link_time, cost.gpu_time, cost.latency, prefill, stored / GB, seconds, runtime)
            yield (number, clock, *counts, *held, *costs)
            state = after

    def _decided(self, state: OffloadState) -> tuple[OffloadDecision, OffloadState, OffloadCost, float]:
        """The policy's decision, the state with the new prompts, which fits, its cost, and the seconds that it took to decide."""
        where = f"policy {self.name}, iteration {state.serving.iteration}"
        started = time.perf_counter()
        try:
            decision = self.policy.decide(state)
            runtime = time.perf_counter() - started
            if not isinstance(decision, OffloadDecision):
                raise TypeError(f"decide must return an OffloadDecision, not {shown(decision)}")
            written = state.written(decision)
            cost = self.service.cost(written, decision.recomputed)
        except Exception as error:  # whatever a user's policy raises, the rows so far are worth keeping
            raise Stopped(f"{where}: {type(error).__name__}: {error}") from error
        self._check_room(cost, state.serving.iteration)
        return decision, written, cost, runtime

    def _check_room(self, cost: OffloadCost, iteration: int) -> None:
        if not cost.fits:
            raise Stopped(f"policy {self.name}, iteration {iteration}: what is written does not fit: {cost.explain_overflow()}")
