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
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_number, whole
from .hardware import System
from .offload import STAGED_REQUESTS, OffloadCost, OffloadMachine, OffloadRatios, WeightsOn, gpu_overhead, offload_layers
from .offload_baselines import GenerationCost, prefill_flops
from .offload_profiles import DATASHEET, OffloadProfile
from .roofline import Array
from .units import GB
from .workload import Workload

BLOCK = 16
"""Tokens of a block in HybridServe."""

Form = Literal["best", "act_first", "kv", "act"]


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
        n, t = np.asarray(blocks, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        if n.ndim != 1 or n.shape != t.shape or len(n) < 2:
            raise ValueError(f"a linear time is fitted to two or more pairs of blocks and seconds, not to shapes {n.shape} and {t.shape}")
        if not (np.all(np.isfinite(n)) and np.all(np.isfinite(t)) and np.all(np.diff(n) > 0) and n[0] >= 0):
            raise ValueError(f"the samples of a linear time need finite times at increasing block counts, not {n.tolist()}; sort them")
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheRatioProblem:
    """See the module's docstring.

    ``request_blocks``: blocks of each request. ``kv_block``, ``act_block`` [B, whole] of a block in all layers; ``gpu_held``,
    ``host_held`` [B] held beside blocks, within ``gpu_capacity``, ``host_capacity``; ``streamed`` [B] of weights over the link in a
    step. ``system``, ``workload`` and ``profile`` are what it was built from; None for a problem made of coefficients.
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

    def __post_init__(self) -> None:
        if not self.layers or not self.request_blocks:
            raise ValueError("a cache ratio problem needs at least one class of layers and one request")
        blocks = tuple(whole("cache ratio problem", "request_blocks", n, "blocks", least=0) for n in self.request_blocks)
        object.__setattr__(self, "request_blocks", blocks)
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
        block, batches = whole("cache ratio", "block", block, "tokens"), whole("cache ratio", "batches", batches, "GPU batches")
        if weights not in ("host", "gpu"):
            raise ValueError(f"cache ratio: weights are on the 'host' or on the 'gpu', not {weights!r}")
        machine, requests = OffloadMachine.build(system, profile), workload.batch * batches
        found = [workload.context] * requests if contexts is None else list(contexts)
        if len(found) != requests:
            raise ValueError(f"contexts has {len(found)} requests, but {batches} batches of {workload.batch} are {requests}; give as many")
        tokens = np.array([whole("cache ratio", "contexts", one, "tokens", least=0) for one in found])
        blocks = -(-tokens // block)
        fresh = requests / max(int(blocks.sum()), 1)
        of_batch = tokens.reshape(batches, workload.batch).sum(axis=1)
        listed, kv_bytes, act_bytes, streamed = [], 0.0, 0.0, 0.0
        for layer in offload_layers(workload, batches):
            stays = weights == "gpu"
            listed.append(
                RatioLayer(
                    layers=layer.layers,
                    weights=0.0 if stays else layer.weight_time(machine),
                    compute=float(layer.compute_time(machine, of_batch).sum()),
                    load_kv=load_kv or LinearTime(slope=float(layer.kv_time(machine, block))),
                    load_act=load_act or LinearTime(slope=float(layer.act_time(machine, block))),
                    generate=generate or LinearTime(slope=float(layer.recompute_time(machine, block))),
                    store_kv=fresh * layer.kv_bytes / machine.to_host,
                    store_act=fresh * layer.act_bytes / machine.to_host,
                )
            )
            kv_bytes += layer.layers * layer.kv_bytes * block
            act_bytes += layer.layers * layer.act_bytes * block
            streamed += 0.0 if stays else layer.layers * layer.sent_bytes
        held = gpu_overhead(workload, int(tokens.max()), weights=weights, buffered_requests=buffered_requests)
        return cls(
            layers=tuple(listed),
            request_blocks=tuple(blocks.tolist()),
            kv_block=math.ceil(kv_bytes),
            act_block=math.ceil(act_bytes),
            gpu_capacity=math.floor(machine.gpu_capacity),
            host_capacity=math.floor(min(machine.host_capacity, 2.0**61)),
            gpu_held=math.ceil(held),
            host_held=0 if weights == "gpu" else math.ceil(workload.weight_bytes),
            streamed=streamed,
            system=system,
            workload=workload,
            profile=profile,
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
        small = min(self.kv_block, self.act_block)
        return min(self.gpu_room, self.host_room) >= 0 and self.blocks <= self.gpu_room // small + self.host_room // small

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
        """Why nothing fits, in one sentence: which memory, how many GB, and what would help."""
        names = ("the GPU", "the host") if self.system is None else tuple(tier.name for tier in self.system.tiers[:2])
        rooms = (self.gpu_room, self.host_room)
        held = (self.gpu_held, self.host_held)
        for name, room, kept in zip(names, rooms, held, strict=True):
            if room < 0:
                bits = "" if self.workload is None else f" than {self.workload.weight_bits:g}"
                return (
                    f"{name} needs {kept / GB:.6g} GB beside the blocks and has {(kept + room) / GB:.6g} GB, {-room / GB:.3g} GB too little"
                    f"; enlarge it, or use fewer bits a weight{bits}"
                )
        small = min(self.kv_block, self.act_block)
        most = sum(room // small for room in rooms)
        short = max(self.blocks - most, 0)
        form = "activations" if self.act_block < self.kv_block else "keys and values"
        text = (
            f"{self.blocks} blocks need {self.blocks * small / GB:.6g} GB even as {form}, and {names[0]} and {names[1]}"
            f" have room for {most}; enlarge {names[1]} by {short * small / GB:.3g} GB"
        )
        if self.workload is None or not self.blocks:
            return text + " or serve fewer tokens"
        share, workload = most / self.blocks, self.workload
        bits = math.floor((workload.activation_bits if form == "activations" else workload.kv_bits) * share * 100) / 100
        return text + f", or serve about {int(len(self.request_blocks) * share)} requests, or hold {form} at {bits:g} bits"


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


def generation_time(
    system: System,
    workload: Workload,
    *,
    prompt: int,
    generated: int,
    profile: OffloadProfile = DATASHEET,
    form: Form = "best",
    buffered_requests: int = STAGED_REQUESTS,
) -> GenerationCost:
    """A batch's whole generation: ``prompt`` tokens of each request read, ``generated`` new ones written, state split in any fraction.

    ``form``: "kv" all keys and values; "act" all activations; "act_first" the GPU full of activations and the best split of the rest
    at each step; "best" the best split everywhere. With A tokens held as ACT of n and a GPU cache of R bytes a layer, full in any case,

        T = max(t_w + max(kv n - (kv - x) A - R, 0) / link,  t_c + t_rec(A),  new tokens' share of these bytes / link to the host)

    is convex in A, and lowest at an end or where two of these lines cross; the host's capacity bounds A. What is optimised is the decode
    steps; prefill follows from the first one's plan. Prefill of a layer: max(FLOPs / peak, weights / link, bytes that plan holds on the
    host / link to the host). What changing a plan between steps costs is left out.
    """
    prompt, generated = (
        whole("generation", "prompt", prompt, "tokens", least=0),
        whole("generation", "generated", generated, "new tokens of each request"),
    )
    if form not in ("best", "act_first", "kv", "act"):
        raise ValueError(f"generation: form must be 'best', 'act_first', 'kv' or 'act', not {form!r}")
    machine, layers = OffloadMachine.build(system, profile), offload_layers(workload)
    room = machine.gpu_capacity - gpu_overhead(workload, prompt + generated, buffered_requests=buffered_requests)
    kv, act = layers[0].kv_bytes, layers[0].act_bytes
    cache = max(room, 0.0) / workload.llm.num_hidden_layers
    tokens = workload.batch * (prompt + np.arange(generated, dtype=np.float64))
    least = {"best": 0.0 * tokens, "act_first": np.minimum(tokens, cache / act), "kv": 0.0 * tokens, "act": tokens}[form]
    most = 0.0 * tokens if form == "kv" else tokens
    if kv != act and form in ("best", "act_first"):  # as much of the smaller form as the host needs to hold the state
        host_room = (machine.host_capacity - workload.weight_bytes) / workload.llm.num_hidden_layers
        limit = (kv * tokens - cache - host_room) / (kv - act)
        if act < kv:
            least = np.clip(limit, least, most)
        else:
            most = np.clip(limit, least, most)
    share_of_new = workload.batch / np.maximum(tokens, workload.batch)
    lines = []
    for layer in layers:
        weights, compute = layer.weight_time(machine), layer.compute_time(machine, tokens)
        host, saved = kv * tokens - cache, act - kv
        back = share_of_new / machine.to_host
        lines.append(
            [
                (weights + host / machine.to_device, saved / machine.to_device + 0.0 * tokens),
                (weights + 0.0 * tokens, 0.0 * tokens),
                (compute, float(layer.recompute_time(machine, 1.0)) + 0.0 * tokens),
                (host * back, saved * back),
            ]
        )
    candidates = [least, most]
    for of_layer in lines:
        for i, (constant, slope) in enumerate(of_layer):
            for other, steeper in of_layer[i + 1 :]:
                with np.errstate(divide="ignore", invalid="ignore"):
                    crossing = (constant - other) / (steeper - slope)
                candidates.append(np.clip(np.where(np.isfinite(crossing), crossing, 0.0), least, most))
    held = np.stack(candidates)
    heights = np.zeros(held.shape)
    for layer, of_layer in zip(layers, lines, strict=True):
        heights += layer.layers * np.maximum.reduce([constant + slope * held for constant, slope in of_layer])
    chosen = heights.argmin(axis=0)[None]
    decode = float(np.take_along_axis(heights, chosen, axis=0).sum()) if room >= 0 else math.inf
    as_act = np.take_along_axis(held, chosen, axis=0)[0]
    host_bytes = np.maximum(kv * tokens + (act - kv) * as_act - cache, 0.0)
    prefill = sum(
        layer.layers
        * max(
            float(prefill_flops(layer, prompt)) / machine.peak,
            layer.weight_bytes / machine.to_device,
            float(host_bytes[0]) / machine.to_host,
        )
        for layer in layers
    )
    return GenerationCost(
        prefill=prefill,
        decode=decode,
        throughput=workload.batch * generated / (prefill + decode) if prefill + decode > 0 else math.inf,
        host_bytes=workload.weight_bytes + workload.llm.num_hidden_layers * float(host_bytes.max()),
        host_capacity=machine.host_capacity,
    )
