"""Ctrl-C inside a replay of a study: what was finished is kept, what was not is never written, and the exit code says so."""

from dataclasses import dataclass

import pandas as pd
import pytest

from memsplit.dse import INTERRUPTED
from memsplit.models import FIRST_PRINCIPLES
from memsplit.solvers.offload_policies import KvOnly
from memsplit.studies import h2m2_dynamic, offload_online, online_regret, policy_frontier, published


@dataclass(frozen=True)
class Interrupted:
    """Ctrl-C comes while it decides."""

    def decide(self, state):
        raise KeyboardInterrupt


@dataclass(frozen=True)
class OffloadInterrupted(Interrupted):
    def most_tokens(self, service):
        return KvOnly().most_tokens(service)


def interrupt(monkeypatch, study, name, at, policy):
    """Let the replay number ``at`` of a study be interrupted."""
    original, calls = getattr(study, name), []

    def replay(given, *arguments, **settings):
        calls.append(given)
        return original(policy if len(calls) == at else given, *arguments, **settings)

    monkeypatch.setattr(study, name, replay)


@pytest.mark.parametrize(
    ("study", "replay", "first", "rows"),
    [
        (online_regret, "replay", len(online_regret.POLICIES), len(online_regret.POLICIES)),
        (policy_frontier, "replay", len(policy_frontier.policies(quick=True)), len(policy_frontier.policies(quick=True))),
        (h2m2_dynamic, "replay", len(h2m2_dynamic.SETTINGS), len(h2m2_dynamic.SETTINGS)),
        (offload_online, "replay_offload", len(offload_online.POLICIES), len(offload_online.POLICIES)),
    ],
)
def test_the_part_that_was_interrupted_is_not_written(tmp_path, monkeypatch, capsys, study, replay, first, rows):
    """The second replay after the first part, of which all rows are there, whole; so one that came to its end is not written, either."""
    policy = OffloadInterrupted() if study is offload_online else Interrupted()
    interrupt(monkeypatch, study, replay, first + 2, policy)
    out = tmp_path / "table.csv"
    assert study.main(["--quick", "--out", str(out)]) == INTERRUPTED
    assert "1 finished parts are kept" in capsys.readouterr().err
    table = pd.read_csv(out)
    assert len(table) == rows
    assert (table["iterations"] > 1).all()
    if "stopped" in table:
        assert not table["stopped"].astype(str).str.contains("interrupted").any()


def test_a_published_number_is_not_made_of_a_part_of_a_trace(monkeypatch):
    interrupt(monkeypatch, published, "replay", 1, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        published.throughput.__wrapped__("h2m2", FIRST_PRINCIPLES, 0)
