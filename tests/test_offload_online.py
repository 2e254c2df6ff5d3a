"""The study of online offloading: its rows add up, its bounds hold, and its pictures are drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from memsplit.models.presets import LLAMA3_1_8B
from memsplit.studies import offload_online as study

COLUMNS = {"policy", "trace", "system", "seed", "throughput_tok_per_s", "tpot_p50_s", "tpot_p99_s", "migration_GB", "host_written_GB"}
COLUMNS |= {"regret_lower", "regret_upper", "any_regret_upper", "decide_s", "profile", "version", "recomputed_share", "stopped"}

ROUNDING = 1e-9
"""Relative difference of some hundred seconds added up in another order, and of bounds that were moved outward."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert study.main(["--quick", "--seed", "1", "--out", str(folder / "online.csv")]) == 0
    for picture in ("online_share.png", "online_behind.png"):
        assert (folder / picture).stat().st_size > 10_000
    return pd.read_csv(folder / "online.csv", keep_default_na=False, na_values=[""])


def test_every_policy_has_a_row_for_every_trace(table):
    assert set(table.columns) >= COLUMNS
    assert len(table) == len(study.QUICK) * len(study.POLICIES)
    assert set(table["policy"]) == set(study.POLICIES)
    assert table["stopped"].isna().all()
    assert (table["decide_s"] > 0).all()
    assert (table["migration_GB"] == 0).all()


def test_regrets_are_those_of_proven_bounds(table):
    assert (table["decode_s"] >= table["any_bound_s"] * (1 - ROUNDING)).all()
    assert (table["decode_s"] >= table["bound_s"] * (1 - ROUNDING)).all()
    assert (table["any_bound_s"] <= table["bound_s"] * (1 + ROUNDING)).all()
    np.testing.assert_allclose(table["decode_s"], table["any_bound_s"] * (1 + table["any_regret_upper"]), rtol=ROUNDING)
    np.testing.assert_allclose(table["decode_s"], table["optimum_s"] * (1 + table["regret_lower"]), rtol=ROUNDING)
    assert (table["regret_upper"] >= table["regret_lower"]).all()
    assert (table["optimum_s"] - table["bound_s"] <= 1e-6 * table["optimum_s"]).all()  # the solver's relative gap


def test_single_forms_recompute_nothing_or_everything(table):
    shares = table.pivot_table(index="trace", columns="policy", values="recomputed_share")
    assert (shares["kv"] == 0).all()
    assert (shares["act"] == 1).all()
    assert shares["half"].between(0.49, 0.51).all()  # half of hundreds of tokens, rounded
    assert set(table.loc[table["policy"] == "kvpr", "rule"]) == {"one form a token", "prompts in both forms"}


def test_with_few_heads_keeping_keys_and_values_is_optimal(table):
    few = table[table["llm"] == LLAMA3_1_8B.name].set_index("policy")
    assert few.loc["kv", "any_regret_upper"] < ROUNDING
    assert few.loc["act", "regret_lower"] > 0.1
    for policy in ("kvpr", "request_forms", "adaptive"):
        assert few.loc[policy, "recomputed_share"] == 0


def test_what_it_means_is_said_in_lines_without_gaps(table, capsys):
    text = study.meaning(table.assign(stopped=""))
    assert "nan" not in text
    assert "adaptive" in text
    assert "keep keys and values" in text


def test_ctrl_c_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    original, calls = study.measured, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(study, "measured", interrupted)
    out = tmp_path / "online.csv"
    assert study.main(["--quick", "--out", str(out)]) == study.INTERRUPTED
    assert "1 finished parts are kept" in capsys.readouterr().err
    assert len(pd.read_csv(out)) == len(study.POLICIES)


def test_a_policy_that_needs_too_much_memory_has_a_row_that_says_so():
    """A host with room for each document as KV, and not in both forms."""
    case, (system, profile) = study.QUICK["h2m2, 24 iterations"], study.MACHINES[1]
    small = system.with_tier("host", capacity=62.5e9)
    rows, _ = study.measured("small", case, small, profile, 0)
    found = {row["policy"]: row for row in rows}
    assert "enlarge the host" in found["kvpr"]["stopped"]
    assert "decode_s" not in found["kvpr"]
    assert found["kv"]["stopped"] == ""
