"""Schedule templates: bounds that no schedule can beat, replays event by event, and closed forms against grids."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.models.overlap import (
    best_chunked_share,
    best_fluid_share,
    best_staged_share,
    chunked,
    chunked_lines,
    flexgen_sync,
    fluid,
    fluid_lines,
    staged,
)

ROUNDING = 1e-12
"""Relative: sums of a dozen terms, in another order, each off by 1.1e-16 at most."""

seconds = st.floats(0.0, 10.0).map(lambda value: round(value, 3))
shares = st.floats(0.0, 1.0)


@st.composite
def layers(draw: st.DrawFn, first: bool = True) -> dict[str, float]:
    """Arguments of a template; ``first`` is at most the weights."""
    drawn = {name: draw(seconds) for name in ("kv", "act", "recompute", "weights", "compute")}
    drawn["batches"] = draw(st.integers(1, 4))
    if first and draw(st.booleans()):
        drawn["first"] = drawn["weights"] * draw(shares)
    return drawn


def without_first(layer: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in layer.items() if name != "first"}


def replay(share: float, chunks: int, layer: dict[str, float]) -> float:
    """Event by event: the link sends what comes next without a pause, the GPU recomputes a chunk once it and the weights for it are
    there; the next GPU batch begins when both are done. Beside that the GPU computes, so that its work is a bound of its own."""
    weights, first = layer["weights"], layer.get("first", layer["weights"])
    now = 0.0
    for batch in range(int(layer["batches"])):
        link = now + (first if batch == 0 else 0.0)
        gpu = link
        for _ in range(chunks):
            link += layer["act"] * share / chunks
            gpu = max(gpu, link) + layer["recompute"] * share / chunks
        link += weights - first if batch == 0 else 0.0
        link += layer["kv"] * (1 - share)
        now = max(link, gpu)
    return max(now, layer["batches"] * (layer["compute"] + layer["recompute"] * share))


@given(layers(), shares, st.integers(1, 6))
def test_chunked_is_what_a_replay_of_its_events_takes(layer, share, chunks):
    assert float(chunked(share, chunks=chunks, **layer)) == pytest.approx(replay(share, chunks, layer), rel=ROUNDING, abs=1e-300)


@given(layers(), shares, st.integers(1, 6))
def test_no_template_is_shorter_than_the_work_of_link_or_gpu(layer, share, chunks):
    """One byte at a time, one thing at a time."""
    link = layer["weights"] + layer["batches"] * (layer["act"] * share + layer["kv"] * (1 - share))
    gpu = layer["batches"] * (layer["compute"] + layer["recompute"] * share)
    plain = without_first(layer)
    for time in (staged(share, **layer), chunked(share, chunks=chunks, **layer), fluid(share, **plain)):
        assert time >= max(link, gpu) * (1 - ROUNDING)


@given(layers(), shares, st.integers(1, 6))
def test_templates_are_ordered(layer, share, chunks):
    """One chunk is KVPR; twice as many never cost time; none is faster than infinitely many; and weights in order of need never hurt."""
    plain = without_first(layer)
    coarse, fine = (float(chunked(share, chunks=n, **layer)) for n in (chunks, 2 * chunks))
    assert float(staged(share, **layer)) == float(chunked(share, chunks=1, **layer))
    assert float(fluid(share, **plain)) * (1 - ROUNDING) <= fine <= coarse * (1 + ROUNDING)
    assert float(chunked(share, chunks=chunks, **layer)) <= float(chunked(share, chunks=chunks, **plain)) * (1 + ROUNDING)


@given(layers(first=False), shares)
def test_many_chunks_come_close_to_a_barrier_for_each_batch_without_delay(layer, share):
    """A chunk's transfer and recomputation are what is left of the delay, once for each batch."""
    n = 10_000
    a, batches = share, layer["batches"]
    no_delay = max(layer["act"] * a + layer["kv"] * (1 - a), layer["recompute"] * a)
    limit = max(layer["weights"] + batches * no_delay, batches * (layer["compute"] + layer["recompute"] * a))
    most = batches * (layer["act"] + layer["recompute"]) * a / n
    assert limit * (1 - ROUNDING) <= float(chunked(a, chunks=n, **layer)) <= (limit + most) * (1 + ROUNDING)
    if layer["recompute"] * a <= layer["act"] * a + layer["kv"] * (1 - a):
        assert float(chunked(a, chunks=n, **layer)) <= (float(fluid(a, **layer)) + most) * (1 + ROUNDING)


@given(layers(), st.integers(1, 5), st.sampled_from([1.0, 0.5, 0.03, 0.0]))
def test_best_shares_are_no_worse_than_a_grid_and_the_smallest(layer, chunks, most):
    """Piecewise linear: a grid cannot beat the best breakpoint, and no smaller share that is clearly apart is as good."""
    plain = without_first(layer)
    grid = np.linspace(0, most, 501)
    for best, time in (
        (best_staged_share(most=most, **layer), lambda a: staged(a, **layer)),
        (best_chunked_share(chunks=chunks, most=most, **layer), lambda a: chunked(a, chunks=chunks, **layer)),
        (best_fluid_share(most=most, **plain), lambda a: fluid(a, **plain)),
    ):
        assert 0 <= best <= most
        assert time(best) <= time(grid).min() * (1 + ROUNDING) + 1e-300
        smaller = grid[grid < best - 1e-9]
        assert np.all(time(smaller) >= time(best))


@given(layers(), st.integers(1, 5), shares)
def test_lines_are_the_templates(layer, chunks, share):
    """The maximum of the lines is the time: two ways to write the same schedule."""
    plain = without_first(layer)
    for lines, time in (
        (chunked_lines(chunks=chunks, **layer), chunked(share, chunks=chunks, **layer)),
        (fluid_lines(**plain), fluid(share, **plain)),
    ):
        constants, slopes = lines
        # A falling line subtracts: the rounding is that of its constant, or of the least numbers there are.
        apart = ROUNDING * float(constants.max()) + 1e-300
        assert float((constants + slopes * share).max()) == pytest.approx(float(time), rel=ROUNDING, abs=apart)


@given(layers(), shares, st.sampled_from(["kv", "act", "recompute", "weights", "compute"]), st.floats(1.0, 3.0))
def test_slower_parts_never_help(layer, share, part, factor):
    slower = {**layer, part: layer[part] * factor}
    plain, plain_slower = without_first(layer), without_first(slower)
    assert staged(share, **slower) >= staged(share, **layer) * (1 - ROUNDING)
    assert chunked(share, chunks=3, **slower) >= chunked(share, chunks=3, **layer) * (1 - ROUNDING)
    assert fluid(share, **plain_slower) >= fluid(share, **plain) * (1 - ROUNDING)


@pytest.mark.parametrize(("r", "rho"), list(itertools.product([0.1, 0.5, 0.9], [0.1, 0.4, 2.0])))
def test_kvpr_balances_recomputation_and_the_rest_of_the_transfer(r, rho):
    """1 / (1 + rho) wherever activations are smaller: the cut is (1 - r) / (1 + rho)."""
    best = best_staged_share(kv=2.0, act=2.0 * r, recompute=2.0 * rho)
    assert float(best) == pytest.approx(1 / (1 + rho), rel=ROUNDING)
    assert float(staged(best, kv=2.0, act=2.0 * r, recompute=2.0 * rho)) == pytest.approx(2 * (1 - (1 - r) / (1 + rho)), rel=ROUNDING)


@pytest.mark.parametrize(("r", "rho", "n"), [(0.5, 1.0, 4), (0.9, 2.0, 8), (0.3, 1.5, 4), (0.5, 0.7, 1)])
def test_chunks_balance_later_where_recomputing_is_slower_than_sending(r, rho, n):
    """The GPU is behind from the first chunk on: r a / n + rho a = r a + 1 - a, beyond 1 all is recomputed."""
    expected = min(1, 1 / (1 - r + rho + r / n))
    assert float(best_chunked_share(chunks=n, kv=1, act=r, recompute=rho)) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(("r", "rho", "n"), [(0.5, 0.4, 1), (0.5, 0.4, 2), (0.9, 0.1, 8), (0.5, 0.5, 4)])
def test_chunks_balance_later_still_where_recomputing_is_faster_than_sending(r, rho, n):
    """Only the last chunk is recomputed beside keys and values: rho a / n = 1 - a."""
    assert float(best_chunked_share(chunks=n, kv=1, act=r, recompute=rho)) == pytest.approx(1 / (1 + rho / n), rel=ROUNDING)


@pytest.mark.parametrize(("r", "rho", "w", "c"), [(0.5, 0.4, 0.0, 0.2), (0.5, 2.0, 0.3, 0.1), (0.25, 1.0, 0.0, 0.9), (0.5, 0.1, 1.0, 0.0)])
def test_fluid_balances_link_and_gpu(r, rho, w, c):
    expected = min(1, (w + 1 - c) / (1 - r + rho))
    assert float(best_fluid_share(kv=1, act=r, recompute=rho, weights=w, compute=c)) == pytest.approx(expected, rel=ROUNDING)


def test_activations_that_are_no_smaller_are_not_sent():
    """r = 1 and above; at r = 1 and recomputation for nothing all shares tie, and the smallest is taken."""
    for r, rho in ((1.0, 0.0), (1.0, 0.5), (4.0, 0.0)):
        assert float(best_staged_share(kv=1, act=r, recompute=rho)) == 0.0
        assert float(best_chunked_share(chunks=4, kv=1, act=r, recompute=rho)) == 0.0
        assert float(best_fluid_share(kv=1, act=r, recompute=rho)) == 0.0


def test_projections_first_matter_for_one_batch_and_not_for_many():
    """One batch: recomputation hides behind the other weights, so all is recomputed. Eight: the best share is that without weights,
    as each later batch loses more beyond the balance than the first one gains; the time is the same as with all weights first."""
    layer = {"kv": 1.0, "act": 0.5, "recompute": 0.5, "weights": 2.0}
    assert float(best_staged_share(**layer, first=0.2)) == 1.0
    assert float(best_staged_share(**layer)) == pytest.approx(1 / 1.5, rel=ROUNDING)
    many = best_staged_share(**layer, first=0.2, batches=8)
    assert float(many) == pytest.approx(1 / 1.5, rel=ROUNDING)
    assert float(staged(many, **layer, first=0.2, batches=8)) == pytest.approx(float(staged(many, **layer, batches=8)), rel=ROUNDING)


@settings(max_examples=25)
@given(st.lists(layers(first=False), min_size=2, max_size=5), st.booleans())
def test_arrays_give_what_their_elements_give(many, limited):
    """Bit for bit, also where only ``most`` is an array."""
    stacked = {name: np.array([layer[name] for layer in many]) for name in many[0]}
    most = np.linspace(0.2, 1, len(many)) if limited else np.ones(len(many))
    together = best_chunked_share(chunks=3, most=most, **stacked)
    assert together.tolist() == [float(best_chunked_share(chunks=3, most=limit, **layer)) for limit, layer in zip(most, many, strict=True)]
    limits = np.array([[0.1, 0.5], [0.7, 1.0]])
    assert best_staged_share(most=limits, **many[0]).tolist() == [
        [float(best_staged_share(most=limit, **many[0])) for limit in row] for row in limits
    ]


def test_flexgen_waits_for_the_load_and_then_for_the_slowest():
    """The load of the GPU is not hidden; a slower part counts only if it is the slowest."""
    assert float(flexgen_sync(to_gpu=1, from_gpu=2, from_disk=3, to_disk=4, compute=5)) == 6.0
    times = flexgen_sync(to_gpu=[1, 2], from_gpu=7, from_disk=0, to_disk=0, compute=[5, 9])
    assert times.tolist() == [8.0, 11.0]
