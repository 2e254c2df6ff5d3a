"""The step estimate: its kernels against ``kernels``, its arrays against a loop over them, the physical bound, singles, and laws."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memsplit.models import ComputeUnit, Kernel, KernelMappingProblem, MemoryTier, System, Workload
from memsplit.models.estimate import (
    CHUNK,
    STEP_DATASHEET,
    STEP_FUSED,
    StepEstimate,
    StepMachines,
    StepModel,
    StepProfile,
    tensor_parallel,
    tensor_parallel_all,
)
from memsplit.models.presets import (
    DEEPSEEK_V3,
    GPT3_175B,
    H2M2_SYSTEM,
    LLAMA2_70B,
    LLMS,
    LPDDR_ONLY_SYSTEM,
    MIXTRAL_8X7B,
    OPT_30B,
    QWEN3_8B,
)
from memsplit.models.systems import Systems
from memsplit.models.units import GB, TB, TFLOPS
from memsplit.models.workload import kernels, step_kernels, touched_share
from memsplit.solvers import SingleTierMapping
from tests.strategies import llms

BITS = {"weight_bits": 16, "kv_bits": 16, "activation_bits": 16}
SOFT = StepProfile(name="soft", memory=0.8, matrix=0.7, vector=0.6, overlap=3.7, lm_head=True)


def gpu(**changes: float) -> System:
    """One GPU of 80 GB."""
    sizes = {
        "capacity": 80 * GB,
        "bandwidth": 2039 * GB,
        "energy": 31e-12,
        "cost": 15 / GB,
        "peak": 312 * TFLOPS,
        "vector": 78 * TFLOPS,
    } | changes
    return System(
        name="GPU",
        tiers=(MemoryTier(name="HBM", **{key: sizes[key] for key in ("capacity", "bandwidth", "energy", "cost")}),),
        units=(ComputeUnit(name="SM", tier="HBM", matrix_peak=sizes["peak"], vector_peak=sizes["vector"]),),
    )


def estimate(system: System, workload: Workload, profile: StepProfile = STEP_DATASHEET, tier: str | None = None) -> StepEstimate:
    bits = {name: getattr(workload, name) for name in BITS}
    model = StepModel.build(workload.llm, phase=workload.phase, profile=profile, **bits)
    return model.estimate(StepMachines.build([system], tier=tier), workload.batch, workload.context)


def listed(workload: Workload, profile: StepProfile) -> Iterator[tuple[int, Kernel]]:
    for count, layer in step_kernels(workload, activations=profile.activations, lm_head=profile.lm_head):
        yield from ((count, kernel) for kernel in layer)


def seconds_by_hand(system: System, workload: Workload, profile: StepProfile) -> float:
    """The sum over the kernels of this very batch and context, one number at a time, on a machine of one unit."""
    (tier,), (unit,) = system.tiers, system.units
    total = 0.0
    for count, kernel in listed(workload, profile):
        nbytes = kernel.weight_bytes * kernel.touched + kernel.state_bytes + kernel.activation_bytes
        x = nbytes / (tier.bandwidth * profile.memory)
        peak = unit.vector_peak * profile.vector
        if kernel.engine == "matrix":
            peak = unit.matrix_peak * profile.matrix * kernel.rows / max(unit.tile or 1, kernel.rows)
        y = kernel.flops / peak
        p = profile.overlap
        total += count * (max(x, y) if p == math.inf else (x**p + y**p) ** (1 / p))
    return total


workloads = st.builds(
    Workload,
    llm=llms(),
    batch=st.integers(1, 200),
    context=st.integers(1, 3000),
    phase=st.sampled_from(["decode", "prefill"]),
    weight_bits=st.sampled_from([4, 8, 16]),
    kv_bits=st.sampled_from([8, 16]),
    activation_bits=st.sampled_from([8, 16]),
)
profiles = st.builds(
    StepProfile,
    name=st.just("any"),
    memory=st.floats(0.1, 1),
    matrix=st.floats(0.1, 1),
    vector=st.floats(0.1, 1),
    overlap=st.sampled_from([1, 1.5, 2, 3.7, 8, math.inf]),
    activations=st.booleans(),
    lm_head=st.booleans(),
)


@pytest.mark.parametrize("llm", LLMS.values(), ids=LLMS)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_products_and_attention_are_those_of_kernels(llm, phase):
    """The same FLOPs and bytes for every published LLM, to the last bit; halves of attention are exact in floats."""
    workload = Workload(llm=llm, batch=13, context=777, phase=phase, **BITS)
    for (count, layer), (found_count, found) in zip(kernels(workload), step_kernels(workload), strict=True):
        shared = [kernel for kernel in found if kernel.engine == "matrix" or kernel.sublayer == "attention"]
        for field in ("flops", "weight_bytes", "state_bytes", "activation_bytes", "read_bytes"):
            assert sum(getattr(kernel, field) for kernel in layer) == sum(getattr(kernel, field) for kernel in shared)
        assert found_count == count


def test_llama2_70b_decodes_in_at_least_twelve_kernels():
    """Sixteen with activations, each of which does work."""
    model = StepModel.build(LLAMA2_70B, **BITS)
    assert len(model.names) == 16
    assert all(count == 80 for count in model.counts)
    assert {"q_proj", "attention_scores", "attention_values", "gate_proj", "attention_norm", "rotary", "kv_write", "ffn_residual"} <= set(
        model.names
    )
    for _, kernel in listed(Workload(llm=LLAMA2_70B, batch=1, context=1), STEP_DATASHEET):
        assert kernel.flops + kernel.weight_bytes + kernel.state_bytes + kernel.activation_bytes > 0


@pytest.mark.parametrize("llm", [LLAMA2_70B, OPT_30B, MIXTRAL_8X7B, DEEPSEEK_V3, QWEN3_8B], ids=lambda llm: llm.name)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_coefficients_give_the_bytes_and_flops_of_the_kernels(llm, phase, batch):
    """Bytes and FLOPs of the step from one coefficient a kernel equal the sums over ``step_kernels``: sums in another order differ in
    their last digits, whole ones do not."""
    workload = Workload(llm=llm, batch=batch, context=129, phase=phase, **BITS)
    found = list(listed(workload, STEP_DATASHEET))
    step = estimate(gpu(), workload)
    nbytes = math.fsum(c * (k.weight_bytes * k.touched + k.state_bytes + k.activation_bytes) for c, k in found)
    assert step.traffic[0] == (nbytes if not llm.num_experts else pytest.approx(nbytes, rel=1e-14))
    assert step.state[0] == workload.state_bytes
    model = StepModel.build(llm, phase=phase, **BITS)
    flops = math.fsum(c * k.flops for c, k in found if k.engine == "matrix" and k.sublayer != "attention")
    assert model.product_flops * workload.tokens == flops
    assert model.held_weights == workload.weight_bytes


@settings(max_examples=150, deadline=None)
@given(workload=workloads, profile=profiles, peak=st.floats(1.0, 1e6), vector=st.floats(1.0, 1e6), tile=st.sampled_from([None, 4, 128]))
def test_a_step_is_the_sum_over_its_kernels(workload, profile, peak, vector, tile):
    """Arrays and coefficients against one kernel after the other: reciprocals and powers differ in their last digits."""
    machine = gpu(bandwidth=1e3, peak=peak, vector=vector).with_unit("SM", tile=tile)
    step = estimate(machine, workload, profile)
    assert step.latency[0] == pytest.approx(seconds_by_hand(machine, workload, profile), rel=1e-12)
    assert step.energy[0] == step.traffic[0] * machine.tiers[0].energy
    assert step.bound[0] <= step.latency[0]


@pytest.mark.parametrize(
    ("llm", "devices", "bandwidth", "batch", "context", "milliseconds"),
    [
        (OPT_30B, 1, 2039 * GB, 8, 1024, 34.56),
        (LLAMA2_70B, 4, 2039 * GB, 16, 2048, 18.10),
        (LLAMA2_70B, 4, 3350 * GB, 16, 2048, 11.02),
        (GPT3_175B, 8, 2039 * GB, 8, 2048, 26.07),
    ],
)
def test_fused_decode_on_gpus_is_the_physical_bound(llm, devices, bandwidth, batch, context, milliseconds):
    """Weights and state over the bandwidth of all GPUs, 16 bits; the bytes are derived by hand in test_physical_bound.py."""
    system = tensor_parallel(gpu(bandwidth=bandwidth), devices)
    workload = Workload(llm=llm, batch=batch, context=context, **BITS)
    fused, unfused = estimate(system, workload, STEP_FUSED), estimate(system, workload)
    by_hand = (workload.weight_bytes + workload.state_bytes) / (devices * bandwidth)
    for found in (fused.latency[0], fused.bound[0], unfused.bound[0]):
        assert found == pytest.approx(by_hand, rel=1e-12)  # sums in another order
        assert found * 1e3 == pytest.approx(milliseconds, abs=0.005)  # written with two decimals
    assert fused.latency[0] < unfused.latency[0] < 1.02 * fused.latency[0]
    assert fused.headroom[0] == pytest.approx(system.tiers[0].capacity - workload.weight_bytes - workload.state_bytes, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 32, 128, 500])
@pytest.mark.parametrize("llm", [LLAMA2_70B, MIXTRAL_8X7B, DEEPSEEK_V3], ids=lambda llm: llm.name)
def test_kernels_one_by_one_are_no_faster_than_sublayers_that_overlap(llm, batch):
    """The kernel mapping hides memory time behind the compute time of a whole sublayer, with two chips of tiled arrays on one tier, too.

    Equal where memory bounds every kernel, which it does on a chip without a floor and with ample compute.
    """
    workload = Workload(llm=llm, batch=batch, context=512)
    system = LPDDR_ONLY_SYSTEM.with_tier("LPDDR", capacity=4 * TB).with_page(1)
    sublayers = SingleTierMapping().solve(KernelMappingProblem.build(system, workload)).unwrap()
    latency = KernelMappingProblem.build(system, workload).evaluate(sublayers).latency
    step = estimate(system, workload, STEP_FUSED)
    assert step.latency[0] >= latency * (1 - 1e-12)
    ample = system
    for unit in system.units:
        ample = ample.with_unit(unit.name, matrix_peak=1e30, vector_peak=1e30)
    problem = KernelMappingProblem.build(ample, workload)
    mapped = problem.evaluate(SingleTierMapping().solve(problem).unwrap()).latency
    assert estimate(ample, workload, STEP_FUSED).latency[0] == pytest.approx(mapped, rel=1e-12)


PHASES = {
    "plain decode": (LLAMA2_70B, "decode", STEP_DATASHEET),
    "soft decode with head": (LLAMA2_70B, "decode", SOFT),
    "euclidean decode": (LLAMA2_70B, "decode", StepProfile(name="two", overlap=2)),
    "experts": (DEEPSEEK_V3, "decode", SOFT),
    "prefill": (MIXTRAL_8X7B, "prefill", SOFT),
}


@pytest.mark.parametrize("case", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("designs", [1, 2, 5, 9, 63, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13])
def test_a_batch_equals_its_singles_bit_for_bit(case, designs):
    """Whatever its size: the last designs of an odd batch take other instructions, and sums other orders, in careless code."""
    llm, phase, profile = case
    rng = np.random.default_rng(designs)
    systems = Systems.from_columns(
        H2M2_SYSTEM,
        {
            "HBM_bandwidth_TBps": rng.uniform(0.5, 9, designs),
            "HBM_capacity_GB": rng.uniform(10, 900, designs),
            "HBM chip_matrix_peak_TFLOPps": rng.uniform(1, 900, designs),
            "HBM chip_vector_peak_TFLOPps": rng.uniform(1, 90, designs),
            "HBM chip_tile": rng.integers(1, 256, designs),
            "HBM_energy_pJ_per_bit": rng.uniform(1, 9, designs),
            "LPDDR_cost_USD_per_GB": rng.uniform(1, 9, designs),
        },
    )
    batch, context = rng.integers(1, 300, designs), rng.integers(1, 9000, designs)
    model = StepModel.build(llm, phase=phase, profile=profile)
    whole = model.estimate(StepMachines.build(systems, tier="HBM"), batch, context, compare=True)
    for i in {0, designs // 2, designs - 2, designs - 1, *rng.integers(0, designs, 20).tolist()}:
        if i < 0:
            continue
        one = model.estimate(StepMachines.build([systems[i]], tier="HBM"), int(batch[i]), int(context[i]), compare=True)
        for field in dataclasses.fields(StepEstimate):
            assert getattr(one, field.name)[0] == getattr(whole, field.name)[i], field.name


@settings(max_examples=60, deadline=None)
@given(workload=workloads, profile=profiles, factor=st.floats(1, 100), which=st.sampled_from(["bandwidth", "peak", "vector"]))
def test_a_faster_machine_is_never_slower(workload, profile, factor, which):
    """Powers are right to a few last digits only."""
    slow = {"bandwidth": 1e3, "peak": 1e4, "vector": 1e3}
    before = estimate(gpu(**slow), workload, profile)
    after = estimate(gpu(**slow | {which: slow[which] * factor}), workload, profile)
    assert after.latency[0] <= before.latency[0] * (1 + 1e-13)
    assert after.bound[0] <= before.bound[0]


@settings(max_examples=60, deadline=None)
@given(workload=workloads, profile=profiles, factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_scaling_all_rates_scales_the_time(workload, profile, factor):
    """By powers of two exactly, but for the powers of a p-norm, whose arguments are the same."""
    rates = {"bandwidth": 1e3, "peak": 1e4, "vector": 1e3}
    before = estimate(gpu(**rates), workload, profile)
    after = estimate(gpu(**{name: rate / factor for name, rate in rates.items()}), workload, profile)
    assert after.latency[0] == before.latency[0] * factor
    assert after.bound[0] == before.bound[0] * factor


@settings(max_examples=60, deadline=None)
@given(workload=workloads, p=st.floats(1, 50))
def test_soft_overlap_lies_between_none_and_all(workload, p):
    """A p-norm lies between the maximum and the sum, and falls with p; rounding of powers."""
    machine = gpu(bandwidth=1e3, peak=3e4, vector=2e3)
    none, soft, harder, full = (
        estimate(machine, workload, StepProfile(name="p", overlap=each)).latency[0] for each in (1, p, 2 * p, math.inf)
    )
    assert full <= harder * (1 + 1e-13)
    assert harder <= soft * (1 + 1e-13)
    assert soft <= none * (1 + 1e-13)


def test_an_empty_context_a_free_machine_and_exact_capacity():
    """No state: attention takes no time at any p. Infinite rates: none at all. A tier that is exactly full holds everything."""
    workload = Workload(llm=OPT_30B, batch=3, context=0, **BITS)
    for profile in (STEP_DATASHEET, SOFT, StepProfile(name="sum", overlap=1)):
        assert estimate(gpu(), workload, profile).latency[0] == pytest.approx(seconds_by_hand(gpu(), workload, profile), rel=1e-12)
        free = estimate(gpu(bandwidth=math.inf, peak=math.inf, vector=math.inf), workload, profile)
        assert free.latency[0] == 0 == free.bound[0]
    full = gpu(capacity=workload.weight_bytes)
    assert estimate(full, workload, STEP_FUSED).fits[0]
    assert estimate(full, workload, STEP_FUSED).headroom[0] == 0
    assert not estimate(full, workload).fits[0], "activations need room, too"
    assert not estimate(gpu(capacity=workload.weight_bytes - 1), workload, STEP_FUSED).fits[0]


@given(tokens=st.integers(0, 500), experts=st.integers(1, 64), chosen=st.integers(1, 64))
@example(tokens=0, experts=4, chosen=4)
def test_touched_share_of_experts(tokens, experts, chosen):
    """1 - (1 - k/E)^n, in [0, 1], and the same bits for one number and in an array."""
    used = min(chosen, experts) / experts
    share = float(touched_share(tokens, used))
    assert share == pytest.approx(1 - (1 - used) ** tokens, rel=1e-12, abs=1e-15)
    assert share == touched_share(np.arange(501), used)[tokens]
    assert 0 <= share <= 1


def test_lm_head_reads_and_holds_what_it_needs():
    """The head once a request in prefill, too; the embeddings are held beside it unless they are the same matrix."""
    table = LLAMA2_70B.hidden_size * LLAMA2_70B.vocab_size * 2
    head = StepProfile(name="head", activations=False, lm_head=True)
    for phase in ("decode", "prefill"):
        workload = Workload(llm=LLAMA2_70B, batch=4, context=100, phase=phase, **BITS)
        without, having = estimate(gpu(), workload, STEP_FUSED), estimate(gpu(), workload, head)
        assert having.traffic[0] - without.traffic[0] == table
        assert without.headroom[0] - having.headroom[0] == 2 * table
        tied = dataclasses.replace(workload, llm=dataclasses.replace(LLAMA2_70B, tie_word_embeddings=True))
        assert without.headroom[0] - estimate(gpu(), tied, head).headroom[0] == table


def test_devices_are_one_machine_with_everything_added_up():
    """A number of devices a design gives the bits of ``tensor_parallel``."""
    model = StepModel.build(LLAMA2_70B, **BITS)
    together = model.estimate(StepMachines.build([gpu()], devices=[1, 2, 3, 8]), 16, 2048, compare=True)
    for i, devices in enumerate((1, 2, 3, 8)):
        one = model.estimate(StepMachines.build([tensor_parallel(gpu(), devices)]), 16, 2048, compare=True)
        for field in dataclasses.fields(StepEstimate):
            assert getattr(one, field.name)[0] == getattr(together, field.name)[i], field.name
    assert together.fits.tolist() == [False, True, True, True]
    assert together.memory_cost[3] == tensor_parallel(gpu(), 8).memory_cost


def test_several_machines_cost_and_draw_as_many_times_as_much():
    """Every number of a System's parts is either one that adds up or one that does not; what is unknown stays so."""
    unit = ComputeUnit(
        name="SM", tier="HBM", matrix_peak=1e12, vector_peak=1e11, tile=8, area=5.0, cost=7.0, static_power=9.0, energy=1e-12
    )
    single = dataclasses.replace(gpu(), units=(unit,)).with_tier("HBM", static_power=11.0, page=4)
    triple = tensor_parallel(single, 3)
    (tier,), (together,) = triple.tiers, triple.units
    assert (tier.capacity, tier.bandwidth, tier.static_power) == (240 * GB, 3 * 2039 * GB, 33.0)
    assert (tier.energy, tier.cost, tier.page) == (31e-12, 15 / GB, 4)
    assert (together.matrix_peak, together.area, together.cost, together.static_power) == (3e12, 15.0, 21.0, 27.0)
    assert (together.energy, together.tile, together.silicon_cost) == (1e-12, 8, None)
    assert tensor_parallel(single, 1) == single


def test_unknown_energy_and_cost_stay_unknown():
    system = H2M2_SYSTEM.with_tier("HBM", energy=None).with_tier("LPDDR", cost=None)
    step = estimate(system, Workload(llm=LLAMA2_70B, batch=1, context=1), tier="HBM")
    assert step.energy is None
    assert step.memory_cost is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 1.2}, "memory must be at most 1, not 1.2"),
        ({"vector": 0.0}, "vector must be a number above 0"),
        ({"overlap": 0.5}, "overlap must be at least 1"),
        ({"overlap": math.nan}, "overlap must be a number"),
        ({"activations": 1}, "activations must be True or False"),
        ({"name": " "}, "a profile needs a name"),
    ],
)
def test_profiles_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StepProfile(**{"name": "wrong"} | changes)


def test_the_tier_must_be_named_among_several_and_have_a_unit():
    with pytest.raises(ValueError, match=r"has 2 tiers, and this estimate takes one that holds all: name it, tier=..., one of"):
        StepMachines.build([H2M2_SYSTEM])
    with pytest.raises(ValueError, match="has no tier 'DRAM'; tiers are"):
        StepMachines.build([H2M2_SYSTEM], tier="DRAM")
    streamed = dataclasses.replace(H2M2_SYSTEM, units=H2M2_SYSTEM.units[:1])
    with pytest.raises(ValueError, match=r"tier 'LPDDR' has no compute unit; name one of \['HBM'\]"):
        StepMachines.build([streamed], tier="LPDDR")
    with pytest.raises(ValueError, match="devices must be a whole number of machines, at least 1"):
        tensor_parallel(gpu(), 0)


def test_many_machines_of_many_devices_are_each_machine_of_its_devices():
    """All that adds up, by the number of each design, also where no other column varies it."""
    varied = Systems.from_columns(H2M2_SYSTEM, {"HBM_capacity_GB": [10.0, 20.0, 30.0]})
    for systems, devices in ((varied, [1, 3, 7]), (varied, 3), (Systems.of([H2M2_SYSTEM]), [1, 2, 5]), (varied, 1)):
        together = tensor_parallel_all(systems, devices)
        for i, number in enumerate(np.broadcast_to(devices, 3)):
            single = tensor_parallel(systems[min(i, len(systems) - 1)], int(number))
            assert dataclasses.replace(together[min(i, len(together) - 1)], name="x") == dataclasses.replace(single, name="x")
