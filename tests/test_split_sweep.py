"""Recompute splits of many designs at once: every row against its single problem, enumeration, laws, degenerate cases and bad input."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memsplit.solvers.recompute_split_batch as solver_module
from memsplit.dse.split_sweep import SplitSweep
from memsplit.dse.sweep import sweep
from memsplit.models import Workload
from memsplit.models.offload import OffloadLayer, OffloadMachine
from memsplit.models.offload_batch import OffloadDesigns, RecomputeSplitBatch
from memsplit.models.offload_profiles import KVPR_NOMINAL
from memsplit.models.presets import DEEPSEEK_V3, LLAMA3_1_8B, MIXTRAL_8X7B, OPT_6_7B, OPT_30B, SYSTEMS
from memsplit.models.recompute_split import RecomputeSplitProblem, best_splits
from memsplit.models.units import GB
from memsplit.solvers.recompute_split import ClosedFormSplit, EnumerationSplit
from memsplit.solvers.recompute_split_batch import solve_splits

A100 = SYSTEMS["a100_pcie4"]
GPU, HOST = A100.tier_names[:2]
UNIT = next(unit.name for unit in A100.units if unit.tier == GPU)
LINK = f"{HOST}_to_{GPU}_bandwidth_GBps"
RATES = (f"{GPU}_bandwidth_TBps", f"{UNIT}_matrix_peak_TFLOPps", f"{HOST}_bandwidth_GBps", LINK)
CAPACITIES = (f"{GPU}_capacity_GB", f"{HOST}_capacity_GB")
SUMS = 1e-12
"""Relative difference of equal sums in another order."""


def served(llm=OPT_6_7B, **changes) -> Workload:
    return Workload(llm=llm, **({"batch": 8, "context": 500, "weight_bits": 16, "kv_bits": 16, "activation_bits": 16} | changes))


def score(llm=OPT_6_7B, **changes) -> SplitSweep:
    return SplitSweep(system=A100, workload=served(llm), **changes)


def table(designs: int, seed: int = 0, *, host: float = 0.0) -> dict[str, np.ndarray]:
    """Machines of all kinds around an A100, some with a host that has room for the state and for some of the activations only."""
    rng = np.random.default_rng(seed)
    low_high = dict(
        zip(
            (*RATES, *CAPACITIES),
            ((0.3, 4), (20, 2000), (20, 300), (5, 400), (10, 150), (20 + host, 300 + host)),
            strict=True,
        )
    )
    columns = {name: rng.uniform(low, high, designs) for name, (low, high) in low_high.items()}
    return columns | {"batch": rng.integers(1, 200, designs), "context": rng.integers(0, 2000, designs)}


def rows(columns):
    return [{name: column[row] for name, column in columns.items()} for row in range(len(next(iter(columns.values()))))]


def random_problems(rng: np.random.Generator, number: int) -> list[RecomputeSplitProblem]:
    """Problems of one batch: the same classes of layers, template and places of weights; any rates, FLOPs, contexts and host."""
    classes, act = int(rng.integers(1, 4)), float(rng.integers(1, 9))
    shapes = [(int(rng.integers(1, 5)), float(rng.integers(0, 500)), float(rng.integers(1, 16))) for _ in range(classes)]
    shared = {
        "template": ("staged", "chunked", "fluid")[rng.integers(3)],
        "weights": ("gpu", "host")[rng.integers(2)],
        "chunks": int(rng.integers(1, 4)),
        "batches": int(rng.integers(1, 4)),
    }
    problems = []
    for _ in range(number):
        batch, context = int(rng.integers(1, 4)), int(rng.integers(0, 13))
        layers = tuple(
            OffloadLayer(
                layers=layers,
                batch=batch,
                weight_bytes=weights,
                read_bytes=weights,
                sent_bytes=weights * rng.uniform(1, 1.5),
                projection_bytes=weights * rng.uniform(0, 1),
                linear_flops=float(rng.choice([0, 1e3, 1e5])),
                kv_bytes=kv,
                act_bytes=act,
                recompute_flops=float(rng.choice([0, 10, 1e3, 1e4])) * rng.uniform(0.5, 2),
                attention_flops=float(rng.choice([0, 100])),
            )
            for layers, weights, kv in shapes
        )
        machine = OffloadMachine(
            gpu="GPU",
            host="host",
            peak=1e6 * rng.uniform(0.5, 2),
            gpu_bandwidth=1e5,
            host_bandwidth=1e4,
            to_device=1e3 * rng.uniform(0.5, 2),
            to_host=1e3,
            cpu_peak=None,
            gpu_capacity=float(rng.choice([50.0, 1e9, 1e9, 1e9])),
            host_capacity=1e9,
        )
        most = int(rng.integers(0, context + 1)) if rng.random() < 0.4 else context
        problem = RecomputeSplitProblem(layers=layers, machine=machine, context=context, most=most, **shared)
        wanted = problem.requests * act * most * sum(layer.layers for layer in layers)
        room = problem.host_bytes + float(np.floor(rng.uniform(-0.1, 1) * wanted))
        problems.append(replace(problem, machine=replace(machine, host_capacity=room)))
    return problems


def test_batches_of_random_problems_are_their_single_solutions():
    """Bit for bit as ``ClosedFormSplit``, which enumeration confirms; hosts that are full, for one and for several classes of layers."""
    rng = np.random.default_rng(5)
    infeasible, full = 0, {1: 0, 2: 0, 3: 0}
    for _ in range(40):
        problems = random_problems(rng, 15)
        batch = RecomputeSplitBatch.of(problems)
        found = solve_splits(batch)
        for row, problem in enumerate(problems):
            result = ClosedFormSplit().solve(problem)
            assert found.feasible[row] == (result.plan is not None) == problem.possible
            if result.plan is None:
                infeasible += 1
                assert np.isinf(found.latency[row])
                continue
            assert tuple(found.splits[:, row].tolist()) == result.plan.splits
            assert found.latency[row] == result.objective
            assert found.latency[row] <= EnumerationSplit().solve(problem).objective * (1 + SUMS)
            assert ClosedFormSplit().solve(batch[row]).objective == result.objective
            full[len(problem.layers)] += result.plan.splits != tuple(best_splits(problem)[0].tolist())
    assert infeasible > 20
    assert min(full.values()) > 5


CASES = {
    "staged": (score(), 0.0),
    "chunked, weights streamed": (score(OPT_30B, template="chunked", weights="host", chunks=3), 100.0),
    "fluid, prompt only": (score(template="fluid", weights="host", most=128), 0.0),
    "staged, streamed, profile, GPU batches": (score(OPT_30B, weights="host", batches=3, profile=KVPR_NOMINAL), 300.0),
    "larger activations": (score(LLAMA3_1_8B, template="chunked"), 0.0),
    "experts": (score(MIXTRAL_8X7B, weights="host", batches=2), 100.0),
    "two classes of layers": (score(DEEPSEEK_V3, weights="host"), 1300.0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_that_of_its_single_problem(case: str):
    """Bit for bit: splits and latency of ``ClosedFormSplit``, price and headroom; ratios up to the order of their sums."""
    sweeper, host = CASES[case]
    columns = table(60, seed=sum(map(ord, case)), host=host)
    found = sweeper(columns)
    assert found["feasible"].sum() >= 15
    for row, design in enumerate(rows(columns)):
        system, workload = sweeper.design(design | {"latency_s": 1.0})
        named = {name: value for name, value in sweeper.settings().items() if name not in ("system", "workload")}
        limit = workload.context if sweeper.most is None else min(sweeper.most, workload.context)
        problem = RecomputeSplitProblem.build(system, workload, **(named | {"most": limit}))
        result = ClosedFormSplit().solve(problem)
        assert found["memory_usd"][row] == system.memory_cost
        if workload.context:
            ratios = problem.ratios[-1]
            wanted = [ratios.r, ratios.rho, ratios.w] if len(problem.layers) == 1 else [ratios.r, ratios.rho]
            np.testing.assert_allclose([found[name][row] for name in ("r", "rho", "w")[: len(wanted)]], wanted, rtol=SUMS)
        assert found["feasible"][row] == (result.plan is not None) == (found["reason"][row] == "")
        if result.plan is None:
            assert min(found[f"{GPU}_headroom_GB"][row], found[f"{HOST}_headroom_GB"][row]) < 0
            assert np.isnan(found["latency_s"][row])
            continue
        splits = [found["split_tokens"][row], *([found["split_tokens_2"][row]] if "split_tokens_2" in found else [])]
        assert tuple(splits) == result.plan.splits
        assert found["latency_s"][row] == found["bound_s"][row] == result.objective
        assert found["gap"][row] == 0
        assert found["throughput_tok_per_s"][row] == problem.requests / result.objective
        cost = problem.evaluate(result.plan)
        left = [(room - held) / GB for room, held in zip(cost.capacity, cost.tier_bytes, strict=True)]
        assert [found[f"{GPU}_headroom_GB"][row], found[f"{HOST}_headroom_GB"][row]] == left


def test_some_hosts_are_full():
    """Among the machines above are some whose host decides the split: more memory there makes them faster."""
    columns = table(60, seed=sum(map(ord, "staged")))
    name = f"{HOST}_capacity_GB"
    tight, free = score()(columns), score()(columns | {name: columns[name] * 10})
    assert (free["latency_s"] < tight["latency_s"]).sum() >= 3


def test_a_batch_is_the_loop_of_its_singles(monkeypatch):
    """Bit for bit, whatever is solved at once."""
    columns = table(53, seed=3)
    whole = score(weights="host")(columns)
    singles = [score(weights="host")({name: np.array([value]) for name, value in design.items()}) for design in rows(columns)]
    monkeypatch.setattr(solver_module, "AT_ONCE", 7)
    cut = score(weights="host")(columns)
    for name, column in whole.items():
        np.testing.assert_array_equal(column, np.concatenate([single[name] for single in singles]))
        np.testing.assert_array_equal(column, cut[name])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    name=st.sampled_from(RATES + CAPACITIES),
    factor=st.floats(1.0, 8.0),
    case=st.sampled_from(list(CASES)),
)
def test_more_is_never_slower(seed: int, name: str, factor: float, case: str):
    """Every old plan stays and takes no longer."""
    sweeper, host = CASES[case]
    columns = table(30, seed, host=host)
    old, new = sweeper(columns), sweeper(columns | {name: columns[name] * factor})
    kept = old["feasible"]
    assert new["feasible"][kept].all()
    assert (new["latency_s"][kept] <= old["latency_s"][kept] * (1 + SUMS)).all()


def test_halved_rates_double_every_time():
    """By a power of two, so to the last bit; the splits stay. The link back and the CPU are not used."""
    columns = table(60, seed=9)
    old, new = score()(columns), score()(columns | {name: columns[name] / 2 for name in RATES})
    np.testing.assert_array_equal(new["latency_s"], 2 * old["latency_s"])
    for name in ("split_tokens", "act_share", "r", "rho", "w", "c"):
        np.testing.assert_array_equal(new[name], old[name])


def test_kvpr_recomputes_the_prompt_only():
    """``most`` binds where the context is longer, and changes nothing where it is not."""
    columns = {"context": np.arange(0, 400, 7)}
    free, limited = score()(columns), score(most=128)(columns)
    np.testing.assert_array_equal(limited["split_tokens"], np.minimum(free["split_tokens"], 128))
    assert (free["split_tokens"] > 128).any()
    assert not score(most=0)(columns)["split_tokens"].any()


def test_a_link_without_limits_and_no_state():
    """Sending takes no time, so nothing is recomputed and the ratios are unknown; without state there is nothing to split."""
    fast = replace(
        A100,
        tiers=tuple(replace(tier, bandwidth=np.inf) for tier in A100.tiers),
        links=tuple(replace(link, bandwidth=np.inf) for link in A100.links),
    )
    found = SplitSweep(system=fast, workload=served())({"context": [0, 100]})
    assert found["split_tokens"].tolist() == [0.0, 0.0]
    assert np.isnan(found["rho"]).all()
    assert found["act_share"].tolist() == [0.0, 0.0]


def test_reasons_name_the_memory():
    """One phrase for each memory; the GPU's where both are too small."""
    found = score()({f"{GPU}_capacity_GB": [1.0, 40.0, 1.0, 40.0], f"{HOST}_capacity_GB": [900.0, 1.0, 1.0, 900.0]})
    assert found["feasible"].tolist() == [False, False, False, True]
    assert [GPU in reason for reason in found["reason"]] == [True, False, True, False]
    assert HOST in found["reason"][1]
    assert found["reason"][3] == ""


def test_no_designs_and_no_columns():
    """No row in, no row out, with the same columns; no column: the score's own system and workload."""
    one, none = score()({}), score()({f"{HOST}_capacity_GB": np.array([]), "batch": np.array([])})
    assert list(one) == list(none)
    assert {len(column) for column in none.values()} == {0}
    assert [column.dtype for column in none.values()] == [column.dtype for column in one.values()]
    np.testing.assert_array_equal(one["latency_s"], score()({"batch": [8]})["latency_s"])


def test_sweep_prices_it_in_chunks():
    """Any chunks, the same table; the score is sent to workers and written beside tables."""
    frame = pd.DataFrame(table(50, seed=4))
    pd.testing.assert_frame_equal(sweep(frame, score(), progress=False), sweep(frame, score(), chunk=17, progress=False))
    assert pickle.loads(pickle.dumps(score())) == score()
    assert SplitSweep(**score().settings()) == score()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({f"{HOST}_capacity": [1.0]}, "has no unit"),
        ({"hosts_capacity_GB": [1.0]}, "is no number of system"),
        ({LINK: [1.0, 0.0]}, "row 1"),
        ({"batch": [2.5]}, "whole numbers of at least 1"),
        ({"context": [-1]}, "row 0"),
        ({"batch": [1, 2], "context": [1]}, "give every design every column"),
    ],
)
def test_wrong_columns_are_named(columns, words: str):
    with pytest.raises(ValueError, match=words):
        score()(columns)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "none"}, "template must be"),
        ({"weights": "disk"}, "weights must be"),
        ({"chunks": 0}, "chunks must be"),
        ({"batches": 0}, "batches must be"),
        ({"most": -1}, "most must be"),
        ({"workload": served(phase="prefill")}, "decode step"),
        ({"system": replace(A100, links=())}, "has no link"),
    ],
)
def test_wrong_settings_are_named(changes, words: str):
    with pytest.raises(ValueError, match=words):
        SplitSweep(**({"system": A100, "workload": served()} | changes))


def test_problems_that_are_no_batch_are_named():
    """What differs beyond numbers that may is refused, by its name."""
    designs = OffloadDesigns.from_columns(A100, served(), {"batch": [1, 2]})
    first = RecomputeSplitBatch.build(designs)[0]
    other = RecomputeSplitBatch.build(OffloadDesigns.from_columns(A100, served(OPT_30B), {}))[0]
    for problems, words in (
        ([first, replace(first, template="fluid")], "one template"),
        ([first, other], "the same layers"),
        ([first, replace(first, machine=replace(first.machine, gpu="other"))], "agree on names"),
        ([], "at least one problem"),
    ):
        with pytest.raises(ValueError, match=words):
            RecomputeSplitBatch.of(problems)
