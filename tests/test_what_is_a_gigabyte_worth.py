"""The study's rows carry what it says: kinks, values and break-even prices are checked by solving again."""

import pandas as pd
import pytest

from memsplit.models.presets import SYSTEMS
from memsplit.models.units import GB, MB
from memsplit.studies import what_is_a_gigabyte_worth as study


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert study.main(["--quick", "--usd-per-hour", "3", "--years", "2", "--out", str(folder / "worth.csv")]) == 0
    assert (folder / "worth.png").stat().st_size > 10_000
    return pd.read_csv(folder / "worth.csv"), pd.read_csv(folder / "worth_curve.csv")


def case_of(row):
    return next(case for case in study.QUICK if (case.system, case.llm, case.batch) == (row.system, row.llm, row.batch))


def test_a_kink_is_where_the_last_mb_saves_something(table):
    """At the kink a step takes as long as with twice as much memory as there are bytes; one MB below, longer (or nothing fits)."""
    kinks = table[0].dropna(subset=["worthless_from_GB"])
    assert len(kinks) == 4
    for row in kinks.itertuples():
        case, tier = case_of(row), row.resource.removesuffix(" capacity")

        def seconds(size, case=case, tier=tier):
            return case.seconds(SYSTEMS[case.system].with_tier(tier, capacity=size))

        size = row.worthless_from_GB * GB
        least = seconds(size + 1000 * GB)
        assert seconds(size) == pytest.approx(least, rel=1e-9)
        below = seconds(size - MB)
        assert below is None or below > least * (1 + 1e-9)
        assert (row.dual_ms_per_unit > 0) == (row.now < row.worthless_from_GB)


def test_the_break_even_price_is_that_of_two_lines(table):
    """In closed form: what the swap earns in a life, for each GB of it, on top of the slow memory's price."""
    rows = table[0].dropna(subset=["break_even_USD_per_GB"])
    assert len(rows)
    for row in rows.itertuples():
        case, system = case_of(row), SYSTEMS[row.system]
        fast, slow = system.tiers
        swapped = system.with_tier(fast.name, capacity=fast.capacity + study.SWAP * GB)
        swapped = swapped.with_tier(slow.name, capacity=slow.capacity - study.SWAP * GB)
        earned = 3 * study.HOURS * 2
        price = earned * (1 - case.seconds(swapped) / case.seconds(system)) / study.SWAP + slow.cost * GB
        assert row.break_even_USD_per_GB == pytest.approx(price, rel=1e-8), "bisection stops at 1e-9"


def test_usd_are_the_share_of_throughput_gained(table):
    frame = table[0]
    earned = 3 * study.HOURS * 2
    gained = 1 / (1 - frame["step_saved_share"]) - 1
    assert (frame["worth_USD"] - earned * gained).abs().max() <= 1e-9 * earned
    assert (frame["step_saved_share"] > 0).sum() >= 4


def test_more_hbm_is_never_slower_and_worth_nothing_in_the_end(table):
    curve = table[1]
    assert curve["HBM_capacity_GB"].is_monotonic_increasing
    assert (curve["latency_s"].diff().dropna() <= 0).all()
    assert curve["dual_ms_per_GB"].iloc[0] > curve["dual_ms_per_GB"].iloc[-1] == 0


def test_worths_are_named_by_the_unit_they_are_per_and_the_text_says_where_they_hold(table, capsys):
    frame = table[0]
    worths = ["dual_ms_per_unit", "relaxation_difference_ms_per_unit", "optimum_difference_ms_per_unit"]
    assert [name for name in frame if "dual" in name or "difference" in name] == worths
    study.conclude(frame, 3.0, 2.0)
    assert "capacities of this table where a GB is worth something" in capsys.readouterr().out


def test_the_difference_of_the_optimum_is_drawn_without_a_line(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(study, "plot_lines", lambda frame, path, **settings: drawn.update(settings, frame=frame))
    monkeypatch.setattr(study, "QUICK", study.QUICK[1:])
    assert study.main(["--quick", "--out", str(tmp_path / "worth.csv")]) == 0
    assert drawn["y"] == "worth_ms_per_GB"
    assert list(drawn["markers_only"]) == [study.METHODS["difference_ms_per_GB"]]
    assert set(drawn["markers_only"]) < set(drawn["frame"]["method"])


def test_nothing_fits_is_a_row_with_its_reason():
    (row,) = study.priced(study.Case(system="h2m2", llm="gpt3-175b", batch=512, context=2048), 1.0)
    assert row["status"] == "infeasible"
    assert "GB are needed" in row["reason"]


@pytest.mark.parametrize("arguments", [["--years", "0"], ["--usd-per-hour", "nan"], ["--years", "inf"]])
def test_money_must_be_a_number_above_0(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_code:
        study.main([*arguments, "--quick", "--out", str(tmp_path / "out.csv")])
    assert exit_code.value.code == 2
    assert "above 0 and finite" in capsys.readouterr().err
