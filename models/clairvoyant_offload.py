"""A whole schedule of offloaded requests known in advance: in which form to keep each token, and what that costs.

    min  sum_i T_i(A_i)      A_i: ACT tokens that iteration i reads      T_i: seconds of a decode step, as in ``offload_serving``

Which requests run together is given. The clairvoyant optimum of a policy is that of the schedule that the policy saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import whole
from .offload_serving import OffloadService, OffloadSteps
from .trace import Index


@dataclass(frozen=True, slots=True, kw_only=True)
class FormsPlan:
    """The decision over a whole schedule: tokens of each cell written as ACT, and tokens of prompts recomputed in each iteration (none
    unless they are kept in both forms)."""

    act: tuple[int, ...]
    recomputed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FormsCost:
    """``latency`` [s] of all decode steps; ``misfits``: iterations in which GPU and host do not hold the state."""

    latency: float
    misfits: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        """Every iteration fits."""
        return not self.misfits

    def explain_overflow(self) -> str:
        """Which iterations do not fit; empty if all do."""
        return f"iterations {list(self.misfits[:5])} hold too much" if self.misfits else ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormsSchedule:
    """Which form to write each token in, when all batches and contexts are known:

        min  sum_i T_i(A_i)      A_i = sum over cells k with start_k <= i < end_k of y_k,    0 <= y_k <= size_k

    A cell: ``size`` [K] tokens that are first read in iteration ``start`` [K] and leave before ``end`` [K]; ``prompt`` [K]: of prompts.
    ``both``: tokens of prompts are kept in both forms, so that any number of them may be recomputed in each iteration.
    """

    service: OffloadService
    steps: OffloadSteps
    start: Index
    end: Index
    size: Index
    prompt: NDArray[np.bool_]
    both: bool = False

    @classmethod
    def of(cls, service: OffloadService, requests: Sequence[tuple[int, int, int]], *, both: bool = False, iterations: int) -> FormsSchedule:
        """The schedule of ``requests``: for each the iteration in which it joins, its prompt tokens and its output tokens."""
        iterations = whole("schedule of offloaded requests", "iterations", iterations, "iterations")
        sizes: dict[tuple[int, int, bool], int] = {}
        batch, tokens = (np.zeros(iterations, dtype=np.int64) for _ in range(2))
        for first, prompt, output in requests:
            end = min(first + output, iterations)
            batch[first:end] += 1
            tokens[first:end] += prompt + np.arange(end - first)
            sizes[first, end, True] = sizes.get((first, end, True), 0) + prompt
            for start in range(first + 1, end):
                sizes[start, end, False] = sizes.get((start, end, False), 0) + 1
        cells = np.array(sorted(sizes), dtype=np.int64).reshape(-1, 3)
        size = np.array([sizes[cell] for cell in sorted(sizes)], dtype=np.int64)
        parts: dict[str, Any] = {"start": cells[:, 0], "end": cells[:, 1], "prompt": cells[:, 2] > 0}
        return cls(service=service, steps=service.steps(batch, tokens), size=size, both=both, **parts)

    @property
    def limits(self) -> tuple[Index, Index]:
        """Least and most ACT tokens [I] of each iteration; with ``both`` any number, and ``evaluate`` checks what is held."""
        tokens = self.steps.tokens
        return (np.zeros_like(tokens), tokens) if self.both else self.service.limits(tokens)

    @property
    def prompts(self) -> Index:
        """Tokens of prompts [I] in each iteration."""
        return self.alive(np.where(self.prompt, self.size, 0))

    def alive(self, tokens: ArrayLike) -> Index:
        """Sums [I] over the cells that each iteration reads of ``tokens`` [K]."""
        change = np.zeros(len(self.steps) + 1, dtype=np.int64)
        np.add.at(change, self.start, tokens)
        np.subtract.at(change, self.end, tokens)
        return np.cumsum(change)[:-1]

    def evaluate(self, plan: FormsPlan) -> FormsCost:
        """What a plan costs; ValueError if it is no plan of this schedule."""
        act = np.array(plan.act, dtype=np.int64)
        again = np.array(plan.recomputed, dtype=np.int64) if plan.recomputed else np.zeros(len(self.steps), dtype=np.int64)
        held, prompts = self.alive(act) if act.shape == self.size.shape else None, self.prompts
        if held is None or np.any((act < 0) | (act > self.size)) or again.shape != prompts.shape:
            raise ValueError("the plan's cells or iterations are not those of this schedule: it belongs to another one")
        most = prompts if self.both else np.zeros_like(prompts)
        if np.any((again < 0) | (again > most)) or (self.both and np.any(act[self.prompt])):
            raise ValueError("the plan recomputes tokens that the rule of this schedule does not allow; set both, or plan cells only")
        seconds = float(self.steps.seconds(held + again).sum())
        least, most_act = self.service.limits(self.steps.tokens)
        wrong = (held < least) | (held > most_act)
        if again.any():  # else no prompt needs its second form
            kv, act_bytes = self.service.token_bytes
            single = kv * (self.steps.tokens - prompts - held) + act_bytes * held
            wrong = (kv + act_bytes) * prompts + np.maximum(single - self.service.cache, 0.0) > self.service.host_room + 1e-3
        return FormsCost(latency=seconds, misfits=tuple(np.flatnonzero(wrong).tolist()))

    def explain_infeasible(self) -> str:
        """Why no plan fits."""
        over = np.flatnonzero(np.greater(*self.limits))
        if not len(over):
            return "a plan of each iteration fits alone, and none of all together; serve fewer requests"
        return f"iteration {over[0]} holds {self.steps.tokens[over[0]]} tokens, which fit in no form; serve fewer requests"
