"""What the measured parts of a layer say that a decode step will take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..models.cache_ratio import BLOCK, LinearTime, RatioLayer
from ..models.checks import whole
from ..models.overlap import chunked, fluid
from ._runtime_plans import SplitKV, TransferKV

SETTLING = 8
"""Units after which a replay is in its steady state, where slots and buffers are two deep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Measured seconds of one layer and one GPU batch, each with nothing beside it; ``context`` tokens of state a request.

    ``kv``, ``act`` the transfer of all keys and values, or inputs; ``recompute`` all keys and values; ``compute`` the layer's decode step;
    ``weights`` the transfer of a layer's weights, ``first`` of what recomputation needs of them; ``outside`` embedding, LM head and choice
    of the token, once a step; ``assemble`` putting all keys and values together from blocks. ``layers`` of them make the LLM.
    """

    kv: float
    act: float
    recompute: float
    compute: float
    weights: float
    first: float
    outside: float
    layers: int
    context: int
    gpu_batches: int = 1
    assemble: float = 0.0

    def step(self, plan: SplitKV | TransferKV, context: int | None = None) -> float:
        """Seconds of a decode step by the closed forms of ``models.overlap``: the last layer's computation has ``outside``, too.

        ``context``: tokens of state, those measured unless given; transfers of state and recomputation grow with it, ``compute`` is taken
        as measured. With one layer and one GPU batch nothing is sent ahead, so that nothing hides the computation.
        """
        share, scale, chunks = self._shape(plan, context)
        seconds = {name: getattr(self, name) * scale for name in ("kv", "act", "recompute")}
        streams = plan.weights == "host"
        weights = self.weights if streams else 0.0

        def layer(compute: float) -> float:
            if not chunks:
                return float(fluid(share, **seconds, weights=weights, compute=compute, batches=self.gpu_batches))
            first = self.first if streams else None
            return float(chunked(share, chunks=chunks, **seconds, weights=weights, first=first, compute=compute, batches=self.gpu_batches))

        if self.layers * self.gpu_batches == 1:
            return layer(0.0) + self.compute + self.outside
        return (self.layers - 1) * layer(self.compute) + layer(self.compute + self.outside / self.gpu_batches)

    def replay(self, plan: SplitKV | TransferKV, context: int | None = None) -> float:
        """Seconds of a decode step, event by event as the runtime executes it: the link, the GPU, and what each waits for."""
        share, scale, chunks = self._shape(plan, context)
        kv, act, recompute = (getattr(self, name) * scale for name in ("kv", "act", "recompute"))
        parts = max(chunks, plan.chunks if isinstance(plan, SplitKV) and share else 1)
        streams = plan.weights == "host"
        first, rest = (self.first, self.weights - self.first) if streams else (0.0, 0.0)
        units = self.layers * self.gpu_batches
        link = gpu = complete = begun = 0.0
        ends = []
        steps = max(3, -(-SETTLING // units) + 1)
        for unit in range(steps * units):
            new_layer = unit % self.gpu_batches == 0
            # With a barrier loads begin when the unit before is complete, else when the one before that has been computed.
            link = max(link, gpu if units == 1 else complete if chunks else begun)
            begun = gpu
            link += first if new_layer else 0.0
            link += rest if new_layer and not chunks else 0.0
            ready = max(gpu, link)
            for _ in range(parts if share else 0):
                link += act * share / parts
                ready = max(ready, link) + recompute * share / parts
            link += rest if new_layer and chunks else 0.0
            link += kv * (1 - share)
            complete = max(ready, link)
            gpu = complete + self.compute
            if unit % units == units - 1:
                gpu += self.outside
                ends.append(gpu)
        return ends[-1] - ends[-2]

    def _shape(self, plan: SplitKV | TransferKV, context: int | None) -> tuple[float, float, int]:
        """Share of tokens recomputed, what times are multiplied with, and chunks (0: fluid)."""
        tokens = self.context if context is None else whole("layer times", "context", context, "tokens")
        if plan.gpu_batches != self.gpu_batches:
            raise ValueError(f"layer times are of {self.gpu_batches} GPU batches, the plan has {plan.gpu_batches}; measure those")
        if not isinstance(plan, SplitKV) or not plan.split:
            return 0.0, tokens / self.context, 0
        if plan.split > tokens:
            raise ValueError(f"the plan recomputes {plan.split} of {tokens} tokens; lower the split")
        return plan.split / tokens, tokens / self.context, 0 if plan.template == "fluid" else plan.chunks

    def ratio_layer(self, requests: int, block: int = BLOCK) -> RatioLayer:
        """The layers as ``CacheRatioProblem`` takes them, with all GPU batches; ``requests`` of the one that was measured.

        What puts blocks together counts as computation. Stores of new tokens are left out: they are a few rows.
        """
        share = block / (self.context * whole("layer times", "requests", requests, "requests"))
        return RatioLayer(
            layers=self.layers,
            weights=self.weights,
            compute=self.gpu_batches * (self.compute + self.assemble),
            load_kv=LinearTime(slope=self.kv * share),
            load_act=LinearTime(slope=self.act * share),
            generate=LinearTime(slope=self.recompute * share),
        )

    @property
    def ratios(self) -> tuple[float, float, float]:
        """act / kv, recompute / kv and compute / kv: what decides whether recomputing pays."""
        return (self.act / self.kv, self.recompute / self.kv, self.compute / self.kv) if self.kv else (math.inf,) * 3
