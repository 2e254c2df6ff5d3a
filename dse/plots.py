"""Figures of explorations, for papers: PNG files whose axes carry the units of the columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..models.checks import check_number, shown
from .pareto import Objective, minimised, non_dominated, pareto
from .table import replacing

if TYPE_CHECKING:
    from matplotlib.axis import Axis

_PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
_PREFIXED = {"s": 0, "J": 15, "W": 15, "B": 15, "FLOP": 15}  # units that take an SI prefix, and the largest exponent in use
_SIZES = [f"{prefix}B" for prefix in ("k", "M", "G", "T", "P", "Ki", "Mi", "Gi", "Ti", "Pi")]
_UNITS = {unit: unit for unit in (*_PREFIXED, *_SIZES, "ms", "us", "ns", "tokens", "USD")} | {"tok": "token", "usd": "USD", "mm2": "mm²"}
_QUANTITIES = {
    "usd": "cost",
    "USD": "cost",
    "J": "energy",
    "W": "power",
    "s": "time",
    "ms": "time",
    "tok": "throughput",
    "tokens": "throughput",
}
"""What a column is called whose name is a unit by a unit and nothing else, as in usd_per_Mtok."""
_PANELS = {"migration_GB": "moved\n[GB]", "behind_optimum_s": "behind the\noptimum [s]"}
"""Columns of replays that have a panel of their own."""
_LOG_FROM = 8.0  # largest over smallest value above which an axis is logarithmic

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # a "$" in a title is a dollar
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.fontsize": 9.5,
}
_FRAMED: dict[str, Any] = {"frameon": True, "fancybox": False, "framealpha": 0.95, "edgecolor": "#9aa1a9"}
_BLUE, _GREY, _DARK = "#1f5fa8", "#cdd1d6", "#333333"
_LINES = (_BLUE, "#d1662b", "#3a8f5c", "#8a4fa3", "#b3932c", "#5b6770", "#c2476b", "#2ba3b0")  # told apart without red against green


def plot_front(
    frame: pd.DataFrame, objectives: Sequence[Objective], path: str | Path, *, title: str, dominated: pd.DataFrame | None = None
) -> Path:
    """Draw the front of ``frame`` as a PNG, whole or not at all, and return its path.

    The axes are the first two objectives, logarithmic where values span more than a factor of 8; a third is the colour.
    The line joins the designs that nothing beats in the first two objectives. Other designs are grey: the rows of
    ``dominated``, and those of ``frame`` that are not on its front (column on_front of ``explore``, or else found here).
    """
    if len(objectives) not in (2, 3):
        raise ValueError(f"a front is drawn for 2 or 3 objectives, not {len(objectives)}; name those to be seen")
    on_front = frame["on_front"].to_numpy(dtype=bool) if "on_front" in frame else non_dominated(minimised(frame, objectives))
    front = pareto(frame[on_front], objectives)
    if front.empty:
        raise ValueError("no design is on the front, so there is nothing to draw; explore more trials or relax a constraint")
    names = [objective.name for objective in objectives]
    grey = pd.concat([frame.loc[~on_front, names]] + ([] if dominated is None else [dominated[names]]))

    import matplotlib as mpl
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    axis_x, axis_y = (_Axis.of(objective, pd.concat([front[objective.name], grey[objective.name]])) for objective in objectives[:2])
    x, y = front[names[0]] / axis_x.unit, front[names[1]] / axis_y.unit
    steps = non_dominated(minimised(front, objectives[:2]))
    where: Literal["post", "pre"] = "post" if objectives[0].direction == "minimize" else "pre"
    path = Path(path)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        if not grey.empty:
            axes.scatter(
                grey[names[0]] / axis_x.unit,
                grey[names[1]] / axis_y.unit,
                s=14,
                color=_GREY,
                linewidths=0,
                label="other designs",
                rasterized=True,
            )
        if len(objectives) == 2:
            axes.step(x[steps], y[steps], color=_BLUE, marker="o", markersize=5, label="Pareto front", where=where, linewidth=1.6)
        else:
            axes.step(x[steps], y[steps], color=_DARK, label="front of the two axes", where=where, linewidth=1.6)
            colour = _Axis.of(objectives[2], front[names[2]])
            norm = (LogNorm if colour.logarithmic else Normalize)()
            third = front[names[2]] / colour.unit
            points = axes.scatter(
                x, y, c=third, s=34, cmap="viridis", norm=norm, edgecolors=_DARK, linewidths=0.5, zorder=3, label="front of all three"
            )
            bar = figure.colorbar(points, label=colour.label)
            bar.outline.set_visible(False)
            colour.dress(bar.ax.yaxis)
        axes.set(xscale=axis_x.scale, yscale=axis_y.scale, title=title, xlabel=axis_x.label, ylabel=axis_y.label)
        axis_x.dress(axes.xaxis)
        axis_y.dress(axes.yaxis)
        axes.grid(color="#e9ebee", linewidth=0.8)
        axes.legend(**_FRAMED)  # else the marker of the other designs looks like one of them
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
    return path


def plot_lines(
    frame: pd.DataFrame,
    path: str | Path,
    *,
    x: str,
    y: str,
    by: str,
    title: str,
    band: tuple[str, str] | None = None,
    band_label: str = "",
    markers_only: Collection[str] = (),
    linear: Iterable[str] = (),
) -> Path:
    """Draw column ``y`` against ``x``, a line for each value of ``by`` in order of appearance, as a PNG, whole or not at all.

    ``band``: columns of the lower and the upper end of a shaded range around each line, which the legend calls ``band_label``.
    ``markers_only``: names of lines whose points are not joined, as of a function that jumps between them. A line that runs exactly over
    earlier ones is dashed, so that these are seen. The axes carry the units of the column names and are logarithmic where values span more
    than a factor of 8, but for the columns ``linear``, as numbers of slices. Rows without a number are left out. Returns the path.
    """
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"lines are drawn from a DataFrame, not from {shown(frame)}")
    if isinstance(markers_only, str):
        raise ValueError(f"markers_only must be a list of names of lines, as in [{markers_only!r}], not {markers_only!r}")
    if band_label and band is None:
        raise ValueError(f"band_label {band_label!r} names no band; give its two columns as band")
    markers_only, plain = _names("markers_only", markers_only), _names("linear", linear)
    if isinstance(linear, str) or not set(plain) <= {x, y}:
        raise ValueError(f"linear must be a list of the columns drawn, of {[x, y]}, not {linear!r}")
    if band is not None and (isinstance(band, str) or len(band) != 2):
        raise ValueError(f"band must be the columns of its lower and its upper end, not {shown(band)}")
    for what, column in (("x", x), ("y", y), ("by", by), *(("band", end) for end in band or ())):
        if column not in frame:
            raise ValueError(f"{what}: there is no column {column!r}; columns are {', '.join(map(str, frame.columns))}")
    for column in (x, y, *(band or ())):
        try:
            numbers = frame[column].astype(float)
        except (TypeError, ValueError):
            raise ValueError(f"column {column!r} must hold numbers, and it holds {shown(frame[column].iloc[0])}; draw another") from None
        frame = frame if column == by else frame.assign(**{column: numbers})
    frame = frame.dropna(subset=[x, y]).sort_values(x, kind="stable")
    if frame.empty or not np.isfinite(frame[[x, y]]).all(axis=1).any():
        raise ValueError(f"no row has both {x!r} and {y!r}, as finite numbers, so there is nothing to draw")
    frame = frame.dropna(subset=[by])
    if frame.empty:
        raise ValueError(f"no row has a value in {by!r}, which tells the lines apart, so there is nothing to draw")
    unknown = sorted(set(markers_only) - set(map(str, frame[by])))
    if unknown:
        raise ValueError(f"markers_only: there is no line {unknown[0]!r}; lines are {', '.join(dict.fromkeys(map(str, frame[by])))}")

    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = (_Axis.of(Objective(name), frame[name].astype(float)) for name in (x, y))
    axis_x, axis_y = (replace(axis, logarithmic=axis.logarithmic and name not in plain) for axis, name in zip(found, (x, y), strict=True))
    path = Path(path)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        drawn: list[NDArray[np.float64]] = []
        for number, (name, part) in enumerate(frame.groupby(by, sort=False)):
            colour = _LINES[number % len(_LINES)]
            at = part[x] / axis_x.unit
            points = part[[x, y]].to_numpy(dtype=np.float64)
            joined = str(name) not in markers_only
            covers = joined and any(np.array_equal(points, earlier) for earlier in drawn)
            if joined:
                drawn.append(points)
            line = "none" if not joined else (0, (4, 4)) if covers else "solid"
            style: dict[str, Any] = {
                "color": colour,
                "linestyle": line,
                "linewidth": 1.6,
                "marker": "o",
                "markersize": 2.5 if covers else 4,
            }
            axes.plot(at, part[y] / axis_y.unit, label=str(name), **style)
            if band is not None:
                low, high = (part[end] / axis_y.unit for end in band)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xscale=axis_x.scale, yscale=axis_y.scale, title=title, xlabel=axis_x.label, ylabel=axis_y.label)
        axis_x.dress(axes.xaxis)
        axis_y.dress(axes.yaxis)
        axes.grid(color="#e9ebee", linewidth=0.8)
        handles, _ = axes.get_legend_handles_labels()
        if band_label:
            handles.append(Patch(facecolor=_DARK, alpha=0.2, linewidth=0, label=band_label))
        legend: dict[str, Any] = {"handles": handles, "title": by.replace("_", " "), **_FRAMED}
        if band is None:
            axes.legend(**legend)
        else:  # bands leave no room for it
            figure.legend(**legend, loc="outside lower center", ncols=min(4, len(handles)))
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
    return path


def plot_replay(frames: Mapping[str, pd.DataFrame], path: str | Path, *, title: str, capacity: Mapping[str, float] | None = None) -> Path:
    """Draw replays of one trace, by name of policy, iteration by iteration in panels one above the other, as a PNG, whole or not at all.

    The panels are what each memory holds (columns <tier>_GB for the tiers of ``capacity`` [GB], which is dashed), the plan (columns
    n_<kind>: slices in the first memory), what moved before each iteration (migration_GB, as bars), and, where some frame has it, how far
    it is behind the optimum (behind_optimum_s). Frames are those of ``Replay.rows``. A frame that lacks a panel's column is left out of
    that panel. Returns the path.
    """
    if not isinstance(frames, Mapping) or not all(isinstance(frame, pd.DataFrame) for frame in frames.values()):
        raise ValueError(f"replays are drawn from a dict of their rows by name, as in {{'greedy': run.rows}}, not from {shown(frames)}")
    if not frames or any(frame.empty for frame in frames.values()):
        raise ValueError("each replay must have at least one iteration, and there must be one replay; give the rows of replays")
    listed = dict.fromkeys(str(column) for frame in frames.values() for column in frame)
    if any("iteration" not in frame for frame in frames.values()):
        raise ValueError("the frames must have the column 'iteration', as the rows of a replay")
    rooms = dict(capacity or {})
    for tier, room in rooms.items():
        check_number("capacity", tier, room, "GB", zero=True)
    lost = [f"{tier}_GB" for tier in rooms if f"{tier}_GB" not in listed]
    if lost:
        raise ValueError(f"capacity: no frame has the column {lost[0]!r}; give the tiers of the machine")
    panels = [(f"{tier}_GB", f"in {tier} [GB]") for tier in rooms]
    panels += [(column, f"{column.removeprefix('n_')} slices in\nfirst memory") for column in listed if column.startswith("n_")]
    panels += [(column, label) for column, label in _PANELS.items() if column in listed]

    if not panels:
        raise ValueError("the frames have none of the columns n_<kind>, migration_GB, behind_optimum_s: there is nothing to draw")

    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    path = Path(path)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 1.6 + 1.35 * len(panels)), layout="constrained")
        stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (column, label) in zip(stack, panels, strict=True):
            drawn = {name: frame for name, frame in frames.items() if column in frame}
            for number, (name, frame) in enumerate(frames.items()):
                if name not in drawn:
                    continue
                at, values = frame["iteration"].to_numpy(dtype=np.float64), frame[column].to_numpy(dtype=np.float64)
                # Later lines are thinner and above, so that one that runs over another leaves its edges to be seen.
                style: dict[str, Any] = {"color": _LINES[number % len(_LINES)], "zorder": 2 + number}
                line = style | {"linewidth": 3.6 - 2.4 * number / max(len(frames) - 1, 1)}
                if column == "migration_GB":  # side by side, so that none hides another
                    width = 0.9 / len(drawn)
                    shift = (list(drawn).index(name) - (len(drawn) - 1) / 2) * width
                    axes.bar(at[values > 0] + shift, values[values > 0], width=width, linewidth=0.8, edgecolor=style["color"], **style)
                elif column.startswith("n_"):
                    axes.step(at, values, where="mid", **line)
                else:
                    axes.plot(at, values, **line)
            tier = column.removesuffix("_GB")
            if math.isfinite(rooms.get(tier, math.inf)):
                axes.axhline(rooms[tier], color=_DARK, linestyle=(0, (4, 3)), linewidth=1)
                axes.set_ylim(0, 1.08 * max(rooms[tier], *(float(frame[column].max()) for frame in drawn.values())))
            elif column.startswith("n_"):
                axes.set_ylim(bottom=-0.05 * axes.get_ylim()[1])
            axes.set_ylabel(label, fontsize=9)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=column.startswith("n_")))
            axes.grid(color="#e9ebee", linewidth=0.8)
        stack[-1].set_xlabel("iteration")
        stack[0].set_title(title)
        handles = [Line2D([], [], color=_LINES[i % len(_LINES)], linewidth=2, label=name) for i, name in enumerate(frames)]
        if rooms:
            handles.append(Line2D([], [], color=_DARK, linestyle=(0, (4, 3)), linewidth=1, label="capacity"))
        figure.align_ylabels(list(stack))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), **_FRAMED)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200)
    return path


def _names(what: str, given: object) -> tuple[str, ...]:
    """Several names, from whatever holds them; a text is left to who asks."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise ValueError(f"{what} must be a list of names, not {shown(given)}")
    found = tuple(given)
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"{what} must be a list of names, not {shown(found)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """How a column is drawn: divided by ``unit``, with this label."""

    label: str
    unit: float
    logarithmic: bool
    decades: float

    @property
    def scale(self) -> str:
        return "log" if self.logarithmic else "linear"

    @classmethod
    def of(cls, objective: Objective, values: pd.Series[float]) -> _Axis:
        sizes: NDArray[np.float64] = np.abs(values.to_numpy(dtype=np.float64))
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        name, unit, exponent = _name_and_unit(objective.name, float(np.median(sizes)) if sizes.size else 1.0)
        positive = bool((values > 0).all())
        ratio = float(sizes.max() / sizes.min()) if positive else 1.0
        return cls(
            label=name + (f" [{unit}]" if unit else "") + (", more is better" if objective.direction == "maximize" else ""),
            unit=10.0**exponent,
            logarithmic=ratio > _LOG_FROM,
            decades=math.log10(ratio),
        )

    def dress(self, axis: Axis) -> None:
        """Plain numbers at few ticks, logarithmic or not."""
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        if self.logarithmic:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if self.decades < 2.5 else (1,)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _name_and_unit(column: str, typical: float) -> tuple[str, str, int]:
    """("latency", "ms", -3) of ("latency_s", 0.05): the unit begins at the first word that is one, ``_per_`` and ``ps`` are "/".

    A name that is all unit gets that of its quantity: ("cost", "USD/Mtok", 0) of ("usd_per_Mtok", 3.0).
    """
    words = column.split("_")
    start = next((i for i, word in enumerate(words) if i and word.removesuffix("ps") in _UNITS), len(words))
    if words[0] in _QUANTITIES and words[1:2] == ["per"]:
        name, unit = _QUANTITIES[words[0]], words
    else:
        name, unit = " ".join(words[:start]), words[start:]
    if not unit:
        return name, "", 0
    base = unit[0].removesuffix("ps") or unit[0]
    exponent = 0
    if base in _PREFIXED:
        exponent = min(max(3 * math.floor(math.log10(typical) / 3), -12), _PREFIXED[base])
    rest = ("/s" if base != unit[0] else "") + " ".join(unit[1:]).replace("per ", "/", 1)
    return name, _PREFIXES[exponent] + _UNITS[base] + rest, exponent
