"""What a journal cannot be or hold, and one that is damaged."""

from pathlib import Path

import pytest
from machines import run


@pytest.mark.parametrize("text", ["trial,latency_s\n0,1", "{}", "x"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, text: str):
    (tmp_path / "pareto.csv").write_text(text)
    with pytest.raises(ValueError, match="it is no journal of Optuna"):
        run(tmp_path / "pareto.csv")
    assert (tmp_path / "pareto.csv").read_text() == text


@pytest.mark.parametrize("value", [{1, 2}, object()], ids=["set", "object"])
def test_a_score_that_a_storage_cannot_hold_is_refused(tmp_path: Path, value: object):
    with pytest.raises(ValueError, match="a storage holds numbers, texts and lists only"):
        run(tmp_path / "trials.log", score=lambda machine: {"latency_s": 1.0, "memory_usd": 1.0, "what": value})


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b'"trial_id"', b'"trial_ix"', "it is damaged: KeyError: 'trial_id'"),
        (b'"directions"', b'"directionz"', "it is damaged: KeyError"),
        (b"FloatDistribution", b"FloatDistributiox", "it is damaged: Unknown distribution"),
        (b'"op_code"', b"\0\0\0\0\0\0\0\0\0", "it is damaged"),
    ],
)
def test_a_damaged_journal_is_one_sentence(tmp_path: Path, old: bytes, new: bytes, sentence: str):
    storage = tmp_path / "trials.log"
    run(storage, 13, synchronous=False)
    before = storage.read_bytes()
    place = before.index(old) if old == b'"directions"' else before.rindex(old)
    after = before[:place] + new + before[place + len(old) :]
    storage.write_bytes(after)
    with pytest.raises(ValueError, match=f"trials.log cannot be reached or used .{sentence}") as refusal:
        run(storage, 14, synchronous=False)
    assert "\n" not in str(refusal.value)
