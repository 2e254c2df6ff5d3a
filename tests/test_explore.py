"""The search loop: what is asked, told, kept and refused, on a design space whose front is known."""

import copy
import math
import time

import optuna
import pandas as pd
import pytest
from optuna.samplers import GridSampler, RandomSampler

from memsplit.dse import Constraint, Objective, explore, non_dominated
from memsplit.dse.samplers import NSGA2

TIME, MONEY = Objective("latency_s"), Objective("memory_usd")


def design(trial: optuna.Trial) -> tuple[int, str]:
    """Sixteen designs: a bandwidth, and one of two memories."""
    return trial.suggest_int("bandwidth_GBps", 1, 8), trial.suggest_categorical("memory", ["hbm", "lpddr"])


def score(machine: tuple[int, str]) -> dict[str, float] | None:
    """HBM costs thrice as much as LPDDR; LPDDR is not made above 4 GB/s. The front: LPDDR up to 4, HBM from 5."""
    bandwidth, memory = machine
    if memory == "lpddr" and bandwidth > 4:
        return None
    return {"latency_s": 1 / bandwidth, "memory_usd": bandwidth * (3.0 if memory == "hbm" else 1.0), "power_W": 2.0 * bandwidth}


def every_design() -> GridSampler:
    return GridSampler({"bandwidth_GBps": list(range(1, 9)), "memory": ["hbm", "lpddr"]}, seed=0)


def explore_all(**settings) -> pd.DataFrame:
    return explore(design, score, [TIME, MONEY], trials=16, sampler=every_design(), **settings)


def test_every_design_of_a_small_space_gives_its_known_front():
    frame = explore_all()
    assert list(zip(frame["bandwidth_GBps"], frame["memory"], strict=True)) == [
        *[(bandwidth, "hbm") for bandwidth in (8, 7, 6, 5)],
        *[(bandwidth, "lpddr") for bandwidth in (4, 3, 2, 1)],
    ]
    assert frame.columns.tolist() == [
        *["trial", "bandwidth_GBps", "memory", "latency_s", "memory_usd", "power_W", "within_limits", "on_front", "seed"]
    ]
    assert frame["latency_s"].is_monotonic_increasing
    assert frame["seed"].isna().all(), "the sampler's own seed is not ours to state"
    assert (frame.attrs["finished"], frame.attrs["infeasible"], frame.attrs["interrupted"]) == (16, 4, False)


def test_dominated_rows_follow_the_front():
    frame = explore_all(dominated=True)
    assert len(frame) == 12
    assert frame["on_front"].tolist() == [True] * 8 + [False] * 4
    assert frame["on_front"].tolist() == non_dominated(frame[["latency_s", "memory_usd"]].to_numpy()).tolist()


def test_a_maximised_objective_turns_the_front_around():
    """Latency and money are then both lowest at one design: the slowest memory is the cheapest and draws least."""
    frame = explore(design, score, [Objective("power_W", "maximize"), MONEY], trials=16, sampler=every_design())
    assert frame["power_W"].tolist() == [16, 14, 12, 10, 8, 6, 4, 2]


def test_the_same_seed_gives_the_same_frame_and_another_seed_another():
    first, again, other = (explore(design, score, [TIME, MONEY], trials=60, population=20, seed=seed, dominated=True) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(first, again)
    assert first.attrs["designs"] == again.attrs["designs"]
    assert first["seed"].unique().tolist() == [3]
    assert first["bandwidth_GBps"].tolist() != other["bandwidth_GBps"].tolist()


def test_pricing_a_population_at_once_changes_nothing_but_the_number_of_calls():
    sizes = []

    def batch_score(machines):
        sizes.append(len(machines))
        return [score(machine) for machine in machines]

    settings = {"trials": 50, "population": 20, "dominated": True}
    batched = explore(design, None, [TIME, MONEY], batch_score=batch_score, **settings)
    pd.testing.assert_frame_equal(batched, explore(design, score, [TIME, MONEY], **settings))
    assert sizes == [20, 20, 10]


def test_a_design_of_the_front_that_was_proposed_again_has_one_row():
    """200 trials over 16 designs repeat; among all rows the repeats are kept, since each was a trial."""
    frame, full = (explore(design, score, [TIME, MONEY], trials=200, dominated=dominated) for dominated in (False, True))
    assert not frame.duplicated(["bandwidth_GBps", "memory"]).any()
    assert len(full) == full.attrs["finished"] - full.attrs["infeasible"]
    assert full[full["on_front"]].duplicated(["bandwidth_GBps", "memory"]).any()


def test_the_default_sampler_beats_random_search_on_a_narrow_front():
    """Eight parameters that must all be small: guidance has to help, or scores do not reach the sampler."""

    def corner(trial):
        return [trial.suggest_float(f"x{i}", 0, 1) for i in range(8)]

    def distance(point):
        return {"first": point[0] + sum(point[1:]), "second": 1 - point[0] + sum(point[1:])}

    both = [Objective("first"), Objective("second")]
    guided = explore(corner, distance, both, trials=600, population=30)
    blind = explore(corner, distance, both, trials=600, population=30, sampler=RandomSampler(seed=0))
    assert (guided["first"] + guided["second"]).min() < 0.7 * (blind["first"] + blind["second"]).min()


def test_rows_over_a_limit_are_reported_but_never_on_the_front():
    frame = explore_all(constraints=[Constraint("power_W", at_most=10, at_least=4)], dominated=True)
    assert (frame["within_limits"] == frame["power_W"].between(4, 10)).all()
    assert frame[frame["on_front"]]["bandwidth_GBps"].tolist() == [5, 4, 3, 2]
    assert frame["within_limits"].tolist() == sorted(frame["within_limits"], reverse=True)


def test_constraints_reach_the_sampler():
    """Eight memories that are fast only at the power they draw: a search that knows of the limit stays within it more often."""

    def wide(trial):
        return [trial.suggest_float(f"x{i}_W", 0, 100) for i in range(8)]

    def price(watts):
        return {"latency_s": 1 / (1 + sum(watts)), "power_W": sum(watts)}

    known = explore(wide, price, [TIME], trials=600, constraints=[Constraint("power_W", at_most=300)], dominated=True)
    unknown = explore(wide, price, [TIME], trials=600, dominated=True)
    assert known["within_limits"].sum() > 2 * (unknown["power_W"] <= 300).sum()


def test_a_sampler_that_has_tried_everything_ends_the_search():
    """Optuna's grid sampler stops the study, which Optuna itself allows only in its own loop."""
    frame = explore(design, score, [TIME, MONEY], trials=200, sampler=every_design())
    assert (frame.attrs["finished"], len(frame)) == (16, 8)


@pytest.mark.parametrize(("value", "violation"), [(600.0, 0.2), (500.0, 0.0), (100.0, 0.0), (50.0, 0.5), (300.0, -0.4)])
def test_a_violation_is_the_excess_relative_to_the_limit(value, violation):
    assert Constraint("power_W", at_most=500, at_least=100).violation(value) == pytest.approx(violation)
    assert Constraint("margin_W", at_least=0).violation(-value) == value


@pytest.mark.parametrize(
    "limits",
    [{}, {"at_most": float("nan")}, {"at_least": float("inf")}, {"at_most": 1, "at_least": 2}, {"at_most": "x"}, {"at_most": 10**400}],
)
def test_a_constraint_without_sensible_limits_is_refused(limits):
    with pytest.raises(ValueError, match="constraint 'power_W'"):
        Constraint("power_W", **limits)


def test_a_constraint_needs_the_name_of_a_column():
    with pytest.raises(ValueError, match="a constraint needs the name of a column, not 3"):
        Constraint(3, at_most=1)


def test_if_nothing_fits_the_frame_is_empty_with_all_columns():
    frame = explore(design, lambda machine: None, [TIME], trials=7, constraints=[Constraint("power_W", at_most=1)])
    assert frame.empty
    assert frame.columns.tolist() == [
        *["trial", "bandwidth_GBps", "memory", "latency_s", "power_W", "within_limits", "on_front", "seed"],
    ]
    assert (frame.attrs["finished"], frame.attrs["infeasible"]) == (7, 7)


def test_parameters_that_only_some_designs_have_are_missing_in_the_others():
    def conditional(trial):
        return trial.suggest_int("links_GBps", 1, 9) if trial.suggest_categorical("memory", ["cxl", "hbm"]) == "cxl" else 10

    frame = explore(conditional, lambda speed: {"latency_s": 1 / speed}, [TIME], trials=40, dominated=True)
    assert frame.columns.tolist()[1:3] == ["memory", "links_GBps"]
    assert (frame["links_GBps"].isna() == (frame["memory"] == "hbm")).all()


def test_designs_and_settings_come_with_the_frame_and_are_not_copied_with_it():
    settings = {"context": 4096}
    frame = explore_all(settings=settings)
    assert frame.attrs["settings"] == settings
    assert [frame.attrs["designs"][trial] for trial in frame["trial"]] == list(zip(frame["bandwidth_GBps"], frame["memory"], strict=True))
    assert len(frame.attrs["designs"]) == len(frame)
    for other in (frame.copy(), frame[frame["memory"] == "hbm"], copy.deepcopy(frame)):
        assert other.attrs["designs"] is frame.attrs["designs"]


def test_an_interruption_keeps_the_finished_trials_and_says_so(capsys):
    priced = []

    def stop_at_the_sixth(machine):
        if len(priced) == 5:
            raise KeyboardInterrupt
        priced.append(machine)
        return {"latency_s": 1.0}

    frame = explore(design, stop_at_the_sixth, [TIME], trials=50, population=4, dominated=True)
    assert [frame.attrs["designs"][trial] for trial in sorted(frame["trial"])] == priced
    assert (len(frame), frame.attrs["finished"], frame.attrs["interrupted"]) == (5, 5, True)
    assert capsys.readouterr().err == "explore: interrupted after 5 of 50 trials; they are kept\n"


def test_an_interruption_before_anything_is_finished_goes_on():
    def stop(machine):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(design, stop, [TIME], trials=5)


def test_a_timeout_ends_the_search_after_the_trial_that_passes_it():
    def slow(machine):
        time.sleep(0.02)
        return score(machine)

    frame = explore(design, slow, [TIME], trials=10_000, timeout=0.1)
    assert 1 <= frame.attrs["finished"] <= 5, "each trial takes 0.02 s or more of the 0.1 s"
    assert not frame.attrs["interrupted"]


def test_optuna_is_silent_and_the_users_verbosity_comes_back(capfd):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        explore_all()
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        *(
            ({"trials": bad}, "trials must be a whole number of designs, at least 1 .*, not")
            for bad in (0, math.nan, math.inf, 2.5, "5", True)
        ),
        *(({"population": bad}, "population must be a whole number of designs, at least 1") for bad in (0, 1.5, "x")),
        *(({"timeout": bad}, "timeout must be a number above 0 .s; None sets no limit., not") for bad in (0, "x", math.nan)),
        *(({"seed": bad}, "seed must be a whole number from 0 to") for bad in (-1, 1.5, 2**32, "0")),
        *(({"sampler": bad}, "sampler must be a value such as NSGA2") for bad in ("NSGA2", NSGA2, 3)),
        ({"objectives": "f"}, r"objectives must be a list of Objective, as in .*, not 'f'"),
        ({"objectives": TIME}, "objectives must be a list of Objective"),
        ({"objectives": ["latency_s"]}, "objectives must hold Objective only, .*, not 'latency_s'"),
        ({"constraints": [3]}, "constraints must hold Constraint only, .*, not 3"),
        ({"constraints": Constraint("power_W", at_most=1)}, "constraints must be a list of Constraint"),
        ({"settings": 3}, "settings must be a dict with texts as keys"),
        ({"design": 3}, "design must be a function of Optuna's trial, not 3"),
        ({"score": 3}, "score must be a function of a design, not 3"),
        ({"batch_score": 3}, "batch_score must be a function of a list of designs, not 3"),
        ({"score": lambda machine: {"latency_s": 10**400}}, "finite number as 'latency_s', not 1000"),
        ({"objectives": []}, "no objective"),
        ({"objectives": [TIME, TIME]}, "'latency_s' is named twice"),
        ({"score": None}, "nothing prices the designs"),
        ({"batch_score": lambda machines: [None]}, "must return a list of 50 scores, one a design, not a list of 1"),
        ({"design": lambda trial: (1, "hbm")}, r"design\(\) suggested no parameter"),
        ({"score": lambda machine: 3.0}, "must return a dict of columns, .* not a float"),
        (
            {"score": lambda machine: {"latency": 1.0}},
            r"returned no 'latency_s' for parameters .*bandwidth_GBps.*; it returned \['latency'\]",
        ),
        ({"score": lambda machine: {"latency_s": float("nan")}}, "finite number as 'latency_s', not nan, for parameters .*bandwidth_GBps"),
        ({"score": lambda machine: {"latency_s": float("inf")}}, "finite number as 'latency_s', not inf"),
        ({"score": lambda machine: {"latency_s": "1 ms"}}, "finite number as 'latency_s', not '1 ms'"),
        ({"score": lambda machine: {"latency_s": 1.0, "memory": "hbm"}}, "column 'memory' would be there twice"),
        ({"score": lambda machine: {"latency_s": 1.0, "seed": 3}}, "column 'seed' would be there twice"),
        ({"constraints": [Constraint("heat_W", at_most=1)]}, "returned no 'heat_W'"),
    ],
)
def test_what_cannot_be_explored_is_refused_in_one_sentence(settings, sentence):
    arguments = {"design": design, "score": score, "objectives": [TIME], "trials": 60} | settings
    with pytest.raises(ValueError, match=sentence) as refusal:
        explore(**arguments)
    assert "\n" not in str(refusal.value)
