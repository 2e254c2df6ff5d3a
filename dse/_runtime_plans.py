"""The plans that the runtime executes, as values that follow from the library's own, and what measured layers say a plan will take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.cache_ratio import BLOCK, CacheRatioPlan, LinearTime, RatioLayer
from ..models.checks import check_number, shown, whole
from ..models.mini_batches import MiniBatchPlan, request_shares
from ..models.offload import WeightsOn
from ..models.overlap import chunked, fluid
from ..models.placement import PlacementPlan
from ..models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, SplitTemplate

SETTLING = 8
"""Units after which a replay is in its steady state, where slots and buffers are two deep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Requests of each GPU batch, tokens of a prompt, new tokens; the last new token is never attended to, so ``rows`` are held."""

    sizes: tuple[int, ...]
    prompt: int
    generated: int

    @property
    def rows(self) -> int:
        """Tokens of a request whose state is held at the end."""
        return self.prompt + self.generated - 1

    @property
    def ranges(self) -> list[slice]:
        """The requests of each GPU batch."""
        ends = [sum(self.sizes[: index + 1]) for index in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


def _equal(parts: int, batch: int, prompt: int, generated: int) -> tuple[list[int], Run]:
    """GPU batches of one size, requests in order."""
    if batch % parts:
        raise ValueError(f"runtime: {batch} prompts cannot be divided into {parts} GPU batches; give a multiple")
    return list(range(batch)), Run(sizes=(batch // parts,) * parts, prompt=prompt, generated=generated)


def _check_weights(what: str, weights: object) -> None:
    if weights not in ("gpu", "host"):
        raise ValueError(f"{what}: weights must be on 'gpu' or on 'host', not {shown(weights)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uniform:
    """What plans with GPU batches of one size have in common."""

    weights: WeightsOn = "gpu"
    gpu_batches: int = 1

    def __post_init__(self) -> None:
        _check_weights("plan", self.weights)
        object.__setattr__(self, "gpu_batches", whole("plan", "gpu_batches", self.gpu_batches, "GPU batches"))

    @property
    def streamed(self) -> float:
        """Share of the weights that crosses the link in each step."""
        return float(self.weights == "host")

    @property
    def parts(self) -> int:
        """What the number of prompts must be a multiple of."""
        return self.gpu_batches

    def run(self, batch: int, prompt: int, generated: int) -> tuple[list[int], Run]:
        """The order of the requests, and the sizes of the run; ValueError if the plan is for another."""
        return _equal(self.gpu_batches, batch, prompt, generated)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullKV(_Uniform):
    """All keys and values on the device: what the other plans must agree with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferKV(_Uniform):
    """Keys and values on the host, all transferred in every step, layer by layer, while the layer before is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitKV(_Uniform):
    """KVPR: the keys and values of the first ``split`` tokens are recomputed from the layer's inputs, the others are transferred.

    "staged": all inputs, then the recomputation beside the other keys and values; "chunked": in ``chunks`` parts, each recomputed while
    the next one arrives; in both the next layer's loads wait until this one's state is complete. "fluid": in ``chunks``, without that
    wait. ``split`` is at most the prompt, as in KVPR.
    """

    split: int
    template: SplitTemplate = "staged"
    chunks: int = 4

    def __post_init__(self) -> None:
        _Uniform.__post_init__(self)
        object.__setattr__(self, "split", whole("split KV", "split", self.split, "tokens", least=0))
        if self.template not in ("staged", "chunked", "fluid"):
            raise ValueError(f"split KV: template must be 'staged', 'chunked' or 'fluid', not {shown(self.template)}")
        chunks = whole("split KV", "chunks", self.chunks, "chunks")
        object.__setattr__(self, "chunks", 1 if self.template == "staged" else chunks)

    @classmethod
    def from_plan(cls, problem: RecomputeSplitProblem, plan: RecomputeSplitPlan) -> SplitKV:
        """The plan of a problem, with the problem's template, weights and GPU batches."""
        if len(set(plan.splits)) != 1:
            raise ValueError(f"split KV: the runtime executes one split for all layers, not {plan.splits}; take an LLM of equal layers")
        return cls(
            split=plan.splits[0],
            template=problem.template,
            chunks=problem.chunks,
            weights=problem.weights,
            gpu_batches=problem.batches,
        )

    def run(self, batch: int, prompt: int, generated: int) -> tuple[list[int], Run]:
        if self.split > prompt:
            raise ValueError(f"split KV: {self.split} tokens are to be recomputed, but prompts have {prompt}; lower the split")
        return _equal(self.gpu_batches, batch, prompt, generated)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """HybridServe: ``blocks`` says how many blocks are kept in which form in which memory, ``mini_batches`` which requests go together.

    Blocks on the device go to the requests that come first, forms follow the ratio in each request and are spread over its tokens, new
    ones included. A run that needs another number of blocks than the plan has takes the plan's shares of them. Without ``mini_batches``
    all requests are one. The next mini-batch's state, and a part of the next layer's weights, arrive while one is computed.
    """

    blocks: CacheRatioPlan
    mini_batches: MiniBatchPlan | None = None
    block: int = BLOCK
    weights: WeightsOn = "host"

    def __post_init__(self) -> None:
        _check_weights("cache plan", self.weights)
        object.__setattr__(self, "block", whole("cache plan", "block", self.block, "tokens"))
        if not self.blocks.blocks:
            raise ValueError("cache plan: it holds no block; plan for a context of at least one token")

    @property
    def streamed(self) -> float:
        """Share of the weights that crosses the link in each step."""
        return float(self.weights == "host")

    @property
    def parts(self) -> int:
        """What the number of prompts must be a multiple of; with mini-batches no other number will do."""
        return 1

    def run(self, batch: int, prompt: int, generated: int) -> tuple[list[int], Run]:
        """The requests in order of their mini-batches, and the sizes of the run; ValueError if the plan is for others."""
        groups = ((tuple(range(batch))),) if self.mini_batches is None else self.mini_batches.batches
        order = [request for group in groups for request in group]
        if sorted(order) != list(range(batch)):
            raise ValueError(
                f"cache plan: each of the {batch} prompts must be in exactly one mini-batch; the plan has {len(order)} requests: plan for "
                "these prompts"
            )
        return order, Run(sizes=tuple(len(group) for group in groups), prompt=prompt, generated=generated)

    def forms(self, batch: int, rows: int) -> list[NDArray[np.int64]]:
        """The form of every token [rows, requests] of each mini-batch: 0 KV and 1 ACT on the device, 2 KV and 3 ACT on the host."""
        each = -(-rows // self.block)
        counts = (self.blocks.kv_gpu, self.blocks.act_gpu, self.blocks.kv_host, self.blocks.act_host)
        kv_gpu, act_gpu, kv_host, act_host = _in_shares(batch * each, counts)
        scaled = CacheRatioPlan(kv_gpu=kv_gpu, act_gpu=act_gpu, kv_host=kv_host, act_host=act_host)
        shares = np.stack(request_shares(np.full(batch, each, dtype=np.int64), scaled), axis=1)
        order, run = self.run(batch, rows, 1)
        tokens = np.stack([np.repeat(_spread(shares[request].tolist()), self.block)[:rows] for request in order], axis=1)
        return [tokens[:, requests] for requests in run.ranges]


def _in_shares(total: int, counts: tuple[int, ...]) -> list[int]:
    """Whole numbers in the ratio of ``counts`` that add up to ``total``: largest remainders, the first of equal ones."""
    exact = [total * count for count in counts]
    found, whole_ = [value // sum(counts) for value in exact], sum(counts)
    order = sorted(range(len(counts)), key=lambda index: (-(exact[index] % whole_), index))
    for index in order[: total - sum(found)]:
        found[index] += 1
    return found


def _spread(counts: list[int]) -> list[int]:
    """Each form as often as it counts, evenly among the others."""
    places = [((number + 0.5) / count, form) for form, count in enumerate(counts) for number in range(count)]
    return [form for _, form in sorted(places)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """FlexGen-like: shares of ``weights`` and of the KV ``cache`` on the device, the rest on the host, as tensors and tokens allow.

    Weights are streamed in whole tensors, cache in tokens: the first ones are on the device. ``gpu_batches`` share a load of the weights.
    Attention is on the device in any case, where FlexGen computes that of cache on the host there.
    """

    weights: float = 1.0
    cache: float = 1.0
    gpu_batches: int = 1

    def __post_init__(self) -> None:
        for field in ("weights", "cache"):
            check_number("placement", field, getattr(self, field), "share", zero=True)
            if getattr(self, field) > 1:
                raise ValueError(f"placement: {field} must be a share from 0 to 1, not {getattr(self, field)!r}; divide per cent by 100")
        object.__setattr__(self, "gpu_batches", whole("placement", "gpu_batches", self.gpu_batches, "GPU batches"))

    @classmethod
    def from_plan(cls, plan: PlacementPlan) -> Placement:
        """A placement on GPU and host; ValueError for one with a disk, or with hidden states that leave the GPU."""
        if plan.weights[2] or plan.cache[2] or plan.hidden[2]:
            raise ValueError("placement: the runtime has no disk; plan for a system without one")
        if plan.hidden[0] != 1:
            raise ValueError(f"placement: the runtime keeps hidden states on the GPU, the plan {plan.hidden[0]:g}; use hidden=(1, 0, 0)")
        return cls(weights=plan.weights[0], cache=plan.cache[0], gpu_batches=plan.gpu_batches)

    @property
    def streamed(self) -> float:
        """Share of the weights that crosses the link in each step."""
        return 1.0 - self.weights

    @property
    def parts(self) -> int:
        """What the number of prompts must be a multiple of."""
        return self.gpu_batches

    def resident(self, rows: int) -> int:
        """Tokens of a request whose keys and values stay on the device, of ``rows``."""
        return round(self.cache * rows)

    def run(self, batch: int, prompt: int, generated: int) -> tuple[list[int], Run]:
        """The order of the requests, and the sizes of the run; ValueError if the plan is for another."""
        return _equal(self.gpu_batches, batch, prompt, generated)


ExecutedPlan = FullKV | TransferKV | SplitKV | CachePlan | Placement


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
