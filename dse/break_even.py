"""Where the better of two systems or plans changes as one number does: a price, a bandwidth, a context, a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Literal

from ..models.checks import shown

Better = Literal["first", "second", "equal", "neither"]
Score = Callable[[float], float | None]

MOST_POINTS = 1_000_000
"""Points of a grid; each takes two scores, and a sweep is for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """``before`` is better up to ``last``, and ``after`` from ``first`` on; what is between the two was not looked at."""

    last: float
    first: float
    before: Better
    after: Better


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """See ``break_even``. ``flips`` in order; ``names`` of the first and the second; ``points``: how many values the grid had;
    ``looked_at``: how many values were scored; ``at_low``, ``at_high``: who is better at the ends."""

    low: float
    high: float
    whole: bool
    tolerance: float
    points: int
    looked_at: int
    names: tuple[str, str]
    at_low: Better
    at_high: Better
    flips: tuple[Flip, ...]

    @property
    def value(self) -> float | None:
        """The first value found at which the better one has changed; None if it does not."""
        return self.flips[0].first if self.flips else None

    def __str__(self) -> str:
        span = f"from {_written(self.low)} to {_written(self.high)}"
        if not self.flips:
            return f"No flip {span}: {self._who(self.at_low)} at all {self.looked_at} values looked at{self._more()}"
        parts = [f"{self._who(flip.before)} up to {_written(flip.last)}" for flip in self.flips]
        last = self.flips[-1]
        found = "1 flip" if len(self.flips) == 1 else f"{len(self.flips)} flips"
        text = f"{found} {span}: {', '.join(parts)}, {self._who(last.after)} from {_written(last.first)} on"
        return text + (self._more() if self.whole else f" (to {self.tolerance:g} of the value)" + self._more())

    def _who(self, better: Better) -> str:
        first, second = self.names
        both = {"equal": f"{first} and {second} are equal", "neither": f"neither {first} nor {second} is possible"}
        return both.get(better) or f"{first if better == 'first' else second} is better"

    def _more(self) -> str:
        every = self.whole and self.points > self.high - self.low
        return "." if every else f". Between the {self.points} points of the grid two flips that undo each other are possible."


def break_even(
    first: Score,
    second: Score,
    low: float,
    high: float,
    *,
    whole: bool = False,
    points: int = 17,
    tolerance: float = 1e-9,
    equal: float = 1e-12,
    logarithmic: bool = False,
    names: tuple[str, str] = ("first", "second"),
) -> BreakEven:
    """At which values from ``low`` to ``high`` the better of two changes.

    ``first`` and ``second`` score a value, lower is better; None (or inf) where nothing fits, which is worse than any number. Scores that
    differ by at most ``equal`` of the larger count as equal, which is a third verdict, as that neither is possible is a fourth.

    A grid of ``points`` values is looked at first, evenly spaced, or by equal ratios if ``logarithmic``; between neighbours with different
    verdicts each change is found by bisection: of ``whole`` numbers the exact pair of neighbours, else an interval no wider than
    ``tolerance`` times its larger end (or, near 0 on an even grid, times a millionth of the range). Where both are equal between two
    verdicts, but on less than that, it counts as one flip from one to the other. As many flips as the grid shows are found; between
    two neighbours of one verdict, flips that undo each other are possible. If the difference of the scores is monotone, there are none.

    ValueError, in one sentence, for arguments of a wrong type or size, and for a score that raises or is no number.
    """
    _check_scores(first, second, names)
    low, high = _ends(low, high, whole=whole, logarithmic=logarithmic)
    points = _points(points)
    if not (_is_number(tolerance) and _is_number(equal) and 0 < tolerance < 1 and 0 <= equal < 1):
        raise ValueError(
            f"break_even: tolerance must be above 0, equal at least 0, and both below 1, not {shown(tolerance)} and {shown(equal)}"
        )
    grid = _grid(low, high, points, whole=whole, logarithmic=logarithmic)
    known: dict[float, Better] = {}

    def verdict(value: float) -> Better:
        if value not in known:
            known[value] = _better(_scored(first, names[0], value), _scored(second, names[1], value), equal)
        return known[value]

    def width(one: float, two: float) -> float:
        """The widest interval from ``one`` to ``two`` that counts as a flip."""
        return tolerance * max(abs(one), abs(two), 0.0 if logarithmic else 1e-6 * (high - low))

    def between(one: float, two: float) -> float | None:
        """A value in mid-interval; None if the interval is narrow enough: a quarter of ``width``, so that two can be joined."""
        if whole:
            return None if two - one <= 1 else (int(one) + int(two)) // 2
        middle = math.sqrt(one) * math.sqrt(two) if logarithmic else one + (two - one) / 2
        return None if two - one <= width(one, two) / 4 or not one < middle < two else middle

    flips: list[Flip] = []
    for left, right in pairwise(grid):
        start = left
        while verdict(start) != verdict(right):
            one, two = start, right
            while (middle := between(one, two)) is not None:
                if verdict(middle) == verdict(start):
                    one = middle
                else:
                    two = middle
            flip = Flip(last=one, first=two, before=verdict(one), after=verdict(two))
            before = flips[-1] if flips and flips[-1].after == flip.before == "equal" else None
            if not whole and before and before.before != flip.after and flip.first - before.last <= width(before.last, flip.first):
                flips[-1] = Flip(last=before.last, first=flip.first, before=before.before, after=flip.after)
            else:
                flips.append(flip)
            start = two
    return BreakEven(
        low=grid[0],
        high=grid[-1],
        whole=whole,
        tolerance=tolerance,
        points=len(grid),
        looked_at=len(known),
        names=(str(names[0]), str(names[1])),
        at_low=verdict(grid[0]),
        at_high=verdict(grid[-1]),
        flips=tuple(flips),
    )


def _grid(low: float, high: float, points: int, *, whole: bool, logarithmic: bool) -> list[float]:
    steps = [i / (points - 1) for i in range(1, points - 1)]
    inner = [low * (high / low) ** step if logarithmic else low + (high - low) * step for step in steps]
    if whole:
        return sorted({int(low), int(high), *(min(max(round(value), int(low)), int(high)) for value in inner)})
    return sorted({low, high, *(min(max(value, low), high) for value in inner)})


def _check_scores(first: object, second: object, names: object) -> None:
    if not (isinstance(names, (tuple, list)) and len(names) == 2 and all(isinstance(name, str) and name.strip() for name in names)):
        raise ValueError(f'break_even: names are two texts, as in ("H2M2", "LPDDR only"), not {shown(names)}')
    for name, score in zip(names, (first, second), strict=True):
        if not callable(score):
            raise ValueError(f"break_even: {name!r} must be a function that scores a number, not {shown(score)}")


def _ends(low: Any, high: Any, *, whole: bool, logarithmic: bool) -> tuple[float, float]:
    """The ends as plain numbers: int if ``whole``, else float."""
    if not (_is_number(low) and _is_number(high) and math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"break_even: low must be below high, both finite numbers, not {shown(low)} and {shown(high)}")
    if whole and not (low == int(low) and high == int(high)):
        raise ValueError(f"break_even: low and high must be whole numbers if whole=True, not {shown(low)} and {shown(high)}")
    if logarithmic and not low > 0:
        raise ValueError(f"break_even: a logarithmic grid begins above 0, not at {shown(low)}; raise low or leave logarithmic out")
    if not math.isfinite(float(high) / float(low) if logarithmic else float(high) - float(low)):
        what = "ratio" if logarithmic else "difference"
        raise ValueError(f"break_even: the {what} of low and high, {low:g} and {high:g}, is beyond 1.8e308; bring them closer together")
    return (int(low), int(high)) if whole else (float(low), float(high))


def _points(points: Any) -> int:
    if not (_is_number(points) and 2 <= points <= MOST_POINTS and points == int(points)):
        raise ValueError(f"break_even: points must be a whole number of at least 2 and at most {MOST_POINTS:,}, not {shown(points)}")
    return int(points)


def _is_number(value: object) -> bool:
    """A real number that a float can hold; NaN and infinity are for the rules to refuse."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _scored(score: Score, name: str, value: float) -> float:
    try:
        found = score(value)
    except Exception as error:
        reason = " ".join(str(error).split()).removesuffix(".") or "no reason given"
        raise ValueError(
            f"break_even: {name!r} cannot score {value!r}, {type(error).__name__}: {reason}; return None where nothing fits"
        ) from error
    if found is None:
        return math.inf
    if not _is_number(found) or math.isnan(found) or found == -math.inf:
        raise ValueError(f"break_even: {name!r} must score a number, or None where nothing fits, not {shown(found)} as at {value!r}")
    return float(found)


def _better(first: float, second: float, equal: float) -> Better:
    if math.isinf(first) and math.isinf(second):
        return "neither"
    if first == second or abs(first - second) <= equal * max(abs(first), abs(second)) < math.inf:
        return "equal"
    return "first" if first < second else "second"


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.10g}"
