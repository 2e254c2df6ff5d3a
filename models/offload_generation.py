"""Whole generations of a batch whose state is divided between keys and values and activations as is best at every step."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from .checks import whole
from .hardware import System
from .offload import STAGED_REQUESTS, OffloadMachine, gpu_overhead, new_tokens, offload_layers
from .offload_baselines import GenerationCost, prefill_flops
from .offload_profiles import DATASHEET, OffloadProfile
from .workload import Workload

Form = Literal["best", "act_first", "kv", "act"]


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
        new_tokens(generated),
    )
    if form not in ("best", "act_first", "kv", "act"):
        raise ValueError(f"generation: form must be 'best', 'act_first', 'kv' or 'act', not {form!r}")
    machine, layers = OffloadMachine.build(system, profile), offload_layers(workload)
    room = machine.gpu_capacity - gpu_overhead(workload, prompt + generated, buffered_requests=buffered_requests)
    kv, act = layers[0].kv_bytes, layers[0].act_bytes
    tokens = workload.batch * (prompt + np.arange(generated, dtype=np.float64))
    # No more than the state in its larger form can use, so that a GPU without limit is none.
    cache = min(max(room, 0.0) / workload.llm.num_hidden_layers, max(kv, act) * float(tokens[-1]))
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
