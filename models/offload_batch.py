"""Offloading for many designs at once: the recompute split and the cache ratio with arrays [D] in place of numbers.

What designs vary (machine numbers, batch, context) is an array with one value for each of D designs; what they share is a plain number.
The formulas are those of ``offload``, ``recompute_split`` and ``cache_ratio``, which broadcast, so that a batch equals its singles bit for
bit. What a workload's kernels depend on is looked up once for each distinct batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache_ratio import BLOCK, CacheRatioProblem, LinearTime, RatioLayer
from .checks import whole
from .design_table import MOST, WORKLOAD_COLUMNS, DesignTable
from .hardware import System
from .offload import STAGED_REQUESTS, OffloadLayer, OffloadMachine, WeightsOn, embedding_bytes, held_beside_state, offload_layers
from .offload_profiles import DATASHEET, OffloadProfile
from .recompute_split import RecomputeSplitProblem, SplitTemplate
from .roofline import Array
from .systems import Systems
from .workload import Workload

Values = Any
"""A number that all designs share, or an array [D]."""

MOST_TOKENS = 2**53
"""Tokens of state of a design are below it: a double counts them exactly."""

MOST_BYTES = 2**61
"""Bytes that a batch counts with at most, so that sums of them fit an int64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OffloadDesigns:
    """D pairs of a machine and a workload: ``systems``, and ``workload`` with ``batch`` [D] and ``context`` [D], int64.

    ``batches``: GPU batches of ``batch`` requests that share one load of the weights.
    """

    systems: Systems
    workload: Workload
    batch: NDArray[np.int64]
    context: NDArray[np.int64]
    profile: OffloadProfile = DATASHEET
    batches: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", whole("offloading", "batches", self.batches, "GPU batches"))
        for name in WORKLOAD_COLUMNS:
            if getattr(self, name).shape != (len(self.systems),):
                raise ValueError(f"column {name!r} must have a row for each of {len(self.systems)} machines; give one for each")
        tokens = self.batches * np.max(self.batch * self.context.astype(np.float64), initial=0.0)
        if tokens >= MOST_TOKENS:
            raise ValueError(
                f"offloading: all requests of a design must have fewer than 2**53 tokens of state, not {tokens:.3g}; lower batch"
            )

    @classmethod
    def from_columns(
        cls,
        system: System,
        workload: Workload,
        columns: Mapping[str, ArrayLike],
        *,
        profile: OffloadProfile = DATASHEET,
        batches: int = 1,
    ) -> OffloadDesigns:
        """A table of designs: ``batch``, ``context``, and columns of ``Systems`` that vary ``system``. ValueError names a wrong column."""
        return cls._of(DesignTable.from_columns(system, workload, columns), profile=profile, batches=batches)

    @classmethod
    def counted(
        cls,
        system: System,
        workload: Workload,
        columns: Mapping[str, ArrayLike],
        *,
        profile: OffloadProfile = DATASHEET,
        batches: int = 1,
        block: int = 1,
    ) -> tuple[OffloadDesigns, NDArray[np.bool_]]:
        """``from_columns``, and which designs [D] have more state, in whole blocks, than a batch counts exactly.

        No machine holds that; instead of being refused with all others, these stand here with one request of no token.
        """
        table, number = DesignTable.from_columns(system, workload, columns), whole("offloading", "batches", batches, "GPU batches")
        requests, context = (np.broadcast_to(table.count(name, getattr(workload, name)), len(table)) for name in WORKLOAD_COLUMNS)
        tokens = requests.astype(np.float64) * number * np.ceil(context / block) * block
        each = sum(layer.layers * max(layer.kv_bytes, layer.act_bytes) for layer in _layers(replace(workload, batch=1, context=0), 1))
        beyond = (tokens >= MOST_TOKENS) | (tokens * each >= MOST_BYTES / 2)  # half of it: blocks are rounded to bytes
        if beyond.any():
            counts = {"batch": np.where(beyond, 1, requests), "context": np.where(beyond, 0, context)}
            table = replace(table, counts=counts)
        return cls._of(table, profile=profile, batches=batches), beyond

    @classmethod
    def from_row(cls, system: System, workload: Workload, row: Mapping[str, Any]) -> OffloadDesigns:
        """The one design of a table's row, in which columns that say no number of ``system``, batch or context are passed over."""
        return cls._of(DesignTable.from_row(system, workload, row), profile=DATASHEET, batches=1)

    @classmethod
    def _of(cls, table: DesignTable, *, profile: OffloadProfile, batches: int) -> OffloadDesigns:
        columns = {name: np.broadcast_to(table.count(name, getattr(table.workload, name)), len(table)) for name in WORKLOAD_COLUMNS}
        return cls(systems=table.systems, workload=table.workload, profile=profile, batches=batches, **columns)

    def __len__(self) -> int:
        return len(self.systems)

    def __getitem__(self, index: int) -> tuple[System, Workload]:
        """Design number ``index``."""
        served = replace(self.workload, batch=int(self.batch[index]), context=int(self.context[index]))
        return self.systems[index], served

    @property
    def machine(self) -> OffloadMachine:
        """The machines, with arrays [D] of what they vary."""
        return OffloadMachine.build(self.systems, self.profile)

    @property
    def layers(self) -> tuple[OffloadLayer, ...]:
        """The classes of layers; FLOPs, and bytes that depend on which experts are chosen, are arrays [D] if the batch varies."""
        distinct, which = np.unique(self.batch, return_inverse=True)
        served = replace(self.workload, context=0)
        found = [_layers(replace(served, batch=batch), self.batches) for batch in distinct.tolist()]
        return tuple(cut(_stacked(list(same)), which) for same in zip(*found, strict=True)) if found else _layers(served, self.batches)

    def ratios(self, weights: WeightsOn = "host") -> dict[str, Array]:
        """r, rho, w and c (module docstring of ``offload``) of one GPU batch, of sums over layers: [D], NaN where state takes no time."""
        machine, layers, tokens = self.machine, self.layers, self.batch * self.context

        def total(seconds: Any) -> Any:
            return sum(layer.layers * seconds(layer) for layer in layers)

        kv = total(lambda layer: layer.kv_time(machine, tokens))
        parts = {
            "r": total(lambda layer: layer.act_time(machine, tokens)),
            "rho": total(lambda layer: layer.recompute_time(machine, tokens)),
            "w": total(lambda layer: layer.weight_time(machine)) if weights == "host" else 0.0,
            "c": total(lambda layer: layer.compute_time(machine, tokens)),
        }
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: np.where(kv > 0, part / kv, np.nan) for name, part in parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecomputeSplitBatch:
    """D recompute splits: the fields of ``RecomputeSplitProblem``, where ``machine``, ``layers``, ``context``, ``most`` and
    ``embeddings`` may hold arrays [D]. ``best_splits`` takes one."""

    designs: int
    layers: tuple[OffloadLayer, ...]
    machine: OffloadMachine
    context: Values
    most: Values
    template: SplitTemplate
    chunks: int
    weights: Literal["gpu", "host"]
    batches: int
    embeddings: Values

    lines: ClassVar[Any] = RecomputeSplitProblem.lines
    layer_time: ClassVar[Any] = RecomputeSplitProblem.layer_time
    requests: ClassVar[Any] = RecomputeSplitProblem.requests
    gpu_bytes: ClassVar[Any] = RecomputeSplitProblem.gpu_bytes
    host_bytes: ClassVar[Any] = RecomputeSplitProblem.host_bytes
    gpu_fits: ClassVar[Any] = RecomputeSplitProblem.gpu_fits
    _seconds: ClassVar[Any] = RecomputeSplitProblem._seconds
    _staged_bytes: ClassVar[Any] = RecomputeSplitProblem._staged_bytes
    _kv_bytes: ClassVar[Any] = RecomputeSplitProblem._kv_bytes

    @classmethod
    def build(
        cls,
        designs: OffloadDesigns,
        *,
        template: SplitTemplate = "staged",
        chunks: int = 4,
        weights: Literal["gpu", "host"] = "gpu",
        most: int | None = None,
    ) -> RecomputeSplitBatch:
        """One problem a design, as ``RecomputeSplitProblem.build``; ``most``: where the context is shorter, the context."""
        checked = RecomputeSplitProblem.build(
            designs.systems.base,
            designs.workload,
            profile=designs.profile,
            template=template,
            chunks=chunks,
            weights=weights,
            batches=designs.batches,
        )
        limit = MOST if most is None else whole("recompute split", "most", most, "tokens", least=0)
        return cls(
            designs=len(designs),
            layers=designs.layers,
            machine=designs.machine,
            context=designs.context,
            most=np.minimum(designs.context, limit),
            template=checked.template,
            chunks=checked.chunks,
            weights=checked.weights,
            batches=checked.batches,
            embeddings=embedding_bytes(designs.workload),
        )

    @classmethod
    def of(cls, problems: Sequence[RecomputeSplitProblem]) -> RecomputeSplitBatch:
        """Problems that differ in rates, capacities, batch, context, FLOPs and bytes read; ValueError names what else differs."""
        layers = _classes([problem.layers for problem in problems])
        shared = {name: _shared(problems, name) for name in ("template", "chunks", "weights", "batches")}
        for layer in layers:
            for name in ("layers", "weight_bytes", "kv_bytes", "act_bytes"):
                if np.ndim(getattr(layer, name)):
                    raise ValueError(f"recompute splits of one batch must have the same {name} in a layer; solve the others on their own")
        varied = {name: _stacked([getattr(problem, name) for problem in problems]) for name in ("machine", "context", "most", "embeddings")}
        return cls(designs=len(problems), layers=layers, **shared, **varied)

    def __len__(self) -> int:
        return self.designs

    def some(self, rows: Any) -> RecomputeSplitBatch:
        """The problems at ``rows``: a slice, a mask or indices."""
        return cast(RecomputeSplitBatch, _some(self, rows))

    def __getitem__(self, index: int) -> RecomputeSplitProblem:
        """Problem number ``index``, of coefficients."""
        named = {field.name: cut(getattr(self, field.name), index) for field in fields(self) if field.name != "designs"}
        return RecomputeSplitProblem(**named)

    @property
    def _token_bytes(self) -> Values:
        kv = max(layer.kv_bytes for layer in self.layers)
        return np.where(np.asarray(self.most) > 0, max(kv, self.layers[0].act_bytes), kv)

    @property
    def token_room(self) -> Array:
        """As ``RecomputeSplitProblem.token_room``: tokens whose activations the host has room for, whole numbers, [D] or a number."""
        wanted = np.asarray(self.most * sum(layer.layers for layer in self.layers), dtype=np.float64)
        tokens = (self.machine.host_capacity + 5e-4 - self.host_bytes) / (self.requests * self.layers[0].act_bytes)
        return np.where(tokens >= wanted, wanted, np.floor(tokens))

    def latency(self, splits: ArrayLike) -> Array:
        """Seconds of a step with ``splits`` [C, D], as ``RecomputeSplitProblem.evaluate`` adds them."""
        total = np.zeros(self.designs)
        for index, (layer, split) in enumerate(zip(self.layers, np.asarray(splits), strict=True)):
            total = total + layer.layers * self.layer_time(index, split)
        return total

    def headroom(self, splits: ArrayLike) -> tuple[Array, Array]:
        """Bytes [D] that GPU and host have left beside ``splits`` [C, D]."""
        saved = np.zeros(self.designs)
        for layer, split in zip(self.layers, np.asarray(splits), strict=True):
            saved = saved + layer.layers * split
        host = self.host_bytes + saved * self.requests * self.layers[0].act_bytes
        return self.machine.gpu_capacity - self.gpu_bytes + 0.0 * saved, self.machine.host_capacity - host


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearTimes:
    """Seconds of blocks for D designs: ``LinearTime`` with an array ``slope`` [s/block]."""

    slope: Values
    intercept: float = 0.0

    seconds: ClassVar[Any] = LinearTime.seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RatioLayers:
    """A class of layers for D designs: ``RatioLayer`` with arrays."""

    layers: int
    weights: Values
    compute: Values
    load_kv: LinearTimes
    load_act: LinearTimes
    generate: LinearTimes
    store_kv: Values
    store_act: Values

    times: ClassVar[Any] = RatioLayer.times


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheRatioBatch:
    """D cache ratios: the fields of ``CacheRatioProblem`` with arrays [D], and ``blocks`` of all requests. Bytes and counts are int64.

    Times are in proportion to blocks (no intercepts).
    """

    designs: int
    layers: tuple[RatioLayers, ...]
    blocks: Values
    kv_block: Values
    act_block: Values
    gpu_capacity: Values
    host_capacity: Values
    gpu_held: Values
    host_held: Values

    gpu_room: ClassVar[Any] = CacheRatioProblem.gpu_room
    host_room: ClassVar[Any] = CacheRatioProblem.host_room
    seconds: ClassVar[Any] = CacheRatioProblem.seconds
    kv_gpu_for: ClassVar[Any] = CacheRatioProblem.kv_gpu_for
    fitting: ClassVar[Any] = CacheRatioProblem.fitting

    def __post_init__(self) -> None:
        state = np.max(np.maximum(self.kv_block, self.act_block) * np.asarray(self.blocks, dtype=np.float64), initial=0.0)
        if state >= MOST_BYTES:
            raise ValueError(f"cache ratio: the state of all requests must be below 2**61 bytes, not {state:.3g}; lower batch or context")

    @classmethod
    def build(
        cls,
        designs: OffloadDesigns,
        *,
        block: int = BLOCK,
        weights: WeightsOn = "host",
        buffered_requests: int = STAGED_REQUESTS,
    ) -> CacheRatioBatch:
        """One problem a design, as ``CacheRatioProblem.build`` without measured times; all requests of a design have its context."""
        # What does not depend on the design is checked, and counted in whole bytes, by the problem of the base.
        base = CacheRatioProblem.build(
            designs.systems.base,
            replace(designs.workload, batch=1, context=0),
            profile=designs.profile,
            block=block,
            weights=weights,
            buffered_requests=buffered_requests,
        )
        machine, listed, batches = designs.machine, designs.layers, designs.batches
        requests = designs.batch * batches
        blocks = requests * -(-designs.context // block)
        fresh = requests / np.maximum(blocks, 1)
        layers = []
        for layer in listed:
            compute = np.broadcast_to(layer.compute_time(machine, designs.batch * designs.context), len(designs))
            layers.append(
                RatioLayers(
                    layers=layer.layers,
                    weights=layer.weight_time(machine) if weights == "host" else 0.0,
                    compute=np.repeat(compute[:, None], batches, axis=1).sum(axis=1),
                    load_kv=LinearTimes(slope=layer.kv_time(machine, block)),
                    load_act=LinearTimes(slope=layer.act_time(machine, block)),
                    generate=LinearTimes(slope=layer.recompute_time(machine, block)),
                    store_kv=fresh * layer.kv_bytes / machine.to_host,
                    store_act=fresh * layer.act_bytes / machine.to_host,
                )
            )
        held = held_beside_state(designs.workload, listed, designs.batch, designs.context, weights, buffered_requests)
        return cls(
            designs=len(designs),
            layers=tuple(layers),
            blocks=blocks,
            kv_block=base.kv_block,
            act_block=base.act_block,
            gpu_capacity=_whole_bytes(np.floor(machine.gpu_capacity)),
            host_capacity=_whole_bytes(np.floor(machine.host_capacity)),
            gpu_held=_whole_bytes(np.ceil(held)),
            host_held=base.host_held,
        )

    @classmethod
    def of(cls, problems: Sequence[CacheRatioProblem]) -> CacheRatioBatch:
        """Problems with the same classes of layers, whose times have no intercepts; ValueError otherwise."""
        for problem in problems:
            for layer in problem.layers:
                if layer.load_kv.intercept or layer.load_act.intercept or layer.generate.intercept:
                    raise ValueError("a batch of cache ratios takes times without intercepts; use LpRatio on a problem with measured times")
        layers = _classes([problem.layers for problem in problems])
        if any(np.ndim(layer.layers) for layer in layers):
            raise ValueError("cache ratios of one batch must have the same number of layers in a class; solve the others on their own")
        sizes = ("kv_block", "act_block", "gpu_capacity", "host_capacity", "gpu_held", "host_held")
        return cls(
            designs=len(problems),
            layers=layers,
            blocks=np.array([problem.blocks for problem in problems], dtype=np.int64),
            **{name: np.array([min(getattr(problem, name), MOST_BYTES) for problem in problems], dtype=np.int64) for name in sizes},
        )

    def __len__(self) -> int:
        return self.designs

    def some(self, rows: Any) -> CacheRatioBatch:
        """The problems at ``rows``: a slice, a mask or indices."""
        return cast(CacheRatioBatch, _some(self, rows))

    @property
    def possible(self) -> NDArray[np.bool_]:
        """As ``CacheRatioProblem.possible``, [D]."""
        small = np.minimum(self.kv_block, self.act_block)
        fits = self.blocks <= self.gpu_room // small + self.host_room // small
        return np.broadcast_to((np.minimum(self.gpu_room, self.host_room) >= 0) & fits, self.designs)

    def headroom(self, kv_gpu: Any, act_gpu: Any, kv_host: Any, act_host: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes [D] that GPU and host have left beside the blocks; below 0: so many are lacking."""
        near = kv_gpu * self.kv_block + act_gpu * self.act_block
        return self.gpu_room - near, self.host_room - kv_host * self.kv_block - act_host * self.act_block

    @property
    def ratios(self) -> dict[str, Array]:
        """As ``CacheRatioProblem.ratios``, [D]; NaN where sending keys and values takes no time."""
        kv = sum(layer.layers * layer.load_kv.slope for layer in self.layers)

        def over(field: str, whole: Any) -> Array:
            named = (getattr(layer, field) for layer in self.layers)
            parts = [one.slope if isinstance(one, LinearTimes) else one for one in named]
            part = sum(layer.layers * one for layer, one in zip(self.layers, parts, strict=True))
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(kv * self.blocks > 0, np.divide(part, whole), np.nan)

        return {
            "r": over("load_act", kv),
            "rho": over("generate", kv),
            "w": over("weights", kv * self.blocks),
            "c": over("compute", kv * self.blocks),
        }


@lru_cache(maxsize=4096)
def _layers(workload: Workload, batches: int) -> tuple[OffloadLayer, ...]:
    return offload_layers(workload, batches)


def cut(value: Any, rows: Any) -> Any:
    """``value`` with the ``rows`` of each array [D] in it, also in the fields of a dataclass; one row's values are plain numbers."""
    if isinstance(value, np.ndarray):
        if not value.ndim:
            return value
        return value[rows].item() if isinstance(rows, int) else value[rows]
    if isinstance(value, tuple):
        return tuple(cut(item, rows) for item in value)
    if isinstance(value, (OffloadLayer, OffloadMachine, LinearTimes, RatioLayers)):
        return replace(value, **{field.name: cut(getattr(value, field.name), rows) for field in fields(value)})
    return value


def _some(batch: Any, rows: Any) -> Any:
    number = len(np.arange(batch.designs)[rows])
    return replace(batch, **{field.name: cut(getattr(batch, field.name), rows) for field in fields(batch)} | {"designs": number})


def _stacked(values: list[Any]) -> Any:
    """One value if all are equal; numbers as an array, dataclasses field by field; ValueError for texts that differ."""
    first = values[0]
    arrays = {LinearTime: LinearTimes, RatioLayer: RatioLayers, OffloadLayer: OffloadLayer, OffloadMachine: OffloadMachine}
    if type(first) in arrays:
        columns = {field.name: _stacked([getattr(value, field.name) for value in values]) for field in fields(first)}
        return arrays[type(first)](**columns)
    if all(value is first or value == first for value in values):
        return first
    if isinstance(first, str) or any(value is None for value in values):
        raise ValueError(f"problems of one batch must agree on names and on what is known, not have {first!r} and others; split the batch")
    return np.array(values)


def _classes(listed: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    if not listed or len({len(layers) for layers in listed}) != 1:
        raise ValueError("a batch takes at least one problem, and problems with the same number of classes of layers; split it")
    return tuple(_stacked(list(same)) for same in zip(*listed, strict=True))


def _shared(problems: Sequence[Any], name: str) -> Any:
    values = {getattr(problem, name) for problem in problems}
    if len(values) != 1:
        raise ValueError(f"problems of one batch must have one {name}, not {sorted(map(str, values))}; split the batch")
    return values.pop()


def _whole_bytes(values: ArrayLike) -> Any:
    """Whole numbers of bytes as int64, those that no memory has cut off; a plain number stays one."""
    capped = np.minimum(values, float(MOST_BYTES))
    return capped.astype(np.int64) if capped.ndim else math.floor(capped)
