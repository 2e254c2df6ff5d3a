"""What the rows of studies that run plans say: errors of predictions, regret of the chosen plan, and whether tokens differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from memsplit.dse import plot_lines, show
from memsplit.studies._run_plans import TINY, layers_name

BUSY = 10.0
"""Per cent by which parts of a layer may change during the runs before it is said: what a prediction should be off by at most."""

CASE = ["device_name", "llm", "layers", "dtype", "template", "weights", "batch", "context"]
"""Columns whose values are those of one case."""


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one case with the error of each prediction, and which plan was fastest by prediction and by measurement."""
    best, foreseen = (min(range(len(rows)), key=lambda index, name=name: rows[index][name]) for name in ("measured_s", "predicted_s"))  # type: ignore[misc]
    return [
        row | {"error_pct": 100 * (row["predicted_s"] / row["measured_s"] - 1), "best": index == best, "predicted_best": index == foreseen}
        for index, row in enumerate(rows)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rows of one case say of the chosen plan: ``regret`` and ``cut`` are shares of measured time."""

    name: str
    chosen: Mapping[Any, Any]
    best: Mapping[Any, Any]
    foreseen: Mapping[Any, Any]
    baseline: Mapping[Any, Any]
    error: float
    """Median of the absolute relative errors of predictions."""

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Verdict:
        """The rows of one case; the baseline sends all keys and values, and comes first."""
        rows = rows.reset_index(drop=True)
        chosen, best, foreseen = (rows[rows[name].astype(bool)].iloc[0].to_dict() for name in ("chosen", "best", "predicted_best"))
        first = rows.iloc[0]
        return cls(
            name=f"{first['llm']}, {layers_name(first['layers'])}, batch {first['batch']}, context {first['context']}",
            chosen=chosen,
            best=best,
            foreseen=foreseen,
            baseline=first.to_dict(),
            error=float(rows["error_pct"].abs().median()) / 100,
        )

    @property
    def regret(self) -> float:
        """Measured time of the choice over the measured best, less 1."""
        return float(self.chosen["measured_s"] / self.best["measured_s"] - 1)

    @property
    def tie(self) -> bool:
        """Whether choice and best are no further apart than either's runs are."""
        return _tied(self.chosen, self.best)

    def gain(self, without: str) -> str:
        """What the choice saves against the baseline, for a sentence; no more is said than the spread of the runs allows."""
        if self.baseline["chosen"]:
            return f"the choice is {without}"
        if _tied(self.chosen, self.baseline):
            return f"the choice takes as long as {without}, within the spread"
        return f"the choice takes {abs(self.cut):.1%} {'less' if self.cut >= 0 else 'more'} time than {without}"

    @property
    def cut(self) -> float:
        """Share of the decode step without recomputation that the choice saves; below 0 if it is slower."""
        return float(1 - self.chosen["measured_s"] / self.baseline["measured_s"])


def _tied(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return bool(abs(one["measured_s"] - other["measured_s"]) <= max(one["spread_s"], other["spread_s"]))


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """One for each case."""
    return [Verdict.of(rows) for _, rows in frame.groupby(CASE, sort=False, dropna=False)]


def meaning(frame: pd.DataFrame, column: str, text: Callable[[Any], str], without: str) -> list[str]:
    """What the rows say, a line for each case and for all; ``column`` is the decision, ``without`` names the baseline."""
    found, lines = verdicts(frame), []
    for one in found:
        regret = "none" if not one.regret else f"{one.regret:.1%}" + (", a tie: within the spread" if one.tie else "")
        lines += [
            f"{one.name}: chosen {text(one.chosen[column])}, predicted best of all tried {text(one.foreseen[column])}, "
            f"measured best {text(one.best[column])}.",
            f"    Regret {regret}; median error of the predicted time {one.error:.1%}; {one.gain(without)}.",
        ]
    beyond = [one.regret for one in found if not one.tie]
    lines.append(
        f"Median error of all {len(frame)} predicted times {frame['error_pct'].abs().median():.2g} %; "
        + (f"regret of the choice {max(beyond):.1%} at most" if beyond else "no regret beyond the spread")
        + f", with {len(found) - len(beyond)} of {len(found)} choices the measured best or tied with it."
    )
    if set(frame["llm"]) == {TINY.name}:
        lines.append(f"Steps of {TINY.name} are so short that starting a transfer counts: it shows that plans run, not how long they take.")
    drift = float(frame["drift_pct"].max())
    if drift > BUSY:
        lines.append(
            f"After the runs the parts of a layer took up to {drift:.0f} % more or less time than before: the machine was busy with other "
            "work, no prediction could be better than that, and what is said above is as uncertain: run it again on a quiet machine."
        )
    return [*lines, *_tokens_meaning(frame, without)]


def sheet_meaning(frame: pd.DataFrame, column: str, text: Callable[[Any], str]) -> list[str]:
    """How far the data sheet alone is off, and what it would have chosen; nothing if it predicts nothing."""
    lines = []
    for one, (_, rows) in zip(verdicts(frame), frame.groupby(CASE, sort=False, dropna=False), strict=True):
        known = rows.dropna(subset=["sheet_s"])
        if len(known):
            off = 100 * (known["sheet_s"] / known["measured_s"] - 1).abs().median()
            choice = known.iloc[int(known["sheet_s"].astype(float).to_numpy().argmin())]
            loss = choice["measured_s"] / one.best["measured_s"] - 1
            lines.append(
                f"{one.name}: by the data sheet alone {text(choice[column])} would be best, which takes {loss:.1%} more than the best; "
                f"its times, without embedding, LM head and choice of the token, are {off:.0f} % off (median)."
            )
    return lines


def _tokens_meaning(frame: pd.DataFrame, without: str) -> list[str]:
    """Whether tokens differ, and whether rounding explains it."""
    unstable = int((~frame["tokens_stable"].astype(bool)).sum())
    if unstable:
        return [
            f"In {unstable} of {len(frame)} rows tokens changed from one run of a plan to the next, as if something was read before it had "
            "arrived: a defect, please report it."
        ]
    beyond = frame[frame["logits_off"] > frame["rounding"]]
    other = frame[~frame["tokens_equal"].astype(bool)]
    if len(beyond):
        worst = beyond.sort_values("logits_off").iloc[-1]
        return [
            f"In {len(beyond)} of {len(frame)} rows logits are up to {worst['logits_off']:.2g} of their standard deviations off those of "
            f"{without}, and rounding explains about {worst['rounding']:.2g}: a defect, please report it."
        ]
    if other.empty:
        return []
    lead, off = other["token_lead"].max(), other["logits_off"].max()
    return [
        f"In {len(other)} of {len(frame)} rows tokens differ from those of {without}, which led by {lead:.2g} standard deviations of "
        f"logits at most: no error, as products of another shape are rounded otherwise, which moves logits by up to {off:.2g} here; up to "
        f"about {other['rounding'].min():.2g} is rounding."
    ]


def largest_case(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the case with the most tokens of state, which a picture shows."""
    cases = [rows for _, rows in frame.groupby(CASE, sort=False, dropna=False)]
    return max(cases, key=lambda rows: int(rows["batch"].iloc[0] * rows["context"].iloc[0]))


def report(
    frame: pd.DataFrame, out: Path, picture: Path, *, columns: Sequence[str], text: Callable[[Any], str], without: str, x: str
) -> None:
    """A table for each case, what all rows say, and a picture of the largest; the first of ``columns`` is the decision, drawn as ``x``."""
    print(f"Written: {out}")
    show_cases(frame, columns)
    print()
    for line in [*meaning(frame, columns[0], text, without), *sheet_meaning(frame, columns[0], text)]:
        print(line)
    draw(frame, picture, columns[0], x)
    print(f"Written: {picture}")


def draw(frame: pd.DataFrame, picture: Path, decision: str, x: str) -> None:
    """Predicted and measured time of a step against the column ``decision``, named ``x``, of the case with the most tokens of state.

    The band is as wide as the spread of the runs; a marker is on the plan that was chosen.
    """
    rows = largest_case(frame)
    rows = rows.rename(columns={decision: x})
    half, chosen = rows["spread_s"] / 2, rows[rows["chosen"].astype(bool)]
    lines = [
        rows[[x]].assign(decode_step_s=rows["predicted_s"], time="predicted", low=rows["predicted_s"], high=rows["predicted_s"]),
        rows[[x]].assign(decode_step_s=rows["measured_s"], time="measured", low=rows["measured_s"] - half, high=rows["measured_s"] + half),
        chosen[[x]].assign(decode_step_s=chosen["measured_s"], time="chosen", low=chosen["measured_s"], high=chosen["measured_s"]),
    ]
    plot_lines(
        pd.concat(lines),
        picture,
        x=x,
        y="decode_step_s",
        by="time",
        title=f"{Verdict.of(rows).name}: a decode step",
        band=("low", "high"),
        band_label="spread",
        markers_only=("chosen",),
        linear=(x, "decode_step_s"),
    )
    if len(verdicts(frame)) > 1:
        print(f"The picture shows the largest case: {Verdict.of(rows).name}.")


def show_cases(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """A table for each case, with the data sheet's times if it gave any."""
    columns = [*columns, *(["sheet_s"] if frame["sheet_s"].notna().any() else [])]
    for one, (_, rows) in zip(verdicts(frame), frame.groupby(CASE, sort=False, dropna=False), strict=True):
        link = f"{rows['link_kind'].iloc[0]} link at {rows['link_GBps'].iloc[0]:.3g} GB/s"
        show(rows[list(columns)], title=f"{one.name}, {rows['dtype'].iloc[0]} on {rows['device_name'].iloc[0]}, {link}")
