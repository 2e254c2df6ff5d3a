"""Online regret: each replay against the optimum of its own schedule, with ends that hold."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from memsplit.dse.replay import against_optimum, courses, replay
from memsplit.models import LENGTHS, KernelMappingPlan, fixed_trace, h2m2_trace, poisson_trace
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM, LLAMA3_1_70B
from memsplit.solvers import Greedy, Hysteresis, Myopic, Static, Status
from memsplit.solvers.policies import LookAhead
from memsplit.solvers.shortlist import Shortlist
from memsplit.studies import online_regret as study

COLUMNS = {"policy", "trace", "system", "seed", "throughput_tok_per_s", "tpot_p50_s", "tpot_p99_s", "migration_GB", "migrations"}
COLUMNS |= {"regret_lower", "regret_upper", "competitive_ratio", "informative", "decide_s", "profile", "version"}

ROUNDING = 1e-9
"""Relative difference of seconds that are added up in another order, some hundred terms."""

POLICIES = {"static": Static(), "greedy": Greedy(), "myopic": Myopic(), "hysteresis": Hysteresis(), "shortlist": Shortlist()}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert study.main(["--quick", "--seed", "1", "--out", str(folder / "regret.csv")]) == 0
    assert (folder / "regret.png").stat().st_size > 10_000
    return pd.read_csv(folder / "regret.csv", keep_default_na=False, na_values=[""])


def test_every_policy_has_a_row_for_every_trace(table):
    assert set(table.columns) >= COLUMNS
    assert len(table) == len(study.QUICK) * len(study.POLICIES)
    assert set(table["policy"]) == set(study.POLICIES)
    assert (table["decide_s"] > 0).all()


def test_regret_is_at_least_zero_and_its_upper_end_not_below_its_lower(table):
    known = table.dropna(subset=["regret_upper"])
    assert len(known) == len(study.QUICK) * len(study.POLICIES)
    mapped = known[known["policy"] != "hierarchical"]  # a cache maps nothing, and may be faster than any mapping
    assert (mapped["regret_lower"] >= 0).all()  # all optima of the quick study are exact
    assert (mapped["busy_s"] >= mapped["bound_s"] * (1 - ROUNDING)).all()
    assert (known["regret_upper"] >= known["regret_lower"]).all()
    np.testing.assert_allclose(known["competitive_ratio"], 1 + known["regret_upper"], rtol=1e-12)  # of the same two numbers, rounded twice
    assert (known["bound_s"] <= known["optimum_s"]).all()
    assert known["busy_s"].to_numpy() == pytest.approx((known["optimum_s"] * (1 + known["regret_lower"])).to_numpy(), rel=ROUNDING)


def test_one_schedule_has_one_optimum(table):
    """All policies where requests are there from the start."""
    for name, part in table.dropna(subset=["optimum_s"]).groupby("trace"):
        assert len(set(part["optimum_s"])) == 1 or "arriving" in str(name)


def test_ctrl_c_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    original, calls = study.measured, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(study, "measured", interrupted)
    out = tmp_path / "regret.csv"
    assert study.main(["--quick", "--out", str(out)]) == study.INTERRUPTED
    assert "1 finished parts are kept" in capsys.readouterr().err
    assert len(pd.read_csv(out)) == len(study.POLICIES)


@pytest.mark.parametrize("prefill", [False, True])
def test_the_optimum_prices_a_replays_plans_as_the_replay_did(prefill):
    """With arrivals, and with prefills or with time in which nothing runs."""
    trace = poisson_trace(replace(LENGTHS["long-document"], longest_output=16), 12, rate=0.5, seed=3)
    run = replay(Greedy(), trace, H2M2_SYSTEM, LLAMA3_1_70B, batch_limit=8, prefill=prefill)
    problem = run.clairvoyant()
    cost = problem.evaluate(problem.path(run.plans))
    assert len(run.plans) == len(run.prompts) == problem.iterations == len(run.rows)
    assert any(run.prompts) == prefill
    assert cost.latency == pytest.approx(run.busy, rel=ROUNDING)
    assert cost.migration == pytest.approx(run.rows["migration_s"].sum(), rel=ROUNDING)
    idle = run.summary["duration_s"] - run.busy
    assert idle > 1.0 or prefill


def test_the_optimum_of_gpt3_is_exact_and_nobody_beats_it():
    trace = h2m2_trace(2, iterations=32)
    runs = {name: replay(policy, trace, H2M2_SYSTEM, GPT3_175B, batch_limit=32, prefill=False) for name, policy in POLICIES.items()}
    against = against_optimum(runs)
    assert list(against) == list(runs)
    assert {found.optimum.status for found in against.values()} == {Status.OPTIMAL}
    for name, found in against.items():
        assert found.regret.lower >= 0
        assert found.regret.upper >= found.regret.lower
        assert found.regret.informative
        assert found.problem.evaluate(found.optimum.plan).latency <= runs[name].busy * (1 + ROUNDING)


def test_other_schedules_have_their_own_optima():
    """A policy that is slower sees other batches where requests arrive later."""
    trace = fixed_trace(6, prompt_tokens=16_000, output_tokens=12, interval=0.15)
    runs = {
        name: replay(policy, trace, H2M2_SYSTEM, LLAMA3_1_70B, batch_limit=6, prefill=False)
        for name, policy in {"all": Static(), "look_ahead": LookAhead(iterations=4)}.items()
    }
    runs["slow"] = replay(Far(), trace, H2M2_SYSTEM, LLAMA3_1_70B, batch_limit=6, prefill=False)
    against = against_optimum(runs)
    assert against["slow"].problem is not against["look_ahead"].problem
    assert against["slow"].optimum.objective == against["slow"].problem.evaluate(against["slow"].optimum.plan).latency
    assert runs["slow"].rows["batch"].tolist() != runs["look_ahead"].rows["batch"].tolist()
    assert against["all"].problem is not against["slow"].problem


class Far:
    """Everything in the second memory."""

    def decide(self, state) -> KernelMappingPlan:
        return state.window.plan([[0, kind.slices] for kind in state.kinds])


def test_what_has_no_optimum_is_said():
    trace = fixed_trace(2, prompt_tokens=16, output_tokens=4)
    run = replay(Static(), trace, H2M2_SYSTEM, LLAMA3_1_70B, batch_limit=2, prefill=False, migration="free")
    with pytest.raises(ValueError, match=r"static: the optimum waits for migration.*'free'"):
        against_optimum({"static": run})
    with pytest.raises(ValueError, match="at least one iteration"):
        replace(run, rows=run.rows[:0]).clairvoyant()
    empty = replace(run, rows=run.rows[:0], migration="serial", plans=(), prompts=())
    assert against_optimum({"static": empty}) == {}


def test_the_study_says_what_it_means(table):
    lines = study.meaning(table.astype({"stopped": object}).fillna({"stopped": ""})).splitlines()
    assert lines[0].startswith("shortlist is nearer to its optimum than greedy on")
    assert any(line.startswith("The bound is informative") for line in lines)
    assert any(line.startswith("With prefill in the iterations shortlist") for line in lines)


def test_looking_at_prefill_pays(table):
    regrets = table[table["prefill"]].pivot_table(index="trace", columns="policy", values="regret_upper")
    assert len(regrets) == 1
    assert (regrets["shortlist"] < 0.1 * regrets["greedy"]).all()


def test_courses_say_what_moved_and_how_far_behind_each_is():
    """The optimum's own rows add up to its seconds; a policy ends its regret behind it."""
    trace = h2m2_trace(1, iterations=16)
    runs = {name: replay(POLICIES[name], trace, H2M2_SYSTEM, GPT3_175B, batch_limit=32, prefill=False) for name in ("greedy", "myopic")}
    against = against_optimum(runs)
    shown = courses(runs, against)
    assert list(shown) == ["optimum", "greedy", "myopic"]
    for name, run in runs.items():
        optimum = against[name].optimum
        behind = shown[name]["behind_optimum_s"].to_numpy()
        assert behind[-1] == pytest.approx(run.busy - optimum.objective, abs=ROUNDING * run.busy)
        same = courses({name: run}, {name: against[name]._replace(optimum=replace(optimum, plan=against[name].problem.path(run.plans)))})
        np.testing.assert_allclose(same[name]["behind_optimum_s"], 0, atol=ROUNDING * run.busy)
        columns = [column for column in same["optimum"] if column not in ("behind_optimum_s",)]
        np.testing.assert_allclose(same["optimum"][columns], run.rows[columns], rtol=ROUNDING, atol=0)
    assert courses({}, {}) == {}
