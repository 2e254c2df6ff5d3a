"""The exact recompute split of designs in a table: how many tokens of each request a GPU recomputes, priced as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..models.hardware import System
from ..models.offload_batch import OffloadDesigns, RecomputeSplitBatch
from ..models.offload_profiles import DATASHEET, OffloadProfile
from ..models.recompute_split import RecomputeSplitProblem, SplitTemplate
from ..models.roofline import Array
from ..models.units import GB
from ..models.workload import Workload
from ..solvers.recompute_split_batch import solve_splits
from .mapping_score import check_fields
from .ratio_sweep import machine_columns, refuse_beyond, without_beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSweep:
    """An array score: columns of designs in, columns of their recompute splits out (``RecomputeSplitProblem``), no loop over designs.

    Columns in: numbers of ``system`` (``models.systems``), ``batch`` and ``context`` (``workload``'s, if there is no column). ``template``,
    ``chunks``, ``weights`` and GPU ``batches`` are those of the problem. ``most`` tokens of a request may be recomputed, all of a shorter
    context; None: all.

    Columns out, of one decode step: latency_s; throughput_tok_per_s; bound_s and gap, the latency and 0, as the split is optimal;
    split_tokens (of the first class of layers; split_tokens_2 of the second); act_share of all layers' tokens that are recomputed; r, rho,
    w, c of one GPU batch (``models.offload``); memory_usd of all tiers and system_usd (left out where a tier has no cost); area_mm2;
    TIER_headroom_GB of GPU and host; ``feasible`` and ``reason``. Where nothing fits, only r, rho, w, c, USD, mm2 and the headroom without
    recomputation (below 0: so much is lacking) are numbers; where the state is beyond 2**60 bytes, only USD and mm2.
    """

    system: System
    workload: Workload
    profile: OffloadProfile = DATASHEET
    template: SplitTemplate = "staged"
    chunks: int = 4
    weights: Literal["gpu", "host"] = "gpu"
    batches: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, system=System, workload=Workload, profile=OffloadProfile)
        refuse_beyond(self._batch({})[2], self.workload)

    def check(self, columns: Mapping[str, Any]) -> None:
        """ValueError for columns that cannot be priced, as a call raises it; nothing is priced."""
        OffloadDesigns.counted(self.system, self.workload, columns, profile=self.profile, batches=self.batches)

    def settings(self) -> dict[str, Any]:
        """The fields by name: with a row's design columns, all that is needed to price it again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Result columns [D] of design columns [D]; ValueError names the column, the row and the rule of a number that cannot be."""
        designs, batch, beyond = self._batch(columns)
        found = solve_splits(batch)
        gpu, host = designs.systems.base.tier_names[:2]

        def known(values: Any) -> Array:
            return np.where(found.feasible, values, np.nan)

        with np.errstate(divide="ignore"):  # a machine without limits takes no time
            throughput = designs.batch * designs.batches / found.latency
        depth = sum(layer.layers for layer in batch.layers)
        acts = sum(layer.layers * split for layer, split in zip(batch.layers, found.splits, strict=True))
        reason = np.full(len(designs), "", dtype=object)
        reason[~found.fits_host] = f"keys, values and weights held there exceed {host}"
        reason[~found.fits_gpu] = f"weights, embeddings and the state of two layers exceed {gpu}"
        room = batch.headroom(found.splits)
        priced = {
            "latency_s": known(found.latency),
            "throughput_tok_per_s": known(throughput),
            "bound_s": known(found.latency),
            "gap": known(0.0),
            **{f"split_tokens{f'_{c + 1}' if c else ''}": known(split) for c, split in enumerate(found.splits)},
            "act_share": known(acts / np.maximum(depth * designs.context, 1)),
            **designs.ratios(self.weights),
            **machine_columns(designs.systems),
            **{f"{name}_headroom_GB": np.broadcast_to(left, len(designs)) / GB for name, left in zip((gpu, host), room, strict=True)},
            "feasible": found.feasible.copy(),
            "reason": reason,
        }
        return without_beyond(priced, beyond)

    def design(self, row: Mapping[str, Any]) -> tuple[System, Workload]:
        """The machine and the workload of a row; columns that are no design columns are passed over."""
        return OffloadDesigns.from_row(self.system, self.workload, row)[0]

    def problems(self, row: Mapping[str, Any]) -> tuple[RecomputeSplitProblem]:
        """The problem behind a row."""
        system, workload = self.design(row)
        built = {name: getattr(self, name) for name in ("profile", "template", "chunks", "weights", "batches")}
        most = None if self.most is None else min(self.most, workload.context)
        return (RecomputeSplitProblem.build(system, workload, most=most, **built),)

    def _batch(self, columns: Mapping[str, Any]) -> tuple[OffloadDesigns, RecomputeSplitBatch, NDArray[np.bool_]]:
        designs, beyond = OffloadDesigns.counted(self.system, self.workload, columns, profile=self.profile, batches=self.batches)
        batch = RecomputeSplitBatch.build(designs, template=self.template, chunks=self.chunks, weights=self.weights, most=self.most)
        return designs, batch, beyond
