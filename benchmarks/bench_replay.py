"""Replays of traces: the paper's 128 iterations under all policies, and 100,000 iterations under the greedy and the myopic one."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import numpy as np

from memsplit.dse.replay import replay
from memsplit.models.llm import LLMConfig
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM, LLAMA2_70B, LLAMA3_1_70B, LPDDR_ONLY_SYSTEM
from memsplit.models.trace import Trace, h2m2_trace, poisson_trace
from memsplit.solvers.policies import FlexGenStatic, Greedy, Hysteresis, LookAhead, Myopic, Policy, SingleTier, Static
from memsplit.solvers.shortlist import Shortlist

LONG = 100_000
"""Iterations of the long trace."""


def main() -> list[dict[str, Any]]:
    """CPU seconds of one core, trace included; the long trace is one run, the others the best of three."""
    policies = (Static(), FlexGenStatic(), Greedy(), Myopic(), Hysteresis())

    def all_policies() -> None:
        trace = h2m2_trace(0)
        _served(SingleTier(), trace, LPDDR_ONLY_SYSTEM)
        for policy in policies:
            _served(policy, trace)

    rows = [_row("replay, H2M2's 128 iterations, 6 policies", min(_cpu_seconds(all_policies) for _ in range(3)), "s", 3.0)]
    myopic = Myopic(compiled=True) if find_spec("numba") else Myopic(compiled=False)
    _served(myopic, h2m2_trace(0))  # the compiled loop is loaded once
    total = 0.0
    for policy in (Greedy(), myopic):
        seconds = _cpu_seconds(lambda policy=policy: _served(policy, h2m2_trace(0, iterations=LONG)))  # type: ignore[misc]
        rows.append(_row(f"replay, {type(policy).__name__}, GPT3 on H2M2, batch 32", LONG / seconds, "it/s", None))
        total += seconds
    rows.append(_row(f"replay, {LONG:,} iterations, greedy and myopic together", total, "s", 60.0))
    chat = poisson_trace("chat", 500, rate=0.6, seed=1)
    steps = 0

    def arriving() -> None:
        nonlocal steps
        steps = len(replay(myopic, chat, H2M2_SYSTEM, LLAMA2_70B, batch_limit=128).rows)

    seconds = min(_cpu_seconds(arriving) for _ in range(3))
    rows.append(_row("replay, Myopic, Llama2-70B on H2M2, chat arrivals with prefill", steps / seconds, "it/s", None))
    h2m2, documents = h2m2_trace(0), poisson_trace("long-document", 24, seed=0)
    for policy, trace, llm, target in (
        (Greedy(), h2m2, GPT3_175B, None),
        (LookAhead(), h2m2, GPT3_175B, None),
        (Shortlist(), h2m2, GPT3_175B, 100.0),
        (Shortlist(), documents, LLAMA3_1_70B, 100.0),
    ):
        name = f"a decision of {type(policy).__name__}, {llm.name} on H2M2, one iteration at a time, tables included, mean"
        rows.append(_row(name, _decision(policy, trace, llm) * 1e6, "us", target))
    return rows


def _decision(policy: Policy, trace: Trace, llm: LLMConfig) -> float:
    """Mean seconds of a decision after the first one, by the clock: each at the best of three replays, which decide the same."""
    found = [replay(policy, trace, H2M2_SYSTEM, llm, batch_limit=32, prefill=False, window=1) for _ in range(3)]
    return float(np.min([run.rows["decide_runtime_s"].iloc[1:] for run in found], axis=0).mean())


def _served(policy: Policy, trace: Trace, system: Any = H2M2_SYSTEM) -> None:
    found = replay(policy, trace, system, GPT3_175B, batch_limit=32, prefill=False)
    if found.stopped:
        raise RuntimeError(found.stopped)


def _cpu_seconds(work: Any) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": None if target is None else value <= target}


if __name__ == "__main__":
    for row in main():
        print(row)
