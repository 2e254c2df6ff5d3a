"""Choices under drawn parameters: what is drawn, and what the study makes of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memsplit.dse import draws
from memsplit.models import DATASHEET, KernelTime, StepMachines, StepModel, device_named, offload_profile, step_profile
from memsplit.models.presets import LLAMA3_1_8B
from memsplit.studies import robust_choice


def test_draws_have_the_intervals_of_their_record() -> None:
    time = KernelTime.calibrated("gemm", "H100-SXM")
    assert time.record is not None
    found = draws(time.record, time.model, 20_000, seed=3)
    for parameter in time.model.parameters:
        estimate, drawn = time.record.estimates[parameter.name], found[parameter.name]
        assert np.median(drawn) == pytest.approx(estimate.value, rel=0.02)
        inside = float(((estimate.low <= drawn) & (drawn <= estimate.high)).mean())
        # 0.9 but for draws that the model's range cuts, and intervals that it cut: then more.
        assert 0.88 < inside <= 1.0
        assert parameter.low <= drawn.min() <= drawn.max() <= parameter.high
    low, high = np.quantile(found["error"], [0.05, 0.95])
    assert (low, high) == pytest.approx((time.record.ratios[0], time.record.ratios[-1]), rel=0.02)


def test_a_choice_that_no_draw_changes_stays_best() -> None:
    row = robust_choice.row_of("gpu", "x", ["a", "b"], np.array([1.0, 2.0]), np.array([[1.0, 2.0], [1.5, 1.6]]), error=False, profile="p")
    assert (row["chosen"], row["stays_best"], row["regret_mean"], row["next_behind"]) == ("a", 1.0, 0.0, 1.0)
    row = robust_choice.row_of("gpu", "x", ["a", "b"], np.array([1.0, 2.0]), np.array([[1.0, 2.0], [3.0, 2.0]]), error=True, profile="p")
    assert (row["stays_best"], row["within_1_pct"], row["regret_mean"]) == (0.5, 0.5, 0.25)


def test_the_study_writes_its_rows_and_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.csv", "b.csv"):
        assert robust_choice.main(["--quick", "--seed", "5", "--out", str(tmp_path / name)]) == 0
    frame = pd.read_csv(tmp_path / "a.csv")
    assert set(frame["decision"]) == {"gpu", "policy", "split"}
    assert frame["stays_best"].between(0, 1).all()
    assert (frame["stays_best"] <= frame["within_1_pct"]).all()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert "stays best in" in capsys.readouterr().out


def test_profiles_of_records_are_slower_than_the_data_sheet_and_say_what_they_are() -> None:
    offload = offload_profile("A100-SXM-80GB")
    assert all(0 < getattr(offload, name) < getattr(DATASHEET, name) for name in ("compute", "memory", "to_device", "to_host"))
    assert "AIConfigurator" in offload.fitted_on
    step = step_profile("H100-SXM")
    estimate = StepModel.build(LLAMA3_1_8B, weight_bits=16, kv_bits=16, activation_bits=16, profile=step)
    found = estimate.estimate(StepMachines.build([device_named("H100-SXM").system()]), 8, 1024)
    measured = KernelTime.calibrated("decode_step", "H100-SXM", variant="vLLM").predict(
        llm="llama3.1-8b", batch=8, context=1024, devices=1, dtype="bf16"
    )
    assert found.bound[0] < found.latency[0] < measured.seconds[0]  # gaps and host are left out
    with pytest.raises(ValueError, match="there is no record of gemm bf16 for T4"):
        offload_profile("T4")


def test_a_device_without_records_keeps_its_data_sheet() -> None:
    with pytest.raises(ValueError, match="there is no record of gemm bf16 for MI300X or its family CDNA3; calibrate one"):
        KernelTime.calibrated("gemm", "MI300X")
    sheet = KernelTime.datasheet("gemm", "MI300X")
    assert sheet.profile == "datasheet"
    assert sheet.predict(m=1, n=4096, k=4096).seconds[0] > 0


def test_a_family_stands_in_with_a_wider_interval() -> None:
    own, family = (KernelTime.calibrated("gemm", name) for name in ("H100-SXM", "GH200-96GB"))
    assert (own.profile, family.profile) == ("calibrated", "calibrated on H100-SXM")
    mine, other = (time.predict(m=128, n=4096, k=4096) for time in (own, family))
    assert other.high[0] / other.seconds[0] > mine.high[0] / mine.seconds[0]
