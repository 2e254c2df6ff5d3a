"""Rates that FlexGen's cost model computes with (arXiv 2303.06865), fitted by its authors on a T4, and the machine they were fitted for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_name, check_number
from .hardware import System
from .presets import SYSTEMS
from .roofline import Array
from .units import GFLOPS, TFLOPS, GiB

BANDWIDTHS = ("to_device", "cache_to_host", "hidden_to_host", "disk_read", "disk_prefill_cache", "disk_prefill_hidden", "disk_decode")
PEAKS = ("gemm_prefill", "gemm_decode", "attention_prefill", "attention_decode", "cpu_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProfile:
    """A calibration record of FlexGen's cost model.

    Bandwidths [B/s]: ``to_device`` host to GPU; ``cache_to_host`` and ``hidden_to_host`` GPU to host, in prefill and in both phases;
    ``disk_read`` disk to host, of which weights in decode reach ``weight_read_share``; ``disk_prefill_cache``, ``disk_prefill_hidden``
    and ``disk_decode`` host to disk.
    Rates [FLOP/s]: ``gemm_*`` of the layer's matrices, ``attention_*`` of attention on the GPU, ``cpu_attention`` on the host.
    The last is slowed by a factor max(0.1, 1 + c1 a b - c2 a - c3 b), a = max(0, log2(64 / GPU batch)), b = max(0, log2(4096 / h)),
    ``cpu_slowdown`` = (c1, c2, c3).
    ``usable``: share of each tier's capacity that a plan may use. ``fitted_on``: the data that the rates were fitted on.
    """

    name: str
    to_device: float
    cache_to_host: float
    hidden_to_host: float
    disk_read: float
    disk_prefill_cache: float
    disk_prefill_hidden: float
    disk_decode: float
    gemm_prefill: float
    gemm_decode: float
    attention_prefill: float
    attention_decode: float
    cpu_attention: float
    weight_read_share: float = 1.0
    cpu_slowdown: tuple[float, float, float] = (0.0, 0.0, 0.0)
    usable: float = 1.0
    fitted_on: str = ""

    def __post_init__(self) -> None:
        check_name("profile", self.name)
        what = f"profile {self.name!r}"
        for field in BANDWIDTHS:
            check_number(what, field, getattr(self, field), "B/s")
        for field in PEAKS:
            check_number(what, field, getattr(self, field), "FLOP/s")
        for field in ("weight_read_share", "usable"):
            check_number(what, field, getattr(self, field), "share", infinite=False)
        if len(self.cpu_slowdown) != 3:
            raise ValueError(f"{what}: cpu_slowdown must be three numbers (c1, c2, c3), not {self.cpu_slowdown!r}; use zeros for none")
        for value in self.cpu_slowdown:
            check_number(what, "cpu_slowdown", value, "1", zero=True, infinite=False)

    def cpu_rate(self, gpu_batch: ArrayLike, hidden_size: int) -> Array:
        """FLOP/s of attention on the host for GPU batches of ``gpu_batch`` requests; the docstring of the class has the formula."""
        both, batch, width = self.cpu_slowdown
        a = np.maximum(0.0, np.log2(64 / np.asarray(gpu_batch, dtype=np.float64)))
        b = max(0.0, math.log2(4096 / hidden_size))
        return self.cpu_attention * np.maximum(0.1, 1 + both * a * b - batch * a - width * b)


FLEXGEN_T4 = PlacementProfile(
    name="flexgen_t4",
    to_device=12.89 * GiB,
    cache_to_host=0.97 * GiB,
    hidden_to_host=4.82 * GiB,
    disk_read=0.473 * GiB,
    disk_prefill_cache=0.746 * GiB,
    disk_prefill_hidden=2.015 * GiB,
    disk_decode=2.015 * GiB,
    gemm_prefill=21.24 * TFLOPS,
    gemm_decode=4.3 * TFLOPS,
    attention_prefill=9.97 * TFLOPS,
    attention_decode=0.079 * TFLOPS,
    cpu_attention=12.3 * GFLOPS,
    weight_read_share=0.95,
    cpu_slowdown=(0.0168, 0.0328, 0.0621),
    usable=0.8,
    fitted_on="FlexGen (arXiv 2303.06865): runs of OPT on a Google Cloud T4, by gradient descent; default constants of its cost model",
)
"""FlexGen's constants for a T4; its gigabytes are 2**30 bytes."""

FLEXGEN_T4_FAST_DISK = replace(FLEXGEN_T4, name="flexgen_t4_fast_disk", disk_read=2.5 * GiB)
"""The same with a disk read at 2.5 x 2**30 B/s, near the 2 GB/s that FlexGen states for its disk: 0.473 cannot reach its 0.69 token/s."""

FLEXGEN_T4_SYSTEM: System = replace(
    SYSTEMS["t4_disk"]
    .with_tier("GDDR6", capacity=15.0 * GiB)
    .with_tier("host", capacity=204.0 * GiB)
    .with_tier("disk", capacity=1500.0 * GiB),
    name="T4, host, disk as in FlexGen's cost model",
)
"""The machine as FlexGen's cost model has it by default: 15, 204 and 1500 times 2**30 bytes. The 16 GB of a T4 are 14.9 of these."""
