"""A user's CSV of measured times becomes records; what is wrong with it is said in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from memsplit.dse import calibrate, read_measurements, write_records
from memsplit.dse.cli import main
from memsplit.dse.measurements import expected_errors, parameter_table
from memsplit.models import KernelTime, device_named, read_records
from memsplit.models.roofline import Array

A100 = device_named("A100-SXM-80GB")


def products(noise: float = 0.03) -> tuple[list[tuple[int, int, int]], Array]:
    """Shapes of products on an A100 and times that the shipped record makes likely, a little off."""
    shapes = [(m, n, k) for m in (1, 16, 128, 1024) for n in (4096, 11008) for k in (2048, 4096, 8192)]
    m, n, k = (np.array(column, dtype=float) for column in zip(*shapes, strict=True))
    seconds = KernelTime.calibrated("gemm", A100).predict(m=m, n=n, k=k).seconds
    return shapes, seconds * np.exp(noise * np.abs(np.random.default_rng(0).standard_normal(len(shapes))))


def csv(folder: Path, *, unit: str = "us", extra: str = "", rows: slice = slice(None)) -> Path:
    """A file of such measurements."""
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    shapes, seconds = products()
    lines = [f"{m},{n},{k},{time * factor!r}" for (m, n, k), time in zip(shapes, seconds.tolist(), strict=True)][rows]
    path = folder / "mine.csv"
    path.write_text("\n".join([f"m,n,k,measured_{unit}", *lines]) + "\n" + extra)
    return path


def test_a_file_without_a_kind_becomes_a_record_that_predicts_it(tmp_path: Path) -> None:
    found = read_measurements(csv(tmp_path), kernel="gemm")
    (record,) = calibrate(found, A100, source="mine", date="2026-01-01")
    assert (record.kernel, record.variant, record.source, record.date) == ("gemm", "bf16", "mine", "2026-01-01")
    assert record.fitted.rows == 24
    assert record.fitted.mape_pct < 4  # the noise is 3 %
    path = write_records(tmp_path / "records.toml", found, (record,))
    time = KernelTime.calibrated("gemm", A100, records=read_records(path))
    shapes, seconds = products()
    predicted = time.predict(m=shapes[5][0], n=shapes[5][1], k=shapes[5][2])
    assert predicted.seconds[0] == pytest.approx(seconds[5], rel=0.15)
    assert predicted.low[0] <= predicted.seconds[0] <= predicted.high[0]
    assert parameter_table(found, (record,))["parameter"].tolist() == [one.name for one in time.model.parameters]


def test_units_are_read_from_the_column(tmp_path: Path) -> None:
    times = [read_measurements(csv(tmp_path, unit=unit), kernel="gemm")[0].seconds for unit in ("s", "ms", "us")]
    assert times[0] == pytest.approx(times[1])
    assert times[0] == pytest.approx(times[2])


def test_errors_to_expect_stand_beside_the_data_sheet_and_the_shipped_record(tmp_path: Path) -> None:
    found = read_measurements(csv(tmp_path), kernel="gemm")
    (row,) = expected_errors(found, A100, calibrate(found, A100)).to_dict("records")
    assert row["shipped_record"] == A100.name
    assert row["fitted_mape_pct"] <= row["shipped_mape_pct"] < row["datasheet_mape_pct"]


def test_several_kinds_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    lines = ["kernel,variant,m,n,k,bytes,measured_us"]
    shapes, seconds = products()
    lines += [f"gemm,,{m},{n},{k},,{time * 1e6}" for (m, n, k), time in zip(shapes, seconds.tolist(), strict=True)]
    lines += [f"host_link,h2d_pinned,,,,{size},{size / 25e3 + 10}" for size in (1e4, 1e5, 1e6, 1e7, 1e8)]
    path.write_text("\n".join(lines) + "\n")
    kinds = [(each.model.name, each.model.variant, len(each)) for each in read_measurements(path)]
    assert kinds == [("gemm", "bf16", 24), ("host_link", "h2d_pinned", 5)]
    records = calibrate(read_measurements(path), A100)
    assert records[1].values["share"] == pytest.approx(25 / 31.5, rel=0.05)


def test_a_shape_measured_again_counts_once_by_its_median(tmp_path: Path) -> None:
    shapes, seconds = products()
    (m, n, k), time = shapes[0], seconds[0] * 1e6
    (found,) = read_measurements(csv(tmp_path, extra=f"{m},{n},{k},{2 * time}\n{m},{n},{k},{3 * time}\n"), kernel="gemm")
    assert (len(found), found.repeated) == (24, 2)
    assert found.seconds[0] == pytest.approx(2 * seconds[0])
    (record,) = calibrate((found,), A100)
    assert any("2 rows repeated a shape" in warning for warning in record.warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m,n,k,measured_us\n", "has no rows"),
        ("m,n,k,time\n1,2,3,4\n", "must have one column of times, measured_s or measured_ms or measured_us, and has none of them"),
        ("m,n,k,measured_s,measured_us\n1,2,3,4,5\n", "has measured_s and measured_us; name the unit"),
        ("m,n,measured_us\n1,2,3\n", "lacks the column 'k' of gemm"),
        ("m,n,k,measured_us\n1,2,x,4\n", "line 2: k must be a number at least 0, not 'x'"),
        ("m,n,k,measured_us\n1,2,3,4\n1,2,3,-4\n", "line 3: measured_us must be a number above 0, not -4"),
        ("m,n,k,measured_us\n1,2,3,inf\n", "line 2: measured_us must be a number above 0, not inf"),
        ("kernel,m,n,k,measured_us\ngem,2,3,4,5\n", "there is no kernel 'gem'; kernels are gemm"),
        ("kernel,variant,m,n,k,measured_us\ngemm,fp3,2,3,4,5\n", "variant must be one of bf16"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_measurements(path, kernel="gemm")
    assert "\n" not in str(caught.value)


def test_rows_in_another_unit_are_found(tmp_path: Path) -> None:
    shapes, seconds = products()
    m, n, k = shapes[3]
    for factor in (1e3, 1e9):  # milliseconds and nanoseconds among microseconds
        extra = "".join(f"{m + step},{n},{k},{seconds[3] * factor}\n" for step in (1, 2, 3))
        found = read_measurements(csv(tmp_path, extra=extra), kernel="gemm")
        with pytest.raises(ValueError, match="as if it were in another unit; give all 3 such rows in the same unit"):
            calibrate(found, A100)


def test_a_row_that_beats_the_data_sheet_is_flagged_and_left_out(tmp_path: Path) -> None:
    m, n, k = 4096, 11008, 8192
    bound = KernelTime.datasheet("gemm", A100).predict(m=m, n=n, k=k).seconds[0]
    (record,) = calibrate(read_measurements(csv(tmp_path, extra=f"{m},{n},{k},{bound * 0.7e6}\n"), kernel="gemm"), A100)
    assert (record.flagged, record.fitted.rows) == (1, 24)
    assert any("1 rows beat the data sheet" in warning for warning in record.warnings)


def test_the_command_makes_a_record_and_says_what_to_expect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path)
    assert main(["calibrate", str(path), "--device", "a100", "--kernel", "gemm", "--date", "2026-01-01"]) == 0
    printed = capsys.readouterr()
    assert "expect nine of ten measurements of other shapes between" in printed.out
    assert "share of the matrix peak" in printed.out
    first = (tmp_path / "mine.toml").read_bytes()
    assert main(["calibrate", str(path), "--device", "a100", "--kernel", "gemm", "--date", "2026-01-01"]) == 0
    assert (tmp_path / "mine.toml").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "gemm"], "calibrate needs --device"),
        (["--device", "B9000", "--kernel", "gemm"], "there is no device and no file 'B9000'"),
        (["--device", "a100"], "has no column 'kernel', so say which it is: one of gemm"),
        (["--device", "m2_ultra", "--kernel", "gemm"], "a fit needs 3 rows that do not beat the data sheet, not 0 of 24"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["calibrate", str(csv(tmp_path)), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert not (tmp_path / "mine.toml").exists()


def test_the_data_sheet_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "mine.toml"
    text = '[[device]]\nname = "x"\nfamily = "y"\nmemory = "HBM"\ncapacity = "1 GB"\nbandwidth = "1 GB/s"\n'
    sheet.write_text(text)
    assert main(["calibrate", str(csv(tmp_path)), "--device", str(sheet), "--kernel", "gemm"]) == 2
    assert "written over the data sheet" in capsys.readouterr().err
    assert sheet.read_text() == text


def test_two_rows_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fit needs 3 rows that do not beat the data sheet, not 2 of 2"):
        calibrate(read_measurements(csv(tmp_path, rows=slice(2)), kernel="gemm"), A100)
