"""The recompute split: how many tokens of each request a GPU recomputes while the keys and values of the others arrive (KVPR).

The keys and values of s' tokens of each request lie on the host. The GPU gets the layer inputs X of the first l tokens and recomputes
their keys and values, the link brings the other s' - l; l may differ between classes of equal layers. A decode step takes

    T(l_1, ..., l_C) = sum_c layers_c time_c(l_c / s')      time_c: a template of ``overlap``
    subject to   0 <= l_c <= most,   and what GPU and host hold fits

Source: KVPR (arXiv 2411.17089), which is the template "staged" with one class; "chunked" and "fluid" (HybridServe, arXiv 2501.01792) let
recomputation begin earlier. Launch overheads are left out, and chunks need not be whole tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import shown, whole, wholes
from .hardware import System
from .offload import (
    OffloadCost,
    OffloadLayer,
    OffloadMachine,
    OffloadRatios,
    capacity_for,
    embedding_bytes,
    fewer_bits,
    gigabytes_more,
    largest,
    new_tokens,
    offload_layers,
    offload_ratios,
)
from .offload_profiles import DATASHEET, OffloadProfile
from .overlap import chunked, chunked_lines, fluid, fluid_lines, lowest
from .roofline import Array
from .units import GB
from .workload import Workload

SplitTemplate = Literal["staged", "chunked", "fluid"]

BUFFERED_LAYERS = 2
"""Layers whose state, and weights if they stream, are in GPU memory at a time: the one in use and the one that arrives."""

STEPS_AT_ONCE = 2**15
"""Decode steps whose splits are looked for in one array, of some 50 lines each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeSplitPlan:
    """The decision: tokens of each request whose keys and values are recomputed, one number for each class of equal layers."""

    splits: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", wholes("plan", "splits", self.splits, "tokens", least=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeSplitProblem:
    """How many tokens to recompute in one decode step of ``batches`` GPU batches of ``layers[0].batch`` requests each.

    ``layers``: classes of equal layers; ``context``: tokens of state of a request (s'); ``most``: the largest split.
    ``weights``: "gpu", resident; "host", streamed once for all GPU batches, the key and value projections first, which are all that
    recomputation waits for in "staged" and "chunked". ``chunks``: of the template "chunked" only. ``embeddings`` [B]: on the GPU.
    ``system``, ``workload`` and ``profile`` are what it was built from; None for a problem made of coefficients.
    """

    layers: tuple[OffloadLayer, ...]
    machine: OffloadMachine
    context: int
    most: int
    template: SplitTemplate = "staged"
    chunks: int = 4
    weights: Literal["gpu", "host"] = "gpu"
    batches: int = 1
    embeddings: float = 0.0
    system: System | None = None
    workload: Workload | None = None
    profile: OffloadProfile | None = None

    def __post_init__(self) -> None:
        what = "recompute split"
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "context", whole(what, "context", self.context, "tokens", least=0))
        object.__setattr__(self, "most", whole(what, "most", self.most, "tokens", least=0))
        for field in ("chunks", "batches"):
            object.__setattr__(self, field, whole(what, field, getattr(self, field), field))
        if self.most > self.context:
            raise ValueError(f"{what}: most must be at most the context, {self.context} tokens, not {self.most}; lower it")
        if self.template not in ("staged", "chunked", "fluid"):
            raise ValueError(f"{what}: template must be 'staged', 'chunked' or 'fluid', not {self.template!r}")
        if self.weights not in ("gpu", "host"):
            raise ValueError(f"{what}: weights must be on 'gpu' or on 'host', not {self.weights!r}")
        if len({(layer.batch, layer.act_bytes) for layer in self.layers}) != 1:
            raise ValueError(f"{what}: all layers, at least one, must have the same batch and act_bytes, as they share requests")
        for layer in self.layers:
            if layer.projection_bytes > layer.read_bytes:
                raise ValueError(
                    f"{what}: projection_bytes are part of read_bytes, so {layer.projection_bytes!r} must not exceed {layer.read_bytes!r}"
                )

    @classmethod
    def build(
        cls,
        system: System,
        workload: Workload,
        *,
        profile: OffloadProfile = DATASHEET,
        template: SplitTemplate = "staged",
        chunks: int = 4,
        weights: Literal["gpu", "host"] = "gpu",
        batches: int = 1,
        most: int | None = None,
    ) -> RecomputeSplitProblem:
        """The problem of one decode step of ``batches`` times the workload's batch. ``most``: None for the context; KVPR: the prompt."""
        return cls(
            layers=offload_layers(workload, whole("recompute split", "batches", batches, "batches")),
            machine=OffloadMachine.build(system, profile),
            context=workload.context,
            most=workload.context if most is None else most,
            template=template,
            chunks=chunks,
            weights=weights,
            batches=batches,
            embeddings=embedding_bytes(workload),
            system=system,
            workload=workload,
            profile=profile,
        )

    @property
    def requests(self) -> int:
        """Requests of a step: those of all GPU batches."""
        return self.batches * self.layers[0].batch

    @property
    def ratios(self) -> tuple[OffloadRatios, ...]:
        """r, rho, w and c of each class of layers for one GPU batch; ValueError at a context of 0."""
        found = (offload_ratios(layer, self.machine, layer.batch * self.context) for layer in self.layers)
        return tuple(replace(ratios, w=0.0) if self.weights == "gpu" else ratios for ratios in found)

    def layer_time(self, index: int, splits: ArrayLike, contexts: ArrayLike | None = None) -> Array:
        """Seconds of one layer of class ``index`` in a step of all GPU batches; arrays of ``splits`` and ``contexts`` broadcast."""
        contexts = np.asarray(self.context if contexts is None else contexts, dtype=np.float64)
        template = fluid if self.template == "fluid" else chunked
        return template(np.asarray(splits, dtype=np.float64) / np.maximum(contexts, 1), **self._seconds(index, contexts))

    def lines(self, index: int, contexts: ArrayLike | None = None) -> tuple[Array, Array]:
        """``layer_time`` as the maximum of L lines in the share of tokens that are recomputed: constants and slopes, [L, ...] in s."""
        contexts = np.asarray(self.context if contexts is None else contexts, dtype=np.float64)
        template = fluid_lines if self.template == "fluid" else chunked_lines
        return template(**self._seconds(index, contexts))

    def _seconds(self, index: int, contexts: Array) -> dict[str, Any]:
        """What the templates take, for one GPU batch of one layer."""
        layer, tokens = self.layers[index], self.layers[index].batch * contexts
        seconds: dict[str, Any] = {
            "kv": layer.kv_time(self.machine, tokens),
            "act": layer.act_time(self.machine, tokens),
            "recompute": layer.recompute_time(self.machine, tokens),
            "compute": layer.compute_time(self.machine, tokens),
            "batches": self.batches,
        }
        if self.weights == "host":
            seconds["weights"] = layer.weight_time(self.machine)
        if self.template != "fluid":
            seconds["chunks"] = self.chunks if self.template == "chunked" else 1
            seconds["first"] = layer.projection_time(self.machine) if self.weights == "host" else None
        return seconds

    @property
    def gpu_bytes(self) -> float:
        """Bytes in GPU memory, whatever the plan: the embeddings, the weights, or two layers of them if they stream, and two layers' state
        of one GPU batch, in which a token takes the larger of its two forms."""
        held = [layer.weight_bytes for layer in self.layers for _ in range(min(layer.layers, BUFFERED_LAYERS))]
        streamed = sum(sorted(held)[-BUFFERED_LAYERS:])
        weights = sum(layer.layers * layer.weight_bytes for layer in self.layers) if self.weights == "gpu" else streamed
        return self.embeddings + weights + self._staged_bytes

    @property
    def _staged_bytes(self) -> float:
        depth = min(BUFFERED_LAYERS, sum(layer.layers for layer in self.layers))
        return depth * self.layers[0].batch * self.context * self._token_bytes

    @property
    def _token_bytes(self) -> float:
        return max(max(layer.kv_bytes, layer.act_bytes if self.most else 0.0) for layer in self.layers)

    @property
    def _kv_bytes(self) -> float:
        return self.requests * self.context * sum(layer.layers * layer.kv_bytes for layer in self.layers)

    @property
    def host_bytes(self) -> float:
        """Bytes on the host without a split: keys and values of all tokens and requests, and the weights if they stream."""
        return self._kv_bytes + (sum(layer.layers * layer.weight_bytes for layer in self.layers) if self.weights == "host" else 0.0)

    @property
    def token_room(self) -> int:
        """Tokens of a request, counted once for each layer, whose X the host has room for; negative if the rest does not fit already.

        A plan fits if sum_c layers_c l_c is at most this number, and ``gpu_bytes`` fit.
        """
        wanted = self.most * sum(layer.layers for layer in self.layers)
        # Half of what OffloadCost forgives: rounding then never lets a plan in that evaluate finds too large.
        tokens = (self.machine.host_capacity + 5e-4 - self.host_bytes) / (self.requests * self.layers[0].act_bytes)
        return wanted if tokens >= wanted else math.floor(tokens)

    @property
    def gpu_fits(self) -> bool:
        """The GPU's memory holds what it must, which is the same for every plan."""
        return self.gpu_bytes <= self.machine.gpu_capacity + 5e-4

    def evaluate(self, plan: RecomputeSplitPlan) -> OffloadCost:
        """Seconds and bytes of a decode step; ValueError if it is no plan of this problem (a plan that does not fit is one).

        The host keeps the keys and values of all tokens, as in KVPR, and in addition X of those that are recomputed.
        """
        if len(plan.splits) != len(self.layers):
            raise ValueError(
                f"the plan has {len(plan.splits)} splits, the problem {len(self.layers)} classes of layers: it belongs to another problem"
            )
        if max(plan.splits) > self.most:
            raise ValueError(
                f"the plan recomputes {max(plan.splits)} tokens of a request, and most is {self.most}; lower the split or raise most"
            )
        latency = link = gpu = saved = crossing = 0.0
        for index, (layer, split) in enumerate(zip(self.layers, plan.splits, strict=True)):
            sent = layer.batch * (self.context - split)
            weights = layer.weight_time(self.machine) if self.weights == "host" else 0.0
            state = layer.kv_time(self.machine, sent) + layer.act_time(self.machine, layer.batch * split)
            computed = layer.compute_time(self.machine, layer.batch * self.context)
            latency += layer.layers * float(self.layer_time(index, split))
            link += layer.layers * (weights + self.batches * float(state))
            gpu += layer.layers * self.batches * float(computed + layer.recompute_time(self.machine, layer.batch * split))
            saved += layer.layers * split
            crossing += layer.layers * self.batches * (sent * layer.kv_bytes + layer.batch * split * layer.act_bytes)
            crossing += layer.layers * layer.sent_bytes if self.weights == "host" else 0.0
        return OffloadCost(
            latency=latency,
            link_time=link,
            gpu_time=gpu,
            tier_names=(self.machine.gpu, self.machine.host),
            tier_bytes=(self.gpu_bytes, self.host_bytes + saved * self.requests * self.layers[0].act_bytes),
            capacity=(self.machine.gpu_capacity, self.machine.host_capacity),
            to_device_bytes=crossing,
        )

    @property
    def possible(self) -> bool:
        """Whether any plan fits: recomputing nothing takes least memory."""
        return self.gpu_fits and self.token_room >= 0

    def explain_infeasible(self) -> str:
        """Why not even a plan without recomputation fits, in one sentence: how many GB, and changes each of which alone would help."""
        tiers = (
            (self.machine.gpu, self.gpu_bytes, self.machine.gpu_capacity, self.profile),
            (self.machine.host, self.host_bytes, self.machine.host_capacity, None),
        )
        short = [f"{name} needs {need / GB:.6g} GB and holds {room / GB:.6g} GB" for name, need, room, _ in tiers if need > room]
        if self.possible or not short:
            return "a plan without recomputation fits"
        over = []
        for (name, need, room, profile), tier in zip(tiers, (None, None) if self.system is None else self.system.tiers[:2], strict=True):
            if need > room:
                missing = need - room if tier is None else max(capacity_for(need, tier.capacity, profile), need - room)
                over.append(f"enlarge {name} by {gigabytes_more(missing)} GB")
        ways = [" and ".join(over)]
        batch, context = self.layers[0].batch, self.context
        fewer = largest(lambda n: self._with(batch=n).possible, batch - 1)
        if fewer:
            ways.append(f"serve GPU batches of {fewer} requests instead of {batch}")
        shorter = 0 if fewer else largest(lambda n: self._with(context=n).possible, context - 1)
        if shorter:
            ways.append(f"shorten the context to {shorter} tokens")
        if self.weights == "gpu" and replace(self, weights="host").possible:
            ways.append("stream the weights (weights='host')")
        bits = "" if self.workload is None else fewer_bits(self.workload, lambda served: self._with(workload=served).possible)
        if bits:
            ways.append(bits)
        return f"{' and '.join(short)}; {', or '.join(ways)}"

    def _with(self, *, batch: int | None = None, context: int | None = None, workload: Workload | None = None) -> RecomputeSplitProblem:
        """The problem with the bytes of another batch, context or precision; its times are not looked at."""
        if workload is not None:
            return replace(self, layers=offload_layers(workload, self.batches), embeddings=embedding_bytes(workload), workload=workload)
        layers = self.layers if batch is None else tuple(replace(layer, batch=batch) for layer in self.layers)
        context = self.context if context is None else context
        return replace(self, layers=layers, context=context, most=min(self.most, context))


_NEIGHBOURS = np.array([0.0, 1.0])


def _whole_limits(contexts: ArrayLike, most: ArrayLike | None) -> tuple[Array, Array]:
    """Contexts and limits that are whole numbers of tokens, of one shape."""
    try:
        tokens = np.asarray(contexts, dtype=np.float64)
        limit = tokens if most is None else np.asarray(most, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"best_splits: contexts and most must be numbers of tokens, not {shown(contexts)} and {shown(most)}") from None
    if not np.all((tokens >= 0) & (tokens < 2**62) & (tokens == np.floor(tokens))):
        raise ValueError(f"best_splits: contexts must be whole numbers of tokens, at least 0 and below 2**62, not {shown(contexts)}")
    if not np.all((limit >= 0) & (limit <= tokens) & (limit == np.floor(limit))):
        raise ValueError("best_splits: most must be whole numbers of tokens, at least 0 and at most the contexts; lower it")
    tokens, limit = np.broadcast_arrays(tokens, limit)
    return tokens, limit


def best_splits(
    problem: RecomputeSplitProblem, contexts: ArrayLike | None = None, most: ArrayLike | None = None
) -> tuple[NDArray[np.int64], Array]:
    """The best split of each class of layers, [C, ...], and the seconds of a step, [...], at arrays of contexts [tokens] at once.

    The time is convex in the split, so the best whole number is next to the best real one, a crossing of two lines or an end.
    ``contexts`` and ``most`` (tokens, broadcast) replace the problem's; ``most`` then is all of a context unless given. What the
    memories hold is not looked at: that is for the solvers.
    """
    tokens: Any
    limit: Any
    if contexts is None and most is None:
        tokens, limit = np.float64(problem.context), np.float64(problem.most)
    else:
        tokens, limit = _whole_limits(problem.context if contexts is None else contexts, most)
    some = np.maximum(tokens, 1)
    splits, seconds = [], np.zeros(tokens.shape)
    for index, layer in enumerate(problem.layers):
        constants, slopes = problem.lines(index, tokens)
        below = np.floor(lowest(constants, slopes, limit / some) * some)
        near = np.minimum(below + _NEIGHBOURS.reshape(2, *(1,) * below.ndim), limit)
        times = np.maximum.reduce(constants[:, None] + slopes[:, None] * (near / some))
        above = times[1] < times[0]
        splits.append(np.where(above, near[1], near[0]).astype(np.int64))
        seconds = seconds + layer.layers * np.where(above, times[1], times[0])
    return np.stack(splits), seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitGeneration:
    """Seconds of all decode steps of a generation: ``transfer`` of all keys and values, ``recompute`` of as many tokens as allowed, and
    the ``best`` split of each step."""

    transfer: float
    recompute: float
    best: float

    @property
    def gain(self) -> float:
        """Throughput gained over the transfer of all keys and values; 0 where nothing takes time."""
        return self.transfer / self.best - 1 if self.best else 0.0

    @property
    def cut(self) -> float:
        """Share of the time of the transfer of all keys and values that is saved."""
        return 1 - self.best / self.transfer if self.transfer else 0.0


def split_generation(problem: RecomputeSplitProblem, *, generated: int, limit: Literal["prompt", "total"] = "prompt") -> SplitGeneration:
    """The decode steps that generate ``generated`` tokens after a prompt of ``problem.context`` tokens; the state grows by one a step.

    ``limit``: only tokens of the prompt are recomputed, as in KVPR, or all ("total"); the problem's own ``most`` does not count.
    """
    generated = new_tokens(generated)
    if limit not in ("prompt", "total"):
        raise ValueError(f"split_generation: limit must be 'prompt' or 'total', not {limit!r}")
    layers = list(enumerate(problem.layers))
    transfer = recompute = best = 0.0
    for start in range(0, generated, STEPS_AT_ONCE):
        contexts = problem.context + np.arange(start, min(start + STEPS_AT_ONCE, generated))
        most = np.full(len(contexts), problem.context) if limit == "prompt" else contexts
        transfer += float(sum(layer.layers * problem.layer_time(index, 0, contexts).sum() for index, layer in layers))
        recompute += float(sum(layer.layers * problem.layer_time(index, most, contexts).sum() for index, layer in layers))
        best += float(best_splits(problem, contexts, most)[1].sum())
    return SplitGeneration(transfer=transfer, recompute=recompute, best=best)
