"""Mini-batches: in which groups the requests of a batch pass through a layer, when the GPU's buffers hold only a few at a time.

Request i needs load_i seconds of the link and gen_i seconds of the GPU in one layer. While mini-batch j is computed, the state of the next
one arrives; the next layer's weights use the link whenever it is free, so they only add to its total:

    T = layers max( sum_j max(alpha_load + load_j, alpha_gen + gen_j),   t_w + sum_j (alpha_load + load_j) )
    load_j, gen_j: sums over the requests of j, of which there are at most ``most_requests``, with at most ``most_blocks`` blocks

Two mini-batches that fit together are never slower as one. Source: HybridServe (arXiv 2501.01792), which packs mini-batches so that
gen_j / load_j is near 1; alpha_load and alpha_gen (what a mini-batch costs at any size) and t_w are added here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cache_ratio import CacheRatioPlan, CacheRatioProblem
from .checks import check_number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchPlan:
    """The decision: the requests of each mini-batch, by number from 0."""

    batches: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        batches = tuple(tuple(whole("mini-batch plan", "batches", i, "requests", least=0) for i in batch) for batch in self.batches)
        if not batches or not all(batches):
            raise ValueError("a mini-batch plan needs at least one mini-batch, and none may be empty")
        object.__setattr__(self, "batches", batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchCost:
    """``latency`` [s] of a step; ``link_time`` and ``gpu_time`` [s] the busy time of both in it, weights included; ``ratios``: gen / load
    of each mini-batch (inf without a load); ``too_large``: what exceeds a limit, in words."""

    latency: float
    link_time: float
    gpu_time: float
    ratios: tuple[float, ...]
    too_large: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """No mini-batch is beyond a limit."""
        return not self.too_large

    def explain_overflow(self) -> str:
        """Which mini-batch is how much too large; empty if the plan fits."""
        return ", ".join(self.too_large)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchProblem:
    """See the module's docstring: ``load``, ``generate`` [s], ``blocks`` of each request; ``weights`` t_w [s] of one of ``layers``."""

    load: tuple[float, ...]
    generate: tuple[float, ...]
    blocks: tuple[int, ...]
    most_requests: int
    most_blocks: int
    alpha_load: float = 0.0
    alpha_generate: float = 0.0
    weights: float = 0.0
    layers: int = 1

    def __post_init__(self) -> None:
        what = "mini-batch problem"
        for field in ("load", "generate"):
            object.__setattr__(self, field, tuple(map(float, getattr(self, field))))
            for seconds in getattr(self, field):
                check_number(what, field, seconds, "s", zero=True, infinite=False)
        object.__setattr__(self, "blocks", tuple(whole(what, "blocks", n, "blocks", least=0) for n in self.blocks))
        for field in ("alpha_load", "alpha_generate", "weights"):
            check_number(what, field, getattr(self, field), "s", zero=True, infinite=False)
        for field, unit in (("most_requests", "requests"), ("most_blocks", "blocks"), ("layers", "layers")):
            object.__setattr__(self, field, whole(what, field, getattr(self, field), unit))
        if not self.load or not len(self.load) == len(self.generate) == len(self.blocks):
            raise ValueError(
                f"a mini-batch problem needs load, generate and blocks of each of one or more requests, not of {len(self.load)}, "
                f"{len(self.generate)} and {len(self.blocks)}"
            )
        largest = max(self.blocks)
        if largest > self.most_blocks:
            raise ValueError(
                f"request {self.blocks.index(largest)} has {largest} blocks, and a mini-batch holds {self.most_blocks} at most; "
                "raise most_blocks, or serve a shorter context"
            )

    @classmethod
    def from_cache_plan(
        cls, problem: CacheRatioProblem, plan: CacheRatioPlan, *, most_requests: int, most_blocks: int | None = None
    ) -> MiniBatchProblem:
        """The requests of a cache ratio problem when each follows the plan's ratio, in whole blocks.

        Blocks on the GPU are given to the requests that come first; the others are on the host, in the host's ratio. All but KV on the
        GPU pass through the buffer (``blocks``); ``most_blocks``: as many as the ``most_requests`` largest requests have unless said. A
        request computes in proportion to its blocks. Several classes of layers are taken as their mean layer, which is never slower than
        they are.
        """
        if plan.blocks != problem.blocks:
            raise ValueError(f"the plan holds {plan.blocks} blocks, the problem has {problem.blocks}: it belongs to another problem")
        _, act_gpu, kv_host, act_host = request_shares(np.array(problem.request_blocks, dtype=np.int64), plan)
        layers = sum(layer.layers for layer in problem.layers)

        def mean(numbers: list[float]) -> float:
            return sum(layer.layers * number for layer, number in zip(problem.layers, numbers, strict=True)) / layers

        kv, act, rate = (mean([getattr(one, field).slope for one in problem.layers]) for field in ("load_kv", "load_act", "generate"))
        compute = mean([layer.compute for layer in problem.layers]) / max(problem.blocks, 1)
        buffered = act_gpu + kv_host + act_host
        if most_blocks is None:
            requests = whole("mini-batch problem", "most_requests", most_requests, "requests")
            most_blocks = max(int(np.sort(buffered)[::-1][:requests].sum()), 1)
        return cls(
            load=tuple((kv * kv_host + act * act_host).tolist()),
            generate=tuple((rate * (act_gpu + act_host) + compute * np.array(problem.request_blocks)).tolist()),
            blocks=tuple(buffered.tolist()),
            most_requests=most_requests,
            most_blocks=most_blocks,
            alpha_load=mean(
                [one.load_kv.intercept * (plan.kv_host > 0) + one.load_act.intercept * (plan.act_host > 0) for one in problem.layers]
            ),
            alpha_generate=mean([one.generate.intercept * (plan.act_gpu + plan.act_host > 0) for one in problem.layers]),
            weights=mean([layer.weights for layer in problem.layers]),
            layers=layers,
        )

    @property
    def requests(self) -> int:
        """Number of requests."""
        return len(self.load)

    @property
    def fewest_batches(self) -> int:
        """Mini-batches that any plan has at least: the requests, and the blocks, by what one holds."""
        return max(-(-self.requests // self.most_requests), -(-sum(self.blocks) // self.most_blocks), 1)

    @property
    def least_latency(self) -> float:
        """Seconds that no plan is below: GPU and link each do all their work, in the fewest mini-batches there can be."""
        n = self.fewest_batches
        load = math.fsum(self.load) + n * self.alpha_load
        return self.layers * max(self.weights + load, math.fsum(self.generate) + n * self.alpha_generate)

    def evaluate(self, plan: MiniBatchPlan) -> MiniBatchCost:
        """What a plan costs; ValueError unless each request is in one mini-batch."""
        if sorted(i for batch in plan.batches for i in batch) != list(range(self.requests)):
            raise ValueError(f"each of the {self.requests} requests must be in exactly one mini-batch; the plan belongs to another problem")
        load = [math.fsum(self.load[i] for i in batch) for batch in plan.batches]
        gen = [math.fsum(self.generate[i] for i in batch) for batch in plan.batches]
        pipeline = math.fsum(max(self.alpha_load + a, self.alpha_generate + b) for a, b in zip(load, gen, strict=True))
        link = self.weights + math.fsum(load) + len(load) * self.alpha_load
        too_large = []
        for j, batch in enumerate(plan.batches):
            held = sum(self.blocks[i] for i in batch)
            if len(batch) > self.most_requests:
                too_large.append(f"mini-batch {j} has {len(batch)} requests of {self.most_requests}")
            if held > self.most_blocks:
                too_large.append(f"mini-batch {j} holds {held} blocks of {self.most_blocks}")
        return MiniBatchCost(
            latency=self.layers * max(pipeline, link),
            link_time=self.layers * link,
            gpu_time=self.layers * (math.fsum(gen) + len(gen) * self.alpha_generate),
            ratios=tuple(b / a if a > 0 else math.inf for a, b in zip(load, gen, strict=True)),
            too_large=tuple(too_large),
        )

    def explain_infeasible(self) -> str:
        """Every problem has a plan, each request alone: what does not fit alone is refused at construction."""
        return "each request fits into a mini-batch alone, so there is a plan; this is a defect of memsplit, please report it"


def request_shares(blocks: NDArray[np.int64], plan: CacheRatioPlan) -> tuple[NDArray[np.int64], ...]:
    """KV and ACT blocks on GPU and host of each request: the GPU's go to requests that come first, forms follow the ratio there."""
    before = np.concatenate([[0], np.cumsum(blocks)])
    near = np.diff(np.minimum(before, plan.kv_gpu + plan.act_gpu))
    far = blocks - near
    near_act, far_act = _in_ratio(near, plan.act_gpu), _in_ratio(far, plan.act_host)
    return near - near_act, near_act, far - far_act, far_act


def _in_ratio(blocks: NDArray[np.int64], chosen: int) -> NDArray[np.int64]:
    """``chosen`` of all ``blocks``, spread in proportion: whole numbers that add up, each within one of its share."""
    total = int(blocks.sum())
    if not total:
        return np.zeros_like(blocks)
    reached = np.concatenate([[0], np.cumsum(blocks)]) * chosen // total
    return np.diff(reached)
