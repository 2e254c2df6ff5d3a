"""The study of errors: its columns, its models on rows of a folder, and what it says of goals."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_measured_sets import FILES

from memsplit.dse import MeasuredSet, measured_sets, ranking
from memsplit.models import KernelTime
from memsplit.studies import fidelity

COLUMNS = [
    "device",
    "kernel",
    "variant",
    "model",
    "profile",
    "seed",
    "rows",
    "mape_pct",
    "median_pct",
    "p90_pct",
    "bias_pct",
    "below_bound",
]


def folder(path: Path) -> Path:
    """Products on an A100: thirty to fit on, ten to score on, by the shipped record and 5 % off."""
    random = np.random.default_rng(1)
    time = KernelTime.calibrated("gemm", "a100")
    for fold, number in (("calibration", 30), ("devtest", 10)):
        m, n, k = (random.choice([64, 256, 1024, 4096], number) for _ in range(3))
        seconds = time.predict(m=m, n=n, k=k).seconds * np.exp(0.05 * np.abs(random.standard_normal(number)))
        lines = [f"{a},{b},{c},bf16,{t},sglang/x" for a, b, c, t in zip(m, n, k, seconds, strict=True)]
        (path / fold).mkdir()
        (path / fold / "aic_gemm_a100_sxm.csv").write_text("\n".join(["m,n,k,dtype,measured_s,src", *lines]) + "\n")
    return path


def test_rows_that_come_with_memsplit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main(["--out", str(tmp_path / "f.csv")]) == 0
    frame = pd.read_csv(tmp_path / "f.csv")
    assert list(frame.columns[: len(COLUMNS)]) == COLUMNS
    assert set(frame["model"]) == {"datasheet", "shipped", "family"}
    errors = frame.pivot_table(index=["device", "kernel"], columns="model", values="mape_pct")
    assert (errors["shipped"] < errors["datasheet"]).all()
    assert (frame.loc[frame["model"] == "datasheet", "bias_pct"] < 0).all()  # a lower bound
    assert "So few rows say little" in capsys.readouterr().out


def test_all_models_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="trees need scikit-learn")
    assert fidelity.main(["--data", str(folder(tmp_path)), "--out", str(tmp_path / "f.csv")]) == 0
    frame = pd.read_csv(tmp_path / "f.csv")
    assert frame["model"].tolist() == ["datasheet", "naive_median", "roofline", "trees", "trees", "trees", "shipped"]
    assert frame.loc[frame["model"] == "trees", "seed"].tolist() == [0, 1, 2]
    assert (frame["rows"] == 10).all()
    shipped = frame.loc[frame["model"] == "shipped", "mape_pct"].item()
    assert shipped == frame.drop(frame.index[frame["model"] == "trees"])["mape_pct"].min()
    assert "gemm bf16 on A100-SXM-80GB" in capsys.readouterr().out
    first = (tmp_path / "f.csv").read_bytes()
    assert fidelity.main(["--data", str(tmp_path), "--out", str(tmp_path / "f.csv")]) == 0
    assert (tmp_path / "f.csv").read_bytes() == first


def test_a_folder_without_anything_to_score_is_refused(tmp_path: Path) -> None:
    for fold in ("calibration", "devtest"):
        (tmp_path / fold).mkdir()
        (tmp_path / fold / "notes.csv").write_text(FILES["notes.csv"])
    with pytest.raises(ValueError, match=r"nothing in .*devtest can be scored; put files of public measurements there"):
        fidelity.main(["--data", str(tmp_path), "--out", str(tmp_path / "f.csv")])


def test_sets_that_were_finished_before_ctrl_c_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = fidelity.rows_of, list[str]()

    def stopped(part: MeasuredSet, fitted: MeasuredSet | None, *, trees: bool = True) -> list[dict[str, Any]]:
        calls.append(part.device.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(part, fitted, trees=trees)

    monkeypatch.setattr(fidelity, "rows_of", stopped)
    assert fidelity.main(["--out", str(tmp_path / "f.csv")]) == 130
    assert set(pd.read_csv(tmp_path / "f.csv")["device"]) == {calls[0]}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("1 of ")
    assert lines[1].startswith("2 of ")
    assert lines[2] == "interrupted: 1 finished parts are kept"


def test_goals_are_met_or_not_and_few_rows_have_none() -> None:
    row = {"kernel": "gemm", "variant": "bf16", "device": "H100-SXM", "model": "shipped", "rows": 10, "mape_pct": 6.0, "median_pct": 4.0}
    frame = pd.DataFrame([row, row | {"mape_pct": 7.0}, row | {"rows": 4}, row | {"kernel": "stream"}, row | {"variant": "fp8"}])
    lines = fidelity.verdicts(frame).splitlines()
    assert [line.rsplit(";", 1)[-1].strip() for line in lines[:2]] == ["bar 6.5 / 4.5 met.", "bar 6.5 / 4.5 NOT met."]
    assert lines[2].endswith("on 4 rows, too few for a bar.")
    assert len(lines) == 3


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no CSVs in"):
        fidelity.main(["--data", str(tmp_path), "--out", str(tmp_path / "f.csv")])


def test_a_ranking_by_hand() -> None:
    assert ranking([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == (1.0, 0.0)
    tau, regret = ranking([1.0, 2.0, 4.0], [3.0, 2.0, 1.0])
    assert (tau, regret) == (-1.0, 0.75)
    with pytest.raises(ValueError, match="two or more measured rates"):
        ranking([1.0], [1.0])


def test_files_of_other_kinds_are_scored_where_there_is_a_record(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for part in measured_sets(tmp_path)[0]:
        models = [row["model"] for row in fidelity.rows_of(part, None)]
        assert models[0] == "datasheet"
        assert set(models) <= {"datasheet", "shipped", "family"}
