"""What offloading moves and computes: bytes and seconds of one decoder layer on a GPU whose weights or state live on the host.

A token's state in a layer is its keys and values (KV), or the layer's input (ACT) from which a GPU recomputes them. Symbols, all of a
whole layer and step, in seconds: t_kv transfer of the KV of all tokens, t_x of their ACT, t_rec recomputation, t_w transfer of the
weights, t_c decode on the GPU. Every formula of ``overlap`` is one of these five, which give the ratios

    r = t_x / t_kv     rho = t_rec / t_kv     w = t_w / t_kv     c = t_c / t_kv

(HybridServe, arXiv 2501.01792; KVPR, arXiv 2411.17089; the common form is derived here).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_number, whole
from .hardware import System
from .offload_profiles import DATASHEET, OffloadProfile
from .roofline import Array
from .systems import Place, Systems
from .units import GB
from .workload import Workload, kernels

WeightsOn = Literal["host", "gpu"]

WORKING_LAYERS = 2
"""Layers of weights in GPU memory while weights stream: the one in use and the one that arrives."""

STAGED_REQUESTS = 16
"""Requests whose keys and values of one layer each of the two staging buffers holds, unless said: an assumption."""

MOST_GENERATED = 1_000_000
"""New tokens of a request that a generation is priced for at most, each by itself: as many as the longest contexts of today's LLMs."""


def minimum_of(*values: Any) -> Any:
    """The smallest value, of each design where one is an array; numbers stay plain numbers."""
    return np.minimum.reduce(np.broadcast_arrays(*values)) if _any_array(values) else min(values)


def maximum_of(*values: Any) -> Any:
    """The largest value, as ``minimum_of``."""
    return np.maximum.reduce(np.broadcast_arrays(*values)) if _any_array(values) else max(values)


def _any_array(values: Sequence[Any]) -> bool:
    return any(isinstance(value, np.ndarray) for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadMachine:
    """A GPU, its host and the link between them at the rates that a profile says are reached.

    ``peak`` [FLOP/s]; ``gpu_bandwidth``, ``host_bandwidth``, ``to_device``, ``to_host`` [B/s]; ``cpu_peak`` [FLOP/s] of the units on
    the host tier, None if there are none; capacities [B], the GPU's as an engine may use it.
    """

    gpu: str
    host: str
    peak: float
    gpu_bandwidth: float
    host_bandwidth: float
    to_device: float
    to_host: float
    cpu_peak: float | None
    gpu_capacity: float
    host_capacity: float

    @classmethod
    def build(cls, system: System | Systems, profile: OffloadProfile = DATASHEET) -> OffloadMachine:
        """The first tier is the GPU's memory, the second the host's; ValueError if a unit or a link is missing.

        Of ``Systems``: what designs vary is an array [D] in place of a number, and every formula of this module broadcasts.
        """
        varied = system.columns if isinstance(system, Systems) else {}
        system = system.base if isinstance(system, Systems) else system

        def number(part: str, item: Any, field: str, name: str = "") -> Any:
            column = varied.get(Place(part, name or item.name, field)) if varied else None
            return getattr(item, field) if column is None else column

        if len(system.tiers) < 2:
            raise ValueError(f"system {system.name!r} has one tier; offloading needs a GPU's memory and a host's, in this order")
        gpu, host = system.tiers[:2]
        units = [unit for unit in system.units if unit.tier == gpu.name]
        if not units:
            raise ValueError(f"system {system.name!r}: tier {gpu.name!r} has no compute unit; add the GPU to the data sheet")
        rates = {}
        for field, source, target, share in (
            ("to_device", host, gpu, profile.to_device),
            ("to_host", gpu, host, profile.to_host),
        ):
            link = next((one for one in system.links if (one.source, one.target) == (source.name, target.name)), None)
            if link is None:
                raise ValueError(f"system {system.name!r} has no link {source.name!r} -> {target.name!r}; add it to the data sheet")
            name = f"{source.name}_to_{target.name}"
            speed = number("links", link, "bandwidth", name) * number("links", link, "efficiency", name) * share
            rates[field] = minimum_of(speed, number("tiers", source, "bandwidth"), number("tiers", target, "bandwidth"))
        cpus = [number("units", unit, "vector_peak") for unit in system.units if unit.tier == host.name]
        return cls(
            gpu=gpu.name,
            host=host.name,
            peak=sum(number("units", unit, "matrix_peak") for unit in units) * profile.compute,
            gpu_bandwidth=number("tiers", gpu, "bandwidth") * profile.memory,
            host_bandwidth=number("tiers", host, "bandwidth") * profile.host_memory,
            cpu_peak=sum(cpus) if cpus else None,
            gpu_capacity=maximum_of(number("tiers", gpu, "capacity") * profile.usable - profile.reserved, 0.0),
            host_capacity=number("tiers", host, "capacity"),
            **rates,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadLayer:
    """``layers`` equal decoder layers: bytes and FLOPs of one of them in one decode step of ``batch`` requests.

    ``weight_bytes`` are held, ``read_bytes`` are those a step of one GPU batch reads (below it for experts that no token chose) and
    ``sent_bytes`` those that all GPU batches need, which share one transfer; ``projection_bytes`` are those of the key and value
    projections. ``kv_bytes``, ``act_bytes``, ``recompute_flops`` and ``attention_flops`` are for one token of state; ``linear_flops``
    for the batch.

        kv = 2 n_kv d p_kv     act = h p_x     recompute = 4 h n_kv d FLOP     (MLA: latent and rotary key in place of 2 n_kv d)
    """

    layers: int
    batch: int
    weight_bytes: float
    read_bytes: float
    sent_bytes: float
    projection_bytes: float
    linear_flops: float
    kv_bytes: float
    act_bytes: float
    recompute_flops: float
    attention_flops: float

    def kv_time(self, machine: OffloadMachine, tokens: ArrayLike) -> Array:
        """Seconds to send the keys and values of ``tokens`` to the GPU."""
        return np.asarray(tokens, dtype=np.float64) * (self.kv_bytes / machine.to_device)

    def act_time(self, machine: OffloadMachine, tokens: ArrayLike) -> Array:
        """Seconds to send the activations of ``tokens`` to the GPU."""
        return np.asarray(tokens, dtype=np.float64) * (self.act_bytes / machine.to_device)

    def recompute_time(self, machine: OffloadMachine, tokens: ArrayLike) -> Array:
        """Seconds to recompute the keys and values of ``tokens`` from their activations."""
        return np.asarray(tokens, dtype=np.float64) * (self.recompute_flops / machine.peak)

    def weight_time(self, machine: OffloadMachine) -> float:
        """Seconds to send the weights that the step's GPU batches read to the GPU."""
        return self.sent_bytes / machine.to_device

    def projection_time(self, machine: OffloadMachine) -> float:
        """Seconds to send the key and value projections, which recomputation waits for."""
        return self.projection_bytes / machine.to_device

    def compute_time(self, machine: OffloadMachine, tokens: ArrayLike) -> Array:
        """Seconds of the layer's decode step on the GPU, ``tokens`` of state read from its memory.

        max((weights + KV) / memory bandwidth, (linear + attention FLOPs) / peak)
        """
        tokens = np.asarray(tokens, dtype=np.float64)
        memory = (self.read_bytes + tokens * self.kv_bytes) / machine.gpu_bandwidth
        return np.maximum(memory, (self.linear_flops + tokens * self.attention_flops) / machine.peak)


def offload_layers(workload: Workload, batches: int = 1) -> tuple[OffloadLayer, ...]:
    """The layers of one decode step of a workload, equal ones together; what ``context`` is does not matter here.

    ``batches``: GPU batches of ``workload.batch`` requests that share one load of the weights: of experts, those that any of them chose.
    """
    if workload.state_tokens is not None:
        raise ValueError("offloading takes contexts of its own, not a workload's state_tokens; leave them out")
    if workload.phase != "decode":
        raise ValueError(f"offloading is planned for a decode step, not for {workload.phase!r}; set phase='decode'")
    llm = workload.llm
    listed = []
    alone = kernels(workload)
    together = alone if batches == 1 else kernels(replace(workload, batch=workload.batch * batches))
    for (layers, found), (_, shared) in zip(alone, together, strict=True):
        products = [kernel for kernel in found if kernel.weight_bytes]
        listed.append(
            OffloadLayer(
                layers=layers,
                batch=workload.batch,
                weight_bytes=sum(kernel.weight_bytes for kernel in products),
                read_bytes=sum(kernel.weight_bytes * kernel.touched for kernel in products),
                sent_bytes=sum(kernel.weight_bytes * kernel.touched for kernel in shared),
                projection_bytes=llm.hidden_size * llm.state_elements * workload.weight_bits / 8,
                linear_flops=sum(kernel.flops for kernel in products),
                kv_bytes=llm.state_elements * workload.kv_bits / 8,
                act_bytes=llm.hidden_size * workload.activation_bits / 8,
                recompute_flops=2.0 * llm.hidden_size * llm.state_elements,
                attention_flops=float(llm.attention_flops),
            )
        )
    return tuple(listed)


def gpu_overhead(workload: Workload, longest: int, *, weights: WeightsOn = "host", buffered_requests: int = STAGED_REQUESTS) -> float:
    """Bytes that the GPU holds beside state: two layers of weights (all with ``weights="gpu"``), the embeddings, and two staging buffers
    for the keys and values of one layer of ``buffered_requests`` requests of ``longest`` tokens."""
    buffered = whole("offloading", "buffered_requests", buffered_requests, "requests", least=0)
    check_number("offloading", "longest", longest, "tokens", zero=True, infinite=False)
    return float(held_beside_state(workload, offload_layers(workload), workload.batch, longest, weights, buffered))


def held_beside_state(
    workload: Workload, layers: Sequence[OffloadLayer], batch: Any, longest: Any, weights: WeightsOn, buffered_requests: int
) -> Any:
    """``gpu_overhead`` of arrays of ``batch`` and ``longest`` that broadcast; neither weights nor ``layers``' sizes depend on them."""
    kept = workload.weight_bytes
    if weights == "host":
        kept = min(kept, WORKING_LAYERS * max(layer.weight_bytes for layer in layers))
    return kept + embedding_bytes(workload) + 2 * minimum_of(buffered_requests, batch) * longest * layers[0].kv_bytes


def new_tokens(generated: int) -> int:
    """``generated`` as a whole number of new tokens of a request, from 1 to ``MOST_GENERATED``."""
    found = whole("generation", "generated", generated, "new tokens of each request")
    if found > MOST_GENERATED:
        raise ValueError(f"generation: generated must be at most {MOST_GENERATED} new tokens of each request, not {found}; lower it")
    return found


def embedding_bytes(workload: Workload) -> float:
    """Bytes of the token embeddings, which the GPU keeps in any case."""
    return workload.llm.vocab_size * workload.llm.hidden_size * workload.weight_bits / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadRatios:
    """Seconds over those of sending all keys and values: what decides whether recomputing pays.

    ``r`` sending all activations, ``rho`` recomputing from them, ``w`` sending the weights, ``c`` the decode step on the GPU.
    ``act_pays``: r < 1.
    """

    r: float
    rho: float
    w: float
    c: float

    @property
    def act_pays(self) -> bool:
        """Whether activations are smaller than keys and values: without that, caching them never helps."""
        return self.r < 1


def offload_ratios(layer: OffloadLayer, machine: OffloadMachine, tokens: float) -> OffloadRatios:
    """The ratios of a layer with ``tokens`` of state, all on the host; ValueError for none."""
    if not tokens > 0:
        raise ValueError(f"ratios are for a state of at least one token, not {tokens!r}; set context and batch above 0")
    kv = float(layer.kv_time(machine, tokens))
    if not kv > 0:
        raise ValueError("ratios are for keys and values that take time to send; this link is infinitely fast")
    return OffloadRatios(
        r=layer.act_bytes / layer.kv_bytes,
        rho=float(layer.recompute_time(machine, tokens)) / kv,
        w=layer.weight_time(machine) / kv,
        c=float(layer.compute_time(machine, tokens)) / kv,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadCost:
    """What an offloading plan costs.

    ``latency`` [s] as the problem defines it; ``link_time`` and ``gpu_time`` [s] the busy time of link and GPU in it; for each tier the
    bytes held, the capacity and the overflow (0: it fits); ``to_device_bytes`` over the link.
    """

    latency: float
    link_time: float
    gpu_time: float
    tier_names: tuple[str, ...]
    tier_bytes: tuple[float, ...]
    capacity: tuple[float, ...]
    to_device_bytes: float

    @property
    def overflow(self) -> tuple[float, ...]:
        """Bytes of each tier beyond its capacity; a thousandth of a byte is forgiven."""
        return tuple(
            max(held - room, 0.0) if held - room > 1e-3 else 0.0 for held, room in zip(self.tier_bytes, self.capacity, strict=True)
        )

    @property
    def fits(self) -> bool:
        """No tier holds more than its capacity."""
        return not any(self.overflow)

    def explain_overflow(self) -> str:
        """Which tier holds how much too much; empty if the plan fits."""
        tiers = zip(self.tier_names, self.tier_bytes, self.capacity, self.overflow, strict=True)
        return ", ".join(
            f"{name} holds {held / GB:.6g} GB of {room / GB:.6g} GB: {over / GB:.3g} GB too much"
            for name, held, room, over in tiers
            if over
        )


def gigabytes_more(missing: float) -> str:
    """``missing`` bytes, at least one, in GB with three digits, rounded up."""
    missing = max(missing, 1.0) * (1 + 1e-9)  # more than the rounding of sums of bytes
    unit = 10.0 ** (math.floor(math.log10(missing / GB)) - 2)
    return f"{math.ceil(missing / GB / unit) * unit:.6g}"


def capacity_for(need: float, capacity: float, profile: OffloadProfile | None) -> float:
    """Bytes that a GPU's memory of ``capacity`` [B] lacks until the share of it that an engine may use holds ``need``."""
    usable, reserved = (1.0, 0.0) if profile is None else (profile.usable, profile.reserved)
    return (need + reserved) / usable - capacity


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest whole number from 1 to ``most`` that fits, where all below one that fits do; 0 if 1 does not."""
    if most < 1 or not fits(1):
        return 0
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


LEAST_BITS = 1.0
"""Bits of an element below which no precision is proposed."""


def fewer_bits(workload: Workload, fits: Callable[[Workload], bool]) -> str:
    """Weights, keys and values, and activations in the same share of their bits, the largest of hundredths that fits, as advice; "" if
    there is none with at least a bit an element."""

    names = ("weight_bits", "kv_bits", "activation_bits")

    def shrunk(hundredths: int) -> Workload:
        # Rounded down to hundredths of a bit, which are read back as they are written.
        return replace(workload, **{name: math.floor(hundredths * getattr(workload, name) + 1e-9) / 100 for name in names})

    least = math.ceil(100 * LEAST_BITS / min(getattr(workload, name) for name in names))
    if least > 99:
        return ""
    found = largest(lambda more: fits(shrunk(least - 1 + more)), 100 - least)
    if not found:
        return ""
    fewer = shrunk(least - 1 + found)
    return f"use {fewer.weight_bits:g} bits a weight, {fewer.kv_bits:g} a key or value and {fewer.activation_bits:g} an activation"
