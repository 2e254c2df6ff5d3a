"""Our own measurements beside published numbers: tables that the studies run_recompute_split and run_cache_ratio wrote on a GPU."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from memsplit.dse import show
from memsplit.studies._run_plans import CASE, verdicts

MEASURED = Path(__file__).parent / "measured"
"""Where these tables are; without one, nothing is shown."""

NEEDED = {
    *CASE,
    "driver",
    "torch",
    "date",
    "runs",
    "predicted_s",
    "measured_s",
    "spread_s",
    "error_pct",
    "chosen",
    "best",
    "predicted_best",
}
BESIDE = ("decode latency cut against HF Accelerate", "decode throughput gain over FlexGen")
"""The numbers of KVPR (arXiv 2411.17089) that ours are shown beside."""


def measured_runs(folder: Path = MEASURED) -> pd.DataFrame:
    """A row for each case of each table in ``folder``; empty if there is none. ValueError for a table of another kind."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path, dtype={"driver": str, "torch": str})
        if missing := sorted(NEEDED - set(frame)):
            raise ValueError(
                f"{path}: columns {', '.join(missing)} are missing; put only tables of run_recompute_split and run_cache_ratio there"
            )
        decision = "split" if "split" in frame else "act_share"
        for one in verdicts(frame):
            first = one.baseline
            rows.append(
                {"file": path.name, "device_name": first["device_name"]}
                | {name: first[name] for name in ("llm", "layers", "batch", "context")}
                | {"decision": f"{decision} {one.chosen[decision]:.4g}", "step_s": one.chosen["measured_s"]}
                | {"latency_cut_pct": 100 * one.cut, "gain_pct": 100 * one.cut / (1 - one.cut)}
                | {"regret_pct": 100 * one.regret, "tie": one.tie, "median_error_pct": 100 * one.error}
                | {name: first[name] for name in ("runs", "torch", "driver", "date")}
            )
    return pd.DataFrame(rows)


def show_measured(published: pd.DataFrame, folder: Path = MEASURED) -> None:
    """Print our measurements and KVPR's numbers; nothing if there are none of ours."""
    ours = measured_runs(folder)
    if ours.empty:
        return
    show(ours, title="Our own measurements: the chosen plan against the overlapped transfer of all keys and values, decode steps only")
    for number in published[(published["paper"] == "kvpr") & published["quantity"].isin(BESIDE)].to_dict("records"):
        note = "" if pd.isna(number["note"]) else f" ({number['note']})"
        print(f"  KVPR, {number['where']}, {number['row']}: {number['quantity']} {number['value']:g} {number['unit']}{note}")
