"""Sets of designs that are not held: every combination of a grid, SciPy's Sobol points from any row on, and what makes none."""

import itertools
import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import qmc

from memsplit.dse.sweep import Grid, Sobol


def rows_of(designs, start=0, stop=None):
    columns = designs.columns(start, len(designs) if stop is None else stop)
    return list(zip(*(column.tolist() for column in columns.values()), strict=True))


axes = st.dictionaries(
    st.text(min_size=1), st.lists(st.integers(-9, 9) | st.floats(allow_nan=False), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=50)
@given(axes, st.data())
def test_a_grid_is_the_product_of_its_axes_row_by_row(axes, data):
    grid = Grid(axes)
    expected = list(itertools.product(*axes.values()))
    start = data.draw(st.integers(0, len(grid)))
    stop = data.draw(st.integers(start, len(grid)))
    assert list(grid.columns(0, 1)) == list(axes)
    assert rows_of(grid, start, stop) == expected[start:stop]
    assert Grid(grid.axes) == grid


def test_numbers_keep_their_kind_and_texts_are_texts():
    """1, 1.0 and True are equal, and no column may take the values of another that is equal to it."""
    columns = Grid({"a": [1, 0], "b": [1.0, 0.0], "c": [True, False], "d": ["x", "y"]}).columns(0, 16)
    assert [array.dtype.kind for array in columns.values()] == ["i", "f", "b", "O"]
    assert set(columns["d"]) == {"x", "y"}


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(0, 99), st.integers(1, 70_000), st.data())
def test_sobol_points_are_those_of_scipy_from_any_row_on(dimensions, seed, number, data):
    designs = Sobol({f"u{i}": (0.0, 1.0) for i in range(dimensions)}, number=number, seed=seed)
    start = data.draw(st.integers(0, number - 1))
    stop = data.draw(st.integers(start, number))
    engine = qmc.Sobol(dimensions, rng=seed)
    expected = engine.random_base2(max(number - 1, 1).bit_length())[start:stop]
    np.testing.assert_array_equal(np.stack(list(designs.columns(start, stop).values()), axis=1), expected)


def test_sobol_takes_ranges_and_lists_and_each_value_as_often_as_the_others():
    designs = Sobol({"bandwidth_TBps": (1, 8), "batch": [1, 2, 4, 8], "memory": ["HBM", "LPDDR"]}, number=64, seed=3)
    columns = designs.columns(0, 64)
    assert columns["bandwidth_TBps"].min() >= 1
    assert columns["bandwidth_TBps"].max() < 8
    assert np.unique(columns["batch"], return_counts=True)[1].tolist() == [16] * 4
    assert pd.Series(columns["memory"]).value_counts().tolist() == [32, 32]
    assert Sobol(designs.axes, number=64, seed=3) == designs, "a list of two values is still a list when it is read back"
    other = Sobol(designs.axes, number=64, seed=4).columns(0, 64)
    assert not np.array_equal(other["bandwidth_TBps"], columns["bandwidth_TBps"])


def test_a_billion_designs_cost_no_memory():
    Sobol({"x": (0, 1)}, number=2).columns(0, 2)  # what it imports takes some megabytes, once in a process
    tracemalloc.start()
    grid = Grid({name: range(1000) for name in "abc"})
    sobol = Sobol({"x": (0, 1)}, number=2**20)
    assert (len(grid), len(sobol)) == (10**9, 2**20)
    assert rows_of(grid, 10**9 - 1, 10**9) == [(999, 999, 999)]
    assert len(sobol.columns(2**20 - 5, 2**20)["x"]) == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Grid({}), "Grid needs a dict with the values of at least one column"),
        (lambda: Grid({"a": []}), "column 'a' has no values"),
        (lambda: Grid({"a": 3}), "column 'a' needs a list of values, not 3"),
        (lambda: Grid({"a": [1.0, math.nan]}), "column 'a' must hold numbers or texts, not nan as value 1"),
        (lambda: Grid({"a": [1, "x"]}), "column 'a' holds numbers and texts"),
        (lambda: Grid({"a": [2**70]}), "more than 64 bits"),
        (lambda: Grid({"a": [-1, 2**63]}), "column 'a' holds 9223372036854775808, which other values make a rounded float"),
        (lambda: Grid({"a": [0.5, 2**53 + 1]}), "column 'a' holds 9007199254740993, which other values make a rounded float"),
        (lambda: Sobol({"a": (-1e308, 1e308)}, number=4), "the range .* is wider than the largest number"),
        (lambda: Grid({3: [1]}), "the name of a column must be a text, not 3"),
        (lambda: Grid(dict.fromkeys("abcd", range(2**16))), "2\\*\\*63 combinations or more"),
        (lambda: Sobol({"a": (2, 1)}, number=4), "with low below high"),
        (lambda: Sobol({"a": (0, math.inf)}, number=4), "finite numbers"),
        (lambda: Sobol({"a": (0, 1)}, number=0), "number must be a whole number of at least 1"),
        (lambda: Sobol({"a": (0, 1)}, number=2**31), "at most 2\\*\\*30"),
        (lambda: Sobol({"a": (0, 1)}, number=4, seed=-1), "seed must be"),
    ],
)
def test_impossible_sets_of_designs_are_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        make()
    assert "\n" not in str(refusal.value)
