"""The CUDA code on a CUDA device that is not there: its streams are ordered by events where they must be, and the host waits for nothing.

What a real device adds, its speed and its own mistakes, is tested where there is one (test_runtime.py).
"""

import random
import re
from collections import Counter

import numpy as np
import pytest
from runtime_llms import TINY_LLAMA, TINY_OPT, alone

from memsplit.dse.runtime import CachePlan, FullKV, Placement, Runtime, SplitKV, TransferKV
from memsplit.models import CacheRatioPlan, MiniBatchPlan

torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
if torch.cuda.is_available():
    pytest.skip("there is a real CUDA device", allow_module_level=True)

from fake_cuda import FakeCuda  # noqa: E402
from test_machine_kernels import SMALL  # noqa: E402
from test_runtime_link import any_plan  # noqa: E402

from memsplit.dse.machine import _torch, profile_machine  # noqa: E402
from memsplit.dse.runtime._link import CudaTransfers  # noqa: E402
from memsplit.dse.runtime._states import CacheState, HostState  # noqa: E402

PROMPT, GENERATED, REQUESTS = 17, 4, 6
MINI = MiniBatchPlan(batches=((3, 0), (1, 5, 2), (4,)))
BLOCKS = CachePlan(blocks=CacheRatioPlan(kv_gpu=4, act_gpu=3, kv_host=6, act_host=5), mini_batches=MINI)
PLANS = {
    "full, weights streamed": FullKV(weights="host", gpu_batches=3),
    "transfer": TransferKV(),
    "transfer, weights streamed, two batches": TransferKV(weights="host", gpu_batches=2),
    "split, staged": SplitKV(split=9),
    "split, chunked, weights streamed, three batches": SplitKV(split=11, template="chunked", weights="host", gpu_batches=3),
    "split, fluid, weights streamed": SplitKV(split=11, template="fluid", weights="host", gpu_batches=2),
    "blocks in mini-batches": BLOCKS,
    "inputs only, weights resident": CachePlan(blocks=CacheRatioPlan(act_host=18), mini_batches=MINI, weights="gpu"),
    "half of everything placed": Placement(weights=0.5, cache=0.5, gpu_batches=2),
    "half of everything placed, hidden states too": Placement(weights=0.5, cache=0.5, hidden=0.5, gpu_batches=3),
    "FlexGen's 20/80/0/100/0/100": Placement(weights=0.2, cache=0, hidden=0, attention="host", gpu_batches=2),
    "half of the attention on the host, one GPU batch": Placement(cache=0.5, attention="host"),
}
LLMS = {"OPT": TINY_OPT, "Llama, GQA": TINY_LLAMA, "one layer": alone(TINY_OPT)}


@pytest.mark.parametrize("llm", LLMS.values(), ids=LLMS)
def test_no_plan_races_and_all_give_the_same_tokens(llm):
    with Runtime(llm, seed=1) as runtime:
        prompts = runtime.random_prompts(REQUESTS, PROMPT)
        full = runtime.generate(prompts, GENERATED, state=True)
    with FakeCuda() as cuda, Runtime(llm, seed=1, device="cuda") as runtime:
        for plan in PLANS.values():
            found = runtime.generate(prompts, GENERATED, plan, state=True)
            np.testing.assert_array_equal(found.tokens, full.tokens)
            # Rounding, as in test_runtime.py.
            np.testing.assert_allclose(found.keys, full.keys, rtol=0, atol=1e-4)
            assert all(seconds > 0 for seconds in found.step_seconds)
            runtime.layer_times(2, PROMPT, repeats=1)  # in memory that the run before may still be sent from
    assert not cuda.races


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_of_any_settings_races(seed):
    chance = random.Random(seed)
    with FakeCuda() as cuda, Runtime((TINY_OPT, TINY_LLAMA, alone(TINY_LLAMA))[seed], device="cuda") as runtime:
        for _ in range(12):
            prompts = runtime.random_prompts(chance.choice([2, 4]), chance.choice([1, 2, 17]))
            runtime.generate(prompts, 3, any_plan(chance, *prompts.shape))
    assert not cuda.races


@pytest.mark.parametrize("llm", [TINY_OPT, alone(TINY_OPT)], ids=["three layers", "one layer"])
def test_no_blocks_of_few_tokens_race(llm):
    """Mini-batches of one request, of which some load nothing, some store nothing, and slots come around soonest."""
    chance, one_each = random.Random(7), MiniBatchPlan(batches=((0,), (1,), (2,)))
    with FakeCuda() as cuda, Runtime(llm, device="cuda") as runtime:
        for _ in range(40):
            counts = dict(zip(("kv_gpu", "act_gpu", "kv_host", "act_host"), chance.choices([0, 1, 2], k=4), strict=True))
            if any(counts.values()):
                blocks = CachePlan(blocks=CacheRatioPlan(**counts), block=chance.choice([1, 2]), mini_batches=one_each, weights="gpu")
                runtime.generate(runtime.random_prompts(3, chance.choice([1, 2])), 4, blocks)
    assert not cuda.races


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_host_waits_in_no_decode_step_but_for_its_own_attention(plan):
    """Five steps more are no wait more; attention on the host waits once a layer and GPU batch."""
    counts = []
    with FakeCuda() as cuda, Runtime(TINY_OPT, device="cuda") as runtime:
        prompts = runtime.random_prompts(REQUESTS, PROMPT)
        runtime.generate(prompts, 2, plan)  # places the weights
        for generated in (2, 7):
            cuda.syncs.clear()
            runtime.generate(prompts, generated, plan)
            counts.append(Counter(cuda.syncs))
    own = getattr(plan, "attention", "gpu") == "host"
    more = 5 * TINY_OPT.num_hidden_layers * plan.gpu_batches if own else 0
    assert counts[1] - counts[0] == Counter({"Event.synchronize": more} if more else {})
    assert 0 < counts[0].total() < 50


def test_parts_of_a_layer_are_timed_without_a_race():
    with FakeCuda() as cuda, Runtime(TINY_LLAMA, device="cuda", dtype="float16") as runtime:
        for weights in ("gpu", "host"):
            times = runtime.layer_times(4, 20, gpu_batches=2, weights=weights, repeats=3)
            assert all(getattr(times, name) > 0 for name in ("kv", "act", "recompute", "compute", "weights", "outside"))
    assert not cuda.races


def test_a_gpu_is_profiled_without_a_race(monkeypatch):
    monkeypatch.setattr(_torch, "QUICK", SMALL)
    with FakeCuda(memory=2**24) as cuda:
        found = profile_machine(device="cuda", quick=True, progress=False)
    assert {rate.cell.kind for rate in found.rates} >= {"read", "copy", "gemm", "decode_attention", "launch", "host_link"}
    assert found.machine.gpu == "Fake GPU"
    assert not cuda.races


NINE = MiniBatchPlan(batches=(tuple(range(9)), (9, 10, 11)))


@pytest.mark.parametrize("llm", [TINY_OPT, TINY_LLAMA], ids=["OPT", "Llama"])
@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        (FullKV(), 120),
        (FullKV(), 1),
        (TransferKV(weights="host"), 120),
        (TransferKV(gpu_batches=12), 120),
        (SplitKV(split=200), 200),
        (
            CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_gpu=2, act_host=2), mini_batches=MiniBatchPlan(batches=(range(9), (9, 10, 11)))),
            90,
        ),
        (Placement(weights=0.5, cache=0.5, hidden=0.5, gpu_batches=2), 120),
        (Placement(cache=0.5, hidden=0, attention="host", gpu_batches=12), 120),
    ],
    ids=str,
)
def test_no_more_memory_is_taken_than_was_planned(llm, plan, tokens):
    """Of the device, after weights were elsewhere; what is planned beside is an estimate from above, below six times what it is."""
    with FakeCuda() as cuda, Runtime(llm, device="cuda", dtype="float16") as runtime:
        prompts = runtime.random_prompts(12, tokens)
        runtime.generate(prompts[:1, :1], 1, FullKV(weights="gpu" if plan.streamed else "host"))
        cuda.peak = 0
        found = runtime.generate(prompts, GENERATED, plan)
        _, run = plan.run(12, tokens, GENERATED)
        needs = runtime._needs(plan, run)
    assert needs.device < found.peak_device_bytes <= needs.device + needs.working
    assert needs.working < 6 * (found.peak_device_bytes - needs.device)
    assert found.peak_device_bytes == cuda.peak


def test_no_more_memory_is_taken_to_measure_a_layer():
    """What is planned for suffices, and is not far from it."""
    with FakeCuda() as cuda, Runtime(TINY_LLAMA, device="cuda", dtype="float16") as runtime:
        cuda.peak = 0
        runtime.layer_times(6, 400, gpu_batches=2, repeats=1)
        most = cuda.peak
    lacks = {}
    for memory in ("device_capacity", "host_capacity"):
        with FakeCuda(), Runtime(TINY_LLAMA, device="cuda", dtype="float16", **{memory: 1e4}) as runtime:
            with pytest.raises(ValueError, match=r"needs [\d.e-]+ GB") as said:
                runtime.layer_times(6, 400, gpu_batches=2, repeats=1)
            lacks[memory] = float(re.search(r"needs ([\d.e-]+) GB", str(said.value))[1]) * 1e9
    assert most <= lacks["device_capacity"] * 1.001 < 2 * most  # the sentence has four digits


def test_a_run_keeps_no_more_pinned_memory_than_there_is():
    """What an earlier run has pinned is given back where it does not fit beside what this one needs, weights included."""
    plans = [TransferKV(), FullKV(weights="host"), Placement(weights=0.2), SplitKV(split=PROMPT), Placement(weights=0.6, cache=0)]
    with FakeCuda(), Runtime(TINY_OPT, device="cuda") as wide:
        prompts = wide.random_prompts(REQUESTS, PROMPT)
        needs = [wide._needs(plan, plan.run(REQUESTS, PROMPT, GENERATED)[1]) for plan in plans]
        most = max(one.host + one.host_beside for one in needs)
        together = 0
        for plan in plans * 2:
            wide.generate(prompts, GENERATED, plan)
            together = max(together, wide._link._arena.held + wide._weights.held)
    assert together > most, "there would be nothing to give back"
    with FakeCuda(), Runtime(TINY_OPT, device="cuda", host_capacity=most) as tight:
        full = tight.generate(prompts, GENERATED)
        for plan in plans * 2:
            np.testing.assert_array_equal(tight.generate(prompts, GENERATED, plan).tokens, full.tokens)
            assert tight._link._arena.held + tight._weights.held <= most


def test_pinned_memory_is_used_again():
    """Runs of one size pin once."""
    made = []
    with FakeCuda(), Runtime(TINY_OPT, device="cuda") as runtime:
        arena = runtime._link._arena
        make = arena.make
        arena.make = lambda nbytes: [made.append(nbytes), make(nbytes)][1]
        prompts = runtime.random_prompts(REQUESTS, PROMPT)
        for _ in range(3):
            runtime.generate(prompts, GENERATED, TransferKV())
        needs = runtime._needs(TransferKV(), TransferKV().run(REQUESTS, PROMPT, GENERATED)[1])
        assert 0 < sum(made) == arena.held == needs.pinned == needs.host + needs.host_beside


def test_closing_from_another_thread_is_said(monkeypatch):
    """Between the check of the arguments and the run."""
    with FakeCuda(), Runtime(TINY_OPT, device="cuda") as runtime:
        prompts = runtime.random_prompts(2, 3)
        check = Runtime._check
        monkeypatch.setattr(Runtime, "_check", lambda self, *args, **asked: [check(self, *args, **asked), self.close()][0])
        with pytest.raises(ValueError, match="it is closed"):
            runtime.generate(prompts, 3)


# Controls: the device that is not there notices what is missing


def test_a_transfer_that_nobody_waits_for_is_a_race(monkeypatch):
    monkeypatch.setattr(CudaTransfers, "wait", lambda self, ticket: None)
    assert_races(TransferKV())


def test_a_transfer_that_waits_for_nothing_is_a_race(monkeypatch):
    send = CudaTransfers.send
    monkeypatch.setattr(CudaTransfers, "send", lambda self, direction, pairs, after=(): send(self, direction, pairs))
    assert_races(SplitKV(split=9))


def test_a_slot_used_again_too_early_is_a_race(monkeypatch):
    for state in (HostState, CacheState):
        monkeypatch.setattr(state, "prompt", without_stores(state.prompt))
    assert_races(TransferKV())
    assert_races(BLOCKS)


def without_stores(prompt):
    """``prompt`` that does not wait for what is being stored from the slot."""

    def early(self, unit, turn):
        self.slots[turn % 2].stored = None
        return prompt(self, unit, turn)

    return early


def test_memory_that_the_allocator_may_give_away_is_a_race(monkeypatch):
    with FakeCuda() as cuda, Runtime(TINY_OPT, device="cuda") as runtime:
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        runtime.generate(runtime.random_prompts(REQUESTS, PROMPT), GENERATED, TransferKV())
        monkeypatch.undo()
    assert any("freed while" in race for race in cuda.races)


def assert_races(plan):
    with FakeCuda() as cuda, Runtime(TINY_OPT, device="cuda") as runtime:
        runtime.generate(runtime.random_prompts(REQUESTS, PROMPT), GENERATED, plan)
    assert cuda.races


def test_pageable_memory_and_scalars_make_the_host_wait():
    with FakeCuda() as cuda:
        near = torch.ones(4, device="cuda")
        pinned, pageable = torch.ones(4, pin_memory=True), torch.ones(4)
        near.copy_(pinned, non_blocking=True)
        assert not cuda.syncs
        near.copy_(pageable, non_blocking=True)
        near.copy_(pinned)
        assert near.sum().item() == 4
        assert cuda.syncs == ["a copy of pageable memory", "a copy that waits", "_local_scalar_dense"]


def test_tensors_of_host_and_device_do_not_mix():
    with FakeCuda(), pytest.raises(AssertionError, match="host and device"):
        torch.ones(4, device="cuda") + torch.ones(4)
