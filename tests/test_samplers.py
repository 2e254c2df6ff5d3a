"""Samplers as values: each proposes designs in a search, says what it is, and keeps its seed."""

import importlib.util
import pickle

import pandas as pd
import pytest
from machines import run

from memsplit.dse import Objective
from memsplit.dse.samplers import GP, NSGA2, NSGA3, QMC, SAMPLERS, TPE, RandomSearch, described, sampler_named

HAS_TORCH = importlib.util.find_spec("torch") is not None
each_sampler = pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(sampler, marks=pytest.mark.skipif(name == "gp" and not HAS_TORCH, reason="PyTorch is not installed"))
        for name, sampler in SAMPLERS.items()
    ],
    ids=str,
)


def small(sampler, trials: int = 24, **settings) -> pd.DataFrame:
    """A short search; the Gaussian process takes over from random draws after ten feasible trials, and takes seconds for each."""
    return (
        run(trials=11, population=10, sampler=sampler, **settings)
        if sampler.name == "gp"
        else run(trials=trials, sampler=sampler, **settings)
    )


def test_the_table_names_every_sampler():
    assert {type(sampler) for sampler in SAMPLERS.values()} == {NSGA2, NSGA3, TPE, GP, QMC, RandomSearch}
    assert all(sampler_named(name) is sampler and sampler.name == name for name, sampler in SAMPLERS.items())
    with pytest.raises(ValueError, match="no sampler 'cmaes'; samplers are nsga2, nsga3, tpe, gp, qmc, random"):
        sampler_named("cmaes")


@each_sampler
def test_the_same_seed_gives_the_same_designs_and_another_others(sampler):
    first, again, other = (small(type(sampler)(seed=seed)) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(first, again)
    assert first["bandwidth_GBps"].tolist() != other["bandwidth_GBps"].tolist()
    assert first["seed"].unique().tolist() == [3]
    assert first.attrs["sampler"] == described(type(sampler)(seed=3))


@each_sampler
def test_without_a_seed_of_its_own_a_sampler_has_the_seed_of_the_search(sampler):
    pd.testing.assert_frame_equal(small(sampler, 14, seed=5), small(type(sampler)(seed=5), 14))


@each_sampler
def test_a_sampler_is_a_value(sampler):
    assert pickle.loads(pickle.dumps(sampler)) == sampler
    assert sampler.population >= 1
    assert described(sampler) | {"sampler": sampler.name, "seed": None} == described(sampler)


def test_the_default_is_nsga2():
    pd.testing.assert_frame_equal(run(trials=30), run(trials=30, sampler=NSGA2()))


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, "0"])
def test_a_seed_that_optuna_would_refuse_is_refused_at_once(seed):
    with pytest.raises(ValueError, match="the seed of TPE must be a whole number"):
        TPE(seed=seed)


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is installed")
def test_a_gaussian_process_without_pytorch_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="the sampler 'gp' needs PyTorch, which is not installed; install torch") as refusal:
        run(sampler=GP())
    assert "\n" not in str(refusal.value)


def test_no_sampler_warns(recwarn: pytest.WarningsRecorder):
    """What Optuna calls experimental is our choice, and nothing that a user can act on."""
    for sampler in (NSGA2(), NSGA3(), TPE(), QMC(), RandomSearch()):
        run(trials=14, sampler=sampler, population=None)
    assert [str(warning.message) for warning in recwarn] == []


def test_tpe_learns_from_designs_that_were_asked_together():
    """Eight parameters that must all be small, asked ten at a time: it is closer to that than blind draws are."""

    def corner(trial):
        return [trial.suggest_float(f"x{i}", 0, 1) for i in range(8)]

    def best(sampler) -> float:
        settings = {"objectives": [Objective("latency_s")], "constraints": [], "population": 10}
        return run(design=corner, score=lambda point: {"latency_s": sum(point)}, trials=100, sampler=sampler, **settings)["latency_s"].min()

    assert best(TPE()) < 0.9 * best(RandomSearch())
