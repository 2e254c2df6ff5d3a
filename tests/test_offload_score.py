"""The score of offloading designs, and that its rows can be priced again from the files alone."""

from dataclasses import replace

import pandas as pd
import pytest

from memsplit.dse import Objective, OffloadScore, explore, rerun, write_csv
from memsplit.dse.offload_score import step_energy
from memsplit.models import DATASHEET, Workload
from memsplit.models.presets import OPT_6_7B, RTX4090_SYSTEM
from memsplit.models.units import GB, pJ
from memsplit.solvers import EnumerationRatio

WORKLOAD = Workload(llm=OPT_6_7B, batch=8, context=256, weight_bits=16, kv_bits=16, activation_bits=16)


def test_the_columns_are_those_of_the_exact_ratio():
    """The score solves the relaxation and rounds; enumeration finds nothing better than its proven gap allows."""
    score = OffloadScore()
    row, exact = score((RTX4090_SYSTEM, WORKLOAD)), replace(score, solver=EnumerationRatio())((RTX4090_SYSTEM, WORKLOAD))
    assert exact["latency_s"] <= row["latency_s"] <= exact["latency_s"] / (1 - row["gap"])
    assert row["throughput_tok_per_s"] == WORKLOAD.batch / row["latency_s"]
    assert row["heuristic_loss"] >= -row["gap"]
    assert row["profile"] == DATASHEET.name
    assert "host cost" in row["assumed"]
    assert row["memory_usd"] == pytest.approx(24 * 5 + 882 * 4, rel=1e-12)  # rounding of bytes times USD a byte


def test_nothing_that_fits_is_none():
    small = RTX4090_SYSTEM.with_tier("host", capacity=1 * GB).with_tier("GDDR6X", capacity=8 * GB)
    assert OffloadScore()((small, WORKLOAD)) is None


def test_weights_stay_on_the_gpu_where_that_is_faster():
    """OPT-6.7B's 13 GB on a GPU of 24 GB, and not of 12 GB."""
    roomy = OffloadScore()((RTX4090_SYSTEM, WORKLOAD))
    tight = OffloadScore()((RTX4090_SYSTEM.with_tier("GDDR6X", capacity=12 * GB), WORKLOAD))
    assert (roomy["weights_on"], tight["weights_on"]) == ("gpu", "host")
    assert roomy["latency_s"] < tight["latency_s"] / 10  # 1008 GB/s against a link of 31.5 GB/s


def test_energy_by_hand():
    """Without activations: the host reads what is sent, the GPU writes it and reads weights and all keys and values."""
    sent, held = 1e9, WORKLOAD.weight_bytes + WORKLOAD.state_bytes
    by_hand = (7.5 * (sent + held) + 14 * sent) * 8 * pJ
    assert step_energy(RTX4090_SYSTEM, WORKLOAD, sent, 0.0) == pytest.approx(by_hand, rel=1e-12)  # sums in another order
    assert step_energy(RTX4090_SYSTEM, WORKLOAD, sent, 0.5) > by_hand


def test_a_row_is_priced_again_from_its_files(tmp_path):
    def design(trial):
        return RTX4090_SYSTEM.with_tier("GDDR6X", capacity=trial.suggest_int("gpu_GB", 8, 48) * GB), WORKLOAD

    score = OffloadScore()
    objectives = [Objective("throughput_tok_per_s", "maximize"), Objective("memory_usd")]
    front = explore(design, score, objectives, trials=6, seed=1, settings=score.settings(), progress=False)
    path = write_csv(tmp_path / "front.csv", front)
    again = rerun(path, 0)
    assert {"latency_s", "heuristic_loss", "act_share"} <= set(again["column"])
    for _, line in again.iterrows():
        assert line["written"] == line["again"] or (pd.isna(line["written"]) and line["again"] in ("", None)), line["column"]
