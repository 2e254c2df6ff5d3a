"""Kernel models of moving bytes: over a host link, from memory in one pass, through elementwise kernels, and between GPUs.

All are a time to begin and a rate, a share of the data sheet's; what is added to that is said at each. Form and constants were chosen, and
parameters are fitted, on published measurements (``source`` of the records).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .calibration import Parameter, Shapes
from .checks import shown
from .device import Device, links
from .roofline import Array
from .units import GB, us

HALF = 2.0
"""Bytes of an element of the precision that elementwise kernels are measured in."""


def _share(name: str, start: float, meaning: str, low: float = 0.01) -> Parameter:
    return Parameter(name=name, unit="", low=low, high=1.0, start=start, meaning=meaning)


def _delay(name: str, start: float, meaning: str, high: float = 1e-3) -> Parameter:
    return Parameter(name=name, unit="s", low=1e-8, high=high, start=start, meaning=meaning)


def _column(shapes: Shapes, name: str, otherwise: float | None = None) -> Array:
    """A column of numbers [N]; ``otherwise`` where a column that need not be there is not."""
    if otherwise is not None and name not in shapes:
        return np.asarray(otherwise, dtype=np.float64)
    return np.asarray(shapes[name], dtype=np.float64)


def _numbers(column: NDArray[Any], known: Mapping[str, Any], what: str) -> NDArray[np.intp]:
    """For each text of a column its place in ``known``; ValueError for one that is not there."""
    names, places = np.unique(np.asarray(column).astype(str), return_inverse=True)
    order = {name: place for place, name in enumerate(known)}
    odd = [name for name in names.tolist() if name not in order]
    if odd:
        raise ValueError(f"{what} must be one of {', '.join(known)}, not {shown(odd[0])}; leave such rows out")
    found: NDArray[np.intp] = np.array([order[name] for name in names.tolist()], dtype=np.intp)[places.reshape(-1)]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLinkTime:
    """Seconds to copy ``bytes`` between a host and a device, ``variant`` "h2d" or "d2h" and "pinned" or "pageable".

        start + min(n bytes / (small share P), setup + n bytes / (share P))

    P: bandwidth of the device's link, each direction; n: ``devices`` that copy over the same link at the same time (a column that may be
    left out: 1), each of which gets a part of it. Small copies take a way that begins sooner and moves less; large ones are moved by
    copy engines, out of pageable memory through a pinned buffer.
    """

    variant: str = "h2d_pinned"

    name: ClassVar[str] = "host_link"
    columns: ClassVar[tuple[str, ...]] = ("bytes",)
    optional: ClassVar[tuple[str, ...]] = ("devices",)
    counts: ClassVar[tuple[str, ...]] = ("devices",)
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("bytes",)
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _delay("start", 5 * us, "until the first byte"),
        _share("small", 0.3, "of the rate of large copies, small ones", low=0.05),
        _delay("setup", 3 * us, "of a large copy beyond that"),
        _share("share", 0.8, "of the link's bandwidth, large copies"),
    )

    def __post_init__(self) -> None:
        direction, _, kind = self.variant.partition("_")
        if direction not in ("h2d", "d2h") or kind not in ("pinned", "pageable"):
            raise ValueError(f"host link: variant must be h2d or d2h, _ and pinned or pageable, not {self.variant!r}; correct it")

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        bound = self.bound(device, shapes)
        large = bound / values["share"]
        return np.maximum(values["start"] + np.minimum(large / values["small"], values["setup"] + large), bound)

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes; there are no FLOPs to speak of."""
        moved = self.bound(device, shapes)
        return moved, np.zeros_like(moved)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """n bytes / P."""
        found: Array = _column(shapes, "devices", 1.0) * _column(shapes, "bytes") / link_bandwidth(device)
        return found


SLOWEST_PEER = 15.75 * GB
"""B/s, each direction, between devices whose links are not known: PCIe 3.0 x16."""


def peer_bandwidth(device: Device) -> float:
    """B/s, each direction, between two such devices: of their links to each other, or else of the one to the host, or of PCIe 3.0 x16."""
    return device.peer_bandwidth or links().get(device.link, SLOWEST_PEER)


def link_bandwidth(device: Device) -> float:
    """B/s, each direction, of the link that joins a device to its host; ValueError if the data sheets do not say."""
    known = links()
    if device.link not in known:
        raise ValueError(f"device {device.name!r}: its link {device.link!r} must be one of {', '.join(known)}; set link in its data sheet")
    return known[device.link]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTime:
    """Seconds of one decode step of a single request, which reads all weights once: how fast a memory is read from end to end.

        step + hop (n - 1) + weight_bytes / (share BW) + state_bytes / (state_share BW)

    BW: data sheet's bandwidth of one device. Layers are divided among ``n_gpu`` devices, which work one after the other. ``state_bytes``:
    keys and values that the step reads, mean over the measured tokens. ``variant``: the software, where several were measured.
    """

    variant: str = ""

    name: ClassVar[str] = "stream"
    counts: ClassVar[tuple[str, ...]] = ("n_gpu",)
    columns: ClassVar[tuple[str, ...]] = ("weight_bytes", "state_bytes", "n_gpu")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("weight_bytes",)
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="step", unit="s", low=1e-4, high=0.1, start=1e-3, meaning="a step apart from reading"),
        _delay("hop", 1e-4, "from a device to the next", high=0.01),
        _share("share", 0.7, "of the memory's bandwidth, weights"),
        _share("state_share", 0.5, "of the memory's bandwidth, keys and values"),
    )

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        reading = _column(shapes, "weight_bytes") / values["share"] + _column(shapes, "state_bytes") / values["state_share"]
        begun = values["step"] + values["hop"] * (_column(shapes, "n_gpu") - 1)
        return np.maximum(begun + reading / device.bandwidth, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes; there are no FLOPs to speak of."""
        moved = self.bound(device, shapes)
        return moved, np.zeros_like(moved)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """All bytes / BW, as one request's layers follow each other on however many devices."""
        found: Array = (_column(shapes, "weight_bytes") + _column(shapes, "state_bytes")) / device.bandwidth
        return found


OPERATIONS: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "norm",
        "post_attention_layernorm": "norm",
        "norm": "norm",
        "mlp_act": "activation",
        "act_fn": "activation",
        "attn_rope": "rotary",
        "rotary_emb": "rotary",
        "add": "residual",
        "emb": "embedding",
        "embedding": "embedding",
    }
)
"""Elementwise operations by the names that profilers give them, and what each is."""

HELD = 1 / 3
"""Share of an elementwise kernel's bytes that a cache with room for all of them serves."""

CLASSES = ("norm", "activation", "rotary", "residual", "embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseTime:
    """Seconds of an elementwise kernel: norm, activation, rotary positions, residual addition or gathering of embeddings.

        launch + (bytes - min(bytes, L2) / 3) / (share of the operation x BW)         bytes = 2 m (read + written elements of a token)

    Elements of a token, of ``hidden`` h and ``ffn`` f on one of ``tp`` devices: norm 2 h; activation 3 f / tp, ungated 2 f / tp; rotary
    4 h / tp (queries and keys); residual 3 h, with parallel attention and FFN 6 h (two of them); embedding 2 h. ``gated`` and
    ``parallel`` are 1 or 0. The shares say how well each kernel uses the memory. One of three operands, that which the kernel before wrote,
    is still in the cache of L2 bytes, as far as it has room (``HELD``); the data sheet's bound counts only bytes beyond the cache.
    """

    variant: str = ""

    name: ClassVar[str] = "elementwise"
    columns: ClassVar[tuple[str, ...]] = ("op", "m", "hidden", "ffn", "tp", "gated", "parallel")
    texts: ClassVar[tuple[str, ...]] = ("op",)
    group: ClassVar[tuple[str, ...]] = ("op", "hidden", "ffn", "tp")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _delay("launch", 2 * us, "a kernel apart from its bytes", high=1e-4),
        *(_share(name, 0.5, f"of the memory's bandwidth, {name} kernels") for name in CLASSES),
    )

    def moved(self, shapes: Shapes) -> tuple[Array, NDArray[np.intp]]:
        """Bytes read and written [N], and the place of the operation in ``CLASSES`` [N]."""
        place = _numbers(shapes["op"], OPERATIONS, "elementwise: op")
        kind = np.array([CLASSES.index(each) for each in OPERATIONS.values()], dtype=np.intp)[place]
        hidden, ffn, tp = (_column(shapes, name) for name in ("hidden", "ffn", "tp"))
        gated, parallel = _column(shapes, "gated"), _column(shapes, "parallel")
        elements = np.choose(kind, [2 * hidden, (2 + gated) * ffn / tp, 4 * hidden / tp, 3 * hidden * (1 + parallel), 2 * hidden])
        return HALF * _column(shapes, "m") * elements, kind

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        moved, kind = self.moved(shapes)
        share = np.array([values[name] for name in CLASSES])[kind]
        read = moved - HELD * np.minimum(moved, device.l2 or 0.0)
        return np.maximum(values["launch"] + read / (share * device.bandwidth), self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes; there are no FLOPs to speak of."""
        moved = self.bound(device, shapes)
        return moved, np.zeros_like(moved)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """(bytes - L2) / BW, at least 0."""
        moved, _ = self.moved(shapes)
        return np.maximum(moved - (device.l2 or 0.0), 0.0) / device.bandwidth


PASSES: Mapping[str, float] = MappingProxyType({"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "alltoall": 1.0})
"""Times that a ring passes each byte on: an all-reduce is a reduce-scatter and an all-gather."""


ADDING_SWITCHES = ("Hopper",)
"""Families whose NVLink switches add and multicast (NVLink SHARP, third generation of NVSwitch)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceTime:
    """Seconds of an all-reduce, or of its halves, of ``bytes`` b on ``gpus`` n joined by NVLink.

        launch + hop steps + min(w b / (share P), setup + w b / (large_share P) + b / (local BW)),   steps = c (n - 1)

    c: ``PASSES`` of the operation ``variant``; w = c (n - 1) / n, what a GPU sends of each byte in a ring. Where switches add and
    multicast (``ADDING_SWITCHES``) an all-reduce sends 1 + 1 / n, if that is less. P: bandwidth of a GPU's links, one direction; BW: of its
    memory. Two protocols, as in NCCL, of which the faster is taken: a low-latency one, whose words carry flags, and one for large messages,
    which has to synchronise (setup) and to pass buffers in memory (local). ``bytes`` are what one GPU holds of the whole.
    """

    variant: str = "all_reduce"

    name: ClassVar[str] = "all_reduce"
    counts: ClassVar[tuple[str, ...]] = ("gpus",)
    columns: ClassVar[tuple[str, ...]] = ("gpus", "bytes")
    texts: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[tuple[str, ...]] = ("gpus", "bytes")
    parameters: ClassVar[tuple[Parameter, ...]] = (
        _delay("launch", 5 * us, "the kernel, whatever it sends", high=1e-4),
        _delay("hop", 1 * us, "a step of the ring", high=1e-4),
        _share("share", 0.2, "of the links' bandwidth, low-latency protocol"),
        _delay("setup", 10 * us, "of the protocol for large messages", high=1e-3),
        _share("large_share", 0.7, "of the links' bandwidth, protocol for large messages"),
        _share("local", 0.3, "of the memory's bandwidth, passing buffers"),
    )

    def __post_init__(self) -> None:
        if self.variant not in PASSES:
            raise ValueError(f"all-reduce: variant must be one of {', '.join(PASSES)}, not {self.variant!r}; correct it")

    def seconds(self, device: Device, shapes: Shapes, values: Mapping[str, float], /) -> Array:
        """Seconds [N]."""
        gpus, held, peak = _column(shapes, "gpus"), _column(shapes, "bytes"), peer_bandwidth(device)
        steps = PASSES[self.variant] * (gpus - 1)
        sent = steps / gpus
        if self.variant == "all_reduce" and device.family in ADDING_SWITCHES:
            sent = np.minimum(sent, 1 + 1 / gpus)
        sent = sent * held / peak
        large = values["setup"] + sent / values["large_share"] + held / (values["local"] * device.bandwidth)
        fast = np.minimum(sent / values["share"], large)
        return np.maximum(values["launch"] + values["hop"] * steps + fast, self.bound(device, shapes))

    def work(self, device: Device, shapes: Shapes, /) -> tuple[Array, Array]:
        """Seconds [N] of the bytes; there are no FLOPs to speak of."""
        moved = self.bound(device, shapes)
        return moved, np.zeros_like(moved)

    def bound(self, device: Device, shapes: Shapes, /) -> Array:
        """(n - 1) / n b / P: a GPU gets what the others hold at least once, added by switches or not."""
        gpus = _column(shapes, "gpus")
        found: Array = (gpus - 1) / gpus * _column(shapes, "bytes") / peer_bandwidth(device)
        return found
