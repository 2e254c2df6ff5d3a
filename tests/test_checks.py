"""The rules that fields share: what counts as a number, a whole number and several, and that every refusal is one short sentence."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from memsplit.models import OffloadMachine, RecomputeSplitPlan, Workload
from memsplit.models.cache_ratio import CacheRatioProblem, LinearTime, RatioLayer
from memsplit.models.checks import check_number, shown, whole, wholes
from memsplit.models.offload import gpu_overhead, new_tokens
from memsplit.models.offload_baselines import OffloadBaseline, generation
from memsplit.models.placement import PlacementPlan
from memsplit.models.presets import OPT_6_7B, SYSTEMS
from memsplit.models.recompute_split import RecomputeSplitProblem, best_splits
from memsplit.solvers.cache_ratio import CpSatRatio, LpRatio, MilpRatio
from memsplit.solvers.mini_batches import CpSatBatches
from memsplit.solvers.placement import CharnesCooperPlacement, FlexGenPlacement, PulpPlacement
from memsplit.solvers.recompute_split import CpSatSplit, MilpSplit
from memsplit.solvers.result import check_settings

RTX = SYSTEMS["rtx4090_pcie4"]
HUGE = pytest.param(10**5000, id="5001 digits")
SERVED = Workload(llm=OPT_6_7B, batch=4, context=64, weight_bits=16, kv_bits=16, activation_bits=16)
LINE = LinearTime(slope=1.0)
LAYER = RatioLayer(layers=1, weights=1.0, compute=1.0, load_kv=LINE, load_act=LINE, generate=LINE)
COEFFICIENTS = {"layers": (LAYER,), "request_blocks": (4,), "kv_block": 2, "act_block": 1, "gpu_capacity": 3, "host_capacity": 9}


def refused(call, *words: str) -> None:
    """The call is a ValueError in one sentence that a terminal line or two can show."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the words are looked for below
        call()
    text = str(refusal.value)
    assert "\n" not in text
    assert ". " not in text
    assert len(text) < 400
    for word in words:
        assert word in text


@pytest.mark.parametrize("value", [4, 4.0, np.int32(4), np.float64(4.0), np.array(4)])
def test_whole_numbers_of_any_kind_are_ints(value):
    assert whole("plan", "n", value, "tokens") == 4
    assert type(whole("plan", "n", value, "tokens")) is int


@pytest.mark.parametrize(
    "value", [np.array([4]), np.array([4, 5]), np.array(4.0), 0, 2**62, 10**400, HUGE, 1.5, float("nan"), True, "4", None, Decimal(4)]
)
def test_what_is_no_whole_number_is_refused(value):
    refused(lambda: whole("plan", "n", value, "tokens"), "plan: n must be a whole number of tokens")


@pytest.mark.parametrize("value", [1, 0.5, float("inf"), np.float32(2), Fraction(1, 3), 10**300])
def test_numbers_are_taken(value):
    check_number("tier", "bandwidth", value, "B/s")


@pytest.mark.parametrize("value", [10**400, HUGE, Fraction(10**400), -1, 0, float("nan"), "1", None, True, Decimal(1), 1j])
def test_what_is_no_number_is_refused(value):
    refused(lambda: check_number("tier", "bandwidth", value, "B/s"), "tier: bandwidth must be a number")


@pytest.mark.parametrize("values", [4, "45", np.array(4), None, (1, -1), (1, 1.5)])
def test_what_is_not_several_whole_numbers_is_refused(values):
    assert wholes("plan", "splits", np.array([1, 2]), "tokens") == (1, 2)
    refused(lambda: wholes("plan", "splits", values, "tokens", least=0), "plan: splits must be")


def test_long_values_are_cut_to_one_line():
    assert shown(3) == "3"
    assert "\n" not in shown(np.zeros((30, 30)))
    assert len(shown(10**4000)) < 70
    assert "digits" in shown(10**5000)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: OffloadBaseline(name="a", rule="x"), "keys_values"),
        (lambda: OffloadBaseline(name="a", rule="keys_values", kv_bits=0), "kv_bits"),
        (lambda: OffloadBaseline(name="a", rule="keys_values", profile="x"), "OffloadProfile"),
        *(
            (lambda n=n: generation(RTX, SERVED, OffloadBaseline(name="a", rule="keys_values"), generated=n), "generated")
            for n in (0, 1.5, True, None, "3")
        ),
        (lambda: new_tokens(10**11), "1000000"),
        (lambda: gpu_overhead(SERVED, -1), "longest"),
        (lambda: gpu_overhead(SERVED, float("nan")), "longest"),
        (lambda: CacheRatioProblem(**COEFFICIENTS | {"layers": "x"}), "layers"),
        (lambda: CacheRatioProblem(**COEFFICIENTS | {"layers": (1,)}), "layers"),
        (lambda: CacheRatioProblem(**COEFFICIENTS | {"request_blocks": 4}), "request_blocks"),
        (lambda: CacheRatioProblem(**COEFFICIENTS | {"request_blocks": (10**8,)}), "10000000"),
        (lambda: CacheRatioProblem(**COEFFICIENTS, streamed=float("nan")), "streamed"),
        (lambda: CacheRatioProblem(**COEFFICIENTS, streamed=-1), "streamed"),
        (lambda: CacheRatioProblem.build(RTX, SERVED, contexts=4), "contexts"),
        (lambda: CacheRatioProblem.build(RTX, SERVED, contexts=[1, 2, 3, float("nan")]), "contexts"),
        (lambda: CacheRatioProblem.build(RTX, SERVED, batches=10**9), "1000000 requests"),
        (lambda: CacheRatioProblem.build(RTX, SERVED, contexts=[2**61] * 4), "10000000"),
        (lambda: LinearTime.fit([1, 2], [-1, 2]), "at least 0 s"),
        (lambda: LinearTime.fit([1, 2], [float("nan"), 1]), "finite times"),
        (lambda: LinearTime.fit([float("nan"), 1], [1, 2]), "counts"),
        (lambda: LinearTime.fit(["a", 1], [1, 2]), "numbers"),
        (lambda: LinearTime.fit([1, 1e200], [1, 2]), "2**62"),
        (lambda: RecomputeSplitPlan(splits=3), "splits"),
        (lambda: RecomputeSplitPlan(splits="3"), "splits"),
        (lambda: PlacementPlan(weights=3, cache=(1, 0, 0), hidden=(1, 0, 0), gpu_batch=1, gpu_batches=1), "weights"),
        (lambda: best_splits(RecomputeSplitProblem.build(RTX, SERVED), 1e30), "below 2**62"),
        (lambda: best_splits(RecomputeSplitProblem.build(RTX, SERVED), float("inf")), "below 2**62"),
        (lambda: best_splits(RecomputeSplitProblem.build(RTX, SERVED), "many"), "numbers of tokens"),
        (lambda: FlexGenPlacement(most_gpu_batches=1.5).solve(None), "most_gpu_batches"),
    ],
)
def test_bad_values_of_offloading_are_refused(call, word):
    refused(call, word)


@pytest.mark.filterwarnings("error")
def test_bad_samples_are_refused_without_a_warning():
    refused(lambda: LinearTime.fit([float("nan"), 1], [1, 2]), "counts")


@pytest.mark.parametrize(
    "bad",
    [
        *({"relative_gap": gap} for gap in ("0.1", None, Decimal("0.1"), True, -1e-9, 1.0, float("nan"))),
        *({"time_limit": limit} for limit in ("1", Decimal(1), 1e30, float("inf"), float("nan"), 0, -1, True)),
        *({"threads": threads} for threads in (1.5, 2.0, 0, None, "2", True, 10**6)),
        *({"seed": seed} for seed in (None, 1.5, float("nan"), "0", True)),
    ],
)
def test_bad_settings_of_exact_solvers_are_refused(bad):
    refused(lambda: check_settings(**{"relative_gap": 1e-4, "time_limit": 1.0} | bad), next(iter(bad)))


def test_good_settings_are_taken():
    check_settings(0, None)
    check_settings(np.float64(1e-4), np.int64(5), np.int64(2), seed=-3)


@pytest.mark.parametrize(
    ("solver", "bad"),
    [
        *((solver, {"seed": None}) for solver in (MilpSplit, CpSatSplit, MilpRatio, CpSatRatio, CpSatBatches)),
        *((solver, {"time_limit": 1e30}) for solver in (MilpSplit, CpSatSplit, MilpRatio, CharnesCooperPlacement, PulpPlacement)),
        (LpRatio, {"relative_gap": "small"}),
        (CpSatSplit, {"threads": 1.5}),
    ],
)
def test_solvers_look_at_their_settings_first(solver, bad):
    """Before the problem, which here is none."""
    refused(lambda: solver(**bad).solve(None), next(iter(bad)))


def test_an_endless_gpu_holds_what_a_whole_number_can_say():
    """Its capacity in the problem is a number of 64 bits, as the host's."""
    endless = RTX.with_tier("GDDR6X", capacity=1e25).with_tier("host", capacity=1e25)
    assert OffloadMachine.build(endless).gpu_capacity == 1e25
    problem = CacheRatioProblem.build(endless, SERVED)
    assert (problem.gpu_capacity, problem.host_capacity) == (2**61, 2**61)
    assert LpRatio().solve(problem).unwrap().kv_gpu == problem.blocks
