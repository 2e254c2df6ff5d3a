"""Figures: what a reader must be told is in them, as Matplotlib drew it."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from memsplit.dse import Objective, plot_front, plot_lines
from memsplit.dse.plots import _name_and_unit

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
    return plot_lines(frame, tmp_path / "lines.png", x="trials", y="share", by="by", title="", **settings)


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
