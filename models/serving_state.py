"""Which requests run, which wait and how many tokens each holds while a trace is served: continuous batching, first come first served.

Before each iteration requests that have arrived join the batch while there are fewer than the batch limit and while there is room for
the keys and values that all of them will hold at their end, so nothing is ever thrown out (an assumption; servers that admit more must
preempt). Each iteration generates one token of every running request; a request that has all its tokens leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .checks import whole
from .trace import Index, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """Requests that run together at most, and tokens whose keys and values they may hold together at most."""

    batch: int
    tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", whole("serving", "batch limit", self.batch, "requests"))
        object.__setattr__(self, "tokens", whole("serving", "limit of tokens", self.tokens, "tokens", least=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingState:
    """Where a replay stands before an iteration.

    ``running`` [B]: places of the requests in the trace. ``context`` [B]: tokens of each that the next step reads. ``remaining`` [B]:
    tokens that each has yet to generate, at least 1. ``waiting``: place of the first request that was not admitted; all after it wait or
    have not arrived. ``clock`` [s] since the trace began. ``finished``: how many requests have left.
    """

    trace: Trace
    running: Index
    context: Index
    remaining: Index
    waiting: int = 0
    finished: int = 0
    iteration: int = 0
    clock: float = 0.0

    def __post_init__(self) -> None:
        for name in ("running", "context", "remaining"):  # a policy looks at them, and must not change what it is served
            values = getattr(self, name).view()
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    @classmethod
    def start(cls, trace: Trace) -> ServingState:
        """Nothing runs yet."""
        none = np.zeros(0, dtype=np.int64)
        return cls(trace=trace, running=none, context=none, remaining=none)

    @property
    def batch(self) -> int:
        """Requests that run."""
        return len(self.running)

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values the next step reads."""
        return int(self.context.sum())

    @property
    def reserved(self) -> int:
        """Tokens that the running requests will hold when each generates its last one."""
        return int(self.context.sum() + self.remaining.sum()) - len(self.running)

    @property
    def done(self) -> bool:
        """Every request has finished."""
        return not len(self.running) and self.waiting == len(self.trace)

    def admitted(self, limits: ServingLimits) -> ServingState:
        """The state with all requests that have arrived and fit, in order of arrival; one that does not fit holds up those after it."""
        trace, first = self.trace, self.waiting
        most = min(first + limits.batch - len(self.running), len(trace))
        if first >= most or trace.arrived_at[first] > self.clock:
            return self
        reserved, last = self.reserved, first
        while last < most and trace.arrived_at[last] <= self.clock:
            reserved += trace.requests[last].state_tokens
            if reserved > limits.tokens:
                break
            last += 1
        if last == first:
            return self
        return replace(
            self,
            running=np.concatenate([self.running, np.arange(first, last)]),
            context=np.concatenate([self.context, trace.prompt_tokens[first:last]]),
            remaining=np.concatenate([self.remaining, trace.output_tokens[first:last]]),
            waiting=last,
        )

    def woken(self) -> ServingState:
        """The state when the next request arrives, if nothing runs and none has."""
        if len(self.running) or self.waiting == len(self.trace):
            return self
        return replace(self, clock=max(self.clock, float(self.trace.arrived_at[self.waiting])))

    def stepped(self, seconds: float) -> ServingState:
        """The state after an iteration of so many ``seconds``: one token more of each request; those that have all leave."""
        context, remaining, running = self.context + 1, self.remaining - 1, self.running
        left = 0
        if not remaining.all():
            stay = remaining > 0
            left = len(running) - int(stay.sum())
            running, context, remaining = running[stay], context[stay], remaining[stay]
        return ServingState(
            trace=self.trace,
            running=running,
            context=context,
            remaining=remaining,
            waiting=self.waiting,
            finished=self.finished + left,
            iteration=self.iteration + 1,
            clock=self.clock + seconds,
        )

    def ahead(self, limits: ServingLimits, number: int) -> tuple[Index, Index]:
        """Requests and tokens of the next iterations, this one first, ``number`` at most, if nobody else arrives meanwhile."""
        batch, tokens, state = list[int](), list[int](), self
        while len(batch) < number and state.batch:
            batch.append(state.batch)
            tokens.append(state.tokens)
            state = state.stepped(0.0).admitted(limits)
        return np.array(batch, dtype=np.int64), np.array(tokens, dtype=np.int64)

    def check(self, limits: ServingLimits | None = None) -> None:
        """AssertionError, which is a defect of memsplit, where a request is lost or a token is not accounted for."""
        prompts, outputs = self.trace.prompt_tokens[self.running], self.trace.output_tokens[self.running]
        wrong = [
            what
            for what, holds in (
                ("a request runs twice or before it was admitted", len(set(self.running.tolist())) == self.batch),
                ("a request runs that was not admitted", not self.batch or int(self.running.max()) < self.waiting),
                ("admitted requests neither run nor finished", self.finished + self.batch == self.waiting),
                ("a request that has all its tokens still runs", bool(np.all(self.remaining >= 1))),
                ("tokens are lost", np.array_equal(self.context - prompts, outputs - self.remaining)),
                ("more requests run than may", limits is None or self.batch <= limits.batch),
                ("more tokens are promised room than fit", limits is None or self.reserved <= limits.tokens),
            )
            if not holds
        ]
        if wrong:
            raise AssertionError(f"serving state of iteration {self.iteration}: {wrong[0]}; this is a defect of memsplit, please report it")
