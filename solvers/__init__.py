"""Algorithms: each takes a problem and returns a SolverResult."""

if not __name__.startswith("memsplit."):
    raise ImportError("import memsplit.solvers, not solvers: two copies of each class would break isinstance and pickles")

from .cache_ratio import ActFirstRatio, CpSatRatio, EnumerationRatio, HybridServeRatio, LpRatio, MilpRatio, SingleFormRatio
from .cache_ratio_batch import RatioSolutions, solve_ratios
from .clairvoyant import ClairvoyantBound, DynamicProgramClairvoyant, ExactClairvoyant, MilpClairvoyant, Regret, regret
from .kernel_mapping import ConvexMapping, CpSatMapping, MilpMapping, PatternMapping, TableMapping
from .kernel_mapping_front import FrontPlan, front_of_designs, latency_energy_front
from .kernel_mapping_heuristics import FlexGenMapping, GreedyMapping, MajorMapping, NaiveMapping, SingleTierMapping, UniformMapping
from .mini_batches import CpSatBatches, FirstComeBatches, GreedyRatioBatches, MilpBatches
from .placement import CharnesCooperPlacement, FixedPlacement, FlexGenPlacement, PulpPlacement
from .policies import FlexGenStatic, Greedy, Hysteresis, LookAhead, Myopic, Policy, Shortlist, SingleTier, Static
from .recompute_split import ClosedFormSplit, CpSatSplit, EnumerationSplit, FixedShareSplit, MilpSplit
from .recompute_split_batch import SplitSolutions, solve_splits
from .result import Solver, SolverResult, Status

__all__ = [
    "ActFirstRatio",
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
    "FixedShareSplit",
    "FlexGenMapping",
    "FlexGenPlacement",
    "FlexGenStatic",
    "FrontPlan",
    "Greedy",
    "GreedyMapping",
    "GreedyRatioBatches",
    "HybridServeRatio",
    "Hysteresis",
    "LookAhead",
    "LpRatio",
    "MajorMapping",
    "MilpBatches",
    "MilpClairvoyant",
    "MilpMapping",
    "MilpRatio",
    "MilpSplit",
    "Myopic",
    "NaiveMapping",
    "PatternMapping",
    "Policy",
    "PulpPlacement",
    "RatioSolutions",
    "Regret",
    "Shortlist",
    "SingleFormRatio",
    "SingleTier",
    "SingleTierMapping",
    "Solver",
    "SolverResult",
    "SplitSolutions",
    "Static",
    "Status",
    "TableMapping",
    "UniformMapping",
    "front_of_designs",
    "latency_energy_front",
    "regret",
    "solve_ratios",
    "solve_splits",
]
