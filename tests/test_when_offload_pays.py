"""When caching activations pays: published shapes, laws of the break-even points, and what the study says."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memsplit.models import Workload
from memsplit.models.offload import OffloadLayer, OffloadMachine, offload_layers, offload_ratios
from memsplit.models.offload_profiles import DATASHEET, HYBRIDSERVE_PAPER
from memsplit.models.overlap import best_fluid_share, fluid
from memsplit.models.presets import LLMS, SYSTEMS
from memsplit.models.units import GB, TB, TFLOPS
from memsplit.studies import when_offload_pays
from memsplit.studies.when_offload_pays import (
    INT4,
    PRECISIONS,
    WORTH,
    break_even_cpu,
    break_even_link,
    cpu_attention_time,
    first_context,
    fluid_terms,
    layer_times,
    most_frequent_layer,
    priced,
    saving,
    worth_it_link,
)

RTX_4090 = OffloadMachine.build(SYSTEMS["rtx4090_pcie4"], HYBRIDSERVE_PAPER)


def workload(name: str, *, act_bits: float = 16, kv_bits: float = 16, batch: int = 32, context: int = 1024) -> Workload:
    return Workload(llm=LLMS[name], batch=batch, context=context, weight_bits=16, activation_bits=act_bits, kv_bits=kv_bits)


def r(name: str, act_bits: float = 16, kv_bits: float = 16) -> float:
    """Bytes of a token's activations over those of its keys and values."""
    found = {offload_ratios(layer, RTX_4090, 1).r for layer in offload_layers(workload(name, act_bits=act_bits, kv_bits=kv_bits))}
    (ratio,) = found  # every layer has the same state
    return ratio


# Which LLMs


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("opt-30b", 7168 / (2 * 7168)),  # MHA whose heads make up the hidden size: a half
        ("llama2-7b", 4096 / (2 * 4096)),
        ("gemma-7b", 3072 / (2 * 16 * 256)),  # MHA of 16 heads of 256, wider than the hidden size: 0.375
        ("qwen3-0.6b", 1024 / (2 * 8 * 128)),  # GQA of 8 heads of 128, as wide as the hidden size: a half
        ("llama3.1-8b", 4096 / (2 * 8 * 128)),  # GQA, groups of 4: 2
        ("llama2-70b", 8192 / (2 * 8 * 128)),  # GQA, groups of 8: 4
        ("deepseek-v3", 7168 / (512 + 64)),  # MLA: the latent and the rotary key
    ],
)
def test_ratio_of_published_llms(name: str, ratio: float):
    """h / (2 n_kv d) at equal precision, whatever the precision."""
    assert r(name) == r(name, 8, 8) == ratio
    assert (r(name) < 1) == (name in ("opt-30b", "llama2-7b", "gemma-7b", "qwen3-0.6b"))


def test_the_ratios_are_the_known_ones():
    assert [r(name) for name in ("llama3.1-8b", "llama2-70b", "gemma-7b", "qwen3-0.6b")] == [2, 4, 0.375, 0.5]
    assert r("deepseek-v3") == pytest.approx(12.4, abs=0.05)  # published with one decimal


def test_act_of_4_bits_revives_groups_of_4():
    """A quarter of the bytes: r = 2 becomes 0.5, and 4.5 / 8 with a 16-bit scale and zero point for every 64 elements."""
    assert INT4 == 4.5
    assert r("llama3.1-8b", 4, 16) == 0.5
    assert r("llama3.1-8b", INT4, 16) == 0.5625
    # Groups of 8 only break even, and lose with the scales.
    assert r("llama2-70b", 4, 16) == 1.0
    assert r("llama2-70b", INT4, 16) > 1


@pytest.mark.parametrize("kv_bits", [4, INT4])
@pytest.mark.parametrize("name", LLMS)
def test_act_of_16_bits_never_pays_against_keys_and_values_of_4(name: str, kv_bits: float):
    """r grows by 16 / 4.5 at least, above 1 from 0.28 on: an LLM would need heads 1.8 times as wide as its hidden size."""
    assert r(name, 16, kv_bits) > 1


# Times


@pytest.mark.parametrize("name", LLMS)
@pytest.mark.parametrize(("act_bits", "kv_bits"), PRECISIONS)
def test_the_best_share_is_best_and_zero_where_act_is_larger(name: str, act_bits: float, kv_bits: float):
    asked = workload(name, act_bits=act_bits, kv_bits=kv_bits)
    times = layer_times(asked, RTX_4090)
    terms = fluid_terms(most_frequent_layer(asked), RTX_4090, asked.batch * asked.context)
    grid = fluid(np.linspace(0, 1, 101), **terms)
    # Equal times in another order of adding.
    assert times.best_act <= grid.min() * (1 + 1e-12)
    assert (times.kv_only, times.act_only) == (grid[0], grid[-1])
    if r(name, act_bits, kv_bits) >= 1:
        assert times.share == 0
        assert times.best_act == times.kv_only
    else:
        assert times.best_act < times.kv_only


def test_opt_30b_by_hand():
    """32 x 1024 tokens at 25 GB/s: weights 12 h^2 of 2 bytes and keys and values 2 h of 2 bytes a token over the link."""
    h, tokens = 7168, 32 * 1024
    times = layer_times(workload("opt-30b"), RTX_4090)
    weights, kv = 24 * h * h / 25e9, tokens * 4 * h / 25e9
    # The profile's 25 GB/s is a share of the data sheet's 31.5, and sums differ in their last digits.
    assert times.kv_only == pytest.approx(weights + kv, rel=1e-12)
    assert times.act_only == pytest.approx(weights + kv / 2, rel=1e-12)
    assert times.int4_kv == pytest.approx(weights + kv * 4.5 / 16, rel=1e-12)
    # The CPU reads keys and values at 204.8 GB/s while the weights of the next layer cross the link, which takes longer.
    assert kv * 25 / 204.8 < weights
    assert times.cpu_attention == pytest.approx(weights, rel=1e-12)


def test_attention_on_the_cpu_is_never_below_what_the_host_sends_and_reads():
    """A fast link and a slow host memory: weights and keys and values leave the same memory."""
    layer = most_frequent_layer(workload("llama2-7b"))
    tokens = 32 * 1024
    machine = replace(RTX_4090, to_device=100 * GB, host_bandwidth=100 * GB)
    assert cpu_attention_time(layer, machine, tokens) >= (layer.read_bytes + tokens * layer.kv_bytes) / (100 * GB)
    assert cpu_attention_time(layer, replace(machine, cpu_peak=None), tokens) is None
    slow = replace(machine, cpu_peak=0.001 * TFLOPS)
    assert cpu_attention_time(layer, slow, tokens) >= tokens * layer.attention_flops / (0.001 * TFLOPS)


def test_experts_widen_the_window():
    """Mixtral's experts make its weights' transfer longer than that of Llama-3-8B, which has the same attention and so the same r."""
    sparse, dense = (offload_ratios(most_frequent_layer(workload(name)), RTX_4090, 32 * 1024) for name in ("mixtral-8x7b", "llama3.1-8b"))
    assert sparse.r == dense.r
    assert sparse.rho == dense.rho
    assert sparse.w > 5 * dense.w


def test_deepseek_is_priced_by_its_layers_with_experts():
    assert most_frequent_layer(workload("deepseek-v3")).layers == 58


# Break-even points


machines = st.builds(
    OffloadMachine,
    gpu=st.just("GPU"),
    host=st.just("host"),
    peak=st.floats(1, 1000).map(lambda value: value * TFLOPS),
    gpu_bandwidth=st.floats(0.1, 8).map(lambda value: value * TB),
    host_bandwidth=st.floats(50, 1000).map(lambda value: value * GB),
    to_device=st.floats(1, 500).map(lambda value: value * GB),
    to_host=st.just(25 * GB),
    cpu_peak=st.floats(0.1, 20).map(lambda value: value * TFLOPS),
    gpu_capacity=st.just(24 * GB),
    host_capacity=st.just(882 * GB),
)
layers = st.builds(
    lambda name, bits, batch: most_frequent_layer(workload(name, act_bits=bits[0], kv_bits=bits[1], batch=batch)),
    st.sampled_from(sorted(LLMS)),
    st.sampled_from(PRECISIONS),
    st.sampled_from([1, 32, 4096]),
)
token_counts = st.integers(1, 10**7)


def best_share(layer: OffloadLayer, machine: OffloadMachine, tokens: float) -> float:
    return float(best_fluid_share(**fluid_terms(layer, machine, tokens)))


@settings(max_examples=60)
@given(layer=layers, machine=machines, tokens=token_counts)
def test_the_best_share_becomes_zero_at_the_break_even_link(layer: OffloadLayer, machine: OffloadMachine, tokens: int):
    """A thousandth below it something is recomputed, a thousandth above nothing; if it never pays, not even on a slow link."""
    link = break_even_link(layer, machine, tokens)
    if link is None:
        assert layer.act_bytes >= layer.kv_bytes
        assert best_share(layer, replace(machine, to_device=1.0), tokens) == 0
    else:
        assert best_share(layer, replace(machine, to_device=link * 0.999), tokens) > 0
        assert best_share(layer, replace(machine, to_device=link * 1.001), tokens) == 0


@settings(max_examples=60)
@given(layer=layers, machine=machines, tokens=token_counts)
def test_the_saving_falls_with_the_link_and_crosses_the_threshold_once(layer: OffloadLayer, machine: OffloadMachine, tokens: int):
    """What the bisection needs: more bandwidth never makes recomputing save a larger share."""
    savings = [float(saving(layer, replace(machine, to_device=rate), tokens)) for rate in np.geomspace(1e6, 1e14, 33)]
    # 1e-9: differences of equal times, relative to the saving's scale of 1.
    assert np.diff(savings).max() <= 1e-9
    link = worth_it_link(layer, machine, tokens)
    if link is None:
        assert savings[0] <= WORTH + 1e-9
    else:
        assert saving(layer, replace(machine, to_device=link * 0.999), tokens) >= WORTH - 1e-9
        assert saving(layer, replace(machine, to_device=link * 1.001), tokens) <= WORTH + 1e-9


@settings(max_examples=60)
@given(layer=layers, machine=machines, tokens=token_counts)
def test_attention_on_the_cpu_wins_above_its_break_even_bandwidth_only(layer: OffloadLayer, machine: OffloadMachine, tokens: int):
    best = float(fluid(best_share(layer, machine, tokens), **fluid_terms(layer, machine, tokens)))
    found = break_even_cpu(layer, machine, tokens, best)
    if found is None:
        assert cpu_attention_time(layer, replace(machine, host_bandwidth=1e18), tokens) >= best * (1 - 1e-12)
        return
    assert found >= machine.to_device
    assert cpu_attention_time(layer, replace(machine, host_bandwidth=found * 1.001), tokens) < best
    if found > machine.to_device * 1.01:
        assert cpu_attention_time(layer, replace(machine, host_bandwidth=found * 0.999), tokens) > best


@settings(max_examples=10)
@given(layer=layers, machine=machines, least=st.sampled_from([0.0, WORTH]))
def test_the_first_context_is_the_first(layer: OffloadLayer, machine: OffloadMachine, least: float):
    """Looked up one by one, just before it and at it."""
    found = first_context(layer, machine, least=least)
    assume(found is not None)
    assert saving(layer, machine, layer.batch * found) > least
    for earlier in {1, found // 2, found - 1} - {0, found}:
        assert saving(layer, machine, layer.batch * earlier) <= max(least, 1e-12)


def test_weights_hide_what_short_contexts_could_save():
    """OPT-30B: saving (1 - r) n kv of W + n kv is above 5 % from n = W / 9 kv on: 12 h^2 * 2 / (9 * 4 h * 32) = 149.3 tokens."""
    layer = most_frequent_layer(workload("opt-30b"))
    assert first_context(layer, RTX_4090, least=WORTH) == 150
    # The link, not the GPU, is busy longer from the first token on.
    assert first_context(layer, RTX_4090, least=0.0) == 1


def test_a_busy_gpu_hides_the_transfer_of_short_contexts():
    """A GPU of 50 TFLOP/s with 4096 requests: its products take longer than the link's weights and first tokens."""
    layer = most_frequent_layer(workload("opt-6.7b", batch=4096))
    machine = replace(RTX_4090, peak=50 * TFLOPS, gpu_capacity=10 * GB)
    found = first_context(layer, machine, least=0.0)
    assert found > 1
    # (W + b s kv) / link = (linear + b s attention) / peak, solved for s.
    attention = layer.attention_flops / machine.peak
    exact = (layer.linear_flops / machine.peak - layer.weight_time(machine)) / (
        layer.batch * (layer.kv_bytes / machine.to_device - attention)
    )
    assert found == np.floor(exact) + 1
    assert priced(workload("opt-6.7b", batch=4096, context=1), machine)["recommendation"].startswith("does not pay: the GPU is busy")


def test_an_endless_link_leaves_nothing_to_save():
    machine = replace(RTX_4090, to_device=float("inf"))
    assert layer_times(workload("opt-30b"), machine).share == 0


# The study


@pytest.mark.parametrize("name", LLMS)
def test_recommendations_refuse_where_act_is_larger(name: str):
    row = priced(workload(name, batch=1024), RTX_4090)  # so many that no GPU holds their state
    ratio = LLMS[name].hidden_size / LLMS[name].state_elements
    assert row["act_can_pay"] == (ratio < 1)
    if ratio >= 1:
        assert row["recommendation"].startswith(f"does not pay: r = {ratio:.2f} >= 1")
        assert (row["break_even_link_GBps"], row["pays_from_context_tokens"], row["worth_it_to_link_GBps"]) == (None, None, None)
    else:
        assert row["recommendation"].startswith("pays: ")
    faster = row["cpu_attention_layer_s"] < row["best_act_layer_s"]
    assert ("attention on the CPU is faster" in row["recommendation"]) == faster
    assert ("KV of 4.5 bits is faster" in row["recommendation"]) == (row["int4_kv_layer_s"] < row["best_act_layer_s"])
    no_cpu = priced(workload(name, batch=1024), replace(RTX_4090, cpu_peak=None))
    assert (no_cpu["cpu_attention_layer_s"], no_cpu["cpu_bandwidth_to_win_over_link"]) == (None, None)
    assert "CPU" not in no_cpu["recommendation"]


def test_nothing_is_recommended_where_nothing_needs_offloading():
    """Qwen3-0.6B with 32 x 1024 tokens in 19.2 GB; one byte less, and it does."""
    held = workload("qwen3-0.6b").weight_bytes + workload("qwen3-0.6b").state_bytes
    row = priced(workload("qwen3-0.6b"), replace(RTX_4090, gpu_capacity=held))
    assert row["fits_on_gpu"]
    assert row["recommendation"].startswith("nothing needs offloading")
    assert priced(workload("qwen3-0.6b"), replace(RTX_4090, gpu_capacity=held - 1))["recommendation"].startswith("pays")


def test_llama2_70b_is_refused_with_its_ratio():
    assert priced(workload("llama2-70b"), RTX_4090)["recommendation"].startswith("does not pay: r = 4.00 >= 1")


def test_the_study_writes_a_row_for_each_llm_and_precision(tmp_path, capsys):
    """And empty cells where there is no break-even point."""
    out = tmp_path / "out.csv"
    assert when_offload_pays.main(["--quick", "--out", str(out), "--batch", "8", "--context", "512"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(when_offload_pays.QUICK) * len(PRECISIONS)
    assert {row["profile"] for row in rows} == {HYBRIDSERVE_PAPER.name}
    refused = [row for row in rows if float(row["r"]) >= 1]
    assert refused
    assert all(row["break_even_link_GBps"] == row["pays_from_context_tokens"] == "" for row in refused)
    assert all(row["pays_from_context_tokens"].isdigit() for row in rows if float(row["r"]) < 1)
    said = capsys.readouterr().out
    assert "At equal precision ACT can pay (r < 1) for 3 of 7 LLMs: gemma-7b, opt-30b, qwen3-0.6b." in said
    assert "ACT of 16 bits against KV of 4.5 can pay for: none." in said


def test_another_machine_is_taken_at_its_data_sheet(tmp_path):
    out = tmp_path / "out.csv"
    assert when_offload_pays.main(["--quick", "--out", str(out), "--system", "a100_pcie4"]) == 0
    with out.open(newline="") as file:
        assert {row["profile"] for row in csv.DictReader(file)} == {DATASHEET.name}


def test_a_machine_without_a_host_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="one tier") as refusal:
        when_offload_pays.main(["--quick", "--out", str(tmp_path / "out.csv"), "--system", "hbm_8"])
    assert "\n" not in str(refusal.value)
