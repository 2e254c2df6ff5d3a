"""Seconds of dense matrix products and of mixture-of-experts (MoE) layers on a GPU.

A library has a menu of kernels: each computes the product in tiles of bm x bn results, and may split the sum over k among s thread blocks.
Blocks run in waves over the multiprocessors (SMs), and the library takes the fastest kernel. A product of m rows of activations [m, k] with
weights [n, k]:

    blocks   = ceil(m / bm) ceil(n / bn) s
    step     = max(2 bm bn / (rate per SM of this tile), ``step``)                       seconds for each element of k
    tiles    = ceil(blocks / SMs) (k / s x step + 2 bm bn / ``cache``)                   the last term writes the results
    memory   = bytes from memory / (``memory`` x bandwidth) + bytes from the L2 cache / (``cache`` x SMs)
    seconds  = ``launch`` + min over the menu [(tiles^3 + memory^3)^(1/3) + reduction],  reduction = 0 for s = 1, else
               REDUCTION x ``launch`` + 4 (s + 1) m n bytes / (``cache`` x SMs)

``matrix``, in the rate, ``memory``, ``launch``, ``step``, ``cache`` and ``throttle`` are the parameters: long products run at a rate lower
by 1 + throttle, which holds for the power of the measured card (``Calibration.values_on``). All else is fixed by the architecture and
stated with its reason in a constant below. The form is that of tile quantisation and split-K in NVIDIA, "Matrix multiplication background
user's guide", with the soft overlap that measured times have. Weights that stay in the L2 cache between two uses are read from there: a
benchmark that repeats over few ``copies`` of weights has that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .calibration import Parameter, Shapes
from .checks import check_number, shown
from .device import Device
from .roofline import Array

TILES = ((32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 128))
"""Results per thread block (rows of activations, of weights) of cuBLAS's and CUTLASS's kernels for 16-bit tensor cores."""

HOPPER_TILES = (*TILES, (64, 192), (96, 128))
"""Those of Hopper: a warp group multiplies 64 x n for any n up to 256 that 8 divides, so there are tiles between the powers of two."""

SPLITS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Blocks that share one sum over k."""

WEIGHT_ONLY_TILES = ((16, 64), (16, 128), (32, 128), (64, 128), (128, 128), (128, 256))
"""Those of kernels that unpack integer weights (CUTLASS in TensorRT-LLM): down to 16 rows, since they are made for small batches."""

WEIGHT_ONLY_SPLITS = (1, 2, 3, 4, 5, 6, 7)
"""TensorRT-LLM tries no more than seven."""

HOPPER_FP8_ROWS = 128
"""Rows up to which serving engines take CUTLASS's small tiles for fp8 on Hopper; beyond, large ones. They never split the sum over k."""

HOPPER_FP8_TILES = ((32, 64), (64, 64)), ((128, 128),)
"""These tiles, up to that many rows and beyond."""

REDUCTION = 0.7
"""Launches that the kernel which adds up the partial sums of a split takes: it follows another one without a gap. Assumption, from
cross validation on two architectures (0.5 and 0.8 fit best)."""

WEIGHT_ONLY_REDUCTION = 1.0
"""The same with integer weights. Assumption, chosen likewise."""

QUANTISE = 0.7
"""Launches of the kernel that quantises activations to fp8 before the product."""

LOADS = 45e9
"""B/s at which an SM takes in operands of its tiles where every block loads its own: 32 bytes a clock of 1.41 GHz on an A100. Assumption,
from cross validation there. On Hopper, blocks of a cluster share loads, and small tiles reach the rate of large ones."""

SUSTAINED = 1e-3
"""Seconds of multiplication at full rate after which half of ``throttle`` is reached: power is averaged over about a millisecond."""

SHARED_CACHE = 2 / 3
"""Share of the L2 cache at which half of the accesses hit, where it is in two halves that both keep a line used by both
(A100, H100); elsewhere 1."""

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "w8": 1.0, "w4": 0.5}
ACTIVATION_BYTES = {"bf16": 2.0, "fp8": 1.0, "w8": 2.0, "w4": 2.0}

EXPERT_WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "w4": 0.5, "mxfp4": 0.5}
"""Bytes of an element of an expert's weights; scales of blocks are left out."""

EXPERT_ROWS = (16, 32, 64, 128)
"""Rows of a tile in fused MoE kernels (the menu from which vLLM and SGLang choose their configurations)."""

EXPERT_COLUMNS = 128
"""Results per row of such a tile; the split of the others does not change the time in this form."""

CLASSES = 32
"""Classes of equally many experts, from the least to the most used one, for which the sum over experts is taken."""

BUSIEST = 0.8
"""Share of the tokens that the busiest expert has at most under a power law, in the benchmark that records are fitted on."""

_TILE_PARAMETERS = (
    Parameter(name="matrix", unit="", low=0.05, high=1.0, start=0.85, meaning="share of the matrix peak that the largest tile reaches"),
    Parameter(name="memory", unit="", low=0.05, high=1.0, start=0.8, meaning="share of the memory's bandwidth that is reached"),
    Parameter(name="launch", unit="s", low=2e-7, high=1e-3, start=3e-6, meaning="seconds that any product takes"),
    Parameter(name="step", unit="s", low=2e-10, high=3e-8, start=3e-9, meaning="seconds for each element of k in a thread block, at least"),
    Parameter(name="cache", unit="B/s", low=1e9, high=5e11, start=3e10, meaning="bandwidth of the L2 cache for each multiprocessor"),
    Parameter(name="throttle", unit="", low=0.005, high=3.0, start=0.2, meaning="slow-down of long products, at the limit of power"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTime:
    """Seconds of a product [m, k] x [k, n] by the menu of tiles in the module's docstring.

    ``variant``: "bf16" (or fp16), "fp8" (with the kernel that quantises the activations, as serving engines run it), "w8" and "w4" (integer
    weights, products in bf16). ``copies``: different weights that are multiplied in turn between two uses of one, for what stays in the L2
    cache: 6 in the benchmark that records are fitted on; the number of layers in an LLM (inf: nothing stays).
    """

    variant: str = "bf16"
    copies: float = 6.0

    name: ClassVar[str] = "gemm"
    columns: ClassVar[tuple[str, ...]] = ("m", "n", "k")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("n", "k")
    of_power: ClassVar[tuple[str, ...]] = ("throttle",)
    parameters: ClassVar[tuple[Parameter, ...]] = _TILE_PARAMETERS

    def __post_init__(self) -> None:
        if self.variant not in WEIGHT_BYTES:
            raise ValueError(f"gemm: variant must be one of {', '.join(WEIGHT_BYTES)}, not {shown(self.variant)}; choose one of these")
        check_number("gemm", "copies", self.copies, "weights")
        if self.copies < 1:
            raise ValueError(f"gemm: copies must be at least 1 (one weight is used again at once), not {self.copies!r}; give 1 or more")

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes and of the FLOPs at the rates of the data sheet; as many bytes stay in the L2 cache as can."""
        m, n, k = (np.asarray(shapes[name], dtype=np.float64) for name in self.columns)
        nbytes = n * k * WEIGHT_BYTES[self.variant] + m * k * ACTIVATION_BYTES[self.variant] + 2 * m * n
        kept = (device.l2 or 0.0) / self.copies
        return np.maximum(nbytes - kept, 0.0) / device.bandwidth, 2 * m * n * k / self._peak(device)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] that the data sheet rules out to beat."""
        return np.maximum(*self.work(device, shapes))

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N] by the formula of the module."""
        m, n, k = (np.asarray(shapes[name], dtype=np.float64) for name in self.columns)
        cores, launch = device.cores(), values["launch"]
        bandwidth, cache = values["memory"] * device.bandwidth, values["cache"] * cores
        operands = n * k * WEIGHT_BYTES[self.variant] + m * k * ACTIVATION_BYTES[self.variant]
        held = np.multiply(self.copies, operands, out=np.zeros_like(operands), where=operands > 0)  # copies may be inf
        hits = _hits(held, device)
        memory = (operands * (1 - hits) + 2 * m * n) / bandwidth + operands * hits / cache
        ideal = 2 * m * n * k / (values["matrix"] * self._peak(device))
        slower = 1 + values["throttle"] * ideal / (ideal + SUSTAINED)
        reduction = WEIGHT_ONLY_REDUCTION if self.variant in ("w4", "w8") else REDUCTION
        seconds = np.full(m.shape, np.inf)
        for rows, tiles, splits in self._menus(device):
            for split in splits:
                best = np.full(m.shape, np.inf)
                for tile in tiles:
                    blocks = np.ceil(m / tile[0]) * np.ceil(n / tile[1]) * split
                    rate = values["matrix"] * self._peak(device) / cores / slower
                    step = np.maximum(2 * tile[0] * tile[1] / rate * self._loading(device, tile), values["step"])
                    block = k / split * step + 2 * tile[0] * tile[1] / values["cache"]
                    np.minimum(best, np.ceil(blocks / cores) * block, out=best)
                whole = np.cbrt(best**3 + memory**3)
                if split > 1:
                    whole += reduction * launch + 4 * (split + 1) * m * n / cache
                np.minimum(seconds, np.where((rows[0] < m) & (m <= rows[1]), whole, np.inf), out=seconds)
        if self.variant == "fp8":
            # Activations are read in 16 bits for their largest value, again to be divided by it unless they are in the cache, and written.
            seconds = seconds + QUANTISE * launch + (5 - 2 * _hits(2 * m * k, device)) * m * k / bandwidth
        return np.maximum(seconds + launch, self.bound(device, shapes))

    def _peak(self, device: Device) -> float:
        """FLOP/s of the tensor cores in the precision of the products."""
        return device.peak("fp8" if self.variant == "fp8" else "bf16")

    def _menus(self, device: Device) -> tuple[tuple[tuple[float, float], tuple[tuple[int, int], ...], tuple[int, ...]], ...]:
        """Menus of tiles and splits, each with the rows m (above, up to) that it is for."""
        if self.variant in ("w4", "w8"):
            return (((-1.0, np.inf), WEIGHT_ONLY_TILES, WEIGHT_ONLY_SPLITS),)
        if not _clusters(device):
            return (((-1.0, np.inf), TILES, SPLITS),)
        if self.variant == "fp8":
            return tuple(
                (rows, tiles, (1,))
                for rows, tiles in zip(((-1.0, HOPPER_FP8_ROWS), (HOPPER_FP8_ROWS, np.inf)), HOPPER_FP8_TILES, strict=True)
            )
        return (((-1.0, np.inf), HOPPER_TILES, SPLITS),)

    def _loading(self, device: Device, tile: tuple[int, int]) -> float:
        """Seconds of a tile's products and loads, over those of the products, divided by the same of the largest tile.

        Both overlap softly: sqrt(1 + (loads / products)^2), with rows of weights and columns of activations for each element of k.
        """
        if _clusters(device):
            return 1.0
        rate = self._peak(device) / device.cores()
        weights, activations = WEIGHT_BYTES[self.variant], ACTIVATION_BYTES[self.variant]
        load, least = (rate * (weights / rows + activations / columns) / (2 * LOADS) for rows, columns in (tile, (128, 256)))
        return math.sqrt((1 + load**2) / (1 + least**2))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeGemmTime:
    """Seconds of the experts of one MoE layer: two products for ``tokens`` x ``topk`` pairs, routed to ``experts``, and what is between.

        seconds = launch + used expert + traffic pairs (2 hidden + 3 width) 2 bytes / P + product(2 width, hidden) + product(hidden, width)
        product(n, k) = (tiles^3 + weights^3)^(1/3);  weights = used n k bytes / P;  P = memory x bandwidth;  width = inter / tp
        tiles = min over rows r of a tile: ceil(blocks(r) ceil(n / 128) / SMs) k max(2 r 128 / rate of an SM, step)

    ``used``: experts with at least one pair; blocks(r): sum over experts of ceil(pairs of the expert / r). ``dist``: "balanced", or
    "power_law_a": the use of an expert has a density ~ x^-a from 1 to ``BUSIEST`` tokens, and an expert that expects x pairs is used with
    probability 1 - exp(-x). ``inter``: width of a whole expert, of which each of ``tp`` devices has a part. ``variant``: "bf16", "fp8",
    "fp8_block", "w4", "mxfp4"; the libraries' kernels differ by that, so each has its own record.
    """

    variant: str = "bf16"

    name: ClassVar[str] = "moe_gemm"
    columns: ClassVar[tuple[str, ...]] = ("tokens", "hidden", "inter", "topk", "experts", "tp", "dist")
    texts: ClassVar[tuple[str, ...]] = ("dist",)
    counts: ClassVar[tuple[str, ...]] = ("topk", "experts", "tp")
    group: ClassVar[tuple[str, ...]] = ("hidden", "inter", "experts", "tp")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="matrix", unit="", low=0.02, high=1.0, start=0.5, meaning="share of the matrix peak that is reached"),
        Parameter(
            name="memory", unit="", low=0.05, high=1.0, start=0.8, meaning="share of the memory's bandwidth that weights are read at"
        ),
        Parameter(name="launch", unit="s", low=1e-6, high=1e-3, start=2e-5, meaning="seconds that any layer takes: routing and launches"),
        Parameter(
            name="step", unit="s", low=1e-10, high=1e-7, start=3e-9, meaning="seconds for each element of k in a thread block, at least"
        ),
        Parameter(
            name="traffic", unit="", low=0.01, high=30.0, start=1.5, meaning="times that activations between products pass the memory"
        ),
        Parameter(name="expert", unit="s", low=1e-10, high=1e-5, start=1e-7, meaning="seconds for each expert that is used"),
    )

    def __post_init__(self) -> None:
        if self.variant not in EXPERT_WEIGHT_BYTES:
            known = ", ".join(EXPERT_WEIGHT_BYTES)
            raise ValueError(f"moe_gemm: variant must be one of {known}, not {shown(self.variant)}; choose one of these")

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the weights of the experts that are used, and of the FLOPs, at the rates of the data sheet."""
        _, used = _routed(shapes)
        hidden, width = np.asarray(shapes["hidden"], dtype=np.float64), _width(shapes)
        total = np.asarray(shapes["tokens"], dtype=np.float64) * np.asarray(shapes["topk"], dtype=np.float64)
        experts = np.asarray(shapes["experts"], dtype=np.float64) * used.mean(axis=0)
        nbytes = experts * 3 * hidden * width * EXPERT_WEIGHT_BYTES[self.variant]
        # Weights of few small experts stay in the L2 cache when one layer is timed again and again.
        nbytes = np.maximum(nbytes - (device.l2 or 0.0), 0.0)
        return nbytes / device.bandwidth, 6 * total * hidden * width / self._peak(device)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N] that the data sheet rules out to beat: all tokens may choose the same experts, so those of one are read."""
        _, flops = self.work(device, shapes)
        hidden, width = np.asarray(shapes["hidden"], dtype=np.float64), _width(shapes)
        chosen = np.minimum(np.asarray(shapes["topk"], dtype=np.float64), np.asarray(shapes["experts"], dtype=np.float64))
        nbytes = chosen * 3 * hidden * width * EXPERT_WEIGHT_BYTES[self.variant] - (device.l2 or 0.0)
        return np.maximum(np.maximum(nbytes, 0.0) / device.bandwidth, flops)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N] by the formula above."""
        pairs, used = _routed(shapes)
        cores, bandwidth = device.cores(), values["memory"] * device.bandwidth
        rate = values["matrix"] * self._peak(device) / cores
        hidden, width = np.asarray(shapes["hidden"], dtype=np.float64), _width(shapes)
        number = np.asarray(shapes["experts"], dtype=np.float64)
        total = np.asarray(shapes["tokens"], dtype=np.float64) * np.asarray(shapes["topk"], dtype=np.float64)
        experts = number * used.mean(axis=0)
        each = pairs / np.maximum(used, 1e-9)
        blocks = {rows: number * (np.ceil(each * (1 - 1e-12) / rows) * used).mean(axis=0) for rows in EXPERT_ROWS}
        seconds = values["launch"] + values["expert"] * experts + values["traffic"] * total * (2 * hidden + 3 * width) * 2 / bandwidth
        for n, k in ((2 * width, hidden), (hidden, width)):
            tiles = np.full(total.shape, np.inf)
            for rows in EXPERT_ROWS:
                step = max(2 * rows * EXPERT_COLUMNS / rate, values["step"])
                np.minimum(tiles, np.ceil(blocks[rows] * np.ceil(n / EXPERT_COLUMNS) / cores) * k * step, out=tiles)
            weights = experts * n * k * EXPERT_WEIGHT_BYTES[self.variant] / bandwidth
            seconds = seconds + np.cbrt(tiles**3 + weights**3)
        found: Array = np.maximum(seconds, self.bound(device, shapes))
        return found

    def _peak(self, device: Device) -> float:
        """FLOP/s of the tensor cores in the precision of the products."""
        return device.peak("fp8" if self.variant.startswith("fp8") else "bf16")


def _width(shapes: Shapes) -> Array:
    """Columns [N] of an expert on one device."""
    return np.asarray(shapes["inter"], dtype=np.float64) / np.asarray(shapes["tp"], dtype=np.float64)


def _routed(shapes: Shapes) -> tuple[Array, Array]:
    """Pairs of an expert, and the probability that it has any, for each class of experts [CLASSES, N]."""
    tokens, topk, experts = (np.asarray(shapes[name], dtype=np.float64) for name in ("tokens", "topk", "experts"))
    names, places = np.unique(np.asarray(shapes["dist"]).astype(str), return_inverse=True)
    power = np.array([_power(name) for name in names.tolist()])[places.reshape(-1)]
    share = np.ones((CLASSES, *tokens.shape))
    skewed = power > 0
    if skewed.any():
        # Quantiles of the truncated power law, over their mean; a power of exactly 1 is the limit of its neighbours.
        rest = 1 - np.where(power == 1, 1 + 1e-6, power)[skewed]
        most = np.maximum(BUSIEST * np.broadcast_to(tokens, share.shape[1:])[skewed], 1.0)
        middle = ((np.arange(CLASSES) + 0.5) / CLASSES)[:, None]
        use = ((most**rest - 1) * middle + 1) ** (1 / rest)
        share[:, skewed] = use / use.mean(axis=0)
    pairs = np.minimum(share * tokens * topk / np.maximum(experts, 1.0), tokens)
    return pairs, np.where(skewed, -np.expm1(-pairs), np.minimum(pairs, 1.0))


def _power(dist: str) -> float:
    """The exponent of "power_law_a"; 0 for "balanced"."""
    if dist == "balanced":
        return 0.0
    try:
        power = float(dist.removeprefix("power_law_"))
    except ValueError:
        power = math.nan
    if not (dist.startswith("power_law_") and 0 < power < math.inf):
        raise ValueError(f"moe_gemm: dist must be 'balanced' or 'power_law_' and a number above 0, not {shown(dist)}; correct it")
    return power


def _clusters(device: Device) -> bool:
    """Whether thread blocks share what they load."""
    return device.family.startswith(("Hopper", "Blackwell"))


def _hits(nbytes: Array, device: Device) -> Array:
    """Share [N] of accesses to ``nbytes`` used in turn that the L2 cache serves: nearly all or nothing, as cyclic use has it."""
    if not device.l2:
        return np.zeros_like(nbytes)
    share = SHARED_CACHE if device.family in ("Ampere", "Hopper") else 1.0
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + (nbytes / (share * device.l2)) ** 8), dtype=np.float64)
