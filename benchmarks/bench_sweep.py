"""Sweeps of the step estimate: designs a second of CPU time of one core, plain and with soft overlap, and one estimate alone.

A decode step of Llama2-70B in sixteen kernels with capacity check, KV, energy and price; all numbers of the machine, batch and context
vary from design to design. "Table to table" is ``StepSweep``: checks of the columns and all result columns too, with USD a token. Each
value is the best of several runs by ``time.process_time``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from memsplit.dse.step_sweep import StepSweep
from memsplit.models import ComputeUnit, MemoryTier, System, Workload
from memsplit.models.estimate import STEP_DATASHEET, StepMachines, StepModel, StepProfile
from memsplit.models.presets import LLAMA2_70B
from memsplit.models.systems import Systems
from memsplit.models.units import GB, TB, TFLOPS

DESIGNS = 200_000
BITS = {"weight_bits": 16, "kv_bits": 16, "activation_bits": 16}
GPU = System(
    name="GPU",
    tiers=(MemoryTier(name="HBM", capacity=320 * GB, bandwidth=8 * TB, energy=31e-12, cost=15 / GB),),
    units=(ComputeUnit(name="GPU", tier="HBM", matrix_peak=1248 * TFLOPS, vector_peak=312 * TFLOPS),),
)
PROFILES = {"plain": (STEP_DATASHEET, 5e6, 2.5e6), "soft overlap p = 3.7": (StepProfile(name="soft", overlap=3.7), 2e6, None)}


def main() -> list[dict[str, Any]]:
    """The rows of this benchmark."""
    rng = np.random.default_rng(0)
    numbers = {
        "HBM_bandwidth_TBps": rng.uniform(1, 16, DESIGNS),
        "HBM_capacity_GB": rng.uniform(100, 600, DESIGNS),
        "HBM_energy_pJ_per_bit": rng.uniform(2, 7, DESIGNS),
        "HBM_cost_USD_per_GB": rng.uniform(5, 20, DESIGNS),
        "GPU_matrix_peak_TFLOPps": rng.uniform(100, 4000, DESIGNS),
        "GPU_vector_peak_TFLOPps": rng.uniform(20, 500, DESIGNS),
    }
    served = {"batch": rng.integers(1, 129, DESIGNS), "context": rng.integers(1, 8193, DESIGNS)}
    machines, one = StepMachines.build(Systems.from_columns(GPU, numbers)), StepMachines.build([GPU])
    workload = Workload(llm=LLAMA2_70B, batch=16, context=2048, **BITS)
    rows = []
    for name, (profile, target, whole) in PROFILES.items():
        model = StepModel.build(LLAMA2_70B, profile=profile, **BITS)
        score = StepSweep(system=GPU, workload=workload, profile=profile)
        work = f"decode estimate, Llama2-70B, {len(model.names)} kernels"
        rate = DESIGNS / _cpu_seconds(lambda model=model: model.estimate(machines, served["batch"], served["context"]), 1)
        rows.append(_row(f"{work}, {name}", rate, "designs/s", target, more=True))
        rate = DESIGNS / _cpu_seconds(lambda score=score: score(numbers | served), 1)
        rows.append(_row(f"{work}, {name}, table to table", rate, "designs/s", whole, more=True))
        alone = _cpu_seconds(lambda model=model: model.estimate(one, 16, 2048), 500) * 1e6
        rows.append(_row(f"{work}, {name}, one through prebuilt objects", alone, "us", 50.0))
    return rows


def _cpu_seconds(work: Callable[[], object], number: int, times: int = 9) -> float:
    """Seconds of CPU time of one call: the best of ``times`` means of ``number`` calls, after one that warms up."""
    work()
    best = float("inf")
    for _ in range(times):
        started = time.process_time()
        for _ in range(number):
            work()
        best = min(best, (time.process_time() - started) / number)
    return best


def _row(name: str, value: float, unit: str, target: float | None, *, more: bool = False) -> dict[str, Any]:
    holds = None if target is None else value >= target if more else value <= target
    return {"name": name, "value": value, "unit": unit, "target": target, "holds": holds}


if __name__ == "__main__":
    for row in main():
        print(row)
