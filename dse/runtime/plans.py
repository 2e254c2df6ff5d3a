"""The plans that the runtime executes, as values that follow from the library's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...models.cache_ratio import BLOCK, CacheRatioPlan, CacheRatioProblem
from ...models.checks import check_number, shown, whole
from ...models.mini_batches import MiniBatchPlan, request_shares
from ...models.offload import WeightsOn
from ...models.placement import PlacementPlan
from ...models.recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, SplitTemplate

AttentionOn = Literal["gpu", "host"]

ROUNDED = 1e-6
"""A share that a solver's tolerance explains."""


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
        object.__setattr__(self, "chunks", 1 if self.template == "staged" else min(chunks, max(self.split, 1)))

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
        """As of the other plans; ValueError if more is to be recomputed than the prompt."""
        if self.split > prompt:
            raise ValueError(f"split KV: {self.split} tokens are to be recomputed, but prompts have {prompt}; lower the split")
        return _equal(self.gpu_batches, batch, prompt, generated)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """HybridServe: ``blocks`` says how many blocks are kept in which form in which memory, ``mini_batches`` which requests go together.

    ``requests``: how many it was planned for; None: any number.
    Blocks on the device go to the requests that come first, forms follow the ratio in each request and are spread over its tokens, new
    ones included. A run that needs another number of blocks than the plan has takes the plan's shares of them. Without ``mini_batches``
    all requests are one. The next mini-batch's state, and a part of the next layer's weights, arrive while one is computed.
    """

    blocks: CacheRatioPlan
    mini_batches: MiniBatchPlan | None = None
    block: int = BLOCK
    weights: WeightsOn = "host"
    requests: int | None = None

    def __post_init__(self) -> None:
        _check_weights("cache plan", self.weights)
        if self.requests is not None:
            object.__setattr__(self, "requests", whole("cache plan", "requests", self.requests, "requests"))
        for field, kind in (("blocks", CacheRatioPlan), ("mini_batches", MiniBatchPlan | None)):
            if not isinstance(getattr(self, field), kind):
                raise ValueError(f"cache plan: {field} must be the solver's plan, not {shown(getattr(self, field))}")
        object.__setattr__(self, "block", whole("cache plan", "block", self.block, "tokens"))
        if not self.blocks.blocks:
            raise ValueError("cache plan: it holds no block; plan for a context of at least one token")

    @classmethod
    def from_plan(cls, problem: CacheRatioProblem, plan: CacheRatioPlan, mini_batches: MiniBatchPlan | None = None) -> CachePlan:
        """The plan of a problem, with its blocks, weights and requests; ValueError if the problem was not built from a workload."""
        settings = problem.settings
        if settings is None:
            raise ValueError(
                "cache plan: the problem is made of coefficients and has no block size; make CachePlan(block=, weights=) itself"
            )
        requests = len(problem.request_blocks)
        return cls(blocks=plan, mini_batches=mini_batches, block=settings.block, weights=settings.weights, requests=requests)

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
        if self.requests not in (None, batch):
            raise ValueError(f"cache plan: it is for {self.requests} requests, not for {batch} prompts; plan for these prompts")
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
    """FlexGen-like: shares of ``weights``, of the KV ``cache`` and of ``hidden`` states on the device, the rest on the host.

    Weights are streamed in whole tensors; the cache is divided by KV heads of all requests, hidden states between two layers by requests,
    those of the GPU batch that is computed being on the device. ``gpu_batches`` share a load of the weights; of ``gpu_batch`` requests
    each, None: any. ``attention``: "gpu": cache on the host is sent to be attended to; "host": its queries are sent, and the processor
    attends, which the host waits for once a layer.
    """

    weights: float = 1.0
    cache: float = 1.0
    hidden: float = 1.0
    attention: AttentionOn = "gpu"
    gpu_batches: int = 1
    gpu_batch: int | None = None

    def __post_init__(self) -> None:
        for field in ("weights", "cache", "hidden"):
            check_number("placement", field, getattr(self, field), "share", zero=True)
            if getattr(self, field) > 1:
                raise ValueError(f"placement: {field} must be a share from 0 to 1, not {getattr(self, field)!r}; divide per cent by 100")
        if self.attention not in ("gpu", "host"):
            raise ValueError(f"placement: attention must be on 'gpu' or on 'host', not {shown(self.attention)}")
        object.__setattr__(self, "gpu_batches", whole("placement", "gpu_batches", self.gpu_batches, "GPU batches"))
        if self.gpu_batch is not None:
            object.__setattr__(self, "gpu_batch", whole("placement", "gpu_batch", self.gpu_batch, "requests"))

    @classmethod
    def from_plan(cls, plan: PlacementPlan) -> Placement:
        """A plan without a disk, with attention over cache on the host, as FlexGen's model prices it; ValueError for one with a disk."""
        on_disk = max(plan.weights[2], plan.cache[2], plan.hidden[2])
        if on_disk > ROUNDED:
            raise ValueError(
                f"placement: the runtime has no disk, and the plan keeps {on_disk:.1%} of something there; plan for two memories"
            )
        weights, cache, hidden = (1.0 if shares[1] <= ROUNDED else shares[0] for shares in (plan.weights, plan.cache, plan.hidden))
        return cls(weights=weights, cache=cache, hidden=hidden, attention="host", gpu_batches=plan.gpu_batches, gpu_batch=plan.gpu_batch)

    @property
    def streamed(self) -> float:
        """Share of the weights that crosses the link in each step."""
        return 1.0 - self.weights

    @property
    def parts(self) -> int:
        """What the number of prompts must be a multiple of."""
        return self.gpu_batches

    def run(self, batch: int, prompt: int, generated: int) -> tuple[list[int], Run]:
        """The order of the requests, and the sizes of the run; ValueError if the plan is for another."""
        planned = None if self.gpu_batch is None else self.gpu_batch * self.gpu_batches
        if planned not in (None, batch):
            raise ValueError(
                f"placement: it is for {self.gpu_batches} GPU batches of {self.gpu_batch}, not for {batch} prompts; give {planned}"
            )
        return _equal(self.gpu_batches, batch, prompt, generated)


ExecutedPlan = FullKV | TransferKV | SplitKV | CachePlan | Placement
