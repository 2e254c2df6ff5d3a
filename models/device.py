"""Devices and links by their data sheets: what calibrated kernel times start from, and are never below.

The catalogue ``data/catalogue/devices.toml`` says where each number comes from; a device of one's own is a TOML file of the same form:

[[device]]
name = "my GPU"
family = "Ampere"                  # whose records are used until the device has its own
memory = "HBM2e"
capacity = "80 GB"
bandwidth = "2039 GB/s"
peaks = { bf16 = "312 TFLOP/s" }   # dense; bf16 stands for fp16, too
multiprocessors = 108              # optional, as is all below; kernel models of GPUs need it
l2 = "40 MB"
power = "400 W"                    # without it, how long products slow down is not taken over from another device
link = "PCIe 4.0 x16"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .checks import check_name, check_number, shown, whole
from .datasheet import Bytes, BytesPerSecond, FlopPerSecond, Watts
from .hardware import ComputeUnit, MemoryTier, System

EXAMPLE = (
    '[[device]] name = "my GPU" family = "Ampere" memory = "HBM2e" capacity = "80 GB" bandwidth = "2039 GB/s" '
    'peaks = { bf16 = "312 TFLOP/s" } multiprocessors = 108 l2 = "40 MB", each on a line of its own'
)
"""What a data sheet of one's own says at least, for messages."""

CATALOGUE = Path(__file__).parent / "data" / "catalogue" / "devices.toml"

SAME_PEAK: Mapping[str, str] = MappingProxyType({"fp16": "bf16", "half": "bf16", "bfloat16": "bf16", "float16": "bf16", "w4": "bf16"})
"""Precisions that have the peak of another one: weights of 4 bits are unpacked to 16 before they are multiplied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A processor and its memory, as its data sheet says: SI units, None where it does not say.

    ``peaks`` [FLOP/s] of dense matrix products by precision. ``multiprocessors``: its independent cores (SMs, CUs). ``l2`` [B]: cache
    that all of them share. ``family``: devices of one architecture and kind of memory, whose calibration records stand in for a missing
    one. ``link``: the name of the one to the host. ``peer_bandwidth`` [B/s], each direction, to other
    such devices. ``aliases``: names by which it is known elsewhere.
    """

    name: str
    family: str
    memory: str
    capacity: float
    bandwidth: float
    peaks: Mapping[str, float] = field(default_factory=dict)
    vector_peak: float | None = None
    multiprocessors: int | None = None
    l2: float | None = None
    link: str = ""
    peer_bandwidth: float | None = None
    power: float | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name("device", self.name)
        what = f"device {self.name!r}"
        check_name(f"{what}: family", self.family)
        check_number(what, "capacity", self.capacity, "B", infinite=False)
        check_number(what, "bandwidth", self.bandwidth, "B/s", infinite=False)
        for precision, peak in self.peaks.items():
            check_number(what, f"peak of {precision}", peak, "FLOP/s", infinite=False)
        for name, unit in (("vector_peak", "FLOP/s"), ("l2", "B"), ("peer_bandwidth", "B/s"), ("power", "W")):
            if getattr(self, name) is not None:
                check_number(what, name, getattr(self, name), unit, infinite=False)
        if self.multiprocessors is not None:
            object.__setattr__(self, "multiprocessors", whole(what, "multiprocessors", self.multiprocessors, "cores"))
        object.__setattr__(self, "peaks", dict(self.peaks))
        object.__setattr__(self, "aliases", tuple(self.aliases))

    def peak(self, precision: str) -> float:
        """FLOP/s of dense matrix products in ``precision``; ValueError if the data sheet does not say."""
        known = SAME_PEAK.get(precision, precision)
        if known not in self.peaks:
            there = ", ".join(self.peaks) or "none"
            raise ValueError(f"device {self.name!r}: no peak of {shown(precision)} is known (there is {there}); add it to its data sheet")
        return self.peaks[known]

    def cores(self) -> int:
        """``multiprocessors``; ValueError if the data sheet does not say."""
        if self.multiprocessors is None:
            raise ValueError(f"device {self.name!r}: the number of multiprocessors is not known; add it to its data sheet")
        return self.multiprocessors

    def system(self, precision: str = "bf16") -> System:
        """The device alone, as a System of one memory; ValueError without a peak of ``precision``."""
        tier = MemoryTier(name=self.memory, capacity=self.capacity, bandwidth=self.bandwidth)
        matrix = self.peak(precision)
        unit = ComputeUnit(name=self.name, tier=tier.name, matrix_peak=matrix, vector_peak=self.vector_peak or matrix)
        return System(name=self.name, tiers=(tier,), units=(unit,), links=())


class _Sheet(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Device(_Sheet):
    name: str
    family: str
    memory: str
    capacity: Bytes
    bandwidth: BytesPerSecond
    peaks: dict[str, FlopPerSecond] = {}
    vector_peak: FlopPerSecond | None = None
    multiprocessors: int | None = None
    l2: Bytes | None = None
    link: str = ""
    peer_bandwidth: BytesPerSecond | None = None
    power: Watts | None = None
    source: str = ""
    aliases: Annotated[tuple[str, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)] = ()


class _Link(_Sheet):
    name: str
    bandwidth: BytesPerSecond
    source: str = ""


class _Catalogue(_Sheet):
    device: list[_Device] = []
    link: list[_Link] = []


def read_devices(path: str | Path) -> tuple[dict[str, Device], dict[str, float]]:
    """Devices by name, and bandwidths [B/s] of links by name, of a TOML file; ValueError in one sentence: file, entry, rule, way out."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        sheet = _Catalogue.model_validate(data)
    except OSError as error:
        raise ValueError(f"cannot read the devices in {path}: {error.strerror}; name a TOML file") from None
    except ValidationError as error:
        beside = path.with_name(f"{path.stem.removesuffix('_records')}_device.toml")  # as a profile of a machine names its files
        if ("tier" in data or "record" in data) and beside.is_file():
            holds = "the data sheet of a system" if "tier" in data else "a file of calibration records"
            raise ValueError(f"{path} must hold a [[device]], and is {holds}; name {beside}, which lies beside it") from None
        first = error.errors(include_url=False, include_context=False)[0]
        where, *rest = first["loc"]
        if not rest or "tier" in data or "unit" in data:
            holds = f"[[{where}]]" if isinstance(data.get(str(where)), list) else str(where)
            if "tier" in data:
                holds = "[[tier]], so it is the data sheet of a system"
            raise ValueError(f"{path} must hold a [[device]], and has {holds}; write {EXAMPLE}") from None
        entries = data.get(str(where))
        entry = entries[rest[0]] if rest and isinstance(entries, list) and isinstance(rest[0], int) else {}
        name = entry.get("name", f"number {int(rest[0]) + 1}") if isinstance(entry, dict) and rest else ""
        key = ".".join(map(str, rest[1:]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {where} {name!r}: {key}: {message}; correct it, as in {EXAMPLE}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML file: {error}; mend that place") from None
    devices = {one.name: Device(**one.model_dump()) for one in sheet.device}
    if len(devices) < len(sheet.device):
        raise ValueError(f"{path}: two devices have one name; rename one")
    return devices, {one.name: one.bandwidth for one in sheet.link}


@lru_cache(maxsize=1)
def _catalogue() -> tuple[dict[str, Device], dict[str, float]]:
    return read_devices(CATALOGUE)


def devices() -> dict[str, Device]:
    """The devices that memsplit ships, by name."""
    return dict(_catalogue()[0])


def links() -> dict[str, float]:
    """Bandwidths [B/s], each direction, of the links that memsplit ships, by name."""
    return dict(_catalogue()[1])


def device_named(name: str | Path) -> Device:
    """A device by its name or an alias, letters of either case, or the one of a TOML file; ValueError names those that there are."""
    wanted = str(name).casefold()
    known = _catalogue()[0]
    for device in known.values():
        if wanted in (each.casefold() for each in (device.name, *device.aliases)):
            return device
    if Path(name).is_file():
        found = list(read_devices(name)[0].values())
        if len(found) == 1:
            return found[0]
        raise ValueError(f"{name} must have one [[device]], not {len(found)}; name a file with the one that is meant")
    own = "a data sheet (.toml; that of a profiled machine ends in _device.toml)"
    raise ValueError(f"there is no device and no file {str(name)!r}; name {own} or one of {', '.join(known)}")
