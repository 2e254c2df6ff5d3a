"""How far are predicted kernel and step times from measured ones, on shapes that nothing was fitted on?

    memsplit study fidelity --data FOLDER        FOLDER/calibration was fitted on, FOLDER/devtest is scored

Each file of FOLDER/devtest is predicted by ``datasheet``, the bound without any fit; by ``naive_median``, the bound times one factor,
``roofline``, three parameters (shares of bandwidth and peak, a launch), and ``trees``, gradient-boosted trees of all columns, which are
fitted here on FOLDER/calibration; by ``shipped``, the kernel model with the record that comes with memsplit; and by ``family``, the same
with the record of another device of the family (what is about the power of a card does not carry over, ``Calibration.values_on``).

A set may take minutes: after Ctrl-C, those that were finished are written. Without --data some dozen rows that come with memsplit are
scored, by what needs no fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from memsplit import __version__
from memsplit.dse import (
    INTERRUPTED,
    MeasuredSet,
    finished_rows,
    measured_sets,
    ranking,
    read_measurements,
    read_table,
    show,
    study_arguments,
    write_csv,
)
from memsplit.models import Calibration, Error, RooflineTime, device_named, error_of, record_for, shipped_records
from memsplit.solvers import fit

SAMPLE = Path(__file__).parent / "data" / "measured_sample.csv"
"""Rows with their sources, of shapes that nothing was fitted on."""

FEWEST = 5
"""Rows of a set that are held against a bar."""

SEEDS = (0, 1, 2)
"""Of what is random: the trees."""


class Bar(NamedTuple):
    """What the shipped model of ``kernel`` is to stay below for these variants and devices (none named: all), in per cent."""

    kernel: str
    variants: tuple[str, ...]
    devices: tuple[str, ...]
    mape_pct: float
    median_pct: float | None = None

    def holds_for(self, kernel: str, variant: str, device: str) -> bool:
        """Whether this is the bar of a set."""
        return self.kernel == kernel and (not self.variants or variant in self.variants) and (not self.devices or device in self.devices)


BARS = (
    Bar("gemm", ("bf16",), ("A100-SXM-80GB", "H100-SXM"), 6.5, 4.5),
    Bar("gemm", ("bf16",), ("H200-SXM",), 9.2, 7.2),
    Bar("gemm", ("bf16",), ("L40S",), 12.6, 8.2),
    Bar("decode_attention", ("vllm", "sglang"), ("H100-SXM", "H200-SXM"), 7.0, 5.0),
    Bar("decode_attention", ("vllm",), ("A100-SXM-80GB",), 10.0, 7.0),
    Bar("prefill_attention", (), (), 10.0, 7.0),
    Bar("serving", (), (), 5.0),
    Bar("offload", (), (), 8.0),
)
"""Goals that were set before the models were made. Those of GEMM on H200 and L40S are what simple models reach."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study: a row for each measured set and model."""
    arguments = study_arguments(__doc__ or "", argv, default_out="fidelity.csv", extra=_arguments)
    if arguments.data is None:
        parts = list(_sample())
        print(f"Without --data only {sum(len(part.measurements) for part in parts)} rows that come with memsplit are scored.")
        known: dict[Any, MeasuredSet] = {}
    else:
        scored, unknown = measured_sets(arguments.data / "devtest")
        fitted, _ = measured_sets(arguments.data / "calibration")
        known = {_key(one): one for one in fitted}
        parts = list(scored)
        for sentence in unknown:
            print(f"Not scored: {sentence}", file=sys.stderr)
    if arguments.quick:
        parts = parts[:: max(1, len(parts) // 6)]
    if not parts:
        raise ValueError(
            f"nothing in {arguments.data / 'devtest'} can be scored; put files of public measurements there, or leave out --data"
        )

    def scored_parts() -> Iterator[list[dict[str, Any]]]:
        for place, part in enumerate(parts, start=1):
            each = part.measurements
            name = " ".join(filter(None, (part.device.name, each.model.name, each.model.variant)))
            print(f"{place} of {len(parts)}: {name}, {len(each)} rows", file=sys.stderr, flush=True)
            yield rows_of(part, known.get(_key(part)), trees=not arguments.quick)

    finished, interrupted = finished_rows(scored_parts())
    frame = pd.DataFrame([row for rows in finished for row in rows])
    write_csv(arguments.out, frame.assign(version=__version__), provenance={"records": [record.source for record in shipped_records()]})
    print(f"Written: {arguments.out}")
    if interrupted:
        return INTERRUPTED
    show(
        summary(frame),
        title="Mean error [% of the measured time]; inside_pct: rows within the interval of the shipped record",
        rows=200,
    )
    if arguments.data is None:
        print("\nSo few rows say little: name the folder of the measurements with --data.")
        return 0
    print()
    print(verdicts(frame))
    ranked = decisions(list(known.values()), parts)
    if len(ranked):
        show(ranked, title="Does the model rank offloading policies as measured? Kendall's tau, and what its choice loses of the best")
    return 0


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder with calibration/ and devtest/, CSVs of public measurements")


def _sample() -> Iterator[MeasuredSet]:
    """The rows that come with memsplit, by device."""
    for device in dict.fromkeys(read_table(SAMPLE)["measured_on"]):
        for part in read_measurements(SAMPLE, measured_on=device):
            yield MeasuredSet(file=SAMPLE.name, source="see the file", device=device_named(device), measurements=part)


def _key(part: MeasuredSet) -> tuple[str, str, str, str]:
    return part.file, part.device.name, part.measurements.model.name, part.measurements.model.variant


def rows_of(part: MeasuredSet, fitted: MeasuredSet | None, *, trees: bool = True) -> list[dict[str, Any]]:
    """The errors of every model on one set; what has to be fitted, on ``fitted``."""
    each, device = part.measurements, part.device
    bound = each.model.bound(device, each.shapes)
    guesses: list[tuple[str, str, int | None, Any, float | None]] = [("datasheet", "datasheet", None, bound, None)]
    if fitted is not None:
        guesses += [(*learned, None) for learned in _learned(part, fitted, bound, trees=trees)]
    for name, record in _records(part):
        profile = "calibrated" if record.device == device.name else f"calibrated on {record.device}"
        found = record.predict(each.model, device, each.shapes)
        inside = None
        if np.isfinite(found.high).all():
            inside = 100 * float(((found.low <= each.seconds) & (each.seconds <= found.high)).mean())
        guesses.append((name, profile, None, found.seconds, inside))
    known = {"device": device.name, "kernel": each.model.name, "variant": each.model.variant}
    rows = []
    for model, profile, seed, seconds, inside in guesses:
        error: Error = error_of(seconds, each.seconds, bound)
        row: dict[str, Any] = known | {"model": model, "profile": profile, "seed": seed}
        rows.append(row | error._asdict() | {"inside_pct": inside, "dropped": part.dropped, "file": part.file})
    return rows


def _records(part: MeasuredSet) -> Iterator[tuple[str, Calibration]]:
    """The record that is shipped for this device, and one of another device of its family."""
    model, device = part.measurements.model, part.device
    shipped = record_for(model, device)
    if shipped is not None:
        yield "shipped" if shipped.device == device.name else "family", shipped
    if shipped is not None and shipped.device == device.name:
        other = record_for(model, device, [record for record in shipped_records() if record.device != device.name])
        if other is not None:
            yield "family", other


def _learned(part: MeasuredSet, fitted: MeasuredSet, bound: Any, *, trees: bool) -> Iterator[tuple[str, str, int | None, Any]]:
    """What a fit on the calibration rows alone makes of a set: one factor, three parameters, trees."""
    each, other = part.measurements, fitted.measurements
    learned = other.model.bound(part.device, other.shapes)
    yield "naive_median", "calibrated", None, bound * float(np.median(other.seconds / learned))
    simple = RooflineTime(of=each.model)
    record = fit(simple, part.device, other.shapes, other.seconds, folds=0)
    yield "roofline", "calibrated", None, np.maximum(simple.seconds(part.device, each.shapes, record.values), bound)
    if not trees:
        return
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        print("Trees are left out: they need scikit-learn (pip install scikit-learn).", file=sys.stderr)
        return
    inputs = [_features(one.measurements, one.device) for one in (fitted, part)]
    for seed in SEEDS:
        leaf = int(np.clip(len(learned) // 20, 2, 20))  # else trees of few rows have no branches
        grown = HistGradientBoostingRegressor(
            loss="absolute_error", max_iter=300, early_stopping=False, min_samples_leaf=leaf, max_features=0.7, random_state=seed
        )
        with threadpool_limits(limits=1):  # threads that wait for each other on a busy machine took twenty times as long
            grown.fit(inputs[0], np.log(other.seconds / learned))
            guess = grown.predict(inputs[1])
        yield "trees", "calibrated", seed, bound * np.exp(guess)


def _features(each: Any, device: Any) -> Any:
    """Logarithms of all numbers, texts as hashes that are the same in every run, and the data sheet's seconds."""
    columns = []
    for name in each.model.columns:
        column = each.shapes[name]
        if name in each.model.texts:
            names = {text: sum(map(ord, text)) for text in set(column.tolist())}
            columns.append(np.array([names[text] for text in column.tolist()], dtype=np.float64))
        else:
            columns.append(np.log1p(column))
    work = each.model.work(device, each.shapes)
    return np.column_stack([*columns, *(np.log(np.maximum(seconds, 1e-12)) for seconds in work)])


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean errors by set, a column for each model."""
    keys = ["device", "kernel", "variant", "file", "rows"]
    inside = frame[frame["model"] == "shipped"].set_index(["file", "device", "variant"])["inside_pct"]
    order = [name for name in ("datasheet", "naive_median", "roofline", "shipped", "family", "trees") if name in set(frame["model"])]
    table = frame.assign(variant=frame["variant"].fillna("")).pivot_table(index=keys, columns="model", values="mape_pct", sort=False)
    table = table[order].reset_index()
    where = list(zip(table["file"], table["device"], table["variant"], strict=True))
    held: list[Any] = [inside.get(place) for place in where]
    return table.assign(inside_pct=held).drop(columns="file")


def verdicts(frame: pd.DataFrame) -> str:
    """Which goals are met by the shipped records."""
    lines = []
    for _, row in frame[frame["model"] == "shipped"].iterrows():
        variant = "" if pd.isna(row["variant"]) else str(row["variant"])
        bar = next((bar for bar in BARS if bar.holds_for(row["kernel"], variant, row["device"])), None)
        if bar is None:
            continue
        goal = f"{bar.mape_pct:g}" + ("" if bar.median_pct is None else f" / {bar.median_pct:g}")
        reached = f"{row['mape_pct']:.1f} % / {row['median_pct']:.1f} % (mean / median)"
        name = " ".join(filter(None, (row["kernel"], variant, "on", row["device"])))
        if row["rows"] < FEWEST:
            lines.append(f"{name}: {reached} on {row['rows']} rows, too few for a bar.")
            continue
        met = row["mape_pct"] < bar.mape_pct and (bar.median_pct is None or row["median_pct"] < bar.median_pct)
        lines.append(f"{name}: {reached}; bar {goal} {'met' if met else 'NOT met'}.")
    return "\n".join(lines) if lines else "None of the rows has a bar."


def decisions(fitted: Sequence[MeasuredSet], scored: Sequence[MeasuredSet]) -> pd.DataFrame:
    """How policies of offloading are ranked, for each GPU, LLM and workload with three or more of them: by generated tokens a second."""
    rows = []
    for part, unseen in [(one, False) for one in fitted] + [(one, True) for one in scored]:
        each = part.measurements
        record = record_for(each.model, part.device) if each.model.name == "offload" else None
        if record is None:
            continue
        shapes = each.shapes
        tokens = shapes["gpu_batch"] * shapes["num_batches"] * np.where(shapes["phase"] == "step", 1, shapes["gen"])
        guesses = {
            "datasheet": each.model.bound(part.device, shapes),
            "calibrated": record.predict(each.model, part.device, shapes).seconds,
        }
        workload = [shapes[name].tolist() for name in ("device", "model", "phase", "prompt", "gen")]
        names = np.array([f"{gpu}, {llm}, {phase}, {prompt:g} + {gen:g}" for gpu, llm, phase, prompt, gen in zip(*workload, strict=True)])
        for name in dict.fromkeys(names.tolist()):
            chosen = names == name
            if chosen.sum() < 3:
                continue
            row: dict[str, Any] = {"runs": name, "policies": int(chosen.sum()), "unseen": unseen}
            for profile, seconds in guesses.items():
                tau, regret = ranking((tokens / each.seconds)[chosen], (tokens / seconds)[chosen])
                row |= {f"tau_{profile}": tau, f"regret_{profile}": regret}
            rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(main())
