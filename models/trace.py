"""Traces: when requests arrive, how long their prompts are, and how many tokens they generate. Drawn from a seed, or read from a CSV.

Published statistics and assumptions stand beside the numbers (``LENGTHS``). A column of a trace is named as in ``COLUMNS``.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import check_name, check_number, shown, whole, wholes
from .roofline import Array

Index = NDArray[np.int64]

MOST_TOKENS = 2**31
"""Tokens of a prompt or an output at most, far above any LLM: the tokens of a million such requests still fit an int64."""

FINEST = 1e-6
"""Seconds by which a clock must be able to advance when a request arrives; a double beyond 2**33 s (272 years) cannot."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "arrived_at": ("arrived_at", "arrival_time", "arrival_timestamp", "timestamp"),
    "prompt_tokens": ("prompt_tokens", "num_prefill_tokens", "contexttokens", "request tokens", "input_tokens", "input_length"),
    "output_tokens": ("output_tokens", "num_decode_tokens", "generatedtokens", "response tokens", "output_length"),
}
"""What the columns of a CSV may be called, upper or lower case: our names, Vidur's (num_prefill_tokens), those of the Azure LLM inference
traces of 2023 and 2024 (TIMESTAMP, ContextTokens, GeneratedTokens), of BurstGPT, arXiv 2401.17644 (Timestamp, Request tokens), and of
Mooncake, arXiv 2407.00079 (``MOONCAKE``)."""

MOONCAKE = ("timestamp", "input_length", "output_length")
"""The columns of Mooncake's open trace (arXiv 2407.00079, its section on the trace): there, and only there, ``timestamp`` is the arrival in
milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request: ``arrived_at`` [s], tokens of its prompt, and tokens that it generates, the first one included."""

    arrived_at: float
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        check_number("request", "arrived_at", self.arrived_at, "s", zero=True, infinite=False)
        if math.ulp(float(self.arrived_at)) > FINEST:
            raise ValueError(
                f"request: arrived_at must be below 2**33 s, not {shown(self.arrived_at)}: so late a clock does not advance by "
                "microseconds; subtract the first arrival, or give seconds"
            )
        for name in ("prompt_tokens", "output_tokens"):
            number = whole("request", name, getattr(self, name), "tokens")
            if number > MOST_TOKENS:
                raise ValueError(f"request: {name} must be at most {MOST_TOKENS} tokens, not {number}; correct it")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "arrived_at", float(self.arrived_at))

    @property
    def state_tokens(self) -> int:
        """Tokens whose keys and values are read in its last step: nothing reads those of the last token."""
        return self.prompt_tokens + self.output_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order in which they arrive. ``arrived_at``, ``prompt_tokens`` and ``output_tokens`` [N] are the same as arrays."""

    name: str
    requests: tuple[Request, ...]
    arrived_at: Array = field(init=False, repr=False, compare=False)
    prompt_tokens: Index = field(init=False, repr=False, compare=False)
    output_tokens: Index = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_name("trace", self.name)
        if not isinstance(self.requests, Iterable):
            raise ValueError(
                f"trace {self.name!r}: requests must be several of class Request, not {shown(self.requests)}; put it into a list"
            )
        object.__setattr__(self, "requests", tuple(self.requests))
        if not self.requests:
            raise ValueError(f"trace {self.name!r} has no request; give at least one")
        wrong = next((item for item in self.requests if not isinstance(item, Request)), None)
        if wrong is not None:
            raise ValueError(f"trace {self.name!r}: requests must be of class Request, not {shown(wrong)}")
        for name, kind in (("arrived_at", np.float64), ("prompt_tokens", np.int64), ("output_tokens", np.int64)):
            values = np.array([getattr(request, name) for request in self.requests], dtype=kind)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        early = np.flatnonzero(np.diff(self.arrived_at) < 0)
        if len(early):
            at = int(early[0])
            raise ValueError(
                f"trace {self.name!r}: request {at + 1} arrives at {self.arrived_at[at + 1]:g} s, before request {at} at "
                f"{self.arrived_at[at]:g} s; sort requests by arrived_at"
            )

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def state_tokens(self) -> Index:
        """Tokens that each request holds in its last step [N]."""
        return self.prompt_tokens + self.output_tokens - 1

    @classmethod
    def from_arrays(cls, name: str, arrived_at: Iterable[float], prompt_tokens: Iterable[int], output_tokens: Iterable[int]) -> Trace:
        """A trace of three columns of one length."""
        columns: dict[str, Iterable[float]] = {"arrived_at": arrived_at, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        wrong = next((column for column, values in columns.items() if isinstance(values, str) or not isinstance(values, Iterable)), None)
        if wrong is not None:
            raise ValueError(f"trace {name!r}: {wrong} must be a list of numbers, one for each request, not {shown(columns[wrong])}")
        at, prompts, outputs = list(arrived_at), list(prompt_tokens), list(output_tokens)
        if not len(at) == len(prompts) == len(outputs):
            raise ValueError(
                f"trace {name!r}: arrived_at, prompt_tokens and output_tokens must be of one length, not {len(at)}, {len(prompts)} and "
                f"{len(outputs)}; give each request all three"
            )
        rows = zip(at, prompts, outputs, strict=True)
        return cls(name=name, requests=tuple(Request(arrived_at=at, prompt_tokens=p, output_tokens=o) for at, p, o in rows))

    @classmethod
    def from_csv(cls, path: str | Path, *, name: str | None = None, skip_empty: bool = False) -> Trace:
        """The trace in a CSV with a header; other columns than those of ``COLUMNS`` are ignored.

        Times are seconds (milliseconds where the three columns are those of ``MOONCAKE``), or dates with times of day, which count from
        the first one (digits below a microsecond are dropped). ``skip_empty``: leave out requests with 0 output tokens, which logs keep of
        those that failed. ValueError, in one sentence with the line, for what is no trace.
        """
        if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
            raise ValueError(f"a trace is read from the path of a CSV, not {shown(path)}; name a file")
        path = Path(path)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                return cls(name=path.stem if name is None else name, requests=tuple(_read(path, reader, skip_empty)))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}; name a CSV of requests") from None
        except (UnicodeDecodeError, csv.Error) as error:
            if "field limit" in str(error):
                longest = f"it has a text of more than {csv.field_size_limit()} characters"
                raise ValueError(f"cannot read {path}: {longest}; drop that column, or raise csv.field_size_limit") from None
            raise ValueError(f"cannot read {path}: it is no CSV ({error}); name a CSV of requests") from None


def _read(path: Path, lines: Any, skip_empty: bool) -> Iterator[Request]:
    """The requests in the ``lines`` of a ``csv.reader``, which knows the number of the line where a row ends."""
    header: list[str] = next(lines, [])
    places = _places(path, header)
    scale = 1000.0 if tuple(header[place].strip().lower() for place in places.values()) == MOONCAKE else 1.0
    origin: float | datetime | None = None
    before, empty = -math.inf, list[int]()
    for row in lines:
        if not row:
            continue
        if len(row) <= max(places.values()):
            raise ValueError(f"{path}, line {lines.line_num}: it has {len(row)} columns and the header {len(header)}; complete it")
        try:
            moment = _time(row[places["arrived_at"]])
            origin = moment if origin is None else origin
            if isinstance(moment, datetime) != isinstance(origin, datetime):
                raise ValueError("arrived_at must be seconds in all lines or dates in all lines; choose one")
            arrived = _seconds(moment, origin, scale)
            prompt = _tokens("prompt_tokens", row[places["prompt_tokens"]])
            output = _tokens("output_tokens", row[places["output_tokens"]], least=0)
            if before > arrived:
                raise ValueError(f"the request arrives at {arrived:g} s, before the one above it at {before:g} s; sort requests by time")
            request = Request(arrived_at=arrived, prompt_tokens=prompt, output_tokens=output or 1)
        except ValueError as error:
            raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
        before = arrived
        if output:
            yield request
        else:
            empty.append(lines.line_num)
    if empty and not skip_empty:
        raise ValueError(
            f"{path}, line {empty[0]}: output_tokens must be at least 1 (lines with 0 in the file: {len(empty)}); leave them out with "
            "skip_empty=True"
        )
    if math.isinf(before):
        raise ValueError(f"{path}, line {max(lines.line_num, 1)}: there is no request below the header; give at least one")


def _places(path: Path, header: list[str]) -> dict[str, int]:
    """Where each column of a trace stands."""
    places = {}
    for column, names in COLUMNS.items():
        found = [place for place, name in enumerate(header) if name.strip().lower() in names]
        if not found:
            raise ValueError(f"{path}, line 1: there is no column {column!r}; name one of {list(names)}")
        if len(found) > 1:
            listed = ", ".join(repr(header[place]) for place in found)
            raise ValueError(f"{path}, line 1: there are several columns that may be {column!r}: {listed}; keep one of them")
        places[column] = found[0]
    return places


def _time(text: str) -> float | datetime:
    """Seconds, or a date; one without a time zone counts as UTC."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"arrived_at must be seconds or a date such as 2023-11-16 18:17:03.98, not {shown(text)}; correct the line"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _seconds(moment: float | datetime, origin: float | datetime, scale: float) -> float:
    """Seconds of a time of which ``scale`` make one, or since the date ``origin``: the microseconds of dates are subtracted exactly."""
    if isinstance(moment, datetime) and isinstance(origin, datetime):
        return (moment - origin).total_seconds()
    return float(moment) / scale  # type: ignore[arg-type]  # both are numbers


def _tokens(column: str, text: str, *, least: int = 1) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number.is_integer() and least <= number <= MOST_TOKENS):
        raise ValueError(
            f"{column} must be a whole number of tokens, at least 1 and at most {MOST_TOKENS}, not {shown(text)}; drop the line"
        )
    return int(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Log-normal lengths of prompts and outputs: medians [tokens], standard deviations of the logarithm, and the longest that counts.

    ``source`` says where the numbers come from; what it calls an assumption has no source. ``drawn`` lengths are rounded to whole
    tokens, at least 1, and cut at the longest.
    """

    name: str
    prompt_median: float
    prompt_sigma: float
    output_median: float
    output_sigma: float
    longest_prompt: int
    longest_output: int
    source: str

    def __post_init__(self) -> None:
        check_name("distribution of lengths", self.name)
        what = f"lengths {self.name!r}"
        for side in ("prompt", "output"):
            check_number(what, f"{side}_median", getattr(self, f"{side}_median"), "tokens", infinite=False)
            check_number(what, f"{side}_sigma", getattr(self, f"{side}_sigma"), "1", zero=True, infinite=False)
            object.__setattr__(self, f"longest_{side}", whole(what, f"longest_{side}", getattr(self, f"longest_{side}"), "tokens"))

    def drawn(self, generator: np.random.Generator, number: int) -> tuple[Index, Index]:
        """Tokens of ``number`` prompts and outputs."""
        sides = []
        for side in ("prompt", "output"):
            median, sigma, longest = (getattr(self, name) for name in (f"{side}_median", f"{side}_sigma", f"longest_{side}"))
            with np.errstate(over="ignore"):  # what no double holds is cut at the longest, too
                lengths = np.exp(generator.normal(math.log(median), sigma, number))
            sides.append(np.clip(np.rint(lengths), 1, longest).astype(np.int64))
        return sides[0], sides[1]


_AZURE = "medians: Azure LLM inference traces 2023, Splitwise, arXiv 2311.18677; spreads and longest: assumption"

LENGTHS: dict[str, Lengths] = {
    lengths.name: lengths
    for lengths in (
        Lengths(
            name="chat",
            prompt_median=1020,
            prompt_sigma=1.0,
            output_median=129,
            output_sigma=0.8,
            longest_prompt=4096,
            longest_output=1024,
            source=_AZURE,
        ),
        Lengths(
            name="code",
            prompt_median=1500,
            prompt_sigma=0.8,
            output_median=13,
            output_sigma=1.0,
            longest_prompt=8192,
            longest_output=1024,
            source=_AZURE,
        ),
        Lengths(
            name="long-document",
            prompt_median=16_000,
            prompt_sigma=0.6,
            output_median=300,
            output_sigma=0.6,
            longest_prompt=65_536,
            longest_output=2048,
            source="assumption: a report or a book chapter of some 30 pages, and half a page of summary",
        ),
        Lengths(
            name="reasoning",
            prompt_median=250,
            prompt_sigma=0.8,
            output_median=4000,
            output_sigma=0.8,
            longest_prompt=4096,
            longest_output=16_384,
            source="assumption: a short question, and a chain of thought that is many times longer",
        ),
    )
}
"""Lengths of requests by kind."""


def fixed_trace(number: int, *, prompt_tokens: int, output_tokens: int, interval: float = 0.0) -> Trace:
    """``number`` equal requests, one every ``interval`` [s]; 0: all at once."""
    number = whole("fixed trace", "number", number, "requests")
    check_number("fixed trace", "interval", interval, "s", zero=True, infinite=False)
    requests = (Request(arrived_at=i * interval, prompt_tokens=prompt_tokens, output_tokens=output_tokens) for i in range(number))
    return Trace(name=f"fixed {prompt_tokens}+{output_tokens}", requests=tuple(requests))


def uniform_trace(
    number: int, *, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], rate: float = math.inf, seed: int = 0
) -> Trace:
    """``number`` requests whose lengths are uniform between two ends, both included; they arrive as in ``poisson_trace``."""
    number, generator = whole("uniform trace", "number", number, "requests"), _generator("uniform trace", seed)
    sides = []
    for name, ends in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        pair = wholes("uniform trace", name, ends, "tokens")
        if len(pair) != 2:
            raise ValueError(f"uniform trace: {name} must be the shortest and the longest, as in (256, 1536), not {shown(ends)}")
        low, high = pair
        if low > high:
            raise ValueError(f"uniform trace: {name} must go from the shortest to the longest, not from {low} to {high}; swap them")
        sides.append(generator.integers(low, high + 1, number).tolist())
    return Trace.from_arrays("uniform", _arrivals("uniform trace", generator, number, rate), *sides)


def poisson_trace(lengths: Lengths | str, number: int, *, rate: float = math.inf, seed: int = 0) -> Trace:
    """``number`` requests that arrive at random, ``rate`` a second (inf: all at once), with log-normal lengths of a kind of ``LENGTHS``."""
    if isinstance(lengths, str):
        if lengths not in LENGTHS:
            raise ValueError(f"there are no lengths {lengths!r}; name one of {list(LENGTHS)}, or give Lengths")
        lengths = LENGTHS[lengths]
    if not isinstance(lengths, Lengths):
        raise ValueError(f"poisson trace: lengths must be one of {list(LENGTHS)}, or Lengths, not {shown(lengths)}")
    number, generator = whole("poisson trace", "number", number, "requests"), _generator("poisson trace", seed)
    prompts, outputs = lengths.drawn(generator, number)
    return Trace.from_arrays(lengths.name, _arrivals("poisson trace", generator, number, rate), prompts.tolist(), outputs.tolist())


def _arrivals(what: str, generator: np.random.Generator, number: int, rate: float) -> list[float]:
    """Times [s] with exponential gaps of mean 1 / rate, the first one after such a gap."""
    check_number(what, "rate", rate, "requests/s")
    gaps = generator.exponential(size=number)
    with np.errstate(over="ignore"):
        found = np.cumsum(gaps / rate)
    if math.ulp(found[-1]) > FINEST or math.isinf(found[-1]):
        raise ValueError(f"{what}: rate must be such that all arrive before 2**33 s, not {shown(rate)} requests/s; raise it")
    return [float(at) for at in found]


def _generator(what: str, seed: object) -> np.random.Generator:
    """NumPy's generator of a seed, which must be given, so that a trace can be drawn again."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) < 2**32:
        raise ValueError(f"{what}: seed must be a whole number from 0 to 2**32 - 1, not {shown(seed)}")
    return np.random.default_rng(int(seed))


def h2m2_trace(
    seed: int = 0, *, batch: int = 32, iterations: int = 128, shortest: int = 256, longest: int = 2048, mean_output: float = 128.0
) -> Trace:
    """H2M2's dynamic setting (arXiv 2504.14893): ``batch`` requests, of which each that ends is replaced at once, for ``iterations``.

    Published: batch 32, 128 iterations, contexts between 256 and 2048, random early termination and replacement. Assumption: a request
    comes with S ~ U(shortest, longest) tokens (which fits the published numbers), ends after each token with probability
    1 / ``mean_output``, and at ``longest`` tokens in any case. All arrive at 0 s in the order of their places in the batch; those that run
    at the end are cut there, so that a replay with this batch limit takes exactly ``iterations`` and finishes every request.
    """
    what = "H2M2's trace"
    batch, iterations = whole(what, "batch", batch, "requests"), whole(what, "iterations", iterations, "iterations")
    shortest, longest = whole(what, "shortest", shortest, "tokens"), whole(what, "longest", longest, "tokens")
    check_number(what, "mean_output", mean_output, "tokens", infinite=False)
    if shortest > longest or mean_output < 1:
        raise ValueError(
            f"{what}: shortest must be at most longest and mean_output at least 1, not {shortest}, {longest} and {mean_output}"
        )
    generator = _generator(what, seed)
    requests: list[Request] = []
    free_at = np.zeros(batch, dtype=np.int64)
    while (start := int(free_at.min())) < iterations:
        place = int(free_at.argmin())
        prompt = int(generator.integers(shortest, longest + 1))
        output = min(int(generator.geometric(1 / mean_output)), longest - prompt + 1, iterations - start)
        free_at[place] += output
        requests.append(Request(arrived_at=0.0, prompt_tokens=prompt, output_tokens=output))
    return Trace(name=f"h2m2 seed {seed}", requests=tuple(requests))
