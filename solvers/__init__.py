"""Algorithms: each takes a problem and returns a SolverResult."""

if not __name__.startswith("memsplit."):
    raise ImportError("import memsplit.solvers, not solvers: two copies of each class would break isinstance and pickles")

from .cache_ratio import ActFirstRatio, CpSatRatio, EnumerationRatio, HybridServeRatio, LpRatio, MilpRatio, SingleFormRatio
from .cache_ratio_batch import RatioSolutions, solve_ratios
from .calibration import fit
from .clairvoyant import ClairvoyantBound, DynamicProgramClairvoyant, ExactClairvoyant, MilpClairvoyant, Regret, regret
from .clairvoyant_offload import LpForms, MilpForms, StepBoundForms
from .kernel_mapping import ConvexMapping, CpSatMapping, MilpMapping, PatternMapping, TableMapping
from .kernel_mapping_front import FrontPlan, front_of_designs, latency_energy_front
from .kernel_mapping_heuristics import FlexGenMapping, GreedyMapping, MajorMapping, NaiveMapping, SingleTierMapping, UniformMapping
from .mini_batches import CpSatBatches, FirstComeBatches, GreedyRatioBatches, MilpBatches
from .offload_policies import ActOnly, AdaptiveRatio, AdmissionRatio, FixedRatio, KvOnly, OffloadPolicy, RequestForms, StepSplit
from .placement import CharnesCooperPlacement, FixedPlacement, FlexGenPlacement, PulpPlacement
from .policies import FlexGenStatic, Greedy, HardwareCache, Hysteresis, LookAhead, Myopic, Policy, SingleTier, Static
from .policy_h2m2 import GreedyEviction
from .recompute_split import ClosedFormSplit, CpSatSplit, EnumerationSplit, FixedShareSplit, MilpSplit
from .recompute_split_batch import SplitSolutions, solve_splits
from .result import Solver, SolverResult, Status
from .shortlist import Shortlist

__all__ = [
    "ActFirstRatio",
    "ActOnly",
    "AdaptiveRatio",
    "AdmissionRatio",
    "CharnesCooperPlacement",
    "ClairvoyantBound",
    "ClosedFormSplit",
    "ConvexMapping",
    "CpSatBatches",
    "CpSatMapping",
    "CpSatRatio",
    "CpSatSplit",
    "DynamicProgramClairvoyant",
    "EnumerationRatio",
    "EnumerationSplit",
    "ExactClairvoyant",
    "FirstComeBatches",
    "FixedPlacement",
    "FixedRatio",
    "FixedShareSplit",
    "FlexGenMapping",
    "FlexGenPlacement",
    "FlexGenStatic",
    "FrontPlan",
    "Greedy",
    "GreedyEviction",
    "GreedyMapping",
    "GreedyRatioBatches",
    "HardwareCache",
    "HybridServeRatio",
    "Hysteresis",
    "KvOnly",
    "LookAhead",
    "LpForms",
    "LpRatio",
    "MajorMapping",
    "MilpBatches",
    "MilpClairvoyant",
    "MilpForms",
    "MilpMapping",
    "MilpRatio",
    "MilpSplit",
    "Myopic",
    "NaiveMapping",
    "OffloadPolicy",
    "PatternMapping",
    "Policy",
    "PulpPlacement",
    "RatioSolutions",
    "Regret",
    "RequestForms",
    "Shortlist",
    "SingleFormRatio",
    "SingleTier",
    "SingleTierMapping",
    "Solver",
    "SolverResult",
    "SplitSolutions",
    "Static",
    "Status",
    "StepBoundForms",
    "StepSplit",
    "TableMapping",
    "UniformMapping",
    "fit",
    "front_of_designs",
    "latency_energy_front",
    "regret",
    "solve_ratios",
    "solve_splits",
]
