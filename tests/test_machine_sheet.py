"""The numbers of a profile's data sheet: their digits, and the one rate that stands for attention of all shapes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_machine_kernels import BOTH, HOST

from memsplit.dse.machine import MachineProfile
from memsplit.dse.machine._kernels import Cell, HostKernels, Rate
from memsplit.dse.machine._sheet import attention_rate, upwards
from memsplit.dse.machine._torch import TorchKernels
from memsplit.models import System
from memsplit.models.units import GB, quantity


@given(st.floats(1e-6, 1e6))
def test_rates_are_rounded_up_to_four_digits(value: float):
    """Not below the measured rate, which would make it beat the sheet, and not more than a digit above."""
    found = quantity(upwards(value * GB, GB, "GB/s"), "bandwidth")
    assert value * GB * (1 - 1e-15) <= found <= value * GB * 1.0011


def attention(kv_heads: int, compute: float, *, heads: int = 32, seq: int = 512) -> Rate:
    """Attention of 32 bits at so many FLOP/s; its bytes are 2 kv_heads/heads of its FLOPs, without queries and outputs."""
    flops = 4.0 * seq * heads * 128
    shape = {"batch": 1, "seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": 128}
    cell = Cell(device="cpu", kind="host_attention", shape=shape, prepare=lambda: float, flops=flops, nbytes=flops * 2 * kv_heads / heads)
    return Rate(cell, flops / compute, 0.0, 9)


def worst_factor(rates: list[Rate], bandwidth: float, compute: float) -> float:
    """Between measured seconds and max(bytes / bandwidth, FLOPs / compute)."""
    found = [max(one.cell.nbytes / bandwidth, one.cell.flops / compute) / one.seconds for one in rates]
    return max(max(one, 1 / one) for one in found)


def test_slow_and_fast_attention_are_met_in_the_middle():
    """MHA at 6 GFLOP/s and GQA by 4 at 24 move 12 GB/s each, far from 60: 12 GFLOP/s is a factor of 2 from either."""
    slow, fast, faster = attention(32, 6e9), attention(8, 24e9), attention(4, 54e9)
    found = attention_rate([slow, fast], 60e9)
    assert found.rate == pytest.approx(12e9)
    assert found.said.startswith("predicts attention within a factor of 2 of the best of each")
    assert "(32/32/128: 6.000 GFLOP/s, 32/8/128: 24.00 GFLOP/s)" in found.said
    assert attention_rate([slow, fast, faster], 60e9).rate == pytest.approx(18e9)
    assert attention_rate([slow, attention(32, 3e9, seq=64), fast], 60e9).rate == pytest.approx(12e9)  # of a group the best shape counts
    assert attention_rate([], 60e9).rate == 0


def test_attention_that_memory_limits_is_not_slowed_down_twice():
    """12 of 15 GB/s are said by the bandwidth: MHA is 1.25 times too fast at any rate, and the best one is right for the other."""
    found = attention_rate([attention(32, 6e9), attention(4, 24e9)], 15e9)
    assert found.rate == pytest.approx(24e9)
    assert "within a factor of 1.2 " in found.said  # 1.25, rounded to even


@given(
    st.dictionaries(st.sampled_from((1, 2, 4, 8, 16, 32)), st.floats(1e9, 1e12), min_size=1),
    st.floats(1e10, 1e12),
    st.floats(1e8, 1e13),
)
def test_no_other_rate_has_a_smaller_worst_factor(reached: dict[int, float], bandwidth: float, other: float):
    """Attention of several groups of heads, none faster than the memory; another rate is as far off at best, but for rounding to 1e-9."""
    rates = [attention(kv_heads, min(compute, bandwidth / 2 * 32 / kv_heads)) for kv_heads, compute in reached.items()]
    found = attention_rate(rates, bandwidth)
    assert worst_factor(rates, bandwidth, found.rate) <= worst_factor(rates, bandwidth, other) * (1 + 1e-8)


def law(cell: Cell) -> Rate:
    """A machine of 100 GB/s on which attention reaches 6 GFLOP/s for each query head of a KV head, and products 100."""
    compute = 6e9 * cell.shape["heads"] / cell.shape["kv_heads"] if "heads" in cell.shape else 1e11
    return Rate(cell, max(cell.flops / compute, cell.nbytes / 100e9, 1e-6), 0.0, 9)


def measured(cells: list[Cell], **more: object) -> MachineProfile:
    given = {"machine": HOST, "device": "cpu", "threads": 1, "rates": tuple(map(law, cells)), "date": "2026-01-02"}
    return MachineProfile(**(given | more))  # type: ignore[arg-type]


def test_the_rate_of_attention_does_not_depend_on_the_grid():
    """Groups of 1, 1, 4 and 8 query heads for a KV head at 6, 6, 24 and 48 GFLOP/s, of a quick and of a full profile: 17 is the middle."""
    peaks = [measured(HostKernels(threads=1, quick=quick, machine=HOST).cells()).system().units[0].vector_peak for quick in (True, False)]
    assert peaks[0] == peaks[1] == pytest.approx(math.sqrt(6e9 * 48e9), rel=1e-3)  # four digits
    grids = [TorchKernels(torch=None, machine=BOTH, quick=quick, size=2**32).cells() for quick in (True, False)]
    names = ("heads", "kv_heads", "head_dim")
    groups = [{tuple(one.shape[name] for name in names) for one in cells if one.kind == "decode_attention"} for cells in grids]
    assert groups[0] == groups[1]


def test_a_device_has_the_best_rate_and_a_system_the_typical_one_and_says_so(tmp_path):
    """No row may beat the device that records are fitted for; plans are priced by the system."""
    made = measured(HostKernels(threads=1, quick=True, machine=HOST).cells())
    assert made.profiled().vector_peak == pytest.approx(48e9, rel=1e-3)
    assert 'vector_peak = "48.00 GFLOP/s"' in made.device_text()
    text = made.system_text()
    (source,) = [line for line in text.splitlines() if line.startswith("source = ")]
    assert "vector_peak of Example CPU: predicts attention within a factor of 2.8 of the best" in source
    for group, rate in (("8/8/128", "6.000"), ("32/8/128", "24.00"), ("16/2/128", "48.00")):
        assert f"{group}: {rate} GFLOP/s" in source
    (tmp_path / "m.toml").write_text(text)
    assert System.from_toml(tmp_path / "m.toml") == made.system()


def test_a_system_prices_attention_within_what_its_groups_reach():
    """On the law's machine, whose groups are a factor of 8 apart, none is further off than its root."""
    made = measured(HostKernels(threads=1, quick=True, machine=HOST).cells())
    system = made.system()
    bandwidth, peak = system.tiers[0].bandwidth, system.units[0].vector_peak
    for one in made.rates:
        if one.cell.kind == "host_attention":
            predicted = max(one.cell.nbytes / bandwidth, one.cell.flops / peak)
            assert 1 / math.sqrt(8) * (1 - 1e-3) <= predicted / one.seconds <= math.sqrt(8) * (1 + 1e-3)  # four digits


def test_without_attention_the_matrix_peak_stands_for_it_and_is_not_called_attention():
    made = measured([one for one in HostKernels(threads=1, quick=True, machine=HOST).cells() if one.kind != "host_attention"])
    unit = made.system().units[0]
    assert unit.vector_peak == unit.matrix_peak == pytest.approx(1e11, rel=1e-3)
    assert "vector_peak of" not in made.system_text()
    assert made.profiled().vector_peak == unit.vector_peak
