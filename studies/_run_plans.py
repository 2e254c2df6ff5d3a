"""What the studies that run plans share: their options, the interleaved runs, and the comparison of predicted and measured times."""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from memsplit import __version__
from memsplit.dse import check_same_machine, finished_rows, positive, show, write_csv
from memsplit.dse import machine as profiles
from memsplit.dse.runtime import EmulatedLink, ExecutedPlan, LayerTimes, Runtime
from memsplit.models import LLMConfig, System, Workload
from memsplit.models.presets import LLMS, llm_named, system_named
from memsplit.models.units import GB

GENERATED = 7
"""Tokens of a run: the first decode step waits for loads that nothing hides, five are looked at."""

REPEATS = 15
"""Runs of each part of a layer that a prediction is made from."""

BUSY = 10.0
"""Per cent by which parts of a layer may change during the runs before it is said: what a prediction should be off by at most."""

SMALL = replace(
    LLMS["opt-125m"],
    name="small test LLM",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=512,
    vocab_size=512,
)
"""OPT's architecture in a size of our own, which a core recomputes a token in the time in which 1 GB/s brings a few: no published LLM."""

TINY = replace(
    SMALL, name="tiny test LLM", hidden_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=256
)
"""The same for --quick."""

QUICK = ((TINY,), (16,), (128,))
DEFAULTS = {
    "cpu": ((SMALL,), (32,), (256, 512)),
    "cuda": ((LLMS["opt-6.7b"], LLMS["opt-13b"]), (8, 16, 32, 64), (512, 1024, 2048, 4096)),
}
"""LLMs, requests and tokens a request, by device."""


def run_options(parser: argparse.ArgumentParser) -> None:
    """Add what is run, on what, and how often."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: with an emulated link (default: %(default)s)")
    parser.add_argument(
        "--llm",
        nargs="+",
        metavar="NAME",
        help=f"Hugging Face config.json or one of {', '.join(LLMS)}, with random weights (default: one of our own on a CPU, "
        "opt-6.7b and opt-13b on CUDA)",
    )
    parser.add_argument("--layers", type=positive, help="run so many layers only, as all are alike (default: all)")
    parser.add_argument("--batch", type=positive, nargs="+", help="requests (default: 32 on a CPU, 8 to 64 on CUDA)")
    parser.add_argument("--contexts", type=positive, nargs="+", help="tokens a prompt (default: 256 and 512, on CUDA 512 to 4096)")
    parser.add_argument("--points", type=positive, default=9, help="plans of a sweep, beside the chosen one (default: %(default)s)")
    parser.add_argument("--runs", type=positive, help="runs of each plan (default: 3 on a CPU, 5 on CUDA)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on a CPU, float16 on CUDA)")
    parser.add_argument("--link-GBps", type=float, metavar="GB/s", help="the link that is emulated on a CPU (default: 1)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of a CPU that compute (default: %(default)s)")
    parser.add_argument("--machine", metavar="TOML", help="a data sheet of this machine (memsplit profile), to compare its prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is run: ``llms`` cut to the layers asked for, and everything else that the rows of all cases have in common."""

    device: str
    llms: tuple[LLMConfig, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    points: int
    runs: int
    dtype: str
    link: EmulatedLink | None
    threads: int
    sheet: System | None
    seed: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Settings:
        """What the arguments say; ValueError, before any work, if it cannot be run at all: no PyTorch, no CUDA, no such LLM."""
        device, on_cuda, quick = arguments.device, arguments.device == "cuda", arguments.quick
        if on_cuda and arguments.link_GBps is not None:
            raise ValueError("--link-GBps: a CUDA device has a link of its own; leave it out")
        link = None if on_cuda else EmulatedLink(bandwidth=GB * (1.0 if arguments.link_GBps is None else arguments.link_GBps))
        llms, batches, contexts = QUICK if quick else DEFAULTS[device]
        if arguments.llm:
            llms = tuple(llm_named(name) for name in arguments.llm)
        contexts = tuple(dict.fromkeys(arguments.contexts or contexts))
        with Runtime(TINY, device=device):  # is there what all cases need?
            pass
        return cls(
            device=device,
            llms=tuple(_cut(llm, arguments.layers, max(contexts) + GENERATED) for llm in dict.fromkeys(llms)),
            batches=tuple(dict.fromkeys(arguments.batch or batches)),
            contexts=contexts,
            points=min(arguments.points, 2) if quick else arguments.points,
            runs=arguments.runs or (5 if on_cuda else 3),
            dtype=arguments.dtype or ("float16" if on_cuda else "float32"),
            link=link,
            threads=arguments.threads,
            sheet=_sheet(arguments.machine),
            seed=arguments.seed,
        )

    def columns(self) -> dict[str, Any]:
        """What every row says of the machine and of the study."""
        machine = profiles.this_machine(self.device)
        driver = re.search(r"driver ([\d.]+)", machine.software)
        return {
            "device_name": machine.gpu if self.device == "cuda" else machine.title,
            "link_kind": "emulated" if self.link else "real",
            "threads": None if self.device == "cuda" else self.threads,
            "torch": _version("torch"),
            "driver": driver[1] if driver else None,
            "software": machine.software,
            "date": str(date.today()),
            "runs": self.runs,
            "seed": self.seed,
            "version": __version__,
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cut(llm: LLMConfig, layers: int | None, rows: int) -> LLMConfig:
    """The LLM with so many layers, and with as many learned positions as the longest run needs: weights are random anyway."""
    held = llm.num_hidden_layers if layers is None else min(layers, llm.num_hidden_layers)
    positions = llm.max_position_embeddings and max(llm.max_position_embeddings, rows + 2)
    return replace(llm, num_hidden_layers=held, max_position_embeddings=positions)


def _sheet(name: str | None) -> System | None:
    if name is None:
        return None
    system = system_named(name)
    if warning := check_same_machine(system):
        print(f"warning: {warning}", file=sys.stderr)
    return system


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One LLM, batch and context in a runtime."""

    runtime: Runtime
    settings: Settings
    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of state of a request in the middle of the steps that are looked at."""
        return self.context + GENERATED // 2

    @property
    def llm(self) -> LLMConfig:
        """What is decoded."""
        return self.runtime.llm

    @property
    def name(self) -> str:
        """For sentences."""
        return case_name(self.llm, self.batch, self.context)

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 4 if self.settings.dtype == "float32" else 2

    def workload(self) -> Workload:
        """A decode step in the middle, as the library's problems take it."""
        bits = 8 * self.size
        return Workload(llm=self.llm, batch=self.batch, context=self.tokens, weight_bits=bits, kv_bits=bits, activation_bits=bits)

    def layer_times(self) -> LayerTimes:
        """The parts of a layer, measured."""
        return self.runtime.layer_times(self.batch, self.context, repeats=REPEATS)

    def drift(self, before: LayerTimes) -> float:
        """By what share the parts that decide have changed since ``before`` at most: measured again."""
        again = self.layer_times()
        pairs = [(getattr(before, part), getattr(again, part)) for part in ("kv", "act", "recompute", "compute")]
        return max(max(pair) / min(pair) - 1 if min(pair) > 0 else 0.0 for pair in pairs)

    def link_rate(self, times: LayerTimes) -> float:
        """B/s at which the keys and values of a layer were sent."""
        return self.size * self.llm.state_elements * self.batch * self.context / times.kv if times.kv else float("inf")

    def columns(self, times: LayerTimes) -> dict[str, Any]:
        """What the rows of the case have in common."""
        return {
            "device": self.settings.device,
            "llm": self.llm.name,
            "layers": self.llm.num_hidden_layers,
            "dtype": self.settings.dtype,
            "batch": self.batch,
            "context": self.context,
            "link_GBps": self.link_rate(times) / GB,
            "kv_s": times.kv,
            "act_s": times.act,
            "recompute_s": times.recompute,
            "compute_s": times.compute,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }


def case_name(llm: LLMConfig, batch: int, context: int) -> str:
    """For sentences."""
    return f"{llm.name}, {_layers(llm.num_hidden_layers)}, batch {batch}, context {context}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count > 1 else ''}"


@dataclass(slots=True, kw_only=True, eq=False)
class _Runs:
    """What the runs of one plan gave: median decode steps, tokens, and the largest memory peak."""

    tokens: NDArray[np.int64]
    seconds: list[float]
    peak: int


def measured(case: Case, plans: Sequence[ExecutedPlan], *, reference: int = 0) -> list[dict[str, Any]]:
    """The measured columns of each plan: a warm-up of all plans, then rounds in which each plan runs once, in random order.

    A run's time is the median of its decode steps after the first; a plan's the median of its runs, with their interquartile range as
    ``spread_s``. ``tokens_equal``: whether a plan's tokens were in every run those of plan ``reference`` in the warm-up.
    """
    runtime, settings = case.runtime, case.settings
    prompts = runtime.random_prompts(case.batch, case.context, seed=settings.seed)
    random = np.random.default_rng(settings.seed)
    found: dict[int, _Runs] = {}
    rounds = [(turn, index) for turn in range(settings.runs + 1) for index in random.permutation(len(plans)).tolist()]
    equal = dict.fromkeys(range(len(plans)), True)
    for turn, index in tqdm(rounds, desc=case.name, unit="run", leave=False, disable=None):
        run = runtime.generate(prompts, GENERATED, plans[index])
        if not turn:
            found[index] = _Runs(tokens=run.tokens, seconds=[], peak=run.peak_device_bytes)
            continue
        one = found[index]
        one.seconds.append(statistics.median(run.step_seconds[1:]))
        one.peak = max(one.peak, run.peak_device_bytes)
        equal[index] &= bool(np.array_equal(run.tokens, one.tokens))
    return [
        {
            "measured_s": statistics.median(one.seconds),
            "spread_s": float(np.subtract(*np.percentile(one.seconds, [75, 25]))),
            "tokens_equal": equal[index] and bool(np.array_equal(one.tokens, found[reference].tokens)),
            "peak_device_GB": one.peak / GB,
        }
        for index, one in sorted(found.items())
    ]


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
            name=f"{first['llm']}, {_layers(first['layers'])}, batch {first['batch']}, context {first['context']}",
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
        return bool(self.chosen["measured_s"] - self.best["measured_s"] <= max(self.chosen["spread_s"], self.best["spread_s"]))

    @property
    def cut(self) -> float:
        """Share of the decode step without recomputation that the choice saves; below 0 if it is slower."""
        return float(1 - self.chosen["measured_s"] / self.baseline["measured_s"])


CASE = ["device_name", "llm", "layers", "dtype", "template", "weights", "batch", "context"]
"""Columns whose values are those of one case."""


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """One for each case."""
    return [Verdict.of(rows) for _, rows in frame.groupby(CASE, sort=False)]


def meaning(frame: pd.DataFrame, column: str, text: Callable[[Any], str], without: str) -> list[str]:
    """What the rows say, a line for each case and for all; ``column`` is the decision, ``without`` names the baseline."""
    found, lines = verdicts(frame), []
    for one in found:
        regret = "none" if not one.regret else f"{one.regret:.1%}" + (", a tie: within the spread" if one.tie else "")
        lines += [
            f"{one.name}: chosen {text(one.chosen[column])}, predicted best of all tried {text(one.foreseen[column])}, "
            f"measured best {text(one.best[column])}.",
            f"    Regret {regret}; median error of the predicted time {one.error:.1%}; "
            f"the choice takes {abs(one.cut):.1%} {'less' if one.cut >= 0 else 'more'} time than {without}.",
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
            f"After the runs the parts of a layer took up to {drift:.2g} % more or less time than before: the machine was busy with other "
            "work, and no prediction could be better than that."
        )
    other = int((~frame["tokens_equal"].astype(bool)).sum())
    if other:
        exact = "a defect: please report it" if set(frame["dtype"]) == {"float32"} else "sums in half precision depend on their order"
        lines.append(f"In {other} of {len(frame)} rows the tokens differ from those of {without}: {exact}.")
    return lines


def all_cases(settings: Settings, rows_of: Callable[[Case], list[dict[str, Any]]], skipped: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case; those that cannot be run are named in ``skipped`` and on stderr, and the others go on."""
    for llm in settings.llms:
        listed = [(batch, context) for batch in settings.batches for context in settings.contexts]
        try:
            runtime = Runtime(
                llm,
                device="cuda" if settings.device == "cuda" else "cpu",
                dtype=settings.dtype,
                seed=settings.seed,
                link=settings.link,
                threads=settings.threads,
            )
        except ValueError as error:
            _skip(skipped, f"{llm.name}, {_layers(llm.num_hidden_layers)}", error)
            continue
        with runtime:
            for batch, context in listed:
                case = Case(runtime=runtime, settings=settings, batch=batch, context=context)
                try:
                    yield rows_of(case)
                except ValueError as error:
                    _skip(skipped, case.name, error)
                except (MemoryError, RuntimeError) as error:  # PyTorch's own where a part of a layer is measured
                    if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                        raise
                    _skip(skipped, case.name, ValueError("memory ran out; serve fewer prompts"))


def _skip(skipped: list[str], name: str, error: ValueError) -> None:
    skipped.append(f"{name}: {' '.join(str(error).split())}")
    print(f"skipped: {skipped[-1]}", file=sys.stderr)


def table_of(
    arguments: argparse.Namespace, settings: Settings, rows_of: Callable[[Case], list[dict[str, Any]]]
) -> tuple[pd.DataFrame, bool]:
    """The table of all cases that could be run, written to ``arguments.out``, and whether Ctrl-C ended it; empty if there is none."""
    skipped: list[str] = []
    cases, interrupted = finished_rows(all_cases(settings, rows_of, skipped))
    frame = pd.DataFrame([row for rows in cases for row in rows])
    if len(frame):
        frame = frame.assign(**settings.columns())
        sheet = {} if settings.sheet is None else {"system": settings.sheet}
        write_csv(arguments.out, frame, provenance={"llms": list(settings.llms), "skipped": skipped, **sheet})
    return frame, interrupted


def largest_case(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the case with the most tokens of state, which a picture shows."""
    cases = [rows for _, rows in frame.groupby(CASE, sort=False)]
    return max(cases, key=lambda rows: int(rows["batch"].iloc[0] * rows["context"].iloc[0]))


def show_cases(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """A table for each case."""
    for one, (_, rows) in zip(verdicts(frame), frame.groupby(CASE, sort=False), strict=True):
        link = f"{rows['link_kind'].iloc[0]} link at {rows['link_GBps'].iloc[0]:.3g} GB/s"
        show(rows[list(columns)], title=f"{one.name}, {rows['dtype'].iloc[0]} on {rows['device_name'].iloc[0]}, {link}")
