"""Solvers of the cache ratio (``models.cache_ratio``).

Sets        l: classes of N_l equal layers
Variables   kv_gpu, act_gpu, kv_host, act_host: blocks, integer, >= 0;   T_l: seconds of a layer
Objective   min  sum_l N_l T_l
Constraints T_l >= t_w + T_load_kv(kv_host) + T_load_act(act_host)          every l
            T_l >= t_c + T_gen(act_gpu + act_host)                          every l
            T_l >= s_kv kv_host + s_act act_host                            every l
            kv_gpu + act_gpu + kv_host + act_host = blocks
            KV bytes + ACT bytes <= room of the GPU, and of the host

An intercept of a T(n) is paid if n > 0. So there is one program for each case of which of kv_host, act_host and all ACT may be above 0,
and the best case counts; without intercepts there is one case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..models.cache_ratio import CacheRatioPlan, CacheRatioProblem
from ._program import Program, ProgramAnswer, relaxation
from .result import SolverResult, check_settings, finish, unproven

MOST_COMBINATIONS = 50_000_000
"""Pairs of ACT counts on GPU and host that ``EnumerationRatio`` looks at at most: about five seconds."""

AT_ONCE = 1_000_000
"""Pairs that it looks at in one array."""

NEAR = 3
"""Whole numbers on each side of the relaxation's ACT count on the GPU that ``LpRatio`` looks at."""

Case = tuple[bool, bool, bool]
"""Whether kv_host, act_host, and ACT anywhere may be above 0."""

Solve = Callable[[Program, float | None], ProgramAnswer]


@dataclass(frozen=True, slots=True, kw_only=True)
class LpRatio:
    """The linear relaxation, rounded: ACT counts on the GPU near the relaxation's, each with its best whole count on the host.

    The bound is the relaxation's; a plan within ``relative_gap`` of it counts as proven.
    """

    relative_gap: float = 2e-4

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """The best rounded plan, and the relaxation's bound."""
        started = time.perf_counter()
        check_settings(self.relative_gap, None)
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        relaxed = _relaxations(problem)
        plan = _rounded(problem, relaxed)
        return finish(self, problem, plan, started=started, bound=_bound(relaxed), relative_gap=self.relative_gap)


@dataclass(frozen=True, slots=True, kw_only=True)
class MilpRatio:
    """The program of the module's docstring in PuLP, by CBC. ``time_limit`` [s] for all cases together.

    If it comes first, the better of what CBC found and ``LpRatio``'s plan counts.
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0
    seed: int = 0

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """The plan within ``relative_gap`` of the optimum, or the best one found in time."""
        from ._pulp import solve_program

        def run(program: Program, limit: float | None) -> ProgramAnswer:
            return solve_program(program, relative_gap=self.relative_gap, time_limit=limit, seed=self.seed)

        check_settings(self.relative_gap, self.time_limit, seed=self.seed)
        return _integer(self, problem, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSatRatio:
    """The same program in OR-Tools' CP-SAT. ``time_limit`` [s] for all cases together.

    If it comes first, the better of what CP-SAT found and ``LpRatio``'s plan counts.
    """

    relative_gap: float = 1e-5
    time_limit: float | None = 60.0
    threads: int = 1
    seed: int = 0

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """The plan within ``relative_gap`` of the optimum, or the best one found in time."""
        from ._cpsat import solve_program

        def run(program: Program, limit: float | None) -> ProgramAnswer:
            return solve_program(program, relative_gap=self.relative_gap, scale=1.0, time_limit=limit, threads=self.threads, seed=self.seed)

        check_settings(self.relative_gap, self.time_limit, self.threads, seed=self.seed)
        return _integer(self, problem, run)


@dataclass(frozen=True, slots=True)
class EnumerationRatio:
    """The optimum by looking at every ACT count on the GPU and on the host; as many of the other blocks as fit are KV on the GPU, which
    is never slower than on the host."""

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """The optimal plan; its bound is its latency. ValueError for more than 50 million pairs of counts."""
        started = time.perf_counter()
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        most = _most_act(problem)
        pairs = (most + 1) * (problem.blocks + 1)
        if pairs > MOST_COMBINATIONS:
            raise ValueError(
                f"EnumerationRatio looks at {MOST_COMBINATIONS} pairs of counts at most, and this problem has {pairs}; "
                "use MilpRatio, or larger blocks"
            )
        return finish(self, problem, _best_pair(problem, np.arange(most + 1)), started=started, optimal=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridServeRatio:
    """HybridServe's allocation (arXiv 2501.01792), a reconstruction: the paper's text leaves steps open, so it may differ in detail.

    (1) ACT fills the GPU's free memory; (2) if recomputing it is shorter than loading the weights, host ACT fills the difference, else
    host KV does; (3) the rest of the host's budget of bytes is divided so that T_gen(ACT) = T_load(KV); (4) the host's blocks follow
    that ratio. The time of the decode step and of loading ACT is left out.

    ``true_count``: step 3 divides the blocks there are in place of the budget, with the time of loading ACT blocks: our repair.
    """

    true_count: bool = False

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """The plan of the four steps."""
        started = time.perf_counter()
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        first = _most_act(problem)
        rest = problem.blocks - first
        weights, load_kv, load_act, generate = _sums(problem)
        carried = load_act if self.true_count else 0.0  # s/block of link time that an ACT block is charged
        slack = weights - generate * first
        act = kv = 0.0
        if slack > 0:
            act = slack / (generate - carried) if generate > carried else math.inf
        else:
            kv = -slack / load_kv if load_kv > 0 else math.inf
        kv_bytes, act_bytes = problem.kv_block, problem.act_block
        if self.true_count:
            act, kv = min(act, rest), min(kv, rest)
            left = rest - act - kv
            # generate a = load_kv (left - a) + load_act a
            down = generate + load_kv - load_act
            more = min(max(load_kv * left / down, 0.0), left) if down > 0 else left
            act, kv = act + more, kv + left - more
        else:
            room = problem.host_room
            act, kv = min(act, room / act_bytes), min(kv, room / kv_bytes)
            left = room - act * act_bytes - kv * kv_bytes
            # generate a = load_kv k,  act_bytes a + kv_bytes k = left
            if load_kv > 0 and generate > 0:
                k = left / (kv_bytes + act_bytes * load_kv / generate)
                act, kv = act + k * load_kv / generate, kv + k
            elif load_kv > 0:
                act += left / act_bytes
            else:
                kv += left / kv_bytes
        share = act / (act + kv) if act + kv > 0 else 0.0
        return finish(self, problem, _with_host_act(problem, first, round(share * rest)), started=started)


@dataclass(frozen=True, slots=True)
class ActFirstRatio:
    """The GPU full of ACT, whatever that costs, and the best split of the rest on the host (``act_first_is_optimal`` says when it is)."""

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """The best plan with as much ACT on the GPU as fits."""
        started = time.perf_counter()
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        plan = _best_pair(problem, np.array([_most_act(problem)]), beside=False)
        return finish(self, problem, plan, started=started, message="" if plan else _NO_PLAN)


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFormRatio:
    """All blocks in one ``form``, "kv" or "act": as many on the GPU as fit, the others on the host."""

    form: Literal["kv", "act"]

    def solve(self, problem: CacheRatioProblem, /) -> SolverResult[CacheRatioPlan]:
        """That plan, if it fits."""
        started = time.perf_counter()
        if self.form not in ("kv", "act"):
            raise ValueError(f"SingleFormRatio: form must be 'kv' or 'act', not {self.form!r}")
        if not problem.possible:
            return finish(self, problem, None, started=started, infeasible=True)
        size = problem.kv_block if self.form == "kv" else problem.act_block
        near = min(problem.blocks, problem.gpu_room // size)
        far = problem.blocks - near
        plan = CacheRatioPlan(kv_gpu=near, kv_host=far) if self.form == "kv" else CacheRatioPlan(act_gpu=near, act_host=far)
        return finish(self, problem, plan, started=started)


_NO_PLAN = "no plan of the form that this heuristic allows fits; an exact solver may find one"


def _most_act(problem: CacheRatioProblem) -> int:
    """ACT blocks that the GPU can hold."""
    return min(problem.blocks, max(problem.gpu_room, 0) // problem.act_block)


def _sums(problem: CacheRatioProblem) -> tuple[float, float, float, float]:
    """Seconds of the weights, and per block of loading KV, loading ACT and recomputing, of all layers."""
    layers = problem.layers
    return (
        sum(layer.layers * layer.weights for layer in layers),
        sum(layer.layers * layer.load_kv.slope for layer in layers),
        sum(layer.layers * layer.load_act.slope for layer in layers),
        sum(layer.layers * layer.generate.slope for layer in layers),
    )


def _rounded(problem: CacheRatioProblem, relaxed: list[tuple[Case, ProgramAnswer]]) -> CacheRatioPlan | None:
    """The best plan whose ACT count on the GPU is near that of a case's relaxation."""
    most = _most_act(problem)
    centres = {0, most}
    for _, answer in relaxed:
        if answer.values is not None:
            near = int(answer.values[1])
            centres.update(range(near - NEAR, near + NEAR + 2))
    return _best_pair(problem, np.array(sorted(centre for centre in centres if 0 <= centre <= most), dtype=np.int64))


def _best_pair(problem: CacheRatioProblem, act_gpu: NDArray[Any], *, beside: bool = True) -> CacheRatioPlan | None:
    """The fastest plan with one of the ``act_gpu`` counts and any ACT count on the host; None if none fits. ``beside``: KV may fill what
    ACT leaves of the GPU."""
    found = (_best_of(problem, rows, columns, beside) for rows in _slices(act_gpu, problem) for columns in _columns(problem))
    best = min((pair for pair in found if pair is not None), key=lambda pair: pair[0], default=None)
    return None if best is None else best[1]


def _slices(act_gpu: NDArray[Any], problem: CacheRatioProblem) -> Iterator[NDArray[Any]]:
    rows = max(1, AT_ONCE // (problem.blocks + 1))
    return (act_gpu[start : start + rows] for start in range(0, len(act_gpu), rows))


def _columns(problem: CacheRatioProblem) -> Iterator[NDArray[Any]]:
    blocks = problem.blocks
    return (np.arange(start, min(start + AT_ONCE, blocks + 1)) for start in range(0, blocks + 1, AT_ONCE))


def _best_of(problem: CacheRatioProblem, act_gpu: NDArray[Any], host: NDArray[Any], beside: bool) -> tuple[float, CacheRatioPlan] | None:
    first, host = act_gpu[:, None].astype(np.int64), host[None, :]
    kv = problem.kv_gpu_for(first, host) if beside else np.zeros(np.broadcast_shapes(first.shape, host.shape), dtype=np.int64)
    rest = problem.blocks - first - host - kv
    fits = problem.fitting(kv, first, rest, host)
    seconds = np.where(fits, problem.seconds(first, np.maximum(rest, 0), host), np.inf)
    i, j = np.unravel_index(int(seconds.argmin()), seconds.shape)
    if not fits[i, j]:
        return None
    plan = CacheRatioPlan(kv_gpu=int(kv[i, j]), act_gpu=int(first[i, 0]), kv_host=int(rest[i, j]), act_host=int(host[0, j]))
    return float(seconds[i, j]), plan


def _with_host_act(problem: CacheRatioProblem, act_gpu: int, act_host: int) -> CacheRatioPlan:
    """The plan with these ACT counts and KV on the host, moved to as much of the smaller form as the host needs to hold it."""
    rest = problem.blocks - act_gpu
    over = rest * problem.kv_block - act_host * (problem.kv_block - problem.act_block) - problem.host_room
    saved = abs(problem.kv_block - problem.act_block)
    if over > 0 and saved:
        step = -(-over // saved)
        act_host += step if problem.act_block < problem.kv_block else -step
        act_host = min(max(act_host, 0), rest)
    return CacheRatioPlan(act_gpu=act_gpu, act_host=act_host, kv_host=rest - act_host)


def ratio_cases(problem: CacheRatioProblem) -> list[Case]:
    """The cases that intercepts make; those of times without one are allowed at once."""
    choices = [
        (False, True) if any(getattr(layer, field).intercept for layer in problem.layers) else (True,)
        for field in ("load_kv", "load_act", "generate")
    ]
    # ACT on the host is ACT, so (., True, False) is no case; where nothing else is left, it is (., False, False).
    cases = {(kv, act and any_act, any_act) for kv in choices[0] for act in choices[1] for any_act in choices[2]}
    return sorted(case for case in cases if _room(problem, case) >= problem.blocks)


def _room(problem: CacheRatioProblem, case: Case) -> int:
    """Whole blocks that fit at most in a case."""
    kv_host, act_host, any_act = case
    near = max(problem.gpu_room, 0) // (min(problem.kv_block, problem.act_block) if any_act else problem.kv_block)
    sizes = [size for size, allowed in ((problem.kv_block, kv_host), (problem.act_block, act_host)) if allowed]
    return near + (max(problem.host_room, 0) // min(sizes) if sizes else 0)


def ratio_program(problem: CacheRatioProblem, case: Case, unit: float) -> Program:
    """The program of a case with seconds counted in ``unit`` and bytes in their greatest common divisor, which changes nothing."""
    kv_host, act_host, any_act = case
    layers, blocks = problem.layers, problem.blocks
    divisor = math.gcd(problem.kv_block, problem.act_block)
    kv, act = problem.kv_block // divisor, problem.act_block // divisor
    rows, room = [], []
    for index, layer in enumerate(layers):
        own = -(np.arange(len(layers)) == index).astype(np.float64)
        link = layer.weights + kv_host * layer.load_kv.intercept + act_host * layer.load_act.intercept
        gpu = layer.compute + any_act * layer.generate.intercept
        rate = layer.generate.slope
        for fixed, counts in (
            (link, (0.0, 0.0, layer.load_kv.slope, layer.load_act.slope)),
            (gpu, (0.0, rate, 0.0, rate)),
            (0.0, (0.0, 0.0, layer.store_kv, layer.store_act)),
        ):
            rows.append(np.concatenate([np.array(counts) / unit, own]))
            room.append(-fixed / unit)
    times = np.zeros(len(layers))
    rows += [np.concatenate([[kv, act, 0.0, 0.0], times]), np.concatenate([[0.0, 0.0, kv, act], times])]
    room += [float(problem.gpu_room // divisor), float(problem.host_room // divisor)]
    upper = [blocks, blocks * any_act, blocks * kv_host, blocks * act_host]
    return Program(
        cost=np.array([0.0] * 4 + [float(layer.layers) for layer in layers]),
        upper=np.array([float(most) for most in upper] + [math.inf] * len(layers)),
        whole=np.array([True] * 4 + [False] * len(layers)),
        rows=np.array(rows),
        room=np.array(room),
        equal=np.array([[1.0] * 4 + [0.0] * len(layers)]),
        total=np.array([float(blocks)]),
    )


def ratio_unit(problem: CacheRatioProblem) -> float:
    """Seconds of the slowest layer if everything were on the host and were sent and recomputed; 1 if nothing takes time."""
    n = problem.blocks
    return max(max(float(part) for part in layer.times(0, n, n)) for layer in problem.layers) or 1.0


def _relaxations(problem: CacheRatioProblem) -> list[tuple[Case, ProgramAnswer]]:
    """The relaxation of every case that has one, the most promising first; bounds are in seconds."""
    unit = ratio_unit(problem)
    found = []
    for case in ratio_cases(problem):
        answer = relaxation(ratio_program(problem, case, unit))
        if not answer.infeasible:
            bound = None if answer.bound is None else answer.bound * unit
            found.append((case, ProgramAnswer(values=answer.values, bound=bound)))
    return sorted(found, key=lambda pair: -math.inf if pair[1].bound is None else pair[1].bound)


def _bound(relaxed: list[tuple[Case, ProgramAnswer]]) -> float | None:
    bounds = [answer.bound for _, answer in relaxed if answer.bound is not None]
    return min(bounds) if relaxed and len(bounds) == len(relaxed) else None


def _integer(solver: MilpRatio | CpSatRatio, problem: CacheRatioProblem, run: Solve) -> SolverResult[CacheRatioPlan]:
    """The best of the rounded relaxation and every case; a case whose relaxation is no better than the best plan is not looked at."""
    started = time.perf_counter()
    if not problem.possible:
        return finish(solver, problem, None, started=started, infeasible=True)
    relaxations = _relaxations(problem)
    best = _rounded(problem, relaxations)
    latency = math.inf if best is None else problem.evaluate(best).latency
    bounds = []
    for case, relaxed in relaxations:
        least = 0.0 if relaxed.bound is None else relaxed.bound
        left = None if solver.time_limit is None else solver.time_limit - (time.perf_counter() - started)
        if least >= latency or (left is not None and left <= 0):
            bounds.append(least)
            continue
        plan, bound = _solved(problem, case, least, run, left)
        if bound == math.inf:
            continue
        bounds.append(max(least, bound))
        cost = None if plan is None else problem.evaluate(plan)
        if cost is not None and cost.fits and cost.latency < latency:
            best, latency = plan, cost.latency
    proven = min(bounds, default=None)
    return finish(
        solver,
        problem,
        best,
        started=started,
        bound=proven,
        relative_gap=solver.relative_gap,
        message="" if best is None else unproven(latency, proven, solver.relative_gap, solver.time_limit),
    )


def _solved(problem: CacheRatioProblem, case: Case, least: float, run: Solve, left: float | None) -> tuple[CacheRatioPlan | None, float]:
    """The integer program's own plan of a case whose relaxation takes ``least`` seconds, and a bound (inf: there is no plan)."""
    unit = least / sum(layer.layers for layer in problem.layers) or ratio_unit(problem)
    answer = run(ratio_program(problem, case, unit), left)
    if answer.infeasible:
        return None, math.inf
    bound = 0.0 if answer.bound is None else answer.bound * unit
    counts = [0] if answer.values is None else [int(value) for value in answer.values[:4]]
    if sum(counts) != problem.blocks or len(counts) < 4:
        return None, bound
    return CacheRatioPlan(kv_gpu=counts[0], act_gpu=counts[1], kv_host=counts[2], act_host=counts[3]), bound
