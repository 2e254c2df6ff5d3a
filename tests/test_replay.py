"""Replays: conservation over a whole trace, times that add up, and clean ends when a policy fails."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import dense_llms, profiles, systems
from test_serving import linked, per_layer, traces

from memsplit.dse.replay import against_optimum, replay, summarised
from memsplit.models import FIRST_PRINCIPLES, H2M2_CALIBRATED, KernelMappingPlan, Split, Workload
from memsplit.models.presets import GPT3_175B, H2M2_CXL_SYSTEM, H2M2_SYSTEM, LLAMA2_70B, LPDDR_ONLY_SYSTEM
from memsplit.models.serving import Service, _plan_exists
from memsplit.models.trace import Trace, fixed_trace, h2m2_trace, poisson_trace
from memsplit.models.units import GB, TB, ns
from memsplit.solvers import PatternMapping
from memsplit.solvers.offload_policies import KvOnly
from memsplit.solvers.policies import Greedy, Myopic, SingleTier, Static

SMALL = h2m2_trace(2, batch=8, iterations=20)
RUNTIME = "decide_runtime_s"


def run(policy, trace=SMALL, system=H2M2_SYSTEM, llm=LLAMA2_70B, **settings):
    return replay(policy, trace, system, llm, **({"batch_limit": 8, "prefill": False} | settings))


@dataclass(frozen=True)
class Scripted:
    """The greedy policy, until at an iteration it does something else."""

    at: int
    what: str

    def decide(self, state):
        if state.serving.iteration < self.at:
            return Greedy().decide(state)
        if self.what == "raises":
            raise RuntimeError("no idea")
        if self.what == "interrupts":
            raise KeyboardInterrupt
        if self.what == "overflows":
            return state.window.plan([(kind.slices, 0) for kind in state.kinds])
        return None if self.what == "returns None" else KernelMappingPlan(splits=((Split(layers=1, counts=(1, 0)),),))


@dataclass(frozen=True)
class Alternating:
    """A plan in even iterations and another one in odd ones; ``layers`` True: the plans differ in their first layers only."""

    layers: bool = False

    def decide(self, state):
        first = state.window.plan([(0, kind.slices) for kind in state.kinds])
        second = state.window.plan([(1, kind.slices - 1) for kind in state.kinds])
        if self.layers:
            second = per_layer(state.problem, second, first)
        return second if state.serving.iteration % 2 else first


@given(st.data(), traces(), st.integers(1, 4), st.booleans())
@settings(max_examples=40)
def test_every_request_finishes_and_tokens_are_conserved(data, trace, batch, prefill):
    """On any machine that holds the largest request: rows and requests tell the same story."""
    llm = data.draw(dense_llms())
    system = linked(data.draw(systems(Workload(llm=llm, batch=2, context=10))))
    assume(_plan_exists(Service(system=system, llm=llm).tables([1], [int(trace.state_tokens.max())])))
    profile = data.draw(profiles)
    migration = data.draw(st.sampled_from(["serial", "overlapped", "free"]))
    result = replay(Myopic(), trace, system, llm, batch_limit=batch, prefill=prefill, profile=profile, migration=migration)
    rows, requests = result.rows, result.requests
    assert result.stopped == ""
    assert rows["batch"].sum() == trace.output_tokens.sum() == result.summary["tokens"]
    read = sum(
        output * prompt + output * (output - 1) // 2 for prompt, output in zip(trace.prompt_tokens, trace.output_tokens, strict=True)
    )
    assert rows["tokens"].sum() == read
    assert rows["batch"].between(1, batch).all()
    for tier in system.tiers:
        assert (rows[f"{tier.name}_GB"] * GB <= tier.capacity * (1 + 1e-12)).all()  # the product of the quotient rounds
    assert (np.diff(rows["clock_s"], prepend=0) >= rows["iteration_s"] - 1e-9 * rows["clock_s"]).all()  # and waits in between
    assert (requests["first_token_s"] >= requests["arrived_at_s"]).all()
    assert (requests["finished_s"] >= requests["first_token_s"]).all()
    assert requests["first_token_s"].is_monotonic_increasing  # first come, first served
    assert set(requests["finished_s"]) <= set(rows["clock_s"])
    assert requests["finished_s"].max() == rows["clock_s"].iloc[-1]


def test_one_request_alone_by_hand():
    """Prompt 10, three tokens, one memory, nothing moves: steps read 10, 11 and 12 tokens; the clock is their sum, and the prefill's."""
    service = Service(system=LPDDR_ONLY_SYSTEM, llm=LLAMA2_70B)
    trace = Trace.from_arrays("one", [2.5], [10], [3])
    problems = [service.problem(1, tokens) for tokens in (10, 11, 12)]
    plan = KernelMappingPlan.same_in_all_layers(problems[0], [(kind.slices,) for kind in problems[0].kinds])
    steps = [problem.evaluate(plan).latency for problem in problems]
    prefill = service.prefill(10).evaluate(plan).latency
    result = run(SingleTier(), trace, LPDDR_ONLY_SYSTEM, prefill=True)
    assert result.rows["tokens"].tolist() == [10, 11, 12]
    assert result.rows["decode_s"].tolist() == steps
    assert result.rows["prefill_s"].tolist() == [prefill, 0, 0]
    (request,) = result.requests.to_dict("records")
    assert request["ttft_s"] == pytest.approx(prefill + steps[0], rel=1e-12)
    assert request["tpot_s"] == pytest.approx((steps[1] + steps[2]) / 2, rel=1e-12)
    assert result.summary["throughput_tok_per_s"] == pytest.approx(3 / (prefill + sum(steps)), rel=1e-12)
    assert result.summary["tpot_p50_s"] == result.summary["tpot_p99_s"] == request["tpot_s"]
    assert prefill > 0


def test_migration_is_that_of_the_plans_one_after_the_other():
    """Serial adds it, overlapped hides it behind the step, free leaves it out; what moves is the same."""
    trace = fixed_trace(8, prompt_tokens=100, output_tokens=5)
    for policy in (Alternating(), Alternating(layers=True)):
        serial, overlapped, free = (run(policy, trace, migration=how) for how in ("serial", "overlapped", "free"))
        service = Service(system=H2M2_SYSTEM, llm=LLAMA2_70B)
        for row in range(1, 5):
            problem = service.problem(8, 8 * (100 + row))
            before, after = (plan_at(policy, problem, row + step) for step in (-1, 0))
            cost = problem.transition(before, after)
            assert serial.rows["migration_s"][row] == cost.latency > 0
            assert serial.rows["migration_GB"][row] == sum(cost.moved.values()) / GB > 0
        assert serial.rows["migration_s"][0] == 0
        assert serial.summary["migrations"] == 4
        assert (serial.rows["iteration_s"] == serial.rows["decode_s"] + serial.rows["migration_s"]).all()
        assert (overlapped.rows["iteration_s"] == np.maximum(serial.rows["decode_s"], serial.rows["migration_s"])).all()
        assert (free.rows["iteration_s"] == serial.rows["decode_s"]).all()
        assert (free.rows["migration_GB"] == serial.rows["migration_GB"]).all()
        assert free.rows["migration_s"].sum() == 0


def plan_at(policy, problem, iteration):
    first, second = (KernelMappingPlan.same_in_all_layers(problem, [(n, kind.slices - n) for kind in problem.kinds]) for n in (0, 1))
    if policy.layers:
        second = per_layer(problem, second, first)
    return second if iteration % 2 else first


def test_a_policy_that_never_moves_migrates_nothing():
    rows = run(Static()).rows
    assert rows["plan"].nunique() == 1
    assert rows[["migration_GB", "migration_s"]].to_numpy().sum() == 0


def test_the_same_seed_gives_the_same_rows_whatever_the_window():
    trace = poisson_trace("chat", 12, rate=3.0, seed=4)
    tables = [run(Greedy(), trace, prefill=True, window=window) for window in (1, 5, 64)]
    assert len(tables[0].rows) > 100
    for other in tables[1:]:
        assert tables[0].rows.drop(columns=RUNTIME).equals(other.rows.drop(columns=RUNTIME))
        assert tables[0].requests.equals(other.requests)
        assert {**tables[0].summary, "decide_mean_runtime_s": 0} == {**other.summary, "decide_mean_runtime_s": 0}


def test_page_walks_are_part_of_a_step_and_shown():
    walking = replace(FIRST_PRINCIPLES, name="walking", page_walk=300 * ns)
    with_walks, without = run(Static(), profile=walking), run(Static())
    assert (without.rows["paging_s"] == 0).all()
    assert (with_walks.rows["paging_s"] > 0).all()
    fresh = with_walks.rows["decode_s"] - with_walks.rows["paging_s"]
    if with_walks.rows["plan"][0] == without.rows["plan"][0]:
        np.testing.assert_allclose(fresh, without.rows["decode_s"], rtol=1e-12)  # a difference of a sum
    assert with_walks.summary["paging_s"] == with_walks.rows["paging_s"].sum()


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("raises", "policy Scripted, iteration 3: RuntimeError: no idea"),
        ("overflows", "policy Scripted, iteration 3: the plan does not fit: HBM holds"),
        ("returns None", "policy Scripted, iteration 3: TypeError: decide must return a KernelMappingPlan, not None"),
        ("returns another's", "policy Scripted, iteration 3: ValueError: the plan has 1 kinds of sublayer"),
        ("interrupts", "interrupted after 3 iterations"),
    ],
)
def test_a_policy_that_fails_ends_the_replay_with_the_rows_so_far(what, named):
    trace = fixed_trace(8, prompt_tokens=2000, output_tokens=9)
    small = H2M2_SYSTEM.with_tier("HBM", capacity=40 * GB)
    result = run(Scripted(3, what), trace, small)
    assert result.stopped.startswith(named)
    assert result.summary["stopped"] == result.stopped
    whole = run(Greedy(), trace, small).rows
    assert len(whole) == 9
    assert result.rows.drop(columns=RUNTIME).equals(whole.iloc[:3].drop(columns=RUNTIME))
    assert result.summary["iterations"] == 3
    assert result.summary["tokens"] == 24
    assert result.summary["requests"] == 0
    assert result.requests["finished_s"].isna().all()
    assert result.requests["first_token_s"].notna().all()


def test_a_replay_that_fails_at_once_has_no_rows_and_no_numbers():
    result = run(SingleTier("HBM"), llm=GPT3_175B)
    assert result.stopped.startswith("policy SingleTier, iteration 0: the plan does not fit: HBM holds 1")
    assert len(result.rows) == 0
    assert result.summary["throughput_tok_per_s"] is None
    assert result.summary["tpot_p99_s"] is None
    assert summarised(result.rows, result.requests)["iterations"] == 0


def test_a_way_that_no_link_leads_ends_the_replay_cleanly():
    one_way = replace(H2M2_SYSTEM, links=H2M2_SYSTEM.links[:1])
    result = run(Alternating(), system=one_way)
    assert len(result.rows) == 1
    assert "no link leads from 'LPDDR' to 'HBM'" in result.stopped
    assert run(Static(), system=one_way).stopped == ""


def test_so_many_iterations_and_no_more():
    result = run(Greedy(), iterations=5)
    assert len(result.rows) == 5
    assert result.stopped.startswith("stopped after 5 iterations, as asked; ")
    assert run(Greedy(), iterations=20).stopped == ""
    assert len(run(Greedy(), iterations=99).rows) == 20


def test_nothing_fits_is_said_before_the_start():
    trace = fixed_trace(2, prompt_tokens=2040, output_tokens=20)
    with pytest.raises(ValueError, match=r"request 0 holds 2059 tokens.*enlarge a memory"):
        run(Greedy(), trace, H2M2_SYSTEM.with_tier("LPDDR", capacity=0.0).with_tier("HBM", capacity=68.95 * GB))
    for wrong in ({"batch_limit": 0}, {"window": 0}, {"iterations": 0}, {"migration": "later"}):
        with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]):
            run(Greedy(), **wrong)


def test_requests_wait_for_memory_and_then_are_served():
    """Room for two of the four (2048 tokens are a page of each tensor): they run two by two, in twice as many iterations."""
    trace = fixed_trace(4, prompt_tokens=1000, output_tokens=5)
    tight = H2M2_SYSTEM.with_tier("LPDDR", capacity=0.0).with_tier("HBM", capacity=68.95 * GB)
    assert 2 * 1004 <= Service(system=tight, llm=LLAMA2_70B).most_tokens() < 3 * 1004
    assert run(Greedy(), trace, tight).rows["batch"].tolist() == [2] * 10
    assert run(Greedy(), trace).rows["batch"].tolist() == [4] * 5


def test_an_idle_machine_waits_for_the_next_request():
    result = run(Static(), Trace.from_arrays("late", [0, 100, 100], [10, 10, 10], [2, 1, 1]))
    assert result.rows["batch"].tolist() == [1, 1, 2]
    assert result.rows["clock_s"].iloc[1] < 100 < result.rows["clock_s"].iloc[2] < 101
    assert result.requests["ttft_s"].max() < 1
    assert math.isnan(result.requests["tpot_s"][1])


def test_ample_and_fast_memory_is_no_slower():
    """More bandwidth on every tier: each step of the myopic policy is at least as fast."""
    faster = H2M2_SYSTEM.with_tier("HBM", bandwidth=6 * TB).with_tier("LPDDR", bandwidth=1 * TB)
    rows, others = (run(Myopic(), system=system, migration="free").rows for system in (H2M2_SYSTEM, faster))
    assert (others["decode_s"] <= rows["decode_s"]).all()
    assert (rows["tokens"] == others["tokens"]).all()


def test_ctrl_c_ends_a_loop_over_replays_that_asks():
    result = run(Scripted(3, "interrupts"))
    assert (result.interrupted, len(result.rows)) == (True, 3)
    assert result.stopped == "interrupted after 3 iterations"
    with pytest.raises(KeyboardInterrupt):
        result.unless_interrupted()
    for policy, how in ((Scripted(3, "raises"), {}), (Greedy(), {"iterations": 3}), (Greedy(), {})):
        other = run(policy, **how)
        assert other.unless_interrupted() is other


def test_replays_of_several_services_are_held_against_their_own_optima():
    """The schedule is the same on less HBM, with 16 bits and of another LLM; the optimum is not."""
    small = H2M2_SYSTEM.with_resized_tier("HBM", 16 * GB)
    runs = {
        "full": run(Myopic()),
        "small": run(Myopic(), system=small),
        "16 bits": run(Myopic(), kv_bits=16),
        "profile": run(Myopic(), profile=H2M2_CALIBRATED),
        "LLM": run(Myopic(), llm=GPT3_175B),
        "again": run(Static()),
    }
    assert len({tuple(one.rows["tokens"]) for one in runs.values()}) == 1
    together = against_optimum(runs)
    alone = {name: against_optimum({name: one})[name] for name, one in runs.items()}
    for name, one in together.items():
        assert one.optimum.objective == alone[name].optimum.objective
        assert one.regret.upper == alone[name].regret.upper
    assert len({one.optimum.objective for one in together.values()}) == 5
    assert together["full"].optimum is together["again"].optimum


def test_the_replay_that_has_no_optimum_is_named():
    good = run(Greedy(), iterations=2)
    for wrong, message in (
        (run(Alternating(layers=True), iterations=2), "must split all .* alike, and it has 2 ways"),
        (run(Greedy(), system=LPDDR_ONLY_SYSTEM, iterations=2), "two memories"),
        (run(Greedy(), migration="free", iterations=2), "waits for migration"),
        (None, "a Replay"),
    ):
        with pytest.raises(ValueError, match=f"^wrong: .*{message}"):
            against_optimum({"good": good, "wrong": wrong})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": Greedy}, "not the class Greedy"),
        ({"policy": None}, "must have the method decide"),
        ({"policy": "greedy"}, "must have the method decide"),
        ({"policy": KvOnly()}, "give it to replay_offload"),
        ({"trace": []}, "must be a Trace"),
        ({"trace": None}, "must be a Trace"),
        ({"system": "h2m2"}, "must be a System"),
        ({"system": None}, "must be a System"),
        ({"llm": "llama2-70b"}, "must be an LLMConfig"),
        ({"llm": None}, "must be an LLMConfig"),
        ({"profile": "h2m2"}, "must be a Profile"),
        ({"prefill": "no"}, "prefill must be True or False"),
        *(({"kv_bits": bits}, "kv_bits must be a number above 0") for bits in (0, "8", None, math.nan, -4)),
        ({"weight_bits": 0}, "weight_bits"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_before_the_start(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**({"policy": Greedy()} | arguments))


def test_bits_that_are_next_to_nothing_leave_room_for_any_trace():
    assert run(Greedy(), kv_bits=1e-300, iterations=2).rows["tokens"].notna().all()


@pytest.mark.parametrize("system", [LPDDR_ONLY_SYSTEM, H2M2_CXL_SYSTEM])
def test_a_static_plan_is_found_for_any_number_of_memories(system):
    """It is the optimum of the longest iteration, which no plan that fits beats."""
    result = run(Static(), system=system)
    assert (result.stopped, result.summary["migrations"]) == ("", 0)
    service = Service(system=system, llm=LLAMA2_70B)
    longest = service.problem(8, min(service.most_tokens(), 8 * int(SMALL.state_tokens.max())))
    best = PatternMapping().solve(longest).objective
    assert longest.evaluate(result.plans[0]).latency == best
