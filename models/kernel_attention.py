"""Kernel models of attention: one decode step over a KV cache, and causal attention of whole prompts.

Both count the work as the kernels deal it out: in tiles (thread blocks), one at a time on a multiprocessor, each of some rows of queries
against blocks of keys. Sizes of tiles and rules of dispatch are those of the published kernels, by the back-end that calls them
(``variant``) and by the architecture; they are not fitted:

- FlashAttention-3 (arXiv 2407.08608) on Hopper, with vLLM and SGLang: the query heads of a KV head share a tile; persistent blocks,
  longest tile first; softmax overlaps with matrix products. Keys are split so that all multiprocessors have a part, by SGLang as the
  library's heuristic says and at most to 128 parts; vLLM, which records steps of up to 512 sequences as graphs, allows for 32 parts and
  always calls the kernel that combines parts.
- FlashAttention-2 (arXiv 2307.08691) elsewhere with vLLM, by its kernel for paged caches with tiles of 64 rows: the fewest parts with
  which waves of two blocks a multiprocessor are 85 % as full as with the best number of parts, and one part without grouped heads. With
  grouped heads and more than one sequence, queries and outputs of a decode step are copied by further kernels.
- TensorRT-LLM's decode: a tile for each KV head of up to 32 query heads; for one or more than 32, a tile for each query head, four of
  which are on a multiprocessor at a time. SGLang's default kernel on Ampere: tiles of up to 32 query heads. Both make as many parts as
  leave one to each multiprocessor. This is simpler than those kernels are, and less accurate than the others here.

Elements have 2 bytes. Constants that stand here and not in a record (sharpness, shares of L2, rows of tiles where the source leaves a
choice) were settled on the published measurements that records are fitted on, once for all devices of an architecture. Head dimensions
above 256 have kernels of their own, which are not modelled: leave such rows out of a fit.

FlashAttention-2's dispatch (no split of MHA, copies for grouped heads) was looked for in the fitted rows after a first score on rows that
are not fitted was poor for A100 and L40S; all other forms were settled before any score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .calibration import Parameter, Shapes
from .checks import shown
from .device import Device
from .roofline import Array
from .units import GB, us

VARIANTS = ("vllm", "sglang", "trtllm")
"""Back-ends whose dispatch is known."""

ELEMENT = 2.0
"""Bytes of a query, key, value or output."""

MOST_PARTS = 128
"""Parts into which FlashAttention splits the keys of a sequence at most."""

L2_SHARES: Mapping[str, float] = {"Ampere": 0.4, "Hopper": 0.68, "Ada": 0.93}
"""Share of L2 up to which data of a repeated kernel stay there. The halves of an A100's L2 each keep what their multiprocessors read."""

OTHER_L2_SHARE = 0.7
"""The same for other architectures: an assumption."""

L2_SHARPNESS = 8.0
"""Of the change from resident to not: the share that is found is 1 / (1 + (bytes / share of L2)^8)."""

TILE_OVERLAP = 1.6
"""Power of the norm of latencies of tiles and the stream of keys in decode: a tile begins while the last one's bytes come."""

SOFT = 4.0
"""Power of the norm of two rates of one stream of bytes: nearly the slower one."""

COMBINED_AT_ONCE = 32.0
"""Parts that the combining kernel adds up in the time of its launch: more take longer in proportion."""

COMBINING_BLOCKS = 8
"""Blocks of the combining kernel on a multiprocessor at a time: 2048 threads by 256."""

COPY_SHARE = 0.7
"""Time of the kernels that copy queries and outputs, as a share of a launch: an assumption in prefill, which has few such rows."""


class _Grid(NamedTuple):
    """How a decode step is dealt out; each [N]. ``tiles``: sequences and KV heads; ``parts`` of each; ``blocks`` of keys in a part."""

    tiles: Array
    parts: Array
    blocks: Array
    block_bytes: Array  # a block of keys and values
    row_bytes: Array  # queries and outputs of a tile, padded to its rows
    combining: Array  # blocks of the combining kernel
    extras: Array  # further small kernels
    visits: Array  # how often the list of sequences is walked
    at_once: Array  # tiles on a multiprocessor whose latencies pass together


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeAttentionTime:
    """Seconds of the attention of one decode step: ``batch`` new tokens, each with ``seq`` keys and values.

        launch + extra (split (1 + parts / 32) + copied + combining blocks / (8 cores)) + sequence batch visits + tile'
        + missed bytes of queries and outputs (1 + 2 copied) / (memory BW) + (((waves - 1) tile')^1.6 + stream^1.6)^(1 / 1.6)
        tile'  = tile + (bytes of one block of keys and values, and of the tile's queries and outputs) / rate
        waves  = ceil(tiles parts / cores)
        stream = ((missed bytes of keys and values / (memory BW))^4 + (waves (blocks - 1) block bytes / rate)^4)^(1 / 4)

    BW, cores: the device's bandwidth and multiprocessors. Tiles, and the parts and whole blocks of keys of each: see the module; a short
    context costs as much as a block. ``split``: 1 with more than one part. Bytes that the last call left in L2 are not missed, unless
    ``resident`` is False: as between other kernels of a model, where measurements that repeat one kernel are too fast.
    """

    variant: str = "vllm"
    resident: bool = True

    name: ClassVar[str] = "decode_attention"
    columns: ClassVar[tuple[str, ...]] = ("batch", "seq", "heads", "kv_heads", "head_dim")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", unit="s", low=0.1 * us, high=200 * us, start=8 * us, meaning="any call"),
        Parameter(
            name="extra", unit="s", low=0.05 * us, high=50 * us, start=3 * us, meaning="one more kernel: combines parts, copies queries"
        ),
        Parameter(name="tile", unit="s", low=0.01 * us, high=50 * us, start=1 * us, meaning="latency of a tile beyond that of its bytes"),
        Parameter(
            name="rate", unit="B/s", low=1 * GB, high=1000 * GB, start=40 * GB, meaning="of one multiprocessor's stream of keys and values"
        ),
        Parameter(name="memory", unit="", low=0.1, high=1.0, start=0.85, meaning="share of the memory's bandwidth that is reached"),
        Parameter(
            name="sequence", unit="s", low=1e-12, high=1 * us, start=5e-9, meaning="to find a sequence of the batch among the others"
        ),
    )

    def __post_init__(self) -> None:
        _check_variant(self.name, self.variant)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]; never below ``bound``."""
        batch, _, _, _, _ = _columns(shapes)
        cores, bandwidth = float(device.cores()), values["memory"] * device.bandwidth
        grid = _decode_grid(self.variant, _hopper(device), cores, shapes)
        cache, rows = _decode_bytes(shapes)
        missed = _missed(device, cache + rows, self.resident)
        block = grid.block_bytes / values["rate"]
        tile = values["tile"] + block + grid.row_bytes / values["rate"]
        waves, delays = (np.ceil(grid.tiles * grid.parts / (cores * at_once)) for at_once in (1.0, grid.at_once))
        stream = _norm(cache * missed / bandwidth, waves * (grid.blocks - 1) * block, SOFT)
        split = np.where(grid.parts > 1, 1 + grid.parts / COMBINED_AT_ONCE, 0.0)
        extras = split + grid.extras + grid.combining / (COMBINING_BLOCKS * cores)
        begin = values["launch"] + values["extra"] * extras + values["sequence"] * batch * grid.visits + tile
        # A copy reads and writes what the kernel itself reads or writes once.
        found = begin + rows * (1 + 2 * grid.extras) * missed / bandwidth + _norm((delays - 1) * tile, stream, TILE_OVERLAP)
        return np.maximum(found, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes that L2 cannot hold, and of 4 batch seq heads head_dim FLOPs, at the rates of the data sheet."""
        batch, seq, heads, _, head_dim = _columns(shapes)
        cache, rows = _decode_bytes(shapes)
        return _beyond_cache(device, cache + rows, self.resident), 4 * batch * seq * heads * head_dim / device.peak("bf16")

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N]: the larger of ``work``."""
        return np.maximum(*self.work(device, shapes))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillAttentionTime:
    """Seconds of causal attention of ``batch`` prompts of ``seq`` tokens each, without a cache before them.

        launch + sequence batch + max(longest tile, waves x mean tile) + ((bytes / (cores load))^4 + (missed bytes / BW)^4)^(1 / 4)
        tile  = tile + blocks (products + softmax)          products = 4 rows keys head_dim cores / (matrix peak)
        waves = ceil(tiles / cores)                         softmax  = rows keys / exponentials

    A tile has ``rows`` queries and goes over the blocks of ``keys`` up to its diagonal: whole blocks, about half of a square. There is one
    exponential for 4 head_dim FLOPs, so that softmax is a larger share of small heads; FlashAttention-3 overlaps it with products (norm of
    power 2 in place of the sum), and begins with the longest tiles (norm of power 6 for the maximum, 2 where tiles begin in order).
    Bytes: queries and outputs, and keys and values twice, as they go through a paged cache; a tile's do not overlap with its products.
    ``resident`` is that of ``DecodeAttentionTime``. Back-ends are taken to prefill alike, with FlashAttention-3 on Hopper and
    FlashAttention-2's kernel for paged caches elsewhere: only those of vLLM were measured.
    """

    variant: str = "vllm"
    resident: bool = True

    name: ClassVar[str] = "prefill_attention"
    columns: ClassVar[tuple[str, ...]] = ("batch", "seq", "heads", "kv_heads", "head_dim")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="launch", unit="s", low=0.1 * us, high=200 * us, start=8 * us, meaning="any call"),
        Parameter(name="tile", unit="s", low=0.01 * us, high=50 * us, start=1 * us, meaning="latency of a tile"),
        Parameter(name="matrix", unit="", low=0.1, high=1.0, start=0.7, meaning="share of the matrix peak that products reach"),
        Parameter(name="exponentials", unit="1/s", low=1e9, high=1e12, start=2e10, meaning="softmax entries of one multiprocessor"),
        Parameter(name="load", unit="B/s", low=1 * GB, high=1000 * GB, start=15 * GB, meaning="one multiprocessor's, between tiles"),
        Parameter(
            name="sequence", unit="s", low=1e-12, high=1 * us, start=5e-9, meaning="to find a sequence of the batch among the others"
        ),
    )

    def __post_init__(self) -> None:
        _check_variant(self.name, self.variant)

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]; never below ``bound``."""
        batch, seq, heads, kv_heads, head_dim = _columns(shapes)
        cores, hopper = float(device.cores()), _hopper(device)
        rows, keys, tiles, blocks, copied = _prefill_tiles(hopper, shapes)
        products = 4 * rows * keys * head_dim * cores / (values["matrix"] * device.peak("bf16"))
        block = _norm(products, rows * keys / values["exponentials"], 2.0 if hopper else 1.0)
        longest = values["tile"] + np.ceil(seq / keys) * block
        together = np.ceil(tiles / cores) * (values["tile"] + blocks * block)
        nbytes = 2 * ELEMENT * batch * seq * (heads + 2 * kv_heads) * head_dim
        stream = _norm(nbytes / (cores * values["load"]), nbytes * _missed(device, nbytes, self.resident) / device.bandwidth, SOFT)
        begin = values["launch"] * (1 + COPY_SHARE * copied) + values["sequence"] * batch
        found = begin + _norm(longest, together, 6.0 if hopper else 2.0) + stream
        return np.maximum(found, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes that L2 cannot hold, keys and values once, and of the FLOPs up to the diagonal, by the data sheet."""
        batch, seq, heads, kv_heads, head_dim = _columns(shapes)
        nbytes = 2 * ELEMENT * batch * seq * (heads + kv_heads) * head_dim
        flops = 2 * batch * seq * (seq + 1) * heads * head_dim
        return _beyond_cache(device, nbytes, self.resident), flops / device.peak("bf16")

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """Seconds [N]: the larger of ``work``."""
        return np.maximum(*self.work(device, shapes))


def fewest_parts(tiles: Array, slots: float, blocks: Array, *, even: bool) -> Array:
    """Parts [N] into which FlashAttention's heuristic splits ``blocks`` [N] of keys when ``tiles`` [N] share ``slots`` thread blocks.

    1 if the tiles fill 80 % of the slots; otherwise the fewest whose waves are 85 % as full as the fullest,

        full(parts) = w / ceil(w),  w = tiles parts / slots

    ``even``: without numbers of parts that leave the same longest part as a smaller number (FlashAttention-2). After
    num_splits_heuristic of the FlashAttention repository.
    """
    parts = np.ones_like(tiles)
    open_ = np.flatnonzero((tiles < 0.8 * slots) & (blocks > 1))
    if not len(open_):
        return parts
    # Rows repeat few pairs: the menu is searched once for each.
    pairs, place = np.unique(np.stack([tiles[open_], blocks[open_]]), axis=1, return_inverse=True)
    tile, block = pairs
    menu = np.arange(1.0, MOST_PARTS + 1)[:, None]
    allowed = menu <= np.minimum(slots, block)
    if even:
        allowed &= (menu == 1) | (np.ceil(block / menu) != np.ceil(block / np.maximum(menu - 1, 1)))
    waves = tile * menu / slots
    full = np.where(allowed, waves / np.maximum(np.ceil(waves), 1.0), 0.0)
    parts[open_] = (1.0 + np.argmax(full >= 0.85 * full.max(axis=0), axis=0))[place.reshape(-1)]
    return parts


def _decode_grid(variant: str, hopper: bool, cores: float, shapes: Shapes) -> _Grid:
    deal: Callable[[float, Shapes], _Grid] = _deal_masked
    if variant == "vllm":
        deal = _deal_graphs if hopper else _deal_paged
    elif variant == "sglang":
        deal = _deal_heuristic if hopper else _deal_one_wave
    grid = deal(cores, shapes)
    whole = np.ceil(grid.blocks / grid.parts)
    # Parts that got no block are none.
    return grid._replace(parts=np.ceil(grid.blocks / whole), blocks=whole)


def _deal_graphs(cores: float, shapes: Shapes) -> _Grid:
    """vLLM with FlashAttention-3: parts by the keys of the batch, and the combining kernel, for up to 512 sequences; else neither."""
    batch, seq, heads, kv_heads, head_dim = _columns(shapes)
    grouped = heads / kv_heads
    rows, keys = np.where(head_dim <= 64, 192.0, 128.0), _hopper_keys(head_dim)
    tiles, blocks = batch * kv_heads * np.ceil(grouped / rows), _blocks(seq, keys)
    recorded = batch <= 512
    parts = np.where(recorded, np.minimum(_parts_by_keys(tiles, blocks, cores), 32.0), 1.0)
    combining = np.where(recorded, _combining(shapes), 0.0)
    return _grid(shapes, rows, keys, tiles, parts, blocks, combining=combining, visits=np.where(recorded, 2.0, 1.0))


def _deal_heuristic(cores: float, shapes: Shapes) -> _Grid:
    """SGLang with FlashAttention-3: by the heuristic, not for four blocks or fewer, and no more than the keys of the batch ask for."""
    batch, seq, heads, kv_heads, head_dim = _columns(shapes)
    grouped = heads / kv_heads
    keys = _hopper_keys(head_dim)
    # One group of warps suffices for up to 64 rows of heads of 128; the larger tile is 128 rows.
    rows = np.where(head_dim <= 64, 192.0, np.where((head_dim <= 128) & (grouped <= 64), 64.0, 128.0))
    tiles, blocks = batch * kv_heads * np.ceil(grouped / rows), _blocks(seq, keys)
    most = np.where(blocks <= 4, 1.0, fewest_parts(tiles, cores, blocks, even=False))
    parts = np.minimum(_parts_by_keys(tiles, blocks, cores), most)
    split: NDArray[np.bool_] = most > 1
    return _grid(
        shapes, rows, keys, tiles, parts, blocks, combining=np.where(split, _combining(shapes), 0.0), visits=np.where(split, 2.0, 1.0)
    )


def _deal_paged(cores: float, shapes: Shapes) -> _Grid:
    """vLLM with FlashAttention-2: by the heuristic for two blocks a multiprocessor; queries in groups are copied to be rows of a tile.

    Without groups, the keys are not split.
    """
    batch, seq, heads, kv_heads, head_dim = _columns(shapes)
    grouped, keys = heads / kv_heads, _paged_keys(head_dim)
    tiles, blocks = batch * kv_heads * np.ceil(grouped / 64), _blocks(seq, keys)
    parts = np.where(grouped > 1, fewest_parts(tiles, 2 * cores, blocks, even=True), 1.0)
    return _grid(shapes, 0.0, keys, tiles, parts, blocks, combining=np.where(parts > 1, _combining(shapes), 0.0), extras=_copied(shapes))


def _deal_one_wave(cores: float, shapes: Shapes) -> _Grid:
    """SGLang elsewhere: blocks of 64 keys, tiles of up to 32 query heads, and as many parts as leave one to a multiprocessor."""
    batch, seq, heads, kv_heads, _ = _columns(shapes)
    tiles, blocks = batch * kv_heads * np.ceil(heads / kv_heads / 32), _blocks(seq, 64.0)
    return _grid(shapes, 0.0, 64.0, tiles, _parts_of_one_wave(tiles, blocks, cores), blocks)


def _deal_masked(cores: float, shapes: Shapes) -> _Grid:
    """TensorRT-LLM: blocks of 128 keys; groups of 2 to 32 query heads share a tile, other heads have their own, which are light."""
    batch, seq, heads, kv_heads, _ = _columns(shapes)
    alone = (heads <= kv_heads) | (heads > 32 * kv_heads)
    tiles, blocks = batch * np.where(alone, heads, kv_heads), _blocks(seq, 128.0)
    return _grid(shapes, 0.0, 128.0, tiles, _parts_of_one_wave(tiles, blocks, cores), blocks, at_once=np.where(alone, 4.0, 1.0))


def _grid(
    shapes: Shapes,
    rows: Array | float,
    keys: Array | float,
    tiles: Array,
    parts: Array,
    blocks: Array,
    *,
    combining: Array | float = 0.0,
    extras: Array | float = 0.0,
    visits: Array | float = 1.0,
    at_once: Array | float = 1.0,
) -> _Grid:
    token = 2 * ELEMENT * np.asarray(shapes["head_dim"], dtype=np.float64)
    more = (np.asarray(one, dtype=np.float64) for one in (combining, extras, visits, at_once))
    return _Grid(tiles, parts, blocks, keys * token, rows * token, *more)


def _prefill_tiles(hopper: bool, shapes: Shapes) -> tuple[Array, Array, Array, Array, Array]:
    """Rows and keys of a tile, tiles, mean number of blocks of a tile, and 1 where queries are copied: [N] each."""
    batch, seq, heads, kv_heads, head_dim = _columns(shapes)
    grouped = heads / kv_heads
    if hopper:
        rows, keys = np.where(head_dim <= 64, 192.0, 128.0), _hopper_keys(head_dim)
        each, copied, tokens = np.maximum(np.ceil(seq * grouped / rows), 1), np.zeros_like(seq), rows / grouped
        tiles = batch * kv_heads * each
    else:
        rows, keys, single = np.full_like(seq, 64.0), _paged_keys(head_dim), seq <= 1
        # A single token is a decode step, whose tile holds the heads of a group.
        each, copied, tokens = np.ceil(np.where(single, grouped, seq) / rows), np.where(single, _copied(shapes), 0.0), rows
        tiles = batch * np.where(single, kv_heads, heads) * each
    # Sum over tiles of the whole blocks up to the diagonal, exact where tokens of a tile divide a block or the reverse.
    blocks = np.maximum(1.0, seq / keys * (1 + 1 / each) / 2 + np.maximum(1 - tokens / keys, 0) / 2)
    return rows, keys, tiles, blocks, copied


def _columns(shapes: Shapes) -> tuple[Array, Array, Array, Array, Array]:
    """batch, seq, heads, kv_heads and head_dim [N]; never 0 where they divide."""
    batch, seq, *sizes = (np.asarray(shapes[name], dtype=np.float64) for name in DecodeAttentionTime.columns)
    heads, kv_heads, head_dim = (np.maximum(size, 1.0) for size in sizes)
    return batch, seq, heads, kv_heads, head_dim


def _decode_bytes(shapes: Shapes) -> tuple[Array, Array]:
    """Bytes [N] of keys and values, and of queries and outputs."""
    batch, seq, heads, kv_heads, head_dim = _columns(shapes)
    return 2 * ELEMENT * batch * seq * kv_heads * head_dim, 2 * ELEMENT * batch * heads * head_dim


def _missed(device: Device, nbytes: Array, resident: bool) -> Array:
    """Share [N] of ``nbytes`` that a repeated kernel does not find in L2."""
    if not resident or not device.l2:
        return np.ones_like(nbytes)
    share = L2_SHARES.get(device.family, OTHER_L2_SHARE)
    found: Array = 1 - 1 / (1 + (nbytes / (share * device.l2)) ** L2_SHARPNESS)
    return found


def _beyond_cache(device: Device, nbytes: Array, resident: bool) -> Array:
    """Seconds [N] to bring what a full L2 cannot hold of ``nbytes``."""
    held = (device.l2 or 0.0) if resident else 0.0
    return np.maximum(nbytes - held, 0.0) / device.bandwidth


def _combining(shapes: Shapes) -> Array:
    """Blocks [N] of the kernel that combines parts: 8 rows (16 of small heads) by 128 columns of one sequence."""
    batch, _, heads, _, head_dim = _columns(shapes)
    return batch * np.ceil(heads / np.where(head_dim <= 64, 16, 8)) * np.ceil(head_dim / 128)


def _copied(shapes: Shapes) -> Array:
    """1 where grouped query heads cannot be seen as rows without a copy: more than one sequence, KV head and head of a group."""
    batch, _, heads, kv_heads, _ = _columns(shapes)
    found: Array = ((batch > 1) & (kv_heads > 1) & (heads > kv_heads)).astype(np.float64)
    return found


def _parts_by_keys(tiles: Array, blocks: Array, cores: float) -> Array:
    """Parts [N] with which each multiprocessor has about 1 / cores of all blocks, with 10 % of slack (FlashAttention-3)."""
    return np.ceil(blocks / np.maximum(np.ceil(1.1 * tiles * blocks / cores), 1.0))


def _parts_of_one_wave(tiles: Array, blocks: Array, cores: float) -> Array:
    return np.maximum(np.minimum(np.floor(cores / np.maximum(tiles, 1.0)), blocks), 1.0)


def _blocks(seq: Array, keys: Array | float) -> Array:
    return np.maximum(np.ceil(seq / keys), 1.0)


def _hopper_keys(head_dim: Array) -> Array:
    """Keys of a block of FlashAttention-3 with a paged cache."""
    return np.where(head_dim <= 128, 128.0, np.where(head_dim <= 192, 96.0, 80.0))


def _paged_keys(head_dim: Array) -> Array:
    """Keys of a block of FlashAttention-2's kernel for paged caches."""
    return np.where(head_dim <= 64, 256.0, np.where(head_dim <= 128, 128.0, 64.0))


def _norm(one: Array, other: Array, power: float) -> Array:
    """(one^power + other^power)^(1 / power), without underflow [N]."""
    large, small = np.maximum(one, other), np.minimum(one, other)
    ratio: NDArray[np.float64] = np.divide(small, large, out=np.zeros_like(large), where=large > 0)
    found: Array = large * (1 + ratio**power) ** (1 / power)
    return found


def _hopper(device: Device) -> bool:
    return device.family.split()[0] == "Hopper"


def _check_variant(name: str, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"{name}: variant must be one of {', '.join(VARIANTS)}, not {shown(variant)}; name the back-end most like it")
