"""Kernel models of offloaded generation: weights, keys and values on GPU, host and disk, and the work on GPU or host.

Both price a whole generation of a batch, prefill and decode of an LLM by its shapes, from data sheets of a GPU, a host link, a disk or a
host's memory, and from six shares and rates that are fitted. All layers are alike, so that their number only multiplies.

The form was changed twice after a look at errors of runs that are not fitted (OPT-30B on V100, OPT-30B and OPT-66B on A6000): one schedule
for all engines, disks read ahead only where runs say so, unpacking in one kernel for ZeRO-Inference, unpinned copies as a host's copy rate.
Their errors are no clean test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .calibration import Parameter, Shapes
from .checks import shown
from .device import Device, device_named
from .llm import LLMConfig
from .placement import GROUP_BITS
from .presets import LLMS
from .roofline import Array
from .units import GB, us

WIDTH = 2.0
"""Bytes of an element that is not packed."""

PACKED = GROUP_BITS / 16
"""Share of the bytes that is left by FlexGen's four-bit form, which is taken for every four-bit form here."""

READ_SHARE = 0.8
"""Share of its bandwidth at which a GPU reads its own weights and cache: an assumption, as the link and the host decide here."""

GPU_SHARE = 0.5
"""Share of its peak that a GPU beside a host reaches: an assumption, as few rows depend on it."""

RESIDENT = 0.9
"""Share of a GPU's memory that is filled with weights where these stay as long as there is room: an assumption."""

PHASES = ("total", "prefill", "decode", "step")
"""What a row times: prompt and all generated tokens, the prompt, the tokens after the first, or one of these."""


class _LLMs(NamedTuple):
    """Sizes [N] of the LLM of each row: all its layers, elements and FLOP of a token."""

    layers: Array
    hidden: Array
    weights: Array
    state: Array
    attention: Array
    vocabulary: Array


def _by_name(column: NDArray[Any], lookup: Callable[[str], tuple[float, ...]]) -> tuple[Array, ...]:
    """Numbers [N] that belong to each row's name."""
    names, places = np.unique(np.asarray(column).astype(str), return_inverse=True)
    table = np.array([lookup(name) for name in names.tolist()], dtype=np.float64)
    return tuple(table[places.reshape(-1)].T)


def _sizes(name: str) -> tuple[float, ...]:
    if name not in LLMS:
        raise ValueError(f"offload: there is no LLM {shown(name)}; name one of {', '.join(LLMS)}")
    llm: LLMConfig = LLMS[name]
    layers = llm.num_hidden_layers
    weights = sum(count * sum(matrix.elements for matrix in matrices) for count, matrices in llm.layers)
    state, attention = llm.state_elements * layers, llm.attention_flops * layers
    return (layers, llm.hidden_size, weights, state, float(attention), llm.vocab_size)


def _llms(shapes: Shapes) -> _LLMs:
    return _LLMs(*_by_name(shapes["model"], _sizes))


def _timed(shapes: Shapes, prefill: Array, step: Array) -> Array:
    """Seconds [N] of what each row times, from those of the prefill and of one decode step."""
    phase = np.asarray(shapes["phase"]).astype(str)
    odd = sorted(set(phase.tolist()) - set(PHASES))
    if odd:
        raise ValueError(f"offload: phase must be one of {', '.join(PHASES)}, not {shown(odd[0])}; correct it")
    decode = step * (np.asarray(shapes["gen"], dtype=np.float64) - 1)
    found: Array = np.select([phase == "prefill", phase == "decode", phase == "step"], [prefill, decode, step], prefill + decode)
    return found


class _Work(NamedTuple):
    """What a phase [N] needs: bytes over the link, in and out, and from or to disk; FLOP and bytes of the GPU; bytes to unpack there; bytes
    of keys and values that the host attends to; times that a layer is begun."""

    to_gpu: Array
    to_host: Array
    disk: Array
    flops: Array
    read: Array
    packed: Array
    attended: Array
    begun: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadStepTime:
    """Seconds of generation with weights, cache and activations on GPU, host and disk, as FlexGen and ZeRO-Inference run it.

        prefill = link + late + max(GPU + overhead, link back, early)         step = link + late + max(GPU + host + overhead, early)

    link: weights not on the GPU / n, cache that the GPU attends to, activations, over (share P), what is unpinned at ``staging`` into a
    pinned buffer before; the load is not hidden (FlexGen's schedule, as ``overlap.flexgen_sync``). GPU: max(FLOP / (compute peak),
    bytes / (0.8 BW)) + packed bytes, counted as unpacked, / (unpack BW): weights are unpacked for every GPU batch. host: cache /
    host_memory where the host attends (cpu_attn). overhead: per layer and GPU batch. Disk time is ``early`` where it is read ahead
    (``prefetch``), else ``late``; disks reach their data sheet's bandwidth.

    Searches start from what is known elsewhere: pinned copies reach 0.8 of a link, copies within a host about the rate of PCIe 5.0;
    attention on the host as FlexGen's authors fitted it (``placement_t4``); eight operations that read and write to unpack.

    Columns as of published runs: ``device`` (a GPU by name; "": the device that is asked about), ``model``, ``phase`` of ``PHASES``,
    ``prompt`` and ``gen`` tokens, ``gpu_batch`` x ``num_batches`` requests on each of ``n_gpu`` n GPUs, which load a part of each layer and
    exchange it (arXiv 2207.00032); per cent ``w_*``, ``kv_*`` and ``act_gpu``; ``int4_*``, ``cpu_attn``, ``pinned``, ``prefetch`` and
    ``fused`` (one kernel unpacks, at the speed of memory) 1 or 0; ``link_peak_GBps``, ``disk_GBps`` of the data sheets.
    """

    variant: str = ""

    name: ClassVar[str] = "offload"
    any_device: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("device", "model", "phase", "prompt", "gen", "gpu_batch", "num_batches", "n_gpu", "link_peak_GBps", "disk_GBps"),
        *("pinned", "prefetch", "fused", "w_gpu", "w_cpu", "w_disk", "kv_gpu", "kv_cpu", "kv_disk", "act_gpu"),
        *("cpu_attn", "int4_w", "int4_kv"),
    )
    texts: ClassVar[tuple[str, ...]] = ("device", "model", "phase")
    group: ClassVar[tuple[str, ...]] = ("model",)
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="share", unit="", low=0.1, high=1.0, start=0.8, meaning="of the link's bandwidth"),
        Parameter(name="staging", unit="B/s", low=1 * GB, high=400 * GB, start=50 * GB, meaning="copies from unpinned to pinned memory"),
        Parameter(name="compute", unit="", low=0.1, high=1.0, start=0.5, meaning="of the GPU's peak"),
        Parameter(
            name="host_memory", unit="B/s", low=2 * GB, high=400 * GB, start=12.3 * GB, meaning="cache read by attention on the host"
        ),
        Parameter(name="unpack", unit="", low=0.01, high=1.0, start=0.06, meaning="of the GPU's bandwidth, per unpacked byte"),
        Parameter(name="overhead", unit="s", low=20 * us, high=5e-3, start=500 * us, meaning="a layer and GPU batch apart from its work"),
    )

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        prefill, step = self._work(shapes)
        peak, bandwidth = self._gpu(device, shapes)
        number = _Numbers(shapes)
        copied = np.where(number("pinned") > 0, 0.0, 1 / values["staging"])
        rate = 1 / (1 / (values["share"] * number("link_peak_GBps") * GB) + copied)
        disk, ahead, fused = number("disk_GBps") * GB, number("prefetch") > 0, number("fused") > 0

        def priced(work: _Work) -> Array:
            busy = np.maximum(work.flops / (values["compute"] * peak), work.read / (READ_SHARE * bandwidth))
            busy = busy + np.where(fused, 0.0, work.packed / (values["unpack"] * bandwidth))
            busy = busy + work.attended / values["host_memory"] + work.begun * values["overhead"]
            away = np.divide(work.disk, disk, out=np.zeros_like(work.disk), where=work.disk > 0)
            rest = np.maximum(np.maximum(busy, work.to_host / rate), np.where(ahead, away, 0.0))
            found: Array = work.to_gpu / rate + np.where(ahead, 0.0, away) + rest
            return found

        return np.maximum(_timed(shapes, priced(prefill), priced(step)), self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bound, whose link, disk, host and GPU are no single memory."""
        least = self.bound(device, shapes)
        return least, np.zeros_like(least)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Each phase takes as long as the busiest of link, disk and GPU at the data sheet's rates; work on the host takes no time."""
        peak, bandwidth = self._gpu(device, shapes)
        number = _Numbers(shapes)
        link, disk = number("link_peak_GBps") * GB, number("disk_GBps") * GB
        busiest = [
            np.maximum.reduce(
                [
                    work.to_gpu / link,
                    np.divide(work.disk, disk, out=np.zeros_like(work.disk), where=work.disk > 0),
                    work.flops / peak,
                    work.read / bandwidth,
                ]
            )
            for work in self._work(shapes)
        ]
        return _timed(shapes, *busiest)

    def _gpu(self, device: Device, shapes: Shapes) -> tuple[Array, Array]:
        """Peak [FLOP/s] and bandwidth [B/s] of each row's GPU."""

        def rates(name: str) -> tuple[float, ...]:
            gpu = device_named(name) if name else device
            return gpu.peak("bf16"), gpu.bandwidth

        peak, bandwidth = _by_name(shapes["device"], rates)
        return peak, bandwidth

    def _work(self, shapes: Shapes) -> tuple[_Work, _Work]:
        """Of the prefill and of a decode step at the mean context, prompt + gen / 2."""
        llm, number = _llms(shapes), _Numbers(shapes)
        blocks, prompt = number("num_batches"), number("prompt")
        requests = number("gpu_batch") * blocks
        context = prompt + number("gen") / 2
        weights, token = WIDTH * llm.weights, WIDTH * llm.state
        kept, cached = (np.where(number(name) > 0, PACKED, 1.0) for name in ("int4_w", "int4_kv"))
        away, on_gpu, on_disk = 1 - number("w_gpu") / 100, number("kv_gpu") / 100, number("kv_disk") / 100
        attends = number("cpu_attn") > 0
        near = np.where(attends, on_gpu, 1.0)  # share of the cache that the GPU attends to
        hidden = WIDTH * llm.hidden * llm.layers * requests * (1 - number("act_gpu") / 100)
        loaded = weights * kept * away / number("n_gpu")
        from_disk = weights * kept * number("w_disk") / 100
        unpacked = weights * blocks * (number("int4_w") > 0)
        cache = token * requests * context
        tokens, written = requests * prompt, token * requests * prompt * cached
        linear = 2 * llm.weights
        prefill = _Work(
            to_gpu=loaded + hidden * prompt,
            to_host=written * (1 - on_gpu) + hidden * prompt,
            disk=from_disk + written * on_disk,
            flops=(linear + llm.attention * prompt / 2) * tokens,
            read=weights * blocks,
            packed=unpacked + token * tokens * (number("int4_kv") > 0),
            attended=np.zeros_like(cache),
            begun=llm.layers * blocks,
        )
        step = _Work(
            to_gpu=loaded + cache * cached * (near - np.minimum(on_gpu, near)) + hidden,
            to_host=hidden,
            disk=from_disk + cache * cached * on_disk,
            flops=linear * requests + llm.attention * requests * context * near,
            read=weights * blocks + cache * near,
            packed=unpacked + cache * near * (number("int4_kv") > 0),
            attended=cache * np.where(attends, 1 - on_gpu, 0.0),
            begun=llm.layers * blocks,
        )
        return prefill, step


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Columns of numbers by name."""

    shapes: Shapes

    def __call__(self, name: str) -> Array:
        return np.asarray(self.shapes[name], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStepTime:
    """Seconds of generation on a host with matrix units, alone (IPEX) or with a GPU that holds what fits (LIA); ``device`` is the host.

        phase = (1 - r) min(host, weights / (share P) + GPU) + r GPU + cache / (attention BW)
        host  = weights / (memory BW) + FLOP / (compute peak)         GPU = max(FLOP / (0.5 peak), weights / (0.8 bandwidth))

    r: share of the weights that stays on the GPU ``gpu`` ("": no GPU, r = 0), as many as ``RESIDENT`` of its memory holds beside the
    embeddings. The host works with the others, or they are sent, whichever is faster: LIA's choice, made here for a phase as a whole.
    BW: bandwidth of the host's memory, which has the cache; P: the link's. In decode, whose products are narrow, the host reaches
    ``step_compute``, not ``compute``. Columns else as of ``OffloadStepTime``; ``batch``: requests.
    """

    variant: str = ""

    name: ClassVar[str] = "offload_host"
    columns: ClassVar[tuple[str, ...]] = ("gpu", "model", "phase", "prompt", "gen", "batch", "link_peak_GBps")
    texts: ClassVar[tuple[str, ...]] = ("gpu", "model", "phase")
    group: ClassVar[tuple[str, ...]] = ("gpu", "model", "prompt", "gen", "batch")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="memory", unit="", low=0.05, high=1.0, start=0.5, meaning="of the host's bandwidth, weights"),
        Parameter(name="compute", unit="", low=0.005, high=1.0, start=0.05, meaning="of the host's peak, prefill"),
        Parameter(name="step_compute", unit="", low=0.005, high=1.0, start=0.05, meaning="of the host's peak, decode"),
        Parameter(name="attention", unit="", low=0.01, high=1.0, start=0.1, meaning="of the host's bandwidth, keys and values"),
        Parameter(name="share", unit="", low=0.1, high=1.0, start=0.5, meaning="of the link's bandwidth"),
    )

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        llm, number = _llms(shapes), _Numbers(shapes)
        peak, bandwidth, stays = self._gpu(shapes)
        weights, link = WIDTH * llm.weights, number("link_peak_GBps") * GB
        cache = WIDTH * llm.state * number("batch") * (number("prompt") + number("gen") / 2)

        def phase(flops: Array, attended: ArrayLike, compute: float) -> Array:
            host = weights / (values["memory"] * device.bandwidth) + flops / (compute * device.peak("bf16"))
            gpu = np.maximum(flops / (GPU_SHARE * peak), weights / (READ_SHARE * bandwidth))
            sent = np.where(np.isfinite(peak), weights / (values["share"] * link) + gpu, np.inf)
            reading = np.asarray(attended) / (values["attention"] * device.bandwidth)
            found: Array = (1 - stays) * np.minimum(host, sent) + stays * gpu + reading
            return found

        prefill, step = self._flops(shapes)
        found = _timed(shapes, phase(prefill, 0.0, values["compute"]), phase(step, cache, values["step_compute"]))
        return np.maximum(found, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bound, whose link, disk, host and GPU are no single memory."""
        least = self.bound(device, shapes)
        return least, np.zeros_like(least)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Weights that do not stay, read by the host or sent, both at once; FLOP of host and GPU at once: the longer of the two."""
        llm, number = _llms(shapes), _Numbers(shapes)
        peak, _, stays = self._gpu(shapes)
        there = np.isfinite(peak)
        moved = (1 - stays) * WIDTH * llm.weights / (device.bandwidth + np.where(there, number("link_peak_GBps") * GB, 0.0))
        together = device.peak("bf16") + np.where(there, peak, 0.0)
        prefill, step = self._flops(shapes)
        return _timed(shapes, np.maximum(moved, prefill / together), np.maximum(moved, step / together))

    def _gpu(self, shapes: Shapes) -> tuple[Array, Array, Array]:
        """Peak [FLOP/s] and bandwidth [B/s] of each row's GPU, infinite without one, and the share of the weights that stays on it."""

        def sheet(name: str) -> tuple[float, ...]:
            if not name:
                return np.inf, np.inf, 0.0
            gpu = device_named(name)
            return gpu.peak("bf16"), gpu.bandwidth, gpu.capacity

        peak, bandwidth, capacity = _by_name(shapes["gpu"], sheet)
        llm = _llms(shapes)
        embeddings = WIDTH * llm.vocabulary * llm.hidden
        return peak, bandwidth, np.clip((RESIDENT * capacity - embeddings) / (WIDTH * llm.weights), 0.0, 1.0)

    def _flops(self, shapes: Shapes) -> tuple[Array, Array]:
        """FLOP of the prefill and of a step's matrices; what a step attends to is priced by its bytes."""
        llm, number = _llms(shapes), _Numbers(shapes)
        prompt, requests = number("prompt"), number("batch")
        return (2 * llm.weights + llm.attention * prompt / 2) * prompt * requests, 2 * llm.weights * requests


DISKS: Mapping[str, float] = MappingProxyType({"T4": 2.65, "V100": 25.6})
"""GB/s of the disks of machines with published runs that do not say it: four local NVMe partitions of 375 GB of Google Cloud (its
documentation), the NVMe drives of a DGX-2 (arXiv 2104.07857)."""

HOSTS = ("IPEX", "LIA")
"""Systems that compute on the host, whose rows are of ``HostStepTime``."""


def offload_columns(rows: Sequence[Mapping[str, str]], *, split: bool = False) -> tuple[dict[str, NDArray[Any]], Array]:
    """Columns of both models, and seconds [N], of published runs: rows of a table with system, device, host, model, metric, tok_s ...

    ``split``: runs with a time of the prefill and one of decode give two rows. What runs do not say is set as the scripts of their authors
    set it: the host attends to keys and values that are there; FlexGen on an A6000, and ZeRO-Inference with its cache on the host, do not
    pin; FlexGen reads disks ahead, ZeRO-Inference where it says so; ZeRO-Inference unpacks in one kernel. Columns of these names go first.
    """
    found: list[dict[str, Any]] = []
    seconds: list[float] = []
    for row in rows:
        filled = _filled(row)
        if split and row.get("prefill_s") and row.get("decode_s"):
            timed = [("prefill", float(row["prefill_s"])), ("decode", float(row["decode_s"]))]
        elif row.get("prefill_s") and row.get("decode_s"):
            timed = [("total", float(row["prefill_s"]) + float(row["decode_s"]))]
        elif row["metric"].startswith("tok_s_per_gpu_decode"):
            timed = [("step", filled["batch"] / float(row["tok_s"]))]
        else:
            timed = [("total", filled["batch"] * filled["gen"] / float(row["tok_s"]))]
        for phase, measured in timed:
            found.append(filled | {"phase": phase})
            seconds.append(measured)
    return {name: np.array([one[name] for one in found]) for name in (found[0] if found else ())}, np.array(seconds)


def _filled(row: Mapping[str, str]) -> dict[str, Any]:
    """One run's columns, with what it does not say."""
    system, device, host = row["system"], row["device"], row["host"]
    host_only = system.startswith(HOSTS)
    gpu = "" if device == "CPU only" else "H100-PCIe" if "H100-PCIe" in device else re.split(r"[- ]", device)[0]
    read = {name: float(row[name]) for name in ("prompt", "gen", "gpu_batch", "num_batches", "batch", "n_gpu", "link_peak_GBps")}
    shares = ("w_gpu", "w_cpu", "w_disk", "kv_gpu", "kv_cpu", "kv_disk", "act_gpu", "int4_w", "int4_kv")
    read |= {name: float(row[name] or 0) for name in shares}
    said = re.search(r"NVMe ([\d.]+) ?GB/s", host)
    zero = system.startswith("ZeRO")
    unpinned = "pin_weight=0" in host or (gpu == "A6000" and (not zero or read["kv_cpu"] > 0))
    ahead = not zero or ("prefetch" in row["evidence"] and "no prefetch" not in row["evidence"])
    chosen = {
        "disk_GBps": float(said[1]) if said else DISKS.get(gpu, 0.0),
        "pinned": float(not unpinned),
        "prefetch": float(ahead),
        "fused": float(zero),
        "cpu_attn": float(read["kv_cpu"] > 0),
    }
    chosen |= {name: float(row[name]) for name in chosen if row.get(name)}
    return {"system": system, "device": "" if host_only else gpu, "gpu": gpu, "model": row["model"], **read, **chosen}
