"""Plans that are run: how runs are judged, when other tokens are an error, and cases that cannot be run."""

import json
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scripted_runs import Scripted, names, needs_torch, outcomes, outcomes_of_any, rows_of_times, scores, scripted_case

from memsplit.dse import INTERRUPTED
from memsplit.dse.cli import main as memsplit
from memsplit.dse.runtime import EmulatedLink, LayerTimes, Runtime, SplitKV, TransferKV
from memsplit.studies import _run_plans, run_recompute_split
from memsplit.studies._run_plans import TINY, Case, all_cases, measured, rounding, table_of
from memsplit.studies._run_verdicts import Verdict, meaning, sheet_meaning
from memsplit.studies.run_cache_ratio import ratio_rows
from memsplit.studies.run_recompute_split import split_rows

QUICK = ["study", "run_recompute_split", "--quick"]


# How runs are judged


def test_runs_are_medians_of_medians_with_their_interquartile_range():
    """The warm-up and each run's first step do not count: 9 and 100 s appear nowhere."""
    runtime = Scripted({0: [9.0, 4.0, 1.0, 2.0, 8.0, 3.0], 5: [9.0, *[1.0] * 5]}, {0: 7, 5: 7})
    first, second = measured(scripted_case(runtime, runs=5), [SplitKV(split=0), SplitKV(split=5)])
    assert (first["measured_s"], first["spread_s"]) == (3.0, 2.0)  # of 1, 2, 3, 4, 8: the quartiles are 2 and 4
    assert (second["measured_s"], second["spread_s"], second["peak_device_GB"]) == (1.0, 0.0, 5.0)
    assert first["tokens_equal"]
    assert second["tokens_equal"]


def test_plans_are_run_in_rounds_of_random_order():
    def order(seed: int) -> list[list[int]]:
        runtime = Scripted({split: [1.0] * 9 for split in range(4)}, dict.fromkeys(range(4), 7))
        measured(scripted_case(runtime, runs=8, seed=seed), [SplitKV(split=split) for split in range(4)])
        return [runtime.log[at : at + 4] for at in range(0, 36, 4)]

    assert all(sorted(one) == [0, 1, 2, 3] for one in order(0))
    assert len(set(map(tuple, order(0)))) > 2
    assert order(0) == order(0) != order(1)


def test_other_tokens_are_seen():
    runtime = Scripted({0: [1.0] * 4, 5: [1.0] * 4}, {0: 7, 5: 8})
    rows = measured(scripted_case(runtime), [SplitKV(split=0), SplitKV(split=5)])
    assert [(row["tokens_equal"], row["tokens_stable"]) for row in rows] == [(True, True), (False, True)]


def test_regret_counts_beyond_the_spread_only():
    clear = Verdict.of(rows_of_times((4.0, 4.0, 0.1), (2.0, 2.5, 0.1), (3.0, 2.0, 0.1), chosen=1))
    assert (clear.regret, clear.tie, clear.cut) == (0.25, False, 1 - 2.5 / 4)
    assert (clear.best["split"], clear.foreseen["split"]) == (6, 3)
    for wide in ((0.5, 0.1), (0.1, 0.5)):
        tied = Verdict.of(rows_of_times((4.0, 4.0, 0.1), (2.0, 2.5, wide[0]), (3.0, 2.0, wide[1]), chosen=1))
        assert (tied.regret, tied.tie) == (0.25, True)
    right = Verdict.of(rows_of_times((4.0, 4.0, 0.0), (2.0, 2.5, 0.0), chosen=1))
    assert (right.regret, right.tie) == (0.0, True)


def test_errors_are_of_the_measured_time():
    frame = rows_of_times((4.0, 5.0, 0.1), (2.2, 2.0, 0.1), (3.0, 2.0, 0.1), chosen=1)
    assert frame["error_pct"].tolist() == pytest.approx([-20, 10, 50])
    assert Verdict.of(frame).error == pytest.approx(0.2)


def test_a_busy_machine_is_said():
    """Twice as slow after the runs as before: no prediction made before could be right."""
    times = LayerTimes(kv=1, act=0.5, recompute=0.4, compute=0.1, weights=0.3, first=0.1, outside=0.2, layers=2, context=8)
    runtime = SimpleNamespace(layer_times=lambda batch, context, weights, repeats: replace(times, recompute=0.2, outside=9.0), llm=TINY)
    assert scripted_case(runtime).drift(times, "gpu") == pytest.approx(1.0)
    for drift, said in ((100.0, True), (9.0, False)):
        frame = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1, drift_pct=drift)
        assert ("the machine was busy" in "\n".join(meaning(frame, "split", str, "full transfer"))) == said


def test_the_meaning_names_regret_ties_and_other_tokens():
    bad = rows_of_times((4.0, 4.0, 0.1), (2.0, 5.0, 0.1), chosen=1, tokens_equal=False)
    tied = rows_of_times((4.0, 4.0, 0.1), (2.0, 4.05, 0.1), chosen=1, context=10)
    text = "\n".join(meaning(pd.concat([bad, tied]), "split", str, "full transfer"))
    assert "Regret 25.0%;" in text
    assert "Regret 1.2%, a tie" in text
    assert "takes 25.0% more time than full transfer" in text
    assert "regret of the choice 25.0% at most, with 1 of 2 choices" in text


@pytest.mark.parametrize(
    ("times", "chosen", "said"),
    [
        ([(4.0, 4.0, 0.1), (2.0, 3.0, 0.1)], 1, "the choice takes 25.0% less time than full transfer."),
        ([(4.0, 4.0, 0.1), (2.0, 3.0, 1.5)], 1, "the choice takes as long as full transfer, within the spread."),
        ([(4.0, 4.0, 0.1), (5.0, 3.0, 0.1)], 0, "the choice is full transfer."),
    ],
)
def test_a_gain_within_the_spread_is_none(times, chosen, said):
    assert said in meaning(rows_of_times(*times, chosen=chosen), "split", str, "full transfer")[1]


def test_what_the_data_sheet_alone_would_choose_is_said():
    """3 and 2 s measured, 1.5 and 1.8 s by the sheet: the slower one, 50 % more, 50 and 10 % off."""
    rows = rows_of_times((4.0, 3.0, 0.1), (2.0, 2.0, 0.1), chosen=1).assign(sheet_s=[1.5, 1.8])
    (line,) = sheet_meaning(rows, "split", "{} tokens".format)
    assert "by the data sheet alone 0 tokens would be best, which takes 50.0% more than the best; its times, " in line
    assert "are 30 % off (median)" in line
    assert sheet_meaning(rows.assign(sheet_s=None), "split", str) == []


# Other tokens


def test_other_tokens_within_rounding_are_no_error():
    """Halves: a token that led by little was replaced, and logits are no further apart than rounding explains."""
    near = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1, tokens_equal=False, logits_off=0.008, token_lead=0.005)
    text = "\n".join(meaning(near, "split", str, "full transfer"))
    assert "In 2 of 2 rows tokens differ from those of full transfer, which led by 0.005 standard" in text
    assert "no error" in text
    assert "a defect" not in text


def test_tokens_that_change_from_run_to_run_are_a_defect():
    """A plan's own: rounding is the same each time."""
    runtime = Scripted({0: [1.0] * 4, 5: [1.0] * 4}, {0: 7, 5: 7})
    case, given = scripted_case(runtime), runtime.generate

    def unsteady(prompts: Any, generated: int, plan: SplitKV, **asked: Any) -> Any:
        runtime.tokens[5] = 8 if runtime.log.count(5) == 3 else 7  # its last run
        return given(prompts, generated, plan, **asked)

    runtime.generate = unsteady  # type: ignore[method-assign]
    rows = measured(case, [SplitKV(split=0), SplitKV(split=5)])
    assert [row["tokens_stable"] for row in rows] == [row["tokens_equal"] for row in rows] == [True, False]
    frame = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1, tokens_equal=False, tokens_stable=False)
    text = "\n".join(meaning(frame, "split", str, "full transfer"))
    assert "In 2 of 2 rows tokens changed from one run of a plan to the next" in text


def test_logits_beyond_rounding_are_a_defect_even_if_tokens_are_equal():
    text = "\n".join(meaning(rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1, logits_off=0.02), "split", str, "full transfer"))
    assert "logits are up to 0.02 of their standard deviations off those of full transfer" in text
    assert "a defect" in text


def test_logits_are_compared_up_to_the_first_other_token():
    """What follows another token is another text. Of one in ten logits that is 2 and nine that are 0, the standard deviation is 0.6."""
    reference, other = scores(np.array([[1, 2, 3], [4, 5, 6]]), lead=2.0), scores(np.array([[1, 2, 3], [4, 7, 8]]), lead=2.0)
    found = _run_plans._apart(other, reference)
    assert found == {"logits_off": pytest.approx(2 / 0.6), "token_lead": pytest.approx(2 / 0.6)}
    other.logits[1, 1], other.logits[1, 2] = reference.logits[1, 1], 99.0  # a tie of 5 and 7, then whatever
    other.logits[1, 1, 7] = 2.0
    other.logits[0, 0, 1] = 2.3
    assert _run_plans._apart(other, reference)["logits_off"] == pytest.approx(2 / 0.6)
    same = scores(reference.tokens, lead=2.3)
    assert _run_plans._apart(same, reference) == {"logits_off": pytest.approx(0.3 / 0.6), "token_lead": None}
    other.logits[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="choose a --dtype of a wider range"):
        _run_plans._apart(other, reference)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_recomputed_state_that_is_rounded_otherwise_moves_logits_by_less_than_is_called_rounding(dtype, monkeypatch):
    """Keys and values off by about a unit in the last place, as from products of another shape; by as much as they are, they move
    logits by more than that."""
    import torch

    from memsplit.dse.runtime._decoder import Decoder

    original, factor, generator = Decoder.keys_values, [0.0], torch.Generator().manual_seed(1)

    def moved(self, weights, x, positions, keys, values):
        found = original(self, weights, x, positions, keys, values)
        for one in (keys, values):
            noise = torch.randn(one.shape, generator=generator) * factor[0]
            one.copy_((one.double() * (1 + noise)).to(one.dtype))
        return found

    monkeypatch.setattr(Decoder, "keys_values", moved)
    llm = replace(TINY, num_hidden_layers=6)
    with Runtime(llm, dtype=dtype) as runtime:
        prompts = runtime.random_prompts(4, 32)
        reference = runtime.generate(prompts, 4, TransferKV(), logits=True)
        for unit, within in ((torch.finfo(getattr(torch, dtype)).eps, True), (1.0, False)):
            factor[0] = unit
            found = _run_plans._apart(runtime.generate(prompts, 4, SplitKV(split=32), logits=True), reference)
            assert found["logits_off"] > 0
            assert (found["logits_off"] < rounding(llm, dtype)) == within


# Cases that cannot be run, and Ctrl-C


@needs_torch
def test_a_case_without_room_is_named_and_the_others_go_on(capsys):
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    skipped: list[str] = []
    given = scripted_case(None, batches=(2, 4), contexts=(8, 16)).settings
    missing = names(given)
    room = outcomes(one, ValueError("the host needs 2 GB\nand has 1 GB; serve 3 prompts"), one, one)
    found = list(all_cases(given, room, skipped, missing))
    assert [rows[0]["batch"] * 100 + rows[0]["context"] for rows in found] == [208, 408, 416]
    assert skipped == ["tiny test LLM, 2 layers, batch 2, context 16: the host needs 2 GB and has 1 GB; serve 3 prompts"]
    assert missing == []
    assert "skipped: tiny test LLM" in capsys.readouterr().err


@needs_torch
@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered\nFor debugging consider", "unspecified launch failure"]
)
def test_an_error_of_the_device_ends_the_study_with_what_is_finished(tmp_path, monkeypatch, capsys, text):
    """Freeing memory then fails, too; the first error is the one that is said."""
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    monkeypatch.setattr(run_recompute_split, "split_rows", outcomes_of_any(one, RuntimeError(text)))
    close, closed = Runtime.close, []

    def broken(self: Runtime) -> None:
        close(self)
        closed.append(self)
        if len(closed) == 2:  # the first one was only opened to see what is there
            raise RuntimeError("CUDA error: cannot synchronize")

    monkeypatch.setattr(Runtime, "close", broken)
    assert memsplit([*QUICK, "--contexts", "8", "16", "32", "--out", str(tmp_path / "a.csv")]) == 1
    said = capsys.readouterr()
    assert f"stopped: tiny test LLM, 2 layers, batch 16, context 16: {text.splitlines()[0]}\n" in said.err
    assert "Not run, and not in the table: tiny test LLM, 2 layers, batch 16, context 16; tiny test LLM" in said.out
    assert pd.read_csv(tmp_path / "a.csv")["context"].tolist() == [8, 8]
    assert "batch 16, context 32" in (tmp_path / "a.json").read_text()


@needs_torch
def test_the_table_is_written_after_each_case(tmp_path, monkeypatch):
    """Whatever ends the process then, as a signal that cannot be caught."""
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    given, seen = scripted_case(None, contexts=(8, 16, 32)).settings, []
    rows = outcomes(one, one, one)

    def rows_of(case: Case) -> list[dict[str, Any]]:
        seen.append(len(pd.read_csv(tmp_path / "a.csv")) if (tmp_path / "a.csv").exists() else 0)
        return rows(case)

    table_of(SimpleNamespace(out=tmp_path / "a.csv", command="memsplit study x"), given, rows_of)
    assert seen == [0, 2, 4]


@needs_torch
def test_what_is_to_be_run_is_said_before_the_work(tmp_path, capsys):
    given = scripted_case(None, batches=(2, 4), contexts=(8, 16), points=9, runs=5).settings
    with pytest.raises(KeyboardInterrupt):
        table_of(SimpleNamespace(out=tmp_path / "a.csv", command="memsplit study x"), given, outcomes(KeyboardInterrupt()))
    # Ten plans with the chosen one, each run five times and once before: 60 runs of each of four cases.
    assert "4 cases of up to 10 plans, each run 5 times after a warm-up: up to 240 runs" in capsys.readouterr().out


@needs_torch
def test_the_progress_bar_counts_all_runs_by_their_state(monkeypatch):
    """Fewer runs than thought shorten it; it ends full."""
    bars = []

    class Bar(_run_plans.tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings | {"disable": False, "file": StringIO()})
            bars.append((self, self.total))

    monkeypatch.setattr(_run_plans, "tqdm", Bar)
    large = replace(TINY, name="large", intermediate_size=2**20, num_hidden_layers=2**20)
    given = scripted_case(None, llms=(large, TINY), batches=(1,), contexts=(8, 16, 24), points=2, runs=3).settings
    ran = []

    def rows_of(case: Case) -> list[dict[str, Any]]:
        if case.context == 16:
            raise ValueError("no room")
        scripted = Scripted({0: [1.0] * 4, 5: [1.0] * 4}, {0: 7, 5: 7})
        ran.append((bars[0][0].n, bars[0][0].total))
        return measured(replace(case, runtime=scripted), [SplitKV(split=0), SplitKV(split=5)])

    list(all_cases(given, rows_of, [], names(given)))
    ((bar, total),) = bars
    token = _run_plans.case_weight(TINY, 1, 1)
    assert total == 12 * (token * (8 + 16 + 24) + _run_plans.case_weight(large, 1, 8 + 16 + 24))
    # A case of 8 tokens with two plans of the three that were thought of, then one without any run, then one of 24 tokens.
    assert ran == [(0, 12 * token * 48), (8 * 8 * token, 8 * 8 * token + 12 * 24 * token)]
    assert bar.n == bar.total == 8 * (8 + 24) * token


@needs_torch
def test_weights_without_room_skip_the_llm():
    large = replace(TINY, name="large", intermediate_size=2**20, num_hidden_layers=2**20)
    given = scripted_case(None, llms=(large, TINY)).settings
    skipped: list[str] = []
    missing = names(given)
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    assert len(list(all_cases(given, outcomes(one), skipped, missing))) == 1
    assert skipped[0].startswith("large, 1048576 layers: runtime: the weights alone: ")
    assert missing == []


@needs_torch
def test_an_llm_whose_weights_do_not_fit_the_device_is_run_from_the_host():
    """Room on the device for half of them: parts of a layer are measured with the weights where the plans have them."""
    llm = replace(TINY, name="wide", intermediate_size=2**11, num_hidden_layers=8)
    weights = 8 * 4 * (4 * 64 * 64 + 2 * 64 * 2**11)
    with Runtime(llm, link=EmulatedLink(bandwidth=50e9), device_capacity=0.8 * weights, host_capacity=1e9) as runtime:
        case = replace(scripted_case(runtime, llms=(llm,)), settings=replace(scripted_case(None).settings, llms=(llm,)))
        with pytest.raises(ValueError, match="the device needs"):
            split_rows(case, template="staged", chunks=1, weights="gpu")
        assert len(split_rows(case, template="staged", chunks=1, weights="host")) >= 2
        assert len(ratio_rows(case, weights="host", device_share=0.0)) >= 2


@needs_torch
def test_nothing_that_can_be_run_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_recompute_split, "split_rows", outcomes_of_any(ValueError("no room")))
    assert memsplit([*QUICK, "--out", str(tmp_path / "a.csv")]) == 1
    assert "No case could be run" in capsys.readouterr().out
    assert not (tmp_path / "a.csv").exists()


@needs_torch
def test_ctrl_c_keeps_finished_cases(tmp_path, monkeypatch):
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    monkeypatch.setattr(run_recompute_split, "split_rows", outcomes_of_any(one, KeyboardInterrupt()))
    assert memsplit([*QUICK, "--contexts", "8", "16", "--out", str(tmp_path / "a.csv")]) == INTERRUPTED
    assert pd.read_csv(tmp_path / "a.csv")["context"].tolist() == [8, 8]


@needs_torch
def test_a_table_is_written_with_what_was_skipped(tmp_path):
    one = rows_of_times((4.0, 4.0, 0.1), (2.0, 2.0, 0.1), chosen=1)
    given = scripted_case(None, contexts=(8, 16)).settings
    frame, code = table_of(SimpleNamespace(out=tmp_path / "a.csv", command="memsplit study x"), given, outcomes(one, ValueError("no room")))
    assert code == 0
    assert frame["runs"].tolist() == [3, 3]
    assert "context 16: no room" in (tmp_path / "a.json").read_text()


@needs_torch
def test_measured_rows_say_how_they_are_measured_again(tmp_path, capsys):
    out = tmp_path / "a b.csv"
    assert memsplit(["study", "run_recompute_split", "--quick", "--contexts", "16", "--out", str(out)]) == 0
    command = f"memsplit study run_recompute_split --quick --contexts 16 --out '{out}'"
    assert json.loads(out.with_suffix(".json").read_text())["settings"]["command"] == command
    capsys.readouterr()
    assert memsplit(["rerun", str(out), "--row", "0"]) == 2
    assert f"holds measurements, which are not rerun row by row; measure again with: {command}" in capsys.readouterr().err
    assert {"load_average", "drift_pct"} <= set(pd.read_csv(out))


@needs_torch
def test_longer_tables_of_positions_are_said(tmp_path, capsys):
    llm = ["--llm", "opt-125m", "--layers", "1", "--batch", "1", "--contexts", "2100", "--points", "1"]
    assert memsplit(["study", "run_cache_ratio", *llm, "--out", str(tmp_path / "a.csv")]) == 2  # one layer is refused, later
    assert "opt-125m has a table of 2050 learned positions; it is run with one of 2109" in capsys.readouterr().err
