"""A CUDA device without one: its operations run on the CPU at once, and what a real device could do otherwise is an error.

    with FakeCuda() as cuda:
        ...  # code for device="cuda"
    assert not cuda.races

Each stream and the host has a vector clock; events and waits join them. Two accesses of the same bytes, one of them a write, that no chain
of events orders are a race, whatever their order was here. Memory of the device that a stream still uses when it is freed is one, too, as
PyTorch's allocator gives it away at once unless ``record_stream`` was called. Operations on tensors of both host and device fail. Where
the host has to wait for the device is counted: copies of memory that is not pinned, scalars, sizes that depend on data.
While a graph is recorded such a wait fails, as it does on a real device; a replay accesses what was recorded, by the stream that launches
it, and memory that was freed since is a race.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # a mode imports it at its first operation; not while CUDA seems to be there
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
HOST = -1
"""The actor that is no stream."""

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select", "unique")
"""Operations whose result the host needs before it goes on."""


@dataclass(eq=False)
class Held:
    """Memory: where it is, who allocated it, and what was done to it: (begin, end, actor, time, write, operation)."""

    alive: StorageWeakRef
    near: bool
    pinned: bool
    owner: int
    nbytes: int
    accesses: list[tuple[int, int, int, int, bool, str]] = field(default_factory=list)
    recorded: set[int] = field(default_factory=set)


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def wait_event(self, event: Event) -> None:
        self.cuda.join(self.number, event.seen)

    def synchronize(self) -> None:
        self.cuda.wait(self.number, "Stream.synchronize")


class Event:
    """As torch.cuda.Event; its time is that of the host when it was recorded."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.seen, self.stream, self.at = cuda, {}, None, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = self.cuda.current if stream is None else stream.number
        self.seen, self.at = dict(self.cuda.tick(self.stream)), time.perf_counter()

    def synchronize(self) -> None:
        self.cuda.syncs.append("Event.synchronize")
        self.cuda.join(HOST, self.seen)

    def elapsed_time(self, end: Event) -> float:
        assert self.cuda.clocks[HOST].get(end.stream, 0) >= end.seen[end.stream], "a time that has not come yet"
        return (end.at - self.at) * 1e3


class Graph:
    """As torch.cuda.CUDAGraph, for one stream: what is recorded is computed then, and accesses memory when it is replayed."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.replays = cuda, 0
        self.accesses: dict[tuple[int, int, int, bool], tuple[Held, str]] = {}
        self.own: set[int] = set()
        """Memory that was allocated meanwhile: it stays the graph's."""

    def replay(self) -> None:
        cuda, self.replays = self.cuda, self.replays + 1
        cuda.tick(cuda.current)
        for (key, begin, end, write), (held, what) in self.accesses.items():
            if key in self.own:
                continue
            if held.alive.expired():
                cuda.races.append(f"freed before a replay uses it: {what}")
            else:
                cuda.touch(held, begin, end, cuda.current, write, f"replayed {what}")
                if cuda.current != held.owner:
                    cuda.shared.add(key)


class FakeCuda:
    """PyTorch's CUDA as far as memsplit uses it; ``races`` and ``syncs`` are what happened."""

    def __init__(self, memory: int = 8 * 2**30) -> None:
        self.memory, self.current = memory, 0
        self.clocks: dict[int, dict[int, int]] = {HOST: {}, 0: {}}
        self.held: dict[int, Held] = {}
        self.shared: set[int] = set()
        """Memory of the device that another stream than its owner has used: looked at before every operation."""
        self.operations = 0
        self.waiting: list[tuple[int, dict[int, int]]] = []
        """Freed memory that streams were recorded for: bytes, and when each stream used it last."""
        self.peak: int | None = None
        """Most bytes of the device in use at once, from when it is set to 0."""
        self.races: list[str] = []
        self.syncs: list[str] = []
        self.graphs: list[Graph] = []
        """Those that were recorded to their end."""
        self.recording: Graph | None = None
        self.device_only = self.pinned = False

    def __enter__(self) -> FakeCuda:
        self._stack = ExitStack()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "mem_get_info": lambda place=None: (self.memory, self.memory),
            "reset_peak_memory_stats": lambda place=None: self.reset_peak(),
            "max_memory_allocated": lambda place=None: self.allocated() if self.peak is None else self.peak,
            "empty_cache": lambda: None,
            "synchronize": lambda place=None: [self.wait(stream, "synchronize") for stream in self.clocks if stream != HOST],
            "Stream": lambda place=None: self.new_stream(),
            "Event": lambda enable_timing=False: Event(self),
            "stream": self.using,
            "current_stream": lambda place=None: Stream(self, self.current),
            "_sleep": lambda cycles: None,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.record,
            "get_device_name": lambda place=None: "Fake GPU",
            "get_device_capability": lambda place=None: (9, 0),
            "get_device_properties": lambda place=None: SimpleNamespace(multi_processor_count=4, L2_cache_size=2**20),
        }.items():
            patch.setattr(torch.cuda, name, value)
        if hasattr(torch, "accelerator"):
            patch.setattr(torch.accelerator, "empty_host_cache", lambda: None, raising=False)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.of(tensor).recorded.add(stream.number))
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        self._stack.enter_context(_Access(self))
        self._stack.enter_context(_Places(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.operations = -1
        self.sweep()

    # Time

    def new_stream(self) -> Stream:
        number = len(self.clocks) - 1
        self.clocks[number] = {}
        return Stream(self, number)

    @contextmanager
    def using(self, stream: Stream):
        before, self.current = self.current, stream.number
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def record(self, graph: Graph, stream: Stream):
        assert self.recording is None, "one graph at a time"
        assert stream.number, "the stream that computes cannot be recorded"
        self.recording = graph
        try:
            with self.using(stream):
                yield
        finally:
            self.recording = None
        self.graphs.append(graph)

    def join(self, actor: int, seen: dict[int, int]) -> None:
        clock = self.clocks[actor]
        for other, at in seen.items():
            clock[other] = max(clock.get(other, 0), at)

    def tick(self, actor: int) -> dict[int, int]:
        """A new operation of an actor; whatever the host launches comes after what the host knows."""
        if actor != HOST:
            self.join(actor, self.clocks[HOST])
        clock = self.clocks[actor]
        clock[actor] = clock.get(actor, 0) + 1
        return clock

    def wait(self, stream: int, why: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        self.syncs.append(why)
        self.join(HOST, self.clocks[stream])

    # Memory

    def of(self, tensor: torch.Tensor) -> Held:
        storage = tensor.untyped_storage()
        found = self.held.get(storage._cdata)
        if found is None:
            found = Held(StorageWeakRef(storage), near=self.device_only, pinned=self.pinned, owner=self.current, nbytes=len(storage))
            self.held[storage._cdata] = found
        return found

    def reset_peak(self) -> None:
        if self.peak is not None:
            self.peak = self.allocated()

    def allocated(self) -> int:
        """Bytes of the device that are in use, or were recorded for a stream that the host does not know to be done with them."""
        alive = [one.alive.cdata for one in self.held.values() if one.near and not one.alive.expired()]
        known = self.clocks[HOST]
        self.waiting = [one for one in self.waiting if any(known.get(stream, 0) < at for stream, at in one[1].items())]
        freed = sum(nbytes for nbytes, _ in self.waiting)
        return freed + sum(len(torch.UntypedStorage._new_with_weak_ptr(one)) for one in alive)

    def sweep(self) -> None:
        """Forget what was freed; memory of the device must not be in use by a stream that the allocator does not know of."""
        self.operations += 1
        looked_at = self.shared if self.operations % 256 else [*self.held]
        expired = torch.UntypedStorage._expired
        for key in [key for key in looked_at if expired(self.held[key].alive.cdata)]:
            one = self.held.pop(key)
            self.shared.discard(key)
            if one.near and one.recorded:
                last = {actor: at for _, _, actor, at, _, _ in one.accesses if actor in one.recorded}
                self.waiting.append((one.nbytes, last))
            for _, _, actor, at, _, what in one.accesses:
                known = actor in (one.owner, HOST) or actor in one.recorded or self.clocks[one.owner].get(actor, 0) >= at
                if one.near and not known:
                    self.races.append(f"freed while stream {actor} uses it: {what}")

    def access(self, tensor: torch.Tensor, actor: int, write: bool, what: str) -> None:
        if not tensor.numel():
            return
        begin = tensor.data_ptr()
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        end = begin + span * tensor.element_size()
        held = self.of(tensor)
        if self.recording is not None and actor != HOST:
            self.recording.accesses[tensor.untyped_storage()._cdata, begin, end, write] = held, what
            return
        self.touch(held, begin, end, actor, write, what)
        if held.near and actor != held.owner:
            self.shared.add(tensor.untyped_storage()._cdata)

    def touch(self, held: Held, begin: int, end: int, actor: int, write: bool, what: str) -> None:
        clock, kept = self.clocks[actor], []
        for one in held.accesses:
            b, e, who, at, wrote, did = one
            ordered = clock.get(who, 0) >= at
            if b < end and begin < e and (write or wrote) and not ordered:
                self.races.append(f"{did} (stream {who}) and {what} (stream {actor})")
            covered = begin <= b and e <= end and ordered and (write or (not wrote and who == actor))
            if not covered:
                kept.append(one)
        kept.append((begin, end, actor, clock[actor], write, what))
        held.accesses = kept


class _Generator(torch.Generator):
    def __new__(cls, place: object = "cpu"):
        return super().__new__(cls)


class _Access(TorchDispatchMode):
    """Sees every operation with the memory that it reads and writes."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cuda, kwargs = self.cuda, dict(kwargs or {})
        cuda.sweep()
        read, written = [], []
        for index, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name) if index >= len(args) else args[index]
            into = written if argument.alias_info is not None and argument.alias_info.is_write else read
            into += [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, torch.Tensor)]
        given = [(one, cuda.of(one)) for one in (*read, *written)]
        out = func(*args, **kwargs)
        made = [one for one in (out if isinstance(out, list | tuple) else [out]) if isinstance(one, torch.Tensor)]
        memory = {one.untyped_storage()._cdata for one, _ in given}
        fresh = [one for one in made if one.untyped_storage()._cdata not in memory]
        if made and not fresh and not written:
            return out  # a view
        name = func._schema.name.removeprefix("aten::")
        places = {held.near for one, held in given if one.dim() or held.near}
        copies = name == "copy_" and len(places) == 2
        assert copies or len(places) < 2, f"{name} of tensors of host and device"
        near = True in places or (not places and cuda.device_only)
        before = cuda.device_only
        cuda.device_only = near
        for one in fresh:
            cuda.of(one)
            if cuda.recording is not None:
                cuda.recording.own.add(one.untyped_storage()._cdata)
        cuda.device_only = before
        if cuda.peak is not None:
            cuda.peak = max(cuda.peak, cuda.allocated())
        actor = cuda.current if near else HOST
        cuda.tick(actor)
        for one in read:
            cuda.access(one, actor, False, name)
        for one in (*written, *fresh):
            cuda.access(one, actor, True, name)
        if copies:
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if blocking or not all(held.pinned for _, held in given if not held.near):
                cuda.wait(actor, "a copy of pageable memory" if not blocking else "a copy that waits")
        elif near and name in WAITS:
            cuda.wait(actor, name)
        return out


class _Places(TorchFunctionMode):
    """Makes what is asked for on CUDA on the CPU, and remembers that it is on the device."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        cuda, kwargs = self.cuda, dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return self.moved(name, args, kwargs)
        if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") == "device":
            return DEVICE if cuda.of(args[0]).near else func(*args)
        if name == "numpy":
            assert not cuda.of(args[0]).near, "NumPy cannot read memory of the device"
        place = kwargs.get("device")
        near = place is not None and torch.device(place).type == "cuda"
        if near:
            kwargs["device"] = "cpu"
        before = cuda.device_only, cuda.pinned
        cuda.device_only, cuda.pinned = near or (place is None and cuda.device_only), bool(kwargs.pop("pin_memory", False))
        try:
            return func(*args, **kwargs)
        finally:
            cuda.device_only, cuda.pinned = before

    def moved(self, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        """``to``, ``cpu`` and ``cuda``: a copy that the host waits for, if the device is another one."""
        cuda, tensor = self.cuda, args[0]
        rest = [*args[1:], *kwargs.values()]
        dtype = next((one for one in rest if isinstance(one, torch.dtype)), tensor.dtype)
        places = [torch.device(one) for one in rest if isinstance(one, str | torch.device)]
        near = {"cpu": False, "cuda": True}.get(name, places[0].type == "cuda" if places else cuda.of(tensor).near)
        changed = tensor if dtype == tensor.dtype else tensor.type(dtype)
        if near == cuda.of(tensor).near:
            return changed
        before = cuda.device_only
        cuda.device_only = near
        try:
            made = torch.empty(tensor.shape, dtype=dtype)
        finally:
            cuda.device_only = before
        return made.copy_(changed)
