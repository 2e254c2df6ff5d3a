"""A whole trace known in advance: which plan to use in each iteration when changing it costs a migration.

    min  sum_i stage_i(p_i) + sum_i migration_i(p_(i-1), p_i)          p_i among the plans that fit in iteration i

``stage_i(p)`` [s] is iteration i under plan p; ``migration_i(p, q)`` [s] goes from p to q before iteration i, priced with the pages of
iteration i. This is a shortest path. ``TableSteps`` has the numbers as tables over any plans. ``SplitSteps`` has them as functions
of the slices that each kind of sublayer puts on the first of two memories (H2M2, arXiv 2504.14893), for all such plans at once:

    stage_i(n) = sum_k seconds_ik(n_k),    inf where a memory overflows
    migration_i(n, m) = time of sum_k up_ik(n_k, m_k) bytes to the first memory, and of sum_k down_ik(n_k, m_k) bytes to the second

The iterations are given: which requests run together must not depend on the plan, or else this is the optimum for that schedule.
Migration is waited for; where it is hidden behind an iteration, only the bound with free moves (``ClairvoyantBound``) holds.

The bytes are those of ``KernelMappingProblem.transition`` and the times those of ``paging.migration_time``: the pages by which a memory
grows, a weighted L1 distance between the slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf, prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import whole
from .hardware import System
from .kernel_mapping import KernelMappingPlan, KernelMappingProblem, Split
from .kernel_mapping_tables import KernelMappingTables, Kind
from .paging import Way
from .roofline import Array

Counts = NDArray[np.int64]
Path = tuple[int, ...]
"""The decision: the number of the plan that each iteration uses."""
Place = NDArray[np.intp] | slice | int


@dataclass(frozen=True, slots=True, kw_only=True)
class PathCost:
    """What a path costs: ``stage`` [s] of all iterations (inf if one does not fit), ``migration`` [s] between them, and how many
    ``moves`` took time. ``misfits``: the iterations whose plan does not fit."""

    stage: float
    migration: float
    moves: int
    misfits: tuple[int, ...] = ()

    @property
    def latency(self) -> float:
        """Seconds of the whole trace."""
        return self.stage + self.migration

    @property
    def fits(self) -> bool:
        """Every iteration's plan fits, and no move is forbidden."""
        return self.latency < inf

    def explain_overflow(self) -> str:
        """Which iterations do not fit; empty if the path can be taken."""
        if self.fits:
            return ""
        return f"the plans of {_listed(self.misfits)} do not fit" if self.misfits else "the path makes a move that is forbidden (inf)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableSteps:
    """Any plans: ``stages`` [I, P] s, inf where a plan does not fit; ``moves`` [P, P] s, [I, P, P] s, or a function of the iteration
    that returns [P, P] s. ``moves[p, q]`` goes from p to q; inf forbids it. Staying takes what the diagonal says."""

    stages: Array
    moves: Array | Callable[[int], Array]

    def __post_init__(self) -> None:
        stages = _seconds("stages", self.stages)
        if stages.ndim != 2 or not stages.size:
            raise ValueError(f"stages must have the shape [iterations, plans], at least one of each, not {stages.shape}")
        object.__setattr__(self, "stages", stages)
        if not callable(self.moves):
            moves = _seconds("moves", self.moves)
            plans, iterations = stages.shape[1], stages.shape[0]
            if moves.shape not in ((plans, plans), (iterations, plans, plans)):
                raise ValueError(f"moves must have the shape [{plans}, {plans}] or [{iterations}, {plans}, {plans}], not {moves.shape}")
            object.__setattr__(self, "moves", moves)

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return int(self.stages.shape[0])

    @property
    def plans(self) -> int:
        """Number of plans."""
        return int(self.stages.shape[1])

    def stage(self, iteration: int) -> Array:
        """Seconds [P] of an iteration under each plan."""
        row: Array = self.stages[iteration]
        return row

    def migration(self, iteration: int) -> Array:
        """Seconds [P, P] to go from one plan to another before an iteration."""
        if callable(self.moves):
            table = _seconds(f"moves before iteration {iteration}", self.moves(iteration))
            if table.shape != (self.plans, self.plans):
                raise ValueError(f"moves before iteration {iteration} must have the shape {(self.plans,) * 2}, not {table.shape}")
            return table
        between: Array = self.moves if self.moves.ndim == 2 else self.moves[iteration]
        return between

    def arrival(self, iteration: int, plan: int) -> Array:
        """Seconds [P] to go from each plan to ``plan`` before an iteration."""
        return self.migration(iteration)[:, plan]

    def along(self, path: Path) -> tuple[Array, Array]:
        """Seconds [I] of the iterations of a path, and [I - 1] of the migrations before all but the first."""
        moved = [self.migration(i)[path[i - 1], path[i]] for i in range(1, len(path))]
        return self.stages[np.arange(len(path)), list(path)], np.array(moved, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitSteps:
    """Plans that put ``counts[k][g]`` slices of kind k on the first of two memories; plan number = place in the product of all counts,
    the last kind fastest.

    Of all layers of a kind: ``seconds[k]`` [I, G_k]; ``first[k]``, ``second[k]`` [I, G_k] B in whole pages, int64. ``room`` [I, 2] B.
    ``up``: the way to the first memory; ``down``: to the second. ``tables``: what all this is from, a design an iteration.
    """

    tables: KernelMappingTables
    counts: tuple[Counts, ...]
    seconds: tuple[Array, ...]
    first: tuple[Counts, ...]
    second: tuple[Counts, ...]
    room: Counts
    up: Way
    down: Way

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return len(self.room)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sublayer."""
        return self.tables.kinds

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of counts of each kind."""
        return tuple(map(len, self.counts))

    @property
    def plans(self) -> int:
        """Number of plans."""
        return prod(self.shape)

    def on(self, counts: Sequence[ArrayLike]) -> SplitSteps:
        """The steps of the plans with these counts only; each must be among this one's."""
        chosen = tuple(np.unique(np.asarray(some, dtype=np.int64)) for some in counts)
        for kind, own, some in zip(self.kinds, self.counts, chosen, strict=True):
            if not np.isin(some, own).all():
                raise ValueError(f"the steps know {len(own)} counts of {kind.name}, and others are asked for; start from all plans")
        places = tuple(np.searchsorted(own, some) for own, some in zip(self.counts, chosen, strict=True))

        def taken(columns: tuple[NDArray[Any], ...]) -> tuple[NDArray[Any], ...]:
            return tuple(column[:, place] for column, place in zip(columns, places, strict=True))

        return replace(self, counts=chosen, seconds=taken(self.seconds), first=taken(self.first), second=taken(self.second))

    def stage(self, iteration: int) -> Array:
        """Seconds [P] of an iteration under each plan, inf where it does not fit."""
        seconds = self._added([column[iteration] for column in self.seconds])
        for columns, room in zip((self.first, self.second), self.room[iteration], strict=True):
            *others, last = (column[iteration] for column in columns)
            held = self._added(others)[..., None] if others else np.zeros(1, dtype=np.int64)
            seconds[held > room - last] = np.inf
        return seconds.ravel()

    def moved(self, iteration: int, kind: int, source: Place, target: Place) -> tuple[Counts, Counts]:
        """Bytes of a kind that go up, and down, from place ``source`` to place ``target`` of its counts, before an iteration."""
        first, second = self.first[kind][iteration], self.second[kind][iteration]
        return np.maximum(first[target] - first[source], 0), np.maximum(second[target] - second[source], 0)

    def arrival(self, iteration: int, plan: int) -> Array:
        """Seconds [P] to go from each plan to ``plan`` before an iteration."""
        place = np.unravel_index(plan, self.shape)
        moved = [self.moved(iteration, k, slice(None), int(place[k])) for k in range(len(self.kinds))]
        up, down = (self._added([both[way] for both in moved]) for way in (0, 1))
        return np.asarray(self.up.seconds(up) + self.down.seconds(down)).ravel()

    def pairs(self, iteration: int, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> Array:
        """Seconds [S, R] to go from each of the plans ``sources`` [S] to each of ``targets`` [R] before an iteration."""
        before, after = np.unravel_index(sources, self.shape), np.unravel_index(targets, self.shape)
        total = np.zeros((2, len(sources), len(targets)), dtype=np.int64)
        for k in range(len(self.kinds)):
            total += self.moved(iteration, k, before[k][:, None], after[k])
        return self.up.seconds(total[0]) + self.down.seconds(total[1])

    def migration(self, iteration: int) -> Array:
        """Seconds [P, P] to go from one plan to another before an iteration; for few plans."""
        return self.pairs(iteration, np.arange(self.plans), np.arange(self.plans))

    def along(self, path: Path) -> tuple[Array, Array]:
        """Seconds [I] of the iterations of a path, and [I - 1] of the migrations before all but the first."""
        places = np.unravel_index(np.array(path), self.shape)
        every = np.arange(self.iterations)
        held = [sum(column[every, place] for column, place in zip(columns, places, strict=True)) for columns in (self.first, self.second)]
        fits = (held[0] <= self.room[:, 0]) & (held[1] <= self.room[:, 1])
        seconds = sum(column[every, place] for column, place in zip(self.seconds, places, strict=True))
        up, down = self.bytes_along(path)
        return np.where(fits, seconds, np.inf), self.up.seconds(up) + self.down.seconds(down)

    def bytes_along(self, path: Path) -> tuple[Counts, Counts]:
        """Bytes [I - 1] that go up, and down, before all iterations of a path but the first."""
        total = np.zeros((2, self.iterations - 1), dtype=np.int64)
        later = np.arange(1, self.iterations)
        for place, first, second in zip(np.unravel_index(np.array(path), self.shape), self.first, self.second, strict=True):
            growth = [column[later, place[1:]] - column[later, place[:-1]] for column in (first, second)]
            total += np.maximum(growth, 0)
        return total[0], total[1]

    def _added(self, terms: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Sums [G_1, ..., G_K] of one term a kind, in the order of the kinds."""
        return reduce(np.add, np.ix_(*terms)) if len(terms) > 1 else terms[0].copy()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClairvoyantProblem:
    """The plans of every iteration of a trace and what lies between them (see the module's docstring).

    ``initial``: the plan before the first iteration; None: the first plan is free.
    """

    steps: TableSteps | SplitSteps
    initial: int | None = None

    def __post_init__(self) -> None:
        if self.initial is not None:
            object.__setattr__(self, "initial", self._plan_number("initial", self.initial))

    @classmethod
    def from_tables(cls, stages: ArrayLike, moves: ArrayLike | Callable[[int], Array], *, initial: int | None = None) -> ClairvoyantProblem:
        """Any plans: seconds of iterations [I, P], and of migrations [P, P], [I, P, P] or a function of the iteration."""
        table = moves if callable(moves) else np.asarray(moves, dtype=np.float64)
        return cls(steps=TableSteps(stages=np.asarray(stages, dtype=np.float64), moves=table), initial=initial)

    @classmethod
    def build(
        cls,
        problems: Sequence[KernelMappingProblem] | KernelMappingTables,
        *,
        beside: Sequence[Sequence[KernelMappingProblem]] | None = None,
        system: System | None = None,
        initial: KernelMappingPlan | None = None,
    ) -> ClairvoyantProblem:
        """All plans of a trace, from the grouped problem over two memories of each iteration (or their tables, a design an iteration).

        ``beside[i]``: what else iteration i runs under the same plan, as the prefills of requests that join; only its seconds count.
        ``system``: the machine whose links the data cross; that of the first problem unless said.
        """
        given = isinstance(problems, KernelMappingTables)
        tables = problems if isinstance(problems, KernelMappingTables) else _stacked(problems)
        machine = system or (None if isinstance(problems, KernelMappingTables) else problems[0].system)
        if machine is None:
            how = "pass system=" if given else "build the problems from one, or pass system="
            raise ValueError(f"the time of a migration needs the links of a system: {how}")
        names = tables.tier_names
        if len(names) != 2:
            raise ValueError(f"this takes two memories, and there are {len(names)}: {list(names)}; list plans with from_tables")
        free = cls(steps=_split_steps(tables if beside is None else _together(tables, beside), machine))
        return free if initial is None else replace(free, initial=free.number(initial))

    @property
    def iterations(self) -> int:
        """Number of iterations."""
        return self.steps.iterations

    @property
    def plans(self) -> int:
        """Number of plans."""
        return self.steps.plans

    def stage(self, iteration: int) -> Array:
        """Seconds [P] of an iteration under each plan; inf where it does not fit."""
        return self.steps.stage(iteration)

    def migration(self, iteration: int) -> Array:
        """Seconds [P, P] to go from one plan to another before an iteration; for few plans."""
        return self.steps.migration(iteration)

    def start(self) -> Array | None:
        """Seconds [P] to go from the initial plan to each plan; None if the first plan is free."""
        if self.initial is None:
            return None
        if isinstance(self.steps, TableSteps):
            departure: Array = self.steps.migration(0)[self.initial]
            return departure
        return self.steps.pairs(0, np.array([self.initial]), np.arange(self.plans))[0]

    def number(self, plan: KernelMappingPlan) -> int:
        """The number of a plan that splits all layers of a kind alike; ValueError for any other."""
        steps = self._split_steps()
        if len(plan.splits) != len(steps.kinds):
            raise ValueError(f"the plan has {len(plan.splits)} kinds of sublayer, the problem {len(steps.kinds)}")
        places = []
        for kind, splits, counts in zip(steps.kinds, plan.splits, steps.counts, strict=True):
            ways = {split.counts for split in splits}
            layers = sum(split.layers for split in splits)
            if layers != kind.layers:
                raise ValueError(f"the plan must split all {kind.layers} layers of {kind.name}, and it splits {layers}")
            if len(ways) != 1:
                raise ValueError(f"the plan must split all {layers} layers of {kind.name} alike, and it has {len(ways)} ways to split them")
            way = next(iter(ways))
            if len(way) != 2 or sum(way) != kind.slices or way[0] not in counts:
                raise ValueError(f"the plan puts {way} slices of {kind.name} on two memories; they must add up to {kind.slices}")
            places.append(int(np.searchsorted(counts, way[0])))
        return int(np.ravel_multi_index(places, steps.shape))

    def path(self, plans: Sequence[KernelMappingPlan]) -> Path:
        """The numbers of the plans that a policy used, one an iteration."""
        numbers = {plan: self.number(plan) for plan in dict.fromkeys(plans)}
        return tuple(numbers[plan] for plan in plans)

    def plan(self, number: int) -> KernelMappingPlan:
        """The plan of a number."""
        steps = self._split_steps()
        places = np.unravel_index(self._plan_number("plan", number), steps.shape)
        firsts = [int(counts[place]) for counts, place in zip(steps.counts, places, strict=True)]
        return KernelMappingPlan(
            splits=tuple((Split(layers=kind.layers, counts=(n, kind.slices - n)),) for kind, n in zip(steps.kinds, firsts, strict=True))
        )

    def evaluate(self, path: Sequence[int]) -> PathCost:
        """Seconds of a path; ValueError if it is none of this problem (one that does not fit is one)."""
        if len(path) != self.iterations:
            raise ValueError(f"the path has {len(path)} plans, and the trace {self.iterations} iterations; give one plan an iteration")
        numbers = tuple(self._plan_number("plan", number) for number in path)
        stages, moves = self.steps.along(numbers)
        start = self.start()
        if start is not None:
            moves = np.concatenate([start[numbers[:1],], moves])
        return PathCost(
            stage=float(stages.sum()),
            migration=float(moves.sum()),
            moves=int(np.count_nonzero(moves)),
            misfits=tuple(np.flatnonzero(np.isinf(stages)).tolist()),
        )

    def explain_infeasible(self) -> str:
        """Why there is no path, in one sentence: the iterations that no plan fits, or the first one that no move reaches."""
        empty = tuple(i for i in range(self.iterations) if not np.isfinite(self.stage(i)).any())
        if empty:
            return f"no plan fits in {_listed(empty)}; admit fewer requests there, or enlarge a memory"
        return "every iteration has a plan that fits, but forbidden moves (inf) cut every path; allow more moves"

    def _split_steps(self) -> SplitSteps:
        if isinstance(self.steps, TableSteps):
            raise ValueError("the plans of this problem are rows of tables and have numbers only; build it from kernel-mapping problems")
        return self.steps

    def _plan_number(self, field: str, number: object) -> int:
        value = whole("clairvoyant problem", field, number, "the number of a plan", least=0)
        if value >= self.plans:
            raise ValueError(f"clairvoyant problem: {field} must be below {self.plans}, the number of plans, not {value}")
        return value


def _split_steps(tables: KernelMappingTables, system: System) -> SplitSteps:
    """All plans of the tables' designs, one an iteration."""
    seconds, pages = tables.two_way()
    first_name, second_name = tables.tier_names
    page = tables.page[:, :, None]
    each = [(k, kind, np.s_[: kind.slices + 1]) for k, kind in enumerate(tables.kinds)]
    return SplitSteps(
        tables=tables,
        counts=tuple(np.arange(kind.slices + 1) for kind in tables.kinds),
        seconds=tuple(kind.layers * seconds[:, k, n] for k, kind, n in each),
        first=tuple(kind.layers * pages[:, k, n, 0] * page[:, 0] for k, kind, n in each),
        second=tuple(kind.layers * pages[:, k, n, 1] * page[:, 1] for k, kind, n in each),
        room=tables.capacity * tables.page,
        up=Way.between(system, second_name, first_name),
        down=Way.between(system, first_name, second_name),
    )


def _stacked(problems: Sequence[KernelMappingProblem]) -> KernelMappingTables:
    """The tables of single problems as one, a design each."""
    if not problems:
        raise ValueError("a clairvoyant problem needs the problem of at least one iteration")
    one = problems[0].tables
    for number, problem in enumerate(problems):
        if not problem.grouped:
            raise ValueError(f"iteration {number}: the problem splits each layer in its own way; build it with grouped=True")
        _check_alike(f"iteration {number}", problem.tables, one)
    arrays = ("seconds", "shared", "pages", "traffic", "capacity", "page")
    changes: dict[str, Any] = {name: np.concatenate([getattr(problem.tables, name) for problem in problems]) for name in arrays}
    return replace(one, **changes)


def _together(tables: KernelMappingTables, beside: Sequence[Sequence[KernelMappingProblem]]) -> KernelMappingTables:
    """Tables with the seconds of all that an iteration runs: as the time of the first memory's side, the other's and barriers being 0."""
    if len(beside) != len(tables.capacity):
        raise ValueError(f"beside has {len(beside)} iterations, and the trace {len(tables.capacity)}; give () where nothing else runs")
    seconds = tables.two_way()[0]
    for number, others in enumerate(beside):
        for other in others:
            _check_alike(f"what runs beside iteration {number}", other.tables, tables)
            seconds[number] += other.tables.two_way()[0][0]
    side = np.stack([seconds, np.where(np.isfinite(seconds), 0.0, np.inf)], axis=2)
    return replace(tables, seconds=side, shared=np.zeros((*side.shape[:2], 0, *side.shape[2:])), t_sync=0.0)


def _check_alike(what: str, tables: KernelMappingTables, one: KernelMappingTables) -> None:
    if tables.kinds != one.kinds or tables.tier_names != one.tier_names or tables.shared.shape[1:] != one.shared.shape[1:]:
        raise ValueError(f"{what} has other kinds of sublayer or memories than iteration 0; use one LLM and one machine")
    if tables.t_sync != one.t_sync:
        raise ValueError(f"{what} has the barrier time {tables.t_sync:g} s and iteration 0 {one.t_sync:g} s; use one profile")


def _seconds(name: str, values: ArrayLike) -> Array:
    """Numbers of at least 0, inf allowed."""
    table = np.asarray(values, dtype=np.float64)
    if np.isnan(table).any() or (table < 0).any():
        raise ValueError(f"{name} must be seconds of at least 0 (inf: not possible), and {int((~(table >= 0)).sum())} are not")
    return table


def _listed(iterations: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, iterations[:3]))
    more = f" and {len(iterations) - 3} more" if len(iterations) > 3 else ""
    return f"iteration{'s' if len(iterations) > 1 else ''} {shown}{more}"
