"""Our own measurements beside published numbers: tables that the studies run_recompute_split and run_cache_ratio wrote on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from memsplit.dse import read_table, show
from memsplit.studies._run_plans import SMALL, TINY
from memsplit.studies._run_verdicts import CASE, verdicts

MEASURED = Path(__file__).parent / "measured"
"""Where these tables are; without one, nothing is shown."""

NEEDED = {
    *CASE,
    "device",
    "link_kind",
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
    "tokens_stable",
    "logits_off",
    "rounding",
    "drift_pct",
}
LEAST_RUNS = 5
"""Of each plan, for a spread that is worth printing beside a published number."""

TIMES = ("predicted_s", "measured_s", "spread_s")

OWN = (SMALL.name, TINY.name)
"""LLMs that no paper measured."""

BESIDE = ("decode latency cut against HF Accelerate", "decode throughput gain over FlexGen")
"""The numbers of KVPR (arXiv 2411.17089) that ours are shown beside."""


def measured_runs(folder: Path = MEASURED) -> tuple[pd.DataFrame, list[str]]:
    """A row for each case of each table in ``folder`` that a GPU ran over a real link, and what is left out of which file; empty if there
    is none. ValueError for a table of another kind."""
    rows, left = [], []
    for path in sorted(folder.glob("*.csv")):
        frame = read_table(path)
        if missing := sorted(NEEDED - set(frame)):
            raise ValueError(
                f"{path}: columns {', '.join(missing)} are missing; put only tables of run_recompute_split and run_cache_ratio there"
            )
        if not {"split", "act_share"} & set(frame):
            raise ValueError(f"{path}: there is neither a column split nor act_share, the decision; put tables there as they were written")
        for name in TIMES:
            numbers = pd.to_numeric(frame[name], errors="coerce")
            if not (np.isfinite(numbers) & (numbers >= 0)).all() or (name != "spread_s" and not (numbers > 0).all()):
                raise ValueError(f"{path}: {name} must be seconds above 0 in every row; put tables there as they were written")
        # "555.10" is no number.
        texts = pd.read_csv(path, usecols=["driver", "torch"], dtype=str)
        frame = frame.assign(driver=texts["driver"], torch=texts["torch"])
        # A defect in one row is one of its case.
        defect = ~frame["tokens_stable"].astype(bool) | ~(frame["logits_off"] <= frame["rounding"])
        defect = defect.groupby([frame[name] for name in CASE], dropna=False).transform("any")
        shown = frame[
            (frame["device"] == "cuda")
            & (frame["link_kind"] == "real")
            & (pd.to_numeric(frame["runs"], errors="coerce") >= LEAST_RUNS)
            & frame["driver"].notna()
            & ~defect
            & ~frame["llm"].isin(OWN)
        ]
        if len(shown) < len(frame):
            left.append(f"{path.name} ({len(frame) - len(shown)} of {len(frame)} rows)")
        if (shown.groupby(CASE, dropna=False)[["chosen", "best", "predicted_best"]].sum() != 1).any(axis=None):
            raise ValueError(
                f"{path}: each case must have one chosen, one best and one predicted_best row; put tables there as they were written"
            )
        decision = "split" if "split" in frame else "act_share"
        for one in verdicts(shown):
            first = one.baseline
            rows.append(
                {"file": path.name, "device_name": first["device_name"]}
                | {name: first[name] for name in ("llm", "layers", "batch", "context")}
                | {"decision": f"{decision} {one.chosen[decision]:.4g}", "step_s": one.chosen["measured_s"]}
                | {"latency_cut_pct": 100 * one.cut, "gain_pct": 100 * one.cut / (1 - one.cut)}
                | {"regret_pct": 100 * one.regret, "tie": one.tie, "median_error_pct": 100 * one.error, "drift_pct": first["drift_pct"]}
                | {name: first[name] for name in ("runs", "torch", "driver", "date")}
            )
    return pd.DataFrame(rows), left


def show_measured(published: pd.DataFrame, folder: Path = MEASURED) -> None:
    """Print our measurements and KVPR's numbers, and what of ours is left out; nothing if there are none of ours."""
    ours, left = measured_runs(folder)
    if left:
        print(
            f"Left out, as not of a published LLM on CUDA with driver, real link and {LEAST_RUNS} runs or more, or with tokens or logits "
            f"that rounding does not explain: {', '.join(left)}."
        )
    if ours.empty:
        return
    show(ours, title="Our own measurements: the chosen plan against the overlapped transfer of all keys and values, decode steps only")
    for number in published[(published["paper"] == "kvpr") & published["quantity"].isin(BESIDE)].to_dict("records"):
        note = "" if pd.isna(number["note"]) else f" ({number['note']})"
        print(f"  KVPR, {number['where']}, {number['row']}: {number['quantity']} {number['value']:g} {number['unit']}{note}")
