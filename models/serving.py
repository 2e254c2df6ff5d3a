"""Serving a trace: what an iteration costs under a kernel mapping, and what a policy decides on (``serving_state``: which requests run).

An iteration is one decode step whose attention reads the contexts of all requests together:

    Workload(batch = requests that run, state_tokens = sum of their contexts)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .checks import shown
from .hardware import System
from .kernel_mapping import KernelMappingPlan, KernelMappingProblem, Split, TransitionCost
from .kernel_mapping_tables import Granularity, KernelMappingTables, Kind, Side, lanes_of, sublayers_of
from .llm import LLMConfig
from .migration import Counts, Duplicates, Residency, counts_of, transition_between
from .paging import Directions, Pages, migration_time, page_walk_time, slices_fit
from .profiles import FIRST_PRINCIPLES, Profile
from .roofline import Array
from .serving_state import ServingLimits as ServingLimits
from .serving_state import ServingState as ServingState
from .systems import as_systems
from .trace import Index, Trace
from .units import GB
from .workload import Workload

MOST_STATE = 2.0**50
"""Tokens that a system holds at most, far above any trace: where bits or bytes are next to nothing, a count would leave the integers."""


def check_served(system: object, llm: object) -> None:
    """ValueError unless this is a System and an LLMConfig, which names of presets are not."""
    if not isinstance(system, System):
        raise ValueError(f"serving: the system must be a System, as system_named('h2m2') gives it, not {shown(system)}")
    if not isinstance(llm, LLMConfig):
        raise ValueError(f"serving: the LLM must be an LLMConfig, as llm_named('llama2-70b') gives it, not {shown(llm)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """An LLM served on a system: problems and tables of its iterations. Bits as in ``Workload``, ``granularity`` as in
    ``KernelMappingProblem``."""

    system: System
    llm: LLMConfig
    profile: Profile = FIRST_PRINCIPLES
    granularity: Granularity = "kv_head"
    weight_bits: float = 8
    kv_bits: float = 8
    activation_bits: float = 8
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_served(self.system, self.llm)
        if not isinstance(self.profile, Profile):
            raise ValueError(f"serving: the profile must be a Profile, as FIRST_PRINCIPLES, not {shown(self.profile)}")
        self.workload(1, 1)  # which refuses bits that are none

    def workload(self, batch: int, tokens: int) -> Workload:
        """A decode step of ``batch`` requests that hold ``tokens`` together."""
        return Workload(
            llm=self.llm,
            batch=batch,
            context=max(1, round(tokens / batch)),
            state_tokens=tokens,
            weight_bits=self.weight_bits,
            kv_bits=self.kv_bits,
            activation_bits=self.activation_bits,
        )

    def problem(self, batch: int, tokens: int) -> KernelMappingProblem:
        """Where to put the slices for that step."""
        return KernelMappingProblem.build(self.system, self.workload(batch, tokens), profile=self.profile, granularity=self.granularity)

    def prompt(self, tokens: int) -> Workload:
        """The pass of one prompt through the LLM."""
        return replace(self.workload(1, 1), phase="prefill", context=tokens, state_tokens=None)

    def prefill(self, prompt: int) -> KernelMappingProblem:
        """Where to put the slices for the pass of one prompt of so many tokens; some hundreds are kept."""
        found: KernelMappingProblem | None = self._kept.get(("prefill", prompt))
        if found is None:
            if len(self._kept) > 1024:
                self._kept.clear()
            found = KernelMappingProblem.build(self.system, self.prompt(prompt), profile=self.profile, granularity=self.granularity)
            self._kept[("prefill", prompt)] = found
        return found

    def prefill_time(self, prompt: int, plan: KernelMappingPlan) -> float:
        """Seconds of that pass with weights and state where ``plan`` puts them."""
        return self.prefill(prompt).evaluate(plan).latency

    def prefill_seconds(self, prompt: int) -> Array:
        """Seconds [K, N+1] a layer of that pass with n slices on the first of two memories, inf beyond a kind's slices."""
        key = ("prefill seconds", prompt)
        if key not in self._kept:
            self._kept[key] = self.prefill(prompt).tables.two_way()[0][0]
        seconds: Array = self._kept[key]
        return seconds

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sublayer, which are the same in all steps."""
        if "kinds" not in self._kept:
            self._kept["kinds"] = tuple(kind for kind, _ in sublayers_of(self.workload(1, 1), self.granularity))
        kinds: tuple[Kind, ...] = self._kept["kinds"]
        return kinds

    @property
    def read_only(self) -> tuple[bool, ...]:
        """Of each kind of sublayer, whether it reads weights alone: those can have duplicates."""
        return tuple(not any(kernel.state_bytes for kernel in parts) for _, parts in sublayers_of(self.workload(1, 1), self.granularity))

    def tables(self, batch: ArrayLike, tokens: ArrayLike) -> KernelMappingTables:
        """Tables of D decode steps of ``batch`` [D] requests that hold ``tokens`` [D]; equal to those of the single problems bit for bit.

        Only attention knows the tokens, and only the other sublayers know the batch: the latter are built once a batch, and attention,
        linear in tokens, as an array over all steps.
        """
        held, sizes = np.asarray(tokens, dtype=np.int64), np.asarray(batch, dtype=np.int64)
        if held.shape != sizes.shape or held.ndim != 1 or not len(held) or held.min() < 1 or sizes.min() < 1:
            raise ValueError("tables need a batch and tokens of at least 1 for each of one or more steps; give two lists of one length")
        distinct, which = np.unique(sizes, return_inverse=True)
        bases = [self._base(int(size)) for size in distinct]
        first = bases[0]
        seconds, pages, traffic, shared = (
            np.stack([getattr(base, name)[0] for base in bases])[which] for name in ("seconds", "pages", "traffic", "shared")
        )
        workload = self.workload(int(distinct[0]), 1)
        lanes = lanes_of(as_systems([self.system]))
        common = [lane for lane in lanes if len(lane.tiers) > 1]
        bytes_a_token = np.float64(self.llm.state_elements) * held
        for k, (kind, parts) in enumerate(sublayers_of(workload, self.granularity)):
            if not parts[0].state_bytes:
                continue
            (attention,) = parts
            state_bytes = (bytes_a_token * self.kv_bits / 8)[:, None]
            flops = (self.llm.attention_flops * (held * 1.0))[:, None]
            end = kind.slices + 1
            for t, name in enumerate(first.tier_names):
                unit = Side.of(
                    (replace(attention, state_bytes=1.0, flops=1.0),),
                    slices=kind.slices,
                    llm=self.llm,
                    profile=self.profile,
                    granularity=self.granularity,
                    tier=name,
                    outer=t in (0, len(first.tier_names) - 1),
                )
                side = replace(
                    unit,
                    kernels=(replace(attention, state_bytes=state_bytes),),  # type: ignore[arg-type]  # one number a step
                    state=state_bytes * unit.state,
                    flops=(flops * unit.flops[0],),
                )
                pages[:, k, t, :end] = side.pages(first.page[:, [t]])
                pages[:, k, t, end:] = pages[:, k, t, [kind.slices]]
                traffic[:, k, t, :end] = side.weights + side.state
                time = reduce(np.maximum, [lane.seconds(side, slice(None)) for lane in lanes if lane.tiers == (t,)])
                walks = page_walk_time(pages[:, k, t, :end], self.profile.page_walk, self.profile.page_walks)
                seconds[:, k, t, :end] = time + walks if walks.any() else time
                for s, lane in enumerate(common):
                    if t in lane.tiers:
                        shared[:, k, s, t, :end] = lane.seconds(side, slice(None))
        number = (len(held), 1)
        return KernelMappingTables(
            kinds=first.kinds,
            tier_names=first.tier_names,
            seconds=seconds,
            shared=shared,
            pages=pages,
            traffic=traffic,
            t_sync=first.t_sync,
            capacity=np.tile(first.capacity, number),
            page=np.tile(first.page, number),
        )

    def most_tokens(self) -> int:
        """Tokens whose keys and values fit beside the weights, with one split for all layers of a kind.

        For one and two memories it is exact, slice by slice in whole pages. For more it is what fits when one tier after the
        other is filled, which is at most some slices below the exact number. ValueError if not even one token fits.
        """
        room = sum(tier.capacity for tier in self.system.tiers)
        a_token = self.llm.num_hidden_layers * self.llm.state_elements * self.kv_bits / 8
        low, high = 1, int(min(room / a_token if a_token else MOST_STATE, MOST_STATE)) + 2
        if not _plan_exists(self.tables([1], [1])):
            raise ValueError(f"{self.llm.name} on {self.system.name}: {self.problem(1, 1).explain_infeasible()}")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _plan_exists(self.tables([1], [middle])) else (low, middle)
        return low

    def check(self, trace: Trace, most_tokens: int) -> None:
        """ValueError that names the first request that is larger than the system, or than the positions that the LLM knows."""
        sizes = trace.state_tokens
        for limit, why in (
            (
                most_tokens,
                f"no more than {most_tokens} fit into {self.system.name} beside the weights of {self.llm.name}; enlarge a memory",
            ),
            (self.llm.max_position_embeddings, f"{self.llm.name} knows {self.llm.max_position_embeddings} positions; take another LLM"),
        ):
            large = np.flatnonzero(sizes > (limit or sizes.max()))
            if len(large):
                size = sizes[large[0]]
                raise ValueError(f"trace {trace.name!r}: request {large[0]} holds {size} tokens at its end, and {why} or leave it out")

    def _base(self, batch: int) -> KernelMappingTables:
        found = self._kept.get(("base", batch))
        if found is None:
            workload = self.workload(batch, 1)
            found = KernelMappingTables.build([self.system], workload, profile=self.profile, granularity=self.granularity)
            self._kept[("base", batch)] = found
        return found


@dataclass(slots=True, kw_only=True)
class TableTime:
    """How often the tables of a window were asked for, and the ``seconds`` that it took to build them, once."""

    asked: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepWindow:
    """Some iterations whose batch [D] and tokens [D] are known, priced together; methods take the row of one.

    Their ``tables`` are built when something first asks for them: what a policy decides without them costs it none. ``spent`` says
    whether and how long, so that a replay can charge a policy with the tables that it looked at.
    """

    service: Service
    batch: Index
    tokens: Index
    spent: TableTime = field(default_factory=TableTime, init=False, repr=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, service: Service, batch: ArrayLike, tokens: ArrayLike) -> StepWindow:
        """The window of these iterations."""
        return cls(service=service, batch=np.asarray(batch, dtype=np.int64), tokens=np.asarray(tokens, dtype=np.int64))

    @property
    def tables(self) -> KernelMappingTables:
        """The tables of all its iterations (``Service.tables``)."""
        self.spent.asked += 1
        if "tables" not in self._kept:
            started = time.perf_counter()
            self._kept["tables"] = self.service.tables(self.batch, self.tokens)
            self.spent.seconds = time.perf_counter() - started
            for name in ("seconds", "shared", "pages", "traffic", "capacity", "page"):  # they price the plan of the policy that looks
                getattr(self._kept["tables"], name).setflags(write=False)
        tables: KernelMappingTables = self._kept["tables"]
        return tables

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sublayer."""
        return self.service.kinds

    @property
    def tier_names(self) -> tuple[str, ...]:
        """Names of the tiers, in order."""
        return self.service.system.tier_names

    def once(self, key: Hashable, make: Callable[[KernelMappingTables], Any]) -> Any:
        """``make(tables)``, kept under ``key``: what a policy works out for all iterations of the window at once."""
        tables = self.tables  # asked for also where what was made of them is kept
        if key not in self._kept:
            self._kept[key] = make(tables)
        return self._kept[key]

    def problem(self, row: int) -> KernelMappingProblem:
        """The problem of one iteration."""
        tables = self.tables
        some = {name: getattr(tables, name)[row : row + 1] for name in ("seconds", "shared", "pages", "traffic", "capacity", "page")}
        service = self.service
        return KernelMappingProblem(
            tables=replace(tables, **some),
            system=service.system,
            workload=service.workload(int(self.batch[row]), int(self.tokens[row])),
            profile=service.profile,
            granularity=service.granularity,
        )

    def latency(self, plan: KernelMappingPlan, row: int) -> float:
        """Seconds of the decode step: ``problem(row).evaluate(plan).latency``; ValueError if it is no plan of this problem."""
        counts = self.counts(plan)
        if counts is None:
            return self.problem(row).evaluate(plan).latency
        return float(self._priced(counts)[0][row])

    def held(self, plan: KernelMappingPlan, row: int) -> Pages:
        """Pages [T] on each tier."""
        counts = self.counts(plan)
        if counts is None:
            cost = self.problem(row).evaluate(plan)
            whole_pages: Pages = np.array(cost.tier_bytes, dtype=np.float64).astype(np.int64) // self.tables.page[row]
            return whole_pages
        pages: Pages = self._priced(counts)[1][row]
        return pages

    def transition(self, previous: KernelMappingPlan, plan: KernelMappingPlan, row: int, directions: Directions = "one") -> TransitionCost:
        """``problem(row).transition(previous, plan)``: bytes that change tier, at the tokens of this iteration, and seconds."""
        if previous == plan:
            return TransitionCost(moved={}, latency=0.0)
        before, after = self.counts(previous), self.counts(plan)
        if before is None or after is None:
            found = self.problem(row).transition(previous, plan)
            return replace(found, latency=migration_time(self.service.system, found.moved, directions))
        return transition_between(before, after, self.tables, row, system=self.service.system, directions=directions)

    def plan(self, counts: Sequence[Sequence[int]]) -> KernelMappingPlan:
        """The plan with ``counts[k][t]`` slices in every layer of kind k."""
        rows = zip(self.kinds, counts, strict=True)
        return KernelMappingPlan(splits=tuple((Split(layers=kind.layers, counts=tuple(row)),) for kind, row in rows))

    def counts(self, plan: KernelMappingPlan) -> Counts | None:
        """Slices [K, T] of a plan that splits all layers of a kind alike and is one of this problem; None for others."""
        key = ("counts", plan)
        if key not in self._kept:
            self._kept[key] = counts_of(plan, self.tables)
        counts: Counts | None = self._kept[key]
        return counts

    def _priced(self, counts: Index) -> tuple[Array, Pages]:
        """Seconds [D] and pages [D, T] of a split in all iterations."""
        key, tables = ("priced", counts.tobytes()), self.tables
        if key not in self._kept:
            kinds = np.arange(len(counts))
            seconds, pages = tables.split_seconds(kinds, counts), tables.split_pages(kinds, counts)
            total, held = np.zeros(1), np.zeros(1, dtype=np.int64)
            for k, kind in enumerate(tables.kinds):  # in the order of kinds, as evaluate adds them
                total = total + kind.layers * seconds[:, k]
                held = held + kind.layers * pages[:, k]
            self._kept[key] = total, held
        priced: tuple[Array, Pages] = self._kept[key]
        return priced


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyState:
    """What a policy decides on: the batch, the plan in force (None before the first iteration), and the costs of this iteration.

    ``row`` is this iteration's in ``window``, which may hold later ones: a policy may work out several at once, for speed, but must not
    choose by what is to come. ``longest``: the problem of a full batch of requests as long as the longest one, or of as many tokens as fit,
    for plans that are made once. ``prompts``: the lengths of those that this iteration reads in a prefill, each alone, under its plan.
    ``residency``: where the weights and their duplicates are, if these are kept; ``stayed``: the share of the tokens that ran before, whose
    keys and values are to be moved then. ``directions``: as in ``migration_time``.
    """

    serving: ServingState
    previous: KernelMappingPlan | None
    window: StepWindow
    row: int
    longest: KernelMappingProblem
    prompts: tuple[int, ...] = ()
    residency: Residency | None = None
    directions: Directions = "one"
    stayed: float = 1.0

    @property
    def problem(self) -> KernelMappingProblem:
        """The kernel mapping of this iteration."""
        return self.window.problem(self.row)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of sublayer."""
        return self.window.kinds

    def latency(self, plan: KernelMappingPlan) -> float:
        """Seconds of this iteration's decode step under a plan."""
        return self.window.latency(plan, self.row)

    def prefill(self, plan: KernelMappingPlan) -> float:
        """Seconds of this iteration's prefills under a plan."""
        return sum(self.window.service.prefill_time(prompt, plan) for prompt in self.prompts)

    def prefill_seconds(self) -> Array | None:
        """Seconds [K, N+1] a layer of these prefills with n slices on the first of two memories; None if there are none."""
        found = [self.window.service.prefill_seconds(prompt) for prompt in self.prompts]
        return reduce(np.add, found) if found else None

    def fits(self, plan: KernelMappingPlan) -> bool:
        """Whether a plan overflows no tier in this iteration."""
        return bool(np.all(self.window.held(plan, self.row) <= self.window.tables.capacity[self.row]))

    def transition(self, plan: KernelMappingPlan) -> TransitionCost:
        """What it costs to go from the plan in force to another; nothing before the first iteration."""
        if self.previous is None:
            return TransitionCost(moved={}, latency=0.0)
        if self.residency is not None:
            return self.settled(plan)[1]
        return self.window.transition(self.previous, plan, self.row, self.directions)

    def settled(self, plan: KernelMappingPlan, duplicates: Duplicates = "kept") -> tuple[Residency, TransitionCost]:
        """Where duplicates are kept: what is where once ``plan`` is in force, and what that costs; at the start as ``duplicates`` says."""
        tables, used, service = self.window.tables, self.window.counts(plan), self.window.service
        if used is None:
            raise ValueError("duplicates are kept for plans that split all layers of a kind alike; replay with duplicates='none'")
        if self.residency is None:
            start = Residency.start(used, tables, self.row, read_only=service.read_only, duplicates=duplicates)
            return start, TransitionCost(moved={}, latency=0.0)
        return self.residency.moved_to(used, tables, self.row, system=service.system, directions=self.directions, stayed=self.stayed)

    def explain_overflow(self, plan: KernelMappingPlan) -> str:
        """Which tier holds how much too much."""
        tables, held = self.window.tables, self.window.held(plan, self.row)
        rows = zip(tables.tier_names, held.tolist(), tables.capacity[self.row].tolist(), tables.page[self.row].tolist(), strict=True)
        return ", ".join(
            f"{name} holds {pages * page / GB:.6g} GB of {room * page / GB:.6g} GB" for name, pages, room, page in rows if pages > room
        )


def _plan_exists(tables: KernelMappingTables) -> bool:
    """Whether some grouped plan of one design fits (``slices_fit``)."""
    return slices_fit([kind.layers * tables.pages[0, k, :, : kind.slices + 1] for k, kind in enumerate(tables.kinds)], tables.capacity[0])
