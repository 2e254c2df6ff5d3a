"""Whole generations, and HybridServe's published speed-ups (arXiv 2501.01792): what the algorithm brings, what its baseline's link."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from memsplit.models import Workload
from memsplit.models.cache_ratio import CacheRatioProblem
from memsplit.models.offload_baselines import generation, offload_baselines
from memsplit.models.offload_generation import generation_time
from memsplit.models.offload_profiles import FLEXGEN_ON_HYBRIDSERVE, HYBRIDSERVE_PAPER
from memsplit.models.presets import LLMS, OPT_30B, SYSTEMS
from memsplit.models.units import GB
from memsplit.solvers.cache_ratio import LpRatio

RTX = SYSTEMS["rtx4090_pcie4"]
SUMS = 1e-12
"""Relative difference of equal sums in another order."""

PROMPTS = (128, 256, 512, 1024, 1920)
MODELS = ("opt-6.7b", "opt-13b", "opt-30b", "opt-66b")


def served(llm=OPT_30B, batch=128, context=1024):
    return Workload(llm=llm, batch=batch, context=context, weight_bits=16, kv_bits=16, activation_bits=16)


@cache
def throughput(llm: str, prompt: int, form: str, fitted: bool = False) -> float:
    """Token/s of 128 requests with 128 new tokens each, on an RTX 4090; ``fitted``: at the link that was fitted for FlexGen."""
    profile = FLEXGEN_ON_HYBRIDSERVE if fitted else HYBRIDSERVE_PAPER
    cost = generation_time(RTX, served(LLMS[llm]), prompt=prompt, generated=128, profile=profile, form=form)
    return cost.throughput


def speedup(llm: str, baseline: str, *, fitted: bool = False, form: str = "act_first") -> float:
    """Mean over prompts of the throughput over a baseline's."""
    return float(np.mean([throughput(llm, prompt, form) / throughput(llm, prompt, baseline, fitted) for prompt in PROMPTS]))


def mean(baseline: str, **settings) -> float:
    """Mean over the four LLMs."""
    return float(np.mean([speedup(llm, baseline, **settings) for llm in MODELS]))


def test_with_equal_links_the_algorithm_brings_a_quarter():
    """First principles; 1.24 to 1.27 is the range of an independent derivation, published is 2.19: the rest is the baseline's link."""
    assert 1.235 <= mean("kv") <= 1.27  # 1.24 as it is rounded
    assert mean("kv", form="best") > mean("kv")


@pytest.mark.parametrize(("llm", "published"), [(None, 2.19), ("opt-6.7b", 2.05), ("opt-66b", 2.33)])
def test_with_the_link_fitted_for_flexgen(llm, published):
    """One number, 0.55, is fitted to the mean, so 1.5 % there; 1.5 % for OPT-6.7B follows. The published rise to 2.33 with OPT-66B does
    not: 6.5 % too low."""
    reached = mean("kv", fitted=True) if llm is None else speedup(llm, "kv", fitted=True)
    assert reached == pytest.approx(published, rel=0.07 if llm == "opt-66b" else 0.015)


@pytest.mark.parametrize(("llm", "expected"), [(None, 2.21), ("opt-6.7b", 2.07), ("opt-66b", 2.18)])
def test_an_independent_computation_of_the_fitted_speedups(llm, expected):
    """By another program with the same settings, to 1 %: it takes grids in place of breakpoints and stores 0.7 of the KV in prefill."""
    reached = mean("kv", fitted=True) if llm is None else speedup(llm, "kv", fitted=True)
    assert reached == pytest.approx(expected, rel=0.01)


def test_over_activations_only():
    """Published 1.35, nothing fitted; 2 %: both are rounded means over settings that the paper does not list."""
    assert mean("act") == pytest.approx(1.35, rel=0.02)


@pytest.mark.xfail(strict=True, reason="the published speed-up rises with the LLM from 2.05 to 2.33; ours falls again after OPT-30B")
def test_the_speedup_rises_with_the_llm():
    assert speedup("opt-66b", "kv", fitted=True) > speedup("opt-30b", "kv", fitted=True)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_equal_links_cannot_give_the_published_speedup_of_opt_66b(prompt):
    """(1 + w) / (w + r) bounds the gain; the GPU cache only lowers what is left to gain. Published: 2.33."""
    h, tokens = 9216, 128 * (prompt + 128)
    w = 24 * h * h / (tokens * 4 * h)
    ours = throughput("opt-66b", prompt, "best") / throughput("opt-66b", prompt, "kv")
    assert ours <= (1 + w) / (w + 0.5) < 2.33


# Whole generations


def test_a_generation_of_one_form_is_the_baseline_with_the_same_rule():
    """FlexGen's rule is all KV, the activation cache all ACT; both are written twice, apart."""
    rules = offload_baselines(HYBRIDSERVE_PAPER, FLEXGEN_ON_HYBRIDSERVE)
    for form, rule in (("kv", "kv_only"), ("act", "act_only")):
        ours = generation_time(RTX, served(), prompt=1024, generated=64, profile=HYBRIDSERVE_PAPER, form=form)
        other = generation(RTX, served(), rules[rule], generated=64)
        assert (ours.prefill, ours.decode) == (pytest.approx(other.prefill, rel=SUMS), pytest.approx(other.decode, rel=SUMS))


@pytest.mark.parametrize("llm", ["opt-6.7b", "opt-66b", "llama3.1-8b"])
@pytest.mark.parametrize("prompt", [0, 128, 1500])
def test_fewer_restrictions_never_hurt(llm, prompt):
    times = {
        form: generation_time(RTX, served(llm=LLMS[llm]), prompt=prompt, generated=32, profile=HYBRIDSERVE_PAPER, form=form).decode
        for form in ("best", "act_first", "kv", "act")
    }
    assert times["best"] <= min(times.values()) * (1 + SUMS)
    assert times["act_first"] <= times["act"] * (1 + SUMS)


@pytest.mark.parametrize("context", [128, 1024])
def test_the_best_step_of_a_generation_is_the_optimum_of_the_problem(context):
    """Any fraction against whole blocks: one step differs by a block of a thousand or more at most."""
    step = generation_time(RTX, served(context=context), prompt=context, generated=1, profile=HYBRIDSERVE_PAPER)
    exact = LpRatio().solve(CacheRatioProblem.build(RTX, served(context=context), profile=HYBRIDSERVE_PAPER))
    assert step.decode == pytest.approx(exact.objective, rel=1e-3)


def test_a_gpu_without_room_for_two_layers_never_ends():
    small = RTX.with_tier("GDDR6X", capacity=1 * GB)
    cost = generation_time(small, served(), prompt=16, generated=1)
    assert math.isinf(cost.decode)
    assert not cost.fits
    assert cost.throughput == 0


@pytest.mark.parametrize("bad", [{"generated": 0}, {"prompt": -1}, {"form": "both"}])
def test_bad_generations_are_refused(bad):
    with pytest.raises(ValueError, match="generation"):
        generation_time(RTX, served(), **({"prompt": 16, "generated": 4} | bad))
