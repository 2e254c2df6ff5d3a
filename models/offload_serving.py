"""Serving a trace from a GPU and its host: in which form the state of each token is kept, and what an iteration costs.

The state of a token is written once, as keys and values (KV) or as the layer's input (ACT), from which a GPU recomputes KV (HybridServe,
arXiv 2501.01792), and keeps that form until its request ends. A token of a prompt may be kept in both (KVPR, arXiv 2411.17089): then each
iteration chooses which one it uses, and the host holds both. With A tokens recomputed of n, and R bytes a layer of GPU memory for state,

    T(A) = sum over classes of layers  N max(t_w + max(kv n - (kv - x) A - R, 0) / link,   t_c + t_rec A,
                                             B / n max(kv n - (kv - x) A - R, 0) / link to the host)

as in ``offload_generation``: weights and host state arrive while a layer is computed, and the B new tokens are stored in the proportion
in which all state is held. Assumed: R bytes of the GPU save R bytes of the link in whatever form, as data that cross the link anyway are
promoted into room that is free; tokens in both forms are copies there, so they save no host memory; no page is lost to fragments; and the
end of a request is known in its last iteration, so that its room is filled again at once. Contexts may differ; only their sum counts.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import shown, whole
from .hardware import System
from .llm import LLMConfig
from .offload import (
    STAGED_REQUESTS,
    OffloadCost,
    OffloadLayer,
    OffloadMachine,
    WeightsOn,
    capacity_for,
    gigabytes_more,
    gpu_overhead,
    offload_layers,
)
from .offload_baselines import prefill_flops
from .offload_profiles import DATASHEET, OffloadProfile
from .roofline import Array
from .serving import ServingState, check_served
from .trace import Index, Trace
from .units import GB
from .workload import Workload

NEIGHBOURS = np.array([0.0, 1.0])
PAIRS = np.triu_indices(4, 1)  # of the lines of a class


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffloadSteps:
    """Decode steps of ``batch`` [I] requests that hold ``tokens`` [I]: seconds as the maximum of lines in the tokens recomputed, A.

    For C classes of ``layers`` equal layers: ``constants`` [C, 4, I] s, ``slopes`` [C, 4, I] s/token of the link to the GPU, the weights on
    it alone, the GPU, and the link to the host.
    """

    layers: tuple[int, ...]
    batch: Index
    tokens: Index
    constants: Array
    slopes: Array

    def __len__(self) -> int:
        return len(self.tokens)

    def only(self, some: slice) -> OffloadSteps:
        """Some of the steps."""
        parts = {name: getattr(self, name)[..., some] for name in ("batch", "tokens", "constants", "slopes")}
        return OffloadSteps(layers=self.layers, **parts)

    def seconds(self, recomputed: ArrayLike) -> Array:
        """Seconds [..., I] of each step when so many tokens [..., I] are recomputed, from 0 to ``tokens``."""
        act = np.asarray(recomputed, dtype=np.float64)
        total: Array = np.zeros(np.broadcast_shapes(act.shape, self.tokens.shape))
        for layers, constants, slopes in zip(self.layers, self.constants, self.slopes, strict=True):
            total = total + layers * reduce(np.maximum, [constant + slope * act for constant, slope in zip(constants, slopes, strict=True)])
        return total

    def corners(self) -> Array:
        """Numbers of tokens [L, I] where two lines of a class cross, clipped to 0 and ``tokens``, and these ends: one is the best."""
        i, j = PAIRS
        with np.errstate(divide="ignore", invalid="ignore"):
            crossings = (self.constants[:, i] - self.constants[:, j]) / (self.slopes[:, j] - self.slopes[:, i])
        found = np.where(np.isfinite(crossings), crossings, 0.0).reshape(-1, len(self))
        return np.clip(np.concatenate([np.zeros((1, len(self))), self.tokens[None], found]), 0.0, self.tokens)

    def best(self, least: ArrayLike = 0, most: ArrayLike | None = None) -> tuple[Index, Array]:
        """The whole number of tokens [I] between ``least`` and ``most`` [I] at which each step is shortest, the smallest of several, and
        its seconds.

        The seconds are convex in it, so the best whole number is next to a corner or at an end.
        """
        near = np.floor(self.corners()[:, None] + NEIGHBOURS[:, None]).reshape(-1, len(self))
        places = np.clip(near, least, self.tokens if most is None else most)
        heights = self.seconds(places)
        lowest = heights.min(axis=0)
        # Heights that differ by a few roundings count as equal.
        chosen = np.where(heights <= lowest * (1 + 1e-14), places, np.inf).min(axis=0)
        return chosen.astype(np.int64), self.seconds(chosen)


class TokenBytes(NamedTuple):
    """Bytes that a token's state takes in one layer, in each form."""

    kv: float
    act: float

    @property
    def act_pays(self) -> bool:
        """Whether ACT is smaller than KV: without that, recomputing never helps."""
        return self.act < self.kv


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadService:
    """An LLM served by a GPU and its host, at most ``batch`` requests of at most ``longest`` tokens (the last one included) at once.

    Bits as in ``Workload``, but 16 unless said. ``weights``: streamed from the "host" in each step, or kept on the "gpu". ``cache``
    [B a layer]: R, the GPU memory for state; ``host_room`` [B a layer]: host memory for state. ValueError if either is below 0.
    """

    system: System
    llm: LLMConfig
    batch: int
    longest: int
    profile: OffloadProfile = DATASHEET
    weights: WeightsOn = "host"
    weight_bits: float = 16
    kv_bits: float = 16
    activation_bits: float = 16
    buffered_requests: int = STAGED_REQUESTS
    machine: OffloadMachine = field(init=False, repr=False)
    overhead: float = field(init=False, repr=False)
    cache: float = field(init=False)
    host_room: float = field(init=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_served(self.system, self.llm)
        if not isinstance(self.profile, OffloadProfile):
            raise ValueError(f"offload serving: the profile must be an OffloadProfile, as DATASHEET, not {shown(self.profile)}")
        object.__setattr__(self, "batch", whole("offload serving", "batch", self.batch, "requests"))
        object.__setattr__(self, "longest", whole("offload serving", "longest", self.longest, "tokens"))
        if self.weights not in ("host", "gpu"):
            raise ValueError(f"offload serving: weights are on the 'host' or on the 'gpu', not {self.weights!r}")
        machine, workload = OffloadMachine.build(self.system, self.profile), self.workload(self.batch)
        overhead = gpu_overhead(workload, self.longest, weights=self.weights, buffered_requests=self.buffered_requests)
        weights, layers = (workload.weight_bytes if self.weights == "host" else 0.0), self.llm.num_hidden_layers
        spare, room = machine.gpu_capacity - overhead, machine.host_capacity - weights
        if spare < 0:
            more = gigabytes_more(max(capacity_for(overhead, self.system.tiers[0].capacity, self.profile), -spare))
            raise ValueError(
                f"{self.llm.name} on {self.system.name}: {machine.gpu} needs {overhead / GB:.4g} GB beside state, more than an engine "
                f"may use; enlarge it by {more} GB, or serve fewer or shorter requests"
            )
        if room < 0:
            raise ValueError(
                f"{self.llm.name} on {self.system.name}: the weights of {weights / GB:.4g} GB do not fit into {machine.host} of "
                f"{machine.host_capacity / GB:.4g} GB; enlarge it by {gigabytes_more(-room)} GB"
            )
        object.__setattr__(self, "machine", machine)
        object.__setattr__(self, "overhead", overhead)
        sizes = self.token_bytes
        # No more than all state in both forms takes, so that a memory without limit is none.
        most = (sizes.kv + sizes.act) * self.batch * self.longest
        object.__setattr__(self, "cache", min(spare / layers, most))
        object.__setattr__(self, "host_room", min(room / layers, most))

    def workload(self, batch: int) -> Workload:
        """A decode step of ``batch`` requests; what they hold is given beside it."""
        bits: dict[str, Any] = {name: getattr(self, name) for name in ("weight_bits", "kv_bits", "activation_bits")}
        return Workload(llm=self.llm, batch=batch, context=self.longest, **bits)

    @property
    def token_bytes(self) -> TokenBytes:
        """Bytes of a token's state in one layer."""
        layer = self._layers(1)[0]
        return TokenBytes(kv=layer.kv_bytes, act=layer.act_bytes)

    def most_tokens(self, nbytes: float, *, both: bool = False) -> int:
        """Tokens that fit if each takes ``nbytes`` in a layer at most; ``both``: all on the host, as what is kept in both forms is."""
        room = self.host_room if both else self.host_room + self.cache
        return min(int(room / nbytes), self.batch * self.longest)

    def check(self, trace: Trace, most_tokens: int) -> None:
        """ValueError that names the first request that is larger than ``most_tokens``, or than the positions that the LLM knows."""
        sizes, known = trace.state_tokens, self.llm.max_position_embeddings
        for limit, why in (
            (most_tokens, f"{self.system.name} has room for {most_tokens} in the form that the policy may take; enlarge the host"),
            (known or int(sizes.max()), f"{self.llm.name} knows {known} positions; take another LLM"),
        ):
            large = np.flatnonzero(sizes > limit)
            if len(large):
                raise ValueError(
                    f"trace {trace.name!r}: request {large[0]} holds {sizes[large[0]]} tokens at its end, and {why} or leave it out"
                )

    def steps(self, batch: ArrayLike, tokens: ArrayLike) -> OffloadSteps:
        """Decode steps of ``batch`` [I] requests that hold ``tokens`` [I] together."""
        sizes, held = np.asarray(batch, dtype=np.int64), np.asarray(tokens, dtype=np.int64)
        if sizes.shape != held.shape or held.ndim != 1 or (len(held) and (held.min() < 0 or sizes.min() < 1)):
            raise ValueError("steps need a batch of at least 1 and tokens of at least 0 each; give two lists of one length")
        machine, (kv, act) = self.machine, self.token_bytes
        classes = tuple(layer.layers for layer in self._layers(1))
        constants, slopes = (np.zeros((len(classes), 4, len(held))) for _ in range(2))
        host, count = kv * held - self.cache, held.astype(np.float64)
        back = sizes / np.maximum(held, sizes) / machine.to_host
        for size in np.unique(sizes).tolist():
            here = sizes == size
            for c, layer in enumerate(self._layers(size)):
                weights = layer.weight_time(machine) if self.weights == "host" else 0.0
                constants[c, :, here] = np.stack(
                    [
                        weights + host[here] / machine.to_device,
                        np.full(int(here.sum()), weights),
                        layer.compute_time(machine, count[here]),
                        host[here] * back[here],
                    ],
                    axis=1,
                )
                slopes[c, 2, here] = layer.recompute_flops / machine.peak
        slopes[:, 0] = (act - kv) / machine.to_device
        slopes[:, 3] = (act - kv) * back
        return OffloadSteps(layers=classes, batch=sizes, tokens=held, constants=constants, slopes=slopes)

    def limits(self, tokens: ArrayLike) -> tuple[Index, Index]:
        """The least and the most of ``tokens`` [...] that may be ACT so that GPU and host hold all, each in one form; least above most:
        it does not fit."""
        held, (kv, act) = np.asarray(tokens, dtype=np.int64), self.token_bytes
        room = self.cache + self.host_room
        if kv == act:
            return np.where(kv * held > room, held + 1, 0), held
        edge = (kv * held - room) / (kv - act)
        slack = 1e-9 * np.maximum(np.abs(edge), 1.0)  # more than its rounding
        if act < kv:
            return np.maximum(np.ceil(edge - slack), 0).astype(np.int64), held
        return np.zeros_like(held), np.minimum(np.floor(edge + slack), held).astype(np.int64)

    def cost(self, state: OffloadState, recomputed: int) -> OffloadCost:
        """Seconds of a state's decode step and bytes on both tiers, with so many tokens recomputed of those kept in both forms."""
        (kv, act), step = self.token_bytes, state.step
        used = int(state.act.sum()) + recomputed
        in_use = kv * (state.tokens - used) + act * used
        single, twice = kv * int(state.kv.sum()) + act * int(state.act.sum()), (kv + act) * int(state.both.sum())
        layers = self.llm.num_hidden_layers
        held = self.workload(1).weight_bytes if self.weights == "host" else 0.0
        lines = step.constants[..., 0] + step.slopes[..., 0] * used
        link, gpu = (
            sum(n * max(float(line[i]) for i in some) for n, line in zip(step.layers, lines, strict=True)) for some in ((0, 1), (2,))
        )
        return OffloadCost(
            latency=float(step.seconds(used)[0]),
            link_time=link,
            gpu_time=gpu,
            tier_names=(self.machine.gpu, self.machine.host),
            tier_bytes=(self.overhead + layers * min(self.cache, in_use), held + layers * (twice + max(single - self.cache, 0.0))),
            capacity=(self.machine.gpu_capacity, self.machine.host_capacity),
            to_device_bytes=self.streamed(state.batch) + layers * max(in_use - self.cache, 0.0),
        )

    def streamed(self, batch: int) -> float:
        """Bytes of weights that cross the link in a step of ``batch`` requests."""
        return sum(layer.layers * layer.sent_bytes for layer in self._layers(batch)) if self.weights == "host" else 0.0

    def prefill_time(self, state: OffloadState, used: int) -> tuple[float, float]:
        """Seconds of reading the prompts of the ``joined`` requests together, and the bytes of them that go to the host; ``used``: tokens
        of the whole batch that are recomputed in the decode step after it.

        Of a layer: max(FLOPs / peak, weights / link, stored bytes / link to the host); GPU memory that is free takes bytes first.
        """
        if not state.joined:
            return 0.0, 0.0
        (kv, act), new = self.token_bytes, slice(state.serving.batch - state.joined, None)
        written = kv * int(state.kv[new].sum()) + act * int(state.act[new].sum()) + (kv + act) * int(state.both[new].sum())
        twice = (kv + act) * int(state.both[new].sum())
        outside = max(kv * (state.tokens - used) + act * used - self.cache, 0.0)
        stored = max(min(written, outside), twice)
        prompts = state.serving.trace.prompt_tokens[state.serving.running[new]].tolist()
        seconds = 0.0
        for layer in self._layers(1):
            flops = sum(float(prefill_flops(layer, prompt)) for prompt in prompts)
            weights = layer.weight_bytes / self.machine.to_device if self.weights == "host" else 0.0
            seconds += layer.layers * max(flops / self.machine.peak, weights, stored / self.machine.to_host)
        return seconds, self.llm.num_hidden_layers * stored

    def _layers(self, batch: int) -> tuple[OffloadLayer, ...]:
        found: tuple[OffloadLayer, ...] | None = self._kept.get(batch)
        if found is None:
            found = self._kept[batch] = offload_layers(self.workload(batch))
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffloadDecision:
    """What a policy decides before an iteration of B requests, of which the last J have just joined.

    ``prompt_act``, ``prompt_both`` [J]: tokens of each new prompt written as ACT, and in both forms; the others are KV. ``new_act`` [B]:
    whether the token that each request generates now is ACT. ``recomputed``: tokens, of those kept in both forms, recomputed now.
    """

    prompt_act: Index
    new_act: NDArray[np.bool_]
    prompt_both: Index | None = None
    recomputed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffloadState:
    """What a policy decides on: who runs, in which forms their tokens are held, and what the iteration costs (``step``, one step).

    ``kv``, ``act``, ``both`` [B]: tokens of each running request in each form; all 0 for the last ``joined`` requests, whose prompts
    are written in this iteration. ``prompt_act`` [B]: tokens of the prompt that were written as ACT. A policy may look at ``serving``, but
    knowing when a request ends is knowing what is to come.
    """

    serving: ServingState
    service: OffloadService
    step: OffloadSteps
    kv: Index
    act: Index
    both: Index
    prompt_act: Index
    joined: int

    def __post_init__(self) -> None:
        for name in ("kv", "act", "both", "prompt_act"):  # a policy looks at them, and must not change what was written
            values = getattr(self, name).view()
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    @classmethod
    def start(cls, service: OffloadService, trace: Trace) -> OffloadState:
        """Nothing runs yet."""
        none = np.zeros(0, dtype=np.int64)
        forms = dict.fromkeys(("kv", "act", "both", "prompt_act"), none)
        return cls(serving=ServingState.start(trace), service=service, step=service.steps([], []), joined=0, **forms)

    def admitted(self, serving: ServingState) -> OffloadState:
        """The state with the requests of ``serving``: those of this one, and some that join."""
        joined = serving.batch - self.serving.batch
        none = np.zeros(joined, dtype=np.int64)
        forms: dict[str, Any] = {name: np.concatenate([getattr(self, name), none]) for name in ("kv", "act", "both", "prompt_act")}
        step = self.service.steps([serving.batch], [serving.tokens]) if serving.batch else self.step
        return replace(self, serving=serving, step=step, joined=joined, **forms)

    @property
    def batch(self) -> int:
        """Requests that run."""
        return self.serving.batch

    @property
    def tokens(self) -> int:
        """Tokens whose state this iteration reads, the new prompts included."""
        return self.serving.tokens

    @property
    def prompts(self) -> Index:
        """Tokens [J] of each prompt that joins."""
        return self.serving.context[self.batch - self.joined :]

    def ahead(self, number: int) -> OffloadSteps:
        """This step and the next ones, ``number`` in all, if nobody ends and nobody joins."""
        count = np.full(number, self.batch)
        return self.service.steps(count, self.tokens + self.batch * np.arange(number))

    def written(self, decision: OffloadDecision) -> OffloadState:
        """The state with the new prompts in their forms; ValueError if the decision breaks a rule."""
        act = _counts("prompt_act", decision.prompt_act, self.prompts)
        both = np.zeros_like(act) if decision.prompt_both is None else _counts("prompt_both", decision.prompt_both, self.prompts)
        over = np.flatnonzero(act + both > self.prompts)
        if len(over):
            place = int(over[0])
            raise ValueError(
                f"new prompt {place} has {self.prompts[place]} tokens, and {act[place]} are to be ACT and {both[place]} both; lower them"
            )
        new = np.asarray(decision.new_act)
        if new.shape != (self.batch,) or (self.batch and new.dtype != np.bool_):
            raise ValueError(
                f"new_act must say of each of {self.batch} requests, by True or False, whether its token is ACT, not "
                f"{shown(decision.new_act)}"
            )
        old = slice(0, self.batch - self.joined)
        forms = {"kv": self.prompts - act - both, "act": act, "both": both, "prompt_act": act}
        joined: dict[str, Any] = {name: np.concatenate([getattr(self, name)[old], new]) for name, new in forms.items()}
        found = replace(self, **joined)
        recomputed = whole("offload decision", "recomputed", decision.recomputed, "tokens", least=0)
        if recomputed > found.both.sum():
            raise ValueError(f"{recomputed} tokens are to be recomputed, and {found.both.sum()} are kept in both forms; lower recomputed")
        return found

    def stepped(self, decision: OffloadDecision, seconds: float) -> OffloadState:
        """The state after an iteration of so many ``seconds``: one token more of each request; those that have all leave."""
        stay = self.serving.remaining > 1
        new = np.asarray(decision.new_act, dtype=np.bool_)
        kv, act = self.kv + ~new, self.act + new
        forms: dict[str, Any] = {"kv": kv[stay], "act": act[stay], "both": self.both[stay], "prompt_act": self.prompt_act[stay]}
        return replace(self, serving=self.serving.stepped(seconds), joined=0, **forms)


def _counts(name: str, values: object, prompts: Index) -> Index:
    found, number = np.asarray(values), len(prompts)
    if found.shape != (number,) or not np.issubdtype(found.dtype, np.integer) or (number and found.min() < 0):
        raise ValueError(f"{name} must be a whole number of tokens of at least 0 for each of {number} new prompts, not {shown(values)}")
    if number and int(found.max()) > int(prompts.max()):  # before it becomes a signed number, and before two of them are added
        raise ValueError(f"{name}: a new prompt has at most {prompts.max()} tokens, and {found.max()} are to be of this form; lower it")
    return found.astype(np.int64)
