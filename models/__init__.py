"""Cost models: hardware, LLMs, kernels, and the problems built from them."""

if not __name__.startswith("memsplit."):
    raise ImportError("import memsplit.models, not models: two copies of each class would break isinstance and pickles")

from .cache_ratio import CacheRatioPlan, CacheRatioProblem, LinearTime, RatioLayer
from .calibrated_profiles import offload_profile, step_profile
from .calibration import Calibration, Error, Estimate, Interval, KernelModel, Parameter, check_shapes, error_of
from .calibration_records import read_records, record_for, shipped_records
from .clairvoyant import ClairvoyantProblem, PathCost
from .clairvoyant_offload import FormsCost, FormsPlan, FormsSchedule
from .device import Device, device_named, devices, links, read_devices
from .estimate import STEP_DATASHEET, STEP_FUSED, StepEstimate, StepMachines, StepModel, StepProfile, tensor_parallel
from .hardware import ComputeUnit, Link, MemoryTier, System
from .kernel_mapping import KernelMappingPlan, KernelMappingProblem, PlanCost, Split, TransitionCost
from .kernel_mapping_tables import KernelMappingTables, Kind
from .kernel_models import KERNELS, KernelTime, kernel_model
from .kernel_roofline import RooflineTime
from .kernel_steps import ENGINES, Engine
from .llm import LLMConfig, Matrix
from .migration import Residency
from .mini_batches import MiniBatchPlan, MiniBatchProblem
from .offload import OffloadCost, OffloadLayer, OffloadMachine, OffloadRatios, offload_layers, offload_ratios
from .offload_baselines import GenerationCost, OffloadBaseline
from .offload_batch import CacheRatioBatch, OffloadDesigns, RecomputeSplitBatch
from .offload_profiles import DATASHEET, FLEXGEN_ON_HYBRIDSERVE, HYBRIDSERVE_PAPER, KVPR_NOMINAL, KVPR_PAPER, OffloadProfile
from .offload_serving import OffloadDecision, OffloadService, OffloadState, OffloadSteps, TokenBytes
from .placement import PlacementPlan, PlacementProblem
from .placement_t4 import FLEXGEN_T4, FLEXGEN_T4_FAST_DISK, PlacementProfile
from .price import (
    ASSUMED_OPERATION,
    Operation,
    StepEnergy,
    SystemArea,
    SystemCost,
    energy_per_token,
    mean_power,
    static_power,
    step_energy,
    system_area,
    system_cost,
    usd_per_Mtok,
)
from .profiles import FIRST_PRINCIPLES, H2M2_CALIBRATED, LLAMA2_RHO3, Profile
from .recompute_split import RecomputeSplitPlan, RecomputeSplitProblem, SplitGeneration, best_splits, split_generation
from .serving import PolicyState, Service, ServingLimits, ServingState, StepWindow
from .systems import Systems
from .trace import LENGTHS, Lengths, Request, Trace, fixed_trace, h2m2_trace, poisson_trace, uniform_trace
from .workload import Kernel, Workload, kernels, step_kernels

__all__ = [
    "ASSUMED_OPERATION",
    "DATASHEET",
    "ENGINES",
    "FIRST_PRINCIPLES",
    "FLEXGEN_ON_HYBRIDSERVE",
    "FLEXGEN_T4",
    "FLEXGEN_T4_FAST_DISK",
    "H2M2_CALIBRATED",
    "HYBRIDSERVE_PAPER",
    "KERNELS",
    "KVPR_NOMINAL",
    "KVPR_PAPER",
    "LENGTHS",
    "LLAMA2_RHO3",
    "STEP_DATASHEET",
    "STEP_FUSED",
    "CacheRatioBatch",
    "CacheRatioPlan",
    "CacheRatioProblem",
    "Calibration",
    "ClairvoyantProblem",
    "ComputeUnit",
    "Device",
    "Engine",
    "Error",
    "Estimate",
    "FormsCost",
    "FormsPlan",
    "FormsSchedule",
    "GenerationCost",
    "Interval",
    "Kernel",
    "KernelMappingPlan",
    "KernelMappingProblem",
    "KernelMappingTables",
    "KernelModel",
    "KernelTime",
    "Kind",
    "LLMConfig",
    "Lengths",
    "LinearTime",
    "Link",
    "Matrix",
    "MemoryTier",
    "MiniBatchPlan",
    "MiniBatchProblem",
    "OffloadBaseline",
    "OffloadCost",
    "OffloadDecision",
    "OffloadDesigns",
    "OffloadLayer",
    "OffloadMachine",
    "OffloadProfile",
    "OffloadRatios",
    "OffloadService",
    "OffloadState",
    "OffloadSteps",
    "Operation",
    "Parameter",
    "PathCost",
    "PlacementPlan",
    "PlacementProblem",
    "PlacementProfile",
    "PlanCost",
    "PolicyState",
    "Profile",
    "RatioLayer",
    "RecomputeSplitBatch",
    "RecomputeSplitPlan",
    "RecomputeSplitProblem",
    "Request",
    "Residency",
    "RooflineTime",
    "Service",
    "ServingLimits",
    "ServingState",
    "Split",
    "SplitGeneration",
    "StepEnergy",
    "StepEstimate",
    "StepMachines",
    "StepModel",
    "StepProfile",
    "StepWindow",
    "System",
    "SystemArea",
    "SystemCost",
    "Systems",
    "TokenBytes",
    "Trace",
    "TransitionCost",
    "Workload",
    "best_splits",
    "check_shapes",
    "device_named",
    "devices",
    "energy_per_token",
    "error_of",
    "fixed_trace",
    "h2m2_trace",
    "kernel_model",
    "kernels",
    "links",
    "mean_power",
    "offload_layers",
    "offload_profile",
    "offload_ratios",
    "poisson_trace",
    "read_devices",
    "read_records",
    "record_for",
    "shipped_records",
    "split_generation",
    "static_power",
    "step_energy",
    "step_kernels",
    "step_profile",
    "system_area",
    "system_cost",
    "tensor_parallel",
    "uniform_trace",
    "usd_per_Mtok",
]
