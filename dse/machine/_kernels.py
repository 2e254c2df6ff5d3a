"""What a profile runs on a processor, through NumPy, for a grid of shapes; how it is timed.

Weights, keys and values are taken in turn from a large buffer, so that they come from memory each time, as those of the many layers of an
LLM do.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import cycle, product
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...models.units import MiB
from .._resources import free_memory, text_of, usable_cores
from ._host import Machine, host_machine, plain

Passes = Callable[[int], float]
"""Seconds of so many passes of a kernel, one after the other."""

COLD = 4
"""A buffer of so many times the last caches comes from memory: an assumption; caches of that size could keep a quarter of it at most."""

SINGLE = 4.0
"""Bytes of a number in NumPy's products: 32 bits."""

LEAST, MOST = 5, 25
"""Runs of a kernel at a shape: so many at least, and at most."""

FIRST = 0.6
"""Share of the time in which all cells are measured once."""

CALM = 0.1
"""Spread above which something else was running: an assumption."""

RUN = 1e-3
"""Seconds that a run takes at least: kernels that are shorter are run several times in it, so that the clock does not count."""

SIZES = tuple(size * MiB for size in (256, 64, 16, 4, 1))
QUICK_SIZES = tuple(size * MiB for size in (256, 16, 1))
"""Bytes that are read or copied, the largest first: the bandwidth of the memory follows from it, or from ``COLD`` times larger caches."""


HEADS = ((8, 8, 128), (32, 8, 128), (8, 8, 64), (16, 2, 128))
"""Query heads, KV heads and their dimension, the same in every grid, as the data sheet's rate of attention is made of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kernel at one shape: its columns, bytes and FLOPs of a pass, and ``prepare``, whose result measures it.

    ``cold``: all its bytes come from memory, so that bytes / seconds is a rate of the memory.
    """

    device: str
    kind: str
    shape: Mapping[str, float]
    prepare: Callable[[], Passes]
    variant: str = ""
    threads: int = 1
    nbytes: float = 0.0
    flops: float = 0.0
    cold: bool = False

    @property
    def name(self) -> str:
        """Device, kind and variant."""
        return " ".join(part for part in (self.device, self.kind, self.variant) if part)


class Suite(Protocol):
    """Kernels of one device."""

    @property
    def machine(self) -> Machine:
        """What they run on."""

    def cells(self) -> Sequence[Cell]:
        """What is measured; of each kind, what matters most first."""

    def remarks(self) -> Sequence[str]:
        """Sentences about how something was measured, where that is not as it should be."""

    def close(self) -> None:
        """Give threads and memory back."""


class Rate(NamedTuple):
    """A kernel at a shape: its ``cell``, median ``seconds`` of a pass, their ``spread`` (interquartile range / median), and ``runs``."""

    cell: Cell
    seconds: float
    spread: float
    runs: int

    @property
    def bandwidth(self) -> float:
        """B/s."""
        return self.cell.nbytes / self.seconds

    @property
    def compute(self) -> float:
        """FLOP/s."""
        return self.cell.flops / self.seconds


def timed_rates(
    cells: Sequence[Cell], clock: Callable[[], float], deadline: float, progress: Callable[[Cell], object]
) -> tuple[tuple[Rate, ...], list[tuple[Cell, str]], bool]:
    """Rates of the cells, those that were left out with the reason, and whether Ctrl-C came, which is raised if there is nothing to keep.

    Time that is left measures those with a spread above ``CALM`` once more, and the calmer one of both is taken.
    """
    rates: dict[int, Rate] = {}
    left: dict[int, str] = {}

    def rate(place: int, part: float) -> Rate:
        return _rate(cells[place], list(rates.values()), clock, deadline, part * (deadline - clock()))

    try:
        for place, cell in enumerate(cells):
            progress(cell)
            try:
                rates[place] = rate(place, FIRST / (len(cells) - place))
            except Exception as error:  # whatever a kernel of another library raises: the others are measured
                left[place] = plain(str(error)).rstrip(".") or type(error).__name__
        uneven = sorted((place for place in rates if rates[place].spread > CALM), key=lambda place: -rates[place].spread)
        for count, place in enumerate(uneven):
            with suppress(Exception):  # there is a rate already
                rates[place] = min(rates[place], rate(place, 1 / (len(uneven) - count)), key=lambda one: one.spread)
    except KeyboardInterrupt:
        if not rates:
            raise
        left |= {place: "Ctrl-C ended the profile" for place in range(len(cells)) if place not in rates and place not in left}
        return tuple(rates.values()), [(cells[place], reason) for place, reason in left.items()], True
    return tuple(rates.values()), [(cells[place], reason) for place, reason in left.items()], False


def _rate(cell: Cell, before: Sequence[Rate], clock: Callable[[], float], deadline: float, part: float) -> Rate:
    """The rate of a cell, in about ``part`` seconds; TimeoutError if ``LEAST`` runs would not end before the ``deadline``."""
    left = deadline - clock()
    work = cell.flops or cell.nbytes
    known = [one for one in before if one.cell.name == cell.name and one.cell.nbytes]
    expected = min((one.seconds * work / (one.cell.flops or one.cell.nbytes) for one in known), default=0.0)
    if left <= 0 or (LEAST + 2) * expected > left:
        raise TimeoutError("the time of the profile was over")
    begun = clock()
    passes_of = cell.prepare()
    passes_of(1)  # the warm-up: pages, caches, clocks, and libraries that choose a kernel
    once = passes_of(1)
    passes = max(1, min(1000, math.ceil(RUN / once))) if once > 0 else 1000
    samples: list[float] = []
    while len(samples) < MOST and (len(samples) < LEAST or clock() - begun < part):
        if clock() + once * passes > deadline:
            break
        samples.append(passes_of(passes) / passes)
    if len(samples) < LEAST:
        raise TimeoutError("the time of the profile was over")
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    if not 0 < median < math.inf:
        raise ArithmeticError(f"the clock said {median:g} s, which is no time")
    return Rate(cell, median, (high - low) / median, len(samples))


def sentences(cells: Sequence[Cell], left: Sequence[tuple[Cell, str]]) -> tuple[str, ...]:
    """What was left out and why, once for each kind and reason."""
    number = Counter(cell.name for cell in cells)
    grouped = Counter((cell.name, reason) for cell, reason in left)
    return tuple(f"{what}, {count} of {number[what]} shapes: {reason}" for (what, reason), count in grouped.items())


@dataclass(frozen=True, kw_only=True)
class HostKernels:
    """Kernels of the host's processor: reading and copying by ``threads`` threads and fewer, products and attention of 32 bits by all.

    ``quick``: a smaller grid. ``alone`` False: beside a GPU, only what a memory and a processor of a data sheet need.
    """

    threads: int
    quick: bool = False
    alone: bool = True
    machine: Machine = field(default_factory=host_machine)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes that are read and copied; before them so many that the last caches cannot hold them, if these are large."""
        sizes = QUICK_SIZES if self.quick or not self.alone else SIZES
        cold = math.ceil(COLD * (self.machine.cache or 0.0) / MiB) * MiB
        return (cold, *sizes) if cold > sizes[0] else sizes

    @cached_property
    def size(self) -> int:
        """Bytes of each of two buffers: the largest size, or an eighth of what is free."""
        return int(min(self.sizes[0], max((free_memory() or 0) // 8, self.sizes[-1])) // MiB * MiB)

    @cached_property
    def source(self) -> NDArray[np.float32]:
        """Small numbers, none of which is 0 or so small that arithmetic is slow."""
        return self._noise()

    @cached_property
    def target(self) -> NDArray[np.float32]:
        """The same again."""
        return self._noise()

    def _noise(self) -> NDArray[np.float32]:
        """Numbers around 0.01, drawn once for a MiB and repeated; by all threads, as memory lies beside the core that writes it first."""
        part = np.random.default_rng(0).uniform(-0.02, 0.02, MiB // 4).astype(np.float32)
        made = np.empty((self.size // MiB, MiB // 4), dtype=np.float32)
        list(self.pool.map(lambda rows: np.copyto(rows, part), np.array_split(made, self.threads)))
        return made.reshape(-1)

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that read and copy."""
        return ThreadPoolExecutor(self.threads)

    def close(self) -> None:
        """End the threads and free the buffers."""
        if "pool" in self.__dict__:
            self.pool.shutdown(cancel_futures=True)
        for name in ("source", "target", "pool"):
            self.__dict__.pop(name, None)

    def remarks(self) -> Sequence[str]:
        """None."""
        return ()

    def cells(self) -> Sequence[Cell]:
        """Reading and copying, products, attention, and decode steps of one request."""
        small = self.quick or not self.alone
        powers = () if small else tuple(2**i for i in range(12) if 2**i < self.threads)
        counts = sorted({1, *powers, self.threads}, reverse=True)
        cells = [self._memory(*each) for each in product(self.sizes, counts, ("read", "copy"))]
        widths = ((1024, 1024), (4096, 1024), (2048, 2048)) + (() if small else ((1024, 4096), (4096, 4096)))
        cells += [self._product(m, n, k) for (n, k), m in product(widths, (256, 1, 16) if small else (256, 1, 4, 16, 64))]
        contexts = (512, 2048) if small else (256, 512, 1024, 2048, 4096)
        cells += [self._attention(batch, seq, *each) for seq, each, batch in product(contexts, HEADS, (1, 4))]
        steps = product((64, 128, 256), (0, 32) if small else (0, 32, 128)) if self.alone else ()
        return [*cells, *(self._step(*each) for each in steps)]

    def _cold(self, touched: float) -> bool:
        return self.machine.cache is not None and touched >= COLD * self.machine.cache

    def _memory(self, size: int, threads: int, kind: str) -> Cell:
        """Each thread goes over its own part of ``size`` bytes."""

        def prepare() -> Passes:
            check_room(size, self.size)
            parts, other = (np.array_split(each[: size // 4].view(np.uint64), threads) for each in (self.source, self.target))

            def work(part: int, passes: int) -> None:
                for _ in range(passes):
                    if kind == "read":
                        np.bitwise_or.reduce(parts[part])  # the cheapest reduction: it waits for the memory and not for additions
                    else:
                        np.copyto(other[part], parts[part])

            return wall(lambda passes: list(self.pool.map(partial(work, passes=passes), range(threads))))

        cold, moved = self._cold(size), size * (2.0 if kind == "copy" else 1.0)
        return self._cell(kind, {"bytes": size}, prepare, moved, variant="", threads=threads, cold=cold)

    def _product(self, m: int, n: int, k: int) -> Cell:
        def prepare() -> Passes:
            weights = _in_turn(self.source, (n, k))
            rows, out = self.target[: m * k].reshape(m, k), np.empty((m, n), dtype=np.float32)

            def work(passes: int) -> None:
                for _ in range(passes):
                    np.matmul(rows, next(weights).T, out=out)

            return self._limited(work)

        moved = SINGLE * (n * k + m * k + m * n)
        return self._cell("host_gemm", {"m": m, "n": n, "k": k}, prepare, moved, flops=2.0 * m * n * k)

    def _attention(self, batch: int, seq: int, heads: int, kv_heads: int, head_dim: int) -> Cell:
        shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}

        def prepare() -> Passes:
            return self._limited(_host_attention(self.source, self.target, shape))

        moved = 2 * SINGLE * (batch * seq * kv_heads * head_dim + batch * heads * head_dim)
        return self._cell("host_attention", shape, prepare, moved, flops=4.0 * batch * seq * heads * head_dim)

    def _step(self, weights: int, state: int) -> Cell:
        """All weights once, by one token, and ``state`` MiB of keys and values."""
        shape = {"weight_bytes": weights * MiB, "state_bytes": state * MiB, "n_gpu": 1}

        def prepare() -> Passes:
            matrices = _in_turn(self.source, (2048, 2048))
            attended = {"batch": 1, "seq": state * MiB // (2 * 8 * 128 * 4), "heads": 8, "kv_heads": 8, "head_dim": 128}
            attend = _host_attention(self.target, self.source, attended) if state else lambda passes: None
            token = np.full(2048, 0.01, dtype=np.float32)

            def work(passes: int) -> None:
                for _ in range(passes):
                    for _ in range(weights * MiB // (4 * 2048 * 2048)):
                        np.dot(next(matrices), token)
                    attend(1)

            return self._limited(work)

        return self._cell("stream", shape, prepare, float((weights + state) * MiB), variant="")

    def _cell(self, kind: str, shape: Mapping[str, float], prepare: Callable[[], Passes], moved: float, **more: Any) -> Cell:
        given: dict[str, Any] = {"variant": "fp32", "threads": self.threads, "cold": self._cold(self.size)} | more
        return Cell(device="cpu", kind=kind, shape=shape, prepare=prepare, nbytes=moved, **given)

    def _limited(self, work: Callable[[int], object]) -> Passes:
        """Passes of a kernel whose threads NumPy's library for products keeps, and whose number is set for it."""

        def timed(passes: int) -> float:
            with _blas_threads(self.threads):
                return wall(work)(passes)

        return timed


def check_room(needed: float, taken: float) -> None:
    """MemoryError if ``needed`` bytes are more than the buffer that was ``taken``."""
    if needed > taken:
        raise MemoryError(f"{needed / MiB:.0f} MiB do not fit into the {taken / MiB:.0f} MiB of free memory that the profile takes")


def _in_turn(buffer: NDArray[np.float32], shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Arrays of ``shape``, one after the other in the buffer, and over again; MemoryError if it holds none."""
    length = int(np.prod(shape))
    check_room(4 * length, buffer.nbytes)
    return cycle(buffer[: len(buffer) // length * length].reshape(-1, *shape))


def _host_attention(keys: NDArray[np.float32], values: NDArray[np.float32], shape: Mapping[str, float]) -> Callable[[int], None]:
    """Passes of one decode step: softmax(q k') v for each request and KV head."""
    batch, seq, heads, kv_heads, head_dim = (int(shape[name]) for name in ("batch", "seq", "heads", "kv_heads", "head_dim"))
    cached = (batch, kv_heads, seq, head_dim)
    key, value = _in_turn(keys, cached), _in_turn(values, cached)
    query = np.full((batch, kv_heads, heads // kv_heads, head_dim), 0.01, dtype=np.float32)

    def work(passes: int) -> None:
        for _ in range(passes):
            weights = np.matmul(query, next(key).swapaxes(2, 3))
            np.exp(weights, out=weights)
            weights /= weights.sum(axis=-1, keepdims=True)
            np.matmul(weights, next(value))

    return work


def wall(work: Callable[[int], object]) -> Passes:
    """Passes timed by the host's clock."""

    def timed(passes: int) -> float:
        begun = time.perf_counter()
        work(passes)
        return time.perf_counter() - begun

    return timed


# A thread count of NumPy's library for products, as its own functions set it: OpenBLAS in NumPy's wheels and elsewhere, MKL.
_SETTERS = (
    ("scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"),
    ("openblas_set_num_threads64_", "openblas_get_num_threads64_"),
    ("openblas_set_num_threads", "openblas_get_num_threads"),
    ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads"),
)


@contextmanager
def _blas_threads(threads: int) -> Iterator[None]:
    """Products by ``threads`` threads; RuntimeError if their number is another one and cannot be set."""
    found = _blas_libraries()
    if not found and threads != usable_cores() and os.environ.get("OMP_NUM_THREADS") != str(threads):
        raise RuntimeError(f"the threads of NumPy's products cannot be set here; start with OMP_NUM_THREADS={threads} in the environment")
    before = [(change, current()) for change, current in found]
    try:
        for change, _ in found:
            change(threads)
        yield
    finally:
        for change, count in before:
            change(count)


@cache
def _blas_libraries() -> tuple[tuple[Callable[[int], object], Callable[[], int]], ...]:
    """Functions that set and tell the threads of each library in this process."""
    paths = set(re.findall(r"(/\S*(?:openblas|mkl_rt)\S*)$", text_of("/proc/self/maps"), re.MULTILINE))
    found = []
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        if names := next((pair for pair in _SETTERS if hasattr(library, pair[0]) and hasattr(library, pair[1])), None):
            found.append((getattr(library, names[0]), getattr(library, names[1])))
    return tuple(found)
