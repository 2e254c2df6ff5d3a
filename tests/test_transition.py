"""What changing a mapping moves: what a memory grows by, whole pages, whatever the other one gives up."""

from itertools import pairwise

import pytest
from problems import table_problem

from memsplit.models import KernelMappingPlan, KernelMappingProblem, Workload
from memsplit.models.kernel_mapping import moves
from memsplit.models.presets import H2M2_SYSTEM, LLMS
from memsplit.models.units import GB


def test_one_slice_at_a_time_moves_what_all_at_once_move():
    """Chinchilla's qkv, whose slices are smaller than a page: from 20 to 40 of 64 heads on the HBM, 5 GB, and back."""
    problem = KernelMappingProblem.build(H2M2_SYSTEM, Workload(llm=LLMS["chinchilla-70b"], batch=32, context=1024))
    others = [(kind.slices // 2, kind.slices - kind.slices // 2) for kind in problem.kinds[1:]]
    slices = problem.kinds[0].slices
    plans = [KernelMappingPlan.same_in_all_layers(problem, [(n, slices - n), *others]) for n in range(20, 41)]
    for path in (plans, plans[::-1]):
        steps = [sum(problem.transition(one, other).moved.values()) for one, other in pairwise(path)]
        at_once = problem.transition(path[0], path[-1]).moved
        assert len(at_once) == 1
        assert sum(steps) == sum(at_once.values()) > 4 * GB


def test_pages_that_only_one_side_feels_are_moved_once():
    """Pages 0, 3, 3, 3 on the first memory and 0, 0, 3, 5 on the second, of 2 B: the first slice fills a page that frees none."""
    problem = table_problem([[[0.0, 1, 1, 1], [0.0, 1, 1, 1]]], [[[0, 3, 3, 3], [0, 0, 3, 5]]], [9, 9], layers=[1], page=2)
    plan = {n: KernelMappingPlan.same_in_all_layers(problem, [(n, 3 - n)]) for n in range(4)}
    assert moves([6, -4], [1, -1]) == [(1, 0, 6)]
    assert moves([0, 6], [-1, 1]) == [(0, 1, 6)]
    assert moves([-6, 2, 8], [-2, 1, 1]) == [(0, 1, 2), (0, 2, 8)]
    assert moves([0, 0], [1, -1]) == []
    with pytest.raises(ValueError, match="build the problem from a System"):
        problem.transition(plan[0], plan[1])
