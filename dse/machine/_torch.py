"""What a profile runs on a GPU, through PyTorch, for a grid of shapes; and what its times are times of.

A GPU ends small kernels sooner than a host can launch them (a few microseconds each in Python), so that events around launches would time
the host. Serving engines record a step as a CUDA graph, and so do the benchmarks that the kernel models were made for. Hence:

- reading and copying, products, attention, decode steps: passes recorded as a graph, times without launches;
- copies of pinned memory: launched one by one while the GPU is kept busy, as behind the work of a layer, so without launches, too;
- a launch, queued: events around launches as the host gives them, its time for one of many;
- a launch, synchronised, and copies of pageable memory: the host's clock, with the launch and the wait for it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle, product
from typing import Any, NamedTuple, cast

import numpy as np

from ...models.kernel_gemm import GemmTime
from ...models.units import GiB, KiB, MiB
from .._resources import text_of
from ._host import Machine, host_machine, plain, software_versions
from ._kernels import COLD, QUICK_SIZES, SIZES, Cell, Passes, check_room, wall

HALF = 2.0
"""Bytes of a number in products and attention: 16 bits."""

BUSY = (2_000_000, 128_000_000)
"""Cycles that a GPU is kept busy for while the host queues a run: about a millisecond at first, some 0.1 s at most."""

QUEUE = 250
"""Launches in the queue at most: with 1024 kernels in it, a host has to wait, and a pass may be several kernels."""


def cuda_torch() -> Any:
    """PyTorch, with a GPU that it can use; ValueError in one sentence without, from what PyTorch raised if it is there and broken."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError("a profile of a GPU needs PyTorch: pip install 'memsplit[runtime]', or profile --device cpu") from None
    except (ImportError, OSError) as error:  # a library that it loads is broken or missing
        reason = plain(str(error)).rstrip(".") or type(error).__name__
        raise ValueError(
            f"a profile of a GPU needs PyTorch, which cannot be loaded: {reason}; install it again, or profile --device cpu"
        ) from error
    if not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA device here; profile --device cpu, or install a driver and a PyTorch with CUDA")
    return torch


def cuda_machine(torch: Any) -> Machine:
    """This machine with its current GPU."""
    host, sheet = host_machine(), torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(
        cpu=host.cpu,
        cores=host.cores,
        memory=host.memory,
        cache=host.cache,
        gpu=plain(torch.cuda.get_device_name()),
        gpu_memory=float(torch.cuda.mem_get_info()[1]),
        gpu_cache=float(getattr(sheet, "L2_cache_size", 0)) or None,
        multiprocessors=int(sheet.multi_processor_count),
        capability=tuple(torch.cuda.get_device_capability()),
        software=software_versions(f"PyTorch {torch.__version__}", f"CUDA {torch.version.cuda or torch.version.hip}", *_driver()),
    )


def _driver() -> tuple[str, ...]:
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text_of("/proc/driver/nvidia/version"))
    return (f"driver {found[1]}",) if found else ()


class Grid(NamedTuple):
    """What is measured: ``sizes`` [B] read and copied, products of ``rows`` m and ``widths`` (n, k), attention of ``batches`` at
    ``contexts`` with ``heads`` (query, KV, dimension), ``states`` [MiB] of decode steps, and ``copies`` [B] over the host link."""

    sizes: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    states: tuple[int, ...]
    copies: tuple[int, ...]


QUICK = Grid(
    sizes=(GiB, *QUICK_SIZES),
    widths=((4096, 4096), (4096, 11008), (12288, 4096)),
    rows=(2048, 1, 64),
    contexts=(512, 4096),
    heads=((32, 32, 128), (32, 8, 128), (64, 8, 128), (16, 16, 64), (40, 40, 128)),
    batches=(1, 16),
    states=(0, 512),
    copies=QUICK_SIZES,
)
FULL = Grid(
    sizes=(GiB, *SIZES),
    widths=(*QUICK.widths, (22016, 4096)),
    rows=(4096, 1, 8, 32, 64, 128, 256, 512, 1024, 2048),
    contexts=(256, 512, 1024, 2048, 4096),
    heads=QUICK.heads,  # the same, as the data sheet's rate of attention is made of all of them
    batches=(1, 8, 32),
    states=(0, 512, 1024),
    copies=(*SIZES, 256 * KiB, 64 * KiB, 16 * KiB),
)
"""Shapes of LLMs of 7 to 70 G parameters."""


@dataclass(frozen=True, kw_only=True)
class TorchKernels:
    """Kernels of a GPU through PyTorch, timed as the module says; ``place`` "cpu" runs the same code for tests.

    Products are of 16 bits, with as many weights in turn as the kernel model says. ``remarked``: what ``remarks`` says, once each.
    """

    torch: Any
    machine: Machine
    place: str = "cuda"
    quick: bool = False
    size: int = 0
    remarked: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.size:
            free = self.torch.cuda.mem_get_info()[0] if self.place == "cuda" else 64 * MiB
            object.__setattr__(self, "size", int(min(4 * GiB, free // 4) // MiB * MiB))

    @cached_property
    def dtype(self) -> Any:
        """16 bits: bfloat16 where tensor cores know it, else float16."""
        return self.torch.float16 if self.place == "cuda" and self.machine.capability < (8, 0) else self.torch.bfloat16

    @cached_property
    def source(self) -> Any:
        """Small numbers."""
        return self.torch.empty(self.size // 2, device=self.place, dtype=self.dtype).uniform_(-0.02, 0.02)

    @cached_property
    def target(self) -> Any:
        """The same again."""
        return self.source.clone()

    @cached_property
    def stream(self) -> Any:
        """Where graphs are recorded: one stream for all, as libraries keep memory for each."""
        return self.torch.cuda.Stream()

    def close(self) -> None:
        """Free the buffers, what libraries keep for products, and what PyTorch keeps of the memory of GPU and host."""
        for name in ("source", "target", "stream"):
            self.__dict__.pop(name, None)
        if self.place == "cuda":
            self.torch.cuda.synchronize()
            for name in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):  # not public, and not in all versions
                getattr(self.torch._C, name, lambda: None)()
            self.torch.cuda.empty_cache()

    def remarks(self) -> Sequence[str]:
        """Kinds whose times have launches in them, and why."""
        return tuple(self.remarked)

    def cells(self) -> Sequence[Cell]:
        """Reading and copying, products, attention, decode steps of one request, launches, and copies over the host link."""
        grid = QUICK if self.quick else FULL
        cells = [self._memory(kind, size) for size, kind in product(grid.sizes, ("read", "copy"))]
        cells += [self._product(m, n, k) for (n, k), m in product(grid.widths, grid.rows)]
        cells += [self._attention(batch, seq, *each) for seq, each, batch in product(grid.contexts, grid.heads, grid.batches)]
        cells += [self._step(weights, state) for weights, state in product((1024, 2048, 4096), grid.states)]
        cells += [self._launch(variant) for variant in ("queued", "synchronised")]
        ways = product(grid.copies, ("pinned", "pageable"), ("h2d", "d2h"))
        return [*cells, *(self._copy(f"{way}_{kind}", size) for size, kind, way in ways)]

    def _timed(self, kind: str, work: Callable[[], object], turn: int = 1) -> Passes:
        """Seconds of passes without launches: recorded as a CUDA graph of whole turns, so that what is used in turn is so between replays.

        Passes that cannot be recorded are launched one by one, behind a busy GPU, and ``remarks`` says so.
        """
        if self.place != "cuda":
            return wall(lambda passes: [work() for _ in range(passes)])
        recorded: dict[int, Passes] = {}

        def timed(passes: int) -> float:
            count = math.ceil(passes / turn) * turn
            if count not in recorded:
                recorded.clear()  # and the memory of the last graph with it
                try:
                    replay = self._recorded(work, count)
                except RuntimeError as error:
                    reason = plain(str(error)).split(". ")[0].rstrip(".") or type(error).__name__
                    self.remarked[f"cuda {kind} recorded as graphs: {reason}; launched one by one"] = None
                    recorded[count] = self._queued(kind, work)
                else:
                    recorded[count] = self._queued(kind, replay, count)
            return recorded[count](count) * passes / count

        return timed

    def _recorded(self, work: Callable[[], object], passes: int) -> Callable[[], object]:
        """Replays so many passes; RuntimeError if a pass does what a graph cannot hold."""
        cuda = self.torch.cuda
        graph = cuda.CUDAGraph()
        cuda.synchronize()  # what a pass reads was written on another stream
        with cuda.stream(self.stream):
            work()  # libraries make what they keep for a stream now and not while it is recorded
        cuda.synchronize()
        with cuda.stream(self.stream), cuda.graph(graph, stream=self.stream):  # the outer one ends where the inner one fails to
            for _ in range(passes):
                work()
        return cast("Callable[[], object]", graph.replay)

    def _queued(self, kind: str, launch: Callable[[], object], each: int = 1) -> Passes:
        """Seconds of passes, ``each`` of them a launch, that all are in the queue before the first begins.

        The GPU is kept busy until then. It was if the host was done sooner, by its own clock, than the GPU between two events around that;
        if not, it is kept busy for longer.
        """
        cuda = self.torch.cuda
        cycles, most = BUSY
        busy = getattr(cuda, "_sleep", lambda cycles: None)  # not public, but PyTorch's own tests rest on it

        def timed(passes: int) -> float:
            nonlocal cycles
            launches = min(passes // each, QUEUE)
            while True:
                idle, begin, end = (cuda.Event(enable_timing=True) for _ in range(3))
                cuda.synchronize()
                called = time.perf_counter()
                idle.record()
                busy(cycles)
                begin.record()
                for _ in range(launches):
                    launch()
                end.record()
                launching = time.perf_counter() - called
                end.synchronize()
                ahead = launching < float(idle.elapsed_time(begin)) * 1e-3
                if ahead or cycles >= most:
                    break
                cycles = min(4 * cycles, most)
            if not ahead:
                self.remarked[f"cuda {kind} without launches: the GPU could not be kept busy until all was queued"] = None
            return float(begin.elapsed_time(end)) * 1e-3 * passes / (launches * each)

        return timed

    def _launched(self, work: Callable[[], object]) -> Passes:
        """Seconds of passes as the host launches them, by the GPU's clock."""
        if self.place != "cuda":
            return wall(lambda passes: [work() for _ in range(passes)])
        cuda = self.torch.cuda

        def timed(passes: int) -> float:
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            cuda.synchronize()
            begin.record()
            for _ in range(passes):
                work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3

        return timed

    def _waited(self, work: Callable[[], object]) -> Passes:
        """Seconds by the host's clock, which waits for the GPU after each pass."""
        wait = self.torch.cuda.synchronize if self.place == "cuda" else lambda: None

        def each(passes: int) -> None:
            for _ in range(passes):
                work()
                wait()

        return wall(each)

    def _cold(self, touched: float) -> bool:
        return self.machine.gpu_cache is not None and touched >= COLD * self.machine.gpu_cache

    def _cell(
        self, kind: str, shape: Mapping[str, float], prepare: Callable[[], Passes], moved: float, touched: float, **more: Any
    ) -> Cell:
        return Cell(device="cuda", kind=kind, shape=shape, prepare=prepare, nbytes=moved, cold=self._cold(touched), **more)

    def _memory(self, kind: str, size: int) -> Cell:
        def prepare() -> Passes:
            check_room(size, self.size)
            words = self.torch.float32
            source, target = self.source[: size // 2].view(words), self.target[: size // 2].view(words)
            return self._timed(kind, source.sum if kind == "read" else lambda: target.copy_(source))

        return self._cell(kind, {"bytes": size}, prepare, size * (2.0 if kind == "copy" else 1.0), size)

    def _in_turn(self, buffer: Any, shape: tuple[int, ...], copies: int) -> Iterator[Any]:
        length = int(np.prod(shape))
        check_room(HALF * length, self.size)
        return cycle(buffer[: self._copies(copies, length) * length].view(-1, *shape).unbind())

    def _copies(self, copies: int, length: int) -> int:
        """How many of so many numbers the buffer holds, up to ``copies``."""
        return int(min(copies, self.size // (HALF * length)))

    def _product(self, m: int, n: int, k: int) -> Cell:
        copies = self._copies(int(GemmTime().copies), n * k)

        def prepare() -> Passes:
            weights = self._in_turn(self.source, (n, k), copies)
            rows = self.target[: m * k].view(m, k)
            return self._timed("gemm", lambda: self.torch.nn.functional.linear(rows, next(weights)), copies)

        moved = HALF * (n * k + m * k + m * n)
        shape = {"m": m, "n": n, "k": k}
        return self._cell("gemm", shape, prepare, moved, copies * HALF * n * k, variant="bf16", flops=2.0 * m * n * k)

    def _attention(self, batch: int, seq: int, heads: int, kv_heads: int, head_dim: int) -> Cell:
        """PyTorch's own attention; of the back-ends that the kernel model knows, vLLM's is the most like it."""
        shape = {"batch": batch, "seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        moved = 2 * HALF * batch * head_dim * (seq * kv_heads + heads)
        flops = 4.0 * batch * seq * heads * head_dim
        # One cache, used again and again, as in the measurements that the kernel model is made for.
        prepare = partial(self._prepared_attention, shape)
        return self._cell("decode_attention", shape, prepare, moved, moved, variant="vllm", flops=flops)

    def _prepared_attention(self, shape: Mapping[str, int]) -> Passes:
        return self._timed("decode_attention", self._attend(shape))

    def _attend(self, shape: Mapping[str, int]) -> Callable[[], object]:
        batch, seq, heads, kv_heads, head_dim = shape.values()
        cached = (batch, kv_heads, seq, head_dim)
        key, value = (next(self._in_turn(buffer, cached, 1)) for buffer in (self.source, self.target))
        query = self.torch.full((batch, heads, 1, head_dim), 0.01, device=self.place, dtype=self.dtype)
        attention = self.torch.nn.functional.scaled_dot_product_attention
        grouped = {"enable_gqa": True} if heads != kv_heads else {}
        return lambda: attention(query, key, value, **grouped)

    def _step(self, weights: int, state: int) -> Cell:
        """All weights once, by one token, and ``state`` MiB of keys and values."""
        wide, products = 8192, weights * MiB // (2 * 8192 * 8192)

        def prepare() -> Passes:
            matrices = self._in_turn(self.source, (wide, wide), products)
            token = self.torch.full((1, wide), 0.01, device=self.place, dtype=self.dtype)
            shape = {"batch": 1, "seq": state * MiB // (2 * 32 * 128 * 2), "heads": 32, "kv_heads": 32, "head_dim": 128}
            attend = self._attend(shape) if state else lambda: None

            def work() -> None:
                for _ in range(products):
                    self.torch.nn.functional.linear(token, next(matrices))
                attend()

            return self._timed("stream", work)

        shape = {"weight_bytes": weights * MiB, "state_bytes": state * MiB, "n_gpu": 1}
        return self._cell("stream", shape, prepare, float((weights + state) * MiB), float(min(weights * MiB, self.size)))

    def _launch(self, variant: str) -> Cell:
        """A kernel that does next to nothing, one of many in the queue or waited for."""

        def prepare() -> Passes:
            one = self.torch.zeros(1, device=self.place)
            return (self._launched if variant == "queued" else self._waited)(lambda: one.add_(1))

        return self._cell("launch", {}, prepare, 0.0, 0.0, variant=variant)

    def _copy(self, variant: str, size: int) -> Cell:
        """Between a buffer of the host and one of the GPU; copies of pageable memory return when they are done."""

        def prepare() -> Passes:
            pinned = variant.endswith("_pinned")
            host = self.torch.empty(size, dtype=self.torch.uint8, pin_memory=pinned).fill_(1)
            there = self.torch.ones(size, dtype=self.torch.uint8, device=self.place)
            target, source = (there, host) if variant.startswith("h2d") else (host, there)

            def copy() -> None:
                target.copy_(source, non_blocking=pinned)

            return self._queued(f"host_link {variant}", copy) if pinned else self._waited(copy)

        return Cell(device="cuda", kind="host_link", variant=variant, shape={"bytes": size}, prepare=prepare, nbytes=float(size))
