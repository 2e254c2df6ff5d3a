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

from .checks import whole
from .hardware import System
from .offload import OffloadCost, OffloadLayer, OffloadMachine, OffloadRatios, embedding_bytes, offload_layers, offload_ratios
from .offload_profiles import DATASHEET, OffloadProfile
from .overlap import chunked, chunked_lines, fluid, fluid_lines, lowest
from .roofline import Array
from .units import GB
from .workload import Workload

SplitTemplate = Literal["staged", "chunked", "fluid"]

BUFFERED_LAYERS = 2
"""Layers whose state, and weights if they stream, are in GPU memory at a time: the one in use and the one that arrives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeSplitPlan:
    """The decision: tokens of each request whose keys and values are recomputed, one number for each class of equal layers."""

    splits: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(whole("plan", "a split", split, "tokens", least=0) for split in self.splits))


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
        token = max(max(layer.kv_bytes, layer.act_bytes if self.most else 0.0) for layer in self.layers)
        depth = min(BUFFERED_LAYERS, sum(layer.layers for layer in self.layers))
        return depth * self.layers[0].batch * self.context * token

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

    def explain_infeasible(self) -> str:
        """Why not even a plan without recomputation fits, in one sentence: how many GB, and which batch or precision would fit."""
        tiers = (
            (self.machine.gpu, self.gpu_bytes, self._staged_bytes, self.machine.gpu_capacity),
            (self.machine.host, self.host_bytes, self._kv_bytes, self.machine.host_capacity),
        )
        short = [f"{name} needs {need / GB:.6g} GB and holds {room / GB:.6g} GB" for name, need, _, room in tiers if need > room]
        over = [f"enlarge {name} by {(need - room) / GB:.3g} GB" for name, need, _, room in tiers if need > room]
        if not over:
            return "a plan without recomputation fits"
        batch = self.layers[0].batch
        fitting = min(math.floor(min((room - need + state) / (state / batch), batch)) if state else batch for _, need, state, room in tiers)
        share = min(room / need for _, need, _, room in tiers if need > room)
        ways = [" and ".join(over)]
        if fitting >= 1:
            ways.append(f"serve GPU batches of {fitting} requests instead of {batch}")
        elif self.weights == "gpu":
            ways.append("stream the weights (weights='host')")
        if self.workload is not None and share > 0:
            served = self.workload
            bits = (math.floor(share * one * 100) / 100 for one in (served.weight_bits, served.kv_bits, served.activation_bits))
            ways.append("use {:g} bits a weight, {:g} a key or value and {:g} an activation".format(*bits))
        return f"{' and '.join(short)}; {', or '.join(ways)}"


_NEIGHBOURS = np.array([0.0, 1.0])


def _whole_limits(contexts: ArrayLike, most: ArrayLike | None) -> tuple[Array, Array]:
    """Contexts and limits that are whole numbers of tokens, of one shape."""
    tokens = np.asarray(contexts, dtype=np.float64)
    limit = tokens if most is None else np.asarray(most, dtype=np.float64)
    if not np.all(np.isfinite(tokens) & (tokens >= 0) & (tokens == np.floor(tokens))):
        raise ValueError(f"best_splits: contexts must be whole numbers of tokens, at least 0, not {contexts!r}")
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
    generated = whole("split_generation", "generated", generated, "tokens")
    if limit not in ("prompt", "total"):
        raise ValueError(f"split_generation: limit must be 'prompt' or 'total', not {limit!r}")
    contexts = problem.context + np.arange(generated)
    most = np.full(generated, problem.context) if limit == "prompt" else contexts
    layers = list(enumerate(problem.layers))
    return SplitGeneration(
        transfer=float(sum(layer.layers * problem.layer_time(index, 0, contexts).sum() for index, layer in layers)),
        recompute=float(sum(layer.layers * problem.layer_time(index, most, contexts).sum() for index, layer in layers)),
        best=float(best_splits(problem, contexts, most)[1].sum()),
    )
