"""Break-even points: exact on whole numbers, as narrow as asked on real ones, and honest about what was not looked at."""

import math
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse.break_even import break_even
from memsplit.models import DATASHEET, CacheRatioProblem, KernelMappingProblem, Workload
from memsplit.models.presets import H2M2_SYSTEM, LLAMA2_70B, LPDDR_ONLY_SYSTEM, OPT_30B, RTX4090_SYSTEM
from memsplit.models.units import GB
from memsplit.solvers import LpRatio, SingleFormRatio, SingleTierMapping, TableMapping


def two_lines(_):
    raise ValueError("one\ntwo.")


scores = st.lists(st.sampled_from([None, 0.0, 1.0, 2.0]), min_size=2, max_size=40)


def listed(first, second):
    """Verdicts by comparing at every whole number."""

    def better(one, two):
        one, two = (math.inf if score is None else score for score in (one, two))
        if one == two:
            return "neither" if math.isinf(one) else "equal"
        return "first" if one < two else "second"

    return [better(one, two) for one, two in zip(first, second, strict=True)]


@given(data=st.data())
@settings(max_examples=100)
def test_with_a_point_for_each_whole_number_every_flip_is_found(data):
    """Against a plain list, for scores that jump, tie, and are infeasible anywhere."""
    first = data.draw(scores)
    second = data.draw(st.lists(st.sampled_from([None, 0.0, 1.0, 2.0]), min_size=len(first), max_size=len(first)))
    verdicts = listed(first, second)
    found = break_even(lambda n: first[n], lambda n: second[n], 0, len(first) - 1, whole=True, points=len(first))
    expected = [(n, n + 1, one, two) for n, (one, two) in enumerate(pairwise(verdicts)) if one != two]
    assert [(flip.last, flip.first, flip.before, flip.after) for flip in found.flips] == expected
    assert (found.at_low, found.at_high) == (verdicts[0], verdicts[-1])
    assert "undo" not in str(found)


@given(at=st.integers(-1000, 999), points=st.integers(2, 40))
@settings(max_examples=60)
def test_one_flip_of_whole_numbers_is_the_exact_pair_whatever_the_grid(at, points):
    found = break_even(lambda n: float(n > at), lambda n: float(n <= at), -1000, 1000, whole=True, points=points)
    (flip,) = found.flips
    assert (flip.last, flip.first, flip.before, flip.after) == (at, at + 1, "first", "second")
    assert isinstance(flip.first, int)
    assert found.value == at + 1


@given(at=st.floats(0.001, 999), logarithmic=st.booleans(), tolerance=st.sampled_from([1e-3, 1e-9]))
@settings(max_examples=60)
def test_a_flip_of_real_numbers_is_as_narrow_as_asked_and_holds_the_crossing(at, logarithmic, tolerance):
    """Two lines cross at ``at``; the tie there counts as a verdict of its own."""
    found = break_even(lambda x: x, lambda x: at, 0.0005, 1000.0, tolerance=tolerance, logarithmic=logarithmic, equal=0)
    assert found.flips[0].last <= at <= found.flips[-1].first
    assert (found.flips[0].before, found.flips[-1].after) == ("first", "second")
    for flip in found.flips:
        assert flip.first - flip.last <= tolerance * max(flip.first, 1e-6 * 1000)


def test_a_flip_at_zero_ends_by_the_range():
    """An interval relative to a value of 0 would never be narrow enough."""
    (flip,) = break_even(lambda x: float(x > 0), lambda x: 0.5, -1.0, 2.0).flips
    assert flip.last <= 0 < flip.first
    assert flip.first - flip.last <= 3e-6 * 1e-9 + 1e-15


@pytest.mark.parametrize("high", [1e3, 1e12])
def test_a_logarithmic_flip_is_as_narrow_as_the_text_says_whatever_the_range(high):
    """A floor of a millionth of the range would leave a flip at 1.2 uncertain by thousands."""
    (flip,) = break_even(lambda x: x, lambda x: 1.2345678, 1.0, high, logarithmic=True, equal=0).flips
    assert flip.last <= 1.2345678 <= flip.first
    assert flip.first - flip.last <= 1e-9 * flip.first


@given(at=st.integers(1, 15), share=st.floats(0.0, 0.2), tolerance=st.sampled_from([1e-3, 1e-9]))
@settings(max_examples=60)
def test_a_tie_narrower_than_the_tolerance_is_one_flip_at_a_point_of_the_grid_as_elsewhere(at, share, tolerance):
    """Equal on ``share`` of the tolerance around grid point ``at`` of 0 to 16."""
    half = share * tolerance * at / 2

    def first(x):
        return 1.0 if abs(x - at) <= half else 0.0 if x < at else 2.0

    (flip,) = break_even(first, lambda x: 1.0, 0.0, 16.0, tolerance=tolerance).flips
    assert (flip.before, flip.after) == ("first", "second")
    assert flip.last <= at <= flip.first
    assert flip.first - flip.last <= tolerance * flip.first


def test_a_wide_tie_and_one_that_is_only_touched_stay_two_flips():
    """And whole numbers have no tolerance."""
    wide = break_even(lambda x: 1.0 if abs(x - 8) <= 1e-6 else 0.0 if x < 8 else 2.0, lambda x: 1.0, 0.0, 16.0)
    assert [(flip.before, flip.after) for flip in wide.flips] == [("first", "equal"), ("equal", "second")]
    touched = break_even(lambda x: abs(x - 8), lambda x: 0.0, 0.0, 16.0, equal=0)
    assert [(flip.before, flip.after) for flip in touched.flips] == [("second", "equal"), ("equal", "second")]
    assert len(break_even(float, lambda x: 8.0, 0, 16, whole=True).flips) == 2


def test_several_flips_are_all_returned_where_the_grid_shows_them():
    """sin and cos cross at pi/4 + k pi."""
    found = break_even(math.sin, math.cos, 0.0, 10.0, names=("sine", "cosine"))
    crossings = [flip.first for flip in found.flips if flip.before != "equal"]
    assert crossings == pytest.approx([math.pi / 4 + k * math.pi for k in range(3)], rel=1e-8)
    assert "3 flips from 0 to 10: sine is better up to 0.7853981" in str(found)
    assert "17 points of the grid two flips that undo each other are possible" in str(found)


def test_flips_between_two_points_can_be_missed_and_the_text_says_so():
    """first is worse only in (4, 5), which a grid of 0, 10 and 20 does not see; a finer one does."""

    def bump(x):
        return float(4 < x < 5)

    coarse = break_even(bump, lambda x: 0.5, 0.0, 20.0, points=3)
    assert coarse.flips == ()
    assert "No flip from 0 to 20: first is better at all 3 values" in str(coarse)
    assert "possible" in str(coarse)
    assert len(break_even(bump, lambda x: 0.5, 0.0, 20.0, points=41).flips) == 2


def test_infeasible_is_worst_and_neither_is_said():
    found = break_even(lambda n: None if n > 7 else 5.0, lambda n: None if n > 20 else 9.0, 1, 50, whole=True, names=("fast", "large"))
    assert [(flip.last, flip.before, flip.after) for flip in found.flips] == [(7, "first", "second"), (20, "second", "neither")]
    assert str(found) == (
        "2 flips from 1 to 50: fast is better up to 7, large is better up to 20, neither fast nor large is possible from 21 on. "
        "Between the 17 points of the grid two flips that undo each other are possible."
    )


def test_equal_scores_are_a_verdict_of_their_own():
    found = break_even(lambda x: max(0.0, 3 - x), lambda x: 0.0, 0, 10, whole=True)
    assert [(flip.last, flip.first, flip.before, flip.after) for flip in found.flips] == [(2, 3, "second", "equal")]
    assert break_even(lambda x: 1.0, lambda x: 1.0 + 1e-14, 0.0, 1.0).at_low == "equal"


def test_each_value_is_scored_once():
    seen = []

    def score(x):
        seen.append(x)
        return float(x)

    found = break_even(score, lambda x: 300.0, 0, 1000, whole=True)
    assert len(seen) == len(set(seen)) == found.looked_at


def test_the_batch_up_to_which_recomputing_wins_is_exact():
    """HybridServe's question on whole batches, by the exact solvers: the pair is checked by solving both sides of it again."""

    def latency(solver):
        def score(batch):
            work = Workload(llm=OPT_30B, batch=batch, context=512, weight_bits=16, kv_bits=16, activation_bits=16)
            return solver.solve(CacheRatioProblem.build(RTX4090_SYSTEM, work, profile=DATASHEET)).objective

        return score

    best, keys = latency(LpRatio()), latency(SingleFormRatio(form="kv"))
    found = break_even(best, keys, 1, 64, whole=True, points=5, equal=1e-9)
    assert found.flips, "sending keys and values is enough for one request, not for 64"
    for flip in found.flips:
        assert flip.first == flip.last + 1
    flip = found.flips[-1]
    assert best(flip.first) < keys(flip.first) * (1 - 1e-9)
    assert abs(best(flip.last) - keys(flip.last)) <= 1e-9 * keys(flip.last)


def test_the_hbm_at_which_two_memories_beat_lpddr_alone():
    """In whole GB by the exact table search. A machine with little HBM gives a chip to it that LPDDR would need more."""
    work = Workload(llm=LLAMA2_70B, batch=32, context=4096)
    alone = SingleTierMapping().solve(KernelMappingProblem.build(LPDDR_ONLY_SYSTEM, work)).objective

    def two(size):
        return TableMapping().solve(KernelMappingProblem.build(H2M2_SYSTEM.with_tier("HBM", capacity=size * GB), work)).objective

    found = break_even(two, lambda size: alone, 0, 96, whole=True, points=5)
    (flip,) = found.flips
    assert (flip.before, flip.after, flip.first - flip.last) == ("second", "first", 1)
    assert two(flip.last) > alone > two(flip.first)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"low": 2.0, "high": 2.0}, "low must be below high"),
        ({"high": math.inf}, "both finite"),
        ({"low": math.nan}, "both finite"),
        ({"whole": True, "high": 2.5}, "whole numbers if whole=True"),
        ({"points": 1}, "at least 2"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"logarithmic": True, "low": 0.0}, "begins above 0"),
        ({"names": ("", "b")}, "two texts"),
        ({"first": lambda x: math.nan}, "'first' must score a number, or None where nothing fits, not nan as at 1.0"),
        ({"second": lambda x: "3 ms"}, "'second' must score a number"),
        ({"second": lambda x: 10**400}, "'second' must score a number"),
        ({"first": lambda x: 1 / 0}, "'first' cannot score 1.0, ZeroDivisionError: .*division by zero; return None"),
        ({"first": two_lines}, "'first' cannot score 1.0, ValueError: one two; return None where nothing fits"),
        ({"first": 3.0}, "'first' must be a function"),
        ({"low": "a"}, "both finite numbers, not 'a'"),
        ({"low": None}, "both finite numbers, not None"),
        ({"low": Decimal(1)}, "both finite numbers, not Decimal"),
        ({"low": True}, "both finite numbers, not True"),
        ({"high": 10**400}, "both finite numbers"),
        ({"points": "a"}, "at least 2 and at most 1,000,000, not 'a'"),
        ({"points": None}, "at most 1,000,000, not None"),
        ({"points": math.inf}, "at most 1,000,000, not inf"),
        ({"points": math.nan}, "at most 1,000,000, not nan"),
        ({"points": 1e8}, "at most 1,000,000, not 1"),
        ({"points": 2.5}, "whole number"),
        ({"tolerance": "a"}, "tolerance must be above 0"),
        ({"equal": None}, "tolerance must be above 0"),
        ({"names": 3}, "two texts"),
        ({"names": ("a", 3)}, "two texts"),
        ({"names": "ab"}, "two texts"),
        ({"low": 1e-300, "high": 1e300, "logarithmic": True}, "the ratio of low and high, 1e-300 and 1e.300, is beyond"),
        ({"low": -1e308, "high": 1e308}, "the difference of low and high, -1e.308 and 1e.308, is beyond"),
        ({"low": -1e308, "high": 1e308, "whole": True}, "the difference of low and high"),
    ],
)
def test_bad_input_is_one_sentence(changes, sentence):
    arguments = {"first": float, "second": lambda x: 1.5, "low": 1.0, "high": 3.0} | changes
    with pytest.raises(ValueError, match=sentence) as refusal:
        break_even(**arguments)
    assert "\n" not in str(refusal.value)
