"""The runtime on a CPU with a link emulated at 1 GB/s: measured decode steps against the closed forms and against a replay of their events.

What a step should take is predicted from times of the parts of one layer, measured alone before each run. Other work on the machine only
adds to either, so both are the best of five rounds: of each part, and of the median of a run's steps after the first, whose loads nothing
hides. Values are the per cent that measured over predicted is off by, the larger of closed form and event replay; of blocks, off what
their problem says with measured layers.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from memsplit.dse.runtime import CachePlan, EmulatedLink, LayerTimes, Runtime, SplitKV, TransferKV
from memsplit.models import CacheRatioPlan, CacheRatioProblem, MiniBatchPlan
from memsplit.models.presets import LLMS
from memsplit.models.units import GB

ROUNDS = 5
BATCH = 128
PROMPT = 512
GENERATED = 7
BLOCKS = BATCH * -(-(PROMPT + GENERATED - 1) // 16)
MINI = tuple(tuple(range(first, first + BATCH // 2)) for first in (0, BATCH // 2))


def main() -> list[dict[str, Any]]:
    """The rows of this benchmark; none, said in a row without a target, where PyTorch is missing."""
    # OPT's architecture, so small that a core recomputes a token about as fast as 1 GB/s brings it.
    small = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 512}
    llm = dataclasses.replace(LLMS["opt-125m"], name="opt of 32", num_attention_heads=1, num_key_value_heads=1, head_dim=32, **small)
    plans: dict[str, TransferKV | SplitKV] = {
        "all KV sent": TransferKV(),
        "all KV and weights sent": TransferKV(weights="host"),
        "1/4 recomputed, staged": SplitKV(split=PROMPT // 4),
        "3/8 recomputed, staged": SplitKV(split=3 * PROMPT // 8),
        "3/8 recomputed, 4 chunks": SplitKV(split=3 * PROMPT // 8, template="chunked", chunks=4),
        "3/8 recomputed, weights streamed, 2 batches": SplitKV(split=3 * PROMPT // 8, weights="host", gpu_batches=2),
    }
    try:
        runtime = Runtime(llm, link=EmulatedLink(bandwidth=GB))
    except ValueError as error:
        return [_row(f"runtime: not measured, {error}", 0.0, "", None)]
    steps: dict[str, list[float]] = {name: [] for name in plans}
    parts: dict[int, list[LayerTimes]] = {1: [], 2: []}
    blocks = CachePlan(blocks=CacheRatioPlan(kv_host=3 * BLOCKS // 4, act_host=BLOCKS // 4), mini_batches=MiniBatchPlan(batches=MINI))
    mixed = []
    rates = []
    with runtime:
        prompts = runtime.random_prompts(BATCH, PROMPT)
        for _ in range(ROUNDS):
            for name, plan in plans.items():
                parts[plan.gpu_batches].append(runtime.layer_times(BATCH, PROMPT, gpu_batches=plan.gpu_batches, repeats=5))
                run = runtime.generate(prompts, GENERATED, plan)
                steps[name].append(statistics.median(run.step_seconds[1:]))
                rates.append(run.link_rate or 0.0)
            parts[len(MINI)].append(runtime.layer_times(BATCH, PROMPT, gpu_batches=len(MINI), repeats=5))
            mixed.append(statistics.median(runtime.generate(prompts, GENERATED, blocks).step_seconds[1:]))
    rows = [_row("runtime, emulated link: off 1 GB/s", 100 * abs(statistics.median(rates) / GB - 1), "%", 5.0)]
    for name, plan in plans.items():
        best, context = _best(parts[plan.gpu_batches]), PROMPT + GENERATED // 2
        off = max(abs(min(steps[name]) / predicted - 1) for predicted in (best.step(plan, context), best.replay(plan, context)))
        rows.append(_row(f"runtime, {name}: off prediction", 100 * off, "%", 10.0))
    # Priced token by token: the last block is filled only in part.
    layers, tokens = _best(parts[len(MINI)]).ratio_layers(BATCH // len(MINI), "host", block=1), PROMPT + GENERATED // 2
    room = {"kv_block": 1, "act_block": 1, "gpu_capacity": 1, "host_capacity": BATCH * tokens}
    problem = CacheRatioProblem(layers=layers, request_blocks=(tokens,) * BATCH, **room)
    as_inputs = BATCH * tokens // 4
    priced = problem.evaluate(CacheRatioPlan(kv_host=BATCH * tokens - as_inputs, act_host=as_inputs)).latency
    rows.append(_row("runtime, 1/4 of blocks as inputs, 2 mini-batches: off price", 100 * abs(min(mixed) / priced - 1), "%", 10.0))
    rows.append(_weights_in_parts())
    rows.append(_row("runtime, all KV sent: decode step", 1e3 * min(steps["all KV sent"]), "ms", None))
    saved = 1 - min(min(times) for times in steps.values()) / min(steps["all KV sent"])
    rows.append(_row("runtime, best of these splits: decode step saved", 100 * saved, "%", None))
    return rows


def _weights_in_parts() -> dict[str, Any]:
    """Four GPU batches without a barrier, each of which sends a quarter of the next layer's weights, in an LLM of which these take longer
    than the keys and values: a schedule that sent them all with one batch would let the others wait, and take a third more."""
    llm = dataclasses.replace(LLMS["opt-125m"], name="opt of 4 layers", num_hidden_layers=4, vocab_size=512)
    plan, batch, prompt = TransferKV(weights="host", gpu_batches=4), 96, 8
    parts, steps = [], []
    with Runtime(llm, link=EmulatedLink(bandwidth=GB)) as runtime:
        prompts = runtime.random_prompts(batch, prompt)
        for _ in range(ROUNDS):
            parts.append(runtime.layer_times(batch, prompt, gpu_batches=plan.gpu_batches, weights="host", repeats=5))
            steps.append(statistics.median(runtime.generate(prompts, GENERATED, plan).step_seconds[1:]))
    best, context = _best(parts), prompt + GENERATED // 2
    off = max(abs(min(steps) / predicted - 1) for predicted in (best.step(plan, context), best.replay(plan, context)))
    return _row("runtime, weights streamed in parts, 4 batches: off prediction", 100 * off, "%", 10.0)


def _best(measured: list[LayerTimes]) -> LayerTimes:
    """The least of each part."""
    fields = ("kv", "act", "recompute", "compute", "weights", "first", "outside", "assemble")
    return dataclasses.replace(measured[0], **{field: min(getattr(one, field) for one in measured) for field in fields})


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": None if target is None else value <= target}


if __name__ == "__main__":
    for row in main():
        print(row)
