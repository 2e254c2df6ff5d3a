"""Our own measurements beside published numbers: what is shown, and what is not."""

import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scripted_runs import rows_of_times

from memsplit.studies import _published_measured
from memsplit.studies._run_plans import TINY

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
    rows = own_rows()
    rows.to_csv(tmp_path / "example.csv", index=False)
    found, left = _published_measured.measured_runs(tmp_path)
    (row,) = found.to_dict("records")
    assert left == []
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
    rows.assign(chosen=False).to_csv(tmp_path / "example.csv", index=False)
    with pytest.raises(ValueError, match="one chosen"):
        _published_measured.measured_runs(tmp_path)


def own_rows(**changes: Any) -> pd.DataFrame:
    said = {"device": "cuda", "link_kind": "real", "driver": "555.1", "torch": "2.9", "date": "2026-01-02", "runs": 5}
    said |= {"device_name": "Example GPU"} | changes
    return rows_of_times((4.0, 4.0, 0.1), (2.0, 3.0, 0.1), (3.0, 2.0, 0.1), chosen=1, **said)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cpu"},
        {"link_kind": "emulated"},
        {"runs": 4},
        {"driver": None},
        {"llm": TINY.name},
        {"tokens_stable": False},
        {"logits_off": 5.0},
        {"logits_off": None},
    ],
    ids=lambda one: next(iter(one)),
)
def test_only_a_gpu_and_enough_runs_are_shown_beside_kvpr(tmp_path, capsys, changes):
    own_rows(**changes).to_csv(tmp_path / "other.csv", index=False)
    _published_measured.show_measured(PUBLISHED, tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("Left out, ")
    assert said.endswith("other.csv (3 of 3 rows).\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: rows.assign(measured_s="fast"), "measured_s must be seconds above 0"),
        (lambda rows: rows.assign(measured_s=0.0), "measured_s must be seconds above 0"),
        (lambda rows: rows.assign(spread_s=-1.0), "spread_s must be seconds"),
        (lambda rows: rows.drop(columns="split"), "neither a column split nor act_share"),
        (lambda rows: rows.assign(device_name=None, chosen=False), "one chosen"),
    ],
)
def test_damaged_tables_are_named(tmp_path, damage, said):
    damage(own_rows()).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(ValueError, match=rf"bad\.csv: .*{said}"):
        _published_measured.measured_runs(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x00", b"a,b\n1,2,3\n"])
def test_what_is_no_table_is_named(tmp_path, content):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.csv"):
        _published_measured.measured_runs(tmp_path)


def test_own_measurements_are_packaged():
    package = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {f"{_published_measured.MEASURED.name}/*.{kind}" for kind in ("csv", "json")} <= set(package["memsplit.studies"])
