"""Recompute splits that are run: what is predicted and chosen, and the study."""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_runs import Scripted, needs_torch, outcomes_of_any, scripted_case

from memsplit.dse.cli import main as memsplit
from memsplit.dse.runtime import LayerTimes, SplitKV, TransferKV
from memsplit.models.presets import SYSTEMS
from memsplit.studies import _published_measured, _run_plans, run_recompute_split
from memsplit.studies._run_plans import GENERATED
from memsplit.studies._run_verdicts import verdicts
from memsplit.studies.run_recompute_split import chosen_split, measured_problem, split_rows

ROUNDING = 1e-9
"""Relative: the same few sums and products in another order."""

QUICK = ["study", "run_recompute_split", "--quick"]

seconds = st.floats(1e-4, 1).map(lambda value: round(value, 4))


@st.composite
def layer_times(draw: st.DrawFn) -> LayerTimes:
    drawn = {name: draw(seconds) for name in ("kv", "act", "recompute", "compute", "weights", "outside")}
    return LayerTimes(**drawn, first=drawn["weights"] * draw(st.floats(0, 1)), layers=draw(st.integers(1, 5)), context=60)


ways = {
    "times": layer_times(),
    "template": st.sampled_from(["staged", "chunked", "fluid"]),
    "weights": st.sampled_from(["gpu", "host"]),
    "batch": st.integers(1, 9),
}


# What is predicted and chosen


@given(**ways, split=st.integers(1, 60))
def test_the_problem_of_measured_layers_prices_a_split_as_the_layers_do(times, template, weights, batch, split):
    problem = measured_problem(times, batch=batch, tokens=63, most=60, template=template, chunks=3, weights=weights)
    priced = sum(layer.layers * float(problem.layer_time(index, split)) for index, layer in enumerate(problem.layers))
    # A single layer has nothing to hide its computation behind, whatever the split: the problem leaves that constant out.
    alone = times.compute if times.layers == 1 else 0.0
    plan = SplitKV(split=split, template=template, chunks=3, weights=weights)
    assert priced + alone == pytest.approx(times.step(plan, 63), rel=ROUNDING)


@given(**ways)
@settings(max_examples=40)
def test_no_split_is_predicted_faster_than_the_chosen_one(times, template, weights, batch):
    """Against all splits, priced by the measured layers themselves."""
    problem = measured_problem(times, batch=batch, tokens=63, most=60, template=template, chunks=3, weights=weights)
    plans = [SplitKV(split=split, template=template, chunks=3, weights=weights) for split in range(1, 61)]
    # Without a split the runtime has no barrier, which is faster where weights are streamed in parts: the problem's own price counts.
    none = sum(layer.layers * float(problem.layer_time(index, 0)) for index, layer in enumerate(problem.layers))
    alone = times.compute if times.layers == 1 else 0.0
    steps = [none, *(times.step(plan, 63) - alone for plan in plans)]
    assert steps[chosen_split(problem)] <= min(steps) * (1 + ROUNDING)


def test_kvprs_balance_is_chosen():
    """1 / (1 + rho) of the tokens, of what is held in the middle of a run."""
    times = LayerTimes(kv=1, act=0.5, recompute=0.25, compute=0.0, weights=0, first=0, outside=0, layers=4, context=1000)
    problem = measured_problem(times, batch=2, tokens=1000, most=1000, template="staged", chunks=1, weights="gpu")
    assert chosen_split(problem) == 800
    assert chosen_split(replace(problem, most=300)) == 300


# Bad input


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert memsplit([*QUICK, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_without_pytorch_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'memsplit[runtime]'" in sentence(capsys, "--out", str(tmp_path / "a.csv"))


@needs_torch
def test_without_cuda_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pytest.importorskip("torch").cuda, "is_available", lambda: False)
    assert "no CUDA device" in sentence(capsys, "--device", "cuda", "--out", str(tmp_path / "a.csv"))


@needs_torch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--link-GBps", "1"], "a link of its own"),
        (["--link-GBps", "0"], "bandwidth"),
        (["--runs", "2"], "--runs must be at least 3, not 2"),
        (["--llm", "opt-9b"], "opt-9b"),
        (["--contexts", "99999999999"], "--contexts must be at most 4194304, not 99999999999"),
        (["--points", "100000000000"], "--points must be at most 1000"),
        (["--machine", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(tmp_path, capsys, arguments, message):
    assert message in sentence(capsys, *arguments, "--out", str(tmp_path / "a.csv"))


@needs_torch
def test_a_data_sheet_of_another_machine_is_warned_of(tmp_path, monkeypatch, capsys):
    other = replace(SYSTEMS["a100_pcie4"], name="measured: Example CPU, 96 cores")
    monkeypatch.setattr(_run_plans, "system_named", lambda name: other)
    monkeypatch.setattr(run_recompute_split, "split_rows", outcomes_of_any(ValueError("stop here")))
    memsplit([*QUICK, "--machine", "example.toml", "--out", str(tmp_path / "a.csv")])
    assert "warning: the data sheet was measured on another machine, 'Example CPU, 96 cores'" in capsys.readouterr().err


# The study


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[pd.DataFrame, Path]:
    pytest.importorskip("torch", reason="needs memsplit[runtime]")
    out = tmp_path_factory.mktemp("study") / "a.csv"
    assert memsplit([*QUICK, "--machine", "a100_pcie4", "--out", str(out)]) == 0
    return pd.read_csv(out), out


def test_the_quick_study_runs_every_split_with_the_same_tokens(quick):
    frame, out = quick
    needed = ["device", "llm", "batch", "context", "split", "predicted_s", "measured_s", "spread_s", "chosen", "best"]
    assert set(needed) <= set(frame)
    assert frame["tokens_equal"].all()
    assert frame["split"].is_monotonic_increasing
    assert {0, int(frame["context"].iloc[0])} <= set(frame["split"])
    assert frame[["chosen", "best", "predicted_best"]].sum().tolist() == [1, 1, 1]
    assert (frame[["predicted_s", "measured_s", "peak_device_GB"]] > 0).all(axis=None)
    assert out.with_suffix(".png").stat().st_size > 1000


def test_rows_say_where_and_when_they_were_measured(quick):
    frame, _ = quick
    first = frame.iloc[0]
    assert (first["device"], first["link_kind"], first["runs"], first["seed"]) == ("cpu", "emulated", 3, 0)
    assert first["torch"] == _run_plans._version("torch")
    assert all(frame[name].notna().all() for name in ("date", "version", "device_name", "software"))
    # On an emulated link no more than what was asked for, but for the clock's steps; other work can only slow it down.
    assert 0 < first["link_GBps"] < 1.01


def test_a_data_sheet_predicts_too(quick):
    frame, _ = quick
    assert (frame["sheet_s"] > 0).all()
    assert (frame["sheet_s"] < frame["predicted_s"]).all()  # an A100 is faster than a core behind 1 GB/s


@needs_torch
def test_predictions_are_those_of_the_layers_that_were_measured(monkeypatch):
    """Without running anything: what the rows say is the closed form of the times they were given."""
    times = LayerTimes(kv=1, act=0.5, recompute=0.4, compute=0.1, weights=0.3, first=0.1, outside=0.2, layers=2, context=8)
    runtime = Scripted({}, {})
    runtime.layer_times = lambda batch, context, weights, repeats: times  # type: ignore[attr-defined]
    monkeypatch.setattr(
        run_recompute_split,
        "measured",
        lambda case, plans: [{"measured_s": 1.0, "spread_s": 0.0, "tokens_equal": True, "peak_device_GB": 1.0} for _ in plans],
    )
    rows = split_rows(scripted_case(runtime, points=3), template="staged", chunks=1, weights="gpu")
    tokens = 8 + GENERATED // 2
    assert [row["split"] for row in rows if row["swept"]] == [0, 4, 8]
    for row in rows:
        plan = SplitKV(split=row["split"]) if row["split"] else TransferKV()
        assert row["predicted_s"] == times.step(plan, tokens)
        assert row["replayed_s"] == times.replay(plan, tokens)
    assert min(rows, key=lambda row: row["predicted_s"])["chosen"]


def test_on_cuda_plans_agree_to_rounding_and_the_link_is_real(tmp_path):
    torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    out = tmp_path / "a.csv"
    assert memsplit([*QUICK, "--device", "cuda", "--dtype", "float32", "--out", str(out)]) == 0
    frame = pd.read_csv(out)
    assert frame["tokens_stable"].all()
    assert (frame["logits_off"] <= frame["rounding"]).all()
    assert set(frame["link_kind"]) == {"real"}
    assert frame["driver"].notna().all()
    assert (frame["runs"] >= 5).all()


@needs_torch
def test_a_table_of_the_study_has_what_is_shown(quick, tmp_path):
    """All columns; but that it is not of a GPU."""
    frame, _ = quick
    frame.to_csv(tmp_path / "one.csv", index=False)
    assert _published_measured.measured_runs(tmp_path)[1] == [f"one.csv ({len(frame)} of {len(frame)} rows)"]
    frame.assign(device="cuda", link_kind="real", runs=5, driver="1", llm="x").to_csv(tmp_path / "one.csv", index=False)
    assert len(_published_measured.measured_runs(tmp_path)[0]) == len(verdicts(frame)) == 1
