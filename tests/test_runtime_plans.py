"""Plans as values, the forms of blocks, and predictions from measured layers: what needs no PyTorch."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsplit.dse.runtime import CachePlan, FullKV, LayerTimes, Placement, SplitKV, TransferKV
from memsplit.models import (
    CacheRatioPlan,
    MiniBatchPlan,
    PlacementPlan,
    RecomputeSplitPlan,
    RecomputeSplitProblem,
    Workload,
)
from memsplit.models.overlap import fluid
from memsplit.models.presets import OPT_6_7B, SYSTEMS

ROUNDING = 1e-9
"""Relative: sums of some hundred terms in another order."""

SPLIT_PROBLEM = RecomputeSplitProblem.build(
    SYSTEMS["a100_pcie4"], Workload(llm=OPT_6_7B, batch=4, context=64), template="chunked", chunks=3, batches=2, weights="host"
)


def refused(message: str):
    return pytest.raises(ValueError, match=message)


# Plans


@pytest.mark.parametrize("plan", [FullKV(), TransferKV(), SplitKV(split=3), CachePlan(blocks=CacheRatioPlan(kv_gpu=1)), Placement()])
def test_plans_are_frozen_values(plan):
    assert plan == type(plan)(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
    assert len({plan, plan}) == 1
    with pytest.raises(FrozenInstanceError):
        plan.weights = "gpu"


def test_a_split_follows_from_the_problems_plan():
    assert SplitKV.from_plan(SPLIT_PROBLEM, RecomputeSplitPlan(splits=(40,))) == SplitKV(
        split=40, template="chunked", chunks=3, weights="host", gpu_batches=2
    )
    with refused("one split for all layers"):
        SplitKV.from_plan(SPLIT_PROBLEM, RecomputeSplitPlan(splits=(40, 41)))


def test_staged_is_one_chunk():
    assert SplitKV(split=5, template="staged", chunks=7) == SplitKV(split=5)
    assert SplitKV(split=5).chunks == 1


def test_a_placement_follows_from_flexgens_where_the_runtime_has_the_parts():
    plan = PlacementPlan(weights=(0.2, 0.8, 0), cache=(0.5, 0.5, 0), hidden=(1, 0, 0), gpu_batch=4, gpu_batches=3)
    assert Placement.from_plan(plan) == Placement(weights=0.2, cache=0.5, attention="host", gpu_batches=3)
    published = PlacementPlan.from_percent((20, 80, 0, 100, 0, 100), 48, 3)
    assert Placement.from_plan(published) == Placement(weights=0.2, cache=0, hidden=0, attention="host", gpu_batches=3)
    with refused("has no disk"):
        Placement.from_plan(PlacementPlan(weights=(0.2, 0.3, 0.5), cache=(1, 0, 0), hidden=(1, 0, 0), gpu_batch=4, gpu_batches=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitKV(split=-1), "split"),
        (lambda: SplitKV(split=1.5), "split"),
        (lambda: SplitKV(split=1, template="best"), "template must be"),
        (lambda: SplitKV(split=1, chunks=0), "chunks"),
        (lambda: FullKV(weights="disk"), "weights must be on 'gpu' or on 'host'"),
        (lambda: TransferKV(gpu_batches=0), "gpu_batches"),
        (lambda: Placement(weights=1.5), "divide per cent by 100"),
        (lambda: Placement(cache=-0.5), "cache"),
        (lambda: Placement(hidden=float("nan")), "hidden"),
        (lambda: Placement(attention="disk"), "attention must be on 'gpu' or on 'host'"),
        (lambda: CachePlan(blocks=CacheRatioPlan()), "holds no block"),
        (lambda: CachePlan(blocks=CacheRatioPlan(kv_gpu=1), block=0), "block"),
        (lambda: CachePlan(blocks=CacheRatioPlan(kv_gpu=1), weights="disk"), "weights"),
    ],
)
def test_bad_plans_are_refused(make, message):
    with refused(message):
        make()


# Blocks

counts = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


def forms_of(plan: CachePlan, batch: int, rows: int) -> np.ndarray:
    """Forms [rows, requests] in the requests' own order."""
    order, _ = plan.run(batch, rows, 1)
    found = np.concatenate(plan.forms(batch, rows), axis=1)
    return found[:, np.argsort(order)]


@given(counts=counts, batch=st.integers(1, 6), each=st.integers(1, 9), block=st.integers(1, 5))
def test_blocks_are_whole_and_in_the_plans_shares(counts, batch, each, block):
    """Of n blocks, each form has its share, rounded to a neighbour."""
    plan = CachePlan(blocks=CacheRatioPlan(**dict(zip(("kv_gpu", "act_gpu", "kv_host", "act_host"), counts, strict=True))), block=block)
    found = forms_of(plan, batch, each * block).reshape(each, block, batch)
    assert (found == found[:, :1]).all()
    held = np.bincount(found[:, 0].ravel(), minlength=4)
    assert held.sum() == batch * each
    np.testing.assert_array_less(np.abs(held - batch * each * np.array(counts) / sum(counts)), 1)


def test_a_plan_of_as_many_blocks_is_kept_exactly():
    plan = CachePlan(blocks=CacheRatioPlan(kv_gpu=3, act_gpu=2, kv_host=4, act_host=3))
    assert np.bincount(forms_of(plan, 3, 64)[::16].ravel()).tolist() == [3, 2, 4, 3]


def test_the_device_holds_the_requests_that_come_first():
    found = forms_of(CachePlan(blocks=CacheRatioPlan(kv_gpu=4, act_host=4)), 2, 64)
    assert (found[:, 0] == 0).all()
    assert (found[:, 1] == 3).all()


@given(near=st.integers(0, 12), prefix=st.integers(1, 12))
def test_forms_are_spread_so_that_every_prefix_has_the_ratio(near, prefix):
    """New tokens follow the ratio as the prompt does: at most a block more or less than its share."""
    found = forms_of(CachePlan(blocks=CacheRatioPlan(kv_host=near, act_host=12 - near)), 1, 12 * 16)[::16, 0]
    assert abs((found[:prefix] == 2).sum() - prefix * near / 12) <= 1


def test_mini_batches_put_requests_into_order():
    plan = CachePlan(blocks=CacheRatioPlan(kv_gpu=1), mini_batches=MiniBatchPlan(batches=((2, 0), (1,))))
    order, run = plan.run(3, 10, 5)
    assert (order, run.sizes, run.rows) == ([2, 0, 1], (2, 1), 14)
    assert [(one.start, one.stop) for one in run.ranges] == [(0, 2), (2, 3)]


# Predictions

seconds = st.floats(0, 10).map(lambda value: round(value, 3))


@st.composite
def layer_times(draw: st.DrawFn, most_batches: int = 1) -> LayerTimes:
    drawn = {name: draw(seconds) for name in ("kv", "act", "recompute", "compute", "weights", "outside")}
    first = drawn["weights"] * draw(st.floats(0, 1))
    return LayerTimes(**drawn, first=first, layers=draw(st.integers(1, 5)), context=100, gpu_batches=draw(st.integers(1, most_batches)))


@given(times=layer_times(), split=st.integers(1, 100), chunks=st.integers(1, 5), weights=st.sampled_from(["gpu", "host"]))
def test_a_replay_of_the_barrier_is_the_closed_form(times, split, chunks, weights):
    """One GPU batch: the template's maximum of lines is what the executed events take, the last layer's computation included."""
    plan = SplitKV(split=split, template="chunked", chunks=chunks, weights=weights)
    assert times.replay(plan) == pytest.approx(times.step(plan), rel=ROUNDING, abs=1e-9)


@given(times=layer_times(4), split=st.integers(0, 100), chunks=st.integers(1, 5), weights=st.sampled_from(["gpu", "host"]))
def test_no_execution_is_faster_than_its_template(times, split, chunks, weights):
    """Several GPU batches, and loads without a barrier: link and GPU are bounds that events can only miss."""
    for template in ("staged", "chunked", "fluid"):
        plan = SplitKV(split=split, template=template, chunks=chunks, weights=weights, gpu_batches=times.gpu_batches)
        assert times.replay(plan) >= float(times.layers * _floor(times, plan)) * (1 - ROUNDING) - 1e-9


def _floor(times: LayerTimes, plan: SplitKV) -> float:
    """A layer in which link and GPU are always busy."""
    weights = times.weights if plan.weights == "host" else 0.0
    return float(
        fluid(
            plan.split / times.context,
            kv=times.kv,
            act=times.act,
            recompute=times.recompute,
            weights=weights,
            compute=times.compute,
            batches=times.gpu_batches,
        )
    )


@given(times=layer_times())
def test_a_transfer_takes_the_link_or_the_gpu(times):
    """Nothing recomputed: a step is the slower of both, in every layer and in the last, which chooses the token, too; one layer is both."""
    alone = times.kv + times.compute + times.outside
    expected = (
        alone if times.layers == 1 else (times.layers - 1) * max(times.kv, times.compute) + max(times.kv, times.compute + times.outside)
    )
    assert times.step(TransferKV()) == pytest.approx(expected, rel=ROUNDING)
    assert times.step(SplitKV(split=0)) == times.step(TransferKV())


def test_predictions_refuse_what_was_not_measured():
    times = LayerTimes(kv=1, act=0.5, recompute=0.4, compute=0.1, weights=0.3, first=0.1, outside=0.01, layers=4, context=100)
    assert times.ratios == (0.5, 0.4, 0.1)
    with refused("the plan recomputes 101 of 100 tokens"):
        times.step(SplitKV(split=101))
    with refused("measure those"):
        times.replay(TransferKV(gpu_batches=2))


def test_the_best_split_of_measured_layers_is_kvprs_balance():
    """1 / (1 + rho) of the tokens, as in ``models.overlap``."""
    times = LayerTimes(kv=1, act=0.5, recompute=0.25, compute=0.0, weights=0, first=0, outside=0, layers=4, context=1000)
    best = min(range(1001), key=lambda split: times.step(SplitKV(split=split)))
    assert best == 800


def test_times_of_blocks_add_up_to_the_layers():
    """All blocks of two GPU batches of three requests: what each batch was measured to take, twice."""
    named = {"kv": 1, "act": 0.5, "recompute": 0.25, "compute": 0.1, "weights": 0.3, "first": 0.1, "outside": 0.01, "assemble": 0.02}
    layer = LayerTimes(**named, layers=4, context=160, gpu_batches=2).ratio_layer(3, 16)
    blocks = 2 * 3 * 10
    link, gpu, stores = layer.times(0, blocks, 0)
    assert (float(link), float(gpu), float(stores)) == pytest.approx((0.3 + 2 * 1, 2 * 0.12, 0))
    link, gpu, _ = layer.times(0, 0, blocks)
    assert (float(link), float(gpu)) == pytest.approx((0.3 + 2 * 0.5, 2 * (0.12 + 0.25)))
