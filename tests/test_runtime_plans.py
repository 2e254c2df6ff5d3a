"""Plans as values, the forms of blocks, and predictions from measured layers."""

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse.runtime import CachePlan, FullKV, LayerTimes, Placement, SplitKV, TransferKV
from memsplit.dse.runtime.times import SETTLING
from memsplit.models import (
    CacheRatioPlan,
    CacheRatioProblem,
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
    assert Placement.from_plan(plan) == Placement(weights=0.2, cache=0.5, attention="host", gpu_batches=3, gpu_batch=4)
    published = PlacementPlan.from_percent((20, 80, 0, 100, 0, 100), 48, 3)
    assert Placement.from_plan(published) == Placement(weights=0.2, cache=0, hidden=0, attention="host", gpu_batches=3, gpu_batch=48)
    with refused("it is for 3 GPU batches of 48, not for 12 prompts; give 144"):
        Placement.from_plan(published).run(12, 5, 2)
    tiny = PlacementPlan(weights=(0.2, 0.8 - 1e-8, 1e-8), cache=(1 - 1e-8, 0, 1e-8), hidden=(1, 0, 0), gpu_batch=4, gpu_batches=3)
    assert Placement.from_plan(tiny).cache == 1
    with refused("has no disk"):
        Placement.from_plan(PlacementPlan(weights=(0.2, 0.3, 0.5), cache=(1, 0, 0), hidden=(1, 0, 0), gpu_batch=4, gpu_batches=3))


def test_a_cache_plan_follows_from_the_problem_with_its_blocks_and_weights():
    workload = Workload(llm=OPT_6_7B, batch=4, context=100)
    problem = CacheRatioProblem.build(SYSTEMS["rtx4090_pcie4"], workload, weights="gpu", block=32)
    plan = CacheRatioPlan(kv_gpu=4, act_host=12)
    found = CachePlan.from_plan(problem, plan)
    assert found == CachePlan(blocks=plan, block=32, weights="gpu", requests=4)
    with refused("it is for 4 requests, not for 8 prompts"):
        found.run(8, 100, 2)
    with refused("has no block size"):
        CachePlan.from_plan(replace(problem, settings=None), plan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CachePlan(blocks=None), "blocks must be the solver's plan, not None"),
        (lambda: CachePlan(blocks=CacheRatioPlan(kv_gpu=1), mini_batches=5), "mini_batches must be the solver's plan, not 5"),
        (lambda: CachePlan(blocks=CacheRatioPlan(kv_gpu=1), requests=0), "requests"),
        (lambda: Placement(gpu_batch=0), "gpu_batch"),
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


ways = {"split": st.integers(0, 100), "chunks": st.integers(1, 5), "weights": st.sampled_from(["gpu", "host"])}


@given(times=layer_times(), **ways)
def test_a_replay_of_the_barrier_is_the_closed_form(times, split, chunks, weights):
    """One GPU batch: the template's maximum of lines is what the executed events take, the last layer's computation included."""
    plan = SplitKV(split=max(split, 1), template="chunked", chunks=chunks, weights=weights)
    assert times.replay(plan) == pytest.approx(times.step(plan), rel=ROUNDING, abs=1e-9)


@given(times=layer_times(), template=st.sampled_from(["staged", "chunked", "fluid"]), **ways)
def test_a_single_layer_takes_what_its_events_take(times, template, split, chunks, weights):
    """Without another layer to work at, in every template: the computation, then the loads beside the choice of the token."""
    one, plan = replace(times, layers=1), SplitKV(split=split, template=template, chunks=chunks, weights=weights)
    # Weights that are sent ahead may slow the link down by little, step by step, before the GPU has to wait for it.
    settled = ROUNDING if weights == "gpu" else 2 / SETTLING
    assert one.step(plan) * (1 - settled) - 1e-9 <= one.replay(plan) <= one.step(plan) * (1 + ROUNDING) + 1e-9


def test_a_single_layer_loads_while_the_token_is_chosen():
    times = LayerTimes(kv=30, act=0, recompute=0, compute=12, weights=50, first=0, outside=20, layers=1, context=10)
    assert times.step(TransferKV()) == times.replay(TransferKV()) == 12 + 30
    assert replace(times, outside=40).step(TransferKV()) == 12 + 40
    # Its weights do not wait for the token: 50 and the keys and values on the link, beside all else.
    assert times.step(TransferKV(weights="host")) == times.replay(TransferKV(weights="host")) == 50 + 30
    assert times.step(SplitKV(split=1, weights="host")) == 12 + 50 + 0.9 * 30  # a barrier


@given(times=layer_times(4), **ways)
def test_no_execution_is_faster_than_its_template(times, split, chunks, weights):
    """Several GPU batches, and loads without a barrier: link and GPU are bounds that events can only miss."""
    for template in ("staged", "chunked", "fluid"):
        plan = SplitKV(split=split, template=template, chunks=chunks, weights=weights, gpu_batches=times.gpu_batches)
        assert times.replay(plan) >= float(times.layers * _floor(times, plan)) * (1 - ROUNDING) - 1e-9


@given(times=layer_times(4), **ways)
def test_without_a_barrier_only_the_choice_of_the_token_can_be_in_the_way(times, split, chunks, weights):
    """Each unit loads as much as the others, so that neither link nor GPU pauses but while the token is chosen, one unit ahead."""
    plan = SplitKV(split=split, template="fluid", chunks=chunks, weights=weights, gpu_batches=times.gpu_batches)
    assert times.replay(plan) <= (times.step(plan) + times.outside) * (1 + ROUNDING) + 1e-9 or times.layers * times.gpu_batches == 1
    calm = replace(times, outside=0.0, layers=times.layers + 1)
    assert calm.replay(plan) == pytest.approx(calm.step(plan), rel=ROUNDING, abs=1e-9)


@pytest.mark.parametrize("batches", [2, 4, 8])
def test_each_gpu_batch_sends_its_share_of_the_next_layers_weights(batches):
    """The slower of 40 s of weights and 12 s of computation in each batch, in six layers."""
    times = LayerTimes(kv=1e-6, act=0, recompute=0, compute=12, weights=40, first=0, outside=0, layers=6, context=1, gpu_batches=batches)
    plan = TransferKV(weights="host", gpu_batches=batches)
    assert times.step(plan) == pytest.approx(6 * max(40, 12 * batches), rel=1e-6)
    assert times.replay(plan) == pytest.approx(times.step(plan), rel=1e-6)


ELEMENTS = 12_000
"""Of weights that cross the link in a second: thousandths of seconds can be sent in up to four equal parts."""


class Timetable:
    """Link, decoder, weights and state of the runtime's loop in a time of their own, which passes as ``LayerTimes`` says."""

    def __init__(self, times: LayerTimes, plan: SplitKV) -> None:
        torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
        from memsplit.dse.runtime._states import Hidden

        self.times, self.plan, self.share = times, plan, plan.split / times.context
        self.now = self.free = 0.0
        self.fluid, self.stored = plan.template == "fluid" or not plan.split, {}
        self.parts = plan.chunks if plan.split else 0
        self.llm = SimpleNamespace(num_hidden_layers=times.layers)
        self.layout = SimpleNamespace(first=round(times.first * ELEMENTS), total=round(times.weights * ELEMENTS))
        self.cut = self.layout.total if plan.weights == "host" else 0
        self.hidden = Hidden()
        self.rows, self.scores = torch.zeros(1, 1, 1), torch.zeros(1, 2)

    def transfer(self, seconds: float) -> float:
        self.free = max(self.free, self.now) + seconds
        return self.free

    # The link

    def mark(self) -> None:
        return None

    def wait(self, ticket: float | None) -> None:
        self.now = max(self.now, ticket or 0.0)

    def clock(self) -> float:
        return self.now

    def sent(self, direction: str) -> int:
        return 0

    # The decoder

    def embed(self, tokens: Any, place: int) -> Any:
        return self.rows

    def prefill_layer(self, weights: Any, x: Any, keys: Any, values: Any) -> Any:
        return x

    def decode_layer(self, weights: Any, x: Any, *others: Any) -> Any:
        self.now += self.times.compute
        return x

    def logits(self, x: Any) -> Any:
        self.now += self.times.outside / self.times.gpu_batches
        return self.scores

    # The weights

    def send(self, layer: int, turn: int, begin: int, end: int, mark: None, transfers: Any) -> float | None:
        return self.transfer((end - begin) / ELEMENTS) if self.cut and end > begin else None

    def views(self, layer: int, turn: int) -> None:
        return None

    # The state

    def prompt(self, unit: Any, turn: int) -> tuple[None, None]:
        return None, None

    def keep_prompt(self, unit: Any, turn: int, x: Any) -> None: ...

    def keep_token(self, unit: Any, turn: int, place: int, x: Any) -> None: ...

    def token(self, unit: Any, turn: int, place: int) -> tuple[None, None]:
        return None, None

    def load_inputs(self, unit: Any, turn: int, place: int, mark: None) -> list[float]:
        return [self.transfer(self.share * self.times.act / self.parts) for _ in range(self.parts)]

    def load_state(self, unit: Any, turn: int, place: int, mark: None) -> float:
        return self.transfer((1 - self.share) * self.times.kv)

    def restore(self, unit: Any, turn: int, place: int, weights: None, inputs: list[float]) -> None:
        for ticket in inputs:
            self.wait(ticket)
            self.now += self.share * self.times.recompute / self.parts

    def steps(self, count: int) -> list[float]:
        """Seconds of each decode step of the runtime's own loop."""
        import torch

        from memsplit.dse.runtime._execution import Execution

        batches = self.times.gpu_batches
        _, run = self.plan.run(batches, self.times.context, count + 1)
        ends = Execution(self, self, self, self, run).generate(torch.zeros(batches, 1, dtype=torch.int64), logits=False, state=False).steps
        return np.diff(ends).tolist()


@given(times=layer_times(4), template=st.sampled_from(["staged", "chunked", "fluid"]), **ways)
@settings(max_examples=60, deadline=None)
def test_a_replay_takes_what_the_runtimes_loop_takes(times, template, split, chunks, weights):
    """The loop itself, with parts that take what the layer times say: the same step, behind which another one comes."""
    times = replace(times, first=round(times.first, 3))
    plan = SplitKV(split=split, template=template, chunks=chunks, weights=weights, gpu_batches=times.gpu_batches)
    count = max(3, -(-SETTLING // (times.layers * times.gpu_batches)) + 1)
    assert times.replay(plan) == pytest.approx(Timetable(times, plan).steps(count + 1)[-2], rel=ROUNDING, abs=1e-9)


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
    """Nothing recomputed: a step is the slower of both, in every layer and in the last, which chooses the token, too."""
    times = replace(times, layers=times.layers + 1)
    expected = (times.layers - 1) * max(times.kv, times.compute) + max(times.kv, times.compute + times.outside)
    assert times.step(TransferKV()) == pytest.approx(expected, rel=ROUNDING)
    assert times.step(SplitKV(split=0)) == times.step(TransferKV())


def test_predictions_refuse_what_was_not_measured():
    times = LayerTimes(kv=1, act=0.5, recompute=0.4, compute=0.1, weights=0.3, first=0.1, outside=0.01, layers=4, context=100)
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
    times = LayerTimes(**named, layers=4, context=160, gpu_batches=2)
    layers = times.ratio_layers(3, "host", block=16)
    blocks = 2 * 3 * 10
    for layer, outside in zip(layers, (0.0, 0.01), strict=True):
        link, gpu, stores = layer.times(0, blocks, 0)
        assert (float(link), float(gpu), float(stores)) == pytest.approx((0.3 + 2 * 1, 2 * 0.12 + outside, 0))
        link, gpu, _ = layer.times(0, 0, blocks)
        assert (float(link), float(gpu)) == pytest.approx((0.3 + 2 * 0.5, 2 * (0.12 + 0.25) + outside))
    assert [layer.layers for layer in layers] == [3, 1]
    assert [layer.weights for layer in times.ratio_layers(3, "gpu", block=16)] == [0.0, 0.0]
    with refused("at least 2 layers"):
        replace(times, layers=1).ratio_layers(3, "gpu")


@pytest.mark.parametrize("weights", ["gpu", "host"])
def test_a_problem_is_priced_by_measured_times(weights):
    """All keys and values on the host: what three layers take to send them, and the fourth with the choice of the token."""
    workload = Workload(llm=OPT_6_7B, batch=3, context=160)
    problem = CacheRatioProblem.build(SYSTEMS["rtx4090_pcie4"], workload, weights=weights, block=16, batches=2)
    named = {"kv": 1, "act": 0.5, "recompute": 0.25, "compute": 0.1, "weights": 0.3, "first": 0.1, "outside": 3.0, "assemble": 0.02}
    times = LayerTimes(**named, layers=4, context=160, gpu_batches=2)
    measured = times.measured(problem)
    sent = 2 * 1 + (0.3 if weights == "host" else 0.0)
    assert measured.evaluate(CacheRatioPlan(kv_host=60)).latency == pytest.approx(3 * sent + max(sent, 2 * 0.12 + 3.0), rel=ROUNDING)
    assert (measured.settings, measured.request_blocks) == (problem.settings, problem.request_blocks)
    assert CachePlan.from_plan(measured, CacheRatioPlan(kv_host=60)).weights == weights
    with refused("made of coefficients already"):
        times.measured(replace(problem, settings=None))
    with refused("into which 6 requests cannot be divided"):
        replace(times, gpu_batches=4).measured(problem)


@pytest.mark.parametrize("weights", ["gpu", "host"])
def test_state_on_the_device_waits_for_nothing_but_weights(weights):
    """Three layers of 2 s of computation and 5 s of weights, and 1 s for the token."""
    times = LayerTimes(kv=9, act=4, recompute=3, compute=2, weights=5, first=1, outside=1, layers=3, context=8)
    plan = FullKV(weights=weights)
    assert times.step(plan) == pytest.approx({"gpu": 7.0, "host": 15.0}[weights], rel=ROUNDING)
    assert times.replay(plan) == pytest.approx(times.step(plan), rel=ROUNDING)


@pytest.mark.parametrize("plan", [CachePlan(blocks=CacheRatioPlan(kv_gpu=1)), Placement(), None])
def test_times_say_which_plans_they_know(plan):
    times = LayerTimes(kv=9, act=4, recompute=3, compute=2, weights=5, first=1, outside=1, layers=3, context=8)
    for said in (times.step, times.replay):
        with refused("FullKV, TransferKV and SplitKV take, not of"):
            said(plan)
    with refused("block"):
        times.ratio_layers(4, "gpu", block=0)
