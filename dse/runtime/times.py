"""What the measured parts of a layer say that a decode step will take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...models.cache_ratio import BLOCK, CacheRatioProblem, LinearTime, RatioLayer
from ...models.checks import shown, whole
from ...models.offload import WeightsOn
from ...models.overlap import chunked, fluid
from .plans import FullKV, SplitKV, TransferKV

SETTLING = 256
"""Units of a replay before its last step: what the first loads are late by, a unit's or two, has then been made up but for 1/100."""


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

    def step(self, plan: FullKV | SplitKV | TransferKV, context: int | None = None) -> float:
        """Seconds of a decode step by the closed forms of ``models.overlap``: the last layer's computation has ``outside``, too.

        They are what the solvers minimise. With several GPU batches they can be a quarter too short, as no unit waits for another one's
        loads in them, and a tenth too long for "fluid"; ``replay`` follows each event.

        ``context``: tokens of state, those measured unless given; transfers of state and recomputation grow with it, ``compute`` is taken
        as measured. With one layer and one GPU batch only weights are sent ahead of the computation, and those only without a barrier,
        because the rest needs the token: ``compute`` is beside nothing else, ``outside`` beside the loads of the next step.
        """
        share, scale, chunks = self._shape(plan, context)
        seconds = {name: getattr(self, name) * scale for name in ("kv", "act", "recompute")}
        streams = plan.weights == "host"
        weights, first = (self.weights, self.first) if streams else (0.0, None)

        def layer(compute: float) -> float:
            if not chunks:
                return float(fluid(share, **seconds, weights=weights, compute=compute, batches=self.gpu_batches))
            return float(chunked(share, chunks=chunks, **seconds, weights=weights, first=first, compute=compute, batches=self.gpu_batches))

        if self.layers * self.gpu_batches > 1:
            return (self.layers - 1) * layer(self.compute) + layer(self.compute + self.outside / self.gpu_batches)
        if not chunks:
            chunks, weights, first = self._parts(plan), max(weights - self.compute, 0.0), 0.0
        return self.compute + layer(self.outside)

    def replay(self, plan: FullKV | SplitKV | TransferKV, context: int | None = None) -> float:
        """Seconds of a decode step, event by event as the runtime executes it: the link, the GPU, and what each waits for.

        The loads of a unit, one layer of one GPU batch, begin with the unit before it; with a barrier when that one's state is complete;
        if there is no other unit, when it has been computed. Weights precede the loads of a layer's first unit with a barrier; without
        one each unit sends its share of the next layer's, behind the loads of the next unit. Stores of new tokens are left out.
        """
        share, scale, chunks = self._shape(plan, context)
        parts, barrier, units = self._parts(plan) if share else 0, chunks > 0, self.layers * self.gpu_batches
        kv, act, recompute = ((1 - share) * self.kv * scale, *(share * time * scale for time in (self.act, self.recompute)))
        streams = plan.weights == "host" and self.weights > 0
        first, rest = (self.first, self.weights - self.first) if streams and barrier else (0.0, 0.0)
        link = gpu = 0.0

        def loads(unit: int) -> tuple[float, list[float], float]:
            """When the weights that recomputation needs, each part of the inputs, and all that a unit needs have arrived."""
            begins_layer = unit % self.gpu_batches == 0
            early = at = max(link, gpu) + (first if begins_layer else 0.0)
            inputs = [at := at + act / parts for _ in range(parts)]
            return early, inputs, at + (rest if begins_layer else 0.0) + kv

        pending = loads(0)
        link = arriving = pending[2] + (self.weights if streams and not barrier else 0.0)
        ends = []
        for unit in range(units * max(3, -(-SETTLING // units) + 1)):
            early, inputs, complete = pending
            if not barrier:
                arrived = arriving
                if units > 1:
                    pending = loads(unit + 1)
                    link = pending[2]
                if streams:
                    link = arriving = max(link, gpu) + self.weights / self.gpu_batches
                    gpu = max(gpu, arrived) if unit % self.gpu_batches == 0 else gpu
            gpu = max(gpu, early)
            for arrival in inputs:
                gpu = max(gpu, arrival) + recompute / parts
            gpu = max(gpu, complete)
            if barrier and units > 1:
                pending = loads(unit + 1)
                link = pending[2]
            gpu += self.compute
            if units == 1:
                pending = loads(0)
                link = pending[2]
            if unit % units == units - 1:
                gpu += self.outside
                ends.append(gpu)
        return ends[-1] - ends[-2]

    def _parts(self, plan: FullKV | SplitKV | TransferKV) -> int:
        """In how many parts the inputs are sent and recomputed."""
        return plan.chunks if isinstance(plan, SplitKV) else 1

    def _shape(self, plan: FullKV | SplitKV | TransferKV, context: int | None) -> tuple[float, float, int]:
        """Share of tokens recomputed, what times are multiplied with, and chunks (0: fluid)."""
        if not isinstance(plan, FullKV | SplitKV | TransferKV):
            raise ValueError(
                f"layer times say how long steps of FullKV, TransferKV and SplitKV take, not of {shown(plan)}; cache plans are priced by "
                "measured(problem), placements by their problem only"
            )
        tokens = self.context if context is None else whole("layer times", "context", context, "tokens")
        if plan.gpu_batches != self.gpu_batches:
            raise ValueError(f"layer times are of {self.gpu_batches} GPU batches, the plan has {plan.gpu_batches}; measure those")
        if not isinstance(plan, SplitKV) or not plan.split:
            return 0.0, 0.0 if isinstance(plan, FullKV) else tokens / self.context, 0
        if plan.split > tokens:
            raise ValueError(f"the plan recomputes {plan.split} of {tokens} tokens; lower the split")
        return plan.split / tokens, tokens / self.context, 0 if plan.template == "fluid" else plan.chunks

    def measured(self, problem: CacheRatioProblem) -> CacheRatioProblem:
        """The problem with these times in place of its system's, for the same blocks, requests, capacities and place of the weights.

        ValueError if it was made of coefficients, or if these are not the times of its requests.
        """
        settings, requests = problem.settings, len(problem.request_blocks)
        if settings is None:
            raise ValueError("layer times: the problem is made of coefficients already; give it layers=ratio_layers(...) itself")
        if requests % self.gpu_batches:
            raise ValueError(f"layer times are of {self.gpu_batches} GPU batches, into which {requests} requests cannot be divided")
        return replace(problem, layers=self.ratio_layers(requests // self.gpu_batches, settings.weights, block=settings.block))

    def ratio_layers(self, requests: int, weights: WeightsOn, *, block: int = BLOCK) -> tuple[RatioLayer, RatioLayer]:
        """All layers but the last, and the last with the choice of the token after it, as ``CacheRatioProblem`` takes them.

        Of all GPU batches; ``requests`` of the one that was measured. What puts blocks together counts as computation. Stores of new
        tokens are left out: they are a few rows. ValueError for one layer, whose state does not arrive while another one is computed.
        """
        block, requests = whole("layer times", "block", block, "tokens"), whole("layer times", "requests", requests, "requests")
        if self.layers < 2:
            raise ValueError(f"layer times: a cache ratio needs at least 2 layers, not {self.layers}; measure more layers")
        share = block / (self.context * requests)
        last = RatioLayer(
            layers=1,
            weights=self.weights if weights == "host" else 0.0,
            compute=self.gpu_batches * (self.compute + self.assemble) + self.outside,
            load_kv=LinearTime(slope=self.kv * share),
            load_act=LinearTime(slope=self.act * share),
            generate=LinearTime(slope=self.recompute * share),
        )
        return replace(last, layers=self.layers - 1, compute=last.compute - self.outside), last
