"""Replays of offloading: conservation over whole traces, times that are no shorter than the bound, and clean ends when a policy fails."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROUNDING
from test_offload_serving import RTX, served

from memsplit.dse.replay_offload import OffloadReplay, against_offload_optimum, replay_offload
from memsplit.models.offload_generation import generation_time
from memsplit.models.offload_profiles import HYBRIDSERVE_PAPER, KVPR_NOMINAL
from memsplit.models.offload_serving import OffloadDecision
from memsplit.models.presets import LLAMA3_1_8B, LPDDR_ONLY_SYSTEM, OPT_13B, OPT_30B
from memsplit.models.trace import Trace, fixed_trace, h2m2_trace, poisson_trace
from memsplit.models.units import GB
from memsplit.models.workload import Workload
from memsplit.solvers.clairvoyant_offload import LpForms, StepBoundForms, step_bound
from memsplit.solvers.offload_policies import ActOnly, AdaptiveRatio, AdmissionRatio, FixedRatio, KvOnly, RequestForms, StepSplit
from memsplit.solvers.policies import Greedy

RUNTIME = "decide_runtime_s"
POLICIES = {
    "kv": KvOnly(),
    "act": ActOnly(),
    "half": FixedRatio(),
    "hybridserve": AdmissionRatio(),
    "kvpr": StepSplit(),
    "requests": RequestForms(),
    "adaptive": AdaptiveRatio(),
}
SMALL = h2m2_trace(2, batch=8, iterations=20, longest=900)


def run(policy, trace=SMALL, system=RTX, llm=OPT_30B, **settings) -> OffloadReplay:
    return replay_offload(policy, trace, system, llm, **({"batch_limit": 8, "profile": HYBRIDSERVE_PAPER} | settings))


def alike(service, trace, policy, batch, **settings) -> OffloadReplay:
    """A replay of what a service is about."""
    return replay_offload(policy, trace, service.system, service.llm, batch_limit=batch, weights=service.weights, **settings)


@dataclass(frozen=True)
class Scripted:
    """KV only, until at an iteration it does something else."""

    at: int
    what: str

    def most_tokens(self, service):
        return KvOnly().most_tokens(service)

    def decide(self, state):
        good = KvOnly().decide(state)
        if state.serving.iteration < self.at:
            return good
        if self.what == "raises":
            raise RuntimeError("no idea")
        if self.what == "interrupts":
            raise KeyboardInterrupt
        if self.what == "breaks a rule":
            return replace(good, recomputed=5)
        return None if self.what == "returns None" else replace(good, new_act=np.zeros(1, dtype=bool))


@dataclass(frozen=True)
class Careless:
    """Admits as if all were ACT, and writes KV."""

    def most_tokens(self, service):
        return ActOnly().most_tokens(service)

    def decide(self, state):
        return KvOnly().decide(state)


@dataclass(frozen=True)
class Random:
    """Any forms, from a seed and the iteration."""

    seed: int = 0

    def most_tokens(self, service):
        return service.most_tokens(sum(service.token_bytes), both=True)

    def decide(self, state):
        generator = np.random.default_rng((self.seed, state.serving.iteration))
        act = generator.integers(0, state.prompts + 1)
        both = generator.integers(0, state.prompts - act + 1)
        most = int(state.both.sum() + both.sum())
        return OffloadDecision(
            prompt_act=act,
            prompt_both=both,
            new_act=generator.random(state.batch) < 0.5,
            recomputed=int(generator.integers(0, most + 1)),
        )


@given(served(), st.sampled_from([*POLICIES.values(), Random()]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_request_finishes_tokens_are_conserved_and_memory_is_kept(given_service, policy, prefill):
    service, trace, batch = given_service
    result = alike(service, trace, policy, batch, prefill=prefill)
    rows, requests = result.rows, result.requests
    assert result.stopped == ""
    assert rows["batch"].sum() == trace.output_tokens.sum() == result.summary["tokens"]
    pairs = zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    assert rows["tokens"].sum() == sum(output * prompt + output * (output - 1) // 2 for prompt, output in pairs)
    assert rows["batch"].between(1, batch).all()
    assert (rows["act_tokens"] + rows["both_tokens"] <= rows["tokens"]).all()
    assert rows["recomputed_tokens"].between(rows["act_tokens"], rows["act_tokens"] + rows["both_tokens"]).all()
    # Bytes are sums and quotients of some roundings.
    for tier in service.system.tiers:
        assert (rows[f"{tier.name}_GB"] * GB <= tier.capacity * (1 + 1e-9) + 1e-3).all()
    assert (rows["link_s"] <= rows["decode_s"] * (1 + ROUNDING)).all()
    assert (rows["gpu_s"] <= rows["decode_s"] * (1 + ROUNDING)).all()
    assert (rows["iteration_s"] == rows["decode_s"] + rows["prefill_s"]).all()
    assert (rows["prefill_s"] > 0).any() == prefill
    assert (np.diff(rows["clock_s"], prepend=0) >= rows["iteration_s"] - 1e-9 * rows["clock_s"]).all()  # and waits in between
    assert (requests["first_token_s"] >= requests["arrived_at_s"]).all()
    assert (requests["finished_s"] >= requests["first_token_s"]).all()
    assert set(requests["finished_s"]) <= set(rows["clock_s"])
    schedule = result.schedule()
    assert schedule.steps.batch.tolist() == rows["batch"].tolist()
    assert schedule.steps.tokens.tolist() == rows["tokens"].tolist()


@given(served(6), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_no_policy_is_faster_than_the_bounds(given_service, seed):
    """Policies of both rules against theirs, all against the bound of any rule, and each iteration alone below both."""
    service, trace, batch = given_service
    runs = {name: alike(service, trace, policy, batch) for name, policy in (POLICIES | {"random": Random(seed)}).items()}
    found = against_offload_optimum(runs)
    assert set(found) == set(runs)
    for name, one in found.items():
        assert one.busy == pytest.approx(float(runs[name].rows["decode_s"].sum()), rel=ROUNDING)
        assert one.busy >= one.any_bound * (1 - ROUNDING)
        assert one.any_regret >= -ROUNDING
        assert step_bound(replace(one.problem, both=True)) <= one.any_bound * (1 + 1e-9)
        if name != "random":  # which keeps ACT and both forms beside each other
            assert one.busy >= one.optimum.bound * (1 - ROUNDING)
            assert one.regret.upper >= -ROUNDING
            assert one.optimum.objective >= one.any_bound * (1 - ROUNDING)


@given(served(6), st.sampled_from([None, 0.0, 0.3, 1.0]), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_adaptive_ratio_keeps_the_room_that_it_promises(given_service, act_room, share):
    """A host between the largest request in its larger form and all in KV: nothing overflows, and KV tokens stay below their limit."""
    service, trace, batch = given_service
    least, most = int(trace.state_tokens.max()) * max(service.token_bytes), service.batch * service.longest * service.token_bytes.kv
    room = service.llm.num_hidden_layers * (least + share * max(most - least, 0.0))
    held = service.workload(1).weight_bytes if service.weights == "host" else 0.0
    tight = replace(service, system=service.system.with_tier("far", capacity=held + room + 1e-6))
    policy = AdaptiveRatio(act_room=act_room)
    result = alike(tight, trace, policy, batch)
    assert result.stopped == ""
    tokens, as_kv = policy.limits(tight)
    assert as_kv <= tokens == policy.most_tokens(tight)
    assert (result.rows["tokens"] <= tokens).all()
    assert (result.rows["tokens"] - result.rows["act_tokens"] <= as_kv).all()
    assert (result.rows["far_GB"] * GB <= (held + room) * (1 + 1e-9) + 1e-3).all()  # sums and quotients of some roundings


def test_a_static_batch_takes_what_whole_generations_take():
    """KV and ACT exactly, prefill included; the adaptive ratio a little longer than any fraction at each step."""
    batch, prompt, generated = 64, 512, 32
    trace = fixed_trace(batch, prompt_tokens=prompt, output_tokens=generated)
    workload = Workload(llm=OPT_30B, batch=batch, context=prompt, weight_bits=16, kv_bits=16, activation_bits=16)
    for form, policy in (("kv", KvOnly()), ("act", ActOnly())):
        whole = generation_time(RTX, workload, prompt=prompt, generated=generated, profile=HYBRIDSERVE_PAPER, form=form)
        result = run(policy, trace, batch_limit=batch, prefill=True)
        assert len(result.rows) == generated
        assert result.summary["decode_s"] == pytest.approx(whole.decode, rel=ROUNDING)
        assert result.summary["prefill_s"] == pytest.approx(whole.prefill, rel=ROUNDING)
        assert result.summary["throughput_tok_per_s"] == pytest.approx(whole.throughput, rel=ROUNDING)
    best = generation_time(RTX, workload, prompt=prompt, generated=generated, profile=HYBRIDSERVE_PAPER).decode
    result = run(AdaptiveRatio(), trace, batch_limit=batch)
    steps = result.schedule().steps
    # It rounds to whole tokens, and new ones reach the best number wherever it grows by no more than a batch a step, as here.
    one = float((np.abs(steps.slopes).max(axis=1).T @ np.array(steps.layers)).sum())
    assert best * (1 - ROUNDING) <= result.summary["decode_s"] <= best + 2 * one


def test_one_request_alone_by_hand():
    """Prompt 10, three tokens: steps read 10, 11 and 12 tokens; the clock is their sum."""
    trace = Trace.from_arrays("one", [2.5], [10], [3])
    result = run(ActOnly(), trace)
    steps = result.service.steps([1, 1, 1], [10, 11, 12])
    assert result.rows["recomputed_tokens"].tolist() == [10, 11, 12]
    assert result.rows["decode_s"].tolist() == steps.seconds([10, 11, 12]).tolist()
    (request,) = result.requests.to_dict("records")
    assert request["ttft_s"] == pytest.approx(steps.seconds([10, 11, 12])[0], rel=ROUNDING)
    assert request["tpot_s"] == pytest.approx(steps.seconds([10, 11, 12])[1:].mean(), rel=ROUNDING)


def test_what_is_written_to_the_host_is_what_does_not_fit_the_gpu():
    """A prompt's KV beyond the cache when it joins, then each token's share of the state on the host."""
    trace = fixed_trace(1, prompt_tokens=900, output_tokens=3)
    small = RTX.with_tier("GDDR6X", capacity=6 * GB)
    result = run(KvOnly(), trace, small, prefill=True)
    kv, cache, layers = result.service.token_bytes.kv, result.service.cache, OPT_30B.num_hidden_layers
    outside = [layers * (kv * n - cache) for n in (900, 901, 902)]
    shares = [over / n for over, n in zip(outside, (900, 901, 902), strict=True)]
    assert cache < 900 * kv
    assert result.rows["host_written_GB"].tolist() == pytest.approx(
        [(outside[0] + shares[0]) / GB, shares[1] / GB, shares[2] / GB], rel=1e-9
    )  # differences of sums with the weights, some hundred times as large


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("raises", "policy Scripted, iteration 3: RuntimeError: no idea"),
        ("breaks a rule", "policy Scripted, iteration 3: ValueError: 5 tokens are to be recomputed, and 0 are kept"),
        ("returns None", "policy Scripted, iteration 3: TypeError: decide must return an OffloadDecision, not None"),
        ("returns another's", "policy Scripted, iteration 3: ValueError: new_act must say of each of 8 requests"),
        ("interrupts", "interrupted after 3 iterations"),
    ],
)
def test_a_policy_that_fails_ends_the_replay_with_the_rows_so_far(what, named):
    trace = fixed_trace(8, prompt_tokens=500, output_tokens=9)
    result, whole = run(Scripted(3, what), trace), run(KvOnly(), trace).rows
    assert result.stopped.startswith(named)
    assert result.summary["stopped"] == result.stopped
    assert len(whole) == 9
    assert result.rows.drop(columns=RUNTIME).equals(whole.iloc[:3].drop(columns=RUNTIME))
    assert result.requests["finished_s"].isna().all()
    assert against_offload_optimum({"one": result})["one"].problem.steps.tokens.tolist() == whole["tokens"].tolist()[:3]


def test_an_overflow_is_named_with_iteration_and_tier():
    """Room for the prompts as KV and for half of the tokens to come: the careless policy overflows the host later."""
    trace = fixed_trace(8, prompt_tokens=500, output_tokens=100)
    service = run(KvOnly(), trace, iterations=1).service
    room = 48 * (8 * 550 * service.token_bytes.kv - service.cache)
    assert room > 0 or service.cache > 0
    none = RTX.with_tier("GDDR6X", capacity=(service.overhead + 1.5 * GB + 1) / 0.92)
    tight = none.with_tier("host", capacity=service.workload(1).weight_bytes + 48 * 8 * 550 * service.token_bytes.kv)
    result = run(Careless(), trace, tight)
    assert result.stopped.startswith("policy Careless, iteration 50: what is written does not fit: host holds")
    assert len(result.rows) == 50
    honest = run(KvOnly(), trace, tight)
    assert honest.stopped == ""
    assert honest.rows["batch"].max() == 7


def test_a_replay_that_fails_at_once_has_no_rows_and_no_numbers():
    result = run(Scripted(0, "raises"))
    assert len(result.rows) == 0
    assert result.summary["throughput_tok_per_s"] is None
    assert against_offload_optimum({"none": result}) == {}
    with pytest.raises(ValueError, match="at least one iteration"):
        result.schedule()


def test_so_many_iterations_and_no_more():
    result = run(AdaptiveRatio(), iterations=5)
    assert len(result.rows) == 5
    assert result.stopped.startswith("stopped after 5 iterations, as asked; ")
    assert run(AdaptiveRatio(), iterations=20).stopped == ""


def test_what_cannot_be_served_is_said_before_the_start():
    cases = [
        (
            {
                "system": RTX.with_tier("host", capacity=59.7 * GB).with_tier("GDDR6X", capacity=6 * GB),
                "trace": fixed_trace(1, prompt_tokens=2000, output_tokens=40),
            },
            "request 0",
        ),
        ({"system": LPDDR_ONLY_SYSTEM}, "needs a GPU's memory and a host's"),
        ({"batch_limit": 0}, "batch_limit"),
        ({"iterations": 0}, "iterations"),
        ({"weights": "disk"}, "weights"),
    ]
    for given_settings, message in cases:
        with pytest.raises(ValueError, match=message):
            run(KvOnly(), **given_settings)


def test_an_idle_machine_waits_for_the_next_request():
    result = run(KvOnly(), Trace.from_arrays("late", [0, 100, 100], [10, 10, 10], [2, 1, 1]))
    assert result.rows["batch"].tolist() == [1, 1, 2]
    assert result.rows["clock_s"].iloc[1] < 100 < result.rows["clock_s"].iloc[2]
    assert math.isnan(result.requests["tpot_s"][1])


def test_the_same_trace_gives_the_same_rows():
    trace = poisson_trace("code", 16, rate=0.5, seed=4)
    first, second = (run(AdaptiveRatio(), trace, llm=LLAMA3_1_8B, prefill=True) for _ in range(2))
    assert len(first.rows) > 50
    assert first.rows.drop(columns=RUNTIME).equals(second.rows.drop(columns=RUNTIME))


def test_those_that_saw_one_schedule_share_its_optimum_and_long_ones_keep_a_bound():
    runs = {name: run(policy) for name, policy in POLICIES.items()}
    found = against_offload_optimum(runs)
    assert found["kv"].optimum is found["adaptive"].optimum
    assert found["kv"].problem.both is False
    assert found["kvpr"].problem.both is True
    assert LpForms().solve(runs["kv"].schedule()).objective == found["kv"].optimum.objective
    bounded = against_offload_optimum(runs, solver=StepBoundForms())
    for name, one in bounded.items():
        assert one.regret.lower is None
        assert one.regret.upper >= found[name].regret.upper - 1e-9


def test_the_adaptive_ratio_is_near_the_optimum_where_neither_form_is():
    """OPT-30B on the RTX 4090, where both forms are needed: within 0.5 % of the optimum, from which either is at least 2 %."""
    found = against_offload_optimum(
        {name: run(policy, batch_limit=32, trace=h2m2_trace(0, batch=32, iterations=32, longest=1800)) for name, policy in POLICIES.items()}
    )
    assert found["adaptive"].regret.upper < 0.005
    assert min(found["kv"].regret.lower, found["act"].regret.lower) > 0.02


def test_ctrl_c_ends_a_loop_over_replays_that_asks():
    result = run(Scripted(3, "interrupts"))
    assert (result.interrupted, len(result.rows)) == (True, 3)
    with pytest.raises(KeyboardInterrupt):
        result.unless_interrupted()
    for policy in (Scripted(3, "raises"), KvOnly()):
        other = run(policy)
        assert other.unless_interrupted() is other


def test_replays_of_several_traces_and_services_are_held_against_their_own_optima():
    """All join in iteration 0 and take 5; lengths, LLM, bits and machine differ, and so do the optima."""
    short, long = (fixed_trace(32, prompt_tokens=number, output_tokens=5) for number in (400, 1900))
    runs = {
        "short": run(KvOnly(), short, batch_limit=32),
        "long": run(KvOnly(), long, batch_limit=32),
        "LLM": run(KvOnly(), short, batch_limit=32, llm=OPT_13B),
        "bits": run(KvOnly(), short, batch_limit=32, weight_bits=8),
        "profile": run(KvOnly(), short, batch_limit=32, profile=KVPR_NOMINAL),
        "again": run(ActOnly(), short, batch_limit=32),
    }
    together = against_offload_optimum(runs)
    for name, one in together.items():
        alone = against_offload_optimum({name: runs[name]})[name]
        assert (one.busy, one.optimum.objective, one.any_bound) == (alone.busy, alone.optimum.objective, alone.any_bound)
    assert len({one.optimum.objective for one in together.values()}) == 5
    assert together["short"].optimum is together["again"].optimum
    with pytest.raises(ValueError, match=r"^wrong: the optimum is that of an OffloadReplay"):
        against_offload_optimum({"wrong": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": KvOnly}, "not the class KvOnly"),
        ({"policy": None}, "must have the method decide"),
        ({"policy": Greedy()}, "give others to replay"),
        ({"trace": None}, "must be a Trace"),
        ({"system": "rtx4090"}, "must be a System"),
        ({"llm": None}, "must be an LLMConfig"),
        ({"profile": "x"}, "must be an OffloadProfile"),
        ({"prefill": "no"}, "prefill must be True or False"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_before_the_start(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**({"policy": KvOnly()} | arguments))
