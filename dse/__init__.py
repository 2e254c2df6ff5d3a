"""Design-space exploration: compare solvers, search hardware, filter Pareto fronts, write tables."""

if not __name__.startswith("memsplit."):
    raise ImportError("import memsplit.dse, not dse: two copies of each class would break isinstance and pickles")

from .compare import compare
from .explore import Constraint, explore
from .mapping_score import MappingScore
from .offload_score import OffloadScore
from .pareto import Objective, hypervolume, non_dominated, pareto
from .plots import plot_front, plot_lines
from .rerun import rerun
from .speedup import H2M2_SWEEPS, Method, h2m2_methods, speedups
from .study import positive, served, serving_arguments, show, study_arguments
from .table import check_writable, from_json, read_designs, to_json, write_csv

__all__ = [
    "H2M2_SWEEPS",
    "Constraint",
    "MappingScore",
    "Method",
    "Objective",
    "OffloadScore",
    "check_writable",
    "compare",
    "explore",
    "from_json",
    "h2m2_methods",
    "hypervolume",
    "non_dominated",
    "pareto",
    "plot_front",
    "plot_lines",
    "positive",
    "read_designs",
    "rerun",
    "served",
    "serving_arguments",
    "show",
    "speedups",
    "study_arguments",
    "to_json",
    "write_csv",
]
