"""Rows of swept tables are priced and explained again, from their own design columns and the score beside them."""

import json

import numpy as np
import pandas as pd
import pytest

from memsplit.dse import Grid, MappingSweep, RatioSweep, SplitSweep, StepSweep, explain_row, rerun, sweep, write_csv
from memsplit.dse.cli import main
from memsplit.models import Workload
from memsplit.models.presets import A100_SYSTEM, H2M2_SYSTEM, LLAMA2_70B, OPT_13B

MAPPED = Workload(llm=LLAMA2_70B, batch=1, context=4096)
OFFLOADED = Workload(llm=OPT_13B, batch=1, context=512, weight_bits=16, kv_bits=16, activation_bits=16)
SOLVED = {
    "mapping": (MappingSweep(system=H2M2_SYSTEM, workload=MAPPED), {"HBM_capacity_GB": [48.0, 96.0], "batch": [8, 900]}),
    "ratio": (RatioSweep(system=A100_SYSTEM, workload=OFFLOADED, buffered_requests=4), {"host_capacity_GB": [20, 300], "batch": [8, 64]}),
    "split": (SplitSweep(system=A100_SYSTEM, workload=OFFLOADED, most=300), {"HBM_capacity_GB": [20, 80], "context": [128, 1024]}),
}
ESTIMATE = StepSweep(system=A100_SYSTEM, workload=OFFLOADED, tier="HBM")
each_solved = pytest.mark.parametrize(("score", "axes"), SOLVED.values(), ids=SOLVED)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@each_solved
def test_a_row_is_priced_again_bit_for_bit(score, axes, suffix, tmp_path):
    frame = sweep(Grid(axes), score)
    path = write_csv(tmp_path / f"swept.{suffix}", frame)
    for row in range(len(frame)):
        again = rerun(path, row)
        assert set(frame.columns) - set(axes) == set(again["column"])
        assert again["same"].all()
        for _, line in again.iterrows():
            empty = pd.isna(line["written"]) and (line["again"] == "" or np.isnan(line["again"]))  # a CSV has no other texts of no letters
            assert empty or line["written"] == line["again"], line["column"]


@each_solved
def test_a_row_is_explained_at_the_latency_that_was_swept(score, axes, tmp_path):
    """And one in which nothing fits, by what would help."""
    frame = sweep(Grid(axes), score)
    path = write_csv(tmp_path / "swept.csv", frame)
    assert set(frame["feasible"]) == {True, False}
    for row in (int(np.flatnonzero(frame["feasible"])[0]), int(np.flatnonzero(~frame["feasible"])[0])):
        (explanation,) = explain_row(path, row)
        if frame["feasible"][row]:
            assert explanation.result.objective == pytest.approx(frame["latency_s"][row], rel=2e-4)  # LpRatio's gap
        else:
            assert explanation.result.plan is None
            assert explanation.levers


def test_what_is_no_more_the_same_is_said(tmp_path):
    score, axes = SOLVED["mapping"]
    frame = sweep(Grid(axes), score)
    row = int(np.flatnonzero(frame["feasible"])[0])
    frame.loc[row, "latency_s"] *= 1 + 1e-15 * 2
    frame.loc[row, "energy_J"] = np.nan
    frame.loc[row, "reason"] = "slow"
    again = rerun(write_csv(tmp_path / "swept.csv", frame), row)
    assert list(again) == ["column", "written", "again", "same"]
    assert set(again["column"][~again["same"]]) == {"latency_s", "energy_J", "reason"}


def test_a_table_that_lost_a_column_of_its_designs_is_refused(tmp_path, capsys):
    """Without it the machine of the score would be priced; a file that does not say which columns it had is priced as it is."""
    score, axes = SOLVED["mapping"]
    frame = sweep(Grid(axes), score)
    assert frame.attrs["settings"]["columns"] == ["HBM_capacity_GB", "batch"]
    path = write_csv(tmp_path / "swept.csv", frame)
    renamed = pd.read_csv(path).rename(columns={"HBM_capacity_GB": "capacity"})
    for changed, lost in ((renamed, "HBM_capacity_GB"), (pd.read_csv(path).drop(columns="batch"), "batch")):
        changed.to_csv(path, index=False)
        for command in ("rerun", "explain"):
            assert main([command, str(path)]) == 2
            printed = capsys.readouterr()
            assert f"has no column '{lost}', which its designs were swept with" in printed.err
            assert printed.err.count("\n") == 1
    beside = path.with_suffix(".json")
    data = json.loads(beside.read_text())
    del data["settings"]["columns"]
    beside.write_text(json.dumps(data))
    assert rerun(path)["again"].iloc[0] == score({"HBM_capacity_GB": [48.0]})["latency_s"][0]


def test_an_estimate_has_no_plan_to_explain(tmp_path, capsys):
    path = write_csv(tmp_path / "swept.csv", sweep(Grid({"batch": [1, 2]}), ESTIMATE))
    assert rerun(path, 1)["written"].iloc[0] == rerun(path, 1)["again"].iloc[0]
    assert main(["explain", str(path)]) == 2
    assert "StepSweep has no plan to explain" in capsys.readouterr().err


def test_a_users_own_score_is_not_run(tmp_path, capsys):
    """The JSON holds its name only."""
    path = write_csv(tmp_path / "swept.csv", sweep(Grid({"batch": [1, 2]}), their_own))
    assert main(["explain", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'their_own'" in printed.err
    assert printed.err.count("\n") == 1


def their_own(columns):
    return {"latency_s": columns["batch"] * 1.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "[" * 100_000,
        lambda data: json.dumps(data | {"settings": None}),
        lambda data: json.dumps(data | {"settings": {"score": 3}}),
        lambda data: json.dumps(data).replace('"capacity": 96000000000.0', '"capacity": 1' + "0" * 400),
        lambda data: json.dumps(data).replace('"tile": 128', '"tile": "x"'),
        lambda data: json.dumps(data).replace('"llm": {', '"llm": null, "other": {'),
    ],
)
def test_a_damaged_json_is_one_sentence(damage, tmp_path, capsys):
    score, axes = SOLVED["mapping"]
    path = write_csv(tmp_path / "swept.csv", sweep(Grid(axes), score))
    beside = path.with_suffix(".json")
    beside.write_text(damage(json.loads(beside.read_text())))
    for command in ("rerun", "explain"):
        assert main([command, str(path)]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1), printed.err
