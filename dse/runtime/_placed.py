"""FlexGen's placement: shares of the KV cache and of hidden states on the device, the rest on the host, attention on either.

The cache is divided by KV heads of all requests, as FlexGen does: a head's keys and values, and its attention, are in one place. What is
on the host crosses the link to be attended to, or its queries cross and the host's processor attends to them; then the host waits for
the device once a layer, as in FlexGen. Hidden states are divided by requests; those of the GPU batch that is computed are on the device.
"""

from __future__ import annotations

from typing import Any

import torch

from ._decoder import Decoder, Weights, attention
from ._link import Pair
from ._states import Hidden, Linked, Memory, Whole
from .plans import AttentionOn, Run


class PlacedHidden(Hidden, Linked):
    """Of each GPU batch the first requests' hidden states stay on the device, the others' go to the host between two layers."""

    def __init__(self, memory: Memory, decoder: Decoder, run: Run, near: int) -> None:
        super().__init__()
        self.transfers, self.near = memory.transfers, near
        shape = (run.prompt, run.sizes[0] - near, decoder.llm.hidden_size)
        self.host = [memory.host(*shape) for _ in run.sizes]
        # Two of each: one is used while the other one is sent.
        self.coming, self.leaving = ([memory.device(*shape) for _ in range(2)] for _ in range(2))
        self.fetched: dict[int, tuple[torch.Tensor, Any]] = {}
        self.stored: list[tuple[int, Any]] = [(0, None)] * len(run.sizes)
        self.left: list[Any] = [None, None]
        """The last store from each of ``leaving``."""
        self.kept = self.turn = 0

    def keep(self, batch: int, x: torch.Tensor) -> None:
        self.held[batch] = x[:, : self.near].clone()
        place = self.kept % 2
        self.kept += 1
        self.link.wait(self.left[place])
        there = self.leaving[place][: len(x)]
        there.copy_(x[:, self.near :])
        self.left[place] = self.link.send("to_host", [(self.host[batch][: len(x)], there)], [self.link.mark()])
        self.stored[batch] = (len(x), self.left[place])

    def fetch(self, batch: int) -> None:
        rows, stored = self.stored[batch]
        slot = self.coming[self.turn % 2][:rows]
        self.turn += 1
        self.fetched[batch] = (slot, self.link.send("to_device", [(slot, self.host[batch][:rows])], [self.link.mark(), stored]))

    def take(self, batch: int) -> torch.Tensor:
        slot, ticket = self.fetched.pop(batch)
        self.link.wait(ticket)
        near = self.held.pop(batch)
        return torch.cat([near, slot], dim=1) if self.near else slot


class PlacedState(Linked):
    """The first KV heads of a GPU batch's requests on the device, the others on the host, where ``attention`` on "host" is computed."""

    fluid = True

    def __init__(self, memory: Memory, decoder: Decoder, run: Run, *, cache: float, hidden: float, attention: AttentionOn) -> None:
        self.transfers, self.run, self.on_host = memory.transfers, run, attention == "host"
        llm, size, width = decoder.llm, run.sizes[0], decoder.llm.head_dim
        heads = size * llm.num_key_value_heads
        self.heads = round(cache * heads)
        near, far = self.heads * width, (heads - self.heads) * width
        units = [(layer, batch) for layer in range(llm.num_hidden_layers) for batch in range(len(run.sizes))]
        self.near = {unit: (memory.device(run.rows, near), memory.device(run.rows, near)) for unit in units}
        self.far = {unit: (memory.host(run.rows, far), memory.host(run.rows, far)) for unit in units}
        rows = run.prompt if self.on_host else run.rows
        self.slots = [(memory.device(rows, far), memory.device(rows, far)) for _ in range(2)]
        self.sent: list[Any] = [None, None]
        """The last store from each slot."""
        self.stored: dict[tuple[int, int], Any] = {}
        self.fresh = (memory.device(1, size, decoder.key_width), memory.device(1, size, decoder.key_width))
        self.prompts = tuple(memory.device(run.prompt, near + far) for _ in range(2 if near and far else 0))
        asked = (heads - self.heads, llm.num_attention_heads // llm.num_key_value_heads, width) if self.on_host else (0,)
        self.queries, self.answers, self.seen = memory.host(*asked), memory.host(*asked), memory.device(*asked)
        # The only GPU batch is the one that is computed.
        kept = size if len(run.sizes) == 1 else round(hidden * size)
        self.hidden = Hidden() if kept == size else PlacedHidden(memory, decoder, run, kept)

    def prompt(self, unit: tuple[int, int], turn: int) -> Whole:
        self.link.wait(self.sent[turn % 2])
        keys, values = self.prompts or (self.near[unit] if self.near[unit][0].numel() else self.slots[turn % 2])
        shape = (self.run.prompt, self.run.sizes[0], -1)
        return keys[: self.run.prompt].view(shape), values[: self.run.prompt].view(shape)

    def keep_prompt(self, unit: tuple[int, int], turn: int, x: torch.Tensor) -> None:
        rows, slot = self.run.prompt, self.slots[turn % 2]
        for whole, near, there in zip(self.prompts, self.near[unit], slot, strict=False):
            cut = near.shape[1]
            near[:rows].copy_(whole[:, :cut])
            there[:rows].copy_(whole[:, cut:])
        self._store(unit, turn, [(far[:rows], there[:rows]) for far, there in zip(self.far[unit], slot, strict=True)])

    def _store(self, unit: tuple[int, int], turn: int, pairs: list[Pair]) -> None:
        if self.far[unit][0].numel():
            self.sent[turn % 2] = self.stored[unit] = self.link.send("to_host", pairs, [self.link.mark()])

    def load_inputs(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> list[Any]:
        return []

    def load_state(self, unit: tuple[int, int], turn: int, place: int, mark: Any) -> Any:
        if self.on_host or not self.far[unit][0].numel():
            return self.sent[turn % 2]
        pairs = [(there[:place], far[:place]) for there, far in zip(self.slots[turn % 2], self.far[unit], strict=True)]
        return self.link.send("to_device", pairs, [mark, self.sent[turn % 2], self.stored[unit]])

    def restore(self, unit: tuple[int, int], turn: int, place: int, weights: Weights, inputs: list[Any]) -> None:
        """Nothing to recompute."""

    def token(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        return self.fresh

    def attend(self, unit: tuple[int, int], turn: int, place: int, queries: torch.Tensor) -> torch.Tensor:
        count, row = place + 1, 0 if self.on_host else place
        slot, pairs = self.slots[turn % 2], []
        for fresh, near, there, far in zip(self.fresh, self.near[unit], slot, self.far[unit], strict=True):
            new, cut = fresh.view(-1), near.shape[1]
            near[place].copy_(new[:cut])
            there[row].copy_(new[cut:])
            pairs.append((far[place], there[row]))
        asked = queries[self.heads :]
        if self.on_host:
            pairs.append((self.queries, asked.contiguous()))
        self._store(unit, turn, pairs)
        parts = [attention(queries[: self.heads], *(one[:count] for one in self.near[unit]))] if self.heads else []
        if len(asked):
            parts.append(self._on_host(unit, count) if self.on_host else attention(asked, *(one[:count] for one in slot)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _on_host(self, unit: tuple[int, int], count: int) -> torch.Tensor:
        """In single precision, as FlexGen does, since few processors multiply halves fast."""
        self.link.finish(self.stored[unit])
        keys, values = (one[:count].float() for one in self.far[unit])
        self.answers.copy_(attention(self.queries.float(), keys, values))
        self.link.wait(self.link.send("to_device", [(self.seen, self.answers)], [self.link.mark()]))
        return self.seen

    def whole(self, unit: tuple[int, int], turn: int, place: int) -> Whole:
        self.link.finish(self.stored.get(unit))
        parts = zip(self.near[unit], self.far[unit], strict=True)
        keys, values = (torch.cat([near[: place + 1].cpu(), far[: place + 1]], dim=1) for near, far in parts)
        shape = (place + 1, self.run.sizes[0], -1)
        return keys.view(shape), values.view(shape)

    def keep_token(self, unit: tuple[int, int], turn: int, place: int, x: torch.Tensor) -> None:
        """``attend`` has sent it."""
