"""The emulated link: bytes arrive whole, in order, after what they wait for, and never faster than stated."""

import math
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_llms import TINY_LLAMA, TINY_OPT

from memsplit.dse.runtime import CachePlan, EmulatedLink, Placement, Runtime, SplitKV, TransferKV
from memsplit.models import CacheRatioPlan, MiniBatchPlan

torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")

from memsplit.dse.runtime._link import Arena, EmulatedTransfers, blocks_of  # noqa: E402

MB = 10**6


@pytest.fixture
def link():
    made = EmulatedTransfers(100 * MB)
    yield made
    made.close()


def test_bytes_arrive_whole_whatever_their_type(link):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        source = torch.randn(700, 1001).to(dtype)
        target = torch.zeros_like(source)
        link.wait(link.send("to_device", [(target[:300], source[:300]), (target[300:], source[300:])]))
        assert torch.equal(target, source)


def test_no_transfer_is_faster_than_stated(link):
    """4 MB at 100 MB/s take 40 ms at least, in one or in many transfers: a bound from below, which no load of the machine can break."""
    source, target = torch.ones(10**6), torch.zeros(10**6)
    begin = link.clock()
    link.wait(link.send("to_device", [(target, source)]))
    middle = link.clock()
    tickets = [link.send("to_device", [(target[at : at + 10**5], source[at : at + 10**5])]) for at in range(0, 10**6, 10**5)]
    link.wait(tickets[-1])
    assert all(seconds >= 0.04 for seconds in link.elapsed([begin, middle, link.clock()]))
    assert 0 < link.rate("to_device") <= 100 * MB
    assert link.sent("to_device") == 8 * MB
    assert link.rate("to_host") is None


def test_a_late_wake_up_does_not_add_up(link):
    """Transfers that are queued end at multiples of their time by the link's own count, however late each sleep was."""
    source, target = torch.ones(25_000), torch.zeros(25_000)
    tickets = [link.send("to_host", [(target, source)]) for _ in range(20)]
    link.wait(tickets[-1])
    ends = [ticket.finished for ticket in tickets]
    np.testing.assert_allclose(np.diff(ends), 0.001, rtol=1e-6)


def test_a_transfer_waits_for_those_of_the_other_direction(link):
    """What is stored is what is loaded next; without ``after`` the small load would be first."""
    near, far, back = torch.arange(10**6, dtype=torch.float32), torch.zeros(10**6), torch.zeros(10**6)
    stored = link.send("to_host", [(far, near)])
    link.wait(link.send("to_device", [(back[-10:], far[-10:])], [stored, None]))
    assert torch.equal(back[-10:], near[-10:])


def test_both_directions_run_beside_each_other_and_the_caller(link):
    """Neither waits for the other or is waited for: when both are queued, none is done."""
    source, ones, others = torch.ones(10**6), torch.zeros(10**6), torch.zeros(10**6)
    tickets = [link.send("to_device", [(ones, source)]), link.send("to_host", [(others, source)])]
    assert not any(ticket.done.is_set() for ticket in tickets)
    for ticket in tickets:
        link.wait(ticket)
    # Beside each other: their times by the link's own count overlap; one after the other they would be 40 ms apart.
    assert abs(tickets[0].finished - tickets[1].finished) < 0.04


def test_a_failed_copy_is_told_to_whoever_waits(link):
    source = torch.ones(10)
    with pytest.raises(RuntimeError, match="a transfer over the emulated link failed"):
        link.wait(link.send("to_device", [(torch.zeros(9), source)]))


def test_memory_with_gaps_is_refused(link):
    with pytest.raises(ValueError, match="contiguous"):
        link.send("to_device", [(torch.zeros(4, 4)[:, :2], torch.ones(4, 2))])


def test_closing_ends_the_threads():
    before = threading.active_count()
    with Runtime(TINY_OPT, link=EmulatedLink(bandwidth=MB)):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), "fast"])
def test_a_bandwidth_is_above_zero(bandwidth):
    with pytest.raises(ValueError, match="bandwidth"):
        EmulatedLink(bandwidth=bandwidth)


@pytest.mark.parametrize("expected", [0, 10**3, 10**6, 10**9])
def test_tensors_cut_from_blocks_do_not_overlap(expected):
    """Each keeps what is written to it, whatever is cut after it and whatever was expected; after a restart the blocks are used again."""
    made = []

    def make(nbytes):
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    arena = Arena(make, min(expected, 10**7))
    shapes = [(3, 5), (0, 4), (1000, 7), (2, 3, 4), (64,), (30_000,), (1,)] * 4
    for _ in range(2):
        held = []
        for number, shape in enumerate(shapes):
            one = arena.take(shape, (torch.float32, torch.float16)[number % 2])
            assert one.shape == shape
            assert one.data_ptr() % 4 == 0
            held.append(one.fill_(number))
        assert all((one == number).all() for number, one in enumerate(held))
        assert all(nbytes & (nbytes - 1) == 0 for nbytes in made)
        blocks = list(made)
        tensors = [math.prod(shape) * (4, 2)[number % 2] for number, shape in enumerate(shapes)]
        assert not arena.restart(tensors, arena.held)
    assert blocks == made
    # Others, for which new blocks would be needed beside these.
    larger = [2 * arena.held]
    assert not arena.restart(larger, 4 * arena.held)
    assert arena.held == sum(made)
    assert arena.restart(larger, blocks_of(larger).held)
    assert arena.held == 0


@given(count=st.integers(1, 200), size=st.integers(1, 10**10))
def test_blocks_waste_little(count, size):
    """Tensors of one size, as those of all layers are: less than a tensor for each block, and the last block's power of two."""
    whole = count * size
    held = blocks_of([size] * count).held
    padding = 512 * count
    blocks = max(whole // size, 1).bit_length() + 1
    assert whole <= held <= whole + padding + (blocks + 2) * max(size, 512)


def test_kvpr_state_of_opt_wastes_little():
    """32 layers, 64 requests at 4,102 tokens in half precision: blocks of 4 GiB would waste half of 138 GB."""
    each = 4102 * 64 * 4096 * 2
    assert blocks_of([each] * 64).held < 1.05 * 64 * each


def test_a_slow_link_is_closed_at_once():
    """A transfer that would take hours is given up, and nothing of it is left behind."""
    before = threading.active_count()
    link = EmulatedTransfers(1.0)
    tickets = [link.send("to_device", [(torch.zeros(10**4), torch.ones(10**4))]) for _ in range(3)]
    link.close()
    assert threading.active_count() == before
    assert all(ticket.done.is_set() for ticket in tickets)


def test_a_link_begins_again_after_a_run_that_ended_early():
    link = EmulatedTransfers(10.0 * MB)
    target = torch.zeros(100 * MB // 4)
    link.send("to_device", [(target, torch.ones(100 * MB // 4))])
    link.restart()
    small = torch.zeros(4)
    link.wait(link.send("to_device", [(small, torch.ones(4))]))
    assert (link.sent("to_device"), small.sum()) == (16, 4)
    with pytest.raises(RuntimeError, match="failed"):
        link.wait(link.send("to_device", [(torch.zeros(3), torch.ones(4))]))
    link.restart()
    link.wait(link.send("to_device", [(small, torch.zeros(4))]))
    assert small.sum() == 0
    link.close()


MINI = MiniBatchPlan(batches=((1, 3), (0,), (2,)))


@pytest.mark.parametrize(
    "plan",
    [
        SplitKV(split=1),
        Placement(cache=0.5),
        CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_host=1), block=1, weights="gpu"),
        CachePlan(blocks=CacheRatioPlan(act_gpu=1, kv_host=1), block=2, weights="gpu"),
    ],
    ids=str,
)
def test_a_slot_is_not_used_again_before_its_token_has_left(plan):
    """Units that load nothing wait for nothing that arrives: only for the token that the slot still holds, 5 ms on its way."""
    with Runtime(TINY_OPT) as fast, Runtime(TINY_OPT, link=EmulatedLink(bandwidth=0.4 * MB)) as slow:
        prompts = fast.random_prompts(4, 1)
        full = fast.generate(prompts, 4, state=True)
        found = slow.generate(prompts, 4, plan, state=True)
    np.testing.assert_array_equal(found.tokens, full.tokens)
    # Rounding, as in test_runtime.py.
    np.testing.assert_allclose(found.keys, full.keys, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.values, full.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("llm", [TINY_OPT, TINY_LLAMA], ids=["OPT", "Llama"])
@pytest.mark.parametrize(
    "plan",
    [
        TransferKV(weights="host"),
        SplitKV(split=15),
        SplitKV(split=20, weights="host"),
        SplitKV(split=15, template="chunked", chunks=3, weights="host", gpu_batches=2),
        SplitKV(split=15, template="fluid", chunks=3, gpu_batches=2),
        CachePlan(blocks=CacheRatioPlan(kv_gpu=1, act_gpu=1, kv_host=3, act_host=3), mini_batches=MINI),
        Placement(weights=0.5, cache=0.3),
        Placement(weights=0.5, cache=0.3, hidden=0, attention="host", gpu_batches=2),
    ],
    ids=str,
)
def test_a_link_far_slower_than_the_computation_changes_no_token(llm, plan):
    """Every wait that were missing would read what has not arrived, or overwrite what has not left."""
    with Runtime(llm) as fast, Runtime(llm, link=EmulatedLink(bandwidth=15 * MB)) as slow:
        prompts = fast.random_prompts(4, 20)
        full = fast.generate(prompts, 4, logits=True, state=True)
        found = slow.generate(prompts, 4, plan, logits=True, state=True)
    np.testing.assert_array_equal(found.tokens, full.tokens)
    # Rounding, as in test_runtime.py.
    np.testing.assert_allclose(found.keys, full.keys, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.values, full.values, rtol=0, atol=1e-4)
    assert sum(found.step_seconds) >= found.link_bytes / (15 * MB)
    assert found.link_rate <= 15 * MB


@pytest.mark.parametrize("seed", range(4))
def test_random_delays_change_no_key_or_value(monkeypatch, seed):
    """Short generations, in which slots are used again soonest, by any plan, while either direction is late by up to 5 ms a transfer."""
    from memsplit.dse.runtime._link import _Lane

    chance, late, copy = random.Random(seed), {}, _Lane._copy

    def copy_late(self, pairs, begin):
        time.sleep(chance.random() * late.get(self, 0.0))
        return copy(self, pairs, begin)

    monkeypatch.setattr(_Lane, "_copy", copy_late)
    with Runtime((TINY_OPT, TINY_LLAMA)[seed % 2]) as runtime:
        lanes = runtime._link._lanes
        for _ in range(20):
            prompts = runtime.random_prompts(chance.choice([2, 4]), chance.choice([1, 2, 17]))
            late.clear()
            full = runtime.generate(prompts, 3, state=True)
            late[lanes[chance.choice(["to_device", "to_host"])]] = 0.005
            found = runtime.generate(prompts, 3, any_plan(chance, *prompts.shape), state=True)
            # Rounding, as in test_runtime.py.
            np.testing.assert_allclose(found.keys, full.keys, rtol=0, atol=1e-4)
            np.testing.assert_allclose(found.values, full.values, rtol=0, atol=1e-4)


def any_plan(chance, requests, tokens):
    """A plan of any kind with settings of any kind for so many requests and tokens."""
    common = {"weights": chance.choice(["gpu", "host"]), "gpu_batches": chance.choice([1, 2])}
    split = {"split": chance.randint(0, tokens), "template": chance.choice(["staged", "chunked", "fluid"]), "chunks": chance.randint(1, 3)}
    counts = [chance.choice([0, 0, 1, 2]) for _ in range(3)]
    blocks = CacheRatioPlan(kv_gpu=counts[0], act_gpu=counts[1], kv_host=counts[2], act_host=1)
    order = chance.sample(range(requests), requests)
    groups = chance.choice([(order[:1], order[1:]), tuple([one] for one in order)])
    return chance.choice(
        [
            TransferKV(**common),
            SplitKV(**split, **common),
            CachePlan(blocks=blocks, block=chance.choice([1, 2, 16]), mini_batches=MiniBatchPlan(batches=groups)),
            Placement(
                weights=chance.choice([0, 0.4, 1]),
                cache=chance.choice([0, 0.2, 0.5, 0.8]),
                hidden=chance.choice([0, 0.5, 1]),
                attention=chance.choice(["gpu", "host"]),
                gpu_batches=common["gpu_batches"],
            ),
        ]
    )
