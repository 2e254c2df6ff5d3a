"""Traces: when requests arrive, how long their prompts are, and how many tokens they generate. Drawn from a seed, or read from a CSV.

Published statistics and assumptions stand beside the numbers (``LENGTHS``). A column of a trace is named as in ``COLUMNS``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checks import check_name, check_number, shown, whole
from .roofline import Array

Index = NDArray[np.int64]

MOST_TOKENS = 2**31
"""Tokens of a prompt or an output at most, far above any LLM: the tokens of a million such requests still fit an int64."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "arrived_at": ("arrived_at", "arrival_time", "arrival_timestamp", "timestamp"),
    "prompt_tokens": ("prompt_tokens", "num_prefill_tokens", "contexttokens", "request tokens", "input_tokens", "input_length"),
    "output_tokens": ("output_tokens", "num_decode_tokens", "generatedtokens", "response tokens", "output_length"),
}
"""What the columns of a CSV may be called, upper or lower case: our names, Vidur's (num_prefill_tokens), those of the Azure LLM inference
traces of 2023 and 2024 (TIMESTAMP, ContextTokens, GeneratedTokens) and of BurstGPT, arXiv 2401.17644 (Timestamp, Request tokens)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request: ``arrived_at`` [s], tokens of its prompt, and tokens that it generates, the first one included."""

    arrived_at: float
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        check_number("request", "arrived_at", self.arrived_at, "s", zero=True, infinite=False)
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
    def from_arrays(cls, name: str, arrived_at: Sequence[float], prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> Trace:
        """A trace of three columns of one length."""
        rows = zip(arrived_at, prompt_tokens, output_tokens, strict=True)
        return cls(name=name, requests=tuple(Request(arrived_at=at, prompt_tokens=p, output_tokens=o) for at, p, o in rows))

    @classmethod
    def from_csv(cls, path: str | Path, *, name: str | None = None) -> Trace:
        """The trace in a CSV with a header; other columns than those of ``COLUMNS`` are ignored.

        Times are seconds, or dates with times of day, which count from the first one (digits below a microsecond are dropped).
        ValueError, in one sentence with the line, for what is no trace.
        """
        path = Path(path)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                return cls(name=path.stem if name is None else name, requests=tuple(_read(path, csv.reader(file, strict=True))))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}; name a CSV of requests") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"cannot read {path}: it is no CSV ({error}); name a CSV of requests") from None


def _read(path: Path, lines: Iterator[list[str]]) -> Iterator[Request]:
    header = next(lines, [])
    known = {name.strip().lower(): place for place, name in reversed(list(enumerate(header)))}
    places = {}
    for column, names in COLUMNS.items():
        found = [known[name] for name in names if name in known]
        if len(found) != 1:
            what = f"no column {column!r}" if not found else f"several columns that may be {column!r}: {[header[i] for i in found]}"
            raise ValueError(f"{path}, line 1: there is {what}; name one of {list(names)}")
        places[column] = found[0]
    before, origin = 0.0, None
    number = 1
    for number, row in enumerate(lines, start=2):
        if not row:
            continue
        if len(row) <= max(places.values()):
            raise ValueError(f"{path}, line {number}: it has {len(row)} columns and the header {len(header)}; complete it")
        try:
            arrived, dated = _time(row[places["arrived_at"]])
            if origin is None:
                origin = (arrived if dated else 0.0, dated)
            if dated != origin[1]:
                raise ValueError("arrived_at must be seconds in all lines or dates in all lines; choose one")
            prompt, output = (_tokens(column, row[places[column]]) for column in ("prompt_tokens", "output_tokens"))
            arrived -= origin[0]
            if arrived < before:
                raise ValueError(f"the request arrives at {arrived:g} s, before the one above it at {before:g} s; sort requests by time")
            request = Request(arrived_at=arrived, prompt_tokens=prompt, output_tokens=output)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        before = arrived
        yield request
    if origin is None:
        raise ValueError(f"{path}, line {number}: there is no request below the header; give at least one")


def _time(text: str) -> tuple[float, bool]:
    """Seconds, and whether the text was a date; one without a time zone counts as UTC."""
    try:
        return float(text), False
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"arrived_at must be seconds or a date such as 2023-11-16 18:17:03.98, not {shown(text)}; correct the line"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), True


def _tokens(column: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number.is_integer() and 1 <= number <= MOST_TOKENS):
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
    number, generator = whole("uniform trace", "number", number, "requests"), np.random.default_rng(seed)
    sides = []
    for name, ends in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        low, high = (whole("uniform trace", name, end, "tokens") for end in ends)
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
    number, generator = whole("poisson trace", "number", number, "requests"), np.random.default_rng(seed)
    prompts, outputs = lengths.drawn(generator, number)
    return Trace.from_arrays(lengths.name, _arrivals("poisson trace", generator, number, rate), prompts.tolist(), outputs.tolist())


def _arrivals(what: str, generator: np.random.Generator, number: int, rate: float) -> list[float]:
    """Times [s] with exponential gaps of mean 1 / rate, the first one after such a gap."""
    check_number(what, "rate", rate, "requests/s")
    gaps = generator.exponential(size=number)
    return [float(at) for at in np.cumsum(gaps / rate)]


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
    generator = np.random.default_rng(seed)
    requests: list[Request] = []
    free_at = np.zeros(batch, dtype=np.int64)
    while (start := int(free_at.min())) < iterations:
        place = int(free_at.argmin())
        prompt = int(generator.integers(shortest, longest + 1))
        output = min(int(generator.geometric(1 / mean_output)), longest - prompt + 1, iterations - start)
        free_at[place] += output
        requests.append(Request(arrived_at=0.0, prompt_tokens=prompt, output_tokens=output))
    return Trace(name=f"h2m2 seed {seed}", requests=tuple(requests))
