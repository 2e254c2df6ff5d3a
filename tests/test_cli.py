"""The command line: plans, reruns, and one sentence with exit code 2 for bad input."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from memsplit.dse.cli import METHODS, main
from memsplit.models.presets import DATA

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
        ["explain", "table.csv", "--system", "h2m2", "--batch", "8"],
        ["explain", "table.csv", "--batch", "32"],
        ["explain", "table.csv", "--kv-b", "16"],
        ["explain", "table.csv", "--problem", "cache_ratio"],
        ["explain", "--row", "0"],
        ["plan", "--out", ""],
        ["study", "what_is_a_gigabyte_worth", "--quick", "--out", ""],
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


@pytest.mark.parametrize("option", ["--system", "--batch", "--kv-bits", "--problem"])
def test_an_option_beside_a_table_is_refused_by_its_name_even_at_its_default(capsys, option):
    default = {"--system": "h2m2", "--batch": "32", "--kv-bits": "8", "--problem": "kernel_mapping"}[option]
    code, _, error = run(capsys, "explain", "table.csv", "--row", 1, "--step", 2, option, default)
    assert (code, f"explain: {option} has no effect" in error, "leave out it or the table" in error) == (2, True, True)


@pytest.mark.parametrize(("same", "code"), [([True, True], 0), ([True, False], 1), (None, 0)])
def test_a_row_that_is_not_the_same_again_is_exit_code_1(capsys, monkeypatch, same, code):
    frame = pd.DataFrame({"column": ["latency_s", "memory_usd"], "written": [1.0, 2.0], "again": [1.0, 2.5]})
    monkeypatch.setattr("memsplit.dse.cli.rerun", lambda path, row: frame if same is None else frame.assign(same=same))
    found, out, _ = run(capsys, "rerun", "table.csv")
    assert found == code
    assert ("Not the same again: memory_usd;" in out) == (code == 1)


def test_a_message_of_several_lines_is_printed_as_one(capsys, monkeypatch):
    def fails(*_):
        raise ValueError("first\n  second")

    monkeypatch.setattr("memsplit.dse.cli.rerun", fails)
    assert run(capsys, "rerun", "table.csv") == (2, "", "memsplit: first second\n")


@pytest.mark.parametrize("name", ["what_is_a_gigabyte_worth", "sampler_quality"])
def test_a_study_says_how_it_is_called_and_what_its_options_mean(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main(["study", name, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.startswith(f"usage: memsplit study {name} [-h]")
    assert out.count("(default:") >= 4  # the number itself may stand on the next line


def test_a_row_of_a_front_is_priced_again_from_its_files(capsys, tmp_path):
    table = tmp_path / "pareto.csv"
    assert run(capsys, "study", "hardware_pareto", "--quick", "--out", table)[0] == 0
    code, out, _ = run(capsys, "rerun", table, "--row", 1)
    assert code == 0
    written, again = next(line.split()[1:3] for line in out.splitlines() if line.split()[:1] == ["latency_s"])
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


def test_names_and_questions_of_studies_stand_in_columns(capsys):
    assert main(["study", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    starts = {line.index(line[len(name) :].strip()) for name, line in zip(names, lines, strict=True)}
    assert len(starts) == 1
    assert starts.pop() >= max(map(len, names)) + 2


def test_ctrl_c_while_the_command_is_imported_is_one_sentence():
    code = (
        "import sys, builtins\n"
        "before = builtins.__import__\n"
        "def interrupted(name, *args, **kwargs):\n"
        "    if name == 'pandas':\n"
        "        raise KeyboardInterrupt\n"
        "    return before(name, *args, **kwargs)\n"
        "builtins.__import__ = interrupted\n"
        "from memsplit.__main__ import main\n"
        "sys.exit(main())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr == "memsplit: interrupted; nothing was written\n"


def test_the_package_is_the_command():
    found = subprocess.run([sys.executable, "-m", "memsplit", "--version"], capture_output=True, text=True)
    assert found.stdout.startswith("memsplit 0.")
