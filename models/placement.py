"""Placement of weights, KV cache and activations on GPU, host and disk for throughput: FlexGen's problem (arXiv 2303.06865).

A block of B = g k requests, k GPU batches of g, passes through the layers one after the other, so that a layer's weights are moved once
for the block. Shares (GPU, host, disk) say where weights w, cache c and activations h, the inputs of layers ("hidden"), live. Per layer:

    prefill = max(ctog + dtoc, gtoc + ctod, comp)            decode = ctog + max(gtoc, dtoc, ctod, comp)
    T = L prefill + L (n - 1) decode                         n generated tokens after s of prompt, decode at a context of s + n/2

ctog: weights and activations not on the GPU, host to GPU. gtoc: activations back, and in prefill the new cache. dtoc: from disk, weights,
activations and in decode the cache. ctod: to disk, new cache and activations. comp: matrices and attention on the GPU; in decode the
attention over cache that is not on the GPU runs on the host, after it. Every term is linear in w, B c, B h and B; ``coefficients`` has
them. Latency is seconds a generated token, T / (B n).

Times and memory follow the cost model that FlexGen published; bytes and FLOPs are those of the LLM, the same for OPT. As there: uniform
layers (means, if they differ), no causal mask in prefill, all experts moved, embeddings and LM head left out, attention on the host at
a rate in FLOP/s. Peak memory is the sum of all buffers of a layer, which is more than is used: the published policy 20/80/0/100/0/100 of
OPT-30B ran in 16 GB and needs 20.2 GB by these sums, so that FlexGen prices its policies with 1.2 of the memory. Fewer bits shrink
stored and moved bytes only: time and room to unpack them are left out, as in FlexGen's model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_number, shown, whole, wholes
from .hardware import System
from .llm import LLMConfig
from .offload import OffloadCost, gigabytes_more, largest
from .placement_t4 import FLEXGEN_T4, FLEXGEN_T4_SYSTEM, PlacementProfile
from .roofline import Array
from .units import GB
from .workload import Workload

Shares = tuple[float, float, float]

PREFILL_LANES = ("host to GPU and disk to host", "GPU to host and host to disk", "compute")
DECODE_LANES = ("GPU to host", "disk to host", "host to disk", "compute")
PEAKS = ("GPU in prefill", "GPU in decode", "host in prefill", "host in decode", "disk")
TIER_OF_PEAK = (0, 0, 1, 1, 2)

GROUP_BITS = 4.5
"""Bits an element of FlexGen's four-bit form: groups of 64 with a scale and a minimum of 16 bits each."""

GPU_BATCH_SIZES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
"""The GPU batches that FlexGen's search tries, up to the first that does not fit."""

GRID = 8
"""Parts that shares are divided into where what would help is looked for."""

LEAST_PERCENT = 7
"""Per cent of the bits of weights, keys and values below which nothing is proposed: a bit of sixteen."""

SPARE = 1e-5
"""Share of a tier that is kept free there."""

SUM_TOLERANCE = 1e-9
"""How far a plan's shares may be from a sum of 1: the rounding of decimal fractions and of a division by their sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """Shares on (GPU, host, disk) of ``weights``, KV ``cache`` and ``hidden`` activations; ``gpu_batches`` GPU batches of ``gpu_batch``."""

    weights: Shares
    cache: Shares
    hidden: Shares
    gpu_batch: int
    gpu_batches: int

    def __post_init__(self) -> None:
        for name in ("weights", "cache", "hidden"):
            shares = getattr(self, name)
            if not isinstance(shares, Sequence) or len(shares) != 3:
                raise ValueError(f"plan: {name} must be three shares (GPU, host, disk), not {shown(shares)}; add the missing ones")
            for share in shares:
                check_number("plan", name, share, "share", zero=True)
            if max(shares) > 1 or abs(math.fsum(shares) - 1) > SUM_TOLERANCE:
                raise ValueError(f"plan: {name} must be shares from 0 to 1 with a sum of 1, not {shares!r}; divide them by their sum")
            object.__setattr__(self, name, tuple(float(share) for share in shares))
        object.__setattr__(self, "gpu_batch", whole("plan", "gpu_batch", self.gpu_batch, "requests"))
        object.__setattr__(self, "gpu_batches", whole("plan", "gpu_batches", self.gpu_batches, "GPU batches"))

    @classmethod
    def from_percent(cls, percent: Sequence[float], gpu_batch: int, gpu_batches: int) -> PlacementPlan:
        """FlexGen's notation: percent of weights, cache and activations on (GPU, host) each; the rest is on disk."""
        if len(percent) != 6:
            raise ValueError(f"plan: percent must be six numbers, GPU and host for weights, cache, hidden, not {percent!r}; add the others")
        pairs = [(percent[i] / 100, percent[i + 1] / 100) for i in (0, 2, 4)]
        weights, cache, hidden = (_rounded((gpu, host, 1 - gpu - host)) for gpu, host in pairs)
        return cls(weights=weights, cache=cache, hidden=hidden, gpu_batch=gpu_batch, gpu_batches=gpu_batches)

    @property
    def block(self) -> int:
        """Requests in a block: GPU batch x GPU batches."""
        return self.gpu_batch * self.gpu_batches

    @property
    def percent(self) -> str:
        """FlexGen's notation, rounded to whole percents: "20/80/0/100/0/100"."""
        return "/".join(f"{100 * share:.0f}" for shares in (self.weights, self.cache, self.hidden) for share in shares[:2])


def _rounded(shares: Shares) -> Shares:
    """Shares without the rounding of a subtraction, so that 1 - 0.2 - 0.8 is 0."""
    gpu, host, disk = (round(share, 12) + 0.0 for share in shares)
    return gpu, host, disk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementCoefficients:
    """What a share costs, for one GPU batch size g: rows x (GPU, host, disk), and what is there whatever the shares.

    Seconds of one layer: ``prefill[r]`` = weights w + B (cache c + hidden h + fixed), likewise ``decode``, rows as in ``PREFILL_LANES``
    and ``DECODE_LANES``. Bytes of all layers at their peak: the same plus g (cache_buffer c + hidden_buffer h + fixed_buffer), rows as
    in ``PEAKS``. All numbers are at least 0.
    """

    prefill_weights: Array
    prefill_cache: Array
    prefill_hidden: Array
    prefill_fixed: Array
    decode_weights: Array
    decode_cache: Array
    decode_hidden: Array
    decode_fixed: Array
    held_weights: Array
    held_cache: Array
    held_hidden: Array
    cache_buffer: Array
    hidden_buffer: Array
    fixed_buffer: Array

    def prefill(self, weights: ArrayLike, cache: ArrayLike, hidden: ArrayLike, block: ArrayLike) -> Array:
        """Seconds [..., lane] of a layer's prefill for shares [..., 3] and blocks [...]."""
        block = np.asarray(block, dtype=np.float64)[..., None]
        moved = _each(self.prefill_cache, cache) + _each(self.prefill_hidden, hidden) + self.prefill_fixed
        return _each(self.prefill_weights, weights) + block * moved

    def decode(self, weights: ArrayLike, cache: ArrayLike, hidden: ArrayLike, block: ArrayLike) -> Array:
        """Seconds [..., lane] of a layer's decode step for shares [..., 3] and blocks [...]."""
        block = np.asarray(block, dtype=np.float64)[..., None]
        moved = _each(self.decode_cache, cache) + _each(self.decode_hidden, hidden) + self.decode_fixed
        return _each(self.decode_weights, weights) + block * moved

    def peaks(self, weights: ArrayLike, cache: ArrayLike, hidden: ArrayLike, gpu_batch: int, block: ArrayLike) -> Array:
        """Bytes [..., peak] for shares [..., 3] and blocks [...]."""
        block = np.asarray(block, dtype=np.float64)[..., None]
        held = _each(self.held_cache, cache) + _each(self.held_hidden, hidden)
        buffers = _each(self.cache_buffer, cache) + _each(self.hidden_buffer, hidden) + self.fixed_buffer
        return _each(self.held_weights, weights) + block * held + gpu_batch * buffers


def _each(rows: Array, shares: ArrayLike) -> Array:
    """Rows [r, 3] times shares [..., 3], added in one order so that a grid of plans equals its singles bit for bit."""
    shares = np.asarray(shares, dtype=np.float64)[..., None, :]
    return rows[:, 0] * shares[..., 0] + rows[:, 1] * shares[..., 1] + rows[:, 2] * shares[..., 2]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """FlexGen's problem for an LLM, prompts of ``prompt`` and ``generated`` tokens.

    Per layer: ``weight_bytes``, ``linear_flops`` a token, ``kv_bytes`` and ``act_bytes`` a token, ``attention_flops`` a token and token
    of context, ``score_bytes`` a pair of tokens (all heads), ``inner_bytes`` a token inside the FFN. ``capacity`` [B] of GPU, host, disk,
    of which ``profile.usable`` may be used. ``gpu_batch_sizes``: those that solvers choose from, and that their bounds are over.
    ``hidden_on_disk``: whether activations may be there; FlexGen's runtime cannot.
    """

    name: str
    prompt: int
    generated: int
    layers: int
    hidden_size: int
    weight_bytes: float
    linear_flops: float
    kv_bytes: float
    act_bytes: float
    attention_flops: float
    score_bytes: float
    inner_bytes: float
    tier_names: tuple[str, str, str]
    capacity: Shares
    profile: PlacementProfile
    gpu_batch_sizes: tuple[int, ...] = field(default=GPU_BATCH_SIZES)
    hidden_on_disk: bool = False

    def __post_init__(self) -> None:
        what = f"placement of {self.name!r}"
        for name, unit in (("prompt", "tokens"), ("generated", "tokens"), ("layers", "layers"), ("hidden_size", "elements")):
            object.__setattr__(self, name, whole(what, name, getattr(self, name), unit))
        for name in ("weight_bytes", "linear_flops", "kv_bytes", "act_bytes", "attention_flops", "score_bytes", "inner_bytes"):
            check_number(what, name, getattr(self, name), "B or FLOP", zero=True, infinite=False)
        if len(self.capacity) != 3 or len(self.tier_names) != 3:
            raise ValueError(f"{what}: capacity and tier_names are of GPU, host and disk, not {self.capacity!r} of {self.tier_names!r}")
        for room in self.capacity:
            check_number(what, "capacity", room, "B", zero=True, infinite=False)
        sizes = wholes(what, "gpu_batch_sizes", self.gpu_batch_sizes, "requests")
        if not sizes:
            raise ValueError(f"{what}: gpu_batch_sizes must hold at least one size, not none; give the sizes to choose from")
        object.__setattr__(self, "gpu_batch_sizes", tuple(sorted(set(sizes))))

    @classmethod
    def build(
        cls,
        llm: LLMConfig,
        *,
        prompt: int,
        generated: int,
        system: System = FLEXGEN_T4_SYSTEM,
        profile: PlacementProfile = FLEXGEN_T4,
        weight_bits: float = 16,
        kv_bits: float = 16,
        activation_bits: float = 16,
        gpu_batch_sizes: tuple[int, ...] = GPU_BATCH_SIZES,
        hidden_on_disk: bool = False,
    ) -> PlacementProblem:
        """The problem on a system's first three tiers, GPU, host and disk in this order: their capacities; all rates are the profile's.
        Of a system with two tiers nothing is on disk.

        ``GROUP_BITS`` as ``weight_bits`` or ``kv_bits`` is FlexGen's four-bit compression.
        """
        if len(system.tiers) < 2:
            names = [tier.name for tier in system.tiers]
            raise ValueError(
                f"system {system.name!r} has the tiers {names}; placement needs a GPU's memory, a host's and perhaps a disk, in this order"
            )
        workload = Workload(llm=llm, batch=1, context=0, weight_bits=weight_bits, kv_bits=kv_bits, activation_bits=activation_bits)
        layers = llm.num_hidden_layers
        used = sum(count * sum(m.inputs * m.outputs * m.experts_per_token for m in matrices) for count, matrices in llm.layers)
        inner = llm.intermediate_size
        if llm.num_experts:
            inner = (llm.num_experts_per_tok + llm.num_shared_experts) * llm.moe_intermediate_size
        gpu, host = system.tiers[:2]
        disk = system.tiers[2] if len(system.tiers) > 2 else None
        return cls(
            name=llm.name,
            prompt=prompt,
            generated=generated,
            layers=layers,
            hidden_size=llm.hidden_size,
            weight_bytes=workload.weight_bytes / layers,
            linear_flops=2.0 * used / layers,
            kv_bytes=llm.state_elements * kv_bits / 8,
            act_bytes=llm.hidden_size * activation_bits / 8,
            attention_flops=float(llm.attention_flops),
            score_bytes=llm.num_attention_heads * activation_bits / 8,
            inner_bytes=inner * (1 + llm.gated_ffn) * activation_bits / 8,
            tier_names=(gpu.name, host.name, disk.name if disk else "no disk"),
            capacity=(gpu.capacity, host.capacity, disk.capacity if disk else 0.0),
            profile=profile,
            gpu_batch_sizes=gpu_batch_sizes,
            hidden_on_disk=hidden_on_disk,
        )

    @property
    def room(self) -> Shares:
        """Bytes of each tier that a plan may use."""
        gpu, host, disk = (size * self.profile.usable for size in self.capacity)
        return gpu, host, disk

    @property
    def steps(self) -> tuple[int, int]:
        """How many layers a block passes through in prefill and in decode: L and L (n - 1)."""
        return self.layers, self.layers * (self.generated - 1)

    def coefficients(self, gpu_batch: int) -> PlacementCoefficients:
        """The formulas of the module's docstring as numbers, for one GPU batch size; FlexGen's names stand beside them."""
        p, s, total = self.profile, self.prompt, self.prompt + self.generated
        context = s + self.generated / 2
        w, x, kv = self.weight_bytes, self.act_bytes, self.kv_bytes
        away, disk, none = np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0]), np.zeros(3)
        read, ctog = disk / p.disk_read, away / p.to_device
        attention = self.attention_flops * context
        attended = attention * np.array([1 / p.attention_decode, *[1 / float(p.cpu_rate(gpu_batch, self.hidden_size))] * 2])
        stored = s + 1
        matrices = self.linear_flops * s / p.gemm_prefill + self.attention_flops * s**2 / p.attention_prefill
        on_gpu, on_host = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
        whole_weights, whole_cache = w * self.layers, kv * self.layers
        # Attention on the GPU in decode: its input and output, keys and values, scores, and a staged copy of keys and values.
        attending = 2 * x + 2 * kv * total + self.score_bytes * total
        # qkv 4 x, attention 4 x + its scores, output 2 x, FFN 1 x in and its inner width.
        working = 9 * x + self.inner_bytes
        return PlacementCoefficients(
            prefill_weights=w * np.array([ctog + read, none, none]),
            prefill_cache=kv * stored * np.array([none, away / p.cache_to_host + disk / p.disk_prefill_cache, none]),
            prefill_hidden=x * s * np.array([ctog + read, away / p.hidden_to_host + disk / p.disk_prefill_hidden, none]),
            prefill_fixed=np.array([0.0, 0.0, matrices]),
            decode_weights=w * (ctog + np.array([none, read / p.weight_read_share, none, none])),
            decode_cache=np.array([none, kv * context * read, kv * disk / p.disk_decode, attended]),
            decode_hidden=x * (ctog + np.array([away / p.hidden_to_host, read, disk / p.disk_decode, none])),
            decode_fixed=np.array([0.0, 0.0, 0.0, self.linear_flops / p.gemm_decode]),
            held_weights=np.array(
                [
                    *[whole_weights * on_gpu + 2 * w * away] * 2,
                    whole_weights * on_host + w * away,
                    whole_weights * on_host + w * disk,
                    whole_weights * disk,
                ]
            ),
            held_cache=whole_cache * np.array([total * on_gpu, total * on_gpu, s * on_host, total * on_host, total * disk]),
            held_hidden=x * np.array([s * on_gpu, on_gpu, s * on_host, on_host, s * disk]),
            cache_buffer=np.array([none, attending * on_gpu, none, 2 * kv * total * disk, none]),
            hidden_buffer=x * np.array([s * away, away, s * away, 2 * disk, none]),
            fixed_buffer=np.array([s * (working + self.score_bytes * s), 7 * x + self.inner_bytes, 0.0, self.score_bytes * total + x, 0.0]),
        )

    def latencies(
        self, weights: ArrayLike, cache: ArrayLike, hidden: ArrayLike, gpu_batch: int, gpu_batches: ArrayLike
    ) -> tuple[Array, Array]:
        """Seconds a token, and bytes above the room of the fullest tier (at most 0: it fits), of a grid of plans.

        Shares [..., 3] and ``gpu_batches`` [...] broadcast; one ``gpu_batch``.
        """
        k = self.coefficients(gpu_batch)
        block = gpu_batch * np.asarray(gpu_batches, dtype=np.float64)
        prefill = k.prefill(weights, cache, hidden, block).max(axis=-1)
        decode = k.decode(weights, cache, hidden, block).max(axis=-1)
        peaks = k.peaks(weights, cache, hidden, gpu_batch, block) - np.asarray(self.room)[list(TIER_OF_PEAK)]
        return self._latency(prefill, decode, block), peaks.max(axis=-1)

    def _latency(self, prefill: ArrayLike, decode: ArrayLike, block: ArrayLike) -> Array:
        """Seconds a generated token, T / (B n), from those of a layer."""
        first, later = self.steps
        total = first * np.asarray(prefill, dtype=np.float64) + later * np.asarray(decode, dtype=np.float64)
        return np.asarray(total / (np.asarray(block, dtype=np.float64) * self.generated))

    def evaluate(self, plan: PlacementPlan) -> OffloadCost:
        """Seconds, busy times and bytes to the GPU a generated token; peak bytes of each tier. ValueError for a plan that cannot run.

        ``gpu_time`` is without attention on the host; ``link_time`` is the time of host to GPU.
        """
        if plan.hidden[2] > 0 and not self.hidden_on_disk:
            raise ValueError(f"plan: hidden must not be on disk, not {plan.hidden!r}; set hidden_on_disk=True in the problem to allow it")
        shares, block = (plan.weights, plan.cache, plan.hidden), plan.block
        k = self.coefficients(plan.gpu_batch)
        prefill, decode = k.prefill(*shares, block), k.decode(*shares, block)
        peaks = k.peaks(*shares, plan.gpu_batch, block)
        away = [1 - plan.weights[0], 1 - plan.hidden[0]]
        first, later = (self.weight_bytes * away[0] + self.act_bytes * tokens * block * away[1] for tokens in (self.prompt, 1))
        on_gpu = block * (k.decode_fixed[3] + k.decode_cache[3, 0] * plan.cache[0])
        bytes_sent = float(self._latency(first, later, block))
        return OffloadCost(
            latency=float(self._latency(prefill.max(), decode.max(), block)),
            link_time=bytes_sent / self.profile.to_device,
            gpu_time=float(self._latency(prefill[2], on_gpu, block)),
            tier_names=self.tier_names,
            tier_bytes=tuple(max(float(peaks[r]) for r in range(len(PEAKS)) if TIER_OF_PEAK[r] == tier) for tier in range(3)),
            capacity=self.room,
            to_device_bytes=bytes_sent,
        )

    def throughput(self, plan: PlacementPlan) -> float:
        """Generated tokens a second, prefill included; infinite if nothing takes time."""
        latency = self.evaluate(plan).latency
        return 1 / latency if latency else math.inf

    def limits(self, plan: PlacementPlan) -> tuple[str, str]:
        """What takes longest in prefill and in decode, of ``PREFILL_LANES`` and ``DECODE_LANES``."""
        shares, k = (plan.weights, plan.cache, plan.hidden), self.coefficients(plan.gpu_batch)
        prefill, decode = k.prefill(*shares, plan.block), k.decode(*shares, plan.block)
        return PREFILL_LANES[int(prefill.argmax())], DECODE_LANES[int(decode.argmax())]

    def explain_infeasible(self) -> str:
        """Why not even one GPU batch of the smallest size fits, and changes each of which alone would help, in one sentence.

        What would help is found on a grid of shares in eighths: a plan fits then, and a little less may do.
        """
        least = self.gpu_batch_sizes[0]
        held = self.layers * (self.weight_bytes + least * self.kv_bytes * (self.prompt + self.generated))
        k, room = self.coefficients(least), self.room
        for row, peak in enumerate(PEAKS):
            tier, need = TIER_OF_PEAK[row], least * float(k.fixed_buffer[row])
            if need > room[tier]:
                text = (
                    f"a GPU batch of {least} needs buffers of {need / GB:.6g} GB on the {peak}, where {room[tier] / GB:.6g} GB are usable: "
                    f"{gigabytes_more(need - room[tier])} GB too little"
                )
                break
        else:
            text = f"weights and cache of {least} requests are {held / GB:.4g} GB, GPU, host and disk have {sum(room) / GB:.4g} GB usable"
            if held > sum(room):
                text += f": {gigabytes_more(held - sum(room))} GB too little"
            else:
                text += ", but no division leaves room for the buffers beside them"
        return f"{text}; {', or '.join(self._ways())}"

    def _ways(self) -> list[str]:
        """Advice that makes some plan of a grid fit."""
        short = self._lacking()
        cheapest = short[int(short.sum(axis=1).argmin())] / self.profile.usable
        ways = [
            " and ".join(
                f"enlarge {name} by {gigabytes_more(float(missing))} GB"
                for name, missing in zip(self.tier_names, cheapest, strict=True)
                if missing > 0
            )
        ]

        def fits(problem: PlacementProblem) -> bool:
            return not problem._lacking().any(axis=1).all()

        prompt = largest(lambda tokens: fits(replace(self, prompt=tokens)), self.prompt - 1)
        if prompt:
            ways.append(f"use prompts of {prompt} tokens at most")

        def packed(percent: int) -> PlacementProblem:
            return replace(self, weight_bytes=self.weight_bytes * percent / 100, kv_bytes=self.kv_bytes * percent / 100)

        more = largest(lambda more: fits(packed(LEAST_PERCENT - 1 + more)), 100 - LEAST_PERCENT)
        if more:
            ways.append(f"hold weights, keys and values in {LEAST_PERCENT - 1 + more} % of their bits")
        return [way for way in ways if way]

    def _lacking(self) -> Array:
        """Bytes [plan, tier] that each tier lacks for one GPU batch of the smallest size, for a grid of shares; 0 where it has room.

        A tier counts as full a little before it is, as solvers of linear programs leave a millionth of it free.
        """
        eighths = [(i / GRID, j / GRID, (GRID - i - j) / GRID) for i in range(GRID + 1) for j in range(GRID + 1 - i)]
        shares = np.array(eighths)
        hidden = np.array([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)][: 3 if self.hidden_on_disk else 2])
        w, c, h = (axis.ravel() for axis in np.meshgrid(*map(np.arange, (len(shares), len(shares), len(hidden))), indexing="ij"))
        least = self.gpu_batch_sizes[0]
        peaks = self.coefficients(least).peaks(shares[w], shares[c], hidden[h], least, np.full(len(w), least))
        over = peaks - np.asarray(self.room)[list(TIER_OF_PEAK)] * (1 - SPARE)
        by_tier = [np.maximum.reduce([over[:, r] for r in range(len(PEAKS)) if TIER_OF_PEAK[r] == tier]) for tier in range(3)]
        return np.maximum(np.stack(by_tier, axis=1), 0.0) * (1 + 2 * SPARE)
