"""Fitting: parameters that made the data are found again, and what the data do not say is said."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from memsplit.models.calibrated_profiles import offload_profile, step_profile
from memsplit.models.calibration import (
    MOST_PARAMETERS,
    Calibration,
    Error,
    Estimate,
    Parameter,
    Shapes,
    check_shapes,
    error_of,
)
from memsplit.models.calibration_records import read_records, record_for, records_text, shipped_records
from memsplit.models.device import Device, device_named
from memsplit.models.kernel_models import KERNELS, kernel_model
from memsplit.models.roofline import Array
from memsplit.solvers.calibration import fit

DEVICE = Device(name="toy", family="toys", memory="HBM", capacity=1e9, bandwidth=1e9, peaks={"bf16": 1e12})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Seconds of reading ``bytes``: start + bytes / (share x bandwidth)."""

    variant: str = ""
    name: ClassVar[str] = "stream_toy"
    columns: ClassVar[tuple[str, ...]] = ("bytes",)
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("bytes",)
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="share", unit="", low=0.01, high=1.0, start=0.5, meaning="share of the bandwidth"),
        Parameter(name="start", unit="s", low=0.0, high=1e-3, start=1e-5, meaning="seconds that any read takes"),
    )

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        return np.asarray(shapes["bytes"] / device.bandwidth)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        return np.maximum(values["start"] + self.bound(device, shapes) / values["share"], self.bound(device, shapes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Twice(Stream):
    """Two factors that only ever appear as their product, and one that does nothing."""

    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="share", unit="", low=0.01, high=1.0, start=0.5, meaning="one share"),
        Parameter(name="other", unit="", low=0.01, high=1.0, start=0.9, meaning="another one"),
        Parameter(name="idle", unit="s", low=0.0, high=1.0, start=0.5, meaning="nothing"),
    )

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        return np.asarray(Stream.bound(self, device, shapes) / (values["share"] * values["other"]))


TRUTH = {"share": 0.8, "start": 2e-5}
BYTES = np.geomspace(1e2, 1e7, 40)


def measured(noise: float = 0.0, seed: int = 0) -> Array:
    exact = Stream().seconds(DEVICE, {"bytes": BYTES}, TRUTH)
    return np.asarray(exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(BYTES))))


def test_exact_data_give_their_parameters_back() -> None:
    record = fit(Stream(), DEVICE, {"bytes": BYTES}, measured())
    for name, value in TRUTH.items():
        assert record.values[name] == pytest.approx(value, rel=2e-3)  # what the prior's weight moves it by
    assert record.fitted.mape_pct < 0.1
    assert record.unseen is not None
    assert record.unseen.mape_pct < 0.1
    assert record.warnings == ()


def test_intervals_of_ninety_per_cent_hold_the_truth_about_as_often() -> None:
    hits = {name: 0 for name in TRUTH}
    for seed in range(60):
        record = fit(Stream(), DEVICE, {"bytes": BYTES}, measured(0.05, seed), folds=0)
        for name, value in TRUTH.items():
            estimate = record.estimates[name]
            hits[name] += estimate.low <= value <= estimate.high
    # Of 60 draws at 90 %, 44 or fewer would have a chance below one in ten thousand; all 60, of one in six hundred.
    assert all(45 <= count < 60 for count in hits.values()), hits


def test_the_interval_of_a_prediction_holds_nine_of_ten_measurements() -> None:
    shapes = {"bytes": np.geomspace(1e2, 1e7, 400)}
    exact = Stream().seconds(DEVICE, shapes, TRUTH)
    noisy = exact * np.exp(0.1 * np.random.default_rng(3).standard_normal(400))
    record = fit(Stream(), DEVICE, shapes, noisy)
    found = record.predict(Stream(), DEVICE, shapes)
    inside = float(((found.low <= noisy) & (noisy <= found.high)).mean())
    assert 0.85 < inside < 0.95  # three standard deviations of 400 draws at 90 % are 4.5 %
    elsewhere = record.predict(Stream(), replace(DEVICE, name="another toy"), shapes)
    assert (elsewhere.low <= found.low).all()
    assert (elsewhere.high >= found.high).all()


def test_a_few_rows_far_off_do_not_decide() -> None:
    times = measured(0.01)
    times[::10] *= 30
    assert fit(Stream(), DEVICE, {"bytes": BYTES}, times).values["share"] == pytest.approx(0.8, rel=0.05)


def test_what_cannot_be_told_apart_is_said() -> None:
    record = fit(Twice(), DEVICE, {"bytes": BYTES}, measured(0.01))
    text = " ".join(record.warnings)
    assert "share and other cannot be told apart" in text
    assert "idle does not change any of these rows" in text


def test_a_parameter_at_its_end_is_said() -> None:
    fast = np.asarray(BYTES / DEVICE.bandwidth * 1.0000001)
    record = fit(Stream(), DEVICE, {"bytes": BYTES}, fast)
    assert any("share is at the end of its range" in warning for warning in record.warnings)


def test_rows_that_beat_the_data_sheet_are_flagged_and_not_fitted() -> None:
    times = measured()
    times[:5] = BYTES[:5] / DEVICE.bandwidth / 2
    record = fit(Stream(), DEVICE, {"bytes": BYTES}, times)
    assert record.flagged == 5
    assert record.fitted.rows == 35
    assert any("5 rows beat the data sheet" in warning for warning in record.warnings)
    assert record.values["share"] == pytest.approx(0.8, rel=1e-3)


def test_the_same_rows_and_seed_give_the_same_record_to_the_last_digit() -> None:
    first, second = (fit(Stream(), DEVICE, {"bytes": BYTES}, measured(0.1), seed=7) for _ in range(2))
    assert first == second


def test_one_shape_has_no_error_on_unseen_shapes_and_says_so() -> None:
    record = fit(Stream(), DEVICE, {"bytes": np.full(5, 1e6)}, np.full(5, 2e-3))
    assert record.unseen is None
    assert record.ratios == (1.0,) * 5
    assert any("all rows have one shape" in warning for warning in record.warnings)


def test_three_rows_are_fitted_with_a_warning_and_two_are_not() -> None:
    record = fit(Stream(), DEVICE, {"bytes": BYTES[:3]}, measured()[:3])
    assert any("3 rows for 2 parameters" in warning for warning in record.warnings)
    with pytest.raises(ValueError, match="a fit needs 3 rows that do not beat the data sheet, not 2 of 2"):
        fit(Stream(), DEVICE, {"bytes": BYTES[:2]}, measured()[:2])


@pytest.mark.parametrize(
    ("shapes", "times", "message"),
    [
        ({}, [1.0], "the column 'bytes' is missing"),
        ({"bytes": [1.0, 2.0]}, [1.0], "1 measured times for 2 rows"),
        ({"bytes": [1.0, 2.0, 3.0]}, [1.0, 0.0, 1.0], "the time of row 1 must be above 0 s"),
        ({"bytes": [1.0, np.nan, 3.0]}, [1.0, 1.0, 1.0], "numbers of at least 0, not nan"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(shapes: Any, times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Stream(), DEVICE, shapes, times)


def test_errors_are_those_of_their_definition() -> None:
    error = error_of([1.1, 0.9, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 2.0])
    assert error.rows == 4
    assert error.mape_pct == pytest.approx(100 * (0.1 + 0.1 + 1.0) / 4)
    assert error.median_pct == pytest.approx(10)
    assert error.bias_pct == pytest.approx(25)
    assert error.below_bound == 1
    with pytest.raises(ValueError, match="an error needs a prediction"):
        error_of([], [])


def record(**changes: Any) -> Calibration:
    known: dict[str, Any] = {
        "device": "toy",
        "family": "toys",
        "kernel": "stream_toy",
        "estimates": {"share": Estimate(0.8, 0.7, 0.9), "start": Estimate(1e-5, 0.0, 2e-5)},
        "fitted": Error(10, 1.0, 0.5, 2.0, 0.1),
    }
    return Calibration(**known | changes)


def test_records_are_read_back_as_they_were_written(tmp_path: Any) -> None:
    written = (
        record(variant="a", warnings=('with "quotes"',), source="someone's repository", date="2026-11-21", folds=5),
        record(variant="b", unseen=Error(10, 1 / 3, 0.5, 2.0, -0.1, 2), ratios=(0.8, 0.9, 1.0, 1.1, 1.3)),
    )
    path = tmp_path / "toy.toml"
    path.write_text(records_text(written, {("stream_toy", "a"): {"start": "s"}}))
    assert read_records(path, models=[Stream(variant="a"), Stream(variant="b")]) == written
    assert pickle.loads(pickle.dumps(written)) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("value = 0.8", "value = 'x'"), "record.1.parameters.share.value: Input should be a valid number"),
        (("ratios = [1.0, 1.0", "ratios = [1.0, 0.5"), "ratios must be 5 rising numbers above 0"),
        (("kernel = ", "colonel = "), "Extra inputs are not permitted|Field required"),
        (("[[record]]", "[[record"), "is no TOML file"),
        (("value = 0.8", "value = nan"), "share must be a number at least 0"),
        (("value = 0.8", "value = 1.8"), "share must have low <= value <= high, from 0.01 to 1, not 0.7, 1.8 and 0.9"),
        (("value = 0.8", "value = 0.6"), "share must have low <= value <= high"),
        (("high = 0.9", "high = 1.2"), "share must have low <= value <= high"),
        (("low = 0.7, high = 0.9", 'low = 0.7, high = 0.9, unit = "s"'), "share must be in no unit, not in 's'; calibrate again"),
        (("share = {", "chare = {"), "has an unknown parameter 'chare'; it needs share, start: calibrate again"),
        (("start = { value = 1e-05, low = 0.0, high = 2e-05 }", ""), "lacks the parameter 'start'"),
        (('variant = ""', 'variant = "z"'), "there is no kernel 'stream_toy'; kernels are gemm"),
        (('kernel = "stream_toy"\nvariant = ""', 'kernel = "gemm"\nvariant = "fp3"'), "variant must be one of bf16"),
    ],
)
def test_damaged_records_are_refused_in_one_sentence(tmp_path: Any, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(records_text([record()]).replace(*change))
    with pytest.raises(ValueError, match=message):
        read_records(path, models=[Stream()])


def test_a_record_twice_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "toy.toml"
    text = records_text([record()])
    path.write_text(text + text[text.index("[[record]]") :])
    with pytest.raises(ValueError, match="the record of stream_toy is there twice; leave one of them out"):
        read_records(path, models=[Stream()])


def test_records_of_two_devices_are_two_files() -> None:
    with pytest.raises(ValueError, match="a file of records is for one device, not for 2"):
        records_text([record(), record(device="other")])


def test_a_device_without_a_record_gets_that_of_its_family() -> None:
    mine, sister = record(fitted=Error(5, 1.0, 1.0, 1.0, 0.0)), record(device="sister")
    assert record_for(Stream(), DEVICE, [mine, sister]) == mine
    assert record_for(Stream(), replace(DEVICE, name="cousin"), [mine, sister]) == sister  # of more rows
    assert record_for(Stream(), replace(DEVICE, name="x", family="y"), [mine, sister]) is None
    assert record_for(Stream(variant="z"), DEVICE, [mine, sister]) is None


def test_ones_own_records_before_shipped_ones_are_used() -> None:
    few, many = record(fitted=Error(3, 1.0, 1.0, 1.0, 0.0)), record(fitted=Error(300, 1.0, 1.0, 1.0, 0.0))
    assert record_for(Stream(), DEVICE, (few, many)) == few
    assert record_for(Stream(), DEVICE, (many, few)) == many
    sister = replace(few, device="sister")
    assert record_for(Stream(), DEVICE, (sister, few)) == few  # its own, wherever it stands
    shipped = record_for(kernel_model("decode_step"), device_named("A100-SXM-40GB"))
    assert shipped is not None
    mine = replace(shipped, fitted=Error(3, 1.0, 1.0, 1.0, 0.0))
    records = (*(replace(one, device="x") for one in shipped_records()), mine)
    assert record_for(kernel_model("decode_step"), device_named("A100-SXM-40GB"), records) == mine


@pytest.mark.parametrize("records", ["mine.toml", 5, [1], record()])
def test_what_is_no_tuple_of_records_is_refused(records: Any) -> None:
    with pytest.raises(ValueError, match="records must be a tuple of Calibrations, as read_records"):
        record_for(Stream(), DEVICE, records)


def test_what_power_decides_does_not_go_to_a_card_of_more_power() -> None:
    model, l40s, rtx = kernel_model("gemm", "bf16"), device_named("L40S"), device_named("RTX 4090")
    found = record_for(model, rtx)
    assert found is not None
    assert found.device == l40s.name
    assert found.values_on(model, l40s) == found.values
    assert found.values_on(model, rtx) == found.values | {"throttle": 0.005}  # the low end
    shapes = check_shapes(model, {"m": 8192, "n": 8192, "k": 8192})
    rate = 2 * 8192**3 / found.predict(model, rtx, shapes).seconds[0]
    assert 0.75 * 165.2e12 < rate < 165.2e12  # most of a peak of which cards are known to reach 150 TFLOP/s and more
    assert found.values_on(model, replace(rtx, power=None))["throttle"] == 0.005
    weak = replace(rtx, power=100.0)  # less power for its peak: kept
    assert found.values_on(model, weak) == found.values
    hopper = record_for(model, device_named("H100-SXM"))
    assert hopper is not None
    assert hopper.values_on(model, device_named("H200-SXM")) == hopper.values  # the same power and peak


def test_heads_that_no_llm_has_are_refused() -> None:
    shapes = {"batch": 1, "seq": 128, "head_dim": 128}
    for heads, kv_heads in ((8, 16), (32, 5), (32, 0), (0, 1)):
        with pytest.raises(ValueError, match=f"heads must be a multiple of kv_heads, both at least 1, not {heads} and {kv_heads}; correct"):
            check_shapes(kernel_model("decode_attention"), shapes | {"heads": heads, "kv_heads": kv_heads})
    assert len(check_shapes(kernel_model("decode_attention"), shapes | {"heads": [8, 32], "kv_heads": [8, 4]})) == 5


def test_profiles_take_records_of_ones_own() -> None:
    mine = replace(
        record_for(kernel_model("decode_step"), device_named("A100-SXM-40GB")),  # type: ignore[type-var]
        source="mine",
    )
    shares = dict(mine.estimates)
    shares["memory"] = Estimate(0.5, 0.45, 0.55)
    mine = replace(mine, estimates=shares)
    assert step_profile("A100-SXM-40GB", records=(mine, *shipped_records())).memory == 0.5
    assert step_profile("A100-SXM-40GB").memory != 0.5
    assert offload_profile("A100-SXM-80GB", records=shipped_records()) == offload_profile("A100-SXM-80GB")
    link = replace(record_for(kernel_model("host_link", "h2d_pinned"), device_named("Quadro RTX 6000")))  # type: ignore[type-var]
    fast = replace(link, estimates={name: Estimate(one.value, one.low, one.high) for name, one in link.estimates.items()}, source="x")
    assert "x" in offload_profile("A100-SXM-80GB", records=(fast, *shipped_records())).fitted_on
    with pytest.raises(ValueError, match=r"there is no record of gemm bf16 for .* calibrate one, or add shipped_records"):
        offload_profile("A100-SXM-80GB", records=(mine,))
    with pytest.raises(ValueError, match="records must be a tuple of Calibrations"):
        step_profile("A100-SXM-40GB", records="mine.toml")  # type: ignore[arg-type]


def test_a_record_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="this is a record of stream_toy, not of stream_toy z"):
        record().check(Stream(variant="z"))
    with pytest.raises(ValueError, match="differ in the parameter"):
        record(estimates={"share": Estimate(0.5, 0.5, 0.5)}).check(Stream())


def test_every_kernel_model_keeps_the_rules() -> None:
    for name in KERNELS:
        model = kernel_model(name)
        assert 1 <= len(model.parameters) <= MOST_PARAMETERS, name
        assert len({one.name for one in model.parameters}) == len(model.parameters)
        assert set(model.group) <= set(model.columns)
        assert set(model.texts) <= set(model.columns)
    with pytest.raises(ValueError, match="there is no kernel 'gem'"):
        kernel_model("gem")


def test_every_shipped_record_belongs_to_a_model_and_a_device() -> None:
    assert shipped_records()
    for each in shipped_records():
        each.check(kernel_model(each.kernel, each.variant))
        assert device_named(each.device).family == each.family
        assert each.source
        assert each.unseen is None or each.unseen.rows > 0


def test_shapes_of_one_row_stand_for_all() -> None:
    shapes = check_shapes(Stream(), {"bytes": 3.0})
    assert shapes["bytes"].tolist() == [3.0]
