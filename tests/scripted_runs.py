"""Runs and rows as a test wants them, for the studies that run plans."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memsplit.dse.runtime import SplitKV
from memsplit.studies import _run_plans
from memsplit.studies._run_plans import TINY, Case, Settings, case_name
from memsplit.studies._run_verdicts import judged

needs_torch = pytest.mark.skipif(not _run_plans._version("torch"), reason="needs memsplit[runtime]")


class Scripted:
    """A runtime whose runs take what they are told: of each plan the steps of one run after the other."""

    def __init__(self, steps: dict[int, list[float]], tokens: dict[int, int]) -> None:
        self.steps, self.tokens, self.log, self.llm = {split: list(listed) for split, listed in steps.items()}, tokens, [], TINY

    def random_prompts(self, batch: int, tokens: int, *, seed: int) -> Any:
        return np.zeros((batch, tokens), dtype=np.int64)

    def generate(self, prompts: Any, generated: int, plan: SplitKV, *, logits: bool = False) -> Any:
        self.log.append(plan.split)
        step = self.steps[plan.split].pop(0)
        slow_first = (100.0, step, 0.5 * step, step, 2 * step, step)
        found = scores(np.full((2, generated), self.tokens[plan.split]))
        if not logits:
            found.logits = None
        return SimpleNamespace(**vars(found), step_seconds=slow_first, peak_device_bytes=10**9 * (100 if logits else plan.split))


def scores(tokens: np.ndarray, lead: float = 1.0, words: int = 10) -> Any:
    """Tokens [requests, generated] with logits of which each leads all others, which are 0, by so much."""
    logits = np.zeros((*tokens.shape, words), dtype=np.float32)
    np.put_along_axis(logits, tokens[..., None], lead, axis=-1)
    return SimpleNamespace(tokens=tokens, logits=logits)


def scripted_case(runtime: Any, *, runs: int = 3, seed: int = 0, **changes: Any) -> Case:
    given: dict[str, Any] = {"device": "cpu", "llms": (TINY,), "batches": (2,), "contexts": (8,), "points": 2, "runs": runs}
    given |= {"dtype": "float32", "link": None, "threads": 1, "sheet": None, "seed": seed} | changes
    return Case(runtime=runtime, settings=Settings(**given), batch=2, context=8)


def rows_of_times(*times: tuple[float, float, float], chosen: int, **common: Any) -> pd.DataFrame:
    """Rows of (predicted, measured, spread), the first of which is the baseline."""
    given = {"device_name": "a CPU", "llm": "x", "layers": 2, "dtype": "float32", "template": "staged", "weights": "gpu"}
    given |= {
        "batch": 1,
        "context": 9,
        "tokens_equal": True,
        "tokens_stable": True,
        "drift_pct": 1.0,
        "logits_off": 0.0,
        "rounding": 0.01,
        "token_lead": None,
    } | common
    rows = [
        given | {"split": 3 * at, "predicted_s": a, "measured_s": b, "spread_s": c, "chosen": at == chosen}
        for at, (a, b, c) in enumerate(times)
    ]
    return pd.DataFrame(judged(rows))


def outcomes(*listed: Any) -> Any:
    """Rows of one case after the other, or what they raise."""
    turn = iter(listed)

    def rows_of(case: Case) -> list[dict[str, Any]]:
        one = next(turn)
        if isinstance(one, BaseException):
            raise one
        return [row | {"batch": case.batch, "context": case.context} for row in one.to_dict("records")]

    return rows_of


def names(settings: Settings) -> list[str]:
    return [case_name(*case) for case in settings.cases]


def outcomes_of_any(*listed: Any) -> Any:
    rows_of = outcomes(*listed)
    return lambda case, **_: rows_of(case)
