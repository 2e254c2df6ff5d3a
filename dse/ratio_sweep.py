"""The exact cache ratio of designs in a table: which blocks of a batch's state are kept as activations, and where, priced as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.cache_ratio import BLOCK, CacheRatioProblem
from ..models.hardware import System
from ..models.offload import STAGED_REQUESTS, WeightsOn
from ..models.offload_batch import CacheRatioBatch, OffloadDesigns
from ..models.offload_profiles import DATASHEET, OffloadProfile
from ..models.price import system_cost
from ..models.roofline import Array
from ..models.systems import Systems
from ..models.units import GB
from ..models.workload import Workload
from ..solvers.cache_ratio_batch import solve_ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSweep:
    """An array score: columns of designs in, columns of their cache ratios out (``CacheRatioProblem``), without a loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch`` and ``context`` (``workload``'s, if there is no column). ``block``
    tokens, GPU ``batches`` that share one load of the weights, ``weights`` and ``buffered_requests`` are those of the problem.

    Columns out, of one decode step: latency_s; throughput_tok_per_s; bound_s, which no plan beats, and gap = (latency - bound) / latency;
    act_share of blocks kept as activations; kv_gpu_blocks, act_gpu_blocks, kv_host_blocks, act_host_blocks; r, rho, w, c
    (``models.offload``); memory_usd of all tiers (left out where one has no cost); TIER_headroom_GB of GPU and host; ``feasible`` and
    ``reason``. Where nothing fits, only r, rho, w, c, memory_usd and the headroom of what takes least memory (below 0: so much is
    lacking) are numbers.
    """

    system: System
    workload: Workload
    profile: OffloadProfile = DATASHEET
    block: int = BLOCK
    batches: int = 1
    weights: WeightsOn = "host"
    buffered_requests: int = STAGED_REQUESTS

    def __post_init__(self) -> None:
        self._batch({})

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        designs, batch = self._batch(columns)
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
        return {
            "latency_s": known(found.latency),
            "throughput_tok_per_s": known(throughput),
            "bound_s": known(found.bound),
            "gap": found.gap,
            "act_share": known(shares),
            **{f"{name}_blocks": known(count) for name, count in counts.items()},
            **{name: np.array(np.broadcast_to(ratio, len(designs))) for name, ratio in batch.ratios.items()},
            **memory_usd(designs.systems),
            **{f"{name}_headroom_GB": np.broadcast_to(left, len(designs)) / GB for name, left in zip((gpu, host), room, strict=True)},
            "feasible": found.feasible.copy(),
            "reason": reason,
        }

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine and the workload of a row; columns that are no design columns are passed over."""
        return OffloadDesigns.from_row(self.system, self.workload, row)[0]

    def problems(self, row: Mapping[str, Any]) -> tuple[CacheRatioProblem]:
        """The problem behind a row."""
        built = {name: getattr(self, name) for name in ("profile", "block", "batches", "weights", "buffered_requests")}
        return (CacheRatioProblem.build(*self.design(row), **built),)

    def _batch(self, columns: Mapping[str, Any]) -> tuple[OffloadDesigns, CacheRatioBatch]:
        designs = OffloadDesigns.from_columns(self.system, self.workload, columns, profile=self.profile, batches=self.batches)
        batch = CacheRatioBatch.build(designs, block=self.block, weights=self.weights, buffered_requests=self.buffered_requests)
        return designs, batch


def memory_usd(systems: Systems) -> dict[str, Array]:
    """The column memory_usd [D]; none where a tier has no cost."""
    if np.isnan(systems.values("tiers", "cost")).any():
        return {}
    return {"memory_usd": np.array(np.broadcast_to(system_cost(systems).memory, len(systems)))}
