"""H2M2's dynamic setting: our rows beside the published numbers, with a miss named as one."""

import pandas as pd
import pytest

from memsplit.models import FIRST_PRINCIPLES, H2M2_CALIBRATED
from memsplit.studies import h2m2_dynamic as study

COLUMNS = {"policy", "trace", "system", "seed", "throughput_tok_per_s", "tpot_p50_s", "tpot_p99_s", "migration_GB", "profile", "version"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert study.main(["--quick", "--seed", "3", "--out", str(folder / "dynamic.csv")]) == 0
    assert (folder / "dynamic.png").stat().st_size > 10_000
    return pd.read_csv(folder / "dynamic.csv")


def mean(table, policy: str, column: str, profile=FIRST_PRINCIPLES) -> float:
    return table[(table["policy"] == policy) & (table["profile"] == profile.name)][column].mean()


def test_every_policy_serves_every_trace_to_its_end(table):
    assert set(table.columns) >= COLUMNS
    assert len(table) == 2 * 2 * len(study.SETTINGS)
    assert sorted(set(table["seed"])) == [3, 4]
    assert set(table["iterations"]) == {128}
    assert set(table["tokens"]) == {32 * 128}
    assert table.drop(columns="fitted_on").notna().all(axis=None)
    assert (table["fitted_on"].notna() == (table["profile"] == H2M2_CALIBRATED.name)).all()


def test_speedups_and_shares_are_ratios_of_the_same_trace(table):
    for _, part in table.groupby(["profile", "seed"]):
        rates = part.set_index("policy")["throughput_tok_per_s"]
        assert part["speedup"].to_numpy() == pytest.approx((rates / rates["lpddr_only"]).to_numpy(), rel=1e-12)
        assert part["share_of_oracle"].to_numpy() == pytest.approx((rates / rates["oracle"]).to_numpy(), rel=1e-12)


def test_nothing_beats_the_oracle_and_static_plans_move_nothing(table):
    """The oracle is the optimum of each iteration, with migration for nothing."""
    assert (table["share_of_oracle"] <= 1).all()
    moved = table.groupby("policy")["migration_GB"].max()
    assert (moved[["lpddr_only", "flexgen", "static"]] == 0).all()
    assert (moved[["h2m2", "greedy", "myopic", "hysteresis"]] > 0).all()
    assert moved["myopic"] == moved["oracle"]
    assert (table["paging_s"] > 0).eq(table["policy"].isin(["h2m2", "h2m2_eviction"])).all()


@pytest.mark.parametrize(
    ("policy", "column", "tolerance"),
    [
        ("h2m2", "speedup", 0.05),  # the distribution of contexts is not published, and seeds spread by 4 %
        ("h2m2", "share_of_oracle", 0.02),
        pytest.param(
            *("flexgen", "speedup", 0.05),
            marks=pytest.mark.xfail(strict=True, reason="our reading of FlexGen is 8 % faster; the paper does not say how it planned"),
        ),
    ],
)
def test_published_numbers_from_first_principles(table, policy, column, tolerance):
    assert mean(table, policy, column) == pytest.approx(study.PUBLISHED[policy, column], rel=tolerance)


def test_calibrated_is_nearer_to_the_published_flexgen(table):
    """Three constants fitted on the paper's static numbers, none on these."""
    published = study.PUBLISHED["flexgen", "speedup"]
    misses = [abs(mean(table, "flexgen", "speedup", profile) - published) for profile in (FIRST_PRINCIPLES, H2M2_CALIBRATED)]
    assert misses[1] < misses[0]


def test_the_study_says_what_it_means(table):
    lines = study.meaning(table, study.summarise(table)).splitlines()
    assert lines[0].startswith("first_principles, 128.0 tokens a request on average: h2m2 speedup 1.4")
    assert lines[1].startswith("h2m2_calibrated")
    assert any(line.startswith("Nearest to the oracle") for line in lines)
