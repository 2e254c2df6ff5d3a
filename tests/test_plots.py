"""Figures: what a reader must be told is in them, as Matplotlib drew it."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from memsplit.dse import Objective, plot_front, plot_lines
from memsplit.dse.plots import _name_and_unit, plot_replay

FRAME = pd.DataFrame(
    {
        "trials": [1, 2, 3] * 3,
        "share": [1.0, 2.0, 3.0, 1.5, 1.0, 2.5, 1.0, 2.0, 3.0],
        "lowest": 0.5,
        "highest": 4.0,
        "by": ["a"] * 3 + ["b"] * 3 + ["c"] * 3,
    }
)


@pytest.fixture
def figure(monkeypatch):
    """The last figure that was saved, as a function."""
    saved = []
    save = Figure.savefig

    def kept(self, *arguments, **settings):
        saved.append(self)
        save(self, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", kept)
    return lambda: saved[-1]


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def legend_texts(figure):
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    return [text.get_text() for text in legend.get_texts()]


def draw(tmp_path, frame=FRAME, **settings):
    return plot_lines(frame, tmp_path / "lines.png", **({"x": "trials", "y": "share", "by": "by", "title": ""} | settings))


def test_a_line_that_runs_over_an_earlier_one_is_dashed_and_no_other(tmp_path, figure):
    """ "c" has the points of "a", also where their rows are in another order."""
    for frame in (FRAME, FRAME.iloc[::-1]):
        draw(tmp_path, frame)
        styles = {name: line.get_linestyle() for name, line in lines(figure()).items()}
        first, later = ("a", "c") if frame is FRAME else ("c", "a")
        assert styles == {first: "-", "b": "-", later: "--"}


def test_lines_of_markers_only_are_not_joined(tmp_path, figure):
    draw(tmp_path, markers_only=["a", "b"])
    drawn = lines(figure())
    assert {name: line.get_linestyle() for name, line in drawn.items()} == {"a": "None", "b": "None", "c": "-"}
    assert all(line.get_marker() == "o" for line in drawn.values())
    np.testing.assert_array_equal(drawn["b"].get_ydata(), [1.5, 1.0, 2.5])


def test_the_legend_says_what_a_band_is(tmp_path, figure):
    draw(tmp_path, band=("lowest", "highest"), band_label="of five seeds")
    assert legend_texts(figure()) == ["a", "b", "c", "of five seeds"]
    draw(tmp_path, band=("lowest", "highest"))
    assert legend_texts(figure()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"band_label": "of five seeds"}, "names no band"),
        ({"markers_only": "a"}, "list of names"),
        ({"markers_only": ["d"]}, "there is no line 'd'; lines are a, b, c"),
        ({"markers_only": None}, "markers_only must be a list"),
        ({"linear": 3}, "linear must be a list"),
        ({"x": "nope"}, "x: there is no column 'nope'; columns are trials, share"),
        ({"y": "nope"}, "y: there is no column 'nope'"),
        ({"by": "nope"}, "by: there is no column 'nope'"),
        ({"band": ("lowest", "nope")}, "band: there is no column 'nope'"),
        ({"band": ("lowest",)}, "band must be the columns of its lower and its upper end"),
        ({"y": "by"}, "column 'by' must hold numbers, and it holds 'a'"),
        ({"frame": FRAME.assign(share=np.inf)}, "no row has both 'trials' and 'share', as finite numbers"),
        ({"frame": FRAME.assign(by=None)}, "no row has a value in 'by'"),
        ({"frame": None}, "from a DataFrame"),
    ],
)
def test_options_without_effect_are_refused_and_leave_nothing(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("third", [[], [Objective("share")]])
def test_the_legend_of_a_front_is_framed(tmp_path, figure, third):
    """So that its grey marker is not taken for a design."""
    objectives = [Objective("latency_s"), Objective("usd_per_Mtok"), *third]
    frame = pd.DataFrame({"latency_s": [1.0, 2.0, 3.0], "usd_per_Mtok": [3.0, 1.0, 4.0], "share": [1.0, 2.0, 3.0]})
    plot_front(frame, objectives, tmp_path / "front.png", title="")
    axes = figure().axes[0]
    assert axes.get_legend().get_frame_on()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency [s]", "cost [USD/Mtok]")


@pytest.mark.parametrize(
    ("column", "drawn"),
    [
        ("usd_per_Mtok", ("cost", "USD/Mtok", 0)),
        ("J_per_tok", ("energy", "J/tok", 0)),
        ("tok_per_s", ("throughput", "token/s", 0)),
        ("usd", ("usd", "", 0)),
        ("worth_ms_per_GB", ("worth", "ms/GB", 0)),
        ("system_usd_per_Mtok", ("system", "USD/Mtok", 0)),
        ("tokens", ("tokens", "", 0)),
        ("usd_share", ("usd share", "", 0)),
    ],
)
def test_a_name_that_is_all_unit_gets_that_of_its_quantity(column, drawn):
    assert _name_and_unit(column, 3.0) == drawn


def test_counts_have_a_linear_axis_where_that_is_asked(tmp_path, figure):
    """Values that span a factor of 100 are logarithmic but for the columns named."""
    frame = pd.DataFrame({"trials": [1, 10, 100], "share": [1.0, 50.0, 100.0], "by": "a"})
    for linear, scales in (((), ("log", "log")), (["share"], ("log", "linear")), (["trials", "share"], ("linear", "linear"))):
        draw(tmp_path, frame, linear=linear)
        (axes,) = figure().axes
        assert (axes.get_xscale(), axes.get_yscale()) == scales
    for wrong in ("share", ["shares"]):
        with pytest.raises(ValueError, match="linear must be a list"):
            draw(tmp_path, linear=wrong)


REPLAYS = {
    "optimum": pd.DataFrame({"iteration": [0, 1, 2], "HBM_GB": [9.0, 8.0, 9.5], "n_fc": [4, 4, 3], "migration_GB": [0, 0, 2.0]}),
    "greedy": pd.DataFrame(
        {
            "iteration": [0, 1, 2],
            "HBM_GB": [7.0, 7.0, 7.0],
            "n_fc": [0, 96, 0],
            "migration_GB": [0, 3.0, 1.0],
            "behind_optimum_s": [0, 1.0, 2.0],
        }
    ),
}


def test_a_replay_shows_memories_plan_migration_and_distance(tmp_path, figure):
    """Panels of linear axes one above the other; a bar for each iteration that moved something; the capacity is a line."""
    drawn = plot_replay(REPLAYS, tmp_path / "replay.png", title="one", capacity={"HBM": 10.0})
    assert drawn.stat().st_size > 10_000
    memory, plan, moved, behind = figure().axes
    assert {axes.get_yscale() for axes in figure().axes} == {"linear"}
    assert [line.get_ydata()[0] for line in memory.get_lines()] == [9.0, 7.0, 10.0]
    assert memory.get_ylim()[1] > 10
    np.testing.assert_array_equal(plan.get_lines()[1].get_ydata(), [0, 96, 0])
    assert sorted(bar.get_height() for bar in moved.patches) == [1.0, 2.0, 3.0]
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in moved.patches)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(bars))  # none hides another
    assert len(behind.get_lines()) == 1
    assert legend_texts(figure()) == ["optimum", "greedy", "capacity"]
    plot_replay({"greedy": REPLAYS["greedy"]}, tmp_path / "alone.png", title="")
    assert len(figure().axes) == 3


@pytest.mark.parametrize(
    ("frames", "capacity", "match"),
    [
        ({}, None, "at least one iteration"),
        ({"a": REPLAYS["greedy"][:0]}, None, "at least one iteration"),
        ({"a": REPLAYS["greedy"].drop(columns="iteration")}, None, "'iteration'"),
        ({"a": REPLAYS["greedy"][["iteration"]]}, None, "nothing to draw"),
        (REPLAYS, {"LPDDR": 1.0}, "no frame has the column 'LPDDR_GB'"),
        (REPLAYS["greedy"], None, "a dict of their rows by name"),
        ({"a": REPLAYS}, None, "a dict of their rows by name"),
        *((REPLAYS, {"HBM": room}, "capacity: HBM must be a number") for room in (-1, np.nan, "x", None)),
    ],
)
def test_a_replay_that_cannot_be_drawn_is_refused(tmp_path, frames, capacity, match):
    with pytest.raises(ValueError, match=match):
        plot_replay(frames, tmp_path / "replay.png", title="", capacity=capacity)
    assert not (tmp_path / "replay.png").exists()


def test_axes_may_be_named_by_an_iterator(tmp_path, figure):
    frame = pd.DataFrame({"trials": [1, 10, 100], "share": [1.0, 50.0, 100.0], "by": "a"})
    draw(tmp_path, frame, linear=iter(["trials", "share"]))
    (axes,) = figure().axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")


def test_a_dollar_is_a_dollar(tmp_path, figure):
    """And not the beginning of a formula, which may even be a wrong one."""
    title = r"costs $\frac{a}$ to $5"
    draw(tmp_path, FRAME.assign(by="$x$"), title=title)
    assert figure().axes[0].title.get_parse_math() is False
    assert [text.get_parse_math() for legend in [figure().axes[0].get_legend()] for text in legend.get_texts()] == [False]
    plot_replay(REPLAYS, tmp_path / "replay.png", title=title)
    objectives = [Objective("latency_s"), Objective("usd_per_Mtok")]
    plot_front(pd.DataFrame({"latency_s": [1.0, 2.0], "usd_per_Mtok": [3.0, 1.0]}), objectives, tmp_path / "front.png", title=title)
