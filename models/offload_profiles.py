"""Profiles of offloading: what share of a data sheet's rates a GPU and its link reach. First principles, or stated and fitted ones."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_name, check_number
from .units import GB


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadProfile:
    """A calibration record of an offloading system.

    Shares of the data sheet's rates: ``compute`` of the matrix peak, ``memory`` of the GPU's memory bandwidth, ``to_device`` and
    ``to_host`` of the link in each direction (a share above 1 is beyond the data sheet and reported by ``beyond_data_sheet``),
    ``host_memory`` of the host's bandwidth, for attention on the CPU.
    ``usable``: share of the GPU's memory that an engine may use; ``reserved`` [B]: what it needs of it beside weights and caches.
    ``stated_in``: where a share that is not 1 comes from; ``fitted_on``: the data that numbers were fitted on; empty for none.
    """

    name: str
    compute: float = 1.0
    memory: float = 1.0
    to_device: float = 1.0
    to_host: float = 1.0
    host_memory: float = 1.0
    usable: float = 1.0
    reserved: float = 0.0
    stated_in: str = ""
    fitted_on: str = ""

    def __post_init__(self) -> None:
        check_name("profile", self.name)
        for field in ("compute", "memory", "to_device", "to_host", "host_memory", "usable"):
            check_number(f"profile {self.name!r}", field, getattr(self, field), "share of the data sheet", infinite=False)
        check_number(f"profile {self.name!r}", "reserved", self.reserved, "B", zero=True, infinite=False)
        if self.usable > 1:
            raise ValueError(f"profile {self.name!r}: usable must be at most 1, not {self.usable!r}; no engine uses more than there is")

    @property
    def beyond_data_sheet(self) -> tuple[str, ...]:
        """The rates that are taken to be faster than the data sheet says, as "to_device 1.016": no physical device has them."""
        rates = ("compute", "memory", "to_device", "to_host", "host_memory")
        return tuple(f"{field} {getattr(self, field):.4g}" for field in rates if getattr(self, field) > 1)


DATASHEET = OffloadProfile(name="datasheet")
"""Every rate of the data sheet is reached: a lower bound of time."""

KVPR_NOMINAL = OffloadProfile(
    name="kvpr_nominal",
    memory=0.8,
    to_device=32 / 31.5,
    to_host=32 / 31.5,
    stated_in="KVPR (arXiv 2411.17089): 312 TFLOP/s and 32 GB/s, the nominal rate of PCIe 4.0 x16; 0.8 of the HBM bandwidth is a choice",
)
"""The rates that KVPR's scheduler computes with; its link is 1.6 % above what PCIe 4.0 x16 carries."""

KVPR_PAPER = OffloadProfile(
    name="kvpr_paper",
    to_device=32 * 2**30 / 31.5e9,
    to_host=32 * 2**30 / 31.5e9,
    stated_in="KVPR (arXiv 2411.17089), table 1: 27.3 ms for the keys and values of a layer imply 32 GiB/s",
)
"""The link that KVPR's table 1 implies: 9 % above what PCIe 4.0 x16 carries."""

HYBRIDSERVE_PAPER = OffloadProfile(
    name="hybridserve_paper",
    compute=120 / 165.2,
    memory=0.8,
    to_device=25 / 31.5,
    to_host=25 / 31.5,
    usable=0.92,
    reserved=1.5 * GB,
    fitted_on="HybridServe (arXiv 2501.01792): only the ratio of compute to link, 4.8e3 FLOP/B, is identified by its speed-ups",
)
"""Typical measured rates of an RTX 4090 on PCIe 4.0 x16: 120 TFLOP/s and 25 GB/s, 0.92 of its memory less 1.5 GB."""

FLEXGEN_ON_HYBRIDSERVE = OffloadProfile(
    name="flexgen_on_hybridserve",
    compute=120 / 165.2,
    memory=0.8,
    to_device=0.55 * 25 / 31.5,
    to_host=0.55 * 25 / 31.5,
    usable=0.92,
    reserved=1.5 * GB,
    fitted_on="HybridServe (arXiv 2501.01792), mean speed-up over FlexGen of 2.19: a link efficiency of 0.55",
)
"""HybridServe's baseline: its link runs at 0.55 of HybridServe's, a number fitted on the published mean speed-up."""
