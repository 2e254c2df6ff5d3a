"""Programs: HiGHS' bound, CBC and CP-SAT against enumeration of the whole variables."""

import itertools
import math

import numpy as np
import pytest

from memsplit.solvers import _cpsat, _pulp
from memsplit.solvers._program import Program, relaxation

GAP = 1e-4


def random_program(seed: int) -> Program:
    """Three whole variables of at most 6 and one time that is at least the larger of two sums; a capacity and sometimes a total."""
    rng = np.random.default_rng(seed)
    times = rng.uniform(0.01, 0.3, (2, 3)) * np.array([[1.0], [rng.choice([-0.5, 1.0])]])
    held = rng.integers(0, 5, 3).astype(float)
    total = rng.integers(3, 16)
    return Program(
        cost=np.array([0.0, 0.0, 0.0, 1.0]),
        upper=np.array([6.0, 6.0, 6.0, np.inf]),
        whole=np.array([True, True, True, False]),
        rows=np.vstack([np.column_stack([times, -np.ones(2)]), np.append(held, 0.0)]),
        room=np.array([-rng.uniform(0, 0.5), 0.2, float(rng.integers(5, 40))]),
        equal=np.array([[1.0, 1.0, 1.0, 0.0]]),
        total=np.array([float(total)]),
    )


def enumerated(program: Program) -> float:
    """The least cost, inf if nothing fits: the time is the larger of its two rows, and at least 0."""
    best = math.inf
    for x in itertools.product(range(7), repeat=3):
        if sum(x) == program.total[0] and program.rows[2, :3] @ x <= program.room[2]:
            best = min(best, max(0.0, *(program.rows[:2, :3] @ x - program.room[:2])))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_below_the_optimum_and_plans_reach_it(seed: int):
    program = random_program(seed)
    optimum = enumerated(program)
    answers = [
        _pulp.solve_program(program, relative_gap=GAP, time_limit=10.0),
        _cpsat.solve_program(program, relative_gap=GAP, scale=1.0, time_limit=10.0, threads=1, seed=0),
    ]
    relaxed = relaxation(program)
    if optimum == math.inf:
        assert all(answer.infeasible and answer.values is None for answer in answers)
        return
    assert relaxed.bound is not None
    assert relaxed.bound <= optimum * (1 + 1e-12)
    for answer in answers:
        assert answer.bound is not None
        assert answer.bound <= optimum * (1 + 1e-12)
        whole = answer.values[:3]
        assert whole.sum() == program.total[0]
        assert program.rows[2, :3] @ whole <= program.room[2]
        reached = max(0.0, *(program.rows[:2, :3] @ whole - program.room[:2]))
        assert optimum <= reached <= optimum + GAP  # CP-SAT's steps are a share of the scale, which is 1 here


def test_a_relaxation_without_solution_is_infeasible_everywhere():
    """More is asked for than the variables reach, even as fractions: CBC alone would crash here."""
    program = random_program(0)
    impossible = Program(
        cost=program.cost,
        upper=program.upper,
        whole=program.whole,
        rows=program.rows,
        room=program.room,
        equal=program.equal,
        total=np.array([19.0]),
    )
    assert relaxation(impossible).infeasible
    assert _pulp.solve_program(impossible, relative_gap=GAP, time_limit=10.0).infeasible
    assert _cpsat.solve_program(impossible, relative_gap=GAP, scale=1.0, time_limit=10.0, threads=1, seed=0).infeasible
