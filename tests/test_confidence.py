"""When two designs differ by less than the model's error."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pytest

from memsplit.dse import Objective, compare, explore
from memsplit.dse.confidence import error_bars, resolution, told_apart
from memsplit.models import KernelMappingProblem, Workload
from memsplit.models.calibration import Calibration, Error, Estimate
from memsplit.models.presets import H2M2_SYSTEM, LLAMA3_1_8B
from memsplit.solvers import GreedyMapping, NaiveMapping, SolverResult, Status, TableMapping

RECORD = Calibration(
    device="toy",
    family="toys",
    kernel="toy",
    estimates={"share": Estimate(0.5, 0.4, 0.6)},
    fitted=Error(10, 5.0, 5.0, 9.0, 0.0),
    unseen=Error(10, 5.0, 5.0, 9.0, 0.0),
    ratios=(0.9, 0.95, 1.0, 1.05, 1.1),
)
NOTHING_KNOWN = replace(RECORD, unseen=None, ratios=(1.0,) * 5)


def test_the_factor_between_two_designs_is_that_of_independent_errors() -> None:
    assert resolution(RECORD) == pytest.approx(math.exp(math.sqrt(2) * math.log(1.1 / 0.9) / 2))
    assert resolution(NOTHING_KNOWN) == math.inf


def test_bars_keep_the_unit_in_their_names() -> None:
    frame = error_bars(pd.DataFrame({"latency_s": [2.0]}), {"latency_s": RECORD})
    assert frame.iloc[0].to_dict() == pytest.approx({"latency_s": 2.0, "latency_low_s": 1.8, "latency_high_s": 2.2})
    assert error_bars(pd.DataFrame({"latency_s": [2.0]}), {"latency_s": NOTHING_KNOWN})["latency_low_s"].isna().all()


def test_an_advantage_within_the_error_does_not_tell_apart() -> None:
    # The first is 5 % faster than the second and costs twice as much; the third is half as fast and cheapest.
    frame = pd.DataFrame({"latency_s": [1.0, 1.05, 2.0], "cost_usd": [200.0, 100.0, 50.0]})
    objectives = [Objective("latency_s"), Objective("cost_usd")]
    assert told_apart(frame, objectives, {"latency_s": RECORD}).tolist() == [False, True, True]
    assert told_apart(frame, objectives, {}).tolist() == [True, True, True]
    assert told_apart(frame, objectives, {"latency_s": NOTHING_KNOWN}).tolist() == [False, False, True]


def test_of_rows_that_only_the_error_separates_the_best_is_told_apart() -> None:
    frame = pd.DataFrame({"latency_s": [1.0, 1.001, 1.05, 2.0]})
    assert told_apart(frame, [Objective("latency_s")], {"latency_s": RECORD}).tolist() == [True, False, False, True]  # as compare has it
    both = pd.DataFrame({"latency_s": [1.0, 1.01], "energy_J": [1.01, 1.0]})
    objectives = [Objective("latency_s"), Objective("energy_J")]
    assert told_apart(both, objectives, {"latency_s": RECORD, "energy_J": RECORD}).tolist() == [False, False]


def test_maximised_columns_and_missing_values() -> None:
    frame = pd.DataFrame({"throughput_tok_per_s": [100.0, 95.0, 50.0, math.nan], "cost_usd": [200.0, 100.0, 50.0, 1.0]})
    objectives = [Objective("throughput_tok_per_s", "maximize"), Objective("cost_usd")]
    assert told_apart(frame, objectives, {"throughput_tok_per_s": RECORD}).tolist() == [False, True, True, False]


def problem() -> KernelMappingProblem:
    return KernelMappingProblem.build(H2M2_SYSTEM, Workload(llm=LLAMA3_1_8B, batch=32, context=4096))


def test_compare_says_which_plans_cannot_be_told_from_the_fastest() -> None:
    solvers = {"table": TableMapping(), "greedy": GreedyMapping(), "naive": NaiveMapping()}
    frame = compare({"one": problem()}, solvers, reference="table", error=RECORD, progress=False)
    expected = [loss == 0 or loss + 1 > resolution(RECORD) for loss in frame["loss"]]
    assert frame["told_apart"].tolist() == expected
    assert (frame["latency_low_s"] < frame["latency_s"]).all()
    assert "told_apart" not in compare({"one": problem()}, solvers, progress=False)


def score(x: float) -> dict[str, float]:
    return {"latency_s": 1 + x / 100, "cost_usd": 100 - x}


def test_explore_says_which_of_its_front_cannot_be_told_apart() -> None:
    def front(**settings: Any) -> pd.DataFrame:
        return explore(
            lambda trial: trial.suggest_float("x", 0, 10),
            score,
            [Objective("latency_s"), Objective("cost_usd")],
            trials=20,
            progress=False,
            **settings,
        )

    frame = front(errors={"latency_s": RECORD})
    # All latencies are within 10 %, and so within the factor of 1.15: only the cheapest stands.
    assert frame["told_apart"].sum() == 1
    assert frame.loc[frame["told_apart"], "cost_usd"].item() == frame["cost_usd"].min()
    plain = front()
    pd.testing.assert_frame_equal(frame[plain.columns], plain)


def test_wrong_columns_and_records_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="there is no column 'price_usd'"):
        explore(lambda trial: 0, lambda design: None, [Objective("latency_s")], trials=1, errors={"price_usd": RECORD})
    with pytest.raises(ValueError, match="needs a Calibration"):
        explore(lambda trial: 0, lambda design: None, [Objective("latency_s")], trials=1, errors={"latency_s": "a100"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="errors must be a dict of records"):
        explore(lambda trial: 0, lambda design: None, [Objective("latency_s")], trials=1, errors=[RECORD])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^error must be a Calibration"):
        compare({"one": problem()}, {"table": TableMapping()}, error="a100")  # type: ignore[arg-type]


def test_columns_of_the_user_are_not_overwritten() -> None:
    """Refused at the first design that shows the clash, and not after the last."""
    frame = pd.DataFrame({"latency_s": [1.0], "latency_high_s": [7.0]})
    with pytest.raises(ValueError, match="'latency_high_s' is to be added"):
        error_bars(frame, {"latency_s": RECORD})
    for name in ("latency_low_s", "latency_high_s", "told_apart"):
        priced: list[float] = []

        def taken(x: float, name: str = name, priced: list[float] = priced) -> dict[str, float]:
            priced.append(x)
            return score(x) | {name: 7.0}

        for synchronous in (True, False):
            with pytest.raises(ValueError, match=f"'{name}' is to be added"):
                explore(
                    lambda trial: trial.suggest_float("x", 0, 10),
                    taken,
                    [Objective("latency_s")],
                    trials=50,
                    population=4,
                    errors={"latency_s": RECORD},
                    progress=False,
                    synchronous=synchronous,
                )
            if synchronous:
                assert len(priced) <= 4
    with pytest.raises(ValueError, match="'latency_low_s' is to be added"):
        explore(
            lambda trial: trial.suggest_float("latency_low_s", 0, 10),
            score,
            [Objective("latency_s")],
            trials=4,
            errors={"latency_s": RECORD},
            progress=False,
        )


def test_no_relative_error_reaches_zero() -> None:
    """Nothing but 0 s is within the error of 0 s, as compare has it: what takes time differs from what takes none."""
    fast = pd.DataFrame({"latency_s": [0.0, 1.0, 0.0]})
    assert told_apart(fast, [Objective("latency_s")], {"latency_s": RECORD}).tolist() == [True, True, True]
    slow = pd.DataFrame({"throughput_tok_per_s": [0.0, 1.0, 1.05]})
    assert told_apart(slow, [Objective("throughput_tok_per_s", "maximize")], {"throughput_tok_per_s": RECORD}).tolist() == [
        True,
        False,
        True,
    ]


@dataclass(frozen=True, slots=True)
class Takes:
    """A solver whose plan takes so many ``seconds``."""

    seconds: float

    def solve(self, problem: object, /) -> SolverResult[str]:
        return SolverResult(solver="Takes", status=Status.FEASIBLE, plan="plan", objective=self.seconds)


def test_a_plan_of_no_seconds_is_the_fastest() -> None:
    frame = compare({"one": None}, {"none": Takes(0.0), "some": Takes(1.0)}, error=RECORD, progress=False)
    assert frame["told_apart"].tolist() == [True, True]
