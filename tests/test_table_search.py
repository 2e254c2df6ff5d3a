"""The table search, in NumPy and compiled: exact on any table, with one rule for ties, the same bits one by one and in batches."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse import from_json, to_json
from memsplit.models import KernelMappingTables, Kind, Profile, Workload
from memsplit.models.presets import GPT3_175B, H2M2_SYSTEM, LLAMA2_70B
from memsplit.models.systems import Systems
from memsplit.solvers import TableMapping, _table_search

NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
WAYS = [
    pytest.param(TableMapping(compiled=False), id="numpy"),
    pytest.param(TableMapping(compiled=True), id="compiled", marks=needs_numba),
]
each_way = pytest.mark.parametrize("solver", WAYS)
STYLES = ("linear", "ties", "any", "gaps", "convex", "flat")


def random_tables(seed: int, *, designs: int = 3, kinds: int | None = None, most: int = 6, same_pages: bool = False) -> KernelMappingTables:
    """Tables of kinds of unlike slices: linear or convex seconds, small whole ones with ties, any, with splits that cannot be, or all 0.

    Pages grow by any steps, also by none; capacities range from too little to more than enough; there may be a shared lane and barriers.
    """
    rng = np.random.default_rng(seed)
    number = int(rng.integers(1, 5)) if kinds is None else kinds
    slices = rng.integers(1, (most if number < 4 else min(most, 4)) + 1, number)
    style = STYLES[seed % len(STYLES)]
    shape = (designs, number, 2, int(slices.max()) + 1)
    n = np.arange(shape[-1])
    side = rng.uniform(0.5, 2, (*shape[:3], 1)) * n
    if style in ("ties", "flat"):
        side = rng.integers(0, 4, shape).astype(float) if style == "ties" else np.zeros(shape)
    elif style in ("any", "gaps"):
        side = rng.uniform(0, 3, shape)
    elif style == "convex":
        side = side**1.5
    pages = np.cumsum(rng.integers(0, 4, (1 if same_pages else designs, *shape[1:])), axis=-1)
    if seed // len(STYLES) % 2:  # sums that are equal in many ways
        pages = np.broadcast_to(n * rng.integers(1, 4, (number, 1, 1)), pages.shape).copy()
    beyond = n > slices[:, None, None]
    side = np.where(beyond, np.inf, side)
    if style == "gaps":
        side = np.where(rng.random(shape) < 0.2, np.inf, side)
    pages = np.where(beyond, np.take_along_axis(pages, np.broadcast_to(slices[:, None, None], (*pages.shape[:3], 1)), -1), pages)
    lane = rng.uniform(0, 2, (designs, number, int(rng.integers(0, 2)), 2, 1))
    need = int(sum(pages[:, k, :, s].max() for k, s in enumerate(slices))) * 2
    return KernelMappingTables(
        kinds=tuple(Kind(name=f"kind{k}", layers=int(rng.integers(1, 4)), slices=int(s)) for k, s in enumerate(slices)),
        tier_names=("near", "far"),
        seconds=side,
        shared=(np.floor(lane) if style in ("ties", "flat") else lane) * n,
        pages=np.broadcast_to(pages, shape),
        traffic=np.zeros(shape),
        t_sync=float(rng.choice([0.0, 1.0])),
        capacity=rng.integers(0, need + 1, (designs, 2)),
        page=np.ones((designs, 2), dtype=np.int64),
    )


def first_best(tables: KernelMappingTables, design: int) -> tuple[float, list[int]]:
    """The least seconds of all splits that fit, added in the order of kinds, and the first split that takes them."""
    seconds, pages = tables.two_way()
    slices = [kind.slices for kind in tables.kinds]
    last = max(range(len(slices)), key=lambda k: (slices[k], k))
    order = [k for k in range(len(slices)) if k != last] + [last]
    best, chosen = np.inf, [-1] * len(slices)
    for ordered in itertools.product(*(range(slices[k] + 1) for k in order)):
        plan = dict(zip(order, ordered, strict=True))
        total, held = 0.0, np.zeros(2, dtype=np.int64)
        for k, kind in enumerate(tables.kinds):
            total += kind.layers * seconds[design, k, plan[k]]
            held += kind.layers * pages[design, k, plan[k]]
        if total < best and np.all(held <= tables.capacity[design]):
            best, chosen = total, [plan[k] for k in range(len(slices))]
    return float(best), chosen


def part(tables: KernelMappingTables, design: int) -> KernelMappingTables:
    """The tables of one design."""
    some = slice(design, design + 1)
    arrays = {name: getattr(tables, name)[some] for name in ("seconds", "shared", "pages", "traffic", "capacity", "page")}
    return KernelMappingTables(kinds=tables.kinds, tier_names=tables.tier_names, t_sync=tables.t_sync, **arrays)


def check(solver: TableMapping, tables: KernelMappingTables) -> None:
    """Seconds and slices are those of plain enumeration, to the last bit, in a batch and alone."""
    seconds, counts = solver.solve_batch(tables)
    for d in range(len(seconds)):
        best, chosen = first_best(tables, d)
        assert (seconds[d], counts[d, :, 0].tolist()) == (best, chosen)
        if best < np.inf:
            assert counts[d].sum(axis=1).tolist() == [kind.slices for kind in tables.kinds]
        else:
            assert (counts[d] == -1).all()
        alone = solver.solve_batch(part(tables, d))
        assert alone[0][0] == seconds[d]
        assert (alone[1][0] == counts[d]).all()


@each_way
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), same=st.booleans())
def test_is_plain_enumeration_on_any_table(solver, seed, same):
    check(solver, random_tables(seed, same_pages=same))


@each_way
@pytest.mark.parametrize("style", range(len(STYLES)))
def test_is_plain_enumeration_with_more_slices(solver, style):
    """20 slices of three kinds or fewer, where bounds rule out most choices."""
    check(solver, random_tables(style, designs=4, kinds=2, most=20, same_pages=True))
    check(solver, random_tables(len(STYLES) + style, designs=2, kinds=3, most=12))


def test_the_random_tables_hold_what_they_are_for():
    """Some fit and some do not, some plans tie with others, and seconds are infinite for some splits: else the law would show little."""
    fits, tied, infinite = [], 0, 0
    for seed in range(60):
        tables = random_tables(seed, kinds=2)
        seconds, pages = tables.two_way()
        layers = np.array([kind.layers for kind in tables.kinds])
        total = layers[0] * seconds[:, 0, :, None] + layers[1] * seconds[:, 1, None, :]
        held = layers[0] * pages[:, 0, :, None] + layers[1] * pages[:, 1, None, :]
        infinite += int(np.isinf(seconds[:, 0, : tables.kinds[0].slices + 1]).any())
        for d in range(len(total)):
            best = first_best(tables, d)[0]
            fits.append(best < np.inf)
            tied += int((total[d][np.all(held[d] <= tables.capacity[d], axis=-1)] == best).sum() > 1 and best < np.inf)
    assert 20 < sum(fits) < len(fits) - 20
    assert tied >= 10
    assert infinite > 5


def designs_of(system, number: int, seed: int) -> Systems:
    rng = np.random.default_rng(seed)
    return Systems.from_columns(
        system,
        {
            "HBM_capacity_GB": rng.uniform(0, 200, number),
            "HBM_bandwidth_TBps": rng.uniform(1, 8, number),
            "LPDDR_capacity_GB": rng.uniform(50, 500, number),
            "LPDDR_bandwidth_GBps": rng.uniform(100, 1000, number),
        },
    )


@needs_numba
@pytest.mark.parametrize("page", [1, 2**21])
@pytest.mark.parametrize("t_sync", [0.0, 1e-4])
def test_compiled_and_numpy_give_the_same_bits_on_a_published_machine(page, t_sync):
    """GPT3-175B on H2M2's machine, 97^3 mappings of 200 designs: some do not fit, some are bound by either memory or by none."""
    systems = designs_of(H2M2_SYSTEM.with_page(page), 200, seed=page)
    tables = KernelMappingTables.build(
        systems, Workload(llm=GPT3_175B, batch=32, context=1024), profile=Profile(name="test", t_sync=t_sync)
    )
    plain, compiled = (TableMapping(compiled=way).solve_batch(tables) for way in (False, True))
    assert (plain[0] == compiled[0]).all()
    assert (plain[1] == compiled[1]).all()
    assert 20 < np.isfinite(plain[0]).sum() < 200


@each_way
def test_is_the_least_of_all_mappings_of_a_large_llm(solver):
    """Llama2-70B: 9 x 9 x 65 mappings of each of 30 designs, priced all at once."""
    tables = KernelMappingTables.build(
        designs_of(H2M2_SYSTEM, 30, seed=5), Workload(llm=LLAMA2_70B, batch=128, context=4096), profile=Profile(name="test")
    )
    seconds, pages = tables.two_way()
    layers = [kind.layers for kind in tables.kinds]
    assert [kind.slices for kind in tables.kinds] == [8, 8, 64]
    a, b, c = (layers[k] * seconds[:, k, : tables.kinds[k].slices + 1] for k in range(3))
    total = (a[:, :, None, None] + b[:, None, :, None]) + c[:, None, None, :]
    a, b, c = (layers[k] * pages[:, k, : tables.kinds[k].slices + 1] for k in range(3))
    held = a[:, :, None, None] + b[:, None, :, None] + c[:, None, None, :]
    total = np.where(np.all(held <= tables.capacity[:, None, None, None], axis=-1), total, np.inf).reshape(30, -1)
    best, counts = solver.solve_batch(tables)
    assert (best == total.min(axis=1)).all()
    fits = np.isfinite(best)
    assert 0 < fits.sum() < 30
    first = np.stack(np.unravel_index(total.argmin(axis=1), (9, 9, 65)), axis=1)
    assert (counts[fits, :, 0] == first[fits]).all()


@each_way
def test_no_designs_have_no_plans(solver):
    tables = random_tables(4, designs=2)
    empty = {name: getattr(tables, name)[:0] for name in ("seconds", "shared", "pages", "traffic", "capacity", "page")}
    seconds, counts = solver.solve_batch(
        KernelMappingTables(kinds=tables.kinds, tier_names=tables.tier_names, t_sync=tables.t_sync, **empty)
    )
    assert seconds.shape == (0,)
    assert counts.shape == (0, len(tables.kinds), 2)


def test_pages_that_no_design_varies_are_stored_once_and_solved_alike():
    """Equal pages given design by design are the same problem."""
    systems = designs_of(H2M2_SYSTEM, 20, seed=2)
    tables = KernelMappingTables.build(systems, Workload(llm=LLAMA2_70B, batch=8, context=999), profile=Profile(name="test"))
    assert tables.same_pages
    arrays = {name: np.array(getattr(tables, name)) for name in ("seconds", "shared", "pages", "traffic", "capacity", "page")}
    stored = KernelMappingTables(kinds=tables.kinds, tier_names=tables.tier_names, t_sync=tables.t_sync, **arrays)
    assert not stored.same_pages
    first, second = (TableMapping().solve_batch(each) for each in (tables, stored))
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()


def test_without_numba_the_loop_can_be_left_out_but_not_be_forced(monkeypatch):
    monkeypatch.setattr(_table_search, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "memsplit.solvers._table_compiled", raising=False)
    tables = random_tables(1)
    with pytest.raises(ValueError, match=r"needs Numba.*pip install 'memsplit\[fast\]'") as refusal:
        TableMapping(compiled=True).solve_batch(tables)
    assert "\n" not in str(refusal.value)
    assert TableMapping().for_batch(10**6) == TableMapping(compiled=False)
    assert (TableMapping().solve_batch(tables)[0] == TableMapping(compiled=False).solve_batch(tables)[0]).all()


def test_one_problem_does_not_load_numba():
    """Loading it takes half a second, and compiling some seconds."""
    script = (
        "import sys; from memsplit.models import KernelMappingProblem; from memsplit.solvers import TableMapping;"
        "TableMapping().solve(KernelMappingProblem.from_slices([[1, 2]], [1], [9, 9], slices=3, grouped=True)).unwrap();"
        "print('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_setting_is_checked_and_kept_in_files():
    with pytest.raises(ValueError, match="compiled must be True, False or None"):
        TableMapping(compiled="yes")
    for solver in (TableMapping(), TableMapping(compiled=False)):
        assert from_json(json.loads(json.dumps(to_json(solver)))) == solver
    assert from_json({"type": "TableMapping"}) == TableMapping()
