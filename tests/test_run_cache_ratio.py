"""Ratios of keys and values to activations that are run: what is predicted and chosen, and what blocks make of it."""

import sys
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse.cli import main as memsplit
from memsplit.dse.runtime import CachePlan, LayerTimes, TransferKV
from memsplit.models import CacheRatioPlan
from memsplit.solvers.cache_ratio import EnumerationRatio
from memsplit.studies import run_cache_ratio
from memsplit.studies._run_plans import GENERATED, TINY, Case, Settings
from memsplit.studies.run_cache_ratio import executed, measured_problem, ratio_rows, shares_of

ROUNDING = 1e-9
"""Relative: the same few sums and products in another order."""

NEAR = 2e-4
"""Relative: within which of its bound the solver calls its plan optimal."""

BYTES = (1024, 512)
"""Of a token as keys and values, and as activations: multi-head attention."""

seconds = st.floats(1e-4, 1).map(lambda value: round(value, 4))


@st.composite
def layer_times(draw: st.DrawFn) -> LayerTimes:
    drawn = {name: draw(seconds) for name in ("kv", "act", "recompute", "compute", "weights", "outside", "assemble")}
    return LayerTimes(**drawn, first=0.0, layers=draw(st.integers(2, 5)), context=60)


@given(times=layer_times(), weights=st.sampled_from(["gpu", "host"]), batch=st.integers(1, 5))
def test_keys_and_values_only_take_what_their_transfer_takes(times, weights, batch):
    """The same layers by HybridServe's problem and by KVPR's template: they differ only in putting blocks together."""
    problem = measured_problem(times, batch=batch, tokens=63, weights=weights, token_bytes=BYTES)
    priced = problem.evaluate(CacheRatioPlan(kv_host=batch * 63)).latency
    moved = replace(times, compute=times.compute + times.assemble)
    assert priced == pytest.approx(moved.step(TransferKV(weights=weights), 63), rel=ROUNDING)


@given(times=layer_times(), weights=st.sampled_from(["gpu", "host"]), device_share=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=25, deadline=None)
def test_each_share_has_the_fastest_placement(times, weights, device_share):
    """Against every way to place as many activations; the fastest of all shares is the problem's optimum."""
    problem = measured_problem(times, batch=2, tokens=12, weights=weights, token_bytes=BYTES, device_share=device_share)
    plans = shares_of(problem, problem.blocks + 1)
    assert [plan.act_gpu + plan.act_host for plan in plans] == list(range(problem.blocks + 1))
    best = problem.evaluate(EnumerationRatio().solve(problem).unwrap()).latency
    assert min(problem.evaluate(plan).latency for plan in plans) == pytest.approx(best, rel=ROUNDING)
    for plan in plans[:: max(1, problem.blocks // 4)]:
        assert problem.evaluate(plan).fits
        act = plan.act_gpu + plan.act_host
        others = [
            CacheRatioPlan(act_gpu=near, act_host=act - near, kv_gpu=kv, kv_host=problem.blocks - act - kv)
            for near in range(act + 1)
            for kv in range(problem.blocks - act + 1)
            if problem.fitting(kv, near, problem.blocks - act - kv, act - near)
        ]
        fastest = min(problem.evaluate(other).latency for other in others)
        assert problem.evaluate(plan).latency == pytest.approx(fastest, rel=ROUNDING)


@given(share=st.floats(0, 1), batch=st.integers(1, 6), context=st.integers(1, 100))
def test_blocks_hold_all_tokens_in_about_the_planned_share(share, batch, context):
    """A plan of tokens, run in blocks of 16: as many tokens, and a share that is off by a block in each request at most."""
    tokens = context + GENERATED // 2
    act = round(share * batch * tokens)
    plan = CachePlan(blocks=CacheRatioPlan(kv_host=batch * tokens - act, act_host=act))
    held = executed(plan, batch=batch, context=context, tokens=tokens)
    assert held.blocks == batch * tokens
    assert (held.kv_gpu, held.act_gpu) == (0, 0)
    # Each request has its share in whole blocks, and which of them is the partly filled one is not chosen.
    assert abs(held.act_host - act) <= batch * 2 * 16


def test_plans_of_whole_blocks_are_held_as_planned():
    held = executed(CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_host=1)), batch=2, context=32 - GENERATED + 1, tokens=26)
    assert held == CacheRatioPlan(kv_gpu=2 * 26 - 26, act_host=26)


class Layers:
    """A runtime of given times, which measures nothing."""

    llm = TINY

    def __init__(self, times: LayerTimes) -> None:
        self.times = times

    def layer_times(self, batch: int, context: int, *, weights: str, repeats: int) -> LayerTimes:
        return self.times


def rows_of(times: LayerTimes, monkeypatch: pytest.MonkeyPatch, *, device_share: float = 0.0, points: int = 9) -> list[dict[str, Any]]:
    def not_measured(case: Case, plans: list[CachePlan]) -> list[dict[str, Any]]:
        return [{"measured_s": 1.0, "spread_s": 0.0, "tokens_equal": True, "peak_device_GB": 1.0} for _ in plans]

    monkeypatch.setattr(run_cache_ratio, "measured", not_measured)
    given = {"device": "cpu", "llms": (TINY,), "batches": (8,), "contexts": (160,), "points": points, "runs": 3, "dtype": "float32"}
    case = Case(runtime=Layers(times), settings=Settings(**given, link=None, threads=1, sheet=None, seed=0), batch=8, context=160)
    return ratio_rows(case, weights="host", device_share=device_share)


TIMES = LayerTimes(kv=1.0, act=0.5, recompute=0.6, compute=0.1, weights=0.1, first=0.05, outside=0.02, layers=2, context=160, assemble=0.05)


@pytest.mark.parametrize("device_share", [0.0, 0.25])
def test_the_choice_is_predicted_no_slower_than_the_sweep(monkeypatch, device_share):
    """But for blocks: the choice is made in tokens, so that it may be off by the time of a block in each of the eight requests."""
    rows = rows_of(TIMES, monkeypatch, device_share=device_share)
    (chosen,) = [row for row in rows if row["chosen"]]
    block = 8 * 16 / (8 * 160) * TIMES.kv * TIMES.layers
    assert chosen["predicted_s"] <= min(row["predicted_s"] for row in rows) * (1 + NEAR) + block
    assert 0 < chosen["act_share"] < 1
    shares = [row["act_share"] for row in rows]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert sum(row["swept"] for row in rows) == 9
    on_device = rows[0]["kv_device_tokens"]
    assert (on_device > 0) == (device_share > 0)


def test_a_choice_that_the_sweep_has_is_run_once(monkeypatch):
    """Recomputing nothing is best where the computation alone takes longer than all transfers."""
    rows = rows_of(replace(TIMES, compute=2.0), monkeypatch)
    assert [row["act_share"] for row in rows if row["chosen"]] == [0.0]
    assert len(rows) == 9


def test_the_quick_study_runs_every_share_with_the_same_tokens(tmp_path):
    pytest.importorskip("torch", reason="needs memsplit[runtime]")
    out = tmp_path / "a.csv"
    assert memsplit(["study", "run_cache_ratio", "--quick", "--device-share", "0.2", "--machine", "a100_pcie4", "--out", str(out)]) == 0
    frame = pd.read_csv(out)
    needed = ["device", "llm", "batch", "context", "act_share", "predicted_s", "measured_s", "spread_s", "chosen", "best"]
    assert set(needed) <= set(frame)
    assert frame["tokens_equal"].all()
    assert frame["act_share"].iloc[[0, -1]].tolist() == [0, 1]
    assert frame[["chosen", "best", "predicted_best"]].sum().tolist() == [1, 1, 1]
    assert (frame["kv_device_tokens"] + frame["act_device_tokens"] > 0).all()
    held = frame[[f"{form}_{place}_tokens" for form in ("kv", "act") for place in ("device", "host")]].sum(axis=1)
    assert (held == frame["batch"] * (frame["context"] + GENERATED // 2)).all()
    assert (frame["sheet_s"] > 0).all()
    assert out.with_suffix(".png").stat().st_size > 1000


def test_without_pytorch_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert memsplit(["study", "run_cache_ratio", "--quick", "--out", str(tmp_path / "a.csv")]) == 2
    assert "pip install 'memsplit[runtime]'" in capsys.readouterr().err


def test_a_single_layer_is_refused(tmp_path, capsys):
    """Nothing arrives while it is computed: the formula of the ratio, the slower of link and GPU, would be half of what it takes."""
    pytest.importorskip("torch", reason="needs memsplit[runtime]")
    assert memsplit(["study", "run_cache_ratio", "--quick", "--layers", "1", "--out", str(tmp_path / "a.csv")]) == 2
    error = capsys.readouterr().err
    assert "tiny test LLM: a cache ratio needs at least 2 layers, not 1" in error
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match="at least 2 layers"):
        measured_problem(replace(TIMES, layers=1), batch=1, tokens=9, weights="gpu", token_bytes=BYTES)


def test_a_share_is_from_0_to_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        memsplit(["study", "run_cache_ratio", "--device-share", "2", "--out", str(tmp_path / "a.csv")])
    assert stopped.value.code == 2
    assert "must be from 0 to 1, not 2" in capsys.readouterr().err
