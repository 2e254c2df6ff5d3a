"""Cost models: hardware, LLMs, kernels, and the problems built from them."""

if not __name__.startswith("memsplit."):
    raise ImportError("import memsplit.models, not models: two copies of each class would break isinstance and pickles")

from .cache_ratio import CacheRatioPlan, CacheRatioProblem, LinearTime, RatioLayer
from .hardware import ComputeUnit, Link, MemoryTier, System
from .kernel_mapping import KernelMappingPlan, KernelMappingProblem, PlanCost, Split, TransitionCost
from .kernel_mapping_tables import KernelMappingTables, Kind
from .llm import LLMConfig, Matrix
from .mini_batches import MiniBatchPlan, MiniBatchProblem
from .offload import OffloadCost, OffloadLayer, OffloadMachine, OffloadRatios, offload_layers, offload_ratios
from .offload_baselines import GenerationCost, OffloadBaseline
from .offload_profiles import DATASHEET, FLEXGEN_ON_HYBRIDSERVE, HYBRIDSERVE_PAPER, KVPR_NOMINAL, KVPR_PAPER, OffloadProfile
from .placement import PlacementPlan, PlacementProblem
from .placement_t4 import FLEXGEN_T4, FLEXGEN_T4_FAST_DISK, PlacementProfile
from .profiles import FIRST_PRINCIPLES, H2M2_CALIBRATED, LLAMA2_RHO3, Profile
from .recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, SplitGeneration, best_splits, split_generation
from .workload import Kernel, Workload, kernels

__all__ = [
    "DATASHEET",
    "FIRST_PRINCIPLES",
    "FLEXGEN_ON_HYBRIDSERVE",
    "FLEXGEN_T4",
    "FLEXGEN_T4_FAST_DISK",
    "H2M2_CALIBRATED",
    "HYBRIDSERVE_PAPER",
    "KVPR_NOMINAL",
    "KVPR_PAPER",
    "LLAMA2_RHO3",
    "CacheRatioPlan",
    "CacheRatioProblem",
    "ComputeUnit",
    "GenerationCost",
    "Kernel",
    "KernelMappingPlan",
    "KernelMappingProblem",
    "KernelMappingTables",
    "Kind",
    "LLMConfig",
    "LinearTime",
    "Link",
    "Matrix",
    "MemoryTier",
    "MiniBatchPlan",
    "MiniBatchProblem",
    "OffloadBaseline",
    "OffloadCost",
    "OffloadLayer",
    "OffloadMachine",
    "OffloadProfile",
    "OffloadRatios",
    "PlacementPlan",
    "PlacementProblem",
    "PlacementProfile",
    "PlanCost",
    "Profile",
    "RatioLayer",
    "RecomputeSplitPlan",
    "RecomputeSplitProblem",
    "SplitGeneration",
    "Split",
    "System",
    "TransitionCost",
    "Workload",
    "kernels",
    "best_splits",
    "offload_layers",
    "offload_ratios",
    "split_generation",
]
