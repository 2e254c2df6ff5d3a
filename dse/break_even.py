"""Where the better of two systems or plans changes as one number does: a price, a bandwidth, a context, a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Literal

Better = Literal["first", "second", "equal", "neither"]
Score = Callable[[float], float | None]


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
    ``tolerance`` times its larger end (or, near 0, times a millionth of the range). As many flips as the grid shows are found; between
    two neighbours of one verdict, flips that undo each other are possible. If the difference of the scores is monotone, there are none.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"break_even: low must be below high, both finite, not {low!r} and {high!r}")
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise ValueError(f"break_even: low and high must be whole numbers if whole=True, not {low!r} and {high!r}")
    if points < 2 or isinstance(points, bool) or points != int(points):
        raise ValueError(f"break_even: points must be a whole number of at least 2, not {points!r}")
    if not (0 < tolerance < 1 and 0 <= equal < 1):
        raise ValueError(f"break_even: tolerance must be above 0, equal at least 0, and both below 1, not {tolerance!r} and {equal!r}")
    if logarithmic and not low > 0:
        raise ValueError(f"break_even: a logarithmic grid begins above 0, not at {low!r}; raise low or leave logarithmic out")
    if len(names) != 2 or not all(names):
        raise ValueError(f"break_even: names are two texts, not {names!r}")
    grid = _grid(low, high, int(points), whole=whole, logarithmic=logarithmic)
    known: dict[float, Better] = {}

    def verdict(value: float) -> Better:
        if value not in known:
            known[value] = _better(_scored(first, names[0], value), _scored(second, names[1], value), equal)
        return known[value]

    def between(one: float, two: float) -> float | None:
        """A value in mid-interval; None if the interval is narrow enough."""
        if whole:
            return None if two - one <= 1 else (int(one) + int(two)) // 2
        middle = math.sqrt(one) * math.sqrt(two) if logarithmic else one + (two - one) / 2
        narrow = two - one <= tolerance * max(abs(one), abs(two), 1e-6 * (high - low))
        return None if narrow or not one < middle < two else middle

    flips = []
    for left, right in pairwise(grid):
        start = left
        while verdict(start) != verdict(right):
            one, two = start, right
            while (middle := between(one, two)) is not None:
                if verdict(middle) == verdict(start):
                    one = middle
                else:
                    two = middle
            flips.append(Flip(last=one, first=two, before=verdict(one), after=verdict(two)))
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


def _scored(score: Score, name: str, value: float) -> float:
    found = score(value)
    if found is None:
        return math.inf
    if not isinstance(found, Real) or isinstance(found, bool) or math.isnan(found) or found == -math.inf:
        raise ValueError(f"break_even: {name!r} must score a number, or None where nothing fits, not {found!r} as at {value!r}")
    return float(found)


def _better(first: float, second: float, equal: float) -> Better:
    if math.isinf(first) and math.isinf(second):
        return "neither"
    if first == second or abs(first - second) <= equal * max(abs(first), abs(second)) < math.inf:
        return "equal"
    return "first" if first < second else "second"


def _written(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.10g}"
