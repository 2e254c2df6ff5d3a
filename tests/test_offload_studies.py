"""Studies of offloading: Ctrl-C keeps what is finished, files that would overwrite each other, machines that cannot be searched, no fit."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from memsplit.dse.study import INTERRUPTED, beside, finished_rows, study_arguments
from memsplit.studies import (
    flexgen_policies,
    kv_activation_ratio,
    offload_pareto,
    offload_throughput,
    published,
    recompute_split,
    when_offload_pays,
)

SHEET = (Path(__file__).parents[1] / "models" / "data" / "rtx4090_pcie4.toml").read_text()


def sheet(folder: Path, pattern: str, text: str, *, count: int = 0) -> str:
    """The path of the RTX 4090's data sheet with every match replaced."""
    changed = re.sub(pattern, text, SHEET, count=count, flags=re.MULTILINE)
    assert changed != SHEET
    path = folder / "machine.toml"
    path.write_text(changed)
    return str(path)


# Rows until Ctrl-C


def interrupted_after(number: int):
    yield from range(number)
    raise KeyboardInterrupt


def test_rows_before_ctrl_c_are_kept_and_it_is_said(capsys):
    assert finished_rows(iter([1, 2])) == ([1, 2], False)
    assert capsys.readouterr().err == ""
    assert finished_rows(interrupted_after(3)) == ([0, 1, 2], True)
    assert "3 finished" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        finished_rows(interrupted_after(0))


def after(calls: int, function):
    """The function, with Ctrl-C in place of a call after so many."""
    left = iter(range(calls))

    def called(*arguments, **settings):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **settings)

    return called


@pytest.mark.parametrize(
    ("study", "function", "calls", "rows"),
    [
        (kv_activation_ratio, "methods_of", 0, 6),  # the six shares
        (kv_activation_ratio, "rules_of", 0, 14),  # and eight methods
        (flexgen_policies, "row_of", 4, 3),  # the policies at one disk
        (when_offload_pays, "priced", 13, 12),  # two LLMs at six precisions; the third's are not all there
        (offload_throughput, "kvpr", 2, 22),  # two prompts with eleven methods
        (recompute_split, "priced", 2, 8),  # two templates at four contexts
    ],
)
def test_ctrl_c_keeps_what_is_finished(study: ModuleType, function: str, calls: int, rows: int, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, function, after(calls, getattr(study, function)))
    stopped(study, rows, tmp_path / "rows.csv", capsys)


def test_ctrl_c_keeps_published_numbers(tmp_path, monkeypatch, capsys):
    """Two of KVPR's, after those of H2M2, which are left out here."""
    papers = list(pd.read_csv(published.PUBLISHED)["paper"])
    first = papers.index("kvpr")
    monkeypatch.setitem(published.PAPERS, "h2m2", lambda number, quick: iter([{"why": "left out"}]))
    monkeypatch.setitem(published.PAPERS, "kvpr", after(2, lambda number, quick: iter([{"why": "left out"}])))
    assert set(papers[:first]) <= {"h2m2"}
    stopped(published, first + 2, tmp_path / "rows.csv", capsys)


def stopped(study: ModuleType, rows: int, out: Path, capsys) -> None:
    """The study ends as Ctrl-C ends one: with so many rows."""
    assert study.main(["--quick", "--out", str(out)]) == INTERRUPTED == 130
    assert len(pd.read_csv(out)) == rows
    printed = capsys.readouterr()
    assert "are kept" in printed.err
    assert f"Written: {out}" in printed.out


def test_ctrl_c_within_a_comparison_keeps_its_rows_and_ends_the_study(tmp_path, monkeypatch):
    """``compare`` returns what it has; the next table is not begun."""
    monkeypatch.setattr(kv_activation_ratio.LpRatio, "solve", after(0, None))
    monkeypatch.setattr(kv_activation_ratio, "rules_of", None)
    out = tmp_path / "rows.csv"
    assert kv_activation_ratio.main(["--quick", "--out", str(out)]) == INTERRUPTED
    table = pd.read_csv(out)
    assert table.groupby("part").size().to_dict() == {"share": 6, "method": 2}


# Arguments and files


def test_a_study_is_named_as_it_is_started(capsys):
    with pytest.raises(SystemExit) as end:
        recompute_split.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: memsplit study recompute_split ")


def test_a_seed_that_no_sampler_takes_is_refused(tmp_path, capsys):
    out = str(tmp_path / "rows.csv")
    assert study_arguments("", ["--seed", str(2**32 - 1), "--out", out], default_out="x.csv").seed == 2**32 - 1
    for seed in ("4294967296", "-1"):
        with pytest.raises(SystemExit) as end:
            offload_pareto.main(["--seed", seed, "--out", out])
        assert end.value.code == 2
        assert "--seed must be at least 0 and at most 4294967295" in capsys.readouterr().err


def test_files_beside_the_table_are_named_after_it(tmp_path):
    out = tmp_path / "front.parquet"
    assert beside(out, "_all", ".png") == (tmp_path / "front_all.parquet", tmp_path / "front.png")
    assert beside(tmp_path / "front", "_all") == (tmp_path / "front_all",)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("study", [offload_pareto, recompute_split])
def test_a_picture_is_no_table(study: ModuleType, tmp_path, monkeypatch):
    """Before any work: the picture would overwrite the table."""
    monkeypatch.setattr(study, "system_named", None)
    with pytest.raises(ValueError, match=r"x\.png would be written twice") as refusal:
        study.main(["--out", str(tmp_path / "x.png")])
    assert "\n" not in str(refusal.value)
    (tmp_path / "y.png").mkdir()
    with pytest.raises(ValueError, match=r"y\.png: it is there and is no file"):
        study.main(["--out", str(tmp_path / "y.csv")])


# Machines


@pytest.mark.parametrize(
    ("pattern", "text", "says"),
    [
        (r"\[\[link\]\](.|\n)*", "", "no link 'host' -> 'GDDR6X'"),
        (r'\[\[unit\]\]\nname = "RTX 4090"(.|\n)*?(?=\[\[unit)', "", "no compute unit"),
        (r'^matrix_peak = "165.2 TFLOP/s"', 'matrix_peak = "inf TFLOP/s"', "matrix_peak of 'RTX 4090' is infinite"),
        (r'^bandwidth = "1008 GB/s"', 'bandwidth = "inf GB/s"', "bandwidth of 'GDDR6X' is infinite"),
        (r'^bandwidth = "31.5 GB/s"', 'bandwidth = "inf GB/s"', "bandwidth of the link 'host' -> 'GDDR6X' is infinite"),
        (r'^capacity = "(24|882) GB"', 'capacity = "8 GB"', "smallest batch, 32: host needs 59.19 GB beside the blocks and has 32 GB"),
    ],
)
def test_machines_that_cannot_be_searched_are_refused(pattern: str, text: str, says: str, tmp_path):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
        offload_pareto.main(["--quick", "--system", sheet(tmp_path, pattern, text), "--out", str(tmp_path / "x.csv")])
    assert says in str(refusal.value)
    assert not (tmp_path / "x.csv").exists()


def test_a_machine_of_one_memory_is_refused(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text(re.sub(r'\[\[tier\]\]\nname = "host"(.|\n)*?(?=\[\[unit)|\[\[unit\]\]\nname = "CPU"(.|\n)*', "", SHEET))
    with pytest.raises(ValueError, match="has one tier"):
        offload_pareto.main(["--quick", "--system", str(path), "--out", str(tmp_path / "x.csv")])


ENDLESS = {
    "link": (r'^bandwidth = "[^"]*"', 'bandwidth = "inf GB/s"'),
    "peaks": (r'_peak = "[^"]*"', '_peak = "inf TFLOP/s"'),
    "GPU": (r'(?<=^bandwidth = ")1008(?= GB/s)|(?<=_peak = ")[0-9.]*', "inf"),
}


@pytest.mark.parametrize("endless", ENDLESS)
@pytest.mark.parametrize("study", [recompute_split, offload_throughput, kv_activation_ratio, when_offload_pays])
def test_machines_without_limits_give_rows_or_one_sentence(study: ModuleType, endless: str, tmp_path, monkeypatch):
    """No division by zero: a table without NaN in its times, or what is missing."""
    of_many = kv_activation_ratio.mini_batches
    monkeypatch.setattr(kv_activation_ratio, "mini_batches", lambda *given, **named: of_many(*given, **named | {"requests": 3}))
    monkeypatch.setattr(when_offload_pays, "QUICK", ("llama3.1-8b", "mixtral-8x7b", "opt-30b", "deepseek-v3"))
    out = tmp_path / "rows.csv"
    arguments = ["--quick", "--system", sheet(tmp_path, *ENDLESS[endless]), "--out", str(out)]
    if endless == "link" and study in (kv_activation_ratio, when_offload_pays):  # whose tables are of times over those of the link
        with pytest.raises(ValueError, match=r"^ratios are for keys and values that take time to send; this [^\n]*infinitely fast"):
            study.main(arguments)
        return
    assert study.main(arguments) == 0
    assert len(pd.read_csv(out))


def test_requests_of_which_no_order_fits_leave_the_other_tables(tmp_path, monkeypatch):
    """Unequal lengths can need more than the equal ones of the study."""
    monkeypatch.setattr(kv_activation_ratio, "mini_batches", lambda *_, **__: pd.DataFrame())
    out = tmp_path / "rows.csv"
    assert kv_activation_ratio.main(["--quick", "--out", str(out)]) == 0
    assert set(pd.read_csv(out)["part"]) == {"share", "method", "generation"}


# Nothing fits


def test_a_split_that_fits_nowhere_says_why(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert recompute_split.main(["--quick", "--llm", "opt-175b", "--out", str(out)]) == 1
    assert not pd.read_csv(out)["fits"].any()
    printed = capsys.readouterr().out
    assert "No case fits; of the smallest, batch 8 and context 128: HBM needs" in printed
    assert "weights='host'" in printed


@pytest.mark.parametrize(
    ("study", "arguments", "says"),
    [
        (offload_throughput, ("--generated", "100000000000"), "at most 1000000 new tokens"),
        (kv_activation_ratio, ("--batch", "1000000000000"), "more than 1000000 requests"),
        (kv_activation_ratio, ("--prompt", "1000000000000"), "10000000"),
        (offload_pareto, ("--batch", "1000000000000"), "more than 1000000 requests"),
    ],
)
def test_huge_counts_are_refused_before_memory_is_exhausted(study: ModuleType, arguments: tuple[str, str], says: str, tmp_path):
    with pytest.raises(ValueError, match=says) as refusal:
        study.main(["--quick", *arguments, "--out", str(tmp_path / "x.csv")])
    assert "\n" not in str(refusal.value)


def test_huge_batches_are_priced_where_no_request_is_listed(tmp_path):
    """10^12 requests do not fit into the host: rows that say so, in no more memory than for one."""
    out = tmp_path / "rows.csv"
    assert offload_throughput.main(["--quick", "--llm", "opt-6.7b", "--batch", "1000000000000", "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert not table.loc[table["method"] == "best_ratio", "fits"].any()


def test_the_loss_of_the_rule_is_over_the_optimum(tmp_path, capsys):
    """What is printed is the mean of the rows: rule / optimum - 1."""
    out = tmp_path / "x.csv"
    assert offload_pareto.main(["--quick", "--llm", "opt-6.7b", "--batch", "8", "--context", "128", "--out", str(out)]) == 0
    table = pd.read_csv(tmp_path / "x_all.csv")
    losses = (table["heuristic_latency_s"] / table["latency_s"] - 1).dropna()
    assert f"takes {losses.mean():.1%} longer than the optimum, {losses.max():.1%} at worst" in capsys.readouterr().out
