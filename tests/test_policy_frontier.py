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
    table = table[table["mode"].isna()]
    expected = {(policy, -1.0 if setting is None else setting) for policy, setting in study.policies(quick=True)}
    assert set(zip(table["policy"], table["setting"].fillna(-1.0), strict=True)) == expected
    columns = {"policy", "trace", "system", "seed", "throughput_tok_per_s", "tpot_p50_s", "tpot_p99_s", "migration_GB"}
    columns |= {"regret_lower", "regret_upper", "decide_s", "profile", "version"}
    assert columns <= set(table.columns)
    assert table.drop(columns=["setting", "mode"]).notna().all(axis=None)


def test_every_way_to_migrate_has_a_row_and_plain_ones_are_those_of_the_frontier(tables):
    table = tables[0]
    modes = table[table["mode"].notna()]
    assert set(zip(modes["policy"], modes["mode"], strict=True)) == {(policy, mode) for policy, _ in study.MOVERS for mode in study.MODES}
    plain = modes[(modes["directions"] == "one") & (modes["duplicates"] == "none")].set_index("policy")
    frontier = table[table["mode"].isna()].set_index("policy")
    for policy in ("greedy", "myopic"):
        for column in ("migration_GB", "busy_s", "regret_upper"):
            assert plain.loc[policy, column] == frontier.loc[policy, column]


def test_duplicates_and_both_directions_save_what_they_should(tables):
    """Greedy and myopic decide the same whatever a move costs: fewer bytes with duplicates, the same in less time with both directions."""
    modes = tables[0][tables[0]["mode"].notna()]
    for policy in ("greedy", "myopic"):
        by_mode = modes[modes["policy"] == policy].set_index("mode")
        plain, both, kept, loaded, all_of_it = (by_mode.loc[mode] for mode in study.MODES)
        assert (
            plain["migration_GB"] == both["migration_GB"] > kept["migration_GB"] >= loaded["migration_GB"] == all_of_it["migration_GB"] > 0
        )
        assert plain["migration_s"] >= both["migration_s"]
        assert loaded["migration_s"] >= all_of_it["migration_s"]
        assert plain["duplicates_mean_GB"] == both["duplicates_mean_GB"] == 0 < kept["duplicates_mean_GB"] <= loaded["duplicates_mean_GB"]
    lines = study.savings(tables[0]).splitlines()
    assert [line.split()[0] for line in lines] == ["greedy", "myopic", "shortlist"]


def test_regret_is_no_less_than_nothing_and_static_plans_move_nothing(tables):
    table = tables[0]
    assert (table["regret_lower"] >= 0).all()  # the optimum is exact
    assert (table["regret_upper"] >= table["regret_lower"]).all()
    assert (table[table["policy"].isin(["static", "flexgen"])]["migration_GB"] == 0).all()


def test_only_clocks_differ_between_two_runs(tables):
    first, second = (table[[column for column in table if not column.endswith(("runtime_s", "decide_s"))]] for table in tables)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert (tables[0]["decide_p50_runtime_s"] > 0).all()
    assert (tables[0]["decide_p99_runtime_s"] >= tables[0]["decide_p50_runtime_s"]).all()


def test_nothing_dominates_what_is_on_the_front(tables):
    summary = study.summarise(tables[0][tables[0]["mode"].isna()])
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


def test_what_is_saved_is_said_of_the_ways_that_came_to_their_end(tables):
    """A replay that stopped has no row, and its policy may lack some ways to migrate, or the plain one."""
    table = tables[0]
    modes = list(study.MODES)
    lacking = table[
        ~((table["policy"] == "greedy") & (table["mode"] == modes[0])) & ~((table["policy"] == "myopic") & (table["mode"] == modes[2]))
    ]
    lines = study.savings(lacking).splitlines()
    assert [line.split()[0] for line in lines] == ["myopic", "shortlist"]
    assert modes[2] not in lines[0]
    assert modes[2] in lines[1]
