"""What the studies that run plans share: their options, the interleaved runs, and the table that is written after each case."""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from memsplit import __version__
from memsplit.dse import INTERRUPTED, check_same_machine, finished_rows, positive, write_csv
from memsplit.dse import machine as profiles
from memsplit.dse.runtime import EmulatedLink, ExecutedPlan, Generation, LayerTimes, Runtime
from memsplit.models import LLMConfig, System, Workload
from memsplit.models.offload import WeightsOn
from memsplit.models.presets import LLMS, llm_named, system_named
from memsplit.models.units import GB

GENERATED = 7
"""Tokens of a run: the first decode step waits for loads that nothing hides, five are looked at."""

LEAST_RUNS = 3
"""Of each plan: fewer have no spread, without which noise would be called regret."""

LONGEST = 2**22
"""Tokens of a prompt: more than any published LLM has positions for."""

MOST_POINTS = 1000
"""Plans of a sweep, which are each run several times."""

REPEATS = 15
"""Runs of each part of a layer that a prediction is made from."""

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
    parser.add_argument("--runs", type=positive, help=f"runs of each plan, at least {LEAST_RUNS} (default: 3 on a CPU, 5 on CUDA)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on a CPU, float16 on CUDA)")
    parser.add_argument("--link-GBps", type=float, metavar="GB/s", help="the link that is emulated on a CPU (default: 1)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of a CPU that compute (default: %(default)s)")
    parser.add_argument(
        "--machine", metavar="TOML", help="a data sheet of this machine with device, host and link, to compare its prediction"
    )


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
        runs = arguments.runs or (5 if on_cuda else 3)
        if runs < LEAST_RUNS:
            raise ValueError(
                f"--runs must be at least {LEAST_RUNS}, not {runs}, as regret counts beyond the runs' spread; run each more often"
            )
        link = None if on_cuda else EmulatedLink(bandwidth=GB * (1.0 if arguments.link_GBps is None else arguments.link_GBps))
        llms, batches, contexts = QUICK if quick else DEFAULTS[device]
        if arguments.llm:
            llms = tuple(llm_named(name) for name in arguments.llm)
        contexts = tuple(dict.fromkeys(arguments.contexts or contexts))
        for option, most, given in (("contexts", LONGEST, max(contexts)), ("points", MOST_POINTS, arguments.points)):
            if given > most:
                raise ValueError(f"--{option} must be at most {most}, not {given}; ask for less")
        with Runtime(TINY, device=device):  # is there what all cases need?
            pass
        return cls(
            device=device,
            llms=tuple(_cut(llm, arguments.layers, max(contexts) + GENERATED) for llm in dict.fromkeys(llms)),
            batches=tuple(dict.fromkeys(arguments.batch or batches)),
            contexts=contexts,
            points=min(arguments.points, 3) if quick else arguments.points,
            runs=runs,
            dtype=arguments.dtype or ("float16" if on_cuda else "float32"),
            link=link,
            threads=arguments.threads,
            sheet=_sheet(arguments.machine),
            seed=arguments.seed,
        )

    @property
    def most_runs(self) -> int:
        """Runs of a case at most: the plans of the sweep and the chosen one, each once more to warm up."""
        return (self.points + 1) * (self.runs + 1)

    @property
    def cases(self) -> list[tuple[LLMConfig, int, int]]:
        """LLM, batch and context of each case."""
        return [(llm, batch, context) for llm in self.llms for batch in self.batches for context in self.contexts]

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
    if positions > llm.max_position_embeddings:
        print(
            f"note: {llm.name} has a table of {llm.max_position_embeddings} learned positions; it is run with one of {positions}, random "
            "like all weights, which changes no time",
            file=sys.stderr,
        )
    dense = min(llm.num_dense_layers, held)
    return replace(llm, num_hidden_layers=held, num_dense_layers=dense, max_position_embeddings=positions)


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
    bar: Any = None
    """A progress bar, which a run moves on by the case's weight."""

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

    def layer_times(self, weights: WeightsOn) -> LayerTimes:
        """The parts of a layer, measured with all weights where the plans have them."""
        return self.runtime.layer_times(self.batch, self.context, weights=weights, repeats=REPEATS)

    def drift(self, before: LayerTimes, weights: WeightsOn) -> float:
        """By what share the parts that decide have changed since ``before`` at most: measured again."""
        again = self.layer_times(weights)
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
            "rounding": rounding(self.llm, self.settings.dtype),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }


def case_name(llm: LLMConfig, batch: int, context: int) -> str:
    """For sentences."""
    return f"{llm.name}, {layers_name(llm.num_hidden_layers)}, batch {batch}, context {context}"


def layers_name(count: int) -> str:
    """For sentences."""
    return f"{count} layer{'s' if count > 1 else ''}"


def case_weight(llm: LLMConfig, batch: int, context: int) -> int:
    """Elements of state, about which the time of a run grows: what a progress bar counts."""
    return llm.num_hidden_layers * llm.state_elements * batch * context


def rounding(llm: LLMConfig, dtype: str) -> float:
    """By how many of their standard deviations logits may be apart when sums are rounded in another order: an estimate.

        8 sqrt(16 layers) u      u = 2^-11 for float16, 2^-8 for bfloat16, 2^-24 sqrt(intermediate_size) for float32

    Sixteen roundings a layer by u, each as likely up as down; eight is what the most of some million numbers are off. Products of halves
    are added in single precision and rounded once; in single precision each of a sum's additions is rounded.
    """
    unit = {"float16": 2**-11, "bfloat16": 2**-8}.get(dtype, 2**-24 * math.sqrt(llm.intermediate_size))
    return 8 * math.sqrt(16 * llm.num_hidden_layers) * unit


def _apart(run: Generation, reference: Generation) -> dict[str, float | None]:
    """How far the logits of two runs are apart while all tokens before are equal, and by how much the reference's token led the one that
    the other run chose in its place; both in standard deviations of logits, the lead None where no token differs."""
    if run.logits is None or reference.logits is None or not (np.isfinite(run.logits).all() and np.isfinite(reference.logits).all()):
        raise ValueError("logits are not finite numbers, so that tokens say nothing; choose a --dtype of a wider range, as bfloat16")
    differs = run.tokens != reference.tokens
    alike = np.cumsum(differs, axis=1) - differs == 0
    scale = float(reference.logits.std())
    found = np.abs(run.logits - reference.logits).max(axis=-1)[alike].max()
    first = alike & differs
    there, here = (np.take_along_axis(reference.logits, one.tokens[..., None], axis=-1)[..., 0][first] for one in (reference, run))
    return {"logits_off": float(found) / scale, "token_lead": float((there - here).max()) / scale if first.any() else None}


@dataclass(slots=True, kw_only=True, eq=False)
class _Runs:
    """What the runs of one plan gave: tokens and comparison of the warm-up, whether the later ones gave them again, median decode steps,
    and the largest memory peak."""

    tokens: NDArray[np.int64]
    apart: dict[str, float | None]
    seconds: list[float]
    stable: bool = True
    peak: int = 0


def measured(case: Case, plans: Sequence[ExecutedPlan]) -> list[dict[str, Any]]:
    """The measured columns of each plan: a warm-up of all plans, then rounds in which each plan runs once, in random order.

    A run's time is the median of its decode steps after the first; a plan's the median of its runs, with their interquartile range as
    ``spread_s``. ``tokens_stable``: whether every run of a plan gave the tokens of its warm-up; ``tokens_equal``: and whether those are
    the first plan's; how far the logits of the warm-ups are apart: ``logits_off`` and ``token_lead``, see ``_apart``.
    """
    settings = case.settings
    prompts = case.runtime.random_prompts(case.batch, case.context, seed=settings.seed)
    random = np.random.default_rng(settings.seed)

    def generate(plan: ExecutedPlan, logits: bool = False) -> Generation:
        run = case.runtime.generate(prompts, GENERATED, plan, logits=logits)
        if case.bar is not None:
            case.bar.update(case_weight(case.llm, case.batch, case.context))
        return run

    reference = generate(plans[0], logits=True)
    found = [_Runs(tokens=reference.tokens, apart=_apart(reference, reference), seconds=[])]
    for plan in plans[1:]:
        run = generate(plan, logits=True)
        found.append(_Runs(tokens=run.tokens, apart=_apart(run, reference), seconds=[]))
    for _ in range(settings.runs):
        for index in random.permutation(len(plans)).tolist():
            run, one = generate(plans[index]), found[index]
            one.seconds.append(statistics.median(run.step_seconds[1:]))
            one.peak = max(one.peak, run.peak_device_bytes)
            one.stable &= bool(np.array_equal(run.tokens, one.tokens))
    return [
        {
            "measured_s": statistics.median(one.seconds),
            "spread_s": float(np.subtract(*np.percentile(one.seconds, [75, 25]))),
            "tokens_stable": one.stable,
            "tokens_equal": one.stable and bool(np.array_equal(one.tokens, reference.tokens)),
            "peak_device_GB": one.peak / GB,
        }
        | one.apart
        for one in found
    ]


def all_cases(
    settings: Settings, rows_of: Callable[[Case], list[dict[str, Any]]], skipped: list[str], missing: list[str]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case, whose name then leaves ``missing``; those that cannot be run are named in ``skipped`` and on stderr, and the
    others go on. RuntimeError with the name of a case that failed otherwise, as after an error of the device all would fail."""
    # Runs of large cases take longer: the bar counts what they do, so that the time left is about right.
    with tqdm(
        total=settings.most_runs * sum(case_weight(*case) for case in settings.cases),
        bar_format="{desc}{percentage:.0f}% of the study's runs |{bar}| {elapsed}, {remaining} left",
        smoothing=0,
        leave=False,
        disable=None,
    ) as bar:
        for llm in settings.llms:
            name, own = f"{llm.name}, {layers_name(llm.num_hidden_layers)}", [case for case in settings.cases if case[0] is llm]
            left = [(case_name(*case), settings.most_runs * case_weight(*case)) for case in own]
            try:
                with _opened(llm, settings) as runtime:
                    for _, batch, context in own:
                        case = Case(runtime=runtime, settings=settings, batch=batch, context=context, bar=bar)
                        name, begun = case.name, bar.n
                        bar.set_description(name)
                        try:
                            rows = rows_of(case)
                        except ValueError as error:
                            _skip(skipped, name, error)
                            rows = []
                        bar.total += bar.n - begun - left.pop(0)[1]
                        missing.remove(name)
                        if rows:
                            yield rows
            except ValueError as error:  # of the runtime: no room for the weights
                _skip(skipped, name, error)
                for one, weight in left:
                    bar.total -= weight
                    missing.remove(one)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {_first_line(error)}") from error


def _opened(llm: LLMConfig, settings: Settings) -> Runtime:
    return Runtime(
        llm,
        device="cuda" if settings.device == "cuda" else "cpu",
        dtype=settings.dtype,
        seed=settings.seed,
        link=settings.link,
        threads=settings.threads,
    )


def _first_line(error: BaseException) -> str:
    """What came first: freeing memory fails, too, once the device has failed."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).strip().split("\n")[0] or type(error).__name__


def _skip(skipped: list[str], name: str, error: ValueError) -> None:
    skipped.append(f"{name}: {' '.join(str(error).split())}")
    tqdm.write(f"skipped: {skipped[-1]}", file=sys.stderr)


def table_of(
    arguments: argparse.Namespace, settings: Settings, rows_of: Callable[[Case], list[dict[str, Any]]]
) -> tuple[pd.DataFrame, int]:
    """The table of all cases that could be run, written to ``arguments.out`` after each of them, and the exit code of a study that ends
    with it: 0 if it need not end; 1 if there is no row, or after an error that later cases would have, too; INTERRUPTED after Ctrl-C."""
    skipped: list[str] = []
    missing = [case_name(*case) for case in settings.cases]
    found: list[dict[str, Any]] = []
    sheet = {} if settings.sheet is None else {"system": settings.sheet}
    columns, stopped = settings.columns(), ""

    def written() -> Iterator[pd.DataFrame]:
        nonlocal stopped
        try:
            for rows in all_cases(settings, rows_of, skipped, missing):
                found.extend(rows)
                yield write()
        except RuntimeError as error:
            stopped = str(error)

    def write() -> pd.DataFrame:
        frame = pd.DataFrame(found).assign(**columns)
        provenance = {"llms": list(settings.llms), "skipped": skipped, "missing": missing, "command": arguments.command, **sheet}
        write_csv(arguments.out, frame, provenance=provenance)
        return frame

    print(
        f"{len(missing)} cases of up to {settings.points + 1} plans, each run {settings.runs} times after a warm-up: up to "
        f"{len(missing) * settings.most_runs} runs; what is finished is written after each case.",
        flush=True,
    )
    _, interrupted = finished_rows(written())
    if stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
    if not found:
        print("No case could be run; nothing was written.")
        return pd.DataFrame(), 1
    frame = write()
    if missing:
        print(f"Not run, and not in the table: {'; '.join(missing)}. Run them with --llm, --batch and --contexts, and another --out.")
    if code := INTERRUPTED if interrupted else int(bool(stopped)):
        print(f"Written: {arguments.out}")
    return frame, code
