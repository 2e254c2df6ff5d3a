"""Whole steps of an LLM on one GPU or several with tensor parallelism: a decode step, a prefill step, a batch served from end to end.

The step is the sum over the kernels of ``workload.step_kernels`` with six parameters of a device and a serving engine. For n devices, b
requests, T tokens that pass through each layer (decode: b) and contexts of c tokens, with n BW and n P the rates of all devices:

    products   (x^2 + y^2)^(1/2)   x = (weights + experts touched + head) / (memory n BW)     y = FLOPs / (matrix n P)
    attention  prefill   max(FLOPs / (matrix ATTENTION_SHARE n P), b c state / (memory n BW))
               decode    b c state / (memory n BW) (1 / grouped + cores n / (BLOCK_RATE b KV heads))
                         grouped: an engine's, 1 for MHA; the second term for engines that do not split contexts
    between    T activations / (memory n BW)
    reduce     2 layers 2 (n-1)/n (all_reduce + 2 T width / (LINK_SHARE peer))                two all-reduces a layer, none for n = 1
    overhead   layer (launches + host) + sequence b + token b c                               kernels' gaps; each request; bookkeeping

A batch of B requests is one prefill and, as that gives the first token, generated - 1 decode steps at their mean context: a step is
linear in it. Requests that do not fit wait. R = ((share capacity - reserved) n - weights) / state of a whole sequence run at once:

    "wait"     floor(B / R) rounds of R requests, then one of the rest
    "preempt"  B / R rounds of R: a request that ends makes room for the next, and one that must go is computed again

What the data sheet does not say is fixed here, for all devices alike, with its reason. ``token`` and ``grouped`` were added after a look at
residuals of Mistral-7B, which is not fitted, and found again in the slopes of the fitted LLMs: its error is no clean test.

Left out: pipeline parallelism, chunked prefill beside decode, speculation, prefix caches, sliding windows. Tokens choose experts uniformly
and alone; batches of equal prompts touch fewer. Whether an LLM fits is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .calibration import Parameter, Shapes
from .checks import check_name, check_number, shown
from .device import Device
from .kernel_step_llms import StepSizes, peak_name, step_configs, step_sizes, weight_bits
from .kernel_transfers import peer_bandwidth
from .roofline import Array
from .units import GB, GiB

BLOCK_RATE = 4.0
"""How much faster than its fair share of the bandwidth one core streams alone. With one request, steps on A100 take 13 ns a layer and token
of context more, however many devices share the heads: 39 GB/s for a thread block, where a core's share is 14 GB/s. Fits gave 3 to 6."""

ATTENTION_SHARE = 0.5
"""What products of prefill attention reach of what products with weights reach: softmax lies between them. An assumption; attention is
a tenth of a prefill of 2,000 tokens."""

LINK_SHARE = 0.7
"""Of a link's rate that large all-reduces reach: 0.63 to 0.74 on 2 to 8 A100, 0.7 to 0.99 on H100 (NCCL tests, aiconfigurator)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a serving engine does, as far as times of steps depend on it.

    ``split_context``: decode attention gives one context to several thread blocks (flash decoding). ``grouped``: share of the rate of
    MHA at which it reads keys and values that several query heads share (GQA, MQA, MLA). ``admission``: whether a request
    waits until its whole sequence fits, or enters and is preempted when memory runs out. ``share`` of the memory that the engine takes,
    of which ``reserved`` [B] a device go to what is neither weights nor state: context of the driver, workspaces, communication, graphs.
    ``host``: what scheduling a step costs beside its kernels, in layers' launches.
    """

    name: str
    split_context: bool = True
    grouped: float = 1.0
    admission: Literal["wait", "preempt"] = "preempt"
    share: float = 0.9
    reserved: float = 2 * GB
    host: float = 0.0

    def __post_init__(self) -> None:
        check_name("engine", self.name)
        what = f"engine {self.name!r}"
        if not isinstance(self.split_context, bool):
            raise ValueError(f"{what}: split_context must be True or False, not {self.split_context!r}; correct it")
        if self.admission not in ("wait", "preempt"):
            raise ValueError(f"{what}: admission must be 'wait' or 'preempt', not {self.admission!r}")
        for name in ("share", "grouped"):
            check_number(what, name, getattr(self, name), "as a share", infinite=False)
            if getattr(self, name) > 1:
                raise ValueError(f"{what}: {name} must be at most 1, not {getattr(self, name)!r}")
        check_number(what, "reserved", self.reserved, "B", zero=True, infinite=False)
        check_number(what, "host", self.host, "layers", zero=True, infinite=False)


TENSORRT_LLM = Engine(name="TensorRT-LLM", split_context=False, grouped=0.6, admission="wait")
"""One thread block a head and request (multi-block mode is off by default); a request starts when its whole sequence fits. It takes 0.9
of the memory by default; the 2 GB are read off batches that just fit, as those of the other engines are. With several requests,
steps of Llama2-70B and Mixtral grow with the context 1.5 to 2.2 times as fast as their bytes, those of Llama2-7B 1.04 to 1.3 times;
fits of ``grouped`` gave 0.52 on H100 and 0.64 on A100."""

TENSORRT_LLM_1 = Engine(name="TensorRT-LLM 1", admission="wait")
"""Its release 1: multi-block mode is the default."""

VLLM = Engine(name="vLLM", reserved=3.2 * GB, host=16)
"""PagedAttention (arXiv 2309.06180), whose second version splits contexts; preemption with recomputation; gpu_memory_utilization is 0.9.
Its scheduler is Python: 16 layers' worth is a compromise of A100 (best 0) and H100 (best 40)."""

DEEPSPEED_MII = Engine(name="Deepspeed-MII", reserved=1 * GB, host=16)
"""Blocked flash attention, dynamic split-fuse; its memory is an assumption."""

LLAMA_CPP = Engine(name="llama.cpp", share=1.0, reserved=1 * GB)
"""One request at a time here; its memory is an assumption."""

ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (TENSORRT_LLM, TENSORRT_LLM_1, VLLM, DEEPSPEED_MII, LLAMA_CPP)}
"""Engines by name."""

MEMORY = Parameter(
    name="memory", unit="", low=0.4, high=0.95, start=0.85, meaning="Share of the memory's bandwidth that weights and state stream at."
)
MATRIX = Parameter(name="matrix", unit="", low=0.25, high=0.85, start=0.6, meaning="Share of the matrix peak that products reach.")
LAYER = Parameter(name="layer", unit="s", low=0.0, high=3e-4, start=3e-5, meaning="Launches of and gaps between the kernels of a layer.")
TOKEN = Parameter(
    name="token",
    unit="s",
    low=0.0,
    high=3e-7,
    start=1e-8,
    meaning="Time of a decode step for each token of context held, whatever the LLM: tables of blocks, sequences.",
)
SEQUENCE = Parameter(
    name="sequence", unit="s", low=0.0, high=5e-4, start=3e-5, meaning="Time for each request of a step: schedule, sample, detokenise."
)
ALL_REDUCE = Parameter(
    name="all_reduce", unit="s", low=0.0, high=1e-4, start=1e-5, meaning="Latency of an all-reduce of two devices, without its bytes."
)
PARAMETERS = (MEMORY, MATRIX, LAYER, SEQUENCE, TOKEN, ALL_REDUCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepModel:
    """What the three models share, their parameters too: the values of one record serve all three.

    ``variant``: the name of one of ``ENGINES``, each of which has its own records; or give an ``engine``.

    The column ``llm`` has names (``presets.LLMS``, or a benchmark's), paths of a config.json, or LLMConfigs.

    ``lm_head``: the step ends with it, as every real one does; False: decoder layers only. ``overhead`` False: kernels and all-reduces
    only, without gaps and host, as tools that add up measured kernels count.
    """

    texts: ClassVar[tuple[str, ...]] = ("llm", "dtype")
    group: ClassVar[tuple[str, ...]] = ("llm",)
    counts: ClassVar[tuple[str, ...]] = ("batch", "devices")
    transfers: ClassVar[bool] = False
    parameters: ClassVar[tuple[Parameter, ...]] = PARAMETERS

    variant: str = ""
    engine: Engine = VLLM
    lm_head: bool = True
    overhead: bool = True

    def __post_init__(self) -> None:
        if self.variant and self.variant != self.engine.name:
            if self.variant not in ENGINES:
                raise ValueError(f"there is no engine {shown(self.variant)}; name one of {', '.join(ENGINES)}, or give an Engine")
            if self.engine is not VLLM:
                raise ValueError(f"the variant {self.variant!r} is not the engine's name, {self.engine.name!r}; give one of them only")
            object.__setattr__(self, "engine", ENGINES[self.variant])
        object.__setattr__(self, "variant", self.engine.name)

    def checked(self, shapes: Shapes) -> dict[str, NDArray[Any]]:
        """``shapes`` with each config.json read; ValueError for an LLM or a precision that is not known."""
        for name in np.unique(np.asarray(shapes["dtype"]).astype(str)):
            weight_bits(str(name))
        return {**shapes, "llm": step_configs(shapes["llm"])}

    def _rates(self, device: Device, shapes: Shapes) -> tuple[Array, Array, Array]:
        """Devices, B/s and FLOP/s [N] of all devices together; a peak that the data sheet does not say counts as infinite."""
        number = np.asarray(shapes["devices"], dtype=np.float64)
        names, row = np.unique(np.asarray(shapes["dtype"]).astype(str), return_inverse=True)
        peaks = np.array([device.peak(peak_name(str(name))) if device.peaks else np.inf for name in names])
        return number, number * device.bandwidth, number * peaks[row].reshape(number.shape)

    def _bytes_and_flops(self, sizes: StepSizes, tokens: Array, batch: Array, context: Array, *, decode: bool) -> tuple[Array, Array]:
        """Bytes of weights and state that must move, and FLOPs of products and attention, of a step on all devices together."""
        nbytes = self._weights(sizes, tokens, least=True) + batch * context * sizes.state
        pairs = tokens * (context if decode else (context + 1) / 2)
        return nbytes, self._product_flops(sizes, tokens, batch) + pairs * sizes.pair_flops

    def _weights(self, sizes: StepSizes, tokens: Array, *, least: bool = False) -> Array:
        """Bytes of weights that a step of ``tokens`` reads: experts as far as tokens that choose alone touch them; ``least``: those of one
        token, as all may choose the same."""
        touched = np.where(sizes.used < 1, -np.expm1(tokens * np.log1p(-np.minimum(sizes.used, 1 - 1e-9))), 1.0)
        if least:
            touched = np.minimum(sizes.used, 1.0)
        read: Array = sizes.weights + sizes.experts * touched + (sizes.head if self.lm_head else 0.0)
        return read

    def _product_flops(self, sizes: StepSizes, tokens: Array, batch: Array) -> Array:
        """The head runs once a request, the other products once a token."""
        return tokens * sizes.flops + (batch * sizes.head_flops if self.lm_head else 0.0)

    def _least(self, device: Device, shapes: Shapes, sizes: StepSizes, batch: Array, context: Array, *, decode: bool) -> Array:
        """Seconds [N] of a step that the data sheet rules out to beat."""
        return np.maximum(*self._parts(device, shapes, sizes, batch, context, decode=decode))

    def _parts(
        self, device: Device, shapes: Shapes, sizes: StepSizes, batch: Array, context: Array, *, decode: bool
    ) -> tuple[Array, Array]:
        """Seconds [N] of a step's bytes and of its FLOPs at the rates of the data sheet."""
        _, bandwidth, peak = self._rates(device, shapes)
        nbytes, flops = self._bytes_and_flops(sizes, batch if decode else batch * context, batch, context, decode=decode)
        return nbytes / bandwidth, flops / peak

    def _step(
        self,
        device: Device,
        shapes: Shapes,
        sizes: StepSizes,
        values: Mapping[str, float],
        batch: Array,
        context: Array,
        *,
        decode: bool,
    ) -> Array:
        """Seconds [N] of a step by the module's formula, never below the data sheet's."""
        number, bandwidth, peak = self._rates(device, shapes)
        stream, compute = values["memory"] * bandwidth, values["matrix"] * peak
        tokens = batch if decode else batch * context
        products = np.hypot(self._weights(sizes, tokens) / stream, self._product_flops(sizes, tokens, batch) / compute)
        attention = batch * context * sizes.state / stream
        if not decode:
            flops = tokens * (context + 1) / 2 * sizes.pair_flops
            attention = np.maximum(attention, flops / (compute * ATTENTION_SHARE))
        else:
            often = np.where(sizes.grouped > 0, 1 / self.engine.grouped, 1.0)
            if not self.engine.split_context and device.multiprocessors:
                often = often + number * device.multiprocessors / (BLOCK_RATE * np.maximum(batch * sizes.heads, 1.0))
            attention = attention * often
        between = tokens * sizes.activations / stream
        reduced = 2 * tokens * sizes.width / (LINK_SHARE * peer_bandwidth(device))
        reduce = 2 * sizes.layers * 2 * (number - 1) / number * (values["all_reduce"] + reduced)
        total = products + attention + between + reduce
        if self.overhead:
            total = total + values["layer"] * (sizes.launches + self.engine.host) + values["sequence"] * batch
        if self.overhead and decode:
            total = total + values["token"] * batch * context
        return np.maximum(total, self._least(device, shapes, sizes, batch, context, decode=decode))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStepTime(_StepModel):
    """Seconds of one decode step of ``batch`` requests whose contexts have ``context`` tokens on average, on ``devices`` devices.

    Whether weights and state fit on them is not asked: an LLM that does not fit has a time, too (``ServingTime.running``).
    """

    name: ClassVar[str] = "decode_step"
    fitted_as: ClassVar[str] = "serving"
    columns: ClassVar[tuple[str, ...]] = ("llm", "batch", "context", "devices", "dtype")

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N] with these values of the parameters; never below ``bound``."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        return self._step(device, shapes, sizes, values, _number(shapes, "batch"), _number(shapes, "context"), decode=True)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] to move weights and state at the data sheet's bandwidth, or to compute at its peak, whichever is longer."""
        return np.maximum(*self.work(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes and of the FLOPs, each at the rate of the data sheet."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        return self._parts(device, shapes, sizes, _number(shapes, "batch"), _number(shapes, "context"), decode=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStepTime(_StepModel):
    """Seconds until ``batch`` prompts of ``prompt`` tokens, computed together, have their first token."""

    name: ClassVar[str] = "prefill_step"
    fitted_as: ClassVar[str] = "serving"
    columns: ClassVar[tuple[str, ...]] = ("llm", "batch", "prompt", "devices", "dtype")

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N] with these values of the parameters; never below ``bound``."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        return self._step(device, shapes, sizes, values, _number(shapes, "batch"), _number(shapes, "prompt"), decode=False)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] to read weights and write the state, or to compute, whichever is longer."""
        return np.maximum(*self.work(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes and of the FLOPs, each at the rate of the data sheet."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        return self._parts(device, shapes, sizes, _number(shapes, "batch"), _number(shapes, "prompt"), decode=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTime(_StepModel):
    """Seconds until all of ``batch`` requests of ``prompt`` tokens, sent at once, have ``generated`` tokens each.

    Requests whose state does not fit wait for others. Where not even the weights fit, the time is that of one request after the other.
    """

    name: ClassVar[str] = "serving"
    columns: ClassVar[tuple[str, ...]] = ("llm", "batch", "prompt", "generated", "devices", "dtype")

    def running(self, device: Device, shapes: Shapes, /) -> Array:
        """Requests [N] that fit at once, a fraction too; at least 1, as an engine serves nothing else where not even one fits."""
        return self._fitting(device, shapes, step_sizes(shapes["llm"], shapes["dtype"]))

    def _fitting(self, device: Device, shapes: Shapes, sizes: StepSizes) -> Array:
        number = _number(shapes, "devices")
        # Chips come in powers of two: the GB of a data sheet's capacity, unlike that of its bandwidth, is a GiB.
        memory = self.engine.share * device.capacity / GB * GiB - self.engine.reserved
        longest = np.maximum(_number(shapes, "prompt") + _number(shapes, "generated"), 1.0)
        return np.maximum((memory * number - sizes.held) / (sizes.state * longest), 1.0)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N] with these values of the parameters; never below ``bound``."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        batch, room = _number(shapes, "batch"), self._fitting(device, shapes, sizes)

        def rounds_of(requests: Array) -> Array:
            prompt, steps, context = self._steps(shapes)
            prefill = self._step(device, shapes, sizes, values, requests, prompt, decode=False)
            return prefill + steps * self._step(device, shapes, sizes, values, requests, context, decode=True)

        if self.engine.admission == "preempt":
            total = np.maximum(batch / room, 1.0) * rounds_of(np.minimum(batch, room))
        else:
            room = np.maximum(np.minimum(np.floor(room), batch), 1.0)
            full = np.floor(batch / room)
            rest = batch - full * room
            total = full * rounds_of(room) + np.where(rest > 0, rounds_of(np.maximum(rest, 1.0)), 0.0)
        return np.maximum(total, self.bound(device, shapes))

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] of prefill and decode steps by the data sheet if all requests fit at once; more rounds only take longer."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        batch, (prompt, steps, context) = _number(shapes, "batch"), self._steps(shapes)
        prefill = self._least(device, shapes, sizes, batch, prompt, decode=False)
        return prefill + steps * self._least(device, shapes, sizes, batch, context, decode=True)

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes and of the FLOPs of all steps, each at the rate of the data sheet."""
        sizes = step_sizes(shapes["llm"], shapes["dtype"])
        batch, (prompt, steps, context) = _number(shapes, "batch"), self._steps(shapes)
        first = self._parts(device, shapes, sizes, batch, prompt, decode=False)
        later = self._parts(device, shapes, sizes, batch, context, decode=True)
        return first[0] + steps * later[0], first[1] + steps * later[1]

    @staticmethod
    def _steps(shapes: Shapes) -> tuple[Array, Array, Array]:
        """Tokens of the prompt, decode steps, and the mean of their contexts: step t reads the prompt and t tokens, t = 1, 2, ..."""
        prompt, generated = _number(shapes, "prompt"), _number(shapes, "generated")
        return prompt, np.maximum(generated - 1, 0.0), prompt + generated / 2


def _number(shapes: Mapping[str, Any], name: str) -> Array:
    return np.asarray(shapes[name], dtype=np.float64)
