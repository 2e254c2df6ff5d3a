"""The best cache ratio of designs in a table, with a certified gap: which blocks of the state are activations, and where, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.cache_ratio import BLOCK, CacheRatioProblem
from ..models.checks import whole
from ..models.hardware import System
from ..models.offload import STAGED_REQUESTS, WeightsOn
from ..models.offload_batch import CacheRatioBatch, OffloadDesigns
from ..models.offload_profiles import DATASHEET, OffloadProfile
from ..models.price import ASSUMED_OPERATION
from ..models.roofline import Array
from ..models.systems import Systems
from ..models.units import GB
from ..models.workload import Workload
from ..solvers.cache_ratio_batch import solve_ratios
from .mapping_score import check_fields, priced_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSweep:
    """An array score: columns of designs in, columns of their cache ratios out (``CacheRatioProblem``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch`` and ``context`` (``workload``'s, if there is no column). ``block``
    tokens, GPU ``batches`` that share one load of the weights, ``weights`` and ``buffered_requests`` are those of the problem.

    Columns out, of one decode step: latency_s; throughput_tok_per_s; bound_s, which no plan beats, and gap = (latency - bound) / latency:
    the plan is certified to be within it of the optimum, and with FP16 it is the optimum (``solvers.cache_ratio_batch`` says when);
    act_share of blocks kept as activations; kv_gpu_blocks, act_gpu_blocks, kv_host_blocks, act_host_blocks; r, rho, w, c
    (``models.offload``); memory_usd of all tiers and system_usd (left out where a tier has no cost); area_mm2; TIER_headroom_GB of GPU and
    host; ``feasible`` and ``reason``. Where nothing fits, only r, rho, w, c, USD, mm2 and the headroom of what takes least memory (below
    0: so much is lacking) are numbers; where the state is beyond 2**60 bytes, only USD and mm2.
    """

    system: System
    workload: Workload
    profile: OffloadProfile = DATASHEET
    block: int = BLOCK
    batches: int = 1
    weights: WeightsOn = "host"
    buffered_requests: int = STAGED_REQUESTS

    def __post_init__(self) -> None:
        check_fields(self, system=System, workload=Workload, profile=OffloadProfile)
        refuse_beyond(self._batch({})[2], self.workload)

    def check(self, columns: Mapping[str, Any]) -> None:
        """ValueError for columns that cannot be priced, as a call raises it; nothing is priced."""
        OffloadDesigns.counted(self.system, self.workload, columns, profile=self.profile, batches=self.batches, block=self.block)

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        designs, batch, beyond = self._batch(columns)
        found = solve_ratios(batch)
        counts = {name: getattr(found, name) for name in ("kv_gpu", "act_gpu", "kv_host", "act_host")}
        gpu, host = designs.systems.base.tier_names[:2]

        def known(values: Any) -> Array:
            return np.where(found.feasible, values, np.nan)

        with np.errstate(divide="ignore"):  # a machine without limits takes no time
            throughput = designs.batch * designs.batches / found.latency
        shares = (found.act_gpu + found.act_host) / np.maximum(batch.blocks, 1)
        reason = np.full(len(designs), "", dtype=object)
        reason[~found.feasible] = f"the requests' state does not fit into {gpu} and {host} in either form"
        reason[~found.fits_host] = f"the weights exceed {host}"
        reason[~found.fits_gpu] = f"weights in use, embeddings and staging buffers exceed {gpu}"
        room = batch.headroom(**counts)
        priced = {
            "latency_s": known(found.latency),
            "throughput_tok_per_s": known(throughput),
            "bound_s": known(found.bound),
            "gap": found.gap,
            "act_share": known(shares),
            **{f"{name}_blocks": known(count) for name, count in counts.items()},
            **{name: np.array(np.broadcast_to(ratio, len(designs))) for name, ratio in batch.ratios.items()},
            **machine_columns(designs.systems),
            **{f"{name}_headroom_GB": np.broadcast_to(left, len(designs)) / GB for name, left in zip((gpu, host), room, strict=True)},
            "feasible": found.feasible.copy(),
            "reason": reason,
        }
        return without_beyond(priced, beyond)

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine and the workload of a row; columns that are no design columns are passed over."""
        return OffloadDesigns.from_row(self.system, self.workload, row)[0]

    def problems(self, row: Mapping[str, Any]) -> tuple[CacheRatioProblem]:
        """The problem behind a row."""
        built = {name: getattr(self, name) for name in ("profile", "block", "batches", "weights", "buffered_requests")}
        return (CacheRatioProblem.build(*self.design(row), **built),)

    def _batch(self, columns: Mapping[str, Any]) -> tuple[OffloadDesigns, CacheRatioBatch, NDArray[np.bool_]]:
        block = whole("RatioSweep", "block", self.block, "tokens")
        designs, beyond = OffloadDesigns.counted(
            self.system, self.workload, columns, profile=self.profile, batches=self.batches, block=block
        )
        batch = CacheRatioBatch.build(designs, block=block, weights=self.weights, buffered_requests=self.buffered_requests)
        return designs, batch, beyond


BEYOND = "the state of all requests is beyond 2**60 bytes or 2**53 tokens"


def refuse_beyond(beyond: NDArray[np.bool_], workload: Workload) -> None:
    """ValueError if the workload of a score itself has more state than is counted."""
    if beyond.any():
        raise ValueError(f"{BEYOND}, with {workload.batch} requests of {workload.context} tokens; lower batch or context")


def without_beyond(priced: dict[str, NDArray[Any]], beyond: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """The columns with no number in the rows ``beyond``, but for those that depend on the machine alone; they say why."""
    if not beyond.any():
        return priced
    for name, column in priced.items():
        if name == "feasible":
            priced[name] = column & ~beyond
        elif name == "reason":
            priced[name] = np.where(beyond, np.array(BEYOND, dtype=object), column)
        elif not name.endswith(("_usd", "_mm2", "_without")):
            priced[name] = np.where(beyond, np.nan, column)
    return priced


def machine_columns(systems: Systems) -> dict[str, NDArray[Any]]:
    """The columns of ``priced_columns`` that depend on the machine alone [D]: USD and mm2, left out where they are unknown."""
    columns = priced_columns(systems, None, latency=0.0, tokens=0.0, operation=ASSUMED_OPERATION)
    return {
        name: np.full(len(systems), value, dtype=object) if isinstance(value, str) else np.array(np.broadcast_to(value, len(systems)))
        for name, value in columns.items()
    }
