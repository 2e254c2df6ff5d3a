"""The command line: plans, reruns, and one sentence with exit code 2 for bad input."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memsplit.dse import rerun
from memsplit.dse.cli import METHODS, main
from memsplit.dse.step_sweep import StepSweep
from memsplit.models import FIRST_PRINCIPLES, KernelMappingProblem, Profile, RecomputeSplitProblem, System, Workload
from memsplit.models.presets import A100_SYSTEM, DATA, H2M2_SYSTEM, LLAMA2_70B
from memsplit.models.units import GB
from memsplit.solvers import TableMapping

SHEET = (DATA / "h2m2.toml").read_text()
CONFIG = json.loads((DATA / "llama2-70b.json").read_text())


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_plan_from_a_data_sheet_and_a_config(capsys, tmp_path):
    """Files give what the names of the same machine and LLM give, up to the name of the LLM."""
    (tmp_path / "my.toml").write_text(SHEET)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, _, _ = run(capsys, "plan", "--system", tmp_path / "my.toml", "--llm", tmp_path / "config.json", "--out", tmp_path / "a.csv")
    assert code == 0
    assert run(capsys, "plan", "--system", "h2m2", "--llm", "llama2-70b", "--out", tmp_path / "b.csv")[0] == 0
    first, second = (pd.read_csv(tmp_path / name).drop(columns="runtime_s") for name in ("a.csv", "b.csv"))
    pd.testing.assert_frame_equal(first, second)
    assert first.loc[0, "status"] == "optimal"
    assert (first["loss"].dropna() >= 0).all()


def test_every_method_is_in_the_table_or_says_why_not(capsys):
    """On three memories the table search refuses in a sentence that names what to use instead."""
    code, _, error = run(capsys, "plan", "--system", "h2m2_cxl", "--methods", "table")
    assert (code, "ConvexMapping or PatternMapping" in error) == (2, True)
    for name in METHODS:
        code, out, _ = run(capsys, "plan", "--methods", name, "--batch", 8, "--context", 512)
        assert (code, name in out) == (0, True)


def test_what_does_not_fit_is_explained(capsys):
    code, out, _ = run(capsys, "plan", "--llm", "gpt3-175b", "--batch", 512)
    assert code == 1
    assert "GB are needed" in out
    assert "enlarge LPDDR by" in out


BAD_SHEETS = {
    "unknown key": ('latency = "32 ns"', 'latenci = "32 ns"', "latenci"),
    "no unit": ('"3 TB/s"', "3e12", "has no unit"),
    "negative bandwidth": ('"3 TB/s"', '"-3 TB/s"', "above 0"),
    "no such tier": ('tier = "HBM"', 'tier = "HBN"', "'HBN'"),
}
BAD_CONFIGS = {
    "unknown architecture": ({"model_type": "rwkv"}, "rwkv"),
    "heads do not divide": ({"num_key_value_heads": 7}, "num_key_value_heads"),
}


@pytest.mark.parametrize(("old", "new", "named"), BAD_SHEETS.values(), ids=BAD_SHEETS)
def test_a_bad_data_sheet_is_one_sentence(capsys, tmp_path, old, new, named):
    assert old in SHEET
    (tmp_path / "bad.toml").write_text(SHEET.replace(old, new))
    code, out, error = run(capsys, "plan", "--system", tmp_path / "bad.toml")
    assert (code, out) == (2, "")
    assert named in error
    assert "bad.toml" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("change", "named"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_one_sentence(capsys, tmp_path, change, named):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    code, out, error = run(capsys, "plan", "--llm", tmp_path / "config.json")
    assert (code, out) == (2, "")
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["study", "hardware_pareto", "--out", "/nowhere/pareto.csv"],
        ["study", "no_such_study"],
        ["plan", "--methods", "magic"],
        ["plan", "--llm", "no-such-llm"],
        ["rerun", "no_such_table.csv"],
        ["explain", "no_such_table.csv"],
        ["explain", "--llm", "no-such-llm"],
        ["explain", "--step", "0"],
        ["explain", "--system", "hbm_8", "--llm", "opt-13b", "--problem", "cache_ratio"],
        ["explain", "--out", "/nowhere/why.csv"],
        ["study", "hardware_pareto", "--system", "h2m2_cxl"],
    ],
    ids=" ".join,
)
def test_other_bad_input_is_one_sentence(capsys, tmp_path, monkeypatch, arguments):
    """And nothing is left half-written."""
    monkeypatch.chdir(tmp_path)
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_a_front_is_priced_again_from_its_files(capsys, tmp_path):
    table = tmp_path / "pareto.csv"
    assert run(capsys, "study", "hardware_pareto", "--quick", "--out", table)[0] == 0
    code, out, _ = run(capsys, "rerun", table, "--row", 1)
    assert code == 0
    written, again = next(line.split()[1:] for line in out.splitlines() if line.split()[:1] == ["latency_s"])
    assert written == again
    code, _, error = run(capsys, "rerun", table, "--row", 10_000)
    assert (code, "no row 10000" in error) == (2, True)
    (tmp_path / "pareto.json").write_text(table.with_suffix(".json").read_text()[:-100])
    code, _, error = run(capsys, "rerun", table)
    assert (code, "damaged" in error) == (2, True)


def test_a_row_of_a_front_is_explained_from_its_files(capsys, tmp_path):
    """The plan and the latency of the row, what binds and what a GB is worth; the JSON is all that is needed beside the table."""
    table = tmp_path / "pareto.csv"
    assert run(capsys, "study", "hardware_pareto", "--quick", "--out", table)[0] == 0
    code, out, _ = run(capsys, "explain", table, "--row", 2, "--out", tmp_path / "why.csv")
    assert code == 0
    written = pd.read_csv(table).loc[2, "latency_s"]
    assert f"{written * 1e3:.6g} ms a step" in out
    for part in ("proven to be at least", "Plan: ", "bound by", "HBM holds", "One more unit saves nothing of"):
        assert part in out
    assert set(pd.read_csv(tmp_path / "why.csv")["about"]) == {"memory", "time", "worth"}
    code, _, error = run(capsys, "explain", table, "--row", -1)
    assert (code, "no row -1" in error) == (2, True)
    table.with_suffix(".json").unlink()
    code, _, error = run(capsys, "explain", table)
    assert (code, error.count("\n")) == (2, 1)


def test_a_row_of_offloading_is_explained_for_both_of_its_problems(capsys, tmp_path):
    table = tmp_path / "offload.csv"
    assert run(capsys, "study", "offload_pareto", "--quick", "--out", table)[0] == 0
    code, out, _ = run(capsys, "explain", table, "--row", 0)
    assert code == 0
    assert "LpRatio:" in out
    assert "ClosedFormSplit:" in out


@pytest.mark.parametrize("problem", ["kernel_mapping", "cache_ratio", "recompute_split"])
def test_a_machine_and_an_llm_are_explained(capsys, problem):
    arguments = ("--system", "a100_pcie4", "--llm", "opt-13b", "--context", 1024, "--problem", problem)
    code, out, _ = run(capsys, "explain", *arguments)
    assert (code, "bound by" in out) == (0, True)
    code, out, _ = run(capsys, "explain", *arguments, "--batch", 10_000)
    assert (code, "What alone would make it fit" in out, "  batch " in out) == (1, True, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingSweep:
    """An array score as ``sweep`` keeps it beside its table; ``design`` builds a row's machine and workload."""

    system: System
    workload: Workload
    profile: Profile = FIRST_PRINCIPLES

    def __call__(self, columns):
        return {"latency_s": np.array([self.latency(row) for row in each_row(columns)])}

    def latency(self, row):
        return TableMapping().solve(KernelMappingProblem.build(*self.design(row), profile=self.profile)).objective

    def design(self, row):
        system = self.system.with_tier("HBM", capacity=float(row["HBM_capacity_GB"]) * GB)
        return system, replace(self.workload, batch=int(row["batch"]))


class WithProblem(MappingSweep):
    """One that says itself which problem it solves."""

    def problem(self, row):
        return RecomputeSplitProblem.build(A100_SYSTEM, replace(self.workload, batch=int(row["batch"])), weights="host")


def each_row(columns):
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def swept(folder: Path, monkeypatch, score: object) -> Path:
    """A swept table of two rows, and the JSON that says which score it was."""
    table = folder / "sweep.csv"
    pd.DataFrame({"batch": [8, 900], "HBM_capacity_GB": [48.0, 40.0], "latency_s": [1.0, np.nan], "reason": ["", "too small"]}).to_csv(
        table, index=False
    )
    table.with_suffix(".json").write_text("{}")
    # memsplit.dse.rerun is the function of that name.
    monkeypatch.setattr(sys.modules["memsplit.dse.rerun"], "read_designs", lambda _: {"settings": {"score": score}, "designs": {}})
    return table


def test_rows_of_a_sweep_are_priced_and_explained_from_their_own_columns(capsys, tmp_path, monkeypatch):
    """Also one in which nothing fits."""
    score = MappingSweep(system=H2M2_SYSTEM, workload=Workload(llm=LLAMA2_70B, batch=1, context=4096))
    table = swept(tmp_path, monkeypatch, score)
    row = {"HBM_capacity_GB": 48.0, "batch": 8}
    expected = score.latency(row)
    code, out, _ = run(capsys, "explain", table)
    assert (code, f"batch 8, context 4096: {expected * 1e3:.6g} ms a step" in out) == (0, True)
    again = rerun(table)
    assert again["column"].tolist() == ["latency_s"]
    assert (again["written"][0], again["again"][0]) == (1.0, expected)
    code, out, _ = run(capsys, "explain", table, "--row", 1)
    assert (code, "batch 900" in out, "  LPDDR capacity" in out) == (1, True, True)


def test_a_score_may_say_itself_which_problem_it_solves(capsys, tmp_path, monkeypatch):
    score = WithProblem(system=H2M2_SYSTEM, workload=Workload(llm=LLAMA2_70B, batch=1, context=4096))
    code, out, _ = run(capsys, "explain", swept(tmp_path, monkeypatch, score))
    assert (code, "ClosedFormSplit" in out) == (0, True)


def test_a_score_without_a_plan_is_refused(capsys, tmp_path, monkeypatch):
    score = StepSweep(system=H2M2_SYSTEM, workload=Workload(llm=LLAMA2_70B, batch=1, context=4096), tier="LPDDR")
    code, _, error = run(capsys, "explain", swept(tmp_path, monkeypatch, score))
    assert (code, "StepSweep has no plan to explain" in error) == (2, True)


def test_a_users_own_score_is_not_run(capsys, tmp_path, monkeypatch):
    """The JSON holds its name only."""
    code, out, error = run(capsys, "explain", swept(tmp_path, monkeypatch, "their_module.Score"))
    assert (code, out) == (2, "")
    assert "'their_module.Score'" in error
    assert error.count("\n") == 1


def test_ctrl_c_in_a_search_keeps_and_writes_what_is_finished(tmp_path):
    """SIGINT as a terminal sends it; the files are whole."""
    table = tmp_path / "pareto.csv"
    command = [Path(sys.executable).parent / "memsplit", "study", "hardware_pareto", "--trials", "100000", "--out", table]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as search:
        time.sleep(8)
        search.send_signal(signal.SIGINT)
        _, error = search.communicate(timeout=120)
    assert search.returncode == 130
    assert "interrupted after" in error
    assert "Traceback" not in error
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["pareto.csv", "pareto.json", "pareto.png", "pareto_all.csv", "pareto_all.json"]
    )
