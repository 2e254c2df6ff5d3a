"""Every executed plan says what keys and values on the device say, moves the bytes that the cost model counts, and explains refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_llms import TINY_LLAMA, TINY_OPT, TINY_QWEN3, alone

from memsplit.dse.runtime import (
    CachePlan,
    EmulatedLink,
    FullKV,
    Generation,
    Placement,
    Runtime,
    SplitKV,
    TransferKV,
)
from memsplit.models import CacheRatioPlan, MiniBatchPlan, RecomputeSplitPlan, RecomputeSplitProblem, Workload
from memsplit.models.presets import SYSTEMS
from memsplit.models.units import GB

torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")

PROMPT, GENERATED, REQUESTS = 37, 9, 6

ROUNDING = 1e-4
"""How far keys, values and logits of two plans may be apart in single precision.

A key is a sum of 64 products of numbers about 1 and 0.25, in an order that the number of rows in a product may change: 8 sqrt(64) 6e-8 for
one sum, which three layers and eight tokens pass on and add up. Mistakes of position or head are 1e4 times as large.
"""

FAST = EmulatedLink(bandwidth=50 * GB)
"""Where no time is looked at."""

MINI = MiniBatchPlan(batches=((3, 0), (1, 5, 2), (4,)))

PLANS = {
    "full, weights streamed": FullKV(weights="host", gpu_batches=3),
    "transfer": TransferKV(),
    "transfer, weights streamed, two batches": TransferKV(weights="host", gpu_batches=2),
    "split of nothing": SplitKV(split=0),
    "split, staged": SplitKV(split=20),
    "split of the whole prompt": SplitKV(split=PROMPT),
    "split, chunked": SplitKV(split=23, template="chunked", chunks=4),
    "split, chunked, more chunks than tokens": SplitKV(split=3, template="chunked", chunks=5),
    "split, fluid": SplitKV(split=23, template="fluid", chunks=3),
    "split, weights streamed, three batches": SplitKV(split=11, weights="host", gpu_batches=3),
    "split, fluid, weights streamed": SplitKV(split=11, template="fluid", weights="host", gpu_batches=2),
    "blocks of four forms": CachePlan(blocks=CacheRatioPlan(kv_gpu=4, act_gpu=5, kv_host=5, act_host=4)),
    "blocks in mini-batches": CachePlan(blocks=CacheRatioPlan(kv_gpu=4, act_gpu=3, kv_host=6, act_host=5), mini_batches=MINI),
    "inputs only, weights resident": CachePlan(blocks=CacheRatioPlan(act_host=18), mini_batches=MINI, weights="gpu"),
    "half inputs, half keys and values, on the host": CachePlan(blocks=CacheRatioPlan(kv_host=9, act_host=9)),
    "keys and values on the device only, in blocks": CachePlan(blocks=CacheRatioPlan(kv_gpu=1)),
    "half of everything placed": Placement(weights=0.5, cache=0.5, gpu_batches=2),
    "all on the device, placed": Placement(),
    "nothing on the device, placed": Placement(weights=0, cache=0),
    "a tenth of the cache on the host": Placement(cache=0.9),
    "half of everything placed, attention on the host": Placement(weights=0.5, cache=0.5, hidden=0.5, attention="host", gpu_batches=3),
    "FlexGen's 20/80/0/100/0/100": Placement(weights=0.2, cache=0, hidden=0, attention="host", gpu_batches=2),
    "hidden states on the host, attention on the device": Placement(cache=0.3, hidden=0.4, gpu_batches=2),
    "attention on the host, one GPU batch": Placement(cache=0.2, hidden=0, attention="host"),
}

LLMS = {"OPT": TINY_OPT, "Llama, GQA": TINY_LLAMA, "Qwen3": TINY_QWEN3, "one layer": alone(TINY_LLAMA), "OPT, one layer": alone(TINY_OPT)}
each_llm = pytest.mark.parametrize("llm", LLMS.values(), ids=LLMS)


@pytest.fixture(scope="module")
def runtimes():
    """A runtime of each LLM, and what full keys and values on the device give."""
    made = {}
    for llm in LLMS.values():
        runtime = Runtime(llm, link=FAST, seed=1)
        prompts = runtime.random_prompts(REQUESTS, PROMPT)
        made[llm.name] = (runtime, prompts, runtime.generate(prompts, GENERATED, logits=True, state=True))
    yield made
    for runtime, _, _ in made.values():
        runtime.close()


def assert_same(found: Generation, full: Generation) -> None:
    assert full.margin > 2 * ROUNDING, "the best two tokens are too close for this seed to prove anything"
    np.testing.assert_allclose(found.keys, full.keys, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found.values, full.values, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(found.logits, full.logits, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(found.tokens, full.tokens)


@each_llm
def test_tokens_vary(runtimes, llm):
    """A decoder that says one thing whatever it is asked proves nothing."""
    _, _, full = runtimes[llm.name]
    assert full.tokens.shape == (REQUESTS, GENERATED)
    assert len(np.unique(full.tokens)) > 10
    assert len(np.unique(full.tokens, axis=0)) == REQUESTS
    assert full.keys.shape == (llm.num_hidden_layers, PROMPT + GENERATED - 1, REQUESTS, llm.num_key_value_heads, llm.head_dim)
    assert len(full.step_seconds) == GENERATED - 1


@each_llm
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_plan_gives_the_same_tokens_keys_and_values(runtimes, llm, plan):
    runtime, prompts, full = runtimes[llm.name]
    assert_same(runtime.generate(prompts, GENERATED, plan, logits=True, state=True), full)


@settings(max_examples=25)
@given(data=st.data())
def test_any_split_and_any_blocks_give_the_same_tokens(runtimes, data):
    runtime, prompts, full = runtimes[data.draw(st.sampled_from(sorted(runtimes)))]
    counts = data.draw(st.lists(st.integers(0, 6), min_size=4, max_size=4).filter(any))
    split = SplitKV(
        split=data.draw(st.integers(0, PROMPT)),
        template=data.draw(st.sampled_from(["staged", "chunked", "fluid"])),
        chunks=data.draw(st.integers(1, 6)),
        weights=data.draw(st.sampled_from(["gpu", "host"])),
        gpu_batches=data.draw(st.sampled_from([1, 2, 3, 6])),
    )
    names = ("kv_gpu", "act_gpu", "kv_host", "act_host")
    blocks = CachePlan(
        blocks=CacheRatioPlan(**dict(zip(names, counts, strict=True))),
        mini_batches=data.draw(st.sampled_from([None, MINI])),
        block=data.draw(st.sampled_from([1, 5, 16])),
    )
    for plan in (split, blocks):
        assert_same(runtime.generate(prompts, GENERATED, plan, logits=True, state=True), full)


@pytest.mark.parametrize("generated", [1, 2])
def test_short_generations(runtimes, generated):
    """No decode step at all, and one."""
    runtime, prompts, full = runtimes[TINY_LLAMA.name]
    for plan in (None, SplitKV(split=9), CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_host=2)), Placement(cache=0.5)):
        found = runtime.generate(prompts, generated, plan, state=True)
        np.testing.assert_array_equal(found.tokens, full.tokens[:, :generated])
        assert len(found.step_seconds) == generated - 1
        assert (found.keys is None) == (generated == 1)


def test_prompts_of_one_token_and_one_request(runtimes):
    runtime, prompts, _ = runtimes[TINY_OPT.name]
    full = runtime.generate(prompts[:1, :1], 5)
    for plan in (SplitKV(split=1), CachePlan(blocks=CacheRatioPlan(act_host=1)), Placement(weights=0.3, cache=0.3)):
        np.testing.assert_array_equal(runtime.generate(prompts[:1, :1], 5, plan).tokens, full.tokens)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(runtimes):
    _, prompts, full = runtimes[TINY_OPT.name]
    for seed, same in ((1, True), (2, False)):
        with Runtime(TINY_OPT, seed=seed) as again:
            assert np.array_equal(again.generate(prompts, GENERATED).tokens, full.tokens) == same


# Controls: a runtime that recomputes wrongly is caught


def broken(monkeypatch, change):
    """``HostState.restore`` with ``change(state, unit, turn, weights)`` after it."""
    from memsplit.dse.runtime._states import HostState

    restore = HostState.restore

    def restore_wrongly(self, unit, turn, place, weights, inputs):
        restore(self, unit, turn, place, weights, inputs)
        change(self, unit, turn, weights)

    monkeypatch.setattr(HostState, "restore", restore_wrongly)


def late_positions(state, unit, turn, weights):
    slot, part = state.slots[turn % 2], slice(0, state.split)
    state.decoder.keys_values(weights, slot.inputs[part], slice(1, state.split + 1), slot.keys[part], slot.values[part])


def swapped_heads(state, unit, turn, weights):
    """The keys of each request, not its values, in another order of heads."""
    llm, keys = state.decoder.llm, state.slots[turn % 2].keys[: state.split]
    heads = keys.view(*keys.shape[:2], llm.num_key_value_heads, llm.head_dim)
    heads.copy_(heads.flip(2))


def another_request(state, unit, turn, weights):
    """What was recomputed for one request belongs to its neighbour."""
    slot = state.slots[turn % 2]
    for one in (slot.keys, slot.values):
        one[: state.split].copy_(one[: state.split].roll(1, 1))


@pytest.mark.parametrize("change", [late_positions, swapped_heads, another_request])
def test_a_wrong_position_head_or_token_changes_tokens(runtimes, monkeypatch, change):
    runtime, prompts, full = runtimes[TINY_LLAMA.name]
    broken(monkeypatch, change)
    found = runtime.generate(prompts, GENERATED, SplitKV(split=30), logits=True, state=True)
    # Logits of later steps follow from other tokens; the first ones differ by the mistake alone.
    assert np.abs(found.logits[:, 1] - full.logits[:, 1]).max() > 100 * ROUNDING
    assert not np.array_equal(found.tokens, full.tokens)
    with pytest.raises(AssertionError):
        assert_same(found, full)


def test_learned_positions_are_in_the_inputs_already(runtimes, monkeypatch):
    """The control of the control: OPT's keys do not depend on the position that is said."""
    runtime, prompts, full = runtimes[TINY_OPT.name]
    broken(monkeypatch, late_positions)
    assert_same(runtime.generate(prompts, GENERATED, SplitKV(split=30), logits=True, state=True), full)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_agree_to_their_rounding(dtype):
    """Logits about 1 from numbers of 11 or 8 bits, through some tens of roundings: 0.05 or 0.4 apart at the most."""
    allowed = {"float16": 0.05, "bfloat16": 0.4}[dtype]
    plans = (
        SplitKV(split=13),
        CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_gpu=1, kv_host=1, act_host=1)),
        Placement(cache=0.5, attention="host"),
    )
    with Runtime(TINY_LLAMA, dtype=dtype) as runtime:
        prompts = runtime.random_prompts(4, 20)
        full = runtime.generate(prompts, 3, logits=True)
        differences = []
        for plan in plans:
            found = runtime.generate(prompts, 3, plan, logits=True)
            agree = (found.tokens[:, :2] == full.tokens[:, :2]).all(axis=1)
            assert agree.any()
            differences.append(np.abs(found.logits[agree] - full.logits[agree]).max())
    assert max(differences) < allowed
    assert differences[-1] > 0, "attention in single precision is not attention in halves"


# What is moved and held is what the cost model says


@pytest.mark.parametrize("llm", [TINY_OPT, TINY_LLAMA], ids=["OPT", "Llama"])
@pytest.mark.parametrize("split", [0, 12, PROMPT])
def test_bytes_of_a_split_are_those_of_the_problem(runtimes, llm, split):
    """KVPR's problem of each step: bytes over the link, and bytes on the host at the last one."""
    runtime, prompts, _ = runtimes[llm.name]
    bits = {"weight_bits": 32, "kv_bits": 32, "activation_bits": 32}

    def cost(context: int):
        workload = Workload(llm=llm, batch=REQUESTS, context=context, **bits)
        problem = RecomputeSplitProblem.build(SYSTEMS["a100_pcie4"], workload)
        return problem.evaluate(RecomputeSplitPlan(splits=(split,)))

    found = runtime.generate(prompts, GENERATED, SplitKV(split=split))
    assert found.link_bytes == sum(cost(PROMPT + step).to_device_bytes for step in range(GENERATED - 1))
    assert found.peak_host_bytes == cost(PROMPT + GENERATED - 1).tier_bytes[1]


def test_streamed_weights_are_the_layers_own(runtimes):
    """Each step sends every layer once, for all GPU batches, with what aligns its tensors: less than 64 elements each."""
    runtime, prompts, _ = runtimes[TINY_OPT.name]
    found = runtime.generate(prompts, GENERATED, FullKV(weights="host", gpu_batches=3))
    d, ff, layers = TINY_OPT.hidden_size, TINY_OPT.intermediate_size, TINY_OPT.num_hidden_layers
    elements = 4 * d * d + 2 * d * ff + 9 * d + ff
    assert layers * elements * 4 <= found.link_bytes / (GENERATED - 1) < layers * (elements + 16 * 64) * 4


def test_blocks_cross_the_link_in_the_form_they_are_held(runtimes):
    """Keys and values of an OPT are twice its inputs; blocks on the device do not move."""
    runtime, prompts, _ = runtimes[TINY_OPT.name]
    moved = [
        runtime.generate(prompts, GENERATED, CachePlan(blocks=CacheRatioPlan(**{form: 18}), weights="gpu")).link_bytes
        for form in ("kv_gpu", "act_gpu", "kv_host", "act_host")
    ]
    tokens = REQUESTS * sum(range(PROMPT, PROMPT + GENERATED - 1))
    act = tokens * TINY_OPT.num_hidden_layers * TINY_OPT.hidden_size * 4
    assert moved == [0, 0, 2 * act, act]


def test_placed_shares_are_held_where_they_should_be(runtimes):
    """More on the device is less over the link, to nothing."""
    runtime, prompts, _ = runtimes[TINY_OPT.name]
    runs = [runtime.generate(prompts, GENERATED, Placement(weights=share, cache=share)) for share in (0, 0.5, 1)]
    assert runs[0].link_bytes > runs[1].link_bytes > runs[2].link_bytes == 0
    assert runs[0].peak_host_bytes > runs[1].peak_host_bytes > runs[2].peak_host_bytes == 0


def test_layers_are_measured_wherever_weights_are(runtimes):
    """All parts take time; what is measured is left out of no prediction."""
    runtime, prompts, full = runtimes[TINY_LLAMA.name]
    for weights in ("host", "gpu"):
        times = runtime.layer_times(REQUESTS, 30, gpu_batches=2, weights=weights, repeats=2)
        measured = ("kv", "act", "recompute", "compute", "weights", "first", "outside", "assemble")
        assert all(0 < getattr(times, name) < 10 for name in measured)
        assert (times.layers, times.context, times.gpu_batches) == (TINY_LLAMA.num_hidden_layers, 30, 2)
        np.testing.assert_array_equal(runtime.generate(prompts, GENERATED).tokens, full.tokens)


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("llm", [TINY_OPT, TINY_LLAMA], ids=["OPT", "Llama"])
def test_every_plan_gives_the_same_tokens_on_cuda(llm, plan):
    with Runtime(llm, device="cuda", seed=1) as runtime:
        prompts = runtime.random_prompts(REQUESTS, PROMPT)
        full = runtime.generate(prompts, GENERATED, logits=True, state=True)
        found = runtime.generate(prompts, GENERATED, plan, logits=True, state=True)
        assert_same(found, full)
        assert all(seconds > 0 for seconds in found.step_seconds)
        assert found.peak_device_bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_halves_agree_to_their_rounding_on_cuda(plan):
    """As on a CPU; requests whose tokens are the same so far."""
    with Runtime(TINY_LLAMA, device="cuda", dtype="float16", seed=1) as runtime:
        prompts = runtime.random_prompts(REQUESTS, PROMPT)
        full = runtime.generate(prompts, 3, logits=True)
        found = runtime.generate(prompts, 3, plan, logits=True)
    agree = (found.tokens[:, :2] == full.tokens[:, :2]).all(axis=1)
    assert agree.any()
    assert np.abs(found.logits[agree] - full.logits[agree]).max() < 0.05
