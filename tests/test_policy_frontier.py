"""The frontier of policies: regret, migration and time to decide, one row for each setting."""

import pandas as pd
import pytest

from memsplit.studies import policy_frontier as study


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = []
    for name in ("first", "second"):
        assert study.main(["--quick", "--seed", "2", "--out", str(folder / f"{name}.csv")]) == 0
        found.append(pd.read_csv(folder / f"{name}.csv"))
    for ending in ("moved", "decided"):
        assert (folder / f"first_{ending}.png").stat().st_size > 10_000
    return found


def test_every_setting_has_a_row(tables):
    table = tables[0]
    expected = {(policy, -1.0 if setting is None else setting) for policy, setting in study.policies(quick=True)}
    assert set(zip(table["policy"], table["setting"].fillna(-1.0), strict=True)) == expected
    assert {"policy", "trace", "system", "seed", "migration_GB", "regret_lower", "regret_upper", "profile", "version"} <= set(table.columns)
    assert table.drop(columns="setting").notna().all(axis=None)


def test_regret_is_no_less_than_nothing_and_static_plans_move_nothing(tables):
    table = tables[0]
    assert (table["regret_lower"] >= 0).all()  # the optimum is exact
    assert (table["regret_upper"] >= table["regret_lower"]).all()
    assert (table[table["policy"].isin(["static", "flexgen"])]["migration_GB"] == 0).all()


def test_only_clocks_differ_between_two_runs(tables):
    first, second = (table[[column for column in table if not column.endswith("runtime_s")]] for table in tables)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert (tables[0]["decide_p50_runtime_s"] > 0).all()
    assert (tables[0]["decide_p99_runtime_s"] >= tables[0]["decide_p50_runtime_s"]).all()


def test_nothing_dominates_what_is_on_the_front(tables):
    summary = study.summarise(tables[0])
    on = summary[summary["on_front"]]
    assert 1 <= len(on) < len(summary)
    for _, row in on.iterrows():
        better = (summary["regret_upper"] <= row["regret_upper"]) & (summary["migration_GB"] < row["migration_GB"])
        better |= (summary["regret_upper"] < row["regret_upper"]) & (summary["migration_GB"] <= row["migration_GB"])
        assert not better.any()
    assert study.meaning(summary).splitlines()[-1].startswith("Nothing both moves less and regrets less than")


def test_ctrl_c_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    """The first trace is finished, the second is not."""
    case = next(iter(study.QUICK.values()))
    original = study.measured
    monkeypatch.setattr(study, "QUICK", {"one": case, "two": case})

    def interrupted(name, *arguments):
        if name == "two":
            raise KeyboardInterrupt
        return original(name, *arguments)

    monkeypatch.setattr(study, "measured", interrupted)
    assert study.main(["--quick", "--out", str(tmp_path / "front.csv")]) == study.INTERRUPTED
    assert "1 finished parts are kept" in capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "front.csv")["trace"]) == {"one"}
