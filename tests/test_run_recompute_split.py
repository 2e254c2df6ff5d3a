"""Recompute splits that are run: what is predicted and chosen, how runs are judged, and what happens to cases that cannot be run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse import INTERRUPTED
from memsplit.dse.cli import main as memsplit
from memsplit.dse.runtime import LayerTimes, SplitKV, TransferKV
from memsplit.models.presets import SYSTEMS
from memsplit.studies import _published_measured, _run_plans, run_recompute_split
from memsplit.studies._run_plans import GENERATED, TINY, Case, Settings, Verdict, all_cases, judged, meaning, measured, table_of, verdicts
from memsplit.studies.run_recompute_split import chosen_split, measured_problem, split_rows

ROUNDING = 1e-9
"""Relative: the same few sums and products in another order."""

QUICK = ["study", "run_recompute_split", "--quick"]

needs_torch = pytest.mark.skipif(not _run_plans._version("torch"), reason="needs memsplit[runtime]")

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
    alone = times.compute + times.outside if times.layers == 1 else 0.0
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
    alone = times.compute + times.outside if times.layers == 1 else 0.0
    steps = [none, *(times.step(plan, 63) - alone for plan in plans)]
    assert steps[chosen_split(problem)] <= min(steps) * (1 + ROUNDING)


def test_kvprs_balance_is_chosen():
    """1 / (1 + rho) of the tokens, of what is held in the middle of a run."""
    times = LayerTimes(kv=1, act=0.5, recompute=0.25, compute=0.0, weights=0, first=0, outside=0, layers=4, context=1000)
    problem = measured_problem(times, batch=2, tokens=1000, most=1000, template="staged", chunks=1, weights="gpu")
    assert chosen_split(problem) == 800
    assert chosen_split(replace(problem, most=300)) == 300


# How runs are judged


class Scripted:
    """A runtime whose runs take what they are told: of each plan the steps of one run after the other."""

    def __init__(self, steps: dict[int, list[float]], tokens: dict[int, int]) -> None:
        self.steps, self.tokens, self.log, self.llm = {split: list(listed) for split, listed in steps.items()}, tokens, [], TINY

    def random_prompts(self, batch: int, tokens: int, *, seed: int) -> Any:
        return np.zeros((batch, tokens), dtype=np.int64)

    def generate(self, prompts: Any, generated: int, plan: SplitKV) -> Any:
        self.log.append(plan.split)
        step = self.steps[plan.split].pop(0)
        slow_first = (100.0, step, 0.5 * step, step, 2 * step, step)
        return SimpleNamespace(
            tokens=np.full((2, generated), self.tokens[plan.split]), step_seconds=slow_first, peak_device_bytes=10**9 * plan.split
        )


def scripted_case(runtime: Any, *, runs: int = 3, seed: int = 0, **changes: Any) -> Case:
    given: dict[str, Any] = {"device": "cpu", "llms": (TINY,), "batches": (2,), "contexts": (8,), "points": 2, "runs": runs}
    given |= {"dtype": "float32", "link": None, "threads": 1, "sheet": None, "seed": seed} | changes
    return Case(runtime=runtime, settings=Settings(**given), batch=2, context=8)


def test_runs_are_medians_of_medians_with_their_interquartile_range():
    """The warm-up and each run's first step do not count: 9 and 100 s appear nowhere."""
    runtime = Scripted({0: [9.0, 4.0, 1.0, 2.0, 8.0, 3.0], 5: [9.0, *[1.0] * 5]}, {0: 7, 5: 7})
    first, second = measured(scripted_case(runtime, runs=5), [SplitKV(split=0), SplitKV(split=5)])
    assert (first["measured_s"], first["spread_s"]) == (3.0, 2.0)  # of 1, 2, 3, 4, 8: the quartiles are 2 and 4
    assert (second["measured_s"], second["spread_s"], second["peak_device_GB"]) == (1.0, 0.0, 5.0)
    assert first["tokens_equal"]
    assert second["tokens_equal"]


def test_plans_are_run_in_rounds_of_random_order():
    def order(seed: int) -> list[list[int]]:
        runtime = Scripted({split: [1.0] * 9 for split in range(4)}, dict.fromkeys(range(4), 7))
        measured(scripted_case(runtime, runs=8, seed=seed), [SplitKV(split=split) for split in range(4)])
        return [runtime.log[at : at + 4] for at in range(0, 36, 4)]

    assert all(sorted(one) == [0, 1, 2, 3] for one in order(0))
    assert len(set(map(tuple, order(0)))) > 2
    assert order(0) == order(0) != order(1)


def test_other_tokens_are_seen():
    runtime = Scripted({0: [1.0] * 4, 5: [1.0] * 4}, {0: 7, 5: 8})
    rows = measured(scripted_case(runtime), [SplitKV(split=0), SplitKV(split=5)])
    assert [row["tokens_equal"] for row in rows] == [True, False]


def rows_of_times(*times: tuple[float, float, float], chosen: int, **common: Any) -> pd.DataFrame:
    """Rows of (predicted, measured, spread), the first of which is the baseline."""
    given = {"device_name": "a CPU", "llm": "x", "layers": 2, "dtype": "float32", "template": "staged", "weights": "gpu"}
    given |= {"batch": 1, "context": 9, "tokens_equal": True, "drift_pct": 1.0} | common
    rows = [
        given | {"split": 3 * at, "predicted_s": a, "measured_s": b, "spread_s": c, "chosen": at == chosen}
        for at, (a, b, c) in enumerate(times)
    ]
    return pd.DataFrame(judged(rows))


def test_regret_counts_beyond_the_spread_only():
    clear = Verdict.of(rows_of_times((4.0, 4.0, 0.1), (2.0, 2.5, 0.1), (3.0, 2.0, 0.1), chosen=1))
    assert (clear.regret, clear.tie, clear.cut) == (0.25, False, 1 - 2.5 / 4)
    assert (clear.best["split"], clear.foreseen["split"]) == (6, 3)
    for wide in ((0.5, 0.1), (0.1, 0.5)):
        tied = Verdict.of(rows_of_times((4.0, 4.0, 0.1), (2.0, 2.5, wide[0]), (3.0, 2.0, wide[1]), chosen=1))
        assert (tied.regret, tied.tie) == (0.25, True)
    right = Verdict.of(rows_of_times((4.0, 4.0, 0.0), (2.0, 2.5, 0.0), chosen=1))
    assert (right.regret, right.tie) == (0.0, True)


def test_errors_are_of_the_measured_time():
    frame = rows_of_times((4.0, 5.0, 0.1), (2.2, 2.0, 0.1), (3.0, 2.0, 0.1), chosen=1)
    assert frame["error_pct"].tolist() == pytest.approx([-20, 10, 50])
    assert Verdict.of(frame).error == pytest.approx(0.2)


def test_a_busy_machine_is_said():
    """Twice as slow after the runs as before: no prediction made before could be right."""
    times = LayerTimes(kv=1, act=0.5, recompute=0.4, compute=0.1, weights=0.3, first=0.1, outside=0.2, layers=2, context=8)
    runtime = SimpleNamespace(layer_times=lambda batch, context, repeats: replace(times, recompute=0.2, outside=9.0), llm=TINY)
    assert scripted_case(runtime).drift(times) == pytest.approx(1.0)
    for drift, said in ((100.0, True), (9.0, False)):
        frame = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1, drift_pct=drift)
        assert ("the machine was busy" in "\n".join(meaning(frame, "split", str, "full transfer"))) == said


def test_the_meaning_names_regret_ties_and_other_tokens():
    bad = rows_of_times((4.0, 4.0, 0.1), (2.0, 5.0, 0.1), chosen=1, tokens_equal=False)
    tied = rows_of_times((4.0, 4.0, 0.1), (2.0, 4.05, 0.1), chosen=1, context=10)
    text = "\n".join(meaning(pd.concat([bad, tied]), "split", str, "full transfer"))
    assert "Regret 25.0%;" in text
    assert "Regret 1.2%, a tie" in text
    assert "takes 25.0% more time than full transfer" in text
    assert "regret of the choice 25.0% at most, with 1 of 2 choices" in text
    assert "In 2 of 4 rows the tokens differ" in text
    assert "a defect" in text


# Cases that cannot be run, and Ctrl-C


def outcomes(*listed: Any) -> Any:
    """Rows of one case after the other, or what they raise."""
    turn = iter(listed)

    def rows_of(case: Case) -> list[dict[str, Any]]:
        one = next(turn)
        if isinstance(one, BaseException):
            raise one
        return [row | {"batch": case.batch, "context": case.context} for row in one.to_dict("records")]

    return rows_of


@needs_torch
def test_a_case_without_room_is_named_and_the_others_go_on(capsys):
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    skipped: list[str] = []
    given = scripted_case(None, batches=(2, 4), contexts=(8, 16)).settings
    room = outcomes(one, ValueError("the host needs 2 GB\nand has 1 GB; serve 3 prompts"), RuntimeError("CUDA out of memory"), one)
    found = list(all_cases(given, room, skipped))
    assert [rows[0]["batch"] * 100 + rows[0]["context"] for rows in found] == [208, 416]
    assert skipped == [
        "tiny test LLM, 2 layers, batch 2, context 16: the host needs 2 GB and has 1 GB; serve 3 prompts",
        "tiny test LLM, 2 layers, batch 4, context 8: memory ran out; serve fewer prompts",
    ]
    assert "skipped: tiny test LLM" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a defect"):
        list(all_cases(given, outcomes(RuntimeError("a defect")), skipped))


@needs_torch
def test_weights_without_room_skip_the_llm():
    large = replace(TINY, name="large", intermediate_size=2**20, num_hidden_layers=2**20)
    given = scripted_case(None, llms=(large, TINY)).settings
    skipped: list[str] = []
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    assert len(list(all_cases(given, outcomes(one), skipped))) == 1
    assert skipped[0].startswith("large, 1048576 layers: runtime: the weights alone: ")


@needs_torch
def test_nothing_that_can_be_run_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_recompute_split, "split_rows", outcomes_of_any(ValueError("no room")))
    assert memsplit([*QUICK, "--out", str(tmp_path / "a.csv")]) == 1
    assert "No case could be run" in capsys.readouterr().out
    assert not (tmp_path / "a.csv").exists()


def outcomes_of_any(*listed: Any) -> Any:
    rows_of = outcomes(*listed)
    return lambda case, **_: rows_of(case)


@needs_torch
def test_ctrl_c_keeps_finished_cases(tmp_path, monkeypatch):
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    monkeypatch.setattr(run_recompute_split, "split_rows", outcomes_of_any(one, KeyboardInterrupt()))
    assert memsplit([*QUICK, "--contexts", "8", "16", "--out", str(tmp_path / "a.csv")]) == INTERRUPTED
    assert pd.read_csv(tmp_path / "a.csv")["context"].tolist() == [8, 8]


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
        (["--llm", "opt-9b"], "opt-9b"),
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
    runtime.layer_times = lambda batch, context, repeats: times  # type: ignore[attr-defined]
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


def test_on_cuda_the_tokens_are_equal_and_the_link_is_real(tmp_path):
    torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    out = tmp_path / "a.csv"
    assert memsplit([*QUICK, "--device", "cuda", "--dtype", "float32", "--out", str(out)]) == 0
    frame = pd.read_csv(out)
    assert frame["tokens_equal"].all()
    assert set(frame["link_kind"]) == {"real"}
    assert frame["driver"].notna().all()
    assert (frame["runs"] >= 5).all()


# Beside published numbers


PUBLISHED = pd.DataFrame(
    [
        {"paper": "kvpr", "where": "abstract", "row": "best", "quantity": _published_measured.BESIDE[0], "unit": "%", "value": 35.8}
        | {"note": "OPT-6.7B"},
        {"paper": "flexgen", "where": "x", "row": "y", "quantity": "tokens", "unit": "1/s", "value": 1.0, "note": None},
    ]
)


def test_nothing_is_shown_where_nothing_was_measured(tmp_path, capsys):
    for folder in (tmp_path / "nowhere", tmp_path):
        _published_measured.show_measured(PUBLISHED, folder)
    assert capsys.readouterr().out == ""


def test_own_measurements_are_shown_beside_kvprs(tmp_path, capsys):
    said = {"driver": "555.1", "torch": "2.9", "date": "2026-01-02", "runs": 5, "device_name": "Example GPU"}
    rows = rows_of_times((4.0, 4.0, 0.1), (2.0, 3.0, 0.1), (3.0, 2.0, 0.1), chosen=1, **said)
    rows.to_csv(tmp_path / "example.csv", index=False)
    (row,) = _published_measured.measured_runs(tmp_path).to_dict("records")
    assert (row["device_name"], row["driver"], row["decision"], row["tie"]) == ("Example GPU", "555.1", "split 3", False)
    assert (row["latency_cut_pct"], row["regret_pct"]) == (25.0, 50.0)
    assert row["gain_pct"] == pytest.approx(100 / 3)
    _published_measured.show_measured(PUBLISHED, tmp_path)
    shown = capsys.readouterr().out
    assert "Our own measurements" in shown
    assert "KVPR, abstract, best: decode latency cut against HF Accelerate 35.8 % (OPT-6.7B)" in shown
    assert "flexgen" not in shown
    rows.drop(columns="driver").to_csv(tmp_path / "example.csv", index=False)
    with pytest.raises(ValueError, match="columns driver are missing"):
        _published_measured.measured_runs(tmp_path)


@needs_torch
def test_a_table_of_the_study_can_be_shown(quick, tmp_path):
    frame, _ = quick
    frame.to_csv(tmp_path / "one.csv", index=False)
    assert len(_published_measured.measured_runs(tmp_path)) == len(verdicts(frame)) == 1


@needs_torch
def test_a_table_is_written_with_what_was_skipped(tmp_path):
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    given = scripted_case(None, contexts=(8, 16)).settings
    frame, interrupted = table_of(SimpleNamespace(out=tmp_path / "a.csv"), given, outcomes(one, ValueError("no room")))
    assert not interrupted
    assert frame["runs"].tolist() == [3, 3]
    assert "context 16: no room" in (tmp_path / "a.json").read_text()
