"""Tables of designs: a column is numbers, and whatever else it holds is named with its row and the way out."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from memsplit.models import Workload
from memsplit.models.design_table import DesignTable
from memsplit.models.presets import H2M2_SYSTEM, LLAMA2_7B
from memsplit.models.units import GB

SERVED = Workload(llm=LLAMA2_7B, batch=2, context=100)


def built(columns) -> DesignTable:
    return DesignTable.from_columns(H2M2_SYSTEM, SERVED, columns)


@pytest.mark.parametrize(
    "column",
    [
        [48, 96],
        (48.0, 96.0),
        np.array([48, 96], dtype=np.uint8),
        np.array([48, 96], dtype=np.float32),
        np.array([48, 96.0], dtype=object),
        np.array([np.int64(48), np.float64(96)], dtype=object),
        pd.Series([48, 96]),
        pd.Series([48, 96], dtype="Int64"),
        pd.array([48.0, 96.0], dtype="Float64"),
        range(48, 97, 48),
    ],
)
def test_plain_numbers_are_taken_however_they_are_held(column):
    table = built({"HBM_capacity_GB": column, "batch": column})
    assert [table[i][0].tier("HBM").capacity for i in range(2)] == [48 * GB, 96 * GB]
    assert [table[i][1].batch for i in range(2)] == [48, 96]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (["48", "96"], "not '48' as in row 0"),
        ([48, "x"], "not 'x' as in row 1"),
        ([True, False], "not True as in row 0"),
        ([48, True], "not True as in row 1"),
        (np.array([True]), "not True as in row 0"),
        (np.array([48, True], dtype=object), "not True as in row 1"),
        ([48, None], "not a missing value as in row 1"),
        (pd.array([48, None], dtype="Int64"), "row 1"),
        (np.array([48, pd.NA], dtype=object), "not a missing value as in row 1"),
        (np.ma.masked_array([48, 96], mask=[False, True]), "row 1 has none: it is missing"),
        ([48 + 1j], "as in row 0"),
        ([Decimal(48)], "as in row 0"),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), "as in row 0"),
        ([48, 10**400], "below 1.8e308, not as in row 1"),
        ([[48], [96]], r"one a row, not an array of shape \(2, 1\)"),
        ([[48], [96, 1]], "one a row, not"),
    ],
)
@pytest.mark.parametrize(("name", "rule"), [("HBM_capacity_GB", "numbers"), ("batch", "whole numbers of at least 1, without a unit")])
def test_what_is_no_number_is_named_with_its_row(name, rule, column, said):
    """NumPy would make 48 of "48" and 1 of True."""
    with pytest.raises(ValueError, match=f"column '{name}' must hold {rule}.*{said}.*correct or drop it") as refusal:
        built({name: column})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["HBM_capacity_GB", "batch"])
def test_a_missing_number_of_a_frame_is_named_with_its_row(name):
    """pandas makes a NaN of it, or leaves what it has for missing values."""
    for column in (pd.Series([48, None], dtype="Int64"), pd.Series([48.0, None]), pd.Series([48, None], dtype=object)):
        with pytest.raises(ValueError, match=f"column '{name}' must hold .*(not nan as in|not a missing value as in|and) row 1"):
            built({name: column})


def test_a_workload_is_of_an_llm():
    with pytest.raises(ValueError, match=r"workload: llm must be an LLMConfig, not 'llama'; take one of presets\.LLMS"):
        Workload(llm="llama", batch=1, context=1)
