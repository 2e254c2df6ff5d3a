"""A user's CSV of measured times becomes records; what is wrong with it is said in one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memsplit.dse import calibrate, read_measurements, write_records
from memsplit.dse.cli import main
from memsplit.dse.measurements import _sample, expected_errors, parameter_table
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
        ("M,N,K,time_us\n1,2,3,4\n", r"but 'M', 'N', 'K', 'time_us' \(rename M to m, N to n, K to k, time_us to measured_us\); name"),
        ("M,N,K,measured_us\n1,2,3,4\n", r"lacks the column 'm' of gemm; .* and has 'M', .* \(rename M to m, N to n, K to k\)"),
        ("m,n,k,measured_us\n1,2,3,4\n1,2,3,\n", "line 3: measured_us must be a number above 0, not an empty cell"),
        ("m, m,n,k,measured_us\n1,2,3,4,5\n", "has the column 'm' twice but for blanks"),
        ("kernel,m,n,k,measured_us\ngemm,2,3,4,5\n,2,3,4,5\n", "line 3: the kernel is missing; name one of gemm"),
        ("device,m,n,k,measured_us\nH100,2,3,4,5\n", "line 2: the device is 'H100', and the records are to be of A100-SXM-80GB; keep"),
        ("device,m,n,k,measured_us\na100,2,3,4,5\nmine,2,3,4,5\n", "line 3: the device is 'mine'"),
        ("# measured on node7\nm,n,k,measured_us\n1,2,3,4\n", "save it as a CSV with a header, a row a kernel and no comments"),
        ("kernel,m,n,k,measured_us\ngem,2,3,4,5\n", "there is no kernel 'gem'; kernels are gemm"),
        ("kernel,variant,m,n,k,measured_us\ngemm,fp3,2,3,4,5\n", "variant must be one of bf16"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_measurements(path, kernel=None if text.startswith("kernel") else "gemm", device=A100)
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


@pytest.mark.parametrize("change", [(",", ";"), (",", "\t"), (",", " , ")])
def test_cells_may_be_parted_otherwise(tmp_path: Path, change: tuple[str, str]) -> None:
    path = csv(tmp_path)
    (first,) = read_measurements(path, kernel="gemm")
    path.write_text(path.read_text().replace(*change))
    (again,) = read_measurements(path, kernel="gemm")
    assert again.seconds.tolist() == first.seconds.tolist()
    assert {name: column.tolist() for name, column in again.shapes.items()} == {name: col.tolist() for name, col in first.shapes.items()}


def test_a_file_of_another_coding_or_none_has_its_own_way_out(tmp_path: Path) -> None:
    path = csv(tmp_path)
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(ValueError, match="save it as CSV in UTF-8"):
        read_measurements(path, kernel="gemm")
    with pytest.raises(ValueError, match="name a CSV with a row for each measured kernel"):
        read_measurements(tmp_path / "absent.csv", kernel="gemm")


def test_what_a_column_says_is_not_said_again(tmp_path: Path) -> None:
    path = tmp_path / "both.csv"
    path.write_text("kernel,variant,m,n,k,measured_us\ngemm,bf16,2,3,4,5\n")
    with pytest.raises(ValueError, match="has a column 'kernel', so kernel 'gemm' for all rows has no effect; leave out one"):
        read_measurements(path, kernel="gemm")
    with pytest.raises(ValueError, match="has a column 'variant', so variant 'fp8' for all rows has no effect"):
        read_measurements(path, variant="fp8")


def test_no_variant_is_the_default_one_also_beside_its_name(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("kernel,variant,m,n,k,measured_us\ngemm,bf16,1,2,3,4\ngemm,,2,2,3,4\ngemm,fp8,1,2,3,4\ngemm,bf16,3,2,3,4\n")
    found = read_measurements(path)
    assert [(each.model.variant, each.line.tolist()) for each in found] == [("bf16", [2, 3, 5]), ("fp8", [4])]


def test_a_column_of_texts_that_name_no_device_is_let_be(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("device,m,n,k,measured_us\ncuda:0,1,2,3,4\ncuda:1,2,2,3,4\n")
    assert len(read_measurements(path, kernel="gemm", device=A100)[0]) == 2
    path.write_text("device,m,n,k,measured_us\nA100-SXM-80GB,1,2,3,4\n,2,2,3,4\n")
    assert len(read_measurements(path, kernel="gemm", device=A100)[0]) == 2


def repeated(folder: Path, factors: tuple[float, ...]) -> Path:
    """Each of the products several times, each time by another factor."""
    shapes, seconds = products()
    lines = [f"{m},{n},{k},{t * f!r}" for (m, n, k), t in zip(shapes, seconds.tolist(), strict=True) for f in factors]
    path = folder / "again.csv"
    path.write_text("\n".join(["m,n,k,measured_s", *lines]) + "\n")
    return path


def test_the_scatter_of_repeats_is_in_the_interval(tmp_path: Path) -> None:
    (once,) = calibrate(read_measurements(repeated(tmp_path, (1.0,)), kernel="gemm"), A100)
    found = read_measurements(repeated(tmp_path, (1.0, 0.8, 1.5)), kernel="gemm")
    assert sorted(set(np.round(found[0].scatter, 12).tolist())) == [0.8, 1.0, 1.5]
    (record,) = calibrate(found, A100)
    assert record.values == once.values  # by the medians, which are the same
    assert record.ratios[0] == pytest.approx(0.8 * once.ratios[0])
    assert record.ratios[-1] == pytest.approx(1.5 * once.ratios[-1])
    assert any("repeated rows of one shape differ by 88 % (5th to 95th percentile)" in warning for warning in record.warnings)
    model = found[0].model
    interval = record.predict(model, A100, found[0].shapes)
    rows = np.concatenate([found[0].seconds * factor for factor in (1.0, 0.8, 1.5)])
    assert np.mean((np.tile(interval.low, 3) <= rows) & (rows <= np.tile(interval.high, 3))) >= 0.9
    (calm,) = calibrate(read_measurements(repeated(tmp_path, (1.0, 0.97, 1.05)), kernel="gemm"), A100)
    assert not any("differ by" in warning for warning in calm.warnings)


def test_most_rows_below_the_bound_are_another_kernel_or_unit(tmp_path: Path) -> None:
    (found,) = read_measurements(csv(tmp_path), kernel="gemm")
    bound = found.model.bound(A100, found.shapes)
    fast = replace(found, seconds=np.where(np.arange(24) < 13, 0.5 * bound, found.seconds))
    with pytest.raises(ValueError, match="13 of 24 rows of gemm bf16 beat the data sheet of A100-SXM-80GB, which no device does; correct"):
        calibrate((fast,), A100)


def test_a_sample_of_many_rows_has_all_shapes_and_says_so(tmp_path: Path) -> None:
    found = read_measurements(csv(tmp_path), kernel="gemm")
    (record,) = calibrate(found, A100, most_rows=12, seed=3)
    assert record.fitted.rows == 12
    assert "12 of 24 rows were fitted, drawn with seed 3" in record.warnings
    assert calibrate(found, A100, most_rows=12, seed=3) == (record,)
    assert calibrate(found, A100, most_rows=24) == calibrate(found, A100, most_rows=None)
    chosen = _sample(found[0], 12, 3)
    assert len(set(chosen.tolist())) == 12
    pairs = [(found[0].shapes["n"][row], found[0].shapes["k"][row]) for row in chosen]
    assert all(pairs.count(pair) == 2 for pair in pairs)  # six shapes, four rows each: two of every one


def test_a_config_of_ones_own_in_a_csv(tmp_path: Path) -> None:
    config = tmp_path / "mine.json"
    shape = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config.write_text(json.dumps(shape | {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}))
    lines = ["llm,batch,context,devices,dtype,measured_s"]
    lines += [f"{llm},{batch},500,1,fp16,{0.02 + batch / 1e4}" for llm in (config, "llama2-13b") for batch in (1, 2, 4, 8, 16)]
    path = tmp_path / "steps.csv"
    path.write_text("\n".join(lines) + "\n")
    (record,) = calibrate(read_measurements(path, kernel="decode_step"), A100)
    path.write_text(path.read_text().replace(str(config), "llama2-7b"))  # the same shapes
    (named,) = calibrate(read_measurements(path, kernel="decode_step"), A100)
    assert record.values == named.values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "mine.csv"], "records are TOML and are not written to mine.csv; name another --out, as in mine.toml"),
        (["--out", "x.json"], "records are TOML and are not written to x.json; name another --out, as in x.toml"),
        (["--seed", "-1"], "--seed must be at least 0 and at most 4294967295, not -1"),
        (["--date", "today"], "--date must be a day as in 2026-01-31, not 'today'; correct it"),
    ],
)
def test_the_command_refuses_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    text = csv(tmp_path).read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "mine.csv", "--device", "a100", "--kernel", "gemm", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert (tmp_path / "mine.csv").read_text() == text


def test_a_csv_without_its_ending_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path).rename(tmp_path / "mine")
    (tmp_path / "link").symlink_to(path)
    text = path.read_text()
    for out in ("mine", "link"):
        assert main(["calibrate", str(path), "--device", "a100", "--kernel", "gemm", "--out", str(tmp_path / out)]) == 2
        assert "records are TOML and are not written to" in capsys.readouterr().err
    assert path.read_text() == text


def test_two_rows_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fit needs 3 rows that do not beat the data sheet, not 2 of 2"):
        calibrate(read_measurements(csv(tmp_path, rows=slice(2)), kernel="gemm"), A100)
