"""The link of the runtime: host memory, transfers that run beside the computation, and what waits for what.

On CUDA each direction is a stream of its own, host memory is pinned, and waiting is done by events on the device: nothing here makes the
host wait. On a CPU each direction is a thread that copies pieces and sleeps until the stated bandwidth allows the next one, so that
waiting is real and the order of events is that of the CUDA code.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch

Direction = Literal["to_device", "to_host"]
Pair = tuple[torch.Tensor, torch.Tensor]
"""A target and a source of one shape and dtype, both contiguous, so that a transfer is one copy of bytes."""

PIECE = 2**20
"""Bytes that an emulated link copies at once: 1 ms at 1 GB/s, ten times what a sleep may be late by."""

OCCUPIED = 2_000_000
"""Cycles of a GPU, about a millisecond: tens of launches."""

ALIGNMENT = 512
"""Bytes that a tensor in a block starts at a multiple of, as PyTorch's own do."""

LATE = 60.0
"""Seconds after which a wait for the emulated link looks whether its threads are still there."""


class HostMemory(Protocol):
    """Where tensors of the host are cut from."""

    @property
    def held(self) -> int:
        """Bytes that are kept for them, as long as one of them lives."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without values."""


class Transfers(Protocol):
    """What the executed plans ask of a link; tickets and marks are its own."""

    device: torch.device

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that transfers reach at full speed, until the next ``restart``."""

    def lasting(self, expected: int) -> HostMemory:
        """The same for longer: ``expected`` [B] in all."""

    def send(self, direction: Direction, pairs: Sequence[Pair], after: Iterable[Any] = ()) -> Any:
        """Copy, after all earlier transfers of this direction and after the tickets and marks ``after``; returns a ticket at once."""

    def wait(self, ticket: Any) -> None:
        """What is computed from now on comes after the transfer."""

    def finish(self, ticket: Any) -> None:
        """The host goes on after the transfer."""

    def mark(self) -> Any:
        """What has been computed up to now; None where that is done already."""

    def sent(self, direction: Direction) -> int:
        """Bytes sent so far."""

    def rate(self, direction: Direction) -> float | None:
        """Bytes per second while the direction was busy; None if it was not, or where it is not known."""

    def clock(self) -> Any:
        """A point in time of the computation, for ``elapsed``."""

    def elapsed(self, points: Sequence[Any]) -> list[float]:
        """Seconds between points in time that follow each other; waits for the last."""

    def occupy(self) -> None:
        """Keep the computation busy for about a millisecond, if the host would otherwise be too slow in giving it work."""

    def restart(self, tensors: Sequence[int] = (), most: float = math.inf) -> None:
        """Count bytes and busy time from now on; nothing is on its way.

        ``host`` will give tensors of so many bytes, from memory that it gave before unless all of it would then be above ``most`` [B].
        """

    def trim(self) -> None:
        """Give memory back that is kept for later though nothing is in it."""

    def close(self) -> None:
        """End what runs beside the computation."""


@dataclass(slots=True, eq=False)
class _Ticket:
    """An emulated transfer: whether it is done, and when."""

    done: threading.Event = field(default_factory=threading.Event)
    finished: float = 0.0


@dataclass(slots=True, eq=False)
class _Job:
    pairs: list[tuple[Any, Any]]
    after: list[_Ticket]
    ticket: _Ticket
    queued: float


class _Lane(threading.Thread):
    """One direction of an emulated link.

    Transfer i of n_i bytes may not end before e_i = max(e_{i-1}, queued_i, after_i) + n_i / bandwidth. As e_i counts on and not the time
    when a sleep ended, late sleeps do not add up.
    """

    def __init__(self, bandwidth: float) -> None:
        super().__init__(daemon=True, name="memsplit-link")
        self.bandwidth = bandwidth
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.sent = 0
        self.busy = 0.0
        self.failed: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        end = ended = 0.0
        while (job := self.jobs.get()) is not None:
            try:
                for ticket in job.after:
                    ticket.done.wait()
                begin = max(end, job.queued, *(ticket.finished for ticket in job.after))
                nbytes = self._copy(job.pairs, begin)
                end = begin + nbytes / self.bandwidth
                now = time.perf_counter()
                self.busy += now - max(begin, ended)
                ended = now
                self.sent += nbytes
            except BaseException as error:  # told to whoever waits
                self.failed = error
            job.ticket.finished = end
            job.ticket.done.set()

    def _copy(self, pairs: list[tuple[Any, Any]], begin: float) -> int:
        done = 0
        for target, source in pairs:
            for at in range(0, len(source), PIECE):
                piece = source[at : at + PIECE]
                target[at : at + len(piece)] = piece  # NumPy copies bytes without the interpreter's lock
                done += len(piece)
                rest = begin + done / self.bandwidth - time.perf_counter()
                # A slow link may be closed meanwhile: nobody waits for what is left of it.
                while rest > 0 and not self.ended.wait(min(rest, LATE)):
                    rest = begin + done / self.bandwidth - time.perf_counter()
                if self.ended.is_set():
                    return done
        return done


def _as_bytes(tensor: torch.Tensor) -> Any:
    if not tensor.is_contiguous():
        raise ValueError("a transfer copies contiguous memory; this is a defect of memsplit, please report it")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class _Unpinned:
    """PyTorch's own; a tensor's memory goes with it."""

    held = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without values."""
        return torch.empty(tuple(shape), dtype=dtype)


class EmulatedTransfers:
    """A link of ``bandwidth`` [B/s] each way between two parts of a CPU's memory; inf: as fast as it copies."""

    def __init__(self, bandwidth: float = math.inf) -> None:
        self.device, self.bandwidth = torch.device("cpu"), bandwidth
        self._start()

    def _start(self) -> None:
        self._lanes: dict[Direction, _Lane] = {"to_device": _Lane(self.bandwidth), "to_host": _Lane(self.bandwidth)}
        self._sent: dict[Direction, int] = {"to_device": 0, "to_host": 0}
        self._last: dict[Direction, _Ticket] = {}
        for lane in self._lanes.values():
            lane.start()

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory like any other."""
        return torch.empty(tuple(shape), dtype=dtype)

    def lasting(self, expected: int) -> HostMemory:
        """Memory like any other."""
        return _Unpinned()

    def send(self, direction: Direction, pairs: Sequence[Pair], after: Iterable[Any] = ()) -> _Ticket:
        """As in ``Transfers``; marks are None, as what was computed before this call is done."""
        lane, ticket = self._lanes[direction], _Ticket()
        copies = [(_as_bytes(target), _as_bytes(source)) for target, source in pairs if source.numel()]
        self._sent[direction] += sum(len(source) for _, source in copies)
        self._last[direction] = ticket
        lane.jobs.put(_Job(copies, [one for one in after if one is not None], ticket, time.perf_counter()))
        return ticket

    def wait(self, ticket: Any) -> None:
        """Returns when the transfer is done; RuntimeError if it failed."""
        if ticket is None:
            return
        while not ticket.done.wait(LATE):
            if not all(lane.is_alive() for lane in self._lanes.values()):
                raise RuntimeError("the emulated link's thread has ended; this is a defect of memsplit, please report it")
        for lane in self._lanes.values():
            if lane.failed is not None:
                raise RuntimeError("a transfer over the emulated link failed") from lane.failed

    def finish(self, ticket: Any) -> None:
        """The host is what computes."""
        self.wait(ticket)

    def mark(self) -> None:
        """Nothing: a CPU has computed when the call returns."""

    def sent(self, direction: Direction) -> int:
        """Bytes given to the lane so far."""
        return self._sent[direction]

    def rate(self, direction: Direction) -> float | None:
        """Bytes per second of busy time."""
        lane = self._lanes[direction]
        return lane.sent / lane.busy if lane.busy > 0 else None

    def clock(self) -> float:
        """Seconds of the process's clock."""
        return time.perf_counter()

    def elapsed(self, points: Sequence[Any]) -> list[float]:
        """Differences."""
        return [after - before for before, after in pairwise(points)]

    def occupy(self) -> None:
        """Nothing: a CPU does the work itself."""

    def trim(self) -> None:
        """Nothing is kept."""

    def restart(self, tensors: Sequence[int] = (), most: float = math.inf) -> None:
        """As in ``Transfers``; what a run that ended early has left in the queue is dropped."""
        if any(not ticket.done.is_set() for ticket in self._last.values()) or any(lane.failed for lane in self._lanes.values()):
            self.close()
        if not all(lane.is_alive() for lane in self._lanes.values()):
            self._start()
        for name, lane in self._lanes.items():
            self._sent[name] = lane.sent = 0
            lane.busy = 0.0

    def close(self) -> None:
        """End both threads, at once."""
        for lane in self._lanes.values():
            lane.ended.set()
            lane.jobs.put(None)
        for lane in self._lanes.values():
            lane.join(LATE)


class Blocks:
    """Where tensors lie in blocks of powers of two: sizes [B] of the blocks, what is used of each, and what is still expected.

    PyTorch rounds each pinned allocation up to a power of two, which for the keys and values of a layer may be twice what is needed. A new
    block is the largest power of two that what is still ``expected`` [B] fills, so that all of them together waste about a tensor each.
    """

    def __init__(self, expected: int, sizes: Iterable[int] = ()) -> None:
        self.sizes, self.expected = list(sizes), expected
        self.used = [0] * len(self.sizes)

    @property
    def held(self) -> int:
        """Bytes of all blocks."""
        return sum(self.sizes)

    def place(self, nbytes: int) -> tuple[int, int]:
        """Block and byte of a tensor: in the first block that has room, or in a new one."""
        found = next((i for i, size in enumerate(self.sizes) if self.used[i] + nbytes <= size), None)
        if found is None:
            filled = 1 << (max(self.expected, 1).bit_length() - 1)
            self.sizes.append(max(filled, 1 << (max(nbytes, ALIGNMENT) - 1).bit_length()))
            self.used.append(0)
            found = len(self.sizes) - 1
        begin = self.used[found]
        self.used[found] += aligned(nbytes)
        self.expected -= aligned(nbytes)
        return found, begin


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes of a block."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def blocks_of(tensors: Sequence[int], blocks: Iterable[int] = ()) -> Blocks:
    """The blocks of which tensors of so many bytes are cut, if there are ``blocks`` [B] already."""
    found = Blocks(sum(map(aligned, tensors)), blocks)
    for nbytes in tensors:
        if nbytes:
            found.place(nbytes)
    return found


class Arena:
    """Host memory in blocks, from which tensors are cut; a block is used again after ``restart``, as to pin memory takes seconds.

    ``make``: a block of so many bytes.
    """

    def __init__(self, make: Callable[[int], torch.Tensor], expected: int = 0) -> None:
        self.make, self.blocks = make, Blocks(expected)
        self.memory: list[torch.Tensor] = []

    @property
    def held(self) -> int:
        """Bytes of all blocks."""
        return sum(len(block) for block in self.memory)

    def restart(self, tensors: Sequence[int], most: float) -> bool:
        """Cut tensors of so many bytes anew, as nobody reads what was cut before.

        Whether all blocks were given back, as with the new ones they would be more than ``most`` [B].
        """
        kept = [len(block) for block in self.memory]
        given_back = bool(kept) and blocks_of(tensors, kept).held > most
        if given_back:
            self.memory, kept = [], []
        self.blocks = Blocks(sum(map(aligned, tensors)), kept)
        return given_back

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the first block that has room, or of a new one."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        place, begin = self.blocks.place(nbytes)
        if place == len(self.memory):
            self.memory.append(self.make(self.blocks.sizes[place]))
        return self.memory[place][begin : begin + nbytes].view(dtype).view(tuple(shape))


class CudaTransfers:
    """The link of a CUDA device: one stream for each direction beside the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda: Any = torch.cuda  # its streams and events have no types in some versions of PyTorch
        self._streams = {name: self._cuda.Stream(device) for name in ("to_device", "to_host")}
        self._sent: dict[Direction, int] = {"to_device": 0, "to_host": 0}
        self._arena = self.lasting(0)

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Pinned memory, which copies need to run beside the computation."""
        return self._arena.take(shape, dtype)

    def lasting(self, expected: int) -> Arena:
        """Pinned, too."""
        return Arena(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), expected)

    def send(self, direction: Direction, pairs: Sequence[Pair], after: Iterable[Any] = ()) -> Any:
        """As in ``Transfers``; tickets and marks are events."""
        stream = self._streams[direction]
        with self._cuda.stream(stream):
            for event in after:
                if event is not None:
                    stream.wait_event(event)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                self._sent[direction] += source.numel() * source.element_size()
                # Memory of a temporary must not be used again before the copy has read it.
                (target if direction == "to_device" else source).record_stream(stream)
            event = self._cuda.Event()
            event.record(stream)
        return event

    def wait(self, ticket: Any) -> None:
        """The stream that computes waits, the host does not."""
        if ticket is not None:
            self._cuda.current_stream(self.device).wait_event(ticket)

    def finish(self, ticket: Any) -> None:
        """The only wait of the host between two steps, for attention on the host."""
        if ticket is not None:
            ticket.synchronize()

    def mark(self) -> Any:
        """An event behind all that was given to the stream that computes."""
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self.device))
        return event

    def sent(self, direction: Direction) -> int:
        """Bytes given to the stream so far."""
        return self._sent[direction]

    def rate(self, direction: Direction) -> float | None:
        """Not known: timing each transfer would need events of its own."""
        return None

    def clock(self) -> Any:
        """An event that has a time, on the stream that computes."""
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self.device))
        return event

    def elapsed(self, points: Sequence[Any]) -> list[float]:
        """Seconds between events."""
        if points:
            points[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(points)]

    def occupy(self) -> None:
        """PyTorch's own kernel that waits; what follows is then in the queue before it can begin, as in a run that the link holds up."""
        if (wait := getattr(self._cuda, "_sleep", None)) is not None:  # not public, but PyTorch's tests rest on it
            wait(OCCUPIED)

    def trim(self) -> None:
        """Neither of the device nor pinned."""
        free_cached()

    def restart(self, tensors: Sequence[int] = (), most: float = math.inf) -> None:
        """As in ``Transfers``."""
        self._synchronize()
        if self._arena.restart(tensors, most):
            free_cached()
        self._sent = {"to_device": 0, "to_host": 0}

    def _synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Wait for what is queued, and free its memory."""
        self._synchronize()
        self._arena = self.lasting(0)


def free_cached() -> None:
    """Give memory back that PyTorch keeps for later, of the device and pinned: other processes, and other LLMs, need it."""
    torch.cuda.empty_cache()
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def timed(transfers: Transfers, work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of ``repeats`` runs of ``work``, which must end with what it waits for; one more warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        transfers.occupy()
        begin = transfers.clock()
        work()
        seconds += transfers.elapsed([begin, transfers.clock()])
    return seconds
