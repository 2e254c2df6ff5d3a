"""One step of an LLM on one memory, for many designs at once: seconds, bytes, energy, what is held, and the physical bound.

The step is a list of kernels that run one after the other (``workload.step_kernels``). With eta the shares of a ``StepProfile``:

    x = bytes / (eta_memory BW)      y = FLOPs / (eta P)      P: matrix or vector peak, with the tile-load floor of ``roofline``
    kernel    (x^p + y^p)^(1/p)      p = inf: max(x, y), all of the shorter one hidden; p = 1: x + y, nothing hidden
    step      sum over kernels
    bound     max(bytes of weights and state / BW, matrix FLOPs / P_matrix, vector FLOPs / P_vector)

The p-norm is a smooth roofline: any p from 1 up lies between the sum and the maximum. Bytes and FLOPs of a kernel are proportional to the
tokens T or to the pairs of query and context token, and weights do not depend on either (but for experts: ``touched_share``), so a
``StepModel`` holds one coefficient of each for every kernel. Sizes are bytes, not pages: at most one page a tensor and layer is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_name, check_number, whole
from .hardware import System
from .llm import LLMConfig
from .price import flop_energy, static_power
from .roofline import Array, matrix_peak
from .systems import Place, Systems, as_systems, place_of
from .workload import Kernel, Phase, Workload, step_kernels, touched_share

CHUNK = 1024
"""Designs priced at a time: three tables of some sixteen kernels then stay in a cache of 1 MiB."""

Work = Literal["product", "expert", "attention", "vector", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """A calibration record of a step: what of the data sheet it reaches, and what it counts.

    ``memory``, ``matrix``, ``vector``: shares, above 0 and at most 1, of the memory's bandwidth and of the peaks. ``overlap``: the p of
    the module's formula, at least 1. ``activations``: kernels read and write activations in memory, and norms, rotary embedding,
    activation function and residuals are kernels of their own; False: fused and on chip, only weights and state move. ``lm_head``: the
    final norm and LM head run once for each request, and embeddings and head are held.
    ``stated_in``: where a share that is not 1 comes from; ``fitted_on``: the data that numbers were fitted on; empty for none.
    """

    name: str
    memory: float = 1.0
    matrix: float = 1.0
    vector: float = 1.0
    overlap: float = math.inf
    activations: bool = True
    lm_head: bool = False
    stated_in: str = ""
    fitted_on: str = ""

    def __post_init__(self) -> None:
        check_name("profile", self.name)
        for field in ("memory", "matrix", "vector"):
            check_number(f"profile {self.name!r}", field, getattr(self, field), "share of the data sheet", infinite=False)
            if getattr(self, field) > 1:
                raise ValueError(f"profile {self.name!r}: {field} must be at most 1, not {getattr(self, field)!r}; correct the data sheet")
        check_number(f"profile {self.name!r}", "overlap", self.overlap, "p of a p-norm")
        if self.overlap < 1:
            raise ValueError(f"profile {self.name!r}: overlap must be at least 1 (nothing is hidden), not {self.overlap!r}; raise it")
        for field in ("activations", "lm_head"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"profile {self.name!r}: {field} must be True or False, not {getattr(self, field)!r}; correct it")


STEP_DATASHEET = StepProfile(name="step_datasheet")
"""Every rate of the data sheet is reached, compute and memory overlap within each kernel, activations go through memory."""

STEP_FUSED = StepProfile(name="step_fused", activations=False)
"""The same with all activations on chip: weights and state are the only bytes."""


def tensor_parallel(system: System, devices: int) -> System:
    """``devices`` equal machines that share every tensor evenly, as one: all that adds up (capacities, rates, power, areas, costs) does.

    Communication is left out, so a step on it is a lower bound.
    """
    number = whole(f"system {system.name!r}", "devices", devices, "machines")
    parts = {}
    for part, fields in _ADDS_UP.items():
        together = []
        for item in getattr(system, part):
            known = {field: getattr(item, field) for field in fields if getattr(item, field) is not None}
            together.append(replace(item, **{field: value * number for field, value in known.items()}))
        parts[part] = tuple(together)
    return replace(system, name=system.name if number == 1 else f"{number} x {system.name}", **parts)


_ADDS_UP = {
    "tiers": ("capacity", "bandwidth", "static_power"),
    "units": ("matrix_peak", "vector_peak", "static_power", "area", "cost"),
    "links": ("bandwidth", "cost"),
}
"""Numbers of a System's parts that equal machines have together; latencies, shares, and what is said by byte, FLOP or mm2, stay."""


def tensor_parallel_all(systems: Systems, devices: ArrayLike) -> Systems:
    """``tensor_parallel`` of many machines, each by its number of ``devices`` (one number, or one a machine), or of one by each number."""
    number = np.asarray(devices, dtype=np.float64).reshape(-1)
    if (number == 1).all():
        return systems
    designs, columns = max(len(systems), len(number)), dict(systems.columns)
    for part, fields in _ADDS_UP.items():
        for item in getattr(systems.base, part):
            for field in fields:
                place = place_of(part, item, field)
                values = columns.get(place, getattr(item, field))
                if values is not None:
                    columns[place] = np.broadcast_to(values * number, designs)
    return Systems(base=systems.base, columns={place: np.broadcast_to(v, designs) for place, v in columns.items()}, designs=designs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepMachines:
    """What a step asks of D machines: arrays [D], or [1] where all are equal; SI units.

    ``capacity``, ``bandwidth`` and ``energy`` [J/B] of the tier that holds everything; ``matrix`` and ``vector`` peaks of the units on it,
    added up; ``flop_energy`` [J/FLOP] of those units; ``static_power`` [W] of the whole machine; ``memory_cost`` [USD] of all tiers. None:
    unknown. ``without``: constants of energy that are unknown and left out (``price.step_energy``). ``floors``: peak and tile (1: no floor)
    of each unit, if one has a tile.
    """

    designs: int
    tier: str
    capacity: Array
    bandwidth: Array
    energy: Array | None
    flop_energy: Array | None
    static_power: Array | None
    without: tuple[str, ...]
    memory_cost: Array | None
    matrix: Array
    vector: Array
    floors: tuple[tuple[Array, Array], ...]

    @classmethod
    def build(cls, systems: Systems | Sequence[System], *, tier: str | None = None, devices: ArrayLike = 1) -> StepMachines:
        """The machines of ``systems``, each ``devices`` (one number, or one a machine) times as in ``tensor_parallel``.

        ``tier``: the memory that holds everything; it may be left out where there is one only.
        """
        systems = as_systems(systems)
        name = holding_tier(systems.base, tier)
        number = np.asarray(devices, dtype=np.float64).reshape(-1)
        alone = bool((number == 1).all())

        def column(part: str, item: str, field: str, *, adds_up: bool = True) -> Array:
            """A number of a part; of all devices together, if it adds up."""
            values = systems.columns.get(Place(part, item, field))
            if values is None:
                given = getattr(next(one for one in getattr(systems.base, part) if one.name == item), field)
                values = np.array([math.nan if given is None else given], dtype=np.float64)
            return values * number if adds_up and not alone else values

        units = [unit.name for unit in systems.base.units if unit.tier == name]
        peaks = [column("units", unit, "matrix_peak") for unit in units]
        tiles = [column("units", unit, "tile", adds_up=False) for unit in units]
        floors = tuple((peak, np.where(np.isnan(tile), 1.0, tile)) for peak, tile in zip(peaks, tiles, strict=True))
        capacity = {each: column("tiers", each, "capacity") for each in systems.base.tier_names}
        costs = [capacity[each] * column("tiers", each, "cost", adds_up=False) for each in capacity]
        joules = _known(flop_energy(systems)[..., systems.base.tier_names.index(name)])
        watts, no_watts = static_power(systems)
        return cls(
            designs=max(len(systems), len(number)),
            tier=name,
            capacity=capacity[name],
            bandwidth=column("tiers", name, "bandwidth"),
            energy=_known(column("tiers", name, "energy", adds_up=False)),
            flop_energy=joules,
            static_power=watts * number if watts.any() else None,
            without=(*(() if joules is not None else (f"{', '.join(units)} energy",)), *no_watts),
            memory_cost=_known(_added(costs)),
            matrix=_added(peaks),
            vector=_added([column("units", unit, "vector_peak") for unit in units]),
            floors=() if all(np.isnan(tile).all() for tile in tiles) else floors,
        )

    def some(self, rows: slice) -> StepMachines:
        """The machines at ``rows``."""

        def cut(column: Array) -> Array:
            return column if len(column) == 1 else column[rows]

        return StepMachines(
            designs=len(range(*rows.indices(self.designs))),
            tier=self.tier,
            capacity=cut(self.capacity),
            bandwidth=cut(self.bandwidth),
            energy=None if self.energy is None else cut(self.energy),
            flop_energy=None if self.flop_energy is None else cut(self.flop_energy),
            static_power=None if self.static_power is None else cut(self.static_power),
            without=self.without,
            memory_cost=None if self.memory_cost is None else cut(self.memory_cost),
            matrix=cut(self.matrix),
            vector=cut(self.vector),
            floors=tuple((cut(peak), cut(tile)) for peak, tile in self.floors),
        )

    def matrix_peak(self, rows: Array) -> Array:
        """FLOP/s of all matrix units together on ``rows`` input rows."""
        return _added([matrix_peak(peak, rows, tile) for peak, tile in self.floors]) if self.floors else self.matrix


def holding_tier(system: System, tier: str | None) -> str:
    """The tier that holds everything; ValueError, with the way out, if it is not named among several or has no unit."""
    if tier is None and len(system.tiers) > 1:
        raise ValueError(
            f"system {system.name!r} has {len(system.tiers)} tiers, and this estimate takes one that holds all: "
            f"name it, tier=..., one of {list(system.tier_names)}"
        )
    name = system.tiers[0].name if tier is None else system.tier(tier).name
    if all(unit.tier != name for unit in system.units):
        raise ValueError(f"system {system.name!r}: tier {name!r} has no compute unit; name one of {[unit.tier for unit in system.units]}")
    return name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepEstimate:
    """A step of D designs, arrays [D]: ``latency`` and ``bound`` [s], ``traffic`` [B] of the memory, ``state`` [B] (keys and values),
    ``headroom`` [B] beside weights, state and activations (below 0: so much is lacking), ``fits``, ``energy`` [J] of accesses, FLOPs and
    static power as far as known (None: not even of accesses), ``memory_cost`` [USD] (None: unknown), ``tokens`` that leave the step
    (decode) or enter it (prefill); ``compute_bound``: whether the bound is that of FLOPs, and not of bytes
    (None: not asked for)."""

    latency: Array
    bound: Array
    traffic: Array
    state: Array
    headroom: Array
    fits: NDArray[np.bool_]
    tokens: Array
    energy: Array | None
    memory_cost: Array | None
    compute_bound: NDArray[np.bool_] | None = None


class _Block(NamedTuple):
    """Kernels ``start`` to ``stop`` that do the same kind of work: ``fixed`` [K, 1] bytes of weights, or of state a pair of request and
    context token; ``activations`` [K, 1] bytes and ``flops`` [K, 1], each a token, pair or request."""

    work: Work
    start: int
    stop: int
    fixed: Array
    activations: Array
    flops: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepModel:
    """The coefficients of a step's kernels, to be built once for an LLM, a phase, precisions and a profile.

    ``names`` of kernels in the order in which they are added, as often as ``counts`` says; ``blocks`` of like kernels. Bytes of
    weights: ``weights`` read whatever the tokens, ``experts`` of which a ``touched_share`` is read, ``held_weights``. Bytes a token:
    ``activations``, ``scratch`` (the residual stream and the largest kernel's inputs and outputs, which must be held); a request:
    ``head_activations``; a request and token of context: ``state``. FLOPs of products a token, of attention a pair, of the head a request.
    ``used``: share of the experts that a token uses.
    """

    workload: Workload
    profile: StepProfile
    names: tuple[str, ...]
    counts: tuple[int, ...]
    blocks: tuple[_Block, ...]
    used: float
    weights: float
    experts: float
    held_weights: float
    activations: float
    head_activations: float
    scratch: float
    state: float
    product_flops: float
    attention_flops: float
    head_flops: float

    @classmethod
    def build(
        cls,
        llm: LLMConfig,
        *,
        phase: Phase = "decode",
        weight_bits: float = 8,
        kv_bits: float = 8,
        activation_bits: float = 8,
        profile: StepProfile = STEP_DATASHEET,
    ) -> StepModel:
        """The coefficients: the kernels of one request with one token, whose tokens and pairs are 1."""
        unit = Workload(llm=llm, batch=1, context=1, phase=phase, weight_bits=weight_bits, kv_bits=kv_bits, activation_bits=activation_bits)
        chosen = [matrix for _, matrices in llm.layers for matrix in matrices if matrix.experts_per_token < matrix.experts]
        sparse = {matrix.name for matrix in chosen}
        sorted_kernels: dict[Work, list[tuple[int, Kernel]]] = {"product": [], "expert": [], "attention": [], "vector": [], "head": []}
        for count, layer in step_kernels(unit, activations=profile.activations, lm_head=profile.lm_head):
            for kernel in layer:
                sorted_kernels[_work(kernel, sparse)].append((count, kernel))
        blocks, start = [], 0
        for work, listed in sorted_kernels.items():
            if listed:
                sizes = [(count * (k.weight_bytes + k.state_bytes), count * k.activation_bytes, count * k.flops) for count, k in listed]
                blocks.append(_Block(work, start, start + len(listed), *np.array(sizes).T[:, :, None].copy()))
                start += len(listed)
        read, acts, flops = (
            {block.work: math.fsum(getattr(block, field)[:, 0]) for block in blocks} for field in ("fixed", "activations", "flops")
        )
        in_order = [item for listed in sorted_kernels.values() for item in listed]
        weights = read["product"] + read.get("head", 0.0)
        largest = max(kernel.activation_bytes for _, kernel in in_order if kernel.sublayer != "head")
        embeddings = 0.0 if not profile.lm_head or llm.tie_word_embeddings else llm.hidden_size * llm.vocab_size * weight_bits / 8
        return cls(
            workload=unit,
            profile=profile,
            names=tuple(kernel.name for _, kernel in in_order),
            counts=tuple(count for count, _ in in_order),
            blocks=tuple(blocks),
            used=chosen[0].experts_per_token / chosen[0].experts if chosen else 1.0,
            weights=weights,
            experts=read.get("expert", 0.0),
            held_weights=weights + read.get("expert", 0.0) + embeddings,
            activations=math.fsum(nbytes for work, nbytes in acts.items() if work != "head"),
            head_activations=acts.get("head", 0.0),
            scratch=largest + llm.hidden_size * activation_bits / 8 if profile.activations else 0.0,
            state=read["attention"],
            product_flops=math.fsum(nflops for work, nflops in flops.items() if work in ("product", "expert")),
            attention_flops=flops["attention"],
            head_flops=flops.get("head", 0.0),
        )

    def estimate(self, machines: StepMachines, batch: ArrayLike, context: ArrayLike, *, compare: bool = False) -> StepEstimate:
        """The step on each of ``machines`` with ``batch`` requests of ``context`` tokens: one number each, or one for each design.

        ``compare``: say also which of its two bounds is the larger one.
        Nothing is checked here; prefill needs a context of at least 1. Every number of a design has the same bits in any batch.
        """
        requests, tokens = (np.asarray(given, dtype=np.float64).reshape(-1) for given in (batch, context))
        designs = max(machines.designs, len(requests), len(tokens))
        result = StepEstimate(
            **{field: np.empty(designs) for field in ("latency", "bound", "traffic", "state", "headroom", "tokens")},
            fits=np.empty(designs, dtype=bool),
            compute_bound=np.empty(designs, dtype=bool) if compare else None,
            energy=None if machines.energy is None else np.empty(designs),
            memory_cost=None if machines.memory_cost is None else np.empty(designs),
        )
        scratch = np.empty((3, len(self.names), min(designs, CHUNK)))
        with np.errstate(divide="ignore"):
            for start in range(0, designs, CHUNK):
                rows = slice(start, min(start + CHUNK, designs))
                self._price(
                    machines if designs <= CHUNK else machines.some(rows),
                    requests if len(requests) == 1 else requests[rows],
                    tokens if len(tokens) == 1 else tokens[rows],
                    result,
                    rows,
                    scratch[:, :, : rows.stop - rows.start],
                )
        return result

    def _price(self, machines: StepMachines, batch: Array, context: Array, result: StepEstimate, rows: slice, tables: Array) -> None:
        """One chunk of ``estimate``, written to ``rows`` of ``result``; ``tables`` [3, K, rows] for what lies between."""
        profile, decode = self.profile, self.workload.phase == "decode"
        memory, compute, spare = tables
        held = batch * context
        tokens, pairs = (batch, held) if decode else (held, held * ((context + 1) / 2))
        per_byte = 1.0 / machines.bandwidth
        slow_byte = per_byte if profile.memory == 1 else 1.0 / (machines.bandwidth * profile.memory)
        vector = 1.0 / (machines.vector * profile.vector)
        matrix = 1.0 / (machines.matrix_peak(tokens) * profile.matrix)
        through, touched = tokens * slow_byte, 1.0 if not self.experts else touched_share(tokens, self.used)
        for block in self.blocks:
            part, unit, rate, moved, acts = np.s_[block.start : block.stop], tokens, matrix, slow_byte, through
            match block.work:
                case "expert":
                    moved = touched * slow_byte
                    rate = 1.0 / (machines.matrix_peak(tokens * self.used / touched) * profile.matrix)
                case "attention":
                    unit, moved, rate = pairs, held * slow_byte, vector if decode else matrix
                case "vector":
                    rate = vector
                case "head":
                    unit, acts = batch, batch * slow_byte
                    rate = 1.0 / (machines.matrix_peak(batch) * profile.matrix)
            np.multiply(block.flops, unit * rate, out=compute[part])
            if block.work == "vector":
                np.multiply(block.activations, acts, out=memory[part])
                continue
            np.multiply(block.fixed, moved, out=memory[part])
            if profile.activations:
                np.multiply(block.activations, acts, out=spare[part])
                np.add(memory[part], spare[part], out=memory[part])
        _overlapped(memory, compute, spare, profile.overlap)
        latency = _added_rows(memory, result.latency[rows])

        state = np.multiply(held, self.state, out=result.state[rows])
        traffic = np.add(state, self.weights + self.experts * touched, out=result.traffic[rows])
        bound = np.multiply(traffic, per_byte, out=result.bound[rows])
        products = tokens * self.product_flops
        if self.head_flops:
            products = products + batch * self.head_flops
        attention = pairs * self.attention_flops
        np.maximum(bound, (products if decode else products + attention) / machines.matrix, out=bound)
        if decode:
            np.maximum(bound, attention / machines.vector, out=bound)
        if result.compute_bound is not None:
            np.less(traffic * per_byte, bound, out=result.compute_bound[rows])
        np.maximum(latency, bound, out=latency)  # equal but for the rounding of sums in another order
        if profile.activations:
            np.add(traffic, tokens * self.activations, out=traffic)
            if self.head_activations:
                np.add(traffic, batch * self.head_activations, out=traffic)

        beside = self.held_weights + self.scratch * tokens
        if self.head_activations:
            beside = beside + self.head_activations * batch
        headroom = np.subtract(machines.capacity, state + beside, out=result.headroom[rows])
        np.greater_equal(headroom, 0.0, out=result.fits[rows])
        result.tokens[rows] = tokens
        if result.energy is not None and machines.energy is not None:
            energy = np.multiply(traffic, machines.energy, out=result.energy[rows])
            if machines.flop_energy is not None:
                np.add(energy, (products + attention) * machines.flop_energy, out=energy)
            if machines.static_power is not None:
                np.add(energy, latency * machines.static_power, out=energy)
        if result.memory_cost is not None and machines.memory_cost is not None:
            result.memory_cost[rows] = machines.memory_cost


def _overlapped(memory: Array, compute: Array, spare: Array, p: float) -> None:
    """``memory`` becomes the p-norm of ``memory`` and ``compute``: M (1 + (m/M)^p)^(1/p), m and M the smaller and the larger one."""
    if p == math.inf:
        np.maximum(memory, compute, out=memory)
    elif p == 1:
        np.add(memory, compute, out=memory)
    else:
        larger = np.maximum(memory, compute, out=spare)
        ratio = np.minimum(memory, compute, out=memory)
        np.maximum(larger, np.finfo(np.float64).tiny, out=compute)  # a kernel without work: 0 / tiny, not 0 / 0
        np.divide(ratio, compute, out=ratio)
        np.power(ratio, p, out=ratio)
        np.add(ratio, 1.0, out=ratio)
        np.power(ratio, 1.0 / p, out=ratio)
        np.multiply(ratio, larger, out=memory)


def _added_rows(table: Array, out: Array) -> Array:
    """Sum over the first axis, one row after the other: the order of ``np.sum`` depends on the length of the rows.

    ``accumulate`` adds in that order, too, and takes one call, but 20 times as long on long rows.
    """
    if len(out) < 8:
        out[...] = np.add.accumulate(table, axis=0)[-1]
        return out
    out[...] = table[0]
    for row in table[1:]:
        np.add(out, row, out=out)
    return out


def _known(column: Array) -> Array | None:
    return None if np.isnan(column).any() else column


def _work(kernel: Kernel, sparse: set[str]) -> Work:
    if kernel.sublayer == "head":
        return "head"
    if kernel.sublayer == "attention":
        return "attention"
    if kernel.engine == "vector":
        return "vector"
    return "expert" if kernel.name in sparse else "product"


def _added(terms: Sequence[Array]) -> Array:
    """Sum in the order given: a batch then equals its singles bit for bit."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
