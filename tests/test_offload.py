"""Machines and layers of offloading: rates of a data sheet, bytes and FLOPs of an LLM, laws of the times, and what does not fit."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import workloads

from memsplit.models import ComputeUnit, Link, LLMConfig, MemoryTier, System, Workload
from memsplit.models.offload import OffloadCost, OffloadLayer, OffloadMachine, offload_layers, offload_ratios
from memsplit.models.offload_profiles import (
    DATASHEET,
    FLEXGEN_ON_HYBRIDSERVE,
    HYBRIDSERVE_PAPER,
    KVPR_NOMINAL,
    KVPR_PAPER,
    OffloadProfile,
)
from memsplit.models.overlap import best_chunked_share, best_fluid_share, best_staged_share, chunked, fluid, staged
from memsplit.models.presets import DEEPSEEK_V3, LLAMA2_70B, LLMS, MIXTRAL_8X7B, OPT_30B, SYSTEMS
from memsplit.models.units import GB, TB, TFLOPS

RTX_4090 = SYSTEMS["rtx4090_pcie4"]
A100 = SYSTEMS["a100_pcie4"]
PROFILES = (DATASHEET, KVPR_NOMINAL, KVPR_PAPER, HYBRIDSERVE_PAPER, FLEXGEN_ON_HYBRIDSERVE)
PHYSICAL = (DATASHEET, HYBRIDSERVE_PAPER, FLEXGEN_ON_HYBRIDSERVE)
ROUNDING = 1e-12
"""Relative difference of equal sums and products in another order: a few dozen terms, each off by 1.1e-16 at most."""

GPU = MemoryTier(name="HBM", capacity=40 * GB, bandwidth=1 * TB)
HOST = MemoryTier(name="host", capacity=512 * GB, bandwidth=200 * GB)
UNIT = ComputeUnit(name="GPU", tier="HBM", matrix_peak=300 * TFLOPS, vector_peak=50 * TFLOPS)
CPU = ComputeUnit(name="CPU", tier="host", matrix_peak=4 * TFLOPS, vector_peak=2 * TFLOPS)
DOWN = Link(source="host", target="HBM", bandwidth=30 * GB)
UP = Link(source="HBM", target="host", bandwidth=20 * GB)
SMALL = System(name="small", tiers=(GPU, HOST), units=(UNIT, CPU), links=(DOWN, UP))


def at_16_bits(llm: LLMConfig, *, batch: int = 32, context: int = 1024) -> Workload:
    return Workload(llm=llm, batch=batch, context=context, weight_bits=16, kv_bits=16, activation_bits=16)


# Machines


def test_a_machine_has_the_rates_of_its_data_sheet():
    machine = OffloadMachine.build(SMALL)
    assert machine == OffloadMachine(
        gpu="HBM",
        host="host",
        peak=300 * TFLOPS,
        gpu_bandwidth=1 * TB,
        host_bandwidth=200 * GB,
        to_device=30 * GB,
        to_host=20 * GB,
        cpu_peak=2 * TFLOPS,
        gpu_capacity=40 * GB,
        host_capacity=512 * GB,
    )
    assert pickle.loads(pickle.dumps(machine)) == machine
    assert OffloadMachine.build(replace(SMALL, units=(UNIT,))).cpu_peak is None


def test_a_profile_scales_rates_and_takes_its_part_of_the_memory():
    profile = OffloadProfile(
        name="half", compute=0.5, memory=0.6, to_device=0.7, to_host=0.8, host_memory=0.9, usable=0.75, reserved=2 * GB
    )
    machine = OffloadMachine.build(SMALL, profile)
    rates = (machine.peak, machine.gpu_bandwidth, machine.to_device, machine.to_host, machine.host_bandwidth, machine.gpu_capacity)
    assert rates == pytest.approx((150 * TFLOPS, 0.6 * TB, 21 * GB, 16 * GB, 180 * GB, 28 * GB), rel=ROUNDING)
    # An engine that needs more than there is leaves nothing, not less than nothing.
    assert OffloadMachine.build(SMALL, replace(profile, reserved=50 * GB)).gpu_capacity == 0


def test_a_link_is_no_faster_than_its_efficiency_and_the_memories_at_its_ends():
    slow_host = replace(SMALL, tiers=(GPU, replace(HOST, bandwidth=10 * GB)))
    machine = OffloadMachine.build(slow_host)
    assert (machine.to_device, machine.to_host) == (10 * GB, 10 * GB)
    lossy = replace(SMALL, links=(replace(DOWN, efficiency=0.5), UP))
    assert OffloadMachine.build(lossy).to_device == 15 * GB


def test_several_units_on_the_gpu_add_up():
    second = replace(UNIT, name="second GPU")
    assert OffloadMachine.build(replace(SMALL, units=(UNIT, second, CPU))).peak == 600 * TFLOPS


def test_the_papers_rates():
    """KVPR: 312 TFLOP/s, 32 GB/s nominal, 32 GiB/s in its table 1. HybridServe: 120 TFLOP/s and 25 GB/s, 4.8e3 FLOP/B."""
    nominal, table = OffloadMachine.build(A100, KVPR_NOMINAL), OffloadMachine.build(A100, KVPR_PAPER)
    assert (nominal.peak, nominal.to_device) == pytest.approx((312e12, 32e9), rel=ROUNDING)
    assert table.to_device == pytest.approx(32 * 2**30, rel=ROUNDING)
    # 32 requests of 1024 tokens of OPT-30B: 27.3 ms, written with one decimal.
    (layer,) = offload_layers(at_16_bits(OPT_30B))
    assert float(layer.kv_time(table, 32 * 1024)) * 1e3 == pytest.approx(27.3, abs=0.05)
    hybrid = OffloadMachine.build(RTX_4090, HYBRIDSERVE_PAPER)
    assert (hybrid.peak, hybrid.to_device, hybrid.peak / hybrid.to_device) == pytest.approx((120e12, 25e9, 4.8e3), rel=ROUNDING)
    assert OffloadMachine.build(RTX_4090, FLEXGEN_ON_HYBRIDSERVE).to_device == pytest.approx(0.55 * 25e9, rel=ROUNDING)


def test_rates_beyond_the_data_sheet_are_named():
    """PCIe 4.0 x16 carries 31.5 GB/s: KVPR's 32 GB/s is 1.6 % more, its table's 32 GiB/s 9 %."""
    assert KVPR_NOMINAL.beyond_data_sheet == ("to_device 1.016", "to_host 1.016")
    assert KVPR_PAPER.beyond_data_sheet == ("to_device 1.091", "to_host 1.091")
    assert [profile.beyond_data_sheet for profile in PHYSICAL] == [(), (), ()]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_a_share_that_is_not_1_says_where_it_is_from(profile: OffloadProfile):
    changed = replace(profile, name="datasheet", stated_in="", fitted_on="") != DATASHEET
    assert changed == bool(profile.stated_in or profile.fitted_on)


def one_sentence(refusal: pytest.ExceptionInfo[ValueError], *words: str) -> None:
    message = str(refusal.value)
    assert "\n" not in message
    assert ". " not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (replace(SMALL, tiers=(GPU,), units=(UNIT,), links=()), ("'small'", "one tier")),
        (replace(SMALL, links=()), ("no link 'host' -> 'HBM'", "add it")),
        (replace(SMALL, links=(DOWN,)), ("no link 'HBM' -> 'host'", "add it")),
        (replace(SMALL, links=(UP,)), ("no link 'host' -> 'HBM'", "add it")),
        (replace(SMALL, units=(CPU,)), ("'HBM' has no compute unit", "add the GPU")),
    ],
)
def test_a_machine_that_cannot_offload_is_refused(system: System, words: tuple[str, ...]):
    with pytest.raises(ValueError, match="system 'small'") as refusal:
        OffloadMachine.build(system)
    one_sentence(refusal, *words)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", " "),
        *((field, value) for field in ("compute", "memory", "to_device", "to_host", "host_memory", "usable") for value in (0, -1, "1")),
        ("compute", float("inf")),
        ("usable", 1.1),
        ("reserved", -1),
        ("reserved", float("nan")),
    ],
)
def test_impossible_profiles_are_refused(field: str, value: object):
    with pytest.raises(ValueError, match=field if field != "name" else "profile needs a name") as refusal:
        replace(DATASHEET, **{field: value})
    one_sentence(refusal)


# Layers


@given(workload=workloads())
def test_bytes_and_flops_of_the_layers_are_those_of_the_llm(workload: Workload):
    """Every tensor is counted once: weights, state of any number of tokens, and layers."""
    layers = offload_layers(workload)
    tokens = workload.batch * workload.context
    assert sum(layer.layers for layer in layers) == workload.llm.num_hidden_layers
    assert sum(layer.layers * layer.weight_bytes for layer in layers) == pytest.approx(workload.weight_bytes, rel=ROUNDING)
    assert sum(layer.layers * layer.kv_bytes * tokens for layer in layers) == pytest.approx(workload.state_bytes, rel=ROUNDING)
    active = sum(count * sum(m.inputs * m.outputs * m.experts_per_token for m in matrices) for count, matrices in workload.llm.layers)
    assert sum(layer.layers * layer.linear_flops for layer in layers) == pytest.approx(2 * workload.batch * active, rel=ROUNDING)
    for layer in layers:
        assert layer.batch == workload.batch
        assert 0 < layer.read_bytes <= layer.weight_bytes * (1 + ROUNDING)
        assert 0 < layer.projection_bytes < layer.weight_bytes
        # Each element of the projections meets each token once: 2 FLOP.
        elements = layer.projection_bytes / (workload.weight_bits / 8)
        assert layer.recompute_flops == pytest.approx(2 * elements, rel=ROUNDING)
        assert layer.act_bytes == workload.llm.hidden_size * workload.activation_bits / 8


@given(workload=workloads(), batch=st.integers(1, 64), context=st.integers(0, 10**6))
def test_what_a_token_costs_depends_on_neither_batch_nor_context(workload: Workload, batch: int, context: int):
    def of_a_token(layers: tuple[OffloadLayer, ...]) -> list[tuple[float, ...]]:
        return [(one.weight_bytes, one.kv_bytes, one.act_bytes, one.recompute_flops, one.attention_flops) for one in layers]

    assert offload_layers(replace(workload, context=context)) == offload_layers(workload)
    assert of_a_token(offload_layers(replace(workload, batch=batch))) == of_a_token(offload_layers(workload))


def test_opt_30b_by_hand():
    """12 h^2 weights, 2 h elements of state, 4 h^2 FLOP to recompute a token, 4 h of attention; h = 7168, 16 bits."""
    h = 7168
    (layer,) = offload_layers(at_16_bits(OPT_30B))
    assert layer == OffloadLayer(
        layers=48,
        batch=32,
        weight_bytes=24 * h * h,
        read_bytes=24 * h * h,
        sent_bytes=24 * h * h,
        projection_bytes=4 * h * h,
        linear_flops=2 * 32 * 12 * h * h,
        kv_bytes=4 * h,
        act_bytes=2 * h,
        recompute_flops=4 * h * h,
        attention_flops=4 * h,
    )


def test_only_touched_experts_are_read():
    """Mixtral: 2 of 8 experts a token; n requests read 1 - (3/4)^n of them, and all weights of attention and router."""
    expert = 3 * 4096 * 14336 * 2
    for batch in (1, 4, 64):
        (layer,) = offload_layers(at_16_bits(MIXTRAL_8X7B, batch=batch))
        rest = layer.weight_bytes - 8 * expert
        assert rest == (4096 * (32 + 2 * 8) * 128 + 4096 * 4096 + 4096 * 8) * 2
        assert layer.read_bytes == pytest.approx(rest + 8 * expert * (1 - 0.75**batch), rel=ROUNDING)
        assert layer.linear_flops == pytest.approx(2 * batch * (rest / 2 + 2 * expert / 2), rel=ROUNDING)
    (one,) = offload_layers(at_16_bits(MIXTRAL_8X7B, batch=1))
    assert one.read_bytes == pytest.approx(rest + 2 * expert, rel=ROUNDING)


def test_mla_recomputes_the_latent_and_the_rotary_key():
    """DeepSeek-V3: 512 + 64 elements from 7168 each, in dense layers and in those with experts."""
    layers = offload_layers(at_16_bits(DEEPSEEK_V3))
    assert [layer.layers for layer in layers] == [3, 58]
    for layer in layers:
        assert layer.recompute_flops == 2 * 7168 * 576
        assert (layer.kv_bytes, layer.act_bytes) == (2 * 576, 2 * 7168)
        assert layer.attention_flops == 2 * 128 * (512 + 64) + 2 * 128 * 512
    assert layers[1].read_bytes < layers[1].weight_bytes


def test_a_prefill_is_refused():
    with pytest.raises(ValueError, match="decode step") as refusal:
        offload_layers(Workload(llm=OPT_30B, batch=1, context=8, phase="prefill"))
    one_sentence(refusal, "'prefill'", "phase='decode'")


# Ratios


@pytest.mark.parametrize("llm", [OPT_30B, LLAMA2_70B, LLMS["llama3.1-8b"], DEEPSEEK_V3], ids=lambda llm: llm.name)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_rho_is_h_times_bandwidth_over_peak_whatever_the_group(llm: LLMConfig, profile: OffloadProfile):
    """(2 h n / F) / (2 n / BW) at 16 bits: recomputing grows with the state as its transfer does."""
    machine = OffloadMachine.build(RTX_4090, profile)
    for layer in offload_layers(at_16_bits(llm)):
        ratios = offload_ratios(layer, machine, 4096)
        assert ratios.rho == pytest.approx(llm.hidden_size * machine.to_device / machine.peak, rel=ROUNDING)
        assert ratios.r == llm.hidden_size / llm.state_elements
        assert ratios.act_pays == (llm.hidden_size < llm.state_elements)
        assert ratios.w == pytest.approx(layer.read_bytes / (4096 * layer.kv_bytes), rel=ROUNDING)
        assert ratios.c == pytest.approx(float(layer.compute_time(machine, 4096)) / float(layer.kv_time(machine, 4096)), rel=ROUNDING)


@pytest.mark.parametrize("tokens", [0, -1, float("nan")])
def test_ratios_of_no_state_are_refused(tokens: float):
    (layer,) = offload_layers(at_16_bits(OPT_30B))
    with pytest.raises(ValueError, match="at least one token") as refusal:
        offload_ratios(layer, OffloadMachine.build(SMALL), tokens)
    one_sentence(refusal)


# Times


@st.composite
def machines(draw: st.DrawFn) -> System:
    rate = st.floats(1e9, 1e13)
    return System(
        name="drawn",
        tiers=(replace(GPU, bandwidth=draw(rate)), replace(HOST, bandwidth=draw(rate))),
        units=(replace(UNIT, matrix_peak=draw(rate) * 100), replace(CPU, vector_peak=draw(rate))),
        links=(replace(DOWN, bandwidth=draw(rate), efficiency=draw(st.floats(0.1, 1))), replace(UP, bandwidth=draw(rate))),
    )


def faster(system: System, part: str, factor: float) -> System:
    """The machine with one rate multiplied."""
    if part in ("HBM", "host"):
        return system.with_tier(part, bandwidth=system.tier(part).bandwidth * factor)
    if part == "GPU":
        return system.with_unit("GPU", matrix_peak=system.units[0].matrix_peak * factor)
    down, up = system.links
    return replace(system, links=(replace(down, bandwidth=down.bandwidth * factor), up))


def times(layer: OffloadLayer, machine: OffloadMachine, tokens: int) -> dict[str, float]:
    """Every time of a layer, and a step in every template at its best share."""
    terms = {
        "kv": float(layer.kv_time(machine, tokens)),
        "act": float(layer.act_time(machine, tokens)),
        "recompute": float(layer.recompute_time(machine, tokens)),
        "weights": layer.weight_time(machine),
        "compute": float(layer.compute_time(machine, tokens)),
    }
    steps = {
        "fluid": fluid(best_fluid_share(**terms), **terms),
        "chunked": chunked(best_chunked_share(chunks=4, **terms), chunks=4, **terms),
        "staged": staged(best_staged_share(**terms), **terms),
    }
    return terms | {"projection": layer.projection_time(machine)} | {name: float(step) for name, step in steps.items()}


@settings(max_examples=50)
@given(
    workload=workloads(),
    system=machines(),
    part=st.sampled_from(["HBM", "host", "GPU", "link"]),
    factor=st.floats(1, 100),
    tokens=st.integers(0, 10**6),
)
def test_more_bandwidth_or_compute_is_never_slower(workload: Workload, system: System, part: str, factor: float, tokens: int):
    for layer in offload_layers(workload):
        before = times(layer, OffloadMachine.build(system), tokens)
        after = times(layer, OffloadMachine.build(faster(system, part, factor)), tokens)
        for name, seconds in after.items():
            assert seconds <= before[name] * (1 + ROUNDING), name


@settings(max_examples=50)
@given(workload=workloads(), system=machines(), share=st.floats(0, 1), tokens=st.integers(0, 10**6))
@pytest.mark.parametrize("profile", PHYSICAL, ids=lambda profile: profile.name)
def test_no_time_is_below_the_physical_bound(profile: OffloadProfile, workload: Workload, system: System, share: float, tokens: int):
    """Bytes over the link's or the memory's data sheet rate, FLOPs over the peak; for a step, of the share that is kept as ACT."""
    machine = OffloadMachine.build(system, profile)
    link, memory, peak = system.links[0].bandwidth, system.tiers[0].bandwidth, system.units[0].matrix_peak
    less = 1 - ROUNDING
    for layer in offload_layers(workload):
        assert float(layer.kv_time(machine, tokens)) >= less * tokens * layer.kv_bytes / link
        assert float(layer.act_time(machine, tokens)) >= less * tokens * layer.act_bytes / link
        assert layer.weight_time(machine) >= less * layer.read_bytes / link
        compute = float(layer.compute_time(machine, tokens))
        assert compute >= less * (layer.read_bytes + tokens * layer.kv_bytes) / memory
        assert compute >= less * (layer.linear_flops + tokens * layer.attention_flops) / peak
        moved = layer.read_bytes + tokens * (share * layer.act_bytes + (1 - share) * layer.kv_bytes)
        worked = layer.linear_flops + tokens * (layer.attention_flops + share * layer.recompute_flops)
        terms = {name: times(layer, machine, tokens)[name] for name in ("kv", "act", "recompute", "weights", "compute")}
        for step in (fluid(share, **terms), staged(share, **terms), chunked(share, chunks=4, **terms)):
            assert float(step) >= less * max(moved / link, worked / peak)


def test_times_are_functions_of_arrays_and_linear_in_tokens():
    (layer,) = offload_layers(at_16_bits(OPT_30B))
    machine = OffloadMachine.build(SMALL)
    tokens = np.array([[0, 1], [1024, 10**7]])
    for time in (layer.kv_time, layer.act_time, layer.recompute_time):
        assert time(machine, tokens).shape == (2, 2)
        np.testing.assert_allclose(time(machine, tokens), tokens * float(time(machine, 1)), rtol=ROUNDING)
    # An array equals its elements, one by one.
    singles = [[float(layer.compute_time(machine, one)) for one in row] for row in tokens]
    np.testing.assert_array_equal(layer.compute_time(machine, tokens), singles)


def test_an_endless_link_transfers_in_no_time():
    machine = replace(OffloadMachine.build(SMALL), to_device=float("inf"))
    (layer,) = offload_layers(at_16_bits(OPT_30B))
    assert float(layer.kv_time(machine, 1024)) == layer.weight_time(machine) == 0


# Costs


def cost(gpu: float, host: float) -> OffloadCost:
    return OffloadCost(
        latency=1.0,
        link_time=0.5,
        gpu_time=0.25,
        tier_names=("HBM", "host"),
        tier_bytes=(gpu, host),
        capacity=(40 * GB, 512 * GB),
        to_device_bytes=1 * GB,
    )


def test_a_plan_that_is_exactly_full_fits():
    full = cost(40 * GB, 512 * GB)
    assert (full.fits, full.overflow, full.explain_overflow()) == (True, (0.0, 0.0), "")


def test_a_thousandth_of_a_byte_is_forgiven_and_a_byte_is_not():
    """Sums of bytes are off in their last digits at 40e9, which a double resolves to 1e-5."""
    assert cost(40 * GB + 1e-4, 0).fits
    assert cost(40 * GB + 1e-4, 0).overflow == (0.0, 0.0)
    assert not cost(40 * GB + 1, 0).fits
    assert cost(40 * GB + 1, 0).overflow == (1.0, 0.0)


def test_an_overflow_says_where_and_by_how_much():
    both = cost(41 * GB, 600 * GB)
    assert both.overflow == (1 * GB, 88 * GB)
    assert not both.fits
    assert both.explain_overflow() == ("HBM holds 41 GB of 40 GB: 1 GB too much, host holds 600 GB of 512 GB: 88 GB too much")
    assert cost(0, 600 * GB).explain_overflow() == "host holds 600 GB of 512 GB: 88 GB too much"
