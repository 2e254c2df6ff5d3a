"""What is said of an offloading problem that does not fit: every change that is offered, made alone, lets a plan fit."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from memsplit.models import System, Workload
from memsplit.models.cache_ratio import CacheRatioProblem, LinearTime, RatioLayer
from memsplit.models.offload import gigabytes_more, largest
from memsplit.models.offload_profiles import DATASHEET, HYBRIDSERVE_PAPER
from memsplit.models.placement import PlacementProblem
from memsplit.models.presets import DEEPSEEK_V3, LLAMA3_1_8B, OPT_6_7B, OPT_30B, OPT_175B, SYSTEMS
from memsplit.models.recompute_split import RecomputeSplitProblem
from memsplit.models.units import GB
from memsplit.solvers import Status
from memsplit.solvers.cache_ratio import LpRatio
from memsplit.solvers.placement import CharnesCooperPlacement
from memsplit.solvers.recompute_split import ClosedFormSplit

RTX, T4 = SYSTEMS["rtx4090_pcie4"], SYSTEMS["t4_disk"]
CASES = 150
ENLARGE = re.compile(r"enlarge (\S+) by (\S+) GB")
BITS = re.compile(r"use (\S+) bits a weight, (\S+) a key or value and (\S+) an activation")


def advice(message: str) -> list[str]:
    """The ways out of a message in one sentence."""
    assert "\n" not in message
    assert ". " not in message
    assert message.count("; ") == 1
    return message.split("; ")[1].split(", or ")


def enlarged(system: System, way: str) -> System:
    for name, more in ENLARGE.findall(way):
        system = system.with_tier(name, capacity=system.tier(name).capacity + float(more) * GB)
    return system


def followed(way: str, system: System, workload: Workload, settings: dict) -> tuple[str, tuple]:
    """Which kind of advice it is, and what ``build`` then gets."""
    if way.startswith("enlarge"):
        return "enlarge", (enlarged(system, way), workload, settings)
    if found := re.match(r"serve (?:GPU batches of |the first )?(\d+) requests", way):
        batch, contexts = int(found[1]), settings.get("contexts")
        assert 1 <= batch < workload.batch
        if contexts is not None:
            contexts = np.reshape(contexts, (-1, workload.batch))[:, :batch].ravel().tolist()
        return "batch", (system, replace(workload, batch=batch), settings | ({"contexts": contexts} if contexts else {}))
    if found := re.match(r"shorten (?:the context|contexts) to (\d+) tokens", way):
        longest, contexts = int(found[1]), settings.get("contexts")
        assert longest >= 1
        cut = {"contexts": [min(one, longest) for one in contexts]} if contexts else {}
        return "context", (system, replace(workload, context=min(workload.context, longest)), settings | cut)
    if found := BITS.match(way):
        weight, kv, act = map(float, found.groups())
        assert min(weight, kv, act) >= 1
        return "bits", (system, replace(workload, weight_bits=weight, kv_bits=kv, activation_bits=act), settings)
    assert way == "stream the weights (weights='host')"
    return "weights", (system, workload, settings | {"weights": "host"})


def random_case(seed: int, *, unequal: bool) -> tuple[System, Workload, dict]:
    """Machines from far too small to large enough, short and long prompts, weights on either side."""
    rng = np.random.default_rng(seed)
    llm = (OPT_6_7B, OPT_30B, LLAMA3_1_8B, DEEPSEEK_V3)[rng.integers(4)]
    system = RTX.with_tier("GDDR6X", capacity=10 ** rng.uniform(0, 2.3) * GB).with_tier("host", capacity=10 ** rng.uniform(0.5, 3.3) * GB)
    bits = dict(zip(("weight_bits", "kv_bits", "activation_bits"), rng.choice([4.5, 8, 16], 3).tolist(), strict=True))
    workload = Workload(llm=llm, batch=int(10 ** rng.uniform(0, 1.8)), context=int(10 ** rng.uniform(0, 6)), **bits)
    batches = int(rng.integers(1, 4))
    settings = {
        "weights": ("gpu", "host")[rng.integers(2)],
        "batches": batches,
        "profile": (DATASHEET, HYBRIDSERVE_PAPER)[rng.integers(2)],
    }
    if unequal and rng.random() < 0.5:
        settings["contexts"] = rng.integers(0, workload.context + 1, batches * workload.batch).tolist()
    return system, workload, settings


@pytest.mark.parametrize("kind", [RecomputeSplitProblem, CacheRatioProblem])
def test_every_way_out_that_is_offered_is_one(kind):
    """Built again with the advice, nothing else changed; all kinds of advice occur."""
    seen: Counter[str] = Counter()
    for seed in range(CASES):
        case = random_case(seed, unequal=kind is CacheRatioProblem)
        problem = kind.build(case[0], case[1], **case[2])
        if problem.possible:
            continue
        ways = advice(problem.explain_infeasible())
        for way in ways:
            name, (system, workload, settings) = followed(way, *case)
            assert kind.build(system, workload, **settings).possible, (seed, way)
            seen[name] += 1
        assert len({followed(way, *case)[0] for way in ways}) == len(ways), "each way out stands once"
    assert set(seen) == {"enlarge", "batch", "context", "bits", "weights"}, seen
    assert min(seen.values()) >= 2, seen


@pytest.mark.parametrize("kind", [RecomputeSplitProblem, CacheRatioProblem])
def test_the_batch_that_is_offered_is_the_largest(kind):
    found = 0
    for seed in range(CASES):
        case = random_case(seed, unequal=False)
        problem = kind.build(case[0], case[1], **case[2])
        if problem.possible:
            continue
        for way in advice(problem.explain_infeasible()):
            name, (system, workload, settings) = followed(way, *case)
            if name == "batch":
                assert not kind.build(system, replace(workload, batch=workload.batch + 1), **settings).possible
                found += 1
    assert found >= 5


def test_solvers_agree_that_the_ways_out_lead_somewhere():
    """Not only by the problem's own arithmetic: the solvers' plans fit after each change."""
    for kind, solver in ((RecomputeSplitProblem, ClosedFormSplit()), (CacheRatioProblem, LpRatio())):
        found = 0
        for seed in range(60):
            system, workload, settings = random_case(seed, unequal=False)
            case = system, replace(workload, context=min(workload.context, 3000)), settings
            problem = kind.build(case[0], case[1], **settings)
            result = solver.solve(problem)
            assert (result.status is Status.INFEASIBLE) == (not problem.possible)
            for way in () if problem.possible else advice(result.message):
                _, (changed, served, others) = followed(way, *case)
                again = kind.build(changed, served, **others)
                assert again.evaluate(solver.solve(again).unwrap()).fits
                found += 1
        assert found >= 20


def test_long_prompts_fill_the_staging_buffers_and_bits_of_weights_cannot_help():
    """16 requests of 400,000 tokens of OPT-30B: two buffers of 2 x 16 x 400,000 x 4 h bytes, 367 GB; fewer bits of all are too few."""
    workload = Workload(llm=OPT_30B, batch=16, context=400_000, weight_bits=16, kv_bits=16, activation_bits=16)
    roomy = RTX.with_tier("host", capacity=1e14)
    ways = advice(CacheRatioProblem.build(roomy, workload).explain_infeasible())
    assert not [way for way in ways if "bits" in way]
    assert [way for way in ways if "contexts to" in way or "requests a GPU batch" in way]


def test_problems_of_coefficients_offer_what_can_be_checked():
    """Without an LLM there are no bits to change; larger memories are exact to three digits, rounded up."""
    line = LinearTime(slope=1.0)
    layer = RatioLayer(layers=1, weights=1.0, compute=1.0, load_kv=line, load_act=line, generate=line)
    giga = 10**9
    problem = CacheRatioProblem(
        layers=(layer,), request_blocks=(10,), kv_block=4 * giga, act_block=2 * giga, gpu_capacity=3 * giga, host_capacity=9 * giga
    )
    (way,) = advice(problem.explain_infeasible())
    more = float(way.removeprefix("enlarge the host by ").removesuffix(" GB"))
    assert 9 <= more <= 9.01
    assert replace(problem, host_capacity=problem.host_capacity + round(more * giga)).possible
    assert not replace(problem, host_capacity=problem.host_capacity + round((more - 0.02) * giga)).possible


@pytest.mark.parametrize("missing", [1.0, 999.0, 1e9, 1.0001e9, 27.155e9, 9.996e12, 123456789.0])
def test_gigabytes_are_rounded_up_to_three_digits(missing: float):
    written = gigabytes_more(missing)
    assert missing <= float(written) * GB <= missing * 1.011
    assert len(written.replace(".", "").lstrip("0").split("e")[0].rstrip("0")) <= 3


def test_the_largest_number_that_fits():
    for most in (-1, 0, 1, 7, 64):
        for limit in (0, 1, 5, 100):
            assert largest(lambda n, limit=limit: n <= limit, most) == max(min(limit, most), 0)


def test_placement_offers_what_a_proven_optimum_can_use():
    """Larger tiers, shorter prompts, fewer bits: after each change, the exact solver finds a plan."""
    seen: Counter[str] = Counter()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        llm, prompt = (OPT_175B, int(rng.choice([32, 512]))) if rng.random() < 0.6 else (OPT_6_7B, 40_000)
        problem = PlacementProblem.build(llm, prompt=prompt, generated=8, system=T4, gpu_batch_sizes=(1, 2))
        sizes = 10 ** rng.uniform((-0.5, 0, 0), (2, 2.7, 2.7)) * GB
        problem = replace(problem, capacity=tuple(sizes.tolist()))
        result = CharnesCooperPlacement(relative_gap=0.5).solve(problem)
        if result.status is not Status.INFEASIBLE:
            continue
        for way in advice(result.message):
            if way.startswith("enlarge"):
                capacity = list(problem.capacity)
                for name, more in ENLARGE.findall(way):
                    capacity[problem.tier_names.index(name)] += float(more) * GB
                name, changed = "enlarge", replace(problem, capacity=tuple(capacity))
            elif found := re.match(r"use prompts of (\d+) tokens at most", way):
                name, changed = "prompt", replace(problem, prompt=int(found[1]))
            else:
                (percent,) = re.match(r"hold weights, keys and values in (\d+) % of their bits", way).groups()
                share = int(percent) / 100
                assert share >= 1 / 16
                name, changed = "bits", replace(problem, weight_bytes=problem.weight_bytes * share, kv_bytes=problem.kv_bytes * share)
            assert CharnesCooperPlacement(relative_gap=0.5).solve(changed).plan is not None, (seed, way)
            seen[name] += 1
    assert set(seen) == {"enlarge", "prompt", "bits"}, seen
