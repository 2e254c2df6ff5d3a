"""How a profile times kernels, with kernels and a clock of our own; and that its kernels are what kernel models price."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsplit.dse.machine import MachineProfile, _kernels, _torch, profile_suites
from memsplit.dse.machine._kernels import LEAST, MOST, RUN, Cell, Machine
from memsplit.dse.machine._torch import Grid, TorchKernels
from memsplit.models.device import device_named
from memsplit.models.kernel_models import kernel_model
from memsplit.models.units import GB, MiB

HOST = Machine(cpu="Example CPU", cores=4, memory=64 * GB, cache=32 * MiB, software="Example OS")
BOTH = dataclasses.replace(HOST, gpu="Example GPU", gpu_memory=80 * GB, gpu_cache=40 * MiB, multiprocessors=108, capability=(8, 0))


class Clock:
    """A clock that only kernels move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Kernels:
    """A suite of given cells."""

    made: Sequence[Cell]
    machine: Machine = HOST
    closed: bool = False
    remarked: Sequence[str] = ()

    def cells(self) -> Sequence[Cell]:
        return self.made

    def remarks(self) -> Sequence[str]:
        return self.remarked

    def close(self) -> None:
        self.closed = True


def cell(passes: Callable[[int], float], kind: str = "read", **more: object) -> Cell:
    given = {"device": "cpu", "shape": {"bytes": 2**20}, "nbytes": 2.0**20, "prepare": lambda: passes}
    return Cell(kind=kind, **(given | more))  # type: ignore[arg-type]


def scripted(clock: Clock, seconds: Sequence[float]) -> Callable[[int], float]:
    """A kernel whose passes take these seconds in turn, the last one from then on."""
    script = iter(seconds)
    last = seconds[-1]

    def passes(count: int) -> float:
        took = count * next(script, last)
        clock.now += took
        return took

    return passes


def profile(*cells: Cell, clock: Clock, seconds: float = 100.0) -> MachineProfile:
    return profile_suites([Kernels(cells)], seconds=seconds, clock=clock)


@given(st.lists(st.floats(0.01, 0.02), min_size=MOST, max_size=MOST))
@settings(max_examples=20)
def test_a_rate_is_the_median_of_its_runs_and_the_spread_their_middle_half(samples: list[float]):
    """The warm-up and the run that tells how long one is are none of them."""
    clock = Clock()
    calm = [0.015] * MOST  # if the first try is uneven there is a second one, which is not calmer than 0
    found = profile(cell(scripted(clock, [9.0, 0.015, *samples, 9.0, 0.015, *samples, *calm])), clock=clock)
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    (rate,) = found.rates
    assert rate.runs == MOST
    assert rate.seconds == pytest.approx(median, rel=1e-12)
    assert rate.spread == pytest.approx((high - low) / median, abs=1e-12)
    assert rate.bandwidth == pytest.approx(2**20 / median, rel=1e-12)


def test_a_short_kernel_is_repeated_so_that_the_clock_does_not_count():
    clock, counts = Clock(), []

    def passes(count: int) -> float:
        counts.append(count)
        clock.now += count * 2**-15
        return count * 2**-15

    (rate,) = profile(cell(passes), clock=clock).rates
    assert counts[:2] == [1, 1]
    assert set(counts[2:]) == {math.ceil(RUN * 2**15)}
    assert rate.seconds == 2**-15


def test_an_uneven_rate_is_measured_again_and_the_calmer_one_is_taken():
    """Another program that came in between is gone the second time, or does more."""
    uneven = [0.01, 0.01, *(0.01 if run % 2 else 0.1 for run in range(MOST))]  # a median of 0.1 and a spread of 0.9
    worse = [0.01, 0.01, *(0.01 if run % 2 else 5.0 for run in range(MOST))]  # a spread of 0.998
    for again, median, spread in (([0.02], 0.02, 0.0), (worse, 0.1, 0.9)):
        clock = Clock()
        (rate,) = profile(cell(scripted(clock, [*uneven, *again])), clock=clock, seconds=1000.0).rates
        assert (rate.seconds, rate.spread) == pytest.approx((median, spread))


def test_a_kernel_that_raises_is_left_out_and_named():
    clock = Clock()

    def out_of_memory(count: int) -> float:
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB.")

    def unprepared() -> Callable[[int], float]:
        raise MemoryError

    bad = [cell(out_of_memory, "copy"), cell(out_of_memory, "copy"), cell(out_of_memory, "other", prepare=unprepared)]
    found = profile(cell(scripted(clock, [0.01])), *bad, clock=clock)
    assert [rate.cell.kind for rate in found.rates] == ["read"]
    assert found.missing == (
        "cpu copy, 2 of 2 shapes: CUDA out of memory. Tried to allocate 2 GiB",
        "cpu other, 1 of 1 shapes: MemoryError",
    )
    assert not found.interrupted


def test_a_clock_that_stands_still_is_no_rate():
    found = profile(cell(lambda count: 0.0), clock=Clock())
    assert not found.rates
    assert found.missing == ("cpu read, 1 of 1 shapes: the clock said 0 s, which is no time",)


def test_the_time_is_kept_and_what_it_does_not_reach_is_named():
    """A run that would end after the deadline is not begun."""
    clock = Clock()
    cells = [cell(scripted(clock, [0.5]), f"kind {number}") for number in range(20)]
    found = profile(*cells, clock=clock, seconds=20.0)
    assert clock.now <= 0.8 * 20.0  # the rest is kept for fits
    assert 0 < len(found.rates) < 20
    assert all(rate.runs >= LEAST for rate in found.rates)
    assert sum("the time of the profile was over" in sentence for sentence in found.missing) == 20 - len(found.rates)


def test_a_shape_that_would_take_too_long_is_not_begun():
    """The rate of smaller ones says how long: 1000 times the bytes, 1000 times as long."""
    clock, begun = Clock(), []

    def prepare() -> Callable[[int], float]:
        begun.append(True)
        return scripted(clock, [10.0])

    found = profile(cell(scripted(clock, [0.01])), cell(abs, nbytes=1000 * 2.0**20, prepare=prepare), clock=clock, seconds=50.0)
    assert len(found.rates) == 1
    assert not begun
    assert found.missing == ("cpu read, 1 of 2 shapes: the time of the profile was over",)


def test_each_kind_has_its_turn_before_the_second_of_any():
    clock, order = Clock(), []

    def ordered(kind: str) -> Cell:
        def prepare() -> Callable[[int], float]:
            order.append(kind)
            return scripted(clock, [0.01])

        return cell(abs, kind, prepare=prepare)

    profile(*map(ordered, "aaabbc"), clock=clock)
    assert "".join(order) == "abcaba"


def interrupting(clock: Clock) -> Cell:
    def passes(count: int) -> float:
        raise KeyboardInterrupt

    return cell(passes, "copy")


def test_ctrl_c_keeps_what_was_measured_and_says_what_is_missing():
    clock = Clock()
    suite = Kernels([cell(scripted(clock, [0.01])), interrupting(clock), cell(scripted(clock, [0.01]), "stream")])
    found = profile_suites([suite], seconds=100.0, clock=clock)
    assert found.interrupted
    assert [rate.cell.kind for rate in found.rates] == ["read"]
    assert found.missing == tuple(f"cpu {kind}, 1 of 1 shapes: Ctrl-C ended the profile" for kind in ("copy", "stream"))
    assert suite.closed


def test_ctrl_c_before_the_first_rate_leaves_nothing_to_write():
    suite = Kernels([interrupting(Clock())])
    with pytest.raises(KeyboardInterrupt):
        profile_suites([suite], seconds=100.0, clock=Clock())
    assert suite.closed


def test_what_a_suite_remarks_is_said_with_what_is_missing():
    clock = Clock()
    suite = Kernels([cell(scripted(clock, [0.01]))], remarked=("cpu read: the other way",))
    assert profile_suites([suite], seconds=100.0, clock=clock).missing == ("cpu read: the other way",)


def shapes_of(one: Cell) -> dict[str, np.ndarray]:
    return {name: np.array([float(value)]) for name, value in one.shape.items()}


@pytest.mark.parametrize("kind", ["gemm", "decode_attention", "stream", "host_link"])
def test_cells_count_the_bytes_and_flops_of_the_kernel_models(kind: str):
    """On a device of 1 B/s and 1 FLOP/s without a cache, seconds are bytes and FLOPs."""
    one_each = dataclasses.replace(device_named("A100-SXM-80GB"), bandwidth=1.0, peaks={"bf16": 1.0}, l2=None, link="PCIe 4.0 x16")
    cells = [one for one in TorchKernels(torch=None, machine=BOTH, size=2**32).cells() if one.kind == kind]
    assert cells
    for one in cells:
        nbytes, flops = kernel_model(one.kind, one.variant).work(one_each, shapes_of(one))
        if kind == "host_link":
            nbytes = nbytes * 31.5 * GB
        assert one.nbytes == pytest.approx(float(nbytes[0]), rel=1e-12)
        assert one.flops == pytest.approx(float(flops[0]), rel=1e-12)


def test_attention_on_the_host_is_attention():
    """Against a plain softmax(q k') v in 64 bits; the second pass takes the next keys and values."""
    random = np.random.default_rng(1)
    keys, values = (random.normal(size=2 * 4 * 16 * 8).astype(np.float32) for _ in range(2))
    shape = {"batch": 2, "seq": 16, "heads": 8, "kv_heads": 4, "head_dim": 4}
    work = _kernels._host_attention(keys, values, shape)
    products: list[np.ndarray] = []
    original = np.matmul

    def kept(*arguments: np.ndarray, **more: np.ndarray) -> np.ndarray:
        products.append(original(*arguments, **more))
        return products[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernels.np, "matmul", kept)
        work(2)
    query = np.full(4, 0.01)
    for place, outcome in enumerate((products[1], products[3])):
        key, value = (each[place * 512 : (place + 1) * 512].reshape(2, 4, 16, 4).astype(np.float64) for each in (keys, values))
        weight = np.exp(key @ query)
        expected = np.einsum("bhs,bhsd->bhd", weight / weight.sum(axis=-1, keepdims=True), value)
        for group in range(2):
            np.testing.assert_allclose(outcome[:, :, group], expected, rtol=1e-4, atol=1e-5)  # 32 against 64 bits


def test_threads_of_products_are_set_and_set_back(monkeypatch: pytest.MonkeyPatch):
    np.ones((4, 4)) @ np.ones((4, 4))
    libraries = _kernels._blas_libraries()
    before = [current() for _, current in libraries]
    for change, current in libraries:
        change(2)
        with _kernels._blas_threads(1):
            assert current() == 1
        assert current() == 2
    for (change, _), count in zip(libraries, before, strict=True):
        change(count)
    monkeypatch.setattr(_kernels, "_blas_libraries", tuple)
    monkeypatch.setattr(_kernels, "usable_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with _kernels._blas_threads(4):
        pass
    with pytest.raises(RuntimeError, match="OMP_NUM_THREADS=2"), _kernels._blas_threads(2):
        pass


SMALL = Grid(
    sizes=(MiB,),
    widths=((64, 64), (64, 32)),
    rows=(4, 1),
    contexts=(16,),
    heads=((4, 4, 16), (4, 2, 16)),
    batches=(1,),
    states=(0,),
    copies=(MiB, MiB // 4),
)


def test_the_kernels_of_a_gpu_run_on_a_processor_too(monkeypatch: pytest.MonkeyPatch):
    """The same code with another clock; what a processor has not, pinned memory, is left out and named, as are steps of 1 GiB."""
    torch = pytest.importorskip("torch", reason="needs memsplit[runtime]")
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU has pinned memory")
    torch.set_num_threads(1)
    monkeypatch.setattr(_torch, "QUICK", SMALL)
    suite = TorchKernels(torch=torch, machine=BOTH, place="cpu", quick=True, size=4 * MiB)
    found = profile_suites([suite], seconds=4.0)
    assert found.device == "cuda"
    assert {rate.cell.kind for rate in found.rates} == {"read", "copy", "gemm", "decode_attention", "launch", "host_link"}
    assert all(0 < rate.seconds < math.inf for rate in found.rates)
    named = " ".join(found.missing)
    assert "h2d_pinned" in named
    assert "stream, 3 of 3 shapes: 128 MiB do not fit" in named
