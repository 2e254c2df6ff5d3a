"""Serving systems that offload, as rules with fixed decisions: what an exact plan is compared with.

Each is one frozen value with its own calibration record (``profile``), which is shown beside its results. All hold weights on the host and
stream them, unless said. Times are those of one layer and one decode step at arrays of contexts; a generation is the sum of its steps
and one prefill. Symbols as in ``offload``: t_w, t_kv, t_x, t_rec, t_c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from .checks import check_name, check_number, shown
from .hardware import System
from .offload import STAGED_REQUESTS, OffloadLayer, OffloadMachine, gpu_overhead, new_tokens, offload_layers
from .offload_profiles import DATASHEET, OffloadProfile
from .roofline import Array
from .workload import Workload

Rule = Literal["in_turn", "resident_state", "keys_values", "activations", "token_ids", "cpu_attention"]

GROUP_QUANTISED_BITS = 4.5
"""Bits of a key or value in groups of 64 with a 16-bit scale and zero point each: 4 + 2 x 16 / 64 (FlexGen, arXiv 2303.06865)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadBaseline:
    """A system with a fixed rule.

    ``rule``, with the time of a layer:

    - "in_turn": weights, keys and values, then compute, nothing overlapped: t_w + t_kv + t_c (Hugging Face Accelerate's hooks);
    - "resident_state": keys and values stay in GPU memory, so that as many requests run at once as fit, one group after the other:
      groups x max(t_w, t_c), each group with room for its longest state and no staging buffers (DeepSpeed-Inference with weights on the
      host);
    - "keys_values": max(t_w + t_kv, t_c), with as many keys and values in spare GPU memory as fit (FlexGen; ideal overlap);
    - "activations": max(t_w + t_x, t_c + t_rec), with as many activations in spare GPU memory as fit;
    - "token_ids": every step is a prefill of all tokens, nothing is kept: max(t_w, t_forward);
    - "cpu_attention": the CPU attends to the keys and values on the host, between the GPU's products:
      max(t_w, t_c without state + KV bytes / host bandwidth, (weights + KV bytes) / host bandwidth).

    ``kv_bits``: bits of a key or value in place of the workload's. ``note``: what a reader of its results must know.
    """

    name: str
    rule: Rule
    profile: OffloadProfile = DATASHEET
    kv_bits: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        check_name("baseline", self.name)
        what = f"baseline {self.name!r}"
        if self.rule not in get_args(Rule):
            raise ValueError(f"{what}: rule must be one of {', '.join(get_args(Rule))}, not {shown(self.rule)}")
        if not isinstance(self.profile, OffloadProfile):
            raise ValueError(f"{what}: profile must be an OffloadProfile, not {shown(self.profile)}")
        if self.kv_bits is not None:
            check_number(what, "kv_bits", self.kv_bits, "bits", infinite=False)

    def layer_time(self, layer: OffloadLayer, machine: OffloadMachine, contexts: Array, cache: float) -> Array:
        """Seconds of one layer in a decode step at each of ``contexts`` [tokens]; ``cache`` [B of GPU memory] holds state of this layer."""
        tokens = layer.batch * contexts
        weights, compute = layer.weight_time(machine), layer.compute_time(machine, tokens)
        match self.rule:
            case "in_turn":
                return weights + layer.kv_time(machine, tokens) + compute
            case "resident_state":
                groups = self.groups(layer, float(contexts.max()), cache)
                if not math.isfinite(groups):
                    return np.full(np.shape(tokens), np.inf)
                of_a_group = np.maximum(
                    (layer.read_bytes + tokens / groups * layer.kv_bytes) / machine.gpu_bandwidth,
                    (layer.linear_flops + tokens * layer.attention_flops) / groups / machine.peak,
                )
                return groups * np.maximum(weights, of_a_group)
            case "keys_values":
                moved = np.maximum(tokens - cache / layer.kv_bytes, 0.0)
                return np.maximum(weights + layer.kv_time(machine, moved), compute)
            case "activations":
                moved = np.maximum(tokens - cache / layer.act_bytes, 0.0)
                return np.maximum(weights + layer.act_time(machine, moved), compute + layer.recompute_time(machine, tokens))
            case "token_ids":
                return np.maximum(layer.weight_bytes / machine.to_device, prefill_flops(layer, contexts) / machine.peak)
            case "cpu_attention":
                if machine.cpu_peak is None:  # a host without a compute unit
                    return np.full(np.shape(tokens), np.inf)
                attention = np.maximum(tokens * layer.kv_bytes / machine.host_bandwidth, tokens * layer.attention_flops / machine.cpu_peak)
                leaving = (layer.read_bytes + tokens * layer.kv_bytes) / machine.host_bandwidth
                return np.maximum.reduce([weights + 0.0 * tokens, layer.compute_time(machine, 0.0) + attention, leaving])

    def groups(self, layer: OffloadLayer, longest: float, cache: float) -> float:
        """Groups of requests that are generated one after the other, each with its state of up to ``longest`` tokens in ``cache`` bytes of
        GPU memory a layer; inf if not even one request fits. 1 for rules that serve all requests at once."""
        if self.rule != "resident_state":
            return 1.0
        fitting = math.floor(cache / (layer.kv_bytes * max(longest, 1.0)))
        return float(-(-layer.batch // fitting)) if fitting >= 1 else math.inf

    def stored_bytes(self, layer: OffloadLayer, tokens: float, cache: float) -> float:
        """Bytes of one layer's state that prefill sends to the host."""
        match self.rule:
            case "resident_state" | "token_ids":
                return 0.0
            case "keys_values":
                return max(tokens * layer.kv_bytes - cache, 0.0)
            case "activations":
                return max(tokens * layer.act_bytes - cache, 0.0)
            case _:
                return tokens * layer.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCost:
    """``prefill`` and ``decode`` [s] of a batch's whole generation; ``throughput`` [token/s] generated; ``fits`` on the host."""

    prefill: float
    decode: float
    throughput: float
    host_bytes: float
    host_capacity: float

    @property
    def fits(self) -> bool:
        """The host holds weights and state, but for the rounding of a sum, and the GPU a layer at a time."""
        return self.host_bytes <= self.host_capacity * (1 + 1e-12) and math.isfinite(self.decode)


def prefill_flops(layer: OffloadLayer, prompt: Array | float) -> Array:
    """FLOPs of one layer that reads ``prompt`` tokens of each request: products, and attention to the tokens before each."""
    prompt = np.asarray(prompt, dtype=np.float64)
    return prompt * layer.linear_flops + layer.batch * layer.attention_flops * prompt * (prompt + 1) / 2


def generation(system: System, workload: Workload, baseline: OffloadBaseline, *, generated: int) -> GenerationCost:
    """A baseline's time for a batch of prompts of ``workload.context`` tokens and ``generated`` new ones of each.

    Prefill of a layer: max(FLOPs / peak, weights / link, stored state / link to the host). ValueError for no new token.
    """
    generated = new_tokens(generated)
    if baseline.kv_bits is not None:
        workload = replace(workload, kv_bits=baseline.kv_bits)
    machine = OffloadMachine.build(system, baseline.profile)
    prompt, longest = workload.context, workload.context + generated
    contexts = prompt + np.arange(generated, dtype=np.float64)
    staging = 0 if baseline.rule == "resident_state" else STAGED_REQUESTS
    room = machine.gpu_capacity - gpu_overhead(workload, longest, buffered_requests=staging)
    cache = max(room, 0.0) / workload.llm.num_hidden_layers
    prefill = decode = 0.0
    for layer in offload_layers(workload):
        decode += layer.layers * float(baseline.layer_time(layer, machine, contexts, cache).sum()) if room >= 0 else math.inf
        stored = baseline.stored_bytes(layer, workload.batch * prompt, cache)
        flops = float(prefill_flops(layer, prompt))
        loads = baseline.groups(layer, float(contexts.max()), cache)
        loading = loads * (layer.weight_bytes / machine.to_device) if math.isfinite(loads) else math.inf
        prefill += layer.layers * max(flops / machine.peak, loading, stored / machine.to_host)
    state = sum(layer.layers * baseline.stored_bytes(layer, workload.batch * longest, cache) for layer in offload_layers(workload))
    return GenerationCost(
        prefill=prefill,
        decode=decode,
        throughput=workload.batch * generated / (prefill + decode) if prefill + decode > 0 else math.inf,
        host_bytes=workload.weight_bytes + state,
        host_capacity=machine.host_capacity,
    )


def offload_baselines(profile: OffloadProfile, flexgen: OffloadProfile) -> dict[str, OffloadBaseline]:
    """The systems that offloading is compared with: all at ``profile``'s rates, but FlexGen at its own."""
    listed = (
        OffloadBaseline(name="accelerate", rule="in_turn", profile=profile),
        OffloadBaseline(name="deepspeed", rule="resident_state", profile=profile),
        OffloadBaseline(name="flexgen", rule="keys_values", profile=flexgen),
        OffloadBaseline(name="kv_only", rule="keys_values", profile=profile),
        OffloadBaseline(name="act_only", rule="activations", profile=profile),
        OffloadBaseline(name="token_ids", rule="token_ids", profile=profile),
        OffloadBaseline(name="cpu_attention", rule="cpu_attention", profile=profile, note="attention on the host's cores"),
        OffloadBaseline(
            name="kv_int4", rule="keys_values", profile=profile, kv_bits=GROUP_QUANTISED_BITS, note="accuracy and unpacking not modelled"
        ),
    )
    return {one.name: one for one in listed}
