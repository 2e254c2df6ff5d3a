"""Where the executed plans keep the state of each layer, and what crosses the link for it.

All memory is taken through ``Memory``, which also counts without taking any: what a plan needs is found by building its state on
PyTorch's device without memory, so that there is no second formula for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from ._decoder import Decoder, Weights, attention
from ._link import Pair, Transfers
from .plans import Run

Whole = tuple[torch.Tensor, torch.Tensor]


class Memory:
    """Gives memory and counts it [B]; without a link it only counts, on PyTorch's device without memory."""

    def __init__(self, dtype: torch.dtype, transfers: Transfers | None) -> None:
        self.dtype, self.transfers = dtype, transfers
        self.device_bytes = 0
        self.host_sizes: list[int] = []
        """Bytes of each tensor on the host."""

    @property
    def host_bytes(self) -> int:
        """Of all tensors on the host."""
        return sum(self.host_sizes)

    def device(self, *shape: int) -> torch.Tensor:
        """Memory of the device."""
        where = torch.device("meta") if self.transfers is None else self.transfers.device
        found = torch.empty(shape, dtype=self.dtype, device=where)
        self.device_bytes += found.numel() * found.element_size()
        return found

    def host(self, *shape: int) -> torch.Tensor:
        """Memory of the host."""
        found = torch.empty(shape, dtype=self.dtype, device="meta") if self.transfers is None else self.transfers.host(shape, self.dtype)
        self.host_sizes.append(found.numel() * found.element_size())
        return found


class State(Protocol):
    """Where keys, values and inputs are kept. A unit is (layer, GPU batch); ``turn`` counts units and picks the slot."""

    fluid: bool
    hidden: Hidden
    stored: dict[tuple[int, int], Any]
    """The last store of each unit, which its next load waits for."""

    def prompt(self, unit: tuple[int, int], turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory [prompt, requests, width] that prefill writes keys and values to."""

    def keep_prompt(self, unit: tuple[int, int], turn: int, x: torch.Tensor) -> None:
        """Put what ``prompt`` gave, and the inputs ``x``, where they are kept."""

    def load_inputs(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> list[Any]:
        """Send the inputs that a unit recomputes from; tickets."""

    def load_state(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> Any:
        """Send the keys and values of tokens before ``place``; a ticket, after which the unit may write to its slot."""

    def restore(self, unit: tuple[int, int], turn: int, place: int, weights: Weights, inputs: list[Any]) -> None:
        """Recompute, each part as it arrives."""

    def token(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        """Memory [1, requests, width] for the new token's keys and values, after ``load_state`` has arrived."""

    def attend(self, unit: tuple[int, int], turn: int, place: int, queries: torch.Tensor) -> torch.Tensor:
        """What queries [requests x KV heads, group, head_dim] of the token at ``place`` see, once its keys and values are there."""

    def whole(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        """All keys and values [tokens, requests, width] as they were attended to, for tests."""

    def keep_token(self, unit: tuple[int, int], turn: int, place: int, x: torch.Tensor) -> None:
        """Put the new token's keys and values, or its input ``x``, where they are kept."""


class Hidden:
    """The hidden states of each GPU batch between two layers, [tokens, requests, hidden]: on the device."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}

    def keep(self, batch: int, x: torch.Tensor) -> None:
        """Put them where they are kept."""
        self.held[batch] = x

    def fetch(self, batch: int) -> None:
        """Send what is not on the device; each ``take`` comes after one."""

    def take(self, batch: int) -> torch.Tensor:
        """Have them on the device."""
        return self.held.pop(batch)


class Linked:
    """What uses the link, if it was not only counted."""

    transfers: Transfers | None

    @property
    def link(self) -> Transfers:
        if self.transfers is None:
            raise RuntimeError("this state was only counted; this is a defect of memsplit, please report it")
        return self.transfers


class _Contiguous(ABC):
    """Keys and values of a unit that are one piece of the device's memory when they are attended to."""

    def __init__(self) -> None:
        self.hidden = Hidden()
        self.stored: dict[tuple[int, int], Any] = {}

    @abstractmethod
    def whole(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        """As in ``State``."""

    def token(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        keys, values = self.whole(unit, turn, place)
        return keys[-1:], values[-1:]

    def attend(self, unit: tuple[int, int], turn: int, place: int, queries: torch.Tensor) -> torch.Tensor:
        return attention(queries, *self.whole(unit, turn, place))


class DeviceState(_Contiguous):
    """All keys and values on the device."""

    fluid = True

    def __init__(self, memory: Memory, decoder: Decoder, run: Run) -> None:
        super().__init__()
        self.prompt_rows = run.prompt
        self.held = [
            [(memory.device(run.rows, size, decoder.key_width), memory.device(run.rows, size, decoder.key_width)) for size in run.sizes]
            for _ in range(decoder.llm.num_hidden_layers)
        ]

    def prompt(self, unit: tuple[int, int], turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.held[unit[0]][unit[1]]
        return keys[: self.prompt_rows], values[: self.prompt_rows]

    def keep_prompt(self, unit: tuple[int, int], turn: int, x: torch.Tensor) -> None:
        """It is there already."""

    def load_inputs(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> list[Any]:
        return []

    def load_state(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> Any:
        return None

    def restore(self, unit: tuple[int, int], turn: int, place: int, weights: Weights, inputs: list[Any]) -> None:
        """Nothing to recompute."""

    def whole(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        keys, values = self.held[unit[0]][unit[1]]
        return keys[: place + 1], values[: place + 1]

    def keep_token(self, unit: tuple[int, int], turn: int, place: int, x: torch.Tensor) -> None:
        """It is there already."""


@dataclass(slots=True, eq=False)
class _Slot:
    keys: torch.Tensor
    values: torch.Tensor
    inputs: torch.Tensor
    stored: Any = None


class HostState(_Contiguous, Linked):
    """Keys and values on the host; of the first ``split`` tokens the inputs, too, in ``chunks``.

    The keys and values of recomputed tokens stay on the host beside the inputs, as in KVPR. GPU batches are of one size.
    """

    def __init__(self, memory: Memory, decoder: Decoder, run: Run, *, split: int = 0, chunks: int = 1, fluid: bool = False) -> None:
        super().__init__()
        self.decoder, self.transfers, self.run, self.fluid, self.split = decoder, memory.transfers, run, fluid, split
        ends = [split * part // chunks for part in range(chunks + 1)]
        self.chunks = [slice(a, b) for a, b in pairwise(ends) if b > a]
        size, width, hidden = run.sizes[0], decoder.key_width, decoder.llm.hidden_size
        units = [(layer, batch) for layer in range(decoder.llm.num_hidden_layers) for batch in range(len(run.sizes))]
        self.host = {unit: (memory.host(run.rows, size, width), memory.host(run.rows, size, width)) for unit in units}
        self.host_inputs = {unit: memory.host(split, size, hidden) for unit in units}
        self.slots = [
            _Slot(memory.device(run.rows, size, width), memory.device(run.rows, size, width), memory.device(split, size, hidden))
            for _ in range(2)
        ]

    def prompt(self, unit: tuple[int, int], turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self.slots[turn % 2]
        self.link.wait(slot.stored)
        return slot.keys[: self.run.prompt], slot.values[: self.run.prompt]

    def keep_prompt(self, unit: tuple[int, int], turn: int, x: torch.Tensor) -> None:
        slot, prompt = self.slots[turn % 2], self.run.prompt
        pairs: list[Pair] = [(far[:prompt], here[:prompt]) for far, here in zip(self.host[unit], (slot.keys, slot.values), strict=True)]
        if self.split:
            # A copy in memory that stays, so that x itself need not outlive its layer.
            slot.inputs.copy_(x[: self.split])
            pairs.append((self.host_inputs[unit], slot.inputs))
        slot.stored = self.stored[unit] = self.link.send("to_host", pairs, [self.link.mark()])

    def load_inputs(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> list[Any]:
        slot, here = self.slots[turn % 2], self.host_inputs[unit]
        # Inputs are those of the prompt, whose stores prefill waited for.
        return [self.link.send("to_device", [(slot.inputs[part], here[part])], [mark]) for part in self.chunks]

    def load_state(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> Any:
        slot, begin = self.slots[turn % 2], self.split
        pairs = [
            (target[begin:place], source[begin:place]) for target, source in zip((slot.keys, slot.values), self.host[unit], strict=True)
        ]
        # Without a load, too, the slot is used again only when its last token has left.
        return self.link.send("to_device", pairs, [mark, slot.stored, self.stored[unit]]) if place > begin else slot.stored

    def restore(self, unit: tuple[int, int], turn: int, place: int, weights: Weights, inputs: list[Any]) -> None:
        slot = self.slots[turn % 2]
        for part, ticket in zip(self.chunks, inputs, strict=True):
            self.link.wait(ticket)
            self.decoder.keys_values(weights, slot.inputs[part], part, slot.keys[part], slot.values[part])

    def whole(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        slot = self.slots[turn % 2]
        return slot.keys[: place + 1], slot.values[: place + 1]

    def keep_token(self, unit: tuple[int, int], turn: int, place: int, x: torch.Tensor) -> None:
        slot = self.slots[turn % 2]
        pairs = [(far[place], here[place]) for far, here in zip(self.host[unit], (slot.keys, slot.values), strict=True)]
        slot.stored = self.stored[unit] = self.link.send("to_host", pairs, [self.link.mark()])


FORMS = ("kv_gpu", "act_gpu", "kv_host", "act_host")
"""What a block may be, in the order of ``CachePlan``."""


class _Rows:
    """The tokens of one GPU batch that are held in one form, by position: ``flat`` [n] = position x requests + request."""

    def __init__(self, forms: torch.Tensor, form: int, device: torch.device) -> None:
        chosen = forms == form
        requests = forms.shape[1]
        flat = chosen.reshape(-1).nonzero()[:, 0]
        self.before: list[int] = [0, *chosen.sum(dim=1).cumsum(dim=0).tolist()]
        """Rows of tokens before each position."""
        self.count = len(flat)
        self.flat = flat.to(device)
        self.positions = (flat // requests).to(device)


class CacheState(_Contiguous, Linked):
    """Blocks of tokens of each request as keys and values or as inputs, on the device or on the host (HybridServe).

    ``forms``: for each GPU batch the form of every token [rows, requests]. Each form's rows lie in the order of positions, so that what a
    step needs is one piece of memory. Keys and values are put together in a workspace that all units share.
    """

    fluid = True

    def __init__(self, memory: Memory, decoder: Decoder, run: Run, forms: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.decoder, self.transfers, self.run = decoder, memory.transfers, run
        device = torch.device("cpu") if memory.transfers is None else decoder.device
        self.rows = [[_Rows(one, form, device) for form in range(len(FORMS))] for one in forms]
        width, hidden, layers = decoder.key_width, decoder.llm.hidden_size, decoder.llm.num_hidden_layers
        most = [max(rows[form].count for rows in self.rows) for form in range(len(FORMS))]
        self.pools: dict[tuple[int, int], tuple[tuple[torch.Tensor, ...], ...]] = {}
        for layer in range(layers):
            for batch, (kv_gpu, act_gpu, kv_host, act_host) in enumerate(self.rows):
                self.pools[layer, batch] = (
                    (memory.device(kv_gpu.count, width), memory.device(kv_gpu.count, width)),
                    (memory.device(act_gpu.count, hidden),),
                    (memory.host(kv_host.count, width), memory.host(kv_host.count, width)),
                    (memory.host(act_host.count, hidden),),
                )
        self.slots = [_Slot(memory.device(most[2], width), memory.device(most[2], width), memory.device(most[3], hidden)) for _ in range(2)]
        self.workspace = tuple(memory.device(run.rows * max(run.sizes), width) for _ in range(2))
        self.recomputed = tuple(memory.device(max(most[1], most[3]), width) for _ in range(2))

    def _workspace(self, batch: int, begin: int, end: int) -> list[torch.Tensor]:
        size = self.run.sizes[batch]
        return [one[begin * size : end * size] for one in self.workspace]

    def prompt(self, unit: tuple[int, int], turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.link.wait(self.slots[turn % 2].stored)
        size = self.run.sizes[unit[1]]
        keys, values = (one.view(self.run.prompt, size, -1) for one in self._workspace(unit[1], 0, self.run.prompt))
        return keys, values

    def keep_prompt(self, unit: tuple[int, int], turn: int, x: torch.Tensor) -> None:
        self._keep(unit, turn, 0, self.run.prompt, x)

    def keep_token(self, unit: tuple[int, int], turn: int, place: int, x: torch.Tensor) -> None:
        self._keep(unit, turn, place, place + 1, x)

    def _keep(self, unit: tuple[int, int], turn: int, begin: int, end: int, x: torch.Tensor) -> None:
        """Put tokens from ``begin`` to ``end`` into the pools: on the device at once, to the host by way of the slot."""
        slot, batch = self.slots[turn % 2], unit[1]
        fresh = [*self._workspace(batch, begin, end), x.reshape(-1, x.shape[-1])]
        staged = ((), (), (slot.keys, slot.values), (slot.inputs,))
        pairs: list[Pair] = []
        for form, rows in enumerate(self.rows[batch]):
            first, last = rows.before[begin], rows.before[end]
            if first == last:
                continue
            chosen = rows.flat[first:last] - begin * self.run.sizes[batch]
            sources = fresh[:2] if form in (0, 2) else fresh[2:]
            for index, (pool, source) in enumerate(zip(self.pools[unit][form], sources, strict=True)):
                target = staged[form][index][: last - first] if staged[form] else pool[first:last]
                torch.index_select(source, 0, chosen, out=target)
                if staged[form]:
                    pairs.append((pool[first:last], target))
        if pairs:
            slot.stored = self.stored[unit] = self.link.send("to_host", pairs, [self.link.mark()])

    def load_inputs(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> list[Any]:
        count, slot = self.rows[unit[1]][3].before[place], self.slots[turn % 2]
        if not count:
            return []
        pairs = [(slot.inputs[:count], self.pools[unit][3][0][:count])]
        return [self.link.send("to_device", pairs, [mark, slot.stored, self.stored.get(unit)])]

    def load_state(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> Any:
        count, slot = self.rows[unit[1]][2].before[place], self.slots[turn % 2]
        if not count:
            return slot.stored  # the slot is used again only when its last tokens have left
        pairs = [(target[:count], source[:count]) for target, source in zip((slot.keys, slot.values), self.pools[unit][2], strict=True)]
        return self.link.send("to_device", pairs, [mark, slot.stored, self.stored.get(unit)])

    def restore(self, unit: tuple[int, int], turn: int, place: int, weights: Weights, inputs: list[Any]) -> None:
        near, far = self.pools[unit][1][0], self.slots[turn % 2].inputs
        for form, held in ((1, near), (3, far)):
            rows = self.rows[unit[1]][form]
            count = rows.before[place]
            if not count:
                continue
            if form == 3:
                self.link.wait(inputs[0])
            keys, values = (one[:count] for one in self.recomputed)
            self.decoder.keys_values(weights, held[:count, None], rows.positions[:count], keys[:, None], values[:, None])
            self._insert(unit, rows.flat[:count], (keys, values))

    def _insert(self, unit: tuple[int, int], flat: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        for whole, part in zip(self._workspace(unit[1], 0, self.run.rows), parts, strict=True):
            whole.index_copy_(0, flat, part[: len(flat)])

    def token(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        slot = self.slots[turn % 2]
        for form, parts in ((0, self.pools[unit][0]), (2, (slot.keys, slot.values))):
            rows = self.rows[unit[1]][form]
            if rows.before[place]:
                self._insert(unit, rows.flat[: rows.before[place]], parts)
        return super().token(unit, turn, place)

    def whole(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        keys, values = (one.view(place + 1, self.run.sizes[unit[1]], -1) for one in self._workspace(unit[1], 0, place + 1))
        return keys, values
