"""Design-space exploration: compare solvers, search hardware, filter Pareto fronts, write tables."""

if not __name__.startswith("memsplit."):
    raise ImportError("import memsplit.dse, not dse: two copies of each class would break isinstance and pickles")

from .break_even import BreakEven, Flip, break_even
from .compare import compare
from .confidence import draws, error_bars, ranking, resolution, told_apart
from .explain import Bottleneck, Explanation, Lever, MemoryUse, Worth, explain
from .explore import Constraint, explore
from .machine import MachineProfile, check_same_machine, profile_machine, this_machine, write_profile
from .mapping_score import MappingScore
from .mapping_sweep import MappingSweep
from .measured_sets import MeasuredSet, calibrated_sets, measured_sets
from .measurements import Measurements, calibrate, read_measurements, write_records
from .offload_score import OffloadScore
from .pareto import Objective, hypervolume, minimised, non_dominated, pareto
from .plan_score import PlanScore
from .plots import plot_front, plot_lines, plot_replay
from .ratio_sweep import RatioSweep
from .record import record
from .replay import Against, Migration, Replay, against_optimum, replay
from .replay_offload import OffloadAgainst, OffloadReplay, against_offload_optimum, replay_offload
from .rerun import explain_row, rerun
from .runtime import CachePlan, EmulatedLink, FullKV, Generation, LayerTimes, Placement, Runtime, SplitKV, TransferKV
from .samplers import GP, NSGA2, NSGA3, QMC, SAMPLERS, TPE, RandomSearch, Sampler, sampler_named
from .speedup import H2M2_SWEEPS, Method, h2m2_methods, speedups
from .split_sweep import SplitSweep
from .step_sweep import StepSweep
from .study import INTERRUPTED, beside, finished_rows, positive, served, serving_arguments, show, study_arguments
from .sweep import Grid, Sobol, sweep
from .table import check_writable, from_json, read_designs, read_table, to_json, write_csv, write_parquet

__all__ = [
    "GP",
    "H2M2_SWEEPS",
    "INTERRUPTED",
    "NSGA2",
    "NSGA3",
    "QMC",
    "SAMPLERS",
    "TPE",
    "Against",
    "Bottleneck",
    "BreakEven",
    "CachePlan",
    "Constraint",
    "EmulatedLink",
    "Explanation",
    "Flip",
    "FullKV",
    "Generation",
    "Grid",
    "LayerTimes",
    "Lever",
    "MachineProfile",
    "MappingScore",
    "MappingSweep",
    "MeasuredSet",
    "Measurements",
    "MemoryUse",
    "Method",
    "Migration",
    "Objective",
    "OffloadAgainst",
    "OffloadReplay",
    "OffloadScore",
    "Placement",
    "PlanScore",
    "RandomSearch",
    "RatioSweep",
    "Replay",
    "Runtime",
    "Sampler",
    "Sobol",
    "SplitKV",
    "SplitSweep",
    "StepSweep",
    "TransferKV",
    "Worth",
    "against_offload_optimum",
    "against_optimum",
    "beside",
    "break_even",
    "calibrate",
    "calibrated_sets",
    "check_same_machine",
    "check_writable",
    "compare",
    "draws",
    "error_bars",
    "explain",
    "explain_row",
    "explore",
    "finished_rows",
    "from_json",
    "h2m2_methods",
    "hypervolume",
    "measured_sets",
    "minimised",
    "non_dominated",
    "pareto",
    "plot_front",
    "plot_lines",
    "plot_replay",
    "positive",
    "profile_machine",
    "ranking",
    "read_designs",
    "read_measurements",
    "read_table",
    "record",
    "replay",
    "replay_offload",
    "rerun",
    "resolution",
    "sampler_named",
    "served",
    "serving_arguments",
    "show",
    "speedups",
    "study_arguments",
    "sweep",
    "this_machine",
    "to_json",
    "told_apart",
    "write_csv",
    "write_parquet",
    "write_profile",
    "write_records",
]
