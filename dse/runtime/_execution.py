"""The loop that all executed plans share: when what crosses the link, and what is computed meanwhile.

A unit is one layer of one GPU batch in one decode step. What it needs is sent ahead into one of two slots, so that the link works while
another unit is computed. Two orders are executed:

    with a barrier   the loads of the next unit begin when the state of this one is complete: the templates "staged" and "chunked"
    fluid            they begin when the unit before this one has been computed: the link never pauses

With a barrier, B the time when a state is complete, in a unit of seconds act, kv, recompute, compute (see ``models.overlap``):

    B' = B + max(link, the chunks' last recomputation, compute + recompute),   the template's closed form
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ._decoder import Decoder, Weights, attention
from ._link import Transfers, aligned, timed
from ._states import Memory, State
from ._weights import FolderWeights, RandomWeights
from .plans import Run
from .times import LayerTimes


class LayerWeights:
    """The weights of all layers: of each the first ``cut`` elements on the host, streamed into one of two buffers, the others resident."""

    def __init__(self, source: RandomWeights | FolderWeights, decoder: Decoder) -> None:
        self.decoder, self.source = decoder, source
        self.cut = 0
        self.near: list[torch.Tensor] = []
        self.far: list[torch.Tensor] = []
        self.buffers: list[torch.Tensor] = []
        self.held = 0
        """Bytes of the host that ``far`` keeps until the last layer has moved."""

    def forget(self) -> None:
        """Free them; they are made again when they are placed."""
        self.near, self.far, self.buffers, self.held = [], [], [], 0

    def place(self, cut: int, transfers: Transfers) -> None:
        """Bring the weights to where a plan wants them; a plan that wants what the last one did moves nothing."""
        layout, dtype, device = self.decoder.layout, self.decoder.dtype, self.decoder.device
        if cut != self.cut or not self.near:
            known, layers = bool(self.near), self.decoder.llm.num_hidden_layers
            self.buffers = []
            memory = transfers.lasting(layers * aligned(cut * dtype.itemsize))
            try:
                for layer in range(layers):
                    whole = torch.empty(layout.total, dtype=dtype, device=device)
                    if known:
                        whole[: self.cut].copy_(self.far[layer])
                        whole[self.cut :].copy_(self.near[layer])
                    else:
                        self.source.fill(layer, whole)
                    far = memory.take((cut,), dtype)
                    far.copy_(whole[:cut])
                    near = whole[cut:].clone() if cut else whole
                    self.near[layer : layer + 1], self.far[layer : layer + 1] = [near], [far]
            except BaseException:  # memory ran out, or Ctrl-C: some layers are cut here, some there
                self.forget()
                raise
            self.cut, self.held = cut, memory.held
            transfers.trim()
        if len(self.buffers) != (2 if cut else 0):
            self.buffers = [torch.empty(cut, dtype=dtype, device=device) for _ in range(2 if cut else 0)]

    def bytes(self, cut: int) -> tuple[int, int]:
        """Bytes on device and host with ``cut`` elements of each layer streamed."""
        layers, size = self.decoder.llm.num_hidden_layers, self.decoder.dtype.itemsize
        return (layers * (self.decoder.layout.total - cut) + 2 * cut) * size, layers * cut * size

    def send(self, layer: int, turn: int, begin: int, end: int, mark: Any, transfers: Transfers) -> Any:
        """Send some of a layer's elements; a ticket, None if none are streamed."""
        begin, end = min(begin, self.cut), min(end, self.cut)
        if begin == end:
            return None
        return transfers.send("to_device", [(self.buffers[turn % 2][begin:end], self.far[layer][begin:end])], [mark])

    def views(self, layer: int, turn: int) -> Weights:
        """A layer's tensors, wherever they are."""
        streamed = [(0, self.buffers[turn % 2])] if self.cut else []
        return self.decoder.layout.views(*streamed, (self.cut, self.near[layer]))


@dataclass(slots=True, eq=False)
class Executed:
    """What an execution gave: tokens [requests, generated], points in time, and what was asked for beside."""

    tokens: torch.Tensor
    prefill: list[Any]
    steps: list[Any]
    sent: int = 0
    """Bytes sent to the device before the first decode step."""
    logits: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Pending:
    """What is on its way for a unit."""

    inputs: list[Any]
    state: Any
    first: Any = None
    rest: Any = None


class Execution:
    """Prefill and greedy decoding of one plan: the loop is the same for every plan, the state and the weights differ."""

    def __init__(self, decoder: Decoder, weights: LayerWeights, transfers: Transfers, state: State, run: Run) -> None:
        self.decoder, self.weights, self.link, self.state, self.run = decoder, weights, transfers, state, run
        self.hidden = state.hidden
        self.layers, self.batches = decoder.llm.num_hidden_layers, len(run.sizes)
        self.units = [(layer, batch) for layer in range(self.layers) for batch in range(self.batches)]
        self.loads: list[Any] = [None, None]
        """The last ticket of the weights in each buffer."""

    def generate(self, prompts: torch.Tensor, *, logits: bool, state: bool) -> Executed:
        """Tokens after ``prompts`` [requests, tokens], with all logits and the last step's keys and values if asked for."""
        found = Executed(torch.empty(0), [self.link.clock()], [])
        self._prefill(prompts.t().contiguous())
        self._next(found, logits)
        found.prefill.append(self.link.clock())
        found.steps.append(found.prefill[-1])
        found.sent = self.link.sent("to_device")
        tokens = [torch.cat(self._tokens)]
        steps = self.run.generated - 1
        pending = self._enqueue(0) if steps else _Pending([], None)
        if steps and self.state.fluid:
            self._send_weights(0, 0, 1)
        for step in range(steps):
            for batch, one in enumerate(self._tokens):
                self.hidden.keep(batch, self.decoder.embed(one[None], self.run.prompt + step))
            self.hidden.fetch(0)
            for index in range(len(self.units)):
                pending = self._unit(step, index, pending, found if state and step + 1 == steps else None)
            self._next(found, logits)
            tokens.append(torch.cat(self._tokens))
            found.steps.append(self.link.clock())
        found.tokens = torch.stack(tokens, dim=1)
        return found

    def _next(self, found: Executed, logits: bool) -> None:
        """Greedy tokens of each GPU batch from its last hidden states; the first one's have been fetched."""
        scores = []
        for batch in range(self.batches):
            if batch:
                self.hidden.fetch(batch)
            scores.append(self.decoder.logits(self.hidden.take(batch)[-1]))
        self._tokens = [one.argmax(dim=-1) for one in scores]
        if logits:
            found.logits.append(torch.cat(scores))

    def _prefill(self, prompts: torch.Tensor) -> None:
        for batch, requests in enumerate(self.run.ranges):
            self.hidden.keep(batch, self.decoder.embed(prompts[:, requests].contiguous(), 0))
        self.hidden.fetch(0)
        self._send_weights(-self.layers, 0, 1)
        for layer in range(self.layers):
            turn = layer - self.layers
            if layer + 1 < self.layers:
                self._send_weights(turn + 1, 0, 1)
            self.link.wait(self.loads[turn % 2])
            weights = self.weights.views(layer, turn)
            for batch in range(self.batches):
                unit, count = (layer, batch), layer * self.batches + batch
                if batch + 1 < self.batches:
                    self.hidden.fetch(batch + 1)
                keys, values = self.state.prompt(unit, count)
                x = self.hidden.take(batch)
                self.hidden.keep(batch, self.decoder.prefill_layer(weights, x, keys, values))
                self.state.keep_prompt(unit, count, x)
            self.hidden.fetch(0)
        for ticket in self.state.stored.values():
            self.link.wait(ticket)

    def _send_weights(self, turn: int, part: int, parts: int) -> None:
        """Send one of ``parts`` of the weights that layer number ``turn`` since the prompt streams."""
        cut = self.weights.cut
        ticket = self.weights.send(
            turn % self.layers, turn, cut * part // parts, cut * (part + 1) // parts, self.link.mark() if cut else None, self.link
        )
        self.loads[turn % 2] = ticket or self.loads[turn % 2]

    def _enqueue(self, number: int) -> _Pending:
        """Send what unit ``number`` since the prompt needs; with a barrier its weights too, those of recomputation first."""
        step, index = divmod(number, len(self.units))
        unit, place, mark = self.units[index], self.run.prompt + step, self.link.mark()
        streams = not self.state.fluid and unit[1] == 0 and self.weights.cut
        turn, layout = step * self.layers + unit[0], self.decoder.layout
        first = self.weights.send(unit[0], turn, 0, layout.first, mark, self.link) if streams else None
        inputs = self.state.load_inputs(unit, number, place, mark)
        rest = self.weights.send(unit[0], turn, layout.first, layout.total, mark, self.link) if streams else None
        return _Pending(inputs, self.state.load_state(unit, number, place, mark), first, rest)

    def _unit(self, step: int, index: int, pending: _Pending, found: Executed | None) -> _Pending:
        """One layer of one GPU batch; what was sent ahead for the next unit."""
        unit, place = self.units[index], self.run.prompt + step
        layer, batch = unit
        number, turn = step * len(self.units) + index, step * self.layers + layer
        last = number + 1 == (self.run.generated - 1) * len(self.units)
        ahead = _Pending([], None)
        # With a single unit the next one needs the token that this one computes.
        early = not last and len(self.units) > 1
        if early and self.state.fluid:
            ahead = self._enqueue(number + 1)
        if self.state.fluid:
            if turn + 1 < (self.run.generated - 1) * self.layers:
                self._send_weights(turn + 1, batch, self.batches)
            if batch == 0:
                # The other buffer's: those of this layer were sent before any of the next layer's.
                self.link.wait(self.loads[turn % 2])
        self.link.wait(pending.first)
        weights = self.weights.views(layer, turn)
        self.state.restore(unit, number, place, weights, pending.inputs)
        self.link.wait(pending.rest)
        self.link.wait(pending.state)
        if early and not self.state.fluid:
            ahead = self._enqueue(number + 1)
        if batch + 1 < self.batches:
            self.hidden.fetch(batch + 1)
        x = self.hidden.take(batch)
        keys, values = self.state.token(unit, number, place)
        out = self.decoder.decode_layer(weights, x, place, keys, values, lambda queries: self.state.attend(unit, number, place, queries))
        self.hidden.keep(batch, out)
        if batch + 1 == self.batches:
            self.hidden.fetch(0)
        self.state.keep_token(unit, number, place, x)
        if found is not None:
            keys, values = self.state.whole(unit, number, place)
            found.keys.append(keys.to("cpu", copy=True))
            found.values.append(values.to("cpu", copy=True))
        if not last and not early:
            ahead = self._enqueue(number + 1)
        return ahead


class LayerBuffers:
    """What the parts of a layer are measured with; two of each that an execution has two of, so that caches are as cold as there."""

    def __init__(self, memory: Memory, decoder: Decoder, size: int, context: int) -> None:
        self.memory, self.size, self.context = memory, size, context
        width, hidden, total = decoder.key_width, decoder.llm.hidden_size, decoder.layout.total
        self.near = [[memory.device(context + 1, size, wide) for wide in (width, width, hidden)] for _ in range(2)]
        self.far = [memory.host(context, size, wide) for wide in (width, width, hidden)]
        self.near_weights, self.far_weights = memory.device(total), memory.host(total)
        self.pools = [memory.device(context * size, width) for _ in range(2)]


def measure_layer(
    decoder: Decoder, weights: LayerWeights, link: Transfers, buffers: LayerBuffers, gpu_batches: int, repeats: int
) -> LayerTimes:
    """Medians of ``repeats`` runs of each part of a layer, with nothing beside it; what is computed over layers and buffers in turn."""
    layers, context, size, first = decoder.llm.num_hidden_layers, buffers.context, buffers.size, decoder.layout.first
    near, far, pools = buffers.near, buffers.far, buffers.pools
    for one in (*near[0], *near[1], *pools, buffers.near_weights):
        one.uniform_(-1, 1)
    # Numbers are drawn on the device: a processor would draw gigabytes for a minute.
    for there, here in zip((*far, buffers.far_weights), (*(one[:context] for one in near[0]), buffers.near_weights), strict=True):
        there.copy_(here)
    rows = torch.arange(context * size, device=decoder.device)

    def median(work: Callable[[int], None]) -> float:
        turn = iter(range(repeats + 1))
        return statistics.median(timed(link, lambda: work(next(turn)), repeats))

    def sending(*pairs: tuple[torch.Tensor, torch.Tensor]) -> Callable[[int], None]:
        return lambda turn: link.wait(link.send("to_device", pairs, [link.mark()]))

    def recompute(turn: int) -> None:
        keys, values, inputs = near[turn % 2]
        here = weights.views(turn % layers, 0)
        decoder.keys_values(here, inputs[:context], slice(0, context), keys[:context], values[:context])

    def compute(turn: int) -> None:
        keys, values, inputs = near[turn % 2]
        decoder.decode_layer(
            weights.views(turn % layers, 0), inputs[:1], context, keys[-1:], values[-1:], lambda queries: attention(queries, keys, values)
        )

    def outside(turn: int) -> None:
        tokens = decoder.logits(near[turn % 2][2][0].repeat(gpu_batches, 1)).argmax(dim=-1)
        decoder.embed(tokens[None], context)

    def assemble(turn: int) -> None:
        for pool, whole in zip(pools, near[turn % 2], strict=False):
            whole[:context].view(pool.shape).index_copy_(0, rows, pool)

    return LayerTimes(
        kv=median(sending(*zip((one[:context] for one in near[0][:2]), far[:2], strict=True))),
        act=median(sending((near[0][2][:context], far[2]))),
        recompute=median(recompute),
        compute=median(compute),
        weights=median(sending((buffers.near_weights, buffers.far_weights))),
        first=median(sending((buffers.near_weights[:first], buffers.far_weights[:first]))),
        outside=median(outside),
        layers=layers,
        context=context,
        gpu_batches=gpu_batches,
        assemble=median(assemble),
    )
