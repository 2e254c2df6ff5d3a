"""A policy that decides among few plans in some tens of microseconds, without tables of the iteration.

A plan over two memories is priced from three things. What its weights take depends on the batch alone, and is kept for each batch. What
attention takes is linear in the tokens whose keys and values are read: seconds a token, kept for each plan. Its pages, which decide what
fits, are counted anew from the tokens, as ``Service.tables`` counts them.

    seconds(plan) = weights(batch, plan) + barriers(plan) + layers x max over memories and shared lanes of tokens x seconds a token
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.checks import check_number, whole
from ..models.kernel_mapping import KernelMappingPlan, Split
from ..models.kernel_mapping_tables import Side, sublayers_of
from ..models.paging import Directions, Pages, Way, page_count, page_walk_time
from ..models.roofline import Array
from ..models.serving import PolicyState, Service
from .kernel_mapping import TableMapping
from .policies import NO_PLAN, Hysteresis, Myopic, most_tokens, on_first, present_slices, tables_of_seconds

MOST_BATCHES = 1024
"""Batches whose weights are priced when the list is made, some milliseconds each at most; larger ones when they are first met."""


ROUNDING = 1e-12
"""Plans whose seconds differ by less are equally good: sums in another order differ in the last digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortlist:
    """Of a short list of plans, the one with the least seconds of this iteration + seconds of going there / ``horizon``.

    The optimum changes at few numbers of tokens, so few plans are ever worth having. The list has the optima on a grid made once, before
    the first iteration: batches 1, 2, 4, ... up to the limit, and ``points`` numbers of tokens for each, evenly spaced up to the most that
    the trace can bring; the optimum there fits always. Unlike ``Hysteresis`` it may move a part of the way. All data are priced as in this
    iteration. A horizon of infinity takes the fastest plan of the list. Over two memories; for others it is ``Hysteresis``.

    A prefill is gone after this iteration, so a plan may be taken for it alone: it costs this iteration, the way there, and for the rest of
    the horizon either its own decode steps, or the way to the plan that is best without the prefill, and those. When the first prompt is
    seen, the list also gets the optima of a decode step with a prompt of 1, 4, 16, ... tokens, at every sixteenth point.

    The horizon was chosen on drawn traces (the study policy_frontier): batches change within some iterations, so short ones regret least;
    shorter ones than this are better on most traces and worse than ``Greedy`` on one.

    After the first decision, which makes the list, it asks for no tables of the iteration, unless nothing of the list fits. A prompt of a
    length that was not seen before is priced by its table, which takes longer than the rest of the decision.
    """

    horizon: float = 8.0
    points: int = 256
    _kept: dict[Hashable, PricedPlans] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number("Shortlist", "horizon", self.horizon, "iterations")
        object.__setattr__(self, "points", whole("Shortlist", "points", self.points, "numbers of tokens", least=2))

    def decide(self, state: PolicyState, /) -> KernelMappingPlan:
        """A plan of the list, the one in force if none is better; the optimum of the iteration where none of the list fits."""
        window, row, previous = state.window, state.row, state.previous
        if len(window.tier_names) != 2:
            return Hysteresis(horizon=self.horizon).decide(state)
        listed = self.listed(state)
        seconds, state_bytes = listed.priced(int(window.batch[row]), int(window.tokens[row]))
        score, moving, number = seconds, None, None
        if previous is not None:
            number = listed.number(previous)
            moving = listed.moving_to(state_bytes, state, previous, number)
            score = seconds + moving / self.horizon
        best = _first_least(score, number)
        prefill = state.prefill_seconds()
        if prefill is not None:
            best = self._with_prefill(listed.beside(prefill) + seconds, seconds, moving, listed.moving_back(state_bytes, best), best)
        return listed.plans[best] if seconds[best] < math.inf else Myopic().decide(state)

    def _with_prefill(self, now: Array, seconds: Array, moving: Array | None, back: Array, best: int) -> int:
        """The plan to take where a prefill comes on top: ``now`` [P] s is this iteration with it, ``seconds`` without it, ``moving`` the
        way to each plan, and ``back`` the way from there to ``best``, which is the one to take without the prefill."""
        if self.horizon < math.inf:
            now = min(self.horizon, 1.0) * now
            now = now if moving is None else now + moving
            if self.horizon > 1:
                rest = self.horizon - 1
                now = now + np.minimum(rest * seconds, back + rest * seconds[best])
        return _first_least(now, best)

    def listed(self, state: PolicyState) -> PricedPlans:
        """The list for what is served: made at the first call, and again when the first prompt is seen; then looked up."""
        service, workload = state.window.service, state.longest.workload
        batch, most = 1 if workload is None else workload.batch, most_tokens(state)
        key = (id(service), batch, most)
        found = self._kept.get(key)
        if found is None or (state.prompts and not found.prefill):
            sizes = sorted({*(2**i for i in range(batch.bit_length())), batch})
            tokens = np.unique(np.linspace(1, max(most, 1), self.points).round().astype(np.int64))
            tables = service.tables(np.repeat(sizes, len(tokens)), np.tile(tokens, len(sizes)))
            counts = TableMapping().solve_batch(tables)[1]
            if state.prompts:
                some = np.flatnonzero(np.arange(len(sizes) * len(tokens)) % len(tokens) % 16 == 0)
                decode = tables.two_way()[0][some]
                prompts = [service.prefill_seconds(4**i) for i in range(max(most, 1).bit_length() // 2 + 1)]
                both = tables_of_seconds(tables, np.concatenate([decode + prefill for prefill in prompts]), np.tile(some, len(prompts)))
                counts = np.concatenate([counts, TableMapping().solve_batch(both)[1]])
            counts = np.unique(counts[counts[:, 0, 0] != NO_PLAN], axis=0)
            self._kept.clear()
            found = self._kept[key] = PricedPlans.of(service, counts, prefill=bool(state.prompts))
            found.prepare(range(1, min(batch, MOST_BATCHES) + 1))
        return found


def _first_least(values: Array, rather: int | None) -> int:
    """The place of the least of ``values`` [P]: ``rather`` if it is there, else the first of those that are equal but for rounding."""
    most = values.min() * (1 + ROUNDING)
    return rather if rather is not None and values[rather] <= most else int((values <= most).argmax())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedPlans:
    """P plans over two memories, made ready to be priced for any batch and tokens with few calls of NumPy. ``of`` makes it.

    ``by_identity`` and ``by_value``: the number of each plan. ``counts`` [P, K, 2] slices. ``firsts`` [P, K]: where each stands in
    [K, N+1] seconds by slices on the first memory. ``prefill``: whether the list has the optima of prefills. ``layers`` [K].
    ``attention``: the kind that reads keys and values; ``share`` [2, P] of them on each memory, ``every_share`` [N+1] with n slices, in
    ``tensors`` tensors a layer. ``a_token`` [2, P] s: what a token takes on each memory in all layers; ``shared`` [P] s: on the slowest
    lane that both use (None: there is none). ``sync`` [P] s of barriers. ``weight_bytes`` [2, P, K] in all layers, 0 for attention, and
    ``every_byte`` [K, 2, N+1] with n slices; ``room`` [2, P] B that weights leave. ``page`` [2, 1] B, and ``page_bytes`` [2, 1] B in all
    layers. ``rates`` [2, 1] s/B and ``latencies`` [2, 1] s of the ways up and down. ``service`` is kept so that its id stays its own.
    """

    service: Service
    plans: tuple[KernelMappingPlan, ...]
    by_identity: dict[int, int]
    by_value: dict[KernelMappingPlan, int]
    counts: NDArray[np.int64]
    firsts: NDArray[np.int64]
    prefill: bool
    layers: Array
    attention: int
    share: Array
    every_share: Array
    tensors: int
    a_token: Array
    shared: Array | None
    sync: Array
    weight_bytes: Pages
    every_byte: Pages
    room: Pages
    page: Pages
    page_bytes: Pages
    rates: Array
    latencies: Array
    _seconds: dict[int, Array] = field(default_factory=dict, init=False, repr=False)
    _growth: dict[int, Pages] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, service: Service, counts: NDArray[np.int64], *, prefill: bool) -> PricedPlans:
        """The list of the plans with ``counts`` [P, K, 2] slices."""
        tables = replace(service, profile=replace(service.profile, page_walk=0.0)).tables([1], [1])
        plans = tuple(
            KernelMappingPlan(
                splits=tuple((Split(layers=kind.layers, counts=tuple(split)),) for kind, split in zip(tables.kinds, rows, strict=True))
            )
            for rows in counts.tolist()
        )
        layers = np.array([kind.layers for kind in tables.kinds])
        kinds, ends = len(layers), tables.seconds.shape[3]
        k, kernel = next(
            (k, parts[0]) for k, (_, parts) in enumerate(sublayers_of(service.workload(1, 1), service.granularity)) if parts[0].state_bytes
        )
        on = counts[:, k].T
        shared = [lane[0][on[0]] + lane[1][on[1]] for lane in tables.shared[0, k]]
        every_share = Side.of(
            (kernel,),
            slices=tables.kinds[k].slices,
            llm=service.llm,
            profile=service.profile,
            granularity=service.granularity,
            tier=service.system.tier_names[0],
            outer=True,
        ).shares[0]
        every_byte = (tables.pages[0] * tables.page[0][:, None]) * layers[:, None, None]
        every_byte[k] = 0
        weight_bytes = np.stack([every_byte[np.arange(kinds), t, counts[:, :, t]] for t in range(2)])
        first, second = tables.tier_names
        ways = (Way.between(service.system, second, first), Way.between(service.system, first, second))
        return cls(
            service=service,
            plans=plans,
            by_identity={id(plan): number for number, plan in enumerate(plans)},
            by_value={plan: number for number, plan in enumerate(plans)},
            counts=counts,
            firsts=np.arange(kinds) * ends + counts[:, :, 0],
            prefill=prefill,
            layers=layers.astype(np.float64),
            attention=k,
            share=every_share[on],
            every_share=every_share,
            tensors=kernel.tensors,
            a_token=layers[k] * np.stack([tables.seconds[0, k, t, on[t]] for t in range(2)]),
            shared=layers[k] * np.max(shared, axis=0) if shared else None,
            sync=tables.t_sync * ((counts.min(axis=2) > 0) @ layers),
            weight_bytes=weight_bytes,
            every_byte=every_byte,
            room=(tables.capacity[0] * tables.page[0])[:, None] - weight_bytes.sum(axis=2),
            page=tables.page[0][:, None],
            page_bytes=tables.page[0][:, None] * layers[k],
            rates=np.array([[1 / way.bandwidth] for way in ways]),
            latencies=np.array([[way.latency] for way in ways]),
        )

    def number(self, plan: KernelMappingPlan) -> int | None:
        """The number of a plan; None if it is not listed."""
        found = self.by_identity.get(id(plan))
        return self.by_value.get(plan) if found is None else found

    def prepare(self, batches: Sequence[int]) -> None:
        """Price the weights for these batches; others are priced when they are asked for."""
        tables, total = self.service.tables(batches, np.ones(len(batches))), np.zeros((len(batches), len(self.plans)))
        for k in range(len(self.layers)):
            if k != self.attention:
                first, second = self.counts[:, k].T
                slowest = np.maximum(tables.seconds[:, k, 0, first], tables.seconds[:, k, 1, second])
                for lane in range(tables.shared.shape[2]):
                    np.maximum(slowest, tables.shared[:, k, lane, 0, first] + tables.shared[:, k, lane, 1, second], out=slowest)
                total += self.layers[k] * slowest
        self._seconds.update(zip(batches, total + self.sync, strict=True))

    def priced(self, batch: int, tokens: int) -> tuple[Array, Pages]:
        """Seconds [P] of a decode step of ``batch`` requests that hold ``tokens`` together, inf where a plan does not fit; bytes [2, P] of
        keys and values on each memory."""
        weights = self._seconds.get(batch)
        if weights is None:
            self.prepare([batch])
            weights = self._seconds[batch]
        pages = self._pages(tokens, self.share)
        sides, profile = tokens * self.a_token, self.service.profile
        if profile.page_walk:
            sides = sides + self.layers[self.attention] * page_walk_time(pages, profile.page_walk, profile.page_walks)
        slowest = np.maximum(sides[0], sides[1])
        if self.shared is not None:
            slowest = np.maximum(slowest, tokens * self.shared)
        seconds: Array = weights + slowest
        state_bytes = pages * self.page_bytes
        over = state_bytes > self.room
        seconds[over[0] | over[1]] = math.inf
        return seconds, state_bytes

    def beside(self, seconds: Array) -> Array:
        """Seconds [P] of something that takes ``seconds`` [K, N+1] a layer."""
        total: Array = seconds.ravel().take(self.firsts) @ self.layers
        return total

    def moving_to(self, state_bytes: Pages, state: PolicyState, previous: KernelMappingPlan, number: int | None) -> Array:
        """Seconds [P] to go from ``previous``, of this ``number`` if it is listed, to each plan before the iteration of ``state``."""
        if number is not None and state.residency is None:
            growth = self._growth.get(number)
            if growth is None:
                growth = self._growth[number] = np.maximum(self.weight_bytes - self.weight_bytes[:, [number]], 0).sum(axis=2)
            lacking = np.maximum(state_bytes - state_bytes[:, number, None], 0)
            return self._seconds_of(growth + lacking, state.directions)
        present = present_slices(state, on_first(previous))
        held = self.every_byte[np.arange(len(self.layers)), [[0], [1]], present]
        growth = np.maximum(self.weight_bytes - held[:, None], 0).sum(axis=2)
        tokens, share = int(state.window.tokens[state.row]), self.every_share[present[:, self.attention, None]]
        lacking = np.maximum(state_bytes - self._pages(tokens, share) * self.page_bytes, 0)
        stayed = 1.0 if state.residency is None else state.stayed
        return self._seconds_of(growth + lacking * stayed, state.directions)

    def moving_back(self, state_bytes: Pages, best: int) -> Array:
        """Seconds [P] to go some day from each plan to one."""
        growth = np.maximum(self.weight_bytes[:, [best]] - self.weight_bytes, 0).sum(axis=2)
        return self._seconds_of(growth + np.maximum(state_bytes[:, [best]] - state_bytes, 0), "one")

    def _seconds_of(self, growth: NDArray[Any], directions: Directions) -> Array:
        """Seconds [P] to move ``growth`` [2, P] bytes to the two memories."""
        seconds = growth * self.rates + self.latencies * (growth > 0)
        total: Array = seconds[0] + seconds[1] if directions == "one" else np.maximum(seconds[0], seconds[1])
        return total

    def _pages(self, tokens: int, share: Array) -> Pages:
        """Pages a layer of that ``share`` of the keys and values of ``tokens``, in the arithmetic of ``Service.tables``."""
        nbytes = float(self.service.llm.state_elements) * tokens * self.service.kv_bits / 8
        pages: Pages = self.tensors * page_count(nbytes / self.tensors * share, self.page)
        return pages
