"""A swept front in an Optuna study."""

import numpy as np
import optuna
import pandas as pd
import pytest

from memsplit.dse import Grid, Objective, StepSweep, record, sweep
from memsplit.models import Workload
from memsplit.models.presets import A100_SYSTEM, OPT_13B

OBJECTIVES = [Objective("throughput_tok_per_s", "maximize"), Objective("latency_s")]


@pytest.fixture(scope="module")
def front() -> pd.DataFrame:
    workload = Workload(llm=OPT_13B, batch=1, context=512, weight_bits=16, kv_bits=16, activation_bits=16)
    grid = Grid({"batch": [1, 2, 4], "HBM_capacity_GB": [30.0, 40.0, 80.0], "HBM_bandwidth_TBps": [1.0, 2.0]})
    return sweep(grid, StepSweep(system=A100_SYSTEM, workload=workload, tier="HBM"), keep=OBJECTIVES)


def test_the_study_has_the_front_and_optuna_agrees_that_it_is_one(front, tmp_path):
    storage = tmp_path / "studies.log"
    assert record(front, OBJECTIVES, ["batch", "HBM_capacity_GB", "HBM_bandwidth_TBps"], storage=storage, name="front") == len(front) > 1
    backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(storage)))
    study = optuna.load_study(study_name="front", storage=backend)
    assert len(study.best_trials) == len(front)
    values = np.array([trial.values for trial in study.trials])  # noqa: PD011
    np.testing.assert_array_equal(values, front[["throughput_tok_per_s", "latency_s"]].to_numpy())
    assert [trial.params["batch"] for trial in study.trials] == front["batch"].tolist()
    assert study.trials[0].user_attrs["memory_usd"] == front["memory_usd"].iloc[0]


def test_what_cannot_be_recorded_is_one_sentence(front, tmp_path):
    storage = tmp_path / "studies.log"
    with pytest.raises(ValueError, match="parameters must be columns of the table"):
        record(front, OBJECTIVES, ["HBM_GB"], storage=storage, name="front")
    with pytest.raises(ValueError, match="has no value in an objective"):
        record(front.assign(latency_s=np.nan), OBJECTIVES, ["batch"], storage=storage, name="front")
    assert not storage.exists()
    record(front, OBJECTIVES, ["batch"], storage=storage, name="front")
    with pytest.raises(ValueError, match="has trials already"):
        record(front, OBJECTIVES, ["batch"], storage=storage, name="front")
    with pytest.raises(ValueError, match="objectives"):
        record(front, OBJECTIVES[::-1], ["batch"], storage=storage, name="front")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-02")], "row 0: parameter 'p' .*not Timestamp"),
        ([1.0, np.nan], "row 1: parameter 'p' .*not nan"),
        ([1.0, np.inf], "row 1: parameter 'p' .*not inf"),
        (["a", None], "row 1: parameter 'p'"),
        ([1, (2, 3)], "row 1: parameter 'p' .*not .2, 3."),
    ],
    ids=["dates", "NaN", "infinity", "None", "tuple"],
)
def test_a_parameter_that_no_study_holds_is_named_with_its_row(tmp_path, values, named):
    frame = pd.DataFrame({"p": pd.Series(values), "latency_s": [1.0, 2.0]})
    with pytest.raises(ValueError, match=named) as refusal:
        record(frame, [Objective("latency_s")], ["p"], storage=tmp_path / "studies.log", name="front")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_an_attribute_that_no_study_holds_is_named_with_its_row(tmp_path):
    frame = pd.DataFrame({"p": [1, 2], "latency_s": [1.0, 2.0], "when": [pd.Timestamp("2024-01-01")] * 2})
    with pytest.raises(ValueError, match=r"row 0: column 'when' .*Timestamp") as refusal:
        record(frame, [Objective("latency_s")], ["p"], storage=tmp_path / "studies.log", name="front")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())
