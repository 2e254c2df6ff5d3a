"""The study that scores samplers against the exact front of a grid: its grid, its front, its scale."""

import itertools

import numpy as np
import pandas as pd
import pytest

from memsplit.dse import non_dominated
from memsplit.dse.samplers import NSGA2, RandomSearch
from memsplit.models import FIRST_PRINCIPLES, KernelMappingProblem
from memsplit.models.presets import H2M2_SYSTEM
from memsplit.models.units import GB, TB
from memsplit.solvers import TableMapping
from memsplit.studies.sampler_quality import RANGES, WORKLOAD, Priced, searched, summary


@pytest.fixture(scope="module")
def grid() -> Priced:
    return Priced.of(4, 1)


def test_each_design_of_the_grid_has_the_price_of_its_own_machine(grid: Priced):
    """The array score against the single solver on systems built field by field, in the order of the numbers of designs."""
    axes = [np.linspace(*ends, 4).tolist() for ends in RANGES.values()]
    places = list(itertools.product(range(4), repeat=4))
    assert len(grid.scores) == len(places)
    for place in places[::37]:
        hbm, hbm_speed, lpddr, lpddr_speed = (axis[i] for axis, i in zip(axes, place, strict=True))
        system = H2M2_SYSTEM.with_tier("HBM", capacity=hbm * GB, bandwidth=hbm_speed * TB)
        system = system.with_tier("LPDDR", capacity=lpddr * GB, bandwidth=lpddr_speed * GB)
        result = TableMapping().solve(KernelMappingProblem.build(system, WORKLOAD, profile=FIRST_PRINCIPLES))
        found = grid.scores[grid.row(place)]
        if result.objective is None:
            assert np.isnan(found[0])
        else:  # sums in another order differ in the last bits
            assert found == pytest.approx([result.objective, system.memory_cost, hbm_speed + lpddr_speed / 1000], rel=1e-12)


def test_the_front_is_exact_and_fills_the_scale(grid: Priced):
    np.testing.assert_array_equal(grid.front, non_dominated(grid.scores))
    assert 1 < grid.front.sum() < len(grid.front)
    assert (grid.scores[grid.front] < grid.reference).all(), "each design of the front counts"


def test_who_tries_everything_has_all_of_it(grid: Priced):
    """Random search over 256 designs finds the exact front in time, and the ratio is then 1."""
    rows = searched(grid, RandomSearch(), 0, [10, 100, 3000])
    assert rows[-1]["front_found_share"] == 1.0
    assert rows[-1]["hypervolume_ratio"] == pytest.approx(1.0, rel=1e-12)  # sums over more points, in another order
    ratios = [row["hypervolume_ratio"] for row in rows]
    assert ratios == sorted(ratios), "more trials never cover less"
    assert all(0 <= row["infeasible"] <= row["trials"] for row in rows)


def test_the_summary_has_median_and_spread_of_the_seeds(grid: Priced):
    frame = pd.DataFrame([row for seed in range(3) for row in searched(grid, NSGA2(), seed, [20, 40])])
    short = summary(frame)
    assert short["seeds"].tolist() == [3, 3]
    for trials, row in zip((20, 40), short.itertuples(), strict=True):
        ratios = frame[frame["trials"] == trials]["hypervolume_ratio"]
        assert (row.lowest, row.hypervolume_ratio, row.highest) == (ratios.min(), ratios.median(), ratios.max())
