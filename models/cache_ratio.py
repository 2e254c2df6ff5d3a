"""The cache ratio: which blocks of a batch's state are kept as keys and values and which as activations, on the GPU and on the host.

One decode step. A block is the state of ``block`` tokens of a request in all layers, held in one form (KV or ACT) in one memory; the
counts are kv_gpu, act_gpu, kv_host and act_host. While a layer is computed, the next one's weights and host blocks arrive, and the
new tokens leave (the fluid template of ``overlap``):

    T = sum over classes of layers  N max(t_w + T_load_kv(kv_host) + T_load_act(act_host),  t_c + T_gen(act_gpu + act_host),
                                          s_kv kv_host + s_act act_host)
    subject to   kv_gpu + act_gpu + kv_host + act_host = blocks,   bytes on the GPU and on the host within their capacities

Source: HybridServe (arXiv 2501.01792), whose T_load and T_gen are linear regressions; stores and several classes of layers are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_number, shown, whole, wholes
from .hardware import System
from .offload import (
    STAGED_REQUESTS,
    OffloadCost,
    OffloadMachine,
    OffloadRatios,
    WeightsOn,
    capacity_for,
    fewer_bits,
    gigabytes_more,
    gpu_overhead,
    largest,
    offload_layers,
)
from .offload_profiles import DATASHEET, OffloadProfile
from .roofline import Array
from .units import GB
from .workload import Workload

BLOCK = 16
"""Tokens of a block in HybridServe."""

LARGEST_CAPACITY = 2.0**61
"""Bytes that a memory of more, or without limit, is taken to have: whole numbers of 64 bits hold twice as many."""

MOST_REQUESTS = 1_000_000
"""Requests of a problem, at most."""

MOST_BLOCKS = 10_000_000
"""Blocks of a problem, at most: solvers look at that many counts one by one, in some seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTime:
    """Seconds of n blocks: ``intercept`` + ``slope`` n [s, s/block], and 0 for none."""

    intercept: float = 0.0
    slope: float

    def __post_init__(self) -> None:
        for field in ("intercept", "slope"):
            check_number("linear time", field, getattr(self, field), "s", zero=True, infinite=False)

    @classmethod
    def fit(cls, blocks: ArrayLike, seconds: ArrayLike) -> LinearTime:
        """The least-squares line through measured times, through the origin if it would start below 0; ValueError for fewer than two
        samples, for block counts that do not increase, and for times that fall."""
        try:
            n, t = np.asarray(blocks, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"a linear time is fitted to numbers of blocks and seconds, not to {shown(blocks)} and {shown(seconds)}"
            ) from None
        if n.ndim != 1 or n.shape != t.shape or len(n) < 2:
            raise ValueError(f"a linear time is fitted to two or more pairs of blocks and seconds, not to shapes {n.shape} and {t.shape}")
        if not (np.all(np.isfinite(n)) and np.all(np.diff(n) > 0) and n[0] >= 0 and n[-1] < 2**62):
            raise ValueError(
                f"the samples of a linear time need increasing counts from 0 to 2**62 blocks, not {shown(n.tolist())}; sort them"
            )
        if not (np.all(np.isfinite(t)) and np.all(t >= 0)):
            raise ValueError(f"the samples of a linear time need finite times of at least 0 s, not {shown(t.tolist())}; measure again")
        centred = n - n.mean()
        slope = float(centred @ t / (centred @ centred))
        if slope < 0:
            raise ValueError(f"the samples of a linear time must not fall with the blocks, but their slope is {slope:.3g} s; measure again")
        intercept = float(t.mean()) - slope * float(n.mean())
        if intercept < 0:
            intercept, slope = 0.0, float(n @ t / (n @ n))
        return cls(intercept=intercept, slope=slope)

    def seconds(self, blocks: ArrayLike) -> Array:
        """Seconds of each number of ``blocks``."""
        n = np.asarray(blocks, dtype=np.float64)
        return np.where(n > 0, self.intercept + self.slope * n, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioLayer:
    """A class of ``layers`` equal layers in one step: ``weights`` t_w and ``compute`` t_c [s], the times of loading and recomputing
    blocks, and ``store_kv``, ``store_act`` [s] of storing new tokens for each block that the host holds in that form."""

    layers: int
    weights: float
    compute: float
    load_kv: LinearTime
    load_act: LinearTime
    generate: LinearTime
    store_kv: float = 0.0
    store_act: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole("ratio layer", "layers", self.layers, "layers"))
        for field in ("weights", "compute", "store_kv", "store_act"):
            check_number("ratio layer", field, getattr(self, field), "s", zero=True, infinite=False)

    def times(self, act_gpu: ArrayLike, kv_host: ArrayLike, act_host: ArrayLike) -> tuple[Array, Array, Array]:
        """Seconds that the link to the GPU, the GPU, and the link from it are busy in one layer."""
        gpu, kv, act = (np.asarray(count, dtype=np.float64) for count in (act_gpu, kv_host, act_host))
        link = self.weights + self.load_kv.seconds(kv) + self.load_act.seconds(act)
        return link, self.compute + self.generate.seconds(gpu + act), self.store_kv * kv + self.store_act * act


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRatioPlan:
    """The decision: how many blocks are held in which form in which memory."""

    kv_gpu: int = 0
    act_gpu: int = 0
    kv_host: int = 0
    act_host: int = 0

    def __post_init__(self) -> None:
        for field in ("kv_gpu", "act_gpu", "kv_host", "act_host"):
            object.__setattr__(self, field, whole("cache ratio plan", field, getattr(self, field), "blocks", least=0))

    @property
    def blocks(self) -> int:
        """All blocks."""
        return self.kv_gpu + self.act_gpu + self.kv_host + self.act_host

    @property
    def act_share(self) -> float:
        """Share of the blocks held as activations; 0 for no block."""
        return (self.act_gpu + self.act_host) / self.blocks if self.blocks else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSettings:
    """What ``CacheRatioProblem.build`` was given beside machine, workload and profile, whose docstring has the fields; ``contexts`` is
    None if every request has the workload's."""

    contexts: tuple[int, ...] | None = None
    block: int = BLOCK
    batches: int = 1
    weights: WeightsOn = "host"
    buffered_requests: int = STAGED_REQUESTS

    def __post_init__(self) -> None:
        for field, unit, least in (("block", "tokens", 1), ("batches", "GPU batches", 1), ("buffered_requests", "requests", 0)):
            object.__setattr__(self, field, whole("cache ratio", field, getattr(self, field), unit, least=least))
        if self.weights not in ("host", "gpu"):
            raise ValueError(f"cache ratio: weights are on the 'host' or on the 'gpu', not {self.weights!r}")
        if self.contexts is not None:
            object.__setattr__(self, "contexts", wholes("cache ratio", "contexts", self.contexts, "tokens", least=0))

    def tokens(self, workload: Workload) -> NDArray[np.int64]:
        """Tokens of each request [GPU batches, requests of one]."""
        batches, batch = self.batches, workload.batch
        if batches * batch > MOST_REQUESTS:
            raise ValueError(
                f"cache ratio: {batches} batches of {batch} requests are more than {MOST_REQUESTS} requests, the most of a problem; "
                "serve fewer"
            )
        if self.contexts is None:
            return np.full((batches, batch), workload.context)
        if len(self.contexts) != batches * batch:
            raise ValueError(
                f"contexts has {len(self.contexts)} requests, but {batches} batches of {batch} are {batches * batch}; give as many"
            )
        return np.array(self.contexts, dtype=np.int64).reshape(batches, batch)

    def sizes(self, workload: Workload, longest: int) -> dict[str, int]:
        """Bytes of a block in each form, and what GPU and host hold beside blocks."""
        layers = offload_layers(workload)
        return {
            "kv_block": math.ceil(sum(layer.layers * layer.kv_bytes * self.block for layer in layers)),
            "act_block": math.ceil(sum(layer.layers * layer.act_bytes * self.block for layer in layers)),
            "gpu_held": math.ceil(gpu_overhead(workload, longest, weights=self.weights, buffered_requests=self.buffered_requests)),
            "host_held": 0 if self.weights == "gpu" else math.ceil(workload.weight_bytes),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheRatioProblem:
    """See the module's docstring.

    ``request_blocks``: blocks of each request. ``kv_block``, ``act_block`` [B, whole] of a block in all layers; ``gpu_held``,
    ``host_held`` [B] held beside blocks, within ``gpu_capacity``, ``host_capacity``; ``streamed`` [B] of weights over the link in a
    step. ``system``, ``workload``, ``profile`` and ``settings`` are what it was built from; None for a problem made of coefficients.
    """

    layers: tuple[RatioLayer, ...]
    request_blocks: tuple[int, ...]
    kv_block: int
    act_block: int
    gpu_capacity: int
    host_capacity: int
    gpu_held: int = 0
    host_held: int = 0
    streamed: float = 0.0
    system: System | None = None
    workload: Workload | None = None
    profile: OffloadProfile | None = None
    settings: RatioSettings | None = None

    def __post_init__(self) -> None:
        what = "cache ratio problem"
        if isinstance(self.layers, str) or not all(isinstance(layer, RatioLayer) for layer in self.layers):
            raise ValueError(f"{what}: layers must be several RatioLayer, not {shown(self.layers)}")
        blocks = wholes(what, "request_blocks", self.request_blocks, "blocks", least=0)
        if not self.layers or not blocks:
            raise ValueError(f"a {what} needs at least one class of layers and one request")
        if len(blocks) > MOST_REQUESTS or sum(blocks) > MOST_BLOCKS:
            raise ValueError(
                f"{what}: {sum(blocks)} blocks of {len(blocks)} requests are more than the most, {MOST_BLOCKS} of {MOST_REQUESTS}; "
                "serve fewer or shorter requests, or use larger blocks"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "request_blocks", blocks)
        check_number(what, "streamed", self.streamed, "B", zero=True, infinite=False)
        for field in ("kv_block", "act_block", "gpu_capacity", "host_capacity", "gpu_held", "host_held"):
            least = int(field.endswith("block"))
            object.__setattr__(self, field, whole("cache ratio problem", field, getattr(self, field), "bytes", least=least))

    @classmethod
    def build(
        cls,
        system: System,
        workload: Workload,
        *,
        profile: OffloadProfile = DATASHEET,
        contexts: Sequence[int] | None = None,
        block: int = BLOCK,
        batches: int = 1,
        weights: WeightsOn = "host",
        buffered_requests: int = STAGED_REQUESTS,
        load_kv: LinearTime | None = None,
        load_act: LinearTime | None = None,
        generate: LinearTime | None = None,
    ) -> CacheRatioProblem:
        """The problem of one decode step of ``batches`` GPU batches of ``workload.batch`` requests that share one load of the weights.

        ``contexts`` [tokens]: of each request, in order of the batches; ``workload.context`` for all unless said. The GPU holds two
        layers of weights (all with ``weights="gpu"``), the embeddings and two staging buffers (``gpu_overhead``), then blocks; the
        host the weights, then blocks. New tokens are stored in the proportions in which the blocks are held. Times are those of machine
        and LLM unless measured ones (``LinearTime.fit``) are given for a layer.
        """
        settings = RatioSettings(
            contexts=None if contexts is None else wholes("cache ratio", "contexts", contexts, "tokens", least=0),
            block=block,
            batches=batches,
            weights=weights,
            buffered_requests=buffered_requests,
        )
        machine, tokens = OffloadMachine.build(system, profile), settings.tokens(workload)
        blocks = -(-tokens // settings.block)
        fresh = tokens.size / max(int(blocks.sum()), 1)
        of_batch = tokens.sum(axis=1, dtype=np.float64)
        listed, streamed = [], 0.0
        for layer in offload_layers(workload, settings.batches):
            stays = weights == "gpu"
            listed.append(
                RatioLayer(
                    layers=layer.layers,
                    weights=0.0 if stays else layer.weight_time(machine),
                    compute=float(layer.compute_time(machine, of_batch).sum()),
                    load_kv=load_kv or LinearTime(slope=float(layer.kv_time(machine, settings.block))),
                    load_act=load_act or LinearTime(slope=float(layer.act_time(machine, settings.block))),
                    generate=generate or LinearTime(slope=float(layer.recompute_time(machine, settings.block))),
                    store_kv=fresh * layer.kv_bytes / machine.to_host,
                    store_act=fresh * layer.act_bytes / machine.to_host,
                )
            )
            streamed += 0.0 if stays else layer.layers * layer.sent_bytes
        return cls(
            layers=tuple(listed),
            request_blocks=tuple(blocks.ravel().tolist()),
            gpu_capacity=math.floor(min(machine.gpu_capacity, LARGEST_CAPACITY)),
            host_capacity=math.floor(min(machine.host_capacity, LARGEST_CAPACITY)),
            streamed=streamed,
            system=system,
            workload=workload,
            profile=profile,
            settings=settings,
            **settings.sizes(workload, int(tokens.max())),
        )

    @property
    def blocks(self) -> int:
        """Blocks of all requests."""
        return sum(self.request_blocks)

    @property
    def gpu_room(self) -> int:
        """Bytes of the GPU that blocks may take; below 0 if not even what is beside them fits."""
        return self.gpu_capacity - self.gpu_held

    @property
    def host_room(self) -> int:
        """Bytes of the host that blocks may take; below 0 if not even the weights fit."""
        return self.host_capacity - self.host_held

    @property
    def possible(self) -> bool:
        """Whether any plan fits: all blocks in the smaller form, as many as fit on the GPU and the rest on the host."""
        return _possible(self.blocks, self.kv_block, self.act_block, self.gpu_room, self.host_room)

    @property
    def ratios(self) -> OffloadRatios:
        """r, rho, w and c with all state on the host, of the sums over layers; ValueError where sending keys and values takes no time."""
        kv = sum(layer.layers * layer.load_kv.slope for layer in self.layers)
        if not kv * self.blocks > 0:
            raise ValueError("ratios are for keys and values that take time to send; this problem has no block, or an infinitely fast link")

        def over(field: str) -> float:
            return sum(layer.layers * getattr(layer, field).slope for layer in self.layers) / kv

        def fixed(field: str) -> float:
            return sum(layer.layers * float(getattr(layer, field)) for layer in self.layers) / (kv * self.blocks)

        return OffloadRatios(r=over("load_act"), rho=over("generate"), w=fixed("weights"), c=fixed("compute"))

    def seconds(self, act_gpu: ArrayLike, kv_host: ArrayLike, act_host: ArrayLike) -> Array:
        """Seconds of the step at each of the counts; they broadcast, and blocks kept as KV on the GPU take no time of their own."""
        total = np.zeros(np.broadcast_shapes(np.shape(act_gpu), np.shape(kv_host), np.shape(act_host)))
        for layer in self.layers:
            total = total + layer.layers * np.maximum.reduce(np.broadcast_arrays(*layer.times(act_gpu, kv_host, act_host)))
        return total

    def kv_gpu_for(self, act_gpu: ArrayLike, act_host: ArrayLike) -> NDArray[np.int64]:
        """The most KV blocks that the GPU can take beside ``act_gpu``, of those that are left: never slower than on the host."""
        gpu, host = np.asarray(act_gpu, dtype=np.int64), np.asarray(act_host, dtype=np.int64)
        return np.clip(np.minimum((self.gpu_room - gpu * self.act_block) // self.kv_block, self.blocks - gpu - host), 0, None)

    def fitting(self, kv_gpu: ArrayLike, act_gpu: ArrayLike, kv_host: ArrayLike, act_host: ArrayLike) -> NDArray[np.bool_]:
        """Whether each plan holds all blocks, none less than 0 times, within both capacities."""
        counts = [np.asarray(count, dtype=np.int64) for count in (kv_gpu, act_gpu, kv_host, act_host)]
        kv, act, far_kv, far_act = counts
        good = kv + act + far_kv + far_act == self.blocks
        good = good & (kv * self.kv_block + act * self.act_block <= self.gpu_room)
        good = good & (far_kv * self.kv_block + far_act * self.act_block <= self.host_room)
        return np.asarray(good & (np.minimum.reduce(np.broadcast_arrays(*counts)) >= 0))

    def evaluate(self, plan: CacheRatioPlan) -> OffloadCost:
        """What a plan costs in one step; ValueError for a plan with another number of blocks."""
        if plan.blocks != self.blocks:
            raise ValueError(f"the plan holds {plan.blocks} blocks, the problem has {self.blocks}: it belongs to another problem")
        times = [(layer.layers, layer.times(plan.act_gpu, plan.kv_host, plan.act_host)) for layer in self.layers]
        near = plan.kv_gpu * self.kv_block + plan.act_gpu * self.act_block
        far = plan.kv_host * self.kv_block + plan.act_host * self.act_block
        names = ("GPU", "host") if self.system is None else (self.system.tiers[0].name, self.system.tiers[1].name)
        return OffloadCost(
            latency=float(self.seconds(plan.act_gpu, plan.kv_host, plan.act_host)),
            link_time=sum(count * float(link) for count, (link, _, _) in times),
            gpu_time=sum(count * float(gpu) for count, (_, gpu, _) in times),
            tier_names=names,
            tier_bytes=(float(self.gpu_held + near), float(self.host_held + far)),
            capacity=(float(self.gpu_capacity), float(self.host_capacity)),
            to_device_bytes=self.streamed + far,
        )

    def explain_infeasible(self) -> str:
        """Why nothing fits, in one sentence: which memory, how many GB, and changes each of which alone would help."""
        if self.possible:
            return "a plan fits"
        names = ("the GPU", "the host") if self.system is None else tuple(tier.name for tier in self.system.tiers[:2])
        rooms, held = (self.gpu_room, self.host_room), (self.gpu_held, self.host_held)
        small = min(self.kv_block, self.act_block)
        form = "activations" if self.act_block < self.kv_block else "keys and values"
        texts = [
            f"{name} needs {kept / GB:.6g} GB beside the blocks and has {(kept + room) / GB:.6g} GB, {gigabytes_more(-room)} GB too little"
            for name, room, kept in zip(names, rooms, held, strict=True)
            if room < 0
        ]
        if not texts:
            most = sum(room // small for room in rooms)
            texts.append(
                f"{self.blocks} blocks need {self.blocks * small / GB:.6g} GB even as {form}, "
                f"and {names[0]} and {names[1]} have room for {most}"
            )
        # As little as possible on the GPU, and on the host what then is left.
        host = small * max(self.blocks - max(rooms[0], 0) // small, 0) - rooms[1]
        over = []
        if rooms[0] < 0:
            tier = None if self.system is None else self.system.tiers[0]
            missing = -rooms[0] if tier is None else max(capacity_for(held[0] + 1, tier.capacity, self.profile), -rooms[0])
            over.append(f"enlarge {names[0]} by {gigabytes_more(missing)} GB")
        if host > 0:
            over.append(f"enlarge {names[1]} by {gigabytes_more(host + 1)} GB")
        return f"{' and '.join(texts)}; {', or '.join([' and '.join(over), *self._ways()])}"

    def _ways(self) -> list[str]:
        """What would help but more memory: fewer requests or shorter contexts, weights on the host, fewer bits."""
        settings, workload = self.settings, self.workload
        if settings is None or workload is None:
            return []
        tokens, capacity = settings.tokens(workload), (self.gpu_capacity, self.host_capacity)

        def fits(settings: RatioSettings, workload: Workload, tokens: NDArray[np.int64]) -> bool:
            sizes = settings.sizes(workload, int(tokens.max()))
            rooms = capacity[0] - sizes["gpu_held"], capacity[1] - sizes["host_held"]
            return _possible(int((-(-tokens // settings.block)).sum()), sizes["kv_block"], sizes["act_block"], *rooms)

        def shorter(longest: int) -> NDArray[np.int64]:
            return np.minimum(tokens, longest)

        ways = []
        batch, context = workload.batch, int(tokens.max())
        fewer = largest(lambda n: fits(settings, replace(workload, batch=n), tokens[:, :n]), batch - 1)
        if fewer:
            ways.append(f"serve {'' if settings.contexts is None else 'the first '}{fewer} requests a GPU batch instead of {batch}")
        longest = 0 if fewer else largest(lambda n: fits(settings, replace(workload, context=n), shorter(n)), context - 1)
        if longest:
            ways.append(f"shorten contexts to {longest} tokens at most")
        if settings.weights == "gpu" and fits(replace(settings, weights="host"), workload, tokens):
            ways.append("stream the weights (weights='host')")
        bits = fewer_bits(workload, lambda served: fits(settings, served, tokens))
        return [*ways, bits] if bits else ways


def _possible(blocks: int, kv_block: int, act_block: int, gpu_room: int, host_room: int) -> bool:
    """All blocks in the smaller form, as many as fit on the GPU and the rest on the host."""
    small = min(kv_block, act_block)
    return min(gpu_room, host_room) >= 0 and blocks <= gpu_room // small + host_room // small


def act_first_is_optimal(problem: CacheRatioProblem) -> bool:
    """Whether filling the GPU with ACT blocks first is optimal: in every layer, recomputing them takes no longer than the transfers.

        t_c + T_gen(A) <= t_w + T_load_kv(blocks - A),     A = ACT blocks that the GPU can hold

    Premises: r < 1, transfer times in proportion to bytes (no intercepts), stores hidden, a host that could hold all blocks as KV. Then a
    byte on the GPU saves one byte of the link whatever it holds, so that a step depends on the total of ACT blocks alone, and the best
    total is at least A if this holds, and with one class of layers only then (in the relaxation; whole blocks add the time of one block a
    layer at most). False where r >= 1. Derived here.
    """
    if problem.act_block >= problem.kv_block:
        return False
    first = min(problem.blocks, max(problem.gpu_room, 0) // problem.act_block)
    for layer in problem.layers:
        link, gpu, _ = layer.times(first, problem.blocks - first, 0)
        if gpu > link:
            return False
    return True
